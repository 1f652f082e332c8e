"""The emulated formats are the real ones, and exactly the stated operands are rounded."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirl_edu.config import ConfigError, RolloutConfig
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.precision import (
    FORMATS,
    Precision,
    perturb_routers,
    products,
    quantise,
    round_activations,
    round_weights_,
)
from minirl_edu.rollout import HFEngine, make_engine
from minirl_edu.routing import RoutingReplay
from tests.families import families, tiny, walks

ROUNDED = [name for name in FORMATS if name != "fp32"]


def values(rows: int = 64, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-4, 2, rows)[:, None]  # rows of very different size
    return torch.randn(rows, columns, generator=generator) * spread


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)]
)
def test_float_grids_are_torchs_own_casts(fmt: str, dtype: torch.dtype):
    x, grid = values(), FORMATS[fmt]
    assert grid is not None
    scale = x.abs().amax(-1, keepdim=True) / grid.max_value if grid.scaled else 1.0
    # The same division, the same product: equal to the last bit, subnormals included.
    assert torch.equal(quantise(x, fmt), (x / scale).to(dtype).float() * scale)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids_are_symmetric_and_use_every_level(bits: int):
    x = torch.linspace(-1, 1, 4001)[None]
    assert quantise(x, f"int{bits}").unique().numel() == 2**bits - 1


def test_mxfp4_is_e2m1_with_a_power_of_two_per_block_of_32():
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = values(16, 64)
    blocks, rounded = x.unflatten(-1, (-1, 32)), quantise(x, "mxfp4").unflatten(-1, (-1, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    steps = (rounded / scale).abs()
    assert torch.isin(steps, grid).all()
    nearest = (blocks / scale).abs()[..., None].sub(grid).abs().amin(-1)
    # float32 division by a power of two is exact, so the distance is that of the nearest grid point
    torch.testing.assert_close((steps - (blocks / scale).abs()).abs(), nearest, rtol=0, atol=0)


def test_a_row_length_that_is_no_multiple_of_the_block_keeps_its_shape():
    assert quantise(values(4, 40), "mxfp4").shape == (4, 40)


@pytest.mark.parametrize("fmt", ROUNDED)
def test_stochastic_rounding_has_no_bias_and_lands_on_the_neighbours(fmt: str):
    x = torch.rand(8, 128, generator=torch.Generator().manual_seed(1)) * 0.9
    x.clamp_(max=0.75)  # 6/8 of a power of two: where mxfp4 saturates
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([quantise(x, fmt, generator) for _ in range(2000)])
    assert torch.equal(quantise(x, fmt, torch.Generator().manual_seed(2)), draws[0])  # the generator decides
    gap = (draws.amax(0) - draws.amin(0)).max()  # the widest pair of neighbours
    # A draw's standard deviation is at most half a gap: allow the mean of 2,000 five standard errors.
    bias = draws.mean(0) - x
    assert bias.abs().max() <= 5 * 0.5 * gap / 2000**0.5
    assert draws.sub(x).abs().max() <= gap * 1.0001  # never beyond a neighbour, but for the fp32 of the scale


@pytest.mark.parametrize("fmt", ROUNDED)
@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_zeros_stay_zeros(fmt: str, generator: torch.Generator | None):
    assert torch.equal(quantise(torch.zeros(3, 32), fmt, generator), torch.zeros(3, 32))


def test_fewer_bits_mean_more_error():
    x = values()
    errors = [(quantise(x, fmt) - x).abs().mean().item() for fmt in ("bf16", "int8", "int6", "int5", "int4", "int3")]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("spec", "weights", "activations"),
    [("fp8_e4m3", "fp8_e4m3", "fp8_e4m3"), ("int3/int4", "int3", "int4"), ("fp32/int8", "fp32", "int8")],
)
def test_parse(spec: str, weights: str, activations: str):
    precision = Precision.parse(spec, "stochastic", True, 0.3)
    assert precision == Precision(weights, activations, "stochastic", True, 0.3)


def test_a_third_format_is_that_of_the_routers():
    precision = Precision.parse("int3/fp32/int4")
    assert precision == Precision("int3", "fp32", router="int4")
    assert precision.of_routers == Precision("int4", "int4") and str(precision) == "int3/fp32 +router int4"
    assert Precision("int3", "int8").of_routers == Precision()
    assert Precision("int3", "int8", router=True).of_routers == Precision("int3", "int8")
    with pytest.raises(ValueError, match="'int8/int8/int4' gives the routers a format of their own"):
        Precision.parse("int8/int8/int4", router=True)


@pytest.mark.parametrize("spec", ["int1", "fp8", "", "int3/int4/int9", "int3/int4/int5/int6"])
def test_an_unknown_precision_names_the_choices(spec: str):
    with pytest.raises(ValueError, match="fp8_e4m3"):
        Precision.parse(spec)


def test_an_unknown_rounding_names_the_choices():
    with pytest.raises(ValueError, match="nearest, stochastic, frozen"):
        Precision.parse("int4", "up")


@pytest.mark.parametrize("router", [False, True, "int3"])
@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_weights_of_every_matmul_are_rounded_and_nothing_else(weights: str, router: bool | str):
    model, original = tiny_moe(18, seed=0), tiny_moe(18, seed=0)
    round_weights_(model, Precision(weights, "fp32", router=router))
    of_routers = router if isinstance(router, str) else weights if router else "fp32"
    for (name, rounded), exact in zip(model.named_parameters(), original.parameters(), strict=True):
        matmul = name.endswith(("_proj.weight", "gate_up_proj", "down_proj"))
        fmt = of_routers if "mlp.gate." in name else weights if matmul else "fp32"
        assert torch.equal(rounded, exact) == (fmt == "fp32"), name
        assert torch.equal(rounded, quantise(exact, fmt)), name


def test_stochastic_weights_need_a_generator():
    with pytest.raises(ValueError, match="generator"):
        round_weights_(tiny_dense(18, seed=0), Precision("int4", rounding="stochastic"))


def test_every_matmul_sees_rounded_inputs_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """Watches the products themselves: every linear and grouped product gets int4 inputs, router and head do not."""
    model = tiny_moe(18, seed=0)
    model.set_experts_implementation("grouped_mm")
    head, routers = model.lm_head.weight, {layer.mlp.gate.weight for layer in model.model.layers}
    seen: list[tuple[str, bool]] = []
    linear, grouped = nn.functional.linear, nn.functional.grouped_mm

    def levels(x: torch.Tensor) -> bool:
        # At most 15 levels a row (int4), zero included, whatever the row's scale.
        return all(row.unique().numel() <= 15 for row in x.flatten(0, -2).detach())

    def watch_linear(x, weight, *args, **kwargs):
        kind = "head" if weight is head else "router" if any(weight is r for r in routers) else "linear"
        seen.append((kind, levels(x)))
        return linear(x, weight, *args, **kwargs)

    def watch_grouped(x, *args, **kwargs):
        seen.append(("experts", levels(x)))
        return grouped(x, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "linear", watch_linear)
    monkeypatch.setattr(nn.functional, "grouped_mm", watch_grouped)
    tokens = torch.arange(24).view(2, 12) % 18
    before = model(input_ids=tokens).logits
    assert not any(rounded for _, rounded in seen)
    seen.clear()
    with round_activations(model, Precision("fp32", "int4")):
        model(input_ids=tokens)
    assert {kind for kind, _ in seen} == {"linear", "router", "experts", "head"}
    assert all(rounded == (kind in ("linear", "experts")) for kind, rounded in seen), seen
    assert sum(kind == "experts" for kind, _ in seen) == 2 * 2  # both products of both layers
    assert torch.equal(model(input_ids=tokens).logits, before)


def router_inputs(model: nn.Module, context: AbstractContextManager[None], tokens: Tensor) -> list[Tensor]:
    """What each router reads inside the context, once it was changed."""
    read: list[Tensor] = []
    with context, ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                hook = module.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone()))
                undo.callback(hook.remove)
        model(input_ids=tokens)
    return read


def test_a_format_of_the_routers_alone_leaves_every_other_input_as_it_is():
    model, tokens = tiny_moe(18, seed=0), torch.arange(24).view(2, 12) % 18
    exact = router_inputs(model, nullcontext(), tokens)
    rounded = router_inputs(model, round_activations(model, Precision(router="int3")), tokens)
    assert torch.equal(rounded[0], quantise(exact[0], "int3")) and not torch.equal(rounded[0], exact[0])
    weights = [p.clone() for p in model.parameters()]
    round_weights_(model, Precision(router="int3"))
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True)) == 2  # two layers'


def test_noise_on_the_routers_has_the_size_asked_for_and_reaches_nothing_else():
    model: Any = tiny_moe(18, seed=0, layers=1)
    tokens = torch.randint(0, 18, (64, 32), generator=torch.Generator().manual_seed(0))

    def noisy(seed: int) -> Tensor:
        return router_inputs(model, perturb_routers(model, 0.3, torch.Generator().manual_seed(seed)), tokens)[0]

    with torch.no_grad():
        before = model(input_ids=tokens).logits
        (exact,) = router_inputs(model, nullcontext(), tokens)
        noise = (noisy(1) - exact) / exact.pow(2).mean(-1, keepdim=True).sqrt()
        # 262,144 numbers: the standard errors of mean and deviation are 0.002 of σ. One layer, so that `exact` is what
        # the router would have read.
        assert abs(noise.mean()) < 0.003 and noise.std() == pytest.approx(0.3, abs=0.003)
        rows = noise.reshape(-1, noise.shape[-1])
        # A draw for each token: two tokens' have no correlation (128 numbers: a standard error of 0.09).
        assert abs(nn.functional.cosine_similarity(rows[:-1], rows[1:]).mean()) < 0.01
        assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
        assert torch.equal(model(input_ids=tokens).logits, before)
        # With the experts of the exact model the noisy one gives its numbers: nothing but the choice was disturbed.
        # (The gates' weights are: with one expert per token there is none.)
        one: Any = tiny_moe(18, seed=0, top_k=1)
        replay = RoutingReplay(one)
        with replay.record() as tape:
            logits = one(input_ids=tokens).logits
        with perturb_routers(one, 0.3, torch.Generator().manual_seed(0)), replay.replay(tape.routes):
            torch.testing.assert_close(one(input_ids=tokens).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan])
def test_noise_of_an_impossible_size_is_refused(sigma: float):
    with pytest.raises(ValueError, match=r"router_noise: .* at least 0"):
        Precision(router_noise=sigma)


def test_experts_whose_second_product_is_out_of_reach_are_refused():
    model = tiny_moe(18, seed=0)
    model.set_experts_implementation("eager")
    with (
        pytest.raises(ValueError, match="set_experts_implementation"),
        round_activations(model, Precision("fp32", "int4")),
    ):
        pass


# --------------------------------------------------------------------------------------------------- every family


class _Multiplied(TorchDispatchMode):
    """Notes each matrix product of a parameter: (its storage, the other operand, the parameter as [..., out, in]).

    A parameter is known by its storage, through views; copies (of some experts, of an embedding's rows) are followed.
    """

    FIRST: ClassVar = {"mm": 0, "bmm": 0, "mv": 0, "_grouped_mm": 0, "grouped_mm_fallback": 0, "addmm": 1, "baddbmm": 1}
    COPIES: ClassVar = {"clone", "_to_copy", "index", "index_select", "gather", "cat", "stack", "repeat", "embedding"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.origin = {storage(p): storage(p) for p in model.parameters()}
        self.found: list[tuple[int, Tensor, Tensor]] = []
        self.kept: list[Any] = []  # alive, so that no storage is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
        if name in self.FIRST:
            left, right = args[self.FIRST[name] :][:2]
            right = right if right.dim() > 1 else right[:, None]
            for weight, other in ((right.mT, left), (left, right.mT)):
                if (origin := self.origin.get(storage(weight))) is not None:
                    self.found.append((origin, other, weight))
                    break
        elif name in self.COPIES and isinstance(output, Tensor):
            inputs = (self.origin.get(storage(x)) for x in tree_leaves(args) if isinstance(x, Tensor))
            if origin := next((o for o in inputs if o is not None), None):
                self.origin[storage(output)] = origin
        self.kept.append(output)
        return output


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def few_levels(x: Tensor) -> bool:
    """At most 15 values in a row: int4, whatever the row's scale."""
    return all(row.unique().numel() <= 15 for row in x.flatten(0, -2))


def on_grid(weight: Tensor) -> bool:
    """Rounding to int4 once more, along the dimension that is summed over, changes nothing but the last bits."""
    return torch.allclose(quantise(weight.contiguous(), "int4"), weight, rtol=1e-5, atol=1e-7)


def refused_of(walked: Sequence[str]) -> set[str]:
    """Walks families; asserts of those that are not refused that exactly the stated operands are rounded."""
    refused = set()
    int4, tokens = Precision("int4", "int4"), torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    for family in walked:
        model = tiny(family)
        try:
            rounded = products(model, router=False)
        except ValueError as error:
            assert type(model).__name__ in str(error)
            refused.add(family)
            continue
        routers = {id(module) for module, _ in products(model, router=True)} - {id(module) for module, _ in rounded}
        routers = {storage(p) for module in model.modules() if id(module) in routers for p in module.parameters()}
        head = model.get_output_embeddings()
        assert head is not None, family
        names = {storage(p): f"{family}: {name}" for name, p in model.named_parameters()}
        exact = {storage(p): p.detach().clone() for p in model.parameters()}
        round_weights_(model, int4)
        changed = {storage(p) for p in model.parameters() if not torch.equal(p, exact[storage(p)])}
        if model._can_set_experts_implementation():
            model.set_experts_implementation("grouped_mm")
        with torch.no_grad(), round_activations(model, int4), _Multiplied(model) as multiplied:
            model(input_ids=tokens, use_cache=False)
        full = routers | {storage(head.weight)}
        missed = {origin for origin, _, _ in multiplied.found} - changed - full
        assert not missed, [names[origin] for origin in missed]
        assert not changed & full, [names[origin] for origin in changed & full]
        assert full & {origin for origin, _, _ in multiplied.found}, family
        for origin, other, weight in multiplied.found:
            if origin in changed:
                assert on_grid(weight) and few_levels(other), names[origin]
        config = model.config
        if any(getattr(config, field, None) for field in ("num_experts_per_tok", "num_experts_per_token", "moe_topk")):
            assert routers & {origin for origin, _, _ in multiplied.found}, f"{family}: its router was not seen"
            round_weights_(model, Precision("int4", router=True))
            same = {storage(p) for p in model.parameters() if torch.equal(p, exact[storage(p)])}
            assert not routers & same & {o for o, _, _ in multiplied.found}, f"{family}: a router was left out"
    return refused


@pytest.mark.slow
@walks
def test_every_weight_of_every_family_is_rounded_where_it_multiplies_or_the_family_is_refused(step: int):
    """What is refused multiplies by parameters of its own modules, in ways that are not known here."""
    walked = families()[::step]
    assert refused_of(walked) == set(walked) & {
        *("dbrx", "deepseek_v4", "doge", "hy_v4", "inkling_text", "jetmoe", "llama4_text", "longcat_flash"),
        *("recurrent_gemma", "xlnet", "zamba"),
    }


def test_gpt_2_is_rounded_too():
    """Its layers are no `nn.Linear` and store [in, out]: a scale for each output channel runs down a column."""
    model: Any = tiny("gpt2")
    exact: Any = tiny("gpt2")
    round_weights_(model, Precision("int3"))
    ours, theirs = (m.transformer.h[0].mlp.c_fc.weight for m in (model, exact))
    assert torch.equal(ours, quantise(theirs.mT.contiguous(), "int3").mT)
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight)


