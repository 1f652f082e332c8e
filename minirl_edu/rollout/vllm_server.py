"""A rollout engine on vLLM servers, over HTTP: the contract of `VLLMEngine`, with vLLM in processes of its own.

A server (`scale/serve.py`) may be restarted at any time, also in the middle of a generation. It comes back with the
weights it was started with; the engine notices by their version, pushes its last synced weights again, and asks again
for what is missing, there or at another server. Since samples depend on seeds alone, the run goes on as if nothing had
happened.

Each response is a request of its own. vLLM itself makes n requests of one that asks for n samples, and its prefix cache
finds the prompt either way. So a group in one request would save nothing, and would keep the first response until the
last has come, on one server, and lose all of them with it.
"""

import base64
import dataclasses
import http.client
import io
import json
import math
import os
import socket
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minirl_edu.rollout.base import ON_FAULT, EngineError, Rollout, Sampling, accept
from minirl_edu.rollout.fleet import ATTEMPTS, Fleet, Lost, Member, pause
from minirl_edu.rollout.hf import end_tokens, suppressed_tokens
from minirl_edu.rollout.vllm import (
    assemble,
    check_room,
    checkpoint_specs,
    checkpoint_weights,
    other_weights,
    place_routes,
    request_settings,
)
from minirl_edu.rollout.vllm_worker import decode_routes, kind_of, request_key
from minirl_edu.routing import RoutingReplay
from minirl_edu.seeding import derive_seed
from minirl_edu.streaming import architecture_name, is_sharded, write_safetensors

KEY_VARIABLE = "MINIRL_VLLM_API_KEY"
"""The environment variable that holds the server's API key."""
_SECONDS_TO_CONNECT = 10.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a machine that is gone is noticed in 60 s
_NEVER_SYNCED = "default"  # vLLM's version of the weights that it started with
_ON_TRIAL = "minirl-trial"
_NO_LOGPROB = -9999.0  # what vLLM's HTTP answers say for NaN, −∞, and a token without an entry (seen in 0.32)
_PROBE_TOKENS = 16
# What makes two models different functions, or differently shaped ones, of the same weights.
_SIZES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "norm_topk_prob", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_parameters", "sliding_window"),
)


