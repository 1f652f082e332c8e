"""The training engine's forward: log π(y_t | x, y_<t) and entropy of the response tokens, routes replayed or recorded.

A `Layout` says where each token of a rollout stands in one forward. The plain layout is the batch as it is. The shared
layout puts a prompt and all its responses in one row, the prompt once: responses see the prompt and themselves, not
each other. Both give the same log-probabilities (to float tolerance); the shared one computes each prompt once instead
of G times, and no padding between responses.

The logits [B, T, V] never exist. While the model's forward runs, its head hands out a placeholder in their place; what
the model does to that (Gemma caps logits, Granite scales them) is noted. Logits are then computed in chunks, of the
response tokens only, and once more in the backward.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from minirl_edu.rollout.base import Rollout
from minirl_edu.rollout.hf import evaluating, suppressed_mask
from minirl_edu.routing import Routes


class ResponseLogprobs(NamedTuple):
    """`logp` [B, T], log-probability of each response token, with gradient; `entropy` [B, T], −Σ_w π(w) log π(w).

    Both in nats, and 0 where masked.
    """

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a rollout stand in one forward of R rows and C columns.

    inputs    the model's keyword arguments: input_ids and position_ids [R, C], attention_mask (None, [R, C], or
              additive [R, 1, C, C])
    source    [R, C] which token of the flat [B·S] batch a slot holds, −1 where it is padding
    slot      [B, S] which flat slot of [R·C] holds a token as an input, −1 where none does
    predictor [n] the flat slots whose logits predict the response tokens, in the order of True entries in `mask`
    targets   [n] those response tokens
    mask      [B, T] the response mask
    """

    inputs: dict[str, Tensor | None]
    source: Int[Tensor, "R C"]
    slot: Int[Tensor, "B S"]
    predictor: Int[Tensor, "n"]
    targets: Int[Tensor, "n"]
    mask: Bool[Tensor, "B T"]

    @property
    def slots(self) -> int:
        """Token slots of the forward, padding included: what a micro-batch costs."""
        return self.source.numel()

    def pack(self, routes: Routes) -> Routes:
        """Routes of the batch [B, S], re-laid for this forward [R, C]."""
        index = self.source.clamp(min=0)
        experts = routes.experts.flatten(0, 1)[index]
        return Routes(experts, routes.valid.flatten()[index] & (self.source >= 0), routes.layers)

    def unpack(self, routes: Routes) -> Routes:
        """Routes recorded in this forward [R, C], back to the batch [B, S]."""
        index = self.slot.clamp(min=0)
        experts = routes.experts.flatten(0, 1)[index]
        return Routes(experts, self.slot >= 0, routes.layers)


def lay_out(rollout: Rollout, *, share_prompts: bool) -> Layout:
    """Lay a rollout out for one forward, each prompt once (`share_prompts`) or the batch as it is.

    Sharing needs a model whose attention honours a 4-D mask (`can_share_prompts`); its attention mask takes C² numbers
    per row.
    """
    inputs = rollout.inputs
    position = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    layout = _shared if share_prompts and rollout.group_size > 1 else _plain
    return layout(rollout, inputs, position)


def _predictors(rollout: Rollout, slot: Tensor) -> Tensor:
    """Response token t is predicted at the slot of the token before it."""
    before = slot[:, rollout.prompt_length - 1 : -1]
    return before[rollout.response_mask]


def _plain(rollout: Rollout, inputs: Tensor, position: Tensor) -> Layout:
    rows, width = rollout.tokens.shape
    columns = int(inputs.any(0).nonzero()[-1]) + 1  # the last token of the longest response is never an input
    source = torch.arange(rows * width, device=inputs.device).view(rows, width)[:, :columns]
    slot = torch.arange(rows * columns, device=inputs.device).view(rows, columns)
    slot = nn.functional.pad(slot, (0, width - columns), value=-1).where(inputs, -1)
    # Padding on the right needs no mask (attention is causal), and without one the faster causal kernel runs. Positions
    # go on through it: where they stand still, transformers sees packed sequences and builds a mask after all.
    left_padded = not bool(rollout.attention_mask[:, 0].all())
    if not left_padded:
        position = torch.arange(width, device=inputs.device).expand(rows, -1)
    return Layout(
        inputs={
            "input_ids": rollout.tokens[:, :columns],
            "position_ids": position[:, :columns],
            "attention_mask": rollout.attention_mask[:, :columns] if left_padded else None,
        },
        source=source.where(inputs[:, :columns], -1),
        slot=slot,
        predictor=_predictors(rollout, slot),
        targets=rollout.tokens[:, rollout.prompt_length :][rollout.response_mask],
        mask=rollout.response_mask,
    )


