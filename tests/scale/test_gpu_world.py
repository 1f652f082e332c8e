"""`scale/gpu_world.py` on a CPU: its engine, its products, its order, its summary, and all of it in miniature."""

import dataclasses
import itertools
import json

import pytest
import torch

from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model
from minirl_edu.precision import Precision, round_activations, round_weights_
from minirl_edu.rollout import Sampling
from minirl_edu.routing import RoutingReplay
from minirl_edu.tasks import make_task
from minirl_edu.tasks.trail import TrailTask
from scale import gpu_world


@pytest.fixture(scope="module")
def model():
    return load_model("trail-experts").eval()


def rollout_of(model, *, kind="exact", noise=0.0, group_size=8, environment=True, dtype=torch.float32):
    """Responses of the script's engine to problems of `trail`."""
    task = TrailTask(max_new_tokens=24)
    engine = gpu_world.Engine(model, kind=kind, noise=noise, rows=64, length=24, seed=0, graph=False, dtype=dtype)
    problems = task.sample(4, seed=0)
    asked = {"group_size": group_size, "sampling": Sampling(24), "seed": 1}
    respond = (lambda i, response: task.respond(problems[i], response)) if environment else None
    return engine.play([task.encode(p) for p in problems], environment=respond, **asked), task, problems


def scored(model, rollout, *, replayed):
    layout, replay = lay_out(rollout, share_prompts=True), RoutingReplay(model)
    with torch.no_grad():
        if not replayed:
            return response_logprobs(model, layout).logp
        with replay.replay(layout.pack(rollout.routes)):
            return response_logprobs(model, layout).logp


@pytest.mark.parametrize(("noise", "replayed"), [(0.0, False), (0.0, True), (0.3, True)])
def test_the_engine_draws_from_the_model_and_records_the_experts_that_it_used(model, noise, replayed):
    rollout, *_ = rollout_of(model, noise=noise)
    assert torch.allclose(scored(model, rollout, replayed=replayed), rollout.logp_rollout, atol=1e-4)


def test_noise_on_the_routers_moves_the_engine_away_from_the_model(model):
    rollout, *_ = rollout_of(model, noise=0.3)
    assert (scored(model, rollout, replayed=False) - rollout.logp_rollout).abs().max() > 0.1


def test_what_the_engine_draws_has_the_frequencies_that_it_reports(model):
    rollout, *_ = rollout_of(model, group_size=16, environment=False)
    drawn = rollout.logp_rollout[rollout.response_mask].double()
    # E[log p] = −H, and its variance over draws is that of log p.
    entropies = response_logprobs(model, lay_out(rollout, share_prompts=True)).entropy[rollout.response_mask].double()
    error = (drawn + entropies).std() / len(drawn) ** 0.5
    assert (drawn + entropies).mean().abs() < 4 * error


