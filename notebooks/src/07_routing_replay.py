# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Routing replay, R2 and R3, and its bias
#
# The derivations are in the lesson, [07_routing_replay](../lessons/07_routing_replay.md). Here you force experts by
# hand, find out which of the paper's Table 1 is which, measure what replay costs, and what it cannot do.
#
# **A picture to keep: the same path by torchlight.** A guide led a group through a wood by day. At night she must lead
# them along *the same* path. At each fork she follows her notes, left or right, even where by torchlight the other way
# looks better. How fast she walks, where she puts her feet, whom she helps: all that she decides anew, in tonight's
# light. The notes fix the forks and nothing else.
#
# What you will do: replay a selection with live gates; decide where R2 and R3 use whose notes; prove Table 1 on a small
# model; follow a replayed objective to where it parts from the deployed one; split the discrepancy into what replay
# removes and what it cannot; align rows; see which expert learns from a token; and read what our own runs found.

# %%
import copy
import math
from itertools import product

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, checkout, pick
from minirl_edu.diagnostics import kl_k3, mean_interval
from minirl_edu.exact import TabularPolicy
from minirl_edu.experiments.spec import load_spec, read_runs
from minirl_edu.experiments.statistics import mean_effect, paired_difference
from minirl_edu.experiments.statistics import summary as summary_of_run
from minirl_edu.gap import Setting, Workload, prompts_for, random_model, random_prompts, run_setting, summary
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import method_styles, to_png
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.tasks import ChainTask
from minirl_edu.worlds.simulations import VARIANTS, who_gets_the_gradient, who_gets_the_gradient_ceiling

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def axes(figure, columns, rows=1, **kwargs):
    panels = np.atleast_1d(figure.subplots(rows, columns, **kwargs)).ravel()
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return panels


# %% [markdown]
# ## 1 · The selection, not the gates
#
# One token, four experts, top-2. By day the router chose experts 0 and 1. Tonight the weights are a little different,
# and it would choose 0 and 2. Under replay it keeps 0 and 1, and computes their gates from *tonight's* logits.

# %%
by_day = torch.tensor([2.0, 1.10, 1.05, -1.0])
tonight = torch.tensor([1.8, 1.00, 1.20, -0.9])
notes = by_day.topk(2).indices
gates = {
    "by day": (by_day.topk(2).indices, by_day.topk(2).values.softmax(0)),
    "tonight, live": (tonight.topk(2).indices, tonight.topk(2).values.softmax(0)),
    "tonight, replayed": (notes, tonight[notes].softmax(0)),
}
show_table(
    ["", "experts", "gates"],
    [[name, experts.tolist(), ", ".join(f"{g:.3f}" for g in g_s)] for name, (experts, g_s) in gates.items()],
)

# %% [markdown]
# The gates of the last line are neither those of the day nor those of the live choice. They carry gradient: the router
# goes on learning how much expert 1 should count, although tonight it would have left it out.
#
# The library does this to any supported `transformers` model without touching its formulas. Inside
# `with replay.replay(routes):` it answers the router's own top-k; everything after that is the model's code.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
replay = RoutingReplay(model)
tokens = torch.tensor([task.encode(task.sample(1, seed=0)[0])])
order = torch.rand(1, tokens.shape[1], 2, 8, generator=torch.Generator().manual_seed(0)).argsort(-1)
random_routes = Routes(order[..., :2].to(torch.uint8), torch.ones_like(tokens, dtype=torch.bool), replay.layers)

router = model.model.layers[0].mlp.gate.weight
with replay.replay(random_routes):  # experts that nobody would choose
    model(input_ids=tokens, labels=tokens).loss.backward()
print("layers with a router:", replay.layers, "  experts:", replay.num_experts, "  per token:", replay.top_k)
print("the router's gradient under replay, norm:", f"{router.grad.norm():.4f}")
model.zero_grad()

# %% [markdown]
# {exercise} 07.1
#
# `scores` are live router logits `[n, E]`, `forced` recorded experts `[n, k]`, `valid` `[n]` says which rows were
# recorded. Return `(experts, gates)`, both `[n, k]`: recorded experts where valid, the token's own best elsewhere;
# gates by softmax over the chosen logits, live.


# %%
def replayed_choice(scores, forced, valid):
    # solution
    experts = torch.where(valid[:, None], forced, scores.topk(forced.shape[-1]).indices)
    return experts, scores.gather(-1, experts).softmax(-1)
    # end


check("07.1", replayed_choice)

# %% [markdown]
# ## 2 · R2 and R3: whose experts, and where
#
# There are two sets of notes. The **training engine** at $\theta_{old}$ chose $e^\pi_{old}$; the **rollout engine**,
# with the same weights and other rounding, chose $e^\mu_{old}$.
#
# * **R2**, vanilla routing replay: updates use $e^\pi_{old}$.
# * **R3**, rollout routing replay: the training engine uses $e^\mu_{old}$, also for $\pi_{old}$.
#
# Let us make all of them: a rollout by an int4 engine, $\pi_{old}$ with its own experts, and one gradient step.

