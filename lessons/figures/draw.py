"""The figures drawn for the lessons: `python lessons/figures/draw.py [NAME …]` writes them beside this file.

One function per figure, without stored runs: what looks like a measurement is computed here, from the equations of the
lesson or with the library's own losses. A diagram's coordinates are inches from its lower left corner. In all of them
ochre is the inference engine, blue the training engine; a method has the colour that it has in every other figure.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy.stats import binomtest
from scipy.stats import t as student

from minirl_edu.exact import TabularPolicy, objective_remainder, sequence_gradient, token_gradient
from minirl_edu.objectives import cispo_loss, grpo_loss, minirl_loss
from minirl_edu.plots import METHOD_STYLE, to_png

HERE = Path(__file__).resolve().parent
ARCHITECTURE = HERE.parents[1] / "minirl_edu" / "architectures" / "Qwen3-30B-A3B.json"
WIDTH = 6.2  # inches: a 10 pt letter is 11 pt high where the figure is 700 px wide
SIZE = 10.0
INK, SOFT, PALE = "#222222", "#767676", "#EDEDED"
ENGINE, ENGINE_FILL = "#9C6B00", "#F8E6C4"
TRAINER, TRAINER_FILL = "#1F5A94", "#DCE9F6"
MINIRL, NO_WEIGHT, R2, R3 = (METHOD_STYLE[name]["color"] for name in ("MiniRL", "− IS", "R2", "R3"))
SCORES = np.array([0.2, 2.2, 0.9, 1.58, 0.4, 1.5, -0.1, 0.7])  # the router logits of lesson 06
R2_FILL, R3_FILL, R2_INK, R3_INK = "#D3ECFA", "#BFE5D8", "#1B7FB5", "#007A58"  # fills, and darker for words


# ------------------------------------------------------------------------------------------------------------ parts


def diagram(height: float) -> tuple[Figure, Axes]:
    """An empty sheet of WIDTH × `height` inches, and axes in which one unit is one inch."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def charts(height: float, columns: int, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A sheet with rows × columns charts without upper and right borders, row by row."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(SOFT)
        ax.tick_params(color=SOFT, labelcolor=INK, labelsize=SIZE)
    return figure, axes


def say(ax: Axes, x: float, y: float, text: str, **kwargs: Any) -> None:
    """A text, centred at a point unless told otherwise."""
    ax.text(x, y, text, **({"ha": "center", "va": "center", "size": SIZE, "color": INK, "linespacing": 1.3} | kwargs))


def box(
    ax: Axes,
    x: float,
    y: float,
    w: float,
    h: float,
    text: str = "",
    fill: str = "white",
    edge: str = INK,
    **kwargs: Any,
) -> None:
    """A rounded box with its lower left corner at (x, y), and a text in its middle."""
    style = "round,pad=0,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2))
    say(ax, x + w / 2, y + h / 2, text, **kwargs)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **kwargs: Any) -> None:
    """An arrow from point to point."""
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, **(look | kwargs)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------- lessons


def three_policies() -> Figure:
    """Lesson 00: who computes which policy, and the two factors of equation (5) between them."""
    figure, ax = diagram(3.6)
    box(ax, 1.2, 2.4, 4.9, 1.1, fill="#FDF6E8", edge="none")
    box(ax, 1.2, 0.62, 4.9, 1.1, fill="#EAF2FB", edge="none")
    say(ax, 1.28, 3.36, "inference engine", ha="left", color=ENGINE, weight="bold")
    say(ax, 1.28, 0.77, "training engine", ha="left", color=TRAINER, weight="bold")

    box(ax, 0.08, 1.68, 0.8, 0.76, "weights\n$\\theta_{old}$", fill=PALE)
    arrow(ax, (0.7, 2.44), (1.42, 2.82), color=ENGINE)
    arrow(ax, (0.7, 1.68), (1.42, 1.3), color=TRAINER)
    say(ax, 0.66, 2.8, "rounded", color=ENGINE)
    say(ax, 0.78, 1.26, "as they are", color=TRAINER)

    box(ax, 1.42, 2.52, 1.1, 0.68, "$\\mu_{old}$\nsamples", fill=ENGINE_FILL, edge=ENGINE)
    arrow(ax, (2.52, 2.86), (3.3, 2.86))
    box(ax, 3.3, 2.52, 2.66, 0.68, "answers, $\\log\\mu_{old}$ of each token,\na reward for each answer", fill="white")

    box(ax, 1.42, 0.92, 1.1, 0.68, "$\\pi_{old}$\nreads", fill=TRAINER_FILL, edge=TRAINER)
    for x, label in ((3.72, "$\\pi_{\\theta_1}$"), (4.46, "$\\pi_{\\theta_2}$"), (5.42, "$\\pi_{\\theta_N}$")):
        box(ax, x, 0.92, 0.54, 0.68, label, fill=TRAINER_FILL, edge=TRAINER, size=12)
    arrow(ax, (4.26, 1.26), (4.46, 1.26), color=TRAINER)
    say(ax, 5.21, 1.26, "…")

    arrow(ax, (1.97, 2.52), (1.97, 1.6), color=ENGINE, arrowstyle="<|-|>", linewidth=2.4, linestyle=(0, (4, 1.5)))
    say(ax, 2.1, 2.17, "$\\pi_{old}\\,/\\,\\mu_{old}$", ha="left", color=ENGINE, size=11.5)
    say(ax, 2.85, 2.17, "discrepancy", ha="left", color=ENGINE, weight="bold")
    say(ax, 2.1, 1.93, "two engines, equal weights", ha="left")
    arrow(ax, (4.73, 2.52), (4.73, 1.72))
    say(ax, 4.83, 2.06, "reads the answers", ha="left")
    arrow(ax, (2.52, 1.26), (3.72, 1.26), color=TRAINER, arrowstyle="<|-|>", linewidth=2.4)
    say(ax, 3.12, 1.02, "staleness", color=TRAINER, weight="bold")
    say(ax, 3.12, 1.5, "$\\pi_\\theta\\,/\\,\\pi_{old}$", color=TRAINER, size=11.5)
    say(ax, 4.84, 0.76, "after each mini-batch")

    arrow(ax, (5.69, 0.92), (5.69, 0.24), arrowstyle="-")
    arrow(ax, (5.69, 0.24), (0.3, 0.24), arrowstyle="-")
    arrow(ax, (0.3, 0.24), (0.3, 1.68))
    say(ax, 3.1, 0.42, "the new weights are the next $\\theta_{old}$, for both engines")
    return figure


