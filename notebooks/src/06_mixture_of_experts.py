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
# of them. For most patients the choice is clear. For some the third doctor was nearly as good a match: a tiny doubt at
# the desk, and the patient sees somebody else and comes home with another diagnosis. The doubt was small. What it
# changed was not.
#
# What you will do: write the layer; compare the rules of several model families; predict how often noise changes a
# choice; see the first-order approximation fail at one; count the changes; and measure all of it on a small model.

# %%
import copy
import math
from itertools import pairwise, product

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.exact import TabularPolicy, objective_remainder, token_ratios
from minirl_edu.gap import Setting, Workload, prompts_for, random_model, random_prompts, run_setting, summary
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import to_png
from minirl_edu.precision import Precision, round_activations, round_weights_
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.tasks import ChainTask

logging.disable_progress_bar()
torch.set_num_threads(1)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def show_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def axes(figure, columns, **kwargs):
    panels = np.atleast_1d(figure.subplots(1, columns, **kwargs))
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return panels


# %% [markdown]
# ## 1 · A layer by hand
#
# One patient, eight doctors. The router is a matrix: one row per expert, and the product of a row with the token's
# hidden state $x$ is that expert's **router logit** $s_e$. The two largest are chosen. Their **gates** $g_e$ are
# probabilities among the chosen ones, and the output is the weighted sum
#
# $$y=\sum_{e\in\mathcal S}g_e\,E_e(x),\qquad \mathcal S=\text{the } k \text{ experts with the largest } s_e.$$

# %%
s = torch.tensor([0.2, 1.9, -0.4, 0.9, 0.86, -1.1, 0.3, -0.2])
probabilities = s.softmax(0)
picked, chosen = probabilities.topk(2)
gates = picked / picked.sum()
show_table(
    ["expert", "router logit", "probability", "chosen", "gate"],
    [
        [e, f"{s[e]:+.2f}", f"{probabilities[e]:.3f}", "yes" if e in chosen else "",
         f"{gates[chosen == e].item():.3f}" if e in chosen else ""]
        for e in range(8)
    ],
)  # fmt: skip

# %% [markdown]
# Expert 4 stays out by a hair. Now the desk makes a small error: 0.05 more for expert 4.

# %%
disturbed = s + torch.tensor([0, 0, 0, 0, 0.05, 0, 0, 0])
outputs = torch.tensor([0.1, 0.5, -0.3, 2.0, -1.5, 0.4, 0.0, 1.0])  # what each expert would answer: one number


def answer_of(logits):
    gates, chosen = logits.softmax(0).topk(2)
    return (gates / gates.sum() @ outputs[chosen]).item(), sorted(chosen.tolist())


for name, logits in (("as it was", s), ("disturbed", disturbed)):
    y, experts = answer_of(logits)
    print(f"{name}   experts {experts}   output {y:+.3f}")

# %% [markdown]
# One logit moved by 0.05, and the output by much more than that: another expert speaks.
#
# The same in a trained model. `chain-steps` has two such layers. One of them by hand, on real hidden states:

# %%
model = load_model("chain-steps").eval()
task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
block = model.model.layers[0].mlp
x = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

with torch.no_grad():
    scores = x @ block.gate.weight.T
    picked, chosen = scores.softmax(-1).topk(model.config.num_experts_per_tok)
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
# Families agree about the top-k and differ in what the chosen experts weigh:
#
# | families | scores | then |
# |---|---|---|
# | Qwen3-MoE, Mixtral | softmax over all experts | gather the chosen ones, divide by their sum |
# | OLMoE, Qwen2-MoE | softmax over all experts | gather, leave as they are |
# | gpt-oss | | gather the *logits*, softmax over the chosen ones |
# | DeepSeek-V3, GLM-4-MoE | sigmoid; a bias that counts for the selection only | gather without it, divide, scale |

# %%
bias = torch.tensor([0, -0.3, 0, 0.0, 0.1, 0, 0, 0])  # balances the load of the experts; never part of a gate
top = s.topk(2).indices
sigmoid = s.sigmoid()
with_bias = (sigmoid + bias).topk(2).indices
rules = {
    "softmax, gather, renormalise": (top, s.softmax(0)[top] / s.softmax(0)[top].sum()),
    "softmax, gather": (top, s.softmax(0)[top]),
    "gather, softmax": (top, s[top].softmax(0)),
    "sigmoid + bias, gather, renormalise": (with_bias, sigmoid[with_bias] / sigmoid[with_bias].sum()),
}
torch.testing.assert_close(rules["softmax, gather, renormalise"][1], rules["gather, softmax"][1])

