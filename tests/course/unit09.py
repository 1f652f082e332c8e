"""Two right answers to each exercise of lab 09, written differently from its solution."""

from fractions import Fraction
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor


def mixed_by_counting(p: float, group_size: int) -> float:
    """Add up the binomial over the numbers of right answers that are neither 0 nor G."""
    return sum(comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in range(1, group_size))


def mixed_by_enumeration(p: float, group_size: int) -> float:
    """Write down every group of rewards."""
    total = 0.0
    for rewards in product((0, 1), repeat=group_size):
        if 0 < sum(rewards) < group_size:
            total += p ** sum(rewards) * (1 - p) ** (group_size - sum(rewards))
    return total


def advantage_by_counting(p: float, group_size: int) -> float:
    """Mean size with K right, over the binomial of K."""
    total = 0.0
    for k in range(group_size + 1):
        size = (k * abs(1 - k / group_size) + (group_size - k) * abs(0 - k / group_size)) / group_size
        total += comb(group_size, k) * p**k * (1 - p) ** (group_size - k) * size
    return total


def advantage_by_enumeration(p: float, group_size: int) -> Tensor:
    """Every group of rewards as a row of a table."""
    rewards = torch.tensor(list(product((0.0, 1.0), repeat=group_size)), dtype=torch.float64)
    probability = (rewards * p + (1 - rewards) * (1 - p)).prod(1)
    return probability @ (rewards - rewards.mean(1, keepdim=True)).abs().mean(1)


def sft_by_loops(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    """One token at a time."""
    terms = []
    for i in range(len(tokens)):
        for t in range(prompt_length, tokens.shape[1]):
            if tokens[i, t] != pad:
                z = logits[i, t - 1]
                terms.append(z.exp().sum().log() - z[tokens[i, t]])
    return torch.stack(terms).sum() / len(terms)


def sft_by_cross_entropy(logits: Tensor, tokens: Tensor, prompt_length: int, pad: int) -> Tensor:
    """PyTorch's own, with the labels that are not to be learned set to −100."""
    labels = tokens.masked_fill(tokens == pad, -100)
    labels[:, :prompt_length] = -100
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def teacher_by_recursion(error_rate: float, steps: int) -> float:
    """Step by step: stay right, or be corrected by luck."""
    right = 1.0
    for _ in range(steps):
        right = (1 - error_rate) * right + error_rate / 9 * (1 - right)
    return right


def teacher_by_transitions(error_rate: float, steps: int) -> Tensor:
    """The 10 × 10 table of transitions between offsets, to the power of the number of steps."""
    table = torch.full((10, 10), error_rate / 9, dtype=torch.float64)
    table.fill_diagonal_(1 - error_rate)
    return torch.linalg.matrix_power(table, steps)[0, 0]


def pass_by_product(samples: int, right: int, k: int) -> float:
    """Draw one after the other: the chance that each is wrong, given that those before were."""
    none = Fraction(1)
    for drawn in range(k):
        none *= Fraction(max(0, samples - right - drawn), samples - drawn)
    return float(1 - none)


def pass_by_enumeration(samples: int, right: int, k: int) -> float:
    """All draws, or for many of them the sum over the number of right ones in a draw."""
    if comb(samples, k) > 1000:
        return sum(comb(right, i) * comb(samples - right, k - i) for i in range(1, k + 1)) / comb(samples, k)
    draws = list(combinations([1] * right + [0] * (samples - right), k))
    return sum(max(draw) for draw in draws) / len(draws)


RIGHT = {
    "09.1": (mixed_by_counting, mixed_by_enumeration),
    "09.2": (advantage_by_counting, advantage_by_enumeration),
    "09.3": (sft_by_loops, sft_by_cross_entropy),
    "09.4": (teacher_by_recursion, teacher_by_transitions),
    "09.5": (pass_by_product, pass_by_enumeration),
}
