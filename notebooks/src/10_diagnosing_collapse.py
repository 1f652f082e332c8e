# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Diagnosing a collapse: six mystery runs
#
# Training goes wrong, and all that you have is a dozen curves. This lab shows the charts of six runs. Each has one
# planted fault, of the kind that a careless change puts into working code. You name the faults from the curves, then
# repair three of them.
#
# **A picture to keep: a doctor reads a chart.** She makes sure that the chart is this patient's. She knows what a
# healthy chart looks like, and what each instrument *cannot* measure. Then she orders the one test that tells the
# suspects apart.
#
# [The lesson](../lessons/10_diagnosing_collapse.md) derives what each instrument reads under each fault. The runs were
# recorded by `python -m minirl_edu.course.mystery`. Its source says which run has which fault, so do not open it yet.
#
# The names that this lab uses come from `minirl_edu.course.lab10`, which also holds the code of the figures.

# %%
from minirl_edu.course.lab10 import *

# %% [markdown]
# ## 1 · A healthy chart
#
# All runs here share one setting: the `chain` task, a 4-bit engine, R3, four mini-batches per rollout. A chart has a
# column for each metric, under the trainer's name in `metrics.jsonl`, and a row for each gradient step.

# %%
healthy = charts()[HEALTHY]
print("runs        ", *charts())
print("seeds       ", len(healthy), "each")
print("grad. steps ", int(healthy[0]["grad_step"][-1]))
image(chart_sheet())

# %% [markdown]
# **What to see.** Reward and score rise together. The dashed score, of the same weights through the 4-bit engine, goes
# along. Entropy falls: that is learning, not collapse. The mismatch between the engines grows slowly while the policy
# becomes surer. The flip rate is flat at zero: with R3 the trainer uses the engine's own experts, so no other reading
# is allowed.

# %% [markdown]
# ## 2 · What each instrument measures
#
# Before the sick runs, each fault alone, on numbers small enough to check.
#
# **The mean weight.** If the probabilities that a sampler *reports* are those it samples with, the weights $\pi/\mu$
# have mean 1. Three samplers draw from four words. The first two are honest, though the second is far from $\pi$. The
# third reports the probability of the word *before* the one it drew.

# %%
pi = torch.tensor([0.40, 0.30, 0.20, 0.10])
near, far = torch.tensor([0.35, 0.35, 0.20, 0.10]), torch.tensor([0.10, 0.20, 0.30, 0.40])
rows = []
for name, mu, reported in (
    ("near π", near, near),
    ("far from π", far, far),
    ("far, reports the word before", far, far.roll(1)),
):
    weight, kl = (mu * pi / reported).sum(), (mu * (reported / pi).log()).sum()
    rows.append([name, f"{weight:.3f}", f"{kl:+.3f}"])
show_table(["sampler", "mean weight", "KL as the trainer would log it"], rows)

# %% [markdown]
# The KL tells near from far. The mean weight tells honest from wrong: it is 1 for both honest samplers. The cap of 5
# can pull it *below* 1, never above.
#
# **A temperature** that only one engine knows of. The sampler uses $T$ and the trainer 1. How large is the KL?


# %%
def temperature_kl(logits, temperature):
    """KL of softmax(z/T) from softmax(z), in nats, mean over the rows."""
    mu, log_pi = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
    return (mu.exp() * (mu - log_pi)).sum(-1).mean()


