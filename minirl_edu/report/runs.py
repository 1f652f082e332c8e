"""What a report reads of each run: its metrics, settings and samples, and the fall of its score, if there was one."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from minirl_edu.records import Metrics, read_metrics, read_records

WINDOW = 10
"""Gradient steps over which noisy metrics are averaged, rounded up to whole global steps."""
DROP = 0.25
"""Of the score: a fall from its peak by so much, or to half of it, is never left out."""


class Fall(NamedTuple):
    """The gradient steps of the best score before a fall, and of the moment at which the fall was noticed."""

    peak: int
    step: int


@dataclass(frozen=True)
class Run:
    """One run's folder, read.

    metrics      columns of metrics.jsonl
    warnings     the sentences of the collapse detector by gradient step
    config       dotted name -> value; empty where the run has no config.yaml
    environment  environment.json
    memory       bytes per token of each part of the last rollout
    samples      lines of samples.jsonl, one an evaluation
    """

    metrics: Metrics
    warnings: dict[int, list[str]]
    config: dict[str, Any]
    environment: dict[str, Any]
    memory: dict[str, float]
    samples: list[dict[str, Any]]

    @property
    def problems(self) -> int:
        """Held-out problems behind a score. Unknown: few, so that noise isn't taken for a result."""
        return int(self.config.get("eval.problems", 100))

    @property
    def last(self) -> int:
        """The last gradient step."""
        return int(self.metrics["grad_step"][-1])

    @property
    def window(self) -> int:
        """`WINDOW` in whole global steps, because staleness starts again at each."""
        mini_batches = max(1, round(self.last / max(1.0, float(self.metrics["global_step"][-1]))))
        return mini_batches * math.ceil(WINDOW / mini_batches)

    @property
    def rewards(self) -> int:
        """Rewards behind a score: so many samples of each problem."""
        return self.problems * int(self.config.get("eval.samples", 1))

    def at(self, key: str) -> dict[int, float]:
        """Gradient step -> value, where there is one."""
        values = self.metrics.get(key, np.empty(0))
        return {
            int(step): float(v) for step, v in zip(self.metrics["grad_step"], values, strict=False) if np.isfinite(v)
        }

    def differ(self, p: float, q: float, times: float = 1.0) -> bool:
        """Whether two scores are further apart than so many times `noise`."""
        return abs(p - q) > times * score_noise(p, q, self.rewards)

    @cached_property
    def course(self) -> tuple[int, int] | None:
        """The steps of the peak and of the low of the score's largest fall from any peak; None if it is no event.

        An event is a fall by more than three standard errors (the peak is the best of many) that goes below the start,
        or lasts to the end, or is by `DROP` or half.
        """
        score = self.at("score")
        if not score:
            return None
        peaks, peak = {}, min(score)  # step -> that of the best score so far
        for step in score:
            peak = step if score[step] > score[peak] else peak
            peaks[step] = peak
        low = max(score, key=lambda step: (score[peaks[step]] - score[step], -step))
        peak = peaks[low]
        depth, first, final = score[peak] - score[low], score[min(score)], score[max(score)]
        lasting = score[peak] > final and self.differ(score[peak], final)
        below = score[low] < first and self.differ(score[low], first)
        event = below or lasting or depth >= min(DROP, score[peak] / 2)
        return (peak, low) if event and depth > 0 and self.differ(score[peak], score[low], 1.5) else None

    @property
    def depth(self) -> float:
        """How far the score fell; 0 where that is no event."""
        score = self.at("score")
        return score[self.course[0]] - score[self.course[1]] if self.course else 0.0

    @cached_property
    def fall(self) -> Fall | None:
        """Where a collapse was noticed: the first warning, or else the first evaluation that is below the peak of
        `course` by more than noise."""
        score = self.at("score")
        if self.warnings:
            step = min(self.warnings)
            before = [s for s in score if s < step]
            return Fall(max(before, key=lambda s: (score[s], -s), default=max(0, step - self.window)), step)
        if self.course is None:
            return None
        peak, low = self.course
        return Fall(peak, next((s for s in score if s > peak and self.differ(score[s], score[peak])), low))


Labelled = Mapping[str, Sequence[Run]]
"""A report's runs by label; those of one label differ in their seeds."""


