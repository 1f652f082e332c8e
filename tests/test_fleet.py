"""The engine on several servers that pretend: what is lost with one of them is sampled by another."""

import errno
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minirl_edu.config import load_config
from minirl_edu.models import load_model, tiny_moe
from minirl_edu.rollout import EngineError, Sampling, fleet, vllm_server
from minirl_edu.rollout.vllm_server import KEY_VARIABLE, VLLMServerEngine
from minirl_edu.tasks import ChainTask, Problem
from minirl_edu.tasks.verifiers import VerifierPool
from minirl_edu.trainer import MiniRLTrainer
from tests.test_vllm_server import KEY, SMALL, Fake, Server, generate, is_sampling, needs_vllm, same


def tiny(seed: int) -> Any:
    return tiny_moe(18, seed=seed, eos_token_id=17, pad_token_id=16)


class Counting(Fake):
    """Knows how many requests to sample it serves, and at most served, at once with the others of `counts`."""

    counts: dict[str, int]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not is_sampling(path, body):
            return super().answer(path, body)
        with self.lock:
            self.counts["now"] += 1
            self.counts["most"] = max(self.counts["most"], self.counts["now"])
        time.sleep(0.01)
        try:
            return super().answer(path, body)
        finally:
            with self.lock:
                self.counts["now"] -= 1


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counting]]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for module in (vllm_server, fleet):
        monkeypatch.setattr(module, "pause", lambda attempt: 0.01)
    servers, counts, lock = [Counting(tiny(0)) for _ in range(3)], {"now": 0, "most": 0}, threading.Lock()
    for server in servers:
        server.counts, server.lock = counts, lock
        server.start()
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def connect(fakes: list[Counting], tmp_path: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    made = []

    def build(**options: Any) -> VLLMServerEngine:
        settings: dict[str, Any] = {"url": [fake.url for fake in fakes], "record_routes": True, "start_timeout": 5.0}
        settings["weights"] = tmp_path / "weights"
        made.append(VLLMServerEngine(tiny(0), **(settings | options)))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def sampled(fake: Fake) -> int:
    return sum(is_sampling(*request) for request in fake.served)


def dies_after(fake: Fake, count: int) -> threading.Event:
    """The server ends in the middle of a request that follows `count` others, and takes no connection any more."""
    dead, seen = threading.Event(), iter(range(10_000))

    def fault(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if not dead.is_set() and is_sampling(path, body) and next(seen) == count:
            dead.set()
            fake.restart()
        return (0, None) if dead.is_set() else None

    fake.fault = fault
    return dead


def test_three_servers_share_the_work_and_give_the_rollout_of_one(fakes, connect):
    alone = generate(connect(url=fakes[0].url))
    for fake in fakes:
        fake.restart()
        fake.served.clear()
    engine = connect(concurrency=6)
    fakes[0].counts["most"] = 0
    assert same(alone, generate(engine))
    assert sum(sampled(fake) for fake in fakes) == 15 and min(sampled(fake) for fake in fakes) >= 3
    assert 3 < fakes[0].counts["most"] <= 6  # in flight, over all
    engine.sync(tiny(5), version=8)
    assert {fake.version[:2] for fake in fakes} == {"8-"}
    expected = tiny(5).state_dict()["model.embed_tokens.weight"]
    assert all(fake.weights["model.embed_tokens.weight"].equal(expected) for fake in fakes)


@pytest.mark.parametrize("routes", ["recorded", "returned"])
def test_what_a_dead_server_took_with_it_is_sampled_by_the_others(fakes, connect, routes):
    for fake in fakes:
        fake.description["returns_routes"] = routes == "returned"
    engine = connect(start_timeout=60.0, concurrency=6)
    undisturbed = generate(engine)
    dead = dies_after(fakes[1], 2)
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match=f"the server at {fakes[1].url} is lost .* scale/serve.py") as warned:
        rollout = generate(engine)
    assert same(undisturbed, rollout) and dead.is_set()
    assert len(warned) == 1 and time.monotonic() - started < 30  # nobody waited for it

    engine.sync(changed := tiny(3), version=1)  # while it is dead: again nobody waits, or is told
    expected = generate(engine)
    assert expected.weight_version == 1 and not fakes[1].weights

    back = threading.Event()
    fakes[0].fault = fakes[2].fault = lambda path, body: back.wait(20) and None if is_sampling(path, body) else None
    fakes[1].fault = lambda path, body: back.set() if path == "/resume" else None
    fakes[1].served.clear()
    assert same(expected, generate(engine))
    paths = [path for path, body in fakes[1].served if is_sampling(path, body) or path == "/resume"]
    assert paths[0] == "/resume" and len(paths) > 1  # the weights first, then requests
    assert fakes[1].weights["model.embed_tokens.weight"].equal(changed.state_dict()["model.embed_tokens.weight"])


def test_a_server_that_died_between_rollouts_is_not_asked_with_its_old_weights(fakes, connect):
    engine = connect()
    undisturbed = generate(engine)
    fakes[2].restart()
    with pytest.warns(RuntimeWarning, match=rf"{fakes[2].url} is lost \(its weights were default"):
        assert same(undisturbed, generate(engine))
    assert fakes[2].version == fakes[0].version and fakes[2].weights


def test_a_server_that_is_gone_at_a_sync_holds_up_nobody(fakes, connect):
    engine = connect(start_timeout=60.0)
    fakes[0].stop()
    fakes[0].restart()
    started = time.monotonic()
    try:
        with pytest.warns(RuntimeWarning, match=f"{fakes[0].url} is lost .*ConnectionRefused"):
            engine.sync(tiny(1), version=1)
        rollout = generate(engine)
    finally:
        fakes[0].start()
    assert rollout.weight_version == 1 and time.monotonic() - started < 30
    engine.sync(tiny(1), version=2)
    assert same(rollout, generate(engine))


@pytest.mark.parametrize("fault", [(503, {"error": "overloaded"}), (500, {"error": "no kernel"})])
def test_a_server_that_only_fails_is_left_out(fakes, connect, fault):
    engine = connect()
    undisturbed = generate(engine)
    fakes[0].fault = lambda path, body: fault if is_sampling(path, body) else None
    with pytest.warns(RuntimeWarning, match=f"{fakes[0].url} is lost .*{fault[0]}"):
        assert same(undisturbed, generate(engine))


def test_all_servers_fail(fakes, connect):
    engine = connect()
    for fake in fakes:
        fake.fault = lambda path, body: (500, {"error": "no kernel"}) if is_sampling(path, body) else None
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(EngineError, match=r"http://127\S+: no answer to any .* 6 attempts: .*no kernel.*serve\.py"),
    ):
        generate(engine)


