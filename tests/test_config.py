import json
from dataclasses import FrozenInstanceError, replace
from math import inf
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import get_scheduler

from minirl_edu import config as config_module
from minirl_edu.config import Config, ConfigError, TrainConfig, describe, load_config, save_config
from minirl_edu.objectives import OBJECTIVES
from minirl_edu.recipes import RECIPES

EVERY_FIELD = {  # a value other than the default for each field, as YAML would give it
    "seed": 7,
    "task": {"name": "math_jsonl", "options": {"path": "problems.jsonl", "operands": [3, 6]}},
    "model": {
        "name": "some/model",
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "gradient_checkpointing": True,
        "offload_activations": True,
        "experts_implementation": "grouped_mm",
        "expert_parallel": 2,
        "random": True,
        "overrides": {"num_hidden_layers": 2},
        "trust_remote_code": True,
    },
    "rollout": {
        "engine": "vllm",
        "precision": "int3/int4",
        "rounding": "stochastic",
        "router_noise": 0.3,
        "head_precision": "int2",
        "options": {"kv_cache_dtype": "fp8"},
        "temperature": 0.7,
        "max_new_tokens": 12,
        "max_prompt_tokens": 100,
        "on_overlong": "stop",
        "on_fault": "drop",
        "measure_flips": False,
    },
    "algorithm": {
        "objective": "mine",
        "advantages": "leave_one_out",
        "eps_low": 0.1,
        "eps_high": inf,
        "is_cap": 2.0,
        "clip": False,
        "is_correction": False,
        "correction": "none",
        "length_norm": True,
        "replay": "R3",
    },
    "train": {
        "global_steps": 3,
        "mini_batch_prompts": 4,
        "group_size": 2,
        "mini_batches": 8,
        "lr": 1e-05,
        "lr_schedule": "cosine",
        "warmup_steps": 5,
        "adam_betas": [0.8, 0.99],
        "adam_eps": 1e-06,
        "weight_decay": 0.1,
        "max_grad_norm": inf,
        "tokens_per_micro_batch": 512,
        "zero_advantage_backward": True,
    },
    "eval": {"every": 0, "problems": 8, "samples": 4, "through_trainer": False},
    "output": {"save_every": 0, "keep_last": 1, "trackers": ["tensorboard"]},
    "ranks": {"wait": 60.0, "silent": 5.0, "stalled": 900.0},
}


def leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict) and key not in ("options", "overrides"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_field_survives_the_round_trip_through_yaml_and_json(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mine", OBJECTIVES["minirl"])  # the other ones do not take every field
    config = Config.from_dict(EVERY_FIELD)
    assert config.to_dict() == EVERY_FIELD
    defaults = dict(leaves(Config().to_dict()))
    assert defaults.keys() == dict(leaves(EVERY_FIELD)).keys()
    assert all(defaults[name] != value for name, value in leaves(EVERY_FIELD))  # so no field can be lost unnoticed

    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_are_yaml_and_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  lr: 1.0e-3\n  group_size: 4\neval:\n  # every: 5\n")  # `eval:` reads as None
    config = load_config(
        path,
        [
            "train.lr=2e-5",
            "algorithm.replay=R3",
            "task.options.operands=[3, 6]",
            "rollout.max_new_tokens=",
            "seed=3",
        ],
    )
    assert config.train == TrainConfig(lr=2e-5, group_size=4)
    assert (config.seed, config.algorithm.replay, config.task.options) == (3, "R3", {"operands": [3, 6]})
    assert config.rollout.max_new_tokens is None
    assert config.eval == Config().eval


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001"])
def test_floats_are_read_however_they_are_spelt(text):
    assert load_config(overrides=[f"train.lr={text}"]).train.lr == 1e-4  # yaml itself reads 1e-4 as text


def test_an_integer_serves_as_a_float():
    temperature = load_config(overrides=["rollout.temperature=1"]).rollout.temperature
    assert isinstance(temperature, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.group_sise=4", r"train\.group_sise: unknown field; did you mean train\.group_size"),
        ("trian.lr=1", r"trian: unknown field; did you mean train "),
        ("lr=1e-4", r"lr: unknown field; did you mean train\.lr\?"),
        ("rollout.lr=1e-4", r"rollout\.lr: unknown field; did you mean train\.lr"),
        ("train.lr=fast", r"train\.lr = 'fast': expected a number"),
        ("train.lr=.nan", r"train\.lr = nan: expected a number of at least 0"),
        ("train.lr=true", r"train\.lr = True: expected a number"),
        ("train.lr=.inf", r"train\.lr = inf"),
        ("train.global_steps=1.5", r"train\.global_steps = 1\.5: expected an integer"),
        ("train.global_steps=true", r"train\.global_steps = True: expected an integer"),
        ("train.global_steps=0", r"train\.global_steps = 0: expected an integer of at least 1"),
        ("train.group_size=1", r"train\.group_size = 1: expected at least 2: .*group of one"),
        ("train.adam_betas=[0.9]", r"train\.adam_betas = \[0\.9\]: expected a list of 2 numbers"),
        ("train.adam_betas=[0.9, 1]", r"train\.adam_betas\[1\] = 1: expected a number from 0 to below 1"),
        ("train.warmup_steps=10", r"train\.warmup_steps = 10: .*'constant' ignores it; use 'constant_with_warmup'"),
        ("train.lr_schedule=Cosine", r"train\.lr_schedule = 'Cosine': expected one of .*; did you mean cosine"),
        ("algorithm.replay=r3", r"algorithm\.replay = 'r3': expected one of none, R2, R3; did you mean R3"),
        ("algorithm.replay=no", r"algorithm\.replay = False: expected one of none, R2, R3; YAML reads no, .*quotes"),
        ("algorithm.objective=gspo", r"algorithm\.objective = 'gspo': expected one of minirl, grpo, cispo; .*grpo"),
        ("algorithm.objective=[1]", r"algorithm\.objective = \[1\]: expected one of minirl, grpo, cispo"),
        ("algorithm.advantages=mean", r"algorithm\.advantages = 'mean': expected one of group_mean, .*, or null"),
        ("model.name=off", r"model\.name = False: expected text; YAML reads no, off, yes and on as true or false"),
        ("model.name=2026-01-01", r"model\.name=2026-01-01: 2026-01-01 is a date in YAML; put it in quotes"),
        ("model.name=2026-13-45", r"2026-13-45 is a date in YAML"),
        ("train.global_steps=010", r"train\.global_steps=010: 010 is an octal number in YAML"),
        ("train.global_steps=1:30", r"train\.global_steps=1:30: 1:30 is a number to base 60 in YAML"),
        ("rollout.temperature=1:30.5", r"1:30\.5 is a number to base 60 in YAML"),
        ("task.options={start: 1:30, operands: [1, 010]}", r"1:30 is a number to base 60"),
        ("task.options={operands: [1, 010]}", r"010 is an octal number"),
        ("train.max_grad_norm=1e400", r"train\.max_grad_norm=1e400: 1e400 is larger than any float; write `\.inf`"),
        ("train.max_grad_norm=1.0e+400", r"1\.0e\+400 is larger than any float"),
        pytest.param("train.lr=" + "9" * 400, "larger than any float", id="400 digits"),
        pytest.param("train.global_steps=" + "9" * 5000, "larger than any float", id="5000 digits"),
        pytest.param("task.options=" + "[" * 100_000, "not valid YAML: .*recursion", id="deep"),
        ("seed=18446744073709551616", r"seed = 18446744073709551616: expected an integer from 0 to below 2\*\*63"),
        ("train={lr: 1, group_size: 4, lr: 2}", r"'lr' is given twice"),
        ("task.options={a: [{x: 1, 'x': 1}]}", r"'x' is given twice"),
        ("algorithm.eps_low=0", r"algorithm\.eps_low = 0: expected a number above 0"),
        ("algorithm.eps_low=None", r"algorithm\.eps_low = 'None': expected a number, or null"),
        ("algorithm.clip=1", r"algorithm\.clip = 1: expected true or false"),
        ("rollout.temperature=0", r"rollout\.temperature = 0: expected a number above 0"),
        ("rollout.max_new_tokens=0", r"rollout\.max_new_tokens = 0: expected an integer of at least 1, or null"),
        ("rollout.precision=8", r"rollout\.precision = 8: expected text; put text that looks like a number in quotes"),
        ("task.options=[1]", r"task\.options = \[1\]: expected a mapping"),
        ("output.trackers=tensorboard", r"output\.trackers = 'tensorboard': expected a list"),
        ("output.trackers=[1]", r"output\.trackers\[0\] = 1: expected text"),
        ("train=3", r"train = 3: expected a mapping"),
        ("seed.x=3", r"seed = \{'x': 3\}: expected an integer"),
        ("train.lr", r"override 'train\.lr': expected FIELD=VALUE"),
        ("=3", r"override '=3': expected FIELD=VALUE"),
        ("train.lr=[1", r"train\.lr=\[1: not valid YAML"),
        ("train.lr=!!python/object/apply:os.getcwd []", r"not valid YAML"),
    ],
)
def test_bad_settings_are_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize("objective", ["grpo", "cispo"])
def test_a_setting_that_the_objective_does_not_take_is_refused(objective):
    chosen = f"algorithm.objective={objective}"
    load_config(overrides=[chosen, "algorithm.eps_low=0.3", "algorithm.eps_high=.inf", "algorithm.replay=R3"])
    for setting in ("clip=false", "is_correction=false", "correction=none", "length_norm=true", "is_cap=2"):
        said = rf"algorithm\.{setting.partition('=')[0]} = .*'{objective}' does not take it; leave it out, or choose"
        with pytest.raises(ConfigError, match=said):
            load_config(overrides=[chosen, f"algorithm.{setting}"])
        load_config(overrides=[f"algorithm.{setting}"])


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.lr=-0.0", "train.lr", 0.0),
        ("algorithm.clip=off", "algorithm.clip", False),  # the right reading, for this field
        ("algorithm.eps_high=.inf", "algorithm.eps_high", inf),
        ("train.global_steps=1_000", "train.global_steps", 1000),
        ("train.global_steps=0x10", "train.global_steps", 16),
        ("model.name='2026-01-01'", "model.name", "2026-01-01"),
        ("model.name='010'", "model.name", "010"),
        ("model.name=org/model-1:30b", "model.name", "org/model-1:30b"),
        ("train.lr=0", "train.lr", 0.0),
    ],
)
def test_what_looks_odd_and_is_right_is_read(override, field, value):
    section, name = field.split(".")
    found = getattr(getattr(load_config(overrides=[override]), section), name)
    assert (found, str(found)) == (value, str(value))  # 0.0 is not -0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: 1.0e-3\nseed: 1\ntrain:\n  group_size: 4\n", "line 4: 'train' is given twice, first in line 1"),
        ("task:\n  options:\n    a: 1\n    b: 2\n    a: 3\n", "line 5: 'a' is given twice, first in line 3"),
        ("seed: 1\ntrain:\n  global_steps: 010\n", "line 3: 010 is an octal"),
        ("seed: 1\ntrain: {lr: [}\n", "line 2: not valid YAML: "),
    ],
)
def test_what_yaml_would_take_silently_is_refused_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}, {message}") and "\n" not in str(refused.value)


