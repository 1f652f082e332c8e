"""How the metrics of the stored runs lie: `python lessons/site/ranges.py` prints the table of metrics.md.

Of each metric the median over all updates of all seeds, and in brackets where the middle 90 % of them lie.
"""

import sys
from pathlib import Path

import numpy as np

from minirl_edu.experiments.spec import COLUMNS, read_runs

RUNS = Path(__file__).resolve().parents[1] / "results" / "runs" / "full"
GROUPS = {
    "on-policy (N = 1), MiniRL": ("on_policy", "minirl"),
    "N = 8, MiniRL": ("n8", "minirl"),
    "N = 8, R3": ("n8", "r3"),
    "N = 4, R3, no clipping": ("n4", "r3_no_clip"),
}
LEFT_OUT = ("global_step", "grad_step", "lr", "length_reward_cov", "entropy_drift")  # these runs lack the last two


def cell(values: np.ndarray) -> str:
    """Median and middle 90 % of a metric, or a dash where there is none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "–"
    low, middle, high = (f"{value:.2g}" for value in np.quantile(values, (0.05, 0.5, 0.95)))
    return f"{middle} ({low}\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}{high})"


def table() -> str:
    """The table, in Markdown: a row for each metric, a column for each group of runs."""
    runs = {name: list(read_runs(RUNS / setting)[variant].values()) for name, (setting, variant) in GROUPS.items()}
    heads = [f"{name} ({len(group)} seeds)" for name, group in runs.items()]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for column in COLUMNS:
        if column not in LEFT_OUT:
            cells = [cell(np.concatenate([run.metrics[column] for run in group])) for group in runs.values()]
            lines.append(f"| [`{column}`](#{column}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
