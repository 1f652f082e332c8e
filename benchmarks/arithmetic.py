"""The least that a step can cost: its multiply-adds, at the rate at which this machine multiplies large matrices."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SIZE, _REPEATS = 1024, 5


def forward_flops(config: Any, *, tokens: int, pairs: int, logits: int) -> int:
    """FLOP of a Qwen3-MoE forward, two per multiply-add, from its config.

    `tokens` are fed; every head and layer attends to `pairs` of a query and a key in all; the output head reads
    `logits` positions. Matrix products only: norms, rotations, softmaxes and activations count as nothing.
    """
    hidden = config.hidden_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    projections = hidden * (2 * queries + 2 * keys)  # query and output, key and value
    router = hidden * config.num_experts
    experts = config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size  # gate, up, down
    layer = tokens * (projections + router + experts) + pairs * 2 * queries  # q·k, and the weighted sum of values
    return 2 * (config.num_hidden_layers * layer + logits * hidden * config.vocab_size)


def step_flops(config: Any, *, prompt_length: int, lengths: Tensor, group_size: int) -> dict[str, int]:
    """FLOP of one global step on responses of `lengths` tokens [B], counted twice.

    Both sample alike: each prompt is read once for its group, then every response token but the last. The update is a
    forward and a backward (twice the forward)

        plain     of every position of the padded batch, B × (P + T − 1)
        executed  of the tokens that `minirl_edu` feeds: the prompt once for its group, no padding
    """
    responses, longest = len(lengths), int(lengths.max())
    groups, fed = responses // group_size, lengths - 1
    tokens = groups * prompt_length + int(fed.sum())
    pairs = groups * _causal(prompt_length) + int((fed * prompt_length + _causal(fed)).sum())
    sampling = forward_flops(config, tokens=tokens, pairs=pairs, logits=groups + int(fed.sum()))
    width = prompt_length + longest - 1
    padded = responses * width
    plain = forward_flops(config, tokens=padded, pairs=responses * _causal(width), logits=padded)
    executed = forward_flops(config, tokens=tokens, pairs=pairs, logits=tokens)
    return {"plain": sampling + 3 * plain, "executed": sampling + 3 * executed}


def _causal(tokens: Any) -> Any:
    """(query, key) pairs of a causal sequence: token t sees t tokens."""
    return tokens * (tokens + 1) // 2


def matmul_rate(seed: int) -> Callable[[], float]:
    """A function that measures the FLOP per second of fp32 matrix products of 1024 × 1024 by 1024 × 1024, now."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(_REPEATS):
            torch.mm(a, b)
        return _REPEATS * 2 * _SIZE**3 / (time.perf_counter() - started)

    return measure
