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
# Training goes wrong, and all that you have is a dozen curves. This page shows the charts of six runs. Each has one
# planted fault, of the kind that a careless change puts into working code. You name the faults from the curves, then
# mend some of them.
#
# **A picture to keep: a doctor reads a chart.** The chart at the foot of the bed has a dozen curves. A fever says that
# something is wrong; it does not say what. A good doctor makes sure that the chart is this patient's, knows what a
# healthy one looks like, knows what each instrument *cannot* measure, and then orders the one test that tells the
# suspects apart.
#
# [The lesson](../lessons/10_diagnosing_collapse.md) derives what each instrument reads under each fault, and has the
# table of suspects. The runs were recorded by `python -m minirl_edu.course.mystery`; its source says which run has
# which fault, so do not open it yet.

# %%
import math

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, checkout
from minirl_edu.course.mystery import FAULTS, HEALTHY, read_charts
from minirl_edu.diagnostics import CollapseDetector, kl_k3
from minirl_edu.exact import TabularPolicy
from minirl_edu.experiments.spec import read_runs
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import to_png
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.tasks import ChainTask

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


# %% [markdown]
# ## 1 · A healthy chart
#
# All runs here share one setting: the `chain` task, a 4-bit engine, R3, four mini-batches per rollout. There is a chart
# for each run and seed. `read_charts` returns their columns, under the trainer's names in `metrics.jsonl`.

# %%
RUNS = sorted(FAULTS)
stored = read_charts(checkout() / "lessons" / "results" / "mystery")
seeds = sorted(set.intersection(*(set(stored[name]) for name in [*RUNS, HEALTHY])))  # that were recorded for all
charts = {name: [stored[name][seed] for seed in seeds] for name in [*RUNS, HEALTHY]}
print("runs        ", *charts)
print("seeds       ", len(seeds), "each")
print("grad. steps ", int(charts[HEALTHY][0]["grad_step"][-1]))

