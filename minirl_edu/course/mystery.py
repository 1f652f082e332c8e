"""Six runs with one planted fault each, and a healthy one, for unit 10. DO NOT READ ON before you have done its lab.

    python -m minirl_edu.course.mystery --out lessons/results/mystery

records all of them, one after another, and packs them into `mystery.tar.bz2` beside that folder (see `archives`).
Finished runs are kept. Each run is `MiniRLTrainer` in the same setting. The faults are planted from outside, around its
engine or in one of its methods, where a careless change would put them.
"""

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minirl_edu import __version__
from minirl_edu.archives import files_in, pack
from minirl_edu.batches import Batcher, MiniBatch
from minirl_edu.config import Config, load_config
from minirl_edu.models import load_model
from minirl_edu.rollout import Rollout, RolloutEngine, Sampling, make_engine
from minirl_edu.routing import Routes
from minirl_edu.tasks import Problem
from minirl_edu.trainer import MiniRLTrainer, TrainingDiverged

HEALTHY = "healthy"
FAULTS = {
    "A": "rewards of the wrong group",
    "B": "sampled at another temperature",
    "C": "learning rate ten times too high",
    "D": "engine never synced",
    "E": "no baseline",
    "F": "routes of another response",
}
"""What was planted in which run."""

COLUMNS = (
    *("global_step", "grad_step", "reward", "score", "score_rollout", "entropy", "kl_rollout_old", "k3_rollout_old"),
    *("ess", "clip_frac_pos", "clip_frac_neg", "is_weight_mean", "is_weight_max", "log_ratio_mismatch"),
    *("log_ratio_staleness", "first_order_gap", "routing_flip_rate", "grad_norm", "response_length"),
)
"""The metrics that a chart keeps, under the trainer's names."""

# The base of experiments/paper.yaml with four updates per rollout and R3, a third of its length.
SETTING = (
    "task.options.hard_fraction=0.25",
    *("rollout.precision=int4", "rollout.rounding=stochastic", "algorithm.replay=R3"),
    *("train.global_steps=30", "train.mini_batches=4", "train.mini_batch_prompts=16", "train.group_size=8"),
    *("train.lr=4e-4", "train.lr_schedule=constant_with_warmup", "train.warmup_steps=20"),
    *("eval.every=3", "eval.problems=256", "output.save_every=0"),
)
SAMPLED_AT = 0.7
HOT = 10


def faulty_trainer(name: str, out: str | Path, *, seed: int, overrides: Sequence[str] = ()) -> MiniRLTrainer:
    """The trainer of run `name` ("A" to "F", or "healthy"), not yet started; `overrides` as in `load_config`.

    Raises ValueError for any other name.
    """
    if name != HEALTHY and name not in FAULTS:
        raise ValueError(f"name: {name!r} is no run; choose one of {', '.join([*FAULTS, HEALTHY])}")
    config = load_config(overrides=[*SETTING, f"seed={seed}", *overrides])
    fault = FAULTS.get(name, HEALTHY)
    if fault == "learning rate ten times too high":
        config = replace(config, train=replace(config.train, lr=HOT * config.train.lr))
    trainer = {
        "rewards of the wrong group": _WrongGroup,
        "no baseline": _NoBaseline,
        "routes of another response": _RoutesOfAnother,
    }.get(fault, MiniRLTrainer)
    wrapper = {"sampled at another temperature": _OtherTemperature, "engine never synced": _NeverSynced}.get(fault)
    model = load_model(config.model.name)
    engine = None if wrapper is None else wrapper(_engine(model, config))
    return trainer(config, out, model=model, engine=engine, progress=False)


