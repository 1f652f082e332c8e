# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # MiniRL end to end: the paper's four curves
#
# The lesson with the derivations: [`lessons/08_minirl.md`](../lessons/08_minirl.md).
#
# **A picture to keep: four instruments in a cockpit.** Altitude (the held-out score), climb (the training reward),
# fuel (the token entropy), and two compasses that should agree (the training–inference KL). No needle says by itself
# that all is well. And nobody judges an aeroplane by one flight.
#
# What you will do: walk through one global step with toy weights; build the whole loop from five pieces of the library
# and train with it; forget the sync on purpose and see which needle moves; hand the loop to the trainer and watch four
# live curves; then read the stored runs of the reproduction, seed by seed, and say what they show and what they do not.

# %%
import copy
import math
import re
import tempfile

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check, checkout, pick
from minirl_edu.course.unit08 import ToyLoop
from minirl_edu.diagnostics import kl_k1, kl_k3, masked_mean
from minirl_edu.experiments.spec import load_spec, read_runs
from minirl_edu.experiments.statistics import equivalent, paired_difference, summary, t_quantile
from minirl_edu.logprobs import can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import METHOD_STYLE, four_curves, to_png
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling, sample
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

logging.disable_progress_bar()
torch.set_num_threads(1)

BLUE, ORANGE, GREEN, PURPLE = (METHOD_STYLE[name]["color"] for name in ("MiniRL", "− IS", "R3", "no clipping"))


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def axes_of(figure, columns, **options):
    """Plain axes in one row."""
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return axes


# %% [markdown]
# ## 1 · One global step, in order
#
# Counting first. A gradient step uses $mbs = P\cdot G$ responses ($P$ prompts, $G$ responses each). A global step makes
# $N$ gradient steps out of one rollout:
#
# $$gbs = N\cdot mbs \tag{08.1}$$

