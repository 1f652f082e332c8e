"""MiniRL in TRL: the loss on fixed tensors, and twenty steps of the real trainer with R2 on a tiny MoE."""

import functools
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.objectives import minirl_loss
from minirl_edu.plugins import PAPER, Choices
from minirl_edu.precision import Precision
from minirl_edu.rollout import HFEngine, Sampling
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.tasks.chain import ChainTask
from tests.test_plugins import EVEN, Batch, agree, blocks, by_choices, make_batch

pytestmark = [
    pytest.mark.slow,  # importing TRL takes six seconds of a processor
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM"),  # said at import; no test here uses vLLM
]

STEPS, PROMPTS, GROUP, MICRO = 20, 8, 8, 16


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="comes with the extra 'dev' or 'trl'")


# ---------------------------------------------------------------------------------------------------- fixed tensors


def on_fixed_tensors(batch: Batch, choices: Choices = PAPER, *, training: bool = True, micro_batches: int = 2) -> Any:
    """A trainer without a model, whose forward returns the batch's log-probabilities; the token ids are row numbers."""
    from minirl_edu.plugins.trl import MiniRLGRPOTrainer

    class OnFixedTensors(MiniRLGRPOTrainer):
        def __init__(self) -> None:
            self.choices, self.replay = choices, None
            self.model: Any = SimpleNamespace(training=training)
            self.accelerator: Any = SimpleNamespace(gather=lambda value: value)
            self.current_gradient_accumulation_steps = micro_batches
            self._metrics: Any = {"train": {}, "eval": {}}
            for name in (
                "is_weight_mean",
                "is_weight_max",
                "is_capped_frac",
                "clip_frac_pos",
                "clip_frac_neg",
                "entropy",
            ):
                self._metrics["train" if training else "eval"][name] = []

        def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            logp = batch.logp[input_ids[:, -1]]
            return logp, torch.ones_like(logp), None

    return OnFixedTensors()


def trl_inputs(batch: Batch, rows: list[int], **others: Tensor | None) -> dict[str, Tensor]:
    """As TRL lays a micro-batch out: prompts padded on the left, completions on the right."""
    ids = torch.tensor(rows)[:, None]
    inputs = {
        "prompt_ids": ids.expand(-1, 3),
        "prompt_mask": torch.tensor([[0, 1, 1]]).expand(len(rows), 3),
        "completion_ids": ids.expand(-1, batch.mask.shape[1]),
        "completion_mask": batch.mask[rows].int(),
        "old_per_token_logps": batch.logp_old[rows],
        "sampling_per_token_logps": batch.logp_rollout[rows],
        "advantages": batch.advantages[rows],
        **others,
    }
    return {name: value for name, value in inputs.items() if value is not None}


@by_choices
def test_the_loss_over_two_ranks_of_two_micro_batches(trl, batch, choices):
    trainer = on_fixed_tensors(batch, choices)
    losses = [trainer._compute_loss(None, trl_inputs(batch, rows)) for rank in EVEN for rows in rank]
    agree(batch, torch.stack(losses).sum() / 2, batch.expected(choices))
    assert len(trainer._metrics["train"]["is_weight_max"]) == 4 and trainer._metrics["train"]["entropy"] == [1.0] * 4


def test_an_evaluation_is_one_micro_batch(trl, batch):
    loss = on_fixed_tensors(batch, training=False)._compute_loss(None, trl_inputs(batch, list(range(8))))
    agree(batch, loss, batch.expected())


def test_what_trl_does_not_give_is_taken_from_the_trainer(trl, batch):
    """No log π_old: the update's own. No log μ_old, or NaN for a token: log π_old."""
    trainer, rows = on_fixed_tensors(batch, micro_batches=1), list(range(8))
    current = batch.logp.detach()
    loss = trainer._compute_loss(None, trl_inputs(batch, rows, old_per_token_logps=None))
    agree(batch, loss, batch.expected(logp_old=current))
    on_policy = trl_inputs(batch, rows, old_per_token_logps=None, sampling_per_token_logps=None)
    agree(
        batch, trainer._compute_loss(None, on_policy), batch._replace(logp_rollout=current).expected(logp_old=current)
    )
    rollout = batch.logp_rollout.clone()
    rollout[0, 0] = torch.nan
    loss = trainer._compute_loss(None, trl_inputs(batch, rows, sampling_per_token_logps=rollout))
    rollout[0, 0] = batch.logp_old[0, 0]
    agree(batch, loss, batch._replace(logp_rollout=rollout).expected())


