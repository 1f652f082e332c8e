"""What several units ask for, right and wrong: most known mistakes are one of these with an option turned.

Log-probabilities, masks and terms are [B, T], rewards and advantages [B]. The defaults are right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import Answer

EPS_LOW, EPS_HIGH = 0.2, 0.27
"""The paper's range of r = π_θ/π_old."""

LOGP = torch.tensor([[-0.2, -1.0, -0.5], [-0.7, -0.1, -2.0], [-1.2, -0.3, -0.9]])
LOGP_ROLLOUT = torch.tensor([[-0.5, -0.8, -0.6], [-0.4, -0.3, -1.0], [-1.0, -2.0, -0.1]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
"""Three responses of 3, 2 and 1 tokens, for units 01 and 02."""


def gradient(y: Tensor, x: Tensor, weights: Tensor | float | None = None, *, without: float = 0.0) -> Tensor:
    """∂y/∂x for a number y, or ∂(Σ weights · y)/∂x; everywhere `without` if y has no gradient."""
    if not y.requires_grad:
        return torch.full_like(x, without)
    return torch.autograd.grad(y if weights is None else (y * weights).sum(), x)[0]


def gradient_of_loss(answer: Answer, advantages: Tensor) -> Tensor:
    """∂loss/∂logp of an answer for the three responses above. Raises RuntimeError if it has none."""
    logp = LOGP.clone().requires_grad_()
    return torch.autograd.grad(answer(logp, LOGP_ROLLOUT, advantages, MASK), logp)[0]


def token_logp(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) of the tokens that were drawn."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def log_ratio(logp: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log of the ratio of two policies, token by token; 0 outside the mask."""
    return torch.where(mask, logp - reference, 0.0)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over each response's tokens, [B]."""
    return torch.where(mask, values, 0.0).sum(1)


def masked_mean(values: Tensor, mask: Tensor, over: str = "tokens") -> Tensor:
    """The mean over response tokens, or what people compute instead of it."""
    inside = torch.where(mask, values, 0.0)
    sums, lengths = inside.sum(1), mask.sum(1)
    return {
        "tokens": sums.sum() / lengths.sum(),
        "responses": (sums / lengths).mean(),  # the mean of the responses' own means
        "sums": sums.mean(),  # a sum over a response's tokens, a mean over responses
        "places": values.to(inside.dtype).mean(),  # padding summed and counted
        "counted padding": inside.mean(),  # padding left out of the sum, but counted
        "summed padding": values.sum() / lengths.sum(),
        "product": (values * mask).sum() / lengths.sum(),  # NaN · 0 is NaN
    }[over]


KL_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_r: -log_r,
    "k2": lambda log_r: log_r.square() / 2,
    "k3": lambda log_r: log_r.exp() - 1 - log_r,
    "k3 without the 1": lambda log_r: log_r.exp() - log_r,
    "k3 with the log added": lambda log_r: log_r.exp() - 1 + log_r,
}
"""One token's term of an estimate of the KL, by log r = log π_old − log μ_old."""


def kl(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor, *, term: str = "k3", over: str = "tokens") -> Tensor:
    """The training–inference KL, estimated from tokens that μ_old drew."""
    return masked_mean(KL_TERMS[term](logp_old - logp_rollout), mask, over)


def torch_std_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's advantage with the standard deviation of `torch.std`, whose divisor is G − 1."""
    std = rewards.view(-1, group_size).std(1).repeat_interleave(group_size)
    return group_mean_advantages(rewards, group_size) / (std + 1e-6)


def interleaved_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """As if the prompts took turns in the batch."""
    groups = rewards.view(group_size, -1)
    return (groups - groups.mean(0)).flatten()


def batch_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """The mean of the whole batch as the baseline."""
    return rewards - rewards.mean()


def dropped(
    logp: Tensor,
    reference: Tensor,
    advantages: Tensor,
    low: float = EPS_LOW,
    high: float = EPS_HIGH,
    *,
    any_sign: bool = False,
) -> Tensor:
    """Where M_t = 0 in (7): r = π_θ/reference is above 1 + high and Â > 0, or below 1 − low and Â < 0."""
    ratio, a = (logp - reference).detach().exp(), advantages[:, None]
    above, below = ratio > 1 + high, ratio < 1 - low
    return above | below if any_sign else (above & (a > 0)) | (below & (a < 0))


def surrogate(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, low: float, high: float, *, form: str = "minimum"
) -> Tensor:
    """PPO's min(r · Â, clip(r) · Â), token by token, for advantages [B, T] or [B, 1]; or what people take for it."""
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return {
        "minimum": torch.minimum(ratio * advantages, clipped * advantages),
        "maximum": torch.maximum(ratio * advantages, clipped * advantages),
        "clipped": clipped * advantages,
        "not clipped": ratio * advantages,
        "minimum of the ratios": torch.minimum(ratio, clipped) * advantages,
    }[form]


def policy_loss(weight: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Answer:
    """−(1/B) Σ_b Σ_t w · Â · log π over the mask, for a weight [B, T] or [B, 1] of logp, logp_rollout and mask."""

    def loss(logp: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        terms = weight(logp, logp_rollout, mask) * advantages[:, None] * logp
        return -torch.where(mask, terms, 0.0).sum() / len(logp)

    return loss


def gates(scores: Tensor, experts: Tensor) -> Tensor:
    """Probabilities of these experts over all, divided by their sum: [n, k] from logits [n, E]."""
    picked = scores.softmax(-1).gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


def zeroed_gates(scores: Tensor, experts: Tensor) -> Tensor:
    """The same with the scores of all experts outside the token's own best set to zero first: a known bug."""
    live = scores.topk(experts.shape[-1]).indices
    kept = torch.zeros_like(scores).scatter(-1, live, 1.0) * scores.softmax(-1)
    picked = kept.gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


Part = tuple[Tensor, Tensor]
"""Terms [b, T], the summands of a loss, and their mask: a micro-batch, or what one rank holds."""


def divided_by(count: Callable[[Any, Sequence[Any]], float], sign: int = 1) -> Callable[[Sequence[Part]], list[Tensor]]:
    """The loss of each part: the sum of its terms, divided by a count of it and of all parts."""
    return lambda parts: [sign * part[0][part[1]].sum() / count(part, parts) for part in parts]


def responses(*parts: Sequence[Tensor]) -> int:
    """How many responses these parts have; the mask of a part is its last tensor."""
    return sum(len(part[-1]) for part in parts)


def tokens(*parts: Sequence[Tensor]) -> int:
    """How many tokens these parts have."""
    return sum(int(part[-1].sum()) for part in parts)
