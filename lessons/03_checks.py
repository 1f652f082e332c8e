"""Proofs of the equations of lesson 03, each labelled by the name of its function."""

from itertools import pairwise, product

import torch
from torch import Tensor

from minirl_edu.diagnostics import kl_k1, kl_k3
from minirl_edu.drift import action_values, drift, entropy_gradient, sampler_bias, signal, values, visits
from minirl_edu.exact import TabularPolicy, sequence_objective, token_ratios
from minirl_edu.objectives import minirl_loss


def _engines(size: float = 0.7, seed: int = 0) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """A training engine, an inference engine with the same weights and an error in its logits, and rewards."""
    generator = torch.Generator().manual_seed(seed + 1)
    pi = TabularPolicy.random(4, 3, seed=seed)
    error = torch.randn(pi.logits.shape, generator=generator, dtype=torch.float64)
    rewards = torch.rand(len(pi.tokens), generator=generator, dtype=torch.float64)
    return pi, pi.moved(error, size), rewards


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _is_of_order(errors: list[float], order: int) -> None:
    """Each error belongs to half the step of the one before; the rate is right to 5 %."""
    rates = [a / b for a, b in pairwise(errors)]
    assert abs(rates[-1] / 2**order - 1) < 0.05, rates


def check_03_is_identity() -> None:
    """Both sides by enumeration of all responses, for several functions f; the sampler's own mean is another number."""
    pi, mu, rewards = _engines()
    weight = token_ratios(pi, mu).prod(1)
    for f in (rewards, torch.ones_like(rewards), pi.mask.sum(1).double(), pi.tokens[:, 0].double()):
        _close((mu.response_probs() * weight * f).sum(), (pi.response_probs() * f).sum())
    _close((mu.response_probs() * weight * rewards).sum(), sequence_objective(pi, mu, rewards))
    assert abs((mu.response_probs() * rewards).sum() - (pi.response_probs() * rewards).sum()) > 1e-3


def check_03_two_factors() -> None:
    """Three policies from the library's loss: its weight is the product of the factors, without correction the second.

    The gradient with respect to log π_θ is −(weight)·Â/B: the weights are read off it.
    """
    old, mu, _ = _engines(0.3)
    new = old.moved(torch.randn(old.logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64), 0.2)
    discrepancy, staleness = token_ratios(old, mu), token_ratios(new, old)
    advantages = torch.ones(len(old.tokens), dtype=torch.float64)
    for correct, expected in ((True, discrepancy * staleness), (False, staleness)):
        logp = new.log_probs().requires_grad_()
        args = old.log_probs(), mu.log_probs(), advantages, old.mask
        loss = minirl_loss(logp, *args, is_cap=1e9, clip=False, is_correction=correct).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        _close(-len(advantages) * gradient, expected * old.mask)
    _close(token_ratios(new, mu), discrepancy * staleness)


def check_03_estimators() -> None:
    """Exact expectations under μ equal the KL; k3 ≥ 0, while k1 is not; k2 is off by −E[(log r)³]/6 to fourth order.

    The library's estimators, fed with counts in proportion to μ, give the same number.
    """
    mu = torch.tensor([6, 1, 2, 7], dtype=torch.float64) / 16
    pi = torch.tensor([4, 3, 1, 8], dtype=torch.float64) / 16
    kl = (mu * (mu / pi).log()).sum()
    log_r = (pi / mu).log()
    k1, k3 = -log_r, log_r.exp() - 1 - log_r
    _close((mu * k1).sum(), kl)
    _close((mu * k3).sum(), kl)
    assert (k3 >= 0).all() and (k1 < 0).any()
    drawn = torch.arange(4).repeat_interleave((16 * mu).long())[None]
    all_tokens = torch.ones_like(drawn).bool()
    for estimator in (kl_k1, kl_k3):
        _close(estimator(mu.log()[drawn], pi.log()[drawn], all_tokens), kl)
    errors = []
    for step in (0.1, 0.05, 0.025):
        near = (mu.log() + step * torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)).softmax(0)
        log_r = (near / mu).log()
        bias = (mu * log_r.square() / 2).sum() - (mu * (mu / near).log()).sum()
        assert abs(bias) > 1e-7
        errors.append(abs(float(bias + (mu * log_r**3).sum() / 6)))
    _is_of_order(errors, 4)


def check_03_noise() -> None:
    """Exact variances as the engines approach each other: what the two formulas leave out falls one order faster."""
    mu = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    direction = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    left_k1, left_k3 = [], []
    for step in (0.02, 0.01, 0.005):
        log_r = ((mu.log() + step * direction).softmax(0) / mu).log()
        k1, k3 = -log_r, log_r.expm1() - log_r
        kl = (mu * k1).sum()
        variance = [(mu * (k - kl).square()).sum() for k in (k1, k3)]
        assert abs(variance[0] / (2 * kl) - 1) < 0.1
        left_k1.append(abs(float(variance[0] - 2 * kl)))
        left_k3.append(abs(float(variance[1] - ((mu * log_r**4).sum() / 4 - kl**2))))
    _is_of_order(left_k1, 3)
    _is_of_order(left_k3, 5)


