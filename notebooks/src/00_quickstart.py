# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Quickstart: one rollout by hand, and the three policies
#
# A language model writes eight answers to one problem, a program checks them, and right answers are made more probable,
# wrong ones less. That is reinforcement learning with verifiable rewards. One detail decides whether it stays stable:
# the engine that *writes* the answers and the engine that *learns* from them are not quite the same function, even when
# they hold the same weights.
#
# **A picture to keep: the same score, two pianos.** A pianist gives concerts on one piano and practises on another. The
# score, the model's weights, is the same; the instruments are tuned a little differently. In the practice room she
# listens to a recording of the concert and decides what to play louder next time. If she forgets that the recording was
# made on the *other* piano, she corrects notes that were never wrong.
#
# | the picture | the policy | who computes it |
# |---|---|---|
# | the concert, recorded | $\mu_{old}$, the **rollout policy** | the *inference* engine, built for speed, in few bits |
# | the same page in the practice room | $\pi_{old}$ | the *training* engine, in full precision |
# | the page after practising | $\pi_\theta$, the **target policy** | the training engine, weights that change |
#
# The first two hold the same weights, $\theta_{old}$; the third holds $\theta$.
#
# What you will do: compute one update with pencil and paper; sample answers from a tiny Mixture-of-Experts model
# through a 4-bit engine; look at one answer token by token under all three policies; turn a dial from 32 bits to 3; and
# train for 20 steps. It takes under a minute on a laptop's CPU and downloads nothing. You need to know PyTorch and what
# a language model is; no reinforcement learning.
#
# The derivations are in [the lesson](../lessons/00_quickstart.md); it can be read before or after. Five exercises stand
# along the way. Nothing below an exercise needs your answer, so the page runs whether you have solved it or not;
# `check` says which mistake an answer makes.
#
# Equation numbers are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374).

# %%
import copy
import json
import math
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check
from minirl_edu.diagnostics import first_order_gap, kl_k3
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer, model_path
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import four_curves, precision_dial, rollout_tokens, to_png
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import RoutingReplay
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

logging.disable_progress_bar()
# The model is tiny: one thread is as fast as many, and sums come out in the same order everywhere.
torch.set_num_threads(1)


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


# %% [markdown]
# ## 1 · By hand: two responses, five tokens
#
# Before any model is loaded, the whole update on numbers that fit on a napkin. One prompt got two responses, a *group*
# of $G = 2$. A program found the first right (reward 1) and the second wrong (reward 0). How much better than its group
# was each? That is the **advantage**, $\hat A = R - \text{mean of } R \text{ over the group}$.

# %%
rewards = torch.tensor([1.0, 0.0])
advantages = group_mean_advantages(rewards, group_size=2)
advantages

# %% [markdown]
# {exercise} 00.1
#
# A batch holds several groups: the first `group_size` rewards belong to the first prompt, the next to the second, and
# so on. Return one advantage per response, in the same order, without calling the library.


# %%
def advantages_by_hand(rewards, group_size):
    # solution
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()
    # end


check("00.1", advantages_by_hand)

# %% [markdown]
# Now the probability of each sampled token: under the engine that sampled it ($\mu_{old}$), and under the training
# engine with the same weights ($\pi_{old}$). The first response has three tokens; the second has two, so a mask takes
# its third place out. The engines disagree about the second token of each. Before the first update,
# $\pi_\theta = \pi_{old}$.

# %%
mu_old = torch.tensor([[0.50, 0.40, 0.90], [0.50, 0.80, 1.00]])
pi_old = torch.tensor([[0.50, 0.50, 0.90], [0.50, 0.60, 1.00]])
mask = torch.tensor([[True, True, True], [True, True, False]])

