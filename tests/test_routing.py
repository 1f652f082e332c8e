"""Routing replay: every family of transformers, thirteen of them in depth, routers it must refuse, and Table 1 of the
paper."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minirl_edu.routing import Routes, RoutingReplay, UnsupportedRouter
from tests.conftest import ROOT
from tests.families import families, tiny, walks
from tests.routing_families import FAMILIES, LEADING_DENSE, VOCABULARY, build

every_family = pytest.mark.parametrize("family", FAMILIES)
# One of each gate rule: softmax then gather, gather then softmax, sigmoid with a selection bias and groups.
three_families = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])

# Score function, renormalised over the selected experts, scale: each family's published gate, written independently.
GATES: dict[str, tuple[Callable[..., Tensor], bool, float]] = {
    "qwen3_moe": (torch.softmax, True, 1.0),
    "qwen2_moe": (torch.softmax, False, 1.0),
    "qwen3_next": (torch.softmax, True, 1.0),
    "qwen3_5_moe_text": (torch.softmax, True, 1.0),
    "mixtral": (torch.softmax, True, 1.0),
    "olmoe": (torch.softmax, False, 1.0),
    "flex_olmo": (torch.softmax, False, 1.0),
    "gpt_oss": (torch.softmax, True, 1.0),  # softmax over the selected logits is the same as renormalising
    "deepseek_v2": (torch.softmax, False, 1.0),
    "deepseek_v3": (lambda x, dim: x.sigmoid(), True, 2.5),
    "glm4_moe": (lambda x, dim: x.sigmoid(), True, 1.0),
    "glm4_moe_lite": (lambda x, dim: x.sigmoid(), True, 1.8),
    "minimax_m2": (lambda x, dim: x.sigmoid(), True, 1.0),
}


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def foreign_routes(replay: RoutingReplay, batch: int, length: int, seed: int = 1) -> Routes:
    """Uniformly random distinct experts: most are outside the live top-k."""
    order = torch.rand(
        batch, length, len(replay.layers), replay.num_experts, generator=torch.Generator().manual_seed(seed)
    )
    dtype = torch.uint8 if replay.num_experts <= 256 else torch.uint16
    experts = order.argsort(-1)[..., : replay.top_k].to(dtype)
    return Routes(experts, torch.ones(batch, length, dtype=torch.bool), replay.layers)


def recorded(replay: RoutingReplay, model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Routes:
    with torch.no_grad(), replay.record() as tape:
        logits(model, tokens, mask)
    return tape.routes


def logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """A scalar whose gradient differs for every logit."""
    out = logits(model, tokens)
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and any("gate" in name or "router" in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@contextmanager
def seen(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers really used, per MoE layer: the router's input and logits, and the arguments of its experts."""
    found: dict[str, list[Tensor]] = {"inputs": [], "router_logits": [], "experts": [], "weights": []}

    def router(module: nn.Module, args: tuple, output: tuple) -> None:
        found["inputs"].append(args[0].detach().flatten(0, -2))
        found["router_logits"].append(output[0])

    def experts(module: nn.Module, args: tuple) -> None:
        found["experts"].append(args[1])
        found["weights"].append(args[2])

    handles = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            handles.append(module.register_forward_hook(router))
        elif type(module).__name__.endswith("Experts"):
            handles.append(module.register_forward_pre_hook(experts))
    yield found
    for handle in handles:
        handle.remove()


