"""`minirl reproduce`: from the spec to runs, figures and verdicts, and on from where it was stopped."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from minirl_edu.archives import files_in
from minirl_edu.cli import main
from minirl_edu.experiments.reproduce import draw, draw_grid, write_results
from minirl_edu.experiments.runner import jobs_for, run_header
from minirl_edu.experiments.spec import COLUMNS, RunResult, Spec, load_spec, write_run

TINY = {
    "base": {
        "train.mini_batch_prompts": 2,
        "train.group_size": 2,
        "train.global_steps": 2,
        "eval": {"every": 1, "problems": 8},
    },
    "settings": {"near": {"about": "near policy", "set": {}}},
    "variants": {
        "minirl": {"label": "MiniRL", "set": {}},
        "hot": {"label": "hot", "set": {"train.lr": 3e-3}},
    },
    "figures": {"one": {"title": "One", "runs": [["near", "minirl"], ["near", "hot"]], "error_parts": True}},
    "grids": {
        "map": {
            "title": "A map",
            "about": "somewhere",
            "seeds": 1,
            "set": {},
            "across": {"label": "learning rate", "values": {"1e-4": {"train.lr": 1e-4}, "1e-3": {"train.lr": 1e-3}}},
            "up": {"label": "N", "values": {"1": {}, "2": {"train.mini_batches": 2}}},
            "variants": ["minirl", "hot"],
        }
    },
    "groups": {"everything": ["one", "map"]},
    "tiers": {"fast": {"seeds": 2, "set": {}}, "full": {"seeds": 8, "set": {}}},
    "seeds": {"first": 0, "calibration": 100},
    "definitions": {"final_evaluations": 1, "collapse_share": 0.7},
    "claims": [
        {
            "id": "C1",
            "paper": "Hot is better.",
            "setting": "large",
            "figure": "one",
            "criteria": [
                {"kind": "higher", "metric": "final_score", "run": ["near", "hot"], "than": ["near", "minirl"]}
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def spec(spec_path: Path) -> Spec:
    return load_spec(spec_path)


def result(seed: int, scores: list[float]) -> RunResult:
    names = ("reward", "entropy", "kl_rollout_old", "k3_rollout_old")
    metrics = {name: np.full(len(scores), 0.1) for name in names}
    metrics |= {"score": np.array(scores), "score_rollout": np.full(len(scores), math.nan)}
    metrics |= {name: np.arange(float(len(scores))) for name in ("grad_step", "global_step")}
    return RunResult(seed, metrics, None, "", 1.0)


def test_the_figure_has_a_line_per_run_over_its_seeds(spec: Spec):
    results = {("near", "minirl"): [result(0, [0.4, 0.6]), result(1, [0.4, 0.8])], ("near", "hot"): [result(0, [0, 1])]}
    lines = {line.get_gid(): line for line in draw(spec, "one", results).axes[0].lines}
    assert lines["score:MiniRL"].get_ydata() == pytest.approx([0.4, 0.7])
    assert lines["score:hot"].get_ydata() == pytest.approx([0, 1])


def test_a_cell_of_the_phase_diagram_is_the_mean_of_its_runs(spec: Spec):
    grid = spec.grids["map"]
    cell = (grid.setting("1e-3", "2"), "minirl")
    drawing = draw_grid(spec, grid, {cell: [result(0, [0.4, 0.9]), result(1, [0.8, 0.2])]})
    minirl, hot = (ax for ax in drawing.axes if ax.get_title(loc="left"))
    assert [ax.get_title(loc="left") for ax in (minirl, hot)] == ["MiniRL", "hot"]
    (text,) = minirl.texts  # the other cells were not run
    assert text.get_text() == "0.55\n✕ 50 %" and text.get_position() == (1, 1)
    assert not hot.texts


def test_early_warning_learns_from_the_calibration_and_is_judged_on_the_maps(spec_path: Path, tmp_path: Path):
    data = yaml.safe_load(spec_path.read_text(encoding="utf-8"))
    data["grids"]["trial"] = {**data["grids"]["map"], "calibration": True, "seeds": 2}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    spec, out = load_spec(path), tmp_path / "out"
    jobs = jobs_for(spec, ["map", "trial"], out, tier="fast", seeds=2)
    for number, job in enumerate(jobs):
        falls, rows = number % 2 == 0, []
        for step in range(81):
            ill = falls and step >= 40
            row = dict.fromkeys(COLUMNS, 0.1) | {"global_step": step, "grad_step": step, "score": 0.8}
            rows.append(row | {"entropy": 0.01 if ill else 0.1, "score": 0.1 if falls and step >= 60 else 0.8})
        write_run(job.path, rows, header={**run_header(job.config), "seconds": 1.0, "diverged": None})
    written = write_results(spec, ["map"], out, tier="fast", seeds=2)
    assert "EARLY_WARNING.md" in written and (out / "figures" / "early_warning.png").exists()
    text = (out / "EARLY_WARNING.md").read_text(encoding="utf-8")
    assert "\n8 runs of the phase diagrams" in text and "chosen on 16 other runs" in text
    (entropy,) = (line for line in text.splitlines() if line.startswith("| entropy |"))
    assert "4 of 4: 100%" in entropy and "0 of 4: 0%" in entropy


def runs_in(out: Path) -> dict[str, bytes]:
    """Every run's CSV, out of the archives."""
    folders = [path.with_name(path.name.removesuffix(".tar.bz2")) for path in sorted(out.glob("runs/fast/*.tar.bz2"))]
    return {f"{folder.name}/{name}": text for folder in folders for name, text in files_in(folder).items()}


@pytest.mark.slow
def test_the_command_runs_draws_judges_and_does_nothing_twice(spec_path: Path, tmp_path: Path, capfd, monkeypatch):
    out = tmp_path / "out"
    command = ["reproduce", "everything", "--spec", str(spec_path), "--out", str(out), "--workers", "1"]
    command += ["--seeds", "1"]
    assert main(command) == 0
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {"one.png", "one.svg", "map.png", "map.svg"}
    parts = (out / "SYSTEMATIC.md").read_text(encoding="utf-8").splitlines()[-1]
    assert parts.startswith("| near policy | ") and parts.endswith("| 1 |")
    claims = (out / "CLAIMS.md").read_text(encoding="utf-8")
    assert "Hot is better." in claims and "figures/one.png" in claims and str(tmp_path) not in claims
    before = runs_in(out)
    assert len(before) == 2 + 4 * 2 and list(before)[-1] == "near/minirl/seed0.csv" and not list(out.rglob("*.csv"))
    assert "C1: " in capfd.readouterr().out

    monkeypatch.setattr("minirl_edu.experiments.runner._Worker", None)  # it has nothing to do
    assert main(command) == 0
    assert runs_in(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ones"], "figure: unknown name 'ones'; did you mean one"),
        (["one", "--seeds", "0"], "--seeds = 0: use 1 or more"),
        (["one", "--workers", "0"], "--workers = 0: use 1 or more"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    arguments: list[str], message: str, spec_path: Path, tmp_path: Path, capfd
):
    command = ["reproduce", *arguments, "--spec", str(spec_path), "--out", str(tmp_path / "out")]
    assert main(command) != 0
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()
