"""What lab 12 uses: the stored runs as numbers, the page of verdicts, tables and figures.

A run is named by its setting and its variant, such as ("on_policy", "minirl"). `columns` gives one number of two runs,
seed by seed. Figures take numbers and return a matplotlib Figure.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from minirl_edu.course import check, checkout, diagnose, find
from minirl_edu.course.page import BLUE, GREEN, GREY, ORANGE, charts, image, show_table, sliders, tidy
from minirl_edu.experiments.spec import METRICS, Criterion, RunResult, load_spec, read_runs
from minirl_edu.experiments.statistics import proportion, summary, t_quantile
from minirl_edu.plots import METHOD_STYLE

__all__ = [
    "METRICS", "SPEC", "board", "card", "check", "columns", "count", "coverage_figure", "criterion_figure",
    "image", "intervals_figure", "itertools", "math", "np", "page_verdicts", "points", "proportion", "reasons_figure",
    "scores_of", "seeds_figure", "show", "show_table", "side_by_side", "sliders", "t_quantile", "yours",
]  # fmt: skip

SPEC = load_spec()
"""Settings, variants and claims of the reproduction, with the criteria that were fixed beforehand."""

Run = tuple[str, str]


@functools.cache
def _setting(name: str) -> dict[str, dict[int, RunResult]]:
    return read_runs(checkout() / "lessons" / "results" / "runs" / "full" / name)


@functools.cache
def _numbers(run: Run) -> dict[int, dict[str, Any]]:
    setting, variant = run
    return {seed: summary(result, SPEC.definitions) for seed, result in _setting(setting)[variant].items()}


def scores_of(run: Run, seed: int) -> np.ndarray:
    """The evaluations of one stored run on held-out problems, in order."""
    scores = _setting(run[0])[run[1]][seed].metrics["score"]
    return scores[np.isfinite(scores)]


def columns(
    run: Run, than: Run, key: str = "final_score", than_key: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One number of two stored runs, on the seeds that both have: `statistics.summary` says which numbers there are."""
    mine, theirs = _numbers(run), _numbers(than)
    seeds = sorted(mine.keys() & theirs.keys())
    other = than_key or key
    return np.array([float(mine[s][key]) for s in seeds]), np.array([float(theirs[s][other]) for s in seeds])


def count(run: Run) -> tuple[int, int]:
    """How many seeds of a run collapsed, and how many there are."""
    found = [one["collapsed"] for one in _numbers(run).values()]
    return sum(found), len(found)


def _section(heading: str) -> str:
    """The text of CLAIMS.md below a heading, up to the next of the same rank or a higher one."""
    page = (checkout() / "lessons" / "results" / "CLAIMS.md").read_text(encoding="utf-8")
    found = page.partition(f"\n{heading}\n")[2].strip()
    return re.split(r"\n## " if heading.startswith("## ") else r"\n###? ", found)[0]


def page_verdicts() -> dict[str, str]:
    """The verdicts in CLAIMS.md by claim."""
    return dict(re.findall(r"^\| \[(\S+)\]\(#\S+\) \| .+? \| \**(.+?)\** \| ", _section("## Verdicts"), re.M))


def side_by_side() -> None:
    """Show the table of CLAIMS.md in which a finding was judged in several kinds of settings."""
    table = _section("## Side by side").partition("\n\n")[2].partition("\n\n")[0]
    display(Markdown(table.replace("](#", "](../lessons/results/CLAIMS.md#")))


def card(claim_id: str) -> None:
    """Show a claim as CLAIMS.md has it: the paper's setting, ours, the criteria with their effects."""
    text = _section(f"### {claim_id}").replace("](figures/", "](../lessons/results/figures/")
    display(Markdown(f"Claim {claim_id}: {text}"))


def yours(exercise_id: str, answer: Any) -> Any:
    """The learner's answer if the checker finds it right, else the solution, so that the lab goes on without it."""
    exercise = find(exercise_id)
    right = diagnose(exercise, answer).right
    print(f"{exercise_id}: {'your answer' if right else 'the solution'} is used below")
    return answer if right else exercise.solution


def points(*values: float) -> str:
    """Shares as points, such as +1.7 to +9.9."""
    return " to ".join(f"{100 * value:+.1f}".replace("-", "−") for value in values)


def show(figure: Figure) -> None:
    """Show a figure at the width of the page."""
    display(image(figure))


# ---------------------------------------------------------------------------------------------------------- figures


def seeds_figure(methods: Mapping[str, np.ndarray]) -> Figure:
    """Scores of each method: a dot for each seed, joined where the seed is the same, and the mean with its interval."""
    figure, (ax,) = charts(1, 3.6)
    tidy(ax)
    names, table = list(methods), np.array(list(methods.values()))
    for seed in table.T:
        ax.plot(range(len(names)), 100 * seed, "-", color="#CCCCCC", linewidth=1)
    for i, (name, values) in enumerate(methods.items()):
        style = METHOD_STYLE[name]
        ax.plot([i] * len(values), 100 * values, style["marker"], color=style["color"], markersize=6, alpha=0.7)
        half = t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
        ax.errorbar(i + 0.16, 100 * values.mean(), 100 * half, color=style["color"], marker="_", capsize=5, linewidth=2)
    ax.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.4, len(names) - 0.4), ylabel="final score, points")
    return figure


