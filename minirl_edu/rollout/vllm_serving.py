"""What runs inside a `vllm serve` process: the API key on every route, and what a remote trainer asks of the worker.

`scale/serve.py` starts vLLM with both. Nothing here is imported by the trainer.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from minirl_edu.rollout.vllm import clear_kv_cache
from minirl_edu.rollout.vllm_worker import WorkerExtension, kinds_in_fp32

OPEN_PATHS = ("/health",)


class RequireKey:
    """ASGI middleware: 401 without the environment's VLLM_API_KEY, sent as `Authorization: Bearer KEY`.

    vLLM's own check covers only the paths under /v1, /v2, /inference and /cohere (seen in 0.32). With its development
    routes on, whoever reaches the port could call methods of the worker, load weights or sample, all without the key.
    Only /health, which tells nothing, is open here. Raises ValueError when the server has no key.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise ValueError("VLLM_API_KEY: not set or empty, so the server would be open to all; set it to a secret")
        self.app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Pass on a request that has the key; refuse any other."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        # In constant time: how long an answer takes must not tell how much of a guess was right.
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or hmac.compare_digest(given, self._expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})


class ServerExtension(WorkerExtension):
    """The worker's methods of `WorkerExtension`, and those that only a remote trainer needs."""

    vllm_config: Any  # vLLM's, of the worker that this is mixed into

    def minirl_describe(self) -> dict[str, Any]:
        """What this server runs: the model's config as transformers writes it, and how vLLM computes and answers."""
        from vllm.platforms import current_platform

        model = self.vllm_config.model_config
        return {
            "config": json.loads(model.hf_text_config.to_json_string(use_diff=False)),
            "architectures": list(model.architectures),
            "dtype": str(model.dtype).removeprefix("torch."),
            "fp32": kinds_in_fp32(self.model_runner.get_model()),
            "logprobs_mode": model.logprobs_mode,
            "max_model_len": model.max_model_len,
            "returns_routes": self.vllm_config.aux_output_config.enable_return_routed_experts,
            "records_routes": current_platform.is_cpu(),
            "can_sleep": model.enable_sleep_mode,
        }

    def minirl_clear_kv_cache(self) -> None:
        """See `clear_kv_cache`."""
        clear_kv_cache(self)

    def minirl_load_checkpoint(self) -> None:
        """Load the weights that the server was started with, again, by the same way as any new ones."""
        from vllm.model_executor.model_loader import get_model_loader

        loader: Any = get_model_loader(self.vllm_config.load_config)
        self.minirl_load_weights(loader.get_all_weights(self.vllm_config.model_config, self.model_runner.get_model()))
