"""MiniRL in one file: equation (7) of arXiv 2512.01374 on a tiny Mixture-of-Experts, in plain PyTorch.

The policy comes from a cold start: it has imitated a teacher who errs, and solves 44 % of the held-out problems. After
30 global steps, 40 s of one core, it solves 98, 96 and 99 % (R3, seeds 0, 1, 2). Each global step

    1. sync     gives the engine the trainer's weights θ_old. The engine rounds them, so it is another policy, μ_old
    2. sample   draws G responses to each prompt, y ~ μ_old, and keeps log μ_old and the experts (routes) of each token
    3. reward   is 1 for the right last digit, else 0. The advantage Â is the reward minus the mean of its G responses
    4. π_old    is the trainer's probability of the same tokens under the same θ_old, for all N mini-batches
    5. update   makes a gradient step for each mini-batch, by Σ_t M_t · sg[min(π_θ/μ_old, 5)] · Â · ∇log π_θ(y_t)  (7)

Replay says which experts the trainer uses in 4 and 5: those it chooses now (none), at θ_old (R2), or the engine's (R3).
Shapes: B responses, T tokens of one, S with its prompt, V words, L layers, E experts, k per token, n = B·S.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COLD_START = Path(__file__).parents[1] / "minirl_edu" / "cold_starts" / "chain-steps" / "model.safetensors"
VOCABULARY = "0123456789+-*=, _."  # _ is padding, . ends a response
PAD, END, WIDTH, LIMIT = 16, 17, 16, 11  # two ids, the tokens of a prompt, and those of a response at most
LAYERS, EXPERTS, TOP_K, HEAD_DIM = 2, 8, 2, 32  # L, E, k, d


# ---- the task `chain`: to 3+4+9 answer ,7,6 (running sums modulo 10)
def problems(count: int, rng: random.Random, held_out: bool = False) -> list[str]:
    """Sums of 3 to 6 digits. A hash keeps an eighth of them for evaluation."""
    found = []
    while len(found) < count:
        text = "+".join(rng.choices("0123456789", k=rng.randint(3, 6)))
        if (hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 32) == held_out:
            found.append(text)
    return found


def reward(problem: str, response: list[int]) -> float:
    """1 if the response ends in `,` or `=` and the right digit."""
    text, answer = "".join(VOCABULARY[i] for i in response if i < PAD), sum(map(int, problem.split("+"))) % 10
    return float(text.endswith((f",{answer}", f"={answer}")))


# ---- the policy: a Qwen3-MoE of 0.9 M weights, a dictionary of matrices
def load(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: 8 bytes for the length of its header, the header in JSON, the numbers."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8:start]), torch.frombuffer(data[start:], dtype=torch.float32)
    places = [(name, *entry["data_offsets"], entry["shape"]) for name, entry in header.items() if name[0] != "_"]
    return {name[6:-7]: numbers[a // 4 : b // 4].view(shape).requires_grad_() for name, a, b, shape in places}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def rotate(x: Tensor, start: int) -> Tensor:  # [B, heads, S, d], rotary embedding of positions start, start + 1, …
    angle = torch.arange(start, start + x.shape[2])[:, None] * 10000 ** -torch.arange(0, 1, 2 / HEAD_DIM)  # [S, d/2]
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention(w: dict, at: str, x: Tensor, past: list | None) -> tuple[Tensor, list[Tensor]]:  # x [B, S, D]
    q, k, v = ((x @ w[f"{at}.{c}_proj"].T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for c in "qkv")
    start = past[0].shape[2] if past else 0
    q, k = rotate(norm(q, w[f"{at}.q_norm"]), start), rotate(norm(k, w[f"{at}.k_norm"]), start)  # [B, heads, S, d]
    k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)) if past else (k, v)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=not past, enable_gqa=True)
    return y.transpose(1, 2).flatten(2) @ w[f"{at}.o_proj"].T, [k, v]


def moe(w: dict, at: str, x: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:  # x [n, D], routes [n, k]
    scores = (x @ w[f"{at}.gate"].T).softmax(-1)  # [n, E], the router's
    routes = scores.topk(TOP_K).indices if routes is None else routes  # replay forces the choice of experts, …
    gates = scores.gather(-1, routes)  # … but their weights are computed anew, so the router learns
    gates, y = gates / gates.sum(-1, keepdim=True), torch.zeros_like(x)
    for e in range(EXPERTS):
        token, place = (routes == e).nonzero(as_tuple=True)
        gate, up, down = (w[f"{at}.experts.{e}.{name}_proj"] for name in ("gate", "up", "down"))
        y.index_add_(0, token, gates[token, place, None] * ((F.silu(x[token] @ gate.T) * (x[token] @ up.T)) @ down.T))
    return y, routes


def forward(w: dict[str, Tensor], tokens: Tensor, routes: Tensor | None = None, cache: dict | None = None):
    """Logits [B, S, V] of tokens [B, S], and their experts [B, S, L, k]. `cache` keeps keys and values of a prefix."""
    cache, used, x = {} if cache is None else cache, [], w["embed_tokens"][tokens]  # x [B, S, D]
    for i, at in enumerate(f"layers.{i}" for i in range(LAYERS)):
        y, cache[i] = attention(w, f"{at}.self_attn", norm(x, w[f"{at}.input_layernorm"]), cache.get(i))
        x = x + y
        forced = None if routes is None else routes[:, :, i].flatten(0, 1)
        y, experts = moe(w, f"{at}.mlp", norm(x, w[f"{at}.post_attention_layernorm"]).flatten(0, 1), forced)
        x = x + y.view_as(x)
        used.append(experts.view(*tokens.shape, TOP_K))
    return norm(x, w["norm"]) @ w["embed_tokens"].T, torch.stack(used, 2)


# ---- the engine: μ_old
def rounded(policy: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """θ_old as the engine has it: each row of a matrix on 2^bits − 1 values, but for embeddings and routers."""
    engine = {name: weight.detach().clone() for name, weight in policy.items()}
    for weight in (weight for name, weight in engine.items() if "_proj" in name):
        step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight.div_(step).round_().mul_(step)
    return engine


class Rollout(NamedTuple):
    tokens: Tensor  # [B, S]
    mask: Tensor  # [B, T], True on a response's tokens, its end included
    logp: Tensor  # [B, T], log μ_old(y_t)
    routes: Tensor  # [B, S−1, L, k], the engine's; the last token is never an input
    rewards: Tensor  # [B]
    advantages: Tensor  # [B], Â


@torch.no_grad()
def sample(w: dict, texts: list[str], group_size: int, generator: torch.Generator) -> Rollout:
    """G responses to each prompt, y ~ μ_old, one token after the other."""
    prompts = torch.tensor([[VOCABULARY.index(c) for c in text.ljust(WIDTH - 1) + "="] for text in texts])
    logits, routes = forward(w, prompts, cache=(cache := {}))  # each prompt once, for all of its responses
    cache = {i: [x.repeat_interleave(group_size, 0) for x in kv] for i, kv in cache.items()}
    logits, routes, tokens = (x.repeat_interleave(group_size, 0) for x in (logits, routes, prompts))
    masks, logps = [torch.ones(len(tokens), 1, dtype=torch.bool)], []
    while True:
        logp = logits[:, -1].log_softmax(-1)  # [B, V]
        y = logp.exp().multinomial(1, generator=generator).where(masks[-1], PAD)  # [B, 1]
        tokens, logps = torch.cat((tokens, y), 1), [*logps, logp.gather(1, y).where(masks[-1], 0)]
        going = masks[-1] & (y != END)
        if len(logps) == LIMIT or not going.any():
            break
        logits, experts = forward(w, y, cache=cache)
        masks, routes = [*masks, going], torch.cat((routes, experts), 1)
    rewards = torch.tensor([reward(texts[i // group_size], y) for i, y in enumerate(tokens[:, WIDTH:].tolist())])
    advantages = rewards - rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)  # no standard deviation
    return Rollout(tokens, torch.cat(masks, 1), torch.cat(logps, 1), routes, rewards, advantages)


# ---- the trainer: π_old and π_θ
def logprobs(w: dict, part: Rollout, routes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log π(y_t) and the entropy, [B, T] and 0 outside the mask, and the experts used."""
    logits, used = forward(w, part.tokens[:, :-1], routes)
    logp = logits[:, WIDTH - 1 :].log_softmax(-1)  # [B, T, V]: each token predicts the next
    chosen = logp.gather(-1, part.tokens[:, WIDTH:, None])[..., 0]
    return chosen.where(part.mask, 0), -(logp.exp() * logp).sum(-1).where(part.mask, 0), used


