"""What has to be seen on a GPU: a list of checks, each in a process of its own with a time limit.

    python scale/gpu_checks.py --out scale/results/gpu-h100.jsonl            # all of them, about 8 minutes on one GPU
    python scale/gpu_checks.py --only fsdp2 memory --out FILE                # some of them
    python scale/gpu_checks.py --mini --out FILE                             # the same on a CPU, in miniature

Every result is appended to the file as soon as it is there, one line of JSON: the check, its seconds, the card and the
versions, and what was measured. A check with a criterion says `ok`; the others only measure. The exit status is 0 if no
check failed. It needs torch, transformers, accelerate and this checkout; no vLLM, no network.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINI = os.environ.get("MINIRL_GPU_CHECKS_MINI") == "1"
DEVICE = "cpu" if MINI else "cuda"
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8},
    **{"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
}
"""Qwen3-30B-A3B in miniature."""


# ------------------------------------------------------------------------------------------------------- measuring


def synchronise() -> None:
    """Wait for the GPU."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], repeat: int = 3) -> float:
    """The shortest of `repeat` runs, after one that does not count."""
    run()
    synchronise()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - started)
    return min(times)


def peak_gb(run: Callable[[], Any]) -> float:
    """Largest memory that tensors took while `run` ran, beyond what they took before it, in GB; 0 on a CPU."""
    import torch

    if DEVICE != "cuda":
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronise()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def relative(value: Any, reference: Any) -> float:
    """‖value − reference‖ / ‖reference‖."""
    return float((value - reference).norm() / reference.norm())


def random_moe(layers: int, dtype: str = "bfloat16", **sizes: Any) -> Any:
    """A random model of Qwen3-30B-A3B's geometry with fewer layers, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    from minirl_edu.models import load_architecture

    fields = {"num_hidden_layers": layers, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = load_architecture("Qwen/Qwen3-30B-A3B", fields | (SMALL if MINI else sizes))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def random_rollout(prompt: int, responses: Sequence[int], vocabulary: int, padding: int = 0) -> Any:
    """A row of random tokens for each response, of so many; the first `padding` columns of each prompt are padding."""
    import torch

    from minirl_edu.rollout import Rollout

    shape, generator = (len(responses), prompt + max(responses)), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, shape, generator=generator).to(DEVICE)
    mask = torch.arange(shape[1], device=DEVICE) < prompt + torch.tensor(responses, device=DEVICE)[:, None]
    mask[:, :padding] = False
    logp = torch.full((len(responses), max(responses)), -1.0, device=DEVICE)
    return Rollout(tokens, mask, prompt, mask[:, prompt:], logp, None, [[1]] * len(responses), 0)


def padded_layout(rollout: Any) -> Any:
    """The plain layout with all of its padding, and so with the mask that this needs."""
    import torch

    from minirl_edu import logprobs

    whole = logprobs.lay_out(
        dataclasses.replace(rollout, attention_mask=torch.ones_like(rollout.attention_mask)), share_prompts=False
    )
    mask = rollout.attention_mask[:, : whole.source.shape[1]]
    inputs = {**whole.inputs, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return dataclasses.replace(whole, inputs=inputs)


# ---------------------------------------------------------------------------------------------------------- checks


def env() -> dict[str, Any]:
    """The card's own ceilings, and what a process takes before it does anything: the constants of `minirl plan`."""
    import torch

    size, found = 512 if MINI else 8192, {}
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    found["bf16_tflops"] = 2 * size**3 / seconds(lambda: a @ b, 10) / 1e12
    x = torch.empty(2**20 if MINI else 2**30, device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    found["copy_tb_per_s"] = 2 * x.nbytes / seconds(lambda: y.copy_(x), 10) / 1e12
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"memory_gb": total / 1e9, "process_gb": (total - free - torch.cuda.memory_reserved()) / 1e9}
    return found


