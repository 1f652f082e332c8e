"""Each mystery run has the fault it is said to have, and the stored charts show it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from minirl_edu.archives import archive_of, files_in
from minirl_edu.course.mystery import (
    COLUMNS,
    FAULTS,
    HEALTHY,
    HOT,
    SAMPLED_AT,
    faulty_trainer,
    main,
    read_charts,
)
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.routing import RoutingReplay

STORED = Path(__file__).parents[2] / "lessons" / "results" / "mystery"
# Two global steps of two small mini-batches: about a second for each run. An engine without rounding errors, so that
# what the fault does to the discrepancy is all there is.
SMALL = (
    *("rollout.precision=fp32", "rollout.rounding=nearest"),
    *("train.mini_batch_prompts=4", "train.mini_batches=2", "train.global_steps=2"),
    *("train.lr_schedule=constant", "train.warmup_steps=0", "eval.every=0"),
)
EVALUATED = ("eval.every=1", "eval.problems=16")
LETTER = {fault: letter for letter, fault in FAULTS.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Lines of two global steps and the trainer afterwards, by the name of the run; each run is made once."""
    made = {}

    def of(fault: str):
        name = LETTER.get(fault, fault)
        if name not in made:
            trainer = faulty_trainer(name, tmp_path_factory.mktemp(name), seed=0, overrides=SMALL)
            made[name] = trainer.global_step() + trainer.global_step(), trainer
        return made[name]

    return of


def first(lines, key):
    """The value of a metric at the first gradient step, at which every engine was in sync and nothing was learned."""
    return lines[0][key]


def same_rollout(trainer, version):
    """Whether the engine under the trainer has the weights that a sync of the trainer's own would give it."""
    inner = getattr(trainer.engine, "engine", trainer.engine)
    before = [weight.clone() for weight in inner.model.state_dict().values()]
    inner.sync(trainer.model, version=version)
    return all(torch.equal(a, b) for a, b in zip(before, inner.model.state_dict().values(), strict=True))


def test_the_healthy_run_replays_the_engines_experts_and_is_in_sync(small):
    lines, trainer = small(HEALTHY)
    assert [line["routing_flip_rate"] for line in lines] == [0.0] * 4
    assert max(line["k3_rollout_old"] for line in lines) < 1e-6
    assert same_rollout(trainer, trainer.step)


def test_an_engine_that_is_never_synced_keeps_the_first_weights(small):
    lines, trainer = small("engine never synced")
    assert first(lines, "k3_rollout_old") < 1e-6  # in sync, and nothing is rounded
    assert lines[2]["k3_rollout_old"] > 1e-5  # an update later they have parted
    assert trainer.engine.engine.version == 0
    assert not same_rollout(trainer, trainer.step)


def test_another_temperature_is_there_from_the_first_step(small):
    lines, trainer = small("sampled at another temperature")
    assert first(lines, "k3_rollout_old") > 0.01
    assert first(lines, "routing_flip_rate") == 0
    prompts = [trainer.task.encode(problem) for problem in trainer.task.sample(4, seed=0)]
    rollout = trainer.engine.generate(prompts, group_size=4, sampling=trainer.sampling, seed=0)
    layout = lay_out(rollout, share_prompts=trainer.batcher.share_prompts)
    assert SAMPLED_AT != trainer.sampling.temperature == 1.0
    for temperature, found in ((SAMPLED_AT, True), (1.0, False)):
        with torch.no_grad(), RoutingReplay(trainer.model).replay(layout.pack(rollout.routes)):
            logp = response_logprobs(trainer.model, layout, temperature=temperature).logp
        assert torch.allclose(logp, rollout.logp_rollout, atol=1e-3) == found  # fp32, sums in another order


