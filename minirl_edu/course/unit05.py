"""Exercises of lab 05: divisors, standard deviations, MiniRL, GRPO and CISPO by hand, and the other corrections."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages, leave_one_out_advantages
from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import (
    EPS_HIGH,
    EPS_LOW,
    batch_advantages,
    dropped,
    gradient,
    masked_mean,
    surrogate,
    torch_std_advantages,
)
from minirl_edu.objectives import cispo_loss, grpo_loss, minirl_loss

# Responses of 4, 2 and 1 tokens.
_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
_TERMS = torch.tensor([[1.0, 2.0, -1.0, 0.5], [3.0, -0.5, 7.0, 7.0], [-2.0, 9.0, -8.0, 6.0]])


def _observe_divisors(answer: Answer) -> Observations:
    def three(terms: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(value) for value in answer(terms, mask)])

    sums, means, per_token = three(_TERMS, _MASK)
    empty = torch.cat([_MASK[:2], torch.zeros(1, 4).bool()])
    return {
        "a mean over responses of sums": sums,
        "a mean over responses of means": means,
        "a mean over tokens": per_token,
        "all three where padding holds NaN": three(_TERMS.masked_fill(~_MASK, torch.nan), _MASK),
        "all three where one response is empty": three(_TERMS, empty),
    }


def _divisors(
    terms: Tensor, mask: Tensor, *, times_mask: bool = False, at_least: int = 1, axis: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    sums = (terms * mask if times_mask else torch.where(mask, terms, 0.0)).sum(axis)
    lengths = mask.sum(axis)
    return sums.mean(), (sums / lengths.clamp(min=at_least)).mean(), sums.sum() / lengths.sum()


def _padding_counted(terms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return terms.sum(1).mean(), terms.mean(1).mean(), terms.mean()


EX1 = exercise(
    """05.1 Three ways to divide (difficulty 2, importance 5, 10 minutes)

    1. All three start from the sum over each response's tokens and the number of those tokens.
    2. MiniRL: the mean of the sums. GRPO: each sum over its own length, then the mean. CISPO: all sums over all
       lengths.
    3. `torch.where(mask, terms, 0.0)` first: NaN · 0 is NaN. An empty response has the sum 0; don't divide it by 0.

    - padding summed: padding was added up as well. Anything at all may stand outside the mask.
    - padding counted: the sums are right, the divisors count padding. Then a response's weight depends on how long the
      longest response of its batch is.
    - multiplied by the mask: right as long as padding is finite. NaN · 0 is NaN: replace it before adding up.
    - empty response: an empty response gives 0/0. It contributes nothing and still counts as a response.
    - GRPO and CISPO swapped: the second and the third are swapped. A mean of means gives every response the same
      weight, a mean over tokens every token.
    - wrong axis: you added up over responses, place by place. |y| is a sum along a row.

    Everything else in this lab follows from these three lines.
    """,
    observe=_observe_divisors,
    solution=_divisors,
    mistakes={
        "padding summed": _padding_counted,
        "padding counted": lambda terms, mask: _padding_counted(torch.where(mask, terms, 0.0), mask),
        "multiplied by the mask": partial(_divisors, times_mask=True),
        "empty response": partial(_divisors, at_least=0),
        "GRPO and CISPO swapped": lambda terms, mask: [_divisors(terms, mask)[i] for i in (0, 2, 1)],
        "wrong axis": partial(_divisors, axis=0),
    },
)


_LOGITS = torch.tensor([0.3, -0.5, 1.0, 0.2], dtype=torch.float64)
_REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
_LENGTHS = torch.tensor([2.0, 1.0, 8.0, 5.0], dtype=torch.float64)


def _observe_objective(answer: Answer) -> Observations:
    return {
        "the gradient": answer(_LOGITS.clone(), _REWARDS, _LENGTHS),
        "the gradient where all lengths are 4": answer(_LOGITS.clone(), _REWARDS, torch.full_like(_LENGTHS, 4.0)),
        "the gradient where all rewards are 1": answer(_LOGITS.clone(), torch.ones_like(_REWARDS), _LENGTHS),
    }


def _centred(logits: Tensor, values: Tensor) -> Tensor:
    """Values minus their mean under π."""
    return values - logits.softmax(0) @ values


def _ascent(logits: Tensor, values: Tensor) -> Tensor:
    """∇ E_π[values] in the logits."""
    return logits.softmax(0) * _centred(logits, values)


def _baseline_differentiated(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    logits = logits.requires_grad_()
    return gradient((logits.softmax(0) * _centred(logits, rewards) / lengths).sum(), logits)


EX2 = exercise(
    """05.2 The gradient of the length-normalised objective (difficulty 3, importance 4, 15 minutes)

    1. It is a policy gradient for another reward: (R − b)/|y| with b the mean reward. What is ∇ E_π[f] in the logits?
    2. ∇ E_π[f] = π · (f − E_π[f]), entry by entry; f is the scaled advantage.
    3. b comes in as a number: the loss subtracts it, and nothing differentiates it. With autograd: detach it.

    - the plain policy gradient: this is the gradient of the expected reward. The length is missing.
    - mean length: you divided everything by the mean length. That is the token mean of a large batch: the direction
      stays that of the expected reward. Here every response has its own divisor.
    - reward over length: that is the gradient of E[R/|y|]. The baseline is subtracted first and divided as well: a
      wrong response gets −b/|y|, and the length bias comes from there.
    - times the length: the advantage was multiplied by the length: long responses now count more, not less.
    - softmax forgotten: the entries do not add up to 0. Logits are pulled by f − E_π[f]: scaled advantages no longer
      have mean 0 by themselves.
    - baseline differentiated: the baseline was differentiated too. In the loss b is a number that was computed from
      rewards.

    With equal lengths it is the policy gradient divided by the length: harmless, another learning rate.
    """,
    observe=_observe_objective,
    solution=lambda logits, rewards, lengths: _ascent(logits, _centred(logits, rewards) / lengths),
    mistakes={
        "the plain policy gradient": lambda logits, rewards, lengths: _ascent(logits, rewards),
        "mean length": lambda logits, rewards, lengths: _ascent(logits, rewards) / (logits.softmax(0) @ lengths),
        "reward over length": lambda logits, rewards, lengths: _ascent(logits, rewards / lengths),
        "times the length": lambda logits, rewards, lengths: _ascent(logits, _centred(logits, rewards) * lengths),
        "softmax forgotten": lambda logits, rewards, lengths: _ascent(logits, rewards) / lengths,
        "baseline differentiated": _baseline_differentiated,
    },
)


_GROUPED = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def _observe_advantages(answer: Answer) -> Observations:
    minirl, grpo = answer(_GROUPED, 4)
    return {
        "MiniRL's advantage": minirl,
        "GRPO's advantage in the two mixed groups": torch.as_tensor(grpo)[:8],
        "GRPO's advantage where all are right": torch.as_tensor(grpo)[8:],
    }


def _both(minirl: Answer, grpo: Answer) -> Answer:
    return lambda rewards, group_size: (minirl(rewards, group_size), grpo(rewards, group_size))


def _over_std(centred: Answer) -> Answer:
    """Centred rewards over the standard deviation of the whole batch."""

    def advantages(rewards: Tensor, group_size: int) -> Tensor:
        difference = centred(rewards, group_size)
        return difference / (difference.square().mean().sqrt() + 1e-6)

    return advantages


def _over_variance(rewards: Tensor, group_size: int) -> Tensor:
    variance = rewards.view(-1, group_size).var(1, correction=0).repeat_interleave(group_size)
    return group_mean_advantages(rewards, group_size) / (variance + 1e-6)


EX3 = exercise(
    """05.3 Two advantages (difficulty 2, importance 4, 8 minutes)

    1. `rewards.view(-1, group_size)` puts a group in each row.
    2. MiniRL subtracts the group's mean and stops there.
    3. GRPO divides by the group's standard deviation, divisor G, plus 1e-6 for groups in which all are rewarded alike.

    - std left in: MiniRL's advantage was divided by the standard deviation. It is the mean only: the division gives
      groups that are nearly all right or nearly all wrong more weight than their share.
    - no std anywhere: the second is not GRPO's: the division by the group's standard deviation is missing.
    - divisor G − 1: `torch.std` divides by G − 1 unless told otherwise (`correction=0`). The paper's is the standard
      deviation of the group itself, divisor G; your advantages are smaller by a factor √((G−1)/G).
    - std left in, divisor G − 1: MiniRL's advantage is the difference from the mean only: take the division out. And in
      GRPO's, `torch.std` divides by G − 1; the paper's has the divisor G.
    - mean of the batch: you centred on the whole batch. Then a hard problem's responses are all bad and an easy one's
      all good, whatever was tried.
    - std of the batch: the mean is the group's and the standard deviation the batch's. That is a common factor for all
      groups, not GRPO.
    - no epsilon: a group that is all right gives 0/0.
    - variance: you divided by the variance. The root is missing.
    - leave one out: the first leaves each response out of its own baseline. That is RLOO, larger by G/(G−1); the paper
      subtracts the plain mean of the group.

    In the library: group_mean_advantages and group_mean_std_advantages.
    """,
    observe=_observe_advantages,
    solution=_both(group_mean_advantages, group_mean_std_advantages),
    mistakes={
        "std left in": _both(group_mean_std_advantages, group_mean_std_advantages),
        "no std anywhere": _both(group_mean_advantages, group_mean_advantages),
        "divisor G − 1": _both(group_mean_advantages, torch_std_advantages),
        "std left in, divisor G − 1": _both(torch_std_advantages, torch_std_advantages),
        "mean of the batch": _both(batch_advantages, _over_std(batch_advantages)),
        "std of the batch": _both(group_mean_advantages, _over_std(group_mean_advantages)),
        "no epsilon": _both(group_mean_advantages, partial(group_mean_std_advantages, eps=0.0)),
        "variance": _both(group_mean_advantages, _over_variance),
        "leave one out": _both(leave_one_out_advantages, group_mean_std_advantages),
    },
)

# A batch for the three losses: responses of 4, 2 and 1 tokens.
# Ratios r = π_θ/π_old: kept, dropped, moved against the push, capped.
_OLD = torch.tensor([[0.50, 0.30, 0.08, 0.60], [0.40, 0.50, 1.00, 1.00], [0.02, 1.00, 1.00, 1.00]], dtype=torch.float64)
_RATIO = torch.tensor(
    [[1.00, 1.50, 1.23, 0.60], [0.70, 1.40, 1.00, 1.00], [6.50, 1.00, 1.00, 1.00]], dtype=torch.float64
)
_ROLLOUT = torch.tensor(
    [[0.40, 0.30, 0.01, 0.90], [0.40, 0.60, 1.00, 1.00], [0.05, 1.00, 1.00, 1.00]], dtype=torch.float64
)
_ADVANTAGES = torch.tensor([0.75, -0.5, -0.25], dtype=torch.float64)


def _observe_loss(*others: Tensor) -> Answer:
    """The gradient with respect to log π_θ for one batch, for the negated advantages, and on-policy."""

    def of(answer: Answer, ratio: Tensor, advantages: Tensor) -> Tensor:
        logp = (ratio.log() + _OLD.log()).requires_grad_()
        return gradient(answer(logp, *(other.log() for other in others), advantages, _MASK), logp, without=torch.nan)

    return lambda answer: {
        "∂loss/∂logp on-policy": of(answer, torch.ones_like(_RATIO), _ADVANTAGES),
        "∂loss/∂logp": of(answer, _RATIO, _ADVANTAGES),
        "∂loss/∂logp with the other advantages": of(answer, _RATIO, -_ADVANTAGES),
    }


def _library(objective: Answer) -> Answer:
    return lambda *case: objective(*case).loss


def _minirl(
    logp: Tensor,
    old: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    attached: bool = False,
    clip_around_rollout: bool = False,
    weight_by_old: bool = False,
    cap: float = 5.0,
    any_sign: bool = False,
    bounds: tuple[float, float] = (EPS_LOW, EPS_HIGH),
    over: str = "sums",
) -> Tensor:
    """Equation (7), as `minirl_loss` has it; every option is a way to get it wrong."""
    weight = (logp - (old if weight_by_old else rollout)).exp().clamp(max=cap)
    kept = ~dropped(logp, rollout if clip_around_rollout else old, advantages, *bounds, any_sign=any_sign)
    terms = kept * (weight if attached else weight.detach()) * advantages[:, None] * logp
    return -masked_mean(terms, mask, over)


EX4 = exercise(
    """05.4 MiniRL's loss (difficulty 3, importance 5, 20 minutes)

    1. Two ratios: π_θ/μ_old is the weight (capped at 5), π_θ/π_old decides about M. Both are detached.
    2. M drops a token where Â > 0 and r > 1.27, or Â < 0 and r < 0.8. Not where it moved against its push.
    3. −(1/B) · sum over responses of the sum over tokens of M · w · Â · logp.

    - sign: the sign is that of the objective. A loss is minimised: −J.
    - weight attached: the weight was not detached: autograd adds ∇w · log π to every token's gradient.
    - length normalised: each response was divided by its length. MiniRL adds up over tokens; this is the ablation “+
      length norm”.
    - ratio to the rollout policy: the clip looks at π_θ/μ_old. The trust region is around π_old (decoupled PPO): with
      μ_old in its place, a token can be dropped before θ has moved at all.
    - no train–inference weight: the weight is π_θ/π_old: that is the ablation “− IS”. The tokens were drawn by μ_old.
    - no cap: the weight has no cap: one token has more than 5.
    - drops whatever the sign: tokens are dropped on both sides whatever their advantage. A token that moved *against*
      its push must keep its gradient, or it is never brought back.
    - epsilons swapped: ε_low and ε_high are swapped: 0.27 above, 0.2 below.

    Compare with minirl_loss in objectives.py: the same, with care for NaN and for micro-batches.
    """,
    observe=_observe_loss(_OLD, _ROLLOUT),
    solution=_library(minirl_loss),
    mistakes={
        "sign": lambda *case: -_minirl(*case),
        "weight attached": partial(_minirl, attached=True),
        "length normalised": partial(_minirl, over="responses"),
        "ratio to the rollout policy": partial(_minirl, clip_around_rollout=True),
        "no train–inference weight": partial(_minirl, weight_by_old=True),
        "no cap": partial(_minirl, cap=torch.inf),
        "drops whatever the sign": partial(_minirl, any_sign=True),
        "epsilons swapped": partial(_minirl, bounds=(EPS_HIGH, EPS_LOW)),
    },
)


def _grpo(
    logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, form: str = "minimum", over: str = "responses"
) -> Tensor:
    return -masked_mean(surrogate(logp, old, advantages[:, None], 0.2, 0.2, form=form), mask, over)


EX5 = exercise(
    """05.5 GRPO's loss (difficulty 3, importance 3, 12 minutes)

    1. There is no log π in it: the ratio itself carries the gradient.
    2. `torch.minimum(r * Â, r.clamp(0.8, 1.2) * Â)`, token by token. Where the clipped one is smaller, no gradient is
       left.
    3. Mean over each response's tokens first, then the mean over responses, then minus.

    - sign: the sign is that of the objective. A loss is minimised: −J.
    - detached: nothing carries a gradient. In GRPO, as in PPO, the ratio is differentiated; sg belongs to MiniRL and
      CISPO.
    - larger of the two: you took the larger of the two. The minimum is the pessimistic one: it keeps a token that moved
      against its push and lets go of one that moved far enough.
    - no clip: there is no clip: tokens that have moved far keep being pushed.
    - only the clipped ratio: with the clipped ratio alone a token that moved against its push has no gradient either.
      The minimum with the unclipped one is what brings it back.
    - sum over tokens: the division by each response's length is missing: that is MiniRL's sum.
    - mean over tokens: you divided by all tokens of the batch. GRPO divides each response by its own length first.

    The library's is grpo_loss.
    """,
    observe=_observe_loss(_OLD),
    solution=_library(grpo_loss),
    mistakes={
        "sign": lambda *case: -_grpo(*case),
        "detached": lambda logp, *case: _grpo(logp.detach(), *case),
        "larger of the two": partial(_grpo, form="maximum"),
        "no clip": partial(_grpo, form="not clipped"),
        "only the clipped ratio": partial(_grpo, form="clipped"),
        "sum over tokens": partial(_grpo, over="sums"),
        "mean over tokens": partial(_grpo, over="tokens"),
    },
)


def _cispo(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    attached: bool = False,
    bounds: tuple[float, float] = (0.0, 5.0),
    drops: bool = False,
    over: str = "tokens",
) -> Tensor:
    """CISPO's objective; every option is a way to get it wrong."""
    ratio = (logp - old).exp()
    weight = ratio.clamp(*bounds) * (ratio <= bounds[1] if drops else 1)
    terms = (weight if attached else weight.detach()) * advantages[:, None] * logp
    return -masked_mean(terms, mask, over)


