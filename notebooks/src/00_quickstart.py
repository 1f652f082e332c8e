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
# | the concert that was recorded | $\mu_{old}$, the **rollout policy** | the *inference* engine, built for speed: weights $\theta_{old}$ in few bits |
# | the same page, played in the practice room | $\pi_{old}$ | the *training* engine, in full precision: the same weights $\theta_{old}$ |
# | the page after practising | $\pi_\theta$, the **target policy** | the training engine: the weights $\theta$ that are being changed |
#
# What you will do: compute one update with pencil and paper; sample answers from a tiny Mixture-of-Experts model through
# a 4-bit engine; look at one answer token by token under all three policies; turn the dial from 32 bits to 3; and train
# for 20 steps. It takes under a minute on a laptop's CPU and downloads nothing. You need to know PyTorch and what a
# language model is; no reinforcement learning.
#
# Equation numbers are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374).

# %%
import copy
import math
import random
import tempfile

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.diagnostics import first_order_gap, kl_k3
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import four_curves, precision_dial, rollout_tokens, to_png
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import RoutingReplay
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

logging.disable_progress_bar()
torch.set_num_threads(1)  # the model is tiny: one thread is as fast as many, and sums come out the same everywhere


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


# %% [markdown]
# ## 1 · By hand: two responses, six numbers
#
# Before any model is loaded, the whole update on numbers that fit on a napkin. One prompt got two responses, a *group*
# of $G = 2$. A program found the first right (reward 1) and the second wrong (reward 0). How much better than its group
# was each? That is the **advantage**, $\hat A = R - \text{mean of } R \text{ over the group}$.

# %%
rewards = torch.tensor([1.0, 0.0])
advantages = group_mean_advantages(rewards, group_size=2)
advantages

# %% [markdown]
# Now the probability of each sampled token: under the engine that sampled it ($\mu_{old}$), and under the training
# engine with the same weights ($\pi_{old}$). The first response has three tokens; the second has two, so a mask takes
# its third place out. Before the first update $\pi_\theta = \pi_{old}$.
#
# The two engines agree on four of the five tokens' first digit at best; that is the point of the example.

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
# The gradient for one token is therefore $-\frac1B\,\frac{\pi_\theta}{\mu_{old}}\,\hat A$ (minus, because a *loss* is
# minimised; $B = 2$ responses). By hand, and by the library:

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
#
# Two rules are still missing, and both are brakes. After some updates the target has moved away from $\pi_{old}$, and a
# response sampled long ago says less and less about it:
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
# ## 2 · A tiny model, a verifiable task, eight answers
#
# The library ships a Qwen3-style Mixture-of-Experts model, small enough for this page. It is an ordinary `transformers`
# model. It was *cold-started*, that is fine-tuned on worked solutions by a teacher who errs at every fourth step, so it
# knows how to answer but is often wrong. That is where reinforcement learning begins.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
problems = task.sample(8, seed=0)

print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {model.config.num_hidden_layers} layers,")
print(f"{model.config.num_experts} experts per layer, {model.config.num_experts_per_tok} of them serve each token")
print()
print("prompt           ", repr(problems[0].prompt))
print("a right response ", repr(task.demonstration(problems[0], rng=random.Random(0))))
print("a wrong one      ", repr(task.demonstration(problems[0], rng=random.Random(1), error_rate=0.5)))
print("final digit      ", problems[0].answer)

# %% [markdown]
# The task: add the digits from left to right, modulo 10, and write down every partial sum. Only the last digit is
# checked; how a response gets there is free. Every character is one token, and every prompt is filled with spaces to
# the same width.
#
# Answers are sampled by a rollout **engine**: a copy of the model that computes as low-precision hardware would. Here
# every weight matrix, and every vector that is multiplied by one, is rounded to 4-bit integers, one scale for each row:

# %%
row = model.model.layers[0].self_attn.q_proj.weight[0, :6].detach()
print("six weights      ", np.round(row.tolist(), 3))
print("in int4          ", np.round(quantise(model.model.layers[0].self_attn.q_proj.weight[0], "int4")[:6].tolist(), 3))