def test_tokens_of_a_tool_do_not_count(trl, batch):
    tool_mask = torch.ones_like(batch.mask, dtype=torch.int64)
    tool_mask[:, 1] = 0
    loss = on_fixed_tensors(batch, micro_batches=1)._compute_loss(
        None, trl_inputs(batch, list(range(8)), tool_mask=tool_mask)
    )
    agree(batch, loss, batch._replace(mask=batch.mask & tool_mask.bool()).expected())


# ------------------------------------------------------------------------------------------------- the real trainer


class Engine:
    """A `rollout_func`: this library's fp8 engine samples, and tells TRL its log-probabilities."""

    def __init__(self, model: Any, task: ChainTask) -> None:
        self.engine, self.task, self.calls = HFEngine(model, Precision.parse("fp8_e4m3")), task, 0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self.calls += 1
        self.engine.sync(trainer.model, version=self.calls)
        asked = [self.task.tokenizer.encode(prompt) for prompt in prompts[::GROUP]]
        sampling = Sampling(max_new_tokens=self.task.max_new_tokens)
        rollout = self.engine.generate(asked, group_size=GROUP, sampling=sampling, seed=self.calls)
        rows = zip(rollout.logp_rollout, rollout.response_mask, strict=True)
        return {
            "prompt_ids": [ids for ids in asked for _ in range(GROUP)],
            "completion_ids": rollout.responses,
            "logprobs": [logp[mask].tolist() for logp, mask in rows],
        }


def make_trainer(out: Any, *, model: str = "chain-experts", replay: str | None = "R2", **changed: Any) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig

    from minirl_edu.plugins.trl import MiniRLGRPOTrainer

    task, policy = ChainTask(), load_model(model)
    problems = task.sample(PROMPTS * STEPS, seed=0)
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in problems], "problem": list(range(len(problems)))})

    def reward(completions: list[str], problem: list[int], **_: Any) -> list[float]:
        return [task.reward(problems[i], text) for i, text in zip(problem, completions, strict=True)]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,  # two mini-batches for each rollout
        "num_generations": GROUP,
        "max_completion_length": task.max_new_tokens,
        "scale_rewards": "none",
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "gradient_checkpointing": True,  # the routers run again in the backward
        **{"bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0},
        "logging_steps": 1,
        **changed,
    }
    return MiniRLGRPOTrainer(
        model=policy,
        processing_class=load_tokenizer(model),
        reward_funcs=reward,
        train_dataset=dataset,
        rollout_func=Engine(policy, task),
        args=GRPOConfig(output_dir=str(out), **settings),
        replay=replay,
    )


def by_hand(trainer: Any, inputs: dict[str, Tensor], replayed: bool) -> tuple[Tensor, Tensor]:
    """The loss of a micro-batch from the model's plain logits, and the gradient of its first experts."""
    routes = Routes(inputs["experts_old"], inputs["experts_valid"], trainer.replay.layers)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].shape[1]
    with trainer.replay.replay(routes) if replayed else nullcontext():
        logits = trainer.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, -width - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        old, rollout = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
        loss = minirl_loss(logp, old, rollout, inputs["advantages"], inputs["completion_mask"]).loss / 2
        return loss.detach(), torch.autograd.grad(loss, weights_of(trainer, "experts"))[0]


def weights_of(trainer: Any, part: str) -> Tensor:
    return next(weight for name, weight in trainer.model.named_parameters() if part in name)


@pytest.fixture
def replays(monkeypatch) -> list[Routes]:
    """The routes of every replay, as it begins."""
    seen, original = [], RoutingReplay.replay

    def replay(self: RoutingReplay, routes: Routes) -> Any:
        seen.append(routes)
        return original(self, routes)

    monkeypatch.setattr(RoutingReplay, "replay", replay)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func warns that it may change
    return seen


