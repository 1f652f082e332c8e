"""What a model has: parameters by kind, and bytes per token of its key-value cache and of a rollout. And
sizes as text."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from minirl_edu.config import ConfigError, ModelConfig
from minirl_edu.models import load_architecture
from minirl_edu.routing import RoutingReplay, UnsupportedRouter

Number = int | float
"""Bytes, seconds and counts are whole or not."""


@dataclass(frozen=True, eq=False)
class ModelStats:
    """Parameter counts of a model, taken from the model itself, built without data.

    total      all; tied ones once                 experts      of all experts together
    embedding  the input table                     num_experts  E, 0 for a dense model
    head       the output matrix, 0 where tied     top_k        k, experts that serve a token
    largest    the largest parameter               moe_layers   layers with experts
    units      (parameters, the experts' among them) of each module that FSDP2 gathers as a whole
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
    def active(self) -> Number:
        """Parameters that serve a token: total − experts · (1 − k/E). Both embeddings count, as in Qwen's 3.3 B."""
        return self.total - self.experts * (1 - self.top_k / max(self.num_experts, 1))

    @property
    def multiplied(self) -> Number:
        """Active parameters that a token is multiplied with: without the input table, which is looked up. OpenAI counts
        so: 3.61 B of gpt-oss-20b. A table that is tied to the head counts, as the head."""
        return self.active - (self.embedding if self.head else 0)


def model_stats_of(settings: ModelConfig) -> ModelStats:
    """The counts of the model that a config's `model` section names. Raises ConfigError where it cannot be built."""
    return _cached_stats(settings.name, json.dumps(settings.overrides), settings.trust_remote_code)


@lru_cache(maxsize=16)
def _cached_stats(name: str, overrides: str, trust_remote_code: bool) -> ModelStats:
    try:
        config = load_architecture(name, json.loads(overrides), trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model_stats(config, trust_remote_code=trust_remote_code)


def model_stats(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> ModelStats:
    """The counts of the causal LM that has this config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    try:
        routers = RoutingReplay(model)
        num_experts, top_k, moe_layers = routers.num_experts, routers.top_k, len(routers.layers)
    except UnsupportedRouter:  # dense, or counted as if every expert served every token
        num_experts = top_k = moe_layers = 0
    expert = {id(p) for name, p in model.named_parameters() if num_experts and ".experts." in name}

    def count(parameters: Iterable[Tensor]) -> tuple[int, int]:
        sizes = {id(p): p.numel() for p in parameters}
        return sum(sizes.values()), sum(size for p, size in sizes.items() if p in expert)

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [table] if head is None or head.weight is table.weight else [table, head]
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    total, experts = count(model.parameters())
    return ModelStats(
        config=config.get_text_config(),
        total=total,
        embedding=count(table.parameters())[0],
        head=count(ends[-1].parameters())[0] if len(ends) == 2 else 0,
        experts=experts,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=moe_layers,
        largest=max(p.numel() for p in model.parameters()),
        units=tuple(count(module.parameters()) for module in [*layers, *ends]),
    )


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of each decoder layer, such as `full_attention`."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def heads_of(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and numbers per head."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def attention_spans(config: PreTrainedConfig, length: Number) -> list[Number]:
    """How many of `length` tokens the last one sees, in each layer with attention: all, or a window of them."""
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = [kind for kind in layer_types(config) if not kind.startswith("linear")]
    return [min(length, window) if kind.startswith("sliding") else length for kind in kinds]


def kv_cache_bytes(config: PreTrainedConfig, length: Number, itemsize: int) -> Number:
    """Bytes of one sequence's key-value cache: Σ_layers 2 · key-value heads · head_dim · itemsize · tokens.

    A layer with a sliding window keeps no more tokens than that. Latent attention keeps one short vector per token.
    """
    _, kv_heads, head_dim = heads_of(config)
    latent = getattr(config, "kv_lora_rank", None)
    numbers = latent + config.qk_rope_head_dim if latent else 2 * kv_heads * head_dim
    return sum(attention_spans(config, length)) * numbers * itemsize


def rollout_bytes_per_token(model: ModelStats, *, routes: bool = True) -> dict[str, int]:
    """Bytes that a `Rollout` keeps of each token: its id, masks, log μ_old, and, with `routes`, L · k experts of one or
    two bytes."""
    experts = (1 if model.num_experts <= 256 else 2) * model.moe_layers * model.top_k * routes
    return {"tokens": 4, "masks": 2 if experts else 1, "log-probabilities": 4, "routes": experts}


def parse_bytes(text: str) -> float:
    """`80GB` (80 · 10⁹) or `80GiB` (80 · 2³⁰) in bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"memory = {text!r}: expected a size such as 80GB or 80GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("MGT".index(match[2]) + 2)


def size_text(size: Number) -> str:
    """Bytes as people write them: `80 GB`, powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"


def duration_text(seconds: Number) -> str:
    """Seconds as people write them: `6.6 min`."""
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
