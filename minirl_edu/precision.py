"""Emulated low-precision inference engines: round weights and activations as a low-precision matmul would see them.

A rollout engine that multiplies in fp8 differs from a bf16 trainer because both operands of every matrix product are
rounded first. `round_weights_` and `round_activations` give any transformers model that behaviour on any hardware:
weights are rounded once per output channel, inputs of every linear layer and of both expert products once per token, as
in vLLM's dynamic fp8; sums stay fp32. Embeddings, norms, convolutions, attention scores and the output head stay in
full precision, as they do in deployed fp8 models; the routers too, unless asked. Routers and head may have formats of
their own. A model with other matrices is refused.

Rounding to nearest makes an engine repeat the same errors (a bias). Stochastic rounding's errors are zero on average.
"Frozen" rounding is stochastic with draws that an engine never renews: unbiased over weights, and yet the same errors
again and again.

`perturb_routers` stands for any error that reaches the routers alone, such as that of attention in few bits: it adds
noise to what they read. The engine then chooses other experts and computes with the exact ones.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Format(NamedTuple):
    """A grid: `mantissa_bits` after the leading one, exponents from `min_exponent`, magnitudes to `max_value`.

    `mantissa_bits=None` is a uniform grid of step 1 (integers). Values are scaled to the grid by row; with `block`,
    that many consecutive values by a power of two (the Open Compute Project's MX formats); `scaled=False`: not at all.
    """

    mantissa_bits: int | None
    min_exponent: int
    max_value: float
    block: int | None = None
    scaled: bool = True


FORMATS: dict[str, Format | None] = {
    "fp32": None,
    "bf16": Format(7, -126, torch.finfo(torch.bfloat16).max, scaled=False),
    "fp8_e4m3": Format(3, -6, 448.0),
    "fp8_e5m2": Format(2, -14, 57344.0),
    "mxfp4": Format(1, 0, 6.0, block=32),
    **{f"int{bits}": Format(None, 0, 2.0 ** (bits - 1) - 1) for bits in range(8, 1, -1)},
}


ROUNDINGS = ("nearest", "stochastic", "frozen")
"""How values reach the grid: see the top of this module."""


# Adding 1.5 · 2^23 steps to an fp32 number and taking them off again leaves it no bits below one step: the addition
# rounds, to nearest and ties to even. torch's own fp8 cast gives the same and is 3× slower.
_SHIFT = 1.5 * 2**23


def _to_grid(x: Tensor, grid: Format, generator: torch.Generator | None) -> Tensor:
    """Round fp32 values to the grid: to nearest (ties to even), or stochastically when a generator is given."""
    step = torch.ones((), device=x.device)
    if grid.mantissa_bits is not None:
        # The exponent bits alone are 2^e, the power of two at or below |x|.
        power = torch.bitwise_and(x.view(torch.int32), 0x7F800000).view(torch.float32)
        step = power.clamp_(min=2.0**grid.min_exponent).mul_(2.0**-grid.mantissa_bits)
    if generator is None:
        shift = step.mul_(_SHIFT)
        rounded = (x + shift).sub_(shift)
    else:
        rounded = (x / step + torch.rand(x.shape, generator=generator, device=x.device)).floor_().mul_(step)
    return rounded.clamp_(-grid.max_value, grid.max_value)


def quantise(
    x: Float[Tensor, "*rows n"], fmt: str, generator: torch.Generator | None = None
) -> Float[Tensor, "*rows n"]:
    """Round `x` to the format `fmt` and back: scale · grid(x / scale); a row's largest |x| goes to the grid's.

    `generator=None` rounds to nearest (ties to even); with a generator, up or down at random so that E[quantise(x)] = x
    (but for mxfp4's values beyond its largest, which saturate). Raises ValueError for an unknown format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"precision: unknown format {fmt!r}; choose one of {', '.join(FORMATS)}")
    grid = FORMATS[fmt]
    if grid is None:
        return x
    if not grid.scaled:
        if generator is None:
            return x.to(torch.bfloat16).to(x.dtype)
        return _to_grid(x.float(), grid, generator).to(x.dtype)
    values = x.float()
    if grid.block is not None:
        size = values.shape[-1]
        values = nn.functional.pad(values, (0, -size % grid.block)).unflatten(-1, (-1, grid.block))
        amax = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # The shared exponent is that of the largest value, less the grid's own largest exponent (2 for e2m1).
        largest = torch.frexp(torch.tensor(grid.max_value))[1]
        scale = torch.ldexp(torch.ones_like(amax), torch.frexp(amax)[1] - largest)
        return _to_grid(values / scale, grid, generator).mul_(scale).flatten(-2)[..., :size].to(x.dtype)
    scale = (
        values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * grid.max_value) / grid.max_value
    )
    return _to_grid(values / scale, grid, generator).mul_(scale).to(x.dtype)


@dataclass(frozen=True)
class Precision:
    """What the emulated engine rounds: `weights` and `activations` name a format of `FORMATS`.

    `router` is what the routers' product sees of it: False nothing, True the same, or a format of its own for both
    operands. `router_noise` is the standard deviation of the noise on the routers' inputs; see `perturb_routers`.
    `head` is the format of both operands of the output head's product.
    """

    weights: str = "fp32"
    activations: str = "fp32"
    rounding: str = "nearest"
    router: bool | str = False
    router_noise: float = 0.0
    head: str = "fp32"

    def __post_init__(self) -> None:
        for field in ("weights", "activations", "router", "head"):
            if (value := getattr(self, field)) not in FORMATS and not isinstance(value, bool):
                raise ValueError(f"precision: {field} format {value!r} is unknown; choose one of {', '.join(FORMATS)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: {self.rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
        if not 0 <= self.router_noise < math.inf:
            raise ValueError(f"router_noise: {self.router_noise} is no standard deviation; use a number of at least 0")

    @classmethod
    def parse(
        cls,
        spec: str,
        rounding: str = "nearest",
        router: bool = False,
        router_noise: float = 0.0,
        head: str = "fp32",
    ) -> "Precision":
        """`"fp8_e4m3"` for weights and activations alike, `"int3/int4"` for weights/activations, `"fp8/fp8/int4"` for
        weights/activations/routers. Raises ValueError."""
        weights, *rest = spec.split("/", 2)
        if len(rest) == 2 and router:
            raise ValueError(
                f"precision: {spec!r} gives the routers a format of their own; leave out the other setting"
            )
        own = rest[1] if len(rest) == 2 else router
        return cls(weights, rest[0] if rest else weights, rounding, own, router_noise, head)

    @property
    def of_routers(self) -> "Precision":
        """What the routers' products see, as `weights` and `activations`."""
        if isinstance(self.router, str):
            return Precision(self.router, self.router, self.rounding)
        return Precision(self.weights, self.activations, self.rounding) if self.router else Precision()

    def check(self, model: nn.Module) -> None:
        """Raises ValueError, naming the reason, for a model that cannot be emulated so."""
        if any({p.weights, p.activations} != {"fp32"} for p in (self, self.of_routers)):
            products(model, router=bool(self.router))
        if self.head != "fp32":
            _head(model)
        if (self.router_noise or isinstance(self.router, str)) and not _routers(model):
            name = "router_noise" if self.router_noise else "precision"
            raise ValueError(f"{name}: {type(model).__name__} has no router for {self}; train a Mixture of Experts")

    def __str__(self) -> str:
        name = self.weights if self.weights == self.activations else f"{self.weights}/{self.activations}"
        parts = [name, *([self.rounding] if self.rounding != "nearest" else [])]
        if self.router:
            parts.append("+router" if self.router is True else f"+router {self.router}")
        if self.head != "fp32":
            parts.append(f"+head {self.head}")
        return " ".join([*parts, *([f"+router noise {self.router_noise:g}"] if self.router_noise else [])])


# Only images and sounds pass through these.
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|multi_modal")
_ROUTER = re.compile(r"Router|TopKGating")
_NO_PRODUCT = re.compile(r"bias$|^A_log$")
"""Parameters of several dimensions that are added, or (the decay of a state-space model) taken elementwise."""


class Products(NamedTuple):
    """A module of a model and its weights that matrix products take: name → whether the last dimension is the output's,
    as in a [in, out] matrix, rather than the one that is summed over."""

    module: nn.Module
    weights: dict[str, bool]


def products(model: nn.Module, *, router: bool) -> list[Products]:
    """Every weight of the model's matrix products but the head's and, without `router`, the routers'.

    Known are linear layers, GPT-2's `Conv1D`, stacked experts of transformers and routers. Embeddings and convolutions
    are left out.
    Raises ValueError naming a weight of several dimensions for which it is not known how it is multiplied.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    routers = {part for router in _routers(model) for part in router.modules()}
    found = []
    for path, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        named = module.named_parameters(recurse=False)
        own = {name: p for name, p in named if p.dim() > 1 and not _NO_PRODUCT.search(name)}
        gpt2s = type(module).__name__ == "Conv1D"  # [in, out]
        if hasattr(module, "_apply_gate"):  # stacked experts of transformers: [E, out, in], in gpt-oss [E, in, out]
            weights = dict.fromkeys(own, bool(module.is_transposed))
        elif isinstance(module, nn.Linear) or module in routers or gpt2s:
            weights = dict.fromkeys(own, gpt2s)
        else:
            weights = {}
            if type(module).__name__ == "DogeCDMoE":  # multiplies by rows that it looks up in embeddings
                own |= {"up_embed": module.get_parameter("up_embed.weight")}
            for name, parameter in own.items():
                if parameter.squeeze().dim() > 1 and not _OTHER_SENSES.search(path):
                    raise ValueError(
                        f"{type(model).__name__} has {type(module).__name__}.{name} {list(parameter.shape)}, and how "
                        "that is multiplied is not known here: its low precision cannot be emulated; use fp32, or a "
                        "vLLM engine"
                    )
        if weights and (router or module not in routers):
            found.append(Products(module, weights))
    return found


def _routers(model: nn.Module) -> list[nn.Module]:
    """The modules that choose experts, in the order of the layers."""
    return [
        child
        for parent in model.modules()
        for name, child in parent.named_children()
        if _ROUTER.search(type(child).__name__) or (name in ("router", "gate") and hasattr(parent, "experts"))
    ]


def _head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: {type(model).__name__} has no linear output head")
    return head


def _embeddings(model: nn.Module) -> Tensor | None:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    return getattr(embeddings, "weight", None)


def _rounded_products(model: nn.Module, precision: Precision, operand: str) -> Iterator[tuple[Products, str]]:
    """Each of the model's `products` whose `operand` ("weights" or "activations") is rounded, and its format."""
    if precision.head != "fp32":
        yield Products(_head(model), {"weight": False}), precision.head
    common, of_routers = getattr(precision, operand), getattr(precision.of_routers, operand)
    if common == of_routers == "fp32":
        return
    routers = {part for router in _routers(model) for part in router.modules()}
    for found in products(model, router=of_routers != "fp32"):
        fmt = of_routers if found.module in routers else common
        if fmt != "fp32":
            yield found, fmt


@torch.no_grad()
def round_weights_(model: nn.Module, precision: Precision, generator: torch.Generator | None = None) -> None:
    """Round the matmul weights in place, one scale per output channel; stochastic rounding needs a generator. A head
    that shares the embeddings' weight gets one of its own.

    Raises ValueError for a model with other weights than `products` knows.
    """
    for (module, weights), fmt in _rounded_products(model, precision, "weights"):
        generator = _generator_for(precision, generator)
        for name, transposed in weights.items():
            # Scales run along the contracted dimension.
            weight = getattr(module, name)
            source = weight.mT if transposed else weight
            rounded = quantise(source.contiguous(), fmt, generator)
            if weight is _embeddings(model):
                module.weight = nn.Parameter(rounded, requires_grad=False)
                continue
            weight.copy_(rounded.mT if transposed else rounded)


def _generator_for(precision: Precision, generator: torch.Generator | None) -> torch.Generator | None:
    if precision.rounding == "nearest":
        return None
    if generator is None:
        raise ValueError("generator: stochastic rounding needs a torch.Generator; pass one, seeded")
    return generator


@contextmanager
def round_activations(
    model: nn.Module, precision: Precision, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Inside, the inputs of every linear layer and of both expert products are rounded, one scale per token.

    Raises ValueError if the model's experts run through an implementation of transformers whose second product's input
    cannot be reached (`grouped_mm` and `batched_mm` can).
    """
    rounded = list(_rounded_products(model, precision, "activations"))
    generator = _generator_for(precision, generator) if rounded else None
    last: tuple[Tensor, str, Tensor] | None = None  # an input, a format, the rounding: q, k and v read the same one

    def round_input(fmt: str) -> Callable[[nn.Module, tuple], tuple]:
        def hook(module: nn.Module, args: tuple) -> tuple:
            nonlocal last
            if last is None or last[0] is not args[0] or last[1] != fmt:
                last = (args[0], fmt, quantise(args[0], fmt, generator))
            return (last[2], *args[1:])

        return hook

    def round_gated(apply_gate: Callable[[Tensor], Tensor], fmt: str) -> Callable[[Tensor], Tensor]:
        return lambda x: quantise(apply_gate(x), fmt, generator)

    with ExitStack() as undo:
        for (module, _), fmt in rounded:
            undo.callback(module.register_forward_pre_hook(round_input(fmt)).remove)
            if hasattr(module, "_apply_gate"):
                implementation = getattr(module.config, "_experts_implementation", None)
                if implementation not in ("grouped_mm", "batched_mm"):
                    raise ValueError(
                        f"experts_implementation: {implementation!r} hides the input of the experts' second product; "
                        "call model.set_experts_implementation('grouped_mm')"
                    )
                undo.callback(vars(module).pop, "_apply_gate")
                vars(module)["_apply_gate"] = round_gated(module._apply_gate, fmt)  # type: ignore[arg-type]
        yield


@contextmanager
def perturb_routers(model: nn.Module, sigma: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, each router reads x + σ · rms(x) · ε instead of x, with ε standard normal, drawn anew for every token.

    rms(x) is the root of the mean square of a token's input. What the experts read stays x.
    """

    def perturb(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        rms = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        return (x + (sigma * rms * noise).to(x.dtype), *args[1:])

    with ExitStack() as undo:
        for router in _routers(model):
            undo.callback(router.register_forward_pre_hook(perturb).remove)
        yield
