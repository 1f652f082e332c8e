"""Early warning: how long before a run's score falls does a metric say so, and how many healthy runs does it flag?

A predictor watches one metric of a run as `CollapseDetector` does, by two moving averages of its gradient steps: a fast
one, where the metric is now, and a slow one, its running baseline. Its *level* is how far the fast one has moved away
from the slow one in the direction that means trouble, in nats:

    level_t = ± log(fast_t / slow_t)

A metric that may be negative, such as a covariance, has no logarithm: its level is the fast average itself, ± fast_t.
The predictor raises the alarm at the first gradient step whose level exceeds a threshold. The threshold is chosen on
some runs (the largest share of falls warned of at a bounded rate of false alarms) and judged on others. A fall is
warned of by an alarm before it; an alarm in a run whose score never fell is a false one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.experiments.statistics import proportion
from minirl_edu.plots import Metrics


class Predictor(NamedTuple):
    """A metric to watch: its column, the direction that means trouble (+1: it rises), and the value below which it is
    harmless however fast it grows; None: its level is its fast average."""

    column: str
    direction: int
    floor: float | None


PREDICTORS = {
    "entropy": Predictor("entropy", -1, 1e-6),
    "KL": Predictor("k3_rollout_old", 1, 1e-3),
    "gradient norm": Predictor("grad_norm", 1, 1e-3),
    "first-order gap": Predictor("first_order_gap", 1, 1e-4),
    "ESS": Predictor("ess", -1, 1e-3),
    "reward": Predictor("reward", -1, 1e-2),
}
"""The single metrics that are compared. Floors are in each metric's own unit (entropy and KL: nats per token)."""

DRIFT_PREDICTORS = {
    "entropy drift": Predictor("entropy_drift", -1, None),
    "Cov(length, reward)": Predictor("length_reward_cov", -1, None),
}
"""What `minirl_edu.drift` says of the entropy without the weight; runs log it since the settings where it matters."""

DETECTOR = "CollapseDetector"
"""The predictor that is not tuned here: a warning of the library's detector about the reward."""


class Watched(NamedTuple):
    """A run, and the gradient step at which its score fell (None: it never did)."""

    metrics: Metrics
    fell: float | None


class Verdict(NamedTuple):
    """How a predictor did on runs that its threshold was not chosen on."""

    predictor: str
    threshold: float
    foretold: int
    falls: int
    false_alarms: int
    healthy: int
    leads: list[float]
    """Gradient steps from the alarm to the fall, one for each fall warned of."""


