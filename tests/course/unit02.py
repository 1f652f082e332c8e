"""Right answers to the exercises of unit 02, written differently from their solutions."""

import math
from itertools import combinations

import numpy as np
import torch


def _dropped_by_subsets(logp, logp_rollout, mask):
    """The sum over all subsets of two and more tokens of the product of their δ."""
    result = []
    for own, sampled, real in zip(logp, logp_rollout, mask, strict=True):
        delta = [math.exp(x) - 1 for x in (own - sampled)[real].tolist()]
        subsets = (s for size in range(2, len(delta) + 1) for s in combinations(delta, size))
        result.append(sum(math.prod(s) for s in subsets))
    return torch.tensor(result)


def _dropped_by_logs(logp, logp_rollout, mask):
    log_ratio = (logp - logp_rollout).masked_fill(~mask, 0.0)
    return log_ratio.sum(1).expm1() - log_ratio.expm1().sum(1)


def _pairs_by_loop(delta):
    return torch.tensor([sum(a * b for a, b in combinations(row, 2)) for row in delta.tolist()])


def _pairs_by_running_sum(delta):
    before = delta.cumsum(1) - delta
    return torch.einsum("bt,bt->b", before, delta)


def _objective_by_loop(logp, logp_rollout, rewards, mask):
    total = 0.0
    for b, t in mask.nonzero().tolist():
        total += rewards[b].item() * math.exp(logp[b, t] - logp_rollout[b, t]) / len(rewards)
    return torch.tensor(total)


def _objective_by_einsum(logp, logp_rollout, rewards, mask):
    ratios = torch.exp(logp) / torch.exp(logp_rollout)
    return torch.einsum("bt,bt,b->", ratios, mask.to(ratios.dtype), rewards) / len(rewards)


def _loss_by_ratio(logp, logp_rollout, rewards, mask):
    ratios = (logp - logp_rollout).exp()
    return -(ratios * rewards[:, None])[mask].sum() / len(logp)


def _loss_by_constants(logp, logp_rollout, rewards, mask):
    loss = torch.zeros(())
    for b, t in mask.nonzero().tolist():
        constant = math.exp(logp[b, t].item() - logp_rollout[b, t].item()) * rewards[b].item()
        loss = loss - constant / len(logp) * logp[b, t]
    return loss


def _slope_by_polyfit(steps, errors):
    return float(np.polyfit(np.log(steps.numpy()), np.log(errors.numpy()), 1)[0])


def _slope_by_lstsq(steps, errors):
    design = torch.stack([steps.log10(), torch.ones_like(steps)], 1)
    return torch.linalg.lstsq(design, errors.log10()[:, None]).solution[0, 0]


def _size_by_binomials(chi_square, length):
    return float(sum(math.comb(length, k) * chi_square**k for k in range(2, length + 1)))


def _size_by_enumeration(chi_square, length):
    """Two equally probable words with δ = ±χ: enough, since only the moments count."""
    counts = torch.arange(length + 1, dtype=torch.float64)
    chi = math.sqrt(chi_square)
    probs = torch.tensor([math.comb(length, int(k)) for k in counts], dtype=torch.float64) / 2**length
    weights, first = (1 + chi) ** counts * (1 - chi) ** (length - counts), chi * (2 * counts - length)
    return (probs * (weights - 1 - first) ** 2).sum()


def _missing_by_division(logp, logp_rollout, mask):
    """The weight of the whole response, divided by the token's own ratio."""
    ratios = torch.where(mask, torch.exp(logp) / torch.exp(logp_rollout), 1.0)
    return (ratios.prod(1, keepdim=True) / ratios - 1) * mask


def _missing_by_loops(logp, logp_rollout, mask):
    result = torch.zeros_like(logp)
    for b, t in mask.nonzero().tolist():
        others = [s for s in range(mask.shape[1]) if mask[b, s] and s != t]
        result[b, t] = math.prod(math.exp(logp[b, s] - logp_rollout[b, s]) for s in others) - 1
    return result


RIGHT = {
    "02.1": [_dropped_by_subsets, _dropped_by_logs],
    "02.2": [_pairs_by_loop, _pairs_by_running_sum],
    "02.3": [_objective_by_loop, _objective_by_einsum],
    "02.4": [_loss_by_ratio, _loss_by_constants],
    "02.5": [_slope_by_polyfit, _slope_by_lstsq],
    "02.6": [_size_by_binomials, _size_by_enumeration],
    "02.7": [_missing_by_division, _missing_by_loops],
}
