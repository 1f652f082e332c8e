# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Sequence reward and its gradient, exactly
#
# A judge reads a whole essay and gives one number. We may only change how each *word* is chosen. How does one number
# for the whole turn into a push on every word? On a toy where every essay can be written down, this lab answers that
# without sampling and without approximation; then it shows what sampling adds, and what length destroys.
#
# **A picture to keep: the judge scores the whole essay, and we may only change words.** The judge never says which word
# was good. A word is good if the essays it occurs in tend to be good, and it is the same word in the good ones and in
# the bad ones.
#
# The derivations are in the lesson, [01_sequence_reward.md](../lessons/01_sequence_reward.md). Equation numbers without
# a dot are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374).

# %%
import math

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.diagnostics import sequence_ess, token_ess
from minirl_edu.exact import TabularPolicy, sequence_gradient, sequence_objective, token_ratios
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.plots import to_png
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


# %% [markdown]
# ## 1 · A policy is a product of conditionals
#
# A language model never sees the essay it is going to write. It answers one question again and again: *given the words
# so far, what comes next?* The probability of a response is the product of its answers.
#
# By hand first. Two words, `0` and `1`, and a full stop `.` that ends the response. Say the model gives these
# probabilities:

# %%
first = {"0": 0.5, "1": 0.3, ".": 0.2}
after_1 = {"0": 0.1, "1": 0.6, ".": 0.3}
print(f"π('1.')  = π('1') · π('.' | '1')  = {first['1']} · {after_1['.']} = {first['1'] * after_1['.']:.2f}")
print(f"log π    = {math.log(first['1']):.3f} + {math.log(after_1['.']):.3f} = {math.log(0.3 * 0.3):.3f}")

# %% [markdown]
# Now a policy for responses of up to three tokens. `TabularPolicy` keeps one row of logits for every prefix, so it can
# express any such policy, and it lists all responses. The judge is a parity check: **reward 1 if the number of ones in
# the whole response is odd**, else 0. No single word is right or wrong.

# %%
mu_old = TabularPolicy.random(3, 3, seed=1)
texts = ["".join("01."[token] for token in y[m].tolist()) for y, m in zip(mu_old.tokens, mu_old.mask, strict=True)]
rewards = torch.tensor([float(text.count("1") % 2) for text in texts], dtype=torch.float64)
prefixes = ["", "0", "1", "00", "01", "10", "11"]  # in the order of the rows of logits

probs = mu_old.response_probs()
print("responses", len(texts), "  prefixes", len(mu_old.logits), "  parameters", mu_old.logits.numel())
print(f"their probabilities sum to {probs.sum():.12f}")
print(f"J_seq = E[R] = Σ_y μ_old(y)·R(y) = {(probs * rewards).sum():.4f}")

# %%
order = probs.argsort(descending=True).tolist()
figure = Figure(figsize=(8.5, 3.2), layout="constrained")
ax = tidy(figure.subplots())
for reward, colour, hatch in ((1, BLUE, ""), (0, "#cccccc", "//")):
    at = [i for i, y in enumerate(order) if rewards[y] == reward]
    share = sum(probs[order[i]] for i in at)
    label = f"reward {reward}, together {share:.0%}"
    ax.bar(at, [probs[order[i]] for i in at], color=colour, hatch=hatch, edgecolor="white", label=label)
ax.set_xticks(range(len(order)), [f"{texts[y]}" for y in order])
ax.set(xlabel="response", ylabel="probability μ_old(y)")
ax.legend(frameon=False)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** All responses that this policy can write, and the whole of the objective: $J_{seq}$ is the blue area.
# To raise it, probability has to move from the hatched bars to the blue ones. But no parameter belongs to a bar: each
# belongs to a prefix and a word, and every prefix occurs in blue and in hatched bars.

# %% [markdown]
# {exercise} 01.1
#
# A model has returned logits for a batch of responses: row $t$ of `logits` `[B, T, V]` is the distribution that token
# $t$ of `tokens` `[B, T]` was drawn from. `mask` `[B, T]` is true on the tokens of the response. What stands after the
# end may be anything, −∞ included. Return $\log\pi(y)$ of each response, `[B]`.