def by_hand() -> Figure:
    """Lesson 00: the push on five tokens of two responses, with the library's own loss."""
    mu = torch.tensor([[0.50, 0.08, 0.90], [0.50, 0.80, 1.00]])
    old = torch.tensor([[0.50, 0.50, 0.90], [0.50, 0.60, 1.00]])
    new = torch.tensor([[0.70, 0.50, 0.90], [0.30, 0.66, 1.00]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp, advantages = new.log().requires_grad_(), torch.tensor([0.5, -0.5])
    minirl_loss(logp, old.log(), mu.log(), advantages, mask).loss.backward()
    assert logp.grad is not None
    push, plain = -logp.grad[mask].numpy(), (advantages[:, None] / 2).expand_as(mask)[mask].numpy()
    notes = (
        "dropped:\n$r_t$ = 1.4",
        "weight 6.25,\ncapped at 5",
        "weight 1",
        "dropped:\n$r_t$ = 0.6",
        "weight 0.83,\n$r_t$ = 1.1",
    )

    figure, (ax,) = charts(3.4, 1)
    places = np.array([0, 1, 2, 3.5, 4.5])
    ax.bar(places, push, 0.62, color=[TRAINER if value > 0 else NO_WEIGHT for value in push])
    ax.bar(places, plain, 0.62, facecolor="none", edgecolor=INK, linewidth=1.2, linestyle="--")
    for x, value, outline, note in zip(places, push, plain, notes, strict=True):
        far = value if abs(value) > abs(outline) else outline
        say(ax, x, far + np.sign(far) * 0.06, note, va="bottom" if far > 0 else "top")
    ax.axhline(0, color=INK, linewidth=1)
    say(ax, 1, 1.95, "right answer: $\\hat{A}$ = +½", weight="bold", color=TRAINER)
    say(ax, 4, 1.95, "wrong answer: $\\hat{A}$ = −½", weight="bold", color=NO_WEIGHT)
    columns = zip(mu[mask].tolist(), old[mask].tolist(), new[mask].tolist(), strict=True)
    ax.set_xticks(places, [f"{m:.2f}\n{o:.2f}\n{n:.2f}" for m, o, n in columns])
    say(ax, -0.55, -0.98, "$\\mu_{old}$", ha="right", color=ENGINE)
    say(ax, -0.55, -1.16, "$\\pi_{old}$", ha="right", color=TRAINER)
    say(ax, -0.55, -1.34, "$\\pi_\\theta$", ha="right", color=TRAINER)
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel="push on $\\log\\pi_\\theta$", xlim=(-0.5, 5), ylim=(-0.85, 2.1), yticks=[0, 0.5, 1])
    return figure


def one_step() -> Figure:
    """Lesson 01: eight responses enumerated, before and after one exact step of REINFORCE."""
    responses = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    reward = np.array([0, 0, 0, 1, 0, 0, 0, 1.0])  # right: those that end in "bb"
    logits = {prefix: np.zeros(2) for prefix in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))}
    logits[()] = np.array([0.9, 0.0])
    logits[(0, 1)] = np.array([0.4, 0.0])

    def mass() -> np.ndarray:
        return np.array([np.prod([softmax(logits[tuple(y[:t])])[y[t]] for t in range(3)]) for y in responses])

    before = mass()
    step = {prefix: np.zeros(2) for prefix in logits}
    for y, share, advantage in zip(responses, before, reward - before @ reward, strict=True):
        for t in range(3):  # (01.2): the score of each token, weighted by probability and advantage
            prefix = tuple(y[:t])
            step[prefix] += share * advantage * (np.eye(2)[y[t]] - softmax(logits[prefix]))
    for prefix in logits:
        logits[prefix] += 4.0 * step[prefix]
    after = mass()

    figure, (ax,) = charts(2.9, 1)
    places = np.arange(8)
    ax.bar(places - 0.2, before, 0.38, color="white", edgecolor=INK, linewidth=1.2, label="before")
    bars = ax.bar(places + 0.2, after, 0.38, color="#C9C9C9", edgecolor=INK, linewidth=1.2, label="after one step")
    for i in np.flatnonzero(reward):
        bars[i].set(facecolor=MINIRL)
    names = ["".join("ab"[token] for token in y) for y in responses]
    ax.set_xticks(places, [f"{name}\n{'right' if r else 'wrong'}" for name, r in zip(names, reward, strict=True)])
    for i in range(8):
        change = 100 * (after[i] - before[i])
        say(
            ax,
            i,
            max(after[i], before[i]) + 0.02,
            f"{change:+.1f}".replace("-", "−"),
            weight="bold" if reward[i] else None,
        )
    ax.set(ylabel="probability", ylim=(0, 1.2 * max(*after, *before)))
    ax.tick_params(axis="x", length=0)
    score = f"expected reward {before @ reward:.2f} → {after @ reward:.2f}\nnumbers: change in points"
    say(ax, 3.75, 0.8 * ax.get_ylim()[1], score, ha="left", va="top")
    ax.legend(frameon=False, fontsize=SIZE, loc="upper right", ncols=2)
    return figure


def effective_share() -> Figure:
    """Lesson 01: how many of the responses still count, over their length, for independent tokens."""
    figure, (ax,) = charts(2.7, 1)
    length = np.geomspace(1, 100_000, 400)
    for chi, line, name in ((0.02, "-", "$\\chi^2$ = 2 %"), (0.002, "--", "0.2 %"), (0.0002, ":", "0.02 %")):
        ax.semilogx(length, (1 + chi) ** -length, color=INK, linewidth=2, linestyle=line)
        say(ax, 0.82 * np.log(2) / np.log1p(chi), 0.45, name, ha="right")
    ax.axvline(32_768, color=NO_WEIGHT, linewidth=1.5)
    say(ax, 36_000, 0.8, "32,768\ntokens", ha="left", color=NO_WEIGHT)
    ax.set(xlabel="tokens in the response", ylabel="effective share", xlim=(1, 130_000), ylim=(0, 1.04))
    ax.set_xticks([1, 10, 100, 1000, 10_000], ["1", "10", "100", "1000", "10,000"])
    ax.minorticks_off()
    return figure


def first_order() -> Figure:
    """Lesson 02: the product of the ratios against 1 + the sum of the deviations; what is dropped, over the length."""
    figure, (left, right) = charts(2.9, 2)
    delta = np.linspace(-0.1, 0.1, 101)
    left.plot(delta, (1 + delta) ** 20, color=INK, linewidth=2, label="$\\prod_t(1+\\delta_t)$")
    left.plot(delta, 1 + 20 * delta, color=MINIRL, linewidth=2, linestyle="--", label="$1+\\sum_t\\delta_t$")
    left.fill_between(delta, (1 + delta) ** 20, 1 + 20 * delta, color=PALE, label="dropped")
    left.set(xlabel="$\\delta$, the same for 20 tokens", ylabel="weight of the response", xlim=(-0.1, 0.1))
    left.set_xticks([-0.1, -0.05, 0, 0.05, 0.1], ["−0.1", "", "0", "", "0.1"])
    left.legend(frameon=False, fontsize=SIZE, loc="upper left")

    length = np.geomspace(2, 1000, 200)
    for chi, line in ((0.1, "-"), (0.03, "--"), (0.01, ":")):
        dropped = np.sqrt(np.exp(length * np.log1p(chi**2)) - 1 - length * chi**2)  # the root of (02.7)
        right.loglog(length, dropped, color=INK, linewidth=2, linestyle=line)
        say(right, 1100, dropped[-1], f"$\\chi$ = {chi:g}", ha="left")
    right.axhline(1, color=SOFT, linewidth=1)
    say(right, 2.2, 1.25, "as large as the 1", ha="left", va="bottom", color=SOFT)
    right.set(xlabel="tokens in the response", ylabel="typical size dropped", xlim=(2, 1000), ylim=(5e-5, 300))
    right.set_xticks([10, 100, 1000], ["10", "100", "1000"])
    right.minorticks_off()
    return figure


