"""The losses against the paper's formulas written out a second time, against exact gradients, and at their edges.

Values and gradients are compared in float64; rtol 1e-12 leaves room for the order of summation and nothing else.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from minirl_edu.advantages import ADVANTAGES, group_mean_advantages
from minirl_edu.exact import TabularPolicy, token_gradient, token_ratios
from minirl_edu.objectives import CORRECTIONS, OBJECTIVES, cispo_loss, grpo_loss, minirl_loss

assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
EPS_LOW, EPS_HIGH, CAP = 0.2, 0.27, 5.0  # the paper's


def batch(seed: int = 0, dtype: torch.dtype = torch.float64, B: int = 6, T: int = 5) -> dict[str, Tensor]:
    """Random inputs wide enough to reach both clip bounds and the cap, with ragged rows and one empty one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logp = -normal(B, T).abs() - 4  # low enough for all three to be log-probabilities
    logp_old = logp + 0.4 * normal(B, T)
    lengths = torch.arange(B) % (T + 1)
    return {
        "logp": logp.to(dtype),
        "logp_old": logp_old.to(dtype),
        "logp_rollout": (logp_old + 1.0 * normal(B, T)).to(dtype),
        "advantages": normal(B).to(dtype),
        "mask": torch.arange(T) < lengths[:, None],
    }


