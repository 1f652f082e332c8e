"""The plan of a run, and what to change where it does not fit."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from minirl_edu.config import Config
from minirl_edu.plan.memory import PHASES, PLACES, Item, engine_memory, host_memory, trainer_memory
from minirl_edu.plan.setting import Cluster, Setting, complete
from minirl_edu.plan.sizes import Number, kv_cache_bytes
from minirl_edu.plan.time import MFU, expected_seconds, seconds_of, traffic_of
from minirl_edu.rollout import NOT_EMULATED, VLLM_DTYPES


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes and seconds are those of one GPU and one global step.

    setting  what was planned for, completed     memory   see `Item` and `peak`
    sizes    counts and bytes per token          seconds  lower bounds
    traffic  bytes received (by rank 0: sent)    host     bytes of a machine's own memory
    notes    what to know beside the numbers     expected seconds, by measured and assumed efficiencies
    """

    setting: dict[str, Any]
    sizes: dict[str, Number]
    memory: tuple[Item, ...]
    seconds: dict[str, Number]
    expected: dict[str, Number]
    traffic: dict[str, Number]
    host: dict[str, Number]
    notes: tuple[str, ...]

    def phases(self, place: str) -> list[str]:
        """The phases in which a place holds something beside what it always does."""
        own = {item.phase for item in self.memory if item.place == place}
        return [phase for phase in PHASES[1:] if phase in own]

    def items(self, phase: str, place: str = "trainer") -> list[Item]:
        """What takes memory in a phase: its own items and those of `always`. Where freed memory stays with the process
        (on CPUs), also those of the phases before it."""
        before = PHASES[: PHASES.index(phase)] if self.setting["keeps_freed"] else ()
        return [item for item in self.memory if item.place == place and item.phase in {"always", phase, *before}]

    def peak(self, place: str = "trainer") -> Number:
        """The most bytes that are taken at a time."""
        return max(sum(item.bytes for item in self.items(phase, place)) for phase in PHASES)

    @property
    def fits(self) -> bool:
        """Whether each GPU has that much."""
        return max(map(self.peak, PLACES)) <= self.setting["memory"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        memory, peaks = [item._asdict() for item in self.memory], {place: self.peak(place) for place in PLACES}
        return {**asdict(self), "memory": memory, "peak": peaks, "fits": self.fits}


def plan(
    config: Config,
    cluster: Cluster,
    *,
    prompt_tokens: int | None = None,
    response_tokens: Number | None = None,
    mfu: float = MFU,
) -> Plan:
    """What a run of `config` on `cluster` will need.

    prompt_tokens    P. None: the longest of 256 problems of the task; `PROMPT_TOKENS`, with a note, if the model is one
                     of `models.ARCHITECTURES` whose tokenizer the task needs from the hub
    response_tokens  mean length of the responses, for times and traffic; memory is planned for the longest that are
                     allowed. None: that, too
    mfu              of training, for the expected times, see `time.MFU`

    Raises ConfigError for settings that exclude each other, and for a model, tokenizer or task that is not at hand.
    """
    s = complete(config, cluster, prompt_tokens, response_tokens)
    engine, at_once = engine_memory(s, trainer := trainer_memory(s))
    traffic = traffic_of(s)
    bounds = seconds_of(s, traffic, at_once)
    per_token = s.rollout_bytes
    return Plan(
        setting={
            **{"model": config.model.name, "hardware": cluster.hardware.name, "gpus": s.gpus, "memory": s.memory},
            **{"sharding": s.sharding, "mixed_precision": s.mixed_precision, "placement": s.placement},
            **{"server_gpus": s.server_gpus, "prompt_tokens": s.prompt_tokens, "max_new_tokens": s.max_new_tokens},
            **{"response_tokens": s.response_tokens, "at_once": at_once, "micro_batch": s.batch._asdict()},
            **{"keeps_freed": cluster.hardware.keeps_freed, "mfu": mfu},
        },
        sizes={
            "parameters": s.model.total,
            "without embeddings": s.model.non_embedding,
            "active": s.model.active,
            "active, without input embedding": s.model.multiplied,
            "bytes per token of the KV cache": kv_cache_bytes(s.model.config, 1, s.kv_itemsize),
            **{f"bytes per token of a rollout, {name}": size for name, size in per_token.items()},
        },
        memory=(*trainer, *engine),
        seconds=bounds,
        expected=expected_seconds(s, bounds, mfu),
        traffic=traffic,
        host=host_memory(s),
        notes=tuple(_notes(s, at_once)),
    )


def _notes(s: Setting, at_once: int) -> Iterator[str]:
    config, engine = s.config, s.config.rollout.engine
    if engine == "vllm_server" and s.placement == "colocated" and not config.rollout.options.get("sleep"):
        yield "a server on the trainer's GPUs has to sleep between rollouts: rollout.options.sleep: true"
    if s.assumed:
        yield (
            f"prompts of {s.prompt_tokens} tokens are assumed: the tokenizer of {config.model.name} would have to come "
            "from the hub; --prompt-tokens says better"
        )
    if at_once < s.responses:
        yield f"the KV cache holds {at_once} of {s.responses} responses of the mean length at a time; the rest wait"
    if engine == "hf" and s.gpus > 1:
        yield "the engine hf samples on rank 0 alone, while the others wait"
    if s.model.num_experts and s.mixed_precision == "bf16" and not s.sharded and s.master == 4:
        yield "without FSDP2, transformers multiplies experts in the weights' fp32: autocast does not reach them"
    if s.batch.columns > config.train.tokens_per_micro_batch:
        budget = config.train.tokens_per_micro_batch
        yield f"a row of {s.batch.columns} tokens exceeds train.tokens_per_micro_batch: {budget}, and cannot be cut"


MOST_GPUS = 4096
"""Where the search for a number of GPUs ends."""


class Remedy(NamedTuple):
    """A change, what the fullest GPU takes after it, and whether it fits then."""

    change: str
    peak: Number
    fits: bool


def remedies(
    config: Config, cluster: Cluster, *, prompt_tokens: int | None = None, response_tokens: Number | None = None
) -> list[Remedy]:
    """What to change so that `plan` of the same arguments fits, cheapest first; empty if it fits.

    Each line keeps the changes of those before it, until it fits. The last ones say how many GPUs it takes otherwise:
    with nothing else changed, and with all that. What would save nothing is left out.
    """
    now = plan(config, cluster, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    if now.fits:
        return []
    lengths = {"prompt_tokens": now.setting["prompt_tokens"], "response_tokens": response_tokens}
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=now.setting["max_new_tokens"]))
    asked, found = (config, cluster), list[Remedy]()
    for change, edit in _changes(config, cluster, now):
        changed = edit(config, cluster)
        then = plan(*changed, **lengths)
        if _excess(then) < _excess(now):
            (config, cluster), now = changed, then
            if found and found[-1].change.split(":")[0] == change.split(":")[0]:
                found.pop()  # the same field, changed further
            found.append(Remedy(change, fullest(now), now.fits))
        if now.fits:
            break
    if cluster.hardware.name != "cpu":
        others = _more_gpus(*asked, lengths, "")
        if found and not now.fits:
            others += _more_gpus(config, cluster, lengths, ", and all of the above")
        found += others
    return found


