"""Criteria become verdicts, verdicts become CLAIMS.md.

A claim is reproduced only if the data support every one of its criteria, each at 95 %. Too few seeds, or too small an
effect, make it inconclusive and never opposite: that word needs data that contradict a criterion at 95 %.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minirl_edu.experiments.spec import METRICS, Claim, Criterion, Run, RunResult, Spec
from minirl_edu.experiments.statistics import (
    Effect,
    binomial_p,
    difference_of_proportions,
    equivalent,
    holm,
    paired_difference,
    proportion,
    summary,
)

VERDICTS = {
    "reproduced": "the data support every criterion of the claim",
    "opposite": "the data contradict at least one criterion",
    "inconclusive": "neither: the effect is too small for so few seeds, or there is none",
    "not testable at this size": "a laptop cannot decide it, for the reason given",
    "not run": "a run that the claim needs is missing",
}
"""The verdicts and what they mean."""

_SMALLEST = 1e-8  # nats; ratios of anything below would compare rounding errors of fp32
_T_TEST, _TOST = "t-interval, sign-flip p", "two one-sided t-tests"
_SCORES = ("collapses", "stable", "more_collapse", "learns", "unlearns")

Summaries = Mapping[Run, Mapping[int, dict[str, Any]]]
"""`statistics.summary` of each run, by seed."""


@dataclass(frozen=True)
class Finding:
    """What the data say about one criterion."""

    criterion: Criterion
    outcome: str
    """holds, opposite, inconclusive or not run."""
    text: str
    """The effect and its interval, to be read."""
    test: str = ""
    effect: Effect | None = None
    """None if it was not run. Ratios are natural logarithms."""
    p_holm: float = math.nan
    """The p-value, adjusted for the number of distinct criteria."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim, and what it rests on."""

    claim: Claim
    verdict: str
    """One of `VERDICTS`."""
    findings: tuple[Finding, ...]
    rollout_verdict: str | None
    """The verdict if scores are those of the rollout engine; None where the claim is not about scores, or the rollout
    engine was not evaluated."""
    rollout_findings: tuple[Finding, ...]
    seconds: Mapping[Run, tuple[float, ...]]
    """How long each run of the claim took, per seed."""


# ---------------------------------------------------------------------------------------------------------- judging


def judge(spec: Spec, results: Mapping[Run, Sequence[RunResult]]) -> list[Judgement]:
    """The verdict on each of the spec's claims, in order.

    A criterion holds, or is contradicted (opposite), where its interval leaves no doubt at 95 %; else it is
    inconclusive. Seeds that only one of two runs has are left out. Differences are paired by seed; entropies and KL
    are compared as ratios, with factors for margins.

        higher         metric of `run` − that of `than` > margin (0); opposite: the interval lies below 0 and the margin
        lower          the same the other way round. A negative margin allows so much of the other direction
        comparable     within ±margin, by two one-sided tests; opposite: the 95 % interval lies wholly outside
        collapses      more than `share` of the runs collapse: so is the whole interval of the rate; opposite: it lies
                       below `share`, one half unless the criterion says otherwise
        stable         fewer than `share` of the runs collapse; the exact reverse of `collapses`
        more_collapse  `run` collapses on more seeds than `than`, by the exact paired sign test; opposite: on fewer
        learns         final score above the score before training; opposite: below
        unlearns       the same the other way round

    A claim is `reproduced` if all its criteria hold, else `opposite` if any is, else `inconclusive`; `not run` if
    results of a run are missing. It is judged a second time with the scores through the rollout engine.
    """
    summaries = {
        run: {result.seed: summary(result, spec.definitions) for result in found} for run, found in results.items()
    }
    findings = _adjusted({c: _finding(c, summaries) for claim in spec.claims for c in claim.criteria})
    return [_judgement(claim, findings, summaries, results) for claim in spec.claims]


def _judgement(
    claim: Claim,
    findings: Mapping[Criterion, Finding],
    summaries: Summaries,
    results: Mapping[Run, Sequence[RunResult]],
) -> Judgement:
    runs = _runs_of(claim)
    found = {run: results.get(run, ()) for run in runs}
    own = tuple(findings[criterion] for criterion in claim.criteria)
    deployed: tuple[Finding, ...] = ()
    if any(_about_scores(c) for c in claim.criteria) and all(map(_deployed_everywhere, found.values())):
        deployed = tuple(
            _finding(finding.criterion, summaries, "_rollout") if _about_scores(finding.criterion) else finding
            for finding in own
        )
    return Judgement(
        claim=claim,
        verdict=_verdict(claim, own),
        findings=own,
        rollout_verdict=_verdict(claim, deployed) if deployed else None,
        rollout_findings=deployed,
        seconds={run: tuple(result.seconds for result in found[run]) for run in runs},
    )


