"""Two right answers to each exercise of lab 05, each written differently from the solution."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def divisors_loop(terms: Tensor, mask: Tensor) -> tuple[float, float, float]:
    """Row by row, in plain Python."""
    rows = [[float(x) for x, m in zip(row, keep, strict=True) if m] for row, keep in zip(terms, mask, strict=True)]
    sums = [sum(row) for row in rows]
    means = [sum(row) / len(row) if row else 0.0 for row in rows]
    return sum(sums) / len(rows), sum(means) / len(rows), sum(sums) / sum(map(len, rows))


def divisors_weights(terms: Tensor, mask: Tensor) -> list[Tensor]:
    """One weight for each token; the sum over tokens at the end."""
    weights = mask.float()
    length = weights.sum(1, keepdim=True)
    per_response = weights / torch.where(length > 0, length, 1.0) / len(mask)
    values = torch.nan_to_num(terms) * weights
    return [torch.einsum("bt,bt->", w, values) for w in (weights / len(mask), per_response, weights / weights.sum())]


def objective_autograd(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """Differentiates E_π[(R − b)/|y|] with b held fixed."""
    logits = logits.requires_grad_()
    pi = logits.softmax(0)
    b = (pi * rewards).sum().detach()
    return torch.autograd.grad((pi * ((rewards - b) / lengths)).sum(), logits)[0]


def objective_scores(logits: Tensor, rewards: Tensor, lengths: Tensor) -> Tensor:
    """Σ_y π(y) Â/|y| (onehot(y) − π)."""
    pi = logits.exp() / logits.exp().sum()
    total = torch.zeros_like(pi)
    for y in range(len(pi)):
        score = -pi.clone()
        score[y] += 1
        total += pi[y] * (rewards[y] - pi @ rewards) / lengths[y] * score
    return total


def advantages_loop(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Group by group; for rewards 0 and 1 the standard deviation is √(p(1 − p))."""
    minirl, grpo = [], []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size].tolist()
        p = sum(group) / group_size
        minirl += [r - p for r in group]
        grpo += [(r - p) / (math.sqrt(p * (1 - p)) + 1e-6) for r in group]
    return torch.tensor(minirl), torch.tensor(grpo)