# %% [markdown]
# **MiniRL**, the paper's objective, to be maximised:
#
# $$\mathcal J(\theta) \;=\; \mathbb E_{y\sim\mu_{old}}\Big[\sum_t M_t\;
# \mathrm{sg}\Big[\frac{\pi_\theta(y_t)}{\mu_{old}(y_t)}\Big]\;\hat A\;\log\pi_\theta(y_t)\Big] \tag{7}$$
#
# Read it from the right. $\log\pi_\theta(y_t)$: make this token more probable. $\hat A$: if the answer was better than
# its group; less probable if it was worse. The ratio, an **importance weight** (`sg`: no gradient flows through it):
# the engine that sampled drew this token more or less often than the trainer would have, so count it accordingly.
# $M_t$ is 1 or 0, and 1 for now.
#
# The gradient with respect to one token's $\log\pi_\theta$ is therefore
# $-\frac1B\,\frac{\pi_\theta}{\mu_{old}}\,\hat A$ (minus, because a *loss* is minimised; $B = 2$ responses). By hand,
# and by the library:

# %%
by_hand = -(1 / 2) * (pi_old / mu_old) * advantages[:, None] * mask

logp = pi_old.log().requires_grad_()
minirl_loss(logp, pi_old.log(), mu_old.log(), advantages, mask).loss.backward()

torch.testing.assert_close(logp.grad, by_hand)
logp.grad

# %% [markdown]
# A gradient step moves *against* these numbers. First row, the right answer: all negative, so its tokens become more
# probable. The middle one counts more than its neighbours: the trainer finds it likelier than the sampler did, so it
# was drawn too rarely. Second row, the wrong answer: positive, less probable, and its second token counts less. The
# masked place gets exactly zero.

# %% [markdown]
# {exercise} 00.2
#
# Write the gradient of the loss with respect to every token's $\log\pi_\theta$, for any batch of $B$ responses,
# `[B, T]` tokens. Here $M_t = 1$ for all tokens, and no importance weight counts more than 5. Write the formula; no
# autograd is needed.


# %%
def gradient_by_hand(log_pi, log_mu, advantages, mask):
    # solution
    weight = (log_pi - log_mu).exp().clamp(max=5.0)
    return -weight * advantages[:, None] * mask / len(log_pi)
    # end


check("00.2", gradient_by_hand)

# %% [markdown]
# Two rules are still missing, and both are brakes. After some updates the target has moved away from $\pi_{old}$, and
# a response that was sampled before says less and less about it:
#
# * the **clip mask** $M_t$ drops a token whose ratio $r_t = \pi_\theta/\pi_{old}$ has already moved far enough in the
#   direction it is being pushed: above $1 + 0.27$ for $\hat A > 0$, below $1 - 0.2$ for $\hat A < 0$;
# * the **cap**: no importance weight counts more than 5.

# %%
mu_old = torch.tensor([[0.50, 0.08, 0.90], [0.50, 0.80, 1.00]])
pi_old = torch.tensor([[0.50, 0.50, 0.90], [0.50, 0.60, 1.00]])
pi_theta = torch.tensor([[0.70, 0.50, 0.90], [0.30, 0.66, 1.00]])

logp = pi_theta.log().requires_grad_()
minirl_loss(logp, pi_old.log(), mu_old.log(), advantages, mask).loss.backward()

show_table(
    ["response", "token", "Â", "r = π_θ/π_old", "weight π_θ/μ_old", "gradient"],
    [
        [i + 1, t + 1, f"{advantages[i]:+.1f}", f"{pi_theta[i, t] / pi_old[i, t]:.2f}",
         f"{pi_theta[i, t] / mu_old[i, t]:.2f}", f"{logp.grad[i, t] + 0.0:+.4f}"]
        for i, t in mask.nonzero().tolist()
    ],
)  # fmt: skip

# %% [markdown]
# In the table: the first token of each response has moved far enough and is dropped (gradient 0). The second token of
# the first response has a weight above 5 and counts as if it were 5. The second token of the second response has moved
# *against* its push (the answer was wrong, the token became likelier): that is no reason to let go, it keeps its
# gradient.

