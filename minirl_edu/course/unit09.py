"""Exercises of lab 09: what a start must be able to do, and what a teacher's errors make of it."""

import math
from functools import partial

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import gradient, masked_mean, token_logp


def _mixed(p: float, group_size: int) -> float:
    return 1 - p**group_size - (1 - p) ** group_size


EX1 = exercise(
    """09.1 Will this group teach anything? (difficulty 1, importance 5, 5 minutes)

    1. A group teaches nothing in exactly two cases. Which?
    2. All G right has probability p to the power of G. The other case is its mirror image, and the two exclude each
       other.
    3. `1 - p**G - (1 - p)**G`

    - at least one right: this is the probability of at least one success. A group in which all are right has equal
      rewards too, and teaches nothing.
    - at least one wrong: this is the probability of at least one failure. A group without any success teaches nothing
      either. That is the danger of a weak start.
    - as if independent: you multiply two probabilities as if 'not all right' and 'not all wrong' were independent. But
      the two ways to fail exclude each other, so subtract both from 1.
    - for a pair only: that is right for G = 2 and does not depend on G. A larger group is more often mixed.

    For a small p it is about G·p: a group of 16 finds a rare success twice as often as one of 8.
    """,
    observe=lambda answer: {
        f"the probability for p = {p:g} and G = {g}": answer(p, g)
        for p, g in [(0.0, 8), (0.01, 8), (0.25, 2), (0.5, 8), (0.9, 4), (1.0, 8), (0.02, 16)]
    },
    solution=_mixed,
    mistakes={
        "at least one right": lambda p, group_size: 1 - (1 - p) ** group_size,
        "at least one wrong": lambda p, group_size: 1 - p**group_size,
        "as if independent": lambda p, group_size: (1 - p**group_size) * (1 - (1 - p) ** group_size),
        "for a pair only": lambda p, group_size: 2 * p * (1 - p),
    },
)


def _advantage(p: float, group_size: int) -> float:
    return 2 * p * (1 - p) * (group_size - 1) / group_size


EX2 = exercise(
    """09.2 The mean size of an advantage (difficulty 3, importance 3, 15 minutes)

    1. With K right of G, what is the advantage of a right response, and of a wrong one?
    2. 1 − K/G for each of the K, K/G for each of the G − K: the mean size is 2·K·(G − K)/G².
    3. E[K²] = Gp(1 − p) + G²p² for a binomial, so E[K(G − K)] = G(G − 1)·p(1 − p).

    - as for an infinite group: you measure against the true p. A group's mean contains the response itself, which takes
      a share of 1/G off every advantage.
    - mean square: that is the mean of the *square* of the advantage. The mean of its size has a factor more: both the
      right and the wrong ones contribute.
    - root mean square: that is the root of the mean square. It is larger than the mean size.
    - of mixed groups only: you average over the mixed groups alone. The others have advantage 0 and belong to the mean.

    It is largest at p = ½ and small towards both ends: what always or never works teaches nothing.
    """,
    observe=lambda answer: {
        f"the mean for p = {p:g} and G = {g}": answer(p, g)
        for p, g in [(0.0, 8), (0.1, 8), (0.5, 2), (0.5, 8), (0.8, 4), (1.0, 8)]
    },
    solution=_advantage,
    mistakes={
        "as for an infinite group": lambda p, group_size: 2 * p * (1 - p),
        "mean square": lambda p, group_size: _advantage(p, group_size) / 2,
        "root mean square": lambda p, group_size: math.sqrt(_advantage(p, group_size) / 2),
        "of mixed groups only": lambda p, group_size: _advantage(p, group_size) / (_mixed(p, group_size) or 1.0),
    },
)


_END, _PAD = 8, 9


def _observe_sft(answer: Answer) -> Observations:
    # Prompts of 3 tokens; responses of 3, 1 and 2 tokens, the end token included; padding on the right.
    tokens = torch.tensor([[1, 2, 3, 4, 5, _END], [2, 2, 1, _END, _PAD, _PAD], [3, 0, 1, 7, _END, _PAD]])
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 6, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    loss = answer(logits, tokens, 3, _PAD)
    slope = gradient(loss, logits)
    return {
        "the loss": loss,
        "the size of its gradient at each place": slope.abs().sum(-1),
        "its gradient": slope,
    }


def _sft(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int, *, over: str = "tokens") -> Tensor:
    real = tokens[:, 1:] != pad
    real[:, : prompt_length - 1] = False
    return -masked_mean(token_logp(logits[:, :-1], tokens[:, 1:]), real, over)


