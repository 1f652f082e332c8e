"""Right answers to the exercises of unit 01, written differently from their solutions."""

import math
from itertools import pairwise

import torch

from minirl_edu.exact import TabularPolicy


def _logp_by_loops(logits, tokens, mask):
    totals = []
    for rows, words, real in zip(logits, tokens, mask, strict=True):
        total = torch.zeros(())
        for row, word in zip(rows[real], words[real], strict=True):
            total = total + row[word] - row.exp().sum().log()
        totals.append(total)
    return torch.stack(totals)


def _logp_by_cross_entropy(logits, tokens, mask):
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens.masked_fill(~mask, -100), reduction="none")
    return -loss.sum(1)


def _gradient_by_autograd(pi, rewards):
    logits = pi.logits.clone().requires_grad_()
    expected = (TabularPolicy(logits, pi.max_length).response_probs() * rewards).sum()
    return torch.autograd.grad(expected, logits)[0]


def _gradient_by_loops(pi, rewards):
    gradient, tables = torch.zeros_like(pi.logits), pi.logits.softmax(-1)
    for y, reward in enumerate(rewards):
        length = int(pi.mask[y].sum())
        steps = [(int(pi.prefix[y, t]), int(pi.tokens[y, t])) for t in range(length)]
        probability = math.prod(float(tables[row, word]) for row, word in steps)
        for row, word in steps:
            gradient[row] -= probability * reward * tables[row]
            gradient[row, word] += probability * reward
    return gradient


def _weight_by_probabilities(logp, logp_rollout, mask):
    ones = torch.ones_like(logp)
    return torch.where(mask, logp.exp(), ones).prod(1) / torch.where(mask, logp_rollout.exp(), ones).prod(1)


def _weight_by_einsum(logp, logp_rollout, mask):
    return torch.exp(torch.einsum("bt,bt->b", logp - logp_rollout, mask.to(logp.dtype)))


def _advantages_by_loop(rewards, group_size):
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    return torch.cat([group - sum(group.tolist()) / group_size for group in groups])


def _advantages_by_projection(rewards, group_size):
    centring = torch.eye(group_size) - 1 / group_size
    return torch.kron(torch.eye(len(rewards) // group_size), centring) @ rewards


def _baseline_by_parabola(probs, rewards, scores):
    """The vertex of the parabola through the noise at b = −1, 0, 1."""

    def noise(b):
        return sum(p * ((r - b) * s).square().sum() for p, r, s in zip(probs, rewards, scores, strict=True))

    low, middle, high = noise(-1.0), noise(0.0), noise(1.0)
    return (low - high) / (2 * (low - 2 * middle + high))


def _baseline_by_newton(probs, rewards, scores):
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    noise = (probs[:, None] * ((rewards - b)[:, None] * scores) ** 2).sum()
    (slope,) = torch.autograd.grad(noise, b, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, b)
    return -slope / curvature


def _length_by_compound_interest(moment):
    length, second_moment = 0, 1.0
    while second_moment <= 10:
        length, second_moment = length + 1, second_moment * moment
    return length


def _length_by_table(moment):
    lengths = torch.arange(1000, dtype=torch.float64)
    return (moment**-lengths < 0.1).nonzero()[0, 0]


def _loss_without_log(logp, logp_rollout, advantages, mask):
    """∇w = w·∇log π: the differentiable weight needs no log-probability behind it."""
    weight = torch.where(mask, logp - logp_rollout, 0.0).sum(1).exp()
    return -(weight * advantages).mean()


def _loss_by_loops(logp, logp_rollout, advantages, mask):
    ends = [0, *mask.sum(1).cumsum(0).tolist()]
    own, sampled = logp[mask], logp_rollout[mask]
    loss = torch.zeros(())
    for (start, end), advantage in zip(pairwise(ends), advantages, strict=True):
        with torch.no_grad():
            weight = math.exp(own[start:end].sum() - sampled[start:end].sum())
        loss = loss - weight * advantage * own[start:end].sum() / len(advantages)
    return loss


RIGHT = {
    "01.1": [_logp_by_loops, _logp_by_cross_entropy],
    "01.2": [_gradient_by_autograd, _gradient_by_loops],
    "01.3": [_weight_by_probabilities, _weight_by_einsum],
    "01.4": [_advantages_by_loop, _advantages_by_projection],
    "01.5": [_baseline_by_parabola, _baseline_by_newton],
    "01.6": [_length_by_compound_interest, _length_by_table],
    "01.7": [_loss_without_log, _loss_by_loops],
}