EX6 = exercise(
    """05.6 CISPO's loss (difficulty 3, importance 3, 10 minutes)

    1. Like MiniRL it is a detached weight times Â times log π. The weight is r = π_θ/π_old, clipped to [0, 5].
    2. No token is dropped: one beyond the ceiling counts as 5.
    3. Add up over everything and divide by the number of tokens in the batch.

    - sign: the sign is that of the objective. A loss is minimised: −J.
    - weight attached: the weight was not detached: autograd adds ∇w · log π.
    - tokens dropped: a token beyond the ceiling has no gradient left. Either it was dropped, or the clipped ratio was
      differentiated, which is constant there. In CISPO the weight is clipped, the gradient comes from log π, and every
      token keeps one.
    - GRPO's range: the weight was clipped to [0.8, 1.2], GRPO's range. CISPO's has no floor, and its ceiling is far
      from 1: 5 here.
    - no ceiling: the weight is not clipped: one token has more than 5.
    - mean of means: each response was divided by its own length. That is GRPO's mean; CISPO divides once, by all
      tokens.
    - sum over tokens: you divided by the number of responses. CISPO divides by the number of tokens in the batch.
    - padding counted: padding was counted in the divisor. Σ|y| is the number of true positions of the mask.

    The library's is cispo_loss.
    """,
    observe=_observe_loss(_OLD),
    solution=_library(cispo_loss),
    mistakes={
        "sign": lambda *case: -_cispo(*case),
        "weight attached": partial(_cispo, attached=True),
        "tokens dropped": partial(_cispo, drops=True),
        "GRPO's range": partial(_cispo, bounds=(0.8, 1.2)),
        "no ceiling": partial(_cispo, bounds=(0.0, torch.inf)),
        "mean of means": partial(_cispo, over="responses"),
        "sum over tokens": partial(_cispo, over="sums"),
        "padding counted": partial(_cispo, over="counted padding"),
    },
)


