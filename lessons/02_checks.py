"""Proofs of the equations in 02_first_order.md: exact enumeration in float64; orders are measured as log–log slopes."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from minirl_edu.diagnostics import first_order_gap
from minirl_edu.exact import (
    TabularPolicy,
    objective_remainder,
    sequence_gradient,
    sequence_objective,
    token_gradient,
    token_objective,
    token_ratios,
)

VOCABULARY, LENGTH = 3, 4  # the last word ends a response: 15 prefixes, 31 responses


def policies(distance: float = 0.6, length: int = LENGTH, seed: int = 0) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """π_θ, μ_old and a reward for every response."""
    mu_old = TabularPolicy.random(VOCABULARY, length, seed=seed)
    pi = mu_old.moved(TabularPolicy.random(VOCABULARY, length, seed=seed + 1).logits, distance)
    generator = torch.Generator().manual_seed(seed + 2)
    return pi, mu_old, torch.rand(len(mu_old.tokens), generator=generator, dtype=torch.float64)


def steps_of(policy: TabularPolicy) -> list[list[tuple[int, int]]]:
    """For every response its (row of logits, word) pairs, one per token."""
    return [
        list(zip(rows[real].tolist(), words[real].tolist(), strict=True))
        for rows, words, real in zip(policy.prefix, policy.tokens, policy.mask, strict=True)
    ]


def by_loops(pi: TabularPolicy, mu_old: TabularPolicy, rewards: Tensor) -> Tensor:
    """(3), one response and one token after the other."""
    p, m = pi.logits.softmax(-1), mu_old.logits.softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for y, reward in zip(steps_of(mu_old), rewards, strict=True):
        drawn = math.prod(m[row, word].item() for row, word in y)
        total = total + drawn * reward * sum(p[row, word] / m[row, word] for row, word in y)
    return total


def finite_differences(function: Callable[[TabularPolicy], Tensor], policy: TabularPolicy) -> Tensor:
    """The gradient of function(policy) with respect to its logits, by central differences."""
    gradient, step = torch.zeros_like(policy.logits), 1e-5
    for row, word in itertools.product(*map(range, gradient.shape)):
        nudge = torch.zeros_like(gradient)
        nudge[row, word] = step
        gradient[row, word] = (function(policy.moved(nudge)) - function(policy.moved(nudge, -1.0))) / (2 * step)
    return gradient


def equal(left: Tensor, right: Tensor, atol: float = 1e-12) -> None:
    """Assert equality to the rounding of float64 (or to `atol`, for finite differences)."""
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def slope(x: Tensor, y: Tensor) -> float:
    """Of log y over log x, by least squares."""
    x, y = x.log() - x.log().mean(), y.log()
    return ((x * y).sum() / x.square().sum()).item()


def check_02_token_objective() -> None:
    """The library's value against two loops, and against the sequence objective, from which it differs."""
    pi, mu_old, rewards = policies()
    equal(token_objective(pi, mu_old, rewards), by_loops(pi, mu_old, rewards))
    assert (token_objective(pi, mu_old, rewards) - sequence_objective(pi, mu_old, rewards)).abs() > 0.1


def check_02_token_gradient() -> None:
    """The right-hand side by a loop over responses and tokens, and the library's, against finite differences of (3)."""
    pi, mu_old, rewards = policies()
    p, m = pi.logits.softmax(-1), mu_old.logits.softmax(-1)
    right = torch.zeros_like(p)
    for y, reward in zip(steps_of(mu_old), rewards, strict=True):
        drawn = math.prod(m[row, word].item() for row, word in y)
        for row, word in y:
            score = torch.eye(VOCABULARY, dtype=torch.float64)[word] - p[row]
            right[row] += drawn * reward * p[row, word] / m[row, word] * score
    left = finite_differences(lambda policy: token_objective(policy, mu_old, rewards), pi)
    equal(right, left, atol=1e-9)
    equal(token_gradient(pi, mu_old, rewards), right)


