# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Mixture of Experts: routing, and why it breaks the approximation
#
# The derivations are in the lesson, [06_mixture_of_experts](../lessons/06_mixture_of_experts.md). Here you build a
# layer by hand, disturb it, and watch a small doubt become a large change.
#
# **A picture to keep: the reception of a hospital.** Eight doctors work there, and the desk sends every patient to two
# of them. For some patients the third doctor was nearly as good a match. A tiny doubt at the desk, and the patient sees
# somebody else and comes home with another diagnosis.
#
# All names that no cell defines come from `minirl_edu/course/lab06.py`: parts of the library, and the lab's figures.

# %%
from minirl_edu.course.lab06 import *

# %% [markdown]
# ## 1 · A layer by hand
#
# The router is a matrix with one row per expert. The product of a row with the token's hidden state $x$ is that
# expert's **router logit** $s_e$. The two largest are chosen. Their **gates** $g_e$ are probabilities among the chosen
# ones, and the output is $y=\sum_{e\in\mathcal S}g_e\,E_e(x)$.

# %%
s = torch.tensor([0.2, 1.9, -0.4, 0.9, 0.86, -1.1, 0.3, -0.2])
outputs = torch.tensor([0.1, 0.5, -0.3, 2.0, -1.5, 0.4, 0.0, 1.0])  # what each expert would answer: one number
disturbed = s + torch.tensor([0, 0, 0, 0, 0.05, 0, 0, 0])  # the desk errs: 0.05 more for expert 4

rows = []
for name, logits in (("as it was", s), ("disturbed", disturbed)):
    picked, chosen = logits.softmax(0).topk(2)
    gates = picked / picked.sum()
    rows.append([name, chosen.tolist(), [f"{g:.3f}" for g in gates], f"{gates @ outputs[chosen]:+.3f}"])
show_table(["", "experts", "gates", "output"], rows)

# %% [markdown]
# One logit moved by 0.05, and the output by much more: another expert speaks.
#
# The same in a trained model. `chain-steps` has two such layers. One of them by hand, on random hidden states:

# %%
model, task = load_model("chain-steps").eval(), load_task()
block = model.model.layers[0].mlp
x = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

with torch.no_grad():
    picked, chosen = (x @ block.gate.weight.T).softmax(-1).topk(model.config.num_experts_per_tok)
    gates = picked / picked.sum(-1, keepdim=True)
    by_hand = torch.zeros_like(x)
    for n in range(len(x)):
        for g, e in zip(gates[n], chosen[n], strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ x[n]).chunk(2)
            by_hand[n] += g * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(block(x[None])[0], by_hand, rtol=1e-4, atol=1e-5)
print("six tokens, by hand and by transformers: equal. Their experts:", chosen.tolist())

# %% [markdown]
# {exercise} 06.1
#
# Write the layer. `x` is `[n, d]`, `router` `[E, d]`, `experts` `[E, d, d]`; expert $e$ answers
# $\mathrm{relu}(W_e\,x)$. Choose the `k` best, renormalise their gates, return `[n, d]`. All at once or in loops.


# %%
def moe_layer(x, router, experts, k):
    # solution
    picked, chosen = (x @ router.T).softmax(-1).topk(k, dim=-1)
    gates = picked / picked.sum(-1, keepdim=True)
    answers = torch.einsum("eoi,ni->neo", experts, x).relu()
    mine = answers.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
    return (gates[..., None] * mine).sum(1)
    # end


check("06.1", moe_layer)

# %% [markdown]
# ## 2 · The gate rules of the families
#
# Families agree about the top-k and differ in what the chosen experts weigh. Qwen3-MoE and Mixtral take a softmax over
# all experts, gather the chosen ones, and divide by their sum. OLMoE and Qwen2-MoE leave out the division. gpt-oss
# gathers the *logits* first. DeepSeek-V3 and GLM-4-MoE use a sigmoid and a bias that counts for the selection only.