# %% [markdown]
# {exercise} 00.3
#
# Return $M_t$ as a tensor of booleans `[B, T]`: true where a token keeps its gradient. You are given all three
# log-probabilities; the bounds are $\varepsilon_{high} = 0.27$ and $\varepsilon_{low} = 0.2$.


# %%
def kept_tokens(log_pi, log_old, log_mu, advantages):
    # solution
    ratio = (log_pi - log_old).exp()
    up, down = advantages[:, None] > 0, advantages[:, None] < 0
    return ~((up & (ratio > 1.27)) | (down & (ratio < 0.8)))
    # end


check("00.3", kept_tokens)

# %% [markdown]
# ## 2 · A tiny model, a verifiable task, eight answers
#
# The library ships a Qwen3-style Mixture-of-Experts model, small enough for this page. It is an ordinary `transformers`
# model. It was *cold-started*: fine-tuned on worked solutions by a teacher who errs, so it knows how to answer but is
# often wrong. That is where reinforcement learning begins.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
problems = task.sample(8, seed=0)

made = json.loads(Path(model_path("chain-steps"), "cold_start.json").read_text())
size, shape = sum(p.numel() for p in model.parameters()), model.config
print(f"model             {size / 1e6:.2f} million parameters, {shape.num_hidden_layers} layers")
print(f"experts           {shape.num_experts} per layer, {shape.num_experts_per_tok} serve a token")
print(f"its teacher       errs at {made['error_rate']:.0%} of the steps")
print("prompt           ", repr(problems[0].prompt))
print("a right response ", repr(task.demonstration(problems[0], rng=random.Random(0))))
wrong = task.demonstration(problems[0], rng=random.Random(1), error_rate=0.5)
print("a wrong one      ", repr(wrong))
print("final digit      ", problems[0].answer)

# %% [markdown]
# The task: add the digits from left to right, modulo 10, and write down every partial sum. Only the last digit is
# checked; how a response gets there is free. Every character is one token, and every prompt is filled with spaces to
# the same width.
#
# Answers are sampled by a rollout **engine**: a copy of the model that computes as low-precision hardware would. Here
# every weight matrix, and every vector that is multiplied by one, is rounded to 4-bit integers, one scale for each row:

# %%
row = model.model.layers[0].self_attn.q_proj.weight[0].detach()
print("six weights of a row ", *(f"{w:+.3f}" for w in row[:6]))
print("the same in int4     ", *(f"{w:+.3f}" for w in quantise(row, "int4")[:6]))

# %%
PRECISION, GROUP_SIZE = "int4", 8
sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=1.0)

engine = HFEngine(model, Precision.parse(PRECISION), record_routes=True)
prompts = [task.encode(problem) for problem in problems]
rollout = engine.generate(prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0)

texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
asked = [problem for problem in problems for _ in range(GROUP_SIZE)]
rewards = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages = group_mean_advantages(rewards, GROUP_SIZE)

print(f"{len(problems)} problems × {GROUP_SIZE} responses; the first group:", problems[0].prompt)
log_mu = rollout.logp_rollout.sum(1)
show_table(
    ["response", "reward R", "advantage Â", "log μ_old of the response, nats"],
    [
        [f"`{texts[i]}`", f"{rewards[i]:.0f}", f"{advantages[i]:+.3f}", f"{log_mu[i]:.2f}"]
        for i in range(GROUP_SIZE)
    ],
)  # fmt: skip

# %% [markdown]
# Eight tries at one problem. Within the group the advantages add up to zero: what is learned is *which of my own
# answers were better than my usual ones*. A group that is all right or all wrong teaches nothing. The engine returns
# the log-probability of every token it drew, which is $\log\mu_{old}$, and which experts served it.

# %% [markdown]
# ## 3 · One response under three policies
#
# The training engine now reads the same tokens with the same weights and says how probable *it* finds them:
# $\pi_{old}$. Then one gradient step on (7), in plain PyTorch, and the third policy, $\pi_\theta$, exists as well.

# %%
replay = RoutingReplay(model)
layout = lay_out(rollout, share_prompts=can_share_prompts(model))
with torch.no_grad(), replay.record() as tape:
    logp_old = response_logprobs(model, layout).logp

