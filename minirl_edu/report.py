"""One self-contained HTML page on one run or several: what happened, in words computed from the data, then figures.

The page needs no network, no script and no other file. It is written for a reader who has not read the paper.
"""

import base64
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from minirl_edu import __version__, plots
from minirl_edu.config import Config

PAPER = "https://arxiv.org/abs/2512.01374"
WINDOW = 10  # gradient steps at either end of a run over which noisy metrics are averaged


@dataclass(frozen=True)
class _Run:
    metrics: plots.Metrics
    warnings: list[str]
    config: dict[str, Any]  # dotted name -> value; empty where the run has no config.yaml
    environment: dict[str, Any]
    memory: dict[str, float]  # bytes per token of each part of the last rollout
    samples: list[dict[str, Any]]  # lines of samples.jsonl, one an evaluation

    @property
    def problems(self) -> int:
        return int(self.config.get("eval.problems", 100))  # unknown: few, so that noise isn't taken for a result

    def at(self, key: str) -> dict[int, float]:
        """Gradient step -> value, where there is one."""
        values = self.metrics.get(key, np.empty(0))
        return {
            int(step): float(v) for step, v in zip(self.metrics["grad_step"], values, strict=False) if np.isfinite(v)
        }

    def ends(self, key: str) -> tuple[float, float]:
        """Means over the first and the last WINDOW gradient steps that have a value; NaN where none has."""
        values = [value for step, value in self.at(key).items() if step > 0]
        return (float(np.mean(values[:WINDOW])), float(np.mean(values[-WINDOW:]))) if values else (math.nan, math.nan)


# ----------------------------------------------------------------------------------------------------------- reading


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and (tree or not prefix):
        return {name: leaf for key, node in tree.items() for name, leaf in _flatten(node, f"{prefix}.{key}").items()}
    return {prefix.removeprefix("."): tree}


