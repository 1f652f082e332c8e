"""Which rank computes which rows: every row once, within the budget, and no rank waits for long."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from minirl_edu.balance import SHARED_MOST, Part, deal, duration

# Of Qwen3-30B-A3B: 4 · 32 · 128 operations per layer and pair of tokens, 48 layers, over 2 · 3.04e9 a token.
ATTENTION = 4 * 32 * 128 * 48 / (2 * 3.04e9)
KINDS = [{"share": share, "pack": pack} for share in (False, True) for pack in (False, True)]


def lengths(
    seed: int, *, mean: float, groups: int = 64, size: int = 16, most: int = 32767
) -> tuple[list[int], list[int]]:
    """Prompts of 80 to 400 tokens; responses with a log-normal spread of 1, half of its variance between groups."""
    generator = random.Random(seed)
    prompts, fed = [], []
    for _ in range(groups):
        prompt, group = generator.randint(80, 400), generator.gauss(0, math.sqrt(0.5))
        prompts += [prompt] * size
        fed += [
            min(most, max(1, round(mean * math.exp(group + generator.gauss(0, math.sqrt(0.5)) - 0.5))))
            for _ in range(size)
        ]
    return prompts, fed


def rounds_of(prompts: Sequence[int], fed: Sequence[int], **changes: Any) -> list[list[Part]]:
    settings = {"prompt_width": max(prompts), "group_size": 16, "budget": 34816, "size": 64, "attention": ATTENTION}
    return deal(prompts, fed, **{**settings, **changes})


def busy(prompts: Sequence[int], fed: Sequence[int], rounds: list[list[Part]], size: int, attention: float) -> float:
    """The share of the ranks' time that is spent on tokens of the batch, each row computed by itself."""
    tokens = [prompt + response for prompt, response in zip(prompts, fed, strict=True)]
    return sum(n + attention * n**2 / 2 for n in tokens) / size / duration(rounds)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_row_is_dealt_once_and_within_the_budget(kind: dict[str, bool], size: int):
    prompts, fed = lengths(0, mean=300, groups=12)
    budget = 5000
    rounds = rounds_of(prompts, fed, size=size, budget=budget, **kind)
    assert sorted(row for parts in rounds for part in parts for row in part.rows) == list(range(len(fed)))
    assert all(1 <= len(parts) <= size for parts in rounds)
    for part in (part for parts in rounds for part in parts):
        tokens = [prompts[row] + fed[row] for row in part.rows]
        if part.shared > 1:
            units = [part.rows[i : i + part.shared] for i in range(0, len(part.rows), part.shared)]
            assert all(unit[0] // 16 == unit[-1] // 16 for unit in units)
            widths = [max(prompts) + sum(fed[row] for row in unit) for unit in units]
            assert len(units) * max(widths) <= budget and max(widths) <= SHARED_MOST + budget * (not kind["pack"])
        elif kind["pack"]:
            assert sum(tokens) <= budget or len(tokens) == 1
        else:
            assert len(tokens) * (max(prompts) + max(fed[row] for row in part.rows)) <= budget or len(tokens) == 1
    assert kind["share"] or all(part.shared == 1 for parts in rounds for part in parts)


def whole_groups(prompts: Sequence[int], fed: Sequence[int]) -> float:
    """How busy 64 ranks are with 64 groups, in tokens."""
    groups = [sum(fed[start : start + 16]) + prompts[start] for start in range(0, len(fed), 16)]
    return sum(groups) / 64 / max(groups)


@pytest.mark.parametrize("seed", range(3))
def test_no_rank_waits_for_long_although_lengths_have_a_heavy_tail(seed: int):
    """64 groups on 64 ranks: with whole groups all would wait for the longest group, three quarters of the time."""
    prompts, fed = lengths(seed, mean=8000)
    assert whole_groups(prompts, fed) < 0.45
    rounds = rounds_of(prompts, fed, attention=0.0, share=True, pack=True)
    assert busy(prompts, fed, rounds, 64, 0.0) > 0.95
    # With what attention costs, rounds of a budget of tokens differ in cost: a token of a long response is dearer.
    rounds = rounds_of(prompts, fed, share=True, pack=True)
    assert busy(prompts, fed, rounds, 64, ATTENTION) > 0.85


def test_a_round_with_the_longest_response_is_filled_up_to_its_cost():
    """Otherwise each rank would wait for it in one round and work in another."""
    rounds = rounds_of([1] * 16, [99, *[9] * 15], size=2, budget=120, pack=True, attention=0.0)
    costs = [[part.cost for part in parts] for parts in rounds]
    assert costs == [[130, 120]] or (
        len(costs) == 2 and costs[0][0] - costs[0][1] <= 10 and costs[1][0] - costs[1][1] <= 10
    )


def test_rows_share_their_prompt_where_that_is_faster():
    long = rounds_of([500] * 64, [10] * 64, size=4, pack=True, share=True, budget=2000)
    assert {part.shared for parts in long for part in parts} == {16}  # a group for each rank
    apart = rounds_of([500] * 32, [10] * 32, size=4, pack=True, share=True, budget=2000)
    assert {part.shared for parts in apart for part in parts} == {8}  # half a group for each
    short = rounds_of([10] * 64, [500] * 64, size=4, pack=True, share=True, budget=4000)
    assert {part.shared for parts in short for part in parts} == {1}  # the mask would cost more than the prompts


def test_one_rank_keeps_groups_whole_and_in_order_of_their_length():
    parts = [part for (part,) in rounds_of([3] * 32, [9] * 16 + [1] * 16, size=1, share=True, budget=200)]
    assert [part.rows for part in parts] == [tuple(range(16, 32)), tuple(range(16))]


def main() -> None:
    """Print how busy ranks are: mean and lowest of 8 draws."""
    for mean in (8000, 4000):
        drawn = [lengths(seed, mean=mean) for seed in range(8)]
        shares = {"whole groups, in tokens": [whole_groups(*one) for one in drawn]}
        for name, attention in (("in tokens", 0.0), ("with attention", ATTENTION)):
            shares[name] = [
                busy(*one, rounds_of(*one, share=True, pack=True, attention=attention), 64, attention) for one in drawn
            ]
        costs = [[n + ATTENTION * n**2 / 2 for n in map(sum, zip(*one, strict=True))] for one in drawn]
        shares["possible, with attention"] = [min(1.0, sum(cost) / 64 / max(cost)) for cost in costs]
        for name, values in shares.items():
            print(f"mean length {mean}, {name}: {sum(values) / 8:.3f} (lowest {min(values):.3f})")


if __name__ == "__main__":
    main()
