"""Proves the labelled equations of lesson 04. Called by tests/lessons; each check is below ten seconds."""

import math
from itertools import pairwise, product

import torch
from torch import Tensor

from minirl_edu.exact import TabularPolicy, token_gradient, token_ratios
from minirl_edu.objectives import grpo_loss, minirl_loss

LOW, HIGH = 0.2, 0.27


def _policies(seed: int = 0) -> tuple[TabularPolicy, TabularPolicy, TabularPolicy, Tensor]:
    """μ_old, π_old, π_θ over all responses of up to 3 of 4 tokens, and an advantage of either sign for each."""
    old = TabularPolicy.random(4, 3, seed=seed)
    noise, update = (torch.randn(old.logits.shape, generator=torch.Generator().manual_seed(s)) for s in (7, 8))
    advantages = torch.randn(len(old.tokens), generator=torch.Generator().manual_seed(9)).double()
    return old.moved(noise.double(), 0.4), old, old.moved(update.double(), 0.4), advantages


def _mask(ratio: Tensor, advantages: Tensor) -> Tensor:
    """M_t, written down from (04.3), for tensors that broadcast."""
    return 1.0 - ((advantages > 0) & (ratio > 1 + HIGH) | (advantages < 0) & (ratio < 1 - LOW)).double()


def _ppo(ratio: Tensor, advantages: Tensor) -> Tensor:
    """PPO's surrogate of each token."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)


def _gradient(policy: TabularPolicy, of) -> Tensor:
    """By autograd, the gradient with respect to the logits of a number computed from log π [B, T]."""
    logits = policy.logits.clone().requires_grad_()
    number = of(TabularPolicy(logits, policy.max_length).log_probs())
    return torch.autograd.grad(number, logits)[0]


def check_04_sum_of_steps():
    """Gradient steps on MiniRL's own loss: log r before update k is the sum of the k moves j = 0 … k − 1, no more."""
    mu, old, _, advantages = _policies()
    policies = [old]
    for _ in range(5):
        now = policies[-1]
        gradient = _gradient(
            now,
            lambda logp: minirl_loss(logp, old.log_probs(), mu.log_probs(), advantages, old.mask).loss,
        )
        policies.append(now.moved(-gradient, 3.0))
    moves = [b.log_probs() - a.log_probs() for a, b in pairwise(policies)]
    assert min(move.abs().max().item() for move in moves) > 1e-3
    for k, now in enumerate(policies):
        log_ratio = now.log_probs() - old.log_probs()
        torch.testing.assert_close(log_ratio, sum(moves[:k], torch.zeros_like(log_ratio)))
        if k == 0:
            assert (log_ratio == 0).all()


def check_04_kl_quadratic():
    """One distribution of 6 tokens moved along a direction: the remainder falls by 8, so ½ and the square are right."""
    logits, direction = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).double()
    log_old = logits.log_softmax(0)

    def remainder(step: float) -> float:
        log_ratio = (logits + step * direction).log_softmax(0) - log_old
        kl = -(log_old.exp() * log_ratio).sum()
        return abs(kl.item() - 0.5 * (log_old.exp() * log_ratio.square()).sum().item())

    assert 7.5 < remainder(0.02) / remainder(0.01) < 8.5


def check_04_mask():
    """The library's gradient is 0 in the two quadrants beyond the bounds and r · Â everywhere else, just inside too."""
    ratios = torch.tensor(
        [0.05, 0.5, 0.8 - 1e-6, 0.8 + 1e-6, 1.0, 1.2, 1.27 - 1e-6, 1.27 + 1e-6, 2.0, 4.0], dtype=torch.float64
    )
    logp_old = torch.full((3, len(ratios)), -4.0, dtype=torch.float64)
    advantages = torch.tensor([0.7, -0.7, 0.0], dtype=torch.float64)
    logp = (logp_old + ratios.log()).requires_grad_()
    ones = torch.ones_like(logp).bool()
    minirl_loss(logp, logp_old, logp_old, advantages, ones, eps_low=LOW, eps_high=HIGH).loss.backward()
    kept = torch.tensor([[1] * 7 + [0] * 3, [0] * 3 + [1] * 7, [1] * 10]).double()
    assert logp.grad is not None
    torch.testing.assert_close(-3 * logp.grad, kept * ratios * advantages[:, None])
    torch.testing.assert_close(_mask(ratios, advantages[:, None]), kept)


