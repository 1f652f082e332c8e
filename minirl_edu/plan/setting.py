"""What is planned for: the machines, and a config with what follows from it at once."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from minirl_edu.balance import SHARED_MOST
from minirl_edu.config import Config, ConfigError, load_config, save_config
from minirl_edu.logprobs import attends_in_full
from minirl_edu.models import SMOLLM2, architecture_file, load_tokenizer
from minirl_edu.plan.sizes import ModelStats, Number, model_stats_of, rollout_bytes_per_token
from minirl_edu.rollout import VLLM_DTYPES
from minirl_edu.tasks import TASKS, Task, brings_tokenizer, make_task

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
        imports = "import sys, minirl_edu.report, minirl_edu.trainer; from minirl_edu.plan.setting import measure_this"
        program = f"{imports}; measure_this(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"measuring this machine failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flops, copy = found["flops"], found["bandwidth"]
    return Hardware(
        "cpu", flops, flops, copy, memory, copy, copy, runtime=found["resident"], slack=1.0, gaps=GAPS, keeps_freed=True
    )


def measure_this(path: str) -> None:
    """In a fresh process, print what `this_machine` asks for."""
    config = load_config(path)
    task = None if on_the_hub(config) else task_of(config)  # kept, with the modules that it imports
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


class MicroBatch(NamedTuple):
    """What goes through the model at once: `rows` × `columns` tokens, `predicted` of which get a log-probability.

    `kind`: rows that need no mask (`causal`), are padded on the left, share a prompt, or are packed into one (see
    `minirl_edu.logprobs`).
    """

    kind: Literal["causal", "padded", "shared", "packed"]
    rows: int
    columns: int
    predicted: int


def micro_batch(
    config: Config, model: ModelStats, prompt_tokens: int, response_tokens: int, *, gpus: int, padded: bool
) -> MicroBatch:
    """The largest part into which `balance.deal` cuts a rank's share of a mini-batch, if all prompts and responses have
    so many tokens. `padded`: prompts differ in length after all."""
    budget, size = config.train.tokens_per_micro_batch, config.train.group_size
    fed, attention = response_tokens - 1, config.model.attn_implementation
    together, columns = prompt_tokens + size * fed, prompt_tokens + fed
    packs = packs_rows(model.config, attention)
    if shares_prompts(model.config, attention) and together <= (min(budget, SHARED_MOST) if packs else budget):
        rows = min(math.ceil(config.train.mini_batch_prompts / gpus), budget // together)
        return MicroBatch("shared", rows, together, rows * size * response_tokens)
    rows, most = math.ceil(config.train.mini_batch_prompts * size / gpus), max(1, budget // columns)
    if packs:
        rows = math.ceil(rows / math.ceil(rows / most))  # all parts take about as much
        return MicroBatch("packed", 1, rows * columns, rows * response_tokens)
    rows = min(rows, most)
    return MicroBatch("padded" if padded else "causal", rows, columns, rows * response_tokens)


def shares_prompts(config: PreTrainedConfig, attn_implementation: str) -> bool:
    """What `logprobs.can_share_prompts` finds out by trial."""
    return attends_in_full(config) and attn_implementation in ("sdpa", "eager")


def packs_rows(config: PreTrainedConfig, attn_implementation: str) -> bool:
    """What `logprobs.can_pack` finds out by trial."""
    return attends_in_full(config) and attn_implementation == "sdpa"


@dataclass(frozen=True)
class Setting:
    """The arguments of `plan`, completed, and what follows from them at once."""

    config: Config
    hardware: Hardware
    model: ModelStats
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
        """Whether weights, gradients and Adam's state are spread over the GPUs."""
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
    def rollout_bytes(self) -> dict[str, int]:
        """Bytes of a rollout's token, with the engine's experts where the run asks for them."""
        return rollout_bytes_per_token(self.model, routes=self.config.engine_routes)

    @property
    def evaluated(self) -> int:
        """Responses that an evaluation samples at a time."""
        return self.config.eval.problems * max(self.config.evaluation_rounds)

    @property
    def evaluation_copy(self) -> bool:
        """Whether rank 0 keeps a whole model to evaluate with."""
        return self.sharded and bool(self.config.eval.every) and self.config.eval.through_trainer

    @property
    def engine_place(self) -> str:
        """Where the rollout engine is: one of `memory.PLACES`."""
        return "server" if self.placement == "separate" else "trainer"


_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def complete(config: Config, cluster: Cluster, prompt_tokens: int | None, response_tokens: Number | None) -> Setting:
    """The arguments of `plan`, with everything that they leave open filled in. Raises ConfigError as `plan` does."""
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
    model = model_stats_of(config.model)
    if ep > 1 and (gpus % ep or model.num_experts % ep or not model.num_experts):
        raise ConfigError(
            f"model.expert_parallel = {ep}: it must divide the {gpus} GPUs and a layer's {model.num_experts} experts"
        )
    limit, assumed = config.rollout.max_new_tokens, False
    if on_the_hub(config):
        assumed = prompt_tokens is None
        prompt_tokens = prompt_tokens or PROMPT_TOKENS
        own = inspect.signature(TASKS[config.task.name]).parameters["max_new_tokens"].default
        limit = limit or config.task.options.get("max_new_tokens", own)
    if prompt_tokens is None or limit is None:
        task = task_of(config)
        limit = limit or task.max_new_tokens
        prompt_tokens = prompt_tokens or max(len(task.encode(problem)) for problem in task.sample(256, seed=0))
    if response_tokens is not None and not 1 <= response_tokens <= limit:
        raise ConfigError(f"response_tokens = {response_tokens}: a mean is between 1 and the limit of {limit}")
    loaded = _ITEMSIZE[config.model.dtype]
    of_engine = loaded if engine == "hf" else _ITEMSIZE[VLLM_DTYPES[config.rollout.precision]]
    own_gpus = cluster.server_gpus or min(gpus, hardware.per_node)
    bf16 = mixed_precision == "bf16"
    return Setting(
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
        batch=micro_batch(
            config,
            model,
            prompt_tokens,
            limit,
            gpus=gpus,
            padded=not (config.task.name in TASKS and brings_tokenizer(config.task.name)),
        ),
        loaded=loaded,
        # Under mixed precision, accelerate's FSDP2 raises the weights that it trains to fp32.
        master=4 if bf16 and sharding == "fsdp2" and ep == 1 else loaded,
        compute=2 if bf16 else loaded,
        engine=of_engine,
        kv_itemsize=1 if "fp8" in str(options.get("kv_cache_dtype")) else of_engine,
        assumed=assumed,
    )


def on_the_hub(config: Config) -> bool:
    """Whether the task needs a tokenizer that only the hub has, of a model whose architecture ships."""
    name = config.model.name
    needs_one = config.task.name in TASKS and not brings_tokenizer(config.task.name)
    return needs_one and architecture_file(name).exists() and name != SMOLLM2 and not Path(name).exists()


def task_of(config: Config) -> Task:
    """The task that the config names, with the model's tokenizer. Raises ConfigError where either is not at hand."""
    settings, model, tokenizer = config.task, config.model, None
    try:
        if not brings_tokenizer(settings.name):
            tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        return make_task(settings.name, tokenizer=tokenizer, **settings.options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(f"task: {error}. To plan without it: prompt_tokens, and rollout.max_new_tokens") from error
