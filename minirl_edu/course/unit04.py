"""Exercises of lab 04: divisors, standard deviations, and the losses of MiniRL, GRPO and CISPO written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations

# A mask of responses with 4, 2 and 1 tokens.
_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()

# ---------------------------------------------------------------------------------------------- 04.1 three divisors

_TERMS = torch.tensor([[1.0, 2.0, -1.0, 0.5], [3.0, -0.5, 7.0, 7.0], [-2.0, 9.0, -8.0, 6.0]])


def _observe_divisors(answer: Callable[..., Any]) -> Observations:
    def three(terms: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(value) for value in answer(terms, mask)])

    sums, means, tokens = three(_TERMS, _MASK)
    empty = torch.cat([_MASK[:2], torch.zeros(1, 4).bool()])
    return {
        "a mean over responses of sums": sums,
        "a mean over responses of means": means,
        "a mean over tokens": tokens,
        "all three where padding holds NaN": three(_TERMS.masked_fill(~_MASK, torch.nan), _MASK),
        "all three where one response is empty": three(_TERMS, empty),
    }


def _divisors(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    terms = torch.where(mask, terms, 0.0)
    sums, lengths = terms.sum(1), mask.sum(1)
    return sums.mean(), (sums / lengths.clamp(min=1)).mean(), sums.sum() / lengths.sum()


def _divisors_with_padding(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return terms.sum(1).mean(), terms.mean(1).mean(), terms.mean()


def _divisors_padded_length(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    terms = torch.where(mask, terms, 0.0)
    return terms.sum(1).mean(), terms.mean(1).mean(), terms.mean()


def _divisors_times_mask(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums, lengths = (terms * mask).sum(1), mask.sum(1)
    return sums.mean(), (sums / lengths.clamp(min=1)).mean(), sums.sum() / lengths.sum()


def _divisors_empty(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums, lengths = torch.where(mask, terms, 0.0).sum(1), mask.sum(1)
    return sums.mean(), (sums / lengths).mean(), sums.sum() / lengths.sum()


def _divisors_swapped(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums, means, tokens = _divisors(terms, mask)
    return sums, tokens, means


def _divisors_wrong_axis(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    terms = torch.where(mask, terms, 0.0)
    sums, counts = terms.sum(0), mask.sum(0)
    return sums.mean(), (sums / counts.clamp(min=1)).mean(), sums.sum() / counts.sum()


_EXERCISE_1 = Exercise(
    id="04.1",
    title="Three ways to divide",
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "All three start from the sum over each response's tokens and the number of those tokens.",
        "MiniRL: the mean of the sums. GRPO: each sum over its own length, then the mean. CISPO: all sums over all "
        "lengths.",
        "`torch.where(mask, terms, 0.0)` first: NaN · 0 is NaN. An empty response has the sum 0; don't divide it by 0.",
    ),
    observe=_observe_divisors,
    solution=_divisors,
    mistakes=(
        Mistake(
            "padding summed",
            _divisors_with_padding,
            "padding was added up as well. Outside the mask stands anything at all.",
        ),
        Mistake(
            "padding counted",
            _divisors_padded_length,
            "the sums are right, the divisors count padding. Then a response's weight depends on how long the longest "
            "response of its batch is.",
        ),
        Mistake(
            "multiplied by the mask",
            _divisors_times_mask,
            "right as long as padding is finite. NaN · 0 is NaN: replace it before adding up.",
        ),
        Mistake(
            "empty response",
            _divisors_empty,
            "an empty response gives 0/0. It contributes nothing and still counts as a response.",
        ),
        Mistake(
            "GRPO and CISPO swapped",
            _divisors_swapped,
            "the second and the third are swapped. A mean of means gives every response the same weight, a mean over "
            "tokens every token.",
        ),
        Mistake(
            "wrong axis",
            _divisors_wrong_axis,
            "you added up over responses, place by place. |y| is a sum along a row.",
        ),
    ),
    praise="Everything else in this lab follows from these three lines.",
)

# ------------------------------------------------------------------------- 04.2 the gradient of what is optimised

_LOGITS = torch.tensor([0.3, -0.5, 1.0, 0.2], dtype=torch.float64)
_REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
_LENGTHS = torch.tensor([2.0, 1.0, 8.0, 5.0], dtype=torch.float64)


def _observe_objective(answer: Callable[..., Tensor]) -> Observations:
    equal = torch.full((4,), 4.0, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    return {
        "the gradient": answer(_LOGITS.clone(), _REWARDS, _LENGTHS),
        "the gradient where all lengths are 4": answer(_LOGITS.clone(), _REWARDS, equal),
        "the gradient where all rewards are 1": answer(_LOGITS.clone(), ones, _LENGTHS),
    }


def _objective(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    pi = logits.softmax(0)
    scaled = (rewards - (pi * rewards).sum()) / lengths
    return pi * (scaled - (pi * scaled).sum())


def _objective_plain(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    pi = logits.softmax(0)
    return pi * (rewards - (pi * rewards).sum())


def _objective_by_mean_length(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    pi = logits.softmax(0)
    return _objective_plain(logits, rewards, lengths) / (pi * lengths).sum()


def _objective_reward_over_length(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    return _objective_plain(logits, rewards / lengths, lengths)


def _objective_times_length(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    pi = logits.softmax(0)
    return _objective_plain(logits, (rewards - (pi * rewards).sum()) * lengths, lengths)


def _objective_no_softmax(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    pi = logits.softmax(0)
    return pi * (rewards - (pi * rewards).sum()) / lengths


def _objective_baseline_moves(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    logits = logits.requires_grad_()
    pi = logits.softmax(0)
    objective = (pi * (rewards - (pi * rewards).sum()) / lengths).sum()
    return torch.autograd.grad(objective, logits)[0]


_EXERCISE_2 = Exercise(
    id="04.2",
    title="The gradient of the length-normalised objective",
    difficulty=3,
    importance=4,
    minutes=15,
    hints=(
        "It is a policy gradient for another reward: (R − b)/|y| with b the mean reward. What is ∇ E_π[f] in the "
        "logits?",
        "∇ E_π[f] = π · (f − E_π[f]), entry by entry; f is the scaled advantage.",
        "b comes in as a number: the loss subtracts it, and nothing differentiates it. With autograd: detach it.",
    ),
    observe=_observe_objective,
    solution=_objective,
    mistakes=(
        Mistake(
            "the plain policy gradient",
            _objective_plain,
            "this is the gradient of the expected reward. The length is missing.",
        ),
        Mistake(
            "mean length",
            _objective_by_mean_length,
            "you divided everything by the mean length. That is the token mean of a large batch: the direction stays "
            "that of the expected reward. Here every response has its own divisor.",
        ),
        Mistake(
            "reward over length",
            _objective_reward_over_length,
            "that is the gradient of E[R/|y|]. The baseline is subtracted first and divided as well: a wrong "
            "response gets −b/|y|, and that is where the length bias comes from.",
        ),
        Mistake(
            "times the length",
            _objective_times_length,
            "the advantage was multiplied by the length: long responses now count more, not less.",
        ),
        Mistake(
            "softmax forgotten",
            _objective_no_softmax,
            "the entries do not add up to 0. Logits are pulled by f − E_π[f]: scaled advantages no longer have mean "
            "0 by themselves.",
        ),
        Mistake(
            "baseline differentiated",
            _objective_baseline_moves,
            "the baseline was differentiated too. In the loss b is a number that was computed from rewards.",
        ),
    ),
    praise="With equal lengths it is the policy gradient divided by the length: harmless, another learning rate.",
)

# ------------------------------------------------------------------------------------------ 04.3 two advantages

_GROUPED = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def _observe_advantages(answer: Callable[..., Any]) -> Observations:
    minirl, grpo = answer(_GROUPED, 4)
    return {
        "MiniRL's advantage": minirl,
        "GRPO's advantage in the two mixed groups": torch.as_tensor(grpo)[:8],
        "GRPO's advantage where all are right": torch.as_tensor(grpo)[8:],
    }


def _advantages(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    return centred.flatten(), (centred / (std + 1e-6)).flatten()


def _advantages_std_in_both(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    grpo = _advantages(rewards, group_size)[1]
    return grpo, grpo


def _advantages_no_std(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    minirl = _advantages(rewards, group_size)[0]
    return minirl, minirl


def _advantages_bessel(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.flatten(), (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def _advantages_bessel_in_both(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    grpo = _advantages_bessel(rewards, group_size)[1]
    return grpo, grpo


def _advantages_batch(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    centred = rewards - rewards.mean()
    return centred, centred / (centred.square().mean().sqrt() + 1e-6)


def _advantages_batch_std(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    minirl = _advantages(rewards, group_size)[0]
    return minirl, minirl / (minirl.square().mean().sqrt() + 1e-6)


def _advantages_no_eps(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.flatten(), (centred / centred.square().mean(1, keepdim=True).sqrt()).flatten()


def _advantages_variance(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.flatten(), (centred / (centred.square().mean(1, keepdim=True) + 1e-6)).flatten()


def _advantages_leave_one_out(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    minirl, grpo = _advantages(rewards, group_size)
    return minirl * group_size / (group_size - 1), grpo


_EXERCISE_3 = Exercise(
    id="04.3",
    title="Two advantages",
    difficulty=2,
    importance=4,
    minutes=8,
    hints=(
        "`rewards.view(-1, group_size)` puts a group in each row.",
        "MiniRL subtracts the group's mean and stops there.",
        "GRPO divides by the group's standard deviation, divisor G, plus 1e-6 for groups in which all are rewarded "
        "alike.",
    ),
    observe=_observe_advantages,
    solution=_advantages,
    mistakes=(
        Mistake(
            "std left in",
            _advantages_std_in_both,
            "MiniRL's advantage was divided by the standard deviation. It is the mean only: the division gives "
            "groups that are nearly all right or nearly all wrong more weight than their share.",
        ),
        Mistake(
            "no std anywhere",
            _advantages_no_std,
            "the second is not GRPO's: the division by the group's standard deviation is missing.",
        ),
        Mistake(
            "divisor G − 1",
            _advantages_bessel,
            "`torch.std` divides by G − 1 unless told otherwise (`correction=0`). The paper's is the standard "
            "deviation of the group itself, divisor G; your advantages are smaller by a factor √((G−1)/G).",
        ),
        Mistake(
            "std left in, divisor G − 1",
            _advantages_bessel_in_both,
            "MiniRL's advantage is the difference from the mean only: take the division out. And in GRPO's, "
            "`torch.std` divides by G − 1; the paper's has the divisor G.",
        ),
        Mistake(
            "mean of the batch",
            _advantages_batch,
            "you centred on the whole batch. Then a hard problem's responses are all bad and an easy one's all good, "
            "whatever was tried.",
        ),
        Mistake(
            "std of the batch",
            _advantages_batch_std,
            "the mean is the group's and the standard deviation the batch's. That is a common factor for all groups, "
            "not GRPO.",
        ),
        Mistake(
            "no epsilon",
            _advantages_no_eps,
            "a group that is all right gives 0/0.",
        ),
        Mistake(
            "variance",
            _advantages_variance,
            "you divided by the variance. The root is missing.",
        ),
        Mistake(
            "leave one out",
            _advantages_leave_one_out,
            "the first leaves each response out of its own baseline. That is RLOO, larger by G/(G−1); the paper "
            "subtracts the plain mean of the group.",
        ),
    ),
    praise="In the library: group_mean_advantages and group_mean_std_advantages.",
)

# ------------------------------------------------------------------------------------- a batch for the three losses

# Responses of 4, 2 and 1 tokens. Ratios r = π_θ/π_old: kept, dropped, moved against the push, capped.
_OLD = torch.tensor([[0.50, 0.30, 0.08, 0.60], [0.40, 0.50, 1.00, 1.00], [0.02, 1.00, 1.00, 1.00]], dtype=torch.float64)
_RATIO = torch.tensor(
    [[1.00, 1.50, 1.23, 0.60], [0.70, 1.40, 1.00, 1.00], [6.50, 1.00, 1.00, 1.00]], dtype=torch.float64
)
_ROLLOUT = torch.tensor(
    [[0.40, 0.30, 0.01, 0.90], [0.40, 0.60, 1.00, 1.00], [0.05, 1.00, 1.00, 1.00]], dtype=torch.float64
)
_ADVANTAGES = torch.tensor([0.75, -0.5, -0.25], dtype=torch.float64)


def _observe_loss(*, rollout: bool) -> Callable[[Callable[..., Tensor]], Observations]:
    """The gradient with respect to log π_θ for one batch, for the negated advantages, and on-policy."""

    def gradient(answer: Callable[..., Tensor], ratio: Tensor, advantages: Tensor) -> Tensor:
        logp = (ratio.log() + _OLD.log()).requires_grad_()
        others = (_OLD.log(), _ROLLOUT.log()) if rollout else (_OLD.log(),)
        loss = answer(logp, *others, advantages, _MASK)
        return torch.autograd.grad(loss, logp)[0] if loss.requires_grad else torch.full_like(logp, torch.nan)

    def observe(answer: Callable[..., Tensor]) -> Observations:
        return {
            "∂loss/∂logp on-policy": gradient(answer, torch.ones_like(_RATIO), _ADVANTAGES),
            "∂loss/∂logp": gradient(answer, _RATIO, _ADVANTAGES),
            "∂loss/∂logp with the other advantages": gradient(answer, _RATIO, -_ADVANTAGES),
        }

    return observe


# ------------------------------------------------------------------------------------------------- 04.4 MiniRL's loss


def _minirl(
    logp: Tensor,
    logp_old: Tensor,
    logp_rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sign: float = -1.0,
    attached: bool = False,
    ratio_to: str = "old",
    weight_to: str = "rollout",
    cap: float = 5.0,
    any_sign: bool = False,
    length_norm: bool = False,
    eps: tuple[float, float] = (0.2, 0.27),
) -> Tensor:
    """Equation (7); every option is a way to get it wrong."""
    references = {"old": logp_old, "rollout": logp_rollout}
    ratio = (logp - references[ratio_to]).detach().exp()
    log_weight = logp - references[weight_to]
    weight = (log_weight if attached else log_weight.detach()).exp().clamp(max=cap)
    a = advantages[:, None]
    high, low = ratio > 1 + eps[1], ratio < 1 - eps[0]
    dropped = (high | low) if any_sign else ((a > 0) & high) | ((a < 0) & low)
    terms = weight * a * logp * ~dropped * mask
    sums = terms.sum(1) / mask.sum(1) if length_norm else terms.sum(1)
    return sign * sums.sum() / len(logp)


def _minirl_with(**options: Any) -> Callable[..., Tensor]:
    return lambda *args: _minirl(*args, **options)


_EXERCISE_4 = Exercise(
    id="04.4",
    title="MiniRL's loss",
    difficulty=3,
    importance=5,
    minutes=20,
    hints=(
        "Two ratios: π_θ/μ_old is the weight (capped at 5), π_θ/π_old decides about M. Both are detached.",
        "M drops a token where Â > 0 and r > 1.27, or Â < 0 and r < 0.8. Not where it moved against its push.",
        "−(1/B) · sum over responses of the sum over tokens of M · w · Â · logp.",
    ),
    observe=_observe_loss(rollout=True),
    solution=_minirl,
    mistakes=(
        Mistake("sign", _minirl_with(sign=1.0), "the sign is that of the objective. A loss is minimised: −J."),
        Mistake(
            "weight attached",
            _minirl_with(attached=True),
            "the weight was not detached: autograd adds ∇w · log π to every token's gradient.",
        ),
        Mistake(
            "length normalised",
            _minirl_with(length_norm=True),
            "each response was divided by its length. MiniRL adds up over tokens; this is the ablation “+ length "
            "norm”.",
        ),
        Mistake(
            "ratio to the rollout policy",
            _minirl_with(ratio_to="rollout"),
            "the clip looks at π_θ/μ_old. The trust region is around π_old (decoupled PPO): with μ_old in its place, "
            "a token can be dropped before θ has moved at all.",
        ),
        Mistake(
            "no train–inference weight",
            _minirl_with(weight_to="old"),
            "the weight is π_θ/π_old: that is the ablation “− IS”. The tokens were drawn by μ_old.",
        ),
        Mistake("no cap", _minirl_with(cap=1e9), "the weight has no cap: one token has more than 5."),
        Mistake(
            "drops whatever the sign",
            _minirl_with(any_sign=True),
            "tokens are dropped on both sides whatever their advantage. A token that moved *against* its push must "
            "keep its gradient, or it is never brought back.",
        ),
        Mistake(
            "epsilons swapped",
            _minirl_with(eps=(0.27, 0.2)),
            "ε_low and ε_high are swapped: 0.27 above, 0.2 below.",
        ),
    ),
    praise="Compare with minirl_loss in objectives.py: the same, with care for NaN and for micro-batches.",
)

# --------------------------------------------------------------------------------------------------- 04.5 GRPO's loss


def _grpo(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sign: float = -1.0,
    detached: bool = False,
    larger: bool = False,
    clip: bool = True,
    only_clipped: bool = False,
    divide: str = "length",
) -> Tensor:
    """GRPO's objective; every option is a way to get it wrong."""
    ratio = (logp - logp_old).exp()
    ratio = ratio.detach() if detached else ratio
    a = advantages[:, None]
    clipped = ratio.clamp(0.8, 1.2) * a
    if only_clipped:
        surrogate = clipped
    elif clip:
        surrogate = (torch.maximum if larger else torch.minimum)(ratio * a, clipped)
    else:
        surrogate = ratio * a
    sums = (surrogate * mask).sum(1)
    parts = {"length": (sums / mask.sum(1)).mean(), "sum": sums.mean(), "tokens": sums.sum() / mask.sum()}
    return sign * parts[divide]