def orders() -> Figure:
    """Lesson 02: the remainder and the error of the gradient over the distance, for three enumerated problems."""
    distances = np.logspace(-3, 0.5, 22)
    figure, axes = charts(2.9, 2)
    for seed, mark in zip((0, 1, 2), "osX", strict=True):
        mu = TabularPolicy.random(3, 4, seed=seed)
        way = TabularPolicy.random(3, 4, seed=seed + 100).logits
        reward = torch.rand(len(mu.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        line = [mu.moved(way, distance) for distance in distances.tolist()]
        errors = (
            [objective_remainder(pi, mu, reward).abs().item() for pi in line],
            [(sequence_gradient(pi, mu, reward) - token_gradient(pi, mu, reward)).norm().item() for pi in line],
        )
        for ax, values in zip(axes, errors, strict=True):
            ax.loglog(distances, values, color=INK, marker=mark, markersize=4, linewidth=1)
    for ax, slope, height, name in zip(
        axes, (2, 1), (0.5, 0.2), ("remainder of $J$", "error of $\\nabla J$"), strict=True
    ):
        ax.loglog(distances[:12], height * distances[:12] ** slope, color=MINIRL, linestyle="--", linewidth=2)
        ax.set(xlabel="distance from $\\mu_{old}$ in logits", ylabel=name)
        say(ax, 0.3, 0.88, f"dashed: slope {slope}", color=MINIRL, transform=ax.transAxes)
        ax.minorticks_off()
    return figure


def drift() -> Figure:
    """Lesson 03: tokens that pull towards the sampler and push away from it, and what the drift does to a policy."""
    logits = np.array([1.6, 0.7, 0.0, -0.6])
    noise = np.random.default_rng(0).normal(size=(100_000, len(logits)))
    noise = np.concatenate([noise, -noise])
    policy, sampler = softmax(logits), softmax(logits + noise).mean(0)  # the engine's noise, sigma = 1

    def entropy(p: np.ndarray) -> float:
        return float(-(p * np.log(p)).sum())

    figure, axes = charts(4.1, 3, 2, sharey="row", height_ratios=(1.15, 1))
    for column, (title, right, wrong) in enumerate(
        [("wrong ones longer", 3, 12), ("all alike", 6, 6), ("right ones longer", 12, 3)]
    ):
        tokens, change = axes[column], axes[3 + column]
        for side, count, hatch, fill in ((1, right, "", R2_FILL), (-1, wrong, "////", "#F3C6A5")):
            for token in range(count):
                y = token if side > 0 else -token - 1
                tokens.add_patch(Rectangle((0.32, y + 0.08), 0.36, 0.84, facecolor=fill, edgecolor=INK, hatch=hatch))
        tokens.axhline(0, color=INK, linewidth=1)
        tokens.set(xlim=(0, 1), ylim=(-12.6, 12.6), xticks=[], yticks=[])
        tokens.spines[["left", "bottom"]].set_visible(False)
        tokens.set_title(title, size=11, weight="bold")
        say(tokens, 0.72, right / 2, f"{right}", ha="left")
        say(tokens, 0.72, -wrong / 2, f"{wrong}", ha="left")
        if right != wrong:
            arrow(tokens, (0.14, 0), (0.14, right - wrong), color=NO_WEIGHT, linewidth=3, mutation_scale=18)
        else:
            say(tokens, 0.14, 1.3, "0", color=NO_WEIGHT, weight="bold", size=12)

        covariance = 0.25 * (right - wrong)  # Cov(|y|, R) with half of the responses right
        moved = softmax(logits + 4 * covariance * (sampler - policy))  # (03.7), a step of 4
        places = np.arange(len(policy))
        change.bar(places - 0.2, policy, 0.38, facecolor="white", edgecolor=INK, linewidth=1.2)
        change.bar(places + 0.2, moved, 0.38, facecolor=NO_WEIGHT, edgecolor=INK, linewidth=1.2)
        change.set(xticks=[], yticks=[], ylim=(0, 1))
        word = {-1: "sharper", 0: "unchanged", 1: "flatter"}[int(np.sign(covariance))]
        change.set_xlabel(f"{word}: entropy\n{entropy(policy):.2f} → {entropy(moved):.2f}", size=SIZE)
    say(axes[0], 0.22, 9.2, "right: pull\ntowards $\\mu$", ha="left")
    say(axes[2], 0.78, -9.2, "wrong: push\naway from $\\mu$", ha="right")
    say(axes[4], 3.4, 0.97, "white: before\nfilled: after", ha="right", va="top")
    axes[3].set_ylabel("$\\pi$ of four tokens", size=SIZE)
    axes[0].set_ylabel("tokens of a response", size=SIZE)
    return figure


def estimators() -> Figure:
    """Lesson 03: one token's term of k1, k2 and k3 over log r, and the noise of a mean of 2,000 terms over the KL."""
    terms = {"$k_1$": lambda x: -x, "$k_2$": lambda x: x**2 / 2, "$k_3$": lambda x: np.expm1(x) - x}
    looks = [("#0072B2", "-"), (SOFT, ":"), ("#D55E00", "--")]
    rng = np.random.default_rng(0)
    logits, error = 1.5 * rng.normal(size=64), rng.normal(size=64)
    pi, kl, noise = softmax(logits), [], []
    for size in np.geomspace(0.003, 2.0, 40):
        mu = softmax(logits + size * error)
        values = np.stack([term(np.log(pi / mu)) for term in terms.values()])
        kl.append(mu @ np.log(mu / pi))
        noise.append(np.sqrt(((values - (values @ mu)[:, None]) ** 2 @ mu) / 2000) / kl[-1])
    figure, (left, right) = charts(2.9, 2)
    x = np.linspace(-2, 2, 201)
    for (name, term), (colour, line), curve in zip(terms.items(), looks, np.transpose(noise), strict=True):
        left.plot(x, term(x), color=colour, linestyle=line, linewidth=2, label=name)
        right.loglog(kl, curve, color=colour, linestyle=line, linewidth=2)
    left.axhline(0, color=SOFT, linewidth=0.8)
    left.set(xlabel="$\\log r$ of one token, nats", ylabel="its term, nats", xlim=(-2, 2))
    left.set_xticks([-2, -1, 0, 1, 2], ["−2", "−1", "0", "1", "2"])
    left.set_yticks([-2, 0, 2, 4], ["−2", "0", "2", "4"])
    left.legend(frameon=False, fontsize=SIZE, loc="upper center")
    right.axhline(1, color=SOFT, linewidth=0.8)
    say(right, 0.6, 1.3, "noise = KL", ha="right", va="bottom", color=SOFT)
    right.set(xlabel="KL per token, nats", ylabel="noise of a mean ÷ KL")
    right.set_xticks([1e-5, 1e-3, 1e-1], ["$10^{-5}$", "$10^{-3}$", "$10^{-1}$"])
    right.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    right.minorticks_off()
    return figure


def red_ink() -> Figure:
    """Lesson 05: the push on each token of a short and a long wrong response, in two mini-batches."""
    batches = ((3, 5), (3, 12))

    def pushes(name: str, lengths: tuple[int, int]) -> np.ndarray:
        mask = torch.tensor([[t < n for t in range(max(lengths))] for n in lengths])
        logp = torch.zeros(mask.shape, requires_grad=True)
        old, advantages = torch.zeros(mask.shape), torch.tensor([-1.0, -1.0])
        loss = {
            "MiniRL": lambda: minirl_loss(logp, old, old, advantages, mask),
            "GRPO": lambda: grpo_loss(logp, old, advantages, mask),
            "CISPO": lambda: cispo_loss(logp, old, advantages, mask),
        }[name]().loss
        return torch.autograd.grad(loss, logp)[0].numpy()

    figure, axes = charts(4.0, 2, 3, sharey=True)
    for row, name in enumerate(("MiniRL", "GRPO", "CISPO")):
        unit = pushes(name, batches[0])[0, 0]
        for column, lengths in enumerate(batches):
            ax, push = axes[2 * row + column], pushes(name, lengths) / unit
            for response, (start, hatch) in enumerate(((0, ""), (4, "////"))):
                count = lengths[response]
                style = {"color": METHOD_STYLE[name]["color"], "edgecolor": "white", "hatch": hatch}
                ax.bar(start + np.arange(count), push[response, :count], 0.9, **style)
                say(ax, start + (count - 1) / 2, push[response, 0] + 0.07, f"{push[response, 0]:.2f}", va="bottom")
            ax.set(xlim=(-0.8, 15.8), ylim=(0, 1.5), xticks=[], yticks=[0, 1])
            if row == 2:
                ax.set_xticks([1, 4 + (lengths[1] - 1) / 2], [f"{lengths[0]} tokens", f"{lengths[1]} tokens"])
                ax.tick_params(axis="x", length=0)
            if row == 0:
                ax.set_title(f"two responses, {lengths[0]} and {lengths[1]} tokens", size=SIZE)
        axes[2 * row].set_ylabel(name, size=11, weight="bold")
    figure.supylabel("push on each token", size=SIZE)
    return figure


def coefficients() -> Figure:
    """Lesson 05: what MiniRL, GRPO, CISPO and the dual clip multiply a score with, over the ratio, by their losses.

    The engine drew the token too rarely, by a factor of 1.5.
    """
    ratio = torch.linspace(0.02, 7, 700, dtype=torch.float64)
    old = torch.full((len(ratio), 1), 0.01, dtype=torch.float64).log()
    losses = {
        "MiniRL": lambda x, a, m: minirl_loss(x, old, old - np.log(1.5), a, m),
        "GRPO": lambda x, a, m: grpo_loss(x, old, a, m),
        "CISPO": lambda x, a, m: cispo_loss(x, old, a, m),
    }
    figure, axes = charts(3.1, 2)
    for ax, sign in zip(axes, (1.0, -1.0), strict=True):
        advantages, mask = torch.full((len(ratio),), sign), torch.ones(old.shape, dtype=torch.bool)
        for name, loss_of in losses.items():
            logp = (old + ratio.log()[:, None]).requires_grad_()
            pull = -torch.autograd.grad(loss_of(logp, advantages, mask).loss, logp)[0][:, 0] * len(ratio)
            look = {"color": METHOD_STYLE[name]["color"], "linestyle": METHOD_STYLE[name]["linestyle"]}
            ax.plot(ratio, pull, linewidth=2.2, label=name, **look)
            if name == "GRPO" and sign < 0:
                ax.plot(
                    ratio, pull.masked_fill(ratio > 3, 0), color=R3, linewidth=1.6, linestyle="-.", label="dual clip"
                )
        ax.axvline(1, color=SOFT, linewidth=0.8)
        ax.set(xlabel="ratio  $r=\\pi_\\theta/\\pi_{old}$", xlim=(0, 7), xticks=[0, 1, 3, 5, 7])
        ax.set_title("$\\hat A>0$: push up" if sign > 0 else "$\\hat A<0$: push down", size=11)
    axes[0].set(ylim=(-0.3, 7.3), yticks=[0, 5], ylabel="coefficient of $\\nabla\\log\\pi_\\theta$")
    axes[1].set_ylim(-7.3, 0.3)
    axes[1].set_yticks([-5, 0], ["−5", "0"])
    axes[0].legend(*axes[1].get_legend_handles_labels(), frameon=False, fontsize=SIZE, loc="upper left")
    return figure


def remedies() -> Figure:
    """Lesson 04: a token's two factors as a plane, and which remedy bounds or shrinks what."""
    figure, ax = diagram(3.7)
    ax = figure.add_axes((0.115, 0.135, 0.5, 0.84))
    rng = np.random.default_rng(3)
    near, far = rng.normal(0, [0.22, 0.16], (150, 2)), rng.normal(0, [0.95, 0.5], (28, 2))
    points = np.exp(np.concatenate([near, far]))
    points = points[(points > 1 / 8).all(1) & (points < 8).all(1)]
    side = np.geomspace(1 / 8, 8, 100)
    ax.fill_between(side, np.maximum(5 / side, 1 / 8), 8, where=5 / side <= 8, color="#E3E3E3", linewidth=0)
    ax.plot(side, 5 / side, color=INK, linewidth=1.6)
    ax.plot(points[:, 0], points[:, 1], "o", color=SOFT, markersize=3, alpha=0.8, markeredgewidth=0)
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.axhline(1, color=INK, linewidth=0.8)
    for bound in (1.27, 0.8):
        ax.axhline(bound, color=TRAINER, linewidth=1.6, linestyle="--")
    ax.set(xscale="log", yscale="log", xlim=(1 / 8, 8), ylim=(1 / 8, 8))
    ticks = [0.2, 0.5, 1, 2, 5]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], size=SIZE)
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks], size=SIZE)
    ax.minorticks_off()
    ax.set_xlabel("discrepancy  $\\pi_{old}/\\mu_{old}$", size=11, color=ENGINE)
    ax.set_ylabel("staleness  $\\pi_\\theta/\\pi_{old}$", size=11, color=TRAINER, labelpad=1)
    say(ax, 7.2, 6.6, "weight > 5", ha="right", va="top")
    for start, end in ((0.14, 0.24), (5.4, 2.4)):
        arrow(ax, (start, 0.36), (end, 0.36), color=R3, linewidth=3, mutation_scale=16)
    say(ax, 6.5, 0.36, "R3", color=R3_INK)
    for x, name, colour, ink in ((0.3, "R2", R2, R2_INK), (0.48, "R3", R3, R3_INK)):
        say(ax, x, 6.5, name, color=ink)
        for start, end in ((0.17, 0.5), (5.4, 2.0)):
            arrow(ax, (x, start), (x, end), color=colour, linewidth=3, mutation_scale=16)

    whole = figure.axes[0]
    x = 4.0
    for y, colour, name, text in (
        (3.42, INK, "cap", "bounds the product:\nthe weight is at most 5"),
        (2.66, TRAINER, "clip", "drops tokens beyond a\nline, if they were\npushed there"),
        (1.70, R2_INK, "R2", "no flips in the\nstaleness"),
        (1.14, R3_INK, "R3", "no flips in either factor"),
    ):
        say(whole, x, y, name, ha="left", weight="bold", color=colour, size=11.5)
        say(whole, x + 0.5, y + 0.09, text, ha="left", va="top")
    say(whole, x, 0.8, "Replay removes flips;\nrounding stays.", ha="left", va="top", color=SOFT)
    return figure


