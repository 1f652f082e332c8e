"""Verifiers of untrusted answers, and the process they run in.

An answer comes from a model that is rewarded for whatever the verifier accepts, so it is data: it may make a symbolic
verifier run for ever or ask for all the memory, and it must never be executed. `VerifierPool` therefore runs a verifier
in processes of its own, each with a watchdog inside it that ends it at the time limit, so that one slow answer holds up
no other. No signals are involved, so it works from any thread; nothing is forked, so it works beside CUDA; the caller's
main module is not imported again, so scripts need no `if __name__ == "__main__"`. (Python's own pools, and loky and
pebble on top of them, fork or import it again, or have no time limit for each answer.)

Cost: plain Python processes that import only the verifier's library, started as answers come and again after every
answer that overran (about 0.4 s for math-verify, 1 s for reasoning_gym), and under 0.1 ms of exchange per answer.

This file is also the processes' program, which is why it imports nothing else of this package.
"""

import ast
import faulthandler
import json
import math
import os
import queue
import runpy
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

MEMORY_LIMIT = 4 * 2**30
"""Address space of a verifier's process in bytes, where the operating system can limit it."""


class VerifierPool:
    """A verifier in processes of its own, which score several answers at once.

    `factory` names a function that makes the verifier, with the given `arguments`: one in this file, or
    `FILE.py:FUNCTION`. It runs once per process, before the clock starts, and is the place for slow imports.
    `time_limit` is in seconds per answer, of wall-clock time. `size` is the largest number of processes, by default one
    per CPU and at most 16; they start as answers come. What is sent to them must be plain data (`plain_data`).

    `failures` counts the answers that scored 0.0 because the verifier raised, overran or died, and `restarts` those
    among them that ended their process; the first failure warns.

    The first answer raises RuntimeError if the factory does.
    """

    def __init__(self, factory: str, *arguments: Any, time_limit: float, size: int | None = None):
        if not time_limit > 0:
            raise ValueError(f"time_limit={time_limit} must be a positive number of seconds")
        self.failures = self.restarts = 0
        self._factory = factory
        processes = [_Process(factory, arguments, time_limit) for _ in range(size or min(_cpus(), 16))]
        self._threads = ThreadPoolExecutor(len(processes), thread_name_prefix="verifier")
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()  # the last one used is the first to be used again
        for process in processes:
            self._idle.put(process)
        self._begun: dict[str, list[Future[Reply]]] = {}

    def begin(self, *arguments: Any) -> None:
        """Have `arguments` scored ahead: the next `submit` of them finds it under way, or done."""
        self._begun.setdefault(repr(arguments), []).append(self._threads.submit(self._ask, arguments))

    def submit(self, *arguments: Any) -> "Future[Reply]":
        """Have `arguments` scored as soon as a process is free; `collect` turns the reply into a score."""
        begun = self._begun.get(repr(arguments))
        return begun.pop(0) if begun else self._threads.submit(self._ask, arguments)

    def collect(self, replies: "Sequence[Future[Reply]]") -> list[float]:
        """The scores of submitted answers, in the order of `replies`, when all are there; counts the failures.

        What was begun, but not submitted by now, is given up.
        """
        scores = []
        for future in (future for begun in self._begun.values() for future in begun):
            future.cancel()
        self._begun.clear()
        try:
            for future in replies:
                reply = future.result()
                if "error" in reply:
                    self.failures += 1
                    self.restarts += bool(reply.get("ended"))
                    if self.failures == 1:
                        message = (
                            f"verifier {self._factory}: {reply['error']}; scored 0, later failures are only counted"
                        )
                        warnings.warn(message, RuntimeWarning, stacklevel=3)
                scores.append(float(reply.get("score", 0.0)))
        except BaseException:
            for future in replies:
                future.cancel()
            raise
        return scores

    def __call__(self, *arguments: Any) -> float:
        """The verifier's score of one answer."""
        return self.collect([self.submit(*arguments)])[0]

    def close(self) -> None:
        """End the processes that score nothing at the moment; a later answer starts them again."""
        with suppress(queue.Empty):
            idle = []
            while True:
                idle.append(self._idle.get_nowait())
                idle[-1].stop()
        for process in idle:
            self._idle.put(process)

    def _ask(self, arguments: tuple) -> "Reply":
        process = self._idle.get()
        try:
            return process.ask(arguments)
        finally:
            self._idle.put(process)


