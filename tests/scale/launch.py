"""Starts what the tests with several processes run: the ranks alone, forked, or `accelerate launch` itself."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.forked import ROOT, Forked

PROGRAM = Path(__file__).parent / "program.py"
TRAIN = ROOT / "scale/train.py"
SHUTDOWN = 8.0
"""Seconds that a rank has to end after another was lost."""


def environment() -> dict[str, str]:
    """One thread for each process, this checkout's library, and a launcher that does not wait long for a dead rank."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **ours, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{SHUTDOWN:g}"}


def configuration(kind: str) -> Path:
    """The accelerate config of two CPU processes: "ddp" or "fsdp2"."""
    return ROOT / f"scale/accelerate/cpu_{kind}.yaml"


def command(kind: str, script: Path, *arguments: object) -> list[str]:
    """The command line that runs a script alone (`kind` "alone") or on two processes of scale/accelerate/cpu_KIND."""
    launcher = [sys.executable]
    if kind != "alone":
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(configuration(kind))]
    return [*launcher, str(script), *map(str, arguments)]


class Ranks:
    """The two processes that `accelerate launch` would start, in the environment it would give them, without its start
    and theirs. Like it, this holds the store they meet at, and ends those that are left when one is lost."""

    def __init__(self, kind: str, script: Path, *arguments: object) -> None:
        store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        self.store = store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        parsed = launch_command_parser().parse_args(["--config_file", str(configuration(kind)), str(script)])
        parsed = _validate_launch_command(parsed)[0]
        shared = environment() | {
            name: value for name, value in prepare_multi_gpu_env(parsed).items() if name not in os.environ
        }
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        self.ranks = [
            Forked(script, arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        return self.ranks[number].pid

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for all of them, and what they wrote."""
        deadline, grace = time.monotonic() + timeout, None
        while any(rank.poll() is None for rank in self.ranks):
            if grace is None and any(rank.poll() for rank in self.ranks):
                for rank in self.ranks:
                    rank.send_signal(signal.SIGTERM)
                grace = time.monotonic() + SHUTDOWN
            if time.monotonic() > min(deadline, grace or deadline):
                for rank in self.ranks:
                    rank.kill()
                if grace is None:
                    raise subprocess.TimeoutExpired("ranks", timeout, self.output)
            time.sleep(0.02)
        return self.output, None

    @property
    def output(self) -> str:
        """What both have written so far."""
        return "".join(rank.output for rank in self.ranks)

    @property
    def returncode(self) -> int | None:
        """The first exit status that is not 0."""
        return next((code for rank in self.ranks if (code := rank.returncode)), self.ranks[0].returncode)


class Launched(subprocess.Popen[str]):
    """`accelerate launch`, in a process of its own, and its ranks."""

    def __init__(self, kind: str, script: Path, *arguments: object) -> None:
        super().__init__(
            command(kind, script, *arguments),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        import psutil

        children = psutil.Process(self.pid).children(recursive=True)
        return next(child.pid for child in children if child.environ().get("RANK") == str(number))


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    returncode: int | None
    output: str


def launch(kind: str, script: Path, *arguments: object, timeout: float = 240) -> Done:
    """Run to the end, alone or as two ranks."""
    if kind == "alone":
        process = Forked(script, arguments, environment=environment())
    else:
        process = Ranks(kind, script, *arguments)
    output = process.communicate(timeout)[0]
    return Done(process.returncode, output)
