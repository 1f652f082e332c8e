"""Exercises of lab 04: how stale a rollout is, and what the clip mask drops."""

import math
from functools import partial

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import EPS_HIGH, EPS_LOW, dropped, gradient, masked_mean, surrogate


def _age(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step - 1, mini_batches)
    return done + 1, updates, done


def _age_but(change: Answer) -> Answer:
    """With another number of updates or version than the right ones."""

    def answer(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
        step, updates, version = _age(grad_step, mini_batches)
        return (step, *change(grad_step, mini_batches, updates, version))

    return answer


EX1 = exercise(
    """04.1 How stale is this update? (difficulty 1, importance 3, 5 minutes)

    1. Write down N = 4 and the gradient steps 1 to 9. Where does a new rollout begin?
    2. Counting from 0 makes it a division with remainder: `divmod(grad_step - 1, mini_batches)`.
    3. The engine got its weights after the last *finished* global step. That number is the version.

    - counted from one: your first mini-batch is already one update old. No update has happened since the rollout when
      its gradient is computed: there θ is θ_old and every ratio is exactly 1.
    - a step ahead: gradient steps are counted from 1, so step N still belongs to the first rollout, as its last and
      stalest mini-batch. Yours begins a new rollout there.
    - version of the next rollout: the version is that of the weights that sampled. During global step s the engine
      still holds what s − 1 finished global steps left it.
    - never reset: you count the updates since training began. Staleness starts again at 0 with every rollout: that is
      why a synchronous loop stays bounded.
    - version counted in updates: a version is a number of syncs, and there is one sync in a global step, not one for
      each update.

    At most N − 1 updates lie between a rollout and its use, and 1 in N mini-batches is never stale.
    """,
    observe=lambda answer: {
        f"(global step, updates since the rollout, version) of gradient step {step} with N = {n}": answer(step, n)
        for step, n in [(1, 1), (7, 1), (1, 4), (4, 4), (5, 4), (12, 4), (15, 8), (16, 8)]
    },
    solution=_age,
    mistakes={
        "counted from one": _age_but(lambda grad_step, n, updates, version: (updates + 1, version)),
        "a step ahead": lambda grad_step, n: _age(grad_step + 1, n),
        "version of the next rollout": _age_but(lambda grad_step, n, updates, version: (updates, version + 1)),
        "never reset": _age_but(lambda grad_step, n, updates, version: (grad_step - 1, version)),
        "version counted in updates": _age_but(lambda grad_step, n, updates, version: (updates, version * n)),
    },
)


def _observe_mask(answer: Answer) -> Observations:
    # Between the bounds and their look-alikes: 1.23 (in (1.2, 1.27)), 0.79 (below 0.8, its inverse still below 1.27),
    # 1.29 (above 1.27, its logarithm is not above 0.27), 0.81 (above 0.8, its logarithm is below −0.2).
    ratio = torch.tensor([[0.50, 0.79, 0.81, 1.00, 1.23, 1.29, 2.00]]).repeat(3, 1)
    old = torch.tensor([[-0.9, -1.1, -2.0, -0.7, -1.3, -1.6, -3.0]]).repeat(3, 1)
    mask = answer(old + ratio.log(), old, torch.tensor([0.5, -0.5, 0.0]), EPS_LOW, EPS_HIGH)
    return {f"M where the advantage is {sign}": mask[i] for i, sign in enumerate(("positive", "negative", "zero"))}


def _mask(logp: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, *, any_sign: bool = False) -> Tensor:
    return 1.0 - dropped(logp, old, advantages, low, high, any_sign=any_sign).float()


EX2 = exercise(
    """04.2 The clip mask (difficulty 2, importance 5, 12 minutes)

    1. There are four quadrants: the sign of the advantage × the side of 1 on which the ratio lies. Two of them never
       drop anything.
    2. Which way does the gradient push a token with a positive advantage? Has a ratio above 1 + ε_high moved that way
       already?
    3. `ratio = (logp - logp_old).exp()`; advantages need a second axis; write *dropped* as an `|` of two `&`.

    - both sides for both signs: you drop every token whose ratio is outside the range, whatever the sign. A token that
      drifted *against* its push needs its gradient most: the gradient brings it back.
    - the other two quadrants: your mask drops the tokens that moved against their push and keeps those that went too
      far. The signs are exchanged.
    - bounds exchanged: ε_high belongs to the upper side, 1 + ε_high, and ε_low to the lower. The two are not equal:
      0.27 up, 0.2 down.
    - one where dropped: M is what the gradient is multiplied by: 0 drops a token, 1 keeps it. Yours is the other way
      round.
    - logarithm against the bound: you compare log r with ε. The bounds are for r itself: log 1.27 is 0.239, log 0.8 is
      −0.223.
    - ratio upside down: your ratio is π_old/π_θ. The target policy stands above the line: r says how far θ has moved.

    The mask drops tokens that have moved far enough with their push, and never one that must come back.
    """,
    observe=_observe_mask,
    solution=_mask,
    mistakes={
        "both sides for both signs": partial(_mask, any_sign=True),
        "the other two quadrants": lambda logp, old, advantages, low, high: _mask(logp, old, -advantages, low, high),
        "bounds exchanged": lambda logp, old, advantages, low, high: _mask(logp, old, advantages, high, low),
        "one where dropped": lambda *case: 1.0 - _mask(*case),
        # log r > ε is r > e^ε.
        "logarithm against the bound": lambda logp, old, advantages, low, high: _mask(
            logp, old, advantages, 1 - math.exp(-low), math.exp(high) - 1
        ),
        "ratio upside down": lambda logp, old, *case: _mask(old, logp, *case),
    },
)


def _observe_fractions(answer: Answer) -> Observations:
    # Four response tokens, three, and one; what stands outside must not count, neither above nor below the line.
    ratio = torch.tensor([[1.5, 1.4, 1.0, 0.5], [0.5, 1.5, 0.7, 9.0], [0.7, 0.1, 9.0, 9.0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    old, advantages = torch.full_like(ratio, -1.5), torch.tensor([0.75, -0.25, -0.5])
    clean = answer(old + ratio.log(), old, advantages, real)
    dirty = answer((old + ratio.log()).masked_fill(~real, torch.nan), old, advantages, real)
    return {
        "the pair": torch.stack([torch.as_tensor(x) for x in clean]),
        "the pair with NaN outside the response": torch.stack([torch.as_tensor(x) for x in dirty]),
    }


def _fractions(
    logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, over: str = "tokens"
) -> tuple[Tensor, Tensor]:
    positive, lost = advantages[:, None] > 0, dropped(logp, old, advantages)
    return masked_mean(lost & positive, mask, over), masked_mean(lost & ~positive, mask, over)


def _of_the_sign(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, lost = advantages[:, None] > 0, dropped(logp, old, advantages)
    return masked_mean(lost, mask & positive), masked_mean(lost, mask & ~positive)


EX3 = exercise(
    """04.3 Clip fractions by sign (difficulty 2, importance 3, 10 minutes)

    1. Count the dropped tokens of each sign, then divide both counts by the same number.
    2. The divisor is the number of response tokens in the mini-batch: `mask.sum()`.
    3. NaN compares as false, so `dropped & mask` is safe; a product with the mask would not be.

    - of the tokens of that sign: you divide each count by the tokens of its own sign. The metric divides both by all
      response tokens, so that the two add up to the share of tokens that lost their gradient.
    - of the whole table: padding counts in your divisor: the fraction would change with the longest response of the
      batch.
    - padding dropped: you count places outside the responses as dropped tokens. Whatever stands there must not matter.
    - mean over responses: you average fractions of responses. A short response then counts as much as a long one; the
      metric is a fraction of tokens.
    - in the other order: the pair is (advantage above 0, advantage below 0); yours is exchanged.

    Look at the two apart: they answer different questions, how fast good and bad tokens run away.
    """,
    observe=_observe_fractions,
    solution=_fractions,
    mistakes={
        "of the tokens of that sign": _of_the_sign,
        "of the whole table": partial(_fractions, over="counted padding"),
        "padding dropped": partial(_fractions, over="summed padding"),
        "mean over responses": partial(_fractions, over="responses"),
        "in the other order": lambda *case: _fractions(*case)[::-1],
    },
)


def _observe_surrogate(answer: Answer) -> Observations:
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.23, 1.6]], dtype=torch.float64).repeat(2, 1)
    old = torch.tensor([[-0.9, -1.1, -2.0, -0.7, -1.3]], dtype=torch.float64).repeat(2, 1)
    advantages = torch.tensor([[0.75], [-0.25]], dtype=torch.float64).expand(2, 5)
    logp = (old + ratio.log()).requires_grad_()
    value = answer(logp, old, advantages, EPS_LOW, EPS_HIGH)
    slope = gradient(value, logp, 1.0)
    return {"the surrogate of each token": value, "its gradient with respect to log π_θ": slope}


EX4 = exercise(
    """04.4 PPO's surrogate, with the same gradient (difficulty 3, importance 4, 15 minutes)

    1. PPO takes the smaller of two numbers: with the ratio as it is, and with the ratio clipped.
    2. The advantage must be inside both, before the minimum: multiplying by a negative number turns an order round.
    3. `torch.minimum(r * A, r.clamp(1 - eps_low, 1 + eps_high) * A)`, and the ratio must carry gradient.

    - maximum: you take the larger of the two. The minimum is never above the unclipped value, and it is flat only
      where the token has gone too far.
    - clipped only: without the minimum the gradient vanishes on both sides, also for a token that moved against its
      push. Such a token would never come back.
    - minimum before the advantage: you take the minimum of the ratios and multiply afterwards. For a negative advantage
      the smaller product belongs to the larger ratio.
    - ratio detached: your surrogate has the right value and no gradient. In PPO's form the gradient flows through the
      ratio; only in MiniRL's form is the ratio stopped, and log π_θ carries the gradient.
    - one bound for both sides: you use ε_low above as well. The upper bound here is 1 + ε_high.
    - the loss: the sign is that of a loss. The surrogate is maximised; the minus comes where the optimiser is called.

    Where the minimum is the clipped one the gradient is 0, elsewhere it is r · Â: exactly M · r · Â.
    """,
    observe=_observe_surrogate,
    solution=surrogate,
    mistakes={
        "maximum": partial(surrogate, form="maximum"),
        "clipped only": partial(surrogate, form="clipped"),
        "minimum before the advantage": partial(surrogate, form="minimum of the ratios"),
        "ratio detached": lambda logp, *case: surrogate(logp.detach(), *case),
        "one bound for both sides": lambda logp, old, advantages, low, high: surrogate(logp, old, advantages, low, low),
        "the loss": lambda *case: -surrogate(*case),
    },
)


def _observe_lost(answer: Answer) -> Observations:
    # π_old/μ_old and π_θ/π_old; by token: only the wrong clip drops it, both do, neither, only the right one, neither
    # (out of the range, on the side where this sign is kept), padding.
    discrepancy = torch.tensor([[1.40, 1.10, 1.05, 0.80, 0.70, 1.40], [0.70, 0.90, 0.95, 1.50, 1.40, 0.70]])
    staleness = torch.tensor([[1.00, 1.40, 1.02, 1.40, 1.00, 1.00], [1.05, 0.70, 0.98, 0.70, 1.00, 1.00]])
    rollout = torch.full((2, 6), -2.0)
    old = rollout + discrepancy.log()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
    lost = answer(old + staleness.log(), old, rollout, torch.tensor([0.5, -0.5]), mask)
    return {
        "tokens lost where the advantage is positive": lost[0],
        "tokens lost where the advantage is negative": lost[1],
    }


def _lost(
    logp: Tensor, old: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, *, any_sign: bool = False
) -> Tensor:
    wrong, right = (dropped(logp, reference, advantages, any_sign=any_sign) for reference in (rollout, old))
    return wrong & ~right & mask


EX5 = exercise(
    """04.5 Tokens lost to the engine's error (difficulty 3, importance 4, 15 minutes)

    1. Two clips: one that measures π_θ/μ_old and one that measures π_θ/π_old. You want what only the first drops.
    2. Write one small function of (logp, reference, advantages) that returns the dropped tokens, and call it twice.
    3. `wrong & ~right & mask`.

    - all that the wrong clip drops: some of these the right clip drops too, for going too far since the rollout. Lost
      to the engine's error are only those that it would have kept.
    - turned round: these are the tokens that the wrong clip fails to drop: the engine's error hides how far they moved.
      That is its other fault; the question was about the tokens it takes away.
    - either way: you count every disagreement between the two clips, also the tokens that only the right one drops.
    - padding: one of yours is not a response token. Take the mask along.
    - without the sign: a clip drops by the sign of the advantage: only above 1 + ε_high for positive ones, only below 1
      − ε_low for negative ones.

    The optimiser moved none of these tokens out of the range. A clip on μ_old cannot tell.
    """,
    observe=_observe_lost,
    solution=_lost,
    mistakes={
        "all that the wrong clip drops": lambda logp, old, mu, advantages, mask: dropped(logp, mu, advantages) & mask,
        "turned round": lambda logp, old, mu, advantages, mask: _lost(logp, mu, old, advantages, mask),
        "either way": lambda logp, old, mu, advantages, mask: (
            _lost(logp, old, mu, advantages, mask) | _lost(logp, mu, old, advantages, mask)
        ),
        "padding": lambda logp, old, mu, advantages, mask: _lost(logp, old, mu, advantages, torch.ones_like(mask)),
        "without the sign": partial(_lost, any_sign=True),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5)
