"""The three worlds as programs of a few tensors, with what each will do computed before it is run.

The losses, advantages, corrections and metrics are the library's own, every update is on-policy (π_θ = π_old), the
optimiser is Adam. All seeds run in one program; seed i draws from a generator of its own, so it is the same run
whatever the others are.

Shapes: S = seeds, C = contexts (prompts in `leaky_engine`), E = experts, V = vocabulary; B, T and G as everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minirl_edu.advantages import ADVANTAGES
from minirl_edu.diagnostics import entropy_drift, entropy_from_logits, kl_k3, length_reward_cov, token_ess
from minirl_edu.objectives import OBJECTIVES, cispo_loss, grpo_loss, minirl_loss

Curves = dict[str, np.ndarray]
"""`step` [n], and for every metric its values [S, n]."""


class Variant(NamedTuple):
    """How a world is trained: an objective, MiniRL's correction and length norm, and whether R3 replays the experts."""

    objective: str = "minirl"
    correction: str = "token_truncated"
    length_norm: bool = False
    replay: bool = False


VARIANTS = {
    "MiniRL": Variant(),
    "− IS": Variant(correction="none"),
    "+ length norm": Variant(length_norm=True),
    "− IS + length norm": Variant(correction="none", length_norm=True),
    "GRPO": Variant("grpo"),
    "CISPO": Variant("cispo"),
    "token masked": Variant(correction="token_masked"),
    "sequence truncated": Variant(correction="sequence_truncated"),
    "sequence masked": Variant(correction="sequence_masked"),
    "geometric mean": Variant(correction="geometric_mean"),
    "negative masked": Variant(correction="negative_masked"),
    "R3": Variant(replay=True),
    "R3 − IS": Variant(correction="none", replay=True),
}
"""Everything that is compared. The paper's weight, token truncated, is MiniRL itself; the last two need experts."""


def policy_loss(
    variant: Variant,
    logp: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    mask: Tensor,
    *,
    group_size: int,
    seeds: int,
) -> Tensor:
    """The variant's loss on-policy, added up over seeds, each of which has its own B / seeds responses."""
    advantages = ADVANTAGES[OBJECTIVES[variant.objective].advantages](rewards, group_size)
    old, own = logp.detach(), len(rewards) // seeds
    if variant.objective == "grpo":
        return grpo_loss(logp, old, advantages, mask, num_responses=own).loss
    if variant.objective == "cispo":  # a mean over each seed's own tokens
        tokens = mask.view(seeds, -1).sum(1).repeat_interleave(own)
        return cispo_loss(logp, old, advantages / tokens, mask, num_tokens=1).loss
    options = {"correction": variant.correction, "length_norm": variant.length_norm}
    return minirl_loss(logp, old, logp_rollout, advantages, mask, num_responses=own, **options).loss


