"""A run's curves while it goes on: lines of text for a terminal, a figure that redraws for a notebook.

Both read what the run has written so far, so the run may be another process, or another machine's in a shared folder.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from minirl_edu.records import RecordsError, read_metrics, read_records

BARS = "▁▂▃▄▅▆▇█"
CURVES = {
    "score": "held-out score",
    "score_rollout": "  by the engine",
    "reward": "training reward",
    "entropy": "token entropy",
    "k3_rollout_old": "KL (k3)",
    "log_ratio_mismatch": "discrepancy",
    "log_ratio_staleness": "staleness",
    "routing_flip_rate": "routing flips",
    "grad_norm": "gradient norm",
}
"""What a terminal shows, where it was logged, and what it is called there."""


def sparkline(steps: np.ndarray, values: np.ndarray, width: int) -> str:
    """One bar for each of `width` equal parts of the steps from 0 to the last, from the lowest mean to the highest.

    Where a part has no finite value, the bar is that of the part before it; before the first value there is none.
    """
    known = np.isfinite(values)
    if not known.any():
        return ""
    part = np.minimum((steps * width / max(1.0, float(steps[-1]))).astype(int), width - 1)
    count = np.bincount(part[known], minlength=width)
    means = np.bincount(part[known], values[known], minlength=width)[count > 0] / count[count > 0]
    low, high = float(means.min()), float(means.max())
    scaled = (means - low) / (high - low) if high > low else np.full(len(means), 0.5)
    bars = [BARS[min(len(BARS) - 1, int(x * len(BARS)))] for x in scaled]
    return "".join(bars[n - 1] if n else " " for n in np.cumsum(count > 0))


def screen(folder: Path, width: int = 80) -> str:
    """A run so far, below its folder in lines of at most `width` characters: how far it is; its curves over the same
    steps, with the last value, the lowest and the highest; its collapse warnings. Raises as `read_records`."""
    path = folder / "metrics.jsonl"
    records, metrics = read_records(path), read_metrics(path)
    lines = [_progress(folder, records[-1], metrics, time.time() - path.stat().st_mtime)]
    for key, name in CURVES.items():
        values = metrics.get(key, np.empty(0))
        if (known := values[np.isfinite(values)]).size:
            bars = sparkline(metrics["grad_step"], values, max(8, width - 46))
            lines.append(f"{name:<16}{bars}{known[-1]:9.3g}  {known.min():.2g} to {known.max():.2g}")
    warnings = [str(warning) for record in records for warning in record.get("warnings", [])]
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join([str(folder), *(line[:width] for line in lines)])


def planned_steps(folder: Path) -> int | None:
    """`train.global_steps` of the run's config; None where there is no config.yaml."""
    import yaml

    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["global_steps"] if path.is_file() else None


def ended(folder: Path) -> bool:
    """Whether the run has made all its steps."""
    planned = planned_steps(folder)
    return planned is not None and read_records(folder / "metrics.jsonl")[-1]["global_step"] >= planned


def _progress(folder: Path, last: Mapping[str, Any], metrics: Mapping[str, np.ndarray], age: float) -> str:
    step, planned = last["global_step"], planned_steps(folder)
    if planned is None:
        return f"global step {step}, the last line {age:.0f} s ago"
    if step >= planned:
        return f"global step {step} of {planned}, done"
    seconds = metrics.get("seconds", np.empty(0))
    left = float(np.nansum(seconds)) / step * (planned - step) if step else math.nan
    rest = f", about {left / 60:.1f} minutes of training left" if math.isfinite(left) else ""
    return f"global step {step} of {planned}{rest}; the last line {age:.0f} s ago"


def follow(folders: Sequence[Path], stream: IO[str], *, every: float = 2.0, width: int = 80) -> None:
    """Print the runs; on a terminal again every so many seconds, until all have made their steps.

    A run without a complete line yet is waited for on a terminal. Raises as `read_records`.
    """
    again = stream.isatty()
    while True:
        texts, running = [], False
        for folder in folders:
            try:
                texts.append(screen(folder, width))
                running |= not ended(folder)
            except (FileNotFoundError, RecordsError):
                if not (again and folder.is_dir()):
                    raise
                texts.append(f"{folder}\nno step yet")
                running = True
        text = "\n\n".join(texts) + "\n"
        stream.write(f"\x1b[H\x1b[J{text}Ctrl-C ends watching, not the run\n" if again and running else text)
        stream.flush()
        if not (again and running):
            return
        time.sleep(every)


def watch(run: Path | str | Mapping[str, Path | str], *, every: float = 5.0) -> None:
    """In a notebook: the four curves of a run, drawn again when it has new lines, until it has made all its steps.

    `run` is a folder, or a label per folder. Interrupting the cell ends watching, not the run, which is another process
    such as `minirl train` in a terminal. Raises as `read_records`, and ImportError outside of a notebook's environment.
    """
    from IPython.display import display

    from minirl_edu.plots import four_curves

    given = run if isinstance(run, Mapping) else {Path(run).resolve().name: run}
    folders = {label: Path(folder) for label, folder in given.items()}
    handle, seen = None, -1
    try:
        while True:
            runs = {label: read_metrics(folder / "metrics.jsonl") for label, folder in folders.items()}
            if (lines := sum(len(metrics["grad_step"]) for metrics in runs.values())) != seen:
                seen, figure = lines, four_curves(runs)
                if handle is None:
                    handle = display(figure, display_id=True)
                else:
                    handle.update(figure)
            if all(ended(folder) for folder in folders.values()):
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return
