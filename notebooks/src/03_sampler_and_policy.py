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
# and both hold the same weights. You measure how far apart they are, weight each token so that the difference drops out
# of the expectation, see what happens without the weight, and predict when leaving it out makes the entropy collapse.
#
# **A picture to keep: one recipe, two stoves.** The recipe is the weights. The restaurant's fast gas stove is the
# sampler, the test kitchen's slow stove is the trainer. The recipe is the same in both kitchens. The dishes are not.
#
# All names come from `minirl_edu/course/lab03.py`, which also draws the charts.

# %%
from minirl_edu.course.lab03 import *

# %% [markdown]
# ## 1 · One recipe, two stoves
#
# The smallest engine there is: one hidden vector, four tokens, a weight matrix of four rows. The trainer multiplies in
# full precision. The sampler's matrix is rounded to 4-bit integers, one scale for each row.

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
# The last column is the **importance weight** of a token. Above 1, the sampler draws this token more rarely than the
# trainer would, so each draw counts for more. The mean weight under the sampler is exactly 1. A weighted mean over the
# sampler's tokens is the plain mean over the trainer's, whatever is averaged:

# %%
anything = torch.tensor([3.0, -1.0, 0.5, 10.0])
print(f"mean weight under the sampler        {(mu_row * pi_row / mu_row).sum():.6f}")
print(f"mean of `anything` under the trainer {(pi_row * anything).sum():.6f}")
print(f"weighted mean under the sampler      {(mu_row * (pi_row / mu_row) * anything).sum():.6f}")
print(f"plain mean under the sampler         {(mu_row * anything).sum():.6f}")

# %% [markdown]
# After some updates there is a third policy, $\pi_\theta$. The weight splits into the two stoves and the rewriting of
# the recipe:
#
# $$\frac{\pi_\theta}{\mu_{old}} = \underbrace{\frac{\pi_{old}}{\mu_{old}}}_{\text{discrepancy}}\times
# \underbrace{\frac{\pi_\theta}{\pi_{old}}}_{\text{staleness}} \tag{5}$$
#
# This lab is about the first factor, [lab 04](04_staleness_and_clipping.ipynb) about the second.

# %% [markdown]
# ## 2 · Three estimators of one KL
#
# One number for the distance between the stoves is $KL(\mu_{old}\|\pi_{old})$, in nats per token. The two
# log-probabilities of the *drawn* tokens suffice to estimate it. Here $r = \pi_{old}/\mu_{old}$. The table has exact
# expectations on the four tokens above; in its last two columns the ratio is upside down, or the trainer drew.

# %%
r = pi_row / mu_row
estimators = {"k1": lambda r: -r.log(), "k2": lambda r: r.log() ** 2 / 2, "k3": lambda r: r - 1 - r.log()}
print(f"KL(μ_old ‖ π_old) = {(mu_row * (mu_row / pi_row).log()).sum():.6f} nats")
print(f"KL(π_old ‖ μ_old) = {(pi_row * (pi_row / mu_row).log()).sum():.6f} nats")
show_table(
    ["", "mean under μ_old", "smallest term", "with r upside down", "tokens drawn by π_old"],
    [[name, f"{(mu_row * k(r)).sum():.6f}", f"{k(r).min():+.4f}", f"{(mu_row * k(1 / r)).sum():+.6f}",
      f"{(pi_row * k(r)).sum():+.6f}"] for name, k in estimators.items()],
)  # fmt: skip

# %% [markdown]
# $k_1$ and $k_3$ have the KL as their mean, $k_2$ misses it a little. $k_3$ is never negative. In the last two columns
# none of the three is the KL: $k_1$ is negative there, and $k_3$ gives a plausible positive number, which is worse.
#
# Next the noise: 64 tokens, and a sampler whose logits have an error that grows from left to right. The standard error
# of a mean over 2,000 tokens is computed exactly, not sampled.

# %%
plot_estimators(estimators)

# %% [markdown]
# **What to see.** Left: $k_1$ is a straight line through zero. $k_3$ touches zero, stays close to $k_2$ around it, and
# shoots up for large $\log r$. Right: the closer the engines, the more the noise of $k_1$ exceeds the number that it
# estimates. The relative noise of $k_3$ stays where it is. Where ratios are large, $k_3$ is the noisier one. The paper
# plots $k_1$; where that curve dips below zero, read $k_3$.

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
# Return a dictionary: for each purpose one of `"k1"`, `"k2"`, `"k3"` or `"none"`. Wanted is $KL(\mu_{old}\|\pi_{old})$,
# and $r = \pi_{old}/\mu_{old}$.
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
# Responses of up to three tokens over a vocabulary of four can all be written down, so expectations are finite sums.
# The sampler is the trainer's policy with an error added to its logits. `problem(seed, size)` makes one of 20 random
# problems. We compare three gradients with $\nabla J$ of the *trainer's* policy and with that of the *sampler's*.


# %%
def gradient_without_weight(pi, mu, rewards):
    """E_{y~μ}[ R(y) ∇log π(y) ]: the sampler's tokens, taken as if the trainer had drawn them."""
    return pi.score_sum((mu.response_probs() * rewards)[:, None].expand(pi.mask.shape))