class VLLMServerEngine:
    """vLLM behind HTTP at `url`, one server or a list of them, started by `scale/serve.py`, here or elsewhere.

    Tokens and **processed** log-probabilities come back as JSON numbers, which lose no bit of an fp32. Seeds are those
    of `VLLMEngine`, so the two give the same rollout, up to roundings that depend on which requests share a batch.

    Of several servers, all have to be there at the start. Later the engine goes on while one is left: see `Fleet`. One
    that comes back gets the current weights before it is asked anything.

    A freshly started server is tried out first, as `VLLMEngine` does it: after a reload every one of its workers must
    hold the same numbers as before, bit for bit. With "nccl" it is not.

    Weights are rounded to the servers' number format before they travel, as a server would do it on arrival. What it
    keeps in fp32, such as some families' routers, travels in fp32.

    With `sleep` the server can share GPUs with the trainer: it sleeps (vLLM's level 1: weights in the host's memory, no
    KV cache) from the end of a rollout to the next `sync` or `generate`. Level 2 would drop the weights, but an
    evaluation generates between two syncs. Before both calls each process of the trainer must give back what it only
    caches (`torch.cuda.empty_cache()`). CPUs have no sleep, and no test of the project has run it on a GPU.

    Args:
        api_key: default: the environment's MINIRL_VLLM_API_KEY. It is in no message, and belongs in no config.
        weights: folder that all servers can read, for the safetensors file of each sync; default: a temporary one, for
            servers on this machine. It takes up to two states of the model.
        record_routes: keep the experts of every token (Mixture-of-Experts models).
        keep_faulty: return responses without log-probabilities or routes, marked (see `Rollout.faults`); do not raise.
        sleep: let the server sleep between rollouts; `scale/serve.py --enable-sleep-mode` starts one that can.
        dtype: refuse a server that computes in another, such as "float32"; default: any.
        timeout: seconds that one response may take, waiting at the server included. Of several servers, another is
            asked before that is an error.
        start_timeout: seconds to wait for a server, at the start and whenever all are gone.
        concurrency: responses in flight at once, over all servers. Each takes a thread and a connection here, and what
            waits at a server can go to no other; so no more than the servers sample at once.
        transfer: "file", through `weights`; or "nccl", vLLM's own weight-transfer API between GPUs, which needs vLLM in
            this process too, and one server only. "nccl" has not been run on GPUs by the project's tests. With it the
            first weights travel at the first `sync`, when the model is on its GPUs, and a server that restarts during a
            rollout ends a run whose model is sharded. vLLM's third way, ipc, unpickles what comes over HTTP, and is not
            offered.
        nccl_address: host and port, on this machine, at which the server's workers meet this process for "nccl".

    Raises ValueError for a missing or wrong key, or a server that runs another model, another dtype, other
    log-probabilities, or was not started by `scale/serve.py`; ConnectionError if there is none within `start_timeout`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        url: str | Sequence[str] = "http://127.0.0.1:8000",
        api_key: str | None = None,
        weights: str | Path | None = None,
        record_routes: bool = False,
        keep_faulty: bool = False,
        sleep: bool = False,
        dtype: str | None = None,
        timeout: float = 600.0,
        start_timeout: float = 600.0,
        concurrency: int = 512,
        transfer: str = "file",
        nccl_address: str = "127.0.0.1:29555",
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"url: {urls} is empty, or names a server twice")
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"api_key: none, or not one line of ASCII; set the environment variable {KEY_VARIABLE}")
        if transfer not in ("file", "nccl"):
            raise ValueError(f"transfer: {transfer!r} is unknown; use 'file' or 'nccl'")
        if transfer == "nccl" and len(urls) > 1:
            raise ValueError(f"transfer: 'nccl' reaches one server, not {len(urls)}; use 'file'")
        if concurrency < 1:
            raise ValueError(f"concurrency: {concurrency} lets nothing be asked; use 1 or more")
        self.timeout, self.start_timeout = timeout, start_timeout
        self.keep_faulty, self.sleep = keep_faulty, sleep
        self.dtype, self.transfer, self.nccl_address = dtype, transfer, nccl_address
        self.on_response: Callable[[int, list[int]], object] = lambda row, tokens: None
        """Called with each response (row of the rollout, token ids) as it arrives, by the thread that generates; again
        for one that had to be sampled anew. The last call counts."""
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.servers = [_Server(self, each) for each in urls]
        self._fleet = Fleet(self.servers, concurrency=concurrency)
        self._replay = RoutingReplay(model) if record_routes else None  # finds and counts the routers; refuses dense
        self._name = uuid.uuid4().hex[:12]  # in the versions, so that no other trainer's are taken for ours
        self._folder = Path(tempfile.mkdtemp(prefix="minirl-weights-") if weights is None else weights).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file: Path | None = None
        self._clean_up = weakref.finalize(self, _clean_up, self._folder, self._name, weights is None)
        self._source: _Source | None = None
        self._specs: dict[str, Tensor] = {}  # of the file
        self._wire: _Wire | None = None
        self._trials, self._agreement = threading.Lock(), threading.Lock()
        self._syncs = 0
        self._met = self._closed = False
        self.version = 0
        try:
            if transfer == "file":
                self.sync(model, version=0)
            else:  # no weights yet: they are not on their GPUs
                self._meet_for(model, 0)
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------------------------------------------- generate

    def generate(self, prompts: Sequence[Sequence[int]], *, group_size: int, sampling: Sampling, seed: int) -> Rollout:
        """Sample `group_size` responses to each prompt (token ids). The rollout is validated.

        Raises ValueError for an empty prompt, one that leaves no room for `max_new_tokens`, or a temperature below
        0.01, which vLLM would raise silently; TimeoutError for a response that takes longer than `timeout`;
        ConnectionError if all servers are gone for `start_timeout`; EngineError for a response without
        log-probabilities or routes, naming the row, and for an answer of other weights.
        """
        self._open()
        smallest = min(self.servers, key=lambda server: server.max_model_len)
        remedy = f"start the server at {smallest.url} with a larger --max-model-len"
        check_room(prompts, sampling, smallest.max_model_len, remedy)
        bodies = []
        for i, prompt in enumerate(prompts):
            settings = request_settings(sampling, 1, derive_seed(seed, "rollout", i), self._ends)
            for j in range(group_size):
                own = settings | {"seed": settings["seed"] + j}  # as vLLM does with n samples
                bodies.append({"token_ids": list(prompt), "sampling_params": own})
        if self.sleep:
            self._fleet.everywhere(_Server.ensure)
        samples = self._ask(bodies)
        responses = [(sample.tokens, sample.logp) for sample in samples]
        rollout = assemble(responses, prompts, self._pad, version=self.version, device=torch.device("cpu"))
        if rollout.logp_rollout.isnan().any():
            self._fleet.everywhere(_Server.clear_cache)
        if self.sleep:
            self._fleet.everywhere(_Server.put_to_sleep)
        if self._replay is None:
            return accept(rollout, keep_faulty=self.keep_faulty)
        shape, routes = (self._replay.layers, self._replay.top_k), [sample.routes for sample in samples]
        placed = place_routes(routes, rollout.inputs.cpu(), *shape, keep_faulty=self.keep_faulty)
        rollout = dataclasses.replace(rollout, routes=placed)
        return accept(rollout, num_experts=self._replay.num_experts, keep_faulty=self.keep_faulty)

    def _ask(self, bodies: list[dict[str, Any]]) -> list["_Sample"]:
        """The sample of each request. What a broken connection or a restarted server took away is asked for again."""
        done: dict[int, _Sample] = {}
        fruitless = 0
        while missing := [row for row in range(len(bodies)) if row not in done]:
            answers = self._fleet.ask(
                len(missing),
                lambda server, i, rows=missing: server.sample(bodies[rows[i]], rows[i]),
                lambda i, sample, rows=missing: self.on_response(rows[i], sample.tokens),
            )
            samples = self._with_routes({missing[i]: sample for i, sample in answers.items()})
            fruitless = 0 if samples else fruitless + 1
            if fruitless == ATTEMPTS:
                raise EngineError(
                    f"routes: lost in {ATTEMPTS} attempts, with servers that broke down; see their output"
                )
            done |= samples
        return [done[row] for row in range(len(bodies))]

    def _with_routes(self, samples: dict[int, "_Sample"]) -> dict[int, "_Sample"]:
        """The samples by row, with routes; without those whose routes were lost with their server."""
        for server in self.servers if self._replay is not None else ():
            theirs = {row: sample for row, sample in samples.items() if sample.server is server}
            if not theirs or server.returns_routes:
                continue
            kept = {row: sample for row, sample in theirs.items() if sample.life == server.losses}
            try:
                if kept:
                    server.take_routes(kept)
            except Lost as error:
                self._fleet.lose(server, str(error), coming=True)
                kept = {}
            samples = {row: sample for row, sample in samples.items() if row not in theirs or row in kept}
        return samples

    # -------------------------------------------------------------------------------------------------------- sync

    def sync(self, model: PreTrainedModel, *, version: int) -> None:
        """Take `model`'s weights as the new θ_old; requests in flight are aborted and the prefix cache is dropped.

        All servers get them, side by side; those that are gone, when they come back. The weights are kept for that: as
        a file, or, for "nccl", by a reference to `model`, which must not change between a sync and the generations that
        follow it. Of a sharded model every other rank calls `take_part`: the weights are gathered once, whatever
        happens. Raises as `generate` does.
        """
        self._open()
        self._meet_for(model, version)
        assert self._wire is not None
        if self.transfer == "file":
            self._write(model, self._wire)
        else:
            self._source = _Source(model, self._wire)
        self._fleet.everywhere(_Server.ensure)
        self.version = version

    def _meet_for(self, model: PreTrainedModel, version: int) -> None:
        """Take what a rollout needs to know of `model` beside its weights, wait for the servers, and wake them: before
        weights are gathered, which fills the memory that it needs."""
        self._ends, self._pad = end_tokens(model), model.config.pad_token_id or 0
        self._suppressed = suppressed_tokens(model)
        self._config = model.config.get_text_config()
        self._architecture = architecture_name(model)
        self._syncs += 1
        self._label = f"{version}-{self._name}-{self._syncs}"
        self._wire = None
        self._fleet.everywhere(_Server.meet, whole=not self._met)
        self._met = True

    def agree(self, url: str, wire: "_Wire") -> None:
        """All servers have to hold weights in the same number formats, since they read one file."""
        with self._agreement:
            if self._wire is not None and wire != self._wire:
                dtype, theirs = (str(each.dtype).removeprefix("torch.") for each in (self._wire, wire))
                raise ValueError(
                    f"dtype: {url} holds other number formats ({theirs}) than the weights were prepared for; restart "
                    f"it with --dtype {dtype} and the options that it or the other servers had"
                )
            self._wire = wire

    def _write(self, model: PreTrainedModel, wire: "_Wire") -> None:
        """The weights as vLLM reads them. Renamed when whole, so that no reader ever sees half a file."""
        before, self._file = self._file, self._folder / f"minirl-{self._label}.safetensors"
        partial = self._file.with_suffix(".partial")
        try:
            self._specs = dict(wire.cast(checkpoint_specs(model).items()))
            write_safetensors(partial, self._specs, wire.cast(checkpoint_weights(model)))
            partial.replace(self._file)
        finally:
            partial.unlink(missing_ok=True)
        if before is not None and before != self._file:
            before.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the weights' file; the servers run on."""
        self._closed = True
        for server in self.servers:
            if server.sender is not None:
                server.sender.shutdown()
        self._clean_up()

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine was closed; make a new VLLMServerEngine")


