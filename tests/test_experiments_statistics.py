"""Intervals and p-values against SciPy's and a textbook's, and against what they promise: how often they are right.

Constants marked SciPy were computed with SciPy 1.17.1, those marked statsmodels with statsmodels 0.15.0, by the call
named beside them: they hold the library's choice of function and arguments. rtol 1e-9 is far above rounding and far
below any wrong formula.
"""

import math
from itertools import product

import numpy as np
import pytest

from minirl_edu.experiments.spec import COLUMNS, METRICS, Definitions, RunResult
from minirl_edu.experiments.statistics import (
    binomial_p,
    difference_of_proportions,
    equivalent,
    holm,
    mean_effect,
    paired_difference,
    proportion,
    summary,
    t_quantile,
)

A = np.array([0.81, 0.79, 0.84, 0.77, 0.80, 0.83, 0.78, 0.82])
B = np.array([0.78, 0.77, 0.80, 0.78, 0.77, 0.79, 0.76, 0.80])

# ------------------------------------------------------------------------------------------------------------ means


@pytest.mark.parametrize(
    ("q", "df", "expected"),  # SciPy: stats.t.ppf
    [
        (0.975, 1, 12.706204736174694),
        (0.975, 2, 4.302652729749462),
        (0.975, 7, 2.364624251592784),
        (0.95, 7, 1.8945786050900062),
        (0.95, 2, 2.9199855803537242),
        (0.975, 100, 1.9839715185235518),
        (0.6, 5, 0.2671808657041451),
    ],
)
def test_quantiles_of_students_t(q, df, expected):
    assert t_quantile(q, df) == pytest.approx(expected, rel=1e-9)
    assert t_quantile(1 - q, df) == pytest.approx(-expected, rel=1e-9)


def test_paired_difference():
    effect = paired_difference(A, B)
    assert effect.estimate == pytest.approx(0.02375)
    # SciPy: stats.ttest_1samp(A - B, 0).confidence_interval(0.95)
    assert (effect.low, effect.high) == pytest.approx((0.010390470874117421, 0.037109529125882536), rel=1e-9)
    # SciPy: stats.permutation_test((A - B,), mean, permutation_type="samples", n_resamples=inf)
    assert effect.p == 0.015625
    assert effect.n == 8


def test_the_interval_is_the_figures():
    """`diagnostics.mean_interval` draws the bands."""
    from minirl_edu.diagnostics import mean_interval

    mean, half = mean_interval(A[:, None])
    effect = mean_effect(A)
    assert effect.estimate == pytest.approx(mean[0])
    assert effect.high - effect.estimate == pytest.approx(half[0], rel=1e-9)


def test_pairing_takes_out_what_the_seeds_share():
    hard = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    noise = 0.01 * np.array([1, -1, 1, -1, 1, -1])
    paired = paired_difference(hard + 0.05 + noise, hard)
    assert paired.low > 0.03 and paired.p == pytest.approx(2 / 64)


def test_sign_flips_by_hand():
    # Of the 8 patterns only + + + and − − − reach a sum of 6 or more; of 1, 2, −3 all eight reach 0.
    assert mean_effect(np.array([1.0, 2.0, 3.0])).p == 2 / 8
    assert mean_effect(np.array([1.0, 2.0, -3.0])).p == 1.0
    # Without `null` the sum is 0 and p is 1; less −1 the values are 1.9, 3 and −1.9: 6 patterns reach 3.
    assert mean_effect(np.array([0.9, 2.0, -2.9]), null=-1.0).p == 6 / 8
    # 0.1 + 0.2 − 0.3 is not 0 in binary: every pattern reaches 0.01, some of them but for the last digit.
    assert mean_effect(np.array([0.1, 0.2, -0.3, 0.01])).p == 1.0
    assert mean_effect(np.zeros(4)).p == 1.0


