"""Trains the runs of the figures in worker processes: one thread each, a job after the other, resumable.

    jobs ─> run_all ─> workers, a process per core ─> run_one ─> OUT/runs/<tier>/<setting>/<variant>/seed<k>.csv
                   └─> at the end, whatever ended it: the files of each setting in OUT/runs/<tier>/<setting>.tar.bz2

A run's file appears complete or not at all, and says which config it was made with. So the same command goes on where
the last one was stopped, whatever stopped it, and a run that was made with another config is never taken for this one.

A worker is a fresh interpreter that reads jobs from one pipe and reports gradient steps to another. It ends when the
first pipe closes: none outlives the process that started it, however that one ended.
"""

import faulthandler
import gc
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minirl_edu.archives import files_in, pack
from minirl_edu.config import Config, ConfigError, OutputConfig
from minirl_edu.doctor import environment
from minirl_edu.experiments.spec import Run, RunResult, Spec, parse_run, read_run, write_run
from minirl_edu.records import read_records
from minirl_edu.run.folder import lock_folder

RESULTS_VERSION = 1
"""Part of every digest. A change that can move a result, a default's among them (see CHANGELOG.md), raises it, and
every run is made again."""

_ATTEMPTS = 2
_WORKER = "from minirl_edu.experiments.runner import _work; _work()"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when the libraries are loaded
_POSIX = os.name == "posix"


@dataclass(frozen=True)
class Job:
    """One run: `key` is (tier, setting, variant, seed), `path` the CSV that it leaves, until `run_all` packs it."""

    key: tuple[str, str, str, int]
    config: Config
    path: Path

    @property
    def name(self) -> str:
        """What people read, such as `on_policy/minirl seed 3`."""
        _, setting, variant, seed = self.key
        return f"{setting}/{variant} seed {seed}"

    @property
    def folder(self) -> Path:
        """Where the setting's CSVs lie, and beside which its archive (see `archives`)."""
        return self.path.parents[1]

    @property
    def responses_per_step(self) -> int:
        """Responses in a gradient step: how long one takes, compared with other jobs."""
        return self.config.train.mini_batch_prompts * self.config.train.group_size

    @property
    def cost(self) -> int:
        """Gradient steps × responses."""
        return self.config.train.global_steps * self.config.train.mini_batches * self.responses_per_step

    @property
    def log(self) -> Path:
        """What the run printed; kept only if it failed."""
        return self.path.with_suffix(".log")


