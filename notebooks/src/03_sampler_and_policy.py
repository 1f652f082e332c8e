# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Is your sampler your policy?
#
# The lab of [lesson 03](../lessons/03_sampler_and_policy.md). An inference engine samples, a training engine learns,
# and both hold the same weights. This page measures how far apart they are, weights each token so that the difference
# drops out of the expectation, sees what happens without the weight, pays for the weight with as little noise as
# possible, and finds out when leaving it out collapses and when it costs nothing.
#
# **A picture to keep: one recipe, two stoves.** The recipe is the weights. The restaurant cooks on a fast gas stove
# with nine marks on its dial: that is the sampler. The test kitchen, where the recipe is rewritten from the guests'
# verdicts, has a slow stove that holds any temperature: that is the trainer. The recipe is the same. The dishes are
# not.
#
# You need lessons 01 and 02, or to know what $\nabla\log\pi$ and an importance weight are.

# %%
import functools
import math

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu import exact
from minirl_edu.course import check, checkout, pick
from minirl_edu.diagnostics import kl_k1, kl_k3, mean_interval, token_ess
from minirl_edu.experiments.spec import load_spec, read_runs
from minirl_edu.experiments.statistics import paired_difference, summary
from minirl_edu.experiments.systematic import error_parts
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import four_curves, to_png
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask
from minirl_edu.worlds.simulations import VARIANTS, WORLDS, doomed_tails, doomed_tails_border

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def tidy(ax, title, xlabel, ylabel):
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)


# %% [markdown]
# ## 1 · One recipe, two stoves
#
# The smallest engine there is: one hidden vector, four tokens, a weight matrix of four rows. The trainer multiplies in
# full precision. The sampler's matrix is rounded to 4-bit integers, one scale for each row. Same weights, and yet:

# %%
weights = torch.tensor([[0.90, -0.31, 0.44], [0.22, 0.75, -0.16], [-0.48, 0.10, 0.83], [0.05, -0.62, 0.29]])
hidden = torch.tensor([1.4, -0.8, 1.1])

pi_row = (weights @ hidden).softmax(0)
mu_row = (quantise(weights, "int4") @ hidden).softmax(0)
show_table(
    ["token", "π_old, trainer", "μ_old, sampler", "weight π_old/μ_old"],
    [[f"`{name}`", f"{p:.4f}", f"{m:.4f}", f"{p / m:.3f}"] for name, p, m in zip("abcd", pi_row, mu_row, strict=True)],
)

# %% [markdown]
# The last column is the **importance weight** of a token. Above 1: the sampler draws this token more rarely than the
# trainer would, so each time it turns up it should count for more. Averaged over what the sampler draws, the weight is
# exactly 1, and a weighted mean over the sampler's tokens is the plain mean over the trainer's, whatever is averaged:

# %%
anything = torch.tensor([3.0, -1.0, 0.5, 10.0])
print(f"mean weight under the sampler        {(mu_row * pi_row / mu_row).sum():.6f}")
print(f"mean of `anything` under the trainer {(pi_row * anything).sum():.6f}")
print(f"weighted mean under the sampler      {(mu_row * (pi_row / mu_row) * anything).sum():.6f}")
print(f"plain mean under the sampler         {(mu_row * anything).sum():.6f}")

# %% [markdown]
# After some updates there is a third policy, $\pi_\theta$, and the weight that is wanted is that of the policy which is
# being trained. It splits into the two stoves and the rewriting of the recipe:
#
# $$\frac{\pi_\theta}{\mu_{old}} = \underbrace{\frac{\pi_{old}}{\mu_{old}}}_{\text{discrepancy}}\times
# \underbrace{\frac{\pi_\theta}{\pi_{old}}}_{\text{staleness}} \tag{5}$$
#
# This lab is about the first factor. On-policy, with one update per rollout, it is the only one.

# %% [markdown]
# ## 2 · Three estimators of one KL
#
# One number for the distance between the stoves is $KL(\mu_{old}\|\pi_{old})$, in nats per token. Nobody sums over the
# vocabulary for it: the two log-probabilities of the tokens that were *drawn* suffice. With $r = \pi_{old}/\mu_{old}$,
#
# $$k_1 = -\log r,\qquad k_2 = \tfrac12(\log r)^2,\qquad k_3 = r - 1 - \log r.$$
#
# Exact expectations on the four tokens above. In the last two columns the wrong ratio, and the wrong sampler:

# %%
r = pi_row / mu_row
estimators = {"k1": lambda r: -r.log(), "k2": lambda r: r.log() ** 2 / 2, "k3": lambda r: r - 1 - r.log()}
print(f"KL(μ_old ‖ π_old) = {(mu_row * (mu_row / pi_row).log()).sum():.6f} nats")
print(f"KL(π_old ‖ μ_old) = {(pi_row * (pi_row / mu_row).log()).sum():.6f} nats")
show_table(
    ["", "mean under μ_old", "smallest term", "with r upside down", "tokens drawn by π_old"],
    [
        [name, f"{(mu_row * k(r)).sum():.6f}", f"{k(r).min():+.4f}", f"{(mu_row * k(1 / r)).sum():+.6f}",
         f"{(pi_row * k(r)).sum():+.6f}"]
        for name, k in estimators.items()
    ],
)  # fmt: skip

# %% [markdown]
# $k_1$ and $k_3$ have the KL as their mean, $k_2$ misses it a little. $k_3$ is never negative. Upside down, or on
# tokens that the trainer drew, none of the three is the KL we asked for: $k_1$ then even comes out negative, and $k_3$
# gives a plausible positive number, which is worse.
#
# Why two unbiased estimators? Because of their noise. Below, one vocabulary of 64 tokens, and a sampler whose logits
# are off by a normally distributed error, from small to large. The noise of an average over 2,000 tokens is computed
# exactly, not sampled.