def _shared(rollout: Rollout, inputs: Tensor, position: Tensor) -> Layout:
    rows, width = rollout.tokens.shape
    groups, group_size = len(rollout.prompts), rollout.group_size
    device = inputs.device
    in_prompt = torch.arange(width, device=device) < rollout.prompt_length
    first = torch.arange(rows, device=device) % group_size == 0
    kept = inputs & (~in_prompt | first[:, None])  # a prompt is kept from the first response of its group
    # Number the kept tokens of each group in order: prompt, response 1, response 2, …
    column = kept.view(groups, -1).cumsum(1) - 1
    lengths = column[:, -1] + 1
    columns = int(lengths.max())
    slot = (column + torch.arange(groups, device=device)[:, None] * columns).view(rows, width)
    source = torch.full((groups * columns,), -1, device=device)
    source[slot[kept]] = kept.flatten().nonzero()[:, 0]
    # The prompt's tokens of the other rows are the first row's.
    of_first = slot.view(groups, group_size, width)[:, :1].expand(-1, group_size, -1).reshape(rows, width)
    slot = torch.where(in_prompt, of_first, slot).where(inputs, -1)

    index = source.clamp(min=0)
    segment = torch.where(in_prompt, 0, torch.arange(rows, device=device)[:, None] % group_size + 1)  # 0: the prompt
    segment = segment.flatten()[index].where(source >= 0, -1).view(groups, columns)
    sees = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    sees &= torch.ones(columns, columns, dtype=torch.bool, device=device).tril()
    blocked = torch.finfo(torch.float32).min
    source = source.view(groups, columns)
    index = index.view(groups, columns)
    return Layout(
        inputs={
            "input_ids": rollout.tokens.flatten()[index],
            "position_ids": position.flatten()[index],
            "attention_mask": torch.zeros(sees.shape, device=device).masked_fill_(~sees, blocked)[:, None],
        },
        source=source,
        slot=slot,
        predictor=_predictors(rollout, slot),
        targets=rollout.tokens[:, rollout.prompt_length :][rollout.response_mask],
        mask=rollout.response_mask,
    )


def micro_batches(
    rollout: Rollout, tokens: int, *, share_prompts: bool
) -> list[tuple[Int[Tensor, "b"], Rollout, Layout]]:
    """Cut a rollout into parts whose layouts take at most `tokens` slots each, padding included: (rows, part, layout).

    Parts hold rows of like length, so that little of them is padding. Groups stay whole under `share_prompts`; one that
    takes more than `tokens` by itself is laid out row by row instead. A single row may exceed the budget: there is
    nothing left to cut.
    """
    fed = rollout.response_mask.sum(1) - 1  # the last token of a response is never an input
    size = rollout.group_size if share_prompts else 1
    widths, order = (rollout.prompt_length + fed.view(-1, size).sum(1)).sort(stable=True)
    cuts: list[tuple[Tensor, bool]] = []
    for start, stop in _within(widths.tolist(), tokens):
        rows = (order[start:stop, None] * size + torch.arange(size, device=order.device)).flatten()
        if widths[start] <= tokens or size == 1:
            cuts.append((rows, share_prompts))
        else:
            single = (rollout.prompt_length + fed[rows]).tolist()
            cuts += [(rows[a:b], False) for a, b in _within(single, tokens)]
    parts = ((rows, rollout.take(rows), share) for rows, share in cuts)
    return [(rows, part, lay_out(part, share_prompts=share)) for rows, part, share in parts]


def _within(widths: list[int], budget: int) -> list[tuple[int, int]]:
    """Greedy runs start..stop of consecutive items whose (number · widest) stays within the budget."""
    runs, start = [], 0
    for item in range(1, len(widths) + 1):
        if item == len(widths) or (item + 1 - start) * max(widths[start : item + 1]) > budget:
            runs.append((start, item))
            start = item
    return runs


