"""What the checks of all steps use: a step as data, findings, a table as a policy, and ways to watch a file at work."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirl_edu.course import differs

VOCABULARY = "0123456789+-*=, _."
PAD, END, WIDTH, LIMIT = 16, 17, 16, 11


class Finding(NamedTuple):
    """A known mistake by its name, or "" for one that nobody has named; and what was seen, in words."""

    mistake: str
    seen: str = ""


Check = Callable[[Any], Iterator[Finding]]
"""Looks at the learner's module and yields what is wrong. Only the first finding counts."""


@dataclass(frozen=True)
class Step:
    """What a step asks for: names, checks in order, hints by the name of the mistake, and what to remember."""

    number: str
    names: tuple[str, ...]
    hints: Mapping[str, str]
    checks: tuple[Check, ...]
    praise: str


def step(number: str, names: str, text: str, *checks: Check) -> Step:
    """A step from a text: a line `- name of a mistake: its hint` for each mistake, and at the end what to remember.

    A line that belongs to the one above is indented.
    """
    listed, _, praise = text.strip().rpartition("\n\n")
    items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", listed)]
    hints = dict(item.removeprefix("- ").split(": ", 1) for item in items)
    return Step(number, tuple(names.split()), hints, checks, " ".join(praise.split()))


def named(
    what: str, found: Any, right: Any, known: Mapping[str, Any] | None = None, *, rtol: float = 1e-3, atol: float = 1e-5
) -> Iterator[Finding]:
    """Nothing if the numbers are right; else the known mistake that gives the numbers found, or how they differ."""
    seen = differs(found, right, rtol, atol)
    if seen is None:
        return
    for mistake, numbers in (known or {}).items():
        if differs(found, numbers, rtol, atol) is None:
            yield Finding(mistake)
            return
    yield Finding("", f"{what} {seen}")


@contextlib.contextmanager
def watched(mine: Any, name: str, watch: Callable[..., Any]) -> Iterator[None]:
    """Within: every call of the learner's function goes through `watch(function, *arguments)`."""
    function = getattr(mine, name)
    setattr(mine, name, lambda *args, **kwargs: watch(function, *args, **kwargs))
    try:
        yield
    finally:
        setattr(mine, name, function)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def rollout(mine: Any, **fields: Tensor) -> Any:
    """A `Rollout` of the learner's with these fields; those that a later step adds are filled with zeros."""
    tokens = fields["tokens"]
    absent = {
        "logp": torch.zeros(fields["mask"].shape),
        "rewards": torch.zeros(len(tokens)),
        "advantages": torch.zeros(len(tokens)),
        "routes": torch.zeros(len(tokens), tokens.shape[1] - 1, 1, 1, dtype=torch.long),
    }
    return mine.Rollout(**{name: fields.get(name, absent.get(name)) for name in mine.Rollout._fields})


# ---- a policy that is a table: row = last token, entry = logit of the next


def table_forward(w: dict[str, Tensor], tokens: Tensor, routes: Tensor | None = None, cache: Any = None) -> Any:
    """Stands in for the learner's `forward`: logits from the table, and routes that mean nothing."""
    logits = w["next_proj"][tokens]
    return logits, torch.zeros(*tokens.shape, 1, 1, dtype=torch.long) if routes is None else routes


def table(seed: int) -> Tensor:
    """Random logits [V, V] under which about half of the responses look like `,7`."""
    logits = torch.randn(18, 18, generator=seeded(seed))
    comma, digits = VOCABULARY.index(","), slice(0, 10)
    logits[VOCABULARY.index("="), comma] += 4
    logits[comma, digits] += 4
    logits[digits, END] += 4
    return logits


def few_words(seed: int) -> Tensor:
    """Logits [V, V] under which only `7`, `,` and END ever occur, in float64."""
    logits = torch.full((18, 18), -60.0, dtype=torch.float64)
    words = [VOCABULARY.index("7"), VOCABULARY.index(","), END]
    logits[:, words] = torch.randn(18, 3, generator=seeded(seed), dtype=torch.float64)
    return logits


def every_response() -> tuple[Tensor, Tensor]:
    """All responses of at most three of those words, after one prompt: tokens [15, S] and mask [15, 3]."""
    words = [VOCABULARY.index("7"), VOCABULARY.index(","), END]
    finished, going = [], [[]]
    for _ in range(3):
        going = [[*text, word] for text in going for word in words]
        finished += [text for text in going if text[-1] == END]
        going = [text for text in going if text[-1] != END]
    finished += going
    prompt = [VOCABULARY.index(c) for c in "3+4+9".ljust(WIDTH - 1) + "="]
    tokens = torch.tensor([[*prompt, *text, *[PAD] * (3 - len(text))] for text in finished])
    mask = torch.tensor([[i < len(text) for i in range(3)] for text in finished])
    return tokens, mask


def of_table(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(y_t) [B, T] under a table, 0 outside the mask."""
    last, drawn = tokens[:, WIDTH - 1 : -1], tokens[:, WIDTH:]
    return torch.where(mask, logits.log_softmax(-1)[last, drawn], 0.0)