# %%
def noise_table(sizes, vocabulary=64, tokens=2000, seed=0):
    """KL, and for each estimator its bias and the standard error of a mean over `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    error = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    rows = []
    for size in sizes:
        pi, mu = logits.softmax(0), (logits + size * error).softmax(0)
        row = {"kl": float((mu * (mu / pi).log()).sum())}
        for name, k in estimators.items():
            values = k(pi / mu)
            mean = (mu * values).sum()
            row[name] = float(((mu * (values - mean).square()).sum() / tokens).sqrt())
            row[f"{name} bias"] = float(mean) - row["kl"]
        rows.append(row)
    return rows


noise = noise_table(np.geomspace(0.003, 2.0, 25))

figure = Figure(figsize=(9.5, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
log_r = np.linspace(-2, 2, 201)
lines = {"k1": (BLUE, "-"), "k2": (GREY, ":"), "k3": (ORANGE, "--")}
for name, (colour, style) in lines.items():
    left.plot(log_r, estimators[name](torch.tensor(log_r).exp()), color=colour, linestyle=style, label=name)
    kl = np.array([row["kl"] for row in noise])
    right.plot(kl, [row[name] / row["kl"] for row in noise], color=colour, linestyle=style, label=name)
left.axhline(0, color="#cccccc", linewidth=0.8)
tidy(left, "one token", "log r = log π_old − log μ_old, nats", "value, nats")
left.legend(frameon=False)
right.set(xscale="log", yscale="log")
right.axhline(1, color="#cccccc", linewidth=0.8)
right.text(kl[-1], 1.15, "noise = signal", ha="right", fontsize=9, color=GREY)
tidy(right, "mean over 2,000 tokens", "KL(μ_old ‖ π_old), nats per token", "standard error ÷ KL")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left: $k_1$ is a straight line through zero and half of its values are negative; $k_3$ touches zero
# and hugs $k_2$ around it. For large $\log r$ it leaves $k_2$ and shoots up: it contains $r$ itself. Right: the closer
# the engines, the more the noise of $k_1$ exceeds the number it estimates, because its variance is about twice the KL.
# The relative noise of $k_3$ stays where it is. Far to the right the order turns: where ratios are large, $k_3$ is the
# noisier of the two unbiased ones.
#
# The paper plots $k_1$. In our runs it often dips below zero, and then the curve of $k_3$ is the one to read.

# %% [markdown]
# {exercise} 03.1
# Write $k_3$ as a training loop needs it: from `[B, T]` log-probabilities of the drawn tokens under the two engines and
# a mask that is true on response tokens. Return the mean over all response tokens of the batch. What stands outside the
# mask may be anything, NaN included.


# %%
def k3_per_token(logp_rollout, logp_old, mask):
    # solution
    log_ratio = (logp_old - logp_rollout)[mask]
    return (log_ratio.exp() - 1 - log_ratio).mean()
    # end


check("03.1", k3_per_token)

# %% [markdown]
# {exercise} 03.2
# Return a dictionary: for each purpose one of `"k1"`, `"k2"`, `"k3"` or `"none"`, with $r = \pi_{old}/\mu_{old}$ and
# $KL(\mu_{old}\|\pi_{old})$ as what is wanted:
#
# * `never negative and unbiased`: no term is negative, and its mean under $\mu_{old}$ is the KL;
# * `never negative but biased`;
# * `survives a huge ratio`: unbiased, and one token that the trainer finds a thousand times likelier does not swamp it;
# * `drawn by the trainer`: the tokens at hand were drawn by $\pi_{old}$; which mean over them is the KL wanted?


# %%
def chosen_estimators():
    # solution
    return {
        "never negative and unbiased": "k3",
        "never negative but biased": "k2",
        "survives a huge ratio": "k1",
        "drawn by the trainer": "none",
    }
    # end


check("03.2", chosen_estimators)

# %% [markdown]
# ## 3 · What the weight repairs, and what happens without it
#
# Responses of up to three tokens over a vocabulary of four, end token included, can all be written down, so
# expectations are finite sums and nothing below is sampled. The sampler is the trainer's policy with an error added to
# its logits. On 20 random problems and errors we compare three gradients with the one that is wanted, $\nabla J$ of the
# *trainer's* policy: with sequence weights, equation (2); with token weights, (4); with no weight at all. Rewards have
# the mean of the sampler's subtracted, as in a group.

# %%
PROBLEMS = 20


def problem(seed, size):
    """A trainer's policy, an error of the sampler's logits, and rewards, 1 for a quarter of the responses."""
    generator = torch.Generator().manual_seed(1000 + seed)
    policy = exact.TabularPolicy.random(4, 3, seed=seed)
    rewards = (torch.rand(len(policy.tokens), generator=generator, dtype=torch.float64) < 0.25).double()
    error = size * torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
    return policy, error, rewards


def gradient_without_weight(pi, mu, rewards):
    """E_{y~μ}[ R(y) ∇log π(y) ]: the sampler's tokens taken as if the trainer had drawn them."""
    return pi.score_sum((mu.response_probs() * rewards)[:, None].expand(pi.mask.shape))


GRADIENTS = {
    "sequence weight": exact.sequence_gradient,
    "token weight": exact.token_gradient,
    "no weight": gradient_without_weight,
}


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def compare_gradients(size):
    """Cosines with the trainer's own policy gradient, and with the sampler's, over the problems."""
    found = {name: [] for name in GRADIENTS}
    for seed in range(PROBLEMS):
        pi, error, rewards = problem(seed, size)
        mu = pi.moved(error)
        advantages = rewards - (mu.response_probs() * rewards).sum()
        of_trainer, of_sampler = (gradient_without_weight(policy, policy, rewards) for policy in (pi, mu))
        for name, gradient in GRADIENTS.items():
            g = gradient(pi, mu, advantages)
            found[name].append((cosine(g, of_trainer), cosine(g, of_sampler)))
    return {name: np.array(values).T for name, values in found.items()}


