"""One YAML file, one tree of dataclasses: everything that a training run can be told.

Each section checks its fields when it is built, so a file, an override on the command line and Python code get the
same errors, and an unknown key is refused rather than ignored. The defaults train the `chain` task on a laptop CPU.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from math import inf, isinf
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from minirl_edu.advantages import ADVANTAGES
from minirl_edu.objectives import CORRECTIONS, OBJECTIVES
from minirl_edu.recipes import recipes


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the dotted field, the value seen and what would be right."""


class _Bound(NamedTuple):
    holds: Callable[[float], bool]  # False for NaN, as every comparison with it is
    expected: str


@dataclass(frozen=True, eq=False)
class _OneOf:
    names: Mapping[str, Any]
    """A table that is read when a value is checked: what was added to it counts."""


_Count = Annotated[int, _Bound(lambda n: n >= 1, "an integer of at least 1")]
_CountOrZero = Annotated[int, _Bound(lambda n: n >= 0, "an integer of at least 0")]
_Seed = Annotated[int, _Bound(lambda n: 0 <= n < 2**63, "an integer from 0 to below 2**63")]
_GroupSize = Annotated[
    int,
    _Bound(lambda n: n >= 2, "at least 2: an advantage is a reward minus its group's mean, always 0 in a group of one"),
]
_Positive = Annotated[float, _Bound(lambda x: 0 < x < inf, "a number above 0")]
_PositiveOrInf = Annotated[float, _Bound(lambda x: x > 0, "a number above 0, or .inf")]
_NonNegative = Annotated[float, _Bound(lambda x: 0 <= x < inf, "a number of at least 0")]
_Beta = Annotated[float, _Bound(lambda x: 0 <= x < 1, "a number from 0 to below 1")]


class _Section:
    """Checks every field against its annotation at construction."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = _checked(getattr(self, name), hint, ".".join(filter(None, (section, name))))
            object.__setattr__(self, name, value)  # the sections are frozen for everyone else


@dataclass(frozen=True)
class TaskConfig(_Section):
    """What the model is asked to do."""

    name: str = "chain"
    """A task of `minirl_edu.tasks`, or a class of your own as `my_package.my_module:MyTask`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that task; the task checks them."""


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The policy that is trained."""

    name: str = "chain-steps"
    """A cold start shipped with the package, a hub id or a local path."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in the training engine; log-probabilities are float32 whatever it is."""
    attn_implementation: str = "sdpa"
    """As in transformers' `from_pretrained`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """Hold what `gradient_checkpointing` keeps of each layer in pinned host memory: less memory of the GPU, and two
    copies for each layer."""
    experts_implementation: Literal["eager", "batched_mm", "grouped_mm"] | None = None
    """How experts multiply, as in transformers' `set_experts_implementation`; None: its default."""
    expert_parallel: _Count = 1
    """Processes that share the experts of each layer (transformers' `DistributedConfig`); 1: every process has all."""
    random: bool = False
    """Draw the weights from `seed` instead of loading them, to test a machine; `name` is then an architecture (one of
    `minirl_edu/architectures`, a local folder or a hub id)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Other values for the fields of the model's own config, such as `num_hidden_layers: 2`; with `random` only."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for code that was read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overrides and not self.random:
            raise ConfigError(
                f"model.overrides = {self.overrides!r}: weights that are loaded fix the sizes; set model.random: true"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise ConfigError(
                "model.offload_activations = True: it is for what gradient checkpointing keeps; set "
                "model.gradient_checkpointing: true"
            )


@dataclass(frozen=True)
class RolloutConfig(_Section):
    """The inference engine, whose policy is μ_old."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """hf: transformers with emulated low precision; vllm: vLLM in this process; vllm_server: a running `vllm serve`."""
    precision: str = "fp8_e4m3"
    """Number format that the engine computes in. hf: see `minirl_edu.precision`, or two formats as
    `WEIGHTS/ACTIVATIONS`, such as `int3/int4`, or three as `WEIGHTS/ACTIVATIONS/ROUTERS`, such as `fp32/fp32/int4`.
    vLLM: bf16, fp16 or fp32; its other formats are among its options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the vLLM engines, such as `kv_cache_dtype: fp8` or `url: http://127.0.0.1:8000` (or a
    list of servers); see `minirl_edu.rollout`."""
    rounding: Literal["nearest", "stochastic", "frozen"] = "nearest"
    """How values reach that format. Nearest errs the same way each time, which training can learn to compensate;
    stochastic is unbiased, with other draws at every sync; frozen keeps the first draws, so that random errors come
    back each time, too."""
    router_noise: _NonNegative = 0.0
    """Noise on what the MoE routers read, and on nothing else (hf): Gaussian, so many times the root mean square of a
    token's input, drawn anew for each token. The engine is exact but for the experts that it chooses."""
    head_precision: str = "fp32"
    """Number format of the output head's product (hf), which `precision` leaves alone: an error on the logits."""
    temperature: _Positive = 1.0
    """Divides the logits, in sampling and in the trainer alike. There is no top-p or top-k: what they cut off, no
    importance weight brings back."""
    max_new_tokens: _Count | None = None
    """Tokens per response, the end token included. None: the task's own limit."""
    max_prompt_tokens: _Count | None = None
    """Longest prompt in use. None: what the model's positions, or vLLM's `max_model_len`, leave beside
    `max_new_tokens`, which bounds it anyway."""
    on_overlong: Literal["drop", "stop"] = "drop"
    """What to do about a longer one: take another problem in its place and count it, or stop."""
    on_fault: Literal["stop", "drop"] = "stop"
    """What to do about a response that cannot be trained on (log-probabilities that are no numbers, routes that are
    missing or of the wrong length): stop, or drop its group and count it."""
    measure_flips: bool = True
    """Log `routing_flip_rate` of a Mixture-of-Experts. For that the engine has to return the experts that it chose also
    where `algorithm.replay` does not need them (R3 does). They take a byte per token, layer and expert in its answers
    and in memory: 384 a token for Qwen3-30B-A3B. A vLLM server returns them if it was started with `--routes`."""


