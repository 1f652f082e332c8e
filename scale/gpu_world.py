"""Does the identity of the tiny worlds hold at 10 × the model and 8 × the batch, with real fp8 products in the engine?

    python scale/gpu_world.py --out scale/results/gpu-world.jsonl --budget 400     # one H100 or H200
    python scale/gpu_world.py --out FILE --summary                                 # judge what is there once more
    python scale/gpu_world.py --mini --out FILE                                    # in miniature, on a CPU

The setting is `trail_experts` of `minirl_edu/experiments/paper.yaml`: `trail`, where right responses end and wrong ones
go on, a Mixture of Experts in which each choice matters (one of 16), an engine whose routers are disturbed by noise of
0.3. What is larger: 9.06 M parameters in the place of 0.89 M (width 256 for 128, experts of 352 for 64, still 2 layers
and 16 experts), 1,024 responses per update for 128 (128 prompts × 8). What is real: the trainer computes in bf16 over
fp32 weights, the engine in bf16 with fp8 products (e4m3, one scale for each token and each output channel; routers and
head stay in bf16, as in practice). Half the updates, 60: at twice the width, Adam's step of the same rate moves a
function about twice as far, and there is less noise in it. Learning rate, noise and the cold start's teacher are the
setting's.

What is compared was fixed before the first run:

H1  Cov(|y|, R) of the first rollout is below 0, the predicted drift (mean `entropy_drift` of MiniRL's run over the
    first third of the updates) too, and so is the measured one (mean entropy without the weight minus with it, over
    the second third): in at least 7 of 8 seeds each, and the measured mean's 95 % interval lies below 0.
H2  Who collapses (F1c-both): more than half of the runs without the weight collapse (final score below 0.7 × the best),
    they end below their score before training, and their entropy in the last third is below MiniRL's by a factor of 2.
H3  With the weight (F1a-both, without its comparison with length normalisation): MiniRL ends more than 10 points above
    the runs without, fewer than half of its runs collapse, and it ends above its score before training.
H4  Replay (F1d-both): R3 lowers the training–inference KL by a factor of 10. As in the small world, it does bring a
    gain: the paper's "no gain" is contradicted by more than 2 points. What fp8 and bf16 add to the gap, R3 leaves.
H5  The same without the weight, where right responses are longer: predicted and measured above 0. Where all are alike:
    the measured drift is smaller than half of H1's. Over all pairs, Pearson's correlation of predicted and measured is
    at least 0.9.

Runs come in the order in which they matter: {MiniRL, − IS, R3} for seed after seed; then H5's pairs, two thirds as
long; then + length norm. Each finished run is a line of JSON in the file, and is skipped by the next call; so is the
cold start, which lies in a folder beside it. A run that fails leaves a line with `error`, and is tried again.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTING = "trail_experts"
MAIN, LATER = ("minirl", "no_is", "r3"), ("length_norm",)
CONTRASTS = ("wrong", "all")
"""What the environment ends in H5's pairs; in all other runs it is `right`."""
CURVES = ("reward", "entropy", "k3_rollout_old", "kl_rollout_old", "ess", "response_length", "length_reward_cov",
          "entropy_drift", "routing_flip_rate", "grad_norm", "seconds")  # fmt: skip
"""What is kept of each update."""


@dataclasses.dataclass(frozen=True)
class World:
    """How large everything is. `workers` processes share the card; `limit` is the seconds that one run may take."""

    hidden: int = 256
    heads: int = 8
    expert_hidden: int = 352
    prompts: int = 128
    updates: int = 60
    warmup: int = 10
    lr: float = 1.5e-4
    noise: float = 0.3
    max_new_tokens: int = 64
    micro_tokens: int = 32768
    eval_every: int = 5
    eval_samples: int = 8
    cold_steps: int = 800
    workers: int = 3
    limit: float = 300.0
    graph: bool = True
    device: str = "cuda"

    @property
    def size(self) -> dict[str, Any]:
        """What decides a run's numbers: runs of another size are not compared, and none is skipped for their sake."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("workers", "limit", "graph")}

    @property
    def contrast_updates(self) -> int:
        """Of H5's runs: as far as the second third, in which the drift is measured."""
        return 2 * self.updates // 3


