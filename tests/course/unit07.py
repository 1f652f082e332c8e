"""Two right answers to each exercise of unit 07, written differently from the solutions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minirl_edu.routing import Routes, RoutingReplay


def choice_by_loops(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token; the order of the experts is free."""
    experts, gates = [], []
    for row, given, replayed in zip(scores, forced.tolist(), valid.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda e: row[e].item())
        chosen = given if replayed else ranked[-len(given) :]
        weights = torch.stack([row[e].exp() for e in chosen])
        experts.append(chosen)
        gates.append(weights / weights.sum())
    return torch.tensor(experts), torch.stack(gates)


def choice_by_masking(scores: Tensor, forced: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Forbid all other experts, then let the softmax and a top-k do it."""
    k = forced.shape[-1]
    allowed = torch.zeros_like(scores).scatter(-1, forced, 1.0).bool()
    worst = scores.sort(-1).values[:, -k, None]
    allowed = torch.where(valid[:, None], allowed, scores >= worst)
    gates, experts = scores.masked_fill(~allowed, -math.inf).softmax(-1).topk(k)
    return experts, gates


def plan_by_rules(method: str, place: str) -> str:
    """In words."""
    if method == "none" or place == "evaluation":
        return "live"
    if method == "R3":
        return "e_mu"
    return "live" if place == "π_old" else "e_old"


def plan_by_lookup(method: str, place: str) -> str:
    """The places that are not live."""
    replayed = {("R2", "π_θ, first mini-batch"): "e_old", ("R2", "π_θ, later mini-batches"): "e_old"}
    replayed |= {("R3", name): "e_mu" for name in ("π_old", "π_θ, first mini-batch", "π_θ, later mini-batches")}
    return replayed.get((method, place), "live")


def removed_by_sums(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor) -> float:
    """(what was there − what is left) / what was there, token by token."""

    def total(old: Tensor) -> float:
        pairs = zip(mu[mask].tolist(), old[mask].tolist(), strict=True)
        return sum(math.expm1(b - a) - (b - a) for a, b in pairs)

    return (total(live) - total(replayed)) / total(live)


def removed_by_where(mu: Tensor, live: Tensor, replayed: Tensor, mask: Tensor) -> Tensor:
    """Ratios of 1 outside the mask add nothing to k3."""
    ratios = torch.stack([(old - mu).masked_fill(~mask, 0.0).double().exp() for old in (live, replayed)])
    terms = (ratios - ratios.log() - 1).sum((1, 2))
    return -terms.diff()[0] / terms[0]


def rows_by_loops(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: all real tokens but the last."""
    batch, columns = mask.shape
    experts = torch.full((batch, columns, *rows.shape[2:]), 99)
    valid = torch.zeros(batch, columns, dtype=torch.bool)
    for i in range(batch):
        for position in mask[i].nonzero()[:-1, 0].tolist():
            experts[i, position], valid[i, position] = rows[i, position], True
    return experts, valid


def rows_by_counting(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A real token is an input if it is not the last one of its row."""
    count = mask.long().cumsum(1)
    return torch.cat([rows, rows[:, -1:]], dim=1), mask & (count < count[:, -1:])


def step_with_gradients_set(
    model: nn.Module, replay: RoutingReplay, routes: Routes, loss: Callable[[], Tensor]
) -> None:
    """By `torch.autograd.grad`, inside the context."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with replay.replay(routes):
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def step_with_two_contexts(model: nn.Module, replay: RoutingReplay, routes: Routes, loss: Callable[[], Tensor]) -> None:
    """The context opened again for the backward."""
    for parameter in model.parameters():
        parameter.grad = None
    with replay.replay(routes):
        value = 2 * loss()
        (value / 2).backward()


def experts_by_autograd(logits: Tensor, own: int, shares: Tensor, advantages: Tensor) -> Tensor:
    """The surrogate of every token that every expert may write, differentiated."""
    gradients = []
    for replayed in (False, True):
        z = logits.clone().requires_grad_()
        logp = z.log_softmax(-1)
        surrogate = torch.zeros((), dtype=logits.dtype)
        for e in range(len(logits)):
            mu = logp[e].detach()
            used = logp[e] if replayed else logp[own]
            surrogate = surrogate + (shares[e] * mu.exp() * (used.detach() - mu).exp() * advantages * used).sum()
        gradients.append(torch.autograd.grad(surrogate, z)[0])
    return torch.stack(gradients)


def experts_by_jacobian(logits: Tensor, own: int, shares: Tensor, advantages: Tensor) -> Tensor:
    """The gradient of E_π[A] is (diag(π) − ππᵀ) A; a mask says who gets it."""
    probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    jacobian = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    only = nn.functional.one_hot(torch.tensor(own), len(logits)).to(probs.dtype)
    return torch.stack([only, shares])[..., None] * (jacobian @ advantages)


RIGHT = {
    "07.1": (choice_by_loops, choice_by_masking),
    "07.2": (plan_by_rules, plan_by_lookup),
    "07.3": (
        lambda method, mini_batch: (method, mini_batch) != ("R2", "first"),
        lambda method, mini_batch: int({"R2": "e_old", "R3": "e_mu"}[method] == "e_mu" or mini_batch == "later"),
    ),
    "07.4": (removed_by_sums, removed_by_where),
    "07.5": (rows_by_loops, rows_by_counting),
    "07.6": (step_with_gradients_set, step_with_two_contexts),
    "07.7": (experts_by_autograd, experts_by_jacobian),
}
