"""Two right answers to each exercise of lab 04, written differently from its solution."""

import math

import torch
from torch import Tensor


def age_by_walking(grad_step: int, mini_batches: int) -> list[int]:
    """Walk through the loop and stop at the gradient step."""
    version, step = 0, 0
    while True:
        for updates in range(mini_batches):
            step += 1
            if step == grad_step:
                return [version + 1, updates, version]
        version += 1


def age_by_ceiling(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    """The global step is a ceiling; the rest follows from it."""
    global_step = math.ceil(grad_step / mini_batches)
    return global_step, grad_step - (global_step - 1) * mini_batches - 1, global_step - 1


def mask_by_loops(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """One token at a time."""
    kept = torch.ones_like(logp)
    for i, advantage in enumerate(advantages.tolist()):
        for t in range(logp.shape[1]):
            ratio = math.exp(float(logp[i, t] - logp_old[i, t]))
            if (advantage > 0 and ratio > 1 + eps_high) or (advantage < 0 and ratio < 1 - eps_low):
                kept[i, t] = 0
    return kept


def mask_by_one_inequality(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    """Turn the ratio's axis by the sign of the advantage: one bound is left."""
    sign = advantages.sign()[:, None]
    bound = torch.where(sign > 0, math.log1p(eps_high), -math.log1p(-eps_low))
    return (sign * (logp - logp_old) <= bound) | (sign == 0)


def fractions_by_loops(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[float, float]:
    """Count over the response tokens."""
    tokens, up, down = 0, 0, 0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(float(logp[i, t] - logp_old[i, t]))
        tokens += 1
        up += advantages[i] > 0 and ratio > 1.27
        down += advantages[i] < 0 and ratio < 0.8
    return float(up) / tokens, float(down) / tokens


def fractions_of_a_list(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Pick the response tokens out first; then plain means."""
    ratio = (logp[mask] - logp_old[mask]).exp()
    sign = advantages.repeat_interleave(mask.sum(1)).sign()
    return torch.stack([((sign == 1) & (ratio > 1.27)).float().mean(), ((sign == -1) & (ratio < 0.8)).float().mean()])


def surrogate_by_cases(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """By the sign of the advantage only one bound is left."""
    ratio = torch.exp(logp - logp_old)
    return torch.where(advantages > 0, ratio.clamp(max=1 + eps_high), ratio.clamp(min=1 - eps_low)) * advantages


def surrogate_as_a_penalty(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    """The unclipped surrogate minus what lies beyond the bound."""
    ratio = torch.exp(logp - logp_old)
    beyond = (ratio - 1 - eps_high).relu() * advantages.relu() + (1 - eps_low - ratio).relu() * (-advantages).relu()
    return ratio * advantages - beyond


def lost_by_loops(
    logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor
) -> list[list[bool]]:
    """One token at a time."""

    def out(difference: Tensor, advantage: Tensor) -> bool:
        ratio = math.exp(float(difference))
        return ratio > 1.27 if advantage > 0 else bool(advantage < 0) and ratio < 0.8

    return [
        [
            bool(mask[i, t])
            and out(logp[i, t] - logp_rollout[i, t], advantages[i])
            and not out(logp[i, t] - logp_old[i, t], advantages[i])
            for t in range(logp.shape[1])
        ]
        for i in range(len(logp))
    ]


def lost_by_masks(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """How much the mask changes between the two denominators."""
    sign = advantages.sign()[:, None]
    bound = torch.where(sign > 0, math.log(1.27), -math.log(0.8))
    kept_old, kept_mu = ((sign * (logp - other) <= bound).float() for other in (logp_old, logp_rollout))
    return (kept_old - kept_mu).clamp(min=0) * mask


RIGHT = {
    "04.1": (age_by_walking, age_by_ceiling),
    "04.2": (mask_by_loops, mask_by_one_inequality),
    "04.3": (fractions_by_loops, fractions_of_a_list),
    "04.4": (surrogate_by_cases, surrogate_as_a_penalty),
    "04.5": (lost_by_loops, lost_by_masks),
}