# %%
PANELS = [
    ("reward", "training reward", "linear"),
    ("score", "score (faint: through the engine)", "linear"),
    ("entropy", "token entropy, nats", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("log_ratio_mismatch", "mismatch, mean |log π_old/μ_old|", "log"),
    ("log_ratio_staleness", "staleness, mean |log π_θ/π_old|", "log"),
    ("clip_frac_neg", "clipped from below, share of tokens", "linear"),
    ("routing_flip_rate", "flip rate", "linear"),
    ("response_length", "tokens per response", "linear"),
]
# On logarithmic axes only: a dead run falls through any floor.
LIMITS = {"grad_norm": (0.05, 50), "log_ratio_mismatch": (0.01, 4), "log_ratio_staleness": (1e-3, 10)}


def smooth(values, window=4):
    """Mean over a whole rollout, four gradient steps, so that each point holds every mini-batch once."""
    kernel = np.ones(window) / window
    return np.convolve(values, kernel, "valid")


def draw_on(ax, chart, key, **style):
    steps, values = chart["grad_step"], chart[key]
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if key != "score":
        steps, values = steps[3:], smooth(values)
    ax.plot(steps, values, **style)


def chart_sheet(sick=None, name=""):
    """Nine instruments: the healthy seeds in grey, and one run in colour."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    for ax, (key, title, scale) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        for chart in charts[HEALTHY]:
            draw_on(ax, chart, key, color=GREY, linewidth=1.1)
        if sick is not None:
            draw_on(ax, sick, key, color=ORANGE, linewidth=1.8)
        if key == "score":
            for chart, color in [(charts[HEALTHY][0], GREY), *([(sick, ORANGE)] if sick is not None else [])]:
                known = np.isfinite(chart["score_rollout"])
                ax.plot(chart["grad_step"][known], chart["score_rollout"][known], color=color, alpha=0.45, ls="--")
        ax.set_yscale(scale)
        if key in LIMITS:
            ax.set_ylim(LIMITS[key])
        ax.set_title(title, loc="left", fontsize=9.5)
        ax.tick_params(labelsize=8)
        if key in ("reward", "score"):
            ax.set_ylim(0, 1)
        if key in ("clip_frac_neg", "routing_flip_rate"):
            ax.set_ylim(bottom=-0.002)
    figure.supxlabel("gradient step", fontsize=10)
    title = f"{name}   grey: healthy" if name else "The healthy run, every seed"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


Image(to_png(chart_sheet()), width=980)

# %% [markdown]
# **What to see.** Reward and score rise together; the dashed score, of the same weights through the 4-bit engine, goes
# along. Entropy falls. That is learning, not collapse. The mismatch between the engines grows slowly while the policy
# becomes surer. And the flip rate is flat at zero: with R3 the trainer uses the engine's own experts, so no other
# reading is allowed.

# %% [markdown]
# ## 2 · What each instrument measures
#
# Before the sick runs, each fault alone, on numbers small enough to check.
#
# **The mean weight.** A sampler may be as bad as it likes: if the probabilities that it *reports* are those it samples
# with, the weights $\pi/\mu$ have mean 1. Three samplers draw from four words. The first is honest, and so is the
# second, which is far from $\pi$. The third reports the probability of the word *before* the one it drew.

# %%
pi = torch.tensor([0.40, 0.30, 0.20, 0.10])
samplers = {
    "near π": (torch.tensor([0.35, 0.35, 0.20, 0.10]), 0),
    "far from π": (torch.tensor([0.10, 0.20, 0.30, 0.40]), 0),
    "far, reports the word before": (torch.tensor([0.10, 0.20, 0.30, 0.40]), 1),
}
rows = []
for name, (mu, shift) in samplers.items():
    weight = pi / mu.roll(shift)
    reported = (mu * (mu.roll(shift) / pi).log()).sum()
    rows.append([name, f"{(mu * weight).sum():.3f}", f"{reported:+.3f}"])
show_table(["sampler", "mean weight", "KL as the trainer would log it"], rows)

# %% [markdown]
# The KL tells near from far. The mean weight tells honest from wrong: it is 1 for both honest samplers. It can be
# pulled *below* 1 by the cap of 5, never above.
#
# **A temperature** that only one engine knows of. The sampler uses $T = 0.7$ and the trainer 1. By (10.2) the KL
# depends on how sure the policy is.


# %%
def temperature_kl(logits, temperature):
    """(10.2), exactly: KL of softmax(z/T) from softmax(z), in nats."""
    mu = (logits / temperature).softmax(-1)
    partition = [(logits / t).logsumexp(-1) for t in (1.0, temperature)]
    return (1 / temperature - 1) * (mu * logits).sum(-1) + partition[0] - partition[1]


shape = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
sharpness = torch.logspace(-0.7, 1.7, 30)
entropies, kls = [], []
for scale in sharpness.tolist():
    probs = (scale * shape).softmax(-1)
    entropies.append(-(probs * probs.clamp(min=1e-300).log()).sum(-1).mean())
    kls.append(temperature_kl(scale * shape, 0.7).mean())

figure = Figure(figsize=(9.5, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
temperatures = torch.linspace(0.5, 1.5, 41).tolist()
for scale, color in ((1.0, BLUE), (3.0, GREEN), (12.0, ORANGE)):
    probs = (scale * shape).softmax(-1)
    entropy = float(-(probs * probs.clamp(min=1e-300).log()).sum(-1).mean())
    values = [float(temperature_kl(scale * shape, t).mean()) for t in temperatures]
    left.plot(temperatures, values, color=color, label=f"entropy {entropy:.2f}")
left.set(xlabel="temperature of the sampler", ylabel="KL, nats per token")
left.legend(frameon=False, fontsize=9)
right.plot(entropies, kls, color=BLUE)
right.set(xlabel="entropy of the policy, nats", ylabel="KL at T = 0.7, nats per token")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left: zero at $T = 1$ and a parabola around it, as (10.3) says. Right: read it from right to left, as
# training goes. A uniform policy hides the wrong temperature, one in between shows it best, and a sure policy hides it
# again. This symptom is there from the first step, and it fades without anybody having cured it.
#
# **A missing baseline.** The advantages of a group in which three of four were right, with and without it:

# %%
rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
generator = torch.Generator().manual_seed(0)
logp_old = torch.full((4, 50), 0.1).log()
logp = logp_old + 0.3 * torch.randn(4, 50, generator=generator)  # a policy that has moved by about 30 %
mask = torch.ones(4, 50, dtype=torch.bool)
rows = []
for name, advantages in (("R − mean", group_mean_advantages(rewards, 4)), ("R alone", rewards)):
    metrics = minirl_loss(logp, logp_old, None, advantages, mask, is_correction=False).metrics
    above, below = metrics["clip_frac_pos"], metrics["clip_frac_neg"]
    signs = " ".join(f"{a:+.2f}" for a in advantages.tolist())
    rows.append([name, signs, f"{above:.3f}", f"{below:.3f}"])
show_table(["advantage", "of the four responses", "clipped from above", "clipped from below"], rows)

# %% [markdown]
# Without a baseline no advantage is negative, so nothing can be clipped from below, however far the policy has moved.
# And (10.6) says what is paid: the mean of the gradient stays, its noise grows. Here exactly, by enumeration, for
# policies that are right more and more often.

# %%
start = TabularPolicy.random(4, 3, seed=0)
verified = (torch.rand(len(start.tokens), generator=torch.Generator().manual_seed(2)) < 0.6).double()


def gradient_noise(policy, baseline):
    """Expected reward, and E‖(R − b) g‖² over all responses, b a number or "mean"."""
    probs = policy.response_probs()
    one = torch.eye(len(probs), dtype=torch.float64)
    g = torch.stack([policy.score_sum(row[:, None].expand(policy.mask.shape)).flatten() for row in one])
    expected = float(probs @ verified)
    b = expected if baseline == "mean" else baseline
    return expected, float(probs @ ((verified - b) ** 2 * g.square().sum(1)))


uphill = start.score_sum((start.response_probs() * verified)[:, None].expand(start.mask.shape))
policies = [start.moved(uphill, step) for step in (0, 2, 5, 10, 20, 40)]
figure = Figure(figsize=(6.4, 3.5), layout="constrained")
ax = figure.subplots()
for baseline, label, color in ((0.0, "R alone", ORANGE), ("mean", "R − mean", BLUE)):
    points = [gradient_noise(policy, baseline) for policy in policies]
    ax.plot(*zip(*points, strict=True), "o-", color=color, label=label)
ax.set(xlabel="expected reward of the policy", ylabel=r"$\mathbb{E}\,\Vert (R - b)\,g\Vert^2$", ylim=(0, None))
ax.legend(frameon=False)
Image(to_png(figure), width=620)

# %% [markdown]
# **What to see.** The better the policy, the wider the gap, in proportion. Without a baseline a policy that is nearly
# always right is still pushed about by its own right answers.
#
# **Rewards in the wrong place.** Give every response the reward of another one. What is left of the gradient?


# %%
def mean_and_size(misplaced):
    """‖E[(R − b) g]‖ and √E‖(R − b) g‖² with each response's own reward, or with that of an independent one."""
    probs = start.response_probs()
    one = torch.eye(len(probs), dtype=torch.float64)
    g = torch.stack([start.score_sum(row[:, None].expand(start.mask.shape)).flatten() for row in one])
    centred = verified - probs @ verified
    joint = torch.outer(probs, probs) if misplaced else torch.diag(probs)  # of (response, the one whose reward it gets)
    mean = torch.einsum("ij,j,id->d", joint, centred, g).norm()
    return mean, torch.einsum("ij,j,id->", joint, centred.square(), g.square()).sqrt()


given = {"its own reward": False, "another's reward": True}
rows = [[name, *(f"{x:.3f}" for x in mean_and_size(misplaced))] for name, misplaced in given.items()]
show_table(["each response gets", "length of the mean gradient", "typical length of one response's"], rows)

# %% [markdown]
# The direction is gone, a length is left. No instrument that looks at lengths, ratios or engines can notice.
#
# **Ordering a test.** An instrument can be pointed. Here an engine samples at a temperature that it does not tell; the
# trainer scores its tokens at several. Where is the KL smallest?

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
prompts = [task.encode(problem) for problem in task.sample(32, seed=0)]
engine = HFEngine(model, Precision.parse("int4", "stochastic"), record_routes=True)
hidden = Sampling(max_new_tokens=task.max_new_tokens, temperature=0.7)
rollout = engine.generate(prompts, group_size=8, sampling=hidden, seed=0)
layout = lay_out(rollout, share_prompts=can_share_prompts(model))

tried = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2]
found = []
for temperature in tried:
    with torch.no_grad():
        log_old = response_logprobs(model, layout, temperature=temperature).logp
    found.append(kl_k3(rollout.logp_rollout, log_old, rollout.response_mask).item())

