"""Exercises of unit 01: a reward for the whole response, and the exact gradient of its average."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations
from minirl_edu.exact import TabularPolicy

# ------------------------------------------------------------------- 01.1 the log-probability of a whole response

_LOGITS = torch.tensor(
    [
        [[1.0, 0.0, -1.0], [0.5, 0.2, 2.0], [0.3, -0.7, 1.1]],
        [[-0.4, 0.9, 0.1], [2.0, -1.0, 0.4], [0.8, 0.6, -0.2]],
        [[0.2, 0.1, 1.5], [-0.3, 1.2, 0.7], [0.9, -1.1, 0.0]],
    ]
)
_TOKENS = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 0]])
_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)


def _observe_sequence_logp(answer: Callable[..., Tensor]) -> Observations:
    forbidden = _LOGITS.clone()
    forbidden[2, 1, 0] = -torch.inf  # after the end of the third response
    return {
        "the log-probability of three responses of 3, 2 and 1 tokens": answer(_LOGITS, _TOKENS, _MASK),
        "the same, where a token after the end is impossible": answer(forbidden, _TOKENS, _MASK),
    }


def _token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _sequence_logp(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, _token_logp(logits, tokens), 0.0).sum(1)


def _shifted(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, 1:], _token_logp(logits[:, :-1], tokens[:, 1:]), 0.0).sum(1)


SEQUENCE_LOGP = Exercise(
    id="01.1",
    title="How probable is the whole essay?",
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "The log of a product is a sum of logs: one term for each token that was written.",
        "`logits.log_softmax(-1)` gives all words' log-probabilities; `gather` picks the word that was drawn.",
        "Leave the tokens after the end out by choosing, `torch.where(mask, …, 0.0)`, not by multiplying.",
    ),
    observe=_observe_sequence_logp,
    solution=_sequence_logp,
    mistakes=(
        Mistake(
            "mean over tokens",
            lambda logits, tokens, mask: _sequence_logp(logits, tokens, mask) / mask.sum(1),
            "you divided by the length. That is the log of a geometric mean; the probability of the whole response "
            "is the product of all its factors.",
        ),
        Mistake(
            "padding counted",
            lambda logits, tokens, mask: _token_logp(logits, tokens).sum(1),
            "a token after the end is counted. Nobody wrote it: short responses would look less probable than they "
            "are, by as much as the batch is padded.",
        ),
        Mistake(
            "raw logits",
            lambda logits, tokens, mask: torch.where(mask, logits.gather(-1, tokens[..., None])[..., 0], 0.0).sum(1),
            "these are sums of logits. A logit becomes a log-probability only after the log of the normaliser, "
            "Σ_w exp(logit of w), is taken off.",
        ),
        Mistake(
            "sum of probabilities",
            lambda logits, tokens, mask: torch.where(mask, _token_logp(logits, tokens).exp(), 0.0).sum(1),
            "you added probabilities. They multiply; it is their logs that add.",
        ),
        Mistake(
            "multiplied by the mask",
            lambda logits, tokens, mask: (_token_logp(logits, tokens) * mask).sum(1),
            "right as long as everything after the end is finite. There −∞ · 0 is NaN, and one NaN ruins the "
            "gradient of the whole batch: choose with the mask, do not multiply by it.",
        ),
        Mistake(
            "shifted by one",
            _shifted,
            "you moved the tokens by one place. With whole sequences that is right, row t of the logits predicts "
            "token t + 1 there. Here row t already is the distribution that token t was drawn from.",
        ),
    ),
    praise="One number for the whole response, and still a sum over tokens: the rest of the course lives on that.",
)

# --------------------------------------------------------------------------- 01.2 the exact gradient, without autograd

_POLICY = TabularPolicy.random(3, 3, seed=4)
_REWARDS = torch.rand(len(_POLICY.tokens), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _observe_exact_gradient(answer: Callable[..., Tensor]) -> Observations:
    ones = torch.ones_like(_REWARDS)
    return {
        "the gradient of E[R] with respect to the logits": answer(_POLICY, _REWARDS),
        "the gradient where every response has reward 1": answer(_POLICY, ones),
    }


def _by_coefficient(coefficient: Callable[[TabularPolicy, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Σ_y Σ_t coefficient · ∇log π(y_t|y_<t) for a coefficient [B, T] (or [B, 1]) of policy and rewards."""
    return lambda pi, rewards: pi.score_sum(coefficient(pi, rewards).expand(pi.mask.shape))


