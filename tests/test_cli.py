"""The command line: what it writes, how it goes on after a stop, and what it says to a mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minirl_edu import __version__, plots
from minirl_edu.cli import DEMO_VARIANTS, _folder_name, _parser, demo_folder, main
from minirl_edu.config import load_config
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.recipes import RECIPES, recipes
from minirl_edu.records import read_records
from minirl_edu.rollout import EngineError, HFEngine
from minirl_edu.run.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "data" / "demo"
TINY = [
    *("--set", "train.global_steps=2", "--set", "train.mini_batches=2", "--set", "train.mini_batch_prompts=4"),
    *("--set", "train.group_size=4", "--set", "eval.problems=16"),
]


@pytest.fixture
def plain(monkeypatch):
    """Reports without their pictures, which take longer than these runs. The first test has them."""
    monkeypatch.setattr(plots, "to_png", lambda figure, *, scale=2: b"")


def scores(folder: Path) -> list[float]:
    return [record["score"] for record in read_records(folder / "metrics.jsonl") if "score" in record]


def test_train_writes_a_run_and_its_report(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TINY]) == 0
    assert {"config.yaml", "metrics.jsonl", "environment.json", "checkpoints", "report.html", "figures"} <= {
        path.name for path in out.iterdir()
    }
    assert str(out / "report.html") in capsys.readouterr().out
    assert len(read_records(out / "metrics.jsonl")) == 1 + 2 * 2
    assert json.loads((out / "environment.json").read_text())["minirl_edu"] == __version__


@pytest.mark.usefixtures("plain")
def test_resume_needs_no_config_and_a_longer_run_goes_on(tmp_path):
    out = tmp_path / "run"
    main(["train", "--out", str(out), *TINY])
    before = (out / "metrics.jsonl").read_text()
    assert main(["train", "--out", str(out), "--resume", "--set", "train.global_steps=3"]) == 0
    after = (out / "metrics.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 1 + 3 * 2


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("error", [EngineError("no answer"), ConnectionError("no server"), TimeoutError("too slow")])
def test_an_engine_that_cannot_go_on_ends_in_two_lines_and_the_run_goes_on_later(tmp_path, capsys, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    out = tmp_path / "a run"
    with monkeypatch.context() as broken:
        broken.setattr(HFEngine, "generate", fail)
        assert main(["train", "--out", str(out), *TINY]) == 1
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0] == f"minirl train: the rollout engine: {error}"
    assert said[1].endswith(f"minirl train --resume --out '{out}'")
    assert main(["train", "--out", str(out), "--resume"]) == 0


@pytest.mark.usefixtures("plain")
def test_the_demo_trains_both_variants_goes_on_where_it_was_and_does_not_train_twice(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    folders = {name: out / demo_folder(name) for name in DEMO_VARIANTS}
    assert all(len(read_records(folder / "metrics.jsonl")) == 5 for folder in folders.values())
    page = (out / "report.html").read_text()
    assert all(name in page for name in DEMO_VARIANTS)
    before = {name: (folder / "metrics.jsonl").stat().st_mtime_ns for name, folder in folders.items()}
    capsys.readouterr()
    assert main(["demo", "--out", str(out), *TINY]) == 0
    assert before == {name: (folder / "metrics.jsonl").stat().st_mtime_ns for name, folder in folders.items()}
    assert "delete" in capsys.readouterr().out  # says how to train again


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/demo"),
        (["--set", "seed=1"], "runs/demo/seed=1"),
        (["--set", "seed=1", "--out", "mine"], "mine"),
    ],
)
def test_the_demo_with_overrides_runs_in_a_folder_of_its_own(capsys, monkeypatch, arguments, folder):
    class Finished:
        def __init__(self, config, out, *, resume):
            assert config.seed == len(arguments[:1])
            runs.append(out)
            self.step = config.train.global_steps

    runs = []
    monkeypatch.setattr("minirl_edu.trainer.MiniRLTrainer", Finished)
    monkeypatch.setattr("minirl_edu.report.write_report", lambda runs, out, **_: out)
    monkeypatch.setattr("minirl_edu.records.read_records", lambda path: [{"score": 0.5}])
    assert main(["demo", *arguments]) == 0
    assert runs == [Path(folder) / demo_folder(name) for name in DEMO_VARIANTS]
    assert f"report: {folder}/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], r"^$"),
        (["seed=1"], r"^seed=1$"),
        (["seed=1", "train.lr=1e-4"], r"^seed=1,train\.lr=1e-4$"),
        (["task.options={a: 1}"], r"^task\.options=_a__1_-[0-9a-f]{8}$"),
        (["model.name=../x"], r"^model\.name=\.\._x-[0-9a-f]{8}$"),
        ([f"train.lr={i}" for i in range(99)], r"^train\.lr=0,[\w.,=]+-[0-9a-f]{8}$"),
    ],
)
def test_the_demos_folder_is_named_after_its_overrides(overrides, name):
    found = _folder_name(overrides)
    assert re.search(name, found) and len(found) < 100 and "/" not in found
    assert _folder_name(["task.options={a: 1}"]) != _folder_name(["task.options=[a: 1]"])


def test_without_a_command_there_is_an_overview_that_begins_with_what_a_newcomer_needs(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z-]+)  +[A-Z]", said, re.MULTILINE)
    assert listed[:3] == ["demo", "train", "report"]
    assert sorted(listed) == sorted(_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
    assert said.startswith("usage: minirl") and all(name in said for name in recipes())
    assert max(map(len, said.splitlines())) <= 150


def test_recipes_are_listed_where_a_config_is_taken(capsys):
    for command in ("train", "plan"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = "".join(capsys.readouterr().out.split())
        assert all(name in said for name in recipes()) and f"usage:minirl{command}" in said


def test_the_light_commands_load_no_more_than_they_need(tmp_path):
    code = "import sys; from minirl_edu.cli import main; main(sys.argv[1:]); print(chr(10), *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in ([], ["watch", str(DEMO / "MiniRL-R3")]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert not {"torch", "transformers", "matplotlib"} & set(done.stdout.splitlines()[-1].split())


def test_fields_of_a_section(capsys):
    assert main(["fields", "algorithm"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("\nalgorithm: What is optimised")
        and "  algorithm.replay = none\n      one of none, R2, R3\n" in said
    )
    assert "train.lr" not in said
    assert main(["fields"]) == 0
    assert all(f"  {name} = " in capsys.readouterr().out for name in ["ranks.silent"])


def test_watch_without_a_terminal_prints_once(capsys):
    assert main(["watch", str(DEMO / "MiniRL-R3"), str(DEMO / "no-replay-no-clipping")]) == 0
    said = capsys.readouterr().out
    assert said.count("held-out score") == 2 and "done" in said and "\x1b" not in said


def test_the_shell_is_told_what_may_come_next(monkeypatch, capsys):
    parsers = []
    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=parsers.append))
    main([])
    assert parsers == []  # only when the shell asks
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    main([])
    (parser,) = parsers
    train = parser._subparsers._group_actions[0].choices["train"]
    completers = {action.dest: action.completer for action in train._actions if hasattr(action, "completer")}
    monkeypatch.chdir(ROOT)
    assert {"demo", "smollm2", "minirl_edu/"} <= set(completers["config"](prefix="mini"))
    assert {"train.lr=", "seed="} <= set(completers["set"](prefix="tr")) and "train=" not in completers["set"]()
    monkeypatch.setitem(sys.modules, "argcomplete", None)  # not installed
    assert main([]) == 0


@pytest.mark.parametrize("entry", ["module", "script", "launcher"])
def test_ctrl_c_while_importing_ends_without_a_traceback(entry, tmp_path):
    """SIGINT to a real process in the middle of importing torch, which says so by opening a pipe that we read."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch._tensor':\n"
        "            print('importing', flush=True)\n"
        "sys.meta_path.insert(0, Tell())\n"
    )
    start = {
        "module": ["-m", "minirl_edu.cli", "doctor"],
        "script": ["-c", "import sys; from minirl_edu.cli import main; sys.exit(main())", "doctor"],
        "launcher": ["scale/train.py", "--help"],
    }[entry]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, *start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_ctrl_c_in_a_command_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minirl_edu.doctor.report", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "minirl doctor: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.nightly  # every day the demo runs small, and the metrics of a whole one are judged: tests/test_report.py
