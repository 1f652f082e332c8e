"""Exercises of lab 03: training–inference discrepancy, importance weights, their cap, KL estimators, and the drift."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import kl, token_logp
from minirl_edu.diagnostics import kl_k3

_MU = torch.tensor([[0.50, 0.40, 0.90, 0.30], [0.20, 0.80, 1.00, 1.00]]).log()
_PI = torch.tensor([[0.40, 0.50, 0.90, 0.10], [0.60, 0.70, 1.00, 1.00]]).log()
_MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def _observe_k3(answer: Answer) -> Observations:
    def padded(in_mu: float, in_pi: float) -> Tensor:
        return answer(_MU.masked_fill(~_MASK, in_mu), _PI.masked_fill(~_MASK, in_pi), _MASK)

    return {
        "k3 of six tokens": padded(-1.0, -2.0),
        "k3 where the padding is NaN": padded(torch.nan, torch.nan),
        "k3 of two equal engines": answer(_MU, _MU, _MASK),
    }


EX1 = exercise(
    """03.1 k3 from log-probabilities and a mask (difficulty 2, importance 5, 10 minutes)

    1. The tokens were drawn by μ_old. Which of the two log-probabilities is then the denominator of r?
    2. log r = logp_old − logp_rollout, and one term is r − 1 − log r.
    3. Take the true positions out first, `values[mask]`; then nothing in the padding can get into the mean.

    - ratio upside down: every term is ≥ 0, so it looks right, but the ratio is upside down. Under samples from μ_old
      the denominator of r is μ_old; the other way round the mean is χ²(μ‖π) minus the KL, not a KL.
    - k1: that is k1, the mean of log μ − log π. Its mean is the same KL, but single terms are negative and its noise is
      much larger where the engines nearly agree. The two terms r − 1 are missing.
    - k2: that is k2, half the squared log-ratio. It is never negative either, but it is biased: it misses the KL by a
      sixth of the mean cubed log-ratio.
    - no minus one: two equal engines get 1 nat. Where r = 1 a term must vanish: something of size 1 is missing.
    - all positions: padding was averaged too. What stands outside the mask is no token; here it holds arbitrary
      numbers.
    - padding in the divisor: the sum is right, but it is divided by the number of positions, padding included. The KL
      then depends on how long the longest response of the batch happens to be.
    - multiplied by the mask: right as long as the padding holds finite numbers. NaN · 0 is NaN: select the tokens, or
      replace what is outside, before any arithmetic.
    - mean of means: that is a mean over responses of means over their tokens: a token of a short response counts more.
      The training–inference KL is per token.

    The library's is diagnostics.kl_k3.
    """,
    observe=_observe_k3,
    solution=kl_k3,
    mistakes={
        "ratio upside down": lambda mu, old, mask: kl(old, mu, mask),
        "k1": partial(kl, term="k1"),
        "k2": partial(kl, term="k2"),
        "no minus one": partial(kl, term="k3 without the 1"),
        "all positions": partial(kl, over="places"),
        "padding in the divisor": partial(kl, over="counted padding"),
        "multiplied by the mask": partial(kl, over="product"),
        "mean of means": partial(kl, over="responses"),
    },
)


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


EX2 = exercise(
    """03.2 Choose the estimator (difficulty 2, importance 3, 6 minutes)

    1. Two of the three are never negative. One of those two is unbiased.
    2. For the third: put r = 1000 into −log r, into ½ log² r and into r − 1 − log r. Which stays small?
    3. For the last: each of the three is a mean over tokens that μ_old drew. What if another policy drew
       them?

    - k2 and k3 swapped: k2 and k3 are the wrong way round. E[r] = 1 makes the mean of r − 1 vanish, so k3 has the mean
      of k1, the KL itself; half a square has not.
    - k3 for heavy tails: k3 contains r itself: one token that the trainer finds a thousand times likelier contributes
      almost a thousand nats. Low variance is a promise for ratios near 1 only; −log r grows like the logarithm.
    - any sampler will do: the last is wrong. All three are expectations under μ_old. Averaged over tokens that π_old
      drew, k3 with r = π_old/μ_old estimates no KL in any direction.
    - k1 never negative: k1 is negative for every token that the trainer finds likelier than the sampler did. Only its
      mean over all tokens is not.
    - k2 for heavy tails: ½ log² r is tame, but biased, and worst where ratios are far from 1. The question asks for
      one whose mean is the KL.

    Plot k1 because the paper does; look at k3 when the curve of k1 dips below zero.
    """,
    observe=_observe_choice,
    solution=_choice("k3", "k2", "k1", "none"),
    mistakes={
        "k2 and k3 swapped": _choice("k2", "k3", "k1", "none"),
        "k3 for heavy tails": _choice("k3", "k2", "k3", "none"),
        "any sampler will do": _choice("k3", "k2", "k1", "k3"),
        "k1 never negative": _choice("k1", "k2", "k1", "none"),
        "k2 for heavy tails": _choice("k3", "k2", "k2", "none"),
    },
)


_LOGITS = torch.tensor([0.5, -0.3, 1.1, 0.0], dtype=torch.float64)
_SAMPLER = torch.tensor([0.10, 0.25, 0.40, 0.25], dtype=torch.float64)
_REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


def _observe_bias(answer: Answer) -> Observations:
    both = answer(_LOGITS.clone(), _SAMPLER.clone(), _REWARDS.clone())
    agree = answer(_LOGITS.clone(), _LOGITS.softmax(0), _REWARDS.clone())
    return {
        "the gradient with the weight": both[0],
        "the gradient without it": both[1],
        "the difference of the two where the engines agree": agree[1] - agree[0],
    }


def _bias(
    logits: Tensor, mu: Tensor, rewards: Tensor, *, weighted: Callable[[Tensor, Tensor], Tensor] = lambda pi, mu: pi
) -> Tensor:
    """The gradients with and without the weight; `weighted` is μ · w, which is π if w = π/μ."""
    pi = logits.softmax(0)
    scores = torch.eye(len(pi), dtype=pi.dtype) - pi
    return torch.stack([(weighted(pi, mu) * rewards) @ scores, (mu * rewards) @ scores])


EX3 = exercise(
    """03.3 The gradient without the weight, exactly (difficulty 3, importance 5, 15 minutes)

    1. An expectation under μ_old is a sum: Σ_y μ_old(y) · (what stands in the brackets). Four terms, no sampling.
    2. ∇ log π(y) with respect to the logits is onehot(y) − π: a row for each y, `torch.eye(4) - pi`.
    3. With the weight, μ(y) · π(y)/μ(y) is π(y). Without it, μ(y) stays.
    4. With autograd: the weight stands in sg[·]. Detach it before it meets log π.

    - weight upside down: the weighted gradient has μ/π in it. A token that the sampler drew too rarely must count more,
      so the target stands in the numerator.
    - expectation under the trainer: your two rows are the same. Without the weight nothing turns the expectation under
      μ_old into one under π: the tokens come from μ_old.
    - weighted twice: the first row is an expectation under π that is weighted once more. Draw from μ_old and weight by
      π/μ_old, or draw from π and don't weight.
    - softmax forgotten: that is the expectation of R · onehot(y). The logits of the tokens that were not drawn move as
      well: ∇ log π(y) = onehot(y) − π.
    - sign of the loss: both rows have the wrong sign: that is the gradient of a loss. The exercise asks for
      that of the objective.
    - weight not detached: autograd went through the weight: the first row has an extra term ∇w · log π. In (7) the
      weight is inside sg[·]: it says how much a token counts and is no part of what is differentiated.

    The second row is a pull towards imitating the sampler's rewarded responses, whatever π thinks of them.
    """,
    observe=_observe_bias,
    solution=_bias,
    mistakes={
        "weight upside down": partial(_bias, weighted=lambda pi, mu: mu * mu / pi),
        "expectation under the trainer": lambda *case: _bias(*case)[[0, 0]],
        "weighted twice": partial(_bias, weighted=lambda pi, mu: pi * pi / mu),
        "softmax forgotten": lambda logits, mu, rewards: torch.stack([logits.softmax(0) * rewards, mu * rewards]),
        "sign of the loss": lambda *case: -_bias(*case),
        # The gradient of w · log π is w · (1 + log π) · ∇log π.
        "weight not detached": partial(_bias, weighted=lambda pi, mu: pi * (1 + pi.log())),
    },
)


_W_MU = torch.tensor([[0.10, 0.02, 0.50, 0.40], [0.05, 0.60, 0.01, 0.30]], dtype=torch.float64).log()
_W_OLD = torch.tensor([[0.20, 0.16, 0.40, 0.40], [0.45, 0.30, 0.04, 0.30]], dtype=torch.float64).log()
_W_NEW = torch.tensor([[0.24, 0.08, 0.10, 0.60], [0.54, 0.33, 0.09, 0.30]], dtype=torch.float64).log()


def _observe_weight(answer: Answer) -> Observations:
    logp = _W_NEW.clone().requires_grad_()
    weight = answer(logp, _W_OLD, _W_MU, 5.0)
    return {
        "whether the weight carries a gradient": weight.requires_grad,
        "the weight": weight,
        "the weight with a cap of 2": answer(logp, _W_OLD, _W_MU, 2.0),
    }


def _ratio(logp: Tensor, reference: Tensor, cap: float = torch.inf) -> Tensor:
    return (logp - reference).detach().exp().clamp(max=cap)


EX4 = exercise(
    """03.4 The truncated importance weight (difficulty 2, importance 5, 8 minutes)

    1. The numerator is the policy that is being trained, the denominator the one that drew the token.
    2. The paper caps π_θ/μ_old as a whole. `logp_old` is an argument, because look-alikes use it. You need not use it.
    3. `.detach()`, `.exp()`, `.clamp(max=cap)`; nothing from below.

    - not detached: the numbers are right, but the weight carries a gradient. In (7) it is inside sg[·]; attached, the
      loss has a second term that nobody derived.
    - cap on the discrepancy alone: you capped π_old/μ_old and multiplied by π_θ/π_old afterwards. The product can pass
      the cap (and, with a staleness below 1, tokens are cut whose product was small). Many frameworks do this; it is
      not MiniRL.
    - both factors capped: two caps, one on each factor, let the product reach cap², and cut where the product is small.
    - discrepancy alone: that is π_old/μ_old. The target is π_θ: after the first mini-batch it has moved, and staleness
      belongs to the weight.
    - staleness alone: that is π_θ/π_old, PPO's ratio: the weight of the ablation “− IS”. The tokens were drawn by
      μ_old.
    - no cap: there is no cap. One token that the sampler found nearly impossible outweighs the batch.
    - bound from below: there is a lower bound too. A small weight says that the trainer would hardly have drawn this
      token. Raised to 1/cap it counts for more than it should, and nothing is gained: small weights add no variance.
    - upside down: the ratio is upside down: what was drawn too rarely counts less instead of more.
    - cap on the logarithm: the cap acts on the log-ratio, so weights up to e⁵ ≈ 148 pass.

    minirl_loss computes just this; its metric is_weight_max never exceeds the cap.
    """,
    observe=_observe_weight,
    solution=lambda logp, old, mu, cap: _ratio(logp, mu, cap),
    mistakes={
        "not detached": lambda logp, old, mu, cap: (logp - mu).exp().clamp(max=cap),
        "cap on the discrepancy alone": lambda logp, old, mu, cap: _ratio(old, mu, cap) * _ratio(logp, old),
        "both factors capped": lambda logp, old, mu, cap: _ratio(old, mu, cap) * _ratio(logp, old, cap),
        "discrepancy alone": lambda logp, old, mu, cap: _ratio(old, mu, cap),
        "staleness alone": lambda logp, old, mu, cap: _ratio(logp, old, cap),
        "no cap": lambda logp, old, mu, cap: _ratio(logp, mu),
        "bound from below": lambda logp, old, mu, cap: _ratio(logp, mu, cap).clamp(min=1 / cap),
        "upside down": lambda logp, old, mu, cap: _ratio(mu, logp, cap),
        "cap on the logarithm": lambda logp, old, mu, cap: (logp - mu).detach().clamp(max=cap).exp(),
    },
)


_C_PI = torch.tensor([0.30, 0.25, 0.25, 0.15, 0.05], dtype=torch.float64)
_C_MU = torch.tensor([0.01, 0.34, 0.30, 0.20, 0.15], dtype=torch.float64)
_C_VALUES = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
_C_CAPS = (1.0, 5.0, 40.0)


def _observe_cap(answer: Answer) -> Observations:
    few = torch.as_tensor(answer(_C_PI, _C_MU, _C_VALUES, _C_CAPS, 16))
    many = torch.as_tensor(answer(_C_PI, _C_MU, _C_VALUES, _C_CAPS, 4096))
    return {
        "the bias, cap by cap": few[:, 0],
        "the standard error with 16 draws": few[:, 1],
        "the standard error with 4096 draws": many[:, 1],
    }


def _cap(
    pi: Tensor,
    mu: Tensor,
    values: Tensor,
    caps: tuple[float, ...],
    n: int,
    *,
    wanted_under_mu: bool = False,
    drawn_by_pi: bool = False,
    of_weight: bool = False,
) -> Tensor:
    rows = []
    for cap in caps:
        weight = (pi / mu).clamp(max=cap)
        bias = (mu * weight * values).sum() - ((mu if wanted_under_mu else pi) * values).sum()
        x, probs = weight if of_weight else weight * values, pi if drawn_by_pi else mu
        variance = (probs * (x - (probs * x).sum()).square()).sum()
        rows.append(torch.stack([bias, (variance / n).sqrt()]))
    return torch.stack(rows)


EX5 = exercise(
    """03.5 What a cap costs and what it saves (difficulty 3, importance 4, 15 minutes)

    1. One draw gives x = min(π/μ, c) · value. You know μ(y) of every y: its mean and variance are two sums.
    2. The bias is the mean of x minus the mean of the values under π.
    3. The mean of n independent draws has the variance of one draw divided by n; the standard error is the root.

    - compared with the sampler: the bias is measured from the sampler's own mean. The weight is there to give the mean
      under π.
    - sign of the bias: the bias has the wrong sign: it is what the estimate says minus what is true. A cap takes weight
      away, so with values ≥ 0 it can only be negative.
    - variance under the trainer: the variance was taken under π. The draws come from μ: there a heavy token is rare,
      and rare with a large weight is what makes the noise.
    - divided by n: the standard error was divided by n. The variance falls like 1/n, the standard error like 1/√n.
    - of one draw: that is the standard deviation of a single draw. Averaging n of them makes it smaller.
    - of the weight: that is the standard error of the mean weight. The exercise wants that of weight times value: a
      draw with value 0 contributes 0, whatever its weight.

    Bias does not shrink with the batch, noise does: a cap of 5 is a choice for a batch size.
    """,
    observe=_observe_cap,
    solution=_cap,
    mistakes={
        "compared with the sampler": partial(_cap, wanted_under_mu=True),
        "sign of the bias": lambda *case: _cap(*case) * torch.tensor([-1.0, 1.0]),
        "variance under the trainer": partial(_cap, drawn_by_pi=True),
        "divided by n": lambda pi, mu, values, caps, n: _cap(pi, mu, values, caps, n**2),
        "of one draw": lambda pi, mu, values, caps, n: _cap(pi, mu, values, caps, 1),
        "of the weight": partial(_cap, of_weight=True),
    },
)


_T_LOGITS = torch.tensor(
    [[[1.0, 2.0, -1.0, 0.5], [0.2, -0.4, 1.5, 0.0]], [[-0.3, 0.8, 0.1, 2.2], [1.2, 0.3, 0.3, -2.0]]]
)
_T_TOKENS = torch.tensor([[0, 3], [2, 0]])


EX6 = exercise(
    """03.6 The log-probability of the token that was drawn (difficulty 2, importance 5, 8 minutes)

    1. The token was drawn from softmax(logits / T). Its log-probability is that distribution's.
    2. Divide first, normalise afterwards: the normaliser depends on T.
    3. `log_softmax` over the vocabulary (the last axis), then `gather` at `tokens[..., None]`.

    - temperature ignored: these are the raw log-probabilities, those of temperature 1. The tokens were drawn at
      another: as μ_old they make every ratio wrong, even between identical engines.
    - divided after the softmax: the log-probability was divided by T after normalising. What you get does not add up to
      1: the normaliser changes with T as well.
    - multiplied: the logits were multiplied by T. A temperature below 1 must make the distribution sharper.
    - likeliest token: that is the log-probability of the likeliest token. The exercise wants that of the token that
      was drawn.
    - not normalised: that is a logit, not a log-probability: the normaliser is missing, and it differs from place to
      place.
    - normalised over time: the softmax runs over the positions of the response instead of over the vocabulary.
    - probability: these are probabilities. The exercise asks for their logarithm: products over a response would
      underflow.

    The engine and the trainer must both do this, with the same T.
    """,
    observe=lambda answer: {
        "log-probabilities at temperature 0.5": answer(_T_LOGITS, _T_TOKENS, 0.5),
        "log-probabilities at temperature 2": answer(_T_LOGITS, _T_TOKENS, 2.0),
    },
    solution=token_logp,
    mistakes={
        "temperature ignored": lambda logits, tokens, t: token_logp(logits, tokens),
        "divided after the softmax": lambda logits, tokens, t: token_logp(logits, tokens) / t,
        "multiplied": lambda logits, tokens, t: token_logp(logits * t, tokens),
        "likeliest token": lambda logits, tokens, t: (logits / t).log_softmax(-1).max(-1).values,
        "not normalised": lambda logits, tokens, t: (logits / t).gather(-1, tokens[..., None])[..., 0],
        "normalised over time": lambda logits, tokens, t: (
            (logits / t).log_softmax(1).gather(-1, tokens[..., None])[..., 0]
        ),
        "probability": lambda logits, tokens, t: token_logp(logits, tokens, t).exp(),
    },
)


_GROUP = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
_GROUP_LENGTHS = {
    "wrong responses are longer": torch.tensor([3.0, 40.0, 25.0, 60.0], dtype=torch.float64),
    "all are alike": torch.full((4,), 12.0, dtype=torch.float64),
    "right ones are longer": torch.tensor([40.0, 3.0, 5.0, 2.0], dtype=torch.float64),
}
_D_PI = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
_D_MU = torch.tensor([0.5, 0.35, 0.15], dtype=torch.float64)


def _drift(
    lengths: Tensor,
    rewards: Tensor,
    pi: Tensor,
    mu: Tensor,
    *,
    per_token: Callable[[Tensor], Tensor] = torch.ones_like,
    baseline: bool = True,
    std: bool = False,
    direction: Callable[[Tensor, Tensor], Tensor] = lambda pi, mu: mu - pi,
) -> Tensor:
    advantages = rewards - rewards.mean() * baseline
    if std:
        advantages = advantages / rewards.std(correction=0)
    return (lengths * advantages * per_token(lengths)).mean() * direction(pi, mu)


EX7 = exercise(
    """03.7 The drift of a group (difficulty 3, importance 5, 12 minutes)

    1. Every token of a response pushes with the response's advantage. How often does a response of 40 tokens push?
    2. A sum over a response's tokens is its length times its advantage. The mean of that over the group is a
       covariance.
    3. The direction is the same for every token of the context: what the sampler draws on average, minus π.

    - towards the trainer: the sign is reversed. A response that does better than its group pulls π towards what drew
      it, the sampler: the direction is μ − π.
    - no baseline: the rewards were not measured against the group's mean. That is what the group subtracts before
      anything is pushed; without it the drift would not vanish where all responses are equally long.
    - divided by the length: each response was divided by its length, so that it pushes once. The sum of the advantages
      is 0, and the drift's total with it. That is the objective with length norm.
    - divided by the standard deviation: these are GRPO's advantages. The direction is right; MiniRL does not divide by
      the standard deviation.
    - sum over the group: that is the sum over the group's responses. The loss has their mean.
    - divided by G minus 1: that is the covariance as it is estimated from a sample. The loss has a mean over the
      responses, the divisor is G.
    - difference of the logarithms: the direction is log μ − log π. The gradient is taken in the logits, and the mean
      of onehot(y) − π over what the sampler draws is a difference of probabilities.
    - only the first token: every response pushed once. It pushes at each of its tokens.

    Its sign is that of Cov(|y|, R), and a noisy μ is flatter than π: long losers sharpen, long winners flatten.
    """,
    observe=lambda answer: {
        f"the drift where {case}": answer(lengths.clone(), _GROUP.clone(), _D_PI.clone(), _D_MU.clone())
        for case, lengths in _GROUP_LENGTHS.items()
    },
    solution=_drift,
    mistakes={
        "towards the trainer": partial(_drift, direction=lambda pi, mu: pi - mu),
        "no baseline": partial(_drift, baseline=False),
        "divided by the length": partial(_drift, per_token=lambda lengths: 1 / lengths),
        "divided by the standard deviation": partial(_drift, std=True),
        "sum over the group": lambda *case: 4 * _drift(*case),
        "divided by G minus 1": lambda *case: 4 / 3 * _drift(*case),
        "difference of the logarithms": partial(_drift, direction=lambda pi, mu: mu.log() - pi.log()),
        "only the first token": lambda lengths, rewards, pi, mu: rewards.mean() * (mu - pi),
    },
)


_RUNS = {
    "a long wrong answer, no weight": (3, 96, False, False),
    "equal lengths, no weight": (96, 96, False, False),
    "a long right answer, no weight": (96, 3, False, False),
    "a long wrong answer, the weight": (3, 96, True, False),
    "a long right answer, the weight": (96, 3, True, False),
    "a long wrong answer, no weight, divided by the length": (3, 96, False, True),
}
_ENTROPIES = ("falls", "rises", "neither")


def _observe_entropy(answer: Callable[[int, int, bool, bool], str]) -> Observations:
    given = {f"the entropy with {run}": str(answer(*case)).strip().lower() for run, case in _RUNS.items()}
    if wrong := [entropy for entropy in given.values() if entropy not in _ENTROPIES]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(_ENTROPIES)}")
    return given


def _entropy(right: int, wrong: int, weight: bool, divided: bool) -> str:
    if weight or divided or right == wrong:
        return "neither"
    return "falls" if wrong > right else "rises"


EX8 = exercise(
    """03.8 What happens to the entropy? (difficulty 2, importance 5, 6 minutes)

    1. Which sign does Cov(|y|, R) have if wrong responses are longer?
    2. A noisy engine is flatter than π. Pushed away from it, π gets sharper; pulled towards it, flatter.
    3. Two things make the total 0 whatever the lengths are. Which?

    - sign reversed: falling and rising are exchanged. Long losers push π away from the engine, and the engine is the
      flatter one: π gets sharper.
    - the missing weight alone: without the weight you let the entropy fall everywhere. Leaving out the weight lets
      a drift in, and the drift's sign depends on the lengths. Where all are alike, nothing happens.
    - weight overlooked: with the weight there is no drift: what is drawn by μ and weighted by π/μ is an expectation
      under π, and the mean of onehot(y) − π under π is 0.
    - division overlooked: divided by its length a response pushes once in total, by its advantage, and advantages add
      up to 0.
    - never rises: where right responses are longer the sign turns: π is pulled towards the flatter engine.

    Predict the sign from the lengths before you run anything; then see whether the signal is stronger.
    """,
    observe=_observe_entropy,
    solution=_entropy,
    mistakes={
        "sign reversed": lambda right, wrong, weight, divided: _entropy(wrong, right, weight, divided),
        "the missing weight alone": lambda right, wrong, weight, divided: "neither" if weight else "falls",
        "weight overlooked": lambda right, wrong, weight, divided: _entropy(right, wrong, False, divided),
        "division overlooked": lambda right, wrong, weight, divided: _entropy(right, wrong, weight, False),
        "never rises": lambda *case: {"rises": "neither"}.get(_entropy(*case), _entropy(*case)),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7, EX8)
