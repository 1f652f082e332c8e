"""Bytes that travel and seconds that pass in a global step: arithmetic, no product faster than the chip's peak."""

import math

from transformers import PreTrainedConfig

from minirl_edu.plan.setting import Setting
from minirl_edu.plan.sizes import Number, attention_spans, heads_of, kv_cache_bytes

MFU = 0.1
"""Model FLOPs that training makes over what the chips could make meanwhile, if nobody says better.

Model FLOPs count 6 a parameter and token, attention as well, and nothing twice for recomputed activations. prime-rl
reports 0.029 for RL of Qwen3-30B-A3B on 8 H100 at 16k tokens (6.1k tokens/s), and 35k tokens/s for fine-tuning on 8
H200. One H200 reached 0.28 on four layers of that model, alone and without sharding (`row32k` of
`scale/results/gpu-h200-2026-11-26.jsonl`: 370 TFLOP/s with recomputation).
"""
SAMPLING = 0.5
"""Share of the roofline that a rollout engine reaches: an assumption."""
FILE_RATE = 1.56e9
"""Bytes/s of weights into a file, and of a file into an engine (`stream` of the same results)."""
JSON_SECONDS = 0.9 / 32768
"""Of rank 0's Python for a token with its experts that a vLLM server sends as JSON: an assumption on the safe side. It
was seen once, for the whole client; to parse and decode such an answer alone took 0.1 to 0.3 s for 32,768 tokens."""


def token_slots(s: Setting) -> Number:
    """Tokens that a GPU feeds through the model in one pass over its share of a global step."""
    fed, size = s.response_tokens - 1, s.config.train.group_size
    copies = 1 if s.batch.kind == "shared" else size  # of a prompt
    return s.prompts / s.gpus * (copies * s.prompt_tokens + size * fed)


def old_passes(s: Setting) -> float:
    """Forwards for π_old over the share of a global step: all mini-batches' but the first's."""
    count = s.config.train.mini_batches
    return (count - 1) / count


def traffic_of(s: Setting) -> dict[str, Number]:
    """Bytes per GPU and global step."""
    config, model, n, ep, old = s.config, s.model, s.gpus, s.config.model.expert_parallel, old_passes(s)
    found: dict[str, Number] = {}
    others = (n - 1) / n
    if s.sharded:
        micro_batches = max(token_slots(s) / (s.batch.rows * s.batch.columns), config.train.mini_batches)
        dense, experts = (model.total - model.experts) * others, model.experts / ep * (1 - ep / n)
        gathered = (dense + experts) * s.compute * micro_batches
        found["all-gather of weights"] = gathered * (old + 2)  # forward and backward
        found["reduce-scatter of gradients"] = gathered
    elif n > 1:
        found["all-reduce of gradients"] = 2 * model.total * s.master * others * config.train.mini_batches
    if ep > 1:
        passes = old + (3 if config.model.gradient_checkpointing else 2)
        pairs = token_slots(s) * model.top_k * model.moe_layers * (1 - 1 / ep)
        found["all-to-all of tokens"] = 2 * pairs * model.config.hidden_size * s.compute * passes  # there and back
    if n > 1:
        tokens = s.responses * (s.prompt_tokens + s.response_tokens)
        found["rollout, scattered by rank 0"] = tokens * sum(s.rollout_bytes.values()) * others
        found["log-probabilities, gathered by rank 0"] = 12 * s.responses * s.response_tokens * others
    found["weights to the engine, by rank 0"] = model.total * s.engine
    if s.sharded:
        found["weights made whole for that"] = model.total * s.master * others
    return found


def attention_flops(config: PreTrainedConfig, length: Number) -> Number:
    """FLOPs of a token's attention to `length` tokens: 4 · heads · head_dim for each that it sees in each layer."""
    heads, _, head_dim = heads_of(config)
    return 4 * heads * head_dim * sum(attention_spans(config, length))