def advantages_matrix(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The projection I − 11ᵀ/G, and the length of what it leaves."""
    project = torch.eye(group_size) - 1 / group_size
    centred = rewards.reshape(-1, group_size) @ project
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / group_size**0.5
    return centred.reshape(-1), (centred / (norm + 1e-6)).reshape(-1)


def minirl_coefficients(
    logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """The coefficient of each token as a table of numbers, then one inner product."""
    table = torch.zeros_like(logp)
    for b, t in mask.nonzero().tolist():
        a = float(advantages[b])
        new, old, mu = (float(x[b, t].detach()) for x in (logp, logp_old, logp_rollout))
        r = math.exp(new - old)
        if (a > 0 and r > 1.27) or (a < 0 and r < 0.8):
            continue
        table[b, t] = min(math.exp(new - mu), 5.0) * a
    return -torch.einsum("bt,bt->", table, logp) / len(mask)


def minirl_product(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """With Â as [B, T] and the clip as a condition on the sign of Â."""
    a = advantages.unsqueeze(1).expand_as(logp)
    with torch.no_grad():
        staleness = torch.exp(logp) / torch.exp(logp_old)
        w = torch.minimum(
            staleness * torch.exp(logp_old) / torch.exp(logp_rollout), torch.tensor(5.0, dtype=logp.dtype)
        )
        keep = torch.where(a >= 0, staleness <= 1.27, staleness >= 0.8) & mask
    return -(w * a * logp)[keep].sum() / logp.shape[0]


def grpo_branches(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The minimum as a choice between a constant and the ratio."""
    a = advantages[:, None].expand_as(logp)
    ratio = logp.exp() / logp_old.exp()
    stopped = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    surrogate = torch.where(stopped, ratio.detach().clamp(0.8, 1.2), ratio) * a
    weights = mask / mask.sum(1, keepdim=True)
    return -(weights * surrogate).sum(1).mean()


def grpo_loop(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Token by token."""
    total = logp.new_zeros(())
    for b in range(len(mask)):
        length = int(mask[b].sum())
        for t in range(length):
            r, a = (logp[b, t] - logp_old[b, t]).exp(), advantages[b]
            total = total - min(r * a, r.clamp(0.8, 1.2) * a, key=lambda x: x.item()) / length / len(mask)
    return total


def cispo_gradient(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A detached coefficient for each selected token."""
    a = advantages[:, None].expand_as(logp)[mask]
    w = torch.exp(logp - logp_old)[mask].clamp(max=5).detach()
    return -torch.dot(w * a, logp[mask]) / int(mask.sum())


def cispo_loop(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Token by token, with numbers as coefficients."""
    losses = []
    for b, t in mask.nonzero().tolist():
        weight = min(math.exp(float(logp[b, t].detach()) - float(logp_old[b, t])), 5.0)
        losses.append(-weight * float(advantages[b]) * logp[b, t])
    return torch.stack(losses).mean()


def weights_by_tokens(logp_old: Tensor, logp_rollout: Tensor, mask: Tensor, cap: float) -> tuple[list, list]:
    """Token by token, with ratios in the place of logarithms."""
    products, means = [], []
    for old, rollout, keep in zip(logp_old, logp_rollout, mask, strict=True):
        ratios = [math.exp(float(a) - float(b)) for a, b, k in zip(old, rollout, keep, strict=True) if k]
        products.append(min(math.prod(ratios), cap))
        means.append(math.prod(ratios) ** (1 / len(ratios)))
    return products, means


def weights_from_means(logp_old: Tensor, logp_rollout: Tensor, mask: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The geometric mean first; the product is its power."""
    mean = torch.stack([(a - b)[k].mean() for a, b, k in zip(logp_old, logp_rollout, mask, strict=True)]).exp()
    return torch.minimum(mean ** mask.sum(1), torch.tensor(cap)), mean


def corrections_in_another_order() -> dict[str, str]:
    """The same choices, from the last to the first."""
    return {
        "hardly any drift, but too much noise": "sequence",
        "turns the drift around": "token masked",
        "nobody knows which responses will be longer": "token truncated",
        "all responses are equally long": "none",
    }


def corrections_from_the_table() -> dict[str, str]:
    """From the stored runs' numbers: drift left, scores with wrong responses longer, alike, and right ones longer."""
    table = {
        "token truncated": (-0.14, 0.71, 0.85, 0.96),
        "None": (1.00, 0.08, 0.94, 0.04),
        "Token masked": (-1.13, 0.02, 0.84, 0.07),
        "sequence": (0.18, 0.95, 0.08, 0.75),
    }
    stopped = [name for name, (left, first, alike, _) in table.items() if abs(left) < 0.5 and alike < 0.1 < first]
    return {
        "all responses are equally long": max(table, key=lambda name: table[name][2]),
        "nobody knows which responses will be longer": max(table, key=lambda name: min(table[name][1:])),
        "turns the drift around": min(table, key=lambda name: table[name][0]),
        "hardly any drift, but too much noise": stopped[0],
    }


RIGHT: dict[str, list[Callable[..., Any]]] = {
    "05.1": [divisors_loop, divisors_weights],
    "05.2": [objective_autograd, objective_scores],
    "05.3": [advantages_loop, advantages_matrix],
    "05.4": [minirl_coefficients, minirl_product],
    "05.5": [grpo_branches, grpo_loop],
    "05.6": [cispo_gradient, cispo_loop],
    "05.7": [weights_by_tokens, weights_from_means],
    "05.8": [corrections_in_another_order, corrections_from_the_table],
}
