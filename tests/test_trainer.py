"""The training loop: what it computes, that it resumes to the same bits, and how it fails."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from benchmarks.measure import SeparateForward
from minirl_edu.advantages import ADVANTAGES
from minirl_edu.config import ConfigError, TrainConfig, load_config
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.objectives import OBJECTIVES, Objective, PolicyLoss
from minirl_edu.rollout import EngineError, HFEngine, Rollout, Sampling, sample
from minirl_edu.routing import RoutingReplay
from minirl_edu.run import checkpoint
from minirl_edu.run.checkpoint import latest_checkpoint
from minirl_edu.run.folder import LENGTHLESS
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import ChainTask, Problem
from minirl_edu.trainer import MiniRLTrainer, TrainingDiverged
from tests import routing_families
from tests.conftest import byte_tokenizer
from tests.families import tiny
from tests.forked import Forked

KEYS = [
    *("global_step", "grad_step", "reward", "entropy", "kl_rollout_old", "k3_rollout_old", "ess", "clip_frac_pos"),
    *("clip_frac_neg", "is_weight_mean", "is_weight_max", "log_ratio_mismatch", "log_ratio_staleness"),
    *(
        "is_capped_frac",
        "first_order_gap",
        "length_reward_cov",
        "entropy_drift",
        "routing_flip_rate",
        "grad_norm",
        "response_length",
        "lr",
        "tokens",
        "seconds",
    ),
]
SMALL = (
    "train.global_steps=3",
    "train.mini_batch_prompts=4",
    "train.group_size=4",
    "train.lr=1e-3",
    "eval.every=2",
    "eval.problems=16",
    "output.save_every=1",
    "task.options={max_operands: 4, hard_operands: 4}",
    "rollout.precision=int4",
)
LARGER_STEPS = "train.lr=1e-2"


def trainer(out: Path, *overrides: str, model=None, kind=MiniRLTrainer, **kwargs) -> MiniRLTrainer:
    model = model or tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16)
    run = kind(load_config(None, [*SMALL, *overrides]), out, model=model, progress=False, **kwargs)
    run.rewards = even  # an untrained model solves nothing, and without a reward nothing moves
    return run


def even(problems: Sequence[Problem], rollout: Rollout) -> torch.Tensor:
    """Rewards responses that start with an even token."""
    return (rollout.tokens[:, rollout.prompt_length] % 2 == 0).float()


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    return load_file(path / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_one_line_per_gradient_step_with_every_metric(tmp_path):
    trainer(tmp_path / "run", "train.mini_batches=2").train()
    lines = metrics(tmp_path / "run")
    assert [(line["global_step"], line["grad_step"]) for line in lines] == [
        (0, 0), *[(1 + i // 2, 1 + i) for i in range(6)],
    ]  # fmt: skip
    assert all(key in line for line in lines[1:] for key in KEYS)
    # before the first step, where due, and at the end; never on a step's first mini-batch
    assert [line["grad_step"] for line in lines if "score" in line] == [0, 4, 6]
    assert all(0 <= line["score_rollout"] <= 1 for line in lines if "score" in line)
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    first, second = lines[1], lines[2]
    assert first["log_ratio_staleness"] == 0 < second["log_ratio_staleness"]  # θ = θ_old in the first mini-batch only
    assert first["log_ratio_mismatch"] > 0 and first["routing_flip_rate"] > 0  # an int4 engine is another policy
    assert first["lr"] == 1e-3 and first["tokens"] > 16


class Plain:
    """A rollout engine that knows nothing of the trainer: one fixed batch."""

    def __init__(self, rollout: Rollout):
        self.rollout = rollout

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        return self.rollout

    def sync(self, model, *, version: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("architecture", [tiny_moe, tiny_dense])
def test_one_global_step_is_the_papers_step_written_out(tmp_path, architecture):
    """N = 2 on-the-nose: the loop's weights equal those of equation (7) computed here, with autograd alone."""
    model = architecture(18, seed=0, eos_token_id=17, pad_token_id=16)
    run = trainer(tmp_path / "run", "train.mini_batches=2", "train.max_grad_norm=.inf", "eval.every=0", model=model)
    problems = run.task.sample(8, seed=0)
    prompts = [run.task.encode(problem) for problem in problems]
    rollout = run.engine.generate(prompts, group_size=4, sampling=run.sampling, seed=3)
    reference = architecture(18, seed=0, eos_token_id=17, pad_token_id=16).eval()
    rewards = torch.rand(32, generator=torch.Generator().manual_seed(0))
    run.rewards = lambda problems, rollout: rewards  # an untrained model earns nothing: any rewards will do
    run.engine = Plain(rollout)
    run.global_step()

    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    advantages = (rewards.view(8, 4) - rewards.view(8, 4).mean(1, keepdim=True)).flatten()

    def logp(part: Rollout) -> torch.Tensor:
        logits = reference(input_ids=part.tokens[:, :-1]).logits.log_softmax(-1)
        return logits.gather(2, part.tokens[:, 1:, None])[:, part.prompt_length - 1 :, 0]

    with torch.no_grad():
        old = [logp(rollout.rows(r, r + 16)) for r in (0, 16)]
    for r, logp_old in zip((0, 16), old, strict=True):
        part, advantage = rollout.rows(r, r + 16), advantages[r : r + 16, None]
        now = logp(part)
        ratio, weight = (now - logp_old).exp().detach(), (now - part.logp_rollout).exp().detach().clamp(max=5)
        kept = ~((advantage > 0) & (ratio > 1.27) | (advantage < 0) & (ratio < 0.8)) & part.response_mask
        (-(kept * weight * advantage * now.masked_fill(~part.response_mask, 0)).sum() / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Adam turns a gradient's sign into a step of lr = 1e-3: a wrong gradient is off by about that. Summation order
        # moves a step by a thousandth of it, but for gradients near zero (of unused rows).
        difference = (ours - theirs).abs()
        assert difference.mean() < 2e-6 and difference.max() < 2e-4, (name, difference.max())


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_updates_own_forward_serves_as_pi_old_bit_for_bit(tmp_path, replay, mini_batches):
    """A separate forward for every π_old changes nothing: not a metric, not a bit of the weights."""
    settings = [f"algorithm.replay={replay}", f"train.mini_batches={mini_batches}"]
    settings += ["train.global_steps=2", "eval.every=0"]
    trainer(tmp_path / "saved", *settings).train()
    trainer(tmp_path / "reference", *settings, kind=SeparateForward).train()
    assert timeless(metrics(tmp_path / "saved")) == timeless(metrics(tmp_path / "reference"))
    assert equal(weights(tmp_path / "saved"), weights(tmp_path / "reference"))


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
@pytest.mark.parametrize("rewarded", ["some groups", "none"])
def test_groups_without_a_gradient_get_a_forward_only_and_the_step_is_the_same(tmp_path, replay, rewarded, monkeypatch):
    """Half of the groups are rewarded alike in the first global step, all in the second (when AdamW has only its
    momentum to go by)."""

    def rewards(run: MiniRLTrainer):
        def some(problems: Sequence[Problem], rollout: Rollout) -> torch.Tensor:
            group = torch.arange(len(rollout.tokens)) // rollout.group_size
            alike = (group % 2 == 0) if rewarded == "some groups" and run.step == 0 else torch.ones_like(group).bool()
            return even(problems, rollout).where(~alike, 1.0)

        return some

    passes = []
    # A large epsilon: otherwise Adam makes whole steps out of what fp32 sums in another order leave of a zero.
    settings = [f"algorithm.replay={replay}", "train.mini_batches=2", "train.global_steps=2", "eval.every=0"]
    settings += [LARGER_STEPS, "train.adam_eps=1e-2"]
    for name, every in (("saved", "false"), ("reference", "true")):
        run = trainer(tmp_path / name, *settings, f"train.zero_advantage_backward={every}")
        run.rewards = rewards(run)
        tokens = []  # those whose loss is taken: a backward follows
        monkeypatch.setattr(run, "_loss", _counting(run._loss, tokens))
        run.train()
        passes.append(sum(tokens))
    saved, reference = (metrics(tmp_path / name) for name in ("saved", "reference"))
    for a, b in zip(saved, reference, strict=True):
        for key in KEYS[:-1]:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    expected = weights(tmp_path / "reference")
    for name, tensor in weights(tmp_path / "saved").items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name
    every_token = sum(line["tokens"] for line in reference)
    assert passes[1] == every_token
    assert passes[0] == 0 if rewarded == "none" else 0.1 * every_token < passes[0] < 0.4 * every_token


def _counting(loss, tokens: list[int]):
    def counted(logp, logp_old, rollout, *rest):
        if logp.requires_grad:  # not for the metrics alone
            tokens.append(int(rollout.response_mask.sum()))
        return loss(logp, logp_old, rollout, *rest)

    return counted


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_how_the_forward_is_cut_does_not_change_the_step(tmp_path, replay):
    """Micro-batches of groups, of single rows, and recomputed activations give one and the same update."""
    base = [f"algorithm.replay={replay}", "train.mini_batches=2", "train.global_steps=1", "eval.every=0"]
    trainer(tmp_path / "whole", *base).train()
    whole = metrics(tmp_path / "whole")
    cuts = ("train.tokens_per_micro_batch=150", "train.tokens_per_micro_batch=20", "model.gradient_checkpointing=true")
    for setting in cuts:
        trainer(tmp_path / setting, *base, setting).train()
        for a, b in zip(whole, metrics(tmp_path / setting), strict=True):
            for key in KEYS[:-1]:
                # fp32 sums in another order; a metric near zero moves by its absolute error
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), (setting, key)