def entropy_of(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


shape = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
temperatures = torch.linspace(0.5, 1.5, 41).tolist()
kls = {float(entropy_of(s * shape)): [temperature_kl(s * shape, t) for t in temperatures] for s in (1.0, 3.0, 12.0)}
sharper = [s * shape for s in torch.logspace(-0.7, 1.7, 30).tolist()]
entropies, at = [entropy_of(z) for z in sharper], [temperature_kl(z, 0.7) for z in sharper]
image(temperature_curves(temperatures, kls, entropies, at))

# %% [markdown]
# **What to see.** Left: zero at $T = 1$ and a parabola around it, as (10.2) says. Right: read it from right to left, as
# training goes. A uniform policy hides the wrong temperature, one in between shows it best, and a sure policy hides it
# again. So this symptom is there from the first step, and then it fades although nothing was repaired.
#
# **A missing baseline.** The advantages of a group in which three of four were right, with and without it:

# %%
rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
logp_old = torch.full((4, 50), 0.1).log()
noise = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
logp = logp_old + 0.3 * noise  # a policy that has moved by about 30 %
mask = torch.ones(4, 50, dtype=torch.bool)
rows = []
for name, advantages in (("R − mean", group_mean_advantages(rewards, 4)), ("R alone", rewards)):
    metrics = minirl_loss(logp, logp_old, None, advantages, mask, is_correction=False).metrics
    signs = " ".join(f"{a:+.2f}" for a in advantages.tolist())
    rows.append([name, signs, *(f"{metrics[key]:.3f}" for key in ("clip_frac_pos", "clip_frac_neg"))])
show_table(["advantage", "of the four responses", "clipped from above", "clipped from below"], rows)

# %% [markdown]
# Without a baseline no advantage is negative, so nothing can be clipped from below, however far the policy has moved.
# By (10.5) the mean of the gradient stays and its noise grows. Here the noise is exact, by enumeration, for policies
# that are right more and more often.

# %%
start = TabularPolicy.random(4, 3, seed=0)
verified = (torch.rand(len(start.tokens), generator=torch.Generator().manual_seed(2)) < 0.6).double()


def scores_of(policy):
    """g(y) = ∇ log π(y) of every response, a row each."""
    one = torch.eye(len(policy.tokens), dtype=torch.float64)
    return torch.stack([policy.score_sum(row[:, None].expand(policy.mask.shape)).flatten() for row in one])


uphill = start.score_sum((start.response_probs() * verified)[:, None].expand(start.mask.shape))
points = {"R alone": [], "R − mean": []}
for step in (0, 2, 5, 10, 20, 40):
    policy = start.moved(uphill, step)
    probs, size = policy.response_probs(), scores_of(policy).square().sum(1)
    expected = float(probs @ verified)
    for name, b in (("R alone", 0.0), ("R − mean", expected)):
        points[name].append((expected, float(probs @ ((verified - b) ** 2 * size))))
image(noise_over_reward(points))

# %% [markdown]
# **What to see.** The better the policy, the wider the gap, in proportion. Without a baseline, right answers still push
# about a policy that is nearly always right.
#
# **Rewards in the wrong place.** Give every response the reward of another one. What is left of the gradient?

# %%
probs, g = start.response_probs(), scores_of(start)
centred = verified - probs @ verified
rows = []
for name, joint in (("its own reward", torch.diag(probs)), ("another's reward", torch.outer(probs, probs))):
    # joint: the probability of a response and of the response whose reward it gets
    mean = torch.einsum("ij,j,id->d", joint, centred, g).norm()
    size = torch.einsum("ij,j,i->", joint, centred.square(), g.square().sum(1)).sqrt()
    rows.append([name, f"{mean:.3f}", f"{size:.3f}"])
show_table(["each response gets", "length of the mean gradient", "typical length of one response's"], rows)

# %% [markdown]
# The direction is gone, a length is left. No instrument that looks at lengths, ratios or engines can notice.
#
# **Ordering a test.** Here an engine samples at a temperature that it does not tell. The trainer scores its tokens at
# several temperatures. Where is the KL smallest?

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
prompts = [task.encode(problem) for problem in task.sample(32, seed=0)]
engine = HFEngine(model, Precision.parse("int4", "stochastic"), record_routes=True)
hidden = Sampling(max_new_tokens=task.max_new_tokens, temperature=0.7)
rollout = engine.generate(prompts, group_size=8, sampling=hidden, seed=0)
layout = lay_out(rollout, share_prompts=can_share_prompts(model))

candidates, found = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2], []
for temperature in candidates:
    with torch.no_grad():
        log_old = response_logprobs(model, layout, temperature=temperature).logp
    found.append(kl_k3(rollout.logp_rollout, log_old, rollout.response_mask).item())
