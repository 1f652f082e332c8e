"""Runs of the worlds as CSV files, figures and tables.

A CSV file has a line per scenario, variant, metric and seed, with a column per logged step. Of the sweep, on which the
world's prediction is tested, it has the prediction and the value that is compared with it.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from minirl_edu.diagnostics import mean_interval
from minirl_edu.drift import drift, entropy_gradient, gradient_variance
from minirl_edu.exact import TabularPolicy
from minirl_edu.objectives import CORRECTIONS
from minirl_edu.plots import METHOD_STYLE
from minirl_edu.worlds.simulations import VARIANTS, WORLDS, Curves, Variant, doomed_tails, doomed_tails_border

CORRECTION_OF = {name: v.correction for name, v in VARIANTS.items() if v == Variant(correction=v.correction)}
"""The variants that differ in the correction alone."""

Runs = dict[str, dict[str, Curves]]
"""Scenario → variant → curves."""
Sweep = list[tuple[float, np.ndarray]]
"""A prediction, and what was measured with each seed."""

PHASES_LENGTHS = ((3, 96), (3, 72), (3, 48), (3, 24), (3, 3), (24, 3), (48, 3), (72, 3), (96, 3))
"""Tokens of a right and of a wrong response in the phase diagram."""
PHASES_SIGMAS = (0.3, 0.45, 0.6, 0.8, 1.0, 1.2)
"""Its noise on the engine's logits."""


def run_world(name: str, seeds: int) -> tuple[Runs, Sweep]:
    """All scenarios with all variants, and the sweep."""
    world = WORLDS[name]
    runs = {
        scenario: {variant: world.run(VARIANTS[variant], seeds=seeds, **setting) for variant in world.variants}
        for scenario, setting in world.scenarios.items()
    }
    sweep = []
    for setting in world.sweep:
        curves = world.run(VARIANTS[world.swept], seeds=seeds, **setting)
        at = round(world.when * (len(curves["step"]) - 1))
        sweep.append((world.predict(**setting), curves[world.measured][:, at]))
    return runs, sweep


def write_csv(path: Path, runs: Runs, sweep: Sweep) -> None:
    """Both as one file, but for kl and ess, to keep it small; `read_csv` gives them back."""
    steps = next(iter(next(iter(runs.values())).values()))["step"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["scenario", "variant", "metric", "seed", *steps])
        for scenario, variants in runs.items():
            for variant, curves in variants.items():
                for metric in [name for name in curves if name not in ("step", "kl", "ess")]:
                    for seed, values in enumerate(curves[metric]):
                        writer.writerow([scenario, variant, metric, seed, *(f"{value:.3g}" for value in values)])
        for predicted, measured in sweep:
            writer.writerows(["sweep", f"{predicted:.4g}", "", seed, f"{m:.3g}"] for seed, m in enumerate(measured))


def read_csv(path: Path) -> tuple[Runs, Sweep]:
    """What `write_csv` wrote, to three digits."""
    with path.open(newline="", encoding="utf-8") as file:
        _, _, _, _, *steps = next(rows := csv.reader(file))
        lines: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
        swept: dict[str, list[float]] = {}
        for scenario, variant, metric, _, *values in rows:
            if scenario == "sweep":
                swept.setdefault(variant, []).append(float(values[0]))
            else:
                found = lines.setdefault(scenario, {}).setdefault(variant, {})
                found.setdefault(metric, []).append([float(value) for value in values])
    runs = {
        scenario: {
            variant: {"step": np.array([int(step) for step in steps])} | {m: np.array(v) for m, v in metrics.items()}
            for variant, metrics in variants.items()
        }
        for scenario, variants in lines.items()
    }
    return runs, [(float(predicted), np.array(measured)) for predicted, measured in swept.items()]


def final(curves: Curves, metric: str) -> tuple[float, float]:
    """Mean over seeds at the last step, and the half-width of its 95 % interval."""
    mean, half = mean_interval(curves[metric][:, -1:])
    return float(mean[0]), float(half[0])


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def world_table(name: str, runs: Runs) -> str:
    """Final values of the world's panels: a row per variant, a column per scenario and panel."""
    panels = WORLDS[name].panels
    headers = ["", *(f"{scenario}: {_words(panel)}" for scenario in runs for panel in panels)]
    rows = [
        [variant, *(_cell(final(variants[variant], panel)) for variants in runs.values() for panel in panels)]
        for variant in WORLDS[name].variants
    ]
    return table(headers, rows)


