"""Verdicts: each kind of criterion on data where the answer is known, and what CLAIMS.md says of them.

Runs are made up: eight seeds, unless said otherwise, with a noise of about 0.01 in a fixed order.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from minirl_edu.doctor import environment
from minirl_edu.experiments.claims import VERDICTS, Judgement, claims_markdown, judge
from minirl_edu.experiments.spec import (
    COLUMNS,
    Claim,
    Criterion,
    Definitions,
    Figure,
    Run,
    RunResult,
    Setting,
    Spec,
    Tier,
    Variant,
)

A, B, C = ("near", "plain"), ("near", "hot"), ("far", "plain")
NOISE = 0.01 * np.array([0.3, -1.1, 0.8, -0.2, 1.3, -0.9, 0.1, -0.4, 0.6, -0.7, 0.2, 0.0])


def result(seed: int, final: float = 0.9, *, start=0.4, peak=None, rollout=None, diverged=None, entropy=1.0, kl=1e-3):
    """A run of 30 steps, evaluated at 0, 10, 20 and 30: `start`, `peak` (None: the final score) and twice `final`.

    `rollout`: final scores of the rollout engine, which else has none."""
    steps = np.arange(31.0)
    metrics = {name: np.full(31, math.nan) for name in COLUMNS}
    metrics |= {"grad_step": steps, "global_step": steps}
    metrics["score"][::10] = [start, final if peak is None else peak, final, final]
    if rollout is not None:
        metrics["score_rollout"][::10] = [start, final if peak is None else peak, rollout, rollout]
    metrics["entropy"][1:], metrics["k3_rollout_old"][1:] = entropy, kl
    return RunResult(seed, metrics, diverged, digest="", seconds=30.0)


def seeds(final: float, n: int = 8, **more) -> list[RunResult]:
    """Runs that end near `final`."""
    return [result(seed, final + NOISE[seed], **more) for seed in range(n)]


def collapsing(k: int, n: int = 8) -> list[RunResult]:
    """The first k of n seeds collapse."""
    return [result(seed, 0.2 if seed < k else 0.8, peak=0.8) for seed in range(n)]


NOISY = {"rollout.precision": "fp32", "rollout.router_noise": 0.3}


def spec(*claims: Claim) -> Spec:
    return Spec(
        base={"train.lr": 1e-3, "rollout.precision": "int4"},
        settings={
            "near": Setting("near", "one update per rollout", {}),
            "far": Setting("far", "four updates per rollout", {"train.mini_batches": 4, **NOISY}),
        },
        variants={
            "plain": Variant("plain", "MiniRL", {}),
            "hot": Variant("hot", "hot | fast", {"train.lr": 1e-2, "algorithm.clip": False}),
        },
        figures={"one": Figure("one", "One", (A, B)), "two": Figure("two", "Two", (C,))},
        tiers={"fast": Tier("fast", 3, {"near": {"train.global_steps": 7}}, leave_out=("far",))},
        grids={},
        groups={},
        first_seed=0,
        first_calibration_seed=1000,
        definitions=Definitions(final_evaluations=2, collapse_share=0.7),
        claims=claims,
    )


def claim(*criteria: Criterion, name: str = "C1") -> Claim:
    return Claim(name, f"Finding {name}.", "30B", ("one",), criteria)


def verdict(criterion: Criterion, results: dict[Run, list[RunResult]]) -> str:
    """The outcome of a single criterion, which must be its claim's verdict too."""
    (judgement,) = judge(spec(claim(criterion)), results)
    (finding,) = judgement.findings
    assert judgement.verdict == {"holds": "reproduced"}.get(finding.outcome, finding.outcome)
    return finding.outcome


# ------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("kind", "margin", "a", "b", "outcome"),
    [
        ("higher", None, 0.90, 0.85, "holds"),
        ("higher", None, 0.85, 0.90, "opposite"),
        ("higher", None, 0.90, 0.90, "inconclusive"),
        ("higher", 0.03, 0.90, 0.85, "holds"),
        ("higher", 0.08, 0.90, 0.85, "inconclusive"),  # higher, but not by so much: no contradiction
        ("higher", 0.08, 0.85, 0.90, "opposite"),
        ("lower", None, 0.85, 0.90, "holds"),
        ("lower", None, 0.90, 0.85, "opposite"),
        ("lower", -0.03, 0.90, 0.90, "holds"),  # "no gain": at most 3 points above
        ("lower", -0.03, 0.91, 0.90, "holds"),  # above, but by less than that
        ("lower", -0.03, 0.95, 0.90, "opposite"),
        ("higher", -0.03, 0.89, 0.90, "holds"),
        ("comparable", 0.03, 0.90, 0.90, "holds"),
        ("comparable", 0.03, 0.90, 0.95, "opposite"),
        ("comparable", 0.03, 0.95, 0.90, "opposite"),
        ("comparable", 0.03, 0.90, 0.93, "inconclusive"),
    ],
)
def test_scores_are_compared_seed_by_seed(kind, margin, a, b, outcome):
    # Differences between seeds have a standard deviation of about 0.01: ± 0.01 at 95 % with 8 of them.
    results = {A: seeds(a), B: [result(seed, b + NOISE[seed + 3]) for seed in range(8)]}
    assert verdict(Criterion(kind, A, B, "final_score", margin), results) == outcome