class _Server(Member):
    """One server. What it shares with the others, such as the weights to push and their version, is its engine's."""

    def __init__(self, engine: VLLMServerEngine, url: str) -> None:
        super().__init__(url)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or "@" in parts.netloc:
            raise ValueError(f"url: {url!r} is not of the form http://HOST:PORT")
        self._engine = engine
        self._host, self._secure = parts.netloc, parts.scheme == "https"
        self.sender: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    # ----------------------------------------------------------------------------------------------------- a sample

    def sample(self, body: dict[str, Any], row: int) -> "_Sample":
        """One response, checked; `row` is for messages."""
        life = self.losses
        body = body | {"request_id": uuid.uuid4().hex}  # a new one: the server may still know the last
        answer = self._request("POST", "/inference/v1/generate", body)
        if len(answer["choices"]) != 1:
            raise EngineError(f"{self.url}: {len(answer['choices'])} samples for a request of one")
        (choice,) = answer["choices"]
        spans = choice.get("weight_versions")
        if not spans:
            raise EngineError(f"weight_version: {self.url} returned none; start the server with scale/serve.py")
        if stale := {span["version"] for span in spans} - {self._label}:
            raise Lost(f"its weights were {', '.join(sorted(stale))}, not {self._label}; does another trainer use it?")
        if choice["finish_reason"] not in ("stop", "length") or not choice["token_ids"]:
            raise Lost(f"a sample ended by {choice['finish_reason']!r}")
        content = (choice.get("logprobs") or {}).get("content") or []
        logp = [math.nan if at["logprob"] in (None, _NO_LOGPROB) else at["logprob"] for at in content]
        if [at["token_id"] for at in content] != choice["token_ids"]:
            self._refuse(
                f"logp_rollout: {self.url} returned {len(content)} log-probabilities for the "
                f"{len(choice['token_ids'])} tokens of row {row}; start the server with scale/serve.py"
            )
            logp = []
        routes = None
        if self._replay is not None and self.returns_routes:
            routes = _decoded(choice.get("routed_experts"))
            if routes is None:
                self._refuse(
                    f"routes: {self.url} returned none for row {row}; vLLM needs its V2 model runner and no "
                    "pipeline parallelism"
                )
        return _Sample(self, life, (answer["request_id"], choice["index"]), choice["token_ids"], logp, routes)

    def take_routes(self, samples: dict[int, "_Sample"]) -> None:
        """The CPU strategy: the worker recorded the routes of these samples, by their rows."""
        coded = self._rpc("minirl_take_routes", [sample.key[0] for sample in samples.values()])
        taken = {request_key(request): decode_routes(routes) for request, routes in coded.items()}
        for row, sample in samples.items():
            sample.routes = taken.get(sample.key)
            if sample.routes is None:
                self._refuse(f"routes: {self.url} recorded none for row {row}, which it answered; restart it")

    def _refuse(self, fault: str) -> None:
        """Raise EngineError for the fault of one response, unless such are to be kept."""
        if not self.keep_faulty:
            raise EngineError(f"{fault}; {ON_FAULT}")

    def clear_cache(self, stop: threading.Event) -> None:
        """After a response whose log-probabilities are none: what it left in the KV cache must reach no other."""

        def clear(_: str) -> None:
            self._reset_cache()
            self._rpc("minirl_clear_kv_cache")

        self._persist("clearing its cache", clear, stop)

    def put_to_sleep(self, stop: threading.Event) -> None:
        """Free the memory of its GPUs until it is needed again."""
        self._persist("putting it to sleep", lambda _: self._request("POST", "/sleep?level=1"), stop)

    # -------------------------------------------------------------------------------------------------- the weights

    def meet(self, stop: threading.Event) -> None:
        """Wait until the server is there, wake it, and refuse it if its answers would not be this model's rollouts."""
        self._persist("asking what it runs", lambda _: self._meet(), stop)

    def _meet(self) -> None:
        self._request("POST", "/wake_up")  # whoever it was that let it sleep; without effect if it is awake
        server = self._check_server()
        self.agree(self.url, _Wire(getattr(torch, server["dtype"]), frozenset(server["fp32"])))

    def ensure(self, stop: threading.Event) -> None:
        """Wait until the server is there, awake, and has our weights: push them if it reports another version."""
        self._persist("pushing weights", self._bring_up, stop)

    def _persist(self, what: str, act: Callable[[str], Any], stop: threading.Event) -> None:
        """Call `act` when the server is there, and again after each `Lost`, with what was the trouble before."""
        trouble = ""
        for attempt in range(ATTEMPTS):
            self._wait(stop)
            try:
                act(trouble)
                return
            except Lost as error:
                trouble = str(error)
            stop.wait(pause(attempt))
        raise EngineError(
            f"{self.url}: {what} failed {ATTEMPTS} times: {trouble}; start it with scale/serve.py and see what it "
            "prints"
        )

    def _bring_up(self, trouble: str) -> None:
        seen = self._request("GET", "/weight_info")["weight_version"]
        if seen == self._label:
            self._request("POST", "/wake_up")
            return
        self._meet()
        if seen == _ON_TRIAL:
            cause = trouble or "by an earlier client"
            raise ValueError(f"url: the trial of {self.url}'s reload was broken off ({cause}); restart it")
        if seen == _NEVER_SYNCED and self.transfer == "file":
            with self._trials:  # each writes a file as large as the weights
                self._try_reload()
        self._push()

    def _try_reload(self) -> None:
        """Load other weights, then again those that the server has just started with: that must leave no trace, in the
        numbers that vLLM holds and in the log-probabilities of a probe. Raises ValueError where it does.
        """
        assert self._file is not None
        fresh = self._state()
        self._request("POST", "/update_weight_version", {"new_version": _ON_TRIAL})  # it is no fresh server any more
        other = self._folder / f"minirl-{self._name}-other.safetensors"
        try:
            with safe_open(self._file, framework="pt") as ours:
                others = ((name, other_weights(ours.get_tensor(name))) for name in self._specs)
                write_safetensors(other, self._specs, others)
            self._rpc("minirl_load_file", str(other))
        finally:
            other.unlink(missing_ok=True)
        self._rpc("minirl_load_checkpoint")
        self._reset_cache()
        reloaded = self._state()
        if wrong := [name for name in fresh if fresh[name] != reloaded.get(name)]:
            raise ValueError(
                f"model: vLLM at {self.url} cannot be trusted with new weights of a {self._architecture}: after a "
                f"reload, its {wrong[0]} differ from a fresh server's; use the engine hf"
            )

    def _state(self) -> dict[str, Any]:
        """What tells two sets of weights in the server apart; see `VLLMEngine`. The checksums are those of all workers,
        whatever the parallelism, by names such as dp0:pp0:pcp0:tp1:model.norm.weight."""
        vocab = self._config.vocab_size
        length = min(_PROBE_TOKENS, self.max_model_len - 1)
        body = {
            "token_ids": [(7 * i * i + i + 7) % vocab for i in range(length)],
            "sampling_params": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
        }
        probe = self._request("POST", "/inference/v1/generate", body)["prompt_logprobs"]
        checksums = self._request("POST", "/weight_checker", {"action": "checksum"})["checksums"]
        return {"log-probabilities": probe, **checksums}

    def _reset_cache(self) -> None:
        if not self._request("POST", "/reset_prefix_cache")["success"]:
            raise Lost("the prefix cache was not dropped")

    def _push(self) -> None:
        # Paused, so that no token is sampled between the new weights and their version.
        self._request("POST", "/pause?mode=abort")
        if self.transfer == "file":
            self._rpc("minirl_load_file", str(self._file))
        else:
            self._send_by_nccl()
        self._reset_cache()
        self._rpc("minirl_suppress", self._suppressed)
        if self._replay is not None and not self.returns_routes:
            layers = tuple(self._rpc("minirl_record_routes"))
            if layers != self._replay.layers:
                raise ValueError(f"routes: {self.url} has experts at layers {layers}, not {self._replay.layers}")
        # Last: a server that reports our version has all of the above.
        self._request("POST", "/update_weight_version", {"new_version": self._label})
        self._request("POST", "/resume")

    def _check_server(self) -> dict[str, Any]:
        """Refuse a server whose answers would not be this model's rollouts; returns what it says of itself."""
        server = self._rpc("minirl_describe")
        self.max_model_len: int = server["max_model_len"]
        self.returns_routes: bool = server["returns_routes"]
        if self._architecture not in server["architectures"]:
            raise ValueError(f"model: {self.url} serves a {server['architectures'][0]}, not a {self._architecture}")
        ours = json.loads(self._config.to_json_string(use_diff=False))
        theirs = server["config"]
        wrong = [name for name in _SIZES if name in ours and name in theirs and ours[name] != theirs[name]]
        if wrong:
            seen = ", ".join(f"{name} = {theirs[name]!r} (here {ours[name]!r})" for name in wrong)
            raise ValueError(f"model: {self.url} serves another one: {seen}; start the server with this run's model")
        if self.dtype is not None and server["dtype"] != self.dtype:
            raise ValueError(f"dtype: {self.url} computes in {server['dtype']}; restart it with --dtype {self.dtype}")
        if self._replay is not None and not (server["returns_routes"] or server["records_routes"]):
            raise ValueError(
                f"routes: {self.url} gives none; restart it with --routes, or use algorithm.replay none or R2 with "
                "rollout.measure_flips: false"
            )
        if self.sleep and not server["can_sleep"]:
            raise ValueError(
                f"sleep: {self.url} cannot; restart it with --enable-sleep-mode (GPUs only), or take "
                "rollout.options.sleep out"
            )
        if server["logprobs_mode"] != "processed_logprobs":
            raise ValueError(
                f"logprobs_mode: {self.url} returns {server['logprobs_mode']}, not those of the distribution sampled "
                "from; start it with scale/serve.py"
            )
        return server

    def _send_by_nccl(self) -> None:
        """vLLM's own weight-transfer API, as its sender: rank 0. What it asks of the other ranks, to iterate over the
        weights once, `take_part` does. Its HTTP client sends no key, so this engine is the client."""
        if self._source is None or self._source.spent:
            raise EngineError(
                f"transfer: {self.url} has not got this run's weights, and by nccl they can only be sent at a sync, in "
                "which all ranks take part; if the server was restarted, go on with --resume, or use transfer: file"
            )
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        # A version that is not from our last push means a new process, without our group.
        fresh = self._request("GET", "/weight_info")["weight_version"] != getattr(self.sender, "label", None)
        if self.sender is None or fresh:
            if self.sender is not None:
                self.sender.shutdown()
            host, _, port = self.nccl_address.rpartition(":")
            workers = self._request("GET", "/get_world_size")["world_size"]
            info = NCCLTrainerInitInfo(master_address=host, master_port=int(port), world_size=workers + 1, rank=0)
            client, source = _SyncClient(self), cast(Any, self._source)
            self.sender = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        self.sender.source, self.sender.label = self._source, self._label
        self.sender.send_weights()

    # -------------------------------------------------------------------------------------------------------- HTTP

    def _rpc(self, method: str, *args: Any) -> Any:
        """Call a worker's method; the answer of the first worker, which stands for all."""
        return self._request("POST", "/collective_rpc", {"method": method, "args": list(args)})["results"][0]

    def _wait(self, stop: threading.Event) -> None:
        """Until the server answers /health; meanwhile one line says how long it has been, and why. At `stop`, Lost."""
        started, attempt = time.monotonic(), 0
        line: tqdm | None = None
        try:
            while True:
                try:
                    self._request("GET", "/health", seconds=_SECONDS_TO_CONNECT)
                    return
                except (Lost, TimeoutError) as error:
                    reason = str(error)
                self.waiting = reason
                if stop.is_set():
                    raise Lost(reason)
                waited = time.monotonic() - started
                if waited > self.start_timeout:
                    raise ConnectionError(
                        f"{self.url}: no vLLM server within start_timeout = {self.start_timeout:g} s ({reason}); start "
                        "one with `python scale/serve.py --model …`, or correct rollout.options.url"
                    )
                if line is None:
                    line = tqdm(bar_format="{desc}", leave=False)
                line.set_description_str(
                    f"waiting for a vLLM server at {self.url}: {waited:.0f} of {self.start_timeout:.0f} s ({reason})"
                )
                stop.wait(min(pause(attempt), max(0.0, self.start_timeout - waited) + 0.01))
                attempt += 1
        finally:
            self.waiting = ""
            if line is not None:
                line.close()

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float | None = None,
    ) -> Any:
        """One request; returns the JSON of the answer, None for an empty one.

        Raises Lost for what another try may mend, else an error that says what to do. `sockets` holds the connection
        while the request runs.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=_SECONDS_TO_CONNECT)
        held: socket.socket | None = None
        try:
            try:
                connection.connect()
            except OSError as error:
                raise Lost(_reason(error)) from None
            held = connection.sock
            assert held is not None
            held.settimeout(seconds or self.timeout)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):  # Linux
                    held.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            self.sockets.add(held)
            connection.request(method, path, None if body is None else json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except TimeoutError as error:
            if error.errno is not None:  # the network's, not ours: the other machine is silent
                raise Lost(_reason(error)) from None
            raise TimeoutError(
                f"{self.url}{path}: no answer within timeout = {seconds or self.timeout:g} s; raise "
                "rollout.options.timeout, or lower concurrency, max_new_tokens or group_size"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise Lost(_reason(error)) from None
        finally:
            if held is not None:
                self.sockets.discard(held)
            connection.close()
        if status == 200:
            return json.loads(content) if content else None
        # A proxy may quote the request, and what it says ends up on screens and in logs.
        secret = self._headers["Authorization"].removeprefix("Bearer ")
        said = f"{status} {content.decode(errors='replace').replace(secret, '<the key>')[:500]}".strip()
        if status >= 500:
            raise Lost(f"{path} answered {said}")
        if status == 401:
            raise ValueError(f"api_key: {self.url} refused it; set {KEY_VARIABLE} to the key that the server has")
        if status in (403, 404):
            raise ValueError(f"url: {self.url} has no {path} ({said}); start the server with scale/serve.py")
        raise EngineError(f"{self.url}{path}: {said}")


@dataclasses.dataclass
class _Sample:
    """One response: which server gave it, after how many losses of that, and the id and index by which the worker
    recorded its routes."""

    server: _Server
    life: int
    key: tuple[str, int]
    tokens: list[int]
    logp: list[float]
    routes: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Wire:
    """The number formats in which weights travel to a server: those in which it holds them."""

    dtype: torch.dtype
    fp32: frozenset[str]  # kinds of parameters (`kind_of`) that the server holds in fp32 whatever its dtype

    def cast(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Matrices rounded to the server's dtype if that has fewer bits. Vectors (norms, biases, router corrections)
        stay as they are: they are small, and some are held in fp32 under other names."""
        for name, tensor in weights:
            smaller = tensor.is_floating_point() and tensor.element_size() > self.dtype.itemsize
            yield (
                name,
                tensor.to(self.dtype) if smaller and tensor.dim() > 1 and kind_of(name) not in self.fp32 else tensor,
            )


