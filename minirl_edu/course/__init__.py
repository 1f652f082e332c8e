"""Exercises of the labs, with a checker that says which mistake an answer makes.

    check("04.2", my_objective)      prints: right; or what is wrong with it, and a hint for just that

Each lab's exercises are data in a module of their own (`unit04.EXERCISES`): a text that says everything that a learner
is told, and the answers that it speaks of, right and wrong. What an exercise needs stands above it; what several units
need is in `variants`.

An exercise *observes* what an answer does on small cases made by hand and compares that with what its solution does.
Where the two differ, the observations of known mistakes are tried: an answer that does exactly what a known mistake
does has made that mistake, however it is written.
"""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Observations = Mapping[str, Any]
"""What an answer does, by a name that can be read in a sentence: tensors, numbers, booleans, strings."""

Answer = Callable[..., Any]
"""What most exercises ask for: a function."""

_UNITS = tuple(f"{number:02d}" for number in range(13))
T = TypeVar("T")


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong answer and what to tell the one who gives it."""

    name: str
    answer: Any
    hint: str
    """Says what went wrong, not what to type."""


@dataclass(frozen=True)
class Exercise:
    """What is asked, and how an answer is judged.

    id           unit and number, such as "04.2"
    difficulty   1 (read it off) to 5 (an afternoon)
    importance   1 (a curiosity) to 5 (the rest of the course needs it)
    minutes      how long it takes someone who has read the lesson
    hints        a ladder, from a nudge to nearly the answer
    observe      what an answer does on hand-made cases; it may raise
    solution     a right answer
    mistakes     wrong ones, each with its own hint; their observations must differ from each other's
    rtol, atol   how far numbers of a right answer may be from the solution's
    """

    id: str
    title: str
    difficulty: int
    importance: int
    minutes: int
    hints: tuple[str, ...]
    observe: Callable[[Any], Observations]
    solution: Any
    mistakes: tuple[Mistake, ...]
    rtol: float = 1e-4
    atol: float = 1e-6
    praise: str = ""
    """What to remember, told with a right answer."""


def exercise(
    text: str,
    *,
    observe: Callable[[Any], Observations],
    solution: Any,
    mistakes: Mapping[str, Any],
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> Exercise:
    """The exercise that a text describes, in the form

        04.1 Its title (difficulty 2, importance 5, 10 minutes)

        1. A hint.
        2. The next one. Lines that belong to the one above are indented.

        - name of a mistake: its hint

        What to remember.

    `mistakes` gives the wrong answers by their names in the text. ValueError: a text of another form, or other names.
    """
    head, *parts = inspect.cleandoc(text).split("\n\n")
    fields = re.fullmatch(r"(\S+) (.+) \(difficulty (\d), importance (\d), (\d+) minutes\)", head)
    if fields is None or len(parts) != 3:
        raise ValueError(f"exercise {head!r}: expected its head, its hints, its mistakes and what to remember")
    ladder, described = ([" ".join(item.split()) for item in re.split(r"\n(?=\S)", part)] for part in parts[:2])
    named = dict(item.removeprefix("- ").split(": ", 1) for item in described)
    if list(named) != list(mistakes):
        raise ValueError(f"exercise {fields[1]}: its text names the mistakes {list(named)}; answers: {list(mistakes)}")
    return Exercise(
        id=fields[1],
        title=fields[2],
        difficulty=int(fields[3]),
        importance=int(fields[4]),
        minutes=int(fields[5]),
        hints=tuple(re.sub(r"^\d+\. ", "", hint) for hint in ladder),
        observe=observe,
        solution=solution,
        mistakes=tuple(Mistake(name, answer, named[name]) for name, answer in mistakes.items()),
        rtol=rtol,
        atol=atol,
        praise=" ".join(parts[2].split()),
    )


class Verdict(NamedTuple):
    """Whether an answer is right; the name of the known mistake it makes, if it makes one; and what to tell."""

    right: bool
    mistake: str | None
    message: str


def find(exercise_id: str) -> Exercise:
    """The exercise with this id. Raises KeyError, which lists what there is, for any other."""
    unit = exercise_id.partition(".")[0]
    known = exercises(unit) if unit in _UNITS else {}
    if exercise_id not in known:
        there = ", ".join(known) or "exercises are numbered 00.1 to 12.9"
        raise KeyError(f"no exercise {exercise_id!r}: {there}")
    return known[exercise_id]


def exercises(unit: str) -> dict[str, Exercise]:
    """The exercises of a unit ("04") by id; none where a unit has none."""
    try:
        module = importlib.import_module(f"minirl_edu.course.unit{unit}")
    except ModuleNotFoundError as error:
        if error.name != f"minirl_edu.course.unit{unit}":
            raise
        return {}
    return {exercise.id: exercise for exercise in module.EXERCISES}


def check(exercise_id: str, answer: Any) -> None:
    """Print whether the answer is right, or else what is wrong with it."""
    print(diagnose(find(exercise_id), answer).message)


def diagnose(exercise: Exercise, answer: Any) -> Verdict:
    """Judge an answer: right where its observations equal the solution's, else the first known mistake that does the
    same, else what differs. `...` and NotImplementedError are no answer yet. Whatever an answer raises is observed too.
    """
    if isinstance(answer, EllipsisType):
        return Verdict(False, None, f"○ {exercise.id}: not answered yet")
    observed = _observe(exercise, answer)
    if observed.get("raises", "").startswith("NotImplementedError"):
        return Verdict(False, None, f"○ {exercise.id}: not answered yet")
    different = _difference(observed, exercise.observe(exercise.solution), exercise)
    if different is None:
        return Verdict(True, None, f"✓ {exercise.id}: right. {exercise.praise}".rstrip())
    for mistake in exercise.mistakes:
        if _difference(observed, _observe(exercise, mistake.answer), exercise) is None:
            return Verdict(False, mistake.name, f"✗ {exercise.id}: {mistake.hint}")
    return Verdict(False, None, f"✗ {exercise.id}: {different}")


def heading(exercise: Exercise) -> str:
    """The Markdown line above an exercise: number, title, difficulty, importance, minutes."""
    difficulty, importance = ("●" * n + "○" * (5 - n) for n in (exercise.difficulty, exercise.importance))
    return (
        f"### Exercise {exercise.id} · {exercise.title}\n\n"
        f"*difficulty {difficulty} · importance {importance} · about {exercise.minutes} minutes*"
    )


def hint_ladder(exercise: Exercise) -> str:
    """The hints, folded: one opens after the other."""
    return "\n\n".join(
        f"<details><summary>Hint {number} of {len(exercise.hints)}</summary>\n\n{hint}\n\n</details>"
        for number, hint in enumerate(exercise.hints, start=1)
    )


def pick(*, fast: T, full: T) -> T:
    """`fast` where the environment says `MINIRL_LABS=fast`, as continuous integration does, else `full`."""
    return fast if os.environ.get("MINIRL_LABS") == "fast" else full


def checkout() -> Path:
    """The folder of the repository that a lab runs in, where the results of the reproduction lie.

    Raises FileNotFoundError outside one: `pip install minirl-edu` alone brings no results.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).parents):
        if (folder / "lessons" / "results").is_dir():
            return folder
    raise FileNotFoundError(f"no lessons/results above {Path.cwd()}: run the labs inside a clone of the repository")