def averages(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean of the values so far: plain until `window` of them are in, exponential from there; NaNs are skipped.

    Shape [n] → [n]. The same recursion as `CollapseDetector`'s.
    """
    mean, count, result = 0.0, 0, np.empty(len(values))
    for i, value in enumerate(values):
        if math.isfinite(value):
            count += 1
            mean += (value - mean) / min(count, window)
        result[i] = mean
    return result


def levels(metrics: Metrics, predictor: Predictor, *, warmup: int = 20) -> np.ndarray:
    """The predictor's level at each gradient step, [n], in nats or the metric's unit; −∞ in the first `warmup`."""
    values = metrics[predictor.column]
    fast, slow = (averages(values, window) for window in (CollapseDetector.FAST, CollapseDetector.SLOW))
    if predictor.floor is not None:
        fast = np.log(np.maximum(fast, predictor.floor) / np.maximum(slow, predictor.floor))
    level = predictor.direction * fast
    level[np.cumsum(np.isfinite(values)) <= warmup] = -math.inf
    return level


def alarm(metrics: Metrics, level: np.ndarray, threshold: float) -> float | None:
    """The first gradient step whose level exceeds the threshold, or None."""
    above = np.flatnonzero(level > threshold)
    return float(metrics["grad_step"][above[0]]) if len(above) else None


def detector_alarm(metrics: Metrics) -> float | None:
    """The gradient step of `CollapseDetector`'s first warning about the reward, or None."""
    detector = CollapseDetector()
    for step, reward in zip(metrics["grad_step"], metrics["reward"], strict=True):
        if math.isfinite(reward) and detector.update({"reward": reward}):
            return float(step)
    return None


def peak(run: Watched, level: np.ndarray) -> float:
    """The run's highest level before its fall (in all of a healthy run): an alarm is raised in time exactly where the
    threshold lies below it."""
    before = level if run.fell is None else level[run.metrics["grad_step"] < run.fell]
    return float(before.max(initial=-math.inf))


def roc(
    peaks_of_falls: Sequence[float], peaks_of_healthy: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds, false-alarm rates and shares of falls warned of, from the strictest threshold to the loosest.

    Thresholds stand halfway between neighbouring peaks.
    Raises ValueError without runs of both kinds.
    """
    if not len(peaks_of_falls) or not len(peaks_of_healthy):
        raise ValueError(f"{len(peaks_of_falls)} runs that fell, {len(peaks_of_healthy)} healthy: need some of both")
    falls, healthy = np.asarray(peaks_of_falls), np.asarray(peaks_of_healthy)
    peaks = np.unique(np.concatenate([falls, healthy]))[::-1]
    thresholds = np.concatenate([[math.inf], (peaks[1:] + peaks[:-1]) / 2, [-math.inf]])
    lowest_alarmed = np.concatenate([[math.inf], peaks])[:, None]
    return thresholds, (healthy >= lowest_alarmed).mean(1), (falls >= lowest_alarmed).mean(1)


def curve(runs: Sequence[Watched], predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """The predictor's ROC curve on these runs: false-alarm rates and shares of falls warned of. Raises as `roc`."""
    peaks = [(run.fell is not None, peak(run, levels(run.metrics, predictor))) for run in runs]
    _, false_alarms, foretold = roc(*([level for fell, level in peaks if fell == kind] for kind in (True, False)))
    return false_alarms, foretold


def area(false_alarms: np.ndarray, foretold: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a run about to fall peaks higher than a healthy one ever does.

    Ties count half.
    """
    return float(np.trapezoid(foretold, false_alarms))


def choose_threshold(runs: Sequence[Watched], predictor: Predictor, *, false_alarm_rate: float) -> float:
    """The threshold that warns of most falls of these runs with a rate of false alarms of at most `false_alarm_rate`;
    of several, the strictest.

    Raises ValueError without runs of both kinds.
    """
    peaks = [(run.fell is not None, peak(run, levels(run.metrics, predictor))) for run in runs]
    thresholds, rates, foretold = roc(
        [level for fell, level in peaks if fell], [level for fell, level in peaks if not fell]
    )
    return float(thresholds[np.argmax(np.where(rates <= false_alarm_rate, foretold, -1.0))])


def judge(
    tuning: Sequence[Watched],
    held_out: Sequence[Watched],
    predictors: Mapping[str, Predictor] = PREDICTORS,
    *,
    false_alarm_rate: float = 0.05,
) -> list[Verdict]:
    """Each predictor's threshold chosen on `tuning` and judged on `held_out`; last, `CollapseDetector` as it is.

    Raises ValueError if either lacks runs that fell or healthy ones.
    """
    verdicts = []
    for name, predictor in predictors.items():
        threshold = choose_threshold(tuning, predictor, false_alarm_rate=false_alarm_rate)
        alarms = [alarm(run.metrics, levels(run.metrics, predictor), threshold) for run in held_out]
        verdicts.append(_record(name, threshold, held_out, alarms))
    return [*verdicts, _record(DETECTOR, math.nan, held_out, [detector_alarm(run.metrics) for run in held_out])]


def markdown(verdicts: Sequence[Verdict], areas: Mapping[str, float]) -> str:
    """The verdicts as a Markdown table, rates with their 95 % interval; `areas` are those under the ROC curves."""
    rows = []
    for verdict in verdicts:
        leads = np.quantile(verdict.leads, [0.5, 0.25, 0.75]) if verdict.leads else None
        foretold, false_alarms = (
            "{} of {}: {:.0%} ({:.0%} to {:.0%})".format(k, n, *proportion(k, n))
            for k, n in ((verdict.foretold, verdict.falls), (verdict.false_alarms, verdict.healthy))
        )
        lead = "" if leads is None else "{:.0f} ({:.0f} to {:.0f})".format(*leads)
        threshold = "its own" if math.isnan(verdict.threshold) else f"{verdict.threshold:.2g}"
        curve = f"{areas[verdict.predictor]:.2f}" if verdict.predictor in areas else ""
        rows.append((verdict.predictor, threshold, foretold, false_alarms, lead, curve))
    heads = (
        "predictor", "threshold", "falls warned of", "false alarms, of healthy runs",
        "gradient steps before the fall: median (quartiles)", "area under the ROC curve",
    )  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def _record(name: str, threshold: float, runs: Sequence[Watched], alarms: Sequence[float | None]) -> Verdict:
    falls = [(run.fell, raised) for run, raised in zip(runs, alarms, strict=True) if run.fell is not None]
    healthy = [raised for run, raised in zip(runs, alarms, strict=True) if run.fell is None]
    if not falls or not healthy:
        raise ValueError(f"{len(falls)} runs that fell, {len(healthy)} healthy: need some of both")
    leads = [fell - raised for fell, raised in falls if raised is not None and raised < fell]
    false_alarms = sum(raised is not None for raised in healthy)
    return Verdict(name, threshold, len(leads), len(falls), false_alarms, len(healthy), leads)