def exact_shares(*, sigma: float = 1.0, pairs: int = 100) -> dict[str, tuple[float, float, float]]:
    """Per correction, exactly: the drift that is left, its standard error, and the variance of the gradient.

    One prompt whose responses can all be written down (up to six tokens of four): the first token decides, the right
    one has probability 0.3 and a wrong one 0.6; a right response then ends with probability 0.9 a token, a wrong one
    with 0.02. The engine's logits are the trainer's plus noise of standard deviation `sigma`; the expectation over the
    noise is a mean over `pairs` of draws ±ε, hence the standard error. The drift is that of the entropy,
    Σ_c ⟨drift(c), ∇H(c)⟩, and both it and the variance are given as multiples of those without a correction.
    """
    policy, rewards = _decided_by_the_first_token()
    logp, climb = policy.log_probs(), entropy_gradient(policy.logits)
    generator = torch.Generator().manual_seed(0)
    drifts: dict[str, list[float]] = defaultdict(list)
    variances: dict[str, list[float]] = defaultdict(list)
    for _ in range(pairs):
        noise = torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
        engines = [policy.moved(noise, sign * sigma) for sign in (1, -1)]
        for name, correct in CORRECTIONS.items():
            left, variance = 0.0, 0.0
            for engine in engines:
                advantages = rewards - (engine.response_probs() * rewards).sum()
                weight = correct(logp, logp, engine.log_probs(), advantages, policy.mask).weight
                left += float((drift(policy, engine, rewards, weight) * climb).sum()) / 2
                variance += float(gradient_variance(policy, engine, rewards, weight)) / 2
            drifts[name].append(left)
            variances[name].append(variance)
    whole, shares = np.array(drifts["none"]), {}
    for name in CORRECTIONS:
        left = np.array(drifts[name])
        share = left.mean() / whole.mean()
        error = (left - share * whole).std(ddof=1) / math.sqrt(pairs) / abs(whole.mean())  # of a ratio of two means
        variance = np.mean(variances[name]) / np.mean(variances["none"])
        shares[name] = (float(share), float(error), float(variance))
    return shares


def one_table(folder: Path) -> str:
    """Per correction: the drift left and the variance (`exact_shares`), and the final score in the three worlds."""
    shares = exact_shares()  # of the same noise as in doomed_tails
    columns = [
        ("doomed_tails", "wrong ones longer", "score"),
        ("doomed_tails", "all alike", "score"),
        ("doomed_tails", "right ones longer", "score"),
        ("leaky_engine", "the better answer is rare", "score"),
        ("who_gets_the_gradient", "router noise 0.3", "engine_score"),
    ]
    runs = {name: read_csv(folder / f"{name}.csv")[0] for name in WORLDS}
    headers = ["", "drift left", "variance", *(f"{_words(w)}: {s}" for w, s, _ in columns)]
    rows = []
    for variant in VARIANTS:
        cells = ["", ""]
        if variant in CORRECTION_OF:
            left, error, variance = shares[CORRECTION_OF[variant]]
            cells = [f"{left:+.2f} ± {1.96 * error:.2f}", f"{variance:.2f}"]
        for world, scenario, metric in columns:
            curves = runs[world][scenario].get(variant)
            cells.append(_cell(final(curves, metric)) if curves else "")
        rows.append([variant, *cells])
    return table(headers, rows)


def figure(name: str, runs: Runs, sweep: Sweep) -> Figure:
    """Curves of the methods that the paper names, final scores of all, and measured against predicted.

    A column per scenario; mean over seeds and 95 % interval.
    """
    world = WORLDS[name]
    rows = len(world.panels) + 1
    shape = (3.6 * len(runs) + 3.9, 2.7 * rows + 0.5)
    drawing = Figure(figsize=shape, layout="constrained", facecolor="white")
    axes = drawing.subplots(rows, len(runs) + 1, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    curves_of = [variant for variant in world.variants if variant in METHOD_STYLE]
    for column, (scenario, variants) in enumerate(runs.items()):
        for row, panel in enumerate(world.panels):
            ax = axes[row, column]
            for order, variant in enumerate(curves_of):
                _curve(ax, variants[variant], panel, variant, order)
            ax.set_ylabel(_words(panel) if column == 0 else "")
            ax.set_ylim((-0.03, 1.03) if "score" in panel else (0, None))
            ax.set_xlabel("gradient step")
        axes[0, column].set_title(scenario, loc="left", fontsize=11.5, fontweight="bold")
        _dots(axes[-1, column], variants, world.panels[-1] if name == "who_gets_the_gradient" else "score", column == 0)
    for ax in axes[1:, -1]:
        ax.set_axis_off()
    seeds = len(next(iter(next(iter(runs.values())).values()))[world.panels[0]])
    note = (
        f"Mean of {seeds} seeds and 95 % interval.\nLines that coincide hide one another.\n"
        "Dotted, last row: at the start.\nDotted, above: what is predicted."
    )
    axes[-1, -1].text(0, 0.9, note, transform=axes[-1, -1].transAxes, va="top")
    _prediction(axes[0, -1], name, sweep)
    drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=7, frameon=False)
    return drawing