def _observe(exercise: Exercise, answer: Any) -> Observations:
    try:
        return exercise.observe(answer)
    except Exception as error:  # an answer is somebody's first try: whatever it raises is worth a sentence
        return {"raises": f"{type(error).__name__}: {error}"}


def _difference(observed: Observations, expected: Observations, exercise: Exercise) -> str | None:
    """In words, where the observations first differ; None where they do not."""
    if "raises" in observed or "raises" in expected:
        kinds = [str(side.get("raises", "")).partition(":")[0] for side in (observed, expected)]
        return None if kinds[0] == kinds[1] else f"it raises {observed.get('raises', 'nothing')}"
    for name, right in expected.items():
        if name not in observed:
            return f"{name} is missing"
        if (found := differs(observed[name], right, exercise.rtol, exercise.atol)) is not None:
            return f"{name} {found}"
    return None


def differs(own: Any, right: Any, rtol: float, atol: float) -> str | None:
    """In words, how an observation differs from the right one; None where it does not."""
    if isinstance(right, str | bool | type(None)):
        return None if own == right else f"is {own!r}; it should not be"
    try:
        mine, theirs = (torch.as_tensor(value).detach().double() for value in (own, right))
    except (TypeError, ValueError, RuntimeError):
        return f"is a {type(own).__name__}; a {type(right).__name__} was expected"
    if mine.shape != theirs.shape:
        return f"has shape {list(mine.shape)}; {list(theirs.shape)} was expected"
    wrong = ~torch.isclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    at = f" at {list(place)}" if place else ""
    return f"is {_number(mine[place])}{at}; {_number(theirs[place])} was expected"


def _number(value: Tensor) -> str:
    return f"{value.item():.5g}"