def minirl_loss(logp: Tensor, logp_old: Tensor, part: Rollout, responses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (7): the sum over tokens, the mean over a mini-batch's responses. Also the weights and M, [B, T]."""
    a, fixed = part.advantages[:, None], logp.detach()
    weight = (fixed - part.logp).exp().clamp(max=5)  # π_θ/μ_old = π_old/μ_old · π_θ/π_old, equation (5)
    r = (fixed - logp_old).exp()  # π_θ/π_old
    m = ~((a > 0) & (r > 1.27) | (a < 0) & (r < 0.8))  # M_t: 1 + ε_high and 1 − ε_low
    return -(m * weight * a * logp).sum() / responses, weight, m


def update(policy: dict, optimizer, rollout: Rollout, size: int, micro_batch: int, replay="none") -> tuple:
    """A gradient step for each mini-batch of `size` responses. Returns log π_old, entropy, routes, weights and M."""
    parts = [Rollout(*part) for part in zip(*(x.split(micro_batch) for x in rollout), strict=True)]
    with torch.no_grad():  # π_old of all N mini-batches, before θ moves
        old, new = [logprobs(policy, part, part.routes if replay == "R3" else None) for part in parts], []
    for i, (part, (logp_old, _, used)) in enumerate(zip(parts, old, strict=True), start=1):
        logp, _, _ = logprobs(policy, part, {"none": None, "R2": used, "R3": part.routes}[replay])
        loss, weight, m = minirl_loss(logp, logp_old, part, size)
        loss.backward()  # micro-batches add up
        new.append((weight, m))
        if i * micro_batch % size == 0:  # the end of a mini-batch; micro_batch divides size
            torch.nn.utils.clip_grad_norm_(policy.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return tuple(torch.cat(x) for pairs in (old, new) for x in zip(*pairs, strict=True))


def train(replay: str, seed: int, N=4, steps=30, bits=4, prompts=16, group_size=8, micro_batch=64, lr=3e-4) -> float:
    """Print a line for each global step; return the last score on held-out problems, with the trainer's own weights."""
    rng, generator, size = random.Random(seed), torch.Generator().manual_seed(seed), prompts * group_size
    policy, exam = load(COLD_START), problems(256, random.Random("exam"), held_out=True)
    optimizer = torch.optim.AdamW(policy.values(), lr, betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps):
        score = sample(policy, exam, 1, torch.Generator().manual_seed(0)).rewards.mean()
        rollout = sample(rounded(policy, bits), problems(N * prompts, rng), group_size, generator)
        logp_old, entropy, used, weight, m = update(policy, optimizer, rollout, size, micro_batch, replay)
        tokens, flips = rollout.mask.sum(), (used.sort(-1)[0] != rollout.routes.sort(-1)[0]).any(-1)[:, WIDTH - 1 :]
        print(f"{step:2}  score {score:.2f}  reward {rollout.rewards.mean():.2f}  max w {weight.max():.1f}", end="")
        print(f"  entropy {entropy.sum() / tokens:.3f}  KL {(rollout.logp - logp_old).sum() / tokens:+.4f}", end="")
        print(f"  flips {flips[rollout.mask].float().mean():.1%}  clipped {(~m).sum() / tokens:.1%}")
    return sample(policy, exam, 1, torch.Generator().manual_seed(0)).rewards.mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", choices=("none", "R2", "R3"), default="R3")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
