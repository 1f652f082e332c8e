"""Proofs of the equations of lesson 05, each labelled by the name of its function."""

from itertools import pairwise
from math import lgamma, sqrt

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_std_advantages
from minirl_edu.exact import TabularPolicy
from minirl_edu.objectives import cispo_loss, grpo_loss, minirl_loss


def _problem(seed: int = 0) -> tuple[TabularPolicy, Tensor, Tensor]:
    """A policy over responses of one to four tokens, rewards 0 or 1, and the lengths."""
    pi = TabularPolicy.random(3, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed + 7)
    rewards = (torch.rand(len(pi.tokens), generator=generator, dtype=torch.float64) < 0.4).double()
    return pi, rewards, pi.mask.sum(1).double()


def _per_response(pi: TabularPolicy, coefficient: Tensor) -> Tensor:
    """Σ_y π(y) c(y) ∇log π(y)."""
    return pi.score_sum((pi.response_probs() * coefficient)[:, None].expand(pi.mask.shape))


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def check_05_sum() -> None:
    """Left: the losses' own gradient, summed over all responses. Right: autograd of E_π[R]. For two baselines.

    The left side takes −∂loss/∂logp of minirl_loss, response by response, into the scores of the policy.
    """
    pi, rewards, _ = _problem()
    logits = pi.logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((TabularPolicy(logits, 4).response_probs() * rewards).sum(), logits)
    for baseline in (0.0, float((pi.response_probs() * rewards).sum())):
        logp = pi.log_probs().requires_grad_()
        loss = minirl_loss(logp, pi.log_probs(), pi.log_probs(), rewards - baseline, pi.mask).loss
        (pull,) = torch.autograd.grad(loss, logp)
        _close(pi.score_sum(-len(logp) * pull * pi.response_probs()[:, None]), wanted)


def check_05_per_response() -> None:
    """Left: the gradient of minirl_loss(length_norm=True). Right: autograd of E_π[(R − b)/|y|] with b held fixed.

    It is another direction than the policy gradient's, unless all responses are equally long.
    """
    pi, rewards, lengths = _problem()
    b = (pi.response_probs() * rewards).sum()
    logp = pi.log_probs().requires_grad_()
    args = pi.log_probs(), pi.log_probs(), rewards - b, pi.mask
    (pull,) = torch.autograd.grad(minirl_loss(logp, *args, length_norm=True).loss, logp)
    left = pi.score_sum(-len(logp) * pull * pi.response_probs()[:, None])
    logits = pi.logits.clone().requires_grad_()
    objective = (TabularPolicy(logits, 4).response_probs() * (rewards - b) / lengths).sum()
    (right,) = torch.autograd.grad(objective, logits)
    _close(left, right)
    wanted = _per_response(pi, rewards)
    assert (left * wanted).sum() / (left.norm() * wanted.norm()) < 0.99
    _close(_per_response(pi, (rewards - b) / 3.0), wanted / 3.0)


def check_05_token_mean() -> None:
    """The exact expectation of ΣX/ΣL over batches of B, by their multinomial counts: the limit, the rate, and B = 1.

    X is one entry of Â∇log π, L the length. What (05.3) leaves out falls by 4 when B doubles.
    """
    pi = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    x = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64)
    length = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    mean_x, mean_l = (pi * x).sum(), (pi * length).sum()
    covariance = (pi * (x - mean_x) * (length - mean_l)).sum()
    variance = (pi * (length - mean_l).square()).sum()

    def expected(batch: int) -> Tensor:
        counts = [(i, j, batch - i - j) for i in range(batch + 1) for j in range(batch + 1 - i)]
        n = torch.tensor(counts, dtype=torch.float64)
        log_weight = lgamma(batch + 1) - torch.lgamma(n + 1).sum(1) + (n * pi.log()).sum(1)
        return (log_weight.exp() * (n @ x) / (n @ length)).sum()

    _close(expected(1), (pi * x / length).sum())  # a batch of one: GRPO's divisor
    errors = []
    for batch in (20, 40, 80):
        predicted = mean_x / mean_l - (covariance - mean_x / mean_l * variance) / (batch * mean_l**2)
        errors.append(float(expected(batch) - predicted))
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(abs(r / 4 - 1) < 0.1 for r in ratios), ratios


def check_05_length_bias() -> None:
    """The exact derivative of log π(long)/π(short) along the gradient, for two wrong responses of equal probability.

    Under the sum it is 0; along (05.2) it is positive. In the lesson's example the right response loses.
    """
    logits = torch.tensor([0.4, -0.2, -0.2, 0.1], dtype=torch.float64)  # right, wrong short, wrong long, right
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    lengths = torch.tensor([3.0, 2.0, 10.0, 6.0], dtype=torch.float64)
    pi = logits.softmax(0)
    b = (pi * rewards).sum()
    for scale, expected in ((torch.ones(4), 0.0), (lengths, float(pi[1] * b * (1 / 2 - 1 / 10)))):
        f = (rewards - b) / scale
        step = 1e-6 * pi * (f - (pi * f).sum())
        before, after = (z.log_softmax(0) for z in (logits, logits + step))
        change = (after[2] - after[1] - before[2] + before[1]) / 1e-6
        torch.testing.assert_close(change, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    pi = torch.tensor([0.10, 0.15, 0.75], dtype=torch.float64)  # right and long, wrong and short, wrong and long
    f = (torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - 0.10) / torch.tensor([100.0, 1.0, 100.0]).double()
    after = (pi.log() + 0.01 * pi * (f - pi @ f)).softmax(0)
    assert after[0] < pi[0] and after[2] > pi[2]


def check_05_std() -> None:
    """Both sides by autograd, for success probabilities from 2 % to 98 %; the library's advantage for a whole group."""
    for p_value in (0.02, 0.1, 0.5, 0.9, 0.98):
        theta = torch.tensor(p_value, dtype=torch.float64).logit().requires_grad_()
        p = theta.sigmoid()
        (slope,) = torch.autograd.grad(p, theta, retain_graph=True)
        (arcsine,) = torch.autograd.grad(2 * p.sqrt().asin(), theta)
        _close(slope / (p * (1 - p)).sqrt().detach(), arcsine)
    rewards = torch.tensor([1.0] * 2 + [0.0] * 6, dtype=torch.float64)
    by_hand = (rewards - 0.25) / sqrt(0.25 * 0.75)
    torch.testing.assert_close(group_mean_std_advantages(rewards, 8), by_hand, rtol=1e-5, atol=0.0)  # ε = 1e-6


def _batch() -> dict[str, Tensor]:
    """A batch with every case: random ratios of both kinds, advantages of both signs, three lengths."""
    generator = torch.Generator().manual_seed(5)
    old, mu_shift, shift = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    old = -old.abs() - 3
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    return {
        "logp_old": old,
        "logp_rollout": old + mu_shift,
        "logp": old + 0.7 * shift,
        "advantages": torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, -0.5], dtype=torch.float64),
        "mask": torch.arange(5) < lengths[:, None],
    }


