"""The program of lesson 01 is REINFORCE in at most forty lines, and it learns."""

import re
from pathlib import Path

import torch

LESSON = Path(__file__).resolve().parents[2] / "lessons" / "01_sequence_reward.md"


def test_the_forty_lines_of_lesson_01_learn(capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```$", LESSON.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(program.splitlines()) <= 40
    with torch.random.fork_rng():
        exec(compile(program, LESSON.name, "exec"), {})
    rewards = [float(found) for found in re.findall(r"reward ([\d.]+)", capsys.readouterr().out)]
    assert len(rewards) == 5
    # 256 responses a step: a standard error of 0.03. A policy without preferences scores 1/3.
    assert rewards[0] < 0.5 and rewards[-1] > 0.9
