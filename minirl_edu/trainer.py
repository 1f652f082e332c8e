"""MiniRL's training loop, section 4.2 of arXiv 2512.01374.

One global step, synchronous:

    1. sample     N · mini_batch_prompts prompts × G responses from the rollout engine, y ~ μ_old, and verify them
    2. π_old      log-probabilities under the same weights θ_old in the training engine
    3. update     N gradient steps, one for each mini-batch, on `minirl_loss` (or GRPO's, CISPO's)
    4. sync       the final weights become the engine's next θ_old

The first mini-batch is updated at θ = θ_old, so its π_old is the update's own forward, detached; only the others need a
forward for it (`train.reference_old_logp` runs one for all: the reference that the saving is tested against). Groups
whose responses were all rewarded alike have no gradient and get a forward only (`train.zero_advantage_backward` runs
the backward of all).
"""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from minirl_edu.advantages import group_mean_advantages, group_mean_std_advantages, leave_one_out_advantages
from minirl_edu.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from minirl_edu.config import Config, ConfigError, load_config, save_config
from minirl_edu.diagnostics import CollapseDetector, masked_mean, policy_metrics
from minirl_edu.doctor import environment
from minirl_edu.logprobs import Layout, can_share_prompts, micro_batches, response_logprobs
from minirl_edu.models import load_model, load_tokenizer, random_model
from minirl_edu.objectives import PolicyLoss, cispo_loss, grpo_loss, minirl_loss
from minirl_edu.rollout import Rollout, RolloutEngine, Sampling, make_engine, sample
from minirl_edu.routing import Routes, RoutingReplay, Tape, UnsupportedRouter
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import TASKS, ChainTask, Problem, Task, make_task

ADVANTAGES = {
    "group_mean": group_mean_advantages,
    "group_mean_std": group_mean_std_advantages,
    "leave_one_out": leave_one_out_advantages,
}
OWN_ADVANTAGES = {"minirl": "group_mean", "grpo": "group_mean_std", "cispo": "group_mean_std"}


class TrainingDiverged(RuntimeError):
    """A number that is not finite in a gradient step; the message names the step, the cause and the last checkpoint."""


@dataclass
class MicroBatch:
    """Rows of a mini-batch that go through the model in one forward. Routes are in the layout of that forward."""

    rollout: Rollout
    layout: Layout
    advantages: Tensor  # [b]
    logp_old: Tensor | None = None  # log π_old [b, T], once known
    forced: Routes | None = None  # the experts that updates must use (R2, R3)
    chosen: Routes | None = None  # the experts that the training engine used at θ_old