def fullest(plan: Plan) -> Number:
    """Bytes of the fullest GPU of any place."""
    return max(map(plan.peak, PLACES))


def _excess(plan: Plan) -> float:
    """Bytes that are missing, summed over phases: a change may help one that is not the worst."""
    taken = (sum(item.bytes for item in plan.items(phase, place)) for place in PLACES for phase in PHASES)
    return sum(max(0.0, size - plan.setting["memory"]) for size in taken)


_Edit = Callable[[Config, Cluster], tuple[Config, Cluster]]


def _changes(config: Config, cluster: Cluster, now: Plan) -> Iterator[tuple[str, _Edit]]:
    """What to try, in this order."""

    def change(section: str, *, machine: dict[str, Any] | None = None, **fields: Any) -> _Edit:
        return lambda config, cluster: (
            replace(config, **{section: replace(getattr(config, section), **fields)}),
            replace(cluster, **(machine or {})),
        )

    if now.setting["sharding"] == "ddp":
        yield "fsdp2 instead of ddp", lambda config, cluster: (config, replace(cluster, sharding="fsdp2"))
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", change("model", gradient_checkpointing=True)
    budget, row = config.train.tokens_per_micro_batch, now.setting["prompt_tokens"] + now.setting["max_new_tokens"] - 1
    while budget > row:
        budget = max(budget // 2, row)
        yield f"train.tokens_per_micro_batch: {budget}", change("train", tokens_per_micro_batch=budget)
    if not config.model.offload_activations:
        yield (
            "model.offload_activations: true",
            change("model", gradient_checkpointing=True, offload_activations=True),
        )
    if config.eval.every and config.eval.through_trainer:
        yield "eval.through_trainer: false", change("eval", through_trainer=False)
    if config.model.dtype == "float32":
        words = "model.dtype: bfloat16, mixed precision no (small steps of Adam's get lost in rounding)"
        yield words, change("model", dtype="bfloat16", machine={"mixed_precision": "no"})
    if cluster.hardware.name == "cpu" or now.setting["placement"] == "separate":
        return
    precision = config.rollout.precision if config.rollout.precision in VLLM_DTYPES else "bf16"
    server = {"engine": "vllm_server", "precision": precision, **NOT_EMULATED}
    options = {name: v for name, v in config.rollout.options.items() if name == "kv_cache_dtype"}
    yield (
        "a vLLM server on GPUs of its own",
        change("rollout", **server, options=options, machine={"placement": "separate"}),
    )


def _more_gpus(config: Config, cluster: Cluster, lengths: dict[str, Any], words: str) -> list[Remedy]:
    """The smallest number of GPUs on which it fits, a multiple of `model.expert_parallel`; nothing if none is."""
    if config.rollout.engine == "vllm":
        return []
    step = config.model.expert_parallel

    @lru_cache
    def on(count: int) -> Plan:
        return plan(config, replace(cluster, gpus=count * step, sharding="fsdp2"), **lengths)

    low, high = cluster.gpus // step, 2 * cluster.gpus // step  # on low it does not fit
    if not on(MOST_GPUS // step).fits:
        return []
    while not on(high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if on(middle).fits else (middle, high)
    return [Remedy(f"{high * step} GPUs instead of {cluster.gpus}, fsdp2{words}", fullest(on(high)), True)]
