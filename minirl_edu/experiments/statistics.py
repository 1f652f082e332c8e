"""Effects, intervals and p-values over a handful of seeds, and the numbers that summarise a run.

Three kinds of statements, each with the method that few seeds allow:

    means              Student's t for the interval; the sign-flip test, which assumes no distribution, for the p-value
    rates of collapse  Clopper and Pearson's interval, which is never too short, with the exact binomial test
    two such rates     the exact sign test on the seeds where just one of the two runs collapsed

Seeds are paired between variants: the same seed means the same start and the same problems. So two variants are
compared seed by seed, and what a seed does to both of them drops out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import bdtr, bdtrc, stdtr, stdtrit
from scipy.stats import binomtest

from minirl_edu.experiments.spec import Definitions, RunResult
from minirl_edu.plots import Metrics

_EXACT = 12  # seeds up to which all 2^n sign flips are enumerated
_FLIPS = 100_000


@dataclass(frozen=True)
class Effect:
    """An estimate with its interval (95 % unless said otherwise), a two-sided p-value, and how many seeds gave it.

    With one seed the interval is infinite: it excludes nothing.
    """

    estimate: float
    low: float
    high: float
    p: float
    n: int


# ------------------------------------------------------------------------------------------------------------ means


def mean_effect(values: Float[np.ndarray, "n"], *, null: float = 0.0) -> Effect:
    """Mean over seeds, its 95 % interval by Student's t, and the sign-flip p-value for a mean of `null`."""
    low, high = _t_interval(values, 0.95)
    return Effect(float(values.mean()), low, high, _sign_flip_p(values - null), len(values))


def paired_difference(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], *, null: float = 0.0) -> Effect:
    """Mean of a − b, where `a[i]` and `b[i]` come from the same seed; as `mean_effect`."""
    return mean_effect(a - b, null=null)


def equivalent(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], margin: float) -> Effect:
    """Whether the mean of a − b lies within ±`margin`: two one-sided t-tests (TOST) at 5 %.

    The interval is the **90 %** one. It lies inside ±margin exactly where p < 0.05, and then a and b are equivalent.
    Source: D. J. Schuirmann, 1987.
    """
    difference = a - b
    n, mean = len(difference), float(difference.mean())
    if n == 1:
        return Effect(mean, -math.inf, math.inf, 1.0, 1)
    low, high = _t_interval(difference, 0.90)
    room = margin - abs(mean)  # to the nearer bound: its test has the larger p-value
    error = float(difference.std(ddof=1)) / math.sqrt(n)
    p = float(stdtr(n - 1, -room / error)) if error else float(room <= 0)
    return Effect(mean, low, high, p, n)


def _t_interval(values: np.ndarray, level: float) -> tuple[float, float]:
    n, mean = len(values), float(values.mean())
    if n == 1:
        return -math.inf, math.inf
    half = t_quantile(0.5 + level / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def _sign_flip_p(values: np.ndarray) -> float:
    """Share of all sign patterns that move the mean at least as far from 0 as it is; sampled for more than 12 seeds.

    If nothing but chance told a from b, every difference might as well have had the other sign. The smallest value
    possible is 2^(1 − n). Source: R. A. Fisher, The Design of Experiments, 1935.
    """
    n = len(values)
    if n <= _EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(_FLIPS, n))
        signs[0] = 1.0  # what was observed is one of the patterns, so p is never 0
    sums = np.abs(signs @ values)
    # Equal sums, added in another order, differ in the last digits.
    return float((sums >= sums[0] - 1e-12 * np.abs(values).sum()).mean())


def t_quantile(q: float, df: int) -> float:
    """Quantile q ∈ (0, 1) of Student's t with `df` degrees of freedom."""
    return float(stdtrit(df, q))


# ------------------------------------------------------------------------------------------------------------ rates


def proportion(k: int, n: int) -> tuple[float, float, float]:
    """Rate k/n with Clopper and Pearson's 95 % interval: (estimate, low, high).

    Chosen over Wilson's because it covers the true rate in at least 95 % of cases whatever the rate. Wilson's covers it
    in 95 % on average over rates, but with 8 seeds in as few as 83 %, just where rates are near 0 or 1.
    """
    interval = binomtest(k, n).proportion_ci(0.95, method="exact")
    return k / n, float(interval.low), float(interval.high)


def binomial_p(k: int, n: int, rate: float) -> float:
    """Two-sided p-value of the exact binomial test that `rate` is the true one, twice the smaller tail.

    It is below 0.05 where Clopper and Pearson's 95 % interval excludes `rate`.
    """
    return min(1.0, 2 * float(min(bdtrc(k - 1, n, rate) if k else 1.0, bdtr(k, n, rate))))


