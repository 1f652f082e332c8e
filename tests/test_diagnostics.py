"""Every metric against a number worked out another way; the detector on curves whose story is known."""

import json
import math
import random
import re

import pytest
import torch

from minirl_edu.diagnostics import (
    CollapseDetector,
    entropy_drift,
    entropy_from_logits,
    fetch,
    first_order_gap,
    kl_k1,
    kl_k3,
    length_reward_cov,
    log_ratio_quantiles,
    masked_mean,
    policy_metrics,
    ratio_decomposition,
    score_error,
    sequence_ess,
    token_ess,
)
from minirl_edu.drift import action_values, drift, entropy_gradient, signal, unweighted_gradient, values, visits
from minirl_edu.exact import TabularPolicy, token_ratios

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
ZERO = torch.zeros(3, 3, dtype=torch.float64)
TWO_MASKS = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()


def log_ratios(*values: float) -> torch.Tensor:
    """Log of the given ratios on the four tokens of MASK, NaN elsewhere."""
    filled = torch.full((3, 3), math.nan, dtype=torch.float64)
    filled[MASK] = torch.tensor(values, dtype=torch.float64).log()
    return filled


def test_masked_mean_ignores_what_is_outside():
    assert masked_mean(log_ratios(math.e, 1, 1, 1), MASK).item() == pytest.approx(0.25)
    assert masked_mean(ZERO / 0, torch.zeros(3, 3)) == 0


def test_kl_estimators_on_every_token_of_a_known_distribution():
    """Σ_w μ(w)·estimate(w) is the exact KL(μ‖π), for k1 and k3 alike."""
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pi = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (mu * (mu / pi).log()).sum().item()
    assert exact > 0
    one = torch.ones(1, 1)
    for estimator in (kl_k1, kl_k3):
        estimates = [estimator(m.log()[None, None], p.log()[None, None], one) for m, p in zip(mu, pi, strict=True)]
        assert (mu * torch.stack(estimates)).sum().item() == pytest.approx(exact, rel=1e-12)
        assert all(e >= 0 for e in estimates) == (estimator is kl_k3)


def test_kl_k1_is_not_clamped_and_k3_stays_finite():
    rollout, old = torch.tensor([[0.0, 0.0]]), torch.tensor([[-66.0, -66.0]])
    assert kl_k1(rollout, old, torch.ones(1, 2)) == 66
    assert kl_k3(old, rollout, torch.ones(1, 2)).isfinite()


def test_effective_sample_sizes_by_hand():
    logp = log_ratios(1, 2, 3, 4)
    assert token_ess(logp, ZERO, MASK).item() == pytest.approx((1 + 2 + 3 + 4) ** 2 / (4 * (1 + 4 + 9 + 16)))
    # Two responses with tokens: weights 1·2·3 = 6 and 4. The third is empty and left out.
    assert sequence_ess(logp, ZERO, MASK).item() == pytest.approx((6 + 4) ** 2 / (2 * (36 + 16)))


@pytest.mark.parametrize("ess", [token_ess, sequence_ess])
def test_effective_sample_size_limits(ess):
    # Equal weights: all of the sample, even where every weight is e^-300 and would be 0 in fp32.
    logp = torch.full((4, 3), -300.0)
    assert ess(logp, torch.zeros(4, 3), torch.ones(4, 3)).item() == pytest.approx(1)
    # One response dominates with e^500 per token: its share of the sample is left.
    logp = torch.zeros(4, 1)
    logp[0] = 500
    assert ess(logp, torch.zeros(4, 1), torch.ones(4, 1)).item() == pytest.approx(0.25)
    assert ess(logp, torch.zeros(4, 1), torch.zeros(4, 1)) == 1


