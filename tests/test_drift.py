"""The identity behind leaving out the weight, in float64 by enumeration, against autograd of the library's own loss.

rtol 1e-12 leaves room for the order of summation and nothing else.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.diagnostics import entropy_from_logits
from minirl_edu.drift import (
    action_values,
    drift,
    entropy_gradient,
    gradient_variance,
    sampler_bias,
    signal,
    unweighted_gradient,
    values,
    visits,
)
from minirl_edu.exact import TabularPolicy, token_gradient, token_ratios
from minirl_edu.objectives import minirl_loss

assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def world(seed: int = 0, T: int = 4) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """π, a sampler μ at some distance, and a reward for every response, which may end after any number of tokens."""
    mu = TabularPolicy.random(3, T, seed=seed)
    pi = mu.moved(TabularPolicy.random(3, T, seed=seed + 1).logits, 0.7)
    rewards = torch.rand(len(mu.tokens), generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    return pi, mu, rewards


def length_cov(mu: TabularPolicy, rewards: Tensor) -> Tensor:
    """Cov(|y|, R) under μ."""
    probs, lengths = mu.response_probs(), mu.mask.sum(1).double()
    return (probs * lengths * rewards).sum() - (probs * lengths).sum() * (probs * rewards).sum()


def by_autograd(pi: TabularPolicy, mu: TabularPolicy, advantages: Tensor, **options) -> Tensor:
    """−∇ of the real `minirl_loss`, each response weighted by its probability under μ."""
    moving = TabularPolicy(pi.logits.detach().clone().requires_grad_(), pi.max_length)
    old, rollout = pi.log_probs(), mu.log_probs()
    weighted = mu.response_probs() * advantages
    loss = minirl_loss(moving.log_probs(), old, rollout, weighted, pi.mask, num_responses=1, **options).loss
    (gradient,) = torch.autograd.grad(loss, moving.logits)
    return -gradient


def slope(x: Tensor, y: Tensor) -> float:
    x, y = x.log(), y.log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def test_visits_and_values_by_hand():
    """Two words (0, end), two tokens at most: responses (end), (0, end), (0, 0)."""
    mu = TabularPolicy(torch.tensor([[0.4, -0.3], [1.0, 0.2]]), 2)
    rewards = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    (go, _), (again, stop) = mu.logits.softmax(-1)
    assert_equal(visits(mu), torch.stack([torch.ones(()).double(), go]))
    late = again * 4 + stop * 2
    assert_equal(action_values(mu, rewards), torch.stack([torch.stack([late, rewards[0]]), rewards[[2, 1]]]))
    assert_equal(values(mu, rewards), torch.stack([go * late + (1 - go), late]))


@pytest.mark.parametrize("seed", range(3))
def test_visits_add_up_to_the_length_and_values_are_means_of_action_values(seed):
    _, mu, rewards = world(seed)
    assert_equal(visits(mu).sum(), (mu.response_probs() * mu.mask.sum(1)).sum())
    assert_equal(values(mu, rewards), (mu.logits.softmax(-1) * action_values(mu, rewards)).sum(1))
    assert_equal(values(mu, rewards)[0], (mu.response_probs() * rewards).sum())


@pytest.mark.parametrize("seed", range(3))
def test_signal_and_drift_are_the_gradient_without_the_weight(seed):
    pi, mu, rewards = world(seed)
    baseline = (mu.response_probs() * rewards).sum()
    whole = unweighted_gradient(pi, mu, rewards)
    assert_equal(by_autograd(pi, mu, rewards - baseline, is_correction=False), whole)
    parts = signal(pi, mu, rewards), drift(pi, mu, rewards)
    assert all(part.norm() > 1e-3 for part in parts)
    assert_equal(parts[0] + parts[1], whole)

    # And each part is what the identity says, context by context.
    d, q, v = visits(mu)[:, None], action_values(mu, rewards), values(mu, rewards)[:, None]
    p, m = pi.logits.softmax(-1), mu.logits.softmax(-1)
    assert_equal(parts[0], d * m * (q - v))
    assert_equal(parts[1], d * (v - baseline) * (m - p))


@pytest.mark.parametrize("seed", range(3))
def test_with_the_weight_there_is_no_drift_and_the_centre_is_the_trainers(seed):
    pi, mu, rewards = world(seed)
    token = token_ratios(pi, mu)
    sequence = token.prod(1, keepdim=True).expand(token.shape)
    for weight in (token, sequence):
        assert_equal(drift(pi, mu, rewards, weight), torch.zeros_like(pi.logits))
    advantages = rewards - values(mu, rewards)[0]
    weighted = signal(pi, mu, rewards, token)
    assert_equal(weighted, token_gradient(pi, mu, advantages))
    assert_equal(weighted, by_autograd(pi, mu, advantages, is_cap=math.inf))
    p, q = pi.logits.softmax(-1), action_values(mu, rewards)
    centred = visits(mu)[:, None] * p * (q - (p * q).sum(1, keepdim=True))
    assert_equal(weighted, centred)
    # With the sampler's V for a centre, as in the signal without the weight, it would be something else.
    assert (centred - visits(mu)[:, None] * p * (q - values(mu, rewards)[:, None])).norm() > 1e-3


def test_a_finite_group_scales_both_parts_by_one_minus_one_over_g():
    """All pairs and triples of responses through `group_mean_advantages`, each with its probability."""
    pi, mu, rewards = world(T=2)
    probs, whole = mu.response_probs(), unweighted_gradient(*world(T=2))
    for group_size in (2, 3):
        expected = torch.zeros_like(probs)
        for group in itertools.product(range(len(probs)), repeat=group_size):
            chosen = torch.tensor(group)
            advantages = group_mean_advantages(rewards[chosen], group_size) * probs[chosen].prod() / group_size
            expected.index_add_(0, chosen, advantages)
        gradient = pi.score_sum(expected[:, None].expand(pi.mask.shape))
        assert_equal(gradient, (1 - 1 / group_size) * whole)


def alike(lengths_matter: bool = True) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """The same logits in every context, for π and for μ, and a reward that falls with the length (or ignores it)."""
    pi = TabularPolicy(torch.tensor([[0.5, 0.0, -0.4]]).double().expand(15, 3), 4)
    mu = TabularPolicy(torch.tensor([[0.1, 0.3, -0.9]]).double().expand(15, 3), 4)
    lengths = pi.mask.sum(1).double()
    noise = torch.rand(len(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = noise - 0.3 * lengths
    if not lengths_matter:  # centred among the responses of one length
        for n in lengths.unique():
            same, probs = lengths == n, mu.response_probs()
            rewards[same] -= (probs * rewards)[same].sum() / probs[same].sum()
    return pi, mu, rewards


def test_where_contexts_are_alike_the_total_is_the_covariance_times_the_difference():
    pi, mu, rewards = alike()
    difference = (mu.logits.softmax(-1) - pi.logits.softmax(-1))[0]
    assert length_cov(mu, rewards) < -0.1
    assert_equal(drift(pi, mu, rewards).sum(0), length_cov(mu, rewards) * difference)
    assert difference.abs().max() > 0.05

    pi, mu, rewards = alike(lengths_matter=False)
    assert_equal(drift(pi, mu, rewards).sum(0), torch.zeros(3).double())
    assert drift(pi, mu, rewards).norm() > 1e-3  # of single contexts it is not 0: their values differ


def test_elsewhere_the_total_has_the_covariance_over_contexts_as_well():
    pi, mu, rewards = world()
    total = drift(pi, mu, rewards).sum(0)
    difference = mu.logits.softmax(-1) - pi.logits.softmax(-1)
    ahead = visits(mu) * (values(mu, rewards) - values(mu, rewards)[0])
    assert_equal(ahead.sum(), length_cov(mu, rewards))
    mean = length_cov(mu, rewards) * difference.mean(0)
    assert (total - mean).norm() > 1e-3
    assert_equal(total, mean + ((ahead - ahead.mean())[:, None] * (difference - difference.mean(0))).sum(0))


def test_divided_by_the_length_the_total_is_zero_but_single_contexts_are_not():
    pi, mu, rewards = alike()
    probs, lengths = mu.response_probs(), mu.mask.sum(1).double()
    advantages = rewards - (probs * rewards).sum()
    # The drift of an advantage per token: E[Â/|y| | c] in the place of V(c) − b.
    divided = (probs * advantages / lengths)[:, None].expand(mu.mask.shape)
    mass = torch.zeros_like(mu.logits).index_put(
        (mu.prefix, mu.tokens), torch.where(mu.mask, divided, 0.0), accumulate=True
    )
    per_context = mass.sum(1, keepdim=True) * (mu.logits.softmax(-1) - pi.logits.softmax(-1))
    assert_equal(per_context.sum(0), torch.zeros(3).double())
    assert per_context.norm() > 1e-3
    # It is the whole gradient of the loss with length_norm, less the signal of that advantage.
    rest = mass - mass.sum(1, keepdim=True) * mu.logits.softmax(-1)
    assert_equal(by_autograd(pi, mu, advantages, is_correction=False, length_norm=True), per_context + rest)


def noisy(logits: Tensor, sigma: float, skewed: bool) -> Tensor:
    """E[μ] over all patterns of two-point noise, mean 0 and variance σ²: ±σ, or 2σ with probability 1/5 and −σ/2."""
    high, low, p = (2.0, -0.5, 0.2) if skewed else (1.0, -1.0, 0.5)
    mean = torch.zeros_like(logits)
    for pattern in itertools.product((True, False), repeat=len(logits)):
        up = torch.tensor(pattern)
        chance = torch.where(up, p, 1 - p).double().prod()
        mean += chance * (logits + sigma * torch.where(up, high, low)).softmax(-1)
    return mean


@pytest.mark.parametrize(("skewed", "order"), [(False, 4), (True, 3)])
def test_noise_on_the_logits_flattens_the_sampler_to_the_order_that_is_claimed(skewed, order):
    logits = TabularPolicy.random(4, 1, seed=3).logits[0]
    sigmas = torch.logspace(-2, -1, 5, dtype=torch.float64)
    bias = [noisy(logits, float(sigma), skewed) - logits.softmax(-1) for sigma in sigmas]
    errors = [b - sampler_bias(logits.softmax(-1), float(sigma)) for b, sigma in zip(bias, sigmas, strict=True)]
    # Leading order only: the next one bends the line by about σ or σ², at most 0.1 here.
    assert slope(sigmas, torch.stack(bias).norm(dim=1)) == pytest.approx(2, abs=0.1)
    assert slope(sigmas, torch.stack(errors).norm(dim=1)) == pytest.approx(order, abs=0.15)


def test_the_mean_drift_of_a_noisy_sampler_has_a_second_term_where_the_token_matters():
    """All 512 patterns of ±σ on the logits of three contexts: the mean drift, and what `sampler_bias` misses of it."""
    pi, (_, _, rewards) = TabularPolicy.random(3, 2, seed=6), world(T=2)
    p, q = pi.logits.softmax(-1), action_values(pi, rewards)
    d, v = visits(pi)[:, None], values(pi, rewards)[:, None]
    edge = p * (q - v)
    first, second = d * (v - v[0]), d * (1 - d) * p * (edge - (p * edge).sum(1, keepdim=True))
    sigmas, errors, missed = torch.logspace(-2, -1, 4, dtype=torch.float64), [], []
    for sigma in sigmas:
        mean = torch.zeros_like(p)
        for pattern in itertools.product((1.0, -1.0), repeat=p.numel()):
            mean += drift(pi, pi.moved(torch.tensor(pattern).view_as(p), float(sigma)), rewards) / 2 ** p.numel()
        errors.append((mean - first * sampler_bias(p, float(sigma)) - sigma**2 * second).norm())
        missed.append((mean - first * sampler_bias(p, float(sigma))).norm())
    assert slope(sigmas, torch.stack(missed)) == pytest.approx(2, abs=0.1)
    assert slope(sigmas, torch.stack(errors)) == pytest.approx(4, abs=0.15)


def test_the_bias_is_minus_half_sigma_squared_times_the_gradient_of_the_collision_probability():
    logits = TabularPolicy.random(5, 1, seed=4).logits.requires_grad_()
    (climb,) = torch.autograd.grad(logits.softmax(-1).square().sum(), logits)
    assert_equal(sampler_bias(logits.softmax(-1), 0.3).detach(), -(0.3**2) / 2 * climb)


def test_the_entropys_gradient_is_autograds_and_never_points_up_the_collision_probability():
    logits = 3 * TabularPolicy.random(5, 4, seed=5).logits.requires_grad_()
    (expected,) = torch.autograd.grad(entropy_from_logits(logits).sum(), logits)
    assert_equal(entropy_gradient(logits).detach(), expected)
    along = (sampler_bias(logits.softmax(-1), 1.0) * entropy_gradient(logits)).sum(-1)
    assert (along > 0).all()  # the bias is downhill in S, so the entropy rises along it
    uniform = torch.tensor([[0.0, 0.0, 0.0, -math.inf]]).double()
    assert sampler_bias(uniform.softmax(-1), 1.0).abs().max() < 1e-15


@pytest.mark.parametrize("limit", ["cap", "mask"])
def test_what_a_cap_or_a_mask_leaves_of_the_drift(limit):
    """ν = w ∘ μ: what is missing from Σν = 1 no longer cancels against π."""
    pi, mu, rewards = world(1)
    ratio = token_ratios(pi, mu)
    table = (pi.logits.log_softmax(-1) - mu.logits.log_softmax(-1)).exp()
    cap = 1.2

    def limited(w: Tensor) -> Tensor:
        return w.clamp(max=cap) if limit == "cap" else w.masked_fill((w > cap) | (w < 0.5), 0.0)

    nu = limited(table) * mu.logits.softmax(-1)
    ahead = visits(mu) * (values(mu, rewards) - values(mu, rewards)[0])
    left = drift(pi, mu, rewards, limited(ratio))
    assert_equal(left, ahead[:, None] * (nu - pi.logits.softmax(-1) * nu.sum(1, keepdim=True)))
    # At this distance (ratios from 0.2 to 4) so much is masked that more drift is left than without any weight.
    assert left.norm() > 1e-3 and (left.norm() > drift(pi, mu, rewards).norm()) == (limit == "mask")
    if limit == "cap":  # and together with the signal it is the gradient of the real loss
        whole = by_autograd(pi, mu, rewards - values(mu, rewards)[0], is_cap=cap)
        assert_equal(signal(pi, mu, rewards, limited(ratio)) + left, whole)


def test_on_policy_the_clip_leaves_the_whole_drift_and_off_policy_it_adds_one_despite_the_weight():
    pi, mu, rewards = world(2)
    advantages = rewards - values(mu, rewards)[0]
    kept = by_autograd(pi, mu, advantages, is_correction=False, clip=True)
    assert_equal(kept, unweighted_gradient(pi, mu, rewards))  # r = 1: nothing is clipped

    old = pi.moved(TabularPolicy.random(3, 4, seed=9).logits, 0.3)
    r, good = token_ratios(pi, old), advantages[:, None] > 0
    keeps = ~(good & (r > 1.27) | ~good & (r < 0.8))
    assert (pi.mask & ~keeps).any()
    assert drift(pi, mu, rewards, token_ratios(pi, mu) * keeps).norm() > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_the_variance_is_that_of_the_gradients_response_by_response(seed):
    pi, mu, rewards = world(seed)
    weight = token_ratios(pi, mu)
    probs, advantages = mu.response_probs(), rewards - values(mu, rewards)[0]
    rows = torch.eye(len(probs), dtype=torch.float64)
    for w in (None, weight):
        factor = torch.ones_like(weight) if w is None else w
        gradients = torch.stack([pi.score_sum(row[:, None] * advantages[:, None] * factor) for row in rows])
        mean = (probs[:, None, None] * gradients).sum(0)
        expected = (probs * (gradients - mean).square().sum((1, 2))).sum()
        assert_equal(gradient_variance(pi, mu, rewards, w), expected)