# %%
def log_of_the_whole(logits, tokens, mask):
    # solution
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return torch.where(mask, logp, 0.0).sum(1)
    # end


check("01.1", log_of_the_whole)

# %% [markdown]
# ## 2 · The gradient of an average: the score function
#
# The smallest case: one token, two words. The policy writes `1` with probability $p = \sigma(z)$, the rewards are $R_1$
# and $R_0$. Then $J = p R_1 + (1 - p) R_0$ and, by calculus, $dJ/dz = p(1-p)(R_1 - R_0)$.
#
# The same by the **score function** $\nabla\log\pi$: for `1` it is $1 - p$, for `0` it is $-p$. Average reward times
# score:

# %%
p, reward_1, reward_0 = 0.3, 1.0, 0.2
by_calculus = p * (1 - p) * (reward_1 - reward_0)
by_score = p * reward_1 * (1 - p) + (1 - p) * reward_0 * (-p)
print(f"by calculus {by_calculus:.6f}    E[R · score] {by_score:.6f}")

# %% [markdown]
# Nothing was differentiated but $\log\pi$. The reward may come from a program, a person, or a judge who cannot say why.
# For a response of several tokens $\log\pi(y)$ is a sum, so
#
# $$\nabla\,\mathbb E_{y\sim\pi}[R] \;=\; \mathbb E_{y\sim\pi}\Big[R(y)\sum_t \nabla\log\pi(y_t|y_{<t})\Big].$$
#
# The library computes this expectation as a sum over all responses. Three independent ways to the same numbers:

# %%
exact = sequence_gradient(mu_old, mu_old, rewards)

logits = mu_old.logits.clone().requires_grad_()
(TabularPolicy(logits, 3).response_probs() * rewards).sum().backward()

differences = torch.zeros_like(exact)
for row, word in np.ndindex(*exact.shape):
    nudge = torch.zeros_like(exact)
    nudge[row, word] = 1e-5
    up, down = ((mu_old.moved(nudge, sign).response_probs() * rewards).sum() for sign in (1, -1))
    differences[row, word] = (up - down) / 2e-5

print(f"score function − autograd            {(exact - logits.grad).abs().max():.1e}")
print(f"score function − finite differences  {(exact - differences).abs().max():.1e}")

