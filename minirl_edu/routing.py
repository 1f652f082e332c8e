"""Routing replay: record which experts a mixture-of-experts model chose, and make it choose them again.

R2 replays what the training engine routed at θ_old, R3 what the rollout engine routed (Table 1 of arXiv 2512.01374).
Only the discrete *selection* is replayed: the gate weights are recomputed from the live router logits of the selected
experts, so the router still learns.

    replay = RoutingReplay(model)
    with replay.record() as tape:
        model(input_ids=tokens, attention_mask=mask)
    with replay.replay(tape.routes):
        loss = f(model(input_ids=tokens, attention_mask=mask))
        loss.backward()                     # inside: gradient checkpointing runs the forward again

How: while a context is open, each router's forward runs under a `TorchFunctionMode` that watches for its one top-k over
experts and, in replay, answers it with `(scores.gather(routes), routes)`. Everything else (softmax or sigmoid, biases,
renormalisation, scaling) is the model's own code: no family's formula is repeated here.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Routes", "RoutingReplay", "Tape", "UnsupportedRouter"]

_ROUTER = re.compile(r"Top[kK]Router$")
_OTHER_MOE = re.compile(r"Router$|TopKGating$|Moe\w*Block$|MoE$|Experts$")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOPK = (torch.topk, Tensor.topk)
_MASKED_FILL = (torch.masked_fill, Tensor.masked_fill)
_ENOUGH_TOKENS = 64


class UnsupportedRouter(ValueError):
    """The model is dense, or its routers cannot be recorded and replayed. The message names the class found."""


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts chosen for each token, as an input, at each MoE layer.

    Row `t` is the routing of token `t` when it is *fed* to the model, so S tokens of a sequence need S−1 rows: where
    the last one was never fed, its `valid` is False. Rows that are not valid mean nothing: replay routes them live.

    Attributes:
        experts: `[B, S, L, k]`, uint8, or uint16 above 256 experts. The order of the k experts is not significant.
        valid: `[B, S]` bool.
        layers: the L absolute decoder-layer numbers, ascending: leading dense layers leave a gap.

    Raises:
        ValueError: a shape or dtype that is not the above.
    """

    experts: Tensor
    valid: Tensor
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        shape, valid_shape = list(self.experts.shape), list(self.valid.shape)
        if len(shape) != 4 or self.experts.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"experts must be [B, S, L, k], uint8 or uint16, got {shape}, {self.experts.dtype}")
        if valid_shape != shape[:2] or self.valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be {shape[:2]}, bool, since experts are {shape}; got {valid_shape}, {self.valid.dtype}"
            )
        if len(self.layers) != shape[2] or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be {shape[2]} ascending numbers, as experts are {shape}, got {self.layers}")

    @property
    def nbytes(self) -> int:
        """Size in bytes: B·S·(L·k·itemsize + 1)."""
        return self.experts.nbytes + self.valid.nbytes

    def __getitem__(self, index: Any) -> "Routes":
        """Index both tensors alike, keeping `[B, S]` in front: `routes[rows]`, `routes[:, start:stop]`."""
        return Routes(self.experts[index], self.valid[index], self.layers)

    def to(self, device: torch.device | str) -> "Routes":
        """The same routes on `device`."""
        return Routes(self.experts.to(device), self.valid.to(device), self.layers)

    @staticmethod
    def cat(parts: Sequence["Routes"], dim: int) -> "Routes":
        """Join along the batch (`dim=0`) or along the sequence (`dim=1`, for example one part per decoding step)."""
        if len({part.layers for part in parts}) != 1:
            raise ValueError(f"routes to join must cover the same layers, got {[part.layers for part in parts]}")
        experts = torch.cat([part.experts for part in parts], dim)
        return Routes(experts, torch.cat([part.valid for part in parts], dim), parts[0].layers)

    def pad_to(self, length: int) -> "Routes":
        """Append rows that are not valid until S = `length`: an engine's S−1 rows become the S columns of a forward."""
        missing = length - self.valid.shape[1]
        if missing < 0:
            raise ValueError(f"cannot pad {self.valid.shape[1]} rows to {length}: cut them with routes[:, :{length}]")
        experts = nn.functional.pad(self.experts, (0, 0, 0, 0, 0, missing))
        return Routes(experts, nn.functional.pad(self.valid, (0, missing)), self.layers)

    def at_rows(self, rows: Int[Tensor, "b"], size: int) -> "Routes":
        """Place the b sequences at `rows` of a batch of `size`; the other rows are not valid.

        For an engine that stops feeding finished sequences: bring each step back to the whole batch, then `cat`.
        """
        source = torch.zeros(size, dtype=torch.int64, device=self.valid.device)
        fed = torch.zeros(size, dtype=torch.bool, device=self.valid.device)
        source[rows] = torch.arange(len(rows), device=self.valid.device)
        fed[rows] = True
        # A gather by row, not a scatter: torch has no index_put for uint16.
        return Routes(self.experts[source], self.valid[source] & fed[:, None], self.layers)

    def validate(self, num_experts: int) -> None:
        """Refuse routes that no router with `num_experts` experts could have chosen.

        With k > 1, rows that were zero-filled instead of recorded name expert 0 twice and are refused as such. With
        k = 1 expert 0 is a legitimate choice, so a layer is refused only if it is 0 for *every* valid token and there
        are at least 64: fewer may be chance, and a router that sends so many to one expert has collapsed.

        Raises:
            ValueError: the wrong dtype for `num_experts`; no valid row; in a valid row an id out of range or an expert
                named twice; a layer of zeros. The message says where.
        """
        dtype = _expert_dtype(num_experts)
        if self.experts.dtype != dtype:
            raise ValueError(f"routes over {num_experts} experts are stored as {dtype}, got {self.experts.dtype}")
        if not self.valid.any():
            raise ValueError("routes have no valid row: the engine returned none. Turn its recording on, or replay off")
        for i, layer in enumerate(self.layers):
            rows = self._layer(i, self.valid)
            self._refuse((rows >= num_experts).any(-1), i, f"is out of range for {num_experts} experts")
            self._refuse((rows.diff(dim=-1) == 0).any(-1), i, "names an expert twice")
            top_1 = rows.shape[1] == 1 and num_experts > 1
            if top_1 and len(rows) >= _ENOUGH_TOKENS and not rows.any():
                raise ValueError(f"routes at layer {layer} are expert 0 for all {len(rows)} valid tokens: not recorded")

    def flip_rate(self, other: "Routes", mask: Bool[Tensor, "..."]) -> Float[Tensor, "L"]:
        """Per layer, the fraction of tokens whose *set* of experts differs: mean over tokens of `1[e_t ≠ e'_t]`.

        Counts tokens where `mask` `[B, S]` and both `valid` are True; NaN if there are none. Sets, because engines
        differ in the order of a top-k.
        """
        if self.layers != other.layers or self.experts.shape != other.experts.shape or mask.shape != self.valid.shape:
            raise ValueError(
                f"cannot compare routes of {list(self.experts.shape)} at layers {self.layers} with "
                f"{list(other.experts.shape)} at layers {other.layers} under a mask of {list(mask.shape)}"
            )
        counted = mask & self.valid & other.valid
        flips = [(self._layer(i, counted) != other._layer(i, counted)).any(-1) for i in range(len(self.layers))]
        return torch.stack([layer.float().mean() for layer in flips])

    def _layer(self, i: int, rows: Bool[Tensor, "B S"]) -> Int[Tensor, "n k"]:
        """The experts of the chosen rows at the i-th layer, sorted; int32, as torch can hardly compute with uint16.

        One layer at a time keeps the wide copy small beside the compact routes.
        """
        return self.experts[:, :, i][rows].int().sort(-1).values

    def _refuse(self, bad: Bool[Tensor, "n"], i: int, fault: str) -> None:
        if bad.any():
            b, s = self.valid.nonzero()[bad.nonzero()[0, 0]].tolist()
            raise ValueError(
                f"routes[b={b}, s={s}, layer {self.layers[i]}] = {self.experts[b, s, i].tolist()} {fault} "
                f"({int(bad.sum())} such rows at this layer)"
            )