def _grpo_with(**options: Any) -> Callable[..., Tensor]:
    return lambda *args: _grpo(*args, **options)


_EXERCISE_5 = Exercise(
    id="04.5",
    title="GRPO's loss",
    difficulty=3,
    importance=3,
    minutes=12,
    hints=(
        "There is no log π in it: the ratio itself carries the gradient.",
        "`torch.minimum(r * Â, r.clamp(0.8, 1.2) * Â)`, token by token. Where the clipped one is smaller, no "
        "gradient is left.",
        "Mean over each response's tokens first, then the mean over responses, then minus.",
    ),
    observe=_observe_loss(rollout=False),
    solution=_grpo,
    mistakes=(
        Mistake("sign", _grpo_with(sign=1.0), "the sign is that of the objective. A loss is minimised: −J."),
        Mistake(
            "detached",
            _grpo_with(detached=True),
            "nothing carries a gradient. In GRPO, as in PPO, the ratio is differentiated; sg belongs to MiniRL and "
            "CISPO.",
        ),
        Mistake(
            "larger of the two",
            _grpo_with(larger=True),
            "you took the larger of the two. The minimum is the pessimistic one: it keeps a token that moved against "
            "its push and lets go of one that moved far enough.",
        ),
        Mistake("no clip", _grpo_with(clip=False), "there is no clip: tokens that have moved far keep being pushed."),
        Mistake(
            "only the clipped ratio",
            _grpo_with(only_clipped=True),
            "with the clipped ratio alone a token that moved against its push has no gradient either. The minimum "
            "with the unclipped one is what brings it back.",
        ),
        Mistake(
            "sum over tokens",
            _grpo_with(divide="sum"),
            "the division by each response's length is missing: that is MiniRL's sum.",
        ),
        Mistake(
            "mean over tokens",
            _grpo_with(divide="tokens"),
            "you divided by all tokens of the batch. GRPO divides each response by its own length first.",
        ),
    ),
    praise="The library's is grpo_loss.",
)

