"""The words of a report: a verdict in one sentence, what it needs to be read rightly, and what moved with a fall."""

import math
import re
from collections.abc import Sequence
from html import escape

import numpy as np

from minirl_edu.report.runs import Labelled, Run, during, each, moments, most_fallen, score_noise


def number(value: float, form: str = "") -> str:
    """A number for a reader: two digits unless `form` says otherwise, a dash for NaN, a real minus sign."""
    if math.isnan(value):
        return "–"
    if not form:
        form = ".0f" if value == 0 or abs(value) >= 100 else ".1e" if abs(value) < 1e-3 else "#.2g"
    text = f"{value:{form}}".rstrip(".")
    return re.sub(r"e([-+])0*(\d)", r"e\1\2", text).replace("-", "−")


def span(values: Sequence[float], form: str = "", *, to: str = " to ") -> str:
    """The mean, and the range if there is one: `0.76 (0.66 to 0.83)`; NaN is left out."""
    known = [value for value in values if not math.isnan(value)] or [math.nan]
    mean, low, high = (number(value, form) for value in (float(np.mean(known)), min(known), max(known)))
    return mean if low == high else f"{mean} ({low}{to}{high})"


# ----------------------------------------------------------------------------------------------------------- verdict


def verdict(runs: Labelled) -> str:
    """What happened, in one sentence, as HTML."""
    return "; ".join(f"<b>{escape(label)}</b> {escape(_fates(own))}" for label, own in runs.items()) + "."


def _fate(run: Run) -> str:
    """How the score went; without evaluations, the reward."""
    score = run.at("score")
    if not score:
        return _unscored(run)
    start, end = min(score), max(score)
    if start == end:
        return f"was evaluated only once, at step {end}: {score[end]:.2f}"
    apart = run.differ(score[start], score[end])
    if run.course:
        peak, low = run.course
        if peak != start and run.differ(score[start], score[peak]):
            text = f"rose from {score[start]:.2f} to {score[peak]:.2f} by step {peak}, then fell"
        else:
            text = f"fell from {score[peak]:.2f}"
        back = run.differ(score[low], score[end])
        to = low if back else end
        text += f" to {score[to]:.2f} by step {to}"
        text += f" and came back to {score[end]:.2f} by step {end}" if back else ""
        return text + (", below where it began" if apart and score[end] < score[start] and peak != start else "")
    if apart:
        stayed = any(not run.differ(score[step], score[end]) for step in list(score)[1:-1])
        verb = "went" if score[end] > score[start] else "fell"
        ending = " and stayed there" if stayed else ""
        return f"{verb} from {score[start]:.2f} to {score[end]:.2f} in {end} steps{ending}"
    return f"did not change beyond noise: {score[start]:.2f} at step {start}, {score[end]:.2f} at step {end}"


def _unscored(run: Run) -> str:
    if deployed := run.at("score_rollout"):
        first, last = deployed[min(deployed)], deployed[max(deployed)]
        return f"was evaluated through the rollout engine alone, where it went from {first:.2f} to {last:.2f}"
    rewards = [value for step, value in run.at("reward").items() if step > 0]
    if not rewards:
        return "made no gradient step and was not evaluated"
    first, last = (float(np.mean(part)) for part in (rewards[: run.window], rewards[-run.window :]))
    return f"was not evaluated; its training reward went from {first:.2f} to {last:.2f}"


def _fates(runs: Sequence[Run]) -> str:
    """The same of several seeds: means, ranges, and how many fell."""
    scores = [score for run in runs if (score := run.at("score"))]
    if len(runs) == 1 or not scores:
        return _fate(runs[0])
    first, final = ([score[end(score)] for score in scores] for end in (min, max))
    text = f"({len(runs)} seeds) went from {np.mean(first):.2f} to {span(final, '.2f')}"
    peaks = [run.at("score")[run.course[0]] for run in runs if run.course]
    if not peaks:
        return f"{text}, and no seed fell"
    which = "every seed" if len(peaks) == len(runs) else f"{len(peaks)} of them"
    return f"{text}, and {which} fell, from a peak of {span(peaks, '.2f')}"


# ----------------------------------------------------------------------------------------------------------- remarks


def remarks(runs: Labelled) -> list[str]:
    """What the verdict needs to be read rightly: sentences, as HTML."""
    everyone, found = each(runs), []
    warned = [name for name, run in everyone.items() if run.warnings]
    if any(run.at("score") for run in everyone.values()):
        fewest = min(everyone.values(), key=lambda run: run.rewards)
        samples = fewest.rewards // fewest.problems
        mean = "" if samples == 1 else f", the mean of {samples} samples of each"
        found.append(
            f"The score is the share of {fewest.problems} held-out problems that are solved{mean}; "
            f"differences below {score_noise(0.5, 0.5, fewest.rewards):.2f} can be noise."
        )
    for name, run in everyone.items():
        if ended := _ended(run):
            found.append(f"<b>{escape(name)}</b> {escape(ended)}.")
        if run.warnings and len(warned) <= 2:
            count, first = sum(map(len, run.warnings.values())), run.warnings[min(run.warnings)][0]
            found.append(
                f"<b>{escape(name)}</b>: {count} collapse warning{'s' * (count > 1)}, the first at {escape(first)}."
            )
        score, rollout = run.at("score"), run.at("score_rollout")
        if score and (end := max(score)) in rollout and run.differ(score[end], rollout[end]):
            told = f"ends at {rollout[end]:.2f}, not {score[end]:.2f}"
            found.append(f"Through the rollout engine <b>{escape(name)}</b> {told}.")
    if len(warned) > 2:
        found.append(f"{len(warned)} of {len(everyone)} runs raised collapse warnings, which are listed below.")
    return [*found, *_comparison(runs)]


