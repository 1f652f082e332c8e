"""Is the fall of the entropy known before the weight is left out?

`diagnostics.entropy_drift` estimates, from a run that uses the weight, how fast the entropy would move without it. Here
that prediction meets runs that did leave it out, seed by seed: its mean over the first third of the run with the weight
against the difference between the two runs' entropies over the second third.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr

from minirl_edu.experiments.spec import RunResult


class Pair(NamedTuple):
    """One seed in one setting."""

    predicted: float
    """Mean `entropy_drift` over the first third of the run with the weight."""
    measured: float
    """Mean entropy without the weight minus that with it, over the second third, in nats per token."""


class Agreement(NamedTuple):
    """Pearson's correlation of the pairs with its 95 % interval, Spearman's, and the share of equal signs."""

    pearson: float
    low: float
    high: float
    spearman: float
    same_sign: float
    pairs: int


def paired(with_weight: Sequence[RunResult], without: Sequence[RunResult]) -> list[Pair]:
    """The pairs of the seeds that both have, in order. Seeds whose runs did not log the prediction are left out."""
    found, others = [], {run.seed: run for run in without}
    for run in sorted(with_weight, key=lambda run: run.seed):
        if (other := others.get(run.seed)) is None:
            continue
        first, second = (_third(run, "entropy_drift", 0), _third(run, "entropy", 1))
        if np.isfinite(first) and np.isfinite(second):
            found.append(Pair(float(first), float(_third(other, "entropy", 1) - second)))
    return found


def agreement(found: Sequence[Pair]) -> Agreement:
    """How well prediction and measurement agree. Raises ValueError for fewer than four pairs."""
    if len(found) < 4:
        raise ValueError(f"pairs: {len(found)}; a correlation with an interval needs four")
    predicted, measured = np.array(found).T
    result: Any = pearsonr(predicted, measured)
    interval = result.confidence_interval(0.95)
    return Agreement(
        pearson=float(result.statistic),
        low=float(interval.low),
        high=float(interval.high),
        spearman=float(spearmanr(predicted, measured)[0]),  # pyright: ignore[reportArgumentType]
        same_sign=float(np.mean(np.sign(predicted) == np.sign(measured))),
        pairs=len(found),
    )


def markdown(settings: dict[str, list[Pair]], all_of_them: Agreement, command: str) -> str:
    """A page: what was predicted and measured in each setting, and how well the two agree over all seeds."""
    rows = ["| setting | seeds | predicted | measured, nats | same sign |", "|---|---|---|---|---|"]
    for name, found in settings.items():
        predicted, measured = np.array(found).T
        same = int(np.sum(np.sign(predicted) == np.sign(measured)))
        rows.append(
            f"| {name} | {len(found)} | {predicted.mean():+.3f} ({predicted.min():+.3f} to {predicted.max():+.3f}) | "
            f"{measured.mean():+.3f} ({measured.min():+.3f} to {measured.max():+.3f}) | {same} of {len(found)} |"
        )
    a = all_of_them
    return "\n".join(
        [
            "# Predicted and measured: what leaving out the weight does to the entropy",
            "",
            "*Predicted* is the mean `entropy_drift` over the first third of a run **with** the weight: nats per unit",
            "step on the logits, so its sign and its order mean something, its size does not. *Measured* is the mean",
            "entropy of the run without the weight minus that of the run with it, same seed, over the second third. In",
            "brackets the range over seeds. Written by",
            "",
            f"    {command}",
            "",
            *rows,
            "",
            f"Over all {a.pairs} pairs: Pearson's correlation {a.pearson:.2f} (95 % interval {a.low:.2f} to "
            f"{a.high:.2f}), Spearman's {a.spearman:.2f}, the same sign in {a.same_sign:.0%}.",
            "",
            "![predicted and measured](figures/prediction.png)",
            "",
        ]
    )


def _third(run: RunResult, key: str, which: int) -> float:
    """The mean of a metric over the first (0), second or last third of the run's gradient steps."""
    values = run.metrics[key][run.metrics["grad_step"] > 0]
    part = np.array_split(values, 3)[which]
    return float(np.nanmean(part)) if np.isfinite(part).any() else float("nan")