def test_all_servers_are_gone(fakes, connect):
    engine = connect(start_timeout=0.5)
    for fake in fakes:
        dies_after(fake, 1)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ConnectionError, match=r"http://127.0.0.1:\d+: no vLLM server within start_timeout = 0\.5 s"),
    ):
        generate(engine)


def test_a_request_that_takes_too_long_is_given_to_another_server_once(fakes, connect):
    engine = connect(timeout=1.0)
    undisturbed = generate(engine)
    release, first = threading.Event(), []

    def hangs(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if is_sampling(path, body) and not first:
            first.append(body["sampling_params"]["seed"])
            release.wait(20)
        return None

    fakes[1].fault = hangs
    with pytest.warns(RuntimeWarning, match=rf"{fakes[1].url} is lost .*no answer within timeout = 1 s"):
        assert same(undisturbed, generate(engine))
    release.set()

    again = threading.Event()
    for fake in fakes:
        fake.fault = lambda path, body: again.wait(20) and None if is_sampling(path, body) else None
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(TimeoutError, match=r"/inference/v1/generate: no answer within timeout = 1 s; raise"),
    ):
        generate(engine)
    again.set()


def test_a_machine_that_falls_silent_is_lost_long_before_the_timeout(fakes, connect, monkeypatch):
    """The network's own timeout, which TCP's keep-alive brings about, is a loss: the request goes elsewhere at once."""
    engine = connect(timeout=3600.0)
    undisturbed = generate(engine)
    kept: list[int] = []
    response = http.client.HTTPConnection.getresponse

    def silent(self: http.client.HTTPConnection) -> Any:
        if self.port == fakes[1].port and not kept:
            kept.append(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return response(self)

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", silent)
    with pytest.warns(RuntimeWarning, match=rf"{fakes[1].url} is lost .*Connection timed out"):
        assert same(undisturbed, generate(engine))
    assert set(kept) == {1}


def test_all_servers_have_to_be_there_at_the_start(fakes, connect):
    fakes[2].stop()
    try:
        with pytest.raises(ConnectionError, match=f"{fakes[2].url}: no vLLM server within .*rollout.options.url"):
            connect(start_timeout=0.3)
    finally:
        fakes[2].start()


def test_a_server_of_another_model_is_named(fakes, connect):
    fakes[1].description["config"]["num_hidden_layers"] = 5
    with pytest.raises(ValueError, match=rf"{fakes[1].url} serves another one: num_hidden_layers = 5"):
        connect()


def test_all_servers_sleep_and_wake(fakes, connect):
    for fake in fakes:
        fake.description["can_sleep"] = True
    engine = connect(sleep=True)
    undisturbed = generate(engine)
    assert all(fake.asleep for fake in fakes)
    assert same(undisturbed, generate(engine)) and all(fake.asleep for fake in fakes)
    engine.sync(tiny(0), version=1)
    assert not any(fake.asleep for fake in fakes)


def test_bad_lists_of_servers(connect):
    url = "http://127.0.0.1:8000"
    for urls in ([], [url, url]):
        with pytest.raises(ValueError, match=re.escape(f"url: {urls} is empty, or names a server twice")):
            connect(url=urls)
    with pytest.raises(ValueError, match="transfer: 'nccl' reaches one server, not 3"):
        connect(transfer="nccl")
    with pytest.raises(ValueError, match="concurrency: 0"):
        connect(concurrency=0)
    with pytest.raises(ValueError, match="'here' is not of the form"):
        connect(url=[url, "here"])


def test_ctrl_c_waits_for_no_request(fakes, connect, monkeypatch):
    engine, release = connect(), threading.Event()
    for fake in fakes:
        fake.fault = lambda path, body: release.wait(20) and None if is_sampling(path, body) else None

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)  # requests are on their way
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet, "wait", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generate(engine)
    assert time.monotonic() - started < 5
    release.set()
    monkeypatch.undo()


