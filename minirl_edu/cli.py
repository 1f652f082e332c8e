"""The `minirl` command: train, demo, report, cold-start, doctor."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minirl_edu import __version__

DEMO_STEPS = 80


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `minirl` command; returns the exit status. User errors end in one line, not a traceback."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    from minirl_edu.config import ConfigError

    try:
        return arguments.run(arguments) or 0
    except (ConfigError, FileExistsError, FileNotFoundError) as error:
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ not in ("TrainingDiverged", "CheckpointError"):
            raise
        print(f"minirl {arguments.command}: {error}", file=sys.stderr)
        return 1


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

    command = add("cold-start", _cold_start, "Fine-tune a fresh tiny model on a teacher's demonstrations of `chain`.")
    command.add_argument("--out", required=True, help="folder for the model")
    command.add_argument("--style", default="steps", choices=("steps", "leaps", "copy"))
    command.add_argument("--operators", default="+", help="some of +-*")
    command.add_argument("--architecture", default="moe", choices=("moe", "dense"))
    command.add_argument("--error-rate", type=float, default=0.25, help="chance that the teacher errs at a step")
    command.add_argument("--steps", type=int, default=2500)
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
