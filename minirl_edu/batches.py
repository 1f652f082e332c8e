"""From rank 0's rollout to each rank's micro-batches.

A global step's responses are cut into mini-batches (one gradient step each), a mini-batch into one share for each rank
(whole groups, of about as many tokens as the others'), a share into micro-batches (one forward each, of a bounded
number of tokens). Each response travels with its advantage, its log-probabilities and its routes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minirl_edu.config import ConfigError
from minirl_edu.logprobs import Layout, lay_out, micro_batches
from minirl_edu.ranks import Ranks, share_rows
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes


@dataclass
class MicroBatch:
    """Rows of a mini-batch that go through the model in one forward. Routes are in the layout of that forward."""

    rows: Tensor  # [b] which rows of this rank's share
    rollout: Rollout
    layout: Layout
    advantages: Tensor  # [b]
    backward: bool  # False: advantages of 0 throughout, the forward is for the metrics
    empty: bool = False  # True: keeps step with the other ranks, counts for nothing
    logp_old: Tensor | None = None  # log π_old [b, T], once known
    forced: Routes | None = None  # the experts that updates must use (R2, R3)
    chosen: Routes | None = None  # the experts that the training engine used at θ_old


@dataclass
class MiniBatch:
    """The responses of one gradient step, and this rank's share of them."""

    rewards: Tensor  # [B]
    advantages: Tensor  # [B]
    tokens: int  # of all responses
    shares: list[Tensor]  # the rows of each rank
    parts: list[MicroBatch] = field(default_factory=list)  # of this rank
    rollout: Rollout | None = None  # all of it, without routes; on rank 0

    @property
    def responses(self) -> int:
        """B: what the mean over responses divides by, whatever the number of ranks."""
        return len(self.rewards)


@dataclass(frozen=True)
class Sampled:
    """What rank 0 has at the start of a step: `groups[m]` groups of the rollout belong to mini-batch m."""

    rollout: Rollout
    rewards: Tensor  # [B]
    groups: list[int]


_SHAPE = 6


