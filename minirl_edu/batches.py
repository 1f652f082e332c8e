"""From a rollout to micro-batches, in the machine's own memory: the trainer moves one at a time to its device.

A global step's responses are cut into mini-batches (one gradient step each), a mini-batch into micro-batches (one
forward each, of a bounded number of tokens). Each response travels with its advantage, its log-probabilities and its
routes. On several processes, `minirl_edu.ranks.RankedBatcher` first gives each its share of every mini-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minirl_edu.config import ConfigError
from minirl_edu.logprobs import Layout, micro_batches
from minirl_edu.rollout import EngineError, Rollout
from minirl_edu.routing import Routes


@dataclass
class MicroBatch:
    """Rows of a mini-batch that go through the model in one forward. Routes are in the layout of that forward."""

    rows: Tensor  # [b] which rows of the mini-batch (of this rank's share of it)
    rollout: Rollout
    layout: Layout
    advantages: Tensor  # [b]
    has_gradient: bool  # False: advantages of 0 throughout, the forward is for the metrics
    empty: bool = False  # True: keeps step with the other ranks, counts for nothing
    logp_old: Tensor | None = None  # log π_old [b, T], once known
    routes_forced: Routes | None = None  # the experts that updates must use (R2, R3)
    routes_old: Routes | None = None  # the experts that the training engine used at θ_old


@dataclass
class MiniBatch:
    """The responses of one gradient step."""

    rewards: Tensor  # [B]
    advantages: Tensor  # [B]
    tokens: int  # of all responses
    width: int  # T
    parts: list[MicroBatch] = field(default_factory=list)  # of this rank
    rollout: Rollout | None = None  # all of it, without routes; on the main process
    shares: list[Tensor] = field(default_factory=list)  # the rows of each rank, where there are several

    @property
    def responses(self) -> int:
        """B: what the mean over responses divides by, whatever the number of ranks."""
        return len(self.rewards)


@dataclass(frozen=True)
class Sampled:
    """What a global step starts from: `groups[m]` groups of the rollout belong to mini-batch m."""

    rollout: Rollout
    rewards: Tensor  # [B]
    groups: list[int]


def trainable_groups(
    rollout: Rollout, *, mini_batches: int, drop: bool, num_experts: int | None, suppressed: Tensor | None
) -> tuple[list[int], list[int]]:
    """Which groups of a rollout can be trained on (all, or with `drop` those without a fault), and how many of them
    each mini-batch has. `suppressed` [V] is True for tokens that the policy never says.

    Raises EngineError for a fault without `drop`, for a mini-batch that has no group left, and for a token that is
    suppressed: an engine of the user's may not know those.
    """
    drawn = rollout.tokens[:, rollout.prompt_length :][rollout.response_mask]
    if suppressed is not None and suppressed[drawn].any():
        raise EngineError(
            f"tokens: the engine drew id {int(drawn[suppressed[drawn]][0])}, which the tokenizer does not know; it "
            "has to leave out the suppress_tokens of the model's generation config"
        )
    faults = rollout.faults(num_experts=num_experts)
    faulty = {row // rollout.group_size for row in faults}
    kept = [group for group in range(len(rollout.prompts)) if group not in faulty]
    prompts = len(rollout.prompts) // mini_batches
    groups = [sum(group // prompts == m for group in kept) for m in range(mini_batches)]
    if faults and (not drop or not all(groups)):
        fault, count = next(iter(faults.values())), f"{len(faults)} of {len(rollout.tokens)} responses"
        advice = "rollout.on_fault: drop leaves out their groups" if all(groups) else "a mini-batch has none left"
        raise EngineError(f"{fault}; {count} cannot be trained on: {advice}")
    return kept, groups


def count_flips(parts: list[MicroBatch]) -> tuple[float, float, float]:
    """Σ over tokens of the share of layers whose experts at θ_old differ from the rollout engine's, those tokens, and
    the micro-batches of which one of the two is not known."""
    flips = tokens = unknown = 0.0
    for batch in (batch for batch in parts if not batch.empty):
        if batch.routes_old is None or batch.rollout.routes is None:
            unknown += 1
            continue
        inputs = batch.rollout.inputs
        rate = batch.layout.unpack(batch.routes_old).flip_rate(batch.rollout.routes, inputs).mean()
        flips += float(rate) * int(inputs.sum())
        tokens += int(inputs.sum())
    return flips, tokens, unknown


@dataclass
class Batcher:
    """How rollouts are cut.

    group_size     G
    mini_batches   N
    tokens         slots of a micro-batch at most
    share_prompts  lay each prompt out once for its group; see `minirl_edu.logprobs`
    pack           pack the rows that do not share theirs
    attention      cost of attending to one token, over that of a token's products with the weights
    force_routes   R3: updates use the experts that came with the rollout
    backward_all   run the backward also of groups without a gradient
    """

    group_size: int
    mini_batches: int
    tokens: int
    share_prompts: bool
    pack: bool
    attention: float
    force_routes: bool
    backward_all: bool

    def cut(self, sampled: Sampled, compute_advantages: Callable[[Tensor, int], Tensor]) -> list[MiniBatch]:
        """The mini-batches of a global step. Raises ConfigError where `force_routes` finds no routes."""
        rewards = sampled.rewards.float().cpu()
        advantages = compute_advantages(rewards, self.group_size)
        cut, start = [], 0
        for groups in sampled.groups:
            end = start + groups * self.group_size
            rollout = sampled.rollout.rows(start, end)
            own, tokens = advantages[start:end], int(rollout.response_mask.sum())
            parts, width = self.micro_batches(rollout, own), rollout.response_mask.shape[1]
            cut.append(MiniBatch(rewards[start:end], own, tokens, width, parts, replace(rollout, routes=None)))
            start = end
        return cut

    def micro_batches(self, rollout: Rollout, advantages: Tensor) -> list[MicroBatch]:
        """Rows of a mini-batch, first those of groups with a gradient, each in as few forwards as `tokens` allows."""
        gradient, parts = self.has_gradient(advantages).repeat_interleave(self.group_size), []
        for rows, has_gradient in ((gradient.nonzero()[:, 0], True), ((~gradient).nonzero()[:, 0], False)):
            if not len(rows):
                continue
            cuts = micro_batches(rollout.take(rows), self.tokens, share_prompts=self.share_prompts, pack=self.pack)
            parts += [self.laid_out(rows[r], part, layout, advantages, has_gradient) for r, part, layout in cuts]
        return parts

    def laid_out(
        self, rows: Tensor, part: Rollout, layout: Layout, advantages: Tensor, has_gradient: bool
    ) -> MicroBatch:
        """The micro-batch of these rows, with the experts that it must use. Raises ConfigError where it has none."""
        batch = MicroBatch(rows, part, layout, advantages[rows], has_gradient)
        if self.force_routes:
            if part.routes is None:
                raise ConfigError("algorithm.replay = 'R3': the rollout engine recorded no routes")
            batch.routes_forced = batch.routes_old = layout.pack(part.routes)
        return batch

    def has_gradient(self, advantages: Tensor) -> Tensor:
        """Which groups get a backward: those with an advantage other than 0, or all."""
        groups = (advantages != 0).view(-1, self.group_size).any(1)
        return torch.ones_like(groups) if self.backward_all else groups

    def collect(self, outputs: list[tuple[Tensor, ...]], mini_batch: MiniBatch) -> list[Tensor]:
        """Per-token results [B, T] of a mini-batch from those of its micro-batches, each (rows, result, result, …)."""
        return in_order(outputs, mini_batch.responses, mini_batch.width)


def in_order(outputs: list[tuple[Tensor, ...]], responses: int, width: int) -> list[Tensor]:
    """The columns of `outputs`, each (rows, result [b, t ≤ width], …), as tensors [responses, width]."""
    _, *columns = outputs[0]
    whole = [column.new_zeros(responses, width) for column in columns]
    for rows, *results in outputs:
        for tensor, result in zip(whole, results, strict=True):
            tensor[rows, : result.shape[1]] = result
    return whole
