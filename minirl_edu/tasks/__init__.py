"""Tasks: problems, prompts, rewards that can be verified, and demonstrations. `make_task` builds one by name."""

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import (
    BatchVerified,
    Demonstrable,
    Episodic,
    Problem,
    Task,
    verified_rewards,
    verifier_counts,
)
from minirl_edu.tasks.chain import ChainTask
from minirl_edu.tasks.math_jsonl import MathTask
from minirl_edu.tasks.reasoning_gym import ReasoningGymTask
from minirl_edu.tasks.trail import TrailTask

__all__ = [
    "TASKS",
    "BatchVerified",
    "ChainTask",
    "Demonstrable",
    "Episodic",
    "MathTask",
    "Problem",
    "ReasoningGymTask",
    "Task",
    "TrailTask",
    "brings_tokenizer",
    "make_task",
    "verified_rewards",
    "verifier_counts",
]

TASKS: dict[str, type] = {task.name: task for task in (ChainTask, TrailTask, ReasoningGymTask, MathTask)}
"""Every task by name."""


def brings_tokenizer(name: str) -> bool:
    """Whether the task `name` has a tokenizer of its own; the others take the model's."""
    return name in TASKS and issubclass(TASKS[name], ChainTask)


def make_task(name: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Task:
    """The task called `name` with its options (see the classes in `TASKS`).

    `chain` and `trail` bring their own tokenizer; the others need the model's. Raises ValueError, naming the choices,
    for an unknown task or option and for a required option that is missing.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    parameters = inspect.signature(TASKS[name]).parameters
    given = options if tokenizer is None else {"tokenizer": tokenizer, **options}
    if unknown := given.keys() - parameters.keys():
        raise ValueError(f"task {name!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(parameters)}")
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := required - given.keys():
        raise ValueError(f"task {name!r} needs {', '.join(sorted(missing))}")
    return TASKS[name](**given)
