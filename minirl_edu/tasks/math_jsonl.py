"""`math_jsonl`: mathematics problems from a JSONL file or a `datasets` name, answers checked by math-verify."""

import importlib.util
import json
import random
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import Problem, encode_chat, held_out
from minirl_edu.tasks.verifiers import VerifierProcess


class MathTask:
    """Problems with a mathematical answer, to which a response's `\\boxed{}` or else its last expression must be equal.

    `path` is a `.jsonl` file (one object per line), or a folder or name that `datasets.load_dataset` knows, of which
    `split` is used. Every row has the text fields `problem_field` and `answer_field`. Problems that occur in
    `eval_path` (and `eval_split`) are held out, also from training; without it, a share `eval_fraction` is held out by
    a hash of the problem's text, the same in every run.

    The verifier runs in a process of its own, with `time_limit` seconds per answer: an answer that makes it hang or
    raise earns 0, the first warns, and `verifier.failures` counts. `verifier="FILE.py:FUNCTION"` replaces it; see
    `VerifierProcess`.

    Raises ImportError without the packages, and ValueError for an unusable row, naming the file, the line and what is
    wrong with it.
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
        system_prompt: str | None = None,
        time_limit: float = 5.0,
        verifier: str = "math_equivalence",
        max_new_tokens: int = 1024,
    ):
        if verifier == "math_equivalence" and importlib.util.find_spec("math_verify") is None:
            raise ImportError('task "math_jsonl" needs the math-verify package: pip install "minirl-edu[tasks]"')
        if eval_path is None and not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction={eval_fraction} must lie between 0 and 1")
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.system_prompt = system_prompt
        self.verifier = VerifierProcess(verifier, time_limit=time_limit)
        problems = _load(path, split, problem_field, answer_field)
        if eval_path is None:
            self._held_out = {text: p for text, p in problems.items() if held_out(text, eval_fraction)}
        else:
            self._held_out = _load(eval_path, eval_split, problem_field, answer_field)
            if shared := len(problems.keys() & self._held_out.keys()):
                warnings.warn(f"{shared} problems of {path} are also in {eval_path}; training skips them", stacklevel=2)
        self._training = [problem for text, problem in problems.items() if text not in self._held_out]
        if not self._training or not self._held_out:
            raise ValueError(
                f"{path}: {len(self._training)} training and {len(self._held_out)} held-out problems; both are needed"
            )

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
        return encode_chat(self.tokenizer, problem.prompt, self.system_prompt)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the verifier accepts the response, else 0.0."""
        return float(self.verifier(response, problem.answer) >= 1)


def _load(path: str, split: str, problem_field: str, answer_field: str) -> dict[str, Problem]:
    """Problems by their text, in order; of several rows with the same text the first counts."""
    problems: dict[str, Problem] = {}
    for place, row in _jsonl_rows(path) if path.endswith(".jsonl") else _dataset_rows(path, split):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
        for field in (problem_field, answer_field):
            if field not in row:
                raise ValueError(f"{place}: no field {field!r}; the row has {', '.join(map(str, row)) or 'none'}")
            if not isinstance(row[field], str) or not row[field].strip():
                raise ValueError(f"{place}: {field!r} must be a text that is not empty, found {row[field]!r}")
        text = row[problem_field]
        problems.setdefault(text, Problem(text, row[answer_field], {"source": place}))
    return problems


def _jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error


def _dataset_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f'path={name!r} needs the datasets package: pip install "minirl-edu[tasks]" (or a .jsonl file)'
        )
    from datasets import load_dataset

    for index, row in enumerate(load_dataset(name, split=split)):
        yield f"{name}[{split}] row {index}", row
