"""The capstone's checks: right files pass, however they are written, and each known mistake gets its own hint."""

import ast
import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirl_edu.course import capstone
from minirl_edu.course.capstone import NUMBERS, check_file, diagnose, experts, steps, verdict
from tests.course.capstone.mistakes import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
FILES = Path(__file__).parent / "capstone"
NANO = (ROOT / "lessons" / "nano_minirl.py").read_text(encoding="utf-8")
NANO = NANO.replace("Path(__file__).parents[1]", f"Path({str(ROOT)!r})")  # a copy of it stands elsewhere
PLAIN = (FILES / "plain.py").read_text(encoding="utf-8")
GROWING = re.split(r"^(?=# ---- step)", (FILES / "table.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
TRAINING = "it does not learn", "too slow"  # mistakes that only a whole training shows


def model(step: str) -> str:
    """A right file of a step, with nothing that belongs to a later step on a table."""
    return "".join(GROWING[: int(step) + 1]) if step < "06" else NANO


def quick(step: str) -> capstone.Step:
    """A step, and step 08 without its training."""
    found = steps()[step]
    return dataclasses.replace(found, checks=found.checks[:1]) if step == "08" else found


@pytest.fixture(autouse=True)
def no_module_is_left(monkeypatch):
    monkeypatch.delitem(sys.modules, "my_minirl", raising=False)


def judged(step: capstone.Step, source: str, folder: Path) -> capstone.Verdict:
    path = folder / "my_minirl.py"
    path.write_text(source, encoding="utf-8")
    return diagnose(step, path)


@pytest.mark.parametrize("number", NUMBERS)
def test_right_files_pass_and_a_later_file_passes_the_earlier_steps(number, tmp_path):
    later = [NANO, PLAIN] if number == "01" else [NANO]
    for source in dict.fromkeys([model(number), model("05") if number < "06" else NANO, *later]):
        answer = judged(quick(number), source, tmp_path)
        assert answer == (True, None, f"✓ step {number}: right. {steps()[number].praise}")


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_a_file_that_is_written_otherwise_passes(number, tmp_path):
    assert judged(quick(number), PLAIN, tmp_path).right


def wrong(number: str, mistake: str) -> str:
    source = model(number)
    for old, new in VARIANTS[number][mistake]:
        before, found, after = source.rpartition(old)
        assert found, old
        source = before + new + after
    return source


CASES = [(number, mistake) for number, variants in VARIANTS.items() for mistake in variants]


@pytest.mark.parametrize(
    ("number", "mistake"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == "08")) for case in CASES]
)
def test_a_known_mistake_gets_its_own_hint(number, mistake, tmp_path):
    answer = judged(quick(number), wrong(number, mistake), tmp_path)
    assert (answer.right, answer.mistake) == (False, mistake), answer.message
    assert answer.message.startswith(f"✗ step {number}: {steps()[number].hints[mistake]}")


@pytest.mark.parametrize("number", NUMBERS)
def test_every_mistake_has_a_wrong_file_and_a_hint_of_its_own(number):
    hints = steps()[number].hints
    assert set(hints) - set(TRAINING) == set(VARIANTS[number])
    assert len(set(hints.values())) == len(hints) >= 9


PAGE = (ROOT / "lessons" / "capstone.md").read_text(encoding="utf-8")


