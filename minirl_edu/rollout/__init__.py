"""Rollouts: the batch that flows through everything (`Rollout`), and the engines that sample it."""

from typing import Any

from transformers import PreTrainedModel

from minirl_edu.config import ConfigError, RolloutConfig
from minirl_edu.precision import Precision
from minirl_edu.rollout.base import EngineError, Rollout, RolloutEngine, Sampling
from minirl_edu.rollout.episodes import Environment, play
from minirl_edu.rollout.hf import HFEngine, sample
from minirl_edu.rollout.vllm import VLLMEngine, check_vllm
from minirl_edu.rollout.vllm_server import VLLMServerEngine

__all__ = [
    "EngineError",
    "Environment",
    "HFEngine",
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "VLLMEngine",
    "VLLMServerEngine",
    "check_vllm",
    "make_engine",
    "play",
    "sample",
]

VLLM_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What vLLM computes in, by the names of `rollout.precision`."""


NOT_EMULATED: dict[str, Any] = {
    name: getattr(RolloutConfig, name) for name in ("rounding", "router_noise", "head_precision")
}
"""The settings of an emulated engine that others do not have, as they stand where nothing is emulated."""


def make_engine(model: PreTrainedModel, config: RolloutConfig, *, seed: int, routes: bool) -> RolloutEngine:
    """The engine that a config's `rollout` section describes, with the weights of `model`; `routes` records experts.

    Raises ConfigError naming the setting that does not fit the engine, and where vLLM is missing or refuses the model.
    """
    keep_faulty = config.on_fault == "drop"
    if config.engine == "hf":
        if config.options:
            raise ConfigError(f"rollout.options = {config.options}: engine 'hf' has none")
        try:
            precision = Precision.parse(
                config.precision, config.rounding, router_noise=config.router_noise, head=config.head_precision
            )
            precision.check(model)
        except ValueError as error:
            noise = f", router_noise = {config.router_noise:g}" if config.router_noise else ""
            raise ConfigError(f"rollout.precision = {config.precision!r}{noise}: {error}") from error
        try:
            return HFEngine(model, precision, seed=seed, record_routes=routes, keep_faulty=keep_faulty)
        except ValueError as error:
            raise ConfigError(f"rollout.engine = 'hf': {error}") from error

    if config.precision not in VLLM_DTYPES:
        raise ConfigError(
            f"rollout.precision = {config.precision!r}: vLLM computes in {', '.join(VLLM_DTYPES)}; its other formats "
            "are among its options, such as kv_cache_dtype: fp8 (engine 'hf' emulates the rest)"
        )
    if given := [name for name, value in NOT_EMULATED.items() if getattr(config, name) != value]:
        raise ConfigError(f"rollout.{', '.join(given)}: engine {config.engine!r} emulates nothing; leave it out")
    if "api_key" in config.options:
        raise ConfigError(
            "rollout.options.api_key: it would be written to config.yaml; set MINIRL_VLLM_API_KEY instead"
        )
    common: dict[str, Any] = {
        "dtype": VLLM_DTYPES[config.precision],
        "record_routes": routes,
        "keep_faulty": keep_faulty,
    }
    try:
        if config.engine == "vllm":
            return VLLMEngine(model, seed=seed, **common, **config.options)
        return VLLMServerEngine(model, **common, **config.options)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"rollout.engine = {config.engine!r}: {error}") from error