EX3 = exercise(
    """09.3 The loss of a cold start (difficulty 3, importance 4, 15 minutes)

    1. The logits at place t predict the token at place t + 1.
    2. Which of the S − 1 predictions are about response tokens? The first of them is made at the *last* token of the
       prompt.
    3. Padding is not a token. The end token is one, because a pupil must learn when to stop.
    4. A mean over all response tokens of the batch, as the library's cold start has it.

    - the prompt as well: you train on the prompt's tokens too. The pupil would learn to predict the random digits of
      problems, which nobody will ask it for.
    - padding as well: padding counts in your mean. The pupil would learn to write padding, and a batch with one long
      response would have a smaller loss than the same responses apart.
    - not shifted: you compare the logits at a place with the token at the same place, which is the model's *input*
      there. The pupil would learn to copy what it just read.
    - first token lost: you leave out the first response token. It is predicted at the last token of the prompt, one
      place earlier than where it stands.
    - end token lost: the end token is missing. It is part of the response: without it the pupil never learns to stop.
    - mean of means: you average within each response first, so that a token of a short response counts more than one of
      a long response. Maximum likelihood of the batch is one mean over all tokens.

    Minimising it is maximum likelihood, hence the forward KL to the teacher, slips and all.
    """,
    observe=_observe_sft,
    solution=_sft,
    mistakes={
        "the prompt as well": lambda logits, tokens, prompt_length, pad: _sft(logits, tokens, 1, pad),
        "padding as well": lambda logits, tokens, prompt_length, pad: _sft(logits, tokens, prompt_length, -1),
        "not shifted": lambda logits, *case: _sft(logits.roll(-1, 1), *case),
        "first token lost": lambda logits, tokens, prompt_length, pad: _sft(logits, tokens, prompt_length + 1, pad),
        "end token lost": lambda logits, tokens, prompt_length, pad: _sft(
            logits, tokens.masked_fill(tokens == _END, pad), prompt_length, pad
        ),
        "mean of means": partial(_sft, over="responses"),
    },
)


EX4 = exercise(
    """09.4 What an imperfect teacher scores (difficulty 4, importance 3, 20 minutes)

    1. Two errors may cancel: +3 and then −3. So it is more than (1 − ε)ⁿ.
    2. Let q be the probability that the running sum is right. After another step it is right if it was and the step is
       good, or if it was not and the step's error happens to be the one digit of nine that corrects it.
    3. q' = (1 − ε)·q + (ε/9)·(1 − q). Its fixed point is 1/10, and the distance to it shrinks.
    4. q − 1/10 shrinks by 1 − 10ε/9 at each step, from 9/10 at the start.

    - every step right: this is the probability that *no* step is wrong. Only the last digit is checked, and errors can
      cancel.
    - first order: that is the first order in ε only. For many steps it falls below zero.
    - any digit drawn anew: your teacher replaces a digit by any of the ten. This one always takes one of the nine
      *wrong* ones, so it forgets faster.
    - no luck left: yours goes to 0 after many steps. Then the last digit is uniform, and a blind guess is right one
      time in ten.
    - luck of nine: your chance level is 1/9. There are ten digits at the end. Only the errors have nine values.

    A teacher who errs at one step in five still gets a third of the five-step sums right.
    """,
    observe=lambda answer: {
        f"the score for an error rate of {e:g} and {n} steps": answer(e, n)
        for e, n in [(0.0, 5), (0.21, 1), (0.21, 2), (0.21, 5), (0.06, 4), (0.9, 3), (0.5, 200)]
    },
    solution=lambda error_rate, steps: 0.1 + 0.9 * (1 - 10 / 9 * error_rate) ** steps,
    mistakes={
        "every step right": lambda error_rate, steps: (1 - error_rate) ** steps,
        "first order": lambda error_rate, steps: 1 - steps * error_rate,
        "any digit drawn anew": lambda error_rate, steps: 0.1 + 0.9 * (1 - error_rate) ** steps,
        "no luck left": lambda error_rate, steps: (1 - 10 / 9 * error_rate) ** steps,
        "luck of nine": lambda error_rate, steps: 1 / 9 + 8 / 9 * (1 - error_rate) ** steps,
    },
)


EX5 = exercise(
    """09.5 pass@k without bias (difficulty 3, importance 4, 12 minutes)

    1. Draw k of the n samples that you have, without putting any back. When do all of them fail?
    2. There are C(n, k) ways to draw, and C(n − c, k) of them take only wrong ones.
    3. `math.comb(n - c, k)` is 0 where there are fewer than k wrong ones.

    - plugged in: you put the estimate c/n into 1 − (1 − p)ᵏ. That function bends, so the noise of c/n does not average
      out: the result is too low on average. Drawing *without* replacement has no bias.
    - all k right: this is the probability that all k are right. pass@k asks for at least one.
    - all k wrong: this is the probability that none of the k is right. Subtract it from one.
    - k times as good: k·p is an upper bound that counts draws with two successes twice.
    - any success at all: you answer pass@n: whether any of all n samples is right. Only k of them may be looked at.

    With k = n the estimate is 1 as soon as anything is right. With k = 1 it is the plain score.
    """,
    observe=lambda answer: {
        f"the estimate from {n} samples with {c} right, k = {k}": answer(n, c, k)
        for n, c, k in [(8, 0, 4), (8, 8, 4), (8, 1, 1), (8, 3, 1), (8, 3, 2), (8, 3, 6), (32, 2, 8), (4, 2, 4)]
    },
    solution=lambda samples, right, k: 1 - math.comb(samples - right, k) / math.comb(samples, k),
    mistakes={
        "plugged in": lambda samples, right, k: 1 - (1 - right / samples) ** k,
        "all k right": lambda samples, right, k: math.comb(right, k) / math.comb(samples, k),
        "all k wrong": lambda samples, right, k: math.comb(samples - right, k) / math.comb(samples, k),
        "k times as good": lambda samples, right, k: min(1.0, k * right / samples),
        "any success at all": lambda samples, right, k: float(right > 0),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5)
