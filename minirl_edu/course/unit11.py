"""Exercises of unit 11, scaling up: what must not change on many ranks, and what fits where."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake

# -------------------------------------------------------------------------------- 11.1 the global divisor

Rank = tuple[Tensor, Tensor]
"""What one rank holds: terms [b, T], the summands of the loss, and their mask [b, T]."""

_LENGTHS = ((4, 1, 3), (2,), (5, 3))


def _ranks() -> list[Rank]:
    """Three ranks with 3, 1 and 2 responses of unequal lengths; what stands in the padding is not zero."""
    ranks = []
    for k, lengths in enumerate(_LENGTHS):
        width = max(lengths)
        terms = 0.1 * (torch.arange(len(lengths) * width).view(len(lengths), width) + 1.0) * (-1) ** k + 0.3 * k
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        ranks.append((terms.requires_grad_(), mask))
    return ranks


def _observe_sum(answer: Any) -> dict[str, Any]:
    ranks = _ranks()
    losses = torch.stack([torch.as_tensor(loss) for loss in answer(ranks)])
    losses.sum().backward()
    gradients = {f"the gradient on rank {k}": terms.grad for k, (terms, _) in enumerate(ranks)}
    return {"the sum over ranks": losses.sum(), "the loss of each rank": losses, **gradients}


def _summed(rank: Rank) -> Tensor:
    terms, mask = rank
    return terms[mask].sum()


def _rank_losses(count: Callable[[Rank, Sequence[Rank]], float]) -> Callable[[Sequence[Rank]], list[Tensor]]:
    """Each rank's sum over tokens, divided by a count."""
    return lambda ranks: [_summed(rank) / count(rank, ranks) for rank in ranks]


def _padding_too(ranks: Sequence[Rank]) -> list[Tensor]:
    responses = sum(len(mask) for _, mask in ranks)
    return [terms.sum() / responses for terms, _ in ranks]


# ------------------------------------------------------------------------- 11.2 ranks whose gradients are averaged


def _observe_mean(answer: Any) -> dict[str, Any]:
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


# -------------------------------------------------------------------------------------- 11.3 packing by a budget


def _observe_cuts(answer: Any) -> dict[str, Any]:
    def said(widths: Sequence[int], budget: int) -> str:
        return " ".join(f"{start}-{stop}" for start, stop in answer(list(widths), budget))

    return {
        "the runs of 2 3 3 5 8 8 within 16": said((2, 3, 3, 5, 8, 8), 16),
        "the runs of 4 4 4 4 4 within 8": said((4, 4, 4, 4, 4), 8),
        "the runs of 1 1 20 30 within 10": said((1, 1, 20, 30), 10),
    }


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


def _padded_fits(widths: Sequence[int], budget: int) -> bool:
    return len(widths) * max(widths) <= budget