def check_02_expansion() -> None:
    """All subsets of six numbers; and with numbers ten times smaller, what is left after each order shrinks by the
    power of ten of the next one."""
    delta = torch.tensor([0.3, -0.2, 0.1, 0.25, -0.15, 0.05], dtype=torch.float64)

    def terms(delta: Tensor, size: int) -> float:
        return sum(math.prod(subset) for subset in itertools.combinations(delta.tolist(), size))

    total = sum(terms(delta, size) for size in range(len(delta) + 1))
    assert abs((1 + delta).prod().item() - total) < 1e-14
    for order in (1, 2, 3):
        left = [
            abs((1 + d).prod().item() - sum(terms(d, size) for size in range(order + 1)))
            for d in (delta * 1e-1, delta * 1e-2)
        ]
        assert abs(math.log10(left[0] / left[1]) - (order + 1)) < 0.1


def check_02_old_value() -> None:
    """Prefix by prefix: how often μ_old comes there, what π_θ would write next, and the mean reward when μ_old goes
    on, from the table of all responses."""
    pi, mu_old, rewards = policies()
    p, joint = pi.logits.softmax(-1), mu_old.response_probs()
    total, steps = torch.zeros((), dtype=torch.float64), steps_of(mu_old)
    for row in range(len(p)):
        here = [y for y in range(len(steps)) if any(r == row for r, _ in steps[y])]
        for word in range(VOCABULARY):
            on = [y for y in here if (row, word) in steps[y]]
            value = (joint[on] * rewards[on]).sum() / joint[on].sum()
            total += joint[here].sum() * p[row, word] * value
    equal(total, token_objective(pi, mu_old, rewards))


def check_02_equal_gradients() -> None:
    """At μ_old both equal finite differences of the expected reward; at a distance they are not equal."""
    pi, mu_old, rewards = policies()
    exact = finite_differences(lambda policy: (policy.response_probs() * rewards).sum(), mu_old)
    equal(token_gradient(mu_old, mu_old, rewards), exact, atol=1e-9)
    equal(sequence_gradient(mu_old, mu_old, rewards), exact, atol=1e-9)
    assert (token_gradient(pi, mu_old, rewards) - sequence_gradient(pi, mu_old, rewards)).norm() > 0.01


def check_02_remainder() -> None:
    """The left side from the four values of the objectives, the right side from products and sums of ratios. δ_t has
    mean zero at every prefix, so a constant added to the reward changes nothing, and alone it leaves nothing."""
    pi, mu_old, rewards = policies()
    change_seq = sequence_objective(pi, mu_old, rewards) - sequence_objective(mu_old, mu_old, rewards)
    change_token = token_objective(pi, mu_old, rewards) - token_objective(mu_old, mu_old, rewards)
    delta = token_ratios(pi, mu_old) - 1
    right = (mu_old.response_probs() * ((1 + delta).prod(1) - 1 - delta.sum(1)) * rewards).sum()
    equal(change_seq - change_token, right)
    equal(objective_remainder(pi, mu_old, rewards), right)
    assert right.abs() > 1e-3
    zero = torch.zeros((), dtype=torch.float64)
    for row in range(len(mu_old.logits)):
        here = (mu_old.prefix == row) & mu_old.mask
        equal((mu_old.response_probs()[:, None] * delta)[here].sum(), zero)
    equal(objective_remainder(pi, mu_old, rewards - 0.7), right)
    equal(objective_remainder(pi, mu_old, torch.ones_like(rewards)), zero)


def check_02_gradient_error() -> None:
    """The right-hand side, token by token, against the difference of the library's two gradients and against finite
    differences of the remainder."""
    pi, mu_old, rewards = policies()
    ratios, p = token_ratios(pi, mu_old), pi.logits.softmax(-1)
    right = torch.zeros_like(p)
    for y, steps in enumerate(steps_of(mu_old)):
        drawn = mu_old.response_probs()[y] * rewards[y]
        for t, (row, word) in enumerate(steps):
            others = math.prod(ratios[y, s].item() for s in range(len(steps)) if s != t)
            score = torch.eye(VOCABULARY, dtype=torch.float64)[word] - p[row]
            right[row] += drawn * ratios[y, t] * (others - 1) * score
    equal(sequence_gradient(pi, mu_old, rewards) - token_gradient(pi, mu_old, rewards), right)
    equal(finite_differences(lambda policy: objective_remainder(policy, mu_old, rewards), pi), right, atol=1e-9)


