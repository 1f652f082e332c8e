"""The numbers: how far the training engine's log-probabilities of a rollout are from the reported ones."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.diagnostics import (
    first_order_gap,
    kl_k1,
    kl_k3,
    log_ratio_quantiles,
    masked_mean,
    mean_interval,
    ratio_decomposition,
    sequence_ess,
    token_ess,
)
from minirl_edu.logprobs import micro_batches, response_logprobs
from minirl_edu.rollout import Rollout
from minirl_edu.rollout.hf import evaluating
from minirl_edu.routing import Routes, RoutingReplay, UnsupportedRouter

LEGEND = {
    "k3": "KL(μ‖π) per token in nats, E[r − 1 − log r] with r = π/μ: how far the engines are apart; 0 means equal",
    "k1": "the same KL as the mean of log μ − log π: the paper's estimate; noisier, may be negative",
    "mean_abs": "mean |log π/μ| in nats: the error of a typical token",
    "max_abs": "max |log π/μ| in nats: the worst token; an importance weight of e to that power",
    "ess_token": "effective share of the tokens under weights π/μ: 1 means that every token counts",
    "ess_sequence": "the same for whole responses, weights Π π/μ: what sequence-level correction would have left",
    "first_order_gap": "mean |Π r − 1 − Σ(r − 1)|: what the token-level objective drops of a response's weight",
    "flip_rate": "share of tokens whose set of experts differs between the engines, mean over layers",
    "any_flip": "share of tokens with another set of experts in at least one layer",
}
"""What each number means, in a line."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Quantiles of log π/μ that are reported."""
TOKEN_BUDGET = 2048
"""Token slots of one scoring forward."""


class Scores(NamedTuple):
    """The training engine's view of a rollout: `logp` and `entropy` [B, T] in nats, its experts or None."""

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    routes: Routes | None


@torch.no_grad()
def score(model: PreTrainedModel, rollout: Rollout, *, temperature: float = 1.0, replayed: bool = False) -> Scores:
    """Log-probabilities and entropy of the response tokens under the training engine, at the sampling `temperature`.

    `replayed` forces the rollout's experts (R3); otherwise a Mixture-of-Experts model's own choices are recorded.
    """
    replay = find_replay(model)
    logp, entropy = (torch.zeros(rollout.response_mask.shape, device=model.device) for _ in range(2))
    routes, order = [], []
    with evaluating(model):
        for rows, part, layout in micro_batches(rollout, TOKEN_BUDGET, share_prompts=False):
            if replay is None:
                context = nullcontext()
            elif replayed:
                assert part.routes is not None
                context = replay.replay(layout.pack(part.routes))
            else:
                context = replay.record()
            with context as tape:
                logp[rows], entropy[rows] = response_logprobs(model, layout, temperature=temperature)
            if tape is not None:
                routes.append(layout.unpack(tape.routes))
                order.append(rows)
    return Scores(logp, entropy, Routes.cat(routes, 0)[torch.cat(order).argsort()] if routes else None)


def find_replay(model: PreTrainedModel) -> RoutingReplay | None:
    """Replay for the model's routers, None for a dense model."""
    try:
        return RoutingReplay(model)
    except UnsupportedRouter:
        return None


def metrics(
    logp: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Tensor, *, whole: bool = True
) -> dict[str, Any]:
    """The numbers of `LEGEND` (without the routers') for the tokens in `mask`, and quantiles of log π/μ.

    `whole=False` leaves out what is only meaningful of whole responses.
    """
    sizes = ratio_decomposition(logp, logp, logp_rollout, mask)
    numbers = {
        "k3": kl_k3(logp_rollout, logp, mask),
        "k1": kl_k1(logp_rollout, logp, mask),
        "mean_abs": sizes["mismatch_mean"],
        "max_abs": sizes["mismatch_max"],
        "ess_token": token_ess(logp, logp_rollout, mask),
    }
    if whole:
        numbers["ess_sequence"] = sequence_ess(logp, logp_rollout, mask)
        numbers["first_order_gap"] = first_order_gap(logp, logp_rollout, mask)
    quantiles = log_ratio_quantiles(logp, logp_rollout, mask, QUANTILES).tolist()
    return {
        **{name: float(value) for name, value in numbers.items()},
        "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def measure(rollout: Rollout, plain: Scores, replayed: Scores | None = None) -> dict[str, Any]:
    """Everything that `minirl gap` reports of one rollout, in JSON types.

    `plain` are the training engine's scores with its own experts, `replayed` those with the rollout's (R3).
    Keys: tokens, responses, entropy (nats, the training engine's), `plain` and `r3` (see `metrics`; r3 is None without
    replay), `positions` (a list of `from`, `to`, `plain`, `r3`: every position, or eight buckets of a long response),
    `layers` (`layer`, `flip_rate`), `flip_rate` and `any_flip` (None without routes on both sides).
    """
    mask = rollout.response_mask
    columns = torch.arange(mask.shape[1], device=mask.device)

    def sides(mask: Tensor, *, whole: bool) -> dict[str, Any]:
        return {
            "plain": metrics(plain.logp, rollout.logp_rollout, mask, whole=whole),
            "r3": replayed and metrics(replayed.logp, rollout.logp_rollout, mask, whole=whole),
        }

    edges = np.unique(np.linspace(0, len(columns), min(8, len(columns)) + 1).round().astype(int)).tolist()
    result: dict[str, Any] = {
        "tokens": int(mask.sum()),
        "responses": len(mask),
        "entropy": float(masked_mean(plain.entropy, mask)),
        **sides(mask, whole=True),
        "positions": [
            {"from": start, "to": stop - 1, **sides(mask & (columns >= start) & (columns < stop), whole=False)}
            for start, stop in pairwise(edges)
        ],
        "layers": [],
        "flip_rate": None,
        "any_flip": None,
    }
    if rollout.routes is not None and plain.routes is not None:
        ours, theirs = rollout.routes, plain.routes.to(rollout.routes.valid.device)
        rates = ours.flip_rate(theirs, rollout.inputs)
        result["layers"] = [
            {"layer": layer, "flip_rate": rate} for layer, rate in zip(ours.layers, rates.tolist(), strict=True)
        ]
        result["flip_rate"] = float(rates.mean())
        sets = [routes.experts[rollout.inputs].int().sort(-1).values for routes in (ours, theirs)]
        result["any_flip"] = float((sets[0] != sets[1]).flatten(1).any(1).float().mean())
    return result


def interval(values: Sequence[float], *, log: bool) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % t-interval (low, high; NaN with one seed).

    `log`: of the logarithms, hence the geometric mean: sizes that span decades have no useful arithmetic one. Falls
    back to the arithmetic mean where a value is not positive.
    """
    table = np.asarray(values, dtype=np.float64)[:, None]
    log = log and bool((table > 0).all())
    mean, half = mean_interval(np.log(table) if log else table)
    ends = np.array([mean[0], mean[0] - half[0], mean[0] + half[0]])
    low_to_high = np.exp(ends) if log else ends
    return float(low_to_high[0]), float(low_to_high[1]), float(low_to_high[2])