def phases(seeds: int) -> list[dict[str, float]]:
    """Doomed tails on a grid of lengths × noise, with the weight and without: a row per cell and seed.

    `cov`: Cov(|y|, R) of the first batch, in tokens, mean over seeds; `border`: `doomed_tails_border`, from the start
    alone; `start`: the score before training; `with`, `without`: the scores in the end.
    """
    rows = []
    for sigma in PHASES_SIGMAS:
        for win, lose in PHASES_LENGTHS:
            setting: dict[str, Any] = {"sigma": sigma, "win": win, "lose": lose}
            runs = [doomed_tails(VARIANTS[name], seeds=seeds, **setting) for name in ("MiniRL", "− IS")]
            cell = setting | {
                "cov": float(runs[1]["length_reward_cov"][:, 0].mean()),
                "border": doomed_tails_border(**setting),
            }
            for seed, (start, weighted, without) in enumerate(
                zip(runs[1]["score"][:, 0], runs[0]["score"][:, -1], runs[1]["score"][:, -1], strict=True)
            ):
                rows.append(cell | {"seed": seed, "start": start, "with": weighted, "without": without})
    return rows


def write_phases(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """As CSV, to four digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{value:.4g}" for value in row.values()] for row in rows)


def read_phases(path: Path) -> list[dict[str, float]]:
    """What `write_phases` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def phases_table(rows: Sequence[dict[str, float]]) -> str:
    """Final scores without the weight (with it), a row per σ; bold where the border is beyond ±1."""
    cells = _cells(rows)
    headers = ["σ", *(f"{win} / {lose}" for win, lose in PHASES_LENGTHS)]
    body = []
    for sigma in PHASES_SIGMAS:
        line = [f"{sigma:g}"]
        for win, lose in PHASES_LENGTHS:
            cell = cells[sigma, win, lose]
            text = f"{cell['without']:.2f} ({cell['with']:.2f})"
            line.append(f"**{text}**" if abs(cell["border"]) > 1 else text)
        body.append(line)
    return table(headers, body)


def phases_agreement(rows: Sequence[dict[str, float]]) -> dict[tuple[bool, bool], int]:
    """Cells by (predicted: |border| > 1, measured: the score without the weight ends below half of that with it)."""
    counts = dict.fromkeys([(p, m) for p in (True, False) for m in (True, False)], 0)
    for cell in _cells(rows).values():
        counts[abs(cell["border"]) > 1, cell["without"] < cell["with"] / 2] += 1
    return counts


def phases_figure(rows: Sequence[dict[str, float]]) -> Figure:
    """Where leaving out the weight fails: Cov(|y|, R) × σ², the score that it costs, and the predicted border."""
    cells = _cells(rows)
    grid = (len(PHASES_SIGMAS), len(PHASES_LENGTHS))
    of = {
        key: np.array([cells[s, w, x][key] for s in PHASES_SIGMAS for w, x in PHASES_LENGTHS]).reshape(grid)
        for key in ("cov", "border", "with", "without")
    }
    drawing = Figure(figsize=(9.6, 4.8), layout="constrained", facecolor="white")
    ax = drawing.subplots()
    lost = of["with"] - of["without"]
    image = ax.imshow(lost.clip(min=0), origin="lower", aspect="auto", cmap="Reds", vmin=0, vmax=1)
    for row, column in np.ndindex(grid):
        color = "white" if lost[row, column] > 0.6 else "#222222"
        ax.text(column, row, f"{of['without'][row, column]:.2f}", ha="center", va="center", color=color)
    for row, column in np.ndindex(grid):  # the border runs between cells on its two sides
        beyond = abs(of["border"]) > 1
        if column + 1 < grid[1] and beyond[row, column] != beyond[row, column + 1]:
            ax.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], color="black", linewidth=2.5)
        if row + 1 < grid[0] and beyond[row, column] != beyond[row + 1, column]:
            ax.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, color="black", linewidth=2.5)
    covs = of["cov"].mean(0)
    ax.set_xticks(range(grid[1]), [f"{c:+.1f}\n{w} / {x}" for c, (w, x) in zip(covs, PHASES_LENGTHS, strict=True)])
    ax.set_yticks(range(grid[0]), [f"{s**2:.2g}" for s in PHASES_SIGMAS])
    ax.set_xlabel("Cov(length, reward) in tokens; below it the lengths of right / wrong responses")
    ax.set_ylabel("σ², the noise on the engine's logits")
    seeds = len({row["seed"] for row in rows})
    ax.set_title(
        f"Number: final score without the weight, mean of {seeds} seeds. Colour: what the weight adds to it.\n"
        "Black line: above it the drift is predicted to outweigh the signal.",
        loc="left",
        fontsize=11,
    )
    drawing.colorbar(image, ax=ax, label="score with − without the weight")
    return drawing


