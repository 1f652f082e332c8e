"""Exercises of lab 09: what a start must be able to do, and what a teacher's errors make of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake

# ----------------------------------------------------------------------------------------------- 09.1: mixed groups


def _observe_mixed(answer: Callable[[float, int], float]) -> dict[str, Any]:
    cases = [(0.0, 8), (0.01, 8), (0.25, 2), (0.5, 8), (0.9, 4), (1.0, 8), (0.02, 16)]
    return {f"the probability for p = {p:g} and G = {g}": answer(p, g) for p, g in cases}


def _mixed(p: float, group_size: int) -> float:
    return 1 - p**group_size - (1 - p) ** group_size


# -------------------------------------------------------------------------------------------- 09.2: mean |advantage|


def _observe_advantage(answer: Callable[[float, int], float]) -> dict[str, Any]:
    cases = [(0.0, 8), (0.1, 8), (0.5, 2), (0.5, 8), (0.8, 4), (1.0, 8)]
    return {f"the mean for p = {p:g} and G = {g}": answer(p, g) for p, g in cases}


def _advantage(p: float, group_size: int) -> float:
    return 2 * p * (1 - p) * (group_size - 1) / group_size


def _advantage_when_mixed(p: float, group_size: int) -> float:
    mixed = _mixed(p, group_size)
    return _advantage(p, group_size) / mixed if mixed else 0.0


# ------------------------------------------------------------------------------------------------- 09.3: SFT's loss

_PAD = 9


def _observe_sft(answer: Callable[..., Tensor]) -> dict[str, Any]:
    # Prompts of 3 tokens; responses of 3, 1 and 2 tokens, the end token (8) included; padding (9) on the right.
    tokens = torch.tensor([[1, 2, 3, 4, 5, 8], [2, 2, 1, 8, 9, 9], [3, 0, 1, 7, 8, 9]])
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 6, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    loss = answer(logits, tokens, 3, _PAD)
    gradient = torch.autograd.grad(loss, logits)[0] if loss.requires_grad else torch.zeros_like(logits)
    return {
        "the loss": loss,
        "the size of its gradient at each place": gradient.abs().sum(-1),
        "its gradient": gradient,
    }


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log π of token t + 1 given the logits at t, [B, S − 1]."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def _sft(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    real = tokens[:, 1:] != pad
    real[:, : prompt_length - 1] = False
    return _nll(logits, tokens)[real].mean()


def _sft_with_prompt(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    return _nll(logits, tokens)[tokens[:, 1:] != pad].mean()


def _sft_with_padding(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    return _nll(logits, tokens)[:, prompt_length - 1 :].mean()


def _sft_unshifted(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    own = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    real = tokens != pad
    real[:, :prompt_length] = False
    return own[real].mean()


def _sft_first_token_lost(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    real = tokens[:, 1:] != pad
    real[:, :prompt_length] = False
    return _nll(logits, tokens)[real].mean()


def _sft_without_end(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    real = tokens[:, 1:] != pad
    real[:, : prompt_length - 1] = False
    last = real & ~torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
    return _nll(logits, tokens)[real & ~last].mean()


def _sft_mean_of_means(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    real = (tokens[:, 1:] != pad).to(logits.dtype)
    real[:, : prompt_length - 1] = 0
    return ((_nll(logits, tokens) * real).sum(1) / real.sum(1)).mean()


# ------------------------------------------------------------------------------------------ 09.4: a teacher's score


def _observe_teacher(answer: Callable[[float, int], float]) -> dict[str, Any]:
    cases = [(0.0, 5), (0.21, 1), (0.21, 2), (0.21, 5), (0.06, 4), (0.9, 3), (0.5, 200)]
    return {f"the score for an error rate of {e:g} and {n} steps": answer(e, n) for e, n in cases}


def _teacher(error_rate: float, steps: int) -> float:
    return 0.1 + 0.9 * (1 - 10 / 9 * error_rate) ** steps


# --------------------------------------------------------------------------------------------------- 09.5: pass@k


def _observe_pass(answer: Callable[[int, int, int], float]) -> dict[str, Any]:
    cases = [(8, 0, 4), (8, 8, 4), (8, 1, 1), (8, 3, 1), (8, 3, 2), (8, 3, 6), (32, 2, 8), (4, 2, 4)]
    return {f"the estimate from {n} samples with {c} right, k = {k}": answer(n, c, k) for n, c, k in cases}


def _pass(samples: int, right: int, k: int) -> float:
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


EXERCISES = (
    Exercise(
        id="09.1",
        title="Will this group teach anything?",
        difficulty=1,
        importance=5,
        minutes=5,
        hints=(
            "A group teaches nothing in exactly two cases. Which?",
            "All G right has probability p to the power of G. The other case is its mirror image, and the two exclude "
            "each other.",
            "`1 - p**G - (1 - p)**G`",
        ),
        observe=_observe_mixed,
        solution=_mixed,
        mistakes=(
            Mistake(
                "at least one right",
                lambda p, group_size: 1 - (1 - p) ** group_size,
                "this is the probability of at least one success. A group that is right throughout has the same reward "
                "everywhere and teaches nothing either.",
            ),
            Mistake(
                "at least one wrong",
                lambda p, group_size: 1 - p**group_size,
                "this is the probability of at least one failure. A group without any success teaches nothing either: "
                "that is the danger of a weak start.",
            ),
            Mistake(
                "as if independent",
                lambda p, group_size: (1 - p**group_size) * (1 - (1 - p) ** group_size),
                "you multiply two probabilities as if 'not all right' and 'not all wrong' were independent. They are "
                "not: the two ways to fail exclude each other, so subtract both from 1.",
            ),
            Mistake(
                "for a pair only",
                lambda p, group_size: 2 * p * (1 - p),
                "that is right for G = 2 and does not depend on G. A larger group is more often mixed.",
            ),
        ),
        praise="For a small p it is about G·p: a group of 16 finds a rare success twice as often as one of 8.",
    ),
    Exercise(
        id="09.2",
        title="The mean size of an advantage",
        difficulty=3,
        importance=3,
        minutes=15,
        hints=(
            "With K right of G, what is the advantage of a right response, and of a wrong one?",
            "1 − K/G for each of the K, K/G for each of the G − K: the mean size is 2·K·(G − K)/G².",
            "E[K²] = Gp(1 − p) + G²p² for a binomial, so E[K(G − K)] = G(G − 1)·p(1 − p).",
        ),
        observe=_observe_advantage,
        solution=_advantage,
        mistakes=(
            Mistake(
                "as for an infinite group",
                lambda p, group_size: 2 * p * (1 - p),
                "you measure against the true p. A group's mean contains the response itself, which takes a share of "
                "1/G off every advantage.",
            ),
            Mistake(
                "mean square",
                lambda p, group_size: p * (1 - p) * (group_size - 1) / group_size,
                "that is the mean of the *square* of the advantage. The mean of its size has a factor more: both the "
                "right and the wrong ones contribute.",
            ),
            Mistake(
                "root mean square",
                lambda p, group_size: math.sqrt(p * (1 - p) * (group_size - 1) / group_size),
                "that is the root of the mean square. It is larger than the mean size.",
            ),
            Mistake(
                "of mixed groups only",
                _advantage_when_mixed,
                "you average over the mixed groups alone. The others have advantage 0 and belong to the mean.",
            ),
        ),
        praise="Largest at p = ½, and small towards both ends: nothing to learn from what always or never works.",
    ),
    Exercise(
        id="09.3",
        title="The loss of a cold start",
        difficulty=3,
        importance=4,
        minutes=15,
        hints=(
            "The logits at place t predict the token at place t + 1.",
            "Which of the S − 1 predictions are about response tokens? The first of them is made at the *last* token "
            "of the prompt.",
            "Padding is no token. The end token is one: a pupil must learn when to stop.",
            "A mean over all response tokens of the batch, as the library's cold start has it.",
        ),
        observe=_observe_sft,
        solution=_sft,
        mistakes=(
            Mistake(
                "the prompt as well",
                _sft_with_prompt,
                "you train on the prompt's tokens too. The pupil would spend itself on predicting random digits of "
                "problems, which nobody will ask it for.",
            ),
            Mistake(
                "padding as well",
                _sft_with_padding,
                "padding counts in your mean. The pupil would learn to write padding, and a batch with one long "
                "response would have a smaller loss than the same responses apart.",
            ),
            Mistake(
                "not shifted",
                _sft_unshifted,
                "you compare the logits at a place with the token at that very place, which is the model's *input* "
                "there. It would learn to copy what it just read.",
            ),
            Mistake(
                "first token lost",
                _sft_first_token_lost,
                "you leave out the first response token. It is predicted at the last token of the prompt, one place "
                "earlier than where it stands.",
            ),
            Mistake(
                "end token lost",
                _sft_without_end,
                "the end token is missing. It is part of the response: without it the pupil never learns to stop.",
            ),
            Mistake(
                "mean of means",
                _sft_mean_of_means,
                "you average within each response first, so that a token of a short response counts more than one of a "
                "long response. Maximum likelihood of the batch is one mean over all tokens.",
            ),
        ),
        praise="Minimising it is maximum likelihood, hence the forward KL to the teacher, slips and all.",
    ),
    Exercise(
        id="09.4",
        title="What an imperfect teacher scores",
        difficulty=4,
        importance=3,
        minutes=20,
        hints=(
            "Two errors may cancel: +3 and then −3. So it is more than (1 − ε)ⁿ.",
            "Let q be the probability that the running sum is right. After another step it is right if it was and the "
            "step is good, or if it was not and the step's error happens to be the one digit of nine that mends it.",
            "q' = (1 − ε)·q + (ε/9)·(1 − q). Its fixed point is 1/10; what shrinks is the distance to it.",
            "q − 1/10 shrinks by 1 − 10ε/9 at each step, from 9/10 at the start.",
        ),
        observe=_observe_teacher,
        solution=_teacher,
        mistakes=(
            Mistake(
                "every step right",
                lambda error_rate, steps: (1 - error_rate) ** steps,
                "this is the probability that *no* step is wrong. Only the last digit is checked, and errors can "
                "cancel.",
            ),
            Mistake(
                "first order",
                lambda error_rate, steps: 1 - steps * error_rate,
                "that is the first order in ε only. For many steps it falls below zero.",
            ),
            Mistake(
                "any digit drawn anew",
                lambda error_rate, steps: 0.1 + 0.9 * (1 - error_rate) ** steps,
                "your teacher replaces a digit by any of the ten. This one always takes one of the nine *wrong* ones, "
                "so it forgets faster.",
            ),
            Mistake(
                "no luck left",
                lambda error_rate, steps: (1 - 10 / 9 * error_rate) ** steps,
                "yours goes to 0 after many steps. Then the last digit is uniform, and a blind guess is right one time "
                "in ten.",
            ),
            Mistake(
                "luck of nine",
                lambda error_rate, steps: 1 / 9 + 8 / 9 * (1 - error_rate) ** steps,
                "your chance level is 1/9. There are ten digits at the end; it is the errors that have nine values.",
            ),
        ),
        praise="A teacher who errs at one step in five still gets a third of the five-step sums right.",
    ),
    Exercise(
        id="09.5",
        title="pass@k without bias",
        difficulty=3,
        importance=4,
        minutes=12,
        hints=(
            "Draw k of the n samples that you have, without putting any back. When do all of them fail?",
            "There are C(n, k) ways to draw, and C(n − c, k) of them take only wrong ones.",
            "`math.comb(n - c, k)` is 0 where there are fewer than k wrong ones.",
        ),
        observe=_observe_pass,
        solution=_pass,
        mistakes=(
            Mistake(
                "plugged in",
                lambda samples, right, k: 1 - (1 - right / samples) ** k,
                "you put the estimate c/n into 1 − (1 − p)ᵏ. That function bends, so the noise of c/n does not average "
                "out: the result is too low on average. Drawing *without* replacement has no bias.",
            ),
            Mistake(
                "all k right",
                lambda samples, right, k: math.comb(right, k) / math.comb(samples, k),
                "this is the probability that all k are right. pass@k asks for at least one.",
            ),
            Mistake(
                "all k wrong",
                lambda samples, right, k: math.comb(samples - right, k) / math.comb(samples, k),
                "this is the probability that none of the k is right: one minus it is wanted.",
            ),
            Mistake(
                "k times as good",
                lambda samples, right, k: min(1.0, k * right / samples),
                "k·p is an upper bound that counts draws with two successes twice.",
            ),
            Mistake(
                "any success at all",
                lambda samples, right, k: float(right > 0),
                "you answer pass@n: whether any of all n samples is right. Only k of them may be looked at.",
            ),
        ),
        praise="With k = n it is 1 as soon as anything is right; with k = 1 it is the plain score.",
    ),
)
"""What the lab asks, from mixed groups to pass@k."""