def parity() -> dict[str, Any]:
    """Log-probabilities, entropies and gradients against float64 on the CPU: both layouts, with chunked logits and
    without, relative errors in fp32 and bf16. The criterion is fp32's: below 1e-4."""
    import torch

    from minirl_edu import lm_head, logprobs
    from minirl_edu.models import load_model
    from minirl_edu.objectives import minirl_loss
    from minirl_edu.rollout import HFEngine, Sampling

    torch.backends.cuda.matmul.allow_tf32 = False
    cpu = load_model("chain-steps")
    sampled = HFEngine(cpu).generate([[1, 2, 3, 4, 5, 6], [4, 5, 6]], group_size=4, sampling=Sampling(24), seed=0)
    names = ("tokens", "attention_mask", "response_mask", "logp_rollout")

    def numbers(device: str, dtype: Any, shared: bool) -> list[Any]:
        model: Any = copy.deepcopy(cpu)
        model = model.to(device=device, dtype=dtype)
        if dtype == torch.float64:
            model.set_experts_implementation("eager")  # the grouped product has no float64
        part = dataclasses.replace(sampled, **{name: getattr(sampled, name).to(device) for name in names})
        out = logprobs.response_logprobs(model, logprobs.lay_out(part, share_prompts=shared))
        advantages = torch.linspace(-1, 1, len(part.tokens), device=device)
        minirl_loss(out.logp, out.logp.detach(), part.logp_rollout, advantages, part.response_mask).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [x.detach().double().cpu() for x in (out.logp, out.entropy, gradient)]

    found, whole = {}, lm_head.CHUNK
    for shared in (False, True):
        for chunk in (whole, 64):
            lm_head.CHUNK = chunk
            reference = numbers("cpu", torch.float64, shared)
            for dtype in ("float32", "bfloat16"):
                errors = map(relative, numbers(DEVICE, getattr(torch, dtype), shared), reference)
                name = f"{'shared' if shared else 'plain'}, {'whole' if chunk == whole else 'chunked'}, {dtype}"
                found[name] = dict(zip(("logp", "entropy", "gradient"), errors, strict=True))
    worst = {d: max(max(e.values()) for n, e in found.items() if n.endswith(d)) for d in ("float32", "bfloat16")}
    return {"ok": worst["float32"] < 1e-4, "worst": worst, "relative_errors": found}


def replay() -> dict[str, Any]:
    """Record, then replay, with gradient checkpointing: the same logits bit for bit, and the same gradient up to the
    order in which a GPU adds numbers up (1e-2 in bf16), in every family that is tested on CPUs."""
    import torch

    from minirl_edu.routing import RoutingReplay
    from tests.routing_families import FAMILIES, VOCABULARY, build

    found: dict[str, Any] = {}
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{family}, {str(dtype)[6:]}"
            try:
                model: Any = build(family)
                model = model.to(device=DEVICE, dtype=dtype)
                model.train()
                model.gradient_checkpointing_enable()
                generator = torch.Generator(DEVICE).manual_seed(0)
                tokens = torch.randint(1, VOCABULARY, (2, 16), device=DEVICE, generator=generator)
                tool = RoutingReplay(model)

                def run(context: Any, model: Any = model, tokens: Any = tokens) -> tuple[Any, Any, Any]:
                    model.zero_grad()
                    with context as tape:
                        logits = model(input_ids=tokens, use_cache=False).logits
                        logits.float().square().mean().backward()
                    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                    return tape, logits.detach(), gradient

                tape, logits, gradient = run(tool.record())
                _, again, second = run(tool.replay(tape.routes))
                found[name] = {"equal": bool(torch.equal(logits, again)), "gradient": relative(second, gradient)}
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:200]
    wrong = {n: v for n, v in found.items() if isinstance(v, str) or not v["equal"] or v["gradient"] > 1e-2}
    return {"ok": not wrong, "families": len(FAMILIES), "wrong": wrong}


