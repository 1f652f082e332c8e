# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Length norm, GRPO, CISPO and the other corrections
#
# The lab of [lesson 05](../lessons/05_length_norm.md). Every algorithm here multiplies $\nabla\log\pi$ by a coefficient
# and divides by something. The divisor looks like a choice of units, and it is a choice of objective. The coefficient
# decides which tokens are dropped, and what is done about the sampler.
#
# **A picture to keep: red ink on essays.** In the first school every page of a poor essay gets a full stroke. In the
# second each essay has one stroke's worth of ink, spread over its pages: a long poor essay is faintly pink all over.
# Pupils of the second school learn to be brief when they are right, and long when they are wrong.
#
# All names come from `minirl_edu/course/lab05.py`, which also draws the charts.

# %%
from minirl_edu.course.lab05 import *

# %% [markdown]
# ## 1 · Red ink by page, by essay, by class
#
# Four responses to one prompt: two right ones of 2 and 6 tokens, two wrong ones of 2 and 8 tokens. Nothing has moved
# yet: $\pi_\theta=\pi_{old}=\mu_{old}$. We read off $-\partial\,\text{loss}/\partial\log\pi_\theta(y_t)$, the push on
# each token's log-probability.

# %%
lengths = torch.tensor([2, 6, 2, 8])
mask = torch.arange(8) < lengths[:, None]
advantages = group_mean_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), 4)
flat = torch.full(mask.shape, math.log(0.5))


def push(loss_of):
    """−∂loss/∂logp for every token, where θ = θ_old."""
    logp = flat.clone().requires_grad_()
    loss_of(logp).loss.backward()
    return -logp.grad


pushes = {
    "sum over tokens (MiniRL)": push(lambda x: minirl_loss(x, flat, flat, advantages, mask)),
    "÷ own length (GRPO)": push(lambda x: minirl_loss(x, flat, flat, advantages, mask, length_norm=True)),
    "÷ tokens of the batch (CISPO)": push(lambda x: cispo_loss(x, flat, advantages, mask)),
}
names = ["right, 2", "right, 6", "wrong, 2", "wrong, 8"]
plot_pushes(pushes, mask, names)

# %%
show_table(
    ["total of a row", *names, "all right", "all wrong"],
    [[name, *(f"{row:+.3f}" for row in values.sum(1)), f"{values[:2].sum():+.3f}", f"{values[2:].sum():+.3f}"]
     for name, values in pushes.items()],
)  # fmt: skip

# %% [markdown]
# **What to see.** Blue tokens become likelier, red ones rarer. Left and right, all tokens of one colour are equally
# strong, and the two panels differ by one common factor. In the middle every *row* has the same total, so a token of a
# long response gets little: the long wrong answer is the palest of all. All divisors count the whole mini-batch, or
# what is learned depends on how the batch is cut ([lesson 08](../lessons/08_minirl.md)).

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
# `enumerable(seed)` makes a policy over responses of one to four tokens. All of them can be enumerated, so gradients
# are exact. We compare the expected update of two divisors with the gradient of the expected reward, and the second one
# with what autograd finds for $\mathbb E_\pi[(R-b)/|y|]$, the baseline $b$ held at its present value.

# %%
pi, reward, length = enumerable(0)
baseline = pi.response_probs() @ reward
wanted = exact.sequence_gradient(pi, pi, reward)
by_own_length = expected_update(pi, (reward - baseline) / length)
print(f"cosine with ∇E[R]: sum over tokens {cosine(expected_update(pi, reward - baseline), wanted):.6f}")
print(f"                   ÷ own length    {cosine(by_own_length, wanted):.6f}")

logits = pi.logits.clone().requires_grad_()
objective = (exact.TabularPolicy(logits, 4).response_probs() * (reward - baseline) / length).sum()
torch.testing.assert_close(torch.autograd.grad(objective, logits)[0], by_own_length)
show_table(
    ["a response that is", "reward R", f"the reward it trains on, (R − b)/length, b = {baseline:.2f}"],
    [[f"{kind}, {n} tokens", r, f"{(r - baseline) / n:+.3f}"]
     for kind, r in (("right", 1), ("wrong", 0)) for n in (1, 2, 4)],
)  # fmt: skip

# %% [markdown]
# Length normalisation follows a policy gradient for **another reward**, $(R-b)/|y|$. Under it the best response is
# right and short, and of the wrong ones the **longest is the best**. How far the direction is off depends on how much
# lengths vary:

# %%
plot_directions()

# %% [markdown]
# **What to see.** Left: 300 random prompts with eight responses each. With equal lengths the direction is right. The
# more they vary, the further it turns, and for a few prompts it points *away* from the gradient (below 0). Right: the
# token mean is GRPO's direction for $B=1$ and approaches the sum's. For hundreds of responses the division by
# $\sum|y|$ is a learning rate. What remains different in CISPO is in section 5.

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
# of 100 tokens (0.75). One small exact step in each direction:

# %%
step_picture(100, 0.1)