# Padding: one response of two tokens, one of one. In the first, each ratio is below 5 and the product above; in the
# second, one ratio is above 5 and the product below.
_W_RATIO = torch.tensor([[2.0, 1.5, 2.5, 1.0], [0.1, 8.0, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0]])
_W_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def _observe_weights(answer: Answer) -> Observations:
    def pair(padding: float) -> list[Tensor]:
        old = torch.full_like(_W_RATIO, -3.0).masked_fill(~_W_MASK, padding)
        rollout = torch.where(_W_MASK, old - _W_RATIO.log(), 2.0)
        return [torch.as_tensor(weight) for weight in answer(old, rollout, _W_MASK, 5.0)]

    product, mean = pair(1.0)
    return {
        "the truncated product": product,
        "the geometric mean": mean,
        "both where padding holds NaN": torch.stack(pair(torch.nan)),
    }


def _weights(
    logp_old: Tensor,
    logp_rollout: Tensor,
    mask: Tensor,
    cap: float,
    *,
    padded: bool = False,
    token_cap: float = torch.inf,
    arithmetic: bool = False,
    places: bool = False,
) -> tuple[Tensor, Tensor]:
    difference = logp_old - logp_rollout
    log_ratio = difference if padded else torch.where(mask, difference, 0.0)
    lengths = torch.full((len(mask),), mask.shape[1]) if places else mask.sum(1)
    product = log_ratio.exp().clamp(max=token_cap).prod(1)
    mean = (log_ratio.exp() * mask).sum(1) / lengths if arithmetic else (log_ratio.sum(1) / lengths).exp()
    return product.clamp(max=cap), mean


