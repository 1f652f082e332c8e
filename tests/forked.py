"""Python programs as processes of their own, forked from one that has the library loaded: 0.1 s instead of 7.

A test of how a program *starts* (its imports, its launcher) starts a new interpreter instead. Reports are without their
pictures, which take longer than a small run; tests/test_report.py draws them.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
LOADED = (
    *("minirl_edu.cli", "minirl_edu.trainer", "minirl_edu.report", "minirl_edu.plots", "scale.train"),
    *("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.qwen3.modeling_qwen3"),
    *("ipykernel.ipkernel", "ipykernel.kernelapp", "ipywidgets", "matplotlib.pyplot"),
    # What the process would import otherwise, because the tests' own main module is this one.
    "pytest",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(LOADED))


class Forked:
    """As much of `subprocess.Popen` as tests need, for `python PROGRAM ARGUMENTS`; both outputs go to one file.

    `program` is a file, or `-m NAME`. `limit`: bytes beyond which no file may grow, as if the disk were full.
    """

    stdin = stdout = stderr = None

    def __init__(
        self,
        program: str | Path,
        arguments: Sequence[object] = (),
        *,
        environment: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> None:
        descriptor, self._output = tempfile.mkstemp(prefix="minirl-forked-")
        os.close(descriptor)
        words = [str(program), *map(str, arguments)]
        self._process = _context.Process(
            target=_run, args=(words, dict(environment or os.environ), self._output, limit)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        while self.returncode is None and os.getpgid(self.pid) != self.pid:  # a signal to its group is for it alone
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("forked", timeout, self.output)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for it, and what it wrote."""
        self.wait(timeout)
        return self.output, None

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._output).read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """As `os.kill`, if it still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, and the server has collected it
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


_SEEN: dict[int, float] = {}
"""Processor time of the children of each server: a server that was lost has another after it, which counts from 0."""


def cpu_seconds() -> float:
    """Processor time of all processes that were forked here and have ended, in seconds."""
    pid: int = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    times = psutil.Process(pid).cpu_times()
    _SEEN[pid] = times.children_user + times.children_system
    return sum(_SEEN.values())


def _run(words: list[str], environment: dict[str, str], output: str, limit: int | None) -> None:
    from minirl_edu import plots

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    gc.freeze()  # what is loaded is no garbage, and 0.3 s to look through
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    plots.to_png = lambda figure, *, scale=2: b""
    sys.argv = words
    status = 1
    try:
        if words[0].startswith("-m "):
            runpy.run_module(words[0].removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))  # as `python PROGRAM` does
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # multiprocessing leaves them out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
