"""Every exercise: its solution and two differently written answers are right, every known mistake gets its own hint."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from minirl_edu.course import Exercise, Mistake, diagnose, exercise, exercises, find, heading, hint_ladder, pick

ROOT = Path(__file__).resolve().parents[2]
UNITS = [f"{number:02d}" for number in range(13)]
ALL = [exercise for unit in UNITS for exercise in exercises(unit).values()]

each = pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.id)


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_has_at_least_four_exercises_and_its_lab_asks_them(unit):
    ids = list(exercises(unit))
    assert len(ids) >= 4
    assert ids == [f"{unit}.{number}" for number in range(1, len(ids) + 1)]
    (source,) = (ROOT / "notebooks" / "src").glob(f"{unit}_*.py")
    text = source.read_text(encoding="utf-8")
    assert re.findall(r"^# \{exercise\} (\S+)$", text, re.MULTILINE) == ids
    assert re.findall(r'^check\("(\S+)", ', text, re.MULTILINE) == ids


@each
def test_an_exercise_says_what_a_learner_wants_to_know(exercise):
    assert exercise.difficulty in range(1, 6) and exercise.importance in range(1, 6)
    assert 1 <= exercise.minutes <= 60
    assert len(exercise.hints) >= 2
    assert len(exercise.mistakes) >= 3
    for texts in ([m.hint for m in exercise.mistakes], [m.name for m in exercise.mistakes]):
        assert len(set(texts)) == len(texts)


@each
def test_the_solution_is_right(exercise):
    verdict = diagnose(exercise, exercise.solution)
    assert verdict.right and verdict.message.startswith(f"✓ {exercise.id}")


@each
def test_two_differently_written_answers_are_right(exercise):
    answers = importlib.import_module(f"tests.course.unit{exercise.id[:2]}").RIGHT[exercise.id]
    assert len(answers) >= 2
    for answer in answers:
        assert answer is not exercise.solution
        assert diagnose(exercise, answer).right, diagnose(exercise, answer).message


@pytest.mark.parametrize(
    ("exercise", "mistake"),
    [(exercise, mistake) for exercise in ALL for mistake in exercise.mistakes],
    ids=lambda value: value.id if isinstance(value, Exercise) else value.name,
)
def test_a_known_mistake_is_rejected_with_its_own_hint(exercise, mistake):
    verdict = diagnose(exercise, mistake.answer)
    assert not verdict.right
    assert verdict.mistake == mistake.name
    assert verdict.message == f"✗ {exercise.id}: {mistake.hint}"


@each
def test_no_answer_yet_is_no_mistake(exercise):
    def stub(*args, **kwargs):
        raise NotImplementedError

    assert diagnose(exercise, ...).message == f"○ {exercise.id}: not answered yet"
    if callable(exercise.solution):
        assert diagnose(exercise, stub).message == f"○ {exercise.id}: not answered yet"


# --------------------------------------------------------------------------------------------------- the mechanism

TEXT = """99.2 Twice (or more) (difficulty 1, importance 2, 3 minutes)

    1. What times two?
    2. x + x: a sum
       is enough.

    - squared: that is x · x:
      a square
    - "1.5": one and a half

    Two of a kind
    are twice one.
    """


def itself(answer):
    return {"it": answer}


def from_text(text=TEXT, names=("squared", '"1.5"')):
    return exercise(text, observe=itself, solution=2.0, mistakes=dict.fromkeys(names, 1.0), atol=0.5)


def test_an_exercise_is_read_from_its_text():
    assert from_text() == Exercise(
        id="99.2",
        title="Twice (or more)",
        difficulty=1,
        importance=2,
        minutes=3,
        hints=("What times two?", "x + x: a sum is enough."),
        observe=itself,
        solution=2.0,
        mistakes=(Mistake("squared", 1.0, "that is x · x: a square"), Mistake('"1.5"', 1.0, "one and a half")),
        atol=0.5,
        praise="Two of a kind are twice one.",
    )


@pytest.mark.parametrize(
    ("text", "names", "complaint"),
    [
        (TEXT.replace("minutes", "hours"), ("squared", '"1.5"'), "99.2 Twice .* expected its head"),
        (TEXT.replace("a square\n", "a square\n\n"), ("squared", '"1.5"'), "expected its head"),
        (TEXT, ("squared",), r"99\.2: its text names the mistakes"),
        (TEXT, ('"1.5"', "squared"), r"99\.2: its text names the mistakes"),
    ],
)
def test_a_text_of_another_form_is_refused(text, names, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_text(text, names)


SQUARE = Exercise(
    id="99.1",
    title="Square",
    difficulty=1,
    importance=2,
    minutes=3,
    hints=("What times what?", "x times x."),
    observe=lambda f: {"the square of 3": f(torch.tensor(3.0)), "the square of −2": f(torch.tensor(-2.0))},
    solution=lambda x: x * x,
    mistakes=(
        Mistake("doubled", lambda x: 2 * x, "that is twice x"),
        Mistake("raises", lambda x: [][1], "the list is empty"),
    ),
    praise="Remember it.",
)


def test_an_answer_is_diagnosed_by_what_it_does():
    assert diagnose(SQUARE, lambda x: x**2) == (True, None, "✓ 99.1: right. Remember it.")
    assert diagnose(SQUARE, lambda x: x + x) == (False, "doubled", "✗ 99.1: that is twice x")
    assert diagnose(SQUARE, lambda x: ().index(1) if x > 9 else [0][1]).mistake == "raises"  # any IndexError


def test_an_unknown_mistake_is_described():
    message = diagnose(SQUARE, lambda x: x * x + 1).message
    assert message == "✗ 99.1: the square of 3 is 10; 9 was expected"
    assert "has shape [2]; [] was expected" in diagnose(SQUARE, lambda x: torch.zeros(2)).message
    assert "is a NoneType; a Tensor was expected" in diagnose(SQUARE, lambda x: None).message
    assert "it raises ZeroDivisionError: division by zero" in diagnose(SQUARE, lambda x: 1 / 0).message


def test_numbers_are_compared_within_the_tolerance_and_nan_is_a_number_of_its_own():
    assert diagnose(SQUARE, lambda x: x * x * (1 + 5e-5)).right
    assert not diagnose(SQUARE, lambda x: x * x * (1 + 5e-4)).right
    assert "nan" in diagnose(SQUARE, lambda x: x * torch.nan).message


def test_what_a_lab_shows_above_and_below_an_exercise():
    assert heading(SQUARE) == ("### Exercise 99.1 · Square\n\n*difficulty ●○○○○ · importance ●●○○○ · about 3 minutes*")
    assert hint_ladder(SQUARE).count("<details>") == 2
    assert "Hint 2 of 2" in hint_ladder(SQUARE)


def test_an_unknown_exercise_names_those_there_are():
    with pytest.raises(KeyError, match=r"00\.1 to 12\.9"):
        find("99.1")
    with pytest.raises(KeyError, match=r"01\.1, 01\.2"):
        find("01.77")


def test_labs_are_short_where_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("MINIRL_LABS", "fast")
    assert pick(fast=1, full=2) == 1
    monkeypatch.delenv("MINIRL_LABS")
    assert pick(fast=1, full=2) == 2
