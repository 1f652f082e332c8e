"""What lab 09, cold starts, imports: its figures, and what samples for them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.cold_start import new_model
from minirl_edu.course import check, pick
from minirl_edu.course.page import charts, image, show_table, sliders, tidy
from minirl_edu.models import load_model, model_path
from minirl_edu.plots import method_styles
from minirl_edu.rollout import Rollout, Sampling, sample
from minirl_edu.tasks import ChainTask, Problem

__all__ = ["HARD", "TOKENS_PER_STEP", "ChainTask", "check", "cooling_curves", "group_mean_advantages", "group_signal"]
__all__ += ["image", "load_model", "made_by", "math", "new_model", "np", "pass_curves", "pick", "pupil_and_teacher"]
__all__ += ["score_by_steps", "show_table", "sliders", "steps_of", "torch", "tried"]

logging.disable_progress_bar()
torch.set_num_threads(1)

TOKENS_PER_STEP = {"steps": 2, "operands": 3, "copy": 4}
"""The styles of the cold starts, and how many tokens each writes for one step of a sum."""
HARD = 5
"""The steps of the longest sum that the teachers demonstrated."""
TITLES = ("2 to 5 steps: demonstrated", "6 and 7 steps: longer than any demonstration")

_LOOKS = method_styles(f"cold start: {style}" for style in TOKENS_PER_STEP)


def _look(style: str) -> dict[str, Any]:
    return _LOOKS[f"cold start: {style}"]


def made_by(name: str) -> dict[str, Any]:
    """How a shipped cold start was made: its `cold_start.json`."""
    return json.loads(Path(model_path(name), "cold_start.json").read_text(encoding="utf-8"))


def steps_of(problems: Sequence[Problem]) -> Tensor:
    """How many steps each `chain` problem has, one fewer than operands."""
    return torch.tensor([len(problem.prompt.rstrip("= ")) // 2 for problem in problems])


def tried(
    model: PreTrainedModel,
    task: ChainTask,
    problems: Sequence[Problem],
    *,
    group_size: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Rollout, list[str]]:
    """Rewards [problems, group_size] of sampled responses, the rollout, and its texts."""
    sampling = Sampling(task.max_new_tokens, temperature)
    drawn = sample(model, [task.encode(p) for p in problems], group_size=group_size, sampling=sampling, seed=seed)
    texts = task.tokenizer.batch_decode(drawn.responses, skip_special_tokens=True)
    rewards = [task.reward(problems[row // group_size], text) for row, text in enumerate(texts)]
    return torch.tensor(rewards).view(-1, group_size), drawn, texts


def group_signal(p: float = 0.44, largest: int = 16) -> Figure:
    """Chance of a mixed group, and mean size of an advantage, over the probability of success; `p` is marked."""
    grid = np.linspace(0, 1, 201)
    figure, (left, right) = charts(2, 3.4)
    looks = zip(("#999999", "#56B4E9", "#0072B2", "#000000"), (":", "-.", "-", "--"), strict=True)
    for size, (colour, line) in zip((2, 4, 8, largest), looks, strict=True):
        look = {"color": colour, "linestyle": line, "linewidth": 2, "label": f"G = {size}"}
        left.plot(grid, 1 - grid**size - (1 - grid) ** size, **look)
        right.plot(grid, 2 * grid * (1 - grid) * (size - 1) / size, **look)
    for ax, title in ((left, "chance of a mixed group"), (right, "mean size of an advantage")):
        ax.axvline(p, color="#D55E00", linewidth=1)
        ax.set(xlim=(0, 1), ylim=(0, None))
        tidy(ax, title, "probability of success p")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def pupil_and_teacher(losses: Sequence[float], floor: float, teacher: Tensor, pupil: Tensor) -> Figure:
    """The loss over the steps with its floor, and the ten digits of teacher and pupil."""
    figure, (left, right) = charts(2, 3.2)
    left.plot(losses, color="#0072B2", linewidth=1)
    left.axhline(floor, color="#D55E00", linestyle="--", label="entropy of the teacher")
    tidy(left, xlabel="step", ylabel="loss, nats")
    right.bar(np.arange(10) - 0.2, teacher, width=0.4, color="#D55E00", label="teacher")
    right.bar(np.arange(10) + 0.2, pupil, width=0.4, color="#0072B2", label="pupil")
    right.set_xticks(range(10))
    tidy(right, xlabel="digit", ylabel="probability")
    for ax in (left, right):
        ax.legend(frameon=False)
    return figure


def score_by_steps(rewards: Mapping[str, Tensor], steps: Tensor, error_rate: float) -> Figure:
    """The mean score of each style at each number of steps, with standard errors over problems, on equation (09.5)."""
    figure, (ax,) = charts(1, 3.8)
    at = np.linspace(1.6, 7.4, 100)
    ax.plot(at, 0.1 + 0.9 * (1 - 10 / 9 * error_rate) ** at, color="black", linewidth=2, label="a teacher, (09.5)")
    ax.plot(at, (1 - error_rate) ** at, color="#999999", linestyle=":", label="no slip at all")
    for i, (style, table) in enumerate(rewards.items()):
        scores = [table[steps == n].mean(1) for n in range(2, 8)]
        error = [float(x.std()) / math.sqrt(len(x)) for x in scores]
        look = _look(style) | {"linestyle": "none", "markersize": 7, "label": f"pupil: {style}"}
        ax.errorbar(np.arange(2, 8) + 0.12 * (i - 1), [float(x.mean()) for x in scores], error, **look)
    ax.axhline(0.1, color="#bbbbbb", linewidth=0.8)
    ax.axvspan(HARD + 0.5, 7.4, color="#e4e4e4", zorder=0)
    ax.text(6.45, 0.72, "longer than any\ndemonstration", ha="center", fontsize=10, color="#555555")
    ax.text(1.62, 0.115, "blind guess", fontsize=9, color="#777777")
    ax.set(xlim=(1.6, 7.4), ylim=(0, 0.8))
    tidy(ax, xlabel="steps of the sum", ylabel="score at temperature 1")
    ax.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(0.33, 1.0))
    return figure


def cooling_curves(
    temperatures: Sequence[float],
    scores: Mapping[str, Sequence[tuple[float, float]]],
    formula: Mapping[float, float],
) -> Figure:
    """Scores of each style at each temperature, on demonstrated and on longer sums; `formula` on the former."""
    figure, axes = charts(2, 3.6, sharey=True)
    left, right = axes
    left.plot(list(formula), list(formula.values()), color="black", label="formula")
    for style, pairs in scores.items():
        for ax, values in zip((left, right), zip(*pairs, strict=True), strict=True):
            ax.plot(temperatures, values, **_look(style), label=style)
    right.axhline(0.1, color="#bbbbbb", linewidth=0.8)
    for ax, title in zip(axes, TITLES, strict=True):
        ax.set(xlim=(0.1, 1.4), ylim=(0, 1.03))
        tidy(ax, title, "temperature", "score" if ax is left else "")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def pass_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], teacher: Sequence[float]) -> Figure:
    """pass@1 … pass@n of each style, on demonstrated and on longer sums; a teacher's, and a blind guess's."""
    figure, axes = charts(2, 3.6, sharey=True)
    left, right = axes
    ks = np.arange(1, len(teacher) + 1)
    for style, pair in curves.items():
        for ax, values in zip((left, right), pair, strict=True):
            ax.plot(ks, values, **_look(style), markevery=3, label=style)
    left.plot(ks, teacher, color="black", label="teacher")
    right.plot(ks, 1 - 0.9**ks, color="#999999", linewidth=2, label="a blind guess")
    for ax, title, place in zip(axes, TITLES, ("lower right", "upper left"), strict=True):
        ax.set(xscale="log", ylim=(0, 1.03))
        ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        ax.minorticks_off()
        tidy(ax, title, "k", "pass@k" if ax is left else "")
        ax.legend(frameon=False, fontsize=9, loc=place)
    return figure