image(kl_over_temperature(candidates, found, hidden.temperature))

# %% [markdown]
# **What to see.** The KL has its minimum at the temperature that was sampled with. What is left there is the engine's
# rounding. This test needs one rollout and no training.

# %% [markdown]
# ## 3 · Six charts
#
# Runs A to F have the healthy run's setting and seeds, and one fault each. A sheet shows one run in orange, the healthy
# one in grey. Its six instruments stand in the order in which to read them: impossible readings first, then engine
# against trainer (mismatch) and trainer against itself (staleness), and the scores last.

# %%
image(chart_of("A"))

# %%
image(chart_of("B"))

# %%
image(chart_of("C"))

# %%
image(chart_of("D"))

# %%
image(chart_of("E"))

# %%
image(chart_of("F"))

# %% [markdown]
# **What to see.** That is for you to say. For each run ask: is a reading impossible? Which curves differ at the first
# steps, and which only later? Do the two engines disagree, or does the trainer move too far? Do the two scores go
# together?
#
# Entropy, gradient norm and length are on a larger sheet. Choose a run and a seed.


# %%
def whole_sheet(name, seed):
    return image(chart_sheet(charts()[name][seed], f"run {name}, seed {seed}"))


sliders(whole_sheet, name=(RUNS, "A"), seed=(range(len(healthy)), 0))

# %% [markdown]
# Numbers help where curves are crowded. **Step 1** is the mean over the first rollout's four gradient steps, when the
# engine has just been synced. *Last* is the mean over the last 40 steps, *most* the largest value of all.

# %%
show_table(HEADER, readings(seed=0))

# %% [markdown]
# **Second opinion.** One run is a lead. Do the readings hold for the other seeds?

# %%
others = range(1, len(healthy))
show_table(["seed", *HEADER], [[seed, *row] for seed in others for row in readings(seed)])

# %% [markdown]
# ## 4 · The differential table
#
# Here are the names to choose from, in alphabetical order. [The lesson's table](../lessons/10_diagnosing_collapse.md)
# lists symptoms, suspects and tests. Write the name as it stands here.

# %%
for fault in sorted(FAULTS.values()):
    print(fault)

# %% [markdown]
# {exercise} 10.1
# What is wrong with run A? Return one of the names, such as `return "no baseline"`.


# %%
def fault_of_A():
    # solution
    return FAULTS["A"]
    # end


check("10.1", fault_of_A)

# %% [markdown]
# {exercise} 10.2
# And with run B?


# %%
def fault_of_B():
    # solution
    return FAULTS["B"]
    # end


check("10.2", fault_of_B)

# %% [markdown]
# {exercise} 10.3
# And with run C?


# %%
def fault_of_C():
    # solution
    return FAULTS["C"]
    # end


check("10.3", fault_of_C)

# %% [markdown]
# {exercise} 10.4
# And with run D?


# %%
def fault_of_D():
    # solution
    return FAULTS["D"]
    # end


check("10.4", fault_of_D)

# %% [markdown]
# {exercise} 10.5
# And with run E?


# %%
def fault_of_E():
    # solution
    return FAULTS["E"]
    # end


check("10.5", fault_of_E)

# %% [markdown]
# {exercise} 10.6
# And with run F?


# %%
def fault_of_F():
    # solution
    return FAULTS["F"]
    # end


check("10.6", fault_of_F)

# %% [markdown]
# ## 5 · Repair it in the code
#
# Three of the faults, as they might stand in somebody's code. Each function below runs without an error and is wrong in
# one place. Repair it.

# %% [markdown]
# {exercise} 10.7
# The loop of a synchronous trainer: sample, update, hand over, `steps` times. `update(model, rollout)` changes the
# model in place. `engine.sync(model, version=…)` copies its weights into the engine, which calls the first weights
# version 0, those after the first update version 1, and so on. The engine must have the model's weights after the last
# update too.
#
# ```python
# def training_loop(engine, model, update, steps):
#     engine.sync(model, version=0)
#     for step in range(steps):
#         rollout = engine.generate()
#         update(model, rollout)
# ```


