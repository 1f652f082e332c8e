# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What length normalisation does to the gradient: MiniRL, GRPO, CISPO side by side
#
# The lab of [lesson 05](../lessons/05_length_norm.md). Three algorithms multiply the same thing, an advantage times
# $\nabla\log\pi$, and divide it by different numbers: the responses, each response's length, the tokens of the batch.
# It looks like a choice of units. It is a choice of objective.
#
# **A picture to keep: red ink on essays.** A school improves by red ink. In the first school every page of a poor essay
# gets a full stroke. In the second each essay has one stroke's worth of ink, spread over its pages: a long poor essay
# is faintly pink all over. Pupils of the second school learn to be brief when they are right, and long when they are
# wrong.
#
# You need lessons 01 and 03: $\nabla\log\pi$, advantages of a group, the importance weight.

# %%
import copy
import math

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu import exact
from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages
from minirl_edu.course import check, checkout
from minirl_edu.diagnostics import mean_interval
from minirl_edu.experiments.spec import load_spec, read_runs
from minirl_edu.experiments.statistics import paired_difference, summary
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import cispo_loss, grpo_loss, minirl_loss
from minirl_edu.plots import four_curves, to_png
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, YELLOW, GREY, BLACK = "#0072B2", "#D55E00", "#E69F00", "#777777", "#000000"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def tidy(ax, title, xlabel, ylabel):
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)


# %% [markdown]
# ## 1 · Red ink by page, by essay, by class
#
# One group of four responses to one prompt: two right ones of 2 and 6 tokens, two wrong ones of 2 and 8 tokens. Nothing
# has moved yet: $\pi_\theta=\pi_{old}=\mu_{old}$, all ratios are 1. We read off what each algorithm does to each token:
# $-\partial\,\text{loss}/\partial\log\pi_\theta(y_t)$, the push on its log-probability.

# %%
lengths = torch.tensor([2, 6, 2, 8])
mask = torch.arange(8) < lengths[:, None]
rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
advantages = group_mean_advantages(rewards, 4)
flat = torch.full(mask.shape, math.log(0.5))


def push(loss_of):
    """−∂loss/∂logp for every token, where θ = θ_old."""
    logp = flat.clone().requires_grad_()
    loss_of(logp).backward()
    return -logp.grad


pushes = {
    "sum over tokens (MiniRL)": push(lambda x: minirl_loss(x, flat, flat, advantages, mask).loss),
    "÷ own length (GRPO)": push(lambda x: minirl_loss(x, flat, flat, advantages, mask, length_norm=True).loss),
    "÷ tokens of the batch (CISPO)": push(lambda x: cispo_loss(x, flat, advantages, mask).loss),
}

figure = Figure(figsize=(9.5, 3.3), layout="constrained")
for ax, (name, values) in zip(figure.subplots(1, 3, sharey=True), pushes.items(), strict=True):
    shown = torch.where(mask, values / values.abs().max(), torch.nan)
    ax.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for b, t in mask.nonzero().tolist():
        ax.text(
            t,
            b,
            f"{values[b, t]:+.3f}".replace("0.", "."),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(shown[b, t]) > 0.6 else "black",
        )
    ax.set_yticks(range(4), ["right, 2", "right, 6", "wrong, 2", "wrong, 8"])
    ax.set_xticks(range(8), range(1, 9))
    tidy(ax, name, "token", "")
Image(to_png(figure), width=850)

