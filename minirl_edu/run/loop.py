"""The frame of a training run: built from a config, step by step into a folder, resumed, stopped, ended.

What a step does is the subclass's: `minirl_edu.trainer.MiniRLTrainer`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minirl_edu.advantages import ADVANTAGES
from minirl_edu.config import Config
from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.models import max_positions, vocabulary_size
from minirl_edu.objectives import OBJECTIVES
from minirl_edu.ranks import Ranks
from minirl_edu.rollout import RolloutEngine
from minirl_edu.run import build
from minirl_edu.run.checkpoint import (
    CheckpointWriter,
    checkpoint_path,
    checkpoint_step,
    latest_checkpoint,
    restore_training,
    save_training,
)
from minirl_edu.run.divergence import TrainingDiverged, what_is_not_finite
from minirl_edu.run.folder import RunFolder, stop_request
from minirl_edu.run.prompts import Prompts
from minirl_edu.tasks import Task, verifier_counts


class TrainingRun(ABC):
    """A run of `config.train.global_steps` steps into the folder `out`; see `MiniRLTrainer` for the arguments.

    Built here, and read by a step:

        task, prompts, sampling        what is asked, and how it is sampled
        engine                         the rollout engine (rank 0's; elsewhere None)
        model, optimizer, scheduler    the training engine, as accelerate prepared it
        replay                         of the model's routers, None if it has none
        objective, compute_advantages  what is optimised
        batcher, ranks, accelerator    how a batch is cut, and shared by several processes
        step, grad_step                global and gradient steps done
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        model: PreTrainedModel | None = None,
        task: Task | None = None,
        engine: RolloutEngine | None = None,
        resume: bool = False,
        progress: bool = True,
        on_step: Callable[[list[dict[str, Any]]], object] | None = None,
    ) -> None:
        self.config, self.out, self.on_step = config, Path(out), on_step
        self.accelerator = build.build_accelerator(config, self.out)
        self.ranks = Ranks(self.accelerator, silent=config.ranks.silent, stalled=config.ranks.stalled)
        self.folder = RunFolder(self.out, config, self.accelerator)
        self.writer = CheckpointWriter(
            self.folder.checkpoints,
            keep_last=config.output.keep_last,
            rank=self.ranks.rank,
            size=self.ranks.size,
            barrier=self.ranks.barrier,
        )
        self.progress = progress and self.ranks.is_main
        self.engine: Any = engine
        self._made_engine, self._closed = engine is None, False
        self.step = self.grad_step = 0
        self.detector = CollapseDetector(problems=config.eval.problems, samples=config.eval.samples)
        self.samples: list[dict[str, Any]] = []  # of the latest evaluation, for samples.jsonl
        self._unwritten: list[dict[str, Any]] = []  # lines of a global step that is evaluated
        self._score: float | None = None  # the latest, for the progress bar
        with self.ranks.together():
            try:
                self._build(model, task, resume)
            except BaseException:
                self._close()
                raise

    def _build(self, model: PreTrainedModel | None, task: Task | None, resume: bool) -> None:
        config, is_main = self.config, self.ranks.is_main
        self.folder.open(resume=resume)
        self.task = task or build.build_task(config)
        model = build.build_model(config, self.task, model, load=not build.receives_weights(config, self.accelerator))
        self.replay = build.routing_replay(config, model, self.ranks)
        self.sampling = build.build_sampling(config, self.task, model)
        self.objective = OBJECTIVES[config.algorithm.objective]
        self.compute_advantages = ADVANTAGES[config.algorithm.advantages or self.objective.advantages]
        self.batcher = build.build_batcher(config, model, self.replay, self.ranks)
        if is_main and config.rollout.engine == "hf":
            model.to(self.ranks.device)  # type: ignore[arg-type]
        if is_main or self._made_engine:  # from the model while it is whole
            routes = self.replay is not None and config.engine_routes
            self.engine = build.build_engine(config, model, self.engine, self.ranks, routes=routes)
        self.prompts = Prompts(
            config,
            self.task,
            self.engine,
            positions=max_positions(model),
            vocabulary=vocabulary_size(model),
            max_new_tokens=self.sampling.max_new_tokens,
        )
        build.for_training(config, model, pack=self.batcher.pack)
        self.unsharded: PreTrainedModel | None = None  # to evaluate with, where parameters are spread
        scored = is_main and config.eval.every and config.eval.through_trainer
        if scored and build.is_sharding(config, self.accelerator):
            self.unsharded = copy.deepcopy(model).requires_grad_(False)
        self.model, self.optimizer, self.scheduler = build.prepare(config, model, self.accelerator)
        build.warn_of_rounding(config, self.model, self.ranks)
        self.verifier_counts = verifier_counts(self.task)  # so far
        if resume:
            self._restore()
        self._sync()
        if is_main:
            self.prompts.check(self.step)  # those that do not fit are found now, not in the first step
        self.folder.start(self.step)  # last: what fails before leaves no run behind

    # ------------------------------------------------------------------------------------------------ what a step does

    @abstractmethod
    def global_step(self) -> list[dict[str, Any]]:
        """Rollout and gradient steps; returns a line of metrics for each gradient step (on rank 0, elsewhere none)."""

    @abstractmethod
    def evaluate(self) -> dict[str, float | None]:
        """Scores on held-out problems; the problems it keeps are in `samples`."""

    @abstractmethod
    def _sync(self) -> None:
        """The engine's weights become the model's."""

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> Path:
        """Run the remaining global steps and return the run's folder.

        Ctrl-C (or SIGTERM) finishes the global step, saves and returns; a second one stops at once. Raises
        TrainingDiverged at the first number that is not finite, and RankFailed if another process of the run is lost.

        The end also closes the engine that was made here, so that another can be opened. For more steps make a new
        trainer with `resume=True`.
        """
        try:
            with self.ranks.together():
                self._train()
                self.ranks.close()
        finally:
            self._close()
        return self.out

    def _train(self) -> None:
        total, every = self.config.train.global_steps, self.config.output.save_every
        if self.step == 0 and self.config.eval.every:
            start = {"global_step": 0, "grad_step": 0, **self.evaluate()}
            self.folder.write(self.warned([start]), self.samples)
        with (
            stop_request(speak=self.ranks.is_main) as stop,
            tqdm(total=total, initial=self.step, unit="step", disable=not self.progress) as bar,
        ):
            stopping = False
            while self.step < total and not stopping:
                lines = self.global_step()
                self.writer.check()
                if self.on_step is not None:
                    self.on_step(lines)
                self.folder.write(lines, self.samples)
                # Asked once: a request that comes after the save waits for the next step's.
                stopping = self.ranks.any(stop.is_set())
                if self.step == total or due(self.step, every) or stopping:
                    self.save(wait=self.step == total or stopping)
                for warning in (w for line in lines for w in line.get("warnings", [])):
                    bar.write(f"warning: {warning}")
                if lines:
                    bar.set_postfix_str(self._postfix(lines[-1]), refresh=False)
                bar.update()
            if self.step < total and self.ranks.is_main:
                bar.write(f"stopped after global step {self.step}; go on with: minirl train --resume --out {self.out}")
        self.folder.finish()

    def reached(self, phase: str) -> None:
        """Tell the other ranks how far this one is: a run in which none gets on is stopped (`ranks.stalled`)."""
        self.ranks.reached(f"{self.step} global and {self.grad_step} gradient steps done, {phase}")

    def warned(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines with the detector's warnings. Where the training engine is not scored, the rollout engine is."""
        for line in lines:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            if "score_rollout" in numbers:
                numbers.setdefault("score", numbers["score_rollout"])
            if found := self.detector.update(numbers):
                line["warnings"] = found
        return lines

    def _postfix(self, line: dict[str, Any]) -> str:
        self._score = line.get("score", self._score)
        score = "" if self._score is None else f", score {self._score:.2f}"
        return f"reward {line['reward']:.2f}{score}"

    # ------------------------------------------------------------------------------------------------ what goes wrong

    def need_engine(self) -> None:
        """Raise RuntimeError if the engine is closed."""
        if self._closed:
            raise RuntimeError(
                "this trainer closed the engine that it had made when train() ended; make a new MiniRLTrainer with "
                "resume=True, or give it an engine of your own, which stays open"
            )

    @contextmanager
    def blaming(self, prompt: list[int]) -> Iterator[None]:
        """Inside, an engine that fails because the policy itself gives no numbers raises TrainingDiverged."""
        try:
            yield
        except RuntimeError as error:  # EngineError is one
            if cause := what_is_not_finite(self.unwrapped, prompt):
                raise self.diverged(f"{cause}, so sampling failed ({error})") from error
            raise

    @contextmanager
    def keeping(self, lines: list[dict[str, Any]]) -> Iterator[None]:
        """Inside, `diverged` writes these lines too: their steps were made all the same."""
        self._unwritten = lines
        yield
        self._unwritten = []

    def diverged(self, cause: str) -> TrainingDiverged:
        """The error to raise, after a line in metrics.jsonl that says the same."""
        self.writer.settle()
        path = latest_checkpoint(self.folder.checkpoints)
        remedy = f"the last good checkpoint is {path}" if path else "no checkpoint was saved yet"
        message = f"global step {self.step + 1}, gradient step {self.grad_step + 1}: {cause}; {remedy}"
        line = {"global_step": self.step + 1, "grad_step": self.grad_step + 1, "warnings": [message]}
        self.folder.write([*self._unwritten, line], self.samples)
        self._unwritten = []
        return TrainingDiverged(message)

    # ------------------------------------------------------------------------------------------------ saving, closing

    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint of everything that the remaining steps depend on, from whatever number of ranks. Without
        `wait` the files are written while the run goes on, and the end of the next step tells what went wrong."""
        self.reached("saving")
        return save_training(self.writer, step=self.step, grad_step=self.grad_step, **self._state, wait=wait)

    def _restore(self) -> None:
        """Take up the newest intact checkpoint, which rank 0 chooses."""
        path = latest_checkpoint(self.folder.checkpoints) if self.ranks.is_main else None
        step = self.ranks.all_reduce([-1 if path is None else checkpoint_step(path)], "max")[0]
        if step >= 0:
            path = checkpoint_path(self.folder.checkpoints, step)
            self.step, self.grad_step = restore_training(path, **self._state)

    @property
    def _state(self) -> dict[str, Any]:
        return {
            "model": self.unwrapped,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "detector": self.detector,
        }

    @property
    def unwrapped(self) -> PreTrainedModel:
        """The transformers model inside of what accelerate made of it."""
        return self.accelerator.unwrap_model(self.model)

    def _close(self) -> None:
        """Give back the engine, if it was made here, and the folder."""
        if self._made_engine:
            self._closed = True
            if self.engine is not None:
                self.engine.close()
        self.writer.close()
        self.folder.close()


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never."""
    return every > 0 and step % every == 0
