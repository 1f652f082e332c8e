"""Exercises of unit 08, MiniRL end to end: the global step, its metrics, and what counts as evidence."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import kl, masked_mean, responses, tokens
from minirl_edu.diagnostics import entropy_from_logits, kl_k1
from minirl_edu.objectives import minirl_loss


class ToyLoop:
    """A trainer and an engine whose weights are nothing but a version number, and a diary of who used which.

    `theta` is the trainer's version, `engine` the engine's; an update makes `theta` one larger.
    """

    def __init__(self, responses: int = 8) -> None:
        self.theta = self.engine = 0
        self.responses = responses
        self.sampled: list[int] = []
        self.updates: list[dict[str, Any]] = []
        self.syncs = 0

    def sample(self) -> list[str]:
        """Responses of the engine, of the weights that it holds now."""
        self.sampled.append(self.engine)
        return [f"y{i}" for i in range(self.responses)]

    def split(self, responses: Sequence[str], parts: int) -> list[list[str]]:
        """The responses in so many mini-batches of the same size."""
        size = len(responses) // parts
        return [list(responses[i * size : (i + 1) * size]) for i in range(parts)]

    def old_logprobs(self, mini_batch: Sequence[str]) -> tuple[tuple[str, ...], int]:
        """log π of the trainer as it is now; stands for a tensor [B, T]."""
        return tuple(mini_batch), self.theta

    def update(self, mini_batch: Sequence[str], logp_old: tuple[tuple[str, ...], int]) -> None:
        """One gradient step."""
        whose, version = logp_old
        fits = whose == tuple(mini_batch)
        self.updates.append({"of": tuple(mini_batch), "old": version, "engine": self.engine, "fits": fits})
        self.theta += 1

    def sync(self) -> None:
        """The engine takes the trainer's weights."""
        self.engine = self.theta
        self.syncs += 1


def _observe_step(answer: Answer) -> Observations:
    """Two global steps of N = 2, and one of N = 4 in which only the number of mini-batches differs."""
    two, four = ToyLoop(), ToyLoop()
    for _ in range(2):
        answer(two, 2)
    answer(four, 4)
    return {
        "the number of gradient steps after two global steps of N = 2": len(two.updates),
        "the version of the weights behind each rollout": torch.tensor(two.sampled),
        "the version of the weights behind each update's π_old": torch.tensor([u["old"] for u in two.updates]),
        "whether each π_old is that of the mini-batch it is used for": all(u["fits"] for u in two.updates),
        "the version in the engine after the global step": two.engine,
        "the number of syncs in a global step": four.syncs,
        "the responses that were trained on, in order": " ".join(y for update in four.updates for y in update["of"]),
    }


def _step(loop: ToyLoop, mini_batches: int, *, sync: str = "last") -> None:
    if sync == "first":
        loop.sync()
    parts = loop.split(loop.sample(), mini_batches)
    old = [loop.old_logprobs(part) for part in parts]
    for part, logp_old in zip(parts, old, strict=True):
        loop.update(part, logp_old)
        if sync == "each":
            loop.sync()
    if sync == "last":
        loop.sync()


def _old_of_the_moment(loop: ToyLoop, mini_batches: int) -> None:
    for part in loop.split(loop.sample(), mini_batches):
        loop.update(part, loop.old_logprobs(part))
    loop.sync()


def _first_again(loop: ToyLoop, mini_batches: int) -> None:
    part = loop.split(loop.sample(), mini_batches)[0]
    logp_old = loop.old_logprobs(part)
    for _ in range(mini_batches):
        loop.update(part, logp_old)
    loop.sync()


