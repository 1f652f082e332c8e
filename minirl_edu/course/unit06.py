"""Exercises of unit 06: a Mixture-of-Experts layer by hand, gates, margins, and how flips are counted."""

import math

import torch
from torch import Tensor

from minirl_edu.course import Exercise, Mistake, Observations

# --------------------------------------------------------------------------------------------- 06.1, a layer by hand


def _layer_case() -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens of width 3, four experts; the second token's better expert has the higher number."""
    x = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 1.0, 0.5], [0.2, -0.4, 1.0]])
    router = torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.4, -0.3], [-0.5, 0.9, 0.6], [0.2, 0.1, 1.2]])
    experts = torch.arange(36.0).mul(0.7).sin().view(4, 3, 3)
    return x, router, experts


def _observe_layer(answer) -> Observations:
    x, router, experts = _layer_case()
    router.requires_grad_()
    with_two = answer(x, router, experts, 2)
    (gradient,) = torch.autograd.grad(with_two.square().sum(), router)
    return {
        "the output with k = 2": with_two,
        "the output with k = 1": answer(x, router, experts, 1),
        "the router's gradient": gradient,
    }


def _expert_outputs(x: Tensor, experts: Tensor) -> Tensor:
    """[n, E, d], every expert's output for every token."""
    return torch.einsum("eoi,ni->neo", experts, x).relu()


