"""Proofs of the equations of lesson 03, each labelled by the name of its function."""

from itertools import pairwise, product

import torch
from torch import Tensor

from minirl_edu.diagnostics import kl_k1, kl_k3, token_ess
from minirl_edu.drift import action_values, drift, entropy_gradient, sampler_bias, signal, values, visits
from minirl_edu.exact import TabularPolicy, sequence_objective, token_ratios
from minirl_edu.experiments.systematic import error_parts
from minirl_edu.objectives import minirl_loss


def _engines(size: float = 0.7, seed: int = 0) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """A training engine, an inference engine with the same weights and an error in its logits, and rewards."""
    generator = torch.Generator().manual_seed(seed + 1)
    pi = TabularPolicy.random(4, 3, seed=seed)
    error = torch.randn(pi.logits.shape, generator=generator, dtype=torch.float64)
    rewards = torch.rand(len(pi.tokens), generator=generator, dtype=torch.float64)
    return pi, pi.moved(error, size), rewards


def _chi2(p: Tensor, q: Tensor) -> Tensor:
    """χ²(p‖q) = Σ (p − q)²/q."""
    return ((p - q).square() / q).sum()


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


def check_03_kl() -> None:
    """Three ways by enumeration: whole responses; log-ratios of tokens; the KL of the next token at every prefix."""
    pi, mu, _ = _engines()
    p, q = mu.response_probs(), pi.response_probs()
    whole = (p * (p.log() - q.log())).sum()
    tokens = (p * (mu.log_probs() - pi.log_probs()).sum(1)).sum()
    rows = (mu.logits.softmax(-1) * (mu.logits.log_softmax(-1) - pi.logits.log_softmax(-1))).sum(-1)
    prefixes = (p[:, None] * rows[mu.prefix] * mu.mask).sum()
    _close(tokens, whole)
    _close(prefixes, whole)
    assert abs((q * (q.log() - p.log())).sum() - whole) > 1e-2  # the other direction is another number


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


def check_03_no_weight() -> None:
    """The left side from the scores, the right by autograd of Z·KL(q‖π); and q's own logits are where it vanishes."""
    pi, mu, rewards = _engines()
    p = mu.response_probs()
    left = pi.score_sum((p * rewards)[:, None].expand(pi.mask.shape))
    z = (p * rewards).sum()
    q = p * rewards / z
    logits = pi.logits.clone().requires_grad_()
    kl = (q * (q.log() - TabularPolicy(logits, 3).log_probs().sum(1))).sum()
    (gradient,) = torch.autograd.grad(-z * kl, logits)
    _close(left, gradient)
    # The policy whose probabilities are q: at each prefix, the share of q's mass that goes on with each token.
    mass = torch.zeros_like(pi.logits).index_put(
        (pi.prefix, pi.tokens), torch.where(pi.mask, q[:, None], 0.0), accumulate=True
    )
    imitator = TabularPolicy(mass.clamp(min=1e-300).log(), 3)
    _close(imitator.response_probs(), q)
    assert imitator.score_sum((p * rewards)[:, None].expand(pi.mask.shape)).abs().max() < 1e-12
    wanted = pi.score_sum((pi.response_probs() * rewards)[:, None].expand(pi.mask.shape))
    assert (left - wanted).norm() / wanted.norm() > 0.1  # it is not the gradient of J


def check_03_sampler() -> None:
    """Left: scores of π under samples of μ, the value of each prefix as baseline. Right: autograd of E_{μ_θ}[R]."""
    pi, mu, rewards = _engines()
    error = mu.logits - pi.logits
    p = mu.response_probs()
    rows = len(pi.logits)
    empty = torch.zeros(rows, dtype=torch.float64)
    places = pi.prefix[pi.mask]
    reach = empty.index_put((places,), p[:, None].expand(pi.mask.shape)[pi.mask], accumulate=True)
    total = empty.index_put((places,), (p * rewards)[:, None].expand(pi.mask.shape)[pi.mask], accumulate=True)
    value = (total / reach)[pi.prefix]
    left = pi.score_sum(p[:, None] * (rewards[:, None] - value))
    theta = pi.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((TabularPolicy(theta + error, 3).response_probs() * rewards).sum(), theta)
    _close(left, gradient)
    wanted = pi.score_sum((pi.response_probs() * rewards)[:, None].expand(pi.mask.shape))
    assert (left - wanted).norm() / wanted.norm() > 0.1  # not the trainer's gradient
    without_baseline = pi.score_sum((p * rewards)[:, None].expand(pi.mask.shape))
    assert (without_baseline - gradient).norm() > 1e-2  # the baseline is needed