# Dropout in the embedding, in attention and between layers; in attention alone; in the layer's own forward; noise on
# the router's input.
NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "qwen3": {"attention_dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.1, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("family", NOISY)
def test_recomputed_activations_are_those_of_a_model_without_dropout(tmp_path, family):
    """An fp32 engine samples from the very policy that is trained, and each layer runs twice."""
    special: dict[str, Any] = {"vocab_size": 18, "eos_token_id": 17, "pad_token_id": 16, "max_position_embeddings": 128}
    model: Any = tiny(family, **special, **NOISY[family])
    settings = ("model.gradient_checkpointing=true", "rollout.precision=fp32", "train.lr=0", "train.global_steps=1")
    run = trainer(tmp_path / "run", *settings, "train.zero_advantage_backward=true", "eval.every=0", model=model)
    calls = {"embeddings": 0, "layer": 0}

    def count(name: str):
        return lambda module, args: calls.update({name: calls[name] + 1})

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    first = next(module for module in layers[0].modules() if type(module).__name__.endswith(("Linear", "Conv1D")))
    model.get_input_embeddings().register_forward_pre_hook(count("embeddings"))
    first.register_forward_pre_hook(count("layer"))
    (line,) = run.global_step()
    assert line["log_ratio_mismatch"] < 1e-5  # fp32, two layouts; with dropout 0.01 and more
    assert calls["layer"] == 2 * calls["embeddings"] > 0


def test_offloaded_activations_give_the_same_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "transformers.modeling_utils.save_on_cpu", lambda **kw: calls.append(kw) or torch.autograd.graph.save_on_cpu()
    )
    lines = []
    for offload in ("false", "true"):
        settings = ("model.gradient_checkpointing=true", f"model.offload_activations={offload}", "eval.every=0")
        run = trainer(tmp_path / offload, *settings, "train.global_steps=1")
        lines.append({k: v for k, v in run.global_step()[0].items() if k != "seconds"})
        assert bool(calls) is (offload == "true")
    assert lines[0] == lines[1] and lines[0]["grad_norm"] > 0
    with pytest.raises(ConfigError, match=r"model\.offload_activations.*gradient_checkpointing: true"):
        trainer(tmp_path / "other", "model.offload_activations=true")


def test_a_model_whose_layers_cannot_be_recomputed_is_refused(tmp_path):
    model = tiny("xlnet", vocab_size=18, eos_token_id=17, pad_token_id=16)
    engine = Plain(None)  # pyright: ignore[reportArgumentType] # an HFEngine refuses this model already
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing.*XLNetLMHeadModel"):
        trainer(tmp_path / "run", "model.gradient_checkpointing=true", "eval.every=0", model=model, engine=engine)