# %%
problems = task.sample(pick(fast=16, full=32), seed=0)
sampling = Sampling(max_new_tokens=task.max_new_tokens)
engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
rollout = engine.generate([task.encode(p) for p in problems], group_size=8, sampling=sampling, seed=0)
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
asked = [p for p in problems for _ in range(8)]
rewards = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages, mask = group_mean_advantages(rewards, 8), rollout.response_mask
layout = lay_out(rollout, share_prompts=can_share_prompts(model))
e_mu = rollout.routes


def score_under(network, routes=None):
    """log π of the response tokens [B, T], live or with `routes` replayed."""
    with torch.no_grad():
        if routes is None:
            return response_logprobs(network, layout).logp
        with RoutingReplay(network).replay(layout.pack(routes)):
            return response_logprobs(network, layout).logp


def choice_of(network):
    """The experts that a model chooses by itself for the rollout's tokens."""
    with torch.no_grad(), RoutingReplay(network).record() as tape:
        response_logprobs(network, layout)
    return layout.unpack(tape.routes)


e_old = choice_of(model)
updated = copy.deepcopy(model)
optimizer = torch.optim.AdamW(updated.parameters(), lr=1e-3, weight_decay=0.0)
logp = response_logprobs(updated, layout).logp
minirl_loss(logp, logp.detach(), rollout.logp_rollout, advantages, mask).loss.backward()
optimizer.step()
e_new = choice_of(updated)

pairs = {
    "e_mu against e_old: two engines, the same weights": (e_mu, e_old),
    "e_new against e_old: one engine, after one step": (e_new, e_old),
    "e_new against e_mu: both": (e_new, e_mu),
}
show_table(
    ["sets that differ", *(f"layer {layer}" for layer in replay.layers)],
    [[name, *(f"{r:.1%}" for r in a.flip_rate(b, rollout.inputs))] for name, (a, b) in pairs.items()],
)

# %% [markdown]
# {exercise} 07.2
#
# `whose(method, place)` returns `"live"`, `"e_old"` or `"e_mu"`: which experts the *training* engine uses. `method` is
# `"none"`, `"R2"` or `"R3"`; `place` is `"π_old"`, `"π_θ, first mini-batch"`, `"π_θ, later mini-batches"` or
# `"evaluation"`.


# %%
def whose(method, place):
    # solution
    if method == "none" or place == "evaluation":
        return "live"
    if method == "R3":
        return "e_mu"
    return "live" if place == "π_old" else "e_old"
    # end


check("07.2", whose)

# %% [markdown]
# ## 3 · Table 1, cell by cell
#
# The objective speaks of a target policy $\pi_\theta$. Replay may make it *another function* than live routing at the
# same θ. The paper's Table 1 says when. First say it yourself.

# %% [markdown]
# {exercise} 07.3
#
# In which cells is the target policy altered? `method` is `"R2"` or `"R3"`, `mini_batch` is `"first"` or `"later"`.
# Return `True` or `False`.


# %%
def is_altered(method, mini_batch):
    # solution
    return not (method == "R2" and mini_batch == "first")
    # end


check("07.3", is_altered)

# %% [markdown]
# Now the proof, on the model of section 2: the target policy with replay against the one without, token by token.
# *First* is before the step, *later* after it.

# %%
cells = {
    "R2, first mini-batch": (model, e_old),
    "R2, later": (updated, e_old),
    "R3, first mini-batch": (model, e_mu),
    "R3, later": (updated, e_mu),
}
compared = {name: (score_under(network), score_under(network, routes)) for name, (network, routes) in cells.items()}

figure = Figure(figsize=(8.5, 4.2), layout="constrained")
(ax,) = axes(figure, 1)
looks = (("#56B4E9", "-"), ("#56B4E9", "--"), (GREEN, "-"), (GREEN, "--"))
for (name, (live, replayed)), (colour, line) in zip(compared.items(), looks, strict=True):
    change = (live - replayed)[mask].abs().sort(descending=True).values
    share = torch.arange(1, len(change) + 1) / len(change)
    if change.any():
        ax.plot(100 * share[change > 0], change[change > 0], line, color=colour, linewidth=2, label=name)
    else:
        ax.plot([0, 100], [1e-6, 1e-6], line, color=colour, linewidth=4, label=f"{name}: exactly 0, every token")
ax.set(yscale="log", ylim=(6e-7, 2), xlabel="tokens, from the most altered on, %", ylabel="|Δ log π|, nats")
ax.set_title("How replay alters the target policy")
ax.legend(frameon=False, loc="upper right")
Image(to_png(figure), width=850)

# %%
show_table(
    ["cell", "tokens that changed", "mean change, nats", "largest change, nats"],
    [
        [name, f"{(live != replayed)[mask].float().mean():.1%}", f"{(live - replayed)[mask].abs().mean():.4f}",
         f"{(live - replayed)[mask].abs().max():.3f}"]
        for name, (live, replayed) in compared.items()
    ],
)  # fmt: skip
assert [bool((live == replayed).all()) for live, replayed in compared.values()] == [True, False, False, False]

# %% [markdown]
# **What to see.** R2 in the first mini-batch lies on the floor: it replays what would have been chosen anyway, and not
# one token differs in one bit. The other three are other functions than the live policy. Most tokens change by little
# and a few by much. More tokens change than flip, because a flip at one token changes what all later ones read.

