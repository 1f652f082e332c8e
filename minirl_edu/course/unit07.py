"""Exercises of unit 07: replay of a selection with live gates, R2 and R3, rows, the KL that R3 removes, who learns."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import gates, gradient, kl, zeroed_gates
from minirl_edu.models import tiny_moe
from minirl_edu.routing import Routes, RoutingReplay


def _observe_choice(answer: Answer) -> Observations:
    """Three tokens: replayed inside the live choice, replayed outside it, routed live."""
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 0.4, 1.5, 1.2], [1.1, -0.3, 0.2, 0.9]], requires_grad=True)
    forced = torch.tensor([[1, 0], [3, 0], [0, 0]])
    experts, found = answer(scores, forced, torch.tensor([True, True, False]))
    values = torch.tensor([1.0, 3.0, -2.0, 0.5])  # of the experts' outputs: their order must not matter
    of_scores = gradient(found, scores, values[experts.long()])
    by_expert = torch.zeros(3, 4).scatter_add(1, experts.long(), found.detach().float())
    return {
        "the gate of each expert, replayed tokens": by_expert[:2],
        "the gate of each expert, the row that is not valid": by_expert[2],
        "the gradient of the live logits": of_scores,
    }


def _live(scores: Tensor, forced: Tensor) -> Tensor:
    return scores.topk(forced.shape[-1]).indices


def _replayed(scores: Tensor, forced: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], forced, _live(scores, forced))


def _choice(experts: Answer, weights: Answer = gates) -> Answer:
    """An answer from who chooses the experts and how they get their gates."""

    def answer(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        chosen = experts(scores, forced, valid)
        return chosen, weights(scores, chosen)

    return answer


EX1 = exercise(
    """07.1 Replay the selection, keep the gates live (difficulty 3, importance 5, 12 minutes)

    1. Two questions, one after the other: which experts, then which gates.
    2. The experts are `forced` where `valid`, and the token's own best elsewhere: `torch.where`.
    3. The gates are those of the chosen experts under the live logits: gather, then softmax.

    - nothing replayed: every token uses its own best experts: this is live routing, `forced` was not used.
    - invalid rows replayed: the row that is not valid was replayed as well. What stands in it is filling: expert 0,
      twice. In a large batch such rows make expert 0 a hot spot, and a name given twice breaks expert-parallel code.
    - scores zeroed outside the live top-k: a replayed expert outside the live choice got gate 0 and no gradient.
      Exactly the tokens for which replay was made are computed wrongly. Gather from the dense scores.
    - gates detached: the values are right, and the router gets no gradient. Replay fixes the selection only.
    - gates of the live choice: replayed experts with the gates of others: the weights belong to the token's own best
      experts, in their order.

    `RoutingReplay` gives a router's top-k this answer, row by row.
    """,
    observe=_observe_choice,
    solution=_choice(_replayed),
    mistakes={
        "nothing replayed": _choice(lambda scores, forced, valid: _live(scores, forced)),
        "invalid rows replayed": _choice(lambda scores, forced, valid: forced),
        "scores zeroed outside the live top-k": _choice(_replayed, zeroed_gates),
        "gates detached": _choice(_replayed, lambda scores, experts: gates(scores, experts).detach()),
        "gates of the live choice": _choice(_replayed, lambda scores, experts: gates(scores, _live(scores, experts))),
    },
)


_PLACES = ("π_old", "π_θ, first mini-batch", "π_θ, later mini-batches", "evaluation")
_R2 = ("live", "e_old", "e_old", "live")
_R3 = ("e_mu", "e_mu", "e_mu", "live")


def _plan(r2: tuple[str, ...] = _R2, r3: tuple[str, ...] = _R3) -> Callable[[str, str], str]:
    """An answer to 07.2 from the rows of its table."""
    rows = {"none": ("live",) * 4, "R2": r2, "R3": r3}
    return lambda method, place: rows[method][_PLACES.index(place)]


EX2 = exercise(
    """07.2 R2 or R3: whose experts go where? (difficulty 2, importance 5, 8 minutes)

    1. R2 replays what the *training* engine chose at θ_old. When does it find that out?
    2. R3 replays what the *rollout* engine chose, from the first forward of the training engine on.
    3. Nobody replays anything when the model is evaluated: there are no routes for those tokens.

    - R3 only in the update: under R3 π_old is computed with the rollout's experts, too. With a live π_old the first
      factor would keep all its flips, and the second would get them as well: π_θ under e_mu against π_old under e_old.
    - R2 with the rollout's experts: R2 replays what the *training* engine chose, e_old. What the rollout engine chose
      is R3's.
    - R2 from the second mini-batch on: live and e_old are the same experts in the first mini-batch, as long as θ =
      θ_old: this gives the same numbers. But a method should not need to know which mini-batch it is in: R2 replays in
      all of them.
    - evaluation replayed: in evaluation new responses are sampled, and no routes exist for them. A user's model runs
      live, so its score has to be measured live.
    - R2 and R3 exchanged: the two are exchanged: R2, vanilla replay, uses the training engine's own earlier choice. R3
      is the *rollout* routing replay.

    R2 needs a forward at θ_old in the training engine, R3 an engine that returns its routes.
    """,
    observe=lambda answer: {
        f"{method} in {place}": answer(method, place) for method in ("none", "R2", "R3") for place in _PLACES
    },
    solution=_plan(),
    mistakes={
        "R3 only in the update": _plan(r3=("live", "e_mu", "e_mu", "live")),
        "R2 with the rollout's experts": _plan(r2=("live", "e_mu", "e_mu", "live")),
        "R2 from the second mini-batch on": _plan(r2=("live", "live", "e_old", "live")),
        "evaluation replayed": _plan(r3=("e_mu", "e_mu", "e_mu", "e_mu")),
        "R2 and R3 exchanged": _plan(r2=_R3, r3=_R2),
    },
)


_TABLE = {"R2 first": False, "R2 later": True, "R3 first": True, "R3 later": True}


def _cells(**wrong: bool) -> Callable[[str, str], bool]:
    """An answer to 07.3: the table, with some cells filled in otherwise."""
    filled = _TABLE | {name.replace("_", " "): altered for name, altered in wrong.items()}
    return lambda method, mini_batch: filled[f"{method} {mini_batch}"]


EX3 = exercise(
    """07.3 Table 1, cell by cell (difficulty 3, importance 5, 10 minutes)

    1. The target policy is *altered* where replay makes it another function than live routing at the same θ.
    2. That happens where the replayed experts are not those that the training engine would choose at this θ.
    3. In the first mini-batch θ = θ_old. Whose choice at θ_old is e_old, and whose is e_mu?

    - R2 first: R2, first mini-batch: the weights are θ_old, the engine is the training engine. Its live choice *is*
      e_old. Replaying what would have been chosen anyway changes nothing, bit for bit.
    - R2 later: R2, later mini-batches: the weights have moved, and some tokens would now be routed to other experts.
      They are kept on the old ones, so the target is another function than the live policy.
    - R3 first: R3, first mini-batch: the weights are the same in both engines, but the engines are not. The training
      engine would choose other experts for some tokens, and is made to use the rollout's.
    - R3 later: R3, later mini-batches: now both reasons hold. The engines differed from the start, and the weights have
      moved as well.
    - never altered: only the *selection* is replayed, and gates are live. With other experts it is still another
      function: three of the four cells are altered.

    With N = 2 half of the updates are in R2's untouched cell, with N = 8 an eighth.
    """,
    observe=lambda answer: {f"the cell {cell!r}": bool(answer(*cell.split())) for cell in _TABLE},
    solution=_cells(),
    mistakes={
        "R2 first": _cells(R2_first=True),
        "R2 later": _cells(R2_later=False),
        "R3 first": _cells(R3_first=False),
        "R3 later": _cells(R3_later=False),
        "never altered": lambda method, mini_batch: False,
    },
)


def _observe_removed(answer: Answer) -> Observations:
    mu = torch.tensor([[-0.5, -1.2, -0.1], [-2.0, -0.7, 0.0]])
    live = torch.tensor([[-0.9, -1.0, -0.3], [-1.5, -0.2, -9.0]])
    replayed = torch.tensor([[-0.6, -1.1, -0.15], [-1.8, -0.75, -7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return {
        "the share removed": answer(mu, live, replayed, mask),
        "the share where replay changes nothing": answer(mu, live, live, mask),
        "the share where replay removes everything": answer(mu, live, mu, mask),
    }


def _removed(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor, *, estimate: Answer = kl) -> Tensor:
    return 1 - estimate(mu, replayed, mask) / estimate(mu, live, mask)


EX4 = exercise(
    """07.4 How much of the KL does R3 remove? (difficulty 2, importance 3, 8 minutes)

    1. k3 is the mean of r − 1 − log r over the tokens in the mask, with r = π_old/μ_old.
    2. Compute it twice, with π_old live and with π_old replayed. What share of the first is gone?

    - the share that stays: this is what stays. Where replay changes nothing the share removed is 0.
    - mask ignored: padding counts: one of its values is nonsense and dominates the mean.
    - ratio upside down: r is upside down. With tokens drawn from μ_old it is r = π_old/μ_old; the other one estimates
      something else.
    - the noisy estimator: this uses the mean of log μ_old − log π_old. Positive and negative tokens cancel in it, and a
      share of a number near zero means nothing. k3 has only terms ≥ 0.
    - a difference, not a share: this is the difference in nats. Divide by the KL without replay.

    The share can be negative: the other engine's experts do not always bring two functions closer.
    """,
    observe=_observe_removed,
    solution=_removed,
    mistakes={
        "the share that stays": lambda *case: 1 - _removed(*case),
        "mask ignored": partial(_removed, estimate=partial(kl, over="places")),
        "ratio upside down": partial(_removed, estimate=lambda mu, old, mask: kl(old, mu, mask)),
        "the noisy estimator": partial(_removed, estimate=partial(kl, term="k1")),
        "a difference, not a share": lambda mu, live, replayed, mask: kl(mu, live, mask) - kl(mu, replayed, mask),
    },
)


def _observe_rows(answer: Answer) -> Observations:
    """Two sequences of five columns: left padding in one, a shorter response in the other."""
    rows = torch.tensor([[[[7, 3]], [[1, 2]], [[3, 4]], [[5, 6]]], [[[2, 5]], [[0, 6]], [[1, 3]], [[4, 7]]]])
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    experts, valid = answer(rows, mask)
    return {
        "the shape of the experts": str(list(experts.shape)),
        "which rows are valid": valid.long(),
        "the experts of the valid rows": torch.where(valid.bool()[..., None, None], experts.long(), -1),
    }


def _rows(valid: Callable[[Tensor], Tensor]) -> Answer:
    """A column is appended; which rows are valid is read off the mask."""
    return lambda rows, mask: (nn.functional.pad(rows, (0, 0, 0, 0, 0, 1)), valid(mask))


def _rows_of_outputs(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(rows, (0, 0, 0, 0, 1, 0)), mask & nn.functional.pad(mask[:, :-1], (1, 0))


EX5 = exercise(
    """07.5 S − 1 rows for S tokens (difficulty 4, importance 4, 15 minutes)

    1. Row t is the routing of token t as an *input*. Which token of a sequence was never an input?
    2. The experts keep their places; a column is appended at the end.
    3. A row is valid if its token is real *and* another real token follows it.

    - rows of outputs: shifted by one: each row was given to the token that it *predicts*. The first token would be
      without experts, and every other token would use its predecessor's.
    - everything valid: all rows are called valid: padding and the appended column would be replayed as expert 0, twice.
    - the last token of a response valid: real tokens are valid, but the last one of each response was sampled and never
      fed to the model: nobody routed it.
    - only the last column not valid: the last *column* is left out, but the second response ends earlier: its last
      token was never an input either.

    `Rollout.inputs` is this mask, and `Routes.pad_to` appends the column.
    """,
    observe=_observe_rows,
    solution=_rows(lambda mask: mask & nn.functional.pad(mask[:, 1:], (0, 1))),
    mistakes={
        "rows of outputs": _rows_of_outputs,
        "everything valid": _rows(torch.ones_like),
        "the last token of a response valid": _rows(lambda mask: mask),
        "only the last column not valid": _rows(lambda mask: nn.functional.pad(mask[:, :-1], (0, 1))),
    },
)


@cache
def _model() -> PreTrainedModel:
    """A tiny MoE that recomputes its forward during backward, as large models do to save memory."""
    model = tiny_moe(18, seed=0, hidden=32, heads=1, kv_heads=1, expert_hidden=16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if "gate.weight" in name else 4)
    return model.train()


def _observe_step(answer: Answer) -> Observations:
    model = _model()
    tokens = torch.arange(24).mul(7).remainder(18).view(2, 12)
    order = torch.arange(2 * 12 * 2 * 8).mul(0.9).sin().view(2, 12, 2, 8).argsort(-1)
    routes = Routes(order[..., :2].to(torch.uint8), torch.ones(2, 12, dtype=torch.bool), (0, 1))
    parameters = dict(model.named_parameters())
    watched = {
        "the gradient of a router": parameters["model.layers.0.mlp.gate.weight"],
        "the gradient of the embedding": parameters["model.embed_tokens.weight"],
    }
    for parameter in parameters.values():  # what an earlier step has left
        parameter.grad = torch.ones_like(parameter)
    try:
        answer(model, RoutingReplay(model), routes, lambda: model(tokens, labels=tokens, use_cache=False).loss)
        return {name: p.grad.clone() for name, p in watched.items() if p.grad is not None}
    finally:
        model.zero_grad()


def _step(
    model: nn.Module, replay: RoutingReplay, routes: Routes, loss: Answer, *, zero: bool = True, live: bool = False
) -> None:
    if zero:
        model.zero_grad()
    with replay.record() if live else replay.replay(routes):
        loss().backward()


def _left_early(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: Answer) -> None:
    model.zero_grad()
    with replay.replay(routes):
        value = loss()
    value.backward()


def _shifted(routes: Routes) -> Routes:
    return Routes(routes.experts.roll(1, 1), routes.valid, routes.layers)


EX6 = exercise(
    """07.6 A step with replay and checkpointing (difficulty 3, importance 4, 10 minutes)

    1. Gradient checkpointing runs the forward a second time, inside `backward()`.
    2. What must still be open at that time?
    3. `with replay.replay(routes):` around both, the loss and its `backward()`.

    - left before backward: the context was left before `backward()`. Checkpointing runs the forward again there:
      without the routes it would take other experts than the loss did. The library refuses (RuntimeError); elsewhere
      the gradient is silently wrong.
    - live routing: this is the gradient under the model's own experts: `record` only watches.
    - old gradients kept: the gradient of an earlier step was still there, and backward adds to it: call `zero_grad`
      first.
    - routes shifted: the routes are shifted by one position. The shapes fit, nothing complains, and every token runs
      through its neighbour's experts.

    The same holds for `logp_old` under R3: compute it inside the context, too.
    """,
    observe=_observe_step,
    solution=_step,
    mistakes={
        "left before backward": _left_early,
        "live routing": partial(_step, live=True),
        "old gradients kept": partial(_step, zero=False),
        "routes shifted": lambda model, replay, routes, loss: _step(model, replay, _shifted(routes), loss),
    },
)


_G_LOGITS = torch.tensor([[0.5, 1.0, -0.5], [1.5, 0.2, 0.0], [0.0, -0.5, 1.0]], dtype=torch.float64)
_G_SHARES = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
_G_ADVANTAGES = torch.tensor([0.7, -0.2, -0.4], dtype=torch.float64)


def _observe_experts(answer: Answer) -> Observations:
    found = answer(_G_LOGITS.clone(), 1, _G_SHARES.clone(), _G_ADVANTAGES.clone())
    return {
        "without replay, the gradient of the trainer's expert": found[0][1],
        "without replay, the gradients of the other experts": torch.stack([found[0][0], found[0][2]]),
        "the gradients with R3": found[1],
    }


def _centred(probs: Tensor, advantages: Tensor, drawn: Tensor | None = None) -> Tensor:
    """E[A (onehot − π)] over tokens that are drawn from π, or with probabilities `drawn`."""
    drawn = probs if drawn is None else drawn
    return drawn * advantages - (drawn * advantages).sum(-1, keepdim=True) * probs


def _experts(
    logits: Tensor,
    own: int,
    shares: Tensor,
    advantages: Tensor,
    *,
    weighted: bool = True,
    share_of_own: bool = False,
    shared: bool = True,
    centred: bool = True,
) -> Tensor:
    """What each expert gets, [2, E, V]: all to the trainer's own, and to each its share."""
    probs = logits.softmax(-1)
    written = _centred(probs, advantages) if centred else probs * advantages
    live = torch.zeros_like(probs)
    drawn = probs[own] if weighted else shares @ probs
    live[own] = _centred(probs[own], advantages, drawn) if centred else probs[own] * advantages
    live[own] *= shares[own] if share_of_own else 1.0
    return torch.stack([live, shares[:, None] * written if shared else written])


