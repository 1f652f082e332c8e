"""Which rows go through the model together, and on which rank, so that no rank waits for another.

Parameters that are sharded are gathered in each forward and backward, so ranks run in step: a round, one micro-batch of
each rank, takes as long as its dearest micro-batch. Single responses are dealt out, not whole groups: with 64 groups on
64 ranks, all would wait for the group with the most tokens. Responses that share their prompt in a layout cost less
where they stay together, so parts of a group are dealt out where that is faster.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SHARED_MOST = 4096
"""Slots of a row in which responses share their prompt, where the alternative is to pack them: such a row needs a mask
of that number squared, and attention does not skip what the mask hides."""


class Part(NamedTuple):
    """Rows that go through the model in one forward.

    rows    which
    shared  how many in succession share their prompt in the layout; 1: none
    cost    of the forward, in tokens that attend to nothing
    """

    rows: tuple[int, ...]
    shared: int
    cost: float


def deal(
    prompts: Sequence[int],
    fed: Sequence[int],
    *,
    prompt_width: int,
    group_size: int,
    budget: int,
    size: int = 1,
    share: bool = False,
    pack: bool = False,
    attention: float = 0.0,
) -> list[list[Part]]:
    """The rounds of a mini-batch on `size` ranks: in each, at most one part for each rank, dearest round first. On one
    rank, parts of rows that share prompts come first, the shortest in front.

    prompts, fed  tokens of each row that a forward reads, of its prompt and of its response; rows are whole groups
    prompt_width  what to count for a prompt where rows are not packed, since it may be padded
    budget        slots of a part at most, padding included; a row with more is a part of its own
    share         layouts may share prompts          pack  rows are packed instead of padded, where they do not
    attention     cost of attending to one token, over that of a token's products with the weights

    Every rank computes the same answer from the same numbers.
    """
    divisors = [shared for shared in range(1, group_size + 1) if group_size % shared == 0]
    options = []
    for shared in [1] if not share else [group_size] if size == 1 else divisors:
        together, single = _units(fed, shared, prompt_width, min(budget, SHARED_MOST) if pack else budget)
        if options and not together:
            continue
        parts = list(_padded(together, shared, budget, size, attention))
        if pack:
            parts += _packed([(row, prompts[row] + fed[row]) for row in single], budget, size, attention)
        else:
            parts += _padded([((row,), prompt_width + fed[row]) for row in single], 1, budget, size, attention)
        if size > 1:
            parts.sort(key=lambda part: (-part.cost, part.rows))
        options.append([parts[i : i + size] for i in range(0, len(parts), size)])
    return min(options, key=duration)


def duration(rounds: Sequence[Sequence[Part]]) -> float:
    """Cost of the dearest part of each round, summed: what every rank waits for."""
    return sum(max(part.cost for part in parts) for parts in rounds)


def _units(
    fed: Sequence[int], shared: int, prompt_width: int, limit: int
) -> tuple[list[tuple[tuple[int, ...], int]], list[int]]:
    """Rows that share a prompt, with the slots they take together, and the rows that would take more than `limit`."""
    together, single = [], []
    for first in range(0, len(fed), shared):
        rows = tuple(range(first, first + shared))
        width = prompt_width + sum(fed[row] for row in rows)
        if shared == 1 or width > limit:
            single += rows
        else:
            together.append((rows, width))
    return together, single


def _padded(
    units: list[tuple[tuple[int, ...], int]], shared: int, budget: int, size: int, attention: float
) -> Iterator[Part]:
    """Parts of units of like width, all padded to the widest; as many parts as a multiple of `size` allows, all of
    about the same number of slots."""
    units = sorted(units, key=lambda unit: unit[1])  # stable
    runs = _runs(units, budget)
    if size > 1 and runs:
        most, low, high = math.ceil(len(runs) / size) * size, units[-1][1], budget
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_runs(units, middle)) <= most else (middle + 1, high)
        runs = _runs(units, max(low, 1)) if low <= budget else runs
    for run in runs:
        width = run[-1][1]
        yield Part(
            tuple(row for rows, _ in run for row in rows),
            shared,
            len(run)
            * (width + attention * width**2 / (1 if shared > 1 else 2)),  # a mask hides half, and saves nothing
        )


def _runs(units: list[tuple[tuple[int, ...], int]], budget: int) -> list[list[tuple[tuple[int, ...], int]]]:
    """Greedy runs of consecutive units whose (number · widest) stays within the budget; widths ascend."""
    runs: list[list[tuple[tuple[int, ...], int]]] = []
    for unit in units:
        if runs and (len(runs[-1]) + 1) * unit[1] <= budget:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _packed(rows: list[tuple[int, int]], budget: int, size: int, attention: float) -> list[Part]:
    """Parts that hold the rows (row, tokens): rounds of `size` parts of about the same cost, as few as there can be, or
    one more if that is faster."""
    costs = {row: tokens + attention * tokens**2 / 2 for row, tokens in rows}
    order = sorted(rows, key=lambda item: (-costs[item[0]], item[0]))
    least, options = math.ceil(sum(min(tokens, budget) for _, tokens in rows) / (size * budget)), []
    for count in range(least, least + 1 + len(rows)):
        if (rounds := _fill(order, costs, budget, size, count)) is not None:
            options.append(rounds)
        if len(options) == 2:
            break
    return [part for parts in min(options, key=duration, default=[]) for part in parts]


def _fill(
    order: list[tuple[int, int]], costs: dict[int, float], budget: int, size: int, count: int
) -> list[list[Part]] | None:
    """`count` rounds, filled one after the other up to a level: its dearest row, or what is left for each part. The
    dearest row first, each to the part that costs least so far. None if the rows do not fit."""
    rounds = []
    for left in range(count, 0, -1):
        level = max([costs[row] for row, _ in order[:1]] + [sum(costs[row] for row, _ in order) / (left * size)])
        heap, held, later = (
            [(0.0, 0, i) for i in range(size)],
            [list[int]() for _ in range(size)],
            list[tuple[int, int]](),
        )
        for row, tokens in order:
            aside = []
            while heap:
                cost, slots, i = heapq.heappop(heap)
                fits = not held[i] or (slots + tokens <= budget and (left == 1 or cost + costs[row] <= level))
                aside.append((cost + costs[row], slots + tokens, i) if fits else (cost, slots, i))
                if fits:
                    held[i].append(row)
                    break
            else:
                later.append((row, tokens))
            for item in aside:
                heapq.heappush(heap, item)
        cost_of = {i: cost for cost, _, i in heap}
        rounds.append([Part(tuple(sorted(rows)), 1, cost_of[i]) for i, rows in enumerate(held) if rows])
        order = later
    return None if order else [parts for parts in rounds if parts]
