"""Responses that an environment ends or writes into: masks, log-probabilities, routes, layouts, training."""

import json
from collections.abc import Sequence

import pytest
import torch

from minirl_edu.config import load_config
from minirl_edu.logprobs import lay_out, micro_batches, response_logprobs
from minirl_edu.models import tiny_moe
from minirl_edu.objectives import minirl_loss
from minirl_edu.rollout import HFEngine, Rollout, Sampling, play
from minirl_edu.routing import RoutingReplay
from minirl_edu.tasks import ChainTask, Episodic, Problem
from minirl_edu.trainer import MiniRLTrainer

PROMPTS, LIMIT, END = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], 16, 17
SAID = (3, 4)


def speaks(prompt: int, response: Sequence[int]) -> Sequence[int] | None:
    """Ends a response with token 1, answers a 0, 5 or 10, and an end token if it is the first."""
    last = response[-1]
    if last == 1:
        return None
    return SAID if last in (0, 5, 10) or (last == END and response.count(END) == 1) else ()


class Plain:
    """An engine without a `play` of its own."""

    def __init__(self, engine: HFEngine) -> None:
        self.generate, self.sync, self.close = engine.generate, engine.sync, engine.close


@pytest.fixture(scope="module")
def model():
    return tiny_moe(18, seed=0, eos_token_id=END, pad_token_id=16)


@pytest.fixture(scope="module", params=["asked at each token", "cut afterwards"])
def rollout(model, request) -> Rollout:
    engine = HFEngine(model, record_routes=True)
    played = engine if request.param == "asked at each token" else Plain(engine)
    rollout = play(played, PROMPTS, group_size=4, sampling=Sampling(LIMIT), seed=3, environment=speaks)
    return rollout.validate(num_experts=8)


def test_the_environment_ends_responses_and_what_it_says_stands_in_them(rollout):
    holes = 0
    for row, response in enumerate(rollout.responses):
        own, at = rollout.response_mask[row].tolist(), 0
        while at < len(response):
            assert own[at]
            answer = speaks(0, response[: at + 1])
            at += 1
            if answer is None or at + len(answer) >= LIMIT:
                break
            said = list(answer)
            assert response[at : at + len(said)] == said and not any(own[at : at + len(said)])
            holes += len(said)
            at += len(said)
            if not answer and response[at - 1] == END:
                break
        assert at == len(response)  # it ends where it has to, and nowhere else
    assert holes > 10
    assert len({len(response) for response in rollout.responses}) > 3
    assert (rollout.logp_rollout[~rollout.response_mask] == 0).all()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_trainer_gives_the_policys_tokens_the_engines_log_probabilities(model, rollout, share_prompts):
    with torch.no_grad():
        for rows, part, layout in micro_batches(rollout, 64, share_prompts=share_prompts):
            logp = response_logprobs(model, layout).logp
            torch.testing.assert_close(logp, rollout.logp_rollout[rows], atol=2e-5, rtol=0)
            assert torch.equal(part.response_mask, rollout.response_mask[rows])


def test_routes_cover_what_was_read_and_replay_makes_them_the_experts(model, rollout):
    assert torch.equal(rollout.routes.valid, rollout.inputs)
    layout, replay = lay_out(rollout, share_prompts=True), RoutingReplay(model)
    with torch.no_grad(), replay.record() as tape:
        response_logprobs(model, layout)
    assert layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs).max() == 0


def test_what_the_environment_wrote_is_not_trained_on(model, rollout):
    """The gradient is that of a loss whose terms are those of the policy's tokens, one by one."""
    advantages = torch.linspace(-1, 1, len(rollout.tokens))
    logp = response_logprobs(model, lay_out(rollout, share_prompts=False)).logp.detach().requires_grad_()
    minirl_loss(logp, logp.detach(), rollout.logp_rollout, advantages, rollout.response_mask).loss.backward()
    assert logp.grad is not None and (logp.grad[~rollout.response_mask] == 0).all()
    assert (logp.grad[rollout.response_mask] != 0).all()


def test_cutting_afterwards_and_asking_at_each_token_draw_from_one_distribution(model):
    """Mean length, and mean number of the environment's tokens, within four standard errors of each other."""
    engine, many = HFEngine(model), [PROMPTS[0]]
    found = []
    for played in (engine, Plain(engine)):
        drawn = play(played, many, group_size=1000, sampling=Sampling(LIMIT), seed=5, environment=speaks)
        found.append(torch.stack([drawn.lengths, drawn.lengths - drawn.response_mask.sum(1)]).double())
    a, b = found
    error = (a.var(1) / 1000 + b.var(1) / 1000).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 4 * error).all() and (error < 0.3).all()


def test_without_an_environment_play_is_generate(model):
    engine = HFEngine(model)
    played = play(engine, PROMPTS, group_size=2, sampling=Sampling(5), seed=1, environment=None)
    generated = engine.generate(PROMPTS, group_size=2, sampling=Sampling(5), seed=1)
    assert torch.equal(played.tokens, generated.tokens) and torch.equal(played.logp_rollout, generated.logp_rollout)


def test_a_response_that_is_no_run_or_a_mask_outside_of_it_is_refused(rollout):
    outside = rollout.response_mask.clone()
    row = int(rollout.lengths.argmin())
    outside[row, -1] = True
    with pytest.raises(ValueError, match="response_mask: true where attention_mask is not"):
        Rollout(**{**vars(rollout), "response_mask": outside}).validate()
    with pytest.raises(ValueError, match="attention_mask: each response must be one run"):
        Rollout(**{**vars(rollout), "response_mask": rollout.response_mask & False}).validate()


class Guided(ChainTask):
    """chain, in which the environment ends a response at `;` and says "0" after each comma."""

    def respond(self, problem: Problem, response: Sequence[int]) -> Sequence[int] | None:
        text = self.tokenizer.decode(list(response[-1:]))
        return self.tokenizer("0", add_special_tokens=False)["input_ids"] if text == "," else ()

    def reward(self, problem: Problem, response: str) -> float:
        return float(len(response) % 2 == 0)


def guided(out, *settings: str, **kwargs) -> MiniRLTrainer:
    small = (
        *("train.global_steps=3", "train.mini_batches=2", "train.mini_batch_prompts=4", "train.group_size=4"),
        *("eval.problems=8", "eval.every=1", "output.save_every=1", "train.tokens_per_micro_batch=200"),
        *("algorithm.replay=R3", "rollout.precision=int8"),
    )
    return MiniRLTrainer(load_config(None, [*small, *settings]), out, task=Guided(), progress=False, **kwargs)


def test_a_run_with_an_environment_trains_and_resumes_bit_for_bit(tmp_path):
    assert isinstance(Guided(), Episodic)
    guided(tmp_path / "whole").train()
    stopped = guided(tmp_path / "parts", "output.keep_last=1")
    start = {"global_step": 0, "grad_step": 0, **stopped.evaluate()}
    stopped.folder.write([start], stopped.samples)
    stopped.folder.write(stopped.global_step(), stopped.samples)
    stopped.save()
    guided(tmp_path / "parts", "output.keep_last=1", resume=True).train()
    lines = []
    for name in ("whole", "parts"):
        text = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines.append([{k: v for k, v in json.loads(line).items() if k not in ("seconds", "warnings")} for line in text])
    assert lines[0] == lines[1] and len(lines[0]) == 7
    assert all(line["k3_rollout_old"] < 0.05 for line in lines[0][1:])
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    said = [sample["response"] for line in samples for sample in line["samples"] if "," in sample["response"]]
    assert said and all(",0" in response or response.endswith(",") for response in said)