@dataclass
class Batcher:
    """How rollouts are cut, on all ranks alike.

    group_size     G
    mini_batches   N
    tokens         slots of a micro-batch at most
    share_prompts  lay each prompt out once for its group; see `minirl_edu.logprobs`
    layers         of the routes, where there are any
    force_routes   R3: updates use the experts that came with the rollout
    backward_all   run the backward also of groups without a gradient
    """

    ranks: Ranks
    group_size: int
    mini_batches: int
    tokens: int
    share_prompts: bool
    layers: tuple[int, ...]
    force_routes: bool
    backward_all: bool

    def cut(self, sampled: Sampled | None, compute_advantages: Callable[[Tensor, int], Tensor]) -> list[MiniBatch]:
        """The mini-batches of a global step; `sampled` is rank 0's, elsewhere None. All ranks have to call this.

        Raises ConfigError where `force_routes` finds none.
        """
        ranks, size, count = self.ranks, self.group_size, self.mini_batches
        numbers = ranks.broadcast(None if sampled is None else _describe(sampled)).tolist()
        shape, rest = numbers[:_SHAPE], numbers[_SHAPE:]
        groups, tokens, costs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        rewards = ranks.broadcast(None if sampled is None else sampled.rewards).float().cpu()
        advantages = compute_advantages(rewards, size)
        ends = torch.tensor(groups).cumsum(0).tolist()
        cut = []
        for start, end, number in zip([0, *ends], ends, tokens, strict=False):
            part = slice(start * size, end * size)
            kinds = [int(not signal) for signal in self._signal(advantages[part]).tolist()]
            shares = [_rows(share, size) for share in share_rows(costs[start:end], kinds, ranks.size)]
            cut.append(MiniBatch(rewards[part], advantages[part].to(ranks.device), number, shares))

        firsts = [0, *(end * size for end in ends)]
        rollout = None if sampled is None else sampled.rollout
        if ranks.size == 1:
            assert rollout is not None
            mine = rollout
        else:
            of = list(zip(cut, firsts, strict=False))
            mine = self._scatter(
                rollout, [torch.cat([m.shares[r] + at for m, at in of]) for r in range(ranks.size)], shape
            )
        begin = 0
        for mini_batch, at in zip(cut, firsts, strict=False):
            own = mini_batch.shares[ranks.rank].to(ranks.device)
            if len(own):
                mini_batch.parts = self._micro_batches(mine.rows(begin, begin + len(own)), mini_batch.advantages[own])
            begin += len(own)
            if rollout is not None:
                mini_batch.rollout = replace(rollout, routes=None).rows(at, at + mini_batch.responses)
        self._fill_up(cut)
        return cut

    def _signal(self, advantages: Tensor) -> Tensor:
        """Which groups get a backward: those with a gradient, or all."""
        groups = (advantages != 0).view(-1, self.group_size).any(1)
        return torch.ones_like(groups) if self.backward_all else groups

    def _micro_batches(self, rollout: Rollout, advantages: Tensor) -> list[MicroBatch]:
        signal, parts = self._signal(advantages).repeat_interleave(self.group_size), []
        for rows, backward in ((signal.nonzero()[:, 0], True), ((~signal).nonzero()[:, 0], False)):
            if not len(rows):
                continue
            for inner, part, layout in micro_batches(rollout.take(rows), self.tokens, share_prompts=self.share_prompts):
                batch = MicroBatch(rows[inner], part, layout, advantages[rows[inner]], backward)
                if self.force_routes:
                    if part.routes is None:
                        raise ConfigError("algorithm.replay = 'R3': the rollout engine recorded no routes")
                    batch.forced = batch.chosen = layout.pack(part.routes)
                parts.append(batch)
        return parts

    def _scatter(self, rollout: Rollout | None, rows: list[Tensor], shape: list[int]) -> Rollout:
        """This rank's rows of rank 0's rollout."""
        width, prompt, version, layers, top_k, wide = shape
        routes = None if rollout is None else rollout.routes

        def send(name: str, columns: Sequence[int], dtype: torch.dtype) -> Tensor:
            whole = routes if name in ("experts", "valid") else rollout
            return self.ranks.scatter(None if whole is None else getattr(whole, name), rows, columns, dtype)

        tokens = send("tokens", (width,), torch.int64)
        mask = send("attention_mask", (width,), torch.bool)
        logp = send("logp_rollout", (width - prompt,), torch.float32)
        if layers:
            experts = send("experts", (width, layers, top_k), torch.uint16 if wide else torch.uint8)
            routes = Routes(experts, send("valid", (width,), torch.bool), self.layers)
        prompts = [None] * (len(tokens) // self.group_size)
        return Rollout(tokens, mask, prompt, mask[:, prompt:], logp, routes, prompts, version)

    def _fill_up(self, cut: list[MiniBatch]) -> None:
        """Empty micro-batches, so that every rank makes as many forwards, and as many backwards: parameters that are
        sharded are gathered in each."""
        if self.ranks.size == 1:
            return
        for mini_batch in cut:
            kinds = [[batch for batch in mini_batch.parts if batch.backward is kind] for kind in (True, False)]
            wanted = self.ranks.most([len(kind) for kind in kinds])
            mini_batch.parts = [
                part
                for kind, parts, number in zip((True, False), kinds, wanted, strict=True)
                for part in [*parts, *(self._empty(kind) for _ in range(number - len(parts)))]
            ]

    def _empty(self, backward: bool) -> MicroBatch:
        device = self.ranks.device
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        rollout = Rollout(tokens, mask, 1, mask[:, 1:], torch.zeros(1, 1, device=device), None, [None], 0)
        layout = lay_out(rollout, share_prompts=False)
        return MicroBatch(tokens[:0, 0], rollout, layout, torch.zeros(1, device=device), backward, empty=True)


def _describe(sampled: Sampled) -> Tensor:
    """What every rank has to know of rank 0's rollout, as integers: its shape, then for each mini-batch its groups and
    its response tokens, then for each group the tokens that a forward takes."""
    rollout, size = sampled.rollout, sampled.rollout.group_size
    routes = rollout.routes
    layers, top_k = (0, 0) if routes is None else routes.experts.shape[2:]
    wide = int(routes is not None and routes.experts.dtype == torch.uint16)
    shape = [rollout.tokens.shape[1], rollout.prompt_length, rollout.weight_version, layers, top_k, wide]
    lengths = rollout.response_mask.sum(1)
    tokens = [int(part.sum()) for part in lengths.split([groups * size for groups in sampled.groups])]
    prompts = rollout.attention_mask[::size, : rollout.prompt_length].sum(1)
    costs = prompts + (lengths - 1).view(-1, size).sum(1)
    return torch.tensor([*shape, *sampled.groups, *tokens, *costs.tolist()])


def _rows(groups: list[int], size: int) -> Tensor:
    return (torch.tensor(groups, dtype=torch.int64)[:, None] * size + torch.arange(size)).flatten()