def _deployed_everywhere(found: Sequence[RunResult]) -> bool:
    """Whether there are results, all with evaluations through the rollout engine."""
    return bool(found) and all(np.isfinite(result.metrics["score_rollout"]).any() for result in found)


def _runs_of(claim: Claim) -> list[Run]:
    """The runs that the claim's criteria speak of, in order."""
    sides = (side for criterion in claim.criteria for side in (criterion.run, criterion.than))
    return list(dict.fromkeys(side for side in sides if side is not None))


def _about_scores(criterion: Criterion) -> bool:
    return criterion.kind in _SCORES or "score" in (criterion.metric or "")


def _verdict(claim: Claim, findings: Sequence[Finding]) -> str:
    outcomes = [finding.outcome for finding in findings]
    if claim.not_testable:
        return "not testable at this size"
    if "not run" in outcomes:
        return "not run"
    if "opposite" in outcomes:
        return "opposite"
    return "reproduced" if set(outcomes) == {"holds"} else "inconclusive"


def _adjusted(findings: Mapping[Criterion, Finding]) -> dict[Criterion, Finding]:
    """With Holm's p-values over all criteria that were tested; one that two claims share counts once."""
    tested = {criterion: finding.effect.p for criterion, finding in findings.items() if finding.effect}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {criterion: replace(f, p_holm=adjusted.get(criterion, math.nan)) for criterion, f in findings.items()}


def _finding(criterion: Criterion, summaries: Summaries, suffix: str = "") -> Finding:
    """`suffix` is `_rollout` for the scores of the rollout engine."""
    runs, thans = summaries.get(criterion.run, {}), summaries.get(criterion.than or criterion.run, {})
    seeds = sorted(runs.keys() & thans.keys())
    if not seeds:
        return Finding(criterion, "not run", "not run")

    def column(side: Mapping[int, dict[str, Any]], key: str) -> np.ndarray:
        return np.array([side[seed][key] for seed in seeds])

    if criterion.kind in ("collapses", "stable"):
        return _rate(criterion, column(runs, f"collapsed{suffix}"))
    if criterion.kind == "more_collapse":
        return _more_collapse(criterion, *(column(side, f"collapsed{suffix}") for side in (runs, thans)))
    if criterion.kind in ("learns", "unlearns"):
        run, than = column(runs, f"final_score{suffix}"), column(runs, f"first_score{suffix}")
    else:
        key = f"{criterion.metric}{suffix}"
        run, than = column(runs, key), column(thans, key)
    measured = np.isfinite(run) & np.isfinite(than)
    if not measured.any():
        return Finding(criterion, "not run", "not measured")
    return _means(criterion, run[measured], than[measured])


def _rate(criterion: Criterion, collapsed: np.ndarray) -> Finding:
    k, n = int(collapsed.sum()), len(collapsed)
    rate, low, high = proportion(k, n)
    claimed, reverse = low > criterion.share, high < criterion.share
    if criterion.kind == "stable":
        claimed, reverse = reverse, claimed
    return Finding(
        criterion,
        _outcome(claimed, reverse),
        f"{k} of {n} collapsed: {_percent(rate)} ({_percent(low)} to {_percent(high)})",
        "exact binomial",
        Effect(rate, low, high, binomial_p(k, n, criterion.share), n),
    )


def _more_collapse(criterion: Criterion, run: np.ndarray, than: np.ndarray) -> Finding:
    effect = difference_of_proportions(run, than)
    certain = effect.p < 0.05  # exact; the interval is not
    return Finding(
        criterion,
        _outcome(certain and effect.estimate > 0, certain and effect.estimate < 0),
        f"{run.sum()} of {effect.n} against {than.sum()} of {effect.n}: " + _points(effect, "percentage points", ".0f"),
        "exact sign test",
        effect,
    )


