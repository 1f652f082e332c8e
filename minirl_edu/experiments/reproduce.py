"""One command: run what the figures need, draw them, judge the claims.

OUT/runs/<tier>/<setting>.tar.bz2                   every run: a CSV for each variant and seed
OUT/figures/<figure>.png, .svg                      in the paper's layout, or as a phase diagram
OUT/CLAIMS.md                                       every claim, those whose runs are missing as "not run"
OUT/EARLY_WARNING.md                                after grids: which metrics warn before the score falls
OUT/SYSTEMATIC.md                                   where the spec asks: what part of each engine's error comes back
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from tqdm import tqdm

from minirl_edu import plots
from minirl_edu.config import ConfigError
from minirl_edu.experiments import early_warning, prediction, systematic
from minirl_edu.experiments.claims import claims_markdown, judge
from minirl_edu.experiments.early_warning import DRIFT_PREDICTORS, PREDICTORS, Watched
from minirl_edu.experiments.runner import finished_runs, jobs_for, run_all
from minirl_edu.experiments.spec import Grid, Run, RunResult, Spec
from minirl_edu.experiments.statistics import summary
from minirl_edu.plots import Metrics

SYSTEMATIC = """# How much of an engine's error comes back at every sync?

A policy is trained for eight global steps; after each, the engine has its weights, and both engines score the same
responses. The mean square of log μ − log π over syncs and tokens splits into what is the same at every sync
(systematic) and what varies. Means over seeds, with their range.

    {command}

{table}
"""

EARLY_WARNING = """# Which metric warns before the score falls?

{held_out} runs of the phase diagrams judge it. The thresholds were chosen on {tuning} other runs, those of the
calibration, for the most falls warned of at a false-alarm rate of at most 5 %. A predictor compares a metric's fast and
slow moving average; its level, and so the threshold, is the logarithm of their ratio. A fall is warned of by an alarm
before the evaluation from which the score stayed low; an alarm in a run that never fell is a false one. No alarm is
possible in the first 20 gradient steps. `CollapseDetector` is the library's, at its defaults, which were chosen on
the calibration's runs too: its warnings about the reward, without those about the score itself.

    {command}

![ROC curves, and how early the alarms came](figures/early_warning.png)

{table}
"""

DRIFT_WARNING = """
## Where experts matter, and where lengths depend on the reward

{runs} runs of the settings `experts_…` and `trail_…`, the only ones that logged `entropy_drift` and
`length_reward_cov`. Thresholds from the runs with odd seeds, judged on the {held_out} with even ones. Those two
metrics may be negative, so their level is the fast average itself, with the sign turned: an alarm says that leaving out
the weight *would* lower the entropy. Runs with the weight have that drift too, and no harm from it.

    {command}