def test_the_page_has_the_steps_and_the_signatures_of_files_that_pass():
    sections = re.findall(r"^## Step (\d\d) · .+?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert [number for number, _ in sections] == list(NUMBERS)
    written = {
        node.name: [argument.arg for argument in node.args.args]
        for source in (model("05"), NANO)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    asked = {}
    for _, text in sections:
        for name, arguments in re.findall(r"^\| `(\w+)\((.*?)\)` \|", text, re.MULTILINE):
            asked[name] = [argument.partition("=")[0] for argument in arguments.split(", ")]
    assert asked == {name: written[name] for name in asked}
    needed = {name for step in steps().values() for name in step.names} - {"Rollout"}
    assert needed | {"reinforce_loss"} == set(asked)


# --------------------------------------------------------------------------------- a file in a process of its own


def test_without_a_file_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_file("03")
    check_file("9")
    assert capsys.readouterr().out.splitlines() == [
        "○ step 03: there is no my_minirl.py yet. Make an empty file of that name beside this notebook.",
        "○ there is no step '9': the steps are 01, 02, 03, 04, 05, 06, 07, 08",
    ]


BROKEN = {
    "x = 1 / 0  # oh": "✗ step 02: ZeroDivisionError: division by zero\n    line 2, in <module>: x = 1 / 0  # oh",
    "def f(:": "✗ step 02: SyntaxError: invalid syntax\n    line 2: def f(:",
    "raise SystemExit": "✗ step 02: SystemExit\n    line 2, in <module>: raise SystemExit",
    "y = 2": "○ step 02: my_minirl.py has no `minirl_loss` yet.",
    "def minirl_loss(*_):\n    raise NotImplementedError": "○ step 02: this is not written yet:\n    line 3, in",
    "def minirl_loss(*_):\n    return 1": "✗ step 02: what a function of the file returned does not fit (TypeError: ",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_file_is_reported_with_its_own_lines(code, tmp_path):
    base = model("01") if "def minirl_loss" in code else ""
    answer = judged(steps()["02"], f"{base}\n{code}\n", tmp_path)
    expected = BROKEN[code]
    if base:
        expected = re.sub(r"line 3", f"line {base.count(chr(10)) + 3}", expected)
    assert not answer.right and answer.mistake is None
    assert answer.message.startswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (model("01") + "print('said by the file')", r"✓ step 01: right"),
        (
            "def go():\n    while True:\n        pass\ngo()",
            r"not finished after 3 seconds. It was in line [23], in `go`.",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", r"the process was ended by SIGSEGV."),
        ("import os\nos._exit(3)", r"the process ended early, with status 3. Does the file call `exit`\?"),
    ],
)
def test_a_file_in_a_process_of_its_own_is_judged_and_a_loop_without_end_or_a_crash_reported(code, expected, tmp_path):
    path = tmp_path / "my_minirl.py"
    path.write_text(f"{code}\n", encoding="utf-8")
    assert re.search(expected, verdict("01", path, limit=3.0).message)


def test_the_command_stops_at_the_first_step_that_is_not_right(tmp_path, capsys, monkeypatch):
    path = tmp_path / "my_minirl.py"
    path.write_text(model("02"), encoding="utf-8")
    assert capstone.main(["07", str(tmp_path / "none.py")]) == 1
    monkeypatch.setattr(capstone, "verdict", lambda number, path, **_: diagnose(steps()[number], path))
    capsys.readouterr()
    assert capstone.main([str(path)]) == 1
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["✓ step 01", "✓ step 02", "○ step 03"]
    assert capstone.main(["02", str(path)]) == 0
    monkeypatch.chdir(tmp_path)
    assert capstone.main(["02"]) == 0


@pytest.mark.slow
def test_the_model_solution_passes_the_last_step_in_time(tmp_path):
    path = tmp_path / "my_minirl.py"
    path.write_text(NANO, encoding="utf-8")
    assert verdict("08", path).right


@pytest.mark.parametrize(
    ("score", "seconds", "mistake"),
    [(0.95, 170, None), (0.9, 40, "it does not learn"), (0.99, 190, "too slow")],
)
def test_a_training_that_fails_or_takes_too_long_is_told_so(score, seconds, mistake, tmp_path, monkeypatch):
    clock = iter([0.0, float(seconds)])
    monkeypatch.setattr(experts, "time", SimpleNamespace(process_time=lambda: next(clock)))
    step = dataclasses.replace(steps()["08"], names=(), checks=steps()["08"].checks[1:])
    answer = judged(step, f"def train(replay, seed):\n    return {score}", tmp_path)
    assert (answer.right, answer.mistake) == (mistake is None, mistake)
