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
    torch_std_advantages,
)

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
    - sign: the signs are wrong. A right answer in a mixed group was better than its group, so its advantage is
      positive.
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
    - not flat: the numbers are right, but they come as a table of groups. The loss takes one advantage per response, in
      one row of length B.

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

    - sign: the sign is that of the objective. A loss is minimised, so its gradient has the other sign. With yours,
      training would make right answers less probable.
    - ratio upside down: the ratio is upside down, μ_old/π_θ. A token that the sampler drew too rarely must count
      *more*, so the distribution we want is the numerator.
    - no mean over responses: the division by the number of responses is missing: the step would grow with the batch.
    - mean over tokens: this is a mean over all tokens of the batch. MiniRL sums over a response's tokens and averages
      over responses: dividing by tokens changes how much a response counts with the lengths of the others.
    - length normalised: each response's sum is divided by its length. That is the ablation “+ length norm”; the
      sequence objective has no such factor.
    - mask forgotten: places outside the mask have a gradient. There is no token there, and nothing to learn from.
    - no cap: one weight is above 5 and counts in full. The cap is there so that one unlucky token cannot outweigh the
      whole batch.
    - weight in logs: the weight is the log of the ratio. It is zero where the engines agree, so those tokens would not
      be learned at all; a ratio is 1 there.
    - with respect to the probability: this is the derivative with respect to π_θ itself. It has an extra factor 1/π_θ.
      The exercise asks for the derivative with respect to log π_θ.
    - weight not detached: the gradient also flows through the importance weight. In (7) the weight stands inside sg[…]:
      it says how much a token counts and is not optimised itself. Otherwise a token's push depends on 1 + log π_θ and
      changes its sign for rare tokens.

    This is (7) in one line: how much, in which direction, for which tokens.
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
    4. A token is dropped if Â > 0 and r > 1.27, or if Â < 0 and r < 0.8. Everything else is kept.

    - both sides: tokens are dropped on both sides, whatever the sign of Â. A token that has moved *against* its push
      needs its gradient more than any other. Without a gradient, that token never comes back.
    - wrong side: the sides are exchanged. You drop tokens that have moved against their push and keep those that have
      gone too far.
    - dropped instead of kept: true stands for the tokens that are dropped; M_t is 1 for those that are kept.
    - bounds exchanged: the two bounds are exchanged. The bound is 1 + 0.27 above and 1 − 0.2 below. The paper leaves
      more room upwards, where rare tokens become likelier.
    - ratio to the rollout policy: your ratio is π_θ/μ_old. Then the engine's rounding alone can drop a token that the
      policy has not moved at all; the trust region is about staleness, π_θ/π_old.
    - ratio upside down: the ratio is upside down, π_old/π_θ. A token that has become likelier looks as if it had become
      rarer.
    - zero advantage dropped: where Â = 0 some tokens are dropped. Their gradient is zero anyway, but the metrics would
      count them as clipped. Probably an `else` takes Â = 0 for negative.

    The clip has one side. It stops tokens that go too far, never tokens that come back.
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


_VERDICTS = ((",7,6,7", "7"), (",7,6,7", "6"), (",7,6,17", "7"), (",7,6,7,", "7"), ("7", "7"), ("", "7"), (",0", "0"))


def _observe_reward(answer: Answer) -> Observations:
    return {f"the reward of {text!r} where {right} is right": answer(text, right) for text, right in _VERDICTS}