def test_being_apart_has_the_same_p_value_in_both_directions():
    """One seed of eight is within the margin of 3 points: not the smallest p, and not that of a difference from 0."""
    apart = [0.05, 0.05, 0.06, 0.04, 0.05, 0.06, 0.05, 0.028]
    results = {
        A: [result(seed, 0.8 + by) for seed, by in enumerate(apart)],
        B: [result(seed, 0.8) for seed in range(8)],
    }
    criteria = [Criterion("comparable", *sides, "final_score", 0.03) for sides in ((A, B), (B, A))]
    (judgement,) = judge(spec(claim(*criteria)), results)
    assert judgement.verdict == "opposite"
    # The other patterns that reach the mean distance are those with or without that seed's flip: 4 of 256.
    assert [f.effect.p for f in judgement.findings if f.effect] == pytest.approx([4 / 256] * 2)


def test_what_a_seed_does_to_both_runs_drops_out():
    spread = np.linspace(0.3, 0.9, 8)
    results = {
        A: [result(seed, level + 0.02 + 0.2 * NOISE[seed]) for seed, level in enumerate(spread)],
        B: [result(seed, level) for seed, level in enumerate(spread)],
    }
    assert verdict(Criterion("higher", A, B, "final_score"), results) == "holds"
    # The seeds decide what belongs together, not the order of the list.
    results[B].reverse()
    assert verdict(Criterion("higher", A, B, "final_score"), results) == "holds"


def test_only_seeds_that_both_runs_have_count():
    results = {A: seeds(0.9), B: [result(seed, 0.8) for seed in (7, 3, 5, 100)]}
    (judgement,) = judge(spec(claim(Criterion("higher", A, B, "final_score"))), results)
    effect = judgement.findings[0].effect
    assert effect is not None and effect.n == 3
    assert effect.estimate == pytest.approx(0.1 + NOISE[[3, 5, 7]].mean())


def test_a_diverged_run_counts_as_a_score_of_zero():
    results = {A: seeds(0.9), B: seeds(0.95, diverged="nan")}
    assert verdict(Criterion("higher", A, B, "final_score"), results) == "holds"
    assert verdict(Criterion("collapses", B), results) == "holds"


@pytest.mark.parametrize(
    ("kind", "margin", "kl", "outcome"),
    [
        ("lower", None, 4e-4, "holds"),
        ("lower", 2.0, 4e-4, "holds"),
        ("lower", 3.0, 4e-4, "inconclusive"),
        ("lower", None, 2e-3, "opposite"),
        ("lower", 0.5, 1.5e-3, "holds"),  # a factor below 1: at most twice as large
        ("lower", 0.5, 3e-3, "opposite"),
        ("comparable", 2.0, 1.2e-3, "holds"),
        ("comparable", 2.0, 3e-3, "opposite"),
    ],
)
def test_kl_and_entropy_are_compared_as_ratios(kind, margin, kl, outcome):
    def runs(level):  # all decades alike: an arithmetic mean would be the largest seed's alone
        return [result(seed, kl=level * 10 ** (seed - 4) * (1 + NOISE[seed])) for seed in range(8)]

    results = {A: runs(kl), B: [result(seed, kl=1e-3 * 10 ** (seed - 4)) for seed in range(8)]}
    assert verdict(Criterion(kind, A, B, "kl", margin), results) == outcome


def test_an_entropy_of_exactly_zero_is_a_small_one():
    results = {A: seeds(0.9, entropy=0.0), B: seeds(0.9, entropy=0.5)}
    assert verdict(Criterion("lower", A, B, "final_entropy", 2.0), results) == "holds"