def test_random_weights_do_not_pad_with_a_word(tmp_path):
    overrides = "model.overrides={num_hidden_layers: 1, hidden_size: 32, vocab_size: 18, pad_token_id: 0}"
    config = load_config(None, ["model.name=Qwen/Qwen3-0.6B", "model.random=true", overrides])
    with pytest.raises(ConfigError, match=r"pad_token_id = 0: that is '0' to the tokenizer.* set it to 16"):
        MiniRLTrainer(config, tmp_path / "run", progress=False)


def test_the_launchers_gradient_accumulation_does_not_scale_the_gradient(tmp_path, monkeypatch):
    """`accelerate launch` puts the number from its config into the environment; accelerate divides each loss by it."""
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        run = trainer(tmp_path / steps, "train.global_steps=1", "eval.every=0")
        norms.append(run.global_step()[0]["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_a_router_that_refuses_only_when_it_runs_is_trained_without_replay(tmp_path):
    """Phi-MoE selects by sparsemixer: found out at the start, not in the first rollout."""
    special: dict[str, Any] = {"vocab_size": 18, "eos_token_id": 17, "pad_token_id": 16, "max_position_embeddings": 128}
    run = trainer(tmp_path / "run", "train.global_steps=1", "eval.every=0", model=tiny("phimoe", **special))
    assert run.global_step()[0]["routing_flip_rate"] is None
    with pytest.raises(ConfigError, match=r"algorithm\.replay = 'R2'.*PhimoeTopKRouter"):
        trainer(tmp_path / "other", "algorithm.replay=R2", model=tiny("phimoe", **special))


def test_replay_lowers_what_it_should(tmp_path):
    """R3 leaves no flips against the engine and a smaller mismatch; R2 and none see the engine's own flips."""
    flips, mismatch = {}, {}
    for replay in ("none", "R2", "R3"):
        trainer(tmp_path / replay, f"algorithm.replay={replay}", "train.global_steps=1", "train.mini_batches=2").train()
        lines = metrics(tmp_path / replay)[1:]
        flips[replay] = [line["routing_flip_rate"] for line in lines]
        mismatch[replay] = lines[0]["log_ratio_mismatch"]
    assert flips["R3"] == [0, 0] and flips["none"] == flips["R2"] and min(flips["none"]) > 0.01
    assert mismatch["R3"] < mismatch["none"] == mismatch["R2"]


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_the_engine_is_asked_for_routes_only_where_they_are_needed(replay, tmp_path, monkeypatch):
    """Without the flips nothing is recorded for them, and nothing else is different."""
    settings = (f"algorithm.replay={replay}", "train.global_steps=1", "train.mini_batches=2", "eval.every=0")
    measured = trainer(tmp_path / "measured", *settings).global_step()
    run = trainer(tmp_path / "run", *settings, "rollout.measure_flips=false")
    recorded, record = [], RoutingReplay.record
    monkeypatch.setattr(RoutingReplay, "record", lambda self: recorded.append(self is run.replay) or record(self))
    spared = run.global_step()
    assert set(recorded) == {"none": set(), "R2": {True}, "R3": {False}}[replay]  # True: the trainer; False: the engine
    assert [line["routing_flip_rate"] for line in spared] == [0 if replay == "R3" else None] * 2
    assert replay == "R3" or min(line["routing_flip_rate"] for line in measured) > 0
    for line in measured + spared:
        del line["routing_flip_rate"], line["seconds"]
    routes = [lines[0].pop("bytes_per_token")["routes"] > 0 for lines in (measured, spared)]
    assert measured == spared and routes == [True, replay == "R3"]


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.objective=grpo",
        "algorithm.objective=cispo",
        "algorithm.clip=false",
        "algorithm.is_correction=false",
        "algorithm.correction=geometric_mean",
        "algorithm.length_norm=true",
        "algorithm.advantages=leave_one_out",
        "algorithm.is_cap=1.0",
        "train.lr_schedule=cosine",
        "rollout.temperature=0.7",
    ],
)
def test_every_setting_reaches_the_update(tmp_path, setting, updated):
    assert not equal(updated, updated_weights(tmp_path, setting))


