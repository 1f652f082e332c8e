# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Scaling up: the same code on a cluster
#
# The lesson with the derivations: [`lessons/11_scaling_up.md`](../lessons/11_scaling_up.md).
#
# **A picture to keep: a choir in two rooms that must sound as one.** Forty singers in the large room, three in the
# small one. If each room is set to "normal loudness" by itself, the three are as loud as the forty. The mixer must
# add the rooms and divide once, by all singers. And both rooms must sing from the same edition of the score.
#
# What you will do: spread one mini-batch over ranks, in one process, and see what a mean of means does to the gradient;
# pack responses into a budget of tokens; count the parameters, bytes and seconds of a model with 30 billion parameters
# without loading it; follow weights and routes between trainer and engine; and compare a laptop's configuration with a
# cluster's. No GPU is needed.

# %%
import base64
import difflib
import io
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check, pick
from minirl_edu.lm_head import CHUNK
from minirl_edu.logprobs import can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import METHOD_STYLE, to_png
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import Routes
from minirl_edu.tasks import ChainTask

logging.disable_progress_bar()
torch.set_num_threads(1)

BLUE, ORANGE, GREEN, AMBER = (METHOD_STYLE[name]["color"] for name in ("MiniRL", "− IS", "R3", "+ length norm"))


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def axes_of(figure, columns, **options):
    """Plain axes in one row."""
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    return axes