CHUNK = 2**22
"""Logits that exist at a time (16 MiB in fp32): enough to keep the products busy, little beside a model that has so
many tokens. A batch with no more of them is computed at once, and its log-probabilities are kept for the backward."""


def response_logprobs(model: nn.Module, layout: Layout, *, temperature: float = 1.0) -> ResponseLogprobs:
    """log softmax(logits / T) of the response tokens, and the entropy of that distribution, in fp32 (of a float64
    model, in float64). The model's `suppressed_tokens` have probability 0.

    `model` is a transformers causal LM or a wrapper around one. Open `RoutingReplay.replay(layout.pack(routes))` or
    `.record()` around this call (and around `backward`) to force or keep the experts.
    Logits are computed only where a response token is predicted, `CHUNK` at a time.
    """
    inputs = dict(layout.inputs)
    mask = inputs["attention_mask"]
    if mask is not None and mask.dim() == 4:
        dtype = next(model.parameters()).dtype
        inputs["attention_mask"] = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    with _instead_of_logits(model, layout, temperature):
        both = model(**inputs, use_cache=False)
    logp, entropy = both.real, both.imag.detach()
    empty = torch.zeros(layout.mask.shape, dtype=logp.dtype, device=logp.device)
    return ResponseLogprobs(empty.masked_scatter(layout.mask, logp), empty.masked_scatter(layout.mask, entropy))


@contextmanager
def _instead_of_logits(model: nn.Module, layout: Layout, temperature: float) -> Iterator[None]:
    """Inside, the model returns the response tokens' log-probabilities and entropies as one complex tensor [n].

    They are computed at the end of the transformers model's own forward, where wrappers that shard it have its weights
    whole, and are returned through those wrappers, so that their backward hooks see them. Complex, because FSDP's mixed
    precision casts floating-point outputs to bf16, which would leave a log-probability 8 of its 24 bits.
    """
    transformer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    head = None if transformer is None else transformer.get_output_embeddings()
    if transformer is None or head is None:
        raise TypeError(f"model: {type(model).__name__} holds no transformers model with a language-modelling head")
    plain_forward = type(head) is nn.Linear and "forward" not in vars(head)
    transformer_forward, head_forward = transformer.forward, head.forward

    def postpone(hidden: Tensor) -> Tensor:
        none = head_forward(hidden[:0])  # no logits, but they have the vocabulary's size and the right dtype
        shape = (*hidden.shape[:2], none.shape[-1])
        if math.prod(shape) <= CHUNK or hidden.shape[:2] != layout.source.shape:
            return head_forward(hidden)
        device = hidden.device.type
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        trace = _Trace(hidden, autocast, none.new_empty(shape, device="meta"))
        return _Postponed(trace, trace.root, hidden.device)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        logits = transformer_forward(*args, **kwargs).logits
        if not isinstance(logits, _Postponed):  # few, or of a model that does not call its head
            states = logits.flatten(0, 1).index_select(0, layout.predictor)
            suppressed = suppressed_mask(transformer, logits.shape[-1], states.device)
            return torch.complex(
                *_in_chunks(lambda part: part, states, layout.targets, temperature, logits.shape[-1], suppressed)
            )
        trace, (tokens, vocabulary) = logits.trace, (len(layout.targets), logits.shape[-1])
        states = trace.hidden.flatten(0, 1).index_select(0, layout.predictor)
        suppressed = suppressed_mask(transformer, vocabulary, states.device)
        with trace.autocast:
            plain = plain_forward and type(head.weight) is nn.Parameter and trace.only_casts
            if plain and tokens * vocabulary > CHUNK:
                # A chunk no wider than the hidden states is no larger than they are.
                width = max(CHUNK // tokens, states.shape[-1])
                both = _HeadLogprobs.apply(
                    states, head.weight, head.bias, layout.targets, temperature, width, suppressed
                )
            else:
                meta = logits.meta
                both = _in_chunks(
                    lambda part: trace.redo(head_forward(part[None]), meta)[0],
                    states,
                    layout.targets,
                    temperature,
                    vocabulary,
                    suppressed,
                )
        return torch.complex(*both)

    with _with_forward(transformer, forward), _with_forward(head, postpone):
        yield


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # set on the instance by a wrapper
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@dataclass
class _Trace:
    """The input [R, C, d] of a head whose output was not computed, and what was then done with that output.

    A note is an operation, its arguments and its results, in which a meta tensor stands for each postponed one (`root`
    for the head's output).
    """

    hidden: Tensor
    autocast: torch.autocast
    root: Tensor
    notes: list[tuple[Callable[..., Any], Any, Any]] = field(default_factory=list)

    @property
    def only_casts(self) -> bool:
        """Whether nothing was done but to cast to fp32, as is done here anyway."""
        return all(
            operation is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32
            for operation, (_, kwargs), _ in self.notes
        )

    def redo(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Do what was noted to the head's `logits` [1, c, V] of some positions, and return what became `wanted`."""
        values = {self.root: logits}
        for operation, arguments, results in self.notes:
            args, kwargs = tree_map_only(Tensor, lambda x: values.get(x, x), arguments)
            values.update(zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs)), strict=True))
        if values[wanted].shape[:2] != logits.shape[:2]:
            raise NotImplementedError(
                f"the model made {list(wanted.shape)} of its head's {list(self.root.shape)} logits, and "
                f"{list(values[wanted].shape)} of {list(logits.shape)}: it does not treat each position by itself"
            )
        return values[wanted]


