"""The `minirl` command: train, demo, report, cold-start, doctor."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirl_edu import __version__

RECIPES = Path(__file__).parent / "recipes"
DEMO_VARIANTS = {"MiniRL": [], "no clipping": ["algorithm.clip=false"]}
"""The demo's runs: label and what differs from recipes/demo.yaml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `minirl` command; returns the exit status. A user's error ends in one line, not a traceback.

    Exit status: 0 done, 1 the run failed (what to resume is printed), 2 a wrong argument, setting or file.
    """
    arguments = _parser().parse_args(argv)
    from minirl_edu.checkpoint import CheckpointError
    from minirl_edu.config import ConfigError
    from minirl_edu.trainer import TrainingDiverged

    try:
        return arguments.run(arguments) or 0
    except (ConfigError, FileExistsError, FileNotFoundError) as error:
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, CheckpointError) as error:
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 1


def _train(arguments: argparse.Namespace) -> None:
    from minirl_edu.config import load_config
    from minirl_edu.report import write_report
    from minirl_edu.trainer import MiniRLTrainer

    out = Path(arguments.out)
    source = arguments.config
    if source is None and arguments.resume:
        source = out / "config.yaml"  # go on with the settings that the run was started with
        if not source.exists():
            raise FileNotFoundError(f"--resume: {out} holds no run (no config.yaml)")
    config = load_config(source, arguments.set)
    _quiet()
    trainer = MiniRLTrainer(config, out, resume=arguments.resume)
    trainer.train()
    print(f"report: {write_report(out, out / 'report.html')}")


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from minirl_edu.config import load_config
    from minirl_edu.plots import read_records
    from minirl_edu.report import write_report
    from minirl_edu.trainer import MiniRLTrainer

    out, runs = Path(arguments.out), {}
    _quiet()
    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much on a busy machine
    for name, overrides in DEMO_VARIANTS.items():
        folder = runs[name] = out / name.replace(" ", "-")
        config = load_config(RECIPES / "demo.yaml", [*overrides, *arguments.set])
        resume = (folder / "config.yaml").exists()
        trainer = MiniRLTrainer(config, folder, resume=resume)
        if trainer.step < config.train.global_steps:
            print(f"{name}: {'going on' if resume else 'training'} in {folder}", flush=True)
            trainer.train()
        if trainer.step < config.train.global_steps:
            print(f"stopped; the same command goes on where it was: minirl demo --out {out}")
            return 130
    report = write_report(runs, out / "report.html", title="MiniRL on a laptop: what the clip is for")
    for name, folder in runs.items():
        scores = [record["score"] for record in read_records(folder / "metrics.jsonl") if "score" in record]
        print(f"{name}: held-out score {scores[0]:.2f} → {scores[-1]:.2f} (best {max(scores):.2f})")
    print(f"report: {report}  (trained already? delete {out} to train again)")
    return 0


def _report(arguments: argparse.Namespace) -> None:
    from minirl_edu.report import write_report

    folders = [Path(folder) for folder in arguments.runs]
    out = Path(arguments.out) if arguments.out else folders[0] / "report.html"
    print(write_report(folders[0] if len(folders) == 1 else {folder.name: folder for folder in folders}, out))


def _doctor(arguments: argparse.Namespace) -> int:
    from minirl_edu.doctor import report

    text, status = report()
    print(text)
    return status


def _quiet() -> None:
    """Keep transformers' loading bars out of the way of the training bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _cold_start(arguments: argparse.Namespace) -> None:
    from minirl_edu.cold_start import cold_start, measure, new_model, save_cold_start
    from minirl_edu.tasks import ChainTask

    task = ChainTask(style=arguments.style, operators=arguments.operators)
    model = new_model(task, arguments.architecture, seed=arguments.seed)
    started = time.perf_counter()
    losses = cold_start(
        task, model, error_rate=arguments.error_rate, steps=arguments.steps, lr=arguments.lr, seed=arguments.seed
    )
    settings = ("style", "operators", "architecture", "error_rate", "steps", "lr", "seed")
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(getattr(arguments, name)))}" for name in settings)
    record = {
        "command": f"minirl cold-start {flags} --out {Path(arguments.out).name}",
        **{name: getattr(arguments, name) for name in settings},
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "metrics": measure(task, model, seed=arguments.seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started),
    }
    out = save_cold_start(arguments.out, model, task, record)
    print(f"{out}: " + ", ".join(f"{name} {value:.3f}" for name, value in record["metrics"].items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minirl", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("train", _train, "Train with MiniRL as a YAML config says; see config.py for every field.")
    command.add_argument("--config", help="YAML file; without one, the defaults")
    command.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one field; repeatable")
    command.add_argument("--out", required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")

    command = add("demo", _demo, "Train the shipped tiny MoE with MiniRL beside one ablation and write a report.")
    command.add_argument("--out", default="runs/demo", help="folder for both runs and the report")
    command.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one field in both runs")

    command = add("report", _report, "Write the report of one run, or of several side by side.")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument("--out", help="HTML file (default: report.html in the first folder)")

    add("doctor", _doctor, "Print versions, threads, what is installed and what is missing.")

    command = add("cold-start", _cold_start, "Fine-tune a fresh tiny model on a teacher's demonstrations of `chain`.")
    command.add_argument("--out", required=True, help="folder for the model")
    command.add_argument("--style", default="steps", choices=("steps", "operands", "copy"))
    command.add_argument("--operators", default="+", help="some of +-*")
    command.add_argument("--architecture", default="moe", choices=("moe", "dense"))
    command.add_argument("--error-rate", type=float, default=0.21, help="chance that the teacher errs at a step")
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
