"""The metrics of log-probabilities that another program logged: `python logged_metrics.py [FILE.jsonl]`.

One line of the file is one response: its step, and of each of its tokens log μ_old (`logp_rollout`, the engine that
sampled), log π_old (`logp_old`, the trainer with the same weights) and log π_θ (`logp`, the trainer at the update).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from minirl_edu import policy_metrics

NAMES = ("logp", "logp_old", "logp_rollout")
SHOWN = ("kl_rollout_old", "k3_rollout_old", "ess", "log_ratio_mismatch", "log_ratio_staleness", "first_order_gap")

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("logged.jsonl")
steps: dict[int, list[dict[str, list[float]]]] = defaultdict(list)
for line in path.read_text(encoding="utf-8").splitlines():
    response = json.loads(line)
    steps[response["step"]].append(response)

print("step", *SHOWN)
for step, responses in steps.items():
    padded = {name: pad_sequence([torch.tensor(r[name]) for r in responses], batch_first=True) for name in NAMES}
    lengths = torch.tensor([len(r["logp"]) for r in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, T], true on tokens and false on padding
    metrics = policy_metrics(padded["logp"], padded["logp_old"], padded["logp_rollout"], mask)
    print(step, *(f"{metrics[name].item():.2g}" for name in SHOWN))
