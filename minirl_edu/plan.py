"""What a run will need, before anything is started: memory of each GPU, time and traffic of a global step.

    weights, gradients, Adam   counted on the model itself, built on the meta device: right for any architecture
    activations, logits        the training engine's own forward and backward, run on tensors without data
    everything else            arithmetic; each line of the table says which

The plan is for the fullest GPU (rank 0, which has the rollout engine or the whole rollout beside its share) and for the
dearest case: every response as long as it may be, every group with a gradient. Times are roofs: no step is faster than
its products at the chip's peak, its reads at the full bandwidth. Real steps take a multiple.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from minirl_edu.config import Config, ConfigError, ModelConfig, load_config, save_config
from minirl_edu.logprobs import CHUNK, _HeadLogprobs
from minirl_edu.models import architecture, load_tokenizer
from minirl_edu.rollout import VLLM_DTYPES
from minirl_edu.routing import RoutingReplay, UnsupportedRouter
from minirl_edu.tasks import TASKS, ChainTask, Task, make_task

ALLOCATOR = 1.1
"""Memory taken over memory in use, for blocks that come and go: allocators leave gaps. Of PyTorch's on GPUs and of glibc
on CPUs alike; measured on CPUs (tests/test_plan.py)."""

RUNTIME = 1.5e9
"""Bytes that a process takes of a GPU before its first tensor: CUDA context, cuBLAS and NCCL buffers. An allowance of
ours, not measured here; on CPUs the baseline is measured (`this_machine`)."""

VLLM_SEQUENCES, VLLM_TOKENS = 1024, 8192
"""How many sequences, and how many tokens of prompts, vLLM 0.32 computes at once unless told otherwise (its server on
GPUs of 70 GiB and more; `default_max_num_seqs` and its neighbour in vllm/engine/arg_utils.py)."""

# ----------------------------------------------------------------------------------------------------------- hardware


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU (or this machine) and how several are connected.

    bf16, fp32  FLOP/s of dense matrix products      memory   bytes
    bandwidth   bytes/s of its memory                nvlink   bytes/s to other GPUs of the machine, one direction
    per_node    GPUs in a machine                    network  bytes/s to other machines, per GPU, one direction
    runtime     bytes taken by a process before its first tensor
    keeps_freed what is freed in one phase stays with the process in the next, so the phases add up
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    nvlink: float
    network: float
    per_node: int = 8
    runtime: float = RUNTIME
    keeps_freed: bool = False


HARDWARE = {
    "h100": Hardware("h100", 989e12, 67e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Hardware("h200", 989e12, 67e12, 4.8e12, 141e9, 450e9, 50e9),
    "a100": Hardware("a100", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, 25e9),
}
"""SXM modules, from NVIDIA's data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU" and "A100 80GB": bf16 on tensor
cores without sparsity, fp32 without TF32, NVLink's 900 (A100: 600) GB/s halved, because they count both directions. The
network is that of DGX machines: one 400 Gb/s (A100: 200) adapter for each GPU."""


def this_machine(config: Config) -> Hardware:
    """This machine as `cpu`: its memory, and, measured in a fresh process on the threads that OMP_NUM_THREADS allows,
    FLOP/s, bytes/s of a copy, and the resident memory of a process that imported all that this run's training imports
    and made its task."""
    with tempfile.TemporaryDirectory(prefix="minirl-plan-") as folder:
        save_config(config, path := Path(folder) / "config.yaml")
        code = "import sys; from minirl_edu import plan; plan._measure(sys.argv[1])"
        command = [sys.executable, "-c", "import minirl_edu.cli, minirl_edu.trainer; " + code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"measuring this machine failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flops, bandwidth = measured["flops"], measured["bandwidth"]
    return Hardware(
        "cpu", flops, flops, bandwidth, float(memory), bandwidth, bandwidth, runtime=measured["rss"], keeps_freed=True
    )


def _measure(path: str) -> None:
    """In a fresh process: print what `this_machine` asks for."""
    config = load_config(path)
    task = _task(config)
    if config.rollout.engine == "vllm":
        import vllm  # noqa: F401
    a, copied = torch.ones(1024, 1024), torch.ones(2**25)

    def best(run: Any) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    found = {"flops": 2 * 1024**3 / best(lambda: a @ a), "bandwidth": 2 * copied.nbytes / best(copied.clone)}
    del copied, task
    # Not ru_maxrss, which a child inherits from the process that started it.
    found["rss"] = 1024 * int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    print(json.dumps(found))


# -------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Parameter counts of a model, taken from the model itself, built without data.

    total      all; tied ones once               experts      of all experts together
    embedding  the input table                   num_experts  E, 0 for a dense model
    head       the output matrix, 0 where tied   top_k        k, experts that serve a token
    moe_layers layers with experts               largest      the largest single parameter
    units      (parameters, experts' among them) of each module that FSDP2 gathers at once
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
    def active(self) -> float:
        """Parameters that serve one token, total − experts · (1 − k/E), both embeddings included, as Qwen counts."""
        return self.total - self.experts * (1 - self.top_k / max(self.num_experts, 1))

    @property
    def multiplied(self) -> float:
        """Active parameters that a token is multiplied with: without the input table, which is looked up (where it is
        tied to the head, it is the head). OpenAI counts like this: 3.61 B of gpt-oss-20b."""
        return self.active - (self.embedding if self.head else 0)


def anatomy(settings: ModelConfig) -> Anatomy:
    """The counts of the model that a config's `model` section names. Raises ConfigError where it cannot be built."""
    return _anatomy(settings.name, json.dumps(settings.overrides), settings.trust_remote_code)


