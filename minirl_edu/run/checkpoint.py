"""Checkpoints that a crash cannot spoil: safetensors and JSON, written under another name and renamed when complete.

    checkpoints/step-000040/
        model.safetensors, optimizer.safetensors, …   one file per group of tensors
        model-00000.safetensors, …                    instead, of a sharded model: one file per group and process
        state.json                                    everything else: counters, scheduler, optimizer groups
        manifest.json                                 written last: size and SHA-256 of each file above

Nothing is pickled, so reading a checkpoint never runs code from it, and files that the manifest doesn't name are not
opened.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.streaming import (
    Runs,
    is_first_copy,
    like,
    local_part,
    overlaps,
    runs_of,
    untied_state,
    write_safetensors,
)

_FORMAT, _SHARDED = 1, 2
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save_checkpoint(
    directory: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    aliases: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write `directory/step-<step>` from one process, at once; see `CheckpointWriter`."""
    writer = CheckpointWriter(Path(directory), keep_last=keep_last)
    return writer.save(step, tensors=tensors, state=state, aliases=aliases, wait=True)


class CheckpointWriter:
    """Writes a run's checkpoints, `directory/step-<step>`, atomically, and deletes all but the `keep_last` newest.

    On several processes each makes one, and all call `save`. Each writes what it has of sharded tensors into files of
    its own, and hashes them; the first adds the rest and the manifest when all have said that theirs are written, and
    gives the folder its name. They tell each other by files in the folder, which all of them have to see.

    `save` returns when the tensors are copied to the host's memory. Files are written while the run goes on, one
    checkpoint at a time. The next `check`, `wait` or `save` raises what went wrong. A failure at any moment leaves
    earlier checkpoints as they were and nothing half-written that `latest_checkpoint` would take; what a killed process
    left is removed by the next save.

    Raises ValueError for `keep_last` below 1.
    """

    GRACE = 20.0
    """Seconds that `close` gives other processes to write their parts."""

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        rank: int = 0,
        size: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}: expected at least 1, the checkpoint being written")
        self.directory, self.keep_last, self.rank, self.size, self.barrier = directory, keep_last, rank, size, barrier
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._abandoned = threading.Event()

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        aliases: Mapping[str, Mapping[str, str]] | None = None,
        wait: bool = False,
    ) -> Path:
        """Write a checkpoint; with `wait` at once and without a copy.

        `tensors` maps a group such as "model" to its named tensors; tensors that share memory exactly (tied embeddings)
        are stored once and shared again when loaded. Of sharded tensors, memory does not tell which are tied: `aliases`
        names them for each group, alias → name. `state` is JSON: string keys, lists rather than tuples.

        Raises ValueError for a group name that is no plain file name, CheckpointError where an intact checkpoint of
        this step exists (a damaged one is replaced), OSError for a full disk.
        """
        self.wait()
        final = checkpoint_path(self.directory, step)
        if self.rank == 0:
            self._prepare(final, tensors)
        self.barrier()
        sharded = any(isinstance(tensor, DTensor) for named in tensors.values() for tensor in named.values())
        parts, tied = {}, {}
        for group, named in tensors.items():
            name = f"{group}-{self.rank:05d}.safetensors" if sharded else f"{group}.safetensors"
            whole = {} if self.rank else {n: t for n, t in named.items() if not _is_part(t)}
            stored, tied[group] = _untie(whole)
            tied[group] |= (aliases or {}).get(group, {})
            layout = {}
            for key, tensor in named.items():
                if _is_part(tensor) and is_first_copy(tensor) and local_part(tensor).numel():
                    stored[key] = local_part(tensor)
                    layout[key] = {"shape": list(tensor.shape), "runs": runs_of(tensor)}
            if not wait:
                stored = {key: tensor.to("cpu", copy=True) for key, tensor in stored.items()}
            if sharded or not self.rank:
                parts[name] = stored, layout
        text = {"state": state, "tied": tied} | ({"parts": self.size} if sharded else {})
        job = functools.partial(self._write, final, step, parts, json.dumps(text), _SHARDED if sharded else _FORMAT)
        if wait:
            job()
        else:
            self._pending = self._pool.submit(job)
        return final

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did so far."""
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()

    def settle(self) -> None:
        """Wait until this process has nothing to write any more, however that ends; `check` tells."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])

    def wait(self) -> None:
        """`settle`, then `check`."""
        self.settle()
        self.check()

    def close(self) -> None:
        """The end, perhaps by an error: what is being written is finished, unless another process fails to. A failure
        that nobody has seen becomes a warning."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending], self.GRACE if self.size > 1 else None)
            self._abandoned.set()
            try:
                self.wait()
            except Exception as error:
                warnings.warn(f"a checkpoint was not written: {error}", stacklevel=2)
        self._pool.shutdown()

    def _prepare(self, final: Path, tensors: Mapping[str, object]) -> None:
        """A folder to write to, on the first process, and no other that was left half-written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        for group in tensors:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
                raise ValueError(f"tensors: group {group!r}: expected letters, digits, - and _, as it names a file")
        if final.exists():
            try:
                _verify(final)
            except CheckpointError:
                shutil.rmtree(final)
            else:
                raise CheckpointError(f"{final}: this step is already saved; resume from it or choose another folder")
        _partial(final).mkdir()

    def _write(self, final: Path, step: int, parts: Mapping[str, tuple[Any, Any]], state: str, form: int) -> None:
        """This process's files; on the first, when all have theirs, the manifest and the name."""
        partial = _partial(final)
        try:
            for name, (stored, layout) in parts.items():
                metadata = {"layout": json.dumps(layout)} if layout else None
                write_safetensors(partial / name, stored, stored.items(), metadata)
            names = list(parts)
            if self.rank == 0:
                (partial / "state.json").write_text(state, encoding="utf-8")
                names.append("state.json")
            for name in names:
                _flush(partial / name)
            files = {
                name: {"bytes": (partial / name).stat().st_size, "sha256": digest}
                for name, digest in _digests([partial / name for name in names]).items()
            }
            if self.rank:
                _tell(partial, self.rank, {"files": files})
                return
            for rank in range(1, self.size):
                files |= self._part_of(rank, final)
            text = {"format": form, "step": step, "files": files}
            manifest = partial / _MANIFEST
            manifest.write_text(json.dumps(text, indent=1), encoding="utf-8")
            _flush(manifest)
            _flush(partial)
            os.rename(partial, final)
            _flush(self.directory)
        except BaseException as error:
            if self.rank:
                with suppress(OSError):
                    _tell(partial, self.rank, {"error": f"{type(error).__name__}: {error}"})
            else:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk stays full otherwise
            raise
        steps = _steps(self.directory)
        for old in steps[: steps.index(final) + 1][: -self.keep_last]:
            shutil.rmtree(old)

    def _part_of(self, rank: int, final: Path) -> dict[str, Any]:
        """What another process has written, when it has."""
        file = _told(_partial(final), rank)
        while not file.exists():
            if self._abandoned.wait(0.02):
                raise CheckpointError(f"{final}: given up, because rank {rank} has not written its part")
        told = json.loads(file.read_text(encoding="utf-8"))
        if "error" in told:
            raise CheckpointError(f"{final}: rank {rank} could not write its part: {told['error']}")
        file.unlink()
        return told["files"]


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _told(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def _tell(partial: Path, rank: int, what: Mapping[str, Any]) -> None:
    """Let the first process know, by a file that is there as a whole or not at all."""
    file = _told(partial, rank)
    file.with_suffix(".tmp").write_text(json.dumps(what), encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


def _is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor) and tensor.dim() > 0


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint in `directory` whose files are what the manifest says; None if there is none.

    A damaged one is passed over with a warning that names the file.
    """
    for path in reversed(_steps(Path(directory))):
        try:
            _verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; looking for an earlier checkpoint", stacklevel=2)
        else:
            return path
    return None


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a global step is."""
    return directory / f"step-{step:06d}"


def checkpoint_step(path: Path) -> int:
    """The global step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


class Parts(Mapping[str, Tensor]):
    """The tensors of a group that several processes wrote, read from their files when asked for: whole, or in part."""

    def __init__(self, files: Sequence[Path], aliases: Mapping[str, str]) -> None:
        self._aliases, self._at = aliases, {}
        self._shapes: dict[str, list[int]] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            layout = json.loads((file.metadata() or {}).get("layout", "{}"))
            for name in file.keys():  # noqa: SIM118 (it has no __iter__)
                shape = file.get_slice(name).get_shape()
                at = layout.get(name, {"shape": shape, "runs": [[(0, size)] for size in shape]})
                self._shapes[name] = at["shape"]
                self._at.setdefault(name, []).append((file, at["runs"]))
        for alias, name in aliases.items():
            self._shapes[alias] = self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, [[(0, size)] for size in self._shapes[name]])

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole tensor."""
        return torch.Size(self._shapes[name])

    def part(self, name: str, runs: Runs) -> Tensor:
        """One part of a tensor."""
        name = self._aliases.get(name, name)
        found: Any = None
        for file, theirs in self._at[name]:
            for here, there in overlaps(runs, theirs):
                block = file.get_slice(name)[there] if there else file.get_tensor(name)
                if found is None:
                    found = block.new_empty([sum(end - start for start, end in dim) for dim in runs])
                found[here] = block
        if found is None:  # a part without numbers
            found = self._at[name][0][0].get_tensor(name).new_empty([sum(e - s for s, e in dim) for dim in runs])
        return found


def load_checkpoint(path: str | Path, *, verify: bool = True) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """The `tensors` (on the CPU, read from the file when used) and the `state` that `save_checkpoint` was given.

    `verify=False` trusts the checksums, for one that `latest_checkpoint` has just verified.
    Raises CheckpointError for a file that is missing, truncated or changed.
    """
    path = Path(path)
    files = _verify(path) if verify else {file.name for file in path.iterdir()}
    try:
        saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for group, aliases in saved["tied"].items():
            parts = range(saved.get("parts", 0))
            names = [f"{group}-{rank:05d}.safetensors" for rank in parts] or [f"{group}.safetensors"]
            if missing := [name for name in names if name not in files]:
                raise ValueError(f"{missing[0]} is not in the manifest")
            if parts:
                tensors[group] = Parts([path / name for name in names], aliases)
                continue
            named = safetensors.torch.load_file(path / names[0])
            tensors[group] = named | {alias: named[original] for alias, original in aliases.items()}
        return tensors, saved["state"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        # The checksums were right.
        raise CheckpointError(f"{path}: not written by save_checkpoint: {error!r}") from error


def save_training(
    writer: CheckpointWriter,
    *,
    step: int,
    grad_step: int,
    model: PreTrainedModel,
    optimizer: Any,
    scheduler: Any,
    detector: CollapseDetector,
    wait: bool,
) -> Path:
    """Write a checkpoint of everything that the remaining steps depend on. All processes call this."""
    tensors, groups = flatten_optimizer(optimizer.state_dict())
    return writer.save(
        step,
        tensors={"model": untied_state(model), "optimizer": tensors},
        aliases={"model": dict(model.all_tied_weights_keys)},
        state={
            "global_step": step,
            "grad_step": grad_step,
            "optimizer": groups,
            "scheduler": scheduler.state_dict(),
            "detector": detector.state_dict(),
        },
        wait=wait,
    )


@torch.no_grad()
def restore_training(
    path: Path, *, model: PreTrainedModel, optimizer: Any, scheduler: Any, detector: CollapseDetector
) -> tuple[int, int]:
    """Take up a checkpoint that `latest_checkpoint` verified, from any number of processes; each keeps its part.

    Returns the global and the gradient steps done. Raises CheckpointError for another model's.
    """
    tensors, state = load_checkpoint(path, verify=False)
    ours, theirs = model.state_dict(), tensors["model"]
    if wrong := ours.keys() ^ theirs.keys():
        raise CheckpointError(f"{path}: another model's: {sorted(wrong)[0]} is only in one of them")
    for name, tensor in ours.items():
        tensor.copy_(_own(theirs, name, tensor))
    moments = _Moments(tensors["optimizer"], [p for group in optimizer.param_groups for p in group["params"]])
    optimizer.load_state_dict(unflatten_optimizer(moments, state["optimizer"]))
    scheduler.load_state_dict(state["scheduler"])
    detector.load_state_dict(state["detector"])
    return state["global_step"], state["grad_step"]


def _own(saved: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """What this process keeps of a saved tensor, laid out as `tensor` is; no more is read, where parts were written."""
    if not isinstance(saved, Parts) or not _is_part(tensor):
        return like(saved[name], tensor)
    part = saved.part(name, runs_of(tensor)).to(tensor.device)
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


class _Moments(Mapping[str, Tensor]):
    """The tensors of `flatten_optimizer`, those of a parameter's shape laid out as the parameter is."""

    def __init__(self, saved: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
        self.saved, self.parameters = saved, parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)

    def __getitem__(self, name: str) -> Tensor:
        where, index, *_ = name.split(".")
        shape = self.saved.shape(name) if isinstance(self.saved, Parts) else self.saved[name].shape
        if where == "state" and shape and shape == (parameter := self.parameters[int(index)]).shape:
            return _own(self.saved, name, parameter)
        return self.saved[name]


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Split a torch optimizer's `state_dict()` into named tensors and the rest as JSON, without losing a bit.

    Integer keys and tuples, which JSON has not, are kept. Raises TypeError for a value that is neither a tensor nor
    plain data. `unflatten_optimizer` is the inverse.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, encode(item, f"{name}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [encode(item, f"{name}.{i}") for i, item in enumerate(value)]}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(f"optimizer state {name} is a {type(value).__name__}: expected a tensor or plain data")

    return tensors, encode(state_dict, "")


def unflatten_optimizer(tensors: Mapping[str, Tensor], state: Any) -> dict[str, Any]:
    """The `state_dict` that `flatten_optimizer` was given."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: decode(item) for key, item in content}
        return {"list": list, "tuple": tuple}[kind](decode(item) for item in content)

    return decode(state)


def _untie(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that safetensors can store (contiguous, none sharing memory), and alias → name for those stored once."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    storages = set()
    for name, tensor in named.items():
        tensor = tensor.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        # A different view of memory that is already stored gets a copy of its own.
        stored[name] = tensor.contiguous().clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return stored, aliases


def _steps(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first, intact or not."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=checkpoint_step)


def _verify(path: Path) -> dict[str, Any]:
    """The files of the manifest, each of the right size and checksum; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in (_FORMAT, _SHARDED) or path.name != f"step-{manifest['step']:06d}":
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if "state.json" not in expected:
            raise ValueError("state.json is not listed")
    except FileNotFoundError:
        raise CheckpointError(f"{path / _MANIFEST}: missing, so this is no complete checkpoint") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: damaged: {error!r}") from error
    for name, (size, _) in expected.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes where {size} were written")
    for name, digest in _digests([path / name for name in expected]).items():
        if digest != expected[name][1]:
            raise CheckpointError(f"{path / name}: its contents changed after it was written (SHA-256 differs)")
    return expected


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name, as many at a time as there are processors."""
    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1))) as pool:
        return dict(zip([file.name for file in files], pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