EX1 = exercise(
    """08.1 One global step, in order (difficulty 2, importance 5, 10 minutes)

    1. Four verbs: sample, split, old_logprobs, update; and one at the end.
    2. π_old is the policy of θ_old. After the first update the trainer no longer holds θ_old.
    3. Sample, split, the old log-probabilities of **all** mini-batches, then one update for each, then sync.

    - no sync: the engine still holds the weights of the first global step. Every later rollout is staler than the one
      before, and π_old/μ_old is no longer a discrepancy of engines but of policies.
    - π_old of the moment: π_old is computed right before each update, so in later mini-batches it is π_θ: the ratio r
      is 1 everywhere, the clip never acts, and staleness is counted as a discrepancy of the engines.
    - sync after each update: the engine gets weights that it never samples with. Only the final ones become the next
      θ_old; at scale, each sync moves the whole model.
    - sync at the start: the rollouts are right, but after the step the engine lags behind: an evaluation through it
      measures the weights of before.
    - one big update: all responses went into a single gradient step. That is on-policy with a larger batch, not N
      updates for one rollout.
    - the first mini-batch again: every update used the first mini-batch; the other responses were sampled for nothing,
      and one part was trained on N times.

    One rollout, one π_old, N updates, one sync.
    """,
    observe=_observe_step,
    solution=_step,
    mistakes={
        "no sync": partial(_step, sync="never"),
        "π_old of the moment": _old_of_the_moment,
        "sync after each update": partial(_step, sync="each"),
        "sync at the start": partial(_step, sync="first"),
        "one big update": lambda loop, mini_batches: _step(loop, 1),
        "the first mini-batch again": _first_again,
    },
)


def _rounded(weights: Tensor) -> Tensor:
    return torch.round(weights * 4) / 4


class ToyEngine:
    """An engine of one weight vector: it rounds what it is given to quarters, and it remembers its prompts.

    `answer(prompt)` is weights · prompt, kept in `cache` so that the same prompt costs nothing the second time.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = _rounded(weights)
        self.version = 0
        self.cache: dict[tuple[float, ...], float] = {}

    def answer(self, prompt: Tensor) -> float:
        """What a rollout gets to see."""
        key = tuple(prompt.tolist())
        if key not in self.cache:
            self.cache[key] = float(self.weights @ prompt)
        return self.cache[key]


def _observe_sync(answer: Answer) -> Observations:
    trainer = torch.tensor([1.0, -2.0, 0.5])
    engine = ToyEngine(trainer)
    seen, fresh = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 4.0])
    engine.answer(seen)  # a prompt of the first rollout, so it is in the cache
    trainer += torch.tensor([0.3, 0.6, -0.2])  # an update
    answer(engine, trainer, 1)
    after_sync = torch.tensor([engine.answer(seen), engine.answer(fresh)])
    trainer += 10.0  # the next update, before the next sync
    engine.cache.clear()
    return {
        "the engine's answer to a prompt that it had seen before": after_sync[0],
        "the engine's answer to a new prompt": after_sync[1],
        "the engine's version": engine.version,
        "the engine's answer after a further update of the trainer and no sync": engine.answer(seen),
        "the trainer's weights after it all": trainer.clone(),
    }


def _push(engine: ToyEngine, weights: Tensor, version: int, *, stored: Answer = _rounded, clear: bool = True) -> None:
    engine.weights, engine.version = stored(weights), version
    if clear:
        engine.cache.clear()


EX2 = exercise(
    """08.2 The sync, and what is forgotten in it (difficulty 3, importance 4, 12 minutes)

    1. Four things: the values, in the engine's precision; memory of its own; the cache; the version.
    2. If both sides hold the same tensor, the engine changes in the middle of the next update.
    3. A new rounded tensor (`torch.round(weights * 4) / 4` makes one), an empty cache, the version.

    - nothing: the engine still has the old weights: the sync is forgotten. Nothing raises; only the KL grows.
    - only the label: the version says new, the weights are old. A label is no check of the values.
    - an alias: the engine holds the trainer's own tensor. The next update changes the engine too, in the middle of a
      global step, and its weights are not rounded: there is no μ_old left.
    - not rounded: the weights arrive unrounded: the engine no longer computes in its own precision, and the
      training–inference discrepancy of the run is gone.
    - rounds the trainer: the rounding was done in place, on the trainer's own weights. Small updates are lost for good.
    - the cache survives: a prompt seen before is still answered from the cache of the old weights. Engines cache the
      keys and values of prompts: reset that at every sync.
    - no version: the version is that of before. Nobody can tell later which weights sampled a rollout.

    `HFEngine.sync` does the same, tensor by tensor, and keeps no cache between calls.
    """,
    observe=_observe_sync,
    solution=_push,
    mistakes={
        "nothing": lambda engine, weights, version: None,
        "only the label": lambda engine, weights, version: _push(engine, engine.weights, version),
        "an alias": partial(_push, stored=lambda weights: weights),
        "not rounded": partial(_push, stored=torch.clone),
        "rounds the trainer": partial(_push, stored=lambda weights: weights.mul_(4).round_().div_(4).clone()),
        "the cache survives": partial(_push, clear=False),
        "no version": lambda engine, weights, version: _push(engine, weights, engine.version),
    },
)


Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""logp, logp_old, logp_rollout, advantages, mask: the arguments of `minirl_loss`, in its order."""


