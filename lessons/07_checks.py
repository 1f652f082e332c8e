"""Proves the equations of lesson 07: with the library's replay on tiny models, and by enumeration in float64."""

import copy
import math
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl_edu.exact import TabularPolicy
from minirl_edu.models import tiny_moe
from minirl_edu.objectives import minirl_loss
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.worlds.simulations import VARIANTS, who_gets_the_gradient, who_gets_the_gradient_ceiling


def normal(seed: int, *shape: int) -> Tensor:
    """Normally distributed float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- a transformer, replayed

TOKENS = torch.randint(18, (8, 14), generator=torch.Generator().manual_seed(0))


def spread_moe(seed: int = 0) -> PreTrainedModel:
    """A tiny Qwen3-MoE in float64 whose routers and policy are not flat."""
    model = tiny_moe(18, seed=seed, hidden=64, expert_hidden=32).double().eval()
    model.set_experts_implementation("eager")  # the faster one knows no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if "gate.weight" in name else 5)
    return model


def disturbed(model: PreTrainedModel, size: float, seed: int) -> PreTrainedModel:
    """A copy whose matrices are changed by a relative `size`: another engine, or later weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 + size * normal(seed, *parameter.shape))
    return other


def own(model: PreTrainedModel) -> Routes:
    """The experts that a model chooses by itself."""
    with torch.no_grad(), RoutingReplay(model).record() as tape:
        model(input_ids=TOKENS, use_cache=False)
    return tape.routes


def log_probs(model: PreTrainedModel, routes: Routes | None = None) -> Tensor:
    """[B, S, V], log π(·|·, e), live without `routes`."""
    with torch.no_grad():
        if routes is None:
            return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)
        with RoutingReplay(model).replay(routes):
            return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)


def of_tokens(logp: Tensor) -> Tensor:
    """[B, S−1], the log-probabilities of the tokens that follow."""
    return logp[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]


def flips(a: Routes, b: Routes) -> Tensor:
    """[B, S], whether the sets differ in some layer."""
    return (a.experts.int().sort(-1).values != b.experts.int().sort(-1).values).any(-1).any(-1)


# -------------------------------------------------------------------------- a Mixture of Experts that can be enumerated

V, T, E, D, K = 3, 3, 4, 6, 2
PREFIXES = [prefix for length in range(T) for prefix in product(range(V - 1), repeat=length)]
Theta = dict[str, Tensor]


def toy(seed: int) -> Theta:
    """Parameters of a one-layer MoE that reads a prefix token by token."""
    experts = normal(seed + 2, E, D, D) / math.sqrt(D)
    return {
        "embed": normal(seed, V, D),
        "router": normal(seed + 1, E, D),
        "experts": experts,
        "head": normal(seed + 3, V, D) / 2,
    }


def toy_policy(theta: Theta, forced: Tensor | None = None) -> tuple[TabularPolicy, Tensor]:
    """The policy and the experts of each prefix [P, k]; `forced` replays experts."""
    states, logits, chosen = {}, [], []
    for i, prefix in enumerate(PREFIXES):
        hidden = theta["embed"][prefix[-1] if prefix else -1]
        hidden = torch.tanh(hidden + 0.5 * states[prefix[:-1]] if prefix else hidden)
        scores = theta["router"] @ hidden
        experts = scores.topk(K).indices if forced is None else forced[i]
        mixed = torch.einsum("k,koi,i->o", scores[experts].softmax(0), theta["experts"][experts], hidden)
        states[prefix] = hidden + torch.tanh(mixed)
        logits.append(theta["head"] @ states[prefix])
        chosen.append(experts)
    return TabularPolicy(torch.stack(logits), T), torch.stack(chosen)


def with_margin(theta: Theta, margin: float) -> Theta:
    """The same parameters, the first prefix's (k+1)-th router logit moved to `margin` below its k-th."""
    hidden = torch.tanh(theta["embed"][-1])
    ranked = (theta["router"] @ hidden).sort(descending=True)
    router = theta["router"].clone()
    move = ranked.values[K - 1] - margin - ranked.values[K]
    router[ranked.indices[K]] += move * hidden / hidden.square().sum()
    return {**theta, "router": router}


def stepped(theta: Theta, direction: Theta, eta: float) -> Theta:
    """θ + η d."""
    return {name: theta[name] + eta * direction[name] for name in theta}