EX4 = exercise(
    """00.4 The reward is a program (difficulty 2, importance 4, 8 minutes)

    1. Only the end of the response counts. What are its last two characters if it is right?
    2. A comma and the right digit. Which method of a string says how it ends?
    3. `response.endswith("," + answer)`, as a number. It is also right for an empty response.

    - anywhere: your program rewards the right digit wherever it occurs. A policy finds out: it writes all ten digits
      and is always right.
    - last character only: your program looks at the last character and not at the comma before it. Then 17 counts as a
      7.
    - fails on short responses: a response of one character, or of none, raises an error. A policy will write such
      responses, and one of them would stop the run.
    - first result: your program compares the first result. The first partial sum is not the answer.
    - after the last comma: a digit without a comma before it is rewarded. The task asks for a comma and then the digit.
    - exact match: your program compares the whole response with the digit. How a response gets to its last digit is
      free.
    - part of a point: a wrong answer gets a part of a point because the right digit occurs in it. Then responses with
      many digits are learned, whether they are right or not.

    A policy learns whatever the program rewards, mistakes of the program included.
    """,
    observe=_observe_reward,
    solution=lambda response, answer: float(response.endswith(f",{answer}")),
    mistakes={
        "anywhere": lambda response, answer: float(answer in response),
        "last character only": lambda response, answer: float(response[-1:] == answer),
        "fails on short responses": lambda response, answer: float(response[-2] == "," and response[-1] == answer),
        "first result": lambda response, answer: float(response.startswith(f",{answer}")),
        "after the last comma": lambda response, answer: float(response.split(",")[-1] == answer),
        "exact match": lambda response, answer: float(response == answer),
        "part of a point": lambda response, answer: (
            1.0 if response.endswith(f",{answer}") else 0.5 * (answer in response)
        ),
    },
)


def _round_rows(
    weights: Tensor, bits: int, *, steps: int | None = None, size: Answer = torch.abs, grid: Answer = torch.round
) -> Tensor:
    """Rows on a grid of 2^(bits − 1) − 1 steps on each side of 0, or what people take for it."""
    scale = size(weights).amax(1, keepdim=True) / (2 ** (bits - 1) - 1 if steps is None else steps)
    return scale * grid(weights / scale)


def _observe_rounding(answer: Answer) -> Observations:
    weights = torch.tensor([[0.31, -0.9, 0.12, 0.44], [0.02, -0.011, 0.017, 0.005]])
    return {f"the two rows in {bits} bits": answer(weights, bits) for bits in (4, 3)}


EX5 = exercise(
    """00.5 An engine in few bits (difficulty 3, importance 3, 10 minutes)

    1. In b bits there are 2^(b − 1) − 1 steps on each side of zero. The largest |w| of a row is the last step.
    2. So the size of a step is `scale = weights.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)`.
    3. Divide by the scale, round to whole numbers, multiply by the scale again.

    - one scale for all rows: the whole matrix shares one scale. A row of small weights then becomes all zeros: each row
      needs a scale of its own.
    - whole numbers: these are the whole numbers on the grid. An engine multiplies with weights: scale them back.
    - no absolute value: the scale comes from the largest weight, not from the largest size of a weight. In a row whose
      largest size belongs to a negative weight, the grid ends too early.
    - one step too many: you divided by 2^(b − 1). The grid has 2^(b − 1) − 1 steps on each side, so that it is
      symmetric around zero.
    - as many steps as values: you divided by 2^b − 1. That is the number of steps from end to end; the scale counts
      those on one side.
    - rounded down: you took the next lower step. Then all errors have one sign, and they add up.
    - cut off: you cut the fraction off, so every weight shrinks. Rounding takes the nearest step.

    No weight is off by more than half a step.
    """,
    observe=_observe_rounding,
    solution=_round_rows,
    mistakes={
        "one scale for all rows": lambda weights, bits: _round_rows(weights.view(1, -1), bits).view_as(weights),
        "whole numbers": lambda weights, bits: (
            weights * (2 ** (bits - 1) - 1) / weights.abs().amax(1, keepdim=True)
        ).round(),
        "no absolute value": partial(_round_rows, size=lambda weights: weights),
        "one step too many": lambda weights, bits: _round_rows(weights, bits, steps=2 ** (bits - 1)),
        "as many steps as values": lambda weights, bits: _round_rows(weights, bits, steps=2**bits - 1),
        "rounded down": partial(_round_rows, grid=torch.floor),
        "cut off": partial(_round_rows, grid=torch.trunc),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5)