def _pull(loss: Tensor, logp: Tensor) -> Tensor:
    return -torch.autograd.grad(loss, logp)[0]


def check_05_coefficients() -> None:
    """Each coefficient against −∂loss/∂logp of the library's loss, for a batch with every case.

    Capped and dropped tokens of both signs, clipped weights, three lengths; CISPO drops none.
    """
    batch = _batch()
    a, mask = batch["advantages"][:, None], batch["mask"]
    r, w = ((batch["logp"] - batch[name]).exp() for name in ("logp_old", "logp_rollout"))

    def kept(low: float, high: float) -> Tensor:
        return ~(((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low)))

    old, mu, case = batch["logp_old"], batch["logp_rollout"], (batch["advantages"], mask)
    logp = batch["logp"].clone().requires_grad_()
    output = minirl_loss(logp, old, mu, *case)
    _close(_pull(output.loss, logp), kept(0.2, 0.27) * w.clamp(max=5) * a * mask / 6)
    assert all(output.metrics[name] > 0 for name in ("is_capped_frac", "clip_frac_pos", "clip_frac_neg"))
    pull = _pull(grpo_loss(logp, old, *case).loss, logp)
    _close(pull, kept(0.2, 0.2) * r * a * mask / (6 * mask.sum(1, keepdim=True)))
    assert (pull[mask] == 0).any() and not (pull[mask] == 0).all()
    pull = _pull(cispo_loss(logp, old, *case, eps_high=1.5).loss, logp)
    _close(pull, r.clamp(0, 2.5) * a * mask / mask.sum())
    assert (pull[mask] != 0).all() and (r[mask] > 2.5).any()


def check_05_dual() -> None:
    """Autograd through the dual clip, on both sides of every bound: for Â < 0 the gradient is 0 above c as well."""
    c, low, high = 3.0, 0.2, 0.27
    ratios = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.26, 1.28, 2.9, 3.1, 20.0], dtype=torch.float64)
    log_ratio, advantage = ratios.log().requires_grad_(), torch.tensor(-0.7, dtype=torch.float64)
    r = log_ratio.exp()
    surrogate = torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
    (gradient,) = torch.autograd.grad(torch.maximum(surrogate, c * advantage).sum(), log_ratio)
    keep = (ratios >= 1 - low) & (ratios <= c)
    torch.testing.assert_close(gradient, keep * ratios * advantage)
    assert (gradient == 0).sum() == 4  # two below 0.8, two above c


def check_05_moving_cap() -> None:
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


def check_05_drift() -> None:
    """π and μ alike in all contexts: the drift with the advantage per token, context by context, and its sum.

    Together with the signal of that advantage it is the gradient of minirl_loss(length_norm=True) without the weight.
    Undivided, the same sum is not 0.
    """
    pi = TabularPolicy(torch.tensor([[0.5, 0.0, -0.4]]).double().expand(15, 3), 4)
    mu = TabularPolicy(torch.tensor([[0.1, 0.3, -0.9]]).double().expand(15, 3), 4)
    _, rewards, lengths = _problem()
    rewards = rewards - 0.3 * lengths  # wrong responses are longer
    probs, apart = mu.response_probs(), (mu.logits.softmax(-1) - pi.logits.softmax(-1))[0]
    advantages = rewards - (probs * rewards).sum()

    def passing(coefficient: Tensor) -> Tensor:
        """E_μ[coefficient · 1[y passes c, and draws a there]], [P, V]."""
        mass = torch.where(mu.mask, (probs * coefficient)[:, None], 0.0)
        return torch.zeros_like(mu.logits).index_put((mu.prefix, mu.tokens), mass, accumulate=True)

    drawn = passing(advantages / lengths)
    drift = drawn.sum(1, keepdim=True) * apart
    _close(drift.sum(0), torch.zeros(3).double())
    assert drift.norm() > 1e-2
    assert (passing(advantages).sum() * apart).abs().max() > 1e-2
    logp = pi.log_probs().requires_grad_()
    args = pi.log_probs(), mu.log_probs(), probs * advantages, pi.mask
    loss = minirl_loss(logp, *args, num_responses=1, is_correction=False, length_norm=True).loss
    (pull,) = torch.autograd.grad(loss, logp)
    signal = drawn - drawn.sum(1, keepdim=True) * mu.logits.softmax(-1)
    _close(pi.score_sum(-pull), signal + drift)
