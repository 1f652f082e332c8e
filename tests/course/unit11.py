"""Two right answers to every exercise of unit 11, written differently from the solution."""

import itertools
import math

import torch
from torch import nn


def _losses_by_loops(ranks):
    responses = 0
    for _, mask in ranks:
        responses += mask.shape[0]
    losses = []
    for terms, mask in ranks:
        loss = torch.zeros(())
        for b, t in mask.nonzero().tolist():
            loss = loss + terms[b, t] / responses
        losses.append(loss)
    return losses


def _losses_per_response(ranks):
    """One vector of all responses, its mean, split up again by rank."""
    per_response = torch.cat([torch.einsum("bt,bt->b", terms, mask.float()) for terms, mask in ranks])
    shares = per_response / per_response.numel()
    return [part.sum() for part in shares.split([len(mask) for _, mask in ranks])]


def _by_mean_count(loss_sum, own, counts):
    return loss_sum / (sum(counts) / len(counts))


def _by_local_mean(loss_sum, own, counts):
    """The local mean, weighted by the rank's share of the responses."""
    local_mean = loss_sum / own
    share = own / math.fsum(counts)
    return len(counts) * share * local_mean


def _cuts_by_while(widths, budget):
    runs, start = [], 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and (stop + 1 - start) * max(widths[start : stop + 1]) <= budget:
            stop += 1
        runs.append((start, stop))
        start = stop
    return runs


def _cuts_by_recursion(widths, budget, first=0):
    if not widths:
        return []
    fitting = [n for n in range(1, len(widths) + 1) if n * max(widths[:n]) <= budget]
    # Widths ascend, so what fits is a prefix 1 … n.
    n = max(fitting, default=1)
    return [(first, first + n), *_cuts_by_recursion(widths[n:], budget, first + n)]


def _layer_by_modules(*, hidden, heads, kv_heads, head_dim, experts, top_k, expert_hidden):
    with torch.device("meta"):
        shared = nn.ModuleList(
            [
                nn.Linear(hidden, heads * head_dim, bias=False),
                nn.Linear(hidden, kv_heads * head_dim, bias=False),
                nn.Linear(hidden, kv_heads * head_dim, bias=False),
                nn.Linear(heads * head_dim, hidden, bias=False),
                nn.Linear(hidden, experts, bias=False),
                *(nn.RMSNorm(size) for size in (hidden, hidden, head_dim, head_dim)),
            ]
        )
        expert = nn.ModuleList([nn.Linear(hidden, expert_hidden, bias=False) for _ in range(3)])

    def count(module):
        return sum(p.numel() for p in module.parameters())

    return count(shared) + experts * count(expert), count(shared) + top_k * count(expert)


def _layer_by_sum(*, hidden, heads, kv_heads, head_dim, experts, top_k, expert_hidden):
    q = o = hidden * heads * head_dim
    k = v = hidden * kv_heads * head_dim
    rest = hidden * experts + hidden + hidden + head_dim + head_dim
    gate = up = down = hidden * expert_hidden
    return tuple(q + k + v + o + rest + n * (gate + up + down) for n in (experts, top_k))


def _cache_by_tensors(*, tokens, layers, heads, kv_heads, head_dim, itemsize):
    dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}[itemsize]
    pair = [torch.empty(kv_heads, tokens, head_dim, dtype=dtype, device="meta") for _ in ("keys", "values")]
    return layers * sum(tensor.nbytes for tensor in pair)


def _cache_by_token(*, tokens, layers, heads, kv_heads, head_dim, itemsize):
    per_layer = kv_heads * head_dim * itemsize + kv_heads * head_dim * itemsize
    return sum(per_layer for _ in range(tokens) for _ in range(layers))


def _routes_by_tensors(tokens, layers, top_k, experts):
    dtype = torch.uint8 if experts - 1 <= torch.iinfo(torch.uint8).max else torch.uint16
    chosen = torch.empty(tokens, layers, top_k, dtype=dtype, device="meta")
    return chosen.nbytes + torch.empty(tokens, dtype=torch.bool, device="meta").nbytes


def _routes_by_bits(tokens, layers, top_k, experts):
    """The bytes that the largest number, experts − 1, needs."""
    size = math.ceil((experts - 1).bit_length() / 8)
    return tokens + tokens * layers * top_k * size


def _flops_by_products(*, length, active, total, layers, heads, head_dim):
    """Forward and the two products of the backward, attention summed over the tokens of one response."""
    seen = sum(range(length)) / length + 0.5  # as a continuous mean: half of the length
    forward = 2 * active + layers * heads * (2 * head_dim * seen + 2 * head_dim * seen)
    return forward + 2 * forward


def _flops_by_parts(*, length, active, total, layers, heads, head_dim):
    parts = itertools.product((1, 2), (2 * active, 4 * layers * heads * head_dim * (length / 2)))
    return sum(times * work for times, work in parts)


RIGHT = {
    "11.1": (_losses_by_loops, _losses_per_response),
    "11.2": (_by_mean_count, _by_local_mean),
    "11.3": (_cuts_by_while, _cuts_by_recursion),
    "11.4": (_layer_by_modules, _layer_by_sum),
    "11.5": (_cache_by_tensors, _cache_by_token),
    "11.6": (_routes_by_tensors, _routes_by_bits),
    "11.7": (_flops_by_products, _flops_by_parts),
}
