"""Exercises of lab 03: training–inference discrepancy, importance weights, their cap, and KL estimators."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations

# ------------------------------------------------------------------------------------------------ 03.1 k3 under a mask

_MU = torch.tensor([[0.50, 0.40, 0.90, 0.30], [0.20, 0.80, 1.00, 1.00]]).log()
_PI = torch.tensor([[0.40, 0.50, 0.90, 0.10], [0.60, 0.70, 1.00, 1.00]]).log()
_MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def _padded(values: Tensor, padding: float) -> Tensor:
    return values.masked_fill(~_MASK, padding)


def _observe_k3(answer: Callable[..., Tensor]) -> Observations:
    return {
        "k3 of six tokens": answer(_padded(_MU, -1.0), _padded(_PI, -2.0), _MASK),
        "k3 where the padding is NaN": answer(_padded(_MU, torch.nan), _padded(_PI, torch.nan), _MASK),
        "k3 of two equal engines": answer(_MU, _MU, _MASK),
    }


def _k3(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = (logp_old - logp_rollout)[mask]
    return (log_ratio.exp() - 1 - log_ratio).mean()


def _k3_reversed(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    return _k3(logp_old, logp_rollout, mask)


def _k3_as_k1(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    return (logp_rollout - logp_old)[mask].mean()


def _k3_as_k2(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    return (logp_rollout - logp_old)[mask].square().mean() / 2


def _k3_no_one(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = (logp_old - logp_rollout)[mask]
    return (log_ratio.exp() - log_ratio).mean()


def _k3_all_tokens(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = logp_old - logp_rollout
    return (log_ratio.exp() - 1 - log_ratio).mean()


def _k3_padding_in_divisor(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = torch.where(mask, logp_old - logp_rollout, 0.0)
    return (log_ratio.exp() - 1 - log_ratio).mean()


def _k3_times_mask(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = logp_old - logp_rollout
    return ((log_ratio.exp() - 1 - log_ratio) * mask).sum() / mask.sum()


def _k3_mean_of_means(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = torch.where(mask, logp_old - logp_rollout, 0.0)
    return ((log_ratio.exp() - 1 - log_ratio).sum(1) / mask.sum(1)).mean()


_EXERCISE_1 = Exercise(
    id="03.1",
    title="k3 from log-probabilities and a mask",
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "The tokens were drawn by μ_old. Which of the two log-probabilities is then the denominator of r?",
        "log r = logp_old − logp_rollout, and one term is r − 1 − log r.",
        "Take the true positions out first, `values[mask]`; then nothing in the padding can get into the mean.",
    ),
    observe=_observe_k3,
    solution=_k3,
    mistakes=(
        Mistake(
            "ratio upside down",
            _k3_reversed,
            "every term is ≥ 0, so it looks right, but the ratio is upside down. Under samples from μ_old the "
            "denominator of r is μ_old; the other way round the mean is χ²(μ‖π) minus the KL, not a KL.",
        ),
        Mistake(
            "k1",
            _k3_as_k1,
            "that is k1, the mean of log μ − log π. Its mean is the same KL, but single terms are negative and its "
            "noise is much larger where the engines nearly agree. The two terms r − 1 are missing.",
        ),
        Mistake(
            "k2",
            _k3_as_k2,
            "that is k2, half the squared log-ratio. It is never negative either, but it is biased: it misses the "
            "KL by a sixth of the mean cubed log-ratio.",
        ),
        Mistake(
            "no minus one",
            _k3_no_one,
            "two equal engines get 1 nat. Where r = 1 a term must vanish: something of size 1 is missing.",
        ),
        Mistake(
            "all positions",
            _k3_all_tokens,
            "padding was averaged too. What stands outside the mask is no token; here it holds arbitrary numbers.",
        ),
        Mistake(
            "padding in the divisor",
            _k3_padding_in_divisor,
            "the sum is right, but it is divided by the number of positions, padding included. The KL then depends "
            "on how long the longest response of the batch happens to be.",
        ),
        Mistake(
            "multiplied by the mask",
            _k3_times_mask,
            "right as long as the padding holds finite numbers. NaN · 0 is NaN: select the tokens, or replace what is "
            "outside, before any arithmetic.",
        ),
        Mistake(
            "mean of means",
            _k3_mean_of_means,
            "that is a mean over responses of means over their tokens: a token of a short response counts more. "
            "The training–inference KL is per token.",
        ),
    ),
    praise="The library's is diagnostics.kl_k3.",
)

# --------------------------------------------------------------------------------------- 03.2 choose the estimator

_QUESTIONS = (
    "never negative and unbiased",
    "never negative but biased",
    "survives a huge ratio",
    "drawn by the trainer",
)
_CHOICES = ("k1", "k2", "k3", "none")


def _observe_choice(answer: Callable[[], Mapping[str, str]]) -> Observations:
    chosen = answer()
    given = {name: str(chosen[name]).strip().lower() for name in _QUESTIONS}
    if wrong := [choice for choice in given.values() if choice not in _CHOICES]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_CHOICES)}")
    return {f"the choice for “{name}”": choice for name, choice in given.items()}


def _choice(*choices: str) -> Callable[[], dict[str, str]]:
    return lambda: dict(zip(_QUESTIONS, choices, strict=True))


_EXERCISE_2 = Exercise(
    id="03.2",
    title="Choose the estimator",
    difficulty=2,
    importance=3,
    minutes=6,
    hints=(
        "Two of the three are never negative. One of those two is unbiased.",
        "For the third: put r = 1000 into −log r, into ½ log² r and into r − 1 − log r. Which stays small?",
        "For the last: each of the three is a mean over tokens that μ_old drew. What if it was another who drew?",
    ),
    observe=_observe_choice,
    solution=_choice("k3", "k2", "k1", "none"),
    mistakes=(
        Mistake(
            "k2 and k3 swapped",
            _choice("k2", "k3", "k1", "none"),
            "k2 and k3 are the wrong way round. E[r] = 1 makes the mean of r − 1 vanish, so k3 has the mean of k1, the "
            "KL itself; half a square has not.",
        ),
        Mistake(
            "k3 for heavy tails",
            _choice("k3", "k2", "k3", "none"),
            "k3 contains r itself: one token that the trainer finds a thousand times likelier contributes almost a "
            "thousand nats. Low variance is a promise for ratios near 1 only; −log r grows like the logarithm.",
        ),
        Mistake(
            "any sampler will do",
            _choice("k3", "k2", "k1", "k3"),
            "the last is wrong. All three are expectations under μ_old. Averaged over tokens that π_old drew, k3 with "
            "r = π_old/μ_old estimates no KL in any direction.",
        ),
        Mistake(
            "k1 never negative",
            _choice("k1", "k2", "k1", "none"),
            "k1 is negative for every token that the trainer finds likelier than the sampler did. Only its mean over "
            "all tokens is not.",
        ),
        Mistake(
            "k2 for heavy tails",
            _choice("k3", "k2", "k2", "none"),
            "½ log² r is tame, but biased, and worst where ratios are far from 1. Asked was one whose mean is the KL.",
        ),
    ),
    praise="Plot k1 because the paper does; look at k3 when the curve of k1 dips below zero.",
)

# ------------------------------------------------------------------------------------- 03.3 what leaving it out does

_LOGITS = torch.tensor([0.5, -0.3, 1.1, 0.0], dtype=torch.float64)
_SAMPLER = torch.tensor([0.10, 0.25, 0.40, 0.25], dtype=torch.float64)
_REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


def _observe_bias(answer: Callable[..., Tensor]) -> Observations:
    both = answer(_LOGITS.clone(), _SAMPLER.clone(), _REWARDS.clone())
    agree = answer(_LOGITS.clone(), _LOGITS.softmax(0), _REWARDS.clone())
    return {
        "the gradient with the weight": both[0],
        "the gradient without it": both[1],
        "the difference of the two where the engines agree": agree[1] - agree[0],
    }


def _bias(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    pi = logits.softmax(0)
    scores = torch.eye(len(pi), dtype=pi.dtype) - pi
    return torch.stack([(mu * (pi / mu) * rewards) @ scores, (mu * rewards) @ scores])


def _bias_weight_upside_down(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    pi = logits.softmax(0)
    scores = torch.eye(len(pi), dtype=pi.dtype) - pi
    return torch.stack([(mu * (mu / pi) * rewards) @ scores, (mu * rewards) @ scores])


def _bias_under_pi(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    both = _bias(logits, mu, rewards)
    return torch.stack([both[0], both[0]])


def _bias_weighted_twice(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    pi = logits.softmax(0)
    scores = torch.eye(len(pi), dtype=pi.dtype) - pi
    return torch.stack([(pi * (pi / mu) * rewards) @ scores, (mu * rewards) @ scores])


def _bias_no_softmax(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    pi = logits.softmax(0)
    return torch.stack([pi * rewards, mu * rewards])


def _bias_loss(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    return -_bias(logits, mu, rewards)


def _bias_attached(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    logits = logits.requires_grad_()
    logp = logits.log_softmax(0)
    weighted = (mu * (logp.exp() / mu) * rewards * logp).sum()
    (with_weight,) = torch.autograd.grad(weighted, logits, retain_graph=True)
    (without,) = torch.autograd.grad((mu * rewards * logp).sum(), logits)
    return torch.stack([with_weight, without])


_EXERCISE_3 = Exercise(
    id="03.3",
    title="The gradient without the weight, exactly",
    difficulty=3,
    importance=5,
    minutes=15,
    hints=(
        "An expectation under μ_old is a sum: Σ_y μ_old(y) · (what stands in the brackets). Four terms, no sampling.",
        "∇ log π(y) with respect to the logits is onehot(y) − π: a row for each y, `torch.eye(4) - pi`.",
        "With the weight, μ(y) · π(y)/μ(y) is π(y). Without it, μ(y) stays.",
        "With autograd: the weight stands in sg[·]. Detach it before it meets log π.",
    ),
    observe=_observe_bias,
    solution=_bias,
    mistakes=(
        Mistake(
            "weight upside down",
            _bias_weight_upside_down,
            "the weighted gradient has μ/π in it. A token that the sampler drew too rarely must count more, so the "
            "target stands in the numerator.",
        ),
        Mistake(
            "expectation under the trainer",
            _bias_under_pi,
            "your two rows are the same. Without the weight nothing turns the expectation under μ_old into one "
            "under π: the tokens come from μ_old.",
        ),
        Mistake(
            "weighted twice",
            _bias_weighted_twice,
            "the first row is an expectation under π that is weighted once more. Draw from μ_old and weight by "
            "π/μ_old, or draw from π and don't weight.",
        ),
        Mistake(
            "softmax forgotten",
            _bias_no_softmax,
            "that is the expectation of R · onehot(y). The logits of the tokens that were not drawn move as well: "
            "∇ log π(y) = onehot(y) − π.",
        ),
        Mistake(
            "sign of the loss",
            _bias_loss,
            "both rows have the wrong sign: that is the gradient of a loss. Asked is that of the objective.",
        ),
        Mistake(
            "weight not detached",
            _bias_attached,
            "autograd went through the weight: the first row has an extra term ∇w · log π. In (7) the weight is inside "
            "sg[·]: it says how much a token counts and is no part of what is differentiated.",
        ),
    ),
    praise="The second row is a pull towards imitating the sampler's rewarded responses, whatever π thinks of them.",
)

# ---------------------------------------------------------------------------------------- 03.4 the cap on the product

_W_MU = torch.tensor([[0.10, 0.02, 0.50, 0.40], [0.05, 0.60, 0.01, 0.30]], dtype=torch.float64).log()
_W_OLD = torch.tensor([[0.20, 0.16, 0.40, 0.40], [0.45, 0.30, 0.04, 0.30]], dtype=torch.float64).log()
_W_NEW = torch.tensor([[0.24, 0.08, 0.10, 0.60], [0.54, 0.33, 0.09, 0.30]], dtype=torch.float64).log()


def _observe_weight(answer: Callable[..., Tensor]) -> Observations:
    logp = _W_NEW.clone().requires_grad_()
    weight = answer(logp, _W_OLD, _W_MU, 5.0)
    return {
        "whether the weight carries a gradient": weight.requires_grad,
        "the weight": weight,
        "the weight with a cap of 2": answer(logp, _W_OLD, _W_MU, 2.0),
    }


def _weight(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_rollout).detach().exp().clamp(max=cap)


def _weight_attached(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_rollout).exp().clamp(max=cap)


def _weight_factor_capped(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp_old - logp_rollout).exp().clamp(max=cap) * (logp - logp_old).detach().exp()


def _weight_both_capped(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp_old - logp_rollout).exp().clamp(max=cap) * (logp - logp_old).detach().exp().clamp(max=cap)


def _weight_discrepancy_only(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp_old - logp_rollout).exp().clamp(max=cap)


def _weight_staleness_only(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_old).detach().exp().clamp(max=cap)


def _weight_uncapped(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_rollout).detach().exp()


def _weight_two_sided(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_rollout).detach().exp().clamp(1 / cap, cap)


def _weight_upside_down(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp_rollout - logp).detach().exp().clamp(max=cap)


def _weight_log_capped(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    return (logp - logp_rollout).detach().clamp(max=cap).exp()


_EXERCISE_4 = Exercise(
    id="03.4",
    title="The truncated importance weight",
    difficulty=2,
    importance=5,
    minutes=8,
    hints=(
        "The numerator is the policy that is being trained, the denominator the one that drew the token.",
        "The paper caps π_θ/μ_old as a whole. `logp_old` is an argument, because look-alikes use it; you need not.",
        "`.detach()`, `.exp()`, `.clamp(max=cap)`; nothing from below.",
    ),
    observe=_observe_weight,
    solution=_weight,
    mistakes=(
        Mistake(
            "not detached",
            _weight_attached,
            "the numbers are right, but the weight carries a gradient. In (7) it is inside sg[·]; attached, the "
            "loss has a second term that nobody derived.",
        ),
        Mistake(
            "cap on the discrepancy alone",
            _weight_factor_capped,
            "you capped π_old/μ_old and multiplied by π_θ/π_old afterwards. The product can pass the cap (and, with a "
            "staleness below 1, tokens are cut whose product was small). Many frameworks do this; it is not MiniRL.",
        ),
        Mistake(
            "both factors capped",
            _weight_both_capped,
            "two caps, one on each factor, let the product reach cap², and cut where the product is small.",
        ),
        Mistake(
            "discrepancy alone",
            _weight_discrepancy_only,
            "that is π_old/μ_old. The target is π_θ: after the first mini-batch it has moved, and staleness belongs to "
            "the weight.",
        ),
        Mistake(
            "staleness alone",
            _weight_staleness_only,
            "that is π_θ/π_old, PPO's ratio: the weight of the ablation “− IS”. The tokens were drawn by μ_old.",
        ),
        Mistake(
            "no cap",
            _weight_uncapped,
            "there is no cap. One token that the sampler found nearly impossible outweighs the batch.",
        ),
        Mistake(
            "bound from below",
            _weight_two_sided,
            "there is a lower bound too. A small weight says that the trainer would hardly have drawn this token. "
            "Raised to 1/cap it counts for more than it should, and nothing is gained: small weights add no variance.",
        ),
        Mistake(
            "upside down",
            _weight_upside_down,
            "the ratio is upside down: what was drawn too rarely counts less instead of more.",
        ),
        Mistake(
            "cap on the logarithm",
            _weight_log_capped,
            "the cap acts on the log-ratio, so weights up to e⁵ ≈ 148 pass.",
        ),
    ),
    praise="minirl_loss computes just this; its metric is_weight_max never exceeds the cap.",
)

# ------------------------------------------------------------------------------------------- 03.5 what the cap costs

_C_PI = torch.tensor([0.30, 0.25, 0.25, 0.15, 0.05], dtype=torch.float64)
_C_MU = torch.tensor([0.01, 0.34, 0.30, 0.20, 0.15], dtype=torch.float64)
_C_VALUES = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
_C_CAPS = (1.0, 5.0, 40.0)


def _observe_cap(answer: Callable[..., Tensor]) -> Observations:
    few = torch.as_tensor(answer(_C_PI, _C_MU, _C_VALUES, _C_CAPS, 16))
    many = torch.as_tensor(answer(_C_PI, _C_MU, _C_VALUES, _C_CAPS, 4096))
    return {
        "the bias, cap by cap": few[:, 0],
        "the standard error with 16 draws": few[:, 1],
        "the standard error with 4096 draws": many[:, 1],
    }


def _cap(pi: Tensor, mu: Tensor, values: Tensor, caps: tuple[float, ...], n: int) -> Tensor:
    rows = []
    for cap in caps:
        x = (pi / mu).clamp(max=cap) * values
        mean = (mu * x).sum()
        variance = (mu * (x - mean).square()).sum()
        rows.append(torch.stack([mean - (pi * values).sum(), (variance / n).sqrt()]))
    return torch.stack(rows)


def _cap_with(
    *,
    bias_from_mu: bool = False,
    flipped: bool = False,
    under_pi: bool = False,
    power: float = 0.5,
    of_weight: bool = False,
) -> Callable[..., Tensor]:
    """The calculation with one thing wrong."""

    def answer(pi: Tensor, mu: Tensor, values: Tensor, caps: tuple[float, ...], n: int) -> Tensor:
        rows = []
        for cap in caps:
            weight = (pi / mu).clamp(max=cap)
            mean = (mu * weight * values).sum()
            truth = ((mu if bias_from_mu else pi) * values).sum()
            x = weight if of_weight else weight * values
            drawn = pi if under_pi else mu
            variance = (drawn * (x - (drawn * x).sum()).square()).sum()
            rows.append(torch.stack([truth - mean if flipped else mean - truth, variance.sqrt() / n**power]))
        return torch.stack(rows)

    return answer


_EXERCISE_5 = Exercise(
    id="03.5",
    title="What a cap costs and what it saves",
    difficulty=3,
    importance=4,
    minutes=15,
    hints=(
        "One draw gives x = min(π/μ, c) · value. You know μ(y) of every y: its mean and variance are two sums.",
        "The bias is the mean of x minus what is wanted, and wanted is the mean of the values under π.",
        "The mean of n independent draws has the variance of one draw divided by n; the standard error is the root.",
    ),
    observe=_observe_cap,
    solution=_cap,
    mistakes=(
        Mistake(
            "compared with the sampler",
            _cap_with(bias_from_mu=True),
            "the bias is measured from the sampler's own mean. What the weight is for is the mean under π.",
        ),
        Mistake(
            "sign of the bias",
            _cap_with(flipped=True),
            "the bias has the wrong sign: it is what the estimate says minus what is true. A cap takes weight away, so "
            "with values ≥ 0 it can only be negative.",
        ),
        Mistake(
            "variance under the trainer",
            _cap_with(under_pi=True),
            "the variance was taken under π. The draws come from μ: there a heavy token is rare, and rare with a large "
            "weight is what makes the noise.",
        ),
        Mistake(
            "divided by n",
            _cap_with(power=1.0),
            "the standard error was divided by n. The variance falls like 1/n, the standard error like 1/√n.",
        ),
        Mistake(
            "of one draw",
            _cap_with(power=0.0),
            "that is the standard deviation of a single draw. Averaging n of them makes it smaller.",
        ),
        Mistake(
            "of the weight",
            _cap_with(of_weight=True),
            "that is the standard error of the mean weight. Wanted is that of weight times value: a draw with value 0 "
            "contributes 0, whatever its weight.",
        ),
    ),
    praise="Bias does not shrink with the batch, noise does: a cap of 5 is a choice for a batch size.",
)

# ----------------------------------------------------------------------------------- 03.6 log-probability at T ≠ 1

_T_LOGITS = torch.tensor(
    [[[1.0, 2.0, -1.0, 0.5], [0.2, -0.4, 1.5, 0.0]], [[-0.3, 0.8, 0.1, 2.2], [1.2, 0.3, 0.3, -2.0]]]
)
_T_TOKENS = torch.tensor([[0, 3], [2, 0]])


def _observe_temperature(answer: Callable[..., Tensor]) -> Observations:
    return {
        "log-probabilities at temperature 0.5": answer(_T_LOGITS, _T_TOKENS, 0.5),
        "log-probabilities at temperature 2": answer(_T_LOGITS, _T_TOKENS, 2.0),
    }


def _tempered(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _tempered_raw(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _tempered(logits, tokens, 1.0)


def _tempered_after(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _tempered(logits, tokens, 1.0) / temperature


def _tempered_times(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _tempered(logits, tokens, 1 / temperature)


def _tempered_best(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).max(-1).values


def _tempered_logit(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).gather(-1, tokens[..., None])[..., 0]


def _tempered_over_time(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(1).gather(-1, tokens[..., None])[..., 0]


def _tempered_not_log(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _tempered(logits, tokens, temperature).exp()


_EXERCISE_6 = Exercise(
    id="03.6",
    title="The log-probability of the token that was drawn",
    difficulty=2,
    importance=5,
    minutes=8,
    hints=(
        "The token was drawn from softmax(logits / T). Its log-probability is that distribution's.",
        "Divide first, normalise afterwards: the normaliser depends on T.",
        "`log_softmax` over the vocabulary (the last axis), then `gather` at `tokens[..., None]`.",
    ),
    observe=_observe_temperature,
    solution=_tempered,
    mistakes=(
        Mistake(
            "temperature ignored",
            _tempered_raw,
            "these are the raw log-probabilities, those of temperature 1. The tokens were drawn at another: as μ_old "
            "they make every ratio wrong, even between identical engines.",
        ),
        Mistake(
            "divided after the softmax",
            _tempered_after,
            "the log-probability was divided by T after normalising. What you get does not add up to 1: "
            "the normaliser changes with T as well.",
        ),
        Mistake(
            "multiplied",
            _tempered_times,
            "the logits were multiplied by T. A temperature below 1 must make the distribution sharper.",
        ),
        Mistake(
            "likeliest token",
            _tempered_best,
            "that is the log-probability of the likeliest token. Wanted is that of the token that was drawn.",
        ),
        Mistake(
            "not normalised",
            _tempered_logit,
            "that is a logit, not a log-probability: the normaliser is missing, and it differs from place to place.",
        ),
        Mistake(
            "normalised over time",
            _tempered_over_time,
            "the softmax runs over the positions of the response instead of over the vocabulary.",
        ),
        Mistake(
            "probability",
            _tempered_not_log,
            "these are probabilities. Their logarithm is asked for: products over a response would underflow.",
        ),
    ),
    praise="The engine and the trainer must both do this, with the same T.",
)

EXERCISES = (_EXERCISE_1, _EXERCISE_2, _EXERCISE_3, _EXERCISE_4, _EXERCISE_5, _EXERCISE_6)