def _micro_batches() -> list[Batch]:
    """Three parts of one mini-batch: of 3, 1 and 2 responses, of different widths, one response without a signal."""

    def part(logp: Any, old: Any, mu: Any, advantages: Any, lengths: Any) -> Batch:
        tensors = [torch.tensor(values) for values in (logp, old, mu)]
        mask = torch.arange(tensors[0].shape[1]) < torch.tensor(lengths)[:, None]
        return tensors[0].requires_grad_(), tensors[1], tensors[2], torch.tensor(advantages), mask

    return [
        part(
            [[-0.5, -1.0], [-0.2, -0.3], [-1.5, -0.7]],
            [[-0.6, -1.1], [-0.2, -0.3], [-1.2, -0.7]],
            [[-0.7, -0.9], [-0.3, -0.3], [-1.4, -0.6]],
            [0.5, 0.0, -0.5],
            [2, 1, 2],
        ),
        part([[-0.4, -0.6, -0.8, -0.1]], [[-0.5, -0.6, -0.8, -0.3]], [[-0.4, -3.0, -0.9, -0.2]], [0.75], [4]),
        part(
            [[-0.9, -0.2, -0.4], [-0.3, -2.0, -0.1]],
            [[-0.8, -0.2, -0.4], [-0.3, -1.2, -0.1]],
            [[-0.7, -0.3, -0.4], [-0.2, -1.1, -0.1]],
            [-0.25, -0.75],
            [1, 3],
        ),
    ]


def _observe_parts(answer: Answer) -> Observations:
    batches = _micro_batches()
    losses = torch.stack(list(answer(batches)))
    losses.sum().backward()
    # Keyed per part: a wrong divisor shows in the sum, a wrong sign or a wrong row in the gradient.
    gradients = {f"the gradient of micro-batch {i}": batch[0].grad for i, batch in enumerate(batches, start=1)}
    return {"the sum of the losses": losses.sum(), "the loss of each micro-batch": losses, **gradients}


def _losses(count: Callable[[Batch, Sequence[Batch]], int]) -> Callable[[Sequence[Batch]], list[Tensor]]:
    """The loss of each micro-batch with a count of it and of all as its divisor."""
    return lambda batches: [minirl_loss(*batch, num_responses=count(batch, batches)).loss for batch in batches]


EX3 = exercise(
    """08.3 Micro-batches that add up (difficulty 3, importance 5, 12 minutes)

    1. The loss of the mini-batch is one sum over all responses, divided once.
    2. What must the divisor be, so that the parts' losses can be added?
    3. `minirl_loss(*batch, num_responses=…)` with the number of responses in **all** of `batches`.

    - own count: each part is divided by its own number of responses. The sum is larger than the mini-batch's loss, and
      how much larger depends on how the batch was cut.
    - mean of means: a mean over each part, then a mean over parts: right only if all parts are equally large. Here a
      response that is alone in its part counts three times as much as one in the first part.
    - tokens: the divisor is the number of tokens. That is a length normalisation over the batch; MiniRL sums over
      tokens and takes the mean over responses.
    - only responses with a signal: responses whose advantage is 0 are not counted. They add nothing to the sum, but
      they are responses of the mini-batch: without them the step is larger whenever the model does well.
    - number of parts: the divisor is the number of micro-batches. How a batch is cut is a question of memory; the
      gradient must not depend on it.

    The same rule holds for ranks: unit 11.
    """,
    observe=_observe_parts,
    solution=_losses(lambda batch, batches: responses(*batches)),
    mistakes={
        "own count": _losses(lambda batch, batches: responses(batch)),
        "mean of means": _losses(lambda batch, batches: responses(batch) * len(batches)),
        "tokens": _losses(lambda batch, batches: tokens(*batches)),
        "only responses with a signal": _losses(lambda batch, batches: sum(int((b[3] != 0).sum()) for b in batches)),
        "number of parts": _losses(lambda batch, batches: len(batches)),
    },
)


