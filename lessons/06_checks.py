"""Proves the equations of lesson 06: in float64, by autograd, by quadrature, and against the library's models."""

import copy
import math
from itertools import product

import torch
from torch import Tensor, nn

from minirl_edu.exact import TabularPolicy, objective_remainder, token_ratios
from minirl_edu.models import tiny_moe
from minirl_edu.routing import Routes, RoutingReplay

V, T, E, D, K = 3, 3, 4, 6, 2
PREFIXES = [prefix for length in range(T) for prefix in product(range(V - 1), repeat=length)]
Theta = dict[str, Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    """Normally distributed float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def phi(x: Tensor | float) -> Tensor:
    """Φ, the distribution function of the standard normal."""
    return 0.5 * torch.erfc(-torch.as_tensor(x, dtype=torch.float64) / math.sqrt(2))


def slope(x: Tensor, y: Tensor) -> float:
    """Exponent of the power law through the first and the last point."""
    return float((y[-1] / y[0]).log() / (x[-1] / x[0]).log())


# --------------------------------------------------------------- a Mixture-of-Experts policy that can be enumerated


def toy(seed: int) -> Theta:
    """Parameters of a one-layer MoE that reads a prefix token by token."""
    return {
        "embed": normal(seed, V, D),
        "router": normal(seed + 1, E, D),
        "experts": normal(seed + 2, E, D, D) / math.sqrt(D),
        "head": normal(seed + 3, V, D) / 2,
    }


def toy_policy(theta: Theta, forced: Tensor | None = None) -> tuple[TabularPolicy, Tensor, Tensor]:
    """The policy, the experts of each prefix [P, k] and their margins [P]; `forced` replays experts."""
    states, logits, chosen, margins = {}, [], [], []
    for i, prefix in enumerate(PREFIXES):
        hidden = theta["embed"][prefix[-1] if prefix else -1]
        hidden = torch.tanh(hidden + 0.5 * states[prefix[:-1]] if prefix else hidden)
        scores = theta["router"] @ hidden
        ranked = scores.sort(descending=True)
        experts = ranked.indices[:K] if forced is None else forced[i]
        gates = scores[experts].softmax(0)
        states[prefix] = hidden + torch.tanh(torch.einsum("k,koi,i->o", gates, theta["experts"][experts], hidden))
        logits.append(theta["head"] @ states[prefix])
        chosen.append(experts)
        margins.append(ranked.values[K - 1] - ranked.values[K])
    return TabularPolicy(torch.stack(logits), T), torch.stack(chosen), torch.stack(margins)


def with_margin(theta: Theta, margin: float) -> Theta:
    """The same parameters, the first prefix's (k+1)-th router logit moved to `margin` below its k-th."""
    hidden = torch.tanh(theta["embed"][-1])
    ranked = (theta["router"] @ hidden).sort(descending=True)
    runner_up, move = ranked.indices[K], ranked.values[K - 1] - margin - ranked.values[K]
    router = theta["router"].clone()
    router[runner_up] += move * hidden / hidden.square().sum()
    return {**theta, "router": router}


def closing(theta: Theta, seed: int) -> tuple[Theta, float]:
    """A direction that closes the first margin, and how fast it does."""
    direction = toy(seed)
    h = 1e-6
    before, after = (toy_policy(stepped(theta, direction, eta))[2][0] for eta in (0.0, h))
    if after > before:
        direction = {name: -value for name, value in direction.items()}
        after = toy_policy(stepped(theta, direction, h))[2][0]
    return direction, float((before - after) / h)


def stepped(theta: Theta, direction: Theta, eta: float) -> Theta:
    """θ + η d."""
    return {name: theta[name] + eta * direction[name] for name in theta}


def flipped(a: Tensor, b: Tensor) -> Tensor:
    """[P], where the sets of experts differ."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)


# ------------------------------------------------------------------------------------------------------- the checks


def check_06_layer() -> None:
    """The sum over the chosen experts, expert by expert in float64, is what a Qwen3-MoE block computes."""
    block = tiny_moe(18, seed=0).model.layers[0].mlp
    x = normal(1, 20, 128)
    scores = x @ block.gate.weight.detach().double().T * 20  # a random router is nearly flat: make it choose
    with torch.no_grad():
        block.gate.weight.mul_(20)
        found = block(x.float()[None])[0].double()
        gate_up, down = block.experts.gate_up_proj.double(), block.experts.down_proj.double()
        expected = torch.zeros_like(x)
        for n in range(len(x)):
            chosen = scores[n].topk(2).indices
            gates = scores[n].softmax(0)[chosen]
            for g, e in zip(gates / gates.sum(), chosen, strict=True):
                gate, up = (gate_up[e] @ x[n]).chunk(2)
                expected[n] += g * (down[e] @ (nn.functional.silu(gate) * up))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)  # float32 against float64
    assert expected.abs().mean() > 1e-4


def check_06_gates() -> None:
    """Renormalised probabilities equal a softmax over the selected logits, and the gates of Qwen3's router."""
    router = tiny_moe(18, seed=0).model.layers[0].mlp.gate
    x = normal(2, 50, 128).float()
    with torch.no_grad():
        router.weight.mul_(20)
        scores, gates, chosen = router(x)
    scores = scores.double()
    picked = scores.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(picked / picked.sum(-1, keepdim=True), scores.gather(-1, chosen).softmax(-1))
    torch.testing.assert_close(gates.double(), scores.gather(-1, chosen).softmax(-1), rtol=1e-5, atol=1e-6)
    assert ((picked - gates).abs() > 1e-3).any(), "without renormalising they are other numbers"


def check_06_margin() -> None:
    """No disturbance below half the margin changes the choice; one a hair above it does."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        scores = normal(seed, 8)
        ranked = scores.sort(descending=True)
        half = (ranked.values[1] - ranked.values[2]) / 2
        chosen = set(ranked.indices[:2].tolist())
        signs = torch.randint(0, 2, (500, 8), generator=generator) * 2.0 - 1
        inside = scores + 0.999 * half * signs  # the corners of the cube are its worst points
        assert all(set(row.topk(2).indices.tolist()) == chosen for row in inside)
        worst = torch.zeros(8, dtype=torch.float64)
        worst[ranked.indices[1]], worst[ranked.indices[2]] = -1.001 * half, 1.001 * half
        assert set((scores + worst).topk(2).indices.tolist()) != chosen


def quadrature_flip_probability(scores: Tensor, k: int, sigma: float) -> float:
    """P(the set of the k largest changes) under independent normal noise, by a one-dimensional integral."""
    ranked = scores.sort(descending=True).values
    t = torch.linspace(float(ranked[-1]) - 10 * sigma, float(ranked[0]) + 10 * sigma, 40_001, dtype=torch.float64)
    below = phi((t - ranked[:, None]) / sigma)  # [E, t]: P(s_e + noise < t)
    density = torch.exp(-0.5 * ((t - ranked[:, None]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    smallest = sum(density[e] * (1 - below[[i for i in range(k) if i != e]]).prod(0) for e in range(k))
    return 1 - float(torch.trapezoid(smallest * below[k:].prod(0), t))


def check_06_flip_pair() -> None:
    """Two experts: the closed form against an integral over the noise, and against a million draws."""
    for margin, sigma in ((0.1, 0.2), (0.5, 0.3), (1.0, 0.4)):
        exact = float(phi(-margin / (sigma * math.sqrt(2))))
        assert abs(quadrature_flip_probability(torch.tensor([margin, 0.0]).double(), 1, sigma) - exact) < 1e-8
        noisy = torch.tensor([margin, 0.0]) + sigma * normal(7, 1_000_000, 2)
        drawn = float((noisy[:, 1] > noisy[:, 0]).double().mean())
        assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / 1e6)


def check_06_flip_rate() -> None:
    """Margins with a half-normal density p, p(0) = √(2/π): the mean flip probability over σ tends to p(0)/√π."""
    m = torch.linspace(0, 12, 1_200_001, dtype=torch.float64)
    density = math.sqrt(2 / math.pi) * torch.exp(-0.5 * m**2)
    sigmas = torch.tensor([0.001, 0.002, 0.004], dtype=torch.float64)
    rates = torch.stack([torch.trapezoid(density * phi(-m / (s * math.sqrt(2))), m) for s in sigmas])
    torch.testing.assert_close(
        rates / sigmas, math.sqrt(2 / math.pi) / math.sqrt(math.pi) + 0 * sigmas, rtol=1e-4, atol=0
    )
    assert abs(slope(sigmas, rates) - 1) < 1e-3


def check_06_jump() -> None:
    """A layer's output just before and just after a crossing, in float64, where the gates of the two are equal."""
    scores, direction = torch.tensor([2.0, 1.0, 1.0, -1.0]).double(), torch.tensor([0.3, -0.5, 0.7, 0.2]).double()
    outputs = normal(11, 4, 5)  # E_e(x)

    def layer(eta: float) -> Tensor:
        s = scores + eta * direction
        chosen = s.topk(2).indices
        return s[chosen].softmax(0) @ outputs[chosen]

    gate = scores[[0, 1]].softmax(0)[1]
    torch.testing.assert_close(layer(1e-9) - layer(-1e-9), gate * (outputs[2] - outputs[1]), rtol=1e-6, atol=1e-8)


def check_06_delta() -> None:
    """Before a flip δ shrinks like η; after one it tends to the ratio of two policies at the *same* weights."""
    etas = torch.tensor([1e-5, 1e-4], dtype=torch.float64)
    far, near = with_margin(toy(700), 0.1), with_margin(toy(700), 1e-9)
    direction, speed = closing(far, 750)
    assert speed * 1e-5 > 1e-9 and speed * 1e-4 < 0.1, "premise: all steps from `near` cross, none from `far`"
    mu, chosen, _ = toy_policy(near)
    after = [toy_policy(stepped(near, direction, float(eta))) for eta in etas]
    assert all(flipped(chosen, experts).tolist() == [True] + [False] * (len(PREFIXES) - 1) for _, experts, _ in after)
    limit = token_ratios(toy_policy(near, after[0][1])[0], mu) - 1
    assert limit.abs().max() > 0.01
    errors = torch.stack([(token_ratios(pi, mu) - 1 - limit).abs().max() for pi, _, _ in after])
    assert abs(slope(etas, errors) - 1) < 0.02
    mu, chosen, _ = toy_policy(far)
    before = [toy_policy(stepped(far, direction, float(eta))) for eta in etas]
    assert not any(flipped(chosen, experts).any() for _, experts, _ in before)
    sizes = torch.stack([(token_ratios(pi, mu) - 1).abs().max() for pi, _, _ in before])
    assert abs(slope(etas, sizes) - 1) < 0.02


def check_06_mean_remainder() -> None:
    """Margins spread evenly: the mean remainder falls with slope 1 under live routing, 2 with the experts held."""
    etas = torch.tensor([1e-4, 1e-3], dtype=torch.float64)
    base, margins = toy(700), (torch.arange(400) + 0.5) / 400
    direction, speed = closing(with_margin(base, 0.01), 750)
    live, held, flips = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    for margin in margins:
        theta = with_margin(base, float(margin) * speed * 2e-3)
        mu, chosen, _ = toy_policy(theta)
        rewards = (normal(5, len(mu.tokens)) > 0).double()
        for j, eta in enumerate(etas):
            moved = stepped(theta, direction, float(eta))
            pi, experts, _ = toy_policy(moved)
            live[j] += objective_remainder(pi, mu, rewards).abs()
            held[j] += objective_remainder(toy_policy(moved, chosen)[0], mu, rewards).abs()
            flips[j] += flipped(chosen, experts)[0]
    assert abs(slope(etas, flips) - 1) < 0.05
    assert abs(slope(etas, live) - 1) < 0.1
    assert abs(slope(etas, held) - 2) < 0.05


def check_06_decomposition() -> None:
    """On a tiny MoE: each policy under its own experts, the product of the factors, and flips in both of them."""
    training = tiny_moe(18, seed=0, hidden=64, expert_hidden=32).double().eval()
    training.set_experts_implementation("eager")  # the faster one knows no float64
    with torch.no_grad():
        for name, parameter in training.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if "gate.weight" in name else 5)
    inference, moved = copy.deepcopy(training), copy.deepcopy(training)
    with torch.no_grad():
        for seed, model in enumerate((inference, moved)):
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(1 + 0.02 * normal(seed, *parameter.shape))
    tokens = torch.randint(18, (8, 12), generator=torch.Generator().manual_seed(0))

    def own(model: nn.Module) -> Routes:
        with torch.no_grad(), RoutingReplay(model).record() as tape:
            model(input_ids=tokens, use_cache=False)
        return tape.routes

    def prob(model: nn.Module, routes: Routes) -> Tensor:
        with torch.no_grad(), RoutingReplay(model).replay(routes):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return logits.softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    e_mu, e_old, e_new = own(inference), own(training), own(moved)
    ones = torch.ones_like(tokens, dtype=torch.bool)
    assert (e_mu.flip_rate(e_old, ones) > 0).any() and (e_new.flip_rate(e_old, ones) > 0).any()
    left = prob(moved, e_new) / prob(inference, e_mu)
    discrepancy = prob(training, e_old) / prob(inference, e_mu)
    staleness = prob(moved, e_new) / prob(training, e_old)
    torch.testing.assert_close(left, discrepancy * staleness)
    # Another choice of experts is another factor: neither can be written without naming e.
    assert (prob(training, e_mu) / prob(inference, e_mu) - discrepancy).abs().max() > 1e-3
    assert (prob(moved, e_old) / prob(training, e_old) - staleness).abs().max() > 1e-3
