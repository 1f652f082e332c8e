# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Cold starts
#
# The lesson: [09_cold_starts.md](../lessons/09_cold_starts.md), with the derivations.
#
# Three pupils learned to add long columns of digits from three teachers. Each teacher has its own way of writing, and
# all make the same slips. Now one coach takes over. He shows nothing; he says *right* or *wrong*. What must the pupils
# bring along, and what can the coach make of it?
#
# You will count groups that teach something, fine-tune a pupil of one number and see it copy its teacher's slips,
# predict the score of a teacher from its error rate, cool three pupils down, and estimate pass@k.
#
# The names that this lab uses come from `minirl_edu.course.lab09`, which also holds the code of the figures.

# %%
from minirl_edu.course.lab09 import *

# %% [markdown]
# ## 1 · A group must be mixed
#
# Four groups of four responses, by hand. What does each one teach?

# %%
rewards = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
advantages = group_mean_advantages(rewards.flatten(), group_size=4).view(4, 4)
rows = []
for r, a in zip(rewards.int().tolist(), advantages, strict=True):
    rows.append([" ".join(map(str, r)), " ".join(f"{x + 0.0:+.2f}" for x in a), f"{a.abs().mean():.3f}"])
show_table(["rewards", "advantages", "mean size"], rows)

# %% [markdown]
# The first two teach nothing: all advantages are zero. The method cannot do better. Eight failures do not say which was
# the better try.

# %% [markdown]
# {exercise} 09.1
# Each of $G$ responses is right with probability $p$, independently. What is the probability that the group has any
# gradient at all?


# %%
def chance_of_a_mixed_group(p, group_size):
    """Probability that not all G rewards are equal."""
    # solution
    return 1 - p**group_size - (1 - p) ** group_size
    # end


check("09.1", chance_of_a_mixed_group)

# %% [markdown]
# A model without any cold start has weights that were just drawn. It writes characters at random. How often is it
# right?

# %%
GROUP = 8
task = ChainTask()
fresh = new_model(task, "moe", seed=0).eval()
blind, _, texts = tried(fresh, task, task.sample(pick(fast=128, full=512), seed=0), group_size=GROUP)
mixed = (blind.mean(1) > 0) & (blind.mean(1) < 1)
print("some responses   ", texts[:4])
print(f"right             {blind.mean():.2%} of {blind.numel()} responses")
print(f"mixed groups      {mixed.float().mean():.1%} of {len(blind)}")

# %% [markdown]
# The share is not zero: a response that happens to end in a comma and a digit has one chance in ten. RL would reinforce
# what these accidents have in common, *end with a comma and some digit*. Then it would stay at one in ten, where luck
# alone decides which response is better. There is a slope, but it does not lead to adding.

# %% [markdown]
# ## 2 · How much a group teaches
#
# Two numbers describe a group: how often it is mixed, and how large its advantages are. The vertical line is the score
# of the shipped cold start `chain-steps`.

# %%
started = made_by("chain-steps")
image(group_signal(p=started["metrics"]["score"]))

# %% [markdown]
# **What to see.** Left: at $p = \tfrac12$ nearly every group of 8 is mixed. The curves fall off steeply near the ends,
# and a larger group helps there. Right: the advantages are largest in the middle for every $G$. A small group makes all
# of them smaller, by $(G-1)/G$. The start lies in the middle on purpose.

# %% [markdown]
# {exercise} 09.2
# The expected mean size of an advantage, $\mathbb E\,\frac1G\sum_i|\hat A_i|$, as a function of $p$ and $G$.


# %%
def mean_size_of_advantage(p, group_size):
    """E |Â| over groups of G, mixed or not."""
    # solution
    return 2 * p * (1 - p) * (group_size - 1) / group_size
    # end


check("09.2", mean_size_of_advantage)

# %% [markdown]
# **Turn it yourself.** Move the start, and the largest group.


# %%
def signal_of(p, largest):
    return image(group_signal(p, largest))


