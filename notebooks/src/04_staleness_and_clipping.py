# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Staleness and clipping
#
# The lab of [lesson 04](../lessons/04_staleness_and_clipping.md), which has the derivations.
#
# A coach films a striker in one match and runs eight drills from that film. By the eighth, the film shows a player who
# no longer exists. One rollout, $N$ updates: you measure how far the policy runs from the one that sampled, and you
# write the rule that holds it: *where a habit has changed far enough in the direction I want, this scene is done.*
#
# All names come from `minirl_edu/course/lab04.py`, which also draws the charts and samples the rollouts.

# %%
from minirl_edu.course.lab04 import *

# %% [markdown]
# ## 1 · N updates from one rollout
#
# One global step samples once and updates $N$ times. Number the gradient steps from 1, as `metrics.jsonl` does. Before
# the first update of a rollout nothing has changed: $\theta = \theta_{old}$. Before the last one, $N - 1$ updates have.

# %%
plot_ages([1, 4, 8])

# %% [markdown]
# **What to see.** Each orange triangle is a rollout. A bar is the number of updates between the rollout and the
# gradient that uses it. With $N = 1$ there are no bars: on-policy. In every rollout the first mini-batch has age 0.

# %% [markdown]
# {exercise} 04.1
# Return, for a gradient step counted from 1 and a number of mini-batches $N$: the global step it belongs to (counted
# from 1), the number of updates since its rollout was sampled, and the version of the weights that sampled it (the
# number of global steps that were finished by then).


# %%
def age_of(grad_step, mini_batches):
    """(global step, updates since the rollout, version of the weights that sampled it)."""
    # solution
    finished, updates = divmod(grad_step - 1, mini_batches)
    return finished + 1, updates, finished
    # end


check("04.1", age_of)

# %% [markdown]
# ## 2 · How far the policy runs
#
# First by hand: one distribution over three tokens, and gradient steps that all push the first token up. Then $\log r$
# of that token should grow in proportion to the number of updates, and the KL with its square.

# %%
logits = torch.tensor([0.2, 0.0, -0.5], dtype=torch.float64)
log_old = logits.log_softmax(0)
rows, rate = [], 0.05
for k in range(9):
    log_ratio = logits.log_softmax(0) - log_old
    kl = -(log_old.exp() * log_ratio).sum()
    quadratic = 0.5 * (log_old.exp() * log_ratio**2).sum()
    rows.append([k, *(f"{r:+.4f}" for r in log_ratio), f"{kl.abs():.5f}", f"{quadratic:.5f}"])
    logits = logits + rate * (torch.tensor([1.0, 0.0, 0.0]) - logits.softmax(0))

show_table(["updates k", "log r, token 1", "token 2", "token 3", "KL(π_old‖π_θ)", "½ Σ π_old (log r)²"], rows)

# %% [markdown]
# From row to row $\log r$ grows by nearly equal amounts, and the KL grows faster and faster. The last column is
# equation (04.2). Tokens 2 and 3 were never pushed: they move because probabilities add up to 1.
#
# Now a real model. The tiny Mixture-of-Experts samples one rollout through the 4-bit engine: eight mini-batches of
# 16 prompts × 8 responses. Then come eight updates at a hot learning rate. Before each update we look at the ratios of
# the mini-batch that is about to be used, as the clip does. The same again without clipping, from the same rollout.

# %%
N, RATE = 8, 8e-4
rollouts = [one_rollout(seed, mini_batches=N) for seed in range(pick(fast=2, full=6))]


def updates_from(batches, *, clip, follow=0):
    """N updates. log r of every mini-batch before its own update; that of mini-batch `follow` before and after all."""
    policy, seen, path = copy.deepcopy(start_model()), [], []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    for batch in [*batches, None]:
        with torch.no_grad():
            path.append(response_logprobs(policy, batches[follow].layout).logp - batches[follow].logp_old)
        if batch is None:
            return seen, torch.stack(path)
        rollout, layout, advantages, logp_old = batch
        logp = response_logprobs(policy, layout).logp
        seen.append((logp - logp_old).detach())
        minirl_loss(logp, logp_old, rollout.logp_rollout, advantages, rollout.response_mask, clip=clip).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# %%
