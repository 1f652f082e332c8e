"""Figures: pure functions from metrics to a matplotlib `Figure`.

No pyplot, hence no global state: safe in threads, in notebooks and in tests. In a notebook a figure shows itself, and

    handle = display(four_curves(runs), display_id=True)     # once
    handle.update(four_curves(runs))                         # whenever new metrics came in

is a live plot. Colours are Okabe and Ito's (safe for colour-blind readers); every method also has its own line and
marker, so that figures read in greyscale.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from PIL import Image

from minirl_edu.diagnostics import mean_interval
from minirl_edu.records import Metrics

Runs = Mapping[str, Metrics | Sequence[Metrics]]
"""A label per method; under it one run, or one run per seed."""
Events = Mapping[str, Sequence[int]]
"""A label per method; under it the gradient steps at which its runs collapsed, which figures mark in every panel."""

METHOD_STYLE: dict[str, dict[str, Any]] = {
    "MiniRL": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "− IS": {"color": "#D55E00", "linestyle": "--", "marker": "X"},
    "+ length norm": {"color": "#E69F00", "linestyle": "-.", "marker": "s"},
    "no clipping": {"color": "#CC79A7", "linestyle": ":", "marker": "v"},
    "R2": {"color": "#56B4E9", "linestyle": (0, (7, 2)), "marker": "^"},
    "R3": {"color": "#009E73", "linestyle": (0, (5, 1, 1, 1)), "marker": "D"},
    "GRPO": {"color": "#000000", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
    "CISPO": {"color": "#777777", "linestyle": (0, (1, 1)), "marker": "*"},
    # Combinations: the line of the one, the marker of the other, a colour of their own.
    "R3 + length norm": {"color": "#44AA99", "linestyle": (0, (5, 1, 1, 1)), "marker": "s"},
    "R3 − IS": {"color": "#882255", "linestyle": (0, (5, 1, 1, 1)), "marker": "X"},
    "R2, no clipping": {"color": "#332288", "linestyle": (0, (7, 2)), "marker": "v"},
    "R3, no clipping": {"color": "#999933", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    "dense": {"color": "#8C564B", "linestyle": "-", "marker": "h"},
    "dense, no clipping": {"color": "#C49C94", "linestyle": ":", "marker": "h"},
}
"""How each method is drawn, everywhere. "MiniRL + R3" and "R3" are the same method."""

_SETTING = re.compile(r"(.+) \((\w+)\)")
_SETTING_LINES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (6, 1, 1, 1)))

_INK, _SOFT = "#222222", "#767676"


# ------------------------------------------------------------------------------------------------------------- data


def _column(run: Metrics, key: str, *, smooth: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the run has a finite value for `key`.

    `smooth`: a running mean over about a thirtieth of the run, in whole global steps, because staleness and what
    follows from it start again at each.
    """
    values = run.get(key, np.full(len(run["grad_step"]), math.nan))
    known = np.isfinite(values)
    steps, values = run["grad_step"][known], values[known]
    if smooth and len(values):
        mini_batches = round(run["grad_step"][-1] / max(1.0, run["global_step"][-1]))
        window = mini_batches * max(1, round(len(values) / 30 / mini_batches))
        window = min(window, len(values))
        start = np.clip(np.arange(len(values)) - window // 2, 0, len(values) - window)
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[start + window] - total[start]) / window
    return steps, values


def _seeds(runs: Metrics | Sequence[Metrics]) -> list[Metrics]:
    return [runs] if isinstance(runs, Mapping) else list(runs)


