"""A run's curves while it goes on: text and figures of what has been written so far."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from IPython import display as notebook

from minirl_edu import live, watch
from minirl_edu.records import RecordsError

DEMO = Path(__file__).parent / "data" / "demo"
ILL = DEMO / "no-replay-no-clipping"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def begin(folder: Path, planned: int = 4) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"global_steps": planned}}))
    return folder


def go_on(folder: Path, step: int, **metrics: object) -> None:
    """The run makes a step."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"global_step": step, "grad_step": step, "seconds": 60.0, **metrics}) + "\n")


def test_bars_lie_over_the_steps_of_their_values():
    steps = np.arange(9.0)
    assert live.sparkline(steps, steps, 8) == "▁▂▃▄▅▆▇█"
    assert live.sparkline(steps, np.full(9, 3.0), 4) == "▅▅▅▅"
    rare = np.where(np.isin(steps, [2, 6]), steps, np.nan)
    assert live.sparkline(steps, rare, 8) == "  ▁▁▁▁██"  # nothing before the first, then the latest
    assert live.sparkline(steps, np.full(9, np.nan), 8) == ""
    assert live.sparkline(np.zeros(1), np.ones(1), 3) == "▅▅▅"


def test_a_fall_shows_at_the_same_place_in_every_curve():
    text = live.screen(ILL, 80)
    assert all(len(line) <= 80 for line in text.splitlines()[1:])
    score, reward = (next(line[16:50] for line in text.splitlines() if line.startswith(name)) for name in
                     ("held-out score", "training reward"))  # fmt: skip
    assert score.index("█") < 10 and score[-5:] == "▁▁▁▁▁" == reward[-5:]
    assert "global step 24 of 24, done" in text and "0.0312  0.027 to 0.55" in text
    assert "warning: gradient step 96: score fell from 0.55 (step 24) to 0.28" in text


def test_how_far_a_run_is(tmp_path):
    run = begin(tmp_path / "run")
    go_on(run, 1, reward=0.5)
    assert "global step 1 of 4, about 3.0 minutes of training left; the last line 0 s ago" in live.screen(run, 200)
    (run / "config.yaml").unlink()
    assert "global step 1, the last line" in live.screen(run, 200)


def test_without_a_terminal_it_prints_once(tmp_path):
    run, stream = begin(tmp_path / "run"), io.StringIO()
    go_on(run, 1, reward=0.5)
    live.follow([run, ILL], stream)
    assert stream.getvalue() == f"{live.screen(run)}\n\n{live.screen(ILL)}\n"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        live.follow([tmp_path / "nowhere"], io.StringIO())
    with pytest.raises(RecordsError, match="no complete step"):
        (begin(tmp_path / "empty") / "metrics.jsonl").touch()
        live.follow([tmp_path / "empty"], io.StringIO())


def test_on_a_terminal_it_goes_on_until_the_run_is_done(tmp_path, monkeypatch):
    run, stream, step = begin(tmp_path / "run"), Terminal(), iter(range(1, 5))
    monkeypatch.setattr(time, "sleep", lambda seconds: go_on(run, next(step), reward=0.5))
    live.follow([run], stream, every=7.0)
    shown = stream.getvalue().split("\x1b[H\x1b[J")
    assert [text.splitlines()[1][:16] for text in shown[1:]] == [
        *("no step yet", "global step 1 of", "global step 2 of", "global step 3 of"),
    ]
    assert shown[-1].endswith("Ctrl-C ends watching, not the run\n" + live.screen(run) + "\n")
    with pytest.raises(FileNotFoundError):
        live.follow([tmp_path / "nowhere"], stream)


def test_in_a_notebook_one_figure_is_drawn_again_when_there_are_new_lines(tmp_path, monkeypatch):
    run, drawn, steps = begin(tmp_path / "run", planned=3), [], iter([1, None, 2, 3])
    go_on(run, 0, score=0.4)

    class Handle:
        def update(self, figure):
            drawn.append(figure)

    def display(figure, *, display_id):
        assert display_id
        drawn.append(figure)
        return Handle()

    def wait(seconds):
        waited.append(seconds)
        if (step := next(steps)) is not None:
            go_on(run, step, reward=0.5)

    waited: list[float] = []
    monkeypatch.setattr(notebook, "display", display)
    monkeypatch.setattr(time, "sleep", wait)
    watch({"mine": run}, every=9.0)
    assert waited == [9.0] * 4
    lengths = [len(ax.get_xdata()) for ax in (next(line for line in f.axes[1].lines if "reward" in str(line.get_gid()))
               for f in drawn[1:])]  # fmt: skip
    assert len(drawn) == 4 and lengths == [1, 2, 3]
