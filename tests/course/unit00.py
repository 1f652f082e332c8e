"""Right answers to the exercises of the quickstart, written differently from the solutions."""

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


def factors_by_indexing(log_mu, log_old, log_pi, mask):
    mu, old, pi = (x[mask] for x in (log_mu, log_old, log_pi))
    return (old - mu).abs().mean(), (old - pi).abs().mean()


def factors_by_ratios(log_mu, log_old, log_pi, mask):
    sizes = []
    for above, below in ((log_old, log_mu), (log_pi, log_old)):
        ratio = torch.exp(above) / torch.exp(below)
        sizes.append(torch.maximum(ratio, 1 / ratio).log().masked_select(mask).mean())
    return sizes


def k3_by_indexing(log_mu, log_old, mask):
    ratio = torch.exp(log_old[mask]) / torch.exp(log_mu[mask])
    return torch.mean(ratio - 1 - torch.log(ratio))


def k3_by_loops(log_mu, log_old, mask):
    total, count = 0.0, 0
    for i, t in mask.nonzero().tolist():
        log_ratio = log_old[i, t].double() - log_mu[i, t].double()
        total += float(torch.expm1(log_ratio) - log_ratio)
        count += 1
    return total / count


RIGHT = {
    "00.1": (advantages_by_loops, advantages_by_a_matrix),
    "00.2": (gradient_by_autograd, gradient_by_loops),
    "00.3": (kept_by_loops, kept_by_clamping),
    "00.4": (factors_by_indexing, factors_by_ratios),
    "00.5": (k3_by_indexing, k3_by_loops),
}
