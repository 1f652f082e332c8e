"""Faults of a machine and of its users, each in a real run: what it says, what is left, and that the run goes on."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from minirl_edu.models import tiny_dense
from minirl_edu.run.checkpoint import latest_checkpoint
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import MathTask
from tests.conftest import byte_tokenizer
from tests.forked import Forked
from tests.scale.launch import environment

pytestmark = pytest.mark.slow
STEPS = 4
RUN = (
    *("train.mini_batch_prompts=4", "train.group_size=4", "train.mini_batches=2", "train.lr=1e-3"),
    *("eval.every=2", "eval.problems=8", "output.save_every=1", "output.keep_last=2"),
)


def start(out: Path, *settings: str, resume: bool = False, limit: int | None = None) -> Forked:
    """`minirl train`; no file of it may grow beyond `limit` bytes, as if there were no room for more."""
    flags = [word for setting in settings for word in ("--set", setting)]
    words = ["train", "--out", str(out), *flags, *["--resume"] * resume]
    return Forked("-m minirl_edu.cli", words, environment=environment(), limit=limit)


def train(out: Path, *settings: str, expect: int = 0, **options: Any) -> str:
    """Run it to its end, and return what it printed."""
    process = start(out, *settings, **options)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == expect, printed
    return printed


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None and path.name == f"step-{STEPS:06d}"
    return load_file(path / "model.safetensors")


def assert_same_run(out: Path, expected: Path) -> None:
    """The same metrics, but for the time, and the same weights, bit for bit."""
    assert metrics(out) == metrics(expected)
    seen, wanted = weights(out), weights(expected)
    assert seen.keys() == wanted.keys() and all(torch.equal(seen[name], wanted[name]) for name in seen)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(out, *RUN, f"train.global_steps={STEPS}")
    before = load_file(out / f"checkpoints/step-{STEPS - 1:06d}/model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(out).items())  # steps leave a trace
    return out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended after two steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(out, *RUN, "train.global_steps=2")
    return out


# ---------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB: room for one checkpoint of 10 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_while_a_checkpoint_is_written(small_disk, undisturbed):
    out = small_disk / "run"
    printed = train(out, *RUN, f"train.global_steps={STEPS}", expect=1)
    assert "No space left on device" in printed and "Traceback" not in printed
    assert f"nothing that was saved is lost; make room, then go on with: minirl train --resume --out {out}" in printed
    assert os.listdir(out / "checkpoints") == ["step-000001"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(out, resume=True)
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("which", ["checkpoint", "metrics"])
def test_no_room_for_a_file(which, begun, undisturbed, tmp_path):
    """The optimizer's state is larger than the model; the metrics break off in the middle of a line."""
    out, longer = tmp_path / "a run", f"train.global_steps={STEPS}"
    shutil.copytree(begun, out)
    saved = contents(out / "checkpoints")
    written = (out / "metrics.jsonl").read_bytes()
    size = {name: (out / name).stat().st_size for name in ("metrics.jsonl", "config.yaml", "environment.json")}
    assert size["metrics.jsonl"] == max(size.values())  # so that the limit below stops nothing else
    limit = len(saved["step-000002/model.safetensors"]) + 100 if which == "checkpoint" else size["metrics.jsonl"] + 100
    printed = train(out, longer, resume=True, limit=limit, expect=1)
    assert "File too large" in printed and "Traceback" not in printed
    assert f"nothing that was saved is lost; make room, then go on with: minirl train --resume --out '{out}'" in printed
    assert contents(out / "checkpoints") == saved
    after = (out / "metrics.jsonl").read_bytes()
    assert after.startswith(written) and len(after) > len(written)
    assert after.endswith(b"\n") == (which == "checkpoint")
    train(out, longer, resume=True)
    assert_same_run(out, undisturbed)


