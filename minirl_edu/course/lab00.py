"""What lab 00 uses: names of the library, tables of tokens, the figure of the experts and that of a run."""

import copy
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import Image, display
from torch import Tensor
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check
from minirl_edu.course.page import charts, image, show_table, sliders
from minirl_edu.diagnostics import first_order_gap, kl_k3
from minirl_edu.logprobs import can_share_prompts, lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer, model_path
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import four_curves, precision_dial, rollout_tokens
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import RoutingReplay
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

__all__ = [
    "HFEngine", "MiniRLTrainer", "Precision", "RoutingReplay", "Sampling", "can_share_prompts", "chain_model",
    "check", "copy", "dial_table", "display", "expert_figure", "first_order_gap", "group_mean_advantages",
    "group_table", "image", "kl_k3", "lay_out", "load_config", "minirl_loss", "paper_curves", "precision_dial",
    "push_table", "quantise", "response_logprobs", "rollout_tokens", "score_table", "sliders", "tempfile",
    "three_policies_table", "torch",
]  # fmt: skip

logging.disable_progress_bar()
# The model is tiny: one thread is as fast as many, and sums come out in the same order everywhere.
torch.set_num_threads(1)


def chain_model() -> tuple[Any, ChainTask]:
    """The tiny Mixture of Experts, ready to be read, and its task; prints what they are."""
    model = load_model("chain-steps").eval()
    task = ChainTask(tokenizer=load_tokenizer("chain-steps"))
    problem = task.sample(1, seed=0)[0]
    made = json.loads(Path(model_path("chain-steps"), "cold_start.json").read_text(encoding="utf-8"))
    size, shape = sum(p.numel() for p in model.parameters()), model.config
    print(f"model             {size / 1e6:.2f} million parameters, {shape.num_hidden_layers} layers")
    print(f"experts           {shape.num_experts} per layer, {shape.num_experts_per_tok} serve a token")
    print(f"its teacher       errs at {made['error_rate']:.0%} of the steps")
    print("prompt           ", repr(problem.prompt))
    print("a right response ", repr(task.demonstration(problem, rng=random.Random(0))))
    print("a wrong one      ", repr(task.demonstration(problem, rng=random.Random(1), error_rate=0.5)))
    print("final digit      ", problem.answer)
    return model, task


def push_table(mu_old: Tensor, pi_old: Tensor, pi_theta: Tensor, advantages: Tensor, gradient: Tensor) -> None:
    """Display each token's ratio, weight and gradient; places with μ_old = 1 and no gradient are left out."""
    rows = [
        [i + 1, t + 1, f"{advantages[i]:+.1f}", f"{pi_theta[i, t] / pi_old[i, t]:.2f}",
         f"{pi_theta[i, t] / mu_old[i, t]:.2f}", f"{gradient[i, t] + 0.0:+.4f}"]
        for i, t in (mu_old < 1).nonzero().tolist()
    ]  # fmt: skip
    show_table(["response", "token", "Â", "r = π_θ/π_old", "weight π_θ/μ_old", "gradient"], rows)


def group_table(texts: Sequence[str], rewards: Tensor, advantages: Tensor, log_mu: Tensor) -> None:
    """Display the responses of one group."""
    columns = zip(texts, rewards.tolist(), advantages.tolist(), log_mu.tolist(), strict=True)
    rows = [[f"`{text}`", f"{r:.0f}", f"{a:+.3f}", f"{p:.2f}"] for text, r, a, p in columns]
    show_table(["response", "reward R", "advantage Â", "log μ_old of the response, nats"], rows)


def three_policies_table(tokens: Sequence[str], log_mu: Tensor, log_old: Tensor, log_new: Tensor) -> None:
    """Display what each policy says of the tokens of one response, and the ratios."""
    ratios = (log_old - log_mu).exp(), (log_new - log_old).exp(), (log_new - log_mu).exp()
    columns = [log_mu.exp(), log_old.exp(), log_new.exp(), *ratios]
    rows = [[f"`{token}`", *(f"{column[t]:.4f}" for column in columns)] for t, token in enumerate(tokens)]
    show_table(["token", "μ_old", "π_old", "π_θ", "π_old/μ_old", "π_θ/π_old", "weight π_θ/μ_old"], rows)


def expert_figure(tokens: Sequence[str], rollout: Tensor, training: Tensor, num_experts: int) -> Image:
    """The experts that two engines chose, [T, L, k] each, one panel for each layer; shaded where the sets differ."""
    circle: dict[str, Any] = dict(marker="o", s=150, facecolors="none", edgecolors="#D55E00", linewidths=1.8)
    square: dict[str, Any] = dict(marker="s", s=36, color="#0072B2")
    length, layers, k = rollout.shape
    at = np.arange(length).repeat(k)
    figure, axes = charts(1, 2.3 * layers, layers, sharex=True)
    for i, ax in enumerate(axes):
        differ = (rollout[:, i].sort(-1).values != training[:, i].sort(-1).values).any(-1)
        for t in differ.nonzero()[:, 0].tolist():
            ax.axvspan(t - 0.5, t + 0.5, color="#f3d9c9", zorder=0)
        for chosen, style, label in ((rollout, circle, "rollout engine"), (training, square, "training engine")):
            ax.scatter(at, chosen[:, i].flatten(), label=label, **style)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xticks=range(length), xticklabels=tokens, ylabel="expert")
        ax.set(yticks=range(num_experts), ylim=(-0.7, num_experts - 0.3))
        ax.set_title(f"layer {i}", loc="left", fontsize=11)
    axes[-1].set_xlabel("token that is predicted")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return image(figure)


def dial_table(dial: Sequence[Mapping[str, Any]]) -> None:
    """Display the rows of the precision dial, with the share of the KL that R3 removes."""
    rows = [
        [row["precision"], f"{row['kl']:.1e}", f"{row['kl_r3']:.1e}",
         f"{round(100 - 100 * row['kl_r3'] / row['kl'])} %" if row["kl"] else "",
         f"{row['flip_rate']:.2%}"]
        for row in dial
    ]  # fmt: skip
    show_table(["engine", "KL, nats per token", "with R3", "R3 removes", "flips per token and layer"], rows)


def paper_curves(records: Sequence[Mapping[str, Any]]) -> Image:
    """The four figures of the paper, from one dict of metrics per gradient step."""
    numbers = [{k: v for k, v in record.items() if isinstance(v, int | float)} for record in records]
    names = set().union(*numbers)
    run = {name: np.array([record.get(name, math.nan) for record in numbers]) for name in names}
    return image(four_curves({"MiniRL": run}))


def score_table(records: Sequence[Mapping[str, Any]], problems: int, engine: str) -> None:
    """Display the scores and the entropy before and after the run, with the standard error of a score."""
    before, after = records[0], records[-1]
    error = math.sqrt(before["score"] * (1 - before["score"]) / problems)
    show_table(
        ["", "before", "after"],
        [
            ["held-out score", f"{before['score']:.2f}", f"{after['score']:.2f}"],
            [f"through the {engine} engine", *(f"{r['score_rollout']:.2f}" for r in (before, after))],
            ["token entropy, nats", f"{records[1]['entropy']:.2f}", f"{after['entropy']:.2f}"],
        ],
    )
    print(f"{problems} held-out problems: a score has a standard error of {error:.2f}")