def clip_regions() -> Figure:
    """Lesson 04: MiniRL's push on a token over its ratio, for both signs of the advantage: the library's loss."""
    figure, axes = charts(2.7, 2, sharey=True)
    ratio = torch.linspace(0.25, 1.75, 1501, dtype=torch.float64)
    for ax, sign in zip(axes, (1, -1), strict=True):
        logp = (0.2 * ratio).log()[:, None].requires_grad_()  # a token of probability 0.2
        old = torch.full_like(logp, 0.2).log().detach()
        advantages, mask = torch.full((len(logp),), float(sign)), torch.ones(logp.shape, dtype=torch.bool)
        loss = minirl_loss(logp, old, old, advantages, mask, num_responses=1).loss
        push = -torch.autograd.grad(loss, logp)[0][:, 0].numpy()
        dropped = push == 0
        edges = ratio.numpy()[dropped][[0, -1]]
        ax.axvspan(*edges, facecolor="#DEDEDE", linewidth=0)
        for part in (ratio.numpy() < edges[0], dropped, ratio.numpy() > edges[1]):
            ax.plot(ratio.numpy()[part], push[part], color=MINIRL, linewidth=2.4)
        ax.axhline(0, color=SOFT, linewidth=0.8)
        ax.axvline(1, color=SOFT, linewidth=0.8)
        bound = edges[0] if sign > 0 else edges[1]
        ax.set_xticks(
            [0.5, 1, bound, 1.5 if sign < 0 else 1.7], ["0.5", "1", f"{bound:.2f}", "1.5" if sign < 0 else "1.7"]
        )
        ax.set(xlim=(0.25, 1.75), ylim=(-2, 2), xlabel="ratio  $r_t=\\pi_\\theta/\\pi_{old}$")
        ax.set_title("$\\hat A>0$: push up" if sign > 0 else "$\\hat A<0$: push down", size=11)
        say(ax, edges.mean(), -sign * 1.25, "dropped:\nmoved\nenough")
        say(ax, 0.78 if sign > 0 else 1.32, 1.2 if sign > 0 else -0.85, "kept", color=MINIRL)
    axes[0].set_ylabel("push on $\\log\\pi_\\theta(y_t)$")
    return figure