{table}
"""

Results = Mapping[Run, Sequence[RunResult]]


def reproduce(
    spec: Spec,
    names: Sequence[str],
    out: Path | str,
    *,
    tier: str,
    seeds: int | None = None,
    workers: int | None = None,
) -> int:
    """Run, draw and judge the figures `names` (or groups of them) into `out`; returns the command's exit status.

    `seeds=None`: as many as the tier has; `workers=None`: one per core. What is finished is kept and not run again.
    Raises ConfigError for unknown names and numbers out of range.
    """
    out, figures = Path(out), spec.expand(names)
    seeds = seeds or spec.tiers[tier].seeds
    if not spec.runs(figures, tier):
        raise ConfigError(f"tier {tier!r} leaves out all that {' '.join(names)} needs; use --tier full")
    command = f"minirl reproduce {' '.join(names)} --tier {tier} --seeds {seeds} --out {out}"
    outcome = run_all(jobs_for(spec, figures, out, tier=tier, seeds=seeds), out, workers=workers, command=command)
    print(write_results(spec, figures, out, tier=tier, seeds=seeds))
    return outcome.status


def write_results(spec: Spec, figures: Sequence[str], out: Path, *, tier: str, seeds: int) -> str:
    """Draw the figures and judge all claims from the runs under `out`; returns what to read, a line each."""
    written = []
    for name in figures:
        results = finished_runs(jobs_for(spec, [name], out, tier=tier, seeds=seeds))
        if not results:
            continue
        drawing = draw_grid(spec, spec.grids[name], results) if name in spec.grids else draw(spec, name, results)
        _save(drawing, out, name)
        written.append(f"{name}: {out / 'figures' / name}.png")
        if spec.figures[name].cases:
            command = f"minirl reproduce {name} --tier {tier} --seeds {seeds} --out {out.name}"
            written += _prediction(spec, name, results, out, command)
        if spec.figures[name].error_parts:
            written += _error_parts(spec, name, out, tier=tier, seeds=min(seeds, 3))
    if any(name in spec.grids for name in figures):
        written += _early_warning(spec, out, tier=tier, seeds=seeds)
    judged = [name for name in spec.figures if name not in spec.grids]
    results = finished_runs(jobs_for(spec, judged, out, tier=tier, seeds=seeds))
    if results and not set(figures) <= spec.grids.keys():
        judgements = judge(spec, results)
        links = {name: f"figures/{name}.png" for name in judged if (out / "figures" / f"{name}.png").exists()}
        facts = json.loads((out / "environment.json").read_text(encoding="utf-8"))
        text = claims_markdown(spec, judgements, tier=tier, seeds=seeds, out=out.name, environment=facts, figures=links)
        (out / "CLAIMS.md").write_text(text, encoding="utf-8")
        written += [f"{j.claim.id}: {j.verdict}" for j in judgements if set(j.claim.figures) & set(figures)]
        written.append(f"claims: {out / 'CLAIMS.md'}")
    return "\n".join(written)


def early_warning_page(spec: Spec, out: Path, *, tier: str, seeds: int) -> tuple[str, Drawing]:
    """EARLY_WARNING.md and its figure: the predictors of a fall judged on all runs of the phase diagrams, with
    thresholds from the calibration's.

    Then all of them, and the drift, on the spec's groups of runs that logged it.

    Raises ValueError while any of these lacks runs that fell or healthy ones.
    """
    watched: dict[bool, list[Watched]] = {True: [], False: []}  # of the calibration, of the phase diagrams
    for name in spec.grids:
        watched[spec.figures[name].calibration] += [run for _, run in _watched(spec, [name], out, tier, seeds)]
    verdicts = early_warning.judge(watched[True], watched[False])
    curves = {name: early_warning.curve(watched[False], predictor) for name, predictor in PREDICTORS.items()}
    text = EARLY_WARNING.format(
        held_out=len(watched[False]),
        tuning=len(watched[True]),
        command=f"minirl reproduce {' '.join(spec.grids)} --tier {tier} --seeds {seeds} --out {out.name}",
        table=early_warning.markdown(verdicts, {name: early_warning.area(*both) for name, both in curves.items()}),
    )
    if names := [name for group in ("experts", "lengths_all") for name in spec.groups.get(group, ())]:
        others = _watched(spec, names, out, tier, seeds)
        odd, even = ([run for seed, run in others if seed % 2 == rest] for rest in (1, 0))
        every = PREDICTORS | DRIFT_PREDICTORS
        areas = {name: early_warning.area(*early_warning.curve(even, predictor)) for name, predictor in every.items()}
        text += DRIFT_WARNING.format(
            runs=len(others),
            held_out=len(even),
            command=f"minirl reproduce {' '.join(names)} --tier {tier} --seeds {seeds} --out {out.name}",
            table=early_warning.markdown(early_warning.judge(odd, even, every), areas),
        )
    return text, plots.early_warning(curves, verdicts)


def _watched(spec: Spec, names: Sequence[str], out: Path, tier: str, seeds: int) -> list[tuple[int, Watched]]:
    """The finished runs of these figures, each with its seed."""
    return [
        (run.seed, Watched(run.metrics, summary(run, spec.definitions)["collapse_step"]))
        for runs in finished_runs(jobs_for(spec, names, out, tier=tier, seeds=seeds)).values()
        for run in runs
    ]


def _early_warning(spec: Spec, out: Path, *, tier: str, seeds: int) -> list[str]:
    """Write nothing while there is nothing to judge."""
    try:
        text, drawing = early_warning_page(spec, out, tier=tier, seeds=seeds)
    except ValueError:
        return []
    _save(drawing, out, "early_warning")
    (out / "EARLY_WARNING.md").write_text(text, encoding="utf-8")
    return [f"early warning: {out / 'EARLY_WARNING.md'}"]


def _prediction(spec: Spec, name: str, results: Results, out: Path, command: str) -> list[str]:
    """Write PREDICTION.md and its figure, where there are enough pairs of runs with the weight and without it."""
    found = {}
    for setting in dict.fromkeys(setting for setting, _ in spec.figures[name].runs):
        with_weight, without = (list(results.get((setting, variant), ())) for variant in ("minirl", "no_is"))
        if both := prediction.paired(with_weight, without):
            found[spec.settings[setting].about.rpartition(": ")[2]] = both
    everything = [pair for both in found.values() for pair in both]
    if len(everything) < 4:
        return []
    _save(plots.prediction(found), out, "prediction")
    text = prediction.markdown(found, prediction.agreement(everything), command)
    (out / "PREDICTION.md").write_text(text, encoding="utf-8")
    return [f"prediction: {out / 'PREDICTION.md'}"]


def _error_parts(spec: Spec, name: str, out: Path, *, tier: str, seeds: int) -> list[str]:
    """Measure the figure's engines, once: a minute of training of its own for each three seeds and engines."""
    path = out / "SYSTEMATIC.md"
    if not path.exists():
        torch.set_num_threads(1)
        settings = dict.fromkeys(setting for setting, _ in spec.figures[name].runs)
        configs = {s: [spec.config(tier, s, None, seed) for seed in spec.seeds(name, seeds)] for s in settings}
        parts = {
            spec.settings[setting].about: [systematic.measure_parts(config) for config in tqdm(found, desc=setting)]
            for setting, found in configs.items()
            if found[0].rollout.precision != "fp32"  # no error, no parts
        }
        command = f"minirl reproduce {name} --tier {tier} --seeds {seeds} --out {out.name}"
        text = SYSTEMATIC.format(command=command, table=systematic.markdown(parts))
        path.write_text(text, encoding="utf-8")
    return [f"systematic errors: {path}"]


