"""Exercises of unit 02: the token objective, what it drops, and how fast that grows."""

import math

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import LOGP, LOGP_ROLLOUT, MASK, gradient_of_loss, log_ratio, masked_sum, policy_loss

_REWARDS = torch.tensor([1.0, 0.3, 0.6])


def _delta(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    """δ_t = ratio − 1; 0 where masked."""
    return log_ratio(logp, logp_rollout, mask).expm1()


def _ratio_sum(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    """The sum of a response's ratios, [B]."""
    return masked_sum((logp - logp_rollout).exp(), mask)


def _dropped(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    delta = _delta(logp, logp_rollout, mask)
    return (1 + delta).prod(1) - 1 - delta.sum(1)


EX1 = exercise(
    """02.1 What adding up percentages drops (difficulty 2, importance 5, 10 minutes)

    1. The true growth is a product over the tokens, Π(1 + δ); the approximation is 1 + Σ δ.
    2. A response of one token drops nothing: product and sum are the same. Test your answer on that.
    3. δ is the ratio minus one, and 0 after the end of the response.

    - the 1 forgotten: you compare a product, which is near 1, with a sum of changes, which is near 0. The first-order
      approximation is 1 + Σ δ.
    - sum of the ratios: you subtracted the sum of the ratios. Each ratio has a 1 in it: on-policy that sum is the
      length, not 1. The objectives differ by these ones; they drop out of every gradient.
    - delta is the log-ratio: you took the log-ratio for δ. They agree to first order only, and what is asked is of
      second order. A single token would not be exact.
    - its absolute value: the sign is gone. The library's `first_order_gap` takes the size, because it averages over
      responses; here the term itself was asked.
    - padding counted: tokens after the end are factors and summands of yours. Nobody drew them.
    - zeros in the product: a masked ratio was set to 0 and multiplied: every response shorter than the batch has weight
      0. A token that is not there has ratio 1.

    Zero for a single token, and of second order for more.
    """,
    observe=lambda answer: {"what is dropped in responses of 3, 2 and 1 tokens": answer(LOGP, LOGP_ROLLOUT, MASK)},
    solution=_dropped,
    mistakes={
        "the 1 forgotten": lambda a, b, mask: _dropped(a, b, mask) + 1,
        "sum of the ratios": lambda a, b, mask: (1 + _delta(a, b, mask)).prod(1) - _ratio_sum(a, b, mask),
        "delta is the log-ratio": lambda a, b, mask: (
            log_ratio(a, b, mask).sum(1).exp() - 1 - log_ratio(a, b, mask).sum(1)
        ),
        "its absolute value": lambda a, b, mask: _dropped(a, b, mask).abs(),
        "padding counted": lambda a, b, mask: _dropped(a, b, torch.ones_like(mask)),
        "zeros in the product": lambda a, b, mask: ((a - b).exp() * mask).prod(1) - 1 - _delta(a, b, mask).sum(1),
    },
)


_SMALL = torch.tensor([[0.1, -0.2, 0.3, 0.05], [0.4, 0.4, -0.1, 0.0], [0.2, 0.0, 0.0, 0.0]])

EX2 = exercise(
    """02.2 The leading term, without a double loop (difficulty 2, importance 3, 8 minutes)

    1. Multiply out (δ₁ + δ₂ + δ₃)². Which terms do you want, and how often does each occur?
    2. The square of the sum has every pair twice and every δ² once.

    - pairs twice: each pair is counted twice, as (i, j) and as (j, i). The sum is over i < j.
    - a token with itself: the squares are still in it. A token has one ratio and occurs once in the product: no pair
      (i, i). With one token nothing may be left.
    - neighbours only: only neighbours are paired. Every token meets every other: T(T − 1)/2 pairs, not T − 1.
    - the whole remainder: this is everything that is dropped, triples and more included. Asked was its leading part.
    - squares only: you summed squares of single tokens. What is dropped are products of two different ones.

    Of T(T − 1)/2 pairs, most cancel. How well, is section 5.
    """,
    observe=lambda answer: {"the sum over pairs": answer(_SMALL)},
    solution=lambda delta: (delta.sum(1) ** 2 - (delta**2).sum(1)) / 2,
    mistakes={
        "pairs twice": lambda delta: delta.sum(1) ** 2 - (delta**2).sum(1),
        "a token with itself": lambda delta: delta.sum(1) ** 2 / 2,
        "neighbours only": lambda delta: (delta[:, 1:] * delta[:, :-1]).sum(1),
        "the whole remainder": lambda delta: (1 + delta).prod(1) - 1 - delta.sum(1),
        "squares only": lambda delta: (delta**2).sum(1) / 2,
    },
)


EX3 = exercise(
    """02.3 The token objective (difficulty 2, importance 5, 8 minutes)

    1. A sum over the tokens of a response, times its reward; then a mean over the responses.
    2. The ratio of a token after the end is not 1 and not anything: it is not there.

    - product over tokens: you multiplied the ratios: that is the sequence objective (1). In (3) each token has its own
      ratio, and they are added.
    - divided by length: you took the mean over the tokens of a response. It looks more natural (on-policy it gives
      E[R]), but then a token of a long response counts less, and the gradient is no longer that of J_seq.
    - mean over the batch's tokens: you divided by the number of tokens in the batch. The expectation is over responses.
    - padding counted: tokens after the end are summed as well.
    - masked ratios are one: masked log-ratios are 0 and their exponential is 1: every padded place adds a reward. In a
      product a 1 does no harm, in a sum it does.
    - upside down: the rollout policy belongs in the denominator: what it draws too often counts less.

    Where the policies agree it counts tokens, E[|y|·R]. J_seq would be E[R]. Values are not the point.
    """,
    observe=lambda answer: {
        "the estimate of J_token": answer(LOGP, LOGP_ROLLOUT, _REWARDS, MASK),
        "the estimate where both policies agree": answer(LOGP, LOGP, _REWARDS, MASK),
    },
    solution=lambda a, b, rewards, mask: (_ratio_sum(a, b, mask) * rewards).mean(),
    mistakes={
        "product over tokens": lambda a, b, rewards, mask: (log_ratio(a, b, mask).sum(1).exp() * rewards).mean(),
        "divided by length": lambda a, b, rewards, mask: (_ratio_sum(a, b, mask) / mask.sum(1) * rewards).mean(),
        "mean over the batch's tokens": lambda a, b, rewards, mask: (
            (_ratio_sum(a, b, mask) * rewards).sum() / mask.sum()
        ),
        "padding counted": lambda a, b, rewards, mask: ((a - b).exp().sum(1) * rewards).mean(),
        "masked ratios are one": lambda a, b, rewards, mask: (log_ratio(a, b, mask).exp().sum(1) * rewards).mean(),
        "upside down": lambda a, b, rewards, mask: (_ratio_sum(b, a, mask) * rewards).mean(),
    },
)


_loss = policy_loss(lambda a, b, mask: log_ratio(a, b, mask).exp().detach())

EX4 = exercise(
    """02.4 A loss with the gradient of J_token (difficulty 3, importance 5, 15 minutes)

    1. Which gradient should one token's log-probability get? (4) says: its ratio times the reward.
    2. Two ways: the ratio itself, differentiated; or the ratio as a constant in front of log π.
    3. A loss is minimised, so a minus; then a sum over tokens and a mean over responses.

    - ratio not detached: both the ratio and the log carry gradient. By the product rule each token gets ρ·(1 + log π):
      the log of the probability works as an extra, negative reward.
    - weight of the sequence: every token has the weight of its whole response. That is (2), the gradient of J_seq, with
      all of its noise. In (4) a token is weighted by its own ratio.
    - no weight: the ratio is missing. Plain REINFORCE is right only where π_θ and μ_old are the same function.
    - the sign: minimising this lowers the reward.
    - everything detached: no gradient at all: the ratio is a constant and nothing else depends on log π.
    - divided by length: each response was divided by its length. (4) is a sum over tokens.
    - log-ratio as weight: the weight is the log of the ratio. On-policy it is 0 and nothing would be learned; a weight
      is 1 there.

    ∇ρ = ρ·∇log π: both ways of writing it are one gradient.
    """,
    observe=lambda answer: {"the gradient of the loss with respect to logp": gradient_of_loss(answer, _REWARDS)},
    solution=_loss,
    mistakes={
        "ratio not detached": policy_loss(lambda a, b, mask: log_ratio(a, b, mask).exp()),
        "weight of the sequence": policy_loss(lambda a, b, mask: log_ratio(a, b, mask).sum(1, True).exp().detach()),
        "no weight": policy_loss(lambda a, b, mask: torch.ones_like(a)),
        "the sign": lambda *case: -_loss(*case),
        "everything detached": lambda a, b, rewards, mask: (
            -(_ratio_sum(a.detach(), b, mask) * rewards).mean() + 0 * a.sum()
        ),
        "divided by length": policy_loss(
            lambda a, b, mask: log_ratio(a, b, mask).exp().detach() / mask.sum(1, keepdim=True)
        ),
        "log-ratio as weight": policy_loss(lambda a, b, mask: log_ratio(a, b, mask).detach()),
    },
)


_STEPS = torch.tensor([0.001, 0.002, 0.005, 0.01, 0.05], dtype=torch.float64)
_ERRORS = 3 * _STEPS**2 * torch.tensor([1.0, 1.1, 0.9, 1.05, 0.97], dtype=torch.float64)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Of the straight line with the least squares."""
    x = x - x.mean()
    return (x * y).sum() / x.square().sum()


EX5 = exercise(
    """02.5 Measure an order (difficulty 2, importance 4, 10 minutes)

    1. If error = c·step^k, what is log error as a function of log step?
    2. k is the slope of a straight line: least squares on the two logs.
    3. Slope = Σ (x − x̄)(y − ȳ) / Σ (x − x̄)², or the first number that `np.polyfit(x, y, 1)` returns.

    - no logs: this is the slope of the errors themselves. It depends on units and says nothing about a power.
    - one log: you took the log of the errors only. That fits an exponential, error = c·e^(k·step).
    - axes exchanged: x and y are exchanged: you got about 1/k.
    - through the origin: your line is forced through the origin, so the constant in front of the power bends the slope.
      Centre both logs, or fit an intercept.
    - the intercept: this is the intercept, the log of the constant in front. The exponent is the slope.
    - two points: right for a perfect power, but it uses two of the points: whatever is odd about those two is in the
      answer. Fit all of them.

    An exponent with its range of steps is a result. An exponent alone is a hope.
    """,
    observe=lambda answer: {
        "the slope": torch.as_tensor(answer(_STEPS, _ERRORS)).double(),
        "the slope of errors 7·step³": torch.as_tensor(answer(_STEPS, 7 * _STEPS**3)).double(),
    },
    solution=lambda steps, errors: _slope(steps.log(), errors.log()),
    mistakes={
        "no logs": _slope,
        "one log": lambda steps, errors: _slope(steps, errors.log()),
        "axes exchanged": lambda steps, errors: _slope(errors.log(), steps.log()),
        "through the origin": lambda steps, errors: (steps.log() * errors.log()).sum() / steps.log().square().sum(),
        "the intercept": lambda steps, errors: (
            errors.log().mean() - _slope(steps.log(), errors.log()) * steps.log().mean()
        ),
        "two points": lambda steps, errors: (errors[-1] / errors[0]).log() / (steps[-1] / steps[0]).log(),
    },
    rtol=1e-5,
    atol=1e-7,
)


def _size(chi_square: float, length: int) -> float:
    return (1 + chi_square) ** length - 1 - length * chi_square


EX6 = exercise(
    """02.6 How large is what is dropped? (difficulty 4, importance 3, 20 minutes)

    1. Multiply out Π(1 + δ_t). The mean of a product of *different* δ is 0. Which terms survive in the mean of the
       square?
    2. Every subset S of tokens contributes E[Π_{t∈S} δ_t²] = (χ²)^|S|, and no cross terms. All subsets together: E[w²]
       = (1 + χ²)^T.
    3. What is dropped are the subsets of two and more. Take away the empty one and the T single ones.

    - variance of the weight: this is the variance of the whole weight. The part of first order, T·χ², is kept by the
      token objective and is not dropped. With one token nothing is.
    - second moment of the weight: this is E[w²] itself. Take away what the first-order approximation keeps: the 1 and
      the single tokens.
    - root taken: this is the root of it. Asked was the mean square.
    - pairs only: these are the pairs, the leading part. Triples and more are dropped as well.
    - (1 + Tχ²) squared: you squared the mean square of the first-order part. E[(1 + Σδ)²] already is 1 + T·χ², because
      E[δ] = 0.

    For small χ² its root is about T·χ²/√2: second order in δ, first order in the length.
    """,
    observe=lambda answer: {
        f"the mean square for χ² = {chi} and {length} tokens": torch.as_tensor(answer(chi, length)).double()
        for chi, length in ((0.1, 1), (0.1, 2), (0.04, 9))
    },
    solution=_size,
    mistakes={
        "variance of the weight": lambda chi_square, length: (1 + chi_square) ** length - 1,
        "second moment of the weight": lambda chi_square, length: (1 + chi_square) ** length,
        "root taken": lambda chi_square, length: math.sqrt(max(_size(chi_square, length), 0.0)),
        "pairs only": lambda chi_square, length: length * (length - 1) / 2 * chi_square**2,
        "(1 + Tχ²) squared": lambda chi_square, length: (1 + chi_square) ** length - (1 + length * chi_square) ** 2,
    },
)


_LOGP_OLD = torch.tensor([[-0.4, -0.9, -0.5], [-0.5, -0.2, -1.4], [-1.1, -0.9, -0.3]])


def _observe_factors(answer: Answer) -> Observations:
    discrepancy, staleness = answer(LOGP, _LOGP_OLD, LOGP_ROLLOUT)
    return {"the training–inference discrepancy": discrepancy, "the policy staleness": staleness}


EX7 = exercise(
    """02.7 Two factors of one ratio (difficulty 1, importance 5, 5 minutes)

    1. Discrepancy: two engines, the same weights. Staleness: one engine, two sets of weights.
    2. Which policy do both factors have in common?

    - exchanged: the two are exchanged. What differs between π_old and μ_old is the engine; between π_θ and π_old it is
      the weights.
    - staleness against the rollout: your staleness is measured from μ_old, so the discrepancy is in it a second time.
      Clipping with that ratio would drop tokens for which no update is to blame.
    - discrepancy of the target: π_θ/μ_old is the product of both factors. The discrepancy compares the engines at the
      *same* weights, θ_old.
    - logs: these are log-ratios: they add. The factors are their exponentials.
    - upside down: numerator and denominator are exchanged: the product of yours is μ_old/π_θ.

    Their product is the weight. The rest of the course keeps one or the other near 1.
    """,
    observe=_observe_factors,
    solution=lambda logp, old, rollout: ((old - rollout).exp(), (logp - old).exp()),
    mistakes={
        "exchanged": lambda logp, old, rollout: ((logp - old).exp(), (old - rollout).exp()),
        "staleness against the rollout": lambda logp, old, rollout: ((old - rollout).exp(), (logp - rollout).exp()),
        "discrepancy of the target": lambda logp, old, rollout: ((logp - rollout).exp(), (logp - old).exp()),
        "logs": lambda logp, old, rollout: (old - rollout, logp - old),
        "upside down": lambda logp, old, rollout: ((rollout - old).exp(), (old - logp).exp()),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7)
