"""What lab 02 uses: names of the library, the exponent of a power, and the lab's figures."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from IPython.display import Image
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.lab01 import drifts_of_words, never_ending
from minirl_edu.course.page import BLUE, GREEN, GREY, ORANGE, PINK, YELLOW, charts, image, show_table, sliders, tidy
from minirl_edu.diagnostics import first_order_gap, kl_k3
from minirl_edu.exact import (
    TabularPolicy,
    objective_remainder,
    sequence_gradient,
    sequence_objective,
    token_gradient,
    token_objective,
    token_ratios,
)
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

__all__ = [
    "ChainTask", "HFEngine", "Precision", "Sampling", "Sizes", "TabularPolicy", "can_share_prompts", "change_figure",
    "check", "check_file", "copy", "drifts_of_words", "exponent", "first_order_gap", "gap_figure",
    "group_mean_advantages", "kl_k3", "lay_out", "load_model", "load_tokenizer", "luck_figure", "math", "minirl_loss",
    "never_ending", "np", "objective_remainder", "order_figure", "pick", "response_logprobs", "sequence_gradient",
    "sequence_objective", "show_table", "size_figure", "sliders", "token_gradient", "token_objective", "token_ratios",
    "torch",
]  # fmt: skip

logging.disable_progress_bar()
torch.set_num_threads(1)


class Sizes(NamedTuple):
    """What responses of 2, 3, … tokens drop, the error of a token's weight (root mean squares), and χ² per token."""

    dropped: np.ndarray
    weight: np.ndarray
    chi_square: float


def exponent(x: Any, y: Any) -> float:
    """The slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def luck_figure(signs: np.ndarray, sizes: Sequence[float]) -> Image:
    """Product and 1 + sum of the same lucky and unlucky tokens, one panel for each size of δ."""
    figure, axes = charts(len(sizes), 3.0)
    tokens = np.arange(1, len(signs) + 1)
    for ax, size in zip(axes, sizes, strict=True):
        ax.plot(tokens, np.cumprod(1 + size * signs), color=BLUE, label="product")
        ax.plot(tokens, 1 + np.cumsum(size * signs), color=ORANGE, linestyle="--", label="1 + Σ δ")
        ax.axhline(0, color="black", linewidth=0.8)
        tidy(ax, f"each token ± {size:.0%}", "tokens so far")
    axes[0].set(ylabel="weight of the response", ylim=(0.5, 1.5))
    axes[0].legend(frameon=False, loc="lower left")
    return image(figure)


def change_figure(walk: np.ndarray, values: Mapping[str, np.ndarray]) -> Image:
    """Objectives on a line through μ_old: left their values, right their changes from the middle of the line."""
    figure, (left, right) = charts(2, 3.3)
    for (name, y), colour, style in zip(values.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        left.plot(walk, y, color=colour, linestyle=style, label=name)
        right.plot(walk, y - y[len(walk) // 2], color=colour, linestyle=style, label=f"change of {name}")
    for ax, ylabel in ((left, "value"), (right, "change from the value at μ_old")):
        ax.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        tidy(ax, "", "distance from μ_old in logits", ylabel)
        ax.legend(frameon=False)
    return image(figure)


def order_figure(distances: np.ndarray, errors: Sequence[np.ndarray], fitted: np.ndarray) -> Image:
    """Two errors [2, distances] over the distance, one line for each problem, with slopes of the `fitted` part."""
    figure, axes = charts(2, 3.6)
    for both, colour, mark in zip(errors, (BLUE, GREEN, ORANGE, PINK), "osX^", strict=False):
        for ax, y in zip(axes, both, strict=True):
            label = f"slope {exponent(distances[fitted], y[fitted]):.3f}"
            ax.plot(distances, y, color=colour, marker=mark, markersize=4, linewidth=1, label=label)
    names = ("|remainder of the objective|", "|∇J_seq − ∇J_token|")
    for ax, name, order in zip(axes, names, (2, 1), strict=True):
        ax.axvspan(distances[fitted][0], distances[fitted][-1], color="#dfe8f2", zorder=0)
        ax.set(xscale="log", yscale="log")
        tidy(ax, f"expected: {order}", "distance from μ_old in logits", name)
        ax.legend(frameon=False)
    return image(figure)


def size_figure(lengths: np.ndarray, measured: Mapping[float, Sizes]) -> Image:
    """Points: enumerated sizes by length, for several distances; lines: the formulas for independent tokens."""
    figure, (left, right) = charts(2, 3.7)
    looks = zip("osX^", (BLUE, GREEN, YELLOW, ORANGE), strict=True)
    for (distance, (dropped, weight, chi)), (mark, colour) in zip(measured.items(), looks, strict=False):
        look: dict[str, Any] = dict(color=colour, marker=mark, linestyle="none", markersize=5)
        left.plot(lengths, dropped, label=f"{distance:g}", **look)
        left.plot(lengths, np.sqrt((1 + chi) ** lengths - 1 - lengths * chi), color=colour, linewidth=1)
        right.plot(lengths, weight, **look)
        right.plot(lengths, np.sqrt((1 + chi) ** (lengths - 1) - 1), color=colour, linewidth=1)
    for ax, ylabel in ((left, "typical size of what is dropped, D"), (right, "typical error of a token's weight")):
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.minorticks_off()
        tidy(ax, "", "tokens in the response", ylabel)
    left.set_ylim(None, 40)
    left.legend(title="distance in logits", frameon=False, ncols=4, fontsize=9, loc="upper left")
    return image(figure)


def gap_figure(names: Sequence[str], history: np.ndarray) -> Image:
    """Left, the gap of each engine over the updates; right, gap against KL. `history`: [updates + 1, engines, 2]."""
    figure, (left, right) = charts(2, 3.7)
    looks = zip("oDsX^", (GREY, GREEN, BLUE, YELLOW, ORANGE), ("-", "--", "-.", ":", "-"), strict=True)
    updates = np.arange(len(history))
    for (i, name), (mark, colour, style) in zip(enumerate(names), looks, strict=False):
        gap, kl = history[:, i].T
        shown = gap > 1e-8
        left.plot(updates[shown], gap[shown], marker=mark, color=colour, linestyle=style, label=name)
        right.plot(kl[shown], gap[shown], marker=mark, color=colour, linestyle="none")
    left.set(yscale="log", xticks=updates)
    tidy(left, "", "updates with one rollout", "first-order gap")
    left.legend(frameon=False, fontsize=8)
    ends = history[history[..., 1] > 1e-8][:, 1].min(), history[..., 1].max()
    right.plot(ends, ends, color="black", linewidth=1, linestyle=":", label="gap = KL")
    right.set(xscale="log", yscale="log")
    tidy(right, "", "KL per response, nats", "first-order gap")
    right.legend(frameon=False)
    return image(figure)
