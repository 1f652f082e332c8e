"""Exercises of unit 11, scaling up: what must not change on many ranks, and what fits where."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import Part, divided_by, responses, tokens

_LENGTHS = ((4, 1, 3), (2,), (5, 3))


def _ranks() -> list[Part]:
    """Three ranks with 3, 1 and 2 responses of unequal lengths; what stands in the padding is not zero."""
    ranks = []
    for k, lengths in enumerate(_LENGTHS):
        width = max(lengths)
        terms = 0.1 * (torch.arange(len(lengths) * width).view(len(lengths), width) + 1.0) * (-1) ** k + 0.3 * k
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        ranks.append((terms.requires_grad_(), mask))
    return ranks


def _observe_sum(answer: Answer) -> Observations:
    ranks = _ranks()
    losses = torch.stack([torch.as_tensor(loss) for loss in answer(ranks)])
    losses.sum().backward()
    gradients = {f"the gradient on rank {k}": terms.grad for k, (terms, _) in enumerate(ranks)}
    return {"the sum over ranks": losses.sum(), "the loss of each rank": losses, **gradients}


EX1 = exercise(
    """11.1 One mini-batch on three ranks (difficulty 2, importance 5, 8 minutes)

    1. What must a rank know about the others before it can divide?
    2. The losses are **added** over ranks. So each is a sum over its tokens, divided by the same number.
    3. That number is the count of responses on all ranks together.

    - own responses: each rank divides by its own number of responses. The sum is then one mean for each rank, added up.
      It is three times too large here, and the response that is alone on its rank counts most.
    - mean of means: a mean on each rank, then a mean over ranks. This is right only where all ranks hold equally many
      responses.
    - own tokens: each rank divides by its own number of tokens. A token on a rank with short responses counts more.
    - all tokens: the divisor is the number of tokens on all ranks. It is global, but belongs to another objective:
      MiniRL is a mean over responses of a sum over tokens.
    - number of ranks: the divisor is the number of ranks. The step size would depend on the size of the cluster.
    - padding counted: what stands in the padding is in the sum. The mask says which terms are tokens.

    The same rule holds for micro-batches: a rank is a micro-batch that lies elsewhere.
    """,
    observe=_observe_sum,
    solution=divided_by(lambda rank, ranks: responses(*ranks)),
    mistakes={
        "own responses": divided_by(lambda rank, ranks: responses(rank)),
        "mean of means": divided_by(lambda rank, ranks: responses(rank) * len(ranks)),
        "own tokens": divided_by(lambda rank, ranks: tokens(rank)),
        "all tokens": divided_by(lambda rank, ranks: tokens(*ranks)),
        "number of ranks": divided_by(lambda rank, ranks: len(ranks)),
        "padding counted": lambda ranks: [terms.sum() / responses(*ranks) for terms, _ in ranks],
    },
)


def _observe_mean(answer: Answer) -> Observations:
    """As DistributedDataParallel and FSDP do: each rank calls backward on its own loss, gradients are averaged."""
    found = {}
    for name, counts in (("three unequal ranks", (3, 1, 2)), ("two equal ranks", (4, 4))):
        weights = torch.ones(2, requires_grad=True)
        gradients = []
        for k, count in enumerate(counts):
            inputs = torch.tensor([[0.5 * (i + 1), 1.0 - i - k] for i in range(count)])
            loss = answer((inputs @ weights).square().sum(), count, list(counts))
            gradients.append(torch.autograd.grad(loss, weights)[0])
        found[f"the averaged gradient of {name}"] = torch.stack(gradients).mean(0)
    return found


EX2 = exercise(
    """11.2 Gradients that are averaged for you (difficulty 3, importance 5, 10 minutes)

    1. DDP and FSDP take the **mean** of the gradients over ranks. Which factor does that put in front?
    2. You want Σ_k ∇(sum_k) / B. You get (1/K) Σ_k ∇(loss_k).
    3. So loss_k = K · sum_k / B, with B the sum of the counts.

    - own count: you divide by the rank's own count, the default of every loss function that ends in .mean(). With equal
      counts it is right by accident, with unequal ones it is biased.
    - no world size: the divisor is right, but averaging divides once more by the number of ranks. The gradient is K
      times too small. Adam hides most of that, and the clip of the gradient norm no longer acts.
    - world size twice: you multiply by the world size twice.
    - own count, corrected: the factor for the averaging is right, but the divisor is the rank's own count.
    - weighted by the count: a **sum** over responses already grows with their number; multiplying by the count again
      weights large ranks twice.
    - the largest count: you divide by the largest count, as if every rank had been padded to it. The gradient is too
      small by the share of the padding.

    Equivalently, divide by the *mean* count over ranks.
    """,
    observe=_observe_mean,
    solution=lambda loss_sum, own, counts: loss_sum * len(counts) / sum(counts),
    mistakes={
        "own count": lambda loss_sum, own, counts: loss_sum / own,
        "no world size": lambda loss_sum, own, counts: loss_sum / sum(counts),
        "world size twice": lambda loss_sum, own, counts: loss_sum * len(counts) ** 2 / sum(counts),
        "own count, corrected": lambda loss_sum, own, counts: loss_sum * len(counts) / own,
        "weighted by the count": lambda loss_sum, own, counts: loss_sum * own * len(counts) / sum(counts),
        "the largest count": lambda loss_sum, own, counts: loss_sum / max(counts),
    },
)


def _observe_cuts(answer: Answer) -> Observations:
    def said(widths: str, budget: int) -> str:
        return " ".join(f"{start}-{stop}" for start, stop in answer([int(w) for w in widths.split()], budget))

    cases = (("2 3 3 5 8 8", 16), ("4 4 4 4 4", 8), ("1 1 20 30", 10))
    return {f"the runs of {widths} within {budget}": said(widths, budget) for widths, budget in cases}


def _greedy(fits: Callable[[Sequence[int], int], bool]) -> Callable[[Sequence[int], int], list[tuple[int, int]]]:
    """Grow a run while it fits, or while it is a single item."""

    def cuts(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
        runs, start = [], 0
        for stop in range(1, len(widths) + 1):
            if stop == len(widths) or not fits(widths[start : stop + 1], budget):
                runs.append((start, stop))
                start = stop
        return runs

    return cuts


def _fits(widths: Sequence[int], budget: int) -> bool:
    return len(widths) * max(widths) <= budget


def _fixed_size(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """As many rows in each part as the widest row allows."""
    size = max(1, budget // max(widths))
    return [(i, min(i + size, len(widths))) for i in range(0, len(widths), size)]


EX3 = exercise(
    """11.3 A step of the packer (difficulty 3, importance 3, 15 minutes)

    1. A part of n rows is padded to its widest: it costs n × the widest, not the sum of the widths.
    2. Grow a run while one more row still fits. Otherwise close it and begin the next with that row.
    3. A row that is too wide by itself is a run of its own. Do not forget the last run.

    - padding is free: you add the widths up. Rows of a part are padded to its widest, and padding takes memory too.
    - never full: a part may use the whole budget. Compare with ≤, not with <.
    - the last one lost: the last run is missing. Its rows, the longest ones, would never be trained on.
    - one too many: you close the run after the row that no longer fits, so it exceeds the budget.
    - a fixed number of rows: every part has as many rows as the widest row allows. It fits, but short rows, of which
      there are many, then fill a fraction of the budget.

    `logprobs.micro_batches` does this after sorting by width, so that rows of similar length meet.
    """,
    observe=_observe_cuts,
    solution=_greedy(_fits),
    mistakes={
        "padding is free": _greedy(lambda widths, budget: sum(widths) <= budget),
        "never full": _greedy(lambda widths, budget: _fits(widths, budget - 1)),
        "the last one lost": lambda widths, budget: _greedy(_fits)(widths, budget)[:-1],
        "one too many": _greedy(lambda widths, budget: _fits(widths[:-1], budget)),
        "a fixed number of rows": _fixed_size,
    },
)


_QWEN3 = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "top_k": 8, "expert_hidden": 768}
_SMALL = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "experts": 6, "top_k": 1, "expert_hidden": 48}


def _layer(
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    experts: int,
    top_k: int,
    expert_hidden: int,
    matrices: int = 3,
    router: bool = True,
    norms: bool = True,
    active_router: bool = False,
) -> tuple[int, int]:
    """All and active parameters, or with a part of them wrong."""
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    small = (2 * hidden + 2 * head_dim if norms else 0) + (hidden * experts if router else 0)
    expert = matrices * hidden * expert_hidden
    unused = hidden * (experts - top_k) if active_router else 0
    return attention + small + experts * expert, attention + small + top_k * expert - unused


def _share(**shape: Any) -> tuple[int, int]:
    total = _layer(**shape)[0]
    return total, total * shape["top_k"] // shape["experts"]


EX4 = exercise(
    """11.4 The parameters of a Mixture-of-Experts layer (difficulty 3, importance 3, 15 minutes)

    1. Attention: q and o are hidden × (heads · head_dim), k and v are hidden × (kv_heads · head_dim). An expert has
       three matrices: gate, up, down.
    2. Besides: a router, hidden × experts; two norms of the hidden size; q- and k-norm of head_dim each.
    3. Active: everything but the experts that were not chosen. The router runs whole.

    - head_dim from hidden: you took hidden / heads for head_dim. It is a size of its own, and in Qwen3-30B-A3B it is
      twice that.
    - k and v for all heads: k and v have kv_heads heads (grouped-query attention), fewer than q.
    - two matrices: an expert has three matrices: two that go up (gate and up) and one that goes down.
    - no router: the router is missing. It has hidden × experts parameters.
    - no norms: the norms are missing: two of the hidden size, and the q- and k-norm of head_dim each.
    - a share of everything: you took top_k / experts of all parameters. Attention, router and norms serve every token.
    - a part of the router: you counted only the chosen experts' rows of the router. It scores **all** experts, or it
      could not choose.

    Times 48 layers, plus embedding and head: 30.5 billion, of which 3.3 serve a token.
    """,
    observe=lambda answer: {
        "all and active parameters of the small layer": torch.tensor([float(n) for n in answer(**_SMALL)]).double(),
        "all and active parameters of the large layer": torch.tensor(list(answer(**_QWEN3)), dtype=torch.float64),
    },
    solution=_layer,
    mistakes={
        "head_dim from hidden": lambda **x: _layer(**x | {"head_dim": x["hidden"] // x["heads"]}),
        "k and v for all heads": lambda **x: _layer(**x | {"kv_heads": x["heads"]}),
        "two matrices": partial(_layer, matrices=2),
        "no router": partial(_layer, router=False),
        "no norms": partial(_layer, norms=False),
        "a share of everything": _share,
        "a part of the router": partial(_layer, active_router=True),
    },
    rtol=1e-9,
)


_CACHED = {"layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128}
_SMALL_CACHED = {"layers": 3, "heads": 5, "kv_heads": 5, "head_dim": 32}


def _cache(*, tokens: int, layers: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    return 2 * tokens * layers * kv_heads * head_dim * itemsize


EX5 = exercise(
    """11.5 Bytes of the KV cache (difficulty 2, importance 3, 6 minutes)

    1. Two vectors for each token and layer.
    2. Which heads have keys and values: those of the queries, or the fewer ones?

    - keys only: keys **and** values are kept, so it is twice that.
    - query heads: queries are not cached. With grouped-query attention there are fewer heads of keys and values, which
      makes the cache small.
    - one layer: every layer has a cache of its own.
    - numbers, not bytes: that counts numbers. In 16 bits each takes two bytes.
    - bits: itemsize is in bytes already.

    That is 96 KiB for each token of Qwen3-30B-A3B in 16 bits.
    """,
    observe=lambda answer: {
        "the bytes of one token in 16 bits": answer(tokens=1, itemsize=2, **_CACHED),
        "the bytes of 1,000 tokens in 8 bits": answer(tokens=1000, itemsize=1, **_CACHED),
        "the bytes of a small model's 7 tokens": answer(tokens=7, itemsize=4, **_SMALL_CACHED),
    },
    solution=_cache,
    mistakes={
        "keys only": lambda **x: _cache(**x) // 2,
        "query heads": lambda **x: _cache(**x | {"kv_heads": x["heads"]}),
        "one layer": lambda **x: _cache(**x | {"layers": 1}),
        "numbers, not bytes": lambda **x: _cache(**x | {"itemsize": 1}),
        "bits": lambda **x: 8 * _cache(**x),
    },
    rtol=0.0,
    atol=0.5,
)


def _routes(numbers: Callable[[int, int], int]) -> Callable[[int, int, int, int], int]:
    """Bytes of routes, from those of one layer's numbers by top_k and the number of experts; one more says valid."""
    return lambda tokens, layers, top_k, experts: tokens * (layers * numbers(top_k, experts) + 1)


