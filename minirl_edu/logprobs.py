"""The training engine's forward: log π(y_t | x, y_<t) and entropy of the response tokens, routes replayed or recorded.

A `Layout` says where each token of a rollout stands in one forward. All give the same log-probabilities (to float
tolerance).

    plain   the batch as it is, without the columns that are padding in every row
    shared  a prompt and all its responses in one row, the prompt once: responses see the prompt and themselves, not
            each other. Each prompt is computed once instead of G times, with a mask
    packed  all sequences one after the other in one row, each by itself (`minirl_edu.packing`): no padding, no mask

The logits [B, T, V] never exist: see `minirl_edu.lm_head`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minirl_edu.balance import deal
from minirl_edu.lm_head import logprobs_for_logits
from minirl_edu.packing import PACKED, allow_packing
from minirl_edu.rollout.base import Rollout
from minirl_edu.rollout.hf import evaluating
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

    inputs    the model's keyword arguments: input_ids and position_ids [R, C], attention_mask (None, [R, C], additive
              [R, 1, C, C], or a placeholder where sequences are packed) and the `segments` of packed sequences
    source    [R, C] which token of the flat [B·S] batch a slot holds, −1 where it is padding
    slot      [B, S] which flat slot of [R·C] holds a token as an input, −1 where none does
    predictor [n] the flat slots whose logits predict the response tokens, in the order of True entries in `mask`
    targets   [n] those response tokens
    mask      [B, T] the response mask
    """

    inputs: dict[str, Any]
    source: Int[Tensor, "R C"]
    slot: Int[Tensor, "B S"]
    predictor: Int[Tensor, "n"]
    targets: Int[Tensor, "n"]
    mask: Bool[Tensor, "B T"]

    @property
    def slots(self) -> int:
        """Token slots of the forward, padding included: what a micro-batch costs."""
        return self.source.numel()

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("source", "slot", "predictor", "targets", "mask")}
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.inputs.items()}
        return Layout(inputs=inputs, **moved)

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


def lay_out(rollout: Rollout, *, share_prompts: bool, pack: bool = False) -> Layout:
    """Lay a rollout out for one forward, each prompt once (`share_prompts`), or else packed (`pack`), or plain.

    Sharing needs a model whose attention honours a 4-D mask (`can_share_prompts`); its attention mask takes C² numbers
    per row. Packing needs one that `allow_packing` has prepared.
    """
    inputs = rollout.inputs
    position = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    layout = _shared if share_prompts and rollout.group_size > 1 else _packed if pack else _plain
    return layout(rollout, inputs, position)


def _predicted(rollout: Rollout, slot: Tensor) -> dict[str, Tensor]:
    """`predictor`, `targets` and `mask`: response token t is predicted at the slot of the token before it."""
    before, mask = slot[:, rollout.prompt_length - 1 : -1], rollout.response_mask
    return {
        "predictor": before[mask],
        "targets": rollout.tokens[:, rollout.prompt_length :][mask].long(),
        "mask": mask,
    }


def _plain(rollout: Rollout, inputs: Tensor, position: Tensor) -> Layout:
    rows, width = rollout.tokens.shape
    read = inputs.any(0).nonzero()[:, 0]
    first, end = int(read[0]), int(read[-1]) + 1  # the last token of the longest response is never an input
    columns = end - first
    source = torch.arange(rows * width, device=inputs.device).view(rows, width)[:, first:end]
    slot = torch.arange(rows * columns, device=inputs.device).view(rows, columns)
    slot = nn.functional.pad(slot, (first, width - end), value=-1).where(inputs, -1)
    # Padding on the right needs no mask (attention is causal), and without one the faster causal kernel runs. Positions
    # go on through it: where they stand still, transformers sees packed sequences and builds a mask after all.
    left_padded = not bool(rollout.attention_mask[:, first].all())
    position = position[:, first:end]
    if not left_padded:
        position = torch.arange(columns, device=inputs.device).expand(rows, -1)
    return Layout(
        inputs={
            "input_ids": rollout.tokens[:, first:end].long(),
            "position_ids": position,
            "attention_mask": rollout.attention_mask[:, first:end] if left_padded else None,
        },
        source=source.where(inputs[:, first:end], -1),
        slot=slot,
        **_predicted(rollout, slot),
    )


def _packed(rollout: Rollout, inputs: Tensor, position: Tensor) -> Layout:
    source = inputs.flatten().nonzero()[:, 0]
    slot = torch.full_like(position, -1)
    slot.view(-1)[source] = torch.arange(len(source), device=source.device)
    return Layout(
        inputs={
            "input_ids": rollout.tokens.flatten()[source].long()[None],
            "position_ids": position.flatten()[source][None],
            # Keeps transformers from building a mask; attention that looks at it gives no numbers.
            "attention_mask": torch.full((1, 1, 1, 1), torch.nan, device=source.device),
            "segments": tuple(inputs.sum(1).tolist()),
        },
        source=source[None],
        slot=slot,
        **_predicted(rollout, slot),
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
            "input_ids": rollout.tokens.flatten()[index].long(),
            "position_ids": position.flatten()[index],
            "attention_mask": torch.zeros(sees.shape, device=device).masked_fill_(~sees, blocked)[:, None],
        },
        source=source,
        slot=slot,
        **_predicted(rollout, slot),
    )


