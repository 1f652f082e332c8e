"""The training engine's forward: every layout gives what whole sequences one at a time give, values and gradients."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from minirl_edu import lm_head
from minirl_edu.diagnostics import entropy_from_logits
from minirl_edu.logprobs import Layout, can_pack, can_share_prompts, lay_out, micro_batches, response_logprobs
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.objectives import minirl_loss
from minirl_edu.packing import allow_packing
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes, RoutingReplay
from tests import routing_families
from tests.conftest import EOS, PAD, prompts
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


# -------------------------------------------------------------------------------------------------------- packed rows


def packing(architecture: str, **sizes: int) -> PreTrainedModel:
    model = lively(architecture, **sizes)
    allow_packing(model)
    return model


@both
@every_case
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_whole_sequences_one_at_a_time(architecture: str, case: str, checkpointing: bool):
    model, rollout = packing(architecture), CASES[case]
    logp, entropy = naive(model, rollout)
    expected = gradients(model, weighted(logp))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    layout = lay_out(rollout, share_prompts=False, pack=True)
    output = response_logprobs(model, layout)
    assert layout.slots == int(rollout.inputs.sum())  # no padding
    assert (output.logp - logp).abs().max() <= CLOSE
    assert (output.entropy - entropy).abs().max() <= CLOSE
    assert_equal_gradients(gradients(model, weighted(output.logp)), expected)


def test_a_model_that_allows_packing_computes_everything_else_as_before():
    rollout = CASES["left-padded"]
    for share_prompts in (False, True):
        layout = lay_out(rollout, share_prompts=share_prompts)
        before, after = (response_logprobs(model, layout).logp for model in (lively("moe"), packing("moe")))
        assert torch.equal(before, after)


def test_packed_rows_build_no_mask_and_attend_to_nothing_else(monkeypatch: pytest.MonkeyPatch):
    model, layout = packing("dense"), lay_out(CASES["left-padded"], share_prompts=False, pack=True)
    attend, seen = nn.functional.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query.shape[2], key.shape[2], kwargs["attn_mask"]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    response_logprobs(model, layout)
    lengths = CASES["left-padded"].inputs.sum(1).tolist()
    assert seen == [(length, length, None) for length in lengths] * model.config.num_hidden_layers


def test_a_model_that_was_not_prepared_gives_no_numbers_for_packed_rows():
    """Rather than wrong ones."""
    layout = lay_out(CASES["left-padded"], share_prompts=False, pack=True)
    assert response_logprobs(lively("dense"), layout).logp.isnan().any()


def test_routes_of_packed_rows_are_recorded_and_replayed():
    model, rollout = packing("moe"), CASES["left-padded"]
    layout, plain = lay_out(rollout, share_prompts=False, pack=True), lay_out(rollout, share_prompts=False)
    unpacked = layout.unpack(recorded(model, layout))
    assert naive_routes(model, rollout).flip_rate(unpacked, rollout.inputs).max() == 0
    routes, found = any_routes(rollout), []
    for one in (layout, plain):
        with RoutingReplay(model).replay(one.pack(routes)):
            logp = response_logprobs(model, one).logp
            found.append((logp, gradients(model, weighted(logp))))
    assert (found[0][0] - found[1][0]).abs().max() <= CLOSE
    assert_equal_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_full_attention_by_sdpa_may_pack(family: str, dtype: torch.dtype):
    model = routing_families.build(family)
    nn.Module.to(model, dtype)
    assert not can_pack(model)  # these are built with eager attention
    model.set_attn_implementation("sdpa")
    assert can_pack(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3_next", {}), ("gpt_oss", {}), ("mixtral", {"sliding_window": 4})]
)
def test_linear_attention_and_sliding_windows_may_not_pack(family: str, options: dict):
    model = routing_families.build(family, **options)
    if family != "gpt_oss":
        model.set_attn_implementation("sdpa")
    assert not can_pack(model)


def test_padding_that_all_rows_have_is_left_out_and_needs_no_mask():
    rollout = written([[1, 2, 3, 4, 5], [1, 2]], [[*range(8), EOS], [1, EOS], [3, 4, EOS], [EOS]])
    rows = lay_out(rollout.take(torch.tensor([2, 3])), share_prompts=False)  # prompts of two tokens, padded to five
    assert rows.inputs["attention_mask"] is None and tuple(rows.source.shape) == (2, 2 + 2)
    trimmed = rollout.take(torch.tensor([2, 3])).trimmed().validate()
    assert (trimmed.prompt_length, trimmed.response_mask.shape[1]) == (2, 3)
    model = lively("dense")
    logp = response_logprobs(model, rows).logp
    assert (logp - naive(model, rollout)[0][2:]).abs().max() <= CLOSE
    assert torch.equal(response_logprobs(model, lay_out(trimmed, share_prompts=False)).logp, logp[:, :3])


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


@pytest.mark.parametrize("share_prompts", [False, True])
def test_packed_micro_batches_are_full_and_their_losses_add_up(share_prompts: bool):
    """Groups that do not fit the budget are packed, the others share their prompts."""
    model, budget = packing("moe"), 25
    old = naive(model, MANY)[0].detach()
    advantages = torch.linspace(-1, 1, len(MANY.tokens))

    def loss(rows: Tensor, layout: Layout) -> Tensor:
        logp = response_logprobs(model, layout).logp
        reference = old[rows, : logp.shape[1]]
        return minirl_loss(logp, reference, reference, advantages[rows], layout.mask, num_responses=len(old)).loss

    batches = micro_batches(MANY, budget, share_prompts=share_prompts, pack=True)
    assert torch.cat([rows for rows, _, _ in batches]).sort().values.tolist() == list(range(len(MANY.tokens)))
    packed = [layout.slots for _, _, layout in batches if "segments" in layout.inputs]
    assert (len(packed) < len(batches)) == share_prompts
    assert max(packed) <= budget and len(packed) <= -(-sum(packed) // budget) + 1
    everything = loss(torch.arange(len(old)), lay_out(MANY, share_prompts=False))
    parts = torch.stack([loss(rows, layout) for rows, _, layout in batches]).sum()
    torch.testing.assert_close(parts, everything, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(gradients(model, parts), gradients(model, everything))


# ---------------------------------------------------------------------------------------- chunks through the head

VOCABULARY = 307  # prime: no width divides it


def wide(architecture: str = "dense", *, bias: bool = False, tied: bool = True) -> PreTrainedModel:
    """A lively model of many words and few hidden units."""
    make = {"moe": tiny_moe, "dense": tiny_dense}[architecture]
    model = make(VOCABULARY, seed=0, hidden=32, eos_token_id=EOS, pad_token_id=PAD)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
        if bias or not tied:
            head = nn.Linear(32, VOCABULARY, bias=bias)
            values = torch.randn(VOCABULARY, 33, generator=torch.Generator().manual_seed(3))
            head.weight.copy_(values[:, :-1] / 6)
            if bias:
                head.bias.copy_(values[:, -1])
            if tied:
                head.weight = model.get_input_embeddings().weight
            model.set_output_embeddings(head)
            model.config.tie_word_embeddings = tied
    return model.eval()


def wide_rollout() -> Rollout:
    """Prompts of two lengths, responses of 1 to 9 tokens from the whole vocabulary, first and last word included."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(VOCABULARY, (8, 9), generator=generator).tolist()
    drawn[1][:2] = [0, VOCABULARY - 1]
    return written([[1, 2, 300, 4], [5, 6]], [row[: 1 + 5 * i % 9] for i, row in enumerate(drawn)])