EX7 = exercise(
    """07.7 Which expert gets the gradient? (difficulty 3, importance 5, 15 minutes)

    1. Without replay, which expert's log-probabilities does the trainer compute for a token that expert 0 wrote?
    2. The weight of such a token is π_own/π_0. Weighted so, tokens of any expert are an expectation under π_own.
    3. With R3 the trainer computes a token with the expert that wrote it. The weight is 1, and expert e sees its share
       of the tokens.
    4. For tokens drawn from π itself, E[A (onehot − π)] is π ∘ (A − E_π[A]).

    - the writer learns without replay: your two answers are the same. Without replay the trainer never calls the expert
      that wrote the token: its parameters are not in the forward, so no gradient can reach them.
    - no weight: without replay you left the weight out: tokens of other experts count as they were drawn, and not as
      the trainer's expert would draw them.
    - only its own tokens: without replay the trainer's expert was given its own share alone. It computes all tokens,
      and the weight makes those of the others count as its own.
    - shares left out: with R3 every expert got as much as if it had written all tokens. It sees the share that the
      router gave it.
    - all to one under R3: with R3 the trainer's own choice got everything. R3 replays what the engine chose.
    - softmax forgotten: the logits of the tokens that were not drawn move as well: the score is onehot(y) − π.
    - exchanged: the two rows are exchanged. The first is without replay.

    A weight changes how much a token counts. Replay changes who learns from it.
    """,
    observe=_observe_experts,
    solution=_experts,
    mistakes={
        "the writer learns without replay": lambda *case: _experts(*case)[[1, 1]],
        "no weight": partial(_experts, weighted=False),
        "only its own tokens": partial(_experts, share_of_own=True),
        "shares left out": partial(_experts, shared=False),
        "all to one under R3": lambda *case: _experts(*case)[[0, 0]],
        "softmax forgotten": partial(_experts, centred=False),
        "exchanged": lambda *case: _experts(*case)[[1, 0]],
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7)
