"""What lab 06 uses: names of the library, a Mixture of Experts that can be enumerated, and the lab's figures."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.page import BLUE, GREEN, ORANGE, image, show_table, sliders
from minirl_edu.exact import TabularPolicy, objective_remainder, token_ratios
from minirl_edu.gap import Setting, Workload, prompts_for, random_model, random_prompts, run_setting, summary
from minirl_edu.logprobs import Layout, can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision, round_activations, round_weights_
from minirl_edu.rollout import HFEngine, Rollout, RolloutEngine, Sampling
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.tasks import ChainTask

__all__ = [
    "HFEngine", "Precision", "Setting", "Workload", "can_share_prompts", "check", "check_file", "copy",
    "direction_that_closes", "display", "draw_theta", "flip_figure", "gap_figure", "gates_figure",
    "group_mean_advantages", "knobs", "lay_out", "load_model", "load_task", "margins_figure", "math", "minirl_loss",
    "normal_cdf", "np", "objective_remainder", "pick", "pieces_figure", "power", "precision_figure", "prompts_for",
    "random_model", "random_prompts", "remainder_figure", "response_logprobs", "rewarded_rollout", "router_logits",
    "run_setting", "score_under", "show_table", "stepped", "summary", "token_ratios", "torch", "toy_policy",
    "with_margin",
]  # fmt: skip

logging.disable_progress_bar()
torch.set_num_threads(1)
GREY = "#999999"
V, T, E, D, K = 3, 3, 4, 6, 2
PREFIXES = [prefix for length in range(T) for prefix in product(range(V - 1), repeat=length)]
Theta = dict[str, Tensor]
"""The parameters of the small Mixture of Experts: V words, responses of up to T, E experts of width D, K chosen."""


# ------------------------------------------------------------------------------------------------- tables and figures


def page(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A sheet of so many inches, and its panels in a row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **kwargs)[0].tolist()
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, panels


def knobs(draw: Callable[..., Image], **choices: Sequence[Any]) -> None:
    """A slider for each argument of a drawing function, over its choices; it begins in their middle."""
    sliders(draw, **{name: (values, values[len(values) // 2]) for name, values in choices.items()})


# ----------------------------------------------------------------------------------------- what the lab measures with


def normal_cdf(x: Tensor | float) -> Tensor:
    """Φ, the distribution function of the standard normal."""
    return 0.5 * torch.erfc(-torch.as_tensor(x, dtype=torch.float64) / math.sqrt(2))


def power(x: np.ndarray, y: np.ndarray) -> str:
    """The exponent of y ~ x^p."""
    return f"{np.polyfit(np.log(x), np.log(y), 1)[0]:.2f}"


def load_task(name: str = "chain-steps", **options: Any) -> ChainTask:
    """The task of a cold start, with its tokenizer."""
    return ChainTask(tokenizer=load_tokenizer(name), **options)


def rewarded_rollout(
    engine: RolloutEngine, task: ChainTask, problems: Sequence[Any], *, group_size: int = 8, seed: int = 0
) -> tuple[Rollout, Tensor]:
    """`group_size` responses of an engine to each problem, and their rewards [B]."""
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    prompts = [task.encode(problem) for problem in problems]
    rollout = engine.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    rewards = [task.reward(problems[i // group_size], text) for i, text in enumerate(texts)]
    return rollout, torch.tensor(rewards)


def score_under(network: PreTrainedModel, layout: Layout, routes: Routes | None = None) -> tuple[Tensor, Routes]:
    """log π of the response tokens [B, T] and the experts used, live or with `routes` replayed; no gradient."""
    replay = RoutingReplay(network)
    with torch.no_grad():
        if routes is not None:
            with replay.replay(layout.pack(routes)):
                return response_logprobs(network, layout).logp, routes
        with replay.record() as tape:
            logp = response_logprobs(network, layout).logp
    return logp, layout.unpack(tape.routes)


def router_logits(network: PreTrainedModel, rollout: Rollout, precision: Precision) -> Tensor:
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


# ------------------------------------------------------------------- a Mixture-of-Experts policy that can be enumerated


def draw_theta(seed: int) -> Theta:
    """Parameters of a one-layer Mixture of Experts, drawn at random in float64."""

    def normal(offset: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts, head = normal(2, E, D, D) / math.sqrt(D), normal(3, V, D) / 2
    return {"embed": normal(0, V, D), "router": normal(1, E, D), "experts": experts, "head": head}


def toy_policy(theta: Theta, forced: Tensor | None = None) -> tuple[TabularPolicy, Tensor]:
    """The policy, and the experts of each prefix; with `forced`, those experts and live gates.

    A state passes on to the next, as a transformer's does through attention.
    """
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


def with_margin(theta: Theta, margin: float) -> Theta:
    """The same parameters, but the runner-up of the first token is `margin` below the last expert that is in."""
    hidden = torch.tanh(theta["embed"][-1])
    ranked = (theta["router"] @ hidden).sort(descending=True)
    router = theta["router"].clone()
    move = ranked.values[K - 1] - margin - ranked.values[K]
    router[ranked.indices[K]] += move * hidden / hidden.square().sum()
    return {**theta, "router": router}


def stepped(theta: Theta, direction: Theta, eta: float) -> Theta:
    """θ + η d."""
    return {name: theta[name] + eta * direction[name] for name in theta}


def direction_that_closes(theta: Theta, seed: int) -> tuple[Theta, float]:
    """A direction in the parameters in which the first token's margin shrinks, and how fast it does."""

    def margin(other: Theta) -> float:
        scores = other["router"] @ torch.tanh(other["embed"][-1])
        return -scores.topk(K + 1).values[-2:].diff().item()

    direction = draw_theta(seed)
    speed = (margin(theta) - margin(stepped(theta, direction, 1e-6))) / 1e-6
    return (direction, speed) if speed > 0 else ({name: -value for name, value in direction.items()}, -speed)


