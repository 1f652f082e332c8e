"""The names of lab 05: `from minirl_edu.course.lab05 import *`. Its charts, its small problems, and what it uses."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from IPython.display import Image
from torch import Tensor

from minirl_edu import exact
from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.lab03 import cosine
from minirl_edu.course.lab04 import RATIO
from minirl_edu.course.page import BLACK, BLUE, GREEN, GREY, YELLOW, charts, image, show_table, sliders, tidy
from minirl_edu.course.variants import EPS_HIGH, EPS_LOW
from minirl_edu.diagnostics import mean_interval
from minirl_edu.exact import TabularPolicy
from minirl_edu.objectives import CORRECTIONS, PolicyLoss, cispo_loss, grpo_loss, minirl_loss
from minirl_edu.plots import METHOD_STYLE
from minirl_edu.worlds.report import exact_shares
from minirl_edu.worlds.simulations import VARIANTS, WORLDS, doomed_tails

__all__ = [
    "CORRECTIONS", "VARIANTS", "WORLDS", "check", "check_file", "cispo_loss", "cosine", "doomed_tails",
    "enumerable", "exact", "exact_shares", "expected_update", "group_mean_advantages", "group_mean_std_advantages",
    "grpo_loss", "math", "minirl_loss", "np", "pick", "plot_directions", "plot_group_weights", "plot_lengths",
    "plot_pushes", "plot_scores", "relatives", "show_table", "sliders", "step_picture", "torch",
]  # fmt: skip

torch.set_num_threads(1)


def plot_pushes(pushes: Mapping[str, Tensor], mask: Tensor, names: Sequence[str]) -> Image:
    """A table of the push on each token [B, T] for every way to divide: blue up, red down."""
    figure, axes = charts(len(pushes), 3.2, sharey=True)
    for ax, (title, values) in zip(axes, pushes.items(), strict=True):
        shown = torch.where(mask, values / values.abs().max(), torch.nan)
        ax.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for b, t in mask.nonzero().tolist():
            style = {"fontsize": 7, "color": "white" if abs(shown[b, t]) > 0.6 else "black"}
            ax.text(t, b, f"{values[b, t]:+.3f}".replace("0.", "."), ha="center", va="center", **style)
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(mask.shape[1]), [str(t + 1) for t in range(mask.shape[1])])
        tidy(ax, title, "token")
    return image(figure)


def enumerable(seed: int) -> tuple[TabularPolicy, Tensor, Tensor]:
    """A policy over responses of one to four tokens, rewards (1 for about 40 % of the responses) and lengths."""
    pi = TabularPolicy.random(3, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    rewards = (torch.rand(len(pi.tokens), generator=generator, dtype=torch.float64) < 0.4).double()
    return pi, rewards, pi.mask.sum(1).double()


def expected_update(pi: TabularPolicy, coefficient: Tensor) -> Tensor:
    """Σ_y π(y) · coefficient(y) · ∇log π(y)."""
    return pi.score_sum((pi.response_probs() * coefficient)[:, None].expand(pi.mask.shape))


def _bandit_cosines(spread: float, *, prompts: int = 300, responses: int = 8) -> np.ndarray:
    """Cosines of the length-normalised update with the policy gradient, in the logits of whole responses."""
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    rewards = (torch.rand(prompts, responses, generator=generator) < 0.4).double()
    rewards[:, 0], rewards[:, 1] = 1.0, 0.0
    p = logits.softmax(1)
    advantage = rewards - (p * rewards).sum(1, keepdim=True)
    scaled = advantage / (spread * noise).exp()
    by_sum, by_length = (p * (f - (p * f).sum(1, keepdim=True)) for f in (advantage, scaled))
    return torch.nn.functional.cosine_similarity(by_sum, by_length).numpy()


def _token_mean_cosine(batch: int, seed: int, samples: int = 2000) -> float:
    """Cosine of the mean of ΣX/ΣL over many batches of `batch` responses with the policy gradient."""
    pi, rewards, lengths = enumerable(0)
    p = pi.response_probs()
    drawn = torch.multinomial(p, batch * samples, True, generator=torch.Generator().manual_seed(seed))
    share = 1 / lengths[drawn.view(samples, batch)].sum(1).repeat_interleave(batch)
    shares = torch.zeros_like(p).index_put((drawn,), share / samples, accumulate=True)
    update = pi.score_sum((shares * (rewards - p @ rewards))[:, None].expand(pi.mask.shape))
    return cosine(update, exact.sequence_gradient(pi, pi, rewards))


def plot_directions() -> Image:
    """Cosines with ∇E[R]: divided by own length over the spread of lengths; by the batch's tokens over its size."""
    figure, (left, right) = charts(2)
    spreads, batches = np.linspace(0, 2, 9), [1, 2, 4, 8, 16, 32, 64]
    turned = [_bandit_cosines(spread) for spread in spreads]
    left.plot(spreads, [values.mean() for values in turned], color=YELLOW, linestyle="-.", marker="s", label="mean")
    for share, style, label in ((0.05, "--", "5 % of the prompts are below"), (0, ":", "smallest")):
        low = [np.quantile(values, share) for values in turned]
        left.plot(spreads, low, color=BLACK, linestyle=style, linewidth=1, label=label)
    left.axhline(0, color="#cccccc", linewidth=0.8)
    left.legend(frameon=False, loc="lower left")
    tidy(left, "÷ own length", "spread of log |y|", "cosine with ∇E[R]")
    mean, half = mean_interval(np.array([[_token_mean_cosine(b, seed) for b in batches] for seed in range(10)]))
    right.plot(batches, mean, color=GREY, marker="*", label="÷ tokens of the batch (CISPO)")
    right.fill_between(batches, mean - half, mean + half, color=GREY, alpha=0.2, linewidth=0)
    pi, rewards, lengths = enumerable(0)
    own = expected_update(pi, (rewards - pi.response_probs() @ rewards) / lengths)
    level = cosine(own, exact.sequence_gradient(pi, pi, rewards))
    right.axhline(level, color=YELLOW, linestyle="-.", label="÷ own length (GRPO)")
    right.axhline(1, color=BLUE, linewidth=1, label="sum (MiniRL)")
    right.set(xscale="log")
    right.set_xticks(batches, [str(b) for b in batches])
    right.minorticks_off()
    right.legend(frameon=False, loc="center right")
    tidy(right, "÷ tokens of a batch of B responses", "B", "cosine with ∇E[R]")
    return image(figure)