def test_the_environment_ends_the_responses_that_are_right_and_no_others(model):
    rollout, task, problems = rollout_of(model)
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    right = [bool(task.reward(problems[row // 8], text)) for row, text in enumerate(texts)]
    assert any(right) and not all(right)
    assert all(length == 4 for length, good in zip(rollout.lengths.tolist(), right, strict=True) if good)
    assert all(length == 24 for length, good in zip(rollout.lengths.tolist(), right, strict=True) if not good)


def test_emulated_products_are_those_of_the_library(model):
    rollout, *_ = rollout_of(model, kind="emulated")
    rounded, precision = load_model("trail-experts").eval(), Precision("fp8_e4m3", "fp8_e4m3")
    round_weights_(rounded, precision)
    rounded.set_experts_implementation("grouped_mm")
    with round_activations(rounded, precision):
        logp = scored(rounded, rollout, replayed=True)
    # A rare value on the border between two of the grid is rounded the other way.
    off = (logp - rollout.logp_rollout).abs()[rollout.response_mask]
    assert off.median() < 1e-5 and off.mean() < 1e-2
    exact = (scored(model, rollout, replayed=True) - rollout.logp_rollout).abs()[rollout.response_mask]
    assert exact.mean() > 20 * off.mean()


def test_real_fp8_products_in_bf16_are_near_the_emulated_ones(model, monkeypatch):
    """torch has the products of two matrices for CPUs, not those of stacked experts."""
    monkeypatch.setattr(gpu_world, "has_grouped_fp8", lambda: False)
    rollout, *_ = rollout_of(model, kind="fp8", noise=0.3, dtype=torch.bfloat16)
    off = (scored(model, rollout, replayed=True) - rollout.logp_rollout).abs()[rollout.response_mask]
    assert 1e-4 < off.mean() < 5e-2 and rollout.logp_rollout.dtype == torch.float32
    weight = torch.randn(4, 48, 32, generator=torch.Generator().manual_seed(0))
    x, ends = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 3, 9, 16]).int()
    for w, where in ((weight, ends), (weight[0], None)):
        real, emulated = (gpu_world.Product(w, kind, torch.float32)(x, where) for kind in ("fp8", "emulated"))
        assert (real - emulated).norm() < 1e-2 * emulated.norm()


def test_fp8_values_times_scales_are_what_the_emulation_rounds_to():
    from minirl_edu.precision import quantise

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    values, scale = gpu_world.to_fp8(x)
    assert torch.allclose(values.float() * scale, quantise(x, "fp8_e4m3"), rtol=1e-6)


def test_an_engine_follows_its_model_and_refuses_what_it_cannot_do(model):
    task = make_task("trail", max_new_tokens=8)
    other = load_model("trail-experts")
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    made = {"kind": "exact", "noise": 0.0, "rows": 8, "length": 8, "seed": 0, "graph": False, "dtype": torch.float32}
    engine, prompt = gpu_world.Engine(model, **made), task.encode(task.sample(1, seed=0)[0])
    engine.sync(other, version=3)
    rollout = engine.generate([prompt], group_size=8, sampling=Sampling(8), seed=0)
    assert rollout.weight_version == 3
    assert torch.allclose(scored(other, rollout, replayed=False), rollout.logp_rollout, atol=1e-4)
    with pytest.raises(ValueError, match="one width"):
        engine.generate([prompt, prompt[1:]], group_size=1, sampling=Sampling(8), seed=0)
    with pytest.raises(ValueError, match="writes into a response"):
        engine.play([prompt], group_size=1, sampling=Sampling(8), seed=0, environment=lambda i, y: [1])


def test_the_experts_of_this_file_give_transformers_results_and_gradients():
    task, found = make_task("trail"), {}
    tokens = torch.tensor([task.encode(p) for p in task.sample(4, seed=0)])
    for kind in ("grouped_mm", "own"):
        model = load_model("trail-experts")
        gpu_world.use_grouped_products(model) if kind == "own" else model.set_experts_implementation(kind)
        logits = model(input_ids=tokens, use_cache=False).logits
        logits.square().mean().backward()
        found[kind] = logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for own, theirs in zip(found["own"], found["grouped_mm"], strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)


def test_under_autocast_the_experts_multiply_in_bf16(model):
    layer = load_model("trail-experts").model.layers[0].mlp.experts
    x, index, gates = torch.randn(32, 128), torch.arange(32)[:, None] % 16, torch.ones(32, 1)
    exact = gpu_world.experts_in_autocast(layer, x, index, gates)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gpu_world.experts_in_autocast(layer, x, index, gates)
    off = float(((rounded - exact).norm() / exact.norm()).detach())
    assert rounded.dtype == torch.float32 and 1e-4 < off < 2e-2


# ----------------------------------------------------------------------------------------------------------- the runs


@pytest.mark.slow
def test_the_cold_start_learns_in_bf16(tmp_path):
    # A cache of bf16 weights over all steps would leave attention as it was drawn: a loss of 2.4 after 200 steps.
    record = gpu_world.cold_start(dataclasses.replace(gpu_world.MINI, cold_steps=100), tmp_path)
    assert record["loss"] < 1.8


def test_the_world_is_ten_times_as_large():
    from minirl_edu.models import tiny_moe

    world = gpu_world.World()
    sizes = {"hidden": world.hidden, "heads": world.heads, "kv_heads": world.heads // 2, "experts": 16, "top_k": 1}
    large = tiny_moe(18, seed=0, expert_hidden=world.expert_hidden, **sizes)
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(10 * 891_904, rel=0.02)
    config = gpu_world.make_config(world, "no_is", "wrong", 3, "trail-experts")
    assert config.train.mini_batch_prompts * config.train.group_size == 8 * 128
    assert not config.algorithm.is_correction and config.rollout.router_noise == 0.3 and config.seed == 3
    assert config.task.options["ends"] == "wrong" and config.train.lr == 1.5e-4


def test_whole_seeds_of_the_main_variants_come_first():
    jobs = gpu_world.plan(2)
    assert jobs[:6] == [(v, "right", seed) for seed in (0, 1) for v in ("minirl", "no_is", "r3")]
    assert len(jobs) == len(set(jobs)) == 2 * (3 + 4 + 1)


class Fake:
    """A worker that says what it is told to say."""

    made, broken = 0, frozenset()

    def __init__(self, world):
        type(self).made += 1
        self.alive = True

    def ask(self, job, limit):
        if job[0] == "cold":
            return {"score": 0.1}
        return {"error": "broken"} if job[1] in self.broken else {"curves": {}, "scores": []}

    def close(self):
        self.alive = False


def runs(tmp_path, monkeypatch, broken, budget=100.0):
    monkeypatch.setattr(Fake, "broken", broken)
    monkeypatch.setattr(Fake, "made", 0)
    monkeypatch.setattr(gpu_world, "Worker", Fake)
    file = tmp_path / "results.jsonl"
    made = gpu_world.Runs(dataclasses.replace(gpu_world.MINI, graph=False), file, budget)
    made.make(gpu_world.plan(2))
    return [line for line in gpu_world.read(file) if line["check"] == "run"]


def test_one_broken_variant_does_not_lose_the_others_and_only_it_is_run_again(tmp_path, monkeypatch):
    lines = runs(tmp_path, monkeypatch, {"no_is"})
    errors = [line for line in lines if "error" in line]
    assert len(lines) == len(gpu_world.plan(2)) and {line["variant"] for line in errors} == {"no_is"}
    assert Fake.made == 1 + len(errors)  # each in a new process
    again = runs(tmp_path, monkeypatch, set())[len(lines) :]
    assert {line["variant"] for line in again} == {"no_is"} and not any("error" in line for line in again)
    assert len(runs(tmp_path, monkeypatch, set())) == len(lines) + len(again)


def test_where_nothing_ends_the_card_is_given_up(tmp_path, monkeypatch):
    lines = runs(tmp_path, monkeypatch, {"minirl", "no_is", "r3", "length_norm"})
    assert len(lines) == 4 and all(line["error"] == "broken" for line in lines)


def test_no_run_starts_beyond_the_budget(tmp_path, monkeypatch):
    assert runs(tmp_path, monkeypatch, set(), budget=3.0) == []


def line(variant, ends, seed, *, drift, entropy, score):
    """A results line of 9 updates with an entropy that goes to `entropy` and a score that goes to `score`."""
    curves = {name: [1.0] * 9 for name in gpu_world.CURVES}
    curves |= {"entropy": [0.3] * 3 + [entropy] * 6, "entropy_drift": [drift] * 9}
    curves |= {"k3_rollout_old": [1e-4 if variant == "r3" else 0.1] * 9}
    scores = [
        {"grad_step": i, "score": s, "score_rollout": s} for i, s in ((0, 0.1), (3, 0.15), (6, score), (9, score))
    ]
    known = {
        "variant": variant,
        "ends": ends,
        "seed": seed,
        "updates": 9,
        "diverged": None,
        "run_seconds": 1.0,
        "size": {},
    }
    return {**known, "curves": curves, "scores": [*scores[:-1], *({**scores[-1], "grad_step": n} for n in (7, 8, 9))]}


def test_the_summary_pairs_predicted_and_measured_and_judges_by_the_papers_criteria():
    found = []
    for seed, (ends, sign) in itertools.product(range(8), (("right", -1), ("wrong", 1), ("all", 0))):
        size = 0.1 + seed / 1000
        found.append(line("minirl", ends, seed, drift=sign * size, entropy=0.3, score=0.4 + seed / 1000))
        found.append(line("no_is", ends, seed, drift=0.0, entropy=0.3 + 2 * sign * size, score=0.02 + seed / 1000))
        found.append(line("r3", "right", seed, drift=0.0, entropy=0.3, score=0.5)) if ends == "right" else None
    result = gpu_world.summary([*found, {"check": "run", "error": "lost"}])
    json.dumps(result)
    right = result["drift"]["right"]
    assert right["same_sign"] == 8 and right["measured"][2] < 0 < result["drift"]["wrong"]["measured"][1]
    assert right["pairs"][0] == [-0.1, -0.2] and result["agreement"]["pearson"] > 0.99
    assert result["variants"]["no_is"]["collapsed"][0] == 1.0
    verdicts = {name: [text.split(",")[0] for text in texts] for name, texts in result["claims"].items()}
    assert verdicts["F1c-both"][0] == "collapses  no_is: holds"
    assert verdicts["F1d-both"] == ["lower kl r3: holds", "lower final_score r3: opposite"]
    assert "not run" in result["claims"]["F1b-both"][0]


@pytest.mark.slow
def test_everything_runs_in_miniature_and_the_second_call_has_nothing_to_do(tmp_path, capsys):
    file = tmp_path / "world.jsonl"
    call = ["--mini", "--only", "minirl", "no_is/right", "--out", str(file)]
    assert gpu_world.main(call) == 0
    lines = gpu_world.read(file)
    made = [entry for entry in lines if entry["check"] == "run"]
    assert {(x["variant"], x["ends"]) for x in made} == {("minirl", e) for e in ("right", *gpu_world.CONTRASTS)} | {
        ("no_is", "right")
    }
    assert all(x["updates"] == (3 if x["ends"] == "right" else 2) and x["products"] == "emulated" for x in made)
    assert lines[0]["parameters"] > 0 and "agreement" not in lines[-1]
    assert gpu_world.main([*call, "--summary"]) == 0 and gpu_world.main(call) == 0
    assert [x["check"] for x in gpu_world.read(file)[len(lines) :]] == ["summary", "summary"]
    assert "score" in capsys.readouterr().out