@pytest.fixture(scope="module")
def updated(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after two steps of the settings that each case changes one of."""
    return updated_weights(tmp_path_factory.mktemp("updated"))


def updated_weights(out: Path, *overrides: str) -> dict[str, torch.Tensor]:
    base = ["train.mini_batches=3", "train.global_steps=2", "train.lr=1e-2", "eval.every=0"]
    run = trainer(out / "run", *base, *overrides)
    rewards = torch.rand(48, generator=torch.Generator().manual_seed(0)).round()
    run.rewards = lambda problems, rollout: rewards
    run.train()
    return weights(out / "run")


def test_a_new_objective_is_a_function_and_a_line(tmp_path, monkeypatch):
    """The config takes its name, the trainer passes what it names and logs what it returns."""
    with pytest.raises(ConfigError, match=r"algorithm\.objective = 'reinforce': expected one of minirl, grpo, cispo$"):
        load_config(None, ["algorithm.objective=reinforce"])

    def reinforce(logp, advantages, mask, *, eps_low=0.5, is_cap=1.0, num_responses=None) -> PolicyLoss:
        loss = -(logp * advantages[:, None] * mask).sum() / num_responses
        counted = {
            "responses": logp.new_tensor(num_responses),
            "tokens_here": mask.sum(),
            "eps": logp.new_tensor(eps_low),
        }
        return PolicyLoss(loss, {**counted, "cap": logp.new_tensor(is_cap)})

    monkeypatch.setitem(OBJECTIVES, "reinforce", Objective(reinforce, "leave_one_out"))
    settings = ["train.global_steps=1", "train.mini_batches=2", "train.tokens_per_micro_batch=60", "eval.every=0"]
    run = trainer(tmp_path / "run", "algorithm.objective=reinforce", *settings, LARGER_STEPS)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.compute_advantages is ADVANTAGES["leave_one_out"]
    assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    # Of the whole mini-batch, though several micro-batches were summed; eps_low is None in the config, is_cap 5.
    for line in metrics(tmp_path / "run"):
        assert (line["responses"], line["tokens_here"], line["eps"], line["cap"]) == (16, line["tokens"], 0.5, 5)


def test_the_weight_that_is_logged_is_the_one_of_the_loss(tmp_path):
    """CISPO between 0.95 and 1.05: weights outside were used as the bounds and are logged so."""
    bounds = ["algorithm.objective=cispo", "algorithm.eps_low=0.05", "algorithm.eps_high=0.05"]
    trainer(tmp_path / "run", *bounds, LARGER_STEPS, "train.mini_batches=2", "eval.every=0").train()
    for line in metrics(tmp_path / "run")[1::2]:
        assert line["log_ratio_staleness"] > 0.05 and line["is_capped_frac"] > 0.1
        assert 0.95 <= line["is_weight_mean"] <= 1.05 and line["is_weight_max"] == pytest.approx(1.05)


def test_without_clipping_a_run_records_what_the_clip_would_drop(tmp_path):
    """The first off-policy mini-batch is the same with and without it: so is its clip fraction. The update is not."""
    lines, moved = [], []
    for clip in ("true", "false"):
        settings = [
            f"algorithm.clip={clip}",
            LARGER_STEPS,
            "train.mini_batches=2",
            "train.global_steps=1",
            "eval.every=0",
        ]
        trainer(tmp_path / clip, *settings).train()
        lines.append(metrics(tmp_path / clip)[1])
        moved.append(weights(tmp_path / clip))
    fractions = [(line["clip_frac_pos"], line["clip_frac_neg"]) for line in lines]
    assert fractions[0] == fractions[1] and sum(fractions[0]) > 0.01
    assert not equal(*moved)


def test_reward_goes_up_on_something_learnable(tmp_path):
    """An untrained model, rewarded for ending at once, learns to: the sign of everything is right."""
    run = trainer(tmp_path / "run", "train.global_steps=25", "train.lr=3e-3", "eval.every=0", "output.save_every=0")
    run.rewards = lambda problems, rollout: (rollout.response_mask.sum(1) == 1).float()
    run.train()
    rewards = [line["reward"] for line in metrics(tmp_path / "run")]
    assert sum(rewards[:3]) / 3 < 0.3 and sum(rewards[-3:]) / 3 > 0.8, rewards


class Whole(ChainTask):
    """Rewards with integers those responses that begin with an even token."""

    def reward(self, problem: Problem, response: str) -> float:
        return int(response[:1] in set("02468*= "))


def test_a_task_may_reward_with_integers_and_not_with_nothing(tmp_path):
    run = trainer(tmp_path / "run", "train.global_steps=1", task=Whole(max_operands=4, hard_operands=4))
    del run.rewards  # the task's own
    run.train()
    last = metrics(tmp_path / "run")[-1]
    assert 0 < last["reward"] < 1 and (last["verifier_failures"], last["verifier_restarts"]) == (0, 0)
    run = trainer(tmp_path / "other", task=Whole(max_operands=4, hard_operands=4))
    del run.rewards
    run.task.reward = lambda problem, response: None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"task 'chain': the reward None of a response is no number in \[0, 1\]"):
        run.train()


@pytest.mark.parametrize("architecture", [tiny_moe, tiny_dense])
def test_a_run_on_reasoning_gym_with_prompts_of_different_lengths(tmp_path, architecture):
    """Another task, another tokenizer, left padding: a model loaded from its folder, as a user would."""
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    architecture(len(tokenizer), seed=0, **special).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    overrides = [
        *SMALL,
        "task.name=reasoning_gym",
        "task.options={dataset: chain_sum, evaluation_size: 16, config: {min_terms: 2, max_terms: 4}}",
        f"model.name={tmp_path / 'model'}",
        "rollout.max_new_tokens=6",
        "train.mini_batches=2",
    ]
    run = MiniRLTrainer(load_config(None, overrides), tmp_path / "run", progress=False)
    assert len({len(run.task.encode(problem)) for problem in run.task.sample(8, seed=0)}) > 1
    run.rewards = even
    run.train()
    lines = metrics(tmp_path / "run")
    assert len(lines) == 7 and all(line["response_length"] <= 6 for line in lines[1:])
    assert lines[-1]["log_ratio_mismatch"] < 0.5  # the padding is seen by neither engine


# ------------------------------------------------------------------------------------------------ resuming


def test_resume_from_any_checkpoint_continues_to_the_same_bits(tmp_path):
    overrides = [
        "algorithm.replay=R2",
        "train.mini_batches=2",
        "rollout.rounding=stochastic",
        "train.lr_schedule=linear",
    ]
    whole = trainer(tmp_path / "whole", *overrides)
    whole.train()
    for stop in (0, 1, 2):  # 0: nothing was saved yet, only the evaluation before the first step was written
        out = tmp_path / f"stopped-{stop}"
        first = trainer(out, *overrides)
        run_step = first.global_step
        first.global_step = lambda: run_step() if first.step < stop else signal.raise_signal(signal.SIGKILL) or []  # noqa: B023
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(signal, "raise_signal", sys.exit)
            first.train()
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"global_step": 99, "grad_st')  # cut off in the middle of a write
        lines_before = (out / "metrics.jsonl").read_text()
        seed = 5 if stop else 0  # whatever the model, the checkpoint's weights count
        resumed = trainer(out, *overrides, resume=True, model=tiny_moe(18, seed=seed, eos_token_id=17, pad_token_id=16))
        kept = out / "metrics.jsonl"
        assert resumed.step == stop and lines_before.startswith(kept.read_text() if stop else "")
        resumed.train()
        assert timeless(metrics(out)) == timeless(metrics(tmp_path / "whole"))
        assert (out / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
        assert resumed.detector.state_dict() == whole.detector.state_dict()
        assert equal(weights(out), weights(tmp_path / "whole"))


def test_a_fall_from_the_score_before_the_first_step_is_told(tmp_path):
    run = trainer(tmp_path / "run")
    scores = iter([0.9, 0.1, 0.1])
    run.evaluate = lambda: {"score": next(scores), "score_rollout": 0.5}
    run.train()
    assert [line["warnings"] for line in metrics(tmp_path / "run") if "warnings" in line] == [
        ["gradient step 2: score fell from 0.90 (step 0) to 0.10"]
    ]
    run = trainer(tmp_path / "deployed")
    scores = iter([0.9, 0.1, 0.1])
    run.evaluate = lambda: {"score": None, "score_rollout": next(scores)}
    run.train()
    assert sum("warnings" in line for line in metrics(tmp_path / "deployed")) == 1


@pytest.mark.parametrize("through_trainer", [True, False])
def test_each_evaluation_leaves_the_first_answers_with_their_rewards(tmp_path, through_trainer):
    out = tmp_path / "run"
    run = trainer(out, f"eval.through_trainer={through_trainer}")
    del run.rewards  # the task's own
    run.task.reward = lambda problem, response: len(response) / 16
    run.train()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(line["global_step"], line["grad_step"]) for line in lines] == [(0, 0), (2, 2), (3, 3)]
    problems = run.task.evaluation(16)
    for line in lines:
        assert [said["prompt"] for said in line["samples"]] == [problem.prompt for problem in problems[:3]]
        assert [said["answer"] for said in line["samples"]] == [problem.answer for problem in problems[:3]]
        for said in line["samples"]:
            assert said["reward"] == pytest.approx(len(said["response"]) / 16)


class Counted(HFEngine):
    """Notes what it is asked for: prompts, responses to each, and the seed."""

    asked: list[tuple[int, int, int]]

    def generate(self, prompts, *, group_size, sampling, seed):
        self.asked.append((len(prompts), group_size, seed))
        return super().generate(prompts, group_size=group_size, sampling=sampling, seed=seed)


@pytest.mark.parametrize("through_trainer", [True, False])
def test_a_score_is_the_mean_over_all_samples_drawn_in_rounds(tmp_path, through_trainer):
    model = tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16)
    engine = Counted(model)
    settings = (f"eval.through_trainer={through_trainer}", "eval.problems=5", "rollout.precision=fp32")
    run = trainer(tmp_path / "run", *settings, "eval.samples=8", model=model, engine=engine)
    seen = []
    run.rewards = lambda problems, rollout: seen.append(even(problems, rollout)) or seen[-1]
    engine.asked = []
    scores = run.evaluate()

    seeds = [derive_seed(0, "evaluation", i) for i in range(3)]  # a step of 16 responses: 3 to each of 5 problems
    assert engine.asked == list(zip([5] * 3, (3, 3, 2), seeds, strict=True))
    rewards = torch.cat([part.view(5, -1) for part in seen[-3:]], 1)
    means = rewards.mean(1)
    assert scores["score_rollout"] == pytest.approx(rewards.mean().item())
    assert scores["score_rollout_se"] == pytest.approx(means.std().item() / 5**0.5)
    assert scores["pass_at_k_rollout"] == pytest.approx((rewards.sum(1) > 0).float().mean().item())
    if through_trainer:  # an fp32 engine is the trainer's own policy
        assert [scores[name] for name in ("score", "score_se", "pass_at_k")] == [
            scores[name] for name in ("score_rollout", "score_rollout_se", "pass_at_k_rollout")
        ]
    else:
        assert scores["score"] is None and not scores.keys() & {"score_se", "pass_at_k"}
    first = run.samples[1]
    assert (first["prompt"], first["reward"]) == (run.task.evaluation(5)[1].prompt, seen[0].view(5, 3)[1, 0].item())


def test_the_first_sample_is_that_of_an_evaluation_with_one(tmp_path):
    """The default, 1, is drawn as ever: with one seed, once; a problem alone has no standard error."""
    run = trainer(tmp_path / "run", "eval.problems=1")
    scores = run.evaluate()
    assert set(scores) == {"score", "score_se", "score_rollout", "score_rollout_se"}
    assert scores["score_se"] is None and scores["score_rollout_se"] is None
    problems, prompts = run.prompts.held_out()
    drawn = sample(run.unwrapped, prompts, group_size=1, sampling=run.sampling, seed=derive_seed(0, "evaluation"))
    assert scores["score"] == even(problems, drawn).mean().item()


def start(out: Path, *arguments: str) -> Forked:
    return Forked("-m minirl_edu.cli", ["train", "--out", out, *arguments])


def wait_for_lines(out: Path, count: int, process: Forked) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"no {count} lines of metrics in time")


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_gives_the_same_run(tmp_path):
    """A real process, SIGKILLed three times wherever it happens to be, ends with the metrics and weights of an
    undisturbed one."""
    settings = [
        *SMALL,
        "train.global_steps=8",
        "output.save_every=2",
        "train.mini_batches=2",
    ]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = start(whole, *flags).communicate(timeout=300)[0]
    assert len(metrics(whole)) == 17, output
    for lines in (2, 6, 11):
        process = start(killed, *flags, *(["--resume"] if killed.exists() else []))
        wait_for_lines(killed, lines, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    output = start(killed, "--resume").communicate(timeout=300)[0]  # settings come from the run's own config
    assert timeless(metrics(killed)) == timeless(metrics(whole)), output
    assert equal(weights(killed), weights(whole))


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    settings = [*SMALL, "train.global_steps=500", "output.save_every=0"]
    process = start(tmp_path / "run", *(flag for setting in settings for flag in ("--set", setting)))
    wait_for_lines(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"minirl train --resume --out {tmp_path / 'run'}" in output
    last = metrics(tmp_path / "run")[-1]["global_step"]
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None and path.name == f"step-{last:06d}" and last < 500


# ------------------------------------------------------------------------------------------------ refusing


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path / "run", "train.global_steps=1").train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        trainer(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_under_other_settings_is_refused_by_name(tmp_path):
    trainer(tmp_path / "run", "train.global_steps=1").train()
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.5 \(was 0\.001\)"):
        trainer(tmp_path / "run", "train.lr=0.5", resume=True)
    longer = trainer(tmp_path / "run", "train.global_steps=2", resume=True)  # a longer run is the same run
    assert longer.step == 1


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "inverse_sqrt"])
def test_a_run_whose_learning_rate_does_not_depend_on_its_length_is_resumed_for_longer(tmp_path, schedule):
    settings = [f"train.lr_schedule={schedule}", "train.warmup_steps=3", "eval.every=0"]
    trainer(tmp_path / "whole", *settings, "train.global_steps=4").train()
    trainer(tmp_path / "run", *settings, "train.global_steps=2").train()
    trainer(tmp_path / "run", *settings, "train.global_steps=4", resume=True).train()
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(tmp_path / "whole"))
    assert len({line["lr"] for line in metrics(tmp_path / "run")}) > 2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_learning_rate_depends_on_its_length_keeps_that(tmp_path, schedule):
    """Its first steps had the rates of the old length: with another one it would be neither run."""
    settings = (f"train.lr_schedule={schedule}", "eval.every=0")
    trainer(tmp_path / "run", *settings, "train.global_steps=2").train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for steps in (1, 4):
        with pytest.raises(ConfigError, match=rf"train\.global_steps = {steps} \(was 2\).*'{schedule}'.*another --out"):
            trainer(tmp_path / "run", *settings, f"train.global_steps={steps}", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_every_schedule_is_known_to_depend_on_the_length_or_not(tmp_path):
    for schedule in get_args(get_type_hints(TrainConfig)["lr_schedule"]):
        curves = []
        for steps in (10, 20):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=steps)
            curves.append([(scheduler.get_last_lr()[0], optimizer.step(), scheduler.step())[0] for _ in range(10)])
        assert (curves[0] == curves[1]) == (schedule in LENGTHLESS), schedule


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_step_is_made_while_a_checkpoint_is_written_and_tells_what_went_wrong(tmp_path, monkeypatch, fails):
    made, write = threading.Event(), checkpoint.write_safetensors

    def when_step_2_is_made(*arguments):
        assert made.wait(60)
        if fails:
            raise OSError(28, "No space left on device")
        write(*arguments)

    def on_step(lines: list[dict]) -> None:
        if run.step == 2:
            assert latest_checkpoint(run.folder.checkpoints) is None
            made.set()

    monkeypatch.setattr(checkpoint, "write_safetensors", when_step_2_is_made)
    steps = ("train.global_steps=3", "output.save_every=1", "output.keep_last=5", "eval.every=0")
    run = trainer(tmp_path / "run", *steps, on_step=on_step)
    with pytest.raises(OSError, match="No space left") if fails else nullcontext():
        run.train()
    assert run.step == (2 if fails else 3)
    kept = [] if fails else ["step-000001", "step-000002", "step-000003"]
    assert sorted(path.name for path in run.folder.checkpoints.iterdir()) == kept


def test_nan_stops_the_run_with_step_cause_and_checkpoint(tmp_path):
    run = trainer(tmp_path / "run")
    run.folder.write(run.global_step(), run.samples)
    run.save()
    with torch.no_grad():
        next(run.model.parameters())[3] = float("nan")
    # the engine has the old weights still: the training engine is what fails
    with pytest.raises(TrainingDiverged, match=r"global step 2, gradient step 2: log-prob.*step-000001"):
        run.global_step()
    *kept, last = metrics(tmp_path / "run")  # the reason is on record, for the report
    assert run.step == 1 and len(kept) == 1 and "log-prob" in last["warnings"][0]


def test_an_infinite_gradient_stops_before_the_weights_move(tmp_path):
    run = trainer(tmp_path / "run")
    run.rewards = lambda problems, rollout: torch.tensor([1e30, 0.0, 0.0, 0.0] * 4)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(TrainingDiverged, match=r"gradient norm.*no checkpoint"):
        run.global_step()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train={lr_schedule: polynomial, lr: 0}", r"train\.lr = 0: lr_end \(1e-07\)"),
        ("rollout.engine=tgi", r"rollout\.engine = 'tgi'.*hf, vllm, vllm_server"),
        ("rollout.precision=int1", r"rollout\.precision = 'int1'.*fp8_e4m3"),
        ("rollout.options={kv_cache_dtype: fp8}", r"rollout\.options = .*engine 'hf' has none"),
        ("rollout={engine: vllm, precision: fp8_e4m3}", r"rollout\.precision = 'fp8_e4m3'.*bf16, fp16, fp32.*kv_cache"),
        ("rollout={engine: vllm_server, precision: bf16, options: {api_key: x}}", r"api_key.*MINIRL_VLLM_API_KEY"),
        ("rollout={engine: vllm, precision: bf16, options: {colour: 3}}", r"rollout\.engine = 'vllm'.*colour"),
        ("rollout={engine: vllm, precision: bf16, rounding: stochastic}", r"rollout\.rounding.*emulates nothing"),
        ("algorithm.replay=R3", r"algorithm\.replay = 'R3'.*dense"),
        ("task.name=chess", r"task.*'chess'.*chain"),
        ("task.options={colour: 3}", r"task.*colour"),
    ],
)
def test_settings_that_do_not_fit_name_the_field_and_the_choices(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path / "run", setting, model=tiny_dense(18, seed=0, eos_token_id=17, pad_token_id=16))
    assert not (tmp_path / "run").exists()  # the corrected command may use the same folder


def test_r3_without_the_engines_routes_is_refused(tmp_path):
    run = trainer(tmp_path / "run", "algorithm.replay=R3")
    assert isinstance(run.engine, HFEngine)
    run.engine.replay = None
    with pytest.raises(ConfigError, match=r"R3.*no routes"):
        run.global_step()


def test_trackers_get_every_gradient_step(tmp_path):
    trainer(tmp_path / "run", "output.trackers=[tensorboard]", "train.global_steps=2").train()
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events[0].parent))
    reader.Reload()
    assert {"reward", "entropy", "kl_rollout_old"} <= set(reader.Tags()["scalars"])
    assert [event.step for event in reader.Scalars("reward")] == [1, 2]


def test_logprobs_that_the_metrics_describe_are_those_of_the_engines_batch(tmp_path):
    """kl_rollout_old of the first mini-batch equals E_μ[log μ_old − log π_old] computed from the rollout itself."""
    run = trainer(tmp_path / "run", "eval.every=0")
    problems = run.task.sample(4, seed=1)
    rollout = run.engine.generate([run.task.encode(p) for p in problems], group_size=4, sampling=run.sampling, seed=9)
    with torch.no_grad():
        logp_old = response_logprobs(run.model, lay_out(rollout, share_prompts=False)).logp
    expected = ((rollout.logp_rollout - logp_old) * rollout.response_mask).sum() / rollout.response_mask.sum()
    run.engine = Plain(rollout)
    line = run.global_step()[0]
    assert line["kl_rollout_old"] == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)  # fp32, two layouts


def test_a_stop_that_comes_just_after_the_save_waits_for_the_next_one(tmp_path):
    run = trainer(tmp_path / "run", "train.global_steps=5", "output.save_every=0")
    postfix, sent = run._postfix, []

    def interrupted(line):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return postfix(line)

    run._postfix = interrupted
    run.train()
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None and path.name == "step-000002" and run.step == 2


# ------------------------------------------------------------------------------------------------ models and tokens


@pytest.mark.parametrize("architecture", [tiny_moe, tiny_dense])
def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path, architecture):
    """64 rows, 18 tokens: the rest is never drawn, π and μ agree, and the rest's weights stay as they are."""
    model = architecture(64, seed=0, eos_token_id=17, pad_token_id=16)
    padding = model.get_input_embeddings().weight[18:].clone()
    run = trainer(tmp_path / "run", "rollout.precision=fp32", "train.mini_batches=2", LARGER_STEPS, model=model)
    drawn = []
    generate = run.engine.generate

    def watched(*args, **kwargs) -> Rollout:
        rollout = generate(*args, **kwargs)
        drawn.append(rollout.tokens[:, rollout.prompt_length :][rollout.response_mask])
        return rollout

    run.engine.generate = watched
    run.train()
    tokens = torch.cat(drawn)
    assert tokens.max() == 17 and len(tokens.unique()) == 18  # uniform at first: 46 of 64 would have been others
    lines = metrics(tmp_path / "run")[1:]
    assert max(line["k3_rollout_old"] for line in lines[::2]) < 1e-9  # fp32, before an update
    assert 2.7 < lines[0]["entropy"] < math.log(18)
    assert torch.equal(model.get_input_embeddings().weight[18:], padding)
    assert not torch.equal(model.get_input_embeddings().weight[:18], architecture(64, seed=0).lm_head.weight[:18])


def test_an_engine_that_draws_what_the_tokenizer_does_not_know_is_an_engine_error(tmp_path):
    run = trainer(tmp_path / "run", model=tiny_dense(64, seed=0))
    problems = [run.task.encode(problem) for problem in run.task.sample(4, seed=0)]
    ignorant = HFEngine(tiny_dense(64, seed=0)).generate(problems, group_size=4, sampling=run.sampling, seed=0)
    run.engine = Plain(ignorant)
    with pytest.raises(EngineError, match=r"tokens: the engine drew id \d+, which the tokenizer does not know"):
        run.global_step()


def test_an_end_token_that_only_the_tokenizer_knows_ends_responses(tmp_path):
    run = trainer(tmp_path / "run", "task.options={max_operands: 8}", model=tiny_dense(18, seed=0))
    line = run.global_step()[0]
    assert run.sampling.max_new_tokens == 15 and line["response_length"] < 14  # 1/18 of all tokens end one


def test_a_run_without_an_end_token_is_refused_with_the_remedy(tmp_path):
    task = ChainTask()
    task.tokenizer.eos_token = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"no end token.*tokenizer_config\.json"):
        trainer(tmp_path / "run", model=tiny_dense(18, seed=0), task=task)
    assert not (tmp_path / "run").exists()