_LOGITS = torch.tensor(
    [
        [[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 3.0, -2.0, 0.0]],
        [[4.0, -1.0, 0.0, 0.0], [0.3, -0.4, 0.1, 0.9], [-5.0, 0.0, 1.0, 2.0]],
    ]
)
_TOKENS = torch.tensor([[True, True, True], [True, False, False]])


def _entropy(logits: Tensor, mask: Tensor, temperature: float, *, over: str = "tokens") -> Tensor:
    return masked_mean(entropy_from_logits(logits / temperature), mask, over)


EX4 = exercise(
    """08.4 Token entropy (difficulty 2, importance 4, 8 minutes)

    1. Entropy belongs to a position, not to the token that was drawn there: all V probabilities take part.
    2. The policy that sampled is softmax(logits / T). Divide before the softmax.
    3. `logp = (logits / temperature).log_softmax(-1)`; a sum over the last axis; then the mean over `mask`.

    - padding counted: positions of padding are in the mean. How large the entropy seems then depends on how long the
      longest response of the batch is.
    - mean of means: that is a mean over each response and then over responses: a token of a short response counts more
      than one of a long one. The metric is a mean over response tokens.
    - divided by all positions: padding adds nothing to the sum, but it is counted in the divisor: the entropy seems to
      fall whenever one response is long.
    - temperature ignored: the temperature is not used: this is the entropy of a policy that nobody samples from.
    - multiplied by the temperature: the logits are multiplied by the temperature. A low temperature must make the
      policy surer.
    - no minus: the entropy is negative: log-probabilities are at most 0, and the definition has a minus.
    - bits: that is in bits (log to the base 2). Everything here is in nats.

    A uniform policy over V words has log V nats, a certain one 0.
    """,
    observe=lambda answer: {
        "the entropy at temperature 1": answer(_LOGITS.clone(), _TOKENS.clone(), 1.0),
        "the entropy at temperature 0.5": answer(_LOGITS.clone(), _TOKENS.clone(), 0.5),
        "the entropy of one uniform token": answer(torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), 1.0),
    },
    solution=_entropy,
    mistakes={
        "padding counted": partial(_entropy, over="places"),
        "mean of means": partial(_entropy, over="responses"),
        "divided by all positions": partial(_entropy, over="counted padding"),
        "temperature ignored": lambda logits, mask, t: _entropy(logits, mask, 1.0),
        "multiplied by the temperature": lambda logits, mask, t: _entropy(logits, mask, 1 / t),
        "no minus": lambda *case: -_entropy(*case),
        "bits": lambda *case: _entropy(*case) / math.log(2),
    },
)


_MU = torch.tensor([[0.50, 0.40, 0.90], [0.80, 0.30, 0.20]]).log()
_OLD = torch.tensor([[0.45, 0.44, 0.88], [0.84, 0.70, 0.60]]).log()
_THETA = torch.tensor([[0.60, 0.20, 0.95], [0.50, 0.10, 0.30]]).log()

_k1 = partial(kl, term="k1")

EX5 = exercise(
    """08.5 The training–inference KL (difficulty 2, importance 5, 8 minutes)

    1. Which two of the three policies hold the same weights?
    2. The tokens were drawn from μ_old, so μ_old is the distribution that the expectation is under: it stands first.
    3. The mean of log μ_old − log π_old over the response tokens.

    - the wrong way round: the difference is the wrong way round. Tokens are drawn from μ_old, which likes them better
      on average: the KL must come out positive where it does.
    - π_θ instead of π_old: that compares with π_θ, whose weights have moved. Then a large step looks like a bad engine:
      the two factors of (5) are mixed.
    - staleness: that is log π_old − log π_θ, the staleness. The engine that sampled does not occur in it.
    - k3: that is k3: the same expectation with less noise, and a good thing to look at. The paper's curve is the plain
      mean of the log-ratio.
    - padding counted: padding is in the mean. What stands there is no token.
    - per response: that is a sum over the tokens of each response: the KL of whole responses, which grows with their
      length. The metric is per token.
    - absolute values: with absolute values it is no longer a KL: the two signs must be allowed to cancel.

    It may come out slightly negative: it is an estimate, and its noise does not know that a KL cannot be.
    """,
    observe=lambda answer: {
        "the KL of the example": answer(_THETA.clone(), _OLD.clone(), _MU.clone(), _TOKENS.clone()),
        "the KL where the engine likes every drawn token better by 0.1 nats": answer(
            _THETA.clone(), _MU.clone() - 0.1, _MU.clone(), _TOKENS.clone()
        ),
    },
    solution=lambda logp, old, mu, mask: kl_k1(mu, old, mask),
    mistakes={
        "the wrong way round": lambda logp, old, mu, mask: _k1(old, mu, mask),
        "π_θ instead of π_old": lambda logp, old, mu, mask: _k1(mu, logp, mask),
        "staleness": lambda logp, old, mu, mask: _k1(old, logp, mask),
        "k3": lambda logp, old, mu, mask: kl(mu, old, mask),
        "padding counted": lambda logp, old, mu, mask: _k1(mu, old, mask, over="places"),
        "per response": lambda logp, old, mu, mask: _k1(mu, old, mask, over="sums"),
        "absolute values": lambda logp, old, mu, mask: masked_mean((mu - old).abs(), mask),
    },
)


