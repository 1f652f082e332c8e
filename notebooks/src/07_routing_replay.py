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
# hand, prove the paper's Table 1, and measure what replay costs and what it cannot do.
#
# **A picture to keep: the same path by torchlight.** A guide led a group through a wood by day. At night she must lead
# them along *the same* path. At each fork she follows her notes, even where by torchlight the other way looks better.
# How fast she walks and where she puts her feet, she decides anew. The notes fix the forks and nothing else.
#
# All names that no cell defines come from `minirl_edu/course/lab07.py`: parts of the library, and the lab's figures.

# %%
from minirl_edu.course.lab07 import *

# %% [markdown]
# ## 1 · The selection, not the gates
#
# One token, four experts, top-2. By day the router chose experts 0 and 1. Tonight the weights are a little different,
# and it would choose 0 and 2. Under replay it keeps 0 and 1, and computes their gates from *tonight's* logits.

# %%
by_day, tonight = torch.tensor([2.0, 1.10, 1.05, -1.0]), torch.tensor([1.8, 1.00, 1.20, -0.9])
notes = by_day.topk(2).indices
for name, logits, experts in (
    ("by day           ", by_day, notes),
    ("tonight, live    ", tonight, tonight.topk(2).indices),
    ("tonight, replayed", tonight, notes),
):
    print(name, " experts", experts.tolist(), " gates", [f"{g:.3f}" for g in logits[experts].softmax(0)])

# %% [markdown]
# The gates of the last line are neither those of the day nor those of the live choice. They carry gradient: the router
# goes on learning how much expert 1 should count.
#
# In the library, `with replay.replay(routes):` answers the router's own top-k. The rest is the model's code.

# %%
model, task = load_model("chain-steps").eval(), load_task()
replay = RoutingReplay(model)
tokens = torch.tensor([task.encode(task.sample(1, seed=0)[0])])
order = torch.rand(1, tokens.shape[1], 2, 8, generator=torch.Generator().manual_seed(0)).argsort(-1)
random_routes = Routes(order[..., :2].to(torch.uint8), torch.ones_like(tokens, dtype=torch.bool), replay.layers)

with replay.replay(random_routes):  # experts that nobody would choose
    model(input_ids=tokens, labels=tokens).loss.backward()
print("the router's gradient under replay, norm:", f"{model.model.layers[0].mlp.gate.weight.grad.norm():.4f}")
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
# There are two sets of notes. The **training engine** at $\theta_{old}$ chose $e^\pi_{old}$. The **rollout engine**,
# with the same weights and other rounding, chose $e^\mu_{old}$.
#
# * **R2**, vanilla routing replay: updates use $e^\pi_{old}$.
# * **R3**, rollout routing replay: the training engine uses $e^\mu_{old}$, also for $\pi_{old}$.
#
# `score_under` returns $\log\pi$ of the response tokens and the experts, live or with given ones.

# %%
engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
problems = task.sample(pick(fast=16, full=32), seed=0)
rollout, rewards = rewarded_rollout(engine, task, problems)
layout, mask, e_mu = lay_out(rollout, share_prompts=can_share_prompts(model)), rollout.response_mask, rollout.routes
_, e_old = score_under(model, layout)

updated = copy.deepcopy(model)
optimizer = torch.optim.AdamW(updated.parameters(), lr=1e-3, weight_decay=0.0)
logp = response_logprobs(updated, layout).logp
minirl_loss(logp, logp.detach(), rollout.logp_rollout, group_mean_advantages(rewards, 8), mask).loss.backward()
optimizer.step()
_, e_new = score_under(updated, layout)

rows = []
for name, a, b in (("two engines, the same weights", e_mu, e_old), ("one engine, after one step", e_new, e_old)):
    rows.append([name, *(f"{rate:.1%}" for rate in a.flip_rate(b, rollout.inputs))])
show_table(["sets that differ", "layer 0", "layer 1"], rows)

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
# Replay may make the target policy $\pi_\theta$ *another function* than live routing at the same θ. The paper's Table 1
# says when. Say it yourself first.

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
compared = {
    name: (score_under(network, layout)[0][mask], score_under(network, layout, routes)[0][mask])
    for name, (network, routes) in cells.items()
}
display(altered_figure(compared))
rows = []
for name, (live, replayed) in compared.items():
    change = (live - replayed).abs()
    rows.append([name, f"{(change > 0).float().mean():.1%}", f"{change.mean():.4f}", f"{change.max():.3f}"])