MINI = World(
    hidden=32, heads=2, expert_hidden=16, prompts=4, updates=3, warmup=1, max_new_tokens=8, micro_tokens=2048,
    eval_every=3, eval_samples=1, cold_steps=2, workers=1, limit=60.0, graph=False, device="cpu",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the products


def route_to_experts(experts: Any, index: Any) -> tuple[Any, Any, Any]:
    """Order of the (token, expert) pairs by expert, the end of each expert's run, and the way back."""
    import torch

    ids, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return order, ends, order.argsort()


def experts_in_autocast(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
    """The experts of a transformers layer by grouped products in autocast's dtype. transformers' own leave them in the
    weights' fp32, one expert after the other."""
    import torch
    from torch.nn import functional

    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    order, ends, back = route_to_experts(self.num_experts, index)
    k = index.shape[-1]
    x = hidden.to(dtype).index_select(0, order // k)
    x = self._apply_gate(functional.grouped_mm(x, self.gate_up_proj.to(dtype).mT, offs=ends))
    x = functional.grouped_mm(x, self.down_proj.to(dtype).mT, offs=ends)
    x = (x * weights.flatten().index_select(0, order)[:, None]).index_select(0, back)
    return x.view(len(hidden), k, -1).sum(1).to(hidden.dtype)


class Product:
    """x ↦ x Wᵀ of a weight [out, in], or of stacked experts' [E, out, in] with the end of each expert's rows.

    kind    "fp8": both operands in e4m3, scaled by row, by the card's own fp8 products; "emulated": the same through
            `minirl_edu.precision` in the operands' dtype, for a CPU; "exact": neither is rounded
    """

    def __init__(self, weight: Any, kind: str, dtype: Any) -> None:
        import torch

        self.kind = kind
        self.weight = torch.empty_like(weight, dtype=torch.float8_e4m3fn if kind == "fp8" else dtype)
        self.scale = torch.empty(weight.shape[:-1], device=weight.device)
        self.load(weight)

    def load(self, weight: Any) -> None:
        """Take a new weight, in place: a captured graph goes on reading it."""
        from minirl_edu.precision import quantise

        if self.kind == "fp8":
            rounded, scale = to_fp8(weight)
            self.weight.copy_(rounded)
            self.scale.copy_(scale[..., 0])
        else:
            self.weight.copy_(quantise(weight, "fp8_e4m3") if self.kind == "emulated" else weight)

    def __call__(self, x: Any, ends: Any = None) -> Any:
        import torch
        from torch.nn import functional

        from minirl_edu.precision import quantise

        if self.kind != "fp8":
            x = quantise(x, "fp8_e4m3") if self.kind == "emulated" else x
            return x @ self.weight.T if ends is None else functional.grouped_mm(x, self.weight.mT, offs=ends)
        rounded, scale = to_fp8(x)
        if ends is None:
            return torch.ops.aten._scaled_mm(
                rounded, self.weight.T, scale_a=scale, scale_b=self.scale[None], out_dtype=torch.bfloat16
            )
        if has_grouped_fp8():
            return torch.ops.aten._scaled_grouped_mm(
                rounded, self.weight.mT, scale[:, 0].contiguous(), self.scale, ends, out_dtype=torch.bfloat16
            )
        x = functional.grouped_mm(rounded.bfloat16(), self.weight.bfloat16().mT, offs=ends)  # the same operands
        rows = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        return (x * scale * self.scale[torch.searchsorted(ends, rows, right=True)]).bfloat16()


@cache
def has_grouped_fp8() -> bool:
    """Whether the card multiplies stacked experts in fp8; else their rounded operands are multiplied in bf16."""
    import torch

    x, scale = to_fp8(torch.ones(16, 32, device="cuda"))
    w, ends = x.expand(2, 16, 32).contiguous(), torch.tensor([8, 16], dtype=torch.int32, device="cuda")
    try:
        torch.ops.aten._scaled_grouped_mm(
            x, w.mT, scale[:, 0].contiguous(), scale[:, 0].expand(2, 16).contiguous(), ends, out_dtype=torch.bfloat16
        )
    except (RuntimeError, NotImplementedError):
        return False
    return True


def to_fp8(x: Any) -> tuple[Any, Any]:
    """e4m3 values and the scale of each row [..., 1]: a row's largest value goes to the format's largest, 448."""
    import torch

    values = x.float()
    scale = values.abs().amax(-1, keepdim=True).clamp_(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn), scale


# -------------------------------------------------------------------------------------------------------- the engine


class Engine:
    """A rollout engine for the tiny Qwen3-MoE, made for one card: all responses are decoded together to the last token,
    one step is a CUDA graph, and nothing waits for the CPU until the end.

    kind       of the products in attention and experts, see `Product`
    noise      of the routers' inputs, as in `precision.perturb_routers`
    rows       responses that a call may ask for at most
    dtype      of everything that isn't rounded

    Prompts have one length, as `trail`'s have. `play` takes environments that end a response, not those that write.
    """

    def __init__(
        self, model: Any, *, kind: str, noise: float, rows: int, length: int, seed: int, graph: bool, dtype: Any
    ) -> None:
        import torch

        self.config, self.kind, self.noise, self.rows, self.length = model.config, kind, noise, rows, length
        self.seed, self.dtype, self.device, self.version = seed, dtype, model.device, 0
        config = self.config
        self.width = 0  # of the prompts, known from the first call on
        self.q, self.kv, self.d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.generator = torch.Generator(self.device)
        self.layers = [
            {name: Product(weight, *made) for name, (weight, made) in self._weights(layer).items()}
            for layer in model.model.layers
        ]
        self.plain = {name: tensor.detach().to(dtype).clone() for name, tensor in self._vectors(model)}
        self.rotary = model.model.rotary_emb
        self.want_graph, self.graph = graph and self.device.type == "cuda", None

    def _weights(self, layer: Any) -> dict[str, tuple[Any, tuple[str, Any]]]:
        """The matrices of a layer, each with what its product is."""
        import torch

        attention, experts = layer.self_attn, layer.mlp.experts
        rounded, exact = (self.kind, self.dtype), ("exact", self.dtype)
        qkv = torch.cat([part.weight.detach() for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        return {
            "qkv": (qkv, rounded),
            "o": (attention.o_proj.weight.detach(), rounded),
            "gate_up": (experts.gate_up_proj.detach(), rounded),
            "down": (experts.down_proj.detach(), rounded),
            "router": (layer.mlp.gate.weight.detach(), exact),
        }

    @staticmethod
    def _vectors(model: Any) -> Iterator[tuple[str, Any]]:
        """Embeddings, head and norms."""
        yield "embed", model.get_input_embeddings().weight
        yield "head", model.get_output_embeddings().weight
        yield from ((name, p) for name, p in model.named_parameters() if "norm" in name)

    def sync(self, model: Any, *, version: int) -> None:
        """Take `model`'s weights."""
        import torch

        with torch.no_grad():
            for products, layer in zip(self.layers, model.model.layers, strict=True):
                for name, (weight, _) in self._weights(layer).items():
                    products[name].load(weight)
            for name, tensor in self._vectors(model):
                self.plain[name].copy_(tensor)
        self.version = version

    def close(self) -> None:
        """Nothing outlives the object."""

    # One forward of [b, s] new tokens at positions start … start + s − 1, `start` a tensor on the device.

    def _norm(self, x: Any, name: str) -> Any:
        from torch.nn import functional

        return functional.rms_norm(x, x.shape[-1:], self.plain[name], self.config.rms_norm_eps)

    def _forward(self, tokens: Any, start: Any, keys: Any, values: Any, routes: Any) -> Any:
        """Logits [b, V] after the last token. Keys and values [L, b, kv, S, d] and routes [L, b, S, k] are written to;
        positions beyond `start` + s are not read."""
        import torch
        from torch.nn import functional

        (b, s), d = tokens.shape, self.d
        at = start + torch.arange(s, device=self.device)
        cos, sin = (t[:, :, None].to(self.dtype) for t in self.rotary(self.plain["embed"], at[None]))
        hidden = torch.arange(keys.shape[3], device=self.device) > at[:, None]  # [s, S]
        x = self.plain["embed"][tokens]
        for i, products in enumerate(self.layers):
            name = f"model.layers.{i}."
            h = self._norm(x, name + "input_layernorm.weight").flatten(0, 1)
            qk, v = products["qkv"](h).view(b, s, self.q + 2 * self.kv, d).split([self.q + self.kv, self.kv], 2)
            q, k = (
                self._norm(part, f"{name}self_attn.{which}_norm.weight")
                for part, which in zip(qk.split([self.q, self.kv], 2), "qk", strict=True)
            )
            q, k = (part * cos + torch.cat([-part[..., d // 2 :], part[..., : d // 2]], -1) * sin for part in (q, k))
            keys[i].index_copy_(2, at, k.transpose(1, 2))
            values[i].index_copy_(2, at, v.transpose(1, 2))
            q = q.view(b, s, self.kv, -1, d).permute(0, 2, 3, 1, 4).reshape(b, self.kv, -1, d)  # [b, kv, rep·s, d]
            scores = (q @ keys[i].mT).float().view(b, self.kv, -1, s, keys.shape[3]) * d**-0.5
            share = scores.masked_fill_(hidden, -math.inf).softmax(-1).to(self.dtype).flatten(2, 3)
            mixed = (share @ values[i]).view(b, self.kv, -1, s, d).permute(0, 3, 1, 2, 4)
            x = x + products["o"](mixed.reshape(b * s, -1)).view_as(x)

            h = self._norm(x, name + "post_attention_layernorm.weight").flatten(0, 1)
            seen = h
            if self.noise:
                noise = torch.randn(h.shape, generator=self.generator, device=self.device)
                seen = h + (self.noise * h.float().square().mean(-1, keepdim=True).sqrt() * noise).to(self.dtype)
            gates, chosen = products["router"](seen).float().softmax(-1).topk(routes.shape[-1], -1)
            gates = gates / gates.sum(-1, keepdim=True)
            routes[i].index_copy_(1, at, chosen.view(b, s, -1).to(routes.dtype))
            order, ends, back = route_to_experts(self.config.num_experts, chosen)
            up = products["gate_up"](h[order // chosen.shape[-1]], ends)
            gate, up = up.chunk(2, -1)
            out = products["down"](functional.silu(gate) * up, ends)
            out = (out * gates.to(self.dtype).flatten()[order, None])[back].view(b * s, chosen.shape[-1], -1).sum(1)
            x = x + out.view_as(x)
        return self._norm(x[:, -1], "model.norm.weight") @ self.plain["head"].T

    def _draw(self, logits: Any) -> None:
        """The next token of each row, from softmax(logits), and its log-probability, into column `step`."""
        import torch

        logp = logits.float().log_softmax(-1)
        race = torch.empty_like(logp).exponential_(generator=self.generator)  # the smallest race / p wins
        token = (logp.exp() / race).argmax(-1, keepdim=True)
        self.tokens.index_copy_(1, self.step, token)
        self.logp.index_copy_(1, self.step, logp.gather(1, token))
        self.current.copy_(token)
        self.step += 1

    def _decode(self) -> None:
        """One step for all rows."""
        self._draw(self._forward(self.current, self.width + self.step - 1, self.keys, self.values, self.routes))

    def _open(self, width: int) -> None:
        """Buffers, and the graph of a step, once the prompts' width is known."""
        import torch

        self.width, config = width, self.config
        rows, total, layers = self.rows, width + self.length, config.num_hidden_layers

        def zeros(*shape: int, dtype: Any = torch.int64) -> Any:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.keys, self.values = (zeros(layers, rows, self.kv, total, self.d, dtype=self.dtype) for _ in range(2))
        self.routes = zeros(layers, rows, total, config.num_experts_per_tok, dtype=torch.uint8)
        self.tokens, self.logp = zeros(rows, self.length), zeros(rows, self.length, dtype=torch.float32)
        self.current, self.step = zeros(rows, 1), zeros(1)
        if not self.want_graph:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step.fill_(1)
                self._decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._decode()
        self.graph = graph

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Any, seed: int) -> Any:
        """`group_size` responses to each prompt; see `RolloutEngine`."""
        return self.play(prompts, group_size=group_size, sampling=sampling, seed=seed, environment=None)

    def play(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Any, seed: int, environment: Any
    ) -> Any:
        """The same, each response cut where the environment ends it."""
        import torch

        from minirl_edu.rollout import Rollout
        from minirl_edu.rollout.base import accept
        from minirl_edu.routing import Routes
        from minirl_edu.seeding import derive_seed

        (width, *others), rows = {len(prompt) for prompt in prompts}, len(prompts) * group_size
        if others or rows > self.rows or (sampling.max_new_tokens, sampling.temperature) != (self.length, 1.0):
            raise ValueError(
                f"prompts of widths {[width, *others]}, {rows} responses, {sampling}: this engine takes one width, at "
                f"most {self.rows} responses of {self.length} tokens, temperature 1"
            )
        with torch.inference_mode(False), torch.no_grad():
            if not self.width:
                self._open(width)
            self.generator.manual_seed(derive_seed(self.seed, "rollout", seed % 2**31))
            prompt = torch.tensor(prompts, device=self.device)
            shape, groups = (len(self.layers), len(prompts)), slice(0, rows)
            keys, values = (self.keys.new_zeros(*shape, *self.keys.shape[2:]) for _ in range(2))
            routes = self.routes.new_zeros(*shape, *self.routes.shape[2:])
            logits = self._forward(prompt, torch.zeros(1, dtype=torch.int64, device=self.device), keys, values, routes)
            for whole, part in ((self.keys, keys), (self.values, values), (self.routes, routes)):
                whole[:, groups] = part.repeat_interleave(group_size, 1)
            self.step.zero_()
            self._draw(torch.nn.functional.pad(logits.repeat_interleave(group_size, 0), (0, 0, 0, self.rows - rows)))
            for _ in range(self.length - 1):
                self._decode() if self.graph is None else self.graph.replay()

            tokens = self.tokens[groups]
            eos = torch.tensor(self.config.eos_token_id, device=self.device)
            ends = (tokens == eos).int()
            lengths = torch.where(ends.any(1), ends.argmax(1) + 1, self.length)
            if environment is not None:
                lengths = self._cut(tokens.tolist(), lengths.tolist(), group_size, environment).to(self.device)
            longest = int(lengths.max())
            mask = torch.arange(longest, device=self.device) < lengths[:, None]
            attention = torch.nn.functional.pad(mask, (width, 0), value=True)
            pad = self.config.pad_token_id
            rollout = Rollout(
                tokens=torch.cat([prompt.repeat_interleave(group_size, 0), tokens[:, :longest].where(mask, pad)], 1),
                attention_mask=attention,
                prompt_length=width,
                response_mask=mask,
                logp_rollout=self.logp[groups, :longest].where(mask, 0.0),
                routes=None,
                prompts=prompts,
                weight_version=self.version,
            )
            experts = self.routes[:, groups, : width + longest].permute(1, 2, 0, 3).contiguous()
            layers = tuple(range(len(self.layers)))
            return accept(dataclasses.replace(rollout, routes=Routes(experts, rollout.inputs, layers)))

    @staticmethod
    def _cut(responses: list[list[int]], lengths: list[int], group_size: int, environment: Any) -> Any:
        """The number of tokens after which each response is over."""
        import torch

        for row, (response, length) in enumerate(zip(responses, lengths, strict=True)):
            for count in range(1, length + 1):
                answer = environment(row // group_size, tuple(response[:count]))
                if answer:
                    raise ValueError("environment: it writes into a response; this engine takes those that end one")
                if answer is None:
                    lengths[row] = count
                    break
        return torch.tensor(lengths)


def make_engine(model: Any, world: World, *, exact: bool, seed: int) -> Engine:
    """The rollout engine, or, `exact`, the one that the trainer is scored with: no fp8 and no noise."""
    import torch

    on_card = world.device == "cuda"
    return Engine(
        model,
        kind="exact" if exact else "fp8" if on_card else "emulated",
        noise=0.0 if exact else world.noise,
        rows=world.prompts * 8,
        length=world.max_new_tokens,
        seed=seed,
        graph=world.graph,
        dtype=torch.bfloat16 if on_card else torch.float32,
    )


# ------------------------------------------------------------------------------------------------- cold start and runs


def cold_start(world: World, folder: Path) -> dict[str, Any]:
    """Imitate the teacher of `trail-experts` for as many steps as its cold start did, and save the model; returns what
    it can do. Its score, 0.10 on held-out problems, was near the teacher's own of 0.35²."""
    import torch

    from minirl_edu import cold_start as cold
    from minirl_edu.models import tiny_moe
    from minirl_edu.tasks import make_task

    task: Any = make_task("trail", max_new_tokens=world.max_new_tokens)
    ids = {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": task.tokenizer.pad_token_id}
    sizes = {"hidden": world.hidden, "heads": world.heads, "kv_heads": world.heads // 2, "layers": 2}
    sizes |= {"experts": 16, "top_k": 1, "expert_hidden": world.expert_hidden}
    model: Any = tiny_moe(len(task.tokenizer), seed=0, **sizes, **ids)
    model.to(world.device)
    use_grouped_products(model)
    started = time.perf_counter()
    # The whole training stands in one context: a cache of the weights in bf16 would keep those of the first step.
    with torch.autocast(world.device, torch.bfloat16, cache_enabled=False):
        losses = cold.cold_start(
            task, model, error_rate=0.65, steps=world.cold_steps, batch_size=32, seed=0, progress=False
        )
    taken = time.perf_counter() - started
    with torch.no_grad():
        found = cold.measure(task, model, problems=100 if world.device == "cuda" else 8)
    record = {"parameters": sum(p.numel() for p in model.parameters()), "steps": world.cold_steps, "metrics": found}
    record |= {"loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": taken}
    cold.save_cold_start(folder, model, task, record)
    return record


def use_grouped_products(model: Any) -> None:
    """Give `model` the experts' products of this file."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("grouped_in_autocast", experts_in_autocast)
    model.set_experts_implementation("grouped_in_autocast")


def make_config(world: World, variant: str, ends: str, seed: int, model: str) -> Any:
    """The config of `trail_experts` and the variant, at this world's size."""
    from minirl_edu.experiments.spec import load_spec

    spec = load_spec()
    setting = spec.settings[SETTING]
    larger = {
        "model.name": model,
        "task.options.ends": ends,
        "task.options.max_new_tokens": world.max_new_tokens,
        "train.mini_batch_prompts": world.prompts,
        "train.global_steps": world.updates,
        "train.warmup_steps": world.warmup,
        "train.lr": world.lr,
        "train.tokens_per_micro_batch": world.micro_tokens,
        "eval.every": 0,
        "eval.problems": 100 if world.device == "cuda" else 8,
        "eval.samples": world.eval_samples,
        "rollout.router_noise": world.noise,
    }
    changed = dataclasses.replace(setting, overrides={**setting.overrides, **larger})
    spec = dataclasses.replace(spec, settings={**spec.settings, SETTING: changed})
    return spec.config("full", SETTING, variant, seed)


def one_run(
    world: World, variant: str, ends: str, seed: int, model_folder: str, limit: float = math.inf
) -> dict[str, Any]:
    """Train one variant on one seed; returns its line. A run that diverges says so and keeps what it has; so does one
    that is cut off after `limit` seconds."""
    import torch

    from minirl_edu.models import load_model
    from minirl_edu.rollout import play
    from minirl_edu.trainer import MiniRLTrainer, TrainingDiverged

    started = time.perf_counter()
    gc.collect()  # what the run before left on the card
    config = make_config(world, variant, ends, seed, model_folder)
    model: Any = load_model(model_folder)
    model.to(world.device)
    use_grouped_products(model)
    engine, clean = (make_engine(model, world, exact=exact, seed=seed) for exact in (False, True))
    updates = world.updates if ends == "right" else world.contrast_updates
    found: dict[str, Any] = {"scores": [], "diverged": None}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniRLTrainer(config, Path(folder, "run"), model=model, engine=engine, progress=False)
        problems, prompts = trainer.prompts.held_out()

        def evaluate(step: int) -> None:
            clean.sync(trainer.unwrapped, version=step)
            scores = {"grad_step": step}
            for name, one in (("", clean), ("_rollout", engine)):
                scores |= trainer._scored(problems, partial(play, one, prompts), name)
            found["scores"].append(scores)

        try:
            for step in range(updates + 1):
                if time.perf_counter() - started > limit:
                    found["error"] = f"cut off after {step - 1} of {updates} updates"
                    break
                if step:
                    lines += trainer.global_step()
                if ends == "right" and (step % world.eval_every == 0 or step == updates):
                    evaluate(step)
        except TrainingDiverged as error:
            found["diverged"] = str(error)
        trainer._close()
    curves = {name: [_short(line.get(name)) for line in lines] for name in CURVES}
    found |= {"updates": len(lines), "curves": curves, "graph": engine.graph is not None, "products": engine.kind}
    found["grouped_fp8"] = engine.kind == "fp8" and has_grouped_fp8()
    found |= {"card": world.device, "torch": torch.__version__}
    if world.device == "cuda":
        found["card"] = torch.cuda.get_device_name()
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {**found, "run_seconds": round(time.perf_counter() - started, 1)}


def _short(value: float | None) -> float | None:
    """Four digits of a number, None if there is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


# ------------------------------------------------------------------------------------------------------------- summary


def as_result(line: dict[str, Any]) -> Any:
    """A line as `experiments` reads a run."""
    import numpy as np

    from minirl_edu.experiments.spec import COLUMNS, RunResult

    rows: list[dict[str, Any]] = [dict(score) for score in line["scores"][:1]]
    scored = {score["grad_step"]: score for score in line["scores"][1:]}
    for i in range(line["updates"]):
        step = {name: values[i] for name, values in line["curves"].items()}
        rows.append({"grad_step": i + 1, "global_step": i + 1, **step, **scored.get(i + 1, {})})
    columns = {
        name: np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=float)
        for name in COLUMNS
    }
    return RunResult(line["seed"], columns, line["diverged"], "", line["run_seconds"])


def third(line: dict[str, Any], name: str, which: int, window: int) -> float:
    """Mean of a curve over its first (0) or second (1) `window` updates."""
    values = [v for v in line["curves"][name][which * window : (which + 1) * window] if v is not None]
    return sum(values) / len(values) if values else math.nan


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs that ended: means and spreads, predicted and measured drift in pairs, the verdicts on F1*-both."""
    import numpy as np

    from minirl_edu.experiments import claims, prediction
    from minirl_edu.experiments.spec import load_spec
    from minirl_edu.experiments.statistics import mean_effect
    from minirl_edu.experiments.statistics import summary as of_run

    done = [line for line in lines if finished(line)]
    done = [line for line in done if line["size"] == done[-1]["size"]]
    spec, window = load_spec(), max((line["updates"] for line in done), default=3) // 3
    right = {v: [as_result(x) for x in done if (x["variant"], x["ends"]) == (v, "right")] for v in (*MAIN, *LATER)}
    found: dict[str, Any] = {"check": "summary", "window": window, "variants": {}, "drift": {}}
    for variant, runs in right.items():
        numbers = [of_run(run, spec.definitions) for run in runs]
        keys = ("first_score", "best_score", "final_score", "final_score_rollout", "final_entropy", "kl", "collapsed")
        means = {key: np.array([float(n[key]) for n in numbers]) for key in keys}
        found["variants"][variant] = {"seeds": [run.seed for run in runs]} | {
            key: [_short(values.mean()), _short(values.std(ddof=1) if len(values) > 1 else math.nan)]
            for key, values in means.items()
            if len(values)
        }
    pairs = []
    for ends in ("right", *CONTRASTS):
        both = {v: {x["seed"]: x for x in done if (x["variant"], x["ends"]) == (v, ends)} for v in ("minirl", "no_is")}
        own = [
            prediction.Pair(
                third(both["minirl"][seed], "entropy_drift", 0, window),
                third(both["no_is"][seed], "entropy", 1, window) - third(both["minirl"][seed], "entropy", 1, window),
            )
            for seed in sorted(both["minirl"].keys() & both["no_is"].keys())
        ]
        own = [pair for pair in own if all(map(math.isfinite, pair))]
        if own:
            effect = mean_effect(np.array([pair.measured for pair in own]))
            found["drift"][ends] = {
                "first_cov": [_short(line["curves"]["length_reward_cov"][0]) for line in both["minirl"].values()],
                "pairs": [[_short(x) for x in pair] for pair in own],
                "measured": [_short(x) for x in (effect.estimate, effect.low, effect.high)],
                "same_sign": sum(pair.predicted * pair.measured > 0 for pair in own),
            }
        pairs += own
    if len(pairs) >= 4:
        found["agreement"] = prediction.agreement(pairs)._asdict()
    judged = dataclasses.replace(spec, claims=tuple(c for c in spec.claims if c.side == "both"))
    results = {(SETTING, variant): runs for variant, runs in right.items() if runs}
    found["claims"] = {
        judgement.claim.id: [
            f"{f.criterion.kind} {f.criterion.metric or ''} {f.criterion.run[1]}: {f.outcome}, {f.text}"
            for f in judgement.findings
        ]
        for judgement in claims.judge(judged, results)
    }
    return found


# ------------------------------------------------------------------------------------------------------------- running


def plan(seeds: int, later: bool = True) -> list[tuple[str, str, int]]:
    """The runs in their order: (variant, ends, seed)."""
    main = [(variant, "right", seed) for seed in range(seeds) for variant in MAIN]
    pairs = [(variant, ends, seed) for seed in range(seeds) for ends in CONTRASTS for variant in ("minirl", "no_is")]
    return main + (pairs + [(variant, "right", seed) for seed in range(seeds) for variant in LATER] if later else [])


class Worker:
    """A process that makes one run after the other, so that imports and the card's start are paid for once."""

    def __init__(self, world: World) -> None:
        environment = {
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"},
            **{"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_MIXED_PRECISION": "bf16"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        line = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(dataclasses.asdict(world))]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.said: queue.Queue[str] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                self.said.put(line[7:])
        self.said.put("")

    def ask(self, job: Sequence[Any], limit: float) -> dict[str, Any]:
        """The result of a job, or what went wrong: then the process is gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        try:
            said = self.said.get(timeout=max(1.0, limit))
        except queue.Empty:
            self.close()
            return {"error": f"not done after {limit:.0f} s"}
        if said:
            return json.loads(said)
        self.errors.seek(0)
        error = {"error": f"the process ended: {self.errors.read()[-1500:]}"}
        self.close()
        return error

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.listener.join()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):  # what was not yet written to a process that is gone
                stream.close()  # type: ignore[union-attr]


def work(world: World) -> None:
    """The loop of a worker: a job a line on stdin, a result a line on stdout."""
    import torch

    import minirl_edu.trainer  # noqa: F401 (imports and the card's start, while another makes the cold start)

    torch.zeros(1, device=world.device)
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "cold": lambda folder: cold_start(world, Path(folder)),
        "run": lambda *job: one_run(world, *job),
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            found = jobs[name](*arguments)
        except Exception:
            found = {"error": traceback.format_exc()[-1500:]}
        print("RESULT " + json.dumps(found), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing and print a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to which results are appended")
    parser.add_argument("--mini", action="store_true", help="on the CPU, in miniature")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing is running")
    parser.add_argument("--seeds", type=int, help="of each variant (8; in miniature 1)")
    parser.add_argument("--only", nargs="+", help="runs, as variant or variant/ends")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="another size, such as workers=4")
    parser.add_argument("--summary", action="store_true", help="only judge what is in the file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work(World(**json.loads(arguments.worker)))
        return 0
    if arguments.out is None:
        parser.error("--out: say where the results go")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.summary:
        sizes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in arguments.set)}
        seeds = arguments.seeds or (1 if arguments.mini else 8)
        Runs(dataclasses.replace(MINI if arguments.mini else World(), **sizes), arguments.out, arguments.budget).make(
            [job for job in plan(seeds) if not arguments.only or {job[0], "/".join(job[:2])} & set(arguments.only)]
        )
    lines = read(arguments.out)
    try:
        found = summary(lines)
    except Exception:  # the runs are worth more than their summary, which can be made again
        found = {"check": "summary", "error": traceback.format_exc()[-1500:]}
    append(arguments.out, found)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return int("error" in found or not any(map(finished, lines)))


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file, none if there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def finished(line: dict[str, Any]) -> bool:
    """Whether a line is a run that was not cut off and did not fail."""
    return "curves" in line and "error" not in line


def append(file: Path, line: dict[str, Any]) -> None:
    """One line more."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line) + "\n")


class Runs:
    """The missing runs of a results file, made by `world.workers` processes within `budget` seconds."""

    def __init__(self, world: World, out: Path, budget: float) -> None:
        self.world, self.out, self.end = world, out, time.monotonic() + budget
        self.folder = out.with_suffix(".cold-start")
        self.lock, self.longest, self.failures = threading.Lock(), 0.0, 0

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.monotonic()

    def make(self, jobs: Sequence[tuple[str, str, int]]) -> None:
        """Make the cold start and the jobs that no line of the file has."""
        done = [x for x in read(self.out) if finished(x) and x["size"] == self.world.size]
        known = {(x["variant"], x["ends"], x["seed"]) for x in done}
        self.waiting = [job for job in jobs if job not in known]
        workers = [Worker(self.world) for _ in range(min(self.world.workers, len(self.waiting)))]  # import meanwhile
        try:
            if workers and not (self.folder / "cold_start.json").exists():
                found = workers[0].ask(["cold", str(self.folder)], min(self.left, 3 * self.world.limit))
                append(self.out, {"check": "cold_start", **found})
                print(json.dumps(found), flush=True)
                if "error" in found or (self.world.device == "cuda" and not found["metrics"]["solvable"]):
                    return  # RL has nothing to reinforce
            threads = [threading.Thread(target=self._serve, args=(worker,)) for worker in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in workers:
                worker.close()

    def _serve(self, worker: Worker) -> None:
        """Give one worker job after job. After an error it is replaced: its card's state may be broken."""
        while True:
            with self.lock:
                hopeless = self.failures > 3 and not self.longest  # no run has ended
                if not self.waiting or self.left < max(5.0, 1.1 * self.longest) or hopeless:
                    break
                variant, ends, seed = self.waiting.pop(0)
            if not worker.alive:
                worker = Worker(self.world)
            started = time.monotonic()
            limit = min(self.world.limit, self.left)
            found = worker.ask(["run", variant, ends, seed, str(self.folder), limit - 8], limit)
            seconds = time.monotonic() - started
            with self.lock:
                if error := found.get("error"):
                    self.failures += 1
                    worker.close()
                    if self.world.graph and any(word in error for word in ("captur", "CUDAGraph", "graph.replay")):
                        self.world = dataclasses.replace(self.world, graph=False)
                        self.waiting.insert(0, (variant, ends, seed))
                else:
                    self.longest = max(self.longest, seconds)
                known = {"check": "run", "variant": variant, "ends": ends, "seed": seed, "size": self.world.size}
                append(self.out, {**known, **found})
                score = [_short(x["score"]) for x in found.get("scores", [])]
                updates = sorted(found.get("curves", {}).get("seconds", [])) or [0.0]
                pace = f"{updates[len(updates) // 2]:.2f} s an update, {self.left:.0f} s left"
                text = error or f"score {score[:1]} to {score[-1:]}, {pace}"
                print(f"{variant:12}{ends:6} seed {seed}  {seconds:6.1f} s  {text}", flush=True)
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
