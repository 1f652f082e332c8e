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
# **A picture to keep: one recipe, two stoves.** A restaurant cooks on a fast gas stove. A test kitchen rewrites the
# recipe on a slow, exact stove, from what the restaurant's guests say. If the test kitchen forgets that the guests ate
# from the *other* stove, it corrects mistakes that its own does not make.
#
# | the picture | the policy | who computes it |
# |---|---|---|
# | the dish in the restaurant | $\mu_{old}$, the **rollout policy** | the *inference* engine, fast, in few bits |
# | the same recipe in the test kitchen | $\pi_{old}$ | the *training* engine, in full precision |
# | the new recipe in the test kitchen | $\pi_\theta$, the **target policy** | the training engine, new weights |
#
# You need to know PyTorch and what a language model is; no reinforcement learning. The page takes under a minute on a
# laptop's CPU and downloads nothing. Derivations are in [the lesson](../lessons/00_quickstart.md). Nothing below an
# exercise needs your answer; `check` says which mistake an answer makes. Equation numbers are those of the paper,
# [arXiv 2512.01374](https://arxiv.org/abs/2512.01374).
#
# The names that this page uses, plots and tables among them, come from `minirl_edu/course/lab00.py`.

# %%
from minirl_edu.course.lab00 import *

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
# its group; less probable if it was worse. The ratio is an **importance weight** (`sg`: no gradient flows through it):
# the sampling engine drew this token more or less often than the trainer would have, so count it accordingly. $M_t$ is
# 1 or 0, and 1 for now. So the gradient of the *loss* with respect to one token's $\log\pi_\theta$ is
# $-\frac1B\,\frac{\pi_\theta}{\mu_{old}}\,\hat A$, with $B = 2$ responses. By hand, and by the library:

# %%
by_hand = -(1 / 2) * (pi_old / mu_old) * advantages[:, None] * mask

logp = pi_old.log().requires_grad_()
minirl_loss(logp, pi_old.log(), mu_old.log(), advantages, mask).loss.backward()

torch.testing.assert_close(logp.grad, by_hand)
logp.grad

# %% [markdown]
# A gradient step moves *against* these numbers. The tokens of the right answer have negative numbers and become more
# probable. The middle one counts more than its neighbours: the trainer finds it likelier than the sampler did, so it
# was drawn too rarely. The tokens of the wrong answer become less probable. The masked place gets exactly zero.

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
# Two brakes are still missing. After some updates the target has moved away from $\pi_{old}$, and an old response says
# less and less about it:
#
# * the **clip mask** $M_t$ drops a token whose ratio $r_t = \pi_\theta/\pi_{old}$ has already moved far enough in the
#   direction of its push: above $1 + 0.27$ for $\hat A > 0$, below $1 - 0.2$ for $\hat A < 0$;
# * the **cap**: no importance weight counts more than 5.

# %%
mu_old = torch.tensor([[0.50, 0.08, 0.90], [0.50, 0.80, 1.00]])
pi_old = torch.tensor([[0.50, 0.50, 0.90], [0.50, 0.60, 1.00]])
pi_theta = torch.tensor([[0.70, 0.50, 0.90], [0.30, 0.66, 1.00]])

logp = pi_theta.log().requires_grad_()
minirl_loss(logp, pi_old.log(), mu_old.log(), advantages, mask).loss.backward()
push_table(mu_old, pi_old, pi_theta, advantages, logp.grad)

# %% [markdown]
# In the table: the first token of each response has moved far enough and is dropped (gradient 0). The second token of
# the first response has a weight above 5 and counts as if it were 5. The second token of the second response has moved
# *against* its push (the answer was wrong, the token became likelier), so it keeps its gradient.

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
# The library ships a Qwen3-style Mixture-of-Experts model, small enough for this page. It was *cold-started*:
# fine-tuned on worked solutions by a teacher who errs, so it knows how to answer but is often wrong. The task: add the
# digits from left to right, modulo 10, and write down every partial sum, each after a comma. A program checks the last
# digit. Every character is one token, and every prompt is filled with spaces to the same width.

# %%
model, task = chain_model()

# %% [markdown]
# {exercise} 00.4
#
# Write the reward, a program. `response` is a text such as `,7,6,7`, `answer` the right digit as a text. Return 1.0 if
# the response ends in a comma and the right digit, else 0.0. What stands before them is free.


# %%
def reward_by_program(response, answer):
    # solution
    return float(response.endswith("," + answer))
    # end


check("00.4", reward_by_program)

# %% [markdown]
# A rollout **engine** samples the answers: a copy of the model that computes as low-precision hardware would. Every
# weight matrix, and every vector that is multiplied by one, is rounded to 4-bit integers, one scale for each row.