# ----------------------------------------------------------------------------------------------------- the figures


def gates_figure(s: Tensor, rules: Mapping[str, tuple[Tensor, Tensor]]) -> Image:
    """The router logits of a token, and the gates of each rule: (experts, gates) by its name."""
    figure, (left, right) = page(10.5, 3.6, 2)
    top = s.topk(2).indices
    left.bar(range(8), s, color=[BLUE if e in top else "#c9c9c9" for e in range(8)])
    third, second = s.sort(descending=True).values[[2, 1]].tolist()
    left.axhspan(third, second, color=ORANGE, alpha=0.35)
    left.annotate("the margin", (5.2, second), (5.2, 1.5), arrowprops=dict(arrowstyle="->"), ha="center")
    left.set(xlabel="expert", ylabel="router logit", xticks=range(8), title="One token: chosen experts in blue")
    for row, (experts, weights) in enumerate(rules.values()):
        start = 0.0
        for e, g in sorted(zip(experts.tolist(), weights.tolist(), strict=True)):
            right.barh(row, g, left=start, color={1: BLUE, 3: GREEN, 4: ORANGE}[e], edgecolor="white")
            right.text(start + g / 2, row, str(e), ha="center", va="center", color="white")
            start += g
    right.set(yticks=range(len(rules)), yticklabels=list(rules), xlabel="gates", xlim=(0, 1.02))
    right.set_title("Four rules, with the experts' numbers")
    right.invert_yaxis()
    return image(figure)


