"""Noise on the routers alone, through the training loop: the gap is routing, R3 closes it, and runs resume."""

import json
from pathlib import Path

import pytest

from minirl_edu.config import load_config
from minirl_edu.trainer import MiniRLTrainer
from tests.oracle import lively

SMALL = (
    *("train.global_steps=3", "train.mini_batch_prompts=4", "train.group_size=4", "train.mini_batches=2"),
    *("eval.every=1", "eval.problems=16", "output.save_every=1", "rollout.precision=fp32", "rollout.router_noise=0.3"),
    *("task.options={max_operands: 4, hard_operands: 4}", "train.lr=1e-3"),
)


def trainer(out: Path, replay: str, *, resume: bool = False) -> MiniRLTrainer:
    config = load_config(None, [*SMALL, f"algorithm.replay={replay}"])
    model = lively("moe", experts=16, top_k=1, expert_hidden=64)
    run = MiniRLTrainer(config, out, model=model, resume=resume, progress=False)
    # An untrained model solves nothing, and without a reward nothing moves: reward an even first token.
    run.rewards = lambda problems, rollout: (rollout.tokens[:, rollout.prompt_length] % 2 == 0).float()
    return run


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.mark.parametrize("replay", ["none", "R3"])
def test_the_gap_is_routing_and_a_resumed_run_is_the_same(tmp_path: Path, replay: str):
    trainer(tmp_path / "whole", replay).train()
    whole = lines(tmp_path / "whole")
    for line in whole[1:]:
        if replay == "R3":  # what is left is the order of fp32 sums
            assert line["routing_flip_rate"] == 0 and line["k3_rollout_old"] < 1e-8
        else:
            assert line["routing_flip_rate"] > 0.05 and line["k3_rollout_old"] > 1e-3
    assert whole[0]["score"] != whole[0]["score_rollout"]  # the engine is disturbed in evaluations too

    stopped = trainer(tmp_path / "stopped", replay)
    step = stopped.global_step

    def interrupted() -> list[dict]:
        if stopped.step == 2:
            raise KeyboardInterrupt
        return step()

    stopped.global_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert len(lines(tmp_path / "stopped")) < len(whole)
    trainer(tmp_path / "stopped", replay, resume=True).train()
    assert lines(tmp_path / "stopped") == whole
