"""Exercises of the quickstart: the parts of one MiniRL update, by hand."""

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
    interleaved_advantages,
    kl,
    masked_mean,
    torch_std_advantages,
)
from minirl_edu.diagnostics import kl_k3

CAP = 5.0


def _observe_advantages(answer: Answer) -> Observations:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    return {"the result for three groups of three": answer(rewards, 3), "the rewards": rewards}


EX1 = exercise(
    """00.1 Advantages of several groups (difficulty 1, importance 5, 5 minutes)

    1. Each response is compared with the G responses to *its own* prompt, itself included.
    2. The first G rewards belong to the first prompt. Which `view` puts one group in each row?
    3. `groups = rewards.view(-1, group_size)`; subtract the mean over dimension 1 (`keepdim=True`); flatten.

    - no baseline: these are the rewards themselves. Without a baseline every right answer is pushed up equally, also in
      a group where all were right and there is nothing to learn.
    - sign: the signs are the wrong way round: a right answer in a mixed group was better than its group, so its
      advantage is positive.
    - mean of the batch: the baseline is the mean of the whole batch. Then answers to easy problems look good and
      answers to hard ones bad, whatever was written: each group needs its own mean.
    - divided by the standard deviation: this divides by the group's standard deviation as well. That is GRPO's
      advantage; MiniRL's is the difference alone, so that a group of nearly all right answers does not count as much as
      a mixed one.
    - divided by torch.std: this divides by the group's standard deviation as well, and by `torch.std`'s, whose divisor
      is G − 1. GRPO's has the divisor G; MiniRL's advantage is the difference alone.
    - leave one out: your baseline leaves the response itself out of its group's mean. That is another fine estimator
      (RLOO), larger by G/(G − 1); the paper's mean is over all G.
    - interleaved groups: responses of different prompts were put in one group. The batch is grouped by prompt: the
      first G rewards belong to the first prompt.
    - not flat: the numbers are right, but they come as a table of groups; one advantage per response, in one row of
      length B, is what the loss takes.

    A group in which all were right, or all wrong, has advantages of zero: nothing is learned from it.
    """,
    observe=_observe_advantages,
    solution=group_mean_advantages,
    mistakes={
        "no baseline": lambda rewards, group_size: rewards,
        "sign": lambda rewards, group_size: -group_mean_advantages(rewards, group_size),
        "mean of the batch": batch_advantages,
        "divided by the standard deviation": group_mean_std_advantages,
        "divided by torch.std": torch_std_advantages,
        "leave one out": leave_one_out_advantages,
        "interleaved groups": interleaved_advantages,
        "not flat": lambda rewards, group_size: group_mean_advantages(rewards, group_size).view(-1, group_size),
    },
)


