"""The report: its words and numbers are the data's, in bad cases too, and the page stands alone."""

import json
import math
import random
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from minirl_edu import plots
from minirl_edu.cli import DEMO_VARIANTS, demo_folder
from minirl_edu.config import Config, load_config
from minirl_edu.recipes import RECIPES
from minirl_edu.report import PAPER, write_report
from tests.conftest import outside

EVERY = 10  # steps between evaluations


@pytest.fixture(autouse=True)
def _figures_not_drawn(monkeypatch):
    """These tests read words; without the drawing each of them is ten times faster."""
    monkeypatch.setattr(plots, "to_png", lambda figure, **_: b"\x89PNG")


def run_folder(
    folder: Path,
    scores: list[float] | None,
    *,
    steps: int | None = None,
    planned: int | None = None,
    last: dict | None = None,
    tail: str = "",
    settings: dict | None = None,
    **constants,
) -> Path:
    """A run on disk with the given held-out scores at steps 0, 10, 20, …; other metrics are constant."""
    steps = EVERY * (len(scores or [0]) - 1) if steps is None else steps
    evaluations = {EVERY * i: score for i, score in enumerate(scores or [])}
    lines: list[dict] = [{"global_step": 0, "grad_step": 0}]
    constants = {"reward": 0.5, "entropy": 0.25, "k3_rollout_old": 0.0125, "routing_flip_rate": None} | constants
    lines += [
        {"global_step": step, "grad_step": step, **constants, "grad_norm": 1.0, "tokens": 300, "seconds": 0.5}
        for step in range(1, steps + 1)
    ]
    for line in lines:
        line["score"] = evaluations.get(line["grad_step"])
    lines[-1] |= last or {}
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    config = Config.from_dict({"train": {"global_steps": planned or max(1, steps)}, **(settings or {})})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.2", "packages": {"torch": "2.13.0"}}))
    return folder


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def page(runs, tmp_path: Path, **options) -> str:
    return write_report(runs, tmp_path / "out" / "report.html", **options).read_text(encoding="utf-8")


def headline(runs, tmp_path: Path) -> str:
    found = re.search(r"<div class=headline>(.*?)</div>", page(runs, tmp_path), re.DOTALL)
    assert found
    return text(found[1])


def verdict(runs, tmp_path: Path) -> str:
    found = re.search(r"<p class=verdict>(.*?)</p>", page(runs, tmp_path), re.DOTALL)
    assert found
    return text(found[1])


def table(html: str, row: str) -> list[str]:
    found = re.search(rf"<tr><th scope=row>{re.escape(row)}</th>(.*?)</tr>", html, re.DOTALL)
    assert found, f"no row {row!r}"
    return [text(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", found[1])]


# --------------------------------------------------------------------------------------------------------- headline


def test_an_improvement_is_told_with_its_numbers(tmp_path):
    folder = run_folder(tmp_path / "a", [0.44, 0.8, 0.95])
    assert verdict(folder, tmp_path) == "MiniRL went from 0.44 to 0.95 in 20 steps."
    words = headline(folder, tmp_path)
    assert "share of 256 held-out problems" in words and "differences below 0.09 can be noise" in words
    assert not any(word in words for word in ("warning", "global step", "finite"))


def test_what_was_reached_and_kept_is_said_to_have_stayed(tmp_path):
    folder = run_folder(tmp_path / "a", [0.4, 0.75, 0.78, 0.76])
    assert verdict(folder, tmp_path) == "MiniRL went from 0.40 to 0.76 in 30 steps and stayed there."


def test_a_change_within_noise_is_no_improvement(tmp_path):
    words = verdict(run_folder(tmp_path / "a", [0.44, 0.47, 0.46]), tmp_path)
    assert words == "MiniRL did not change beyond noise: 0.44 at step 0, 0.46 at step 20."


def test_noise_shrinks_with_the_number_of_problems(tmp_path):
    many = run_folder(tmp_path / "a", [0.44, 0.47], settings={"eval": {"problems": 10_000}})
    assert "went from 0.44 to 0.47" in verdict(many, tmp_path)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([0.44, 0.9, 0.6], "rose from 0.44 to 0.90 by step 10, then fell to 0.60 by step 20"),
        ([0.44, 0.9, 0.1], "rose from 0.44 to 0.90 by step 10, then fell to 0.10 by step 20, below where it began"),
        ([0.9, 0.6, 0.3], "fell from 0.90 to 0.30 by step 20"),
        # What came back is told as well: a summary of ends alone would hide the fall.
        ([0.46, 0.12, 0.99], "fell from 0.46 to 0.12 by step 10 and came back to 0.99 by step 20"),
        ([0.46, 0.0, 0.08], "fell from 0.46 to 0.00 by step 10 and came back to 0.08 by step 20"),
        (
            [0.4, 0.9, 0.2, 0.95],
            "rose from 0.40 to 0.90 by step 10, then fell to 0.20 by step 20 and came back to 0.95 by step 30",
        ),
        # A dip of the best of many evaluations by less than three standard errors is none.
        ([0.4, 0.7, 0.78, 0.69], "went from 0.40 to 0.69 in 30 steps and stayed there"),
    ],
)
def test_every_fall_is_told_and_no_dip(tmp_path, scores, told):
    assert verdict(run_folder(tmp_path / "a", scores), tmp_path) == f"MiniRL {told}."