def _onehot_only(pi: TabularPolicy, rewards: Tensor) -> Tensor:
    weight = (pi.response_probs() * rewards)[:, None].expand(pi.mask.shape)
    drawn = torch.zeros_like(pi.logits)
    return drawn.index_put((pi.prefix, pi.tokens), torch.where(pi.mask, weight, 0.0), accumulate=True)


def _last_token_only(pi: TabularPolicy, rewards: Tensor) -> Tensor:
    last = torch.arange(pi.max_length) == pi.mask.sum(1, keepdim=True) - 1
    return pi.score_sum((pi.response_probs() * rewards)[:, None] * last)


EXACT_GRADIENT = Exercise(
    id="01.2",
    title="The exact gradient, term by term",
    difficulty=3,
    importance=5,
    minutes=20,
    hints=(
        "Two loops: over all responses y, and over the tokens of y. What does one pair (y, t) add, and to which row?",
        "It adds π(y) · R(y) · ∇log π(y_t | y_<t), and only to the row of logits that token t was drawn from, "
        "`pi.prefix[y, t]`.",
        "With respect to that row, ∇log softmax(row)[y_t] = onehot(y_t) − softmax(row).",
    ),
    observe=_observe_exact_gradient,
    solution=_by_coefficient(lambda pi, rewards: (pi.response_probs() * rewards)[:, None]),
    mistakes=(
        Mistake(
            "every response alike",
            _by_coefficient(lambda pi, rewards: rewards[:, None]),
            "every response counts the same. An expectation weights each response by its probability π(y); when you "
            "sample, the sampling does that for you, in a full enumeration nobody does.",
        ),
        Mistake(
            "only the one-hot",
            _onehot_only,
            "the drawn word is pushed up, but nothing is pulled down. The logits of a row share one normaliser: "
            "∇log π has a second term, and each row of the gradient must add up to zero.",
        ),
        Mistake(
            "only the last token",
            _last_token_only,
            "only the last token of each response gets a gradient. The reward comes at the end, but the judge scored "
            "the whole essay: every token is a factor of π(y).",
        ),
        Mistake(
            "the token's own probability",
            _by_coefficient(lambda pi, rewards: pi.log_probs().exp() * rewards[:, None]),
            "the weight of a term is the probability of its token. It should be that of the whole response, which is "
            "what is drawn and scored.",
        ),
        Mistake(
            "mean over tokens",
            _by_coefficient(lambda pi, rewards: (pi.response_probs() * rewards / pi.mask.sum(1))[:, None]),
            "you divided by the length of the response. The log of a product is a sum over its factors, not a mean: "
            "this is the gradient of something else, in which long responses count less.",
        ),
        Mistake(
            "the sign of a loss",
            _by_coefficient(lambda pi, rewards: -(pi.response_probs() * rewards)[:, None]),
            "this points downhill. The gradient of the expected reward was asked, not that of a loss.",
        ),
    ),
    rtol=1e-6,
    atol=1e-9,
    praise="With equal rewards your gradient is zero everywhere. That is why a baseline will cost nothing.",
)

# ------------------------------------------------------------------------- 01.3 the importance weight of a response

_LOGP = torch.tensor([[-0.2, -1.0, -0.5], [-0.7, -0.1, -2.0], [-1.2, -0.3, -0.9]])
_LOGP_ROLLOUT = torch.tensor([[-0.5, -0.8, -0.6], [-0.4, -0.3, -1.0], [-1.0, -2.0, -0.1]])
_WEIGHT_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)


def _observe_sequence_weight(answer: Callable[..., Tensor]) -> Observations:
    return {"the weights of three responses of 3, 2 and 1 tokens": answer(_LOGP, _LOGP_ROLLOUT, _WEIGHT_MASK)}


def _log_ratio(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logp - logp_rollout, 0.0)