@dataclass(frozen=True)
class AlgorithmConfig(_Section):
    """What is optimised: equation (7) of the paper with its ablations, or an algorithm that the paper compares with."""

    objective: Annotated[str, _OneOf(OBJECTIVES)] = "minirl"
    """A loss of `minirl_edu.objectives.OBJECTIVES`."""
    advantages: Annotated[str, _OneOf(ADVANTAGES)] | None = None
    """One of `minirl_edu.advantages.ADVANTAGES`. None: the objective's own, `group_mean` for minirl and
    `group_mean_std` for grpo and cispo."""
    eps_low: _Positive | None = None
    """Clip where r = π_θ/π_old < 1 − eps_low. None: the objective's own (0.2 for minirl)."""
    eps_high: _PositiveOrInf | None = None
    """Clip where r = π_θ/π_old > 1 + eps_high. None: the objective's own (0.27 for minirl)."""
    is_cap: _PositiveOrInf = 5.0
    """Largest importance weight π_θ/μ_old (minirl); `.inf` for none."""
    clip: bool = True
    """False: M = 1, every token counts (minirl). What the clip would drop is still recorded."""
    is_correction: bool = True
    """False: π_old/μ_old is taken as 1, only the staleness π_θ/π_old is corrected (minirl)."""
    correction: Annotated[str, _OneOf(CORRECTIONS)] = "token_truncated"
    """Which weight corrects the discrepancy π_old/μ_old (minirl), of `minirl_edu.objectives.CORRECTIONS`. The default
    is the paper's; `none` is the same as `is_correction: false`."""
    length_norm: bool = False
    """True: divide a response's sum over tokens by its length (minirl)."""
    replay: Literal["none", "R2", "R3"] = "none"
    """Experts used in gradient updates. R2: the training engine's at θ_old; R3: the inference engine's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_correction and self.correction not in ("token_truncated", "none"):
            raise ConfigError(
                f"algorithm.correction = {self.correction!r}: algorithm.is_correction: false leaves every correction "
                "out; drop one of the two"
            )
        taken = inspect.signature(OBJECTIVES[self.objective].loss).parameters
        for own in fields(self):
            value = getattr(self, own.name)
            if own.name not in {"objective", "advantages", "replay", *taken} and value != own.default:
                raise ConfigError(
                    f"algorithm.{own.name} = {value!r}: algorithm.objective {self.objective!r} does not take it; leave "
                    "it out, or choose another objective"
                )


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop. A global step samples mini_batches × mini_batch_prompts prompts, then makes mini_batches
    gradient steps."""

    global_steps: _Count = 100
    """Rollouts, each followed by mini_batches gradient steps."""
    mini_batch_prompts: _Count = 32
    """Prompts per gradient step."""
    group_size: _GroupSize = 8
    """G, responses per prompt."""
    mini_batches: _Count = 1
    """N, gradient steps per rollout; 1 is on-policy. The mini-batch keeps its size while N varies."""
    lr: _NonNegative = 3e-4
    """Peak learning rate of AdamW, per gradient step."""
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "constant"
    """A scheduler of transformers, counted in gradient steps. Under `constant`, `constant_with_warmup` and
    `inverse_sqrt` a run can be resumed for longer; under the others the rate depends on `global_steps`, which then
    stays."""
    warmup_steps: _CountOrZero = 0
    """Gradient steps until lr is reached."""
    adam_betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """AdamW's two rates of forgetting: of the gradient's mean, and of its mean square."""
    adam_eps: _Positive = 1e-8
    """Added to AdamW's denominator. A larger value keeps Adam from turning a vanishing gradient into full steps."""
    weight_decay: _NonNegative = 0.0
    """AdamW's, decoupled: a weight loses lr × weight_decay of itself per gradient step."""
    max_grad_norm: _PositiveOrInf = 1.0
    """The gradient's norm is scaled down to this; `.inf` for never."""
    tokens_per_micro_batch: _Count = 1536
    """Padded tokens in one forward and backward: bounds memory, does not change the gradient."""
    zero_advantage_backward: bool = False
    """True: run the backward pass also of groups whose responses were all rewarded alike. Their advantages are 0 and so
    is their gradient: without it they get a forward only, for the metrics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_schedule == "constant" and self.warmup_steps:
            raise ConfigError(
                f"train.warmup_steps = {self.warmup_steps}: train.lr_schedule 'constant' ignores it; "
                "use 'constant_with_warmup'"
            )


@dataclass(frozen=True)
class EvalConfig(_Section):
    """Held-out problems, solved while training."""

    every: _CountOrZero = 10
    """Global steps between evaluations; 0: never."""
    problems: _Count = 256
    """Held-out problems of an evaluation: more make the score less noisy."""
    samples: _Count = 1
    """Responses to each of them, over which the score is the mean; where problems are few, more make it less noisy. The
    engine draws at most as many at a time as in a global step, but at least one to each problem."""
    through_trainer: bool = True
    """Score them by the training engine in full precision too, not only through the rollout engine. Of a sharded model
    that takes a whole copy on rank 0."""


@dataclass(frozen=True)
class OutputConfig(_Section):
    """What a run leaves behind."""

    save_every: _CountOrZero = 20
    """Global steps between checkpoints; 0: only after the last one."""
    keep_last: _Count = 2
    """Checkpoints kept."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate that also get the metrics, such as `tensorboard` or `wandb`; each has to be installed."""


