"""The gap between two engines: what is measured, and that mistakes are recognised from data, without false alarms."""

import json
import math

import pytest
import torch

from minirl_edu import gap
from minirl_edu.gap import engines
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model, load_tokenizer
from minirl_edu.rollout import HFEngine, Rollout, Sampling
from minirl_edu.rollout.hf import end_tokens
from minirl_edu.routing import Routes
from tests.conftest import prompts as digits


@pytest.fixture(scope="module")
def moe():
    return gap.with_end_token(gap.random_model("moe", 0))


@pytest.fixture(scope="module")
def dense():
    return gap.with_end_token(gap.random_model("dense", 0))


def rows_of(setting: gap.Setting, architecture: str, seeds: int = 1) -> dict:
    workload = gap.Workload(lambda seed: gap.random_prompts(seed, 12), sampling=Sampling(12), seeds=seeds)
    return gap.run_setting(setting, gap.models_for(f"tiny-{architecture}", seeds), workload)


def test_a_model_with_more_rows_than_its_tokenizer_is_measured_as_it_is_trained(tmp_path):
    """Two rows that no text has, likely ones: both engines give them probability 0, and so does the diagnosis."""
    model = load_model("chain-steps")
    model.resize_token_embeddings(20, mean_resizing=False)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        rows[18:] = rows[:2]
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    load_tokenizer("chain-steps").save_pretrained(tmp_path)
    workload = gap.Workload(gap.prompts_for("chain-steps", None, 12), sampling=Sampling(12), seeds=1)
    row = gap.run_setting(gap.Setting(), gap.models_for(str(tmp_path), 1), workload, examined=True)
    (measured,) = gap.models_for(str(tmp_path), 1)
    assert (end_tokens(measured), measured.generation_config.suppress_tokens) == ([17], [18, 19])
    assert row["seeds"][0]["plain"]["k3"] < 1e-9 and "healthy" in row["diagnosis"]


# --------------------------------------------------------------------------------------------------------- measuring