def test_sampled_sign_flips_agree_with_all_of_them():
    values = np.random.default_rng(1).normal(0.5, 1, 14)
    sums = np.abs(np.array(list(product((1, -1), repeat=14))) @ values)
    exact = float((sums >= abs(values.sum()) - 1e-9).mean())
    # 100,000 samples: three standard errors.
    assert mean_effect(values).p == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 100_000))
    assert 0 < mean_effect(np.full(40, 1.0)).p < 1e-3  # never 0, which no number of samples could show


def test_one_seed_excludes_nothing():
    effect = mean_effect(np.array([0.9]))
    assert (effect.low, effect.high, effect.p) == (-math.inf, math.inf, 1.0)
    effect = equivalent(np.array([0.9]), np.array([0.9]), 0.1)
    assert (effect.low, effect.high, effect.p) == (-math.inf, math.inf, 1.0)


@pytest.mark.parametrize("n", [3, 8])
def test_the_t_interval_covers_the_mean_95_times_in_100(n):
    rng, runs = np.random.default_rng(n), 3000
    effects = [mean_effect(rng.normal(0.3, 1.0, n)) for _ in range(runs)]
    covered = np.mean([effect.low <= 0.3 <= effect.high for effect in effects])
    assert 0.93 < covered < 0.97  # five standard errors of 0.4 % on either side


def test_the_sign_flip_test_keeps_its_promise_without_a_normal_distribution():
    rng, runs = np.random.default_rng(0), 3000
    # Cauchy: no mean, no variance. 8 seeds: p ≤ 0.05 happens for 12 of 256 patterns, 4.7 %.
    false = np.mean([mean_effect(rng.standard_cauchy(8)).p <= 0.05 for _ in range(runs)])
    assert 0.03 < false < 0.06


# ------------------------------------------------------------------------------------------------------ equivalence


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    effect = equivalent(A, B, 0.05)
    # SciPy: stats.ttest_1samp(A - B, 0).confidence_interval(0.90)
    assert (effect.low, effect.high) == pytest.approx((0.013046109925741919, 0.03445389007425804), rel=1e-9)
    # SciPy: the larger p of ttest_1samp(d, -0.05, alternative="greater") and (d, 0.05, "less")
    assert effect.p == pytest.approx(0.0011761480122670642, rel=1e-9)
    for margin in (0.034, 0.035):  # the interval ends at 0.03445
        assert (equivalent(A, B, margin).p < 0.05) == (effect.high < margin)
        assert equivalent(B, A, margin).p == pytest.approx(equivalent(A, B, margin).p)


def test_equivalence_of_constant_differences():
    assert equivalent(A, A, 0.01).p == 0
    assert equivalent(A + 0.5, A, 0.25).p == 1


def test_different_means_are_rarely_called_equivalent():
    """At the margin itself the error is largest: 5 %."""
    rng, runs, margin = np.random.default_rng(2), 3000, 0.3
    wrong = np.mean(
        [equivalent(rng.normal(margin, 0.2, 8), np.zeros(8), margin).p < 0.05 for _ in range(runs)],
    )  # fmt: skip
    assert 0.03 < wrong < 0.07


# ------------------------------------------------------------------------------------------------------------ rates


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),  # SciPy: stats.binomtest(k, n).proportion_ci(method="exact")
    [
        (0, 8, 0.0, 0.3694166475528192),
        (8, 8, 0.6305833524471808, 1.0),
        (1, 8, 0.003159723531252275, 0.5265096708751638),
        (5, 8, 0.2448632163664999, 0.9147665858624069),
        (3, 3, 0.2924017738212867, 1.0),
        (37, 100, 0.2755665796145391, 0.4723516405516859),
    ],
)
def test_rates_and_their_interval(k, n, low, high):
    assert proportion(k, n) == pytest.approx((k / n, low, high), rel=1e-9)