def test_ids_that_the_model_has_no_row_for_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="writes id 13, but the model has 12 rows"):
        trainer(tmp_path / "run", model=tiny_dense(12, seed=0, eos_token_id=1, pad_token_id=0))


@pytest.mark.parametrize(
    ("family", "positions", "setting", "message"),
    [
        ("gpt2", 24, "task.options={}", r"takes 16 tokens, but 13 fit \(the model's positions: 24"),
        ("llama", 16, "task.options={}", r"takes 16 tokens, but 5 fit \(the model's positions: 16"),
        ("llama", 16, "rollout.max_new_tokens=16", r"max_new_tokens = 16: the model has 16 positions"),
        ("llama", 64, "rollout.max_prompt_tokens=15", r"takes 16 tokens, but 15 fit .*rollout\.max_prompt_tokens: 15"),
    ],
)
def test_what_exceeds_the_positions_is_found_before_the_first_step(tmp_path, family, positions, setting, message):
    """And the corrected command runs in the same folder."""

    def model():
        size = {"max_position_embeddings": positions, "vocab_size": 18}
        return routing_families.build(family, eos_token_id=17, pad_token_id=16, **size)

    options = ["task.options={}", setting, "train.global_steps=1"]
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path / "run", *options, model=model())
    assert not (tmp_path / "run").exists()
    corrected = ["task.options={max_operands: 4, hard_operands: 4}", "rollout.max_new_tokens=8"]
    trainer(tmp_path / "run", *options, *corrected, "rollout.max_prompt_tokens=8", model=model()).train()
    assert len(metrics(tmp_path / "run")) == 2


