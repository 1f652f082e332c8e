# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The token objective: a first-order approximation
#
# The exact weight of a response is a product over its tokens, and the previous lab showed that it does not survive
# length. Practice gives every token its own ratio and adds up. This lab measures what that costs: exactly, on a toy in
# which every response is enumerated, and then in a language model.
#
# **A picture to keep: adding up percentages.** Plus 2 %, plus 1 %, minus 3 %: everybody adds, and nobody minds that the
# result is a little off. Plus 40 %, plus 30 %, minus 50 %: adding says +20 %, the truth is −9 %. Adding up percentages
# is right while they are small *and* few. The token objective adds up percentages, one per token.
#
# The derivations are in the lesson, [02_first_order.md](../lessons/02_first_order.md). Equation numbers without a dot
# are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374). The names that this page uses, charts
# and tables among them, come from `minirl_edu/course/lab02.py`.

# %%
from minirl_edu.course.lab02 import *

# %% [markdown]
# ## 1 · Adding up percentages
#
# By hand: the ratios $\rho_t = \pi_\theta/\mu_{old} = 1 + \delta_t$ of a few tokens, their product, and what adding up
# makes of it.

# %%
rows = []
for ratios in ([1.02, 1.01, 0.97], [1.20, 0.90], [1.40, 1.30, 0.50], [1.70]):
    product, added = math.prod(ratios), 1 + sum(r - 1 for r in ratios)
    rows.append([" · ".join(map(str, ratios)), f"{product:.4f}", f"{added:.4f}", f"{product - added:+.4f}"])
show_table(["ratios", "product", "1 + Σ δ", "dropped"], rows)

# %% [markdown]
# A single token drops nothing, however large its ratio: there is no second one to multiply it with. Now many tokens, of
# which each is a little too likely or a little too unlikely, at random:

# %%
signs = np.random.default_rng(3).choice([-1, 1], size=64)
luck_figure(signs, (0.01, 0.1, 0.3))

# %% [markdown]
# **What to see.** The same luck three times. At one percent the two lines look the same. At ten they separate as the
# response gets longer. At thirty they have nothing to do with each other: the sum even becomes negative, which no
# weight can.

# %% [markdown]
# {exercise} 02.1
#
# Return what the first-order approximation drops of each response, $\prod_t\rho_t - (1 + \sum_t\delta_t)$, `[B]`, with
# its sign. `logp` and `logp_rollout` are `[B, T]`, `mask` is true on the tokens of the response.


# %%
def left_out(logp, logp_rollout, mask):
    # solution
    delta = torch.where(mask, logp - logp_rollout, 0.0).expm1()
    return (1 + delta).prod(1) - 1 - delta.sum(1)
    # end


check("02.1", left_out)

# %% [markdown]
# {exercise} 02.2
#
# The leading part of what is dropped is $\sum_{i<j}\delta_i\delta_j$. Return it for `delta` `[B, T]`, as `[B]`, without
# a loop over pairs.


# %%
def sum_over_pairs(delta):
    # solution
    return (delta.sum(1).square() - delta.square().sum(1)) / 2
    # end


check("02.2", sum_over_pairs)

# %% [markdown]
# ## 2 · The token objective and its gradient
#
# $$\mathcal J_{token}(\theta) = \mathbb E_{y\sim\mu_{old}}\Big[\sum_t
# \frac{\pi_\theta(y_t|\cdot)}{\mu_{old}(y_t|\cdot)}\,R(y)\Big] \tag{3}$$
#
# There are two ways to its gradient. By hand, one response with three tokens and reward 1: differentiate the ratio, or
# put the ratio as a constant in front of $\log\pi_\theta$.

# %%
log_mu = torch.tensor([0.5, 0.4, 0.9]).log()
logp = torch.tensor([0.5, 0.5, 0.8]).log().requires_grad_()
ratio = (logp - log_mu).exp()
for name, objective in {
    "Σ ρ                         ": ratio.sum(),
    "Σ sg[ρ]·log π               ": (ratio.detach() * logp).sum(),
    "Σ ρ·log π, nothing detached ": (ratio * logp).sum(),
    "Π ρ, the sequence weight    ": ratio.prod(),
}.items():
    (gradient,) = torch.autograd.grad(objective, logp, retain_graph=True)
    print(name, "value", f"{objective:+.3f}", "  gradient", [f"{g:+.3f}" for g in gradient.tolist()])

