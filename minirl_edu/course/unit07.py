"""Exercises of unit 07: replaying a selection with live gates, R2 and R3, rows, and what replay takes off the KL."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl_edu.course import Exercise, Mistake, Observations
from minirl_edu.models import tiny_moe
from minirl_edu.routing import Routes, RoutingReplay

# ------------------------------------------------------------------------------- 07.1, the selection and the live gates


def _observe_choice(answer) -> Observations:
    """Three tokens: replayed inside the live choice, replayed outside it, routed live."""
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 0.4, 1.5, 1.2], [1.1, -0.3, 0.2, 0.9]], requires_grad=True)
    forced = torch.tensor([[1, 0], [3, 0], [0, 0]])
    valid = torch.tensor([True, True, False])
    experts, gates = answer(scores, forced, valid)
    values = torch.tensor([1.0, 3.0, -2.0, 0.5])  # of the experts' outputs: their order must not matter
    gradient = torch.zeros_like(scores)
    if gates.requires_grad:
        (gradient,) = torch.autograd.grad((gates * values[experts.long()]).sum(), scores)
    by_expert = torch.zeros(3, 4).scatter_add(1, experts.long(), gates.detach().float())
    return {
        "the gate of each expert, replayed tokens": by_expert[:2],
        "the gate of each expert, the row that is not valid": by_expert[2],
        "the gradient of the live logits": gradient,
    }


def _choice(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    experts = torch.where(valid[:, None], forced, scores.topk(forced.shape[-1]).indices)
    return experts, scores.gather(-1, experts).softmax(-1)


def _choice_live(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    experts = scores.topk(forced.shape[-1]).indices
    return experts, scores.gather(-1, experts).softmax(-1)


def _choice_all_forced(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return forced, scores.gather(-1, forced).softmax(-1)


def _choice_zeroed(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    live = scores.topk(forced.shape[-1]).indices
    experts = torch.where(valid[:, None], forced, live)
    kept = torch.zeros_like(scores).scatter(-1, live, 1.0) * scores.softmax(-1)
    picked = kept.gather(-1, experts)
    return experts, picked / picked.sum(-1, keepdim=True)


def _choice_detached(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    experts, gates = _choice(scores, forced, valid)
    return experts, gates.detach()


def _choice_live_gates(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    experts, _ = _choice(scores, forced, valid)
    return experts, scores.topk(forced.shape[-1]).values.softmax(-1)


# ------------------------------------------------------------------------------------------------ 07.2, whose experts

_PLACES = ("π_old", "π_θ, first mini-batch", "π_θ, later mini-batches", "evaluation")
_R2 = ("live", "e_old", "e_old", "live")
_R3 = ("e_mu", "e_mu", "e_mu", "live")


def _observe_plan(answer) -> Observations:
    return {f"{method} in {place}": answer(method, place) for method in ("none", "R2", "R3") for place in _PLACES}


def _plan(r2: tuple[str, ...] = _R2, r3: tuple[str, ...] = _R3) -> Callable[[str, str], str]:
    """An answer to 07.2 from the rows of its table."""
    rows = {"none": ("live",) * 4, "R2": r2, "R3": r3}
    return lambda method, place: rows[method][_PLACES.index(place)]


# ---------------------------------------------------------------------------------------------- 07.3, Table 1 as a quiz

_CELLS = ("R2 first", "R2 later", "R3 first", "R3 later")
_TABLE = {"R2 first": False, "R2 later": True, "R3 first": True, "R3 later": True}


def _observe_table(answer) -> Observations:
    return {f"the cell {cell!r}": bool(answer(*cell.split())) for cell in _CELLS}


def _cells(**wrong: bool) -> Callable[[str, str], bool]:
    """An answer to 07.3: the table, with some cells filled in otherwise."""
    filled = _TABLE | {name.replace("_", " "): altered for name, altered in wrong.items()}
    return lambda method, mini_batch: filled[f"{method} {mini_batch}"]


# --------------------------------------------------------------------------------------- 07.4, what is off the KL


def _observe_removed(answer) -> Observations:
    mu = torch.tensor([[-0.5, -1.2, -0.1], [-2.0, -0.7, 0.0]])
    live = torch.tensor([[-0.9, -1.0, -0.3], [-1.5, -0.2, -9.0]])
    replayed = torch.tensor([[-0.6, -1.1, -0.15], [-1.8, -0.75, -7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return {
        "the share removed": answer(mu, live, replayed, mask),
        "the share where replay changes nothing": answer(mu, live, live, mask),
        "the share where replay removes everything": answer(mu, live, mu, mask),
    }


def _k3(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = (logp_old - logp_rollout)[mask]
    return (log_ratio.exp() - 1 - log_ratio).mean()


def _removed(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor) -> Tensor:
    return 1 - _k3(mu, replayed, mask) / _k3(mu, live, mask)


def _removed_backwards(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor) -> Tensor:
    return 1 - _k3(replayed, mu, mask) / _k3(live, mu, mask)


def _removed_of_k1(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor) -> Tensor:
    return 1 - (mu - replayed)[mask].mean() / (mu - live)[mask].mean()


# ------------------------------------------------------------------------------------------------------- 07.5, the rows


def _observe_rows(answer) -> Observations:
    """Two sequences of five columns: left padding in one, a shorter response in the other."""
    rows = torch.tensor([[[[7, 3]], [[1, 2]], [[3, 4]], [[5, 6]]], [[[2, 5]], [[0, 6]], [[1, 3]], [[4, 7]]]])
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    experts, valid = answer(rows, mask)
    kept = torch.where(valid.bool()[..., None, None], experts.long(), -1)
    return {
        "the shape of the experts": str(list(experts.shape)),
        "which rows are valid": valid.long(),
        "the experts of the valid rows": kept,
    }


def _rows(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    experts = nn.functional.pad(rows, (0, 0, 0, 0, 0, 1))
    return experts, mask & nn.functional.pad(mask[:, 1:], (0, 1))


def _rows_of_outputs(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(rows, (0, 0, 0, 0, 1, 0)), mask & nn.functional.pad(mask[:, :-1], (1, 0))


def _rows_all_valid(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(rows, (0, 0, 0, 0, 0, 1)), torch.ones_like(mask)


def _rows_last_valid(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(rows, (0, 0, 0, 0, 0, 1)), mask


def _rows_last_column(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    fed = mask.clone()
    fed[:, -1] = False
    return nn.functional.pad(rows, (0, 0, 0, 0, 0, 1)), fed


# -------------------------------------------------------------------------------------- 07.6, a step with checkpointing


@functools.cache
def _model() -> PreTrainedModel:
    """A tiny MoE that recomputes its forward during backward, as large models do to save memory."""
    model = tiny_moe(18, seed=0, hidden=32, heads=1, kv_heads=1, expert_hidden=16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if "gate.weight" in name else 4)
    return model.train()


def _loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _observe_step(answer) -> Observations:
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
        loss = functools.partial(_loss, model, tokens)
        answer(model, RoutingReplay(model), routes, loss)
        return {name: p.grad.clone() for name, p in watched.items() if p.grad is not None}
    finally:
        model.zero_grad()


_Loss = Callable[[], Tensor]


def _step(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: _Loss) -> None:
    model.zero_grad()
    with replay.replay(routes):
        loss().backward()


def _step_left_early(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: _Loss) -> None:
    model.zero_grad()
    with replay.replay(routes):
        value = loss()
    value.backward()


def _step_live(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: _Loss) -> None:
    model.zero_grad()
    with replay.record():
        loss().backward()


def _step_added(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: _Loss) -> None:
    with replay.replay(routes):
        loss().backward()


def _step_shifted(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: _Loss) -> None:
    model.zero_grad()
    with replay.replay(Routes(routes.experts.roll(1, 1), routes.valid, routes.layers)):
        loss().backward()


EXERCISES = (
    Exercise(
        id="07.1",
        title="Replay the selection, keep the gates live",
        difficulty=3,
        importance=5,
        minutes=12,
        hints=(
            "Two questions, one after the other: which experts, then which gates.",
            "The experts are `forced` where `valid`, and the token's own best elsewhere: `torch.where`.",
            "The gates are those of the chosen experts under the live logits: gather, then softmax.",
        ),
        observe=_observe_choice,
        solution=_choice,
        mistakes=(
            Mistake(
                "nothing replayed",
                _choice_live,
                "every token uses its own best experts: this is live routing, `forced` was not used.",
            ),
            Mistake(
                "invalid rows replayed",
                _choice_all_forced,
                "the row that is not valid was replayed as well. What stands in it is filling: expert 0, twice. In a "
                "large batch such rows make expert 0 a hot spot, and a name given twice breaks expert-parallel code.",
            ),
            Mistake(
                "scores zeroed outside the live top-k",
                _choice_zeroed,
                "a replayed expert outside the live choice got gate 0 and no gradient. Just the tokens for which "
                "replay was made are computed wrongly. Gather from the dense scores.",
            ),
            Mistake(
                "gates detached",
                _choice_detached,
                "the values are right, and the router gets no gradient. Replay holds the selection, nothing else.",
            ),
            Mistake(
                "gates of the live choice",
                _choice_live_gates,
                "replayed experts with the gates of others: the weights belong to the token's own best experts, in "
                "their order.",
            ),
        ),
        praise="Row by row, that is what `RoutingReplay` answers to a router's top-k.",
    ),
    Exercise(
        id="07.2",
        title="R2 or R3: whose experts go where?",
        difficulty=2,
        importance=5,
        minutes=8,
        hints=(
            "R2 replays what the *training* engine chose at θ_old. When does it find that out?",
            "R3 replays what the *rollout* engine chose, from the first forward of the training engine on.",
            "Nobody replays anything when the model is evaluated: there are no routes for those tokens.",
        ),
        observe=_observe_plan,
        solution=_plan(),
        mistakes=(
            Mistake(
                "R3 only in the update",
                _plan(r3=("live", "e_mu", "e_mu", "live")),
                "under R3 π_old is computed with the rollout's experts, too. Live, the first factor would keep all "
                "its flips, and the second would get them as well: π_θ under e_mu against π_old under e_old.",
            ),
            Mistake(
                "R2 with the rollout's experts",
                _plan(r2=("live", "e_mu", "e_mu", "live")),
                "R2 replays what the *training* engine chose, e_old. What the rollout engine chose is R3's.",
            ),
            Mistake(
                "R2 from the second mini-batch on",
                _plan(r2=("live", "live", "e_old", "live")),
                "live and e_old are the same experts in the first mini-batch, as long as θ = θ_old: this gives the "
                "same numbers. But a method should not need to know which mini-batch it is in: R2 replays in all of "
                "them.",
            ),
            Mistake(
                "evaluation replayed",
                _plan(r3=("e_mu", "e_mu", "e_mu", "e_mu")),
                "in evaluation new responses are sampled, and no routes exist for them. A user's model runs live, so "
                "its score has to be measured live.",
            ),
            Mistake(
                "R2 and R3 exchanged",
                _plan(r2=_R3, r3=_R2),
                "the two are exchanged: R2, vanilla replay, uses the training engine's own earlier choice. R3 is the "
                "*rollout* routing replay.",
            ),
        ),
        praise="R2 needs a forward at θ_old in the training engine, R3 an engine that returns its routes.",
    ),
    Exercise(
        id="07.3",
        title="Table 1, cell by cell",
        difficulty=3,
        importance=5,
        minutes=10,
        hints=(
            "The target policy is *altered* where replay makes it another function than live routing at the same θ.",
            "That happens where the replayed experts are not those that the training engine would choose at this θ.",
            "In the first mini-batch θ = θ_old. Whose choice at θ_old is e_old, and whose is e_mu?",
        ),
        observe=_observe_table,
        solution=_cells(),
        mistakes=(
            Mistake(
                "R2 first",
                _cells(R2_first=True),
                "R2, first mini-batch: the weights are θ_old, the engine is the training engine. Its live choice *is* "
                "e_old. Replaying what would have been chosen anyway changes nothing, bit for bit.",
            ),
            Mistake(
                "R2 later",
                _cells(R2_later=False),
                "R2, later mini-batches: the weights have moved, and some tokens would now be routed to other "
                "experts. They are kept on the old ones, so the target is another function than the live policy.",
            ),
            Mistake(
                "R3 first",
                _cells(R3_first=False),
                "R3, first mini-batch: the weights are the same in both engines, but the engines are not. The training "
                "engine would choose other experts for some tokens, and is made to use the rollout's.",
            ),
            Mistake(
                "R3 later",
                _cells(R3_later=False),
                "R3, later mini-batches: now both reasons hold. The engines differed from the start, and the weights "
                "have moved as well.",
            ),
            Mistake(
                "never altered",
                lambda method, mini_batch: False,
                "only the *selection* is replayed, and gates are live. Yet with other experts it is another function: "
                "three of the four cells are altered.",
            ),
        ),
        praise="With N = 2 half of the updates are in R2's untouched cell, with N = 8 an eighth.",
    ),
    Exercise(
        id="07.4",
        title="How much of the KL does R3 remove?",
        difficulty=2,
        importance=3,
        minutes=8,
        hints=(
            "k3 is the mean of r − 1 − log r over the tokens in the mask, with r = π_old/μ_old.",
            "Compute it twice, with π_old live and with π_old replayed. What share of the first is gone?",
        ),
        observe=_observe_removed,
        solution=_removed,
        mistakes=(
            Mistake(
                "the share that stays",
                lambda mu, live, replayed, mask: _k3(mu, replayed, mask) / _k3(mu, live, mask),
                "this is what stays. Where replay changes nothing the share removed is 0.",
            ),
            Mistake(
                "mask ignored",
                lambda mu, live, replayed, mask: _removed(mu, live, replayed, torch.ones_like(mask)),
                "padding counts: one of its values is nonsense and dominates the mean.",
            ),
            Mistake(
                "ratio upside down",
                _removed_backwards,
                "r is upside down. With tokens drawn from μ_old it is r = π_old/μ_old; the other one estimates "
                "something else.",
            ),
            Mistake(
                "the noisy estimator",
                _removed_of_k1,
                "this uses the mean of log μ_old − log π_old. Positive and negative tokens cancel in it, and a share "
                "of a number near zero means nothing. k3 has only terms ≥ 0.",
            ),
            Mistake(
                "a difference, not a share",
                lambda mu, live, replayed, mask: _k3(mu, live, mask) - _k3(mu, replayed, mask),
                "this is the difference in nats. Divide by the KL without replay.",
            ),
        ),
        praise="It can be negative: forcing the other engine's experts is not bound to bring two functions closer.",
    ),
    Exercise(
        id="07.5",
        title="S − 1 rows for S tokens",
        difficulty=4,
        importance=4,
        minutes=15,
        hints=(
            "Row t is the routing of token t as an *input*. Which token of a sequence was never an input?",
            "The experts keep their places; a column is appended at the end.",
            "A row is valid if its token is real *and* another real token follows it.",
        ),
        observe=_observe_rows,
        solution=_rows,
        mistakes=(
            Mistake(
                "rows of outputs",
                _rows_of_outputs,
                "shifted by one: each row was given to the token that it *predicts*. The first token would be without "
                "experts, and every other token would use its predecessor's.",
            ),
            Mistake(
                "everything valid",
                _rows_all_valid,
                "all rows are called valid: padding and the appended column would be replayed as expert 0, twice.",
            ),
            Mistake(
                "the last token of a response valid",
                _rows_last_valid,
                "real tokens are valid, but the last one of each response was sampled and never fed to the model: "
                "nobody routed it.",
            ),
            Mistake(
                "only the last column not valid",
                _rows_last_column,
                "the last *column* is left out, but the second response ends earlier: its last token was never an "
                "input either.",
            ),
        ),
        praise="`Rollout.inputs` is this mask, and `Routes.pad_to` appends the column.",
    ),
    Exercise(
        id="07.6",
        title="A step with replay and checkpointing",
        difficulty=3,
        importance=4,
        minutes=10,
        hints=(
            "Gradient checkpointing runs the forward a second time, inside `backward()`.",
            "What must still be open at that time?",
            "`with replay.replay(routes):` around both, the loss and its `backward()`.",
        ),
        observe=_observe_step,
        solution=_step,
        mistakes=(
            Mistake(
                "left before backward",
                _step_left_early,
                "the context was left before `backward()`. Checkpointing runs the forward again there: without the "
                "routes it would take other experts than the loss did. The library refuses (RuntimeError); elsewhere "
                "the gradient is silently wrong.",
            ),
            Mistake(
                "live routing",
                _step_live,
                "this is the gradient under the model's own experts: `record` only watches.",
            ),
            Mistake(
                "old gradients kept",
                _step_added,
                "the gradient of an earlier step was still there, and backward adds to it: call `zero_grad` first.",
            ),
            Mistake(
                "routes shifted",
                _step_shifted,
                "the routes are shifted by one position. The shapes fit, nothing complains, and every token runs "
                "through its neighbour's experts.",
            ),
        ),
        praise="The same holds for `logp_old` under R3: compute it inside the context, too.",
    ),
)
