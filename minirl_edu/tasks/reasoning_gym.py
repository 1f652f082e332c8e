"""`reasoning_gym`: any generator of the reasoning-gym package, with its own verifier."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import Problem, check_chat, encode_chat
from minirl_edu.tasks.math_answers import after_thinking
from minirl_edu.tasks.verifiers import VerifierPool, plain_data

_EVALUATION_SEED = 2**31  # training seeds lie below, so the generators' own `seed + index` never meet
ANSWER_FORMS = ("tagged", "last_number")
# As a person reads it: a minus before a number or its currency is a sign, but not that of 8-3; the commas and narrow
# blanks of 1,234,567 separate thousands; a full stop or a percent sign behind it is no part of it.
_NUMBER = re.compile(
    r"((?<![\w)])[-−–](?=[$€£]?\.?[0-9]))?[$€£]?"
    r"((?:[0-9]{1,3}(?:[,\xa0\u2009\u202f][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:[eE]([-+−]?[0-9]{1,3})(?![0-9]))?"
)
# These iterate over sets of strings (0.1.25), so their questions follow Python's hash seed as well as their own.
_HASH_ORDERED = {
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}


REFUSED = {
    "boxnet": "its entries hold no answer that its verifier could be tried on",
    "coin_flip": 'its verifier gives 1.0 to "0" for every probability below 1',
    "composite": "it brings the verifiers of other generators past the guards of ours",
    "game_of_life_halting": 'its verifier gives 1.0 to any text, "banana" too',
    "intermediate_integration": "the answer of one problem in seven is an unsolved Integral(x**2*cos(x), x)",
    "rush_hour": "its entries hold no answer that its verifier could be tried on",
}
"""Generators of reasoning-gym (0.1.25) that cannot be trained on, and why. A test tries all of them: their own answers
must be rewarded in full, and nonsense must not."""


class ReasoningGymTask:
    """Problems from one generator of reasoning-gym, scored by the generator's own verifier in processes of its own
    (`VerifierPool`).

    `dataset` names the generator, `config` holds its options (not `seed` or `size`). `answer` says what the verifier
    reads of a response, see `extract_answer`: small models seldom write tags, but name a number. `binary` rewards only
    a full score (>= 1) with 1; otherwise the reward is the verifier's score, some of which give a little for any
    answer. `time_limit` is in seconds per answer. `system_prompt` and `chat_template_args` (such as `enable_thinking:
    false`) go to the model's chat template.

    The held-out problems are the first `evaluation_size` distinct questions of a seed that training never uses, and a
    training question that is among them is skipped. `Problem.data` is the generator's entry; it can be written as JSON.

    Raises ImportError without the package, ValueError for an unknown generator or option, for a generator that is
    `REFUSED`, and for one whose questions depend on Python's hash seed while that is not fixed.
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
        chat_template_args: dict[str, Any] | None = None,
        answer: str = "tagged",
        binary: bool = True,
        evaluation_size: int = 128,
        time_limit: float = 5.0,
        max_new_tokens: int = 512,
    ):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError('task "reasoning_gym" needs the reasoning-gym package: pip install "minirl-edu[tasks]"')
        from reasoning_gym.factory import DATASETS

        if dataset not in DATASETS:
            usable = ", ".join(sorted(DATASETS.keys() - REFUSED.keys()))
            raise ValueError(f"dataset={dataset!r} is not a generator; there are {usable}")
        if dataset in REFUSED:
            raise ValueError(f"dataset={dataset!r} cannot be trained on: {REFUSED[dataset]}")
        if dataset in _HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(f"{dataset!r} draws by Python's hash seed too: start Python with PYTHONHASHSEED=0")
        self._opening = check_chat(tokenizer, system_prompt, chat_template_args)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.evaluation_size = evaluation_size
        self.system_prompt = system_prompt
        self.chat_template_args = dict(chat_template_args or {})
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
        self.verifier = VerifierPool("reasoning_gym_score", dataset, self._config, time_limit=time_limit)

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
        return encode_chat(self.tokenizer, problem.prompt, self.system_prompt, self.chat_template_args)

    def begin(self, problem: Problem, response: str) -> None:
        """Start verifying the response."""
        if answer := extract_answer(self._opening + response, self.answer):
            self.verifier.begin(answer, problem.data)

    def reward(self, problem: Problem, response: str) -> float:
        """The verifier's score of the response's answer, in [0, 1]; 0.0 without an answer or if the verifier fails."""
        return self.rewards([problem], [response])[0]

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """`reward` of each problem and response, verified side by side."""
        answers = [extract_answer(self._opening + response, self.answer) for response in responses]
        replies = [
            self.verifier.submit(answer, problem.data)
            for problem, answer in zip(problems, answers, strict=True)
            if answer
        ]
        scores = iter(self.verifier.collect(replies))
        return [self._reward(next(scores)) if answer else 0.0 for answer in answers]

    def _reward(self, score: float) -> float:
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
            entry = plain_data(generator[index], f"entry {index} of generator {self._dataset!r} with seed {seed}")
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
    """What a response answers, without surrounding blanks; "" if nothing. What follows `</think>` is read.

    tagged: the text of its last `<answer>…</answer>`, or its last line if there is none. last_number: the last number
    in it as plain digits (`−1,234.50` is -1234.50, `.5` is 0.5, `1.5e-3` is 0.0015, `50%` is 50).
    """
    response = after_thinking(response)
    if form == "last_number":
        numbers = _NUMBER.findall(response)
        return _plain_digits(*numbers[-1]) if numbers else ""
    head, closed, _ = response.rpartition("</answer>")
    _, opened, answer = head.rpartition("<answer>")  # not by a regex: twenty thousand open tags take it 16 s
    if opened and closed:
        return answer.partition("</answer>")[0].strip()
    return response.strip().rpartition("\n")[2].strip()


def _plain_digits(sign: str, digits: str, exponent: str) -> str:
    digits = re.sub(r"[^0-9.]", "", digits)
    if exponent:
        digits = format(Decimal(f"{digits}e{exponent.replace('−', '-')}"), "f")
    return ("-" if sign else "") + ("0" if digits.startswith(".") else "") + digits
