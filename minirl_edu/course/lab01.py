"""What lab 01 uses: names of the library, policies that never end a response, and the lab's figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from IPython.display import Image
from torch import Tensor
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.page import BLUE, GREEN, GREY, ORANGE, YELLOW, charts, image, show_table, sliders, tidy
from minirl_edu.diagnostics import sequence_ess, token_ess
from minirl_edu.exact import TabularPolicy, sequence_gradient, sequence_objective, token_ratios
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

__all__ = [
    "ChainTask", "HFEngine", "Precision", "Sampling", "TabularPolicy", "can_share_prompts", "check", "check_file",
    "drifts_of_words", "estimate_figure", "gradient_figure", "group_mean_advantages", "lay_out", "load_model",
    "load_tokenizer", "math", "never_ending", "noise_figure", "np", "pick", "response_figure", "response_logprobs",
    "run_figure", "score_of_each", "sequence_ess", "sequence_gradient", "sequence_objective", "share_figure",
    "show_table", "sliders", "token_ess", "token_ratios", "torch",
]  # fmt: skip

logging.disable_progress_bar()
torch.set_num_threads(1)


def never_ending(policy: TabularPolicy) -> TabularPolicy:
    """The same policy, except that it ends no response before its length."""
    logits = policy.logits.clone()
    logits[:, -1] = -1000.0
    return TabularPolicy(logits, policy.max_length)


def drifts_of_words(length: int, seeds: Sequence[int]) -> list[Tensor]:
    """Random directions in the logits of a policy, one for each seed; the logit of the end stays where it is."""
    ways = [TabularPolicy.random(3, length, seed=seed).logits for seed in seeds]
    return [torch.cat([way[:, :-1], torch.zeros_like(way[:, -1:])], 1) for way in ways]


def score_of_each(policy: TabularPolicy) -> Tensor:
    """∇log π(y) of every response with respect to the logits, flattened, [B, P·V]."""
    ones = torch.eye(len(policy.tokens), dtype=torch.float64)
    return torch.stack([policy.score_sum(row[:, None].expand(policy.mask.shape)) for row in ones]).flatten(1)


def response_figure(texts: Sequence[str], probs: Tensor, rewards: Tensor) -> Image:
    """The probability of every response, in descending order, and its reward, 0 or 1."""
    order = probs.argsort(descending=True).tolist()
    figure, (ax,) = charts(1, 3.3)
    for reward, colour, hatch in ((1, BLUE, ""), (0, "#cccccc", "//")):
        at = [i for i, y in enumerate(order) if rewards[y] == reward]
        heights = [probs[order[i]].item() for i in at]
        label = f"reward {reward}, together {sum(heights):.0%}"
        ax.bar(at, heights, color=colour, hatch=hatch, edgecolor="white", label=label)
    ax.set_xticks(range(len(order)), [texts[int(y)] for y in order])
    tidy(ax, "", "response", "probability μ_old(y)")
    ax.legend(frameon=False)
    return image(figure)


def gradient_figure(
    gradient: Tensor, prefixes: Sequence[str], steps: np.ndarray, along: np.ndarray, others: Sequence[np.ndarray]
) -> Image:
    """Left, the gradient of each logit; right, J on a line along it, with its tangent, and on lines elsewhere."""
    figure, (left, right) = charts(2, 3.7, width_ratios=(1, 1.5))
    limit = gradient.abs().max().item()
    left.imshow(gradient, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, word in np.ndindex(*gradient.shape):
        colour = "white" if abs(gradient[row, word]) > 0.6 * limit else "black"
        left.text(word, row, f"{gradient[row, word]:+.3f}", ha="center", va="center", fontsize=9, color=colour)
    left.set_xticks(range(3), ["0", "1", "."])
    left.set_yticks(range(len(prefixes)), [f"'{prefix}'" for prefix in prefixes])
    left.set(xlabel="next word", ylabel="prefix", title="∇ J_seq")
    for values in others:
        right.plot(steps, values, color="#bbbbbb", linewidth=0.8)
    right.plot([], [], color="#bbbbbb", label=f"{len(others)} random directions")
    right.plot(steps, along, color=BLUE, linewidth=2.2, label="along ∇J")
    tangent = along[len(steps) // 2] + steps * gradient.norm().item()
    right.plot(steps, tangent, color=ORANGE, linestyle="--", label="slope |∇J|")
    tidy(right, "", "distance moved in logits", "J_seq")
    right.set_ylim(0.1, 0.9)
    right.legend(frameon=False, fontsize=9)
    return image(figure)


def estimate_figure(
    texts: Sequence[str], sampler: Tensor, target: Tensor, counts: Sequence[int],
    estimates: Mapping[str, Sequence[Tensor]], exact: float,
) -> Image:  # fmt: skip
    """Left, two policies over the same responses; right, mean and deviation of estimates by how many were drawn."""
    figure, (left, right) = charts(2, 3.5, width_ratios=(1.25, 1))
    order = sampler.argsort(descending=True).tolist()
    at = np.arange(len(order))
    left.bar(at - 0.2, sampler[order], 0.4, color=GREY, label="μ_old, draws")
    left.bar(at + 0.2, target[order], 0.4, color=BLUE, label="π_θ, is trained")
    left.set_xticks(at, [texts[int(y)] for y in order], rotation=60)
    tidy(left, "", "", "probability")
    left.legend(frameon=False)
    for (name, runs), colour, mark in zip(estimates.items(), (BLUE, ORANGE), ("o", "X"), strict=True):
        means = np.array([run.mean().item() for run in runs])
        spread = np.array([run.std().item() for run in runs])
        right.fill_between(counts, means - spread, means + spread, color=colour, alpha=0.18, linewidth=0)
        right.plot(counts, means, color=colour, marker=mark, label=name)
    right.axhline(exact, color="black", linestyle=":", label="E[R] under π_θ, exact")
    right.set_xscale("log")
    tidy(right, "", "responses drawn by μ_old", "estimate of E[R]")
    right.legend(frameon=False, fontsize=9)
    return image(figure)


def noise_figure(
    baselines: np.ndarray, noise: Sequence[float], marks: Mapping[str, tuple[float, float]], groups: Sequence[int],
    measured: Sequence[float], errors: Sequence[float],
) -> Image:  # fmt: skip
    """Left, the noise by baseline, some of them marked; right, how long the mean estimate is by group size."""
    figure, (left, right) = charts(2, 3.4)
    left.plot(baselines, noise, color=BLUE)
    for (name, (b, value)), mark, colour in zip(marks.items(), "XoD", (ORANGE, BLUE, GREEN), strict=True):
        left.plot(b, value, mark, color=colour, markersize=8, label=name)
    tidy(left, "", "baseline b", "noise  E|g − ∇J|²")
    left.set_ylim(0, None)
    left.legend(frameon=False)
    sizes = np.linspace(2, max(groups), 57)
    right.plot(sizes, (sizes - 1) / sizes, color=GREY, linestyle="--", label="(G − 1)/G")
    bars = [2 * error for error in errors]
    right.errorbar(groups, measured, bars, fmt="o", color=BLUE, capsize=3, label="measured, ± 2 s.e.")
    right.axhline(1, color="black", linestyle=":", linewidth=1)
    tidy(right, "", "group size G", "mean estimate / ∇J")
    right.set(ylim=(0, 1.1), xticks=groups)
    right.legend(frameon=False, loc="lower right")
    return image(figure)


def share_figure(weights: Mapping[float, Tensor], probs: Tensor, length: int) -> Image:
    """Left, effective sample size by length; right, how unequally the weight is shared out at one length.

    `weights`: for every distance in logits the weights [drifts, B, T] of the responses, cut off after 1, 2, … T tokens.
    """
    figure, (left, right) = charts(2, 3.6)
    looks = zip(("-", "--", "-.", (0, (1, 1))), (BLUE, GREEN, YELLOW, ORANGE), strict=True)
    for (distance, w), (line, colour) in zip(weights.items(), looks, strict=False):
        look: dict[str, Any] = {"linestyle": line, "color": colour}
        share = (probs[:, None] * w**2).sum(1).log().mean(0).neg().exp()
        left.plot(np.arange(1, len(share) + 1), share, marker="o", markersize=4, label=f"{distance:g}", **look)
        flat, p = w[:, :, length - 1].flatten(), probs.repeat(len(w)) / len(w)
        ranked = flat.argsort(descending=True)
        carried = [np.concatenate([[0], values[ranked].cumsum(0)]) for values in (p, p * flat)]
        right.plot(*carried, **look)
    left.axvline(length, color="#bbbbbb", linewidth=1, zorder=0)
    left.set_yscale("log")
    tidy(left, "", "tokens in the response", "effective sample size, fraction")
    left.set_ylim(min(0.05, left.get_ylim()[0]), 1.1)
    left.legend(title="distance in logits", frameon=False, fontsize=9, ncols=2)
    right.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    tidy(right, "", "share of the responses, heaviest first", f"share of the weight, {length} tokens")
    return image(figure)


def run_figure(objective: Sequence[float], rewards: Sequence[float], losses: Mapping[str, Sequence[float]]) -> Image:
    """Left, the exact objective and the mean reward of each batch; right, the values of some losses."""
    figure, (left, right) = charts(2, 3.4)
    left.plot(rewards, color="#bbbbbb", linewidth=1, label="mean reward of the batch")
    left.plot(objective, color=BLUE, linewidth=2, label="J_seq, exact")
    tidy(left, "", "update", "reward")
    left.set_ylim(0, 1.02)
    left.legend(frameon=False, loc="lower right")
    for (name, values), colour, line in zip(losses.items(), (ORANGE, "black"), ("-", "--"), strict=True):
        right.plot(values, color=colour, linestyle=line, linewidth=1.4, label=name)
    tidy(right, "", "update", "value of the loss")
    right.legend(frameon=False, fontsize=9)
    return image(figure)