@lru_cache(maxsize=16)
def _anatomy(name: str, overrides: str, trust_remote_code: bool) -> Anatomy:
    try:
        config = architecture(name, json.loads(overrides), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        routers = RoutingReplay(model)
        num_experts, top_k, moe_layers = routers.num_experts, routers.top_k, len(routers.layers)
    except UnsupportedRouter:  # dense, or counted as if all experts were active
        num_experts = top_k = moe_layers = 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    experts = {id(p) for name, p in model.named_parameters() if num_experts and ".experts." in name}

    def count(parameters: Iterable[Tensor]) -> tuple[int, int]:
        found = {id(p): p.numel() for p in parameters}
        return sum(found.values()), sum(n for i, n in found.items() if i in experts)

    layers = [m for m in model.modules() if type(m).__name__ in (getattr(model, "_no_split_modules", None) or ())]
    ends = [embedding] if tied else [embedding, head]
    total, of_experts = count(model.parameters())
    return Anatomy(
        config=config.get_text_config(),
        total=total,
        embedding=embedding.weight.numel(),
        head=0 if tied else head.weight.numel(),
        experts=of_experts,
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


def _spans(config: PreTrainedConfig, length: float) -> list[float]:
    """Tokens that the last of `length` tokens sees in each layer with attention: all, or a window of them."""
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = [kind for kind in _layer_types(config) if not kind.startswith("linear")]
    return [min(length, window) if kind.startswith("sliding") else length for kind in kinds]


def kv_cache_bytes(config: PreTrainedConfig, length: float, itemsize: int) -> float:
    """Bytes of the key-value cache of one sequence: Σ_layers 2 · key-value heads · head_dim · itemsize · tokens.

    Layers with a sliding window keep no more than it; latent attention (`kv_lora_rank`) keeps one short vector.
    """
    _, kv_heads, head_dim = _heads(config)
    numbers = 2 * kv_heads * head_dim
    if getattr(config, "kv_lora_rank", None):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    return sum(_spans(config, length)) * numbers * itemsize


def rollout_bytes_per_token(model: Anatomy) -> dict[str, int]:
    """Bytes that a `Rollout` keeps of each token: ids, masks, log μ_old, and L · k experts of one or two bytes each."""
    of_experts = (1 if model.num_experts <= 256 else 2) * model.moe_layers * model.top_k
    return {"tokens": 8, "masks": 2 if of_experts else 1, "log-probabilities": 4, "routes": of_experts}


# ----------------------------------------------------------------------------------------- the update, without data


class MicroBatch(NamedTuple):
    """The largest micro-batch of a rank: `rows` × `columns` slots that predict `predicted` tokens; `count` such ones make
    its share of a mini-batch."""

    kind: Literal["causal", "padded", "shared"]
    rows: int
    columns: int
    predicted: int
    count: int


def micro_batch(
    config: Config, model: Anatomy, prompt_tokens: int, response_tokens: int, *, gpus: int, padded: bool
) -> MicroBatch:
    """How `logprobs.micro_batches` cuts a rank's share, P + T tokens each; `padded`: prompts differ in length."""
    settings, size = config.train, config.train.group_size
    groups = math.ceil(settings.mini_batch_prompts / gpus)
    width, fed = prompt_tokens + response_tokens - 1, response_tokens - 1
    together = prompt_tokens + size * fed
    shares = _shares_prompts(model.config, config.model.attn_implementation)
    if shares and together <= settings.tokens_per_micro_batch:
        rows = min(groups, settings.tokens_per_micro_batch // together)
        return MicroBatch("shared", rows, together, rows * size * response_tokens, math.ceil(groups / rows))
    rows = max(1, min(size if shares else groups * size, settings.tokens_per_micro_batch // width))
    count = groups * math.ceil(size / rows) if shares else math.ceil(groups * size / rows)
    return MicroBatch("padded" if padded else "causal", rows, width, rows * response_tokens, count)


def _shares_prompts(config: PreTrainedConfig, attn_implementation: str) -> bool:
    """What `logprobs.can_share_prompts` finds by trial."""
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    full = set(_layer_types(config)) == {"full_attention"} and not windows
    return full and attn_implementation in ("sdpa", "eager")


class _Ledger(TorchDispatchMode):
    """Notes when memory is taken and given back, and whether for the logits (`of_logits`)."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.of_logits = False
        self.events: list[tuple[int, int]] = []  # (which storage, bytes taken or, negative, given back)
        self.logits: set[int] = set()
        self.keys = weakref.WeakKeyDictionary({tensor.untyped_storage(): -1 for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _grouped_mm if func is torch.ops.aten._grouped_mm.default else func
        out = own(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.keys:
                self.keys[storage] = key = len(self.events)
                self.events.append((key, storage.nbytes()))
                weakref.finalize(storage, self.events.append, (key, -storage.nbytes()))
                if self.of_logits:
                    self.logits.add(key)
        return out

    def peak(self, leave_out: set[int]) -> tuple[int, int]:
        """Bytes at the moment when most are taken: (all others', the logits')."""
        others = logits = 0
        best = (0, 0)
        for key, size in self.events:
            if key in self.logits:
                logits += size
            elif key not in leave_out:
                others += size
            if others + logits > sum(best):
                best = (others, logits)
        return best


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """An output of the right shape: torch's own function without data knows bf16 only."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(a.shape[-2], b.shape[-1])


@lru_cache(maxsize=256)
def _working_memory(
    model: Anatomy, settings: tuple[str, str | None, bool], dtype: str, autocast: bool, batch: MicroBatch, train: bool
) -> tuple[int, int]:
    """Bytes that a forward and backward take at their peak beside parameters and gradients: (layers', logits').

    The model runs on tensors that have shapes and lifetimes but no data. Not `train`: the layers' forward alone, as an
    engine reads prompts. The experts' loop over those that were hit would need data: the grouped product stands for it,
    whose matrices have the same rows. Flash attention keeps what torch's own fused kernel keeps.
    """
    attention, experts, checkpointing = settings
    attention = attention if attention in ("sdpa", "eager") else "sdpa"
    with FakeTensorMode(), torch.device("cpu"):
        network = AutoModelForCausalLM.from_config(model.config, dtype=dtype, attn_implementation=attention)
        if experts == "batched_mm":
            network.set_experts_implementation(experts)
        if checkpointing:
            network.gradient_checkpointing_enable()
        network.train(checkpointing and train)
        inputs, predictor = _inputs(batch)
        ledger = _Ledger([*network.parameters(), *network.buffers(), *inputs.values(), predictor])
        gradients = set[int]()

        def leave_out(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients.add(ledger.keys.get(parameter.grad.untyped_storage(), -1))
            parameter.grad = None

        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(leave_out)
        with ledger, torch.set_grad_enabled(train):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = network.base_model(**inputs, use_cache=False).last_hidden_state
                if train:
                    ledger.of_logits = True
                    states = hidden.flatten(0, 1).index_select(0, predictor)
                    logp = _logprobs(states, network.get_output_embeddings())
                    states.register_hook(lambda _: setattr(ledger, "of_logits", False))
                    del states, hidden
            if train:
                logp.sum().backward()
        return ledger.peak(gradients)


def _logprobs(states: Tensor, head: torch.nn.Linear) -> Tensor:
    """What `response_logprobs` does with the states that predict a token."""
    tokens, targets = len(states), states.new_zeros(len(states), dtype=torch.int64)
    if tokens * len(head.weight) <= CHUNK:
        return torch.log_softmax(head(states).float(), -1).gather(1, targets[:, None])
    width = max(CHUNK // tokens, states.shape[-1])
    return _HeadLogprobs.apply(states, head.weight, head.bias, targets, 1.0, width)[0]


def _inputs(batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
    """A layout's inputs to the model and its predictor, without data."""
    slots = torch.zeros(batch.rows, batch.columns, dtype=torch.int64)
    inputs = {"input_ids": slots, "position_ids": slots.clone()}
    if batch.kind == "shared":
        inputs["attention_mask"] = torch.zeros(batch.rows, 1, batch.columns, batch.columns)
    elif batch.kind == "padded":
        inputs["attention_mask"] = torch.zeros(batch.rows, batch.columns, dtype=torch.bool)
    return inputs, torch.zeros(batch.predicted, dtype=torch.int64)


# --------------------------------------------------------------------------------------------------------------- plan

PHASES = ("always", "rollout", "update", "sync")
SHARDINGS = ("none", "ddp", "fsdp2")
PLACEMENTS = ("colocated", "separate")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Item(NamedTuple):
    """Bytes of one GPU: what for, in which of `PHASES`, on a GPU of the `trainer` or of a `server` of its own."""

    name: str
    phase: str
    bytes: float
    how: str
    place: str = "trainer"


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes, seconds, per GPU and global step.

    setting    the arguments, completed                    memory    items, see `peak`
    sizes      parameter counts and bytes per token        seconds   roofs
    traffic    bytes received (rank 0: sent) per GPU       host      bytes of a machine's own memory
    notes      what to know beside the numbers
    """

    setting: dict[str, Any]
    sizes: dict[str, float]
    memory: tuple[Item, ...]
    seconds: dict[str, float]
    traffic: dict[str, float]
    host: dict[str, float]
    notes: tuple[str, ...]

    def phase(self, phase: str, place: str = "trainer") -> float:
        """Bytes that are taken in a phase, those of `always` included. Where freed memory stays with the process (on
        CPUs), each phase comes on top of those before it."""
        phases = {"always", phase}
        if self.setting["keeps_freed"]:
            phases |= set(PHASES[: PHASES.index(phase) + 1])
        return sum(item.bytes for item in self.memory if item.place == place and item.phase in phases)

    def peak(self, place: str = "trainer") -> float:
        """The most bytes that are taken at a time."""
        return max(self.phase(phase, place) for phase in PHASES)

    @property
    def fits(self) -> bool:
        """Whether every GPU has that much."""
        return max(self.peak("trainer"), self.peak("server")) <= self.setting["memory"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        memory = [item._asdict() for item in self.memory]
        return {**asdict(self), "memory": memory, "peak": self.peak(), "fits": self.fits}


def plan(
    config: Config,
    hardware: Hardware,
    *,
    gpus: int = 1,
    memory: float | None = None,
    sharding: str | None = None,
    mixed_precision: str | None = None,
    placement: str | None = None,
    server_gpus: int | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> Plan:
    """What a run of `config` will need on `gpus` GPUs (or CPU processes) of the trainer.

    memory           bytes of a GPU; None: the hardware's
    sharding         fsdp2: parameters, gradients and Adam's state over all GPUs; ddp: a copy on each. None: fsdp2 for
                     several; with `model.expert_parallel` always fsdp2, by transformers
    mixed_precision  accelerate's: `bf16` computes in bf16 on weights in `model.dtype`; `no`. None: bf16, on CPUs no
    placement        of a `vllm_server`: `colocated` on the trainer's GPUs, asleep while the trainer steps, or `separate`.
                     None: colocated if `rollout.options.sleep` is set
    server_gpus      its GPUs, tensor-parallel. None: as many as the trainer has, at most one machine's
    prompt_tokens    P. None: the longest of 256 problems of the task
    response_tokens  the mean length of responses, for times and traffic. None: max_new_tokens, which memory is
                     planned for in any case

    Raises ConfigError for settings that exclude each other, and a model, tokenizer or task that is not at hand.
    """
    s = _complete(
        config,
        hardware,
        gpus,
        memory,
        sharding,
        mixed_precision,
        placement,
        server_gpus,
        prompt_tokens,
        response_tokens,
    )
    items = [*_trainer_memory(s), *_engine_memory(s)]
    kv_cache, at_once = _kv_cache(s, items)
    items.append(kv_cache)
    traffic = _traffic(s)
    setting = {
        "model": config.model.name,
        "hardware": hardware.name,
        "keeps_freed": hardware.keeps_freed,
        "at_once": at_once,
        **{
            name: getattr(s, name)
            for name in ("gpus", "memory", "sharding", "mixed_precision", "placement", "server_gpus")
        },
        **{name: getattr(s, name) for name in ("prompt_tokens", "response_tokens", "max_new_tokens")},
        "micro_batch": s.batch._asdict(),
    }
    model = s.model
    sizes = {
        "parameters": float(model.total),
        "without embeddings": float(model.non_embedding),
        "active per token": model.active,
        "active per token, without the input embedding": model.multiplied,
        "KV cache, bytes per token": kv_cache_bytes(model.config, 1, s.kv_itemsize),
        **{f"rollout, bytes per token: {name}": float(size) for name, size in rollout_bytes_per_token(model).items()},
    }
    return Plan(
        setting, sizes, tuple(items), _seconds(s, traffic, at_once), traffic, _host(s), tuple(_notes(s, at_once))
    )


class _Setting(NamedTuple):
    """The arguments of `plan`, completed, and what follows from them at once."""

    config: Config
    hardware: Hardware
    model: Anatomy
    gpus: int
    memory: float
    sharding: str
    mixed_precision: str
    placement: str
    server_gpus: int
    prompt_tokens: int
    response_tokens: float
    max_new_tokens: int
    batch: MicroBatch
    master: int  # bytes of a weight
    compute: int  # of a number in the forward
    loaded: int  # of a weight as it is loaded
    engine: int  # of a weight in the rollout engine
    kv_itemsize: int

    @property
    def responses(self) -> int:
        """Of a global step."""
        settings = self.config.train
        return settings.mini_batches * settings.mini_batch_prompts * settings.group_size

    @property
    def sharded(self) -> bool:
        return self.sharding == "fsdp2"

    @property
    def evaluation_copy(self) -> bool:
        """Whether rank 0 keeps a whole model to evaluate with."""
        return self.sharded and bool(self.config.eval.every) and self.config.eval.through_trainer

    @property
    def engine_place(self) -> str:
        return "server" if self.placement == "separate" else "trainer"


def _complete(
    config: Config,
    hardware: Hardware,
    gpus: int,
    memory: float | None,
    sharding: str | None,
    mixed_precision: str | None,
    placement: str | None,
    server_gpus: int | None,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> _Setting:
    on_cpu, server = hardware.name == "cpu", config.rollout.engine == "vllm_server"
    ep, options = config.model.expert_parallel, config.rollout.options
    sharding = sharding or ("fsdp2" if gpus > 1 else "none")
    mixed_precision = mixed_precision or ("no" if on_cpu else "bf16")
    placement = placement or ("separate" if server and not options.get("sleep") else "colocated")
    for name, value, choices in (
        ("sharding", sharding, SHARDINGS),
        ("mixed_precision", mixed_precision, ("bf16", "no")),
        ("placement", placement, PLACEMENTS),
    ):
        if value not in choices:
            raise ConfigError(f"{name} = {value!r}: choose one of {', '.join(choices)}")
    for name, value in (("gpus", gpus), ("server_gpus", server_gpus), ("prompt_tokens", prompt_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: use 1 or more")
    if (sharding == "none") != (gpus == 1):
        raise ConfigError(f"sharding = {sharding!r} with {gpus} GPUs: several need ddp or fsdp2, and one needs none")
    if placement == "separate" and not server:
        raise ConfigError(
            f"placement = 'separate': rollout.engine {config.rollout.engine!r} runs in the trainer's process; only "
            "vllm_server has GPUs of its own"
        )
    if config.rollout.engine == "vllm" and gpus > 1:
        raise ConfigError("rollout.engine = 'vllm' runs in a trainer of one process; several need vllm_server (or hf)")
    if ep > 1 and (gpus % ep or gpus == 1):
        raise ConfigError(f"model.expert_parallel = {ep}: it must divide the {gpus} GPUs, of which it needs several")
    if ep > 1:
        sharding = "fsdp2"
    model = anatomy(config.model)
    if ep > 1 and (not model.num_experts or model.num_experts % ep):
        raise ConfigError(f"model.expert_parallel = {ep}: it must divide the {model.num_experts} experts of a layer")
    task = None if prompt_tokens and (config.rollout.max_new_tokens) else _task(config)
    limit = config.rollout.max_new_tokens or (task.max_new_tokens if task else 1)
    if prompt_tokens is None:
        assert task is not None
        prompt_tokens = max(len(task.encode(problem)) for problem in task.sample(256, seed=0))
    if response_tokens is not None and not 1 <= response_tokens <= limit:
        raise ConfigError(f"response_tokens = {response_tokens}: a mean length lies from 1 to {limit}, the limit")
    padded = config.task.name != ChainTask.name
    itemsize = _ITEMSIZE[config.model.dtype]
    bf16 = mixed_precision == "bf16"
    engine = itemsize
    if config.rollout.engine != "hf":
        if config.rollout.precision not in VLLM_DTYPES:
            raise ConfigError(f"rollout.precision = {config.rollout.precision!r}: vLLM has {', '.join(VLLM_DTYPES)}")
        engine = _ITEMSIZE[VLLM_DTYPES[config.rollout.precision]]
    return _Setting(
        config=config,
        hardware=hardware,
        model=model,
        gpus=gpus,
        memory=memory or hardware.memory,
        sharding=sharding,
        mixed_precision=mixed_precision,
        placement=placement,
        server_gpus=server_gpus or min(gpus, hardware.per_node)
        if server
        else int(options.get("tensor_parallel_size", 1)),
        prompt_tokens=prompt_tokens,
        response_tokens=float(response_tokens or limit),
        max_new_tokens=limit,
        batch=micro_batch(config, model, prompt_tokens, limit, gpus=gpus, padded=padded),
        # accelerate's FSDP2 raises weights to fp32 under mixed precision.
        master=4 if bf16 and sharding == "fsdp2" and ep == 1 else itemsize,
        compute=2 if bf16 else itemsize,
        loaded=itemsize,
        engine=engine,
        kv_itemsize=1 if "fp8" in str(options.get("kv_cache_dtype")) else engine,
    )


def _task(config: Config) -> Task:
    settings, model = config.task, config.model
    try:
        tokenizer = None
        if settings.name in TASKS and settings.name != ChainTask.name:
            tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        return make_task(settings.name, tokenizer=tokenizer, **settings.options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(
            f"task: {error}; where tokenizer or problems are not at hand, give prompt_tokens and rollout.max_new_tokens"
        ) from error


# ------------------------------------------------------------------------------------------------------------- memory


def _trainer_memory(s: _Setting) -> list[Item]:
    """What the trainer's process on rank 0 holds."""
    config, model, batch, ep = s.config, s.model, s.batch, s.config.model.expert_parallel
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
        gathered, gradients = (first + second) * s.compute, 2 * first * s.compute
        items.append(Item("gathered weights", "update", ALLOCATOR * gathered, "FSDP2's two largest units, whole"))
        items.append(Item("gathered gradients", "update", ALLOCATOR * gradients, "one unit's, and a copy to send"))
    else:
        items.append(Item("one gradient", "update", model.largest * s.master, "a parameter's, before it is added"))
    if s.sharding == "ddp":
        items.append(Item("gradient buckets", "always", share, "DDP's copy of the gradients, to send"))
    layers, logits = _micro_batch_memory(s, batch, train=True)
    checkpointing = config.model.gradient_checkpointing
    slots = f"{batch.rows} × {batch.columns} tokens ({batch.kind}), "
    kept = "recomputed layer by layer" if checkpointing else "of all layers"
    items.append(Item("activations", "update", ALLOCATOR * layers, slots + kept))
    whole = 4 * batch.predicted * model.config.vocab_size
    items.append(Item("logits", "update", ALLOCATOR * logits, f"in chunks, when most is taken; whole: {_size(whole)}"))
    if ep > 1:
        sent = batch.rows * batch.columns * model.top_k * model.config.hidden_size * s.compute
        copies = 3 * (1 if checkpointing else model.moe_layers)
        items.append(Item("expert dispatch", "update", ALLOCATOR * copies * sent, "tokens sent, received, sent back"))
    tokens, groups = s.responses * (s.prompt_tokens + s.max_new_tokens), s.responses / config.train.group_size
    per_token = rollout_bytes_per_token(model)
    routes, rest = per_token["routes"], sum(per_token.values()) - per_token["routes"]
    # Rank 0: the rollout, and its mini-batches for the metrics, without routes. Each rank: its rows, its micro-batches,
    # their layouts (six int64 numbers) and the experts in that layout.
    held = tokens * (2 * rest + routes) + tokens / s.gpus * (2 * rest + 48 + 3 * routes)
    items.append(Item("rollout", "update", held, f"{tokens} tokens × {rest + routes} bytes, and what each rank gets"))
    if batch.kind == "shared":
        how = f"{math.ceil(groups / s.gpus)} groups × {batch.columns}² × 4 bytes"
        items.append(Item("attention masks", "update", 4 * math.ceil(groups / s.gpus) * batch.columns**2, how))
    whole = model.largest * (s.engine + s.master * s.sharded)
    items.append(Item("sync buffer", "sync", whole, "one parameter at a time, whole"))
    if s.evaluation_copy and (config.rollout.engine == "hf" or s.hardware.name == "cpu"):
        items.append(Item("copy for evaluation", "always", model.total * s.loaded, "eval.through_trainer, on rank 0"))
    return items


def _micro_batch_memory(s: _Setting, batch: MicroBatch, *, train: bool) -> tuple[int, int]:
    settings = s.config.model
    autocast = s.mixed_precision == "bf16" and train
    casts = autocast and s.sharded  # FSDP2 casts the weights that it gathers, and needs no autocast
    try:
        return _working_memory(
            s.model,
            (settings.attn_implementation, settings.experts_implementation, settings.gradient_checkpointing),
            "bfloat16" if casts else settings.dtype if train or s.engine == s.loaded else "bfloat16",
            autocast and not casts,
            batch,
            train,
        )
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation = {settings.attn_implementation!r}: {error}") from error


def _engine_memory(s: _Setting) -> list[Item]:
    """What the rollout engine holds, its KV cache excepted."""
    engine, options, place = s.config.rollout.engine, s.config.rollout.options, s.engine_place
    prompts, gpus = s.responses // s.config.train.group_size, s.server_gpus
    rows = s.responses
    if engine != "hf":
        rows = min(rows, options.get("max_num_seqs", VLLM_SEQUENCES))
        prompts = min(prompts, max(1, options.get("max_num_batched_tokens", VLLM_TOKENS) // s.prompt_tokens))
    reading = _micro_batch_memory(s, MicroBatch("causal", prompts, s.prompt_tokens, 0, 1), train=False)[0]
    sampling = 4 * rows * s.model.config.vocab_size * 4
    phase = "rollout" if engine == "vllm_server" else "always"
    weights = Item("engine's weights", phase, s.model.total * s.engine / gpus, f"× {s.engine} bytes / {gpus}", place)
    items = [
        weights,
        Item("prompts", "rollout", ALLOCATOR * reading / gpus, f"{prompts} × {s.prompt_tokens} tokens at once", place),
        Item("sampling", "rollout", ALLOCATOR * sampling, f"{rows} × vocabulary, four times in fp32", place),
    ]
    if engine == "vllm_server":  # its process stays while it sleeps
        items.append(Item("engine's process", "always", s.hardware.runtime, "before the first tensor", place))
    return items


def _kv_cache(s: _Setting, items: list[Item]) -> tuple[Item, int]:
    """The KV cache, and how many responses of the mean length are sampled at once.

    `hf` samples all at once. vLLM takes what is left, or what `rollout.options` say, and lets the rest wait.
    """
    engine, options, place = s.config.rollout.engine, s.config.rollout.options, s.engine_place
    heads = min(s.server_gpus, _heads(s.model.config)[1])  # more GPUs than heads hold copies
    longest, mean = (
        kv_cache_bytes(s.model.config, s.prompt_tokens + length, s.kv_itemsize) / heads
        for length in (s.max_new_tokens, s.response_tokens)
    )
    wanted = s.responses * longest
    if engine == "hf":
        how = f"{s.responses} sequences at once"
        return Item("KV cache", "rollout", ALLOCATOR * wanted, how, place), s.responses
    taken = sum(item.bytes for item in items if item.place == place and item.phase in ("always", "rollout"))
    room = math.floor(s.memory - taken)
    if engine == "vllm":  # reserved at its start
        wanted = room = options.get("gpu_memory_utilization", 0.92) * s.memory - items[-3].bytes
        if s.hardware.name == "cpu":
            length = options.get("max_model_len") or s.model.config.max_position_embeddings
            sequence = kv_cache_bytes(s.model.config, length + 256, s.kv_itemsize)
            wanted = room = options.get("kv_cache_bytes", max(sequence, min(64 * sequence, 2**30)))
    size = max(min(wanted, room), longest)
    at_once = max(1, min(s.responses, options.get("max_num_seqs", VLLM_SEQUENCES), int(size / mean)))
    phase = "rollout" if engine == "vllm_server" else "always"
    return Item("KV cache", phase, size, f"{at_once} of {s.responses} sequences at once", place), at_once


def _host(s: _Setting) -> dict[str, float]:
    """Memory of the machine that holds the most: every process loads the whole model before it is sharded."""
    if s.hardware.name == "cpu":
        return {}
    whole = s.model.total * s.loaded
    found = {"model, loaded by each process": whole * min(s.gpus, s.hardware.per_node)}
    if s.config.rollout.engine == "vllm_server" and s.placement == "colocated":
        found["weights of the server asleep"] = s.model.total * s.engine
    if s.evaluation_copy and s.config.rollout.engine != "hf":
        found["copy for evaluation"] = whole
    return found


# --------------------------------------------------------------------------------------------------- traffic and time


def _slots(s: _Setting) -> float:
    """Tokens that a GPU feeds through the model in one pass over its share of a global step, at the mean length."""
    groups, size = s.config.train.mini_batches * s.config.train.mini_batch_prompts / s.gpus, s.config.train.group_size
    fed = s.response_tokens - 1
    if s.batch.kind == "shared":
        return groups * (s.prompt_tokens + size * fed)
    return groups * size * (s.prompt_tokens + fed)


def _passes(s: _Setting) -> tuple[float, float]:
    """Forwards for π_old, and updates, each over a whole share of a global step, in units of one pass."""
    count = s.config.train.mini_batches
    return (1.0 if s.config.train.reference_old_logp else (count - 1) / count), 1.0


def _traffic(s: _Setting) -> dict[str, float]:
    """Bytes per GPU and global step."""
    config, model, n, ep = s.config, s.model, s.gpus, s.config.model.expert_parallel
    old, update = _passes(s)
    micro = _slots(s) / (s.batch.rows * s.batch.columns)  # micro-batches of a global step
    micro = max(micro, float(config.train.mini_batches))
    found = {}
    if s.sharded:
        copies = n // ep  # of each expert
        dense = (model.total - model.experts) * (n - 1) / n
        whole = (dense + model.experts / ep * (copies - 1) / copies) * s.compute
        found["all-gather of weights"] = whole * micro * (old + 2 * update)
        found["reduce-scatter of gradients"] = whole * micro * update
    elif n > 1:
        found["all-reduce of gradients"] = config.train.mini_batches * 2 * model.total * s.master * (n - 1) / n
    if ep > 1:
        passes = old + update * (3 if config.model.gradient_checkpointing else 2)
        pairs = _slots(s) * model.top_k * model.moe_layers * (ep - 1) / ep
        found["all-to-all of tokens"] = 2 * pairs * model.config.hidden_size * s.compute * passes
    if n > 1:
        tokens = s.responses * (s.prompt_tokens + s.response_tokens)
        per_token = sum(rollout_bytes_per_token(model).values())
        found["rollout, scattered by rank 0"] = tokens * per_token * (n - 1) / n
        found["log-probabilities, gathered by rank 0"] = 12 * s.responses * s.response_tokens * (n - 1) / n
    sync = model.total * s.engine
    found["weights to the engine, from rank 0"] = sync
    if s.sharded:
        found["weights made whole, for the engine"] = model.total * s.master * (n - 1) / n
    return found


def _attention(config: PreTrainedConfig, length: float) -> float:
    """FLOPs of one token's attention to the last `length`: 4 · heads · head_dim for each token that it sees."""
    heads, _, head_dim = _heads(config)
    return 4 * heads * head_dim * sum(_spans(config, length))


def _seconds(s: _Setting, traffic: dict[str, float], at_once: int) -> dict[str, float]:
    """Roofs of a global step's parts, and of the whole."""
    config, model, hardware, gpus = s.config, s.model, s.hardware, s.server_gpus
    peak = {2: hardware.bf16, 4: hardware.fp32}
    prompts = config.train.mini_batches * config.train.mini_batch_prompts
    prompt, response = s.prompt_tokens, s.response_tokens
    # Rollout: the prompts at the products' peak, then token by token at the memory's.
    per_prompt = prompt * (2 * model.multiplied + _attention(model.config, prompt / 2))
    found = {"rollout: prompts": prompts * per_prompt / (peak[s.engine] * gpus)}
    context = prompt + response / 2
    hit = 1 - (1 - model.top_k / max(model.num_experts, 1)) ** at_once  # share of the experts that some token needs
    read = (model.total - (model.embedding if model.head else 0) - model.experts * (1 - hit)) * s.engine
    read += at_once * kv_cache_bytes(model.config, context, s.kv_itemsize)
    flops = at_once * (2 * model.multiplied + _attention(model.config, context))
    step = max(read / (hardware.bandwidth * gpus), flops / (peak[s.engine] * gpus))
    found["rollout: tokens"] = math.ceil(s.responses / at_once) * response * step
    # Update: 2 FLOPs per parameter and token forward, 4 backward, 2 for the forward again under checkpointing.
    old, update = _passes(s)
    span = s.batch.columns if s.batch.kind == "shared" else (prompt + response) / 2
    forward = _slots(s) * (2 * model.multiplied + _attention(model.config, span)) / peak[s.compute]
    found["π_old"] = old * forward
    found["update"] = update * forward * (4 if config.model.gradient_checkpointing else 3)
    # AdamW reads weights, gradients and moments and writes all but the gradients.
    state = model.total * s.master / (s.gpus if s.sharded else 1)
    found["optimizer"] = config.train.mini_batches * 7 * state / hardware.bandwidth
    # A ring through several machines passes each border over all of a machine's adapters.
    one = s.gpus <= hardware.per_node
    ring = hardware.nvlink if one else min(hardware.nvlink, hardware.per_node * hardware.network)
    pairs = hardware.nvlink if config.model.expert_parallel <= hardware.per_node else hardware.network
    of = {name.split(" ")[0]: size for name, size in traffic.items()}
    collectives = sum(of.get(name, 0.0) for name in ("all-gather", "reduce-scatter", "all-reduce"))
    found["communication of the update"] = collectives / ring + of.get("all-to-all", 0.0) / pairs
    between = hardware.nvlink if s.placement == "colocated" or one else hardware.network
    found["sync"] = traffic["weights to the engine, from rank 0"] / between
    found["sync"] += traffic.get("weights made whole, for the engine", 0.0) / ring
    busy = found["π_old"] + found["update"]
    rest = found["rollout: prompts"] + found["rollout: tokens"] + found["optimizer"] + found["sync"]
    found["global step"] = rest + max(busy, found["communication of the update"])  # at best one hides the other
    return found


def _notes(s: _Setting, at_once: int) -> Iterable[str]:
    config, engine = s.config, s.config.rollout.engine
    if engine == "vllm_server" and s.placement == "colocated" and not config.rollout.options.get("sleep"):
        yield "a server on the trainer's GPUs has to sleep: rollout.options.sleep: true"
    if at_once < s.responses:
        rounds = math.ceil(s.responses / at_once)
        yield f"the KV cache holds {at_once} of {s.responses} responses of the mean length: about {rounds} rounds"
    if engine == "hf" and s.gpus > 1:
        yield "the hf engine samples on rank 0 alone, while the others wait"
    if s.model.num_experts and s.mixed_precision == "bf16" and not s.sharded and s.master == 4:
        yield "without FSDP2, transformers' grouped experts compute in fp32: autocast does not reach them"
    if s.batch.rows * s.batch.columns > config.train.tokens_per_micro_batch:
        yield (
            f"one row takes {s.batch.columns} tokens, more than train.tokens_per_micro_batch = "
            f"{config.train.tokens_per_micro_batch}: there is nothing left to cut"
        )


# ----------------------------------------------------------------------------------------------------------- remedies

_MOST_GPUS = 4096


class Remedy(NamedTuple):
    """A change, what the fullest GPU then takes, and whether it fits."""

    change: str
    peak: float
    fits: bool


def remedies(config: Config, hardware: Hardware, **arguments: Any) -> list[Remedy]:
    """What to change so that a plan fits, cheapest first; `arguments` are those of `plan`. Empty if it fits.

    Each line keeps the changes of the lines before it, the last two excepted: as many GPUs as it takes with nothing
    else changed, and with all of them. Lines that change nothing or save nothing are left out.
    """
    now = plan(config, hardware, **arguments)
    if now.fits:
        return []
    arguments |= {name: now.setting[name] for name in ("prompt_tokens", "memory", "placement", "mixed_precision")}
    arguments["gpus"] = now.setting["gpus"]
    first, found = (config, dict(arguments)), []

    def attempt(change: str, config: Config, arguments: dict[str, Any]) -> Plan | None:
        try:
            then = plan(config, hardware, **arguments)
        except ConfigError:
            return None
        if _fullest(then) < _fullest(now):
            found.append(Remedy(change, _fullest(then), then.fits))
            return then
        return None

    for change, new_config, new_arguments in _changes(config, hardware, arguments, now):
        # Each builds on what helped so far.
        candidate = new_config(config), {**arguments, **new_arguments}
        then = attempt(change, *candidate)
        if then is not None:
            (config, arguments), now = candidate, then
            if now.fits:
                break
    if hardware.name != "cpu":
        now = plan(first[0], hardware, **first[1])
        for words, (base, given) in {"nothing else changed": first, "all of the above": (config, arguments)}.items():
            if (base, given) == first and words == "all of the above":
                continue
            count = _fewest(base, hardware, given)
            if count and count > given["gpus"]:
                attempt(f"{count} GPUs instead of {given['gpus']} (fsdp2), {words}", base, _on(count, given))
    return found


def _fullest(plan: Plan) -> float:
    return max(plan.peak("trainer"), plan.peak("server"))


def _changes(
    config: Config, hardware: Hardware, arguments: dict[str, Any], now: Plan
) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    """(words, config → config, arguments that change), in the order in which to try them."""

    def edit(section: str, **fields: Any) -> Any:
        return lambda config: replace(config, **{section: replace(getattr(config, section), **fields)})

    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", edit("model", gradient_checkpointing=True), {}
    row = now.setting["prompt_tokens"] + now.setting["max_new_tokens"] - 1
    budget = config.train.tokens_per_micro_batch
    while budget > row:
        budget = max(budget // 2, row)
        yield f"train.tokens_per_micro_batch: {budget}", edit("train", tokens_per_micro_batch=budget), {}
    if config.eval.every and config.eval.through_trainer:
        yield "eval.through_trainer: false", edit("eval", through_trainer=False), {}
    if config.model.dtype == "float32":
        words = "model.dtype: bfloat16 without mixed precision (Adam's small steps may round to nothing)"
        yield words, edit("model", dtype="bfloat16"), {"mixed_precision": "no"}
    engine = config.rollout.engine
    if engine == "vllm_server" and now.setting["placement"] == "colocated":
        yield "a server with GPUs of its own", lambda config: config, {"placement": "separate"}
    elif engine != "vllm_server" and hardware.name != "cpu":
        precision = config.rollout.precision if config.rollout.precision in VLLM_DTYPES else "bf16"
        fields = {"engine": "vllm_server", "precision": precision, "options": {}, "rounding": "nearest"}
        words = "rollout.engine: vllm_server, with GPUs of its own"
        yield words, edit("rollout", **fields, quantise_router=False), {"placement": "separate"}


def _on(gpus: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "gpus": gpus, "sharding": "fsdp2", "server_gpus": arguments.get("server_gpus")}


def _fewest(config: Config, hardware: Hardware, arguments: dict[str, Any]) -> int | None:
    """The smallest number of GPUs on which it fits, in steps of `model.expert_parallel`; None if none does."""
    step = config.model.expert_parallel

    def fits(count: int) -> bool:
        try:
            return plan(config, hardware, **_on(count * step, arguments)).fits
        except ConfigError:
            return False

    low = max(1, arguments["gpus"] // step)  # does not fit
    high = low
    while not fits(high):
        if high * step > _MOST_GPUS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * step


# ------------------------------------------------------------------------------------------------------ text, picture


def parse_bytes(text: str) -> float:
    """`80GB` (10⁹ bytes each) or `80GiB` (2³⁰) in bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"([0-9.]+)\s*([GMT])(i?)B", text.strip())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise ConfigError(f"memory = {text!r}: expected a size such as 80GB or 80GiB")
    power = {"M": 2, "G": 3, "T": 4}[match[2]]
    return number * (1024 if match[3] else 1000) ** power


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} bytes"


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"


def table(plan: Plan, suggested: Iterable[Remedy] = ()) -> str:
    """The plan as text, and what to change if it does not fit."""
    s = plan.setting
    lines = [
        f"{s['model']}: " + ", ".join(f"{plan.sizes[name] / 1e9:.4g} B {name}" for name in list(plan.sizes)[:4]),
        f"{s['gpus']} × {s['hardware']} of {_size(s['memory'])}, sharding {s['sharding']}, mixed precision "
        f"{s['mixed_precision']}, engine {s['placement']}; prompts of {s['prompt_tokens']} and responses of "
        f"{s['max_new_tokens']} tokens (mean {s['response_tokens']:g})",
    ]
    for place in ("trainer", "server"):
        if any(item.place == place for item in plan.memory):
            lines += ["", *_memory_lines(plan, place)]
    if plan.host:
        lines += ["", "memory of the machine", *_rows((name, _size(n), "") for name, n in plan.host.items())]
    lines += ["", "time of a global step, at least", *_rows((n, _duration(t), "") for n, t in plan.seconds.items())]
    lines += ["", "traffic of a global step, per GPU", *_rows((n, _size(b), "") for n, b in plan.traffic.items())]
    lines += ["", "bytes per token", *_rows((n, f"{b:,.0f}", "") for n, b in list(plan.sizes.items())[4:])]
    if plan.notes:
        lines += ["", *(f"note: {note}" for note in plan.notes)]
    if not plan.fits:
        lines += ["", "to make it fit:"]
        verdict = {True: "fits", False: "does not fit"}
        lines += _rows((r.change, _size(r.peak), verdict[r.fits]) for r in suggested) or [
            "  nothing that was tried helps"
        ]
    return "\n".join(lines)


def _memory_lines(plan: Plan, place: str) -> list[str]:
    peak, memory = plan.peak(place), plan.setting["memory"]
    what = "process" if plan.setting["hardware"] == "cpu" else "GPU"
    lines = [f"memory of the fullest {what} of the {place}"]
    for phase in PHASES:
        items = [item for item in plan.memory if item.place == place and item.phase == phase]
        lines += _rows((f"{phase}: {item.name}", _size(item.bytes), item.how) for item in items)
    verdict = "fits" if peak <= memory else "does not fit"
    return [*lines, *_rows([("peak", _size(peak), f"of {_size(memory)}: {verdict}")])]


def _rows(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"  {name:{max(width, 30)}} {value:>10}  {how}".rstrip() for name, value, how in rows]


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


def figure(plan: Plan) -> Figure:
    """A stacked bar of the memory of the fullest GPU in each phase, and the memory that there is. Items below 1 % of the
    peak are drawn together."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    places = [place for place in ("trainer", "server") if any(item.place == place for item in plan.memory)]
    columns = [(place, phase) for place in places for phase in PHASES[1:] if place == "trainer" or phase == "rollout"]
    peak = max(plan.peak(place) for place in places)
    names: dict[str, list[float]] = {}
    for column, (place, phase) in enumerate(columns):
        phases = {"always", phase}
        if plan.setting["keeps_freed"]:
            phases |= set(PHASES[: PHASES.index(phase) + 1])
        for item in plan.memory:
            if item.place == place and item.phase in phases:
                name = item.name if item.bytes >= 0.01 * peak else "the rest"
                names.setdefault(name, [0.0] * len(columns))[column] += item.bytes / 1e9
    bottom = [0.0] * len(columns)
    for i, (name, sizes) in enumerate(sorted(names.items(), key=lambda entry: entry[0] == "the rest")):
        colour, hatch = _COLOURS[i % len(_COLOURS)], _HATCHES[(i + i // len(_COLOURS)) % len(_HATCHES)]
        axes.bar(range(len(columns)), sizes, bottom=bottom, label=name, color=colour, hatch=hatch, edgecolor="white")
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.axhline(plan.setting["memory"] / 1e9, color="#222222", linestyle="--", label="memory")
    axes.set_xticks(range(len(columns)), [phase if place == "trainer" else "server" for place, phase in columns])
    axes.set_ylabel("GB")
    axes.set_title(f"{plan.setting['model']} on {plan.setting['gpus']} × {plan.setting['hardware']}")
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return drawn
