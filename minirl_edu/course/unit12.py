"""Exercises of unit 12, evidence: collapses, paired differences, their intervals, and a verdict by fixed criteria."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minirl_edu.course import Answer, exercise
from minirl_edu.experiments.statistics import equivalent, mean_effect, paired_difference, t_quantile

Z = 1.959964
"""97.5 % of a normal distribution lie below it."""


def _numbers(answer: Answer, *case: object) -> Tensor:
    """What an answer returns, as numbers: a mixture of floats, numpy's and booleans would not compare."""
    return torch.tensor([float(x) for x in answer(*case)], dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- collapses


_SCORES = {
    "that learns": (0.30, 0.45, 0.60, 0.70, 0.78, 0.80, 0.79),
    "that falls at the end": (0.30, 0.60, 0.75, 0.78, 0.50, 0.20, 0.10),
    "with a dip in the middle": (0.40, 0.70, 0.72, 0.20, 0.18, 0.60, 0.75, 0.76),
    "with one lucky evaluation": (0.40, 0.42, 0.41, 0.70, 0.40, 0.43, 0.42),
    "with one bad evaluation at the end": (0.50, 0.60, 0.70, 0.70, 0.68, 0.70, 0.40),
    "that learns nothing": (0.10, 0.12, 0.11, 0.10, 0.09, 0.10),
}


def _running(scores: np.ndarray, window: int = 3) -> np.ndarray:
    """Mean of each evaluation and of those before it, `window` together, fewer at the start."""
    return np.array([scores[max(0, i + 1 - window) : i + 1].mean() for i in range(len(scores))])


def _fallen(scores: np.ndarray, *, last: int = 3, best: int = 3, share: float = 0.7) -> tuple[float, float, bool]:
    final, top = float(_running(scores, last)[-1]), float(_running(scores, best).max())
    return final, top, final < share * top


def _against_the_start(scores: np.ndarray) -> tuple[float, float, bool]:
    final, best, _ = _fallen(scores)
    return final, best, final < float(scores[0])


def _any_dip(scores: np.ndarray) -> tuple[float, float, bool]:
    running = _running(scores)
    return float(running[-1]), float(running.max()), bool((running < 0.7 * np.maximum.accumulate(running)).any())


def _absolute(scores: np.ndarray) -> tuple[float, float, bool]:
    final, best, _ = _fallen(scores)
    return final, best, final < 0.7


EX1 = exercise(
    """12.1 Has this run collapsed? (difficulty 2, importance 4, 10 minutes)

    1. One evaluation is noisy. Final and best score are both means of three evaluations in a row.
    2. The best is the largest of these means, anywhere in the run; at the start, of the one or two there are.
    3. `final < 0.7 * best`.

    - last evaluation only: the final score is a single evaluation. One unlucky draw of answers then makes a collapse.
    - best single evaluation: the best score is a single evaluation. The largest of many noisy numbers is too large, so
      healthy runs seem to have fallen.
    - against the start: the final score is compared with the first one. A run that climbs to 0.8 and falls back to 0.4
      has collapsed, although it began at 0.3.
    - any dip: a run that fell and recovered is counted as well. The criterion asks where the run ends.
    - below 0.7: 0.7 is a share of the run's own best, not a score. A run that never learned much has not collapsed.

    A number that summarises a run is chosen before the runs are seen, like everything else.
    """,
    observe=lambda answer: {
        f"final score, best score and collapse of a run {name}": _numbers(answer, np.array(scores))
        for name, scores in _SCORES.items()
    },
    solution=_fallen,
    mistakes={
        "last evaluation only": partial(_fallen, last=1),
        "best single evaluation": partial(_fallen, best=1),
        "against the start": _against_the_start,
        "any dip": _any_dip,
        "below 0.7": _absolute,
    },
)


# ------------------------------------------------------------------------------------------------------ differences


_SEEDS_A = (0.86, 0.79, 0.90, 0.71, 0.83)
_SEEDS_B = (0.80, 0.75, 0.88, 0.62, 0.80)


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    effect = paired_difference(a, b)
    return effect.estimate, effect.low, effect.high


def _around(middle: float, half: float) -> tuple[float, float, float]:
    return middle, middle - half, middle + half


def _by_hand(a: np.ndarray, b: np.ndarray, *, ddof: int = 1, quantile: float | None = None) -> tuple[float, ...]:
    n = len(a)
    quantile = t_quantile(0.975, n - 1) if quantile is None else quantile
    return _around(float((a - b).mean()), quantile * float((a - b).std(ddof=ddof)) / math.sqrt(n))


def _unpaired(a: np.ndarray, b: np.ndarray, level: float = 0.975) -> tuple[float, float, float]:
    n = len(a)
    error = math.sqrt(float(a.var(ddof=1) + b.var(ddof=1)) / n)
    return _around(float(a.mean() - b.mean()), t_quantile(level, 2 * n - 2) * error)


EX2 = exercise(
    """12.2 A paired difference, with its interval (difficulty 3, importance 5, 12 minutes)

    1. Take the differences first, seed by seed. Everything else is about these numbers.
    2. The standard error of a mean of n numbers is their standard deviation (divisor n − 1) over √n.
    3. `t_quantile(0.975, n - 1)` standard errors to each side.

    - unpaired: the two groups are treated as independent. What a seed does to both runs (easy problems, a lucky start)
      drops out of the difference, and here it is counted as noise.
    - 1.96: 1.96 is the normal distribution's quantile. With so few seeds the standard deviation is itself a guess, and
      Student's t pays for that with a wider interval.
    - divisor n: the standard deviation has the divisor n. The mean was fitted to the same numbers, which uses up one of
      them: n − 1.
    - no √n: that is an interval for one more seed, not for the mean. More seeds must make it narrower.
    - b − a: that is b − a. A figure that says by how much a is better must subtract b.
    - one-sided quantile: that is the 95 % quantile, which leaves 5 % on **each** side: a 90 % interval.

    An interval that excludes 0 shows a difference. One that includes 0 does not show equality.
    """,
    observe=lambda answer: {
        "the estimate and its interval": _numbers(answer, np.array(_SEEDS_A), np.array(_SEEDS_B)),
        "the same for seven seeds": _numbers(
            answer, np.array((*_SEEDS_A, 0.77, 0.88)), np.array((*_SEEDS_B, 0.79, 0.80))
        ),
    },
    solution=_paired,
    mistakes={
        "unpaired": _unpaired,
        "1.96": partial(_by_hand, quantile=Z),
        "divisor n": partial(_by_hand, ddof=0),
        "no √n": lambda a, b: _by_hand(a, b, quantile=t_quantile(0.975, len(a) - 1) * math.sqrt(len(a))),
        "b − a": lambda a, b: _paired(b, a),
        "one-sided quantile": lambda a, b: _by_hand(a, b, quantile=t_quantile(0.95, len(a) - 1)),
    },
    rtol=1e-3,
)


def _flipped(d: np.ndarray) -> np.ndarray:
    """The sum under each of the 2^n sign patterns; what was seen comes first."""
    signs = np.array(np.meshgrid(*[[1.0, -1.0]] * len(d), indexing="ij")).reshape(len(d), -1)
    return d @ signs


def _one_at_a_time(d: np.ndarray) -> float:
    sums = np.array([d.sum(), *(d.sum() - 2 * d)])
    return float((np.abs(sums) >= abs(d.sum()) - 1e-9).mean())


EX3 = exercise(
    """12.3 The sign-flip test (difficulty 3, importance 4, 10 minutes)

    1. If the methods do not differ, each difference might as well have had the other sign.
    2. There are 2ⁿ patterns of signs: `itertools.product((1, -1), repeat=n)`.
    3. The share of patterns whose |sum| is at least |sum of d|. What was seen is one of them. Subtract 1e-9 from the
       bound: equal sums differ in the last digits.

    - one-sided: only patterns that go the same way are counted. "A is better" was not fixed before the runs were seen,
      so a difference the other way would have counted too.
    - strictly more: patterns that do as well as what was seen are left out, the observed one among them. A p-value of 0
      says that chance cannot do it.
    - as little: that is the share of patterns that do **not** reach what was seen.
    - a count: that is how many patterns reach it; p is their share.
    - one sign at a time: only n + 1 patterns are tried. Under chance every sign is free.

    The smallest p is 2^(1 − n): with five seeds this test never says more than 0.06.
    """,
    observe=lambda answer: {
        "p for five differences": float(answer(np.array([0.06, 0.04, 0.02, 0.09, -0.03]))),
        "p for three equal ones": float(answer(np.array([0.1, 0.1, 0.1]))),
        "p for differences that are mostly negative": float(answer(np.array([-0.06, 0.01, -0.02, -0.05, 0.03, -0.01]))),
    },
    solution=lambda d: mean_effect(d).p,
    mistakes={
        "one-sided": lambda d: (_flipped(d) * np.sign(d.sum()) >= abs(d.sum()) - 1e-9).mean(),
        "strictly more": lambda d: (np.abs(_flipped(d)) > abs(d.sum()) + 1e-9).mean(),
        "as little": lambda d: (np.abs(_flipped(d)) < abs(d.sum()) - 1e-9).mean(),
        "a count": lambda d: (np.abs(_flipped(d)) >= abs(d.sum()) - 1e-9).sum(),
        "one sign at a time": _one_at_a_time,
    },
)


# ----------------------------------------------------------------------------------------------------------- counts


def _wilson(
    k: int, n: int, *, z: float = Z, shift: bool = True, divide: bool = True, room: bool = True
) -> tuple[float, float]:
    p, c = k / n, z * z / n
    middle = p + c / 2 if shift else p
    half = z * math.sqrt(p * (1 - p) / n + (c / (4 * n) if room else 0.0))
    below = 1 + c if divide else 1.0
    return (middle - half) / below, (middle + half) / below


def _wald(k: int, n: int) -> tuple[float, float]:
    half = Z * math.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


EX4 = exercise(
    """12.4 How often does it collapse? Wilson's interval (difficulty 3, importance 4, 12 minutes)

    1. A rate p is in the interval if k/n is at most z of **its** standard errors away, √(p(1 − p)/n).
    2. Square that and solve for p: equation (12.4) is the answer.
    3. With p̂ = k/n and c = z²/n: (p̂ + c/2 ± z√(p̂(1 − p̂)/n + c/(4n))) / (1 + c).

    - Wald: the standard error is that of k/n itself. For 0 of 8 the interval has width 0, as if eight runs had proved
      that it never happens.
    - the middle is k/n: the middle is not moved towards one half. The interval reaches below 0 for 0 of 8.
    - not divided: the division by 1 + z²/n is missing, and the upper end can exceed 1.
    - no room under the root: z²/(4n²) under the root is missing. For 0 of 8 both ends are then the same number.
    - 90 %: z = 1.645 leaves 5 % on each side.

    None of 8 collapsed, and a true rate of three in ten is still compatible with that.
    """,
    observe=lambda answer: {
        f"the interval for {k} of {n}": _numbers(answer, k, n) for k, n in ((0, 8), (6, 8), (8, 8), (3, 20))
    },
    solution=_wilson,
    mistakes={
        "Wald": _wald,
        "the middle is k/n": partial(_wilson, shift=False),
        "not divided": partial(_wilson, divide=False),
        "no room under the root": partial(_wilson, room=False),
        "90 %": partial(_wilson, z=1.644854),
    },
    rtol=1e-3,
)


# --------------------------------------------------------------------------------------------------------- verdicts


_EQUAL_A = (0.81, 0.78, 0.83, 0.80, 0.79, 0.82)
_EQUAL = {
    "nearly equal scores": (0.80, 0.79, 0.82, 0.81, 0.78, 0.81),
    "scores three points lower": (0.75, 0.79, 0.81, 0.75, 0.74, 0.81),
    "scores ten points lower": (0.70, 0.69, 0.72, 0.71, 0.68, 0.71),
    "scores seven points lower, give or take five": (0.70, 0.78, 0.72, 0.80, 0.66, 0.76),
    "scores that jump about": (0.90, 0.60, 0.95, 0.70, 0.90, 0.80),
}


def _equal(
    a: np.ndarray, b: np.ndarray, margin: float, *, level: float = 0.95, interval: Callable | None = None
) -> tuple[float, float, bool]:
    if interval is None:
        _, low, high = _by_hand(a, b, quantile=t_quantile(level, len(a) - 1))
    else:
        _, low, high = interval(a, b)
    return low, high, -margin < low and high < margin


def _by_library(a: np.ndarray, b: np.ndarray, margin: float) -> tuple[float, float, bool]:
    effect = equivalent(a, b, margin)
    return effect.low, effect.high, effect.p < 0.05


def _judged_otherwise(rule: Callable[[float, float, float], bool]) -> Answer:
    """The right interval with another rule; it gets low, high and margin."""

    def answer(a: np.ndarray, b: np.ndarray, margin: float) -> tuple[float, float, bool]:
        low, high, _ = _equal(a, b, margin)
        return low, high, rule(low, high, margin)

    return answer


EX5 = exercise(
    """12.5 Equal, within a margin (difficulty 3, importance 4, 10 minutes)

    1. Two one-sided tests at 5 % each: the difference is above −margin, and it is below +margin.
    2. Both are passed exactly where the 90 % interval lies inside ±margin.
    3. The interval of exercise 12.2 with `t_quantile(0.95, n - 1)`; then `-margin < low and high < margin`.

    - 95 % interval: that is the 95 % interval: each of the two tests is made at 2.5 %. It asks for more than was fixed.
    - includes 0: an interval that includes 0 is taken for equality. Then few seeds and much noise prove that everything
      is equal to everything.
    - the estimate: the estimate lies within the margin; its interval need not. The data allow differences that are
      larger.
    - touches: the interval overlaps the margin. That says that equality is possible, not that it is shown.
    - unpaired: the interval is that of two independent groups.

    "Equal" is a claim as well and needs its own evidence: a margin that was fixed before, and enough seeds.
    """,
    observe=lambda answer: {
        f"the interval and the answer for {name}": _numbers(answer, np.array(_EQUAL_A), np.array(b), 0.05)
        for name, b in _EQUAL.items()
    },
    solution=_by_library,
    mistakes={
        "95 % interval": partial(_equal, level=0.975),
        "includes 0": _judged_otherwise(lambda low, high, margin: low < 0 < high),
        "the estimate": _judged_otherwise(lambda low, high, margin: abs(low + high) / 2 < margin),
        "touches": _judged_otherwise(lambda low, high, margin: low < margin and high > -margin),
        "unpaired": partial(_equal, interval=partial(_unpaired, level=0.95)),
    },
    rtol=1e-3,
)


Interval = tuple[float, float, float]
"""low, high and the margin that the truth is claimed to lie above."""

_HOLDS, _NO, _OPEN = (0.03, 0.09, 0.0), (-0.08, -0.02, 0.0), (-0.02, 0.05, 0.0)
_WIDE, _SMALL, _ALLOWED = (0.01, 0.07, 0.02), (0.005, 0.015, 0.02), (-0.015, 0.03, -0.02)
_CLAIMS = {
    "one criterion that holds": [_HOLDS],
    "one that is contradicted": [_NO],
    "one that is open": [_OPEN],
    "two that hold": [_HOLDS, _HOLDS],
    "two that hold and one that is open": [_HOLDS, _OPEN, _HOLDS],
    "two that hold and one that is contradicted": [_HOLDS, _HOLDS, _NO],
    "one that is open and one that is contradicted": [_OPEN, _NO],
    "an effect above 0 that may be below the margin": [_WIDE],
    "an effect that is surely above 0 and below the margin": [_SMALL],
    "a loss of at most 2 points": [_ALLOWED],
    "a loss that is surely larger than the 2 points allowed": [(-0.09, -0.03, -0.02)],
    "a loss that is real and may be within what is allowed": [(-0.05, -0.01, -0.02)],
}


def _outcome(low: float, high: float, margin: float) -> str:
    return "holds" if low > margin else "contradicted" if high < min(0.0, margin) else "open"


def _judge(criteria: Sequence[Interval], *, outcome: Callable[[float, float, float], str] = _outcome) -> str:
    outcomes = {outcome(*criterion) for criterion in criteria}
    if "contradicted" in outcomes:
        return "opposite"
    return "reproduced" if outcomes == {"holds"} else "inconclusive"


def _by_estimate(low: float, high: float, margin: float) -> str:
    return "holds" if (low + high) / 2 > margin else "contradicted"


def _open_means_yes(criteria: Sequence[Interval]) -> str:
    return "opposite" if _judge(criteria) == "opposite" else "reproduced"


def _one_is_enough(criteria: Sequence[Interval]) -> str:
    outcomes = [_outcome(*criterion) for criterion in criteria]
    return "reproduced" if "holds" in outcomes else _judge(criteria)


def _all_must_fail(criteria: Sequence[Interval]) -> str:
    outcomes = {_outcome(*criterion) for criterion in criteria}
    return {"{'holds'}": "reproduced", "{'contradicted'}": "opposite"}.get(str(outcomes), "inconclusive")


EX6 = exercise(
    """12.6 The verdict on a claim (difficulty 2, importance 5, 12 minutes)

    1. Judge each criterion first: the whole interval decides, never the estimate in its middle.
    2. A criterion holds if all of its interval lies above the margin. It is contradicted if all of it lies below 0 and
       below the margin. Else it is open.
    3. One contradicted criterion makes *opposite*. Without one, all must hold for *reproduced*.

    - the estimate decides: each criterion was judged by the middle of its interval. Then nothing is ever inconclusive,
      and a second set of seeds would turn many verdicts round.
    - open means yes: a claim without a contradiction counts as reproduced. With one seed, everything would be.
    - one is enough: one criterion that holds makes the claim reproduced. A claim says that **all** of its parts are
      true.
    - all must fail: *opposite* was given only where every criterion is contradicted. A claim is wrong if one of its
      parts is.
    - margin forgotten: every margin was taken as 0. "Better by more than 2 points" and "worse by at most 2 points" are
      other claims than "better".
    - below the margin: an effect above 0 but below the margin was called a contradiction. It goes the way that was
      claimed; that it goes far enough is not shown.

    `experiments.claims.judge` does the same for all claims in CLAIMS.md.
    """,
    observe=lambda answer: {f"the verdict on {name}": str(answer(criteria)) for name, criteria in _CLAIMS.items()},
    solution=_judge,
    mistakes={
        "the estimate decides": partial(_judge, outcome=_by_estimate),
        "open means yes": _open_means_yes,
        "one is enough": _one_is_enough,
        "all must fail": _all_must_fail,
        "margin forgotten": lambda criteria: _judge([(low, high, 0.0) for low, high, _ in criteria]),
        "below the margin": partial(
            _judge,
            outcome=lambda low, high, m: "holds" if low > m else "contradicted" if high < m else "open",
        ),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6)
