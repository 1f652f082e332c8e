"""Exercises of unit 01: a reward for the whole response, and the exact gradient of its average."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages, leave_one_out_advantages
from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import (
    LOGP,
    LOGP_ROLLOUT,
    MASK,
    batch_advantages,
    gradient_of_loss,
    interleaved_advantages,
    log_ratio,
    masked_sum,
    policy_loss,
    token_logp,
    torch_std_advantages,
)
from minirl_edu.exact import TabularPolicy

_LOGITS = torch.tensor(
    [
        [[1.0, 0.0, -1.0], [0.5, 0.2, 2.0], [0.3, -0.7, 1.1]],
        [[-0.4, 0.9, 0.1], [2.0, -1.0, 0.4], [0.8, 0.6, -0.2]],
        [[0.2, 0.1, 1.5], [-0.3, 1.2, 0.7], [0.9, -1.1, 0.0]],
    ]
)
_TOKENS = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 0]])


def _observe_sequence_logp(answer: Answer) -> Observations:
    forbidden = _LOGITS.clone()
    forbidden[2, 1, 0] = -torch.inf  # after the end of the third response
    return {
        "the log-probability of three responses of 3, 2 and 1 tokens": answer(_LOGITS, _TOKENS, MASK),
        "the same, where a token after the end is impossible": answer(forbidden, _TOKENS, MASK),
    }


def _sequence_logp(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(token_logp(logits, tokens), mask)


EX1 = exercise(
    """01.1 How probable is the whole essay? (difficulty 2, importance 5, 10 minutes)

    1. The log of a product is a sum of logs: one term for each token that was written.
    2. `logits.log_softmax(-1)` gives all words' log-probabilities; `gather` picks the word that was drawn.
    3. Leave the tokens after the end out by choosing, `torch.where(mask, …, 0.0)`, not by multiplying.

    - mean over tokens: you divided by the length. That is the log of a geometric mean; the probability of the whole
      response is the product of all its factors.
    - padding counted: a token after the end is counted. Nobody wrote that token. Short responses then look less
      probable than they are.
    - raw logits: these are sums of logits. A logit becomes a log-probability only after the log of the normaliser, Σ_w
      exp(logit of w), is taken off.
    - sum of probabilities: you added probabilities. Probabilities multiply; their logs add.
    - multiplied by the mask: your answer is right only if everything after the end is finite. −∞ · 0 is NaN, and one
      NaN ruins the gradient of the whole batch. Choose with the mask, do not multiply by it.
    - shifted by one: you moved the tokens by one place. With whole sequences that is right, row t of the logits
      predicts token t + 1 there. Here row t already is the distribution that token t was drawn from.

    The result is one number for the whole response, and still a sum over tokens.
    """,
    observe=_observe_sequence_logp,
    solution=_sequence_logp,
    mistakes={
        "mean over tokens": lambda logits, tokens, mask: _sequence_logp(logits, tokens, mask) / mask.sum(1),
        "padding counted": lambda logits, tokens, mask: token_logp(logits, tokens).sum(1),
        "raw logits": lambda logits, tokens, mask: masked_sum(logits.gather(-1, tokens[..., None])[..., 0], mask),
        "sum of probabilities": lambda logits, tokens, mask: masked_sum(token_logp(logits, tokens).exp(), mask),
        "multiplied by the mask": lambda logits, tokens, mask: (token_logp(logits, tokens) * mask).sum(1),
        "shifted by one": lambda logits, tokens, mask: _sequence_logp(logits[:, :-1], tokens[:, 1:], mask[:, 1:]),
    },
)


_POLICY = TabularPolicy.random(3, 3, seed=4)
_REWARDS = torch.rand(len(_POLICY.tokens), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _by_coefficient(coefficient: Callable[[TabularPolicy, Tensor], Tensor]) -> Answer:
    """Σ_y Σ_t coefficient · ∇log π(y_t|y_<t) for a coefficient [B, T] (or [B, 1]) of policy and rewards."""
    return lambda pi, rewards: pi.score_sum(coefficient(pi, rewards).expand(pi.mask.shape))


def _expected(pi: TabularPolicy, rewards: Tensor) -> Tensor:
    """π(y) · R(y), the coefficient that is right for every token of y."""
    return (pi.response_probs() * rewards)[:, None]


def _onehot_only(pi: TabularPolicy, rewards: Tensor) -> Tensor:
    weight = torch.where(pi.mask, _expected(pi, rewards), 0.0)
    return torch.zeros_like(pi.logits).index_put((pi.prefix, pi.tokens), weight, accumulate=True)


def _is_last(pi: TabularPolicy) -> Tensor:
    return torch.arange(pi.max_length) == pi.mask.sum(1, keepdim=True) - 1


EX2 = exercise(
    """01.2 The exact gradient, term by term (difficulty 3, importance 5, 20 minutes)

    1. Two loops: over all responses y, and over the tokens of y. What does one pair (y, t) add, and to which row?
    2. It adds π(y) · R(y) · ∇log π(y_t | y_<t), and only to the row of logits that token t was drawn from,
       `pi.prefix[y, t]`.
    3. With respect to that row, ∇log softmax(row)[y_t] = onehot(y_t) − softmax(row).

    - every response alike: every response counts the same. An expectation weights each response by its probability
      π(y). Sampling does that for you; in a full enumeration you have to do it.
    - only the one-hot: the drawn word is pushed up, but nothing is pulled down. The logits of a row share one
      normaliser: ∇log π has a second term, and each row of the gradient must add up to zero.
    - only the last token: only the last token of each response gets a gradient. The reward comes at the end, but the
      judge scored the whole essay: every token is a factor of π(y).
    - the token's own probability: the weight of a term is the probability of its token. The weight should be the
      probability of the whole response, because whole responses are drawn and scored.
    - mean over tokens: you divided by the length of the response. The log of a product is a sum over its factors, not a
      mean. Yours is the gradient of another objective, in which long responses count less.
    - the sign of a loss: this points downhill. The exercise asks for the gradient of the expected reward, not for that
      of a loss.

    With equal rewards your gradient is zero everywhere. That is why a baseline will cost nothing.
    """,
    observe=lambda answer: {
        "the gradient of E[R] with respect to the logits": answer(_POLICY, _REWARDS),
        "the gradient where every response has reward 1": answer(_POLICY, torch.ones_like(_REWARDS)),
    },
    solution=_by_coefficient(_expected),
    mistakes={
        "every response alike": _by_coefficient(lambda pi, rewards: rewards[:, None]),
        "only the one-hot": _onehot_only,
        "only the last token": _by_coefficient(lambda pi, rewards: _expected(pi, rewards) * _is_last(pi)),
        "the token's own probability": _by_coefficient(lambda pi, rewards: pi.log_probs().exp() * rewards[:, None]),
        "mean over tokens": _by_coefficient(lambda pi, rewards: _expected(pi, rewards) / pi.mask.sum(1, keepdim=True)),
        "the sign of a loss": _by_coefficient(lambda pi, rewards: -_expected(pi, rewards)),
    },
    rtol=1e-6,
    atol=1e-9,
)


def _weight(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return log_ratio(logp, logp_rollout, mask).sum(1).exp()


EX3 = exercise(
    """01.3 The importance weight of a response (difficulty 2, importance 5, 8 minutes)

    1. The weight is π(y)/μ_old(y): the probability of the whole response under one policy, divided by that under the
       other.
    2. A ratio of products is a product of ratios; with logs, the exponential of a sum of differences.
    3. Tokens after the end are factors of 1, so differences of 0.

    - mean of the logs: you took the mean of the log-ratios. That is the geometric mean of the token ratios, which GSPO
      uses on purpose. Weighting with it does not turn an average under μ_old into one under π.
    - upside down: this is μ_old/π. The policy that sampled stands in the denominator: what it draws too often counts
      less.
    - padding counted: tokens after the end are factors of your weight. They were never drawn.
    - sum of ratios: you added the ratios of the tokens. Probabilities of a sequence multiply. (The next lesson uses the
      sum, as an approximation.)
    - log of the weight: this is the log of the weight; on policy it is 0, and a weight must be 1 there.
    - zeros in the product: every response shorter than the batch has weight 0, because you set masked ratios to 0 and
      multiplied them. A token that is not there has ratio 1.

    Sum the logs, and take one exponential at the end.
    """,
    observe=lambda answer: {
        "the weights of three responses of 3, 2 and 1 tokens": answer(LOGP, LOGP_ROLLOUT, MASK),
    },
    solution=_weight,
    mistakes={
        "mean of the logs": lambda a, b, mask: (log_ratio(a, b, mask).sum(1) / mask.sum(1)).exp(),
        "upside down": lambda a, b, mask: _weight(b, a, mask),
        "padding counted": lambda a, b, mask: (a - b).sum(1).exp(),
        "sum of ratios": lambda a, b, mask: masked_sum((a - b).exp(), mask),
        "log of the weight": lambda a, b, mask: log_ratio(a, b, mask).sum(1),
        "zeros in the product": lambda a, b, mask: ((a - b).exp() * mask).prod(1),
    },
)


_GROUP_REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.9, 0.2, 0.7, 0.7])

EX4 = exercise(
    """01.4 Better than my usual answer (difficulty 1, importance 5, 5 minutes)

    1. The first G rewards belong to the first prompt, the next G to the second, and so on.
    2. `rewards.view(-1, group_size)` has one prompt in each row.

    - mean over the batch: you subtracted the mean over all prompts. Then an easy prompt teaches that everything was
      good and a hard one that everything was bad, but not which answer was better.
    - divided by the standard deviation: you divided by the group's standard deviation. GRPO does; MiniRL does not. The
      division weights prompts by how unanimous their answers are, which E[R] does not ask for.
    - divided by torch.std: you divided by the group's standard deviation, and with `torch.std` by the one with divisor
      G − 1. MiniRL subtracts the mean and stops there.
    - interleaved: responses of different prompts were put into one group: the rewards lie prompt after prompt, G in a
      row.
    - leave one out: you compared each reward with the mean of the *others*. That baseline is unbiased. The paper takes
      the mean of all G, the response's own included. The two differ by the factor G/(G − 1).
    - no baseline: you subtracted nothing. That is unbiased as well, but with rewards of 0 and 1 no answer is ever made
      less probable directly, and the noise is larger.

    In every group they add up to zero.
    """,
    observe=lambda answer: {
        "the advantages of three prompts with three responses each": answer(_GROUP_REWARDS, 3),
        "those of one prompt with four responses": answer(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4),
    },
    solution=group_mean_advantages,
    mistakes={
        "mean over the batch": batch_advantages,
        "divided by the standard deviation": group_mean_std_advantages,
        "divided by torch.std": torch_std_advantages,
        "interleaved": interleaved_advantages,
        "leave one out": leave_one_out_advantages,
        "no baseline": lambda rewards, group_size: rewards.clone(),
    },
)


_PROBS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
_FOUR_REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
# Any scores with mean zero under _PROBS, as those of a policy have.
_SCORES = torch.tensor([[0.4, 0.1], [-1.0, 0.75], [0.5, -1.5], [-1.0, 1.0]], dtype=torch.float64)


def _best_baseline(probs: Tensor, rewards: Tensor, scores: Tensor, *, power: int = 2) -> Tensor:
    size = probs * scores.norm(dim=1) ** power
    return (size * rewards).sum() / size.sum()


EX5 = exercise(
    """01.5 The baseline with the least noise (difficulty 4, importance 3, 20 minutes)

    1. The mean of (R − b)·s does not depend on b. So only its second moment does: E[(R − b)² |s|²].
    2. That is a parabola in b. Where is its derivative zero?
    3. −2 E[(R − b) |s|²] = 0. Solve for b: a mean of R in which each response has a second weight.

    - the mean reward: this is the mean reward, which is nearly as good and in common use. The minimum is elsewhere,
      because responses with a large score |s| contribute more noise.
    - every response alike: the probabilities are missing: noise is an expectation too, and a frequent response counts
      more in it.
    - norm, not its square: you weighted with |s|. The noise is a second moment, so it is |s|² that multiplies (R − b)².
    - scores without probabilities or squares: a plain mean of the four rewards ignores how probable a response is and
      how large its score is.
    - probabilities squared: the probabilities occur twice. The expectation of (R − b)² |s|² has one factor π(y).

    The best baseline moves with the rewards: add 0.3 to all of them and it is 0.3 higher.
    """,
    observe=lambda answer: {
        "the baseline for four responses": answer(_PROBS, _FOUR_REWARDS, _SCORES),
        "the baseline when every reward is 0.3 higher": answer(_PROBS, _FOUR_REWARDS + 0.3, _SCORES),
    },
    solution=_best_baseline,
    mistakes={
        "the mean reward": lambda probs, rewards, scores: (probs * rewards).sum(),
        "every response alike": lambda probs, rewards, scores: _best_baseline(probs**0, rewards, scores),
        "norm, not its square": lambda *case: _best_baseline(*case, power=1),
        "scores without probabilities or squares": lambda probs, rewards, scores: rewards.mean(),
        "probabilities squared": lambda probs, rewards, scores: _best_baseline(probs**2, rewards, scores),
    },
)


def _smallest_above_ten(growth: float) -> int:
    """The smallest T with growth^T > 10."""
    return math.floor(math.log(10) / math.log(growth)) + 1


EX6 = exercise(
    """01.6 How long may a response be? (difficulty 2, importance 4, 8 minutes)

    1. The effective sample size, as a fraction, is 1/E[w²], and for independent tokens E[w²] multiplies.
    2. You need the smallest whole T with E[ρ²]^T > 10. Take logs, or count up in a loop.

    - linear: you let E[w²] grow by the same amount with each token, 1 + χ²·T. It grows by the same *factor*: compound
      interest.
    - one token short: at this length a little more than a tenth is left. One more token and less is left.
    - squared twice: E[ρ²] already is the mean of the squared ratio; it need not be squared again.
    - base 2: you took a logarithm to base 2 on one side and none on the other. Divide the log of 10 by the log of
      E[ρ²], both to the same base.
    - linear loss: you took the same share of the *original* off for each token, 1 − χ²·T. Each token takes its share of
      what is left.
    - log of the factor replaced by χ²: log(1 + χ²) ≈ χ² is close when χ² is tiny, and already off by a token or more
      here.

    For E[ρ²] = 1.02 the answer is about a hundred tokens. The paper's responses have up to 32,768.
    """,
    observe=lambda answer: {
        f"the length for E[ρ²] = {moment}": torch.as_tensor(answer(moment)).double() for moment in (1.02, 1.07, 1.5)
    },
    solution=_smallest_above_ten,
    mistakes={
        "linear": lambda moment: math.floor(9 / (moment - 1)) + 1,
        "one token short": lambda moment: _smallest_above_ten(moment) - 1,
        "squared twice": lambda moment: _smallest_above_ten(moment**2),
        "base 2": lambda moment: math.floor(math.log2(10) / (moment - 1)) + 1,
        "linear loss": lambda moment: math.floor(0.9 / (moment - 1)) + 1,
        "log of the factor replaced by χ²": lambda moment: math.floor(math.log(10) / (moment - 1)) + 1,
    },
    rtol=0.0,
    atol=1e-9,
)


_ADVANTAGES = torch.tensor([0.6, -0.4, -0.2])
_loss = policy_loss(lambda a, b, mask: _weight(a, b, mask)[:, None].detach())

EX7 = exercise(
    """01.7 A loss with the right gradient (difficulty 3, importance 5, 15 minutes)

    1. Write down the gradient you want first: (2), as a mean over the responses in the batch.
    2. A factor that should stand in front of ∇log π, and not be differentiated itself, is a number: `.detach()`.
    3. An optimiser minimises. The reward is to grow.

    - weight not detached: gradient flows through the weight as well. The product rule then adds w·Â·(log π)·∇log π, as
      if log π itself were a reward. The weight says how often to count a response; it is a number.
    - the sign: minimising this makes good answers less probable. A loss is the objective with a minus.
    - divided by length: each response was divided by its length. (2) has a sum over tokens: log π(y) is a sum of logs.
    - mean over tokens of the batch: you divided by the number of tokens in the batch. The expectation in (2) is over
      *responses*: a mean over B, with a sum over the tokens inside.
    - no weight: the importance weight is missing. μ_old drew the responses; without the weight this is an average over
      the wrong distribution.
    - a weight for each token: each token carries its own ratio. That is the token objective, the subject of the next
      lesson; (2) gives every token the weight of its whole response.
    - padding in the weight: the weight includes ratios of tokens after the end.

    The check looks at the gradient alone. The value may be anything.
    """,
    observe=lambda answer: {"the gradient of the loss with respect to logp": gradient_of_loss(answer, _ADVANTAGES)},
    solution=_loss,
    mistakes={
        "weight not detached": policy_loss(lambda a, b, mask: _weight(a, b, mask)[:, None]),
        "the sign": lambda *case: -_loss(*case),
        "divided by length": policy_loss(lambda a, b, mask: (_weight(a, b, mask) / mask.sum(1))[:, None].detach()),
        "mean over tokens of the batch": lambda *case: _loss(*case) * len(case[0]) / case[3].sum(),
        "no weight": policy_loss(lambda a, b, mask: torch.ones_like(a)),
        "a weight for each token": policy_loss(lambda a, b, mask: (a - b).exp().detach()),
        "padding in the weight": policy_loss(lambda a, b, mask: (a - b).sum(1, keepdim=True).exp().detach()),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7)
