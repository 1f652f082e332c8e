# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # REINFORCE: one reward for a whole response
#
# A judge reads a whole essay and gives one number. We may only change how each *word* is chosen. How does one number
# for the whole turn into a push on every word? On a toy where every essay can be written down, this lab answers that
# without sampling and without approximation. Then it shows what sampling adds, what length destroys, and ends with
# REINFORCE in forty lines.
#
# **A picture to keep: the judge scores the whole essay, and we may only change words.** The judge never says which word
# was good. A word is good if the essays it occurs in tend to be good.
#
# The derivations are in the lesson, [01_sequence_reward.md](../lessons/01_sequence_reward.md). Equation numbers without
# a dot are those of the paper, [arXiv 2512.01374](https://arxiv.org/abs/2512.01374). The names that this page uses,
# charts and tables among them, come from `minirl_edu/course/lab01.py`.

# %%
from minirl_edu.course.lab01 import *

# %% [markdown]
# ## 1 · A policy is a product of conditionals
#
# A language model never sees the essay it is going to write. It answers one question again and again: *given the words
# so far, what comes next?* The probability of a response is the product of its answers. By hand first: two words, `0`
# and `1`, and a full stop `.` that ends the response. Say the model gives these probabilities:

# %%
first = {"0": 0.5, "1": 0.3, ".": 0.2}
after_1 = {"0": 0.1, "1": 0.6, ".": 0.3}
print(f"π('1.')  = π('1') · π('.' | '1')  = {first['1']} · {after_1['.']} = {first['1'] * after_1['.']:.2f}")
print(f"log π    = {math.log(first['1']):.3f} + {math.log(after_1['.']):.3f} = {math.log(0.3 * 0.3):.3f}")

# %% [markdown]
# Now a policy for responses of up to three tokens. `TabularPolicy` keeps one row of logits for every prefix, so it can
# express any such policy, and it lists all responses. The judge is a parity check: **reward 1 if the number of ones in
# the whole response is odd**, else 0. No single word is right or wrong.

# %%
mu_old = TabularPolicy.random(3, 3, seed=1)
texts = ["".join("01."[token] for token in y[m].tolist()) for y, m in zip(mu_old.tokens, mu_old.mask, strict=True)]
rewards = torch.tensor([float(text.count("1") % 2) for text in texts], dtype=torch.float64)
prefixes = ["", "0", "1", "00", "01", "10", "11"]  # in the order of the rows of logits

probs = mu_old.response_probs()
print("responses", len(texts), "  prefixes", len(mu_old.logits), "  parameters", mu_old.logits.numel())
print(f"their probabilities sum to {probs.sum():.12f}")
print(f"J_seq = E[R] = Σ_y μ_old(y)·R(y) = {(probs * rewards).sum():.4f}")
response_figure(texts, probs, rewards)

# %% [markdown]
# **What to see.** All responses that this policy can write, and the whole of the objective: $J_{seq}$ is the blue area.
# To raise it, probability has to move from the hatched bars to the blue ones. But no parameter belongs to a bar: each
# belongs to a prefix and a word, and every prefix occurs in blue and in hatched bars.

# %% [markdown]
# {exercise} 01.1
#
# A model has returned logits for a batch of responses: row $t$ of `logits` `[B, T, V]` is the distribution that token
# $t$ of `tokens` `[B, T]` was drawn from. `mask` `[B, T]` is true on the tokens of the response. What stands after the
# end may be anything, −∞ included. Return $\log\pi(y)$ of each response, `[B]`.


# %%
def log_of_the_whole(logits, tokens, mask):
    # solution
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return torch.where(mask, logp, 0.0).sum(1)
    # end


check("01.1", log_of_the_whole)

# %% [markdown]
# ## 2 · The gradient of an average: the score function
#
# The smallest case: one token, two words. The policy writes `1` with probability $p = \sigma(z)$, the rewards are $R_1$
# and $R_0$. Then $J = p R_1 + (1 - p) R_0$ and, by calculus, $dJ/dz = p(1-p)(R_1 - R_0)$. The same by the **score
# function** $\nabla\log\pi$: for `1` it is $1 - p$, for `0` it is $-p$. Average reward times score:

# %%
p, reward_1, reward_0 = 0.3, 1.0, 0.2
by_calculus = p * (1 - p) * (reward_1 - reward_0)
by_score = p * reward_1 * (1 - p) + (1 - p) * reward_0 * (-p)
print(f"by calculus {by_calculus:.6f}    E[R · score] {by_score:.6f}")

