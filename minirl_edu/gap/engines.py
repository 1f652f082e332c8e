"""Engines to measure: settings, the models and prompts they run on, and the two tables, `mechanism` and `suite`."""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from minirl_edu.gap.diagnosis import examine
from minirl_edu.gap.measurement import find_replay, measure, score
from minirl_edu.models import adopt_tokenizer, cold_starts, load_model, load_tokenizer, tiny_dense, tiny_moe
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, RolloutEngine, Sampling
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import ChainTask, make_task
from minirl_edu.tasks.base import encode_chat

VOCABULARY, LAYERS, LOGIT_SPREAD = 256, 4, 1.5
"""The random models: 4 layers, 256 tokens, logits with a standard deviation of about 1.5. At the usual initialisation
(0.02) the policy is uniform to three digits, and no two engines can disagree about it."""


@dataclass(frozen=True)
class Setting:
    """An inference engine to measure.

    engine         "hf" (transformers) or "vllm"
    dtype          what the engine computes in: "float32" or "bfloat16"
    precision      emulated rounding on top: weights and activations of every matmul on "hf", experts' weights on "vllm"
    trainer_dtype  of the training engine; the default is `dtype`
    options        further arguments of `vllm.LLM`, such as {"kv_cache_dtype": "fp8"}
    name           for tables, instead of one made of the rest

    Raises ValueError for an engine or dtype that does not exist, and for options of "hf", which has none.
    """

    engine: str = "hf"
    dtype: str = "float32"
    precision: str = "fp32"
    trainer_dtype: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if self.engine not in ("hf", "vllm"):
            raise ValueError(f"engine: {self.engine!r} is unknown; choose hf or vllm")
        object.__setattr__(self, "trainer_dtype", self.trainer_dtype or self.dtype)
        for name in ("dtype", "trainer_dtype"):
            if (value := getattr(self, name)) not in SHORT:
                raise ValueError(f"{name}: {value!r} is unknown; choose {' or '.join(SHORT)}")
        if self.engine == "hf" and self.options:
            raise ValueError(f"options: {dict(self.options)} are vLLM's; engine hf has none")
        Precision.parse(self.precision)

    @property
    def label(self) -> str:
        """A name for tables, such as `vLLM bf16, kv_cache_dtype=fp8`."""
        if self.name:
            return self.name
        name = {"hf": "transformers", "vllm": "vLLM"}[self.engine]
        parts = [f"{name} {SHORT[self.dtype]}", *(f"{key}={value}" for key, value in self.options.items())]
        if self.precision != "fp32":
            parts.append(f"experts {self.precision}" if self.engine == "vllm" else f"emulated {self.precision}")
        return ", ".join(parts)


SHORT = {"float32": "fp32", "bfloat16": "bf16"}
"""How tables write a dtype."""


def as_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """A copy of the model in that dtype, without gradients: the training engine of one setting."""
    return copy.deepcopy(model).to(getattr(torch, dtype)).requires_grad_(False).eval()  # pyright: ignore[reportArgumentType]


def open_engine(setting: Setting, model: PreTrainedModel, *, max_model_len: int, seed: int = 0) -> RolloutEngine:
    """The setting's engine on the weights of `model`; `close()` it before opening the next.

    transformers in plain fp32 or bf16 runs *other kernels* than the trainer (eager attention, a loop over the experts):
    two programs for one function, as an inference engine and a trainer are. Raises ImportError where vLLM is missing.
    """
    routes = find_replay(model) is not None
    if setting.engine == "vllm":
        from minirl_edu.rollout.vllm import VLLMEngine

        return VLLMEngine(
            model,
            dtype=setting.dtype,
            seed=seed,
            record_routes=routes,
            experts=None if setting.precision == "fp32" else Precision(setting.precision),
            max_model_len=max_model_len,
            **setting.options,
        )
    model = as_dtype(model, setting.dtype)
    if setting.precision == "fp32":
        model.set_attn_implementation("eager")
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
    return HFEngine(model, Precision.parse(setting.precision), seed=seed, record_routes=routes)


@dataclass(frozen=True)
class Workload:
    """What is sampled for one setting: `prompts(seed)` token ids, `group_size` responses each, for each of `seeds`."""

    prompts: Callable[[int], list[list[int]]]
    group_size: int = 4
    sampling: Sampling = field(default_factory=lambda: Sampling(16))
    seeds: int = 5