def _sequence_weight(logp: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return _log_ratio(logp, logp_rollout, mask).sum(1).exp()


SEQUENCE_WEIGHT = Exercise(
    id="01.3",
    title="The importance weight of a response",
    difficulty=2,
    importance=5,
    minutes=8,
    hints=(
        "It is π(y)/μ_old(y): the probability of the whole response under the one, divided by that under the other.",
        "A ratio of products is a product of ratios; with logs, the exponential of a sum of differences.",
        "Tokens after the end are factors of 1, so differences of 0.",
    ),
    observe=_observe_sequence_weight,
    solution=_sequence_weight,
    mistakes=(
        Mistake(
            "mean of the logs",
            lambda a, b, mask: (_log_ratio(a, b, mask).sum(1) / mask.sum(1)).exp(),
            "you took the mean of the log-ratios. That is the geometric mean of the token ratios (GSPO uses it, on "
            "purpose); it is tame, but weighting with it no longer turns an average under μ_old into one under π.",
        ),
        Mistake(
            "upside down",
            lambda a, b, mask: _sequence_weight(b, a, mask),
            "this is μ_old/π. The policy that sampled stands in the denominator: what it draws too often counts less.",
        ),
        Mistake(
            "padding counted",
            lambda a, b, mask: (a - b).sum(1).exp(),
            "tokens after the end are factors of your weight. They were never drawn.",
        ),
        Mistake(
            "sum of ratios",
            lambda a, b, mask: torch.where(mask, (a - b).exp(), 0.0).sum(1),
            "you added the ratios of the tokens. Probabilities of a sequence multiply. (The sum will have its day in "
            "the next lesson, as an approximation.)",
        ),
        Mistake(
            "log of the weight",
            lambda a, b, mask: _log_ratio(a, b, mask).sum(1),
            "this is the log of the weight; on policy it is 0, and a weight must be 1 there.",
        ),
        Mistake(
            "zeros in the product",
            lambda a, b, mask: ((a - b).exp() * mask).prod(1),
            "every response shorter than the batch has weight 0: masked ratios were set to 0 and then multiplied. "
            "The neutral element of a product is 1.",
        ),
    ),
    praise="A sum of logs, one exponential at the end.",
)

# ------------------------------------------------------------------------------------------- 01.4 the group's mean

_GROUP_REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.9, 0.2, 0.7, 0.7])


def _observe_advantages(answer: Callable[..., Tensor]) -> Observations:
    return {
        "the advantages of three prompts with three responses each": answer(_GROUP_REWARDS, 3),
        "those of one prompt with four responses": answer(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4),
    }


