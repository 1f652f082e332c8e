"""The names of lab 03: `from minirl_edu.course.lab03 import *`. Its charts, its small problems, and what it uses."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from IPython.display import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from minirl_edu import exact
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.page import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    charts,
    image,
    show_table,
    sliders,
    tidy,
)
from minirl_edu.diagnostics import kl_k1, kl_k3, mean_interval, token_ess
from minirl_edu.exact import TabularPolicy
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask
from minirl_edu.worlds.simulations import VARIANTS, WORLDS, Curves, doomed_tails, doomed_tails_border

__all__ = [
    "ENGINES", "PROBLEMS", "VARIANTS", "WORLDS", "HFEngine", "Precision", "Sampling", "check", "check_file",
    "cosine", "doomed_tails", "doomed_tails_border", "exact", "gap_picture", "kl_k1", "kl_k3", "lay_out",
    "load_chain", "math", "np", "pick", "plot_cap", "plot_cosines", "plot_estimators", "plot_reported",
    "plot_training", "plot_world", "problem", "quantise", "response_logprobs", "show_table", "sliders", "token_ess",
    "torch",
]  # fmt: skip

logging.disable_progress_bar()
torch.set_num_threads(1)

PROBLEMS = 20
ENGINES = ["fp32", "bf16", "fp8_e4m3", "int8", "int6", "int5", "int4", "int3"]
LOOKS = {"sequence weight": (GREEN, ":", "^"), "token weight": (BLUE, "-", "o"), "no weight": (ORANGE, "--", "X")}


def standard_errors(
    estimators: Mapping[str, Callable[[Tensor], Tensor]], sizes: Sequence[float], tokens: int = 2000
) -> list[dict[str, float]]:
    """The exact KL of 64 tokens for each size of the sampler's error, and the standard error of a mean over `tokens`
    draws by each estimator."""
    logits, error = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for size in sizes:
        pi, mu = (1.5 * logits).softmax(0), (1.5 * logits + size * error).softmax(0)
        row = {"kl": float((mu * (mu / pi).log()).sum())}
        for name, k in estimators.items():
            values = k(pi / mu)
            row[name] = float(((mu * (values - mu @ values).square()).sum() / tokens).sqrt())
        rows.append(row)
    return rows


def plot_estimators(estimators: Mapping[str, Callable[[Tensor], Tensor]], tokens: int = 2000) -> Image:
    """Left: each estimator's term over log r. Right: the noise of a mean over `tokens` tokens, relative to the KL."""
    figure, (left, right) = charts(2)
    log_r = np.linspace(-2, 2, 201)
    noise = standard_errors(estimators, np.geomspace(0.003, 2.0, 25).tolist(), tokens)
    kl = np.array([row["kl"] for row in noise])
    for (name, k), colour, style in zip(estimators.items(), (BLUE, GREY, ORANGE), ("-", ":", "--"), strict=True):
        left.plot(log_r, k(torch.tensor(log_r).exp()), color=colour, linestyle=style, label=name)
        right.plot(kl, [row[name] / row["kl"] for row in noise], color=colour, linestyle=style, label=name)
    left.axhline(0, color="#cccccc", linewidth=0.8)
    left.legend(frameon=False)
    tidy(left, "one token", "log r = log π_old − log μ_old, nats", "value, nats")
    right.set(xscale="log", yscale="log")
    right.axhline(1, color="#cccccc", linewidth=0.8)
    right.text(kl[-1], 1.15, "noise = signal", ha="right", fontsize=9, color=GREY)
    tidy(right, f"mean over {tokens:,} tokens", "KL(μ_old ‖ π_old), nats per token", "standard error ÷ KL")
    return image(figure)


