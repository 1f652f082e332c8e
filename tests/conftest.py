"""Shared test settings: no network, one thread per worker, quiet libraries."""

import os

# Before torch is imported: two test workers on two cores must not oversubscribe, and nothing may ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