# %%
bias = torch.tensor([0, -0.3, 0, 0.0, 0.1, 0, 0, 0])  # balances the load of the experts; never part of a gate
top, sigmoid = s.topk(2).indices, s.sigmoid()
with_bias = (sigmoid + bias).topk(2).indices
rules = {
    "softmax, gather, renormalise": (top, s.softmax(0)[top] / s.softmax(0)[top].sum()),
    "softmax, gather": (top, s.softmax(0)[top]),
    "gather, softmax": (top, s[top].softmax(0)),
    "sigmoid + bias, gather, renormalise": (with_bias, sigmoid[with_bias] / sigmoid[with_bias].sum()),
}
torch.testing.assert_close(rules["softmax, gather, renormalise"][1], rules["gather, softmax"][1])
gates_figure(s, rules)

# %% [markdown]
# **What to see.** Left: the orange strip between the second and the third bar is the **margin**. Right: the first and
# the third rule are the same function (the lesson proves it). In the fourth the bias changed the choice itself, but it
# is not part of the gates.
#
# Code that computes gates for *given* experts must use the model's own rule. A frequent bug: scores are set to zero
# outside the live top-k before the given experts are gathered. Then exactly the experts that differ get gate 0 and no
# gradient.

# %% [markdown]
# {exercise} 06.2
#
# `scores` are live router logits `[n, E]`, `experts` are given numbers `[n, k]`, not always the best. Return their
# gates `[n, k]` in the order of `experts`: softmax, gather, renormalise. Gradient must reach the logits.


# %%
def gates_of(scores, experts):
    # solution
    picked = scores.softmax(-1).gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)
    # end


check("06.2", gates_of)

# %% [markdown]
# ## 3 · How often does noise flip a choice?
#
# Two engines compute the same logits with a little noise. A **flip** is a token whose *set* of experts differs. The
# margin decides: the gap between the last expert that is in and the first that is out.

# %% [markdown]
# {exercise} 06.3
#
# Return the margin of each row of `scores` `[n, E]`: the $k$-th largest logit minus the $(k+1)$-th.


# %%
def margin_of(scores, k):
    # solution
    best = scores.topk(k + 1, dim=-1).values
    return best[..., k - 1] - best[..., k]
    # end


check("06.3", margin_of)

# %% [markdown]
# {exercise} 06.4
#
# Both logits of a pair get independent normal noise with standard deviation `sigma`. How probable is it that they
# change places, for each `margin` (a tensor)?


# %%
def pair_flip_probability(margin, sigma):
    # solution
    return 0.5 * torch.erfc(margin / (2 * sigma))
    # end


check("06.4", pair_flip_probability)

# %% [markdown]
# With more than two experts a flip needs *some* chosen expert to fall below *some* other. That is at least as probable
# as for the closest pair, and at most the sum over all pairs. The figure has both bounds, and real draws of the noise.

# %%
flip_figure(k=2, sigma=0.16)

# %% [markdown]
# **What to see.** The dots lie between the two lines. For a margin of a few σ nothing happens. Near margin zero half of
# the draws flip. With a live kernel you can turn both knobs: more noise or more chosen experts move the bounds apart.

# %%
knobs(flip_figure, k=[1, 2, 3, 4, 5, 6], sigma=[0.02, 0.08, 0.16, 0.3, 0.6])

# %% [markdown]
# **Over many tokens.** If margins have the density $p(m)$, the mean flip probability for small noise is about
# $p(0)\,\sigma/\sqrt\pi$: *linear* in σ. Half the noise means half the flips. No noise is so small that there are none.

# %%
margins = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # p = 1 on [0, 1]
rows = []
for sigma in (0.04, 0.02, 0.01, 0.005):
    measured = normal_cdf(-margins / (sigma * math.sqrt(2))).mean()
    rows.append([sigma, f"{measured:.6f}", f"{sigma / math.sqrt(math.pi):.6f}"])
show_table(["noise σ", "mean flip probability", "p(0) σ/√π"], rows)

# %% [markdown]
# ## 4 · A jump in the policy
#
# Now a policy with a router, small enough to enumerate all its responses in float64: three words, four experts, top-2.
# `toy_policy(theta)` returns the policy and the experts of each prefix. Walk through the parameters along a straight
# line, $\theta+\eta\,d$, and watch the probability of one token.