def step_picture(length: int, right: float) -> Image:
    """A small exact step by the sum and divided by own length: what it does to a right response of `length` tokens with
    this probability, a wrong one of 1 token and a common wrong one of `length` tokens."""
    pi = torch.tensor([right, (1 - right) / 6, 5 * (1 - right) / 6], dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - right
    scaled = advantages / torch.tensor([length, 1.0, length], dtype=torch.float64)
    figure, (ax,) = charts(1)
    for offset, name, f in ((-0.2, "sum", advantages), (0.2, "÷ own length", scaled)):
        step = pi * (f - (pi * f).sum())
        change = 1000 * ((pi.log() + 0.02 * step / step.norm()).softmax(0) - pi)
        fill, hatch = (BLUE, "") if name == "sum" else (YELLOW, "//")
        bars = ax.bar(np.arange(3) + offset, change, 0.38, label=name, facecolor=fill, edgecolor=BLACK, hatch=hatch)
        ax.bar_label(bars, [f"{value:+.2f}" for value in change.tolist()], padding=2, fontsize=9)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(range(3), [f"right, {length} tokens", "wrong, 1 token", f"wrong, {length} tokens"])
    ax.set_ylim(-11, 11)
    ax.legend(frameon=False, loc="upper right")
    falls = "FALLS" if change[0] < 0 else "rises"
    title = f"probability of the right answer {right:.2f}; divided by own length it {falls}"
    tidy(ax, title, "", "change of probability, thousandths")
    return image(figure, 760)


def plot_lengths(by_sum: np.ndarray, by_length: np.ndarray) -> Image:
    """Expected reward, and how the lengths of wrong and right responses change: [3, problems, steps], 95 %."""
    figure, axes = charts(3, 3.3)
    titles = ("expected reward", "mean length of wrong responses", "mean length of right responses")
    for ax, title, *both in zip(axes, titles, by_sum, by_length, strict=True):
        for name, values, colour, style in (("sum", both[0], BLUE, "-"), ("÷ own length", both[1], YELLOW, "-.")):
            mean, half = mean_interval(values if title == "expected reward" else values - values[:, :1])
            ax.plot(mean, color=colour, linestyle=style, label=name)
            ax.fill_between(range(len(mean)), mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        tidy(ax, title, "exact step", "" if title == "expected reward" else "change, tokens")
    axes[0].legend(frameon=False, loc="lower right")
    return image(figure)


def plot_group_weights() -> Image:
    """By which factor a group multiplies the gradient of p, in expectation, over p: with and without the std."""

    def weight(p: float, size: int) -> float:
        k = np.arange(size + 1)
        chance = np.array([math.comb(size, int(i)) for i in k]) * p**k * (1 - p) ** (size - k)
        return (chance * np.sqrt(k * (size - k))).sum() / (size * p * (1 - p))

    grid = np.linspace(0.004, 0.996, 249)
    figure, (ax,) = charts(1)
    ax.plot(grid, 1 / np.sqrt(grid * (1 - grid)), color=GREY, linewidth=1, label="1/√(p(1 − p))")
    for size, style in ((4, ":"), (8, "--"), (64, "-.")):
        values = [weight(p, size) for p in grid]
        ax.plot(grid, values, color=BLACK, linestyle=style, label=f"with std, G = {size}")
    ax.axhline(7 / 8, color=BLUE, label="mean only, G = 8")
    ax.set(ylim=(0, 8))
    ax.legend(frameon=False, ncols=2, loc="upper center")
    tidy(ax, "", "probability p of a right answer", "weight of the prompt's ∇p")
    return image(figure, 760)


def _coefficients(loss_of: Callable[..., PolicyLoss], ratio: Tensor, sign: float) -> Tensor:
    """The coefficient of ∇log π_θ, by autograd: one response of one token for each ratio."""
    logp_old = torch.full((len(ratio), 1), math.log(0.01), dtype=torch.float64)
    logp = (logp_old + ratio.log()[:, None]).requires_grad_()
    advantages = torch.full((len(ratio),), sign, dtype=torch.float64)
    loss_of(logp, logp_old, advantages, torch.ones_like(logp).bool()).loss.backward()
    assert logp.grad is not None
    return -len(ratio) * logp.grad[:, 0]


def relatives(discrepancy: float, dual: float) -> Image:
    """What MiniRL, GRPO, CISPO and the dual clip multiply a token's score with, over the ratio π_θ/π_old.

    `discrepancy` is the engines' factor π_old/μ_old of the token, `dual` the bound of the dual clip.
    """
    ratio = torch.linspace(0.02, 7.0, 700, dtype=torch.float64)
    losses = {
        "MiniRL": lambda p, o, a, m: minirl_loss(p, o, o - math.log(discrepancy), a, m),
        "GRPO": lambda p, o, a, m: grpo_loss(p, o, a, m, eps_low=EPS_LOW, eps_high=EPS_HIGH),
        "CISPO": cispo_loss,
    }
    figure, axes = charts(2, 3.8)
    for ax, sign in zip(axes, (1.0, -1.0), strict=True):
        for name, loss_of in losses.items():
            look = {k: v for k, v in METHOD_STYLE[name].items() if k != "marker"}
            ax.plot(ratio, _coefficients(loss_of, ratio, sign), linewidth=2.2, label=name, **look)
        if sign < 0:
            cut = _coefficients(losses["GRPO"], ratio, sign).masked_fill(ratio > dual, 0.0)
            ax.plot(ratio, cut, color=GREEN, linewidth=1.4, linestyle=":", label=f"dual clip, c = {dual:g}")
        ax.axvline(1, color="#bbbbbb", linewidth=0.8)
        tidy(ax, f"Â = {'+1' if sign > 0 else '−1'}, π_old/μ_old = {discrepancy:g}", RATIO)
        ax.set_ylim(*((-0.3, 6) if sign > 0 else (-7.2, 0.3)))
    axes[0].set_ylabel(r"coefficient of $\nabla\log\,\pi_\theta$")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return image(figure)


def plot_scores(scores: Mapping[str, Mapping[str, np.ndarray]]) -> Image:
    """Final scores [seeds] by the case (a chart) and the correction (a bar), mean and 95 %."""
    figure, axes = charts(len(scores), 3.2, sharey=True)
    for ax, (case, by_correction) in zip(axes, scores.items(), strict=True):
        for place, values in enumerate(by_correction.values()):
            mean, half = mean_interval(values[:, None])
            ax.barh(place, mean[0], xerr=half[0], color=BLUE if place == 0 else "#cfcfcf", edgecolor=BLACK, capsize=3)
        ax.set_yticks(range(len(by_correction)), list(by_correction))
        ax.invert_yaxis()
        ax.set_xlim(0, 1.05)
        tidy(ax, case, "final score")
    return image(figure)