# %% [markdown]
# **What to see.** By the sum, the right response gains at the expense of the common wrong one. Divided by length, the
# short wrong response is punished so much harder that what it loses goes *to the long wrong one*, and the right one
# **loses** as well. The case is extreme, made for the purpose. With the sum it is impossible: its step is the gradient.
#
# **Turn it yourself.** From which length on does the expected reward fall? And for a policy that is more often right?

# %%
sliders(step_picture, length=([1, 2, 5, 10, 20, 50, 100, 200], 50), right=([0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9], 0.1))

# %% [markdown]
# What does this add up to? Twenty policies of section 2, exact ascent. The length-normalised update is multiplied by
# the mean length at the start, so that step sizes match.


# %%
def train_exactly(normalise, *, steps=60, rate=2.0):
    """Expected reward, mean length of wrong responses and of right ones, [3, problems, steps]."""
    curves = []
    for pi, reward, length in map(enumerable, range(20)):
        scale, rows = pi.response_probs() @ length, []
        for _ in range(steps):
            p = pi.response_probs()
            rows.append([p @ reward, *(p * kind @ length / (p @ kind) for kind in (1 - reward, reward))])
            advantage = reward - p @ reward
            pi = pi.moved(expected_update(pi, scale * advantage / length if normalise else advantage), rate)
        curves.append(rows)
    return np.array(curves).transpose(2, 0, 1)


plot_lengths(train_exactly(False), train_exactly(True))

# %% [markdown]
# **What to see.** The reward rises under both. Divided by length, what is still wrong is clearly longer than under the
# sum. So "responses grow longer" need not mean that a model thinks more: with this objective a wrong answer is rewarded
# for its length.

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
    [[k, *(f"{x[8 * i + j]:+.3f}" for x in (mean_only, with_std) for j in (0, 7)),
      f"{with_std[8 * i] / mean_only[8 * i]:.2f}"] for i, k in enumerate((1, 4, 7))],
)  # fmt: skip

# %% [markdown]
# Within a prompt it is a factor. Between prompts it changes the weights. In a group of $G$ the standard deviation is
# itself estimated, which tames the weight at the edges:

# %%
plot_group_weights()

# %% [markdown]
# **What to see.** With the mean only, every prompt's gradient counts alike. With the standard deviation, prompts that
# are nearly always right or nearly always wrong count more, several times more in large groups. Then the mean score is
# no longer what is optimised.

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
# ## 5 · GRPO, CISPO and dual clip, token by token
#
# Now $\theta$ has moved, and the sampler differs from the trainer. One batch by hand: a right response of four tokens
# and a wrong one of two, with a token for each case.

# %%
hand_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
old = torch.tensor([[0.50, 0.30, 0.40, 0.08], [0.40, 0.50, 1.00, 1.00]])
ratio = torch.tensor([[1.00, 1.50, 0.70, 1.00], [0.70, 1.40, 1.00, 1.00]])  # π_θ/π_old
sampler = torch.tensor([[0.50, 0.30, 0.40, 0.01], [0.40, 0.50, 1.00, 1.00]])  # μ_old
plain, standard = (f(torch.tensor([1.0, 0.0]), 2) for f in (group_mean_advantages, group_mean_std_advantages))
columns = []
for loss_of in (
    lambda x: minirl_loss(x, old.log(), sampler.log(), plain, hand_mask),
    lambda x: grpo_loss(x, old.log(), standard, hand_mask),
    lambda x: cispo_loss(x, old.log(), standard, hand_mask),
):
    logp = (old * ratio).log().requires_grad_()
    loss_of(logp).loss.backward()
    columns.append([f"{value:+.3f}" for value in (-logp.grad + 0.0)[hand_mask].tolist()])
cases = ["unmoved", "far along its push", "against its push", "sampler 8× rarer"]
kinds = [*(f"right: {case}" for case in cases), *(f"wrong: {case}" for case in cases[1:3])]
show_table(["token", "MiniRL", "GRPO", "CISPO"], list(zip(kinds, *columns, strict=True)))

# %% [markdown]
# *Unmoved*: three numbers for the same token, from the divisors (2 responses; 4 tokens of 2 responses; 6 tokens) and
# from the standard deviation, which doubles the advantage here. *Far along its push*: MiniRL and GRPO let go, CISPO
# keeps pushing. *Against its push*: all three keep the gradient. *Sampler 8× rarer*: only MiniRL sees $\mu_{old}$, and
# counts the token 5 times, its cap. The same as functions of the ratio, without divisors, and with the **dual clip**,
# which also drops a bad token that has become far likelier:

# %%
relatives(1.5, 3.0)

# %% [markdown]
# **What to see.** *Left:* MiniRL and GRPO let go at the same ratio, because both measure against $\pi_{old}$. MiniRL's
# line is steeper, it carries the engines' factor of 1.5. CISPO never lets go and never passes 5. *Right:* MiniRL and
# GRPO drop below 0.8. Above 1 GRPO's coefficient grows without end, the dual clip cuts it to zero, and MiniRL's cap
# holds it at 5. **Turn it yourself**:

