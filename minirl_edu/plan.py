"""What a run will need, before anything is started: memory of each GPU, time and traffic of a global step.

    weights, gradients, Adam   counted on the model itself, built on the meta device: right for any architecture
    activations, logits        the training engine's own forward and backward, run on tensors without data
    everything else            arithmetic; each line of the table says which

The plan is for the fullest GPU (rank 0's, with the rollout beside its share) and the dearest case: every response as
long as it may be, every group with a gradient. Times are lower bounds: no product is faster than the chip's peak, no
read than its memory. Real steps take a multiple.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils

from minirl_edu.config import Config, ConfigError, ModelConfig, load_config, save_config
from minirl_edu.logprobs import CHUNK, _HeadLogprobs
from minirl_edu.models import SMOLLM2, architecture_file, load_architecture, load_tokenizer
from minirl_edu.rollout import VLLM_DTYPES
from minirl_edu.routing import RoutingReplay, UnsupportedRouter
from minirl_edu.tasks import TASKS, ChainTask, Task, make_task

Number = int | float
"""Bytes, seconds and counts are whole or not."""

RUNTIME = 1.5e9
"""Bytes that a process takes of a GPU before its first tensor (CUDA context, cuBLAS, NCCL): an allowance, not measured
here. On CPUs it is measured (`this_machine`)."""

SLACK = 1.1
"""Memory taken over memory in use, for blocks that come and go, because allocators leave gaps: an allowance for GPUs,
not measured here."""

GAPS = 3.0
"""The same on CPUs, for what a layer's forward and backward take and free: what lies between blocks still in use,
glibc's heap does not return to the system. Chosen for the runs in tests/test_plan.py."""

PROMPT_TOKENS = 512
"""Length of a prompt where the plan knows the model, but only the hub its tokenizer: that is not asked."""

VLLM_SEQUENCES, VLLM_TOKENS = 1024, 8192
"""How many sequences, and how many tokens of prompts, vLLM computes at once unless told otherwise (0.32's server on
GPUs of 70 GiB and more: `default_max_num_seqs` and its neighbour in vllm/engine/arg_utils.py)."""

# ----------------------------------------------------------------------------------------------------------- hardware


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU, and how several are connected.

    bf16, fp32   FLOP/s of dense matrix products       memory   bytes
    bandwidth    bytes/s of its memory                 nvlink   bytes/s to the machine's other GPUs, one direction
    per_node     GPUs in a machine                     network  bytes/s to other machines per GPU, one direction
    runtime      bytes that a process takes at once    slack    bytes taken over bytes in use
    gaps         the same, for a layer's working memory
    keeps_freed  whether the phases of a step add up, since what one frees stays with the process
    """

    name: str
    bf16: Number
    fp32: Number
    bandwidth: Number
    memory: Number
    nvlink: Number
    network: Number
    per_node: int = 8
    runtime: Number = RUNTIME
    slack: Number = SLACK
    gaps: Number = SLACK
    keeps_freed: bool = False


HARDWARE = {
    "h100": Hardware("h100", 989e12, 67e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Hardware("h200", 989e12, 67e12, 4.8e12, 141e9, 450e9, 50e9),
    "a100": Hardware("a100", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, 25e9),
}
"""SXM modules. NVIDIA's data sheets of H100, H200 and A100 80GB: bf16 on tensor cores without sparsity, fp32 without
TF32, NVLink's 900 (A100: 600) GB/s halved, as they count both directions. Network: DGX machines have an adapter of 400
Gb/s (A100: 200) for each GPU."""


def this_machine(config: Config) -> Hardware:
    """This machine, as `cpu`. Measured in a fresh process on as many threads as OMP_NUM_THREADS allows: FLOP/s, bytes/s
    of a copy, and the resident memory of a process that imported what this run's training imports and made its task.

    glibc returns freed blocks below 32 MiB to the system only from the end of its heap, so the phases add up.
    """
    with tempfile.TemporaryDirectory(prefix="minirl-plan-") as folder:
        save_config(config, path := Path(folder) / "config.yaml")
        program = (
            "import sys, minirl_edu.report, minirl_edu.trainer, minirl_edu.plan as plan; plan._measure(sys.argv[1])"
        )
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"measuring this machine failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flops, copy = found["flops"], found["bandwidth"]
    return Hardware(
        "cpu", flops, flops, copy, memory, copy, copy, runtime=found["resident"], slack=1.0, gaps=GAPS, keeps_freed=True
    )


def _measure(path: str) -> None:
    """In a fresh process: print what `this_machine` asks for."""
    config = load_config(path)
    task = None if _on_the_hub(config) else _task(config)  # kept, with the modules that it imports
    if config.rollout.engine == "vllm":
        import vllm  # noqa: F401
    square, copied = torch.ones(1024, 1024), torch.ones(2**25)

    def best(run: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    flops = 2 * len(square) ** 3 / best(lambda: square @ square)
    bandwidth = 2 * copied.nbytes / best(copied.clone)
    del copied
    # Not getrusage's ru_maxrss: a child inherits that from the process that started it.
    resident = 1024 * int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[0])
    print(json.dumps({"flops": flops, "bandwidth": bandwidth, "resident": resident, "task": task and task.name}))


# -------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Parameter counts of a model, taken from the model itself, built without data.

    total      all; tied ones once                 experts      of all experts together
    embedding  the input table                     num_experts  E, 0 for a dense model
    head       the output matrix, 0 where tied     top_k        k, experts that serve a token
    largest    the largest parameter               moe_layers   layers with experts
    units      (parameters, the experts' among them) of each module that FSDP2 gathers as a whole
    """

    config: PreTrainedConfig
    total: int
    embedding: int
    head: int
    experts: int
    num_experts: int
    top_k: int
    moe_layers: int
    largest: int
    units: tuple[tuple[int, int], ...]

    @property
    def non_embedding(self) -> int:
        """Without input and output embeddings, as Qwen counts: 29.9 B of Qwen3-30B-A3B."""
        return self.total - self.embedding - self.head

    @property
    def active(self) -> Number:
        """Parameters that serve a token: total − experts · (1 − k/E). Both embeddings count, as in Qwen's 3.3 B."""
        return self.total - self.experts * (1 - self.top_k / max(self.num_experts, 1))

    @property
    def multiplied(self) -> Number:
        """Active parameters that a token is multiplied with: without the input table, which is looked up. OpenAI counts
        so: 3.61 B of gpt-oss-20b. A table that is tied to the head counts, as the head."""
        return self.active - (self.embedding if self.head else 0)


