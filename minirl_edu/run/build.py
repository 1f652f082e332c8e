"""From a config to what the training loop works with. What does not fit is a ConfigError that names the setting."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, get_scheduler

from minirl_edu.batches import Batcher
from minirl_edu.config import Config, ConfigError
from minirl_edu.logprobs import can_pack, can_share_prompts
from minirl_edu.models import (
    adopt_tokenizer,
    load_model,
    load_tokenizer,
    max_positions,
    random_model,
    recompute_activations,
    unloaded_model,
)
from minirl_edu.packing import allow_packing
from minirl_edu.ranks import RankedBatcher, Ranks, make_accelerator, share_experts
from minirl_edu.rollout import HFEngine, RolloutEngine, Sampling, VLLMServerEngine, make_engine
from minirl_edu.rollout.hf import check_sampling, evaluating
from minirl_edu.routing import RoutingReplay, UnsupportedRouter
from minirl_edu.streaming import local_part
from minirl_edu.tasks import Task, brings_tokenizer, make_task

_ENOUGH = 0.9  # share of the weights that a step has to be able to move, or a warning says that it cannot


def build_accelerator(config: Config, out: Path) -> Accelerator:
    """accelerate's object for this process, with the trackers of `output.trackers`."""
    try:
        return make_accelerator(
            wait=config.ranks.wait, log_with=list[Any](config.output.trackers) or None, project_dir=str(out)
        )
    except ValueError as error:
        raise ConfigError(f"accelerate: {error}") from error


def build_task(config: Config) -> Task:
    """The task, with the model's tokenizer unless it brings its own."""
    settings, model = config.task, config.model
    tokenizer = None
    try:
        if not brings_tokenizer(settings.name):
            tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        return make_task(settings.name, tokenizer=tokenizer, **settings.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"task: {error}") from error


def build_model(
    config: Config, task: Task, given: PreTrainedModel | None = None, *, load: bool = True
) -> PreTrainedModel:
    """The policy (`given`, or loaded, or drawn from the seed), with the end tokens of the task's tokenizer. Without
    `load`, what would be loaded has no weights yet."""
    settings = config.model
    kind: dict[str, Any] = {
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    try:
        policy = given
        if policy is None and settings.random:
            _check_padding(settings.overrides.get("pad_token_id"), task)
            policy = random_model(settings.name, settings.overrides, seed=config.seed, **kind)
        elif policy is None:
            policy = (load_model if load else unloaded_model)(settings.name, **kind)
        adopt_tokenizer(policy, task.tokenizer)
        return policy
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_padding(pad: int | None, task: Task) -> None:
    """transformers gives the padding token a zero embedding. If it is a word, RMSNorm divides by zero vectors, and each
    layer multiplies the gradient by up to 1e3: with Qwen3-0.6B's 28 layers it overflowed on an H200."""
    own = task.tokenizer.pad_token_id
    if pad is not None and own is not None and pad != own:
        word = task.tokenizer.decode([pad])
        raise ValueError(
            f"model.overrides.pad_token_id = {pad}: that is {word!r} to the tokenizer, and a padding token has a "
            f"zero embedding, through which gradients overflow; set it to {own}, the tokenizer's"
        )


def receives_weights(config: Config, accelerator: Accelerator) -> bool:
    """Whether accelerate sends this rank its part of rank 0's weights when it shards the model
    (`fsdp_cpu_ram_efficient_loading`)."""
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 and config.model.expert_parallel == 1 else None
    return plugin is not None and plugin.cpu_ram_efficient_loading and not accelerator.is_main_process


def routing_replay(config: Config, model: PreTrainedModel, ranks: Ranks) -> RoutingReplay | None:
    """Replay for the model's routers; None for a model without any, which R2 and R3 refuse. Tried on rank 0, which has
    the weights."""
    replay = refusal = None
    try:
        replay = RoutingReplay(model)
        if ranks.is_main:
            with torch.no_grad(), evaluating(model), replay.record():  # some refuse only when they run
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except UnsupportedRouter as error:
        refusal = error
    if not ranks.any(refusal is not None):
        return replay
    if config.algorithm.replay != "none":
        raise ConfigError(f"algorithm.replay = {config.algorithm.replay!r}: {refusal or 'see rank 0'}") from refusal
    return None


def build_sampling(config: Config, task: Task, model: PreTrainedModel) -> Sampling:
    """How responses are sampled; they have to leave a position for a prompt."""
    length, positions = config.rollout.max_new_tokens or task.max_new_tokens, max_positions(model)
    if positions is not None and length >= positions:
        raise ConfigError(
            f"rollout.max_new_tokens = {length}: the model has {positions} positions for prompt and response together; "
            "lower it, or take a model with more"
        )
    return Sampling(length, config.rollout.temperature)


def build_batcher(config: Config, model: PreTrainedModel, replay: RoutingReplay | None, ranks: Ranks) -> Batcher:
    """How rollouts are cut; on several ranks, a `RankedBatcher`. Rank 0 tries what the model's attention allows."""
    settings: dict[str, Any] = {
        "group_size": config.train.group_size,
        "mini_batches": config.train.mini_batches,
        "tokens": config.train.tokens_per_micro_batch,
        "share_prompts": ranks.any(ranks.is_main and can_share_prompts(model)),
        "pack": ranks.any(ranks.is_main and can_pack(model)),
        "attention": attention_cost(model, replay),
        "force_routes": config.algorithm.replay == "R3",
        "backward_all": config.train.zero_advantage_backward,
    }
    if ranks.size == 1:
        return Batcher(**settings)
    return RankedBatcher(ranks, () if replay is None else replay.layers, **settings)


def attention_cost(model: PreTrainedModel, replay: RoutingReplay | None) -> float:
    """Operations of attending to one token, over those of a token's products with the weights: by how much a long
    response costs more than short ones of as many tokens."""
    config, active = model.config.get_text_config(), 0.0
    share = 1.0 if replay is None else replay.top_k / replay.num_experts
    for name, parameter in model.named_parameters():
        active += parameter.numel() * (share if ".experts." in name else 1.0)
    if not model.config.tie_word_embeddings:
        active -= model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 2 * config.num_attention_heads * head_dim * kinds.count("full_attention") / active


def build_engine(
    config: Config, model: PreTrainedModel, given: RolloutEngine | None, ranks: Ranks, *, routes: bool
) -> RolloutEngine | None:
    """Rank 0's rollout engine (`given`, or a new one with the model's weights; `routes` records experts)."""
    if ranks.size > 1 and config.rollout.engine == "vllm" and given is None:
        raise ConfigError(
            f"rollout.engine = 'vllm': it takes over torch.distributed, which the {ranks.size} processes of this run "
            "need; use 'vllm_server' (scale/serve.py)"
        )
    if not ranks.is_main:
        return None
    built = given if given is not None else make_engine(model, config.rollout, seed=config.seed, routes=routes)
    if isinstance(built, VLLMServerEngine):
        built.on_response = lambda row, tokens: ranks.reached("sampling")
    if config.eval.every and config.eval.through_trainer and not isinstance(built, HFEngine):
        try:  # an HFEngine did it itself
            check_sampling(model)
        except ValueError as error:
            if given is None:
                built.close()
            raise ConfigError(f"eval.through_trainer: {error}; or set it to false") from error
    return built


def for_training(config: Config, model: PreTrainedModel, *, pack: bool) -> None:
    """Set up how the model computes, in place; `pack`: it will be given packed rows."""
    settings = config.model
    if pack:
        allow_packing(model)
    if settings.experts_implementation:
        model.set_experts_implementation(settings.experts_implementation)
    model.eval()  # no dropout in RL: π_θ must be one function
    if settings.gradient_checkpointing:
        try:
            recompute_activations(model, offload=settings.offload_activations)
        except ValueError as error:
            raise ConfigError(f"model.gradient_checkpointing = true: {error}") from error


def prepare(config: Config, model: PreTrainedModel, accelerator: Accelerator) -> tuple[Any, Any, Any]:
    """Model, optimizer and scheduler as accelerate's config says: one copy, one on each rank, or sharded."""
    settings, train = config.model, config.train
    if settings.expert_parallel > 1:
        model = _share_experts(config, model, accelerator)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(),
        lr=train.lr,
        betas=train.adam_betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=True,
    )
    prepared: Any = model
    if settings.expert_parallel > 1:
        optimizer = accelerator.prepare(optimizer)
    else:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    try:
        scheduler = get_scheduler(
            train.lr_schedule,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.global_steps * train.mini_batches,
        )
    except ValueError as error:  # polynomial ends at 1e-7
        raise ConfigError(f"train.lr = {train.lr:g}: {error}") from error
    return prepared, optimizer, scheduler