def as_bytes(n):
    """Bytes in words, in powers of ten."""
    power = min(4, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


# %% [markdown]
# ## 1 · One mini-batch, many ranks
#
# Six responses; $\ell_b$ is what each contributes to the objective. The loss of the mini-batch is
#
# $$L = -\frac1B\sum_b \ell_b = \sum_k\Big(-\frac1B\sum_{b\in k}\ell_b\Big) \tag{11.1}$$
#
# Two ranks, one with four short responses and one with two long ones:

# %%
ell = torch.tensor([1.0, 2.0, 1.0, 2.0, 9.0, 12.0])
ranks = [ell[:4], ell[4:]]
sizes, means = torch.tensor([4.0, 2.0]), torch.stack([rank.mean() for rank in ranks])
covariance = (sizes * means).mean() - sizes.mean() * means.mean()
show_table(
    ["how", "value"],
    [
        ["all six, mean", f"{ell.mean():.3f}"],
        ["ranks: sum ÷ 6, added", f"{sum(rank.sum() / 6 for rank in ranks):.3f}"],
        ["ranks: own mean, then averaged", f"{means.mean():.3f}"],
        ["the error", f"{means.mean() - ell.mean():+.3f}"],
        ["by (11.2): −(K/n) Cov(n_k, m_k)", f"{-2 / 6 * covariance:+.3f}"],
    ],
)

# %% [markdown]
# The error is a covariance: it is there whenever the *size* of a rank has to do with its *mean*. Now on a model. One
# rollout of the tiny Mixture of Experts, its true gradient, and the gradient from four ranks, many times over: with the
# responses dealt out at random, four equal hands; at random, unequal hands; and sorted by length, unequal hands, as a
# packer would.

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"), hard_fraction=0.25)
sampling, share, G = Sampling(max_new_tokens=task.max_new_tokens), can_share_prompts(model), 8
problems = task.sample(8, seed=3)
engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
rollout = engine.generate([task.encode(p) for p in problems], group_size=G, sampling=sampling, seed=3)
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
rewards = torch.tensor([task.reward(problems[i // G], text) for i, text in enumerate(texts)])
advantages = group_mean_advantages(rewards, G)
lengths = rollout.response_mask.sum(1)
B = len(advantages)


def response_gradients():
    """The gradient of each response's own −ℓ_b with respect to the first layer's queries, a row each."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    logp = response_logprobs(model, lay_out(rollout, share_prompts=share)).logp
    rows = []
    for b in range(B):
        keep = torch.zeros(B).index_fill_(0, torch.tensor([b]), 1.0)
        loss = minirl_loss(
            logp, logp.detach(), rollout.logp_rollout, advantages * keep, rollout.response_mask, num_responses=1
        ).loss
        rows.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten())
    return torch.stack(rows)


single = response_gradients()
true = single.mean(0)


def mean_of_means(order, hands):
    """What four ranks get that average their own means."""
    return torch.stack([single[part].mean(0) for part in order.split(hands)]).mean(0)


def relative_errors(deal, hands, repeats=200):
    return [((mean_of_means(deal(i), hands) - true).norm() / true.norm()).item() for i in range(repeats)]


def shuffled(seed):
    return torch.randperm(B, generator=torch.Generator().manual_seed(seed))


def by_length(seed):
    """Sorted by length, ties in random order."""
    order = shuffled(seed)
    return order[lengths[order].sort(stable=True).indices]


equal, unequal = (16, 16, 16, 16), (34, 16, 9, 5)
errors = {
    "equal hands,\nrandom": relative_errors(shuffled, equal),
    "unequal hands,\nrandom": relative_errors(shuffled, unequal),
    "unequal hands,\nby length": relative_errors(by_length, unequal),
}
bias = {
    name: (torch.stack([mean_of_means(deal(i), hands) for i in range(200)]).mean(0) - true).norm() / true.norm()
    for name, deal, hands in zip(errors, (shuffled, shuffled, by_length), (equal, unequal, unequal), strict=True)
}


def rank_figure():
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    left, right = axes_of(figure, 2, gridspec_kw={"width_ratios": [1, 1.7]})
    left.hist(lengths.tolist(), bins=np.arange(min(lengths.tolist()), max(lengths.tolist()) + 2) - 0.5, color=BLUE)
    left.set(xlabel="response tokens", ylabel="responses")
    left.set_title("the rollout", loc="left", fontsize=11)
    for i, (name, values) in enumerate(errors.items()):
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
        right.plot(i + spread, values, ".", color=ORANGE, markersize=4, alpha=0.6)
        right.plot([i - 0.3, i + 0.3], [bias[name]] * 2, color="#222222", linewidth=2.2)
    right.set(xticks=range(len(errors)), xticklabels=errors, ylim=(-0.05, None))
    right.set_ylabel("error ÷ true gradient")
    right.set_title("mean of means, 200 deals (bar: error of their average)", loc="left", fontsize=11)
    return figure


Image(to_png(rank_figure()), width=850)

# %%
parts = [single[part].sum(0) / B for part in by_length(0).split(unequal)]
print(f"sum ÷ B on each rank, added: error {((sum(parts) - true).norm() / true.norm()).item():.1e}")
for name, values in errors.items():
    print(f"{' '.join(name.split()):26} error {np.mean(values):.2f}, of the average over deals {bias[name]:.2f}")

# %% [markdown]
# **What to see.** A dot is one way to deal the responses to four ranks; its height is the size of the error, in units
# of the true gradient. Equal hands: no error, however they are dealt. Unequal hands at random: a large error in each
# step, but its average over many deals (black bar) is nearly zero: noise. By length: the bar stays up. That is a
# bias, and no number of steps averages it out. The global divisor (printed) has only rounding errors in all three.

# %% [markdown]
# {exercise} 11.1
#
# `ranks` is a list with what each rank holds: `(terms, mask)`, both `[b, T]`, the summands of the loss. Return a list
# with the loss of each rank, such that their **sum** is the loss of the mini-batch: a sum over tokens, a mean over
# all responses.


# %%
def losses_to_add(ranks):
    # solution
    responses = sum(len(mask) for _, mask in ranks)
    return [terms[mask].sum() / responses for terms, mask in ranks]
    # end


check("11.1", losses_to_add)

# %% [markdown]
# ## 2 · Gradients that are averaged for you
#
# DDP and FSDP return the mean of the ranks' gradients. So the loss of a rank needs a factor of the world size:
#
# $$\frac1K\sum_k\nabla(K\,L_k) = \nabla L \tag{11.3}$$
#
# What if it is forgotten? The gradient is $K$ times too small. We take one step with it, by three rules:

# %%
LIMIT = true.norm().item() / 2  # a clip of the gradient norm that acts on the true gradient


def step_length(gradient, rule):
    """How far one step with learning rate 1 moves, in units of what the true gradient would do without a clip."""
    start = torch.zeros_like(gradient).requires_grad_()
    start.grad = gradient.clone()
    if "clip" in rule:
        torch.nn.utils.clip_grad_norm_([start], LIMIT)
    (
        torch.optim.AdamW([start], lr=1.0, weight_decay=0.0) if "Adam" in rule else torch.optim.SGD([start], lr=1.0)
    ).step()
    return start.detach().norm().item()


worlds = [1, 2, 4, 8, 16, 32, 64]
rules = {"SGD": (BLUE, "-o"), "SGD, norm clipped": (ORANGE, "--s"), "Adam": (GREEN, ":^")}
moved = {rule: [step_length(true / k, rule) / step_length(true, rule) for k in worlds] for rule in rules}


def factor_figure():
    figure = Figure(figsize=(8.5, 2.9), layout="constrained")
    (ax,) = axes_of(figure, 1)
    for rule, (color, style) in rules.items():
        ax.plot(worlds, moved[rule], style, color=color, label=rule, linewidth=1.8, markersize=5)
    ax.set(xscale="log", yscale="log", xlabel="world size K, the factor forgotten", ylabel="step ÷ right step")
    ax.set_xticks(worlds, worlds)
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


Image(to_png(factor_figure()), width=850)

# %% [markdown]
# **What to see.** SGD's step shrinks with $1/K$: the bug is found at once. Adam's first step does not change at all,
# since it divides by the gradient's own size. In the clipped run the bug hides up to $K = 2$ and then shows. With
# Adam *and* a clip, as everyone trains, nothing looks wrong: the clip silently stops acting, and outliers that it
# should have cut down pass.
#
# The norm itself is over all shards, $\|g\|^2 = \sum_s\|g_s\|^2$ (11.4):

# %%
shards = true.split(len(true) // 3 + 1)
print(f"norm of the whole {true.norm():.6f}, from three shards {math.sqrt(sum(s.square().sum() for s in shards)):.6f}")
print(f"sum of the shards' norms, which is not the norm: {sum(s.norm() for s in shards):.6f}")

# %% [markdown]
# {exercise} 11.2
#
# One rank calls this and then `backward`; the framework averages gradients over ranks. `loss_sum` is the rank's sum
# over tokens and responses, `own` its number of responses, `counts` the numbers of all ranks. Return the loss to call
# `backward` on, so that the averaged gradient is that of the mini-batch's mean over responses.


# %%
def loss_for_backward(loss_sum, own, counts):
    # solution
    return loss_sum * len(counts) / sum(counts)
    # end


check("11.2", loss_for_backward)

# %% [markdown]
# Two real processes, PyTorch's DDP over gloo, rank 0 with three rows and rank 1 with one. They meet in a file, so no
# port is needed. (Left out in the short setting of continuous integration: two processes that import torch are most
# of its time.)

# %%
SCRIPT = """
import sys
import torch
import torch.distributed as dist

rank, world, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=world)
rows = torch.arange(8.0).view(4, 2)[:3] if rank == 0 else torch.arange(8.0).view(4, 2)[3:]
count = torch.tensor(float(len(rows)))
dist.all_reduce(count)  # the global number of rows
model = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.ones_(model.weight)
model = torch.nn.parallel.DistributedDataParallel(model)
(world * model(rows).square().sum() / count).backward()
print(*model.module.weight.grad.flatten().tolist())
dist.destroy_process_group()
"""


def two_ranks(timeout=200):
    """What each of two processes has as gradient, or why they did not run."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ranks.py").write_text(SCRIPT)
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        options["env"] = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(folder, "ranks.py"))]
        started = [
            subprocess.Popen([*command, str(rank), "2", str(Path(folder, "meeting"))], **options) for rank in (0, 1)
        ]
        try:
            return [process.communicate(timeout=timeout)[0].strip() or "did not run here" for process in started]
        except subprocess.TimeoutExpired:
            return ["took too long here"] * 2
        finally:
            for process in started:
                process.kill()


weight = torch.ones(2, requires_grad=True)
(torch.arange(8.0).view(4, 2) @ weight).square().mean().backward()
print("one process, four rows  ", *weight.grad.tolist())
for rank, said in enumerate(pick(fast=lambda: ["not in the short setting"] * 2, full=two_ranks)()):
    print(f"rank {rank} of two           {said}")

# %% [markdown]
# ## 3 · Packing by a budget of tokens
#
# A micro-batch is a rectangle, padded to its widest row: $|m|\cdot\max w \le \tau$ (11.5). By hand, widths 2 3 3 5 8
# 8 and a budget of 16:

# %%
for run in ([2, 3, 3], [2, 3, 3, 5], [5, 8], [5, 8, 8]):
    taken = len(run) * max(run)
    print(f"{run!s:14} {len(run)} × {max(run)} = {taken:2d} slots, {taken - sum(run)} of them padding:",
          "fits" if taken <= 16 else "too much")  # fmt: skip

# %% [markdown]
# At scale lengths are spread over orders of magnitude. Here are 512 made-up lengths up to 32,768 tokens, cut in two
# ways under the same budget: as many rows in each part as the longest response allows, and greedily after sorting.

# %%
rng = np.random.default_rng(0)
widths = np.clip(rng.lognormal(8.6, 0.9, 512), 64, 32768).astype(int)
BUDGET = 65536


def fixed_parts(widths, budget):
    size = budget // widths.max()
    return [widths[i : i + size] for i in range(0, len(widths), size)]


def packed_parts(widths, budget):
    parts, current = [], []
    for w in np.sort(widths):
        if current and (len(current) + 1) * w > budget:
            parts, current = [*parts, current], []
        current = [*current, w]
    return [np.array(part) for part in [*parts, current]]


def packing_figure(budget=BUDGET):
    figure = Figure(figsize=(8.5, 3.3), layout="constrained")
    for ax, (name, cut) in zip(
        axes_of(figure, 2, sharey=True),
        {"fixed rows": fixed_parts, "sorted, packed": packed_parts}.items(),
        strict=True,
    ):
        parts = cut(widths, budget)
        used, taken = (np.array([f(part) for part in parts]) for f in (np.sum, lambda p: len(p) * p.max()))
        at = np.arange(len(parts))
        ax.bar(at, taken, width=1.0, color="#f3d9c9", label="padding")
        ax.bar(at, used, width=1.0, color=BLUE, label="tokens")
        ax.axhline(budget, color="#222222", linewidth=1)
        waste = 1 - used.sum() / taken.sum()
        ax.set_title(f"{name}: {len(parts)} forwards, {waste:.0%} padding", loc="left", fontsize=11)
        ax.set(xlabel="micro-batch", xlim=(-1, max(len(parts), 10)))
    figure.axes[0].set_ylabel("token slots (line: budget)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


Image(to_png(packing_figure()), width=850)

# %% [markdown]
# **What to see.** A bar is one forward. Left: two rows each, because two of the longest would fit. Most of the budget
# is unused, and much of what is used is padding (pale). Right: sorted, filled to the line, fewer forwards by far. The
# first parts hold dozens of short responses and the last ones two. So a mean over parts would be the biased case of
# section 1, on purpose; with the global divisor the cut is free. `micro_batches` does this for real rollouts:

# %%
for budget in (1000, 400, 150):
    cuts = micro_batches(rollout, budget, share_prompts=False)
    slots = [layout.slots for _, _, layout in cuts]
    print(f"budget {budget}: {len(cuts)} parts, rows {[len(rows) for rows, _, _ in cuts]}, at most {max(slots)} slots")

# %% [markdown]
# {exercise} 11.3
#
# `widths` ascend. Return the list of runs `(start, stop)`, such that each run takes
# `(stop − start) · widest ≤ budget` and none could take one row more. A row that is too wide by itself is a run of
# its own.


# %%
def greedy_runs(widths, budget):
    # solution
    runs, start = [], 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or (stop + 1 - start) * widths[stop] > budget:
            runs.append((start, stop))
            start = stop
    return runs
    # end


check("11.3", greedy_runs)

# %% [markdown]
# ## 4 · Counting parameters
#
# The paper's model is Qwen3-30B-A3B. On the `meta` device a model has shapes and no numbers, so it can be built here
# in a moment. Its sizes, and where its parameters are:

# %%
qwen3 = Qwen3MoeConfig(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    tie_word_embeddings=False,
)
with torch.device("meta"):
    large = AutoModelForCausalLM.from_config(qwen3)


def kind_of(name):
    if "experts" in name:
        return "experts"
    if "self_attn" in name and "proj" in name:
        return "attention"
    return "embedding and head" if "embed_tokens" in name or "lm_head" in name else "routers and norms"


counted = {}
for name, parameter in large.named_parameters():
    counted[kind_of(name)] = counted.get(kind_of(name), 0) + parameter.numel()
per_token = {k: n * qwen3.num_experts_per_tok // qwen3.num_experts if k == "experts" else n for k, n in counted.items()}
P, ACTIVE = sum(counted.values()), sum(per_token.values())
show_table(
    ["", "all, millions", "active, millions"],
    [[k, f"{n / 1e6:,.1f}", f"{per_token[k] / 1e6:,.1f}"] for k, n in counted.items()]
    + [["**together**", f"**{P / 1e6:,.1f}**", f"**{ACTIVE / 1e6:,.1f}**"]],
)

# %% [markdown]
# That is the published pair: 30.5 billion, 3.3 billion active. Nearly everything is in experts, and of those a token
# visits one in sixteen.

# %% [markdown]
# {exercise} 11.4
#
# One layer, by hand. Return all and active parameters. Attention has q- and k-norms of `head_dim` each, the layer two
# norms of `hidden`; there are no biases; an expert has gate, up and down.


# %%
def layer_parameters(hidden, heads, kv_heads, head_dim, experts, top_k, expert_hidden):
    # solution
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    shared = attention + hidden * experts + 2 * hidden + 2 * head_dim
    expert = 3 * hidden * expert_hidden
    return shared + experts * expert, shared + top_k * expert
    # end


check("11.4", layer_parameters)

# %% [markdown]
# ## 5 · Bytes: states, logits, cache, routes
#
# Sixteen bytes for each parameter while training (11.7): weights, gradients, Adam's two moments. Measured on the tiny
# model, after one step:

# %%
optimizer = torch.optim.AdamW(model.parameters())
response_logprobs(model, lay_out(rollout, share_prompts=share)).logp.sum().backward()
optimizer.step()
small = sum(p.numel() for p in model.parameters())
states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
held = sum(p.nbytes + p.grad.nbytes for p in model.parameters()) + states
print(f"{small:,} parameters, {held:,} bytes: {held / small:.1f} for each")
optimizer.zero_grad()
del optimizer
model = load_model("chain-steps").eval()  # that step was for its memory only

# %% [markdown]
# The same for the large model, and what a long response adds. All of it is arithmetic:

# %%
T = 32768
KV_PER_TOKEN = 2 * qwen3.num_hidden_layers * qwen3.num_key_value_heads * qwen3.head_dim * 2
long_routes = Routes(
    torch.empty(1, T, qwen3.num_hidden_layers, qwen3.num_experts_per_tok, dtype=torch.uint8, device="meta"),
    torch.empty(1, T, dtype=torch.bool, device="meta"),
    tuple(range(qwen3.num_hidden_layers)),
)
memory = {
    "weights, gradients, Adam (16 B each)": 16 * P,
    "weights alone, bf16": 2 * P,
    "logits of one response, fp32": 4 * T * qwen3.vocab_size,
    "inputs of all layers, one response, bf16": 2 * qwen3.num_hidden_layers * T * qwen3.hidden_size,
    "KV cache of one response, bf16": KV_PER_TOKEN * T,
    "logits in chunks, as the library has them": 4 * CHUNK,
    "routes of one response": long_routes.nbytes,
    "log-probability, entropy and mask": (4 + 4 + 1) * T,
}


def memory_figure():
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    (ax,) = axes_of(figure, 1)
    at = np.arange(len(memory))[::-1]
    ax.barh(at, list(memory.values()), color=[ORANGE if "response" in name else BLUE for name in memory])
    for y, n in zip(at, memory.values(), strict=True):
        ax.text(n * 1.3, y, as_bytes(n), va="center", fontsize=9, bbox={"color": "white", "pad": 1})
    ax.axvline(80e9, color="#222222", linewidth=1, linestyle="--")
    ax.text(80e9 * 0.85, -0.55, "one GPU of 80 GB", fontsize=9, ha="right")
    ax.set(xscale="log", xlim=(1e5, 3e13), yticks=at, yticklabels=list(memory), xlabel="bytes")
    ax.grid(False)
    return figure


Image(to_png(memory_figure()), width=850)

# %% [markdown]
# **What to see.** A logarithmic axis: the first and the last bar differ by a factor of more than a million. The
# states need several GPUs, whatever the batch is. The logits of a *single* response (orange) would fill a quarter of
# a GPU, and the library never makes them: sixth bar. Routes cost next to nothing, because only the numbers of the
# chosen experts are kept, a byte each. A whole rollout still adds up:

# %%
responses = 64 * 16 * 4  # the paper's mini-batch of 64 prompts × 16, N = 4
show_table(
    [f"{responses:,} responses of {T:,} tokens", "bytes"],
    [
        ["token ids, int64", as_bytes(8 * responses * T)],
        ["log μ_old, fp32", as_bytes(4 * responses * T)],
        ["routes, a byte for each expert chosen", as_bytes(responses * long_routes.nbytes)],
        ["the same routes over HTTP, in base64", as_bytes(responses * long_routes.nbytes * 4 / 3)],
        ["the same routes as int64", as_bytes(responses * T * (8 * 48 * 8 + 1))],
        ["the KV cache, if all were decoded at once", as_bytes(responses * KV_PER_TOKEN * T)],
    ],
)

# %% [markdown]
# **Turn it yourself.** How does it fit on $n$ GPUs, if states are sharded evenly and the engine has its own copy of the
# weights on the same GPUs (colocated)?


# %%
def fit_figure(gpus, context, sequences):
    """Bytes on each GPU: sharded states, the engine's sharded bf16 copy, the KV cache of its share of sequences."""
    per_gpu = {
        "states": 16 * P / gpus,
        "engine's weights": 2 * P / gpus,
        "KV cache": KV_PER_TOKEN * context * sequences / gpus,
    }
    figure = Figure(figsize=(8.5, 1.9), layout="constrained")
    (ax,) = axes_of(figure, 1)
    left = 0.0
    for (name, n), color in zip(per_gpu.items(), (BLUE, GREEN, AMBER), strict=True):
        ax.barh(0, n / 1e9, left=left, color=color, label=f"{name}: {as_bytes(n)}")
        left += n / 1e9
    ax.axvline(80, color="#222222", linewidth=1.2, linestyle="--")
    ax.set(yticks=[], xlim=(0, max(100, left * 1.05)), xlabel="GB on each GPU (dashed: 80 GB)")
    ax.set_title(f"{gpus} GPUs, {sequences} sequences of {context:,} tokens", loc="left", fontsize=11)
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.35), ncols=3)
    ax.grid(False)
    return figure


Image(to_png(fit_figure(16, 32768, 64)), width=850)

# %%
try:
    from ipywidgets import SelectionSlider, interact
except ImportError:
    print("no ipywidgets here; try fit_figure(8, 8192, 128)")
else:

    @interact(
        gpus=SelectionSlider(options=[8, 16, 32, 64, 128], value=16),
        context=SelectionSlider(options=[1024, 4096, 8192, 16384, 32768, 65536], value=32768),
        sequences=SelectionSlider(options=[16, 64, 256, 1024, 4096], value=256),
    )
    def turn(gpus, context, sequences):
        display(Image(to_png(fit_figure(gpus, context, sequences)), width=850))


# %% [markdown]
# {exercise} 11.5
#
# Bytes of the KV cache of `tokens` tokens in a model of these sizes; `itemsize` is the bytes of one number.


# %%
def cache_bytes(tokens, layers, heads, kv_heads, head_dim, itemsize):
    # solution
    return 2 * tokens * layers * kv_heads * head_dim * itemsize
    # end


check("11.5", cache_bytes)

# %% [markdown]
# {exercise} 11.6
#
# Bytes of the routes of `tokens` tokens, as `Routes` stores them: the number of each chosen expert in the smallest
# unsigned integer that can hold the number of any expert, and one byte to say whether the row is valid.


# %%
def route_bytes(tokens, layers, top_k, experts):
    # solution
    size = 1 if experts <= 256 else 2
    return tokens * (layers * top_k * size + 1)
    # end


check("11.6", route_bytes)

# %% [markdown]
# ## 6 · Two rooflines
#
# An update computes: $6P_{active} + 12\,L\,n_q\,h\,c$ FLOPs for each token (11.11), with $c$ half of the length on
# average. A decoding step reads: all weights that its tokens use, and each sequence's own cache. With an H100's data
# sheet:

# %%
RATE, BANDWIDTH = 989e12, 3.35e12  # bf16 FLOP/s without sparsity; bytes/s
MULTIPLIED = ACTIVE - qwen3.vocab_size * qwen3.hidden_size  # looking up an embedding multiplies nothing


def update_flops(length):
    """The two terms of (11.11), per token."""
    return 6 * MULTIPLIED, 12 * qwen3.num_hidden_layers * qwen3.num_attention_heads * qwen3.head_dim * length / 2


def decode_seconds(batch, context):
    """One token for each of `batch` sequences, on one ideal GPU: reading weights, reading caches, multiplying."""
    touched = 1 - (1 - qwen3.num_experts_per_tok / qwen3.num_experts) ** batch
    read = counted["experts"] * touched + counted["attention"] + counted["embedding and head"] / 2
    return (
        2 * read / BANDWIDTH,
        batch * KV_PER_TOKEN * context / BANDWIDTH,
        2 * MULTIPLIED * batch / RATE,
    )


def roofline_figure(context):
    figure = Figure(figsize=(8.5, 3.5), layout="constrained")
    left, right = axes_of(figure, 2)
    at = np.unique(np.geomspace(1, 16384, 60).astype(int))
    terms = np.array([decode_seconds(b, context) for b in at]).T * 1e3
    names = {"read the weights": (BLUE, "-"), "read the caches": (AMBER, "--"), "multiply": (ORANGE, ":")}
    for (name, (color, style)), values in zip(names.items(), terms, strict=True):
        left.plot(at, values, style, color=color, label=name, linewidth=2)
    left.set(xscale="log", yscale="log", xlabel="sequences decoded at once", ylabel="milliseconds for a token each")
    left.set_title(f"rollout, {context:,} tokens of context", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    lengths = np.geomspace(256, 65536, 40)
    flops = np.array([update_flops(n) for n in lengths]).T / 1e9
    right.fill_between(lengths, 0, flops[0], color=BLUE, alpha=0.8, linewidth=0, label="parameters, 6 P_active")
    right.fill_between(lengths, flops[0], flops.sum(0), color=ORANGE, alpha=0.6, linewidth=0, label="attention")
    right.set(xscale="log", xlabel="length of the response", ylabel="GFLOP per token", ylim=(0, None))
    right.set_xticks([256, 2048, 16384, 65536], ["256", "2,048", "16,384", "65,536"])
    right.minorticks_off()
    right.set_title("update", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


Image(to_png(roofline_figure(8192)), width=850)

# %%
reading = np.array([decode_seconds(b, 0) for b in range(1, 8192)])
found = int((reading[:, 2] >= reading[:, 0]).argmax()) + 1
ideal = RATE / BANDWIDTH * qwen3.num_experts / qwen3.num_experts_per_tok
print(f"without caches, arithmetic takes as long as reading from {found} sequences on; (11.13) says {ideal:.0f} if all")
print(f"parameters were in experts; a dense model: {RATE / BANDWIDTH:.0f}")
both = update_flops(T)
print(f"update, {T:,} tokens: {both[0] / 1e9:.0f} + {both[1] / 1e9:.0f} GFLOP per token")
hours = 1024 * T * sum(both) / (0.4 * RATE) / 3600
print(f"1,024 responses of that length, at 40 % of the peak: {hours:.1f} GPU hours for the update alone")

# %% [markdown]
# **What to see.** Left: reading the weights (blue) rises until all experts are used, at a few dozen sequences, and
# then it is flat: more sequences are free, as far as weights go. Arithmetic (dotted) is far below for a long way: a
# rollout waits for memory. With thousands of tokens of context the caches (dashed) take over long before arithmetic
# does. Every remedy is to read fewer bytes, which is why engines round. Right: an update's work; beyond some 15,000
# tokens attention is the larger part of it. The printed hours are for full-length responses on ideal terms; the paper
# reports 5 to 6 GPU hours for a gradient step with everything.

# %% [markdown]
# {exercise} 11.7
#
# FLOPs per token of an update, forward and backward, averaged over a response of `length` tokens with causal attention.
# `active` parameters multiply each token; `total` are there.


# %%
def flops_per_token(length, active, total, layers, heads, head_dim):
    # solution
    return 6 * active + 12 * layers * heads * head_dim * length / 2
    # end


check("11.7", flops_per_token)

# %% [markdown]
# ## 7 · Between trainer and engine
#
# **Down.** The engine gets the new weights tensor by tensor. What is needed besides is the largest tensor, not a second
# model:

# %%
sizes = {name: 2 * parameter.numel() for name, parameter in large.named_parameters()}
largest = max(sizes, key=sizes.get)
print(f"all weights in bf16: {as_bytes(sum(sizes.values()))} in {len(sizes)} tensors")
print(f"largest tensor: {largest}, {as_bytes(sizes[largest])}")

# %% [markdown]
# And the version travels with every rollout. Here: sample, change the weights, sample again without a sync, then with
# one.

# %%
engine = HFEngine(model, record_routes=True)
prompt = [task.encode(problems[0])]
with torch.no_grad():
    model.lm_head.weight.mul_(1.5)  # stands for a global step
stale = engine.generate(prompt, group_size=2, sampling=sampling, seed=0)
engine.sync(model, version=1)
fresh = engine.generate(prompt, group_size=2, sampling=sampling, seed=0)
for name, part in {"before the sync": stale, "after it": fresh}.items():
    with torch.no_grad():
        own = response_logprobs(model, lay_out(part, share_prompts=share)).logp
    gap = (own - part.logp_rollout)[part.response_mask].abs().max().item()
    print(f"{name:16} weight_version {part.weight_version}, largest |log π_old − log μ_old| {gap:.1e}")

# %% [markdown]
# The stale rollout looks like any other. Only its label tells, and the log-ratio: in fp32 the two engines agree to
# the last digits once the weights are the same. vLLM has one more trap, the **prefix cache**: keys and values of
# prompts, kept between calls. They belong to old weights, and every sync must drop them; `VLLMEngine` and
# `VLLMServerEngine` do, and refuse to go on if vLLM does not.
#
# **Up.** Routes come back over HTTP as base64 of bytes. There and back again, with the rollout of section 1:

# %%
array = rollout.routes.experts.numpy()
buffer = io.BytesIO()
np.save(buffer, array, allow_pickle=False)
coded = base64.b64encode(buffer.getvalue())
back = np.load(io.BytesIO(base64.b64decode(coded)), allow_pickle=False)
assert (back == array).all() and back.dtype == np.uint8
print(f"{array.shape} (responses, tokens, layers, experts per token): {array.nbytes:,} bytes, as text {len(coded):,}")
print(f"Routes.nbytes {rollout.routes.nbytes:,}, for each token {rollout.routes.nbytes / rollout.tokens.numel():.0f}")

# %% [markdown]
# ## 8 · From laptop to cluster: what changes and what does not
#
# The same program reads both of these. The second asks for a served engine and a large model; the fields are checked
# when it is read, so a misspelt one is an error before anything starts.

# %%
LAPTOP = """
model: {name: chain-steps}
rollout: {engine: hf, precision: fp8_e4m3}
algorithm: {objective: minirl, replay: R3}
train: {mini_batches: 4, mini_batch_prompts: 32, group_size: 8, lr: 3.0e-4, tokens_per_micro_batch: 1536}
"""
CLUSTER = """
model: {name: Qwen/Qwen3-30B-A3B-Base, dtype: bfloat16, gradient_checkpointing: true}
rollout:
  engine: vllm_server
  precision: bf16
  options: {url: "http://127.0.0.1:8000", transfer: nccl}
  max_new_tokens: 32768
algorithm: {objective: minirl, replay: R3}
train: {mini_batches: 4, mini_batch_prompts: 64, group_size: 16, lr: 1.0e-6, tokens_per_micro_batch: 65536}
"""


def lines_of(text):
    """Every field of the config, one a line, defaults included."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(text)
        data = load_config(Path(folder, "config.yaml")).to_dict()
    return [
        f"{section}.{name}: {value}"
        for section, fields in data.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    ]


laptop, cluster = lines_of(LAPTOP), lines_of(CLUSTER)
changed = [line for line in difflib.ndiff(laptop, cluster) if line[0] in "-+"]
print("\n".join(changed))
algorithm = sum("algorithm." in line for line in changed)
print(f"\n{len(laptop)} fields, {sum(line[0] == '+' for line in changed)} of them changed; of algorithm.*: {algorithm}")

# %% [markdown]
# **What changes** is on this list. **What does not**: the objective and its constants, the divisor, the order of a
# global step, the metrics, and the tests that hold all of them. (The learning rate above is a placeholder, not a
# recommendation; nobody has run this file here.)
#
# **What exists today.** The trainer runs on several processes under `accelerate launch`, with the global counts of
# section 1: on two CPU processes, sharded or not, it gives the weights of one. vLLM runs in the trainer's process and
# behind HTTP ([`scale/serve.py`](../scale/serve.py)), tested on CPUs, weights compared bit for bit; its GPU paths
# (NCCL, routes by vLLM's own option) are written and have run on no GPU here. Recipes and launchers:
# [`scale/README.md`](../scale/README.md).
#
# **Try this**
#
# 1. In section 1, deal the responses by *reward* instead of by length. Is there a bias?
# 2. In section 6, halve the bytes of the cache (FP8). How many more sequences until the caches cost as much as the
#    weights?
# 3. In section 5, how many GPUs does the paper's figure-5 setting need, with 65,536 tokens?