# %% [markdown]
# Only $\log\pi$ was differentiated. The reward may come from a program, a person, or a judge who cannot say why. For a
# response of several tokens $\log\pi(y)$ is a sum, so
#
# $$\nabla\,\mathbb E_{y\sim\pi}[R] \;=\; \mathbb E_{y\sim\pi}\Big[R(y)\sum_t \nabla\log\pi(y_t|y_{<t})\Big].$$
#
# The library computes this expectation as a sum over all responses. Autograd through that sum gives the same numbers:

# %%
exact = sequence_gradient(mu_old, mu_old, rewards)
logits = mu_old.logits.clone().requires_grad_()
(TabularPolicy(logits, 3).response_probs() * rewards).sum().backward()
print(f"score function − autograd: {(exact - logits.grad).abs().max():.1e}")

# %%
steps = np.linspace(-1.5, 1.5, 41)


def along(direction):
    """J_seq on a line through μ_old, in units of the distance in logits."""
    line = [mu_old.moved(direction / direction.norm(), step) for step in steps.tolist()]
    return np.array([(policy.response_probs() * rewards).sum().item() for policy in line])


directions = [TabularPolicy.random(3, 3, seed=seed).logits for seed in range(20, 40)]
gradient_figure(exact, prefixes, steps, along(exact), [along(direction) for direction in directions])

# %% [markdown]
# **What to see.** Left, what the judge's one number says to every word choice. Each row adds up to zero: what one word
# wins, its alternatives lose. The same word `1` is pushed up after one prefix and down after another, because the
# parity of the whole counts. Numbers are small in rows where few responses pass, or where the policy is nearly sure of
# the next word. Right, the gradient is the steepest way up, and its slope is exactly $|\nabla J|$ (dashed).

# %% [markdown]
# {exercise} 01.2
#
# Return the gradient of $\mathbb E_{y\sim\pi}[R]$ with respect to the logits, `[P, V]`, from a `TabularPolicy` and the
# rewards of all its responses `[B]`, *without* autograd and without the library's `sequence_gradient` and `score_sum`.
# The policy has `pi.logits` `[P, V]`, and for each response and token `pi.tokens`, `pi.mask` and `pi.prefix` `[B, T]`
# (the row of logits that the token was drawn from); `pi.response_probs()` is `[B]`.


# %%
def gradient_of_each_logit(pi, rewards):
    # solution
    gradient, tables = torch.zeros_like(pi.logits), pi.logits.softmax(-1)
    for y, weight in enumerate(pi.response_probs() * rewards):
        for row, word in zip(pi.prefix[y][pi.mask[y]], pi.tokens[y][pi.mask[y]], strict=True):
            gradient[row] -= weight * tables[row]
            gradient[row, word] += weight
    return gradient
    # end


check("01.2", gradient_of_each_logit)

# %% [markdown]
# ## 3 · Samples from another engine
#
# In practice nobody enumerates. $\mu_{old}$ draws the responses, not the policy $\pi_\theta$ that is trained. Count
# each response $w(y) = \pi_\theta(y)/\mu_{old}(y)$ times, its **importance weight**, and the average under $\pi_\theta$
# is back. By hand: a coin shows heads 80 times in 100, and we want the average for a fair coin. Heads counts $0.5/0.8$,
# tails $0.5/0.2$.

# %%
heads, tails = 80 * (0.5 / 0.8), 20 * (0.5 / 0.2)
print(f"80 heads count as {heads:.0f}, 20 tails as {tails:.0f}")

pi = mu_old.moved(TabularPolicy.random(3, 3, seed=2).logits, 0.7)
weights = token_ratios(pi, mu_old).prod(1)
target = (pi.response_probs() * rewards).sum().item()
print(f"J at μ_old                    {(probs * rewards).sum():.6f}")
print(f"J at π_θ, summed under π_θ    {target:.6f}")
print(f"J at π_θ, by (1) under μ_old  {sequence_objective(pi, mu_old, rewards):.6f}")
print(f"E[w] under μ_old              {(probs * weights).sum():.6f}")

# %%
counts = [10, 30, 100, 300, 1000, 3000]
repeats = pick(fast=300, full=2000)
generator = torch.Generator().manual_seed(0)
estimates = {"weighted": [], "unweighted": []}
for count in counts:
    drawn = torch.multinomial(probs, repeats * count, replacement=True, generator=generator).view(repeats, count)
    estimates["weighted"].append((weights * rewards)[drawn].mean(1))
    estimates["unweighted"].append(rewards[drawn].mean(1))
estimate_figure(texts, probs, pi.response_probs(), counts, estimates, target)