figure = Figure(figsize=(6.4, 3.2), layout="constrained")
ax = figure.subplots()
ax.plot(tried, found, "o-", color=BLUE)
ax.axvline(hidden.temperature, color=GREY, linestyle=":", label="the sampler's own")
ax.set(xlabel="temperature at which the trainer scores", ylabel="k₃, nats per token", yscale="log")
ax.legend(frameon=False)
Image(to_png(figure), width=620)

# %% [markdown]
# **What to see.** The KL has its minimum at the temperature that was sampled with, and what is left there is the
# engine's rounding. This test needs one rollout and no training: cheap, and it convicts.

# %% [markdown]
# ## 3 · Six charts
#
# Runs A to F: same setting and same seeds as the healthy one, one fault each. Rows are instruments, columns are runs;
# grey is healthy. The nine instruments come in three sheets, in the order in which to read them. First those with
# readings that are impossible in a sound run:


# %%
def sheet(panels, seed=0):
    """Small multiples: some instruments × six runs, one scale for each instrument."""
    figure = Figure(figsize=(11, 1.75 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), len(RUNS), sharex=True, sharey="row")
    for (key, title, scale), line in zip(panels, axes, strict=True):
        for name, ax in zip(RUNS, line, strict=True):
            draw_on(ax, charts[HEALTHY][seed], key, color=GREY, linewidth=1.3)
            draw_on(ax, charts[name][seed], key, color=ORANGE, linewidth=1.8)
            if key == "score":
                chart = charts[name][seed]
                known = np.isfinite(chart["score_rollout"])
                ax.plot(chart["grad_step"][known], chart["score_rollout"][known], color=ORANGE, alpha=0.5, ls="--")
            ax.set_yscale(scale)
            if key in LIMITS:
                ax.set_ylim(LIMITS[key])
            ax.tick_params(labelsize=9)
        line[0].set_title(title, loc="left", fontsize=10.5)
    for name, ax in zip(RUNS, axes[0], strict=True):
        ax.annotate(
            name, (0.5, 1), (0, 21), "axes fraction", "offset points", ha="center", fontsize=15, color="#444444"
        )
    figure.supxlabel("gradient step", fontsize=10.5)
    return figure


