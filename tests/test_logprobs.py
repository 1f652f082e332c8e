"""The training engine's forward: every layout gives what whole sequences one at a time give, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl_edu.logprobs import Layout, can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.objectives import minirl_loss
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes, RoutingReplay
from tests import routing_families
from tests.conftest import EOS, prompts
from tests.oracle import CLOSE, lively, naive, naive_routes, written

both = pytest.mark.parametrize("architecture", ["moe", "dense"])
layouts = pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])


def ragged(*, group_size: int = 3, left_padded: bool = True, groups: int = 3) -> Rollout:
    """Responses of 1 (EOS alone) to 9 tokens, of which some groups have none but the shortest."""
    asked = prompts(groups, lengths=(2, 7) if left_padded else (6, 6))
    lengths = [1 + (5 * row + row // 3) % 9 for row in range(groups * group_size)]
    lengths[:group_size] = [1] * group_size
    return written(asked, [[(3 * row + i) % 10 for i in range(n - 1)] + [EOS] for row, n in enumerate(lengths)])


CASES = {
    "left-padded": ragged(),
    "equal prompts": ragged(left_padded=False),
    "group of 1": ragged(group_size=1, groups=6),
    "only EOS": written(prompts(2, lengths=(2, 5)), [[EOS]] * 4),
}
every_case = pytest.mark.parametrize("case", CASES)


def weighted(values: Tensor) -> Tensor:
    """A scalar to whose gradient every token contributes differently."""
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(4))).sum()


def gradients(model: PreTrainedModel, scalar: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(scalar, parameters), strict=True))


def assert_equal_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert gradient.any(), name
        # A sum over up to 100 tokens in another order: errors are relative to the largest entry (seen: 4e-6 of it).
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=5e-5 * gradient.abs().max().item(), msg=name)


def recorded(model: PreTrainedModel, layout: Layout) -> Routes:
    with torch.no_grad(), RoutingReplay(model).record() as tape:
        response_logprobs(model, layout)
    return tape.routes


def any_routes(rollout: Rollout) -> Routes:
    """Random routes of 8 experts, top 2, on 2 layers; those of a prompt are the same in its group, as an engine's."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.rand(*rollout.tokens.shape, 2, 8, generator=generator).argsort(-1)[..., :2].to(torch.uint8)
    first = torch.arange(len(experts)) // rollout.group_size * rollout.group_size
    experts[:, : rollout.prompt_length] = experts[first, : rollout.prompt_length]
    return Routes(experts, rollout.inputs, (0, 1))


# ------------------------------------------------------------------------------------------ values and gradients


@both
@every_case
@layouts
def test_both_layouts_are_whole_sequences_one_at_a_time(architecture: str, case: str, share_prompts: bool):
    model, rollout = lively(architecture), CASES[case]
    logp, entropy = naive(model, rollout)
    output = response_logprobs(model, lay_out(rollout, share_prompts=share_prompts))
    assert (output.logp - logp).abs().max() <= CLOSE
    assert (output.entropy - entropy).abs().max() <= CLOSE
    assert_equal_gradients(gradients(model, weighted(output.logp)), gradients(model, weighted(logp)))


@layouts
def test_logits_are_divided_by_the_temperature(share_prompts: bool):
    model, rollout = lively("moe"), CASES["left-padded"]
    layout = lay_out(rollout, share_prompts=share_prompts)
    with torch.no_grad():
        logp, entropy = naive(model, rollout, 0.6)
        output = response_logprobs(model, layout, temperature=0.6)
        untempered = response_logprobs(model, layout)
    # Dividing by 0.6 magnifies the logits' rounding.
    assert (output.logp - logp).abs().max() <= 2 * CLOSE and (output.entropy - entropy).abs().max() <= 2 * CLOSE
    assert (output.logp - untempered.logp).abs().max() > 0.1


@both
@layouts
def test_bf16_models_differ_by_their_rounding_and_no_more(architecture: str, share_prompts: bool):
    model, rollout = lively(architecture).bfloat16(), CASES["left-padded"]
    with torch.no_grad():
        logp, entropy = naive(model, rollout)
        output = response_logprobs(model, lay_out(rollout, share_prompts=share_prompts))
    mask = rollout.response_mask
    assert output.logp.dtype == output.entropy.dtype == torch.float32
    # 8 bits on logits of size 4: a rounding is 0.016, several of them average to 0.01. A wrong mask or position moves
    # the mean by 0.5.
    assert (output.logp - logp)[mask].abs().mean() <= 0.03
    assert (output.entropy - entropy)[mask].abs().mean() <= 0.03


def test_only_logp_carries_a_gradient_and_only_on_response_tokens():
    rollout = CASES["left-padded"]
    model = lively("moe")
    logp, entropy = response_logprobs(model, lay_out(rollout, share_prompts=True))
    assert logp.requires_grad and not entropy.requires_grad
    masked = ~rollout.response_mask
    assert not logp[masked].any() and not entropy[masked].any()
    assert (logp[~masked] < 0).all() and (entropy[~masked] > 0).all()
    assert not any(g.any() for g in gradients(model, logp[masked].sum()).values())