def anatomy(settings: ModelConfig) -> Anatomy:
    """The counts of the model that a config's `model` section names. Raises ConfigError where it cannot be built."""
    return _anatomy(settings.name, json.dumps(settings.overrides), settings.trust_remote_code)


@lru_cache(maxsize=16)
def _anatomy(name: str, overrides: str, trust_remote_code: bool) -> Anatomy:
    try:
        config = load_architecture(name, json.loads(overrides), trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dissect(config, trust_remote_code=trust_remote_code)


def dissect(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Anatomy:
    """The counts of the causal LM that has this config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    try:
        routers = RoutingReplay(model)
        num_experts, top_k, moe_layers = routers.num_experts, routers.top_k, len(routers.layers)
    except UnsupportedRouter:  # dense, or counted as if every expert served every token
        num_experts = top_k = moe_layers = 0
    expert = {id(p) for name, p in model.named_parameters() if num_experts and ".experts." in name}

    def count(parameters: Iterable[Tensor]) -> tuple[int, int]:
        sizes = {id(p): p.numel() for p in parameters}
        return sum(sizes.values()), sum(size for p, size in sizes.items() if p in expert)

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [table] if head is None or head.weight is table.weight else [table, head]
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    total, experts = count(model.parameters())
    return Anatomy(
        config=config.get_text_config(),
        total=total,
        embedding=count(table.parameters())[0],
        head=count(ends[-1].parameters())[0] if len(ends) == 2 else 0,
        experts=experts,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=moe_layers,
        largest=max(p.numel() for p in model.parameters()),
        units=tuple(count(module.parameters()) for module in [*layers, *ends]),
    )


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and numbers per head."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _spans(config: PreTrainedConfig, length: Number) -> list[Number]:
    """How many of `length` tokens the last one sees, in each layer with attention: all, or a window of them."""
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = [kind for kind in _layer_types(config) if not kind.startswith("linear")]
    return [min(length, window) if kind.startswith("sliding") else length for kind in kinds]


def kv_cache_bytes(config: PreTrainedConfig, length: Number, itemsize: int) -> Number:
    """Bytes of one sequence's key-value cache: Σ_layers 2 · key-value heads · head_dim · itemsize · tokens.

    A layer with a sliding window keeps no more tokens than that. Latent attention keeps one short vector per token.
    """
    _, kv_heads, head_dim = _heads(config)
    latent = getattr(config, "kv_lora_rank", None)
    numbers = latent + config.qk_rope_head_dim if latent else 2 * kv_heads * head_dim
    return sum(_spans(config, length)) * numbers * itemsize


def rollout_bytes_per_token(model: Anatomy) -> dict[str, int]:
    """Bytes that a `Rollout` keeps of each token: its id, masks, log μ_old, and L · k experts of one or two bytes."""
    routes = (1 if model.num_experts <= 256 else 2) * model.moe_layers * model.top_k
    return {"tokens": 8, "masks": 2 if routes else 1, "log-probabilities": 4, "routes": routes}


# ----------------------------------------------------------------------------------------------- a pass, without data


class MicroBatch(NamedTuple):
    """What goes through the model at once: `rows` × `columns` tokens, `predicted` of which get a log-probability.

    `kind`: rows that need no mask (`causal`), are padded on the left, or share a prompt (see `logprobs.Layout`).
    """

    kind: Literal["causal", "padded", "shared"]
    rows: int
    columns: int
    predicted: int


def micro_batch(
    config: Config, model: Anatomy, prompt_tokens: int, response_tokens: int, *, gpus: int, padded: bool
) -> MicroBatch:
    """The largest part into which `logprobs.micro_batches` cuts a rank's share of a mini-batch, if all prompts and
    responses have so many tokens. `padded`: prompts differ in length after all."""
    budget, size = config.train.tokens_per_micro_batch, config.train.group_size
    groups, fed = math.ceil(config.train.mini_batch_prompts / gpus), response_tokens - 1
    shares, together = _shares_prompts(model.config, config.model.attn_implementation), prompt_tokens + size * fed
    if shares and together <= budget:
        rows = min(groups, budget // together)
        return MicroBatch("shared", rows, together, rows * size * response_tokens)
    columns = prompt_tokens + fed
    rows = max(1, min(size if shares else groups * size, budget // columns))
    return MicroBatch("padded" if padded else "causal", rows, columns, rows * response_tokens)


def _shares_prompts(config: PreTrainedConfig, attn_implementation: str) -> bool:
    """What `logprobs.can_share_prompts` finds out by trial."""
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    full = set(_layer_types(config)) == {"full_attention"} and not windows
    return full and attn_implementation in ("sdpa", "eager")


class PassMemory(NamedTuple):
    """Bytes that a pass takes at its peak, beside parameters.

    kept      for the backward, from the forward on       logits   of the head, and what is made of them
    working   all other: a layer's own, then its gradients, which come and go
    """

    kept: int
    working: int
    logits: int


class _Ledger(TorchDispatchMode):
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
def _working_memory(
    model: Anatomy,
    implementations: tuple[str, str | None],
    batch: MicroBatch,
    *,
    dtype: str,
    autocast: bool,
    train: bool,
    checkpointing: bool,
    with_gradients: bool,
) -> PassMemory:
    """What a pass takes at its peak.

    The model runs on tensors that have shapes and lifetimes but no data. `train`: forward and backward, up to the
    log-probabilities; otherwise the layers' forward, as an engine reads prompts. `with_gradients`: count a parameter's
    gradient from its computation until it is added to the one that is kept.
    The experts' loop over those that were hit needs data: the grouped product stands for it, whose matrices have the
    same rows. torch's own fused attention stands for flash attention, which keeps as much.
    """
    attention, experts = implementations
    attention = attention if attention in ("sdpa", "eager") else "sdpa"
    with FakeTensorMode(), torch.device("cpu"), _nothing_packed():
        network = AutoModelForCausalLM.from_config(model.config, dtype=dtype, attn_implementation=attention)
        if experts == "batched_mm":
            network.set_experts_implementation(experts)
        if checkpointing:
            network.gradient_checkpointing_enable()
        network.train(checkpointing)
        inputs, predictor = _inputs(batch)
        added = set[int]()  # storages of gradients on their way
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_hook(lambda gradient: added.add(ledger.keys[gradient.untyped_storage()]))
        kept = [tensor for parameter in network.parameters() for tensor in (parameter, parameter.grad)]
        ledger = _Ledger([*kept, *network.buffers(), *inputs.values(), predictor])
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
                logp = _logprobs(states, network.get_output_embeddings())
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


def _logprobs(states: Tensor, head: nn.Linear) -> Tensor:
    """What `response_logprobs` makes of the states that predict a token."""
    tokens, targets = len(states), states.new_zeros(len(states), dtype=torch.int64)
    if tokens * len(head.weight) <= CHUNK:
        return torch.log_softmax(head(states).float(), -1).gather(1, targets[:, None])
    width = max(CHUNK // tokens, states.shape[-1])
    return _HeadLogprobs.apply(states, head.weight, head.bias, targets, 1.0, width)[0]


# --------------------------------------------------------------------------------------------------------------- plan

PHASES = ("always", "rollout", "update", "sync", "evaluation")
PLACES = ("trainer", "server")


@dataclass(frozen=True)
class Cluster:
    """What a run shall run on. None: see each field."""

    hardware: Hardware
    gpus: int = 1
    """Of the trainer: as many processes. On CPUs, processes of one machine."""
    memory: Number | None = None
    """Bytes of a GPU. None: the hardware's (on CPUs, the machine's, shared by the processes)."""
    sharding: Literal["none", "ddp", "fsdp2"] | None = None
    """fsdp2: weights, gradients and Adam's state spread over all GPUs; ddp: all of them on each. None: fsdp2 for more
    than one GPU. `model.expert_parallel` always is fsdp2, by transformers."""
    mixed_precision: Literal["bf16", "no"] | None = None
    """accelerate's: `bf16` computes in bf16 on weights in `model.dtype`. None: bf16, on CPUs no."""
    placement: Literal["colocated", "separate"] | None = None
    """Of a vLLM server: on the trainer's GPUs, asleep while the trainer steps, or on its own. None: colocated if
    `rollout.options.sleep` is set."""
    server_gpus: int | None = None
    """Of a vLLM server, tensor-parallel. None: as many as the trainer's, of one machine."""


class Item(NamedTuple):
    """Bytes of one GPU of a place (`PLACES`): what for, in which of `PHASES`, and how that was found."""

    name: str
    phase: str
    bytes: Number
    how: str
    place: str = "trainer"


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes and seconds are those of one GPU and one global step.

    setting  what was planned for, completed     memory   see `Item` and `peak`
    sizes    counts and bytes per token          seconds  lower bounds
    traffic  bytes received (by rank 0: sent)    host     bytes of a machine's own memory
    notes    what to know beside the numbers
    """

    setting: dict[str, Any]
    sizes: dict[str, Number]
    memory: tuple[Item, ...]
    seconds: dict[str, Number]
    traffic: dict[str, Number]
    host: dict[str, Number]
    notes: tuple[str, ...]

    def phases(self, place: str) -> list[str]:
        """The phases in which a place holds something beside what it always does."""
        own = {item.phase for item in self.memory if item.place == place}
        return [phase for phase in PHASES[1:] if phase in own]

    def items(self, phase: str, place: str = "trainer") -> list[Item]:
        """What takes memory in a phase: its own items and those of `always`. Where freed memory stays with the process
        (on CPUs), also those of the phases before it."""
        before = PHASES[: PHASES.index(phase)] if self.setting["keeps_freed"] else ()
        return [item for item in self.memory if item.place == place and item.phase in {"always", phase, *before}]

    def peak(self, place: str = "trainer") -> Number:
        """The most bytes that are taken at a time."""
        return max(sum(item.bytes for item in self.items(phase, place)) for phase in PHASES)

    @property
    def fits(self) -> bool:
        """Whether each GPU has that much."""
        return max(map(self.peak, PLACES)) <= self.setting["memory"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        memory, peaks = [item._asdict() for item in self.memory], {place: self.peak(place) for place in PLACES}
        return {**asdict(self), "memory": memory, "peak": peaks, "fits": self.fits}


def plan(
    config: Config, cluster: Cluster, *, prompt_tokens: int | None = None, response_tokens: Number | None = None
) -> Plan:
    """What a run of `config` on `cluster` will need.

    prompt_tokens    P. None: the longest of 256 problems of the task; `PROMPT_TOKENS`, with a note, if the model is one
                     of `models.ARCHITECTURES` whose tokenizer the task needs from the hub
    response_tokens  mean length of the responses, for times and traffic; memory is planned for the longest that are
                     allowed. None: that, too

    Raises ConfigError for settings that exclude each other, and for a model, tokenizer or task that is not at hand.
    """
    s = _complete(config, cluster, prompt_tokens, response_tokens)
    engine, at_once = _engine_memory(s, trainer := _trainer_memory(s))
    traffic = _traffic(s)
    per_token = rollout_bytes_per_token(s.model)
    return Plan(
        setting={
            **{"model": config.model.name, "hardware": cluster.hardware.name, "gpus": s.gpus, "memory": s.memory},
            **{"sharding": s.sharding, "mixed_precision": s.mixed_precision, "placement": s.placement},
            **{"server_gpus": s.server_gpus, "prompt_tokens": s.prompt_tokens, "max_new_tokens": s.max_new_tokens},
            **{"response_tokens": s.response_tokens, "at_once": at_once, "micro_batch": s.batch._asdict()},
            "keeps_freed": cluster.hardware.keeps_freed,
        },
        sizes={
            "parameters": s.model.total,
            "without embeddings": s.model.non_embedding,
            "active": s.model.active,
            "active, without input embedding": s.model.multiplied,
            "bytes per token of the KV cache": kv_cache_bytes(s.model.config, 1, s.kv_itemsize),
            **{f"bytes per token of a rollout, {name}": size for name, size in per_token.items()},
        },
        memory=(*trainer, *engine),
        seconds=_seconds(s, traffic, at_once),
        traffic=traffic,
        host=_host(s),
        notes=tuple(_notes(s, at_once)),
    )


@dataclass(frozen=True)
class _Setting:
    """The arguments of `plan`, completed, and what follows from them at once."""

    config: Config
    hardware: Hardware
    model: Anatomy
    gpus: int
    memory: Number
    sharding: str
    mixed_precision: str
    placement: str
    server_gpus: int
    prompt_tokens: int
    response_tokens: Number
    max_new_tokens: int
    batch: MicroBatch
    loaded: int  # bytes of a weight as it is loaded
    master: int  # of one that is trained
    compute: int  # of a number in the forward
    engine: int  # of a weight in the rollout engine
    kv_itemsize: int
    assumed: bool  # prompt_tokens

    @property
    def sharded(self) -> bool:
        return self.sharding == "fsdp2"

    @property
    def prompts(self) -> int:
        """Of a global step."""
        return self.config.train.mini_batches * self.config.train.mini_batch_prompts

    @property
    def responses(self) -> int:
        """Of a global step."""
        return self.prompts * self.config.train.group_size

    @property
    def evaluation_copy(self) -> bool:
        """Whether rank 0 keeps a whole model to evaluate with."""
        return self.sharded and bool(self.config.eval.every) and self.config.eval.through_trainer

    @property
    def engine_place(self) -> str:
        return "server" if self.placement == "separate" else "trainer"


_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def _complete(config: Config, cluster: Cluster, prompt_tokens: int | None, response_tokens: Number | None) -> _Setting:
    hardware, gpus, engine = cluster.hardware, cluster.gpus, config.rollout.engine
    on_cpu, server, options = hardware.name == "cpu", engine == "vllm_server", config.rollout.options
    ep = config.model.expert_parallel
    sharding = "fsdp2" if ep > 1 else cluster.sharding or ("fsdp2" if gpus > 1 else "none")
    mixed_precision = cluster.mixed_precision or ("no" if on_cpu else "bf16")
    placement = cluster.placement or ("separate" if server and not options.get("sleep") else "colocated")
    for name, value in (("gpus", gpus), ("server_gpus", cluster.server_gpus), ("prompt_tokens", prompt_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: use 1 or more")
    if (sharding == "none") != (gpus == 1):
        raise ConfigError(f"sharding = {sharding!r}, gpus = {gpus}: one needs none, several need fsdp2 or ddp")
    if placement == "separate" and not server:
        raise ConfigError(f"placement = 'separate': rollout.engine = {engine!r}, but only vllm_server has its own GPUs")
    if engine == "vllm" and gpus > 1:
        raise ConfigError("rollout.engine = 'vllm': it needs a trainer of one process; several take vllm_server, or hf")
    if engine != "hf" and config.rollout.precision not in VLLM_DTYPES:
        raise ConfigError(f"rollout.precision = {config.rollout.precision!r}: vLLM has {', '.join(VLLM_DTYPES)}")
    model = anatomy(config.model)
    if ep > 1 and (gpus % ep or model.num_experts % ep or not model.num_experts):
        raise ConfigError(
            f"model.expert_parallel = {ep}: it must divide the {gpus} GPUs and a layer's {model.num_experts} experts"
        )
    limit, assumed = config.rollout.max_new_tokens, False
    if _on_the_hub(config):
        assumed = prompt_tokens is None
        prompt_tokens = prompt_tokens or PROMPT_TOKENS
        own = inspect.signature(TASKS[config.task.name]).parameters["max_new_tokens"].default
        limit = limit or config.task.options.get("max_new_tokens", own)
    if prompt_tokens is None or limit is None:
        task = _task(config)
        limit = limit or task.max_new_tokens
        prompt_tokens = prompt_tokens or max(len(task.encode(problem)) for problem in task.sample(256, seed=0))
    if response_tokens is not None and not 1 <= response_tokens <= limit:
        raise ConfigError(f"response_tokens = {response_tokens}: a mean is between 1 and the limit of {limit}")
    loaded = _ITEMSIZE[config.model.dtype]
    of_engine = loaded if engine == "hf" else _ITEMSIZE[VLLM_DTYPES[config.rollout.precision]]
    own_gpus = cluster.server_gpus or min(gpus, hardware.per_node)
    bf16 = mixed_precision == "bf16"
    return _Setting(
        config=config,
        hardware=hardware,
        model=model,
        gpus=gpus,
        memory=cluster.memory or hardware.memory / (gpus if on_cpu else 1),
        sharding=sharding,
        mixed_precision=mixed_precision,
        placement=placement,
        server_gpus=own_gpus if server else options.get("tensor_parallel_size", 1),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens or limit,
        max_new_tokens=limit,
        batch=micro_batch(config, model, prompt_tokens, limit, gpus=gpus, padded=config.task.name != ChainTask.name),
        loaded=loaded,
        # Under mixed precision, accelerate's FSDP2 raises the weights that it trains to fp32.
        master=4 if bf16 and sharding == "fsdp2" and ep == 1 else loaded,
        compute=2 if bf16 else loaded,
        engine=of_engine,
        kv_itemsize=1 if "fp8" in str(options.get("kv_cache_dtype")) else of_engine,
        assumed=assumed,
    )


def _on_the_hub(config: Config) -> bool:
    """Whether the task needs a tokenizer that only the hub has, of a model whose architecture ships."""
    name = config.model.name
    needs_one = config.task.name in TASKS and config.task.name != ChainTask.name
    return needs_one and architecture_file(name).exists() and name != SMOLLM2 and not Path(name).exists()


def _task(config: Config) -> Task:
    settings, model, tokenizer = config.task, config.model, None
    try:
        if settings.name in TASKS and settings.name != ChainTask.name:
            tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        return make_task(settings.name, tokenizer=tokenizer, **settings.options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(f"task: {error}. To plan without it: prompt_tokens, and rollout.max_new_tokens") from error


# ------------------------------------------------------------------------------------------------------------- memory


def _trainer_memory(s: _Setting) -> list[Item]:
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

    taken = _pass_memory(s, batch, train=True)
    recomputed = config.model.gradient_checkpointing
    how = f"{batch.rows} × {batch.columns} tokens ({batch.kind}), " + ("layers recomputed" if recomputed else "kept")
    items.append(Item("activations", "update", slack * taken.kept, how))
    items.append(Item("working memory", "update", s.hardware.gaps * taken.working, "of a layer, forward and backward"))
    whole = _size(4 * batch.predicted * model.config.vocab_size)
    items.append(Item("logits", "update", slack * taken.logits, f"in chunks, at that moment; all at once: {whole}"))
    if ep > 1:
        sent = batch.rows * batch.columns * model.top_k * model.config.hidden_size * s.compute
        copies = 3 * (1 if recomputed else model.moe_layers)
        items.append(Item("expert dispatch", "update", slack * copies * sent, "tokens sent, received and sent back"))

    tokens, groups = s.responses * (s.prompt_tokens + s.max_new_tokens), math.ceil(s.prompts / s.gpus)
    *rest, routes = rollout_bytes_per_token(model).values()
    # Rank 0: the rollout, and each mini-batch for the metrics, without routes. Each rank: its rows, and its
    # micro-batches with their layouts (six int64 numbers) and the experts in that layout.
    held = tokens * (2 * sum(rest) + routes) + tokens / s.gpus * (2 * sum(rest) + 48 + 3 * routes)
    items.append(
        Item("rollout", "update", held, f"{tokens} tokens × {sum(rest) + routes} bytes, and what is cut of it")
    )
    if batch.kind == "shared":
        masks = 4 * groups * batch.columns**2
        items.append(Item("attention masks", "update", masks, f"{groups} groups × {batch.columns}² × 4 bytes"))
    whole = model.largest * (s.engine + s.master * s.sharded)
    items.append(Item("sync buffer", "sync", whole, "the largest parameter, whole: one goes at a time"))
    if s.evaluation_copy and (config.rollout.engine == "hf" or s.hardware.name == "cpu"):
        items.append(Item("copy for evaluation", "always", model.total * s.loaded, "eval.through_trainer, on rank 0"))
    return items


def _pass_memory(s: _Setting, batch: MicroBatch, *, train: bool) -> PassMemory:
    settings, bf16 = s.config.model, s.mixed_precision == "bf16"
    dtype = settings.dtype
    if (train and s.sharded and bf16) or (not train and s.engine < s.loaded):
        dtype = "bfloat16"  # FSDP2 casts the weights that it gathers; vLLM has its own
    try:
        return _working_memory(
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


def _engine_memory(s: _Setting, trainer: list[Item]) -> tuple[list[Item], int]:
    """What the rollout engine holds, and how many responses of the mean length it samples at once.

    `hf` samples all at once. vLLM fills what `trainer` leaves, or what `rollout.options` say, and lets the rest wait.
    """
    engine, options, place, gpus = s.config.rollout.engine, s.config.rollout.options, s.engine_place, s.server_gpus
    slack, own = s.hardware.slack, "rollout" if engine == "vllm_server" else "always"
    rows, prompts = s.responses, s.prompts
    if engine != "hf":
        rows = min(rows, options.get("max_num_seqs", VLLM_SEQUENCES))
        prompts = min(prompts, max(1, options.get("max_num_batched_tokens", VLLM_TOKENS) // s.prompt_tokens))
    reading = _pass_memory(s, MicroBatch("causal", prompts, s.prompt_tokens, 0), train=False).working
    weights, sampling = s.model.total * s.engine / gpus, 4 * rows * s.model.config.vocab_size * 4
    items = [
        Item("engine's weights", own, weights, f"{s.model.total / 1e9:.3g} B × {s.engine} bytes / {gpus}", place),
        Item("prompts", "rollout", slack * reading / gpus, f"{prompts} × {s.prompt_tokens} tokens at once", place),
        Item("sampling", "rollout", slack * sampling, f"{rows} × vocabulary × 4 bytes, four times", place),
    ]
    if engine == "vllm_server":  # its process stays while it sleeps
        items.append(Item("engine's process", "always", s.hardware.runtime, "before the first tensor", place))

    copies = min(gpus, _heads(s.model.config)[1])  # GPUs share the heads; more GPUs than heads hold the same
    longest, mean = (
        kv_cache_bytes(s.model.config, s.prompt_tokens + length, s.kv_itemsize) / copies
        for length in (s.max_new_tokens, s.response_tokens)
    )
    evaluated = s.config.eval.problems if s.config.eval.every and s.config.eval.through_trainer else 0
    size, at_once = max(s.responses, evaluated) * longest, s.responses
    if engine != "hf":
        if evaluated and not s.sharded:  # by the trainer, all at once
            cache = evaluated * kv_cache_bytes(s.model.config, s.prompt_tokens + s.max_new_tokens, s.loaded)
            items.append(Item("KV cache", "evaluation", slack * cache, f"{evaluated} problems, by the trainer's model"))
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


def _host(s: _Setting) -> dict[str, Number]:
    """Of the machine that holds the most: every process loads the whole model before it is sharded."""
    if s.hardware.name == "cpu":
        return {}
    whole = s.model.total * s.loaded
    found: dict[str, Number] = {"model, as each process loads it": whole * min(s.gpus, s.hardware.per_node)}
    if s.config.rollout.engine == "vllm_server" and s.placement == "colocated":
        found["weights of the sleeping server"] = s.model.total * s.engine
    if s.evaluation_copy and s.config.rollout.engine != "hf":
        found["copy for evaluation"] = whole
    return found


# --------------------------------------------------------------------------------------------------- traffic and time


def _slots(s: _Setting) -> Number:
    """Tokens that a GPU feeds through the model in one pass over its share of a global step."""
    fed, size = s.response_tokens - 1, s.config.train.group_size
    copies = 1 if s.batch.kind == "shared" else size  # of a prompt
    return s.prompts / s.gpus * (copies * s.prompt_tokens + size * fed)


def _old_passes(s: _Setting) -> float:
    """Forwards for π_old over the share of a global step: all mini-batches' but the first's."""
    count = s.config.train.mini_batches
    return 1.0 if s.config.train.reference_old_logp else (count - 1) / count


def _traffic(s: _Setting) -> dict[str, Number]:
    """Bytes per GPU and global step."""
    config, model, n, ep, old = s.config, s.model, s.gpus, s.config.model.expert_parallel, _old_passes(s)
    found: dict[str, Number] = {}
    others = (n - 1) / n
    if s.sharded:
        micro_batches = max(_slots(s) / (s.batch.rows * s.batch.columns), config.train.mini_batches)
        dense, experts = (model.total - model.experts) * others, model.experts / ep * (1 - ep / n)
        gathered = (dense + experts) * s.compute * micro_batches
        found["all-gather of weights"] = gathered * (old + 2)  # forward and backward
        found["reduce-scatter of gradients"] = gathered
    elif n > 1:
        found["all-reduce of gradients"] = 2 * model.total * s.master * others * config.train.mini_batches
    if ep > 1:
        passes = old + (3 if config.model.gradient_checkpointing else 2)
        pairs = _slots(s) * model.top_k * model.moe_layers * (1 - 1 / ep)
        found["all-to-all of tokens"] = 2 * pairs * model.config.hidden_size * s.compute * passes  # there and back
    if n > 1:
        tokens = s.responses * (s.prompt_tokens + s.response_tokens)
        found["rollout, scattered by rank 0"] = tokens * sum(rollout_bytes_per_token(model).values()) * others
        found["log-probabilities, gathered by rank 0"] = 12 * s.responses * s.response_tokens * others
    found["weights to the engine, by rank 0"] = model.total * s.engine
    if s.sharded:
        found["weights made whole for that"] = model.total * s.master * others
    return found


def _attention(config: PreTrainedConfig, length: Number) -> Number:
    """FLOPs of a token's attention to `length` tokens: 4 · heads · head_dim for each that it sees in each layer."""
    heads, _, head_dim = _heads(config)
    return 4 * heads * head_dim * sum(_spans(config, length))


def _seconds(s: _Setting, traffic: dict[str, Number], at_once: int) -> dict[str, Number]:
    """Lower bounds for the parts of a global step, and for all of it."""
    config, model, hardware, gpus = s.config, s.model, s.hardware, s.server_gpus
    flops = {2: hardware.bf16, 4: hardware.fp32}
    prompt, response = s.prompt_tokens, s.response_tokens
    per_token = 2 * model.multiplied
    reading = s.prompts * prompt * (per_token + _attention(model.config, prompt / 2))
    # Each decoding step reads the experts that some token of the batch needs, all other weights, and the KV cache.
    context = prompt + response / 2
    missed = (1 - model.top_k / max(model.num_experts, 1)) ** at_once
    weights = model.total - (model.embedding if model.head else 0) - model.experts * missed
    read = weights * s.engine + at_once * kv_cache_bytes(model.config, context, s.kv_itemsize)
    products = at_once * (per_token + _attention(model.config, context))
    step = max(read / hardware.bandwidth, products / flops[s.engine]) / gpus
    # Per token 2 FLOPs a parameter forward, 4 backward, 2 for the forward again under checkpointing.
    seen = s.batch.columns if s.batch.kind == "shared" else (prompt + response) / 2
    forward = _slots(s) * (per_token + _attention(model.config, seen)) / flops[s.compute]
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    state = model.total * s.master / (s.gpus if s.sharded else 1)
    # A ring through several machines crosses their borders over all of a machine's adapters.
    one_machine = s.gpus <= hardware.per_node
    ring = hardware.nvlink if one_machine else min(hardware.nvlink, hardware.per_node * hardware.network)
    pairs = hardware.nvlink if config.model.expert_parallel <= hardware.per_node else hardware.network
    to_engine = hardware.nvlink if s.placement == "colocated" else hardware.network
    kinds = {name.split()[0]: size for name, size in traffic.items()}
    collectives = sum(kinds.get(kind, 0.0) for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    found = {
        "rollout: prompts": reading / (flops[s.engine] * gpus),
        "rollout: tokens": math.ceil(s.responses / at_once) * response * step,
        "π_old": _old_passes(s) * forward,
        "update": forward * (4 if config.model.gradient_checkpointing else 3),
        "optimizer": config.train.mini_batches * 7 * state / hardware.bandwidth,
        "communication": collectives / ring + kinds.get("all-to-all", 0.0) / pairs,
        "sync": model.total * s.engine / to_engine + traffic.get("weights made whole for that", 0.0) / ring,
    }
    hidden = min(found["communication"], found["π_old"] + found["update"])  # at best behind the computation
    return {**found, "global step": sum(found.values()) - hidden}


def _notes(s: _Setting, at_once: int) -> Iterator[str]:
    config, engine = s.config, s.config.rollout.engine
    if engine == "vllm_server" and s.placement == "colocated" and not config.rollout.options.get("sleep"):
        yield "a server on the trainer's GPUs has to sleep between rollouts: rollout.options.sleep: true"
    if s.assumed:
        yield (
            f"prompts of {s.prompt_tokens} tokens are assumed: the tokenizer of {config.model.name} would have to come "
            "from the hub; --prompt-tokens says better"
        )
    if at_once < s.responses:
        yield f"the KV cache holds {at_once} of {s.responses} responses of the mean length at a time; the rest wait"
    if engine == "hf" and s.gpus > 1:
        yield "the engine hf samples on rank 0 alone, while the others wait"
    if s.model.num_experts and s.mixed_precision == "bf16" and not s.sharded and s.master == 4:
        yield "without FSDP2, transformers multiplies experts in the weights' fp32: autocast does not reach them"
    if s.batch.columns > config.train.tokens_per_micro_batch:
        budget = config.train.tokens_per_micro_batch
        yield f"a row of {s.batch.columns} tokens exceeds train.tokens_per_micro_batch: {budget}, and cannot be cut"


# ----------------------------------------------------------------------------------------------------------- remedies

MOST_GPUS = 4096
"""Where the search for a number of GPUs ends."""


class Remedy(NamedTuple):
    """A change, what the fullest GPU takes after it, and whether it fits then."""

    change: str
    peak: Number
    fits: bool


def remedies(
    config: Config, cluster: Cluster, *, prompt_tokens: int | None = None, response_tokens: Number | None = None
) -> list[Remedy]:
    """What to change so that `plan` of the same arguments fits, cheapest first; empty if it fits.

    Each line keeps the changes of those before it, until it fits. The last ones say how many GPUs it takes otherwise:
    with nothing else changed, and with all that. What would save nothing is left out.
    """
    now = plan(config, cluster, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    if now.fits:
        return []
    lengths = {"prompt_tokens": now.setting["prompt_tokens"], "response_tokens": response_tokens}
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=now.setting["max_new_tokens"]))
    asked, found = (config, cluster), list[Remedy]()
    for change, edit in _changes(config, cluster, now):
        changed = edit(config, cluster)
        then = plan(*changed, **lengths)
        if _excess(then) < _excess(now):
            (config, cluster), now = changed, then
            if found and found[-1].change.split(":")[0] == change.split(":")[0]:
                found.pop()  # the same field, changed further
            found.append(Remedy(change, _fullest(now), now.fits))
        if now.fits:
            break
    if cluster.hardware.name != "cpu":
        others = _more_gpus(*asked, lengths, "")
        if found and not now.fits:
            others += _more_gpus(config, cluster, lengths, ", and all of the above")
        found += others
    return found


def _fullest(plan: Plan) -> Number:
    return max(map(plan.peak, PLACES))


def _excess(plan: Plan) -> float:
    """Bytes that are missing, summed over phases: a change may help one that is not the worst."""
    taken = (sum(item.bytes for item in plan.items(phase, place)) for place in PLACES for phase in PHASES)
    return sum(max(0.0, size - plan.setting["memory"]) for size in taken)


_Edit = Callable[[Config, Cluster], tuple[Config, Cluster]]


def _changes(config: Config, cluster: Cluster, now: Plan) -> Iterator[tuple[str, _Edit]]:
    """What to try, in this order."""

    def change(section: str, *, machine: dict[str, Any] | None = None, **fields: Any) -> _Edit:
        return lambda config, cluster: (
            replace(config, **{section: replace(getattr(config, section), **fields)}),
            replace(cluster, **(machine or {})),
        )

    if now.setting["sharding"] == "ddp":
        yield "fsdp2 instead of ddp", lambda config, cluster: (config, replace(cluster, sharding="fsdp2"))
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", change("model", gradient_checkpointing=True)
    budget, row = config.train.tokens_per_micro_batch, now.setting["prompt_tokens"] + now.setting["max_new_tokens"] - 1
    while budget > row:
        budget = max(budget // 2, row)
        yield f"train.tokens_per_micro_batch: {budget}", change("train", tokens_per_micro_batch=budget)
    if config.eval.every and config.eval.through_trainer:
        yield "eval.through_trainer: false", change("eval", through_trainer=False)
    if config.model.dtype == "float32":
        words = "model.dtype: bfloat16, mixed precision no (small steps of Adam's get lost in rounding)"
        yield words, change("model", dtype="bfloat16", machine={"mixed_precision": "no"})
    if cluster.hardware.name == "cpu" or now.setting["placement"] == "separate":
        return
    precision = config.rollout.precision if config.rollout.precision in VLLM_DTYPES else "bf16"
    server = {"engine": "vllm_server", "precision": precision, "rounding": "nearest", "quantise_router": False}
    options = {name: v for name, v in config.rollout.options.items() if name == "kv_cache_dtype"}
    yield (
        "a vLLM server on GPUs of its own",
        change("rollout", **server, options=options, machine={"placement": "separate"}),
    )


def _more_gpus(config: Config, cluster: Cluster, lengths: dict[str, Any], words: str) -> list[Remedy]:
    """The smallest number of GPUs on which it fits, a multiple of `model.expert_parallel`; nothing if none is."""
    if config.rollout.engine == "vllm":
        return []
    step = config.model.expert_parallel

    @lru_cache
    def on(count: int) -> Plan:
        return plan(config, replace(cluster, gpus=count * step, sharding="fsdp2"), **lengths)

    low, high = cluster.gpus // step, 2 * cluster.gpus // step  # on low it does not fit
    if not on(MOST_GPUS // step).fits:
        return []
    while not on(high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if on(middle).fits else (middle, high)
    return [Remedy(f"{high * step} GPUs instead of {cluster.gpus}, fsdp2{words}", _fullest(on(high)), True)]


# ------------------------------------------------------------------------------------------------------ text, picture


def parse_bytes(text: str) -> float:
    """`80GB` (80 · 10⁹) or `80GiB` (80 · 2³⁰) in bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"memory = {text!r}: expected a size such as 80GB or 80GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("MGT".index(match[2]) + 2)


def _size(size: Number) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"


def _duration(seconds: Number) -> str:
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rows(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(rows)
    width = max([26, *(len(name) for name, _, _ in rows)])
    return [f"  {name:{width}} {value:>9}  {how}".rstrip() for name, value, how in rows]


def table(plan: Plan, suggested: Iterable[Remedy] = ()) -> str:
    """The plan as text; `suggested`: what to change if it does not fit."""
    s, sizes, verdict = plan.setting, plan.sizes, {True: "fits", False: "does not fit"}
    counts = ", ".join(f"{sizes[name] / 1e9:.4g} B {name}" for name in list(sizes)[:4])
    lines = [
        f"{s['model']}: {counts}",
        f"{s['gpus']} × {s['hardware']}, sharding {s['sharding']}, mixed precision {s['mixed_precision']}, rollouts "
        f"{s['placement']}; prompts of {s['prompt_tokens']}, responses of up to {s['max_new_tokens']} tokens "
        f"(mean {s['response_tokens']:g})",
    ]
    for place in PLACES:
        if not plan.phases(place):
            continue
        lines += ["", f"memory of the {place}'s fullest {'process' if s['hardware'] == 'cpu' else 'GPU'}"]
        for phase in PHASES:
            own = [item for item in plan.memory if item.place == place and item.phase == phase]
            lines += [f" {phase}"] * bool(own) + _rows((i.name, _size(i.bytes), i.how) for i in own)
        peaks = {phase: sum(i.bytes for i in plan.items(phase, place)) for phase in plan.phases(place)}
        shown = ", ".join(f"{phase} {_size(size)}" for phase, size in peaks.items())
        lines.append(
            f" peak {_size(plan.peak(place))} of {_size(s['memory'])}: "
            f"{verdict[plan.peak(place) <= s['memory']]} ({shown})"
        )
    if plan.host:
        lines += ["", "memory of a machine", *_rows((name, _size(size), "") for name, size in plan.host.items())]
    lines += ["", "time of a global step, at least", *_rows((n, _duration(t), "") for n, t in plan.seconds.items())]
    lines += ["", "traffic of a global step, per GPU", *_rows((n, _size(b), "") for n, b in plan.traffic.items())]
    lines += ["", *_rows((name, f"{size:,.0f}", "") for name, size in list(sizes.items())[4:])]
    lines += [""] * bool(plan.notes) + [f"note: {note}" for note in plan.notes]
    if not plan.fits:
        steps = [(r.change, _size(r.peak), verdict[r.fits]) for r in suggested]
        lines += ["", "what to change", *(_rows(steps) or ["  nothing that was tried helps"])]
    return "\n".join(lines)


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


def draw_memory(plan: Plan) -> Figure:
    """The memory of the fullest GPU in each phase, stacked, and what there is. Items below 1 % of the peak are drawn as
    one."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    columns = [(phase, place) for place in PLACES for phase in plan.phases(place)]
    parts: dict[str, list[float]] = {}
    for column, (phase, place) in enumerate(columns):
        for item in plan.items(phase, place):
            name = item.name if item.bytes >= 0.01 * _fullest(plan) else "the rest"
            parts.setdefault(name, [0.0] * len(columns))[column] += item.bytes / 1e9
    bottom = [0.0] * len(columns)
    for i, name in enumerate(sorted(parts, key="the rest".__eq__)):
        colour, hatch = _COLOURS[i % len(_COLOURS)], _HATCHES[(i + i // len(_COLOURS)) % len(_HATCHES)]
        axes.bar(
            range(len(columns)), parts[name], bottom=bottom, label=name, color=colour, hatch=hatch, edgecolor="white"
        )
        bottom = [low + size for low, size in zip(bottom, parts[name], strict=True)]
    axes.axhline(plan.setting["memory"] / 1e9, color="#222222", linestyle="--", label="memory")
    axes.set_xticks(range(len(columns)), [place if place == "server" else phase for phase, place in columns])
    axes.set_ylabel("GB")
    axes.set_title(f"{plan.setting['model']} on {plan.setting['gpus']} × {plan.setting['hardware']}")
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return drawn