# %% [markdown]
# The first two have the same gradient, for each token its ratio, but not the same value. The third is a bug that raises
# no error. The fourth gives every token the same number, the weight of the whole.
#
# Now exactly. The toy of the previous lab, a little longer: two words and a full stop, at most four tokens, reward 1
# for an odd number of ones. $\pi_\theta$ is some way from $\mu_{old}$.

# %%
LENGTH = 4
mu_old = TabularPolicy.random(3, LENGTH, seed=1)
rewards = torch.tensor([int((y[m] == 1).sum()) % 2 for y, m in zip(mu_old.tokens, mu_old.mask, strict=True)]).double()
direction = TabularPolicy.random(3, LENGTH, seed=2).logits
pi = mu_old.moved(direction, 0.5)

logits = pi.logits.clone().requires_grad_()
token_objective(TabularPolicy(logits, LENGTH), mu_old, rewards).backward()
difference = token_gradient(pi, mu_old, rewards) - logits.grad
print(f"equation (4) − autograd of (3): {difference.abs().max():.1e}")

# %% [markdown]
# What does (3) ask for? The lesson shows: **improve every token as if all others, before and after, were still written
# by $\mu_{old}$.** The same number in that way: how often $\mu_{old}$ comes to a prefix, which word $\pi_\theta$ would
# write there, and the mean reward when $\mu_{old}$ goes on from there.

# %%
joint, total = mu_old.response_probs(), 0.0
for row, word in np.ndindex(*mu_old.logits.shape):
    at_row = (mu_old.prefix == row) & mu_old.mask
    here, onward = at_row.any(1), (at_row & (mu_old.tokens == word)).any(1)  # responses that pass, and with this word
    value = (joint * rewards)[onward].sum() / joint[onward].sum()  # the rest is μ_old's
    total += joint[here].sum() * pi.logits.softmax(-1)[row, word] * value
print(f"the others written by μ_old: {total:.10f}    J_token: {token_objective(pi, mu_old, rewards):.10f}")

# %% [markdown]
# {exercise} 02.3
#
# Return the estimate of (3) from a batch: `logp` and `logp_rollout` `[B, T]`, `rewards` `[B]`, `mask` `[B, T]`.


# %%
def estimate_of_the_token_objective(logp, logp_rollout, rewards, mask):
    # solution
    ratios = torch.where(mask, (logp - logp_rollout).exp(), 0.0)
    return (ratios.sum(1) * rewards).mean()
    # end


check("02.3", estimate_of_the_token_objective)

# %% [markdown]
# {exercise} 02.4
#
# Write a loss (a scalar to minimise) whose gradient with respect to `logp` is minus the estimate of (4). Only the
# gradient is looked at.


# %%
def loss_of_the_token_objective(logp, logp_rollout, rewards, mask):
    # solution
    weight = torch.where(mask, logp - logp_rollout, 0.0).exp().detach()
    return -(torch.where(mask, weight * logp, 0.0).sum(1) * rewards).mean()
    # end


check("02.4", loss_of_the_token_objective)

# %% [markdown]
# ## 3 · Equal gradients, different values
#
# Walk from $\mu_{old}$ along a straight line in the logits and compare the two objectives.

# %%
walk = np.linspace(-1.5, 1.5, 61)
line = [mu_old.moved(direction, step) for step in walk.tolist()]
objectives = {"J_seq": sequence_objective, "J_token": token_objective}
values = {name: np.array([f(p, mu_old, rewards).item() for p in line]) for name, f in objectives.items()}

