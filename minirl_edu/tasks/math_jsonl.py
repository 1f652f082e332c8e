"""`math_jsonl`: mathematics problems from a JSON file or a `datasets` name, answers checked by math-verify."""

import gzip
import importlib.util
import json
import random
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks import math_answers
from minirl_edu.tasks.base import Problem, check_chat, encode_chat, held_out
from minirl_edu.tasks.verifiers import VerifierPool

BAD_ROWS = ("refuse", "skip")
_SIMPLE_ANSWER = re.compile(r"-?\d+(\.\d+)?")
_READ_HERE = re.compile(r"\.(jsonl|json)(\.gz)?\Z", re.IGNORECASE)


class BadRow(ValueError):
    """A row that cannot be used; the message names the file, the line and what is wrong."""


class MathTask:
    """Problems with a mathematical answer, to which a response's `\\boxed{}` or else its last expression must be equal.

    `path` is a file, `.jsonl` (one object per line) or `.json` (a list of objects), or the same gzipped, or a folder or
    name that `datasets.load_dataset` knows, of which `split` is used. Every row has a text `problem_field` and an
    `answer_field`, a text or a number. Problems that occur in `eval_path` (and `eval_split`) are held out, also from
    training; without it, a share `eval_fraction` is held out by a hash of the problem's text, the same in every run.

    A row that cannot be used, and one whose answer the verifier cannot read or finds different from itself, is refused
    with its file and line. With `bad_rows="skip"` it is left out, a warning says how many were, and `skipped` counts
    them.

    `math_answers` says which answer a response gives; with `require_box` only a `\\boxed{}` counts. The verifier runs
    in processes of its own (`VerifierPool`), with `time_limit` seconds per answer: an answer that makes it hang or
    raise earns 0, the first warns, and `verifier.failures` counts. `verifier="FILE.py:FUNCTION"` replaces it;
    references are not checked then. `system_prompt` and `chat_template_args` (such as `enable_thinking: false`) go to
    the model's chat template.

    Raises ImportError without the packages, and ValueError for options that do not fit.
    """

    name = "math_jsonl"
    prompt_width: int | None = None

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        split: str = "train",
        eval_path: str | None = None,
        eval_split: str = "test",
        eval_fraction: float = 0.1,
        problem_field: str = "problem",
        answer_field: str = "answer",
        bad_rows: str = "refuse",
        require_box: bool = False,
        system_prompt: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        time_limit: float = 5.0,
        verifier: str = "math_equivalence",
        max_new_tokens: int = 1024,
    ):
        own = verifier == "math_equivalence"
        if own and importlib.util.find_spec("math_verify") is None:
            raise ImportError('task "math_jsonl" needs the math-verify package: pip install "minirl-edu[tasks]"')
        if eval_path is None and not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction={eval_fraction} must lie between 0 and 1")
        if bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows={bad_rows!r} must be one of {', '.join(BAD_ROWS)}")
        if require_box and not own:
            raise ValueError(f"require_box is an option of the task's own verifier, not of verifier={verifier!r}")
        self._opening = check_chat(tokenizer, system_prompt, chat_template_args)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.system_prompt = system_prompt
        self.chat_template_args = dict(chat_template_args or {})
        here = math_answers.__file__
        if own:
            self.verifier = VerifierPool(f"{here}:math_equivalence", require_box, time_limit=time_limit)
        else:
            self.verifier = VerifierPool(verifier, time_limit=time_limit)
        check = VerifierPool(f"{here}:math_reference", time_limit=time_limit) if own else None
        self.skipped = 0

        def load(source: str, split: str) -> dict[str, Problem]:
            problems, bad = _load(source, split, problem_field, answer_field, check)
            if bad and bad_rows == "refuse":
                more = f" (and {len(bad) - 1} more such rows; bad_rows: skip leaves them out)" if len(bad) > 1 else ""
                raise BadRow(f"{bad[0]}{more}")
            if bad:
                self.skipped += len(bad)
                warnings.warn(f"{source}: {len(bad)} rows skipped, the first {bad[0]}", stacklevel=3)
            return problems

        problems = load(path, split)
        if eval_path is None:
            self._held_out = {text: p for text, p in problems.items() if held_out(text, eval_fraction)}
        else:
            self._held_out = load(eval_path, eval_split)
            if shared := len(problems.keys() & self._held_out.keys()):
                warnings.warn(f"{shared} problems of {path} are also in {eval_path}; training skips them", stacklevel=2)
        self._training = [problem for text, problem in problems.items() if text not in self._held_out]
        if not self._training or not self._held_out:
            raise ValueError(
                f"{path}: {len(self._training)} training and {len(self._held_out)} held-out problems; both are needed"
            )
        if check is not None:
            check.close()

    def sample(self, n: int, *, seed: int) -> list[Problem]:
        """`n` training problems, without repetition while there are enough; the same seed gives the same problems."""
        rng = random.Random(seed)
        if n > len(self._training):
            return rng.choices(self._training, k=n)
        return rng.sample(self._training, n)

    def evaluation(self, n: int) -> list[Problem]:
        """The first `n` held-out problems in the file's order. Raises ValueError if there are fewer."""
        if n > len(self._held_out):
            raise ValueError(f"evaluation({n}): only {len(self._held_out)} problems are held out")
        return list(self._held_out.values())[:n]

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids: the chat template if the tokenizer has one, else `[system_prompt]⏎problem⏎`."""
        return encode_chat(self.tokenizer, problem.prompt, self.system_prompt, self.chat_template_args)

    def begin(self, problem: Problem, response: str) -> None:
        """Start verifying the response."""
        self.verifier.begin(self._opening + response, problem.answer)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the verifier accepts the response, else 0.0."""
        return self.rewards([problem], [response])[0]

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """`reward` of each problem and response, verified side by side."""
        replies = [
            self.verifier.submit(self._opening + response, problem.answer)
            for problem, response in zip(problems, responses, strict=True)
        ]
        return [float(score >= 1) for score in self.verifier.collect(replies)]


