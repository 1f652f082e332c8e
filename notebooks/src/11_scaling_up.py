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
# The lesson with the derivations: [11_scaling_up.md](../lessons/11_scaling_up.md).
#
# **A picture to keep: a choir in two rooms that must sound as one.** Forty singers in the large room, three in the
# small one. If each room is set to "normal loudness" by itself, the three are as loud as the forty. The mixer must add
# the rooms and divide once, by all singers. Both rooms must also sing from the same edition of the score.
#
# You will spread one mini-batch over ranks, pack responses into a budget of tokens, count the parameters, bytes and
# seconds of a model with 30 billion parameters without loading it, and compare a laptop's configuration with a
# cluster's. No GPU is needed.
#
# The names that this lab uses come from `minirl_edu.course.lab11`, which also holds the code of the figures.

# %%
from minirl_edu.course.lab11 import *

# %% [markdown]
# ## 1 · One mini-batch, many ranks
#
# Six responses on two ranks, one with four short responses and one with two long ones. $\ell_b$ is what response $b$
# contributes to the objective.

# %%
ell = torch.tensor([1.0, 2.0, 1.0, 2.0, 9.0, 12.0])
ranks = [ell[:4], ell[4:]]
sizes, means = torch.tensor([4.0, 2.0]), torch.stack([rank.mean() for rank in ranks])
covariance = (sizes * means).mean() - sizes.mean() * means.mean()
values = {
    "all six, mean": ell.mean(),
    "ranks: sum ÷ 6, added (11.1)": sum(rank.sum() / 6 for rank in ranks),
    "ranks: own mean, then averaged": means.mean(),
    "the error": means.mean() - ell.mean(),
    "by (11.2): −(K/n) Cov(n_k, m_k)": -2 / 6 * covariance,
}
show_table(["how", "value"], [[name, f"{value:.3f}"] for name, value in values.items()])

# %% [markdown]
# The error is a covariance: it is there whenever the *size* of a rank is related to its *mean*. Now on a model. One
# rollout of the tiny Mixture of Experts has a true gradient. We compare it with the gradient from four ranks that
# average their own means, many times over: equal hands dealt at random, unequal hands at random, and unequal hands
# sorted by length, as a packer would deal them.

# %%
model, rollout, advantages = small_rollout(prompts=8, group_size=8, seed=3)
lengths, B = rollout.response_mask.sum(1), len(advantages)
single = response_gradients(model, rollout, advantages)
true = single.mean(0)


def mean_of_means(order, hands):
    """What four ranks get that average their own means."""
    return torch.stack([single[part].mean(0) for part in order.split(hands)]).mean(0)


def shuffled(seed):
    return torch.randperm(B, generator=torch.Generator().manual_seed(seed))


def by_length(seed):
    """Sorted by length, ties in random order."""
    order = shuffled(seed)
    return order[lengths[order].sort(stable=True).indices]


# %%
equal, unequal = (16, 16, 16, 16), (34, 16, 9, 5)
deals = {
    "equal hands, random": (shuffled, equal),
    "unequal hands, random": (shuffled, unequal),
    "unequal hands, by length": (by_length, unequal),
}
errors, bias = {}, {}
for name, (deal, hands) in deals.items():
    off = torch.stack([mean_of_means(deal(i), hands) for i in range(200)]) - true
    errors[name] = (off.norm(dim=1) / true.norm()).tolist()
    bias[name] = (off.mean(0).norm() / true.norm()).item()
parts = [single[part].sum(0) / B for part in by_length(0).split(unequal)]
print(f"sum ÷ B on each rank, added: error {((sum(parts) - true).norm() / true.norm()).item():.1e}")
image(deal_errors(lengths, errors, bias))

# %% [markdown]
# **What to see.** A dot is one way to deal the responses to four ranks. Its height is the size of the error, in units
# of the true gradient. Equal hands: no error. Unequal hands at random: a large error in each step, but its average over
# many deals (black bar) is nearly zero, so this is noise. By length: the bar stays up. That is a bias, and no number of
# steps averages it out. The global divisor (printed) leaves rounding errors only.

# %% [markdown]
# {exercise} 11.1
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
# DDP and FSDP return the mean of the ranks' gradients, so the loss of a rank needs a factor of the world size, (11.3).
# What if it is forgotten? The gradient is $K$ times too small. We take one step with it, by three rules:

# %%
LIMIT = true.norm().item() / 2  # a clip of the gradient norm that acts on the true gradient


def step_length(gradient, optimizer, clip):
    """How far one step with learning rate 1 moves."""
    start = torch.zeros_like(gradient).requires_grad_()
    start.grad = gradient.clone()
    if clip:
        torch.nn.utils.clip_grad_norm_([start], LIMIT)
    optimizer([start], lr=1.0, weight_decay=0.0).step()
    return start.detach().norm().item()


