"""Proofs of the equations in 00_quickstart.md: by enumeration in float64, by autograd, or against the library."""

import itertools

import torch

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.diagnostics import kl_k1, kl_k3, ratio_decomposition
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


def check_00_reinforce():
    """Autograd through the finite sum Σ_y π(y) R(y) equals the mean of R(y) Σ_t ∇log π(y_t), all by autograd."""
    _, _, policy, rewards = _policies()
    logits = policy.logits.clone().requires_grad_()
    pi = TabularPolicy(logits, 3)
    (left,) = torch.autograd.grad((pi.response_probs() * rewards).sum(), logits)
    probs, right = policy.response_probs(), torch.zeros_like(left)
    for y in range(len(rewards)):
        (score,) = torch.autograd.grad(pi.log_probs()[y].sum(), logits, retain_graph=True)
        right += probs[y] * rewards[y] * score
    torch.testing.assert_close(left, right)
    assert left.norm() > 0.01


def check_00_baseline():
    """Over all responses, b · Σ_t ∇log π averages to zero; a baseline that depends on the response would not."""
    _, _, policy, rewards = _policies()
    probs, ones = policy.response_probs(), torch.ones_like(rewards)
    constant, own = (policy.score_sum((probs * b)[:, None].expand(policy.mask.shape)) for b in (0.7 * ones, rewards))
    torch.testing.assert_close(constant, torch.zeros_like(constant), atol=1e-12, rtol=0)
    assert own.norm() > 0.01


def check_00_importance():
    """The weighted mean under μ_old equals the plain mean under π_θ, for a function that is not constant."""
    mu, _, pi, f = _policies()
    weighted = (mu.response_probs() * (pi.response_probs() / mu.response_probs()) * f).sum()
    torch.testing.assert_close(weighted, (pi.response_probs() * f).sum())
    torch.testing.assert_close(token_ratios(pi, mu).prod(1), pi.response_probs() / mu.response_probs())
    upside_down = (mu.response_probs() * (mu.response_probs() / pi.response_probs()) * f).sum()
    assert abs(upside_down - (pi.response_probs() * f).sum()) > 1e-3
    assert abs((mu.response_probs() * f).sum() - (pi.response_probs() * f).sum()) > 1e-3


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


def check_00_informative():
    """All 2^G patterns of rewards, each with its probability: the library's advantages are all zero in just two."""
    for size, p in ((2, 0.3), (5, 0.5), (8, 0.9)):
        total = 0.0
        for pattern in itertools.product((0.0, 1.0), repeat=size):
            if group_mean_advantages(torch.tensor(pattern), size).any():
                total += p ** sum(pattern) * (1 - p) ** (size - sum(pattern))
        assert abs(total - (1 - p**size - (1 - p) ** size)) < 1e-12
    assert 0.565 < total < 0.575  # the lesson's 0.57


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


def check_00_decomposition():
    """The product of the two factors is the whole ratio for every token of every response, as the library sees them."""
    mu, old, pi, _ = _policies()
    discrepancy = (old.log_probs() - mu.log_probs()).exp()
    staleness = (pi.log_probs() - old.log_probs()).exp()
    torch.testing.assert_close(discrepancy * staleness, token_ratios(pi, mu))
    sizes = ratio_decomposition(pi.log_probs(), old.log_probs(), mu.log_probs(), pi.mask)
    torch.testing.assert_close(sizes["mismatch_max"], discrepancy[pi.mask].log().abs().max())
    torch.testing.assert_close(sizes["staleness_max"], staleness[pi.mask].log().abs().max())
    assert (discrepancy - staleness).abs().max() > 0.1  # which factor is which matters
    torch.testing.assert_close(token_ratios(old, old), torch.ones_like(discrepancy))  # no update yet: exactly 1


def check_00_first_order():
    """Half the δ, a quarter of what the first two terms drop, an eighth of what all three do."""
    direction = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def dropped(size):
        delta = size * direction
        pairs = sum(delta[i] * delta[j] for i, j in itertools.combinations(range(9), 2))
        exact = (1 + delta).prod()
        return exact - 1 - delta.sum(), exact - 1 - delta.sum() - pairs

    (two, three), (two_half, three_half) = dropped(1e-3), dropped(5e-4)
    assert abs(two / two_half - 4) < 0.05  # third-order terms are a thousandth of the second-order ones
    assert abs(three / three_half - 8) < 0.1
    delta = torch.full((20,), 0.05, dtype=torch.float64)
    assert abs((1 + delta).prod() - 2.65) < 0.01 and abs(1 + delta.sum() - 2) < 1e-12  # pencil exercise 4


def _sampled_as_often_as_likely():
    """16 tokens drawn from μ in exactly its proportions (8 : 4 : 2 : 2), with log μ and log π of each."""
    mu = torch.tensor([8, 4, 2, 2], dtype=torch.float64) / 16
    pi = torch.tensor([0.20, 0.30, 0.05, 0.45], dtype=torch.float64)
    drawn = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2).view(4, 4)
    return mu, pi, mu.log()[drawn], pi.log()[drawn], torch.ones(4, 4).bool()


def check_00_kl():
    """The library's mean over such tokens is the definition Σ_w μ(w) log(μ(w)/π(w)), and not that of KL(π‖μ)."""
    mu, pi, log_mu, log_pi, mask = _sampled_as_often_as_likely()
    exact = (mu * (mu / pi).log()).sum()
    torch.testing.assert_close(kl_k1(log_mu, log_pi, mask), exact)
    assert abs(exact - (pi * (pi / mu).log()).sum()) > 0.01
    assert (log_mu - log_pi).min() < 0 < (log_mu - log_pi).max()  # terms of both signs


def check_00_k3():
    """The mean of r − 1 − log r over such tokens is the same KL, and no term is negative."""
    mu, pi, log_mu, log_pi, mask = _sampled_as_often_as_likely()
    r = pi / mu
    terms = r - 1 - r.log()
    exact = (mu * (mu / pi).log()).sum()
    torch.testing.assert_close((mu * terms).sum(), exact)
    torch.testing.assert_close(kl_k3(log_mu, log_pi, mask), exact)
    assert (terms >= 0).all() and abs((mu * r).sum() - 1) < 1e-12
    upside_down = (mu * (1 / r - 1 + r.log())).sum()
    assert abs(upside_down - exact) > 0.01


def check_00_ascent():
    """J after a step along ∇J, by enumeration: what η‖∇J‖² leaves over shrinks a hundredfold for a tenth of η."""
    _, _, policy, rewards = _policies()
    gradient = policy.score_sum((policy.response_probs() * rewards)[:, None].expand(policy.mask.shape))

    def rest(eta):
        after = policy.moved(gradient, eta)
        gain = ((after.response_probs() - policy.response_probs()) * rewards).sum()
        return gain - eta * gradient.square().sum()

    assert gradient.square().sum() > 1e-3
    assert abs(rest(1e-2) / rest(1e-3) - 100) < 5
