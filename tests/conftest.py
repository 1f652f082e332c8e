"""Shared test settings: no network, one thread per worker, quiet libraries; and prompts that many tests use."""

import os

# Before torch is imported: two test workers on two cores must not oversubscribe, and nothing may ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import torch
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)

EOS, PAD = 17, 16


def prompts(count: int, *, lengths: tuple[int, int] = (8, 8), seed: int = 0) -> list[list[int]]:
    """Random prompts of digits, of lengths drawn from the closed range `lengths`."""
    rng = random.Random(seed)
    return [[rng.randrange(10) for _ in range(rng.randint(*lengths))] for _ in range(count)]