figure = Figure(figsize=(10.5, 3.6), layout="constrained")
left, right = axes(figure, 2)
colours = [BLUE if e in top else "#c9c9c9" for e in range(8)]
left.bar(range(8), s, color=colours)
third, second = s.sort(descending=True).values[[2, 1]]
left.axhspan(third, second, color=ORANGE, alpha=0.35)
left.annotate("the margin", (5.2, second.item()), (5.2, 1.5), arrowprops=dict(arrowstyle="->"), ha="center")
left.set(xlabel="expert", ylabel="router logit", xticks=range(8), title="One token: chosen experts in blue")
for row, (experts, weights) in enumerate(rules.values()):
    start = 0.0
    for e, g in sorted(zip(experts.tolist(), weights.tolist(), strict=True)):
        colour = {1: BLUE, 3: GREEN, 4: ORANGE}[e]
        right.barh(row, g, left=start, color=colour, edgecolor="white")
        right.text(start + g / 2, row, str(e), ha="center", va="center", color="white")
        start += g
right.set(yticks=range(4), yticklabels=list(rules), xlabel="gates", xlim=(0, 1.02))
right.set_title("Four rules, with the experts' numbers")
right.invert_yaxis()
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Left: two bars are chosen, and the orange strip between the second and the third is the **margin**.
# Right: the first and the third rule are the same function (the lesson proves it). The second leaves the gates smaller
# than one in sum. In the fourth the bias changed the choice itself, but it is not part of the gates.
#
# Whoever computes gates for experts that were *given* must therefore use the model's own rule. Two things go wrong in
# practice: one rule is hard-coded for all families; and scores are set to zero outside the live top-k before the given
# experts are gathered, so that just the experts that differ get gate 0 and no gradient.

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
# Two engines compute the same logits with a little noise. A **flip** is a token whose *set* of experts differs. What
# decides is the margin, between the last expert that is in and the first that is out.

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
# as for the closest pair, and at most the sum over all pairs. Both bounds, and what really happens in draws:


# %%
def normal_cdf(x):
    return 0.5 * torch.erfc(-torch.as_tensor(x, dtype=torch.float64) / math.sqrt(2))