WIDE = wide_rollout()


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Chunks of a few words or tokens, and how often each path ran."""
    monkeypatch.setattr(lm_head, "CHUNK", 1000)
    seen = Counter()

    def watch(owner: object, name: str, path: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (seen.update([path]), function(*args, **kwargs))[1])

    watch(lm_head._HeadLogprobs, "apply", "by words")
    watch(lm_head, "checkpoint", "by tokens")
    return seen


def assert_naive(
    model: PreTrainedModel,
    *,
    rollout: Rollout = WIDE,
    temperature: float = 1.0,
    share_prompts: bool = False,
    close: float = CLOSE,
) -> None:
    """Values and gradients are those of whole sequences one at a time."""
    logp, entropy = naive(model, rollout, temperature)
    output = response_logprobs(model, lay_out(rollout, share_prompts=share_prompts), temperature=temperature)
    assert (output.logp - logp).abs().max() <= close
    assert (output.entropy - entropy).abs().max() <= close
    assert output.logp.requires_grad and not output.entropy.requires_grad
    assert_equal_gradients(gradients(model, weighted(output.logp)), gradients(model, weighted(logp)))


def head_inputs(tokens: int, dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden [n, 5], weight [23, 5], bias [23] and targets [n], for logits of size about 10."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight, of_words = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2.0).to(dtype).requires_grad_()
        for shape in ((tokens, 5), (23, 5), (23,))
    )
    return hidden, weight, of_words if bias else None, torch.randint(23, (tokens,), generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("width", [1, 7, 22, 23, 50])
@pytest.mark.parametrize("unknown", [(), (*range(9), 15, 22)], ids=["all words", "some words"])
def test_the_head_in_chunks_is_the_head_at_once(width: int, tokens: int, bias: bool, unknown: tuple[int, ...]):
    """`unknown` words, among them a whole first chunk of 7, have probability 0."""
    hidden, weight, of_words, targets = head_inputs(tokens, torch.float64, bias=bias)
    inputs = [x for x in (hidden, weight, of_words) if x is not None]
    known = [word for word in range(23) if word not in unknown]
    mask = torch.tensor([word in unknown for word in range(23)]) if unknown else None
    targets = torch.tensor(known)[targets % len(known)]
    logp, entropy = lm_head._HeadLogprobs.apply(hidden, weight, of_words, targets, 0.7, width, mask)
    logits = nn.functional.linear(hidden, weight, of_words)[:, known] / 0.7
    log_probs, targets = logits.log_softmax(-1), torch.tensor([known.index(word) for word in targets.tolist()])
    expected = log_probs[range(tokens), targets]
    # float64: the order of sums alone, at logits of size 10 about 1e-14.
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1), rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(weighted(scalar), inputs) for scalar in (logp, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for of_words in ours[1:]:  # weight and bias
        assert not of_words[list(unknown)].any()


def test_the_gradient_of_the_head_in_chunks_is_its_finite_difference():
    hidden, weight, bias, targets = head_inputs(4, torch.float64, bias=True)
    assert bias is not None
    in_chunks = lambda *x: lm_head._HeadLogprobs.apply(*x, targets, 0.7, 7, None)[0]  # noqa: E731
    assert torch.autograd.gradcheck(in_chunks, (hidden, weight, bias))


def test_a_forbidden_word_leaves_one_entropy_and_a_finite_gradient_in_every_path(monkeypatch: pytest.MonkeyPatch):
    """A logit of −∞ is a probability of 0, with no share in the entropy. The head's first chunk has nothing else."""
    hidden, weight = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (3, 6))
    bias, targets = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf, 0.0]), torch.tensor([2, 3, 5])
    expected = entropy_from_logits(torch.nn.functional.linear(hidden, weight, bias)).detach()
    assert expected.isfinite().all()

    def in_chunks(size: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(lm_head, "CHUNK", size)
        return lm_head._in_chunks(lambda h: torch.nn.functional.linear(h, weight, bias), hidden, targets, 1.0, 6, None)

    found = [in_chunks(2**22), in_chunks(6)]
    found += [lm_head._HeadLogprobs.apply(hidden, weight, bias, targets, 1.0, width, None) for width in (2, 6)]
    gradients = [torch.autograd.grad(logp.sum(), (hidden, weight)) for logp, _ in found]
    for (logp, entropy), gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(entropy, expected)
        torch.testing.assert_close((logp, *gradient), (found[0][0], *gradients[0]))
        assert all(g.isfinite().all() for g in gradient)


def test_entropies_near_zero_and_logits_far_from_it_are_exact_in_chunks():
    """Taken of z itself, not of z − max, log Σ exp z − Σ p·z would be off by the rounding of z: 2e-6 at 20."""
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.cat([weight[3:4] * 25, weight[30:31] * 3, torch.zeros(1, 8)])
    targets = torch.tensor([3, 30, 5])
    logp, entropy = lm_head._HeadLogprobs.apply(hidden, weight, None, targets, 1.0, 7, None)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    # The first token is certain, the second nearly, the last uniform. 1 + ε is rounded to 2⁻²⁴ before its logarithm.
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(logp.double(), exact[range(3), targets], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(dtype: torch.dtype):
    hidden, weight, _, targets = head_inputs(6, dtype, bias=False)

    def gradient(hidden: Tensor, weight: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            lm_head._HeadLogprobs.apply(hidden, weight, None, targets, 1.0, 7, None)[0].sum(), of
        )

    of_hidden, of_weight = gradient(hidden, weight, hidden, weight)
    assert of_hidden.dtype == of_weight.dtype == dtype
    assert torch.equal(of_hidden, gradient(hidden, weight.detach(), hidden)[0])
    assert torch.equal(of_weight, gradient(hidden.detach(), weight, weight)[0])


@both
@layouts
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_in_chunks_both_layouts_are_whole_sequences(
    architecture: str, share_prompts: bool, temperature: float, paths: Counter
):
    # Dividing by 0.6 magnifies the logits' rounding.
    close = CLOSE / temperature**2
    assert_naive(wide(architecture), share_prompts=share_prompts, temperature=temperature, close=close)
    assert paths == {"by words": 1}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_heads_of_every_kind_are_exact_in_chunks(tied: bool, bias: bool, paths: Counter):
    model = wide(bias=bias, tied=tied)
    assert len({id(p) for p in model.parameters()} & {id(model.lm_head.weight)}) == 1
    assert_naive(model)
    assert paths == {"by words": 1}


def test_one_response_token_is_exact_in_chunks(paths: Counter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm_head, "CHUNK", 100)
    assert_naive(wide(), rollout=written([[1, 2, 300]], [[290]]))
    assert paths == {"by words": 1}


PATHS = {"at once": {}, "by tokens": {"by tokens"}, "by words": {"by words"}}


def on_path(path: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A wide model whose log-probabilities go by this path."""
    model = wide(bias=True)
    if path == "at once":
        monkeypatch.setattr(lm_head, "CHUNK", 10**9)
    elif path == "by tokens":
        after_head(model, lambda logits: logits * 1)
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_suppressed_words_have_probability_0(
    path: str, temperature: float, paths: Counter, monkeypatch: pytest.MonkeyPatch
):
    model = on_path(path, monkeypatch)
    drawn = set(WIDE.tokens.flatten().tolist())
    unknown = [word for word in range(VOCABULARY) if word % 3 and word not in drawn]
    with torch.no_grad():  # else hardly anybody would notice
        model.get_output_embeddings().bias[unknown] += 3.0  # pyright: ignore[reportOptionalMemberAccess]
    before = response_logprobs(model, lay_out(WIDE, share_prompts=False), temperature=temperature)
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = unknown
    assert_naive(model, temperature=temperature)
    output = response_logprobs(model, lay_out(WIDE, share_prompts=False), temperature=temperature)
    assert (output.logp - before.logp).detach()[WIDE.response_mask].min() > 0.5
    assert set(paths) == set(PATHS[path])


@pytest.mark.parametrize("share_prompts", [False, True])
def test_few_logits_are_computed_at_once(share_prompts: bool, paths: Counter, monkeypatch: pytest.MonkeyPatch):
    layout = lay_out(WIDE, share_prompts=share_prompts)
    for slots, postponed, path in [
        (layout.slots, 0, {}),
        (layout.slots - 1, 1, {}),
        (len(layout.targets), 1, {}),
        (len(layout.targets) - 1, 1, {"by words": 1}),
    ]:
        monkeypatch.setattr(lm_head, "CHUNK", slots * VOCABULARY)
        with monkeypatch.context() as patch:
            seen: list[object] = []
            patch.setattr(lm_head, "_Trace", lambda *args, to=seen, make=lm_head._Trace: (to.append(1), make(*args))[1])
            response_logprobs(wide(), layout)
        assert len(seen) == postponed and paths == path


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_in_chunks_is_bf16_at_once(bias: bool, paths: Counter, monkeypatch: pytest.MonkeyPatch):
    model, layout = wide(bias=bias).bfloat16(), lay_out(WIDE, share_prompts=False)
    chunked = response_logprobs(model, layout)
    ours = gradients(model, weighted(chunked.logp))
    monkeypatch.setattr(lm_head, "CHUNK", 2**22)
    at_once = response_logprobs(model, layout)
    theirs = gradients(model, weighted(at_once.logp))
    assert paths == {"by words": 1} and chunked.logp.dtype == chunked.entropy.dtype == torch.float32
    # The logits of both are the same numbers in bf16, unless a product sums in another order: then some differ by a
    # rounding, 2⁻⁸ of up to 8.
    assert (chunked.logp - at_once.logp).abs().max() <= 0.04
    assert (chunked.logp - at_once.logp).abs().mean() <= 0.002
    for name, gradient in theirs.items():
        # Each of some 10 partial sums is rounded to 8 bits; and errors add up over two layers.
        assert (ours[name] - gradient).norm() <= 0.02 * gradient.norm() > 0, name


@both
def test_checkpointing_and_replay_change_nothing_in_chunks(architecture: str, paths: Counter):
    model, layout = wide(architecture), lay_out(WIDE, share_prompts=True)
    native = response_logprobs(model, layout).logp
    expected = gradients(model, weighted(native))
    model.gradient_checkpointing_enable()
    model.train()
    with contextlib.ExitStack() as contexts:
        if architecture == "moe":
            routes = recorded(model, layout)
            contexts.enter_context(RoutingReplay(model).replay(routes))
        logp = response_logprobs(model, layout).logp
        ours = gradients(model, weighted(logp))
    assert torch.equal(logp, native) and all(torch.equal(ours[name], expected[name]) for name in expected)
    assert set(paths) == {"by words"}


def test_recording_in_chunks_is_one_forward(paths: Counter):
    model, layout = wide("moe"), lay_out(WIDE, share_prompts=False)
    with RoutingReplay(model).record() as tape:
        weighted(response_logprobs(model, layout).logp).backward()
    assert tape.routes.valid.shape == layout.source.shape
    assert naive_routes(model, WIDE).flip_rate(layout.unpack(tape.routes), WIDE.inputs).max() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_without_gradients_the_values_are_the_same(mode: type, softcap: float | None, paths: Counter):
    model, layout = wide(), lay_out(WIDE, share_prompts=False)
    if softcap is not None:
        after_head(model, lambda logits: torch.tanh(logits / softcap) * softcap)
    expected = response_logprobs(model, layout)
    with mode():
        values = response_logprobs(model, layout)
    assert torch.equal(values.logp, expected.logp) and torch.equal(values.entropy, expected.entropy)
    assert not values.logp.requires_grad and paths


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_under_autocast_the_head_runs_in_bf16_and_gradients_arrive_in_fp32(capped: bool, paths: Counter):
    model, layout = wide(bias=True, tied=False), lay_out(WIDE, share_prompts=False)
    if capped:
        after_head(model, lambda logits: torch.tanh(logits / 9) * 9)
    expected, entropy = naive(model, WIDE)
    exact = gradients(model, weighted(expected))
    forward = model.forward

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = autocast  # as accelerate does
    output = response_logprobs(model, layout)
    ours = gradients(model, weighted(output.logp))
    assert set(paths) == {"by tokens" if capped else "by words"} and output.logp.dtype == torch.float32
    # bf16: see above.
    assert (output.logp - expected).abs().max() <= 0.2 and (output.entropy - entropy).abs().max() <= 0.2
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    if not capped:  # there, bf16 gradients of several chunks are added in fp32
        assert torch.equal(ours["lm_head.weight"], ours["lm_head.weight"].bfloat16().float())
    assert model.forward is autocast


# ------------------------------------------------------------------------- models that do more after, or in, the head


def after_head(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> None:
    """Make the model's forward apply `change` to its logits."""
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 3.0}),
        ("granitemoe", {"logits_scaling": 3.0, "num_local_experts": 4}),
        ("cohere", {"logit_scale": 0.3}),
        ("nanochat", {"final_logit_softcapping": 2.0}),
    ],
)
def test_families_that_cap_or_scale_their_logits_are_exact(family: str, options: dict, paths: Counter):
    model = routing_families.build(family, vocab_size=VOCABULARY, **options)
    assert_naive(model)
    assert set(paths) == {"by tokens"} and paths["by tokens"] > 5