def value_and_grad(loss_fn, logp: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    logp = logp.clone().requires_grad_()
    loss = loss_fn(logp, *args).loss
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad


def minirl_by_hand(
    b: dict[str, Tensor], *, clip: bool = True, is_correction: bool = True, length_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """(7) in plain Python floats: the loss, and its derivative with respect to each logp."""
    B, T = b["mask"].shape
    loss, grad = 0.0, torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        length = int(b["mask"][i].sum())
        for t in range(T):
            if not b["mask"][i, t]:
                continue
            logp, old, rollout = (float(b[k][i, t]) for k in ("logp", "logp_old", "logp_rollout"))
            advantage = float(b["advantages"][i])
            staleness = math.exp(logp - old)
            mismatch = math.exp(old - rollout) if is_correction else 1.0
            m = 1.0
            if clip and advantage > 0 and staleness > 1 + EPS_HIGH:
                m = 0.0
            if clip and advantage < 0 and staleness < 1 - EPS_LOW:
                m = 0.0
            term = m * min(mismatch * staleness, CAP) * advantage / B
            if length_norm:
                term /= length
            loss -= term * logp
            grad[i, t] = -term
    return torch.tensor(loss, dtype=torch.float64), grad


ABLATIONS = [
    {},
    {"clip": False},
    {"is_correction": False},
    {"length_norm": True},
    {"clip": False, "is_correction": False, "length_norm": True},
]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda a: "+".join(a) or "minirl")
@pytest.mark.parametrize("seed", range(3))
def test_minirl_and_each_ablation_equal_their_formula(ablation, seed):
    b = batch(seed)
    loss, grad = value_and_grad(partial(minirl_loss, **ablation), *b.values())
    expected_loss, expected_grad = minirl_by_hand(b, **ablation)
    assert_equal(loss, expected_loss)
    assert_equal(grad, expected_grad)


def test_the_ablations_differ():
    """Otherwise the test above could pass on inputs that no option touches."""
    values = [minirl_by_hand(batch(), **ablation)[0].item() for ablation in ABLATIONS]
    assert len({round(value, 6) for value in values}) == len(ABLATIONS)


@pytest.mark.parametrize("seed", range(3))
def test_minirl_gradient_on_a_tabular_policy_is_equation_4(seed):
    """Every response is a row and its advantage carries its probability under μ_old: the sum is the expectation."""
    mu_old = TabularPolicy.random(3, 4, seed=seed)
    old = mu_old.moved(TabularPolicy.random(3, 4, seed=seed + 10).logits, 0.3)  # the training engine's θ_old
    start = old.moved(TabularPolicy.random(3, 4, seed=seed + 20).logits, 0.3).logits
    pi = TabularPolicy(start.requires_grad_(), 4)
    rewards = torch.randn(len(pi.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weighted = mu_old.response_probs() * rewards
    arguments = (pi.log_probs(), old.log_probs(), mu_old.log_probs(), weighted, pi.mask)

    exact = minirl_loss(*arguments, clip=False, is_cap=math.inf, num_responses=1).loss
    (grad,) = torch.autograd.grad(exact, pi.logits, retain_graph=True)
    assert_equal(-grad, token_gradient(pi, mu_old, rewards).detach())

    # And with M_t and the cap, (7): the same sum with its coefficients chosen by hand.
    cap = 1.3  # low enough to bite here
    (grad,) = torch.autograd.grad(minirl_loss(*arguments, is_cap=cap, num_responses=1).loss, pi.logits)
    r, positive = token_ratios(pi, old), rewards[:, None] > 0
    keep = ~(positive & (r > 1 + EPS_HIGH) | ~positive & (r < 1 - EPS_LOW))
    coefficient = keep * token_ratios(pi, mu_old).clamp(max=cap) * weighted[:, None]
    assert (pi.mask & ~keep).any() and (pi.mask & (token_ratios(pi, mu_old) > cap)).any()
    assert_equal(-grad, pi.score_sum(coefficient).detach())


@pytest.mark.parametrize(
    ("advantage", "ratio", "kept"),
    [
        (1.0, 1.27 - 1e-6, True),
        (1.0, 1.27 + 1e-6, False),
        (1.0, 0.8 - 1e-6, True),  # a positive advantage has no lower bound
        (1.0, 0.01, True),
        (-1.0, 0.8 + 1e-6, True),
        (-1.0, 0.8 - 1e-6, False),
        (-1.0, 1.27 + 1e-6, True),  # a negative one no upper bound, and no dual clip
        (-1.0, 4.9, True),
        (0.0, 1.5, True),  # nothing to clip, and not counted as clipped
        (0.0, 0.5, True),
    ],
)
def test_each_side_of_each_clip_bound(advantage, ratio, kept):
    logp = torch.tensor([[-9.0]], dtype=torch.float64)
    old = logp - math.log(ratio)
    args = (old, old, torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1))
    _, grad = value_and_grad(minirl_loss, logp, *args)
    assert grad.item() == pytest.approx(-advantage * ratio if kept else 0.0, rel=1e-9)
    metrics = minirl_loss(logp, *args).metrics
    assert metrics["clip_frac_pos"] == (advantage > 0 and not kept)
    assert metrics["clip_frac_neg"] == (advantage < 0 and not kept)


def test_the_cap_is_on_the_product():
    """π_old/μ_old = 4, π_θ/π_old = 1.25: the product is 5. Capping the first factor at 3 would leave 3.75, not 3."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64), torch.ones(1, 1)
    old = logp - math.log(1.25)
    _, grad = value_and_grad(partial(minirl_loss, is_cap=3.0), logp, old, old - math.log(4), *one)
    assert grad.item() == pytest.approx(-3.0, rel=1e-12)
    # The other way round: π_old/μ_old = 6 alone is over 5; the product, 6 · 0.5, is not and stays 3.
    old = logp - math.log(0.5)
    _, grad = value_and_grad(minirl_loss, logp, old, old - math.log(6), *one)
    assert grad.item() == pytest.approx(-3.0, rel=1e-12)


def test_there_is_no_lower_bound_on_the_weight():
    logp = torch.tensor([[-5.0]], dtype=torch.float64)
    _, grad = value_and_grad(minirl_loss, logp, logp, logp + 4, torch.ones(1).double(), torch.ones(1, 1))
    assert grad.item() == pytest.approx(-math.exp(-4), rel=1e-12)


def test_on_policy_minirl_is_reinforce_with_the_mismatch_weight():
    b = batch()
    b["logp_old"] = b["logp"]
    b["logp_rollout"] = b["logp"] + (b["logp_rollout"] - b["logp"]).clamp(-1, 1)  # under the cap
    _, grad = value_and_grad(minirl_loss, *b.values())
    weight = (b["logp_old"] - b["logp_rollout"]).exp()
    expected = -weight * b["advantages"][:, None] * b["mask"] / len(b["mask"])
    assert_equal(grad, expected)


def test_a_step_against_the_gradient_raises_the_probability_of_what_was_good():
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)[:, None]  # two one-token responses
    minirl_loss(logp, logp.detach(), logp.detach(), torch.tensor([0.5, -0.5]), torch.ones(2, 1)).loss.backward()
    assert logits.grad is not None and logits.grad[0] < 0 < logits.grad[1]


def test_only_logp_carries_gradient():
    b = batch()
    leaves = [b[k].clone().requires_grad_() for k in ("logp", "logp_old", "logp_rollout", "advantages")]
    logp, old, rollout, advantages = leaves
    for loss in (
        minirl_loss(logp, old, rollout, advantages, b["mask"]).loss,
        grpo_loss(logp, old, advantages, b["mask"]).loss,
        cispo_loss(logp, old, advantages, b["mask"]).loss,
    ):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert grads[0] is not None and grads[1:] == (None, None, None)


def correction_by_hand(name: str, b: dict[str, Tensor], i: int, t: int, cap: float) -> float:
    """The weight of token t of response i, in plain Python floats."""
    logp, old, rollout = (float(b[k][i, t]) for k in ("logp", "logp_old", "logp_rollout"))
    tokens = [u for u in range(b["mask"].shape[1]) if b["mask"][i, u]]
    mismatches = [math.exp(float(b["logp_old"][i, u] - b["logp_rollout"][i, u])) for u in tokens]
    mismatch, product, r = math.exp(old - rollout), math.prod(mismatches), math.exp(logp - old)
    bad = float(b["advantages"][i]) < 0 and math.exp(rollout) - math.exp(old) > 0.15
    return {
        "token_truncated": min(mismatch * r, cap),
        "token_masked": mismatch * r if 0.5 <= mismatch <= cap else 0.0,
        "sequence_truncated": min(product, cap) * r,
        "sequence_masked": product * r if product <= cap else 0.0,
        "geometric_mean": min(product ** (1 / len(tokens)), cap) * r,
        "negative_masked": 0.0 if bad else min(r, cap),
        "none": min(r, cap),
    }[name]


def likely(b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with probabilities near 1, where their differences are seen, and NaN outside the mask."""
    b = dict(b)
    for name in ("logp", "logp_old", "logp_rollout"):
        b[name] = (b[name] + 4).clamp(max=-0.01).masked_fill(~b["mask"], math.nan)
    return b


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_each_correction_equals_its_formula(name, seed):
    b, cap = likely(batch(seed, B=12)), 1.6
    weight, limited = CORRECTIONS[name](*b.values(), is_cap=cap)
    free, _ = CORRECTIONS[name](*b.values(), is_cap=math.inf)
    inside = b["mask"].nonzero().tolist()
    expected = torch.tensor([correction_by_hand(name, b, i, t, cap) for i, t in inside], dtype=torch.float64)
    assert_equal(weight[b["mask"]], expected)
    changed = limited[b["mask"]]
    assert 0 < changed.double().mean() < 1  # the limit is reached, and not by all
    if "masked" not in name:
        assert torch.equal(changed, (weight != free)[b["mask"]])
    else:
        assert (weight[b["mask"]][changed] <= cap).all() and (weight[b["mask"]][changed] == 0).any()


def test_the_corrections_differ():
    b = likely(batch(B=12))
    weights = [CORRECTIONS[name](*b.values(), is_cap=1.6).weight[b["mask"]] for name in CORRECTIONS]
    assert not any(torch.equal(one, other) for i, one in enumerate(weights) for other in weights[:i])


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_gradient_with_each_correction_is_its_expectation_on_a_tabular_policy(name):
    """Every response is a row, weighted by its probability, once more through autograd of the loss."""
    mu_old = TabularPolicy.random(3, 4, seed=1)
    old = mu_old.moved(TabularPolicy.random(3, 4, seed=11).logits, 0.4)
    pi = TabularPolicy(old.moved(TabularPolicy.random(3, 4, seed=21).logits, 0.1).logits.requires_grad_(), 4)
    rewards = torch.randn(len(pi.tokens), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weighted = mu_old.response_probs() * rewards
    arguments = (pi.log_probs(), old.log_probs(), mu_old.log_probs(), weighted, pi.mask)
    loss = minirl_loss(*arguments, correction=name, is_cap=1.2, clip=False, num_responses=1).loss
    (grad,) = torch.autograd.grad(loss, pi.logits)
    b = dict(zip(batch(), (*(x.detach() for x in arguments[:3]), rewards, pi.mask), strict=True))
    weight = torch.zeros_like(b["logp"])
    for i, t in pi.mask.nonzero().tolist():
        weight[i, t] = correction_by_hand(name, b, i, t, 1.2)
    assert_equal(-grad, pi.score_sum(weight * weighted[:, None]).detach())


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_works_in_fp32_and_clamps_log_ratios(name):
    b = likely(batch(B=12))
    exact = CORRECTIONS[name](*b.values()).weight[b["mask"]]
    halved = {k: v if k == "mask" else v.bfloat16() for k, v in b.items()}
    weight = CORRECTIONS[name](*halved.values()).weight
    assert weight.dtype == torch.float32
    same = {k: v if k == "mask" else v.float() for k, v in halved.items()}
    assert torch.equal(weight[b["mask"]], CORRECTIONS[name](*same.values()).weight[b["mask"]])
    assert exact.dtype == torch.float64
    one, mask = torch.tensor([-1.0]), torch.ones(1, 2)
    far = (torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1e4, -1e4]]))
    large = CORRECTIONS[name](*far, one, mask, is_cap=math.inf).weight
    expected = 1.0 if name in ("none", "negative_masked") else math.exp(20)
    assert large.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_no_correction_is_the_ablations_other_name_and_an_unknown_one_is_refused():
    b = batch()
    without = minirl_loss(*b.values(), is_correction=False)
    assert minirl_loss(*b.values(), correction="none") == without
    assert minirl_loss(*b.values(), is_correction=False, correction="token_masked") == without
    assert minirl_loss(b["logp"], b["logp_old"], None, b["advantages"], b["mask"], correction="none") == without
    with pytest.raises(ValueError, match="correction is 'tis'; expected one of token_truncated, token_masked"):
        minirl_loss(*batch().values(), correction="tis")