_compact = _routes(lambda top_k, experts: top_k * (1 if experts <= 256 else 2))

EX6 = exercise(
    """11.6 Bytes of the routes (difficulty 2, importance 3, 8 minutes)

    1. Only an expert's number is kept. How many bytes does it need if there are at most 256 experts?
    2. One number for each of the top_k experts, in every layer; and a byte that says whether the row counts.

    - int64: you count eight bytes for each number, torch's default for indices. One or two are enough.
    - always one byte: a byte holds 0 to 255. Above 256 experts numbers would wrap around, and a wrong expert would be
      replayed.
    - two bytes at 256: 256 experts are numbered 0 to 255, so they still fit in a byte.
    - a mask over experts: that is a row of yes and no for every expert. The numbers of the chosen ones are enough.
    - no valid: the byte that says whether a row counts is missing. Without it, padding is replayed as expert 0.
    - one layer: every layer has a router, and each chooses anew.

    `Routes.nbytes` says the same of a real batch.
    """,
    observe=lambda answer: {
        "the bytes of 1,000 tokens, 48 layers, 8 of 128 experts": answer(1000, 48, 8, 128),
        "the bytes of 10 tokens, 3 layers, 2 of 256 experts": answer(10, 3, 2, 256),
        "the bytes of 10 tokens, 3 layers, 4 of 512 experts": answer(10, 3, 4, 512),
    },
    solution=_compact,
    mistakes={
        "int64": _routes(lambda top_k, experts: top_k * 8),
        "always one byte": _routes(lambda top_k, experts: top_k),
        "two bytes at 256": _routes(lambda top_k, experts: top_k * (1 if experts < 256 else 2)),
        "a mask over experts": _routes(lambda top_k, experts: experts),
        "no valid": lambda tokens, *shape: _compact(tokens, *shape) - tokens,
        "one layer": lambda tokens, layers, top_k, experts: _compact(tokens, 1, top_k, experts),
    },
    rtol=0.0,
    atol=0.5,
)