def layer() -> Figure:
    """Lesson 06: one token through a layer of eight experts, of which the router picks two."""
    figure, ax = diagram(2.9)
    best = np.sort(np.argsort(SCORES)[-2:])
    gates = softmax(SCORES[best])  # (06.2)
    box(ax, 0.1, 2.25, 1.1, 0.5, "state $x$\nof a token", fill=PALE)
    box(ax, 1.75, 2.25, 2.7, 0.5, "router: $s=W_r\\,x$, the top 2 of 8", fill=TRAINER_FILL, edge=TRAINER)
    box(
        ax,
        1.45,
        0.1,
        3.3,
        0.5,
        f"$y={gates[0]:.2f}\\,E_{best[0] + 1}(x)+{gates[1]:.2f}\\,E_{best[1] + 1}(x)$",
        fill=PALE,
    )
    arrow(ax, (1.2, 2.5), (1.75, 2.5))
    for e, score in enumerate(SCORES):
        x, picked = 0.1 + 0.76 * e, e in best
        edge = TRAINER if picked else SOFT
        box(ax, x, 1.02, 0.68, 0.64, fill="#AFC4DC" if picked else "white", edge=edge)
        say(ax, x + 0.34, 1.47, f"$E_{e + 1}$", size=12)
        say(ax, x + 0.34, 1.2, f"{score:.2f}".replace("-", "−"))
        middle = x + 0.34
        if picked:
            arrow(ax, (3.1, 2.25), (middle, 1.66), color=TRAINER, linewidth=2.2)
            arrow(ax, (middle, 1.02), (2.2 + 0.9 * (e > best[0]), 0.6), color=TRAINER, linewidth=2.2)
    say(ax, 4.55, 2.0, "no path to the others:\nno output, no gradient", ha="left", color=SOFT)
    return figure


def router() -> Figure:
    """Lesson 06: a top-2 router at a near tie, and the layer's output along the disturbance."""
    figure, axes = charts(3.1, 3, width_ratios=(1, 1, 1.25))
    answers = np.array([0.1, 0.7, 0.2, 0.9, 0.5, -0.8, 0.3, 0.6])  # one number per expert, at this token
    direction = np.array([0.2, -0.2, 0.2, -1, 0.4, 1, -0.2, 0.4])

    def chosen(s: np.ndarray) -> np.ndarray:
        return np.argsort(s)[-2:]

    for ax, s, title in zip(axes[:2], (SCORES, SCORES + 0.08 * direction), ("one engine", "another"), strict=True):
        best = chosen(s)
        bars = ax.bar(np.arange(8), s, 0.74, color="white", edgecolor=INK, linewidth=1.2)
        for e in best:
            bars[e].set(facecolor="#AFC4DC" if e == best[1] else NO_WEIGHT)
        for e in (3, 5):
            say(ax, e, s[e] + 0.13, f"{s[e]:.2f}")
        ax.axhline(0, color=SOFT, linewidth=0.8)
        ax.set_xticks(np.arange(8), [str(e + 1) for e in range(8)])
        ax.set(ylim=(-0.4, 2.6), yticks=[], xlabel="expert")
        ax.set_title(f"{title}:\nexperts {' and '.join(str(e + 1) for e in sorted(best))}", size=SIZE)
    axes[0].set_ylabel("router logit", size=SIZE)

    def output_of(s: np.ndarray) -> float:
        best = chosen(s)
        return float(softmax(s[best]) @ answers[best])  # (06.1) with the gates of (06.2)

    size = np.linspace(0, 0.08, 321)
    output = np.array([output_of(SCORES + t * direction) for t in size])
    jump = int(np.abs(np.diff(output)).argmax()) + 1
    for part in (slice(None, jump), slice(jump, None)):
        axes[2].plot(size[part], output[part], color=INK, linewidth=2.4)
    axes[2].plot([size[jump]] * 2, output[jump - 1 : jump + 1], color=NO_WEIGHT, linewidth=2, linestyle=":")
    say(axes[2], size[jump] + 0.004, output[jump - 1 : jump + 1].mean(), "flip", ha="left", color=NO_WEIGHT)
    axes[2].set(xlabel="largest change of a logit", xticks=[0, 0.04, 0.08], ylim=(0, 1), yticks=[0, 0.5, 1])
    axes[2].set_title("output of the layer", size=SIZE)
    return figure


def replay_timeline() -> Figure:
    """Lesson 07: which experts each forward of a global step uses, and where the target policy is altered (Table 1)."""
    figure, ax = diagram(3.5)
    columns = [("rollout", "$\\mu_{old}$"), ("read", "$\\pi_{old}$"), ("first", "$\\pi_\\theta$")]
    columns += [("later", "$\\pi_\\theta$"), ("evaluation", "")]
    left, wide, high = 0.62, 0.98, 0.62
    xs = [left + i * (wide + 0.15) for i in range(5)]
    for x, (word, policy) in zip(xs, columns, strict=True):
        say(ax, x + wide / 2, 3.08, f"{word}  {policy}")
    say(ax, (xs[2] + xs[3] + wide) / 2, 3.35, "mini-batches", color=TRAINER, weight="bold")
    say(ax, xs[1] + wide / 2, 3.35, "trainer", color=TRAINER, weight="bold")
    say(ax, xs[0] + wide / 2, 3.35, "engine", color=ENGINE, weight="bold")
    live, none, own, theirs = ("live", "white"), "", ("$e^\\pi_{old}$", R2_FILL), ("$e^\\mu_{old}$", R3_FILL)
    rows = [
        ("none", INK, 2.26, [live, live, live, live, live], [none] * 5),
        ("R2", R2_INK, 1.38, [live, ("live", R2_FILL), own, own, live], ["", "noted", "same", "altered", ""]),
        ("R3", R3_INK, 0.5, [("live", R3_FILL), theirs, theirs, theirs, live], ["noted", "", "altered", "altered", ""]),
    ]
    for name, colour, y, cells, notes in rows:
        say(ax, 0.08, y + high / 2, name, ha="left", weight="bold", color=colour, size=11.5)
        for x, (text, fill), note in zip(xs, cells, notes, strict=True):
            replayed = text != "live"
            box(ax, x, y, wide, high, fill=fill, edge=colour if fill != "white" else SOFT)
            say(ax, x + wide / 2, y + (0.42 if note else 0.31), text, size=13 if replayed else SIZE)
            if note:
                strong = note != "same"
                say(ax, x + wide / 2, y + 0.16, note, weight="bold" if strong else None)
    for y, first, colour in ((1.38, 1, R2_INK), (0.5, 0, R3_INK)):
        for i in range(first, 3):
            arrow(ax, (xs[i] + wide, y + 0.42), (xs[i + 1], y + 0.42), color=colour, mutation_scale=10)
    say(ax, 3.1, 0.2, "same, altered: $\\pi_\\theta$ with these experts, against the live $\\pi_\\theta$ (Table 1)")
    return figure