class Tape:
    """What `RoutingReplay.record` yields: the raw choices, turned into `Routes` when asked."""

    def __init__(self, layers: tuple[int, ...], num_experts: int) -> None:
        self._layers = layers
        self._num_experts = num_experts
        self._forwards: list[tuple[Bool[Tensor, "B S"], list[Tensor | None]]] = []

    @property
    def routes(self) -> Routes:
        """All forwards recorded so far, joined along S (prefill, then decoding steps of the same B).

        Raises:
            RuntimeError: no forward ran inside the context, or one ran without some of the MoE layers.
        """
        if not self._forwards:
            raise RuntimeError("nothing was recorded: call the model inside `with replay.record() as tape:`")
        return Routes.cat([self._routes_of(*forward) for forward in self._forwards], dim=1)

    def _routes_of(self, valid: Bool[Tensor, "B S"], chosen: list[Tensor | None]) -> Routes:
        recorded = [experts for experts in chosen if experts is not None]
        if len(recorded) < len(chosen):
            missing = [layer for layer, experts in zip(self._layers, chosen, strict=True) if experts is None]
            raise RuntimeError(f"the routers of layers {missing} did not run in a recorded forward")
        # To one device, because a model may be spread over several. [B·S, k] each -> [B·S, L, k].
        experts = torch.stack([layer.to(valid.device) for layer in recorded], dim=1)
        experts = experts.to(_expert_dtype(self._num_experts))
        return Routes(experts.unflatten(0, valid.shape), valid, self._layers)