@pytest.mark.parametrize("seed", range(3))
def test_grpo_equals_a_loop(seed):
    b = batch(seed)
    args = b["logp_old"], b["advantages"], b["mask"]
    loss, grad = value_and_grad(partial(grpo_loss, eps_low=0.1, eps_high=0.3), b["logp"], *args)

    logp = b["logp"].clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(b["mask"]):
        tokens = row.nonzero().flatten().tolist()
        for t in tokens:
            r, advantage = torch.exp(logp[i, t] - b["logp_old"][i, t]), b["advantages"][i]
            bound = 1.3 if advantage > 0 else 0.9
            clipped = r > bound if advantage > 0 else r < bound
            expected = expected - (bound if clipped else r) * advantage / len(tokens) / len(b["mask"])
    assert_equal(loss, expected.detach())
    assert_equal(grad, torch.autograd.grad(expected, logp)[0])


@pytest.mark.parametrize("seed", range(3))
def test_cispo_equals_a_loop(seed):
    b = batch(seed)
    args = b["logp_old"], b["advantages"], b["mask"]
    loss, grad = value_and_grad(partial(cispo_loss, eps_low=0.1, eps_high=0.3), b["logp"], *args)

    expected, expected_grad = 0.0, torch.zeros_like(grad)
    tokens = b["mask"].nonzero().tolist()
    for i, t in tokens:
        weight = min(max(math.exp(b["logp"][i, t] - b["logp_old"][i, t]), 0.9), 1.3)
        expected_grad[i, t] = -weight * b["advantages"][i] / len(tokens)
        expected += float(expected_grad[i, t] * b["logp"][i, t])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_equal(grad, expected_grad)
    assert (grad[b["mask"]] != 0).all()  # no token's gradient is dropped