def _means(criterion: Criterion, run: np.ndarray, than: np.ndarray) -> Finding:
    log = criterion.metric is not None and METRICS[criterion.metric].log
    if log:
        run, than = (np.log(np.maximum(values, _SMALLEST)) for values in (run, than))
    margin = (1.0 if log else 0.0) if criterion.margin is None else criterion.margin
    margin = math.log(margin) if log else margin
    if criterion.kind == "comparable":
        effect, test, outcome = _equivalence(run, than, margin)
    else:
        sign = -1 if criterion.kind in ("lower", "unlearns") else 1
        effect, test = paired_difference(run, than, null=sign * margin), _T_TEST
        low, high = sorted((sign * effect.low, sign * effect.high))
        outcome = _outcome(low > margin, high < min(0.0, margin))
    text = _factors(effect) if log else _points(effect, "points", ".1f")
    if test == _TOST:
        text = text.replace("(", "(90 % interval ")
    return Finding(criterion, outcome, text, test, effect)


def _equivalence(run: np.ndarray, than: np.ndarray, margin: float) -> tuple[Effect, str, str]:
    """Effect, test and outcome: equivalent within the margin, or certainly not, or neither."""
    effect, difference = equivalent(run, than, margin), paired_difference(run, than)
    if effect.p < 0.05:
        return effect, _TOST, "holds"
    if abs(difference.estimate) > margin and min(abs(difference.low), abs(difference.high)) > margin:
        nearer = math.copysign(margin, difference.estimate)
        return paired_difference(run, than, null=nearer), _T_TEST, "opposite"
    return effect, _TOST, "inconclusive"


def _outcome(claimed: bool, reverse: bool) -> str:
    return "holds" if claimed else "opposite" if reverse else "inconclusive"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(effect: Effect, unit: str, form: str) -> str:
    """`+3.1 points (+1.2 to +5.0)`, of an effect on the scale from 0 to 1."""
    return _interval(effect, lambda x: f"{100 * x:+{form}}".replace("-", "−"), f" {unit}")


def _factors(effect: Effect) -> str:
    """`× 0.46 (0.40 to 0.52)`, of an effect on a logarithm."""
    return "× " + _interval(effect, lambda x: f"{math.exp(x):.2g}", "")


def _interval(effect: Effect, number: Callable[[float], str], unit: str) -> str:
    if effect.n == 1:
        return f"{number(effect.estimate)}{unit} (one seed: no interval)"
    return f"{number(effect.estimate)}{unit} ({number(effect.low)} to {number(effect.high)})"


# ---------------------------------------------------------------------------------------------------------- writing


