"""A rollout engine on any transformers causal LM, with emulated low precision.

Each prompt is prefilled once for its G responses, and rows leave the batch when they end, so the engine's work is that
of the tokens it returns.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from minirl_edu.models import vocabulary_size
from minirl_edu.precision import Precision, perturb_routers, round_activations, round_weights_
from minirl_edu.rollout.base import Rollout, Sampling, accept
from minirl_edu.rollout.episodes import Environment, Turns
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.seeding import derive_seed
from minirl_edu.streaming import full_state


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [len(prompts), longest], padded on the left. Raises ValueError for no prompts or an empty
    one."""
    if not prompts or not all(prompts):
        raise ValueError("prompts: need at least one prompt, each with at least one token")
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return tokens, torch.arange(width) >= width - lengths[:, None]


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The token ids that end a response, from the model's generation config (falling back to its config)."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = getattr(model.config, "eos_token_id", None) if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def suppressed_tokens(model: PreTrainedModel) -> list[int]:
    """The token ids that have probability 0, in sampling and in the trainer: `suppress_tokens` of the model's
    generation config (see `minirl_edu.models.adopt_tokenizer`)."""
    generation = model.generation_config
    return list((generation.suppress_tokens if generation is not None else None) or ())


def suppressed_mask(model: PreTrainedModel, vocabulary: int, device: torch.device) -> Bool[Tensor, "V"] | None:
    """True at the `suppressed_tokens`, None if there is none."""
    if not (tokens := suppressed_tokens(model)):
        return None
    mask = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    mask[tokens] = True
    return mask


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` is in eval mode: in training mode there may be dropout, and gradient checkpointing silently drops
    the KV cache. Afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    replay: RoutingReplay | None = None,
    version: int = 0,
    keep_faulty: bool = False,
    environment: Environment | None = None,
) -> Rollout:
    """Sample `group_size` responses to each prompt from softmax(logits / temperature), with a KV cache.

    `suppressed_tokens` have probability 0. An `environment` may end a response or write into it, see `episodes`.
    The draw depends on `seed` alone, never on global random state. Log-probabilities are taken in fp32 from the very
    distribution sampled; routes are recorded if `replay` is given. Returns a `Rollout` whose T is the longest response
    drawn. Raises ValueError for empty prompts.

    Logits that are no numbers raise RuntimeError; with `keep_faulty` that response alone ends there, with a
    log-probability of NaN (see `Rollout.faults`).
    """
    device = model.device
    pad = getattr(model.config, "pad_token_id", None) or 0  # not every config has the field
    ends = torch.tensor(end_tokens(model), dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    prompt_tokens, prompt_mask = (x.to(device) for x in pad_left(prompts, pad))
    (groups, width), limit = prompt_tokens.shape, sampling.max_new_tokens
    rows = groups * group_size

    tokens = torch.full((rows, width + limit), pad, device=device)
    mask = torch.zeros((rows, width + limit), dtype=torch.bool, device=device)
    sampled = torch.zeros((rows, limit), dtype=torch.bool, device=device)
    turns = None if environment is None else Turns(environment, rows, group_size, limit)
    logp_rollout = torch.zeros((rows, limit), device=device)
    tokens[:, :width] = prompt_tokens.repeat_interleave(group_size, 0)
    mask[:, :width] = prompt_mask.repeat_interleave(group_size, 0)
    padded = not bool(prompt_mask.all())
    next_position = prompt_mask.sum(1).repeat_interleave(group_size, 0)  # of each row's first response token
    recorded: list[tuple[Tensor, Routes]] = []  # (rows, their routes), step by step

    def forward(input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        with torch.inference_mode(), replay.record() if replay is not None else nullcontext() as tape:
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if tape is not None:
            recorded.append((alive, tape.routes))
        return output.logits[:, -1]

    cache = DynamicCache(config=model.config)
    alive = torch.arange(rows, device=device)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    with evaluating(model):
        logits = forward(prompt_tokens, prompt_mask if padded else None, positions).repeat_interleave(group_size, 0)
        # `reorder_cache` takes any rows, in linear-attention layers too, which lack `batch_select_indices`.
        if group_size > 1:
            cache.reorder_cache(alive // group_size)  # pyright: ignore[reportArgumentType]
        suppressed = suppressed_mask(model, logits.shape[-1], device)
        for step in range(limit):
            logits = logits.float() / sampling.temperature
            if suppressed is not None:
                logits.masked_fill_(suppressed, -math.inf)
            logp = torch.log_softmax(logits, -1)
            probabilities = logp.exp()
            broken = logp.isnan().any(-1) if keep_faulty else None
            if broken is not None:
                probabilities[broken] = 1.0  # some token, whose log-probability is NaN
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            column, ended = width + step, torch.isin(drawn[:, 0], ends)
            going = ~ended if broken is None else ~ended & ~broken
            logp_drawn, own = logp.gather(1, drawn)[:, 0], True
            if turns is not None:
                drawn, own, going = turns.next(alive.tolist(), drawn, ~going)
                logp_drawn = logp_drawn.where(own, 0.0)
            tokens[alive, column] = drawn[:, 0]
            mask[alive, column], sampled[alive, step] = True, own
            logp_rollout[alive, step] = logp_drawn
            if step + 1 == limit or not going.any():
                break
            if not going.all():
                keep = going.nonzero()[:, 0]
                alive, drawn = alive[keep], drawn[keep]
                cache.reorder_cache(keep)  # pyright: ignore[reportArgumentType]
            attention_mask = mask[alive, : column + 1] if padded else None
            logits = forward(drawn, attention_mask, (next_position[alive] + step)[:, None])

    length = step + 1
    end = width + length
    routes = _assemble(recorded, rows, group_size) if recorded else None
    return Rollout(
        tokens=tokens[:, :end],
        attention_mask=mask[:, :end],
        prompt_length=width,
        response_mask=sampled[:, :length],
        logp_rollout=logp_rollout[:, :length],
        routes=routes,
        prompts=prompts,
        weight_version=version,
    )


@torch.no_grad()
def check_sampling(model: PreTrainedModel) -> None:
    """Refuse a model from which `sample` draws wrongly: tried on a few tokens rather than inferred from its class.

    The log-probabilities of three tokens drawn after prompts of two lengths have to be those of one forward over each
    whole sequence, without padding and without a cache. That fails for models that keep their past elsewhere than in
    `past_key_values` (Mamba, RWKV), and for those that see the tokens to come (BERT).

    Raises ValueError naming the model's class.
    """
    name = type(model).__name__
    remedy = "train a model that decodes with `past_key_values` and sees only what came before, as Qwen3 or Llama do"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"model: {name} takes no past_key_values, so it cannot be sampled step by step; {remedy}")
    prompts = [[(7 * i + 1) % vocabulary_size(model) for i in range(length)] for length in (3, 5)]
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    model.generation_config.eos_token_id = []  # else the config's would end a response before the cache is used
    try:
        with evaluating(model):
            rollout = sample(model, prompts, group_size=2, sampling=Sampling(3), seed=0)
            whole = []
            for prompt, rows in zip(prompts, rollout.tokens.split(2), strict=True):
                logits = model(input_ids=rows[:, -len(prompt) - 3 : -1], use_cache=False).logits[:, -3:]
                whole.append(logits.float().log_softmax(-1).gather(2, rows[:, -3:, None])[..., 0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each family fails in its own way at what it does not support
        raise ValueError(f"model: {name} cannot be sampled from ({type(error).__name__}: {error}); {remedy}") from error
    finally:
        model.generation_config = kept
    logp = torch.cat(whole)
    off, spread = (rollout.logp_rollout - logp).abs(), float(logp.std())
    # fp32: 2e-3 of the spread was seen where sums are taken in another order (Mamba layers), 0.3 and more where one is
    # wrong. In 16 bits single tokens differ by as much, where an expert flips, but not all of them.
    worst, allowed = (off.max(), 3e-2) if model.dtype == torch.float32 else (off.mean(), 0.1)
    if worst > allowed * spread + 1e-5:
        raise ValueError(
            f"model: {name} gives other log-probabilities step by step with past_key_values than in one forward, by "
            f"{float(worst):.2g} nats; {remedy}"
        )


def _assemble(recorded: list[tuple[Tensor, Routes]], rows: int, group_size: int) -> Routes:
    """Routes [B, S] from those of the prefill (a row per prompt) and of each decoding step (a row per live one)."""
    (_, prefill), *steps = recorded
    of_prompts = prefill[torch.arange(rows, device=prefill.valid.device) // group_size]
    routes = Routes.cat([of_prompts, *(step.at_rows(alive, rows) for alive, step in steps)], dim=1)
    return routes.pad_to(routes.valid.shape[1] + 1)  # the last token drawn was never an input


class HFEngine:
    """The rollout engine of one process: a copy of the model, its weights and activations rounded to `precision`, its
    routers disturbed by the noise that `precision` names.

    At `Precision()` (fp32) its log-probabilities and routes equal the training engine's to float tolerance, so that
    any discrepancy is the precision's. Stochastic rounding is drawn anew at every sync (weights) and every call
    (activations), from `seed`; "frozen" rounding with the same draws each time. The routers' noise is drawn anew at
    every call.
    `record_routes` keeps the experts of every token (Mixture-of-Experts models). `keep_faulty`: a response for which
    the model gives no numbers does not raise, but is in the rollout, marked (see `Rollout.faults`).

    Raises ValueError for a model that cannot be sampled step by step (see `check_sampling`), and for a precision
    that cannot be emulated on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision | None = None,
        *,
        seed: int = 0,
        record_routes: bool = False,
        keep_faulty: bool = False,
    ) -> None:
        check_sampling(model)
        self.precision = precision or Precision()
        self.precision.check(model)
        self.seed, self.keep_faulty = seed, keep_faulty
        self.model: PreTrainedModel | None = copy.deepcopy(model).requires_grad_(False).eval()
        if self.precision.activations != "fp32" and model._can_set_experts_implementation():
            self.model.set_experts_implementation("grouped_mm")
        self.replay = RoutingReplay(self.model) if record_routes else None
        self.version = 0
        self.sync(model, version=0)

    @torch.no_grad()
    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        """Take `model`'s weights as the new θ_old and round them. There is no cache that outlives a call."""
        target = self._open()
        # Tensor by tensor and in place: a full second state never exists.
        target.tie_weights()  # a rounded head has a weight of its own
        ours = target.state_dict()
        for name, tensor in full_state(model):
            ours[name].copy_(tensor)
            del tensor  # before the next one is made
        target.generation_config = copy.deepcopy(model.generation_config)  # end tokens, and those with probability 0
        round_weights_(target, self.precision, self._generator("weights", version))
        self.version = version

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        """Sample `group_size` responses to each prompt (token ids); see `sample`. The rollout is validated.

        Raises EngineError, naming the row, for a log-probability that is none.
        """
        return self._generate(prompts, group_size, sampling, seed, None)

    def play(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        environment: Environment,
    ) -> Rollout:
        """`generate` with an environment that is asked at each token: see `episodes.play`."""
        return self._generate(prompts, group_size, sampling, seed, environment)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        seed: int,
        environment: Environment | None,
    ) -> Rollout:
        model = self._open()
        with ExitStack() as discrepancy:
            # The noise is in the routers' input before that is rounded.
            if self.precision.router_noise:
                noise = torch.Generator(model.device).manual_seed(derive_seed(self.seed, "router_noise", seed))
                discrepancy.enter_context(perturb_routers(model, self.precision.router_noise, noise))
            rounding = self._generator("activations", seed)
            discrepancy.enter_context(round_activations(model, self.precision, rounding))
            rollout = sample(
                model,
                prompts,
                group_size=group_size,
                sampling=sampling,
                seed=seed,
                replay=self.replay,
                version=self.version,
                keep_faulty=True,
                environment=environment,
            )
        return accept(rollout, keep_faulty=self.keep_faulty)

    def close(self) -> None:
        """Give back the copy of the model."""
        self.model = self.replay = None

    def _generator(self, stream: str, step: int) -> torch.Generator:
        assert self.model is not None
        step = 0 if self.precision.rounding == "frozen" else step
        return torch.Generator(self.model.device).manual_seed(derive_seed(self.seed, stream, step))

    def _open(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError("this engine was closed; make a new HFEngine")
        return self.model