def check_03_cap() -> None:
    """By enumeration for five caps, with sequence weights: the split, the bound on the bias, and both bounds on E[w²].

    Without a cap the second moment is 1 + χ². The bound c is attained by weights that are 0 or at least c.
    """
    pi, mu, f = _engines(1.0)
    p, q = mu.response_probs(), pi.response_probs()
    w, chi2 = q / p, ((q - p).square() / p).sum()
    biases = []
    for c in (0.5, 1.0, 2.0, 5.0, 1e6):
        lost = (p * (w - c).clamp(min=0) * f).sum()
        _close((p * w.clamp(max=c) * f).sum(), (q * f).sum() - lost)
        assert lost <= f.abs().max() * q[w > c].sum() + 1e-15
        assert (p * w.clamp(max=c).square()).sum() <= min(c, float(1 + chi2)) + 1e-12
        biases.append(float(lost))
    assert biases[:4] == sorted(biases[:4], reverse=True) and biases[3] > 0 and biases[4] == 0
    _close((p * w.square()).sum(), 1 + chi2)
    w, p = torch.tensor([0.0, 4.0]), torch.tensor([0.75, 0.25])
    _close((p * w.clamp(max=4).square()).sum(), torch.tensor(4.0))


def check_03_flatter() -> None:
    """E[μ] over all patterns of ±σ on four logits: what the formula leaves out falls by 16 when σ is halved.

    The right-hand form by autograd of S. ⟨∇S, ∇H⟩ by autograd for many policies: a formula whose terms show the sign.
    """
    logits = TabularPolicy.random(4, 1, seed=3).logits[0].requires_grad_()
    probs = logits.softmax(-1)
    (climb,) = torch.autograd.grad(probs.square().sum(), logits)
    probs = probs.detach()
    _close(sampler_bias(probs, 0.3), -(0.3**2) / 2 * climb)
    signs = [torch.tensor(pattern, dtype=torch.float64) for pattern in product((1.0, -1.0), repeat=4)]
    errors = []
    for sigma in (0.2, 0.1, 0.05):
        mean = torch.stack([(logits.detach() + sigma * s).softmax(-1) for s in signs]).mean(0)
        assert (mean - probs).norm() > 1e-4
        errors.append(float((mean - probs - sampler_bias(probs, sigma)).norm()))
    _is_of_order(errors, 4)

    logits = 2 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    probs = logits.softmax(-1)
    entropy = -(probs * logits.log_softmax(-1)).sum(-1)
    collision = probs.square().sum(-1)
    up = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (collision, entropy)]
    p, s, h = probs.detach(), collision.detach()[:, None], entropy.detach()[:, None]
    formula = -2 * (p.square() * (p - s) * (p.log() + h)).sum(-1)
    _close((up[0] * up[1]).sum(-1), formula)
    _close(up[1], entropy_gradient(logits.detach()))
    assert (formula < 0).all()


def check_03_signal_drift() -> None:
    """The gradient of minirl_loss without the weight against signal + drift; each part against the library's.

    The signal is the sampler's own policy gradient. A weight of token and prefix puts ν = wμ in the place of μ; only
    the exact one leaves no drift.
    """
    pi, mu, rewards = _engines()
    b = (mu.response_probs() * rewards).sum()
    d, q, v = visits(mu)[:, None], action_values(mu, rewards), values(mu, rewards)[:, None]
    p, m = pi.logits.softmax(-1), mu.logits.softmax(-1)
    parts = d * m * (q - v), d * (v - b) * (m - p)
    logp = pi.log_probs().requires_grad_()
    args = pi.log_probs(), mu.log_probs(), mu.response_probs() * (rewards - b), pi.mask
    (pull,) = torch.autograd.grad(minirl_loss(logp, *args, num_responses=1, is_correction=False).loss, logp)
    _close(pi.score_sum(-pull), parts[0] + parts[1])
    for part, of_library in zip(parts, (signal(pi, mu, rewards), drift(pi, mu, rewards)), strict=True):
        _close(part, of_library)
        assert part.norm() > 1e-3
    _close(parts[0], mu.score_sum((mu.response_probs() * rewards)[:, None].expand(mu.mask.shape)))
    ratio = p / m
    masked = ratio.masked_fill((ratio < 0.5) | (ratio > 1.5), 0.0)
    for name, w in {"exact": ratio, "none": 0 * ratio + 1, "capped": ratio.clamp(max=1.2), "masked": masked}.items():
        left, nu = drift(pi, mu, rewards, w[pi.prefix, pi.tokens]), w * m
        _close(left, d * (v - b) * (nu - p * nu.sum(1, keepdim=True)))
        assert (left.abs().max() < 1e-12) == (name == "exact"), name


def _alike() -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """The same π and the same μ in all contexts, and rewards, for responses of up to four tokens."""
    pi = TabularPolicy(torch.tensor([[0.5, 0.0, -0.4]]).double().expand(15, 3), 4)
    mu = TabularPolicy(torch.tensor([[0.1, 0.3, -0.9]]).double().expand(15, 3), 4)
    return pi, mu, torch.rand(len(pi.tokens), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check_03_total() -> None:
    """The sum of the drifts where all contexts are alike: with wrong responses longer, right ones longer, neither."""
    pi, mu, noise = _alike()
    difference = (mu.logits.softmax(-1) - pi.logits.softmax(-1))[0]
    probs, lengths = mu.response_probs(), mu.mask.sum(1).double()

    def covariance(rewards: Tensor) -> Tensor:
        return (probs * lengths * rewards).sum() - (probs * lengths).sum() * (probs * rewards).sum()

    slope = covariance(noise) / covariance(lengths)
    for extra, sign in ((-0.3, -1), (0.3, 1), (0.0, 0)):
        rewards = noise + (extra - slope) * lengths
        _close(drift(pi, mu, rewards).sum(0), covariance(rewards) * difference)
        assert (abs(covariance(rewards)) < 1e-12) if sign == 0 else (sign * covariance(rewards) > 0.1)