# %% [markdown]
# ## 4 · The bias: optimised and deployed
#
# Replay holds the target on one smooth piece (unit 06). The price: what is optimised is $\pi_\theta(\cdot,e)$, and what
# is deployed later routes live, $\pi_\theta(\cdot,e^\pi(\theta))$. On the enumerable Mixture of Experts of unit 06 both
# expected rewards and both gradients can be computed exactly. Here along a line in the weights, with the experts of its
# starting point held:

# %%
V, T, E, D, K = 3, 3, 4, 6, 2
PREFIXES = [prefix for length in range(T) for prefix in product(range(V - 1), repeat=length)]


def draw_theta(seed):
    def normal(offset, *shape):
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts, head = normal(2, E, D, D) / math.sqrt(D), normal(3, V, D) / 2
    return {"embed": normal(0, V, D), "router": normal(1, E, D), "experts": experts, "head": head}


def toy_policy(theta, forced=None):
    """The policy, and the experts of each prefix; with `forced`, those experts and live gates."""
    states, logits, chosen = {}, [], []
    for i, prefix in enumerate(PREFIXES):
        hidden = theta["embed"][prefix[-1] if prefix else -1]
        hidden = torch.tanh(hidden + 0.5 * states[prefix[:-1]] if prefix else hidden)
        scores = theta["router"] @ hidden
        experts = scores.topk(K).indices if forced is None else forced[i]
        mixed = torch.einsum("k,koi,i->o", scores[experts].softmax(0), theta["experts"][experts], hidden)
        states[prefix] = hidden + torch.tanh(mixed)
        logits.append(theta["head"] @ states[prefix])
        chosen.append(experts.sort().values)
    return TabularPolicy(torch.stack(logits), T), torch.stack(chosen)


number_of_responses = len(toy_policy(draw_theta(0))[0].tokens)
toy_rewards = (torch.randn(number_of_responses, generator=torch.Generator().manual_seed(5)) > 0).double()


