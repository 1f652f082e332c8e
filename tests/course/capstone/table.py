"""A learner's file as it grows through steps 01 to 05: a step's file ends where the next one begins."""
# pyright: reportRedeclaration=false

# ---- step 01
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = "0123456789+-*=, _."
PAD, END, WIDTH, LIMIT = 16, 17, 16, 11


def problems(count, rng, held_out=False):
    found = []
    while len(found) < count:
        text = "+".join(rng.choices("0123456789", k=rng.randint(3, 6)))
        if (hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 32) == held_out:
            found.append(text)
    return found


def reward(problem, response):
    text = "".join(VOCABULARY[i] for i in response if i not in (PAD, END))
    answer = sum(map(int, problem.split("+"))) % 10
    return float(text[-2:] in (f",{answer}", f"={answer}"))


def forward(w, tokens, routes=None, cache=None):
    return w["next_proj"][tokens], None


class Rollout(NamedTuple):
    tokens: Tensor
    mask: Tensor
    logp: Tensor
    rewards: Tensor
    advantages: Tensor


@torch.no_grad()
def sample(w, texts, group_size, generator):
    prompts = torch.tensor([[VOCABULARY.index(c) for c in text.ljust(WIDTH - 1) + "="] for text in texts])
    tokens = prompts.repeat_interleave(group_size, 0)
    going, masks, logps = torch.ones(len(tokens), 1, dtype=torch.bool), [], []
    while len(masks) < LIMIT and going.any():
        every = forward(w, tokens)[0][:, -1].log_softmax(-1)
        y = torch.multinomial(every.exp(), 1, generator=generator)
        y = torch.where(going, y, PAD)
        masks.append(going)
        logps.append(torch.where(going, every.gather(1, y), 0.0))
        tokens = torch.cat((tokens, y), 1)
        going = going & (y != END)
    rewards = torch.tensor([reward(texts[i // group_size], y) for i, y in enumerate(tokens[:, WIDTH:].tolist())])
    baseline = rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)
    return Rollout(tokens, torch.cat(masks, 1), torch.cat(logps, 1), rewards, rewards - baseline)


def logprobs(w, part, routes=None):
    logits, used = forward(w, part.tokens[:, :-1], routes)
    every = logits[:, WIDTH - 1 :].log_softmax(-1)
    chosen = every.gather(-1, part.tokens[:, WIDTH:, None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    return torch.where(part.mask, chosen, 0.0), torch.where(part.mask, entropy, 0.0), used


def reinforce_loss(logp, part, responses):
    return -(part.advantages[:, None] * logp).sum() / responses


# ---- step 02
def minirl_loss(logp, logp_old, part, responses):
    weight = (logp - part.logp).exp().detach()
    m = torch.ones_like(part.mask)
    return -(weight * part.advantages[:, None] * logp).sum() / responses, weight, m


# ---- step 03
def rounded(policy, bits):
    engine = {name: weight.detach().clone() for name, weight in policy.items()}
    for name, weight in engine.items():
        if "_proj" in name:
            step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            engine[name] = (weight / step).round() * step
    return engine


def minirl_loss(logp, logp_old, part, responses):
    weight = (logp - part.logp).exp().detach().clamp(max=5)
    m = torch.ones_like(part.mask)
    return -(weight * part.advantages[:, None] * logp).sum() / responses, weight, m


# ---- step 04
def minirl_loss(logp, logp_old, part, responses):
    a = part.advantages[:, None]
    weight = (logp - part.logp).exp().detach().clamp(max=5)
    r = (logp - logp_old).exp().detach()
    m = ~(((a > 0) & (r > 1.27)) | ((a < 0) & (r < 0.8)))
    return -(m * weight * a * logp).sum() / responses, weight, m


def cut(rollout, size):
    return [Rollout(*(x[i : i + size] for x in rollout)) for i in range(0, len(rollout.tokens), size)]


def update(policy, optimizer, rollout, size, micro_batch, replay="none"):
    with torch.no_grad():
        old = [logprobs(policy, part)[0] for part in cut(rollout, size)]
    for part, logp_old in zip(cut(rollout, size), old, strict=True):
        loss, _, _ = minirl_loss(logprobs(policy, part)[0], logp_old, part, size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.values(), 1.0)
        optimizer.step()


# ---- step 05
def update(policy, optimizer, rollout, size, micro_batch, replay="none"):
    with torch.no_grad():
        old = logprobs(policy, rollout)[0]
    for start in range(0, len(rollout.tokens), size):
        optimizer.zero_grad()
        for first in range(start, start + size, micro_batch):
            part = Rollout(*(x[first : first + micro_batch] for x in rollout))
            loss = minirl_loss(logprobs(policy, part)[0], old[first : first + micro_batch], part, size)[0]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.values(), 1.0)
        optimizer.step()
