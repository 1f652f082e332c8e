"""The capstone: a learner's `my_minirl.py`, checked step by step. lessons/capstone.md says what to write.

python -m minirl_edu.course.capstone 03 my_minirl.py    one step, or without a number all of them
"""

from pathlib import Path

STEPS = tuple(f"{number:02d}" for number in range(1, 9))


def check_file(step: str, path: str | Path = "my_minirl.py") -> None:
    """Print whether the learner's file is right up to what a step asks, or else the first mistake and its hint."""
    print(_verdict(step, Path(path)))


def _verdict(step: str, path: Path) -> str:
    if step not in STEPS:
        return f"○ no step {step!r}: there are {', '.join(STEPS)}"
    if not path.exists():
        return f"○ step {step}: there is no {path.name} yet. Make an empty file of that name beside this notebook."
    return f"○ step {step}: not checked yet"