def test_cispo_default_range_is_zero_to_five():
    ratio = torch.tensor([[1e-3, 1.0, 4.9, 50.0]], dtype=torch.float64)
    logp = torch.full((1, 4), -9.0, dtype=torch.float64)
    _, grad = value_and_grad(cispo_loss, logp, logp - ratio.log(), torch.ones(1).double(), torch.ones(1, 4))
    assert_equal(grad, -torch.tensor([[1e-3, 1.0, 4.9, 5.0]], dtype=torch.float64) / 4)


def losses(
    b: dict[str, Tensor], rows: slice = slice(None), num_responses: int | None = None, num_tokens: int | None = None
):
    """Each loss as a function of logp alone, on some of the rows; the divisors as a trainer passes them."""
    old, rollout, advantages, mask = (b[k][rows] for k in ("logp_old", "logp_rollout", "advantages", "mask"))
    n = num_responses
    return {
        "minirl": lambda logp: minirl_loss(logp, old, rollout, advantages, mask, num_responses=n),
        "minirl_length_norm": lambda logp: minirl_loss(
            logp, old, rollout, advantages, mask, length_norm=True, num_responses=n
        ),
        "grpo": lambda logp: grpo_loss(logp, old, advantages, mask, num_responses=n),
        "cispo": lambda logp: cispo_loss(logp, old, advantages, mask, num_tokens=num_tokens),
    }


