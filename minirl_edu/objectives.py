"""The three policy losses, as pure functions of tensors, and `OBJECTIVES`, which names them for the trainer.

    minirl_loss   MiniRL, equation (7) of arXiv 2512.01374
    grpo_loss     GRPO, Appendix A
    cispo_loss    CISPO, Appendix A

`CORRECTIONS` names the weights that MiniRL can use for the train–inference discrepancy, the paper's first.

Shared contract. Tensors are `[B, T]` over response tokens; `mask` is true (or 1) on real tokens, end-of-sequence
included; `advantages` is `[B]` or `[B, T]`. Log-probabilities are in nats. The arithmetic is fp32 whatever comes in,
except that float64 `logp` stays float64. Only `logp` carries gradient. Log-ratios are clamped at ±20 before `exp`.
What stands outside the mask, NaN included, touches neither value nor gradient. A response with an empty mask
contributes 0 and still counts in B; with nothing in the mask at all, and for B = 0 or T = 0, loss, gradient and metrics
are 0.

Adding up. The divisor defaults to this batch's count. A batch that is split over micro-batches or ranks passes the
global count (`num_responses`, for CISPO `num_tokens`); the parts' losses then sum to the loss of the whole.

Metrics (detached scalars over response tokens, left on the device; 0 where there are no tokens). The trainer logs all
that a loss returns:

    is_weight_mean, is_weight_max   the weight as the loss uses it, after the cap (CISPO: the clip): of π_θ/μ_old, or of
                                    π_θ/π_old without the train–inference correction
    is_capped_frac                  fraction of tokens whose weight the cap (CISPO: the clip) or a mask changed
    clip_frac_pos, clip_frac_neg    fraction of tokens whose gradient the clip removes (M_t = 0), by the sign of Â; with
                                    `clip=False`, would remove. 0 for CISPO, whose clip removes no gradient: what it
                                    does to the weights is `is_capped_frac`
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e²⁰ ≈ 5·10⁸ is far outside every trust region and still harmless in fp32
MAX_LOGP = 1e-4  # what rounding leaves above 0: fp32 logits of size 1000 are 6·10⁻⁵ apart


class PolicyLoss(NamedTuple):
    """A scalar `loss` to minimise and its `metrics`, detached scalars by name (listed in the module's docstring)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def minirl_loss(
    logp: Float[Tensor, "..."],
    logp_old: Float[Tensor, "..."],
    logp_rollout: Float[Tensor, "..."] | None,
    advantages: Float[Tensor, "..."],
    mask: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.27,
    is_cap: float = 5.0,
    clip: bool = True,
    is_correction: bool = True,
    correction: str = "token_truncated",
    length_norm: bool = False,
    num_responses: int | None = None,
) -> PolicyLoss:
    """MiniRL, equation (7): REINFORCE with a truncated token importance weight and decoupled-PPO clipping.

        loss = −(1/B) Σ_b Σ_t  M_t · sg[min(π_θ/μ_old, is_cap)] · Â · log π_θ(y_t)

        r_t = π_θ/π_old,   M_t = 0 if Â > 0 and r_t > 1 + ε_high,   0 if Â < 0 and r_t < 1 − ε_low,   else 1

    A sum over tokens and a mean over responses. The cap acts on the product π_θ/μ_old = (π_old/μ_old)·(π_θ/π_old),
    equation (5).

    Args:
        logp, logp_old, logp_rollout: log π_θ, log π_old, log μ_old of the response tokens, `[B, T]`.
        advantages: Â, `[B]` or `[B, T]`; the paper's is `advantages.group_mean_advantages`.
        mask: `[B, T]`, true on response tokens.
        is_cap: the largest importance weight; `math.inf` for none.
        clip: False sets M = 1 (ablation "no clipping"); the metrics still say what M would drop.
        is_correction: False sets π_old/μ_old to 1 and keeps π_θ/π_old (ablation "− train–infer IS"); `logp_rollout`
            is then unused and may be None. The same as correction="none".
        correction: which weight takes the place of min(π_θ/μ_old, is_cap), a name in `CORRECTIONS`.
        length_norm: True divides each response's sum by its length |y| (ablation "+ length norm").
        num_responses: B of the whole mini-batch where this call sees a part of it.

    Raises:
        TypeError: a list or an array in the place of a tensor.
        ValueError: a shape does not fit that of `logp`; a value inside the mask is not finite; a log-probability
            inside it is above 0, as a probability is; no `logp_rollout`; no correction of that name.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction is {correction!r}; expected one of {', '.join(CORRECTIONS)}")
    if not is_correction or correction == "none":
        correction, logp_rollout = "none", logp_old
    elif logp_rollout is None:
        raise ValueError("logp_rollout is None: pass log μ_old from the rollout engine, or set is_correction=False")
    mask, logp, logp_old, logp_rollout, advantages = _response_tokens(
        mask, logp=logp, logp_old=logp_old, logp_rollout=logp_rollout, advantages=advantages
    )
    is_weight, limited = CORRECTIONS[correction](logp.detach(), logp_old, logp_rollout, advantages, mask, is_cap=is_cap)
    coefficient = is_weight * advantages
    dropped = _dropped_by_clip(_ratio(logp.detach(), logp_old), advantages, eps_low, eps_high)
    if clip:
        coefficient = coefficient.masked_fill(dropped, 0.0)
    if length_norm:
        coefficient = coefficient / mask.sum(1, keepdim=True).clamp(min=1)
    loss = -(coefficient * logp).sum() / (num_responses or max(len(logp), 1))
    return PolicyLoss(loss, _metrics(is_weight, limited, dropped, advantages, mask))


def grpo_loss(
    logp: Float[Tensor, "..."],
    logp_old: Float[Tensor, "..."],
    advantages: Float[Tensor, "..."],
    mask: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    num_responses: int | None = None,
) -> PolicyLoss:
    """GRPO, Appendix A: PPO's clipped ratio with a mean over tokens inside a mean over responses.

        loss = −(1/B) Σ_b (1/|y_b|) Σ_t  min(r_t Â, clip(r_t, 1 − ε_low, 1 + ε_high) Â),    r_t = π_θ/π_old

    No train–inference correction. Its advantages are `advantages.group_mean_std_advantages`. Arguments and errors as in
    `minirl_loss`. Source: DeepSeekMath, arXiv 2402.03300, without its KL penalty.
    """
    mask, logp, logp_old, advantages = _response_tokens(mask, logp=logp, logp_old=logp_old, advantages=advantages)
    ratio = _ratio(logp, logp_old)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    loss = -(surrogate.sum(1) / mask.sum(1).clamp(min=1)).sum() / (num_responses or max(len(logp), 1))
    ratio = ratio.detach()
    dropped = _dropped_by_clip(ratio, advantages, eps_low, eps_high)
    return PolicyLoss(loss, _metrics(ratio, torch.zeros_like(mask), dropped, advantages, mask))


def cispo_loss(
    logp: Float[Tensor, "..."],
    logp_old: Float[Tensor, "..."],
    advantages: Float[Tensor, "..."],
    mask: Tensor,
    *,
    eps_low: float = 1.0,
    eps_high: float = 4.0,
    num_tokens: int | None = None,
) -> PolicyLoss:
    """CISPO, Appendix A: the weight is clipped, no token's gradient is dropped; a mean over the batch's tokens.

        loss = −1/(Σ_b |y_b|) Σ_b Σ_t  sg[clip(r_t, 1 − ε_low, 1 + ε_high)] · Â · log π_θ(y_t),    r_t = π_θ/π_old

    The default range is [0, 5]. ε_low = 1 is no lower bound, as in MiniMax-M1 (arXiv 2506.13585), which tunes ε_high
    alone and prints no value; the ceiling of 5 is ScaleRL's (arXiv 2510.13786, insensitive over 4, 5, 8), and the same
    number as MiniRL's cap.

    `num_tokens` is Σ|y| of the whole mini-batch where this call sees a part of it. Other arguments and errors as in
    `minirl_loss`.
    """
    mask, logp, logp_old, advantages = _response_tokens(mask, logp=logp, logp_old=logp_old, advantages=advantages)
    ratio = _ratio(logp.detach(), logp_old)
    is_weight = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -(is_weight * advantages * logp).sum() / (num_tokens or mask.sum().clamp(min=1))
    return PolicyLoss(loss, _metrics(is_weight, is_weight != ratio, torch.zeros_like(mask), advantages, mask))


class Objective(NamedTuple):
    """What `algorithm.objective` names: a loss, and the advantages that belong to it.

    The trainer calls `loss` by keyword, with those of its parameters that it knows: logp, logp_old, logp_rollout,
    advantages and mask; num_responses and num_tokens of the whole mini-batch; and the fields of
    `config.AlgorithmConfig` that are not None, such as eps_low: where the config leaves it out, the loss's own default
    holds. `advantages` is a name in `advantages.ADVANTAGES`.
    """

    loss: Callable[..., PolicyLoss]
    advantages: str


OBJECTIVES = {
    "minirl": Objective(minirl_loss, "group_mean"),
    "grpo": Objective(grpo_loss, "group_mean_std"),
    "cispo": Objective(cispo_loss, "group_mean_std"),
}
"""Every objective by name: a new one is a function and a line here."""


class Weight(NamedTuple):
    """An importance weight [B, T], and where a cap or a mask has changed it [B, T]."""

    weight: Tensor
    limited: Tensor


def no_correction(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
) -> Weight:
    """min(π_θ/π_old, is_cap): the staleness alone. The drift stays whole."""
    return _truncated(_token_ratio(logp, logp_old, mask), is_cap)


def token_truncated(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
) -> Weight:
    """min(π_θ/μ_old, is_cap): the paper's, whose cap is on the product of equation (5)."""
    return _truncated(_token_ratio(logp, logp_rollout, mask), is_cap)