# %%
show_table(
    ["", "prompts P", "G", "mbs", "N", "gbs", "rollouts for 800 gradient steps"],
    [
        [name, p, g, p * g, n, n * p * g, 800 // n]
        for name, p, g in (("paper", 64, 16), ("here", 16, 8))
        for n in (1, 2, 4, 8)
    ],
)

# %% [markdown]
# The mini-batch keeps its size. What grows with $N$ is the rollout, and with it the **age** of what is learned from:
# the $n$-th mini-batch is used by weights that are $n - 1$ updates ahead of those that sampled it.


# %%
def age_figure(counts, steps=16):
    """How many updates old the rollout is, at each gradient step; a dot where the engine was synced."""
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    for ax, n in zip(axes_of(figure, len(counts), sharey=True), counts, strict=True):
        at = np.arange(steps)
        ax.bar(at, at % n, width=0.8, color=BLUE)
        ax.plot(at[at % n == 0], np.full(len(at[at % n == 0]), -0.45), "o", color=ORANGE, markersize=5)
        ax.set(xlabel="gradient step", title=f"N = {n}", ylim=(-0.9, max(counts) - 0.5), xticks=range(0, steps, 4))
    figure.axes[0].set_ylabel("updates since\nthe rollout")
    return figure


Image(to_png(age_figure([1, 2, 4, 8])), width=850)

# %% [markdown]
# **What to see.** A dot is a new rollout, right after a sync. For $N = 1$ no bar rises: on-policy, every update uses
# what the very same weights sampled. For $N = 8$ the last update of each rollout uses responses that are seven
# updates old. The *average* age is $(N-1)/2$.
#
# The order inside a step matters as much. `ToyLoop` is a trainer and an engine whose "weights" are nothing but a
# version number. It writes down who used which.

# %%
toy = ToyLoop(responses=4)
print("the engine samples with version", toy.engine, "->", toy.sample())
print("π_old of two responses, now    ", toy.old_logprobs(["y0", "y1"]))
toy.update(["y0", "y1"], (("y0", "y1"), 0))
print("after an update: trainer", toy.theta, "engine", toy.engine)
print("π_old of the others, too late  ", toy.old_logprobs(["y2", "y3"]), "<- version 1 is not θ_old")

# %% [markdown]
# {exercise} 08.1
#
# Write one global step: `loop.sample()`, `loop.split(responses, mini_batches)`, `loop.old_logprobs(mini_batch)`,
# `loop.update(mini_batch, logp_old)`, `loop.sync()`, each as often as needed and in the right order.


# %%
def one_global_step(loop, mini_batches):
    # solution
    parts = loop.split(loop.sample(), mini_batches)
    old = [loop.old_logprobs(part) for part in parts]
    for part, logp_old in zip(parts, old, strict=True):
        loop.update(part, logp_old)
    loop.sync()
    # end


check("08.1", one_global_step)

# %% [markdown]
# ## 2 · The loop by hand
#
# Now with a real model. Five pieces, each from an earlier unit, make the whole of
#
# $$\mathcal J(\theta) = \mathbb E_{y\sim\mu_{old}}\Big[\sum_t M_t\,
# \mathrm{sg}\Big[\min\Big(\frac{\pi_\theta(y_t)}{\mu_{old}(y_t)},\, 5\Big)\Big]\,\hat A\,\log\pi_\theta(y_t)\Big]
# \tag{7}$$
#
# The engine rounds its weights to 4-bit integers at random, with other draws at every sync, as in the reproduction.
# $N = 1$, so $\pi_{old}$ is the update's own forward, detached.

# %%
base = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"), hard_fraction=0.25)
sampling = Sampling(max_new_tokens=task.max_new_tokens)
share = can_share_prompts(base)
PROMPTS, GROUP_SIZE, LR = 16, 8, 4e-4
WARMUP = pick(fast=4, full=20)  # the first updates of Adam are full steps whatever the gradient: begin with small ones
EVERY = pick(fast=4, full=8)  # gradient steps between evaluations
INT4 = Precision.parse("int4", "stochastic")


def hand_step(policy, optimizer, engine, step, *, sync=True):
    """One on-policy global step; returns the numbers of its four curves."""
    # 1. sample: the engine draws, a program rewards, the group's mean is taken off
    problems = task.sample(PROMPTS, seed=derive_seed(0, "problems", step))
    prompts = [task.encode(problem) for problem in problems]
    rollout = engine.generate(prompts, group_size=GROUP_SIZE, sampling=sampling, seed=derive_seed(0, "rollout", step))
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    rewards = torch.tensor([task.reward(problems[i // GROUP_SIZE], text) for i, text in enumerate(texts)])
    advantages = group_mean_advantages(rewards, GROUP_SIZE)
    # 2. and 3. π_θ, and π_old, which is the same numbers without gradient; then the update
    output = response_logprobs(policy, lay_out(rollout, share_prompts=share))
    logp_old, mask = output.logp.detach(), rollout.response_mask
    minirl_loss(output.logp, logp_old, rollout.logp_rollout, advantages, mask).loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP)
    optimizer.step()
    optimizer.zero_grad()
    # 4. sync
    if sync:
        engine.sync(policy, version=step + 1)
    return {
        "global_step": step + 1,
        "grad_step": step + 1,
        "reward": rewards.mean().item(),
        "entropy": masked_mean(output.entropy, mask).item(),
        "kl_rollout_old": kl_k1(rollout.logp_rollout, logp_old, mask).item(),
        "k3_rollout_old": kl_k3(rollout.logp_rollout, logp_old, mask).item(),
        "grad_norm": grad_norm.item(),
    }


# %% [markdown]
# Two scores on problems that training never draws: by the training engine in full precision, and through the engine
# that will be deployed. Same problems, same seed.

# %%
unseen = task.evaluation(pick(fast=128, full=256))


def two_scores(policy, engine):
    prompts = [task.encode(problem) for problem in unseen]
    seed = derive_seed(0, "evaluation")
    exact = sample(policy, prompts, group_size=1, sampling=sampling, seed=seed)
    deployed = engine.generate(prompts, group_size=1, sampling=sampling, seed=seed)
    scores = {}
    for name, rollout in (("score", exact), ("score_rollout", deployed)):
        texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        scores[name] = sum(map(task.reward, unseen, texts)) / len(texts)
    return scores


def by_hand(steps, *, sync=True):
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    engine = HFEngine(policy, INT4)
    lines = [{"global_step": 0, "grad_step": 0, **two_scores(policy, engine)}]
    for step in range(steps):
        lines.append(hand_step(policy, optimizer, engine, step, sync=sync))
        if (step + 1) % EVERY == 0:
            lines[-1] |= two_scores(policy, engine)
    return lines


def as_run(lines):
    """A column for each name, NaN where there is no number: what the figures take."""
    names = {name: None for line in lines for name, value in line.items() if isinstance(value, int | float)}
    return {name: np.array([line.get(name, math.nan) for line in lines], dtype=float) for name in names}


HAND_STEPS = pick(fast=12, full=48)
hand = by_hand(HAND_STEPS)
four_curves({"MiniRL": as_run(hand)})

# %% [markdown]
# **What to see.** Thirty lines of code that learn. Score: two lines, the faint one through the 4-bit engine. Reward:
# every step draws other problems, so it trembles (where a run is long enough, the thick line is a running mean and the
# faint one each step). Entropy: falls once the learning rate is up. KL: it grows, and it is the noisiest of the four.
#
# **The same loop with one line missing.** `sync=False`: nothing raises, the loss is computed, the optimizer steps.

# %%
forgotten = by_hand(HAND_STEPS, sync=False)


def needles(runs, keys):
    """Some metrics of several runs, a panel each."""
    figure = Figure(figsize=(8.5, 2.9), layout="constrained")
    for ax, (key, label) in zip(axes_of(figure, len(keys)), keys.items(), strict=True):
        for (name, lines), color, style in zip(runs.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
            run = as_run(lines)
            known = np.isfinite(run[key])
            steps, values = run["grad_step"][known], run[key][known]
            if key == "k3_rollout_old":  # trembles: a running mean over five steps, each step faintly
                ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
                steps, values = steps[2:-2], np.convolve(values, np.full(5, 0.2), "valid")
            ax.plot(steps, values, style, color=color, linewidth=1.9, label=name)
        ax.set_title(label, loc="left", fontsize=11)
        ax.set_xlabel("gradient step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.axes[0].set_yscale("log")
    figure.axes[0].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


names = {"k3_rollout_old": "KL (k3), nats per token", "entropy": "entropy, nats", "score": "score, full precision"}
Image(to_png(needles({"synced": hand, "sync forgotten": forgotten}, names)), width=850)

# %%
last = slice(-max(4, HAND_STEPS // 4), None)
growth = [np.mean(as_run(lines)["k3_rollout_old"][last]) for lines in (hand, forgotten)]
print(f"KL over the last steps: {growth[0]:.4f} synced, {growth[1]:.4f} forgotten ({growth[1] / growth[0]:.0f} times)")

# %% [markdown]
# **What to see.** Each step's KL (faint) trembles, and the axis is logarithmic; but the dashed mean climbs away, to
# several times the other (printed). The "engine" is now an old policy, and the KL measures how far training has moved
# from it. The entropy begins to jump: it is that of $\pi_\theta$ on responses that an ever older policy drew. The
# score shows nothing yet. The importance weights correct for the old sampler as long as they can, within their cap
# and at the price of variance. So the score would not have told us, and the KL did. In a real engine the same picture
# comes from a cache that outlived the sync, from weights that arrived under another name, or from a server that was
# restarted.

# %% [markdown]
# {exercise} 08.2
#
# Write the sync of a toy engine that computes in quarters. `engine.weights` must become the given `weights`, rounded by
# `torch.round(weights * 4) / 4`; `engine.cache` (a dict) remembers answers of the old weights; `engine.version` says
# which weights it holds. `weights` is the trainer's own tensor, and the trainer goes on using it.


# %%
def push_weights(engine, weights, version):
    # solution
    engine.weights = torch.round(weights * 4) / 4
    engine.cache.clear()
    engine.version = version
    # end


check("08.2", push_weights)

# %% [markdown]
# ## 3 · Micro-batches that add up
#
# Long responses do not fit in one forward. The mini-batch is cut, and the gradients of the parts are added:
#
# $$-\frac1B\sum_{b=1}^{B}\ell_b = \sum_m\Big(-\frac1B\sum_{b\in m}\ell_b\Big) \tag{08.3}$$
#
# The divisor of every part is $B$, the number of responses in the **whole** mini-batch. By hand, with three responses
# whose summed token terms $\ell$ are 1, 2 and 6, cut into the first two and the last:

# %%
ell = torch.tensor([1.0, 2.0, 6.0])
parts = [ell[:2], ell[2:]]
print("whole                           ", -ell.mean().item())
print("parts, divided by 3, added      ", -sum(part.sum() / 3 for part in parts).item())
print("parts, each its own mean, added ", -sum(part.mean() for part in parts).item())
print("mean of the parts' means        ", -(sum(part.mean() for part in parts) / 2).item())

# %% [markdown]
# On the model: one rollout, its gradient with everything in one forward, and cut by two budgets of tokens.
# `micro_batches` sorts responses by length, so that little of a part is padding.

# %%
engine = HFEngine(base, INT4)
problems = task.sample(PROMPTS, seed=11)
rollout = engine.generate([task.encode(p) for p in problems], group_size=GROUP_SIZE, sampling=sampling, seed=11)
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
rewards = torch.tensor([task.reward(problems[i // GROUP_SIZE], text) for i, text in enumerate(texts)])
advantages = group_mean_advantages(rewards, GROUP_SIZE)


def gradient(budget, *, global_divisor):
    """The whole gradient as one vector, accumulated over micro-batches of at most `budget` token slots."""
    base.zero_grad()
    cuts = micro_batches(rollout, budget, share_prompts=share)
    for rows, part, layout in cuts:
        logp = response_logprobs(base, layout).logp
        loss = minirl_loss(
            logp, logp.detach(), part.logp_rollout, advantages[rows], part.response_mask,
            num_responses=len(advantages) if global_divisor else None,
        ).loss  # fmt: skip
        (loss if global_divisor else loss / len(cuts)).backward()
    flat = torch.cat([p.grad.flatten() for p in base.parameters() if p.grad is not None])
    base.zero_grad()
    return flat, [len(rows) for rows, _, _ in cuts]


whole, _ = gradient(10**9, global_divisor=True)
cut_rows = []
for budget in (1000, 400, 150):
    for global_divisor in (True, False):
        cut, sizes = gradient(budget, global_divisor=global_divisor)
        error = ((cut - whole).norm() / whole.norm()).item()
        kind = "÷ all responses, added" if global_divisor else "mean of means"
        cut_rows.append([budget, len(sizes), f"{min(sizes)} to {max(sizes)}", kind, f"{error:.1e}"])
show_table(["token budget", "parts", "responses in a part", "how", "relative error of the gradient"], cut_rows)

# %% [markdown]
# With the global divisor the cut is invisible, up to the order of fp32 sums. With a mean of means the gradient
# depends on how much memory the machine has.

# %% [markdown]
# {exercise} 08.3
#
# `batches` is a list of micro-batches of one mini-batch, each a tuple
# `(logp, logp_old, logp_rollout, advantages, mask)` as `minirl_loss` takes them. Return the list of their losses,
# such that the **sum** is the loss of the mini-batch.


# %%
def micro_batch_losses(batches):
    # solution
    responses = sum(len(batch[0]) for batch in batches)
    return [minirl_loss(*batch, num_responses=responses).loss for batch in batches]
    # end


check("08.3", micro_batch_losses)

# %% [markdown]
# ## 4 · Entropy, and why it falls
#
# $$H = -\sum_w \pi(w)\log\pi(w), \qquad
# \Delta H = -\eta\,\mathrm{Cov}_{a\sim\pi}\big(\log\pi(a),\,\pi(a)A_a\big) + O(\eta^2) \tag{08.4, 08.6}$$
#
# Five words, one of them right. The policy gradient moves the logit of word $a$ by $\eta\,\pi(a)A_a$, with
# $A_a = R_a - \sum_w\pi(w)R_w$. Whether the entropy falls or rises depends on *which* word is right.

# %%
LOGITS = torch.tensor([2.0, 1.0, 0.3, -0.4, -1.2])


def nudge(right, step):
    """Probabilities before and after a step of the expected policy gradient, and what (08.6) predicts for H."""
    pi = LOGITS.softmax(-1)
    reward = torch.eye(5)[right]
    push = pi * (reward - pi @ reward)
    after = (LOGITS + step * push).softmax(-1)
    predicted = -step * ((pi * pi.log() * push).sum() - (pi * pi.log()).sum() * (pi * push).sum())
    entropies = [-(p * p.log()).sum().item() for p in (pi, after)]
    return pi, after, entropies, predicted.item()


def nudge_figure(cases):
    figure = Figure(figsize=(8.5, 2.9), layout="constrained")
    for ax, (right, step) in zip(axes_of(figure, len(cases), sharey=True), cases, strict=True):
        before, after, (h0, h1), predicted = nudge(right, step)
        at = np.arange(5)
        ax.bar(at - 0.2, before, 0.4, color="#c8c8c8", label="before")
        ax.bar(at + 0.2, after, 0.4, color=[GREEN if i == right else BLUE for i in at], label="after")
        ax.set_title(f"word {right + 1} is right, step {step:g}\nH {h0:.3f} → {h1:.3f}, by (08.6) {predicted:+.3f}",
                     loc="left", fontsize=10)  # fmt: skip
        ax.set(xticks=at, xticklabels=at + 1, xlabel="word")
    figure.axes[0].set_ylabel("probability (grey: before)")
    return figure


Image(to_png(nudge_figure([(0, 2.0), (2, 2.0), (4, 2.0)])), width=850)

# %% [markdown]
# **What to see.** Green is the right word. Left: the likeliest word is right, it becomes likelier, and the entropy
# falls. Right: the unlikeliest word is right. It is drawn so rarely that its own bar hardly moves; what is taken from
# the others flattens the distribution, and the entropy rises. A trained model's likely words are mostly right, so the
# left panel is the rule, and the entropy curve falls. A step in which *no* confident word was punished and many were
# praised is a cliff.

# %%
try:
    from ipywidgets import FloatSlider, ToggleButtons, interact
except ImportError:
    print("no ipywidgets here; try nudge_figure([(1, 5.0)])")
else:

    @interact(
        right=ToggleButtons(options=[(f"word {i + 1}", i) for i in range(5)], value=1, description="right"),
        step=FloatSlider(value=4.0, min=0.0, max=20.0, step=0.5, continuous_update=False),
    )
    def turn(right, step):
        display(Image(to_png(nudge_figure([(right, step)])), width=500))


# %% [markdown]
# {exercise} 08.4
#
# The curve itself. `logits` is `[B, T, V]`, `mask` is `[B, T]`, tokens were drawn from softmax(logits / temperature).
# Return the mean entropy of that policy over the response tokens, in nats.


# %%
def mean_token_entropy(logits, mask, temperature):
    # solution
    logp = (logits / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)[mask].mean()
    # end


check("08.4", mean_token_entropy)

# %% [markdown]
# ## 5 · Two KL estimates, k1 and k3
#
# $$k_1 = \log\mu_{old}(y_t) - \log\pi_{old}(y_t), \qquad k_3 = r - 1 - \log r, \quad r = \pi_{old}/\mu_{old}
# \tag{08.7, 08.8}$$
#
# Both have the KL for a mean. On four tokens, by hand:

# %%
mu = torch.tensor([[0.50, 0.40, 0.90, 0.20]])
pi = torch.tensor([[0.45, 0.44, 0.88, 0.25]])
k1 = mu.log() - pi.log()
k3 = pi / mu - 1 - (pi / mu).log()
show_table(
    ["token", "μ_old", "π_old", "k1", "k3"],
    [[t + 1, f"{mu[0, t]:.2f}", f"{pi[0, t]:.2f}", f"{k1[0, t]:+.4f}", f"{k3[0, t]:.4f}"] for t in range(4)]
    + [["mean", "", "", f"{k1.mean():+.4f}", f"{k3.mean():.4f}"]],
)

# %% [markdown]
# Two of four $k_1$ are negative, and here even their mean is. How bad is that with as many tokens as a training step
# has? Two engines, a fine one (bf16) and one in 8 bits; the spread of means over $n$ tokens is that of one token over
# $\sqrt n$:

# %%
many = [task.encode(p) for p in task.sample(pick(fast=96, full=192), seed=5)]


def kl_terms(precision):
    """k1 and k3 of every response token that this engine drew."""
    drawn = HFEngine(base, Precision.parse(precision)).generate(many, group_size=GROUP_SIZE, sampling=sampling, seed=5)
    with torch.no_grad():
        own = response_logprobs(base, lay_out(drawn, share_prompts=share)).logp
    log_ratio = (own - drawn.logp_rollout)[drawn.response_mask].double().numpy()
    return {"k1": -log_ratio, "k3": np.expm1(log_ratio) - log_ratio}


engines = {precision: kl_terms(precision) for precision in ("bf16", "int8")}
SIZES = np.array([30, 100, 300, 1000, 3000])


def noise_figure(engines):
    """Mean ± 1.96 standard deviations of a mean over n tokens."""
    figure = Figure(figsize=(8.5, 3.3), layout="constrained")
    for ax, (precision, terms) in zip(axes_of(figure, len(engines)), engines.items(), strict=True):
        kl = terms["k3"].mean()
        for (name, values), color in zip(terms.items(), (BLUE, GREEN), strict=True):
            half = 1.96 * values.std() / np.sqrt(SIZES)
            ax.fill_between(SIZES, kl - half, kl + half, color=color, alpha=0.3, label=f"means of {name}, 95 %")
        for sign in (-1, 1):
            band = kl + sign * 1.96 * np.sqrt(2 * kl / SIZES)
            ax.plot(SIZES, band, ":", color=ORANGE, label="predicted for k1 by (08.9)" if sign > 0 else None)
        ax.axhline(kl, color="#222222", linewidth=1, label="KL")
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(xscale="log", xlabel="tokens n")
        ax.set_title(precision, loc="left", fontsize=11)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.axes[0].set_ylabel("nats per token")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    return figure


Image(to_png(noise_figure(engines)), width=850)

# %%
rows = []
for precision, terms in engines.items():
    kl, spread = terms["k3"].mean(), {name: values.std() for name, values in terms.items()}
    largest = np.sort(terms["k3"])[-10:].sum() / terms["k3"].sum()
    needed = 2 / kl
    rows.append(
        [precision, f"{kl:.1e}", f"{spread['k1'] ** 2 / (2 * kl):.2f}", f"{spread['k3'] / spread['k1']:.2f}",
         f"{largest:.0%} (of {len(terms['k3']):,} tokens)", f"{needed:,.0f}"]
    )  # fmt: skip
show_table(
    [
        "engine",
        "KL, nats",
        "Var k1 / 2 KL",
        "noise of k3 / noise of k1",
        "share of the KL in 10 tokens",
        "2 / KL, tokens",
    ],
    rows,
)

# %% [markdown]
# **What to see.** Left: the band of $k_1$ reaches far below zero and follows the dotted line, (08.9), with nothing
# fitted. The band of $k_3$ is so thin that it lies on the line of the KL. This is the case that the theory is about:
# every ratio is near 1. A $k_1$ curve that dips below zero there says "small", not "broken"; it takes the last column
# of the table in tokens before $k_1$ can tell the KL from zero at all.
#
# Right: with eight bits the theory no longer fits. Nearly all of the KL sits in ten tokens, whose ratios are nowhere
# near
# 1. Then $k_1$ is noisier than predicted, and $k_3$ is hardly better than $k_1$: both wait for the rare token. So
#    look at both curves, and at the largest log-ratios, and do not expect $k_3$ to make a heavy tail light.

# %% [markdown]
# {exercise} 08.5
#
# The paper's KL curve, $k_1$, from the three log-probabilities `[B, T]` and the mask. Which two of the three does it
# need?


# %%
def token_kl_k1(logp, logp_old, logp_rollout, mask):
    # solution
    return (logp_rollout - logp_old)[mask].mean()
    # end


check("08.5", token_kl_k1)

# %% [markdown]
# ## 6 · Four instruments on one flight
#
# `MiniRLTrainer` is the loop of section 2, with $N$ mini-batches, micro-batches, replay, resuming and all metrics.
# First, is it the same loop? Same seeds, one step of each:

# %%
STEPS = pick(fast=16, full=64)
config = load_config(
    overrides=[
        "task.options.hard_fraction=0.25",
        "rollout.precision=int4",
        "rollout.rounding=stochastic",
        f"train.mini_batch_prompts={PROMPTS}",
        f"train.group_size={GROUP_SIZE}",
        f"train.lr={LR}",
        "train.lr_schedule=constant_with_warmup",
        f"train.warmup_steps={WARMUP}",
        f"train.global_steps={STEPS}",
        f"eval.every={EVERY}",
        f"eval.problems={len(unseen)}",
    ]
)

with tempfile.TemporaryDirectory() as folder:
    trainer = MiniRLTrainer(config, folder, model=copy.deepcopy(base), task=task, progress=False)
    records = [{"global_step": 0, "grad_step": 0, **trainer.evaluate()}]
    live = display(four_curves({"MiniRL": as_run(records * 2)}), display_id="training")
    while trainer.step < STEPS:
        records += trainer.global_step()
        if trainer.step % 4 == 0:
            live.update(four_curves({"MiniRL": as_run(records)}))

# %%
compared = ["reward", "entropy", "kl_rollout_old", "k3_rollout_old", "grad_norm"]
show_table(
    ["first gradient step", "by hand", "trainer"],
    [[name, f"{hand[1][name]:.5f}", f"{records[1][name]:.5f}"] for name in compared],
)
for name in compared:  # the trainer cuts the batch by length: sums in another order, in fp32
    assert math.isclose(hand[1][name], records[1][name], rel_tol=1e-3, abs_tol=1e-6), name

# %%
first, final, n = records[0], records[-1], len(unseen)


def over(part, key):
    """Mean of a metric over some steps."""
    return np.mean([record[key] for record in part])


begin, end = records[1:9], records[-8:]
show_table(
    ["instrument", "before, or first 8 steps", "after, or last 8 steps"],
    [
        ["score, full precision", *(f"{r['score']:.2f}" for r in (first, final))],
        ["score_rollout, through the engine", *(f"{r['score_rollout']:.2f}" for r in (first, final))],
        *(
            [name, *(f"{over(part, key):.{digits}f}" for part in (begin, end))]
            for name, key, digits in (
                ("training reward", "reward", 2),
                ("token entropy, nats", "entropy", 3),
                ("training–inference KL (k1), nats", "kl_rollout_old", 4),
                ("the same by k3", "k3_rollout_old", 4),
                ("staleness, mean size of log π_θ/π_old", "log_ratio_staleness", 4),
                ("share of tokens clipped, Â > 0", "clip_frac_pos", 4),
                ("share of tokens clipped, Â < 0", "clip_frac_neg", 4),
            )
        ),
    ],
)
error = math.sqrt(final["score"] * (1 - final["score"]) / n)
print(f"{n} held-out problems: a score has a standard error of about {error:.3f}")

# %% [markdown]
# **What to see.** The first step of both loops is the same, to rounding. Later steps drift apart: fp32 sums in another
# order, then another token drawn here and there. Staleness and clipping are exactly zero because $N = 1$. As far as one
# short run can show, this is a healthy flight: reward and score up together, entropy down without a cliff. The KL is
# a few times what it was, since a sharper policy suffers more from the same 4-bit rounding; it has not taken off.
# Reading takes all four: a falling entropy alone could be a collapse, a growing KL alone a broken sync.

# %% [markdown]
# ## 7 · Several seeds: what counts as evidence
#
# One run is a lead. The reproduction has eight seeds of each variant, stored in the repository. A run is summarised by
# its **final score**, the mean of its last three evaluations. Variants with the same seed start alike and see the same
# problems, so they are compared seed by seed.

# %%
spec = load_spec()
RUNS = checkout() / "lessons" / "results" / "runs" / "full"


def stored(setting, variant):
    """The stored runs of one variant, by seed."""
    return read_runs(RUNS / setting).get(variant, {})


fig1 = {variant: stored(setting, variant) for setting, variant in spec.figures["fig1"].runs}
fig1 = {variant: runs for variant, runs in fig1.items() if runs}
label_of = {variant: spec.variants[variant].label for variant in fig1}


def finals(variant, key="final_score"):
    return {seed: summary(result, spec.definitions)[key] for seed, result in fig1[variant].items()}


def pairs(variant, other, key="final_score"):
    """The two variants' numbers on the seeds that both have."""
    a, b = finals(variant, key), finals(other, key)
    shared = sorted(a.keys() & b.keys())
    return np.array([a[s] for s in shared]), np.array([b[s] for s in shared])


def evidence_figure(reference="minirl"):
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = axes_of(figure, 2, gridspec_kw={"width_ratios": [1, 1.7]})
    a, b = pairs(reference, "no_is")
    for x, y in zip(a, b, strict=True):
        left.plot([0, 1], [x, y], "-o", color=BLUE if x > y else ORANGE, linewidth=1.2, markersize=4)
    left.set(xticks=[0, 1], xticklabels=[label_of[reference], label_of["no_is"]], xlim=(-0.3, 1.3))
    left.set_ylabel("final score")
    left.set_title("a line for each seed", loc="left", fontsize=11)
    others = [variant for variant in fig1 if variant != reference]
    for i, variant in enumerate(others):
        a, b = pairs(variant, reference)
        effect = paired_difference(a, b)
        right.plot(100 * (a - b), np.full(len(a), i) + 0.18, "|", color="#888888", markersize=9)
        right.plot([100 * effect.low, 100 * effect.high], [i, i], "-", color=BLUE, linewidth=2.2)
        right.plot(100 * effect.estimate, i, "o", color=BLUE, markersize=7)
    right.axvline(0, color="#222222", linewidth=1)
    right.set(yticks=range(len(others)), yticklabels=[label_of[v] for v in others], ylim=(-0.6, len(others) - 0.4))
    right.set_xlabel(f"final score minus that of {label_of[reference]}, points")
    right.set_title("mean, 95 % interval, and the seeds (grey)", loc="left", fontsize=11)
    return figure


Image(to_png(evidence_figure()), width=850)

# %%
a, b = pairs("minirl", "no_is")
effect, count = paired_difference(a, b), len(a)
unpaired = t_quantile(0.975, 2 * count - 2) * math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / count)
print(f"MiniRL minus − IS, {count} seeds: {100 * effect.estimate:+.1f} points, "
      f"95 % interval {100 * effect.low:+.1f} to {100 * effect.high:+.1f}, sign-flip p = {effect.p:.3f}")  # fmt: skip
print(f"half-width: paired {100 * (effect.high - effect.estimate):.1f}, unpaired {100 * unpaired:.1f} points; "
      f"correlation over seeds {np.corrcoef(a, b)[0, 1]:+.2f}")  # fmt: skip
a, b = pairs("r3", "minirl")
tost = equivalent(a, b, 0.05)
print(f"are R3 and MiniRL within 5 points? 90 % interval {100 * tost.low:+.1f} to {100 * tost.high:+.1f}: "
      + ("yes" if tost.p < 0.05 else "not shown, the interval is too wide"))  # fmt: skip

# %% [markdown]
# **What to see.** Left: most of the lines go the same way, but not all of them by as much. Right: an interval that does
# not touch zero is a difference at 95 %; one that does is *not* a proof of equality, which the last line tests instead.
# The intervals are several points wide, although eight seeds went into each: that is what a small laboratory can see. A
# difference of 3 points, the size of the paper's F1b, would mostly drown in it.
#
# Pairing pays where a seed does the same to both runs. Look at the printed correlation: where it is not positive, the
# chaos of training has washed away what the runs had in common, and the paired interval is no narrower. It is still the
# right one to use, because it was decided before looking.

# %% [markdown]
# {exercise} 08.6
#
# `a[i]` and `b[i]` are numpy arrays of final scores of two variants with the same seed. Return
# `(estimate, low, high)` of a − b: the mean and its 95 % interval by Student's t. `t_quantile(q, df)` is imported
# above.


# %%
def paired_effect(a, b):
    # solution
    difference = a - b
    n = len(difference)
    half = t_quantile(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n)
    return difference.mean(), difference.mean() - half, difference.mean() + half
    # end


check("08.6", paired_effect)

# %% [markdown]
# ## 8 · The reproduction: what held and what did not
#
# The paper's first figure, on-policy, redrawn from the stored runs. To make the runs again (minutes, or half an hour of
# one core):
#
#     minirl reproduce fig1 --tier fast
#     minirl reproduce fig1 --tier full --seeds 8 --out results

# %%
four_curves({label_of[variant]: [result.metrics for result in runs.values()] for variant, runs in fig1.items()})

# %%
show_table(
    [
        "variant",
        "seeds",
        "final score",
        "through the engine",
        "collapsed",
        "entropy, last third",
        "KL (k3), last third",
    ],
    [
        [
            label_of[variant],
            len(runs),
            f"{np.mean(list(finals(variant).values())):.3f}",
            f"{np.mean(list(finals(variant, 'final_score_rollout').values())):.3f}",
            f"{sum(finals(variant, 'collapsed').values())} of {len(runs)}",
            f"{np.mean(list(finals(variant, 'final_entropy').values())):.3f}",
            f"{np.mean(list(finals(variant, 'kl').values())):.3f}",
        ]
        for variant, runs in fig1.items()
    ],
)

# %% [markdown]
# **What to see.** Bands are 95 % intervals over seeds. In every variant the score rises and no curve falls off a
# cliff; the entropy falls by an order of magnitude, and the KL grows as the policy sharpens, though the engine rounds
# by the same rule from beginning to end. R3 lowers the KL of MiniRL. The score through the engine is a few points
# below the other one in every row: that is what deploying the rounded model would cost.
#
# Now the verdicts. They were made by criteria that were fixed before the runs, and they stand in `CLAIMS.md`; the cell
# reads them from there.

# %%
page = (checkout() / "lessons" / "results" / "CLAIMS.md").read_text(encoding="utf-8")
verdicts = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| (.+?) \| \**(.+?)\** \|", page, re.MULTILINE)
assert len(verdicts) > 10
MEANING = {
    "reproduced": "Held here",
    "opposite": "Did not hold here: at least one criterion is contradicted",
    "inconclusive": "Undecided: neither shown nor contradicted",
    "not testable at this size": "Cannot be tested at this size",
    "not run": "Not run yet",
}
for verdict, heading_text in MEANING.items():
    if chosen := [f"- **{claim}** {finding}" for claim, finding, found in verdicts if found == verdict]:
        display(Markdown("\n".join([f"**{heading_text}**", "", *chosen])))

# %% [markdown]
# *Did not hold* needs a closer look: one contradicted criterion is enough, and the others of the same claim may hold.
# The criteria of the on-policy claims, one by one:

# %%
rows = []
for claim in (c for c in spec.claims if c.figures == ("fig1",)):
    section = page.partition(f"### {claim.id}\n")[2].partition("\n### ")[0]
    for line in re.findall(r"^\| (?!criterion|---)(.+) \|$", section, re.MULTILINE):
        criterion, outcome, found, *_ = line.split(" | ")
        rows.append([claim.id, criterion, outcome.strip("*"), found])
show_table(["claim", "criterion", "outcome", "effect, with its interval"], rows)

# %% [markdown]
# **How to read it.** The paper's claims are about a model with 30 billion parameters, 1,024 responses in an update
# and up to 32,768 tokens in a response. Here the model has 0.9 million parameters, an update has 128 responses, and a
# response about ten tokens. The page says *what carries over*. For this figure: learning, stability, and what R3 does
# to the KL. The collapse without importance weights did not appear, and that variant did not end below MiniRL. A
# guess was that with few tokens in an update the weights' variance costs more than their bias. It was tested with
# four times as many responses and failed (`search_is_batch` in `LOG.md`, two seeds). Lesson 03, section 7, has
# another reason: in this task all responses of a group are equally long, and then the drift that a missing weight
# leaves has the total 0. A negative result here is no evidence against the paper's own runs, and no licence to leave
# the weights out there.
#
# **Try this**
#
# 1. In section 2, sync only every second step. Which needle sees it first?
# 2. `stored("n8", "r3_no_clip")` has runs that did collapse. Draw their four curves beside `stored("n8", "r3")`. In
#    which order do the needles move?
# 3. In section 7, replace the final score by `"final_score_rollout"`. Does any interval change sides?