def run_setting(
    setting: Setting,
    models: Sequence[PreTrainedModel],
    workload: Workload,
    *,
    tick: Callable[[], Any] = int,
    examined: bool = False,
) -> dict[str, Any]:
    """Measure one engine on `workload.seeds` seeds, `models[seed]` giving the weights. `tick` is called after each.

    Returns a row in JSON types: label, the setting's fields, `seeds` (a `measure` each), `skipped` (None, or why there
    are no measurements: vLLM is not installed, or cannot run this) and, if `examined`, `diagnosis`: what `examine` says
    of the first seed.
    """
    row: dict[str, Any] = {"label": setting.label, **asdict(setting), "skipped": None, "seeds": []}
    engine: RolloutEngine | None = None
    opened: PreTrainedModel | None = None
    try:
        for seed in range(workload.seeds):
            model, prompts = models[seed], workload.prompts(seed)
            if engine is None:
                length = max(map(len, prompts)) + workload.sampling.max_new_tokens
                # Room for the longer prompts of another seed, in whole blocks.
                engine = open_engine(setting, model, max_model_len=-(-(length + 32) // 32) * 32)
            elif model is not opened:
                engine.sync(model, version=seed)
            opened = model
            rollout = engine.generate(
                prompts, group_size=workload.group_size, sampling=workload.sampling, seed=derive_seed(seed, "rollout")
            )
            trainer = as_dtype(model, setting.trainer_dtype)
            temperature = workload.sampling.temperature
            plain = score(trainer, rollout, temperature=temperature)
            replayed = score(trainer, rollout, temperature=temperature, replayed=True) if rollout.routes else None
            row["seeds"].append(measure(rollout, plain, replayed))
            if examined and seed == 0:
                exact = setting == Setting(setting.engine, trainer_dtype="float32")
                found = examine(trainer, rollout, temperature=temperature, expected_k3=1e-7 if exact else None)
                row["diagnosis"] = str(found)
            tick()
    except ImportError as error:
        row["skipped"] = f"vLLM cannot be used here: {error}"
    except Exception as error:  # whatever vLLM raises at a model or an option that it cannot run
        if setting.engine == "hf" or row["seeds"]:
            raise
        row["skipped"] = f"vLLM refused: {(str(error) or repr(error)).splitlines()[0]}"
    finally:
        if engine is not None:
            engine.close()
    return row


def random_model(architecture: str, seed: int) -> PreTrainedModel:
    """A random Qwen3 with a policy that is not flat: "moe" (8 experts, top-2, 1.0 M parameters) or its "dense" twin.

    Every matrix is scaled to a gain of one (standard deviation 1/√fan-in), the tied embedding so that the logits have a
    standard deviation of about `LOGIT_SPREAD`.
    """
    if architecture == "moe":
        model = tiny_moe(VOCABULARY, seed=seed, layers=LAYERS, expert_hidden=64)
    else:
        model = tiny_dense(VOCABULARY, seed=seed, layers=LAYERS, ffn_hidden=128)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                gain = LOGIT_SPREAD if parameter is embedding else 1.0
                parameter.mul_(gain / (math.sqrt(parameter.shape[-1]) * parameter.std()))
    return model


def random_prompts(seed: int, count: int = 16, length: int = 16) -> list[list[int]]:
    """Prompts of random token ids for the random models."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "problems"))
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


RANDOM = {"tiny-moe": "moe", "tiny-dense": "dense"}
"""Names of the random models: another model for each seed."""


def models_for(name: str, seeds: int) -> list[PreTrainedModel]:
    """The weights of each seed: random models of `RANDOM`, or the one pretrained model called `name`, with its
    tokenizer's end tokens and without the ids that its tokenizer does not know, as a run trains it.

    Raises ValueError as `load_model`.
    """
    if name in RANDOM:
        return [random_model(RANDOM[name], seed) for seed in range(seeds)]
    model = load_model(name)
    adopt_tokenizer(model, load_tokenizer(name))
    return [model] * seeds


def prompts_for(name: str, task: str | None, count: int) -> Callable[[int], list[list[int]]]:
    """`count` prompts by seed: problems of `task`; without one random ids for the random models, problems of `chain`
    for a cold start, and short questions of arithmetic, through its chat template, for any other model.

    Raises ValueError as `make_task`.
    """
    if task is None and name in RANDOM:
        return lambda seed: random_prompts(seed, count)
    if task is None and name not in cold_starts():
        tokenizer = load_tokenizer(name)

        def questions(seed: int) -> list[list[int]]:
            drawn = np.random.default_rng(seed).integers(10, 100, (count, 3))
            texts = [f"What is {a} + {b} × {c}? Explain each step." for a, b, c in drawn.tolist()]
            return [encode_chat(tokenizer, text) for text in texts]

        return questions
    problems = ChainTask() if task in (None, "chain") else make_task(str(task), tokenizer=load_tokenizer(name))
    return lambda seed: [problems.encode(problem) for problem in problems.sample(count, seed=seed)]


def usual_workload(name: str, seeds: int | None) -> Workload:
    """What is sampled of a model unless something else is asked for: 16 × 4 responses of 16 tokens and 5 seeds for the
    tiny ones, 8 × 4 of 32 and 3 seeds for others."""
    if name in RANDOM or name in cold_starts():
        return Workload(prompts_for(name, None, 16), seeds=seeds or 5)
    return Workload(prompts_for(name, None, 8), sampling=Sampling(32), seeds=seeds or 3)


def vllm_missing() -> str | None:
    """Why vLLM cannot be used, in one line that says how to install it; None where it can."""
    from minirl_edu.rollout.vllm import check_vllm

    try:
        check_vllm()
    except ImportError as error:
        return str(error)
    return None


def mechanism(engine: str, seeds: int) -> list[dict[str, Any]]:
    """The paper's mechanism: random Mixture-of-Experts models and their dense twins, in fp32 and in bf16.

    Both engines compute in the same dtype from the same weights. Rows as `run_setting`, with `architecture`.
    """
    rows = []
    with tqdm(total=4 * seeds, desc="gap", unit="rollout") as bar:
        for dtype in SHORT:
            for architecture in ("moe", "dense"):
                setting = Setting(engine, dtype)
                models = models_for(f"tiny-{architecture}", seeds)
                bar.set_postfix_str(f"{architecture} {setting.label}")
                row = run_setting(setting, models, Workload(random_prompts, seeds=seeds), tick=bar.update)
                name = {"moe": "MoE", "dense": "dense"}[architecture]
                rows.append(row | {"architecture": architecture, "label": f"{name}, {row['label']}"})
    return rows


EMULATED = ("fp8_e4m3", "fp8_e5m2", "mxfp4", "int8", "int4", "int3/int4")
"""The emulated engines of the suite, beside fp32 and bf16."""


def suite_settings(*, moe: bool) -> list[Setting]:
    """The engines that `suite` compares. Rows of one dtype have a trainer of that dtype; emulated ones one in fp32."""
    attention = {"quantization": "online", "quantization_config": {"targets": {"*.self_attn.*_proj": "fp8_per_block"}}}
    vllm: list[dict[str, Any]] = [
        {},
        {"options": {"kv_cache_dtype": "fp8"}, "name": "vLLM bf16, fp8 KV cache"},
        {"options": attention, "name": "vLLM bf16, fp8 attention projections"},
    ]
    experts = [{"precision": precision} for precision in ("fp8_e4m3", "int8", "int4")] if moe else []
    return [
        *(Setting("hf", dtype) for dtype in SHORT),
        *(Setting("hf", precision=precision) for precision in EMULATED),
        Setting("vllm", "float32"),
        *(Setting("vllm", "bfloat16", **arguments) for arguments in [*vllm, *experts]),
    ]


def suite(name: str, out: Path, workload: Workload) -> list[dict[str, Any]]:
    """All engines of `suite_settings` on one model.

    Each row is written to `out`/rows as it finishes; a row that is there already, measured alike, is not measured
    again. Rows that were skipped are tried again.
    """
    models = models_for(name, workload.seeds)
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm(suite_settings(moe=find_replay(models[0]) is not None), desc=f"gap, {name}", unit="engine") as bar:
        for setting in bar:
            bar.set_postfix_str(setting.label)
            key = {"model": name, **asdict(setting), "count": workload.seeds, "group_size": workload.group_size}
            key |= {"prompts": len(workload.prompts(0)), "sampling": asdict(workload.sampling)}
            file = folder / (_slug(f"{name} {setting.label}") + ".json")
            row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if row.get("key") != key or row["skipped"]:
                row = {"key": key, "model": name, **run_setting(setting, models, workload)}
                write_json(file, row)
            rows.append(row)
    return rows


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in text).split())


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