sizes = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
cosines = [compare_gradients(size) for size in sizes]

figure = Figure(figsize=(9.5, 3.8), layout="constrained")
axes = figure.subplots(1, 2, sharey=True)
looks = {"sequence weight": (GREEN, ":", "^"), "token weight": (BLUE, "-", "o"), "no weight": (ORANGE, "--", "X")}
for ax, which, whose in zip(axes, (0, 1), ("the trainer's", "the sampler's"), strict=True):
    for name, (colour, style, marker) in looks.items():
        mean, half = mean_interval(np.array([row[name][which] for row in cosines]).T)
        ax.plot(sizes, mean, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
        ax.fill_between(sizes, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    tidy(ax, f"against {whose} policy gradient", "error of the sampler's logits", "cosine")
axes[0].legend(frameon=False)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left: with sequence weights the direction is exact, however bad the sampler; with token weights it
# drifts off (that is lesson 02's remainder); without weights it drifts further. Right: the same gradients measured
# against *another* target, the gradient that improves the **sampler's** policy. There the order is reversed. Leaving
# the weight out does not make the gradient wrong at random: on these short responses it makes it nearly right for the
# other stove. With a baseline for every prefix instead of one mean it is exactly that gradient, as the lesson proves.
# What one mean leaves over is small here. In section 7 it is not. The bands are 95 % intervals over problems, which
# differ a lot; the methods met the same ones.
#
# Now train. Each policy takes 60 exact gradient steps on its advantages. Either the sampler's error stays **the same**
# at every sync (a stove that always runs hot), or it is **drawn anew** (a flame that flickers).


# %%
def train_exactly(method, *, fixed, size=1.5, steps=60, rate=1.0):
    """Expected reward under the trainer's and the sampler's policy, [problems, steps] each."""
    curves = []
    for seed in range(PROBLEMS):
        pi, error, rewards = problem(seed, size)
        generator = torch.Generator().manual_seed(seed)
        path = []
        for _ in range(steps):
            if not fixed:
                error = size * torch.randn(error.shape, generator=generator, dtype=torch.float64)
            mu = pi.moved(error)
            expected = [float((policy.response_probs() * rewards).sum()) for policy in (pi, mu)]
            path.append(expected)
            pi = pi.moved(GRADIENTS[method](pi, mu, rewards - expected[1]), rate)
        curves.append(path)
    return np.array(curves).transpose(2, 0, 1)


trained = {
    (method, fixed): train_exactly(method, fixed=fixed)
    for method in ("token weight", "no weight")
    for fixed in (True, False)
}

figure = Figure(figsize=(9.5, 6.4), layout="constrained")
for row, fixed in zip(figure.subplots(2, 2, sharex=True, sharey=True), (True, False), strict=True):
    for ax, which, whose in zip(row, (0, 1), ("trainer", "sampler"), strict=True):
        for method in ("token weight", "no weight"):
            colour, style, _ = looks[method]
            mean, half = mean_interval(trained[method, fixed][which])
            ax.plot(mean, color=colour, linestyle=style, label=method)
            ax.fill_between(range(len(mean)), mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        title = f"{'the same error at every sync' if fixed else 'a new error at every sync'}: {whose}"
        tidy(ax, title, "exact gradient step", "expected reward")
figure.axes[0].legend(frameon=False, loc="lower right")
Image(to_png(figure), width=850)

# %%
rows = []
for fixed in (True, False):
    for which, whose in ((0, "trainer"), (1, "sampler")):
        for step in (20, 59):
            gap = paired_difference(*(trained[m, fixed][which][:, step] for m in ("no weight", "token weight")))
            kind = "the same" if fixed else "drawn anew"
            rows.append(
                [kind, whose, step, f"{100 * gap.estimate:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"]
            )
show_table(["error", "reward of the", "step", "no weight − token weight, points (95 %)"], rows)

# %% [markdown]
# **What to see.** Top: with an error that comes back, training without the weight serves the sampler. Its dishes come
# out a little better on the restaurant's stove, and much worse in the test kitchen: the recipe now makes up for a stove
# that the test kitchen does not have. Bottom: with an error that is drawn anew there is nothing to make up for. Without
# the weight the trainer's policy is slower at first, and in the end the difference is gone. The table gives the
# differences with their spread over problems.
#
# There is no sampling noise in these runs. They show the bias that a missing weight brings, and nothing of what a
# weight costs. That is the next section.

# %% [markdown]
# {exercise} 03.3
# The bias by enumeration, for responses of a single token. From `logits` of the trainer's policy, probabilities `mu` of
# the sampler and `rewards`, all `[V]`, return a `[2, V]` tensor of gradients with respect to the logits, to be
# *ascended*: first $\mathbb E_\mu[\tfrac{\pi}{\mu}\,R\,\nabla\log\pi]$, then $\mathbb E_\mu[R\,\nabla\log\pi]$.


# %%
def gradients_with_and_without(logits, mu, rewards):
    # solution
    pi = logits.softmax(0)
    scores = torch.eye(len(pi), dtype=pi.dtype) - pi  # row y: ∇ log π(y)
    return torch.stack([(mu * (pi / mu) * rewards) @ scores, (mu * rewards) @ scores])
    # end


check("03.3", gradients_with_and_without)

# %% [markdown]
# ## 4 · The cap: a little bias for a lot of variance
#
# A weight can be huge: a token that the sampler drew with probability 0.001 and the trainer would draw with 0.1 counts
# as a hundred. MiniRL truncates: $\min(\pi_\theta/\mu_{old},\,5)$. That makes the estimate biased and far less noisy.
# Below, exactly: one vocabulary of 64 tokens, a coarse sampler, rewards 0 or 1, and the error of the weighted mean
# reward of $n$ draws as a function of the cap.


# %%
def cap_tradeoff(caps, *, size=1.6, vocabulary=64, seed=3):
    """Bias and standard deviation of one draw of min(w, cap) · R, and the largest weight."""
    generator = torch.Generator().manual_seed(seed)
    logits, error = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    pi, mu = (1.5 * logits).softmax(0), (1.5 * logits + size * error).softmax(0)
    rewards = (torch.rand(vocabulary, generator=generator) < 0.5).double()
    bias, spread = [], []
    for cap in caps:
        x = (pi / mu).clamp(max=cap) * rewards
        mean = (mu * x).sum()
        bias.append(float(mean - (pi * rewards).sum()))
        spread.append(float((mu * (x - mean).square()).sum().sqrt()))
    return np.array(bias), np.array(spread), float((pi / mu).max())


caps = np.geomspace(0.5, 200, 100)
bias, spread, largest = cap_tradeoff(caps)

figure = Figure(figsize=(9.5, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(caps, -bias, color=ORANGE, linestyle="--", label="−bias")
left.plot(caps, spread, color=BLUE, label="standard deviation of one draw")
left.set(xscale="log")
left.legend(frameon=False)
tidy(left, "what the cap costs and saves", "cap", "in units of the reward")
best_caps = {}
for n, colour, style in ((16, BLUE, "-"), (256, ORANGE, "--"), (4096, GREEN, ":")):
    rmse = np.sqrt(bias**2 + spread**2 / n)
    best_caps[n] = caps[rmse.argmin()]
    right.plot(caps, rmse, color=colour, linestyle=style, label=f"n = {n}")
    right.plot(best_caps[n], rmse.min(), marker="o", color=colour)
right.set(xscale="log", yscale="log")
right.legend(frameon=False)
tidy(right, "error of the mean of n draws (dot: the best cap)", "cap", "root mean square error")
for ax in (left, right):
    ax.axvline(5, color="#cccccc", linewidth=0.8)
    ax.set_xticks([0.5, 1, 2, 5, 10, 50, 200], ["0.5", "1", "2", "5", "10", "50", "200"])
    ax.minorticks_off()
right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
Image(to_png(figure), width=850)

# %%
print(f"largest weight here: {largest:.1f}")
for n, cap in best_caps.items():
    print(f"n = {n:4d}: the best cap is {cap:.1f}{' (no weight reaches it)' if cap > largest else ''}")

# %% [markdown]
# **What to see.** Left: the bias vanishes as the cap rises, the standard deviation grows until no weight reaches the
# cap. Right: the more draws, the higher the best cap, because averaging removes noise and not bias. 5 (thin line) is
# one compromise, not a constant of nature.
#
# **Effective sample size** says the same in draws: $(\sum w)^2/(n\sum w^2)$, the share of the tokens that the average
# really rests on. It equals 1 over the mean squared weight when there are many tokens:

# %%
counts = torch.tensor([40, 40, 19, 1])  # how often 100 draws of the sampler show each of four tokens
mu_counts, pi_counts = counts / 100, torch.tensor([0.40, 0.35, 0.05, 0.20])
drawn = torch.arange(4).repeat_interleave(counts)[None]
everywhere = torch.ones_like(drawn).bool()
for cap in (math.inf, 5.0):
    w = (pi_counts / mu_counts).clamp(max=cap)
    ess = token_ess(w.log()[drawn], torch.zeros(1, 100), everywhere)
    print(f"cap {cap:>4}: largest weight {w.max():5.1f}, effective sample size {ess:.2f} of 1")

# %% [markdown]
# One token in a hundred, and most of the sample is gone: the average rests on that token. The cap brings the sample
# back.
#
# **Which quantity is capped?** The paper caps the *product* $\pi_\theta/\mu_{old}$. A look-alike caps the discrepancy
# $\pi_{old}/\mu_{old}$ alone and multiplies by the staleness $\pi_\theta/\pi_{old}$ afterwards. On four tokens:

# %%
discrepancy = torch.tensor([[8.0, 8.0, 4.0, 0.5]])
staleness = torch.tensor([[1.2, 0.5, 1.8, 1.1]])
paper = (discrepancy * staleness).clamp(max=5)
look_alike = discrepancy.clamp(max=5) * staleness

logp = torch.full((1, 4), -3.0, requires_grad=True)
logp_old, logp_rollout = logp - staleness.log(), logp - (discrepancy * staleness).log()
minirl_loss(logp, logp_old, logp_rollout, torch.ones(1), torch.ones(1, 4), clip=False).loss.backward()
torch.testing.assert_close(-logp.grad, paper)
show_table(
    ["token", "discrepancy", "staleness", "product", "MiniRL", "look-alike"],
    [
        [t + 1, *(f"{x[0, t]:.2f}" for x in (discrepancy, staleness, discrepancy * staleness, paper, look_alike))]
        for t in range(4)
    ],
)  # fmt: skip

# %% [markdown]
# The first and the third token pass 5 under the look-alike; the second loses weight although its product is small. It
# is $\min(\pi_\theta/\mu_{old},\ 5\,\pi_\theta/\pi_{old})$: a cap that moves with the staleness.

# %% [markdown]
# {exercise} 03.4
# The weight of MiniRL, `[B, T]`, as it enters the loss. `logp` arrives with `requires_grad`.


# %%
def capped_weight(logp, logp_old, logp_rollout, cap):
    # solution
    return (logp - logp_rollout).detach().exp().clamp(max=cap)
    # end


check("03.4", capped_weight)

# %% [markdown]
# {exercise} 03.5
# Make the numbers behind the figure. `pi`, `mu`, `values` are `[V]`; draws come from `mu` and are averaged with weight
# $\min(\pi/\mu, c)$. For each cap $c$ in `caps` return a row: the **bias** of that average (from $\mathbb E_\pi$ of the
# values) and the **standard error** of the mean of `n` draws. Exactly, no sampling.


# %%
def bias_and_standard_error(pi, mu, values, caps, n):
    # solution
    rows = []
    for cap in caps:
        x = (pi / mu).clamp(max=cap) * values
        mean = (mu * x).sum()
        variance = (mu * (x - mean).square()).sum()
        rows.append(torch.stack([mean - (pi * values).sum(), (variance / n).sqrt()]))
    return torch.stack(rows)
    # end


check("03.5", bias_and_standard_error)

# %% [markdown]
# ## 5 · Temperature, top-p and raw log-probabilities
#
# The weight repairs a difference between two distributions if we know the one the tokens were drawn from. Three ways
# not to know it, all common. The first on a real model: the tiny Mixture-of-Experts that ships with the library,
# sampled **in full precision** at temperature 0.7, so there is no discrepancy to find.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
prompts = [task.encode(p) for p in task.sample(32, seed=1)]
TEMPERATURE = 0.7

cold = HFEngine(model, Precision.parse("fp32")).generate(
    prompts, group_size=8, sampling=Sampling(task.max_new_tokens, TEMPERATURE), seed=0
)
layout, tokens = lay_out(cold, share_prompts=True), cold.response_mask
with torch.no_grad():
    processed = response_logprobs(model, layout, temperature=TEMPERATURE).logp
    raw = response_logprobs(model, layout, temperature=1.0).logp

figure = Figure(figsize=(9.5, 4.0), layout="constrained")
titles = {
    "the engine reports log-probs of what it drew from": cold.logp_rollout,
    "the engine reports raw log-probs": raw,
}
for ax, (title, reported) in zip(figure.subplots(1, 2, sharex=True, sharey=True), titles.items(), strict=True):
    ax.scatter(reported[tokens], processed[tokens], s=7, color=BLUE, alpha=0.4, linewidths=0)
    ax.plot([-6, 0], [-6, 0], color=GREY, linewidth=0.8)
    tidy(ax, title, "reported as log μ_old, nats", f"trainer's log π_old at T = {TEMPERATURE}")
Image(to_png(figure), width=850)

# %%
show_table(
    ["log μ_old is …", "and the trainer uses", "k1, nats", "k3, nats", "largest weight"],
    [
        [reported_as, trainer, f"{kl_k1(mu, pi, tokens) + 0.0:+.4f}", f"{kl_k3(mu, pi, tokens):.4f}",
         f"{(pi - mu)[tokens].exp().max():.3f}"]
        for reported_as, mu, trainer, pi in (
            ("that of the draw", cold.logp_rollout, f"T = {TEMPERATURE}", processed),
            ("raw, T = 1", raw, f"T = {TEMPERATURE}", processed),
            ("that of the draw", cold.logp_rollout, "T = 1", raw),
            ("raw, T = 1", raw, "T = 1", raw),
        )
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** The tokens lie in three clumps: the sure ones at 0, right digits just below, wrong digits far down
# (the cold start was trained by a teacher who errs at a fixed rate). Left, all are on the line: the engines are one
# function. Right, the same tokens and the same engine, and a discrepancy out of nothing: at a lower temperature likely
# tokens are likelier still, unlikely ones rarer.
#
# In the table the first row is right. In the second, weights are wrong and $k_1$ is *negative*, as it must be: its mean
# is then $-KL(p_T\|p_1)$. A steady negative $k_1$ is how this bug looks on a dashboard. In the third the weights are
# right, but they correct towards a policy at temperature 1, which is not what was sampled. In the last row both errors
# cancel and every dial reads zero; the tokens still came from another distribution than either number says.
#
# vLLM reports raw log-probabilities unless asked (`logprobs_mode="processed_logprobs"`); the library asks.
#
# **top-p and top-k** are worse: tokens outside the nucleus are *never* drawn, and no weight brings back what is not
# there.

# %%
mu_full = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05])
reward_of = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
kept = torch.tensor([True, True, True, False, False])
nucleus = mu_full * kept / mu_full[kept].sum()
pi_same = mu_full  # the trainer is the same function; only the sampler cuts off
show_table(
    ["reported as log μ_old", "weight of a drawn token", "weighted mean reward", "wanted"],
    [
        [name, f"{w[0]:.3f}", f"{(nucleus * w * reward_of)[kept].sum():.3f}", f"{(pi_same * reward_of).sum():.3f}"]
        for name, w in (
            ("log-prob before the cut", pi_same / mu_full),
            ("log-prob after the cut", pi_same / nucleus),
        )
    ],
)  # fmt: skip

# %% [markdown]
# Neither is what was wanted. The rare token that is rewarded is never tried, and training cannot learn of it. In RL one
# samples from the whole distribution; `Sampling` of this library has no top-p to set.

# %% [markdown]
# {exercise} 03.6
# From `logits` `[B, T, V]`, the `tokens` `[B, T]` that were drawn and the `temperature` they were drawn at: the
# log-probabilities `[B, T]` that both engines should report.


# %%
def logp_of_drawn(logits, tokens, temperature):
    # solution
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    # end


check("03.6", logp_of_drawn)

# %% [markdown]
# ## 6 · Errors that come back, errors that average out
#
# Rounding to nearest makes the same error as long as the weights hardly move; stochastic rounding rolls dice at every
# sync; *frozen* rounding rolls them once and keeps them. Take 256 rows of weights that drift a little from sync to
# sync, as training moves them, and look at the error of one product in each:

# %%
generator = torch.Generator().manual_seed(0)
rows_of_weights = torch.randn(256, 64, generator=generator)
drift = torch.randn(256, 64, generator=generator)
activation = torch.randn(64, generator=generator)
SYNCS = 24


def errors_over_syncs(rounding):
    """What rounding to int4 does to each of 256 outputs, [syncs, outputs]."""
    errors = []
    for sync in range(SYNCS):
        moved = rows_of_weights + 0.004 * sync * drift
        dice = {"nearest": None, "frozen": torch.Generator().manual_seed(7)}
        dice["stochastic"] = torch.Generator().manual_seed(100 + sync)
        errors.append((quantise(moved, "int4", dice[rounding]) - moved) @ activation)
    return torch.stack(errors)


figure = Figure(figsize=(9.5, 3.2), layout="constrained")
shares = []
for ax, rounding in zip(
    figure.subplots(1, 3, sharex=True, sharey=True), ("nearest", "frozen", "stochastic"), strict=True
):
    errors = errors_over_syncs(rounding)
    for output, colour in enumerate((BLUE, ORANGE, GREEN)):
        ax.plot(errors[:, output], color=colour, linestyle=("-", "--", ":")[output], linewidth=1.2)
    ax.axhline(0, color="#cccccc", linewidth=0.8)
    tidy(ax, rounding, "sync", "error of an output")
    systematic, random_part = error_parts(errors)
    shares.append(
        [rounding, f"{(systematic + random_part) ** 0.5:.2f}", f"{systematic / (systematic + random_part):.0%}"]
    )
Image(to_png(figure), width=850)

# %%
show_table(["rounding", "root mean square error", "share that comes back"], shares)

# %% [markdown]
# **What to see.** Three outputs, one line each. Left and middle, an error stays on its side of zero for many syncs: a
# learner that sees the sampler's rewards can make up for it. Right, it jumps about: there is nothing to learn.
# `error_parts` splits the mean square into the two, as shares of the table.
#
# Section 3 makes a prediction: **where errors come back, training without the weight makes up for the sampler; where
# they average out, it cannot.** What did our runs do? The paper finds that on-policy training without the weight
# collapses (claim F1c). Our reproduction: int4 with *stochastic* rounding, 300 updates, eight seeds, from the stored
# files.

# %%
RUNS = checkout() / "lessons" / "results" / "runs" / "full"
DEFINITIONS = load_spec().definitions


def stored(setting, *variants):
    """The stored runs of the variants, for the seeds that all of them have, by variant."""
    found = read_runs(RUNS / setting)
    runs = [found.get(variant, {}) for variant in variants]
    seeds = sorted(set.intersection(*map(set, runs)))
    return [[own[seed] for seed in seeds] for own in runs]


with_is, without_is = stored("on_policy", "minirl", "no_is")
four_curves({"MiniRL": [run.metrics for run in with_is], "− IS": [run.metrics for run in without_is]})


# %%
def column(runs, name):
    return np.array([float(summary(run, DEFINITIONS)[name]) for run in runs])


def compare_runs(with_weight, without_weight):
    """One row for each number a run is judged by: means, and the paired difference over seeds."""
    rows = []
    for label, name, scale in (
        ("final score, trainer, points", "final_score", 100),
        ("final score, sampler, points", "final_score_rollout", 100),
        ("entropy in the last third, nats", "final_entropy", 1),
        ("KL (k3) in the last third, nats", "kl", 1),
        ("runs that collapsed, %", "collapsed", 100),
    ):
        a, b = scale * column(with_weight, name), scale * column(without_weight, name)
        gap = paired_difference(b, a)
        digits = 1 if scale == 100 else 3
        rows.append(
            [label, f"{a.mean():.{digits}f}", f"{b.mean():.{digits}f}",
             f"{gap.estimate:+.{digits}f} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"]
        )  # fmt: skip
    return rows


print(f"{len(with_is)} seeds each")
show_table(["", "MiniRL", "− IS", "difference (95 % over seeds)"], compare_runs(with_is, without_is))

# %% [markdown]
# **What to see.** In this small setting removing the weight does **not** collapse training. No run without it
# collapses, and they end *higher*, on both engines; the verdict in [CLAIMS.md](../lessons/results/CLAIMS.md) is
# "opposite". The entropy hardly differs, and the KL is lower, not higher. Section 3 does not predict this: there is no
# error here that comes back. A first guess was variance: an update here sees about a thousand tokens, and with so few a
# weight could cost more than it saves. That was tested with four times as many responses in an update, and it failed:
# training without the weight was as good or better again (`LOG.md`). Section 7 has another reason, and a case in which
# the collapse is there. A regime of ours is no refutation of the paper's.
#
# The sharper test is our own question D2: one size of engine error, made to come back (*nearest*, *frozen*) or to
# average out (*random*), with and without the weight. Its runs are compared here as soon as they are stored:

# %%
for setting in ("nearest", "frozen", "random"):
    pairs = stored(setting, "minirl", "no_is")
    if len(pairs[0]) < 2:
        display(Markdown(f"**{setting}**: not run yet; make it with `minirl reproduce systematic --tier full`"))
        continue
    display(Markdown(f"**{setting}**, {len(pairs[0])} seeds"))
    show_table(["", "MiniRL", "− IS", "difference (95 % over seeds)"], compare_runs(*pairs))

# %% [markdown]
# ## 7 · A signal and a drift
#
# The lesson splits the gradient without the weight into two parts. The *signal* knows which token was better. The
# *drift* only knows how the whole response does: every token of a response that does worse than its group pushes $\pi$
# away from the sampler, every token of one that does better pulls it towards the sampler. Where all contexts are alike
# the drifts add up to
#
# $$\mathrm{Cov}(|y|, R)\;(\mu-\pi).$$
#
# With the weight $\pi/\mu$ there is no drift. By hand: a context with three tokens, of which the second is right, an
# engine with noise on its logits, and groups of eight in which one response is right.

# %%
one_pi = torch.tensor([0.6, 0.3, 0.1])
jitter = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
one_mu = (one_pi.log() + torch.cat([jitter, -jitter])).softmax(-1).mean(0)
print("trainer π     ", "  ".join(f"{p:.3f}" for p in one_pi))
print("engine, mean μ", "  ".join(f"{p:.3f}" for p in one_mu), "  flatter: likely tokens lose, unlikely ones gain")

solved = torch.tensor([1.0] + [0.0] * 7)
rows = []
for name, (right_length, wrong_length) in {"wrong longer": (3, 96), "alike": (96, 96), "right longer": (96, 3)}.items():
    lengths = torch.where(solved == 1, right_length, wrong_length)
    covariance = ((lengths - lengths.mean(dtype=torch.float)) * (solved - solved.mean())).mean()
    moves = (covariance * (one_mu - one_pi)).tolist()
    rows.append([name, f"{covariance:+.2f}", *(f"{move + 0.0:+.3f}" for move in moves)])
show_table(["responses", "Cov(\\|y\\|, R)", "wrong mode", "right token", "another token"], rows)

# %% [markdown]
# **What to see.** In the first line the wrong mode's logit rises and the right token's falls, although the right token
# is what is rewarded: the drift sharpens whatever mode is there. In the last line it flattens. In between it is 0.

# %% [markdown]
# {exercise} 03.7
# The drift of a group. From `lengths` and `rewards` `[G]` of a group, and the probabilities `pi` and `mu` `[V]` of a
# token in a context that stands for all others: the total of the drift, `[V]`, as a mean over the group's responses.
# It is the direction in which training without the weight moves the logits, as far as the drift moves them.


# %%
def drift_of_a_group(lengths, rewards, pi, mu):
    # solution
    advantages = rewards - rewards.mean()
    return (lengths * advantages).mean() * (mu - pi)
    # end


check("03.7", drift_of_a_group)

# %% [markdown]
# Now a world. Tokens are drawn in contexts of ten tokens each. The first three decide: all three must be right. Then
# the response is over for a winner and goes on for a loser (or the other way round). Three quarters of the contexts
# start with a wrong mode. The engine's logits are the trainer's plus noise, drawn anew at every step. Predict before
# you look.

# %% [markdown]
# {exercise} 03.8
# What does the drift's total do to the entropy? `right_length` and `wrong_length` are the lengths of right and wrong
# responses, `weight` says whether the exact token weight is used, `divided` whether each response is divided by its
# length. Return `"falls"`, `"rises"` or `"neither"`.


# %%
def entropy_of_the_drift(right_length, wrong_length, weight, divided):
    # solution
    if weight or divided or right_length == wrong_length:
        return "neither"
    return "falls" if wrong_length > right_length else "rises"
    # end


check("03.8", entropy_of_the_drift)

# %%
SEEDS, STEPS = pick(fast=(3, 120), full=(8, 300))
CASES = WORLDS["doomed_tails"].scenarios  # lengths: 3 and 96, 96 and 96, 96 and 3
worlds = {
    (case, method): doomed_tails(VARIANTS[method], seeds=SEEDS, steps=STEPS, **options)
    for case, options in CASES.items()
    for method in ("MiniRL", "− IS")
}

figure = Figure(figsize=(9.5, 5.6), layout="constrained")
panels = figure.subplots(2, 3, sharex=True, sharey="row")
for column_of, case in zip(panels.T, CASES, strict=True):
    for ax, metric in zip(column_of, ("entropy", "score"), strict=True):
        for method, colour, style, label in (("MiniRL", BLUE, "-", "with"), ("− IS", ORANGE, "--", "without")):
            curves = worlds[case, method]
            mean, half = mean_interval(curves[metric])
            ax.plot(curves["step"], mean, color=colour, linestyle=style, label=f"{label} the weight")
            ax.fill_between(curves["step"], mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        tidy(ax, case if metric == "entropy" else "", "step", "")
panels[0, 0].set_ylabel("entropy, nats")
panels[1, 0].set_ylabel("score, exact")
panels[0, 0].legend(frameon=False)
Image(to_png(figure), width=850)

# %%
rows = []
for case, options in CASES.items():
    with_weight, without = worlds[case, "MiniRL"], worlds[case, "− IS"]
    at = len(without["step"]) // 3
    gap = paired_difference(without["entropy"][:, at], with_weight["entropy"][:, at])
    rows.append(
        [case, f"{without['length_reward_cov'][:, 0].mean():+.1f}", f"{without['entropy_drift'][:, 0].mean():+.3f}",
         f"{doomed_tails_border(**options):+.2f}", f"{gap.estimate:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"]
    )  # fmt: skip
show_table(
    ["responses", "Cov(\\|y\\|, R), step 0", "entropy_drift, step 0", "drift ÷ signal, computed beforehand",
     f"entropy at step {without['step'][at]}: without − with, nats (95 %)"], rows
)  # fmt: skip

# %% [markdown]
# **What to see.** Top left the entropy falls without the weight, top right it rises, in the middle both methods do
# nearly the same. The table has the sign before the first step: `length_reward_cov` and `entropy_drift` are read off a
# batch, and every run of the library logs them. `entropy_drift` is how fast leaving out the weight *would* change the
# entropy. The fourth column is computed from the policy at the start: above 1 the drift outweighs the signal where the
# mode is wrong. Below: on the left and on the right the score without the weight ends where it began, or lower. In the
# middle nothing is lost without the weight. That is the case of our runs in section 6: the length of a response is
# given by its problem, and within a group all are alike.

# %% [markdown]
# {exercise} 03.9
# Choose the correction. The lesson's section 7 has a table of weights: which part of the drift each leaves, its
# variance, and how runs end. For each purpose return one of `"none"`, `"token truncated"`, `"token masked"` or
# `"sequence"` (a product over the whole response, truncated or masked):
#
# * `all responses are equally long`: the highest score of the four;
# * `nobody knows which responses will be longer`: learns in each of the three cases;
# * `turns the drift around`: the entropy rises where it would fall without a weight;
# * `hardly any drift, but too much noise`: learns where losers are long, and stops where winners are as long as they.


# %%
def chosen_corrections():
    # solution
    return {
        "all responses are equally long": "none",
        "nobody knows which responses will be longer": "token truncated",
        "turns the drift around": "token masked",
        "hardly any drift, but too much noise": "sequence",
    }
    # end


check("03.9", chosen_corrections)

# %% [markdown]
# ## 8 · A real engine: turn the dial
#
# The whole lesson in one picture. The tiny model samples 256 responses through an engine of your choice; the trainer
# reads the same tokens in full precision. Each dot is a token. On the line, the two stoves agree.

# %%
ENGINES = ["fp32", "bf16", "fp8_e4m3", "int8", "int6", "int5", "int4", "int3"]


@functools.lru_cache
def drawn_tokens(precision):
    """log μ_old and log π_old of the tokens that the engine draws at temperature 1."""
    rollout = HFEngine(model, Precision.parse(precision, "stochastic")).generate(
        prompts, group_size=8, sampling=Sampling(task.max_new_tokens, 1.0), seed=0
    )
    with torch.no_grad():
        logp = response_logprobs(model, lay_out(rollout, share_prompts=True)).logp
    return rollout.logp_rollout, logp, rollout.response_mask


def gap_picture(precision, cap):
    """Left: every token under both engines. Right: the weights, and what the cap does to them."""
    log_mu, log_pi, mask = drawn_tokens(precision)
    weight = (log_pi - log_mu)[mask].exp().numpy()
    capped = weight > cap
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    x, y = (values[mask].clamp(min=-11).numpy() for values in (log_mu, log_pi))
    left.plot([-11, 0], [-11, 0], color=GREY, linewidth=0.8)
    left.scatter(x[~capped], y[~capped], s=9, color=BLUE, alpha=0.45, linewidths=0, label="weight as it is")
    left.scatter(x[capped], y[capped], s=26, marker="x", color=ORANGE, label="capped")
    left.set(xlim=(-11.4, 0.4), ylim=(-11.4, 0.4))
    left.legend(frameon=False, loc="upper left")
    tidy(left, f"sampler: {precision}", "log μ_old, sampler, nats", "log π_old, trainer, nats")
    bins = np.geomspace(0.05, 20, 61)
    right.hist(weight.clip(0.051, 19.9), bins=bins, color=BLUE)
    right.axvspan(cap, 20, color="#f3d9c9", zorder=0)
    right.set(xscale="log", yscale="log", ylim=(0.7, 3000), xlim=(0.05, 20))
    right.set_xticks([0.05, 0.2, 1, 5, 20], ["≤ 0.05", "0.2", "1", "5", "≥ 20"])
    right.minorticks_off()
    numbers = (
        f"k3 {max(float(kl_k3(log_mu, log_pi, mask)), 0):.1e} nats, ESS {float(token_ess(log_pi, log_mu, mask)):.2f}, "
    )
    tidy(
        right,
        f"{numbers}{capped.sum()} of {len(weight)} capped",
        "weight π_old/μ_old (shaded: above the cap)",
        "tokens",
    )
    return figure


Image(to_png(gap_picture("int3", 5)), width=850)

# %% [markdown]
# **What to see.** In three bits the cloud is wide. Dots *below* the line are tokens that the sampler drew and the
# trainer finds less likely, in the bottom corner nearly impossible: their weight is almost 0. Dots *above* it have
# weights above 1, and a cross is one that the cap cuts. Small weights add no variance, so the effective sample size is
# still high; the KL counts them in full.
#
# **Turn it yourself.** With a live kernel (and `ipywidgets`) the next cell shows two sliders.

# %%
try:
    from ipywidgets import SelectionSlider, interact
except ImportError:
    print("no ipywidgets here; try display(Image(to_png(gap_picture('int4', 2)), width=850))")
else:

    @interact(
        precision=SelectionSlider(options=ENGINES, value="int4", description="engine", continuous_update=False),
        cap=SelectionSlider(options=[1.05, 1.2, 2, 5, 10], value=5, description="cap", continuous_update=False),
    )
    def turn(precision, cap):
        display(Image(to_png(gap_picture(precision, cap)), width=850))


# %% [markdown]
# **Try this**
#
# 1. From fp32 to int3, at which engine do you first *see* the cloud, and what does $k_3$ say there?
# 2. In section 2 set `tokens=2_000_000`. Does a larger batch make $k_1$ good enough at a KL of $10^{-6}$ nats?
# 3. In section 3 give `problem` a larger share of rewarded responses, or `train_exactly` a smaller `rate`. Does the
#    order of the two methods on the *trainer's* reward change? On the sampler's?
# 4. In section 7 give `doomed_tails` a smaller `sigma`, or `wrong=0.0`, so that every mode is right. What does
#    `doomed_tails_border` say before you run it?
#
# Back to the [lesson](../lessons/03_sampler_and_policy.md), for the proofs and for what to remember.