@dataclass(frozen=True)
class RanksConfig(_Section):
    """Several processes (ranks), as `accelerate launch` starts them."""

    wait: _Positive = 7200.0
    """Seconds that one rank waits for another before it gives up. The others wait for the first during a rollout."""
    silent: _Positive = 60.0
    """Seconds without a sign of life after which a rank counts as dead: the others name it and stop."""
    stalled: _Positive = 3600.0
    """Seconds in which no rank gets on to something new (an answer of the server, verifying, a micro-batch, a gradient
    step, weights, a checkpoint) after which all stop and say where they were. Half an hour is about what 32,768 tokens
    take at 18 a second; the default is twice that."""


@dataclass(frozen=True)
class Config(_Section):
    """A whole run. `Config()` is the quickstart; read one from YAML with `load_config`."""

    seed: _Seed = 0
    """Source of all randomness of the run."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    @property
    def evaluation_rounds(self) -> list[int]:
        """How many of the `eval.samples` responses to each held-out problem are drawn at a time: together at most as
        many as a global step's, but at least one to each problem."""
        train = self.train
        responses = train.mini_batches * train.mini_batch_prompts * train.group_size
        size = max(1, responses // self.eval.problems)
        rounds, rest = divmod(self.eval.samples, size)
        return [size] * rounds + [rest] * (rest > 0)

    @property
    def engine_routes(self) -> bool:
        """Whether the rollout engine of a Mixture-of-Experts has to say which experts it chose."""
        return self.algorithm.replay == "R3" or self.rollout.measure_flips

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Config":
        """Build from nested mappings, as YAML gives them; what is absent keeps its default.

        Raises ConfigError for an unknown key, a wrong type and a value out of range.
        """
        return _build(data, cls, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists that JSON and YAML can hold; `Config.from_dict` gives the same config back."""
        data = asdict(self)
        data["train"]["adam_betas"] = list(self.train.adam_betas)
        return data


def config_file(name: str | Path) -> Path:
    """The file called `name`, or else the recipe called so, such as `demo`.

    Raises FileNotFoundError, naming the recipes, if there is neither.
    """
    path, found = Path(name), recipes()
    if path.exists() and not path.is_dir():
        return path
    recipe = str(name).removesuffix(".yaml")
    if recipe not in found:
        kind = "is a folder" if path.is_dir() else "there is no such file"
        close = _suggestion(recipe, list(found))
        raise FileNotFoundError(f"{name}: {kind}, and no recipe of that name ({', '.join(sorted(found))}){close}")
    return found[recipe]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or recipe (`config_file`; None: the defaults), then apply overrides such as `train.lr=1e-4`,
    whose value is YAML too; of two for one field the later counts.

    Raises ConfigError for anything that is not a valid config, OSError for a file that cannot be read.
    """
    data = None if path is None else read_yaml(config_file(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as `train:`, got {data!r}")
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"override {override!r}: expected FIELD=VALUE, such as train.lr=1e-4")
        *sections, name = dotted.strip().split(".")
        node = data
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {section} = {node!r} has no fields")
        node[name] = _parse(value, override)
    return _build(data, Config, "")


def save_config(config: Config, path: str | Path) -> None:
    """Write every field, defaults included, as YAML that `load_config` reads back to an equal config."""
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises ConfigError, with file and line, for what is no YAML, and for what YAML's rules would take silently for
    something else than its writer: a key that is given twice, `010`, `1:30`, `2026-01-01`, `1e400`.
    """
    try:
        return _parse(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parse(text: str, source: str) -> Any:
    try:
        loader = yaml.SafeLoader(text)
        tree = loader.get_single_node()
        for mark, problem in _misread(tree, set()):
            raise ConfigError(f"{_place(source, text, mark)}: {problem}")
        return None if tree is None else loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        place = _place(source, text, error.problem_mark)
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).partition(chr(10))[0]}") from error


def _place(source: str, text: str, mark: Any) -> str:
    return f"{source}, line {mark.line + 1}" if mark and "\n" in text else source


def _misread(node: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """Places in a YAML tree that mean something else than they seem to, and what to write instead."""
    if node is None or id(node) in seen:  # aliases make it a graph
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _misread(item, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    yield key.start_mark, f"{key.value!r} is given twice, first in line {lines[key.value]}; keep one"
                lines[key.value] = key.start_mark.line + 1
            yield from _misread(key, seen)
            yield from _misread(value, seen)
    elif node.style is None:  # a scalar without quotes
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
            yield node.start_mark, f"{text} is an octal number in YAML; write no leading 0, or quotes if it is text"
        elif kind in ("int", "float") and ":" in text:
            yield node.start_mark, f"{text} is a number to base 60 in YAML; write a decimal, or quotes if it is text"
        elif kind == "timestamp":
            yield node.start_mark, f"{text} is a date in YAML; put it in quotes"
        elif kind in ("int", "float", "str") and _overflows(text):
            yield node.start_mark, f"{text} is larger than any float; write `.inf`, or quotes if it is text"


def _overflows(text: str) -> bool:
    try:
        return isinf(float(text)) and any(character.isdigit() for character in text)
    except ValueError:
        return False


def _build(data: Any, cls: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from a mapping; `path` is its dotted name."""
    if data is None:  # a section whose lines are all commented out
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'config'} = {data!r}: expected a mapping of its fields")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in data.items():
        dotted = f"{path}.{key}".lstrip(".")
        if key not in hints:
            raise ConfigError(f"{dotted}: unknown field{_suggestion(dotted, _dotted_names(Config))}")
        # Checked here as well as at construction: a run-time type checker would see the raw value first.
        values[key] = (_build if is_dataclass(hints[key]) else _checked)(value, hints[key], dotted)
    return cls(**values)


def _dotted_names(cls: Any, prefix: str = "") -> list[str]:
    """Every field of the tree, sections included: `seed`, `task`, `task.name`, …"""
    names = []
    for name, hint in get_type_hints(cls).items():
        names += [prefix + name, *(_dotted_names(hint, f"{name}.") if is_dataclass(hint) else ())]
    return names


class Described(NamedTuple):
    """A field of the config: its dotted name, default, what it may be, and what it means; of a section, the last."""

    name: str
    default: str
    expected: str
    meaning: str


def describe(name: str = "") -> list[Described]:
    """The section or field called `name`, such as `train` or `train.lr`, with what is in it; "": the whole config.

    Names, defaults, choices and meanings are those of the dataclasses in this module. Raises ConfigError for another
    name, with a suggestion.
    """
    everything = list(_described(Config, ""))
    found = [one for one in everything if not name or one.name == name or one.name.startswith(f"{name}.")]
    if not found:
        known = [one.name for one in everything]
        raise ConfigError(f"{name}: no section or field of the config{_suggestion(name, known)}")
    return found


def _described(cls: Any, prefix: str) -> Iterator[Described]:
    meanings = _docstrings(cls)
    hints, plain = get_type_hints(cls, include_extras=True), get_type_hints(cls)
    for one in fields(cls):
        name, kind = prefix + one.name, plain[one.name]
        if is_dataclass(kind):
            yield Described(name, "", "", " ".join((kind.__doc__ or "").split()))
            yield from _described(kind, f"{name}.")
        else:
            default = getattr(cls(), one.name)
            written = "null" if default is None else yaml.safe_dump(default, default_flow_style=True, width=inf)
            yield Described(name, written.removesuffix("...\n").strip(), _expected(hints[one.name]), meanings[one.name])


def _docstrings(cls: Any) -> dict[str, str]:
    """The string below each field of a dataclass, which Python itself drops."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, after in pairwise(definition.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            told = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[node.target.id] = " ".join(str(told).split())
    return found


def _suggestion(seen: str, names: Sequence[str]) -> str:
    """What the writer may have meant: the same field in another section, then similar spellings, nearest first."""
    leaf = seen.rpartition(".")[2].lower()
    same = [name for name in names if name.rpartition(".")[2].lower() == leaf]
    lower = {name.lower(): name for name in names}
    close = [lower[match] for match in difflib.get_close_matches(seen.lower(), lower, n=3)]
    found = list(dict.fromkeys(same + close))
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _checked(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotation `hint` wants it, or ConfigError."""

    def refuse(remedy: str = "") -> ConfigError:
        return ConfigError(f"{path} = {value!r}: expected {_expected(hint)}{remedy}")

    arguments = get_args(hint)
    if get_origin(hint) is Annotated and isinstance(arguments[1], _Bound):
        number = _checked(value, arguments[0], path)
        if not arguments[1].holds(number):
            raise refuse()
        return number
    if names := _choices(hint):
        if value not in names:
            raise refuse(_suggestion(str(value), names) + _quotes(value))
        return value
    if NoneType in arguments:  # X | None
        (inner,) = (a for a in arguments if a is not NoneType)
        if value is None:
            return None
        try:
            return _checked(value, inner, path)
        except ConfigError as error:
            raise ConfigError(f"{error}, or null") from None
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise refuse()
        return tuple(_checked(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise refuse()
        return [_checked(v, arguments[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise refuse()
        return dict(value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise refuse()
        try:  # of text, too: YAML 1.1 reads 1e-4, without a point, as text
            return float(value) + 0.0  # -0.0 becomes 0.0
        except (ValueError, OverflowError):
            raise refuse() from None
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise refuse()
    if hint is bool and not isinstance(value, bool):
        raise refuse()
    if hint is str and (not isinstance(value, str) or not value):
        raise refuse(_quotes(value))
    if is_dataclass(hint) and not isinstance(value, hint):
        raise refuse()
    return value


def _choices(hint: Any) -> tuple[str, ...]:
    """The names that a field of this annotation may have; none for other annotations."""
    arguments = get_args(hint)
    if get_origin(hint) is Annotated and isinstance(arguments[1], _OneOf):
        return tuple(arguments[1].names)
    return arguments if get_origin(hint) is Literal else ()


def _expected(hint: Any) -> str:
    """What a field of this annotation may be, in words."""
    arguments = get_args(hint)
    if names := _choices(hint):
        return f"one of {', '.join(names)}"
    if get_origin(hint) is Annotated:
        return arguments[1].expected
    if NoneType in arguments:
        return f"{_expected(next(a for a in arguments if a is not NoneType))}, or null"
    if get_origin(hint) is tuple:
        return f"a list of {len(arguments)} numbers"
    if get_origin(hint) in _WORDS or hint in _WORDS:
        return _WORDS[get_origin(hint) or hint]
    return f"a {hint.__name__}"


_WORDS = {
    **{int: "an integer", float: "a number", bool: "true or false", str: "text"},
    **{list: "a list", dict: "a mapping with names for keys"},
}


def _quotes(value: Any) -> str:
    """What to say of a value that YAML did not take for text."""
    if isinstance(value, bool):
        return "; YAML reads no, off, yes and on as true or false: put the word in quotes"
    return "; put text that looks like a number in quotes" if isinstance(value, int | float) else ""