policy = copy.deepcopy(model)
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)
logp = response_logprobs(policy, layout).logp
minirl_loss(logp, logp_old, rollout.logp_rollout, advantages, rollout.response_mask).loss.backward()
optimizer.step()
with torch.no_grad():
    logp = response_logprobs(policy, layout).logp

# %% [markdown]
# Of all these responses, here is the one on which the two engines differ most often about the experts (more about that
# below). What separates $\pi_\theta$ from $\mu_{old}$ splits into two factors:
#
# $$\frac{\pi_\theta(y_t)}{\mu_{old}(y_t)} \;=\;
# \underbrace{\frac{\pi_{old}(y_t)}{\mu_{old}(y_t)}}_{\text{training–inference discrepancy}} \times
# \underbrace{\frac{\pi_\theta(y_t)}{\pi_{old}(y_t)}}_{\text{policy staleness}} \tag{5}$$

# %%
routes_old = layout.unpack(tape.routes)  # [responses, tokens, layers, experts per token]
predicts = slice(rollout.prompt_length - 1, -1)  # a token is predicted at the position before it
chosen_rollout = rollout.routes.experts[:, predicts].sort(-1).values
chosen_old = routes_old.experts[:, predicts].sort(-1).values
flipped = (chosen_rollout != chosen_old).any(-1) & rollout.response_mask[..., None]

which = int(flipped.sum((1, 2)).argmax())
length = int(rollout.response_mask[which].sum())
tokens = [*texts[which], "<eos>"][:length]
log_mu, log_old, log_new = (x[which, :length] for x in (rollout.logp_rollout, logp_old, logp))

print(asked[which].prompt, texts[which], f"(reward {rewards[which]:.0f})")
rollout_tokens(tokens, log_mu, log_old, log_new)

# %% [markdown]
# **What to see.** Above: the commas and the end are nearly certain (log-probability near 0); the digits are where the
# model hesitates. The three symbols of a token lie close together. Below are their differences, enlarged: orange is
# what rounding did to the engine, green is what one gradient step did to the policy. Neither is zero, and in a long
# response they add up.
#
# The same in numbers, and (5) checked token by token:

# %%
discrepancy = (log_old - log_mu).exp()
staleness = (log_new - log_old).exp()
ratio = (log_new - log_mu).exp()
torch.testing.assert_close(ratio, discrepancy * staleness)
columns = [log_mu.exp(), log_old.exp(), log_new.exp(), discrepancy, staleness, ratio]

show_table(
    ["token", "μ_old", "π_old", "π_θ", "π_old/μ_old", "π_θ/π_old", "their product = π_θ/μ_old"],
    [[f"`{token}`", *(f"{column[t]:.4f}" for column in columns)] for t, token in enumerate(tokens)],
)

# %% [markdown]
# {exercise} 00.4
#
# One number for each factor of (5): the mean of $|\log\pi_{old}/\mu_{old}|$ and the mean of
# $|\log\pi_\theta/\pi_{old}|$ over all response tokens of a batch `[B, T]`, in this order.


# %%
def factor_sizes(log_mu, log_old, log_pi, mask):
    # solution
    discrepancy = (log_old - log_mu).abs()[mask].mean()
    staleness = (log_pi - log_old).abs()[mask].mean()
    return discrepancy, staleness
    # end


check("00.4", factor_sizes)

# %% [markdown]
# **Why the ratios must stay near 1.** What we want is the *sequence* objective: weight a whole response by
# $\prod_t r_t$, with $r_t = \pi_\theta/\mu_{old}$ (equation 1). For long answers that product has a hopeless variance,
# so (7) weights each token by its own $r_t$ instead. That is the same thing to first order: with $r_t = 1 + \delta_t$,
#
# $$\prod_t (1 + \delta_t) \;=\; 1 + \sum_t \delta_t + O(\delta^2).$$
#
# Everything in this library that keeps training stable keeps the dropped term small.