def hand_made() -> tuple[Rollout, gap.Scores]:
    """Two responses of 3 and 2 tokens to a prompt of 2, with known log-ratios, and routes of one layer, top-1 of 4."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    attention = torch.cat([torch.ones(2, 2).bool(), mask], 1)
    experts = torch.zeros(2, 5, 1, 1, dtype=torch.uint8)
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, 0.0]])
    ratio = torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.0, 9.0]])
    rollout = Rollout(
        torch.zeros(2, 5).long(),
        attention,
        2,
        mask,
        (logp - ratio) * mask,
        Routes(experts, attention, (3,)),
        [[0, 0]],
        0,
    )
    other = experts.clone()
    other[0, 1] = 2  # an input; of the 7 inputs
    other[1, 4] = 2  # padding: does not count
    return rollout, gap.Scores(logp, torch.ones(2, 3), Routes(other, attention, (3,)))


def test_measure_says_what_the_definitions_say():
    rollout, scores = hand_made()
    result = gap.measure(rollout, scores)
    ratios = [0.1, -0.2, 0.0, 0.3, 0.0]
    plain = result["plain"]
    assert plain["k3"] == pytest.approx(sum(math.exp(r) - 1 - r for r in ratios) / 5, rel=1e-4)
    assert plain["k1"] == pytest.approx(-0.2 / 5, rel=1e-4)
    assert plain["mean_abs"] == pytest.approx(0.6 / 5, rel=1e-4) and plain["max_abs"] == pytest.approx(0.3, rel=1e-4)
    sequences = [math.exp(-0.1), math.exp(0.3)]
    assert plain["ess_sequence"] == pytest.approx(sum(sequences) ** 2 / (2 * sum(w * w for w in sequences)), rel=1e-4)
    assert plain["quantiles"]["0.5"] == pytest.approx(0.0) and plain["quantiles"]["0.99"] == pytest.approx(0.3)
    assert (result["tokens"], result["responses"], result["entropy"], result["r3"]) == (5, 2, 1.0, None)
    assert result["layers"] == [{"layer": 3, "flip_rate": pytest.approx(1 / 7)}]
    assert result["any_flip"] == result["flip_rate"] == pytest.approx(1 / 7)
    json.dumps(result)  # plain types all through


def test_positions_are_parts_of_the_whole():
    rollout, scores = hand_made()
    result = gap.measure(rollout, scores, scores)
    assert [(at["from"], at["to"]) for at in result["positions"]] == [(0, 0), (1, 1), (2, 2)]
    parts = [at["plain"]["k3"] for at in result["positions"]]
    assert (2 * parts[0] + 2 * parts[1] + parts[2]) / 5 == pytest.approx(result["plain"]["k3"], rel=1e-5)
    assert result["r3"] == result["plain"] and result["positions"][0]["r3"] == result["positions"][0]["plain"]


def test_scores_do_not_depend_on_the_micro_batches(moe, monkeypatch):
    """Prompts and responses of unlike length are sorted into micro-batches; rows and routes must come back in order."""
    engine = HFEngine(moe, record_routes=True)
    rollout = engine.generate(digits(5, lengths=(4, 9)), group_size=2, sampling=Sampling(12), seed=1)
    with torch.no_grad():
        expected = response_logprobs(moe, lay_out(rollout, share_prompts=False))
    monkeypatch.setattr("minirl_edu.gap.measurement.TOKEN_BUDGET", 50)
    scores = gap.score(moe, rollout)
    # fp32 sums in another order
    torch.testing.assert_close(scores.logp, expected.logp, rtol=0, atol=1e-5)
    assert scores.routes is not None and rollout.routes is not None
    assert rollout.routes.flip_rate(scores.routes, rollout.inputs).max() == 0
    torch.testing.assert_close(gap.score(moe, rollout, replayed=True).logp, expected.logp, rtol=0, atol=1e-5)
    assert (gap.score(moe, rollout, temperature=0.5).entropy < scores.entropy + 1e-6).all()


def test_intervals_are_students_on_the_right_scale():
    # t(0.975, 2 degrees of freedom) = 4.302653; the standard error of 1, 2, 3 is 1/√3.
    assert gap.interval([1.0, 2.0, 3.0], log=False) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    mean, low, high = gap.interval([1e-4, 1e-3, 1e-2], log=True)
    assert mean == pytest.approx(1e-3) and low * high == pytest.approx(1e-6) and low > 0
    assert gap.interval([0.0, 2.0], log=True)[0] == 1.0  # zeros have no logarithm
    assert math.isnan(gap.interval([0.5], log=True)[1])


# ----------------------------------------------------------------------------------------------------------- engines


def test_the_mechanism_without_vllm():
    """Nothing in fp32; in bf16 the MoE is an order of magnitude above its dense twin, and R3 brings it back."""
    k3 = {}
    for dtype in ("float32", "bfloat16"):
        for architecture in ("moe", "dense"):
            (seed,) = rows_of(gap.Setting("hf", dtype), architecture)["seeds"]
            k3[dtype, architecture] = seed["plain"]["k3"]
            if architecture == "moe":
                k3[dtype, "r3"] = seed["r3"]["k3"]
                assert (seed["flip_rate"] > 0.002) == (dtype == "bfloat16")
                assert seed["any_flip"] >= max(layer["flip_rate"] for layer in seed["layers"])
    assert max(k3["float32", kind] for kind in ("moe", "dense", "r3")) < 1e-10  # 1e-6 nats a token, squared
    assert k3["bfloat16", "moe"] > 10 * k3["bfloat16", "dense"]
    assert k3["bfloat16", "r3"] < 3 * k3["bfloat16", "dense"]


def test_random_policies_are_neither_flat_nor_certain(moe, dense):
    tokens = torch.tensor(gap.random_prompts(3))
    for model in (moe, dense):
        with torch.no_grad():
            p = model(tokens).logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        assert 0.5 * math.log(engines.VOCABULARY) < entropy < 0.9 * math.log(engines.VOCABULARY)


@pytest.mark.slow
@pytest.mark.nightly  # every day the mechanism without vLLM, above, and vLLM's routes: test_vllm.py
def test_the_mechanism_on_vllm():
    if missing := gap.vllm_missing():
        pytest.skip(missing)
    seeds = rows_of(gap.Setting("vllm", "bfloat16"), "moe", seeds=2)["seeds"]  # the second one through `sync`
    for seed in seeds:
        assert seed["plain"]["k3"] > 5 * seed["r3"]["k3"] and 1e-6 < seed["r3"]["k3"] < 1e-3
        assert 0.002 < seed["flip_rate"] < 0.1


def test_without_vllm_its_rows_say_how_to_install_it(monkeypatch):
    def missing():
        raise ImportError("vllm is not installed: pip install 'minirl-edu[vllm]'")

    monkeypatch.setattr("minirl_edu.rollout.vllm.check_vllm", missing)
    row = rows_of(gap.Setting("vllm"), "dense")
    assert row["seeds"] == [] and "pip install" in row["skipped"]
    assert "pip install" in gap.table([row]) and "pip install" in str(gap.vllm_missing())


def test_the_suite_goes_on_where_it_was(tmp_path, monkeypatch):
    settings = [gap.Setting("hf"), gap.Setting("hf", precision="int8")]
    monkeypatch.setattr(engines, "suite_settings", lambda moe: settings)
    workload = gap.Workload(lambda seed: gap.random_prompts(seed, 3), 2, Sampling(4), 1)
    first = gap.suite("tiny-dense", tmp_path, workload)
    (tmp_path / "rows" / "tiny-dense-transformers-fp32.json").unlink()
    measured = []
    run = engines.run_setting
    monkeypatch.setattr(engines, "run_setting", lambda setting, *rest: measured.append(setting) or run(setting, *rest))
    again = gap.suite("tiny-dense", tmp_path, workload)
    assert measured == settings[:1]
    assert [row["seeds"] for row in again] == json.loads(json.dumps([row["seeds"] for row in first]))
    gap.suite("tiny-dense", tmp_path, gap.Workload(workload.prompts, 2, Sampling(5), 1))
    assert measured == settings[:1] + settings  # what was asked for is not what is there


def test_the_suite_has_every_engine_that_fits_the_model():
    labels = [setting.label for setting in gap.suite_settings(moe=True)]
    assert len(set(labels)) == len(labels)
    for part in ("transformers bf16", "emulated int4", "vLLM fp32", "fp8 KV cache", "fp8 attention", "experts int8"):
        assert any(part in label for label in labels), part
    assert not any("experts" in setting.label for setting in gap.suite_settings(moe=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "tpu"}, "hf or vllm"),
        ({"dtype": "fp8"}, "dtype.*bfloat16"),
        ({"trainer_dtype": "int8"}, "trainer_dtype"),
        ({"precision": "int9"}, "int9"),
        ({"options": {"kv_cache_dtype": "fp8"}}, "hf has none"),
    ],
)
def test_settings_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gap.Setting(**arguments)


def test_tables_hold_both_sides_and_the_interval():
    row = rows_of(gap.Setting("hf", "bfloat16"), "moe", seeds=2)
    lines = gap.table([row]).splitlines()
    assert len(lines) == 4 and "R3" in lines[3] and "%" in lines[2] and "…" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
    mean, low, high = gap.summary(row)["plain"]["k3"]
    assert low < mean < high and f"{mean:.1e}" in lines[2]
    detail = gap.details(row)
    assert all(name in detail for name in ("quantile", "token position", "layer"))
    assert detail.count("R3") == 1 + len(row["seeds"][0]["positions"])


# --------------------------------------------------------------------------------------------------------- diagnosis

V, ENDS = 96, (3, 5)


def drawn(temperature=1.0, top_p=1.0, top_k=V, no_end=False, noise=0.0, rows=40, length=30, seed=0):
    """Responses drawn from random logits by a reference sampler, the logits, and the sampler's log-probabilities.

    `noise`: the sampler's logits are off by so much, as a low-precision engine's.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows * length, V, generator=generator)
    own = (logits + noise * torch.randn(logits.shape, generator=generator)) / temperature
    if no_end:
        own[:, list(ENDS)] = -math.inf
    order = own.argsort(1, descending=True)
    probability = own.softmax(1).gather(1, order)
    kept = (probability.cumsum(1) - probability < top_p) & (torch.arange(V) < top_k)
    own = own.masked_fill(torch.zeros_like(kept).scatter(1, order, ~kept), -math.inf)
    tokens = torch.multinomial(own.softmax(1), 1, generator=generator)
    logp = own.log_softmax(1).gather(1, tokens)[:, 0]
    return logits, tokens.view(rows, length).tolist(), logp


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_no_false_alarm(noise, temperature):
    logits, responses, logp = drawn(temperature, noise=noise)
    found = gap.diagnose(logits, responses, logp, temperature=temperature)
    assert found.names == ("healthy",) and found.drawn == found.numbers == gap.Hypothesis(temperature)
    assert (found.k3 < 1e-10) == (noise == 0)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("name", "sampler", "trainer"),
    [
        ("temperature", {"temperature": 0.73}, 1.0),
        ("temperature", {"temperature": 1.3}, 1.0),
        ("top_p", {"top_p": 0.95}, 1.0),
        ("top_p", {"top_p": 0.9, "temperature": 0.8}, 0.8),
        ("top_k", {"top_k": 20}, 1.0),
        ("end_token_suppressed", {"no_end": True}, 1.0),
    ],
)
def test_mistakes_that_the_reported_numbers_show(name, sampler, trainer, noise):
    logits, responses, logp = drawn(**sampler, noise=noise)
    ends = ENDS if name == "end_token_suppressed" else ()
    found = gap.diagnose(logits, responses, logp, temperature=trainer, ends=ends)
    assert found.names == (name,)
    assert found.k3_explained < 0.5 * found.k3
    assert found.numbers.temperature == pytest.approx(sampler.get("temperature", 1.0), rel=0.02)
    assert (found.numbers.top_p or 1.0, found.numbers.top_k or V) == (sampler.get("top_p", 1), sampler.get("top_k", V))
    assert found.findings[0].remedy and found.findings[0].evidence in str(found)