def _advantages(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def _divided_by_std(correction: int) -> Callable[[Tensor, int], Tensor]:
    def answer(rewards: Tensor, group_size: int) -> Tensor:
        std = rewards.view(-1, group_size).std(1, correction=correction).repeat_interleave(group_size)
        return _advantages(rewards, group_size) / (std + 1e-6)

    return answer


def _interleaved(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(group_size, -1)
    return (groups - groups.mean(0, keepdim=True)).flatten()


ADVANTAGES = Exercise(
    id="01.4",
    title="Better than my usual answer",
    difficulty=1,
    importance=5,
    minutes=5,
    hints=(
        "The first G rewards belong to the first prompt, the next G to the second, and so on.",
        "`rewards.view(-1, group_size)` has one prompt in each row.",
    ),
    observe=_observe_advantages,
    solution=_advantages,
    mistakes=(
        Mistake(
            "mean over the batch",
            lambda rewards, group_size: rewards - rewards.mean(),
            "you subtracted the mean over all prompts. An easy prompt then teaches that everything was good, a hard "
            "one that everything was bad, instead of which answer was better.",
        ),
        Mistake(
            "divided by the standard deviation",
            _divided_by_std(0),
            "you divided by the group's standard deviation. GRPO does; MiniRL does not. It weights prompts by how "
            "unanimous their answers are, which E[R] does not ask for.",
        ),
        Mistake(
            "divided by torch.std",
            _divided_by_std(1),
            "you divided by the group's standard deviation, and with `torch.std` by the one with divisor G − 1. "
            "MiniRL subtracts the mean and stops there.",
        ),
        Mistake(
            "interleaved",
            _interleaved,
            "responses of different prompts were put into one group: the rewards lie prompt after prompt, G in a row.",
        ),
        Mistake(
            "leave one out",
            lambda rewards, group_size: _advantages(rewards, group_size) * group_size / (group_size - 1),
            "each reward was compared with the mean of the *others*. That is an honest baseline (and unbiased); the "
            "paper takes the mean of all G, the response's own included. The two differ by the factor G/(G − 1).",
        ),
        Mistake(
            "no baseline",
            lambda rewards, group_size: rewards.clone(),
            "nothing was subtracted. Unbiased as well, but with rewards of 0 and 1 no answer is ever made less "
            "probable directly, and the noise is larger.",
        ),
    ),
    praise="In every group they add up to zero.",
)

# ------------------------------------------------------------------------------------- 01.5 the least noisy baseline

_PROBS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
_FOUR_REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
# Any scores with mean zero under _PROBS, as those of a policy have.
_SCORES = torch.tensor([[0.4, 0.1], [-1.0, 0.75], [0.5, -1.5], [-1.0, 1.0]], dtype=torch.float64)


def _observe_best_baseline(answer: Callable[..., Any]) -> Observations:
    return {
        "the baseline for four responses": answer(_PROBS, _FOUR_REWARDS, _SCORES),
        "the baseline when every reward is 0.3 higher": answer(_PROBS, _FOUR_REWARDS + 0.3, _SCORES),
    }


def _best_baseline(probs: Tensor, rewards: Tensor, scores: Tensor) -> Tensor:
    size = probs * scores.square().sum(1)
    return (size * rewards).sum() / size.sum()


def _unsquared(probs: Tensor, rewards: Tensor, scores: Tensor) -> Tensor:
    size = probs * scores.norm(dim=1)
    return (size * rewards).sum() / size.sum()


BEST_BASELINE = Exercise(
    id="01.5",
    title="The baseline with the least noise",
    difficulty=4,
    importance=3,
    minutes=20,
    hints=(
        "The mean of (R − b)·s does not depend on b. So only its second moment does: E[(R − b)² |s|²].",
        "That is a parabola in b. Where is its derivative zero?",
        "−2 E[(R − b) |s|²] = 0. Solve for b: a mean of R in which each response has a second weight.",
    ),
    observe=_observe_best_baseline,
    solution=_best_baseline,
    mistakes=(
        Mistake(
            "the mean reward",
            lambda probs, rewards, scores: (probs * rewards).sum(),
            "this is the mean reward: nearly as good, and what everyone uses. The minimum is elsewhere, because "
            "responses with a large score |s| contribute more noise and have more say.",
        ),
        Mistake(
            "every response alike",
            lambda probs, rewards, scores: _best_baseline(torch.ones_like(probs), rewards, scores),
            "the probabilities are missing: noise is an expectation too, and a frequent response counts more in it.",
        ),
        Mistake(
            "norm, not its square",
            _unsquared,
            "you weighted with |s|. The noise is a second moment, so it is |s|² that multiplies (R − b)².",
        ),
        Mistake(
            "scores without probabilities or squares",
            lambda probs, rewards, scores: rewards.mean(),
            "a plain mean of the four rewards uses neither how probable a response is nor how large its score is.",
        ),
        Mistake(
            "probabilities squared",
            lambda probs, rewards, scores: _best_baseline(probs**2, rewards, scores),
            "the probabilities come in twice. Inside the expectation stands (R − b)² |s|²; only the outside has π(y).",
        ),
    ),
    praise="It moves with the rewards: add 0.3 to all of them and the best baseline is 0.3 higher.",
)

# ---------------------------------------------------------------------------------- 01.6 how long may a response be?


def _observe_length(answer: Callable[[float], Any]) -> Observations:
    return {
        f"the length for E[ρ²] = {moment}": torch.as_tensor(answer(moment)).double() for moment in (1.02, 1.07, 1.5)
    }


def _smallest_above_ten(growth: float) -> int:
    """The smallest T with growth^T > 10."""
    return math.floor(math.log(10) / math.log(growth)) + 1


LENGTH = Exercise(
    id="01.6",
    title="How long may a response be?",
    difficulty=2,
    importance=4,
    minutes=8,
    hints=(
        "The effective sample size, as a fraction, is 1/E[w²], and for independent tokens E[w²] multiplies.",
        "You need the smallest whole T with E[ρ²]^T > 10. Take logs, or count up in a loop.",
    ),
    observe=_observe_length,
    solution=lambda moment: _smallest_above_ten(moment),
    mistakes=(
        Mistake(
            "linear",
            lambda moment: math.floor(9 / (moment - 1)) + 1,
            "you let E[w²] grow by the same amount with each token, 1 + χ²·T. It grows by the same *factor*: compound "
            "interest.",
        ),
        Mistake(
            "one token short",
            lambda moment: _smallest_above_ten(moment) - 1,
            "at this length a little more than a tenth is left. Asked is the first one at which it is less.",
        ),
        Mistake(
            "squared twice",
            lambda moment: _smallest_above_ten(moment**2),
            "E[ρ²] already is the mean of the squared ratio; it need not be squared again.",
        ),
        Mistake(
            "base 2",
            lambda moment: math.floor(math.log2(10) / (moment - 1)) + 1,
            "a logarithm to base 2 on one side and none on the other: divide the log of 10 by the log of E[ρ²], to "
            "one and the same base.",
        ),
        Mistake(
            "linear loss",
            lambda moment: math.floor(0.9 / (moment - 1)) + 1,
            "you took the same share of the *original* off for each token, 1 − χ²·T. Each token takes its share of "
            "what is left.",
        ),
        Mistake(
            "log of the factor replaced by χ²",
            lambda moment: math.floor(math.log(10) / (moment - 1)) + 1,
            "log(1 + χ²) ≈ χ² is close when χ² is tiny, and already off by a token or more here.",
        ),
    ),
    rtol=0.0,
    atol=1e-9,
    praise="A distance no one would notice in a plot, and about a hundred tokens. The paper's responses have up to "
    "32,768.",
)

# --------------------------------------------------------------------------- 01.7 a loss with the right gradient

_ADVANTAGES = torch.tensor([0.6, -0.4, -0.2])


def _observe_loss(answer: Callable[..., Tensor]) -> Observations:
    logp = _LOGP.clone().requires_grad_()
    loss = answer(logp, _LOGP_ROLLOUT, _ADVANTAGES, _WEIGHT_MASK)
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"the gradient of the loss with respect to logp": gradient}


def _loss(coefficient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """−(1/B) Σ_b Σ_t coefficient · log π over the mask, for a coefficient [B, T] or [B, 1]."""

    def answer(logp: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        factor = coefficient(logp, logp_rollout, advantages, mask)
        return -torch.where(mask, factor * logp, 0.0).sum() / len(logp)

    return answer


def _weighted(logp: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return (_sequence_weight(logp, logp_rollout, mask) * advantages)[:, None]


LOSS = Exercise(
    id="01.7",
    title="A loss with the right gradient",
    difficulty=3,
    importance=5,
    minutes=15,
    hints=(
        "Write down the gradient you want first: (2), as a mean over the responses in the batch.",
        "A factor that should stand in front of ∇log π, and not be differentiated itself, is a number: `.detach()`.",
        "An optimiser minimises. The reward is to grow.",
    ),
    observe=_observe_loss,
    solution=_loss(lambda *inputs: _weighted(*inputs).detach()),
    mistakes=(
        Mistake(
            "weight not detached",
            _loss(_weighted),
            "gradient flows through the weight as well. The product rule then adds w·Â·(log π)·∇log π, as if log π "
            "itself were a reward. The weight says how often to count a response; it is a number.",
        ),
        Mistake(
            "the sign",
            lambda *inputs: -_loss(lambda *x: _weighted(*x).detach())(*inputs),
            "minimising this makes good answers less probable. A loss is the objective with a minus.",
        ),
        Mistake(
            "divided by length",
            _loss(lambda *inputs: _weighted(*inputs).detach() / inputs[3].sum(1, keepdim=True)),
            "each response was divided by its length. (2) has a sum over tokens: log π(y) is a sum of logs.",
        ),
        Mistake(
            "mean over tokens of the batch",
            lambda *inputs: _loss(lambda *x: _weighted(*x).detach())(*inputs) * len(inputs[0]) / inputs[3].sum(),
            "you divided by the number of tokens in the batch. The expectation in (2) is over *responses*: a mean "
            "over B, with a sum over the tokens inside.",
        ),
        Mistake(
            "no weight",
            _loss(lambda logp, logp_rollout, advantages, mask: advantages[:, None]),
            "the importance weight is missing. The responses were drawn by μ_old; without the weight this is an "
            "average over the wrong distribution.",
        ),
        Mistake(
            "a weight for each token",
            _loss(lambda a, b, advantages, mask: (a - b).exp().detach() * advantages[:, None]),
            "each token carries its own ratio. That is the token objective, the subject of the next lesson; (2) gives "
            "every token the weight of its whole response.",
        ),
        Mistake(
            "padding in the weight",
            _loss(lambda a, b, advantages, mask: ((a - b).sum(1).exp() * advantages)[:, None].detach()),
            "the weight includes ratios of tokens after the end.",
        ),
    ),
    praise="Only its gradient was looked at. Its value may be anything.",
)

EXERCISES = (SEQUENCE_LOGP, EXACT_GRADIENT, SEQUENCE_WEIGHT, ADVANTAGES, BEST_BASELINE, LENGTH, LOSS)
