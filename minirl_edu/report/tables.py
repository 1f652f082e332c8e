"""The tables of a report, as HTML: what the model says, numbers by moment, settings, environments."""

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

from minirl_edu.config import Config
from minirl_edu.report.runs import Labelled, Run, during, each, flatten, moments, most_fallen
from minirl_edu.report.texts import WARNINGS
from minirl_edu.report.words import number, shared_step, span


def _shortened(text: str, room: int = 400) -> str:
    """The text as HTML, without its middle where it is long."""
    if len(text) > room:
        cut = len(text) - room
        text = f"{text[: room // 2]} … [{cut:,} characters left out] … {text[-room // 2 :]}"
    return escape(text) or "<span class=soft>(nothing)</span>"


def _mark(reward: float) -> str:
    kind, sign = {1.0: ("good", "✓"), 0.0: ("bad", "✗")}.get(reward, ("", f"{reward:.3g}"))
    return f"<span class='mark {kind}'>{sign}</span>"


def sample_table(runs: Labelled) -> str:
    """The first held-out problems with the answers before training and after it, of each label's first run, as HTML."""
    spoken = {label: own[0] for label, own in runs.items() if own[0].samples}
    answers: dict[str, dict[tuple[Any, ...], list[str]]] = {}  # problem -> step, response, reward -> whose they are
    for lines in ([run.samples[:1] for run in spoken.values()], [run.samples[1:][-1:] for run in spoken.values()]):
        for label, line in ((label, line) for label, own in zip(spoken, lines, strict=True) for line in own):
            for said in line["samples"]:
                problem = re.sub(" {2,}", " ", _shortened(said["prompt"]))
                problem += f" <span class=soft>right: {_shortened(said['answer'])}</span>" if said["answer"] else ""
                step = line["grad_step"]
                key = (step, said["response"], said["reward"], label if step else "")  # all start from one model
                answers.setdefault(problem, {}).setdefault(key, []).append(label)
    body = ""
    for problem, given in answers.items():
        body += f"<tbody><tr><th scope=rowgroup colspan=2>{problem}</th></tr>\n"
        for (step, response, reward, label), labels in given.items():
            start = "before" if len(labels) == len(spoken) else f"before: {', '.join(labels)}"
            who = escape(
                (f"after {step} steps: {label}" if len(spoken) > 1 else f"after {step} steps") if step else start
            )
            body += f"<tr><td>{who}</td><td>{_mark(reward)} {_shortened(response)}</td></tr>\n"
        body += "</tbody>"
    return f"<table class=samples>{body}</table>" if body else ""


MEASURES = {
    "score": "Held-out score",
    "reward": "Training reward",
    "entropy": "Token entropy (nats)",
    "log_ratio_mismatch": "Discrepancy, mean |log π_old/μ_old| (nats)",
    "log_ratio_staleness": "Staleness, mean |log π_θ/π_old| (nats)",
    "routing_flip_rate": "Routing flips (share of tokens, per layer)",
    "entropy_drift": "Entropy drift (nats per unit step)",
    "length_reward_cov": "Covariance of length and reward",
    "first_order_gap": "First-order gap",
    "k3_rollout_old": "Training–inference KL (nats per token)",
    "clip_frac_pos": "Clipped, advantage above 0 (share of tokens)",
    "clip_frac_neg": "Clipped, advantage below 0 (share of tokens)",
    "response_length": "Response length (tokens)",
    "grad_norm": "Gradient norm",
}
"""What the tables of moments show, where it was logged."""
STORY = tuple(MEASURES)[:8]
"""Those beside the story; the others are folded away."""


def moment_table(runs: Labelled, label: str, measures: Sequence[str]) -> str:
    """One label's numbers before, at and after its falls; of a healthy run, in the steps of another's fall."""
    own, fallen = runs[label], most_fallen(runs)
    windows = [moments(run, run if run.fall or fallen is None else fallen[1]) for run in own]
    names = max(map(list, windows), key=len)

    def cells(value: Callable[[Run, range], float], form: str) -> list[str]:
        pairs = list(zip(own, windows, strict=True))
        values = ([value(run, moment[name]) for run, moment in pairs if name in moment] for name in names)
        return [span(own, form, to="…") for own in values]

    rows = [("Up to gradient step", cells(lambda run, window: window.stop - 1.0, ".0f"))]
    rows += [
        (MEASURES[key], cells(partial(_measured, key), ".2f" if key in ("score", "reward") else "")) for key in measures
    ]
    return table([label, *names], [(name, row) for name, row in rows if set(row) != {"–"}], across=5)


def _measured(key: str, run: Run, window: range) -> float:
    return during(run, key, window)


