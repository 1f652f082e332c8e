"""The measurements. Each returns plain numbers, one per round: `seconds`, `ratios` and `shares` by name, and `facts`.

What is compared takes turns within every round, so that a drift of the machine meets all alike, and ratios are taken
round by round. The learning rate is 0: the weights, and with them the lengths of the responses, stay what they are.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arithmetic import matmul_rate, step_flops
from minirl_edu.config import load_config
from minirl_edu.logprobs import response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.rollout import Rollout
from minirl_edu.seeding import derive_seed
from minirl_edu.trainer import MiniRLTrainer

COLD_START, PRECISION, PROMPTS, GROUP_SIZE = "chain-steps", "fp8_e4m3", 32, 8
WARMUP = 2
Result = dict[str, dict[str, Any]]


def step(rounds: int, *, seed: int = 0) -> Result:
    """A global step of `minirl_edu` against one of TRL's GRPOTrainer, and against its arithmetic.

    Same weights, prompts, batch, temperature and limit of length; TRL without reference model, in fp32, one optimiser
    step per generation. TRL's step runs from one `on_step_end` to the next (data, generation and update), less our step
    and the matrix products, which run inside that callback.
    """
    with TemporaryDirectory() as folder:
        ours = _trainer(Path(folder) / "minirl", seed)
        clock, rate = _Clock(ours), matmul_rate(seed)
        config = ours.model.config
        seconds: dict[str, list[float]] = defaultdict(list)
        shares: dict[str, list[float]] = defaultdict(list)
        facts: dict[str, Any] = defaultdict(list)
        ratios: dict[str, list[float]] = defaultdict(list)

        def our_turn(trl_seconds: float, trl_lengths: list[int]) -> None:
            spent = clock.time(ours.global_step)
            flops_per_second, total = rate(), spent.pop("total")
            lengths = clock.rollout.response_mask.sum(1)
            flops = step_flops(
                config, prompt_length=clock.rollout.prompt_length, lengths=lengths, group_size=GROUP_SIZE
            )
            seconds["minirl_edu"].append(total)
            seconds["TRL"].append(trl_seconds)
            ratios["TRL / minirl_edu"].append(trl_seconds / total)
            for count, number in flops.items():
                bound = number / flops_per_second
                seconds[f"arithmetic, {count}"].append(bound)
                ratios[f"minirl_edu / arithmetic, {count}"].append(total / bound)
                facts[f"GFLOP, {count}"].append(number / 1e9)
            facts["GFLOP per second, large matmul"].append(flops_per_second / 1e9)
            facts["responses, minirl_edu"].append(len(lengths))
            facts["responses, TRL"].append(len(trl_lengths))
            facts["response length, minirl_edu"].append(lengths.float().mean().item())
            facts["response length, TRL"].append(sum(trl_lengths) / len(trl_lengths))
            for part, time_spent in spent.items():
                shares[part].append(time_spent / total)
            shares["rewards, bookkeeping"].append(1 - sum(spent.values()) / total)

        _trl(ours, rounds, Path(folder) / "trl", seed, our_turn)
    cut = [seconds, ratios, shares, facts]
    seconds, ratios, shares, facts = ({k: v[WARMUP:] for k, v in part.items()} for part in cut)
    return {"seconds": seconds, "ratios": ratios, "shares": shares, "facts": facts}


def replay(rounds: int, *, seed: int = 0) -> Result:
    """Forward and backward of one rollout's responses, as they route, recording routes, and replaying them."""
    with TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), seed)
    assert trainer.replay is not None
    replay, (rollout, advantages) = trainer.replay, _rollout(trainer, seed)
    (batch,) = trainer._cut(rollout, advantages)  # the trainer's own layout; the rollout fits one micro-batch
    assert rollout.routes is not None
    routes = batch.layout.pack(rollout.routes)

    def update(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            with context():
                logp = response_logprobs(trainer.model, batch.layout).logp
                minirl_loss(
                    logp, logp.detach(), rollout.logp_rollout, advantages, rollout.response_mask
                ).loss.backward()
            trainer.optimizer.zero_grad()

        return forward_and_backward

    cases = {"native": nullcontext, "recording": replay.record, "replaying": lambda: replay.replay(routes)}
    seconds = _take_turns({name: update(context) for name, context in cases.items()}, rounds, "replay")
    return {
        "seconds": seconds,
        "ratios": {f"{name} / native": _ratios(seconds, name, "native") for name in ("recording", "replaying")},
        "facts": {"bytes of routes per token, L·k": routes.experts[0, 0].nbytes},
    }


def own_pi_old(rounds: int, *, seed: int = 0) -> Result:
    """What it saves to take π_old from the update's own forward, and to read each prompt once in the update."""
    with TemporaryDirectory() as folder:
        own = _trainer(Path(folder) / "own", seed)
        forward = _trainer(Path(folder) / "forward", seed, "train.reference_old_logp=true")
    rollout, advantages = _rollout(own, seed)

    def update(share_prompts: bool) -> Callable[[], None]:
        def gradient_step() -> None:
            own.share_prompts = share_prompts
            own._update(own._cut(rollout, advantages))
            own.share_prompts = True

        return gradient_step

    cases = {
        "step, π_old from the update": own.global_step,
        "step, π_old by a forward": forward.global_step,
        "update, prompts shared": update(True),
        "update, plain batch": update(False),
    }
    seconds = _take_turns(cases, rounds, "own_pi_old")
    names = list(cases)
    pairs = ((names[1], names[0]), (names[3], names[2]))
    return {"seconds": seconds, "ratios": {f"{a} / {b.split(', ')[1]}": _ratios(seconds, a, b) for a, b in pairs}}


BENCHMARKS: dict[str, Callable[..., Result]] = {"step": step, "replay": replay, "own_pi_old": own_pi_old}
"""Every measurement by name."""


def _trainer(out: Path, seed: int, *overrides: str) -> MiniRLTrainer:
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
    return MiniRLTrainer(load_config(None, settings), out, progress=False)


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
    """Times the parts of a global step from outside, and keeps the rollout that went through it."""

    PARTS = {"generate": "sample", "_cut": "update", "_update": "update", "sync": "sync"}
    rollout: Rollout

    def __init__(self, trainer: MiniRLTrainer) -> None:
        self._spent: dict[str, float] = {}
        for name, part in self.PARTS.items():
            owner = trainer if hasattr(trainer, name) else trainer.engine
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def time(self, step: Callable[[], Any]) -> dict[str, float]:
        """Seconds of the parts of one `step`, and of its `total`."""
        self._spent = dict.fromkeys(self.PARTS.values(), 0.0)
        started = time.perf_counter()
        step()
        return self._spent | {"total": time.perf_counter() - started}

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - started
            if isinstance(result, Rollout):
                self.rollout = result
            return result

        return timed


def _trl(
    ours: MiniRLTrainer, rounds: int, out: Path, seed: int, our_turn: Callable[[float, list[int]], None]
) -> None:
    """Run TRL's GRPOTrainer on the same prompts; after each of its steps, `our_turn(seconds, response lengths)`."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"benchmark 'step' compares with TRL ({error}): pip install -e '.[dev]'") from error

    problems = [problem for round_ in range(WARMUP + rounds) for problem in _problems(ours, round_)]
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], problem: list[int], **_: Any) -> list[float]:
        lengths[:] = map(len, completion_ids)
        return [ours.task.reward(problems[i], text) for i, text in zip(problem, completions, strict=True)]

    class TakeTurns(TrainerCallback):
        since = time.perf_counter()
        bar = tqdm(total=WARMUP + rounds, desc="step", unit="round", leave=False)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            our_turn(time.perf_counter() - self.since, list(lengths))
            self.bar.update()
            self.since = time.perf_counter()

    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=ours.sampling.max_new_tokens,
        temperature=ours.sampling.temperature,
        beta=0.0,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        max_steps=WARMUP + rounds,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trl = GRPOTrainer(
        model=load_model(COLD_START),
        processing_class=load_tokenizer(COLD_START),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(len(problems)))}),
        callbacks=[turns := TakeTurns()],
    )
    trl.remove_callback(PrinterCallback)
    trl.train()
    turns.bar.close()