def intervals_figure(rows: Mapping[str, tuple[np.ndarray, float, float]], label: str, margin: float = 0.0) -> Figure:
    """One line for each comparison: the seeds' differences (grey), their mean and an interval, in points."""
    figure, (ax,) = charts(1, 0.9 + 0.45 * len(rows))
    tidy(ax)
    for i, (differences, low, high) in enumerate(reversed(list(rows.values()))):
        ax.plot(100 * differences, np.full(len(differences), i + 0.22), "|", color="#888888", markersize=9)
        ax.plot([100 * low, 100 * high], [i, i], "-", color=BLUE, linewidth=2.4)
        ax.plot(50 * (low + high), i, "o", color=BLUE, markersize=7)
    ax.axvline(0, color="#222222", linewidth=1)
    if margin:
        ax.axvspan(-100 * margin, 100 * margin, color="#EDEDED", zorder=-1)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows)[::-1], ylim=(-0.6, len(rows) - 0.3), xlabel=label)
    return figure


def coverage_figure(seeds: int, wilson: Callable[[int, int], Sequence[float]] | None = None) -> Figure:
    """How often each interval for a rate contains the true rate, exactly: the binomial sum over all counts."""
    own = wilson or find("12.4").solution
    figure, (ax,) = charts(1, 3.0)
    tidy(ax)
    rates = np.linspace(0.005, 0.995, 199)
    chances = np.array([math.comb(seeds, k) * rates**k * (1 - rates) ** (seeds - k) for k in range(seeds + 1)])
    for name, interval, color in (("Wilson", own, ORANGE), ("exact", lambda k, n: proportion(k, n)[1:], BLUE)):
        ends = np.array([[float(x) for x in interval(k, seeds)] for k in range(seeds + 1)])
        inside = (ends[:, :1] <= rates) & (rates <= ends[:, 1:])
        ax.plot(
            rates, 100 * (chances * inside).sum(0), color=color, label=name, linestyle="-" if color == BLUE else "--"
        )
    ax.axhline(95, color="#222222", linewidth=1)
    ax.set(xlabel="true rate of collapse", ylabel="covered, %", ylim=(78, 101), title=f"{seeds} seeds")
    ax.legend(frameon=False, loc="lower right")
    return figure


def criterion_figure(claim: str, interval_of: Callable[[Criterion], Sequence[float]]) -> Figure:
    """The criteria of a claim: each interval against the margin that the truth is claimed to lie above."""
    found = next(one for one in SPEC.claims if one.id == claim)
    figure, (ax,) = charts(1, 1.0 + 0.5 * len(found.criteria))
    tidy(ax)
    ticks = []
    for i, criterion in enumerate(reversed(found.criteria)):
        low, high, margin = interval_of(criterion)
        color = GREEN if low > margin else ORANGE if high < min(0.0, margin) else GREY
        ax.plot([low, high], [i, i], color=color, linewidth=4, solid_capstyle="butt")
        ax.plot([margin] * 2, [i - 0.3, i + 0.3], color="#222222", linewidth=2)
        names = [SPEC.variants[run[1]].label for run in (criterion.run, criterion.than) if run]
        ticks.append(f"{criterion.kind.replace('_', ' ')}: {', '.join(names)}")
    ax.axvline(0, color="#222222", linewidth=0.6, linestyle=":")
    ax.set(yticks=range(len(ticks)), yticklabels=ticks, ylim=(-0.6, len(ticks) - 0.4), title=claim)
    ax.set_xlabel("what is claimed lies to the right of its mark")
    return figure


def reasons_figure(
    lengths: Mapping[str, np.ndarray], experts: Mapping[str, np.ndarray], labels: tuple[str, str]
) -> Figure:
    """Differences of each seed, and their means, in settings of two kinds."""
    figure, axes = charts(2, 3.4)
    for ax, groups, color, label in zip(axes, (lengths, experts), (ORANGE, GREEN), labels, strict=True):
        for i, values in enumerate(groups.values()):
            ax.bar(i, values.mean(), 0.6, color=color, alpha=0.35)
            ax.plot(np.linspace(i - 0.18, i + 0.18, len(values)), values, "o", color=color, markersize=4)
        ax.axhline(0, color="#222222", linewidth=1)
        ax.set_xticks(range(len(groups)), list(groups), fontsize=9)
        tidy(ax, title=label)
    return figure


def board(own: Mapping[str, str]) -> None:
    """Show the learner's verdicts beside those of CLAIMS.md, those that differ in bold."""
    known = page_verdicts()
    rows = [
        [claim, word, known[claim] if known[claim] == word else f"**{known[claim]}**"] for claim, word in own.items()
    ]
    agreed = sum(known[claim] == word for claim, word in own.items())
    print(f"{agreed} of {len(own)} verdicts are those of CLAIMS.md")
    half = math.ceil(len(rows) / 2)
    pairs = itertools.zip_longest(rows[:half], rows[half:], fillvalue=["", "", ""])
    show_table(["claim", "yours", "CLAIMS.md"] * 2, [[*left, *right] for left, right in pairs])