class SlowTask(ChainTask):
    """A verifier that takes its time, one answer after the other."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        (folder / "slow.py").write_text(SLOW_VERIFIER)
        self.verifier = VerifierPool(f"{folder / 'slow.py'}:make", time_limit=20.0, size=1)
        assert self.verifier("start the process", "") == 1.0

    def begin(self, problem: Problem, response: str) -> None:
        self.verifier.begin(response, problem.answer)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        asked = zip(problems, responses, strict=True)
        return self.verifier.collect([self.verifier.submit(response, problem.answer) for problem, response in asked])


SLOW_VERIFIER = """
import time
def make():
    return lambda response, answer: time.sleep(0.2) or len(response) % 2
"""


@pytest.mark.slow
def test_answers_are_verified_while_others_are_sampled(monkeypatch, tmp_path):
    """8 answers at 0.2 s each, one after the other, from the server and in the verifier: 1.8 s, not 3.2."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = Fake(load_model("chain-steps"))
    server.fault = lambda path, body: time.sleep(0.2) if is_sampling(path, body) else None
    server.start()
    settings = ["train.mini_batches=1", "train.mini_batch_prompts=4", "train.group_size=2", "algorithm.replay=none"]
    settings += [f"rollout.options={{url: ['{server.url}'], concurrency: 1, weights: '{tmp_path / 'weights'}'}}"]
    task = SlowTask(tmp_path)
    try:
        run = MiniRLTrainer(load_config(None, [*SMALL, *settings]), tmp_path / "run", task=task, progress=False)
        taken, rewards = [], []
        for ahead in (True, False):
            if not ahead:
                monkeypatch.setattr(SlowTask, "begin", lambda *_: None)
            started = time.monotonic()
            sampled, _ = run._sample()
            taken.append(time.monotonic() - started)
            rewards.append(sampled.rewards.tolist())
        run.engine.close()
    finally:
        server.stop()
        task.verifier.close()
    print("seconds with verifying ahead, and without:", taken)
    assert rewards[0] == rewards[1] and 0 < sum(rewards[0]) < 8
    assert taken[0] < 0.8 * taken[1]


@needs_vllm
@pytest.mark.slow
@pytest.mark.nightly  # every day servers that pretend are lost, above
def test_of_three_real_servers_one_is_killed_in_the_middle_and_nothing_is_lost(tmp_path, monkeypatch):
    servers = []
    for name in "abc":
        (tmp_path / name).mkdir()
        servers.append(Server(tmp_path / name))
        servers[-1].start()
    prompts, model = [[*range(2, 9), i % 10] for i in range(40)], load_model("chain-steps")
    settings: dict[str, Any] = {"group_size": 3, "sampling": Sampling(24), "seed": 4}
    engine = None
    try:
        engine = VLLMServerEngine(
            model,
            url=[server.url for server in servers],
            api_key=KEY,
            record_routes=True,
            dtype="float32",
            start_timeout=300.0,
            concurrency=12,
        )
        undisturbed = engine.generate(prompts, **settings)
        arrived: list[int] = []

        def kill(row: int, tokens: list[int]) -> None:
            arrived.append(row)
            if len(arrived) == 40:  # of 120
                servers[1].kill()

        engine.on_response = kill
        with pytest.warns(RuntimeWarning, match=f"{servers[1].url} is lost"):
            rollout = engine.generate(prompts, **settings)
        assert len(arrived) > 120  # some were sampled twice: their routes had died
        assert torch.equal(rollout.tokens, undisturbed.tokens)
        # How a sum is rounded depends on which requests share a batch: see test_vllm_server.py.
        torch.testing.assert_close(rollout.logp_rollout, undisturbed.logp_rollout, atol=1e-5, rtol=0)
        assert rollout.routes is not None and torch.equal(rollout.routes.valid, rollout.inputs)

        engine.sync(model, version=1)  # the dead one cannot be told
        servers[1].start()
        servers[1].wait()
        rollout = engine.generate(prompts, **settings)
        assert rollout.weight_version == 1 and torch.equal(rollout.tokens, undisturbed.tokens)
        assert engine.servers[1]._request("GET", "/weight_info")["weight_version"].startswith("1-")
    finally:
        if engine is not None:
            engine.close()
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                server.kill()
