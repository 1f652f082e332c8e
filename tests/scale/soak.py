"""A long run under random kills of its server and its processes, beside the same run undisturbed.

    python -m tests.scale.soak --steps 200 --kills 12 --out runs/soak

Two processes (FSDP2) train on rollouts of a vLLM server. A seeded dice kills, with SIGKILL, the server, one of the two
ranks, or the launcher; whoever ends is started again, as a job scheduler would. In the end every line of metrics must
be there once, and the weights must be those of the undisturbed run.
"""

import argparse
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from minirl_edu.rollout.vllm_server import KEY_VARIABLE
from minirl_edu.run.checkpoint import latest_checkpoint, load_checkpoint
from tests.scale.launch import ROOT, TRAIN, command, environment

VICTIMS = ("server", "rank 0", "rank 1", "launcher")


def settings(url: str, steps: int) -> list[str]:
    """The run: small mini-batches, N = 2, R3, an optimizer state and a schedule that a resumed run must get right."""
    return [
        *("model.name=chain-steps", "rollout.engine=vllm_server", "rollout.precision=fp32", "algorithm.replay=R3"),
        f"rollout.options={{url: '{url}', start_timeout: 300}}",
        *(f"train.global_steps={steps}", "train.mini_batch_prompts=4", "train.group_size=4", "train.mini_batches=2"),
        *("train.lr_schedule=cosine", "train.lr=1e-4", "eval.every=20", "eval.problems=16"),
        *("output.save_every=5", "ranks.silent=10"),
    ]


class Run:
    """A server and a trainer, each started again whenever it ends before the run is done."""

    def __init__(self, out: Path, kind: str, steps: int) -> None:
        self.out, self.kind, self.steps = out, kind, steps
        out.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = environment() | {KEY_VARIABLE: secrets.token_urlsafe(16)}
        self.starts = {"server": 0, "trainer": 0}
        self.server: subprocess.Popen | None = None
        self.trainer: subprocess.Popen | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / "run"

    def lines(self) -> list[dict]:
        """The metrics so far; a line that is being written is left out."""
        with suppress(FileNotFoundError):
            text = (self.folder / "metrics.jsonl").read_text()
            return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return []

    def keep_alive(self) -> bool:
        """Start what is not running; False once the trainer has ended well."""
        if self.trainer is not None and self.trainer.poll() == 0:
            return False
        if self.server is None or self.server.poll() is not None:
            serve = [sys.executable, str(ROOT / "scale/serve.py"), "--model", "chain-steps", "--dtype", "float32"]
            options = ["--routes", "--max-model-len", "128", "--kv-cache-bytes", str(2**26), "--port", str(self.port)]
            self.server = self._start("server", [*serve, *options])
        if self.trainer is None or self.trainer.poll() is not None:
            chosen = [part for s in settings(f"http://127.0.0.1:{self.port}", self.steps) for part in ("--set", s)]
            again = ["--resume"] if (self.folder / "config.yaml").exists() else []
            self.trainer = self._start("trainer", command(self.kind, TRAIN, "--out", self.folder, *chosen, *again))
        return True

    def _start(self, name: str, line: Sequence[str]) -> subprocess.Popen:
        self.starts[name] += 1
        with (self.out / f"{name}.log").open("a") as log:
            return subprocess.Popen(line, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def kill(self, victim: str) -> bool:
        """SIGKILL; False if there is none at the moment."""
        with suppress(psutil.Error, StopIteration, AttributeError):
            process = psutil.Process(self.server.pid if victim == "server" else self.trainer.pid)  # type: ignore[union-attr]
            if victim == "server":
                for child in [process, *process.children(recursive=True)]:
                    child.kill()
                return True
            if victim.startswith("rank") and self.kind != "alone":
                ranks = process.children(recursive=True)
                process = next(p for p in ranks if p.environ().get("RANK") == victim.removeprefix("rank "))
            process.kill()
            return True
        return False

    def end(self) -> None:
        """Stop the server, and whatever is left."""
        for process in (self.trainer, self.server):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                with suppress(psutil.Error):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
                process.wait()


def soak(out: Path, *, kind: str, steps: int, kills: int, seed: int, seconds: float, tell=print) -> Run:
    """Run to the end with `kills` kills at random moments. Raises TimeoutError after `seconds`."""
    dice = random.Random(seed)
    at = sorted(dice.sample(range(2, 2 * steps - 2), kills))  # lines of metrics after which somebody is killed
    victims = [dice.choice(VICTIMS if kind != "alone" else ("server", "launcher")) for _ in at]
    victims[:2] = ["server", "launcher"][: len(victims[:2])]  # at least one of each, in a short run too
    run, began, plan = Run(out, kind, steps), time.monotonic(), list(zip(at, victims, strict=True))
    try:
        while run.keep_alive():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{out}: {len(run.lines())} lines after {seconds:g} s; see the logs there")
            if plan and len(run.lines()) > plan[0][0]:
                time.sleep(dice.random())  # somewhere in the middle of a step
                if run.kill(plan[0][1]):
                    tell(f"{time.monotonic() - began:6.0f} s, line {len(run.lines())}: killed {plan.pop(0)[1]}")
            time.sleep(0.1)
    finally:
        run.end()
    tell(
        f"{time.monotonic() - began:6.0f} s: done, {run.starts['trainer']} starts, {run.starts['server']} of the server"
    )
    return run


def differences(seen: Run, expected: Run) -> dict[str, float]:
    """Largest difference of each metric, and of the weights; raises AssertionError unless each line is there once."""
    steps = [(0, 0), *((1 + i // 2, i + 1) for i in range(2 * expected.steps))]
    found: dict[str, float] = {}
    for run in (seen, expected):
        assert [(line["global_step"], line["grad_step"]) for line in run.lines()] == steps, run.out
    for ours, theirs in zip(seen.lines(), expected.lines(), strict=True):
        for name, value in theirs.items():
            if isinstance(value, int | float) and name != "seconds":
                found[name] = max(found.get(name, 0.0), abs(ours[name] - value))
    weights = []
    for run in (seen, expected):
        checkpoint = latest_checkpoint(run.folder / "checkpoints")
        assert checkpoint is not None and checkpoint.name == f"step-{expected.steps:06d}"
        weights.append(load_checkpoint(checkpoint, verify=False)[0]["model"])
    found["weights"] = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[1])
    return found


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("alone", "ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seconds", type=float, default=7200)
    arguments = parser.parse_args()
    common = {"kind": arguments.kind, "steps": arguments.steps, "seed": arguments.seed, "seconds": arguments.seconds}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plain = soak(arguments.out / "undisturbed", kills=0, **common)
    shaken = soak(arguments.out / "shaken", kills=arguments.kills, **common)
    found = differences(shaken, plain)
    worst = {name: value for name, value in found.items() if value}
    print(f"{len(shaken.lines())} lines, each once; " + (f"differences: {worst}" if worst else "no number differs"))
    return int(bool(worst))


if __name__ == "__main__":
    sys.exit(main())
