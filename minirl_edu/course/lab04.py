"""The names of lab 04: `from minirl_edu.course.lab04 import *`. Its rollouts, its charts, and what it uses."""

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.page import BLUE, GREY, ORANGE, PINK, charts, image, show_table, sliders, tidy
from minirl_edu.course.variants import EPS_HIGH, EPS_LOW, dropped
from minirl_edu.logprobs import Layout, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Rollout, Sampling
from minirl_edu.tasks import ChainTask

__all__ = [
    "EPS_HIGH", "EPS_LOW", "check", "check_file", "clip_fractions", "clip_picture", "copy", "minirl_loss", "np",
    "one_rollout", "pick", "plot_ages", "plot_paths", "plot_quadrants", "plot_staleness", "plot_surrogate",
    "response_logprobs", "show_table", "sliders", "start_model", "torch",
]  # fmt: skip

logging.disable_progress_bar()
torch.set_num_threads(1)

RATIO = r"$r = \pi_\theta\,/\,\pi_{old}$"
QUANTILES = torch.tensor([0.005, 0.05, 0.5, 0.95, 0.995])


class Batch(NamedTuple):
    """A mini-batch: its responses, their layout for one forward, advantages [B] and log π_old [B, T]."""

    rollout: Rollout
    layout: Layout
    advantages: Tensor
    logp_old: Tensor


@functools.cache
def start_model() -> PreTrainedModel:
    """The tiny Mixture-of-Experts model after its cold start."""
    return load_model("chain-steps").eval()