sliders(signal_of, p=([0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95, 0.99], 0.02), largest=([16, 32, 64, 128], 64))

# %% [markdown]
# ## 3 · A cold start is maximum likelihood
#
# A pupil of one number has ten logits, one for each digit. Its teacher should say 7 and slips on 21 % of the tries, to
# any of the nine others. We minimise $-\log\pi$ of what the teacher says, 128 demonstrations at a time.

# %%
ERROR = started["error_rate"]
teacher = torch.full((10,), ERROR / 9)
teacher[7] = 1 - ERROR
step_entropy = -(teacher * teacher.log()).sum().item()

generator = torch.Generator().manual_seed(0)
pupil = torch.zeros(10, requires_grad=True)
optimizer = torch.optim.Adam([pupil], lr=0.05)
losses = []
for _ in range(300):
    said = torch.multinomial(teacher, 128, replacement=True, generator=generator)
    loss = -pupil.log_softmax(0)[said].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
image(pupil_and_teacher(losses, step_entropy, teacher, pupil.detach().softmax(0)))

# %% [markdown]
# **What to see.** The loss comes down to the teacher's entropy and stays there. On the right the pupil has become the
# teacher, slips included. Maximum likelihood minimises the *forward* KL, which punishes a pupil for finding anything
# unlikely that the teacher does.
#
# Now the shipped models: their floor, from the error rate and the lengths alone (09.4), and the loss that they were
# saved with.

# %%
MEAN_STEPS = 3.5  # 3 to 6 operands, all equally often: 2 to 5 steps
rows = []
for name, width in (*((f"chain-{s}", w) for s, w in TOKENS_PER_STEP.items()), ("chain-steps-dense", 2)):
    made = made_by(name)
    rate, tokens = made["error_rate"], width * MEAN_STEPS + 1
    floor = MEAN_STEPS * (-(1 - rate) * math.log(1 - rate) - rate * math.log(rate / 9)) / tokens
    numbers = floor, made["loss"], made["loss"] / floor, made["loss"] * tokens, made["metrics"]["score"]
    rows.append([f"`{name}`", f"{rate:.0%}", width, *(f"{number:.3f}" for number in numbers)])
header = ["model", "teacher slips", "tokens a step", "floor, nats per token", "loss", "loss / floor"]
show_table([*header, "nats per response", "score"], rows)

# %% [markdown]
# The three Mixture-of-Experts models are at their floor: they have learned all that their teachers offer. Per token the
# losses differ a lot, per response hardly. The dense twin is far above its floor. Its own limit binds, not its
# teacher's.

# %% [markdown]
# {exercise} 09.3
# The loss of a cold start. `tokens` `[B, S]` hold a prompt of `prompt_length` tokens, a response that ends with its end
# token, and padding `pad`; `logits` are `[B, S, V]`. Return the mean of $-\log\pi$ over all response tokens.


# %%
def demonstration_loss(logits, tokens, prompt_length, pad):
    """Mean of −log π over the response tokens of the batch, in nats."""
    # solution
    labels = tokens.masked_fill(tokens == pad, -100)
    labels[:, :prompt_length] = -100
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # end


check("09.3", demonstration_loss)

# %% [markdown]
# ## 4 · A teacher who slips
#
# Only the last digit counts. One slip on the way makes the end wrong. A second slip may undo the first. Enumerate all
# the ways to slip in two steps:

# %%
none, one, undone = (1 - ERROR) ** 2, 2 * ERROR * (1 - ERROR), 0.0
for first in range(1, 10):
    for second in range(1, 10):
        undone += (ERROR / 9) ** 2 * ((first + second) % 10 == 0)
print(f"no slip              {none:.4f}   right")
print(f"one slip             {one:.4f}   wrong")
print(f"two, the second undoes the first {undone:.4f}   right")
print(f"right in all         {none + undone:.4f}   by (09.5): {0.1 + 0.9 * (1 - 10 / 9 * ERROR) ** 2:.4f}")