def who_learns() -> Figure:
    """Lesson 07: which expert gets the gradient of a token that another expert wrote, without replay and with R3."""
    figure, ax = diagram(2.9)
    for left, title, colour, trained in ((0.1, "without replay", INK, 0), (3.2, "with R3", R3_INK, 1)):
        say(ax, left + 1.45, 2.72, title, weight="bold", color=colour, size=11.5)
        say(ax, left + 1.45, 1.38, "token\nof the answer")
        for i, (y, name) in enumerate(((1.84, "expert 1"), (0.3, "expert 2"))):
            box(ax, left, y, 0.9, 0.62, name, fill=ENGINE_FILL if i == 1 else "white", edge=ENGINE if i == 1 else SOFT)
            text = f"{name}\ngets 0" if trained == 0 and i == 1 else name
            fill, edge = (TRAINER_FILL, TRAINER) if i == trained else ("white", SOFT)
            box(ax, left + 2.0, y, 0.9, 0.62, text, fill=fill, edge=edge)
        arrow(ax, (left + 0.9, 0.68), (left + 1.4, 1.16), color=ENGINE)
        say(ax, left + 0.92, 1.06, "writes", ha="right", color=ENGINE)
        start, end = (1.6, 2.08) if trained == 0 else (1.16, 0.68)
        arrow(ax, (left + 1.52, start), (left + 2.0, end), color=TRAINER, linewidth=2.6, mutation_scale=16)
        weight = "$\\pi_1/\\pi_2$" if trained == 0 else "1"
        say(ax, left + 2.52, 1.38, f"gradient\n× {weight}", color=TRAINER)
        say(ax, left + 0.45, 0.14, "engine", color=ENGINE)
        say(ax, left + 2.45, 0.14, "trainer", color=TRAINER)
    ax.plot([3.1, 3.1], [0.1, 2.8], color=PALE, linewidth=2)
    return figure


def global_step() -> Figure:
    """Lesson 08: one global step with N = 4, as a timeline of the engine and the trainer."""
    figure, ax = diagram(3.5)
    say(ax, 0.08, 2.95, "engine", ha="left", color=ENGINE, weight="bold")
    say(ax, 0.08, 1.65, "trainer", ha="left", color=TRAINER, weight="bold")
    box(ax, 0.85, 2.6, 1.3, 0.7, "sample all $gbs$\nanswers: $\\mu_{old}$", fill=ENGINE_FILL, edge=ENGINE)
    ax.plot([2.2, 4.97], [2.86, 2.86], color=ENGINE, linewidth=1.4, linestyle=":")
    say(ax, 3.6, 3.02, "keeps $\\theta_0$")
    box(ax, 5.02, 2.6, 1.1, 0.7, "sync: gets\n$\\theta_4$, rounds it", fill=ENGINE_FILL, edge=ENGINE)
    box(ax, 0.85, 1.3, 1.3, 0.7, "rewards; $\\hat A$;\n$\\log\\pi_{old}$ of all", fill=TRAINER_FILL, edge=TRAINER)
    arrow(ax, (1.5, 2.6), (1.5, 2.0))
    say(ax, 1.6, 2.3, "answers, $\\log\\mu_{old}$, routes", ha="left")
    start, wide, gap = 2.36, 0.72, 0.2
    for n in range(4):
        x = start + n * (wide + gap)
        box(ax, x, 1.3, wide, 0.7, f"update\n{n + 1}", fill="white", edge=TRAINER)
        arrow(ax, (x - (0.21 if n == 0 else gap), 1.65), (x, 1.65), color=TRAINER, mutation_scale=11)
        say(ax, x + wide / 2, 1.13, f"at $\\theta_{n}$", color=TRAINER)
        for block in range(n):
            ax.add_patch(Rectangle((x + 0.18, 0.34 + 0.2 * block), 0.36, 0.17, facecolor="#A9C6E3", edgecolor=TRAINER))
        if n == 0:
            say(ax, x + wide / 2, 0.43, "0")
    ax.plot([0.85, 6.12], [0.31, 0.31], color=SOFT, linewidth=1)
    say(ax, 0.85, 0.62, "updates since\nthe rollout:\nstaleness", ha="left")
    x = start + 4 * wide + 3 * gap
    arrow(ax, (x, 1.65), (5.57 + 0.32, 1.65), arrowstyle="-")
    arrow(ax, (5.89, 1.65), (5.89, 2.6))
    say(ax, 5.8, 2.3, "$\\theta_4$ is the next $\\theta_{old}$", ha="right")
    return figure


