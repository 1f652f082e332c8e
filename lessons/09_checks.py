"""Proves the labelled equations of lesson 09. Called by tests/lessons; each check is below ten seconds."""

import json
import math
import random
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.exact import TabularPolicy
from minirl_edu.models import COLD_STARTS
from minirl_edu.tasks import ChainTask


def _groups(p: float, group_size: int) -> tuple[Tensor, Tensor]:
    """Every group of rewards [2^G, G] and its probability."""
    rewards = torch.tensor(list(product((0.0, 1.0), repeat=group_size)), dtype=torch.float64)
    right = rewards.sum(1)
    return rewards, p**right * (1 - p) ** (group_size - right)


def _advantages(rewards: Tensor) -> Tensor:
    """The library's, of every group."""
    return group_mean_advantages(rewards.flatten(), rewards.shape[1]).view(rewards.shape)


def check_09_mixed():
    """All 2^G groups of rewards: those in which the library's advantages are not all zero, weighted."""
    for p, group_size in ((0.05, 8), (0.5, 3), (0.9, 4), (0.3, 2)):
        rewards, probability = _groups(p, group_size)
        mixed = (_advantages(rewards) != 0).any(1)
        assert math.isclose(probability[mixed].sum().item(), 1 - p**group_size - (1 - p) ** group_size)


def check_09_mean_advantage():
    """All groups, with the library's advantages."""
    for p, group_size in ((0.05, 8), (0.5, 3), (0.9, 4), (0.3, 2)):
        rewards, probability = _groups(p, group_size)
        mean = (probability @ _advantages(rewards).abs().mean(1)).item()
        assert math.isclose(mean, 2 * (group_size - 1) / group_size * p * (1 - p))


def check_09_forward_kl():
    """All responses of a teacher and a pupil; the KL the other way round does not fit."""
    teacher, pupil = TabularPolicy.random(4, 3, seed=0), TabularPolicy.random(4, 3, seed=1)
    t, log_t, log_p = teacher.response_probs(), teacher.log_probs().sum(1), pupil.log_probs().sum(1)
    loss = -(t * log_p).sum()
    entropy, forward = -(t * log_t).sum(), (t * (log_t - log_p)).sum()
    torch.testing.assert_close(loss, entropy + forward)
    backward = (log_p.exp() * (log_p - log_t)).sum()
    assert abs(loss - entropy - backward) > 0.1


def check_09_loss_floor():
    """The losses in the shipped cold_start.json, means of 50 batches, against the floor of their teachers."""
    task = ChainTask()
    operands = [len(p.prompt.rstrip("= ")) // 2 for p in task.sample(4000, seed=0)]
    steps = sum(operands) / len(operands)
    assert abs(steps - 3.5) < 0.05
    for name, width in (("chain-steps", 2), ("chain-operands", 3), ("chain-copy", 4), ("chain-steps-dense", 2)):
        made = json.loads(Path(COLD_STARTS, name, "cold_start.json").read_text())
        rate = made["error_rate"]
        entropy = -(1 - rate) * math.log(1 - rate) - rate * math.log(rate / 9)
        digit = torch.tensor([1 - rate] + [rate / 9] * 9, dtype=torch.float64)
        assert math.isclose(entropy, -(digit * digit.log()).sum().item())
        floor = 3.5 * entropy / (width * 3.5 + 1)
        if name == "chain-steps-dense":  # at its own ceiling: far above what its teacher would allow
            assert made["loss"] > 2 * floor
        else:  # 2 %: the noise of 50 batches, whose digits are drawn
            assert abs(made["loss"] / floor - 1) < 0.02
            assert abs(made["loss"] / (3.5 * entropy / (width * 3.5)) - 1) > 0.04  # without the end token


def check_09_teacher_score():
    """Every way to err in up to 4 steps, added up; also by products, where an operator is no addition it fails."""
    for rate in (0.06, 0.21, 0.7):
        for steps in (1, 2, 3, 4):
            right = 0.0
            for offsets in product(range(10), repeat=steps):
                chance = math.prod(1 - rate if offset == 0 else rate / 9 for offset in offsets)
                right += chance * (sum(offsets) % 10 == 0)
            assert math.isclose(right, 0.1 + 0.9 * (1 - 10 * rate / 9) ** steps)
    rng, task = random.Random(0), ChainTask(min_operands=5, max_operands=5)
    problems = task.sample(4000, seed=0)
    score = sum(task.reward(p, task.demonstration(p, rng=rng, error_rate=0.21)) for p in problems) / len(problems)
    formula = 0.1 + 0.9 * (1 - 10 * 0.21 / 9) ** 4
    assert abs(score - formula) < 4 * math.sqrt(formula * (1 - formula) / len(problems))
    # 3 * 4 * 0 is right whatever went wrong before the last step
    assert abs(_by_transitions("3*4*0", 0.21) - 0.79) < 1e-12
    assert abs(_by_transitions("3+4+9", 0.21) - (0.1 + 0.9 * (1 - 10 * 0.21 / 9) ** 2)) < 1e-12


def _by_transitions(expression: str, rate: float) -> float:
    """Probability that a teacher's last digit is right, from the distribution of the running result."""
    apply = {"+": lambda a, b: a + b, "*": lambda a, b: a * b}
    now, truth = [float(d == int(expression[0])) for d in range(10)], int(expression[0])
    for operator, operand in zip(expression[1::2], expression[2::2], strict=True):
        truth = apply[operator](truth, int(operand)) % 10
        after = [0.0] * 10
        for d, chance in enumerate(now):
            good = apply[operator](d, int(operand)) % 10
            for e in range(10):
                after[e] += chance * (1 - rate if e == good else rate / 9)
        now = after
    return now[truth]


def check_09_sharpened():
    """The tempered distribution of a step by its definition, then the sums of all ways to err."""
    rate, steps = 0.21, 3
    for temperature in (0.3, 1.0, 1.7):
        digit = torch.full((10,), rate / 9, dtype=torch.float64)
        digit[0] = 1 - rate
        tempered = (digit.log() / temperature).softmax(0)
        sharp = 1 / (1 + ((1 - rate) * 9 / rate) ** (1 / temperature) / 9)
        assert math.isclose(1 - tempered[0].item(), sharp)
        score = sum(
            math.prod(tempered[o].item() for o in offsets)
            for offsets in product(range(10), repeat=steps)
            if sum(offsets) % 10 == 0
        )
        assert math.isclose(score, 0.1 + 0.9 * (1 - 10 * sharp / 9) ** steps)


def check_09_pass_unbiased():
    """The binomial of c, exactly: the estimator's mean is 1 − (1 − p)^k, that of the plug-in lies below."""
    n = 12
    for p, k in ((0.1, 4), (0.5, 3), (0.03, 12), (0.7, 1)):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(q * (1 - math.comb(n - c, k) / math.comb(n, k)) for c, q in enumerate(chance))
        assert math.isclose(mean, 1 - (1 - p) ** k)
        plugged = sum(q * (1 - (1 - c / n) ** k) for c, q in enumerate(chance))
        assert plugged < mean - 1e-4 or k == 1