def check_03_cap_bias() -> None:
    """By enumeration for five caps, with sequence weights; the bound holds, and the bias grows as the cap falls."""
    pi, mu, f = _engines(1.0)
    p, q = mu.response_probs(), pi.response_probs()
    w = q / p
    biases = []
    for c in (0.5, 1.0, 2.0, 5.0, 1e6):
        capped = (p * w.clamp(max=c) * f).sum()
        lost = (p * (w - c).clamp(min=0) * f).sum()
        _close(capped, (q * f).sum() - lost)
        assert lost <= f.abs().max() * q[w > c].sum() + 1e-15
        biases.append(float(lost))
    assert biases[:4] == sorted(biases[:4], reverse=True) and biases[3] > 0 and biases[4] == 0


def check_03_cap_noise() -> None:
    """By enumeration: below both bounds for every cap; without a cap the second bound is met with equality.

    The first bound is attained by weights that are 0 or at least c: no smaller one would do.
    """
    pi, mu, _ = _engines(1.0)
    p, q = mu.response_probs(), pi.response_probs()
    second = [(p * (q / p).clamp(max=c).square()).sum() for c in (0.5, 1.0, 2.0, 5.0)]
    assert all(m <= min(c, float(1 + _chi2(q, p))) for m, c in zip(second, (0.5, 1.0, 2.0, 5.0), strict=True))
    _close((p * (q / p).square()).sum(), 1 + _chi2(q, p))
    w, p = torch.tensor([0.0, 4.0]), torch.tensor([0.75, 0.25])
    _close((p * w.clamp(max=4).square()).sum(), torch.tensor(4.0))


def check_03_ess() -> None:
    """The library's number, fed with counts in proportion to μ, is the limit for large samples."""
    mu = torch.tensor([6, 1, 2, 7], dtype=torch.float64) / 16
    pi = torch.tensor([3, 5, 1, 7], dtype=torch.float64) / 16
    drawn = torch.arange(4).repeat_interleave((16 * mu).long())[None]
    ess = token_ess(pi.log()[drawn], mu.log()[drawn], torch.ones_like(drawn).bool())
    _close(ess, 1 / (1 + _chi2(pi, mu)))
    assert abs(ess - 1 / (1 + _chi2(mu, pi))) > 0.1  # the direction matters


def check_03_moving_cap() -> None:
    """For many pairs of factors; and the weight of minirl_loss is the fixed cap's, not this one."""
    generator = torch.Generator().manual_seed(3)
    d, s = (torch.randn(2, 4, 50, generator=generator, dtype=torch.float64) * 1.5).exp()
    c = 5.0
    look_alike = d.clamp(max=c) * s
    _close(look_alike, torch.minimum(d * s, c * s))
    assert look_alike.max() > c
    mask, advantages = torch.ones(4, 50).bool(), torch.ones(4, dtype=torch.float64)
    logp = torch.full((4, 50), -9.0, dtype=torch.float64, requires_grad=True)
    old, rollout = logp - s.log(), logp - (d * s).log()
    loss = minirl_loss(logp, old, rollout, advantages, mask, is_cap=c, clip=False).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    _close(-4 * gradient, (d * s).clamp(max=c))


def check_03_temperature() -> None:
    """Against log_softmax(z/T) for random logits; the raw log-probability divided by T is not normalised."""
    z = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for temperature in (0.5, 0.7, 2.0):
        log_p = z.log_softmax(0)
        right = log_p / temperature - (log_p.exp() ** (1 / temperature)).sum().log()
        _close((z / temperature).log_softmax(0), right)
        assert abs((log_p / temperature).exp().sum() - 1) > 0.05


def check_03_top_p() -> None:
    """By enumeration over a vocabulary of five, whose nucleus holds three tokens: both weights, both sides."""
    mu = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05], dtype=torch.float64)
    pi = torch.tensor([0.35, 0.25, 0.10, 0.10, 0.20], dtype=torch.float64)
    f = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    kept = torch.tensor([True, True, True, False, False])
    drawn = torch.where(kept, mu, 0.0) / mu[kept].sum()
    seen = (pi * f)[kept].sum()
    own = (drawn[kept] * (pi / drawn)[kept] * f[kept]).sum()
    raw = (drawn[kept] * (pi / mu)[kept] * f[kept]).sum()
    _close(own, seen)
    _close(raw, seen / mu[kept].sum())
    assert abs(own - (pi * f).sum()) > 0.1 and abs(raw - (pi * f).sum()) > 0.1  # neither is what was wanted