def toy_gradient(theta: Theta, rewards: Tensor, forced: Tensor | None) -> Tensor:
    """∇_θ E_{y~π_θ}[R] as one vector, with the experts `forced` or live."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    policy, _ = toy_policy(leaves, forced)
    value = (policy.response_probs() * rewards).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(leaves.values()))])


# ------------------------------------------------------------------------------------------------------- the checks


def check_07_replay() -> None:
    """The block of a Qwen3-MoE under forced random experts, against the formula expert by expert."""
    model = spread_moe()
    block = model.model.layers[0].mlp
    order = torch.rand(8, 14, 2, 8, generator=torch.Generator().manual_seed(1)).argsort(-1)
    routes = Routes(order[..., :2].to(torch.uint8), torch.ones(8, 14, dtype=torch.bool), (0, 1))
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    log_probs(model, routes)
    handle.remove()
    x, found = (t.flatten(0, 1) for t in seen)
    scores = x @ block.gate.weight.T
    expected = torch.zeros_like(x)
    drifted = 0
    with torch.no_grad():
        for n, chosen in enumerate(routes.experts[:, :, 0].flatten(0, 1).long()):
            drifted += set(chosen.tolist()) != set(scores[n].topk(2).indices.tolist())
            for g, e in zip(scores[n][chosen].softmax(0), chosen, strict=True):
                gate, up = (block.experts.gate_up_proj[e] @ x[n]).chunk(2)
                expected[n] += g * (block.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
    assert drifted > 50
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # the router's softmax is float32
    assert expected.abs().mean() > 1e-3


def check_07_weights() -> None:
    """Both products, token by token. R2's second factor and both of R3's have one set of experts above and below.

    What stays is what replay does not touch: the engines' rounding under R3, and under R2 the whole first factor.
    """
    training, engine = spread_moe(), disturbed(spread_moe(), 0.02, seed=1)
    later = disturbed(training, 0.02, seed=2)
    e_old, e_mu = own(training), own(engine)
    mu = of_tokens(log_probs(engine, e_mu))
    assert torch.equal(of_tokens(log_probs(engine)), mu)  # replay alters nothing in the engine that chose
    for experts in (e_old, e_mu):
        old, new = (of_tokens(log_probs(model, experts)) for model in (training, later))
        torch.testing.assert_close((new - mu).exp(), (old - mu).exp() * (new - old).exp())
        assert flips(own(later), experts).any(), "premise: live, the second factor would contain flips"
        assert (of_tokens(log_probs(later)) - new).abs().max() > 1e-3
        assert (old - mu).abs().max() > 1e-4, "the rounding of the products stays"
    assert torch.equal(log_probs(training, e_old), log_probs(training))  # R2 alters nothing in π_old, R3 does
    assert (of_tokens(log_probs(training, e_mu)) - of_tokens(log_probs(training))).abs().max() > 1e-3


def check_07_table_1() -> None:
    """The four cells by exact equality of the whole distribution, [B, S, V]."""
    training, engine = spread_moe(), disturbed(spread_moe(), 0.02, seed=1)
    later = disturbed(training, 0.02, seed=2)
    e_old, e_mu = own(training), own(engine)
    altered = {
        (method, when): not torch.equal(log_probs(model, routes), log_probs(model))
        for method, routes in (("R2", e_old), ("R3", e_mu))
        for when, model in (("first", training), ("later", later))
    }
    assert altered == {("R2", "first"): False, ("R2", "later"): True, ("R3", "first"): True, ("R3", "later"): True}
    assert not flips(e_old, own(training)).any() and flips(e_mu, own(training)).any()


def check_07_split() -> None:
    """The discrepancy is a rounding part and a flip part; the flip part of a token without a flip so far is 0."""
    training, engine = spread_moe(), disturbed(spread_moe(), 0.01, seed=1)
    e_old, e_mu = own(training), own(engine)
    mu = of_tokens(log_probs(engine, e_mu))
    old, old_under_mu = of_tokens(log_probs(training, e_old)), of_tokens(log_probs(training, e_mu))
    rounding, flip_part = old_under_mu - mu, old - old_under_mu
    torch.testing.assert_close(old - mu, rounding + flip_part)
    so_far = flips(e_old, e_mu)[:, :-1].cummax(1).values  # attention is causal: only earlier inputs count
    assert so_far.any() and (~so_far).any()
    assert flip_part[~so_far].abs().max() < 1e-12
    assert flip_part[so_far].abs().mean() > 1e-4
    assert rounding.abs().mean() > 1e-4


def check_07_bias() -> None:
    """By finite differences of both objectives. The bias is 0 where the live choice equals the notes, and just beyond
    a border it does not shrink with the distance."""
    direction = toy(1975)
    sizes = []
    for margin in (1e-2, 1e-4, 1e-6):
        theta = with_margin(toy(1970), margin)
        policy, chosen = toy_policy(theta)
        rewards = (normal(5, len(policy.tokens)) > 0).double()
        torch.testing.assert_close(toy_gradient(theta, rewards, chosen), toy_gradient(theta, rewards, None))
        other = next(
            experts
            for sign in (1, -1)
            if not torch.equal(experts := toy_policy(stepped(theta, direction, 10 * sign * margin))[1], chosen)
        )

        def gap(eta: float, theta: Theta = theta, other: Tensor = other, rewards: Tensor = rewards) -> Tensor:
            moved = stepped(theta, direction, eta)
            replayed, live = (toy_policy(moved, experts)[0].response_probs() for experts in (other, None))
            return ((replayed - live) * rewards).sum()

        bias = toy_gradient(theta, rewards, other) - toy_gradient(theta, rewards, None)
        along = bias @ torch.cat([direction[name].flatten() for name in theta])
        h = margin * 1e-2  # stays on the piece
        torch.testing.assert_close(along, (gap(h) - gap(-h)) / (2 * h), rtol=1e-4, atol=1e-7)
        sizes.append(float(bias.norm()))
    assert min(sizes) > 0.01 and max(sizes) / min(sizes) < 1.2


# ------------------------------------------------------------------------------------------- who gets the gradient


def gradient_of_experts(
    table: Tensor, own: int, shares: Tensor, advantages: Tensor, *, replay: bool, is_correction: bool = True
) -> Tensor:
    """−∇ of minirl_loss in the logits [E, V] of one context: expert e writes token a with probability f_e π_e(a)."""
    z = table.clone().requires_grad_()
    logp = z.log_softmax(-1)
    chosen = logp if replay else logp[own].expand_as(logp)
    rollout = logp.detach().reshape(-1, 1)
    weighted = (shares[:, None] * logp.detach().exp() * advantages).reshape(-1, 1)
    chosen, mask = chosen.reshape(-1, 1), torch.ones(z.numel(), 1)
    loss = minirl_loss(
        *(chosen, chosen.detach(), rollout, weighted, mask),
        num_responses=1,
        is_cap=1e9,
        is_correction=is_correction,
    ).loss
    return -torch.autograd.grad(loss, z)[0]


def check_07_writer() -> None:
    """Both sides by enumeration of who writes which token, through minirl_loss, with the exact weight and with none.

    Without replay and without the weight it is still expert o alone that moves, in another direction.
    """
    table, advantages = 1.5 * normal(0, 3, 4), normal(1, 4)
    shares, own = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64), 1
    p = table.softmax(-1)
    centred = p * (advantages - (p * advantages).sum(1, keepdim=True))
    live = torch.where(torch.arange(3)[:, None] == own, centred, 0.0)
    for replay, expected in ((False, live), (True, shares[:, None] * centred)):
        found = gradient_of_experts(table, own, shares, advantages, replay=replay)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    without = gradient_of_experts(table, own, shares, advantages, replay=False, is_correction=False)
    assert without[own].norm() > 1e-2 and (without[own] - live[own]).norm() > 1e-2
    assert without[[0, 2]].abs().max() == 0
    replayed = gradient_of_experts(table, own, shares, advantages, replay=True, is_correction=False)
    torch.testing.assert_close(replayed, shares[:, None] * centred, rtol=1e-10, atol=1e-12)


def check_07_ceiling() -> None:
    """Exact ascent along (07.6) in three contexts ends at (07.7), and at 1 with R3. So do the world's runs."""
    right, own, length = torch.tensor([0, 3, 2]), torch.tensor([0, 1, 1]), 6
    shares = (0.8 * normal(3, 3, 3)).softmax(-1)
    start = normal(2, 3, 3, 4)

    def through_the_engine(table: Tensor, learned: bool) -> float:
        each = []
        for c in range(3):
            good = table[c].softmax(-1)[:, right[c]]
            each.append(sum(shares[c, e] * (1.0 if learned and e == own[c] else good[e]) for e in range(3)))
        return float(sum(each) / 3) ** length

    ends = {}
    for replay in (False, True):
        table = start.clone()
        for _ in range(60):
            for c in range(3):
                rewards = torch.nn.functional.one_hot(right[c], 4).double()
                table[c] += 50 * gradient_of_experts(table[c], int(own[c]), shares[c], rewards, replay=replay)
        ends[replay] = through_the_engine(table, False)
    assert abs(ends[False] - through_the_engine(start, True)) < 0.01 < 0.9 - ends[False], ends
    assert ends[True] > 0.97, ends

    ceiling = who_gets_the_gradient_ceiling(seeds=2, noise=0.3)
    for name, end, tolerance in (("MiniRL", ceiling, 0.01), ("− IS", ceiling, 0.01), ("R3", 1.0, 0.1)):
        curves = who_gets_the_gradient(VARIANTS[name], seeds=2, noise=0.3)
        assert abs(curves["engine_score"][:, -1].mean() - end) < tolerance, name
        assert curves["score"][:, -1].min() > 0.9
    assert ceiling < 0.6