def plain_data(value: Any, name: str) -> Any:
    """`value` as plain data (what `ast.literal_eval` reads of its `repr`), NumPy's numbers and strings made Python's.

    Raises ValueError for anything else, naming it with `name` in front.
    """
    if isinstance(value, dict):
        return {plain_data(key, f"{name}, a key"): plain_data(each, f"{name}[{key!r}]") for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain_data(each, f"{name}[{i}]") for i, each in enumerate(value))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or type(value) in (str, bytes, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(f"{name} is {value!r} ({type(value).__name__}), which cannot be sent to a verifier's process")


Reply = dict[str, Any]
"""What a verifier's process says of an answer: {"score": …}, or {"error": …}, with "ended" if the process is gone."""


class _Process:
    """One process with a verifier in it, started with the first answer and again after one that ended it."""

    def __init__(self, factory: str, arguments: tuple, time_limit: float):
        self._setup = (factory, arguments, time_limit)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, arguments: tuple) -> Reply:
        try:
            if self._process is not None and self._process.poll() is not None:
                self.stop()  # killed from outside, which is not this answer's fault
            if self._process is None:
                self._start()
            reply = self._exchange(arguments)
        except BaseException:  # interrupted half-way: the next answer must not get this one's score
            self.stop()
            raise
        if reply is None:
            self.stop()
            return {"error": f"took longer than {self._setup[2]:g} s, or crashed", "ended": True}
        return reply

    def stop(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None

    def _start(self) -> None:
        # -P: this folder holds a reasoning_gym.py, which must not hide the package of that name.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        ready = self._exchange(self._setup) or {"error": "its process died"}
        if "error" in ready:
            raise RuntimeError(f"verifier {self._setup[0]} could not start: {ready['error']}")

    def _exchange(self, request: tuple) -> Reply | None:
        """The reply to `request`, or None if the process died over it."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            # A Python literal, not JSON: reasoning_gym's verifiers tell tuples from lists.
            self._process.stdin.write(repr(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Verifiers of reasoning_gym (0.1.25) that pass the answer to eval(), to look for a Python list, or to sympy's
# parse_expr(), which is eval() too.
_EVALUATE_LISTS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
_EVALUATE_FORMULAS = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
_FORMULA_NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load)
_FORMULA_FUNCTIONS = {"exp", "log", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"}


def reasoning_gym_score(dataset: str, config: dict[str, Any]) -> Callable[[str, dict], float]:
    """The verifier of a reasoning_gym generator. Nine of them evaluate the answer as Python code; here it stays data.

    Lists are read with `ast.literal_eval`, and a formula with anything but numbers, names, operators and elementary
    functions scores like an empty answer.
    """
    import reasoning_gym

    generator = reasoning_gym.create_dataset(dataset, **config)
    if dataset in _EVALUATE_LISTS:
        vars(sys.modules[type(generator).__module__])["eval"] = ast.literal_eval  # hides the builtin in that module

    def score(answer: str, entry: dict) -> float:
        if dataset in _EVALUATE_FORMULAS and not is_formula(answer):
            answer = ""
        return float(generator.score_answer(answer, entry))

    return score


def is_formula(text: str) -> bool:
    """Whether `text` is a Python expression of numbers, names, operators and elementary functions: safe to evaluate."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _FORMULA_FUNCTIONS or node.keywords:
                return False
        elif isinstance(node, ast.Constant):
            if type(node.value) not in (int, float):
                return False
        elif not isinstance(node, _FORMULA_NODES):
            return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """The process's loop: the first request sets it up, each later one is scored, until the pipe closes."""

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        factory, arguments, time_limit = ast.literal_eval(requests.readline().decode())
        file, _, name = factory.rpartition(":")
        verifier = (runpy.run_path(file) if file else globals())[name](*arguments)
        with suppress(ImportError, ValueError, OSError):  # Windows has no limit; macOS may refuse one
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    for request in requests:
        # The watchdog is a C thread: it ends the process even inside one long operation on big integers, and also
        # when the caller is gone.
        faulthandler.dump_traceback_later(time_limit, exit=True)
        try:
            message = {"score": float(verifier(*ast.literal_eval(request.decode())))}
        except Exception as error:
            message = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        faulthandler.cancel_dump_traceback_later()
        reply(**message)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints must not be read as a reply
    _serve(sys.stdin.buffer, replies)