# %% [markdown]
# **What to see.** Left, two policies over the same responses; $w$ is the height of a blue bar over that of its grey
# neighbour. Right, mean and standard deviation of many estimates. The weighted one is right on average at *every*
# sample size, even at ten: it is unbiased. The unweighted one gets more and more certain of the wrong number.

# %% [markdown]
# {exercise} 01.3
#
# Return the importance weight of each response, `[B]`, from the log-probabilities of its tokens under $\pi_\theta$ and
# under the rollout policy, `[B, T]`. `mask` is true on the tokens of the response; other places hold arbitrary finite
# numbers.


# %%
def weight_of_the_whole(logp, logp_rollout, mask):
    # solution
    return torch.where(mask, logp - logp_rollout, 0.0).sum(1).exp()
    # end


check("01.3", weight_of_the_whole)

# %% [markdown]
# ## 4 · A baseline: less noise, the same direction
#
# One response gives the estimate $(R - b)\,\nabla\log\pi(y)$. For every constant $b$ its mean is the gradient, because
# the mean score is zero. Its *noise* depends on $b$. By hand, with the one-token policy of section 2:

# %%
for b in (0.0, 1.0, 10.0):
    values = np.array([(reward_1 - b) * (1 - p), (reward_0 - b) * (-p)])  # for '1' and for '0'
    mean = np.dot([p, 1 - p], values)
    deviation = math.sqrt(np.dot([p, 1 - p], (values - mean) ** 2))
    print(f"b = {b:4.1f}   estimate {values[0]:+.2f} or {values[1]:+.2f}   mean {mean:.4f}   deviation {deviation:.4f}")

# %% [markdown]
# In practice $b$ is the mean reward of the $G$ responses to the same prompt, $\hat A_i = R_i - \bar R$. But $\bar R$
# contains $R_i$, so it is not quite a constant. The lesson shows the price: the mean estimate is
# $\frac{G-1}{G}\nabla J$. Here both, measured: the noise of one response exactly, the mean over groups from samples.

# %%
scores = score_of_each(mu_old)  # [B, P·V]
mean_gradient = (probs * rewards) @ scores


def noise(baseline):
    """E|g − ∇J|² of the one-response estimate g = (R − b)·score, exactly."""
    second = (probs * (rewards - baseline) ** 2 * scores.square().sum(1)).sum()
    return (second - mean_gradient.square().sum()).item()


size = probs * scores.square().sum(1)
candidates = {"none": 0.0, "mean reward": probs @ rewards, "the best": (size @ rewards) / size.sum()}
marks = {name: (float(b), noise(b)) for name, b in candidates.items()}
for name, (b, value) in marks.items():
    print(f"{name:12s} b = {b:.3f}   noise {value:.4f}")

# %%
groups = [2, 3, 4, 8, 16]
samples = pick(fast=20_000, full=100_000)
measured, errors = [], []
for G in groups:
    drawn = torch.multinomial(probs, samples * G, replacement=True, generator=generator)
    advantages = group_mean_advantages(rewards[drawn], G)
    projected = scores[drawn] @ mean_gradient / mean_gradient.square().sum()
    own = (advantages * projected).view(samples, G).mean(1)
    measured.append(own.mean().item())
    errors.append(own.std().item() / math.sqrt(samples))
baselines = np.linspace(-0.6, 1.4, 81)
noise_figure(baselines, [noise(b) for b in baselines], marks, groups, measured, errors)

# %% [markdown]
# **What to see.** Left, the noise is a parabola in $b$. The mean reward lies close to its minimum, so nobody computes
# the best one. Right, the group's mean shortens the gradient by $(G-1)/G$. A factor common to all prompts is a factor
# of the learning rate, so MiniRL keeps it.

# %% [markdown]
# {exercise} 01.4
#
# Return the paper's advantages `[B]` from rewards `[B]`, which lie prompt after prompt, `group_size` of each.


# %%
def better_than_usual(rewards, group_size):
    # solution
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()
    # end


check("01.4", better_than_usual)

# %% [markdown]
# {exercise} 01.5
#
# The mean of $(R - b)\,s$ does not depend on the constant $b$; the noise $\mathbb E\,|(R - b)\,s|^2$ does. Return the
# $b$ with the least noise. `probs` `[B]` are the probabilities of all responses, `rewards` `[B]` their rewards,
# `scores` `[B, D]` their scores $s = \nabla\log\pi(y)$, flattened.


# %%
def least_noisy_baseline(probs, rewards, scores):
    # solution
    share = probs * scores.square().sum(1)
    return (share * rewards).sum() / share.sum()
    # end


check("01.5", least_noisy_baseline)