def value_and_gradient(theta, forced=None):
    """E_{y~π_θ}[R] and its gradient as one vector, with the experts `forced` or live."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    value = (toy_policy(leaves, forced)[0].response_probs() * toy_rewards).sum()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), torch.cat([g.flatten() for g in gradients])


theta, direction = draw_theta(2820), draw_theta(2825)
start = {name: theta[name] - 0.3 * direction[name] for name in theta}
_, held = toy_policy(start)
line = np.linspace(0, 1.0, pick(fast=81, full=401))
rows = []
for eta in line:
    moved = {name: start[name] + float(eta) * direction[name] for name in start}
    (live, live_gradient), (replayed, replayed_gradient) = value_and_gradient(moved), value_and_gradient(moved, held)
    off = (replayed_gradient - live_gradient).norm() / live_gradient.norm()
    rows.append((live, replayed, off.item(), (toy_policy(moved)[1] != held).any(-1).sum().item()))
live, replayed, off, flipped = np.array(rows).T

figure = Figure(figsize=(10.5, 3.9), layout="constrained")
left, right = axes(figure, 2)
breaks = np.where(np.diff(flipped) != 0)[0] + 1
for a, b in zip([0, *breaks], [*breaks, len(line)], strict=True):
    left.plot(line[a:b], live[a:b], color=ORANGE, linewidth=2.4, label="deployed: live routing" if a == 0 else None)
    right.plot(line[a:b], off[a:b], color=ORANGE, linewidth=2.4)
left.plot(line, replayed, "--", color=BLUE, label="optimised: experts held")
left.set(xlabel="η, distance from θ_old", ylabel="expected reward", title="Two objectives")
left.legend(frameon=False)
right.set(xlabel="η, distance from θ_old", ylabel="|difference| / |live gradient|", title="Bias of the gradient")
Image(to_png(figure), width=850)

# %%
same = flipped == 0
print("largest bias of the gradient while no expert has flipped:", f"{off[same].max():.1e}")
print("after the first flip: smallest", f"{off[~same].min():.1e}, median {np.median(off[~same]):.2f}")

# %% [markdown]
# **What to see.** Up to the first flip both are one curve and one gradient: replay costs nothing there. The first flip
# is at a prefix that is hardly ever reached, and too small to be seen in the figure. The next one moves the first
# token: the deployed objective jumps, and the optimised one does not notice. From there on it climbs another hill, and
# its gradient is off by a share that does not start from zero.
#
# **What it does to training.** Gradient ascent on the replayed objective, the experts refreshed after every $N$ steps,
# as R2 does after every global step. With $N = 1$ it is live training. Two policies, chosen because they differ:


# %%
def ascend(seed, n, rate=0.15, steps=64):
    """Expected reward with the held experts and live, after each step of gradient ascent."""
    theta, optimised, deployed = draw_theta(seed), [], []
    for step in range(steps):
        if step % n == 0:
            _, experts = toy_policy(theta)
        held_value, gradient = value_and_gradient(theta, experts)
        optimised.append(held_value)
        deployed.append((toy_policy(theta)[0].response_probs() * toy_rewards).sum().item())
        parts = gradient.split([value.numel() for value in theta.values()])
        theta = {name: theta[name] + rate * g.view_as(theta[name]) for name, g in zip(theta, parts, strict=True)}
    return np.array(optimised), np.array(deployed)


def ascent_figure(n, policies=(280, 590)):
    figure = Figure(figsize=(10.5, 3.7), layout="constrained")
    for ax, seed in zip(axes(figure, len(policies), sharey=True), policies, strict=True):
        optimised, deployed = ascend(seed, n)
        ax.plot(optimised, "--", color=BLUE, label="optimised, experts held")
        ax.plot(deployed, color=ORANGE, label="deployed, live routing")
        for refresh in range(0, len(optimised), n) if n > 1 else ():
            ax.axvline(refresh, color="#cccccc", linewidth=1, zorder=0)
        ax.set(xlabel="gradient step", ylim=(0, 1.05), title=f"policy {seed}, experts refreshed every {n} steps")
    figure.axes[0].set_ylabel("expected reward")
    figure.axes[0].legend(frameon=False, loc="upper left")
    return figure


Image(to_png(ascent_figure(16)), width=850)

# %%
seeds = range(0, 10 * pick(fast=12, full=60), 10)
ends = {n: np.array([[values[-1] for values in ascend(seed, n)] for seed in seeds]) for n in (1, 16)}
show_table(
    [f"{len(seeds)} policies, after 64 steps", "mean optimised", "mean deployed", "deployed more than 0.05 below"],
    [
        [
            f"N = {n}",
            f"{pairs[:, 0].mean():.3f}",
            f"{pairs[:, 1].mean():.3f}",
            int((pairs[:, 0] - pairs[:, 1] > 0.05).sum()),
        ]
        for n, pairs in ends.items()
    ],
)

# %% [markdown]
# **What to see.** The curves part where an expert would have changed, and meet again at the next grey line, when the
# notes are taken afresh. On the left that is a detour: the policy arrives all the same. On the right the optimised
# objective goes on rising while the deployed policy falls apart, and who watches only the first sees nothing. The table
# puts both in proportion: in most policies the bias does nothing visible, and now and then it does a lot. With $N=1$
# the two are the same by construction.

# %%
try:
    from ipywidgets import IntSlider, SelectionSlider, interact
except ImportError:
    print("no ipywidgets here; try ascent_figure(32, (590, 900))")
else:

    @interact(
        n=SelectionSlider(options=[1, 2, 4, 8, 16, 32], value=16, continuous_update=False),
        seed=IntSlider(value=590, min=0, max=1190, step=10, continuous_update=False),
    )
    def turn(n, seed):
        display(Image(to_png(ascent_figure(n, (280, seed))), width=850))


# %% [markdown]
# ## 5 · What R3 removes, and what it cannot
#
# The log of the discrepancy is a sum of two parts, token by token. The first is what R3 leaves, the rounding of all the
# products; the second is what R3 removes, the flips:
#
# $$\log\frac{\pi_{old}(y_t|\cdot,e^\pi_{old})}{\mu_{old}(y_t|\cdot,e^\mu_{old})}=
# \log\frac{\pi_{old}(y_t|\cdot,e^\mu_{old})}{\mu_{old}(y_t|\cdot,e^\mu_{old})}+
# \log\frac{\pi_{old}(y_t|\cdot,e^\pi_{old})}{\pi_{old}(y_t|\cdot,e^\mu_{old})}$$
#
# Attention is causal: a token's distribution depends on its own input and on earlier ones. A token with no flip in any
# of these must have a flip part of zero. With an 8-bit engine there are both kinds:

# %%
eight_bits = HFEngine(model, Precision.parse("fp8_e4m3"), record_routes=True)
rollout = eight_bits.generate([task.encode(p) for p in problems], group_size=8, sampling=sampling, seed=0)
layout, mask = lay_out(rollout, share_prompts=can_share_prompts(model)), rollout.response_mask
e_mu, e_old = rollout.routes, choice_of(model)
old_live, old_r3 = score_under(model), score_under(model, e_mu)
rounding, flip_part = (old_r3 - rollout.logp_rollout)[mask], (old_live - old_r3)[mask]

sets = [routes.experts.sort(-1).values for routes in (e_mu, e_old)]
flipped_so_far = ((sets[0] != sets[1]).any(-1).any(-1) & rollout.inputs).int().cummax(1).values.bool()
touched = flipped_so_far[:, rollout.prompt_length - 1 : -1][mask]
show_table(
    ["tokens", "how many", "mean size of the rounding part, nats", "of the flip part"],
    [
        [name, int(rows.sum()), f"{rounding[rows].abs().mean():.1e}", f"{flip_part[rows].abs().mean():.1e}"]
        for name, rows in (("no flip at this input or before", ~touched), ("a flip at this input or before", touched))
    ],
)

# %% [markdown]
# In the first line the flip part is zero, up to the order of summation. In the second both parts are there, and the
# flip part is the smaller one. They may even cancel: nothing guarantees that their sum is larger than either.

# %% [markdown]
# {exercise} 07.4
#
# Which share of the KL (k3) does R3 remove? `logp_mu` is $\log\mu_{old}$, `live` and `replayed` are $\log\pi_{old}$
# without and with the rollout's experts, all `[B, T]`; `mask` marks the response tokens.


# %%
def share_removed(logp_mu, live, replayed, mask):
    # solution
    before, after = (kl_k3(logp_mu, logp_old, mask) for logp_old in (live, replayed))
    return 1 - after / before
    # end


check("07.4", share_removed)

# %% [markdown]
# The same through engines of several precisions, on the trained model and on random ones:

# %%
ENGINES = ["int8", "fp8_e4m3", "int6", "int5", "int4", "int3"]
seeds = pick(fast=3, full=5)
random_models = [random_model("moe", seed) for seed in range(seeds)]
kinds = {
    "trained": ([model] * seeds, Workload(prompts_for("chain-steps", None, 16), seeds=seeds)),
    "random": (random_models, Workload(random_prompts, seeds=seeds)),
}
measured = {
    (kind, spec): summary(run_setting(Setting(precision=spec), models, workload))
    for kind, (models, workload) in kinds.items()
    for spec in ENGINES
}

figure = Figure(figsize=(10.5, 3.9), layout="constrained")
for ax, kind in zip(axes(figure, 2), kinds, strict=True):
    for side, colour, marker, label in (("plain", ORANGE, "o", "live routing"), ("r3", GREEN, "D", "R3")):
        values = np.array([measured[kind, spec][side]["k3"] for spec in ENGINES])
        place = np.arange(len(ENGINES)) + (0.08 if side == "r3" else -0.08)
        limits = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        ax.errorbar(place, values[:, 0], np.nan_to_num(limits), fmt=marker, color=colour, capsize=3, label=label)
    ax.set(yscale="log", xticks=range(len(ENGINES)), xticklabels=ENGINES, title=f"{kind} models")
    ax.legend(frameon=False, loc="upper left")
figure.axes[0].set_ylabel("KL (k3), nats per token")
Image(to_png(figure), width=850)

# %%
show_table(
    ["engine", *(f"{kind}: {what}" for kind in kinds for what in ("R3 removes", "flips per token and layer"))],
    [
        [spec, *(text for kind in kinds for text in (
            f"{1 - measured[kind, spec]['r3']['k3'][0] / measured[kind, spec]['plain']['k3'][0]:.0%}",
            f"{measured[kind, spec]['flip_rate'][0]:.1%}"))]
        for spec in ENGINES
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** On random models R3 takes most of the KL at eight bits, and less and less below: rounding every
# product to four bits is a larger disturbance than the flips that come with it. On the trained model, fresh from its
# cold start, it takes next to nothing at any precision, and the intervals of both overlap. Flips grow with coarser
# rounding; the share that replay can remove does not.

# %% [markdown]
# ## 6 · Rows, padding, backward
#
# Replay fails silently in more ways than loudly. Three rules.
#
# **Rows.** Row $t$ is the routing of token $t$ as an *input*. The logits behind it predict token $t+1$. A sequence of
# $S$ tokens has $S-1$ rows: the last token was sampled, nobody fed it. Change one row and see who moves:

# %%
tokens = rollout.tokens[:1, :20]
native = RoutingReplay(model)
with torch.no_grad(), native.record() as tape:
    model(input_ids=tokens)
own = tape.routes


def distribution_with(routes):
    with torch.no_grad(), native.replay(routes):
        return model(input_ids=tokens).logits.log_softmax(-1)[0]


base = distribution_with(own)
for row in (3, 17, 19):
    experts = own.experts.clone()
    experts[:, row] = (experts[:, row] + 1) % 8
    changed = (distribution_with(Routes(experts, own.valid, own.layers)) - base).abs().amax(-1) > 1e-5
    print(f"row {row:2d} changed: the predictions at positions", changed.nonzero()[:, 0].tolist())

# %% [markdown]
# Everything from the row itself on, and nothing before it. The last row reaches only the prediction of a token that is
# not in the sequence.

# %% [markdown]
# {exercise} 07.5
#
# An engine returns `rows` `[B, S − 1, L, k]`; `attention_mask` `[B, S]` marks real tokens (padding may be on both
# sides). Return `(experts, valid)` for `Routes`: `experts` `[B, S, L, k]`, `valid` `[B, S]`, true where a token was an
# input.


# %%
def to_routes(rows, attention_mask):
    # solution
    experts = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 1))
    followed = torch.nn.functional.pad(attention_mask[:, 1:], (0, 1))
    return experts, attention_mask & followed
    # end


check("07.5", to_routes)

# %% [markdown]
# **Padding.** Rows that are not valid are routed live. Filling them with zeros *and* calling them valid names expert 0
# twice; the library refuses such routes when they arrive.
#
# **Backward.** Gradient checkpointing runs the forward again inside `backward()`. If the context was left by then, the
# second forward would take other experts than the first. What the library says to both:

# %%
zeros = Routes(torch.zeros_like(own.experts), own.valid, own.layers)
try:
    zeros.validate(num_experts=8)
except ValueError as error:
    print("ValueError:", error)

checkpointed = copy.deepcopy(model).train()
checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
with RoutingReplay(checkpointed).replay(own):
    loss = checkpointed(input_ids=tokens, labels=tokens, use_cache=False).loss
try:
    loss.backward()
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# {exercise} 07.6
#
# Leave in `model` the gradient of `loss()` under `routes`, and no other. The model uses gradient checkpointing, and old
# gradients may be there. `replay` is its `RoutingReplay`; `loss` runs a forward and returns a scalar.


# %%
def replayed_backward(model, replay, routes, loss):
    # solution
    model.zero_grad()
    with replay.replay(routes):
        loss().backward()
    # end


check("07.6", replayed_backward)

# %% [markdown]
# ## 7 · Who gets the gradient
#
# A flip also decides which expert *learns* from a token. One context, top-1, three experts. The trainer's router picks
# expert 1. The engine is the same but for noise on its router, so other experts write a share of its tokens. The sum
# below runs over who writes and what is written, and goes through the library's loss, with the exact token weight and
# without any.

# %%
expert_logits = torch.tensor([[0.5, 1.0, -0.5, 0.0], [1.5, 0.2, 0.0, -1.0], [0.0, -0.5, 1.0, 0.8]])
written_share, token_advantage = torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.75, -0.25, -0.25, -0.25])


def push_on_each_expert(is_correction, with_r3):
    """Size of the expected gradient in the logits of each expert."""
    z = expert_logits.clone().requires_grad_()
    log_table = z.log_softmax(-1)
    used = log_table if with_r3 else log_table[1].expand_as(log_table)
    columns = (used, used.detach(), log_table.detach(), written_share[:, None] * log_table.exp() * token_advantage)
    new, old, mu, weighted = (x.reshape(-1, 1) for x in columns)
    options = {"num_responses": 1, "is_cap": 1e9, "is_correction": is_correction}
    minirl_loss(new, old, mu, weighted.detach(), torch.ones(12, 1), **options).loss.backward()
    return z.grad.norm(dim=1)


show_table(
    ["", "expert 0 (writes 20 %)", "expert 1 (the trainer's, writes 70 %)", "expert 2 (writes 10 %)"],
    [
        [name, *(f"{size:.4f}" for size in push_on_each_expert(*how))]
        for name, how in {
            "no replay, no weight": (False, False),
            "no replay, the weight": (True, False),
            "R3, no weight": (False, True),
            "R3, the weight": (True, True),
        }.items()
    ],
)

# %% [markdown]
# Without replay experts 0 and 2 get exactly nothing, whatever the weight. They wrote 30 % of the tokens. A weight can
# make a gradient larger or smaller. It cannot send it to another expert. With R3 each expert learns from what it wrote,
# and the weight is 1.

# %% [markdown]
# {exercise} 07.7
#
# The expected gradients of one context by hand. `logits` `[E, V]` are the experts', `own` is the trainer's choice,
# `shares` `[E]` says how often the engine's noisy router picks each expert, `advantages` `[V]` belong to the tokens.
# Return `[2, E, V]`, gradients to be *ascended* in `logits`, with the exact token weight $\pi/\mu$: first without
# replay, then with R3.


# %%
def gradients_of_experts(logits, own, shares, advantages):
    # solution
    probs = logits.softmax(-1)
    centred = probs * (advantages - (probs * advantages).sum(-1, keepdim=True))  # of a token drawn from each expert
    live = torch.zeros_like(probs)
    live[own] = centred[own]
    return torch.stack([live, shares[:, None] * centred])
    # end


check("07.7", gradients_of_experts)

# %% [markdown]
# Now train. Four experts; at the start each is good at the contexts that the trainer's router gives it and ignorant of
# the others. A response is six tokens, all of which must be right. Two scores are exact: through the trainer, and
# through the engine with its noisy router. Where the second ends without replay is computed *before* the run: the
# trainer's own experts learn everything, the others stay as they were.

# %%
NOISE, (SEEDS, STEPS) = 0.3, pick(fast=(2, 200), full=(8, 400))
METHODS = {"MiniRL": (ORANGE, "-"), "− IS": (BLUE, ":"), "R3": (GREEN, "--")}
learned = {name: who_gets_the_gradient(VARIANTS[name], seeds=SEEDS, noise=NOISE, steps=STEPS) for name in METHODS}
ceiling = who_gets_the_gradient_ceiling(seeds=SEEDS, noise=NOISE)

figure = Figure(figsize=(10.5, 3.9), layout="constrained")
for ax, metric in zip(axes(figure, 2, sharey=True), ("score", "engine_score"), strict=True):
    for name, (colour, line_style) in METHODS.items():
        step = learned[name]["step"]
        mean, half = mean_interval(learned[name][metric])
        ax.plot(step, mean, color=colour, linestyle=line_style, linewidth=2, label=name)
        ax.fill_between(step, mean - half, mean + half, color=colour, alpha=0.15)
    ax.set(xlabel="step", ylim=(0, 1.03), title=f"through the {'engine' if metric == 'engine_score' else 'trainer'}")
figure.axes[1].axhline(ceiling, color=GREY, linewidth=1)
figure.axes[1].text(STEPS, ceiling + 0.08, "computed beforehand", ha="right", color="#5a5a5a")
figure.axes[0].set_ylabel("score")
figure.axes[0].legend(frameon=False, loc="lower right")
Image(to_png(figure), width=850)

# %%
rows = []
for noise in pick(fast=(0.1, 0.6), full=(0.1, 0.3, 0.6, 1.0)):
    computed = who_gets_the_gradient_ceiling(seeds=SEEDS, noise=noise)
    ends = [who_gets_the_gradient(VARIANTS[name], seeds=SEEDS, noise=noise, steps=STEPS) for name in ("MiniRL", "R3")]
    of_engine = [f"{end['engine_score'][:, -1].mean():.3f}" for end in ends]
    rows.append([noise, f"{computed:.3f}", *of_engine, f"{ends[0]['score'][:, -1].mean():.3f}"])
show_table(
    ["router noise", "computed: engine", "MiniRL: engine", "R3: engine", "MiniRL: trainer"],
    rows,
)

# %% [markdown]
# **What to see.** Left, all methods reach the top, and nothing distinguishes them. Right, the two without replay stop
# at the line that was computed beforehand, with the weight and without it. R3 goes on. The bands without replay are
# wide because seeds differ in their routers, not in what they learned. In the table the same holds from weak to strong
# noise: the stronger it is, the further the two scores of MiniRL are apart. Who watches the trainer's score sees none
# of this.
#
# The experts here share nothing. Where experts are interchangeable, as in the trained model of section 5, a flip costs
# little, and replay has little to repair.

# %% [markdown]
# ## 8 · What our runs found
#
# The paper's figures, on the small model, over up to eight seeds (`minirl reproduce`; every run is stored in
# `lessons/results`). The rollout engine is int4 with stochastic rounding.

# %%
RUNS = checkout() / "lessons" / "results" / "runs" / "full"
DEFINITIONS = load_spec().definitions
LABELS = {"minirl": "MiniRL", "r2": "R2", "r3": "R3", "dense": "dense"}
PLACES = {"on_policy": "N = 1", "n2": "N = 2", "n4": "N = 4", "n8": "N = 8"}
runs = {
    (setting, variant): found[variant]
    for setting, found in ((setting, read_runs(RUNS / setting)) for setting in PLACES)
    for variant in LABELS
    if variant in found
}
numbers = {key: {seed: summary_of_run(run, DEFINITIONS) for seed, run in found.items()} for key, found in runs.items()}


def effect(setting, a, b, metric, *, log=False):
    """Variant a minus variant b in one metric (of logarithms: their ratio), seed by seed; None without common seeds."""
    if (setting, a) not in numbers or (setting, b) not in numbers:
        return None
    ours, theirs = numbers[setting, a], numbers[setting, b]
    common = sorted(ours.keys() & theirs.keys())
    pairs = np.array([[ours[s][metric], theirs[s][metric]] for s in common])
    return paired_difference(*(np.log(pairs).T if log else pairs.T))


comparisons = [
    ("on_policy", "r3", "minirl"), ("n2", "r2", "minirl"), ("n2", "r3", "minirl"), ("n2", "r2", "r3"),
    ("n4", "r2", "minirl"), ("n4", "r3", "minirl"), ("n4", "r3", "r2"),
    ("n8", "r2", "minirl"), ("n8", "r3", "minirl"), ("n8", "r3", "r2"),
]  # fmt: skip
found = []
for setting, a, b in comparisons:
    points, kl = effect(setting, a, b, "final_score"), effect(setting, a, b, "kl", log=True)
    if points is not None and kl is not None:
        found.append((f"{PLACES[setting]}: {LABELS[a]} against {LABELS[b]}", points, kl))

figure = Figure(figsize=(10.5, 4.3), layout="constrained")
left, right = axes(figure, 2, sharey=True)
for row, (_, points, kl) in enumerate(found):
    for ax, e, scale in ((left, points, lambda v: 100 * v), (right, kl, math.exp)):
        low, middle, high = (scale(v) for v in (e.low, e.estimate, e.high))
        clear = e.low > 0 or e.high < 0
        ax.plot([low, high], [row, row], color=ORANGE if clear else GREY, linewidth=2)
        ax.plot(middle, row, "o", color=ORANGE if clear else GREY)
left.axvline(0, color="black", linewidth=1)
right.axvline(1, color="black", linewidth=1)
left.set(yticks=range(len(found)), yticklabels=[name for name, *_ in found])
left.set_xlabel("final score, difference in points")
right.set(xscale="log", xlabel="training–inference KL, ratio", xlim=(0.3, 3.2))
right.set(xticks=[0.5, 1, 2], xticklabels=["½", "1", "2"])
right.minorticks_off()
left.invert_yaxis()
figure.suptitle("95 % intervals over seeds; orange where zero effect is outside")
Image(to_png(figure), width=850)

# %%
show_table(
    ["comparison", "seeds", "final score, points", "KL, ratio"],
    [
        [name, points.n, f"{100 * points.estimate:+.1f} ({100 * points.low:+.1f} to {100 * points.high:+.1f})",
         f"× {math.exp(kl.estimate):.2f} ({math.exp(kl.low):.2f} to {math.exp(kl.high):.2f})"]
        for name, points, kl in found
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** Right: R3 lowers the KL in every setting, as the paper says (F1d); R2 does not, and was not meant to:
# it works on the second factor. Left: nearly all intervals of the final score contain zero. R3 brings no clear gain
# on-policy, which is the paper's finding too. Neither does R2 beat R3 at $N=2$ (F2b), nor R3 beat R2 in final score at
# $N=4$ and 8 (F3b), as far as these seeds can tell. Of so many intervals one may miss zero by chance. And a wide
# interval is not evidence of no effect: it says that a difference of a few points could not have been seen here.
#
# Did anything collapse, and what did replay do to the two factors?

# %%
rows = []
for (setting, variant), summaries in numbers.items():
    logged = [run.metrics for run in runs[setting, variant].values()]

    def over_seeds(name, logged=logged):
        return f"{mean_effect(np.array([np.nanmean(columns[name]) for columns in logged])).estimate:.4f}"

    flips = "no router" if variant == "dense" else over_seeds("routing_flip_rate")
    collapsed = sum(s["collapsed"] for s in summaries.values())
    first, final = (np.mean([s[key] for s in summaries.values()]) for key in ("first_score", "final_score"))
    rows.append(
        [PLACES[setting], LABELS[variant], f"{collapsed} of {len(summaries)}", f"{first:.2f} → {final:.2f}",
         over_seeds("log_ratio_mismatch"), over_seeds("log_ratio_staleness"), flips]
    )  # fmt: skip
show_table(
    ["", "method", "collapsed", "score", "discrepancy, size of its log", "staleness, size of its log", "flip rate"],
    rows,
)


# %%
def curves(setting, metric, title):
    """One metric of every method in a setting: mean over seeds and its 95 % interval."""
    figure = Figure(figsize=(8.5, 3.9), layout="constrained")
    (ax,) = axes(figure, 1)
    styles = method_styles([LABELS[v] for s, v in runs if s == setting])
    for (where, variant), by_seed in runs.items():
        if where != setting:
            continue
        columns = [run.metrics[metric] for run in by_seed.values()]
        shortest = min(map(len, columns))
        values = np.stack([column[:shortest] for column in columns])
        there = np.isfinite(values).all(0)
        step = next(iter(by_seed.values())).metrics["grad_step"][:shortest][there]
        middle, half = mean_interval(values[:, there])
        width = max(len(middle) // 25, 1)  # means over so many values: single ones are noisy
        size = len(middle) // width * width
        x, middle, half = (part[:size].reshape(-1, width).mean(1) for part in (step, middle, half))
        style = styles[LABELS[variant]]
        line = dict(color=style["color"], linestyle=style["linestyle"])
        ax.plot(x, middle, label=f"{LABELS[variant]} ({len(by_seed)} seeds)", **line)
        ax.fill_between(x, middle - half, middle + half, color=style["color"], alpha=0.15)
    ax.set(xlabel="gradient step", ylabel=title, title=f"{PLACES[setting]}: mean over seeds, 95 % interval")
    ax.legend(frameon=False)
    return figure


Image(to_png(curves("n8", "score", "held-out score")), width=850)

# %% [markdown]
# **What to see.** MiniRL, R2 and R3 climb alike and end near each other, with clipping on in all of them. Where a band
# widens, single seeds fell and came back. The instability that replay cures in the paper does not appear on this model
# at these settings: look at the column *collapsed*.
#
# The **dense** twin has no router at all. It is a question of our own (D1): how much of the trouble is routing? Two
# things keep it open. Where nothing collapses with a router, there is nothing for its absence to cure. And where the
# dense model is shown, it learns much less in the same steps: its smaller discrepancy is that of a policy that has
# hardly moved, not evidence about routers. (Under R3 the flip rate is zero by construction: the
# training engine used the rollout's experts.)

# %%
try:
    from ipywidgets import Dropdown, interact
except ImportError:
    print("no ipywidgets here; try curves('on_policy', 'k3_rollout_old', 'KL (k3), nats')")
else:
    METRICS = {
        "held-out score": "score",
        "KL (k3), nats": "k3_rollout_old",
        "staleness, nats": "log_ratio_staleness",
        "discrepancy, nats": "log_ratio_mismatch",
        "flip rate": "routing_flip_rate",
    }

    @interact(setting=Dropdown(options={v: k for k, v in PLACES.items()}, value="on_policy"), shown=list(METRICS))
    def browse(setting, shown):
        display(Image(to_png(curves(setting, METRICS[shown], shown)), width=850))


# %% [markdown]
# **Try this**
#
# 1. In section 3 use a smaller learning rate, `lr=1e-5`. Which cells change their picture, and which cannot?
# 2. In section 5 replay $e^\mu_{old}$ into the *updated* model as well, and $e^\pi_{old}$ into $\pi_{old}$: the mixture
#    that exercise 07.2 warns of. How large does the staleness factor become before any staleness is there?
# 3. In section 4 draw `ascent_figure(n, (590, 900))` for $n = 1$. Is live training of these two policies better off?
