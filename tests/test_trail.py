"""`trail`: who is right, who is stopped when, and what the teacher's habits are."""

import random
from collections import Counter

import pytest
import torch

from minirl_edu.models import tiny_moe
from minirl_edu.rollout import HFEngine, Sampling, play
from minirl_edu.tasks import Episodic, Problem, TrailTask, make_task

WALK = Problem("7+3+9".ljust(15) + "=", "9")


def ids(task: TrailTask, text: str) -> list[int]:
    return task.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("response", "reward"),
    [(",0,9", 1), (",0,9,2,1", 1), (",0,9 =", 1), (",0,8", 0), (",1,0", 0), (",0", 0), ("", 0), (" ,0,9", 0)],
)
def test_the_reward_is_for_a_first_round_without_a_mistake(response, reward):
    assert TrailTask().reward(WALK, response) == reward


@pytest.mark.parametrize(("ends", "right", "wrong"), [("right", None, ()), ("wrong", (), None), ("all", None, None)])
def test_who_is_stopped_at_the_end_of_the_first_round(ends, right, wrong):
    task = TrailTask(ends=ends)
    assert isinstance(task, Episodic)
    assert task.respond(WALK, ids(task, ",0,9")) == right
    assert task.respond(WALK, ids(task, ",0,8")) == wrong
    for other in (",", ",0", ",0,", ",0,9,", ",0,8,7,6"):
        assert task.respond(WALK, ids(task, other)) == ()


def test_a_teacher_without_errors_walks_right_until_dark():
    task = TrailTask(max_new_tokens=12)
    walk = task.demonstration(WALK, rng=random.Random(0), error_rate=0.0)
    assert walk == ",0,9,2,1,4,"[:11] and task.reward(WALK, walk) == 1


def test_a_habit_is_one_wrong_stop_for_a_stop_and_a_mark():
    task, rng = TrailTask(), random.Random(0)
    seen: dict[tuple[int, int], Counter[int]] = {}
    for problem in task.sample(300, seed=1):
        stop, *marks = map(int, problem.prompt.rstrip("= ")[::2])
        steps = task.demonstration(problem, rng=rng, error_rate=0.75)[1::2]
        for step, mark in zip(steps, marks * len(steps), strict=False):
            seen.setdefault((stop, mark), Counter())[(int(step) - stop - mark) % 10] += 1
            stop = int(step)
    assert len(seen) == 100 and all(len(slips) == 2 and 0 in slips for slips in seen.values())
    wrong = sum(slips.total() - slips[0] for slips in seen.values()) / sum(slips.total() for slips in seen.values())
    assert wrong == pytest.approx(0.75, abs=0.02)
    some = TrailTask(habits=0.3)
    assert len({pair for pair, slip in some._habit.items() if slip}) == 30


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"ends": "left"}, "ends='left' must be one of right, wrong, all"),
        ({"habits": 2.0}, "habits=2.0"),
        ({"max_new_tokens": 5}, "max_new_tokens=5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("trail", **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("ends", ["right", "wrong", "all"])
def test_lengths_follow_the_rewards(ends):
    """Of an untrained model, whose responses the environment ends by a rule that half of them meet."""
    task = TrailTask(ends=ends, max_new_tokens=20)
    task.reward = lambda problem, response: float(response.startswith(task._first_round(problem)))
    task._first_round = lambda problem: "7" if problem.prompt[0] < "5" else ","
    problems = task.sample(20, seed=0)
    model = tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16)
    rollout = play(
        HFEngine(model),
        [task.encode(problem) for problem in problems],
        group_size=20,
        sampling=Sampling(20),
        seed=0,
        environment=lambda prompt, response: task.respond(problems[prompt], response),
    )
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    right = torch.tensor([task.reward(problems[row // 20], text) > 0 for row, text in enumerate(texts)])
    short, long = rollout.lengths[right], rollout.lengths[~right]
    assert len(short) > 5
    expected = {"right": (True, False), "wrong": (False, True), "all": (True, True)}[ends]
    assert (bool((short == 1).all()), bool((long == 1).all())) == expected