def token_masked(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
    low: float = 0.5,
) -> Weight:
    """π_θ/μ_old where low ≤ π_old/μ_old ≤ is_cap, else 0. Source: IcePop, arXiv 2510.18855, with [0.5, 5]."""
    mismatch = _token_ratio(logp_old, logp_rollout, mask)
    return _masked(_token_ratio(logp, logp_rollout, mask), (mismatch < low) | (mismatch > is_cap))


def sequence_truncated(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
) -> Weight:
    """min(Π_t π_old/μ_old, is_cap) · π_θ/π_old: one weight a response, equation (1)'s. Source: Liu, Li et al., "When
    Speed Kills Stability", 2025."""
    capped, limited = _truncated(_sequence_ratio(logp_old, logp_rollout, mask), is_cap)
    return Weight(capped * _token_ratio(logp, logp_old, mask), limited.expand(mask.shape))


def sequence_masked(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
) -> Weight:
    """Π_t π_old/μ_old · π_θ/π_old, and 0 for the whole response where the product over t is above is_cap. Source: as
    `sequence_truncated`."""
    mismatch = _sequence_ratio(logp_old, logp_rollout, mask)
    return _masked(mismatch * _token_ratio(logp, logp_old, mask), mismatch > is_cap)


def geometric_mean(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
) -> Weight:
    """min((Π_t π_old/μ_old)^(1/|y|), is_cap) · π_θ/π_old. Source: the ratio of GSPO (arXiv 2507.18071), there
    π_θ/π_old."""
    lengths = mask.bool().sum(1, keepdim=True).clamp(min=1)
    mean = _token_log_ratio(logp_old, logp_rollout, mask).sum(1, keepdim=True) / lengths
    capped, limited = _truncated(mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), is_cap)
    return Weight(capped * _token_ratio(logp, logp_old, mask), limited.expand(mask.shape))


