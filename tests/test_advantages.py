"""Advantages: group by group, exactly 0 where there is nothing to prefer."""

import math

import pytest
import torch

from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages, leave_one_out_advantages

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 1.0, 1.0, 5.0])  # two groups of four
EVERY = [group_mean_advantages, group_mean_std_advantages, leave_one_out_advantages]


def test_group_mean_by_hand():
    assert group_mean_advantages(REWARDS, 4).tolist() == [0.75, -0.25, -0.25, -0.25, 2, -2, -2, 2]


def test_group_mean_std_by_hand():
    # First group: mean 1/4, variance 1/4 · 3/4; second: mean 3, deviation 2.
    first = [x / math.sqrt(3 / 16) for x in (0.75, -0.25, -0.25, -0.25)]
    assert group_mean_std_advantages(REWARDS, 4, eps=0.0).tolist() == pytest.approx([*first, 1, -1, -1, 1], rel=1e-6)
    assert group_mean_std_advantages(REWARDS, 4, eps=2.0)[4:].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_leave_one_out_is_the_mean_of_the_others():
    expected = []
    for start in (0, 4):
        group = REWARDS[start : start + 4].tolist()
        expected += [group[i] - sum(group[:i] + group[i + 1 :]) / 3 for i in range(4)]
    assert leave_one_out_advantages(REWARDS, 4).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("advantages", EVERY)
def test_equal_rewards_give_exactly_zero(advantages):
    # 0.1 is no binary fraction: a mean of seven of them need not be 0.1 in fp32, and dividing by a tiny std would show.
    rewards = torch.tensor([0.1] * 7 + [0.3] * 7)
    assert advantages(rewards, 7).tolist() == [0.0] * 14


def test_group_of_one():
    rewards = torch.tensor([1.0, 3.0])
    assert group_mean_advantages(rewards, 1).tolist() == [0, 0]
    assert group_mean_std_advantages(rewards, 1).tolist() == [0, 0]
    with pytest.raises(ValueError, match="group_size is 1"):
        leave_one_out_advantages(rewards, 1)


@pytest.mark.parametrize("advantages", EVERY)
@pytest.mark.parametrize(
    ("rewards", "group_size"), [(torch.zeros(6), 4), (torch.zeros(4, 4), 4), (torch.zeros(4), 0), (torch.zeros(4), -2)]
)
def test_wrong_size_is_named(advantages, rewards, group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}"):
        advantages(rewards, group_size)


@pytest.mark.parametrize("advantages", EVERY)
def test_a_reward_that_is_not_finite_is_named(advantages):
    with pytest.raises(ValueError, match="rewards has nan"):
        advantages(torch.tensor([0.0, math.nan]), 2)


def test_dtypes():
    assert group_mean_advantages(REWARDS.bool(), 4).tolist()[:4] == [0.75, -0.25, -0.25, -0.25]
    assert group_mean_advantages(REWARDS.bfloat16(), 4).dtype == torch.float32
    assert group_mean_advantages(REWARDS.double(), 4).dtype == torch.float64


@pytest.mark.parametrize("advantages", EVERY)
def test_no_responses_have_no_advantages(advantages):
    assert advantages(torch.zeros(0), 4).shape == (0,)