def test_learning_is_judged_within_a_run():
    assert verdict(Criterion("learns", A), {A: seeds(0.9, start=0.4)}) == "holds"
    assert verdict(Criterion("learns", A), {A: seeds(0.4, start=0.4)}) == "inconclusive"
    assert verdict(Criterion("learns", A), {A: seeds(0.3, start=0.4)}) == "opposite"
    assert verdict(Criterion("unlearns", A), {A: seeds(0.3, start=0.4)}) == "holds"
    assert verdict(Criterion("unlearns", A), {A: seeds(0.4, start=0.4)}) == "inconclusive"
    assert verdict(Criterion("unlearns", A), {A: seeds(0.9, start=0.4)}) == "opposite"


# ---------------------------------------------------------------------------------------------------------- collapse


@pytest.mark.parametrize(
    ("kind", "share", "k", "n", "outcome"),
    [
        ("collapses", 0.5, 8, 8, "holds"),  # 63 % to 100 %
        ("collapses", 0.5, 7, 8, "inconclusive"),  # 47 % to 100 %
        ("collapses", 0.5, 1, 8, "inconclusive"),  # 0 % to 53 %
        ("collapses", 0.5, 0, 8, "opposite"),  # 0 % to 37 %: significantly stable
        ("collapses", 0.5, 5, 5, "inconclusive"),  # five seeds cannot show it
        ("collapses", 0.25, 3, 3, "holds"),  # 29 % to 100 %
        ("collapses", 0.25, 0, 8, "inconclusive"),  # up to 37 %: a quarter is still possible
        ("stable", 0.5, 0, 8, "holds"),
        ("stable", 0.5, 1, 8, "inconclusive"),
        ("stable", 0.5, 8, 8, "opposite"),
    ],
)
def test_rates_of_collapse(kind, share, k, n, outcome):
    assert verdict(Criterion(kind, A, share=share), {A: collapsing(k, n)}) == outcome


@pytest.mark.parametrize(
    ("a", "b", "outcome"), [(8, 0, "holds"), (8, 2, "holds"), (5, 0, "inconclusive"), (0, 0, "inconclusive")]
)
def test_more_collapse_needs_six_seeds_of_evidence(a, b, outcome):
    assert verdict(Criterion("more_collapse", A, B), {A: collapsing(a), B: collapsing(b)}) == outcome


def test_more_collapse_the_other_way():
    assert verdict(Criterion("more_collapse", A, B), {A: collapsing(0), B: collapsing(7)}) == "opposite"


# ------------------------------------------------------------------------------------------------------------ claims

HOLDS, OPPOSITE = Criterion("stable", A), Criterion("collapses", A)
UNDECIDED, MISSING = Criterion("higher", A, B, "final_score"), Criterion("stable", C)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([HOLDS], "reproduced"),
        ([HOLDS, UNDECIDED], "inconclusive"),
        ([HOLDS, UNDECIDED, OPPOSITE], "opposite"),
        ([HOLDS, MISSING], "not run"),
        ([OPPOSITE, MISSING], "not run"),
    ],
)
def test_a_claim_needs_all_its_criteria(criteria, expected):
    results = {A: seeds(0.9), B: [result(seed, 0.9 + NOISE[seed + 3]) for seed in range(8)]}
    (judgement,) = judge(spec(claim(*criteria)), results)
    assert judgement.verdict == expected
    assert len(judgement.findings) == len(criteria)


def test_without_evaluations_nothing_is_judged():
    results = {A: [result(seed, math.nan, start=math.nan) for seed in range(8)], B: seeds(0.9)}
    assert verdict(Criterion("higher", A, B, "final_score"), results) == "not run"


def test_no_claim_is_dropped():
    ceiling = Claim("L", "A limit.", "30B", (), (), not_testable="One size only.")
    judgements = judge(spec(claim(HOLDS, name="C1"), ceiling, claim(MISSING, name="C2")), {A: seeds(0.9)})
    assert [(j.claim.id, j.verdict) for j in judgements] == [
        ("C1", "reproduced"), ("L", "not testable at this size"), ("C2", "not run"),
    ]  # fmt: skip


def test_p_values_are_adjusted_for_every_distinct_criterion():
    higher = Criterion("higher", A, B, "final_score")
    results = {A: seeds(0.9), B: [result(seed, 0.8) for seed in range(8)]}
    judgements = judge(spec(claim(HOLDS, higher), claim(higher, name="C2"), claim(MISSING, name="C3")), results)
    findings = [finding for judgement in judgements for finding in judgement.findings]
    # Two were tested, each with the smallest p that 8 seeds can give; the shared one counts once.
    assert [finding.p_holm for finding in findings[:3]] == pytest.approx([2 * 2 / 256] * 3)
    assert math.isnan(findings[3].p_holm)