lengths = mu_old.mask.sum(1)
gradients = [f(mu_old, mu_old, rewards) for f in (sequence_gradient, token_gradient)]
print(f"at μ_old  J_seq   = {values['J_seq'][30]:.4f}   E[R]     = {(joint * rewards).sum():.4f}")
print(f"at μ_old  J_token = {values['J_token'][30]:.4f}   E[|y|·R] = {(joint * lengths * rewards).sum():.4f}")
print(f"at μ_old  |∇J_seq − ∇J_token| = {(gradients[0] - gradients[1]).norm():.1e}")
print(f"with equal rewards the remainder at distance 0.5 is {objective_remainder(pi, mu_old, rewards * 0 + 1):.1e}")
change_figure(walk, values)

# %% [markdown]
# **What to see.** Left, two curves at different heights: each token adds a 1 to the sum in (3), so $J_{token}$ counts
# tokens. That constant is in no gradient. Right, both measured from $\mu_{old}$: they touch with the same slope and
# separate further away. The **remainder** is the distance between them. The last printed line: if all responses have
# the same reward, the remainder is zero at any distance. So a baseline does not change it.

# %% [markdown]
# ## 4 · The order of the error
#
# How fast does the remainder vanish as $\pi_\theta$ approaches $\mu_{old}$, and how fast the error of the gradient? On
# logarithmic axes a power is a straight line, and its exponent is the slope.

# %%
distances = np.logspace(-3, 0.5, 22)
fitted = distances <= 0.0101


