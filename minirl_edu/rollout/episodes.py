"""Responses whose length and content depend on what happened: an environment ends them, or writes into them.

An `Environment` is asked after every token that the policy wrote. It lets the response go on, ends it (the answer is
right, the game is lost, the budget is spent), or writes tokens of its own (the output of a tool, a user's next turn),
which the policy reads but did not write: holes in `Rollout.response_mask`.

`play` does this with any engine, by sampling whole responses and cutting them where the environment has something to
say. That is exact: whether it speaks at a token depends on the tokens before only, so what is kept has the distribution
of a response that was stopped there. `HFEngine` asks at each token instead and samples nothing in vain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minirl_edu.rollout.base import Rollout, RolloutEngine, Sampling
from minirl_edu.routing import Routes
from minirl_edu.seeding import derive_seed

Environment = Callable[[int, Sequence[int]], Sequence[int] | None]
"""`environment(prompt, response)`: after a token that the policy wrote, with its prompt's number and the response's
tokens so far, the environment's included. None ends the response; otherwise the tokens that it writes next, mostly
none. What it answers depends on its arguments alone."""


class Turns:
    """What the environment has to say to the rows of a batch that grows by one token at a time."""

    def __init__(self, environment: Environment, rows: int, group_size: int, limit: int) -> None:
        self.environment, self.group_size, self.limit = environment, group_size, limit
        self.responses: list[list[int]] = [[] for _ in range(rows)]
        self.pending: list[list[int]] = [[] for _ in range(rows)]  # tokens of the environment that are to come

    def next(self, rows: Sequence[int], drawn: Tensor, ended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of each row, the policy's `drawn` [b, 1] or the environment's; [b] whether it is the policy's;
        and [b] whether the row goes on after it (`ended`: it is an end token)."""
        tokens, own, going = drawn[:, 0].tolist(), [], []
        for i, (row, end) in enumerate(zip(rows, ended.tolist(), strict=True)):
            response, pending = self.responses[row], self.pending[row]
            own.append(not pending)
            if pending:
                tokens[i] = pending.pop(0)
            response.append(tokens[i])
            if not own[-1]:
                going.append(True)
                continue
            answer = self.environment(row // self.group_size, tuple(response))
            over = answer is None or len(response) + len(answer) >= self.limit
            going.append(not over and (bool(answer) or not end))
            pending.extend(answer if answer and not over else ())
        next_tokens, own_rows, going_rows = (torch.tensor(x, device=drawn.device) for x in (tokens, own, going))
        return next_tokens[:, None], own_rows, going_rows


@dataclass
class _Episode:
    """One response as it grows. `sampled[i]` is True for tokens of the policy; `experts` [n, L, k] and `valid` [n] are
    the routes of the first n tokens, prompt included."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    experts: Tensor | None = None
    valid: Tensor | None = None
    over: bool = False

    def take(self, tokens: Sequence[int], logp: Sequence[float], limit: int, environment: Environment) -> int:
        """Append what the policy wrote, up to where the environment speaks, and what that says; returns how many of the
        policy's tokens were kept."""
        for kept, (token, value) in enumerate(zip(tokens, logp, strict=True), 1):
            self._append(token, True, value)
            answer = environment(self.prompt, tuple(self.tokens))
            if answer is None or len(self.tokens) + len(answer) >= limit:
                self.over = True
                return kept
            for said in answer:
                self._append(said, False, 0.0)
            if answer:
                return kept
        self.over = True
        return len(tokens)

    def _append(self, token: int, sampled: bool, logp: float) -> None:
        self.tokens.append(token)
        self.sampled.append(sampled)
        self.logp.append(logp)


def play(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    environment: Environment | None,
) -> Rollout:
    """`group_size` episodes of each prompt, at most `sampling.max_new_tokens` tokens long, the environment's included.

    A response ends where the environment ends it, at an end token to which the environment has nothing to say, at the
    limit, and where what the environment says would leave the policy no token below it. After each turn of the
    environment the engine is asked anew, with all that came before as the prompt. An engine with a method `play` of its
    own, with the same arguments, does it itself. Without an environment this is `engine.generate`.
    """
    if environment is None:
        return engine.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
    own = getattr(engine, "play", None)
    if own is not None:
        return own(prompts, group_size=group_size, sampling=sampling, seed=seed, environment=environment)
    first = engine.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
    episodes = [_Episode(row // group_size) for row in range(len(first.tokens))]
    _turn(first, episodes, sampling.max_new_tokens, environment)
    turn, asked = 0, episodes
    while asked := [episode for episode in asked if not episode.over]:
        turn += 1
        longest = max(sampling.max_new_tokens - len(episode.tokens) for episode in asked)
        more = engine.generate(
            [[*prompts[episode.prompt], *episode.tokens] for episode in asked],
            group_size=1,
            sampling=replace(sampling, max_new_tokens=longest),
            seed=derive_seed(seed, "turns", turn),
        )
        _turn(more, asked, sampling.max_new_tokens, environment)
    return _assemble(first, episodes)


def _turn(rollout: Rollout, episodes: Sequence[_Episode], limit: int, environment: Environment) -> None:
    """Give each row of a rollout to its episode."""
    for row, episode in enumerate(episodes):
        new = rollout.response_mask[row]
        drawn, logp = rollout.tokens[row, rollout.prompt_length :][new], rollout.logp_rollout[row][new]
        kept = episode.take(drawn.tolist(), logp.tolist(), limit, environment)
        if rollout.routes is not None:
            start, count = int(rollout.inputs[row].int().argmax()), int(rollout.inputs[row].sum())
            known = 0 if episode.valid is None else len(episode.valid)
            read = slice(start + known, start + count + min(kept + 1 - len(drawn), 0))
            experts, valid = rollout.routes.experts[row, read], rollout.routes.valid[row, read]
            if episode.experts is not None and episode.valid is not None:  # as they were when the tokens were drawn
                experts, valid = torch.cat([episode.experts, experts]), torch.cat([episode.valid, valid])
            episode.experts, episode.valid = experts, valid


def _assemble(first: Rollout, episodes: Sequence[_Episode]) -> Rollout:
    """The episodes as one rollout, with the prompts of `first`."""
    width, device = first.prompt_length, first.tokens.device
    length = max(len(episode.tokens) for episode in episodes)

    def table(values: list[list[Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[0] * (length - len(row))] for row in values], dtype=dtype, device=device)

    real = table([[True] * len(episode.tokens) for episode in episodes], torch.bool)
    mask = torch.cat([first.attention_mask[:, :width], real], 1)
    tokens = torch.cat([first.tokens[:, :width], table([e.tokens for e in episodes], torch.int64)], 1)
    rollout = Rollout(
        tokens=tokens,
        attention_mask=mask,
        prompt_length=width,
        response_mask=table([e.sampled for e in episodes], torch.bool),
        logp_rollout=table([e.logp for e in episodes], torch.float32),
        routes=None,
        prompts=first.prompts,
        weight_version=first.weight_version,
    )
    if first.routes is None:
        return rollout
    experts = first.routes.experts.new_zeros(*tokens.shape, *first.routes.experts.shape[2:])
    valid, inputs = torch.zeros_like(mask), rollout.inputs
    for row, episode in enumerate(episodes):
        assert episode.experts is not None and episode.valid is not None
        count = int(inputs[row].sum())
        start = int(inputs[row].int().argmax())
        experts[row, start : start + count] = episode.experts[:count]
        valid[row, start : start + count] = episode.valid[:count]
    return replace(rollout, routes=Routes(experts, valid, first.routes.layers))
