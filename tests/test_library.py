"""What a stranger imports: the names of `minirl_edu`, what they load, and the package without its extras."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minirl_edu
from minirl_edu.cli import main
from minirl_edu.records import read_records
from tests.conftest import ROOT
from tests.forked import Forked

HEAVY = ("accelerate", "matplotlib", "scipy", "transformers", "yaml")
PROMISED = (
    *("minirl_loss", "grpo_loss", "cispo_loss", "group_mean_advantages", "RoutingReplay", "policy_metrics"),
    *("CollapseDetector", "MiniRLTrainer", "load_config", "watch"),
)
SCRIPTS = ROOT / "lessons" / "site" / "scripts"
CORE = sorted(set(PROMISED) - {"MiniRLTrainer", "load_config"})


def fresh(code: str, python: Path | None = None) -> str:
    """What the code prints in a new interpreter, which no test has loaded anything into; `python`: an environment's."""
    environment = {**os.environ, "PYTHONPATH": "" if python else str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python or sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_promised_names_are_those_that_a_type_checker_sees():
    tree = ast.parse((ROOT / "minirl_edu" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(seen) == minirl_edu.__all__ == sorted(PROMISED)
    assert set(PROMISED) <= set(dir(minirl_edu))
    for name, module in seen.items():
        assert getattr(minirl_edu, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match=r"module 'minirl_edu' has no attribute 'minrl_loss'"):
        minirl_edu.minrl_loss  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_costs_nothing():
    loaded = fresh("import sys; old = set(sys.modules); import minirl_edu; print(*set(sys.modules) - old)").split()
    assert "minirl_edu" in loaded
    ours = [name for name in loaded if name.startswith("minirl_edu.")]
    foreign = [name for name in loaded if name.partition(".")[0] not in {*sys.stdlib_module_names, "minirl_edu"}]
    assert (ours, foreign) == ([], [])


def test_the_core_imports_with_torch_alone_and_fast():
    code = (
        "import sys, time; before = time.process_time()\n"
        f"from minirl_edu import {', '.join(CORE)}\n"
        f"print(time.process_time() - before, *(name for name in {HEAVY} if name in sys.modules))"
    )
    seconds, *heavy = fresh(code).split()
    assert heavy == []
    # 1.1 s where this was written, all but 0.02 s of it torch's own; transformers would add five.
    assert float(seconds) < 4


LISTS = """
import numpy as np, torch, minirl_edu as m
x = torch.full((2, 3), -1.0)
good = {"logp": x, "logp_old": x, "logp_rollout": x, "advantages": torch.ones(2), "mask": torch.ones(2, 3)}
def said(f, *args):
    try:
        f(*args)
    except TypeError as error:
        return str(error)
for kind in (lambda x: x.tolist(), lambda x: x.numpy()):
    for name in good:
        print(said(m.minirl_loss, *{**good, name: kind(good[name])}.values()))
    print(said(m.grpo_loss, kind(x), x, good["advantages"], good["mask"]))
    print(said(m.cispo_loss, x, x, kind(good["advantages"]), good["mask"]))
    print(said(m.policy_metrics, x, x, x, kind(good["mask"])))
    print(said(m.group_mean_advantages, kind(torch.ones(4)), 2))
"""


def test_a_list_or_an_array_is_refused_in_words():
    """In an interpreter of its own, because the tests' type checker would refuse it before the library does."""
    names = ("logp", "logp_old", "logp_rollout", "advantages", "mask", "logp", "advantages", "mask", "rewards")
    shapes = {"advantages": "[B] or [B, T]", "rewards": "[B]"}
    expected = [
        f"{name} is a {kind}; pass a tensor {shapes.get(name, '[B, T]')}: torch.as_tensor({name})"
        for kind in ("list", "ndarray")
        for name in names
    ]
    assert fresh(LISTS).splitlines() == expected


# ------------------------------------------------------------------------------------------- the scripts of the site


@pytest.mark.parametrize("page", ["own_loop", "own_parts"])
def test_a_page_shows_its_scripts_as_they_are(page):
    text = (SCRIPTS.parent / f"{page}.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    named = re.findall(r"\]\(scripts/(\w+\.py)\)", text)
    assert shown == [(SCRIPTS / name).read_text(encoding="utf-8") for name in named] != []


def run_script(name: str, *arguments: object) -> str:
    process = Forked(SCRIPTS / name, arguments)
    assert process.wait(300) == 0, process.output
    return process.output


def test_a_loop_of_ones_own_learns():
    assert len((SCRIPTS / "own_loop.py").read_text(encoding="utf-8").splitlines()) <= 60
    rewards = [float(value) for value in re.findall(r"reward ([\d.]+)", run_script("own_loop.py"))]
    # Half of the tokens are even by chance. 64 rewards of about 12 tokens each: a standard error of 0.02.
    assert len(rewards) == 20 and abs(rewards[0] - 0.5) < 0.1 and rewards[-1] > 0.75


def test_the_metrics_of_a_log_are_those_computed_by_hand():
    lines = [line.split() for line in run_script("logged_metrics.py").splitlines()]
    log = [json.loads(line) for line in (SCRIPTS / "logged.jsonl").read_text(encoding="utf-8").splitlines()]
    column = lines[0].index("kl_rollout_old")
    for step, *_ in lines[1:]:
        responses = [line for line in log if line["step"] == int(step)]
        gaps = [a - b for line in responses for a, b in zip(line["logp_rollout"], line["logp_old"], strict=True)]
        (shown,) = (float(line[column]) for line in lines[1:] if line[0] == step)
        assert shown == pytest.approx(sum(gaps) / len(gaps), rel=0.05)  # two digits are printed


def test_replay_closes_the_gap_of_a_model_of_ones_own():
    said = run_script("own_moe.py")
    live, replayed = (float(value) for value in re.findall(r"\(k3\) (\S+) nats", said))
    assert live > 5 * replayed > 0 and said.endswith("every router has a gradient: True\n")


def test_a_task_of_ones_own_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    small = ("task.name=own_task:Sums", "eval.problems=20", "train.global_steps=2", "train.mini_batch_prompts=4")
    assert main(["train", "--out", str(tmp_path / "run"), *(word for value in small for word in ("--set", value))]) == 0
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [record["global_step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert re.fullmatch(r"\d\+\d=", json.loads(samples[0])["samples"][0]["prompt"])
    assert main(["train", "--out", str(tmp_path / "other"), "--set", "task.name=own_task:Products"]) == 2
    assert capsys.readouterr().err.endswith("task: task 'own_task:Products': own_task has no class 'Products'\n")


def test_the_trainer_takes_a_model_and_an_engine_of_ones_own(tmp_path):
    run_script("own_parts.py", tmp_path / "run")
    lines = [line for line in read_records(tmp_path / "run" / "metrics.jsonl") if "log_ratio_mismatch" in line]
    fresh_weights, late = lines[0::2], lines[1::2]  # steps 1 and 3, 2 and 4
    assert len(fresh_weights) == len(late) == 2
    worst = max(line["log_ratio_mismatch"] for line in fresh_weights)
    assert min(line["log_ratio_mismatch"] for line in late) > 5 * worst


# ------------------------------------------------------------------------------------------- the wheel, without extras

USES = f"""
import runpy, sys
import torch
from minirl_edu import {", ".join(CORE)}

for script in ("own_moe.py", "logged_metrics.py"):  # these need no extra, as the page says
    sys.argv = [script]
    runpy.run_path(f"{SCRIPTS}/{{script}}", run_name="__main__")

logits = torch.randn(4, 3, 7, requires_grad=True)
logp = logits.log_softmax(-1)[..., 0]
old, mask = logp.detach(), torch.ones(4, 3)
advantages = group_mean_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2)
for loss in (minirl_loss(logp, old, old - 0.1, advantages, mask), grpo_loss(logp, old, advantages, mask),
             cispo_loss(logp, old, advantages, mask)):
    logits.grad = None
    loss.loss.backward(retain_graph=True)
    assert logits.grad.abs().sum() > 0 and loss.metrics
assert abs(policy_metrics(logp, old, old - 0.1, mask)["kl_rollout_old"] + 0.1) < 1e-6
assert CollapseDetector().update({{"grad_step": 1, "reward": float("nan")}})

print(*sorted({{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)))
"""


def distributions(name: str) -> dict[str, metadata.Distribution]:
    """A distribution of this environment and all that it requires, without extras, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [name]
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        if (key := canonicalize_name(distribution.metadata["Name"])) not in found:
            found[key] = distribution
            lines = map(Requirement, distribution.requires or [])
            waiting += [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy: setuptools writes beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")  # 12 MB of cold starts that nothing here loads
    shutil.copytree(ROOT / "minirl_edu", source / "minirl_edu", ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> tuple[Path, set[str]]:
    """The Python of an environment with the wheel and what it requires without extras; and the names of the latter."""
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    lines = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    core = [line.name for line in lines if line.marker is None]
    assert set(core) == {"torch", "numpy", "jaxtyping", "packaging"}
    required = {key: found for name in core for key, found in distributions(name).items()}
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in required.values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(distribution.locate_file(top))
    python = folder / "bin" / "python"
    # With its dependencies, but without an index: pip itself finds that none of them is missing.
    pip("--python", str(python), "install", "--no-index", str(wheel))
    return python, set(required)


@pytest.mark.slow
def test_the_wheel_alone_runs_the_losses_and_replay(bare):
    python, required = bare
    listed = fresh("from importlib.metadata import distributions\nprint(*(d.name for d in distributions()))", python)
    assert {canonicalize_name(name) for name in listed.split()} == required | {"minirl-edu"}
    assert not required & {"accelerate", "matplotlib", "pyyaml", "safetensors", "scipy", "tokenizers", "transformers"}
    *said, loaded = fresh(USES, python).splitlines()
    assert said[0].startswith("live: ") and said[3].startswith("step kl_rollout_old ")
    loaded = set(loaded.split())
    assert {"minirl_edu", "torch", "jaxtyping"} <= loaded
    # What torch loads of its own accord, one name a requirement; extensions such as torch's _C have none of theirs.
    modules = {name.replace("-", "_") for name in required} | {"minirl_edu", "functorch", "torchgen", "pkg_resources"}
    assert {name for name in loaded if not name.startswith("_")} <= modules


@pytest.mark.slow
def test_without_its_extra_a_name_or_a_command_says_which_to_install(bare):
    python, _ = bare
    code = "try:\n    from minirl_edu import {0}\nexcept ImportError as error:\n    print(error)"
    advice = "is not installed; it comes with the extra 'train': python -m pip install \"minirl-edu[train]\"\n"
    assert fresh(code.format("load_config"), python) == f"load_config: pyyaml {advice}"
    assert fresh(code.format("MiniRLTrainer"), python).endswith(advice)
    plug_in = "try:\n    import minirl_edu.plugins.trl\nexcept ImportError as error:\n    print(error)"
    assert 'python -m pip install "minirl-edu[trl]"' in fresh(plug_in, python)  # the wheel has the plug-ins
    command = "from minirl_edu.cli import main\nprint(main({0}))"
    train = command.format(["train", "--out", "x"]).replace("from", "import sys; sys.stderr = sys.stdout\nfrom", 1)
    assert fresh(train, python) == f"minirl train: pyyaml {advice}2\n"
    said = fresh(command.format(["doctor"]), python)
    assert said.endswith("healthy\n0\n") and "plots: matplotlib not installed, scipy not installed" in said


@pytest.mark.slow
def test_training_needs_no_plots(tmp_path):
    words = ["train", "--out", str(tmp_path / "run"), "--set", "train.global_steps=1", "--set", "eval.problems=16"]
    blocked = "import sys\nsys.modules.update(matplotlib=None, scipy=None)  # as if not installed\n"
    said = fresh(f"{blocked}from minirl_edu.cli import main\nprint(main({words!r}))")
    assert re.fullmatch(rf"no report: .*matplotlib.*; then: minirl report {tmp_path}/run\n0\n", said)
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2