# %% [markdown]
# ## 5 · Why the sequence weight does not survive length
#
# Everything so far is exact and unbiased. But $w(y)$ is a product with one factor per token. By hand: each factor is
# 1.1 or 0.9, like the toss of a coin. The mean of the product is 1 at any length:

# %%
for length in (1, 10, 100, 1000):
    most = math.exp(length * (math.log(1.1) + math.log(0.9)) / 2)  # half of each: the typical response
    print(f"{length:5d} tokens: mean weight 1, typical weight {most:.2g}, mean square {1.01**length:.3g}")

# %% [markdown]
# The typical response ends up with almost no weight, and a few responses with a huge one keep the mean at 1. The
# **effective sample size** says how many responses really count, as a fraction $1/\mathbb E[w^2]$. Exactly, for a
# policy whose responses all have `LONGEST` tokens, and a $\pi_\theta$ that differs from it in every logit, at random,
# by a standard deviation of `distance`; the average of eight such differences:

# %%
LONGEST = pick(fast=8, full=10)
sampler = never_ending(TabularPolicy.random(3, LONGEST, seed=3))
sampler_probs = sampler.response_probs()
drifts = drifts_of_words(LONGEST, range(10, 18))


def weights_by_length(distance):
    """[drifts, B, T]: the weight of each response cut off after 1, 2, … T tokens."""
    return torch.stack([token_ratios(sampler.moved(drift, distance), sampler).cumprod(1) for drift in drifts])


weights = {distance: weights_by_length(distance) for distance in (0.1, 0.3, 0.6, 1.0)}
rows = []
for distance, w in weights.items():
    growth = (sampler_probs[:, None] * w**2).sum(1)[:, -1].log().mean().item() / LONGEST  # log(1 + χ²) per token
    share, until = math.exp(-growth * LONGEST), math.log(10) / growth
    rows.append([distance, f"{math.expm1(growth):.4f}", f"{share:.3f}", f"{until:,.0f}"])
show_table(["distance", "χ² per token", f"effective share, {LONGEST} tokens", "tokens until a tenth is left"], rows)
share_figure(weights, sampler_probs, LONGEST)

# %% [markdown]
# **What to see.** Left, on a logarithmic axis, nearly straight lines: the effective sample size falls *exponentially*
# with length. Right, who carries the weight: on the dotted diagonal all responses count alike; the further a curve bows
# away from it, the fewer do the work. The table extends the lines: even the small distance leaves a tenth of the
# responses after a length that a reasoning model passes easily (the paper's responses may have 32,768 tokens).
#
# **Turn it yourself.** With a live kernel, two sliders.


# %%
def share_at(distance, length):
    return share_figure({distance: weights_by_length(distance)}, sampler_probs, length)


sliders(share_at, distance=([0.05, 0.1, 0.2, 0.5, 1.0, 2.0], 0.5), length=(range(1, LONGEST + 1), 4))

# %% [markdown]
# **The same in a language model.** The tiny Mixture-of-Experts model of the quickstart, the same weights in both
# engines. The rollout engine rounds to fewer and fewer bits, the training engine computes in fp32. No update was made.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
prompts = [task.encode(problem) for problem in task.sample(pick(fast=64, full=256), seed=0)]
sampling, rows = Sampling(max_new_tokens=task.max_new_tokens), []
for engine in ("fp32", "fp8_e4m3", "int4", "int4 stochastic", "int3", "int3 stochastic"):
    rollout_engine = HFEngine(model, Precision.parse(*engine.split()))
    rollout = rollout_engine.generate(prompts, group_size=8, sampling=sampling, seed=0)
    with torch.no_grad():
        logp = response_logprobs(model, lay_out(rollout, share_prompts=can_share_prompts(model))).logp
    shares = [f(logp, rollout.logp_rollout, rollout.response_mask).item() for f in (token_ess, sequence_ess)]
    rows.append([engine, f"{rollout.response_mask.sum(1).float().mean():.1f}", *(f"{share:.3f}" for share in shares)])
show_table(["engine", "tokens", "effective share, token weights", "effective share, sequence weights"], rows)

# %% [markdown]
# **What to see.** At eight bits the two engines are close enough for either kind of weight. At three bits the last two
# columns differ: products lose much more than their factors do, and these responses are short (second column). An
# *estimated* effective sample size tends to be too large, because the responses with the huge weights were not drawn.

# %% [markdown]
# {exercise} 01.6
#
# The ratio of one token has $\mathbb E[\rho^2] =$ `second_moment` under $\mu_{old}$, a little above 1, and tokens are
# independent. Return the smallest number of tokens at which the effective sample size, as a fraction, is below one
# tenth.


