"""The language-modelling head without its logits: [B, T, V] of them never exist.

While the model's forward runs, its head hands out a placeholder in the place of logits; what the model does to that
(Gemma caps logits, Granite scales them) is noted. Logits are then computed in chunks, of the response tokens only, and
once more in the backward. A vocabulary of 150,000 words and 32,768 tokens would take 20 GB otherwise.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from minirl_edu.rollout.hf import suppressed_mask

_Pair = tuple[Float[Tensor, "n"], Float[Tensor, "n"]]

CHUNK = 2**22
"""Logits that exist at a time (16 MiB in fp32): enough to keep the products busy, little beside a model that has so
many tokens. A batch with no more of them is computed at once, and its log-probabilities are kept for the backward."""


@contextmanager
def logprobs_for_logits(
    model: nn.Module,
    *,
    slots: torch.Size,
    predictor: Int[Tensor, "n"],
    targets: Int[Tensor, "n"],
    temperature: float,
) -> Iterator[None]:
    """Inside, the model returns, in place of logits for its input of shape `slots` [R, C], the log-probabilities of
    `targets` at the flat slots `predictor`, and the entropies there, as one complex tensor [n].

    They are computed at the end of the transformers model's own forward, where wrappers that shard it have its weights
    whole, and are returned through those wrappers, so that their backward hooks see them. Complex, because FSDP's mixed
    precision casts floating-point outputs to bf16, which would leave a log-probability 8 of its 24 bits.

    Raises TypeError for a model without a language-modelling head.
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
        if math.prod(shape) <= CHUNK or hidden.shape[:2] != slots:
            return head_forward(hidden)
        device = hidden.device.type
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        trace = _Trace(hidden, autocast, none.new_empty(shape, device="meta"))
        return _Postponed(trace, trace.root, hidden.device)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        logits = transformer_forward(*args, **kwargs).logits
        postponed = isinstance(logits, _Postponed)  # otherwise few, or of a model that does not call its head
        states = (logits.trace.hidden if postponed else logits).flatten(0, 1).index_select(0, predictor)
        vocabulary = logits.shape[-1]
        suppressed = suppressed_mask(transformer, vocabulary, states.device)
        if not postponed:
            return torch.complex(*_in_chunks(_as_is, states, targets, temperature, vocabulary, suppressed))
        trace, meta = logits.trace, logits.meta
        with trace.autocast:
            plain = plain_forward and type(head.weight) is nn.Parameter and trace.only_casts
            if plain and len(targets) * vocabulary > CHUNK:
                both = head_logprobs(states, head.weight, head.bias, targets, temperature, suppressed)
            else:
                redo = lambda part: trace.redo(head_forward(part[None]), meta)[0]  # noqa: E731
                both = _in_chunks(redo, states, targets, temperature, vocabulary, suppressed)
        return torch.complex(*both)

    with _with_forward(transformer, forward), _with_forward(head, postpone):
        yield


def head_logprobs(
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "V d"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "n"],
    temperature: float = 1.0,
    suppressed: Bool[Tensor, "V"] | None = None,
) -> _Pair:
    """log π of the targets and the entropy [n] under the softmax of a linear head's logits, (h·Wᵀ + b)/T.

    At once where there are no more than `CHUNK` logits, otherwise some words at a time, and again in the backward.
    """
    if len(targets) * len(weight) <= CHUNK:
        linear = lambda part: nn.functional.linear(part, weight, bias)  # noqa: E731
        return _in_chunks(linear, states, targets, temperature, len(weight), suppressed)
    # A chunk no wider than the hidden states is no larger than they are.
    width = max(CHUNK // len(targets), states.shape[-1])
    return _HeadLogprobs.apply(states, weight, bias, targets, temperature, width, suppressed)  # type: ignore[return-value]


def _as_is(logits: Tensor) -> Tensor:
    return logits


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