def test_rewards_of_the_wrong_group_are_right_on_average_and_stand_elsewhere(small):
    lines, trainer = small("rewards of the wrong group")
    problems = trainer.task.sample(2, seed=0)
    prompts = [trainer.task.encode(problem) for problem in problems]
    rollout = trainer.engine.generate(prompts, group_size=4, sampling=trainer.sampling, seed=0)
    mixed = trainer.rewards(problems, rollout)
    texts = trainer.task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    right = [trainer.task.reward(problems[row // 4], text) for row, text in enumerate(texts)]
    assert mixed.tolist() == right[4:] + right[:4] != right
    assert first(lines, "kl_rollout_old") == first(small(HEALTHY)[0], "kl_rollout_old")


def test_a_learning_rate_is_ten_times_too_high(small):
    lines, _ = small("learning rate ten times too high")
    healthy = small(HEALTHY)[0]
    assert lines[1]["lr"] == pytest.approx(HOT * healthy[1]["lr"])
    assert first(lines, "log_ratio_staleness") == 0
    assert lines[1]["log_ratio_staleness"] > 3 * healthy[1]["log_ratio_staleness"]


def test_without_a_baseline_no_advantage_is_negative(small):
    lines, trainer = small("no baseline")
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert torch.equal(trainer.compute_advantages(rewards, 2), rewards)
    assert [line["clip_frac_neg"] for line in lines] == [0.0] * 4
    assert first(lines, "kl_rollout_old") == first(small(HEALTHY)[0], "kl_rollout_old")


def test_routes_of_another_response_flip_experts_and_part_the_engines(small):
    lines, _ = small("routes of another response")
    assert min(line["routing_flip_rate"] for line in lines) > 0.3
    assert first(lines, "k3_rollout_old") > 0.01


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="A, B, C, D, E, F, healthy"):
        faulty_trainer("G", tmp_path, seed=0)


def test_charts_that_are_there_are_kept_and_read_back(tmp_path, monkeypatch):
    out, row = tmp_path / "charts", [str(i) for i in range(len(COLUMNS) - 1)]
    text = f"{','.join(COLUMNS)}\n{','.join([*row, ''])}\n"
    for name in (HEALTHY, *FAULTS):
        (out / name).mkdir(parents=True)
        (out / name / "seed0.csv").write_text(f'# {{"seed": 0}}\n{text}', encoding="utf-8")
    monkeypatch.setattr("minirl_edu.course.mystery.rerun", None)  # it has nothing to do
    for _ in range(2):  # the second time out of the archive
        assert main(["--out", str(out), "--seeds", "1"]) == 0
        assert not out.exists()
    charts = read_charts(out)
    assert set(charts) == {HEALTHY, *FAULTS} and list(charts["A"]) == [0]
    chart = charts["A"][0]
    assert list(chart) == list(COLUMNS)
    assert chart["grad_step"].tolist() == [1.0] and np.isnan(chart[COLUMNS[-1]]).all()
    (out / "A").mkdir(parents=True)
    (out / "A" / "seed0.csv").write_text("# {}\na,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"A/seed0.csv: its columns are"):
        read_charts(out)


@pytest.mark.slow
def test_a_short_recording_is_complete_and_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr("minirl_edu.course.mystery.SETTING", ("algorithm.replay=R3", *SMALL, *EVALUATED))
    monkeypatch.setattr("minirl_edu.course.mystery.FAULTS", {"A": FAULTS["A"]})
    for out in (tmp_path / "one", tmp_path / "two"):
        assert main(["--out", str(out), "--seeds", "1"]) == 0
    assert list(files_in(tmp_path / "one")) == ["A/seed0.csv", "healthy/seed0.csv"]
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one.tar.bz2", "two.tar.bz2"]
    chart = read_charts(tmp_path / "one")["A"][0]
    assert chart["grad_step"].tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(chart["score"]).tolist() == [True, False, True, False, True]


# ---------------------------------------------------------------------------------------------- the stored charts


def stored(fault):
    """The charts of all seeds of a run."""
    return list(read_charts(STORED)[str(LETTER.get(fault, fault))].values())


def test_all_charts_are_stored_small_and_of_the_same_length():
    files = files_in(STORED)
    seeds = {name: [file.split("/")[1] for file in files if file.split("/")[0] == name] for name in (*FAULTS, HEALTHY)}
    assert seeds["A"] and all(names == seeds["A"] for names in seeds.values())
    assert archive_of(STORED).stat().st_size < 1e5
    for file, content in files.items():
        first, *lines = content.decode("utf-8").splitlines()
        header = json.loads(first.removeprefix("#"))
        assert file.endswith(f"/seed{header['seed']}.csv")
        assert header["diverged"] or lines[-1].startswith("30,120,")


@pytest.mark.parametrize("fault", [*FAULTS.values(), HEALTHY])
def test_a_stored_chart_shows_the_fault_and_no_other(fault):
    for chart, healthy in zip(stored(fault), stored(HEALTHY), strict=True):
        score, engine = (chart[name][np.isfinite(chart[name])] for name in ("score", "score_rollout"))
        begins, usual = (c["k3_rollout_old"][1:5].mean() for c in (chart, healthy))
        assert (np.nanmax(chart["routing_flip_rate"]) > 0) == (fault == "routes of another response")
        assert (np.nanmax(chart["clip_frac_neg"]) == 0) == (fault == "no baseline")
        assert (begins > 2 * usual) == (fault in ("routes of another response", "sampled at another temperature"))
        if fault == "engine never synced":
            assert score.max() - engine.max() > 0.1