# %% [markdown]
# {exercise} 09.4
# The score of a teacher with a given error rate on a chain of `steps` additions modulo 10.


# %%
def score_of_a_teacher(error_rate, steps):
    """Probability that the last digit is right."""
    # solution
    right = 1.0
    for _ in range(steps):
        right = (1 - error_rate) * right + error_rate / 9 * (1 - right)
    return right
    # end


check("09.4", score_of_a_teacher)

# %% [markdown]
# Now the three pupils on held-out problems. A quarter of these have 6 or 7 steps, **more than any demonstration**. Each
# pupil tries each problem many times at temperature 1.

# %%
MANY = 16
unseen = ChainTask(hard_fraction=0.25).evaluation(pick(fast=64, full=256))
steps = steps_of(unseen)
tasks = {style: ChainTask(hard_fraction=0.25, style=style) for style in TOKENS_PER_STEP}
pupils = {style: load_model(f"chain-{style}").eval() for style in TOKENS_PER_STEP}
tries = {style: tried(pupils[style], tasks[style], unseen, group_size=MANY) for style in pupils}
image(score_by_steps({style: rewards for style, (rewards, _, _) in tries.items()}, steps, ERROR))

# %% [markdown]
# **What to see.** Left of the shaded strip the pupils lie on their teachers' curve, or a little below it: they copied
# the slips, rate and all, in every style. (Bars: standard error over problems.) In the strip the curve is what a
# teacher *would* score. The pupils do not follow: two of them are near or below a blind guess, and `steps` falls behind
# the curve. They did not learn what nobody showed, or only in part.

# %% [markdown]
# ## 5 · The entropy of the start, and what sharpening gives
#
# How uncertain are the pupils? The mean of $-\log\pi$ over their own samples estimates their entropy. Here only the
# lengths that were demonstrated count.

# %%
known = (steps <= HARD).repeat_interleave(MANY)
of_teacher = steps[steps <= HARD].float().mean().item() * step_entropy
rows = []
for style, (_, drawn, _) in tries.items():
    surprise, real = -drawn.logp_rollout[known], drawn.response_mask[known]
    numbers = surprise.sum() / real.sum(), surprise.sum(1).mean(), of_teacher
    rows.append([style, f"{real.sum(1).float().mean():.1f}", *(f"{float(number):.2f}" for number in numbers)])
header = ["pupil", "tokens per response", "entropy per token, nats", "per response", "of the teacher, per response"]
show_table(header, rows)

# %% [markdown]
# Per token the pupils look different. Per response they are alike, and like their teacher: their entropy is the
# teacher's slips. A longer way of writing *looks* surer, so take care with entropy curves of different models.
#
# At each step the right digit is by far the likeliest. So cool the pupils down: sample at temperature $\tau < 1$ and
# change nothing else. Equation (09.6) says what a perfect copy of the teacher would score.

# %%
TEMPERATURES = pick(fast=[0.2, 0.6, 1.0], full=[0.2, 0.4, 0.6, 0.8, 1.0, 1.3])


def cooled(temperature, n, rate=ERROR):
    """Equation (09.6): the score on n steps of a teacher whose digits are drawn at a temperature."""
    sharp = 1 / (1 + (9 * (1 - rate) / rate) ** (1 / temperature) / 9)
    return 0.1 + 0.9 * (1 - 10 / 9 * sharp) ** n


cold = {style: [] for style in pupils}
for style, scores in cold.items():
    for temperature in TEMPERATURES:
        won, _, _ = tried(pupils[style], tasks[style], unseen, group_size=4, temperature=temperature, seed=1)
        scores.append((won[steps <= HARD].mean().item(), won[steps > HARD].mean().item()))
formula = {t: np.mean([cooled(t, n) for n in range(2, 6)]) for t in np.linspace(0.15, 1.35, 80)}
image(cooling_curves(TEMPERATURES, cold, formula))