worlds = [1, 2, 4, 8, 16, 32, 64]
sgd, adam = torch.optim.SGD, torch.optim.AdamW
moved = {}
for rule, optimizer, clip in (("SGD", sgd, False), ("SGD, norm clipped", sgd, True), ("Adam", adam, False)):
    right = step_length(true, optimizer, clip)
    moved[rule] = [step_length(true / k, optimizer, clip) / right for k in worlds]
image(step_figure(worlds, moved))

# %% [markdown]
# **What to see.** SGD's step shrinks with $1/K$, so the bug is found at once. Adam's first step does not change,
# because it divides by the gradient's own size. In the clipped run the bug hides up to $K = 2$ and then shows. With
# Adam *and* a clip nothing looks wrong: the clip silently stops acting, and outliers pass. The norm is over all shards:

# %%
shards = true.split(len(true) // 3 + 1)
print(f"norm of the whole {true.norm():.6f}, from three shards {math.sqrt(sum(s.square().sum() for s in shards)):.6f}")
print(f"sum of the shards' norms, which is not the norm: {sum(s.norm() for s in shards):.6f}")

# %% [markdown]
# {exercise} 11.2
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
# Two real processes use PyTorch's DDP over gloo, rank 0 with three rows and rank 1 with one. Each calls `backward` on
# 2 · (sum of its squares) ÷ (rows of both). (The short setting of continuous integration leaves them out.)

# %%
weight = torch.ones(2, requires_grad=True)
(torch.arange(8.0).view(4, 2) @ weight).square().mean().backward()
print("one process, four rows  ", *weight.grad.tolist())
for rank, said in enumerate(pick(fast=lambda: ["not in the short setting"] * 2, full=two_ranks)()):
    print(f"rank {rank} of two           {said}")

# %% [markdown]
# ## 3 · Packing by a budget of tokens
#
# A micro-batch is a rectangle, padded to its widest row, so it takes $|m|\cdot\max w$ token slots. By hand, some runs
# of the widths 2 3 3 5 8 8 and a budget of 16:

# %%
for run in ([2, 3, 3], [2, 3, 3, 5], [5, 8], [5, 8, 8]):
    taken = len(run) * max(run)
    fits = "fits" if taken <= 16 else "too much"
    print(f"{run!s:14} {len(run)} × {max(run)} = {taken:2d} slots, {taken - sum(run)} of them padding: {fits}")

# %% [markdown]
# Here are 512 made-up lengths up to 32,768 tokens, cut in two ways under the same budget: as many rows in each part as
# the longest response allows, and greedily after sorting.

# %%
rng = np.random.default_rng(0)
widths = np.clip(rng.lognormal(8.6, 0.9, 512), 64, 32768).astype(int)
BUDGET = 65536
size = BUDGET // widths.max()
fixed = [widths[i : i + size] for i in range(0, len(widths), size)]
packed = [[]]
for w in np.sort(widths):
    if packed[-1] and (len(packed[-1]) + 1) * w > BUDGET:
        packed.append([])
    packed[-1].append(w)
image(packing_figure({"fixed rows": fixed, "sorted, packed": [np.array(part) for part in packed]}, BUDGET))

# %% [markdown]
# **What to see.** A bar is one forward. Left: two rows each, because two of the longest would fit. Most of the budget
# is unused, and much of what is used is padding (pale). Right: sorted and filled to the line, with far fewer forwards.
# The first parts hold dozens of short responses, the last ones two, so a mean over parts would be the biased case of
# section 1. With the global divisor the cut is free. `micro_batches` does this for real rollouts:

# %%
for budget in (1000, 400, 150):
    cuts = micro_batches(rollout, budget, share_prompts=False)
    slots = [layout.slots for _, _, layout in cuts]
    print(f"budget {budget}: {len(cuts)} parts, rows {[len(rows) for rows, _, _ in cuts]}, at most {max(slots)} slots")

# %% [markdown]
# {exercise} 11.3
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
# The paper's model is Qwen3-30B-A3B. On the `meta` device a model has shapes and no numbers, so it can be built here in
# a moment. Where are its parameters?

# %%
large = large_model()
c = large.config
counted = {"experts": 0, "attention": 0, "embedding and head": 0, "routers and norms": 0}
for name, parameter in large.named_parameters():
    kind = "embedding and head" if "embed_tokens" in name or "lm_head" in name else "routers and norms"
    kind = "experts" if "experts" in name else "attention" if "proj" in name else kind
    counted[kind] += parameter.numel()
active = {kind: n * c.num_experts_per_tok // c.num_experts if kind == "experts" else n for kind, n in counted.items()}
P, ACTIVE = sum(counted.values()), sum(active.values())
rows = [[kind, f"{n / 1e6:,.1f}", f"{active[kind] / 1e6:,.1f}"] for kind, n in counted.items()]
show_table(["", "all, millions", "active, millions"], [*rows, ["together", f"{P / 1e6:,.1f}", f"{ACTIVE / 1e6:,.1f}"]])

# %% [markdown]
# The published numbers are 30.5 and 3.3 billion. A token visits one in sixteen of the experts.

# %% [markdown]
# {exercise} 11.4
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
# Training needs sixteen bytes for each parameter (11.5): weights, gradients, Adam's two moments. Measured on a tiny
# model after one step:

# %%
copy = load_model("chain-steps")
optimizer = torch.optim.AdamW(copy.parameters())
response_logprobs(copy, lay_out(rollout, share_prompts=False)).logp.sum().backward()
optimizer.step()
small = sum(p.numel() for p in copy.parameters())
states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
held = sum(p.nbytes + p.grad.nbytes for p in copy.parameters()) + states
print(f"{small:,} parameters, {held:,} bytes: {held / small:.1f} for each")

# %% [markdown]
# The same for the large model, and what a long response adds. All of it is arithmetic:

# %%
T, L = 32768, c.num_hidden_layers
CACHE = 2 * L * c.num_key_value_heads * c.head_dim * 2  # bytes of one token in 16 bits
chosen = torch.empty(1, T, L, c.num_experts_per_tok, dtype=torch.uint8, device="meta")
routes = Routes(chosen, torch.empty(1, T, dtype=torch.bool, device="meta"), tuple(range(L)))
memory = {
    "weights, gradients, Adam (16 B each)": 16 * P,
    "weights alone, bf16": 2 * P,
    "logits of one response, fp32": 4 * T * c.vocab_size,
    "inputs of all layers, one response, bf16": 2 * L * T * c.hidden_size,
    "KV cache of one response, bf16": CACHE * T,
    "logits in chunks, as the library has them": 4 * CHUNK,
    "routes of one response": routes.nbytes,
    "log-probability, entropy and mask": (4 + 4 + 1) * T,
}
image(memory_figure(memory))

# %% [markdown]
# **What to see.** The axis is logarithmic: the first and the last bar differ by a factor of more than a million. The
# states need several GPUs, whatever the batch is. The logits of a *single* response (orange) would fill a quarter of
# a GPU, and the library never makes them: see the sixth bar. Routes cost next to nothing, a byte for each chosen
# expert.
#
# **Turn it yourself.** How does it fit on $n$ GPUs, if states are sharded evenly and the engine has its own copy of the
# weights on the same GPUs (colocated)?


# %%
def fit(gpus=16, context=32768, sequences=64):
    """Bytes on each GPU."""
    parts = {"states": 16 * P, "engine's weights": 2 * P, "KV cache": CACHE * context * sequences}
    title = f"{gpus} GPUs, {sequences} sequences of {context:,} tokens"
    return image(fit_figure({name: n / gpus for name, n in parts.items()}, title))


fit()

# %%
lengths_tried, batches = [1024, 4096, 8192, 32768, 65536], [16, 64, 256, 1024, 4096]
sliders(fit, gpus=([8, 16, 32, 64, 128], 16), context=(lengths_tried, 32768), sequences=(batches, 64))

# %% [markdown]
# {exercise} 11.5
# Bytes of the KV cache of `tokens` tokens in a model of these sizes; `itemsize` is the bytes of one number.


# %%
def cache_bytes(tokens, layers, heads, kv_heads, head_dim, itemsize):
    # solution
    return 2 * tokens * layers * kv_heads * head_dim * itemsize
    # end


check("11.5", cache_bytes)

# %% [markdown]
# {exercise} 11.6
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
# An update computes: $6P_{active} + 12\,L\,n_q\,h\,c$ FLOPs for each token (11.6), with $c$ half of the length on
# average. A decoding step reads: all weights that its tokens use, and each sequence's own cache. With an H100's data
# sheet:

# %%
RATE, BANDWIDTH = 989e12, 3.35e12  # bf16 FLOP/s without sparsity; bytes/s
MULTIPLIED = ACTIVE - c.vocab_size * c.hidden_size  # looking up an embedding multiplies nothing


def update_flops(length):
    """The two terms of (11.6), per token."""
    return 6 * MULTIPLIED, 12 * L * c.num_attention_heads * c.head_dim * length / 2


def decode_seconds(batch, context):
    """One token for each of `batch` sequences, on one ideal GPU: reading weights, reading caches, multiplying."""
    touched = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** batch
    read = counted["experts"] * touched + counted["attention"] + counted["embedding and head"] / 2
    return 2 * read / BANDWIDTH, batch * CACHE * context / BANDWIDTH, 2 * MULTIPLIED * batch / RATE


image(roofline_figure(8192, decode_seconds, update_flops))

# %%
crossing = next(b for b in range(1, 8192) if decode_seconds(b, 0)[2] >= decode_seconds(b, 0)[0])
ideal = RATE / BANDWIDTH * c.num_experts / c.num_experts_per_tok
print(f"without caches, arithmetic takes as long as reading from {crossing} sequences on")
print(f"(11.7) says {ideal:.0f} if all parameters were in experts, and {RATE / BANDWIDTH:.0f} for a dense model")
both = update_flops(T)
print(f"update, {T:,} tokens: {both[0] / 1e9:.0f} + {both[1] / 1e9:.0f} GFLOP per token")

# %% [markdown]
# **What to see.** Left: reading the weights (blue) takes longer until all experts are used, at a few dozen sequences.
# Then it is flat, and more sequences are free as far as weights go. Arithmetic (dotted) stays far below for a long way:
# a rollout waits for memory. With thousands of tokens of context the caches (dashed) take over. Every remedy reads
# fewer bytes, which is why engines round. Right: beyond some 15,000 tokens attention is the larger part of an update.

# %% [markdown]
# {exercise} 11.7
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
# **Down.** The engine gets the new weights tensor by tensor. Beside them it needs room for the largest tensor, not for
# a second model:

# %%
sizes = {name: 2 * parameter.numel() for name, parameter in large.named_parameters()}
largest = max(sizes, key=sizes.get)
print(f"all weights in bf16: {as_bytes(sum(sizes.values()))} in {len(sizes)} tensors")
print(f"largest tensor: {largest}, {as_bytes(sizes[largest])}")

# %% [markdown]
# The version travels with every rollout. Here: sample, change the weights, sample again without a sync, then with one.

# %%
engine = HFEngine(model)
prompts, sampling = rollout.prompts[:1], Sampling(max_new_tokens=12)
with torch.no_grad():
    model.lm_head.weight.mul_(1.5)  # stands for a global step
stale = engine.generate(prompts, group_size=2, sampling=sampling, seed=0)
engine.sync(model, version=1)
fresh = engine.generate(prompts, group_size=2, sampling=sampling, seed=0)
for name, part in {"before the sync": stale, "after it": fresh}.items():
    with torch.no_grad():
        own = response_logprobs(model, lay_out(part, share_prompts=False)).logp
    gap = (own - part.logp_rollout)[part.response_mask].abs().max().item()
    print(f"{name:16} weight_version {part.weight_version}, largest |log π_old − log μ_old| {gap:.1e}")

# %% [markdown]
# The stale rollout looks like any other. Only its version tells, and the log-ratio: in fp32 the two engines agree to
# the last digits once the weights are the same. vLLM also keeps keys and values of prompts between calls, in its
# **prefix cache**. They belong to old weights, so every sync must drop them. `VLLMEngine` and `VLLMServerEngine` do.
#
# **Up.** Routes come back over HTTP as base64 of bytes. There and back again, with the rollout of section 1:

# %%
array, buffer = rollout.routes.experts.numpy(), io.BytesIO()
np.save(buffer, array, allow_pickle=False)
coded = base64.b64encode(buffer.getvalue())
back = np.load(io.BytesIO(base64.b64decode(coded)), allow_pickle=False)
assert (back == array).all() and back.dtype == np.uint8
print(f"{array.shape} (responses, tokens, layers, experts per token): {array.nbytes:,} bytes, as text {len(coded):,}")
print(f"Routes.nbytes {rollout.routes.nbytes:,}, for each token {rollout.routes.nbytes / rollout.tokens.numel():.0f}")

# %% [markdown]
# ## 8 · From laptop to cluster: what changes and what does not
#
# The same program reads both of these. Fields are checked when a config is read, so a misspelt one is an error before
# anything starts.

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

# %%
laptop, cluster = config_lines(LAPTOP), config_lines(CLUSTER)
changed = [line for line in difflib.ndiff(laptop, cluster) if line[0] in "-+"]
print("\n".join(changed))
algorithm = sum("algorithm." in line for line in changed)
print(f"\n{len(laptop)} fields, {sum(line[0] == '+' for line in changed)} of them changed; of algorithm.*: {algorithm}")

# %% [markdown]
# **What changes** is on this list. **What does not**: the objective and its constants, the divisor, the order of a
# global step, the metrics, and the tests that hold all of them. The learning rate above is a placeholder; nobody has
# run this file here. [`scale/README.md`](../scale/README.md) has recipes and launchers, and says what has run where.
#
# **Try this**
#
# 1. In section 1, deal the responses by *reward* instead of by length. Is there a bias?
# 2. In section 6, halve the bytes of the cache (FP8). How many more sequences until the caches cost as much as the
#    weights?
# 3. In section 5, how many GPUs does the paper's figure-5 setting need, with 65,536 tokens?