def entropy() -> Figure:
    """Lesson 08: the entropy along a step of the expected policy gradient, by which word is right, and (08.6)."""
    figure, axes = charts(2.9, 2, width_ratios=(1, 1.7))
    logits = np.array([2.0, 1.0, 0.3, -0.4, -1.2])
    pi = softmax(logits)
    axes[0].bar(np.arange(1, 6), pi, 0.7, color="#AFC4DC", edgecolor=TRAINER)
    axes[0].set(xlabel="word", xticks=range(1, 6), yticks=[0, 0.3, 0.6], ylim=(0, 0.66))
    axes[0].set_title("the policy $\\pi$", size=SIZE)

    def entropy_of(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(p)).sum(-1)

    eta = np.linspace(0, 1.5, 61)
    for right, y, words in (
        (1, 0.905, "word 1 is right"),
        (3, 1.215, "word 3 is right"),
        (5, 1.105, "word 5 is right"),
    ):
        reward = np.eye(5)[right - 1]
        push = pi * (reward - pi @ reward)
        slope = (pi @ np.log(pi)) * (pi @ push) - pi @ (np.log(pi) * push)  # (08.6)
        axes[1].plot(eta, entropy_of(softmax(logits + eta[:, None] * push)), color=TRAINER, linewidth=2.4)
        axes[1].plot(eta, entropy_of(pi) + eta * slope, color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
        say(axes[1], 1.5, y, words, ha="right")
    axes[1].set(xlabel="step $\\eta$", xticks=[0, 0.5, 1, 1.5], ylim=(0.85, 1.25), yticks=[0.9, 1.0, 1.1, 1.2])
    axes[1].set_title("entropy after the step, and (08.6)", size=SIZE)
    return figure


def mixed_groups() -> Figure:
    """Lesson 09: how much a group teaches over p, and a pupil's digits before and after sharpening."""
    figure, (left, right) = charts(2.9, 2)
    p = np.linspace(0, 1, 201)
    for group, line in ((4, ":"), (8, "-"), (16, "--")):
        left.plot(p, 1 - p**group - (1 - p) ** group, color=INK, linewidth=2, linestyle=line, label=f"$G$ = {group}")
    left.plot(p, 2 * 7 / 8 * p * (1 - p), color=MINIRL, linewidth=2.4)
    say(left, 0.5, 0.33, "mean $|\\hat A|$\nat $G$ = 8", color=MINIRL, va="top")
    left.set(xlabel="$p$, share of right answers", ylim=(0, 1.3), yticks=[0, 0.5, 1], xticks=[0, 0.5, 1])
    left.set_title("groups that are mixed", size=SIZE)
    left.legend(frameon=False, fontsize=SIZE, loc="upper center", ncols=3, handlelength=1.4, columnspacing=0.8)

    heat, slip = np.linspace(0.15, 1, 100), 0.21
    sharpened = 1 / (1 + (9 * (1 - slip) / slip) ** (1 / heat) / 9)  # the slips at that temperature, (09.6)
    for steps, line in ((2, "-"), (4, "--"), (8, ":")):
        score = 0.1 + 0.9 * (1 - 10 / 9 * sharpened) ** steps
        right.plot(heat, score, color=INK, linewidth=2, linestyle=line, label=f"{steps} steps")
    right.set(xlabel="temperature", ylim=(0, 1.1), xlim=(1, 0.15), yticks=[0, 0.5, 1], xticks=[1, 0.6, 0.2])
    right.legend(frameon=False, fontsize=SIZE, loc="lower right")
    right.set_title("score of a start that slips", size=SIZE)
    return figure


def slips() -> Figure:
    """Lesson 09: one step's digits at two temperatures, and the score of teachers who slip, by (09.5)."""
    figure, (left, right) = charts(2.9, 2)
    slip = 0.21
    digit = np.full(10, slip / 9)
    digit[7] = 1 - slip
    sharper = softmax(2 * np.log(digit))  # at temperature 1/2
    places = np.arange(10)
    left.bar(places - 0.2, digit, 0.4, color="white", edgecolor=INK, linewidth=1.2, label="the teacher's")
    left.bar(places + 0.2, sharper, 0.4, color=MINIRL, edgecolor=INK, linewidth=1.2, label="at temperature ½")
    say(left, 6.4, digit[7], f"{digit[7]:.2f}", ha="right")
    say(left, 7.6, sharper[7], f"{sharper[7]:.3f}", ha="left")
    left.set(xlabel="digit written, 7 is right", xticks=places, ylim=(0, 1.45), xlim=(-0.7, 10.6), yticks=[0, 0.5, 1])
    left.legend(frameon=False, fontsize=SIZE, loc="upper left")
    left.set_title("one step", size=SIZE)

    steps = np.arange(13)
    for rate, line in ((0.06, "--"), (0.21, "-")):
        right.plot(steps, 0.1 + 0.9 * (1 - 10 / 9 * rate) ** steps, color=INK, linewidth=2, linestyle=line)
        say(right, 12.3, 0.1 + 0.9 * (1 - 10 / 9 * rate) ** 12, f"{100 * rate:.0f} %", ha="left")
    right.plot(steps, (1 - slip) ** steps, color=INK, linewidth=2, linestyle=":")
    right.axhline(0.1, color=SOFT, linewidth=1)
    say(right, 0.2, 0.13, "blind guess", ha="left", va="bottom", color=SOFT)
    right.set(xlabel="steps of the sum", ylim=(0, 1.05), xlim=(0, 14.4), yticks=[0, 0.5, 1], xticks=[0, 4, 8, 12])
    right.set_title("score, slips in % of the steps", size=SIZE)
    return figure


def two_faults() -> Figure:
    """Lesson 10: the KL of two faults of an engine while a policy learns, by exact policy gradient on ten tokens."""
    reward = np.eye(10)[0]
    start = np.random.default_rng(0).normal(0, 0.5, 10) + 3.5 * reward  # as after a cold start: right is the likeliest
    logits, kept = start.copy(), {"temperature": [], "sync": []}

    def kl(mu: np.ndarray, pi: np.ndarray) -> float:
        return float((mu * np.log(mu / pi)).sum())

    for _ in range(121):
        policy = softmax(logits)
        kept["temperature"].append(kl(softmax(logits / 0.7), policy))
        kept["sync"].append(kl(softmax(start), policy))
        logits = logits + 0.5 * policy * (reward - policy @ reward)
    figure, axes = charts(2.8, 2)
    titles = ("temperature 0.7, unknown\nto the trainer", "weights that never\nreach the engine")
    for ax, key, title in zip(axes, ("temperature", "sync"), titles, strict=True):
        ax.plot(kept[key], color=NO_WEIGHT, linewidth=2.4)
        ax.plot([0], kept[key][:1], "o", color=NO_WEIGHT, markersize=8, clip_on=False, zorder=3)
        ax.set_title(title, size=SIZE)
        ax.set(xlabel="gradient step", xticks=[0, 60, 120], xlim=(0, 120))
        ax.set_ylim(0, 1.2 * max(kept[key]))
    axes[0].set_ylabel("KL$(\\mu\\,\\|\\,\\pi)$, nats")
    return figure


def reading_order() -> Figure:
    """Lesson 10: the questions to ask a chart, in their order, and the suspect at each yes."""
    asked = [
        ("Flip rate above 0 under R3?", "the replay of routes", "impossible"),
        ("Lower clip fraction always 0?", "the advantages' signs", "impossible"),
        ("Mismatch high at step 1?", "the sampler's distribution", "at step 1"),
        ("Staleness high?", "the size of the steps", "which engine?"),
        ("The two scores differ?", "the hand-over of weights", "which engine?"),
        ("Nothing learned?", "the rewards", "only now the score"),
    ]
    figure, ax = diagram(4.1)
    step, high, colours = 0.66, 0.44, {"impossible": PALE, "at step 1": ENGINE_FILL, "which engine?": TRAINER_FILL}
    for i, (question, suspect, kind) in enumerate(asked):
        y = 4.1 - 0.14 - high - i * step
        if i == 0 or kind != asked[i - 1][2]:
            say(ax, 0.06, y + high / 2, kind.replace("only now ", "only now\n"), ha="left", color=SOFT)
        box(ax, 1.34, y, 2.36, high, question, fill=colours.get(kind, "white"))
        arrow(ax, (3.7, y + high / 2), (4.12, y + high / 2))
        say(ax, 3.9, y + high / 2 + 0.12, "yes")
        box(ax, 4.12, y, 2.02, high, suspect, edge=NO_WEIGHT)
        if i + 1 < len(asked):
            arrow(ax, (2.52, y), (2.52, y + high - step), mutation_scale=11)
            say(ax, 2.64, y + (high - step) / 2, "no", ha="left")
    return figure


def what_lives_where() -> Figure:
    """Lesson 11: bytes of Qwen3-30B-A3B in a trainer and in an engine, by (11.4) and (11.5), against a GPU's 80 GB."""
    c = json.loads(ARCHITECTURE.read_text())
    d, h, layers, vocabulary = c["hidden_size"], c["head_dim"], c["num_hidden_layers"], c["vocab_size"]
    attention = 2 * d * h * (c["num_attention_heads"] + c["num_key_value_heads"])
    experts = c["num_experts"] * (d + 3 * d * c["moe_intermediate_size"])
    parameters = layers * (attention + experts + 2 * d + 2 * h) + 2 * vocabulary * d + d  # (11.4), head not tied
    cache = 2 * layers * c["num_key_value_heads"] * h * 2 * 32_768  # one response, 16 bits
    figure, (ax,) = charts(3.1, 1)
    for gpu in range(7):
        ax.barh(3, 80, 0.5, left=80 * gpu, facecolor="white", edgecolor=INK)
        say(ax, 80 * gpu + 40, 3, f"GPU {gpu + 1}")
    part = 4 * parameters / 1e9  # (11.5): four parts of four bytes for each parameter
    for i, name in enumerate(("weights,\ngradients", "master\nweights", "Adam $m$", "Adam $v$")):
        ax.barh(2, part, 0.66, left=i * part, facecolor=TRAINER_FILL if i % 2 else "#B8D2EC", edgecolor=TRAINER)
        say(ax, (i + 0.5) * part, 2, name)
    say(ax, 4 * part + 6, 2, f"{4 * part:.0f} GB", ha="left")
    weights, caches = 2 * parameters / 1e9, 16 * cache / 1e9
    ax.barh(1, weights, 0.66, facecolor=ENGINE_FILL, edgecolor=ENGINE)
    ax.barh(1, caches, 0.66, left=weights, facecolor="#EBCB8B", edgecolor=ENGINE, hatch="..")
    say(ax, weights + caches + 6, 1, f"weights, and caches of 16 responses: {weights + caches:.0f} GB", ha="left")
    logits = 4 * 32_768 * vocabulary / 1e9
    ax.barh(0, logits, 0.66, facecolor="white", edgecolor=INK, hatch="////")
    say(ax, logits + 6, 0, f"logits of one response, if they were all kept: {logits:.0f} GB", ha="left")
    ax.set_yticks([3, 2, 1, 0], ["80 GB each", "trainer", "engine", "never"], size=SIZE)
    ax.set(xlim=(0, 570), ylim=(-0.5, 3.4), xticks=range(0, 561, 80), xlabel="GB")
    ax.tick_params(axis="y", length=0)
    return figure


def two_ranks() -> Figure:
    """Lesson 11: two parts of equal area, and what a global divisor and a mean of means give each response."""
    figure, (left, right) = charts(3.0, 2, width_ratios=(1.05, 1))
    parts = (  # where it stands, its rows, the tokens of each, and where its name stands
        ("rank 1: 8 responses\nof 4 tokens", 4.4, 8, 4, (4.8, 8.4)),
        ("rank 2: 2 responses of 16 tokens", 0, 2, 16, (0, 2.4)),
    )
    for name, bottom, rows, width, place in parts:
        for row in range(rows):
            look = {"facecolor": TRAINER_FILL, "edgecolor": TRAINER, "linewidth": 1.2}
            left.add_patch(Rectangle((0, bottom + row), width, 0.8, **look))
        say(left, *place, name, ha="left")
    left.set(xlim=(-0.3, 16.3), ylim=(-0.3, 12.6))
    left.axis("off")

    total, places = sum(rows for _, _, rows, *_ in parts), np.arange(10)
    equal = np.full(total, 1 / total)
    means = np.concatenate([np.full(rows, 1 / (len(parts) * rows)) for _, _, rows, *_ in parts])
    right.bar(places - 0.2, equal, 0.4, color="white", edgecolor=INK, linewidth=1.2, label="global divisor")
    right.bar(places + 0.2, means, 0.4, color=NO_WEIGHT, edgecolor=INK, linewidth=1.2, label="mean of means")
    right.set(xticks=[3.5, 8.5], ylim=(0, 0.36), ylabel="weight of a response")
    right.set_yticks([0, 1 / 16, 1 / 10, 1 / 4], ["0", "1/16", "1/10", "1/4"])
    right.set_xticklabels(["rank 1", "rank 2"])
    right.tick_params(axis="x", length=0)
    right.legend(frameon=False, fontsize=SIZE, loc="upper left")
    return figure


def luck() -> Figure:
    """Lesson 12: the half-width of (12.1) over the number of seeds; Wilson's and the exact interval for counts of 8."""
    figure, (left, right) = charts(3.1, 2)
    seeds = range(3, 25)
    left.plot(seeds, [student.ppf(0.975, n - 1) / np.sqrt(n) for n in seeds], "-o", color=MINIRL, markersize=3.5)
    left.plot(seeds, [1.96 / np.sqrt(n) for n in seeds], "--", color=SOFT)
    for n in (3, 8):
        width = student.ppf(0.975, n - 1) / np.sqrt(n)
        left.plot([n], [width], "o", color=MINIRL, markersize=8)
        say(left, n + 0.7, width + 0.12, f"{n} seeds: {width:.1f}", ha="left")
    say(left, 24, 0.1, "with 1.96 for $t$", ha="right", color=SOFT)
    left.set(xlabel="seeds", ylabel="half-width, in $s$", xlim=(2, 25), ylim=(0, 2.8), xticks=[3, 8, 16, 24])

    for k in range(9):
        for shift, method, color in ((0.13, "wilson", NO_WEIGHT), (-0.13, "exact", MINIRL)):
            ends = binomtest(k, 8).proportion_ci(0.95, method=method)
            right.plot([ends.low, ends.high], [k + shift] * 2, color=color, linewidth=2.6, solid_capstyle="butt")
        right.plot([k / 8], [k], "o", color=INK, markersize=4)
    right.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    say(right, 0.99, 1.0, "Wilson", ha="right", color=NO_WEIGHT, weight="bold")
    say(right, 0.99, 0.2, "exact", ha="right", color=MINIRL, weight="bold")
    right.set(xlabel="rate of collapse", ylabel="collapsed, of 8", xlim=(-0.02, 1.02), ylim=(-0.5, 8.5))
    right.set(xticks=[0, 0.5, 1], yticks=range(0, 9, 2))
    return figure


def verdicts() -> Figure:
    """Lesson 12: what is concluded from an interval, about "better by more than 2 points" and "equal within 2"."""
    figure, ax = diagram(3.3)
    ax = figure.add_axes((0.03, 0.17, 0.5, 0.7))
    cases = [(2.6, 6.4), (-0.9, 4.6), (0.4, 1.6), (-1.5, 1.2), (-3.4, 1.4), (-6.0, -2.7)]
    rows = ["holds", "open", "open", "open", "open", "contradicted"]
    ax.axvspan(-2, 2, color=PALE)
    ax.axvline(0, color=INK, linewidth=1)
    ax.axvline(2, color=INK, linewidth=1.6, linestyle="--")
    whole = figure.axes[0]
    for i, ((low, high), row) in enumerate(zip(cases, rows, strict=True)):
        y = 5 - i
        colour = {"holds": R3, "open": SOFT, "contradicted": NO_WEIGHT}[row]
        ax.plot([low, high], [y, y], color=colour, linewidth=3.4, solid_capstyle="butt")
        ax.plot([(low + high) / 2], [y], "o", color=colour, markersize=7)
        equal = "yes" if low > -2 and high < 2 else "no" if high < -2 or low > 2 else "cannot tell"
        height = 3.3 * (0.17 + 0.7 * (y + 0.6) / 6.2)
        say(
            whole,
            4.02,
            height,
            row,
            color=R3_INK if row == "holds" else INK if row == "open" else NO_WEIGHT,
            weight="bold",
        )
        say(whole, 5.5, height, equal)
    say(whole, 4.02, 3.05, "better by more\nthan 2 points")
    say(whole, 5.5, 3.05, "equal within\n2 points")
    ax.set(ylim=(-0.6, 5.6), xlim=(-6.6, 6.6), yticks=[], xticks=[-5, -2, 0, 2, 5])
    ax.set_xticklabels(["−5", "−2", "0", "2", "5"], size=SIZE)
    ax.set_xlabel("difference, points", size=SIZE)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "00_three_policies": three_policies,
    "00_by_hand": by_hand,
    "01_one_step": one_step,
    "01_effective_share": effective_share,
    "02_first_order": first_order,
    "02_orders": orders,
    "03_drift": drift,
    "03_estimators": estimators,
    "04_remedies": remedies,
    "04_clip_regions": clip_regions,
    "05_red_ink": red_ink,
    "05_coefficients": coefficients,
    "06_layer": layer,
    "06_router": router,
    "07_replay_timeline": replay_timeline,
    "07_who_learns": who_learns,
    "08_global_step": global_step,
    "08_entropy": entropy,
    "09_mixed_groups": mixed_groups,
    "09_slips": slips,
    "10_two_faults": two_faults,
    "10_reading_order": reading_order,
    "11_what_lives_where": what_lives_where,
    "11_two_ranks": two_ranks,
    "12_luck": luck,
    "12_verdicts": verdicts,
}
"""What is drawn: the name of the file, without .png."""


def main(names: Sequence[str]) -> None:
    """Write the named figures, or all."""
    if unknown := set(names) - set(FIGURES):
        raise SystemExit(f"no figure {', '.join(sorted(unknown))}: choose from {', '.join(FIGURES)}")
    for name in names or FIGURES:
        (HERE / f"{name}.png").write_bytes(to_png(FIGURES[name]()))


if __name__ == "__main__":
    main(sys.argv[1:])