Image(to_png(sheet(PANELS[6:])), width=1000)

# %% [markdown]
# Then the size of the updates, and the engine against the trainer:

# %%
Image(to_png(sheet(PANELS[3:6])), width=1000)

# %% [markdown]
# And only then what everybody looks at first:

# %%
Image(to_png(sheet(PANELS[:3])), width=1000)

# %% [markdown]
# **What to see.** That is for you to say. For each run, go through the sheets in their order: impossible readings, the
# first steps, engine against trainer (mismatch and staleness; the two scores), and only then the score.
#
# For a closer look choose a run; without a live kernel, call `chart_sheet(charts["A"][0], "run A")`.

# %%
try:
    from ipywidgets import Dropdown, ToggleButtons, interact
except ImportError:
    print('no ipywidgets here; try chart_sheet(charts["A"][0], "run A")')
else:

    @interact(name=ToggleButtons(options=RUNS), seed=Dropdown(options=range(len(charts[HEALTHY]))))
    def look(name, seed):
        display(Image(to_png(chart_sheet(charts[name][seed], f"run {name}")), width=980))


# %% [markdown]
# Numbers help where curves are crowded. **Step 1** is the mean over the first rollout's four gradient steps, when the
# engine has just been synced; *last* is the mean over the last 40 steps, *most* the largest value of all.


# %%
def reading(chart, key, where):
    part = {"first": slice(1, 5), "early": slice(5, 41), "last": slice(-40, None), "all": slice(None)}[where]
    values = chart[key][part]
    values = values[np.isfinite(values)]
    return float(values.mean()) if where != "all" else float(values.max())