class Ragged(ChainTask):
    """Prompts without padding: 6, 8 or 10 tokens."""

    def encode(self, problem: Problem) -> list[int]:
        return self.tokenizer.encode(problem.prompt.replace(" ", ""))


def ragged(out: Path, *overrides: str, **kwargs) -> MiniRLTrainer:
    task = Ragged(min_operands=3, max_operands=5, hard_operands=5)
    return trainer(out, "task.options={}", "rollout.max_new_tokens=4", *overrides, task=task, **kwargs)


@pytest.mark.filterwarnings("ignore:eval.problems")
def test_overlong_prompts_are_replaced_and_counted_alike_after_a_resume(tmp_path):
    overrides = ["rollout.max_prompt_tokens=8", "train.mini_batches=2"]
    run, seen = ragged(tmp_path / "whole", *overrides), []
    generate = run.engine.generate
    run.engine.generate = lambda prompts, **kwargs: seen.append(prompts) or generate(prompts, **kwargs)
    run.train()
    steps = [prompts for prompts in seen if len(prompts) == 8]
    assert len(steps) == 3 and max(len(prompt) for prompts in seen for prompt in prompts) == 8
    lines = metrics(tmp_path / "whole")
    counted = [line["overlong_prompts"] for line in lines if "overlong_prompts" in line]
    assert len(counted) == 3 and sum(counted) > 3  # a third of all problems
    assert all(len({tuple(prompt) for prompt in prompts}) == 8 for prompts in steps)
    evaluated = next(len(prompts) for prompts in seen if len(prompts) != 8)
    assert 0 < evaluated < 16  # of 16 held-out problems

    first = ragged(tmp_path / "stopped", *overrides)
    first.folder.write(first.global_step(), first.samples)
    first.save()
    ragged(tmp_path / "stopped", *overrides, resume=True).train()
    assert timeless(metrics(tmp_path / "stopped")) == timeless(lines[1:])
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_where_nothing_is_too_long_the_problems_are_those_of_the_task(tmp_path):
    run = ragged(tmp_path / "run", "train.mini_batches=2")
    problems, _, overlong = run.prompts.draw(run.step)
    expected = run.task.sample(8, seed=derive_seed(0, "problems", 0))
    assert problems == expected and overlong == 0