def test_ratio_decomposition_separates_the_factors():
    rollout = ZERO
    old = log_ratios(math.exp(0.1), math.exp(-0.2), math.exp(0.3), math.exp(-0.4))
    logp = old + 0.05
    d = {key: value.item() for key, value in ratio_decomposition(logp, old, rollout, MASK).items()}
    assert d["mismatch_mean"] == pytest.approx(0.25) and d["mismatch_max"] == pytest.approx(0.4)
    assert d["mismatch_q50"] in (pytest.approx(0.2), pytest.approx(0.3))
    assert d["mismatch_q99"] == pytest.approx(0.4)
    assert all(value == pytest.approx(0.05) for key, value in d.items() if key.startswith("staleness"))
    assert ratio_decomposition(old - 66, old, rollout, MASK)["staleness_max"] == pytest.approx(66)  # not clamped
    assert all(value == 0 for value in ratio_decomposition(logp, old, rollout, torch.zeros(3, 3)).values())


def test_quantiles_are_those_of_the_sample():
    values = torch.randperm(101, generator=torch.Generator().manual_seed(0)).double()[None]
    d = ratio_decomposition(values, torch.zeros_like(values), values, torch.ones(1, 101))
    assert [d[f"staleness_{key}"].item() for key in ("q50", "q90", "q99", "max")] == [50, 90, 99, 100]


def test_first_order_gap_by_hand():
    # First response |1.1·0.8·1.5 − (1 + 0.1 − 0.2 + 0.5)| = 0.08; one token and none are exact: mean over three.
    assert first_order_gap(log_ratios(1.1, 0.8, 1.5, 7.0), ZERO, MASK).item() == pytest.approx(0.08 / 3, rel=1e-9)


def test_first_order_gap_keeps_its_digits_when_tiny_and_stays_finite_when_huge():
    """δ = 1e-3 twice: the gap is δ² = 1e-6. As a difference of fp32 numbers near 1 its first digit would be wrong."""
    small = torch.full((1, 2), math.log(1.001))
    gap = first_order_gap(small, torch.zeros(1, 2), torch.ones(1, 2)).item()
    assert gap == pytest.approx(1e-6, rel=1e-2)
    assert first_order_gap(small * 1e6, torch.zeros(1, 2), torch.ones(1, 2)).isfinite()