def doomed_tails(
    variant: Variant,
    *,
    seeds: int = 8,
    sigma: float = 1.0,
    win: int = 3,
    lose: int = 96,
    decisive: int = 3,
    wrong: float = 0.75,
    steps: int = 300,
    lr: float = 0.05,
) -> Curves:
    """Tokens are drawn in random contexts out of 40, which share nothing; the first `decisive` must all be right.

    Then it is over: a right response ends after `win` tokens, a wrong one after `lose`. At the start a share `wrong` of
    the contexts has a wrong mode (0.6, against 0.3 for the right token), the others a right one (0.85). The engine's
    logits are the trainer's plus noise of standard deviation `sigma`, drawn anew at every sync.

    Curves: score (the probability that π is right, exact), margin (z_right − z_mode in nats, mean over the contexts
    with a wrong mode), entropy (nats, mean over contexts), kl (k3), ess, length_reward_cov, entropy_drift.
    """
    contexts, vocabulary, prompts, group_size = 40, 10, 16, 8
    draws = _Draws(seeds)
    right = draws.integers(vocabulary, contexts)
    mode = (right + 1 + draws.integers(vocabulary - 1, contexts)) % vocabulary
    bad = (torch.arange(contexts) < round(wrong * contexts)).expand(seeds, -1)
    logits = _start(right, mode, bad, vocabulary).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr, betas=(0.9, 0.95))
    length, log = max(win, lose), _Log(steps)
    for step in range(steps):
        with torch.no_grad():
            engine = (logits + sigma * draws.normal(contexts, vocabulary)).log_softmax(-1)
            context = draws.integers(contexts, prompts, 1, length).expand(-1, -1, group_size, -1)
            rows = (_offsets(seeds, contexts) + context.flatten(1)).view(-1, length)
            tokens = _draw_tokens(engine, rows, draws.uniform(prompts * group_size, length).view(-1, length))
            solved = (tokens == right.view(-1)[rows])[:, :decisive].all(1)
            mask = torch.arange(length) < torch.where(solved, win, lose)[:, None]
            chosen = rows * vocabulary + tokens
        logp, logp_rollout = logits.log_softmax(-1).view(-1)[chosen], engine.view(-1)[chosen]
        rewards = solved.float()
        if log.due(step):
            probs = logits.detach().softmax(-1)
            of_right = probs.gather(2, right[..., None])[..., 0]
            margins = (of_right / probs.gather(2, mode[..., None])[..., 0]).log()
            entropy = entropy_from_logits(logits.detach())
            log.add(
                step,
                score=of_right.mean(1) ** decisive,
                margin=(margins * bad).sum(1) / bad.sum(1).clamp(min=1),
                entropy=entropy.mean(1),
                **_batch_metrics(logp.detach(), logp_rollout, entropy.view(-1)[rows], rewards, mask, group_size, seeds),
            )
        loss = policy_loss(variant, logp, logp_rollout, rewards, mask, group_size=group_size, seeds=seeds)
        _update(optimizer, loss)
    return log.curves()


def doomed_tails_border(
    *, sigma: float = 1.0, win: int = 3, lose: int = 96, decisive: int = 3, wrong: float = 0.75, **_: Any
) -> float:
    """How far the drift outweighs the signal, without the weight, in a context with a wrong mode at the start.

    Both are rates at which the margin z_right − z_mode grows, as means over contexts and the engine's noise. With p̄ the
    mean probability of the right token under the engine and P = p̄^decisive that of a right response:

        signal  decisive · p̄^(decisive−1) · E[μ_right (1 − μ_right) + μ_mode μ_right]
        drift   Cov(|y|, R) · E[(μ − π)_right − (μ − π)_mode],    Cov(|y|, R) = (win − lose) P (1 − P)

    Returns −drift / signal. Above 1 the margin shrinks and the wrong mode is locked in. Below 0 (right ones longer) the
    drift flattens all contexts, and below −1 it does so faster than the signal teaches.
    """
    right, mode = torch.tensor([[0, 0]]), torch.tensor([[1, 1]])
    logits = _start(right, mode, torch.tensor([[True, False]]), 10)[0].double()
    noise = torch.randn(10000, 2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    engine = (logits + sigma * torch.cat([noise, -noise])).softmax(-1)  # in pairs: no error of first order in the noise
    accuracy = wrong * engine[:, 0, 0].mean() + (1 - wrong) * engine[:, 1, 0].mean()
    solved = accuracy**decisive
    mu, pi = engine[:, 0], logits[0].softmax(-1)
    signal = decisive * accuracy ** (decisive - 1) * (mu[:, 0] * (1 - mu[:, 0]) + mu[:, 1] * mu[:, 0]).mean()
    bias = mu.mean(0) - pi
    return float((lose - win) * solved * (1 - solved) * (bias[0] - bias[1]) / signal)


def leaky_engine(
    variant: Variant,
    *,
    seeds: int = 8,
    leak: float = 0.2,
    rare: float = 0.05,
    habit: float = 0.5,
    better: float = 1.0,
    steps: int = 400,
    lr: float = 0.05,
) -> Curves:
    """Answers of one token out of 1000: μ = (1 − leak) π + leak / 1000, so a share of what is drawn is garbage.

    π starts with a habit (probability 0.95 − rare) that is right with probability `habit`, and another answer
    (probability `rare`) that is right with probability `better`; all others are wrong. 32 prompts that share nothing.

    Curves: score (π's expected reward, exact), entropy, kl, ess.
    """
    prompts, vocabulary, group_size = 32, 1000, 16
    draws = _Draws(seeds)
    probs = torch.full((seeds, prompts, vocabulary), 0.05 / (vocabulary - 2))
    probs[..., 0], probs[..., 1] = 0.95 - rare, rare
    value = torch.zeros(vocabulary)
    value[0], value[1] = habit, better
    logits = probs.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr, betas=(0.9, 0.95))
    rows = torch.arange(seeds * prompts).repeat_interleave(group_size)[:, None]
    log, mask = _Log(steps), torch.ones(len(rows), 1, dtype=torch.bool)
    for step in range(steps):
        table = logits.log_softmax(-1)
        with torch.no_grad():
            engine = ((1 - leak) * table.exp() + leak / vocabulary).log()
            tokens = _draw_tokens(engine, rows, draws.uniform(prompts * group_size).view(-1, 1))
            rewards = (draws.uniform(prompts * group_size).view(-1) < value[tokens[:, 0]]).float()
            chosen = rows * vocabulary + tokens
        logp, logp_rollout = table.view(-1)[chosen], engine.view(-1)[chosen]
        if log.due(step):
            entropy = entropy_from_logits(logits.detach())
            metrics = _batch_metrics(
                logp.detach(), logp_rollout, entropy.view(-1)[rows], rewards, mask, group_size, seeds
            )
            score = (table.detach().exp() @ value).mean(1)
            log.add(step, score=score, entropy=entropy.mean(1), kl=metrics["kl"], ess=metrics["ess"])
        loss = policy_loss(variant, logp, logp_rollout, rewards, mask, group_size=group_size, seeds=seeds)
        _update(optimizer, loss)
    return log.curves()


