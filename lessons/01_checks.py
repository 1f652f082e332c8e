"""Proofs of the equations in 01_sequence_reward.md: exact enumeration in float64, finite differences, autograd."""

import itertools
import math

import torch
from torch import Tensor

from minirl_edu.advantages import group_mean_advantages, leave_one_out_advantages
from minirl_edu.diagnostics import sequence_ess
from minirl_edu.exact import TabularPolicy, sequence_gradient, sequence_objective, token_ratios

VOCABULARY, LENGTH = 3, 3  # the last word ends a response: 7 prefixes, 15 responses
PREFIXES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]  # in the order of the rows of logits


def policies(distance: float = 0.7) -> tuple[TabularPolicy, TabularPolicy, Tensor]:
    """π_θ, μ_old and a reward for every response."""
    mu_old = TabularPolicy.random(VOCABULARY, LENGTH, seed=0)
    pi = mu_old.moved(TabularPolicy.random(VOCABULARY, LENGTH, seed=1).logits, distance)
    rewards = torch.rand(len(mu_old.tokens), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return pi, mu_old, rewards


def responses(policy: TabularPolicy) -> list[tuple[int, ...]]:
    """The tokens of every response."""
    return [tuple(y[m].tolist()) for y, m in zip(policy.tokens, policy.mask, strict=True)]


def scores(policy: TabularPolicy) -> Tensor:
    """∇log π(y) of every response, [B, P, V], by autograd on a sum of logs written here."""

    def logp(logits: Tensor) -> Tensor:
        table = logits.log_softmax(-1)
        return torch.stack(
            [sum(table[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))) for y in responses(policy)]  # type: ignore[misc]
        )

    return torch.autograd.functional.jacobian(logp, policy.logits)


def finite_differences(function, policy: TabularPolicy, step: float = 1e-5) -> Tensor:
    """The gradient of function(policy) with respect to its logits, by central differences: error about step²."""
    gradient = torch.zeros_like(policy.logits)
    for row, word in itertools.product(*map(range, gradient.shape)):
        nudge = torch.zeros_like(gradient)
        nudge[row, word] = step
        gradient[row, word] = (function(policy.moved(nudge)) - function(policy.moved(nudge, -1.0))) / (2 * step)
    return gradient


def mean(probs: Tensor, values: Tensor) -> Tensor:
    """Σ_y probs(y) · values(y, …)."""
    return torch.tensordot(probs, values, 1)


def equal(left: Tensor, right: Tensor, atol: float = 1e-12) -> None:
    """Assert equality to the rounding of float64 (or to `atol`, for finite differences)."""
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def check_01_product() -> None:
    """Take the joint distribution alone, compute the conditionals from it by Bayes, and find the softmaxes again."""
    policy = policies()[0]
    joint = dict(zip(responses(policy), policy.response_probs().tolist(), strict=True))
    assert abs(sum(joint.values()) - 1) < 1e-12

    def passes(prefix: tuple[int, ...]) -> float:
        return sum(p for y, p in joint.items() if y[: len(prefix)] == prefix)

    conditionals = torch.tensor(
        [[passes((*prefix, v)) / passes(prefix) for v in range(VOCABULARY)] for prefix in PREFIXES]
    )
    torch.testing.assert_close(conditionals, policy.logits.softmax(-1).float(), rtol=1e-5, atol=1e-6)
    for y, probability in joint.items():
        factors = [policy.logits.softmax(-1)[PREFIXES.index(y[:t]), y[t]].item() for t in range(len(y))]
        assert abs(math.prod(factors) - probability) < 1e-15


def check_01_reinforce() -> None:
    """The right-hand side, summed over all responses, against finite differences of the expected reward."""
    policy, _, rewards = policies()
    right = mean(policy.response_probs() * rewards, scores(policy))
    equal(finite_differences(lambda p: mean(p.response_probs(), rewards), policy), right, atol=1e-9)


def check_01_sequence_objective() -> None:
    """Both sides, and the library's. The weight is built from token ratios, the left side knows no μ_old."""
    pi, mu_old, rewards = policies()
    weights = token_ratios(pi, mu_old).prod(1)
    expected = mean(pi.response_probs(), rewards)
    equal(mean(mu_old.response_probs() * weights, rewards), expected)
    equal(sequence_objective(pi, mu_old, rewards), expected)


def check_01_sequence_gradient() -> None:
    """(2) summed under μ_old, and the library's, against finite differences of E[R] under π_θ."""
    pi, mu_old, rewards = policies()
    weights = token_ratios(pi, mu_old).prod(1)
    right = mean(mu_old.response_probs() * weights * rewards, scores(pi))
    left = finite_differences(lambda p: mean(p.response_probs(), rewards), pi)
    equal(left, right, atol=1e-9)
    equal(sequence_gradient(pi, mu_old, rewards), right)


