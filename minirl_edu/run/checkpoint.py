"""Checkpoints that a crash cannot spoil: safetensors and JSON, written under another name and renamed when complete.

    checkpoints/step-000040/
        model.safetensors, optimizer.safetensors, …   one file per group of tensors
        state.json                                    everything else: counters, scheduler, optimizer groups
        manifest.json                                 written last: size and SHA-256 of each file above

Nothing is pickled, so reading a checkpoint never runs code from it, and files that the manifest doesn't name are not
opened.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.streaming import gather_full, like, untied_state, write_safetensors

_FORMAT = 1
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
    is_main: bool = True,
) -> Path:
    """Write `directory/step-<step>` atomically, then delete all but the `keep_last` newest up to this step.

    `tensors` maps a group such as "model" to its named tensors; tensors that share memory exactly (tied embeddings) are
    stored once and shared again when loaded. `state` is JSON: string keys, lists rather than tuples.
    Tensors that are sharded over several processes are made whole one at a time, while they are written: all processes
    call this, with `is_main` True for the one that writes. Of those, memory does not tell which are tied: `aliases`
    names them for each group, alias → name.
    A failure at any moment leaves earlier checkpoints as they were and nothing half-written that `latest_checkpoint`
    would take; what a killed process left is removed by the next save. One process saves at a time.

    Raises ValueError for a group name that is no plain file name, CheckpointError where an intact checkpoint of this
    step exists (a damaged one is replaced), OSError for a full disk.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}: expected at least 1, the checkpoint being written")
    directory = Path(directory)
    if not is_main:
        for named in tensors.values():
            for tensor in named.values():
                gather_full(tensor)
        return checkpoint_path(directory, step)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step-*.tmp"):
        shutil.rmtree(leftover)

    final = checkpoint_path(directory, step)
    if final.exists():
        try:
            _verify(final)
        except CheckpointError:
            shutil.rmtree(final)
        else:
            raise CheckpointError(f"{final}: this step is already saved; resume from it or choose another folder")

    partial = directory / f".{final.name}.tmp"
    try:
        partial.mkdir()
        tied = {}
        for group, named in tensors.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
                raise ValueError(f"tensors: group {group!r}: expected letters, digits, - and _, as it names a file")
            stored, tied[group] = _untie(named)
            tied[group] |= (aliases or {}).get(group, {})
            whole = ((name, gather_full(tensor)) for name, tensor in stored.items())
            write_safetensors(partial / f"{group}.safetensors", stored, whole)
        (partial / "state.json").write_text(json.dumps({"state": state, "tied": tied}), encoding="utf-8")
        files = {}
        for path in sorted(partial.iterdir()):
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = partial / _MANIFEST
        manifest.write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
        _flush(manifest)
        _flush(partial)
        os.rename(partial, final)
        _flush(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk stays full otherwise
        raise

    steps = _steps(directory)
    for old in steps[: steps.index(final) + 1][:-keep_last]:
        shutil.rmtree(old)
    return final


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


def load_checkpoint(path: str | Path, *, verify: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The `tensors` (on the CPU, read from the file when used) and the `state` that `save_checkpoint` was given.

    `verify=False` trusts the checksums, for one that `latest_checkpoint` has just verified.
    Raises CheckpointError for a file that is missing, truncated or changed.
    """
    path = Path(path)
    files = _verify(path) if verify else {file.name for file in path.iterdir()}
    try:
        saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {}
        for group, aliases in saved["tied"].items():
            name = f"{group}.safetensors"
            if name not in files:
                raise ValueError(f"{name} is not in the manifest")
            named = safetensors.torch.load_file(path / name)
            tensors[group] = named | {alias: named[original] for alias, original in aliases.items()}
        return tensors, saved["state"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        # The checksums were right.
        raise CheckpointError(f"{path}: not written by save_checkpoint: {error!r}") from error


def save_training(
    directory: Path,
    *,
    step: int,
    grad_step: int,
    model: PreTrainedModel,
    optimizer: Any,
    scheduler: Any,
    detector: CollapseDetector,
    keep_last: int,
    is_main: bool,
) -> Path:
    """Write a checkpoint of everything that the remaining steps depend on. All processes call this."""
    tensors, groups = flatten_optimizer(optimizer.state_dict())
    return save_checkpoint(
        directory,
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
        keep_last=keep_last,
        is_main=is_main,
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
        tensor.copy_(like(theirs[name], tensor))
    saved = unflatten_optimizer(tensors["optimizer"], state["optimizer"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        moments = saved["state"].get(i, {})
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                moments[name] = like(value, parameter)
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict(state["scheduler"])
    detector.load_state_dict(state["detector"])
    return state["global_step"], state["grad_step"]


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
        if isinstance(tensor, DTensor):
            stored[name] = tensor
            continue
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
        if manifest["format"] != _FORMAT or path.name != f"step-{manifest['step']:06d}":
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if "state.json" not in expected:
            raise ValueError("state.json is not listed")
    except FileNotFoundError:
        raise CheckpointError(f"{path / _MANIFEST}: missing, so this is no complete checkpoint") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: damaged: {error!r}") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes where {size} were written")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file}: its contents changed after it was written (SHA-256 differs)")
    return expected


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