# %%
exact, first_order = ratio.prod(), 1 + (ratio - 1).sum()
gap = first_order_gap(logp, rollout.logp_rollout, rollout.response_mask)
print(f"product of the ratios                    {exact:.5f}")
print(f"1 + sum of (ratio − 1)                   {first_order:.5f}")
print(f"dropped, in this response                {exact - first_order:+.5f}")
print(f"dropped, mean size over {len(texts)} responses     {gap:.5f}")

# %% [markdown]
# ### Which experts?
#
# In a Mixture of Experts a router picks, for every token and layer, the few experts that compute it. The pick is
# discrete, so a small error in the router's scores can change *which* experts run: a **flip**.

# %%
circle = dict(marker="o", s=150, facecolors="none", edgecolors="#D55E00", linewidths=1.8)
square = dict(marker="s", s=36, color="#0072B2")
at = np.arange(length).repeat(replay.top_k)

figure = Figure(figsize=(8.5, 5.0), layout="constrained")
for i, ax in enumerate(figure.subplots(len(replay.layers), 1, sharex=True)):
    for t in flipped[which, :length, i].nonzero()[:, 0].tolist():
        ax.axvspan(t - 0.5, t + 0.5, color="#f3d9c9", zorder=0)
    engines = (chosen_rollout, circle, "rollout engine"), (chosen_old, square, "training engine")
    for chosen, style, label in engines:
        ax.scatter(at, chosen[which, :length, i].flatten(), label=label, **style)
    ax.set(xticks=range(length), xticklabels=tokens, ylabel="expert")
    ax.set(yticks=range(replay.num_experts), ylim=(-0.7, replay.num_experts - 0.3))
    ax.set_title(f"layer {replay.layers[i]}", loc="left", fontsize=11)
ax.set_xlabel("token that is predicted")
figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
Image(to_png(figure), width=850)

# %%
pairs = length * len(replay.layers)
share = flipped[rollout.response_mask].float().mean()
print(f"flips in this response: {int(flipped[which].sum())} of {pairs} (token, layer) pairs")
print(f"flips in all {len(texts)} responses: {share:.1%} of the pairs")

# %% [markdown]
# **What to see.** A square inside a circle: both engines chose this expert. In the shaded columns they did not agree,
# although both hold the same weights: a square outside a circle is an expert that only the training engine used. Such a
# token was sampled by one network and is trained in another.
#
# The remedy is **routing replay**: the training engine is told which experts to use, while the weights of the experts
# (and their gradients) are still its own. **R3** replays what the *rollout* engine chose, **R2** what the *training*
# engine itself chose at $\theta_{old}$, which helps once $\theta$ has moved.

# %% [markdown]
# ## 4 · The precision dial
#
# One number for the discrepancy is the **training–inference KL**, the mean of $\log\mu_{old} - \log\pi_{old}$ over
# sampled tokens. Its usual estimate with little noise is $k_3 = \mathbb E[r - 1 - \log r]$, with
# $r = \pi_{old}/\mu_{old}$: never negative, and zero only where the two agree. We turn the dial: same weights, same
# prompts, eight engines from 32 bits down to 3. The training engine computes in fp32 throughout.

# %%
dial_prompts = [task.encode(p) for p in task.sample(64, seed=1)]
# Adding up the same fp32 numbers in another order leaves about 1e-14 nats. That counts as zero:
ORDER_OF_SUMMATION = 1e-12