@pytest.mark.parametrize("family", ["llama", "phi", "olmo2", "lfm2"])
def test_families_that_return_what_their_head_gives_go_by_words(family: str, paths: Counter):
    assert_naive(routing_families.build(family, vocab_size=VOCABULARY))
    assert paths == {"by words": 1}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda logits: logits.float(), "by words"),
        (lambda logits: logits[..., :301].float() / 3, "by tokens"),
        (lambda logits: logits.sub_(1).div_(torch.linspace(1, 3, VOCABULARY)), "by tokens"),
        (lambda logits: logits - logits.mean(-1, keepdim=True) * logits.sigmoid(), "by tokens"),
        (lambda logits: torch.stack(logits.chunk(1)).squeeze(0).contiguous() * 2, "by tokens"),
    ],
    ids=["float", "slice", "in place", "forked", "several results"],
)
def test_whatever_is_done_to_each_position_is_done(change: Callable, path: str, paths: Counter):
    model = wide()
    after_head(model, change)
    rollout = written([[1, 2, 300, 4], [5, 6]], [[7, 8, 9, 300], [0, 5]])
    assert_naive(model, rollout=rollout)
    assert set(paths) == {path}


def test_words_masked_by_assignment_are_masked(paths: Counter):
    def mask(logits: Tensor) -> Tensor:
        logits[..., 20:] = -1e4
        return logits

    model = wide()
    after_head(model, mask)
    rollout = written([[1, 2, 3, 4]], [[7, 8, 9, 10], [0, 5]])
    assert_naive(model, rollout=rollout)
    assert set(paths) == {"by tokens"}


