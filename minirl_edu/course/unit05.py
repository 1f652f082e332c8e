"""Exercises of lab 05: how stale a rollout is, and what the clip mask drops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake

EPS_LOW, EPS_HIGH = 0.2, 0.27
"""The paper's range of r = π_θ/π_old."""


# ------------------------------------------------------------------------------------------------- 05.1: how stale


def _observe_age(answer: Callable[[int, int], Any]) -> dict[str, Any]:
    cases = [(1, 1), (7, 1), (1, 4), (4, 4), (5, 4), (12, 4), (15, 8), (16, 8)]
    return {f"(global step, updates since the rollout, version) of gradient step {g} with N = {n}": answer(g, n)
            for g, n in cases}  # fmt: skip


def _age(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step - 1, mini_batches)
    return done + 1, updates, done


def _age_from_one(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step - 1, mini_batches)
    return done + 1, updates + 1, done


def _age_off_by_one(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step, mini_batches)
    return done + 1, updates, done


def _age_fresh_version(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step - 1, mini_batches)
    return done + 1, updates, done + 1


def _age_never_reset(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done = (grad_step - 1) // mini_batches
    return done + 1, grad_step - 1, done


def _age_in_updates(grad_step: int, mini_batches: int) -> tuple[int, int, int]:
    done, updates = divmod(grad_step - 1, mini_batches)
    return done + 1, updates, done * mini_batches


# ------------------------------------------------------------------------------------------------ 05.2: the mask M_t


def _observe_mask(answer: Callable[..., Any]) -> dict[str, Any]:
    # Between the bounds and their look-alikes: 1.23 (in (1.2, 1.27)), 0.79 (below 0.8, its inverse still below 1.27),
    # 1.29 (above 1.27, its logarithm is not above 0.27), 0.81 (above 0.8, its logarithm is below −0.2).
    ratio = torch.tensor([[0.50, 0.79, 0.81, 1.00, 1.23, 1.29, 2.00]]).repeat(3, 1)
    logp_old = torch.tensor([[-0.9, -1.1, -2.0, -0.7, -1.3, -1.6, -3.0]]).repeat(3, 1)
    advantages = torch.tensor([0.5, -0.5, 0.0])
    mask = answer(logp_old + ratio.log(), logp_old, advantages, EPS_LOW, EPS_HIGH)
    return {
        "M where the advantage is positive": mask[0],
        "M where the advantage is negative": mask[1],
        "M where the advantage is zero": mask[2],
    }


def _mask(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    ratio, good = (logp - logp_old).exp(), advantages[:, None] > 0
    bad = advantages[:, None] < 0
    return 1.0 - ((good & (ratio > 1 + eps_high)) | (bad & (ratio < 1 - eps_low))).float()


def _mask_both_sides(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    ratio = (logp - logp_old).exp()
    return ((ratio >= 1 - eps_low) & (ratio <= 1 + eps_high)).float()


def _mask_other_quadrants(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    return _mask(logp, logp_old, -advantages, eps_low, eps_high)


def _mask_swapped_bounds(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return _mask(logp, logp_old, advantages, eps_high, eps_low)


def _mask_inverted(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return 1.0 - _mask(logp, logp_old, advantages, eps_low, eps_high)


def _mask_of_logs(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    log_ratio, sign = logp - logp_old, advantages[:, None]
    return 1.0 - (((sign > 0) & (log_ratio > eps_high)) | ((sign < 0) & (log_ratio < -eps_low))).float()


def _mask_upside_down(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return _mask(logp_old, logp, advantages, eps_low, eps_high)


# ------------------------------------------------------------------------------------------- 05.3: clip fractions


def _observe_fractions(answer: Callable[..., Any]) -> dict[str, Any]:
    nan = float("nan")
    # Four response tokens, three, and one; what stands outside must not count, neither above nor below the line.
    ratio = torch.tensor([[1.5, 1.4, 1.0, 0.5], [0.5, 1.5, 0.7, 9.0], [0.7, 0.1, 9.0, 9.0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    logp_old = torch.full_like(ratio, -1.5)
    advantages = torch.tensor([0.75, -0.25, -0.5])
    clean = answer(logp_old + ratio.log(), logp_old, advantages, real)
    dirty = answer((logp_old + ratio.log()).masked_fill(~real, nan), logp_old, advantages, real)
    return {
        "the pair": torch.stack([torch.as_tensor(x) for x in clean]),
        "the pair with NaN outside the response": torch.stack([torch.as_tensor(x) for x in dirty]),
    }


def _dropped_by_sign(logp: Tensor, logp_old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    ratio, sign = (logp - logp_old).exp(), advantages[:, None]
    return (sign > 0) & (ratio > 1 + EPS_HIGH), (sign < 0) & (ratio < 1 - EPS_LOW)


def _fractions(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = _dropped_by_sign(logp, logp_old, advantages)
    return (positive & mask).sum() / mask.sum(), (negative & mask).sum() / mask.sum()


def _fractions_of_the_sign(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = _dropped_by_sign(logp, logp_old, advantages)
    sign = advantages[:, None] > 0
    return (positive & mask).sum() / (mask & sign).sum(), (negative & mask).sum() / (mask & ~sign).sum()


def _fractions_of_the_table(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = _dropped_by_sign(logp, logp_old, advantages)
    return (positive & mask).float().mean(), (negative & mask).float().mean()


def _fractions_padding_dropped(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    positive, negative = _dropped_by_sign(logp, logp_old, advantages)
    return positive.sum() / mask.sum(), negative.sum() / mask.sum()


def _fractions_of_responses(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = _dropped_by_sign(logp, logp_old, advantages)
    length = mask.sum(1)
    return ((positive & mask).sum(1) / length).mean(), ((negative & mask).sum(1) / length).mean()


def _fractions_swapped(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = _fractions(logp, logp_old, advantages, mask)
    return negative, positive


# ------------------------------------------------------------------------------------------- 05.4: PPO's surrogate


def _observe_surrogate(answer: Callable[..., Any]) -> dict[str, Any]:
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.23, 1.6], [0.5, 0.9, 1.1, 1.23, 1.6]], dtype=torch.float64)
    logp_old = torch.tensor([[-0.9, -1.1, -2.0, -0.7, -1.3]], dtype=torch.float64).repeat(2, 1)
    advantages = torch.tensor([[0.75], [-0.25]], dtype=torch.float64).expand(2, 5)
    logp = (logp_old + ratio.log()).requires_grad_()
    value = answer(logp, logp_old, advantages, EPS_LOW, EPS_HIGH)
    gradient = torch.autograd.grad(value.sum(), logp)[0] if value.requires_grad else torch.zeros_like(logp)
    return {"the surrogate of each token": value, "its gradient with respect to log π_θ": gradient}


def _surrogate(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def _surrogate_max(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    ratio = (logp - logp_old).exp()
    return torch.maximum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def _surrogate_clip_only(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return (logp - logp_old).exp().clamp(1 - eps_low, 1 + eps_high) * advantages


def _surrogate_min_of_ratios(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio, ratio.clamp(1 - eps_low, 1 + eps_high)) * advantages


def _surrogate_detached(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return _surrogate(logp.detach(), logp_old, advantages, eps_low, eps_high)


def _surrogate_symmetric(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return _surrogate(logp, logp_old, advantages, eps_low, eps_low)


def _surrogate_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return -_surrogate(logp, logp_old, advantages, eps_low, eps_high)


# -------------------------------------------------------------------------- 05.5: tokens lost to the engine's error


def _observe_lost(answer: Callable[..., Any]) -> dict[str, Any]:
    # π_old/μ_old and π_θ/π_old; by token: only the wrong clip drops it, both do, neither, only the right one, neither
    # (out of the range, on the side where this sign is kept), padding.
    discrepancy = torch.tensor([[1.40, 1.10, 1.05, 0.80, 0.70, 1.40], [0.70, 0.90, 0.95, 1.50, 1.40, 0.70]])
    staleness = torch.tensor([[1.00, 1.40, 1.02, 1.40, 1.00, 1.00], [1.05, 0.70, 0.98, 0.70, 1.00, 1.00]])
    logp_rollout = torch.full((2, 6), -2.0)
    logp_old = logp_rollout + discrepancy.log()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
    lost = answer(logp_old + staleness.log(), logp_old, logp_rollout, torch.tensor([0.5, -0.5]), mask)
    return {
        "tokens lost where the advantage is positive": lost[0],
        "tokens lost where the advantage is negative": lost[1],
    }


def _over(logp: Tensor, reference: Tensor, advantages: Tensor) -> Tensor:
    ratio, sign = (logp - reference).exp(), advantages[:, None]
    return ((sign > 0) & (ratio > 1 + EPS_HIGH)) | ((sign < 0) & (ratio < 1 - EPS_LOW))


def _lost(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _over(logp, logp_rollout, advantages) & ~_over(logp, logp_old, advantages) & mask


def _lost_all_of_mu(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _over(logp, logp_rollout, advantages) & mask


def _lost_turned_round(
    logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    return _over(logp, logp_old, advantages) & ~_over(logp, logp_rollout, advantages) & mask


def _lost_either_way(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return (_over(logp, logp_rollout, advantages) ^ _over(logp, logp_old, advantages)) & mask


def _lost_with_padding(
    logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    return _over(logp, logp_rollout, advantages) & ~_over(logp, logp_old, advantages)


def _lost_without_sign(
    logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    def outside(reference: Tensor) -> Tensor:
        ratio = (logp - reference).exp()
        return (ratio > 1 + EPS_HIGH) | (ratio < 1 - EPS_LOW)

    return outside(logp_rollout) & ~outside(logp_old) & mask


EXERCISES = (
    Exercise(
        id="05.1",
        title="How stale is this update?",
        difficulty=1,
        importance=3,
        minutes=5,
        hints=(
            "Write down N = 4 and the gradient steps 1 to 9. Where does a new rollout begin?",
            "Counting from 0 makes it a division with remainder: `divmod(grad_step - 1, mini_batches)`.",
            "The engine got its weights after the last *finished* global step. That number is the version.",
        ),
        observe=_observe_age,
        solution=_age,
        mistakes=(
            Mistake(
                "counted from one",
                _age_from_one,
                "your first mini-batch is already one update old. No update has happened since the rollout when its "
                "gradient is computed: there θ is θ_old and every ratio is exactly 1.",
            ),
            Mistake(
                "a step ahead",
                _age_off_by_one,
                "gradient steps are counted from 1, so step N still belongs to the first rollout, as its last and "
                "stalest mini-batch. Yours begins a new rollout there.",
            ),
            Mistake(
                "version of the next rollout",
                _age_fresh_version,
                "the version is that of the weights that sampled. During global step s the engine still holds what "
                "s − 1 finished global steps left it.",
            ),
            Mistake(
                "never reset",
                _age_never_reset,
                "you count the updates since training began. Staleness starts again at 0 with every rollout: that is "
                "why a synchronous loop stays bounded.",
            ),
            Mistake(
                "version counted in updates",
                _age_in_updates,
                "a version is a number of syncs, and there is one sync in a global step, not one for each update.",
            ),
        ),
        praise="At most N − 1 updates lie between a rollout and its use, and 1 in N mini-batches is never stale.",
    ),
    Exercise(
        id="05.2",
        title="The clip mask",
        difficulty=2,
        importance=5,
        minutes=12,
        hints=(
            "There are four quadrants: the sign of the advantage × the side of 1 on which the ratio lies. Two of them "
            "never drop anything.",
            "Which way does the gradient push a token with a positive advantage? Has a ratio above 1 + ε_high moved "
            "that way already?",
            "`ratio = (logp - logp_old).exp()`; advantages need a second axis; write *dropped* as an `|` of two `&`.",
        ),
        observe=_observe_mask,
        solution=_mask,
        mistakes=(
            Mistake(
                "both sides for both signs",
                _mask_both_sides,
                "you drop every token whose ratio is outside the range, whatever the sign. A token that drifted "
                "*against* its push needs its gradient most: it is what brings it back.",
            ),
            Mistake(
                "the other two quadrants",
                _mask_other_quadrants,
                "your mask drops the tokens that moved against their push and keeps those that went too far. The signs "
                "are exchanged.",
            ),
            Mistake(
                "bounds exchanged",
                _mask_swapped_bounds,
                "ε_high belongs to the upper side, 1 + ε_high, and ε_low to the lower. The two are not equal: 0.27 up, "
                "0.2 down.",
            ),
            Mistake(
                "one where dropped",
                _mask_inverted,
                "M is what the gradient is multiplied by: 0 drops a token, 1 keeps it. Yours is the other way round.",
            ),
            Mistake(
                "logarithm against the bound",
                _mask_of_logs,
                "you compare log r with ε. The bounds are for r itself: log 1.27 is 0.239, log 0.8 is −0.223.",
            ),
            Mistake(
                "ratio upside down",
                _mask_upside_down,
                "your ratio is π_old/π_θ. The target policy stands above the line: r says how far θ has moved.",
            ),
        ),
        praise="It lets go of what has moved far enough, and never of what must come back.",
    ),
    Exercise(
        id="05.3",
        title="Clip fractions by sign",
        difficulty=2,
        importance=3,
        minutes=10,
        hints=(
            "Count the dropped tokens of each sign, then divide both counts by the same number.",
            "The divisor is the number of response tokens in the mini-batch: `mask.sum()`.",
            "NaN compares as false, so `dropped & mask` is safe; a product with the mask would not be.",
        ),
        observe=_observe_fractions,
        solution=_fractions,
        mistakes=(
            Mistake(
                "of the tokens of that sign",
                _fractions_of_the_sign,
                "you divide each count by the tokens of its own sign. The metric divides both by all response tokens, "
                "so that the two add up to the share of tokens that lost their gradient.",
            ),
            Mistake(
                "of the whole table",
                _fractions_of_the_table,
                "padding counts in your divisor: the fraction would change with the longest response of the batch.",
            ),
            Mistake(
                "padding dropped",
                _fractions_padding_dropped,
                "you count places outside the responses as dropped tokens. Whatever stands there must not matter.",
            ),
            Mistake(
                "mean over responses",
                _fractions_of_responses,
                "you average fractions of responses. A short response then counts as much as a long one; the metric is "
                "a fraction of tokens.",
            ),
            Mistake(
                "in the other order",
                _fractions_swapped,
                "the pair is (advantage above 0, advantage below 0); yours is exchanged.",
            ),
        ),
        praise="Look at the two apart: they answer different questions, how fast good and bad tokens run away.",
    ),
    Exercise(
        id="05.4",
        title="PPO's surrogate, with the same gradient",
        difficulty=3,
        importance=4,
        minutes=15,
        hints=(
            "PPO takes the smaller of two numbers: with the ratio as it is, and with the ratio clipped.",
            "The advantage must be inside both, before the minimum: multiplying by a negative number turns an order "
            "round.",
            "`torch.minimum(r * A, r.clamp(1 - eps_low, 1 + eps_high) * A)`, and the ratio must carry gradient.",
        ),
        observe=_observe_surrogate,
        solution=_surrogate,
        mistakes=(
            Mistake(
                "maximum",
                _surrogate_max,
                "you take the larger of the two. The minimum makes the surrogate a pessimist: it never promises more "
                "than the unclipped one, and it is flat only where the token has gone too far.",
            ),
            Mistake(
                "clipped only",
                _surrogate_clip_only,
                "without the minimum the gradient vanishes on both sides, also for a token that moved against its "
                "push. Such a token would never come back.",
            ),
            Mistake(
                "minimum before the advantage",
                _surrogate_min_of_ratios,
                "you take the minimum of the ratios and multiply afterwards. For a negative advantage the smaller "
                "product belongs to the larger ratio.",
            ),
            Mistake(
                "ratio detached",
                _surrogate_detached,
                "your surrogate has the right value and no gradient. In PPO's form the gradient flows through the "
                "ratio; only in MiniRL's form is the ratio stopped, and log π_θ carries the gradient.",
            ),
            Mistake(
                "one bound for both sides",
                _surrogate_symmetric,
                "you use ε_low above as well. The upper bound here is 1 + ε_high.",
            ),
            Mistake(
                "the loss",
                _surrogate_loss,
                "the sign is that of a loss. The surrogate is maximised; the minus comes where the optimiser is "
                "called.",
            ),
        ),
        praise="Where the minimum is the clipped one the gradient is 0, elsewhere it is r · Â: exactly M · r · Â.",
    ),
    Exercise(
        id="05.5",
        title="Tokens lost to the engine's error",
        difficulty=3,
        importance=4,
        minutes=15,
        hints=(
            "Two clips: one that measures π_θ/μ_old and one that measures π_θ/π_old. You want what only the first "
            "drops.",
            "Write one small function of (logp, reference, advantages) that returns the dropped tokens, and call it "
            "twice.",
            "`wrong & ~right & mask`.",
        ),
        observe=_observe_lost,
        solution=_lost,
        mistakes=(
            Mistake(
                "all that the wrong clip drops",
                _lost_all_of_mu,
                "some of these the right clip drops too, for going too far since the rollout. Lost to the engine's "
                "error are only those that it would have kept.",
            ),
            Mistake(
                "turned round",
                _lost_turned_round,
                "these are the tokens that the wrong clip fails to drop: the engine's error hides how far they moved. "
                "That is its other fault; the question was about the tokens it takes away.",
            ),
            Mistake(
                "either way",
                _lost_either_way,
                "you count every disagreement between the two clips, also the tokens that only the right one drops.",
            ),
            Mistake(
                "padding",
                _lost_with_padding,
                "one of yours is not a response token. Take the mask along.",
            ),
            Mistake(
                "without the sign",
                _lost_without_sign,
                "a clip drops by the sign of the advantage: only above 1 + ε_high for positive ones, only below "
                "1 − ε_low for negative ones.",
            ),
        ),
        praise="The optimiser moved none of these tokens out of the range. A clip on μ_old cannot tell.",
    ),
)
"""What the lab asks, from counting to a clip with the wrong denominator."""