GRADIENTS = {"sequence weight": exact.sequence_gradient, "token weight": exact.token_gradient,
             "no weight": gradient_without_weight}  # fmt: skip


def compare_gradients(size):
    """Cosines with the trainer's own policy gradient and with the sampler's, [2, problems] for each method."""
    found = {name: [] for name in GRADIENTS}
    for pi, error, rewards in (problem(seed, size) for seed in range(PROBLEMS)):
        mu = pi.moved(error)
        targets = [gradient_without_weight(policy, policy, rewards) for policy in (pi, mu)]
        for name, gradient in GRADIENTS.items():
            own = gradient(pi, mu, rewards - (mu.response_probs() * rewards).sum())
            found[name].append([cosine(own, target) for target in targets])
    return {name: np.array(values).T for name, values in found.items()}


sizes = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
plot_cosines(sizes, [compare_gradients(size) for size in sizes])

# %% [markdown]
# **What to see.** Left: with sequence weights the direction is exact. With token weights it drifts off (lesson 02's
# remainder), without weights further. Right: measured against the gradient that improves the **sampler's** policy, the
# order is reversed. On these short responses a missing weight makes the gradient nearly right for the other stove. The
# bands are 95 % intervals over problems.
#
# Now train, 60 exact gradient steps. The sampler's error is **the same** at every sync (a stove that always runs hot),
# or it is **drawn anew** (a flame that flickers).


# %%
def train_exactly(method, *, fixed, size=1.5, steps=60, rate=1.0):
    """Expected reward under the trainer's and the sampler's policy, [2, problems, steps]."""
    curves = []
    for seed in range(PROBLEMS):
        pi, error, rewards = problem(seed, size)
        generator, path = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            if not fixed:
                error = size * torch.randn(error.shape, generator=generator, dtype=torch.float64)
            mu = pi.moved(error)
            path.append([float((policy.response_probs() * rewards).sum()) for policy in (pi, mu)])
            pi = pi.moved(GRADIENTS[method](pi, mu, rewards - path[-1][1]), rate)
        curves.append(path)
    return np.array(curves).transpose(2, 0, 1)


cases = [(method, fixed) for method in ("token weight", "no weight") for fixed in (True, False)]
plot_training({(method, fixed): train_exactly(method, fixed=fixed) for method, fixed in cases})

# %% [markdown]
# **What to see.** Top: with an error that comes back, training without the weight serves the sampler, and the trainer's
# policy pays for it: the recipe now makes up for a stove that the test kitchen does not have. Bottom: with an error
# that is drawn anew there is nothing to make up for, and in the end the difference is gone. These runs have no sampling
# noise. They show the bias of a missing weight, not the noise that a weight costs.

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
# A token that the sampler drew with probability 0.001 and the trainer would draw with 0.1 counts as a hundred. MiniRL
# truncates: $\min(\pi_\theta/\mu_{old},\,5)$. The **effective sample size**, $(\sum w)^2/(n\sum w^2)$, is the share of
# the tokens that a weighted average really rests on:

# %%
counts = torch.tensor([40, 40, 19, 1])  # how often 100 draws of the sampler show each of four tokens
drawn = torch.arange(4).repeat_interleave(counts)[None]
for cap in (math.inf, 5.0):
    w = (torch.tensor([0.40, 0.35, 0.05, 0.20]) / (counts / 100)).clamp(max=cap)
    ess = token_ess(w.log()[drawn], torch.zeros(1, 100), torch.ones_like(drawn).bool())
    print(f"cap {cap:>4}: largest weight {w.max():5.1f}, effective sample size {ess:.2f} of 1")

# %% [markdown]
# Without the cap the average rests on one token in a hundred.

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
# What the cap costs and saves. `pi`, `mu`, `values` are `[V]`; draws come from `mu` and are averaged with weight
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
# The same two numbers for 64 tokens, a coarse sampler and rewards 0 or 1:

# %%
plot_cap()

# %% [markdown]
# **What to see.** Left: the bias vanishes as the cap rises, and the standard deviation grows until no weight reaches
# the cap. Right: the more draws, the higher the best cap (dots), because averaging removes noise and not bias. 5 (thin
# line) is one compromise, not a constant of nature.

# %% [markdown]
# ## 5 · Temperature, top-p and raw log-probabilities
#
# The weight needs the distribution that each token was drawn from. Here the tiny Mixture-of-Experts model samples **in
# full precision** at temperature 0.7, so there is no discrepancy to find.

# %%
model, task, prompts = load_chain()
cold = HFEngine(model, Precision.parse("fp32")).generate(
    prompts, group_size=8, sampling=Sampling(task.max_new_tokens, temperature=0.7), seed=0
)
layout, tokens = lay_out(cold, share_prompts=True), cold.response_mask
with torch.no_grad():
    processed, raw = (response_logprobs(model, layout, temperature=t).logp for t in (0.7, 1.0))
plot_reported({"log-probs of what was drawn from": cold.logp_rollout, "raw log-probs": raw}, processed, tokens)

