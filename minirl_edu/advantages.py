"""Advantages from the rewards of a group: the G responses that answer the same prompt.

Every function takes rewards `[B]` grouped by prompt (the first G belong to the first prompt, and so on) and returns
advantages `[B]`, fp32 or, for float64 rewards, float64. Equal rewards in a group give exactly 0. A wrong size or a
reward that is not finite is a ValueError; a list or an array of rewards is a TypeError.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def group_mean_advantages(rewards: Tensor, group_size: int) -> Float[Tensor, " B"]:
    """MiniRL's advantage: Â(x, y) = R(x, y) − mean of R over the G responses to x.

    No division by the standard deviation. A group of one has advantage 0. Source: arXiv 2512.01374, below (7).
    """
    return _centred(rewards, group_size).flatten()


def group_mean_std_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Float[Tensor, " B"]:
    """GRPO's and CISPO's advantage: Â = (R − mean) / (std + eps), over the G responses to one prompt.

    `std` is that of the group itself (divisor G), so a group of one has advantage 0. Implementations that call
    `torch.std` divide by G − 1 and get advantages smaller by √((G−1)/G). Source: arXiv 2402.03300; Appendix A of
    2512.01374.
    """
    centred = _centred(rewards, group_size)
    return (centred / (centred.square().mean(1, keepdim=True).sqrt() + eps)).flatten()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Float[Tensor, " B"]:
    """RLOO's advantage: Â_i = R_i − mean of the *other* rewards in the group = G/(G−1) · (R_i − mean).

    The baseline does not depend on y_i, so the policy gradient is unbiased. A group of one has no others: ValueError.
    Source: Kool et al. 2019; arXiv 2402.14740.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; leaving one out needs at least 2 responses per prompt")
    return (_centred(rewards, group_size) * (group_size / (group_size - 1))).flatten()


ADVANTAGES = {
    "group_mean": group_mean_advantages,
    "group_mean_std": group_mean_std_advantages,
    "leave_one_out": leave_one_out_advantages,
}
"""Every kind of advantages by the name that `algorithm.advantages` has for it."""


def _centred(rewards: Tensor, group_size: int) -> Float[Tensor, "prompts G"]:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards is a {type(rewards).__name__}; pass a tensor [B]: torch.as_tensor(rewards)")
    if group_size < 1 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)}, group_size is {group_size}; "
            "expected a flat [prompts × group_size] tensor, grouped by prompt"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError(
            f"rewards has {rewards[~torch.isfinite(rewards)][0].item()} in it; every reward must be finite"
        )
    groups = rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).view(-1, group_size)
    # The mean of G equal numbers need not round to that number. Measured from the group's first, equal rewards are 0.
    groups = groups - groups[:, :1]
    return groups - groups.mean(1, keepdim=True)