def routers_of(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


# --- the thirteen families


# GraniteMoE's router returns its tuple in another order than the thirteen.
@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe"])
def test_replaying_a_models_own_routes_is_bit_identical(family: str) -> None:
    assert_replays(build(family))


def assert_replays(model: PreTrainedModel) -> None:
    """Logits and gradients under a model's own routes are its native ones, bit for bit."""
    replay, tokens = RoutingReplay(model), tokens_of(3, 7)
    routes = recorded(replay, model, tokens)
    routes.validate(replay.num_experts)
    native = logits(model, tokens)
    loss(model, tokens).backward()
    native_gradients = gradients(model)
    model.zero_grad()
    with replay.replay(routes):
        assert torch.equal(logits(model, tokens), native)
        loss(model, tokens).backward()
    assert_equal_gradients(gradients(model), native_gradients)


REFUSED = {
    *("afmoe", "dbrx", "doge", "gemma4_text", "hunyuan_v1_moe", "jamba", "jetmoe", "llama4_text", "longcat_flash"),
    *("phimoe", "zaya"),
}
"""Their routers are no …TopKRouter, or (LongCat-Flash, Phi-MoE) do not select by one top-k over the experts."""


@pytest.mark.slow
@walks
def test_every_family_of_experts_replays_bit_for_bit_or_is_refused_by_name(step: int) -> None:
    walked, exact, refused = families()[::step], set(), set()
    for family in walked:
        model = tiny(family)
        kinds = {type(module).__name__ for module in model.modules()}
        experts = any(re.search("Moe|MoE|Expert|Router", kind) for kind in kinds)
        try:
            assert_replays(model)
            replay, tokens = RoutingReplay(model), tokens_of(3, 7)
            with torch.no_grad(), replay.replay(foreign_routes(replay, 3, 7)):
                forced = logits(model, tokens)
            assert not torch.allclose(forced, logits(model, tokens), atol=1e-2), f"{family}: nothing was replayed"
            exact.add(family)
        except UnsupportedRouter as error:
            assert ("is dense" in str(error)) != experts, error
            assert any(kind in str(error) for kind in kinds)
            if experts:
                refused.add(family)
    assert exact and refused == REFUSED & set(walked)
    if step == 1:
        page = (ROOT / "lessons" / "site" / "modules.md").read_text(encoding="utf-8")
        said = f"{len(exact)} MoE families of transformers replay bit for bit, {len(refused)} are refused by name"
        assert said in page


@every_family
def test_foreign_routes_are_used_exactly_with_gates_from_the_live_logits(family: str) -> None:
    model, tokens = build(family), tokens_of(3, 7)
    replay = RoutingReplay(model)
    routes = foreign_routes(replay, 3, 7)
    with torch.no_grad(), replay.replay(routes), seen(model) as used:
        logits(model, tokens)
    score, normalised, scale = GATES[family]
    assert len(used["experts"]) == len(replay.layers)
    for i, router in enumerate(routers_of(model)):
        experts = routes.experts[:, :, i].flatten(0, 1).long()
        assert torch.equal(used["experts"][i], experts)
        router_logits = nn.functional.linear(used["inputs"][i].double(), *(p.double() for p in router.parameters()))
        gates = score(router_logits, dim=-1).gather(-1, experts)
        gates = gates / gates.sum(-1, keepdim=True) if normalised else gates
        # float32 against float64: a few units in the last place.
        torch.testing.assert_close(used["weights"][i].double(), gates * scale, rtol=2e-5, atol=1e-7)


@every_family
def test_experts_outside_the_live_top_k_still_pass_gradient_to_the_router(family: str) -> None:
    """The known failure: gates read from scores zeroed outside the live top-k are 0 there, and so is their gradient."""
    model, tokens = build(family), tokens_of(3, 7)
    replay = RoutingReplay(model)
    routes = foreign_routes(replay, 3, 7)
    with replay.replay(routes), seen(model) as used:
        loss(model, tokens).backward(retain_graph=True)
    weight = next(routers_of(model)[0].parameters())
    assert weight.grad is not None and weight.grad.abs().max() > 0
    # Layer 0 sees the same input with and without replay, so its live choice is the native one.
    experts = routes.experts[:, :, 0].flatten(0, 1).long()
    live = recorded(replay, model, tokens).experts[:, :, 0].flatten(0, 1).long()
    drifted = (experts[:, :, None] != live[:, None, :]).all(-1)
    assert drifted.sum() > 10
    weights, router_logits = used["weights"][0], used["router_logits"][0]
    naive = torch.zeros_like(router_logits).scatter(-1, live, 1.0) * router_logits.softmax(-1)
    assert (naive.gather(-1, experts)[drifted] == 0).all()
    assert (weights[drifted] > 0).all()
    for j in range(replay.top_k):
        (gradient,) = torch.autograd.grad(weights[:, j].sum(), router_logits, retain_graph=True)
        own = gradient.gather(-1, experts[:, j : j + 1])[:, 0]
        assert (own[drifted[:, j]] != 0).all()
        (naive_gradient,) = torch.autograd.grad(
            naive.gather(-1, experts)[drifted].sum(), router_logits, retain_graph=True
        )
        assert (naive_gradient == 0).all()


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_replayed_tokens(family: str, side: str) -> None:
    model, tokens, pads = build(family), tokens_of(2, 6), 3
    replay = RoutingReplay(model)
    routes = foreign_routes(replay, 2, 6)
    real = torch.arange(6 + pads) >= pads if side == "left" else torch.arange(6 + pads) < 6
    padded, mask = torch.zeros(2, 6 + pads, dtype=torch.long), real.expand(2, -1).long()
    padded[:, real] = tokens
    # Rows of padding are not valid, and hold ids that no router has.
    experts = torch.full((2, 6 + pads, len(replay.layers), replay.top_k), 255, dtype=torch.uint8)
    experts[:, real] = routes.experts
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with replay.replay(routes):
            expected = logits(model, tokens)
        with replay.replay(Routes(experts, mask.bool(), replay.layers)):
            padded_logits = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        with replay.record() as tape:
            model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)
    # Other shapes, so other summation orders in float32.
    torch.testing.assert_close(padded_logits[:, real], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(tape.routes.valid, mask.bool())


# --- gradient checkpointing


@three_families
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_checkpointing_replays_in_the_recomputation(
    family: str, use_reentrant: bool, dtype: torch.dtype
) -> None:
    model, tokens = build(family, dtype=dtype).train(), tokens_of(3, 7)
    replay = RoutingReplay(model)
    routes = foreign_routes(replay, 3, 7)
    with replay.replay(routes):
        loss(model, tokens).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with replay.replay(routes), seen(model) as used:
        loss(model, tokens).backward()
    assert len(used["router_logits"]) == 2 * len(replay.layers), "premise: every router ran twice"
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_leaving_replay_before_a_checkpointed_backward_is_refused(use_reentrant: bool) -> None:
    model, tokens = build("qwen3_moe").train(), tokens_of(3, 7)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss(model, tokens).backward()
    native = gradients(model)
    replay = RoutingReplay(model)
    with replay.replay(foreign_routes(replay, 3, 7)):
        value = loss(model, tokens)
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"backward\(\) inside"):
        value.backward()
    # Training without replay goes on as if nothing had been, in the model and in a copy made meanwhile.
    for trained in (model, copied):
        trained.zero_grad()
        loss(trained, tokens).backward()
        assert_equal_gradients(gradients(trained), native)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recording_ignores_the_recomputation(use_reentrant: bool) -> None:
    model, first, second = build("qwen3_moe").train(), tokens_of(3, 7), tokens_of(3, 7, seed=5)
    expected = [recorded(RoutingReplay(model), model, tokens) for tokens in (first, second)]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with RoutingReplay(model).record() as tape:
        (loss(model, first) + loss(model, second)).backward()
    assert torch.equal(tape.routes.experts, Routes.cat(expected, dim=1).experts)