def test_aliases_and_merges_are_no_second_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: {options: {a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}, c: *a}}\n")
    assert load_config(path).task.options == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("task: {name: Kämpfe}".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(path)


def test_a_recipe_is_found_by_name_from_anywhere_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("demo") == load_config(RECIPES / "demo.yaml") == load_config("demo.yaml")
    assert load_config("tiny_cpu").algorithm.replay == "R3"  # of scale/recipes, in a checkout
    (tmp_path / "smollm2").mkdir()  # a folder is no config
    assert load_config("smollm2").model.name == "smollm2-135m-instruct"
    (tmp_path / "demo").write_text("seed: 12")
    assert load_config("demo").seed == 12


@pytest.mark.parametrize("name", ["deno", "nowhere/demo", "."])
def test_an_unknown_recipe_lists_those_there_are(name):
    with pytest.raises(FileNotFoundError) as refused:
        load_config(name)
    said = str(refused.value)
    assert said.startswith(f"{name}: ") and "demo, " in said and "smollm2" in said
    assert ("did you mean demo?" in said) == (name == "deno")


def test_overrides_cannot_reach_into_a_scalar(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: 3")
    with pytest.raises(ConfigError, match="train = 3 has no fields"):
        load_config(path, ["train.lr=1"])


@pytest.mark.parametrize("text", ["- 1", "text", "train: {lr: 1", "1: 2"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


def test_python_code_gets_the_same_checks():
    with pytest.raises(ConfigError, match=r"train\.group_size = 1"):
        TrainConfig(group_size=1)
    with pytest.raises(ConfigError, match=r"train\.lr = -1"):
        replace(Config().train, lr=-1.0)
    with pytest.raises(ConfigError, match=r"algorithm\.correction = 'geometric_mean'.*is_correction: false"):
        replace(Config().algorithm, is_correction=False, correction="geometric_mean")
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_the_papers_where_it_has_one():
    algorithm = Config().algorithm
    assert (algorithm.objective, algorithm.advantages, algorithm.is_cap) == ("minirl", None, 5.0)
    assert (algorithm.clip, algorithm.is_correction, algorithm.length_norm) == (True, True, False)
    assert algorithm.correction == "token_truncated"
    assert Config().model.trust_remote_code is False


def test_every_schedule_can_be_built_from_the_fields_there_are():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for name in get_args(get_type_hints(TrainConfig)["lr_schedule"]):
        get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)


def test_every_field_is_described_from_its_one_source():
    found = {one.name: one for one in describe()}
    assert list(found) == config_module._dotted_names(Config)
    assert all(one.meaning.endswith(".") for one in found.values())
    assert found["train"].meaning.startswith("The training loop.") and not found["train"].default
    assert found["train.lr"][1:3] == ("0.0003", "a number of at least 0")
    assert found["algorithm.eps_low"][1:3] == ("null", "a number above 0, or null")
    assert found["rollout.engine"].expected == "one of hf, vllm, vllm_server"
    assert found["algorithm.objective"].expected.startswith("one of minirl, grpo, cispo")
    assert (found["train.adam_betas"].default, found["eval.through_trainer"].default) == ("[0.9, 0.95]", "true")
    for one in found.values():  # what is shown as the default is what may be written
        if one.default:
            assert load_config(overrides=[f"{one.name}={one.default}"]) == Config()


def test_an_evaluation_draws_no_more_at_a_time_than_a_global_step():
    step = ("train.mini_batches=2", "train.mini_batch_prompts=5", "train.group_size=4")  # 40 responses
    for problems, samples, rounds in ((8, 12, [5, 5, 2]), (8, 5, [5]), (8, 1, [1]), (100, 3, [1, 1, 1])):
        config = load_config(overrides=[*step, f"eval.problems={problems}", f"eval.samples={samples}"])
        assert config.evaluation_rounds == rounds


def test_a_section_or_a_field_alone_can_be_described():
    names = ["eval", "eval.every", "eval.problems", "eval.samples", "eval.through_trainer"]
    assert [one.name for one in describe("eval")] == names
    assert [one.name for one in describe("train.lr")] == ["train.lr"]  # without train.lr_schedule
    with pytest.raises(ConfigError, match=r"^trian: no section or field of the config; did you mean train"):
        describe("trian")
