"""The spec file: what it means, and that no mistake in it reaches a run; a run's CSV file: that nothing is lost."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from minirl_edu.archives import pack
from minirl_edu.config import Config, ConfigError
from minirl_edu.experiments.spec import COLUMNS, Criterion, load_spec, read_run, read_runs, write_run

SMALL = {
    "base": {"train.lr": 1e-3, "train.group_size": 4, "task.options": {"min_operands": 2}},
    "settings": {
        "near": {"about": "near policy", "set": {"train.mini_batches": 1, "train.lr": 2e-3}},
        "far": {"about": "off-policy", "set": {"train.mini_batches": 4, "train.global_steps": 50}},
    },
    "variants": {
        "plain": {"label": "MiniRL", "set": {}},
        "hot": {"label": "hot", "set": {"train.lr": 3e-3, "task.options.max_operands": 5}},
    },
    "figures": {
        "one": {"title": "One", "runs": [["near", "plain"], ["near", "hot"]]},
        "two": {"title": "Two", "runs": [["far", "hot"], ["near", "plain"]]},
    },
    "tiers": {
        "fast": {"seeds": 2, "set": {"near": {"train.global_steps": 7, "train.lr": 4e-3}}, "leave_out": ["far"]},
        "full": {"seeds": 8, "set": {}},
    },
    "seeds": {"first": 3, "calibration": 100},
    "definitions": {"final_evaluations": 3, "collapse_share": 0.7},
    "claims": [
        {
            "id": "C1",
            "paper": "Hot is better.",
            "setting": "large",
            "figure": "one",
            "criteria": [
                {"kind": "higher", "metric": "final_score", "run": ["near", "hot"], "than": ["near", "plain"]}
            ],
        },
        {"id": "C2", "paper": "It scales.", "setting": "large", "not_testable": "One size only."},
    ],
}


def load(tmp_path, *changes):
    """The spec SMALL after some changes: (keys, value) pairs; DELETE removes the key."""
    data = copy.deepcopy(SMALL)
    for keys, value in changes:
        node = data
        for key in keys[:-1]:
            node = node[key]
        if value is DELETE:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return load_spec(path)


DELETE = object()

GRID = {
    "title": "A map",
    "about": "somewhere",
    "set": {"train.mini_batches": 2, "train.lr": 1e-2},
    "across": {"label": "learning rate", "values": {"1e-4": {"train.lr": 1e-4}, "1e-3": {"train.lr": 1e-3}}},
    "up": {"label": "engine", "values": {"int3/int4": {"rollout.precision": "int3/int4"}, "fp8": {}}},
    "variants": ["plain"],
}


def test_a_grid_is_a_setting_per_cell_and_a_figure_of_all(tmp_path):
    spec = load(tmp_path, (["grids"], {"map": GRID, "trial": {**GRID, "seeds": 2, "calibration": True}}))
    grid = spec.grids["map"]
    assert grid.across == ("learning rate", ("1e-4", "1e-3")) and grid.up == ("engine", ("int3/int4", "fp8"))
    cells = [grid.setting(x, y) for x in grid.across[1] for y in grid.up[1]]
    assert cells[0] == "map.int3_int4.1e-4"  # a folder's name
    assert spec.runs(["map"], "full") == [(cell, "plain") for cell in cells]
    config = spec.config("full", cells[0], "plain", 0)
    assert (config.train.lr, config.rollout.precision, config.train.mini_batches) == (1e-4, "int3/int4", 2)
    assert spec.config("full", cells[3], "plain", 0).train.lr == 1e-3  # base < grid < axes
    assert spec.seeds("map", 8) == range(3, 11) and spec.seeds("trial", 8) == range(100, 102)


def test_a_tier_can_leave_a_grid_out(tmp_path):
    spec = load(tmp_path, (["grids"], {"map": GRID}), (["tiers", "fast", "leave_out"], ["map"]))
    assert spec.runs(["map", "one"], "fast") == [("near", "plain"), ("near", "hot")]
    assert len(spec.runs(["map"], "full")) == 4


def test_groups_name_several_figures(tmp_path):
    spec = load(tmp_path, (["groups"], {"both": ["two", "one"]}))
    assert spec.expand(["one", "both", "two"]) == ["one", "two"]
    with pytest.raises(ConfigError, match="figure: unknown name 'bot'; did you mean both"):
        spec.expand(["bot"])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["across", "values", "1e-4"], {"train.lrr": 1}, r"train\.lrr: unknown field"),
        (["variants"], ["plane"], r"grids\.map\.variants\[0\]: unknown name 'plane'; did you mean plain"),
        (["calibration"], "yes", r"grids\.map\.calibration = 'yes': expected true or false"),
        (["up"], {"label": "engine"}, r"grids\.map\.up: values is missing"),
        (["seeds"], 0, r"grids\.map\.seeds = 0"),
    ],
)
def test_a_mistake_in_a_grid_is_found_when_it_is_read(tmp_path, keys, value, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, (["grids"], {"map": copy.deepcopy(GRID)}), (["grids", "map", *keys], value))


@pytest.fixture(scope="module")
def shipped():
    return load_spec()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load(tmp_path_factory.mktemp("small"))


# ------------------------------------------------------------------------------------------------ the shipped spec


IN_ORDER = {"on_policy": 1, "n2": 2, "n4": 4, "n8": 8}
WHERE_EXPERTS_MATTER = {"on_policy": "experts_n1", **{name: f"experts_{name}" for name in ("n2", "n4", "n8")}}


def test_where_experts_matter_the_same_criteria_judge(shipped):
    claims = {claim.id: claim for claim in shipped.claims}
    twins = [name for name in claims if name.endswith("-experts")]
    assert twins == [f"{name}-experts" for name in claims if name in ("F1a", "F1b", "F1c", "F1d")] + [
        f"{name}-experts" for name in ("F2a", "F2b", "F3a", "F3b", "F4")
    ]

    def moved(run):
        return run and (WHERE_EXPERTS_MATTER[run[0]], run[1])

    for name in twins:
        paper = claims[name.removesuffix("-experts")].criteria
        assert claims[name].criteria == tuple(replace(c, run=moved(c.run), than=moved(c.than)) for c in paper)


def test_where_experts_matter_the_engine_errs_in_routing_alone(shipped):
    for setting in WHERE_EXPERTS_MATTER.values():
        rollout = shipped.config("full", setting, "minirl", 0).rollout
        assert (rollout.precision, rollout.router_noise) == ("fp32", 0.3)
        assert shipped.config("full", setting, "dense", 0).rollout.router_noise == 0.0


def test_the_shipped_spec_has_a_claim_for_every_finding(shipped):
    claims = {claim.id: claim for claim in shipped.claims}
    findings = {"F1a", "F1b", "F1c", "F1d", "F2a", "F2b", "F3a", "F3b", "F4", "F5a", "F5b", "A1", "L1"}
    assert findings | {"D1", "Q1", "Q2"} <= claims.keys()
    assert [name for name, claim in claims.items() if claim.not_testable] == ["L1"]


def test_the_shipped_ablations_are_what_they_say(shipped):
    algorithm = {name: shipped.config("full", "on_policy", name, 0).algorithm for name in shipped.variants}
    assert algorithm["minirl"] == Config().algorithm  # MiniRL is the default, unchanged
    assert algorithm["no_is"].is_correction is False and algorithm["no_is"].clip is True
    assert (algorithm["r3_no_clip"].replay, algorithm["r3_no_clip"].clip) == ("R3", False)
    assert algorithm["grpo"].objective == "grpo"


def test_the_shipped_settings_keep_the_mini_batch_while_n_grows(shipped):
    sizes = {}
    for setting, n in {**IN_ORDER, **{WHERE_EXPERTS_MATTER[name]: n for name, n in IN_ORDER.items()}}.items():
        train = shipped.config("full", setting, "minirl", 0).train
        assert train.mini_batches == n
        sizes[setting] = train.mini_batch_prompts * train.group_size
    assert len(set(sizes.values())) == 1


def test_the_smoke_tier_runs_whatever_the_fast_tier_runs_and_more(shipped):
    figures = shipped.expand(["all"])
    smoke, fast = (shipped.runs(figures, tier) for tier in ("smoke", "fast"))
    assert set(fast) < set(smoke) and {"long", "hot"} <= {setting for setting, _ in smoke}
    assert {shipped.config("smoke", *run, 0).train.global_steps for run in smoke} == {2}


# -------------------------------------------------------------------------------------------------------- layers


def test_later_layers_win_value_by_value(small):
    assert small.config("full", "far", "plain", 3).train.lr == 1e-3  # base
    assert small.config("full", "near", "plain", 3).train.lr == 2e-3  # < setting
    assert small.config("full", "near", "hot", 3).train.lr == 3e-3  # < variant
    assert small.config("fast", "near", "hot", 3).train.lr == 4e-3  # < tier
    config = small.config("fast", "near", "hot", 5)
    assert config.seed == 5
    assert config.train.global_steps == 7
    # The variant's option joins the base's instead of replacing the section.
    assert config.task.options == {"min_operands": 2, "max_operands": 5}
    assert small.overrides("full", "far") == {
        "train.lr": 1e-3, "train.group_size": 4, "task.options.min_operands": 2,
        "train.mini_batches": 4, "train.global_steps": 50,
    }  # fmt: skip


def test_configs_of_one_spec_do_not_share_options(small):
    small.config("full", "near", "plain", 3).task.options["min_operands"] = 9
    assert small.config("full", "near", "plain", 3).task.options == {"min_operands": 2}


def test_runs_come_once_in_the_figures_order_without_what_the_tier_leaves_out(small):
    assert small.runs(["two", "one"], "full") == [("far", "hot"), ("near", "plain"), ("near", "hot")]
    assert small.runs(["two", "one"], "fast") == [("near", "plain"), ("near", "hot")]
    assert list(small.seeds("one", 2)) == [3, 4]


def test_a_claim_may_rest_on_several_figures(tmp_path):
    criterion = {"kind": "collapses", "run": ["far", "hot"], "share": 0.25}
    spec = load(
        tmp_path, (["claims", 0, "figure"], ["one", "two"]), (["claims", 0, "criteria"], [criterion]),
    )  # fmt: skip
    assert spec.claims[0].figures == ("one", "two")
    assert spec.claims[0].criteria == (Criterion("collapses", ("far", "hot"), share=0.25),)


# ------------------------------------------------------------------------------------------------------ bad specs

CRITERION = ["claims", 0, "criteria", 0]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["settigns"], {}, r"spec.yaml: the file: unknown name 'settigns'; did you mean settings"),
        (["definitions"], DELETE, r"the file: definitions is missing"),
        (["settings", "near", "sets"], {}, r"settings.near: unknown name 'sets'; did you mean set\?"),
        (["settings", "near", "about"], 3, r"settings.near.about = 3: expected text"),
        (["base", "train.lrr"], 1, r"base: train.lrr: unknown field; did you mean train.lr"),
        (["variants", "hot", "set"], {"algorithm.clipp": False}, r"variants.hot.set: algorithm.clipp: unknown field"),
        (["variants", "hot", "set"], {"train.lr": "high"}, r"variants.hot.set: train.lr = 'high': expected a number"),
        (["variants", "hot", "set"], {"train.lr.x": 1}, r"train.lr.x: lr = 0.001 has no fields"),
        (["variants", "hot", "set"], {"seed": 1}, r"variants.hot.set: seed = 1: each run gets its own"),
        (["variants", "hot", "label"], "MiniRL", r"variants: label 'MiniRL' is used twice"),
        (["figures", "one", "runs"], [["near", "hto"]], r"figures.one.runs\[0\]: unknown name 'hto'; did you mean hot"),
        (["figures", "one", "runs"], [["nowhere", "hot"]], r"unknown name 'nowhere'; known: near, far"),
        (["figures", "one", "runs"], ["near"], r"figures.one.runs\[0\] = 'near': expected \[setting, variant\]"),
        (["tiers", "fast", "set"], {"nera": {}}, r"tiers.fast.set: unknown name 'nera'; did you mean near"),
        (["tiers", "fast", "set", "near"], {"train.steps": 3}, r"tiers.fast.set.near: train.steps: unknown field"),
        (["tiers", "fast", "leave_out"], ["fra"], r"tiers.fast.leave_out\[0\]: unknown name 'fra'; did you mean far"),
        (["tiers", "fast", "seeds"], 0, r"tiers.fast.seeds = 0: expected an integer of at least 1"),
        (["seeds", "first"], True, r"seeds.first = True: expected an integer"),
        (["definitions", "collapse_share"], 25, r"definitions.collapse_share = 25: expected a number between 0 and 1"),
        (["claims", 1, "id"], "C1", r"claims: id 'C1' is used twice"),
        (["claims", 1, "criteria"], [], r"claims\[1\]: unknown name 'criteria'"),
        (["claims", 0, "criteria"], [], r"claim C1: criteria = \[\]: expected at least one"),
        (["claims", 0, "figure"], "oen", r"claim C1: figure: unknown name 'oen'; did you mean one"),
        ([*CRITERION, "kind"], "hihger", r"claim C1: criteria\[0\].kind: unknown name 'hihger'; did you mean higher"),
        ([*CRITERION, "kind"], "stable", r"criteria\[0\]: unknown name 'metric'; known: kind, run, share"),
        ([*CRITERION, "than"], DELETE, r"claim C1: criteria\[0\]: than is missing"),
        ([*CRITERION, "metric"], "final_scor", r"criteria\[0\].metric: unknown name .*mean final_score"),
        # Known names, but the command printed for the claim would not make this run.
        ([*CRITERION, "run"], ["far", "hot"], r"criteria\[0\].run = \['far', 'hot'\]: expected a run of the claim"),
        ([*CRITERION, "margin"], "3", r"criteria\[0\].margin = '3': expected a number"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_where_it_is(tmp_path, keys, value, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, (keys, value))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"kind": "comparable", "metric": "final_score", "margin": 0}, "expected a difference above 0"),
        ({"kind": "comparable", "metric": "kl", "margin": 0.9}, "expected a factor above 1"),
        ({"kind": "lower", "metric": "kl", "margin": -2}, "expected a factor above 0"),
    ],
)
def test_margins_fit_the_metric(tmp_path, criterion, message):
    criterion |= {"run": ["near", "hot"], "than": ["near", "plain"]}
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, (["claims", 0, "criteria"], [criterion]))


def test_layers_that_only_together_make_no_config_are_refused_with_the_run(tmp_path):
    warmup = {"train.warmup_steps": 3, "train.lr_schedule": "linear"}
    with pytest.raises(ConfigError, match=r"run \[near, hot\] in tier fast: train.warmup_steps = 3: .* ignores it"):
        load(
            tmp_path,
            (["variants", "hot", "set"], warmup),
            (["tiers", "fast", "set", "near"], {"train.lr_schedule": "constant"}),
        )


def test_unknown_names_in_a_call_are_refused(small):
    with pytest.raises(ConfigError, match="tier: unknown name 'slow'; known: fast, full"):
        small.runs(["one"], "slow")
    with pytest.raises(ConfigError, match="figure: unknown name 'three'"):
        small.runs(["three"], "fast")
    with pytest.raises(ConfigError, match="variant: unknown name 'hit'; did you mean hot"):
        small.config("fast", "near", "hit", 0)


def test_a_file_that_is_no_yaml_or_no_mapping_is_refused(tmp_path):
    path = tmp_path / "spec.yaml"
    for text, message in (
        ("base: [", "not valid YAML"),
        ("- 1", r"the file = \[1\]: expected a mapping"),
        ("base: {}\nseeds: {}\nbase: {}\n", r"spec\.yaml, line 3: 'base' is given twice, first in line 1"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_spec(path)


# ------------------------------------------------------------------------------------------------------ a run's file

HEADER = {"config": {"seed": 4, "train.lr": 1e-3}, "digest": "abc", "seconds": 41.2, "diverged": None}


def test_a_run_survives_its_file(tmp_path):
    path = tmp_path / "runs" / "full" / "n2" / "r3" / "seed4.csv"
    records = [
        {"global_step": 0, "grad_step": 0, "score": 0.4375, "score_rollout": None},
        {
            "global_step": 12345,
            "grad_step": 123456,
            "reward": 0.123456,
            "kl_rollout_old": -1.23456e-9,
            "warnings": ["x"],
        },
        {"global_step": 12346, "grad_step": 123457, "reward": math.nan, "is_weight_max": math.inf, "lr": 3e-4},
    ]
    write_run(path, records, header=HEADER)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0].removeprefix("# ")) == HEADER
    assert lines[1] == ",".join(COLUMNS)
    assert lines[3].startswith("12345,123456,,,.1235,,-1.235e-09,")  # steps are whole, the rest has 4 digits

    run = read_run(path)
    assert (run.seed, run.diverged, run.digest, run.seconds) == (4, None, "abc", 41.2)
    assert tuple(run.metrics) == COLUMNS
    np.testing.assert_array_equal(run.metrics["grad_step"], [0, 123456, 123457])
    np.testing.assert_array_equal(run.metrics["score"], [0.4375, math.nan, math.nan])
    np.testing.assert_array_equal(run.metrics["reward"], [math.nan, 0.1235, math.nan])
    assert run.metrics["is_weight_max"][2] == math.inf
    assert all(column.dtype == np.float64 for column in run.metrics.values())


def test_a_diverged_run_and_the_default_seed(tmp_path):
    message = 'log-probabilities, "not finite",\nin step 3'
    write_run(tmp_path / "r.csv", [], header=HEADER | {"diverged": message, "config": {}, "seconds": 3})
    run = read_run(tmp_path / "r.csv")
    assert run.diverged == message
    assert run.seed == Config().seed
    assert len(run.metrics["score"]) == 0


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    class Records(list):
        def __iter__(self):
            yield {"global_step": 0, "grad_step": 0, "score": 0.5}
            raise ValueError("nonsense")

    path = tmp_path / "seed0.csv"
    write_run(path, [{"global_step": 0, "grad_step": 0}], header=HEADER)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="nonsense"):
        write_run(path, Records(), header=HEADER)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="digest is missing"):
        write_run(path, [], header={"config": {}, "seconds": 1.0, "diverged": None})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "# {}\n", "grad_step\n1\n", "# {\n"])
def test_another_file_is_not_taken_for_a_run(tmp_path, text):
    path = tmp_path / "seed0.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"seed0.csv is not a run's CSV file .*; delete it and run again"):
        read_run(path)


def test_the_runs_of_a_setting_are_read_from_files_and_from_the_archive(tmp_path):
    folder, record = tmp_path / "n2", {"global_step": 0, "grad_step": 0}

    def write(variant: str, seed: int, score: float) -> None:
        header = HEADER | {"config": {"seed": seed}}
        write_run(folder / variant / f"seed{seed}.csv", [record | {"score": score}], header=header)

    for variant, seed in (("r3", 10), ("r3", 9), ("minirl", 9)):
        write(variant, seed, 0.5)
    pack(folder)
    write("r3", 9, 0.75)
    runs = read_runs(folder)
    assert {variant: list(own) for variant, own in runs.items()} == {"minirl": [9], "r3": [9, 10]}
    assert [run.metrics["score"].tolist() for run in runs["r3"].values()] == [[0.75], [0.5]]
    assert read_runs(tmp_path / "n4") == {}
    (folder / "r3" / "seed9.csv").write_text("# {}")
    with pytest.raises(ValueError, match=r"n2/r3/seed9.csv is not a run's CSV file"):
        read_runs(folder)


def test_half_a_row_is_not_taken_for_a_run(tmp_path):
    path = tmp_path / "seed0.csv"
    write_run(path, [{"global_step": 0, "grad_step": 0}] * 2, header=HEADER)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="not a run's CSV file"):
        read_run(path)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "seed1.csv")
