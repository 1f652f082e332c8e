"""Tiny models of thirteen transformers families that routing replay serves, sized so that their routers show: groups,
shared experts and leading dense layers are on where a family can. `tests/families.py` has all the others."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 32

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Wide enough for routings to differ between tokens, for a random model.
    "initializer_range": 0.2,
}
_LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "shared_expert_intermediate_size": 16,
}

# model_type -> what differs from _COMMON. Groups, shared experts and leading dense layers are on where a family can.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16},
    "qwen3_next": {"num_experts": 8, **_LINEAR_ATTENTION},
    "qwen3_5_moe_text": {"num_experts": 8, **_LINEAR_ATTENTION},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "flex_olmo": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        **_LATENT_ATTENTION,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        **_LATENT_ATTENTION,
    },
    # One group: the top-2 inside each group then runs over all experts, and must not be taken for the selection.
    "glm4_moe": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, **_LATENT_ATTENTION},
    "minimax_m2": {"num_local_experts": 8},
}
LEADING_DENSE = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")


def build(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of the family on the CPU, the same for the same seed, in eval mode."""
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES.get(family, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        # Some families initialise routers and their selection biases to zero or nearly: every token would route alike.
        for name, tensor in model.state_dict().items():
            if name.endswith(("gate.weight", "router.weight")):
                tensor.normal_(std=0.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
    return model.eval()
