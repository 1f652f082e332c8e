"""MiniRL's training loop, section 4.2 of arXiv 2512.01374, on one process or several (ranks).

One global step, synchronous:

    1. sample     N · mini_batch_prompts prompts × G responses from the rollout engine, y ~ μ_old, and verify them
    2. π_old      log-probabilities under the same weights θ_old in the training engine
    3. update     N gradient steps, one for each mini-batch, on the loss that `algorithm.objective` names
    4. sync       the final weights become the engine's next θ_old

The first mini-batch is updated at θ = θ_old, so its π_old is the update's own forward, detached; only the others need a
forward for it. Groups whose responses were all rewarded alike have no gradient and get a forward only
(`train.zero_advantage_backward` runs the backward of all).

Under `accelerate launch` rank 0 samples, verifies and writes; each rank updates on its share of every mini-batch
(`ranks.RankedBatcher`). The divisor of the loss is that of the whole mini-batch, so the gradient does not depend on the
number of ranks.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from minirl_edu.batches import MicroBatch, MiniBatch, Sampled, count_flips, trainable_groups
from minirl_edu.diagnostics import entropy_drift, fetch, length_reward_cov, masked_mean, policy_metrics, score_error
from minirl_edu.logprobs import response_logprobs
from minirl_edu.models import vocabulary_size
from minirl_edu.objectives import PolicyLoss
from minirl_edu.rollout import Environment, Rollout, play, sample
from minirl_edu.rollout.hf import suppressed_mask
from minirl_edu.routing import Tape
from minirl_edu.run.divergence import TrainingDiverged
from minirl_edu.run.loop import TrainingRun, due
from minirl_edu.seeding import derive_seed
from minirl_edu.streaming import full_state, gather_full, is_sharded, reshard, take_part
from minirl_edu.tasks import Episodic, Problem, VerifiedAhead, verified_rewards, verifier_counts

__all__ = ["MiniRLTrainer", "TrainingDiverged"]

SAMPLES = 3
"""Held-out problems whose responses are kept at each evaluation."""


class MiniRLTrainer(TrainingRun):
    """Trains `model` on `task` as `config` says, into the folder `out`.

    The folder receives config.yaml, metrics.jsonl (one line per gradient step), samples.jsonl (one line per evaluation:
    the first problems, what the model answered and its reward), environment.json and checkpoints/.
    `model`, `task` and `engine` are built from the config unless given; an engine that was built is closed when `train`
    ends. The model gets the end tokens of the task's tokenizer, and gives no probability to ids that the tokenizer does
    not know (`adopt_tokenizer`). `resume=True` goes on from the newest intact checkpoint, to the same metrics and
    weights, bit for bit, as an undisturbed run. `on_step` is called after each global step with its lines of metrics.

    Raises ConfigError for settings that do not fit together and FileExistsError if `out` already holds a run.
    """

    def global_step(self) -> list[dict[str, Any]]:
        """One global step; returns the metrics of its gradient steps (on rank 0, elsewhere none)."""
        self.need_engine()
        started = time.perf_counter()
        self.reached("sampling" if self.ranks.is_main else "waiting for the rollout")
        sampled, counts = self._sample() if self.ranks.is_main else (None, {})
        mini_batches = self.batcher.cut(sampled, self.compute_advantages)  # type: ignore[arg-type]
        for mini_batch in mini_batches[1:]:
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
        if due(self.step, every) or (every and last):
            with self.keeping(lines):
                lines[-1] |= self.evaluate()
        if not self.ranks.is_main:
            return []
        lines[0] |= counts
        return self.warned(lines)

    # -------------------------------------------------------------------------------------------- rollout and rewards

    def _sample(self) -> tuple[Sampled, dict[str, Any]]:
        """Rank 0's part: the responses that can be trained on, their rewards, and what to count of them.

        Raises EngineError as `trainable_groups` does; TrainingDiverged if that is the policy's own fault.
        """
        settings, model = self.config.train, self.unwrapped
        problems, prompts, overlong = self.prompts.draw(self.step)
        seed = derive_seed(self.config.seed, "rollout", self.step)
        with self.blaming(prompts[0]), self._verifying(problems, settings.group_size):
            rollout = play(
                self.engine,
                prompts,
                group_size=settings.group_size,
                sampling=self.sampling,
                seed=seed,
                environment=self._environment(problems),
            ).compact()
            kept, groups = trainable_groups(
                rollout,
                mini_batches=settings.mini_batches,
                drop=self.config.rollout.on_fault == "drop",
                num_experts=None if self.replay is None else self.replay.num_experts,
                suppressed=suppressed_mask(model, vocabulary_size(model), torch.device("cpu")),
            )
        if dropped := len(problems) - len(kept):
            rollout = rollout.without(set(range(len(problems))) - set(kept))
            problems = [problems[group] for group in kept]
        sampled = Sampled(rollout, self.rewards(problems, rollout), groups)
        before, self.verifier_counts = self.verifier_counts, verifier_counts(self.task)
        return sampled, {
            "dropped_groups": dropped,
            "overlong_prompts": overlong,
            **{name: count - before[name] for name, count in self.verifier_counts.items()},
            "bytes_per_token": rollout.bytes_per_token(),
        }

    def _environment(self, problems: Sequence[Problem]) -> Environment | None:
        """The task's, if it is `Episodic`."""
        task = self.task
        return (lambda i, response: task.respond(problems[i], response)) if isinstance(task, Episodic) else None

    @contextmanager
    def _verifying(self, problems: Sequence[Problem], group_size: int) -> Iterator[None]:
        """Inside, responses are verified as they arrive, if the engine tells of them and the task can begin early.

        `rewards` then waits for the last ones only, and returns the same. Turns of an episode are no whole responses.
        """
        engine, task = self.engine, self.task
        if not hasattr(engine, "on_response") or not isinstance(task, VerifiedAhead) or isinstance(task, Episodic):
            yield
            return
        before = engine.on_response

        def begin(row: int, tokens: list[int]) -> None:
            before(row, tokens)
            (text,) = task.tokenizer.batch_decode([tokens], skip_special_tokens=True)
            task.begin(problems[row // group_size], text)

        engine.on_response = begin
        try:
            yield
        finally:
            engine.on_response = before

    def rewards(self, problems: Sequence[Problem], rollout: Rollout) -> Tensor:
        """The verifier's rewards [B] of the responses, in [0, 1]."""
        self.reached("verifying")
        texts = self.task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        asked = [problems[row // rollout.group_size] for row in range(len(texts))]
        return torch.tensor(verified_rewards(self.task, asked, texts))

    # ------------------------------------------------------------------------------------------- π_old, π_θ, sync

    @torch.no_grad()
    def _old_logprobs(self, batch: MicroBatch) -> None:
        """log π_old in a forward of its own, in the update's layout, under the engine's experts (R3) or the model's."""
        self.reached("log-probabilities of the old policy")
        with self._experts(batch) as tape:
            layout = batch.layout.to(self.ranks.device)
            batch.logp_old = response_logprobs(self.model, layout, temperature=self.sampling.temperature).logp.cpu()
        if tape is not None:
            batch.routes_old = tape.routes.to("cpu")
            if self.config.algorithm.replay == "R2":
                batch.routes_forced = batch.routes_old

    def _experts(self, batch: MicroBatch) -> AbstractContextManager[Tape | None]:
        """The context of a forward (and its backward): replay what is forced, else record what is needed (by R2, or to
        compare with the engine's) and not known yet."""
        if self.replay is None:
            return nullcontext()
        if batch.routes_forced is not None:
            return self.replay.replay(batch.routes_forced.to(self.ranks.device))
        needed = self.config.algorithm.replay == "R2" or batch.rollout.routes is not None
        return self.replay.record() if needed and batch.routes_old is None else nullcontext()

    def _update(self, mini_batch: MiniBatch) -> dict[str, Any]:
        """One gradient step on a mini-batch; returns its metrics (on rank 0, elsewhere none)."""
        finite, outputs, device = True, [], self.ranks.device
        last = max((i for i, batch in enumerate(mini_batch.parts) if batch.has_gradient), default=-1)
        for i, batch in enumerate(mini_batch.parts):
            self.reached(f"updating, micro-batch {i + 1} of {len(mini_batch.parts)}")
            with (
                self._experts(batch) as tape,
                torch.set_grad_enabled(batch.has_gradient),
                self._unsynchronised(batch.has_gradient and i < last),
            ):
                layout = batch.layout.to(device)
                output = response_logprobs(self.model, layout, temperature=self.sampling.temperature)
                finite &= bool(torch.isfinite(output.logp).all())
                # In the first mini-batch θ = θ_old: π_old is this very forward.
                logp_old = output.logp.detach() if batch.logp_old is None else batch.logp_old.to(device)
                if batch.has_gradient:
                    counts = finite and not batch.empty  # else only to keep step with the other ranks
                    part = replace(batch.rollout, routes=None).to(device), batch.advantages.to(device), mini_batch
                    loss = self._loss(output.logp, logp_old, *part).loss if counts else output.logp.sum() * 0
                    # Ranks' gradients are averaged, and the loss is a sum over them.
                    self.accelerator.backward(loss * self.ranks.size)
            if tape is not None:
                batch.routes_old = tape.routes.to("cpu")
            if not batch.empty:
                own = (output.logp.detach(), logp_old, output.entropy)
                outputs.append((batch.rows, *(tensor.cpu() for tensor in own)))
        if self.ranks.any(not finite):
            raise self.diverged("log-probabilities of the target policy that are not finite")
        grad_norm, lr = self._optimizer_step()

        flips, tokens, unknown = self.ranks.all_reduce(count_flips(mini_batch.parts), "sum")
        logp, logp_old, entropy = self.batcher.collect(outputs, mini_batch)
        if (rollout := mini_batch.rollout) is None:
            return {}
        # The loss once more, of the whole mini-batch: its metrics do not depend on how ranks and micro-batches cut it.
        whole = self._loss(logp, logp_old, rollout, mini_batch.advantages, mini_batch)
        metrics = {
            "entropy": masked_mean(entropy, rollout.response_mask),
            **policy_metrics(logp, logp_old, rollout.logp_rollout, rollout.response_mask),
            "length_reward_cov": length_reward_cov(mini_batch.rewards, rollout.response_mask, self.batcher.group_size),
            "entropy_drift": entropy_drift(
                logp, rollout.logp_rollout, entropy, mini_batch.advantages, rollout.response_mask
            ),
            **whole.metrics,
        }
        return {
            **fetch(metrics),
            "routing_flip_rate": None if unknown or not tokens else flips / tokens,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": mini_batch.tokens,
        }

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

    def _optimizer_step(self) -> tuple[float, float]:
        """Clip the gradient's norm and step; returns that norm and the learning rate of the step."""
        self.reached("stepping")
        reshard(self.model)
        for parameter in self.model.parameters():  # AdamW moves on by its momentum even where there is no gradient
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clipped: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        if not math.isfinite(grad_norm := float(gather_full(clipped))):
            raise self.diverged(f"a gradient norm of {grad_norm}")
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, lr

    def _unsynchronised(self, local: bool) -> AbstractContextManager[None]:
        """Under DDP, gradients travel once for each step, with the last backward."""
        return self.model.no_sync() if local and hasattr(self.model, "no_sync") else nullcontext()

    def _sync(self) -> None:
        """The engine's θ_old becomes θ. Sharded weights are made whole one at a time, which takes all ranks."""
        self.reached("giving the engine the weights")
        if self.config.rollout.options.get("sleep") and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server wakes up on these GPUs, and needs what is only cached here
            self.ranks.barrier()
        if self.ranks.is_main:
            self.engine.sync(self.unwrapped, version=self.step)
        else:
            take_part(self.unwrapped)

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> dict[str, float | None]:
        """Mean reward on held-out problems: `eval.samples` of each, at the training temperature, the same seeds every
        time.

        `score`: sampled by the training engine in full precision (None if `eval.through_trainer` is off);
        `score_rollout`: through the rollout engine. Each with its standard error (`_se`, see `score_error`), and of
        several samples the mean of each problem's best as `pass_at_k`. Rank 0 evaluates; all ranks have to call this.
        """
        self.reached("evaluating")
        model, through_trainer = self.unwrapped, self.config.eval.through_trainer
        if through_trainer and is_sharded(model):
            if self.unsharded is None:
                take_part(model)
            else:
                state = self.unsharded.state_dict()
                for name, tensor in full_state(model):
                    state[name].copy_(tensor)
                model = self.unsharded
        if not self.ranks.is_main:
            return {}
        self.need_engine()
        problems, prompts = self.prompts.held_out()

        def exact(**asked: Any) -> Rollout:
            rollout = sample(model, prompts, **asked, keep_faulty=True)
            if faults := rollout.faults():
                raise self.diverged(f"while sampling for the evaluation, {next(iter(faults.values()))}")
            return rollout

        def deployed(**asked: Any) -> Rollout:
            with self.blaming(prompts[0]):
                return play(self.engine, prompts, **asked)

        scores: dict[str, float | None] = {"score": None}
        if through_trainer:
            scores |= self._scored(problems, exact, "")
        return scores | self._scored(problems, deployed, "_rollout", keep=not through_trainer)

    def _scored(
        self, problems: Sequence[Problem], draw: Callable[..., Rollout], engine: str, *, keep: bool = True
    ) -> dict[str, float | None]:
        """The scores of what `draw` samples, under names with `engine`. The first SAMPLES problems with their first
        responses are kept for samples.jsonl."""
        environment, parts = self._environment(problems), []
        for i, size in enumerate(self.config.evaluation_rounds):
            seed = derive_seed(self.config.seed, "evaluation", i)
            with self._verifying(problems, size):
                rollout = draw(group_size=size, sampling=self.sampling, seed=seed, environment=environment)
            parts.append(self.rewards(problems, rollout).view(-1, size))
            if keep and i == 0:
                first = rollout.responses[::size][:SAMPLES]
                texts = self.task.tokenizer.batch_decode(first, skip_special_tokens=True)
                self.samples = [
                    {"prompt": problem.prompt, "answer": problem.answer, "response": text, "reward": reward}
                    for problem, text, reward in zip(problems, texts, parts[0][:, 0].tolist(), strict=False)
                ]
        rewards = torch.cat(parts, 1)
        error = None if len(rewards) == 1 else score_error(rewards).item()
        scores = {f"score{engine}": rewards.mean().item(), f"score{engine}_se": error}
        return scores if rewards.shape[1] == 1 else scores | {f"pass_at_k{engine}": rewards.amax(1).mean().item()}