show_table(["cell", "tokens that changed", "mean change, nats", "largest change, nats"], rows)
assert [bool((live == replayed).all()) for live, replayed in compared.values()] == [True, False, False, False]

# %% [markdown]
# **What to see.** R2 in the first mini-batch lies on the floor: not one token differs in one bit. In the other three
# more tokens change than flip, because a flip at one token changes what all later ones read.

# %% [markdown]
# ## 4 · The bias: optimised and deployed
#
# Replay holds the target on one smooth piece (unit 06). The price: $\pi_\theta(\cdot,e)$ is optimised, and
# $\pi_\theta(\cdot,e^\pi(\theta))$ with live routing is deployed. The enumerable Mixture of Experts of unit 06 gives
# both expected rewards and both gradients exactly. Here along a line in the weights, with the experts of its starting
# point held:

# %%
response_count = len(toy_policy(draw_theta(0))[0].tokens)
toy_rewards = (torch.randn(response_count, generator=torch.Generator().manual_seed(5)) > 0).double()


def value_and_gradient(theta, forced=None):
    """E_{y~π_θ}[R] and its gradient as one vector, with the experts `forced` or live."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    value = (toy_policy(leaves, forced)[0].response_probs() * toy_rewards).sum()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), torch.cat([g.flatten() for g in gradients])


# %%
theta, direction = draw_theta(2820), draw_theta(2825)
start = stepped(theta, direction, -0.3)
_, held = toy_policy(start)
line = np.linspace(0, 1.0, pick(fast=81, full=401))
rows = []
for eta in line:
    moved = stepped(start, direction, float(eta))
    (live, live_gradient), (replayed, replayed_gradient) = value_and_gradient(moved), value_and_gradient(moved, held)
    bias = (replayed_gradient - live_gradient).norm() / live_gradient.norm()
    rows.append((live, replayed, bias.item(), (toy_policy(moved)[1] != held).any(-1).sum().item()))
live, replayed, bias, flipped = np.array(rows).T
display(objectives_figure(line, live, replayed, bias, flipped))
print(f"largest bias of the gradient while no expert has flipped: {bias[flipped == 0].max():.1e}")
print(f"after the first flip: smallest {bias[flipped > 0].min():.1e}, median {np.median(bias[flipped > 0]):.2f}")

# %% [markdown]
# **What to see.** Up to the first flip both are one curve and one gradient: replay costs nothing there. When the first
# token flips, the deployed objective jumps, the optimised one does not notice, and the bias does not start from zero.
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
    return optimised, deployed


def two_ascents(n=16, seed=590):
    return ascent_figure(n, {policy: ascend(policy, n) for policy in (280, seed)})


two_ascents()

# %%
seeds = range(0, 10 * pick(fast=12, full=60), 10)
rows = []
for n in (1, 16):
    optimised, deployed = np.array([[values[-1] for values in ascend(seed, n)] for seed in seeds]).T
    below = int((optimised - deployed > 0.05).sum())
    rows.append([f"N = {n}", f"{optimised.mean():.3f}", f"{deployed.mean():.3f}", f"{below} of {len(seeds)} policies"])
show_table(["after 64 steps", "mean optimised", "mean deployed", "deployed more than 0.05 below"], rows)

# %% [markdown]
# **What to see.** The curves separate where an expert would have changed, and meet again at the next grey line, when
# the notes are taken afresh. On the left that is a detour. On the right the optimised objective goes on rising while
# the deployed policy falls apart. The table: that is rare. In most policies the bias does nothing visible.

# %%
knobs(two_ascents, n=[1, 2, 4, 8, 16, 32], seed=[100, 280, 590, 600, 900])

# %% [markdown]
# ## 5 · What R3 removes, and what it cannot
#
# The log of the discrepancy is a sum of two parts, token by token. R3 leaves the first, the rounding of all products,
# and removes the second, the flips:
#
# $$\log\frac{\pi_{old}(y_t|\cdot,e^\pi_{old})}{\mu_{old}(y_t|\cdot,e^\mu_{old})}=
# \log\frac{\pi_{old}(y_t|\cdot,e^\mu_{old})}{\mu_{old}(y_t|\cdot,e^\mu_{old})}+
# \log\frac{\pi_{old}(y_t|\cdot,e^\pi_{old})}{\pi_{old}(y_t|\cdot,e^\mu_{old})}$$
#
# Attention is causal. A token with no flip at its own input or an earlier one must have a flip part of zero. With an
# 8-bit engine there are both kinds:

# %%
rollout, _ = rewarded_rollout(HFEngine(model, Precision.parse("fp8_e4m3"), record_routes=True), task, problems)
layout, mask, e_mu = lay_out(rollout, share_prompts=can_share_prompts(model)), rollout.response_mask, rollout.routes
live, e_old = score_under(model, layout)
with_r3, _ = score_under(model, layout, e_mu)
rounding, flip_part = (with_r3 - rollout.logp_rollout)[mask].abs(), (live - with_r3)[mask].abs()

sets = [routes.experts.sort(-1).values for routes in (e_mu, e_old)]
so_far = ((sets[0] != sets[1]).any(-1).any(-1) & rollout.inputs).int().cummax(1).values.bool()
touched = so_far[:, rollout.prompt_length - 1 : -1][mask]
rows = [
    [name, int(kind.sum()), f"{rounding[kind].mean():.1e}", f"{flip_part[kind].mean():.1e}"]
    for name, kind in (("no flip at this input or before", ~touched), ("a flip at this input or before", touched))
]
show_table(["tokens", "how many", "mean size of the rounding part, nats", "of the flip part"], rows)

# %% [markdown]
# {exercise} 07.4
#
# Which share of the KL (k3, [lesson 03](../lessons/03_sampler_and_policy.md)) does R3 remove? `logp_mu` is
# $\log\mu_{old}$, `live` and `replayed` are $\log\pi_{old}$ without and with the rollout's experts, all `[B, T]`;
# `mask` marks the response tokens. `kl_k3(logp_mu, logp_old, mask)` is at hand.


# %%
def share_removed(logp_mu, live, replayed, mask):
    # solution
    before, after = (kl_k3(logp_mu, logp_old, mask) for logp_old in (live, replayed))
    return 1 - after / before
    # end


check("07.4", share_removed)

# %% [markdown]
# Engines of several precisions, on the trained model and on random ones:

# %%
ENGINES = ["int8", "fp8_e4m3", "int6", "int5", "int4", "int3"]
seeds = pick(fast=3, full=5)
kinds = {
    "trained": ([model] * seeds, Workload(prompts_for("chain-steps", None, 16), seeds=seeds)),
    "random": ([random_model("moe", seed) for seed in range(seeds)], Workload(random_prompts, seeds=seeds)),
}
measured = {
    (kind, spec): summary(run_setting(Setting(precision=spec), models, workload))
    for kind, (models, workload) in kinds.items()
    for spec in ENGINES
}
display(removed_figure(ENGINES, measured))
rows = []
for spec in ENGINES:
    both = [measured[kind, spec] for kind in kinds]
    rows.append([spec, *(f"{1 - found['r3']['k3'][0] / found['plain']['k3'][0]:.0%}" for found in both)])
show_table(["engine", "R3 removes of the KL, trained", "R3 removes of the KL, random"], rows)

# %% [markdown]
# **What to see.** On random models R3 takes most of the KL at eight bits, and less and less below: rounding every
# product to four bits is a larger disturbance than the flips that come with it. On the trained model, fresh from its
# cold start, it takes next to nothing at any precision, and the intervals overlap.

# %% [markdown]
# ## 6 · Rows, padding, backward
#
# **Rows.** Row $t$ is the routing of token $t$ as an *input*. The logits behind it predict token $t+1$. A sequence of
# $S$ tokens has $S-1$ rows: the last token was sampled, and nobody fed it. Change one row and see who moves:

# %%
tokens = rollout.tokens[:1, :20]
with torch.no_grad(), replay.record() as tape:
    base = model(input_ids=tokens).logits
own = tape.routes
for row in (3, 17, 19):
    experts = own.experts.clone()
    experts[:, row] = (experts[:, row] + 1) % 8
    with torch.no_grad(), replay.replay(Routes(experts, own.valid, own.layers)):
        changed = (model(input_ids=tokens).logits - base)[0].abs().amax(-1) > 1e-5
    print(f"row {row:2d} changed: the predictions at positions", changed.nonzero()[:, 0].tolist())

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
# **Padding.** Rows that are not valid are routed live. Rows of zeros that are called valid name expert 0 twice; the
# library refuses them when they arrive. **Backward.** Gradient checkpointing runs the forward again inside
# `backward()`. If the context was left by then, the second forward would take other experts than the first.

# %%
try:
    Routes(torch.zeros_like(own.experts), own.valid, own.layers).validate(num_experts=8)
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
# expert 1. Noise on the engine's router lets other experts write a share of the tokens. The sum below runs over who
# writes and what is written, through the library's loss, with the exact token weight and without any.

# %%
expert_logits = torch.tensor([[0.5, 1.0, -0.5, 0.0], [1.5, 0.2, 0.0, -1.0], [0.0, -0.5, 1.0, 0.8]])
written_share, token_advantage = torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.75, -0.25, -0.25, -0.25])
rows = []
for method, with_r3 in (("no replay", False), ("R3", True)):
    for weighted in (False, True):
        z = expert_logits.clone().requires_grad_()
        log_table = z.log_softmax(-1)
        used = log_table if with_r3 else log_table[1].expand_as(log_table)
        drawn = (written_share[:, None] * log_table.exp() * token_advantage).detach()
        new, old, mu, terms = (x.reshape(-1, 1) for x in (used, used.detach(), log_table.detach(), drawn))
        options = {"num_responses": 1, "is_cap": 1e9, "is_correction": weighted}
        minirl_loss(new, old, mu, terms, torch.ones(12, 1), **options).loss.backward()
        rows.append([method, "yes" if weighted else "no", *(f"{size:.4f}" for size in z.grad.norm(dim=1))])
show_table(["", "weight", "expert 0 (writes 20 %)", "expert 1 (trainer's, 70 %)", "expert 2 (10 %)"], rows)

# %% [markdown]
# Without replay experts 0 and 2 get exactly nothing, with the weight and without it. They wrote 30 % of the tokens. A
# weight scales a gradient and cannot send it to another expert. With R3 each expert learns from what it wrote.

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
# Now train. Four experts. At the start each is good at the contexts that the trainer's router gives it and ignorant of
# the others. A response is six tokens, all of which must be right. Two scores are exact: through the trainer, and
# through the engine with its noisy router. Where the second ends without replay is computed *before* the run.

# %%
SEEDS, STEPS = pick(fast=(2, 200), full=(8, 400))
rows = []
for noise in pick(fast=(0.3,), full=(0.3, 0.1, 0.6, 1.0)):
    case = {"seeds": SEEDS, "noise": noise}
    learned = {m: who_gets_the_gradient(VARIANTS[m], **case, steps=STEPS) for m in ("MiniRL", "− IS", "R3")}
    ceiling = who_gets_the_gradient_ceiling(**case)
    if noise == 0.3:
        display(learning_figure(learned, ceiling))
    ends = [learned[name]["engine_score"][:, -1].mean() for name in ("MiniRL", "R3")]
    trainer = learned["MiniRL"]["score"][:, -1].mean()
    rows.append([noise, f"{ceiling:.3f}", *(f"{end:.3f}" for end in ends), f"{trainer:.3f}"])
show_table(["router noise", "computed: engine", "MiniRL: engine", "R3: engine", "MiniRL: trainer"], rows)

# %% [markdown]
# **What to see.** Left, all methods reach the top, and nothing distinguishes them. Right, the two without replay stop
# at the line that was computed beforehand, with the weight and without it. R3 goes on. The bands without replay are
# wide because seeds differ in their routers, not in what they learned.
#
# The experts here share nothing. Where experts are interchangeable, as in the trained model of section 5, replay has
# little to repair. What our runs say about this: [unit 12](12_evidence.ipynb).
#
# **Try this.** In section 2 use a smaller learning rate, `lr=1e-5`. Which cells of section 3 change, and which cannot?

# %% [markdown]
# ## Your file, step 07

# %% [markdown]
# {capstone} 07

# %%
check_file("07")