def rerun(name: str, out: str | Path, *, seed: int) -> Path:
    """Train run `name` with this seed and write its chart to `out`/`name`/seed`seed`.csv; returns that path.

    The file appears whole or not at all. A run that was interrupted starts again.
    """
    path = Path(out) / name / f"seed{seed}.csv"
    with tempfile.TemporaryDirectory() as folder:
        trainer = faulty_trainer(name, folder, seed=seed)
        try:
            trainer.train()
            diverged = None
        except TrainingDiverged as error:
            diverged = str(error).partition(";")[0]
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    header = {"seed": seed, "version": __version__, "diverged": diverged}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {json.dumps(header)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in map(json.loads, lines):
            writer.writerow([_cell(record.get(column)) for column in COLUMNS])
    part.replace(path)
    return path


def read_charts(out: str | Path) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """The charts that `main` recorded, by run and seed: float64 columns, a row per gradient step; NaN where nothing was
    measured.

    Raises ValueError for a file with other columns, OSError for a broken archive.
    """
    charts: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for file, content in files_in(out).items():
        header, _, text = content.decode("utf-8").partition("\n")
        names, *rows = csv.reader(text.splitlines())
        if tuple(names) != COLUMNS:
            raise ValueError(f"{Path(out) / file}: its columns are {names}; delete it and record it again")
        table = np.array([[float(cell or math.nan) for cell in row] for row in rows], dtype=np.float64)
        seed = json.loads(header.removeprefix("#"))["seed"]
        charts.setdefault(file.partition("/")[0], {})[seed] = dict(zip(COLUMNS, table.T, strict=True))
    return charts


def main(argv: Sequence[str] | None = None) -> int:
    """Record every run that is not there yet, with a progress bar; returns the exit status."""
    parser = argparse.ArgumentParser(description="Record the six mystery runs of unit 10 and a healthy one.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the charts")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each run (default 3)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    there = files_in(arguments.out)
    wanted = [(name, seed) for seed in range(arguments.seeds) for name in (HEALTHY, *FAULTS)]
    wanted = [(name, seed) for name, seed in wanted if f"{name}/seed{seed}.csv" not in there]
    with tqdm(wanted, unit="run") as bar:
        for name, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            rerun(name, arguments.out, seed=seed)
    pack(arguments.out)
    return 0


def _cell(value: Any) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


# ------------------------------------------------------------------------------------------------------ the faults


def _engine(model: PreTrainedModel, config: Config) -> RolloutEngine:
    return make_engine(model, config.rollout, seed=config.seed, routes=True)


class _Around:
    """An engine that passes everything on."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        return self.engine.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        self.engine.sync(model, version=version)

    def close(self) -> None:
        self.engine.close()


class _NeverSynced(_Around):
    """Keeps the weights it started with."""

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        if version == 0:
            self.engine.sync(model, version=version)


class _OtherTemperature(_Around):
    """Samples at its own temperature; the trainer divides by the config's."""

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        own = replace(sampling, temperature=SAMPLED_AT)
        return self.engine.generate(prompts, group_size=group_size, sampling=own, seed=seed)


class _WrongGroup(MiniRLTrainer):
    """Every response gets the reward of the response one group before it."""

    def rewards(self, problems: Sequence[Problem], rollout: Rollout) -> Tensor:
        return super().rewards(problems, rollout).roll(rollout.group_size)


class _NoBaseline(MiniRLTrainer):
    """The reward itself is used as the advantage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_advantages = lambda rewards, group_size: rewards


class _RoutesOfAnother(MiniRLTrainer):
    """R3 with the experts of the response in the row above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batcher.__class__ = _MixedUp


class _MixedUp(Batcher):
    def cut(self, *args: Any) -> list[MiniBatch]:
        batches = super().cut(*args)
        for part in (part for batch in batches for part in batch.parts):
            routes = part.rollout.routes
            assert routes is not None
            # Where the other response had no token, its row names no experts: there the model routes by itself.
            valid = routes.valid & routes.valid.roll(1, 0)
            other = Routes(routes.experts.roll(1, 0), valid, routes.layers)
            part.routes_forced = part.routes_old = part.layout.pack(other)
        return batches


if __name__ == "__main__":
    raise SystemExit(main())