def _load(
    path: str, split: str, problem_field: str, answer_field: str, check: VerifierPool | None
) -> tuple[dict[str, Problem], list[BadRow]]:
    """Problems by their text, in order (of several rows with the same text the first counts), and the bad rows."""
    problems: dict[str, Problem] = {}
    bad: list[BadRow] = []
    for place, row in _rows(path, split):
        try:
            text, answer = _problem_and_answer(place, row, problem_field, answer_field)
        except BadRow as error:
            bad.append(error)
        else:
            problems.setdefault(text, Problem(text, answer, {"source": place}))
    if check is not None:
        unusual = {p.answer for p in problems.values() if not _SIMPLE_ANSWER.fullmatch(p.answer)}
        replies = {answer: check.submit(answer) for answer in unusual}
        for text, problem in list(problems.items()):
            reply = replies[problem.answer].result() if problem.answer in replies else {"score": 1.0}
            if reply.get("score") != 1.0:
                del problems[text]
                why = reply.get("error", "the verifier cannot read it, or finds it different from itself")
                bad.append(BadRow(f"{problem.data['source']}: {answer_field!r} = {problem.answer!r}: {why}"))
    return problems, bad


def _problem_and_answer(place: str, row: Any, problem_field: str, answer_field: str) -> tuple[str, str]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{place}: expected an object, found {type(row).__name__}")
    for field in (problem_field, answer_field):
        if field not in row:
            raise BadRow(f"{place}: no field {field!r}; the row has {', '.join(map(str, row)) or 'none'}")
    text, answer = row[problem_field], row[answer_field]
    if type(answer) is int or (type(answer) is float and abs(answer) < float("inf")):
        answer = str(int(answer)) if answer == int(answer) and abs(answer) < 1e15 else repr(answer)
    for field, value in ((problem_field, text), (answer_field, answer)):
        if not isinstance(value, str) or not value.strip():
            kind = "a text that is not empty" if field == problem_field else "a number, or a text that is not empty"
            raise BadRow(f"{place}: {field!r} must be {kind}, found {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{place}: {field!r} is no text that can be encoded ({error})") from error
    return text, str(answer)


def _rows(path: str, split: str) -> Iterator[tuple[str, Any]]:
    """Each row of a file or data set and its place, or a `BadRow` instead of the row."""
    kind = _READ_HERE.search(path)
    if kind is None and Path(path).is_file():
        raise ValueError(
            f"{path}: files are read as .jsonl (one object per line), .json (a list of objects), or these with .gz; "
            "write the rows so, or name a folder that the datasets package knows"
        )
    if kind is None:
        yield from _dataset_rows(path, split)
        return
    try:
        with (gzip.open if kind[2] else open)(path, "rb") as file:
            if kind[1].lower() == "json":
                yield from _list_rows(path, file.read())
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", _parsed(f"{path}:{number}: not a line of JSON", line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _list_rows(path: str, content: bytes) -> Iterator[tuple[str, Any]]:
    rows = _parsed(f"{path}: not JSON", content)
    if isinstance(rows, BadRow):
        raise BadRow(f"{rows}; a file with one object per line is called .jsonl")
    if not isinstance(rows, list):
        raise BadRow(f"{path}: expected a list of objects, found {type(rows).__name__}")
    yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))


def _parsed(complaint: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deeply
        return BadRow(f"{complaint} ({error})")


def _dataset_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f'path={name!r} needs the datasets package: pip install "minirl-edu[tasks]" (or a .jsonl file)'
        )
    from datasets import load_dataset

    for index, row in enumerate(load_dataset(name, split=split)):
        yield f"{name}[{split}] row {index}", row
