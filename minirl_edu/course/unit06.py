"""Exercises of unit 06: a Mixture-of-Experts layer by hand, gates, margins, and how flips are counted."""

import math
from functools import partial

import torch
from torch import Tensor

from minirl_edu.course import Answer, Observations, exercise
from minirl_edu.course.variants import gates, gradient, zeroed_gates


def _observe_layer(answer: Answer) -> Observations:
    """Three tokens of width 3, four experts; the second token's better expert has the higher number."""
    x = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 1.0, 0.5], [0.2, -0.4, 1.0]])
    router = torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.4, -0.3], [-0.5, 0.9, 0.6], [0.2, 0.1, 1.2]], requires_grad=True)
    experts = torch.arange(36.0).mul(0.7).sin().view(4, 3, 3)
    with_two = answer(x, router, experts, 2)
    (of_router,) = torch.autograd.grad(with_two.square().sum(), router)
    return {
        "the output with k = 2": with_two,
        "the output with k = 1": answer(x, router, experts, 1),
        "the router's gradient": of_router,
    }


def _layer(
    x: Tensor, router: Tensor, experts: Tensor, k: int, *, weights: Answer = gates, ascending: bool = False
) -> Tensor:
    scores = x @ router.T
    chosen = scores.topk(k, dim=-1).indices
    weight = weights(scores, chosen)
    chosen = chosen.sort(-1).values if ascending else chosen
    outputs = torch.einsum("eoi,ni->neo", experts, x).relu()  # every expert's for every token
    return (weight[..., None] * outputs.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))).sum(1)


def _unnormalised(scores: Tensor, experts: Tensor) -> Tensor:
    return scores.softmax(-1).gather(-1, experts)


EX1 = exercise(
    """06.1 A layer by hand (difficulty 2, importance 5, 12 minutes)

    1. Four steps: router logits, the k best experts, their gates, the weighted sum of their outputs.
    2. `(x @ router.T).softmax(-1).topk(k, dim=-1)` returns the probabilities of the chosen experts and their numbers,
       in matching order.
    3. The gates of the chosen experts add up to one: divide by their sum.
    4. A loop over tokens and over the chosen experts is fine: `output[n] += gate * torch.relu(experts[e] @ x[n])`.

    - gates not renormalised: the gates add up to less than one: the probabilities of the experts that were not chosen
      are missing from the sum. This family divides by the sum over the chosen ones.
    - all experts used: every expert contributes, and k has no effect. That is a dense layer: no choice, no flip, and
      the work of all experts.
    - raw logits as gates: the weights are the router logits themselves: they may be negative and don't add up to one.
    - equal gates: all chosen experts count alike. Then the router's gradient is zero everywhere: it could never learn.
    - gates and experts in different orders: the right gates, given to the wrong experts: the experts were brought into
      ascending order and the gates were not. Any order is fine, but both must have the same.
    - experts transposed: each expert multiplies from the wrong side. `experts[e]` is [out, in], as in `nn.Linear`.

    With k = 1 a renormalised gate is always 1, and the router gets no gradient at all.
    """,
    observe=_observe_layer,
    solution=_layer,
    mistakes={
        "gates not renormalised": partial(_layer, weights=_unnormalised),
        "all experts used": lambda x, router, experts, k: _layer(x, router, experts, len(experts)),
        "raw logits as gates": partial(_layer, weights=lambda scores, experts: scores.gather(-1, experts)),
        "equal gates": partial(_layer, weights=lambda scores, experts: gates(0 * scores, experts)),
        "gates and experts in different orders": partial(_layer, ascending=True),
        "experts transposed": lambda x, router, experts, k: _layer(x, router, experts.mT, k),
    },
)


def _observe_gates(answer: Answer) -> Observations:
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 0.4, 1.5, 1.2]], requires_grad=True)
    # Token 0: its own two best. Token 1: expert 3 is among its two best, expert 0 is not.
    found = answer(scores, torch.tensor([[0, 1], [3, 0]]))
    of_scores = gradient(found, scores, torch.tensor([1.0, 3.0]))
    return {
        "the gates of a token's own two best experts": found[0],
        "the gates of two experts of which one is not among the best": found[1],
        "the gradient of the router logits": of_scores,
    }


def _over_tokens(scores: Tensor, experts: Tensor) -> Tensor:
    picked = scores.softmax(0).gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


