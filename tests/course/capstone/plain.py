"""A learner's whole file, written otherwise than the model solution: no cache, dense experts, loops where loops do."""

import hashlib
import json
import math
import random
import struct
from importlib.resources import files
from typing import NamedTuple

import torch
import torch.nn.functional as F

VOCABULARY = "0123456789+-*=, _."
PAD, END, WIDTH, LIMIT = 16, 17, 16, 11
LAYERS, EXPERTS, TOP_K, HEAD_DIM = 2, 8, 2, 32
COLD_START = files("minirl_edu") / "cold_starts" / "chain-steps" / "model.safetensors"


def problems(count, rng, held_out=False):
    texts = []
    for _ in range(100 * count):
        digits = [str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]
        text = "+".join(digits)
        kept = hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 32
        if kept is held_out and len(texts) < count:
            texts.append(text)
    return texts


def reward(problem, response):
    text = ""
    for i in response:
        if i == END:
            break
        text += VOCABULARY[i]
    right = str(eval_sum(problem))[-1]
    return 1.0 if len(text) >= 2 and text[-1] == right and text[-2] in ",=" else 0.0


def eval_sum(problem):
    return sum(int(digit) for digit in problem.split("+"))


def load(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    weights = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            numbers = torch.tensor(struct.unpack(f"<{(end - begin) // 4}f", raw[begin:end]))
            short = name.removeprefix("model.").removesuffix(".weight")
            weights[short] = numbers.reshape(entry["shape"]).requires_grad_(True)
    return weights


def rms(x, weight):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def turn(x):  # [B, S, heads, d]
    half = HEAD_DIM // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angle = torch.outer(torch.arange(x.shape[1]), frequency)[:, None]
    angle = torch.cat((angle, angle), -1)
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * angle.cos() + turned * angle.sin()


def attend(w, name, x):
    q, k, v = (F.linear(x, w[f"{name}.{c}_proj"]).unflatten(-1, (-1, HEAD_DIM)) for c in "qkv")
    q, k = turn(rms(q, w[f"{name}.q_norm"])), turn(rms(k, w[f"{name}.k_norm"]))
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / HEAD_DIM**0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhst,bthd->bshd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return F.linear(mixed.flatten(2), w[f"{name}.o_proj"])


def moe(w, at, x, routes):
    logits = F.linear(x, w[f"{at}.gate"])
    if routes is None:
        routes = logits.detach().topk(TOP_K, -1)[1]
    gates = torch.zeros_like(logits).scatter(-1, routes, logits.gather(-1, routes).softmax(-1))
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        expert = f"{at}.experts.{e}"
        hidden = F.silu(F.linear(x, w[f"{expert}.gate_proj"])) * F.linear(x, w[f"{expert}.up_proj"])
        y = y + gates[:, e : e + 1] * F.linear(hidden, w[f"{expert}.down_proj"])
    return y, routes


def forward(w, tokens, routes=None, cache=None):
    x, used = w["embed_tokens"][tokens], []
    for i in range(LAYERS):
        x = x + attend(w, f"layers.{i}.self_attn", rms(x, w[f"layers.{i}.input_layernorm"]))
        normed = rms(x, w[f"layers.{i}.post_attention_layernorm"]).reshape(-1, x.shape[-1])
        given = None if routes is None else routes[:, :, i].reshape(-1, TOP_K)
        y, experts = moe(w, f"layers.{i}.mlp", normed, given)
        x, used = x + y.reshape(x.shape), [*used, experts.reshape(*tokens.shape, TOP_K)]
    return F.linear(rms(x, w["norm"]), w["embed_tokens"]), torch.stack(used, 2)


class Rollout(NamedTuple):
    advantages: torch.Tensor
    rewards: torch.Tensor
    routes: torch.Tensor
    logp: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor


def sample(w, texts, group_size, generator):
    rows = [[VOCABULARY.index(c) for c in f"{text:<15}="] for text in texts for _ in range(group_size)]
    tokens, alive = torch.tensor(rows), torch.full((len(rows),), True)
    mask, logp, routes = [], [], torch.empty(0)
    with torch.no_grad():
        for _ in range(LIMIT):
            logits, routes = forward(w, tokens)
            every = torch.log_softmax(logits[:, -1], 1)
            drawn = torch.multinomial(every.exp(), 1, generator=generator)[:, 0]
            drawn[~alive] = PAD
            mask.append(alive)
            logp.append(every[torch.arange(len(rows)), drawn] * alive)
            tokens, alive = torch.cat((tokens, drawn[:, None]), 1), alive & (drawn != END)
            if not alive.any():
                break
    rewards = torch.tensor([reward(texts[i // group_size], tokens[i, WIDTH:].tolist()) for i in range(len(rows))])
    advantages = (rewards.view(-1, group_size) - rewards.view(-1, group_size).mean(1, keepdim=True)).flatten()
    return Rollout(advantages, rewards, routes, torch.stack(logp, 1), torch.stack(mask, 1), tokens)


def logprobs(w, part, routes=None):
    logits, used = forward(w, part.tokens[:, :-1], routes)
    distribution = torch.distributions.Categorical(logits=logits[:, WIDTH - 1 :])
    logp, entropy = distribution.log_prob(part.tokens[:, WIDTH:]), distribution.entropy()
    return logp.masked_fill(~part.mask, 0), entropy.masked_fill(~part.mask, 0), used


def rounded(policy, bits):
    engine, top = {}, 2 ** (bits - 1) - 1
    for name, weight in policy.items():
        engine[name] = weight.data.clone()
        if "_proj" in name:
            largest = weight.data.abs().max(1, keepdim=True).values
            engine[name] = torch.round(weight.data * top / largest) * largest / top
    return engine


def minirl_loss(logp, logp_old, part, responses):
    with torch.no_grad():
        weight = torch.minimum((logp - part.logp).exp(), torch.tensor(5.0))
        ratio, sign = torch.exp(logp - logp_old), part.advantages.sign()[:, None]
        m = torch.where(sign > 0, ratio <= 1.27, torch.where(sign < 0, ratio >= 0.8, True))
    terms = torch.where(m & part.mask, weight * part.advantages[:, None] * logp, 0)
    return -terms.sum(1).sum(0) / responses, weight, m


def update(policy, optimizer, rollout, size, micro_batch, replay="none"):
    rows = [slice(i, i + micro_batch) for i in range(0, rollout.tokens.shape[0], micro_batch)]
    parts = [Rollout(*(field[at] for field in rollout)) for at in rows]
    before = []
    for part in parts:
        with torch.no_grad():
            before.append(logprobs(policy, part, part.routes if replay == "R3" else None))
    for first in range(0, len(parts), size // micro_batch):
        optimizer.zero_grad()
        for part, (old, _, chosen) in list(zip(parts, before, strict=True))[first : first + size // micro_batch]:
            routes = chosen if replay == "R2" else part.routes if replay == "R3" else None
            minirl_loss(logprobs(policy, part, routes)[0], old, part, size)[0].backward()
        torch.nn.utils.clip_grad_norm_(list(policy.values()), max_norm=1)
        optimizer.step()


def train(replay, seed, N=4, steps=30, bits=4, prompts=16, group_size=8, micro_batch=64, lr=3e-4):
    policy, rng, generator = load(COLD_START), random.Random(seed), torch.Generator()
    generator.manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(list(policy.values()), lr=lr, betas=(0.9, 0.95))
    exam = problems(256, random.Random(12345), held_out=True)
    for _ in range(steps):
        rollout = sample(rounded(policy, bits), problems(N * prompts, rng), group_size, generator)
        update(policy, optimizer, rollout, prompts * group_size, micro_batch, replay=replay)
        print(f"reward {rollout.rewards.mean():.2f}")
    return float(sample(policy, exam, 1, torch.Generator().manual_seed(1)).rewards.mean())
