"""MiniRL's plug-ins inside the real code of verl, NeMo-RL, slime and prime-rl, on the fixed tensors of test_plugins.py.

Not part of the test suite: it needs checkouts, and packages that this project does not depend on.

    git clone https://github.com/NVIDIA-NeMo/RL nemo_rl && git -C nemo_rl checkout 7ea279ab
    git clone https://github.com/THUDM/slime && git -C slime checkout 624b824a
    git clone https://github.com/PrimeIntellect-ai/prime-rl && git -C prime-rl checkout 559b4477
    pip install --no-deps --target site verl==0.9.1 omegaconf hydra-core tensordict pyvers orjson ray msgpack \\
        codetiming nvidia-ml-py
    PYTHONPATH=$PWD:site python -m tests.in_frameworks verl prime_rl=prime-rl slime=slime nemo_rl=nemo_rl

A single process on a CPU has no Megatron and no CUDA, so some modules are replaced by empty ones, as each function
says. Everything between the framework's call of the loss and the tensor that goes to `backward` is the framework's own.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, make_dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import tests.test_plugins as fixed
from tests.test_plugins import CHOICES, LENGTHS, PROMPTS, UNEVEN, B, Batch, T


def compare(batch: Batch, total: Tensor, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Value and gradient, to a tolerance that float32 (1e-6) or float64 allows."""
    torch.testing.assert_close(total.detach().double(), expected[0], rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(total, batch.logits)[0]
    torch.testing.assert_close(gradient, expected[1], rtol=tolerance, atol=tolerance)


def stand_in(path: str, folder: Path | None = None, **names: Any) -> None:
    """An empty module, or a package whose files are in `folder` but whose __init__ does not run."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
        module.__path__ = getattr(module, "__path__", [])
    if folder is not None:
        module.__path__ = [str(folder)]
    vars(module).update(names)


def in_verl(_: Path) -> Iterator[None]:
    """`verl.workers.utils.losses.ppo_loss` on nested tensors, with verl's own weights. Nothing is replaced."""
    from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
    from verl.trainer.ppo import rollout_corr_helper  # pyright: ignore[reportMissingImports]
    from verl.utils import tensordict_utils  # pyright: ignore[reportMissingImports]
    from verl.workers.config import ActorConfig, PolicyLossConfig  # pyright: ignore[reportMissingImports]
    from verl.workers.utils.losses import ppo_loss  # pyright: ignore[reportMissingImports]

    from minirl_edu.plugins.verl import register

    batch = fixed.make_batch()
    log_ratio = (batch.logp_old - batch.logp_rollout) * batch.mask
    weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
        log_ratio, batch.mask.double(), rollout_is="token", rollout_is_threshold=1e9
    )
    streams = {
        "responses": batch.tokens,
        "response_mask": batch.mask.long(),
        "old_log_probs": batch.logp_old,
        "advantages": batch.advantages[:, None].expand(B, T),
        "rollout_is_weights": weights,
    }

    def micro_batch(rows: list[int]) -> Any:
        lists = {name: [values[row, : LENGTHS[row]] for row in rows] for name, values in streams.items()}
        lists["prompts"] = [torch.zeros(PROMPTS[row], dtype=torch.int64) for row in rows]
        nested = {name: torch.nested.as_nested_tensor(x, layout=torch.jagged) for name, x in lists.items()}
        data = TensorDict(nested, batch_size=[len(rows)])
        tensordict_utils.assign_non_tensor(data, dp_size=2, batch_num_tokens=sum(LENGTHS), global_batch_size=B)
        return data

    for i, choices in enumerate(CHOICES):
        register(f"choices_{i}", choices)
        policy_loss = PolicyLossConfig(loss_mode=f"choices_{i}")
        config = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=policy_loss)
        losses = []
        for rows in (rows for rank in UNEVEN for rows in rank):
            placed = [torch.nn.functional.pad(batch.logp[r, : LENGTHS[r]], (PROMPTS[r] - 1, 1)) for r in rows]
            losses.append(ppo_loss(config, {"log_probs": torch.cat(placed)}, micro_batch(rows))[0])
        yield compare(batch, sum(losses) / 2, batch.expected(choices), 1e-11)  # type: ignore[arg-type]


def in_prime_rl(checkout: Path) -> Iterator[None]:
    """`setup_rl_loss_fn` and `compute_loss`. Replaced: the config's classes, which need Python 3.12, and a helper."""

    def import_object(path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)

    custom = make_dataclass("CustomLossConfig", ["import_path", "kwargs"])
    others = {name: type(name, (), {}) for name in ("DefaultLossConfig", "IPOLossConfig", "LossConfig")}
    stand_in("prime_rl", checkout / "src" / "prime_rl")
    stand_in("prime_rl.configs.trainer", CustomLossConfig=custom, **others)
    stand_in("prime_rl.utils.utils", import_object=import_object)
    loss = import_module("prime_rl.trainer.rl.loss")
    batch, tokens = fixed.make_batch(), sum(LENGTHS)
    for choices in CHOICES:
        kwargs = {"on_policy": True, "tokens_per_response": tokens / B, **asdict(choices)}
        loss_fn = loss.setup_rl_loss_fn(custom("minirl_edu.plugins.prime_rl.minirl_loss_fn", kwargs))
        losses = []
        for rows in (rows for rank in UNEVEN for rows in rank):
            inputs = [fixed.prime_rl_inputs(loss, batch, row) for row in rows]
            names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
            logp, logp_rollout, advantages, masks = ([getattr(x, name) for x in inputs] for name in names)
            streams = (logp, logp_rollout, None, advantages, masks, None, None, None)
            losses.append(loss.compute_loss(*streams, loss_fn, tokens, 1, 1)[0])
        expected = batch.expected(choices, logp_old=batch.logp.detach())
        yield compare(batch, torch.stack(losses).sum(), expected, 1e-12)


