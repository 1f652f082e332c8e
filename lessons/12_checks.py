"""Proves the equations of lesson 12, evidence, by quadrature, by counting, and against the library's numbers."""

import math
from itertools import product

import numpy as np
from scipy.stats import binomtest

from minirl_edu.experiments.statistics import equivalent, mean_effect, paired_difference, t_quantile


def check_12_interval() -> None:
    """Student's t from its density by quadrature; the library's interval; and it covers a true mean 95 % of the time,
    where ±1.96 standard errors do not."""
    for df in (4, 7):
        t = np.linspace(-400, t_quantile(0.975, df), 2_000_001)
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        assert abs(np.trapezoid(scale * (1 + t**2 / df) ** (-(df + 1) / 2), t) - 0.975) < 1e-5
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(40_000, 8))
    mean, error = draws.mean(1), draws.std(1, ddof=1) / math.sqrt(8)
    # The standard error of a coverage of 95 % over 40,000 draws is 0.1 %.
    assert abs((abs(mean - 0.3) <= t_quantile(0.975, 7) * error).mean() - 0.95) < 0.005
    assert (abs(mean - 0.3) <= 1.96 * error).mean() < 0.92
    found = mean_effect(draws[0])
    assert math.isclose(found.high - found.estimate, t_quantile(0.975, 7) * error[0], rel_tol=1e-9)


def check_12_paired() -> None:
    """The variance of a difference, by the library's paired interval: what two runs share drops out of it."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1.0, 10)
    a, b = shared + rng.normal(0.2, 0.3, 10), shared + rng.normal(0.0, 0.3, 10)
    (var_a, cov), (_, var_b) = np.cov(a, b)
    found = paired_difference(a, b)
    half = t_quantile(0.975, 9) * math.sqrt((var_a + var_b - 2 * cov) / 10)
    assert math.isclose(found.high - found.estimate, half, rel_tol=1e-9)
    assert math.isclose(found.estimate, a.mean() - b.mean(), rel_tol=1e-9)
    assert half < 0.5 * t_quantile(0.975, 9) * math.sqrt((var_a + var_b) / 10)  # unpaired


def check_12_flips() -> None:
    """The p-value by writing down every sign pattern, against the library's; its floor is 2^(1 − n)."""
    for values in ((0.5, -0.2, 0.9), (0.3, 0.1, 0.4, 0.2), (-1.0, -2.0, 0.5, -0.1, -0.4)):
        observed = abs(sum(values))
        patterns = product((1, -1), repeat=len(values))
        sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in patterns]
        by_hand = sum(s >= observed - 1e-12 for s in sums) / len(sums)
        assert math.isclose(mean_effect(np.array(values)).p, by_hand)
    assert mean_effect(np.linspace(1.0, 2.0, 8)).p == 2.0**-7


def check_12_wilson() -> None:
    """Both ends are z standard errors of their own from k/n, and everything between them is nearer; scipy agrees; and
    with 8 seeds some rates are covered less than 90 % of the time, the exact interval's never less than 95 %."""
    z = 1.959963984540054

    def wilson(k: int, n: int) -> tuple[float, float]:
        share, c = k / n, z * z / n
        half = z * math.sqrt(share * (1 - share) / n + c / (4 * n))
        return (share + c / 2 - half) / (1 + c), (share + c / 2 + half) / (1 + c)

    for n in (3, 8, 20):
        for k in range(n + 1):
            low, high = wilson(k, n)
            for end in (low, high):
                assert math.isclose(abs(k / n - end), z * math.sqrt(max(0.0, end * (1 - end)) / n), abs_tol=1e-7)
            between = np.linspace(low, high, 12)[1:-1]
            assert (abs(k / n - between) < z * np.sqrt(between * (1 - between) / n)).all()
            known = binomtest(k, n).proportion_ci(0.95, method="wilson")
            assert math.isclose(low, known.low, abs_tol=1e-9) and math.isclose(high, known.high, abs_tol=1e-9)
    rates = np.linspace(0.005, 0.995, 199)
    chance = np.array([math.comb(8, k) * rates**k * (1 - rates) ** (8 - k) for k in range(9)])

    def covered(method: str) -> np.ndarray:
        ends = [binomtest(k, 8).proportion_ci(0.95, method=method) for k in range(9)]  # pyright: ignore
        return (chance * [(end.low <= rates) & (rates <= end.high) for end in ends]).sum(0)

    assert covered("wilson").min() < 0.90 and abs(covered("wilson").mean() - 0.95) < 0.01
    assert covered("exact").min() >= 0.95


def check_12_tost() -> None:
    """Two one-sided tests, each at 5 %: both reject exactly where the 90 % interval lies inside ±margin."""
    rng = np.random.default_rng(2)
    decided = set()
    for _ in range(300):
        a, b = rng.normal(0.01, 0.04, 8), rng.normal(0.0, 0.04, 8)
        difference, margin = a - b, 0.05
        error = difference.std(ddof=1) / math.sqrt(8)
        # Above −margin, and below +margin: each t-statistic past the one-sided quantile.
        critical = t_quantile(0.95, 7)
        both = (difference.mean() + margin) / error > critical and (margin - difference.mean()) / error > critical
        found = equivalent(a, b, margin)
        inside = -margin < found.low and found.high < margin
        assert both == inside == (found.p < 0.05)
        decided.add(both)
    assert decided == {True, False}


def check_12_looks() -> None:
    """Independent comparisons without any effect: the share of experiments with a false alarm, and the lesson's two."""
    noise = np.random.default_rng(3).normal(size=(20_000, 10, 8))
    alarm = abs(noise.mean(2)) > t_quantile(0.975, 7) * noise.std(2, ddof=1) / math.sqrt(8)
    for looks, quoted in ((1, 0.05), (3, 0.14), (10, 0.40)):
        exact = 1 - 0.95**looks
        assert abs(exact - quoted) < 0.005
        # The standard error over 20,000 experiments is at most 0.35 %.
        assert abs(alarm[:, :looks].any(1).mean() - exact) < 0.011