EX7 = exercise(
    """05.7 Two weights of a whole response (difficulty 2, importance 3, 10 minutes)

    1. The logarithm of a product is a sum. Both weights start from the sum of the log-ratios of a response.
    2. The geometric mean is the |y|-th root of the product: the exponential of the *mean* log-ratio.
    3. `torch.where(mask, logp_old - logp_rollout, 0.0)` takes padding out of the sum; the length is `mask.sum(1)`.

    - upside down: the ratios are upside down. The trainer's probability is the numerator: what the engine drew too
      rarely counts more.
    - cap on each token: each token's ratio was truncated before the product. The cap is for the product, which can
      pass 5 although no token does.
    - no cap: the product has no cap. Over a long response it can be huge.
    - arithmetic mean: the second is the arithmetic mean of the ratios. The geometric mean is the exponential of the
      mean log-ratio; it is smaller, and a single large ratio moves it less.
    - padding in the product: padding was added up as well. Anything at all may stand outside the mask.
    - padding in the length: the sum is right, but it is divided by the width of the table. The root is the |y|-th.
    - logarithms: these are log-weights. The weight is their exponential.
    - swapped: the two are in the other order: first the product, then the geometric mean.

    The product is the weight of equation (1). The geometric mean has little variance and leaves most of the drift.
    """,
    observe=_observe_weights,
    solution=_weights,
    mistakes={
        "upside down": lambda old, rollout, mask, cap: _weights(rollout, old, mask, cap),
        "cap on each token": partial(_weights, token_cap=5.0),
        "no cap": lambda old, rollout, mask, cap: _weights(old, rollout, mask, torch.inf),
        "arithmetic mean": partial(_weights, arithmetic=True),
        "padding in the product": partial(_weights, padded=True),
        "padding in the length": partial(_weights, places=True),
        "logarithms": lambda *case: [weight.log() for weight in _weights(*case)],
        "swapped": lambda *case: _weights(*case)[::-1],
    },
)


