"""Bytes of a GPU and of its machine: what each part of a run holds, and when.

Activations and logits come from the training engine's own forward and backward, run on tensors without data.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils

from minirl_edu.config import ConfigError
from minirl_edu.lm_head import head_logprobs
from minirl_edu.models import recompute_activations
from minirl_edu.plan.setting import MicroBatch, Setting
from minirl_edu.plan.sizes import (
    ModelStats,
    Number,
    heads_of,
    kv_cache_bytes,
    layer_types,
    rollout_bytes_per_token,
    size_text,
)

VLLM_SEQUENCES, VLLM_TOKENS = 1024, 8192
"""How many sequences, and how many tokens of prompts, vLLM computes at once unless told otherwise (0.32's server on
GPUs of 70 GiB and more: `default_max_num_seqs` and its neighbour in vllm/engine/arg_utils.py)."""


PHASES = ("always", "rollout", "update", "sync", "evaluation")
PLACES = ("trainer", "server")


class Item(NamedTuple):
    """Bytes of one GPU of a place (`PLACES`): what for, in which of `PHASES`, and how that was found."""

    name: str
    phase: str
    bytes: Number
    how: str
    place: str = "trainer"


class PassMemory(NamedTuple):
    """Bytes that a pass takes at its peak, beside parameters.

    kept      for the backward, from the forward on       logits   of the head, and what is made of them
    working   all other: a layer's own, then its gradients, which come and go
    """

    kept: int
    working: int
    logits: int


class Ledger(TorchDispatchMode):
    """Notes when memory is taken and given back, and whether it is `for_logits`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.for_logits = False
        self.events: list[tuple[int, int]] = []  # which storage; bytes taken, or given back if negative
        self.logits: set[int] = set()
        self.forward = 0  # events until the forward ended
        self.keys = weakref.WeakKeyDictionary({tensor.untyped_storage(): -1 for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _grouped_mm if func is torch.ops.aten._grouped_mm.default else func
        out = own(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            if (storage := tensor.untyped_storage()) not in self.keys:
                self.keys[storage] = key = len(self.events)
                self.events.append((key, storage.nbytes()))
                weakref.finalize(storage, self.events.append, (key, -storage.nbytes()))
                if self.for_logits:
                    self.logits.add(key)
        return out

    def peak(self, leave_out: set[int]) -> PassMemory:
        """Bytes when most are taken."""
        others = logits = kept = 0
        best = (0, 0)
        for i, (key, size) in enumerate(self.events, 1):
            if key not in leave_out:
                if key in self.logits:
                    logits += size
                else:
                    others += size
                if others + logits > sum(best):
                    best = (others, logits)
            if i == self.forward:
                kept = others
        kept = min(kept, best[0])
        return PassMemory(kept, best[0] - kept, best[1])


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """An output of the right shape: without data, torch's own function takes bf16 only."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(a.shape[-2], b.shape[-1])


@lru_cache(maxsize=256)
def working_memory(
    model: ModelStats, implementations: tuple[str, str | None], batch: MicroBatch, **settings: Any
) -> PassMemory:
    """What a pass takes at its peak; `settings` are the keyword arguments of `_trace`, all of them.

    Layers that repeat each keep as much as the first ones: a model of two periods and one of three tell of all.
    """
    layers, period = model.config.num_hidden_layers, _period(model)
    if layers > 3 * period and layers % period == 0:
        two, three = (_trace(_first_layers(model, n * period), implementations, batch, **settings) for n in (2, 3))
        if (two.working, two.logits) == (three.working, three.logits):
            kept = three.kept + (layers // period - 3) * (three.kept - two.kept)
            return PassMemory(kept, three.working, three.logits)
    return _trace(model.config, implementations, batch, **settings)


def _period(model: ModelStats) -> int:
    """After how many decoder layers kinds and sizes repeat."""
    layers = model.config.num_hidden_layers
    kinds = list(zip(layer_types(model.config), model.units[:layers], strict=False))
    return next(p for p in range(1, layers + 1) if kinds[p:] == kinds[:-p])


def _first_layers(model: ModelStats, count: int) -> PreTrainedConfig:
    """The config of a model with the first `count` layers."""
    fields: dict[str, Any] = model.config.to_dict() | {"num_hidden_layers": count}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:count]
    return type(model.config).from_dict(fields)


def _trace(
    config: PreTrainedConfig,
    implementations: tuple[str, str | None],
    batch: MicroBatch,
    *,
    dtype: str,
    autocast: bool,
    train: bool,
    checkpointing: bool,
    with_gradients: bool,
) -> PassMemory:
    """What a pass through all the layers of a config takes at its peak.

    The model runs on tensors that have shapes and lifetimes but no data. `train`: forward and backward, up to the
    log-probabilities; otherwise the layers' forward, as an engine reads prompts. `with_gradients`: count a parameter's
    gradient from its computation until it is added to the one that is kept.
    The experts' loop over those that were hit needs data: the grouped product stands for it, whose matrices have the
    same rows. torch's own fused attention stands for flash attention, which keeps as much.
    """
    attention, experts = implementations
    attention = attention if attention in ("sdpa", "eager") else "sdpa"
    with FakeTensorMode(), torch.device("cpu"), _nothing_packed():
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if experts == "batched_mm":
            network.set_experts_implementation(experts)
        network.eval()
        if checkpointing:
            recompute_activations(network)
        inputs, predictor = _inputs(batch)
        added = set[int]()  # storages of gradients on their way
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_hook(lambda gradient: added.add(ledger.keys[gradient.untyped_storage()]))
        kept = [tensor for parameter in network.parameters() for tensor in (parameter, parameter.grad)]
        ledger = Ledger([*kept, *network.buffers(), *inputs.values(), predictor])
        with ledger, torch.set_grad_enabled(train):
            if batch.kind == "shared":
                inputs["attention_mask"] = inputs["attention_mask"].to(network.dtype).clamp(min=-1.0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = network.base_model(**inputs, use_cache=False).last_hidden_state
                if not train:
                    return ledger.peak(set())
                ledger.for_logits = True
                states = hidden.flatten(0, 1).index_select(0, predictor)
                states.register_hook(lambda _: setattr(ledger, "for_logits", False))
                head, targets = network.get_output_embeddings(), predictor.new_zeros(len(predictor))
                logp = head_logprobs(states, head.weight, head.bias, targets)[0]
            del hidden, states
            ledger.forward = len(ledger.events)
            logp.sum().backward()
        return ledger.peak(set() if with_gradients else added)


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """Keep transformers from building masks for several sequences in a row: it looks for those in the positions, and
    takes them for granted where it cannot look."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def _inputs(batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The `inputs` and the `predictor` of a layout."""
    slots = torch.zeros(batch.rows, batch.columns, dtype=torch.int64)
    inputs = {"input_ids": slots, "position_ids": slots.clone()}
    if batch.kind == "shared":
        inputs["attention_mask"] = torch.zeros(batch.rows, 1, batch.columns, batch.columns)
    elif batch.kind == "padded":
        inputs["attention_mask"] = torch.zeros(batch.rows, batch.columns, dtype=torch.bool)
    return inputs, torch.zeros(batch.predicted, dtype=torch.int64)


def trainer_memory(s: Setting) -> list[Item]:
    """What the trainer's process on rank 0 holds."""
    config, model, batch, ep, slack = s.config, s.model, s.batch, s.config.model.expert_parallel, s.hardware.slack
    share = model.total * s.master / (s.gpus if s.sharded else 1)
    of = f"{model.total / 1e9:.3g} B × {s.master} bytes" + (f" / {s.gpus}" if s.sharded else "")
    items = [
        Item("process", "always", s.hardware.runtime, "before the first tensor"),
        Item("weights", "always", share, of),
        Item("optimizer", "always", 2 * share, "Adam's two moments, each as large as the weights"),
        Item("gradients", "update", share, "as large as the weights"),
    ]
    if s.sharded:
        first, second = sorted((n - e + e / ep for n, e in model.units), reverse=True)[:2]
        gathered, gradients = slack * (first + second) * s.compute, slack * 2 * first * s.compute
        items.append(Item("gathered weights", "update", gathered, "FSDP2's two largest units, whole"))
        items.append(Item("gathered gradients", "update", gradients, "one unit's, and a copy to send"))
    if s.sharding == "ddp":
        items.append(Item("gradient buckets", "always", share, "DDP's copy of the gradients, to send"))

    taken = pass_memory(s, batch, train=True)
    recomputed = config.model.gradient_checkpointing
    how = f"{batch.rows} × {batch.columns} tokens ({batch.kind}), " + ("layers recomputed" if recomputed else "kept")
    how += ", their inputs in host memory" if config.model.offload_activations else ""
    items.append(Item("activations", "update", slack * max(0, taken.kept - offloaded(s)), how))
    items.append(Item("working memory", "update", s.hardware.gaps * taken.working, "of a layer, forward and backward"))
    whole = size_text(4 * batch.predicted * model.config.vocab_size)
    items.append(Item("logits", "update", slack * taken.logits, f"in chunks, at that moment; all at once: {whole}"))
    if ep > 1:
        sent = batch.rows * batch.columns * model.top_k * model.config.hidden_size * s.compute
        copies = 3 * (1 if recomputed else model.moe_layers)
        items.append(Item("expert dispatch", "update", slack * copies * sent, "tokens sent, received and sent back"))

    slots, groups = batch.rows * batch.columns, math.ceil(s.prompts / s.gpus)
    if s.hardware.name == "cpu":
        whole, share, how = rollout_memory(s)
        items.append(Item("rollout", "update", whole + share, how))
    else:
        items.append(Item("micro-batch", "update", slots * _laid_out(s), f"{slots} tokens, the rest is in host memory"))
    if batch.kind == "shared":
        groups = groups if s.hardware.name == "cpu" else batch.rows
        masks = 4 * groups * batch.columns**2
        items.append(Item("attention masks", "update", masks, f"{groups} groups × {batch.columns}² × 4 bytes"))
    whole = model.largest * (s.engine + s.master * s.sharded)
    items.append(Item("sync buffer", "sync", whole, "the largest parameter, whole: one goes at a time"))
    if s.evaluation_copy and (config.rollout.engine == "hf" or s.hardware.name == "cpu"):
        items.append(Item("copy for evaluation", "always", model.total * s.loaded, "eval.through_trainer, on rank 0"))
    return items


def offloaded(s: Setting) -> int:
    """Bytes of the layers' inputs that `model.offload_activations` keeps off a GPU: layers × tokens × hidden."""
    config = s.model.config
    if not s.config.model.offload_activations:
        return 0
    return config.num_hidden_layers * s.batch.rows * s.batch.columns * config.hidden_size * s.compute


def _laid_out(s: Setting) -> int:
    """Bytes of a token of a micro-batch: what a rollout has of it, six int64 numbers of its layout, log π_old, and the
    experts that the update uses."""
    *rest, routes = rollout_bytes_per_token(s.model).values()
    used = s.config.algorithm.replay != "none" or s.config.engine_routes
    return sum(rest) + 48 + 4 + (routes if used else 0) + s.rollout_bytes["routes"]


def rollout_memory(s: Setting) -> tuple[Number, Number, str]:
    """Bytes that a rollout takes of the memory of rank 0's process, then what each rank takes for its share of it: the
    rows, and what its micro-batches add. And how that was found."""
    tokens, bytes_of = s.responses * (s.prompt_tokens + s.max_new_tokens), sum(s.rollout_bytes.values())
    how = f"{tokens} tokens × {bytes_of} bytes, and what is cut of it"
    return tokens * bytes_of, tokens / s.gpus * _laid_out(s), how


def pass_memory(s: Setting, batch: MicroBatch, *, train: bool) -> PassMemory:
    """What a pass over `batch` takes in the setting's number formats. Raises ConfigError for an attention
    implementation that the model lacks.
    """
    settings, bf16 = s.config.model, s.mixed_precision == "bf16"
    dtype = settings.dtype
    if (train and s.sharded and bf16) or (not train and s.engine < s.loaded):
        dtype = "bfloat16"  # FSDP2 casts the weights that it gathers; vLLM has its own
    try:
        return working_memory(
            s.model,
            (settings.attn_implementation, settings.experts_implementation),
            batch,
            dtype=dtype,
            autocast=train and bf16 and not s.sharded,
            train=train,
            checkpointing=train and settings.gradient_checkpointing,
            with_gradients=not s.sharded,
        )
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation = {settings.attn_implementation!r}: {error}") from error


def engine_memory(s: Setting, trainer: list[Item]) -> tuple[list[Item], int]:
    """What the rollout engine holds, and how many responses of the mean length it samples at once.

    `hf` samples all at once. vLLM fills what `trainer` leaves, or what `rollout.options` say, and lets the rest wait.
    """
    engine, options, place, gpus = s.config.rollout.engine, s.config.rollout.options, s.engine_place, s.server_gpus
    slack, own = s.hardware.slack, "rollout" if engine == "vllm_server" else "always"
    rows, prompts = s.responses, s.prompts
    if engine != "hf":
        rows = min(rows, options.get("max_num_seqs", VLLM_SEQUENCES))
        prompts = min(prompts, max(1, options.get("max_num_batched_tokens", VLLM_TOKENS) // s.prompt_tokens))
    reading = pass_memory(s, MicroBatch("causal", prompts, s.prompt_tokens, 0), train=False).working
    weights, sampling = s.model.total * s.engine / gpus, 4 * rows * s.model.config.vocab_size * 4
    items = [
        Item("engine's weights", own, weights, f"{s.model.total / 1e9:.3g} B × {s.engine} bytes / {gpus}", place),
        Item("prompts", "rollout", slack * reading / gpus, f"{prompts} × {s.prompt_tokens} tokens at once", place),
        Item("sampling", "rollout", slack * sampling, f"{rows} × vocabulary × 4 bytes, four times", place),
    ]
    if engine == "vllm_server":  # its process stays while it sleeps
        items.append(Item("engine's process", "always", s.hardware.runtime, "before the first tensor", place))

    copies = min(gpus, heads_of(s.model.config)[1])  # GPUs share the heads; more GPUs than heads hold the same
    longest, mean = (
        kv_cache_bytes(s.model.config, s.prompt_tokens + length, s.kv_itemsize) / copies
        for length in (s.max_new_tokens, s.response_tokens)
    )
    evaluated = s.evaluated if s.config.eval.every and s.config.eval.through_trainer else 0
    size, at_once = max(s.responses, evaluated) * longest, s.responses
    if engine != "hf":
        if evaluated and not s.sharded:  # by the trainer, all at once
            cache = evaluated * kv_cache_bytes(s.model.config, s.prompt_tokens + s.max_new_tokens, s.loaded)
            items.append(
                Item("KV cache", "evaluation", slack * cache, f"{evaluated} responses, by the trainer's model")
            )
        if engine == "vllm_server":
            taken = sum(i.bytes for i in [*trainer, *items] if i.place == place and i.phase in ("always", "rollout"))
            size = min(s.responses * longest, math.floor(s.memory - taken))
        elif s.hardware.name == "cpu":
            window = options.get("max_model_len") or s.model.config.max_position_embeddings
            sequence = kv_cache_bytes(s.model.config, window + 256, s.kv_itemsize)
            size = options.get("kv_cache_bytes") or max(sequence, min(64 * sequence, 2**30))  # VLLMEngine's default
        else:  # reserved at the start
            size = options.get("kv_cache_bytes") or options.get("gpu_memory_utilization", 0.92) * s.memory - weights
        size = max(size, longest)
        at_once = max(1, min(rows, int(size / mean)))
    how = f"{at_once} of {s.responses} sequences at once"
    phase = "always" if engine == "vllm" else "rollout"
    return [*items, Item("KV cache", phase, size * (slack if engine == "hf" else 1), how, place)], at_once


def host_memory(s: Setting) -> dict[str, Number]:
    """Of rank 0's machine. Rank 0 alone loads a model that accelerate shards, as the configs of scale/accelerate have
    it; otherwise every process does."""
    if s.hardware.name == "cpu":
        return {}
    whole = s.model.total * s.loaded
    processes = min(s.gpus, s.hardware.per_node)
    rollout, share, _ = rollout_memory(s)
    alone = s.sharded and s.config.model.expert_parallel == 1
    found: dict[str, Number] = {
        "model, as it is loaded": whole * (1 if alone else processes),
        "rollout, on rank 0's machine": rollout + share * processes,
    }
    if inputs := offloaded(s):
        found["layers' inputs, of all processes"] = inputs * processes
    if s.config.rollout.engine == "vllm_server" and s.placement == "colocated":
        found["weights of the sleeping server"] = s.model.total * s.engine
    if s.evaluation_copy and s.config.rollout.engine != "hf":
        found["copy for evaluation"] = whole
    return found