def summary(runs: Labelled) -> list[tuple[str, list[str]]]:
    """Rows of the summary: what, and a cell per label."""
    shared = shared_step(runs)

    def scores(own: Sequence[Run], key: str) -> list[str]:
        found = [score for run in own if (score := run.at(key))]
        if not found:
            return ["–"] * 3
        best = [max(score, key=lambda step: (score[step], -step)) for score in found]
        where = f" (step {best[0]})" if len(best) == 1 else ""
        steps = [[min(score) for score in found], best, [max(score) for score in found]]
        means = [span([score[at] for score, at in zip(found, when, strict=True)], ".3f") for when in steps]
        if len(own) == 1:
            errors = own[0].at(f"{key}_se")
            means = [
                f"{mean} ± {number(errors[at], '.3f')}" if at in errors else mean
                for mean, (at,) in zip(means, steps, strict=True)
            ]
        return [means[0], means[1] + where, means[2]]

    def seconds(run: Run) -> float:
        return sum(run.at("seconds").values())

    everyone, rows = list(runs.values()), []
    for key, engine in (("score", "full precision"), ("score_rollout", "rollout engine")):
        cells = [scores(own, key) for own in everyone]
        for i, moment in enumerate(("start", "best", "final")):
            rows.append((f"Score, {engine}: {moment}", [cell[i] for cell in cells]))
    if shared is not None and len({max(run.at("score")) for own in everyone for run in own}) > 1:
        cells = [span([run.at("score")[shared] for run in own], ".3f") for own in everyone]
        rows.append((f"Score, full precision: at shared step {shared}", cells))
    for name, value in (
        ("Collapse warnings", lambda run: sum(map(len, run.warnings.values()))),
        ("Gradient steps", lambda run: run.last),
        ("Minutes, evaluations excluded", lambda run: round(seconds(run) / 60, 1)),
        (
            "Tokens per second",
            lambda run: round(sum(run.at("tokens").values()) / seconds(run)) if seconds(run) else math.nan,
        ),
    ):
        rows.append((name, [span([float(value(run)) for run in own], "g") for own in everyone]))
    for part in dict.fromkeys(part for own in everyone for run in own for part in run.memory):
        cells = [span([run.memory.get(part, math.nan) for run in own], ".1f") for own in everyone]
        rows.append((f"Rollout in memory, {part} (bytes per token)", cells))
    return rows


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, across: int = 2) -> str:
    """An HTML table. On a narrow screen each row is a name above its cells, with up to `across` beside each other."""
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{subscripts(escape(name))}</th>"
        + "".join(f'<td data-of="{escape(of)}">{_cell(cell)}</td>' for of, cell in zip(head[1:], cells, strict=True))
        + "</tr>\n"
        for name, cells in rows
    )
    columns = len(head) - 1
    wrapped = "" if columns <= across else " wrapped"  # then every cell says which column it is of
    return (
        f'<table class="numbers{wrapped}" style="--across: {min(across, columns)}"><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table>"
    )


def _cell(text: str) -> str:
    """As HTML, with what is in parentheses at the end in small type."""
    return re.sub(r" (\([^()]*\))$", r" <small>\1</small>", escape(text))


def _setting(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False, default=str).strip('"')


def settings(runs: Labelled) -> str:
    """What differs between the labels (one run: from the defaults), then every config in full."""
    configs = {
        label: own[0].config | ({"seed": ", ".join(str(run.config.get("seed")) for run in own)} if own[1:] else {})
        for label, own in runs.items()
        if own[0].config
    }
    if not configs:
        return "<p>No config.yaml was found.</p>"
    columns = configs if len(runs) > 1 else {"default": flatten(Config().to_dict())} | configs
    names = dict.fromkeys(name for config in columns.values() for name in config)
    rows = [(name, [_setting(config.get(name)) for config in columns.values()]) for name in names]
    rows = [(name, cells) for name, cells in rows if len(set(cells)) > 1]
    intro = "What differs between the runs:" if len(runs) > 1 else "What differs from the defaults:"
    parts = [f"<p>{intro}</p>" + table(["setting", *columns], rows) if rows else f"<p>{intro} nothing.</p>"]
    for label, config in configs.items():
        lines = "\n".join(f"{name}: {_setting(value)}" for name, value in config.items())
        parts.append(folded(f"All settings of {label}", f"<pre>{escape(lines)}</pre>"))
    return "\n".join(parts)


def environments(runs: Labelled) -> str:
    """How to make each run again, and where it was made, as HTML."""
    parts = []
    for label, run in each(runs).items():
        command = run.environment.get("command", "minirl train --config config.yaml --out again" if run.config else "")
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        if line:
            where = (
                "" if "command" in run.environment else ", in the run’s folder, whose config.yaml holds every setting"
            )
            parts.append(f"<p>{escape(label)} again{where}:</p><pre>{escape(line)}</pre>")
    for label, run in each(runs).items():
        rows = [(name, [_setting(value)]) for name, value in flatten(run.environment).items() if name != "command"]
        found = table(["", "value"], rows) if rows else "<p>No environment.json was found.</p>"
        parts.append(folded(f"Environment of {label}", found))
    return "\n".join(parts)


def warned(runs: Labelled) -> tuple[str, str]:
    """The summary and the list of the collapse warnings, as text and HTML."""
    found = [
        f"<li><b>{escape(name)}</b>, {escape(text)}</li>"
        for name, run in each(runs).items()
        for texts in run.warnings.values()
        for text in texts
    ]
    count = len(found)
    listed = f"<ul>{''.join(found)}</ul>" if found else "<p>There was none.</p>"
    return f"Collapse warnings: {count or 'none'}", WARNINGS + listed


def folded(summary: str, html: str) -> str:
    """HTML that opens at a click on its summary."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def subscripts(text: str) -> str:
    """Indices of π and μ as HTML."""
    return re.sub("_(old|θ)", r"<sub>\1</sub>", text)
