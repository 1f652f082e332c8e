"""The one-file MiniRL, `lessons/nano_minirl.py`, is the library's algorithm: same numbers from the same weights."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minirl_edu.advantages import group_mean_advantages
from minirl_edu.logprobs import Layout, lay_out, response_logprobs
from minirl_edu.models import load_model
from minirl_edu.objectives import minirl_loss
from minirl_edu.precision import Precision, round_weights_
from minirl_edu.rollout import Rollout
from minirl_edu.routing import Routes, RoutingReplay
from minirl_edu.tasks import ChainTask, Problem
from minirl_edu.tasks.base import held_out
from minirl_edu.tasks.chain import HELD_OUT_FRACTION, VOCABULARY

FILE = Path(__file__).resolve().parents[2] / "lessons" / "nano_minirl.py"
REPLAYS = ("none", "R2", "R3")
TEXTS = ["3+4+9", "1+2+3+4+5+6", "9+9+9+9", "5+0+5", "7+3+8+1+6+2", "2+6+4+4"]
CLOSE = 2e-5  # nats: fp32 sums in another order, through two layers


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano_minirl", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nano: Any = _module()


@pytest.fixture(scope="module")
def rollout() -> Any:
    """24 responses, of lengths that differ, from an engine with three bits."""
    engine = nano.rounded(nano.load(nano.COLD_START), 3)
    drawn = nano.sample(engine, TEXTS, 4, torch.Generator().manual_seed(3))
    assert drawn.mask.sum(1).unique().numel() > 2 and drawn.advantages.any()
    return drawn


@pytest.fixture
def model() -> PreTrainedModel:
    return load_model("chain-steps")


def moved(seed: int = 0) -> dict[str, Tensor]:
    """The cold start, some updates later: far enough for M_t and the cap to act."""
    generator, policy = torch.Generator().manual_seed(seed), nano.load(nano.COLD_START)
    with torch.no_grad():
        for weight in policy.values():
            weight += 0.4 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return policy


def of_library(rollout: Any) -> Rollout:
    """A rollout of the file as the library has it."""
    prompt = torch.ones(len(rollout.tokens), nano.WIDTH, dtype=torch.bool)
    attention = torch.cat((prompt, rollout.mask), 1)
    experts = torch.cat((rollout.routes, rollout.routes[:, -1:]), 1).to(torch.uint8)
    fed = attention & torch.cat((attention[:, 1:], torch.zeros(len(prompt), 1, dtype=torch.bool)), 1)
    prompts = rollout.tokens[:: len(rollout.tokens) // len(TEXTS), : nano.WIDTH].tolist()
    routes = Routes(experts, fed, (0, 1))
    return Rollout(rollout.tokens, attention, nano.WIDTH, rollout.mask, rollout.logp, routes, prompts, 0).validate()


def put(policy: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Give a transformers model the weights of the file's policy, whose experts it stacks."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(stacked(policy, name))


def stacked(weights: dict[str, Tensor], name: str) -> Tensor:
    """The weight (or gradient) of the file's policy that transformers calls `name`."""
    name = name.removeprefix("model.").removesuffix(".weight")
    if "experts" not in name:
        return weights[name]
    at, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return torch.stack([torch.cat([weights[f"{at}.{e}.{part}"] for part in parts]) for e in range(nano.EXPERTS)])


def test_it_is_short_and_needs_torch_alone():
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}


def test_the_page_about_it_names_the_right_lines():
    page = (FILE.parent / "site" / "nano_minirl.md").read_text(encoding="utf-8")
    lines = FILE.read_text(encoding="utf-8").splitlines()
    quoted = re.findall(r"^\| (\d+) \| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 15
    assert [(number, code) for number, code in quoted if code not in lines[int(number) - 1]] == []
    parts = dict(re.findall(r"^\| `(\w+)` \| (\d+–\d+) \|", page, re.MULTILINE))
    functions = {node.name: node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)}
    spans = {
        name: f"{min([node.lineno, *(line.lineno for line in node.decorator_list)])}–{node.end_lineno}"
        for name, node in functions.items()
    }
    assert parts == {name: spans[name] for name in spans if name not in ("norm", "rotate")}
    printed = re.search(r"```text\n( 0  score.*?)```", page, re.DOTALL)
    assert printed
    words = re.findall(r"^\| ([a-zA-Z ]+) \| ", page.partition("## What it prints")[2], re.MULTILINE)[1:]
    assert words == re.findall(r"([a-zA-Z]+(?: [a-z](?= ))?) +[-+\d]", printed[1].splitlines()[0])