def fsdp2() -> dict[str, Any]:
    """`accelerate launch` with the project's FSDP2 config, NCCL and one rank: in fp32 the weights of a run without
    sharding (within 1e-5), in bf16 with R3 and N = 8 an end, and a run that is resumed."""
    from minirl_edu.run.checkpoint import load_checkpoint

    folder = Path(tempfile.mkdtemp())
    tiny = [
        *("train.global_steps=2", "train.mini_batch_prompts=4", "train.group_size=4", "algorithm.replay=R3"),
        *("eval.every=0", "output.save_every=1"),
    ]
    yaml, ranks = ("cpu_fsdp2", 2) if MINI else ("node_8gpu", 1)
    launch = [
        *("accelerate.commands.launch", "--config_file", f"scale/accelerate/{yaml}.yaml"),
        *("--num_processes", str(ranks)),
    ]

    def train(out: str, launcher: Sequence[str], *settings: str, resume: bool = False) -> str:
        script = ["scale/train.py"] if launcher is not plain else ["train"]
        line = [sys.executable, "-m", *launcher, *script, "--out", str(folder / out), *["--resume"] * resume]
        line += [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        return "ran" if done.returncode == 0 else done.stderr[-600:]

    def weights(out: str) -> dict[str, Any]:
        newest = sorted((folder / out / "checkpoints").glob("step-*"))[-1]
        return dict(load_checkpoint(newest)[0]["model"])

    plain = ["minirl_edu.cli"]
    exact = [*tiny, "train.mini_batches=2", "rollout.precision=fp32"]
    found: dict[str, Any] = {"plain": train("plain", plain, *exact)}
    found["fsdp2_fp32"] = train("fsdp2", [*launch, "--mixed_precision", "no"], *exact)
    if found["plain"] == found["fsdp2_fp32"] == "ran":
        a, b = weights("plain"), weights("fsdp2")
        found["largest_difference"] = max(float((a[name] - b[name]).abs().max()) for name in a)
    found["fsdp2_bf16"] = train("bf16", launch, *tiny, "train.mini_batches=8")
    found["resumed"] = train("bf16", launch, "train.global_steps=3", resume=True)
    ran = all(found[name] == "ran" for name in ("plain", "fsdp2_fp32", "fsdp2_bf16", "resumed"))
    return {"ok": ran and found["largest_difference"] < 1e-5, **found}


def row32k() -> dict[str, Any]:
    """One row of 32,768 tokens through 4 layers of Qwen3-30B-A3B's geometry, forward and backward with recomputation:
    seconds and memory; ways to multiply experts; the head with 151,936 words. From it, the seconds of a row through all
    48 layers."""
    import torch

    from minirl_edu import lm_head, logprobs

    layers, length = (2, 256) if MINI else (4, 32768)
    model = random_moe(layers)
    config = model.config
    model.train()
    model.gradient_checkpointing_enable()
    found: dict[str, Any] = {"parameters_billion": sum(p.numel() for p in model.parameters()) / 1e9}

    def step(rollout: Any) -> None:
        out = logprobs.response_logprobs(model, logprobs.lay_out(rollout, share_prompts=False))
        (out.logp * 1e-3).sum().backward()
        model.zero_grad()

    rollout = random_rollout(128, [length - 128], config.vocab_size)
    peak = peak_gb(lambda: step(rollout))
    found["no_mask"] = {"seconds": seconds(lambda: step(rollout), 2), "peak_gb": peak}

    hidden = torch.randn(length - 128, config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    targets = rollout.tokens[0, 128:]
    weight = model.lm_head.weight

    def head() -> None:
        states = hidden.clone().requires_grad_()
        lm_head.head_logprobs(states, weight, None, targets)[0].sum().backward()
        weight.grad = None

    found["head"] = {"peak_gb": peak_gb(head), "seconds": seconds(head, 2)}
    short = random_rollout(16, [length // 4 - 16], config.vocab_size)
    for kind in ("grouped_mm", "eager"):
        model.set_experts_implementation(kind)
        found[f"quarter_row_{kind}_seconds"] = seconds(lambda: step(short), 2)
    body = found["no_mask"]["seconds"] - found["head"]["seconds"]
    attention = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    multiplied = config.hidden_size * (attention + 3 * config.num_experts_per_tok * config.moe_intermediate_size)
    scores = 2 * config.num_attention_heads * config.head_dim * length / 2
    # Two operations a multiplication; forward, recomputed forward and a backward of twice the forward.
    found["body_tflops"] = 4 * 2 * layers * length * (multiplied + scores) / body / 1e12
    found["row_of_48_layers_seconds"] = body / layers * 48 + found["head"]["seconds"]
    return found


def packing() -> dict[str, Any]:
    """Rows with all of their padding and a mask, against rows without common padding, against packed rows: seconds and
    memory of forward and backward of one row of 32,768 tokens, 64 of them padding, and of 8 rows of very different
    lengths with as many tokens, through 4 layers of Qwen3-30B-A3B's geometry. The criterion: in fp32, at an eighth of
    the length, log-probabilities and gradients are the same (relative errors below 1e-4)."""
    import torch

    from minirl_edu import logprobs
    from minirl_edu.packing import allow_packing

    torch.backends.cuda.matmul.allow_tf32 = False
    scale, prompt, padding = (128, 4, 2) if MINI else (1, 128, 64)
    model = random_moe(2 if MINI else 4)
    allow_packing(model)
    model.train()
    model.gradient_checkpointing_enable()

    def rows(shrunk: int = 1) -> dict[str, Any]:
        longest, uneven = 32768, (16384, 6144, 4096, 2048, 1024, 1024, 1024, 1024)
        lengths = {"one row": (longest,), "uneven rows": uneven}
        return {
            name: random_rollout(prompt, [n // scale // shrunk - prompt for n in own], model.config.vocab_size, padding)
            for name, own in lengths.items()
        }

    def layouts(rollout: Any) -> dict[str, Callable[[], Any]]:
        return {
            "padded": lambda: padded_layout(rollout),
            "stripped": lambda: logprobs.lay_out(rollout, share_prompts=False),
            "packed": lambda: logprobs.lay_out(rollout, share_prompts=False, pack=True),
        }

    def step(layout: Callable[[], Any]) -> Any:
        out = logprobs.response_logprobs(model, layout()).logp
        (out * 1e-3).sum().backward()
        return out.detach()

    found: dict[str, Any] = {}
    for name, rollout in rows().items():
        found[name] = {}
        for kind, layout in layouts(rollout).items():
            peak = peak_gb(lambda layout=layout: step(layout))
            found[name][kind] = {"seconds": seconds(lambda layout=layout: step(layout), 2), "peak_gb": peak}
        model.zero_grad()

    model, errors = model.float(), {}
    for name, rollout in rows(8 if not MINI else 1).items():
        numbers = {}
        for kind, layout in layouts(rollout).items():
            model.zero_grad()
            logp = step(layout)
            numbers[kind] = (logp, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        for kind in ("stripped", "packed"):
            pairs = zip(numbers[kind], numbers["padded"], strict=True)
            errors[f"{name}, {kind}"] = dict(
                zip(("logp", "gradient"), (relative(*pair) for pair in pairs), strict=True)
            )
    worst = max(max(error.values()) for error in errors.values())
    return {"ok": worst < 1e-4, "relative_errors": errors, **found}


def memory() -> dict[str, Any]:
    """Two global steps of the one-GPU recipe with random weights: the memory that they take within 15 % of the plan's.
    Two, because Adam has no moments yet while the first one computes its activations."""
    import torch

    from minirl_edu.config import load_config
    from minirl_edu.plan import HARDWARE, Cluster, plan
    from minirl_edu.trainer import MiniRLTrainer

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64} if MINI else {}
    overrides = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 16, **sizes}  # `chain` pads with 16
    config = load_config(
        ROOT / "scale/recipes/qwen3_0p6b_1gpu.yaml",
        [
            *("model.random=true", f"model.overrides={json.dumps(overrides)}", "task={name: chain}", "eval.every=0"),
            f"rollout={{engine: hf, precision: bf16, max_new_tokens: {16 if MINI else 256}}}",
            *("train.global_steps=2", "train.mini_batch_prompts=16", "train.zero_advantage_backward=true"),
            *("output.save_every=0", "train.tokens_per_micro_batch=" + ("512" if MINI else "16384")),
        ],
    )
    if not MINI:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    trainer = MiniRLTrainer(config, Path(tempfile.mkdtemp(), "run"), progress=False)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(2):
        trainer.global_step()
    synchronise()
    found: dict[str, Any] = {"global_step_seconds": (time.perf_counter() - started) / 2}
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        planned = plan(config, Cluster(HARDWARE["h100"], gpus=1), prompt_tokens=24).peak() / 1e9
        found |= {
            "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "taken_gb": (total - free) / 1e9,
            "planned_gb": planned,
        }
        found["ok"] = abs(planned / found["taken_gb"] - 1) < 0.15
    return found


def gap() -> dict[str, Any]:
    """Decoding against scoring, the same weights on the same card, a random MoE: k3, expert flips, and what R3 leaves.
    In fp32 the two agree; in bf16 they need not."""
    import torch

    from minirl_edu import logprobs
    from minirl_edu.diagnostics import kl_k3
    from minirl_edu.rollout import HFEngine, Sampling
    from minirl_edu.routing import RoutingReplay

    model = random_moe(2 if MINI else 8, hidden_size=1024, vocab_size=32000, initializer_range=0.05)
    found = {}
    for dtype in ("float32", "bfloat16"):
        one = copy.deepcopy(model).to(getattr(torch, dtype))
        engine = HFEngine(one, record_routes=True)
        rollout = engine.generate([[*range(1, 33)]] * 4, group_size=8, sampling=Sampling(8 if MINI else 128), seed=0)
        engine.close()
        layout, tool = logprobs.lay_out(rollout, share_prompts=False), RoutingReplay(one)
        assert rollout.routes is not None
        with torch.no_grad():
            with tool.record() as tape:
                live = logprobs.response_logprobs(one, layout).logp
            with tool.replay(layout.pack(rollout.routes)):
                forced = logprobs.response_logprobs(one, layout).logp
        flips = layout.unpack(tape.routes).flip_rate(rollout.routes, rollout.inputs)
        found[dtype] = {
            "k3": float(kl_k3(rollout.logp_rollout, live, rollout.response_mask)),
            "k3_with_r3": float(kl_k3(rollout.logp_rollout, forced, rollout.response_mask)),
            "flips_per_layer": float(flips.mean()),
        }
    return {"ok": found["float32"]["k3"] < 1e-8, **found}


def fp8() -> dict[str, Any]:
    """Real fp8 products (rows and columns scaled, as vLLM's) against the emulated ones of `minirl_edu.precision`, on
    the same operands: how far each is from fp32, and from the other. The emulation is honest if the two agree far
    better than either agrees with fp32."""
    import torch

    from minirl_edu.precision import quantise

    if not MINI and torch.cuda.get_device_capability() < (8, 9):
        return {"skipped": "this card has no fp8 products"}
    found = {}
    for rows, inner, columns in ((64, 64, 64),) if MINI else ((4096, 2048, 768), (8192, 4096, 4096)):
        generator = torch.Generator(DEVICE).manual_seed(0)
        x = torch.randn(rows, inner, device=DEVICE, generator=generator)
        w = torch.randn(columns, inner, device=DEVICE, generator=generator) / inner**0.5
        exact = x.double() @ w.double().T
        emulated = quantise(x, "fp8_e4m3").double() @ quantise(w, "fp8_e4m3").double().T
        # A column for each row's scale: the largest value goes to the format's largest, 448.
        scale_x, scale_w = (v.abs().amax(1, keepdim=True) / 448 for v in (x, w))
        a, b = ((v / s).to(torch.float8_e4m3fn) for v, s in ((x, scale_x), (w, scale_w)))
        real = torch.ops.aten._scaled_mm(
            a, b.T, scale_a=scale_x, scale_b=scale_w.T.contiguous(), out_dtype=torch.bfloat16
        )
        found[f"{rows}x{inner}x{columns}"] = {
            "emulated_from_exact": relative(emulated, exact),
            "real_from_exact": relative(real.double(), exact),
            "real_from_emulated": relative(real.double(), emulated),
        }
    return {"ok": all(f["real_from_emulated"] < f["real_from_exact"] / 5 for f in found.values()), **found}


def stream() -> dict[str, Any]:
    """Weights into a file as a sync writes them, and a checksum of it: GB/s, and the seconds that 30.5 billion
    parameters take at that rate (fp32: 122 GB; a checkpoint has three such parts)."""
    from minirl_edu.rollout.vllm import checkpoint_specs, checkpoint_weights
    from minirl_edu.run.checkpoint import _sha256
    from minirl_edu.streaming import write_safetensors

    model, found = random_moe(2, "float32"), {}
    for name, folder in (("memory", "/dev/shm"), ("disk", tempfile.gettempdir())):
        path = Path(folder, f"weights{os.getpid()}.safetensors")
        started = time.perf_counter()
        write_safetensors(path, checkpoint_specs(model), checkpoint_weights(model))
        size = path.stat().st_size / 1e9
        found[f"{name}_gb_per_s"] = size / (time.perf_counter() - started)
        if name == "disk":
            started = time.perf_counter()
            _sha256(path)
            found["sha256_gb_per_s"] = size / (time.perf_counter() - started)
        path.unlink()
    found["sync_of_30b_seconds"] = 122 / found["disk_gb_per_s"]
    found["checkpoint_of_30b_seconds"] = 366 / found["disk_gb_per_s"] + 366 / found["sha256_gb_per_s"]
    return found


def learn() -> dict[str, Any]:
    """The shipped tiny MoE with R3, N = 8 and an int4 engine: it learns as on a CPU (0.2 in 8 global steps)."""
    from minirl_edu.config import load_config
    from minirl_edu.records import read_records
    from minirl_edu.trainer import MiniRLTrainer

    config = load_config(
        None,
        [
            *(f"train.global_steps={2 if MINI else 8}", "train.mini_batches=8", "train.lr=4e-4"),
            *("rollout.precision=int4", "algorithm.replay=R3", "eval.every=4"),
        ],
    )
    started = time.perf_counter()
    out = MiniRLTrainer(config, Path(tempfile.mkdtemp(), "run"), progress=False).train()
    taken, records = time.perf_counter() - started, read_records(out / "metrics.jsonl")
    scores = [record["score"] for record in records if "score" in record]
    steps = sorted(record["seconds"] for record in records if "seconds" in record)
    found = {"scores": scores, "seconds": taken, "gradient_step_seconds": steps[len(steps) // 2]}
    return {"ok": MINI or scores[-1] > scores[0] + 0.2, **found}


LIMITS = {
    env: 60, parity: 60, replay: 60, fsdp2: 240, row32k: 110, packing: 110, memory: 150, gap: 60, fp8: 40, stream: 60,
    learn: 90,
}  # fmt: skip
"""Every check, in this order, and the seconds that it may take."""


# ------------------------------------------------------------------------------------------------------- running


def where() -> dict[str, str]:
    """The card and the versions that a result belongs to."""
    import accelerate
    import torch
    import transformers

    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def run(name: str, limit: float, *, mini: bool) -> dict[str, Any]:
    """One check in a process of its own: its result, or `ok: False` and what went wrong."""
    environment = {
        **os.environ,
        "MINIRL_GPU_CHECKS_MINI": str(int(mini)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
    line = [sys.executable, str(Path(__file__).resolve()), "--here", name]
    try:
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"not done after {limit:g} s"}
    said = done.stdout.rpartition("RESULT ")[2]
    return json.loads(said) if done.returncode == 0 else {"ok": False, "error": done.stderr[-1500:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = {check.__name__: limit for check, limit in LIMITS.items()}
    parser.add_argument("--out", type=Path, help="file to which the results are appended (default: none)")
    parser.add_argument("--only", nargs="+", choices=checks, default=list(checks), help="some of the checks")
    parser.add_argument("--mini", action="store_true", help="on the CPU, in miniature")
    parser.add_argument("--here", choices=checks, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        found = globals()[arguments.here]()
        print("RESULT " + json.dumps({**where(), **found}))
        return 0
    failed = []
    for name in arguments.only:
        started = time.monotonic()
        found = {"check": name, **run(name, checks[name], mini=arguments.mini)}
        found["check_seconds"] = round(time.monotonic() - started, 1)
        verdict = {True: "ok", False: "FAILED", None: "measured"}[found.get("ok")]
        failed += [name] * (verdict == "FAILED")
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(arguments.out.open("a", encoding="utf-8")) as file:
                file.write(json.dumps(found) + "\n")
        print(f"{name:8} {found['check_seconds']:6.1f} s  {verdict}\n  {json.dumps(found)[:1200]}", flush=True)
    print(f"{len(arguments.only)} checks, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