def test_length_reward_cov_by_hand():
    """Lengths 3, 1 | 2, 4 (holes don't count) and rewards 1, 0 | 0, 1: group means 2 and 3."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert length_reward_cov(rewards, TWO_MASKS, 2).item() == pytest.approx((1 * 1 + 1 * 1) / 4)
    assert length_reward_cov(1 - rewards, TWO_MASKS, 2).item() == pytest.approx(-0.5)
    # In one group of four the mean length is 2.5; a constant per group changes nothing.
    assert length_reward_cov(rewards, TWO_MASKS, 4).item() == pytest.approx((0.5 + 1.5) / 4)
    shifted = rewards + torch.tensor([5.0, 5.0, -3.0, -3.0])
    assert length_reward_cov(shifted, TWO_MASKS, 2).item() == pytest.approx(0.5)
    assert length_reward_cov(torch.zeros(0), torch.zeros(0, 3), 2) == 0
    with pytest.raises(ValueError, match=r"group_size is 3"):
        length_reward_cov(rewards, TWO_MASKS, 3)
    with pytest.raises(ValueError, match=r"rewards has shape \[3\]"):
        length_reward_cov(rewards[:3], TWO_MASKS, 2)


def test_entropy_drift_ignores_what_is_masked_and_takes_advantages_per_token():
    """One token by hand: w = 2, Â = −1, π(a) = 1/2, H = 1: (1 − 2)(−1)(−½)(log ½ + 1)."""
    logp, rollout = torch.tensor([[0.5, math.nan]]).log(), torch.tensor([[0.25, math.nan]]).log()
    entropy, mask = torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])
    expected = pytest.approx(-0.5 * (1 + math.log(0.5)), rel=1e-6)
    assert entropy_drift(logp, rollout, entropy, torch.tensor([-1.0]), mask).item() == expected
    assert entropy_drift(logp, rollout, entropy, torch.tensor([[-1.0, math.nan]]), mask).item() == expected
    extreme = entropy_drift(logp, torch.full((1, 2), -1e4), entropy, torch.tensor([-1.0]), mask)
    assert extreme.isfinite()


@pytest.mark.parametrize("seed", range(3))
def test_entropy_drift_has_the_expectation_that_it_states(seed):
    """Every response as a row, its advantage times its probability: exact, in float64."""
    mu = TabularPolicy.random(3, 4, seed=seed)
    pi = mu.moved(TabularPolicy.random(3, 4, seed=seed + 1).logits, 0.7)
    rewards = torch.rand(len(mu.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs, climb = mu.response_probs(), entropy_gradient(pi.logits)
    entropy = entropy_from_logits(pi.logits)[pi.prefix]

    def estimate(advantages: torch.Tensor) -> torch.Tensor:
        weighted = probs[:, None] * advantages * len(probs)
        return entropy_drift(pi.log_probs(), mu.log_probs(), entropy, weighted, pi.mask)

    v = values(mu, rewards)
    exact = (drift(pi, mu, rewards) * climb).sum()
    assert exact.abs() > 1e-5
    torch.testing.assert_close(estimate((v - v[0])[pi.prefix]), exact, rtol=1e-10, atol=1e-14)

    # Of the whole advantage it is the difference of the two gradients, but for the term with k.
    advantages = (rewards - v[0])[:, None].expand(pi.mask.shape)
    whole = unweighted_gradient(pi, mu, rewards) - signal(pi, mu, rewards, token_ratios(pi, mu))
    p, m, logp = pi.logits.softmax(-1), mu.logits.softmax(-1), pi.logits.log_softmax(-1)
    k = (p.square() * (logp + entropy_from_logits(pi.logits)[:, None])).sum(1)
    left_out = (visits(mu) * k * ((m - p) * action_values(mu, rewards)).sum(1)).sum()
    assert left_out.abs() > 1e-5
    torch.testing.assert_close(estimate(advantages) + left_out, (whole * climb).sum(), rtol=1e-10, atol=1e-14)


def test_entropy():
    p = torch.tensor([[0.5, 0.25, 0.25]])
    expected = 1.5 * math.log(2)
    assert entropy_from_logits(p.log() + 7).item() == pytest.approx(expected)
    assert entropy_from_logits(torch.zeros(2, 3, 18)).tolist() == [[pytest.approx(math.log(18))] * 3] * 2
    forbidden = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().requires_grad_()
    entropy = entropy_from_logits(forbidden)
    assert entropy.item() == pytest.approx(expected)
    entropy.sum().backward()
    assert forbidden.grad is not None and forbidden.grad.isfinite().all()
    # bf16 logits are worked on in fp32.
    assert entropy_from_logits(torch.zeros(1, 18).bfloat16()).item() == pytest.approx(math.log(18), rel=1e-6)


KEYS = {
    "kl_rollout_old",
    "k3_rollout_old",
    "ess",
    "log_ratio_mismatch",
    "log_ratio_staleness",
    "first_order_gap",
    "response_length",
}


def test_policy_metrics_by_hand():
    old = log_ratios(2.0, 1.0, 1.0, 1.0)
    logp = old + log_ratios(1.0, 1.5, 0.5, 4.0)  # π_θ/μ_old = 2, 1.5, 0.5, 4
    logp.requires_grad_()
    m = fetch(policy_metrics(logp, old, ZERO, MASK))
    assert set(m) == KEYS and all(type(value) is float for value in m.values())
    assert m["kl_rollout_old"] == pytest.approx(-math.log(2) / 4)
    assert m["k3_rollout_old"] == pytest.approx((2 - 1 - math.log(2)) / 4)
    assert m["ess"] == pytest.approx(8**2 / (4 * (4 + 2.25 + 0.25 + 16)))
    assert m["log_ratio_mismatch"] == pytest.approx(math.log(2) / 4)
    assert m["log_ratio_staleness"] == pytest.approx((math.log(1.5) + math.log(2) + math.log(4)) / 4)
    assert m["first_order_gap"] == pytest.approx(abs(2 * 1.5 * 0.5 - (1 + 1 + 0.5 - 0.5)) / 3)
    assert m["response_length"] == pytest.approx(4 / 3)


def test_policy_metrics_when_all_three_policies_agree():
    logp = -torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    m = fetch(policy_metrics(logp, logp, logp, torch.ones(8, 5)))
    ones = {"ess": 1, "response_length": 5}
    assert m == {key: ones.get(key, 0) for key in KEYS}


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_without_responses_or_tokens_means_are_zero_and_samples_whole(shape):
    empty = torch.zeros(shape)
    assert fetch(policy_metrics(empty, empty, empty, empty)) == {key: float(key == "ess") for key in KEYS}
    assert sequence_ess(empty, empty, empty) == 1
    assert all(value == 0 for value in ratio_decomposition(empty, empty, empty, empty).values())
    assert log_ratio_quantiles(empty, empty, empty, [0.5]) == 0


def curve(kind: str, steps: int = 300, seed: int = 0) -> list[dict[str, float]]:
    """A run as it is logged: noise of the size small batches have; from step 150 on, what `kind` says."""
    rng = random.Random(seed)
    run = []
    for step in range(steps):
        late = max(0, step - 150)
        entropy, kl, reward = 0.5 * math.exp(-step / 150), 0.002 * (1 + step / 300), 0.9 - 0.5 * math.exp(-step / 60)
        if kind == "entropy":
            entropy *= math.exp(-late / 10)
        if kind == "kl":
            kl *= math.exp(late / 5)
        if kind == "reward":
            reward -= min(0.5, late / 100)
        metrics = {
            "grad_step": step,
            "entropy": entropy * (1 + 0.1 * rng.gauss(0, 1)),
            "kl_rollout_old": kl + 0.001 * rng.gauss(0, 1),
            "reward": reward + 0.05 * rng.gauss(0, 1),
        }
        if step % 20 == 0:
            metrics["score"] = reward + 0.02 * rng.gauss(0, 1)
        run.append(metrics)
    return run


def warnings_of(run: list[dict[str, float]], detector: CollapseDetector | None = None) -> list[str]:
    detector = detector or CollapseDetector()
    return [warning for metrics in run for warning in detector.update(metrics)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_no_alarm(seed):
    assert warnings_of(curve("healthy", seed=seed)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_is_told_once_and_early_with_its_depth(seed):
    warnings = warnings_of(curve("reward", seed=seed))
    told = [re.fullmatch(r"gradient step (\d+): (\w+) fell from (\S+) \(step (\d+)\) to (\S+)", w) for w in warnings]
    assert sorted(t[2] for t in told if t) == ["reward", "score"] and all(told), warnings
    for t in told:
        assert t and 150 < int(t[1]) <= 200 and int(t[4]) <= 160
        assert float(t[3]) == pytest.approx(0.87, abs=0.06) and 0.3 < float(t[5]) < float(t[3]) - 0.24


@pytest.mark.parametrize("kind", ["entropy", "kl"])
def test_entropy_and_kl_alone_are_no_collapse_but_are_named_beside_one(kind):
    run = curve(kind)
    assert warnings_of(run) == []
    for metrics in run:
        if metrics["grad_step"] >= 170:
            metrics["reward"] = 0.1
    (warning,) = (w for w in warnings_of(run) if ": reward" in w)
    words = {
        "entropy": r"; entropy is down from \S+ to \S+ nats",
        "kl": r"; the training–inference KL is up from \S+ to",
    }
    assert {name: bool(re.search(pattern, warning)) for name, pattern in words.items()} == {
        name: name == kind for name in words
    }


def test_the_first_score_counts_and_every_fall_is_told():
    """The score before the first step is what the run can fall from; a run that came back can fall again."""

    def scores(*values: float) -> list[dict[str, float]]:
        return [{"grad_step": 8 * i, "score": score} for i, score in enumerate(values)]

    assert warnings_of(scores(0.46, 0.12, 0.03, 0.02)) == ["gradient step 8: score fell from 0.46 (step 0) to 0.12"]
    assert warnings_of(scores(0.2, 0.0)) == ["gradient step 8: score fell from 0.20 (step 0) to 0.00"]
    assert warnings_of(scores(0.46, 0.12, 0.62, 0.98, 0.1)) == [
        "gradient step 8: score fell from 0.46 (step 0) to 0.12",
        "gradient step 32: score fell from 0.98 (step 24) to 0.10",
    ]
    assert warnings_of(scores(0.46, 0.4, 0.9, 0.7, 0.95)) == []


def test_noise_is_no_fall():
    # 0.04 is half of 0.08, but of 256 problems three standard errors of the difference are 0.06.
    run = [{"grad_step": i, "score": score} for i, score in enumerate((0.08, 0.035))]
    assert warnings_of(run) == []
    assert len(warnings_of(run, CollapseDetector(problems=10_000))) == 1


def test_more_samples_make_a_smaller_fall_of_the_score_believable_but_not_of_the_reward():
    for name, samples, told in (("score", 1, 0), ("score", 40, 1), ("reward", 40, 0)):
        run = [{"grad_step": i, name: 0.035 if i else 0.08} for i in range(60)]  # the reward is a mean over ten
        assert len(warnings_of(run, CollapseDetector(samples=samples, warmup=1))) == told


def test_the_standard_error_of_a_score_counts_problems_not_samples():
    rewards = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    # means 1/2, 1, 0: their variance is 1/4
    assert score_error(rewards).item() == pytest.approx(math.sqrt(0.25 / 3))
    assert score_error(rewards.repeat(1, 8)).item() == pytest.approx(math.sqrt(0.25 / 3))
    assert score_error(torch.tensor([[1.0], [0.0]])).item() == pytest.approx(0.5)
    assert math.isnan(score_error(rewards[:1]))


def test_a_tiny_kl_may_grow_freely():
    def run(size: float) -> list[dict[str, float]]:
        kl = [size * math.exp(s / 5) for s in range(45)]
        return [{"grad_step": s, "kl_rollout_old": kl[s], "reward": 0.9 * (s < 35)} for s in range(45)]

    assert ["KL" in w for w in warnings_of(run(1e-7), CollapseDetector(kl_rise=2.0))] == [False]
    assert ["KL" in w for w in warnings_of(run(1e-5), CollapseDetector(kl_rise=2.0))] == [True]


def test_a_flat_run_raises_no_alarm_however_early_it_is_judged():
    flat = {"entropy": 0.5, "kl_rollout_old": 0.01, "reward": 0.5, "score": 0.5}
    assert warnings_of([{"grad_step": s, **flat} for s in range(100)], CollapseDetector(warmup=0)) == []


def test_a_lucky_start_sets_no_record():
    run = [{"grad_step": s, "reward": 0.9 if s < 5 else 0.5} for s in range(60)]
    assert warnings_of(run) == []
    assert len(warnings_of(run, CollapseDetector(warmup=0))) == 1


def test_not_a_number_is_an_alarm_at_once():
    (warning,) = warnings_of([{"grad_step": 3, "entropy": math.nan}, {"grad_step": 4, "entropy": math.nan}])
    assert warning == "gradient step 3: entropy is nan"


@pytest.mark.parametrize("cut", [5, 155, 250])
def test_resuming_from_the_state_changes_nothing(cut):
    run = curve("reward")
    whole, before, after = CollapseDetector(), CollapseDetector(), CollapseDetector()
    expected = warnings_of(run, whole)
    first = warnings_of(run[:cut], before)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + warnings_of(run[cut:], after) == expected != []
    assert after.state_dict() == whole.state_dict()


def test_a_saved_state_does_not_move_with_the_detector():
    detector = CollapseDetector()
    detector.update({"grad_step": 0, "entropy": 1.0})
    state = detector.state_dict()
    detector.update({"grad_step": 1, "entropy": 2.0})
    other = CollapseDetector()
    other.load_state_dict(state)
    other.update({"grad_step": 1, "entropy": 2.0})
    assert other.state_dict() == detector.state_dict()
    assert state["averages"]["entropy"]["count"] == 1


def test_log_ratio_quantiles_are_observed_values_of_the_masked_tokens():
    logp = torch.tensor([[0.3, -0.2, 9.0], [0.0, 0.1, -0.4]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logp_rollout = torch.where(mask.bool(), 0.0, math.nan)
    quantiles = log_ratio_quantiles(logp, logp_rollout, mask, (0.0, 0.25, 0.5, 1.0))
    torch.testing.assert_close(quantiles, torch.tensor([-0.4, -0.2, 0.0, 0.3]))
    assert log_ratio_quantiles(logp, logp_rollout, 0 * mask, (0.5,)).tolist() == [0.0]
