"""Verifiers of untrusted answers, and the process they run in.

An answer comes from a model that is rewarded for whatever the verifier accepts, so it is data: it may make a symbolic
verifier run for ever or ask for all the memory, and it must never be executed. `VerifierProcess` therefore runs a
verifier in a process of its own, which a watchdog inside it ends at the time limit. No signals are involved, so it
works from any thread; nothing is forked, so it works beside CUDA; the caller's main module is not imported again, so
scripts need no `if __name__ == "__main__"`.

Cost: a plain Python process that imports only the verifier's library, started with the first answer and again after
every answer that overran (about 0.4 s for math-verify, 1 s for reasoning_gym), and under 0.1 ms of exchange per answer.

This file is also the process's program, which is why it imports nothing else of this package.
"""

import ast
import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

MEMORY_LIMIT = 4 * 2**30
"""Address space of a verifier's process in bytes, where the operating system can limit it."""


class VerifierProcess:
    """A verifier in a process of its own, called like the verifier itself.

    `factory` names a function that makes the verifier, with the given `arguments`: one in this file, or
    `FILE.py:FUNCTION`. It runs once per process, before the clock starts, and is the place for slow imports.
    `time_limit` is in seconds per call. `failures` counts the calls that scored 0.0 because the verifier raised,
    overran or died; the first one warns.

    The first call raises RuntimeError if the factory does.
    """

    def __init__(self, factory: str, *arguments: Any, time_limit: float):
        if not time_limit > 0:
            raise ValueError(f"time_limit={time_limit} must be a positive number of seconds")
        self.failures = 0
        self._setup = (factory, arguments, time_limit)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: Any) -> float:
        """The verifier's score of `arguments`; one call at a time, whatever the number of threads."""
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                reply = self._ask(arguments)
            except BaseException:  # interrupted half-way: the next call must not read this call's score
                self._stop()
                raise
            if reply is None:
                self._stop()
                reply = {"error": f"took longer than {self._setup[2]:g} s, or crashed"}
        if "error" in reply:
            self.failures += 1
            if self.failures == 1:
                message = f"verifier {self._setup[0]}: {reply['error']}; scored 0, later failures are only counted"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            return 0.0
        return float(reply["score"])

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        # -P: this folder holds a reasoning_gym.py, which must not hide the package of that name.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        ready = self._ask(self._setup) or {"error": "its process died"}
        if "error" in ready:
            raise RuntimeError(f"verifier {self._setup[0]} could not start: {ready['error']}")

    def _stop(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None

    def _ask(self, request: tuple) -> dict[str, Any] | None:
        """The reply to `request`, or None if the process died over it."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            # A Python literal, not JSON: reasoning_gym's verifiers tell tuples from lists.
            self._process.stdin.write(repr(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def math_equivalence() -> Callable[[str, str], float]:
    """A verifier of mathematical equality: math-verify on the response's `\\boxed{}` or else its last expression."""
    from math_verify import parse, verify

    def equivalence(response: str, answer: str) -> float:
        # The library's own time limits use SIGALRM; 0 turns them off.
        gold = parse(answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}", parsing_timeout=0)
        if not gold:
            raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
        return float(verify(gold, parse(response, parsing_timeout=0), timeout_seconds=0))

    return equivalence


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
        arguments = ast.literal_eval(request.decode())
        # The watchdog is a C thread: it ends the process even inside one long operation on big integers, and also
        # when the caller is gone.
        faulthandler.dump_traceback_later(time_limit, exit=True)
        try:
            message = {"score": float(verifier(*arguments))}
        except Exception as error:
            message = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        faulthandler.cancel_dump_traceback_later()
        reply(**message)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints must not be read as a reply
    _serve(sys.stdin.buffer, replies)