def _align(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Union of the steps [n], values [seeds, n] with NaN where a seed has none; empty ones left out."""
    columns = [column for column in columns if column[0].size]
    steps = np.unique(np.concatenate([np.empty(0), *(steps for steps, _ in columns)]))
    table = np.full((len(columns), len(steps)), math.nan)
    for row, (own, values) in zip(table, columns, strict=True):
        row[np.searchsorted(steps, own)] = values
    return steps, table


# ------------------------------------------------------------------------------------------------------------ style


def _canonical(label: str) -> str:
    return label.replace("-", "−").removeprefix("MiniRL").strip(" +,") or "MiniRL"


def method_styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker per label: METHOD_STYLE's for a known method, else the unused ones in order.

    Where the labels of known methods name several settings, as "R3 (n2)" and "R3 (n4)" do, the colour and the marker
    are the method's and the line is the setting's.
    """
    known = {_canonical(name): style for name, style in METHOD_STYLE.items()}
    labels = list(labels)
    parts = {label: _SETTING.fullmatch(label) for label in labels}
    settings = list(dict.fromkeys(part[2] for part in parts.values() if part and _canonical(part[1]) in known))
    if len(settings) > 1:
        lines = {name: _SETTING_LINES[i % len(_SETTING_LINES)] for i, name in enumerate(settings)}
        for label, part in parts.items():
            if part and part[2] in lines and (style := known.get(_canonical(part[1]))):
                known[_canonical(label)] = style | {"linestyle": lines[part[2]]}
    taken = [known[_canonical(label)] for label in labels if _canonical(label) in known]
    spare = [style for style in METHOD_STYLE.values() if style not in taken] or list(METHOD_STYLE.values())
    unknown = [label for label in labels if _canonical(label) not in known]
    markers = "hd<>p8H"  # when the spare styles run out they come again, with other markers
    extra = {
        label: spare[i % len(spare)]
        | ({"marker": markers[(i + i // len(spare)) % len(markers)]} if i >= len(spare) else {})
        for i, label in enumerate(unknown)
    }
    return {label: known.get(_canonical(label)) or extra[label] for label in labels}


class _Figure(Figure):
    """A Figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = self.get_size_inches()
        return to_png(self), {"width": round(width * 100), "height": round(height * 100)}


def to_png(figure: Figure, *, scale: float = 2) -> bytes:
    """The figure as PNG, at `scale` × 100 pixels per inch, in 128 colours: a third of the bytes, equal to the eye."""
    dpi, canvas = figure.get_dpi(), FigureCanvasAgg(figure)
    figure.set_dpi(100 * scale)
    canvas.draw()  # once: `savefig` draws twice and compresses what is unpacked here again
    figure.set_dpi(dpi)
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # Not Pillow's default, the median cut: it blends the colour of a thin line into its neighbours'.
    image = image.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _panels(
    count: int, columns: int, *, panel: tuple[float, float] = (4.9, 3.1), **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure = _Figure(figsize=(panel[0] * columns, panel[1] * rows + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_SOFT)
        ax.tick_params(color=_SOFT, labelcolor=_INK, labelsize=10, labelleft=True, labelbottom=True)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _name(ax: Axes, title: str, ylabel: str, xlabel: str = "gradient step", *, note: str = "") -> None:
    ax.set_title(title, loc="left", fontsize=12, color=_INK)
    ax.set_title(note, loc="right", fontsize=9, color=_SOFT)
    ax.set_ylabel(ylabel, fontsize=10.5, color=_INK)
    ax.set_xlabel(xlabel, fontsize=10.5, color=_INK)


def _legend(figure: Figure, styles: Mapping[str, dict[str, Any]]) -> None:
    """One legend above all panels, in as many columns as fit."""
    handles = [Line2D([], [], linewidth=2, markersize=6, **style) for style in styles.values()]
    columns = int(figure.get_figwidth() * 12.5 / (max(map(len, styles)) + 8))
    legend = figure.legend(
        handles, list(styles), loc="outside upper left", ncols=max(1, min(columns, len(styles))),
        frameon=False, fontsize=10.5, handlelength=3.2, labelcolor=_INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label is text: "$5" is no formula


def _mark(axes: Sequence[Axes], events: Events | None, runs: Runs) -> None:
    """A thin line at each event in the colour of its method, with the step beside it where all events have room."""
    styles, everyone = method_styles(runs), sorted(step for steps in (events or {}).values() for step in steps)
    room = max((run["grad_step"][-1] for seeds in runs.values() for run in _seeds(seeds)), default=0.0) / 7
    far = all(after - before >= room for before, after in pairwise(everyone))
    for label, steps in (events or {}).items():
        for ax in (ax for ax in axes if ax.lines):
            color, across = styles[label]["color"], ax.get_xaxis_transform()
            ax.vlines(list(steps), 0, 1, transform=across, color=color, linewidth=0.9, gid=f"event:{label}")
            for step in steps if far else ():
                ax.annotate(
                    f"step {step}", (step, 1), (3, -1), xycoords=across, textcoords="offset points", va="top",
                    fontsize=9, color=color, gid=f"event:{label}",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                )  # fmt: skip


def _fit(*axes: Axes, values: np.ndarray, log: bool = False, bottom: float | None = None) -> None:
    """One scale for these panels and limits that hold all `values`, the scale first: limits depend on it.

    `log`: a log axis where the values span two decades or more; zeros and negative noise get a linear strip below.
    `bottom` is the lower limit of a linear axis.
    """
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    positive = values[values > 1e-5 * high]  # far below everything else is the noise of a zero
    floor = max(float(np.quantile(positive, 0.02)), -low) if high > 0 else math.inf
    for ax in axes:
        if not (log and high > 0 and np.quantile(positive, 0.98) >= 100 * floor):
            room = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
            ax.set_ylim(low - room if bottom is None else min(bottom, low), high + room)
        elif low > 0:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.3, high * 1.3)
        else:
            ax.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(floor)))
            ax.set_ylim(1.3 * low - 0.1 * floor, high * 1.3)


def _draw(ax: Axes, runs: Runs, key: str, *, smooth: bool = False, faint: str = "", markers: int = 8) -> np.ndarray:
    """One metric of every method: mean over seeds and its 95 % interval as far as *all* seeds got, single seeds beyond.

    `smooth` draws a running mean. `faint` names a second metric to draw faintly in the same colour, smoothed alike;
    without one, a smoothed metric's raw values are. Returns, for `_fit`, all values drawn and where most of the seeds
    are.
    """
    drawn = [np.empty(0)]
    styles = method_styles(runs)
    for order, (label, seeds) in enumerate(runs.items()):
        seeds = _seeds(seeds)
        style = styles[label]
        thin: dict[str, Any] = {"color": style["color"], "alpha": 0.3, "linewidth": 0.7}
        steps, table = _align([_column(run, key, smooth=smooth) for run in seeds])
        if not steps.size:
            continue
        shared = np.isfinite(table).all(0)
        mean, half = mean_interval(table[:, shared])
        drawn += [mean, np.quantile(table[np.isfinite(table)], [0.02, 0.98])]  # a spike of one seed is in the mean
        gap = max(1, shared.sum() // markers)
        first = order * gap // len(runs)  # the markers of different methods do not hide each other
        ax.plot(
            steps[shared], mean, linewidth=1.9, markersize=5.5, markevery=slice(first, None, gap), gid=f"{key}:{label}",
            markeredgecolor="white", markeredgewidth=0.5, zorder=3, **style,
        )  # fmt: skip
        if len(table) > 1:
            # The interval of two or three seeds may be many times what they span, so the limits do not hold it.
            ax.fill_between(steps[shared], mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            end = steps[shared].max() if shared.any() else -math.inf
            for own in table:
                alone = (steps >= end) & np.isfinite(own)
                ax.plot(steps[alone], own[alone], gid=f"seed:{key}:{label}", **thin)
                drawn.append(own[alone])
        if faint or smooth:
            steps, table = _align([_column(run, faint or key, smooth=smooth and bool(faint)) for run in seeds])
            shared = np.isfinite(table).all(0)
            if steps.size:
                thin |= {"alpha": 0.5, "linewidth": 1.1} if faint else {}
                drawn.append(table[:, shared].mean(0))
                ax.plot(steps[shared], drawn[-1], gid=f"faint:{faint or key}:{label}", **thin)
    values = np.concatenate(drawn)
    if not values.size:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=_SOFT, fontsize=12)
        ax.set(xticks=[], yticks=[])
    return values


# ---------------------------------------------------------------------------------------------------------- figures


def four_curves(runs: Runs, *, columns: int = 2, events: Events | None = None) -> Figure:
    """The paper's four panels: held-out score, training reward, token entropy, training–inference KL.

    With several seeds per method: mean and 95 % t-interval. The faint score is the rollout engine's. The KL is drawn
    as `k3`, which has less noise, and faintly as `k1`, the paper's. Entropy and KL (nats per token) are on a log axis
    where they span decades. `columns=1` stacks the panels for a narrow page; `events` are marked in each. Source:
    figures 1 to 4 of the paper.
    """
    figure, axes = _panels(4, columns)
    _fit(axes[0], values=_draw(axes[0], runs, "score", faint="score_rollout", markers=12))
    _fit(axes[1], values=_draw(axes[1], runs, "reward", smooth=True))
    _fit(axes[2], values=_draw(axes[2], runs, "entropy"), log=True)
    _fit(axes[3], values=_draw(axes[3], runs, "k3_rollout_old", smooth=True, faint="kl_rollout_old"), log=True)
    two = any(_column(run, "score_rollout")[0].size for seeds in runs.values() for run in _seeds(seeds))
    _name(axes[0], "Held-out score", "score, 0 to 1", note="faint: through the rollout engine" if two else "")
    _name(axes[1], "Training reward", "mean reward", note="faint: each step")
    _name(axes[2], "Token entropy", "nats per token")
    _name(axes[3], "Training–inference KL", "nats per token", note="bold: k3, faint: k1")
    _mark(axes, events, runs)
    _legend(figure, method_styles(runs))
    return figure


def cases(runs: Mapping[str, Runs]) -> Figure:
    """The same methods in several settings, side by side: token entropy above, held-out score below, on one scale each.

    `runs` maps a setting's title to its runs by method.
    """
    figure, axes = _panels(2 * len(runs), len(runs), panel=(4.1, 2.9))
    for row, (key, title, unit) in enumerate(
        [("entropy", "Token entropy", "nats per token"), ("score", "Held-out score", "score, 0 to 1")]
    ):
        panels = axes[row * len(runs) : (row + 1) * len(runs)]
        drawn = [_draw(ax, of, key, smooth=key == "entropy") for ax, of in zip(panels, runs.values(), strict=True)]
        _fit(*panels, values=np.concatenate(drawn), bottom=0.0)
        for ax, name in zip(panels, runs, strict=True):
            _name(ax, name if row == 0 else "", f"{title.lower()}, {unit}" if ax is panels[0] else "")
    _legend(figure, method_styles({label: () for of in runs.values() for label in of}))
    return figure


def prediction(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Predicted against measured change of the entropy where the weight is left out, a dot for each seed."""
    figure, (ax,) = _panels(1, 1, panel=(6.4, 4.4))
    ax.axhline(0, color=_SOFT, linewidth=0.8)
    ax.axvline(0, color=_SOFT, linewidth=0.8)
    for (name, found), style in zip(pairs.items(), METHOD_STYLE.values(), strict=False):
        x, y = np.array(found).T
        mark = {"color": style["color"], "marker": style["marker"]}
        ax.scatter(x, y, s=40, edgecolor="white", linewidth=0.6, label=name, zorder=3, **mark)
    _name(ax, "Entropy without the weight minus with it", "measured, nats per token", "predicted: mean entropy_drift")
    ax.legend(frameon=False, fontsize=10, labelcolor=_INK)
    return figure


def ratio_decomposition(runs: Runs, *, columns: int = 3, events: Events | None = None) -> Figure:
    """The two factors of equation (5) on one scale, and what the first-order approximation drops because of them.

    `log π_θ/μ_old = log π_old/μ_old (training–inference discrepancy) + log π_θ/π_old (policy staleness)`, each drawn as
    its mean absolute value in nats per token; then the mean of `|Π_t r_t − 1 − Σ_t (r_t − 1)|`, `r_t = π_θ/μ_old`.
    """
    figure, axes = _panels(3, columns, panel=(3.6, 3.1))
    factors = ("log_ratio_mismatch", "log_ratio_staleness")
    values = [_draw(ax, runs, key, smooth=True) for ax, key in zip(axes, factors, strict=False)]
    _fit(*axes[:2], values=np.concatenate(values), log=True)
    _fit(axes[2], values=_draw(axes[2], runs, "first_order_gap", smooth=True), log=True)
    _name(axes[0], "Training–inference discrepancy", r"mean $|\log\,\pi_{old}/\mu_{old}|$, nats")
    _name(axes[1], "Policy staleness", r"mean $|\log\,\pi_\theta/\pi_{old}|$, nats")
    _name(axes[2], "First-order gap", r"mean $|\Pi r - 1 - \Sigma(r - 1)|$")
    _mark(axes, events, runs)
    _legend(figure, method_styles(runs))
    return figure


def drift(runs: Runs, *, columns: int = 2, events: Events | None = None) -> Figure:
    """What the gradient would contain if the importance weight were left out: `entropy_drift` and, which has its sign,
    `length_reward_cov`."""
    figure, axes = _panels(2, columns)
    for ax, key in zip(axes, ("entropy_drift", "length_reward_cov"), strict=True):
        values = _draw(ax, runs, key, smooth=True)
        _fit(ax, values=np.append(values, 0.0) if values.size else values)
    _name(axes[0], "Entropy drift", "nats per unit step on the logits")
    _name(axes[1], "Covariance of length and reward", "tokens × reward")
    _mark(axes, events, runs)
    _legend(figure, method_styles(runs))
    return figure


def routing_flips(runs: Runs, *, events: Events | None = None) -> Figure:
    """Fraction of tokens whose set of experts differs between the two engines, per MoE layer."""
    figure, (ax,) = _panels(1, 1)
    _fit(ax, values=_draw(ax, runs, "routing_flip_rate", smooth=True), bottom=0)
    _name(ax, "Routing flips", "fraction of tokens, per layer")
    _mark([ax], events, runs)
    _legend(figure, method_styles(runs))
    return figure


def clipping(runs: Runs, *, columns: int = 2, events: Events | None = None) -> Figure:
    """Fraction of tokens that the clip mask `M_t` of equation (7) drops, by the sign of the advantage.

    Of a run without clipping: the fraction that it would drop.
    """
    figure, axes = _panels(2, columns)
    values = [_draw(ax, runs, f"clip_frac_{sign}", smooth=True) for ax, sign in zip(axes, ("pos", "neg"), strict=True)]
    _fit(*axes, values=np.concatenate(values), bottom=0)
    _name(axes[0], "Clipped, advantage above 0", "fraction of tokens")
    _name(axes[1], "Clipped, advantage below 0", "fraction of tokens")
    _mark(axes, events, runs)
    _legend(figure, method_styles(runs))
    return figure


def _numbers(values: Any) -> np.ndarray:
    """A list, array or tensor (with gradient or without) as a float64 array."""
    return np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values, dtype=np.float64)


def rollout_tokens(tokens: Sequence[str], logp_rollout: Any, logp_old: Any, logp: Any) -> Figure:
    """One response, token by token, under the three policies.

    Above, the log-probability (nats) of each sampled token under μ_old, π_old and π_θ; below, the two factors of
    equation (5): `log π_old − log μ_old` (discrepancy) and `log π_θ − log π_old` (staleness). All arguments have one
    entry per response token; raises ValueError where they have not.
    """
    series = {"logp_rollout": _numbers(logp_rollout), "logp_old": _numbers(logp_old), "logp": _numbers(logp)}
    for name, values in series.items():
        if values.shape != (len(tokens),):
            raise ValueError(f"{name} has shape {values.shape} for {len(tokens)} tokens: pass one response, unpadded")
    rollout, old, new = series.values()
    figure, (top, bottom) = _panels(2, 1, panel=(min(14.0, max(8.0, 0.3 * len(tokens) + 3)), 2.5), sharex=True)
    at = np.arange(len(tokens))
    for shift, values, name, color, marker in (
        (-0.2, rollout, r"$\mu_{old}$ rollout engine", "#D55E00", "o"),
        (0.0, old, r"$\pi_{old}$ training engine", "#0072B2", "s"),
        (0.2, new, r"$\pi_\theta$ after updates", "#009E73", "D"),
    ):
        top.plot(at + shift, values, linestyle="none", marker=marker, markersize=6, color=color, label=name)
    bars: dict[str, Any] = {"width": 0.38, "edgecolor": "white", "linewidth": 0.5}
    bottom.bar(at - 0.2, old - rollout, color="#D55E00", label=r"discrepancy $\log\,\pi_{old}/\mu_{old}$", **bars)
    bottom.bar(
        at + 0.2, new - old, color="#009E73", hatch="///", label=r"staleness $\log\,\pi_\theta/\pi_{old}$", **bars
    )
    bottom.axhline(0, color=_SOFT, linewidth=0.8)
    every = -(-len(tokens) // 60)  # more labels than that do not fit
    visible = [token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") for token in tokens]
    for ax in (top, bottom):
        ax.set_xticks(at[::every], visible[::every])
        ax.margins(x=0.02)
        for text in ax.get_xticklabels():
            text.set(parse_math=False, rotation=90 if len(text.get_text()) > 2 else 0)
    _name(top, "Log-probability of each sampled token", "nats", "")
    _name(bottom, "What separates the policies", "nats", "sampled token")
    top.tick_params(labelbottom=False)
    for ax in (top, bottom):
        ax.legend(frameon=False, fontsize=9.5, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def precision_dial(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How far each low-precision rollout engine is from the training engine: KL and routing flips.

    Each row: `precision` (its name), `kl` (nats per token, at least 0: the k3 estimate), `flip_rate` (fraction of
    tokens with another expert set; None for a dense model) and, optionally, `kl_r3` (the KL with rollout routing
    replay). The KL axis is logarithmic with a place of its own for exact zeros. Raises ValueError for a negative KL.
    """
    for row in rows:
        for key in ("kl", "kl_r3"):
            if (row.get(key) or 0.0) < 0:
                raise ValueError(f"{key} of {row['precision']} is {row[key]}: give an estimate ≥ 0, such as k3")
    figure, (left, right) = _panels(2, 2, panel=(4.9, 0.36 * len(rows) + 1.2), sharey=True)
    at = np.arange(len(rows))
    series = {
        "kl": ("no replay", METHOD_STYLE["MiniRL"], 10, "none"),
        "kl_r3": ("with R3", METHOD_STYLE["R3"], 6, None),
    }
    columns = {key: _numbers([math.nan if row.get(key) is None else row[key] for row in rows]) for key in series}
    positive = np.concatenate([values[values > 0] for values in columns.values()])
    bounds = np.log10([positive.min(), positive.max()]) if positive.size else np.array([-6.0, 0.0])
    zero = 10.0 ** (math.floor(bounds[0]) - 1)
    left.set_xscale("log")
    left.set_xlim(zero / 2, 10.0 ** (bounds[1] + 0.3))
    for key, (name, style, size, fill) in series.items():
        values = columns[key]
        known = np.isfinite(values)
        if known.any():
            left.plot(
                np.where(values > 0, values, zero)[known], at[known], linestyle="none", markersize=size,
                color=style["color"], marker=style["marker"], markerfacecolor=fill, label=name, gid=key,
            )  # fmt: skip
    left.axvline(zero * 3, color=_SOFT, linewidth=0.8, linestyle=":")
    decades = range(math.floor(bounds[0]), math.floor(bounds[1]) + 1)
    left.set_xticks([zero, *(10.0**n for n in decades)], ["0", *(f"$10^{{{n}}}$" for n in decades)])
    left.xaxis.minorticks_off()
    if np.isfinite(columns["kl_r3"]).any():
        left.legend(frameon=False, fontsize=10, labelcolor=_INK)
    flips = _numbers([math.nan if row.get("flip_rate") is None else row["flip_rate"] for row in rows])
    right.barh(at, np.nan_to_num(flips), height=0.55, color=METHOD_STYLE["MiniRL"]["color"])
    for y, flip in zip(at, flips, strict=True):
        text = "dense" if math.isnan(flip) else f"{100 * flip:.3g} %"
        right.annotate(
            text, (np.nan_to_num(flip), y), (4, 0), textcoords="offset points", va="center", fontsize=10, color=_INK
        )
    right.margins(x=0.15)
    right.set_xlim(left=0)
    for ax in (left, right):
        ax.set_yticks(at, [str(row["precision"]) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
    _name(left, "Training–inference KL", "", "nats per token")
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _name(right, "Tokens with another expert set", "", "of the tokens")
    return figure


_REPLAY = {"plain": ("no replay", METHOD_STYLE["MiniRL"]), "r3": ("with R3", METHOD_STYLE["R3"])}


def engine_gap(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How far rollout engines are from the training engine: KL without and with R3, and routing flips.

    Each row: `label`, `trainer_dtype`, optionally `model` (its name stands above its rows), `skipped` (None, or why it
    was not measured: such rows are left out) and `seeds`, a list of measurements that hold `plain` and `r3` with a `k3`
    (nats per token; r3 None without replay) and `flip_rate` (None for dense models). Every seed is a faint dot; the
    mark is the geometric mean and the bar its 95 % t-interval, on a log axis, where a KL of 0 stands at 1e-15. Raises
    ValueError without a measured row.
    """
    rows = [row for row in rows if not row["skipped"]]
    if not rows:
        raise ValueError("rows: none was measured, so there is nothing to draw; see why they were skipped")
    labels: list[str] = []
    at: list[float] = []
    last = None
    y = -1.0
    for row in rows:
        y += 1.0 + (0.8 if row.get("model") != last else 0.0)
        last = row.get("model")
        at.append(y)
        same = {"float32": "fp32", "bfloat16": "bf16"}[row["trainer_dtype"]]
        labels.append(row["label"] if f" {same}" in row["label"] else f"{row['label']} ({same} trainer)")
    wide = any(seed["flip_rate"] is not None for row in rows for seed in row["seeds"])
    figure, axes = _panels(1 + wide, 1 + wide, panel=(4.9 + 1.2 * (not wide), 0.3 * y + 1.3))
    left, right = axes[0], axes[-1]
    left.set_xscale("log")
    offset = {"plain": -0.13 * wide, "r3": 0.13}
    for side, (name, style) in _REPLAY.items():
        shown = [(y, row) for y, row in zip(at, rows, strict=True) if row["seeds"][0][side] is not None]
        for y, row in shown:
            values = np.array([max(seed[side]["k3"], 1e-15) for seed in row["seeds"]])
            mean, half = (np.exp(x) for x in mean_interval(np.log(values)[:, None]))
            height = y + offset[side]
            left.plot(values, np.full(len(values), height), ".", color=style["color"], alpha=0.3, gid=f"seeds:{side}")
            if math.isfinite(half[0]):
                left.plot(
                    [mean[0] / half[0], mean[0] * half[0]], [height] * 2, color=style["color"], linewidth=2, alpha=0.8
                )
            left.plot(
                mean, [height], linestyle="none", marker=style["marker"], color=style["color"], markersize=7,
                markeredgecolor="white", label=name if y == shown[0][0] else None, gid=f"{side}:{row['label']}",
            )  # fmt: skip
    if len(left.get_legend_handles_labels()[1]) > 1:
        handles = {name: {**style, "linestyle": "none"} for name, style in _REPLAY.values()}
        _legend(figure, handles)
    if wide:
        for y, row in zip(at, rows, strict=True):
            flips = [seed["flip_rate"] for seed in row["seeds"]]
            dense = flips[0] is None
            mean, half = mean_interval(np.array([[0.0 if f is None else f] for f in flips]))
            right.barh(y, mean, height=0.55, color=METHOD_STYLE["MiniRL"]["color"], gid=f"flips:{row['label']}")
            if math.isfinite(half[0]) and not dense:
                right.plot([max(0.0, mean[0] - half[0]), mean[0] + half[0]], [y] * 2, color=_INK, linewidth=1.2)
            text = "dense" if dense else f"{100 * mean[0]:.2g} %"
            edge = mean[0] + (half[0] if math.isfinite(half[0]) else 0.0)
            right.annotate(text, (edge, y), (4, 0), textcoords="offset points", va="center", fontsize=9, color=_INK)
        right.margins(x=0.18)
        right.set_xlim(left=0)
        right.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        right.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        _name(right, "Tokens with another expert set", "", "of the tokens, mean over layers")
    for ax in axes:
        ax.set_yticks(at, labels if ax is left else [])
        ax.set_ylim(at[-1] + 0.6, at[0] - (1.3 if rows[0].get("model") else 0.6))
        ax.grid(axis="y", visible=False)
    left.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    for y, row, before in zip(at, rows, [None, *rows], strict=False):
        if row.get("model") and (before is None or before["model"] != row["model"]):
            left.annotate(
                row["model"], (0, y - 0.75), xycoords=("axes fraction", "data"), va="center", fontsize=10, color=_SOFT
            )
    seeds = sorted({len(row["seeds"]) for row in rows})
    over = f", 95 % over {' or '.join(map(str, seeds))} seeds" if seeds[0] > 1 else ""
    _name(left, "Training–inference KL", "", f"nats per token (k3){over}")
    return figure


def gap_profile(row: Mapping[str, Any]) -> Figure:
    """One engine's gap in detail: quantiles of the log-ratio, KL by token position, routing flips by layer.

    `row["seeds"]` holds what `minirl_edu.gap.measure` returns. Lines are means over seeds with their 95 % t-interval;
    of the KL on a log scale, where 0 stands at 1e-15. Positions are those of the first seed, up to the shortest
    seed's. Without routes the third panel is left out.
    """
    seeds = row["seeds"]
    layers = [layer["layer"] for layer in seeds[0]["layers"]]
    count = 3 if layers else 2
    figure, axes = _panels(count, count, panel=(4.1, 3.1))
    sides = {side: drawn for side, drawn in _REPLAY.items() if seeds[0][side] is not None}
    places = min(len(seed["positions"]) for seed in seeds)
    centres = np.array([(at["from"] + at["to"]) / 2 + 1 for at in seeds[0]["positions"][:places]])
    for side, (_, style) in sides.items():
        levels = [float(q) for q in seeds[0][side]["quantiles"]]
        mean, half = mean_interval(np.array([list(seed[side]["quantiles"].values()) for seed in seeds]))
        axes[0].plot(mean, levels, linewidth=1.9, markersize=5.5, gid=f"quantiles:{side}", **style)
        axes[0].fill_betweenx(levels, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
        values = np.array([[max(at[side]["k3"], 1e-15) for at in seed["positions"][:places]] for seed in seeds])
        mean, half = (np.exp(x) for x in mean_interval(np.log(values)))
        axes[1].plot(centres, mean, linewidth=1.9, markersize=5.5, gid=f"positions:{side}", **style)
        axes[1].fill_between(centres, mean / half, mean * half, color=style["color"], alpha=0.15, linewidth=0)
    axes[1].set_yscale("log")
    axes[0].axvline(0, color=_SOFT, linewidth=0.8)
    _name(axes[0], "Log-ratio", "quantile", r"$\log\,\pi/\mu$, nats")
    _name(axes[1], "KL by position", "nats per token (k3)", "token of the response")
    if layers:
        mean, half = mean_interval(np.array([[layer["flip_rate"] for layer in seed["layers"]] for seed in seeds]))
        axes[2].bar(
            range(len(layers)), mean, yerr=(np.minimum(half, mean), half) if len(seeds) > 1 else None,
            width=0.6, ecolor=_INK, color=METHOD_STYLE["MiniRL"]["color"],
        )  # fmt: skip
        axes[2].set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes[2].set_ylim(bottom=0)
        _name(axes[2], "Tokens with another expert set", "fraction of tokens", "layer")
    if len(sides) > 1:
        _legend(figure, dict(sides.values()))
    return figure


def gap_accidents(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Common mistakes beside healthy runs: the KL as measured, and under the hypothesis that explains it.

    Each row: `text` (what is wrong), `metrics` with `k3`, `k3_explained` (nats per token) and `found` (names, written
    at the right). A KL of 0 stands at 1e-15 on the log axis.
    """
    figure, (ax,) = _panels(1, 1, panel=(10.0, 0.32 * len(rows) + 0.9))
    ax.set_xscale("log")
    for y, row in enumerate(rows):
        before, after = (max(k3, 1e-15) for k3 in (row["metrics"]["k3"], row["k3_explained"]))
        if after < before / 2:
            ax.annotate("", (after * 1.6, y), (before / 1.6, y), arrowprops={"arrowstyle": "->", "color": _SOFT})
            ax.plot(
                after, y, linestyle="none", marker="D", color=METHOD_STYLE["R3"]["color"], markersize=6, gid="after"
            )
        ax.plot(
            before, y, linestyle="none", marker="o", color=METHOD_STYLE["MiniRL"]["color"], markersize=7, gid="before"
        )
        ax.annotate(
            ", ".join(row["found"]), (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=10,
            color=_INK, annotation_clip=False,
        )  # fmt: skip
    ax.annotate(
        "recognised as", (1.01, -0.9), xycoords=("axes fraction", "data"), fontsize=10, color=_SOFT, va="center",
        annotation_clip=False,
    )  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["text"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    _name(ax, "", "", "KL (k3) between engine and trainer, nats per token")
    _legend(
        figure,
        {
            "as it is": {"color": METHOD_STYLE["MiniRL"]["color"], "marker": "o", "linestyle": "none"},
            "under what the tool recognised": {
                "color": METHOD_STYLE["R3"]["color"],
                "marker": "D",
                "linestyle": "none",
            },
        },
    )
    return figure


def phase_diagrams(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    across: tuple[str, Sequence[Any]],
    up: tuple[str, Sequence[Any]],
    *,
    columns: int = 3,
) -> Figure:
    """Where each method stays stable: one panel a method, one cell a setting, for example learning rate × precision.

    `panels[label]` is the final scores, the shares of runs that collapsed and the shares in which the collapse detector
    raised an alarm, each [len(up), len(across)], NaN where nothing was run; `across` and `up` are the axes' names and
    values. Colour and upper number: mean final score, from 0 to 1; below it the two shares, where they are above 0.
    Raises ValueError for tables of another shape.
    """
    shape = (len(up[1]), len(across[1]))
    for label, tables in panels.items():
        for table in tables:
            if table.shape != shape:
                raise ValueError(f"{label}: table of shape {table.shape}, expected {shape}: {up[0]} by {across[0]}")
    columns = min(columns, len(panels))
    names = max(len(str(value)) for value in up[1])
    panel = (0.85 * shape[1] + 0.09 * names + 0.8, 0.66 * shape[0] + 1.1)
    figure, axes = _panels(len(panels), columns, panel=panel)
    image = None
    for ax, (label, (scores, collapsed, alarmed)) in zip(axes, panels.items(), strict=False):
        # Light is good: with the numbers in it, the map reads in greyscale.
        image = ax.imshow(scores, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
        for (y, x), score in np.ndenumerate(scores):
            if math.isfinite(score):
                lines = [f"{score:.2f}"]
                lines += [
                    f"{sign} {100 * s[y, x]:.0f} %" for sign, s in (("✕", collapsed), ("▲", alarmed)) if s[y, x] > 0
                ]
                ink = "white" if score < 0.5 else _INK
                text = "\n".join(lines)
                ax.text(x, y, text, ha="center", va="center", fontsize=8, color=ink, linespacing=1.3)
        ax.set_xticks(range(shape[1]), [str(value) for value in across[1]])
        ax.set_yticks(range(shape[0]), [str(value) for value in up[1]])
        ax.grid(visible=False)
        ax.set_facecolor("#eeeeee")
        _name(ax, label, up[0], across[0])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
        bar.set_label("final score    ✕ collapsed    ▲ detector's alarm", fontsize=10, color=_INK)
    return figure


def early_warning(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], verdicts: Sequence[Any]) -> Figure:
    """How well metrics warn before the score falls: ROC curves, and how early each predictor's alarms came.

    `curves[name]` is false-alarm rates and shares of falls warned of over all thresholds; each of `verdicts` has a
    `predictor`, `foretold`, `falls`, `false_alarms`, `healthy` and `leads`, the gradient steps from alarm to fall (see
    `minirl_edu.experiments.early_warning`). A large mark on a curve is its predictor at its own threshold.
    """
    figure, (left, right) = _panels(2, 2, panel=(5.2, 3.8))
    names = [verdict.predictor for verdict in verdicts]
    styles = dict(zip(names, METHOD_STYLE.values(), strict=False))
    left.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8, linestyle=":")
    for verdict in verdicts:
        style = styles[verdict.predictor]
        if verdict.predictor in curves:
            left.plot(*curves[verdict.predictor], linewidth=1.9, color=style["color"], linestyle=style["linestyle"])
        rate = verdict.false_alarms / verdict.healthy, verdict.foretold / verdict.falls
        left.plot(*rate, linestyle="none", marker=style["marker"], color=style["color"], markersize=9, gid="chosen")
    drawn = [(i, verdict) for i, verdict in enumerate(verdicts) if verdict.leads]
    for i, verdict in drawn:
        style = styles[verdict.predictor]
        spread = np.linspace(-0.16, 0.16, len(verdict.leads))
        right.plot(verdict.leads, i + spread, ".", color=style["color"], alpha=0.45, markersize=5)
        right.plot(
            np.median(verdict.leads), i, marker=style["marker"], color=style["color"], markersize=9, linestyle="none",
            markeredgecolor="white", gid=f"median:{verdict.predictor}",
        )  # fmt: skip
    right.set_yticks(range(len(names)), [f"{v.predictor}\n{v.foretold} of {v.falls} falls" for v in verdicts])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_xscale("log")
    right.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    _name(left, "Falls of the score warned of", "share of the falls", "false alarms: share of the healthy runs")
    _name(right, "How early", "", "gradient steps from the alarm to the fall (large: median)")
    _legend(figure, styles)
    return figure