# %%
def tokens_until_a_tenth(second_moment):
    # solution
    return math.floor(math.log(10) / math.log(second_moment)) + 1
    # end


check("01.6", tokens_until_a_tenth)

# %% [markdown]
# ## 6 · REINFORCE in forty lines
#
# Now everything at once, without the library: a policy, a judge, groups, a loss, an update. Two words and a full stop
# again. First the policy, one row of logits for every prefix, and how it writes $n$ responses:

# %%
G, GROUPS, STEPS, LR, T, END = 16, 16, 200, 0.5, 3, 2
torch.manual_seed(0)
table = torch.zeros(2**T - 1, 3, requires_grad=True)


def write_responses(n):
    """n responses, [n, T] each: tokens, the row each was drawn from, and where a token is real."""
    row, alive, steps = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool), []
    for _ in range(T):
        token = torch.multinomial(table.detach().softmax(-1)[row], 1)[:, 0]
        steps.append((token, row, alive))
        alive = alive & (token != END)
        row = torch.where(alive, 2 * row + 1 + token, 0)
    return [torch.stack(columns, 1) for columns in zip(*steps, strict=True)]


tokens, rows, mask = write_responses(4)
print(["".join("01."[token] for token in y[real].tolist()) for y, real in zip(tokens, mask, strict=True)])

# %% [markdown]
# {exercise} 01.7
#
# Write a loss (a scalar) whose gradient with respect to `logp` `[B, T]` is *minus* the estimate of (2): a mean over the
# $B$ responses of sequence weight × advantage × the scores of all their tokens. `logp_rollout` and `mask` are `[B, T]`,
# `advantages` `[B]`. Only the gradient is looked at.


# %%
def loss_for_the_gradient(logp, logp_rollout, advantages, mask):
    # solution
    weight = torch.where(mask, logp - logp_rollout, 0.0).sum(1).exp().detach()
    return -(weight * advantages * torch.where(mask, logp, 0.0).sum(1)).mean()
    # end


check("01.7", loss_for_the_gradient)

# %% [markdown]
# The loop. It is on-policy, so the weight is 1; `ratio` carries a gradient all the same. Two losses with the same
# gradient are recorded, and beside them $J_{seq}$, which is known exactly here.

# %%
history = {"J_seq": [], "reward": [], "−mean of Â·log π": [], "−mean of w·Â": []}
for _ in range(STEPS):
    exact_objective = (TabularPolicy(table.detach().double(), 3).response_probs() * rewards).sum()
    tokens, rows, mask = write_responses(GROUPS * G)
    earned = (((tokens == 1) & mask).sum(1) % 2).float()  # the judge: an odd number of ones
    advantages = (earned.view(GROUPS, G) - earned.view(GROUPS, G).mean(1, keepdim=True)).flatten()
    logp = torch.where(mask, table.log_softmax(-1)[rows].gather(-1, tokens[..., None])[..., 0], 0.0).sum(1)
    ratio = (logp - logp.detach()).exp()
    losses = -(advantages * logp).mean(), -(ratio * advantages).mean()
    losses[0].backward()
    with torch.no_grad():
        table -= LR * table.grad
    table.grad = None
    for name, value in zip(history, (exact_objective, earned.mean(), *losses), strict=True):
        history[name].append(value.item())

objective, reward, first, second = history.values()
run_figure(objective, reward, {"−mean of Â·log π": first, "−mean of w·Â": second})

# %%
at = (0, int(np.argmin(first)), STEPS - 1)
rows = [[step, f"{objective[step]:.2f}", f"{first[step]:+.3f}", f"{abs(second[step]):.3f}"] for step in at]
show_table(["update", "J_seq", "first loss", "size of the second loss"], rows)

# %% [markdown]
# **What to see.** Left, training works. Right, no curve says so. The first loss falls, turns, and from there *rises*
# while the policy goes on improving. This loss approaches zero, and it would also approach zero if the policy collapsed
# onto one wrong answer: all advantages are zero in both cases. The second loss is always zero on-policy, because
# advantages add up to zero. A loss in reinforcement learning exists for its gradient. Watch the reward, a held-out
# score, the entropy and the KL instead.
#
# **Try this**
#
# 1. Make the judge less demanding: reward 1 if the response contains a `1` at all. Which rows of the gradient in
#    section 2 become simple?
# 2. In section 6 use groups of 2. How much slower is it than $(G-1)/G$ alone would make it?
#
# **Where next.** The next lesson gives every token its own ratio instead of the product of all, and asks what that
# costs: [02_first_order.md](../lessons/02_first_order.md).

# %% [markdown]
# ## Your file, step 01

# %% [markdown]
# {capstone} 01

# %%
check_file("01")