def leaky_engine_border(
    *, leak: float = 0.2, rare: float = 0.05, habit: float = 0.5, better: float = 1.0, **_: Any
) -> float:
    """`leak` as a multiple of the leak at which, without the weight, the habit starts to gain on the better answer.

    Above 1 the habit is locked in.

    With one token a response the drift is 0 (V = b); what fails is the signal μ ∘ (R − b). Once π has unlearned its own
    garbage, π = (1 − p, p) with p = `rare`. Then b = (1 − η)((1 − p) habit + p better), and the habit gains on the
    other answer where (1 − p)(habit − b) > p (better − b), that is b < b* = ((1 − p) habit − p better) / (1 − 2p):

        η* = 1 − b* / ((1 − p) habit + p better),    for rewards 1/2 and 1:  2 p (1 − p) / ((1 − 2p)(1 + p))

    0 where there is nothing to be locked, because the habit is the better answer.
    """
    if habit >= better:
        return 0.0
    mean = (1 - rare) * habit + rare * better
    return leak / (1 - ((1 - rare) * habit - rare * better) / (1 - 2 * rare) / mean)


def who_gets_the_gradient(
    variant: Variant, *, seeds: int = 8, noise: float = 0.6, steps: int = 400, lr: float = 0.03
) -> Curves:
    """Four experts, top-1, each at the start good at the contexts that the router gives it and ignorant of the others.

    The engine is the trainer but for noise on its router's logits, new for every token. A response is 6 tokens in
    random contexts out of 32, all of which must be right. With R3 the trainer uses the experts that the engine used.

    Curves: score (through the trainer), engine_score (through the engine), both exact but for 4000 draws of the
    routing; entropy (of the experts the trainer uses), kl, ess.
    """
    contexts, vocabulary, length, prompts, group_size, experts = 32, 10, 6, 16, 8, 4
    draws = _Draws(seeds)
    right, router, own, table = _experts(draws)
    shares = _routed(router, noise)  # [S, C, E]
    table.requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr, betas=(0.9, 0.95))
    log, mask = _Log(steps), torch.ones(seeds * prompts * group_size, length, dtype=torch.bool)
    for step in range(steps):
        logps = table.log_softmax(-1)  # [S, C, E, V]
        with torch.no_grad():
            context = draws.integers(contexts, prompts, 1, length).expand(-1, -1, group_size, -1)
            rows = (_offsets(seeds, contexts) + context.flatten(1)).view(-1, length)
            jitter = noise * draws.normal(prompts * group_size, length, experts).view(-1, length, experts)
            written_by = (router.view(-1, experts)[rows] + jitter).argmax(-1)
            engine = rows * experts + written_by
            trainer = engine if variant.replay else rows * experts + own.view(-1)[rows]
            flat = logps.reshape(-1, vocabulary)
            tokens = _draw_tokens(flat, engine, draws.uniform(prompts * group_size, length).view(-1, length))
            rewards = (tokens == right.view(-1)[rows]).all(1).float()
        logp = logps.view(-1)[trainer * vocabulary + tokens]
        logp_rollout = logps.detach().view(-1)[engine * vocabulary + tokens]
        if log.due(step):
            scores = _expert_scores(table.detach(), right, own, shares, length)
            entropy = entropy_from_logits(table.detach())
            metrics = _batch_metrics(
                logp.detach(), logp_rollout, entropy.view(-1)[trainer], rewards, mask, group_size, seeds
            )
            used = entropy.gather(2, own[..., None]).flatten(1).mean(1)
            log.add(step, score=scores[0], engine_score=scores[1], entropy=used, kl=metrics["kl"], ess=metrics["ess"])
        loss = policy_loss(variant, logp, logp_rollout, rewards, mask, group_size=group_size, seeds=seeds)
        _update(optimizer, loss)
    return log.curves()