def test_an_interrupted_run_with_half_a_line(tmp_path):
    folder = run_folder(tmp_path / "a", [0.44, 0.6], planned=100, tail='{"global_step": 11, "grad')
    words = headline(folder, tmp_path)
    assert "went from 0.44 to 0.60 in 10 steps" in words and "MiniRL got to global step 10 of 100" in words


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_ended_in_nan(tmp_path, value):
    warned = {"entropy": value, "grad_norm": value, "warnings": ["step 20: entropy is nan"]}
    words = headline(run_folder(tmp_path / "a", [0.44, 0.6, 0.7], planned=100, last=warned), tmp_path)
    assert "broke down at gradient step 20: no finite entropy and no finite grad_norm any more." in words
    assert "1 collapse warning, the first at step 20: entropy is nan." in words


def test_the_rollout_engines_score_is_told_where_it_differs(tmp_path):
    near = run_folder(tmp_path / "a", [0.4, 0.9], last={"score_rollout": 0.89})
    far = run_folder(tmp_path / "b", [0.4, 0.9], last={"score_rollout": 0.5})
    assert "rollout engine" not in headline(near, tmp_path)
    assert "Through the rollout engine MiniRL ends at 0.50, not 0.90." in headline(far, tmp_path)


def test_a_score_has_its_standard_error_and_says_how_many_samples_it_is_the_mean_of(tmp_path):
    settings = {"eval": {"problems": 90, "samples": 32}}
    folder = run_folder(tmp_path / "a", [0.4, 0.47], last={"score_se": 0.0412}, settings=settings)
    html = page(folder, tmp_path)
    assert table(html, "Score, full precision: final") == ["0.470 ± 0.041"]
    assert table(html, "Score, full precision: best") == ["0.470 ± 0.041 (step 10)"]
    assert table(html, "Score, full precision: start") == ["0.400"]  # it was not logged there
    words = headline(folder, tmp_path)
    # 2 · √(2 · 0.25 / 2880) = 0.026
    assert "90 held-out problems that are solved, the mean of 32 samples of each; differences below 0.03" in words
    assert "went from 0.40 to 0.47" in words
    few = run_folder(tmp_path / "b", [0.4, 0.47], settings={"eval": {"problems": 90}})
    assert "did not change beyond noise" in verdict(few, tmp_path)


def test_a_run_without_evaluations_speaks_of_its_reward(tmp_path):
    words = headline(run_folder(tmp_path / "a", None, steps=30), tmp_path)
    assert "was not evaluated; its training reward went from 0.50 to 0.50" in words
    words = headline(run_folder(tmp_path / "b", [0.44], steps=0, planned=100), tmp_path)
    assert "was evaluated only once, at step 0: 0.44" in words
    assert "got to global step 0 of 100" in words


