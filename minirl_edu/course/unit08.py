"""Exercises of unit 08, MiniRL end to end: the global step, the sync, micro-batches that add up, and the entropy."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import masked_mean, responses, tokens
from minirl_edu.diagnostics import entropy_from_logits
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
      before, and π_old/μ_old compares two policies instead of two engines.
    - π_old of the moment: π_old is computed right before each update, so in later mini-batches it is π_θ: the ratio r
      is 1 everywhere, the clip never acts, and staleness is counted as a discrepancy of the engines.
    - sync after each update: the engine gets weights that it never samples with. Only the final ones become the next
      θ_old; at scale, each sync moves the whole model.
    - sync at the start: the rollouts are right, but after the step the engine lags behind: an evaluation through it
      measures the weights of before.
    - one big update: all responses went into a single gradient step. That is on-policy with a larger batch, not N
      updates for one rollout.
    - the first mini-batch again: every update used the first mini-batch; the other responses were sampled for nothing.

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


def _sync(engine: ToyEngine, weights: Tensor, version: int, *, stored: Answer = _rounded, clear: bool = True) -> None:
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
    - no version: the version is that of before. Later nobody knows which weights sampled a rollout.

    `HFEngine.sync` does the same, tensor by tensor, and keeps no cache between calls.
    """,
    observe=_observe_sync,
    solution=_sync,
    mistakes={
        "nothing": lambda engine, weights, version: None,
        "only the label": lambda engine, weights, version: _sync(engine, engine.weights, version),
        "an alias": partial(_sync, stored=lambda weights: weights),
        "not rounded": partial(_sync, stored=torch.clone),
        "rounds the trainer": partial(_sync, stored=lambda weights: weights.mul_(4).round_().div_(4).clone()),
        "the cache survives": partial(_sync, clear=False),
        "no version": lambda engine, weights, version: _sync(engine, weights, engine.version),
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


def _observe_slope(answer: Answer) -> Observations:
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    words = torch.eye(4, dtype=torch.float64)
    return {
        "the slope where the likeliest word is right": answer(logits.clone(), words[0]),
        "the slope where the unlikeliest word is right": answer(logits.clone(), words[3]),
        "the slope where two words are right in part": answer(
            logits.clone(), torch.tensor([0.2, 0.0, 1.0, 0.5]).double()
        ),
        "the slope of a uniform policy": answer(torch.zeros(4, dtype=torch.float64), words[1]),
    }


def _baseline(pi: Tensor, rewards: Tensor) -> Tensor:
    return rewards - pi @ rewards


def _push(pi: Tensor, rewards: Tensor) -> Tensor:
    return pi * _baseline(pi, rewards)


def _slope(logits: Tensor, rewards: Tensor, *, push: Answer = _push, centred: bool = True) -> Tensor:
    """−Cov(log π, push) under π."""
    pi = logits.softmax(-1)
    moved = push(pi, rewards)
    middle = (pi @ pi.log()) * (pi @ moved) if centred else 0.0
    return middle - pi @ (pi.log() * moved)


def _over_words(logits: Tensor, rewards: Tensor) -> Tensor:
    pi = logits.softmax(-1)
    log_pi, moved = pi.log(), _push(pi, rewards)
    return log_pi.mean() * moved.mean() - (log_pi * moved).mean()


EX5 = exercise(
    """08.5 The slope of the entropy (difficulty 3, importance 4, 10 minutes)

    1. First the direction: by how much does the policy gradient move the logit of each word?
    2. A_a = R_a − Σ_w π(w) R_w, and logit a moves by π(a) A_a.
    3. Cov(x, y) under π is E[x y] − E[x] E[y], and each E is a sum over words with the weights π.
    4. Mind the sign of (08.6).

    - no minus: the sign is wrong. Likely words that become likelier make the policy surer, so the entropy falls.
    - no baseline: the direction is π R. The gradient of E[R] in logit a is π(a) (R_a − E[R]): where one probability
      rises, others fall.
    - step in the advantages: the direction is A, not π A. A word that is hardly ever drawn is hardly ever pushed.
    - product of the means forgotten: that is E[x y]. The mean of π A under π is not zero, so the covariance needs the
      second term.
    - every word alike: that is the covariance over the list of words. Each word counts with its probability.
    - bits: the logarithm has the base 2. Everything here is in nats.

    A falling entropy alone is no alarm: it falls wherever likely words are right.
    """,
    observe=_observe_slope,
    solution=_slope,
    mistakes={
        "no minus": lambda *case: -_slope(*case),
        "no baseline": partial(_slope, push=lambda pi, rewards: pi * rewards),
        "step in the advantages": partial(_slope, push=_baseline),
        "product of the means forgotten": partial(_slope, centred=False),
        "every word alike": _over_words,
        "bits": lambda *case: _slope(*case) / math.log(2),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5)
