"""Proofs of the equations in 10_diagnosing_collapse.md: by enumeration in float64, or against the library."""

import torch

from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.exact import TabularPolicy, token_ratios
from minirl_edu.objectives import minirl_loss


def _policy():
    """A policy over 4 tokens and up to 3 of them, a direction to move in, and a reward of 0 or 1 for every response."""
    policy = TabularPolicy.random(4, 3, seed=0)
    direction = torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards = (torch.rand(len(policy.tokens), generator=torch.Generator().manual_seed(2)) < 0.6).double()
    return policy, direction, rewards


def _scores(policy):
    """g(y) = Σ_t ∇log π(y_t | y_<t), flattened, one row for every response."""
    one = torch.eye(len(policy.tokens), dtype=torch.float64)
    return torch.stack([policy.score_sum(row[:, None].expand(policy.mask.shape)).flatten() for row in one])


def check_10_mean_weight():
    """One token's weights over the whole vocabulary: capped, their mean falls short of 1 by what the cap cut off."""
    generator = torch.Generator().manual_seed(0)
    mu, pi = ((2.5 * torch.randn(50, generator=generator, dtype=torch.float64)).softmax(0) for _ in range(2))
    weight, cap = pi / mu, 5.0
    torch.testing.assert_close((mu * weight).sum(), torch.ones((), dtype=torch.float64))
    capped = (mu * weight.clamp(max=cap)).sum()
    torch.testing.assert_close(capped, 1 - (mu * (weight - cap).clamp(min=0)).sum())
    assert 0.2 < capped < 0.9
    # Log-probabilities that belong to another token break it, in either direction.
    other = pi / mu.roll(1)
    assert (mu * other).sum() > 1.5
    # As the trainer logs it: 1,000 tokens drawn in exactly μ's proportions.
    counts = torch.tensor([500, 250, 125, 125])
    tokens, mu, pi = torch.arange(4).repeat_interleave(counts), counts / 1000, torch.tensor([0.2, 0.05, 0.05, 0.7])
    log_mu, log_pi, mask = mu.log()[tokens][None], pi.log()[tokens][None], torch.ones(1, 1000).bool()
    logged = minirl_loss(log_pi, log_pi, log_mu, torch.ones(1), mask).metrics["is_weight_mean"]
    assert abs(logged - (1 - 0.125 * (0.7 / 0.125 - 5))) < 1e-5


def _at(logits, temperature):
    return (logits / temperature).log_softmax(0)


def check_10_temperature_small():
    """KL/(½(1/T − 1)² Var) tends to 1 as T does, the deviation with the first power of the distance: it halves."""
    z = torch.randn(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pi = _at(z, 1.0)
    variance = (pi.exp() * pi.square()).sum() - (pi.exp() * pi).sum().square()

    def off(shift):
        mu = _at(z, 1 / (1 + shift))
        return (mu.exp() * (mu - pi)).sum() / (0.5 * shift**2 * variance) - 1

    assert abs(off(1e-3)) < 5e-3
    assert abs(off(2e-2) / off(1e-2) - 2) < 0.1
    z = 20 * z  # a surer policy: less variance of log π, so a smaller KL at the same temperature
    sharp = _at(z, 1.0)
    assert (sharp.exp() * sharp.square()).sum() - (sharp.exp() * sharp).sum().square() < variance


def check_10_stale_kl():
    """The KL of an engine left behind, by enumeration, over ½ Δᵀ F Δ tends to 1; twice the way, four times the KL."""
    policy, direction, _ = _policy()
    probs, scores = policy.response_probs(), _scores(policy)
    fisher = scores.T @ (probs[:, None] * scores)

    def kl(step):
        moved = policy.moved(direction, step)
        return (probs * (policy.log_probs() - moved.log_probs()).sum(1)).sum()

    quadratic = 0.5 * direction.flatten() @ fisher @ direction.flatten()
    assert abs(kl(1e-3) / (1e-6 * quadratic) - 1) < 5e-3
    assert abs(kl(2e-3) / kl(1e-3) - 4) < 0.02


def check_10_staleness():
    """log π_θ/π_old of every token after a step η·d is η d·∇log π: what is left over shrinks a hundredfold for η/10."""
    policy, direction, _ = _policy()
    slope = policy.mask * direction[policy.prefix, policy.tokens]
    slope = slope - policy.mask * (direction * policy.logits.softmax(-1)).sum(1)[policy.prefix]

    def rest(step):
        return (token_ratios(policy.moved(direction, step), policy).log() - step * slope)[policy.mask].abs().mean()

    assert slope[policy.mask].abs().mean() > 0.1
    assert abs(rest(1e-2) / rest(1e-3) - 100) < 5


def check_10_baseline_variance():
    """Same mean with and without b; the second moments, summed over all responses, differ by the formula."""
    policy, _, rewards = _policy()
    probs, scores, b = policy.response_probs(), _scores(policy), 0.6
    size = scores.square().sum(1)
    plain, centred = rewards[:, None] * scores, (rewards - b)[:, None] * scores
    torch.testing.assert_close(probs @ plain, probs @ centred)
    torch.testing.assert_close(
        probs @ plain.square().sum(1) - probs @ centred.square().sum(1),
        2 * b * (probs @ (rewards * size)) - b**2 * (probs @ size),
    )
    # Rewards without a baseline are never negative, so nothing is ever clipped from below.
    logp, old = (torch.randn(5, 4, generator=torch.Generator().manual_seed(s)).double() - 9 for s in (0, 1))
    below = [
        minirl_loss(logp, old, None, advantages, torch.ones(5, 4), is_correction=False).metrics["clip_frac_neg"]
        for advantages in (rewards[:5], rewards[:5] - b)
    ]
    assert below[0] == 0 < below[1]


def check_10_shuffled():
    """Every pair of responses, one to learn from and one to be rewarded: the mean is zero, the size is the product."""
    policy, _, rewards = _policy()
    probs, scores, b = policy.response_probs(), _scores(policy), 0.4
    pairs = probs[:, None] * probs
    mean = torch.einsum("ij,j,id->d", pairs, rewards - b, scores)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
    size = torch.einsum("ij,j,id->", pairs, (rewards - b).square(), scores.square())
    torch.testing.assert_close(size, (probs @ (rewards - b).square()) * (probs @ scores.square().sum(1)))
    assert size > 0.1
    own = probs @ ((rewards - b)[:, None] * scores)  # with the response's own reward there is a direction
    assert own.norm() > 0.05


def _detector_averages(values):
    detector, averages = CollapseDetector(), []
    for value in values:
        detector.update({"entropy": value})
        state = detector.state_dict()["averages"]["entropy"]
        averages.append((state["fast"], state["slow"]))
    return averages


def check_10_decay():
    """A metric that loses the share f of itself at each step: where the ratio settles, and which limits it crosses."""

    def settled(fall):
        return (1 - 50 * fall) / (1 - 10 * fall)

    for fall in (0.002, 0.008, 0.012):
        fast, slow = _detector_averages([(1 - fall) ** t for t in range(2500)])[-1]
        assert abs(fast / slow / settled(fall) - 1) < 1e-3

    def crosses(fall, drop):
        return any(fast < drop * slow for fast, slow in _detector_averages([(1 - fall) ** t for t in range(2000)]))

    for drop in (0.5, 0.4):
        fastest = (1 - drop) / (50 - 10 * drop)  # the lesson's limit
        assert abs(settled(fastest) - drop) < 1e-12
        assert not crosses(0.98 * fastest, drop)
        assert crosses(1.02 * fastest, drop)