def test_a_run_scored_by_the_rollout_engine_alone_says_so(tmp_path):
    words = headline(run_folder(tmp_path / "a", None, steps=30, last={"score_rollout": 0.62}), tmp_path)
    assert "was evaluated through the rollout engine alone, where it went from 0.62 to 0.62" in words


def test_runs_are_compared_at_equal_steps(tmp_path):
    # At the shared step 20 the short run leads; the longer one ends higher.
    long = run_folder(tmp_path / "a", [0.4, 0.5, 0.6, 0.99])
    short = run_folder(tmp_path / "b", [0.4, 0.7, 0.8], planned=30)
    html = page({"long": long, "short": short}, tmp_path)
    words = text(html)
    assert "long went from 0.40 to 0.99 in 30 steps; short went from 0.40 to 0.80 in 20 steps" in words
    assert "At step 20, the last at which every run was evaluated: short 0.80, long 0.60." in words
    assert "The first is ahead of long by more than the noise of the evaluation." in words
    assert "another seed may change the order" in words
    assert table(html, "Score, full precision: at shared step 20") == ["0.600", "0.800"]
    assert table(html, "Score, full precision: final") == ["0.990", "0.800"]


def test_equal_runs_have_no_winner(tmp_path):
    runs = {name: run_folder(tmp_path / name, [0.4, score]) for name, score in (("a", 0.80), ("b", 0.81))}
    words = headline(runs, tmp_path)
    assert "These differences are within the noise of the evaluation." in words and "ahead" not in words


def test_of_three_runs_one_may_be_level_with_the_best(tmp_path):
    runs = {name: run_folder(tmp_path / name, [0.4, score]) for name, score in (("a", 0.80), ("b", 0.81), ("c", 0.5))}
    assert "The first is ahead of c by more than the noise of the evaluation. The rest is level with it." in headline(
        runs, tmp_path
    )


def test_runs_that_were_never_evaluated_together_are_not_ranked(tmp_path):
    runs = {"a": run_folder(tmp_path / "a", [0.4, 0.8]), "b": run_folder(tmp_path / "b", None, steps=10)}
    assert "cannot be compared" in headline(runs, tmp_path)


def test_seeds_are_told_as_mean_and_range_and_those_that_fell_are_counted(tmp_path):
    factors: dict[str, Any] = {"log_ratio_mismatch": 0.1, "log_ratio_staleness": 0.1}

    def seeds(name: str, *all_scores: list[float]) -> list[Path]:
        return [
            run_folder(tmp_path / f"{name}{seed}", scores, settings={"seed": seed}, **factors)
            for seed, scores in enumerate(all_scores)
        ]

    runs = {
        "good": seeds("g", [0.4, 0.7, 0.8], [0.4, 0.6, 0.7], [0.4, 0.8, 0.9]),
        "bad": seeds("b", [0.4, 0.8, 0.1], [0.4, 0.6, 0.6]),
    }
    html = page(runs, tmp_path)
    words = text(html)
    assert "good (3 seeds) went from 0.40 to 0.80 (0.70 to 0.90), and no seed fell" in words
    assert "bad (2 seeds) went from 0.40 to 0.35 (0.10 to 0.60), and 1 of them fell, from a peak of 0.80." in words
    assert "The first is ahead of bad with every seed above every one of theirs." in words
    assert "another seed" not in words
    assert table(html, "Score, full precision: final") == ["0.800 (0.700 to 0.900)", "0.350 (0.100 to 0.600)"]
    assert table(html, "seed") == ["0, 1, 2", "0, 1"]
    assert "good, seed 2 again" in words and "bad, seed 0, from before the fall" in words


# ------------------------------------------------------------------------------------------------ before, at and after


