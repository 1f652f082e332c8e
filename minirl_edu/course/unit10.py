"""Exercises of unit 10: name the fault of six recorded runs, then mend three of them in the code."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations
from minirl_edu.course.mystery import FAULTS

# ------------------------------------------------------------------------------------ 10.1 to 10.6: name the fault

GROUP, TEMPERATURE, HOT, STALE, BASELINE, ROUTES = (
    "rewards of the wrong group",
    "sampled at another temperature",
    "learning rate ten times too high",
    "engine never synced",
    "no baseline",
    "routes of another response",
)


def _normal(name: Any) -> str:
    return " ".join(str(name).lower().replace("-", " ").split())


def _observe_name(answer: Any) -> Observations:
    return {"the fault you name": _normal(answer() if callable(answer) else answer)}


def _name_the_fault(
    number: int, letter: str, difficulty: int, hints: tuple[str, ...], wrong: Mapping[str, str], praise: str
) -> Exercise:
    """The exercise about one run; `wrong` says of every other fault which curve of this run contradicts it."""
    assert set(wrong) == set(FAULTS.values()) - {FAULTS[letter]}
    return Exercise(
        id=f"10.{number}",
        title=f"What is wrong with run {letter}?",
        difficulty=difficulty,
        importance=4,
        minutes=6,
        hints=hints,
        observe=_observe_name,
        solution=FAULTS[letter],
        mistakes=(
            *(Mistake(name, name, hint) for name, hint in wrong.items()),
            Mistake(
                "none",
                "none",
                f"run {letter} is not healthy: lay its charts over the healthy run's again, one instrument at a time.",
            ),
        ),
        praise=praise,
    )


_RUNS = (
    _name_the_fault(
        1,
        "A",
        2,
        (
            "Which instruments read as in the healthy run? Begin by crossing out what they rule out.",
            "Engine and trainer agree, and the steps have the usual size. So what the steps are *told* must be wrong.",
            "The policy moves, but not uphill. Which part of the gradient decides in which direction it goes?",
        ),
        {
            TEMPERATURE: "with another temperature the discrepancy would be large from the very first step, and the "
            "training reward would stand above the score. In run A both are as in the healthy run.",
            HOT: "staleness, the distance that the policy moves within a rollout, is about the healthy run's. "
            "Steps ten times too long would show there first, and in every rollout.",
            STALE: "an engine that is left behind drifts away from the trainer, and its score stays where it began. In "
            "run A the two scores go together, all the way down.",
            BASELINE: "without a baseline no advantage is negative, so nothing is ever clipped from below. In run A "
            "some tokens are.",
            ROUTES: "under R3 the flip rate is zero if the right experts are replayed. In run A it is.",
        },
        "Everything about the *policies* is in order; what is wrong is what they are told. The gradient is noise of "
        "the usual length, and a random walk away from a trained model makes it worse.",
    ),
    _name_the_fault(
        2,
        "B",
        2,
        (
            "Look at gradient step 1, before anything was trained. What is already different?",
            "The engines disagree at once, with the same weights and the same experts. And who scores better?",
            "Which change of the sampler makes right answers *more* frequent without a single update?",
        ),
        {
            GROUP: "rewards in the wrong place leave the log-probabilities alone. In run B engine and trainer disagree "
            "before the first update.",
            HOT: "the learning rate has done nothing yet at step 1, and run B differs from the healthy one there.",
            STALE: "at step 1 every engine is in sync. A stale one starts with the healthy run's discrepancy and "
            "drifts; run B starts high.",
            BASELINE: "a missing baseline does not touch the discrepancy, and it would keep the lower clip fraction at "
            "exactly zero. Look at both.",
            ROUTES: "wrong experts raise the discrepancy at step 1, too. But the flip rate would not be zero, and the "
            "training reward would not start *above* the score.",
        },
        "A sampler that is surer than the trainer: better rewards, at once, and a discrepancy that no update has made.",
    ),
    _name_the_fault(
        3,
        "C",
        2,
        (
            "Which instrument compares the trainer with itself, before and after some updates of one rollout?",
            "The start is healthy; the trouble grows with the warm-up.",
            "Staleness and clipping are far above the healthy run's: the policy moves too far within one rollout.",
        ),
        {
            GROUP: "misplaced rewards make steps useless, not long. In run C staleness is far above the healthy run's.",
            TEMPERATURE: "at step 1 run C reads as the healthy run does. Another temperature is there from the start.",
            STALE: "an engine left behind shows in the discrepancy, and its score stays where it began. In run C what "
            "grows first is π_θ/π_old, in which the engine has no part.",
            BASELINE: "the lower clip fraction is not zero in run C, so there are negative advantages.",
            ROUTES: "the flip rate is exactly zero, as it must be under R3.",
        },
        "Mismatch compares two engines, staleness compares the trainer with itself. Only one has a learning rate.",
    ),
    _name_the_fault(
        4,
        "D",
        3,
        (
            "Two scores are drawn. When do they part, and which of them moves?",
            "The training reward is sampled by the engine. Compare it with the score of the trainer.",
            "The discrepancy begins as in the healthy run and grows with every update: something stays behind.",
        ),
        {
            GROUP: "the trainer's score does rise in run D, so the rewards do tell it what was right.",
            TEMPERATURE: "another temperature is there from step 1. Run D starts like the healthy run, and parts from "
            "it as training goes on.",
            HOT: "for most of the run the policy moves no further within a rollout than in the healthy run. What grows "
            "from the start is its distance from the *engine*.",
            BASELINE: "a missing baseline leaves the two scores together and the lower clip fraction at zero. Neither "
            "is so in run D.",
            ROUTES: "the flip rate is zero, and at step 1 the discrepancy is the healthy run's.",
        },
        "One score rises, the other stands still: the weights that learn are not the weights that sample.",
    ),
    _name_the_fault(
        5,
        "E",
        4,
        (
            "Search for an instrument whose reading is not merely high or low, but impossible.",
            "Look at the two clip fractions, the one for Â > 0 and the one for Â < 0.",
            "Nothing is ever clipped from below. What does that say about the signs of the advantages?",
        ),
        {
            GROUP: "run E learns, so its rewards reach the right responses.",
            TEMPERATURE: "the discrepancy at step 1 is the healthy run's.",
            HOT: "steps that are too long clip on both sides. Look at the lower clip fraction of run E.",
            STALE: "the score through the engine goes along with the trainer's, so the engine gets new weights.",
            ROUTES: "the flip rate is exactly zero, as it must be under R3.",
        },
        "A fraction of exactly zero at every step is no coincidence: there are no negative advantages at all.",
    ),
    _name_the_fault(
        6,
        "F",
        2,
        (
            "All these runs replay the engine's experts (R3). Which instrument must then read exactly zero?",
            "The discrepancy is large at step 1. Run B's is, too: what tells the two apart?",
            "The experts that the trainer was given are not the ones the engine used for *these* tokens.",
        ),
        {
            GROUP: "misplaced rewards leave discrepancy and flip rate alone. Run F differs in both from step 1 on.",
            TEMPERATURE: "another temperature is also there from step 1, but it flips no expert, and it would lift the "
            "training reward above the score.",
            HOT: "at step 1 the learning rate has done nothing yet, and run F differs there already.",
            STALE: "at step 1 the engine is in sync, and run F differs there already.",
            BASELINE: "a missing baseline leaves discrepancy and flip rate alone.",
        },
        "Under R3 the flip rate has only one allowed reading: the best kind of instrument. And look at this run's "
        "score: a fault need not show there at all.",
    ),
)


# ------------------------------------------------------------------------------------------------ 10.7 hand over


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


def _update(model: Tensor, rollout: Tensor) -> None:
    model += 1.0


def _observe_loop(answer: Callable[..., Any]) -> Observations:
    engine, model = _Recorder(), torch.tensor(10.0)
    answer(engine, model, _update, 4)
    return {
        "what the model became after 4 updates": float(model),
        "how many rollouts were sampled": float(len(engine.sampled)),
        "the weights that sampled rollout 1, 2, 3, 4": engine.sampled,
        "the version at each rollout": engine.versions,
        "the engine's weights at the end": float(engine.weights),
    }


def _loop(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    engine.sync(model, version=0)
    for step in range(steps):
        update(model, engine.generate())
        engine.sync(model, version=step + 1)


def _loop_never(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    engine.sync(model, version=0)
    for _ in range(steps):
        update(model, engine.generate())


def _loop_once(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    _loop_never(engine, model, update, steps)
    engine.sync(model, version=steps)


def _loop_late(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    engine.sync(model, version=0)
    for step in range(steps):
        rollout = engine.generate()
        engine.sync(model, version=step + 1)
        update(model, rollout)


def _loop_same_version(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    engine.sync(model, version=0)
    for _ in range(steps):
        update(model, engine.generate())
        engine.sync(model, version=0)


def _loop_before_sampling(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    for step in range(steps):
        engine.sync(model, version=step)
        update(model, engine.generate())


def _loop_every_other(engine: Any, model: Tensor, update: Callable[..., None], steps: int) -> None:
    engine.sync(model, version=0)
    for step in range(steps):
        update(model, engine.generate())
        if step % 2:
            engine.sync(model, version=step + 1)


_EX7 = Exercise(
    id="10.7",
    title="Mend the hand-over",
    difficulty=3,
    importance=5,
    minutes=10,
    hints=(
        "The engine keeps its own copy of the weights. When do the two copies begin to differ?",
        "After every update the engine must get the weights that will sample the next rollout.",
        "One more line inside the loop, after the update: sync with `version=step + 1`.",
    ),
    observe=_observe_loop,
    solution=_loop,
    mistakes=(
        Mistake(
            "never synced",
            _loop_never,
            "every rollout is still sampled with the first weights. This is the loop as it was given.",
        ),
        Mistake(
            "synced after the last step only",
            _loop_once,
            "the engine gets new weights once, when all is over: every rollout was sampled with the first ones.",
        ),
        Mistake(
            "one step behind",
            _loop_late,
            "the engine is synced before the update, so it is always one update behind: each rollout is sampled with "
            "the weights before last. A constant lag looks like a slightly worse engine and is easily overlooked.",
        ),
        Mistake(
            "version stands still",
            _loop_same_version,
            "the weights are right, but their version never changes. An engine that drops its caches when the version "
            "changes will go on with those of the old weights, and nobody can tell from the rollouts' version.",
        ),
        Mistake(
            "last update never handed over",
            _loop_before_sampling,
            "all rollouts are right, but the weights after the last update never reach the engine: what is evaluated "
            "through it, or deployed, is a step old.",
        ),
        Mistake(
            "every other step",
            _loop_every_other,
            "some rollouts are sampled with weights of the step before. Asynchronous systems do that on purpose, and "
            "then say so; here the loop is synchronous.",
        ),
    ),
    praise="Each rollout's weight_version says which weights drew it: an assertion on it would find this at once.",
)


# ----------------------------------------------------------------------------------------------- 10.8 temperature


def _token_logp(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _at_one(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _token_logp(logits, tokens, 1.0)


def _observe_temperature(answer: Callable[[Tensor, Tensor, float], Tensor]) -> Observations:
    logits = torch.tensor([[[2.0, 1.0, -1.0], [0.5, 0.0, 3.0]]], requires_grad=True)
    tokens = torch.tensor([[0, 1]])
    found = answer(logits, tokens, 0.7)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    return {
        "log π at temperature 1": answer(logits, tokens, 1.0),
        "log π at temperature 0.7": found,
        "its gradient with respect to the logits": gradient,
    }


_EX8 = Exercise(
    id="10.8",
    title="Mend the trainer's temperature",
    difficulty=3,
    importance=4,
    minutes=8,
    hints=(
        "The sampler draws from softmax(logits / T). The trainer must talk about the same distribution.",
        "Probabilities have to add up to 1 *after* the temperature was applied.",
        "Divide the logits by the temperature, then take the log-softmax, then pick the tokens.",
    ),
    observe=_observe_temperature,
    solution=_token_logp,
    mistakes=(
        Mistake(
            "temperature ignored",
            _at_one,
            "the temperature has no effect. This is the function as it was given: the trainer scores another "
            "distribution than the one that was sampled.",
        ),
        Mistake(
            "multiplied",
            lambda logits, tokens, temperature: _token_logp(logits, tokens, 1 / temperature),
            "the logits are multiplied by T. A temperature below 1 makes a distribution sharper, so it must make "
            "logits larger.",
        ),
        Mistake(
            "divided after the softmax",
            lambda logits, tokens, temperature: _at_one(logits, tokens, 1.0) / temperature,
            "the log-probabilities were divided, not the logits. Those numbers do not belong to a distribution: their "
            "exponentials do not add up to 1.",
        ),
        Mistake(
            "probabilities instead of logs",
            lambda logits, tokens, temperature: _token_logp(logits, tokens, temperature).exp(),
            "these are probabilities. All three policies enter the loss and the metrics as logs.",
        ),
        Mistake(
            "temperature without gradient",
            lambda logits, tokens, temperature: (
                _at_one(logits, tokens, 1.0)
                + (_token_logp(logits, tokens, temperature) - _at_one(logits, tokens, 1.0)).detach()
            ),
            "the values are right, but the gradient is that of temperature 1: the correction was detached.",
        ),
    ),
    praise="`response_logprobs(…, temperature=…)` does this, from the same `Sampling` that the engine gets.",
)


# -------------------------------------------------------------------------------------------------- 10.9 rewards


def _rewarded(answers: list[str], responses: list[str], group_size: int) -> Tensor:
    return torch.tensor([float(response == answers[row // group_size]) for row, response in enumerate(responses)])


def _observe_rewards(answer: Callable[[list[str], list[str], int], Tensor]) -> Observations:
    answers = ["7", "3", "5", "1"]
    responses = ["7", "3", "3", "7", "5", "5", "1", "1", "0", "1", "7", "1"]
    return {
        "the rewards of four groups of three": answer(answers, responses, 3),
        "the rewards of two groups of two": answer(["a", "b"], ["a", "b", "b", "a"], 2),
    }


def _shifted(answers: list[str], responses: list[str], group_size: int) -> Tensor:
    return _rewarded(answers, responses, group_size).roll(group_size)


_EX9 = Exercise(
    id="10.9",
    title="Mend the rewards",
    difficulty=2,
    importance=5,
    minutes=8,
    hints=(
        "The batch is grouped by prompt: rows 0 … G − 1 answer the first problem.",
        "Which problem does row 5 belong to if G = 3? Write down the first six rows.",
        "The problem of a row is `row // group_size`.",
    ),
    observe=_observe_rewards,
    solution=_rewarded,
    mistakes=(
        Mistake(
            "interleaved",
            lambda answers, responses, group_size: torch.tensor(
                [float(response == answers[row % len(answers)]) for row, response in enumerate(responses)]
            ),
            "`row % number of problems` is right for a batch in which the problems take turns. This one is grouped by "
            "prompt, so nearly every response is compared with the answer to another problem. This is the function as "
            "it was given.",
        ),
        Mistake(
            "modulo the group size",
            lambda answers, responses, group_size: torch.tensor(
                [float(response == answers[row % group_size]) for row, response in enumerate(responses)]
            ),
            "`row % group_size` is a response's place *within* its group. Its problem is the number of its group.",
        ),
        Mistake(
            "one group late",
            _shifted,
            "each group has the rewards of the group before it. Their mean is right, and every curve about the engines "
            "too: this is what run A does.",
        ),
        Mistake(
            "reversed",
            lambda answers, responses, group_size: _rewarded(answers[::-1], responses, group_size),
            "the problems are taken in reverse order: every response is compared with the answer to another problem.",
        ),
        Mistake(
            "advantages",
            lambda answers, responses, group_size: (lambda groups: (groups - groups.mean(1, keepdim=True)).flatten())(
                _rewarded(answers, responses, group_size).view(-1, group_size)
            ),
            "these are advantages, the groups' means are taken off already. Asked are the rewards.",
        ),
    ),
    praise="The mean of misplaced rewards is plausible. A test on hand-made rows finds the fault; so does a lost run.",
)

EXERCISES = (*_RUNS, _EX7, _EX8, _EX9)
"""In the order of the lab."""