# %%
sliders(relatives, discrepancy=([0.4, 0.7, 1.0, 1.5, 2.5], 0.7), dual=([1.5, 2.0, 3.0, 4.0, 6.0], 3.0))

# %% [markdown]
# Now write the three. `logp` is $\log\pi_\theta$ `[B, T]` with gradient, the other log-probabilities are without;
# `advantages` is `[B]`; return the scalar loss.

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
# ## 6 · Nearly MiniRL
#
# The paper caps the *product* $\pi_\theta/\mu_{old}$. A common look-alike caps the discrepancy alone and multiplies by
# the staleness afterwards. Another one has a lower bound too. On four tokens:

# %%
discrepancy, staleness = torch.tensor([8.0, 8.0, 4.0, 0.1]), torch.tensor([1.2, 0.5, 1.8, 1.1])
weights = {
    "π_old/μ_old": discrepancy,
    "π_θ/π_old": staleness,
    "MiniRL": (discrepancy * staleness).clamp(max=5),
    "cap on the discrepancy": discrepancy.clamp(max=5) * staleness,
    "bounded below": (discrepancy * staleness).clamp(0.5, 5),
}
show_table(["token", *weights], [[t + 1, *(f"{w[t]:.2f}" for w in weights.values())] for t in range(4)])

# %% [markdown]
# With the cap on the discrepancy the first and the third token pass 5, and the second loses weight although its product
# is small. The lower bound raises the last token, which the trainer would hardly draw.

# %% [markdown]
# ## 7 · The other corrections
#
# `minirl_loss(correction=…)` puts another weight in the place of $\min(\pi_\theta/\mu_{old}, 5)$. On-policy, for two
# responses with these ratios $\pi_{old}/\mu_{old}$, both with $\hat A<0$:

# %%
k = torch.tensor([[2.0, 1.5, 2.5, 1.0], [0.3, 8.0, 0.9, 1.0]])
both, nothing = torch.ones_like(k).bool(), torch.full_like(k, math.log(0.1))
show_table(
    ["correction", *(f"k = {x:g}" for x in k.flatten())],
    [[name, *(f"{x:.2f}" for x in weight(nothing, nothing, nothing - k.log(), -torch.ones(2), both).weight.flatten())]
     for name, weight in CORRECTIONS.items()],
)  # fmt: skip

# %% [markdown]
# {exercise} 05.7
# Two weights of a whole response, on-policy. From `logp_old` and `logp_rollout` `[B, T]` and a `mask`, return two
# tensors `[B]`: the product of $\pi_{old}/\mu_{old}$ over the response's tokens, truncated at `cap`, and the geometric
# mean of the same ratios, without a cap. Padding may hold anything, NaN included.


# %%
def response_weights(logp_old, logp_rollout, mask, cap):
    # solution
    total = torch.where(mask, logp_old - logp_rollout, 0.0).sum(1)
    return total.exp().clamp(max=cap), (total / mask.sum(1)).exp()
    # end


check("05.7", response_weights)

# %% [markdown]
# A weight has two costs: the drift that it leaves (lab 03, section 7), and its variance. Both are computed here by
# enumerating one prompt's responses, for an engine with noise $\sigma=1$ on its logits, as multiples of those of *none*
# (± 1.96 standard errors over the noise):

# %%
show_table(
    ["correction", "drift left", "variance"],
    [[name, f"{left:+.2f} ± {1.96 * error:.2f}", f"{variance:.2f}"]
     for name, (left, error, variance) in exact_shares().items()],
)  # fmt: skip

# %% [markdown]
# And the world of lab 03, in which wrong responses are longer, all are alike, or right ones are longer:

# %%
SEEDS, STEPS = pick(fast=(3, 60), full=(8, 300))
SHOWN = ["MiniRL", "− IS", "token masked", "sequence truncated", "geometric mean"]
plot_scores({
    case: {name: doomed_tails(VARIANTS[name], seeds=SEEDS, steps=STEPS, **options)["score"][:, -1] for name in SHOWN}
    for case, options in WORLDS["doomed_tails"].scenarios.items()
})  # fmt: skip

# %% [markdown]
# **What to see.** The bars are means over seeds with their 95 % interval. Look for the only weight that learns in all
# three cases, and for the case in which no weight is best. The world is a table of logits, not a language model. What
# our runs say about this: [unit 12](12_evidence.ipynb).

# %% [markdown]
# {exercise} 05.8
# Choose the correction, from the table and the figure above. For each purpose return one of `"none"` (− IS),
# `"token truncated"` (MiniRL), `"token masked"` or `"sequence"` (a product over the whole response):
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


check("05.8", chosen_corrections)

# %% [markdown]
# **Try this.** In section 3, `right = 0.5`: how long must the long answers be for the expected reward to fall? In
# section 7 give `doomed_tails` `sigma=0.5`: which corrections recover?
#
# Back to the [lesson](../lessons/05_length_norm.md), for the proofs.

# %% [markdown]
# ## Your file, step 05

# %% [markdown]
# {capstone} 05

# %%
check_file("05")