EX2 = exercise(
    """06.2 Gates for given experts (difficulty 3, importance 5, 10 minutes)

    1. The experts are given, the logits are live. Nothing here has to be chosen.
    2. Softmax over all experts, then pick the given ones, then divide by their sum.
    3. `scores.softmax(-1).gather(-1, experts)` picks, in the order of `experts`.

    - scores zeroed outside the live top-k: an expert outside the token's own best got the gate 0, and no gradient. Its
      score was set to zero before it was picked. A training framework had this bug. Nothing crashes, and the router
      stops learning about exactly the experts that matter.
    - the live gates: these are the gates of the token's own best experts, whatever was given: the weights of one choice
      would multiply the outputs of another.
    - not renormalised: the gates of a token add up to less than one. Some families leave them so. Here they are divided
      by their sum.
    - gates detached: the values are right, but no gradient reaches the router logits. Only the selection is fixed: the
      gates are live.
    - softmax over the tokens: the softmax ran over the tokens instead of over the experts: each token's gates depend on
      its neighbours in the batch.

    This is all that routing replay does (unit 07): the experts come from elsewhere, the gates are live.
    """,
    observe=_observe_gates,
    solution=gates,
    mistakes={
        "scores zeroed outside the live top-k": zeroed_gates,
        "the live gates": lambda scores, experts: gates(scores, scores.topk(experts.shape[-1]).indices),
        "not renormalised": _unnormalised,
        "gates detached": lambda scores, experts: gates(scores, experts).detach(),
        "softmax over the tokens": _over_tokens,
    },
)


def _observe_margin(answer: Answer) -> Observations:
    scores = torch.tensor([[0.3, 2.0, -1.0, 1.4, 0.9], [1.0, -0.6, 0.7, -2.0, 1.1]])
    return {"the margins with k = 2": answer(scores, 2), "the margins with k = 3": answer(scores, 3)}


def _gap(scores: Tensor, place: int) -> Tensor:
    """Between the logit at this place of the ranking, counted from 0, and the next."""
    ranked = scores.sort(-1, descending=True).values
    return ranked[..., place] - ranked[..., place + 1]


EX3 = exercise(
    """06.3 The margin of a choice (difficulty 1, importance 4, 5 minutes)

    1. How far apart are the last expert that was chosen and the first that was not?
    2. Sort the logits in descending order. Places count from 0.

    - one place too high: this is the gap between two experts that were both chosen. If they swap places, the set stays.
    - one place too low: this is the gap between two experts that both stayed out. The k-th of a list stands at index k
      − 1.
    - the best against the second: this is the gap between the best and the second best. It decides a top-1 only.
    - between probabilities: this is a difference of probabilities. It depends on all other experts too; the noise that
      matters is on the logits, and so is the margin.
    - not sorted: these are the logits of two neighbouring experts, in the order of their numbers: sort first.

    A margin of m survives every disturbance below m/2 in each logit.
    """,
    observe=_observe_margin,
    solution=lambda scores, k: _gap(scores, k - 1),
    mistakes={
        "one place too high": lambda scores, k: _gap(scores, k - 2),
        "one place too low": lambda scores, k: _gap(scores, k),
        "the best against the second": lambda scores, k: _gap(scores, 0),
        "between probabilities": lambda scores, k: _gap(scores.softmax(-1), k - 1),
        "not sorted": lambda scores, k: scores[..., k - 1] - scores[..., k],
    },
)


_MARGINS = torch.tensor([0.0, 0.1, 0.3, 1.0])


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


EX4 = exercise(
    """06.4 How often noise flips a pair (difficulty 2, importance 4, 8 minutes)

    1. The two change places when the difference of their noises exceeds the margin.
    2. The difference of two independent noises has the variance σ² + σ².
    3. So it is Φ(−m/(σ√2)). In PyTorch Φ(x) = 0.5 · erfc(−x/√2), and the roots can be combined.

    - noise on one logit only: this holds if only one of the two logits is noisy. Both are, and the variances of
      independent noises add up.
    - both tails: at margin 0 this says that a flip is certain; by symmetry it is one half. Only one direction of the
      noise brings the two closer.
    - the other side: this grows with the margin: it is the probability that the choice stays.
    - standard deviations added: the standard deviations of the two noises were added. Independent noises add their
      variances: the difference has σ√2, not 2σ.
    - variance for standard deviation: σ is squared: the normal distribution's argument is in units of the standard
      deviation.

    The probability is large only where the margin is at most a few σ. The share of tokens there decides the flip rate.
    """,
    observe=lambda answer: {
        "the probability at noise 0.2, from margin 0 to 1": answer(_MARGINS, 0.2),
        "the probability at noise 0.5, from margin 0 to 1": answer(_MARGINS, 0.5),
    },
    solution=lambda margin, sigma: _normal_cdf(-margin / (sigma * math.sqrt(2))),
    mistakes={
        "noise on one logit only": lambda margin, sigma: _normal_cdf(-margin / sigma),
        "both tails": lambda margin, sigma: 2 * _normal_cdf(-margin / (sigma * math.sqrt(2))),
        "the other side": lambda margin, sigma: _normal_cdf(margin / (sigma * math.sqrt(2))),
        "standard deviations added": lambda margin, sigma: _normal_cdf(-margin / (2 * sigma)),
        "variance for standard deviation": lambda margin, sigma: _normal_cdf(-margin / (sigma**2 * math.sqrt(2))),
    },
)


