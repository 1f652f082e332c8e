# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The token objective: a first-order approximation
#
# The honest weight of a response is a product over its tokens, and the previous lab showed that it does not survive
# length. Practice gives every token its own ratio and adds up. This lab measures what that costs: exactly, on a toy in
# which every response is enumerated, and then in a language model.
#
# **A picture to keep: adding up percentages.** Plus 2 %, plus 1 %, minus 3 %: everybody adds, and nobody minds that the
# result is a little off. Plus 40 %, plus 30 %, minus 50 %: adding says +20 %, the truth is −9 %. Adding up percentages
# is right while they are small *and* few. The token objective adds up percentages, one per token.
#
# The derivations are in the lesson, [02_first_order.md](../lessons/02_first_order.md). Equation numbers without a dot
# are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374).

# %%
import copy
import math

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, checkout, pick
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
from minirl_edu.experiments.spec import read_runs
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import METHOD_STYLE, to_png
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def exponent(x, y):
    """The slope of log y over log x."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


# %% [markdown]
# ## 1 · Adding up percentages
#
# By hand: the ratios $\rho_t = \pi_\theta/\mu_{old} = 1 + \delta_t$ of a few tokens, their product, and what adding up
# makes of it.

# %%
rows = []
for ratios in ([1.02, 1.01, 0.97], [1.20, 0.90], [1.40, 1.30, 0.50], [1.70]):
    product, added = math.prod(ratios), 1 + sum(r - 1 for r in ratios)
    rows.append([" · ".join(map(str, ratios)), f"{product:.4f}", f"{added:.4f}", f"{product - added:+.4f}"])
show_table(["ratios", "product", "1 + Σ δ", "dropped"], rows)

# %% [markdown]
# A single token drops nothing, however large its ratio: there is no second one to multiply it with. Now many tokens, of
# which each is a little too likely or a little too unlikely, at random:

# %%
figure = Figure(figsize=(8.5, 3.0), layout="constrained")
signs = np.random.default_rng(3).choice([-1, 1], size=64)
for ax, size in zip(figure.subplots(1, 3), (0.01, 0.1, 0.3), strict=True):
    delta = size * signs
    tidy(ax).plot(range(1, 65), np.cumprod(1 + delta), color=BLUE, label="product")
    ax.plot(range(1, 65), 1 + np.cumsum(delta), color=ORANGE, linestyle="--", label="1 + Σ δ")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(title=f"each token ± {size:.0%}", xlabel="tokens so far")
figure.axes[0].set(ylabel="weight of the response", ylim=(0.5, 1.5))
figure.axes[0].legend(frameon=False, loc="lower left")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** The same luck three times. At one percent the two lines cannot be told apart. At ten they part as the
# response gets longer. At thirty they have nothing to do with each other: the sum even leaves the range of weights.

# %% [markdown]
# {exercise} 02.1
#
# Return what the first-order approximation drops of each response, $\prod_t\rho_t - (1 + \sum_t\delta_t)$, `[B]`, with
# its sign. `logp` and `logp_rollout` are `[B, T]`, `mask` is true on the tokens of the response.


# %%
def left_out(logp, logp_rollout, mask):
    # solution
    delta = torch.where(mask, logp - logp_rollout, 0.0).expm1()
    return (1 + delta).prod(1) - 1 - delta.sum(1)
    # end


check("02.1", left_out)

# %% [markdown]
# {exercise} 02.2
#
# The leading part of what is dropped is $\sum_{i<j}\delta_i\delta_j$. Return it for `delta` `[B, T]`, as `[B]`, without
# a loop over pairs.


# %%
def sum_over_pairs(delta):
    # solution
    return (delta.sum(1).square() - delta.square().sum(1)) / 2
    # end


check("02.2", sum_over_pairs)

# %% [markdown]
# ## 2 · The token objective and its gradient
#
# $$\mathcal J_{token}(\theta) = \mathbb E_{y\sim\mu_{old}}\Big[\sum_t
# \frac{\pi_\theta(y_t|\cdot)}{\mu_{old}(y_t|\cdot)}\,R(y)\Big] \tag{3}$$
#
# Its gradient can be had in two ways. By hand, one response with three tokens and reward 1: differentiate the ratio, or
# put the ratio as a constant in front of $\log\pi_\theta$.

# %%
log_mu = torch.tensor([0.5, 0.4, 0.9]).log()
logp = torch.tensor([0.5, 0.5, 0.8]).log().requires_grad_()
ratio = (logp - log_mu).exp()
for name, objective in {
    "Σ ρ                         ": ratio.sum(),
    "Σ sg[ρ]·log π               ": (ratio.detach() * logp).sum(),
    "Σ ρ·log π, nothing detached ": (ratio * logp).sum(),
    "Π ρ, the sequence weight    ": ratio.prod(),
}.items():
    (gradient,) = torch.autograd.grad(objective, logp, retain_graph=True)
    print(name, "value", f"{objective:+.3f}", "  gradient", [f"{g:+.3f}" for g in gradient.tolist()])

# %% [markdown]
# The first two agree in the gradient, token by token the ratio, and not in the value. The third is a bug that does not
# crash. The fourth gives every token the same number, the weight of the whole.
#
# Now exactly. The toy of the previous lab, a little longer: two words and a full stop, at most four tokens, reward 1
# for an odd number of ones. $\pi_\theta$ is some way from $\mu_{old}$.

# %%
LENGTH = 4
mu_old = TabularPolicy.random(3, LENGTH, seed=1)
rewards = torch.tensor([int((y[m] == 1).sum()) % 2 for y, m in zip(mu_old.tokens, mu_old.mask, strict=True)]).double()
direction = TabularPolicy.random(3, LENGTH, seed=2).logits
pi = mu_old.moved(direction, 0.5)

logits = pi.logits.clone().requires_grad_()
token_objective(TabularPolicy(logits, LENGTH), mu_old, rewards).backward()
difference = token_gradient(pi, mu_old, rewards) - logits.grad
print(f"equation (4) − autograd of (3): {difference.abs().max():.1e}")

# %% [markdown]
# What does it ask for? The lesson shows: **improve every token as if all others, before and after, were still written
# by $\mu_{old}$.** That can be computed in another way: how often $\mu_{old}$ comes to a prefix, which word
# $\pi_\theta$ would write there, and the mean reward when $\mu_{old}$ goes on from there.

# %%
joint, steps = (
    mu_old.response_probs(),
    [
        set(zip(p[m].tolist(), y[m].tolist(), strict=True))
        for p, y, m in zip(mu_old.prefix, mu_old.tokens, mu_old.mask, strict=True)
    ],
)
total = 0.0
for row, word in np.ndindex(*mu_old.logits.shape):
    here = [y for y, passed in enumerate(steps) if any(p == row for p, _ in passed)]
    onward = [y for y, passed in enumerate(steps) if (row, word) in passed]
    value = (joint[onward] * rewards[onward]).sum() / joint[onward].sum()  # the rest is μ_old's
    total += joint[here].sum() * pi.logits.softmax(-1)[row, word] * value
print(f"the others written by μ_old: {total:.10f}    J_token: {token_objective(pi, mu_old, rewards):.10f}")

# %% [markdown]
# {exercise} 02.3
#
# Return the estimate of (3) from a batch: `logp` and `logp_rollout` `[B, T]`, `rewards` `[B]`, `mask` `[B, T]`.


# %%
def estimate_of_the_token_objective(logp, logp_rollout, rewards, mask):
    # solution
    ratios = torch.where(mask, (logp - logp_rollout).exp(), 0.0)
    return (ratios.sum(1) * rewards).mean()
    # end


check("02.3", estimate_of_the_token_objective)

# %% [markdown]
# {exercise} 02.4
#
# Write a loss (a scalar to minimise) whose gradient with respect to `logp` is minus the estimate of (4). Only the
# gradient is looked at.


# %%
def loss_of_the_token_objective(logp, logp_rollout, rewards, mask):
    # solution
    weight = torch.where(mask, logp - logp_rollout, 0.0).exp().detach()
    return -(torch.where(mask, weight * logp, 0.0).sum(1) * rewards).mean()
    # end


check("02.4", loss_of_the_token_objective)

# %% [markdown]
# ## 3 · Equal gradients, different values
#
# Walk from $\mu_{old}$ along a straight line in the logits and compare the two objectives.

# %%
walk = np.linspace(-1.5, 1.5, 61)
line = [mu_old.moved(direction, step) for step in walk.tolist()]
along = {
    "J_seq": np.array([sequence_objective(p, mu_old, rewards).item() for p in line]),
    "J_token": np.array([token_objective(p, mu_old, rewards).item() for p in line]),
}
start = len(walk) // 2

figure = Figure(figsize=(8.5, 3.2), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2))
for (name, values), colour, style in zip(along.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    left.plot(walk, values, color=colour, linestyle=style, label=name)
    right.plot(walk, values - values[start], color=colour, linestyle=style, label=f"change of {name}")
for ax in (left, right):
    ax.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
    ax.set_xlabel("distance from μ_old in logits")
    ax.legend(frameon=False)
left.set_ylabel("value")
right.set_ylabel("change from the value at μ_old")
Image(to_png(figure), width=850)

# %%
length = mu_old.mask.sum(1)
gradients = [f(mu_old, mu_old, rewards) for f in (sequence_gradient, token_gradient)]
print(f"at μ_old  J_seq   = {along['J_seq'][start]:.4f}   E[R]     = {(joint * rewards).sum():.4f}")
print(f"at μ_old  J_token = {along['J_token'][start]:.4f}   E[|y|·R] = {(joint * length * rewards).sum():.4f}")
print(f"at μ_old  |∇J_seq − ∇J_token| = {(gradients[0] - gradients[1]).norm():.1e}")
print(f"with equal rewards the remainder at distance 0.5 is {objective_remainder(pi, mu_old, rewards * 0 + 1):.1e}")

# %% [markdown]
# **What to see.** Left, two curves at different heights: each token adds a 1 to the sum in (3), so $J_{token}$ counts
# tokens. That constant is in no gradient. Right, both measured from $\mu_{old}$: they touch with the same slope and
# part as one walks on. What separates them is the **remainder**. The last printed line: if all responses have the same
# reward, it is zero at any distance. It lives on differences of rewards, so a baseline does not change it.

# %% [markdown]
# ## 4 · The order of the error
#
# How fast does the remainder vanish as $\pi_\theta$ approaches $\mu_{old}$, and how fast the error of the gradient? On
# log–log paper a power is a straight line, and its exponent is the slope.

# %%
distances = np.logspace(-3, 0.5, 22)
FITTED = distances <= 0.0101


def errors_by_distance(length, seed):
    """|remainder| and the norm of the gradient's error, exactly, at every distance."""
    mu = TabularPolicy.random(3, length, seed=seed)
    way = TabularPolicy.random(3, length, seed=seed + 100).logits
    reward = torch.rand(len(mu.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for distance in distances.tolist():
        moved = mu.moved(way, distance)
        error = sequence_gradient(moved, mu, reward) - token_gradient(moved, mu, reward)
        found.append([objective_remainder(moved, mu, reward).abs().item(), error.norm().item()])
    return np.array(found).T


def order_figure(length, seeds):
    """Both errors over the distance for several random problems, and the slopes fitted to the small distances."""
    figure = Figure(figsize=(8.5, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    colours, marks = (BLUE, GREEN, ORANGE, "#CC79A7"), "osX^"
    names = ("|remainder of the objective|", "|∇J_seq − ∇J_token|")
    for seed, colour, mark in zip(seeds, colours, marks, strict=False):
        for ax, errors in zip(axes, errors_by_distance(length, seed), strict=True):
            label = f"slope {exponent(distances[FITTED], errors[FITTED]):.3f}"
            tidy(ax).plot(distances, errors, color=colour, marker=mark, markersize=4, linewidth=1, label=label)
    for ax, name, order in zip(axes, names, (2, 1), strict=True):
        ax.axvspan(distances[0], distances[FITTED][-1], color="#dfe8f2", zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="distance from μ_old in logits", ylabel=name)
        ax.set_title(f"expected: {order}", fontsize=10)
        ax.legend(frameon=False)
    return figure


SEEDS = (0, 1, 2)
Image(to_png(order_figure(5, SEEDS)), width=850)

# %%
slopes = np.array([[exponent(distances[FITTED], e[FITTED]) for e in errors_by_distance(5, s)] for s in SEEDS])
assert np.abs(slopes - [2, 1]).max() < 0.1
show_table(
    ["random problem", "objective: slope", "gradient: slope"],
    [[seed, *(f"{value:.3f}" for value in row)] for seed, row in zip(SEEDS, slopes, strict=True)],
)

# %% [markdown]
# **What to see.** Straight lines in the shaded range, where the slopes are fitted: 2 for the objective, 1 for the
# gradient, each within 0.1 (the cell would stop otherwise). To the right the lines bend, and a dip is a place where the
# remainder changes its sign: the leading order is no longer the whole story.
#
# So is the objective more trustworthy than its gradient? No. The *change* of the objective is itself proportional to
# the distance. So ten percent of deviation puts about a tenth of that change in doubt, and about a tenth of the
# gradient, both times a factor that grows with the length. An optimiser starts at $\mu_{old}$, where the gradient is
# exact. The further it goes with the same responses, the less it is.
#
# **Turn it yourself.** With a live kernel, two sliders. Does any random problem have another slope?

# %%
try:
    from ipywidgets import IntSlider, interact
except ImportError:
    print("no ipywidgets here; try order_figure(3, [7])")
else:

    @interact(
        length=IntSlider(value=3, min=2, max=6, continuous_update=False),
        seed=IntSlider(value=7, min=0, max=50, continuous_update=False),
    )
    def turn(length, seed):
        display(Image(to_png(order_figure(length, [seed])), width=850))


# %% [markdown]
# {exercise} 02.5
#
# `errors` were measured at `steps` (float64 tensors of the same length). If error = constant · step^k, what is k? Use
# all points.


# %%
def order_of(steps, errors):
    # solution
    x, y = steps.log(), errors.log()
    x = x - x.mean()
    return (x * y).sum() / x.square().sum()
    # end


check("02.5", order_of)

# %% [markdown]
# ## 5 · How the error grows with length
#
# What a single response drops, $D = \prod_t\rho_t - 1 - \sum_t\delta_t$, has mean zero. For independent tokens with
# $\mathbb E[\delta^2] = \chi^2$ the lesson finds its mean square,
#
# $$\mathbb E[D^2] = (1+\chi^2)^T - 1 - T\chi^2 \approx \tfrac{T(T-1)}{2}\chi^4,$$
#
# so its typical size is about $T\chi^2/\sqrt2$: second order in $\delta$ and *linear* in the length. Here the tokens
# are not independent: every prefix has a row of its own, and $\pi_\theta$ differs from $\mu_{old}$ at random in each.
# All responses have `LONGEST` tokens; eight random drifts.

# %%
LONGEST = pick(fast=8, full=10)


def without_end(policy):
    """The same policy, except that it never ends a response early."""
    logits = policy.logits.clone()
    logits[:, -1] = -1000.0
    return TabularPolicy(logits, LONGEST)


def words_only(way):
    return torch.cat([way[:, :-1], torch.zeros_like(way[:, -1:])], 1)


sampler = without_end(TabularPolicy.random(3, LONGEST, seed=3))
sampler_probs = sampler.response_probs()
drifts = [words_only(TabularPolicy.random(3, LONGEST, seed=seed).logits) for seed in range(10, 18)]
lengths = np.arange(2, LONGEST + 1)


def mean_size(values):
    """Over the drifts, and without the first token, [T − 1]."""
    return torch.stack(values).log().mean(0).exp()[1:].numpy()


def by_length(distance):
    """Typical |D|, typical error of a token's weight, χ² per token, and mean |remainder| for several rewards."""
    ones, at = (sampler.tokens == 1).cumsum(1), torch.arange(1, LONGEST + 1)
    judges = {
        "odd number of ones": (ones % 2).double(),
        "more ones than zeros": (2 * ones > at).double(),
        "share of ones": ones / at,
        "at least one one": (ones > 0).double(),
        "random": torch.rand(ones.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    }
    dropped, weight, chi, remainder = [], [], [], {name: [] for name in judges}
    for drift in drifts:
        rho = token_ratios(sampler.moved(drift, distance), sampler)
        product = rho.cumprod(1)
        d = product - 1 - (rho - 1).cumsum(1)
        dropped.append((sampler_probs[:, None] * d**2).sum(0).sqrt())
        weight.append((sampler_probs[:, None] * (product / rho[:, :1] - 1) ** 2).sum(0).sqrt().clamp(min=1e-12))
        chi.append((sampler_probs[:, None] * (rho - 1) ** 2).sum(0).mean())
        for name, reward in judges.items():
            remainder[name].append((sampler_probs[:, None] * d * reward).sum(0).abs().clamp(min=1e-12))
    remainders = {name: mean_size(values) for name, values in remainder.items()}
    return mean_size(dropped), mean_size(weight), torch.stack(chi).mean().item(), remainders


measured = {distance: by_length(distance) for distance in (0.03, 0.1, 0.3, 1.0)}

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2))
marks = dict(zip(measured, zip("osX^", (BLUE, GREEN, "#E69F00", ORANGE), strict=True), strict=True))
for distance, (dropped, weight, chi, _) in measured.items():
    mark, colour = marks[distance]
    style = dict(color=colour, marker=mark, linestyle="none", markersize=5)
    left.plot(lengths, dropped, label=f"{distance:g}", **style)
    left.plot(lengths, np.sqrt((1 + chi) ** lengths - 1 - lengths * chi), color=colour, linewidth=1)
    right.plot(lengths, weight, **style)
    right.plot(lengths, np.sqrt((1 + chi) ** (lengths - 1) - 1), color=colour, linewidth=1)
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="tokens in the response")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
left.set(ylabel="typical size of what is dropped, D", ylim=(None, 40))
left.legend(title="distance in logits", frameon=False, ncols=4, fontsize=9, loc="upper left")
right.set(ylabel="typical error of a token's weight")
Image(to_png(figure), width=850)

# %%
upper = lengths >= lengths[len(lengths) // 2]
rows = []
for distance, (dropped, weight, chi, _) in measured.items():
    fits = [exponent(lengths[upper], values[upper]) for values in (dropped, weight)]
    rows.append([distance, f"{chi:.5f}", f"{dropped[-1]:.4f}", *(f"{fit:.2f}" for fit in fits)])
header = ["distance", "χ² per token", f"typical D at {LONGEST} tokens"]
show_table([*header, "D: exponent in the length", "token's weight: exponent in the length"], rows)
near = [distance for distance in measured if distance <= 0.1]
in_distance = [exponent(near, [measured[d][i][-1] for d in near]) for i in (0, 1)]
print(f"exponents in the distance, {near}: D {in_distance[0]:.2f}, token's weight {in_distance[1]:.2f}")
exact_pairs = exponent(lengths[upper], np.sqrt(lengths * (lengths - 1) / 2)[upper])
print(f"exponent of the square root of T(T − 1)/2 over the same lengths: {exact_pairs:.2f}")

# %% [markdown]
# **What to see.** Points: enumerated. Lines: the formulas for independent tokens with the same mean $\chi^2$; they are
# no fit. Left, what is dropped grows faster than the length here, for two reasons: $\sqrt{T(T-1)/2}$ does at so few
# tokens (last printed line), and the first tokens of this policy happen to differ less than the later ones, so the
# points start below the line. At the largest distance the exponential sets in. Right, the error of the weight that (4)
# gives to a token grows more slowly, about like the square root of the length, with the same two qualifications. In the
# distance the exponents are 2 and 1 again.
#
# **And the remainder itself?** It is the *average* of $D\cdot R$, so it depends on the judge:

# %%
average, (dropped, *_rest) = measured[0.1][3], measured[0.1]
show_table(
    ["reward", *(f"{T} tokens" for T in lengths[::2]), "exponent in the length"],
    [
        [name, *(f"{value:.1e}" for value in values[::2]), f"{exponent(lengths[1:], values[1:]):+.1f}"]
        for name, values in [*average.items(), ("typical size of D, for comparison", dropped)]
    ],
)

# %% [markdown]
# **What to see.** Remainders are far smaller than the typical $D$, because positive and negative $D$ cancel, and they
# follow no one law: with some judges they grow with the length, with others they shrink. "The error grows with the
# length" is a statement about what *can* go wrong, reached by a reward that has the sign of $D$. That is why the
# library logs the size of $D$ and not an average with signs.

# %% [markdown]
# {exercise} 02.6
#
# Tokens are independent, each with $\mathbb E[\delta] = 0$ and $\mathbb E[\delta^2] =$ `chi_square`. Return
# $\mathbb E[D^2]$ for responses of `length` tokens, exactly.


# %%
def mean_square_left_out(chi_square, length):
    # solution
    return (1 + chi_square) ** length - 1 - length * chi_square
    # end


check("02.6", mean_square_left_out)

# %% [markdown]
# ## 6 · Two factors, one ratio
#
# $$\frac{\pi_\theta}{\mu_{old}} \;=\; \underbrace{\frac{\pi_{old}}{\mu_{old}}}_{\text{discrepancy}}\times
# \underbrace{\frac{\pi_\theta}{\pi_{old}}}_{\text{staleness}} \tag{5}$$
#
# By hand: the engine drew a token with probability 0.40, the trainer found 0.50 at the same weights, and after an
# update 0.55.

# %%
print(
    f"discrepancy {0.50 / 0.40:.3f} × staleness {0.55 / 0.50:.3f} = {0.50 / 0.40 * 0.55 / 0.50:.3f} = {0.55 / 0.40:.3f}"
)

# %% [markdown]
# In the toy: $\pi_{old}$ is fixed; the engine's errors move $\mu_{old}$ away in one random direction, updates move
# $\pi_\theta$ away in another. The error of the gradient, relative to the exact one, for every pair of distances:

# %%
pi_old = mu_old
engine_error = TabularPolicy.random(3, LENGTH, seed=7).logits
sizes = [0.0, 0.01, 0.03, 0.1, 0.3, 1.0]
error = np.zeros((len(sizes), len(sizes)))
for i, discrepancy in enumerate(sizes):
    for j, staleness in enumerate(sizes):
        engine, target = pi_old.moved(engine_error, discrepancy), pi_old.moved(direction, staleness)
        exact = sequence_gradient(target, engine, rewards)
        error[i, j] = (token_gradient(target, engine, rewards) - exact).norm() / exact.norm()

figure = Figure(figsize=(6.6, 3.7), layout="constrained")
ax = figure.subplots()
image = ax.imshow(np.log10(np.maximum(error, 1e-3)), cmap="cividis", origin="lower", aspect="auto")
for i, j in np.ndindex(*error.shape):
    dark = error[i, j] < 0.05
    text = "0" if error[i, j] < 1e-12 else f"{error[i, j]:.1%}"
    ax.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
ax.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
ax.set_yticks(range(len(sizes)), [f"{size:g}" for size in sizes])
ax.set(xlabel="staleness: updates, distance in logits", ylabel="discrepancy: engine")
ax.set_title("error of the token gradient, relative", fontsize=11)
Image(to_png(figure), width=660)

# %% [markdown]
# **What to see.** The gradient is good only in the corner at the lower left, where *both* are small. Along the bottom
# row the engines agree, and many updates alone spoil it; along the first column there was no update, and a bad engine
# alone spoils it. The larger of the two decides, nearly (two errors in different directions can also cancel a little):
# shrinking the smaller one further buys nothing. Keep that in mind for all remedies to come: each works on one factor.

# %% [markdown]
# {exercise} 02.7
#
# Return the two factors of (5) token by token, discrepancy first, from the three log-probabilities `[B, T]`.


# %%
def both_factors(logp, logp_old, logp_rollout):
    # solution
    return (logp_old - logp_rollout).exp(), (logp - logp_old).exp()
    # end


check("02.7", both_factors)

# %% [markdown]
# ## 7 · The gap in a language model
#
# With samples, the typical $D$ is the library's `first_order_gap`: the mean of $|D|$ over responses. By hand, then for
# the tiny Mixture-of-Experts model: engines from 8 to 3 bits (first factor), and four updates with the mini-batches of
# one rollout (second factor).

# %%
log_ratio = torch.tensor([[1.2, 0.9, 1.0], [1.7, 1.0, 1.0]]).log()
mask = torch.tensor([[True, True, False], [True, False, False]])
print(f"mean of |1.2·0.9 − (1 + 0.2 − 0.1)| and 0: {first_order_gap(log_ratio, torch.zeros(2, 3), mask):.4f}")

# %%
GROUP_SIZE, UPDATES = 8, 4
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
problems = task.sample(pick(fast=64, full=256), seed=0)
prompts = [task.encode(problem) for problem in problems]
sampling, share_prompts = Sampling(max_new_tokens=task.max_new_tokens), can_share_prompts(model)
ENGINES = [
    ("fp32", "nearest"),
    ("fp8_e4m3", "nearest"),
    ("int4", "nearest"),
    ("int4", "stochastic"),
    ("int3", "stochastic"),
]
rollouts = {
    f"{bits}, {rounding}" if bits != "fp32" else bits: HFEngine(model, Precision.parse(bits, rounding)).generate(
        prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0
    )
    for bits, rounding in ENGINES
}


def logp_of(policy, rollout):
    return response_logprobs(policy, lay_out(rollout, share_prompts=share_prompts)).logp


@torch.no_grad()
def readings(policy):
    """For every engine: the gap, and the KL of the two policies per response, nats."""
    found = []
    for rollout in rollouts.values():
        logp, mask = logp_of(policy, rollout), rollout.response_mask
        tokens = mask.sum() / len(mask)
        kl = kl_k3(rollout.logp_rollout, logp, mask) * tokens
        found.append([first_order_gap(logp, rollout.logp_rollout, mask).item(), kl.item()])
    return found


# Four mini-batches of the fp32 engine's rollout, an update with each.
rollout = rollouts["fp32"]
asked = [problem for problem in problems for _ in range(GROUP_SIZE)]
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
scores = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages = group_mean_advantages(scores, GROUP_SIZE)
with torch.no_grad():
    logp_old = logp_of(model, rollout)
policy = copy.deepcopy(model)
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)
history = [readings(policy)]
for part in torch.arange(len(asked)).chunk(UPDATES):
    in_part = torch.zeros(len(asked), 1, dtype=torch.bool).index_fill(0, part, True)
    logp = logp_of(policy, rollout)
    mask = rollout.response_mask & in_part
    loss = minirl_loss(logp, logp_old, rollout.logp_rollout, advantages, mask, num_responses=len(part)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(readings(policy))
history = np.array(history)  # [updates + 1, engines, (gap, KL)]

# %%
show_table(
    ["engine", *(f"gap after {n} updates" for n in range(UPDATES + 1))],
    [[name, *(f"{gap:.1e}" for gap in history[:, i, 0])] for i, name in enumerate(rollouts)],
)

# %%
figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2))
looks = zip("oDsX^", (GREY, "#56B4E9", BLUE, "#E69F00", ORANGE), ("-", "--", "-.", ":", "-"), strict=True)
for (i, name), (mark, colour, style) in zip(enumerate(rollouts), looks, strict=True):
    shown = history[:, i, 0] > 1e-8
    left.plot(
        np.arange(UPDATES + 1)[shown], history[shown, i, 0], marker=mark, color=colour, linestyle=style, label=name
    )
    right.plot(history[shown, i, 1], history[shown, i, 0], marker=mark, color=colour, linestyle="none")
left.set(yscale="log", xlabel="updates with one rollout", ylabel="first-order gap", xticks=range(UPDATES + 1))
left.legend(frameon=False, fontsize=8)
low, high = history[history[..., 1] > 1e-8][:, 1].min(), history[..., 1].max()
right.plot([low, high], [low, high], color="black", linewidth=1, linestyle=":", label="gap = KL")
right.set(xscale="log", yscale="log", xlabel="KL per response, nats", ylabel="first-order gap")
right.legend(frameon=False)
Image(to_png(figure), width=850)

# %%
points = history.reshape(-1, 2)
points = points[points[:, 1] > 1e-8]
print(f"exponent of the gap in the KL, over all points: {exponent(points[:, 1], points[:, 0]):.2f}")

# %% [markdown]
# **What to see.** Left, before the first update the gap is the engine's alone, and it grows over orders of magnitude
# from 8 bits to 3 (in fp32 there is none, so the first point is missing). Then updates raise it, in one optimiser's
# step by more than the good engines' rounding had: from there on these engines are alike, and only the worst one stands
# out. The larger factor decides, as in the toy. Right, gap against KL: both are of second order in $\delta$ and grow
# with the length, so over many decades the points keep near a line of slope one, on the dotted one or below it. The
# fitted exponent is a little under one, because at the largest KLs $\delta$ is no longer small. The gap is the KL in
# another unit, the weight of a response.
#
# **In training runs.** The repository holds the reproduction's runs, several seeds for each method, with the gap of
# every update. Each dot is the median over one run:

# %%
METHODS = {"minirl": "MiniRL", "r2": "R2", "r3": "R3", "r3_no_clip": "R3, no clipping"}
SETTINGS = {"on_policy": "on-policy", "n2": "N = 2", "n4": "N = 4", "n8": "N = 8"}
runs = checkout() / "lessons" / "results" / "runs" / "full"
median = {}
for setting in SETTINGS:
    stored = read_runs(runs / setting)
    for variant in METHODS:
        seeds = [run.metrics["first_order_gap"] for run in stored.get(variant, {}).values()]
        if len(seeds) >= 3:
            median[setting, variant] = np.array([np.nanmedian(gaps) for gaps in seeds])

figure = Figure(figsize=(8.5, 3.3), layout="constrained")
ax = tidy(figure.subplots())
for k, (variant, name) in enumerate(METHODS.items()):
    look = {key: METHOD_STYLE[name][key] for key in ("color", "marker")}
    label = name
    for x, setting in enumerate(SETTINGS):
        if (setting, variant) in median:
            dots = median[setting, variant]
            at = x + 0.18 * (k - 1.5)
            ax.plot(np.full(len(dots), at), dots, linestyle="none", markersize=5, alpha=0.75, label=label, **look)
            ax.hlines(dots.mean(), at - 0.07, at + 0.07, color="black", linewidth=1.5)
            label = None
ax.set(yscale="log", ylabel="first-order gap, median of a run")
ax.set_xticks(range(len(SETTINGS)), SETTINGS.values())
ax.legend(frameon=False, ncols=2, fontsize=9)
Image(to_png(figure), width=850)


# %%
def in_words(dots):
    return "" if dots is None else f"{dots.mean():.3f} ± {dots.std(ddof=1):.3f} ({len(dots)})"


show_table(
    ["gap ± deviation (seeds)", *SETTINGS.values()],
    [[name, *(in_words(median.get((s, variant))) for s in SETTINGS)] for variant, name in METHODS.items()],
)

# %% [markdown]
# **What to see.** A black dash is the mean of its dots. Read MiniRL's row from left to right: the gap does *not* rise
# much from on-policy to $N = 8$. The engine of these runs rounds to four bits at random, so the discrepancy is the
# larger factor, and re-using responses adds little to it. R3 works on that factor, clipping on the other; compare their
# rows with the neighbours', and mind the spread over seeds. These are runs of a small model on an easy task, and a
# smaller gap is not by itself a better score: [CLAIMS.md](../lessons/results/CLAIMS.md) says what came of the paper's
# claims.
#
# **Try this**
#
# 1. In section 3 choose a reward of 1 for every response. What happens to the right panel, and why?
# 2. In section 6 let the engine's error point in the same direction as the update (`engine_error = -direction`). Where
#    does the error of the gradient vanish now?
# 3. In section 7 use `lr=1e-4` and `lr=1e-3`. By (02.10), by what factor should the gap of the fp32 engine change?