def flip_bounds(k, sigma, experts=8, draws=4000):
    """Flip probability against the margin: bounds, and a Monte Carlo estimate, for one token's logits."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(experts, generator=generator, dtype=torch.float64).sort(descending=True).values
    noise = sigma * torch.randn(draws, experts, generator=generator, dtype=torch.float64)
    margins = torch.linspace(0, 1.2, 25, dtype=torch.float64)
    low, high, drawn = [], [], []
    for m in margins:
        logits = base.clone()
        logits[:k] += m - (base[k - 1] - base[k])  # the chosen ones together, until the margin is m
        pairs = normal_cdf(-(logits[:k, None] - logits[None, k:]) / (sigma * math.sqrt(2)))
        low.append(pairs[k - 1, 0])
        high.append(pairs.sum().clamp(max=1.0))
        drawn.append(((logits + noise)[:, :k].amin(1) < (logits + noise)[:, k:].amax(1)).double().mean())
    figure = Figure(figsize=(8.5, 3.9), layout="constrained")
    (ax,) = axes(figure, 1)
    ax.fill_between(margins, low, high, color=BLUE, alpha=0.18, label="between the bounds")
    ax.plot(margins, low, color=BLUE, label="closest pair: Φ(−m / σ√2)")
    ax.plot(margins, high, color=BLUE, linestyle="--", label="sum over all pairs")
    ax.plot(margins, drawn, "o", color=ORANGE, markersize=5, label=f"{draws} draws of the noise")
    ax.set(xlabel="margin m", ylabel="probability of a flip", ylim=(-0.02, 1.02))
    ax.set_title(f"{experts} experts, top-{k}, noise σ = {sigma:.2f}")
    ax.legend(frameon=False)
    return figure


Image(to_png(flip_bounds(2, 0.15)), width=850)

# %% [markdown]
# **What to see.** The dots lie between the two lines. For a margin of a few σ nothing happens; near margin zero half of
# the draws flip. Where one pair is much the closest, the two lines meet and the formula for a pair is the answer.
#
# **Turn it yourself.** With a live kernel: more noise, or more chosen experts, and the bounds move apart.

# %%
try:
    from ipywidgets import FloatSlider, IntSlider, interact
except ImportError:
    print("no ipywidgets here; try flip_bounds(4, 0.4)")
else:

    @interact(
        k=IntSlider(value=2, min=1, max=6, continuous_update=False),
        sigma=FloatSlider(value=0.15, min=0.02, max=0.6, step=0.02, continuous_update=False),
    )
    def turn(k, sigma):
        display(Image(to_png(flip_bounds(k, sigma)), width=850))


# %% [markdown]
# **Over many tokens.** If margins have the density $p(m)$, the mean flip probability for small noise is about
# $p(0)\,\sigma/\sqrt\pi$: *linear* in σ. Halve the noise, and you halve the flips; you never get rid of them.

# %%
margins = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # p = 1 on [0, 1]
show_table(
    ["noise σ", "mean flip probability", "p(0) σ/√π"],
    [[sigma, f"{normal_cdf(-margins / (sigma * math.sqrt(2))).mean():.6f}", f"{sigma / math.sqrt(math.pi):.6f}"]
     for sigma in (0.04, 0.02, 0.01, 0.005)],
)  # fmt: skip

# %% [markdown]
# ## 4 · A jump in the policy
#
# Now a policy with a router, small enough to enumerate all its responses in float64: three tokens, four experts, top-2.
# It reads a prefix token by token, and each state passes on to the next, as a transformer's does through attention. So
# a flip at one token moves the tokens after it as well.

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


def with_margin(theta, margin):
    """The runner-up of the first token moved to `margin` below the last expert that is in."""
    hidden = torch.tanh(theta["embed"][-1])
    ranked = (theta["router"] @ hidden).sort(descending=True)
    router = theta["router"].clone()
    move = ranked.values[K - 1] - margin - ranked.values[K]
    router[ranked.indices[K]] += move * hidden / hidden.square().sum()
    return {**theta, "router": router}


def stepped(theta, direction, eta):
    return {name: theta[name] + eta * direction[name] for name in theta}


def first_margin(theta):
    scores = theta["router"] @ torch.tanh(theta["embed"][-1])
    return -scores.topk(K + 1).values[-2:].diff().item()


# %% [markdown]
# Walk through the parameters along a straight line, $\theta+\eta\,d$, and watch the probability of one token.

# %%
start, heading_for = draw_theta(2820), draw_theta(2825)
line = np.linspace(-0.8, 0.8, pick(fast=401, full=1601))
probability, picks = [], []
for eta in line:
    pi, experts = toy_policy(stepped(start, heading_for, float(eta)))
    probability.append(pi.logits[0].softmax(0)[0].item())
    picks.append(tuple(experts[0].tolist()))
pieces = [0, *(i for i in range(1, len(line)) if picks[i] != picks[i - 1]), len(line)]

figure = Figure(figsize=(8.5, 3.7), layout="constrained")
(ax,) = axes(figure, 1)
palette = dict(zip(dict.fromkeys(picks), [BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00"], strict=False))
for a, b in pairwise(pieces):
    ax.plot(line[a:b], probability[a:b], color=palette.get(picks[a], GREY), linewidth=2.4)
    ax.text(line[(a + b) // 2], max(probability[a:b]) + 0.03, f"experts {picks[a]}", ha="center", fontsize=10)
ax.set(xlabel="η", ylabel="π(first token = 0)", ylim=(0, max(probability) + 0.12))
ax.set_title("Smooth between the choices, a jump at each of them")
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** Within a piece the curve is smooth: there the gradient tells the truth. Between two pieces the policy
# jumps, and no gradient announces it: the derivative on either side knows nothing of the step.
#
# **What that does to the approximation.** Write the ratios as $1+\delta_t$. What the token-level objective drops,
# $\mathbb E[(\prod(1+\delta_t)-1-\sum\delta_t)R]$, is of second order in δ. While δ shrinks like η, it falls with
# slope 2 on logarithmic axes. Left: one policy whose first token has a small margin. Right: the mean over policies that
# differ only in that margin, evenly spread from zero up.

# %%
direction = draw_theta(1975)
speed = (first_margin(draw_theta(1970)) - first_margin(stepped(draw_theta(1970), direction, 1e-6))) / 1e-6
if speed < 0:  # go the way in which the margin closes
    direction, speed = {name: -value for name, value in direction.items()}, -speed
theta = with_margin(draw_theta(1970), 0.003 * speed)  # it closes at a step of about 0.003
mu, held = toy_policy(theta)
rewards = (torch.randn(len(mu.tokens), generator=torch.Generator().manual_seed(5)) > 0).double()


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


wide = 10.0 ** np.linspace(-4.5, -1.5, pick(fast=13, full=31))
one = remainders(theta, wide)
count = pick(fast=200, full=800)
spread = [with_margin(theta, 0.002 * speed * (i + 0.5) / count) for i in range(count)]
close = np.geomspace(2e-5, 1e-3, pick(fast=5, full=9))
mean = np.mean([remainders(other, close) for other in spread], axis=0)

figure = Figure(figsize=(10.5, 4.2), layout="constrained")
panels = axes(figure, 2)
titles = "One policy, one crossing", f"Mean over {count} margins"
for ax, x_values, values, title in zip(panels, (wide, close), (one, mean), titles, strict=True):
    ax.loglog(x_values, values[0], "o-", color=ORANGE, label="live routing")
    ax.loglog(x_values, values[1], "s--", color=BLUE, label="experts of θ_old held")
    ax.set(xlabel="η", ylabel="|what the objective drops|", title=title)
    ax.legend(frameon=False, loc="lower right")
flip_at = math.sqrt(wide[one[2] == 0][-1] * wide[one[2] == 1][0])
panels[0].axvline(flip_at, color=GREY, linewidth=1)
panels[0].text(0.9 * flip_at, 2e-3, "the flip", ha="right", color="#555555")
Image(to_png(figure), width=850)


# %%
def power(x, y):
    return f"{np.polyfit(np.log(x), np.log(y), 1)[0]:.2f}"


before, after = one[2] == 0, one[2] == 1
show_table(
    ["", "slope, live routing", "slope, experts held"],
    [
        ["one policy, before the flip", *(power(wide[before], row[before]) for row in one[:2])],
        ["one policy, after the flip", *(power(wide[after], row[after]) for row in one[:2])],
        ["mean over margins", *(power(close, row) for row in mean[:2])],
        ["share of the policies that flipped", power(close, mean[2]), "none flips"],
    ],
)

# %% [markdown]
# **What to see.** With the experts held (blue) the slope is 2 everywhere, as unit 02 promised. With live routing
# (orange) it is the same line until the flip; then the remainder leaps up and stays: δ no longer shrinks with η. In the
# mean over margins the share of flipped tokens falls with slope 1, each flip costs a constant, so the mean falls with
# slope 1 too. Half the step no longer means a quarter of the error.
#
# What δ tends to is the ratio of two policies at the *same* weights: the other experts against the old ones.

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
# With experts written out, equation (5) becomes
#
# $$\frac{\pi_\theta(y_t|\cdot,e^\pi_t)}{\mu_{old}(y_t|\cdot,e^\mu_{old,t})} =
# \frac{\pi_{old}(y_t|\cdot,e^\pi_{old,t})}{\mu_{old}(y_t|\cdot,e^\mu_{old,t})}\times
# \frac{\pi_\theta(y_t|\cdot,e^\pi_t)}{\pi_{old}(y_t|\cdot,e^\pi_{old,t})}. \tag{6}$$
#
# The engines choose different experts (first factor), and the choice moves with the weights (second factor). On
# `chain-steps`: an int4 engine samples, one gradient step is made, and everything is computed under each choice.

# %%
problems = task.sample(pick(fast=16, full=32), seed=0)
sampling = Sampling(max_new_tokens=task.max_new_tokens)
engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
rollout = engine.generate([task.encode(p) for p in problems], group_size=8, sampling=sampling, seed=0)
texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
asked = [p for p in problems for _ in range(8)]
scored = torch.tensor([task.reward(p, text) for p, text in zip(asked, texts, strict=True)])
advantages = group_mean_advantages(scored, 8)
layout = lay_out(rollout, share_prompts=can_share_prompts(model))


def score_under(network, routes=None):
    """log π of the response tokens and the experts used, live or with `routes` replayed."""
    replay = RoutingReplay(network)
    with torch.no_grad():
        if routes is not None:
            with replay.replay(layout.pack(routes)):
                return response_logprobs(network, layout).logp, routes
        with replay.record() as tape:
            logp = response_logprobs(network, layout).logp
    return logp, layout.unpack(tape.routes)


logp_old, e_old = score_under(model)
updated = copy.deepcopy(model)
optimizer = torch.optim.AdamW(updated.parameters(), lr=1e-3, weight_decay=0.0)
logp = response_logprobs(updated, layout).logp
minirl_loss(logp, logp_old, rollout.logp_rollout, advantages, rollout.response_mask).loss.backward()
optimizer.step()
logp_new, e_new = score_under(updated)
same_experts, _ = score_under(updated, e_old)
rollout_experts, _ = score_under(model, rollout.routes)

mask = rollout.response_mask
torch.testing.assert_close(
    (logp_new - rollout.logp_rollout)[mask],
    ((logp_old - rollout.logp_rollout) + (logp_new - logp_old))[mask],
)


def mean_size(log_ratio):
    return log_ratio[mask].abs().mean().item()


rows = [
    ["discrepancy π_old/μ_old", e_old.flip_rate(rollout.routes, rollout.inputs).mean().item(),
     mean_size(logp_old - rollout.logp_rollout), mean_size(rollout_experts - rollout.logp_rollout)],
    ["staleness π_θ/π_old", e_new.flip_rate(e_old, rollout.inputs).mean().item(),
     mean_size(logp_new - logp_old), mean_size(same_experts - logp_old)],
]  # fmt: skip
show_table(
    ["factor", "flips per token and layer", "mean size of its log, nats", "the same experts in both, nats"],
    [[name, f"{flips:.1%}", f"{own:.4f}", f"{same:.4f}"] for name, flips, own, same in rows],
)
assert all(abs(own - same) < 0.15 * own for *_, own, same in rows)  # what the text below says

# %% [markdown]
# **What to see.** Both factors have flips: the first from rounding, the second from one gradient step with a large
# learning rate. The last column forces the same experts on both sides of a factor (that is routing replay, unit 07). It
# hardly differs from the one before. On this small trained model flips are frequent and cheap: what moves the policy
# here is everything else, the rounded products and the new weights. Section 7 comes back to that.

# %% [markdown]
# ## 6 · Counting flips
#
# Engines return the chosen experts of each token and layer, `[B, S, L, k]`. Two rules for comparing them. The order of
# the k experts means nothing. And some rows are no routing at all: padding, and the last token of a response, which was
# sampled but never fed to the model. In `Routes` these have `valid = False`.

# %%
ours = torch.tensor([[[[3, 5]], [[0, 2]], [[1, 7]], [[0, 0]]]], dtype=torch.uint8)  # [B=1, S=4, L=1, k=2]
theirs = torch.tensor([[[[5, 3]], [[0, 2]], [[1, 6]], [[9, 9]]]], dtype=torch.uint8)
valid = torch.tensor([[True, True, True, False]])
rate = Routes(ours, valid, (0,)).flip_rate(Routes(theirs, valid, (0,)), torch.ones(1, 4, dtype=torch.bool))
print("as sequences:", (ours != theirs).any(-1).float().mean().item(), "  as sets, valid rows only:", rate.tolist())

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

# %%
sets = [routes.experts[rollout.inputs].sort(-1).values for routes in (rollout.routes, e_old)]
flips = (sets[0] != sets[1]).any(-1)  # [tokens, layers]
rates = flips.float().mean(0)
print("flip rate of each layer     ", [f"{rate:.3f}" for rate in rates])
print("a flip in some layer        ", f"{flips.any(-1).float().mean():.3f}")
print("if they were independent    ", f"{1 - (1 - rates).prod():.3f}")

# %% [markdown]
# ## 7 · Measured on a small model
#
# **Precision.** The same weights through engines of fewer and fewer bits; the training engine computes in fp32.

# %%
ENGINES = ["fp32", "bf16", "int8", "fp8_e4m3", "int6", "int5", "int4", "int3"]
dial_prompts = [task.encode(p) for p in task.sample(pick(fast=24, full=64), seed=1)]


def flips_by_layer(spec):
    engine = HFEngine(model, Precision.parse(spec), record_routes=True)
    rollout = engine.generate(dial_prompts, group_size=8, sampling=sampling, seed=0)
    layout, replay = lay_out(rollout, share_prompts=True), RoutingReplay(model)
    with torch.no_grad(), replay.record() as tape:
        response_logprobs(model, layout)
    return layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs)


by_layer = torch.stack([flips_by_layer(spec) for spec in ENGINES])
assert not by_layer[0].any(), "in fp32 the two engines are one function"

figure = Figure(figsize=(8.5, 3.7), layout="constrained")
(ax,) = axes(figure, 1)
for layer, (colour, marker) in enumerate(((BLUE, "o"), (ORANGE, "s"))):
    ax.plot(range(1, len(ENGINES)), 100 * by_layer[1:, layer], marker, linestyle="-", color=colour, markersize=7)
    ax.plot([], [], marker, linestyle="-", color=colour, label=f"layer {layer}")
ax.set(xticks=range(1, len(ENGINES)), xticklabels=ENGINES[1:], yscale="log", ylabel="tokens that flip, %")
ax.set_title("Flip rate by precision; fp32 has none")
ax.legend(frameon=False)
Image(to_png(figure), width=850)

# %% [markdown]
# **What to see.** The flip rate follows the size of the rounding error over several decades, and there is no threshold
# below which it vanishes, short of computing the very same numbers. The last engines flip a large share of all tokens.
#
# **Margins.** Is it the formula of section 3? Both engines read the same tokens; we keep every router logit, and look
# at each token's margin (in the training engine) and whether it flipped.


# %%
def router_logits(network, precision):
    """[inputs, L, E] of a rollout's tokens, read by an engine of that precision."""
    network, found = copy.deepcopy(network), []
    network.set_experts_implementation("grouped_mm")
    round_weights_(network, precision)
    for module in network.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad(), round_activations(network, precision):
        network(input_ids=rollout.tokens, attention_mask=rollout.attention_mask.long(), use_cache=False)
    return torch.stack(found, 1)[rollout.inputs.flatten()]