# %%
start, direction = draw_theta(2820), draw_theta(2825)
line = np.linspace(-0.8, 0.8, pick(fast=401, full=1601))
probability, picks = [], []
for eta in line:
    pi, experts = toy_policy(stepped(start, direction, float(eta)))
    probability.append(pi.logits[0].softmax(0)[0].item())
    picks.append(tuple(experts[0].tolist()))
pieces_figure(line, probability, picks)

# %% [markdown]
# **What to see.** Within a piece the curve is smooth: there the gradient tells the truth. Between two pieces the policy
# jumps, and the derivative on either side knows nothing of the step.
#
# **What that does to the approximation.** Write the ratios as $1+\delta_t$. The token-level objective drops
# $\mathbb E[(\prod(1+\delta_t)-1-\sum\delta_t)R]$, which is of second order in δ. While δ shrinks like η, it falls with
# slope 2 on logarithmic axes. Left: one policy whose first token has a small margin. Right: the mean over policies that
# differ only in that margin, evenly spread from zero up.

# %%
direction, speed = direction_that_closes(draw_theta(1970), 1975)  # the margin closes at this rate
reward_noise = torch.randn(len(pi.tokens), generator=torch.Generator().manual_seed(5))
rewards = (reward_noise > 0).double()


def remainders(theta, steps):
    """|remainder| at each step with live routing, with the experts of θ_old held, and whether the first token flips."""
    mu, held = toy_policy(theta)
    rows = []
    for eta in steps:
        moved = stepped(theta, direction, float(eta))
        pi, experts = toy_policy(moved)
        pair = pi, toy_policy(moved, held)[0]
        sizes = [abs(objective_remainder(p, mu, rewards).item()) for p in pair]
        rows.append([*sizes, not torch.equal(experts[0], held[0])])
    return np.array(rows).T


# %%
theta = with_margin(draw_theta(1970), 0.003 * speed)  # it flips at a step of about 0.003
wide = 10.0 ** np.linspace(-4.5, -1.5, pick(fast=13, full=31))
one = remainders(theta, wide)
count = pick(fast=200, full=800)
spread = [with_margin(theta, 0.002 * speed * (i + 0.5) / count) for i in range(count)]
close = np.geomspace(2e-5, 1e-3, pick(fast=5, full=9))
mean = np.mean([remainders(other, close) for other in spread], axis=0)
display(remainder_figure(wide, one, close, mean, f"Mean over {count} margins"))

before, after = one[2] == 0, one[2] == 1
rows = [
    ["one policy, before the flip", *(power(wide[before], row[before]) for row in one[:2])],
    ["one policy, after the flip", *(power(wide[after], row[after]) for row in one[:2])],
    ["mean over margins", *(power(close, row) for row in mean[:2])],
    ["share of the policies that flipped", power(close, mean[2]), "none flips"],
]
show_table(["", "slope, live routing", "slope, experts held"], rows)

# %% [markdown]
# **What to see.** With the experts held (blue) the slope is 2 everywhere, as unit 02 promised. With live routing
# (orange) it is the same line until the flip. Then the remainder leaps up and stays, because δ no longer shrinks with
# η. In the mean, the share of flipped tokens falls with slope 1 and each flip costs a constant. So the mean falls with
# slope 1 too: half the step no longer means a quarter of the error.
#
# δ tends to the ratio of two policies at the *same* weights: the other experts against the old ones.

# %%
for margin in (1e-3, 1e-5, 1e-7):
    close_call, step = with_margin(theta, margin), 2 * margin / speed
    mu, _ = toy_policy(close_call)
    pi, experts = toy_policy(stepped(close_call, direction, step))
    delta = (token_ratios(pi, mu) - 1).abs().max()
    limit = (token_ratios(toy_policy(close_call, experts)[0], mu) - 1).abs().max()
    print(f"margin {margin:.0e}, step {step:.0e}: largest |δ| {delta:.4f}; of those experts, forced {limit:.4f}")