def is_sharding(config: Config, accelerator: Accelerator) -> bool:
    """Whether `prepare` spreads the parameters over several processes."""
    return accelerator.num_processes > 1 and (accelerator.is_fsdp2 or config.model.expert_parallel > 1)


def _share_experts(config: Config, model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    size = config.model.expert_parallel
    if accelerator.is_fsdp2 or accelerator.num_processes == 1:
        raise ConfigError(
            f"model.expert_parallel = {size}: it needs several processes, which transformers then shards itself; use "
            "an accelerate config for DDP (scale/accelerate)"
        )
    try:
        return share_experts(model, size, bf16=accelerator.mixed_precision == "bf16")
    except ValueError as error:
        raise ConfigError(f"model.expert_parallel = {size}: {error}") from error


def warn_of_rounding(config: Config, model: torch.nn.Module, ranks: Ranks) -> None:
    """Say what share of weights in 16 bits a step can move: w + lr ≠ w only where lr is at least half a spacing of w's
    number format. AdamW's steps are about lr at most."""
    lr, moved, total = config.train.lr, 0, 0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype.itemsize == 2 and lr:
            # The spacing at w is 2^⌊log₂ |w|⌋ · ε, so this many powers of two are small enough.
            bound = 2.0 ** (math.floor(math.log2(2 * lr / torch.finfo(weight.dtype).eps)) + 1)
            part = local_part(weight)
            moved, total = moved + int((part.abs() < bound).sum()), total + part.numel()
    moved, total = ranks.all_reduce([float(moved), float(total)], "sum")
    if ranks.is_main and total and moved / total < _ENOUGH:
        warnings.warn(
            f"model.dtype = {config.model.dtype!r}, train.lr = {lr:g}: in {1 - moved / total:.0%} of the weights "
            "AdamW's step is less than half the distance to the next number, and is rounded away; set model.dtype: "
            "float32 (and let accelerate compute in bf16: mixed_precision), or raise train.lr",
            stacklevel=2,
        )