def _layer(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    probabilities = (x @ router.T).softmax(-1)
    picked, chosen = probabilities.topk(k, dim=-1)
    gates = picked / picked.sum(-1, keepdim=True)
    outputs = _expert_outputs(x, experts).gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
    return (gates[..., None] * outputs).sum(1)


def _weighted(x: Tensor, experts: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    outputs = _expert_outputs(x, experts).gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
    return (gates[..., None] * outputs).sum(1)


def _layer_unnormalised(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    picked, chosen = (x @ router.T).softmax(-1).topk(k, dim=-1)
    return _weighted(x, experts, chosen, picked)


def _layer_dense(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    return torch.einsum("ne,neo->no", (x @ router.T).softmax(-1), _expert_outputs(x, experts))


def _layer_raw(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    picked, chosen = (x @ router.T).topk(k, dim=-1)
    return _weighted(x, experts, chosen, picked)


def _layer_equal(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    picked, chosen = (x @ router.T).topk(k, dim=-1)
    return _weighted(x, experts, chosen, torch.ones_like(picked) / k + 0 * picked)


def _layer_paired_wrongly(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    picked, chosen = (x @ router.T).softmax(-1).topk(k, dim=-1)
    return _weighted(x, experts, chosen.sort(-1).values, picked / picked.sum(-1, keepdim=True))


def _layer_transposed(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    return _layer(x, router, experts.mT, k)


# ---------------------------------------------------------------------------------------- 06.2, gates of given experts


def _observe_gates(answer) -> Observations:
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 0.4, 1.5, 1.2]], requires_grad=True)
    # Token 0: its own two best. Token 1: expert 3 is among its two best, expert 0 is not.
    experts = torch.tensor([[0, 1], [3, 0]])
    gates = answer(scores, experts)
    gradient = torch.zeros_like(scores)
    if gates.requires_grad:
        (gradient,) = torch.autograd.grad((gates * torch.tensor([1.0, 3.0])).sum(), scores)
    return {
        "the gates of a token's own two best experts": gates[0],
        "the gates of two experts of which one is not among the best": gates[1],
        "the gradient of the router logits": gradient,
    }


def _gates(scores: Tensor, experts: Tensor) -> Tensor:
    picked = scores.softmax(-1).gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


def _gates_zeroed(scores: Tensor, experts: Tensor) -> Tensor:
    live = scores.topk(experts.shape[-1], dim=-1).indices
    kept = torch.zeros_like(scores).scatter(-1, live, 1.0) * scores.softmax(-1)
    picked = kept.gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


def _gates_live(scores: Tensor, experts: Tensor) -> Tensor:
    picked = scores.softmax(-1).topk(experts.shape[-1], dim=-1).values
    return picked / picked.sum(-1, keepdim=True)


def _gates_over_tokens(scores: Tensor, experts: Tensor) -> Tensor:
    picked = scores.softmax(0).gather(-1, experts)
    return picked / picked.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------ 06.3, margins


def _observe_margin(answer) -> Observations:
    scores = torch.tensor([[0.3, 2.0, -1.0, 1.4, 0.9], [1.0, -0.6, 0.7, -2.0, 1.1]])
    return {"the margins with k = 2": answer(scores, 2), "the margins with k = 3": answer(scores, 3)}


def _margin(scores: Tensor, k: int) -> Tensor:
    ranked = scores.sort(-1, descending=True).values
    return ranked[..., k - 1] - ranked[..., k]


def _ranked_difference(first: int, second: int):
    """A margin between other places of the ranking, counted from k."""

    def answer(scores: Tensor, k: int) -> Tensor:
        ranked = scores.sort(-1, descending=True).values
        return ranked[..., k + first] - ranked[..., k + second]

    return answer


# --------------------------------------------------------------------------------------------- 06.4, flip probability


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _observe_flip_probability(answer) -> Observations:
    margin = torch.tensor([0.0, 0.1, 0.3, 1.0])
    return {
        "the probability at noise 0.2, from margin 0 to 1": answer(margin, 0.2),
        "the probability at noise 0.5, from margin 0 to 1": answer(margin, 0.5),
    }


# ------------------------------------------------------------------------------------------------------ 06.5, flip rate


def _observe_flip_rate(answer) -> Observations:
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


def _flip_rate(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return _flips(a, b)[mask].float().mean(0)


def _flip_rate_of_sums(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return (a.int().sum(-1) != b.int().sum(-1))[mask].float().mean(0)


def _flip_rate_any_layer(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return _flips(a, b).any(-1, keepdim=True).expand(a.shape[:3])[mask].float().mean(0)


# ------------------------------------------------------------------------------------------------------ 06.6, any layer


def _observe_any_layer(answer) -> Observations:
    return {
        "the share with two layers": answer(torch.tensor([0.1, 0.3])),
        "the share with 48 layers": answer(torch.full((48,), 0.02)),
    }


EXERCISES = (
    Exercise(
        id="06.1",
        title="A layer by hand",
        difficulty=2,
        importance=5,
        minutes=12,
        hints=(
            "Four steps: router logits, the k best experts, their gates, the weighted sum of their outputs.",
            "`(x @ router.T).softmax(-1).topk(k, dim=-1)` returns the probabilities of the chosen experts and their "
            "numbers, in matching order.",
            "The gates of the chosen experts add up to one: divide by their sum.",
            "A loop over tokens and over the chosen experts is fine: "
            "`output[n] += gate * torch.relu(experts[e] @ x[n])`.",
        ),
        observe=_observe_layer,
        solution=_layer,
        mistakes=(
            Mistake(
                "gates not renormalised",
                _layer_unnormalised,
                "the gates add up to less than one: the probabilities of the experts that were not chosen are missing "
                "from the sum. This family divides by the sum over the chosen ones.",
            ),
            Mistake(
                "all experts used",
                _layer_dense,
                "every expert contributes. That is a dense layer, and k has no effect: no choice, no flip, and eight "
                "times the work.",
            ),
            Mistake(
                "raw logits as gates",
                _layer_raw,
                "the weights are the router logits themselves: they may be negative and don't add up to one.",
            ),
            Mistake(
                "equal gates",
                _layer_equal,
                "all chosen experts count alike. Then the router's gradient is zero everywhere: it could never learn.",
            ),
            Mistake(
                "gates and experts in different orders",
                _layer_paired_wrongly,
                "the right gates, given to the wrong experts: the experts were brought into ascending order and the "
                "gates were not. The order of a top-k is free, but both have to be in the same one.",
            ),
            Mistake(
                "experts transposed",
                _layer_transposed,
                "each expert multiplies from the wrong side. `experts[e]` is [out, in], as in `nn.Linear`.",
            ),
        ),
        praise="With k = 1 a renormalised gate is always 1, and the router gets no gradient at all.",
    ),
    Exercise(
        id="06.2",
        title="Gates for given experts",
        difficulty=3,
        importance=5,
        minutes=10,
        hints=(
            "The experts are given, the logits are live. Nothing here has to be chosen.",
            "Softmax over all experts, then pick the given ones, then divide by their sum.",
            "`scores.softmax(-1).gather(-1, experts)` picks, in the order of `experts`.",
        ),
        observe=_observe_gates,
        solution=_gates,
        mistakes=(
            Mistake(
                "scores zeroed outside the live top-k",
                _gates_zeroed,
                "an expert outside the token's own best got the gate 0, and no gradient. Its score was set to zero "
                "before it was picked. This bug stood in a training framework: nothing crashes, the router silently "
                "stops learning about just the experts that matter.",
            ),
            Mistake(
                "the live gates",
                _gates_live,
                "these are the gates of the token's own best experts, whatever was given: the weights of one choice "
                "would be multiplied with the outputs of another.",
            ),
            Mistake(
                "not renormalised",
                lambda scores, experts: scores.softmax(-1).gather(-1, experts),
                "the gates of a token add up to less than one. In the families that leave them so this is right; here "
                "they are divided by their sum.",
            ),
            Mistake(
                "gates detached",
                lambda scores, experts: _gates(scores, experts).detach(),
                "the values are right, but no gradient reaches the router logits. Only the selection is fixed: the "
                "gates are live.",
            ),
            Mistake(
                "softmax over the tokens",
                _gates_over_tokens,
                "the softmax ran over the tokens instead of over the experts: each token's gates depend on its "
                "neighbours in the batch.",
            ),
        ),
        praise="This is all that routing replay does (unit 07): the experts come from elsewhere, the gates are live.",
    ),
    Exercise(
        id="06.3",
        title="The margin of a choice",
        difficulty=1,
        importance=4,
        minutes=5,
        hints=(
            "How far apart are the last expert that was chosen and the first that was not?",
            "Sort the logits in descending order. Places count from 0.",
        ),
        observe=_observe_margin,
        solution=_margin,
        mistakes=(
            Mistake(
                "one place too high",
                _ranked_difference(-2, -1),
                "this is the gap between two experts that were both chosen. If they swap places, the set stays.",
            ),
            Mistake(
                "one place too low",
                _ranked_difference(0, 1),
                "this is the gap between two experts that both stayed out. The k-th of a list stands at index k − 1.",
            ),
            Mistake(
                "the best against the second",
                lambda scores, k: _ranked_difference(-k, 1 - k)(scores, k),
                "this is the gap between the best and the second best. That decides a top-1, and nothing else.",
            ),
            Mistake(
                "between probabilities",
                lambda scores, k: _margin(scores.softmax(-1), k),
                "this is a difference of probabilities. It depends on all other experts too; the noise that "
                "matters is on the logits, and so is the margin.",
            ),
            Mistake(
                "not sorted",
                lambda scores, k: scores[..., k - 1] - scores[..., k],
                "these are the logits of two neighbouring experts, in the order of their numbers: sort first.",
            ),
        ),
        praise="A margin of m survives every disturbance below m/2 in each logit.",
    ),
    Exercise(
        id="06.4",
        title="How often noise flips a pair",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "The two change places when the difference of their noises exceeds the margin.",
            "The difference of two independent noises has the variance σ² + σ².",
            "So it is Φ(−m/(σ√2)). In PyTorch Φ(x) = 0.5 · erfc(−x/√2), and the roots can be combined.",
        ),
        observe=_observe_flip_probability,
        solution=lambda margin, sigma: _normal_cdf(-margin / (sigma * math.sqrt(2))),
        mistakes=(
            Mistake(
                "noise on one logit only",
                lambda margin, sigma: _normal_cdf(-margin / sigma),
                "this holds if only one of the two logits is noisy. Both are, and the variances of independent noises "
                "add up.",
            ),
            Mistake(
                "both tails",
                lambda margin, sigma: 2 * _normal_cdf(-margin / (sigma * math.sqrt(2))),
                "at margin 0 this says that a flip is certain; by symmetry it is one half. Only one direction of the "
                "noise brings the two closer.",
            ),
            Mistake(
                "the other side",
                lambda margin, sigma: _normal_cdf(margin / (sigma * math.sqrt(2))),
                "this grows with the margin: it is the probability that the choice stays.",
            ),
            Mistake(
                "standard deviations added",
                lambda margin, sigma: _normal_cdf(-margin / (2 * sigma)),
                "the standard deviations of the two noises were added. Independent noises add their variances: the "
                "difference has σ√2, not 2σ.",
            ),
            Mistake(
                "variance for standard deviation",
                lambda margin, sigma: _normal_cdf(-margin / (sigma**2 * math.sqrt(2))),
                "σ is squared: the normal distribution's argument is in units of the standard deviation.",
            ),
        ),
        praise="It is large only where the margin is at most a few σ. How many tokens lie there decides the flip rate.",
    ),
    Exercise(
        id="06.5",
        title="Flip rate: sets, and only real tokens",
        difficulty=3,
        importance=4,
        minutes=10,
        hints=(
            "Two engines that chose the same experts may list them in different orders.",
            "Sorted lists of distinct numbers are equal where the sets are equal.",
            "`flips[mask]` keeps the tokens that count, [n, L]; then a mean over n.",
        ),
        observe=_observe_flip_rate,
        solution=_flip_rate,
        mistakes=(
            Mistake(
                "order counted",
                lambda a, b, mask: (a != b).any(-1)[mask].float().mean(0),
                "experts 6, 7 against 7, 6 counts as a flip. The layer's output is a sum: its order means nothing, and "
                "engines differ in it.",
            ),
            Mistake(
                "experts counted instead of tokens",
                lambda a, b, mask: (a.sort(-1).values != b.sort(-1).values)[mask].float().mean((0, 2)),
                "this counts places in the sorted lists that differ. A token is flipped or it is not.",
            ),
            Mistake(
                "mask ignored",
                lambda a, b, mask: _flips(a, b).float().mean((0, 1)),
                "padding counts too. No engine routed those rows, so whatever is in them is not a flip.",
            ),
            Mistake(
                "divided by all places",
                lambda a, b, mask: (_flips(a, b) & mask[..., None]).float().mean((0, 1)),
                "flips under the mask are left out, but the padding still counts in the denominator: the more "
                "padding, the smaller the rate.",
            ),
            Mistake(
                "compared by their sums",
                _flip_rate_of_sums,
                "different sets can have the same sum: experts 0 and 3 against 1 and 2 went unnoticed.",
            ),
            Mistake(
                "any layer",
                _flip_rate_any_layer,
                "this is the share of tokens with a flip in *some* layer, the same number for all layers. The rate "
                "of each layer was asked for.",
            ),
        ),
        praise="`Routes.flip_rate` does this one layer at a time, to keep the routes compact.",
    ),
    Exercise(
        id="06.6",
        title="Two per cent, 48 times",
        difficulty=2,
        importance=3,
        minutes=5,
        hints=(
            "When is a token *not* flipped in any layer?",
            "Independent events: the chances that each layer stays are multiplied.",
        ),
        observe=_observe_any_layer,
        solution=lambda rates: 1 - (1 - rates).prod(),
        mistakes=(
            Mistake(
                "rates added",
                lambda rates: rates.sum(),
                "the sum counts a token twice that is flipped in two layers. It is an upper bound; with enough layers "
                "it passes 1.",
            ),
            Mistake(
                "flipped in all layers",
                lambda rates: rates.prod(),
                "this is the chance of a flip in *every* layer.",
            ),
            Mistake(
                "flipped in none",
                lambda rates: (1 - rates).prod(),
                "this is the share of tokens that have no flip at all.",
            ),
            Mistake(
                "mean of the layers",
                lambda rates: rates.mean(),
                "this is the rate of a typical layer. It does not grow with the depth, but the number of chances to "
                "flip does.",
            ),
        ),
        praise="In a deep model most tokens meet a flip somewhere, even if each layer flips few of them.",
    ),
)