# %% [markdown]
# ## 5 · Routed experts in both factors
#
# Equation (5) is the subject of [lesson 03](../lessons/03_sampler_and_policy.md). With experts written out it becomes
#
# $$\frac{\pi_\theta(y_t|\cdot,e^\pi_t)}{\mu_{old}(y_t|\cdot,e^\mu_{old,t})} =
# \frac{\pi_{old}(y_t|\cdot,e^\pi_{old,t})}{\mu_{old}(y_t|\cdot,e^\mu_{old,t})}\times
# \frac{\pi_\theta(y_t|\cdot,e^\pi_t)}{\pi_{old}(y_t|\cdot,e^\pi_{old,t})}. \tag{6}$$
#
# On `chain-steps`: an int4 engine samples and one gradient step is made. `score_under` returns $\log\pi$ and the
# experts, live or with given ones.

# %%
engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
rollout, scored = rewarded_rollout(engine, task, task.sample(pick(fast=16, full=32), seed=0))
layout, mask = lay_out(rollout, share_prompts=can_share_prompts(model)), rollout.response_mask
logp_old, e_old = score_under(model, layout)

updated = copy.deepcopy(model)
optimizer = torch.optim.AdamW(updated.parameters(), lr=1e-3, weight_decay=0.0)
logp = response_logprobs(updated, layout).logp
minirl_loss(logp, logp_old, rollout.logp_rollout, group_mean_advantages(scored, 8), mask).loss.backward()
optimizer.step()
logp_new, e_new = score_under(updated, layout)


# %%
def mean_size(log_ratio):
    return f"{log_ratio[mask].abs().mean():.4f}"


other_factor = score_under(model, layout, rollout.routes)[0] - rollout.logp_rollout  # the engine's experts in both
same_experts = score_under(updated, layout, e_old)[0] - logp_old
discrepancy, staleness = logp_old - rollout.logp_rollout, logp_new - logp_old
flips_of_engines, flips_of_steps = (e_old.flip_rate(other, rollout.inputs).mean() for other in (rollout.routes, e_new))
show_table(
    ["factor", "flips per token and layer", "mean size of its log, nats", "the same experts in both, nats"],
    [
        ["discrepancy π_old/μ_old", f"{flips_of_engines:.1%}", mean_size(discrepancy), mean_size(other_factor)],
        ["staleness π_θ/π_old", f"{flips_of_steps:.1%}", mean_size(staleness), mean_size(same_experts)],
    ],
)

# %% [markdown]
# **What to see.** Both factors have flips: the first from rounding, the second from one step with a large learning
# rate. The last column forces the same experts on both sides of a factor (routing replay, unit 07). It hardly differs
# from the one before. On this small trained model flips are frequent and cheap: the rounded products and the new
# weights move the policy more.

# %% [markdown]
# ## 6 · Counting flips
#
# Engines return the chosen experts of each token and layer, `[B, S, L, k]`. Two rules for comparing them. The order of
# the k experts means nothing. And some rows are no routing at all: padding, and the last token of a response, which was
# sampled but never fed to the model. In `Routes` these have `valid = False`.

# %% [markdown]
# {exercise} 06.5
#
# Return the flip rate of each layer, `[L]`: the share of the tokens in `mask` `[B, S]` whose *set* of experts differs
# between `a` and `b`, both `[B, S, L, k]`.


# %%
def flip_rate_of(a, b, mask):
    # solution
    differs = (a.sort(-1).values != b.sort(-1).values).any(-1)
    return differs[mask].float().mean(0)
    # end


check("06.5", flip_rate_of)

# %% [markdown]
# {exercise} 06.6
#
# A model has a flip rate in each layer, `rates` `[L]`. If the layers flipped independently, what share of the tokens
# would have a flip in at least one layer?


# %%
def any_layer(rates):
    # solution
    return 1 - (1 - rates).prod()
    # end


check("06.6", any_layer)

# %% [markdown]
# ## 7 · Measured on a small model
#
# **Precision.** The same weights through engines of fewer and fewer bits. The training engine computes in fp32.

