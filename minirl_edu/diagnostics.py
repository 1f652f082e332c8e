"""Metrics that say whether the first-order approximation still holds, and `CollapseDetector`, which watches them.

Tensors are `[B, T]` over response tokens, log-probabilities in nats, `mask` true (or 1) on response tokens. Values
outside the mask, NaN included, are ignored; with nothing in the mask, and for B = 0 or T = 0, a mean is 0 and an
effective sample size is 1.
Arithmetic is fp32, or float64 for float64 inputs. Log-ratios are clamped at ±20 before `exp`, as in the losses.
Results stay on the device as scalar tensors until `fetch` brings them, all at once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_MAX_LOG_RATIO = 20.0


def masked_mean(values: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """Mean of `values` over the true positions of `mask`; 0 when there are none."""
    return _zero_outside(values, mask).sum() / mask.bool().sum().clamp(min=1)


def kl_k1(logp_rollout: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """The paper's training–inference KL, nats per token: E_{y~μ_old}[log μ_old − log π_old]; can be < 0."""
    return masked_mean(-_log_ratio(logp_old, logp_rollout, mask), mask)


def kl_k3(logp_rollout: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """The same KL by E_{y~μ_old}[r − 1 − log r], r = π_old/μ_old: every term ≥ 0, less noise when r is near 1.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = _log_ratio(logp_old, logp_rollout, mask)
    return masked_mean(_clamped(log_ratio).expm1() - log_ratio, mask)


def token_ess(logp: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """Effective sample size of the token weights w = π_θ/μ_old, as a fraction in (0, 1]: (Σ w)² / (n Σ w²)."""
    mask = mask.bool()
    return _ess(_log_ratio(logp, logp_rollout, mask), mask)


def sequence_ess(logp: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """Effective sample size of the sequence weights Π_t π_θ/μ_old, as a fraction in (0, 1].

    The share of the responses that equation (2) really averages over. Responses with an empty mask are left out.
    """
    mask = mask.bool()
    return _ess(_log_ratio(logp, logp_rollout, mask).sum(1), mask.any(1))


def ratio_decomposition(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    mask: Tensor,
) -> dict[str, Float[Tensor, ""]]:
    """How large the two factors of equation (5) are: π_θ/μ_old = (π_old/μ_old) × (π_θ/π_old).

    Statistics of |log-ratio| in nats over response tokens, for `mismatch` (π_old/μ_old, training–inference discrepancy)
    and `staleness` (π_θ/π_old): `{factor}_mean`, `_q50`, `_q90`, `_q99` (nearest observed values) and `_max`.
    """
    tokens = mask.bool()
    statistics = {}
    for factor, log_ratio in (
        ("mismatch", _log_ratio(logp_old, logp_rollout, mask)),
        ("staleness", _log_ratio(logp, logp_old, mask)),
    ):
        size = log_ratio.abs()
        statistics[f"{factor}_mean"] = masked_mean(size, mask)
        # Sorted by hand: torch.quantile refuses more than 16 M values, one long-context batch.
        ordered = size[tokens].sort().values if tokens.any() else size.new_zeros(1)
        for key, quantile in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99), ("max", 1.0)):
            statistics[f"{factor}_{key}"] = ordered[round(quantile * (len(ordered) - 1))]
    return statistics


def log_ratio_quantiles(
    logp: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor, quantiles: Sequence[float]
) -> Float[Tensor, "q"]:
    """Quantiles (nearest observed values) of log π_θ/μ_old in nats over response tokens: which way the engines differ,
    and how far. 0 with nothing in the mask."""
    ordered = _log_ratio(logp, logp_rollout, mask)[mask.bool()].sort().values
    if not len(ordered):
        ordered = ordered.new_zeros(1)
    return torch.stack([ordered[round(quantile * (len(ordered) - 1))] for quantile in quantiles])


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half-width of its 95 % t-interval; `values` is [seeds, steps]. NaN widths with one seed.

    The quantile is SciPy's, which comes with the extra `plots`.
    """
    n = len(values)
    if n == 1:
        return values[0], np.full(values.shape[1], math.nan)
    from scipy.special import stdtrit  # here: whoever imports the metrics need not have it

    return values.mean(0), stdtrit(n - 1, 0.975) * values.std(0, ddof=1) / math.sqrt(n)


def first_order_gap(logp: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, ""]:
    """Mean over responses of |Π_t r_t − (1 + Σ_t (r_t − 1))|, r_t = π_θ/μ_old.

    What the token-level objective drops of a response with reward 1: the sequence weight of (1) minus its first-order
    expansion. It is 0 where the approximation is exact and grows with the square of the ratios' distance from 1 and
    with the length. Each log-ratio and their sum are clamped at ±20, so it stays finite (at most 5·10⁸ or so a token).
    """
    log_ratio = _log_ratio(logp, logp_rollout, mask)
    # Π r − 1 and r − 1 through expm1: the difference of two numbers near 1 would be all rounding.
    gap = (_clamped(log_ratio.sum(1)).expm1() - _clamped(log_ratio).expm1().sum(1)).abs()
    return gap.mean() if len(gap) else gap.sum()


def length_reward_cov(rewards: Float[Tensor, " B"], mask: Tensor, group_size: int) -> Float[Tensor, ""]:
    """Cov(|y|, R) within the groups: (1/B) Σ_i (|y_i| − mean |y| of its group) · R_i, in tokens × reward.

    Below 0 where wrong responses are the longer ones. Advantages that differ from the rewards by a constant per group
    give the same number. The divisor is B, as in the losses, not B − 1: the sum over tokens of the advantage
    R − group mean is |y| (R − group mean), so this is what multiplies μ − π in the drift of a batch (`drift`), and its
    expectation is (1 − 1/G) Cov(|y|, R), as that of the batch's gradient.

    ValueError: the batch is no whole number of groups.
    """
    if group_size < 1 or len(mask) % group_size or rewards.shape != mask.shape[:1]:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)}, mask {list(mask.shape)}, group_size is {group_size}; "
            "expected [B] and [B, T] with B = prompts × group_size, grouped by prompt"
        )
    rewards = _working(rewards)
    lengths = mask.bool().sum(1).to(rewards.dtype).view(-1, group_size)
    centred = (lengths - lengths.mean(1, keepdim=True)).flatten()
    return (centred * rewards).sum() / max(len(rewards), 1)


