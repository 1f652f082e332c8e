"""What `minirl gap` prints: Markdown tables of what `engines` and `careless` return."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minirl_edu.gap.engines import SHORT
from minirl_edu.gap.measurement import LEGEND, QUANTILES, interval

_LOG = ("k3", "mean_abs", "max_abs", "first_order_gap")
_COLUMNS = {
    "k3": "KL (k3), nats per token",
    "mean_abs": "mean abs log-ratio",
    "max_abs": "max",
    "ess_token": "ESS token",
    "ess_sequence": "ESS sequence",
    "first_order_gap": "first-order gap",
}


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers over seeds, each as (mean, low, high) with the 95 % t-interval.

    `plain`, `r3` (None without replay), `flip_rate` and `any_flip` (None for dense models). Sizes are averaged on a log
    scale; see `interval`.
    """
    seeds = row["seeds"]
    if not seeds:
        return {"plain": None, "r3": None, "flip_rate": None, "any_flip": None}

    def side(name: str) -> dict[str, tuple[float, float, float]] | None:
        if seeds[0][name] is None:
            return None
        keys = [key for key in seeds[0][name] if key != "quantiles"]
        return {key: interval([seed[name][key] for seed in seeds], log=key in _LOG) for key in keys}

    flips = {
        key: None if seeds[0][key] is None else interval([seed[key] for seed in seeds], log=False)
        for key in ("flip_rate", "any_flip")
    }
    return {"plain": side("plain"), "r3": side("r3"), **flips}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table: means over seeds, with the 95 % interval of the KL; replayed rows below their
    own. Rows that were skipped say why."""
    with_model = any("model" in row for row in rows)
    heads = [*(["model"] if with_model else []), "rollout engine", "trainer", *_COLUMNS.values(), "expert flips"]
    lines = []
    for row in rows:
        names = [*([row["model"]] if with_model else []), row["label"], SHORT[row["trainer_dtype"]]]
        if row["skipped"]:
            lines.append([*names, f"skipped: {row['skipped']}"] + [""] * len(_COLUMNS))
            continue
        numbers = summary(row)
        flips = "dense"
        if numbers["flip_rate"] is not None:
            flips = f"{_percent(numbers['flip_rate'][0])} a layer, {_percent(numbers['any_flip'][0])} in any"
        lines.append([*names, *_cells(numbers["plain"]), flips])
        if numbers["r3"] is not None:
            names[-2] += ", **R3**"
            lines.append([*names, *_cells(numbers["r3"]), "replayed"])
    return _markdown(heads, lines)


def _cells(numbers: Mapping[str, tuple[float, float, float]]) -> list[str]:
    cells = []
    for key in _COLUMNS:
        mean, low, high = numbers[key]
        small = key == "k3" or abs(mean) < 0.01
        text = f"{mean:.3f}" if key.startswith("ess") else f"{mean:.1e}" if small else f"{mean:.2g}"
        cells.append(text + (f" ({low:.1e} … {high:.1e})" if key == "k3" and math.isfinite(low) else ""))
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share else "0"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    ruled = [heads, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def details(row: Mapping[str, Any]) -> str:
    """One engine in full, as Markdown: the log-ratio's quantiles, then KL by position, then flips by layer; means over
    seeds."""
    seeds = row["seeds"]
    sides = {"plain": "no replay"} | ({"r3": "R3"} if seeds[0]["r3"] else {})

    def mean(get: Callable[[Any], float]) -> float:
        return float(np.mean([get(seed) for seed in seeds]))

    parts = [
        _markdown(
            ["quantile of log π/μ, nats", *map(str, QUANTILES)],
            [
                [label, *(f"{mean(lambda s, n=name, q=q: s[n]['quantiles'][str(q)]):+.1e}" for q in QUANTILES)]
                for name, label in sides.items()
            ],
        )
    ]
    buckets = seeds[0]["positions"]
    # Where the longest responses of two seeds differ in length, so do the buckets: there is no common row to show.
    if all(
        [(at["from"], at["to"]) for at in seed["positions"]] == [(at["from"], at["to"]) for at in buckets]
        for seed in seeds
    ):
        columns = ("k3", "k1", "mean_abs", "max_abs", "ess_token")
        lines = [
            [
                f"{bucket['from']}" if bucket["from"] == bucket["to"] else f"{bucket['from']}–{bucket['to']}",
                label,
                *(f"{mean(lambda s, i=i, n=name, c=c: s['positions'][i][n][c]):.3g}" for c in columns),
            ]
            for i, bucket in enumerate(buckets)
            for name, label in sides.items()
        ]
        parts.append(_markdown(["token position", "", *columns], lines))
    if seeds[0]["layers"]:
        lines = [
            [str(layer["layer"]), _percent(mean(lambda s, i=i: s["layers"][i]["flip_rate"]))]
            for i, layer in enumerate(seeds[0]["layers"])
        ]
        parts.append(_markdown(["layer", "tokens with another set of experts"], lines))
    return "\n\n".join(parts)


def legend() -> str:
    """What each number means, a line each."""
    return "\n".join(f"  {name:16} {text}" for name, text in LEGEND.items())


def accident_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `accidents` as a Markdown table."""
    lines = [
        [
            row["text"],
            f"{row['metrics']['k3']:.1e}",
            f"{row['metrics']['ess_sequence']:.2f}",
            f"{row['k3_explained']:.1e}",
            f"e^{row['log_odds']:.0f}",
            ", ".join(row["found"]),
        ]
        for row in rows
    ]
    heads = ["what is wrong", "KL (k3)", "ESS sequence", "KL, explained", "odds of the tokens", "recognised as"]
    return _markdown(heads, lines)
