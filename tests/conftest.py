"""Shared test settings (no network, one thread per worker, quiet libraries) and small models that many tests use."""

import os

# Before torch is imported: two test workers on two cores must not oversubscribe, and nothing may ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from minirl_edu.models import tiny_dense, tiny_moe

logging.disable_progress_bar()
torch.set_num_threads(1)

EOS, PAD = 17, 16


def build(architecture: str, *, seed: int = 0, spread: float = 8.0) -> PreTrainedModel:
    """A tiny untrained model whose distributions are not flat: `spread` scales the router and embedding weights."""
    model = {"moe": tiny_moe, "dense": tiny_dense}[architecture](18, seed=seed, eos_token_id=EOS, pad_token_id=PAD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "embed_tokens.weight")):
                parameter.mul_(spread)
    return model.eval()


@pytest.fixture
def moe() -> PreTrainedModel:
    return build("moe")


@pytest.fixture
def dense() -> PreTrainedModel:
    return build("dense")


def prompts(count: int, *, lengths: tuple[int, int] = (8, 8), seed: int = 0) -> list[list[int]]:
    """Random prompts of digits, of lengths drawn from the closed range `lengths`."""
    rng = random.Random(seed)
    return [[rng.randrange(10) for _ in range(rng.randint(*lengths))] for _ in range(count)]
