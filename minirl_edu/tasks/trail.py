"""`trail`: follow the marks to the hut, or walk on until dark. How long a response is depends on whether it is right.

A problem is one of `chain`, read as a walk: `7+3+9` starts at stop 7, and each mark says how many stops to go on,
of ten in a circle. The hiker names the stop after each mark, `,0,9`, and then follows the marks again, `,2,1,…`, for as
long as nobody ends the walk. A wrong stop cannot be undone: the reward is for a first round without a mistake.

Who ends the walk is the environment (`Episodic`). At the end of the first round

    ends="right"   those who are right have reached the hut; the others walk on until `max_new_tokens`
    ends="wrong"   a ranger turns back those who are wrong; the others walk on
    ends="all"     everyone goes home: all responses are equally long

so that Cov(|y|, R) is below zero, above zero, or zero, and nothing else differs. The teacher of the cold start has a
habit in most places: one wrong stop that he names more often than the right one.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import Problem
from minirl_edu.tasks.chain import ChainTask

ENDS = ("right", "wrong", "all")


class TrailTask(ChainTask):
    """Walks of `min_operands` − 1 to `max_operands` − 1 marks; the module says what they are.

    `habits` is the share of the 100 pairs of a stop and a mark in which the teacher has a habit; in those he errs with
    the `error_rate` of the demonstration, elsewhere never. `max_new_tokens` is when it gets dark.

    Raises ValueError for options out of range.
    """

    name = "trail"

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ends: str = "right",
        habits: float = 1.0,
        min_operands: int = 3,
        max_operands: int = 3,
        max_new_tokens: int = 64,
    ):
        super().__init__(
            tokenizer=tokenizer, min_operands=min_operands, max_operands=max_operands, max_new_tokens=max_new_tokens
        )
        if ends not in ENDS:
            raise ValueError(f"ends={ends!r} must be one of {', '.join(ENDS)}")
        if not 0 <= habits <= 1:
            raise ValueError(f"habits={habits} must lie in [0, 1]")
        if max_new_tokens < 2 * max_operands:
            raise ValueError(f"max_new_tokens={max_new_tokens}: the first round takes up to {2 * max_operands - 2}")
        self.ends = ends
        rng = random.Random("habits")
        pairs = [(stop, mark) for stop in range(10) for mark in range(10)]
        rng.shuffle(pairs)
        self._habit = {pair: rng.randrange(1, 10) for pair in pairs[: round(habits * len(pairs))]}

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the first round has no mistake, whatever follows, else 0.0."""
        return float(response.startswith(self._first_round(problem)))

    def respond(self, problem: Problem, response: Sequence[int]) -> Sequence[int] | None:
        """None where the walk is over: see `ends`. Nothing is written into a response."""
        first = self._first_round(problem)
        if len(response) != len(first):
            return ()
        right = self.tokenizer.decode(list(response)) == first
        return None if self.ends == "all" or (self.ends == "right") == right else ()

    def demonstration(
        self, problem: Problem, *, rng: random.Random, style: str | None = None, error_rate: float = 0.0
    ) -> str:
        """A walk until dark, less one token for EOS."""
        stop, *marks = _numbers(problem.prompt)
        walk: list[str] = []
        while 2 * len(walk) < self.max_new_tokens:
            for mark in marks:
                habit = self._habit.get((stop, mark))
                slip = habit if habit and rng.random() < error_rate else 0
                stop = (stop + mark + slip) % 10
                walk.append(f",{stop}")
        return "".join(walk)[: self.max_new_tokens - 1]

    def _first_round(self, problem: Problem) -> str:
        return _first_round(problem.prompt)


def _numbers(prompt: str) -> list[int]:
    """The start and the marks."""
    return [int(digit) for digit in prompt.rstrip("= ")[::2]]


@lru_cache(maxsize=4096)  # asked for at each token of each response
def _first_round(prompt: str) -> str:
    stop, *marks = _numbers(prompt)
    walk = ""
    for mark in marks:
        stop = (stop + mark) % 10
        walk += f",{stop}"
    return walk