def test_padding_on_the_right_alone_builds_no_attention_mask(monkeypatch: pytest.MonkeyPatch):
    """Without a mask torch's causal kernel runs; transformers builds one where positions do not go up by one."""
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **kwargs) -> Tensor:
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    response_logprobs(lively("dense"), lay_out(CASES["equal prompts"], share_prompts=False))
    assert len(masks) == 2 and all(mask is None for mask in masks)


# --------------------------------------------------------------------------------------------------- slots, routes


@every_case
def test_a_shared_layout_holds_each_prompt_once_and_each_input_once(case: str):
    rollout = CASES[case]
    size = rollout.group_size
    layout = lay_out(rollout, share_prompts=True)
    held = layout.source[layout.source >= 0]
    assert held.unique().numel() == held.numel()
    in_prompt = rollout.inputs.clone()
    in_prompt[:, rollout.prompt_length :] = False
    expected = in_prompt[::size].sum() + (rollout.inputs & ~in_prompt).sum()
    assert held.numel() == expected and layout.slots >= expected
    assert layout.slots <= lay_out(rollout, share_prompts=False).slots
    # source and slot are inverse: each input's slot holds that token (of the group's first row, in a prompt).
    tokens = layout.inputs["input_ids"]
    assert tokens is not None
    assert torch.equal(tokens.flatten()[layout.slot[rollout.inputs]], rollout.tokens[rollout.inputs])
    assert (layout.slot[~rollout.inputs] == -1).all()


@every_case
@layouts
def test_unpack_inverts_pack_on_inputs(case: str, share_prompts: bool):
    rollout = CASES[case]
    layout, routes = lay_out(rollout, share_prompts=share_prompts), any_routes(rollout)
    packed = layout.pack(routes)
    assert packed.valid.shape == layout.source.shape and torch.equal(packed.valid, layout.source >= 0)
    back = layout.unpack(packed)
    assert torch.equal(back.valid, rollout.inputs)
    assert torch.equal(back.experts[rollout.inputs], routes.experts[rollout.inputs])


def test_pack_keeps_missing_routes_missing():
    rollout = CASES["left-padded"]
    routes = any_routes(rollout)
    routes.valid[:, rollout.prompt_length] = False
    for share_prompts in (False, True):
        layout = lay_out(rollout, share_prompts=share_prompts)
        missing = layout.source[(layout.source >= 0) & ~layout.pack(routes).valid]
        expected = rollout.inputs.flatten() & ~routes.valid.flatten()
        assert missing.sort().values.tolist() == expected.nonzero()[:, 0].tolist() != []


@every_case
@layouts
def test_unpacked_recordings_are_the_routes_of_whole_sequences(case: str, share_prompts: bool):
    model, rollout = lively("moe"), CASES[case]
    layout = lay_out(rollout, share_prompts=share_prompts)
    unpacked = layout.unpack(recorded(model, layout))
    unpacked.validate(8)
    assert torch.equal(unpacked.valid, rollout.inputs)
    assert naive_routes(model, rollout).flip_rate(unpacked, rollout.inputs).max() == 0


@every_case
@layouts
def test_replaying_a_models_own_routes_changes_no_bit(case: str, share_prompts: bool):
    model, rollout = lively("moe"), CASES[case]
    layout = lay_out(rollout, share_prompts=share_prompts)
    native = response_logprobs(model, layout).logp
    with RoutingReplay(model).replay(layout.pack(layout.unpack(recorded(model, layout)))):
        replayed = response_logprobs(model, layout).logp
        ours = gradients(model, weighted(replayed))
    assert torch.equal(replayed, native)
    assert all(torch.equal(g, ours[name]) for name, g in gradients(model, weighted(native)).items())


@every_case
def test_replaying_foreign_routes_is_the_same_in_both_layouts(case: str):
    model, rollout = lively("moe"), CASES[case]
    routes, outputs = any_routes(rollout), []
    for share_prompts in (False, True):
        layout = lay_out(rollout, share_prompts=share_prompts)
        with RoutingReplay(model).replay(layout.pack(routes)):
            logp = response_logprobs(model, layout).logp
            outputs.append((logp, gradients(model, weighted(logp))))
    (plain, plain_gradients), (shared, shared_gradients) = outputs
    assert (plain - shared).abs().max() <= CLOSE
    assert_equal_gradients(shared_gradients, plain_gradients)
    assert (plain - naive(model, rollout)[0]).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------- micro-batches

MANY = ragged(groups=7, group_size=4)