# --- Table 1: how replay alters the target policy


@three_families
@pytest.mark.parametrize(
    ("source", "mini_batch", "altered"),
    [("R2", "first", False), ("R2", "later", True), ("R3", "first", True), ("R3", "later", True)],
)
def test_table_1(family: str, source: str, mini_batch: str, altered: bool) -> None:
    """R2: e^π_old = e^π in the first mini-batch, so the target policy is the natural one. All other cells alter it."""
    training, tokens = build(family), tokens_of(8, 24)
    rollout = copy.deepcopy(training)  # the engine: the same θ_old in a lower precision
    for parameter in rollout.parameters():
        parameter.data = parameter.data.bfloat16().float()
    replay = RoutingReplay(training)
    routes = recorded(replay, training, tokens) if source == "R2" else recorded(RoutingReplay(rollout), rollout, tokens)
    if mini_batch == "later":
        optimiser = torch.optim.AdamW(training.parameters(), lr=1e-3)
        loss(training, tokens).backward()
        optimiser.step()
    with torch.no_grad():
        natural = logits(training, tokens).log_softmax(-1)
        with replay.replay(routes):
            target = logits(training, tokens).log_softmax(-1)
    flips = routes.flip_rate(recorded(replay, training, tokens), routes.valid)
    assert bool(flips.any()) == altered, "premise: the routing shifted exactly in the cells that Table 1 says"
    assert torch.equal(target, natural) == (not altered)