@pytest.mark.parametrize("precision", ["int4", "fp32/int4", "int4/fp32"])
def test_a_model_with_matrices_of_an_unknown_kind_is_refused_by_name(precision: str):
    with pytest.raises(ConfigError, match=r"rollout\.precision = .*JetMoeForCausalLM.*JetMoeParallelExperts\.weight"):
        make_engine(tiny("jetmoe"), RolloutConfig(precision=precision), seed=0, routes=False)
    make_engine(tiny("jetmoe"), RolloutConfig(precision="fp32"), seed=0, routes=False).close()


@pytest.mark.parametrize(
    "settings", [{"router_noise": 0.3, "precision": "fp32"}, {"precision": "fp32/fp32/int4"}], ids=str
)
def test_routers_that_a_model_or_an_engine_does_not_have_are_refused_by_name(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"rollout\.precision = .*Qwen3ForCausalLM has no router for fp32 \+router"):
        make_engine(tiny_dense(18, seed=0), RolloutConfig(**settings), seed=0, routes=False)
    make_engine(tiny_moe(18, seed=0), RolloutConfig(**settings), seed=0, routes=False).close()
    for engine in ("vllm", "vllm_server"):
        with pytest.raises(ConfigError, match=r"router_noise: engine 'vllm|rollout\.precision = .*: vLLM computes in"):
            make_engine(tiny_moe(18, seed=0), RolloutConfig(**settings, engine=engine), seed=0, routes=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_few_bits_is_rounded_and_nothing_else(tied):
    """The logits are those of the rounded states and the rounded weight; the embeddings stay what they are."""
    model = tiny_dense(18, seed=0, eos_token_id=17, pad_token_id=16)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())  # type: ignore[operator]
    tokens, precision = torch.arange(12).view(2, 6), Precision(head="int3")
    with torch.no_grad():
        states, embeddings = model.model(tokens).last_hidden_state, model.model.embed_tokens.weight.clone()
        expected = quantise(states, "int3") @ quantise(model.lm_head.weight, "int3").T
        engine = HFEngine(model, precision)
        copy = engine.model
        assert copy is not None
        for _ in range(2):  # a sync takes the weight of the trainer's head, not the rounded one
            engine.sync(model, version=1)
            with round_activations(copy, precision):
                torch.testing.assert_close(copy(tokens).logits, expected)
    assert torch.equal(copy.get_input_embeddings().weight, embeddings)  # type: ignore[operator]
    assert str(precision) == "fp32 +head int3"


def test_a_head_in_two_bits_with_stochastic_rounding_is_unbiased():
    head = nn.Linear(64, 8, bias=False)
    x, generator = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    drawn = torch.stack(
        [quantise(x, "int2", generator) @ quantise(head.weight.detach(), "int2", generator).T for _ in range(4000)]
    )
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - head(x)).abs() < 4.5 * error).all() and (error > 0).all()