# %%
row = model.model.layers[0].self_attn.q_proj.weight[0].detach()
print("six weights of a row ", *(f"{w:+.3f}" for w in row[:6]))
print("the same in int4     ", *(f"{w:+.3f}" for w in quantise(row, "int4")[:6]))

# %% [markdown]
# {exercise} 00.5
#
# Round each row of `weights` `[n, m]` to `bits` bits: to a grid with $2^{b-1}-1$ equal steps on each side of zero. Its
# last step is the row's largest $|w|$. Return the rounded weights `[n, m]`.


# %%
def rounded_rows(weights, bits):
    # solution
    scale = weights.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return scale * (weights / scale).round()
    # end


check("00.5", rounded_rows)

# %%
PRECISION, GROUP_SIZE = "int4", 8
problems = task.sample(8, seed=0)
sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=1.0)
engine = HFEngine(model, Precision.parse(PRECISION), record_routes=True)
prompts = [task.encode(problem) for problem in problems]
rollout = engine.generate(prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0)

texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
asked = [problem for problem in problems for _ in range(GROUP_SIZE)]
rewards = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages = group_mean_advantages(rewards, GROUP_SIZE)

print(f"{len(problems)} problems × {GROUP_SIZE} responses; the first group:", problems[0].prompt)
first = slice(0, GROUP_SIZE)
group_table(texts[first], rewards[first], advantages[first], rollout.logp_rollout.sum(1)[first])

# %% [markdown]
# Within the group the advantages add up to zero. A group that is all right or all wrong teaches nothing. The engine
# returns the log-probability of every token it drew, which is $\log\mu_{old}$, and which experts served it.

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
# Of all these responses, here is the one on which the two engines differ most often about the experts.

# %%
predicts = slice(rollout.prompt_length - 1, -1)  # a token is predicted at the position before it
chosen = [routes.experts[:, predicts].sort(-1).values for routes in (rollout.routes, layout.unpack(tape.routes))]
flipped = (chosen[0] != chosen[1]).any(-1) & rollout.response_mask[..., None]  # [responses, tokens, layers]

which = int(flipped.sum((1, 2)).argmax())
length = int(rollout.response_mask[which].sum())
tokens = [*texts[which], "<eos>"][:length]
log_mu, log_old, log_new = (x[which, :length] for x in (rollout.logp_rollout, logp_old, logp))

print(asked[which].prompt, texts[which], f"(reward {rewards[which]:.0f})")
image(rollout_tokens(tokens, log_mu, log_old, log_new))

# %% [markdown]
# **What to see.** Above: the commas and the end are nearly certain (log-probability near 0); the digits are where the
# model hesitates. The three symbols of a token lie close together. Below are their differences, enlarged: orange is
# what rounding did to the engine, green is what one gradient step did to the policy. Neither is zero, and in a long
# response they add up. The same in numbers, as ratios; the last column is the product of the two before it
# ([lab 03](03_sampler_and_policy.ipynb) takes the two factors apart):

# %%
three_policies_table(tokens, log_mu, log_old, log_new)

# %% [markdown]
# **Why the ratios must stay near 1.** The exact weight of a whole response is the *product* of its ratios. (7) weights
# each token by its own ratio instead. [Lab 02](02_first_order.ipynb) shows that this keeps $1 + \sum_t(\rho_t - 1)$ of
# the product and drops the rest:

# %%
ratio = (log_new - log_mu).exp()
gap = first_order_gap(logp, rollout.logp_rollout, rollout.response_mask)
print(f"product of the ratios                    {ratio.prod():.5f}")
print(f"1 + sum of (ratio − 1)                   {1 + (ratio - 1).sum():.5f}")
print(f"dropped, mean size over {len(texts)} responses     {gap:.5f}")

# %% [markdown]
# ### Which experts?
#
# In a Mixture of Experts a router picks, for every token and layer, the few experts that compute it. The pick is
# discrete, so a small error in the router's scores can change *which* experts run: a **flip**.

# %%
pairs, share = length * len(replay.layers), flipped[rollout.response_mask].float().mean()
print(f"flips in this response: {int(flipped[which].sum())} of {pairs} (token, layer) pairs")
print(f"flips in all {len(texts)} responses: {share:.1%} of the pairs")
expert_figure(tokens, chosen[0][which, :length], chosen[1][which, :length], replay.num_experts)

# %% [markdown]
# **What to see.** A square inside a circle: both engines chose this expert. In the shaded columns they did not agree,
# although both hold the same weights. Such a token was sampled by one network and is trained in another. The remedy is
# **routing replay**, [lab 07](07_routing_replay.ipynb): the training engine is told which experts to use. **R3**
# replays what the *rollout* engine chose.

