"""What runs inside vLLM's worker process: weights in by name, routes out by request, and two repairs.

`WorkerExtension` is given to vLLM as `worker_extension_cls="minirl_edu.rollout.vllm_worker.WorkerExtension"`; vLLM then
adds its methods to each worker, to be called by `collective_rpc`, in the same process or over HTTP. Those for a server
take and return JSON's types only.

- **Weights**: `minirl_load_weights` (tensors of the same process) and `minirl_load_file` (safetensors), both through
  vLLM's own `reload_weights`.
- **Repairs of vLLM on CPUs**: `_repair_expert_prepack`, `_repack_tied_heads` (of that reload), `_repair_seeded_chunks`.
- **Self-check**: `minirl_digests` tells whether two engines hold the same weights.
- **Routes on CPUs**, where vLLM's own option is refused: `RouteRecorder`, by `minirl_record_routes` and
  `minirl_take_routes`.

Importing this module without vLLM is possible, and useless.
"""

import base64
import functools
import hashlib
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

# vLLM appends eight random hex digits to a request's id, and puts "<index>_" before it for each of n > 1 samples.
_REQUEST = re.compile(r"(?:(\d+)_)?(.+)-[0-9a-f]{8}")


def request_key(internal: str) -> tuple[str, int]:
    """vLLM's internal request id → (the id that was given, which of its n samples)."""
    match = _REQUEST.fullmatch(internal)
    return (match[2], int(match[1] or 0)) if match else (internal, 0)


def kind_of(name: str) -> str:
    """What a weight is, alike in all layers, in checkpoints and in vLLM: the end of its name, such as gate.weight."""
    return ".".join(name.split(".")[-2:])


def kinds_in_fp32(model: nn.Module) -> list[str]:
    """The kinds of parameters that vLLM holds in fp32, whatever its dtype; some families' routers are among them."""
    return sorted({kind_of(name) for name, parameter in model.named_parameters() if parameter.dtype == torch.float32})


def decode_routes(coded: dict[str, Any]) -> np.ndarray:
    """What `minirl_take_routes` returned for one request, as an array `[tokens, L, k]`."""
    return np.frombuffer(base64.b64decode(coded["base64"]), coded["dtype"]).reshape(coded["shape"])