def _observe_flip_rate(answer: Answer) -> Observations:
    """One layer has only another order; the other has real flips, one of them under the mask."""
    a = torch.tensor([[[[0, 1], [2, 3]], [[4, 5], [0, 3]], [[6, 7], [5, 1]], [[0, 2], [4, 6]]]], dtype=torch.uint8)
    b = torch.tensor([[[[1, 0], [2, 4]], [[4, 5], [1, 2]], [[7, 6], [1, 5]], [[0, 2], [7, 5]]]], dtype=torch.uint8)
    a, b = a.expand(2, -1, -1, -1).clone(), b.expand(2, -1, -1, -1).clone()
    b[1, 0, 0] = torch.tensor([0, 3], dtype=torch.uint8)
    b[1, 2, 1] = torch.tensor([0, 2], dtype=torch.uint8)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    return {
        "the rate of routes against themselves": answer(a, a, mask),
        "the rate of each layer": answer(a, b, mask),
    }


def _flips(a: Tensor, b: Tensor) -> Tensor:
    """[B, S, L], where the sets differ."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)


EX5 = exercise(
    """06.5 Flip rate: sets, and only real tokens (difficulty 3, importance 4, 10 minutes)

    1. Two engines that chose the same experts may list them in different orders.
    2. Sorted lists of distinct numbers are equal where the sets are equal.
    3. `flips[mask]` keeps the tokens that count, [n, L]; then a mean over n.

    - order counted: experts 6, 7 against 7, 6 counts as a flip. The layer's output is a sum: its order means nothing,
      and engines differ in it.
    - experts counted instead of tokens: this counts places in the sorted lists that differ. A token counts once,
      however many of its experts changed.
    - mask ignored: padding counts too. No engine routed those rows, so they contain no flip.
    - divided by all places: flips under the mask are left out, but the padding still counts in the denominator: the
      more padding, the smaller the rate.
    - compared by their sums: different sets can have the same sum: experts 0 and 3 against 1 and 2 went unnoticed.
    - any layer: this is the share of tokens with a flip in *some* layer, the same number for all layers. The rate of
      each layer was asked for.

    `Routes.flip_rate` does this one layer at a time, to keep the routes compact.
    """,
    observe=_observe_flip_rate,
    solution=lambda a, b, mask: _flips(a, b)[mask].float().mean(0),
    mistakes={
        "order counted": lambda a, b, mask: (a != b).any(-1)[mask].float().mean(0),
        "experts counted instead of tokens": lambda a, b, mask: (
            (a.sort(-1).values != b.sort(-1).values)[mask].float().mean((0, 2))
        ),
        "mask ignored": lambda a, b, mask: _flips(a, b).float().mean((0, 1)),
        "divided by all places": lambda a, b, mask: (_flips(a, b) & mask[..., None]).float().mean((0, 1)),
        "compared by their sums": lambda a, b, mask: (a.int().sum(-1) != b.int().sum(-1))[mask].float().mean(0),
        "any layer": lambda a, b, mask: _flips(a, b).any(-1, keepdim=True).expand(a.shape[:3])[mask].float().mean(0),
    },
)


EX6 = exercise(
    """06.6 Two per cent, 48 times (difficulty 2, importance 3, 5 minutes)

    1. When is a token *not* flipped in any layer?
    2. Independent events: the chances that each layer stays are multiplied.

    - rates added: the sum counts a token twice that is flipped in two layers. It is an upper bound; with enough layers
      it passes 1.
    - flipped in all layers: this is the chance of a flip in *every* layer.
    - flipped in none: this is the share of tokens that have no flip at all.
    - mean of the layers: this is the rate of a typical layer. It does not grow with the depth, but the number of
      chances to flip does.

    In a deep model most tokens meet a flip somewhere, even if each layer flips few of them.
    """,
    observe=lambda answer: {
        "the share with two layers": answer(torch.tensor([0.1, 0.3])),
        "the share with 48 layers": answer(torch.full((48,), 0.02)),
    },
    solution=lambda rates: 1 - (1 - rates).prod(),
    mistakes={
        "rates added": lambda rates: rates.sum(),
        "flipped in all layers": lambda rates: rates.prod(),
        "flipped in none": lambda rates: (1 - rates).prod(),
        "mean of the layers": lambda rates: rates.mean(),
    },
)

EXERCISES = (EX1, EX2, EX3, EX4, EX5, EX6)