class MiniRLTrainer:
    """Trains `model` on `task` as `config` says, into the folder `out`.

    The folder receives config.yaml, metrics.jsonl (one line per gradient step), environment.json and checkpoints/.
    `model`, `task` and `engine` are built from the config unless given. `resume=True` goes on from the newest intact
    checkpoint, to the same metrics and weights, bit for bit, as an undisturbed run.

    Raises ConfigError for settings that do not fit together and FileExistsError if `out` already holds a run.
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
    ) -> None:
        self.config, self.out, self.progress = config, Path(out), progress
        self.accelerator = Accelerator(log_with=list[Any](config.output.trackers) or None, project_dir=str(self.out))
        if self.accelerator.num_processes > 1:
            raise ConfigError("several processes: this trainer runs in one; start it without `accelerate launch`")
        self.task = task or self._make_task()
        model = model if model is not None else self._load_model()
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        # Dropout stays off in RL (π_θ must be one function), but checkpointing runs only in training mode.
        model.train(config.model.gradient_checkpointing)
        self.replay = self._routing_replay(model)
        self.share_prompts = can_share_prompts(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=config.train.adam_betas,
            eps=config.train.adam_eps,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.scheduler = get_scheduler(
            config.train.lr_schedule,
            self.optimizer,
            num_warmup_steps=config.train.warmup_steps,
            num_training_steps=config.train.global_steps * config.train.mini_batches,
        )
        self.detector = CollapseDetector()
        self.sampling = Sampling(config.rollout.max_new_tokens or self.task.max_new_tokens, config.rollout.temperature)
        self.compute_advantages = ADVANTAGES[config.algorithm.advantages or OWN_ADVANTAGES[config.algorithm.objective]]
        self.step = 0  # global steps done
        self.grad_step = 0
        self._score: float | None = None  # the latest, for the progress bar
        self._take_up(resume)
        self.engine = engine or make_engine(
            self._unwrapped, config.rollout, seed=config.seed, routes=self.replay is not None
        )
        self.engine.sync(self._unwrapped, version=self.step)
        self._start_folder()  # last: what fails before leaves no run behind

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> Path:
        """Run the remaining global steps and return the run's folder.

        Ctrl-C (or SIGTERM) finishes the global step, saves and returns; a second one stops at once. Raises
        TrainingDiverged at the first number that is not finite.
        """
        total = self.config.train.global_steps
        if self.step == 0 and self.config.eval.every and not self._metrics_path.exists():
            self._write([{"global_step": 0, "grad_step": 0, **self.evaluate()}])
        with (
            _stop_request() as stop,
            tqdm(total=total, initial=self.step, unit="step", disable=not self.progress) as bar,
        ):
            while self.step < total:
                lines = self.global_step()
                self._write(lines)
                stopping = stop.is_set()  # asked once: a request that comes after the save waits for the next step's
                if self.step == total or _due(self.step, self.config.output.save_every) or stopping:
                    self.save()
                for warning in (w for line in lines for w in line.get("warnings", [])):
                    bar.write(f"warning: {warning}")
                bar.set_postfix_str(self._postfix(lines[-1]), refresh=False)
                bar.update()
                if stopping and self.step < total:
                    bar.write(
                        f"stopped after global step {self.step}; go on with: minirl train --resume --out {self.out}"
                    )
                    break
        if self.config.output.trackers:
            self.accelerator.end_training()
        return self.out

    def global_step(self) -> list[dict[str, Any]]:
        """One global step; returns the metrics of its gradient steps."""
        settings, started = self.config.train, time.perf_counter()
        problems = self.task.sample(
            settings.mini_batches * settings.mini_batch_prompts,
            seed=derive_seed(self.config.seed, "problems", self.step),
        )
        rollout = self.engine.generate(
            [self.task.encode(problem) for problem in problems],
            group_size=settings.group_size,
            sampling=self.sampling,
            seed=derive_seed(self.config.seed, "rollout", self.step),
        )
        if self.replay is not None and rollout.routes is not None:
            rollout.routes.validate(self.replay.num_experts)
        rewards = self.rewards(problems, rollout)
        advantages = self.compute_advantages(rewards, settings.group_size).to(self.accelerator.device)
        rows = settings.mini_batch_prompts * settings.group_size
        mini_batches = [
            self._cut(rollout.rows(r, r + rows), advantages[r : r + rows]) for r in range(0, len(rewards), rows)
        ]
        for mini_batch in mini_batches if settings.reference_old_logp else mini_batches[1:]:
            for batch in mini_batch:
                self._old_logprobs(batch)

        lines = []
        for mini_batch, reward in zip(mini_batches, rewards.split(rows), strict=True):
            metrics = self._update(mini_batch)
            self.grad_step += 1
            now = time.perf_counter()
            lines.append(
                {
                    "global_step": self.step + 1,
                    "grad_step": self.grad_step,
                    "reward": reward.mean().item(),
                    **metrics,
                    "seconds": now - started,
                }
            )
            started = now
        self.step += 1
        self.engine.sync(self._unwrapped, version=self.step)
        every, last = self.config.eval.every, self.step == self.config.train.global_steps
        if _due(self.step, every) or (every and last):
            lines[-1] |= self.evaluate()
        for line in lines:
            if warnings := self.detector.update({k: v for k, v in line.items() if isinstance(v, int | float)}):
                line["warnings"] = warnings
        return lines

    def rewards(self, problems: Sequence[Problem], rollout: Rollout) -> Tensor:
        """The verifier's rewards [B] of the responses, in [0, 1]."""
        texts = self.task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        return torch.tensor(
            [self.task.reward(problems[row // rollout.group_size], text) for row, text in enumerate(texts)]
        )

    def evaluate(self) -> dict[str, float | None]:
        """Mean reward on held-out problems: one sample each, at the training temperature, the same seed every time.

        `score`: sampled by the training engine in full precision; `score_rollout`: through the rollout engine (None if
        `eval.through_rollout` is off).
        """
        problems = self.task.evaluation(self.config.eval.problems)
        prompts = [self.task.encode(problem) for problem in problems]
        seed = derive_seed(self.config.seed, "evaluation")
        exact = sample(self._unwrapped, prompts, group_size=1, sampling=self.sampling, seed=seed)
        scores: dict[str, float | None] = {"score": self.rewards(problems, exact).mean().item(), "score_rollout": None}
        if self.config.eval.through_rollout:
            deployed = self.engine.generate(prompts, group_size=1, sampling=self.sampling, seed=seed)
            scores["score_rollout"] = self.rewards(problems, deployed).mean().item()
        return scores

    # ------------------------------------------------------------------------------------------- π_old and π_θ

    def _cut(self, rollout: Rollout, advantages: Tensor) -> list[MicroBatch]:
        budget, parts = self.config.train.tokens_per_micro_batch, []
        for rows in self._by_signal(rollout, advantages):
            cuts = micro_batches(rollout.take(rows), budget, share_prompts=self.share_prompts)
            parts += [MicroBatch(part, layout, advantages[rows[inner]]) for inner, part, layout in cuts]
        if self.config.algorithm.replay == "R3":
            for part in parts:
                if part.rollout.routes is None:
                    raise ConfigError("algorithm.replay = 'R3': the rollout engine recorded no routes")
                part.forced = part.chosen = part.layout.pack(part.rollout.routes)
        return parts

    def _by_signal(self, rollout: Rollout, advantages: Tensor) -> list[Tensor]:
        """The rows of the groups that have a gradient, and those of the groups that have none; only what there is."""
        groups = (advantages != 0).view(-1, rollout.group_size).any(1)
        if self.config.train.zero_advantage_backward:
            groups = torch.ones_like(groups)
        signal = groups.repeat_interleave(rollout.group_size)
        return [rows for kind in (signal, ~signal) if len(rows := kind.nonzero()[:, 0])]

    @torch.no_grad()
    def _old_logprobs(self, batch: MicroBatch) -> None:
        """log π_old in a forward of its own, in the update's layout, under the engine's experts (R3) or the model's."""
        with self._experts(batch) as tape:
            batch.logp_old = response_logprobs(self.model, batch.layout, temperature=self.sampling.temperature).logp
        if tape is not None:
            batch.chosen = tape.routes
            if self.config.algorithm.replay == "R2":
                batch.forced = batch.chosen

    def _experts(self, batch: MicroBatch) -> AbstractContextManager[Tape | None]:
        """The context of a forward (and its backward): replay what is forced, else record if nothing is known yet."""
        if self.replay is None:
            return nullcontext()
        if batch.forced is not None:
            return self.replay.replay(batch.forced)
        return self.replay.record() if batch.chosen is None else nullcontext()

    def _update(self, mini_batch: list[MicroBatch]) -> dict[str, Any]:
        """One gradient step on a mini-batch; returns its metrics."""
        responses = sum(len(batch.advantages) for batch in mini_batch)
        tokens = sum(len(batch.layout.targets) for batch in mini_batch)
        outputs = []
        every = self.config.train.zero_advantage_backward
        for batch in mini_batch:
            backward = every or bool(batch.advantages.any())
            with self._experts(batch) as tape, torch.set_grad_enabled(backward):
                output = response_logprobs(self.model, batch.layout, temperature=self.sampling.temperature)
                if not torch.isfinite(output.logp).all():
                    raise self._diverged("log-probabilities of the target policy that are not finite")
                # In the first mini-batch θ = θ_old: π_old is this very forward.
                logp_old = output.logp.detach() if batch.logp_old is None else batch.logp_old
                if backward:
                    self.accelerator.backward(self._loss(output.logp, logp_old, batch, responses, tokens).loss)
            if tape is not None:
                batch.chosen = tape.routes
            outputs.append((output.logp.detach(), logp_old, output.entropy))
        for parameter in self.model.parameters():  # AdamW moves on by its momentum even where there is no gradient
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        if not math.isfinite(grad_norm := float(clipped)):  # type: ignore[arg-type]
            raise self._diverged(f"a gradient norm of {grad_norm}")
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        logp, logp_old, entropy = (torch.cat(column) for column in zip(*outputs, strict=True))
        mask = torch.cat([batch.rollout.response_mask for batch in mini_batch])
        return {
            "entropy": masked_mean(entropy, mask).item(),
            **policy_metrics(
                logp,
                logp_old,
                torch.cat([batch.rollout.logp_rollout for batch in mini_batch]),
                torch.cat([batch.advantages for batch in mini_batch]),
                mask,
                **self._as_measured,
            ),
            "routing_flip_rate": self._flip_rate(mini_batch),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
        }

    @property
    def _bounds(self) -> dict[str, float]:
        """eps_low and eps_high where the config sets them; each objective has its own defaults."""
        algorithm = self.config.algorithm
        bounds = {"eps_low": algorithm.eps_low, "eps_high": algorithm.eps_high}
        return {name: value for name, value in bounds.items() if value is not None}

    @property
    def _as_measured(self) -> dict[str, Any]:
        """The arguments with which `policy_metrics` describes this objective's weights and clipping."""
        algorithm = self.config.algorithm
        if algorithm.objective == "grpo":
            return {"is_correction": False, "is_cap": math.inf, "eps_low": 0.2, "eps_high": 0.2, **self._bounds}
        if algorithm.objective == "cispo":
            return {"is_correction": False, "is_cap": 1 + self._bounds.get("eps_high", 4.0), "clip": False}
        return {
            "is_correction": algorithm.is_correction,
            "is_cap": algorithm.is_cap,
            "clip": algorithm.clip,
            **self._bounds,
        }

    def _loss(self, logp: Tensor, logp_old: Tensor, batch: MicroBatch, responses: int, tokens: int) -> PolicyLoss:
        """This micro-batch's share of the mini-batch's loss: the divisors count the whole mini-batch."""
        algorithm, mask = self.config.algorithm, batch.rollout.response_mask
        if algorithm.objective == "grpo":
            return grpo_loss(logp, logp_old, batch.advantages, mask, num_responses=responses, **self._bounds)
        if algorithm.objective == "cispo":
            return cispo_loss(logp, logp_old, batch.advantages, mask, num_tokens=tokens, **self._bounds)
        return minirl_loss(
            logp,
            logp_old,
            batch.rollout.logp_rollout,
            batch.advantages,
            mask,
            is_cap=algorithm.is_cap,
            clip=algorithm.clip,
            is_correction=algorithm.is_correction,
            length_norm=algorithm.length_norm,
            num_responses=responses,
            **self._bounds,
        )

    def _flip_rate(self, mini_batch: list[MicroBatch]) -> float | None:
        """Share of (token, layer) pairs where the experts used at θ_old differ from the rollout engine's, if known."""
        rates, weights = [], []
        for batch in mini_batch:
            if batch.chosen is None or batch.rollout.routes is None:
                return None
            inputs = batch.rollout.inputs
            rates.append(batch.layout.unpack(batch.chosen).flip_rate(batch.rollout.routes, inputs).mean())
            weights.append(inputs.sum())
        weight = torch.stack(weights).float()
        return (torch.stack(rates) @ weight / weight.sum()).item()

    # ------------------------------------------------------------------------------------- building and saving

    def save(self) -> Path:
        """Write a checkpoint of everything that the remaining steps depend on."""
        optimizer, groups = flatten_optimizer(self.optimizer.state_dict())
        return save_checkpoint(
            self.out / "checkpoints",
            self.step,
            tensors={"model": self._unwrapped.state_dict(), "optimizer": optimizer},
            state={
                "global_step": self.step,
                "grad_step": self.grad_step,
                "optimizer": groups,
                "scheduler": self.scheduler.state_dict(),
                "detector": self.detector.state_dict(),
            },
            keep_last=self.config.output.keep_last,
        )

    def _restore(self) -> None:
        path = latest_checkpoint(self.out / "checkpoints")
        if path is None:
            return  # stopped before the first checkpoint: start again
        tensors, state = load_checkpoint(path)
        self._unwrapped.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(unflatten_optimizer(tensors["optimizer"], state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        self.detector.load_state_dict(state["detector"])
        self.step, self.grad_step = state["global_step"], state["grad_step"]

    def _take_up(self, resume: bool) -> None:
        """Go on with the run in the folder, if there is one: its metrics are cut back to the checkpoint's step."""
        config_path = self.out / "config.yaml"
        if self._metrics_path.exists() or config_path.exists():
            if not resume:
                raise FileExistsError(f"{self.out} already holds a run: go on with --resume, or choose another --out")
            _same_run(load_config(config_path), self.config)
            self._restore()
            if self._metrics_path.exists():
                _cut_back(self._metrics_path, self.step)

    def _start_folder(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.out / "config.yaml")
        (self.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        if self.config.output.trackers:
            self.accelerator.init_trackers("minirl", config=_flat(self.config.to_dict()))

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if self.config.output.trackers:
            for line in lines:
                numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
                self.accelerator.log(numbers, step=line["grad_step"])

    def _postfix(self, line: dict[str, Any]) -> str:
        self._score = line.get("score", self._score)
        score = "" if self._score is None else f", score {self._score:.2f}"
        return f"reward {line['reward']:.2f}{score}"

    def _diverged(self, cause: str) -> TrainingDiverged:
        path = latest_checkpoint(self.out / "checkpoints")
        remedy = f"the last good checkpoint is {path}" if path else "no checkpoint was saved yet"
        message = f"global step {self.step + 1}, gradient step {self.grad_step + 1}: {cause}; {remedy}"
        self._write([{"global_step": self.step + 1, "grad_step": self.grad_step + 1, "warnings": [message]}])
        return TrainingDiverged(message)

    @property
    def _metrics_path(self) -> Path:
        return self.out / "metrics.jsonl"

    @property
    def _unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _make_task(self) -> Task:
        settings, model = self.config.task, self.config.model
        brings_its_own = settings.name == ChainTask.name
        tokenizer = None
        if settings.name in TASKS and not brings_its_own:
            tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        try:
            return make_task(settings.name, tokenizer=tokenizer, **settings.options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"task: {error}") from error

    def _load_model(self) -> PreTrainedModel:
        settings = self.config.model
        kind: dict[str, Any] = {
            "dtype": settings.dtype,
            "attn_implementation": settings.attn_implementation,
            "trust_remote_code": settings.trust_remote_code,
        }
        try:
            if settings.random:
                return random_model(settings.name, settings.overrides, seed=self.config.seed, **kind)
            return load_model(settings.name, **kind)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _routing_replay(self, model: PreTrainedModel) -> RoutingReplay | None:
        try:
            return RoutingReplay(model)
        except UnsupportedRouter as error:
            if self.config.algorithm.replay != "none":
                raise ConfigError(f"algorithm.replay = {self.config.algorithm.replay!r}: {error}") from error
            return None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _same_run(saved: Config, config: Config) -> None:
    """Refuse to resume under other settings: the result would be neither run. The length and the output may change."""
    old, new = (_flat(c.to_dict()) for c in (saved, config))
    free = {"train.global_steps", *(name for name in old if name.startswith("output."))}
    changed = [f"{k} = {new[k]!r} (was {old[k]!r})" for k in old if k not in free and old[k] != new.get(k)]
    if changed:
        raise ConfigError(
            f"a resumed run keeps its settings, but {', '.join(changed)}; use another --out for a new run"
        )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and key not in ("options", "overrides"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _cut_back(path: Path, step: int) -> None:
    """Drop the metrics of global steps after `step`, and the last line of a killed run if it is cut short."""
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if not line.endswith("\n") or json.loads(line)["global_step"] > step:
            break
        kept.append(line)
    if len(kept) == len(lines):
        return
    if not kept:
        path.unlink()
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second acts as it would have without us."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        stop.set()
        restore()
        tqdm.write("stopping: this global step is finished and saved first (again to stop at once)")

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
