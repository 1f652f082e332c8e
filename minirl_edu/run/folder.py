"""The folder of a run: who may write to it, what resumes in it, the lines of its metrics, and a stop by a signal.

The operating system holds the lock (`flock`) and takes it back when the process ends, however it ends: a folder whose
process was killed is free at once. Where there is no such lock (Windows, some network file systems) nothing is locked.
"""

import json
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from minirl_edu.config import Config, ConfigError, load_config, save_config
from minirl_edu.doctor import environment

LOCK_FILE = ".lock"
"""What is locked: a file in the folder, which says by whom."""


class FolderInUse(FileExistsError):
    """Another process is at work in the folder; the message names it."""


class FolderLock:
    """A locked folder, until `close()`, the end of a `with` block, or the end of the process."""

    def __init__(self, file: Path, descriptor: int | None, made: bool) -> None:
        self.close = weakref.finalize(self, _release, file, descriptor, made, os.getpid())

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_held: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


def lock_folder(folder: str | Path) -> FolderLock:
    """Lock `folder`, which is made if it does not exist; if nothing was put into it, `close()` removes it again.

    No child process keeps the lock, whether it was forked or started. Within one process the latest caller has it: a
    trainer that is built anew in a notebook takes over from the one before.

    Raises FolderInUse naming process, host and time, OSError for a folder that cannot be made or written.
    """
    folder = Path(folder).resolve()
    file, made = folder / LOCK_FILE, not folder.exists()
    if (before := _held.pop(file, None)) is not None:
        before.close()
    lock = FolderLock(file, _locked(file), made)
    _held[file] = lock
    return lock


def _locked(file: Path) -> int | None:
    """A descriptor of the file, with the lock, which no program that we start gets; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        file.parent.mkdir(parents=True, exist_ok=True)
        return None
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # A link could lead to a file of someone else's, which would be overwritten.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except (FileNotFoundError, FileExistsError):
            if file.parent.exists() and not file.parent.is_dir():
                raise
            continue  # the folder was just removed, by the process that had made it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise FolderInUse(
                f"{file.parent}: in use by {holder}; wait until it has ended, or choose another folder"
            ) from None
        except OSError:  # a network file system without locks
            os.close(descriptor)
            file.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # of a file that its last holder has removed meanwhile
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
    with suppress(OSError):  # a full disk; only the message needs it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode() + b"\n", 0)
    return descriptor


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just begun
        return "another process"


def _release(file: Path, descriptor: int | None, made: bool, pid: int) -> None:
    """Free the folder; a forked child only lets go of its copy of the descriptor."""
    with suppress(OSError):
        if os.getpid() == pid and descriptor is not None:
            file.unlink()
        if os.getpid() == pid and made:
            file.parent.rmdir()
    if descriptor is not None:
        os.close(descriptor)


def _let_go() -> None:
    for lock in list(_held.values()):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# ------------------------------------------------------------------------------------------------------ a run's folder


class RunFolder:
    """The folder of one run: config.yaml, environment.json, metrics.jsonl, samples.jsonl and checkpoints/.

    The main process writes; in the others every method does nothing. `accelerator` has the trackers that also get the
    metrics (`output.trackers`).
    """

    def __init__(self, path: Path, config: Config, accelerator: Accelerator) -> None:
        self.path, self.config = path, config
        self.metrics, self.samples, self.checkpoints = (
            path / name for name in ("metrics.jsonl", "samples.jsonl", "checkpoints")
        )
        self._accelerator, self._is_main = accelerator, accelerator.is_main_process
        self._lock: FolderLock | None = None

    def open(self, *, resume: bool) -> None:
        """Lock the folder.

        Raises FileExistsError if it holds a run and `resume` is False, ConfigError if it holds another run than this,
        FolderInUse if another process writes to it.
        """
        if not self._is_main:
            return
        self._lock = lock_folder(self.path)
        saved = self.path / "config.yaml"
        if self.metrics.exists() or saved.exists():
            if not resume:
                raise FileExistsError(f"{self.path} already holds a run: go on with --resume, or choose another --out")
            check_resume(load_config(saved), self.config)

    def start(self, step: int) -> None:
        """Write what describes the run, and drop the lines of global steps after `step`, which are made again."""
        if not self._is_main:
            return
        for path in (self.metrics, self.samples):
            if path.exists():
                _cut_back(path, step or -1)  # without a checkpoint the run begins again, with an evaluation
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.path / "config.yaml")
        text = json.dumps(environment(), indent=2) + "\n"
        (self.path / "environment.json").write_text(text, encoding="utf-8")
        if self.config.output.trackers:
            self._accelerator.init_trackers("minirl", config=_flat(self.config.to_dict()))

    def write(self, lines: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
        """Append metrics, and the `samples` of an evaluation if the last line has its score."""
        if not self._is_main:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if lines and "score" in lines[-1]:
            evaluated = {key: lines[-1][key] for key in ("global_step", "grad_step")} | {"samples": samples}
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(json.dumps(evaluated) + "\n")
        if self.config.output.trackers:
            for line in lines:
                numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
                self._accelerator.log(numbers, step=line["grad_step"])

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in getattr(self._accelerator, "trackers", ()):
            tracker.finish()

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()


LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""The schedules whose learning rate at a step does not depend on how many steps the run has."""


def check_resume(saved: Config, config: Config) -> None:
    """Refuse to resume under other settings: the result would be neither run. The output may change, and the length
    where the learning rate does not depend on it.

    Raises ConfigError naming the settings.
    """
    old, new = (_flat(c.to_dict()) for c in (saved, config))
    steps, schedule = config.train.global_steps, saved.train.lr_schedule
    if steps != saved.train.global_steps and schedule not in LENGTHLESS:
        raise ConfigError(
            f"train.global_steps = {steps} (was {saved.train.global_steps}): under train.lr_schedule {schedule!r} the "
            f"learning rate of the steps already made belongs to the old length; resume with {saved.train.global_steps}"
            f", or start the longer run in another --out (the schedules {', '.join(LENGTHLESS)} can be resumed for "
            "longer)"
        )
    free = {"train.global_steps", "model.expert_parallel"}  # and what says how, not what
    free |= {name for name in old if name.startswith(("output.", "ranks."))}
    if config.rollout.engine == "vllm_server":
        free.add("rollout.options")  # where the server is, and how weights get there
    changed = [f"{k} = {new[k]!r} (was {old[k]!r})" for k in old if k not in free and old[k] != new.get(k)]
    if changed:
        raise ConfigError(
            f"a resumed run keeps its settings, but {', '.join(changed)}; use another --out for a new run"
        )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and key not in ("options", "overrides"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _cut_back(path: Path, step: int) -> None:
    """Drop the lines of global steps after `step`, and the last line of a killed run if it is cut short."""
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if not line.endswith("\n") or json.loads(line)["global_step"] > step:
            break
        kept.append(line)
    if len(kept) == len(lines):
        return
    if not kept:
        path.unlink()
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------- stop by a signal


@contextmanager
def stop_request(*, speak: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, with a word about it if `speak`; the second acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        stop.set()
        restore()
        if speak:
            tqdm.write("stopping: this global step is finished and saved first (again to stop at once)")

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