def micro_batches(
    rollout: Rollout, tokens: int, *, share_prompts: bool, pack: bool = False
) -> list[tuple[Int[Tensor, "b"], Rollout, Layout]]:
    """Cut a rollout into parts whose layouts take at most `tokens` slots each, padding included: (rows, part, layout).

    Parts hold rows of like length, so that little of them is padding. Groups stay whole under `share_prompts`; one that
    takes more than `tokens` by itself is laid out row by row instead, or packed. A single row may exceed the budget:
    there is nothing left to cut.
    """
    fed = rollout.lengths - 1  # the last token of a response is never an input
    prompts = rollout.attention_mask[:, : rollout.prompt_length].sum(1)
    rounds = deal(
        prompts.tolist(),
        fed.tolist(),
        prompt_width=rollout.prompt_length,
        group_size=rollout.group_size,
        budget=tokens,
        share=share_prompts,
        pack=pack,
    )
    found = []
    for (part,) in rounds:
        rows, shared = torch.tensor(part.rows, device=fed.device), part.shared > 1
        own = rollout.take(rows)
        own = own.trimmed() if pack and not shared else own
        found.append((rows, own, lay_out(own, share_prompts=shared, pack=pack)))
    return found


def response_logprobs(model: nn.Module, layout: Layout, *, temperature: float = 1.0) -> ResponseLogprobs:
    """log softmax(logits / T) of the response tokens, and the entropy of that distribution, in fp32 (of a float64
    model, in float64). The model's `suppressed_tokens` have probability 0.

    `model` is a transformers causal LM or a wrapper around one. Open `RoutingReplay.replay(layout.pack(routes))` or
    `.record()` around this call (and around `backward`) to force or keep the experts.
    Logits are computed only where a response token is predicted, `lm_head.CHUNK` at a time.
    """
    inputs = dict(layout.inputs)
    mask = inputs["attention_mask"]
    if mask is not None and mask.dim() == 4:
        dtype = next(model.parameters()).dtype
        inputs["attention_mask"] = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    of = {"predictor": layout.predictor, "targets": layout.targets, "temperature": temperature}
    with logprobs_for_logits(model, slots=layout.source.shape, **of):
        both = model(**inputs, use_cache=False)
    logp, entropy = both.real, both.imag.detach()
    empty = torch.zeros(layout.mask.shape, dtype=logp.dtype, device=logp.device)
    return ResponseLogprobs(empty.masked_scatter(layout.mask, logp), empty.masked_scatter(layout.mask, entropy))


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether the shared layout gives this model's log-probabilities: tried on a few tokens rather than inferred from
    its class.

    False for attention that ignores a 4-D mask (flash kernels), linear attention and recurrent layers, and sliding
    windows (which the mask would lift).
    """
    return attends_in_full(model.config.get_text_config()) and _same_as_plain(model, share_prompts=True)


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Whether the packed layout gives this model's log-probabilities once `allow_packing` has prepared it: tried, too.

    False for attention other than `sdpa`, linear attention and recurrent layers, and sliding windows.
    """
    text = model.config.get_text_config()
    if not attends_in_full(text) or text._attn_implementation not in ("sdpa", PACKED):
        return False
    before = text._attn_implementation
    try:
        allow_packing(model)
        return _same_as_plain(model, share_prompts=False, pack=True)
    except ValueError:  # no such attention in this model
        return False
    finally:
        model.set_attn_implementation(before)


def _same_as_plain(model: PreTrainedModel, **kind: bool) -> bool:
    """Whether a layout gives a few tokens the plain one's log-probabilities."""
    vocab, device = model.config.get_text_config().vocab_size, model.device
    tokens = (torch.arange(2 * 11, device=device) * 7 + 1).remainder(vocab).view(2, 11)
    tokens[1, :5] = tokens[0, :5]
    ones = torch.ones_like(tokens, dtype=torch.bool)
    probe = Rollout(tokens, ones, 5, ones[:, 5:], torch.zeros(2, 6, device=device), None, [tokens[0, :5].tolist()], 0)
    try:
        with evaluating(model):
            plain, other = (
                response_logprobs(model, lay_out(probe, **kwargs)).logp for kwargs in ({"share_prompts": False}, kind)
            )
    except (TypeError, ValueError, RuntimeError):
        return False
    # fp32 sums in another order differ by about 1e-6; bf16 by about 1e-2; a wrong mask by 1e-1 and more.
    return bool((plain - other).abs().max() < (1e-4 if model.dtype == torch.float32 else 5e-2))


def attends_in_full(config: PreTrainedConfig) -> bool:
    """Whether every layer of a model sees all tokens before: neither sliding windows nor linear attention."""
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not window and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