def problem(seed: int, size: float) -> tuple[TabularPolicy, Tensor, Tensor]:
    """A trainer's policy over responses of up to three tokens, an error of the sampler's logits, and rewards: 1 for a
    quarter of the responses."""
    generator = torch.Generator().manual_seed(1000 + seed)
    policy = TabularPolicy.random(4, 3, seed=seed)
    rewards = (torch.rand(len(policy.tokens), generator=generator, dtype=torch.float64) < 0.25).double()
    return policy, size * torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64), rewards


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two gradients."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def plot_cosines(sizes: Sequence[float], found: Sequence[Mapping[str, np.ndarray]]) -> Image:
    """Cosines with the trainer's and the sampler's gradient, [2, problems] a method, for each size of the error."""
    figure, axes = charts(2, sharey=True)
    for which, (ax, whose) in enumerate(zip(axes, ("the trainer's", "the sampler's"), strict=True)):
        for name, (colour, style, marker) in LOOKS.items():
            mean, half = mean_interval(np.array([row[name][which] for row in found]).T)
            ax.plot(sizes, mean, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
            ax.fill_between(sizes, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        tidy(ax, f"against {whose} policy gradient", "error of the sampler's logits", "cosine")
    axes[0].legend(frameon=False)
    return image(figure)


def plot_training(trained: Mapping[tuple[str, bool], np.ndarray]) -> Image:
    """Expected rewards [2, problems, steps] of trainer and sampler, by the method and whether the error is fixed."""
    figure, axes = charts(2, 6.0, 2, sharex=True, sharey=True)
    for place, ax in enumerate(axes):
        fixed, whose = place < 2, ("trainer", "sampler")[place % 2]
        for method in ("token weight", "no weight"):
            colour, style, _ = LOOKS[method]
            mean, half = mean_interval(trained[method, fixed][place % 2])
            ax.plot(mean, color=colour, linestyle=style, label=method)
            ax.fill_between(range(len(mean)), mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        title = f"{'the same error' if fixed else 'a new error'} at every sync: {whose}"
        tidy(ax, title, "exact gradient step", "expected reward")
    axes[0].legend(frameon=False, loc="lower right")
    return image(figure)


def plot_cap() -> Image:
    """Bias and noise of min(π/μ, cap) · R over the cap, for 64 tokens and a coarse sampler; the error of n draws."""
    generator = torch.Generator().manual_seed(3)
    logits, error = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    pi, mu = (1.5 * logits).softmax(0), (1.5 * logits + 1.6 * error).softmax(0)
    rewards = (torch.rand(64, generator=generator) < 0.5).double()
    caps = np.geomspace(0.5, 200, 100)
    x = (pi / mu).clamp(max=torch.tensor(caps)[:, None]) * rewards
    bias = (x @ mu - pi @ rewards).numpy()
    spread = (x.square() @ mu - (x @ mu).square()).sqrt().numpy()
    figure, (left, right) = charts(2)
    left.plot(caps, -bias, color=ORANGE, linestyle="--", label="−bias")
    left.plot(caps, spread, color=BLUE, label="standard deviation of one draw")
    left.legend(frameon=False)
    tidy(left, "what the cap costs and saves", "cap", "in units of the reward")
    for n, colour, style in ((16, BLUE, "-"), (256, ORANGE, "--"), (4096, GREEN, ":")):
        rmse = np.sqrt(bias**2 + spread**2 / n)
        right.plot(caps, rmse, color=colour, linestyle=style, label=f"n = {n}: best cap {caps[rmse.argmin()]:.1f}")
        right.plot(caps[rmse.argmin()], rmse.min(), marker="o", color=colour)
    right.set(yscale="log", ylim=(0.018, 1.3))
    right.legend(frameon=False, loc="upper right")
    tidy(right, "error of the mean of n draws", "cap", "root mean square error")
    right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
    for ax in (left, right):
        ax.axvline(5, color="#cccccc", linewidth=0.8)
        ax.set(xscale="log")
        ax.set_xticks([0.5, 1, 2, 5, 10, 50, 200], ["0.5", "1", "2", "5", "10", "50", "200"])
        ax.minorticks_off()
    return image(figure)


def plot_reported(reported: Mapping[str, Tensor], trainer: Tensor, tokens: Tensor) -> Image:
    """The trainer's log-probabilities [B, T] of the drawn tokens over what the engine reports, a chart for each way."""
    figure, axes = charts(2, sharex=True, sharey=True)
    for ax, (title, values) in zip(axes, reported.items(), strict=True):
        ax.scatter(values[tokens], trainer[tokens], s=7, color=BLUE, alpha=0.4, linewidths=0)
        ax.plot([-6, 0], [-6, 0], color=GREY, linewidth=0.8)
        tidy(ax, title, "reported as log μ_old, nats", "trainer's log π_old, nats")
    return image(figure)


def plot_world(worlds: Mapping[tuple[str, str], Curves]) -> Image:
    """Entropy and score of the world *doomed tails* by the lengths (columns) and the method, 95 % over seeds."""
    cases = list(dict.fromkeys(case for case, _ in worlds))
    figure, axes = charts(len(cases), 5.4, 2, sharex=True, sharey="row")
    for place, ax in enumerate(axes):
        case, metric = cases[place % len(cases)], ("entropy", "score")[place // len(cases)]
        for method, colour, style, label in (("MiniRL", BLUE, "-", "with"), ("− IS", ORANGE, "--", "without")):
            mean, half = mean_interval(worlds[case, method][metric])
            steps = worlds[case, method]["step"]
            ax.plot(steps, mean, color=colour, linestyle=style, label=f"{label} the weight")
            ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        tidy(ax, case if metric == "entropy" else "", "step")
    axes[0].set_ylabel("entropy, nats")
    axes[len(cases)].set_ylabel("score, exact")
    axes[0].legend(frameon=False)
    return image(figure)


@functools.cache
def load_chain() -> tuple[PreTrainedModel, ChainTask, list[list[int]]]:
    """The tiny Mixture-of-Experts model, its task, and the tokens of 32 prompts."""
    task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
    return load_model("chain-steps").eval(), task, [task.encode(p) for p in task.sample(32, seed=1)]


@functools.cache
def drawn_tokens(precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """log μ_old and log π_old [B, T] of the tokens that an engine of this precision draws, and their mask."""
    model, task, prompts = load_chain()
    rollout = HFEngine(model, Precision.parse(precision, "stochastic")).generate(
        prompts, group_size=8, sampling=Sampling(task.max_new_tokens, 1.0), seed=0
    )
    with torch.no_grad():
        logp = response_logprobs(model, lay_out(rollout, share_prompts=True)).logp
    return rollout.logp_rollout, logp, rollout.response_mask


def gap_picture(precision: str, cap: float) -> Image:
    """Left: every token under both engines. Right: the weights, and what the cap does to them."""
    log_mu, log_pi, mask = drawn_tokens(precision)
    weight = (log_pi - log_mu)[mask].exp().numpy()
    capped = weight > cap
    figure, (left, right) = charts(2, 4.2)
    x, y = (values[mask].clamp(min=-11).numpy() for values in (log_mu, log_pi))
    left.plot([-11, 0], [-11, 0], color=GREY, linewidth=0.8)
    left.scatter(x[~capped], y[~capped], s=9, color=BLUE, alpha=0.45, linewidths=0, label="weight as it is")
    left.scatter(x[capped], y[capped], s=26, marker="x", color=ORANGE, label="capped")
    left.set(xlim=(-11.4, 0.4), ylim=(-11.4, 0.4))
    left.legend(frameon=False, loc="upper left")
    tidy(left, f"sampler: {precision}", "log μ_old, sampler, nats", "log π_old, trainer, nats")
    right.hist(weight.clip(0.051, 19.9), bins=np.geomspace(0.05, 20, 61).tolist(), color=BLUE)
    right.axvspan(cap, 20, color="#f3d9c9", zorder=0)
    right.set(xscale="log", yscale="log", ylim=(0.7, 3000), xlim=(0.05, 20))
    right.set_xticks([0.05, 0.2, 1, 5, 20], ["≤ 0.05", "0.2", "1", "5", "≥ 20"])
    right.minorticks_off()
    k3, ess = max(float(kl_k3(log_mu, log_pi, mask)), 0.0), float(token_ess(log_pi, log_mu, mask))
    title = f"k3 {k3:.1e} nats, ESS {ess:.2f}, {capped.sum()} of {len(weight)} capped"
    tidy(right, title, "weight π_old/μ_old (shaded: above the cap)", "tokens")
    return image(figure)