def test_only_a_cast_to_fp32_is_done_without(paths: Counter):
    model = wide()
    after_head(model, lambda logits: logits.bfloat16())
    response_logprobs(model, lay_out(WIDE, share_prompts=False))
    assert set(paths) == {"by tokens"}


def test_a_learnt_scale_gets_its_gradient(paths: Counter):
    model = wide()
    scale = nn.Parameter(torch.tensor(0.4))
    model.register_parameter("scale", scale)
    after_head(model, lambda logits: logits * scale)
    assert_naive(model)
    assert set(paths) == {"by tokens"} and "scale" in dict(model.named_parameters())


def test_a_head_with_an_adapter_is_run_as_it_is(paths: Counter):
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.down, self.up = inner, nn.Linear(32, 2), nn.Linear(2, VOCABULARY)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden) + self.up(self.down(hidden))

    model = wide(tied=False)
    model.set_output_embeddings(Adapted(model.lm_head))
    assert_naive(model)
    assert set(paths) == {"by tokens"}


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_linear_head_that_does_something_else_is_run_as_it_is(how: str, paths: Counter):
    model = wide()
    head, forward = model.lm_head, model.lm_head.forward
    if how == "hook":
        head.register_forward_hook(lambda head, args, logits: logits / 2)
    else:
        head.forward = lambda hidden: forward(hidden) / 2
    assert_naive(model)
    assert set(paths) == {"by tokens"}