def fallen(folder: Path, **settings) -> Path:
    """60 steps: the score falls after step 20, with a warning at step 40; discrepancy and entropy change at step 20."""
    run_folder(folder, [0.4, 0.5, 0.8, 0.6, 0.3, 0.1, 0.1], **settings)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        step = record["grad_step"]
        if step:
            record |= {"log_ratio_mismatch": 0.1 if step <= 20 else 0.8, "log_ratio_staleness": 0.2}
            record |= {"entropy": 0.5 if step <= 20 else 0.25, "entropy_drift": -0.001 * step}
        if step == 40:
            record["warnings"] = ["gradient step 40: score fell from 0.80 (step 20) to 0.30"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def moments(html: str, label: str) -> dict[str, dict[str, str]]:
    """The table beside the story: row -> moment -> number."""
    found = re.search(rf"<table[^>]*><thead><tr><th scope=col>{label}</th>(.*?)</table>", html, re.DOTALL)
    assert found
    names = re.findall(r"<th scope=col>(.*?)</th>", found[1])
    rows = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", found[1], re.DOTALL)
    cells = {text(row): re.findall(r"<td[^>]*>(.*?)</td>", numbers) for row, numbers in rows}
    return {row: dict(zip(names, own, strict=True)) for row, own in cells.items()}


def test_numbers_are_given_before_at_and_after_a_fall(tmp_path):
    rows = moments(page(fallen(tmp_path / "a"), tmp_path), "MiniRL")
    steps = {"start": "10", "before": "20", "at the fall": "40", "after": "50", "end": "60"}
    assert rows["Up to gradient step"] == steps
    assert list(rows["Held-out score"].values()) == ["0.50", "0.80", "0.30", "0.10", "0.10"]
    assert list(rows["Discrepancy, mean |log πold/μold| (nats)"].values()) == ["0.10", "0.10", "0.80", "0.80", "0.80"]
    # Steps 1 to 10, 11 to 20, 31 to 40, …: means of −0.001 × step, so −0.0555 at the end.
    assert list(rows["Entropy drift (nats per unit step)"].values()) == [
        *("−0.0055", "−0.015", "−0.035", "−0.045", "−0.056"),
    ]
    assert "Routing flips" not in str(rows)  # not logged here


def test_a_healthy_run_is_shown_in_the_steps_of_the_others_fall(tmp_path):
    runs = {"healthy": run_folder(tmp_path / "h", [0.4, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7]), "ill": fallen(tmp_path / "i")}
    html = page(runs, tmp_path)
    assert moments(html, "healthy")["Up to gradient step"] == moments(html, "ill")["Up to gradient step"]
    assert moments(html, "healthy")["Held-out score"]["at the fall"] == "0.70"
    assert "ill, from before the fall (steps 11 to 20) to the fall (steps 31 to 40)" in text(html)


def test_what_moved_with_the_fall_is_told(tmp_path):
    words = text(page(fallen(tmp_path / "a"), tmp_path))
    assert (
        "the discrepancy went from 0.10 to 0.80 nats (8.0 ×), the staleness went from 0.20 to 0.20 nats (1.0 ×)"
        in words
    )
    assert "the entropy from 0.50 to 0.25 nats" in words and "need not be its cause" in words


def test_without_a_fall_numbers_are_given_along_the_run(tmp_path):
    html = page(run_folder(tmp_path / "a", [0.4, 0.5, 0.6, 0.7, 0.8]), tmp_path)
    assert moments(html, "MiniRL")["Up to gradient step"] == {"start": "10", "halfway": "20", "end": "40"}
    assert "No fall was noticed." in html and "<h2>Why</h2>" not in html


def test_windows_are_whole_global_steps(tmp_path):
    """Eight gradient steps for each rollout: staleness grows within, so a window takes all of them, 16."""
    folder = fallen(tmp_path / "a")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["global_step"] = -(-record["grad_step"] // 8)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "(steps 5 to 20) to the fall (steps 25 to 40)" in text(page(folder, tmp_path))


def test_a_fall_is_marked_in_every_panel_and_its_absence_is_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "to_png", lambda figure, **_: drawn.append(figure) or b"\x89PNG")
    page({"ill": fallen(tmp_path / "a"), "well": run_folder(tmp_path / "b", [0.4] * 7)}, tmp_path)
    panels = [ax for figure in drawn for ax in figure.axes if ax.lines]
    marks = [[c for c in ax.collections if str(c.get_gid()).startswith("event:")] for ax in panels]
    assert panels and all([mark.get_gid() for mark in own] == ["event:ill"] for own in marks)
    assert {float(mark.get_segments()[0][0][0]) for (mark,) in marks} == {40.0}
    assert all("step 40" in [text.get_text() for text in ax.texts] for ax in panels)


# ------------------------------------------------------------------------------------------------------------- page


def test_the_table_holds_the_data(tmp_path):
    folder = run_folder(tmp_path / "a", [0.44, 0.9, 0.85], last={"score_rollout": 0.8, "reward": 1.5}, tokens=300)
    html = page(folder, tmp_path)
    assert table(html, "Score, full precision: start") == ["0.440"]
    assert table(html, "Score, full precision: best") == ["0.900 (step 10)"]
    assert table(html, "Score, full precision: final") == ["0.850"]
    assert table(html, "Score, rollout engine: final") == ["0.800"]
    assert moments(html, "MiniRL")["Training reward"]["end"] == "0.60"  # nine times 0.5 and once 1.5
    assert table(html, "Training–inference KL (nats per token)")[-1] == "0.013"
    assert table(html, "Minutes, evaluations excluded") == ["0.2"]  # 20 × 0.5 s
    assert table(html, "Tokens per second") == ["600"]


def test_routing_and_drift_have_figures_only_where_they_were_recorded(tmp_path):
    alts = ("Routing flips over gradient steps", "Entropy drift and covariance")
    dense = page(run_folder(tmp_path / "dense", [0.4, 0.5]), tmp_path)
    moe = page(run_folder(tmp_path / "moe", [0.4, 0.5], routing_flip_rate=0.1, entropy_drift=0.01), tmp_path)
    assert not any(alt in dense for alt in alts) and all(alt in moe for alt in alts)


def test_the_story_comes_first_and_the_rest_is_folded(tmp_path):
    html = page(speak(fallen(tmp_path / "a"), (0, [("1+1=", ",2", 1.0)])), tmp_path)
    order = ["class=verdict", "The model speaks", "The four curves", "<h2>Why</h2>", "Everything else"]
    assert sorted(order, key=html.index) == order
    after = html[html.index("Everything else") :]
    folded = "".join(re.findall(r"<details>.*?</details>", after, re.DOTALL))
    assert all(
        what in folded for what in ("Collapse warnings: 1", "All numbers", "Clipping", "Settings", "Run it again")
    )
    assert "<h2>" not in after and "open" not in re.findall(r"<details[^>]*>", html)


def speak(folder: Path, *evaluations: tuple[int, list[tuple[str, str, float]]]) -> Path:
    """Write samples.jsonl: for each evaluation its gradient step and (problem, response, reward)."""
    lines = [
        {
            "global_step": step,
            "grad_step": step,
            "samples": [{"prompt": p, "answer": "2", "response": r, "reward": reward} for p, r, reward in samples],
        }
        for step, samples in evaluations
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def spoken(html: str) -> list[list[str]]:
    found = re.search(r"<table class=samples>(.*?)</table>", html, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL) if found else []
    return [[text(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_model_speaks_before_and_after_training_in_every_run(tmp_path):
    start = (0, [("1+1    =", ",3", 0.0), ("1+2=", ",3", 1.0)])
    middle = (10, [("1+1    =", "not shown", 0.0), ("1+2=", "not shown", 0.0)])
    runs = {
        "MiniRL": (start, middle, (20, [("1+1    =", ",2", 1.0), ("1+2=", ",3", 0.5)])),
        "no clipping": (start, middle, (20, [("1+1    =", "", 0.0), ("1+2=", ",,,<b>&", 0.0)])),
    }
    folders = {name: speak(run_folder(tmp_path / name, [0.4, 0.5, 0.6]), *lines) for name, lines in runs.items()}
    assert spoken(page(folders, tmp_path)) == [
        ["1+1 = right: 2"],
        ["before", "✗ ,3"],
        ["after 20 steps: MiniRL", "✓ ,2"],
        ["after 20 steps: no clipping", "✗ (nothing)"],
        ["1+2= right: 2"],
        ["before", "✓ ,3"],
        ["after 20 steps: MiniRL", "0.5 ,3"],
        ["after 20 steps: no clipping", "✗ ,,,<b>&"],
    ]
    assert spoken(page({"seeds": list(folders.values())}, tmp_path))[1:3] == [
        ["before", "✗ ,3"],
        ["after 20 steps", "✓ ,2"],
    ]


def test_runs_that_start_differently_speak_for_themselves_and_long_answers_lose_their_middle(tmp_path):
    long = "a" * 300 + "b" * 1000 + "c" * 300
    runs = {name: run_folder(tmp_path / name, [0.4], steps=0) for name in ("a", "b")}
    speak(runs["a"], (0, [("1+1=", long, 0.25)]))
    speak(runs["b"], (0, [("1+1=", ",2", 1.0)]))
    rows = spoken(page(runs, tmp_path))[1:]
    assert [row[0] for row in rows] == ["before: a", "before: b"]
    assert rows[0][1] == "0.25 " + "a" * 200 + " … [1,200 characters left out] … " + "c" * 200
    assert "The model speaks" not in page(run_folder(tmp_path / "c", [0.4, 0.5]), tmp_path)


DEMO = Path(__file__).parent / "data" / "demo"


def test_every_figure_of_the_demos_report_shows_all_its_data(tmp_path, monkeypatch):
    """The metrics of a real demo (seed 0): every line lies inside its axes, in the wide and in the narrow layout."""
    drawn = []
    monkeypatch.setattr(plots, "to_png", lambda figure, **_: drawn.append(figure) or b"\x89PNG")
    html = page({name: DEMO / demo_folder(name) for name in DEMO_VARIANTS}, tmp_path)
    assert len(drawn) == html.count("data:image/png") == 9  # five figures, four of them in two layouts
    panels = [ax for figure in drawn for ax in figure.axes]
    assert len(panels) == 2 * 4 + 2 * 3 + 1 + 2 * 2 + 2 * 2
    assert all(len(ax.lines) >= 2 * len(DEMO_VARIANTS) for ax in panels if ax.get_title(loc="left") != "Token entropy")
    assert [text for figure in drawn for text in outside(figure)] == []


def test_the_demos_report_tells_the_fall_and_calls_the_healthy_run_healthy(tmp_path):
    runs = {name: DEMO / demo_folder(name) for name in DEMO_VARIANTS}
    for name, overrides in DEMO_VARIANTS.items():
        assert load_config(runs[name] / "config.yaml") == load_config(RECIPES / "demo.yaml", overrides), (
            "a new demo: run it"
        )
    healthy, _, ill = verdict(runs, tmp_path).partition("; ")
    assert re.match(r"MiniRL \+ R3 went from 0\.3\d to 0\.[78]\d in 192 steps and stayed there$", healthy)
    assert re.match(r"no replay, no clipping rose from 0\.3\d to .*, then fell to 0\.[01]\d by step 192", ill)
    words = headline(runs, tmp_path)
    assert re.search(r"clipping: \d collapse warnings, the first at gradient step \d+: score fell from 0\.\d\d", words)
    assert "R3: " not in words  # no warning
    rows = moments(page(runs, tmp_path), "no replay, no clipping")
    before, at = (float(rows["Discrepancy, mean |log πold/μold| (nats)"][name]) for name in ("before", "at the fall"))
    assert at > 3 * before


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    html = page(run_folder(tmp_path / "a", [0.4, 0.5], routing_flip_rate=0.1), tmp_path)
    sources = re.findall(r'(?:src|srcset|data|poster|action)="([^"]*)"', html)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(", html)
    assert set(re.findall(r'href="([^"]*)"', html)) == {PAPER}
    assert html.count("http") == 1


def test_figures_lie_beside_the_page(tmp_path):
    page(run_folder(tmp_path / "a", [0.4, 0.5], routing_flip_rate=0.1), tmp_path)
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"four_curves.png", "ratio_decomposition.png", "routing_flips.png", "clipping.png"}


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('&')</script>"
    folder = run_folder(
        tmp_path / "a",
        [0.4, 0.5],
        last={"warnings": [evil]},
        settings={"model": {"name": evil}},
    )
    (folder / "environment.json").write_text(json.dumps({evil: evil, "command": ["minirl", evil]}))
    html = page({evil: folder, "b": run_folder(tmp_path / "b", [0.4, 0.5])}, tmp_path, title=evil)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 8  # title twice, headline, tables, warning, settings, command, environment


def test_settings_show_what_differs(tmp_path):
    off = run_folder(tmp_path / "b", [0.4, 0.5], settings={"algorithm": {"is_correction": False}})
    html = page({"MiniRL": run_folder(tmp_path / "a", [0.4, 0.5]), "− IS": off}, tmp_path)
    assert table(html, "algorithm.is_correction") == ["true", "false"]
    assert "<th scope=row>algorithm.clip</th>" not in html
    assert "algorithm.clip: true" in html


def test_one_run_is_named_by_its_method_and_compared_with_the_defaults(tmp_path):
    off = run_folder(tmp_path / "a", [0.4, 0.9], settings={"algorithm": {"is_correction": False, "replay": "R3"}})
    html = page(off, tmp_path)
    assert "<b>MiniRL − IS + R3</b> went from 0.40 to 0.90" in html
    other = run_folder(tmp_path / "c", [0.4, 0.9], settings={"algorithm": {"correction": "token_masked"}})
    assert "<b>MiniRL weight: token masked</b> went from" in page(other, tmp_path)
    none = run_folder(tmp_path / "d", [0.4, 0.9], settings={"algorithm": {"correction": "none"}})
    assert "<b>MiniRL − IS</b> went from" in page(none, tmp_path)
    assert table(html, "algorithm.is_correction") == ["true", "false"]
    free = run_folder(tmp_path / "e", [0.4, 0.9], settings={"algorithm": {"clip": False, "replay": "R2"}})
    assert "<b>MiniRL + R2, no clipping</b> went from" in page(free, tmp_path)


def test_the_way_to_reproduce(tmp_path):
    folder = run_folder(tmp_path / "a", [0.4, 0.5])
    assert "minirl train --config config.yaml --out again" in page(folder, tmp_path)
    (folder / "environment.json").write_text(json.dumps({"command": ["minirl", "train", "--out", "a b"]}))
    html = text(page(folder, tmp_path))
    assert "minirl train --out 'a b'" in html and "--out again" not in html


def test_a_folder_with_only_metrics_is_enough(tmp_path):
    folder = run_folder(tmp_path / "my run", [0.4, 0.9])
    (folder / "config.yaml").unlink()
    (folder / "environment.json").unlink()
    html = page(folder, tmp_path)
    assert "<b>my run</b> went from 0.40 to 0.90" in html
    assert "No config.yaml was found" in html and "No environment.json was found" in html


def test_missing_or_empty_metrics_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.metrics\.jsonl"):
        page(tmp_path / "nowhere", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.metrics\.jsonl holds no complete step"):
        page({"a": empty}, tmp_path)
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="run_dirs is empty"):
            page(nothing, tmp_path)


@pytest.mark.slow
def test_a_long_run_with_many_methods_stays_small(tmp_path, monkeypatch):
    monkeypatch.undo()  # draw
    noise = random.Random(0)
    runs = {f"idea {i}": run_folder(tmp_path / str(i), None, steps=0) for i in range(6)}
    keys = [
        "reward",
        "entropy",
        "kl_rollout_old",
        "k3_rollout_old",
        "log_ratio_mismatch",
        "log_ratio_staleness",
        "first_order_gap",
    ]
    keys += ["routing_flip_rate", "clip_frac_pos", "clip_frac_neg", "score", "score_rollout"]
    for folder in runs.values():
        lines = [{"global_step": n, "grad_step": n} | {key: noise.random() for key in keys} for n in range(300)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = write_report(runs, tmp_path / "report.html").stat().st_size
    assert 200_000 < size < 2_500_000  # pure noise is the worst that a PNG can meet; real runs take a third of it