def check_04_ppo_gradient():
    """Both sides by enumeration: autograd through the surrogate, and the sum of masked scores without autograd."""
    mu, old, new, advantages = _policies()
    weights = mu.response_probs()[:, None] * old.mask
    left = _gradient(new, lambda logp: (weights * _ppo((logp - old.log_probs()).exp(), advantages[:, None])).sum())
    ratio = token_ratios(new, old)
    mask = _mask(ratio, advantages[:, None])
    assert 0.02 < 1 - mask[old.mask].mean() < 0.9  # the mask has something to do
    torch.testing.assert_close(left, new.score_sum(weights * mask * ratio * advantages[:, None]))
    # the same through the library: GRPO's loss has PPO's surrogate, MiniRL's the mask (one token a response here)
    one = torch.ones(len(old.tokens), 1).bool()
    first_new, first_old = new.log_probs()[:, :1], old.log_probs()[:, :1]
    gradients = []
    for loss in (
        lambda logp: grpo_loss(logp, first_old, advantages, one, eps_low=LOW, eps_high=HIGH).loss,
        lambda logp: minirl_loss(logp, first_old, None, advantages, one, is_correction=False, is_cap=math.inf).loss,
    ):
        logp = first_new.clone().requires_grad_()
        loss(logp).backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(*gradients)


def check_04_decoupled():
    """Decoupled PPO by autograd against MiniRL's gradient from the library, without a cap; with one they differ."""
    mu, old, new, advantages = _policies()
    responses = len(old.tokens)

    def surrogate(logp: Tensor) -> Tensor:
        terms = token_ratios(old, mu) * _ppo((logp - old.log_probs()).exp(), advantages[:, None])
        return (terms * old.mask).sum() / responses

    def library(logp: Tensor, cap: float) -> Tensor:
        return minirl_loss(logp, old.log_probs(), mu.log_probs(), advantages, old.mask, is_cap=cap).loss

    left = _gradient(new, surrogate)
    torch.testing.assert_close(left, -_gradient(new, lambda logp: library(logp, math.inf)))
    assert token_ratios(new, mu).max() > 1.5
    assert (left + _gradient(new, lambda logp: library(logp, 1.5))).abs().max() > 1e-3
    by_hand = _mask(token_ratios(new, old), advantages[:, None]) * token_ratios(new, mu) * advantages[:, None]
    torch.testing.assert_close(left, new.score_sum(by_hand / responses))


def check_04_on_mu():
    """At θ = θ_old, by enumeration: with M nothing is lost, with M^μ exactly the sum on the right, and it is not 0."""
    mu, old, _, advantages = _policies()
    weights = mu.response_probs()[:, None] * advantages[:, None] * old.mask
    discrepancy = token_ratios(old, mu)
    exact = token_gradient(old, mu, advantages)
    with_old = old.score_sum(weights * _mask(token_ratios(old, old), advantages[:, None]) * discrepancy)
    torch.testing.assert_close(with_old, exact)
    on_mu = _mask(discrepancy, advantages[:, None])
    lost = old.score_sum(weights * (1 - on_mu) * discrepancy)
    torch.testing.assert_close(exact - old.score_sum(weights * on_mu * discrepancy), lost)
    assert lost.norm() > 0.05 * exact.norm()
    assert ((1 - on_mu) * old.mask).sum() > 0


def check_04_others():
    """The step on one token of a distribution, measured on all of them; the remainder is of second order."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(3)).double()
    pi = logits.softmax(0)
    for b, coefficient in product(range(5), (-1.0, 0.8)):
        step = coefficient * (torch.nn.functional.one_hot(torch.tensor(b), 5) - pi)

        def remainder(rate: float) -> float:
            moved = (logits + rate * step).log_softmax(0) - logits.log_softmax(0)  # noqa: B023
            own = (torch.arange(5) == b).double()  # noqa: B023
            predicted = rate * coefficient * (own - pi - pi[b] + pi.square().sum())  # noqa: B023
            return (moved - predicted).abs().max().item()

        assert 3.7 < remainder(0.02) / remainder(0.01) < 4.3


def check_04_kl_escape():
    """KL by its definition on a grid of δ; the sampled token's ratio stays 1, and the KL passes any bound."""
    old = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    for delta in (0.25, 0.1, 1e-2, 1e-6, 1e-12):
        new = torch.tensor([0.5, 0.5 - delta, delta], dtype=torch.float64)
        kl = (old * (old / new).log()).sum().item()
        assert math.isclose(kl, -0.25 * math.log(16 * delta * (0.5 - delta)), rel_tol=1e-9, abs_tol=1e-12)
        assert new[0] / old[0] == 1
    assert kl > 6