def entropy_drift(
    logp: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    advantages: Float[Tensor, "..."],
    mask: Tensor,
) -> Float[Tensor, ""]:
    """How much faster the entropy would grow (below 0: fall) if the weight w = π_θ/μ_old were left out.

        (1/B) Σ_b Σ_t (1 − w_t) Â_t h_t,    h_t = −π(y_t) (log π(y_t) + H_t) = ∂H_t/∂z(y_t)

    The two gradients, without the weight and with it, differ at a token by (1 − w) Â (e_a − π) in the logits z of its
    context. Projected on the entropy's gradient that is (1 − w) Â (h_a + k), where k = Σ_b π_b² (log π_b + H) is not
    part of what a forward returns. This is the estimate without k. As E_μ[1 − w | context] = 0, k contributes nothing
    wherever the advantage is alike for all tokens: the whole of the drift (`drift.drift`) is estimated without bias.
    What is left out is Σ_c d(c) k(c) Σ_a (μ − π)(a|c) Q(c, a), from contexts where the token matters.

    In nats per unit step of gradient ascent on the logits, summed over contexts, as if each context had logits of its
    own: parameters that contexts share change the size, not the sign, as long as the contexts are alike. The weight is
    not capped, since a capped one has no mean of 1. `advantages` is `[B]` or `[B, T]`.
    """
    log_ratio = _log_ratio(logp, logp_rollout, mask)
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    logp, entropy, advantages = (_zero_outside(values, mask) for values in (logp, entropy, advantages))
    slope = -logp.exp() * (logp + entropy)
    return -(_clamped(log_ratio).expm1() * advantages * slope).sum() / max(len(mask), 1)


def entropy_from_logits(logits: Float[Tensor, "*positions V"]) -> Float[Tensor, "*positions"]:
    """Token entropy H = −Σ_w π(w) log π(w) in nats, one number a position.

    A logit of −∞ (a forbidden token) counts as probability 0. Positions are independent: where `[B, T, V]` does not
    fit in memory, call it on chunks and concatenate.
    """
    logp = _working(logits).log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