def seconds_of(s: Setting, traffic: dict[str, Number], at_once: int) -> dict[str, Number]:
    """Lower bounds for the parts of a global step, for all of it, and for an evaluation, which comes on top."""
    config, model, hardware = s.config, s.model, s.hardware
    flops = {2: hardware.bf16, 4: hardware.fp32}
    prompt, response = s.prompt_tokens, s.response_tokens
    per_token = 2 * model.multiplied
    reading, tokens = sampling_seconds(s, s.prompts, s.responses, at_once)
    # Per token 2 FLOPs a parameter forward, 4 backward, 2 for the forward again under checkpointing.
    seen = s.batch.columns if s.batch.kind == "shared" else (prompt + response) / 2
    forward = token_slots(s) * (per_token + attention_flops(model.config, seen)) / flops[s.compute]
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    state = model.total * s.master / (s.gpus if s.sharded else 1)
    # A ring through several machines crosses their borders over all of a machine's adapters.
    one_machine = s.gpus <= hardware.per_node
    ring = hardware.nvlink if one_machine else min(hardware.nvlink, hardware.per_node * hardware.network)
    pairs = hardware.nvlink if config.model.expert_parallel <= hardware.per_node else hardware.network
    to_engine = hardware.nvlink if s.placement == "colocated" else hardware.network
    kinds = {name.split()[0]: size for name, size in traffic.items()}
    collectives = sum(kinds.get(kind, 0.0) for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    found = {
        "rollout: prompts": reading,
        "rollout: tokens": tokens,
        "π_old": old_passes(s) * forward,
        "update": forward * (4 if config.model.gradient_checkpointing else 3),
        "optimizer": config.train.mini_batches * 7 * state / hardware.bandwidth,
        "communication": collectives / ring + kinds.get("all-to-all", 0.0) / pairs,
        "sync": model.total * s.engine / to_engine + traffic.get("weights made whole for that", 0.0) / ring,
    }
    hidden = min(found["communication"], found["π_old"] + found["update"])  # at best behind the computation
    return {**found, "global step": sum(found.values()) - hidden, **evaluation_seconds(s, at_once)}


def expected_seconds(s: Setting, bounds: dict[str, Number], mfu: float) -> dict[str, Number]:
    """What a global step is likely to take. The trainer's parts by `mfu`, which holds imbalance and communication;
    sampling by `SAMPLING`; answers with routes as JSON, which one process reads; weights through a file or by NCCL."""
    config, model, hardware = s.config, s.model, s.hardware
    fed = (s.prompt_tokens + s.response_tokens) / 2
    forward = token_slots(s) * (2 * model.multiplied + attention_flops(model.config, fed))
    peak = mfu * {2: hardware.bf16, 4: hardware.fp32}[s.compute]
    server = config.rollout.engine == "vllm_server"
    by_file = config.rollout.options.get("transfer", "file") == "file"
    found = {
        "rollout": (bounds["rollout: prompts"] + bounds["rollout: tokens"]) / SAMPLING,
        "answers as JSON": s.responses * s.response_tokens * JSON_SECONDS if server and config.engine_routes else 0.0,
        "π_old": old_passes(s) * forward / peak,
        "update": 3 * forward / peak,
        "optimizer": bounds["optimizer"],
        "sync": 2 * model.total * s.engine / FILE_RATE if server and by_file else bounds["sync"],
    }
    return {**found, "global step": sum(found.values())}


def sampling_seconds(
    s: Setting, prompts: int, responses: int, at_once: int, *, by_trainer: bool = False
) -> tuple[Number, Number]:
    """Reading the prompts and writing the responses, `at_once` of them at a time, by the rollout engine or by one GPU's
    whole copy of the trainer's model."""
    model, hardware = s.model, s.hardware
    prompt, response = s.prompt_tokens, s.response_tokens
    gpus, itemsize, kv_itemsize = (1, s.loaded, s.loaded) if by_trainer else (s.server_gpus, s.engine, s.kv_itemsize)
    flops = {2: hardware.bf16, 4: hardware.fp32}[itemsize] * gpus
    per_token = 2 * model.multiplied
    reading = prompts * prompt * (per_token + attention_flops(model.config, prompt / 2))
    # Each decoding step reads the experts that some token of the batch needs, all other weights, and the KV cache.
    context = prompt + response / 2
    missed = (1 - model.top_k / max(model.num_experts, 1)) ** at_once
    weights = model.total - (model.embedding if model.head else 0) - model.experts * missed
    read = weights * itemsize + at_once * kv_cache_bytes(model.config, context, kv_itemsize)
    products = at_once * (per_token + attention_flops(model.config, context))
    step = max(read / (hardware.bandwidth * gpus), products / flops)
    return reading / flops, math.ceil(responses / at_once) * response * step


def evaluation_seconds(s: Setting, at_once: int) -> dict[str, Number]:
    """An evaluation through the rollout engine and, with `eval.through_trainer`, by the trainer's model; nothing
    without evaluations. `at_once`: responses of a rollout that the engine samples at a time."""
    config, found = s.config, dict[str, Number]()
    if not config.eval.every:
        return found

    def through(*, by_trainer: bool) -> Number:
        waits = not by_trainer and at_once < s.responses
        seconds: Number = 0
        for size in config.evaluation_rounds:
            responses = config.eval.problems * size
            most = min(at_once, responses) if waits else responses
            seconds += sum(sampling_seconds(s, config.eval.problems, responses, most, by_trainer=by_trainer))
        return seconds

    found["evaluation, rollout engine"] = through(by_trainer=False)
    if config.eval.through_trainer:
        found["evaluation, trainer"] = through(by_trainer=True)
    return found
