"""One self-contained HTML page on one run or several, told as a story: what happened, what the model says, the four
curves, what moved before and at a fall of the score; everything else is folded away.

Every word and number comes from the runs' files. The page needs no network, no script and no other file, and it is
written for a reader who has not read the paper. Where numbers are summarised, a fall of the score is shown before, at
and after.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minirl_edu import __version__, plots
from minirl_edu.report import texts
from minirl_edu.report.runs import method_name, read_run
from minirl_edu.report.tables import (
    MEASURES,
    STORY,
    environments,
    folded,
    moment_table,
    sample_table,
    settings,
    subscripts,
    summary,
    table,
    warned,
)
from minirl_edu.report.words import remarks, verdict, why

PAPER = "https://arxiv.org/abs/2512.01374"


def _picture(file: Path, alt: str, wide: Figure, narrow: Figure | None = None) -> str:
    """A figure inline, in a second layout for narrow screens where there is one; the first also goes to `file`."""
    png = plots.to_png(wide)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png)
    source = f'<source media="(max-width: 640px)" srcset="{_inline(plots.to_png(narrow))}">' if narrow else ""
    width = round(100 * wide.get_figwidth())
    return f'<picture style="max-width: {width}px">{source}<img src="{_inline(png)}" alt="{escape(alt)}"></picture>'


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_report(
    run_dirs: Mapping[str, Path | Sequence[Path]] | Path,
    out: Path,
    *,
    title: str = "What happened in training",
    about: str = "",
) -> Path:
    """Write one self-contained HTML page to `out` and its figures as PNG to `figures/` beside it; return `out`.

    `run_dirs` is one run's folder, or a label per folder to compare runs, or a label per list of folders: runs of one
    kind with several seeds, shown as mean and range. Runs are compared at equal gradient steps.
    `about` is a paragraph to begin with.
    Raises FileNotFoundError or ValueError with the path where a metrics.jsonl is missing, empty or broken.
    """
    if isinstance(run_dirs, Mapping):
        folders = {label: [given] if isinstance(given, str | Path) else given for label, given in run_dirs.items()}
        runs = {label: [read_run(Path(folder)) for folder in own] for label, own in folders.items()}
    else:
        run = read_run(Path(run_dirs))
        runs = {method_name(run.config, Path(run_dirs).resolve().name): [run]}
    if not all(runs.values()) or not runs:
        raise ValueError("run_dirs is empty: give at least one run's folder")
    out = Path(out)
    data: plots.Runs = {label: [run.metrics for run in own] for label, own in runs.items()}
    events = {label: steps for label, own in runs.items() if (steps := [f.step for run in own if (f := run.fall)])}

    def picture(name: str, alt: str, draw: Any, **narrow: int) -> str:
        wide = draw(data, events=events)
        return _picture(
            out.parent / "figures" / f"{name}.png", alt, wide, draw(data, events=events, **narrow) if narrow else None
        )

    def logged(key: str) -> bool:
        return any(run.at(key) for own in runs.values() for run in own)

    samples, fell = sample_table(runs), texts.MARKED if events else ""
    measures = [key for key in MEASURES if logged(key)]
    story = [key for key in STORY if key in measures]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(about)}</p>" if about else "",
        f"<div class=headline><p class=verdict>{verdict(runs)}</p>"
        + "".join(f"<p class=soft>{remark}</p>\n" for remark in remarks(runs))
        + "</div>",
        *(["<h2>The model speaks</h2>", texts.SAMPLES, samples] if samples else []),
        "<h2>The four curves</h2>",
        picture(
            "four_curves",
            "Held-out score, training reward, entropy and training–inference KL over gradient steps",
            plots.four_curves,
            columns=1,
        ),
        fell,
        folded("How to read these curves", texts.FOUR_CURVES),
        f"<h2>{'Why' if events else 'The two factors'}</h2>",
        subscripts(texts.FACTORS),
        why(runs),
        *(moment_table(runs, label, story) for label in runs),
        texts.MEANS,
        picture(
            "ratio_decomposition",
            "Training–inference discrepancy, policy staleness and first-order gap over gradient steps",
            plots.ratio_decomposition,
            columns=1,
        ),
    ]
    if logged("routing_flip_rate"):
        sections.append(picture("routing_flips", "Routing flips over gradient steps", plots.routing_flips))
    if logged("entropy_drift"):
        alt = "Entropy drift and covariance of length and reward over gradient steps"
        sections.append(picture("drift", alt, plots.drift, columns=1))
    sections += [
        folded("How to read these figures", subscripts(texts.RATIOS)),
        "<h2>Everything else</h2>",
        folded(*warned(runs)),
        folded(
            "All numbers",
            table(["", *runs], summary(runs))
            + texts.BEST
            + "".join(moment_table(runs, label, measures) for label in runs),
        ),
        folded(
            "Clipping",
            picture(
                "clipping",
                "Fraction of clipped tokens over gradient steps, by the sign of the advantage",
                plots.clipping,
                columns=1,
            )
            + subscripts(texts.CLIPPING),
        ),
        folded("Settings", settings(runs)),
        folded("Run it again", environments(runs)),
        f"""<p class=soft>The paper: <a href="{PAPER}">Stabilizing Reinforcement Learning with LLMs: Formulation and
Practices</a>, arXiv 2512.01374. Page written by minirl_edu {__version__}.</p>""",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{texts.STYLE}</style></head><body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