def in_slime(checkout: Path) -> Iterator[None]:
    """`loss_function`. Replaced: Megatron's process groups (two data ranks), and its vocabulary-parallel softmax."""
    groups = {
        "get_tensor_model_parallel_group": lambda: None,
        "get_context_parallel_world_size": lambda: 1,
        "get_data_parallel_world_size": lambda **_: 2,
    }
    stand_in("megatron.core.mpu", **groups)
    sys.modules["megatron.core"].mpu = sys.modules["megatron.core.mpu"]  # type: ignore[attr-defined]
    for package in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        stand_in(package, checkout.joinpath(*package.split(".")))
    slime = import_module("slime.backends.megatron_utils.loss")
    plugin: Any = import_module("minirl_edu.plugins.slime")

    def softmax(logits: Tensor, tokens: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return logits.log_softmax(-1).gather(-1, tokens[:, None]), None

    vars(slime)["calculate_log_probs_and_entropy"] = softmax
    batch = fixed.make_batch()
    for i, choices in enumerate(CHOICES):
        setattr(plugin, f"chosen_{i}", functools.partial(plugin.minirl_loss_function, choices=choices))
        args = fixed.slime_args(loss_type="custom_loss", recompute_loss_function=False, allgather_cp=False)
        args.custom_loss_function_path, args.log_probs_chunk_size = f"minirl_edu.plugins.slime.chosen_{i}", -1
        ranks = []
        for rank in UNEVEN:
            losses = []
            for rows in rank:
                data, logits = fixed.slime_batch(batch, rows)
                data["rollout_mask_sums"] = [mask.sum() for mask in data["loss_masks"]]
                losses.append(slime.loss_function(args, data, len(rank), B, logits.float())[0])
            ranks.append(torch.stack(losses).mean())  # Megatron divides by the number of micro-batches
        yield compare(batch, torch.stack(ranks).mean(), batch.expected(choices), 2e-6)


class Empty(MetaPathFinder, Loader):
    """Modules below some prefixes, in which every name is an empty class."""

    def __init__(self, *prefixes: str) -> None:
        self.prefixes = prefixes

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(self.prefixes) else None

    def exec_module(self, module: ModuleType) -> None:
        def found(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        vars(module)["__getattr__"] = found


def in_nemo_rl(checkout: Path) -> Iterator[None]:
    """`prepare_loss_input`, which takes the logits, and the loss. Replaced: what the loss's module imports but does not
    use here (models, data, loggers), and `Tensor.cuda`."""
    sys.path.insert(0, str(checkout))
    unused = ("models", "data.", "environments", "algorithms.x_token", "utils.logger", "experience")
    sys.meta_path.insert(0, Empty(*(f"nemo_rl.{name}" for name in unused)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    prepare = import_module("nemo_rl.algorithms.loss.utils").prepare_loss_input
    container = import_module("nemo_rl.distributed.batched_data_dict").BatchedDataDict
    from minirl_edu.plugins.nemo_rl import MiniRLLossFn

    batch = fixed.make_batch()
    _, data = fixed.nemo_rl_data(batch)
    longest = data["token_mask"].shape[1]
    data["input_ids"] = torch.zeros(B + 1, longest, dtype=torch.int64)
    for row, (p, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        data["input_ids"][row, p : p + n] = batch.tokens[row, :n]
    counts = {"global_valid_seqs": torch.tensor(B), "global_valid_toks": torch.tensor(sum(LENGTHS))}
    for choices in CHOICES:
        loss_fn, losses = MiniRLLossFn(choices), []
        for rows in (rows for rank in UNEVEN for rows in rank):
            placed = []
            for row in rows:
                around = (0, 0, PROMPTS[row] - 1, longest - PROMPTS[row] - LENGTHS[row] + 1)
                placed.append(torch.nn.functional.pad(batch.logits[row, : LENGTHS[row]], around))
            micro_batch = container({name: values[rows] for name, values in data.items()})
            inputs, micro_batch = prepare(torch.stack(placed).float(), micro_batch, loss_fn)
            losses.append(loss_fn(data=micro_batch, **counts, **inputs)[0])
        yield compare(batch, torch.stack(losses).sum(), batch.expected(choices), 2e-6)


FRAMEWORKS: dict[str, Callable[[Path], Iterator[None]]] = {
    "verl": in_verl,
    "prime_rl": in_prime_rl,
    "slime": in_slime,
    "nemo_rl": in_nemo_rl,
}

if __name__ == "__main__":
    for word in sys.argv[1:]:
        name, _, checkout = word.partition("=")
        print(f"{name}: {len(list(FRAMEWORKS[name](Path(checkout).resolve())))} of {len(CHOICES)} choices agree")