# %%
PRECISION, GROUP_SIZE = "int4", 8
sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=1.0)

engine = HFEngine(model, Precision.parse(PRECISION), record_routes=True)
rollout = engine.generate([task.encode(p) for p in problems], group_size=GROUP_SIZE, sampling=sampling, seed=0)

texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
rewards = torch.tensor([task.reward(problems[i // GROUP_SIZE], text) for i, text in enumerate(texts)])
advantages = group_mean_advantages(rewards, GROUP_SIZE)

print(f"{len(problems)} problems × {GROUP_SIZE} responses; the first group, problem {problems[0].prompt.rstrip('= ')}:")
show_table(
    ["response", "reward R", "advantage Â", "log μ_old of the response, nats"],
    [
        [f"`{texts[i]}`", f"{rewards[i]:.0f}", f"{advantages[i]:+.3f}", f"{rollout.logp_rollout[i].sum():.2f}"]
        for i in range(GROUP_SIZE)
    ],
)

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
# Of the 64 responses, here is the one on which the two engines differ most often about the experts (more about that
# below). What separates $\pi_\theta$ from $\mu_{old}$ splits into two factors:
#
# $$\frac{\pi_\theta(y_t)}{\mu_{old}(y_t)} \;=\;
# \underbrace{\frac{\pi_{old}(y_t)}{\mu_{old}(y_t)}}_{\text{training–inference discrepancy}} \times
# \underbrace{\frac{\pi_\theta(y_t)}{\pi_{old}(y_t)}}_{\text{policy staleness}} \tag{5}$$

# %%
routes_old = layout.unpack(tape.routes)  # [responses, tokens, layers, experts per token]
predicts = slice(rollout.prompt_length - 1, -1)  # the experts behind a token are those of the position before it
chosen_rollout = rollout.routes.experts[:, predicts].sort(-1).values
chosen_old = routes_old.experts[:, predicts].sort(-1).values
flipped = (chosen_rollout != chosen_old).any(-1) & rollout.response_mask[..., None]

which = int(flipped.sum((1, 2)).argmax())
length = int(rollout.response_mask[which].sum())
tokens = [*texts[which], "<eos>"][:length]
log_mu, log_old, log_new = (x[which, :length] for x in (rollout.logp_rollout, logp_old, logp))

print(f"problem {problems[which // GROUP_SIZE].prompt.rstrip('= ')}, response {texts[which]}, reward {rewards[which]:.0f}")
rollout_tokens(tokens, log_mu, log_old, log_new)

# %% [markdown]
# **What to see.** Above: the commas and the end are nearly certain (log-probability near 0); the digits are where the
# model hesitates. The three symbols of a token nearly coincide. Below is their difference, enlarged: orange is what
# rounding did to the engine, green is what one gradient step did to the policy. Neither is zero, and a real run adds
# them up over thousands of tokens.
#
# The same in numbers, and (5) checked token by token:

# %%
discrepancy, staleness, ratio = (log_old - log_mu).exp(), (log_new - log_old).exp(), (log_new - log_mu).exp()
torch.testing.assert_close(ratio, discrepancy * staleness)

show_table(
    ["token", "μ_old", "π_old", "π_θ", "π_old/μ_old", "π_θ/π_old", "their product = π_θ/μ_old"],
    [
        [f"`{token}`", *(f"{p:.4f}" for p in (*torch.stack([log_mu, log_old, log_new])[:, t].exp(), discrepancy[t],
                                               staleness[t], ratio[t]))]
        for t, token in enumerate(tokens)
    ],
)  # fmt: skip

# %% [markdown]
# **Why the ratios must stay near 1.** What we want is the *sequence* objective: weight a whole response by
# $\prod_t r_t$, with $r_t = \pi_\theta/\mu_{old}$ (equation 1). That product has a hopeless variance for long answers, so
# (7) weights each token by its own $r_t$ instead. This is the first-order term of the same thing: with
# $r_t = 1 + \delta_t$,
#
# $$\prod_t (1 + \delta_t) \;=\; 1 + \sum_t \delta_t + O(\delta^2).$$
#
# Everything in this library that keeps training stable keeps the dropped term small.

# %%
print(f"product of the ratios       {ratio.prod():.5f}")
print(f"1 + sum of (ratio − 1)      {1 + (ratio - 1).sum():.5f}")
print(f"dropped, for this response  {ratio.prod() - 1 - (ratio - 1).sum():+.5f}")
print(f"dropped, mean of |·| over all {len(texts)} responses: {first_order_gap(logp, rollout.logp_rollout, rollout.response_mask):.5f}")

# %% [markdown]
# ### Which experts?
#
# In a Mixture of Experts a router picks, for every token and layer, the few experts that compute it. The pick is
# discrete. Rounding that changes a router's scores in the third decimal can change *which* experts run: a **flip**.

# %%
E, layers = replay.num_experts, replay.layers
figure = Figure(figsize=(9.5, 5.2), layout="constrained")
for i, ax in enumerate(figure.subplots(len(layers), 1, sharex=True)):
    for picks, style in (
        (chosen_rollout, dict(marker="o", s=150, facecolors="none", edgecolors="#D55E00", label="rollout engine, μ_old")),
        (chosen_old, dict(marker="s", s=36, color="#0072B2", label="training engine, π_old")),
    ):
        at, expert = zip(*((t, e) for t in range(length) for e in picks[which, t, i].tolist()), strict=True)
        ax.scatter(at, expert, linewidths=1.8, **style)
    for t in flipped[which, :length, i].nonzero()[:, 0].tolist():
        ax.axvspan(t - 0.5, t + 0.5, color="#f3d9c9", zorder=0)
    ax.set(ylim=(-0.7, E - 0.3), yticks=range(E), ylabel="expert", xticks=range(length), xticklabels=tokens)
    ax.set_title(f"layer {layers[i]}", loc="left", fontsize=11)
figure.axes[-1].set_xlabel("token that is predicted")
figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
Image(to_png(figure), width=950)

# %%
print(f"flips in this response: {int(flipped[which].sum())} of {length * len(layers)} (token, layer) pairs")
share = flipped[rollout.response_mask].float().mean()
print(f"flips in all {len(texts)} responses: {100 * share:.1f} % of the pairs")

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
ROUNDING_NOISE = 1e-12  # fp32 itself, adding up the same numbers in another order, leaves about 1e-14 nats: that is zero


def turn_dial(model, precision, rounding="nearest", router=False):
    """One row of the figure: how far an engine of this precision is from the training engine, without replay and with."""
    engine = HFEngine(model, Precision.parse(precision, rounding, router), record_routes=True)
    rollout = engine.generate(dial_prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0)
    layout, replay = lay_out(rollout, share_prompts=True), RoutingReplay(model)
    with torch.no_grad():
        with replay.record() as tape:
            own = response_logprobs(model, layout).logp
        with replay.replay(layout.pack(rollout.routes)):
            forced = response_logprobs(model, layout).logp
    kl, kl_r3 = (float(kl_k3(rollout.logp_rollout, logp, rollout.response_mask)) for logp in (own, forced))
    return {
        "precision": str(engine.precision),
        "kl": kl if kl > ROUNDING_NOISE else 0.0,
        "kl_r3": kl_r3 if kl_r3 > ROUNDING_NOISE else 0.0,
        "flip_rate": float(layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs).mean()),
    }


FORMATS_ON_THE_DIAL = ["fp32", "bf16", "fp8_e4m3", "int8", "int6", "int5", "int4", "int3"]
dial = [turn_dial(model, precision) for precision in FORMATS_ON_THE_DIAL]
assert dial[0]["kl"] == dial[0]["flip_rate"] == 0.0
precision_dial(dial)

# %%
show_table(
    ["engine", "KL, nats per token", "with R3", "R3 removes", "flips per token and layer"],
    [
        [row["precision"], f"{row['kl']:.1e}", f"{row['kl_r3']:.1e}",
         f"{1 - row['kl_r3'] / row['kl']:.0%}" if row["kl"] else "", f"{row['flip_rate']:.2%}"]
        for row in dial
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** In fp32 the two engines are one function: no KL, no flip. Every step down moves both away from zero,
# the KL by orders of magnitude (its axis is logarithmic).
#
# R3 removes the part of the KL that flips cause, and nothing else; how much that is depends on the model and the
# format. In *this* model it is mostly a small part, as the third column says: where two experts score nearly alike, it
# hardly matters which of them runs, and what rounding does to every other product remains. Where single flips hit
# tokens that the model is sure of, R3 takes away much more. In large Mixture-of-Experts models on real engines flips
# are a main source of the discrepancy; that is where the paper's case for R3 comes from.
#
# **Turn it yourself.** With a live kernel (and `ipywidgets`) the next cell shows a slider; each setting adds its own row
# below those above. *Stochastic* rounding errs at random instead of always the same way; *router* rounds the routers'
# product too, which deployed engines usually leave alone.

# %%
try:
    from ipywidgets import Checkbox, SelectionSlider, ToggleButtons, interact
except ImportError:
    print("no ipywidgets here: call precision_dial([*dial, turn_dial(model, 'int4', 'stochastic', True)]) instead")
else:

    @interact(
        precision=SelectionSlider(options=FORMATS_ON_THE_DIAL, value="int4", continuous_update=False),
        rounding=ToggleButtons(options=["nearest", "stochastic"], value="stochastic"),
        router=Checkbox(value=True, description="router"),
    )
    def turn(precision, rounding, router):
        display(precision_dial([*dial, turn_dial(model, precision, rounding, router)]))


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


def columns(records):
    """Lists of numbers by name, as the figures want them, from one dict per gradient step."""
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: np.array([record.get(key, math.nan) for record in records], dtype=float) for key in keys}


with tempfile.TemporaryDirectory() as folder:
    trainer = MiniRLTrainer(config, folder, model=copy.deepcopy(model), task=task, progress=False)
    records = [{"global_step": 0, "grad_step": 0, **trainer.evaluate()}]
    live = None
    while trainer.step < config.train.global_steps:
        records += trainer.global_step()
        if trainer.step % 4 == 0:
            figure = four_curves({"MiniRL": columns(records)})
            live = live.update(figure) or live if live else display(figure, display_id="training")

# %%
before, after = records[0], records[-1]
n = config.eval.problems
error = math.sqrt(before["score"] * (1 - before["score"]) / n)
print(f"score on {n} held-out problems: {before['score']:.2f} → {after['score']:.2f} (standard error of one score: {error:.2f})")
print(f"the same through the {PRECISION} engine: {before['score_rollout']:.2f} → {after['score_rollout']:.2f}")
print(f"token entropy: {records[1]['entropy']:.2f} → {after['entropy']:.2f} nats")

# %% [markdown]
# **What to see.** Score and reward rise together: nothing was memorised, the held-out problems improve as well. The
# entropy falls, for the model becomes surer. The KL stays small and shows no trend; it may dip below zero, because the
# paper's estimator (the plain mean of $\log\mu_{old} - \log\pi_{old}$) is noisy where the true value is near zero.
#
# **What 20 steps do not show.** This is one run with one seed, on-policy, with a mild discrepancy, on a task that
# saturates. It shows that the loop learns. It says nothing about stability: the collapses in the paper set in after
# hundreds of steps, and leaving out the importance weights would look just as good here. A claim needs several seeds
# and a longer run.

# %% [markdown]
# ## 6 · Where next
#
# Planned lessons, each with its derivation and its notebook: the first-order approximation and when it breaks;
# importance weights, clipping and the cap; routing replay, R2 and R3; off-policy training with several mini-batches; how
# a run collapses and what warns of it; length normalisation, GRPO and CISPO; the same loop on real engines and several
# GPUs.
#
# **Try this**
#
# 1. Set `PRECISION = "int3"` in section 2 and run everything again. Which panel of section 5 changes first?
# 2. In section 3 leave the importance weight out: pass `is_correction=False` to `minirl_loss`. By how much does the
#    gradient of the parameters change, compared with its norm?
# 3. After section 5, turn the dial on the trained weights: `precision_dial([turn_dial(trainer.model, p) for p in
#    FORMATS_ON_THE_DIAL])`. Training never asked the model to stay easy to round. Did it?