def claims_markdown(
    spec: Spec,
    judgements: Sequence[Judgement],
    *,
    tier: str,
    seeds: int,
    out: str,
    environment: Mapping[str, Any],
    figures: Mapping[str, str],
) -> str:
    """The text of CLAIMS.md: a table of verdicts, then each claim with what was run, each effect and its test.

    `out` is the folder named in the commands, `environment` that of `doctor.environment`, and `figures` maps a figure's
    name to the link to its picture; a figure that isn't in it is only named.
    """
    claims = [_section(spec, judgement, tier, seeds, out, figures) for judgement in judgements]
    parts = [
        "# The paper's claims, tested on a laptop",
        _introduction(spec, judgements, tier, seeds, out, environment),
        "## Verdicts",
        _table(
            ("claim", "the paper's finding", "verdict", "effect, with its 95 % interval", "figure"),
            [_row(spec, judgement, figures) for judgement in judgements],
        ),
        *(["## Side by side", _sides(spec, judgements)] if len(spec.sides) > 1 else []),
        "## How a verdict is made",
        _method(spec, judgements, seeds),
        "## Claim by claim",
        *claims,
        "## What was run",
        _what_was_run(spec, judgements, tier),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(
    spec: Spec, judgements: Sequence[Judgement], tier: str, seeds: int, out: str, environment: Mapping[str, Any]
) -> str:
    counts = {word: sum(judgement.verdict == word for judgement in judgements) for word in VERDICTS}
    runs, seconds = _cost(judgements)
    packages = environment["packages"]
    return (
        f"Of {len(judgements)} claims: {', '.join(f'{n} {word}' for word, n in counts.items() if n)}. The paper is "
        "*Stabilizing Reinforcement Learning with LLMs* ([arXiv 2512.01374](https://arxiv.org/abs/2512.01374)); its "
        "runs took hundreds of thousands of GPU hours. A verdict here is about the same algorithms on a model and a "
        "task that fit a laptop: it says what carries over, not whether the paper is right about its own models.\n\n"
        f"Tier `{tier}`, seeds {spec.first_seed} to {spec.first_seed + seeds - 1}, {runs} runs, {seconds / 3600:.1f} "
        f"hours of one core, with minirl_edu {environment['minirl_edu']}, Python {environment['python']}, "
        f"torch {packages.get('torch', '?')}, {environment['platform']}. To make it again:\n\n"
        f"    {_command(['all'], tier, seeds, out)}"
    )


def _command(figures: Sequence[str], tier: str, seeds: int, out: str) -> str:
    return f"minirl reproduce {' '.join(figures)} --tier {tier} --seeds {seeds} --out {out}"


def _row(spec: Spec, judgement: Judgement, figures: Mapping[str, str]) -> list[str]:
    claim = judgement.claim
    decisive = _decisive(judgement)
    effect = claim.not_testable or ""
    if decisive is not None:
        lines = [_words(spec, decisive.criterion, across=_across(claim)), decisive.text]
        if more := len(judgement.findings) - 1:
            lines.append(f"[and {more} more](#{claim.id.lower()})")
        effect = "<br>".join(lines)
    return [
        f"[{claim.id}](#{claim.id.lower()})",
        claim.paper,
        _strong(judgement.verdict),
        effect,
        ", ".join(_link(name, figures) for name in claim.figures),
    ]


def _sides(spec: Spec, judgements: Sequence[Judgement]) -> str:
    """Two tables: findings that were judged in several kinds of settings, and what was predicted."""
    cells: dict[str, dict[str, str]] = {}
    for judgement in judgements:
        claim = judgement.claim
        for finding in claim.findings or (claim.id,):
            cells.setdefault(finding, {})[claim.side] = (
                f"{_strong(judgement.verdict)} ([{claim.id}](#{claim.id.lower()}))"
            )
    papers = {judgement.claim.id: judgement.claim.paper for judgement in judgements}
    side_by_side = [
        [papers[finding], *(found.get(side, "") for side in spec.sides)]
        for finding, found in cells.items()
        if len(found) > 1
    ]
    predicted = [
        [f"[{j.claim.id}](#{j.claim.id.lower()})", j.claim.paper, j.claim.predicted, _strong(j.verdict)]
        for j in judgements
        if j.claim.predicted
    ]
    parts = ["Findings that were judged in settings of several kinds; an empty cell was not run."]
    parts.append(_table(("finding", *spec.sides.values()), side_by_side))
    if predicted:
        parts.append("What the identity of `minirl_edu/drift.py` predicts was written down before the seeds were run:")
        parts.append(_table(("claim", "", "predicted", "verdict"), predicted))
    return "\n\n".join(parts)


def _decisive(judgement: Judgement) -> Finding | None:
    """The finding that made the verdict what it is; the first where all hold."""
    for outcome in ("not run", "opposite", "inconclusive"):
        for finding in judgement.findings:
            if finding.outcome == outcome and judgement.verdict == outcome:
                return finding
    return next(iter(judgement.findings), None)


def _strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict in ("reproduced", "opposite") else verdict


def _link(figure: str, figures: Mapping[str, str]) -> str:
    return f"[{figure}]({figures[figure]})" if figure in figures else figure


def _section(spec: Spec, judgement: Judgement, tier: str, seeds: int, out: str, figures: Mapping[str, str]) -> str:
    claim = judgement.claim
    head = f"### {claim.id}\n\n**{claim.paper}** Verdict: {_strong(judgement.verdict)}."
    paper = f"- The paper's setting: {claim.setting}"
    if claim.not_testable:
        return f"{head}\n\n{paper}\n- Why it is not tested: {claim.not_testable}"
    settings, variants = (dict.fromkeys(names) for names in zip(*judgement.seconds, strict=True))
    runs, seconds = _cost([judgement])
    facts = [
        paper,
        *([f"- Predicted, before the seeds were run: {claim.predicted}"] if claim.predicted else []),
        *(f"- Ours: {_setting_words(spec, tier, name)}" for name in settings),
        f"- Compared: {', '.join(_variant_words(spec, name) for name in variants)}",
        f"- Figures: {', '.join(_link(name, figures) for name in claim.figures)}",
        f"- {runs} runs, {seconds / 60:.1f} minutes of one core: `{_command(claim.figures, tier, seeds, out)}`",
    ]
    if left_out := [name for name in settings if name in spec.tiers[tier].leave_out]:
        facts.append(f"- Tier `{tier}` leaves out {', '.join(f'`{name}`' for name in left_out)}.")
    across = _across(claim)
    table = _table(
        ("criterion", "", "effect, with its 95 % interval", "test", "p", "p, Holm", "seeds"),
        [_finding_row(spec, finding, across=across) for finding in judgement.findings],
    )
    marks = {_mark(finding) for finding in judgement.findings}
    notes = [note for mark, note in _NOTES.items() if mark in marks]
    return "\n\n".join([head, "\n".join(facts), table, *_deployed(spec, judgement), *notes])


def _cost(judgements: Sequence[Judgement]) -> tuple[int, float]:
    """Number of runs and their seconds; a run that several claims share counts once."""
    seconds = {run: times for judgement in judgements for run, times in judgement.seconds.items()}
    return sum(map(len, seconds.values())), math.fsum(second for times in seconds.values() for second in times)


def _finding_row(spec: Spec, finding: Finding, *, across: bool) -> list[str]:
    effect = finding.effect
    numbers = ["", "", "0"] if effect is None else [_p(effect.p), _p(finding.p_holm), str(effect.n)]
    words = _words(spec, finding.criterion, across=across)
    return [words, _strong(finding.outcome) + _mark(finding), finding.text, finding.test, *numbers]


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _deployed(spec: Spec, judgement: Judgement) -> list[str]:
    """What changes when the engine that samples is asked."""
    if judgement.rollout_verdict is None:
        return []
    if judgement.rollout_verdict == judgement.verdict:
        return ["With the scores of the rollout engine instead of the training engine's: the same verdict."]
    pairs = zip(judgement.findings, judgement.rollout_findings, strict=True)
    changes = [
        f"{_words(spec, there.criterion, across=_across(judgement.claim))}: {there.text}, {there.outcome}"
        for here, there in pairs
        if here.outcome != there.outcome
    ]
    return [
        "**The two engines disagree.** With the scores of the rollout engine, the one that would be deployed, the "
        f"verdict is {_strong(judgement.rollout_verdict)}. What changes: {'; '.join(changes)}."
    ]


def _mark(finding: Finding) -> str:
    """A dagger on a finding that rests on little; `_NOTES` explains it."""
    criterion, effect = finding.criterion, finding.effect
    if effect is None:
        return ""
    n = effect.n
    if criterion.kind == "more_collapse":
        undecidable = _least(n) >= 0.05
    else:
        undecidable = criterion.kind in ("collapses", "stable") and (
            proportion(n, n)[1] <= criterion.share <= proportion(0, n)[2]
        )
    if undecidable:
        return " †"
    alone = finding.test == _T_TEST and finding.outcome in ("holds", "opposite") and effect.p > 0.05
    return " ‡" if alone else ""


_NOTES = {
    " †": "† So few seeds cannot decide this, however they turn out.",
    " ‡": "‡ This rests on Student's t, which takes the differences between seeds for roughly normal. The sign-flip "
    "test, which doesn't, does not confirm it; with fewer than 6 seeds it cannot.",
}


def _least(seeds: int) -> float:
    """The smallest two-sided p-value of an exact paired test."""
    return 2.0 ** (1 - seeds)


# ------------------------------------------------------------------------------------------------------ as sentences


def _across(claim: Claim) -> bool:
    """Whether the claim speaks of several settings, so that labels must say which."""
    return len({setting for setting, _ in _runs_of(claim)}) > 1


def _words(spec: Spec, criterion: Criterion, *, across: bool) -> str:
    """The criterion as a phrase in Markdown."""
    run, than = (
        "" if side is None else f"*{spec.variants[side[1]].label}*" + (f" ({side[0]})" if across else "")
        for side in (criterion.run, criterion.than)
    )
    share = "half" if criterion.share == 0.5 else _percent(criterion.share)
    match criterion.kind:
        case "collapses":
            return f"more than {share} of the runs of {run} collapse"
        case "stable":
            return f"fewer than {share} of the runs of {run} collapse"
        case "more_collapse":
            return f"{run} collapses more often than {than}"
        case "learns":
            return f"{run} ends above its score before training"
        case "unlearns":
            return f"{run} ends below its score before training"
    assert criterion.metric is not None
    metric = METRICS[criterion.metric]
    if criterion.kind == "comparable":
        return f"{metric.words}: {run} and {than} {_margin_words(criterion.margin, metric.log, 'within')}"
    word, other = ("above", "below") if criterion.kind == "higher" else ("below", "above")
    neutral = 1.0 if metric.log else 0.0
    margin = neutral if criterion.margin is None else criterion.margin
    if margin == neutral:
        return f"{metric.words}: {run} {word} {than}"
    if margin > neutral:
        return f"{metric.words}: {run} {word} {than} {_margin_words(margin, metric.log, 'by more than')}"
    allowed = 1 / margin if metric.log else -margin
    return f"{metric.words}: {run} not {other} {than} {_margin_words(allowed, metric.log, 'by more than')}"


def _margin_words(margin: float | None, log: bool, before: str) -> str:
    assert margin is not None
    return f"{before} a factor of {margin:g}" if log else f"{before} {100 * margin:g} points"


def _setting_words(spec: Spec, tier: str, name: str) -> str:
    """A setting in the terms of the paper, from its config."""
    config = spec.config(tier, name, None, spec.first_seed)
    train, rollout = config.train, config.rollout
    rounding = f", {rollout.rounding} rounding" if rollout.precision != "fp32" else ""
    noise = f" with noise of {rollout.router_noise:g} on the routers" if rollout.router_noise else ""
    return (
        f"`{name}`, {spec.settings[name].about}. Rollouts in {rollout.precision}{rounding}{noise}, training in "
        f"{config.model.dtype}; {train.mini_batch_prompts * train.group_size} responses per update "
        f"({train.mini_batch_prompts} prompts × {train.group_size}), N = {train.mini_batches}, {train.global_steps} "
        f"global steps ({train.global_steps * train.mini_batches} updates), learning rate {train.lr:g} "
        f"({train.lr_schedule.replace('_', ' ')})."
    )


def _variant_words(spec: Spec, name: str) -> str:
    variant = spec.variants[name]
    return f"{variant.label} ({_overrides(variant.overrides)})" if variant.overrides else variant.label


def _overrides(overrides: Mapping[str, Any]) -> str:
    values = {field: str(value).lower() if isinstance(value, bool) else value for field, value in overrides.items()}
    return ", ".join(f"`{field}: {value}`" for field, value in values.items()) or "none"


def _method(spec: Spec, judgements: Sequence[Judgement], seeds: int) -> str:
    tested = {finding.criterion for judgement in judgements for finding in judgement.findings if finding.effect}
    share, last = spec.definitions.collapse_share, spec.definitions.final_evaluations
    text = f"""\
- The criteria, their margins and the thresholds were fixed before these seeds were run, in
  `minirl_edu/experiments/paper.yaml`; the settings were found with other seeds.
- The final score is the mean of the last {last} evaluations on held-out problems, in points from 0 to 100. A run has
  collapsed if its final score is below {_percent(share)} of its best, or if it diverged; a run that diverged has a
  final score of 0.
- Runs with the same seed start alike, and in one setting they see the same problems: variants are compared seed by
  seed. Scores are compared by differences, entropies and KL by ratios.
- Where a criterion is about means, the 95 % interval (Student's t) decides; p is the two-sided sign-flip test's, which
  assumes no distribution. *Within* a margin is shown by two one-sided t-tests at 5 %, with the 90 % interval that
  belongs to them. Rates of collapse have Clopper and Pearson's interval; two of them are compared by the exact sign
  test, beside Newcombe's interval.
- *Reproduced* needs every criterion, so chance alone makes it at most 1 in 20 times. *Opposite* needs only one: with
  several criteria, chance makes it more often than that.
- *p, Holm* is adjusted for all {len(tested)} criteria; verdicts are made without it, one claim at a time."""
    if _least(seeds) * len(tested) > 0.05:
        text += f""" With
  {seeds} seeds an exact test cannot give a p below {_p(_least(seeds))}, so most adjusted values must be large, however
  clear the effect: read the intervals."""
    return "\n".join(f"- *{word}*: {meaning}." for word, meaning in VERDICTS.items()) + "\n" + text


def _what_was_run(spec: Spec, judgements: Sequence[Judgement], tier: str) -> str:
    runs = dict.fromkeys(run for judgement in judgements for run in judgement.seconds)
    settings, variants = (list(dict.fromkeys(run[side] for run in runs)) for side in (0, 1))
    return "\n\n".join(
        [
            f"What all runs share and the defaults don't say: {_overrides(spec.base)}.",
            _table(
                ("setting", "what it is", "what it changes"),
                [[f"`{name}`", spec.settings[name].about, _overrides(_own(spec, tier, name))] for name in settings],
            ),
            _table(
                ("variant", "label", "what it changes"),
                [[f"`{v.name}`", v.label, _overrides(v.overrides)] for v in map(spec.variants.__getitem__, variants)],
            ),
        ]
    )


def _own(spec: Spec, tier: str, setting: str) -> dict[str, Any]:
    """What a setting changes in what all runs share."""
    overrides = spec.overrides(tier, setting)
    return {key: value for key, value in overrides.items() if key not in spec.base or spec.base[key] != value}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