FOLLOW = 3  # section 6 looks at mini-batch 4
with_clip, without = ([updates_from(b, clip=clip, follow=FOLLOW) for b in rollouts] for clip in (True, False))


def pooled(runs, k):
    """log r of all response tokens of mini-batch k + 1, over the rollouts."""
    return torch.cat([seen[k][b[k].rollout.response_mask] for (seen, _), b in zip(runs, rollouts, strict=True)])


plot_staleness(*([pooled(runs, k) for k in range(N)] for runs in (without, with_clip)))

# %% [markdown]
# **What to see.** Mini-batch 1 is a point at 0: never stale. From there the spread grows, and far more downwards than
# upwards: a likely token has no room to rise, but every token has room to fall. Up to mini-batch 2 the two are one run,
# because the first mini-batch has nothing to clip. Then the run without clipping runs ahead. The axis on the left is
# logarithmic outside ±0.5.

# %% [markdown]
# ## 3 · The mask: four quadrants
#
# A token is pushed up or down, and it has moved up or down since the rollout. By hand, one token for each case:

# %%
ratios = torch.tensor([[0.60, 0.90, 1.10, 1.40], [0.60, 0.90, 1.10, 1.40]])
logp_old, advantages = torch.full_like(ratios, -1.5), torch.tensor([0.5, -0.5])
logp = (logp_old + ratios.log()).requires_grad_()
minirl_loss(logp, logp_old, logp_old, advantages, torch.ones_like(ratios).bool()).loss.backward()
push = -2 * logp.grad + 0.0  # what the gradient step adds, times B = 2
show_table(
    ["", *(f"r = {r:.2f}" for r in ratios[0].tolist())],
    [[f"Â = {a:+.1f}", *(f"{g:+.2f}" if g else "**dropped**" for g in row)]
     for a, row in zip(advantages.tolist(), push.tolist(), strict=True)],
)  # fmt: skip

# %% [markdown]
# Two of the four far-off tokens are dropped: those that went *with* their push. The other two moved against it and keep
# their gradient, $r\hat A$ here. A good token that has become rare has a small weight, and a bad one that has become
# likely has a large one.

# %% [markdown]
# {exercise} 04.2
# Write $M_t$ as a tensor `[B, T]`: 1 where a token keeps its gradient, 0 where it is dropped. `advantages` is `[B]`.


# %%
def keep_mask(logp, logp_old, advantages, eps_low, eps_high):
    """M_t of equation (7)."""
    # solution
    ratio, sign = (logp - logp_old).exp(), advantages[:, None]
    dropped = ((sign > 0) & (ratio > 1 + eps_high)) | ((sign < 0) & (ratio < 1 - eps_low))
    return (~dropped).float()
    # end


check("04.2", keep_mask)

# %% [markdown]
# Now all tokens of the stalest mini-batch, each as a dot. Its height is its advantage; a little noise keeps the dots
# apart.

# %%
plot_quadrants(with_clip[0][0][N - 1], rollouts[0][N - 1])

# %% [markdown]
# **What to see.** Most tokens are near 0: the commas and the sure digits. Shaded are the two quadrants that drop. The
# lower left one does most of the work. In the upper left are good tokens that other updates have made rarer: a clip on
# both sides would leave them there. The row at 0 belongs to groups that were all right or all wrong: no push, no drop.

# %% [markdown]
# {exercise} 04.3
# The two metrics: which fraction of the response tokens is dropped with $\hat A > 0$, and which with $\hat A < 0$?
# `mask` is true on response tokens; what stands elsewhere, NaN included, must not matter. Use the paper's bounds,
# `EPS_LOW` and `EPS_HIGH`.