def _observe_gradient(answer: Answer) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.08, 0.9], [0.5, 0.8, 0.3, 0.2]])
    pi = torch.tensor([[0.5, 0.5, 0.80, 0.6], [0.4, 0.6, 0.9, 0.7]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    return {"the gradient": answer(pi.log(), mu.log(), torch.tensor([0.75, -0.25]), mask)}


def _gradient(log_pi: Tensor, log_mu: Tensor, advantages: Tensor, mask: Tensor, *, cap: float = CAP) -> Tensor:
    return -(log_pi - log_mu).exp().clamp(max=cap) * advantages[:, None] * mask / len(log_pi)


EX2 = exercise(
    """00.2 The gradient of every token (difficulty 2, importance 5, 10 minutes)

    1. The loss is minus the objective, a mean over B responses and a sum over their tokens.
    2. The weight is a constant for the gradient. What is the derivative of `c * log_pi` with respect to `log_pi`?
    3. The weight is `(log_pi - log_mu).exp()`, and never more than 5.
    4. Minus weight × advantage of its response × mask, over the number of responses.

    - sign: the sign is that of the objective. A loss is minimised, so its gradient is the other way round; as it
      stands, training would make right answers less probable.
    - ratio upside down: the ratio is upside down, μ_old/π_θ. A token that the sampler drew too rarely must count
      *more*: the distribution we want goes on top.
    - no mean over responses: the division by the number of responses is missing: the step would grow with the batch.
    - mean over tokens: this is a mean over all tokens of the batch. MiniRL sums over a response's tokens and averages
      over responses: dividing by tokens changes how much a response counts with the lengths of the others.
    - length normalised: each response's sum is divided by its length. That is the ablation “+ length norm”; the
      sequence objective has no such factor.
    - mask forgotten: places outside the mask have a gradient. There is no token there: whatever number the tensors hold
      must not be learned from.
    - no cap: one weight is above 5 and counts in full. The cap is there so that one unlucky token cannot outweigh the
      whole batch.
    - weight in logs: the weight is the log of the ratio. It is zero where the engines agree, so those tokens would not
      be learned at all; a ratio is 1 there.
    - with respect to the probability: this is the derivative with respect to π_θ itself: there is a factor 1/π_θ too
      much. Asked is the one with respect to log π_θ.
    - weight not detached: the gradient also flows through the importance weight. In (7) it stands inside sg[…]: it says
      how much a token counts and is not itself to be optimised. A token's push would otherwise depend on 1 + log π_θ
      and turn round for rare tokens.

    The whole of (7) in one line: how much, in which direction, for which tokens.
    """,
    observe=_observe_gradient,
    solution=_gradient,
    mistakes={
        "sign": lambda *case: -_gradient(*case),
        "ratio upside down": lambda pi, mu, advantages, mask: _gradient(mu, pi, advantages, mask),
        "no mean over responses": lambda *case: _gradient(*case) * len(case[0]),
        "mean over tokens": lambda *case: _gradient(*case) * len(case[0]) / case[3].sum(),
        "length normalised": lambda *case: _gradient(*case) / case[3].sum(1, keepdim=True),
        "mask forgotten": lambda pi, mu, advantages, mask: _gradient(pi, mu, advantages, torch.ones_like(mask)),
        "no cap": partial(_gradient, cap=torch.inf),
        "weight in logs": lambda pi, mu, advantages, mask: -(pi - mu) * advantages[:, None] * mask / len(pi),
        "with respect to the probability": lambda *case: _gradient(*case) / case[0].exp(),
        "weight not detached": lambda pi, mu, advantages, mask: (
            _gradient(pi, mu, advantages, mask) * (1 + pi * ((pi - mu).exp() < CAP))
        ),
    },
)


def _observe_kept(answer: Answer) -> Observations:
    ratios = torch.tensor([1.60, 1.24, 1.00, 0.79, 0.50])
    old = torch.full((3, 5), 0.4)
    # The engine's own error, of the same size as the staleness and the other way: only r = π_θ/π_old may decide.
    mu = torch.tensor([[0.60, 0.30, 0.20, 0.20, 0.10], [0.60, 0.70, 0.60, 0.30, 0.20], [0.4, 0.4, 0.4, 0.4, 0.4]])
    kept = answer((old * ratios).log(), old.log(), mu.log(), torch.tensor([0.5, -0.5, 0.0]))
    return {
        "what is kept where Â > 0, for r = 1.6, 1.24, 1, 0.79, 0.5,": kept[0],
        "what is kept where Â < 0, for r = 1.6, 1.24, 1, 0.79, 0.5,": kept[1],
        "what is kept where Â = 0": kept[2],
    }


EX3 = exercise(
    """00.3 Which tokens may still move (difficulty 2, importance 4, 10 minutes)

    1. A token with Â > 0 is pushed up. Which ratios mean that it has been pushed up far enough?
    2. Only one side is a reason to let go, and the sign of Â says which one.
    3. The ratio here is r = π_θ/π_old, how far the *policy* has moved; the engine has no say in it.
    4. Dropped: Â > 0 and r > 1.27, or Â < 0 and r < 0.8. Kept is everything else.

    - both sides: tokens are dropped on both sides, whatever the sign of Â. A token that has moved *against* its push
      needs its gradient more than any other: without it, it never comes back.
    - wrong side: the sides are exchanged: dropped are tokens that have moved against their push, and those that have
      gone too far go on.
    - dropped instead of kept: true stands for the tokens that are dropped; M_t is 1 for those that are kept.
    - bounds exchanged: the two bounds are exchanged: it is 1 + 0.27 above and 1 − 0.2 below. The paper leaves more room
      upwards, where rare tokens become likelier.
    - ratio to the rollout policy: your ratio is π_θ/μ_old. Then the engine's rounding alone can drop a token that the
      policy has not moved at all; the trust region is about staleness, π_θ/π_old.
    - ratio upside down: the ratio is upside down, π_old/π_θ: a token that has become likelier looks as if it had become
      rarer.
    - zero advantage dropped: where Â = 0 some tokens are dropped. Their gradient is zero anyway, but they would be
      counted as clipped in the metrics: an `else` took them for negative.

    The clip is one-sided: it stops what goes too far, never what has to come back.
    """,
    observe=_observe_kept,
    solution=lambda pi, old, mu, advantages: ~dropped(pi, old, advantages),
    mistakes={
        "both sides": lambda pi, old, mu, advantages: ~dropped(pi, old, advantages, any_sign=True),
        "wrong side": lambda pi, old, mu, advantages: ~dropped(pi, old, -advantages),
        "dropped instead of kept": lambda pi, old, mu, advantages: dropped(pi, old, advantages),
        "bounds exchanged": lambda pi, old, mu, advantages: ~dropped(pi, old, advantages, EPS_HIGH, EPS_LOW),
        "ratio to the rollout policy": lambda pi, old, mu, advantages: ~dropped(pi, mu, advantages),
        "ratio upside down": lambda pi, old, mu, advantages: ~dropped(old, pi, advantages),
        "zero advantage dropped": lambda pi, old, mu, advantages: (
            ~dropped(pi, old, torch.where(advantages > 0, advantages, -1.0))
        ),
    },
)


def _observe_factors(answer: Answer) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.8, 0.4]])
    old = torch.tensor([[0.5, 0.5, 0.8], [0.6, 0.6, 0.9]])
    pi = torch.tensor([[0.7, 0.3, 0.85], [0.4, 0.66, 0.2]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    discrepancy, staleness = answer(mu.log(), old.log(), pi.log(), mask)
    return {"the discrepancy": discrepancy, "the staleness": staleness}


def _factors(
    log_mu: Tensor, log_old: Tensor, log_pi: Tensor, mask: Tensor, *, size: Answer = torch.abs, over: str = "tokens"
) -> tuple[Tensor, Tensor]:
    return masked_mean(size(log_old - log_mu), mask, over), masked_mean(size(log_pi - log_old), mask, over)


EX4 = exercise(
    """00.4 How large is each factor? (difficulty 2, importance 4, 8 minutes)

    1. Each factor compares two neighbours in the chain μ_old → π_old → π_θ. What changes in each step?
    2. The log of a ratio is a difference of logs; its size is the absolute value.
    3. A mean over response tokens: sum over the mask, divided by how many there are.

    - exchanged: the two are exchanged. The discrepancy is there before any update: the same weights in two engines. The
      staleness is what updates did.
    - signed: the signs were left in, so that differences in opposite directions cancel. Two engines that disagree
      everywhere can have a mean of nearly zero.
    - padding counted: the mean runs over all places, also over those where there is no token.
    - divided by all places: the sum leaves the padding out, but the divisor counts it: the more padding, the smaller
      the result.
    - ratio without its log: this is the mean ratio. It is near 1 for good engines and bad ones alike, because too large
      and too small cancel; the size of the log does not cancel.
    - whole ratio first: your first number is the size of the whole ratio π_θ/μ_old. The discrepancy compares the *same*
      weights in two engines: π_old with μ_old.
    - whole ratio last: your second number is the size of the whole ratio π_θ/μ_old, so the engine's error is counted
      twice. Staleness compares the training engine with itself: π_θ with π_old.

    The trainer logs both at every gradient step, as log_ratio_mismatch and log_ratio_staleness.
    """,
    observe=_observe_factors,
    solution=_factors,
    mistakes={
        "exchanged": lambda *case: _factors(*case)[::-1],
        "signed": partial(_factors, size=lambda log_ratio: log_ratio),
        "padding counted": partial(_factors, over="places"),
        "divided by all places": partial(_factors, over="counted padding"),
        "ratio without its log": partial(_factors, size=torch.exp),
        "whole ratio first": lambda mu, old, pi, mask: (_factors(mu, pi, pi, mask)[0], _factors(mu, old, pi, mask)[1]),
        "whole ratio last": lambda mu, old, pi, mask: (_factors(mu, old, pi, mask)[0], _factors(mu, mu, pi, mask)[1]),
    },
)


def _observe_k3(answer: Answer) -> Observations:
    mu = torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.8, 0.4]])
    old = torch.tensor([[0.5, 0.7, 0.6], [0.9, 0.6, 0.9]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return {
        "the KL of two engines that agree": answer(old.log(), old.log(), mask),
        "the KL": answer(mu.log(), old.log(), mask),
    }


EX5 = exercise(
    """00.5 The KL with little noise (difficulty 3, importance 4, 10 minutes)

    1. The tokens were drawn from μ_old, so the ratio that averages to 1 has μ_old below.
    2. Work with log r = log π_old − log μ_old; r is its exponential.
    3. r − 1 − log r for every response token, then their mean over the mask.

    - k1: this is the plain mean of log μ_old − log π_old, k1. It is right on average, but its terms have both signs,
      and with few tokens it can even be negative.
    - log added: the log has the wrong sign. Terms must never be negative: log r ≤ r − 1, so the log is taken away.
    - ratio upside down: r is μ_old/π_old. The tokens come from μ_old, and only π_old/μ_old has mean 1 over them; upside
      down, r − 1 no longer averages to zero and the result is no KL.
    - one forgotten: it is not zero for two engines that agree: the 1 is missing.
    - padding counted: places outside the mask are counted, although no token was drawn there.
    - mean of means: first a mean in each response, then over responses: tokens of short responses count more. The
      metric is per token, over all response tokens alike.
    - squares: half the squared log-ratio (k2) agrees with the KL only near zero, and is off exactly where an engine is
      bad enough to matter.

    Every term is at least zero, so the mean can only be small where every token agrees.
    """,
    observe=_observe_k3,
    solution=kl_k3,
    mistakes={
        "k1": partial(kl, term="k1"),
        "log added": partial(kl, term="k3 with the log added"),
        "ratio upside down": lambda mu, old, mask: kl(old, mu, mask),
        "one forgotten": partial(kl, term="k3 without the 1"),
        "padding counted": partial(kl, over="places"),
        "mean of means": partial(kl, over="responses"),
        "squares": partial(kl, term="k2"),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5)