def negative_masked(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    advantages: Tensor,
    mask: Tensor,
    *,
    is_cap: float = 5.0,
    threshold: float = 0.15,
) -> Weight:
    """0 where Â < 0 and μ_old − π_old > threshold (probabilities, not logs), else min(π_θ/π_old, is_cap).

    One side of DPPO's mask (arXiv 2602.04879), alone: there the other tokens have the weight π_θ/μ_old.
    """
    gap = torch.where(mask.bool(), _working(logp_rollout).exp() - _working(logp_old).exp(), 0.0)
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    weight, capped = no_correction(logp, logp_old, logp_rollout, advantages, mask, is_cap=is_cap)
    weight, masked = _masked(weight, (advantages < 0) & (gap > threshold))
    return Weight(weight, capped | masked)


CORRECTIONS: dict[str, Callable[..., Weight]] = {
    "token_truncated": token_truncated,
    "token_masked": token_masked,
    "sequence_truncated": sequence_truncated,
    "sequence_masked": sequence_masked,
    "geometric_mean": geometric_mean,
    "negative_masked": negative_masked,
    "none": no_correction,
}
"""Every correction of the train–inference discrepancy by the name that `algorithm.correction` has for it.

Each takes log π_θ, log π_old, log μ_old [B, T], advantages ([B] or [B, T]), the mask and the largest weight, and
returns the weight that multiplies Â ∇log π_θ. At π_θ = π_old that is the correction alone. Arithmetic as in the losses;
what stands outside the mask is ignored, and so should be the weight there.
"""


