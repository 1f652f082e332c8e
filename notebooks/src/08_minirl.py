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
# that all is well.
#
# What you will do: put one global step in order with toy weights; build the whole loop from five pieces of the library
# and train with it; forget the sync on purpose and see which needle moves; cut a batch so that nothing changes; predict
# the entropy; and compare your loop with the trainer. At the end the last step of your own file, `my_minirl.py`, waits.
#
# All names that no cell defines come from `minirl_edu/course/lab08.py`: parts of the library, and the lab's figures.

# %%
from minirl_edu.course.lab08 import *

# %% [markdown]
# ## 1 · One global step, in order
#
# A gradient step uses $mbs = P\cdot G$ responses ($P$ prompts, $G$ responses each). A global step makes $N$ gradient
# steps out of one rollout:
#
# $$gbs = N\cdot mbs \tag{08.1}$$

# %%
rows = []
for name, p, g in (("paper", 64, 16), ("here", 16, 8)):
    for n in (1, 2, 4, 8):
        rows.append([name, p, g, p * g, n, n * p * g, 800 // n])
show_table(["", "prompts P", "G", "mbs", "N", "gbs", "rollouts for 800 gradient steps"], rows)

# %% [markdown]
# The mini-batch keeps its size. The rollout grows with $N$, and so does the **age** of its data: the weights that use
# the $n$-th mini-batch are $n - 1$ updates ahead of those that sampled it.

# %%
age_figure([1, 2, 4, 8])

# %% [markdown]
# **What to see.** A dot is a new rollout, right after a sync. For $N = 1$ no bar rises: on-policy, every update uses
# what the same weights sampled. For $N = 8$ the last update of each rollout uses responses that are seven updates old.
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
# The engine rounds its weights to 4-bit integers at random, with other draws at every sync. $N = 1$, so $\pi_{old}$ is
# the update's own forward, detached.

# %%
base, task = load_model("chain-steps").eval(), load_task(hard_fraction=0.25)
share = can_share_prompts(base)
PROMPTS, GROUP_SIZE, LR = 16, 8, 4e-4
WARMUP = pick(fast=4, full=20)  # the first updates of Adam are full steps whatever the gradient: begin with small ones
EVERY = pick(fast=4, full=8)  # gradient steps between evaluations
INT4 = Precision.parse("int4", "stochastic")
unseen = task.evaluation(pick(fast=128, full=256))  # problems that training never draws

# %% [markdown]
# `rewarded_rollout` lets the engine draw and a program reward. Everything else of a global step stands here:


# %%
def hand_step(policy, optimizer, engine, step, *, sync=True):
    """One on-policy global step; returns the numbers of its four curves."""
    problems = task.sample(PROMPTS, seed=derive_seed(0, "problems", step))
    seed = derive_seed(0, "rollout", step)
    rollout, rewards = rewarded_rollout(engine, task, problems, group_size=GROUP_SIZE, seed=seed)  # 1. sample
    advantages, mask = group_mean_advantages(rewards, GROUP_SIZE), rollout.response_mask
    output = response_logprobs(policy, lay_out(rollout, share_prompts=share))
    logp_old = output.logp.detach()  # 2. π_old: the same numbers without gradient
    minirl_loss(output.logp, logp_old, rollout.logp_rollout, advantages, mask).loss.backward()  # 3. update
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP)
    optimizer.step()
    optimizer.zero_grad()
    if sync:
        engine.sync(policy, version=step + 1)  # 4. sync
    return {
        **{"global_step": step + 1, "grad_step": step + 1, "grad_norm": grad_norm.item()},
        "reward": rewards.mean().item(),
        "entropy": masked_mean(output.entropy, mask).item(),
        "kl_rollout_old": kl_k1(rollout.logp_rollout, logp_old, mask).item(),
        "k3_rollout_old": kl_k3(rollout.logp_rollout, logp_old, mask).item(),
    }


# %% [markdown]
# `two_scores` solves the unseen problems twice: by the training engine in full precision, and through the engine that
# will be deployed.


# %%
def by_hand(steps, *, sync=True):
    policy = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    engine = HFEngine(policy, INT4)
    lines = [{"global_step": 0, "grad_step": 0, **two_scores(policy, engine, task, unseen)}]
    for step in range(steps):
        lines.append(hand_step(policy, optimizer, engine, step, sync=sync))
        if (step + 1) % EVERY == 0:
            lines[-1] |= two_scores(policy, engine, task, unseen)
    return lines


HAND_STEPS = pick(fast=12, full=48)
hand = by_hand(HAND_STEPS)
four_curves({"MiniRL": as_run(hand)})

# %% [markdown]
# **What to see.** Thirty lines of code that learn. Score: two lines, the faint one through the 4-bit engine. Reward:
# every step draws other problems, so it is noisy. Entropy: falls once the learning rate is up. KL: it grows, and it is
# the noisiest of the four.
#
# **The same loop with one line missing.** `sync=False`: nothing raises, the loss is computed, the optimizer steps.

# %%
forgotten = by_hand(HAND_STEPS, sync=False)
display(needles({"synced": hand, "sync forgotten": forgotten}))
last = slice(-max(4, HAND_STEPS // 4), None)
growth = [np.mean(as_run(lines)["k3_rollout_old"][last]) for lines in (hand, forgotten)]
print(f"KL over the last steps: {growth[0]:.4f} synced, {growth[1]:.4f} forgotten ({growth[1] / growth[0]:.0f} times)")

# %% [markdown]
# **What to see.** The KL has a logarithmic axis, and the dashed mean climbs away, to several times the other (printed).
# The "engine" is now an old policy, and the KL measures how far training has moved from it. The entropy begins to jump:
# it is that of $\pi_\theta$ on responses of an ever older policy. The score shows nothing yet, because the importance
# weights correct for the old sampler within their cap. A cache that outlived the sync, or weights that arrived under
# another name, give the same picture.

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
# On the model: the gradient of one rollout with everything in one forward, and cut by three budgets of tokens.
# `micro_batches` sorts responses by length, so that little of a part is padding.

# %%
problems = task.sample(PROMPTS, seed=11)
rollout, rewards = rewarded_rollout(HFEngine(base, INT4), task, problems, group_size=GROUP_SIZE, seed=11)
advantages = group_mean_advantages(rewards, GROUP_SIZE)


def gradient(budget, *, global_divisor):
    """The whole gradient as one vector, accumulated over micro-batches of at most `budget` token slots."""
    base.zero_grad()
    cuts = micro_batches(rollout, budget, share_prompts=share)
    for rows, part, layout in cuts:
        logp = response_logprobs(base, layout).logp
        terms = logp, logp.detach(), part.logp_rollout, advantages[rows], part.response_mask
        if global_divisor:
            minirl_loss(*terms, num_responses=len(advantages)).loss.backward()
        else:
            (minirl_loss(*terms).loss / len(cuts)).backward()
    return torch.cat([p.grad.flatten() for p in base.parameters() if p.grad is not None]), len(cuts)


whole, _ = gradient(10**9, global_divisor=True)
table = []
for budget in (1000, 400, 150):
    (added, count), (means, _) = (gradient(budget, global_divisor=kind) for kind in (True, False))
    table.append([budget, count, *(f"{(cut - whole).norm() / whole.norm():.1e}" for cut in (added, means))])
show_table(["token budget", "parts", "error, ÷ all responses, added", "error, mean of means"], table)

# %% [markdown]
# The errors are relative to the whole gradient. With the global divisor the cut is invisible, up to the order of fp32
# sums. With a mean of means the gradient depends on how much memory the machine has.

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
words_figure(LOGITS, [0, 2, 4], eta=2.0)

# %% [markdown]
# **What to see.** Green is the right word. Left: the likeliest word is right, it becomes likelier, and the entropy
# falls. Right: the unlikeliest word is right. It is drawn so rarely that its own bar hardly moves. What the others lose
# flattens the distribution, and the entropy rises. A trained model's likely words are mostly right, so the left panel
# is the rule, and the entropy curve falls. With a live kernel, try other words and larger steps:

# %%
knobs(lambda right, eta: words_figure(LOGITS, [right - 1], eta), right=[1, 2, 3, 4, 5], eta=[0.5, 1.0, 2.0, 5.0, 20.0])

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
# {exercise} 08.5
#
# Its slope. `logits` `[V]` are those of one position, `rewards` `[V]` the reward of each word. Return $\Delta H/\eta$
# for $\eta\to0$ by (08.6).


# %%
def entropy_slope(logits, rewards):
    # solution
    pi, log_pi = logits.softmax(-1), logits.log_softmax(-1)
    push = pi * (rewards - pi @ rewards)
    return (pi @ log_pi) * (pi @ push) - pi @ (log_pi * push)
    # end


check("08.5", entropy_slope)

# %% [markdown]
# ## 5 · Four instruments on one flight
#
# `MiniRLTrainer` is the loop of section 2, with $N$ mini-batches, micro-batches, replay, resuming and all metrics.
# First, is it the same loop? Same seeds, one step of each:

# %%
STEPS = pick(fast=16, full=64)
options = {
    **{"task.options.hard_fraction": 0.25, "rollout.precision": "int4", "rollout.rounding": "stochastic"},
    **{"train.mini_batch_prompts": PROMPTS, "train.group_size": GROUP_SIZE, "train.lr": LR},
    **{"train.lr_schedule": "constant_with_warmup", "train.warmup_steps": WARMUP, "train.global_steps": STEPS},
    **{"eval.every": EVERY, "eval.problems": len(unseen)},
}
config = load_config(overrides=[f"{name}={value}" for name, value in options.items()])
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
rows = [[name, f"{hand[1][name]:.5f}", f"{records[1][name]:.5f}"] for name in compared]
show_table(["first gradient step", "by hand", "trainer"], rows)
for name in compared:  # the trainer cuts the batch by length: sums in another order, in fp32
    assert math.isclose(hand[1][name], records[1][name], rel_tol=1e-3, abs_tol=1e-6), name

# %%
rows = [[name, f"{records[0][name]:.2f}", f"{records[-1][name]:.2f}"] for name in ("score", "score_rollout")]
for name in ("reward", "entropy", "kl_rollout_old", "k3_rollout_old", "log_ratio_staleness", "clip_frac_pos"):
    rows.append([name, *(f"{np.mean([line[name] for line in part]):.4f}" for part in (records[1:9], records[-8:]))])
show_table(["instrument", "before, or first 8 steps", "after, or last 8 steps"], rows)
error = math.sqrt(records[-1]["score"] * (1 - records[-1]["score"]) / len(unseen))
print(f"{len(unseen)} held-out problems: a score has a standard error of about {error:.3f}")

# %% [markdown]
# **What to see.** The first step of both loops is the same, to rounding. Later steps drift apart: fp32 sums in another
# order, then another token drawn here and there. Staleness and clipping are exactly zero because $N = 1$. As far as one
# short run can show, this is a healthy flight: reward and score up together, entropy down without a cliff. The KL is a
# few times what it was, since a sharper policy suffers more from the same 4-bit rounding. A falling entropy alone could
# be a collapse, and a growing KL alone a broken sync. Only the four together tell.
#
# What our runs say about this: [unit 12](12_evidence.ipynb).
#
# **Try this.** In section 2, sync only every second step. Which needle sees it first?

# %% [markdown]
# ## Your file, step 08

# %% [markdown]
# {capstone} 08

# %%
check_file("08")