def errors_by_distance(length, seed):
    """|remainder| and the norm of the gradient's error, exactly, at every distance."""
    mu = TabularPolicy.random(3, length, seed=seed)
    way = TabularPolicy.random(3, length, seed=seed + 100).logits
    reward = torch.rand(len(mu.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for distance in distances.tolist():
        moved = mu.moved(way, distance)
        error = sequence_gradient(moved, mu, reward) - token_gradient(moved, mu, reward)
        found.append([objective_remainder(moved, mu, reward).abs().item(), error.norm().item()])
    return np.array(found).T


errors = [errors_by_distance(5, seed) for seed in (0, 1, 2)]
slopes = np.array([[exponent(distances[fitted], y[fitted]) for y in both] for both in errors])
assert np.abs(slopes - [2, 1]).max() < 0.1
order_figure(distances, errors, fitted)

# %% [markdown]
# **What to see.** Straight lines in the shaded range, where the slopes are fitted: 2 for the objective, 1 for the
# gradient, each within 0.1 (the cell would stop otherwise). To the right the lines bend, and a dip is a place where the
# remainder changes its sign.
#
# The *change* of the objective is itself proportional to the distance. So ten percent of deviation puts about a tenth
# of that change in doubt, and about a tenth of the gradient, both times a factor that grows with the length. An
# optimiser starts at $\mu_{old}$, where the gradient is exact. The further it goes with the same responses, the larger
# the error.
#
# **Turn it yourself.** With a live kernel, two sliders. Does any random problem have another slope?


# %%
def order_at(length, seed):
    return order_figure(distances, [errors_by_distance(length, seed)], fitted)


sliders(order_at, length=(range(2, 7), 3), seed=(range(51), 7))

# %% [markdown]
# {exercise} 02.5
#
# `errors` were measured at `steps` (float64 tensors of the same length). If error = constant · step^k, what is k? Use
# all points.


# %%
def order_of(steps, errors):
    # solution
    x, y = steps.log(), errors.log()
    x = x - x.mean()
    return (x * y).sum() / x.square().sum()
    # end


check("02.5", order_of)

# %% [markdown]
# ## 5 · How the error grows with length
#
# What a single response drops, $D = \prod_t\rho_t - 1 - \sum_t\delta_t$, has mean zero. For independent tokens with
# $\mathbb E[\delta^2] = \chi^2$ the lesson finds its mean square,
#
# $$\mathbb E[D^2] = (1+\chi^2)^T - 1 - T\chi^2 \approx \tfrac{T(T-1)}{2}\chi^4,$$
#
# so its typical size is about $T\chi^2/\sqrt2$: second order in $\delta$ and *linear* in the length. Here the tokens
# are not independent: every prefix has a row of its own, and $\pi_\theta$ differs from $\mu_{old}$ at random in each.
# All responses have `LONGEST` tokens; eight random differences.

# %%
LONGEST = pick(fast=8, full=10)
sampler = never_ending(TabularPolicy.random(3, LONGEST, seed=3))
sampler_probs = sampler.response_probs()[:, None]
drifts, lengths = drifts_of_words(LONGEST, range(10, 18)), np.arange(2, LONGEST + 1)
odd = ((sampler.tokens == 1).cumsum(1) % 2).double()  # the reward of a response cut off after 1, 2, … tokens


def sizes_by_length(distance):
    """Typical D, typical error of a token's weight, χ² per token; and the mean |remainder| for the parity reward."""
    found = []
    for drift in drifts:
        rho = token_ratios(sampler.moved(drift, distance), sampler)
        product = rho.cumprod(1)
        d, others = product - 1 - (rho - 1).cumsum(1), product / rho[:, :1] - 1
        roots = [(sampler_probs * x**2).sum(0)[1:].sqrt() for x in (d, others)]
        remainder = (sampler_probs * d * odd).sum(0)[1:].abs()
        found.append([*roots, remainder, (sampler_probs * (rho - 1) ** 2).sum(0)])
    *sizes, chi_square = (torch.stack(column) for column in zip(*found, strict=True))
    dropped, weight, remainder = (size.log().mean(0).exp().numpy() for size in sizes)
    return Sizes(dropped, weight, chi_square.mean().item()), remainder


measured = {distance: sizes_by_length(distance) for distance in (0.03, 0.1, 0.3, 1.0)}
size_figure(lengths, {distance: sizes for distance, (sizes, _) in measured.items()})

# %%
upper, rows = lengths >= lengths[len(lengths) // 2], []
for distance, (sizes, remainder) in measured.items():
    fits = [exponent(lengths[upper], y[upper]) for y in (sizes.dropped, sizes.weight)]
    last = sizes.dropped[-1], remainder[-1]
    rows.append([distance, f"{sizes.chi_square:.5f}", *(f"{x:.1e}" for x in last), *(f"{fit:.2f}" for fit in fits)])
header = ["distance", "χ² per token", f"typical D, {LONGEST} tokens", "remainder, odd number of ones"]
show_table([*header, "D: exponent in the length", "token's weight: exponent in the length"], rows)
pairs = exponent(lengths[upper], np.sqrt(lengths * (lengths - 1) / 2)[upper])
print(f"exponent of the square root of T(T − 1)/2 over the same lengths: {pairs:.2f}")

# %% [markdown]
# **What to see.** Points: enumerated. Lines: the formulas for independent tokens with the same mean $\chi^2$, not a
# fit. Left, what is dropped grows faster than the length here, for two reasons: $\sqrt{T(T-1)/2}$ does at so few tokens
# (last printed line), and the first tokens of this policy happen to differ less than the later ones. Right, the error
# of the weight that (4) gives to a token grows more slowly, about like the square root of the length. The remainder is
# the *average* of $D\cdot R$. It is far smaller than the typical $D$, because positive and negative $D$ cancel, and it
# depends on the judge. The library therefore logs the size of $D$ and not an average with signs.

# %% [markdown]
# {exercise} 02.6
#
# Tokens are independent, each with $\mathbb E[\delta] = 0$ and $\mathbb E[\delta^2] =$ `chi_square`. Return
# $\mathbb E[D^2]$ for responses of `length` tokens, exactly.


# %%
def mean_square_left_out(chi_square, length):
    # solution
    return (1 + chi_square) ** length - 1 - length * chi_square
    # end


check("02.6", mean_square_left_out)

# %% [markdown]
# ## 6 · The gap in a language model
#
# With samples, the typical $D$ is the library's `first_order_gap`: the mean of $|D|$ over responses. Two things make
# it large: the engine and the updates ([lab 03](03_sampler_and_policy.ipynb) takes the two factors apart). Here both,
# for the tiny Mixture-of-Experts model: engines from 8 to 3 bits, and four updates with the mini-batches of one
# rollout.

# %%
GROUP_SIZE, UPDATES = 8, 4
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
problems = task.sample(pick(fast=64, full=256), seed=0)
prompts, sampling = [task.encode(problem) for problem in problems], Sampling(max_new_tokens=task.max_new_tokens)
ENGINES = ["fp32", "fp8_e4m3", "int4", "int4 stochastic", "int3 stochastic"]
rollouts = [
    HFEngine(model, Precision.parse(*name.split())).generate(prompts, group_size=GROUP_SIZE, sampling=sampling, seed=0)
    for name in ENGINES
]


def logp_of(policy, rollout):
    return response_logprobs(policy, lay_out(rollout, share_prompts=can_share_prompts(policy))).logp


@torch.no_grad()
def gap_and_kl(policy):
    """For every engine: the gap, and the KL of the two policies per response, nats."""
    found = []
    for rollout in rollouts:
        logp, mask = logp_of(policy, rollout), rollout.response_mask
        kl = kl_k3(rollout.logp_rollout, logp, mask) * mask.sum() / len(mask)
        found.append([first_order_gap(logp, rollout.logp_rollout, mask).item(), kl.item()])
    return found


# %%
rollout, asked = rollouts[0], [problem for problem in problems for _ in range(GROUP_SIZE)]
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
scores = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages, mask = group_mean_advantages(scores, GROUP_SIZE), rollout.response_mask
policy = copy.deepcopy(model)
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)
logp_old, history = logp_of(model, rollout).detach(), [gap_and_kl(policy)]
for part in torch.arange(len(asked)).chunk(UPDATES):
    in_part = torch.zeros(len(asked), 1, dtype=torch.bool).index_fill(0, part, True)
    logp = logp_of(policy, rollout)
    case = logp, logp_old, rollout.logp_rollout, advantages, mask & in_part
    optimizer.zero_grad()
    minirl_loss(*case, num_responses=len(part)).loss.backward()
    optimizer.step()
    history.append(gap_and_kl(policy))
history = np.array(history)  # [updates + 1, engines, (gap, KL)]

# %%
header = ["engine", *(f"gap after {n} updates" for n in range(UPDATES + 1))]
show_table(header, [[name, *(f"{gap:.1e}" for gap in history[:, i, 0])] for i, name in enumerate(ENGINES)])
gaps, kls = history[history[..., 1] > 1e-8].T
print(f"exponent of the gap in the KL, over all points: {exponent(kls, gaps):.2f}")
gap_figure(ENGINES, history)

# %% [markdown]
# **What to see.** Left, before the first update the gap is the engine's alone, and it grows over orders of magnitude
# from 8 bits to 3 (in fp32 there is none, so the first point is missing). Then one step of the optimiser raises it by
# more than the good engines' rounding had: from there on these engines are alike, and only the worst one stands out.
# The larger of the two reasons decides. Right, gap against KL: both are of second order in $\delta$ and grow with the
# length, so over many decades the points stay near a line of slope one. The gap is the KL in another unit, the weight
# of a response. What our runs say about this: [unit 12](12_evidence.ipynb).

# %% [markdown]
# {exercise} 02.7
#
# (4) weights token $t$ with its own ratio; the exact weight is the product of all ratios of the response. Return by
# what share the exact weight is larger, $\prod_{s\ne t}\rho_s - 1$, for each token, `[B, T]`, and 0 outside the mask.
# `logp`, `logp_rollout` and `mask` are `[B, T]`.


# %%
def missing_weight(logp, logp_rollout, mask):
    # solution
    logs = torch.where(mask, logp - logp_rollout, 0.0)
    return torch.where(mask, (logs.sum(1, keepdim=True) - logs).expm1(), 0.0)
    # end


check("02.7", missing_weight)

# %% [markdown]
# **Try this**
#
# 1. In section 3 choose a reward of 1 for every response. What happens to the right panel, and why?
# 2. In section 6 use `lr=1e-4` and `lr=1e-3`. By (02.7) of the lesson, by what factor should the gap of the fp32
#    engine change?

# %% [markdown]
# ## Your file, step 02

# %% [markdown]
# {capstone} 02

# %%
check_file("02")