def test_the_rollout_engine_may_disagree():
    higher, lower_kl = Criterion("higher", A, B, "final_score"), Criterion("lower", A, B, "kl")
    results = {A: seeds(0.9, rollout=0.3, kl=1e-4), B: seeds(0.8, rollout=0.7, kl=1e-3)}
    (judgement,) = judge(spec(claim(lower_kl, higher)), results)
    assert (judgement.verdict, judgement.rollout_verdict) == ("reproduced", "opposite")
    assert [finding.outcome for finding in judgement.rollout_findings] == ["holds", "opposite"]
    # Collapse is seen through the same engine: 0.9 before, 0.3 in the end.
    (judgement,) = judge(spec(claim(HOLDS)), results)
    assert (judgement.verdict, judgement.rollout_verdict) == ("reproduced", "opposite")


def test_the_rollout_engine_is_not_asked_where_it_cannot_tell():
    (about_kl,) = judge(
        spec(claim(Criterion("lower", A, B, "kl"))), {run: seeds(0.9, rollout=0.5) for run in (A, B)}
    )  # fmt: skip
    assert about_kl.rollout_verdict is None
    one_without = {A: seeds(0.9, rollout=0.5), B: seeds(0.8)}
    (judgement,) = judge(spec(claim(Criterion("higher", A, B, "final_score"))), one_without)
    assert judgement.rollout_verdict is None


# --------------------------------------------------------------------------------------------------------- CLAIMS.md


def markdown(*claims: Claim, results: dict[Run, list[RunResult]], seeds: int = 8) -> tuple[str, list[Judgement]]:
    s = spec(*claims)
    judgements = judge(s, results)
    text = claims_markdown(
        s, judgements, tier="fast", seeds=seeds, out="results", environment=environment(),
        figures={"one": "figures/one.png"},
    )  # fmt: skip
    return text, judgements


def section(text: str, name: str) -> str:
    return text.split(f"### {name}\n")[1].split("\n#")[0]


def test_claims_markdown_shows_a_finding_in_several_settings_side_by_side_and_what_was_predicted():
    first = replace(claim(HOLDS), side="alike")
    again = replace(first, id="C1-longer", side="longer", findings=("C1",), predicted="The entropy falls.")
    alone = replace(first, id="C2")
    s = replace(spec(first, again, alone), sides={"alike": "lengths alike", "longer": "wrong ones longer"})
    judgements = judge(s, {A: seeds(0.9), B: seeds(0.8)})
    text = claims_markdown(
        s, judgements, tier="fast", seeds=8, out="results", environment=environment(), figures={}
    )  # fmt: skip
    page = text.split("## Side by side")[1].split("\n## ")[0]
    assert "| finding | lengths alike | wrong ones longer |" in page
    row = next(line for line in page.splitlines() if line.startswith("| Finding C1."))
    assert row.index("([C1](#c1))") < row.index("([C1-longer](#c1-longer))") and "C2" not in page
    assert "| [C1-longer](#c1-longer) | Finding C1. | The entropy falls. | " in page
    assert "before the seeds were run: The entropy falls." in section(text, "C1-longer")
    assert "Side by side" not in markdown(claim(HOLDS), results={A: seeds(0.9), B: seeds(0.8)})[0]


def test_claims_markdown_says_what_was_found_and_how():
    ceiling = Claim("L1", "A limit.", "30B", (), (), not_testable="There is one size only.")
    criteria = (Criterion("higher", A, B, "final_score"), Criterion("lower", A, B, "kl", 2.0), HOLDS)
    text, _ = markdown(
        claim(*criteria), ceiling, results={A: seeds(0.9, kl=1e-4), B: [result(i, 0.8) for i in range(8)]}
    )

    row = next(line for line in text.splitlines() if line.startswith("| [C1]"))
    assert "**reproduced**" in row and "[one](figures/one.png)" in row
    assert "+10.0 points (+9.3 to +10.7)" in row
    assert "| not testable at this size | There is one size only. |" in text

    body = section(text, "C1")
    assert "**Finding C1.** Verdict: **reproduced**." in body
    assert "The paper's setting: 30B" in body
    # Ours, from the config: 32 × 8 responses are its defaults, 7 steps the tier's.
    assert "256 responses per update (32 prompts × 8), N = 1, 7 global steps (7 updates), learning rate 0.001" in body
    assert "Rollouts in int4, nearest rounding, training in float32" in body and "`algorithm.clip: false`" in body
    assert "16 runs, 8.0 minutes of one core: `minirl reproduce one --tier fast --seeds 8 --out results`" in body
    assert "final score: *MiniRL* above *hot \\| fast* | holds | +10.0 points" in body
    assert "*MiniRL* below *hot \\| fast* by more than a factor of 2 | holds | × 0.1 (0.1 to 0.1)" in body
    assert "| 0 of 8 collapsed: 0 % (0 % to 37 %) | exact binomial | 0.0078 | 0.023 | 8 |" in body
    assert "Why it is not tested: There is one size only." in section(text, "L1")
    assert all(f"*{word}*: {meaning}" in text for word, meaning in VERDICTS.items())