# -------------------------------------------------------------------------------------------------- 04.6 CISPO's loss


def _cispo(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sign: float = -1.0,
    attached: bool = False,
    floor: float = 0.0,
    ceiling: float = 5.0,
    drops: bool = False,
    divide: str = "tokens",
) -> Tensor:
    """CISPO's objective; every option is a way to get it wrong."""
    ratio = (logp - logp_old).exp()
    weight = ratio.clamp(floor, ceiling)
    if not attached:
        weight = weight.detach()
    terms = weight * advantages[:, None] * logp * mask
    if drops:
        terms = terms * (ratio <= ceiling).detach()
    sums = terms.sum(1)
    parts = {"length": (sums / mask.sum(1)).mean(), "sum": sums.mean(), "tokens": sums.sum() / mask.sum()}
    parts["all"] = terms.mean()
    return sign * parts[divide]


def _cispo_with(**options: Any) -> Callable[..., Tensor]:
    return lambda *args: _cispo(*args, **options)


_EXERCISE_6 = Exercise(
    id="04.6",
    title="CISPO's loss",
    difficulty=3,
    importance=3,
    minutes=10,
    hints=(
        "Like MiniRL it is a detached weight times Â times log π. The weight is r = π_θ/π_old, clipped to [0, 5].",
        "No token is dropped: one beyond the ceiling counts as 5.",
        "Add up over everything and divide by the number of tokens in the batch.",
    ),
    observe=_observe_loss(rollout=False),
    solution=_cispo,
    mistakes=(
        Mistake("sign", _cispo_with(sign=1.0), "the sign is that of the objective. A loss is minimised: −J."),
        Mistake(
            "weight attached",
            _cispo_with(attached=True),
            "the weight was not detached: autograd adds ∇w · log π.",
        ),
        Mistake(
            "tokens dropped",
            _cispo_with(drops=True),
            "a token beyond the ceiling has no gradient left. Either it was dropped, or the clipped ratio was "
            "differentiated, which is constant there. In CISPO the weight is clipped, the gradient comes from log π, "
            "and every token keeps one.",
        ),
        Mistake(
            "GRPO's range",
            _cispo_with(floor=0.8, ceiling=1.2),
            "the weight was clipped to [0.8, 1.2], GRPO's range. CISPO's has no floor, and its ceiling is far from "
            "1: 5 here.",
        ),
        Mistake("no ceiling", _cispo_with(ceiling=1e9), "the weight is not clipped: one token has more than 5."),
        Mistake(
            "mean of means",
            _cispo_with(divide="length"),
            "each response was divided by its own length. That is GRPO's mean; CISPO divides once, by all tokens.",
        ),
        Mistake(
            "sum over tokens",
            _cispo_with(divide="sum"),
            "you divided by the number of responses. CISPO divides by the number of tokens in the batch.",
        ),
        Mistake(
            "padding counted",
            _cispo_with(divide="all"),
            "padding was counted in the divisor. Σ|y| is the number of true positions of the mask.",
        ),
    ),
    praise="The library's is cispo_loss.",
)