_PURPOSES = (
    "all responses are equally long",
    "nobody knows which responses will be longer",
    "turns the drift around",
    "hardly any drift, but too much noise",
)
_WEIGHTS = ("none", "token truncated", "token masked", "sequence")


def _observe_correction(answer: Callable[[], Mapping[str, str]]) -> Observations:
    chosen = answer()
    given = {purpose: str(chosen[purpose]).strip().lower() for purpose in _PURPOSES}
    if wrong := [weight for weight in given.values() if weight not in _WEIGHTS]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_WEIGHTS)}")
    return {f"the choice for “{purpose}”": weight for purpose, weight in given.items()}


def _correction(*weights: str) -> Callable[[], dict[str, str]]:
    return lambda: dict(zip(_PURPOSES, weights, strict=True))


EX8 = exercise(
    """05.8 Choose the correction (difficulty 2, importance 4, 8 minutes)

    1. Where the drift's total is 0 there is nothing to correct. What does a weight still cost?
    2. In the figure, compare each correction's lowest score over the three cases.
    3. A product over a response is exact. How large does it get over 96 tokens?

    - the weight everywhere: the first is wrong. With equal lengths there is no drift to remove, and a weight only adds
      variance: without it the runs end higher.
    - mask for cap: the second is wrong. A two-sided mask sounds safer than a cap, but ratios of rare tokens vary most:
      it drops them most often, and what it keeps is sharper than π. Its runs fail in two of the three cases.
    - the exact one for all: the second is wrong. A sequence's weight leaves hardly any drift, but over 96 tokens its
      variance stops learning.
    - no weight for all: the second is wrong. Without a weight the runs fail wherever lengths depend on the reward.
    - cap turns the drift around: the third is wrong. The cap at 5 binds rarely and leaves a small drift; the mask
      drops every ratio outside [0.5, 5].
    - mask for noise: the last is wrong. The mask's variance is below the cap's. What is large is the product of 96
      ratios.

    A correction has two costs: the drift that it leaves, and the variance that it brings.
    """,
    observe=_observe_correction,
    solution=_correction("none", "token truncated", "token masked", "sequence"),
    mistakes={
        "the weight everywhere": _correction("token truncated", "token truncated", "token masked", "sequence"),
        "mask for cap": _correction("none", "token masked", "token masked", "sequence"),
        "the exact one for all": _correction("none", "sequence", "token masked", "sequence"),
        "no weight for all": _correction("none", "none", "token masked", "sequence"),
        "cap turns the drift around": _correction("none", "token truncated", "token truncated", "sequence"),
        "mask for noise": _correction("none", "token truncated", "token masked", "token masked"),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7, EX8)
