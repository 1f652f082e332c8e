"""What a task is: problems, how they are shown to a model, and a reward that can be verified."""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """One problem: the `prompt` a user would see, the reference `answer`, and plain metadata.

    The answer is empty where only a verifier knows what is right.
    """

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Problems with a verifiable reward.

    `max_new_tokens` is the default limit of a response, EOS included. `prompt_width` is the length in tokens of every
    prompt, or None where lengths differ (engines then pad on the left to the longest in the batch). What the methods
    return depends on their arguments alone, so a resumed run needs no state from here.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    prompt_width: int | None

    def sample(self, n: int, *, seed: int) -> list[Problem]:
        """`n` training problems; the same seed gives the same problems."""
        ...

    def evaluation(self, n: int) -> list[Problem]:
        """The first `n` of a fixed list of held-out problems, none of which `sample` can ever return."""
        ...

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids, unpadded, ready for a response to follow."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """The response's reward, in [0, 1]; `response` was decoded without special tokens."""
        ...


@runtime_checkable
class Demonstrable(Task, Protocol):
    """A task that can also write worked responses, right or with a teacher's errors, to fine-tune a cold start on."""

    def demonstration(
        self, problem: Problem, *, rng: random.Random, style: str | None = None, error_rate: float = 0.0
    ) -> str:
        """A response without EOS, in one of the task's styles, each step wrong with probability `error_rate`."""
        ...


@runtime_checkable
class BatchVerified(Task, Protocol):
    """A task that verifies many responses at once, faster than one after the other."""

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """What `reward` says of each problem and its response, in their order."""
        ...


@runtime_checkable
class VerifiedAhead(Task, Protocol):
    """A task that can verify a response while others are still being sampled, in processes of its own."""

    def begin(self, problem: Problem, response: str) -> None:
        """Start verifying the response. Its reward is asked for later, and is what it would be without this."""
        ...


@runtime_checkable
class Episodic(Task, Protocol):
    """A task whose environment has a say while a response is written, such as a game, or a tool that answers."""

    def respond(self, problem: Problem, response: Sequence[int]) -> Sequence[int] | None:
        """Asked after each token that the policy wrote, with the response so far (the environment's tokens included).

        None ends the response: it is right, the game is lost, the budget is spent. Otherwise the tokens that the
        environment writes next, mostly none. `reward` sees the whole response, the environment's words included.
        """
        ...


class RewardError(ValueError):
    """A reward that is no number in [0, 1], or too few or too many of them; the message names the task."""


def verified_rewards(task: Task, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
    """The rewards of `responses`, each to the problem at its place, through `task.rewards` if the task has it.

    Raises RewardError, naming the task, for a reward that is no number in [0, 1].
    """
    if isinstance(task, BatchVerified):
        rewards = task.rewards(problems, responses)
    else:
        rewards = [task.reward(problem, response) for problem, response in zip(problems, responses, strict=True)]
    if len(rewards) != len(responses):
        raise RewardError(
            f"task {task.name!r}: rewards() returned {len(rewards)} for {len(responses)} responses; return one for each"
        )
    return [_in_range(task, reward) for reward in rewards]


def verifier_counts(task: Task) -> dict[str, int]:
    """What the task's verifier could not score so far, in this process: see `VerifierPool`."""
    verifier = getattr(task, "verifier", None)
    return {f"verifier_{name}": getattr(verifier, name, 0) for name in ("failures", "restarts")}


def _in_range(task: Task, reward: Any) -> float:
    try:
        number = float("nan") if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise RewardError(
            f"task {task.name!r}: the reward {reward!r} of a response is no number in [0, 1]; correct its reward()"
        )
    return number


def held_out(text: str, fraction: float) -> bool:
    """Whether `text` belongs to the held-out `fraction` (in [0, 1]) of all texts.

    A fixed hash decides, the same on every machine and in every run.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < fraction * 2**64


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system_prompt: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a user's prompt: through the tokenizer's chat template if it has one, else as plain lines.

    `template_args` are the template's own arguments, such as `enable_thinking`. The prompt is data: a control token in
    it (`<|im_end|>`, `<think>`) is encoded as text, only the template's are special.
    """
    control = _control_tokens(tokenizer)
    found = control.findall(prompt) if control else []
    # A character in its place keeps the template from meeting it and the tokenizer from finding it.
    place = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in f"{prompt}{system_prompt}") if found else ""
    text = chat_text(
        tokenizer, control.sub(place, prompt) if control and found else prompt, system_prompt, template_args
    )
    # The template writes the special tokens itself.
    first, *rest = text.split(place) if found else [text]
    if len(rest) != len(found):
        raise ValueError(f"the chat template does not repeat the prompt {prompt!r} once, as it stands")
    ids = list(tokenizer(first, add_special_tokens=tokenizer.chat_template is None)["input_ids"])
    for token, part in zip(found, rest, strict=True):
        ids += _as_text(tokenizer, token)
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system_prompt: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> str:
    """The text that `encode_chat` encodes."""
    if tokenizer.chat_template is None:
        return "".join(f"{part}\n" for part in (system_prompt, prompt) if part)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **(template_args or {}))
    assert isinstance(text, str)
    return text


def check_chat(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, template_args: Mapping[str, Any] | None
) -> str:
    """Refuse, with ValueError, options that the chat template does not take; return what it puts before a response:
    "<think>" where it opens the thoughts itself, else "".
    """
    template = "" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    for name in template_args or {}:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            where = "the chat template does not mention it" if template else "the tokenizer has no chat template"
            raise ValueError(f"chat_template_args: {name!r} would do nothing: {where}")
    try:
        text = chat_text(tokenizer, "?", system_prompt, template_args)
    except (TemplateError, TypeError, ValueError) as error:
        try:
            chat_text(tokenizer, "?", None, template_args)
        except (TemplateError, TypeError, ValueError):
            raise ValueError(f"chat_template_args={template_args}: the chat template fails: {error}") from error
        text = ""
        reason = f"refuses it: {error}"
    else:
        reason = "leaves it out"
    if system_prompt and system_prompt.strip() not in text:
        raise ValueError(
            f"system_prompt={system_prompt!r}: the model's chat template {reason}; set no system_prompt, and put "
            "what it says into the problems"
        )
    return "<think>" if text.rstrip().endswith("<think>") else ""


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Any token that the tokenizer looks for in a text before all others; runs of blanks are none."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def _as_text(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """The ids of a control token's text, none of them a control token's."""
    ids = list(tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if len(token) == 1 or not tokenizer.added_tokens_decoder.keys() & set(ids):
        return ids
    half = len(token) // 2  # tokens that are not marked special are found all the same
    return _as_text(tokenizer, token[:half]) + _as_text(tokenizer, token[half:])