def _response_tokens(mask: Tensor, *, logp: Tensor, **inputs: Tensor) -> list[Tensor]:
    """The mask as bool, then every input as `[B, T]` in the working dtype, finite inside the mask and zero outside."""
    for name, values in {"logp": logp, "mask": mask, **inputs}.items():
        if not isinstance(values, Tensor):
            shape = "[B] or [B, T]" if name == "advantages" else "[B, T]"
            raise TypeError(f"{name} is a {type(values).__name__}; pass a tensor {shape}: torch.as_tensor({name})")
    if logp.ndim != 2:
        raise ValueError(f"logp has shape {list(logp.shape)}; expected [B, T], responses × response tokens")
    if mask.shape != logp.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, logp has {list(logp.shape)}; they must agree")
    mask = mask.bool()
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    # where, not multiplication: NaN · 0 is NaN, in the value and again in the gradient.
    clean = {"logp": torch.where(mask, logp.to(dtype), 0.0)}
    for name, values in inputs.items():
        if name == "advantages" and values.shape == logp.shape[:1]:
            values = values[:, None]
        elif values.shape != logp.shape:
            allowed = "[B, T] or [B]" if name == "advantages" else "[B, T]"
            raise ValueError(f"{name} has shape {list(values.shape)}, logp has {list(logp.shape)}; expected {allowed}")
        clean[name] = torch.where(mask, values.detach().to(dtype), 0.0)
    if logp.numel():
        _check_values(clean)
    return [mask, *clean.values()]


def _check_values(clean: dict[str, Tensor]) -> None:
    """ValueError for the first value that is not finite, or that no log-probability has."""
    # One reduction and one transfer in the good case; NaN is its own minimum and maximum.
    stacked = torch.stack([values.detach() for values in clean.values()])
    lowest, highest = torch.stack(stacked.flatten(1).aminmax(dim=1)).tolist()
    for name, low, high in zip(clean, lowest, highest, strict=True):
        is_logp = name != "advantages"
        if math.isfinite(low) and high <= (MAX_LOGP if is_logp else math.inf) and math.isfinite(high):
            continue
        values, remedy = clean[name].detach(), "mask the token out or fix the engine that produced it"
        bad, rule = ~torch.isfinite(values), "inside the mask every value must be finite"
        if not bad.any():
            bad, rule = values > MAX_LOGP, "a log-probability is at most 0"
            remedy = f"if {name} holds probabilities, pass {name}.log()"
        response, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} is {values[response, token].item()} at response {response}, token {token}; {rule}: {remedy}"
        )


def _ratio(logp_numerator: Tensor, logp_denominator: Tensor) -> Tensor:
    return (logp_numerator - logp_denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _working(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _token_log_ratio(logp_numerator: Tensor, logp_denominator: Tensor, mask: Tensor) -> Tensor:
    """0 outside the mask."""
    return torch.where(mask.bool(), _working(logp_numerator) - _working(logp_denominator), 0.0)


def _token_ratio(logp_numerator: Tensor, logp_denominator: Tensor, mask: Tensor) -> Tensor:
    return _token_log_ratio(logp_numerator, logp_denominator, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sequence_ratio(logp_numerator: Tensor, logp_denominator: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: the product over a response's tokens."""
    total = _token_log_ratio(logp_numerator, logp_denominator, mask).sum(1, keepdim=True)
    return total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _truncated(weight: Tensor, is_cap: float) -> Weight:
    capped = weight.clamp(max=is_cap)
    return Weight(capped, capped != weight)


def _masked(weight: Tensor, zero: Tensor) -> Weight:
    return Weight(weight.masked_fill(zero, 0.0), zero.expand(weight.shape))


def _dropped_by_clip(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """True where M_t = 0."""
    return torch.where(advantages > 0, ratio > 1 + eps_high, (advantages < 0) & (ratio < 1 - eps_low))


def _metrics(is_weight: Tensor, capped: Tensor, dropped: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    # `dropped` is already false outside the mask, where advantages are zero.
    tokens = mask.sum().clamp(min=1)
    is_weight = is_weight * mask
    dropped_pos = (dropped & (advantages > 0)).sum()
    return {
        "is_weight_mean": is_weight.sum() / tokens,
        "is_weight_max": is_weight.max() if is_weight.numel() else is_weight.sum(),
        "is_capped_frac": (capped & mask).sum() / tokens,
        "clip_frac_pos": dropped_pos / tokens,
        "clip_frac_neg": (dropped.sum() - dropped_pos) / tokens,
    }
