"""MiniRL's training loop, section 4.2 of arXiv 2512.01374, on one process or several (ranks).

One global step, synchronous:

    1. sample     N · mini_batch_prompts prompts × G responses from the rollout engine, y ~ μ_old, and verify them
    2. π_old      log-probabilities under the same weights θ_old in the training engine
    3. update     N gradient steps, one for each mini-batch, on the loss that `algorithm.objective` names
    4. sync       the final weights become the engine's next θ_old

The first mini-batch is updated at θ = θ_old, so its π_old is the update's own forward, detached; only the others need a
forward for it (`train.reference_old_logp` runs one for all: the reference that the saving is tested against). Groups
whose responses were all rewarded alike have no gradient and get a forward only (`train.zero_advantage_backward` runs
the backward of all).

Under `accelerate launch` rank 0 samples, verifies and writes; each rank updates on its share of every mini-batch, whole
groups of about as many tokens as the others'. The divisor of the loss is that of the whole mini-batch, so the gradient
does not depend on the number of ranks. All ranks make the same number of forwards and backwards, because parameters
that are sharded are gathered in each: where a rank has fewer micro-batches, it fills up with empty ones.
"""

import copy
import inspect
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from minirl_edu.advantages import ADVANTAGES
from minirl_edu.batches import Batcher, MicroBatch, MiniBatch, Sampled
from minirl_edu.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoint_step,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from minirl_edu.config import Config, ConfigError, load_config, save_config
from minirl_edu.diagnostics import CollapseDetector, fetch, masked_mean, policy_metrics
from minirl_edu.doctor import environment
from minirl_edu.logprobs import can_share_prompts, response_logprobs
from minirl_edu.models import (
    adopt_tokenizer,
    load_model,
    load_tokenizer,
    max_positions,
    random_model,
    recompute_activations,
    vocabulary_size,
)
from minirl_edu.objectives import OBJECTIVES, PolicyLoss
from minirl_edu.ranks import Ranks, make_accelerator, share_experts
from minirl_edu.rollout import EngineError, HFEngine, Rollout, RolloutEngine, Sampling, make_engine, sample
from minirl_edu.rollout.hf import check_sampling, evaluating, suppressed_mask
from minirl_edu.routing import RoutingReplay, Tape, UnsupportedRouter
from minirl_edu.run_folder import FolderLock, lock_folder
from minirl_edu.seeding import derive_seed
from minirl_edu.streaming import full, full_state, is_sharded, like, local_part, reshard, take_part, untied_state
from minirl_edu.tasks import TASKS, ChainTask, Problem, Task, make_task, verified_rewards

SAMPLES = 3
"""Held-out problems whose responses are kept at each evaluation."""


class TrainingDiverged(RuntimeError):
    """A number that is not finite in a gradient step; the message names the step, the cause and the last checkpoint."""


