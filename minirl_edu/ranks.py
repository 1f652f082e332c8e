"""Several processes (ranks) as one trainer: started by `accelerate launch`, with PyTorch's collectives between them.

    make_accelerator   accelerate's object; refuses what accelerate would otherwise replace in silence
    Ranks              what the ranks tell each other: flags, sums, and rows of tensors, never pickled objects
    share_experts      expert parallelism through transformers
    Watch              who is alive: if a rank dies, the others name it and stop

One process is the special case in which none of this communicates.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


class RankFailed(RuntimeError):
    """Another process of the run died or gave up; the message names its rank and what it said."""


# ----------------------------------------------------------------------------------------------------------- starting


def make_accelerator(*, wait: float, **options: Any) -> Accelerator:
    """accelerate's object for this process. One rank waits at most `wait` seconds for another.

    accelerate 1.15 takes FSDP on CPUs for DDP without a word. Here it is what was asked for, or refused.

    Raises ValueError for FSDP1, which moves parameters where routing replay and this trainer don't look.
    """
    timeout = timedelta(seconds=wait)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP version 1 is not supported: write fsdp_version: 2 into the accelerate config")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") or not torch.cuda.is_available()
    if (
        sharded
        and on_cpu
        and PartialState._shared_state == {}
        and PartialState(cpu=True, timeout=timeout).num_processes > 1
    ):
        # What accelerate looks at when it decides whether FSDP may be used.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(
        cpu=on_cpu,
        kwargs_handlers=handlers,
        # Not the environment's number of steps, by which accelerate would divide each loss: the loss here is a sum over
        # micro-batches, already divided by the whole mini-batch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **options,
    )
    if sharded and not accelerator.is_fsdp2:
        raise ValueError(
            f"FSDP2 was asked for, but accelerate runs {accelerator.num_processes} processes as "
            f"{accelerator.distributed_type.value}; take a config without FSDP, or another version of accelerate"
        )
    plugin: Any = accelerator.state.fsdp_plugin if sharded else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        # accelerate would add the ranks' gradients up in bf16.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    return accelerator


def share_experts(model: PreTrainedModel, size: int, *, bf16: bool) -> PreTrainedModel:
    """Shard `model` in place with transformers: each layer's experts over groups of `size` ranks, which send each other
    tokens (all-to-all), and everything else over all ranks (FSDP2). `bf16` computes in bf16.

    Raises ValueError for a model without such a plan or with tied embeddings, and a size that does not fit.
    """
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    world = dist.get_world_size()
    plan = getattr(model, "ep_plan", None) or {}
    if "ep_dispatch_experts" not in plan.values():
        raise ValueError(f"transformers has no plan to dispatch tokens to the experts of a {type(model).__name__}")
    if model.all_tied_weights_keys:
        raise ValueError("its embeddings are tied, which transformers' FSDP2 cannot shard with torch 2.13 or newer")
    experts = getattr(model.config.get_text_config(), "num_experts", size)
    if world % size or experts % size:
        raise ValueError(f"{size} must divide the {world} processes and the {experts} experts of a layer")
    config = DistributedConfig(fsdp_size=world, ep_size=size, fsdp_mixed_precision=bf16)
    mesh = initialize_distributed_mesh(config)[1]
    model = cast(PreTrainedModel, type(model).maybe_distribute_model(model, config, mesh))
    if config.efsdp_size == 1:
        # Without NCCL, transformers asks for a sum first and a division after; torch 2.13 then divides twice where an
        # expert has no second copy.
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule) and name.endswith(".experts"):
                module.set_force_sum_reduction_for_comms(False)
    return model


# -------------------------------------------------------------------------------------------------------------- ranks


class Ranks:
    """This process among `size`; `first` is True on rank 0, which samples, verifies, writes and reports."""

    def __init__(self, accelerator: Accelerator, *, silent: float = 60.0) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self.watch = Watch(self.rank, self.size, silent) if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on some rank."""
        return bool(self.most([int(flag)])[0])

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the ranks."""
        return self._reduce(torch.tensor(numbers, dtype=torch.int64), dist.ReduceOp.MAX).tolist()

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks."""
        return self._reduce(torch.tensor(numbers, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def _reduce(self, numbers: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return numbers
        numbers = numbers.to(self.device)
        dist.all_reduce(numbers, operation)
        return numbers

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def broadcast(self, tensor: Tensor | None) -> Tensor:
        """Rank 0's integer or floating-point tensor of one dimension, on all ranks."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        assert self.first == (tensor is not None)
        floating = int(tensor is not None and tensor.is_floating_point())
        floating, length = self.most([floating, 0 if tensor is None else len(tensor)])
        dtype = torch.float64 if floating else torch.int64
        empty = torch.empty(length, dtype=dtype, device=self.device)
        sent = empty if tensor is None else tensor.to(self.device, dtype).contiguous()
        dist.broadcast(sent, 0)
        return sent

    def scatter(
        self, tensor: Tensor | None, rows: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The rows `rows[rank]` of rank 0's `tensor` [B, *shape]: each rank gets its own and no others."""
        mine = rows[self.rank]
        if self.first:
            assert tensor is not None
            for rank in range(1, self.size):
                if len(rows[rank]):
                    dist.send(_bytes(tensor[rows[rank].to(tensor.device)]), rank)
            return tensor[mine.to(tensor.device)]
        received = torch.empty((len(mine), *shape), dtype=dtype, device=self.device)
        if len(mine):
            dist.recv(_bytes(received), 0)
        return received

    def gather(self, tensor: Tensor, rows: Sequence[Tensor]) -> Tensor | None:
        """The inverse of `scatter`: on rank 0 the tensor [B, …] whose rows `rows[r]` are rank r's; elsewhere None."""
        if not self.first:
            if len(tensor):
                dist.send(_bytes(tensor), 0)
            return None
        whole = torch.empty((sum(map(len, rows)), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        whole[rows[0].to(tensor.device)] = tensor
        for rank in range(1, self.size):
            if len(rows[rank]):
                part = torch.empty((len(rows[rank]), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
                dist.recv(_bytes(part), rank)
                whole[rows[rank].to(tensor.device)] = part
        return whole

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside on one rank ends the others too, each with a message that names the rank.

        Raises RankFailed in place of the error that a collective raises when its partner is gone.
        """
        if self.watch is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ended)
        try:
            yield
        except BaseException as error:
            if self.watch is None:
                raise
            if type(error) in (RuntimeError, dist.DistBackendError):
                if threading.current_thread() is threading.main_thread():
                    # The launcher ends those that are left. It shall not before they have said why.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                if culprit := self.watch.culprit():
                    raise RankFailed(culprit) from error
            self.watch.report(error)
            raise

    def _ended(self, *_: Any) -> None:
        """SIGTERM: the launcher ends those that are left when one is lost, perhaps before a collective has failed."""
        assert self.watch is not None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if culprit := self.watch.culprit(5.0):
            raise RankFailed(culprit)
        raise SystemExit(143)

    def close(self) -> None:
        """The end of a run: no rank is missed any more after it."""
        if self.watch is not None:
            self.barrier()
            self.watch.stop()


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: every backend can send that, whatever the dtype."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def share_rows(costs: Sequence[int], kinds: Sequence[int], size: int) -> list[list[int]]:
    """Which groups each of `size` ranks gets, so that the costs of each kind are level: the dearest first, each to the
    rank that has least of its kind. Every rank computes the same answer. One rank gets all, in order."""
    shares: list[list[int]] = [[] for _ in range(size)]
    for kind in sorted(set(kinds)):
        load = [0] * size
        for group in sorted((g for g, k in enumerate(kinds) if k == kind), key=lambda g: (-costs[g], g)):
            rank = min(range(size), key=lambda r: (load[r], len(shares[r]), r))
            shares[rank].append(group)
            load[rank] += costs[group]
    return [sorted(share) for share in shares]


# -------------------------------------------------------------------------------------------------------------- watch


@dataclass(frozen=True)
class _Identity:
    host: str
    pid: int
    space: str  # pids mean something among processes of the same host and pid namespace

    @classmethod
    def own(cls) -> "_Identity":
        try:
            space = os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            space = ""
        return cls(socket.gethostname(), os.getpid(), space)

    def gone(self, other: "_Identity") -> bool:
        """Whether the other process is known to be dead."""
        if not self.space or self.space != other.space:
            return False
        try:
            status = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return status == "Z"


class Watch:
    """A thread on each rank that gives a sign of life through the store at which the ranks met, and looks for others'.

    A rank is lost that said why it failed, whose process is gone from this machine, or that was silent for `silent`
    seconds. If this rank's main thread does not react, as in a collective that waits for the lost one, the watch prints
    the cause and ends the process.
    """

    GRACE = 5.0
    """Seconds that the main thread has to react."""
    _made = 0  # on every rank alike: each has a part of the store to itself

    def __init__(self, rank: int, size: int, silent: float) -> None:
        self.rank, self.size, self.silent = rank, size, silent
        self._store = dist.distributed_c10d.PrefixStore(
            f"minirl-watch-{Watch._made}", dist.distributed_c10d._get_default_store()
        )
        Watch._made += 1
        self._period = min(1.0, silent / 4)
        self._own = _Identity.own()
        self._verdict = ""
        self._found, self._stopped = threading.Event(), threading.Event()
        self._store.set(f"who/{rank}", f"{self._own.host}|{self._own.pid}|{self._own.space}")
        self._others: dict[int, _Identity] = {}
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread inside the store's C++ would abort the interpreter's end

    def culprit(self, wait: float | None = None) -> str:
        """Who was lost, once the watch has found out; "" if nobody is within `wait` s (default: what that takes)."""
        self._found.wait(self.silent + 2 * self._period if wait is None else wait)
        verdict, self._verdict = self._verdict, ""  # the main thread reacts: the watch need not
        return verdict

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank gives up, and why."""
        with contextlib.suppress(Exception):
            self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}"[:2000])

    def stop(self) -> None:
        """No sign of life from here is expected any more, and none is looked for."""
        self._stopped.set()
        self._thread.join(2 * self._period + 1)
        atexit.unregister(self.stop)

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(self._period):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                lost = self._look()
            except Exception as error:
                lost = f"the process that the ranks met at is gone ({type(error).__name__})"
            if lost and not self._stopped.is_set():
                self._verdict = lost
                self._found.set()
                if not self._stopped.wait(self.GRACE) and self._verdict:
                    print(f"rank {self.rank} stops: {lost}", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    def _look(self) -> str:
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank or not self._store.check([f"who/{rank}"]):
                continue
            if rank not in self._others:
                host, pid, space = self._store.get(f"who/{rank}").decode().split("|", 2)
                self._others[rank] = _Identity(host, int(pid), space)
            other = self._others[rank]
            name = f"rank {rank} ({other.host}, process {other.pid})"
            if self._store.check([f"failed/{rank}"]):
                return f"{name} gave up: {self._store.get(f'failed/{rank}').decode()}"
            if self._own.gone(other):
                return f"{name} died"
            beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            before, since = self._seen.get(rank, ("", now))
            self._seen[rank] = (beat, now if beat != before else since)
            if now - self._seen[rank][1] > self.silent:
                return f"{name} has given no sign of life for {self.silent:g} s"
        return ""