def _ended(run: Run) -> str:
    """Why the run ended, if not because it was done; empty otherwise."""
    step, global_step = run.last, int(run.metrics["global_step"][-1])
    watched = [key for key in ("reward", "entropy", "kl_rollout_old", "grad_norm") if key in run.metrics]
    broken = [key for key in watched if step > 0 and not np.isfinite(run.metrics[key][-1])]
    planned = run.config.get("train.global_steps")
    if broken:
        return f"broke down at gradient step {step}: no finite {' and no finite '.join(broken)} any more"
    if planned and global_step < planned:
        return f"got to global step {global_step} of {planned}: stopped by hand, broken down, or still running"
    return ""


def shared_step(runs: Labelled) -> int | None:
    """The last gradient step at which every run was evaluated."""
    shared = set.intersection(*(set(run.at("score")) for own in runs.values() for run in own))
    return max(shared, default=None)


def _comparison(runs: Labelled) -> list[str]:
    """All labels at the same step, best first, as HTML sentences; none for one label."""
    if len(runs) == 1:
        return []
    step = shared_step(runs)
    if step is None:
        return ["The runs have no evaluation at a common step: their scores cannot be compared."]
    score = {label: [run.at("score")[step] for run in own] for label, own in runs.items()}
    order = sorted(score, key=lambda label: -float(np.mean(score[label])))
    best, several = order[0], max(map(len, score.values())) > 1

    def below(label: str) -> bool:
        if several:
            return max(score[label]) < min(score[best])
        return runs[label][0].differ(score[label][0], score[best][0])

    behind = [f"<b>{escape(label)}</b>" for label in order[1:] if below(label)]
    ranking = ", ".join(f"<b>{escape(label)}</b> {span(score[label], '.2f')}" for label in order)
    if not behind:
        text = "The ranges overlap." if several else "These differences are within the noise of the evaluation."
    else:
        others = "the others" if len(behind) == len(order) - 1 > 1 else ", ".join(behind)
        how = "with every seed above every one of theirs" if several else "by more than the noise of the evaluation"
        text = f"The first is ahead of {others} {how}."
        text += " The rest is level with it." if len(behind) < len(order) - 1 else ""
    alone = "" if several else " One run each: another seed may change the order."
    return [f"At step {step}, the last at which every run was evaluated: {ranking}. {text}{alone}"]


# --------------------------------------------------------------------------------------------------------------- why


def why(runs: Labelled) -> str:
    """What moved between the window before the first fall and the fall, and how it stood elsewhere, as HTML."""
    if (fallen := most_fallen(runs)) is None:
        return "<p>No fall was noticed.</p>"
    label, run = fallen
    windows = moments(run, run)
    before, at = windows.get("before", windows.get("start")), windows.get("at the fall")
    if before is None or at is None:
        return "<p>The fall came too early for a comparison with the steps before it.</p>"

    def factors(of: Run, window: range) -> tuple[float, float]:
        return during(of, "log_ratio_mismatch", window), during(of, "log_ratio_staleness", window)

    was, now = factors(run, before), factors(run, at)
    if math.isnan(sum(was + now)):
        return "<p>These runs did not log the factors of the ratio.</p>"
    name = next(name for name, other in each(runs).items() if other is run)
    moved = [
        f"{factor} went from {_plain(old)} to {_plain(new)} nats" + (f" ({new / old:.1f} ×)" if old > 1e-5 else "")
        for factor, old, new in zip(("the discrepancy", "the staleness"), was, now, strict=True)
    ]
    flips = [during(run, "routing_flip_rate", window) for window in (before, at)]
    if sum(flips) > 0:
        moved.append(
            f"the share of tokens with other experts, per layer, from {100 * flips[0]:.0f} to {100 * flips[1]:.0f} %"
        )
    entropy = [during(run, "entropy", window) for window in (before, at)]
    if not math.isnan(sum(entropy)):
        moved.append(f"the entropy from {_plain(entropy[0])} to {_plain(entropy[1])} nats")
    text = (
        f"<b>{escape(name)}</b>, from before the fall (steps {before.start} to {before.stop - 1}) to the fall (steps "
        f"{at.start} to {at.stop - 1}): {', '.join(moved)}."
    )
    for other, own in runs.items():
        there = [factors(one, at) for one in own]
        if other != label and not math.isnan(sum(map(sum, there))):
            discrepancy, staleness = (_plain(float(np.mean(factor))) for factor in zip(*there, strict=True))
            text += f" In the same steps <b>{escape(other)}</b> had {discrepancy} and {staleness} nats."
    return f"<p>{text} What moves with a fall need not be its cause: runs that differ in one setting alone tell.</p>"


def _plain(value: float) -> str:
    return "0" if abs(value) < 1e-5 else number(value)