# Student's t by degrees of freedom, from a table: the observations have 5 and 7 seeds.
_T_975 = {4: 2.776445, 6: 2.446912, 8: 2.306004, 12: 2.178813}
_T_950 = {4: 2.131847, 6: 1.943180}
_SEEDS_A = (0.86, 0.79, 0.90, 0.71, 0.83)
_SEEDS_B = (0.80, 0.75, 0.88, 0.62, 0.80)


def _observe_paired(answer: Answer) -> Observations:
    def numbers(a: Sequence[float], b: Sequence[float]) -> Tensor:
        return torch.tensor([float(x) for x in answer(np.array(a), np.array(b))], dtype=torch.float64)

    return {
        "the estimate and its interval": numbers(_SEEDS_A, _SEEDS_B),
        "the same for seven seeds": numbers((*_SEEDS_A, 0.77, 0.88), (*_SEEDS_B, 0.79, 0.80)),
    }


def _around(middle: float, half: float) -> tuple[float, float, float]:
    return middle, middle - half, middle + half


def _paired(a: np.ndarray, b: np.ndarray, *, ddof: int = 1, quantile: float | None = None) -> tuple[float, ...]:
    n = len(a)
    quantile = _T_975[n - 1] if quantile is None else quantile
    return _around(float((a - b).mean()), quantile * float((a - b).std(ddof=ddof)) / math.sqrt(n))


def _unpaired(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    n = len(a)
    error = math.sqrt(float(a.var(ddof=1) + b.var(ddof=1)) / n)
    return _around(float(a.mean() - b.mean()), _T_975[2 * n - 2] * error)


EX6 = exercise(
    """08.6 A paired difference, with its interval (difficulty 3, importance 4, 12 minutes)

    1. Seed by seed: first the differences, then everything about them.
    2. The standard error of a mean of n numbers is their standard deviation (divisor n − 1) over √n.
    3. `t_quantile(0.975, n - 1)` standard errors to each side.

    - unpaired: the two groups are treated as independent. What a seed does to both runs (easy problems, a lucky start)
      is then counted as noise, though it drops out of the difference.
    - 1.96: 1.96 is the normal distribution's quantile. With so few seeds the standard deviation is itself a guess, and
      Student's t pays for that with a wider interval.
    - divisor n: the standard deviation has the divisor n. The mean was fitted to the same numbers, which uses up one of
      them: n − 1.
    - no √n: that is an interval for one more seed, not for the mean. More seeds must make it narrower.
    - b − a: that is b − a. A figure that says by how much a is better must subtract b.
    - one-sided quantile: that is the 95 % quantile, which leaves 5 % on **each** side: a 90 % interval.

    An interval that excludes 0 is a difference; one that includes it is not yet equality.
    """,
    observe=_observe_paired,
    solution=_paired,
    mistakes={
        "unpaired": _unpaired,
        "1.96": partial(_paired, quantile=1.959964),
        "divisor n": partial(_paired, ddof=0),
        "no √n": lambda a, b: _paired(a, b, quantile=_T_975[len(a) - 1] * math.sqrt(len(a))),
        "b − a": lambda a, b: _paired(b, a),
        "one-sided quantile": lambda a, b: _paired(a, b, quantile=_T_950[len(a) - 1]),
    },
    rtol=1e-3,
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6)
