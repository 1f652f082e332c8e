"""Proofs of the equations in 00_quickstart.md: by enumeration in float64, by autograd, or against the library."""

import itertools

import torch

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.exact import TabularPolicy, token_ratios
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import quantise


def _policies():
    """A rollout policy, the trainer's view of it, a target that has moved on, and a reward for every response."""
    old = TabularPolicy.random(4, 3, seed=0)
    noise, step = (torch.randn(old.logits.shape, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    rewards = torch.rand(len(old.tokens), generator=torch.Generator().manual_seed(3)).double()
    return old.moved(noise, 0.4), old, old.moved(step, 0.3), rewards


def _tokens(seed, rows=12, length=6):
    """Random log-probabilities [B, T] of three policies, float64, with a mask and advantages."""
    generator = torch.Generator().manual_seed(seed)
    new, old, mu = (-3 * torch.rand(rows, length, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return new.requires_grad_(), old, mu, mask, torch.randn(rows, generator=generator, dtype=torch.float64)


def check_00_advantage():
    """The library's advantages are each reward less the mean of its own group of four, added up by hand."""
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = group_mean_advantages(rewards, 4)
    for start in range(0, 12, 4):
        own = rewards[start : start + 4]
        expected = torch.stack([own[i] - (own[0] + own[1] + own[2] + own[3]) / 4 for i in range(4)])
        torch.testing.assert_close(found[start : start + 4], expected)


def check_00_baseline():
    """Over all responses, b · Σ_t ∇log π averages to zero; a baseline that depends on the response would not."""
    _, _, policy, rewards = _policies()
    probs, ones = policy.response_probs(), torch.ones_like(rewards)
    constant, own = (policy.score_sum((probs * b)[:, None].expand(policy.mask.shape)) for b in (0.7 * ones, rewards))
    torch.testing.assert_close(constant, torch.zeros_like(constant), atol=1e-12, rtol=0)
    assert own.norm() > 0.01


def check_00_weighted_baseline():
    """Under μ_old the weighted term averages to zero at each token; the cap, the mask and no weight leave a part."""
    mu, old, pi, _ = _policies()
    drawn, ratio = mu.response_probs()[:, None], token_ratios(pi, mu)
    ones = torch.ones_like(ratio)
    for t in range(ratio.shape[1]):
        at = (torch.arange(ratio.shape[1]) == t).double()
        mean = pi.score_sum(0.7 * drawn * ratio * at)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
    kept = token_ratios(pi, old) <= 1.27
    assert ratio.max() > 1.5 and not kept[pi.mask].all()
    for weight in (ones, ratio.clamp(max=1.5), ratio * kept):
        assert pi.score_sum(0.7 * drawn * weight).norm() > 1e-3


def check_00_minirl():
    """(7) written out, each response weighted by how often μ_old draws it, has the library's value and gradient."""
    mu, old, pi, rewards = _policies()
    logits = pi.logits.clone().requires_grad_()
    logp = TabularPolicy(logits, 3).log_probs()
    advantages, drawn = rewards - 0.5, mu.response_probs()
    weight = token_ratios(pi, mu)  # sg[π_θ/μ_old]: a number
    assert weight.max() < 5  # the cap is not part of (7)
    r = token_ratios(pi, old)
    kept = ~(((advantages[:, None] > 0) & (r > 1.27)) | ((advantages[:, None] < 0) & (r < 0.8)))
    assert 0 < (~kept & pi.mask).sum() < pi.mask.sum()
    objective = (drawn[:, None] * kept * weight * advantages[:, None] * logp * pi.mask).sum()
    # The library takes a mean over responses; scaling an advantage makes a response count as often as it is drawn.
    scaled = advantages * drawn * len(drawn)
    loss = minirl_loss(logp, old.log_probs(), mu.log_probs(), scaled, pi.mask).loss
    torch.testing.assert_close(-loss, objective)
    (by_library,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(-by_library, torch.autograd.grad(objective, logits)[0])
    torch.testing.assert_close(
        -by_library, pi.score_sum(drawn[:, None] * kept * token_ratios(pi, mu) * advantages[:, None])
    )


def check_00_clip():
    """The library's gradient is zero exactly where M_t is, on a ladder of ratios on both sides of both bounds."""
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.26, 1.28, 2.0], dtype=torch.float64)
    old = torch.full((2, 7), 0.3, dtype=torch.float64)
    logp = (old * ratios).log().requires_grad_()
    mu = torch.full_like(old, 0.25).log()
    loss = minirl_loss(logp, old.log(), mu, torch.tensor([1.0, -1.0]).double(), torch.ones(2, 7).bool()).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (gradient[0] != 0).tolist() == [True, True, True, True, True, False, False]
    assert (gradient[1] != 0).tolist() == [False, False, True, True, True, True, True]


def check_00_gradient():
    """Autograd through the library's loss gives the formula on random tokens, some of them capped, some dropped."""
    logp, old, mu, mask, advantages = _tokens(0)
    (found,) = torch.autograd.grad(minirl_loss(logp, old, mu, advantages, mask).loss, logp)
    pi, before, engine = logp.detach().exp(), old.exp(), mu.exp()
    dropped = capped = 0
    for i, t in itertools.product(*map(range, found.shape)):
        r, weight, m = pi[i, t] / before[i, t], pi[i, t] / engine[i, t], float(mask[i, t])
        if (advantages[i] > 0 and r > 1.27) or (advantages[i] < 0 and r < 0.8):
            dropped, m = dropped + m, 0.0
        capped += m * (weight > 5)
        expected = -m * min(weight, 5.0) * advantages[i] / len(advantages)
        torch.testing.assert_close(found[i, t], torch.as_tensor(expected, dtype=torch.float64))
    assert dropped > 2 and capped > 1


def check_00_rounding():
    """A row by the formula is the library's int4 and int3 row; the error stays below half a step and comes near it."""
    row = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    for bits in (3, 4, 8):
        scale = row.abs().max() / (2 ** (bits - 1) - 1)
        rounded = quantise(row, f"int{bits}")
        torch.testing.assert_close(rounded, scale * torch.round(row / scale))
        error = (rounded - row).abs().max() / scale
        assert 0.45 < error <= 0.5 + 1e-5
    assert len(quantise(torch.linspace(-1, 1, 999)[None], "int4").unique()) == 15
