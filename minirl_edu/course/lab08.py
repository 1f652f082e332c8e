"""What lab 08 uses: names of the library, helpers of lab 06, and the lab's figures."""

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check, pick
from minirl_edu.course.capstone import check_file
from minirl_edu.course.lab06 import (
    knobs,
    load_task,
    page,
    rewarded_rollout,
)
from minirl_edu.course.page import BLUE, GREEN, ORANGE, image, show_table
from minirl_edu.course.unit08 import ToyLoop
from minirl_edu.diagnostics import kl_k1, kl_k3, masked_mean
from minirl_edu.logprobs import can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import load_model
from minirl_edu.objectives import minirl_loss
from minirl_edu.plots import four_curves
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, RolloutEngine, Sampling, sample
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

__all__ = [
    "HFEngine", "MiniRLTrainer", "Precision", "ToyLoop", "age_figure", "as_run", "can_share_prompts", "check",
    "check_file", "copy", "derive_seed", "display", "four_curves", "group_mean_advantages", "kl_k1", "kl_k3",
    "knobs", "lay_out", "load_config", "load_model", "load_task", "masked_mean", "math", "micro_batches",
    "minirl_loss", "needles", "np", "pick", "response_logprobs", "rewarded_rollout", "show_table", "tempfile",
    "torch", "two_scores", "words_figure",
]  # fmt: skip

Line = Mapping[str, float]
"""The metrics of one gradient step."""


def as_run(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """A column for each metric, NaN where a line has none: what the figures take."""
    names = {name: None for line in lines for name, value in line.items() if isinstance(value, int | float)}
    return {name: np.array([line.get(name, math.nan) for line in lines], dtype=float) for name in names}


def two_scores(
    policy: PreTrainedModel, engine: RolloutEngine, task: ChainTask, problems: Sequence[Any]
) -> dict[str, float]:
    """Share of the problems solved by the policy in full precision, and through the engine; the same seed."""
    prompts, seed = [task.encode(problem) for problem in problems], derive_seed(0, "evaluation")
    options = {"group_size": 1, "sampling": Sampling(max_new_tokens=task.max_new_tokens), "seed": seed}
    scores = {}
    for name, rollout in (
        ("score", sample(policy, prompts, **options)),
        ("score_rollout", engine.generate(prompts, **options)),
    ):
        texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        scores[name] = sum(map(task.reward, problems, texts)) / len(texts)
    return scores


def step_of_words(logits: Tensor, right: int, eta: float) -> tuple[Tensor, Tensor]:
    """Probabilities before and after a step of the expected policy gradient, where one word is right."""
    pi = logits.softmax(-1)
    reward = torch.eye(len(logits))[right]
    return pi, (logits + eta * pi * (reward - pi @ reward)).softmax(-1)


# ----------------------------------------------------------------------------------------------------- the figures


def age_figure(counts: Sequence[int], steps: int = 16) -> Image:
    """How many updates old the rollout is at each gradient step, for several N; a dot where the engine was synced."""
    figure, panels = page(8.5, 2.6, len(counts), sharey=True)
    at = np.arange(steps)
    for ax, n in zip(panels, counts, strict=True):
        ax.bar(at, at % n, width=0.8, color=BLUE)
        ax.plot(at[at % n == 0], np.full(-(-steps // n), -0.45), "o", color=ORANGE, markersize=5)
        ax.set(xlabel="gradient step", title=f"N = {n}", ylim=(-0.9, max(counts) - 0.5), xticks=range(0, steps, 4))
    panels[0].set_ylabel("updates since\nthe rollout")
    return image(figure)


def needles(runs: Mapping[str, Sequence[Line]]) -> Image:
    """KL (k3), entropy and score of two runs."""
    labels = {"k3_rollout_old": "KL (k3), nats per token", "entropy": "entropy, nats", "score": "score, full precision"}
    figure, panels = page(8.5, 2.9, 3)
    for ax, (key, label) in zip(panels, labels.items(), strict=True):
        for (name, lines), color, style in zip(runs.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
            run = as_run(lines)
            known = np.isfinite(run[key])
            steps, values = run["grad_step"][known], run[key][known]
            if key == "k3_rollout_old":  # noisy: a running mean over five steps, each step faintly
                ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
                steps, values = steps[2:-2], np.convolve(values, np.full(5, 0.2), "valid")
            ax.plot(steps, values, style, color=color, linewidth=1.9, label=name)
        ax.set_title(label, loc="left", fontsize=11)
        ax.set_xlabel("gradient step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_yscale("log")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return image(figure)


def words_figure(logits: Tensor, rights: Sequence[int], eta: float) -> Image:
    """`step_of_words` for several words that may be right: the bars, and the entropies."""
    figure, panels = page(8.5, 2.9, len(rights), sharey=True)
    at = np.arange(len(logits))
    for ax, right in zip(panels, rights, strict=True):
        before, after = step_of_words(logits, right, eta)
        entropies = [-(p * p.log()).sum().item() for p in (before, after)]
        ax.bar(at - 0.2, before, 0.4, color="#c8c8c8")
        ax.bar(at + 0.2, after, 0.4, color=[GREEN if i == right else BLUE for i in at])
        title = f"word {right + 1} is right\nH {entropies[0]:.3f} → {entropies[1]:.3f}"
        ax.set_title(title, loc="left", fontsize=10)
        ax.set(xticks=at, xticklabels=at + 1, xlabel="word")
    panels[0].set_ylabel("probability (grey: before)")
    return image(figure)
