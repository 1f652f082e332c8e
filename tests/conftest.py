"""Shared test settings: no network, one thread per worker, quiet libraries; and what many tests use."""

import os

# Before torch is imported: two test workers on two cores must not oversubscribe, and nothing may ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from pathlib import Path

import numpy as np
import torch
from jaxtyping import install_import_hook
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)

# Modules that say the shapes of their tensors get them checked. The others do not: the checker costs 20 ms for each
# dataclass that is made, and reading the stored runs makes ten thousand.
ROOT = Path(__file__).resolve().parents[1]
SHAPED = [path for path in (ROOT / "minirl_edu").rglob("*.py") if "from jaxtyping" in path.read_text(encoding="utf-8")]
install_import_hook([".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED], "beartype.beartype")

EOS, PAD = 17, 16


def prompts(count: int, *, lengths: tuple[int, int] = (8, 8), seed: int = 0) -> list[list[int]]:
    """Random prompts of digits, of lengths drawn from the closed range `lengths`."""
    rng = random.Random(seed)
    return [[rng.randrange(10) for _ in range(rng.randint(*lengths))] for _ in range(count)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def outside(figure: Figure) -> list[str]:
    """The drawn lines that have a point that isn't finite or lies outside of their axes."""
    found = []
    for ax in figure.axes:
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        for drawn in ax.lines:
            x, y = np.asarray(drawn.get_xdata(), dtype=float), np.asarray(drawn.get_ydata(), dtype=float)
            if not ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).all():
                found.append(f"{ax.get_title(loc='left')}: {drawn.get_gid()}")
    return found
