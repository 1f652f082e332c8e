"""Reading metrics.jsonl: whole, broken, written twice, and while a run is writing it."""

import json
import math

import numpy as np
import pytest

from minirl_edu.records import read_metrics, read_records


def write(path, *rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_columns_of_a_run(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"global_step": 0, "grad_step": 0, "score": 0.4},
        {"global_step": 1, "grad_step": 1, "reward": 0.5, "score": None, "warnings": ["step 1: entropy is nan"]},
        {"global_step": 2, "grad_step": 2, "reward": math.nan, "score": 0.6},
    )
    run = read_metrics(path)
    np.testing.assert_array_equal(run["score"], [0.4, math.nan, 0.6])
    np.testing.assert_array_equal(run["reward"], [math.nan, 0.5, math.nan])
    assert "warnings" not in run
    assert read_records(path)[1]["warnings"] == ["step 1: entropy is nan"]


@pytest.mark.parametrize("tail", ['{"global_step": 2, "grad_st', '{"global_step": 2', "2", "\ufffd"])
def test_half_a_last_line_is_dropped(tmp_path, tail):
    path = write(tmp_path / "metrics.jsonl", {"grad_step": 0, "score": 0.4}, {"grad_step": 1, "score": 0.5}, tail=tail)
    assert read_metrics(path)["score"].tolist() == [0.4, 0.5]


def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path):
    path = write(tmp_path / "metrics.jsonl", {"grad_step": 0}, tail='{"grad_st\n{"grad_step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_step_written_twice_counts_once_and_the_later_line_wins(tmp_path):
    rows = [{"grad_step": 1, "reward": 0.1, "score": 0.3}, {"grad_step": 2, "reward": 0.2}]
    path = write(tmp_path / "metrics.jsonl", *rows, {"grad_step": 1, "reward": 0.7, "score": None})
    run = read_metrics(path)
    assert run["grad_step"].tolist() == [1, 2]
    assert run["reward"].tolist() == [0.7, 0.2]
    assert run["score"][0] == 0.3  # a null takes nothing away


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")
    empty = write(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no complete step"):
        read_metrics(empty)
