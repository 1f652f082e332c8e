"""Two right answers to each exercise of lab 03, each written differently from the solution."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def k3_loop(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> float:
    """Token by token, in plain Python."""
    terms = []
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                difference = float(logp_old[b, t]) - float(logp_rollout[b, t])
                terms.append(math.exp(difference) - 1 - difference)
    return sum(terms) / len(terms)


def k3_where(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """expm1, with a ratio of 1 outside the mask."""
    one = torch.zeros_like(logp_old)
    mu, pi = torch.where(mask, logp_rollout, one), torch.where(mask, logp_old, one)
    return (torch.expm1(pi - mu) + mu - pi).sum() / mask.sum()


def bias_autograd(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    """By differentiating E_π[R] and E_μ[R log π]."""
    logits = logits.requires_grad_()
    wanted = (logits.softmax(0) * rewards).sum()
    without = (mu * rewards * logits.log_softmax(0)).sum()
    return torch.stack([torch.autograd.grad(objective, logits)[0] for objective in (wanted, without)])


def bias_algebra(logits: Tensor, mu: Tensor, rewards: Tensor) -> Tensor:
    """p R − (Σ p R) π with p = π, then with p = μ."""
    pi = logits.exp() / logits.exp().sum()
    return torch.stack([p * rewards - torch.dot(p, rewards) * pi for p in (pi, mu)])


def weight_loop(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    """Numbers, one by one: they carry no gradient."""
    rows = zip(logp.tolist(), logp_rollout.tolist(), strict=True)
    return torch.tensor(
        [[min(math.exp(new - mu), cap) for new, mu in zip(*pair, strict=True)] for pair in rows], dtype=logp.dtype
    )


@torch.no_grad()
def weight_product(logp: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    """The product of the two factors, capped at the end."""
    discrepancy = logp_old.exp() / logp_rollout.exp()
    staleness = logp.exp() / logp_old.exp()
    return torch.minimum(discrepancy * staleness, torch.full_like(staleness, cap))


def cap_moments(pi: Tensor, mu: Tensor, values: Tensor, caps: tuple[float, ...], n: int) -> Tensor:
    """All caps at once, the variance as E[x²] − E[x]²."""
    x = torch.minimum(pi / mu, torch.tensor(caps, dtype=pi.dtype)[:, None]) * values
    first, second = x @ mu, x.square() @ mu
    return torch.stack([first - values @ pi, ((second - first.square()) / n).sqrt()], dim=1)


def cap_loop(pi: Tensor, mu: Tensor, values: Tensor, caps: tuple[float, ...], n: int) -> list[list[float]]:
    """Plain Python; the bias as minus what the cap cuts off."""
    rows = []
    for cap in caps:
        triples = list(zip(pi.tolist(), mu.tolist(), values.tolist(), strict=True))
        bias = -sum(max(p - cap * m, 0.0) * v for p, m, v in triples)
        draws = [(m, min(p / m, cap) * v) for p, m, v in triples]
        mean = sum(m * x for m, x in draws)
        rows.append([bias, math.sqrt(sum(m * (x - mean) ** 2 for m, x in draws) / n)])
    return rows


def tempered_logsumexp(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The drawn logit over T, minus the logarithm of the normaliser."""
    scaled = logits / temperature
    drawn = (scaled * torch.nn.functional.one_hot(tokens, logits.shape[-1])).sum(-1)
    return drawn - scaled.logsumexp(-1)


def tempered_powers(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Probabilities at temperature 1, raised to 1/T and normalised again."""
    out = torch.empty(tokens.shape)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1]):
            powers = logits[b, t].softmax(0) ** (1 / temperature)
            out[b, t] = (powers[tokens[b, t]] / powers.sum()).log()
    return out


def choice_in_another_order() -> dict[str, str]:
    """The same choices, from the last to the first."""
    return {
        "drawn by the trainer": "none",
        "survives a huge ratio": "k1",
        "never negative but biased": "k2",
        "never negative and unbiased": "k3",
    }


def choice_by_elimination() -> dict[str, str]:
    """Upper case; what is left for the last two follows from what the estimators do with r = 1000."""
    never_negative = {"unbiased": "K3", "biased": "K2"}
    choices = {f"never negative {'and' if k == 'unbiased' else 'but'} {k}": v for k, v in never_negative.items()}
    size = {"K1": math.log(1000), "K3": 1000 - 1 - math.log(1000)}
    return {**choices, "survives a huge ratio": min(size, key=lambda k: size[k]), "drawn by the trainer": "None"}


def drift_by_tokens(lengths: Tensor, rewards: Tensor, pi: Tensor, mu: Tensor) -> Tensor:
    """Token by token: each pushes with its response's advantage."""
    total = torch.zeros_like(pi)
    for length, reward in zip(lengths.tolist(), rewards.tolist(), strict=True):
        for _ in range(int(length)):
            total += (reward - float(rewards.mean())) * (mu - pi) / len(rewards)
    return total


def drift_by_covariance(lengths: Tensor, rewards: Tensor, pi: Tensor, mu: Tensor) -> list[float]:
    """torch's covariance, in plain numbers."""
    covariance = torch.cov(torch.stack([lengths, rewards]), correction=0)[0, 1]
    return [float(covariance * (m - p)) for m, p in zip(mu, pi, strict=True)]


def entropy_by_sign(right_length: int, wrong_length: int, weight: bool, divided: bool) -> str:
    """The sign of the covariance, 0 where nothing is left of it."""
    sign = (right_length > wrong_length) - (right_length < wrong_length)
    return {-1: "falls", 0: "neither", 1: "rises"}[sign * (not weight) * (not divided)]


def entropy_by_moving(right_length: int, wrong_length: int, weight: bool, divided: bool) -> str:
    """One step of the drift on three logits, and the entropy before and after."""
    pi, mu = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.35, 0.15])
    pushes = 0.25 * 0.75 * ((1 - 1) if divided else (right_length - wrong_length))
    step = pushes * ((pi if weight else mu) - pi)
    before, after = (torch.distributions.Categorical(logits=pi.log() + 0.01 * x).entropy() for x in (0 * step, step))
    return "neither" if after == before else "falls" if after < before else "rises"


RIGHT: dict[str, list[Callable[..., Any]]] = {
    "03.1": [k3_loop, k3_where],
    "03.2": [choice_in_another_order, choice_by_elimination],
    "03.3": [bias_autograd, bias_algebra],
    "03.4": [weight_loop, weight_product],
    "03.5": [cap_moments, cap_loop],
    "03.6": [tempered_logsumexp, tempered_powers],
    "03.7": [drift_by_tokens, drift_by_covariance],
    "03.8": [entropy_by_sign, entropy_by_moving],
}