def readings(seed):
    rows = []
    for name in [HEALTHY, *RUNS]:
        chart = charts[name][seed]
        scores = [chart[key][np.isfinite(chart[key])] for key in ("score", "score_rollout")]
        mismatch = [f"{reading(chart, 'log_ratio_mismatch', where):.3f}" for where in ("first", "last")]
        rows.append(
            [
                name,
                f"{scores[0].max():.2f}",
                f"{scores[0][-1]:.2f} ({scores[1][-1]:.2f})",
                f"{reading(chart, 'reward', 'first') - scores[0][0]:+.2f}",
                " → ".join(mismatch),
                f"{reading(chart, 'log_ratio_staleness', 'early'):.3f}",
                f"{reading(chart, 'clip_frac_neg', 'all'):.3f}",
                f"{reading(chart, 'routing_flip_rate', 'all'):.2f}",
                f"{reading(chart, 'is_weight_mean', 'last'):.2f}",
            ]
        )
    return rows


HEADER = ["run", "best score", "last (engine's)", "reward − score, step 1", "mismatch, step 1 → last"]
HEADER += ["staleness, steps 5–40", "clipped from below, most", "flip rate, most", "mean weight, last"]
show_table(HEADER, readings(0))

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
#
# What is wrong with run A? Return one of the names, such as `return "no baseline"`.


# %%
def fault_of_A():
    # solution
    return FAULTS["A"]
    # end


check("10.1", fault_of_A)

# %% [markdown]
# {exercise} 10.2
#
# And with run B?


# %%
def fault_of_B():
    # solution
    return FAULTS["B"]
    # end


check("10.2", fault_of_B)

# %% [markdown]
# {exercise} 10.3
#
# And with run C?


# %%
def fault_of_C():
    # solution
    return FAULTS["C"]
    # end


check("10.3", fault_of_C)

# %% [markdown]
# {exercise} 10.4
#
# And with run D?


# %%
def fault_of_D():
    # solution
    return FAULTS["D"]
    # end


check("10.4", fault_of_D)

# %% [markdown]
# {exercise} 10.5
#
# And with run E?


# %%
def fault_of_E():
    # solution
    return FAULTS["E"]
    # end


check("10.5", fault_of_E)

# %% [markdown]
# {exercise} 10.6
#
# And with run F?


# %%
def fault_of_F():
    # solution
    return FAULTS["F"]
    # end


check("10.6", fault_of_F)

# %% [markdown]
# ## 5 · Mend it in the code
#
# Three of the faults, as they might stand in somebody's code. Each function below runs without an error and is wrong in
# one place. Mend it.

# %% [markdown]
# {exercise} 10.7
#
# The training loop of a synchronous trainer: sample, update, hand over, `steps` times. `update(model, rollout)` changes
# the model in place; `engine.sync(model, version=…)` copies its weights into the engine, which calls the first weights
# version 0, those after the first update version 1, and so on. After the last update, too, the engine must have the
# model's weights.
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
#
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
#
# Rewards of a batch that is grouped by prompt: `answers` has one right answer for each problem, `responses` has
# `group_size` for each, group after group.
#
# ```python
# def rewards_of_batch(answers, responses, group_size):
#     return torch.tensor(
#         [float(response == answers[row % len(answers)]) for row, response in enumerate(responses)]
#     )
# ```