def flip_bounds(k: int, sigma: float, experts: int = 8, draws: int = 4000) -> tuple[Tensor, ...]:
    """Margins of one token, two bounds on its flip probability, and the share of draws that flipped."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(experts, generator=generator, dtype=torch.float64).sort(descending=True).values
    noise = sigma * torch.randn(draws, experts, generator=generator, dtype=torch.float64)
    margins = torch.linspace(0, 1.2, 25, dtype=torch.float64)
    found = []
    for m in margins:
        logits = base.clone()
        logits[:k] += m - (base[k - 1] - base[k])  # the chosen ones together, until the margin is m
        pairs = normal_cdf(-(logits[:k, None] - logits[None, k:]) / (sigma * math.sqrt(2)))
        flips = (logits + noise)[:, :k].amin(1) < (logits + noise)[:, k:].amax(1)
        found.append(torch.stack([pairs[k - 1, 0], pairs.sum().clamp(max=1.0), flips.double().mean()]))
    return margins, *torch.stack(found, 1)


def flip_figure(k: int = 2, sigma: float = 0.16) -> Image:
    """Flip probability against the margin: `flip_bounds`."""
    margins, low, high, drawn = flip_bounds(k, sigma)
    figure, (ax,) = page(8.5, 3.9)
    ax.fill_between(margins, low, high, color=BLUE, alpha=0.18, label="between the bounds")
    ax.plot(margins, low, color=BLUE, label="closest pair: Φ(−m / σ√2)")
    ax.plot(margins, high, color=BLUE, linestyle="--", label="sum over all pairs")
    ax.plot(margins, drawn, "o", color=ORANGE, markersize=5, label="draws of the noise")
    ax.set(xlabel="margin m", ylabel="probability of a flip", ylim=(-0.02, 1.02))
    ax.set_title(f"8 experts, top-{k}, noise σ = {sigma:.2f}")
    ax.legend(frameon=False)
    return image(figure)


def pieces_figure(line: np.ndarray, probability: Sequence[float], picks: Sequence[tuple[int, ...]]) -> Image:
    """A probability along a line in the parameters, in the colour of the experts that compute it."""
    breaks = [0, *(i for i in range(1, len(line)) if picks[i] != picks[i - 1]), len(line)]
    figure, (ax,) = page(8.5, 3.7)
    colours = [BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00"]
    palette = dict(zip(dict.fromkeys(picks), colours, strict=False))
    for a, b in pairwise(breaks):
        ax.plot(line[a:b], probability[a:b], color=palette.get(picks[a], GREY), linewidth=2.4)
        ax.text(line[(a + b) // 2], max(probability[a:b]) + 0.03, f"experts {picks[a]}", ha="center", fontsize=10)
    ax.set(xlabel="η", ylabel="π(first token = 0)", ylim=(0, max(probability) + 0.12))
    ax.set_title("Smooth between the choices, a jump at each of them")
    return image(figure)


def remainder_figure(wide: np.ndarray, one: np.ndarray, close: np.ndarray, mean: np.ndarray, title: str) -> Image:
    """What the objective drops against the step: rows of live routing, of held experts, and of flips."""
    figure, panels = page(10.5, 4.2, 2)
    cases = (wide, one, "One policy, one crossing"), (close, mean, title)
    for ax, (x, rows, name) in zip(panels, cases, strict=True):
        ax.loglog(x, rows[0], "o-", color=ORANGE, label="live routing")
        ax.loglog(x, rows[1], "s--", color=BLUE, label="experts of θ_old held")
        ax.set(xlabel="η", ylabel="|what the objective drops|", title=name)
        ax.legend(frameon=False, loc="lower right")
    flip_at = math.sqrt(wide[one[2] == 0][-1] * wide[one[2] == 1][0])
    panels[0].axvline(flip_at, color=GREY, linewidth=1)
    panels[0].text(0.9 * flip_at, 2e-3, "the flip", ha="right", color="#555555")
    return image(figure)


def precision_figure(engines: Sequence[str], by_layer: Tensor) -> Image:
    """Flip rates [engines, layers]."""
    figure, (ax,) = page(8.5, 3.7)
    for layer, (colour, marker) in enumerate(((BLUE, "o"), (ORANGE, "s"))):
        rates = 100 * by_layer[:, layer]
        ax.plot(range(len(engines)), rates, f"{marker}-", color=colour, markersize=7, label=f"layer {layer}")
    ax.set(xticks=range(len(engines)), xticklabels=engines, yscale="log", ylabel="tokens that flip, %")
    ax.set_title("Flip rate by precision; fp32 has none")
    ax.legend(frameon=False)
    return image(figure)


def margins_figure(margins: Tensor, flips: Tensor, noise: Tensor) -> Image:
    """Per layer: how margins are distributed, the share that flipped at each, and Φ(−m/s). [n, L], [n, L], [L]."""
    figure, panels = page(10.5, 4.0, 2, sharey=True)
    edges = np.linspace(0, 1.5, 16)
    middles, grid = (edges[:-1] + edges[1:]) / 2, np.linspace(0, 1.5, 200)
    for layer, ax in enumerate(panels):
        m, flip, s = margins[:, layer].numpy(), flips[:, layer].double().numpy(), noise[layer].item()
        count = np.histogram(m, edges)[0]
        share = np.histogram(m, edges, weights=flip)[0] / count.clip(1)
        enough = count >= 20
        ax.bar(middles, count / count.max() * 0.6, width=0.09, color="#dddddd", label="how many tokens")
        ax.plot(middles[enough], share[enough], "o-", color=ORANGE, label="share that flipped")
        ax.plot(grid, normal_cdf(torch.tensor(-grid / s)), color=BLUE, label="Φ(−m / s), s measured")
        ax.set(xlabel="margin, training engine", title=f"layer {layer}: s = {s:.2f}", xlim=(0, 1.5), ylim=(0, 0.8))
    panels[0].set_ylabel("share of the tokens")
    panels[1].legend(frameon=False)
    return image(figure)


def gap_figure(gaps: Mapping[tuple[str, str], Mapping[str, Any]]) -> Image:
    """The KL (k3) of random and trained models, dense and MoE, live and with R3, with intervals over seeds."""
    figure, (ax,) = page(8.5, 3.9)
    places = {("random", "dense"): 0, ("random", "moe"): 1, ("trained", "dense"): 3, ("trained", "moe"): 4}
    for key, place in places.items():
        sides = [("plain", 0, GREY if key[1] == "dense" else ORANGE, "o")]
        sides += [("r3", 1, GREEN, "D")] if key[1] == "moe" else []
        for side, right, colour, marker in sides:
            middle, low, high = gaps[key][side]["k3"]
            limits = [[middle - low], [high - middle]]
            ax.errorbar(place + right, middle, limits, fmt=marker, color=colour, markersize=8, capsize=5)
    ax.set(yscale="log", ylabel="KL (k3), nats per token", xticks=range(6), xlim=(-0.6, 5.6))
    ax.set_xticklabels([f"{kind}\n{which}" for kind in ("random", "trained") for which in ("dense", "MoE", "MoE, R3")])
    ax.set_title("The gap in bf16, mean and 95 % interval over seeds")
    return image(figure)