def check_03_parts() -> None:
    """Every combination of K = 4 errors that are m + σ or m − σ with equal chance: the estimates have the right means.

    The identity holds for each combination, and the naive square of the mean is too large by σ²/K.
    """
    means, sigma, syncs = torch.tensor([0.3, -0.1, 0.0], dtype=torch.float64), 0.2, 4
    systematic, random, naive = [], [], []
    for signs in product((-1.0, 1.0), repeat=syncs):
        # The second and third token's signs are shifted by one and two syncs: tokens may depend on each other.
        shifted = torch.tensor([signs, signs[1:] + signs[:1], signs[2:] + signs[:2]], dtype=torch.float64).T
        d = means + sigma * shifted
        within = d.var(0, correction=0).mean()
        _close(d.square().mean(), d.mean(0).square().mean() + within)
        parts = error_parts(d)
        systematic.append(parts[0])
        random.append(parts[1])
        naive.append(float(d.mean(0).square().mean()))
    wanted = float(means.square().mean())
    average = torch.tensor([systematic, random, naive], dtype=torch.float64).mean(1)
    _close(average, torch.tensor([wanted, sigma**2, wanted + sigma**2 / syncs], dtype=torch.float64))


def check_03_baseline() -> None:
    """A number for every prefix under four weights, against the bracket; only the exact weight leaves nothing of it."""
    pi, mu, _ = _engines()
    p, m, d = pi.logits.softmax(-1), mu.logits.softmax(-1), visits(mu)[:, None]
    beta = torch.randn(len(d), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ratio = p / m
    weights = {
        "exact": ratio,
        "none": torch.ones_like(ratio),
        "capped": ratio.clamp(max=1.2),
        "masked": ratio.masked_fill((ratio < 0.5) | (ratio > 1.5), 0.0),
    }
    for name, w in weights.items():
        drawn = w[pi.prefix, pi.tokens]
        left = pi.score_sum(mu.response_probs()[:, None] * drawn * beta[pi.prefix])
        nu = w * m
        _close(left, d * beta[:, None] * (nu - p * nu.sum(1, keepdim=True)))
        assert (left.abs().max() < 1e-12) == (name == "exact"), name


def check_03_signal_drift() -> None:
    """The gradient of minirl_loss without the weight against signal + drift; each part against the library's.

    The signal is (03.6)'s gradient, the sampler's own; with the token weight no drift is left.
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
    assert drift(pi, mu, rewards, token_ratios(pi, mu)).abs().max() < 1e-12


def _alike() -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """The same π and the same μ in all contexts, and rewards, for responses of up to four tokens."""
    pi = TabularPolicy(torch.tensor([[0.5, 0.0, -0.4]]).double().expand(15, 3), 4)
    mu = TabularPolicy(torch.tensor([[0.1, 0.3, -0.9]]).double().expand(15, 3), 4)
    return pi, mu, torch.rand(len(pi.tokens), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check_03_total() -> None:
    """The sum of the drifts where all contexts are alike, with wrong responses longer, right ones longer, and neither.

    Where contexts differ, the covariance over contexts of μ − π with d (V − b) makes up the rest.
    """
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
    pi, mu, rewards = _engines()
    apart = mu.logits.softmax(-1) - pi.logits.softmax(-1)
    ahead = visits(mu) * (values(mu, rewards) - values(mu, rewards)[0])
    over_contexts = ((ahead - ahead.mean())[:, None] * (apart - apart.mean(0))).sum(0)
    _close(drift(pi, mu, rewards).sum(0), ahead.sum() * apart.mean(0) + over_contexts)
    assert over_contexts.abs().max() > 1e-3


def check_03_flatter() -> None:
    """E[μ] over all patterns of ±σ on four logits: what the formula leaves out falls by 16 when σ is halved.

    The right-hand form by autograd of S; and the second term of the mean drift, where the token matters, also by
    enumeration of the noise.
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

    pi = TabularPolicy.random(3, 2, seed=6)
    rewards = torch.rand(len(pi.tokens), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p, q = pi.logits.softmax(-1), action_values(pi, rewards)
    d, v = visits(pi)[:, None], values(pi, rewards)[:, None]
    edge = p * (q - v)
    second = d * (1 - d) * p * (edge - (p * edge).sum(1, keepdim=True))
    patterns = [torch.tensor(x, dtype=torch.float64).view_as(p) for x in product((1.0, -1.0), repeat=p.numel())]
    errors = []
    for sigma in (0.2, 0.1, 0.05):
        mean = torch.stack([drift(pi, pi.moved(x, sigma), rewards) for x in patterns]).mean(0)
        errors.append(float((mean - d * (v - v[0]) * sampler_bias(p, sigma) - sigma**2 * second).norm()))
    assert second.norm() > 1e-3
    _is_of_order(errors, 4)


def check_03_sharpens() -> None:
    """⟨∇S, ∇H⟩ by autograd for many policies: the formula, its sign, and 0 where π is uniform on some of the tokens."""
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
    uniform = torch.tensor([0.0, 0.0, 0.0, -800.0], dtype=torch.float64).softmax(-1)
    assert (uniform.square() * (uniform - uniform.square().sum())).abs().max() < 1e-15
