"""The capstone: a learner's `my_minirl.py`, checked step by step. lessons/capstone.md says what to write.

    check_file("03")                                          in a notebook
    python -m minirl_edu.course.capstone 03 my_minirl.py      the same; without a step, all of them in order

The file is run in a process of its own with a time limit, so an endless loop or a crash is reported like any mistake.
A check observes what the functions of the file do. It exchanges some of them for functions that it knows, such as a
table for the policy.
"""

import argparse
import faulthandler
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from minirl_edu.course.capstone.parts import Finding, Step

NUMBERS = tuple(f"{number:02d}" for number in range(1, 9))
_LIMITS = {"08": 900.0}
"""Seconds until a step's checks are given up: step 08 trains. The others take seconds, even on a busy machine."""
_LIMIT = 120.0


class Verdict(NamedTuple):
    """Whether a step is right; the name of the known mistake, if it is one; and what to tell."""

    right: bool
    mistake: str | None
    message: str


def steps() -> dict[str, Step]:
    """All steps by their numbers."""
    from minirl_edu.course.capstone import experts, table

    return {step.number: step for step in (*table.STEPS, *experts.STEPS)}


def check_file(step: str, path: str | Path = "my_minirl.py") -> None:
    """Print whether the learner's file does what a step asks, or else the first mistake with its hint."""
    print(verdict(step, Path(path)).message)


def verdict(step: str, path: Path, *, limit: float | None = None) -> Verdict:
    """Judge a step of a file in a process of its own. Whatever the file does, this returns.

    `limit` is the time in seconds.
    """
    if step not in NUMBERS:
        return Verdict(False, None, f"○ there is no step {step!r}: the steps are {', '.join(NUMBERS)}")
    if not path.is_file():
        return Verdict(
            False,
            None,
            f"○ step {step}: there is no {path.name} yet. Make an empty file of that name beside this notebook.",
        )
    seconds = limit or _LIMITS.get(step, _LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", __name__, "--into", folder, "--limit", str(seconds), step, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=seconds + 120
            )
        except subprocess.TimeoutExpired:
            return Verdict(False, None, f"✗ step {step}: not finished after {seconds:.0f} seconds.")
        if answer.exists():
            return Verdict(*json.loads(answer.read_text(encoding="utf-8")))
        stack = (Path(folder) / "stack").read_text(encoding="utf-8") if (Path(folder) / "stack").exists() else ""
    return Verdict(False, None, f"✗ step {step}: {_ended(done, stack, path, seconds)}")


def _ended(done: "subprocess.CompletedProcess[bytes]", stack: str, path: Path, seconds: float) -> str:
    """Why a process that gave no answer has ended."""
    if stack.startswith("Timeout"):
        at = re.search(rf'File "[^"]*{re.escape(path.name)}", line (\d+) in (\w+)', stack)
        where = f" It was in line {at[1]}, in `{at[2]}`." if at else ""
        return f"not finished after {seconds:.0f} seconds.{where} Is there a loop that never ends?"
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}."
    return f"the process ended early, with status {done.returncode}. Does the file call `exit`?"


def diagnose(step: Step, path: Path) -> Verdict:
    """Judge a step of a file in this process: the first finding of its checks."""
    try:
        mine = _loaded(path)
        missing = [name for name in step.names if not hasattr(mine, name)]
        if missing:
            return Verdict(False, None, f"○ step {step.number}: {path.name} has no `{missing[0]}` yet.")
        for check in step.checks:
            for finding in check(mine):
                return _told(step, finding)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file that is being written may raise anything, SystemExit included
        mark = "○" if isinstance(error, NotImplementedError) else "✗"
        return Verdict(False, None, f"{mark} step {step.number}: {_raised(error, path)}")
    return Verdict(True, None, f"✓ step {step.number}: right. {step.praise}")


def _told(step: Step, finding: Finding) -> Verdict:
    hint = step.hints[finding.mistake] if finding.mistake else ""
    text = " ".join(part for part in (hint, finding.seen) if part)
    return Verdict(False, finding.mistake or None, f"✗ step {step.number}: {text}")


def _loaded(path: Path) -> ModuleType:
    """The learner's file as a fresh module, whose functions may be exchanged."""
    spec = importlib.util.spec_from_file_location("my_minirl", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["my_minirl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _raised(error: BaseException, path: Path) -> str:
    """The error, and the lines of the learner's file that led to it."""
    own = path.resolve()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == own]
    lines = [f"    line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-4:]]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == own:
        lines = [f"    line {error.lineno}: {(error.text or '').strip()}"]
    text = (error.msg if isinstance(error, SyntaxError) else str(error)).strip().splitlines()
    what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, NotImplementedError):
        return "\n".join(["this is not written yet:", *lines])
    if not lines:
        return f"what a function of the file returned does not fit ({what}). Compare its shape with the step's text."
    return "\n".join([what, *lines])


def _answer(step: str, path: Path, folder: Path, limit: float) -> None:
    """What the process of its own does: judge, with all that the file prints or raises, and write the verdict."""
    torch.set_num_threads(1)
    asked = steps()[step]  # imports of the checks do not count
    with (folder / "stack").open("w", encoding="utf-8") as stack:
        faulthandler.dump_traceback_later(limit, exit=True, file=stack)
        answer = diagnose(asked, path)
        faulthandler.cancel_dump_traceback_later()
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Check one step, or all in order up to the first that is not right; returns 0 only if all asked are right."""
    parser = argparse.ArgumentParser(
        prog="python -m minirl_edu.course.capstone", description="Check a file of the capstone, step by step."
    )
    parser.add_argument("step", nargs="?", help=f"one of {', '.join(NUMBERS)}; without it, all in order")
    parser.add_argument("path", nargs="?", type=Path, help="the file (default: my_minirl.py)")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    step, path = arguments.step, arguments.path
    if step is not None and step not in NUMBERS and path is None:
        step, path = None, Path(step)
    path = path or Path("my_minirl.py")
    if step is not None and arguments.into is not None:
        _answer(step, path, arguments.into, arguments.limit)
        return 0
    for number in NUMBERS if step is None else [step]:
        answer = verdict(number, path, limit=arguments.limit)
        print(answer.message, flush=True)
        if not answer.right:
            return 1
    return 0