# %% [markdown]
# ## 4 · The precision dial
#
# One number for the discrepancy is the **training–inference KL**, the mean of $\log\mu_{old} - \log\pi_{old}$ over
# sampled tokens. It is estimated here with $k_3$, which is zero only where the two agree
# ([lab 03](03_sampler_and_policy.ipynb)). Turn the dial: same weights, same prompts, eight engines from 32 bits down to
# 3. The training engine computes in fp32 throughout.

# %%
dial_prompts = [task.encode(p) for p in task.sample(64, seed=1)]


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
    kl = [kl_k3(rollout.logp_rollout, logp, rollout.response_mask).item() for logp in (own, forced)]
    kl = [value if value > 1e-12 else 0.0 for value in kl]  # the order of summation leaves about 1e-14
    flips = layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs).mean().item()
    return {"precision": str(engine.precision), "kl": kl[0], "kl_r3": kl[1], "flip_rate": flips}


ENGINES = ["fp32", "bf16", "fp8_e4m3", "int8", "int6", "int5", "int4", "int3"]
dial = [turn_dial(model, precision) for precision in ENGINES]

# %%
assert dial[0]["kl"] == dial[0]["flip_rate"] == 0.0
dial_table(dial)
image(precision_dial(dial))

# %% [markdown]
# **What to see.** In fp32 the two engines are one function: no KL, no flip. The fewer the bits, the further both move
# from zero, the KL by orders of magnitude (its axis is logarithmic). **R3** can remove the part of the KL that flips
# cause, and no other. In this small model that is a fair share for the two 8-bit engines and next to nothing for the
# coarser ones, where what rounding does to every product outweighs the flips. Do not carry these percentages over to
# another model.
#
# **Turn it yourself.** With a live kernel the next cell shows sliders; their engine is the last row of the figure.
# *Stochastic* rounding errs at random instead of always the same way; *router* rounds the routers' product too.


# %%
def one_more_engine(precision, rounding, router):
    return image(precision_dial([*dial, turn_dial(model, precision, rounding, router)]))


rounding = (["nearest", "stochastic"], "stochastic")
sliders(one_more_engine, precision=(ENGINES, "int4"), rounding=rounding, router=([False, True], True))

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
with tempfile.TemporaryDirectory() as folder:
    trainer = MiniRLTrainer(config, folder, model=copy.deepcopy(model), task=task, progress=False)
    records = [{"global_step": 0, "grad_step": 0, **trainer.evaluate()}]
    live = display(paper_curves(records), display_id="training")
    while trainer.step < config.train.global_steps:
        records += trainer.global_step()
        if trainer.step % 4 == 0:
            live.update(paper_curves(records))

# %%
score_table(records, config.eval.problems, PRECISION)

# %% [markdown]
# **What to see.** The reward rises, and so does the score, on problems that training never draws. The entropy falls:
# the model becomes surer. With that the KL grows peaks: a peak is a handful of tokens that the rounded engine drew and
# the training engine finds nearly impossible. (The plain mean is noisy, so it may also dip below zero.)
#
# **What 20 steps do not show.** This is one run with one seed, on an easy task. It shows that the loop learns. It says
# nothing about stability. What our longer runs say about this: [unit 12](12_evidence.ipynb).

# %% [markdown]
# ## Where next
#
# * [01](01_sequence_reward.ipynb) REINFORCE: from one reward for a whole response to a gradient for every token.
# * [02](02_first_order.ipynb) The token objective as a first-order approximation, and when it breaks.
# * [03](03_sampler_and_policy.ipynb) Sampling from one policy, learning another.
# * [04](04_staleness_and_clipping.ipynb) Several updates from one rollout; the clip mask.
# * [05](05_length_norm.ipynb) What changes when a response's sum is divided by its length; other corrections.
# * [06](06_mixture_of_experts.ipynb) Routers and flips. [07](07_routing_replay.ipynb) Routing replay.
# * [08](08_minirl.ipynb) The objective and the training loop, built and taken apart again.
# * [09](09_cold_starts.ipynb) Cold starts. [10](10_diagnosing_collapse.ipynb) Diagnosing a collapse.
# * [11](11_scaling_up.ipynb) Real engines and several GPUs. [12](12_evidence.ipynb) The paper's claims and our runs.
#
# **Try this**
#
# 1. Set `PRECISION = "int3"` in section 2 and run everything again. Which panels of section 5 tell the engines apart?
# 2. In section 3 leave the importance weight out: pass `is_correction=False` to `minirl_loss`. By how much does the
#    gradient of the parameters change, compared with its norm?