def check_01_baseline() -> None:
    """Several constants give the gradient (finite differences), under π_θ and under μ_old with the weight; a baseline
    that looks at the response does not, nor does a constant under μ_old without the weight."""
    pi, mu_old, rewards = policies()
    score, weights = scores(pi), token_ratios(pi, mu_old).prod(1)
    gradient = finite_differences(lambda p: mean(p.response_probs(), rewards), pi)
    for probs in (pi.response_probs(), mu_old.response_probs() * weights):
        for b in (-3.0, 0.5, 100.0):
            equal(mean(probs * (rewards - b), score), gradient, atol=1e-9)
        assert (mean(probs * (rewards - 0.5 * rewards), score) - gradient).norm() > 0.01
    sampled = mu_old.response_probs()
    assert (mean(sampled * (rewards - 3.0), score) - mean(sampled * rewards, score)).norm() > 0.01


def check_01_own_baseline() -> None:
    """The mean over *all* groups of two and of three responses, each group with its probability; and that leaving one
    out removes the factor."""
    policy = TabularPolicy.random(3, 2, seed=3)  # 7 responses, so 343 groups of three
    rewards = torch.tensor([0.1, 0.9, 0.4, 1.0, 0.0, 0.6, 0.3], dtype=torch.float64)
    probs = policy.response_probs()
    score = torch.stack([policy.score_sum(row[:, None].expand(7, 2)) for row in torch.eye(7, dtype=torch.float64)])
    gradient = finite_differences(lambda p: mean(p.response_probs(), rewards), policy)
    for size in (2, 3):
        group_mean, leave_one_out = torch.zeros_like(gradient), torch.zeros_like(gradient)
        for group in itertools.product(range(7), repeat=size):
            index = torch.tensor(group)
            probability = probs[index].prod()
            for total, advantages in ((group_mean, group_mean_advantages), (leave_one_out, leave_one_out_advantages)):
                total += probability * mean(advantages(rewards[index], size) / size, score[index])
        equal(group_mean, (size - 1) / size * gradient, atol=1e-9)
        equal(leave_one_out, gradient, atol=1e-9)


def independent_tokens(length: int) -> tuple[TabularPolicy, TabularPolicy]:
    """π and μ that never end early and have the same row of logits after every prefix."""
    rows = sum(2**t for t in range(length))
    pi, mu = torch.tensor([[0.3, -0.4, -1000.0]]), torch.tensor([[0.0, 0.2, -1000.0]])
    pi, mu = (row.double().expand(rows, 3) for row in (pi, mu))
    return TabularPolicy(pi, length), TabularPolicy(mu, length)


def check_01_weight_variance() -> None:
    """E[w²] by enumeration of all responses of 1 to 7 tokens, against both closed forms; E[w] stays 1."""
    for length in range(1, 8):
        pi, mu = independent_tokens(length)
        weights, probs = token_ratios(pi, mu).prod(1), mu.response_probs()
        p, m = pi.logits[0].softmax(-1)[:2], mu.logits[0].softmax(-1)[:2]
        chi_square = ((p - m) ** 2 / m).sum()
        equal(mean(probs, weights), torch.ones((), dtype=torch.float64))
        equal(mean(probs, weights**2), (p**2 / m).sum() ** length)
        equal(mean(probs, weights**2), (1 + chi_square) ** length)
    assert chi_square > 0.01


def check_01_ess() -> None:
    """The library's effective sample size of 200,000 drawn responses against 1/E[w²], within 1 %: E[w²] is below 2 and
    its estimate has a relative error of about 0.3 % there."""
    pi, mu_old, _ = policies(0.5)
    probs, weights = mu_old.response_probs(), token_ratios(pi, mu_old).prod(1)
    drawn = torch.multinomial(probs, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    limit = 1 / mean(probs, weights**2)
    own = weights[drawn].sum() ** 2 / (len(drawn) * weights[drawn].square().sum())
    library = sequence_ess(pi.log_probs()[drawn], mu_old.log_probs()[drawn], mu_old.mask[drawn])
    assert 0.5 < limit < 0.9
    assert abs(own / limit - 1) < 0.01
    equal(library, own)


def check_01_loss() -> None:
    """Two losses over a batch of all responses, counted so often as μ_old draws them: autograd gives minus (2)."""
    pi, mu_old, rewards = policies()
    probs = mu_old.response_probs()
    advantages = rewards - mean(pi.response_probs(), rewards)
    expected = -sequence_gradient(pi, mu_old, rewards)
    for kind in ("detached weight times log", "weight alone", "both with gradient"):
        logits = pi.logits.clone().requires_grad_()
        logp = TabularPolicy(logits, LENGTH).log_probs().sum(1)
        weights = (logp - mu_old.log_probs().sum(1)).exp()
        losses = {
            "detached weight times log": -mean(probs, weights.detach() * advantages * logp),
            "weight alone": -mean(probs, weights * advantages),
            "both with gradient": -mean(probs, weights * advantages * logp),
        }
        (gradient,) = torch.autograd.grad(losses[kind], logits)
        if kind == "both with gradient":
            assert (gradient - expected).norm() > 0.01
        else:
            equal(gradient, expected)
