"""What each process of a test with several of them runs: `program.py OUT TASK [A.B=C …]`, under `accelerate launch` or
alone. Rank 0 leaves its findings in OUT."""

import gc
import json
import os
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minirl_edu import streaming
from minirl_edu.batches import MiniBatch
from minirl_edu.config import Config, load_config
from minirl_edu.models import load_model, random_model
from minirl_edu.ranks import RankedBatcher
from minirl_edu.rollout import EngineError, HFEngine, Rollout, Sampling
from minirl_edu.rollout import vllm as vllm_module
from minirl_edu.rollout.vllm import checkpoint_specs, checkpoint_weights
from minirl_edu.rollout.vllm_server import VLLMServerEngine, _Wire
from minirl_edu.run import build
from minirl_edu.streaming import full_state, take_part, write_safetensors
from minirl_edu.tasks import ChainTask, Problem
from minirl_edu.trainer import MiniRLTrainer

MOE = (
    "model={name: Qwen3-30B-A3B, random: true, overrides: {vocab_size: 18, hidden_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32, num_experts: 8, num_experts_per_tok: 2, "
    "moe_intermediate_size: 32, intermediate_size: 64, bos_token_id: null, eos_token_id: 17, pad_token_id: 16}}"
)
SETTINGS = (
    *(MOE, "rollout.precision=int4", "task.options={max_operands: 5, hard_operands: 5}"),
    *("train.global_steps=3", "train.mini_batch_prompts=5", "train.group_size=4", "train.mini_batches=2"),
    # Adam's step g/(√v + ε) is ±1 for any g ≫ ε: a difference of 1e-8 between two sums becomes a whole step where a
    # gradient happens to be 0. With this ε weights depend on gradients smoothly, and can be compared.
    *("train.adam_eps=1e-2", "train.lr=1e-3", "train.tokens_per_micro_batch=64"),
    *("eval.every=2", "eval.problems=8", "eval.samples=6", "output.save_every=1", "ranks.wait=120", "ranks.silent=20"),
)
TIED = MOE.replace("overrides: {", "overrides: {tie_word_embeddings: true, ")


def even(problems: Sequence[Problem], rollout: Rollout) -> torch.Tensor:
    """Rewards responses that start with an even token: random weights get some of them right."""
    return (rollout.tokens[:, rollout.prompt_length] % 2 == 0).float()


class Guided(ChainTask):
    """chain, in which the environment says "0" after each even digit, and ends a response at a comma."""

    def respond(self, problem: Problem, response: Sequence[int]) -> Sequence[int] | None:
        """Digits are the ids 0 to 9."""
        comma = self.tokenizer.convert_tokens_to_ids(",")
        return None if response[-1] == comma else (0,) if response[-1] in (2, 4, 6, 8) else ()


def trainer(out: Path, settings: Sequence[str], **options) -> MiniRLTrainer:
    """A run on the tiny untied model; every process makes the same."""
    run = MiniRLTrainer(load_config(None, [*SETTINGS, *settings]), out, progress=False, **options)
    run.rewards = even
    return run


def final_weights(run: MiniRLTrainer, file: Path) -> None:
    """Gather the weights into a file; all ranks."""
    weights = {name: tensor.clone() for name, tensor in full_state(run.unwrapped)}
    if run.ranks.is_main:
        save_file(weights, file)


