"""What lab 10, the six mystery runs, imports: the charts and how they are drawn, and the lab's other figures."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, checkout, page
from minirl_edu.course.mystery import FAULTS, HEALTHY, read_charts
from minirl_edu.course.page import BLUE, GREEN, GREY, ORANGE, image, show_table, sliders, tidy
from minirl_edu.diagnostics import CollapseDetector, kl_k3
from minirl_edu.exact import TabularPolicy
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import to_png
from minirl_edu.precision import Precision
from minirl_edu.records import Metrics
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

__all__ = ["FAULTS", "HEADER", "HEALTHY", "RUNS", "ChainTask", "CollapseDetector", "HFEngine", "Image", "Precision"]
__all__ += ["Sampling", "TabularPolicy", "can_share_prompts", "chart_of", "chart_sheet", "charts", "check", "checkout"]
__all__ += ["display", "entropy_ratios", "group_mean_advantages", "image", "kl_k3", "kl_over_temperature", "lay_out"]
__all__ += ["load_model", "load_tokenizer", "math", "minirl_loss", "noise_over_reward", "np", "read_charts"]
__all__ += ["readings", "response_logprobs", "show_table", "sliders", "temperature_curves", "to_png", "torch"]

logging.disable_progress_bar()
torch.set_num_threads(1)

RUNS = sorted(FAULTS)
"""The names of the six runs."""

# In the order in which to read them: impossible readings, engine against trainer, step size, and the score last.
_PANELS = {
    "routing_flip_rate": ("flip rate", "linear"),
    "clip_frac_neg": ("clipped from below, share", "linear"),
    "log_ratio_mismatch": ("mismatch |log π_old/μ_old|", "log"),
    "log_ratio_staleness": ("staleness |log π_θ/π_old|", "log"),
    "score": ("score (dashed: engine's)", "linear"),
    "reward": ("training reward", "linear"),
    "entropy": ("token entropy, nats", "linear"),
    "grad_norm": ("gradient norm", "log"),
    "response_length": ("tokens per response", "linear"),
}
# A dead run falls through any floor of a logarithmic axis.
_LIMITS = {"grad_norm": (0.05, 50), "log_ratio_mismatch": (0.01, 4), "log_ratio_staleness": (1e-3, 10)}
_LIMITS |= {"reward": (0, 1), "score": (0, 1), "clip_frac_neg": (-0.003, 0.08), "routing_flip_rate": (-0.03, 0.85)}


@functools.cache
def charts() -> dict[str, list[Metrics]]:
    """The charts of the six runs and of the healthy one, for each seed that was recorded for all of them."""
    stored = read_charts(checkout() / "lessons" / "results" / "mystery")
    seeds = sorted(set.intersection(*(set(stored[name]) for name in (*RUNS, HEALTHY))))
    return {name: [stored[name][seed] for seed in seeds] for name in (*RUNS, HEALTHY)}


def _draw(ax: Axes, chart: Metrics, key: str, colour: str, width: float, line: str = "-") -> None:
    """One curve: scores as they are, the others as a mean over a whole rollout of four gradient steps."""
    known = np.isfinite(chart[key])
    steps, values = chart["grad_step"][known], chart[key][known]
    if not key.startswith("score"):
        steps, values = steps[3:], np.convolve(values, np.ones(4) / 4, "valid")
    ax.plot(steps, values, color=colour, linewidth=width, linestyle=line)


def _sheet(title: str, rows: int, healthy: Sequence[Metrics], sick: Metrics | None) -> Figure:
    figure, axes = page.charts(3, 2.3 * rows, rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    for ax, (key, (name, scale)) in zip(axes, list(_PANELS.items())[: len(axes)], strict=True):
        drawn = [*((chart, GREY, 1.4) for chart in healthy), *([(sick, ORANGE, 2.2)] if sick else [])]
        for chart, colour, width in drawn:
            _draw(ax, chart, key, colour, width)
            if key == "score" and (sick is None or chart is sick):
                _draw(ax, chart, "score_rollout", colour, 1.4, "--")
        ax.set_yscale(scale)
        ax.set_ylim(_LIMITS.get(key))
        tidy(ax, name)
    figure.supxlabel("gradient step", fontsize=11)
    return figure


def chart_of(name: str, seed: int = 0) -> Figure:
    """Six instruments of one run in orange, and of the healthy run with the same seed in grey."""
    return _sheet(f"run {name}", 2, [charts()[HEALTHY][seed]], charts()[name][seed])


def chart_sheet(sick: Metrics | None = None, name: str = "") -> Figure:
    """Nine instruments: every seed of the healthy run in grey, and one chart in orange."""
    title = f"{name}   grey: healthy" if name else "the healthy run, every seed"
    return _sheet(title, 3, charts()[HEALTHY], sick)


HEADER = ["run", "best score", "last (engine's)", "reward − score, step 1", "mismatch, step 1 → last"]
HEADER += ["staleness, steps 5–40", "clipped from below, most", "flip rate, most", "mean weight, last"]
"""The columns of `readings`."""


def _reading(chart: Metrics, key: str, where: str) -> float:
    part = {"first": slice(1, 5), "early": slice(5, 41), "last": slice(-40, None), "all": slice(None)}[where]
    values = chart[key][part]
    values = values[np.isfinite(values)]
    return float(values.max() if where == "all" else values.mean())


def readings(seed: int) -> list[list[str]]:
    """A row of numbers for the healthy run and each of the six."""
    rows = []
    for name in (HEALTHY, *RUNS):
        chart = charts()[name][seed]
        own, engine = (chart[key][np.isfinite(chart[key])] for key in ("score", "score_rollout"))
        mismatch = (f"{_reading(chart, 'log_ratio_mismatch', where):.3f}" for where in ("first", "last"))
        row = [name, f"{own.max():.2f}", f"{own[-1]:.2f} ({engine[-1]:.2f})"]
        row += [f"{_reading(chart, 'reward', 'first') - own[0]:+.2f}", " → ".join(mismatch)]
        row += [f"{_reading(chart, 'log_ratio_staleness', 'early'):.3f}"]
        row += [f"{_reading(chart, 'clip_frac_neg', 'all'):.3f}", f"{_reading(chart, 'routing_flip_rate', 'all'):.2f}"]
        rows.append([*row, f"{_reading(chart, 'is_weight_mean', 'last'):.2f}"])
    return rows


def temperature_curves(
    temperatures: Sequence[float],
    kls: Mapping[float, Sequence[Tensor]],
    entropies: Sequence[Tensor],
    at: Sequence[Tensor],
) -> Figure:
    """The KL over the sampler's temperature, a curve for each entropy; and the KL at T = 0.7 over the entropy."""
    figure, (left, right) = page.charts(2, 3.4)
    for (entropy, values), colour in zip(kls.items(), (BLUE, GREEN, ORANGE), strict=True):
        left.plot(temperatures, values, color=colour, label=f"entropy {entropy:.2f}")
    tidy(left, xlabel="temperature of the sampler", ylabel="KL, nats per token")
    left.legend(frameon=False)
    right.plot(entropies, at, color=BLUE)
    tidy(right, xlabel="entropy of the policy, nats", ylabel="KL at T = 0.7, nats per token")
    return figure