@pytest.mark.usefixtures("plain")
def test_the_demo_shows_what_it_says(tmp_path):
    """The recipe itself: with replay and clipping the score rises, without them the policy is lost."""
    assert main(["demo", "--out", str(tmp_path), "--set", "output.save_every=0"]) == 0
    with_replay, without = (scores(tmp_path / demo_folder(name)) for name in DEMO_VARIANTS)
    # 256 problems: two standard errors are 0.06.
    assert with_replay[0] == without[0] == pytest.approx(0.38, abs=0.06)
    assert with_replay[-1] > with_replay[0] + 0.15 and without[-1] < without[0] - 0.15


@pytest.mark.usefixtures("plain")
def test_an_exported_model_is_the_trained_one_and_loads_by_its_folder(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "model"
    main(["train", "--out", str(run), *TINY, "--set", "train.lr=1e-2"])
    assert main(["export", str(run), "--out", str(out)]) == 0
    trained = load_checkpoint(run / "checkpoints" / "step-000002")[0]["model"]
    exported, before = load_model(str(out)).state_dict(), load_model("chain-steps").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())
    assert any(not torch.equal(exported[name], tensor) for name, tensor in before.items())
    assert load_tokenizer(str(out)).get_vocab() == load_tokenizer("chain-steps").get_vocab()
    assert main(["export", str(run), "--out", str(out)]) == 2 and "not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "no run with an intact checkpoint" in capsys.readouterr().err


