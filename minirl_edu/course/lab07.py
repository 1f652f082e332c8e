"""What lab 07 uses: names of the library, helpers of lab 06, and the lab's figures."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from IPython.display import Image, display
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.lab06 import (
    GREY,
    draw_theta,
    knobs,
    load_task,
    page,
    rewarded_rollout,
    score_under,
    stepped,
    toy_policy,
)
from minirl_edu.course.page import BLUE, GREEN, ORANGE, image, show_table
from minirl_edu.diagnostics import kl_k3, mean_interval
from minirl_edu.gap import Setting, Workload, prompts_for, random_model, random_prompts, run_setting, summary
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.worlds.simulations import VARIANTS, who_gets_the_gradient, who_gets_the_gradient_ceiling

__all__ = [
    "VARIANTS", "HFEngine", "Precision", "Routes", "RoutingReplay", "Setting", "Workload", "altered_figure",
    "ascent_figure", "can_share_prompts", "check", "check_file", "copy", "display", "draw_theta",
    "group_mean_advantages", "kl_k3", "knobs", "lay_out", "learning_figure", "load_model", "load_task",
    "minirl_loss", "np", "objectives_figure", "pick", "prompts_for", "random_model", "random_prompts",
    "removed_figure", "response_logprobs", "rewarded_rollout", "run_setting", "score_under", "show_table",
    "stepped", "summary", "torch", "toy_policy", "who_gets_the_gradient", "who_gets_the_gradient_ceiling",
]  # fmt: skip


def altered_figure(cells: Mapping[str, tuple[Tensor, Tensor]]) -> Image:
    """How much replay alters each token: the log-probabilities of the response tokens, live and replayed, by cell."""
    figure, (ax,) = page(8.5, 4.2)
    looks = (("#56B4E9", "-"), ("#56B4E9", "--"), (GREEN, "-"), (GREEN, "--"))
    for (name, (live, replayed)), (colour, line) in zip(cells.items(), looks, strict=True):
        change = (live - replayed).abs().sort(descending=True).values
        share = torch.arange(1, len(change) + 1) / len(change)
        if change.any():
            ax.plot(100 * share[change > 0], change[change > 0], line, color=colour, linewidth=2, label=name)
        else:
            ax.plot([0, 100], [1e-6, 1e-6], line, color=colour, linewidth=4, label=f"{name}: exactly 0, every token")
    ax.set(yscale="log", ylim=(6e-7, 2), xlabel="tokens, from the most altered on, %", ylabel="|Δ log π|, nats")
    ax.set_title("How replay alters the target policy")
    ax.legend(frameon=False, loc="upper right")
    return image(figure)


def objectives_figure(
    line: np.ndarray, live: np.ndarray, held: np.ndarray, bias: np.ndarray, flips: np.ndarray
) -> Image:
    """Two expected rewards along a line in the parameters, and the bias of the gradient; all [points]."""
    figure, (left, right) = page(10.5, 3.9, 2)
    breaks = [0, *(np.flatnonzero(np.diff(flips)) + 1), len(line)]
    for a, b in pairwise(breaks):
        left.plot(line[a:b], live[a:b], color=ORANGE, linewidth=2.4, label=None if a else "deployed: live routing")
        right.plot(line[a:b], bias[a:b], color=ORANGE, linewidth=2.4)
    left.plot(line, held, "--", color=BLUE, label="optimised: experts held")
    left.set(xlabel="η, distance from θ_old", ylabel="expected reward", title="Two objectives")
    left.legend(frameon=False)
    right.set(xlabel="η, distance from θ_old", ylabel="|difference| / |live gradient|", title="Bias of the gradient")
    return image(figure)


def ascent_figure(n: int, curves: Mapping[int, Sequence[Sequence[float]]]) -> Image:
    """Optimised and deployed reward of some policies, whose experts are refreshed every n steps."""
    figure, panels = page(10.5, 3.7, len(curves), sharey=True)
    for ax, (seed, (optimised, deployed)) in zip(panels, curves.items(), strict=True):
        ax.plot(optimised, "--", color=BLUE, label="optimised, experts held")
        ax.plot(deployed, color=ORANGE, label="deployed, live routing")
        for refresh in range(0, len(optimised), n) if n > 1 else ():
            ax.axvline(refresh, color="#cccccc", linewidth=1, zorder=0)
        ax.set(xlabel="gradient step", ylim=(0, 1.05), title=f"policy {seed}, experts refreshed every {n} steps")
    panels[0].set_ylabel("expected reward")
    panels[0].legend(frameon=False, loc="upper left")
    return image(figure)


def removed_figure(engines: Sequence[str], measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> Image:
    """The KL (k3) of trained and random models, live and with R3, by the precision of the engine."""
    figure, panels = page(10.5, 3.9, 2)
    for ax, kind in zip(panels, ("trained", "random"), strict=True):
        for side, colour, marker, label in (("plain", ORANGE, "o", "live routing"), ("r3", GREEN, "D", "R3")):
            values = np.array([measured[kind, spec][side]["k3"] for spec in engines])
            place = np.arange(len(engines)) + (0.08 if side == "r3" else -0.08)
            limits = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
            ax.errorbar(place, values[:, 0], np.nan_to_num(limits), fmt=marker, color=colour, capsize=3, label=label)
        ax.set(yscale="log", xticks=range(len(engines)), xticklabels=engines, title=f"{kind} models")
        ax.legend(frameon=False, loc="upper left")
    panels[0].set_ylabel("KL (k3), nats per token")
    return image(figure)


def learning_figure(learned: Mapping[str, Mapping[str, np.ndarray]], ceiling: float) -> Image:
    """The score through the trainer and through the engine, by method, and where the second was computed to end."""
    figure, panels = page(10.5, 3.9, 2, sharey=True)
    looks = ((ORANGE, "-"), (BLUE, ":"), (GREEN, "--"))
    for ax, metric in zip(panels, ("score", "engine_score"), strict=True):
        for (name, curves), (colour, line) in zip(learned.items(), looks, strict=True):
            mean, half = mean_interval(curves[metric])
            ax.plot(curves["step"], mean, color=colour, linestyle=line, linewidth=2, label=name)
            ax.fill_between(curves["step"], mean - half, mean + half, color=colour, alpha=0.15)
        place = "engine" if metric == "engine_score" else "trainer"
        ax.set(xlabel="step", ylim=(0, 1.03), title=f"through the {place}")
    panels[1].axhline(ceiling, color=GREY, linewidth=1)
    last = max(curves["step"][-1] for curves in learned.values())
    panels[1].text(last, ceiling + 0.08, "computed beforehand", ha="right", color="#5a5a5a")
    panels[0].set_ylabel("score")
    panels[0].legend(frameon=False, loc="lower right")
    return image(figure)