# ------------------------------------------------------------------------------------------------- a damaged checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "files", "words", "from_step"),
    [
        (flip, ["step-000004/model.safetensors"], ["its contents changed after it was written"], 3),
        (cut, ["step-000004/optimizer.safetensors"], ["bytes where"], 3),
        (flip, ["step-000003/state.json", "step-000004/state.json"], ["step-000003/state.json", "step-000004/"], 0),
    ],
    ids=["a flipped bit", "cut off", "all of them"],
)
def test_a_damaged_checkpoint_is_passed_over(damage, files, words, from_step, undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for file in files:
        damage(out / "checkpoints" / file)
    printed = train(out, resume=True)
    assert all(word in printed for word in words) and "looking for an earlier checkpoint" in printed
    assert f" {from_step}/{STEPS} [" in printed  # the bar, where it began
    assert_same_run(out, undisturbed)


# ----------------------------------------------------------------------------------------- verifiers and their problems


VERIFIER = """
import os, time

def make():
    def verify(response, answer):
        if answer == "hang":
            time.sleep(60)
        if answer == "die":
            os._exit(3)
        if answer == "raise":
            raise ZeroDivisionError("an answer that nobody thought of")
        return float(len(response) % 2)

    return verify
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads and writes any text, as noise."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_dense(len(tokenizer), seed=0, **ids).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


def problems(path: Path, answers: list[str]) -> None:
    rows = [{"problem": f"problem {i}", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def on_text(reader: Path, folder: Path, **options: Any) -> list[str]:
    chosen = {
        "path": str(folder / "train.jsonl"),
        "eval_path": str(folder / "test.jsonl"),
        "max_new_tokens": 4,
        **options,
    }
    return [*RUN, f"model.name={reader}", "task.name=math_jsonl", f"task.options={json.dumps(chosen)}", "eval.every=0"]


def test_a_verifier_that_hangs_raises_or_dies_costs_its_answer_and_is_counted(reader, tmp_path):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    problems(tmp_path / "train.jsonl", ["right"] * 21 + ["hang", "raise", "die"])
    problems(tmp_path / "test.jsonl", ["right"])
    options = {"verifier": f"{tmp_path / 'verifier.py'}:make", "time_limit": 0.3}
    settings = on_text(reader, tmp_path, **options)
    with pytest.warns(UserWarning, match="training skips them"):  # "problem 0" is in both
        task = MathTask(
            tokenizer=byte_tokenizer(), path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "test.jsonl")
        )
    out = tmp_path / "run"
    printed = train(out, *settings, f"train.global_steps={STEPS}")
    assert printed.count("scored 0, later failures are only counted") == 1
    asked = [task.sample(8, seed=derive_seed(0, "problems", step)) for step in range(STEPS)]
    failing = [4 * sum(problem.answer != "right" for problem in of_step) for of_step in asked]
    assert sum(failing) > 8
    counted = [line["verifier_failures"] for line in metrics(out) if "verifier_failures" in line]
    assert counted == failing


def test_a_poisoned_row_is_refused_by_file_and_line(reader, tmp_path):
    problems(tmp_path / "train.jsonl", ["2"] * 20)
    problems(tmp_path / "test.jsonl", ["2"])
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:12], lines[12].replace('"2"', "[2]"), *lines[13:]]))
    printed = train(tmp_path / "run", *on_text(reader, tmp_path), expect=2)
    assert f"{tmp_path / 'train.jsonl'}:13: 'answer' must be a number, or a text" in printed and "[2]" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()  # the corrected command may use the same folder


# ----------------------------------------------------------------------------------------------- two runs in one folder


def wait_for(condition: Callable[[], bool], process: Forked) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_ended(undisturbed, tmp_path):
    out, settings = tmp_path / "run", [*RUN, f"train.global_steps={STEPS}"]
    first = start(out, *RUN, "train.global_steps=100000", "output.keep_last=1000")
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 2, first)
        first.send_signal(signal.SIGSTOP)  # nothing of what follows is the first one's doing
        wait_for(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, first)
        before = contents(out)
        for resume in (True, False):
            printed = train(out, *settings, resume=resume, expect=2)
            assert f"{out}: in use by process {first.pid} on " in printed and "Traceback" not in printed
        assert contents(out) == before
    finally:
        first.kill()
        first.communicate()
    train(out, f"train.global_steps={STEPS}", "output.keep_last=2", resume=True)  # free at once
    assert_same_run(out, undisturbed)
