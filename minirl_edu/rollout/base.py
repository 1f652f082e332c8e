"""The batch that flows through everything, and the contract of an engine that makes it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.routing import Routes


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: softmax(logits / `temperature`), no top-p or top-k, until an end token or
    `max_new_tokens`."""

    max_new_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} leaves no room for a response; use 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} must be positive; rollouts are sampled, not greedy")


@dataclass(frozen=True)
class Rollout:
    """Responses to `len(prompts)` prompts, `group_size` each, grouped by prompt: B rows of S = P + T columns.

    tokens          [B, S] prompt (padded on the left to P = `prompt_length`), then response (padded on the right)
    attention_mask  [B, S] True on real tokens
    response_mask   [B, T] True on the tokens that the policy wrote, the end token included. Holes are real tokens that
                    the environment wrote (see `rollout.episodes`): read, but neither trained on nor measured
    logp_rollout    [B, T] log μ_old(y_t | x, y_<t) in nats under the distribution each token was drawn from
                    (temperature included); 0 where masked
    routes          the experts chosen by the engine, row t for token t as an input ([B, S]; the last token of a
                    response was never an input), or None
    prompts         the problems or token ids that were asked for, one per group
    weight_version  which sync of the engine sampled this
    """

    tokens: Int[Tensor, "B S"]
    attention_mask: Bool[Tensor, "B S"]
    prompt_length: int
    response_mask: Bool[Tensor, "B T"]
    logp_rollout: Float[Tensor, "B T"]
    routes: Routes | None
    prompts: Sequence[Any]
    weight_version: int

    @property
    def group_size(self) -> int:
        """Responses per prompt, G."""
        return len(self.tokens) // len(self.prompts)

    @property
    def responses(self) -> list[list[int]]:
        """The response token ids of each row, without padding and with the end token; the environment's included."""
        real = self.attention_mask[:, self.prompt_length :]
        return [row[mask].tolist() for row, mask in zip(self.tokens[:, self.prompt_length :], real, strict=True)]

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """Tokens of each response, the environment's included: what a forward has to read, and one more."""
        return self.attention_mask[:, self.prompt_length :].sum(1)

    def take(self, rows: Int[Tensor, "b"]) -> "Rollout":
        """The responses `rows`, in that order: whole groups if they are that, else each row a group of its own."""
        size = self.group_size
        firsts = rows[::size]
        whole = bool(
            len(rows) % size == 0
            and (firsts % size == 0).all()
            and torch.equal(rows.view(-1, size), firsts[:, None] + torch.arange(size, device=rows.device))
        )
        return replace(
            self,
            tokens=self.tokens[rows],
            attention_mask=self.attention_mask[rows],
            response_mask=self.response_mask[rows],
            logp_rollout=self.logp_rollout[rows],
            routes=None if self.routes is None else self.routes[rows],
            prompts=[self.prompts[group] for group in ((firsts if whole else rows) // size).tolist()],
        )

    def rows(self, start: int, stop: int) -> "Rollout":
        """The responses `start` to `stop`, without a copy; see `take`."""
        part, size = slice(start, stop), self.group_size
        whole = start % size == 0 and stop % size == 0
        return replace(
            self,
            tokens=self.tokens[part],
            attention_mask=self.attention_mask[part],
            response_mask=self.response_mask[part],
            logp_rollout=self.logp_rollout[part],
            routes=None if self.routes is None else self.routes[part],
            prompts=[self.prompts[row // size] for row in range(start, stop, size if whole else 1)],
        )

    def trimmed(self) -> "Rollout":
        """The rollout without the columns that are padding in every row."""
        real = self.attention_mask.any(0).nonzero()[:, 0]
        first, end = int(real[0]), int(real[-1]) + 1
        length = end - self.prompt_length
        return replace(
            self,
            tokens=self.tokens[:, first:end],
            attention_mask=self.attention_mask[:, first:end],
            prompt_length=self.prompt_length - first,
            response_mask=self.response_mask[:, :length],
            logp_rollout=self.logp_rollout[:, :length],
            routes=None if self.routes is None else self.routes[:, first:end],
        )

    def compact(self) -> "Rollout":
        """The same rollout in the machine's own memory, where a long one has room, with token ids of 4 bytes."""
        return replace(self.to("cpu"), tokens=self.tokens.to("cpu", torch.int32))

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout on `device`."""
        moved = {n: getattr(self, n).to(device) for n in ("tokens", "attention_mask", "response_mask", "logp_rollout")}
        return replace(self, routes=None if self.routes is None else self.routes.to(device), **moved)

    def without(self, groups: Collection[int]) -> "Rollout":
        """The rollout without these groups (the responses to `prompts[group]`). Raises ValueError if none remains."""
        count, size = len(self.prompts), self.group_size
        kept = [group for group in range(count) if group not in groups]
        if not kept:
            raise ValueError(f"groups: without {len(groups)} of {count} none remains")
        rows = [row for group in kept for row in range(group * size, (group + 1) * size)]
        return self.take(torch.tensor(rows, device=self.tokens.device))

    def bytes_per_token(self) -> dict[str, float]:
        """Memory of each part, in bytes per real token (padding is paid for by them)."""
        tokens = int(self.attention_mask.sum())
        parts = {
            "tokens": [self.tokens],
            "masks": [self.attention_mask],
            "log-probabilities": [self.logp_rollout],
            "routes": [] if self.routes is None else [self.routes.experts, self.routes.valid],
        }
        return {name: sum(t.numel() * t.element_size() for t in held) / tokens for name, held in parts.items()}

    def faults(self, *, num_experts: int | None = None) -> dict[int, str]:
        """Row → what is wrong with it, for each response that cannot be trained on, in the order of the rows.

        - a log-probability that is none: NaN (an engine's mark for a missing one), infinite or positive;
        - routes that do not cover the row's `inputs`: missing, or of the wrong length;
        - with `num_experts` E, routes that no router with E experts could have chosen (see `Routes.validate`).

        The group of a row is `row // group_size`.
        """
        found: dict[int, str] = {}
        wrong = self.response_mask & (~torch.isfinite(self.logp_rollout) | (self.logp_rollout > 1e-4))
        for row in _rows_with(wrong):
            column = int(wrong[row].nonzero()[0])
            value = self.logp_rollout[row, column].item()
            found[row] = f"logp_rollout: {value} at row {row}, token {column} is no log-probability"
        if self.routes is not None:
            missing = self.inputs & ~self.routes.valid
            for row in _rows_with(missing):
                column = int(missing[row].nonzero()[0])
                found.setdefault(row, f"routes: none for row {row}, token {column}, which was an input of the engine")
            if num_experts is not None:
                self._add_impossible_routes(found, num_experts)
        return dict(sorted(found.items()))

    def _add_impossible_routes(self, found: dict[int, str], num_experts: int) -> None:
        """Among the rows that are not in `found`. One by one only if something is wrong with them together."""
        assert self.routes is not None
        rows = [row for row in range(len(self.tokens)) if row not in found]
        routes = self.routes[rows] if found else self.routes  # no copy where nothing is wrong: they can be gigabytes
        if not rows or not (together := _refusal(routes, num_experts)):
            return
        alone = {row: _refusal(self.routes[row : row + 1], num_experts).replace("b=0", f"b={row}", 1) for row in rows}
        # A layer of zeros may be nobody's fault alone: then it is everybody's.
        found |= {row: fault for row, fault in alone.items() if fault} or dict.fromkeys(rows, together)

    def validate(self, *, num_experts: int | None = None, keep_faulty: bool = False) -> "Rollout":
        """Check the contract and return self; raises ValueError naming the field and the row.

        `num_experts` bounds the routes' ids. `keep_faulty` checks only how the parts fit together, and lets pass the
        `faults` of single responses.
        """
        (rows, width), length = self.tokens.shape, self.response_mask.shape[1]
        if width != self.prompt_length + length:
            raise ValueError(f"tokens: {width} columns, but prompt_length + T = {self.prompt_length} + {length}")
        for name in ("attention_mask", "response_mask", "logp_rollout"):
            expected = (rows, width if name == "attention_mask" else length)
            if (shape := tuple(getattr(self, name).shape)) != expected:
                raise ValueError(f"{name}: shape {shape}, expected {expected}")
        if not self.prompts or rows % len(self.prompts):
            raise ValueError(
                f"prompts: {rows} rows are not a whole number of responses to each of {len(self.prompts)} prompts"
            )
        real = self.attention_mask[:, self.prompt_length :]
        if (self.response_mask & ~real).any():
            raise ValueError("response_mask: true where attention_mask is not")
        prompt = self.attention_mask[:, : self.prompt_length]
        if (prompt[:, :-1] & ~prompt[:, 1:]).any() or not prompt[:, -1].all():
            raise ValueError("attention_mask: prompts must be padded on the left and hold at least one token")
        if (~real[:, :-1] & real[:, 1:]).any() or not self.response_mask[:, 0].all():
            raise ValueError(
                "attention_mask: each response must be one run from column 0 on, and its first token the policy's"
            )
        if self.routes is not None and self.routes.valid.shape != self.tokens.shape:
            raise ValueError(
                f"routes: rows for {tuple(self.routes.valid.shape)} tokens, but the batch is {(rows, width)}"
            )
        if not keep_faulty and (faults := self.faults(num_experts=num_experts)):
            raise ValueError(next(iter(faults.values())))
        return self

    @property
    def inputs(self) -> Bool[Tensor, "B S"]:
        """True on tokens that the engine read as inputs: all real tokens but the last of each response."""
        follows = torch.zeros_like(self.attention_mask)
        follows[:, :-1] = self.attention_mask[:, 1:]
        return self.attention_mask & follows


def _rows_with(marks: Bool[Tensor, "B n"]) -> list[int]:
    """The rows that have a mark."""
    return marks.any(1).nonzero()[:, 0].tolist()


def _refusal(routes: Routes, num_experts: int) -> str:
    """Why `Routes.validate` refuses them; "" if it does not."""
    try:
        routes.validate(num_experts)
    except ValueError as error:
        return str(error)
    return ""


ON_FAULT = "rollout.on_fault: drop leaves out the group of such a response, and counts it"
"""What to do about a response that cannot be trained on, for messages."""


class EngineError(RuntimeError):
    """A rollout engine that cannot go on; the message says what was seen and what to do."""


def accept(rollout: Rollout, *, num_experts: int | None = None, keep_faulty: bool = False) -> Rollout:
    """What an engine's `generate` returns: the rollout, after the checks of `Rollout.validate`.

    Raises EngineError for what is wrong with it, naming the field and the row.
    """
    try:
        rollout.validate(keep_faulty=True)
    except ValueError as error:
        raise EngineError(str(error)) from None
    if not keep_faulty and (faults := rollout.faults(num_experts=num_experts)):
        fault, count = next(iter(faults.values())), f"{len(faults)} of {len(rollout.tokens)} responses"
        raise EngineError(f"{fault}; {count} cannot be trained on; {ON_FAULT}")
    return rollout


@runtime_checkable
class RolloutEngine(Protocol):
    """An inference engine that samples responses with its own copy of the weights, μ_old."""

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        """Sample `group_size` responses to each prompt (token ids). The same seed, weights and prompts give the same
        rollout. Raises EngineError for a response that cannot be trained on, unless told to keep such, marked: see
        `Rollout.faults`."""
        ...

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        """Take the training engine's weights as the new θ_old; whatever was cached for the old ones is dropped."""
        ...

    def close(self) -> None:
        """Give back memory and processes. An engine that was closed refuses to generate."""
        ...