class _Postponed(Tensor):
    """Logits that were not computed: shape, dtype and device, but no data. Operations on it are noted in `trace`."""

    trace: _Trace
    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, trace: _Trace, meta: Tensor, device: torch.device) -> "_Postponed":
        self = Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device)
        self.trace, self.meta = trace, meta
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = (args, kwargs or {})
        postponed = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, cls)]
        trace = postponed[0].trace
        if any(other.trace is not trace for other in postponed):
            raise NotImplementedError("the model combines the logits of several calls of its head")
        noted = tree_map_only(cls, lambda x: x.meta, arguments)
        shapes, options = tree_map_only(Tensor, lambda x: x.to("meta"), noted)
        device = options.get("device") or postponed[0].device
        results = func(*shapes, **(options | ({"device": "meta"} if "device" in options else {})))
        trace.notes.append((func, noted, results))
        return tree_map_only(Tensor, lambda x: cls(trace, x, device), results)


_LOWEST = torch.finfo(torch.float32).min
"""In the place of log 0 = −∞, so that 0 · log 0 is 0 in an entropy."""

_Pair = tuple[Float[Tensor, "n"], Float[Tensor, "n"]]


def _in_chunks(
    logits_of: Callable[[Tensor], Tensor],
    states: Float[Tensor, "n d"],
    targets: Int[Tensor, "n"],
    temperature: float,
    vocabulary: int,
    suppressed: Bool[Tensor, "V"] | None,
) -> _Pair:
    """log π of the targets and the entropy, from `logits_of(states)` [n, V]: so many tokens at a time, in the backward
    again."""

    def both(states: Tensor, targets: Tensor) -> _Pair:
        logits = _in_full(logits_of(states)) / temperature
        if suppressed is not None:
            logits = logits.masked_fill(suppressed, -math.inf)
        log_probs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            entropy = -log_probs.exp().mul_(log_probs.clamp(min=_LOWEST)).sum(-1)
        return log_probs.gather(1, targets[:, None])[:, 0], entropy

    size = max(CHUNK // vocabulary, 1)
    if len(targets) <= size:
        return both(states, targets)
    parts = [
        checkpoint(both, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(states.split(size), targets.split(size), strict=True)
    ]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _in_full(logits: Tensor) -> Tensor:
    """fp32, or float64 as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _HeadLogprobs(torch.autograd.Function):
    """log π of the targets [n] and the entropy [n] from the head's input, weight and bias, `width` words at a time.

    With z = (h·Wᵀ + b)/T and m, s = max, Σ exp(z − m), both carried from chunk to chunk of the vocabulary:

        log π(y) = z_y − m − log s,    H = log s − Σ exp(z − m)·(z − m) / s,    ∂ log π(y)/∂z = onehot(y) − exp(z − m)/s

    The vocabulary rather than the tokens, so that each row of the weight's gradient is one product over all tokens,
    written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n d"],
        weight: Float[Tensor, "V d"],
        bias: Float[Tensor, "V"] | None,
        targets: Int[Tensor, "n"],
        temperature: float,
        width: int,
        suppressed: Bool[Tensor, "V"] | None,
    ) -> _Pair:
        """Returns (log π, entropy); one more pass over the vocabulary in the backward."""
        like = _in_full(hidden[:, 0])
        top = torch.full_like(like, torch.finfo(like.dtype).min)
        total, moment, chosen = (torch.zeros_like(like) for _ in range(3))
        for start in range(0, len(weight), width):
            logits = nn.functional.linear(hidden, weight[start : start + width], _rows(bias, start, width))
            ctx.dtype = logits.dtype  # autocast's, inside its context; the backward runs outside
            z = _in_full(logits).div_(temperature)
            if suppressed is not None:
                z.masked_fill_(suppressed[start : start + width], -math.inf)
            index, here = _inside(targets, start, z)
            chosen = torch.where(here, z.gather(1, index)[:, 0], chosen)
            higher = torch.maximum(top, z.amax(1))
            fall = top - higher
            weights = z.sub_(higher[:, None]).exp()
            moment = (moment + total * fall) * fall.exp() + z.clamp_(min=_LOWEST).mul_(weights).sum(1)
            total = total * fall.exp() + weights.sum(1)
            top = higher
        ctx.save_for_backward(hidden, weight, bias, targets, top + total.log())
        ctx.temperature, ctx.width, ctx.suppressed = temperature, width, suppressed
        entropy = total.log() - moment / total
        ctx.mark_non_differentiable(entropy)
        return chosen - top - total.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "n"], _: Any) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias, each logit's in the dtype in which it was computed."""
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        states, scale = hidden.to(ctx.dtype), (grad / ctx.temperature)[:, None]
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype) if of_hidden else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(bias) if of_bias else None
        for start in range(0, len(weight), ctx.width):
            rows, part = slice(start, start + ctx.width), weight[start : start + ctx.width].to(ctx.dtype)
            some = _rows(bias, start, ctx.width)
            logits = nn.functional.linear(states, part, None if some is None else some.to(ctx.dtype))
            z = _in_full(logits).div_(ctx.temperature)
            if ctx.suppressed is not None:
                z.masked_fill_(ctx.suppressed[rows], -math.inf)
            z.sub_(normaliser[:, None]).exp_().mul_(-scale)
            index, here = _inside(targets, start, z)
            grad_logits = z.scatter_add_(1, index, torch.where(here[:, None], scale, 0)).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ part
            if grad_weight is not None:
                grad_weight[rows] = grad_logits.T @ states
            if grad_bias is not None:
                grad_bias[rows] = grad_logits.sum(0)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _rows(bias: Tensor | None, start: int, width: int) -> Tensor | None:
    return None if bias is None else bias[start : start + width]