@torch.no_grad()
def policy_metrics(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor
) -> dict[str, Float[Tensor, ""]]:
    """The metrics of one gradient step that follow from the three log-probabilities alone.

        kl_rollout_old         `kl_k1`, the paper's training–inference KL, nats per token
        k3_rollout_old         `kl_k3`, the same KL with less noise
        ess                    `token_ess`, effective sample size of the weights π_θ/μ_old, a fraction
        log_ratio_mismatch     mean |log π_old/μ_old|, nats
        log_ratio_staleness    mean |log π_θ/π_old|, nats
        first_order_gap        see `first_order_gap`
        response_length        mean number of response tokens

    Weights and clipping are the objective's, which returns their metrics (`objectives.PolicyLoss`).

    Raises TypeError for a list or an array in the place of a tensor.
    """
    for name, values in (("logp", logp), ("logp_old", logp_old), ("logp_rollout", logp_rollout), ("mask", mask)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}; pass a tensor [B, T]: torch.as_tensor({name})")
    return {
        "kl_rollout_old": kl_k1(logp_rollout, logp_old, mask),
        "k3_rollout_old": kl_k3(logp_rollout, logp_old, mask),
        "ess": token_ess(logp, logp_rollout, mask),
        "log_ratio_mismatch": masked_mean(_log_ratio(logp_old, logp_rollout, mask).abs(), mask),
        "log_ratio_staleness": masked_mean(_log_ratio(logp, logp_old, mask).abs(), mask),
        "first_order_gap": first_order_gap(logp, logp_rollout, mask),
        "response_length": mask.bool().sum() / max(len(mask), 1),
    }


def score_error(rewards: Float[Tensor, "problems samples"]) -> Float[Tensor, ""]:
    """Standard error, over problems, of the mean of n problems' mean rewards r̄_i; in units of the reward:

        SE² = 1 / (n (n − 1)) · Σ_i (r̄_i − r̄)²

    It says how far the mean would move with other problems of the same kind and other samples of each. Samples of one
    problem are not independent of each other, so problems are counted, not samples (Miller, arXiv 2411.00640). One
    problem alone has none: NaN.
    """
    means = _working(rewards).mean(1)
    return (means.var() / len(means)).sqrt() if len(means) > 1 else means.new_tensor(math.nan)


