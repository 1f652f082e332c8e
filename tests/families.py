"""Tiny models of every family of causal language models that the installed transformers knows: `tiny(family)`.

A test that walks them all takes a third of them every day, and all of them at night (`walks`).

Sizes are given to the fields that configs have in common, and to those of a few families that need others. A field is
set only where a family's default config has it.
"""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 32

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    # mixtures of experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    # latent, linear and indexed attention, state-space layers
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    # older names of the feed-forward width
    "ffn_dim": 32,
    "dff": 32,
    "dim_ff": 32,
}

_EIGHT_WIDE = {"head_dim": 8}  # the part of the heads that is rotated

OTHER_SIZES: dict[str, dict[str, Any]] = {
    "axk1": _EIGHT_WIDE,
    "codegen": {"num_attention_heads": 4, "rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v3": _EIGHT_WIDE,
    "deepseek_v4": {"o_lora_rank": 16, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "per_layer_config": {},
    },
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "inkling_text": {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 64},
    "kimi_linear": {"linear_num_heads": 2, "linear_head_dim": 8, **_EIGHT_WIDE},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
        **_EIGHT_WIDE,
    },
    "mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 1},
    "mimo_v2_flash": {"num_attention_heads": 4, "head_dim": 48},
    "nemotron_h": {"n_groups": 1},
    "recurrent_gemma": {"lru_width": 32},
    "xlnet": {"d_head": 16},
    "youtu": _EIGHT_WIDE,
    "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


NOT_TINY = {
    "blt": "its tables of byte hashes have no size in the config",
    "cohere_compass_text": "an embedder: its default config gives no rotation",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "git": "reads images",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "phi4_multimodal": "reads images and sound by models of one size",
    "reformer": "its default config is no causal language model",
    "xmod": "needs to be told the input's language",
}


@cache
def families() -> tuple[str, ...]:
    """Every registered family but encoder-decoders, those whose text part is a family of its own, and `NOT_TINY`."""
    defaults = {
        family: CONFIG_MAPPING[family]() for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in NOT_TINY
    }
    return tuple(f for f, c in defaults.items() if c.get_text_config() is c and not c.is_encoder_decoder)


walks = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.nightly)], ids=["a third", "all"])
"""For tests that walk `families()[::step]`."""


def config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny config of the family."""
    default = CONFIG_MAPPING[family]()
    known = default.to_dict()
    sizes = {k: v for k, v in SIZES.items() if k in known or default.attribute_map.get(k, k) in known}
    return AutoConfig.for_model(family, **(sizes | OTHER_SIZES.get(family, {}) | overrides))


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of the family on the CPU, the same for the same seed, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config(family, **overrides), dtype=torch.float32, attn_implementation="eager"
        )
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.2)
    return model.eval()