# %%
def dropped_by_sign(logp, logp_old, advantages, mask):
    """(fraction dropped with Â > 0, fraction dropped with Â < 0), both of all response tokens."""
    # solution
    ratio, sign = (logp - logp_old).exp(), advantages[:, None]
    positive = (sign > 0) & (ratio > 1 + EPS_HIGH) & mask
    negative = (sign < 0) & (ratio < 1 - EPS_LOW) & mask
    return positive.sum() / mask.sum(), negative.sum() / mask.sum()
    # end


check("04.3", dropped_by_sign)

# %% [markdown]
# The loss returns the same two as metrics. On every mini-batch of our rollouts:

# %%
rows = []
for k in range(N):
    pairs = [
        clip_fractions(batches[k].logp_old + seen[k], batches[k].logp_old, batches[k])
        for (seen, _), batches in zip(with_clip, rollouts, strict=True)
    ]
    rows.append([k + 1, k, *(f"{share:.2%}" for share in np.mean(pairs, 0))])
assert rows[0][2:] == ["0.00%", "0.00%"]
show_table(["mini-batch", "updates since the rollout", "dropped, Â > 0", "dropped, Â < 0"], rows)

# %% [markdown]
# ## 4 · The same gradient as PPO's minimum
#
# PPO maximises $\min(r\hat A, \mathrm{clip}(r)\hat A)$. Its value and its gradient, over the ratio:

# %%
r, curves = torch.linspace(0.2, 2.2, 401, dtype=torch.float64), {}
for sign in (1.0, -1.0):
    log_ratio = r.log().requires_grad_()
    surrogate = torch.minimum(log_ratio.exp() * sign, log_ratio.exp().clamp(1 - EPS_LOW, 1 + EPS_HIGH) * sign)
    (slope,) = torch.autograd.grad(surrogate.sum(), log_ratio)
    out = r > 1 + EPS_HIGH if sign > 0 else r < 1 - EPS_LOW
    torch.testing.assert_close(slope, torch.where(out, 0.0, r * sign))  # equation (04.4)
    curves[sign] = surrogate.detach(), slope
plot_surrogate(r, curves)

# %% [markdown]
# **What to see.** Where the solid line is flat the dashed one is exactly 0. Elsewhere it is $r\hat A$. On the left it
# is flat above 1.27, on the right below 0.8: the two quadrants. The cell has compared the dashed line with
# $M\,r\,\hat A$ at every point. Dropping the gradient and taking the minimum are one rule.

# %% [markdown]
# {exercise} 04.4
# Write the surrogate of every token, `[B, T]`, to be maximised, so that autograd through it gives $M_t\, r_t\, \hat A$.
# Here `advantages` has the shape of `logp`.


# %%
def ppo_surrogate(logp, logp_old, advantages, eps_low, eps_high):
    """min(r Â, clip(r) Â) of every token."""
    # solution
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    # end


check("04.4", ppo_surrogate)

# %% [markdown]
# ## 5 · Which denominator
#
# The responses are samples of $\mu_{old}$. Why not clip $\pi_\theta/\mu_{old}$? Below, over $r = \pi_\theta/\pi_{old}$,
# the coefficient of a token's $\nabla\log\pi_\theta$ under both clips. The engine drew the token too rarely.

# %%
clip_picture(1.5)

# %% [markdown]
# **What to see.** At $r = 1$ nothing has been learned yet, and on the left the clip on $\mu_{old}$ has already dropped
# the token. It is just the token that should count *more*. The clip was meant for the optimiser's steps, and it
# punishes the engine's rounding.
#
# **Turn it yourself**, with a live kernel: at which discrepancies does the wrong clip drop a token before any update,
# and where does it let a token run too far?

# %%
sliders(clip_picture, discrepancy=([0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5], 0.6))