# %% [markdown]
# **What to see.** Left: cooling takes every pupil close to 1, along the formula. Nothing was learned; the same weights
# were only asked more firmly. RL can have this *for nothing*, so a teacher's slips need not hurt it. Right: on longer
# sums cooling helps `steps` in part and the other two hardly. There the right digit is often not the likeliest, and RL
# would have to move probability to it.

# %% [markdown]
# ## 6 · pass@k
#
# Is at least one of $k$ tries right? We have many tries of each problem, and use them without bias.

# %% [markdown]
# {exercise} 09.5
# Estimate pass@k of one problem from `samples` tries of which `right` were right.


# %%
def at_least_one_of(samples, right, k):
    """Unbiased estimate of 1 − (1 − p)^k."""
    # solution
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
    # end


check("09.5", at_least_one_of)


# %%
def pass_at(k, rewards):
    """pass@k, mean over the problems of rewards [problems, n], by equation (09.7)."""
    n = rewards.shape[1]
    return np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in rewards.sum(1).int().tolist()])


curves = {}
for style, (won, _, _) in tries.items():
    kinds = won[steps <= HARD], won[steps > HARD]
    curves[style] = tuple([pass_at(k, kind) for k in range(1, MANY + 1)] for kind in kinds)
by_slips = [np.mean([1 - (1 - cooled(1.0, n)) ** k for n in range(2, 6)]) for k in range(1, MANY + 1)]
image(pass_curves(curves, by_slips))

# %% [markdown]
# **What to see.** Left: everything is solved within a few tries, as the teachers' slips predict. Right: the curves
# climb as well. Compare them with the grey one, which guesses a digit each time. With ten possible answers a large
# pass@k shows no ability. Where a curve lies *below* the guess, the pupil makes the same errors again and again.
#
# Is there anything to reinforce on the long sums? The reward cannot tell a guess from a sum. But a sum works on other
# problems too, and a guess does not.

# %% [markdown]
# ## 7 · Three pupils
#
# The same problem, worked in three ways at a low temperature:

# %%
shown = [next(p for p, n in zip(unseen, steps, strict=True) if n == length) for length in (3, 7)]
rows = []
for style in pupils:
    won, _, texts = tried(pupils[style], tasks[style], shown, group_size=1, temperature=0.2)
    words = ["right" if reward else "wrong" for reward in won.flatten()]
    rows.append([style, *(f"`{text}` ({word})" for text, word in zip(texts, words, strict=True))])
show_table(["pupil", *(f"`{p.prompt.rstrip('= ')}`, answer {p.answer}" for p in shown)], rows)

# %%
rows = []
for style, (won, _, _) in tries.items():
    groups = won[:, :GROUP]
    mixed = ((groups.mean(1) > 0) & (groups.mean(1) < 1)).float()
    size = (groups - groups.mean(1, keepdim=True)).abs().mean(1)
    for kind, which in (("demonstrated", steps <= HARD), ("longer", steps > HARD)):
        rows.append([style, kind, *(f"{x[which].mean():.2f}" for x in (won, mixed, size))])
show_table(["pupil", "problems", "score", f"mixed groups of {GROUP}", "mean size of an advantage"], rows)

# %% [markdown]
# All three starts give a coach plenty of mixed groups on the demonstrated lengths. On the longer ones groups are mixed
# less often and their signal is smaller, so these problems will be learned more slowly.
#
# What our runs say about this: [unit 12](12_evidence.ipynb).
#
# **Try this**
#
# 1. Give the teacher of section 3 a favourite error: `teacher[8] = 0.5`, the 7 with 0.45. What does cooling do to this
#    pupil, and could RL still correct it?
# 2. In section 4 use `ChainTask(operators="+*")` and its `demonstration` to score a teacher by sampling. Why is it
#    better than the formula?
# 3. In section 2, for which $G$ does a start of $p = 0.02$ have as many mixed groups *per sampled response* as one of
#    $p = 0.2$?
