"""Several processes (ranks) as one trainer: started by `accelerate launch`, with PyTorch's collectives between them.

    make_accelerator   accelerate's object; refuses what accelerate would otherwise replace in silence
    Ranks              what the ranks tell each other: flags, sums, and rows of tensors, never pickled objects
    RankedBatcher      each rank's share of the mini-batches: the one difference in the way of a batch
    share_experts      expert parallelism through transformers
    Watch              who is alive: if a rank dies, the others name it and stop

One process is the special case in which none of this communicates.
"""

import atexit
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from minirl_edu.balance import Part, deal
from minirl_edu.batches import Batcher, MicroBatch, MiniBatch, Sampled, in_order
from minirl_edu.logprobs import lay_out
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes

T = TypeVar("T", int, float)


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
    # The flag is one for the process. Another trainer that ended while it accumulated leaves it off, and optimizers
    # then skip their steps without a word.
    accelerator.gradient_state.sync_gradients = True
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
    """This process among `size`; `is_main` is True on rank 0, which samples, verifies, writes and reports."""

    def __init__(self, accelerator: Accelerator, *, silent: float = 60.0, stalled: float = 3600.0) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self.watch = Watch(self.rank, self.size, silent, stalled) if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def reached(self, where: str) -> None:
        """This rank has got on to `where`, such as "global step 3, verifying"; from any thread."""
        if self.watch is not None:
            self.watch.reached(where)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on some rank."""
        return bool(self.all_reduce([int(flag)], "max")[0])

    def all_reduce(self, numbers: Sequence[T], operation: Literal["max", "sum"]) -> list[T]:
        """The largest, or the sum, of each number over the ranks. Integers or floats, of 64 bits."""
        if self.size == 1:
            return list(numbers)
        dtype = torch.float64 if isinstance(numbers[0], float) else torch.int64
        sent = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(sent, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[operation])
        return sent.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def broadcast(self, tensor: Tensor | None) -> Tensor:
        """Rank 0's integer or floating-point tensor of one dimension, on all ranks."""
        assert self.is_main == (tensor is not None)
        floating = int(tensor is not None and tensor.is_floating_point())
        floating, length = self.all_reduce([floating, 0 if tensor is None else len(tensor)], "max")
        dtype = torch.float64 if floating else torch.int64
        empty = torch.empty(length, dtype=dtype, device=self.device)
        sent = empty if tensor is None else tensor.to(self.device, dtype).contiguous()
        dist.broadcast(sent, 0)
        return sent

    def scatter(
        self, tensor: Tensor | None, rows: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The rows `rows[rank]` of rank 0's `tensor` [B, *shape]: each rank gets its own and no others. All of them are
        in the machines' memory; what travels is on a device for as long as that takes, at most `_MESSAGE` bytes."""
        if self.is_main:
            assert tensor is not None
            for rank in range(1, self.size):
                for part in _messages(rows[rank], shape, dtype):
                    dist.send(_bytes(tensor[part].to(self.device)), rank)
            return tensor[rows[0]]
        received = torch.empty((len(rows[self.rank]), *shape), dtype=dtype)
        for part in _messages(torch.arange(len(received)), shape, dtype):
            dist.recv(_bytes(arrived := torch.empty((len(part), *shape), dtype=dtype, device=self.device)), 0)
            received[int(part[0]) : int(part[-1]) + 1] = arrived  # torch has no index_put for uint16
        return received

    def gather(self, tensor: Tensor, rows: Sequence[Tensor]) -> Tensor | None:
        """The inverse of `scatter`: on rank 0 the tensor [B, …] whose rows `rows[r]` are rank r's; elsewhere None."""
        shape, dtype = tensor.shape[1:], tensor.dtype
        if not self.is_main:
            for part in _messages(torch.arange(len(tensor)), shape, dtype):
                dist.send(_bytes(tensor[part].to(self.device)), 0)
            return None
        whole = torch.empty((sum(map(len, rows)), *shape), dtype=dtype)
        whole[rows[0]] = tensor
        for rank in range(1, self.size):
            for part in _messages(rows[rank], shape, dtype):
                dist.recv(_bytes(arrived := torch.empty((len(part), *shape), dtype=dtype, device=self.device)), rank)
                whole[part] = arrived.cpu()
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
                if lost := self.watch.lost_rank():
                    raise RankFailed(lost) from error
            self.watch.report(error)
            raise

    def _ended(self, *_: Any) -> None:
        """SIGTERM: the launcher ends those that are left when one is lost, perhaps before a collective has failed."""
        assert self.watch is not None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if lost := self.watch.lost_rank(5.0):
            raise RankFailed(lost)
        raise SystemExit(143)

    def close(self) -> None:
        """The end of a run: no rank is missed any more after it."""
        if self.watch is not None:
            self.barrier()
            self.watch.stop()


def _messages(rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Sequence[Tensor]:
    """Rows of a tensor [B, *shape] in portions of `_MESSAGE` bytes; none if there are no rows."""
    return rows.split(max(1, _MESSAGE // (math.prod(shape) * dtype.itemsize))) if len(rows) else ()


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: every backend can send that, whatever the dtype."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


# -------------------------------------------------------------------------------------------- the mini-batches' shares

_SHAPE = 6

_MESSAGE = 2**28
"""Bytes that travel between two ranks at a time: so much of a rollout is on a rank's device."""


class RankedBatcher(Batcher):
    """A `Batcher` on several ranks, which all call each method. Rank 0 has the rollout. Every rank gets the responses
    of its micro-batches, and as many micro-batches as the others: parameters that are sharded are gathered in each
    forward and backward, so a rank that has fewer fills up with empty ones. `minirl_edu.balance` deals them out.

    `layers` are those of the routes, where there are any.
    """

    def __init__(self, ranks: Ranks, layers: tuple[int, ...], **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks, self.layers = ranks, layers

    def cut(self, sampled: Sampled | None, compute_advantages: Callable[[Tensor, int], Tensor]) -> list[MiniBatch]:
        """The mini-batches of a global step; `sampled` is rank 0's, elsewhere None.

        Raises ConfigError where `force_routes` finds none.
        """
        ranks, size, count = self.ranks, self.group_size, self.mini_batches
        numbers = ranks.broadcast(None if sampled is None else _describe(sampled))
        shape, groups, tokens, lengths = numbers.cpu().split([_SHAPE, count, count, len(numbers) - _SHAPE - 2 * count])
        width, prompt_width = shape.tolist()[:2]
        prompts, fed = lengths.view(2, -1)
        rewards = ranks.broadcast(None if sampled is None else sampled.rewards).float().cpu()
        advantages = compute_advantages(rewards, size)
        cut, dealt, starts = [], [], [0, *(groups * size).cumsum(0).tolist()]
        for start, end, number in zip(starts, starts[1:], tokens.tolist(), strict=False):
            own = slice(start, end)
            rounds = self._deal(prompts[own], fed[own], prompt_width, advantages[own])
            shares = [_joined([parts[r].rows for _, parts in rounds if r < len(parts)]) for r in range(ranks.size)]
            cut.append(MiniBatch(rewards[own], advantages[own], number, width - prompt_width, shares=shares))
            dealt.append(rounds)

        rollout = None if sampled is None else sampled.rollout
        rows = [
            torch.cat([batch.shares[r] + start for batch, start in zip(cut, starts, strict=False)])
            for r in range(ranks.size)
        ]
        mine, begin = self._scatter(rollout, rows, shape.tolist()), 0
        for mini_batch, rounds, start in zip(cut, dealt, starts, strict=False):
            first, own = begin, mini_batch.advantages[mini_batch.shares[ranks.rank]]
            for has_gradient, parts in rounds:
                if ranks.rank >= len(parts):
                    mini_batch.parts.append(self._empty(has_gradient))
                    continue
                part = parts[ranks.rank]
                end = begin + len(part.rows)
                rollout_part = mine.rows(begin, end).trimmed()
                if part.shared > 1:
                    rollout_part = replace(rollout_part, prompts=[None] * (len(part.rows) // part.shared))
                layout = lay_out(rollout_part, share_prompts=part.shared > 1, pack=self.pack)
                inner = torch.arange(begin - first, end - first)
                mini_batch.parts.append(self.laid_out(inner, rollout_part, layout, own, has_gradient))
                begin = end
            if rollout is not None:
                mini_batch.rollout = replace(rollout, routes=None).rows(start, start + mini_batch.responses)
        return cut

    def collect(self, outputs: list[tuple[Tensor, ...]], mini_batch: MiniBatch) -> list[Tensor]:
        """Per-token results [B, T] of all ranks, in the rows' order, on rank 0; elsewhere nothing of use."""
        own, empty = mini_batch.shares[self.ranks.rank], torch.zeros(0, 0)
        local = in_order(outputs or [(own[:0], *[empty] * 3)], len(own), mini_batch.width)
        return [cast(Tensor, self.ranks.gather(column, mini_batch.shares)) for column in local]

    def _deal(
        self, prompts: Tensor, fed: Tensor, prompt_width: int, advantages: Tensor
    ) -> list[tuple[bool, list[Part]]]:
        """The rounds of a mini-batch: whether it has a gradient, and the part of each rank that has one."""
        gradient, found = self.has_gradient(advantages).repeat_interleave(self.group_size), []
        for rows, has_gradient in ((gradient.nonzero()[:, 0], True), ((~gradient).nonzero()[:, 0], False)):
            rounds = deal(
                prompts[rows].tolist(),
                fed[rows].tolist(),
                prompt_width=prompt_width,
                group_size=self.group_size,
                budget=self.tokens,
                size=self.ranks.size,
                share=self.share_prompts,
                pack=self.pack,
                attention=self.attention,
            )
            for parts in rounds:
                own = [part._replace(rows=tuple(rows[list(part.rows)].tolist())) for part in parts]
                found.append((has_gradient, own))
        return found

    def _scatter(self, rollout: Rollout | None, rows: list[Tensor], shape: list[int]) -> Rollout:
        """This rank's rows of rank 0's rollout."""
        width, prompt, version, layers, top_k, wide = shape
        routes = None if rollout is None else rollout.routes

        def send(name: str, columns: Sequence[int], dtype: torch.dtype) -> Tensor:
            whole = routes if name in ("experts", "valid") else rollout
            return self.ranks.scatter(None if whole is None else getattr(whole, name), rows, columns, dtype)

        tokens = send("tokens", (width,), torch.int32)
        mask = send("attention_mask", (width,), torch.bool)
        written = send("response_mask", (width - prompt,), torch.bool)
        logp = send("logp_rollout", (width - prompt,), torch.float32)
        if layers:
            experts = send("experts", (width, layers, top_k), torch.uint16 if wide else torch.uint8)
            routes = Routes(experts, send("valid", (width,), torch.bool), self.layers)
        return Rollout(tokens, mask, prompt, written, logp, routes, [None] * len(tokens), version)

    def _empty(self, has_gradient: bool) -> MicroBatch:
        tokens = torch.zeros(1, 2, dtype=torch.int32)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        rollout = Rollout(tokens, mask, 1, mask[:, 1:], torch.zeros(1, 1), None, [None], 0)
        layout = lay_out(rollout, share_prompts=False)
        return MicroBatch(tokens[:0, 0].long(), rollout, layout, torch.zeros(1), has_gradient, empty=True)


def _describe(sampled: Sampled) -> Tensor:
    """What every rank has to know of rank 0's rollout, as integers: its shape, then for each mini-batch its groups and
    its response tokens, then for each response the tokens of its prompt, and of itself, that a forward reads."""
    rollout, size = sampled.rollout, sampled.rollout.group_size
    routes = rollout.routes
    layers, top_k = (0, 0) if routes is None else routes.experts.shape[2:]
    wide = int(routes is not None and routes.experts.dtype == torch.uint16)
    shape = [rollout.tokens.shape[1], rollout.prompt_length, rollout.weight_version, layers, top_k, wide]
    written = rollout.response_mask.sum(1)
    tokens = [int(part.sum()) for part in written.split([groups * size for groups in sampled.groups])]
    prompts = rollout.attention_mask[:, : rollout.prompt_length].sum(1)
    return torch.tensor([*shape, *sampled.groups, *tokens, *prompts.tolist(), *(rollout.lengths - 1).tolist()])


def _joined(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor([row for part in rows for row in part], dtype=torch.int64)


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
    seconds. A sign of life says that the process lives, not that its main thread does. So the run is given up as well
    if no rank has `reached` anything new for `stalled` seconds. One rank alone may wait longer: the others do while the
    first samples. If this rank's main thread does not react, as in a collective that waits for the lost one, the watch
    prints the cause and ends the process.
    """

    GRACE = 5.0
    """Seconds that the main thread has to react."""
    _made = 0  # on every rank alike: each has a part of the store to itself

    def __init__(self, rank: int, size: int, silent: float, stalled: float) -> None:
        self.rank, self.size, self.silent, self.stalled = rank, size, silent, stalled
        self._store = dist.distributed_c10d.PrefixStore(
            f"minirl-watch-{Watch._made}", dist.distributed_c10d._get_default_store()
        )
        Watch._made += 1
        self._period = min(1.0, silent / 4, stalled / 4)
        self._marks, self._where = 0, "starting"
        self._places: dict[int, str] = {}
        self._moved = time.monotonic()  # when some rank last got on
        self._own = _Identity.own()
        self._verdict = ""
        self._found, self._stopped = threading.Event(), threading.Event()
        self._store.set(f"who/{rank}", f"{self._own.host}|{self._own.pid}|{self._own.space}")
        self._others: dict[int, _Identity] = {}
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread inside the store's C++ would abort the interpreter's end

    def lost_rank(self, wait: float | None = None) -> str:
        """Who was lost, once the watch has found out; "" if nobody is within `wait` s (default: what that takes)."""
        self._found.wait(self.silent + 2 * self._period if wait is None else wait)
        verdict, self._verdict = self._verdict, ""  # the main thread reacts: the watch need not
        return verdict

    def reached(self, where: str) -> None:
        """The main thread has got on to `where`."""
        self._where, self._marks = where, self._marks + 1

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
                self._store.set(f"place/{self.rank}", f"{self._marks}|{self._where}")
                lost = self._look() or self._stall()
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

    def _stall(self) -> str:
        known = [rank for rank in range(self.size) if self._store.check([f"place/{rank}"])]
        places = {rank: self._store.get(f"place/{rank}").decode() for rank in known}
        if places != self._places:
            self._places, self._moved = places, time.monotonic()
        if time.monotonic() - self._moved <= self.stalled:
            return ""
        where = "; ".join(f"rank {rank}: {place.partition('|')[2]}" for rank, place in places.items())
        return f"no rank has got on for {self.stalled:g} s ({where}); ranks.stalled allows more"
