"""`scale/gpu_checks.py` in miniature on the CPU: the checks themselves run, and their runner reports what fails."""

import json

import pytest

from minirl_edu import lm_head, logprobs
from scale import gpu_checks

CHEAP = ("env", "parity", "replay", "row32k", "packing", "gap", "fp8", "stream", "learn")
"""Those that need no process of their own. `fsdp2` and `memory` take two minutes: see the nightly test."""


@pytest.fixture
def mini(monkeypatch):
    monkeypatch.setattr(gpu_checks, "MINI", True)
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    monkeypatch.setattr(lm_head, "CHUNK", lm_head.CHUNK)  # `parity` changes it


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in ("replay", "learn"))) for name in CHEAP]
)
def test_a_check_runs_in_miniature_and_passes(mini, name):
    found = getattr(gpu_checks, name)()
    json.dumps(found)
    assert found.get("ok", True), found


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["fsdp2", "memory"])
def test_a_check_with_processes_of_its_own_runs_in_miniature_and_passes(name, tmp_path):
    assert gpu_checks.main(["--mini", "--only", name, "--out", str(tmp_path / "results.jsonl")]) == 0


def test_parity_sees_a_wrong_gradient(mini, monkeypatch):
    forward = logprobs.response_logprobs

    def wrong(model, layout, **kwargs):
        out = forward(model, layout, **kwargs)
        return out if out.logp.dtype == logprobs.torch.float64 else out._replace(logp=out.logp * (1 + 1e-3))

    monkeypatch.setattr(logprobs, "response_logprobs", wrong)
    assert not gpu_checks.parity()["ok"]


def test_the_emulated_fp8_is_not_called_honest_if_it_rounds_otherwise(mini, monkeypatch):
    from minirl_edu import precision

    quantise = precision.quantise
    monkeypatch.setattr(precision, "quantise", lambda x, fmt: quantise(x, "int8"))
    assert not gpu_checks.fp8()["ok"]


@pytest.mark.slow
def test_results_are_appended_with_card_and_versions_and_a_failure_sets_the_exit_status(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results" / "mini.jsonl"
    assert gpu_checks.main(["--mini", "--only", "env", "--out", str(file)]) == 0
    monkeypatch.setitem(gpu_checks.LIMITS, gpu_checks.env, 0.01)
    assert gpu_checks.main(["--mini", "--only", "env", "--out", str(file)]) == 1
    first, second = map(json.loads, file.read_text().splitlines())
    assert first["check"] == "env" and first["card"] == "cpu" and first["torch"] and first["bf16_tflops"] > 0
    assert second["ok"] is False and second["error"] == "not done after 0.01 s"
    assert "failed: env" in capsys.readouterr().out