# --- what a tape knows


def test_a_tape_joins_prefill_and_decoding_steps() -> None:
    model, tokens = build("qwen3_moe"), tokens_of(3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    replay = RoutingReplay(model)
    with torch.inference_mode(), replay.record() as tape:
        cache = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5]).past_key_values
        for t in (5, 6):
            model(input_ids=tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    routes = tape.routes
    whole = recorded(replay, model, tokens, mask)
    assert torch.equal(routes.valid, mask.bool()) and routes.experts.shape == (3, 7, 3, 2)
    assert routes.flip_rate(whole, routes.valid).sum() == 0
    with replay.replay(routes):  # recorded in inference mode, still fit for training
        loss(model, tokens).backward()


def test_rows_that_are_not_valid_are_routed_live() -> None:
    model, tokens = build("deepseek_v2"), tokens_of(3, 7)
    replay = RoutingReplay(model)
    foreign, native = foreign_routes(replay, 3, 7), recorded(replay, model, tokens)
    valid = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad(), replay.replay(Routes(foreign.experts, valid, replay.layers)), seen(model) as used:
        logits(model, tokens)
    expected = torch.where(valid[:, :, None], foreign.experts[:, :, 0], native.experts[:, :, 0])
    assert torch.equal(used["experts"][0].view(3, 7, 2), expected.long())
    with torch.no_grad(), replay.replay(Routes(foreign.experts, torch.zeros_like(valid), replay.layers)):
        replayed = logits(model, tokens)
    assert torch.equal(replayed, logits(model, tokens))


@pytest.mark.parametrize("through", ["inputs_embeds", "the decoder alone", "positional arguments"])
def test_shapes_are_read_however_the_model_is_called(through: str) -> None:
    model, tokens = build("qwen3_moe"), tokens_of(3, 7)
    mask = torch.tensor([0, 1, 1, 1, 1, 1, 1]).expand(3, -1)
    with torch.no_grad(), RoutingReplay(model).record() as tape:
        if through == "inputs_embeds":
            model(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask)
        elif through == "the decoder alone":
            model.model(input_ids=tokens, attention_mask=mask)
        else:
            model(tokens, mask)
    assert torch.equal(tape.routes.valid, mask.bool())
    assert torch.equal(tape.routes.experts, recorded(RoutingReplay(model), model, tokens, mask).experts)


@pytest.mark.parametrize("family", LEADING_DENSE)
def test_layers_carry_their_absolute_number(family: str) -> None:
    model = build(family)
    assert RoutingReplay(model).layers == (1, 2)
    assert RoutingReplay(model.model).layers == (1, 2)
    assert RoutingReplay(nn.ModuleDict({"module": model})).layers == (1, 2)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "dtype"), [(8, 1, torch.uint8), (256, 4, torch.uint8), (300, 4, torch.uint16)]
)
def test_top_1_and_many_experts(num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    model, tokens = build("olmoe", num_experts=num_experts, num_experts_per_tok=top_k), tokens_of(3, 7)
    replay = RoutingReplay(model)
    native = recorded(replay, model, tokens)
    native.validate(num_experts)
    assert native.experts.dtype == dtype
    with torch.no_grad(), replay.replay(native):
        assert torch.equal(logits(model, tokens), logits(model, tokens))
    foreign = foreign_routes(replay, 3, 7)
    foreign.validate(num_experts)
    assert foreign.experts.int().max() > num_experts * 0.7
    with torch.no_grad(), replay.replay(foreign), seen(model) as used:
        logits(model, tokens)
    assert torch.equal(torch.stack(used["experts"], 1).view(foreign.experts.shape), foreign.experts.long())


# --- the model is only borrowed


def test_the_model_is_untouched_outside_a_context() -> None:
    model, tokens = build("qwen3_moe"), tokens_of(3, 7)
    before = (list(model.state_dict()), [sorted(vars(router)) for router in routers_of(model)])
    replay = RoutingReplay(model)
    with pytest.raises(ZeroDivisionError), replay.record():
        raise ZeroDivisionError
    routes = recorded(replay, model, tokens)
    with replay.replay(routes):
        loss(model, tokens).backward()
    logits(model, tokens)
    assert (list(model.state_dict()), [sorted(vars(router)) for router in routers_of(model)]) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_that_someone_else_set_on_a_router_is_kept() -> None:
    model, tokens = build("qwen3_moe"), tokens_of(3, 7)
    router, calls = routers_of(model)[0], []
    native = router.forward
    router.forward = lambda hidden: calls.append(len(hidden)) or native(hidden)
    wrapped = router.forward
    replay = RoutingReplay(model)
    routes = recorded(replay, model, tokens)
    with torch.no_grad(), replay.replay(routes):
        logits(model, tokens)
    assert router.forward is wrapped and len(calls) == 2


def test_contexts_do_not_nest() -> None:
    replay = RoutingReplay(build("qwen3_moe"))
    with (
        replay.replay(foreign_routes(replay, 3, 7)),
        pytest.raises(RuntimeError, match=r"record\(\) inside replay\(\)"),
        replay.record(),
    ):
        pass


# --- refusals


def test_replay_refuses_another_shape_and_other_layers() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    routes = foreign_routes(replay, 3, 7)
    with pytest.raises(ValueError, match=r"\[3, 6\].*\[3, 7\]"), replay.replay(routes):
        logits(model, tokens_of(3, 6))
    with (
        pytest.raises(ValueError, match=r"layers \(1, 2, 3\)"),
        replay.replay(Routes(routes.experts, routes.valid, (1, 2, 3))),
    ):
        pass
    with (
        pytest.raises(ValueError, match="1 experts per token"),
        replay.replay(Routes(routes.experts[..., :1], routes.valid, (0, 1, 2))),
    ):
        pass


def test_an_empty_tape_is_refused() -> None:
    with RoutingReplay(build("qwen3_moe")).record() as tape:
        pass
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        _ = tape.routes


@pytest.mark.parametrize(
    ("family", "overrides", "named"),
    [
        ("llama", {}, "LlamaForCausalLM is dense"),
        ("qwen3", {}, "Qwen3ForCausalLM is dense"),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 32}, "Llama4Router"),
        ("jamba", {"num_experts": 4, "use_mamba_kernels": False}, "JambaSparseMoeBlock"),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2] * 3, "moe_intermediate_size": [16] * 3}, "HunYuanMoEV1"),
    ],
)
def test_models_without_a_known_router_are_refused(family: str, overrides: dict, named: str) -> None:
    with pytest.raises(UnsupportedRouter, match=named):
        RoutingReplay(build(family, **overrides))