def _inside(targets: Tensor, start: int, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target [n] stands in a chunk of the vocabulary (an index [n, 1] to gather at), and whether it does."""
    index = targets - start
    here = (index >= 0) & (index < chunk.shape[1])
    return index.clamp(0, chunk.shape[1] - 1)[:, None], here


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the shared layout gives this model's log-probabilities: tried on a few tokens rather than inferred from
    its class.

    False for attention that ignores a 4-D mask (flash kernels), linear attention and recurrent layers, and sliding
    windows (which the mask would lift).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        return False
    vocab, device = config.vocab_size, model.device
    tokens = (torch.arange(2 * 11, device=device) * 7 + 1).remainder(vocab).view(2, 11)
    tokens[1, :5] = tokens[0, :5]
    ones = torch.ones_like(tokens, dtype=torch.bool)
    probe = Rollout(tokens, ones, 5, ones[:, 5:], torch.zeros(2, 6, device=device), None, [tokens[0, :5].tolist()], 0)
    try:
        with evaluating(model):
            plain, shared = (response_logprobs(model, lay_out(probe, share_prompts=s)).logp for s in (False, True))
    except (TypeError, ValueError, RuntimeError):
        return False
    # fp32 sums in another order differ by about 1e-6; bf16 by about 1e-2; a wrong mask by 1e-1 and more.
    return bool((plain - shared).abs().max() < (1e-4 if model.dtype == torch.float32 else 5e-2))
