"""Which problems a global step and an evaluation get: those whose prompts fit."""

import warnings
from typing import Any

from minirl_edu.config import Config, ConfigError
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import Problem, Task

_ATTEMPTS = 100  # draws of a step's problems, where prompts are too long


class Prompts:
    """Draws problems of `task` and encodes their prompts, as `config` says.

    engine           may know a limit of its own, `max_model_len`
    positions        of the model, prompt and response together; None: any number
    vocabulary       rows of the model's embedding
    max_new_tokens   of a response
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        engine: Any,
        *,
        positions: int | None,
        vocabulary: int,
        max_new_tokens: int,
    ) -> None:
        self.config, self.task, self.engine = config, task, engine
        self.positions, self.vocabulary, self.max_new_tokens = positions, vocabulary, max_new_tokens

    @property
    def longest(self) -> int | None:
        """Tokens that a prompt may have: `rollout.max_prompt_tokens`, and what positions and engine leave for it."""
        room = [limit for limit in (self.positions, getattr(self.engine, "max_model_len", None)) if limit is not None]
        limits = [limit - self.max_new_tokens for limit in room]
        if (own := self.config.rollout.max_prompt_tokens) is not None:
            limits.append(own)
        return min(limits, default=None)

    def draw(self, step: int) -> tuple[list[Problem], list[list[int]], int]:
        """The problems of a global step, their prompts as token ids, and how many problems had too long a prompt.

        Those are replaced from further draws, which depend on the seed and the step alone, by problems that the step
        does not have yet. Raises ConfigError if too few are found, and as `fitting` does.
        """
        count = self.config.train.mini_batches * self.config.train.mini_batch_prompts
        seed = derive_seed(self.config.seed, "problems", step)
        kept, drawn, overlong = [], [], 0
        for attempt in range(_ATTEMPTS):
            drawn = self.task.sample(count, seed=derive_seed(seed, "problems", attempt) if attempt else seed)
            fitting = self.fitting(drawn)
            overlong += len(drawn) - len(fitting)
            known = {problem.prompt for problem, _ in kept}
            kept += [pair for pair in fitting if pair[0].prompt not in known][: count - len(kept)]
            if len(kept) == count:
                return [problem for problem, _ in kept], [prompt for _, prompt in kept], overlong
        raise ConfigError(f"{self._overlong(drawn[0])}: {_ATTEMPTS} draws of {count} gave {len(kept)} that fit")

    def held_out(self) -> tuple[list[Problem], list[list[int]]]:
        """The held-out problems whose prompts fit, and those prompts. Raises ConfigError if none does."""
        problems = self.task.evaluation(self.config.eval.problems)
        if not (kept := self.fitting(problems)):
            raise ConfigError(f"{self._overlong(problems[0])}: none of the {len(problems)} held-out problems fits")
        return [problem for problem, _ in kept], [prompt for _, prompt in kept]

    def check(self, step: int) -> None:
        """Raise what step `step` and the evaluations would, and warn of held-out problems that are left out."""
        self.draw(step)
        if self.config.eval.every:
            asked, fitting = len(self.task.evaluation(self.config.eval.problems)), len(self.held_out()[0])
            if fitting < asked:
                warnings.warn(
                    f"eval.problems: the prompts of {asked - fitting} of {asked} held-out problems are longer than "
                    f"{self.longest} tokens; the scores leave them out",
                    stacklevel=2,
                )

    def fitting(self, problems: list[Problem]) -> list[tuple[Problem, list[int]]]:
        """Those whose prompts are short enough, with the prompts' token ids.

        Raises ConfigError for another if `rollout.on_overlong` is stop, and for an id that the model has no row for.
        """
        kept, limit = [], self.longest
        for problem in problems:
            prompt = self.task.encode(problem)
            if max(prompt, default=0) >= self.vocabulary:
                raise ConfigError(
                    f"model.name: its tokenizer writes id {max(prompt)}, but the model has {self.vocabulary} rows; "
                    "they do not belong together"
                )
            if limit is None or len(prompt) <= limit:
                kept.append((problem, prompt))
            elif self.config.rollout.on_overlong == "stop":
                raise ConfigError(f"{self._overlong(problem)}, or set rollout.on_overlong: drop")
        return kept

    def _overlong(self, problem: Problem) -> str:
        return (
            f"rollout.max_prompt_tokens: {problem.prompt[:60]!r} takes {len(self.task.encode(problem))} tokens, but "
            f"{self.longest} fit (the model's positions: {self.positions}, the engine's max_model_len: "
            f"{getattr(self.engine, 'max_model_len', None)}, max_new_tokens: {self.max_new_tokens}, "
            f"rollout.max_prompt_tokens: {self.config.rollout.max_prompt_tokens}); lower rollout.max_new_tokens, give "
            "the task shorter prompts"
        )