@pytest.mark.parametrize(
    ("name", "sampler", "trainer", "remedy"),
    [
        ("raw_logprobs", {"temperature": 0.7}, 0.7, "processed_logprobs"),
        ("raw_logprobs", {"temperature": 0.7}, 1.0, "divide the trainer's logits by 0.7"),
        ("top_p", {"top_p": 0.95}, 1.0, "top_p=1"),
        ("top_k", {"top_k": 20}, 1.0, "top_k"),
    ],
)
def test_mistakes_that_only_the_tokens_show(name, sampler, trainer, remedy):
    """The engine reports log-probabilities from before its sampler's settings: k3 is 0 wherever the trainer agrees."""
    logits, responses, _ = drawn(**sampler)
    tokens = torch.tensor(responses).flatten()
    raw = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    found = gap.diagnose(logits, responses, raw, temperature=trainer)
    assert found.names == (name,) and remedy in found.findings[0].remedy
    assert (found.k3 < 1e-10) == (trainer == 1.0)
    assert found.numbers == gap.Hypothesis()


def test_stale_weights_need_the_previous_ones_and_are_unexplained_without():
    old, responses, logp = drawn()
    new = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    found = gap.diagnose(new, responses, logp, alternatives={"stale weights": old}, expected_k3=1e-7)
    assert found.names == ("stale_weights",) and found.k3_explained < 1e-10 < 1e-2 < found.k3
    assert gap.diagnose(new, responses, logp, expected_k3=1e-7).names == ("unexplained",)
    assert gap.diagnose(new, responses, logp).names == ("healthy",)  # a low-precision engine may look like that