def difference_of_proportions(a: Bool[np.ndarray, "n"], b: Bool[np.ndarray, "n"]) -> Effect:
    """Rate of `a` minus rate of `b`, where `a[i]` and `b[i]` come from the same seed.

    p: the exact sign test on the seeds where a and b differ (McNemar's test without its approximation), which holds
    however strongly the two are correlated; below 6 such seeds it cannot be below 0.05. The interval is Newcombe's
    score interval for paired rates. It is approximate: with few seeds, rely on p.
    Source: R. G. Newcombe, Statistics in Medicine 17, 1998, 2635–2650, method 10.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    rate_a, rate_b = float(a.mean()), float(b.mean())
    (low_a, high_a), (low_b, high_b) = (binomtest(int(x.sum()), n).proportion_ci(0.95, method="wilson") for x in (a, b))
    correlation = _phi(int((a & b).sum()), only_a, only_b, int((~a & ~b).sum()))

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 - 2 * correlation * up * down + down**2))

    difference = rate_a - rate_b
    low = difference - reach(rate_a - low_a, high_b - rate_b)
    high = difference + reach(high_a - rate_a, rate_b - low_b)
    p = binomial_p(only_a, only_a + only_b, 0.5) if only_a + only_b else 1.0
    return Effect(difference, float(low), float(high), p, n)


def _phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Correlation of paired outcomes, a positive one shrunk as Newcombe does; 0 where it is undefined."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    product_difference = both * neither - only_a * only_b
    if product_difference > 0:
        product_difference = max(0.0, product_difference - (both + only_a + only_b + neither) / 2)
    return product_difference / math.sqrt(margins) if margins else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: those below 0.05 include any false one with a probability of at most 5 %.

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# -------------------------------------------------------------------------------------------------------- summaries


def summary(run: RunResult, definitions: Definitions) -> dict[str, Any]:
    """The numbers that a run is judged by. Scores are from 0 to 1, entropies and KL in nats per token.

        first_score      before training
        final_score      mean of the last `final_evaluations` evaluations; 0 if the run diverged: its policy is unusable
        best_score       largest mean of as many consecutive evaluations (of fewer at the start)
        auc_score        mean over the gradient steps that were made, straight lines between evaluations
        collapsed        whether the final score is below `collapse_share` of the best, or the run diverged
        collapse_step    gradient step of the evaluation from which that mean stays so low; None without collapse
        …_rollout        the same six of the scores through the rollout engine
        final_entropy    median over the last third of the gradient steps
        mean_entropy     mean over all of them
        kl               median of `k3_rollout_old` over the last third: spikes of a few steps do not count
        diverged         whether the run ended at a number that is not finite

    A number without any value behind it is NaN.
    """
    metrics = run.metrics
    entropy, kl = (_finite(metrics[key]) for key in ("entropy", "k3_rollout_old"))
    numbers: dict[str, Any] = {
        "final_entropy": _median(_last_third(entropy)),
        "mean_entropy": float(entropy.mean()) if len(entropy) else math.nan,
        "kl": _median(_last_third(kl)),
        "diverged": run.diverged is not None,
    }
    for suffix in ("", "_rollout"):
        scores = _scores(metrics, f"score{suffix}", definitions, diverged=numbers["diverged"])
        numbers |= {f"{key}{suffix}": value for key, value in scores.items()}
    return numbers


def _scores(metrics: Metrics, column: str, definitions: Definitions, *, diverged: bool) -> dict[str, Any]:
    known = np.isfinite(metrics[column])
    scores, steps = metrics[column][known], metrics["grad_step"][known]
    if not len(scores):
        nothing = dict.fromkeys(("first_score", "final_score", "best_score", "auc_score"), math.nan)
        return {**nothing, "collapsed": diverged, "collapse_step": None}
    window = definitions.final_evaluations
    running = np.array([scores[max(0, i + 1 - window) : i + 1].mean() for i in range(len(scores))])
    standing = np.flatnonzero(running >= running.max() * definitions.collapse_share)[-1]
    fallen = bool(standing + 1 < len(scores))
    step = steps[standing + 1] if fallen else metrics["grad_step"][-1]
    return {
        "first_score": float(scores[0]),
        "final_score": 0.0 if diverged else float(running[-1]),
        "best_score": float(running.max()),
        "auc_score": _mean_height(steps, scores),
        "collapsed": fallen or diverged,
        "collapse_step": int(step) if fallen or diverged else None,
    }


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _last_third(values: np.ndarray) -> np.ndarray:
    return values[-math.ceil(len(values) / 3) :]


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _mean_height(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) == 1:
        return float(y[0])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))
