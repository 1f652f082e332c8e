"""Cold starts: fine-tuning a fresh model on a teacher's demonstrations, so that RL has something to reinforce.

The teacher errs on purpose, so the model starts in the middle of the scale; RL then has both failures and successes to
learn from. Which teacher it was shapes the style of the responses (the paper's Figure 5 compares three).
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from minirl_edu.logprobs import lay_out, response_logprobs
from minirl_edu.models import tiny_dense, tiny_moe
from minirl_edu.rollout import Rollout, Sampling, sample
from minirl_edu.seeding import derive_seed
from minirl_edu.tasks import Demonstrable, verified_rewards

ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "moe": tiny_moe,
    "experts": partial(tiny_moe, experts=16, top_k=1, expert_hidden=64),
    "dense": tiny_dense,
}
"""Fresh models by name.

`moe`'s experts learn the same, so another choice of experts hardly matters. `experts` has as many parameters and one
expert per token: there each choice matters. `dense` has the parameters that serve one token of `moe`.
"""


def new_model(task: Demonstrable, architecture: str, *, seed: int) -> PreTrainedModel:
    """A fresh tiny model, one of `ARCHITECTURES`, with the vocabulary and special tokens of the task's tokenizer."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: {architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    tokenizer = task.tokenizer
    return ARCHITECTURES[architecture](
        len(tokenizer), seed=seed, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def cold_start(
    task: Demonstrable,
    model: PreTrainedModel,
    *,
    style: str | None = None,
    error_rate: float = 0.21,
    steps: int = 1500,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Fine-tune `model` in place on demonstrations: minimise the mean of −log π over their tokens, EOS included.

    AdamW (β 0.9, 0.95) with a cosine schedule over `steps` batches of fresh problems; the teacher errs at each step of
    its working with probability `error_rate`. In the end the weights are rounded to bf16, so that half of the bytes
    store the same fp32 model. Returns the loss of every step, in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    losses = []
    model.train()
    bar = tqdm(range(steps), unit="step", disable=not progress)
    for step in bar:
        step_seed = derive_seed(seed, "demonstrations", step)
        batch = _batch(task, batch_size, style, error_rate, step_seed, model.device)
        logp = response_logprobs(model, lay_out(batch, share_prompts=False)).logp
        loss = -logp.sum() / batch.response_mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return losses


def _batch(
    task: Demonstrable, size: int, style: str | None, error_rate: float, seed: int, device: torch.device
) -> Rollout:
    """Demonstrations as if they had been sampled, one to a prompt. Prompts of several widths are refused: a fixed-width
    task has none."""
    rng = random.Random(seed)
    problems = task.sample(size, seed=seed)
    prompts = [task.encode(problem) for problem in problems]
    widths = {len(prompt) for prompt in prompts}
    if len(widths) > 1:
        raise ValueError(
            f"task {task.name!r}: prompts of several widths {sorted(widths)}; cold starts need a fixed one"
        )
    texts = [task.demonstration(p, rng=rng, style=style, error_rate=error_rate) for p in problems]
    eos, pad = task.tokenizer.eos_token_id, task.tokenizer.pad_token_id
    responses = [[*ids, eos] for ids in task.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(map(len, responses))
    rows = [p + r + [pad] * (longest - len(r)) for p, r in zip(prompts, responses, strict=True)]
    lengths = torch.tensor([len(r) for r in responses], device=device)
    written = torch.arange(longest, device=device) < lengths[:, None]
    (width,) = widths
    return Rollout(
        tokens=torch.tensor(rows, device=device),
        attention_mask=nn.functional.pad(written, (width, 0), value=True),
        prompt_length=width,
        response_mask=written,
        logp_rollout=torch.zeros(written.shape, device=device),
        routes=None,
        prompts=prompts,
        weight_version=0,
    )


def measure(task: Demonstrable, model: PreTrainedModel, *, problems: int = 1024, seed: int = 0) -> dict[str, float]:
    """What a cold start can do, sampled at temperature 1 on held-out problems.

    `score`: share answered right. `solvable`: share right in at least one of 8 samples, what RL has to reinforce.
    `response_length`: mean number of response tokens. `ended`: share that closed with EOS.
    """
    held_out = task.evaluation(problems)
    rollout = sample(
        model,
        [task.encode(problem) for problem in held_out],
        group_size=8,
        sampling=Sampling(task.max_new_tokens),
        seed=derive_seed(seed, "evaluation"),
    )
    texts = task.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    asked = [held_out[row // 8] for row in range(len(texts))]
    right = torch.tensor(verified_rewards(task, asked, texts)).view(-1, 8)
    lengths, eos = rollout.response_mask.sum(1), task.tokenizer.eos_token_id
    return {
        "score": right.mean().item(),
        "solvable": right.amax(1).gt(0).float().mean().item(),
        "response_length": lengths.float().mean().item(),
        "ended": sum(row[-1] == eos for row in rollout.responses) / len(lengths),
    }


def save_cold_start(out: str | Path, model: PreTrainedModel, task: Demonstrable, record: dict[str, Any]) -> Path:
    """Write model and tokenizer as transformers does, and `record` (command, settings, metrics) as cold_start.json.

    The weights are stored in bf16, which is exact after `cold_start`. Raises ValueError for a weight that it changes.
    """
    out = Path(out)
    weights = model.state_dict()
    stored = {name: tensor.bfloat16() for name, tensor in weights.items()}
    if changed := [name for name in weights if not torch.equal(stored[name].to(weights[name].dtype), weights[name])]:
        raise ValueError(f"{changed[0]}: bf16 would change it; round the weights first, as `cold_start` does")
    model.save_pretrained(out, state_dict=stored)
    task.tokenizer.save_pretrained(out)
    (out / "cold_start.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out