def _cells(rows: Sequence[dict[str, float]]) -> dict[tuple[float, int, int], dict[str, float]]:
    """Means over seeds by (sigma, win, lose)."""
    found: dict[tuple[float, int, int], list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        found[row["sigma"], int(row["win"]), int(row["lose"])].append(row)
    return {
        key: {name: float(np.mean([row[name] for row in group])) for name in group[0]} for key, group in found.items()
    }


def _curve(ax: Any, curves: Curves, metric: str, variant: str, order: int) -> None:
    mean, half = mean_interval(curves[metric])
    style = METHOD_STYLE[variant] | {"markersize": 5, "markevery": (order % 3, 3), "linewidth": 1.7}
    ax.plot(curves["step"], mean, label=variant, markeredgecolor="white", markeredgewidth=0.5, **style)
    ax.fill_between(curves["step"], mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)


def _dots(ax: Any, variants: dict[str, Curves], metric: str, named: bool) -> None:
    for height, variant in enumerate(reversed(variants)):
        mean, half = final(variants[variant], metric)
        color = METHOD_STYLE.get(variant, {"color": "#444444"})["color"]
        ax.errorbar(mean, height, xerr=half, fmt="o", color=color, markersize=5, capsize=2.5)
    start = float(next(iter(variants.values()))[metric][:, 0].mean())
    ax.axvline(start, color="#999999", linewidth=1, linestyle=":")
    ax.set(xlim=(-0.03, 1.03), xlabel=f"final {_words(metric)}")
    ax.set_yticks(range(len(variants)), list(reversed(variants)) if named else [])
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def _prediction(ax: Any, name: str, sweep: Sweep) -> None:
    world = WORLDS[name]
    for predicted, measured in sweep:
        mean, half = mean_interval(measured[:, None])
        color = METHOD_STYLE[world.swept]["color"]
        ax.errorbar(predicted, mean[0], yerr=half[0], fmt="o", color=color, markersize=4.5, capsize=2.5)
    ax.set_xlabel(world.prediction)
    when = "at the end" if world.when == 1 else f"after {world.when:.0%}"
    ax.set_ylabel(f"{_words(world.measured)} {when}")
    ax.set_title(f"predicted ({world.swept})", loc="left", fontsize=11.5, fontweight="bold")
    if name == "who_gets_the_gradient":
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        return
    ax.axvline(1, color="#999999", linewidth=1, linestyle=":")
    if name == "doomed_tails":
        ax.axhline(math.log(0.5), color="#999999", linewidth=1, linestyle=":")


def _cell(value: tuple[float, float]) -> str:
    mean, half = value
    return f"{mean:.2f} ± {half:.2f}"


def _words(name: str) -> str:
    return {"engine_score": "score through the engine", "margin": "z_right − z_mode"}.get(name, name.replace("_", " "))


def _decided_by_the_first_token() -> tuple[TabularPolicy, torch.Tensor]:
    """The prompt of `exact_shares`: vocabulary (right, mode, other, end), at most six tokens."""
    shape = TabularPolicy.random(4, 6, seed=0)
    first = torch.full((len(shape.logits),), -1)  # first token of each prefix; of the empty one, row 0, there is none
    first[shape.prefix[shape.mask]] = shape.tokens[:, :1].expand(shape.mask.shape)[shape.mask]
    first[0] = -1
    end = torch.where(first == 0, 0.9, torch.where(first < 0, 0.001, 0.02)).double()[:, None]
    words = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    return TabularPolicy(torch.cat([(1 - end) * words, end], 1).log(), 6), (shape.tokens[:, 0] == 0).double()