# %%
def training_loop(engine, model, update, steps):
    # solution
    engine.sync(model, version=0)
    for step in range(steps):
        rollout = engine.generate()
        update(model, rollout)
        engine.sync(model, version=step + 1)
    # end


check("10.7", training_loop)

# %% [markdown]
# {exercise} 10.8
# The trainer's log-probabilities of the tokens `[B, T]`, from logits `[B, T, V]`. The sampler divides its logits by the
# temperature.
#
# ```python
# def scored_tokens(logits, tokens, temperature):
#     return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
# ```


# %%
def scored_tokens(logits, tokens, temperature):
    # solution
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    # end


check("10.8", scored_tokens)

# %% [markdown]
# {exercise} 10.9
# Rewards of a batch that is grouped by prompt: `answers` has one right answer for each problem, `responses` has
# `group_size` for each, group after group.
#
# ```python
# def rewards_of_batch(answers, responses, group_size):
#     right = [response == answers[row % len(answers)] for row, response in enumerate(responses)]
#     return torch.tensor(right).float()
# ```


# %%
def rewards_of_batch(answers, responses, group_size):
    # solution
    right = [response == answers[row // group_size] for row, response in enumerate(responses)]
    return torch.tensor(right).float()
    # end


check("10.9", rewards_of_batch)

# %% [markdown]
# ## 6 · Early warning
#
# `CollapseDetector` keeps a fast and a slow moving average of entropy, KL and reward, and warns when the reward falls.
# Would it have noticed the six runs? Would a fall of the entropy make a better alarm?

# %%
WATCHED = ("entropy", "kl_rollout_old", "reward")


def ratios_and_warning(run):
    """The ratio of the entropy's averages at each gradient step, and the step of the first warning or None."""
    detector, ratios, first = CollapseDetector(), [], None
    for row, step in enumerate(run["grad_step"]):
        numbers = {name: float(run[name][row]) for name in WATCHED if math.isfinite(run[name][row])}
        if len(numbers) == len(WATCHED):
            warned = detector.update(numbers)
            first = int(step) if warned and first is None else first
            average = detector.state_dict()["averages"]["entropy"]
            ratios.append(average["fast"] / average["slow"])
    return ratios, first


rows = []
for name, runs in charts().items():
    watched = [ratios_and_warning(run) for run in runs]
    lowest = " ".join(f"{min(ratios[20:]):.2f}" for ratios, _ in watched)
    warned = ", ".join(f"step {first}" if first else "never" for _, first in watched)
    rows.append([name, lowest, warned])
show_table(["run, every seed", "lowest fast / slow entropy after step 20", "the detector warns"], rows)

# %%
ratios = {name: [ratios_and_warning(run)[0] for run in charts()[name]] for name in (HEALTHY, "A")}
image(entropy_ratios(ratios, limits=(0.5, CollapseDetector().entropy_drop)))

# %% [markdown]
# **What to see.** Left: where the ratio settles if the entropy keeps falling at one rate, (10.7). Right: the healthy
# runs come close to the upper limit or cross it, because they *learn*. Run A loses its score and keeps its entropy, so
# an alarm on entropy stays silent. That is why the detector warns of falls of the reward and the score, and names
# entropy and KL beside them. No alarm about a change sees a fault that is there from the first step.
#
# What the stored runs say about such alarms: [EARLY_WARNING.md](../lessons/results/EARLY_WARNING.md).
#
# **Try this**
#
# 1. Read `minirl_edu/course/mystery.py` now: every fault is a few lines around an unchanged trainer. Plant one of
#    your own, record a chart, and give it to somebody else.
# 2. Which of the six would you still recognise on-policy (`train.mini_batches=1`)? Which instrument is gone?
# 3. An engine samples at $T = 0.5$ and reports its log-probabilities at $T = 1$. Which of the nine panels notices?
