"""What a run has written so far: the lines of its `metrics.jsonl`, read while it goes on or after it has ended."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

Metrics = dict[str, np.ndarray]
"""One run: a column per key of metrics.jsonl, a row per gradient step, NaN where there is no value."""


class RecordsError(ValueError):
    """A metrics.jsonl that holds no step, or a broken line; the message names the file."""


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, one dict per gradient step, in order of `grad_step`.

    A run that was killed may leave half a last line: it is dropped. A step written twice (a resumed run) counts once;
    the later line's values win. Raises FileNotFoundError where there is no file, RecordsError where it holds no step or
    a broken line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: give a run's folder that holds a metrics.jsonl")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["grad_step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise RecordsError(f"{path}, line {number} is not a step with a grad_step: {line[:60]!r}") from error
        steps[step] = steps.get(step, {}) | {key: value for key, value in record.items() if value is not None}
    if not steps:
        raise RecordsError(f"{path} holds no complete step yet: wait for the first one, or check that training started")
    return [steps[step] for step in sorted(steps)]


def read_metrics(path: Path | str) -> Metrics:
    """The numeric columns of a `metrics.jsonl` as float64 arrays, a row per gradient step; null and absent become NaN.

    Raises as `read_records`.
    """
    records = read_records(path)
    keys = dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, int | float))
    return {key: np.array([record.get(key, math.nan) for record in records], dtype=np.float64) for key in keys}