def train(out: Path, settings: Sequence[str]) -> None:
    """Each kind of replay, from the same start; and R3 with an environment that writes into the responses."""
    torn = 0  # groups of whose responses each rank has some, which are packed

    def watched(self: RankedBatcher, *args: Any) -> list[MiniBatch]:
        nonlocal torn
        cut = original(self, *args)
        parts = [part for mini_batch in cut for part in mini_batch.parts if "segments" in part.layout.inputs]
        for mini_batch in cut:
            groups = [{int(row) // self.group_size for row in rows} for rows in mini_batch.shares]
            torn += len(set.intersection(*groups)) if parts else 0
        return cut

    original = RankedBatcher.cut
    RankedBatcher.cut = watched  # pyright: ignore[reportAttributeAccessIssue]
    for name, replay, task in (
        ("none", "none", None),
        ("R2", "R2", None),
        ("R3", "R3", None),
        ("episodes", "R3", Guided),
    ):
        own = {} if task is None else {"task": task(max_operands=5, hard_operands=5)}
        run = trainer(out / name, [*settings, f"algorithm.replay={replay}"], **own)
        run.train()
        final_weights(run, out / name / "final.safetensors")
    if run.ranks.is_main:
        kinds = {type(parameter).__name__ for parameter in run.model.parameters()}
        findings = {"parameters": sorted(kinds), "fsdp2": run.accelerator.is_fsdp2, "size": run.ranks.size}
        findings["torn groups"] = torn
        (out / "findings.json").write_text(json.dumps(findings))


def stream(out: Path, settings: Sequence[str]) -> None:
    """What an engine and a file get of sharded weights after a step, and how many whole tensors there ever are."""
    run = trainer(out / "run", settings)
    run.global_step()
    model, first = run.unwrapped, run.ranks.is_main
    alive: list[weakref.ref] = []
    most = 0
    gather = streaming.gather_full

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        whole = gather(tensor)
        gc.collect()
        alive.append(weakref.ref(whole.untyped_storage()))
        # On a busy machine gloo's thread may hold the result of the gather before for a moment.
        until = time.monotonic() + 2
        while (count := sum(ref() is not None for ref in alive)) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        most = max(most, count)
        return whole

    streaming.gather_full = vllm_module.gather_full = watched
    if first:
        write_safetensors(out / "streamed.safetensors", checkpoint_specs(model), checkpoint_weights(model))
    else:
        take_part(model)
    streamed, most, alive = most, 0, []
    streaming.gather_full = vllm_module.gather_full = gather
    gathered = {name: tensor.clone() for name, tensor in full_state(model)}
    if not first:
        take_part(model)
        run.ranks.close()
        return
    plain = random_model("Qwen3-30B-A3B", run.config.model.overrides, seed=0)
    plain.load_state_dict(gathered, strict=False)
    engine = HFEngine(plain)
    engine.sync(model, version=1)
    run.ranks.close()
    assert engine.model is not None
    same = all(torch.equal(tensor, gathered[name]) for name, tensor in full_state(engine.model))
    expected = dict(checkpoint_weights(plain))
    with safe_open(out / "streamed.safetensors", framework="pt") as file:
        names = set(file.keys())
        equal = names == expected.keys() and all(torch.equal(file.get_tensor(n), expected[n]) for n in names)
    findings = {"file": equal, "engine": same, "most": streamed, "tensors": len(gathered), "names": len(names)}
    (out / "findings.json").write_text(json.dumps(findings))


def nccl(out: Path, settings: Sequence[str]) -> None:
    """Three syncs by vLLM's weight transfer, to a server and through a broadcast that pretend: what vLLM was told, what
    it got, and how many tensors each rank gathered. Then the server restarts, and rank 0 alone is asked for weights."""
    from vllm.distributed.weight_transfer import nccl_engine as transfer

    from tests.test_vllm_server import KEY, PROMPTS, Fake

    run = trainer(out / "run", settings)
    model, first = run.unwrapped, run.ranks.is_main
    gathered, received = 0, {}
    gather = DTensor.full_tensor

    def counted(self: DTensor, **options: Any) -> torch.Tensor:
        nonlocal gathered
        gathered += 1
        return gather(self, **options)

    def broadcast(*, iterator: Iterable[tuple[str, torch.Tensor]], **_: Any) -> None:
        received.update((name, tensor.clone()) for name, tensor in iterator)

    DTensor.full_tensor = counted
    transfer.open_trainer_endpoint = lambda info: SimpleNamespace(destroy=lambda: None)  # pyright: ignore
    transfer.packed_nccl_broadcast_producer = broadcast  # pyright: ignore
    plain = random_model("Qwen3-30B-A3B", run.config.model.overrides, seed=0)
    if first:
        server = Fake(plain)
        server.description |= {"dtype": "bfloat16", "fp32": ["gate.weight"]}
        server.fault = lambda path, body: (200, {"world_size": 4}) if path == "/get_world_size" else None
        server.start()
        engine = VLLMServerEngine(plain, url=server.url, api_key=KEY, transfer="nccl")
    for version in (0, 0, 1):
        if first:
            engine.sync(model, version=version)
        else:
            take_part(model)
    each = [0] * run.ranks.size
    each[run.ranks.rank] = gathered
    each = run.ranks.all_reduce(each, "sum")
    weights = {name: tensor.clone() for name, tensor in full_state(model)}
    run.ranks.close()
    if not first:
        return
    told = next(body["update_info"] for path, body in reversed(server.served) if path == "/update_weights")
    server.restart()
    try:
        engine.generate(PROMPTS, group_size=2, sampling=Sampling(4), seed=0)
        refused = ""
    except EngineError as error:
        refused = str(error)
    plain.load_state_dict(weights, strict=False)
    wire = _Wire(torch.bfloat16, frozenset(["gate.weight"]))
    expected = dict(wire.cast(checkpoint_weights(plain)))
    announced = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in received.items()]
    findings = {
        "gathers": each,
        "announced": announced == list(zip(told["names"], told["dtype_names"], told["shapes"], strict=True)),
        "received": list(received) == list(expected) and all(torch.equal(received[n], expected[n]) for n in expected),
        "dtypes": sorted({dtype for _, dtype, _ in announced}),
        "meetings": sum(path == "/init_weight_transfer_engine" for path, _ in server.served),
        "refused": refused,
    }
    (out / "findings.json").write_text(json.dumps(findings))


def load(out: Path, settings: Sequence[str]) -> None:
    """A model that rank 0 loads: which weights and buffers all have once it is sharded."""

    def refused(*_: Any, **__: Any) -> PreTrainedModel:
        raise AssertionError("a second rank loads the model")

    def spoilt(config: Config, model: PreTrainedModel, *rest: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        return prepare(config, model, *rest)

    prepare = build.prepare
    if os.environ["RANK"] != "0":
        build.load_model, build.prepare = refused, spoilt
    run = trainer(out / "run", [*settings, "model={name: chain-steps}", "task={name: chain}"])
    gathered = {name: tensor.clone() for name, tensor in full_state(run.unwrapped)}
    buffers = all(bool(torch.isfinite(b).all() and b.any()) for _, b in run.unwrapped.named_buffers())
    everywhere = not run.ranks.any(not buffers)
    lines = run.global_step()
    if run.ranks.is_main:
        loaded = dict(load_model("chain-steps").named_parameters())
        same = all(torch.equal(tensor, loaded[name]) for name, tensor in gathered.items())
        findings = {"same": same, "buffers": everywhere, "steps": len(lines)}
        (out / "findings.json").write_text(json.dumps(findings))
    run.ranks.close()


def resume(out: Path, settings: Sequence[str]) -> None:
    """Go on with the run in OUT/run to its end."""
    run = trainer(out / "run", settings, resume=(out / "run").exists())
    run.train()
    final_weights(run, out / f"final-{run.step}.safetensors")


def poison(out: Path, settings: Sequence[str]) -> None:
    """One rank's parameters turn to NaN between two steps."""
    run = trainer(out / "run", settings)
    step = run._update

    def spoilt(mini_batch):
        if run.grad_step == 2 and run.ranks.rank == run.ranks.size - 1:
            parameter = next(run.model.parameters())
            with torch.no_grad():
                getattr(parameter, "_local_tensor", parameter).fill_(float("nan"))
        return step(mini_batch)

    run._update = spoilt
    run.train()


def fail(out: Path, settings: Sequence[str]) -> None:
    """The last rank raises an error between two steps, while the others wait for it."""
    run = trainer(out / "run", settings)
    step = run._update

    def failing(mini_batch):
        if run.grad_step == 2 and run.ranks.rank == run.ranks.size - 1:
            raise ValueError("spoilt on purpose")
        return step(mini_batch)

    run._update = failing
    run.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = (train, stream, nccl, load, resume, poison, fail)
    {task.__name__: task for task in tasks}[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:])