def test_every_table_of_claims_markdown_is_one():
    text, _ = markdown(claim(HOLDS), claim(MISSING, name="C2"), results={A: seeds(0.9), B: seeds(0.9)})
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 5  # verdicts, two claims, settings, variants
    for table in tables:
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1


def test_claims_markdown_names_what_is_missing():
    text, _ = markdown(claim(HOLDS, MISSING), results={A: seeds(0.9)})
    assert "Rollouts in fp32 with noise of 0.3 on the routers, training in float32" in text
    row = next(line for line in text.splitlines() if line.startswith("| [C1]"))
    assert "| not run |" in row and "fewer than half of the runs of *MiniRL* (far) collapse" in row
    assert "Tier `fast` leaves out `far`." in section(text, "C1")


def test_claims_markdown_shows_the_decisive_criterion():
    text, _ = markdown(claim(HOLDS, OPPOSITE), results={A: seeds(0.9)})
    row = next(line for line in text.splitlines() if line.startswith("| [C1]"))
    assert "**opposite** | more than half of the runs of *MiniRL* collapse<br>0 of 8 collapsed" in row


def test_claims_markdown_says_where_the_engines_disagree():
    criterion = Criterion("higher", A, B, "final_score")
    apart = {A: seeds(0.9, rollout=0.5), B: [result(i, 0.8, rollout=0.7) for i in range(8)]}
    text, (judgement,) = markdown(claim(HOLDS, criterion), results=apart)
    assert judgement.rollout_verdict == "opposite"
    assert "**The two engines disagree.**" in section(text, "C1")
    assert "the verdict is **opposite**. What changes: final score: *MiniRL* above *hot | fast*: −20.0 points" in text
    alike = {A: seeds(0.9, rollout=0.8), B: [result(i, 0.8, rollout=0.7) for i in range(8)]}
    body = section(markdown(claim(criterion), results=alike)[0], "C1")
    assert "the same verdict" in body and "disagree" not in body


def test_claims_markdown_warns_of_few_seeds():
    criteria = (Criterion("higher", A, B, "final_score"), Criterion("collapses", B))
    few = {A: seeds(0.9, 3), B: [result(i, 0.2 + 0.1 * NOISE[i], peak=0.8) for i in range(3)]}
    body = section(markdown(claim(*criteria), results=few, seeds=3)[0], "C1")
    assert "| holds ‡ |" in body and "with fewer than 6 seeds it cannot" in body
    assert "| inconclusive † |" in body and "So few seeds cannot decide this" in body
    enough = {A: seeds(0.9), B: [result(i, 0.2 + 0.1 * NOISE[i], peak=0.8) for i in range(8)]}
    body = section(markdown(claim(*criteria), results=enough)[0], "C1")
    assert "†" not in body and "‡" not in body


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (Criterion("comparable", A, B, "best_score", 0.03), "best score: *MiniRL* and *hot | fast* within 3 points"),
        (Criterion("comparable", A, B, "kl", 2.0), "*MiniRL* and *hot | fast* within a factor of 2"),
        (Criterion("higher", A, B, "final_score", 0.02), "*MiniRL* above *hot | fast* by more than 2 points"),
        (
            Criterion("lower", A, B, "final_score", -0.02),
            "final score: *MiniRL* not above *hot | fast* by more than 2 points",
        ),
        (Criterion("lower", A, B, "kl", 0.5), "*MiniRL* not above *hot | fast* by more than a factor of 2"),
        (Criterion("higher", A, C, "final_score"), "*MiniRL* (near) above *MiniRL* (far)"),
        (Criterion("more_collapse", A, B), "*MiniRL* collapses more often than *hot | fast*"),
        (Criterion("collapses", A, share=0.25), "more than 25 % of the runs of *MiniRL* collapse"),
        (Criterion("learns", A), "*MiniRL* ends above its score before training"),
        (Criterion("unlearns", A), "*MiniRL* ends below its score before training"),
    ],
)
def test_criteria_in_words(criterion, words):
    text, _ = markdown(claim(criterion), results={A: seeds(0.9), B: seeds(0.9), C: seeds(0.9)})
    assert words.replace("|", "\\|") in text
