"""What a task is: problems, how they are shown to a model, and a reward that can be verified."""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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


def held_out(text: str, fraction: float) -> bool:
    """Whether `text` belongs to the held-out `fraction` (in [0, 1]) of all texts.

    A fixed hash decides, the same on every machine and in every run.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < fraction * 2**64


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None = None) -> list[int]:
    """Token ids of a user's prompt: through the tokenizer's chat template if it has one, else as plain lines."""
    if tokenizer.chat_template is None:
        text = "".join(f"{part}\n" for part in (system_prompt, prompt) if part)
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