def noise_over_reward(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """The size of one response's gradient over the policy's expected reward, a line for each baseline."""
    figure, (ax,) = page.charts(1, 3.3)
    for (label, pairs), colour in zip(points.items(), (ORANGE, BLUE), strict=True):
        ax.plot(*zip(*pairs, strict=True), "o-", color=colour, label=label)
    ax.set_ylim(0, None)
    tidy(ax, xlabel="expected reward of the policy", ylabel=r"$\mathbb{E}\,\Vert (R - b)\,g\Vert^2$")
    ax.legend(frameon=False)
    return figure


def kl_over_temperature(temperatures: Sequence[float], kls: Sequence[float], hidden: float) -> Figure:
    """The KL of one rollout, scored at several temperatures; the sampler's own is marked."""
    figure, (ax,) = page.charts(1, 3.1)
    ax.plot(temperatures, kls, "o-", color=BLUE)
    ax.axvline(hidden, color=GREY, linestyle=":", label="the sampler's own")
    ax.set_yscale("log")
    tidy(ax, xlabel="temperature at which the trainer scores", ylabel="k₃, nats per token")
    ax.legend(frameon=False)
    return figure


def entropy_ratios(ratios: Mapping[str, Sequence[Sequence[float]]], limits: Sequence[float]) -> Figure:
    """Left, where (10.7) settles; right, the fast over the slow average of entropy in some runs, every seed."""
    figure, (left, right) = page.charts(2, 3.6, sharey=True)
    fall = np.linspace(0, 0.0199, 100)
    left.plot(100 * fall, (1 - 50 * fall) / (1 - 10 * fall), color=BLUE, linewidth=2)
    left.set_ylim(0, 1.3)
    tidy(left, xlabel="fall of the entropy, % a step", ylabel="fast average / slow average")
    for (name, curves), colour in zip(ratios.items(), (GREY, ORANGE), strict=True):
        for i, curve in enumerate(curves):
            right.plot(curve, color=colour, linewidth=1.8, label=name if i == 0 else None)
    for limit in limits:
        for ax in (left, right):
            ax.axhline(limit, color="#222222", linewidth=0.8, linestyle=":")
        left.text(0.05, limit + 0.02, f"limit {limit}", fontsize=10)
    tidy(right, xlabel="gradient step")
    right.legend(frameon=False, ncols=2, loc="upper left")
    return figure
