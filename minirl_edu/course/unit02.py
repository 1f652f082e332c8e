"""Exercises of unit 02: the token objective, what it drops, and how fast that grows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations

_LOGP = torch.tensor([[-0.2, -1.0, -0.5], [-0.7, -0.1, -2.0], [-1.2, -0.3, -0.9]])
_LOGP_ROLLOUT = torch.tensor([[-0.5, -0.8, -0.6], [-0.4, -0.3, -1.0], [-1.0, -2.0, -0.1]])
_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
_REWARDS = torch.tensor([1.0, 0.3, 0.6])


def _log_ratio(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logp - logp_rollout, 0.0)


def _delta(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    """δ_t = ratio − 1; 0 where masked."""
    return _log_ratio(logp, logp_rollout, mask).expm1()


# ------------------------------------------------------------------------------------------ 02.1 what is dropped


def _observe_dropped(answer: Callable[..., Tensor]) -> Observations:
    return {"what is dropped in responses of 3, 2 and 1 tokens": answer(_LOGP, _LOGP_ROLLOUT, _MASK)}


def _dropped(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    delta = _delta(logp, logp_rollout, mask)
    return (1 + delta).prod(1) - 1 - delta.sum(1)


def _zeros_in_the_product(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    ratio = (logp - logp_rollout).exp() * mask
    return ratio.prod(1) - 1 - _delta(logp, logp_rollout, mask).sum(1)


DROPPED = Exercise(
    id="02.1",
    title="What adding up percentages drops",
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "The true growth is a product over the tokens, Π(1 + δ); the approximation is 1 + Σ δ.",
        "A response of one token drops nothing: product and sum are the same. Test your answer on that.",
        "δ is the ratio minus one, and 0 after the end of the response.",
    ),
    observe=_observe_dropped,
    solution=_dropped,
    mistakes=(
        Mistake(
            "the 1 forgotten",
            lambda a, b, mask: (1 + _delta(a, b, mask)).prod(1) - _delta(a, b, mask).sum(1),
            "you compare a product, which is near 1, with a sum of changes, which is near 0. The first-order "
            "approximation is 1 + Σ δ.",
        ),
        Mistake(
            "sum of the ratios",
            lambda a, b, mask: (1 + _delta(a, b, mask)).prod(1) - torch.where(mask, (a - b).exp(), 0.0).sum(1),
            "you subtracted the sum of the ratios. Each ratio has a 1 in it: on-policy that sum is the length, not 1. "
            "The objectives differ by these ones; they drop out of every gradient.",
        ),
        Mistake(
            "delta is the log-ratio",
            lambda a, b, mask: _log_ratio(a, b, mask).sum(1).exp() - 1 - _log_ratio(a, b, mask).sum(1),
            "you took the log-ratio for δ. They agree to first order only, and what is asked is of second order. A "
            "single token would not be exact.",
        ),
        Mistake(
            "its absolute value",
            lambda a, b, mask: _dropped(a, b, mask).abs(),
            "the sign is gone. The library's `first_order_gap` takes the size, because it averages over responses; "
            "here the term itself was asked.",
        ),
        Mistake(
            "padding counted",
            lambda a, b, mask: _dropped(a, b, torch.ones_like(mask)),
            "tokens after the end are factors and summands of yours. Nobody drew them.",
        ),
        Mistake(
            "zeros in the product",
            _zeros_in_the_product,
            "a masked ratio was set to 0 and multiplied: every response shorter than the batch has weight 0. A token "
            "that is not there has ratio 1.",
        ),
    ),
    praise="Zero for a single token, and of second order for more.",
)

# -------------------------------------------------------------------------------------------- 02.2 the leading term

_SMALL = torch.tensor([[0.1, -0.2, 0.3, 0.05], [0.4, 0.4, -0.1, 0.0], [0.2, 0.0, 0.0, 0.0]])


def _observe_pairs(answer: Callable[[Tensor], Tensor]) -> Observations:
    return {"the sum over pairs": answer(_SMALL)}


def _pairs(delta: Tensor) -> Tensor:
    return (delta.sum(1) ** 2 - (delta**2).sum(1)) / 2


PAIRS = Exercise(
    id="02.2",
    title="The leading term, without a double loop",
    difficulty=2,
    importance=3,
    minutes=8,
    hints=(
        "Multiply out (δ₁ + δ₂ + δ₃)². Which terms do you want, and how often does each occur?",
        "The square of the sum has every pair twice and every δ² once.",
    ),
    observe=_observe_pairs,
    solution=_pairs,
    mistakes=(
        Mistake(
            "pairs twice",
            lambda delta: delta.sum(1) ** 2 - (delta**2).sum(1),
            "each pair is counted twice, as (i, j) and as (j, i). The sum is over i < j.",
        ),
        Mistake(
            "a token with itself",
            lambda delta: delta.sum(1) ** 2 / 2,
            "the squares are still in it. A token has one ratio and occurs once in the product: no pair (i, i). With "
            "one token nothing may be left.",
        ),
        Mistake(
            "neighbours only",
            lambda delta: (delta[:, 1:] * delta[:, :-1]).sum(1),
            "only neighbours are paired. Every token meets every other: T(T − 1)/2 pairs, not T − 1.",
        ),
        Mistake(
            "the whole remainder",
            lambda delta: (1 + delta).prod(1) - 1 - delta.sum(1),
            "this is everything that is dropped, triples and more included. Asked was its leading part.",
        ),
        Mistake(
            "squares only",
            lambda delta: (delta**2).sum(1) / 2,
            "you summed squares of single tokens. What is dropped are products of two different ones.",
        ),
    ),
    praise="Of T(T − 1)/2 pairs, most cancel. How well, is section 5.",
)

# ------------------------------------------------------------------------------------------ 02.3 the token objective


def _observe_objective(answer: Callable[..., Tensor]) -> Observations:
    return {
        "the estimate of J_token": answer(_LOGP, _LOGP_ROLLOUT, _REWARDS, _MASK),
        "the estimate where both policies agree": answer(_LOGP, _LOGP, _REWARDS, _MASK),
    }


def _objective(logp: Tensor, logp_rollout: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    return (torch.where(mask, (logp - logp_rollout).exp(), 0.0).sum(1) * rewards).mean()


OBJECTIVE = Exercise(
    id="02.3",
    title="The token objective",
    difficulty=2,
    importance=5,
    minutes=8,
    hints=(
        "A sum over the tokens of a response, times its reward; then a mean over the responses.",
        "The ratio of a token after the end is not 1 and not anything: it is not there.",
    ),
    observe=_observe_objective,
    solution=_objective,
    mistakes=(
        Mistake(
            "product over tokens",
            lambda a, b, rewards, mask: (_log_ratio(a, b, mask).sum(1).exp() * rewards).mean(),
            "you multiplied the ratios: that is the sequence objective (1). In (3) each token has its own ratio, and "
            "they are added.",
        ),
        Mistake(
            "divided by length",
            lambda a, b, rewards, mask: (torch.where(mask, (a - b).exp(), 0.0).sum(1) / mask.sum(1) * rewards).mean(),
            "you took the mean over the tokens of a response. It looks more natural (on-policy it gives E[R]), but "
            "then a token of a long response counts less, and the gradient is no longer that of J_seq.",
        ),
        Mistake(
            "mean over the batch's tokens",
            lambda a, b, rewards, mask: (torch.where(mask, (a - b).exp(), 0.0).sum(1) * rewards).sum() / mask.sum(),
            "you divided by the number of tokens in the batch. The expectation is over responses.",
        ),
        Mistake(
            "padding counted",
            lambda a, b, rewards, mask: ((a - b).exp().sum(1) * rewards).mean(),
            "tokens after the end are summed as well.",
        ),
        Mistake(
            "masked ratios are one",
            lambda a, b, rewards, mask: (_log_ratio(a, b, mask).exp().sum(1) * rewards).mean(),
            "masked log-ratios are 0 and their exponential is 1: every padded place adds a reward. In a product a 1 "
            "does no harm, in a sum it does.",
        ),
        Mistake(
            "upside down",
            lambda a, b, rewards, mask: _objective(b, a, rewards, mask),
            "the rollout policy belongs in the denominator: what it draws too often counts less.",
        ),
    ),
    praise="Where the policies agree it counts tokens, E[|y|·R]. J_seq would be E[R]. Values are not the point.",
)

# -------------------------------------------------------------------------- 02.4 a loss with the gradient of J_token


def _observe_loss(answer: Callable[..., Tensor]) -> Observations:
    logp = _LOGP.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(answer(logp, _LOGP_ROLLOUT, _REWARDS, _MASK), logp)
    return {"the gradient of the loss with respect to logp": gradient}


def _loss(coefficient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """−(1/B) Σ_b Σ_t coefficient · R · log π over the mask."""

    def answer(logp: Tensor, logp_rollout: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        factor = coefficient(logp, logp_rollout, mask) * rewards[:, None]
        return -torch.where(mask, factor * logp, 0.0).sum() / len(logp)

    return answer


def _ratio(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return _log_ratio(logp, logp_rollout, mask).exp()


LOSS = Exercise(
    id="02.4",
    title="A loss with the gradient of J_token",
    difficulty=3,
    importance=5,
    minutes=15,
    hints=(
        "Which gradient should one token's log-probability get? (4) says: its ratio times the reward.",
        "Two ways: the ratio itself, differentiated; or the ratio as a constant in front of log π.",
        "A loss is minimised, so a minus; then a sum over tokens and a mean over responses.",
    ),
    observe=_observe_loss,
    solution=_loss(lambda a, b, mask: _ratio(a, b, mask).detach()),
    mistakes=(
        Mistake(
            "ratio not detached",
            _loss(_ratio),
            "both the ratio and the log carry gradient. By the product rule each token gets ρ·(1 + log π): the log "
            "of the probability works as an extra, negative reward.",
        ),
        Mistake(
            "weight of the sequence",
            _loss(lambda a, b, mask: _log_ratio(a, b, mask).sum(1, keepdim=True).exp().detach()),
            "every token has the weight of its whole response. That is (2), the gradient of J_seq, with all of its "
            "noise. In (4) a token is weighted by its own ratio.",
        ),
        Mistake(
            "no weight",
            _loss(lambda a, b, mask: torch.ones_like(a)),
            "the ratio is missing. Plain REINFORCE is right only where π_θ and μ_old are the same function.",
        ),
        Mistake(
            "the sign",
            lambda *inputs: -_loss(lambda a, b, mask: _ratio(a, b, mask).detach())(*inputs),
            "minimising this lowers the reward.",
        ),
        Mistake(
            "everything detached",
            lambda logp, logp_rollout, rewards, mask: (
                -(torch.where(mask, (logp - logp_rollout).exp().detach(), 0.0).sum(1) * rewards).mean() + 0 * logp.sum()
            ),
            "no gradient at all: the ratio is a constant and nothing else depends on log π.",
        ),
        Mistake(
            "divided by length",
            _loss(lambda a, b, mask: _ratio(a, b, mask).detach() / mask.sum(1, keepdim=True)),
            "each response was divided by its length. (4) is a sum over tokens.",
        ),
        Mistake(
            "log-ratio as weight",
            _loss(lambda a, b, mask: _log_ratio(a, b, mask).detach()),
            "the weight is the log of the ratio. On-policy it is 0 and nothing would be learned; a weight is 1 there.",
        ),
    ),
    praise="∇ρ = ρ·∇log π: both ways of writing it are one gradient.",
)

# ------------------------------------------------------------------------------------------------- 02.5 the order

_STEPS = torch.tensor([0.001, 0.002, 0.005, 0.01, 0.05], dtype=torch.float64)
_ERRORS = 3 * _STEPS**2 * torch.tensor([1.0, 1.1, 0.9, 1.05, 0.97], dtype=torch.float64)


def _observe_slope(answer: Callable[..., Any]) -> Observations:
    return {
        "the slope": torch.as_tensor(answer(_STEPS, _ERRORS)).double(),
        "the slope of errors 7·step³": torch.as_tensor(answer(_STEPS, 7 * _STEPS**3)).double(),
    }


def _slope(steps: Tensor, errors: Tensor) -> Tensor:
    x, y = steps.log(), errors.log()
    x = x - x.mean()
    return (x * y).sum() / x.square().sum()


def _linear(steps: Tensor, errors: Tensor) -> Tensor:
    x = steps - steps.mean()
    return (x * errors).sum() / x.square().sum()


def _half_log(steps: Tensor, errors: Tensor) -> Tensor:
    x = steps - steps.mean()
    return (x * errors.log()).sum() / x.square().sum()


ORDER = Exercise(
    id="02.5",
    title="Measure an order",
    difficulty=2,
    importance=4,
    minutes=10,
    hints=(
        "If error = c·step^k, what is log error as a function of log step?",
        "k is the slope of a straight line: least squares on the two logs.",
        "Slope = Σ (x − x̄)(y − ȳ) / Σ (x − x̄)², or the first number that `np.polyfit(x, y, 1)` returns.",
    ),
    observe=_observe_slope,
    solution=_slope,
    mistakes=(
        Mistake(
            "no logs",
            _linear,
            "this is the slope of the errors themselves. It depends on units and says nothing about a power.",
        ),
        Mistake(
            "one log",
            _half_log,
            "you took the log of the errors only. That fits an exponential, error = c·e^(k·step).",
        ),
        Mistake(
            "axes exchanged",
            lambda steps, errors: _slope(errors, steps),
            "x and y are exchanged: you got about 1/k.",
        ),
        Mistake(
            "through the origin",
            lambda steps, errors: (steps.log() * errors.log()).sum() / steps.log().square().sum(),
            "your line is forced through the origin, so the constant in front of the power bends the slope. Centre "
            "both logs, or fit an intercept.",
        ),
        Mistake(
            "the intercept",
            lambda steps, errors: errors.log().mean() - _slope(steps, errors) * steps.log().mean(),
            "this is the intercept, the log of the constant in front. The exponent is the slope.",
        ),
        Mistake(
            "two points",
            lambda steps, errors: (errors[-1] / errors[0]).log() / (steps[-1] / steps[0]).log(),
            "right for a perfect power, but it uses two of the points: whatever is odd about those two is in the "
            "answer. Fit all of them.",
        ),
    ),
    rtol=1e-5,
    atol=1e-7,
    praise="An exponent with its range of steps is a result. An exponent alone is a hope.",
)

# ------------------------------------------------------------------------------------- 02.6 the size, by length


def _observe_size(answer: Callable[[float, int], Any]) -> Observations:
    cases = ((0.1, 1), (0.1, 2), (0.04, 9))
    return {
        f"the mean square for χ² = {chi} and {length} tokens": torch.as_tensor(answer(chi, length)).double()
        for chi, length in cases
    }


SIZE = Exercise(
    id="02.6",
    title="How large is what is dropped?",
    difficulty=4,
    importance=3,
    minutes=20,
    hints=(
        "Multiply out Π(1 + δ_t). The mean of a product of *different* δ is 0. Which terms survive in the mean of the "
        "square?",
        "Every subset S of tokens contributes E[Π_{t∈S} δ_t²] = (χ²)^|S|, and no cross terms. All subsets together: "
        "E[w²] = (1 + χ²)^T.",
        "What is dropped are the subsets of two and more. Take away the empty one and the T single ones.",
    ),
    observe=_observe_size,
    solution=lambda chi_square, length: (1 + chi_square) ** length - 1 - length * chi_square,
    mistakes=(
        Mistake(
            "variance of the weight",
            lambda chi_square, length: (1 + chi_square) ** length - 1,
            "this is the variance of the whole weight. The part of first order, T·χ², is kept by the token objective "
            "and is not dropped. With one token nothing is.",
        ),
        Mistake(
            "second moment of the weight",
            lambda chi_square, length: (1 + chi_square) ** length,
            "this is E[w²] itself. Take away what the first-order approximation keeps: the 1 and the single tokens.",
        ),
        Mistake(
            "root taken",
            lambda chi_square, length: math.sqrt(max((1 + chi_square) ** length - 1 - length * chi_square, 0.0)),
            "this is the root of it. Asked was the mean square.",
        ),
        Mistake(
            "pairs only",
            lambda chi_square, length: length * (length - 1) / 2 * chi_square**2,
            "these are the pairs, the leading part. Triples and more are dropped as well.",
        ),
        Mistake(
            "(1 + Tχ²) squared",
            lambda chi_square, length: (1 + chi_square) ** length - (1 + length * chi_square) ** 2,
            "you squared the mean square of the first-order part. E[(1 + Σδ)²] already is 1 + T·χ², because E[δ] = 0.",
        ),
    ),
    praise="For small χ² its root is about T·χ²/√2: second order in δ, first order in the length.",
)

# ------------------------------------------------------------------------------------------------- 02.7 two factors

_LOGP_OLD = torch.tensor([[-0.4, -0.9, -0.5], [-0.5, -0.2, -1.4], [-1.1, -0.9, -0.3]])


def _observe_factors(answer: Callable[..., Any]) -> Observations:
    discrepancy, staleness = answer(_LOGP, _LOGP_OLD, _LOGP_ROLLOUT)
    return {"the training–inference discrepancy": discrepancy, "the policy staleness": staleness}


FACTORS = Exercise(
    id="02.7",
    title="Two factors of one ratio",
    difficulty=1,
    importance=5,
    minutes=5,
    hints=(
        "Discrepancy: two engines, the same weights. Staleness: one engine, two sets of weights.",
        "Which policy do both factors have in common?",
    ),
    observe=_observe_factors,
    solution=lambda logp, logp_old, logp_rollout: ((logp_old - logp_rollout).exp(), (logp - logp_old).exp()),
    mistakes=(
        Mistake(
            "exchanged",
            lambda logp, logp_old, logp_rollout: ((logp - logp_old).exp(), (logp_old - logp_rollout).exp()),
            "the two are exchanged. What differs between π_old and μ_old is the engine; between π_θ and π_old it is "
            "the weights.",
        ),
        Mistake(
            "staleness against the rollout",
            lambda logp, logp_old, logp_rollout: ((logp_old - logp_rollout).exp(), (logp - logp_rollout).exp()),
            "your staleness is measured from μ_old, so the discrepancy is in it a second time. Clipping with that "
            "ratio would drop tokens for which no update is to blame.",
        ),
        Mistake(
            "discrepancy of the target",
            lambda logp, logp_old, logp_rollout: ((logp - logp_rollout).exp(), (logp - logp_old).exp()),
            "π_θ/μ_old is the product of both factors. The discrepancy compares the engines at the *same* weights, "
            "θ_old.",
        ),
        Mistake(
            "logs",
            lambda logp, logp_old, logp_rollout: (logp_old - logp_rollout, logp - logp_old),
            "these are log-ratios: they add. The factors are their exponentials.",
        ),
        Mistake(
            "upside down",
            lambda logp, logp_old, logp_rollout: ((logp_rollout - logp_old).exp(), (logp_old - logp).exp()),
            "numerator and denominator are exchanged: the product of yours is μ_old/π_θ.",
        ),
    ),
    praise="Their product is the weight. The rest of the course keeps one or the other near 1.",
)

EXERCISES = (DROPPED, PAIRS, OBJECTIVE, LOSS, ORDER, SIZE, FACTORS)