def turn_dial(model, precision, rounding="nearest", router=False):
    """One row of the figure: how far this engine is from the training engine, also with R3."""
    engine = HFEngine(model, Precision.parse(precision, rounding, router), record_routes=True)
    rollout = engine.generate(dial_prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0)
    layout, replay = lay_out(rollout, share_prompts=True), RoutingReplay(model)
    with torch.no_grad():
        with replay.record() as tape:
            own = response_logprobs(model, layout).logp
        with replay.replay(layout.pack(rollout.routes)):
            forced = response_logprobs(model, layout).logp
    kl = kl_k3(rollout.logp_rollout, own, rollout.response_mask).item()
    kl_r3 = kl_k3(rollout.logp_rollout, forced, rollout.response_mask).item()
    flip_rate = layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs).mean().item()
    return {
        "precision": str(engine.precision),
        "kl": kl if kl > ORDER_OF_SUMMATION else 0.0,
        "kl_r3": kl_r3 if kl_r3 > ORDER_OF_SUMMATION else 0.0,
        "flip_rate": flip_rate,
    }


ENGINES = ["fp32", "bf16", "fp8_e4m3", "int8", "int6", "int5", "int4", "int3"]
dial = [turn_dial(model, precision) for precision in ENGINES]
assert dial[0]["kl"] == dial[0]["flip_rate"] == 0.0
precision_dial(dial)