def one_rollout(seed: int, precision: str = "int4", *, mini_batches: int = 8, prompts: int = 16) -> list[Batch]:
    """The mini-batches of one rollout: `prompts` × 8 responses in each, drawn by an engine of this precision."""
    model, size = start_model(), 8
    task = ChainTask(tokenizer=load_tokenizer("chain-steps"), hard_fraction=0.25)
    problems = task.sample(mini_batches * prompts, seed=seed)
    whole = HFEngine(model, Precision.parse(precision)).generate(
        [task.encode(p) for p in problems], group_size=size, sampling=Sampling(task.max_new_tokens), seed=seed
    )
    texts = task.tokenizer.batch_decode(whole.responses, skip_special_tokens=True)
    rewards = torch.tensor([task.reward(problems[i // size], text) for i, text in enumerate(texts)])
    batches = []
    for rows, advantages in enumerate(group_mean_advantages(rewards, size).split(prompts * size)):
        part = whole.rows(rows * prompts * size, (rows + 1) * prompts * size)
        layout = lay_out(part, share_prompts=True)
        with torch.no_grad():
            batches.append(Batch(part, layout, advantages, response_logprobs(model, layout).logp))
    return batches


def clip_fractions(logp: Tensor, reference: Tensor, batch: Batch) -> tuple[float, float]:
    """The library's two clip fractions, Â > 0 and Â < 0, for a ratio with this reference in its denominator."""
    real = batch.rollout.response_mask
    metrics = minirl_loss(logp, reference, None, batch.advantages, real, is_correction=False).metrics
    return float(metrics["clip_frac_pos"]), float(metrics["clip_frac_neg"])


def _log_ratio_axis(ax: Axes, axis: str) -> None:
    """A logarithmic axis for log r, linear within ±0.5."""
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=0.5)
    getattr(ax, f"set_{axis}ticks")([-10, -3, -1, -0.5, 0, 0.5], ["−10", "−3", "−1", "−0.5", "0", "0.5"])


def plot_ages(mini_batches: Sequence[int]) -> Image:
    """How many updates lie between the rollout and each of 24 gradient steps, for every N."""
    figure, axes = charts(len(mini_batches), 2.8, sharey=True)
    for ax, n in zip(axes, mini_batches, strict=True):
        steps = np.arange(1, 25)
        ax.bar(steps, (steps - 1) % n, color=np.where((steps - 1) // n % 2, "#9ecae1", BLUE), width=0.8)
        ax.plot(range(1, 25, n), [-0.35] * len(range(1, 25, n)), "^", color=ORANGE, markersize=5)
        ax.set_ylim(-0.8, 7.5)
        tidy(ax, f"N = {n}", "gradient step")
    axes[0].set_ylabel("updates since the rollout")
    return image(figure)


def plot_staleness(without: Sequence[Tensor], clipped: Sequence[Tensor]) -> Image:
    """log r of all tokens of each mini-batch before its own update: its spread, and its mean size."""
    figure, (left, right) = charts(2, 3.8, width_ratios=(1.5, 1))
    at = np.arange(1, len(clipped) + 1)
    for seen, colour, shift, label in ((without, PINK, 0.14, "no clipping"), (clipped, BLUE, -0.14, "clipping")):
        spread = torch.stack([values.quantile(QUANTILES) for values in seen]).T.numpy()
        left.vlines(at + shift, spread[0], spread[4], color=colour, linewidth=1.5)
        left.vlines(at + shift, spread[1], spread[3], color=colour, linewidth=7, label=label)
        marker = "o" if seen is clipped else "v"
        right.plot(at, [values.abs().mean() for values in seen], marker=marker, color=colour, label=label)
    left.axhspan(np.log(1 - EPS_LOW), np.log(1 + EPS_HIGH), color="#e8e8e8", zorder=0, label="within the bounds")
    _log_ratio_axis(left, "y")
    right.set_ylim(0, None)
    tidy(left, "thick: 90 % of the tokens, thin: 99 %", "mini-batch", "log r before its update, nats")
    tidy(right, "staleness", "mini-batch", "mean |log r|, nats")
    left.legend(frameon=False, fontsize=9, loc="lower left")
    right.legend(frameon=False, fontsize=9, loc="upper left")
    for ax in (left, right):
        ax.set_xticks(at)
    return image(figure)


def plot_quadrants(log_ratio: Tensor, batch: Batch) -> Image:
    """Every token of a mini-batch by log r and advantage, with what MiniRL's clip drops."""
    real = batch.rollout.response_mask
    lost = dropped(batch.logp_old + log_ratio, batch.logp_old, batch.advantages)[real]
    moved, signal = log_ratio[real], batch.advantages[:, None].expand_as(log_ratio)[real]
    noise = torch.rand(len(moved), generator=torch.Generator().manual_seed(0)) * 0.08 - 0.04
    figure, (ax,) = charts(1, 4.0)
    ax.axvspan(np.log(1 + EPS_HIGH), 3, ymin=0.5, color="#fbe3d6", zorder=0)
    ax.axvspan(-30, np.log(1 - EPS_LOW), ymax=0.5, color="#fbe3d6", zorder=0)
    for which, colour, marker, label in ((~lost, BLUE, "o", "kept"), (lost, ORANGE, "X", "dropped")):
        ax.scatter(moved[which], (signal + noise)[which], s=16, color=colour, marker=marker, alpha=0.6, label=label)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(0, color=GREY, linewidth=0.8)
    _log_ratio_axis(ax, "x")
    ax.set(xlim=(-15, 2.5), ylim=(-1.05, 1.05))
    for x, y, text in (
        *((0.01, 0.95, "good, became rarer: keep"), (0.99, 0.95, "good, became likelier: drop")),
        *((0.01, 0.03, "bad, became rarer: drop"), (0.99, 0.03, "bad, became likelier: keep")),
    ):
        ax.text(x, y, text, ha="left" if x < 0.5 else "right", transform=ax.transAxes, fontsize=10, color="#555555")
    tidy(ax, "", "log r, nats", "advantage")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return image(figure)


def plot_surrogate(ratio: Tensor, curves: dict[float, tuple[Tensor, Tensor]]) -> Image:
    """PPO's surrogate and its gradient over the ratio, by the sign of the advantage."""
    figure, axes = charts(2, 3.4)
    for ax, (sign, (surrogate, slope)) in zip(axes, curves.items(), strict=True):
        ax.plot(ratio, surrogate, color=BLUE, linewidth=2, label="surrogate")
        label = r"its gradient with respect to $\log\,\pi_\theta$"
        ax.plot(ratio, slope, color=ORANGE, linewidth=2, linestyle="--", label=label)
        ax.axvline(1, color="#bbbbbb", linewidth=0.8)
        tidy(ax, f"Â = {'+1' if sign > 0 else '−1'}", RATIO)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return image(figure)


def clip_picture(discrepancy: float) -> Image:
    """The coefficient of ∇log π_θ over the ratio, with the clip on π_old (the library's loss) and with one on μ_old.

    `discrepancy` is the engines' factor π_old/μ_old of the token.
    """
    ratio = torch.linspace(0.02, 3.0, 600, dtype=torch.float64)
    logp_old = torch.full((len(ratio), 1), np.log(0.01), dtype=torch.float64)
    logp_rollout, mask = logp_old - np.log(discrepancy), torch.ones_like(logp_old).bool()
    figure, axes = charts(2)
    for ax, sign in zip(axes, (1.0, -1.0), strict=True):
        logp = (logp_old + ratio.log()[:, None]).requires_grad_()
        advantages = torch.full((len(ratio),), sign, dtype=torch.float64)
        minirl_loss(logp, logp_old, logp_rollout, advantages, mask, num_responses=1).loss.backward()
        assert logp.grad is not None
        lost = dropped(logp, logp_rollout, advantages)[:, 0]
        on_mu = ((ratio * discrepancy).clamp(max=5.0) * sign).masked_fill(lost, 0.0)
        ax.plot(ratio, -logp.grad[:, 0], color=BLUE, linewidth=2.2, label=r"MiniRL: clip on $\pi_{old}$")
        ax.plot(ratio, on_mu, color=ORANGE, linestyle="--", label=r"clip on $\mu_{old}$")
        ax.axvline(1, color="#bbbbbb", linewidth=0.8)
        tidy(ax, f"Â = {'+1' if sign > 0 else '−1'}, π_old/μ_old = {discrepancy:.1f}", RATIO)
    axes[0].set_ylabel(r"coefficient of $\nabla\log\,\pi_\theta$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return image(figure)


def plot_paths(paths: np.ndarray, own_update: int) -> Image:
    """log r [updates + 1, tokens] of dropped tokens over a whole rollout, and the update at which they are dropped."""
    figure, (ax,) = charts(1)
    bounds = np.log(1 - EPS_LOW), np.log(1 + EPS_HIGH)
    ax.axhspan(*bounds, color="#e8e8e8", zorder=0, label="within the bounds")
    ax.plot(paths[:, :200], color=BLUE, alpha=0.25, linewidth=0.9)
    ax.plot(np.median(paths, 1), color="black", linewidth=2.5, label="median")
    ax.axvline(own_update, color=ORANGE, linestyle="--", linewidth=1.5, label="their own update: the clip drops them")
    _log_ratio_axis(ax, "y")
    ax.set_xticks(range(len(paths)))
    tidy(ax, f"bad tokens of mini-batch {own_update + 1} that the clip drops", "updates since the rollout", "log r")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return image(figure)