def fetch(metrics: Mapping[str, Float[Tensor, ""]]) -> dict[str, float]:
    """Scalar tensors as numbers, in one transfer from the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


class CollapseDetector:
    """Watches a training run: takes the metrics of every gradient step, returns a sentence for each fall of the reward
    or the score that has just happened.

    Of each metric two moving averages are kept: a fast one, where it is now (over about `FAST` updates; of the score,
    which is rare, its last value), and a slow one, its running baseline (`SLOW` updates). The warnings:

        reward, score   fast < the best fast value so far − max(min(`drop`, best / 2), noise)
        any metric      NaN or infinite

    Noise is three standard errors of the difference of two means of `problems` rewards, of the score of `problems` ×
    `samples`: what sampling the same problems again would do. A fall is told once, from where
    and to where; a metric that has risen again by as much can fall again. The score is judged from its second value on,
    the reward after `warmup` updates.

    Entropy and KL raise no warning of their own: a policy that learns loses entropy fast, and most KLs that rise do no
    harm. When a fall is told, they are named if they have moved: an entropy below `entropy_drop` × its baseline, a KL
    above `kl_rise` × its own and above `kl_floor`. Metrics missing from an update are skipped.

    `lessons/results/EARLY_WARNING.md` judges how early the warnings about the reward come before the score falls.

    Args:
        drop: in units of the reward, which lies in [0, 1].
        problems: held-out problems behind each score.
        samples: of each problem.
        entropy_drop: fraction of the baseline below which the entropy has dropped sharply.
        kl_rise: multiple of the baseline above which the KL has taken off.
        kl_floor: nats per token; a KL below this is harmless however fast it grows.
        warmup: updates of the reward before it is judged.
    """

    FAST, SLOW = 10, 50

    def __init__(
        self,
        *,
        drop: float = 0.25,
        problems: int = 256,
        samples: int = 1,
        entropy_drop: float = 0.4,
        kl_rise: float = 3.0,
        kl_floor: float = 1e-3,
        warmup: int = 20,
    ):
        self.drop, self.problems, self.samples, self.warmup = drop, problems, samples, warmup
        self.entropy_drop, self.kl_rise, self.kl_floor = entropy_drop, kl_rise, kl_floor
        # metric -> count, fast, slow; of reward and score also best, at (its step) and low (since the fall, or None)
        self._averages: dict[str, dict[str, Any]] = {}
        self._broken: list[str] = []  # metrics of which a value was not finite

    def update(self, metrics: Mapping[str, float | int]) -> list[str]:
        """Take one step's metrics, `grad_step` among them; return the warnings this step raises, usually none."""
        warnings, step = [], metrics.get("grad_step", "?")
        for name in ("entropy", "kl_rollout_old", "reward", "score"):
            if name not in metrics:
                continue
            if not math.isfinite(value := metrics[name]):
                if name not in self._broken:
                    self._broken.append(name)
                    warnings.append(f"gradient step {step}: {name} is {value}")
                continue
            self._average(name, value)
            if name in ("reward", "score") and (fall := self._fall(name, step)):
                warnings.append(f"gradient step {step}: {name} {fall}{self._moved()}")
        return warnings

    def state_dict(self) -> dict:
        """What a resumed run needs, in JSON types (floats survive JSON exactly). The limits are not part of it."""
        return {"averages": {name: dict(a) for name, a in self._averages.items()}, "broken": list(self._broken)}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on exactly where the detector that gave `state` stood."""
        self._averages = {name: dict(a) for name, a in state["averages"].items()}
        self._broken = list(state["broken"])

    def _average(self, name: str, value: float) -> None:
        a = self._averages.setdefault(name, {"count": 0, "fast": 0.0, "slow": 0.0})
        a["count"] += 1
        # A plain mean until the window is full, exponential from there: one odd first value must not set the baseline.
        a["fast"] += (value - a["fast"]) / min(a["count"], 1 if name == "score" else self.FAST)
        a["slow"] += (value - a["slow"]) / min(a["count"], self.SLOW)

    def _fall(self, name: str, step: float | int | str) -> str | None:
        a = self._averages[name]
        now = a["fast"]
        if a["count"] <= (1 if name == "score" else max(1, self.warmup)):
            a |= {"best": now, "at": step, "low": None}
            return None
        best = a["best"]
        variance = sum(p * (1 - p) for p in (min(1.0, max(0.0, value)) for value in (now, best)))
        rewards = self.problems * (self.samples if name == "score" else 1)
        limit = max(min(self.drop, best / 2), 3 * math.sqrt(variance / rewards))
        if a["low"] is not None:
            a["low"] = min(a["low"], now)
            if now > a["low"] + limit:
                a |= {"best": now, "at": step, "low": None}
        elif now > best:
            a |= {"best": now, "at": step}
        elif now < best - limit:
            a["low"] = now
            return f"fell from {best:.2f} (step {a['at']}) to {now:.2f}"
        return None

    def _moved(self) -> str:
        """Which of entropy and KL are far from their baselines, in words."""
        words = ""
        if (a := self._averages.get("entropy")) and a["fast"] < self.entropy_drop * a["slow"]:
            words += f"; entropy is down from {a['slow']:.3g} to {a['fast']:.3g} nats"
        if (a := self._averages.get("kl_rollout_old")) and a["fast"] > max(self.kl_rise * a["slow"], self.kl_floor):
            words += f"; the training–inference KL is up from {a['slow']:.3g} to {a['fast']:.3g} nats per token"
        return words


def _working(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), _working(values), 0.0)


def _log_ratio(logp_numerator: Tensor, logp_denominator: Tensor, mask: Tensor) -> Tensor:
    """0 (a ratio of 1) outside the mask."""
    return _zero_outside(_working(logp_numerator) - _working(logp_denominator), mask)


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _ess(log_weights: Tensor, mask: Tensor) -> Float[Tensor, ""]:
    if not log_weights.numel():
        return log_weights.new_ones(())
    log_weights = log_weights.masked_fill(~mask, -math.inf)
    # Scaled so that the largest weight is 1: nothing overflows and the fraction is unchanged.
    weights = (log_weights - log_weights.max()).exp()
    fraction = weights.sum().square() / (mask.sum() * weights.square().sum())
    return torch.where(mask.any(), fraction, 1.0)