# %%
show_table(
    ["engine", "KL, nats per token", "with R3", "R3 removes", "flips per token and layer"],
    [
        [row["precision"], f"{row['kl']:.1e}", f"{row['kl_r3']:.1e}",
         f"{round(100 - 100 * row['kl_r3'] / row['kl'])} %" if row["kl"] else "",
         f"{row['flip_rate']:.2%}"]
        for row in dial
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** In fp32 the two engines are one function: no KL, no flip. The fewer the bits, the further both move
# from zero, the KL by orders of magnitude (its axis is logarithmic). Eight bits can be spent in two ways, hence the two
# neighbours fp8 and int8.
#
# **R3** can remove the part of the KL that flips cause, and no other. In this small model that is a fair share for the
# two 8-bit engines and next to nothing for the coarser ones (fourth column): there, what rounding does to every single
# product outweighs the flips, and no replay undoes that. The paper makes its case for R3 on models with far more
# experts and layers. So do not carry these percentages over to another model; carry over the question, which of the two
# it is.
#
# **Turn it yourself.** With a live kernel (and `ipywidgets`) the next cell shows a slider; its engine is the last row
# of the figure. *Stochastic* rounding errs at random instead of always the same way; *router* rounds the routers'
# product too, which deployed engines usually leave alone.

# %%
try:
    from ipywidgets import Checkbox, SelectionSlider, ToggleButtons, interact
except ImportError:
    print("no ipywidgets here; try precision_dial([*dial, turn_dial(model, 'int4', 'stochastic')])")
else:

    @interact(
        precision=SelectionSlider(options=ENGINES, value="int4", continuous_update=False),
        rounding=ToggleButtons(options=["nearest", "stochastic"], value="stochastic"),
        router=Checkbox(value=True, description="router"),
    )
    def turn(precision, rounding, router):
        display(precision_dial([*dial, turn_dial(model, precision, rounding, router)]))


# %% [markdown]
# {exercise} 00.5
#
# Write $k_3$ yourself: the mean over response tokens of $r - 1 - \log r$. Mind which way round $r$ is.


# %%
def k3_by_hand(log_mu, log_old, mask):
    # solution
    log_ratio = (log_old - log_mu)[mask]
    return (log_ratio.exp() - 1 - log_ratio).mean()
    # end


check("00.5", k3_by_hand)

# %% [markdown]
# ## 5 · Twenty steps of training
#
# `MiniRLTrainer` does what sections 2 and 3 did by hand, again and again. One **global step**: sample with $\mu_{old}$,
# verify, compute $\pi_{old}$, update, and give the new weights to the rollout engine. Every fifth step it is scored on
# problems that it never trains on. The figure is redrawn while it runs.

# %%
config = load_config(
    overrides=[
        f"rollout.precision={PRECISION}",
        "train.global_steps=20",
        "train.mini_batch_prompts=32",
        f"train.group_size={GROUP_SIZE}",
        "train.lr=3e-4",
        "eval.every=5",
        "eval.problems=256",
    ]
)


def curves(records):
    """The four figures of the paper, from one dict of metrics per gradient step."""
    numbers = [{k: v for k, v in record.items() if isinstance(v, int | float)} for record in records]
    names = set().union(*numbers)
    run = {name: np.array([record.get(name, math.nan) for record in numbers]) for name in names}
    return four_curves({"MiniRL": run})


with tempfile.TemporaryDirectory() as folder:
    trainer = MiniRLTrainer(config, folder, model=copy.deepcopy(model), task=task, progress=False)
    records = [{"global_step": 0, "grad_step": 0, **trainer.evaluate()}]
    live = display(curves(records), display_id="training")
    while trainer.step < config.train.global_steps:
        records += trainer.global_step()
        if trainer.step % 4 == 0:
            live.update(curves(records))

# %%
before, after = records[0], records[-1]
n = config.eval.problems
error = math.sqrt(before["score"] * (1 - before["score"]) / n)
show_table(
    ["", "before", "after"],
    [
        ["held-out score", f"{before['score']:.2f}", f"{after['score']:.2f}"],
        [f"through the {PRECISION} engine", *(f"{r['score_rollout']:.2f}" for r in (before, after))],
        ["token entropy, nats", f"{records[1]['entropy']:.2f}", f"{after['entropy']:.2f}"],
    ],
)
print(f"{n} held-out problems: a score has a standard error of {error:.2f}")

# %% [markdown]
# **What to see.** The reward rises, and so does the score, on problems that training never draws. The entropy falls:
# the model becomes surer. With that the KL grows peaks: a peak is a handful of tokens that the rounded engine drew and
# the training engine finds nearly impossible. (It may also dip below zero, because the paper's estimator, the plain
# mean of $\log\mu_{old} - \log\pi_{old}$, is noisy where the true value is near zero.)
#
# **What 20 steps do not show.** This is one run with one seed, on-policy, on an easy task. It shows that the loop
# learns. It says nothing about stability: the collapses in the paper take a hundred steps and more, and so few steps
# cannot tell a sound objective from an unsound one. A claim needs longer runs and several seeds.

# %% [markdown]
# ## 6 · Where next
#
# Eleven units take the pieces of this page one at a time, each with a lesson and a lab.
#
# *Where the formula comes from*
#
# * [01_sequence_reward](01_sequence_reward.ipynb): from one reward for a whole response to a gradient for every token.
# * [02_first_order](02_first_order.ipynb): the token objective as a first-order approximation, and when it breaks.
# * [03_sampler_and_policy](03_sampler_and_policy.ipynb): sampling from one policy, learning another.
# * [05_length_norm](05_length_norm.ipynb): what changes when a response's sum is divided by its length.
#
# *What pulls the policies apart, and the brakes*
#
# * [04_staleness_and_clipping](04_staleness_and_clipping.ipynb): several updates from one rollout; the clip mask.
# * [06_mixture_of_experts](06_mixture_of_experts.ipynb): routers, flips, and how they enter both factors of (5).
# * [07_routing_replay](07_routing_replay.ipynb): R2 and R3, and what each of them alters.
#
# *The whole, and how it fails*
#
# * [08_minirl](08_minirl.ipynb): the objective and the training loop, built and taken apart again.
# * [09_cold_starts](09_cold_starts.ipynb): what a model must know before reinforcement learning can begin.
# * [10_diagnosing_collapse](10_diagnosing_collapse.ipynb): six runs with one fault each; name it from the curves.
# * [11_scaling_up](11_scaling_up.ipynb): the same loop on real engines and on several GPUs.
#
# **Try this**
#
# 1. Set `PRECISION = "int3"` in section 2 and run everything again. Which panels of section 5 tell the
#    two engines apart?
# 2. In section 3 leave the importance weight out: pass `is_correction=False` to `minirl_loss`. By how much does the
#    gradient of the parameters change, compared with its norm?
# 3. After section 5, turn the dial on the trained weights:
#    `precision_dial([turn_dial(trainer.model, precision) for precision in ENGINES])`.
#    Nothing in training asked the model to stay easy to round. Did it?