exact, rounded = router_logits(model, Precision()), router_logits(model, Precision.parse("int4"))
ranked = exact.sort(-1, descending=True)
margins = ranked.values[..., 1] - ranked.values[..., 2]
error = rounded - exact
closing = (error.gather(-1, ranked.indices[..., 2:3]) - error.gather(-1, ranked.indices[..., 1:2]))[..., 0]
flips = (exact.topk(2).indices.sort(-1).values != rounded.topk(2).indices.sort(-1).values).any(-1)

figure = Figure(figsize=(10.5, 4.0), layout="constrained")
panels = axes(figure, 2, sharey=True)
edges = np.linspace(0, 1.5, 16)
for layer, ax in enumerate(panels):
    m, flip, noise = margins[:, layer].numpy(), flips[:, layer].numpy(), closing[:, layer].std().item()
    middle, share, count = [], [], np.histogram(m, edges)[0]
    for low, high in pairwise(edges):
        inside = (m >= low) & (m < high)
        if inside.sum() >= 20:
            middle.append((low + high) / 2)
            share.append(flip[inside].mean())
    middles = (edges[:-1] + edges[1:]) / 2
    ax.bar(middles, count / count.max() * 0.6, width=0.09, color="#dddddd", label="how many tokens")
    ax.plot(middle, share, "o-", color=ORANGE, label="share that flipped")
    grid = np.linspace(0, 1.5, 200)
    ax.plot(grid, normal_cdf(-grid / noise), color=BLUE, label="Φ(−m / s), s measured")
    ax.set(xlabel="margin, training engine", title=f"layer {layer}: s = {noise:.2f}", xlim=(0, 1.5), ylim=(0, 0.8))
