"""Two right answers to each exercise of unit 06, written differently from the solutions."""

import math
from statistics import NormalDist

import torch
from torch import Tensor


def layer_by_loops(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x:
        scores = router @ token
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]
        weights = [scores[e].exp() for e in best]
        total = torch.stack(weights).sum()
        parts = [w / total * torch.relu(experts[e] @ token) for w, e in zip(weights, best, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def layer_by_masking(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    """All experts run; the logits of those that were not chosen are −∞."""
    scores = x @ router.T
    lowest = scores.sort(-1).values[:, -k : len(router) - k + 1]
    gates = scores.masked_fill(scores < lowest, -math.inf).softmax(-1)
    return torch.einsum("ne,eoi,ni->neo", torch.ones_like(gates), experts, x).relu().mul(gates[..., None]).sum(1)


def gates_by_algebra(scores: Tensor, experts: Tensor) -> Tensor:
    """A softmax over the given logits alone."""
    return scores.gather(-1, experts).softmax(-1)


def gates_by_loops(scores: Tensor, experts: Tensor) -> Tensor:
    """e^s / Σ e^s, one by one."""
    rows = []
    for row, chosen in zip(scores, experts.tolist(), strict=True):
        total = torch.stack([row[f].exp() for f in chosen]).sum()
        rows.append(torch.stack([row[e].exp() / total for e in chosen]))
    return torch.stack(rows)


def margin_by_topk(scores: Tensor, k: int) -> Tensor:
    """From a top-(k+1)."""
    return -scores.topk(k + 1, dim=-1).values[:, k - 1 :].diff(dim=-1)[:, 0]


def margin_by_sets(scores: Tensor, k: int) -> list[float]:
    """The worst that is in, minus the best that is out."""
    ordered = [sorted(row, reverse=True) for row in scores.tolist()]
    return [min(row[:k]) - max(row[k:]) for row in ordered]


def probability_by_erfc(margin: Tensor, sigma: float) -> Tensor:
    """Φ(−m/(σ√2)) = erfc(m/2σ)/2."""
    return torch.erfc(margin / (2 * sigma)) / 2


def probability_by_the_difference(margin: Tensor, sigma: float) -> list[float]:
    """The difference of the noisy logits is normal, with mean m and variance 2σ²; P(below 0)."""
    return [NormalDist(m, math.sqrt(sigma**2 + sigma**2)).cdf(0.0) for m in margin.tolist()]


def rate_by_sets(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Python's own sets."""
    layers = a.shape[2]
    tokens = [tuple(place) for place in mask.nonzero().tolist()]
    flips = [
        [set(a[i, j, layer].tolist()) != set(b[i, j, layer].tolist()) for layer in range(layers)] for i, j in tokens
    ]
    return torch.tensor(flips).double().mean(0)


def rate_by_one_hot(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Membership as a vector over experts."""
    members = [torch.nn.functional.one_hot(x.long(), 8).sum(-2) for x in (a, b)]
    flips = (members[0] - members[1]).abs().sum(-1) > 0
    return (flips * mask[..., None]).sum((0, 1)) / mask.sum()


def any_layer_by_loop(rates: Tensor) -> float:
    """Layer by layer: what was flipped already, or is now."""
    share = 0.0
    for rate in rates.tolist():
        share += (1 - share) * rate
    return share


RIGHT = {
    "06.1": (layer_by_loops, layer_by_masking),
    "06.2": (gates_by_algebra, gates_by_loops),
    "06.3": (margin_by_topk, margin_by_sets),
    "06.4": (probability_by_erfc, probability_by_the_difference),
    "06.5": (rate_by_sets, rate_by_one_hot),
    "06.6": (any_layer_by_loop, lambda rates: -torch.expm1(torch.log1p(-rates).sum())),
}