class _Source:
    """A model's weights in the form that vLLM's trainer side reads (its `WeightSource`): what they are, without
    gathering anything, and then themselves. `spent` once a sharded model's were asked for: the other ranks take part
    in that once."""

    def __init__(self, model: PreTrainedModel, wire: _Wire) -> None:
        self.model, self.wire, self.spent = model, wire, False

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of each weight, in the order of iteration."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        specs = self.wire.cast(checkpoint_specs(self.model).items())
        return [ParamMeta(name, spec.dtype, tuple(spec.shape)) for name, spec in specs]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.spent = is_sharded(self.model)
        yield from self.wire.cast(checkpoint_weights(self.model))


class _SyncClient:
    """The four calls of vLLM's trainer side (its `VLLMWeightSyncClient`), with our key."""

    def __init__(self, server: _Server) -> None:
        self._post: Callable[..., Any] = lambda path, body=None: server._request("POST", path, body)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version})


def _decoded(coded: str | None) -> np.ndarray | None:
    """The array of a base64 `.npy`; None if it is none."""
    try:
        return np.load(io.BytesIO(base64.b64decode(coded or "")))
    except (ValueError, EOFError):
        return None


def _clean_up(folder: Path, name: str, own: bool) -> None:
    """Remove an engine's weights, also those of one that nobody closed; the folder too if the engine made it."""
    for file in folder.glob(f"minirl-*{name}*"):
        file.unlink(missing_ok=True)
    if own:
        folder.rmdir()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