def test_report_of_one_run_is_beside_it(tmp_path, capsys):
    run = copied(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "<b>MiniRL + R3</b>" in (run / "report.html").read_text()
    assert (run / "figures" / "four_curves.png").stat().st_size > 10_000
    assert main(["report", f"mine={run}", "--out", str(tmp_path / "mine.html")]) == 0
    assert "<b>mine</b>" in (tmp_path / "mine.html").read_text()


def copied(folder: Path, variant: str = "MiniRL-R3", *settings: tuple[str, str]) -> Path:
    """The demo's kept run in another folder, with other settings."""
    shutil.copytree(DEMO / variant, folder)
    config = folder / "config.yaml"
    for old, new in settings:
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    return folder


@pytest.mark.usefixtures("plain")
def test_compare_names_runs_by_their_folders_or_labels_and_takes_one_label_for_seeds(tmp_path, capsys):
    a, b = copied(tmp_path / "x" / "a"), copied(tmp_path / "seed=1" / "b", "no-replay-no-clipping")
    assert main(["compare", str(a), f"theirs={b}"]) == 0
    page = tmp_path / "compare.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert "<b>a</b> went" in page.read_text() and "<b>theirs</b> rose" in page.read_text()
    again = copied(tmp_path / "y" / "a", "MiniRL-R3", ("seed: 0", "seed: 1"))
    assert main(["compare", str(a), str(again), str(b)]) == 0  # a folder with a = in its path is no label
    assert "<b>a</b> (2 seeds) went" in page.read_text() and "<b>b</b> rose" in page.read_text()
    assert main(["compare", f"all={a}", f"all={b}"]) == 0
    assert "<b>all</b> (2 seeds) went" in page.read_text()
    other = copied(tmp_path / "z" / "a", "MiniRL-R3", ("lr: 0.0006", "lr: 0.0003"))
    capsys.readouterr()
    assert main(["compare", str(a), str(other)]) == 2
    said = capsys.readouterr().err
    assert "share a name and differ in more than the seed" in said and f"first={a} second={other}" in said


@pytest.mark.usefixtures("plain")
def test_a_reward_that_is_none_ends_in_two_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minirl_edu.tasks.ChainTask.reward", lambda self, problem, response: 2.0)
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TINY]) == 1
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0].startswith(
        "minirl train: task 'chain': the reward 2.0 of a response is no number in [0, 1]; correct"
    )
    assert said[1].endswith(f"minirl train --resume --out {out}")