_LARGE = {"active": 3.04e9, "total": 30.2e9, "layers": 48, "heads": 32, "head_dim": 128}
_TINY = {"active": 4e3, "total": 9e3, "layers": 2, "heads": 2, "head_dim": 8}


def _flops(*, length: int, active: float, total: float, layers: int, heads: int, head_dim: int) -> float:
    return 6 * active + 12 * layers * heads * head_dim * length / 2


EX7 = exercise(
    """11.7 The work of an update, per token (difficulty 3, importance 2, 10 minutes)

    1. A parameter that serves a token costs a multiply and an add: 2 FLOPs in the forward. The backward costs twice the
       forward.
    2. Attention: a token is compared with every token before it, half of the length on average: 2 products (scores,
       values) of heads · head_dim multiply-adds each.
    3. 6 · active + 12 · layers · heads · head_dim · length / 2.

    - forward only: that is the forward. The backward computes two products for each of the forward's: for the inputs
      and for the weights.
    - all parameters: you counted all parameters. A token visits only the experts that were chosen for it.
    - no attention: attention between tokens has no parameters but costs work. At 32,768 tokens it costs the most.
    - not causal: you compared every token with the whole length. It sees only those before it, half on average.
    - scores only: one product of attention is missing: scores (q·k) and the weighted sum of values.

    This is the well-known 6·N, and the part that people forget for long responses.
    """,
    observe=lambda answer: {
        "FLOPs per token for responses of 1,024 tokens": answer(length=1024, **_LARGE) / 1e9,
        "FLOPs per token for responses of 32,768 tokens": answer(length=32768, **_LARGE) / 1e9,
        "FLOPs per token of a small model": answer(length=10, **_TINY) / 1e3,
    },
    solution=_flops,
    mistakes={
        "forward only": lambda **x: _flops(**x) / 3,
        "all parameters": lambda **x: _flops(**x | {"active": x["total"]}),
        "no attention": lambda **x: _flops(**x | {"length": 0}),
        "not causal": lambda **x: _flops(**x | {"length": 2 * x["length"]}),
        "scores only": lambda **x: _flops(**x | {"length": x["length"] / 2}),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6, EX7)
