"""Does RL make a small model a large one? Three sizes on one task, each trained to its ceiling (the paper's claim L1).

    python -m minirl_edu.experiments.ceilings --out lessons/results/ceilings.jsonl [--seeds 4] [--workers 2]

The task is `chain` with `+`, `-` and `*`: a network has to hold three tables of 100 results, and a small one cannot.
For each size and seed a model first imitates a teacher without errors for `CEILING_STEPS` batches. The score that it
reaches is what the size can do when it is shown how, its *ceiling*. Then it imitates a careless teacher for a while,
which is where RL starts: on-policy with MiniRL and an exact engine, from the reward of the last digit alone.

Fixed before the runs. L1 holds if, with means over the seeds,

1. RL raises the score of every size by 10 points or more;
2. every size ends within 10 points of its own ceiling;
3. the smallest ends at least 10 points below the largest, and its interval over the paired seeds lies below 0.

Each model is a line of JSON, written as soon as it is trained; a second call goes on where the first one ended.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from minirl_edu.cold_start import cold_start, measure, save_cold_start
from minirl_edu.config import load_config
from minirl_edu.models import tiny_dense
from minirl_edu.records import read_records
from minirl_edu.tasks import ChainTask
from minirl_edu.trainer import MiniRLTrainer

SIZES: dict[str, dict[str, Any]] = {
    "small": {"layers": 1, "hidden": 32, "heads": 1, "kv_heads": 1, "ffn_hidden": 32},
    "middle": {"layers": 2, "hidden": 32, "heads": 1, "kv_heads": 1, "ffn_hidden": 32},
    "large": {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 2, "ffn_hidden": 128},
}
"""Dense models."""
TASK: dict[str, Any] = {"operators": "+-*", "min_operands": 3, "max_operands": 8}
CEILING_STEPS, START_STEPS, UPDATES = 2500, 300, 300
ERROR_RATE = 0.2
QUICK = {"steps": 20, "updates": 2, "problems": 8}
"""The setting of the tests."""


def train_size(size: str, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """One size and seed: its parameters, its ceiling, the score before RL and the curve of it, seconds."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    problems = QUICK["problems"] if quick else 256
    task = ChainTask(**TASK)
    ids = {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": task.tokenizer.pad_token_id}
    kind: dict[str, Any] = SIZES[size] | ids
    model = tiny_dense(len(task.tokenizer), seed=seed, **kind)
    found: dict[str, Any] = {"size": size, "seed": seed}
    lessons = ("ceiling", CEILING_STEPS, 0.0, 2e-3), ("start", START_STEPS, ERROR_RATE, 1e-3)
    for i, (name, steps, error_rate, lr) in enumerate(lessons):
        steps = QUICK["steps"] if quick else steps
        cold_start(task, model, error_rate=error_rate, steps=steps, lr=lr, seed=2 * seed + i, progress=False)
        found[name] = measure(task, model, problems=problems, seed=seed)["score"]
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save_cold_start(f"{folder}/start", model, task, {})
        updates = QUICK["updates"] if quick else UPDATES
        config = load_config(
            None,
            [
                *(f"model.name={folder}/start", "task.name=chain", f"task.options={json.dumps(TASK)}", f"seed={seed}"),
                *("rollout.precision=fp32", "train.mini_batches=1", "algorithm.replay=none", "output.save_every=0"),
                *("train.lr=3e-4", "train.lr_schedule=constant_with_warmup", "train.warmup_steps=10"),
                *("train.mini_batch_prompts=16", "train.group_size=8", f"train.global_steps={updates}"),
                *(f"eval.every={max(updates // 10, 1)}", f"eval.problems={problems}", "eval.samples=4"),
            ],
        )
        run = MiniRLTrainer(config, Path(folder, "run"), progress=False).train()
        records = read_records(run / "metrics.jsonl")
    found["curve"] = [record["score"] for record in records if "score" in record]
    found["end"] = sum(found["curve"][-3:]) / len(found["curve"][-3:])
    found["seconds"] = round(time.perf_counter() - started)
    return found


def verdict(runs: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The three criteria above, from the runs of all sizes on the same seeds."""
    from minirl_edu.experiments.statistics import paired_difference  # needs scipy, which the runs do not

    by_size = {size: [run for run in runs if run["size"] == size] for size in SIZES}
    gain = {s: _mean(run["end"] - run["start"] for run in found) for s, found in by_size.items()}
    off = {s: _mean(run["end"] - run["ceiling"] for run in found) for s, found in by_size.items()}
    ends = {size: {run["seed"]: run["end"] for run in found} for size, found in by_size.items()}
    small, large = (np.array([ends[size][seed] for seed in sorted(ends["small"])]) for size in ("small", "large"))
    behind = paired_difference(small, large)
    return {
        "RL raises every size by 10 points": min(gain.values()) >= 0.10,
        "every size ends within 10 points of its ceiling": max(map(abs, off.values())) <= 0.10,
        "the smallest ends 10 points below the largest": behind.estimate <= -0.10 and behind.high < 0,
    }


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of the sizes, means over seeds with their range, and the criteria."""
    rows = [("size", "parameters", "start", "after RL", "its ceiling", "seeds"), ("---",) * 6]
    for size in SIZES:
        found = [run for run in runs if run["size"] == size]
        cells = [_cell([run[key] for run in found]) for key in ("start", "end", "ceiling")]
        rows.append((size, f"{found[0]['parameters']:,}", *cells, str(len(found))))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    held = "\n".join(f"- {text}: **{'yes' if right else 'no'}**" for text, right in verdict(runs).items())
    return f"{table}\n\n{held}"


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _cell(values: Sequence[float]) -> str:
    return f"{_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _one(job: tuple[str, int, bool]) -> dict[str, Any]:
    return train_size(job[0], job[1], quick=job[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing in --out, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m minirl_edu.experiments.ceilings", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines, one per size and seed")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each size (4)")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread (1)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    done = {(run["size"], run["seed"]) for run in runs}
    jobs = [(size, seed, chosen.quick) for seed in range(chosen.seeds) for size in reversed(SIZES)]
    jobs = [job for job in jobs if job[:2] not in done]
    with multiprocessing.get_context("spawn").Pool(chosen.workers) as pool:
        for run in tqdm(pool.imap_unordered(_one, jobs), total=len(jobs), unit="run"):
            runs.append(run)
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
    print(markdown(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