def test_the_interval_of_a_rate_is_never_too_short():
    """Exactly, not by simulation: the probability of all k whose interval holds the true rate."""
    for n in (3, 8):
        intervals = [proportion(k, n)[1:] for k in range(n + 1)]
        for rate in np.linspace(0.005, 0.995, 199):
            chances = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
            covered = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= rate <= high)
            assert covered >= 0.95


def test_exact_binomial_test():
    # SciPy: stats.binomtest(k, 8, 0.5).pvalue; at 0.5 both definitions of "two-sided" agree.
    assert binomial_p(8, 8, 0.5) == pytest.approx(0.0078125)
    assert binomial_p(1, 8, 0.5) == pytest.approx(0.0703125)
    assert binomial_p(4, 8, 0.5) == 1.0
    for k, rate in product(range(9), (0.25, 0.5, 0.8)):  # significant where the interval excludes the rate
        _, low, high = proportion(k, 8)
        assert (binomial_p(k, 8, rate) < 0.05) == (not low <= rate <= high)


def paired(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_difference_of_paired_rates():
    effect = difference_of_proportions(*paired(1, 5, 1, 3))
    assert effect.estimate == pytest.approx(0.4)
    # statsmodels: stats.contingency_tables.mcnemar([[1, 5], [1, 3]], exact=True).pvalue
    assert effect.p == pytest.approx(0.21875)
    # An example of Newcombe's (1998), method 10: 36, 12, 2 and 0 pairs.
    effect = difference_of_proportions(*paired(36, 12, 2, 0))
    assert (round(effect.low, 4), round(effect.high, 4)) == (0.0569, 0.3404)
    # A strong correlation, which narrows the interval: Newcombe's formulas with statsmodels' Wilson limits,
    # stats.proportion.proportion_confint(k, 41, method="wilson").
    correlated = difference_of_proportions(*paired(14, 5, 0, 22))
    assert (correlated.low, correlated.high) == pytest.approx((0.01148324138303325, 0.2264926843512112), rel=1e-9)
    mirrored = difference_of_proportions(*reversed(paired(36, 12, 2, 0)))
    assert (mirrored.low, mirrored.high) == pytest.approx((-effect.high, -effect.low))


def test_six_seeds_can_tell_two_rates_apart_and_five_cannot():
    assert difference_of_proportions(*paired(0, 6, 0, 0)).p == pytest.approx(2 / 64)
    assert difference_of_proportions(*paired(0, 5, 0, 0)).p == pytest.approx(2 / 32)
    assert difference_of_proportions(*paired(4, 0, 0, 4)).p == 1.0


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_the_interval_of_a_difference_covers_it_about_95_times_in_100(shared):
    """With 12 seeds, whose fate two methods share (the same draw for both) or not."""
    rng, runs, covered = np.random.default_rng(4), 600, 0
    for _ in range(runs):
        own_a, own_b, together = rng.random((3, 12))
        common = rng.random(12) < shared
        effect = difference_of_proportions(
            np.where(common, together, own_a) < 0.7, np.where(common, together, own_b) < 0.3
        )
        covered += effect.low <= 0.4 <= effect.high
    # Approximate by construction; four standard errors are 3.6 %.
    assert 0.91 < covered / runs < 0.99


def test_holm():
    # statsmodels: stats.multitest.multipletests(p, method="holm")[1]
    assert holm([0.01, 0.04, 0.03, 0.005, 0.6]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert holm([]) == []


# -------------------------------------------------------------------------------------------------------- summaries

DEFINITIONS = Definitions(final_evaluations=2, collapse_share=0.7)


def run(scores, *, diverged=None, every=10, **columns) -> RunResult:
    """A run that was evaluated every so many gradient steps."""
    steps = np.arange((len(scores) - 1) * every + 1.0)
    metrics = {name: np.full(len(steps), math.nan) for name in COLUMNS}
    metrics["grad_step"] = metrics["global_step"] = steps
    metrics["score"][::every] = scores
    for name, values in columns.items():
        metrics[name] = np.asarray(values, dtype=np.float64)
    return RunResult(seed=0, metrics=metrics, diverged=diverged, digest="", seconds=1.0)


def test_scores_of_a_run():
    numbers = summary(run([0.4, 0.6, 0.8, 0.7]), DEFINITIONS)
    assert numbers["first_score"] == 0.4
    assert numbers["final_score"] == pytest.approx(0.75)
    assert numbers["best_score"] == pytest.approx(0.75)  # a single lucky evaluation does not make a peak
    assert numbers["auc_score"] == pytest.approx((0.5 + 0.7 + 0.75) / 3)
    assert (numbers["collapsed"], numbers["collapse_step"], numbers["diverged"]) == (False, None, False)
    assert METRICS.keys() <= numbers.keys()


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([0.4, 0.8, 0.8, 0.2, 0.2, 0.2], 30),  # the mean of 0.8 and 0.2 is below 0.7 × the best
        ([0.4, 0.8, 0.8, 0.2, 0.2, 0.8, 0.8], None),  # it recovered
        ([0.4, 0.8, 0.8, 0.1, 0.8, 0.8, 0.1, 0.1], 60),  # only the last fall counts
        ([0.8, 0.7, 0.62, 0.56], None),  # a slow decline within the limit
        ([0.8, 0.1, 0.1], 10),  # at once
        ([0.8, 0.8, 0.8, 0.4], None),  # one low evaluation at the end is not yet a collapse
    ],
)
def test_collapse_and_when(scores, step):
    numbers = summary(run(scores), DEFINITIONS)
    assert numbers["collapsed"] == (step is not None)
    assert numbers["collapse_step"] == step


