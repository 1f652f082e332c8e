"""A plan as text and as a picture."""

from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minirl_edu.plan.memory import PHASES, PLACES
from minirl_edu.plan.planning import Plan, Remedy, fullest
from minirl_edu.plan.sizes import duration_text, size_text
from minirl_edu.plan.time import SAMPLING


def _rows(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(rows)
    width = max([26, *(len(name) for name, _, _ in rows)])
    return [f"  {name:{width}} {value:>9}  {how}".rstrip() for name, value, how in rows]


def table(plan: Plan, suggested: Iterable[Remedy] = ()) -> str:
    """The plan as text; `suggested`: what to change if it does not fit."""
    s, sizes, verdict = plan.setting, plan.sizes, {True: "fits", False: "does not fit"}
    counts = ", ".join(f"{sizes[name] / 1e9:.4g} B {name}" for name in list(sizes)[:4])
    lines = [
        f"{s['model']}: {counts}",
        f"{s['gpus']} × {s['hardware']}, sharding {s['sharding']}, mixed precision {s['mixed_precision']}, rollouts "
        f"{s['placement']}; prompts of {s['prompt_tokens']}, responses of up to {s['max_new_tokens']} tokens "
        f"(mean {s['response_tokens']:g})",
    ]
    for place in PLACES:
        if not plan.phases(place):
            continue
        lines += ["", f"memory of the {place}'s fullest {'process' if s['hardware'] == 'cpu' else 'GPU'}"]
        for phase in PHASES:
            own = [item for item in plan.memory if item.place == place and item.phase == phase]
            lines += [f" {phase}"] * bool(own) + _rows((i.name, size_text(i.bytes), i.how) for i in own)
        peaks = {phase: sum(i.bytes for i in plan.items(phase, place)) for phase in plan.phases(place)}
        shown = ", ".join(f"{phase} {size_text(size)}" for phase, size in peaks.items())
        lines.append(
            f" peak {size_text(plan.peak(place))} of {size_text(s['memory'])}: "
            f"{verdict[plan.peak(place) <= s['memory']]} ({shown})"
        )
    if plan.host:
        lines += ["", "memory of a machine", *_rows((name, size_text(size), "") for name, size in plan.host.items())]
    lines += [
        "",
        "time of a global step and of an evaluation, at least",
        *_rows((n, duration_text(t), "") for n, t in plan.seconds.items()),
        "",
        f"time of a global step, expected: training at {s['mfu']:.1%} of the peak (--mfu), sampling at {SAMPLING:.0%}",
        *_rows((n, duration_text(t), "") for n, t in plan.expected.items() if t),
    ]
    lines += ["", "traffic of a global step, per GPU", *_rows((n, size_text(b), "") for n, b in plan.traffic.items())]
    lines += ["", *_rows((name, f"{size:,.0f}", "") for name, size in list(sizes.items())[4:])]
    lines += [""] * bool(plan.notes) + [f"note: {note}" for note in plan.notes]
    if not plan.fits:
        steps = [(r.change, size_text(r.peak), verdict[r.fits]) for r in suggested]
        lines += ["", "what to change", *(_rows(steps) or ["  nothing that was tried helps"])]
    return "\n".join(lines)


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


def draw_memory(plan: Plan) -> Figure:
    """The memory of the fullest GPU in each phase, stacked, and what there is. Items below 1 % of the peak are drawn as
    one."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    columns = [(phase, place) for place in PLACES for phase in plan.phases(place)]
    parts: dict[str, list[float]] = {}
    for column, (phase, place) in enumerate(columns):
        for item in plan.items(phase, place):
            name = item.name if item.bytes >= 0.01 * fullest(plan) else "the rest"
            parts.setdefault(name, [0.0] * len(columns))[column] += item.bytes / 1e9
    bottom = [0.0] * len(columns)
    for i, name in enumerate(sorted(parts, key="the rest".__eq__)):
        colour, hatch = _COLOURS[i % len(_COLOURS)], _HATCHES[(i + i // len(_COLOURS)) % len(_HATCHES)]
        axes.bar(
            range(len(columns)), parts[name], bottom=bottom, label=name, color=colour, hatch=hatch, edgecolor="white"
        )
        bottom = [low + size for low, size in zip(bottom, parts[name], strict=True)]
    axes.axhline(plan.setting["memory"] / 1e9, color="#222222", linestyle="--", label="memory")
    axes.set_xticks(range(len(columns)), [place if place == "server" else phase for phase, place in columns])
    axes.set_ylabel("GB")
    axes.set_title(f"{plan.setting['model']} on {plan.setting['gpus']} × {plan.setting['hardware']}")
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return drawn
