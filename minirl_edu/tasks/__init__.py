"""Tasks: problems, prompts, rewards that can be verified, and demonstrations. `make_task` builds one by name."""

import inspect
from importlib import import_module
from typing import Any

from transformers import PreTrainedTokenizerBase

from minirl_edu.tasks.base import (
    BatchVerified,
    Demonstrable,
    Episodic,
    Problem,
    RewardError,
    Task,
    VerifiedAhead,
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
    "RewardError",
    "Task",
    "TrailTask",
    "VerifiedAhead",
    "brings_tokenizer",
    "make_task",
    "task_class",
    "verified_rewards",
    "verifier_counts",
]

TASKS: dict[str, type] = {task.name: task for task in (ChainTask, TrailTask, ReasoningGymTask, MathTask)}
"""Every task of the library by name."""

_MEMBERS = (*Task.__annotations__, *(name for name in vars(Task) if inspect.isfunction(vars(Task)[name])))
"""What every task has."""


def task_class(name: str) -> type:
    """The class called `name`: one of `TASKS`, or `my_package.my_module:MyTask`, whose module is imported.

    Raises ValueError, naming the choices, where there is none.
    """
    if name in TASKS:
        return TASKS[name]
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(
            f"there is no task {name!r}; the tasks are {', '.join(TASKS)}, and one of your own is written "
            "my_package.my_module:MyTask"
        )
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it was found, and lacks something itself
        raise ValueError(
            f"task {name!r}: there is no module {error.name!r}; install it, or put the folder it is in into PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"task {name!r}: {module} has no class {attribute!r}")
    return found


def brings_tokenizer(name: str) -> bool:
    """Whether the task `name` has a tokenizer of its own; the others take the model's, as the argument `tokenizer`.

    Raises ValueError as `task_class`.
    """
    found = task_class(name)
    return issubclass(found, ChainTask) or "tokenizer" not in inspect.signature(found).parameters


def make_task(name: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Task:
    """The task called `name` (see `task_class`) with its options, the arguments of its class.

    `chain` and `trail` bring their own tokenizer; the library's others need the model's. Raises ValueError, naming the
    choices, for an unknown task or option, for a required option that is missing, and for a class that is no `Task`.
    """
    made = task_class(name)
    parameters = inspect.signature(made).parameters
    given = options if tokenizer is None else {"tokenizer": tokenizer, **options}
    if unknown := given.keys() - parameters.keys():
        raise ValueError(f"task {name!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(parameters)}")
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := required - given.keys():
        raise ValueError(f"task {name!r} needs {', '.join(sorted(missing))}")
    task = made(**given)
    if lacking := [member for member in _MEMBERS if not hasattr(task, member)]:
        raise ValueError(f"task {name!r} has no {', '.join(lacking)}; minirl_edu.tasks.Task says what they are")
    return task