@layouts
@pytest.mark.parametrize("budget", [1, 12, 20, 33, 60, 100, 10_000])
def test_micro_batches_cover_each_row_once_within_the_budget(share_prompts: bool, budget: int):
    batches = micro_batches(MANY, budget, share_prompts=share_prompts)
    assert torch.cat([rows for rows, _, _ in batches]).sort().values.tolist() == list(range(len(MANY.tokens)))
    for rows, part, layout in batches:
        assert part.responses == [MANY.responses[row] for row in rows]
        assert torch.equal(layout.mask, part.response_mask)
        assert layout.targets.tolist() == [token for response in part.responses for token in response]
        assert layout.slots <= budget or len(rows) == 1
    if share_prompts:
        size, fed = MANY.group_size, MANY.response_mask.sum(1) - 1
        torn = {int(row) // size for rows, part, _ in batches if part.group_size != size for row in rows}
        assert all(MANY.prompt_length + fed[g * size : (g + 1) * size].sum() > budget for g in torn)
    assert (len(batches) == 1) == (budget == 10_000)


def test_a_group_beyond_the_budget_is_laid_out_by_rows_and_the_others_stay_whole():
    short, long = [[1, EOS]] * 3, [[*range(8), EOS]] * 3
    rollout = written([[1, 2, 3]] * 3, [*short, *long, *short])  # 3 + 3·1 slots, 3 + 3·8, 3 + 3·1
    batches = micro_batches(rollout, 25, share_prompts=True)
    assert [rows.tolist() for rows, _, _ in batches] == [[0, 1, 2, 6, 7, 8], [3, 4], [5]]
    assert [layout.slots for _, _, layout in batches] == [12, 22, 11]


def test_micro_batches_are_not_cut_smaller_than_the_budget_asks():
    rollout = written([[1, 2, 3]] * 4, [[4, 5, EOS]] * 8)  # 7 slots a group when shared, 5 a row when not
    assert [layout.slots for _, _, layout in micro_batches(rollout, 14, share_prompts=True)] == [14, 14]
    assert [layout.slots for _, _, layout in micro_batches(rollout, 20, share_prompts=False)] == [20, 20]


@layouts
def test_micro_batches_hold_rows_of_like_length(share_prompts: bool):
    short, long = [[EOS]] * 2, [[*range(8), EOS]] * 2
    rollout = written([[1, 2, 3]] * 4, [*short, *long, *short, *long])
    batches = micro_batches(rollout, 44, share_prompts=share_prompts)
    assert [rows.tolist() for rows, _, _ in batches] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert sum(layout.slots for _, _, layout in batches) == sum(int((x.source >= 0).sum()) for _, _, x in batches)


@layouts
@pytest.mark.parametrize("budget", [20, 60])
def test_the_losses_of_micro_batches_add_up_to_that_of_the_batch(share_prompts: bool, budget: int):
    model = lively("moe")
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(MANY.tokens), generator=generator)
    noise = 0.1 * torch.randn(MANY.response_mask.shape, generator=generator)

    def loss(rows: Tensor, layout: Layout) -> Tensor:
        logp = response_logprobs(model, layout).logp
        reference = old[rows, : logp.shape[1]]
        kwargs = {"num_responses": len(MANY.tokens), "eps_low": 0.05, "eps_high": 0.05}
        return minirl_loss(logp, reference, reference, advantages[rows], layout.mask, **kwargs).loss

    with torch.no_grad():
        old = naive(model, MANY)[0] + noise
    everything = loss(torch.arange(len(MANY.tokens)), lay_out(MANY, share_prompts=False))
    batches = micro_batches(MANY, budget, share_prompts=share_prompts)
    assert len(batches) > 2
    parts = [loss(rows, layout) for rows, _, layout in batches]
    torch.testing.assert_close(sum(parts), everything, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(gradients(model, torch.stack(parts).sum()), gradients(model, everything))


# --------------------------------------------------------------------------------------- when prompts may be shared


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_attention_may_share_prompts(architecture: str, attention: str, dtype: torch.dtype):
    model = lively(architecture)
    nn.Module.to(model, dtype)
    model.set_attn_implementation(attention)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # tried in eval mode
    assert can_share_prompts(model)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [tiny_moe, tiny_dense])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_the_mask_may_not(make: Callable[..., PreTrainedModel], dtype: torch.dtype):
    """Not even a fresh one, whose outputs hardly depend on its context."""
    model = make(18, seed=0)
    nn.Module.to(model, dtype)
    forward = model.forward

    def without_mask(*args, attention_mask: Tensor | None = None, **kwargs):
        rows, columns = kwargs["input_ids"].shape
        causal = torch.zeros(rows, 1, columns, columns, dtype=dtype).masked_fill_(
            torch.ones(columns, columns, dtype=torch.bool).triu(1), torch.finfo(dtype).min
        )
        return forward(*args, attention_mask=causal, **kwargs)

    model.forward = without_mask
    assert not can_share_prompts(model)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_next", {}),
        ("qwen3_5_moe_text", {}),
        ("gpt_oss", {}),
        ("mixtral", {"sliding_window": 4}),
        ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}),
    ],
)
def test_linear_attention_and_sliding_windows_may_not(family: str, options: dict):
    assert not can_share_prompts(routing_families.build(family, **options))


def test_other_kinds_of_attention_may_not_even_where_the_probe_is_too_short_to_tell():
    model = lively("dense")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not can_share_prompts(model)


def test_a_model_that_refuses_the_mask_may_not():
    model = lively("dense")
    forward = model.forward

    def refusing(*args, attention_mask: Tensor | None = None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("this attention takes no 4-D mask")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.forward = refusing
    assert not can_share_prompts(model)