def test_end_tokens_in_the_wrong_places():
    logits, responses, _ = drawn(rows=20, length=10)
    responses = [[7 if token in ENDS else token for token in response] for response in responses]

    def names(edited: list[list[int]]) -> tuple[str, ...]:
        rows = [10 * i + t for i, response in enumerate(edited) for t in range(len(response))]
        tokens = torch.tensor([token for response in edited for token in response])
        reported = logits[rows].log_softmax(1).gather(1, tokens[:, None])[:, 0]
        return gap.diagnose(logits[rows], edited, reported, ends=ENDS).names

    ended = [[*response[: 4 + i % 5], ENDS[i % 2]] for i, response in enumerate(responses[:8])]
    assert names([*ended, *responses[8:]]) == ("healthy",)
    assert names([response[:-1] for response in ended] + responses[8:]) == ("end_token_missing",)
    assert names([[*response[:-1], 9] for response in ended] + responses[8:]) == ("other_end_token",)
    assert names([[*response[:3], ENDS[0], *response[4:]] for response in responses]) == ("end_token_ignored",)


def test_diagnose_refuses_what_does_not_fit_together():
    logits, responses, logp = drawn(rows=2, length=4)
    with pytest.raises(ValueError, match="8 rows and 8 logp_rollout for 4 tokens"):
        gap.diagnose(logits, responses[:1], logp)


