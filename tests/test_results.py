"""The stored results are those of the spec that ships; CLAIMS.md, EARLY_WARNING.md and the site say what they say.

`python -m tests.test_results` puts CLAIMS.md's verdicts into that page, lessons/site/results.md.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minirl_edu.archives import files_in
from minirl_edu.experiments import runner
from minirl_edu.experiments.claims import judge
from minirl_edu.experiments.reproduce import early_warning_page
from minirl_edu.experiments.runner import finished_runs, jobs_for
from minirl_edu.experiments.spec import Spec, load_spec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "lessons" / "results"
PAGE = ROOT / "lessons" / "site" / "results.md"
TIER, SEEDS = "full", 8


@pytest.fixture(scope="module", autouse=True)
def reads_once() -> Iterator[None]:
    """An archive is unpacked and a run is parsed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("files_in", "parse_run"):
            patch.setattr(runner, name, functools.cache(getattr(runner, name)))
        yield


@pytest.fixture(scope="module")
def spec() -> Spec:
    return load_spec()


@pytest.mark.slow
def test_every_stored_run_is_one_of_the_specs_and_made_with_its_config(spec: Spec):
    jobs = {job.path: job for job in jobs_for(spec, list(spec.figures), RESULTS, tier=TIER, seeds=SEEDS)}
    archives = sorted((RESULTS / "runs").rglob("*.tar.bz2"))
    folders = [archive.with_name(archive.name.removesuffix(".tar.bz2")) for archive in archives]
    stored = {folder / name for folder in folders for name in files_in(folder)}
    assert stored and not [path for path in stored if path not in jobs]
    found = finished_runs([jobs[path] for path in stored])  # leaves out those of another config
    assert sum(map(len, found.values())) == len(stored)
    assert all(run.metrics["grad_step"][-1] > 0 for runs in found.values() for run in runs)


def test_every_stored_run_is_in_its_archive_and_the_results_are_small():
    assert not [path for path in (RESULTS / "runs").rglob("*.csv") if ".old" not in path.name]
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.suffix != ".svg" and path.is_file()) < 10e6


@pytest.mark.slow
def test_claims_md_is_what_the_stored_runs_say(spec: Spec):
    figures = [name for name in spec.figures if name not in spec.grids]
    judgements = judge(spec, finished_runs(jobs_for(spec, figures, RESULTS, tier=TIER, seeds=SEEDS)))
    page = (RESULTS / "CLAIMS.md").read_text(encoding="utf-8")
    lines = page.split("## Verdicts")[1].split("\n## ")[0].splitlines()
    for judgement in judgements:
        (row,) = (line for line in lines if line.startswith(f"| [{judgement.claim.id}]"))
        assert row.split(" | ")[2].strip("*") == judgement.verdict


def verdict_table() -> str:
    """CLAIMS.md's table of verdicts as the site's page of results shows it, links led from there."""
    lines = (RESULTS / "CLAIMS.md").read_text(encoding="utf-8").splitlines()
    table = []
    for line in lines[lines.index("## Verdicts") + 2 :]:
        if not line.startswith("|"):
            break
        claim, finding, verdict, effect, _figure = line.removeprefix("| ").removesuffix(" |").split(" | ")
        effect = re.sub(r"<br>\[and \d+ more\]\(#[\w-]+\)", "", effect).replace("<br>", ": ", 1)
        claim = claim.replace("(#", "(../results/CLAIMS.md#")
        table.append(f"| {claim} | {finding} | {verdict} | {effect} |")
    return "\n".join(table)


def test_the_page_of_results_shows_the_verdicts():
    assert verdict_table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_early_warning_md_is_what_the_stored_runs_say(spec: Spec):
    page, _ = early_warning_page(spec, RESULTS, tier=TIER, seeds=SEEDS)
    assert page == (RESULTS / "EARLY_WARNING.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    text, table = PAGE.read_text(encoding="utf-8"), verdict_table()
    start = text.index(table.partition("\n")[0])
    end = text.find("\n\n", start)
    PAGE.write_text(text[:start] + table + (text[end:] if end > 0 else "\n"), encoding="utf-8")