def check_02_orders() -> None:
    """Slopes over a decade of distances, for three random problems: 2 and 1, each within 0.1. As shares of the
    objective's change and of the gradient both are 1. The next order bends the lines by about a step, 1e-2, so 0.1 is
    generous and no other integer is near."""
    for seed in (0, 10, 20):
        steps = torch.logspace(-3, -2, 6, dtype=torch.float64)
        remainder, change, gradient_error, gradient = [], [], [], []
        for step in steps.tolist():
            pi, mu_old, rewards = policies(step, seed=seed)
            remainder.append(objective_remainder(pi, mu_old, rewards).abs())
            change.append((sequence_objective(pi, mu_old, rewards) - sequence_objective(mu_old, mu_old, rewards)).abs())
            gradient.append(sequence_gradient(pi, mu_old, rewards).norm())
            difference = sequence_gradient(pi, mu_old, rewards) - token_gradient(pi, mu_old, rewards)
            gradient_error.append(difference.norm())
        errors = torch.stack(remainder), torch.stack(gradient_error)
        assert abs(slope(steps, errors[0]) - 2) < 0.1
        assert abs(slope(steps, errors[1]) - 1) < 0.1
        assert abs(slope(steps, errors[0] / torch.stack(change)) - 1) < 0.1
        assert abs(slope(steps, errors[1] / torch.stack(gradient)) - 1) < 0.1


def independent_tokens(length: int, distance: float) -> tuple[TabularPolicy, TabularPolicy, float]:
    """π and μ that never end early and have the same row of logits after every prefix; χ² per token."""
    rows = sum(2**t for t in range(length))
    mu_row = torch.tensor([0.0, 0.2, -1000.0], dtype=torch.float64)
    pi_row = mu_row + distance * torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    p, m = pi_row.softmax(-1)[:2], mu_row.softmax(-1)[:2]
    pi, mu = (TabularPolicy(row.expand(rows, 3), length) for row in (pi_row, mu_row))
    return pi, mu, ((p - m) ** 2 / m).sum().item()


def check_02_size() -> None:
    """E[D²] by enumeration of all responses of 1 to 7 tokens against the closed form; for a small χ² the leading term,
    whose neglected next one is (T − 2)/3·χ² ≤ 2 % of it; and the exponents: 4 in δ (χ² has 2), near 2 in the length."""
    roots = []
    for length in range(1, 8):
        for distance in (0.02, 0.4):
            pi, mu, chi_square = independent_tokens(length, distance)
            delta = (token_ratios(pi, mu) - 1)[mu.mask.all(1)]
            probs = mu.response_probs()[mu.mask.all(1)]
            dropped = (1 + delta).prod(1) - 1 - delta.sum(1)
            size = (probs * dropped**2).sum().item()
            assert abs(size - ((1 + chi_square) ** length - 1 - length * chi_square)) < 1e-12
            others = (1 + delta)[:, 1:].prod(1)  # what the first token's weight is missing
            assert abs((probs * (others - 1) ** 2).sum() - ((1 + chi_square) ** (length - 1) - 1)) < 1e-12
            if distance == 0.02 and length > 1:
                leading = length * (length - 1) / 2 * chi_square**2
                assert abs(size / leading - 1) < 0.02
                roots.append(math.sqrt(size))
    lengths = torch.arange(2, 8, dtype=torch.float64)
    pairs = slope(lengths, (lengths * (lengths - 1) / 2).sqrt())
    assert abs(slope(lengths, torch.tensor(roots, dtype=torch.float64)) - pairs) < 0.01


def check_02_gap() -> None:
    """The library's gap on four responses of different lengths, padded with nonsense, against plain Python."""
    log_ratios = [[0.1, -0.2, 0.3], [0.5], [-0.4, 0.4], [0.0, 0.2, 0.2]]
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in log_ratios])
    logp_rollout = torch.full((4, 3), -1.0, dtype=torch.float64)
    logp = torch.tensor([[-1 + x for x in y] + [99.0] * (3 - len(y)) for y in log_ratios], dtype=torch.float64)
    expected = 0.0
    for y in log_ratios:
        ratios = [math.exp(x) for x in y]
        expected += abs(math.prod(ratios) - (1 + sum(r - 1 for r in ratios))) / len(log_ratios)
    equal(first_order_gap(logp, logp_rollout, mask), torch.tensor(expected, dtype=torch.float64))
    assert expected > 0.01