class RoutingReplay:
    """Records and replays the expert choices of an *unmodified* transformers model.

    Serves every model whose routers' class name ends in `TopKRouter` or `TopkRouter` and which select by one
    `torch.topk` over the experts per call; one that selects otherwise raises `UnsupportedRouter` when it runs in a
    context. The model is patched only while a context is open. Contexts do not nest.

    Attributes:
        layers: absolute numbers of the decoder layers that have a router.
        num_experts: experts per layer, E.
        top_k: experts per token, k.

    Raises:
        UnsupportedRouter: the model is dense, or has another kind of router.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __init__(self, model: nn.Module) -> None:
        self._decoder, routers = _find_routers(model)
        self.layers = tuple(routers)
        self._routers = list(routers.values())
        self.num_experts, self.top_k = _sizes(self._routers)
        self._context: str | None = None

    @contextmanager
    def record(self) -> Iterator[Tape]:
        """Record every forward inside. Cheap to open: a decoding engine may open it at each step.

        A 2-D `attention_mask` marks the valid rows (its last S columns, beside a key-value cache); without one all are.
        """
        tape = Tape(self.layers, self.num_experts)

        def before(tokens: Tensor, mask: Tensor | None) -> None:
            length = tokens.shape[1]
            valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, -length:] != 0
            tape._forwards.append((valid, [None] * len(self.layers)))

        def after(i: int, experts: Tensor) -> None:
            if not _in_backward():  # gradient checkpointing runs the forward a second time
                if not tape._forwards:
                    raise RuntimeError("a router ran outside its decoder's forward: the tokens' [B, S] is unknown")
                tape._forwards[-1][1][i] = experts

        with self._patched("record", before, lambda i: (None, None), after):
            yield tape

    @contextmanager
    def replay(self, routes: Routes) -> Iterator[None]:
        """Make each forward inside choose the experts of `routes`; rows that are not valid are routed live.

        Keep it open through `backward()`, and backpropagate inside only what ran inside: gradient checkpointing runs
        the routers again there, with the routes of the moment. Once the context was left that raises RuntimeError.
        `routes` may stay on another device than the model.

        Raises:
            ValueError: `routes` are for other layers or another k, or a forward inside has another [B, S].
        """
        if routes.layers != self.layers or routes.experts.shape[-1] != self.top_k:
            raise ValueError(
                f"routes have {routes.experts.shape[-1]} experts per token at layers {routes.layers}, "
                f"the model has {self.top_k} at layers {self.layers}"
            )
        live = None if bool(routes.valid.all()) else ~routes.valid.flatten()[:, None]
        built_graph = False

        def before(tokens: Tensor, mask: Tensor | None) -> None:
            nonlocal built_graph
            built_graph |= torch.is_grad_enabled()
            if tokens.shape != routes.valid.shape:
                raise ValueError(
                    f"the forward's [B, S] is {list(tokens.shape)}, the routes' is {list(routes.valid.shape)}"
                )

        def forced(i: int) -> tuple[Tensor, Tensor | None]:
            return routes.experts[:, :, i].flatten(0, 1), live

        try:
            with self._patched("replay", before, forced, lambda i, experts: None):
                yield
        finally:
            if built_graph:
                for router in self._routers:
                    router.register_forward_pre_hook(_refuse_late_backward)

    @contextmanager
    def _patched(
        self,
        context: str,
        before: Callable[[Tensor, Tensor | None], None],
        forced: Callable[[int], tuple[Tensor | None, Tensor | None]],
        after: Callable[[int, Tensor], None],
    ) -> Iterator[None]:
        """Route every router's forward through `_ExpertTopK`, and only until the context closes."""
        if self._context is not None:
            raise RuntimeError(f"cannot open {context}() inside {self._context}(): leave that context first")

        def watched(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def router_forward(*args: Any, **kwargs: Any) -> Any:
                with _ExpertTopK(self.num_experts, self.top_k, *forced(i)) as topk:
                    output = forward(*args, **kwargs)
                if len(topk.chosen) != 1:
                    raise UnsupportedRouter(
                        f"{type(self._routers[i]).__name__} of layer {self.layers[i]} selected the top {self.top_k} of "
                        f"{self.num_experts} experts by torch.topk {len(topk.chosen)} times in one forward, not once"
                    )
                after(i, topk.chosen[0])
                return output

            return router_forward

        def before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(*_tokens_and_mask(*args, **kwargs))

        self._context = context
        # A forward set on the instance by something else (an offloading hook, a wrapper) is put back at the end.
        own = [vars(router).get("forward") for router in self._routers]
        handle = self._decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
        try:
            for i, router in enumerate(self._routers):
                vars(router)["forward"] = watched(i, router.forward)
            yield
        finally:
            handle.remove()
            for router, forward in zip(self._routers, own, strict=True):
                if forward is None:
                    vars(router).pop("forward", None)
                else:
                    vars(router)["forward"] = forward
            self._context = None


class _ExpertTopK(TorchFunctionMode):
    """Inside one call of a router: notes its top-k over experts, and answers it with `forced` where given.

    Families with groups of experts also take top-k's over groups, of another shape: those pass.
    """

    def __init__(self, num_experts: int, top_k: int, forced: Tensor | None, live: Tensor | None) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.forced, self.live = num_experts, top_k, forced, live
        self.chosen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and self._over_experts(*args, **kwargs):
            result = func(*args, **kwargs) if self.forced is None else self._answer(func, args, kwargs)
            self.chosen.append(result.indices)
            return result
        if func in _MASKED_FILL and self.forced is not None and args[0].shape == (len(self.forced), self.num_experts):
            return func(args[0], self._unhide(args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _over_experts(self, input: Tensor, k: int, *_: Any, **__: Any) -> bool:
        return input.dim() == 2 and input.shape[-1] == self.num_experts and k == self.top_k

    def _answer(self, topk: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        scores = args[0]
        experts, live = self._forced_on(scores.device)
        if len(experts) != len(scores):
            raise ValueError(f"a router was given {len(scores)} tokens, the routes have B·S = {len(experts)}")
        if live is not None:
            experts = torch.where(live, topk(*args, **kwargs).indices, experts)
        # From the dense scores: a replayed expert outside the live top-k still has its gate and its gradient.
        return torch.return_types.topk((scores.gather(-1, experts), experts))

    def _unhide(self, mask: Bool[Tensor, "n E"]) -> Bool[Tensor, "n E"]:
        """Take the replayed experts out of a mask over experts.

        DeepSeek-V2 zeroes the scores outside the live groups before its top-k; a gate read from a zeroed score would be
        0 and pass no gradient.
        """
        experts, live = self._forced_on(mask.device)
        return mask.scatter(-1, experts, False if live is None else mask.gather(-1, experts) & live)

    def _forced_on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The compact experts as indices, with some valid index in the rows that are routed live."""
        assert self.forced is not None
        experts = self.forced.to(device=device, dtype=torch.int64)
        live = None if self.live is None else self.live.to(device)
        return experts if live is None else experts.masked_fill(live, 0), live


def _expert_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.uint16


def _tokens_and_mask(
    input_ids: Tensor | None = None, attention_mask: Any = None, *_: Any, inputs_embeds: Tensor | None = None, **__: Any
) -> tuple[Tensor, Tensor | None]:
    """A `[B, S]` tensor and the 2-D mask, from the arguments of a transformers decoder."""
    tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
    if tokens is None:
        raise ValueError("call the model with input_ids or inputs_embeds: routes need its [B, S]")
    return tokens, attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None


def _in_backward() -> bool:
    # The same test torch.utils.checkpoint uses; unlike a flag of ours it holds on autograd's own threads.
    return torch._C._current_graph_task_id() != -1


def _refuse_late_backward(router: nn.Module, args: tuple[Any, ...]) -> None:
    """Left on each router by `replay`: catches a checkpointed forward that runs again after its routes are gone.

    Takes itself off at the router's next forward. It holds no state, so a copy of the model may carry it.
    """
    if _in_backward():
        raise RuntimeError(
            "gradient checkpointing runs a replayed forward again, but the replay context was left: "
            "call backward() inside `with replay.replay(routes):`"
        )
    for key, hook in list(router._forward_pre_hooks.items()):
        if hook is _refuse_late_backward:
            del router._forward_pre_hooks[key]


def _find_routers(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The decoder, and its routers by absolute layer number, from module names such as `model.layers.3.mlp.gate`."""
    named = {name: module for name, module in model.named_modules() if _ROUTER.search(type(module).__name__)}
    if not named:
        raise UnsupportedRouter(_why_none(model))
    places = {name: re.fullmatch(r"(?:(.*?)\.)??[^.]+\.(\d+)\..+", name) for name in named}
    decoders = {place and (place[1] or "") for place in places.values()}
    layers = {int(place[2]): named[name] for name, place in places.items() if place}
    if len(decoders) > 1 or len(layers) < len(named):
        raise UnsupportedRouter(f"need one router in each `<decoder>.layers.<n>` of one decoder, found {list(named)}")
    return model.get_submodule(decoders.pop() or ""), dict(sorted(layers.items()))


def _sizes(routers: list[nn.Module]) -> tuple[int, int]:
    """(E, k), alike in all routers."""
    sizes = {(getattr(router, "num_experts", None), getattr(router, "top_k", None)) for router in routers}
    experts, k = sizes.pop()
    if sizes or experts is None or k is None:
        raise UnsupportedRouter(
            f"{type(routers[0]).__name__}: num_experts or top_k is missing or differs between layers"
        )
    return experts, k


def _why_none(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    counts = {name: getattr(text, name, None) or 0 for name in _EXPERT_COUNTS}
    found = sorted({type(module).__name__ for module in model.modules() if _OTHER_MOE.search(type(module).__name__)})
    if found or max(counts.values()) > 1:
        evidence = ", ".join(found or [f"{name}={count}" for name, count in counts.items() if count])
        return f"{type(model).__name__} is a mixture of experts without a …TopKRouter; found {evidence}"
    return f"{type(model).__name__} is dense: it has no router. Routing replay is for mixtures of experts"