@pytest.mark.parametrize("context", ["record", "replay"])
def test_a_router_that_does_not_select_by_one_top_k_is_refused(context: str) -> None:
    model = build("phimoe", num_local_experts=8)  # the right class name, but it selects by sparsemixer
    replay = RoutingReplay(model)
    opened = replay.record() if context == "record" else replay.replay(foreign_routes(replay, 3, 7))
    with pytest.raises(UnsupportedRouter, match=r"PhimoeTopKRouter of layer 0 .* 0 times"), opened:
        logits(model, tokens_of(3, 7))


def some_routes(top_k: int = 2, batch: int = 4, length: int = 20) -> Routes:
    order = torch.rand(batch, length, 3, 8, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return Routes(order[..., :top_k].to(torch.uint8), torch.ones(batch, length, dtype=torch.bool), (1, 2, 4))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("id", r"routes\[b=2, s=5, layer 4\] = \[\d, 8\] is out of range for 8 experts \(1 such rows"),
        ("twice", r"routes\[b=2, s=5, layer 2\] = \[3, 3\] names an expert twice"),
        ("zeros", r"routes\[b=0, s=1, layer 2\] = \[0, 0\] names an expert twice \(79 such rows"),
        ("empty", "no valid row"),
    ],
)
def test_validate_says_what_is_wrong_and_where(fault: str, message: str) -> None:
    routes = some_routes()
    experts, valid = routes.experts, routes.valid
    valid[0, 0] = False
    experts[0, 0] = 200  # not valid: not looked at
    routes.validate(8)
    if fault == "id":
        experts[2, 5, 2, 1] = 8
    elif fault == "twice":
        experts[2, 5, 1] = 3
    elif fault == "zeros":
        experts[:, :, 1] = 0
    else:
        valid[:] = False
    with pytest.raises(ValueError, match=message):
        routes.validate(8)