# %%
directions = [
    torch.randn(exact.shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(20)
]
steps = np.linspace(-1.5, 1.5, 41)


def along(direction):
    """J_seq on a line through μ_old, in units of the distance in logits."""
    direction = direction / direction.norm()
    return [(mu_old.moved(direction, float(step)).response_probs() * rewards).sum().item() for step in steps]


figure = Figure(figsize=(8.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
limit = exact.abs().max().item()
image = left.imshow(exact, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
for row, word in np.ndindex(*exact.shape):
    colour = "white" if abs(exact[row, word]) > 0.6 * limit else "black"
    left.text(word, row, f"{exact[row, word]:+.3f}", ha="center", va="center", fontsize=9, color=colour)
left.set_xticks(range(3), ["0", "1", "."])
left.set_yticks(range(7), [f"'{prefix}'" for prefix in prefixes])
left.set(xlabel="next word", ylabel="prefix", title="∇ J_seq")
tidy(right)
for direction in directions:
    right.plot(steps, along(direction), color="#bbbbbb", linewidth=0.8)
right.plot([], [], color="#bbbbbb", label="20 random directions")
right.plot(steps, along(exact), color=BLUE, linewidth=2.2, label="along ∇J")
right.plot(steps, steps * exact.norm().item() + along(exact)[20], color=ORANGE, linestyle="--", label="slope |∇J|")
right.set(xlabel="distance moved in logits", ylabel="J_seq", ylim=(0.1, 0.9))
right.legend(frameon=False, fontsize=9)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left, what the judge's one number says to every word choice. Each row adds up to zero: what one word
# wins, its alternatives lose. The same word `1` is pushed up after one prefix and down after another, because what
# counts is the parity of the whole. Numbers are small in rows where few responses pass, or where the policy is nearly
# sure of the next word. Right, the gradient is the steepest way up, and its slope is exactly $|\nabla J|$ (dashed).

# %% [markdown]
# {exercise} 01.2
#
# Return the gradient of $\mathbb E_{y\sim\pi}[R]$ with respect to the logits, `[P, V]`, from a `TabularPolicy` and the
# rewards of all its responses `[B]`, *without* autograd and without the library's `sequence_gradient` and `score_sum`.
# The policy has `pi.logits` `[P, V]`, and for each response and token `pi.tokens`, `pi.mask` and `pi.prefix` `[B, T]`
# (the row of logits that the token was drawn from); `pi.response_probs()` is `[B]`.


# %%
def gradient_by_hand(pi, rewards):
    # solution
    gradient, tables = torch.zeros_like(pi.logits), pi.logits.softmax(-1)
    for y, weight in enumerate(pi.response_probs() * rewards):
        for row, word in zip(pi.prefix[y][pi.mask[y]], pi.tokens[y][pi.mask[y]], strict=True):
            gradient[row] -= weight * tables[row]
            gradient[row, word] += weight
    return gradient
    # end


check("01.2", gradient_by_hand)

# %% [markdown]
# ## 3 · Samples from another engine
#
# In practice nobody enumerates. Responses are drawn, and they are drawn by $\mu_{old}$, not by the policy $\pi_\theta$
# that is trained. The average under $\pi_\theta$ is recovered by counting each response
# $w(y) = \pi_\theta(y)/\mu_{old}(y)$ times, its **importance weight**:
#
# $$\mathbb E_{y\sim\pi_\theta}[R] \;=\; \mathbb E_{y\sim\mu_{old}}\Big[\frac{\pi_\theta(y)}{\mu_{old}(y)}\,R\Big].$$
#
# By hand: a coin that shows heads 80 times in 100, and we want the average for a fair coin. Heads counts
# $0.5/0.8$, tails $0.5/0.2$.

# %%
heads, tails = 80 * (0.5 / 0.8), 20 * (0.5 / 0.2)
print(f"80 heads count as {heads:.0f}, 20 tails as {tails:.0f}")

# %%
pi = mu_old.moved(TabularPolicy.random(3, 3, seed=2).logits, 0.7)
weights = token_ratios(pi, mu_old).prod(1)
target = (pi.response_probs() * rewards).sum()
print(f"J at μ_old                    {(probs * rewards).sum():.6f}")
print(f"J at π_θ, summed under π_θ    {target:.6f}")
print(f"J at π_θ, by (1) under μ_old  {sequence_objective(pi, mu_old, rewards):.6f}")
print(f"E[w] under μ_old              {(probs * weights).sum():.6f}")

# %%
counts = [10, 30, 100, 300, 1000, 3000]
repeats = pick(fast=300, full=2000)
generator = torch.Generator().manual_seed(0)
estimates = {"weighted": [], "unweighted": []}
for count in counts:
    drawn = torch.multinomial(probs, repeats * count, replacement=True, generator=generator).view(repeats, count)
    estimates["weighted"].append((weights * rewards)[drawn].mean(1))
    estimates["unweighted"].append(rewards[drawn].mean(1))

figure = Figure(figsize=(8.5, 3.4), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2, width_ratios=(1.25, 1)))
at = np.arange(len(order))
left.bar(at - 0.2, probs[order], 0.4, color=GREY, label="μ_old, draws")
left.bar(at + 0.2, pi.response_probs()[order], 0.4, color=BLUE, label="π_θ, is trained")
left.set_xticks(at, [texts[y] for y in order], rotation=60)
left.set(ylabel="probability")
left.legend(frameon=False)
for (name, runs), colour, mark in zip(estimates.items(), (BLUE, ORANGE), ("o", "X"), strict=True):
    means = np.array([run.mean().item() for run in runs])
    spread = np.array([run.std().item() for run in runs])
    right.fill_between(counts, means - spread, means + spread, color=colour, alpha=0.18, linewidth=0)
    right.plot(counts, means, color=colour, marker=mark, label=name)
right.axhline(target, color="black", linestyle=":", label="E[R] under π_θ, exact")
right.set(xscale="log", xlabel="responses drawn by μ_old", ylabel="estimate of E[R]")
right.legend(frameon=False, fontsize=9)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left, two policies over the same responses; $w$ is the height of a blue bar over that of its grey
# neighbour. Right, mean and standard deviation of many estimates. The weighted one is right on average at *every*
# sample size, even at ten: it is unbiased. The unweighted one gets more and more certain of the wrong number.

# %% [markdown]
# {exercise} 01.3
#
# Return the importance weight of each response, `[B]`, from the log-probabilities of its tokens under $\pi_\theta$ and
# under the rollout policy, `[B, T]`. `mask` is true on the tokens of the response; other places hold arbitrary finite
# numbers.


# %%
def weight_of_the_whole(logp, logp_rollout, mask):
    # solution
    return torch.where(mask, logp - logp_rollout, 0.0).sum(1).exp()
    # end


check("01.3", weight_of_the_whole)

# %% [markdown]
# ## 4 · A baseline: less noise, the same direction
#
# One response gives the estimate $(R - b)\,\nabla\log\pi(y)$. For every constant $b$ its mean is the gradient, because
# the mean score is zero. Its *noise* depends on $b$. By hand, with the one-token policy of section 2:

# %%
for b in (0.0, 1.0, 10.0):
    values = np.array([(reward_1 - b) * (1 - p), (reward_0 - b) * (-p)])  # for '1' and for '0'
    mean = np.dot([p, 1 - p], values)
    deviation = math.sqrt(np.dot([p, 1 - p], (values - mean) ** 2))
    print(f"b = {b:4.1f}   estimate {values[0]:+.2f} or {values[1]:+.2f}   mean {mean:.4f}   deviation {deviation:.4f}")

# %% [markdown]
# In practice $b$ is the mean reward of the $G$ responses to the same prompt, $\hat A_i = R_i - \bar R$. There is a
# catch: $\bar R$ contains $R_i$ itself, so it is not quite a constant. The lesson shows the price: the mean estimate is
# $\frac{G-1}{G}\nabla J$. The direction is right, the length a little short. Here both, measured:

# %%
scores = torch.stack(
    [mu_old.score_sum(torch.eye(len(probs), dtype=torch.float64)[y][:, None]) for y in range(len(probs))]
)
scores = scores.flatten(1)  # [B, P·V]: the score of each response
mean_gradient = torch.einsum("b,b,bd->d", probs, rewards, scores)
torch.testing.assert_close(mean_gradient.view_as(exact), exact)


def noise(baseline, shift=0.0):
    """E|g − ∇J|² of the one-response estimate g = (R + shift − b)·score, exactly."""
    second = (probs * (rewards + shift - baseline) ** 2 * scores.square().sum(1)).sum()
    return (second - mean_gradient.square().sum()).item()


size = probs * scores.square().sum(1)
best = ((size * rewards).sum() / size.sum()).item()
usual = (probs * rewards).sum().item()
print(f"no baseline {noise(0):.4f}    mean reward {noise(usual):.4f}    best baseline {noise(best):.4f}")
print(f"all rewards 10 higher: no baseline {noise(0, 10):.1f}    mean reward {noise(usual + 10, 10):.4f}")

# %%
groups = [2, 3, 4, 8, 16]
samples = pick(fast=20_000, full=100_000)
shrinkage, errors = [], []
for G in groups:
    drawn = torch.multinomial(probs, samples * G, replacement=True, generator=generator)
    advantages = group_mean_advantages(rewards[drawn], G)
    projected = scores[drawn] @ mean_gradient / mean_gradient.square().sum()
    own = (advantages * projected).view(samples, G).mean(1)
    shrinkage.append(own.mean().item())
    errors.append(own.std().item() / math.sqrt(samples))

figure = Figure(figsize=(8.5, 3.3), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2))
grid = np.linspace(-0.6, 1.4, 81)
left.plot(grid, [noise(b) for b in grid], color=BLUE)
marks = (0.0, "X", ORANGE, "none"), (usual, "o", BLUE, "mean reward"), (best, "D", GREEN, "the best")
for b, mark, colour, label in marks:
    left.plot(b, noise(b), mark, color=colour, markersize=8, label=label)
left.set(xlabel="baseline b", ylabel="noise  E|g − ∇J|²", ylim=(0, None))
left.legend(frameon=False)
ideal = np.linspace(2, 16, 57)
right.plot(ideal, (ideal - 1) / ideal, color=GREY, linestyle="--", label="(G − 1)/G")
right.errorbar(groups, shrinkage, [2 * e for e in errors], fmt="o", color=BLUE, capsize=3, label="measured, ± 2 s.e.")
right.axhline(1, color="black", linestyle=":", linewidth=1)
right.set(xlabel="group size G", ylabel="mean estimate / ∇J", ylim=(0, 1.1), xticks=groups)
right.legend(frameon=False, loc="lower right")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left, the noise is a parabola in $b$. The mean reward lies close to its minimum, which is why nobody
# bothers to compute the best one. With rewards of 0 and 1 no baseline at all is not a disaster; add 10 to every reward
# (the printed line) and it is one, although nothing has changed about which response is better. Right, the group's mean
# shortens the gradient by $(G-1)/G$. A factor common to all prompts is a factor of the learning rate, so MiniRL lets it
# be.

# %% [markdown]
# {exercise} 01.4
#
# Return the paper's advantages `[B]` from rewards `[B]`, which lie prompt after prompt, `group_size` of each.


# %%
def better_than_usual(rewards, group_size):
    # solution
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()
    # end


check("01.4", better_than_usual)

# %% [markdown]
# {exercise} 01.5
#
# The mean of $(R - b)\,s$ does not depend on the constant $b$; the noise $\mathbb E\,|(R - b)\,s|^2$ does. Return the
# $b$ with the least noise. `probs` `[B]` are the probabilities of all responses, `rewards` `[B]` their rewards,
# `scores` `[B, D]` their scores $s = \nabla\log\pi(y)$, flattened.


# %%
def least_noisy_baseline(probs, rewards, scores):
    # solution
    share = probs * scores.square().sum(1)
    return (share * rewards).sum() / share.sum()
    # end


check("01.5", least_noisy_baseline)

# %% [markdown]
# ## 5 · Why the sequence weight does not survive length
#
# Everything so far is exact and unbiased. So why not train like this? Because $w(y)$ is a product with one factor per
# token. By hand: each factor is 1.1 or 0.9, like the toss of a coin. The mean of the product is 1 at any length:

# %%
for length in (1, 10, 100, 1000):
    most = math.exp(length * (math.log(1.1) + math.log(0.9)) / 2)  # half of each: the typical response
    print(f"{length:5d} tokens: mean weight 1, typical weight {most:.2g}, mean square {1.01**length:.3g}")

# %% [markdown]
# The typical response ends up with almost no weight, and the mean of 1 is kept up by a few responses with a huge one.
# How many responses really count is the **effective sample size**, as a fraction $1/\mathbb E[w^2]$. If the tokens'
# ratios $\rho$ are independent, $\mathbb E[w^2] = \mathbb E[\rho^2]^T = (1 + \chi^2)^T$: compound interest.
#
# Exactly, on a policy whose responses all have `LONGEST` tokens and whose $\pi_\theta$ differs from $\mu_{old}$ in
# every logit, at random, by a standard deviation of `distance`. One such accident looks different from the next, so
# there are several, and the figure shows their average:

# %%
LONGEST = pick(fast=8, full=10)


def without_end(policy):
    """The same policy, except that it never ends a response early."""
    logits = policy.logits.clone()
    logits[:, -1] = -1000.0
    return TabularPolicy(logits, LONGEST)


def words_only(direction):
    return torch.cat([direction[:, :-1], torch.zeros_like(direction[:, -1:])], 1)


sampler = without_end(TabularPolicy.random(3, LONGEST, seed=3))
drifts = [words_only(TabularPolicy.random(3, LONGEST, seed=seed).logits) for seed in range(10, 18)]
sampler_probs = sampler.response_probs()


def weights_by_length(distance):
    """[drifts, B, T]: the weight of each response cut off after 1, 2, … T tokens."""
    return torch.stack([token_ratios(sampler.moved(drift, distance), sampler).cumprod(1) for drift in drifts])


def effective_share(weights):
    """1/E[w²] at each length [T], the geometric mean over the drifts."""
    return (sampler_probs[:, None] * weights**2).sum(1).log().mean(0).neg().exp()


def weight_figure(distances, length):
    """Left, effective sample size by length; right, how unequally the weight is shared out at one length."""
    figure = Figure(figsize=(8.5, 3.5), layout="constrained")
    left, right = (tidy(ax) for ax in figure.subplots(1, 2))
    lengths = np.arange(1, LONGEST + 1)
    lines = ("-", "--", "-.", (0, (1, 1)))
    colours = (BLUE, GREEN, "#E69F00", ORANGE)
    for distance, line, colour in zip(distances, lines, colours, strict=False):
        w = weights_by_length(distance)
        share = effective_share(w)
        left.plot(lengths, share, marker="o", markersize=4, linestyle=line, color=colour, label=f"{distance:g}")
        w, p = w[:, :, length - 1].flatten(), sampler_probs.repeat(len(drifts)) / len(drifts)
        ranked = w.argsort(descending=True)
        x = np.concatenate([[0], p[ranked].cumsum(0)])
        y = np.concatenate([[0], (p * w)[ranked].cumsum(0)])
        right.plot(x, y, linestyle=line, color=colour)
    left.axvline(length, color="#bbbbbb", linewidth=1, zorder=0)
    left.set(xlabel="tokens in the response", ylabel="effective sample size, fraction", yscale="log")
    left.set_ylim(min(0.05, left.get_ylim()[0]), 1.1)
    left.legend(title="distance in logits", frameon=False, fontsize=9, ncols=2)
    right.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    right.set(xlabel="share of the responses, heaviest first", ylabel=f"share of the weight, {length} tokens")
    return figure


DISTANCES = (0.1, 0.3, 0.6, 1.0)
Image(to_png(weight_figure(DISTANCES, LONGEST)), width=850)

# %%
rows = []
for distance in DISTANCES:
    share = effective_share(weights_by_length(distance))[-1].item()
    growth = -math.log(share) / LONGEST  # log(1 + χ²) per token
    rows.append([distance, f"{math.expm1(growth):.4f}", f"{share:.3f}", f"{math.log(10) / growth:,.0f}"])
header = ["distance in logits", "χ² per token", f"effective share at {LONGEST} tokens", "tokens until a tenth is left"]
show_table(header, rows)

# %% [markdown]
# **What to see.** Left, on a logarithmic axis, nearly straight lines: the effective sample size falls *exponentially*
# with length. Right, who carries the weight: on the dotted diagonal all responses count alike; the further a curve bows
# away from it, the fewer do the work. The table extends the lines: even the small distance leaves a tenth of the
# responses after a length that a reasoning model passes easily (the paper's responses may have 32,768 tokens).
#
# **Turn it yourself.** With a live kernel, two sliders.

# %%
try:
    from ipywidgets import FloatSlider, IntSlider, interact
except ImportError:
    print("no ipywidgets here; try weight_figure((0.5,), 4)")
else:

    @interact(
        distance=FloatSlider(value=0.5, min=0.05, max=2.0, step=0.05, continuous_update=False),
        length=IntSlider(value=4, min=1, max=LONGEST, continuous_update=False),
    )
    def turn(distance, length):
        display(Image(to_png(weight_figure((distance,), length)), width=850))


# %% [markdown]
# **The same in a language model.** The tiny Mixture-of-Experts model that the quickstart introduces, the same weights
# in both engines: the rollout engine rounds to fewer and fewer bits, the training engine computes in fp32. No update
# has been made; this is the discrepancy between two engines and nothing else.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
prompts = [task.encode(problem) for problem in task.sample(pick(fast=64, full=256), seed=0)]
sampling = Sampling(max_new_tokens=task.max_new_tokens)
rows = []
engines = [("fp32", "nearest"), ("fp8_e4m3", "nearest"), ("int4", "nearest"), ("int4", "stochastic")]
for bits, rounding in [*engines, ("int3", "nearest"), ("int3", "stochastic")]:
    engine = HFEngine(model, Precision.parse(bits, rounding))
    rollout = engine.generate(prompts, group_size=8, sampling=sampling, seed=0)
    with torch.no_grad():
        logp = response_logprobs(model, lay_out(rollout, share_prompts=can_share_prompts(model))).logp
    both = [f(logp, rollout.logp_rollout, rollout.response_mask).item() for f in (token_ess, sequence_ess)]
    length = rollout.response_mask.sum(1).float().mean().item()
    rows.append([bits, rounding, f"{length:.1f}", *(f"{share:.3f}" for share in both)])
show_table(
    [
        "engine",
        "rounding",
        "tokens per response",
        "effective share, token weights",
        "effective share, sequence weights",
    ],
    rows,
)

# %% [markdown]
# **What to see.** At eight bits the two engines are close enough for either kind of weight. At three bits the last two
# columns part: products lose much more than their factors do, and these responses are short (third column). Read the
# numbers as hints. An effective sample size that is *estimated* from samples tends to be too large, because the
# responses with the huge weights are those that were not drawn.

# %% [markdown]
# {exercise} 01.6
#
# The ratio of one token has $\mathbb E[\rho^2] =$ `second_moment` under $\mu_{old}$, a little above 1, and tokens are
# independent. Return the smallest number of tokens at which the effective sample size, as a fraction, is below one
# tenth.


# %%
def tokens_until_a_tenth(second_moment):
    # solution
    return math.floor(math.log(10) / math.log(second_moment)) + 1
    # end


check("01.6", tokens_until_a_tenth)

# %% [markdown]
# ## 6 · A loss whose value means nothing
#
# Code wants a scalar to call `.backward()` on. With `sg` for "no gradient flows through this" (`.detach()`),
#
# $$\mathcal L = -\frac1B\sum_i \mathrm{sg}[w_i]\,\hat A_i\,\log\pi_\theta(y_i)$$
#
# has the gradient that we want, minus (2) on average. So has $-\frac1B\sum_i w_i\hat A_i$, because
# $\nabla w = w\nabla\log\pi_\theta$. Same gradient, other value:

# %%
logp_theta = torch.tensor([-1.2, -0.4], requires_grad=True)
log_mu, advantage = torch.tensor([-1.0, -0.5]), torch.tensor([0.5, -0.5])
w = (logp_theta - log_mu).exp()
for name, loss in {
    "−mean of sg[w]·Â·log π": -(w.detach() * advantage * logp_theta).mean(),
    "−mean of w·Â          ": -(w * advantage).mean(),
}.items():
    (gradient,) = torch.autograd.grad(loss, logp_theta, retain_graph=True)
    print(f"{name}   value {loss:+.4f}   gradient", [f"{g:+.4f}" for g in gradient.tolist()])

# %% [markdown]
# Now train the toy policy on the parity reward, on-policy, with groups of 16 drawn at every step. $J_{seq}$ is known
# exactly at every step; beside it the values of the two losses.

# %%
GROUP, GROUPS, STEPS, LR = 16, 16, 150, 0.5
generator = torch.Generator().manual_seed(0)
policy, history = mu_old, {"J_seq": [], "−mean of sg[w]·Â·log π": [], "−mean of w·Â": [], "mean of the first": []}
for _ in range(STEPS):
    drawn = torch.multinomial(policy.response_probs(), GROUPS * GROUP, replacement=True, generator=generator)
    logits = policy.logits.clone().requires_grad_()
    moving = TabularPolicy(logits, 3)
    logp = moving.log_probs().sum(1)[drawn]
    advantages = group_mean_advantages(rewards[drawn], GROUP)
    ratio = (logp - policy.log_probs().sum(1)[drawn]).exp()  # on-policy: all 1, but with a gradient
    loss = -(ratio.detach() * advantages * logp).mean()
    now = policy.response_probs()
    objective = (now * rewards).sum()
    covariance = (now * (rewards - objective) * policy.log_probs().sum(1)).sum()
    values = objective, loss, -(ratio * advantages).mean(), -(GROUP - 1) / GROUP * covariance
    for name, value in zip(history, values, strict=True):
        history[name].append(value.item())
    loss.backward()
    policy = policy.moved(-logits.grad, LR)

# %%
figure = Figure(figsize=(8.5, 3.3), layout="constrained")
left, right = (tidy(ax) for ax in figure.subplots(1, 2))
left.plot(history["J_seq"], color=BLUE, linewidth=2)
left.set(xlabel="update", ylabel="J_seq, exact", ylim=(0, 1.02))
for name, colour, line in zip(list(history)[1:], (ORANGE, "black", GREY), ("-", "--", "-."), strict=True):
    right.plot(history[name], color=colour, linestyle=line, linewidth=1.4, label=name)
right.set(xlabel="update", ylabel="value of the loss")
right.legend(frameon=False, fontsize=9)
Image(to_png(figure), width=850)

# %%
mean, objective = np.array(history["mean of the first"]), np.array(history["J_seq"])
lowest = mean.argmin()
show_table(
    ["update", "J_seq", "first loss, its mean"],
    [[step, f"{objective[step]:.2f}", f"{mean[step]:+.3f}"] for step in (0, lowest, STEPS - 1)],
)
print(f"largest |second loss|: {max(map(abs, history['−mean of w·Â'])):.1g}")

# %% [markdown]
# **What to see.** Left, training works. Right, no curve says so. The mean of the first loss falls, turns (second row of
# the table), and from there *rises* while the policy goes on improving. It is on its way to zero, which is also where
# it would be if the policy had collapsed onto one wrong answer: its mean is $-\frac{G-1}{G}\,\mathrm{Cov}(R, \log\pi)$,
# and that is small whenever all responses get the same reward. The second loss is zero on-policy, always, because
# advantages add up to zero. A loss in reinforcement learning is a device for a gradient. Watch the reward, a held-out
# score, the entropy and the KL instead.

# %% [markdown]
# {exercise} 01.7
#
# Write a loss (a scalar) whose gradient with respect to `logp` `[B, T]` is *minus* the estimate of (2): a mean over the
# $B$ responses of sequence weight × advantage × the scores of all their tokens. `logp_rollout` and `mask` are `[B, T]`,
# `advantages` `[B]`. Only the gradient is looked at.


# %%
def loss_for_the_gradient(logp, logp_rollout, advantages, mask):
    # solution
    weight = torch.where(mask, logp - logp_rollout, 0.0).sum(1).exp().detach()
    return -(weight * advantages * torch.where(mask, logp, 0.0).sum(1)).mean()
    # end


check("01.7", loss_for_the_gradient)

# %% [markdown]
# **Where next.** The estimate (2) is unbiased and, for long responses, useless: section 5. The next lesson gives every
# token its own ratio instead of the product of all, and asks what that costs:
# [02_first_order.md](../lessons/02_first_order.md).
#
# **Try this**
#
# 1. Make the judge less demanding: reward 1 if the response contains a `1` at all. Which rows of the gradient in
#    section 2 become simple?
# 2. In section 6 use groups of 2. How much slower is it than $(G-1)/G$ alone would make it?
# 3. In section 5 give $\mu_{old}$ very sure rows (`TabularPolicy.random(..., scale=4.0)`). Does the same distance in
#    logits cost more, or less?
