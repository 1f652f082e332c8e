"""Right answers to the exercises of the quickstart, written differently from the solutions."""

import re

import torch


def advantages_by_loops(rewards, group_size):
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size].tolist()
        result += [own - sum(group) / group_size for own in group]
    return torch.tensor(result)


def advantages_by_a_matrix(rewards, group_size):
    groups = len(rewards) // group_size
    average = torch.kron(torch.eye(groups), torch.ones(group_size, group_size)) / group_size
    return rewards - average @ rewards


def gradient_by_autograd(log_pi, log_mu, advantages, mask):
    leaf = log_pi.clone().requires_grad_()
    weight = torch.minimum(torch.exp(leaf.detach() - log_mu), torch.tensor(5.0))
    objective = (weight * advantages.unsqueeze(1) * leaf)[mask].sum() / leaf.shape[0]
    (gradient,) = torch.autograd.grad(-objective, leaf)
    return gradient


def gradient_by_loops(log_pi, log_mu, advantages, mask):
    result = torch.zeros_like(log_pi)
    for i in range(log_pi.shape[0]):
        for t in range(log_pi.shape[1]):
            if mask[i, t]:
                weight = min(float(log_pi[i, t].exp()) / float(log_mu[i, t].exp()), 5.0)
                result[i, t] = -weight * float(advantages[i]) / log_pi.shape[0]
    return result


def kept_by_loops(log_pi, log_old, log_mu, advantages):
    rows = []
    for new, old, advantage in zip(log_pi, log_old, advantages, strict=True):
        row = []
        for a, b in zip(new, old, strict=True):
            ratio = float(torch.exp(a)) / float(torch.exp(b))
            too_far = (advantage > 0 and ratio > 1.27) or (advantage < 0 and ratio < 0.8)
            row.append(0 if too_far else 1)
        rows.append(row)
    return torch.tensor(rows)


def kept_by_clamping(log_pi, log_old, log_mu, advantages):
    """PPO's minimum: the gradient is gone exactly where the clipped branch is the smaller one and flat."""
    ratio = (log_pi - log_old).exp().requires_grad_()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.27) * advantages[:, None])
    (gradient,) = torch.autograd.grad(surrogate.sum(), ratio)
    return (gradient != 0) | (advantages[:, None] == 0)


def reward_by_cutting(response, answer):
    *before, last = response.rsplit(",", 1)
    return 1 if before and last == answer else 0


def reward_by_pattern(response, answer):
    return torch.tensor(bool(re.search(rf",{answer}\Z", response)), dtype=torch.float32)


def rounding_by_loops(weights, bits):
    rows = []
    for row in weights.tolist():
        step = max(abs(w) for w in row) / (2 ** (bits - 1) - 1)
        rows.append([step * round(w / step) for w in row])
    return torch.tensor(rows)


def rounding_by_nearest(weights, bits):
    """Of all values on the grid, the nearest."""
    last = 2 ** (bits - 1) - 1
    grid = torch.arange(-last, last + 1) / last * weights.abs().max(1).values[:, None]
    nearest = (weights[:, :, None] - grid[:, None, :]).abs().argmin(-1)
    return grid.gather(1, nearest)


RIGHT = {
    "00.1": (advantages_by_loops, advantages_by_a_matrix),
    "00.2": (gradient_by_autograd, gradient_by_loops),
    "00.3": (kept_by_loops, kept_by_clamping),
    "00.4": (reward_by_cutting, reward_by_pattern),
    "00.5": (rounding_by_loops, rounding_by_nearest),
}