class MiniRLTrainer:
    """Trains `model` on `task` as `config` says, into the folder `out`.

    The folder receives config.yaml, metrics.jsonl (one line per gradient step), samples.jsonl (one line per evaluation:
    the first problems, what the model answered and its reward), environment.json and checkpoints/.
    `model`, `task` and `engine` are built from the config unless given; an engine that was built is closed when `train`
    ends. The model gets the end tokens of the task's tokenizer, and gives no probability to ids that the tokenizer does
    not know (`adopt_tokenizer`). `resume=True` goes on from the newest intact
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
        self.config, self.out = config, Path(out)
        try:
            self.accelerator = make_accelerator(
                wait=config.ranks.wait,
                log_with=list[Any](config.output.trackers) or None,
                project_dir=str(self.out),
            )
        except ValueError as error:
            raise ConfigError(f"accelerate: {error}") from error
        self.ranks = Ranks(self.accelerator, silent=config.ranks.silent)
        self.progress = progress and self.ranks.first
        self._lock: FolderLock | None = None
        self.engine: Any = engine  # rank 0's; elsewhere None
        self._made_engine, self._closed = engine is None, False
        self._unwritten: list[dict[str, Any]] = []  # lines of a global step that is evaluated
        with self.ranks.together():
            try:
                self._build(model, task, resume)
            except BaseException:
                self._close()
                raise

    def _build(self, model: PreTrainedModel | None, task: Task | None, resume: bool) -> None:
        config = self.config
        if self.ranks.size > 1 and config.rollout.engine == "vllm" and self._made_engine:
            raise ConfigError(
                f"rollout.engine = 'vllm': it takes over torch.distributed, which the {self.ranks.size} processes of "
                "this run need; use 'vllm_server' (scale/serve.py)"
            )
        if self.ranks.first:
            self._open_folder(resume)
        self.task = task or self._make_task()
        model = model if model is not None else self._load_model()
        try:
            adopt_tokenizer(model, self.task.tokenizer)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.replay = self._routing_replay(model)
        self.sampling = Sampling(config.rollout.max_new_tokens or self.task.max_new_tokens, config.rollout.temperature)
        self.objective = OBJECTIVES[config.algorithm.objective]
        self.compute_advantages = ADVANTAGES[config.algorithm.advantages or self.objective.advantages]
        self.batcher = Batcher(
            self.ranks,
            group_size=config.train.group_size,
            mini_batches=config.train.mini_batches,
            tokens=config.train.tokens_per_micro_batch,
            share_prompts=can_share_prompts(model),
            layers=() if self.replay is None else self.replay.layers,
            force_routes=config.algorithm.replay == "R3",
            backward_all=config.train.zero_advantage_backward,
        )
        if self.ranks.first and config.rollout.engine == "hf":
            model.to(self.ranks.device)  # type: ignore[arg-type]
        self._check_lengths(model)
        if self.ranks.first:  # from the model while it is whole
            self._build_engine(model)
        self._prepare(model)
        self._warn_of_rounding()
        self.detector = CollapseDetector(problems=config.eval.problems)
        self.step = 0  # global steps done
        self.grad_step = 0
        self._score: float | None = None  # the latest, for the progress bar
        self._samples: list[dict[str, Any]] = []  # of the latest evaluation, for samples.jsonl
        self._verifier_counts = self._count_verifier()
        if resume:
            self._restore()
        self._sync()
        if self.ranks.first:
            self._problems()  # prompts that do not fit are found now, not in the first step
            if config.eval.every:
                asked, fitting = len(self.task.evaluation(config.eval.problems)), len(self._evaluation())
                if fitting < asked:
                    warnings.warn(
                        f"eval.problems: the prompts of {asked - fitting} of {asked} held-out problems are longer than "
                        f"{self._longest_prompt} tokens; the scores leave them out",
                        stacklevel=3,
                    )
            self._start_folder()  # last: what fails before leaves no run behind

    def _check_lengths(self, model: PreTrainedModel) -> None:
        """Refuse responses that leave no position for a prompt."""
        self._positions = max_positions(model)
        if self._positions is not None and self.sampling.max_new_tokens >= self._positions:
            raise ConfigError(
                f"rollout.max_new_tokens = {self.sampling.max_new_tokens}: the model has {self._positions} positions "
                "for prompt and response together; lower it, or take a model with more"
            )

    def _build_engine(self, model: PreTrainedModel) -> None:
        config = self.config
        if self._made_engine:
            self.engine = make_engine(model, config.rollout, seed=config.seed, routes=self.replay is not None)
        if config.eval.every and config.eval.through_trainer and not isinstance(self.engine, HFEngine):
            try:  # an HFEngine did it itself
                check_sampling(model)
            except ValueError as error:
                raise ConfigError(f"eval.through_trainer: {error}; or set it to false") from error

    def _need_engine(self) -> None:
        if self._closed:
            raise RuntimeError(
                "this trainer closed the engine that it had made when train() ended; make a new MiniRLTrainer with "
                "resume=True, or give it an engine of your own, which stays open"
            )

    def _close(self) -> None:
        """Give back the engine, if the trainer made it, and the folder."""
        if self._made_engine:
            self._closed = True
            if self.engine is not None:
                self.engine.close()
        if self._lock is not None:
            self._lock.close()

    def _warn_of_rounding(self) -> None:
        """Say what share of weights in 16 bits a step can move: w + lr ≠ w only where lr is at least half a spacing
        of w's number format. AdamW's steps are about lr at most."""
        lr, moved, total = self.config.train.lr, 0, 0
        for weight in self.model.parameters():
            if weight.requires_grad and weight.dtype.itemsize == 2 and lr:
                # The spacing at w is 2^⌊log₂ |w|⌋ · ε, so this many powers of two are small enough.
                bound = 2.0 ** (math.floor(math.log2(2 * lr / torch.finfo(weight.dtype).eps)) + 1)
                part = local_part(weight)
                moved, total = moved + int((part.abs() < bound).sum()), total + part.numel()
        moved, total = self.ranks.sum([float(moved), float(total)])
        if self.ranks.first and total and moved / total < _ENOUGH:
            warnings.warn(
                f"model.dtype = {self.config.model.dtype!r}, train.lr = {lr:g}: in {1 - moved / total:.0%} of the "
                "weights AdamW's step is less than half the distance to the next number, and is rounded away; set "
                "model.dtype: float32 (and let accelerate compute in bf16: mixed_precision), or raise train.lr",
                stacklevel=4,
            )

    def _prepare(self, model: PreTrainedModel) -> None:
        """The model and its optimizer as accelerate's config says: one copy, one on each rank, or sharded."""
        config = self.config
        if config.model.experts_implementation:
            model.set_experts_implementation(config.model.experts_implementation)
        model.eval()  # no dropout in RL: π_θ must be one function
        if config.model.gradient_checkpointing:
            try:
                recompute_activations(model)
            except ValueError as error:
                raise ConfigError(f"model.gradient_checkpointing = true: {error}") from error
        sharding = self.ranks.size > 1 and (self.accelerator.is_fsdp2 or config.model.expert_parallel > 1)
        self._twin: PreTrainedModel | None = None
        if sharding and self.ranks.first and config.eval.every and config.eval.through_trainer:
            self._twin = copy.deepcopy(model).requires_grad_(False)
        if config.model.expert_parallel > 1:
            if self.accelerator.is_fsdp2 or self.ranks.size == 1:
                raise ConfigError(
                    f"model.expert_parallel = {config.model.expert_parallel}: it needs several processes, which "
                    "transformers then shards itself; use an accelerate config for DDP (scale/accelerate)"
                )
            try:
                bf16 = self.accelerator.mixed_precision == "bf16"
                model = share_experts(model, config.model.expert_parallel, bf16=bf16)
            except ValueError as error:
                raise ConfigError(f"model.expert_parallel = {config.model.expert_parallel}: {error}") from error
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=config.train.adam_betas,
            eps=config.train.adam_eps,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        self.model: Any = model
        if config.model.expert_parallel > 1:
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        try:
            self.scheduler = get_scheduler(
                config.train.lr_schedule,
                self.optimizer,
                num_warmup_steps=config.train.warmup_steps,
                num_training_steps=config.train.global_steps * config.train.mini_batches,
            )
        except ValueError as error:  # polynomial ends at 1e-7
            raise ConfigError(f"train.lr = {config.train.lr:g}: {error}") from error

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> Path:
        """Run the remaining global steps and return the run's folder.

        Ctrl-C (or SIGTERM) finishes the global step, saves and returns; a second one stops at once. Raises
        TrainingDiverged at the first number that is not finite, and RankFailed if another process of the run is lost.

        The end also closes the engine that this trainer made, so that another can be opened. For more steps make a new
        trainer with `resume=True`; `evaluate` still works with `eval.through_rollout` off.
        """
        try:
            with self.ranks.together():
                self._train()
                self.ranks.close()
        finally:
            self._close()
        return self.out

    def _train(self) -> None:
        total = self.config.train.global_steps
        if self.step == 0 and self.config.eval.every:
            start = {"global_step": 0, "grad_step": 0, **self.evaluate()}
            self._watch([start])
            self._write([start])
        with (
            _stop_request(self.ranks.first) as stop,
            tqdm(total=total, initial=self.step, unit="step", disable=not self.progress) as bar,
        ):
            while self.step < total:
                lines = self.global_step()
                self._write(lines)
                # Asked once: a request that comes after the save waits for the next step's.
                stopping = self.ranks.any(stop.is_set())
                if self.step == total or _due(self.step, self.config.output.save_every) or stopping:
                    self.save()
                for warning in (w for line in lines for w in line.get("warnings", [])):
                    bar.write(f"warning: {warning}")
                if lines:
                    bar.set_postfix_str(self._postfix(lines[-1]), refresh=False)
                bar.update()
                if stopping and self.step < total:
                    if self.ranks.first:
                        bar.write(f"stopped after global step {self.step}; go on with: {_resume(self.out)}")
                    break
        if self.config.output.trackers:
            self.accelerator.end_training()

    def global_step(self) -> list[dict[str, Any]]:
        """One global step; returns the metrics of its gradient steps (on rank 0, elsewhere none)."""
        self._need_engine()
        settings, started = self.config.train, time.perf_counter()
        problems, overlong = self._problems() if self.ranks.first else ([], 0)
        sampled = self._sample(problems) if self.ranks.first else None
        mini_batches = self.batcher.cut(sampled, self.compute_advantages)
        for mini_batch in mini_batches if settings.reference_old_logp else mini_batches[1:]:
            for batch in mini_batch.parts:
                self._old_logprobs(batch)

        lines = []
        for mini_batch in mini_batches:
            metrics = self._update(mini_batch)
            self.grad_step += 1
            now = time.perf_counter()
            lines.append(
                {
                    "global_step": self.step + 1,
                    "grad_step": self.grad_step,
                    "reward": mini_batch.rewards.mean().item(),
                    **metrics,
                    "seconds": now - started,
                }
            )
            started = now
        self.step += 1
        self._sync()
        every, last = self.config.eval.every, self.step == self.config.train.global_steps
        if _due(self.step, every) or (every and last):
            self._unwritten = lines  # if the policy turns out to be broken, these steps were made all the same
            lines[-1] |= self.evaluate()
            self._unwritten = []
        if not self.ranks.first:
            return []
        assert sampled is not None
        lines[0] |= {
            "dropped_groups": len(problems) - sum(sampled.groups),
            "overlong_prompts": overlong,
            **self._new_verifier_counts(),
            "bytes_per_token": sampled.rollout.bytes_per_token(),
        }
        self._watch(lines)
        return lines

    def _watch(self, lines: list[dict[str, Any]]) -> None:
        """Add the detector's warnings to the lines. Where the training engine is not scored, the rollout engine is."""
        for line in lines:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            if "score_rollout" in numbers:
                numbers.setdefault("score", numbers["score_rollout"])
            if found := self.detector.update(numbers):
                line["warnings"] = found

    def _sync(self) -> None:
        """The engine's θ_old becomes θ. Sharded weights are made whole one at a time, which takes all ranks."""
        if self.config.rollout.options.get("sleep") and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server wakes up on these GPUs, and needs what is only cached here
            self.ranks.barrier()
        if self.ranks.first:
            self.engine.sync(self._unwrapped, version=self.step)
        else:
            take_part(self._unwrapped)

    # -------------------------------------------------------------------------------------------- rollout and rewards

    @property
    def _longest_prompt(self) -> int | None:
        """Tokens that a prompt may have: `rollout.max_prompt_tokens`, and what positions and engine leave for it."""
        room = [limit for limit in (self._positions, getattr(self.engine, "max_model_len", None)) if limit is not None]
        limits = [limit - self.sampling.max_new_tokens for limit in room]
        if (own := self.config.rollout.max_prompt_tokens) is not None:
            limits.append(own)
        return min(limits, default=None)

    def _fitting(self, problems: list[Problem]) -> list[tuple[Problem, list[int]]]:
        """Those whose prompts are short enough, with the prompts' token ids.

        Raises ConfigError for another if `rollout.on_overlong` is stop, and for an id that the model has no row for.
        """
        kept, limit, rows = [], self._longest_prompt, vocabulary_size(self._unwrapped)
        for problem in problems:
            prompt = self.task.encode(problem)
            if max(prompt, default=0) >= rows:
                raise ConfigError(
                    f"model.name: its tokenizer writes id {max(prompt)}, but the model has {rows} rows; they do not "
                    "belong together"
                )
            if limit is None or len(prompt) <= limit:
                kept.append((problem, prompt))
            elif self.config.rollout.on_overlong == "stop":
                raise ConfigError(f"{self._overlong(problem)}, or set rollout.on_overlong: drop")
        return kept

    def _overlong(self, problem: Problem) -> str:
        engine, limits = getattr(self.engine, "max_model_len", None), self.config.rollout
        return (
            f"rollout.max_prompt_tokens: {problem.prompt[:60]!r} takes {len(self.task.encode(problem))} tokens, but "
            f"{self._longest_prompt} fit (the model's positions: {self._positions}, the engine's max_model_len: "
            f"{engine}, max_new_tokens: {self.sampling.max_new_tokens}, rollout.max_prompt_tokens: "
            f"{limits.max_prompt_tokens}); lower rollout.max_new_tokens, give the task shorter prompts"
        )

    def _problems(self) -> tuple[list[tuple[Problem, list[int]]], int]:
        """The problems of this global step with their prompts, and how many were left out for their long ones.

        Those are replaced from further draws, which depend on the seed and the step alone, by problems that the step
        does not have yet. Raises ConfigError if too few are found.
        """
        count = self.config.train.mini_batches * self.config.train.mini_batch_prompts
        seed = derive_seed(self.config.seed, "problems", self.step)
        kept, drawn, overlong = [], [], 0
        for attempt in range(_ATTEMPTS):
            drawn = self.task.sample(count, seed=derive_seed(seed, "problems", attempt) if attempt else seed)
            fitting = self._fitting(drawn)
            overlong += len(drawn) - len(fitting)
            known = {problem.prompt for problem, _ in kept}
            kept += [pair for pair in fitting if pair[0].prompt not in known][: count - len(kept)]
            if len(kept) == count:
                return kept, overlong
        raise ConfigError(f"{self._overlong(drawn[0])}: {_ATTEMPTS} draws of {count} gave {len(kept)} that fit")

    def _evaluation(self) -> list[tuple[Problem, list[int]]]:
        """The held-out problems whose prompts are short enough, with the prompts. Raises ConfigError if none is."""
        problems = self.task.evaluation(self.config.eval.problems)
        if not (kept := self._fitting(problems)):
            raise ConfigError(f"{self._overlong(problems[0])}: none of the {len(problems)} held-out problems fits")
        return kept

    @contextmanager
    def _blaming(self, prompts: list[list[int]]) -> Iterator[None]:
        """Inside, an engine that fails because the policy itself gives no numbers raises TrainingDiverged."""
        try:
            yield
        except RuntimeError as error:  # EngineError is one
            if cause := self._not_finite(prompts[0]):
                raise self._diverged(f"{cause}, so sampling failed ({error})") from error
            raise

    @torch.no_grad()
    def _not_finite(self, prompt: list[int]) -> str:
        """What is wrong with the policy, as far as rank 0 can tell: its weights, or its logits for `prompt`."""
        model = self._unwrapped
        for name, weight in model.named_parameters():
            if not torch.isfinite(local_part(weight)).all():
                return f"weights of {name} that are not finite"
        if is_sharded(model):
            return ""  # a forward takes all ranks
        with evaluating(model):
            logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
        return "" if torch.isfinite(logits).all() else "logits of the target policy that are not finite"

    def _sample(self, problems: list[tuple[Problem, list[int]]]) -> Sampled:
        """Rank 0's part: the responses that can be trained on, and their rewards.

        Raises EngineError for one that cannot, or, where those are dropped, if a mini-batch has no group left;
        TrainingDiverged if that is the policy's own fault.
        """
        prompts, group_size = [prompt for _, prompt in problems], self.config.train.group_size
        seed = derive_seed(self.config.seed, "rollout", self.step)
        with self._blaming(prompts):
            rollout = self.engine.generate(prompts, group_size=group_size, sampling=self.sampling, seed=seed)
            return self._accept([problem for problem, _ in problems], rollout)

    def _accept(self, problems: list[Problem], rollout: Rollout) -> Sampled:
        """The groups of a rollout that can be trained on, with their rewards. Raises EngineError as `_sample` does."""
        settings = self.config.train
        self._check_tokens(rollout)
        faults = rollout.faults(num_experts=None if self.replay is None else self.replay.num_experts)
        faulty = {row // rollout.group_size for row in faults}
        kept = [group for group in range(len(problems)) if group not in faulty]
        groups = [sum(g // settings.mini_batch_prompts == m for g in kept) for m in range(settings.mini_batches)]
        if faults and (self.config.rollout.on_fault == "stop" or not all(groups)):
            fault, count = next(iter(faults.values())), f"{len(faults)} of {len(rollout.tokens)} responses"
            advice = "rollout.on_fault: drop leaves out their groups" if all(groups) else "a mini-batch has none left"
            raise EngineError(f"{fault}; {count} cannot be trained on: {advice}")
        if faults:
            rollout, problems = rollout.without(faulty), [problems[group] for group in kept]
        return Sampled(rollout, self.rewards(problems, rollout), groups)

    def _check_tokens(self, rollout: Rollout) -> None:
        """Raise EngineError for tokens that the policy never says: an engine of the user's may not know them."""
        suppressed = suppressed_mask(self._unwrapped, vocabulary_size(self._unwrapped), rollout.tokens.device)
        drawn = rollout.tokens[:, rollout.prompt_length :][rollout.response_mask]
        if suppressed is not None and suppressed[drawn].any():
            raise EngineError(
                f"tokens: the engine drew id {int(drawn[suppressed[drawn]][0])}, which the tokenizer does not know; it "
                "has to leave out the suppress_tokens of the model's generation config"
            )

    def rewards(self, problems: Sequence[Problem], rollout: Rollout) -> Tensor:
        """The verifier's rewards [B] of the responses, in [0, 1]."""
        texts = self.task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        asked = [problems[row // rollout.group_size] for row in range(len(texts))]
        return torch.tensor(verified_rewards(self.task, asked, texts))

    def evaluate(self) -> dict[str, float | None]:
        """Mean reward on held-out problems: one sample each, at the training temperature, the same seed every time.

        `score`: sampled by the training engine in full precision; `score_rollout`: through the rollout engine (each
        None if `eval.through_trainer` or `eval.through_rollout` is off). Rank 0 evaluates; all ranks have to call this.
        """
        settings, model = self.config.eval, self._unwrapped
        if settings.through_trainer and is_sharded(model):
            if self._twin is None:
                take_part(model)
            else:
                state = self._twin.state_dict()
                for name, tensor in full_state(model):
                    state[name].copy_(tensor)
                model = self._twin
        if not self.ranks.first:
            return {}
        if settings.through_rollout:
            self._need_engine()
        problems, prompts = map(list, zip(*self._evaluation(), strict=True))
        seed = derive_seed(self.config.seed, "evaluation")
        scores: dict[str, float | None] = {"score": None, "score_rollout": None}
        if settings.through_trainer:
            exact = sample(model, prompts, group_size=1, sampling=self.sampling, seed=seed, keep_faulty=True)
            if faults := exact.faults():
                raise self._diverged(f"while sampling for the evaluation, {next(iter(faults.values()))}")
            scores["score"] = self._scored(problems, exact)
        if settings.through_rollout:
            with self._blaming(prompts):
                deployed = self.engine.generate(prompts, group_size=1, sampling=self.sampling, seed=seed)
            scores["score_rollout"] = self._scored(problems, deployed, keep=not settings.through_trainer)
        return scores

    def _scored(self, problems: Sequence[Problem], rollout: Rollout, *, keep: bool = True) -> float:
        """The mean reward; the first SAMPLES problems with their responses are kept for samples.jsonl."""
        rewards = self.rewards(problems, rollout)
        if keep:
            texts = self.task.tokenizer.batch_decode(rollout.responses[:SAMPLES], skip_special_tokens=True)
            self._samples = [
                {"prompt": problem.prompt, "answer": problem.answer, "response": text, "reward": reward}
                for problem, text, reward in zip(problems, texts, rewards.tolist(), strict=False)
            ]
        return rewards.mean().item()

    def _count_verifier(self) -> dict[str, int]:
        """What the task's verifier could not score so far, in this process: see `VerifierPool`."""
        verifier = getattr(self.task, "verifier", None)
        return {f"verifier_{name}": getattr(verifier, name, 0) for name in ("failures", "restarts")}

    def _new_verifier_counts(self) -> dict[str, int]:
        before, self._verifier_counts = self._verifier_counts, self._count_verifier()
        return {name: count - before[name] for name, count in self._verifier_counts.items()}

    # ------------------------------------------------------------------------------------------- π_old and π_θ

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

    def _update(self, mini_batch: MiniBatch) -> dict[str, Any]:
        """One gradient step on a mini-batch; returns its metrics (on rank 0, elsewhere none)."""
        finite, outputs = True, []
        last = max((i for i, batch in enumerate(mini_batch.parts) if batch.backward), default=-1)
        for i, batch in enumerate(mini_batch.parts):
            with (
                self._experts(batch) as tape,
                torch.set_grad_enabled(batch.backward),
                self._unsynchronised(batch.backward and i < last),
            ):
                output = response_logprobs(self.model, batch.layout, temperature=self.sampling.temperature)
                finite &= bool(torch.isfinite(output.logp).all())
                # In the first mini-batch θ = θ_old: π_old is this very forward.
                logp_old = output.logp.detach() if batch.logp_old is None else batch.logp_old
                if batch.backward:
                    counts = finite and not batch.empty  # else only to keep step with the other ranks
                    part = batch.rollout, batch.advantages, mini_batch
                    loss = self._loss(output.logp, logp_old, *part).loss if counts else output.logp.sum() * 0
                    # Ranks' gradients are averaged, and the loss is a sum over them.
                    self.accelerator.backward(loss * self.ranks.size)
            if tape is not None:
                batch.chosen = tape.routes
            if not batch.empty:
                outputs.append((batch.rows, output.logp.detach(), logp_old, output.entropy))
        if self.ranks.any(not finite):
            raise self._diverged("log-probabilities of the target policy that are not finite")
        reshard(self.model)
        for parameter in self.model.parameters():  # AdamW moves on by its momentum even where there is no gradient
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clipped: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        if not math.isfinite(grad_norm := float(full(clipped))):
            raise self._diverged(f"a gradient norm of {grad_norm}")
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        flips = self._flip_rate(mini_batch.parts)
        per_token = self._collect(outputs, mini_batch)
        if (rollout := mini_batch.rollout) is None:
            return {}
        logp, logp_old, entropy = per_token
        # The loss once more, of the whole mini-batch: its metrics do not depend on how ranks and micro-batches cut it.
        whole = self._loss(logp, logp_old, rollout, mini_batch.advantages, mini_batch)
        metrics = {
            "entropy": masked_mean(entropy, rollout.response_mask),
            **policy_metrics(logp, logp_old, rollout.logp_rollout, rollout.response_mask),
            **whole.metrics,
        }
        return {
            **fetch(metrics),
            "routing_flip_rate": flips,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": mini_batch.tokens,
        }

    def _unsynchronised(self, local: bool) -> AbstractContextManager[None]:
        """Under DDP, gradients travel once for each step, with the last backward."""
        return self.model.no_sync() if local and hasattr(self.model, "no_sync") else nullcontext()

    def _collect(self, outputs: list[tuple[Tensor, ...]], mini_batch: MiniBatch) -> list[Tensor]:
        """log π_θ, log π_old and entropies [B, T] of all ranks, in the rows' order, on rank 0."""
        own, whole = mini_batch.shares[self.ranks.rank], []
        width = self.ranks.most([outputs[0][1].shape[1] if outputs else 0])[0]
        for column in (1, 2, 3):
            dtype = outputs[0][column].dtype if outputs else torch.float32
            local = torch.zeros(len(own), width, dtype=dtype, device=self.ranks.device)
            for output in outputs:
                local[output[0]] = output[column]
            whole.append(self.ranks.gather(local, mini_batch.shares))
        return whole

    def _loss(
        self, logp: Tensor, logp_old: Tensor, rollout: Rollout, advantages: Tensor, mini_batch: MiniBatch
    ) -> PolicyLoss:
        """The objective on a part of the mini-batch, or on all of it. The divisors count the whole, on all ranks."""
        known = {
            **{name: value for name, value in asdict(self.config.algorithm).items() if value is not None},
            "logp": logp,
            "logp_old": logp_old,
            "logp_rollout": rollout.logp_rollout,
            "advantages": advantages,
            "mask": rollout.response_mask,
            "num_responses": mini_batch.responses,
            "num_tokens": mini_batch.tokens,
        }
        parameters = inspect.signature(self.objective.loss).parameters
        return self.objective.loss(**{name: known[name] for name in parameters if name in known})

    def _flip_rate(self, parts: list[MicroBatch]) -> float | None:
        """Share of (token, layer) pairs where the experts used at θ_old differ from the rollout engine's, if known."""
        flips = tokens = unknown = 0.0
        for batch in parts:
            if batch.empty:
                continue
            if batch.chosen is None or batch.rollout.routes is None:
                unknown = 1.0
                continue
            inputs = batch.rollout.inputs
            rate = batch.layout.unpack(batch.chosen).flip_rate(batch.rollout.routes, inputs).mean()
            flips += float(rate) * int(inputs.sum())
            tokens += int(inputs.sum())
        flips, tokens, unknown = self.ranks.sum([flips, tokens, unknown])
        return None if unknown or not tokens else flips / tokens

    # ------------------------------------------------------------------------------------- building and saving

    def save(self) -> Path:
        """Write a checkpoint of everything that the remaining steps depend on, from whatever number of ranks."""
        optimizer, groups = flatten_optimizer(self.optimizer.state_dict())
        model = self._unwrapped
        return save_checkpoint(
            self.out / "checkpoints",
            self.step,
            tensors={"model": untied_state(model), "optimizer": optimizer},
            aliases={"model": dict(model.all_tied_weights_keys)},
            state={
                "global_step": self.step,
                "grad_step": self.grad_step,
                "optimizer": groups,
                "scheduler": self.scheduler.state_dict(),
                "detector": self.detector.state_dict(),
            },
            keep_last=self.config.output.keep_last,
            first=self.ranks.first,
        )

    @torch.no_grad()
    def _restore(self) -> None:
        """Take up the newest intact checkpoint, whatever number of ranks wrote it; each keeps its part."""
        folder, found = self.out / "checkpoints", None
        if self.ranks.first:
            path = latest_checkpoint(folder)
            found = torch.tensor([-1 if path is None else checkpoint_step(path)])
        step = int(self.ranks.broadcast(found)[0])
        if step >= 0:
            tensors, state = load_checkpoint(checkpoint_path(folder, step), verify=False)
            ours, theirs = self._unwrapped.state_dict(), tensors["model"]
            if wrong := ours.keys() ^ theirs.keys():
                raise CheckpointError(f"{folder}: another model's: {sorted(wrong)[0]} is only in one of them")
            for name, tensor in ours.items():
                tensor.copy_(like(theirs[name], tensor))
            saved = unflatten_optimizer(tensors["optimizer"], state["optimizer"])
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for i, parameter in enumerate(parameters):
                moments = saved["state"].get(i, {})
                for name, value in moments.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                        moments[name] = like(value, parameter)
            self.optimizer.load_state_dict(saved)
            self.scheduler.load_state_dict(state["scheduler"])
            self.detector.load_state_dict(state["detector"])
            self.step, self.grad_step = state["global_step"], state["grad_step"]
        for path in (self._metrics_path, self.out / "samples.jsonl") if self.ranks.first else ():
            if path.exists():
                _cut_back(path, self.step or -1)  # without a checkpoint the run begins again, with an evaluation

    def _open_folder(self, resume: bool) -> None:
        """Refuse a folder that holds a run, or another one than this, or that another process writes to."""
        self._lock = lock_folder(self.out)
        config_path = self.out / "config.yaml"
        if self._metrics_path.exists() or config_path.exists():
            if not resume:
                raise FileExistsError(f"{self.out} already holds a run: go on with --resume, or choose another --out")
            _same_run(load_config(config_path), self.config)

    def _start_folder(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.out / "config.yaml")
        (self.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        if self.config.output.trackers:
            self.accelerator.init_trackers("minirl", config=_flat(self.config.to_dict()))

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self.ranks.first:
            return
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if lines and "score" in lines[-1]:
            evaluated = {key: lines[-1][key] for key in ("global_step", "grad_step")} | {"samples": self._samples}
            with (self.out / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(evaluated) + "\n")
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
        line = {"global_step": self.step + 1, "grad_step": self.grad_step + 1, "warnings": [message]}
        self._write([*self._unwritten, line])
        self._unwritten = []
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
            replay = RoutingReplay(model)
            with torch.no_grad(), evaluating(model), replay.record():  # some refuse only when they run
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
            return replay
        except UnsupportedRouter as error:
            if self.config.algorithm.replay != "none":
                raise ConfigError(f"algorithm.replay = {self.config.algorithm.replay!r}: {error}") from error
            return None


_ENOUGH = 0.9  # share of the weights that a step has to be able to move, or a warning says that it cannot
_ATTEMPTS = 100  # draws of a step's problems, where prompts are too long


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""The schedules whose learning rate at a step does not depend on how many steps the run has."""


def _same_run(saved: Config, config: Config) -> None:
    """Refuse to resume under other settings: the result would be neither run. The output may change, and the length
    where the learning rate does not depend on it."""
    old, new = (_flat(c.to_dict()) for c in (saved, config))
    steps, schedule = config.train.global_steps, saved.train.lr_schedule
    if steps != saved.train.global_steps and schedule not in LENGTHLESS:
        raise ConfigError(
            f"train.global_steps = {steps} (was {saved.train.global_steps}): under train.lr_schedule {schedule!r} the "
            f"learning rate of the steps already made belongs to the old length; resume with {saved.train.global_steps}"
            f", or start the longer run in another --out (the schedules {', '.join(LENGTHLESS)} can be resumed for "
            "longer)"
        )
    free = {"train.global_steps", "model.expert_parallel"}  # and what says how, not what
    free |= {name for name in old if name.startswith(("output.", "ranks."))}
    if config.rollout.engine == "vllm_server":
        free.add("rollout.options")  # where the server is, and how weights get there
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
    """Drop the lines of global steps after `step`, and the last line of a killed run if it is cut short."""
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


def _resume(out: Path) -> str:
    return f"minirl train --resume --out {out}"


@contextmanager
def _stop_request(speak: bool) -> Iterator[threading.Event]:
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
        if speak:
            tqdm.write("stopping: this global step is finished and saved first (again to stop at once)")

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