class Halved(Tensor):
    """A weight of a type of its own, as quantised ones are: its products are not those of its numbers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args) / 2


@torch.no_grad()
def test_a_weight_of_another_type_is_left_to_the_head(paths: Counter):
    model = wide(tied=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Halved))
    output = response_logprobs(model, lay_out(WIDE, share_prompts=False))
    assert (output.logp - naive(model, WIDE)[0]).abs().max() <= CLOSE
    assert set(paths) == {"by tokens"}


def test_a_model_that_goes_past_its_heads_forward_is_still_exact(paths: Counter):
    model = wide()
    decoder = model.model

    def forward(use_cache: bool, **inputs):
        hidden = decoder(use_cache=use_cache, **inputs).last_hidden_state
        logits: Any = nn.functional.linear(hidden, model.lm_head.weight)
        return CausalLMOutput(logits=logits)

    model.forward = forward
    assert_naive(model)
    assert set(paths) == {"by tokens"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: torch.cat([logits, logits], 1), "does not treat each position by itself"),
        (lambda logits: logits.flatten(0, 1)[None], "is invalid for input of size"),
    ],
    ids=["cat", "flatten"],
)
def test_positions_that_change_places_are_refused(change: Callable, message: str, paths: Counter):
    model = wide()
    after_head(model, change)
    with pytest.raises(RuntimeError, match=message):
        response_logprobs(model, lay_out(WIDE, share_prompts=False))


def test_several_calls_of_the_head_may_not_be_combined(paths: Counter):
    model = wide()
    after_head(model, lambda logits: logits + model.lm_head(logits.trace.hidden))  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="combines the logits of several calls of its head"):
        response_logprobs(model, lay_out(WIDE, share_prompts=False))


def test_a_model_without_a_head_is_refused():
    layout = lay_out(WIDE, share_prompts=False)
    for model in (nn.Linear(3, 4), wide().model):
        with pytest.raises(TypeError, match="holds no transformers model with a language-modelling head"):
            response_logprobs(model, layout)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, paths: Counter):
    model, layout = wide(), lay_out(WIDE, share_prompts=False)
    own = model.lm_head.forward = model.lm_head.forward  # an instance's own forward, as offloading hooks set
    before = model(**layout.inputs).logits
    if fails:
        after_head(model, lambda logits: torch.cat([logits, logits], 1))
        with pytest.raises(NotImplementedError):
            response_logprobs(model, layout)
        del model.forward
    else:
        response_logprobs(model, layout)
    assert model.lm_head.forward is own and "forward" not in vars(model)
    assert torch.equal(model(**layout.inputs).logits, before)


# ------------------------------------------------------------------------------------------------- memory, wrappers


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation inside returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not (leaf.is_meta or isinstance(leaf, lm_head._Postponed)):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_no_tensor_holds_all_logits(capped: bool, gradient: bool, monkeypatch: pytest.MonkeyPatch):
    """Deterministic, where a process's peak is not."""
    model = tiny_dense(2003, seed=0, layers=1, hidden=32)
    layout = lay_out(written([[1, 2, 3]] * 4, [[5] * 20] * 16), share_prompts=False)
    if capped:
        after_head(model, lambda logits: logits.tanh())

    def largest(chunk: int) -> int:
        monkeypatch.setattr(lm_head, "CHUNK", chunk)
        with torch.set_grad_enabled(gradient), Largest() as seen:
            logp = response_logprobs(model, layout).logp
            if gradient:
                logp.sum().backward()
        return seen.elements

    all_logits = len(layout.targets) * 2003
    assert len(layout.targets) == 320 and largest(2**22) >= all_logits
    # The weights and their gradient take 2003 · 32 = 64,096, activations 352 · 256, chunks of logits what they may.
    assert largest(100_000) <= 100_000 < all_logits / 6


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model: PreTrainedModel) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: PreTrainedModel) -> nn.Module:
    """Weights are freed after the forward and gathered again by hooks on its output, which is cast to bf16."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(
        model, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16), reshard_after_forward=True
    )
    return model


@pytest.mark.parametrize("wrap", [distributed, sharded])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_wrapped_models_give_the_same_to_the_bit(wrap: Callable, capped: bool, paths: Counter, one_process: None):
    model, layout = wide(), lay_out(WIDE, share_prompts=False)
    if capped:
        after_head(model, lambda logits: torch.tanh(logits / 3) * 3)
    expected = response_logprobs(model, layout)
    exact = gradients(model, weighted(expected.logp))
    wrapped = wrap(model)
    output = response_logprobs(wrapped, layout)
    weighted(output.logp).backward()
    assert torch.equal(output.logp, expected.logp) and torch.equal(output.entropy, expected.entropy)
    for name, parameter in wrapped.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert torch.equal(gradient, exact[name.removeprefix("module.")]), name
    assert set(paths) == {"by tokens" if capped else "by words"}


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
