"""`reasoning_gym`: any generator of the reasoning-gym package, with its own verifier."""

import hashlib
import importlib.util
import os
import re
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import Problem, encode_chat
from minirl_edu.tasks.verifiers import VerifierProcess

_EVALUATION_SEED = 2**31  # training seeds lie below, so the generators' own `seed + index` never meet
ANSWER_FORMS = ("tagged", "last_number")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")  # the minus of 8-3 is no sign
# These iterate over sets of strings (0.1.25), so their questions follow Python's hash seed as well as their own.
_HASH_ORDERED = {
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}


class ReasoningGymTask:
    """Problems from one generator of reasoning-gym, scored by the generator's own verifier in a process of its own
    (`VerifierProcess`).

    `dataset` names the generator, `config` holds its options (not `seed` or `size`). `answer` says what the verifier
    reads of a response, see `extract_answer`: small models seldom write tags, but name a number. `binary` rewards only
    a full score (>= 1) with 1; otherwise the reward is the verifier's score, some of which give a little for any
    answer. `time_limit` is in seconds per answer.

    The held-out problems are the first `evaluation_size` distinct questions of a seed that training never uses, and a
    training question that is among them is skipped. `Problem.data` is the generator's entry; it can be written as JSON.

    Raises ImportError without the package, ValueError for an unknown generator or option, and for a generator whose
    questions depend on Python's hash seed while that is not fixed.
    """

    name = "reasoning_gym"
    prompt_width: int | None = None

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        dataset: str,
        config: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        answer: str = "tagged",
        binary: bool = True,
        evaluation_size: int = 128,
        time_limit: float = 5.0,
        max_new_tokens: int = 512,
    ):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError('task "reasoning_gym" needs the reasoning-gym package: pip install "minirl-edu[tasks]"')
        from reasoning_gym.factory import DATASETS

        # `composite` would bring the verifiers of other generators past the guards in verifiers.py.
        if dataset not in DATASETS.keys() - {"composite"}:
            raise ValueError(f"dataset={dataset!r} is not a generator; there are {', '.join(sorted(DATASETS))}")
        if dataset in _HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(f"{dataset!r} draws by Python's hash seed too: start Python with PYTHONHASHSEED=0")
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.evaluation_size = evaluation_size
        self.system_prompt = system_prompt
        if answer not in ANSWER_FORMS:
            raise ValueError(f"answer={answer!r} must be one of {', '.join(ANSWER_FORMS)}")
        self.answer = answer
        self.binary = binary
        self._dataset = dataset
        self._config = dict(config or {})
        if reserved := self._config.keys() & {"seed", "size"}:
            raise ValueError(f"config of {dataset!r} sets {', '.join(sorted(reserved))}, which the task chooses itself")
        try:
            self._generator(seed=0, size=1)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"config={self._config} does not fit generator {dataset!r}: {error}") from error
        self.verifier = VerifierProcess("reasoning_gym_score", dataset, self._config, time_limit=time_limit)

    def sample(self, n: int, *, seed: int) -> list[Problem]:
        """`n` training problems; the same seed gives the same problems."""
        held_out = {problem.prompt for problem in self._held_out}
        start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest()) % (_EVALUATION_SEED - 2**20)
        problems = self._take(n, seed=start, exclude=held_out, distinct=False)
        if len(problems) < n:
            raise ValueError(
                f"{self._dataset}: too few questions beside the {len(held_out)} held out; lower evaluation_size"
            )
        return problems

    def evaluation(self, n: int) -> list[Problem]:
        """The first `n` held-out problems. Raises ValueError for more than `evaluation_size`."""
        if n > self.evaluation_size:
            raise ValueError(f"evaluation({n}): only evaluation_size={self.evaluation_size} problems are held out")
        return self._held_out[:n]

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids: the chat template if the tokenizer has one, else `[system_prompt]⏎question⏎`."""
        return encode_chat(self.tokenizer, problem.prompt, self.system_prompt)

    def reward(self, problem: Problem, response: str) -> float:
        """The verifier's score of the response's answer, in [0, 1]; 0.0 without an answer or if the verifier fails."""
        answer = extract_answer(response, self.answer)
        if not answer:
            return 0.0
        score = self.verifier(answer, problem.data)
        return float(score >= 1) if self.binary else min(max(score, 0.0), 1.0)

    @cached_property
    def _held_out(self) -> list[Problem]:
        problems = self._take(self.evaluation_size, seed=_EVALUATION_SEED, exclude=set(), distinct=True)
        if len(problems) < self.evaluation_size:
            raise ValueError(
                f"{self._dataset}: evaluation_size={self.evaluation_size} but only {len(problems)} distinct questions"
            )
        return problems

    def _take(self, n: int, *, seed: int, exclude: set[str], distinct: bool) -> list[Problem]:
        """Up to `n` problems whose questions are not excluded, among the first 20 n + 100 of a seed."""
        size = 20 * n + 100
        generator = self._generator(seed=seed, size=size)
        seen = set(exclude)
        problems: list[Problem] = []
        for index in range(size):
            if len(problems) == n:
                break
            entry = generator[index]
            if entry["question"] in seen:
                continue
            if distinct:
                seen.add(entry["question"])
            problems.append(Problem(entry["question"], str(entry["answer"] or ""), entry))
        return problems

    def _generator(self, *, seed: int, size: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self._dataset, **self._config, seed=seed, size=size)


def extract_answer(response: str, form: str = "tagged") -> str:
    """What a response answers, without surrounding blanks; "" if nothing.

    tagged: the text of its last `<answer>…</answer>`, or its last line if there is none. last_number: the last number
    in it, thousands separators removed.
    """
    if form == "last_number":
        numbers = _NUMBER.findall(response)
        return numbers[-1].replace(",", "") if numbers else ""
    tagged = _TAGGED.findall(response)
    if tagged:
        return tagged[-1].strip()
    return response.strip().rpartition("\n")[2].strip()