def test_overlong_prompts_can_stop_a_run_or_leave_too_few(tmp_path):
    with pytest.raises(ConfigError, match=r"takes 10 tokens, but 8 fit.*on_overlong: drop"):
        ragged(tmp_path / "run", "rollout.max_prompt_tokens=8", "rollout.on_overlong=stop")
    with pytest.raises(ConfigError, match="100 draws of 4 gave 0 that fit"):
        ragged(tmp_path / "run", "rollout.max_prompt_tokens=5")
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"\d of 16 held-out problems are longer than 8 tokens"):
        ragged(tmp_path / "run", "rollout.max_prompt_tokens=8")


def test_the_limit_of_the_engine_counts_too(tmp_path):
    run = ragged(tmp_path / "run")
    assert run.prompts.longest == 512 - 4
    run.engine.max_model_len = 12
    assert run.prompts.longest == 8 and run.prompts.draw(run.step)[2] > 0


@pytest.mark.parametrize("family", ["mamba", "bert"])
def test_a_model_that_cannot_be_sampled_step_by_step_is_refused_by_name(tmp_path, family):
    model = routing_families.build(family, vocab_size=18, eos_token_id=17, pad_token_id=16)
    with pytest.raises(ConfigError, match=rf"rollout\.engine = 'hf': model: {type(model).__name__}"):
        trainer(tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match=r"eval\.through_trainer: model: .*or set it to false"):
        trainer(tmp_path / "run", model=model, engine=Plain(None))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy", ["stop", "drop"])