def _save(drawing: Drawing, out: Path, name: str) -> None:
    (out / "figures").mkdir(exist_ok=True)
    drawing.savefig(out / "figures" / f"{name}.svg")
    (out / "figures" / f"{name}.png").write_bytes(plots.to_png(drawing, scale=1.5))


def draw(spec: Spec, name: str, results: Results) -> Drawing:
    """The figure's four panels (score, reward, entropy, KL), a line per run: mean over seeds with its 95 % interval.

    Of a figure of `cases`: entropy and score in each setting.
    """
    settings = {setting for setting, _ in results}
    if spec.figures[name].cases:
        titles = {setting: spec.settings[setting].about.rpartition(": ")[2] for setting, _ in spec.figures[name].runs}
        return plots.cases(
            {
                title: {
                    spec.variants[variant].label: [result.metrics for result in results[at, variant]]
                    for at, variant in spec.figures[name].runs
                    if at == setting and results.get((at, variant))
                }
                for setting, title in titles.items()
                if setting in settings
            }
        )
    curves: dict[str, list[Metrics]] = {}
    for setting, variant in spec.figures[name].runs:
        if found := results.get((setting, variant)):
            label = spec.variants[variant].label + (f" ({setting})" if len(settings) > 1 else "")
            curves[label] = [result.metrics for result in found]
    return plots.four_curves(curves)


def draw_grid(spec: Spec, grid: Grid, results: Results) -> Drawing:
    """The grid's phase diagrams, a panel per variant: final score, share of the runs that collapsed, share in which
    `CollapseDetector` warned about the reward."""
    shape = (len(grid.up[1]), len(grid.across[1]))
    panels = {}
    for variant in grid.variants:
        scores, collapsed, alarmed = (np.full(shape, np.nan) for _ in range(3))
        for at in np.ndindex(shape):
            found = results.get((grid.setting(grid.across[1][at[1]], grid.up[1][at[0]]), variant), [])
            if found:
                numbers = [summary(result, spec.definitions) for result in found]
                scores[at] = np.mean([n["final_score"] for n in numbers])
                collapsed[at] = np.mean([n["collapsed"] for n in numbers])
                alarmed[at] = np.mean([early_warning.detector_alarm(result.metrics) is not None for result in found])
        panels[spec.variants[variant].label] = (scores, collapsed, alarmed)
    return plots.phase_diagrams(panels, grid.across, grid.up)
