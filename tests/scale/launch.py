"""Starts what the tests with several processes run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "program.py"
TRAIN = ROOT / "scale/train.py"


def command(kind: str, script: Path, *arguments: object) -> list[str]:
    """The command line that runs a script alone (`kind` "alone") or on two processes of scale/accelerate/cpu_KIND."""
    launcher = [sys.executable]
    if kind != "alone":
        config = ROOT / f"scale/accelerate/cpu_{kind}.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, str(script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread for each process, this checkout's library, and a launcher that does not wait long for a dead rank."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **ours, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8"}


def launch(kind: str, script: Path, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run to the end; see `command`."""
    return subprocess.run(
        command(kind, script, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )


def start(kind: str, script: Path, *arguments: object) -> "subprocess.Popen[str]":
    """Start, with both outputs in one pipe; see `command`."""
    return subprocess.Popen(
        command(kind, script, *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