def test_a_policy_that_gives_no_numbers_while_sampling_has_diverged(tmp_path, policy):
    run = trainer(tmp_path / "run", f"rollout.on_fault={policy}", "eval.every=0")
    run.folder.write(run.global_step(), run.samples)
    run.save()
    with torch.no_grad():
        next(run.model.parameters())[3] = float("nan")
    run._sync()
    with pytest.raises(TrainingDiverged, match=r"global step 2, gradient step 2: weights of .*embed.*step-000001"):
        run.train()
    *kept, last = metrics(tmp_path / "run")
    assert len(kept) == 1 and (last["global_step"], last["grad_step"]) == (2, 2) and "weights" in last["warnings"][0]


def test_finite_weights_with_logits_that_are_none_have_diverged_too(tmp_path):
    run = trainer(tmp_path / "run", "eval.every=0")
    with torch.no_grad():
        run.model.model.norm.weight.fill_(3e38)  # times what is around 1: infinite here and there
    run._sync()
    with pytest.raises(TrainingDiverged, match=r"global step 1, .*logits of the target policy"):
        run.global_step()


@pytest.mark.parametrize("through", ["trainer", "rollout"])
def test_a_policy_that_turns_out_broken_in_an_evaluation_leaves_the_steps_lines(tmp_path, through):
    through_trainer = str(through == "trainer").lower()
    run = trainer(tmp_path / "run", "eval.every=1", f"eval.through_trainer={through_trainer}", "train.mini_batches=2")
    sync = run._sync

    def breaking() -> None:
        with torch.no_grad():
            next(run.model.parameters())[3] = float("nan")
        sync()

    run._sync = breaking
    with pytest.raises(TrainingDiverged, match="global step 2"):
        run.global_step()
    first, second, last = metrics(tmp_path / "run")
    assert (first["grad_step"], second["grad_step"], last["grad_step"]) == (1, 2, 3)
    assert "entropy" in second and "warnings" in last


def test_a_fault_of_the_engine_stays_the_engines(tmp_path):
    run = trainer(tmp_path / "run")
    with torch.no_grad():
        next(run.engine.model.parameters())[3] = float("nan")
    with pytest.raises(EngineError, match="logp_rollout: nan"):
        run.global_step()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def closings(run: MiniRLTrainer) -> list[int]:
    closed, close = [], run.engine.close
    run.engine.close = lambda: (closed.append(1), close())[1]
    return closed


def test_the_trainer_closes_the_engine_that_it_made_and_says_so_afterwards(tmp_path):
    run = trainer(tmp_path / "run", "train.global_steps=1")
    closed = closings(run)
    run.train()
    assert closed == [1]
    for use in (run.global_step, run.evaluate):
        with pytest.raises(RuntimeError, match=r"closed the engine.*resume=True"):
            use()
    again = trainer(tmp_path / "run", "train.global_steps=2", resume=True)
    again.train()
    assert again.step == 2


def test_it_is_closed_when_training_or_building_fails(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    closed = closings(run)
    run.rewards = lambda problems, rollout: torch.tensor([1e30, 0.0, 0.0, 0.0] * 4)
    with pytest.raises(TrainingDiverged):
        run.train()
    assert closed == [1]

    made = []
    monkeypatch.setattr(HFEngine, "close", lambda engine: made.append(engine))
    with pytest.raises(ConfigError, match="100 draws"):
        trainer(tmp_path / "other", "rollout.max_prompt_tokens=2")
    assert len(made) == 1


def test_an_engine_that_was_given_stays_open(tmp_path):
    engine = HFEngine(tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16), record_routes=True)
    for name in ("one", "two"):
        trainer(tmp_path / name, "train.global_steps=1", engine=engine).train()
    assert engine.model is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_a_step_cannot_move_are_told_at_the_start(tmp_path, dtype):
    model = tiny_dense(18, seed=0, eos_token_id=17, pad_token_id=16).to(getattr(torch, dtype))
    # One step of lr by hand, towards zero (the distance away from it may be twice as long), on every weight.
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    stuck = ((values - values.sign() * 1e-6).to(values.dtype) == values).float().mean().item()
    assert (stuck > 0.9) == (dtype == "bfloat16")
    said = rf"train\.lr = 1e-06: in {stuck:.0%} of the weights .*model\.dtype: float32.*mixed_precision"
    expected = pytest.warns(UserWarning, match=said) if dtype == "bfloat16" else nullcontext()
    with expected:
        trainer(tmp_path / "run", f"model.dtype={dtype}", "train.lr=1e-6", "eval.every=0", model=model)
    trainer(tmp_path / "larger", f"model.dtype={dtype}", "train.lr=0.1", "eval.every=0", model=model)