def test_twenty_steps_with_r2(trl, tmp_path, replays):
    trainer = make_trainer(tmp_path)
    start = weights_of(trainer, "experts").detach().clone()
    trainer.train()
    assert trainer.state.global_step == STEPS and trainer.rollout_func.calls == STEPS // 2
    assert len(replays) == 2 * STEPS and not torch.equal(start, weights_of(trainer, "experts"))
    logged = [line for line in trainer.state.log_history if "is_weight_mean" in line]
    assert len(logged) == STEPS
    # An fp8 engine's weights are not 1, and their mean is near 1: E_μ[π/μ] = 1.
    assert all(line["is_weight_max"] > 1.01 and abs(line["is_weight_mean"] - 1) < 0.2 for line in logged)
    clipped = [line["clip_frac_pos"] + line["clip_frac_neg"] for line in logged]
    assert not any(clipped[0::2]) and any(clipped[1::2])  # π_θ is π_old in the first of two updates, not in the second

    # With routers that have moved on, the trainer's loss is that of the recorded experts, not of live ones.
    with torch.no_grad():
        router = weights_of(trainer, "gate.weight")
        router.add_(torch.randn(router.shape, generator=torch.Generator().manual_seed(0)))
    inputs = trainer._buffered_inputs[-1]
    with ExitStack() as trainer._until_backward:
        loss = trainer._compute_loss(trainer.model, inputs)
        found = loss.detach(), torch.autograd.grad(loss, weights_of(trainer, "experts"))[0]
    replayed, live = by_hand(trainer, inputs, True), by_hand(trainer, inputs, False)
    for ours, expected, other in zip(found, replayed, live, strict=True):
        # float32, with another order of sums in TRL's chunked head.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
        assert (ours - expected).abs().max() < 0.01 * (ours - other).abs().max()


def test_a_backward_outside_of_the_replay_is_caught(trl, tmp_path, replays, monkeypatch):
    """The step keeps the experts until the backward has ended: without that, checkpointing would take live ones."""
    trainer = make_trainer(tmp_path, max_steps=1)
    from trl.trainer.grpo_trainer import GRPOTrainer

    monkeypatch.setattr(type(trainer), "training_step", GRPOTrainer.training_step)
    compute_loss = trainer._compute_loss

    def leaving(model: Any, inputs: Any) -> Any:
        with ExitStack() as trainer._until_backward:
            return compute_loss(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", leaving)
    with pytest.raises(RuntimeError, match="the replay context was left"):
        trainer.train()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale_rewards": "group"}, "GRPOConfig.scale_rewards is 'group'; with MiniRL it must be 'none'"),
        ({"entropy_coef": 0.1}, "GRPOConfig.entropy_coef is 0.1"),
        ({"top_p": 0.9}, "GRPOConfig.top_p is 0.9"),
        ({"router_aux_loss_coef": 0.01}, "GRPOConfig.router_aux_loss_coef adds"),
        ({"replay": "R3"}, "replay is 'R3'; expected 'R2' or None"),
        ({"model": "chain-steps-dense"}, "is dense"),
    ],
)
def test_settings_that_change_the_objective_are_refused(trl, tmp_path, replays, changed, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changed)


def test_the_pages_lines_run(trl, monkeypatch, tmp_path):
    """With a trainer that keeps its arguments in the place of TRL's, and TRL's own config."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def keep(self: Any, model: Any, reward_funcs: Any, args: Any, train_dataset: Any) -> None:
        self.model, self.args, self.aux_loss_enabled = model, args, False

    monkeypatch.setattr(GRPOTrainer, "__init__", keep)
    monkeypatch.setattr(GRPOTrainer, "train", lambda self: None)
    on_cpu = functools.partial(GRPOConfig, output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    monkeypatch.setattr(trl, "GRPOConfig", on_cpu)
    names: dict[str, Any] = {"model": load_model("chain-experts"), "reward_funcs": [], "data": None}
    exec(compile(blocks("python")[0], "plugins.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.choices == PAPER and trainer.replay.num_experts == 16
    assert trainer.args.steps_per_generation == 2 * trainer.args.gradient_accumulation_steps