def score_noise(p: float, q: float, rewards: int) -> float:
    """Two standard errors of the difference of two scores on the same problems, each the mean of so many rewards in
    [0, 1]: at most what sampling again would do."""
    # One success and one failure are added, so that a score of exactly 1 isn't taken for a certainty.
    spread = sum(s * (1 - s) for s in ((min(1.0, max(0.0, s)) * rewards + 1) / (rewards + 2) for s in (p, q)))
    return 2 * math.sqrt(spread / rewards)


def read_run(folder: Path) -> Run:
    """Read a run's folder, of which only metrics.jsonl has to be there. Raises as `read_records`."""
    records = read_records(folder / "metrics.jsonl")
    config, environment = folder / "config.yaml", folder / "environment.json"
    return Run(
        metrics=read_metrics(folder / "metrics.jsonl"),
        warnings={int(r["grad_step"]): [str(w) for w in r["warnings"]] for r in records if r.get("warnings")},
        config=flatten(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.is_file() else {},
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        memory=next((record["bytes_per_token"] for record in reversed(records) if "bytes_per_token" in record), {}),
        samples=read_records(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else [],
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names."""
    if isinstance(tree, Mapping) and (tree or not prefix):
        return {name: leaf for key, node in tree.items() for name, leaf in flatten(node, f"{prefix}.{key}").items()}
    return {prefix.removeprefix("."): tree}


def method_name(config: Mapping[str, Any], otherwise: str) -> str:
    """The paper's name for what a config trains with."""
    objective = config.get("algorithm.objective")
    if objective is None:
        return otherwise
    correction = config.get("algorithm.correction", "token_truncated")
    if not config.get("algorithm.is_correction", True):
        correction = "none"
    parts = [
        {"minirl": "MiniRL", "grpo": "GRPO", "cispo": "CISPO"}.get(objective, objective),
        {"token_truncated": "", "none": "− IS"}.get(correction, f"weight: {correction.replace('_', ' ')}"),
        "+ length norm" if config.get("algorithm.length_norm") else "",
        "" if config.get("algorithm.replay", "none") == "none" else f"+ {config['algorithm.replay']}",
    ]
    return " ".join(filter(None, parts)) + ("" if config.get("algorithm.clip", True) else ", no clipping")


def each(runs: Labelled) -> dict[str, Run]:
    """Every run with a name of its own: its label, and its seed (or place) where the label has several."""
    named = {}
    for label, own in runs.items():
        seeds = [run.config.get("seed") for run in own]
        for i, (seed, run) in enumerate(zip(seeds, own, strict=True), start=1):
            told = f"seed {seed}" if seed is not None and seeds.count(seed) == 1 else f"run {i}"
            named[label if len(own) == 1 else f"{label}, {told}"] = run
    return named


def most_fallen(runs: Labelled) -> tuple[str, Run] | None:
    """The label and the run of the deepest fall, the first of equals; None where no run fell."""
    fallen = [(label, run) for label, own in runs.items() for run in own if run.fall]
    return max(fallen, key=lambda one: one[1].depth, default=None)


def moments(run: Run, shown: Run | None) -> dict[str, range]:
    """Windows of the run's gradient steps by name: before, at and after the fall of `shown`; without one, along it."""
    ends = {"start": run.window, "halfway": run.last // 2, "end": run.last}
    if shown is not None and (fall := shown.fall):
        after = min((step for step in shown.at("score") if step > fall.step), default=fall.step + run.window)
        ends = {"start": run.window, "before": fall.peak, "at the fall": fall.step, "after": after, "end": run.last}
    windows: dict[str, range] = {}
    for name, end in ends.items():
        window = range(max(1, end - run.window + 1), end + 1)
        if window and end <= run.last and window not in windows.values():
            windows[name] = window
    return windows


def during(run: Run, key: str, window: range) -> float:
    """The mean over a window; of the score, which is rare, the latest value up to its end."""
    values = run.at(key)
    if key == "score":
        return next((values[step] for step in reversed(list(values)) if step < window.stop), math.nan)
    return float(np.mean(inside)) if (inside := [v for step, v in values.items() if step in window]) else math.nan
