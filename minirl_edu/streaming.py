"""Whole tensors of a model that may be sharded (FSDP2, expert parallelism), one at a time: to an engine, to a file.

What only one rank needs is made whole on all of them, tensor by tensor, because gathering is a collective: every rank
iterates in step, and nobody ever holds more than the tensor at hand.
"""

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import PreTrainedModel

Runs = Sequence[Sequence[tuple[int, int]]]
"""A part of a tensor: for each dimension the runs [start, end) that belong to it."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold parts of this model's parameters, rather than all of them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: torch.nn.Module) -> None:
    """Give back what a forward without a backward left whole: FSDP2 keeps the last group of parameters (final norm and
    head) for the backward, and until then shows them in the place of the shards that gradients and updates go to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, detached; any other is returned as it is. All ranks have to call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, detached; any other tensor is this rank's as a whole."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def full_state(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of a model's state, tied weights once. All ranks have to iterate, in step."""
    for name, tensor in untied_state(model).items():
        yield name, gather_full(tensor)


def take_part(model: PreTrainedModel) -> None:
    """What `full_state` asks of a rank that needs nothing of it. Costs nothing where the model is not sharded."""
    if is_sharded(model):
        deque(full_state(model), maxlen=0)


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state as this rank holds it, without the names that repeat another's weight."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole`, laid out as `tensor` is: of a sharded one, this rank's part, without communication."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def runs_of(tensor: DTensor) -> Runs:
    """Which part of a sharded tensor this rank has. `like` cuts the same part."""
    mesh, found = tensor.device_mesh, []
    for dim, size in enumerate(tensor.shape):
        placements = [p if getattr(p, "dim", None) == dim else Replicate() for p in tensor.placements]
        if all(isinstance(placement, Replicate) for placement in placements):
            found.append([(0, size)])
            continue
        rows = torch.arange(size, device=mesh.device_type).view([-1 if d == dim else 1 for d in range(tensor.dim())])
        held = distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local().flatten().tolist()
        starts = [i for i, row in enumerate(held) if i == 0 or row != held[i - 1] + 1]
        found.append([(held[i], held[j - 1] + 1) for i, j in itertools.pairwise([*starts, len(held)])])
    return found


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that have the same part of a sharded tensor."""
    at = tensor.device_mesh.get_coordinate() or []
    return all(i == 0 for i, placement in zip(at, tensor.placements, strict=True) if isinstance(placement, Replicate))


def overlaps(ours: Runs, theirs: Runs) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Where two parts of a tensor overlap, block by block: the block's place in `ours`, and in `theirs`."""
    found = []
    for our_runs, their_runs in zip(ours, theirs, strict=True):
        shared, here = [], 0
        for start, end in our_runs:
            there = 0
            for first, last in their_runs:
                low, high = max(start, first), min(end, last)
                if low < high:
                    at, other = here + low - start, there + low - first
                    shared.append((slice(at, at + high - low), slice(other, other + high - low)))
                there += last - first
            here += end - start
        found.append(shared)
    for blocks in itertools.product(*found):
        yield tuple(ours for ours, _ in blocks), tuple(theirs for _, theirs in blocks)


def architecture_name(model: PreTrainedModel) -> str:
    """The name of the model's class in transformers; FSDP2 puts one of its own in front."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def write_safetensors(
    path: Path,
    specs: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file while its tensors come; `specs` tells dtype and shape of each beforehand, in order.

    Raises ValueError for a tensor that is not what `specs` says, or a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        if spec.dtype not in _DTYPES:
            raise ValueError(f"{name}: safetensors files hold no {spec.dtype}")
        start, end = end, end + spec.numel() * spec.element_size()
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        expected = iter(specs.items())
        for name, tensor in tensors:
            at, spec = next(expected, ("nothing more", tensor))
            if (at, spec.dtype, spec.shape) != (name, tensor.dtype, tensor.shape):
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} where {at} was announced")
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
        if (left := next(expected, None)) is not None:
            raise ValueError(f"{left[0]}: announced, but it never came")
