"""The tabular policy is a distribution, its gradients are autograd's, and the paper's orders of error hold."""

import math

import pytest
import torch

from minirl_edu.exact import (
    TabularPolicy,
    objective_remainder,
    sequence_gradient,
    sequence_objective,
    token_gradient,
    token_objective,
    token_ratios,
)


def policies(seed: int = 0, distance: float = 0.5) -> tuple[TabularPolicy, TabularPolicy, torch.Tensor]:
    """π_θ (logits with gradient), μ_old at some distance, and a reward for every response."""
    mu_old = TabularPolicy.random(3, 4, seed=seed)
    direction = TabularPolicy.random(3, 4, seed=seed + 1).logits
    pi = TabularPolicy((mu_old.logits + distance * direction).requires_grad_(), 4)
    rewards = torch.rand(len(mu_old.tokens), generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    return pi, mu_old, rewards


def test_every_response_is_listed_once_and_ends_rightly():
    policy = TabularPolicy.random(3, 4, seed=0)
    responses = [tuple(y[m].tolist()) for y, m in zip(policy.tokens, policy.mask, strict=True)]
    assert len(set(responses)) == len(responses) == 1 + 2 + 4 + 8 + 16  # ends after 0…3 tokens, or never
    assert all(2 not in y[:-1] and (y[-1] == 2 or len(y) == 4) for y in responses)


def test_probabilities_sum_to_one_and_follow_the_logits():
    policy = TabularPolicy.random(4, 3, seed=1)
    assert policy.response_probs().sum().item() == pytest.approx(1, abs=1e-14)
    # Row 0 is the empty prefix; after it, prefixes of one token in order: (1, end) is drawn from rows 0 and 2.
    row = [tuple(y[m].tolist()) for y, m in zip(policy.tokens, policy.mask, strict=True)].index((1, 3))
    p = policy.logits.softmax(-1)
    assert policy.response_probs()[row].item() == pytest.approx((p[0, 1] * p[2, 3]).item(), rel=1e-14)


def test_wrong_number_of_prefixes_is_named():
    with pytest.raises(ValueError, match=r"logits has 6 rows; vocabulary 3 and max_length 3 .* 7"):
        TabularPolicy(torch.zeros(6, 3), 3)


def test_sequence_objective_does_not_depend_on_who_sampled():
    pi, mu_old, rewards = policies()
    expected = (pi.response_probs() * rewards).sum()
    torch.testing.assert_close(sequence_objective(pi, mu_old, rewards), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("objective", "gradient"), [(sequence_objective, sequence_gradient), (token_objective, token_gradient)]
)
def test_gradient_formulas_are_the_gradients_of_the_objectives(objective, gradient):
    pi, mu_old, rewards = policies()
    (expected,) = torch.autograd.grad(objective(pi, mu_old, rewards), pi.logits)
    assert expected.norm() > 0.01
    torch.testing.assert_close(gradient(pi, mu_old, rewards).detach(), expected, rtol=1e-12, atol=1e-14)


def test_token_objective_by_hand():
    """One token at most, two words (0, end): J_token = J_seq = Σ_y π(y) R(y), since no response has two tokens."""
    pi, mu_old = TabularPolicy(torch.tensor([[0.3, -0.1]]), 1), TabularPolicy(torch.tensor([[-0.4, 0.2]]), 1)
    rewards = torch.tensor([2.0, -1.0], dtype=torch.float64)  # responses in order: (end), (0)
    p_end = 1 / (1 + math.exp(pi.logits[0, 0] - pi.logits[0, 1]))
    expected = 2 * p_end - (1 - p_end)
    assert token_objective(pi, mu_old, rewards).item() == pytest.approx(expected, rel=1e-12)
    assert sequence_objective(pi, mu_old, rewards).item() == pytest.approx(expected, rel=1e-12)


def test_on_policy_token_objective_counts_the_tokens():
    """At π_θ = μ_old every ratio is 1: J_token = E[|y| · R], where J_seq = E[R]."""
    _, mu_old, rewards = policies()
    expected = (mu_old.response_probs() * mu_old.mask.sum(1) * rewards).sum()
    torch.testing.assert_close(token_objective(mu_old, mu_old, rewards), expected, rtol=1e-12, atol=0)


def test_remainder_is_what_separates_the_two_objectives():
    pi, mu_old, rewards = policies()
    moved_seq = sequence_objective(pi, mu_old, rewards) - sequence_objective(mu_old, mu_old, rewards)
    moved_token = token_objective(pi, mu_old, rewards) - token_objective(mu_old, mu_old, rewards)
    remainder = objective_remainder(pi, mu_old, rewards)
    torch.testing.assert_close(remainder, moved_seq - moved_token, rtol=1e-10, atol=0)
    (gradient_gap,) = torch.autograd.grad(remainder, pi.logits)
    expected = sequence_gradient(pi, mu_old, rewards) - token_gradient(pi, mu_old, rewards)
    torch.testing.assert_close(gradient_gap, expected.detach(), rtol=1e-10, atol=1e-12)


def test_ratios_factor_into_mismatch_and_staleness():
    """(5): π_θ/μ_old = (π_old/μ_old) · (π_θ/π_old)."""
    pi, pi_old, _ = policies()
    mu_old = pi_old.moved(torch.ones_like(pi_old.logits).tril(), 0.1)
    product = token_ratios(pi_old, mu_old) * token_ratios(pi, pi_old)
    torch.testing.assert_close(token_ratios(pi, mu_old), product, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_objective_error_is_second_order_and_gradient_error_first(seed):
    """The claim the paper stands on, as log–log slopes over a decade of distances between π_θ and μ_old."""
    mu_old = TabularPolicy.random(3, 5, seed=seed)
    direction = TabularPolicy.random(3, 5, seed=seed + 100).logits
    rewards = torch.rand(len(mu_old.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = torch.logspace(-3, -2, 5, dtype=torch.float64)
    objective_error, gradient_error = [], []
    for step in steps:
        pi = mu_old.moved(direction, float(step))
        objective_error.append(objective_remainder(pi, mu_old, rewards).abs())
        gap = sequence_gradient(pi, mu_old, rewards) - token_gradient(pi, mu_old, rewards)
        gradient_error.append(gap.norm())

    def slope(errors: list[torch.Tensor]) -> float:
        x, y = steps.log(), torch.stack(errors).log()
        return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()

    # Leading order only: the next order bends the line by about a step, 1e-2, so 0.1 is generous and no integer away.
    assert slope(objective_error) == pytest.approx(2, abs=0.1)
    assert slope(gradient_error) == pytest.approx(1, abs=0.1)


def test_at_mu_old_the_two_gradients_are_equal():
    _, mu_old, rewards = policies()
    torch.testing.assert_close(
        sequence_gradient(mu_old, mu_old, rewards), token_gradient(mu_old, mu_old, rewards), rtol=1e-12, atol=1e-14
    )