# %%
show_table(
    ["log μ_old is …", "and the trainer uses", "k1, nats", "k3, nats", "largest weight"],
    [[reported, trainer, f"{kl_k1(mu, pi, tokens) + 0.0:+.4f}", f"{kl_k3(mu, pi, tokens):.4f}",
      f"{(pi - mu)[tokens].exp().max():.3f}"]
     for reported, mu in (("that of the draw", cold.logp_rollout), ("raw, T = 1", raw))
     for trainer, pi in (("T = 0.7", processed), ("T = 1", raw))],
)  # fmt: skip

# %% [markdown]
# **What to see.** Left, all tokens are on the line: the engines are one function. Right, the same tokens and the same
# engine, and a discrepancy out of nothing. In the table the first row is right. In the second the weights correct
# towards a policy that nobody sampled. In the third $k_1$ is steadily *negative*, as this mistake looks on a dashboard.
# In the last row both errors cancel and every number reads zero, and the tokens still came from another distribution.
#
# **top-p** is worse: tokens outside the nucleus are never drawn, and no weight brings them back. Here the trainer is
# the same function as the sampler before the cut, and a rare token is rewarded:

# %%
mu_full, reward_of = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05]), torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
kept = torch.tensor([True, True, True, False, False])
nucleus = mu_full * kept / mu_full[kept].sum()
for name, w in (("before", torch.ones(5)), ("after", mu_full / nucleus)):
    mean = (nucleus * w * reward_of)[kept].sum()
    print(f"log-prob {name:6} the cut: weighted mean reward {mean:.3f}, wanted {(mu_full * reward_of).sum():.3f}")

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
# ## 6 · A noisy engine is flatter
#
# Add noise to the logits, anew at every sync. On the logits it averages out. On the probabilities it does not:

# %%
one_pi = torch.tensor([0.6, 0.3, 0.1])
jitter = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
one_mu = (one_pi.log() + torch.cat([jitter, -jitter])).softmax(-1).mean(0)
print("trainer π     ", "  ".join(f"{p:.3f}" for p in one_pi))
print("engine, mean μ", "  ".join(f"{p:.3f}" for p in one_mu), "  likely tokens lose, unlikely ones gain")

# %% [markdown]
# ## 7 · A signal and a drift
#
# Without the weight the gradient has two parts. The *signal* knows which token was better. The *drift* only knows how
# the whole response does: every token of a response that does worse than its group pushes $\pi$ away from the sampler,
# every token of one that does better pulls it towards the sampler. With the weight $\pi/\mu$ there is no drift.

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
# the response is over for a winner and goes on for a loser, or the other way round. Three quarters of the contexts
# start with a wrong mode. The engine's logits are the trainer's plus noise. Predict before you look.

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
plot_world(worlds)

# %%
show_table(
    ["responses", "Cov(\\|y\\|, R), step 0", "entropy_drift, step 0", "drift ÷ signal, computed beforehand"],
    [[case, f"{start['length_reward_cov'][:, 0].mean():+.1f}", f"{start['entropy_drift'][:, 0].mean():+.3f}",
      f"{doomed_tails_border(**options):+.2f}"]
     for case, options in CASES.items() for start in [worlds[case, "− IS"]]],
)  # fmt: skip

# %% [markdown]
# **What to see.** Without the weight the entropy falls on the left and rises on the right. In the middle both methods
# do nearly the same. The table has the sign before the first step. Every run of the library logs `length_reward_cov`
# and `entropy_drift`. The last column is computed from the policy at the start: beyond ±1 the drift outweighs the
# signal, and there the score without the weight ends where it began, or lower.
#
# What our runs say about this: [unit 12](12_evidence.ipynb).

# %% [markdown]
# ## 8 · A real engine: turn the dial
#
# The tiny model samples 256 responses through an engine of your choice; the trainer reads the same tokens in full
# precision. Each dot is a token. On the line, the two stoves agree.

# %%
gap_picture("int3", 5)

# %% [markdown]
# **What to see.** Dots *below* the line are tokens that the sampler drew and the trainer finds less likely: their
# weight is almost 0. Dots *above* it have weights above 1, and a cross is one that the cap cuts. Small weights add no
# variance, so the effective sample size is still high; the KL counts them in full.
#
# **Turn it yourself**, with a live kernel. At which engine do you first *see* the cloud, and what does $k_3$ say there?

# %%
sliders(gap_picture, precision=(ENGINES, "int4"), cap=([1.05, 1.2, 2, 5, 10], 5))

# %% [markdown]
# **Try this.** Call `plot_estimators(estimators, tokens=2_000_000)`: is $k_1$ good enough now at a KL of $10^{-6}$
# nats? Give `doomed_tails` a smaller `sigma`, or `wrong=0.0`: what does `doomed_tails_border` say before you run it?
#
# Back to the [lesson](../lessons/03_sampler_and_policy.md), for the proofs.

# %% [markdown]
# ## Your file, step 03

# %% [markdown]
# {capstone} 03

# %%
check_file("03")