# %%
ENGINES = ["fp32", "bf16", "int8", "fp8_e4m3", "int6", "int5", "int4", "int3"]
asked = task.sample(pick(fast=24, full=64), seed=1)
by_layer = []
for spec in ENGINES:
    drawn, _ = rewarded_rollout(HFEngine(model, Precision.parse(spec), record_routes=True), task, asked)
    _, live = score_under(model, lay_out(drawn, share_prompts=True))
    by_layer.append(live.flip_rate(drawn.routes, drawn.inputs))
assert not by_layer[0].any(), "in fp32 the two engines are one function"
precision_figure(ENGINES[1:], torch.stack(by_layer[1:]))

# %% [markdown]
# **What to see.** The flip rate follows the size of the rounding error over several decades. There is no threshold
# below which it vanishes, short of computing the very same numbers.
#
# **Margins.** Is it the formula of section 3? Both engines read the same tokens. We keep every router logit, and look
# at each token's margin (in the training engine), at the noise of the closest pair, and at whether the token flipped.

# %%
exact, rounded = (router_logits(model, rollout, Precision.parse(spec)) for spec in ("fp32", "int4"))  # [n, L, E]
ranked = exact.sort(-1, descending=True)
margins = ranked.values[..., 1] - ranked.values[..., 2]
error = (rounded - exact).gather(-1, ranked.indices)  # of the expert in each place of the ranking
noise = (error[..., 2] - error[..., 1]).std(0)
flips = (exact.topk(2).indices.sort(-1).values != rounded.topk(2).indices.sort(-1).values).any(-1)
display(margins_figure(margins, flips, noise))
rows = []
for layer in range(2):
    predicted = normal_cdf(-margins[:, layer] / noise[layer]).mean()
    rows.append([layer, f"{noise[layer]:.3f}", f"{flips[:, layer].float().mean():.3f}", f"{predicted:.3f}"])
show_table(["layer", "noise s of the pair's difference", "flip rate measured", "mean of Φ(−m/s)"], rows)

# %% [markdown]
# **What to see.** Grey: the margins have no gap at zero, so some tokens are always close to a flip. Orange: near zero
# the share is large, at wide margins nobody flips. Blue: the formula for a pair, with *one* noise level for all tokens.
# It fits the first layer. In the second it is too low: several experts may come in, and rounding to nearest makes the
# same error for all tokens that look alike.
#
# **MoE against dense.** Now the whole gap between the engines, both in bf16 with the same weights but other kernels:
# random models and their dense twins, and the two trained ones.

# %%
seeds = pick(fast=3, full=5)
bf16 = Setting(dtype="bfloat16")
trained = Workload(prompts_for("chain-steps", None, 16), seeds=seeds)
gaps = {}
for architecture, name in (("moe", "chain-steps"), ("dense", "chain-steps-dense")):
    models = [random_model(architecture, seed) for seed in range(seeds)]
    gaps["random", architecture] = summary(run_setting(bf16, models, Workload(random_prompts, seeds=seeds)))
    gaps["trained", architecture] = summary(run_setting(bf16, [load_model(name)] * seeds, trained))
display(gap_figure(gaps))
rows = []
for kind in ("random", "trained"):
    of_dense, of_moe = gaps[kind, "dense"]["plain"]["k3"][0], gaps[kind, "moe"]["plain"]["k3"][0]
    flip_rate = gaps[kind, "moe"]["flip_rate"][0]
    rows.append([kind, f"{of_dense:.1e}", f"{of_moe:.1e}", f"{of_moe / of_dense:.1f}", f"{flip_rate:.2%}"])
show_table(["models", "KL, dense", "KL, MoE", "MoE / dense", "flips per token and layer"], rows)

# %% [markdown]
# **What to see.** On random models routing multiplies the gap by tens, and forcing the same experts (R3) takes all of
# that back. On the small *trained* models there is nothing of it, although the MoE flips too: another expert has
# learned the answer as well. The mechanism is real. Its price depends on the model.
#
# What our runs say about this: [unit 12](12_evidence.ipynb).
#
# **Try this.** In section 4 make the margin ten times as wide, `with_margin(draw_theta(1970), 0.03 * speed)`. Where
# does the flip move, and what happens to the height of the leap?

# %% [markdown]
# ## Your file, step 06

# %% [markdown]
# {capstone} 06

# %%
check_file("06")