def _without_last(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    return _greedy(_padded_fits)(widths, budget)[:-1]


def _too_late(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cuts after the item that no longer fits."""
    runs, start = [], 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or not _padded_fits(widths[start:stop], budget):
            runs.append((start, stop))
            start = stop
    return runs


def _fixed_size(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """As many rows in each part as the widest row allows."""
    size = max(1, budget // max(widths))
    return [(i, min(i + size, len(widths))) for i in range(0, len(widths), size)]


# ----------------------------------------------------------------------------------- 11.4 parameters of a layer

_QWEN3 = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "top_k": 8, "expert_hidden": 768}
_SMALL = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "experts": 6, "top_k": 1, "expert_hidden": 48}


def _observe_layer(answer: Any) -> dict[str, Any]:
    return {
        "all and active parameters of the small layer": torch.tensor([float(n) for n in answer(**_SMALL)]).double(),
        "all and active parameters of the large layer": torch.tensor(list(answer(**_QWEN3)), dtype=torch.float64),
    }


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


def _layer_split_heads(**shape: Any) -> tuple[int, int]:
    return _layer(**(shape | {"head_dim": shape["hidden"] // shape["heads"]}))


def _layer_all_heads(**shape: Any) -> tuple[int, int]:
    return _layer(**(shape | {"kv_heads": shape["heads"]}))


def _layer_share(**shape: Any) -> tuple[int, int]:
    total = _layer(**shape)[0]
    return total, total * shape["top_k"] // shape["experts"]


# ------------------------------------------------------------------------------------------- 11.5 the KV cache


def _observe_cache(answer: Any) -> dict[str, Any]:
    shape = {"layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128}
    return {
        "the bytes of one token in 16 bits": answer(tokens=1, itemsize=2, **shape),
        "the bytes of 1,000 tokens in 8 bits": answer(tokens=1000, itemsize=1, **shape),
        "the bytes of a small model's 7 tokens": answer(
            tokens=7, layers=3, heads=5, kv_heads=5, head_dim=32, itemsize=4
        ),
    }


def _cache(*, tokens: int, layers: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    return 2 * tokens * layers * kv_heads * head_dim * itemsize


# ----------------------------------------------------------------------------------------------- 11.6 the routes


def _observe_routes(answer: Any) -> dict[str, Any]:
    return {
        "the bytes of 1,000 tokens, 48 layers, 8 of 128 experts": answer(1000, 48, 8, 128),
        "the bytes of 10 tokens, 3 layers, 2 of 256 experts": answer(10, 3, 2, 256),
        "the bytes of 10 tokens, 3 layers, 4 of 512 experts": answer(10, 3, 4, 512),
    }


def _routes(tokens: int, layers: int, top_k: int, experts: int) -> int:
    return tokens * (layers * top_k * (1 if experts <= 256 else 2) + 1)


# --------------------------------------------------------------------------------------- 11.7 the work of an update


def _observe_flops(answer: Any) -> dict[str, Any]:
    large = {"active": 3.04e9, "total": 30.2e9, "layers": 48, "heads": 32, "head_dim": 128}
    return {
        "FLOPs per token for responses of 1,024 tokens": answer(length=1024, **large) / 1e9,
        "FLOPs per token for responses of 32,768 tokens": answer(length=32768, **large) / 1e9,
        "FLOPs per token of a small model": answer(length=10, active=4e3, total=9e3, layers=2, heads=2, head_dim=8)
        / 1e3,
    }


def _flops(*, length: int, active: float, total: float, layers: int, heads: int, head_dim: int) -> float:
    return 6 * active + 12 * layers * heads * head_dim * length / 2


EXERCISES = (
    Exercise(
        id="11.1",
        title="One mini-batch on three ranks",
        difficulty=2,
        importance=5,
        minutes=8,
        hints=(
            "What must a rank know about the others before it can divide?",
            "The losses are **added** over ranks. So each is a sum over its tokens, divided by the same number.",
            "That number is the count of responses on all ranks together.",
        ),
        observe=_observe_sum,
        solution=_rank_losses(lambda rank, ranks: sum(len(mask) for _, mask in ranks)),
        mistakes=(
            Mistake(
                "own responses",
                _rank_losses(lambda rank, ranks: len(rank[1])),
                "each rank divides by its own number of responses. The sum then is one mean for each rank, added up: "
                "three times too large here, and a lonely response counts most.",
            ),
            Mistake(
                "mean of means",
                _rank_losses(lambda rank, ranks: len(rank[1]) * len(ranks)),
                "a mean on each rank, then a mean over ranks. Right only where all ranks hold equally many responses.",
            ),
            Mistake(
                "own tokens",
                _rank_losses(lambda rank, ranks: int(rank[1].sum())),
                "each rank divides by its own number of tokens: a token on a rank with short responses counts more.",
            ),
            Mistake(
                "all tokens",
                _rank_losses(lambda rank, ranks: sum(int(mask.sum()) for _, mask in ranks)),
                "the divisor is the number of tokens on all ranks. It is global, but another objective: MiniRL is a "
                "mean over responses of a sum over tokens.",
            ),
            Mistake(
                "number of ranks",
                _rank_losses(lambda rank, ranks: len(ranks)),
                "the divisor is the number of ranks: the step size would depend on the size of the cluster.",
            ),
            Mistake(
                "padding counted",
                _padding_too,
                "what stands in the padding is in the sum. The mask says which terms are tokens.",
            ),
        ),
        praise="The same rule as for micro-batches: a rank is a micro-batch that happens to be elsewhere.",
    ),
    Exercise(
        id="11.2",
        title="Gradients that are averaged for you",
        difficulty=3,
        importance=5,
        minutes=10,
        hints=(
            "DDP and FSDP take the **mean** of the gradients over ranks. Which factor does that put in front?",
            "You want Σ_k ∇(sum_k) / B. You get (1/K) Σ_k ∇(loss_k).",
            "So loss_k = K · sum_k / B, with B the sum of the counts.",
        ),
        observe=_observe_mean,
        solution=lambda loss_sum, own, counts: loss_sum * len(counts) / sum(counts),
        mistakes=(
            Mistake(
                "own count",
                lambda loss_sum, own, counts: loss_sum / own,
                "divided by the rank's own count: the default of every loss function that ends in .mean(). With equal "
                "counts it is right by accident, with unequal ones it is biased.",
            ),
            Mistake(
                "no world size",
                lambda loss_sum, own, counts: loss_sum / sum(counts),
                "the divisor is right, but averaging divides once more by the number of ranks: the gradient is K times "
                "too small. Adam hides most of that, and the clip of the gradient norm no longer acts.",
            ),
            Mistake(
                "world size twice",
                lambda loss_sum, own, counts: loss_sum * len(counts) ** 2 / sum(counts),
                "the world size is in there twice.",
            ),
            Mistake(
                "own count, corrected",
                lambda loss_sum, own, counts: loss_sum * len(counts) / own,
                "the factor for the averaging is right, but the divisor is the rank's own count.",
            ),
            Mistake(
                "weighted by the count",
                lambda loss_sum, own, counts: loss_sum * own * len(counts) / sum(counts),
                "a **sum** over responses already grows with their number; multiplying by the count again weights "
                "large ranks twice.",
            ),
            Mistake(
                "the largest count",
                lambda loss_sum, own, counts: loss_sum / max(counts),
                "divided by the largest count, as if every rank had been padded to it: the gradient is too small by "
                "the share of the padding.",
            ),
        ),
        praise="Equivalently, divide by the *mean* count over ranks.",
    ),
    Exercise(
        id="11.3",
        title="A step of the packer",
        difficulty=3,
        importance=3,
        minutes=15,
        hints=(
            "A part of n rows is padded to its widest: it costs n × the widest, not the sum of the widths.",
            "Grow a run as long as one more row still fits; else close it and begin the next with that row.",
            "A row that is too wide by itself is a run of its own. Do not forget the last run.",
        ),
        observe=_observe_cuts,
        solution=_greedy(_padded_fits),
        mistakes=(
            Mistake(
                "padding is free",
                _greedy(lambda widths, budget: sum(widths) <= budget),
                "the widths are added up. Rows of a part are padded to its widest, and padding takes memory as well.",
            ),
            Mistake(
                "never full",
                _greedy(lambda widths, budget: len(widths) * max(widths) < budget),
                "a part may use the whole budget: at most, not less than.",
            ),
            Mistake(
                "the last one lost",
                _without_last,
                "the last run is missing: its rows would never be trained on, and the longest stand there.",
            ),
            Mistake(
                "one too many",
                _too_late,
                "the run is closed after the row that no longer fitted: it exceeds the budget.",
            ),
            Mistake(
                "a fixed number of rows",
                _fixed_size,
                "every part has as many rows as the widest row allows. It fits, but short rows, of which there are "
                "many, then fill a fraction of the budget.",
            ),
        ),
        praise="Sorted by width, so that rows of like length meet: `logprobs.micro_batches`.",
    ),
    Exercise(
        id="11.4",
        title="The parameters of a Mixture-of-Experts layer",
        difficulty=3,
        importance=3,
        minutes=15,
        hints=(
            "Attention: q and o are hidden × (heads · head_dim), k and v are hidden × (kv_heads · head_dim). An expert "
            "has three matrices: gate, up, down.",
            "Besides: a router, hidden × experts; two norms of the hidden size; q- and k-norm of head_dim each.",
            "Active: everything but the experts that were not chosen. The router runs whole.",
        ),
        observe=_observe_layer,
        solution=_layer,
        mistakes=(
            Mistake(
                "head_dim from hidden",
                _layer_split_heads,
                "head_dim was taken as hidden / heads. It is a size of its own: in Qwen3-30B-A3B it is twice that.",
            ),
            Mistake(
                "k and v for all heads",
                _layer_all_heads,
                "k and v have kv_heads heads (grouped-query attention), fewer than q.",
            ),
            Mistake(
                "two matrices",
                lambda **shape: _layer(**shape, matrices=2),
                "an expert has three matrices: two that go up (gate and up) and one that goes down.",
            ),
            Mistake(
                "no router",
                lambda **shape: _layer(**shape, router=False),
                "the router is missing: hidden × experts.",
            ),
            Mistake(
                "no norms",
                lambda **shape: _layer(**shape, norms=False),
                "the norms are missing: two of the hidden size, and the q- and k-norm of head_dim each.",
            ),
            Mistake(
                "a share of everything",
                _layer_share,
                "top_k / experts was taken of all parameters. Attention, router and norms serve every token.",
            ),
            Mistake(
                "a part of the router",
                lambda **shape: _layer(**shape, active_router=True),
                "only the chosen experts' rows of the router were counted. It scores **all** experts, or it could not "
                "choose.",
            ),
        ),
        rtol=1e-9,
        praise="Times 48 layers, plus embedding and head: 30.5 billion, of which 3.3 serve a token.",
    ),
    Exercise(
        id="11.5",
        title="Bytes of the KV cache",
        difficulty=2,
        importance=3,
        minutes=6,
        hints=(
            "Two vectors for each token and layer.",
            "Which heads have keys and values: those of the queries, or the fewer ones?",
        ),
        observe=_observe_cache,
        solution=_cache,
        mistakes=(
            Mistake(
                "keys only",
                lambda **shape: _cache(**shape) // 2,
                "keys **and** values are kept: twice that.",
            ),
            Mistake(
                "query heads",
                lambda **shape: _cache(**(shape | {"kv_heads": shape["heads"]})),
                "queries are not cached. With grouped-query attention there are fewer heads of keys and values, which "
                "is what makes the cache small.",
            ),
            Mistake(
                "one layer",
                lambda **shape: _cache(**(shape | {"layers": 1})),
                "every layer has a cache of its own.",
            ),
            Mistake(
                "numbers, not bytes",
                lambda **shape: _cache(**(shape | {"itemsize": 1})),
                "that counts numbers. In 16 bits each takes two bytes.",
            ),
            Mistake(
                "bits",
                lambda **shape: 8 * _cache(**shape),
                "itemsize is in bytes already.",
            ),
        ),
        rtol=0.0,
        atol=0.5,
        praise="96 KiB for each token of Qwen3-30B-A3B in 16 bits.",
    ),
    Exercise(
        id="11.6",
        title="Bytes of the routes",
        difficulty=2,
        importance=3,
        minutes=8,
        hints=(
            "An expert's number is all that is kept: how many bytes does it need if there are at most 256 experts?",
            "One number for each of the top_k experts, in every layer; and a byte that says whether the row counts.",
        ),
        observe=_observe_routes,
        solution=_routes,
        mistakes=(
            Mistake(
                "int64",
                lambda tokens, layers, top_k, experts: tokens * (layers * top_k * 8 + 1),
                "eight bytes for each number, torch's default for indices: eight times what is needed.",
            ),
            Mistake(
                "always one byte",
                lambda tokens, layers, top_k, experts: tokens * (layers * top_k + 1),
                "a byte holds 0 to 255. Above 256 experts numbers would wrap around, and a wrong expert be replayed.",
            ),
            Mistake(
                "two bytes at 256",
                lambda tokens, layers, top_k, experts: tokens * (layers * top_k * (1 if experts < 256 else 2) + 1),
                "256 experts are numbered 0 to 255: they still fit in a byte.",
            ),
            Mistake(
                "a mask over experts",
                lambda tokens, layers, top_k, experts: tokens * (layers * experts + 1),
                "that is a row of yes and no for every expert. The numbers of the chosen ones are enough.",
            ),
            Mistake(
                "no valid",
                lambda tokens, layers, top_k, experts: _routes(tokens, layers, top_k, experts) - tokens,
                "the byte that says whether a row counts is missing. Without it, padding is replayed as expert 0.",
            ),
            Mistake(
                "one layer",
                lambda tokens, layers, top_k, experts: _routes(tokens, 1, top_k, experts),
                "every layer has a router, and each chooses anew.",
            ),
        ),
        rtol=0.0,
        atol=0.5,
        praise="`Routes.nbytes` says the same of a real batch.",
    ),
    Exercise(
        id="11.7",
        title="The work of an update, per token",
        difficulty=3,
        importance=2,
        minutes=10,
        hints=(
            "A parameter that serves a token costs a multiply and an add: 2 FLOPs in the forward. The backward costs "
            "twice the forward.",
            "Attention: a token is compared with every token before it, half of the length on average: 2 products "
            "(scores, values) of heads · head_dim multiply-adds each.",
            "6 · active + 12 · layers · heads · head_dim · length / 2.",
        ),
        observe=_observe_flops,
        solution=_flops,
        mistakes=(
            Mistake(
                "forward only",
                lambda **x: _flops(**x) / 3,
                "that is the forward. The backward computes two products for each of the forward's: for the inputs and "
                "for the weights.",
            ),
            Mistake(
                "all parameters",
                lambda **x: _flops(**(x | {"active": x["total"]})),
                "all parameters were counted. A token visits only the experts that were chosen for it.",
            ),
            Mistake(
                "no attention",
                lambda **x: 6 * x["active"],
                "attention between tokens has no parameters but costs work, and at 32,768 tokens more than all else.",
            ),
            Mistake(
                "not causal",
                lambda **x: 6 * x["active"] + 2 * (_flops(**x) - 6 * x["active"]),
                "every token was compared with the whole length. It sees only those before it: half, on average.",
            ),
            Mistake(
                "scores only",
                lambda **x: 6 * x["active"] + (_flops(**x) - 6 * x["active"]) / 2,
                "one product of attention is missing: scores (q·k) and the weighted sum of values.",
            ),
        ),
        praise="The famous 6·N, and the part of it that people forget for long responses.",
    ),
)