def who_gets_the_gradient_ceiling(*, seeds: int = 8, noise: float = 0.6, **_: Any) -> float:
    """The score through the engine at which training without replay ends, mean over seeds.

    The trainer's own experts learn everything, the others nothing: a share f(c) of the tokens of context c is written
    by an expert that never gets its gradient and is as good as at the start. So
    (mean over c of 1 − f(c) + Σ_{e ≠ own} share(e|c) · π_e(right|c) at the start)^6. With R3 the ceiling is 1.
    """
    draws = _Draws(seeds)
    right, router, own, table = _experts(draws)
    shares = _routed(router, noise)
    good = table.softmax(-1).gather(3, right[..., None, None].expand(*table.shape[:3], 1))[..., 0]
    good = good.scatter(2, own[..., None], 1.0)
    return float(((shares * good).sum(-1).mean(1) ** 6).mean())


class World(NamedTuple):
    """A world, the settings it is shown in, and the sweep on which its prediction is tested.

    `panels` are the metrics drawn as curves. `predict` takes the keywords of `run`; `measured` names the metric that is
    compared with it, at `when`, a fraction of the run, in runs of the variant `swept`.
    """

    run: Callable[..., Curves]
    scenarios: Mapping[str, Mapping[str, Any]]
    variants: Sequence[str]
    panels: Sequence[str]
    predict: Callable[..., float]
    prediction: str
    measured: str
    when: float
    swept: str
    sweep: Sequence[Mapping[str, Any]]


_WITHOUT_EXPERTS = [name for name, variant in VARIANTS.items() if not variant.replay]

WORLDS = {
    "doomed_tails": World(
        doomed_tails,
        {
            "wrong ones longer": {},
            "all alike": {"win": 96},
            "right ones longer": {"win": 96, "lose": 3},
        },
        _WITHOUT_EXPERTS,
        ("score", "entropy"),
        doomed_tails_border,
        "drift against signal, at the start",
        "margin",
        0.2,
        "− IS",
        [{"sigma": s, "lose": n} for n in (24, 48, 96) for s in (0.3, 0.45, 0.6, 0.8, 1.0)],
    ),
    "leaky_engine": World(
        leaky_engine,
        {
            "the better answer is rare": {},
            "the likely answer is the better": {"habit": 1.0, "better": 0.5},
        },
        _WITHOUT_EXPERTS,
        ("score", "entropy"),
        leaky_engine_border,
        "leak, as a multiple of the border",
        "score",
        1.0,
        "− IS",
        [{"rare": p, "leak": p * x} for p in (0.02, 0.05, 0.1) for x in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)],
    ),
    "who_gets_the_gradient": World(
        who_gets_the_gradient,
        {"router noise 0.3": {"noise": 0.3}, "router noise 0.6": {}, "router noise 0": {"noise": 0.0}},
        list(VARIANTS),
        ("score", "engine_score"),
        who_gets_the_gradient_ceiling,
        "predicted score through the engine",
        "engine_score",
        1.0,
        "MiniRL",
        [{"noise": x} for x in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)],
    ),
}
"""The worlds by the name that the command has for them."""


# --------------------------------------------------------------------------------------------------------- machinery


class _Draws:
    """Random tensors [S, ...], row i from the generator of seed i."""

    def __init__(self, seeds: int):
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

    def uniform(self, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators])

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators])