# ----------------------------------------------------------------------------------------------- 04.7 micro-batches

_PARTS = (
    (torch.tensor([[2.0, -1.0, 3.0], [1.0, 0.5, 0.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()),
    (torch.tensor([[4.0, 0.0], [-3.0, 0.0], [1.5, 2.5]]), torch.tensor([[1, 0], [1, 0], [1, 1]]).bool()),
    (torch.tensor([[6.0, 1.0, 1.0, 2.0]]), torch.tensor([[1, 1, 1, 1]]).bool()),
)


def _observe_parts(answer: Callable[..., Any]) -> Observations:
    losses = [torch.as_tensor(loss) for loss in answer(_PARTS)]
    whole = [torch.as_tensor(loss) for loss in answer(_PARTS[:1])]
    return {
        "the number of losses": len(losses),
        "the loss of a batch that is not split": whole[0],
        "the losses of the parts": torch.stack(losses),
    }


_Parts = Sequence[tuple[Tensor, Tensor]]


def _parts(micro_batches: _Parts) -> list[Tensor]:
    tokens = sum(int(mask.sum()) for _, mask in micro_batches)
    return [-(terms * mask).sum() / tokens for terms, mask in micro_batches]


def _parts_local(micro_batches: _Parts) -> list[Tensor]:
    return [-(terms * mask).sum() / mask.sum() for terms, mask in micro_batches]


def _parts_local_averaged(micro_batches: _Parts) -> list[Tensor]:
    return [loss / len(micro_batches) for loss in _parts_local(micro_batches)]


def _parts_by_responses(micro_batches: _Parts) -> list[Tensor]:
    responses = sum(len(mask) for _, mask in micro_batches)
    return [-(terms * mask).sum() / responses for terms, mask in micro_batches]


def _parts_padding(micro_batches: _Parts) -> list[Tensor]:
    tokens = sum(mask.numel() for _, mask in micro_batches)
    return [-(terms * mask).sum() / tokens for terms, mask in micro_batches]


def _parts_twice(micro_batches: _Parts) -> list[Tensor]:
    return [loss / len(micro_batches) for loss in _parts(micro_batches)]


def _parts_weighted_by_responses(micro_batches: _Parts) -> list[Tensor]:
    responses = sum(len(mask) for _, mask in micro_batches)
    losses = _parts_local(micro_batches)
    return [loss * len(mask) / responses for loss, (_, mask) in zip(losses, micro_batches, strict=True)]


def _parts_sign(micro_batches: _Parts) -> list[Tensor]:
    return [-loss for loss in _parts(micro_batches)]


_EXERCISE_7 = Exercise(
    id="04.7",
    title="A mean over tokens, in parts",
    difficulty=3,
    importance=4,
    minutes=10,
    hints=(
        "What must the losses of the parts add up to? Write that number down with its divisor first.",
        "The divisor is the same for every part, and it has to be known before the first of them is computed.",
    ),
    observe=_observe_parts,
    solution=_parts,
    mistakes=(
        Mistake(
            "local means",
            _parts_local,
            "each part was divided by its own tokens. Gradients of parts add up, so the step grows with the number "
            "of parts.",
        ),
        Mistake(
            "mean of local means",
            _parts_local_averaged,
            "a mean of the parts' means. A token in a part with few tokens then counts for more: its weight depends "
            "on who shares its micro-batch, that is on packing.",
        ),
        Mistake(
            "responses",
            _parts_by_responses,
            "you divided by the number of responses: MiniRL's divisor. Asked is the token mean.",
        ),
        Mistake("padding", _parts_padding, "padding was counted. It differs from part to part and is no token."),
        Mistake(
            "divided twice",
            _parts_twice,
            "the divisor is already the whole batch's. Dividing by the number of parts as well makes the step "
            "smaller the finer the batch is cut (many loops do this by default: gradient accumulation).",
        ),
        Mistake(
            "weighted by responses",
            _parts_weighted_by_responses,
            "the local means are weighted by the parts' share of the *responses*. For a mean over tokens it is the "
            "share of the tokens.",
        ),
        Mistake("sign", _parts_sign, "the losses have the sign of the objective."),
    ),
    praise="The library takes the global count as an argument: num_responses, and num_tokens for CISPO.",
)

EXERCISES = (_EXERCISE_1, _EXERCISE_2, _EXERCISE_3, _EXERCISE_4, _EXERCISE_5, _EXERCISE_6, _EXERCISE_7)
