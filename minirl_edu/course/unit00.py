"""Exercises of the quickstart: the parts of one MiniRL update, by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations

CAP, LOW, HIGH = 5.0, 0.2, 0.27


# ------------------------------------------------------------------------------------------------ 00.1 advantages


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    return rewards.view(-1, group_size)


def _advantages(rewards: Tensor, group_size: int) -> Tensor:
    groups = _groups(rewards, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def _over_std(rewards: Tensor, group_size: int, correction: int = 0) -> Tensor:
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True, correction=correction) + 1e-6)).flatten()


def _leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    return _advantages(rewards, group_size) * group_size / (group_size - 1)


def _interleaved(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(group_size, -1)
    return (groups - groups.mean(0, keepdim=True)).flatten()


def _observe_advantages(answer: Callable[[Tensor, int], Tensor]) -> Observations:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    return {"the result for three groups of three": answer(rewards, 3), "the rewards": rewards}


_EX1 = Exercise(
    id="00.1",
    title="Advantages of several groups",
    difficulty=1,
    importance=5,
    minutes=5,
    hints=(
        "Each response is compared with the G responses to *its own* prompt, itself included.",
        "The first G rewards belong to the first prompt. Which `view` puts one group in each row?",
        "`groups = rewards.view(-1, group_size)`; subtract the mean over dimension 1 (`keepdim=True`); flatten.",
    ),
    observe=_observe_advantages,
    solution=_advantages,
    mistakes=(
        Mistake(
            "no baseline",
            lambda rewards, group_size: rewards,
            "these are the rewards themselves. Without a baseline every right answer is pushed up equally, also in a "
            "group where all were right and there is nothing to learn.",
        ),
        Mistake(
            "sign",
            lambda rewards, group_size: -_advantages(rewards, group_size),
            "the signs are the wrong way round: a right answer in a mixed group was better than its group, so its "
            "advantage is positive.",
        ),
        Mistake(
            "mean of the batch",
            lambda rewards, group_size: rewards - rewards.mean(),
            "the baseline is the mean of the whole batch. Then answers to easy problems look good and answers to hard "
            "ones bad, whatever was written: each group needs its own mean.",
        ),
        Mistake(
            "divided by the standard deviation",
            _over_std,
            "this divides by the group's standard deviation as well. That is GRPO's advantage; MiniRL's is the "
            "difference alone, so that a group of nearly all right answers does not count as much as a mixed one.",
        ),
        Mistake(
            "divided by torch.std",
            lambda rewards, group_size: _over_std(rewards, group_size, correction=1),
            "this divides by the group's standard deviation as well, and by `torch.std`'s, whose divisor is G − 1. "
            "GRPO's has the divisor G; MiniRL's advantage is the difference alone.",
        ),
        Mistake(
            "leave one out",
            _leave_one_out,
            "your baseline leaves the response itself out of its group's mean. That is another fine estimator (RLOO), "
            "larger by G/(G − 1); the paper's mean is over all G.",
        ),
        Mistake(
            "interleaved groups",
            _interleaved,
            "responses of different prompts were put in one group. The batch is grouped by prompt: the first G rewards "
            "belong to the first prompt.",
        ),
        Mistake(
            "not flat",
            lambda rewards, group_size: _advantages(rewards, group_size).view(-1, group_size),
            "the numbers are right, but they come as a table of groups; one advantage per response, in one row of "
            "length B, is what the loss takes.",
        ),
    ),
    praise="A group in which all were right, or all wrong, has advantages of zero: nothing is learned from it.",
)


# -------------------------------------------------------------------------------------------------- 00.2 gradient


def _weight(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    return (log_pi - log_mu).exp().clamp(max=CAP)


def _gradient(log_pi: Tensor, log_mu: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -_weight(log_pi, log_mu) * advantages[:, None] * mask / len(log_pi)


def _not_detached(log_pi: Tensor, log_mu: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    open_weight = (log_pi - log_mu).exp() < CAP
    return _gradient(log_pi, log_mu, advantages, mask) * (1 + log_pi * open_weight)


def _observe_gradient(answer: Callable[..., Tensor]) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.08, 0.9], [0.5, 0.8, 0.3, 0.2]])
    pi = torch.tensor([[0.5, 0.5, 0.80, 0.6], [0.4, 0.6, 0.9, 0.7]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    advantages = torch.tensor([0.75, -0.25])
    return {"the gradient": answer(pi.log(), mu.log(), advantages, mask)}


_EX2 = Exercise(
    id="00.2",
    title="The gradient of every token",
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "The loss is minus the objective, a mean over B responses and a sum over their tokens.",
        "The weight is a constant for the gradient. What is the derivative of `c * log_pi` with respect to `log_pi`?",
        "The weight is `(log_pi - log_mu).exp()`, and never more than 5.",
        "Minus weight × advantage of its response × mask, over the number of responses.",
    ),
    observe=_observe_gradient,
    solution=_gradient,
    mistakes=(
        Mistake(
            "sign",
            lambda *case: -_gradient(*case),
            "the sign is that of the objective. A loss is minimised, so its gradient is the other way round; as it "
            "stands, training would make right answers less probable.",
        ),
        Mistake(
            "ratio upside down",
            lambda log_pi, log_mu, advantages, mask: _gradient(log_mu, log_pi, advantages, mask),
            "the ratio is upside down, μ_old/π_θ. A token that the sampler drew too rarely must count *more*: the "
            "distribution we want goes on top.",
        ),
        Mistake(
            "no mean over responses",
            lambda *case: _gradient(*case) * len(case[0]),
            "the division by the number of responses is missing: the step would grow with the batch.",
        ),
        Mistake(
            "mean over tokens",
            lambda *case: _gradient(*case) * len(case[0]) / case[3].sum(),
            "this is a mean over all tokens of the batch. MiniRL sums over a response's tokens and averages over "
            "responses: dividing by tokens changes how much a response counts with the lengths of the others.",
        ),
        Mistake(
            "length normalised",
            lambda *case: _gradient(*case) / case[3].sum(1, keepdim=True),
            "each response's sum is divided by its length. That is the ablation “+ length norm”; the sequence "
            "objective has no such factor.",
        ),
        Mistake(
            "mask forgotten",
            lambda log_pi, log_mu, advantages, mask: _gradient(log_pi, log_mu, advantages, torch.ones_like(mask)),
            "places outside the mask have a gradient. There is no token there: whatever number the tensors hold must "
            "not be learned from.",
        ),
        Mistake(
            "no cap",
            lambda log_pi, log_mu, advantages, mask: (
                -(log_pi - log_mu).exp() * advantages[:, None] * mask / len(log_pi)
            ),
            "one weight is above 5 and counts in full. The cap is there so that one unlucky token cannot outweigh the "
            "whole batch.",
        ),
        Mistake(
            "weight in logs",
            lambda log_pi, log_mu, advantages, mask: -(log_pi - log_mu) * advantages[:, None] * mask / len(log_pi),
            "the weight is the log of the ratio. It is zero where the engines agree, so those tokens would not be "
            "learned at all; a ratio is 1 there.",
        ),
        Mistake(
            "with respect to the probability",
            lambda log_pi, log_mu, advantages, mask: _gradient(log_pi, log_mu, advantages, mask) / log_pi.exp(),
            "this is the derivative with respect to π_θ itself: there is a factor 1/π_θ too much. Asked is the one "
            "with respect to log π_θ.",
        ),
        Mistake(
            "weight not detached",
            _not_detached,
            "the gradient also flows through the importance weight. In (7) it stands inside sg[…]: it says how much a "
            "token counts and is not itself to be optimised. A token's push would otherwise depend on 1 + log π_θ and "
            "turn round for rare tokens.",
        ),
    ),
    praise="The whole of (7) in one line: how much, in which direction, for which tokens.",
)


# ------------------------------------------------------------------------------------------------------ 00.3 clip


def _kept(log_pi: Tensor, log_old: Tensor, log_mu: Tensor, advantages: Tensor) -> Tensor:
    return _keep(log_pi - log_old, advantages, LOW, HIGH)


def _keep(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    ratio, sign = log_ratio.exp(), advantages[:, None]
    return ~(((sign > 0) & (ratio > 1 + high)) | ((sign < 0) & (ratio < 1 - low)))


def _keep_both(log_pi: Tensor, log_old: Tensor, log_mu: Tensor, advantages: Tensor) -> Tensor:
    ratio = (log_pi - log_old).exp()
    return (ratio <= 1 + HIGH) & (ratio >= 1 - LOW)


def _zero_as_negative(log_pi: Tensor, log_old: Tensor, log_mu: Tensor, advantages: Tensor) -> Tensor:
    ratio = (log_pi - log_old).exp()
    return torch.where(advantages[:, None] > 0, ratio <= 1 + HIGH, ratio >= 1 - LOW)


def _observe_kept(answer: Callable[..., Tensor]) -> Observations:
    ratios = torch.tensor([1.60, 1.24, 1.00, 0.79, 0.50])
    old = torch.full((3, 5), 0.4)
    pi = old * ratios
    # The engine's own error, of the same size as the staleness and the other way: only r = π_θ/π_old may decide.
    mu = torch.tensor([[0.60, 0.30, 0.20, 0.20, 0.10], [0.60, 0.70, 0.60, 0.30, 0.20], [0.4, 0.4, 0.4, 0.4, 0.4]])
    kept = answer(pi.log(), old.log(), mu.log(), torch.tensor([0.5, -0.5, 0.0]))
    return {
        "what is kept where Â > 0, for r = 1.6, 1.24, 1, 0.79, 0.5,": kept[0],
        "what is kept where Â < 0, for r = 1.6, 1.24, 1, 0.79, 0.5,": kept[1],
        "what is kept where Â = 0": kept[2],
    }


_EX3 = Exercise(
    id="00.3",
    title="Which tokens may still move",
    difficulty=2,
    importance=4,
    minutes=10,
    hints=(
        "A token with Â > 0 is pushed up. Which ratios mean that it has been pushed up far enough?",
        "Only one side is a reason to let go, and the sign of Â says which one.",
        "The ratio here is r = π_θ/π_old, how far the *policy* has moved; the engine has no say in it.",
        "Dropped: Â > 0 and r > 1.27, or Â < 0 and r < 0.8. Kept is everything else.",
    ),
    observe=_observe_kept,
    solution=_kept,
    mistakes=(
        Mistake(
            "both sides",
            _keep_both,
            "tokens are dropped on both sides, whatever the sign of Â. A token that has moved *against* its push "
            "needs its gradient more than any other: without it, it never comes back.",
        ),
        Mistake(
            "wrong side",
            lambda log_pi, log_old, log_mu, advantages: _kept(log_pi, log_old, log_mu, -advantages),
            "the sides are exchanged: dropped are tokens that have moved against their push, and those that have gone "
            "too far go on.",
        ),
        Mistake(
            "dropped instead of kept",
            lambda *case: ~_kept(*case),
            "true stands for the tokens that are dropped; M_t is 1 for those that are kept.",
        ),
        Mistake(
            "bounds exchanged",
            lambda log_pi, log_old, log_mu, advantages: _keep(log_pi - log_old, advantages, HIGH, LOW),
            "the two bounds are exchanged: it is 1 + 0.27 above and 1 − 0.2 below. The paper leaves more room upwards, "
            "where rare tokens become likelier.",
        ),
        Mistake(
            "ratio to the rollout policy",
            lambda log_pi, log_old, log_mu, advantages: _keep(log_pi - log_mu, advantages, LOW, HIGH),
            "your ratio is π_θ/μ_old. Then the engine's rounding alone can drop a token that the policy has not moved "
            "at all; the trust region is about staleness, π_θ/π_old.",
        ),
        Mistake(
            "ratio upside down",
            lambda log_pi, log_old, log_mu, advantages: _keep(log_old - log_pi, advantages, LOW, HIGH),
            "the ratio is upside down, π_old/π_θ: a token that has become likelier looks as if it had become rarer.",
        ),
        Mistake(
            "zero advantage dropped",
            _zero_as_negative,
            "where Â = 0 some tokens are dropped. Their gradient is zero anyway, but they would be counted as clipped "
            "in the metrics: an `else` took them for negative.",
        ),
    ),
    praise="The clip is one-sided: it stops what goes too far, never what has to come back.",
)


# ------------------------------------------------------------------------------------------------ 00.4 two factors


def _mean_size(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return (log_ratio.abs() * mask).sum() / mask.sum()


def _factors(log_mu: Tensor, log_old: Tensor, log_pi: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _mean_size(log_old - log_mu, mask), _mean_size(log_pi - log_old, mask)


def _observe_factors(answer: Callable[..., Any]) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.8, 0.4]])
    old = torch.tensor([[0.5, 0.5, 0.8], [0.6, 0.6, 0.9]])
    pi = torch.tensor([[0.7, 0.3, 0.85], [0.4, 0.66, 0.2]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    discrepancy, staleness = answer(mu.log(), old.log(), pi.log(), mask)
    return {"the discrepancy": discrepancy, "the staleness": staleness}


def _signed(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return (log_ratio * mask).sum() / mask.sum()


_EX4 = Exercise(
    id="00.4",
    title="How large is each factor?",
    difficulty=2,
    importance=4,
    minutes=8,
    hints=(
        "Each factor compares two neighbours in the chain μ_old → π_old → π_θ. What changes in each step?",
        "The log of a ratio is a difference of logs; its size is the absolute value.",
        "A mean over response tokens: sum over the mask, divided by how many there are.",
    ),
    observe=_observe_factors,
    solution=_factors,
    mistakes=(
        Mistake(
            "exchanged",
            lambda *case: _factors(*case)[::-1],
            "the two are exchanged. The discrepancy is there before any update: the same weights in two engines. The "
            "staleness is what updates did.",
        ),
        Mistake(
            "signed",
            lambda log_mu, log_old, log_pi, mask: (_signed(log_old - log_mu, mask), _signed(log_pi - log_old, mask)),
            "the signs were left in, so that differences in opposite directions cancel. Two engines that disagree "
            "everywhere can have a mean of nearly zero.",
        ),
        Mistake(
            "padding counted",
            lambda log_mu, log_old, log_pi, mask: _factors(log_mu, log_old, log_pi, torch.ones_like(mask)),
            "the mean runs over all places, also over those where there is no token.",
        ),
        Mistake(
            "divided by all places",
            lambda *case: tuple(x * case[3].float().mean() for x in _factors(*case)),
            "the sum leaves the padding out, but the divisor counts it: the more padding, the smaller the result.",
        ),
        Mistake(
            "ratio without its log",
            lambda log_mu, log_old, log_pi, mask: (
                _signed((log_old - log_mu).exp(), mask),
                _signed((log_pi - log_old).exp(), mask),
            ),
            "this is the mean ratio. It is near 1 for good engines and bad ones alike, because too large and too small "
            "cancel; the size of the log does not cancel.",
        ),
        Mistake(
            "whole ratio first",
            lambda log_mu, log_old, log_pi, mask: (
                _mean_size(log_pi - log_mu, mask),
                _mean_size(log_pi - log_old, mask),
            ),
            "your first number is the size of the whole ratio π_θ/μ_old. The discrepancy compares the *same* weights "
            "in two engines: π_old with μ_old.",
        ),
        Mistake(
            "whole ratio last",
            lambda log_mu, log_old, log_pi, mask: (
                _mean_size(log_old - log_mu, mask),
                _mean_size(log_pi - log_mu, mask),
            ),
            "your second number is the size of the whole ratio π_θ/μ_old, so the engine's error is counted twice. "
            "Staleness compares the training engine with itself: π_θ with π_old.",
        ),
    ),
    praise="The trainer logs both at every gradient step, as log_ratio_mismatch and log_ratio_staleness.",
)


# -------------------------------------------------------------------------------------------------------- 00.5 k3


def _k3(log_mu: Tensor, log_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = (log_old - log_mu) * mask
    return (log_ratio.exp() - 1 - log_ratio).sum() / mask.sum()


def _k3_by_response(log_mu: Tensor, log_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = (log_old - log_mu) * mask
    return ((log_ratio.exp() - 1 - log_ratio).sum(1) / mask.sum(1)).mean()


def _observe_k3(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.8, 0.4]])
    old = torch.tensor([[0.5, 0.7, 0.6], [0.9, 0.6, 0.9]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return {
        "the KL of two engines that agree": answer(old.log(), old.log(), mask),
        "the KL": answer(mu.log(), old.log(), mask),
    }


_EX5 = Exercise(
    id="00.5",
    title="The KL with little noise",
    difficulty=3,
    importance=4,
    minutes=10,
    hints=(
        "The tokens were drawn from μ_old, so the ratio that averages to 1 has μ_old below.",
        "Work with log r = log π_old − log μ_old; r is its exponential.",
        "r − 1 − log r for every response token, then their mean over the mask.",
    ),
    observe=_observe_k3,
    solution=_k3,
    mistakes=(
        Mistake(
            "k1",
            lambda log_mu, log_old, mask: ((log_mu - log_old) * mask).sum() / mask.sum(),
            "this is the plain mean of log μ_old − log π_old, k1. It is right on average, but its terms have both "
            "signs, and with few tokens it can even be negative.",
        ),
        Mistake(
            "log added",
            lambda log_mu, log_old, mask: (
                (((log_old - log_mu) * mask).exp() - 1 + (log_old - log_mu) * mask).sum() / mask.sum()
            ),
            "the log has the wrong sign. Terms must never be negative: log r ≤ r − 1, so the log is taken away.",
        ),
        Mistake(
            "ratio upside down",
            lambda log_mu, log_old, mask: _k3(log_old, log_mu, mask),
            "r is μ_old/π_old. The tokens come from μ_old, and only π_old/μ_old has mean 1 over them; upside down, "
            "r − 1 no longer averages to zero and the result is no KL.",
        ),
        Mistake(
            "one forgotten",
            lambda log_mu, log_old, mask: _k3(log_mu, log_old, mask) + 1,
            "it is not zero for two engines that agree: the 1 is missing.",
        ),
        Mistake(
            "padding counted",
            lambda log_mu, log_old, mask: _k3(log_mu, log_old, torch.ones_like(mask)),
            "places outside the mask are counted, although no token was drawn there.",
        ),
        Mistake(
            "mean of means",
            _k3_by_response,
            "first a mean in each response, then over responses: tokens of short responses count more. The metric is "
            "per token, over all response tokens alike.",
        ),
        Mistake(
            "squares",
            lambda log_mu, log_old, mask: (((log_old - log_mu) * mask).square() / 2).sum() / mask.sum(),
            "half the squared log-ratio (k2) agrees with the KL only near zero, and is off exactly where an engine is "
            "bad enough to matter.",
        ),
    ),
    praise="Every term is at least zero, so the mean can only be small where every token agrees.",
)

EXERCISES = (_EX1, _EX2, _EX3, _EX4, _EX5)
"""In the order of the lab."""