# %% [markdown]
# How many tokens is that? The same weights and problems, engines of fewer and fewer bits, no update at all:

# %%
rows = []
for precision in ("bf16", "fp8_e4m3", "int8", "int5", "int4", "int3"):
    lost = []
    for seed in range(3):
        for batch in one_rollout(seed, precision, mini_batches=pick(fast=2, full=8)):
            references = batch.rollout.logp_rollout, batch.logp_old
            lost.append([sum(clip_fractions(batch.logp_old, reference, batch)) for reference in references])
    rows.append([precision, *(f"{share:.2%}" for share in np.mean(lost, 0))])
show_table(["engine", "dropped by a clip on μ_old", "by a clip on π_old"], rows)

# %% [markdown]
# The right column is zero by construction. The left one is small where there are many bits, and no longer small at
# three. All of it is lost to the engine's error, on-policy, where there is no staleness.

# %% [markdown]
# {exercise} 04.5
# Off-policy both happen at once. Return, as booleans `[B, T]`, the response tokens that a clip on
# $\pi_\theta/\mu_{old}$ drops and a clip on $\pi_\theta/\pi_{old}$ keeps.


# %%
def lost_to_the_engine(logp, logp_old, logp_rollout, advantages, mask):
    """True where only the clip with the wrong denominator drops the token."""

    # solution
    def out(reference):
        ratio, sign = (logp - reference).exp(), advantages[:, None]
        return ((sign > 0) & (ratio > 1 + EPS_HIGH)) | ((sign < 0) & (ratio < 1 - EPS_LOW))

    return out(logp_rollout) & ~out(logp_old) & mask
    # end


check("04.5", lost_to_the_engine)

# %% [markdown]
# ## 6 · What the clip does not do
#
# **It does not bring a token back, and the token does not stand still.** We follow the bad tokens of mini-batch 4 that
# the clip drops at their update, the fourth. Where do they go during updates 4 to 8?

# %%
paths = []
for (_, path), batches in zip(with_clip, rollouts, strict=True):
    bad = (batches[FOLLOW].advantages[:, None] < 0) & batches[FOLLOW].rollout.response_mask
    paths.append(path[:, bad & (path[FOLLOW].exp() < 1 - EPS_LOW)])
paths = torch.cat(paths, 1).numpy()
plot_paths(paths, FOLLOW)

# %%
before, after = paths[FOLLOW], paths[-1]
print(f"tokens dropped at their update   {len(before)}")
print(f"median log r when dropped        {np.median(before):+.2f}")
print(f"median log r at the end          {np.median(after):+.2f}")
print(f"back within the bounds           {(after > np.log(1 - EPS_LOW)).mean():.0%}")
print(f"further away than when dropped   {(after < before).mean():.0%}")

# %% [markdown]
# **What to see.** Each thin line is a token (at most 200 are drawn). Right of the dashed line no gradient of its own
# acts on it, and the lines go on: up for some, down for others, pushed by other responses and by the optimiser's
# momentum.
#
# **It does not bound the KL.** A sampled token with ratio exactly 1, and two others that exchange their probability,
# equation (04.8):

# %%
for delta in (0.25, 0.1, 0.01, 0.001, 1e-6):
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.5, 0.5 - delta, delta])
    kl = (old * (old / new).log()).sum()
    print(f"δ = {delta:<8g} ratio of the sampled token {new[0] / old[0]:.0f}   KL {kl:.3f} nats")

# %% [markdown]
# What our runs say about this: [unit 12](12_evidence.ipynb).
#
# **Try this.** Set `RATE = 3e-4`, then `2e-3`: at which rate do the two runs become one, and at which does the clip no
# longer hold? Pass `eps_low=0.05, eps_high=0.05` to `minirl_loss` in `updates_from`: how stale does it get?

# %% [markdown]
# ## Your file, step 04

# %% [markdown]
# {capstone} 04

# %%
check_file("04")