def test_cold_start_writes_a_model_with_its_record(tmp_path, capsys):
    out = tmp_path / "mine"
    flags = ["--style", "copy", "--steps", "3", "--architecture", "dense", "--seed", "4"]
    assert main(["cold-start", "--out", str(out), *flags]) == 0
    record = json.loads((out / "cold_start.json").read_text())
    assert record["command"] == (
        "minirl cold-start --task chain --style copy --operators + --architecture dense --error-rate 0.21 --steps 3 "
        "--batch-size 128 --lr 0.001 --seed 4 --out mine"
    )
    assert 0 <= record["metrics"]["score"] <= 1
    assert sum(p.numel() for p in load_model(str(out)).parameters()) == record["parameters"]


@pytest.mark.parametrize("model", ["tiny-moe", "chain-steps"])
def test_gap_of_one_engine_prints_and_writes_what_it_measured(tmp_path, capsys, model):
    out = tmp_path / "gap"
    flags = ["--engine", "hf", "--precision", "int8", "--prompts", "4", "--max-new-tokens", "6", "--seeds", "1"]
    assert main(["gap", "--model", model, *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    row = json.loads((out / "gap.json").read_text())["rows"][0]
    assert f"{row['seeds'][0]['plain']['k3']:.1e}" in printed and "token position" in printed and "healthy" in printed
    assert (row["seeds"][0]["responses"], row["precision"], row["model"]) == (16, "int8", model)
    assert row["seeds"][0]["r3"]["k3"] > 0
    assert all((out / f"gap.{suffix}").stat().st_size > 5000 for suffix in ("png", "svg"))


@pytest.mark.slow
def test_gap_alone_shows_the_mechanism(tmp_path, capsys):
    assert main(["gap", "--engine", "hf", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(label in printed for label in ("MoE, transformers fp32", "dense, transformers bf16", "R3", "ess_token"))
    rows = {row["label"]: row["seeds"] for row in json.loads((tmp_path / "gap.json").read_text())["rows"]}
    moe, dense = rows["MoE, transformers bf16"], rows["dense, transformers bf16"]
    assert all(m["plain"]["k3"] > 8 * d["plain"]["k3"] for m, d in zip(moe, dense, strict=True))


def test_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed and "notebooks" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "train.lrr=1"], r"train.lrr"),
        (["train", "--set", "model.name=nowhere/nothing"], "chain-steps"),
        (["train", "--resume"], "holds no run"),
        (
            ["train", "--config", "missing.yaml"],
            "missing.yaml: there is no such file, and no recipe of that name (demo, ",
        ),
        (["plan", "--config", "dmo"], "did you mean demo?"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "a=nowhere", "b=nowhere"], "nowhere"),
        (["watch", "nowhere"], "no metrics at nowhere"),
        (["fields", "trian"], "did you mean train"),
        (["report", "BROKEN"], "holds no complete step yet"),
        (["train", "--set", "algorithm.objective=grpo", "--set", "algorithm.clip=false"], "algorithm.clip = False"),
        (["gap", "--precision", "int8"], "--precision describes one engine: give --model"),
        (["gap", "--model", "nowhere/nothing"], "chain-steps"),
        (["gap", "--model", "tiny-moe", "--engine", "hf", "--option", "kv_cache_dtype=fp8"], "hf has none"),
        (["gap", "--model", "tiny-moe", "--option", "fp8"], "KEY=VALUE"),
        (["gap", "--model", "tiny-moe", "--engine", "hf", "--precision", "int9"], "int9"),
        (["gap", "--seeds", "0"], "--seeds = 0"),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(tmp_path, capsys, arguments, message):
    out = ["--out", str(tmp_path / "run")] if arguments[0] in ("train", "gap") else []
    (tmp_path / "metrics.jsonl").touch()
    assert main([str(tmp_path) if word == "BROKEN" else word for word in [*arguments, *out]]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.usefixtures("plain")
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    arguments = ["train", "--out", str(tmp_path / "run"), *TINY]
    main(arguments)
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_config(recipe):
    load_config(recipe)
