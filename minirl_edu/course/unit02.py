"""Exercises of unit 02: the token objective, what it drops, and how fast that grows."""

import math

import torch
from torch import Tensor

from minirl_edu.course import exercise
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
      length, not 1. The objectives differ by these ones, which drop out of every gradient.
    - delta is the log-ratio: you took the log-ratio for δ. They agree to first order only, and the answer is of second
      order. A single token would not be exact.
    - its absolute value: the sign is gone. The library's `first_order_gap` takes the size, because it averages over
      responses. The exercise asks for the term itself.
    - padding counted: tokens after the end are factors and summands of yours. Nobody drew them.
    - zeros in the product: you set masked ratios to 0 and multiplied them. Then every response shorter than the batch
      has weight 0. A token that is not there has ratio 1.

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
    - the whole remainder: this is everything that is dropped, triples and more included. The exercise asks for its
      leading part.
    - squares only: you summed squares of single tokens. The dropped terms are products of two different tokens.

    Of T(T − 1)/2 pairs, most cancel. Section 5 says how well.
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
    2. A token after the end is not there, so it adds nothing to the sum: 0, not 1.

    - product over tokens: you multiplied the ratios. That is the sequence objective (1). In (3) each token has its own
      ratio, and the ratios are added.
    - divided by length: you took the mean over the tokens of a response. It looks more natural (on-policy it gives
      E[R]), but then a token of a long response counts less, and the gradient is no longer that of J_seq.
    - mean over the batch's tokens: you divided by the number of tokens in the batch. The expectation is over responses.
    - padding counted: tokens after the end are summed as well.
    - masked ratios are one: masked log-ratios are 0 and their exponential is 1, so every padded place adds a reward. A
      1 does no harm in a product, but it does in a sum.
    - upside down: the rollout policy belongs in the denominator: what it draws too often counts less.

    Where the policies agree, J_token counts tokens, E[|y|·R], and J_seq is E[R]. Only changes have to agree.
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
    3. A loss is minimised, so it has a minus; then a sum over tokens and a mean over responses.

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

    ∇ρ = ρ·∇log π: both ways of writing the loss have one gradient.
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
    - two points: your slope is right for a perfect power, but it uses two of the points. The noise of those two is in
      the answer. Fit all of them.

    Say the range of steps together with the exponent.
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
    - root taken: this is the root of the answer. The exercise asks for the mean square.
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


def _others(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    """The product of the ratios of all other tokens of a response; 0 outside the mask."""
    logs = log_ratio(logp, logp_rollout, mask)
    return torch.where(mask, (logs.sum(1, keepdim=True) - logs).exp(), 0.0)


def _missing(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, _others(logp, logp_rollout, mask) - 1, 0.0)


def _before(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    logs = log_ratio(logp, logp_rollout, mask)
    return torch.where(mask, (logs.cumsum(1) - logs).expm1(), 0.0)


def _after(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    logs = log_ratio(logp, logp_rollout, mask)
    return torch.where(mask, (logs.sum(1, keepdim=True) - logs.cumsum(1)).expm1(), 0.0)


EX7 = exercise(
    """02.7 What the weight of a token is missing (difficulty 3, importance 4, 10 minutes)

    1. The exact weight of a token is the product of all ratios of its response. (4) uses its own ratio alone.
    2. Their quotient is the product of the ratios of all *other* tokens. In logs that is a difference of two sums.
    3. `(logs.sum(1, keepdim=True) - logs).exp() - 1`, where `logs` is 0 outside the mask; and 0 outside the mask.

    - own ratio included: the token's own ratio is in your product. (4) has that ratio already; it misses the others.
    - first order: you summed the δ of the other tokens. That is the leading part of the answer.
    - only tokens before: you took the tokens before t. The tokens after t belong to the response as well: π_θ would
      continue differently.
    - only tokens after: you took the tokens after t. Those before t count as well: π_θ would come here more or less
      often.
    - one not subtracted: this is the factor itself. On-policy it is 1, and nothing is missing there.
    - padding counted: ratios of tokens after the end are in the product. Nobody drew those tokens.
    - not relative: this is the difference of the two weights. The exercise asks for the relative error: divide the
      difference by the token's own ratio.
    - upside down: you exchanged the two policies. The rollout policy is the denominator.

    A response of one token misses nothing. Long responses miss more, about χ·√T.
    """,
    observe=lambda answer: {"what is missing in responses of 3, 2 and 1 tokens": answer(LOGP, LOGP_ROLLOUT, MASK)},
    solution=_missing,
    mistakes={
        "own ratio included": lambda a, b, mask: torch.where(
            mask, log_ratio(a, b, mask).sum(1, keepdim=True).expm1(), 0.0
        ),
        "first order": lambda a, b, mask: torch.where(
            mask, _delta(a, b, mask).sum(1, keepdim=True) - _delta(a, b, mask), 0.0
        ),
        "only tokens before": _before,
        "only tokens after": _after,
        "one not subtracted": _others,
        "padding counted": lambda a, b, mask: torch.where(mask, _missing(a, b, torch.ones_like(mask)), 0.0),
        "not relative": lambda a, b, mask: log_ratio(a, b, mask).exp() * _missing(a, b, mask),
        "upside down": lambda a, b, mask: _missing(b, a, mask),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7)