# %%
show_table(
    ["", *("row " + name for name in ("right, 2", "right, 6", "wrong, 2", "wrong, 8")), "all right", "all wrong"],
    [
        [name, *(f"{row:+.3f}" for row in values.sum(1)), f"{values[:2].sum():+.3f}", f"{values[2:].sum():+.3f}"]
        for name, values in pushes.items()
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** Blue tokens become likelier, red ones rarer. Left and right, all tokens of one colour are equally
# strong, and the two panels differ by one common factor. In the middle every *row* has the same total, so a token of a
# long response gets little: the long wrong answer is the palest of all. The table adds up rows. With the sum, a long
# response weighs more in total, because it consists of more decisions. That is not an unfairness: it is what the
# gradient of the expected reward says, as the next section shows.

# %% [markdown]
# {exercise} 05.1
# From numbers `terms` `[B, T]` and a `mask` that is true on response tokens, return three scalars: the mean over
# responses of the sum over tokens (MiniRL), the mean over responses of the mean over tokens (GRPO), the mean over all
# tokens (CISPO). Padding may hold anything, NaN included. A response may be empty: it contributes 0 and counts as a
# response.


# %%
def three_divisors(terms, mask):
    # solution
    terms = torch.where(mask, terms, 0.0)
    sums, lengths = terms.sum(1), mask.sum(1)
    return sums.mean(), (sums / lengths.clamp(min=1)).mean(), sums.sum() / lengths.sum()
    # end


check("05.1", three_divisors)

# %% [markdown]
# ## 2 · The gradient of what?
#
# Take a policy over responses of one to four tokens; all of them can be enumerated, so gradients are exact. The
# expected update of each divisor is compared with the gradient of the expected reward. The token mean depends on the
# batch: a batch of one response *is* GRPO's mean, and a large batch divides by a number that hardly varies.


# %%
def enumerable(seed):
    """A policy, rewards (1 for about 40 % of the responses) and lengths."""
    pi = exact.TabularPolicy.random(3, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    rewards = (torch.rand(len(pi.tokens), generator=generator, dtype=torch.float64) < 0.4).double()
    return pi, rewards, pi.mask.sum(1).double()


def expected_update(pi, coefficient):
    """Σ_y π(y) · coefficient(y) · ∇log π(y)."""
    return pi.score_sum((pi.response_probs() * coefficient)[:, None].expand(pi.mask.shape))


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


pi, reward, length = enumerable(0)
p = pi.response_probs()
baseline = (p * reward).sum()
policy_gradient = exact.sequence_gradient(pi, pi, reward)
print("cosine with the gradient of the expected reward")
print(f"  sum over tokens            {cosine(expected_update(pi, reward - baseline), policy_gradient):.6f}")
print(f"  divided by own length      {cosine(expected_update(pi, (reward - baseline) / length), policy_gradient):.6f}")

# %% [markdown]
# So of what *is* the length-normalised update the gradient? Write the objective down and let autograd tell. With the
# baseline $b$ held at its present value,
#
# $$\nabla_\theta\;\mathbb E_{y\sim\pi_\theta}\Big[\frac{R(y)-b}{|y|}\Big].$$
#
# It is a policy gradient after all, for **another reward**: $(R-b)/|y|$.

# %%
logits = pi.logits.clone().requires_grad_()
objective = (exact.TabularPolicy(logits, 4).response_probs() * (reward - baseline) / length).sum()
torch.testing.assert_close(
    torch.autograd.grad(objective, logits)[0], expected_update(pi, (reward - baseline) / length)
)  # fmt: skip
show_table(
    ["a response that is", "reward R", f"the reward it trains on, (R − b)/length, b = {baseline:.2f}"],
    [[f"{kind}, {n} tokens", r, f"{(r - baseline) / n:+.3f}"]
     for kind, r in (("right", 1), ("wrong", 0)) for n in (1, 2, 4)],
)  # fmt: skip

# %% [markdown]
# Under this reward the best response is right and short; and of the wrong ones, the **longest is the best**. How far
# the direction is off depends on how much lengths vary. Left, below: 300 random prompts with eight possible responses
# each, whose lengths are log-normal with a spread that grows to the right. Right: the token mean, for one policy and
# batches of growing size.


# %%
def bandit_cosines(spread, *, prompts=300, responses=8, seed=0):
    """Cosines of the length-normalised update with the policy gradient, in the logits of whole responses."""
    generator = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    rewards = (torch.rand(prompts, responses, generator=generator) < 0.4).double()
    rewards[:, 0], rewards[:, 1] = 1.0, 0.0
    p = logits.softmax(1)
    advantage = rewards - (p * rewards).sum(1, keepdim=True)
    updates = [p * (f - (p * f).sum(1, keepdim=True)) for f in (advantage, advantage / (spread * noise).exp())]
    return torch.nn.functional.cosine_similarity(*updates).numpy()


spreads = np.linspace(0, 2, 9)
turned = [bandit_cosines(spread) for spread in spreads]


def token_mean_direction(batch, samples=2000, seed=3):
    """Cosine of the mean of ΣX/ΣL over many batches of `batch` responses with the policy gradient."""
    pi, reward, length = enumerable(0)
    p = pi.response_probs()
    drawn = torch.multinomial(p, batch * samples, True, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.view(samples, batch)
    divisor = length[drawn].sum(1)
    # Each response's share of the expected update: how often it was drawn, over the tokens of its batch.
    shares = torch.zeros_like(p).index_put(
        (drawn.flatten(),), (1 / divisor).repeat_interleave(batch) / samples, accumulate=True
    )
    advantage = reward - (p * reward).sum()
    update = pi.score_sum((shares * advantage)[:, None].expand(pi.mask.shape))
    return cosine(update, exact.sequence_gradient(pi, pi, reward))


batches = [1, 2, 4, 8, 16, 32, 64]
# Ten repetitions show how much of the curve is sampling.
token_means = np.array([[token_mean_direction(b, seed=s) for b in batches] for s in range(10)])
own = cosine(expected_update(pi, (reward - baseline) / length), policy_gradient)

figure = Figure(figsize=(9.5, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(spreads, [values.mean() for values in turned], color=YELLOW, linestyle="-.", marker="s", label="mean")
for share, style in ((5, "--"), (0, ":")):
    label = f"{share} % of the prompts are below" if share else "smallest"
    low = [np.quantile(values, share / 100) for values in turned]
    left.plot(spreads, low, color=BLACK, linestyle=style, linewidth=1, label=label)
left.axhline(0, color="#cccccc", linewidth=0.8)
left.legend(frameon=False, loc="lower left")
tidy(left, "÷ own length", "spread of log |y|", "cosine with ∇E[R]")
mean, half = mean_interval(token_means)
right.plot(batches, mean, color=GREY, marker="*", label="÷ tokens of the batch (CISPO)")
right.fill_between(batches, mean - half, mean + half, color=GREY, alpha=0.2, linewidth=0)
right.axhline(own, color=YELLOW, linestyle="-.", label="÷ own length (GRPO)")
right.axhline(1, color=BLUE, linewidth=1, label="sum (MiniRL)")
right.set(xscale="log")
right.set_xticks(batches, batches)
right.minorticks_off()
right.legend(frameon=False, loc="center right")
tidy(right, "÷ tokens of a batch of B responses", "B", "cosine with ∇E[R]")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left: with equal lengths the direction is right; the more they vary, the further it turns, and for a
# few prompts it ends up pointing *away* from the gradient (below 0). Right: the token mean starts at GRPO's direction
# for $B=1$ and approaches the sum's. For a batch of hundreds of responses the division by $\sum|y|$ is a learning rate,
# larger in steps whose responses happen to be short. What remains different in CISPO is elsewhere: section 5.

# %% [markdown]
# {exercise} 05.2
# One prompt, $V$ possible responses, `logits`, `rewards` and `lengths` all `[V]`. Return the gradient `[V]` with
# respect to the logits that length normalisation *ascends*, on-policy and in expectation. The baseline is the expected
# reward at the present logits, a number.


# %%
def length_normalised_gradient(logits, rewards, lengths):
    # solution
    pi = logits.softmax(0)
    scaled = (rewards - (pi * rewards).sum()) / lengths
    return pi * (scaled - (pi * scaled).sum())
    # end


check("05.2", length_normalised_gradient)

# %% [markdown]
# ## 3 · Short wrong, long wrong
#
# Three responses only: a right one of 100 tokens (probability 0.1), a wrong one of **1** token (0.15) and a wrong one
# of 100 tokens (0.75). One small exact step in each direction, and what it does to the three probabilities:


# %%
def one_step(length, right, *, size=0.02):
    """Changes of the three probabilities in a step of fixed size, by the sum and divided by own length."""
    pi = torch.tensor([right, (1 - right) / 6, 5 * (1 - right) / 6], dtype=torch.float64)
    lengths = torch.tensor([length, 1.0, length], dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - right
    changes = {}
    for name, f in (("sum", advantages), ("÷ own length", advantages / lengths)):
        step = pi * (f - (pi * f).sum())
        changes[name] = ((pi.log() + size * step / step.norm()).softmax(0) - pi).numpy()
    return changes


def step_picture(length, right):
    changes = one_step(length, right)
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    ax = figure.subplots()
    for offset, (name, change) in zip((-0.2, 0.2), changes.items(), strict=True):
        for x, value in enumerate(1000 * change):
            at, side = (value + 0.15, "bottom") if value > 0 else (value - 0.25, "top")
            ax.text(x + offset, at, f"{value:+.2f}", ha="center", va=side, fontsize=9)
        bars = ax.bar(np.arange(3) + offset, 1000 * change, 0.38, label=name, edgecolor=BLACK, linewidth=0.5)
        for bar in bars:
            bar.set_facecolor(BLUE if name == "sum" else YELLOW)
            bar.set_hatch("" if name == "sum" else "//")
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(range(3), [f"right, {length} tokens", "wrong, 1 token", f"wrong, {length} tokens"])
    ax.set_ylim(-11, 11)
    ax.legend(frameon=False, loc="upper right")
    verdict = "rises" if changes["÷ own length"][0] > 0 else "FALLS"
    title = f"probability of the right answer {right:.2f}; divided by own length it {verdict}"
    tidy(ax, title, "", "change of probability, thousandths")
    return figure


Image(to_png(step_picture(100, 0.1)), width=760)

# %% [markdown]
# **What to see.** By the sum, the right response gains at the expense of the common wrong one. Divided by length, the
# short wrong response is punished so much harder than the long one that what it loses goes *to the long wrong one*, and
# the right one **loses** as well: to first order the update lowers the expected reward. An extreme case, made for the
# purpose. It is not possible with the sum, whose step is the gradient.
#
# **Turn it yourself.** From which length on does the expected reward fall? And for a policy that is more often right?

# %%
try:
    from ipywidgets import FloatSlider, IntSlider, interact
except ImportError:
    print("no ipywidgets here; try display(Image(to_png(step_picture(10, 0.3)), width=760))")
else:

    @interact(
        length=IntSlider(value=30, min=1, max=200, description="length", continuous_update=False),
        right=FloatSlider(value=0.1, min=0.02, max=0.9, step=0.02, description="P(right)", continuous_update=False),
    )
    def turn(length, right):
        display(Image(to_png(step_picture(length, right)), width=760))


# %% [markdown]
# What does this add up to over a training? Twenty policies of section 2, exact ascent. Step sizes are matched: the
# length-normalised update is multiplied by the mean length at the start.


# %%
def train_exactly(normalise, *, steps=60, rate=2.0):
    """Expected reward, mean length of wrong responses and of right ones, [problems, steps] each."""
    curves = []
    for seed in range(20):
        pi, reward, length = enumerable(seed)
        scale = (pi.response_probs() * length).sum()
        rows = []
        for _ in range(steps):
            p = pi.response_probs()
            expected = (p * reward).sum()
            of_wrong, of_right = (float((p * kind * length).sum() / (p * kind).sum()) for kind in (1 - reward, reward))
            rows.append((float(expected), of_wrong, of_right))
            advantage = reward - expected
            pi = pi.moved(expected_update(pi, scale * advantage / length if normalise else advantage), rate)
        curves.append(rows)
    return np.array(curves).transpose(2, 0, 1)


by_sum, by_length = train_exactly(False), train_exactly(True)

figure = Figure(figsize=(9.5, 3.4), layout="constrained")
titles = ("expected reward", "mean length of wrong responses", "mean length of right responses")
for ax, title, a, b in zip(figure.subplots(1, 3), titles, by_sum, by_length, strict=True):
    for name, values, colour, style in (("sum", a, BLUE, "-"), ("÷ own length", b, YELLOW, "-.")):
        change = values if title == "expected reward" else values - values[:, :1]
        mean, half = mean_interval(change)
        ax.plot(mean, color=colour, linestyle=style, label=name)
        ax.fill_between(range(len(mean)), mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    tidy(ax, title, "exact step", "" if title == "expected reward" else "change, tokens")
figure.axes[0].legend(frameon=False, loc="lower right")
Image(to_png(figure), width=850)

# %%
rows = []
for title, a, b in zip(titles, by_sum, by_length, strict=True):
    for step in (20, 59):
        gap = paired_difference(b[:, step] - b[:, 0], a[:, step] - a[:, 0])
        rows.append([title, step, f"{gap.estimate:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"])
show_table(["", "step", "÷ own length − sum (95 % over problems)"], rows)

# %% [markdown]
# **What to see.** The reward rises under both, and equally fast. Divided by length, what is still wrong is clearly
# longer than under the sum. What is right is shorter at first, but there the intervals of the table reach to zero. So
# "responses grow longer" need not mean that a model thinks more: with this objective, length is also what a wrong
# answer is rewarded with.

# %% [markdown]
# ## 4 · Divided by the standard deviation
#
# GRPO and CISPO also divide the advantage by the standard deviation of the group's rewards. For rewards 0 and 1 that is
# $\sqrt{p(1-p)}$, with $p$ the share of right answers. By hand, three prompts of eight responses:

# %%
by_difficulty = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in (1, 4, 7)]).flatten()
mean_only, with_std = group_mean_advantages(by_difficulty, 8), group_mean_std_advantages(by_difficulty, 8)
show_table(
    ["right of 8", "Â of a right answer", "Â of a wrong one", "with std: right", "with std: wrong", "factor"],
    [
        [k, *(f"{x[8 * i + j]:+.3f}" for x in (mean_only, with_std) for j in (0, 7)),
         f"{with_std[8 * i] / mean_only[8 * i]:.2f}"]
        for i, k in enumerate((1, 4, 7))
    ],
)  # fmt: skip

# %% [markdown]
# Within a prompt it is a factor; between prompts it changes the weights. The gradient of $p_x$ is multiplied by
# $1/\sqrt{p_x(1-p_x)}$, and that is the gradient of $2\arcsin\sqrt{p_x}$. In a group of $G$ the standard deviation is
# itself estimated, which tames the weight at the edges:


# %%
def group_weight(p, size, *, std):
    """By which factor a group of `size` multiplies ∇p, in expectation, for success probability p."""
    k = np.arange(size + 1)
    chance = np.array([math.comb(size, int(i)) for i in k]) * p**k * (1 - p) ** (size - k)
    if std:
        return (chance * np.sqrt(k * (size - k))).sum() / (size * p * (1 - p))
    return (chance * k * (size - k)).sum() / (size**2 * p * (1 - p))


grid = np.linspace(0.004, 0.996, 249)
figure = Figure(figsize=(8.5, 3.8), layout="constrained")
ax = figure.subplots()
ax.plot(grid, 1 / np.sqrt(grid * (1 - grid)), color=GREY, linewidth=1, label="1/√(p(1 − p))")
for size, style in ((4, ":"), (8, "--"), (64, "-.")):
    values = [group_weight(p, size, std=True) for p in grid]
    ax.plot(grid, values, color=BLACK, linestyle=style, label=f"with std, G = {size}")
ax.plot(grid, [group_weight(p, 8, std=False) for p in grid], color=BLUE, label="mean only, G = 8")
ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
ax.set(ylim=(0, 8))
ax.legend(frameon=False, ncols=2, loc="upper center")
tidy(ax, "", "probability p of a right answer", "weight of the prompt's ∇p")
Image(to_png(figure), width=760)

# %% [markdown]
# **What to see.** With the mean only, every prompt's gradient counts alike (the factor $(G-1)/G$ comes from being part
# of one's own baseline). With the standard deviation, prompts that are nearly always right or nearly always wrong count
# more, several times more in large groups. What is optimised is then no longer the mean score. Whether one *wants* to
# favour the nearly hopeless and the nearly solved is a choice; the expected reward, which the paper optimises, does not
# make it.

# %% [markdown]
# {exercise} 05.3
# From `rewards` `[B]`, grouped by prompt, return two tensors `[B]`: MiniRL's advantages, and GRPO's (standard deviation
# of the group itself, plus `1e-6`).


# %%
def two_advantages(rewards, group_size):
    # solution
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    return centred.flatten(), (centred / (std + 1e-6)).flatten()
    # end


check("05.3", two_advantages)

# %% [markdown]
# ## 5 · Three algorithms, one batch
#
# Now let $\theta$ move, so that ratios differ from 1, and let the sampler differ from the trainer. One batch by hand: a
# right response of four tokens and a wrong one of two. Its ratios cover the cases: unmoved, moved far along the push,
# moved against it, and a discrepancy.

# %%
hand_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
hand_rewards = torch.tensor([1.0, 0.0])
old = torch.tensor([[0.50, 0.30, 0.40, 0.08], [0.40, 0.50, 1.00, 1.00]])
ratio = torch.tensor([[1.00, 1.50, 0.70, 1.00], [0.70, 1.40, 1.00, 1.00]])  # π_θ/π_old
sampler = torch.tensor([[0.50, 0.30, 0.40, 0.01], [0.40, 0.50, 1.00, 1.00]])  # μ_old
plain, standard = group_mean_advantages(hand_rewards, 2), group_mean_std_advantages(hand_rewards, 2)


def hand_push(loss_of):
    logp = (old * ratio).log().requires_grad_()
    loss_of(logp).backward()
    return -logp.grad + 0.0


hand = {
    "MiniRL": hand_push(lambda x: minirl_loss(x, old.log(), sampler.log(), plain, hand_mask).loss),
    "GRPO": hand_push(lambda x: grpo_loss(x, old.log(), standard, hand_mask).loss),
    "CISPO": hand_push(lambda x: cispo_loss(x, old.log(), standard, hand_mask).loss),
}
cases = [
    "unmoved",
    "far along its push",
    "against its push",
    "sampler 8× rarer",
    "far along its push",
    "against its push",
]
show_table(
    ["response", "token", "what happened", "π_θ/π_old", "π_old/μ_old", *hand],
    [
        [("right", "wrong")[b], t + 1, case, f"{ratio[b, t]:.2f}", f"{(old / sampler)[b, t]:.2f}",
         *(f"{values[b, t]:+.3f}" for values in hand.values())]
        for (b, t), case in zip(hand_mask.nonzero().tolist(), cases, strict=True)
    ],
)  # fmt: skip

# %% [markdown]
# Row by row. *Unmoved*: three different numbers for the same token, from divisors (2 responses; 4 tokens of 2
# responses; 6 tokens) and from the standard deviation, which doubles both of the others here. *Far along its push*:
# MiniRL and GRPO let go (0), CISPO keeps pushing. *Against its push*: all three keep the gradient, or the token would
# never come back. *Sampler 8× rarer*: only MiniRL sees $\mu_{old}$ at all, and counts the token 5 times, its cap.
#
# The same as functions of the ratio, without the divisors:

# %%
ratios = torch.linspace(0.05, 6, 400)[None]
everything = torch.ones_like(ratios).bool()
figure = Figure(figsize=(9.5, 3.6), layout="constrained")
for ax, a in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
    sign = torch.tensor([a])
    for name, colour, style, loss_of in (
        ("MiniRL", BLUE, "-", lambda x, z, s: minirl_loss(x, z, z, s, everything).loss),
        ("GRPO", BLACK, "--", lambda x, z, s: grpo_loss(x, z, s, everything).loss),
        ("CISPO", GREY, ":", lambda x, z, s: cispo_loss(x, z, s, everything).loss),
    ):
        logp_old = torch.full_like(ratios, -3.0)
        logp = (logp_old + ratios.log()).requires_grad_()
        loss = loss_of(logp, logp_old, sign)
        per_token = 1 if name == "MiniRL" else ratios.numel()  # take the divisor out
        pull = -torch.autograd.grad(loss, logp)[0][0] * per_token
        ax.plot(ratios[0], pull, color=colour, linestyle=style, linewidth=2 if name == "CISPO" else 1.6, label=name)
    ax.axhline(0, color="#cccccc", linewidth=0.8)
    tidy(ax, f"Â = {'+' if a > 0 else '−'}1, no discrepancy", "r = π_θ/π_old", "coefficient of ∇log π_θ")
figure.axes[0].legend(frameon=False)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left, a token that is pushed up: MiniRL and GRPO stop soon above 1 (their $\varepsilon_{high}$ differ
# a little), CISPO goes on and only stops *growing* at 5. Right, a token that is pushed down: MiniRL and GRPO stop below
# 0.8. Above 1 all three push the harder the further it went the wrong way; MiniRL and CISPO up to 5, GRPO without end.
#
# Now write the three. Below, `logp` is $\log\pi_\theta$ `[B, T]` with gradient, the others are without; `advantages` is
# `[B]`; return the scalar loss.

# %% [markdown]
# {exercise} 05.4
# MiniRL, equation (7): $\varepsilon_{low}=0.2$, $\varepsilon_{high}=0.27$, cap 5.


# %%
def loss_of_minirl(logp, logp_old, logp_rollout, advantages, mask):
    # solution
    a = advantages[:, None]
    r = (logp - logp_old).detach().exp()
    weight = (logp - logp_rollout).detach().exp().clamp(max=5)
    dropped = ((a > 0) & (r > 1.27)) | ((a < 0) & (r < 0.8))
    return -(weight * a * logp * ~dropped * mask).sum() / len(logp)
    # end


check("05.4", loss_of_minirl)

# %% [markdown]
# {exercise} 05.5
# GRPO: $\frac1B\sum_b\frac1{|y_b|}\sum_t\min(r\hat A,\ \mathrm{clip}(r,0.8,1.2)\hat A)$, as a loss.


# %%
def loss_of_grpo(logp, logp_old, advantages, mask):
    # solution
    a = advantages[:, None]
    r = (logp - logp_old).exp()
    surrogate = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    return -((surrogate * mask).sum(1) / mask.sum(1)).mean()
    # end


check("05.5", loss_of_grpo)

# %% [markdown]
# {exercise} 05.6
# CISPO: $\frac1{\sum|y_b|}\sum_b\sum_t\mathrm{sg}[\mathrm{clip}(r,0,5)]\,\hat A\log\pi_\theta$, as a loss.


# %%
def loss_of_cispo(logp, logp_old, advantages, mask):
    # solution
    weight = (logp - logp_old).detach().exp().clamp(0, 5)
    return -(weight * advantages[:, None] * logp * mask).sum() / mask.sum()
    # end


check("05.6", loss_of_cispo)

# %% [markdown]
# ## 6 · Micro-batches and global divisors
#
# A mini-batch seldom fits into memory at once. It is cut, and gradients add up. They add up to the gradient of the
# whole only if every part is divided by the *whole* batch's count. The batch of section 1, cut into a short and a long
# half:

# %%
short_half, long_half = [0, 2], [1, 3]
whole = pushes["÷ tokens of the batch (CISPO)"]
tokens_in_all = int(mask.sum())


def half_push(rows, num_tokens):
    logp = flat[rows].clone().requires_grad_()
    cispo_loss(logp, flat[rows], advantages[rows], mask[rows], num_tokens=num_tokens).loss.backward()
    return -logp.grad


rows = []
for name, half in (("short", short_half), ("long", long_half)):
    divided_globally, divided_locally = half_push(half, tokens_in_all), half_push(half, None) / 2
    torch.testing.assert_close(divided_globally, whole[half])
    rows.append(
        [
            f"{name} half, right",
            f"{whole[half[0], 0]:+.4f}",
            f"{divided_globally[0, 0]:+.4f}",
            f"{divided_locally[0, 0]:+.4f}",
        ]
    )
show_table(["a token of the", "in one piece", "in parts, global divisor", "in parts, mean of local means"], rows)

# %% [markdown]
# With the global divisor nothing changes. With the mean of local means a token in the short half counts several times
# as much as one in the long half: cutting by length, which saves padding and which the library does, brings back length
# normalisation through the back door. MiniRL has the same trap with responses: divide by $B$, not by the part's $b$.

# %% [markdown]
# {exercise} 05.7
# `micro_batches` is a list of `(terms, mask)`, `[b, T]` each, `terms` being weight × Â × log π. Return a list with one
# loss for each, such that their sum is the loss of the whole batch under the **token mean**. (Padding is finite here.)


# %%
def losses_of_parts(micro_batches):
    # solution
    tokens = sum(int(mask.sum()) for _, mask in micro_batches)
    return [-(terms * mask).sum() / tokens for terms, mask in micro_batches]
    # end


check("05.7", losses_of_parts)

# %% [markdown]
# ## 7 · What our runs show
#
# First a measurement on the tiny model. One on-policy batch of the reproduction's mix (a quarter of the problems longer
# than the cold start has seen), and the gradient of all parameters under each divisor:

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"), hard_fraction=0.25)


def batch_of(seed, prompts=64):
    """Responses of the model itself in full precision, their layout, rewards and advantages."""
    problems = task.sample(prompts, seed=seed)
    rollout = HFEngine(model).generate(
        [task.encode(p) for p in problems], group_size=8, sampling=Sampling(task.max_new_tokens), seed=seed
    )
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    rewards = torch.tensor([task.reward(problems[i // 8], text) for i, text in enumerate(texts)])
    return rollout, rewards


def parameter_gradient(rollout, loss_of):
    policy = copy.deepcopy(model)
    logp = response_logprobs(policy, lay_out(rollout, share_prompts=True)).logp
    loss_of(logp, rollout.response_mask).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def gradients_of(seed):
    rollout, rewards = batch_of(seed)
    plain, standard = group_mean_advantages(rewards, 8), group_mean_std_advantages(rewards, 8)
    losses = {
        "sum (MiniRL)": lambda x, m: minirl_loss(x, x.detach(), x.detach(), plain, m).loss,
        "÷ own length": lambda x, m: minirl_loss(x, x.detach(), x.detach(), plain, m, length_norm=True).loss,
        "÷ own length, ÷ std (GRPO)": lambda x, m: grpo_loss(x, x.detach(), standard, m).loss,
        "÷ tokens, ÷ std (CISPO)": lambda x, m: cispo_loss(x, x.detach(), standard, m).loss,
    }
    return rollout, rewards, {name: parameter_gradient(rollout, loss) for name, loss in losses.items()}


rollout, rewards, first = gradients_of(0)
_, _, second = gradients_of(1)
sum_name = "sum (MiniRL)"
show_table(
    ["gradient", "cosine with the sum's, same batch", "with the sum's of another batch"],
    [
        [name, f"{cosine(g, first[sum_name]):.3f}", f"{cosine(g, second[sum_name]):.3f}"]
        for name, g in first.items()
    ],
)  # fmt: skip

# %%
lengths = rollout.response_mask.sum(1).float().view(-1, 8)
print(f"lengths: mean {lengths.mean():.1f} tokens, standard deviation {lengths.std():.1f}")
print(f"  between prompts {lengths.mean(1).std():.1f}, within a group {lengths.std(1).mean():.1f}")
mixed = rewards.view(-1, 8).std(1) > 0
solved = rewards.view(-1, 8).mean(1)
short = lengths.mean(1) < lengths.mean()
for name, which in (("short", short), ("long", ~short)):
    print(f"  prompts with {name} answers: {solved[which].mean():.0%} of the responses are right")
print(f"{int(mixed.sum())} of {len(mixed)} groups are mixed, the others have no gradient")

# %% [markdown]
# **What to see.** The divisors turn the gradient, but less than the luck of the batch does: the last column is what two
# samples have in common. In this pair of batches the gradients divided by own length even have *more* in common with
# the other batch's sum than the sum itself has. One pair is a lead and no result, but there is a reason: a sum over
# long responses is a noisier number. And in this task the length belongs to the problem: two tokens for each step.
# Within a group lengths do not differ, so the bias of section 3, between answers to one prompt, has nothing to act on.
# What remains is a weight between prompts: those with long answers, the harder ones, count less per token.
#
# The stored runs then. The paper finds length normalisation stable and about three points worse (claim F1b). Ours,
# on-policy:

# %%
RUNS = checkout() / "lessons" / "results" / "runs" / "full"
DEFINITIONS = load_spec().definitions


def stored(setting, **variants):
    """The stored runs by label, for the seeds that all of the variants have; empty lists where one is missing."""
    found = read_runs(RUNS / setting)
    runs = {label: found.get(variant, {}) for label, variant in variants.items()}
    seeds = sorted(set.intersection(*map(set, runs.values())))
    return {label: [own[seed] for seed in seeds] for label, own in runs.items()}


def compare_runs(runs, reference):
    """Final scores, lengths and collapses, each against the reference over the same seeds."""
    rows = []
    final = {
        label: np.array([100 * summary(run, DEFINITIONS)["final_score"] for run in own]) for label, own in runs.items()
    }
    for label, own in runs.items():
        gap = paired_difference(final[label], final[reference])
        length = np.mean([np.nanmean(run.metrics["response_length"][-50:]) for run in own])
        rows.append(
            [label, len(own), f"{final[label].mean():.1f}", f"{length:.2f}",
             sum(summary(run, DEFINITIONS)["collapsed"] for run in own),
             "" if label == reference else f"{gap.estimate:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"]
        )  # fmt: skip
    header = ["", "seeds", "final score, points", "response length, end", "collapsed", f"score − {reference} (95 %)"]
    show_table(header, rows)
    for label in runs:
        gap = paired_difference(final[label], final[reference])
        if label != reference:
            verdict = "higher than" if gap.low > 0 else "lower than" if gap.high < 0 else "not told apart from"
            display(Markdown(f"{label}: **{verdict} {reference}** in this setting (the paper: lower)"))


figure_one = stored("on_policy", **{"MiniRL": "minirl", "+ length norm": "length_norm"})
four_curves({label: [run.metrics for run in own] for label, own in figure_one.items()})

# %%
compare_runs(figure_one, "MiniRL")

# %% [markdown]
# **What to see.** Both learn, neither collapses. The interval of the difference reaches well to both sides of zero:
# these runs cannot tell the two apart, in either direction, and the verdict in
# [CLAIMS.md](../lessons/results/CLAIMS.md) is "inconclusive". The response length is the same: here it is no choice of
# the policy. So our runs do not contradict the paper's three points, and do not show them.
#
# Appendix A of the paper compares MiniRL with GRPO and CISPO (claim A1). Its runs, as far as they are stored:

# %%
for setting, reference, variant in (("on_policy", "MiniRL", "minirl"), ("n2", "R2", "r2")):
    for label, name in (("GRPO", "grpo"), ("CISPO", "cispo")):
        runs = stored(setting, **{reference: variant, label: name})
        if len(runs[label]) < 2:
            missing = f"**{setting}**: {label} has not been run yet; make it with"
            display(Markdown(f"{missing} `minirl reproduce appendix --tier full`"))
            continue
        display(Markdown(f"**{setting}**: {label} and {reference}, the seeds that both have"))
        compare_runs(runs, reference)

# %% [markdown]
# Where a table stands, read its last column: an interval that does not contain 0 tells the two apart in this setting,
# on this task; one that does leaves it open. (`on_policy`: one update per rollout; `n2`: two, with R2 as the paper's
# reference.) GRPO and CISPO differ from MiniRL in several things at once, the divisor, the standard deviation, the
# clip, and the train–inference weight that both lack. Lab 03 shows what leaving out that weight alone does here, so a
# difference in this table is no verdict on the divisor. Where a line says that runs are missing, nothing is claimed.
#
# **Try this**
#
# 1. In section 3, `right = 0.5`: how long must the long answers be for the expected reward to fall? Is it possible at
#    all?
# 2. In section 6 cut the batch into right and wrong answers instead. Which half does the mean of local means favour?
# 3. In section 7 write a task whose answers to one prompt differ in length, and measure the cosines again.
#
# Back to the [lesson](../lessons/05_length_norm.md), for the proofs and for what to remember.