def test_its_task_is_the_librarys():
    task = ChainTask()
    for is_held_out in (False, True):
        found = nano.problems(50, nano.random.Random(0), held_out=is_held_out)
        assert [held_out(text, HELD_OUT_FRACTION) for text in found] == [is_held_out] * 50
        assert {text.count("+") for text in found} == {2, 3, 4, 5}
    assert (VOCABULARY.index("<pad>"), VOCABULARY.index("<eos>")) == (nano.PAD, nano.END)
    assert tuple(nano.VOCABULARY[: nano.PAD]) == VOCABULARY[: nano.PAD]
    assert (task.prompt_width, task.max_new_tokens) == (nano.WIDTH, nano.LIMIT)


def test_its_prompts_rewards_and_advantages_are_the_librarys(rollout):
    task = ChainTask()
    problems = [Problem(text.ljust(nano.WIDTH - 1) + "=", str(sum(map(int, text[::2])) % 10), {}) for text in TEXTS]
    assert [task.encode(problem) for problem in problems] == rollout.tokens[::4, : nano.WIDTH].tolist()
    texts = task.tokenizer.batch_decode(of_library(rollout).responses, skip_special_tokens=True)
    rewards = torch.tensor([task.reward(problems[i // 4], text) for i, text in enumerate(texts)])
    assert 0 < rewards.mean() < 1
    assert torch.equal(rollout.rewards, rewards)
    torch.testing.assert_close(rollout.advantages, group_mean_advantages(rewards, 4))


def test_log_probabilities_entropies_and_routes_are_those_of_transformers(rollout, model):
    ours, replay = of_library(rollout), RoutingReplay(model)
    layout = lay_out(ours, share_prompts=False)
    policy = moved()
    put(policy, model)
    with torch.no_grad(), replay.record() as tape:
        expected = response_logprobs(model, layout)
    logp, entropy, used = nano.logprobs(policy, rollout, None)
    torch.testing.assert_close(logp, expected.logp, atol=CLOSE, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy, atol=CLOSE, rtol=0)
    assert torch.equal(used.sort(-1)[0], tape.routes.experts.long().sort(-1)[0])


def test_the_engine_is_the_librarys_with_weights_of_three_bits(rollout, model):
    """Its log-probabilities, taken token by token with a cache, and its routes."""
    round_weights_(model, Precision(weights="int3"))
    layout = lay_out(ours := of_library(rollout), share_prompts=False)
    with torch.no_grad(), RoutingReplay(model).record() as tape:
        logp = response_logprobs(model, layout).logp
    torch.testing.assert_close(rollout.logp, logp, atol=CLOSE, rtol=0)
    assert ours.routes is not None
    assert layout.unpack(tape.routes).flip_rate(ours.routes, ours.inputs).tolist() == [0, 0]


def test_sampling_draws_from_the_distribution_whose_log_probabilities_it_keeps():
    """Of 4000 first tokens after a prompt, the frequencies are the engine's probabilities."""
    engine = nano.rounded(nano.load(nano.COLD_START), 2)
    drawn = nano.sample(engine, TEXTS[:1], 4000, torch.Generator().manual_seed(0))
    second = drawn.tokens[:, nano.WIDTH + 1].bincount(minlength=18) / 4000
    logits, _ = nano.forward(engine, drawn.tokens[:1, : nano.WIDTH + 1])
    probabilities = logits[0, -1].softmax(-1).detach()
    same = (drawn.tokens[:, nano.WIDTH] == drawn.tokens[0, nano.WIDTH]).float().mean()
    assert same > 0.98  # nearly all begin with a comma, so that the second token has one distribution
    assert (second - probabilities).abs().max() < 0.03  # 3 standard errors of a frequency, and the other 2 %
    assert probabilities.max() < 0.9


@pytest.mark.parametrize("replay", REPLAYS)
def test_loss_and_gradient_are_the_librarys(rollout, model, replay):
    """At a θ some way from θ_old, with clipped and capped tokens, under each kind of replay."""
    ours, routing = of_library(rollout), RoutingReplay(model)
    layout = lay_out(ours, share_prompts=False)
    start, policy = nano.load(nano.COLD_START), moved()
    logp_old, used = old(start, rollout, replay)
    forced = {"none": None, "R2": used, "R3": rollout.routes}[replay]
    logp, _, _ = nano.logprobs(policy, rollout, forced)
    loss, weight, m = nano.minirl_loss(logp, logp_old, rollout, 24)
    loss.backward()
    assert (~m).sum() > 0 and weight.max() == 5

    put(policy, model)
    model.requires_grad_().zero_grad()
    expected, metrics = of_transformers(model, routing, layout, ours, logp_old, forced, rollout.advantages)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert (~m)[rollout.mask].float().mean() == pytest.approx(metrics["clip_frac_pos"] + metrics["clip_frac_neg"])
    gradients = {name: weight.grad for name, weight in policy.items() if weight.grad is not None}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # fp32 sums in another order: 4e-6 of the largest entry was seen.
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(stacked(gradients, name), parameter.grad, atol=1e-4 * scale, rtol=0)


def old(policy: dict[str, Tensor], rollout: Any, replay: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logp, _, used = nano.logprobs(policy, rollout, rollout.routes if replay == "R3" else None)
    return logp, used


def of_transformers(
    model: PreTrainedModel,
    routing: RoutingReplay,
    layout: Layout,
    rollout: Rollout,
    logp_old: Tensor,
    forced: Tensor | None,
    advantages: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The library's loss, backpropagated."""
    if forced is None:
        context = routing.record()
    else:
        columns = layout.source.shape[1]
        valid = torch.ones(forced.shape[:2], dtype=torch.bool)[:, :columns]
        context = routing.replay(Routes(forced[:, :columns].to(torch.uint8), valid, (0, 1)))
    with context:
        logp = response_logprobs(model, layout).logp
        result = minirl_loss(logp, logp_old, rollout.logp_rollout, advantages, rollout.response_mask)
        result.loss.backward()
    return result.loss, result.metrics


def test_replaying_its_own_routes_changes_no_bit(rollout):
    results = []
    for forced in (False, True):
        policy = moved()
        used = nano.logprobs(policy, rollout, None)[2] if forced else None
        logp, _, _ = nano.logprobs(policy, rollout, used)
        logp.sum().backward()
        results.append((logp, policy["layers.0.mlp.gate"].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()


def test_under_r3_no_expert_differs_from_the_engines_and_without_replay_some_do(rollout):
    policy = nano.load(nano.COLD_START)
    assert torch.equal(old(policy, rollout, "R3")[1], rollout.routes)
    live = old(policy, rollout, "none")[1]
    assert 0 < (live.sort(-1)[0] != rollout.routes.sort(-1)[0]).any(-1).float().mean() < 0.5


def calls_of_a_step(monkeypatch: pytest.MonkeyPatch, replay: str, **options: Any) -> list[tuple[Tensor, Tensor, Any]]:
    """log π_θ, log π_old and the responses of each micro-batch in one global step."""
    calls, loss = [], nano.minirl_loss

    def watched(logp: Tensor, logp_old: Tensor, part: Any, responses: int) -> Any:
        calls.append((logp.detach(), logp_old, part))
        return loss(logp, logp_old, part, responses)

    monkeypatch.setattr(nano, "minirl_loss", watched)
    nano.train(replay, seed=0, steps=1, **options)
    return calls


@pytest.mark.parametrize("replay", REPLAYS)
def test_the_ratio_is_one_in_the_first_mini_batch_and_pi_old_is_that_of_the_start(monkeypatch, replay):
    calls = calls_of_a_step(monkeypatch, replay, N=2, prompts=4, group_size=4, micro_batch=8)
    assert len(calls) == 4
    assert [torch.equal(logp, logp_old) for logp, logp_old, _ in calls] == [True, True, False, False]
    start = nano.load(nano.COLD_START)
    assert all(torch.equal(old(start, part, replay)[0], logp_old) for _, logp_old, part in calls)


def test_micro_batches_add_up():
    """The gradient of 24 responses, from one backward and from three."""
    rollout = nano.sample(moved(), TEXTS, 4, torch.Generator().manual_seed(0))
    gradients = []
    for size in (24, 8):
        policy = nano.load(nano.COLD_START)
        for part in [nano.Rollout(*part) for part in zip(*(x.split(size) for x in rollout), strict=True)]:
            logp, _, _ = nano.logprobs(policy, part, None)
            nano.minirl_loss(logp, logp.detach(), part, 24)[0].backward()
        gradients.append(policy["layers.1.self_attn.q_proj"].grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_it_learns_in_thirty_steps(capsys):
    """40 s of a processor. Seeds 0, 1 and 2 end at 0.98, 0.96 and 0.99."""
    assert nano.train("R3", seed=0) > 0.9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert "score 0.44" in lines[0]
    assert all("flips 0.0%" in line for line in lines)
