"""What lab 11, scaling up, imports: a small rollout, the paper's model without numbers, two processes, the figures."""

import base64
import difflib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig
from transformers.utils import logging

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.config import load_config
from minirl_edu.course import check, pick
from minirl_edu.course.page import BLACK, BLUE, GREEN, ORANGE, YELLOW, charts, image, show_table, sliders, tidy
from minirl_edu.lm_head import CHUNK
from minirl_edu.logprobs import can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Rollout, Sampling
from minirl_edu.routing import Routes
from minirl_edu.tasks import ChainTask

__all__ = [
    "CHUNK",
    "HFEngine",
    "Routes",
    "Sampling",
    "as_bytes",
    "base64",
    "check",
    "config_lines",
    "deal_errors",
    "difflib",
]
__all__ += ["fit_figure", "io", "large_model", "lay_out", "load_model", "math", "memory_figure", "micro_batches", "np"]
__all__ += ["image", "packing_figure", "pick", "response_gradients", "response_logprobs", "roofline_figure"]
__all__ += ["show_table", "sliders", "small_rollout", "step_figure", "torch", "two_ranks"]

logging.disable_progress_bar()
torch.set_num_threads(1)


def as_bytes(n: float) -> str:
    """Bytes in words, in powers of ten."""
    power = min(4, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def small_rollout(prompts: int, group_size: int, seed: int) -> tuple[PreTrainedModel, Rollout, Tensor]:
    """The cold start `chain-steps`, a rollout of it through an int4 engine with its routes, and the advantages."""
    model = load_model("chain-steps").eval()
    task = ChainTask(tokenizer=load_tokenizer("chain-steps"), hard_fraction=0.25)
    problems = task.sample(prompts, seed=seed)
    engine = HFEngine(model, Precision.parse("int4"), record_routes=True)
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    drawn = engine.generate([task.encode(p) for p in problems], group_size=group_size, sampling=sampling, seed=seed)
    texts = task.tokenizer.batch_decode(drawn.responses, skip_special_tokens=True)
    rewards = [task.reward(problems[row // group_size], text) for row, text in enumerate(texts)]
    return model, drawn, group_mean_advantages(torch.tensor(rewards), group_size)


def response_gradients(model: PreTrainedModel, rollout: Rollout, advantages: Tensor) -> Tensor:
    """The gradient of each response's own −ℓ_b with respect to the first layer's queries, a row each."""
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    logp = response_logprobs(model, lay_out(rollout, share_prompts=can_share_prompts(model))).logp
    rows = []
    for keep in torch.eye(len(advantages)):
        batch = logp.detach(), rollout.logp_rollout, advantages * keep, rollout.response_mask
        loss = minirl_loss(logp, *batch, num_responses=1).loss
        rows.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten())
    return torch.stack(rows)


def large_model() -> PreTrainedModel:
    """Qwen3-30B-A3B on the device `meta`: its shapes, without any numbers."""
    config = json.loads((files("minirl_edu") / "architectures" / "Qwen3-30B-A3B.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config))


_SCRIPT = """
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


def two_ranks(timeout: float = 200) -> list[str]:
    """The gradient in each of two DDP processes with three rows and one; they meet in a file. Or why they did not run.

    Each calls backward on 2 · (sum of its squares) / (number of rows of both).
    """
    with tempfile.TemporaryDirectory() as folder:
        script, meeting = Path(folder, "ranks.py"), Path(folder, "meeting")
        script.write_text(_SCRIPT, encoding="utf-8")
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), "2", str(meeting)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]
        try:
            return [process.communicate(timeout=timeout)[0].strip() or "did not run here" for process in started]
        except subprocess.TimeoutExpired:
            return ["took too long here"] * 2
        finally:
            for process in started:
                process.kill()


def config_lines(text: str) -> list[str]:
    """Every field of a config in YAML, one a line, defaults included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text, encoding="utf-8")
        data = load_config(path).to_dict()
    return [
        f"{section}.{name}: {value}"
        for section, fields in data.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    ]


def deal_errors(lengths: Tensor, errors: Mapping[str, Sequence[float]], bias: Mapping[str, float]) -> Figure:
    """The rollout's lengths; and for each way of dealing, the error of each deal and of their average (a bar)."""
    figure, (left, right) = charts(2, 3.4, width_ratios=(1, 1.7))
    left.bar(*torch.unique(lengths, return_counts=True), width=1.0, color=BLUE)
    tidy(left, "the rollout", "response tokens", "responses")
    for i, (name, values) in enumerate(errors.items()):
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
        right.plot(i + spread, values, ".", color=ORANGE, markersize=4, alpha=0.6)
        right.plot([i - 0.3, i + 0.3], [bias[name]] * 2, color=BLACK, linewidth=2.4)
    right.set_xticks(range(len(errors)), [name.replace(", ", ",\n") for name in errors])
    right.set_ylim(-0.05, None)
    tidy(right, "mean of means (bar: error of the average)", "", "error ÷ true gradient")
    return figure


def step_figure(worlds: Sequence[int], moved: Mapping[str, Sequence[float]]) -> Figure:
    """The length of one step without the factor K, over the right one, for each rule."""
    figure, (ax,) = charts(1, 3.0)
    for (rule, lengths), colour, style in zip(moved.items(), (BLUE, ORANGE, GREEN), ("-o", "--s", ":^"), strict=True):
        ax.plot(worlds, lengths, style, color=colour, label=rule, linewidth=1.8, markersize=5)
    ax.set(xscale="log", yscale="log")
    tidy(ax, xlabel="world size K, the factor forgotten", ylabel="step ÷ right step")
    ax.set_xticks(worlds, [str(k) for k in worlds])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def packing_figure(cuts: Mapping[str, Sequence[np.ndarray]], budget: int) -> Figure:
    """The token slots of every micro-batch, used and padding, for each way to cut; the line is the budget."""
    figure, axes = charts(len(cuts), 3.4, sharey=True)
    for ax, (name, parts) in zip(axes, cuts.items(), strict=True):
        used, taken = (np.array([f(part) for part in parts]) for f in (np.sum, lambda p: len(p) * p.max()))
        at = np.arange(len(parts))
        ax.bar(at, taken, width=1.0, color="#f3d9c9", label="padding")
        ax.bar(at, used, width=1.0, color=BLUE, label="tokens")
        ax.axhline(budget, color=BLACK, linewidth=1)
        tidy(ax, f"{name}: {len(parts)} forwards, {1 - used.sum() / taken.sum():.0%} padding", "micro-batch")
        ax.set_xlim(-1, max(len(parts), 10))
    axes[0].set_ylabel("token slots (line: budget)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


def memory_figure(memory: Mapping[str, float]) -> Figure:
    """Bytes on a logarithmic axis; what belongs to one response is orange."""
    figure, (ax,) = charts(1, 3.8)
    at = np.arange(len(memory))[::-1]
    ax.barh(at, list(memory.values()), color=[ORANGE if "response" in name else BLUE for name in memory])
    for y, n in zip(at, memory.values(), strict=True):
        ax.text(n * 1.3, y, as_bytes(n), va="center", fontsize=10, bbox={"color": "white", "pad": 1})
    ax.axvline(80e9, color=BLACK, linewidth=1, linestyle="--")
    ax.text(80e9 * 0.85, -0.55, "one GPU of 80 GB", fontsize=10, ha="right")
    ax.set(xscale="log", xlim=(1e5, 3e13), yticks=at, yticklabels=list(memory))
    tidy(ax, xlabel="bytes")
    return figure


def fit_figure(per_gpu: Mapping[str, float], title: str) -> Figure:
    """What one GPU holds, in bytes, against 80 GB."""
    figure, (ax,) = charts(1, 2.0)
    left = 0.0
    for (name, n), colour in zip(per_gpu.items(), (BLUE, GREEN, YELLOW), strict=True):
        ax.barh(0, n / 1e9, left=left, color=colour, label=f"{name}: {as_bytes(n)}")
        left += n / 1e9
    ax.axvline(80, color=BLACK, linewidth=1.2, linestyle="--")
    ax.set(yticks=[], xlim=(0, max(100, left * 1.05)))
    tidy(ax, title, "GB on each GPU (dashed: 80 GB)")
    figure.legend(loc="outside lower left", ncols=3, frameon=False)
    return figure


def roofline_figure(
    context: int, decode: Callable[[int, int], Sequence[float]], update: Callable[[float], Sequence[float]]
) -> Figure:
    """Left, the seconds of `decode(batch, context)`: weights, caches, arithmetic; right, FLOPs of `update(length)`."""
    figure, (left, right) = charts(2, 3.6)
    batches = np.unique(np.geomspace(1, 16384, 60).astype(int))
    terms = np.array([decode(int(b), context) for b in batches]).T * 1e3
    names, looks = ("read the weights", "read the caches", "multiply"), ((BLUE, "-"), (YELLOW, "--"), (ORANGE, ":"))
    for name, (colour, style), values in zip(names, looks, terms, strict=True):
        left.plot(batches, values, style, color=colour, label=name, linewidth=2)
    left.set(xscale="log", yscale="log")
    tidy(left, f"rollout, {context:,} tokens of context", "sequences decoded at once", "milliseconds for a token each")
    left.legend(frameon=False)
    lengths = np.geomspace(256, 65536, 40)
    flops = np.array([update(n) for n in lengths]).T / 1e9
    right.fill_between(lengths, 0, flops[0], color=BLUE, alpha=0.8, linewidth=0, label="parameters, 6 P_active")
    right.fill_between(lengths, flops[0], flops.sum(0), color=ORANGE, alpha=0.6, linewidth=0, label="attention")
    right.set(xscale="log", ylim=(0, None))
    right.set_xticks([256, 2048, 16384, 65536], ["256", "2,048", "16,384", "65,536"])
    right.minorticks_off()
    tidy(right, "update", "length of the response", "GFLOP per token")
    right.legend(frameon=False, loc="upper left")
    return figure