LOSSES = list(losses(batch()))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name):
    b = batch(dtype=torch.float32, B=12)
    loss, grad = value_and_grad(losses(b)[name], b["logp"])
    parts = [slice(0, 1), slice(1, 5), slice(5, 6), slice(6, 12)]  # uneven; the first holds nothing but an empty row
    tokens = int(b["mask"].sum())
    split = [
        value_and_grad(losses(b, rows, num_responses=12, num_tokens=tokens)[name], b["logp"][rows]) for rows in parts
    ]
    # fp32: up to 60 terms of size ≲ 5 summed in another order, 60 · 5 · 6e-8.
    # A token's gradient is the same arithmetic.
    torch.testing.assert_close(sum(part for part, _ in split), loss, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat([part for _, part in split]), grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_what_stands_in_it_change_nothing(name):
    b = batch()
    loss, grad = value_and_grad(losses(b)[name], b["logp"])
    for poison in (math.nan, math.inf, -math.inf):
        tensors = ("logp", "logp_old", "logp_rollout")
        poisoned = {k: b[k].masked_fill(~b["mask"], poison) for k in tensors}
        advantages = torch.where(b["mask"], b["advantages"][:, None], poison)
        dirty = {**poisoned, "advantages": advantages, "mask": b["mask"].float()}
        dirty_loss, dirty_grad = value_and_grad(losses(dirty)[name], dirty["logp"])
        torch.testing.assert_close(dirty_loss, loss, rtol=0, atol=0)
        torch.testing.assert_close(dirty_grad, grad, rtol=0, atol=0)
        for key, value in losses(dirty)[name](dirty["logp"]).metrics.items():
            assert value == losses(b)[name](b["logp"]).metrics[key], key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logp", "logp_old", "logp_rollout", "advantages"])
def test_a_bad_value_inside_the_mask_is_named(name, value):
    b = batch()
    b[name][3] = value  # row 3 has three tokens
    for loss in ("minirl", "grpo", "cispo"):
        if loss != "minirl" and name == "logp_rollout":
            continue
        with pytest.raises(ValueError, match=rf"^{name} is {value} at response 3, token 0"):
            losses(b)[loss](b["logp"])


@pytest.mark.parametrize("name", ["logp", "logp_old", "logp_rollout"])
def test_probabilities_in_the_place_of_log_probabilities_are_refused_by_name(name):
    b = batch()
    b[name] = b[name].exp()
    for loss in ("minirl", "grpo", "cispo"):
        if loss != "minirl" and name == "logp_rollout":
            continue
        with pytest.raises(
            ValueError, match=rf"^{name} is 0\.\d+ at response 1, token 0; .*at most 0.*{name}\.log\(\)"
        ):
            losses(b)[loss](b["logp"])


def test_what_rounding_leaves_above_zero_and_what_is_masked_is_no_mistake():
    b = batch()
    b["logp_old"] = b["logp_old"].masked_fill(~b["mask"], 0.7)
    b["logp_rollout"] = b["logp_rollout"].clone()
    b["logp_rollout"][1, 0] = 5e-5
    b["advantages"] = b["advantages"].abs() + 1  # any number may be an advantage
    for loss in losses(b).values():
        loss(b["logp"])


@pytest.mark.parametrize("name", ["minirl", "grpo", "cispo"])
def test_the_checks_cost_one_transfer_from_the_device(name, monkeypatch):
    b, transfers = batch(), []
    for method in ("item", "tolist", "__bool__"):
        own = getattr(Tensor, method)
        monkeypatch.setattr(Tensor, method, lambda self, own=own: (transfers.append(1), own(self))[1])
    losses(b)[name](b["logp"])
    assert len(transfers) == 1


@pytest.mark.parametrize("name", ["logp_old", "logp_rollout", "advantages", "mask"])
def test_a_wrong_shape_is_named_with_both_shapes(name):
    b = batch()
    b[name] = torch.ones(5, 6)
    for loss in ("minirl", "grpo", "cispo"):
        if loss != "minirl" and name == "logp_rollout":
            continue
        with pytest.raises(ValueError, match=rf"{name} has shape \[5, 6\], logp has \[6, 5\]"):
            losses(b)[loss](b["logp"])


def test_flat_log_probs_and_a_missing_rollout_are_refused():
    b = batch()
    with pytest.raises(ValueError, match=r"logp has shape \[30\]"):
        grpo_loss(b["logp"].flatten(), b["logp_old"].flatten(), b["advantages"], b["mask"].flatten())
    with pytest.raises(ValueError, match="logp_rollout is None"):
        minirl_loss(b["logp"], b["logp_old"], None, b["advantages"], b["mask"])
    without = minirl_loss(b["logp"], b["logp_old"], None, b["advantages"], b["mask"], is_correction=False)
    assert without.loss == minirl_loss(*b.values(), is_correction=False).loss


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_from_is_zero_with_a_graph(name):
    b = batch()
    empty = {**b, "mask": torch.zeros_like(b["mask"])}
    equal_rewards = {**b, "advantages": group_mean_advantages(torch.full((6,), 0.7).double(), 3)}
    group_of_one = {**b, "advantages": group_mean_advantages(torch.rand(6).double(), 1)}
    for case in (empty, equal_rewards, group_of_one):
        loss, grad = value_and_grad(losses(case)[name], b["logp"])
        assert loss == 0 and grad.abs().max() == 0
    metrics = losses(empty)[name](b["logp"]).metrics
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("name", ["minirl", "minirl_length_norm", "grpo", "cispo"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_no_responses_and_no_tokens_are_zero_with_a_graph(name, shape):
    empty = torch.zeros(shape)
    b = {"logp": empty, "logp_old": empty, "logp_rollout": empty, "advantages": torch.ones(shape[0]), "mask": empty}
    loss, grad = value_and_grad(losses(b)[name], empty)
    assert loss == 0 and grad.shape == shape
    assert all(value == 0 for value in losses(b)[name](empty).metrics.values())


def test_an_empty_response_counts_in_the_divisor():
    b = batch()
    assert not b["mask"][0].any()
    rows = slice(1, None)
    for name in ("minirl", "minirl_length_norm", "grpo"):
        with_empty, without = losses(b)[name](b["logp"]).loss, losses(b, rows)[name](b["logp"][rows]).loss
        assert_equal(with_empty * 6, without * 5)
    with_empty, without = losses(b)["cispo"](b["logp"]).loss, losses(b, rows)["cispo"](b["logp"][rows]).loss
    assert_equal(with_empty, without)  # CISPO counts tokens


@pytest.mark.parametrize("name", LOSSES)
def test_advantages_may_be_given_per_token(name):
    b = batch()
    per_token = {**b, "advantages": b["advantages"][:, None].expand(6, 5)}
    assert losses(b)[name](b["logp"]).loss == losses(per_token)[name](b["logp"]).loss


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_comes_in_and_fp32_is_worked_in(name):
    b = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch().items()}
    loss = losses(b)[name](b["logp"]).loss
    assert loss.dtype == torch.float32
    exact = {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
    # bf16 arithmetic would be off by 1e-2; the inputs are exact in fp32.
    torch.testing.assert_close(loss.double(), losses(exact)[name](exact["logp"]).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_stay_finite(name):
    b = batch(dtype=torch.float32)
    b["logp"] -= 500
    b["logp_old"], b["logp_rollout"] = b["logp"] - 500, b["logp"] + 500
    loss, grad = value_and_grad(losses(b)[name], b["logp"])
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("is_correction", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_metrics_agree_with_a_count_and_say_what_a_clip_that_is_off_would_drop(clip, is_correction):
    b = batch(1)
    cap = 0.9  # below 1, the ratio that padding has: padding must not count as capped
    metrics = minirl_loss(*b.values(), clip=clip, is_correction=is_correction, is_cap=cap).metrics
    ratios = [(math.exp(b["logp"][i, t] - b["logp_old"][i, t]), i) for i, t in b["mask"].nonzero().tolist()]
    positive = sum(ratio > 1.27 and b["advantages"][i] > 0 for ratio, i in ratios) / len(ratios)
    negative = sum(ratio < 0.8 and b["advantages"][i] < 0 for ratio, i in ratios) / len(ratios)
    assert metrics["clip_frac_pos"].item() == pytest.approx(positive) and positive > 0
    assert metrics["clip_frac_neg"].item() == pytest.approx(negative) and negative > 0
    assert not any(value.requires_grad for value in metrics.values())

    denominator = b["logp_rollout"] if is_correction else b["logp_old"]
    weights = [math.exp(b["logp"][i, t] - denominator[i, t]) for i, t in b["mask"].nonzero().tolist()]
    assert metrics["is_capped_frac"].item() == pytest.approx(sum(w > cap for w in weights) / len(weights))
    assert metrics["is_weight_mean"].item() == pytest.approx(sum(min(w, cap) for w in weights) / len(weights))
    assert 0 < metrics["is_capped_frac"] < 1 and metrics["is_weight_max"] == cap


def test_grpo_and_cispo_metrics_say_what_each_algorithm_does():
    """Ratios 2 and 0.5 with Â > 0: GRPO drops the first token's gradient, CISPO shrinks its weight to 1.3."""
    logp = torch.full((1, 2), -1.0, dtype=torch.float64)
    args = logp - torch.tensor([[2.0, 0.5]]).log(), torch.ones(1).double(), torch.ones(1, 2)
    grpo = grpo_loss(logp, *args).metrics
    cispo = cispo_loss(logp, *args, eps_low=1.0, eps_high=0.3).metrics
    assert (grpo["clip_frac_pos"], grpo["is_capped_frac"], grpo["is_weight_max"].item()) == (0.5, 0, pytest.approx(2))
    assert (cispo["clip_frac_pos"], cispo["is_capped_frac"], cispo["is_weight_max"]) == (0, 0.5, 1.3)
    both = cispo_loss(logp, *args, eps_low=0.2, eps_high=0.3).metrics  # the lower bound is part of the weight, too
    assert (both["is_capped_frac"], both["is_weight_mean"].item()) == (1, pytest.approx((1.3 + 0.8) / 2))


def test_the_table_names_each_objective_with_its_own_advantages():
    assert {name: objective.loss for name, objective in OBJECTIVES.items()} == {
        "minirl": minirl_loss,
        "grpo": grpo_loss,
        "cispo": cispo_loss,
    }
    assert [OBJECTIVES[name].advantages for name in OBJECTIVES] == ["group_mean", "group_mean_std", "group_mean_std"]
    assert all(objective.advantages in ADVANTAGES for objective in OBJECTIVES.values())