class WorkerExtension:
    """Methods that vLLM adds to its worker. Their names begin with `minirl_`: vLLM refuses a clash with its own."""

    model_runner: Any  # vLLM's, of the worker that this is mixed into

    # ---------------------------------------------------------------------------------------------------- weights

    def minirl_load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load (checkpoint name, tensor) pairs in place of all weights; one pair is held at a time."""
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        _repack_tied_heads(self.model_runner.get_model())

    def minirl_load_file(self, path: str) -> None:
        """Load a safetensors file in place of all weights."""
        self.minirl_load_weights(_read(path))

    def minirl_suppress(self, tokens: list[int]) -> None:
        """Give these token ids, in place of those of an earlier call, probability 0: in sampling and in every
        log-probability."""
        if not hasattr(self, "_minirl_suppressed"):
            model = self.model_runner.get_model()
            compute = model.compute_logits

            def without(*args: Any, **kwargs: Any) -> Tensor | None:
                logits = compute(*args, **kwargs)
                if logits is not None and len(self._minirl_suppressed):  # None: another rank has them
                    self._minirl_suppressed = self._minirl_suppressed.to(logits.device)
                    logits.index_fill_(-1, self._minirl_suppressed, -math.inf)
                return logits

            model.compute_logits = without
        self._minirl_suppressed = torch.tensor(tokens, dtype=torch.long)

    def minirl_digests(self) -> dict[str, list[int]]:
        """SHA-256 of the bytes of every parameter that vLLM holds."""
        model: nn.Module = self.model_runner.get_model()
        return {name: list(_sha256(parameter)) for name, parameter in model.named_parameters()}

    # ----------------------------------------------------------------------------------------------------- routes

    def minirl_record_routes(self) -> list[int]:
        """Record routes from now on, and forget those of an earlier client; returns the layers that have experts."""
        if not hasattr(self, "_minirl_recorder"):
            self._minirl_recorder = RouteRecorder(self.model_runner)
        self._minirl_recorder.requests.clear()
        return self._minirl_recorder.layers

    def minirl_take_routes(self, request_ids: list[str]) -> dict[str, dict[str, Any]]:
        """Hand out, and forget, the routes of requests by the ids that were given to vLLM.

        Returns {internal id: {"shape": [tokens, L, k], "dtype", "base64"}}; see `request_key` and `decode_routes`.
        """
        taken = self._minirl_recorder.take(set(request_ids))
        return {
            request: {
                "shape": list(rows.shape),
                "dtype": str(rows.dtype),
                "base64": base64.b64encode(rows.tobytes()).decode(),
            }
            for request, rows in taken.items()
        }


def _sha256(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()


def _read(path: str) -> Iterable[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it has no __iter__)
            yield name, file.get_tensor(name)


class RouteRecorder:
    """Keeps the experts of every token that a (V1, eager) model runner feeds, by request.

    Each router reports its choices through vLLM's `set_capture_fn`. After a forward they are attributed to requests by
    the runner's own batch, and also kept beside the KV slot of their token: a request that finds its prefix in the
    cache never feeds those tokens, and gets their routes from the slots. A request that was preempted feeds its tokens
    again, and the later routes replace the earlier.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        self.runner = runner
        routers: dict[int, Any] = {
            m.layer_id: m.router for m in runner.get_model().modules() if isinstance(m, MoERunner)
        }
        self.layers = sorted(routers)
        self.chosen: list[Tensor | None] = [None] * len(routers)
        self.dtype = np.uint8 if max(r.global_num_experts for r in routers.values()) <= 256 else np.uint16
        for i, layer in enumerate(self.layers):
            routers[layer].set_capture_fn(functools.partial(self._capture, i))
        top_k = max(router.top_k for router in routers.values())
        self.block_size = runner.input_batch.block_table[0].block_size
        slots = runner.kv_cache_config.num_blocks * self.block_size
        # Never handed out unset (`take` checks), so −1 can stand for "no route".
        self.slots = np.full((slots, len(routers), top_k), -1, np.int16)
        self.requests: dict[str, list[tuple[int, np.ndarray]]] = {}  # request -> (first position, rows), in order
        forward = runner._model_forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._attribute()
            return output

        runner._model_forward = recorded

    def _capture(self, i: int, experts: Tensor) -> None:
        self.chosen[i] = experts.to(torch.int16, copy=True)

    def _attribute(self) -> None:
        """Give the rows of the forward that just ran to the requests of its batch."""
        batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
        assert all(experts is not None for experts in self.chosen)
        rows = torch.stack(self.chosen, 1).cpu().numpy()  # pyright: ignore[reportArgumentType] # [tokens, L, k]
        if len(rows) != starts[batch.num_reqs]:
            raise RuntimeError(f"routes: {len(rows)} rows captured for {starts[batch.num_reqs]} scheduled tokens")
        blocks = batch.block_table[0].get_numpy_array()
        fed: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        for i, request in enumerate(batch.req_ids):
            own = rows[starts[i] : starts[i + 1]]
            first = int(batch.num_computed_tokens_cpu[i])
            position = np.arange(first + len(own))
            slot = blocks[i][position // self.block_size] * self.block_size + position % self.block_size
            self.slots[slot[first:]] = own
            fed.append((request, first, own, slot))
        # Only now: a request may read a prefix that another one wrote in this same forward.
        for request, first, own, slot in fed:
            if request not in self.requests:
                self.requests[request] = [(0, self.slots[slot[:first]])]
            self.requests[request].append((first, own))
        self.chosen = [None] * len(self.chosen)

    def take(self, ids: set[str]) -> dict[str, np.ndarray]:
        """Routes `[tokens, L, k]` by internal id, for the requests given to vLLM as `ids`; they are forgotten here.

        Raises RuntimeError if a token of theirs has none.
        """
        taken = {}
        for request in [r for r in self.requests if request_key(r)[0] in ids]:
            chunks = self.requests.pop(request)
            length = max(first + len(rows) for first, rows in chunks)
            routes = np.full((length, *self.slots.shape[1:]), -1, np.int16)
            for first, rows in chunks:
                routes[first : first + len(rows)] = rows
            if (routes < 0).any():
                raise RuntimeError(f"routes: request {request} has tokens without any; was recording on all the time?")
            taken[request] = routes.astype(self.dtype)
        return taken


def _repair_expert_prepack() -> None:
    """vLLM on CPUs multiplies by experts in a packed layout, and `reload_weights` (seen in 0.32) forgets to pack.

    The reloaded experts are then read as if packed: silently another model. Where that code is found, pack after a
    reload that did not.
    """
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    except ImportError:
        return
    setup = getattr(UnquantizedFusedMoEMethod, "_setup_kernel", None)
    if setup is None:
        return

    @functools.wraps(setup)
    def and_pack(self: Any, layer: nn.Module, w13: Tensor, w2: Tensor) -> None:
        experts = None if self.moe_kernel is None else self.moe_kernel.fused_experts
        if not isinstance(experts, CPUUnquantizedExperts):
            setup(self, layer, w13, w2)
            return
        packed = []
        pack = experts.process_weights_after_loading
        experts.process_weights_after_loading = lambda layer: packed.append(pack(layer))
        try:
            setup(self, layer, w13, w2)
        finally:
            del experts.process_weights_after_loading
        if not packed:
            pack(layer)

    UnquantizedFusedMoEMethod._setup_kernel = and_pack


def _repack_tied_heads(model: nn.Module) -> None:
    """A head that is tied to the embedding multiplies, on CPUs, by a packed copy of its own, which a reload leaves old:
    no weight arrives under the head's name. Pack it again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for head in model.modules():
        method = getattr(head, "quant_method", None)
        if isinstance(head, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(head)


def _repair_seeded_chunks() -> None:
    """vLLM samples after each chunk of a prompt, drops all but the last draw, and rewinds a seeded request's generator
    by a call that CPU generators lack (0.32: "CPU Generator does not use offset"). Hide those generators from the draws
    that will be dropped: the samples of a request then depend on its seed alone, however its prompt was cut.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample = CPUModelRunner.sample_tokens

    @functools.wraps(sample)
    def drawing_only_what_is_kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        dropped = set(np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0].tolist())
        hidden = {i: batch.generators.pop(i) for i in dropped & batch.generators.keys()}
        try:
            return sample(self, *args, **kwargs)
        finally:
            batch.generators.update(hidden)

    setattr(CPUModelRunner, "sample_tokens", drawing_only_what_is_kept)  # noqa: B010 (a plain assignment has another type)


@functools.cache
def install() -> None:
    """Apply the repairs that this platform needs; once per process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _repair_expert_prepack()
        _repair_seeded_chunks()


if "vllm" in sys.modules:  # imported by vLLM, as its worker extension
    install()
