"""Draw the README's picture from the demo's kept runs: `python lessons/figures/demo_picture.py`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from minirl_edu.cli import DEMO_VARIANTS, demo_folder
from minirl_edu.plots import METHOD_STYLE
from minirl_edu.records import Metrics, read_metrics

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"MiniRL + R3": "with clipping and routing replay", "no replay, no clipping": "without both"}
STYLES = {"MiniRL + R3": METHOD_STYLE["R3"], "no replay, no clipping": METHOD_STYLE["no clipping"]}


def picture(runs: dict[str, Metrics]) -> Figure:
    """The held-out score, and how far the two programs disagree (k3, smoothed over one global step)."""
    figure = Figure(figsize=(9.8, 3.6), layout="constrained")
    score, gap = figure.subplots(1, 2)
    for name, run in runs.items():
        style = {**STYLES[name], "linewidth": 2, "label": LABELS[name]}
        known = np.isfinite(run["score"])
        score.plot(run["grad_step"][known], 100 * run["score"][known], **style)
        updates = np.isfinite(run["k3_rollout_old"])
        per_step = run["k3_rollout_old"][updates].reshape(-1, 8).mean(1)
        gap.plot(run["grad_step"][updates].reshape(-1, 8).mean(1), per_step, markevery=4, **style)
    score.set_title("Right answers to 256 new problems", loc="left")
    score.set_ylabel("percent")
    score.set_ylim(0, 100)
    score.legend(frameon=False, loc="upper left")
    gap.set_title("How far the two programs disagree", loc="left")
    gap.set_ylabel("KL divergence, nats per token")
    for ax in (score, gap):
        ax.set_xlabel("updates of the weights")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
    return figure


if __name__ == "__main__":
    folders = {name: ROOT / "tests" / "data" / "demo" / demo_folder(name) for name in DEMO_VARIANTS}
    runs = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    picture(runs).savefig(Path(__file__).with_suffix(".png"), dpi=160)
