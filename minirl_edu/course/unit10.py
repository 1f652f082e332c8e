"""Exercises of unit 10: name the fault of six recorded runs, then repair three of them in the code."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.course import Answer, Exercise, Observations, exercise
from minirl_edu.course.mystery import FAULTS
from minirl_edu.course.variants import token_logp


def _observe_name(answer: Any) -> Observations:
    name = answer() if callable(answer) else answer
    return {"the fault you name": " ".join(str(name).lower().replace("-", " ").split())}


def _run(letter: str, text: str) -> Exercise:
    """The exercise about one run; its text says of every other fault which curve of this run contradicts it."""
    wrong = [name for name in (*FAULTS.values(), "none") if name != FAULTS[letter]]
    return exercise(text, observe=_observe_name, solution=FAULTS[letter], mistakes={name: name for name in wrong})


EX1 = _run(
    "A",
    """10.1 What is wrong with run A? (difficulty 2, importance 4, 6 minutes)

    1. Which instruments read as in the healthy run? First cross out what they rule out.
    2. Engine and trainer agree, and the steps have the usual size. So the information in the steps must be wrong.
    3. The policy moves, but not uphill. Which part of the gradient decides about the direction?

    - sampled at another temperature: with another temperature the discrepancy would be large from the very first step,
      and the training reward would stand above the score. In run A both are as in the healthy run.
    - learning rate ten times too high: staleness, the distance that the policy moves within a rollout, is about the
      healthy run's. Steps ten times too long would show there first, and in every rollout.
    - engine never synced: an engine that is left behind drifts away from the trainer, and its score stays where it
      began. In run A the two scores fall together.
    - no baseline: without a baseline no advantage is negative, so nothing is ever clipped from below. In run A some
      tokens are.
    - routes of another response: under R3 the flip rate is zero if the right experts are replayed. It is zero in run A.
    - none: run A is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    Everything about the *policies* is in order, but the rewards are not theirs. The gradient is noise of the usual
    length, and a random walk away from a trained model makes it worse.
    """,
)

EX2 = _run(
    "B",
    """10.2 What is wrong with run B? (difficulty 2, importance 4, 6 minutes)

    1. Look at gradient step 1, before anything was trained. What is already different?
    2. The engines disagree at once, with the same weights and the same experts. Which of the two scores better?
    3. Which change of the sampler makes right answers *more* frequent without a single update?

    - rewards of the wrong group: rewards in the wrong place leave the log-probabilities alone. In run B engine and
      trainer disagree before the first update.
    - learning rate ten times too high: the learning rate has done nothing yet at step 1, and run B differs from the
      healthy one there.
    - engine never synced: at step 1 every engine is in sync. A stale one starts with the healthy run's discrepancy and
      drifts; run B starts high.
    - no baseline: a missing baseline does not touch the discrepancy, and it would keep the lower clip fraction at
      exactly zero. Look at both.
    - routes of another response: wrong experts raise the discrepancy at step 1, too. But the flip rate would not be
      zero, and the training reward would not start *above* the score.
    - none: run B is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    The sampler is surer than the trainer: its rewards are better at once, and no update has made the discrepancy.
    """,
)

EX3 = _run(
    "C",
    """10.3 What is wrong with run C? (difficulty 2, importance 4, 6 minutes)

    1. Which instrument compares the trainer with itself, before and after some updates of one rollout?
    2. The start is healthy; the trouble grows with the warm-up.
    3. Staleness and clipping are far above the healthy run's: the policy moves too far within one rollout.

    - rewards of the wrong group: misplaced rewards make steps useless, not long. In run C staleness is far above the
      healthy run's.
    - sampled at another temperature: at step 1 run C reads as the healthy run does. Another temperature is there from
      the start.
    - engine never synced: an engine left behind shows in the discrepancy, and its score stays where it began. In run C
      what grows first is π_θ/π_old, in which the engine has no part.
    - no baseline: the lower clip fraction is not zero in run C, so there are negative advantages.
    - routes of another response: the flip rate is exactly zero, as it must be under R3.
    - none: run C is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    Mismatch compares two engines. Staleness compares the trainer with itself, and only the trainer has a learning rate.
    """,
)

EX4 = _run(
    "D",
    """10.4 What is wrong with run D? (difficulty 3, importance 4, 6 minutes)

    1. Two scores are drawn. When do they separate, and which of them moves?
    2. The training reward is sampled by the engine. Compare it with the score of the trainer.
    3. The discrepancy begins as in the healthy run and grows with every update. What stays behind?

    - rewards of the wrong group: the trainer's score rises in run D, so the rewards say what was right.
    - sampled at another temperature: another temperature is there from step 1. Run D starts like the healthy run and
      leaves it as training goes on.
    - learning rate ten times too high: for most of the run the policy moves no further within a rollout than in the
      healthy run. What grows from the start is its distance from the *engine*.
    - no baseline: a missing baseline leaves the two scores together and the lower clip fraction at zero. Neither holds
      in run D.
    - routes of another response: the flip rate is zero, and at step 1 the discrepancy is the healthy run's.
    - none: run D is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    One score rises and the other stands still: the weights that learn are not the weights that sample.
    """,
)

EX5 = _run(
    "E",
    """10.5 What is wrong with run E? (difficulty 4, importance 4, 6 minutes)

    1. Find an instrument whose reading is not only high or low, but impossible.
    2. Look at the two clip fractions, the one for Â > 0 and the one for Â < 0.
    3. Nothing is ever clipped from below. What does that say about the signs of the advantages?

    - rewards of the wrong group: run E learns, so its rewards reach the right responses.
    - sampled at another temperature: the discrepancy at step 1 is the healthy run's.
    - learning rate ten times too high: steps that are too long clip on both sides. Look at the lower clip fraction of
      run E.
    - engine never synced: the score through the engine goes along with the trainer's, so the engine gets new weights.
    - routes of another response: the flip rate is exactly zero, as it must be under R3.
    - none: run E is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    A fraction of exactly zero at every step is not a coincidence: there are no negative advantages.
    """,
)

EX6 = _run(
    "F",
    """10.6 What is wrong with run F? (difficulty 2, importance 4, 6 minutes)

    1. All these runs replay the engine's experts (R3). Which instrument must then read exactly zero?
    2. The discrepancy is large at step 1. Run B's is, too: what tells the two apart?
    3. The experts that the trainer was given are not the ones the engine used for *these* tokens.

    - rewards of the wrong group: misplaced rewards leave discrepancy and flip rate alone. Run F differs in both from
      step 1 on.
    - sampled at another temperature: another temperature is also there from step 1, but it flips no expert, and it
      would lift the training reward above the score.
    - learning rate ten times too high: at step 1 the learning rate has done nothing yet, and run F differs there
      already.
    - engine never synced: at step 1 the engine is in sync, and run F differs there already.
    - no baseline: a missing baseline leaves discrepancy and flip rate alone.
    - none: run F is not healthy. Compare its curves with the healthy run's again, one instrument at a time.

    Under R3 the flip rate has only one allowed reading. That is the best kind of instrument. And this run's score is
    the healthy run's: a fault need not show there.
    """,
)


class _Recorder:
    """An engine that keeps one number as its weights, and notes what it was asked to do."""

    def __init__(self) -> None:
        self.weights: Any = None
        self.version = -1
        self.sampled: list[float] = []
        self.versions: list[float] = []

    def sync(self, model: Tensor, *, version: int) -> None:
        self.weights, self.version = model.clone(), version

    def generate(self) -> Tensor:
        self.sampled.append(float(self.weights))
        self.versions.append(float(self.version))
        return self.weights.clone()


def _observe_loop(answer: Answer) -> Observations:
    engine, model = _Recorder(), torch.tensor(10.0)
    answer(engine, model, lambda model, rollout: model.add_(1.0), 4)
    return {
        "what the model became after 4 updates": float(model),
        "how many rollouts were sampled": float(len(engine.sampled)),
        "the weights that sampled rollout 1, 2, 3, 4": engine.sampled,
        "the version at each rollout": engine.versions,
        "the engine's weights at the end": float(engine.weights),
    }


def _loop(
    engine: Any,
    model: Tensor,
    update: Answer,
    steps: int,
    *,
    synced: Callable[[int, int], bool] = lambda step, steps: True,
    version: Callable[[int], int] = lambda step: step + 1,
) -> None:
    engine.sync(model, version=0)
    for step in range(steps):
        update(model, engine.generate())
        if synced(step, steps):
            engine.sync(model, version=version(step))


def _one_behind(engine: Any, model: Tensor, update: Answer, steps: int) -> None:
    engine.sync(model, version=0)
    for step in range(steps):
        rollout = engine.generate()
        engine.sync(model, version=step + 1)
        update(model, rollout)


EX7 = exercise(
    """10.7 Repair the hand-over (difficulty 3, importance 5, 10 minutes)

    1. The engine keeps its own copy of the weights. When do the two copies begin to differ?
    2. After every update the engine must get the weights that will sample the next rollout.
    3. One more line inside the loop, after the update: sync with `version=step + 1`.

    - never synced: every rollout is still sampled with the first weights. This is the loop as it was given.
    - synced after the last step only: the engine gets new weights once, at the end. Every rollout was sampled with the
      first ones.
    - one step behind: the engine is synced before the update, so it is always one update behind. A constant lag
      looks like a slightly worse engine and is easily overlooked.
    - version stands still: the weights are right, but their version never changes. An engine that drops its caches when
      the version changes keeps those of the old weights, and the rollouts' version does not tell.
    - last update never handed over: all rollouts are right, but the weights after the last update never reach the
      engine. The engine evaluates, or deploys, weights that are a step old.
    - every other step: some rollouts are sampled with weights of the step before. Asynchronous systems do that on
      purpose and say so. This loop is synchronous.

    Each rollout's weight_version says which weights drew it. An assertion on it would find this at once.
    """,
    observe=_observe_loop,
    solution=_loop,
    mistakes={
        "never synced": partial(_loop, synced=lambda step, steps: False),
        "synced after the last step only": partial(_loop, synced=lambda step, steps: step == steps - 1),
        "one step behind": _one_behind,
        "version stands still": partial(_loop, version=lambda step: 0),
        "last update never handed over": partial(_loop, synced=lambda step, steps: step < steps - 1),
        "every other step": partial(_loop, synced=lambda step, steps: step % 2 == 1),
    },
)


def _observe_temperature(answer: Answer) -> Observations:
    logits = torch.tensor([[[2.0, 1.0, -1.0], [0.5, 0.0, 3.0]]], requires_grad=True)
    tokens = torch.tensor([[0, 1]])
    found = answer(logits, tokens, 0.7)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    return {
        "log π at temperature 1": answer(logits, tokens, 1.0),
        "log π at temperature 0.7": found,
        "its gradient with respect to the logits": gradient,
    }


EX8 = exercise(
    """10.8 Repair the trainer's temperature (difficulty 3, importance 4, 8 minutes)

    1. The sampler draws from softmax(logits / T). The trainer must score the same distribution.
    2. Probabilities have to add up to 1 *after* the temperature was applied.
    3. Divide the logits by the temperature, then take the log-softmax, then pick the tokens.

    - temperature ignored: the temperature has no effect. This is the function as it was given: the trainer scores a
      different distribution from the one that was sampled.
    - multiplied: the logits are multiplied by T. A temperature below 1 makes a distribution sharper, so it must make
      logits larger.
    - divided after the softmax: the log-probabilities were divided, not the logits. Those numbers do not belong to a
      distribution: their exponentials do not add up to 1.
    - probabilities instead of logs: these are probabilities. All three policies enter the loss and the metrics as logs.
    - temperature without gradient: the values are right, but the gradient is that of temperature 1: the correction was
      detached.

    `response_logprobs(…, temperature=…)` does this, from the same `Sampling` that the engine gets.
    """,
    observe=_observe_temperature,
    solution=token_logp,
    mistakes={
        "temperature ignored": lambda logits, tokens, t: token_logp(logits, tokens),
        "multiplied": lambda logits, tokens, t: token_logp(logits * t, tokens),
        "divided after the softmax": lambda logits, tokens, t: token_logp(logits, tokens) / t,
        "probabilities instead of logs": lambda logits, tokens, t: token_logp(logits, tokens, t).exp(),
        "temperature without gradient": lambda logits, tokens, t: (
            token_logp(logits, tokens) + (token_logp(logits, tokens, t) - token_logp(logits, tokens)).detach()
        ),
    },
)


_ANSWERS = ["7", "3", "5", "1"]
_RESPONSES = ["7", "3", "3", "7", "5", "5", "1", "1", "0", "1", "7", "1"]


def _rewards(problem: Callable[[int, int, int], int]) -> Callable[[list[str], list[str], int], Tensor]:
    """1 where a response is the answer to a problem, whose number comes from its row, G and the number of problems."""
    return lambda answers, responses, group_size: torch.tensor(
        [float(text == answers[problem(row, group_size, len(answers))]) for row, text in enumerate(responses)]
    )


_rewarded = _rewards(lambda row, group_size, problems: row // group_size)

EX9 = exercise(
    """10.9 Repair the rewards (difficulty 2, importance 5, 8 minutes)

    1. The batch is grouped by prompt: rows 0 … G − 1 answer the first problem.
    2. Which problem does row 5 belong to if G = 3? Write down the first six rows.
    3. The problem of a row is `row // group_size`.

    - interleaved: `row % number of problems` is right for a batch in which the problems take turns. This one is grouped
      by prompt, so nearly every response is compared with the answer to another problem. This is the function as it was
      given.
    - modulo the group size: `row % group_size` is a response's place *within* its group. Its problem is the number of
      its group.
    - one group late: each group has the rewards of the group before it. Their mean is right, and every curve about the
      engines too: this is what run A does.
    - reversed: the problems are taken in reverse order: every response is compared with the answer to another problem.
    - advantages: these are advantages, the groups' means are taken off already. Asked are the rewards.

    The mean of misplaced rewards is plausible. A test on hand-made rows finds the fault; so does a lost run.
    """,
    observe=lambda answer: {
        "the rewards of four groups of three": answer(_ANSWERS, _RESPONSES, 3),
        "the rewards of two groups of two": answer(["a", "b"], ["a", "b", "b", "a"], 2),
    },
    solution=_rewarded,
    mistakes={
        "interleaved": _rewards(lambda row, group_size, problems: row % problems),
        "modulo the group size": _rewards(lambda row, group_size, problems: row % group_size),
        "one group late": lambda answers, responses, group_size: _rewarded(answers, responses, group_size).roll(
            group_size
        ),
        "reversed": lambda answers, responses, group_size: _rewarded(answers[::-1], responses, group_size),
        "advantages": lambda answers, responses, group_size: group_mean_advantages(
            _rewarded(answers, responses, group_size), group_size
        ),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7, EX8, EX9)