@dataclass
class Outcome:
    """What `run_all` did with its jobs.

    skipped      finished before, with the same config
    finished     trained now; those that diverged are among them, which is a result too
    failed       (job, why), with a log beside the missing CSV
    interrupted  Ctrl-C came before the end
    seconds      wall-clock time
    """

    skipped: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)
    failed: list[tuple[Job, str]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status of a command: 0 all runs are there, 1 some failed, 130 interrupted."""
        return 130 if self.interrupted else 1 if self.failed else 0


def run_path(out: Path | str, tier: str, setting: str, variant: str, seed: int) -> Path:
    """Where a run's CSV lies under `out` until it is packed."""
    return Path(out) / "runs" / tier / setting / variant / f"seed{seed}.csv"


def jobs_for(spec: Spec, figures: Sequence[str], out: Path | str, *, tier: str, seeds: int) -> list[Job]:
    """The runs that the figures need, for each of `seeds` seeds (see `Spec.seeds`). Raises ConfigError for unknown
    names."""
    keys = dict.fromkeys(
        (*run, seed) for figure in figures for run in spec.runs([figure], tier) for seed in spec.seeds(figure, seeds)
    )
    return [Job((tier, *key), spec.config(tier, *key), run_path(out, tier, *key)) for key in keys]


def finished_runs(jobs: Sequence[Job]) -> dict[Run, list[RunResult]]:
    """The results that are there, by (setting, variant) and in the order of the jobs.

    Jobs without a CSV, or with one that was made with another config, are left out. Raises OSError for a broken
    archive.
    """
    results: dict[Run, list[RunResult]] = {}
    for job, content in zip(jobs, _contents(jobs), strict=True):
        if (result := _result(job, content)) is not None:
            results.setdefault(job.key[1:3], []).append(result)
    return results


def config_digest(config: Config) -> str:
    """SHA-256 (hex) of all that a run's numbers follow from: the fields that differ from the defaults (but for
    `output`) and `RESULTS_VERSION`.

    A new field whose default keeps things as they were leaves stored runs valid; a default that changes what a run
    computes raises `RESULTS_VERSION`.
    """
    canonical = json.dumps({"results_version": RESULTS_VERSION, "config": _changed(config)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def run_header(config: Config) -> dict[str, Any]:
    """What a run's CSV says of its config: the seed, the fields that differ from the defaults by dotted name, and the
    digest."""
    return {"config": _changed(config), "digest": config_digest(config)}


def _changed(config: Config) -> dict[str, Any]:
    default, changed = Config().to_dict(), {"seed": config.seed}
    for section, fields in config.to_dict().items():
        if isinstance(fields, dict) and section != "output":
            changed |= {f"{section}.{name}": v for name, v in fields.items() if v != default[section][name]}
    return changed


# ---------------------------------------------------------------------------------------------------------- one run


def run_one(
    config: Config, path: Path, *, header: Mapping[str, Any], tick: Callable[[int], object] | None = None
) -> None:
    """Train one run and write its CSV, complete or not at all; nothing else is left.

    `header` goes into the first line of the file (see `run_header`), with `seconds` (of the processor: what the run
    costs, however busy the machine is) and `diverged` added: None, or why training stopped early; then the rows are
    those until there. `tick` is called after each global step with the number of its gradient steps.

    Raises ConfigError for settings that do not fit together, KeyboardInterrupt if Ctrl-C or SIGTERM ended the training.
    """
    started, scratch = time.process_time(), _scratch(path)
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    # No checkpoints on the way: a run is minutes long, and one that is cut short starts again.
    config = replace(config, output=OutputConfig(save_every=0))
    try:
        diverged = _train(config, scratch, tick)
        # A step at which training diverged has a record without measurements.
        unmeasured = {"global_step", "grad_step", "warnings"}
        records = [record for record in read_records(scratch / "metrics.jsonl") if record.keys() - unmeasured]
        seconds = round(time.process_time() - started, 1)
        write_run(scratch / path.name, records, header={**header, "seconds": seconds, "diverged": diverged})
        (scratch / path.name).replace(path)  # at one stroke, and whatever fails before leaves with the folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.stem}")


def _train(config: Config, folder: Path, tick: Callable[[int], object] | None) -> str | None:
    """Train in `folder`; returns why the run diverged, if it did."""
    # Imported where it is needed: the process that only hands out jobs starts in half the time, with half the memory.
    from minirl_edu.trainer import MiniRLTrainer, TrainingDiverged

    on_step = None if tick is None else lambda lines: tick(len(lines))
    trainer = MiniRLTrainer(config, folder, progress=False, on_step=on_step)
    try:
        trainer.train()
    except TrainingDiverged as error:
        return str(error).partition("; ")[0]  # the rest is about a checkpoint, and there is none
    if trainer.step < config.train.global_steps:  # the trainer answers a signal by finishing its step and returning
        raise KeyboardInterrupt
    return None


# --------------------------------------------------------------------------------------------------------- all runs


def run_all(
    jobs: Sequence[Job],
    out: Path | str,
    *,
    workers: int | None = None,
    progress: bool = True,
    command: str = "the same command",
) -> Outcome:
    """Train every job whose CSV is not there yet, the longest first, in `workers` processes (None: one per core).

    Each run's CSV is written when the run ends; at the end, also an early one, each setting's go into its archive. A
    process that is killed leaves them as they are, for the next to go on from and to pack.

    A CSV that was made with another config is kept as `….old.csv` and the run made again. A job whose worker dies
    (killed, out of memory) is tried once more; one that raises is recorded, with a log beside its CSV; the others go
    on. On Ctrl-C the workers are stopped at once and what is finished stays. `out`, under which the CSVs lie, gets
    environment.json: where the latest runs were made.

    `progress` shows a bar on a terminal, else prints a line per finished run. `command` is what to type to go on, for
    the messages. Raises ConfigError for `workers` below 1, FolderInUse where another process is at work in `out`,
    OSError for a broken archive.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers = {workers}: use 1 or more")
    started = time.perf_counter()
    with lock_folder(out):  # two processes in one would train the same runs in the same places
        contents = dict(zip((job.path for job in jobs), _contents(jobs), strict=True))
        outcome = Outcome(skipped=[job for job in jobs if _result(job, contents[job.path]) is not None])
        done = {job.path for job in outcome.skipped}
        pending = [job for job in jobs if job.path not in done]
        aside = [_set_aside(job.path, old) for job in pending if (old := contents[job.path]) is not None]
        if aside:
            print(f"{len(aside)} of {len(jobs)} runs are of another config: made again, the old kept ({aside[0].name})")
        try:
            if pending:
                cores = workers or environment()["cores"]
                shown = _Progress(pending, len(jobs), progress)
                team = _Team(pending, Path(out), min(cores, len(pending)), outcome, shown)
                try:
                    team.work()
                except KeyboardInterrupt:
                    outcome.interrupted = True
                finally:
                    team.stop()
        finally:
            for folder in dict.fromkeys(job.folder for job in jobs):
                pack(folder)
    outcome.seconds = time.perf_counter() - started
    _summarise(outcome, len(jobs), command)
    return outcome


def _contents(jobs: Sequence[Job]) -> list[bytes | None]:
    """What each job's CSV holds, packed or not; None where there is none."""
    files = {folder: files_in(folder) for folder in dict.fromkeys(job.folder for job in jobs)}
    return [files[job.folder].get(job.path.relative_to(job.folder).as_posix()) for job in jobs]


def _result(job: Job, content: bytes | None) -> RunResult | None:
    if content is None:
        return None
    try:
        result = parse_run(content, job.path)
    except ValueError:  # not a file of ours
        return None
    return result if result.digest == config_digest(job.config) else None


def _set_aside(path: Path, content: bytes) -> Path:
    """Keep a CSV that does not belong here as the first free of `seed3.old.csv`, `seed3.2.old.csv`, …; returns which.

    In an archive it stays until the new run replaces it, so a command that was stopped finds it there once more: it is
    kept once.
    """
    number, target = 1, path.with_suffix(".old.csv")
    while target.exists() and target.read_bytes() != content:
        number += 1
        target = path.with_suffix(f".{number}.old.csv")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        part.replace(target)
    path.unlink(missing_ok=True)
    return target


def _summarise(outcome: Outcome, total: int, command: str) -> None:
    kept = len(outcome.skipped) + len(outcome.finished)
    if outcome.failed:
        print(f"{len(outcome.failed)} of {total} runs failed:")
        for job, reason in outcome.failed:
            print(f"  {job.name}: {reason}; log: {job.log}")
        print(f"the other runs are not affected; to try these again: {command}")
    if outcome.interrupted:
        print(f"stopped: {kept} of {total} runs are done and stay; to go on: {command}")


class _Team:
    """Worker processes and what they are doing."""

    def __init__(self, jobs: list[Job], out: Path, size: int, outcome: Outcome, progress: "_Progress") -> None:
        self.pending = deque(sorted(jobs, key=lambda job: -job.cost))
        self.out, self.size, self.outcome, self.progress = out, size, outcome, progress
        self.members: list[_Worker] = []
        self.events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self.attempts: Counter[Path] = Counter()
        self.environment_known = False

    def work(self) -> None:
        """Hand out jobs until none is left."""
        while self.pending or self.members:
            while self.pending and len(self.members) < self.size:
                self.members.append(_Worker(self._next(), self.events))
            worker, event = self.events.get()
            if event is None:
                self._died(worker)
            elif "environment" in event:
                self._remember(event["environment"])
            elif "steps" in event:
                worker.steps += event["steps"]
                self.progress.tick(worker.job, event["steps"], [member.job for member in self.members])
            else:
                self._ended(worker, event["error"])

    def stop(self) -> None:
        """End all workers at once."""
        for worker in self.members:
            worker.kill()
            worker.job.log.unlink(missing_ok=True)
        self.progress.close()

    def _next(self) -> Job:
        job = self.pending.popleft()
        job.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.attempts[job.path]:
            job.log.unlink(missing_ok=True)
        self.attempts[job.path] += 1
        return job

    def _ended(self, worker: "_Worker", error: str | None) -> None:
        """The worker's job is done, or has failed: give it another."""
        if error is None:
            worker.job.log.unlink(missing_ok=True)
            self.outcome.finished.append(worker.job)
            self.progress.finished(worker.job, worker.steps, read_run(worker.job.path))
        else:
            self._failed(worker, error)
        if self.pending:
            worker.give(self._next())
        else:
            self.members.remove(worker)
            worker.kill()

    def _died(self, worker: "_Worker") -> None:
        if worker not in self.members:
            return  # one that was sent home
        self.members.remove(worker)
        reason = worker.kill()
        with worker.job.log.open("a", encoding="utf-8") as log:
            log.write(f"{reason}\n")
        if self.attempts[worker.job.path] < _ATTEMPTS:
            self.progress.again(worker.job, worker.steps, reason)
            self.pending.appendleft(worker.job)
        else:
            self._failed(worker, f"{reason}, {_ATTEMPTS} times")

    def _failed(self, worker: "_Worker", reason: str) -> None:
        self.outcome.failed.append((worker.job, reason))
        self.progress.failed(worker.job, worker.steps, reason)

    def _remember(self, facts: dict[str, Any]) -> None:
        if not self.environment_known:
            self.environment_known = True
            text = json.dumps({**facts, "workers": self.size}, indent=2)
            (self.out / "environment.json").write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- workers


class _Worker:
    """A process that trains, and the job it has. What it reports arrives in `events`, and None when it has ended."""

    def __init__(self, job: Job, events: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with job.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORKER],  # -P: no module of the user's folder in the way
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(paths)},  # this very package
                # A group of its own: the terminal's Ctrl-C is for us alone, and `kill` reaches what a worker started.
                process_group=0 if _POSIX else None,
            )
        self.job, self.steps = job, 0
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()
        self.give(job)

    def give(self, job: Job) -> None:
        """Hand it a job."""
        self.job, self.steps = job, 0
        message = {
            "config": job.config.to_dict(),
            "path": str(job.path),
            "log": str(job.log),
            "header": run_header(job.config),
        }
        assert self.process.stdin is not None
        with suppress(OSError):  # it is dead: the listener will say so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def kill(self) -> str:
        """End it and all that it started, at once; returns how it ended."""
        if _POSIX:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        status = self.process.wait()
        self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        shutil.rmtree(_scratch(self.job.path), ignore_errors=True)
        return _ending(status)

    def _listen(self, events: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # else it was killed in the middle of a word
                events.put((self, json.loads(line)))
        events.put((self, None))


def _ending(status: int) -> str:
    if status >= 0:
        return f"the worker ended with status {status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"the worker was ended by {signal.Signals(-status).name}{hint}"


def _work() -> None:
    """The life of a worker process: trains the jobs that come in from stdin, one after the other."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anyone prints belongs in the log
    faulthandler.enable()
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    import torch

    torch.set_num_threads(1)
    reply({"environment": environment()})
    while True:
        job = jobs.get()
        _print_to(job["log"])
        error = None
        try:
            config = Config.from_dict(job["config"])
            run_one(config, Path(job["path"]), header=job["header"], tick=lambda steps: reply({"steps": steps}))
        except KeyboardInterrupt:  # a signal for this process: our parent will try the run once more
            os._exit(130)
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        gc.collect()  # a trainer and its model refer to each other: left alone, dozens of them pile up
        _print_to(os.devnull)
        reply({"error": error})


def _receive(jobs: "queue.Queue[dict[str, Any]]") -> None:
    """Pass on jobs from stdin. When it closes, our parent has ended, and so do we and what we started, at once."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    if _POSIX:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _print_to(path: str) -> None:
    """From here on, stdout and stderr of this process go to the end of that file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


# --------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """How far all jobs are, weighed by their cost, and how long the rest will take: a bar on a terminal, else lines."""

    def __init__(self, jobs: Sequence[Job], total: int, shown: bool) -> None:
        self.total, self.ended, self.shown = total, total - len(jobs), shown
        self.done, self.left = 0, sum(job.cost for job in jobs)
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=self.left,
            file=sys.stdout,
            disable=not (shown and sys.stdout.isatty()),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
        )
        self.bar.set_description_str(self._count())

    def tick(self, job: Job, steps: int, at_work: Sequence[Job]) -> None:
        """A worker made that many gradient steps of `job`."""
        if not self.done:
            self.started = time.perf_counter()  # loading the libraries took long, and says nothing of the rest
        self._move(steps * job.responses_per_step, -steps * job.responses_per_step)
        names = [f"{other.key[1]}/{other.key[2]} {other.key[3]}" for other in at_work]
        more = f" +{len(names) - 3}" if len(names) > 3 else ""
        self.bar.set_postfix_str(f"{self._remaining()}: {', '.join(names[:3])}{more}", refresh=False)

    def finished(self, job: Job, steps: int, result: RunResult) -> None:
        """The run is in its file."""
        self._end(job, steps)
        parts = [_score(result), f"diverged ({result.diverged})" if result.diverged else "", f"{result.seconds:.0f} s"]
        line = f"{self._count()} {job.name}: {', '.join(filter(None, parts))}"
        if result.diverged and not self.bar.disable:
            self.bar.write(line)
        elif self.shown and self.bar.disable:
            print(line + (f"; {self._remaining()}" if self.left else ""), flush=True)

    def failed(self, job: Job, steps: int, reason: str) -> None:
        """The run will not be in its file."""
        self._end(job, steps)
        self._say(f"{self._count()} {job.name}: failed, {reason}")

    def again(self, job: Job, steps: int, reason: str) -> None:
        """The work on `job` was lost and is done once more."""
        self._move(0, steps * job.responses_per_step)
        self._say(f"{job.name}: {reason}; trying once more")

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def _end(self, job: Job, steps: int) -> None:
        self.ended += 1
        self._move(0, steps * job.responses_per_step - job.cost)  # what a run that ended early will not need
        if not self.left:
            self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description_str(self._count())

    def _move(self, done: int, left: int) -> None:
        self.done, self.left = self.done + done, self.left + left
        self.bar.total = self.done + self.left
        self.bar.update(done)

    def _count(self) -> str:
        return f"[{self.ended:{len(str(self.total))}}/{self.total}]"

    def _remaining(self) -> str:
        if not self.done:
            return "time left unknown"
        seconds = (time.perf_counter() - self.started) * self.left / self.done
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        minutes = round(seconds / 60)
        return f"about {minutes} min left" if minutes < 120 else f"about {minutes / 60:.1f} h left"

    def _say(self, line: str) -> None:
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)


def _score(result: RunResult) -> str:
    scores = result.metrics["score"]
    scores = scores[np.isfinite(scores)]
    return f"score {scores[0]:.2f} → {scores[-1]:.2f}" if len(scores) else ""