def test_a_diverged_run_has_collapsed_and_ends_at_zero():
    numbers = summary(run([0.4, 0.8, 0.9], diverged="global step 3: a gradient norm of nan"), DEFINITIONS)
    assert numbers["final_score"] == 0.0
    assert numbers["best_score"] == pytest.approx(0.85)
    assert (numbers["collapsed"], numbers["collapse_step"], numbers["diverged"]) == (True, 20, True)


def test_the_rollout_engines_scores_are_summarised_on_their_own():
    rollout = np.full(31, math.nan)
    rollout[::10] = [0.4, 0.8, 0.3, 0.3]
    numbers = summary(run([0.4, 0.8, 0.8, 0.9], score_rollout=rollout), DEFINITIONS)
    assert (numbers["final_score"], numbers["final_score_rollout"]) == pytest.approx((0.85, 0.3))
    assert (numbers["collapsed"], numbers["collapsed_rollout"]) == (False, True)
    assert numbers["collapse_step_rollout"] == 30


def test_entropy_and_kl_of_a_run():
    entropy = np.concatenate([[math.nan], np.full(20, 1.0), np.full(10, 0.1)])
    kl = np.concatenate([[math.nan], np.full(20, 1e-3), np.full(9, 2e-3), [50.0]])  # a spike at the end
    numbers = summary(run([0.4, 0.5, 0.6, 0.7], entropy=entropy, k3_rollout_old=kl), DEFINITIONS)
    assert numbers["final_entropy"] == pytest.approx(0.1)
    assert numbers["mean_entropy"] == pytest.approx(0.7)
    assert numbers["kl"] == pytest.approx(2e-3)


def test_what_was_not_measured_is_nan():
    numbers = summary(run([math.nan, math.nan]), DEFINITIONS)
    missing = ("first_score", "final_score", "best_score", "auc_score", "final_entropy", "mean_entropy", "kl")
    assert all(math.isnan(numbers[key]) for key in missing)
    assert numbers["collapsed"] is False
    numbers = summary(run([0.4]), DEFINITIONS)
    assert (numbers["final_score"], numbers["auc_score"]) == (0.4, 0.4)