def test_validate_refuses_a_missing_top_1_layer_but_not_a_few_zeros() -> None:
    routes = some_routes(top_k=1)
    routes.validate(8)
    routes.experts[:, :, 1] = 0
    routes[:1].validate(8)  # 20 tokens: may be chance
    with pytest.raises(ValueError, match="layer 2 are expert 0 for all 80 valid tokens"):
        routes.validate(8)
    routes.experts[3, 7, 1] = 5
    routes.validate(8)


def test_malformed_routes_are_refused() -> None:
    experts, valid = some_routes().experts, some_routes().valid
    with pytest.raises(ValueError, match=r"torch\.int64"):
        Routes(experts.long(), valid, (1, 2, 4))
    with pytest.raises(ValueError, match=r"\[4, 20, 3\]"):
        Routes(experts[..., 0], valid, (1, 2, 4))
    with pytest.raises(ValueError, match=r"valid must be \[4, 20\].*got \[4, 19\]"):
        Routes(experts, valid[:, :-1], (1, 2, 4))
    with pytest.raises(ValueError, match=r"got \(1, 2\)"):
        Routes(experts, valid, (1, 2))
    with pytest.raises(ValueError, match=r"got \(2, 1, 4\)"):
        Routes(experts, valid, (2, 1, 4))
    with pytest.raises(ValueError, match=r"300 experts are stored as torch\.uint16"):
        Routes(experts, valid, (1, 2, 4)).validate(300)


# --- routes as data


def test_flip_rate_compares_sets_of_counted_tokens() -> None:
    a = some_routes()
    b = Routes(a.experts.flip(-1).clone(), a.valid.clone(), a.layers)
    mask = torch.ones_like(a.valid)
    assert a.flip_rate(b, mask).tolist() == [0, 0, 0]
    b.experts[0, :10, 1] = torch.tensor([6, 7], dtype=torch.uint8)
    a.experts[0, :10, 1] = torch.tensor([6, 5], dtype=torch.uint8)
    assert torch.equal(a.flip_rate(b, mask), torch.tensor([0, 10 / 80, 0]))
    b.valid[0, :5] = False
    mask[0, 5:8] = False
    assert torch.equal(a.flip_rate(b, mask), torch.tensor([0, 2 / 72, 0]))
    assert a.flip_rate(b, torch.zeros_like(mask)).isnan().all()
    with pytest.raises(ValueError, match="cannot compare"):
        a.flip_rate(b[:, :3], mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_routes_are_sliced_joined_padded_and_placed(dtype: torch.dtype) -> None:
    whole = some_routes()
    whole = Routes(whole.experts.to(dtype), whole.valid, whole.layers)
    assert whole.nbytes == 4 * 20 * (3 * 2 * dtype.itemsize + 1)
    steps = [whole[:, t : t + 1] for t in range(20)]
    for rebuilt in (Routes.cat(steps, dim=1), Routes.cat([whole[:1], whole[torch.tensor([1, 2, 3])]], dim=0)):
        assert torch.equal(rebuilt.experts, whole.experts) and torch.equal(rebuilt.valid, whole.valid)

    padded = whole.pad_to(22)
    assert torch.equal(padded.experts[:, :20], whole.experts) and padded.experts.shape[1] == 22
    assert padded.valid[:, :20].all() and not padded.valid[:, 20:].any()

    placed = whole[:2].at_rows(torch.tensor([4, 1]), size=5)
    assert torch.equal(placed.experts[[4, 1]], whole.experts[:2])
    assert placed.valid.any(-1).tolist() == [False, True, False, False, True]

    with pytest.raises(ValueError, match=r"20 rows to 19"):
        whole.pad_to(19)
    with pytest.raises(ValueError, match="same layers"):
        Routes.cat([whole, Routes(whole.experts, whole.valid, (0, 1, 2))], dim=0)
