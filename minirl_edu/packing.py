"""Several sequences in one row of a forward, without a mask: transformers' `sdpa` attention, one sequence at a time.

transformers packs sequences by position ids that start again, but under `sdpa` it builds a mask of C² numbers for them,
and the kernel computes what the mask hides. Here each sequence runs the causal kernel on its own part of the row; all
else in a decoder treats every token by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "minirl_packed_sdpa"
"""The attention's name in transformers."""


def allow_packing(model: PreTrainedModel) -> None:
    """Let a model with `sdpa` attention take the inputs of a packed `logprobs.Layout`; all others stay as they were."""
    model.set_attn_implementation(PACKED)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[int, ...] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """`sdpa`; with `segments`, of each so many consecutive tokens by themselves."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    parts = zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in parts], dim=1), None


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)