panels[0].set_ylabel("share of the tokens")
panels[1].legend(frameon=False)
Image(to_png(figure), width=850)

# %%
show_table(
    ["layer", "noise s of the pair's difference", "median margin", "flip rate measured", "mean of Φ(−m/s)"],
    [
        [layer, f"{closing[:, layer].std():.3f}", f"{margins[:, layer].median():.3f}",
         f"{flips[:, layer].float().mean():.3f}",
         f"{normal_cdf(-margins[:, layer] / closing[:, layer].std()).mean():.3f}"]
        for layer in range(2)
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** Grey: how the margins are distributed; there is no gap at zero, and that is why there is always
# somebody to flip. Orange: near zero the share is large, at wide margins nobody flips. Blue: the formula for a pair,
# with *one* noise level for all tokens. It has the right shape and the right size in the first layer. In the second it
# is too low: there the closest pair is not alone, six other experts may come in, and rounding to nearest makes the
# same error for all tokens that look alike, so that near zero more than half of them can flip.
#
# **MoE against dense.** Now the whole gap between the engines, with both in bf16 on the same weights but with other
# kernels, as `minirl gap` measures it: random models and their dense twins, and the two trained ones.

# %%
seeds = pick(fast=3, full=5)
bf16 = Setting(dtype="bfloat16")
gaps = {}
for architecture in ("moe", "dense"):
    models = [random_model(architecture, seed) for seed in range(seeds)]
    gaps["random", architecture] = summary(run_setting(bf16, models, Workload(random_prompts, seeds=seeds)))
trained = Workload(prompts_for("chain-steps", None, 16), seeds=seeds)
for architecture, name in (("moe", "chain-steps"), ("dense", "chain-steps-dense")):
    gaps["trained", architecture] = summary(run_setting(bf16, [load_model(name)] * seeds, trained))

figure = Figure(figsize=(8.5, 3.9), layout="constrained")
(ax,) = axes(figure, 1)
places = {("random", "dense"): 0, ("random", "moe"): 1, ("trained", "dense"): 3, ("trained", "moe"): 4}
for key, place in places.items():
    middle, low, high = gaps[key]["plain"]["k3"]
    colour = GREY if key[1] == "dense" else ORANGE
    ax.errorbar(place, middle, [[middle - low], [high - middle]], fmt="o", color=colour, markersize=9, capsize=5)
    if key[1] == "moe":
        middle, low, high = gaps[key]["r3"]["k3"]
        limits = [[middle - low], [high - middle]]
        ax.errorbar(place + 1, middle, limits, fmt="D", color=GREEN, markersize=8, capsize=5)
ax.set(yscale="log", ylabel="KL (k3), nats per token", xticks=range(6), xlim=(-0.6, 5.6))
ax.set_xticklabels([f"{kind}\n{which}" for kind in ("random", "trained") for which in ("dense", "MoE", "MoE, R3")])
ax.set_title(f"The gap in bf16, mean and 95 % interval over {seeds} seeds")
Image(to_png(figure), width=850)

# %%
show_table(
    ["models", "KL, dense", "KL, MoE", "MoE / dense", "KL, MoE with R3", "flips per token and layer"],
    [
        [kind, f"{gaps[kind, 'dense']['plain']['k3'][0]:.1e}", f"{gaps[kind, 'moe']['plain']['k3'][0]:.1e}",
         f"{gaps[kind, 'moe']['plain']['k3'][0] / gaps[kind, 'dense']['plain']['k3'][0]:.1f}",
         f"{gaps[kind, 'moe']['r3']['k3'][0]:.1e}", f"{gaps[kind, 'moe']['flip_rate'][0]:.2%}"]
        for kind in ("random", "trained")
    ],
)  # fmt: skip

# %% [markdown]
# **What to see.** On random models routing multiplies the gap by tens, and forcing the same experts (R3) takes all of
# that back: the rest is the dense model's. On the small *trained* models there is nothing of it: the MoE's gap is no
# larger than its dense twin's, within the intervals, although it flips too. A trained model knows the answer to most
# tokens, and another expert has learned it as well. The mechanism is real; how much it costs depends on the model, and
# the toy that ships with this course is not one on which it costs much in bf16.
#
# **Try this**
#
# 1. In section 4 make the margin ten times as wide, `with_margin(draw_theta(1970), 0.03 * speed)`. Where does the flip
#    move, and what happens to the height of the leap?
# 2. In section 7 plot the margins with `"fp8_e4m3"` in place of `"int4"`. Which part of the histogram still flips?
# 3. Give `Precision.parse("int4", router=True)` to section 7: routers are rounded too. Which layer suffers more?