# %%
def rewards_of_batch(answers, responses, group_size):
    # solution
    return torch.tensor(
        [float(response == answers[row // group_size]) for row, response in enumerate(responses)]
    )  # fmt: skip
    # end


check("10.9", rewards_of_batch)

# %% [markdown]
# ## 6 · Early warning
#
# `CollapseDetector` keeps two moving averages of entropy, KL and reward, and warns when the reward falls. Would it have
# noticed the six? Would entropy or KL make a better alarm? And how often is each raised by a run that is well? For the
# last question we take every stored run of the paper's figures that did not collapse: its last three scores keep 70 %
# of its best.

# %%
WATCHED = ("entropy", "kl_rollout_old", "reward")


def below(drop):
    return lambda averages, warnings: averages["entropy"]["fast"] < drop * averages["entropy"]["slow"]


def above(rise):
    return lambda averages, warnings: averages["kl_rollout_old"]["fast"] > rise * averages["kl_rollout_old"]["slow"]


ALARMS = {
    "entropy below 0.5 of its baseline": below(0.5),
    "entropy below 0.4 of its baseline": below(0.4),
    "KL above 2 times its baseline": above(2),
    "KL above 3 times its baseline": above(3),
    "the detector: the reward has fallen": lambda averages, warnings: bool(warnings),
}


def first_alarm(run, raised):
    """The first gradient step after 20 at which the alarm is raised in a run, or None."""
    detector = CollapseDetector()
    for row, step in enumerate(run["grad_step"]):
        numbers = {name: float(run[name][row]) for name in WATCHED if math.isfinite(run[name][row])}
        if len(numbers) == len(WATCHED):
            warnings = detector.update(numbers)
            if step > 20 and raised(detector.state_dict()["averages"], warnings):
                return int(step)
    return None


healthy_runs = []
for setting in ("on_policy", "n2", "n4", "n8"):
    variants = read_runs(checkout() / "lessons" / "results" / "runs" / "full" / setting).values()
    for result in (run for seeds_of_one in variants for run in seeds_of_one.values()):
        scores = result.metrics["score"][np.isfinite(result.metrics["score"])]
        if result.diverged is None and scores[-3:].mean() >= 0.7 * scores.max():
            healthy_runs.append(result.metrics)

rows = []
for label, raised in ALARMS.items():
    alarms = [first_alarm(run, raised) is not None for run in healthy_runs]
    six = ", ".join(f"{n} at {step}" for n in RUNS if (step := first_alarm(charts[n][0], raised))) or "none"
    rows.append([label, f"{sum(alarms)} of {len(alarms)}", six])
show_table(["alarm", "healthy runs in which it is raised", "runs of the six, and when"], rows)

# %% [markdown]
# Why entropy? By (10.10) the two averages of an entropy that loses the share $f$ of itself at each step settle at
# $(1 - 50f)/(1 - 10f)$. The figure shows that ratio, and how fast entropy falls in the healthy runs: for each, the
# steepest mean rate over 50 steps.

# %%
falls = []
for run in healthy_runs:
    entropy = run["entropy"][np.isfinite(run["entropy"])]
    average = np.maximum(smooth(entropy, 10), 1e-6)
    falls.append(float(np.max(1 - (average[50:] / average[:-50]) ** (1 / 50))))

figure = Figure(figsize=(9.5, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
f = np.linspace(0, 0.0199, 100)
left.plot(100 * f, (1 - 50 * f) / (1 - 10 * f), color=BLUE)
for drop, color in ((0.5, ORANGE), (CollapseDetector().entropy_drop, GREEN)):
    limit = 100 * (1 - drop) / (50 - 10 * drop)
    left.axhline(drop, color=color, linewidth=1)
    left.plot([limit], [drop], "o", color=color, label=f"alarm below {drop}: {limit:.2f} % a step")
    right.axvline(limit, color=color)
left.set(xlabel="fall of the entropy, % a step", ylabel="fast average / slow average", ylim=(0, 1.02))
left.legend(frameon=False, fontsize=9)
right.hist(100 * np.array(falls), bins=30, color=GREY)
right.set(xlabel="steepest fall over 50 steps, % a step", ylabel="healthy runs")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left, orange and green: the fall at which each limit is reached, if it lasts. Right: most healthy
# runs fall faster than that for a while, because they *learn*; whether there is an alarm depends on how long they go
# on. So a tight limit on entropy measures learning. A wide one is nearly silent in healthy runs; in the many runs of
# `lessons/results/EARLY_WARNING.md` it came before next to no fall of the score, while the reward came before most.
# That is why the detector warns of falls of the reward and the score alone, and names entropy and KL beside them. No
# alarm about a sudden change sees a fault that is there from the first step.
#
# **Second opinion.** One run is a lead. Do the readings hold for the other seeds?

# %%
for seed in range(1, len(charts[HEALTHY])):
    display(Markdown(f"seed {seed}"))
    show_table(HEADER, readings(seed))

# %% [markdown]
# **Try this**
#
# 1. Read `minirl_edu/course/mystery.py` now: every fault is a few lines around an unchanged trainer. Plant one of
#    your own, record a chart, and give it to somebody else.
# 2. Which of the six would you still recognise on-policy (`train.mini_batches=1`)? Which instrument is gone?
# 3. An engine samples at $T = 0.5$ and reports its log-probabilities at $T = 1$. Which of the nine panels notices?
