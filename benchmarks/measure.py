"""The measurements. Each returns plain numbers, one per round: `seconds`, `ratios` and `shares` by name, and `facts`.

What is compared takes turns within every round, so that a drift of the machine meets all alike, and ratios are taken
round by round. The learning rate is 0: the weights, and with them the lengths of the responses, stay what they are.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arithmetic import matmul_rate, step_flops
from benchmarks.memory import memory
from benchmarks.rollouts import rollouts
from minirl_edu.batches import MiniBatch, Sampled
from minirl_edu.config import load_config
from minirl_edu.logprobs import response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes
from minirl_edu.seeding import derive_seed
from minirl_edu.trainer import MiniRLTrainer

COLD_START, PRECISION, PROMPTS, GROUP_SIZE = "chain-steps", "fp8_e4m3", 32, 8
WARMUP = 2
Result = dict[str, dict[str, list[float]]]


def step(rounds: int, *, seed: int = 0) -> Result:
    """A global step of minirl_edu against one of TRL's GRPOTrainer, and against its own arithmetic.

    Same weights, prompts, batch, temperature and limit of length; TRL in fp32, without reference model, one optimiser
    step per generation. TRL does less: no rounding to fp8, no routes. Its step runs from one `on_step_end` to the next
    (data, generation, update), without our step and the matrix products, which take their turn inside that callback.
    """
    result: Result = {name: defaultdict(list) for name in ("seconds", "ratios", "shares", "facts")}

    def keep(kind: str, **values: float) -> None:
        for name, value in values.items():
            result[kind][name].append(value)

    with TemporaryDirectory() as folder:
        ours = _trainer(Path(folder) / "minirl", seed)
        clock, rate = _Clock(ours), matmul_rate(seed)

        def our_turn(trl_seconds: float, trl_lengths: list[int]) -> None:
            seconds, spent = clock.time(ours.global_step)
            flops_per_second = rate()
            keep("seconds", minirl_edu=seconds, TRL=trl_seconds)
            keep("ratios", **{"TRL / minirl_edu": trl_seconds / seconds})
            rollout = clock.rollout
            lengths = rollout.response_mask.sum(1)
            flops = step_flops(
                ours.model.config, prompt_length=rollout.prompt_length, lengths=lengths, group_size=GROUP_SIZE
            )
            for count, number in flops.items():
                bound = number / flops_per_second
                keep("seconds", **{f"arithmetic, {count}": bound})
                keep("ratios", **{f"minirl_edu / arithmetic, {count}": seconds / bound})
                keep("shares", **{f"arithmetic, {count}": bound / seconds})
                keep("facts", **{f"GFLOP, {count}": number / 1e9})
            parts = {part: time_spent / seconds for part, time_spent in spent.items()}
            keep("shares", **parts, **{"rewards, bookkeeping": 1 - sum(parts.values())})
            keep("facts", **{"GFLOP per second, large matmul": flops_per_second / 1e9})
            for name, of in (("minirl_edu", lengths.tolist()), ("TRL", trl_lengths)):
                keep("facts", **{f"responses, {name}": len(of), f"mean response length, {name}": sum(of) / len(of)})

        _run_trl(ours, rounds, Path(folder) / "trl", seed, our_turn)
    return {kind: {name: values[WARMUP:] for name, values in part.items()} for kind, part in result.items()}


def replay(rounds: int, *, seed: int = 0) -> Result:
    """Forward and backward of one rollout's responses, as they route, recording routes, and replaying them."""
    with TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), seed)
    assert trainer.replay is not None
    recorder, (rollout, advantages) = trainer.replay, _rollout(trainer, seed)
    assert rollout.routes is not None
    batches = _cut(trainer, rollout, advantages).parts  # the trainer's own layout
    routes = [batch.layout.pack(batch.rollout.routes) for batch in batches if batch.rollout.routes is not None]

    def update(context: Callable[[Routes], AbstractContextManager[Any]]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            for batch, its_routes in zip(batches, routes, strict=True):
                with context(its_routes):
                    logp = response_logprobs(trainer.model, batch.layout).logp
                    part = batch.rollout
                    minirl_loss(
                        logp,
                        logp.detach(),
                        part.logp_rollout,
                        batch.advantages,
                        part.response_mask,
                        num_responses=len(advantages),
                    ).loss.backward()
            trainer.optimizer.zero_grad()

        return forward_and_backward

    cases = {
        "native": update(lambda _: nullcontext()),
        "recording": update(lambda _: recorder.record()),
        "replaying": update(recorder.replay),
    }
    seconds = _take_turns(cases, rounds, "replay")
    return {
        "seconds": seconds,
        "ratios": {f"{name} / native": _ratios(seconds, name, "native") for name in ("recording", "replaying")},
        "facts": {"bytes of routes per token, L·k": [rollout.routes.experts[0, 0].nbytes]},
    }


def _cut(trainer: MiniRLTrainer, rollout: Rollout, advantages: torch.Tensor, share_prompts: bool = True) -> MiniBatch:
    """The rollout as one mini-batch with these advantages."""
    batcher = replace(trainer.batcher, share_prompts=share_prompts, pack=False, mini_batches=1)
    return batcher.cut(Sampled(rollout, advantages, [len(rollout.prompts)]), lambda rewards, group_size: rewards)[0]


class SeparateForward(MiniRLTrainer):
    """Runs a forward of its own for every π_old, the first mini-batch's included."""

    def _update(self, mini_batch: MiniBatch) -> dict[str, Any]:
        for batch in mini_batch.parts:
            if batch.logp_old is None:
                self._old_logprobs(batch)
        return super()._update(mini_batch)


def own_pi_old(rounds: int, *, seed: int = 0) -> Result:
    """What it saves to take π_old from the update's own forward, to read each prompt once in the update, and to leave
    out the backward of groups without a gradient: here every second group."""
    with TemporaryDirectory() as folder:
        own = _trainer(Path(folder) / "own", seed)
        forward = _trainer(Path(folder) / "forward", seed, kind=SeparateForward)
        backward = _trainer(Path(folder) / "backward", seed, "train.zero_advantage_backward=true")
    rollout, advantages = _rollout(own, seed)
    halved = advantages.clone()
    halved.view(-1, GROUP_SIZE)[::2] = 0

    def update(
        share_prompts: bool, trainer: MiniRLTrainer = own, advantages: torch.Tensor = advantages
    ) -> Callable[[], None]:
        def gradient_step() -> None:
            trainer._update(_cut(trainer, rollout, advantages, share_prompts=share_prompts))

        return gradient_step

    cases = {
        "step, own π_old": own.global_step,
        "step, forward for π_old": forward.global_step,
        "update, shared prompts": update(True),
        "update, plain batch": update(False),
        "update, half without gradient": update(True, own, halved),
        "update, half without gradient, backward of all": update(True, backward, halved),
    }
    seconds = _take_turns(cases, rounds, "own_pi_old")
    a, b, c, d, e, f = cases
    ratios = {
        "forward for π_old / own": _ratios(seconds, b, a),
        "plain batch / shared prompts": _ratios(seconds, d, c),
        "backward of all / of half": _ratios(seconds, f, e),
    }
    return {"seconds": seconds, "ratios": ratios}


BENCHMARKS: dict[str, Callable[..., Result]] = {
    "step": step,
    "replay": replay,
    "own_pi_old": own_pi_old,
    "memory": memory,
    "rollouts": rollouts,
}
"""Every measurement by name."""


def _trainer(out: Path, seed: int, *overrides: str, kind: type[MiniRLTrainer] = MiniRLTrainer) -> MiniRLTrainer:
    settings = (
        f"seed={seed}",
        f"model.name={COLD_START}",
        f"rollout.precision={PRECISION}",
        f"train.mini_batch_prompts={PROMPTS}",
        f"train.group_size={GROUP_SIZE}",
        "train.lr=0",
        "eval.every=0",
        *overrides,
    )
    return kind(load_config(None, settings), out, progress=False)


def _problems(trainer: MiniRLTrainer, round_: int) -> list[Any]:
    """The problems of the trainer's own global step number `round_`."""
    return trainer.task.sample(PROMPTS, seed=derive_seed(trainer.config.seed, "problems", round_))


def _rollout(trainer: MiniRLTrainer, seed: int) -> tuple[Rollout, torch.Tensor]:
    problems = _problems(trainer, 0)
    prompts = [trainer.task.encode(problem) for problem in problems]
    rollout = trainer.engine.generate(prompts, group_size=GROUP_SIZE, sampling=trainer.sampling, seed=seed)
    return rollout, trainer.compute_advantages(trainer.rewards(problems, rollout), GROUP_SIZE)


def _take_turns(cases: dict[str, Callable[[], Any]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each case, once a round; a round begins with another case than the one before it."""
    names, seconds = list(cases), {name: [] for name in cases}
    for round_ in tqdm(range(WARMUP + rounds), title, unit="round", leave=False):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[WARMUP:] for name, values in seconds.items()}


def _ratios(seconds: dict[str, list[float]], a: str, b: str) -> list[float]:
    return [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]


class _Clock:
    """Times the parts of a trainer's global step from outside, and keeps the rollout that went through it."""

    rollout: Rollout

    def __init__(self, trainer: MiniRLTrainer) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._watch(trainer.engine, "generate", "sample")
        self._watch(trainer.batcher, "cut", "update")
        self._watch(trainer, "_update", "update")
        self._watch(trainer.engine, "sync", "sync")

    def time(self, step: Callable[[], Any]) -> tuple[float, dict[str, float]]:
        """Seconds of one `step`, and of its parts."""
        self._spent.clear()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started, dict(self._spent)

    def _watch(self, owner: Any, name: str, part: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self._spent[part] += time.perf_counter() - started
            if isinstance(result, Rollout):
                self.rollout = result
            return result

        setattr(owner, name, timed)


def _run_trl(
    ours: MiniRLTrainer, rounds: int, out: Path, seed: int, our_turn: Callable[[float, list[int]], None]
) -> None:
    """Run TRL's GRPOTrainer on our trainer's problems; after each step, `our_turn(seconds, lengths of responses)`."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"benchmark 'step' compares with TRL: {error}; pip install -e '.[tasks,dev]'") from error

    rounds += WARMUP
    problems = [problem for round_ in range(rounds) for problem in _problems(ours, round_)]
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(len(problems)))})
    lengths: list[int] = []

    def reward(
        completions: list[str], completion_ids: list[list[int]], problem: list[int], **_: Any
    ) -> list[float | None]:
        lengths[:] = map(len, completion_ids)
        return [ours.task.reward(problems[i], text) for i, text in zip(problem, completions, strict=True)]

    with tqdm(total=rounds, desc="step", unit="round", leave=False) as bar:

        class TakeTurns(TrainerCallback):
            since = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                our_turn(time.perf_counter() - self.since, list(lengths))
                bar.update()
                self.since = time.perf_counter()

        trl = GRPOTrainer(
            model=load_model(COLD_START),
            processing_class=load_tokenizer(COLD_START),
            reward_funcs=reward,
            train_dataset=dataset,
            callbacks=[TakeTurns()],
            args=GRPOConfig(
                output_dir=str(out),
                per_device_train_batch_size=PROMPTS * GROUP_SIZE,
                num_generations=GROUP_SIZE,
                max_completion_length=ours.sampling.max_new_tokens,
                temperature=ours.sampling.temperature,
                beta=0.0,
                learning_rate=0.0,
                max_steps=rounds,
                shuffle_dataset=False,
                # TRL's defaults are bf16 and gradient checkpointing; both would slow it down here.
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
        )
        trl.remove_callback(PrinterCallback)
        trl.train()