def test_a_stale_prefix_is_the_old_prompt_under_the_new_response(moe):
    from minirl_edu.gap.diagnosis import response_logits, stale_prefix_logits

    engine = HFEngine(moe, record_routes=True)
    rollout = engine.generate(digits(4, lengths=(3, 8)), group_size=2, sampling=Sampling(6), seed=0)
    plain = response_logits(moe, rollout)
    assert len(plain) == rollout.response_mask.sum()
    torch.testing.assert_close(stale_prefix_logits(moe, moe, rollout), plain, rtol=0, atol=1e-4)  # fp32, two kernels
    assert (stale_prefix_logits(moe, gap.nudged(moe, 0), rollout) - plain).abs().max() > 0.05


@pytest.mark.parametrize("precision", ["int8", "fp8_e4m3"])
def test_no_false_alarm_from_a_low_precision_engine(moe, precision):
    check_healthy(moe, gap.Setting("hf", precision=precision))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [s for s in gap.suite_settings(moe=True) if s.engine == "hf"], ids=lambda s: s.label
)
def test_no_false_alarm_from_any_engine(moe, dense, setting):
    for model in (moe, dense):
        check_healthy(model, setting)


def check_healthy(model, setting):
    engine = gap.open_engine(setting, model, max_model_len=64)
    rollout = engine.generate(gap.random_prompts(1, 16), group_size=4, sampling=Sampling(16), seed=2)
    found = gap.examine(gap.as_dtype(model, setting.trainer_dtype), rollout, previous=gap.nudged(model, 3))
    assert found.names == ("healthy",), str(found)


# --------------------------------------------------------------------------------------------------------- accidents


@pytest.mark.slow
def test_every_accident_is_recognised(moe):
    rows = gap.accidents(moe, gap.random_prompts(0))
    assert {row["name"]: row["found"] for row in rows} == {
        name: [name.split(",")[0].removesuffix(" at 0.7")] for name in gap.ACCIDENTS
    }
    json.dumps(rows)
    assert all(row["found"][0] in gap.accident_table(rows) for row in rows)


def test_a_careless_rollout_reports_what_was_drawn(dense):
    """Without a mistake it is a rollout as any engine's: the trainer's log-probabilities, an end token at the end."""
    rollout = gap.careless_rollout(dense, gap.random_prompts(0, 8), group_size=4, max_new_tokens=16, seed=0)
    torch.testing.assert_close(gap.score(dense, rollout).logp, rollout.logp_rollout, rtol=0, atol=1e-4)
    ends = end_tokens(dense)
    assert any(len(response) < 16 for response in rollout.responses)
    for response in rollout.responses:
        assert (response[-1] in ends) >= (len(response) < 16) and not set(response[:-1]) & set(ends)


def test_careless_prompts_have_one_length(dense):
    with pytest.raises(ValueError, match="one length"):
        gap.careless_rollout(dense, [[1], [1, 2]], group_size=1, max_new_tokens=2, seed=0)