class _Log:
    """Metrics [S] at ten steps and the last."""

    def __init__(self, steps: int):
        self.steps, self.every = steps, max(1, steps // 10)
        self.rows: list[tuple[int, dict[str, Tensor]]] = []

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps - 1

    def add(self, step: int, **metrics: Tensor) -> None:
        self.rows.append((step, metrics))

    def curves(self) -> Curves:
        columns = {name: torch.stack([row[name] for _, row in self.rows], 1).numpy() for name in self.rows[0][1]}
        return {"step": np.array([step for step, _ in self.rows]), **columns}


def _start(right: Int[Tensor, "S C"], mode: Int[Tensor, "S C"], bad: Tensor, vocabulary: int) -> Tensor:
    """Logits [S, C, V] of the doomed tails: 0.3 for the right token and 0.6 for the mode if bad, 0.85 if not."""
    token = torch.arange(vocabulary)
    is_right, is_mode = token == right[..., None], (token == mode[..., None]) & bad[..., None]
    bad = bad[..., None]
    others = torch.where(bad, 0.1 / (vocabulary - 2), 0.15 / (vocabulary - 1))
    return torch.where(is_right, torch.where(bad, 0.3, 0.85), torch.where(is_mode, 0.6, others)).log()


def _experts(draws: _Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the third world: the right tokens [S, C], router logits [S, C, E], own experts [S, C], logits [S, C, E, V]."""
    right, router = draws.integers(10, 32), draws.normal(32, 4)
    own, table = router.argmax(-1), 0.5 * draws.normal(32, 4, 10)
    bonus = torch.nn.functional.one_hot(own, 4)[..., None] * torch.nn.functional.one_hot(right, 10)[:, :, None]
    return right, router, own, table + 3.0 * bonus


def _routed(router: Tensor, noise: float) -> Tensor:
    """Share of the tokens of each context [S, C] that the noisy router gives to each expert [E], from 4000 draws."""
    jitter = noise * torch.randn(4000, *router.shape[1:], generator=torch.Generator().manual_seed(0))
    chosen = [(one + jitter).argmax(-1) for one in router]
    return torch.stack([torch.nn.functional.one_hot(c, router.shape[-1]).float().mean(0) for c in chosen])


def _expert_scores(table: Tensor, right: Tensor, own: Tensor, shares: Tensor, length: int) -> tuple[Tensor, Tensor]:
    good = table.softmax(-1).gather(3, right[..., None, None].expand(*table.shape[:3], 1))[..., 0]
    through_trainer = good.gather(2, own[..., None])[..., 0].mean(1)
    return through_trainer**length, (shares * good).sum(-1).mean(1) ** length


def _offsets(seeds: int, contexts: int) -> Tensor:
    """[S, 1]: the first row of each seed in a table of seeds × contexts rows."""
    return (torch.arange(seeds) * contexts)[:, None]


def _draw_tokens(table: Tensor, rows: Int[Tensor, "B T"], uniform: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Tokens from rows of a table of log-probabilities [..., V], one uniform number each."""
    cumulative = table.detach().double().exp().view(-1, table.shape[-1]).cumsum(1)
    # One sorted list of all rows: row r occupies the interval from r to r + 1.
    cumulative += torch.arange(len(cumulative))[:, None]
    found = torch.searchsorted(cumulative.view(-1), rows + uniform.double(), right=True)
    return (found - rows * table.shape[-1]).clamp(0, table.shape[-1] - 1)


def _batch_metrics(
    logp: Tensor, logp_rollout: Tensor, entropy: Tensor, rewards: Tensor, mask: Tensor, group_size: int, seeds: int
) -> dict[str, Tensor]:
    """The library's metrics of each seed's batch."""
    rows = []
    for one in zip(*(x.chunk(seeds) for x in (logp, logp_rollout, entropy, rewards, mask)), strict=True):
        p, mu, h, r, m = one
        advantages = ADVANTAGES["group_mean"](r, group_size)
        rows.append(
            {
                "kl": kl_k3(mu, p, m),
                "ess": token_ess(p, mu, m),
                "length_reward_cov": length_reward_cov(r, m, group_size),
                "entropy_drift": entropy_drift(p, mu, h, advantages, m),
            }
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