def _read(folder: Path) -> _Run:
    records = plots.read_records(folder / "metrics.jsonl")
    config, environment = folder / "config.yaml", folder / "environment.json"
    return _Run(
        metrics=plots.read_metrics(folder / "metrics.jsonl"),
        warnings=[str(warning) for record in records for warning in record.get("warnings", [])],
        config=_flatten(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.is_file() else {},
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        memory=next((record["bytes_per_token"] for record in reversed(records) if "bytes_per_token" in record), {}),
        samples=plots.read_records(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else [],
    )


def _method(config: Mapping[str, Any], otherwise: str) -> str:
    """The paper's name for what a config trains with."""
    objective = config.get("algorithm.objective")
    if objective is None:
        return otherwise
    correction = config.get("algorithm.correction", "token_truncated")
    if not config.get("algorithm.is_correction", True):
        correction = "none"
    parts = [
        {"minirl": "MiniRL", "grpo": "GRPO", "cispo": "CISPO"}.get(objective, objective),
        {"token_truncated": "", "none": "− IS"}.get(correction, f"weight: {correction.replace('_', ' ')}"),
        "+ length norm" if config.get("algorithm.length_norm") else "",
        "" if config.get("algorithm.clip", True) else "no clipping",
        "" if config.get("algorithm.replay", "none") == "none" else f"+ {config['algorithm.replay']}",
    ]
    return " ".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------- words


def _noise(p: float, q: float, problems: int) -> float:
    """Two standard errors of the difference of two scores, each the mean of `problems` rewards in [0, 1]."""
    # One success and one failure are added, so that a score of exactly 1 isn't taken for a certainty.
    spread = sum(s * (1 - s) for s in ((min(1.0, max(0.0, s)) * problems + 1) / (problems + 2) for s in (p, q)))
    return 2 * math.sqrt(spread / problems)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _trend(run: _Run) -> str:
    """How the score went; without evaluations, the reward."""
    score = run.at("score")
    if not score:
        if deployed := run.at("score_rollout"):
            first, last = deployed[min(deployed)], deployed[max(deployed)]
            return f"was evaluated through the rollout engine alone, where it went from {first:.2f} to {last:.2f}"
        first, last = run.ends("reward")
        if math.isnan(last):
            return "made no gradient step and was not evaluated"
        return f"was not evaluated; its training reward went from {first:.2f} to {last:.2f}"
    start, final, end = min(score), score[max(score)], max(score)
    if start == end:
        return f"was evaluated only once, at step {end}: {final:.2f} on held-out problems"
    best = max(score, key=lambda step: (score[step], -step))
    worst = min(score, key=lambda step: (score[step], step))

    def differ(p: float, q: float) -> bool:
        return abs(p - q) > _noise(p, q, run.problems)

    a, b, c = (f"{score[step]:.2f}" for step in (start, best, end))
    if differ(score[best], final) and differ(score[start], score[best]):
        where = "below where it began" if differ(score[start], final) and final < score[start] else ""
        text = f"rose from {a} to {b} on held-out problems by step {best}, then fell to {c} by step {end}"
        text += f", {where}" if where else ""
    elif score[worst] < score[start] and differ(score[start], score[worst]) and differ(score[worst], final):
        then = "and ended at" if final < score[start] and differ(score[start], final) else "then rose to"
        text = f"fell from {a} to {score[worst]:.2f} on held-out problems by step {worst}, {then} {c} by step {end}"
    elif differ(score[start], final):
        verb = "went" if final > score[start] else "fell"
        text = f"{verb} from {a} to {c} on held-out problems in {end} gradient steps"
    else:
        text = f"did not change beyond noise on held-out problems: {a} at step {start}, {c} at step {end}"
    rollout = run.at("score_rollout")
    if end in rollout:
        apart = differ(rollout[end], final)
        text += f" ({'but ' if apart else ''}{rollout[end]:.2f} through the rollout engine)"
    return text


def _end(run: _Run) -> str:
    """Why the run ended, if not because it was done; empty otherwise."""
    step, global_step = int(run.metrics["grad_step"][-1]), int(run.metrics["global_step"][-1])
    watched = [key for key in ("reward", "entropy", "kl_rollout_old", "grad_norm") if key in run.metrics]
    broken = [key for key in watched if step > 0 and not np.isfinite(run.metrics[key][-1])]
    planned = run.config.get("train.global_steps")
    if broken:
        return f"It broke down at gradient step {step}: no finite {' and no finite '.join(broken)} any more."
    if planned and global_step < planned:
        return f"It got to global step {global_step} of {planned}: stopped by hand, broken down, or still running."
    return ""


def _story(label: str, run: _Run) -> str:
    """What happened to one run, as HTML."""
    entropy, kl = run.ends("entropy"), run.ends("k3_rollout_old")
    sentences = [f"<b>{escape(label)}</b> {escape(_trend(run))}.", _end(run)]
    if not math.isnan(entropy[1] + kl[1]):
        sentences.append(
            f"Token entropy went from {_number(entropy[0])} to {_number(entropy[1])} nats, "
            f"the training–inference KL from {_number(kl[0])} to {_number(kl[1])} nats per token."
        )
    count = len(run.warnings)
    first = f", the first at {escape(run.warnings[0])}" if count else ""
    sentences.append(f"{count or 'No'} collapse warning{'s' * (count != 1)}{first}.")
    return " ".join(filter(None, sentences))


def _shared_step(runs: Mapping[str, _Run]) -> int | None:
    """The last gradient step at which every run was evaluated."""
    shared = set.intersection(*(set(run.at("score")) for run in runs.values()))
    return max(shared, default=None)


def _comparison(runs: Mapping[str, _Run]) -> str:
    """All runs at the same step, best first, as HTML; empty for one run."""
    if len(runs) == 1:
        return ""
    step = _shared_step(runs)
    if step is None:
        return "The runs have no evaluation at a common step: their scores cannot be compared."
    score = {label: run.at("score")[step] for label, run in runs.items()}
    order = sorted(score, key=lambda label: -score[label])
    top = order[0]
    behind = [
        label
        for label in order[1:]
        if score[top] - score[label] > _noise(score[top], score[label], runs[label].problems)
    ]
    ranking = ", ".join(f"<b>{escape(label)}</b> {score[label]:.2f}" for label in order)
    if not behind:
        verdict = "These differences are within the noise of the evaluation."
    else:
        verdict = f"Below the best by more than the noise of the evaluation: {escape(', '.join(behind))}."
        if len(behind) < len(order) - 1:
            verdict += " The others are level with it."
    return (
        f"Held-out score at gradient step {step}, the last at which every run was evaluated: {ranking}. {verdict} "
        "One run each: another seed may change the order."
    )


# ----------------------------------------------------------------------------------------------------------- samples


def _shortened(text: str, room: int = 400) -> str:
    """The text as HTML, without its middle where it is long."""
    if len(text) > room:
        cut = len(text) - room
        text = f"{text[: room // 2]} … [{cut:,} characters left out] … {text[-room // 2 :]}"
    return escape(text) or "<span class=soft>(nothing)</span>"


def _samples(runs: Mapping[str, _Run]) -> str:
    """The first held-out problems with the answers before training and at the end of each run, as an HTML table."""
    runs = {label: run for label, run in runs.items() if run.samples}
    answers: dict[str, dict[tuple[Any, ...], list[str]]] = {}  # problem -> step, response, reward -> whose they are
    for lines in ([run.samples[:1] for run in runs.values()], [run.samples[1:][-1:] for run in runs.values()]):
        for label, line in ((label, line) for label, own in zip(runs, lines, strict=True) for line in own):
            for said in line["samples"]:
                problem = _shortened(said["prompt"])
                problem += f"<span class=soft> · right: {_shortened(said['answer'])}</span>" if said["answer"] else ""
                step = line["grad_step"]
                key = (step, said["response"], said["reward"], label if step else "")  # all start from one model
                answers.setdefault(problem, {}).setdefault(key, []).append(label)
    body = ""
    for problem, given in answers.items():
        body += f"<tbody><tr><th scope=rowgroup colspan=3>{problem}</th></tr>\n"
        for (step, response, reward, label), labels in given.items():
            start = "before training" if len(labels) == len(runs) else f"{', '.join(labels)}, before training"
            who = escape(f"{label}, step {step}" if step else start)
            body += f"<tr><td>{who}</td><td>{_shortened(response)}</td><td>{reward:.3g}</td></tr>\n"
        body += "</tbody>"
    head = "<tr><th scope=col>problem, and who answers</th><th scope=col>answer</th><th scope=col>reward</th></tr>"
    return f"<table class=samples><thead>{head}</thead>{body}</table>" if body else ""


# ------------------------------------------------------------------------------------------------------------- table


def _summary(runs: Mapping[str, _Run]) -> list[tuple[str, list[str]]]:
    """Rows of the summary: what, and a cell per run."""
    shared = _shared_step(runs)

    def scores(run: _Run, key: str) -> list[str]:
        score = run.at(key)
        if not score:
            return ["–"] * 3
        best = max(score, key=lambda step: (score[step], -step))
        return [f"{score[min(score)]:.3f}", f"{score[best]:.3f} (step {best})", f"{score[max(score)]:.3f}"]

    def rate(run: _Run) -> str:
        seconds = sum(run.at("seconds").values())
        return f"{sum(run.at('tokens').values()) / seconds:,.0f}" if seconds else "–"

    everyone = list(runs.values())
    rows = []
    for key, engine in (("score", "full precision"), ("score_rollout", "rollout engine")):
        cells = [scores(run, key) for run in everyone]
        for i, moment in enumerate(("start", "best", "final")):
            rows.append((f"Score, {engine}: {moment}", [cell[i] for cell in cells]))
    if shared is not None and len({max(run.at("score")) for run in everyone}) > 1:
        rows.append(
            (f"Score, full precision: at shared step {shared}", [f"{run.at('score')[shared]:.3f}" for run in everyone])
        )
    for key, name in (
        ("reward", "Training reward, last"),
        ("entropy", "Token entropy, last (nats)"),
        ("k3_rollout_old", "Training–inference KL, last (nats per token)"),
        ("routing_flip_rate", "Routing flips, last (fraction of tokens per layer)"),
        ("response_length", "Response length, last (tokens)"),
    ):
        rows.append((name, [_number(run.ends(key)[1]) for run in everyone]))
    rows.append(("Collapse warnings", [str(len(run.warnings)) for run in everyone]))
    rows.append(("Gradient steps", [str(int(run.metrics["grad_step"][-1])) for run in everyone]))
    rows.append(("Minutes, evaluations excluded", [f"{sum(run.at('seconds').values()) / 60:.1f}" for run in everyone]))
    rows.append(("Tokens per second", [rate(run) for run in everyone]))
    for part in dict.fromkeys(part for run in everyone for part in run.memory):
        cells = [f"{run.memory[part]:.1f}" if part in run.memory else "–" for run in everyone]
        rows.append((f"Rollout in memory, {part} (bytes per token)", cells))
    return rows


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
        for name, cells in rows
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"


# -------------------------------------------------------------------------------------------------------------- page


def _setting(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False, default=str).strip('"')


def _settings(runs: Mapping[str, _Run]) -> str:
    """What differs between the runs (one run: from the defaults), then every config in full."""
    configs = {label: run.config for label, run in runs.items() if run.config}
    if not configs:
        return "<p>No config.yaml was found.</p>"
    columns = configs if len(runs) > 1 else {"default": _flatten(Config().to_dict())} | configs
    names = dict.fromkeys(name for config in columns.values() for name in config)
    rows = [(name, [_setting(config.get(name)) for config in columns.values()]) for name in names]
    rows = [(name, cells) for name, cells in rows if len(set(cells)) > 1]
    intro = "What differs between the runs:" if len(runs) > 1 else "What differs from the defaults:"
    parts = [f"<p>{intro}</p>" + _table(["setting", *columns], rows) if rows else f"<p>{intro} nothing.</p>"]
    for label, config in configs.items():
        lines = "\n".join(f"{name}: {_setting(value)}" for name, value in config.items())
        parts.append(f"<details><summary>All settings of {escape(label)}</summary><pre>{escape(lines)}</pre></details>")
    return "\n".join(parts)


def _environments(runs: Mapping[str, _Run]) -> str:
    parts = []
    for label, run in runs.items():
        command = run.environment.get("command", "minirl train --config config.yaml --out again" if run.config else "")
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        if line:
            where = (
                "" if "command" in run.environment else ", in the run’s folder, whose config.yaml holds every setting"
            )
            parts.append(f"<p>{escape(label)} again{where}:</p><pre>{escape(line)}</pre>")
    for label, run in runs.items():
        rows = [(name, [_setting(value)]) for name, value in _flatten(run.environment).items() if name != "command"]
        table = _table(["", "value"], rows) if rows else "<p>No environment.json was found.</p>"
        parts.append(f"<details><summary>Environment of {escape(label)}</summary>{table}</details>")
    return "\n".join(parts)


def _picture(file: Path, alt: str, wide: Figure, narrow: Figure | None = None) -> str:
    """A figure inline, in a second layout for narrow screens where there is one; the first also goes to `file`."""
    png = plots.to_png(wide)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png)
    source = f'<source media="(max-width: 640px)" srcset="{_inline(plots.to_png(narrow))}">' if narrow else ""
    width = round(100 * wide.get_figwidth())
    return f'<picture style="max-width: {width}px">{source}<img src="{_inline(png)}" alt="{escape(alt)}"></picture>'


def _subscripts(text: str) -> str:
    return re.sub("_(old|θ)", r"<sub>\1</sub>", text)


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


SAMPLES = """<p>The first held-out problems, with one answer each, drawn as in training. The verifier rewards a right
answer with 1.</p>"""
WARNINGS = """<p>A warning says when the reward (a mean over ten gradient steps) or the held-out score had fallen by a
quarter of the scale, or to half of its best.</p>"""
FOUR_CURVES = """<dl>
<dt>Held-out score</dt><dd>Share of the problems never trained on that are solved, sampled by the training engine in
full precision; faint, the same problems through the low-precision rollout engine, as a user of the deployed model
would see them. <i>Healthy:</i> rises, then levels off, both lines together. <i>Ill:</i> falls from its peak, or the
lines part.</dd>
<dt>Training reward</dt><dd>Mean reward of the responses being trained on. <i>Healthy:</i> rises with the score.
<i>Ill:</i> falls, or rises while the score does not.</dd>
<dt>Token entropy</dt><dd>How undecided the policy is about the next token. <i>Healthy:</i> declines slowly.
<i>Ill:</i> drops sharply (the policy has stopped exploring, often just before a collapse) or grows without end.</dd>
<dt>Training–inference KL</dt><dd>How far the engine that samples is from the engine that trains, at the same weights,
estimated from samples. Bold, k3, which is never below 0; faint, k1, the paper’s, which may dip below 0.
<i>Healthy:</i> small and flat. <i>Ill:</i> keeps growing.</dd>
</dl>"""
RATIOS = """<p>A response is sampled by one engine (policy μ_old) and trained in another (policy π_θ). For each token,
the ratio of the two probabilities is a product of two factors, equation (5) of the paper: <b>π_θ/μ_old = π_old/μ_old
× π_θ/π_old</b>. The first is the <i>training–inference discrepancy</i>: the same weights give different probabilities
in two engines, because of number formats, kernels and expert routing. The second is the <i>policy staleness</i>: the
weights have moved since the response was sampled; it is exactly 1 until they have, so always when each batch serves a
single gradient step. Training token by token is a first-order approximation of what is really wanted, the reward of
whole responses. It holds while both factors stay near 1, so while these logarithms stay near 0.</p>
<dl>
<dt>Discrepancy and staleness</dt><dd>Mean size of either factor’s logarithm, on one scale: the larger is the one to
work on. <i>Healthy:</i> small and flat. <i>Ill:</i> growing. A finer number format or routing replay lowers the
first; fewer mini-batches per rollout, clipping or a smaller learning rate lowers the second. Bold, a running mean;
faint, each step.</dd>
<dt>First-order gap</dt><dd>What the approximation drops: the weight Π r of a whole response, r = π_θ/μ_old, minus its
first-order expansion 1 + Σ(r − 1), as a mean absolute value. <i>Healthy:</i> far below 1. <i>Ill:</i> near 1 or
above.</dd>
</dl>"""
FLIPS = """<dl><dt>Routing flips</dt><dd>In a Mixture of Experts, the share of tokens for which the two engines use
different experts at the same weights, per layer. Under R3 the training engine takes over the rollout’s experts, so it
is 0. <i>Healthy:</i> flat. <i>Ill:</i> growing together with the KL.</dd></dl>"""
CLIPPING = """<dl><dt>Clipped tokens</dt><dd>Share of the tokens left out of the gradient because π_θ/π_old has
already moved far in the direction that the advantage asks for; of a run without clipping, the share that clipping would
leave out. Always 0 when each batch serves a single gradient step. <i>Healthy:</i> a few per cent at most.
<i>Ill:</i> growing: the updates are too large for the number of mini-batches.</dd></dl>"""

STYLE = """
:root { color-scheme: light dark;
  --ink: #222; --soft: #666; --line: #ddd; --page: #fff; --box: #f5f5f3; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --soft: #a5a29d; --line: #44423f; --page: #1b1a19; --box: #262523; --link: #6cbcec; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 1040px; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
p, dl, .headline { max-width: 46rem; }
a { color: var(--link); }
.headline { font-size: 1.08rem; background: var(--box); border-left: 4px solid var(--link); padding: .5rem 1.1rem; }
.headline p { margin: .45rem 0; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .32rem 0 .32rem 1.4rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 400; white-space: normal; min-width: 10rem;
  padding-left: 0; position: sticky; left: 0; background: var(--page); }
.samples { width: 100%; max-width: 46rem; }
.samples th, .samples td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.samples td:first-child { padding-left: 0; width: 34%; color: var(--soft); }
.samples tbody th { font-weight: 600; padding-top: .9rem; border-bottom: 0; }
.samples :is(th, td):last-child:not(:first-child) { text-align: right; width: 4rem; }
picture { display: block; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem; margin: .8rem 0; }
img { display: block; max-width: 100%; height: auto; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
sub { font-size: .75em; line-height: 0; }
dd i { color: var(--soft); }
pre { background: var(--box); padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
"""


def write_report(
    run_dirs: Mapping[str, Path] | Path, out: Path, *, title: str = "What happened in training", about: str = ""
) -> Path:
    """Write one self-contained HTML page to `out` and its figures as PNG to `figures/` beside it; return `out`.

    `run_dirs` is one run's folder, or a label per folder to compare runs; runs are compared at equal gradient steps.
    `about` is a paragraph to begin with.
    Raises FileNotFoundError or ValueError with the path where a metrics.jsonl is missing, empty or broken.
    """
    if isinstance(run_dirs, Mapping):
        runs = {label: _read(Path(folder)) for label, folder in run_dirs.items()}
    else:
        run = _read(Path(run_dirs))
        runs = {_method(run.config, Path(run_dirs).resolve().name): run}
    if not runs:
        raise ValueError("run_dirs is empty: give at least one run's folder")
    out = Path(out)
    data = {label: run.metrics for label, run in runs.items()}
    figures = out.parent / "figures"
    stories = [_comparison(runs), *(_story(label, run) for label, run in runs.items())]
    warnings = [f"<b>{escape(label)}</b>, {escape(text)}" for label, run in runs.items() for text in run.warnings]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(about)}</p>" if about else "",
        "<div class=headline>" + "".join(f"<p>{story}</p>\n" for story in stories if story) + "</div>",
        *(["<h2>What the model says</h2>", SAMPLES, samples] if (samples := _samples(runs)) else []),
        "<h2>In numbers</h2>",
        _table(["", *runs], _summary(runs)),
        f"""<p class=soft>“Last” is the mean over the last {WINDOW} gradient steps. Start, best and final are over a
run’s own length; the best of many noisy evaluations flatters a little. Differences of scores below two standard errors
are called noise.</p>""",
        "<h2>Collapse warnings</h2>" if warnings else "",
        f"{WARNINGS}<ul>" + "".join(f"<li>{text}</li>" for text in warnings) + "</ul>" if warnings else "",
        "<h2>The four curves to watch</h2>",
        _picture(
            figures / "four_curves.png",
            "Held-out score, training reward, entropy and training–inference KL over gradient steps",
            plots.four_curves(data),
            plots.four_curves(data, columns=1),
        ),
        FOUR_CURVES,
        "<h2>Two reasons why training drifts from sampling</h2>",
        _picture(
            figures / "ratio_decomposition.png",
            "Training–inference discrepancy, policy staleness and first-order gap over gradient steps",
            plots.ratio_decomposition(data),
            plots.ratio_decomposition(data, columns=1),
        ),
        _subscripts(RATIOS),
    ]
    if any(run.at("routing_flip_rate") for run in runs.values()):
        picture = _picture(
            figures / "routing_flips.png", "Routing flips over gradient steps", plots.routing_flips(data)
        )
        sections += ["<h2>Expert routing</h2>", picture, FLIPS]
    sections += [
        "<h2>Clipping</h2>",
        _picture(
            figures / "clipping.png",
            "Fraction of clipped tokens over gradient steps, by the sign of the advantage",
            plots.clipping(data),
            plots.clipping(data, columns=1),
        ),
        _subscripts(CLIPPING),
        "<h2>Settings</h2>",
        _settings(runs),
        "<h2>Reproduce</h2>",
        _environments(runs),
        f"""<p class=soft>The paper: <a href="{PAPER}">Stabilizing Reinforcement Learning with LLMs: Formulation and
Practices</a>, arXiv 2512.01374. Page written by minirl_edu {__version__}.</p>""",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
