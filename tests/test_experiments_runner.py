"""Running the experiments: every run ends in a file or in a report of why not, whoever is killed on the way."""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from minirl_edu.archives import archive_of, files_in, pack
from minirl_edu.config import Config, ConfigError, load_config
from minirl_edu.experiments import runner
from minirl_edu.experiments.runner import (
    Job,
    Outcome,
    config_digest,
    finished_runs,
    jobs_for,
    run_all,
    run_header,
    run_one,
)
from minirl_edu.experiments.spec import (
    COLUMNS,
    Definitions,
    Figure,
    RunResult,
    Setting,
    Spec,
    Tier,
    Variant,
    parse_run,
    read_run,
    read_runs,
    write_run,
)
from minirl_edu.run.folder import FolderInUse
from tests.forked import Forked

SMALL = (
    "train.global_steps=3",
    "train.mini_batch_prompts=2",
    "train.group_size=2",
    "train.lr=1e-3",
    "eval.every=2",
    "eval.problems=4",
    "rollout.precision=int4",
)
DIVERGES = ("train.lr=1e30", "train.mini_batches=2")


def job(out: Path, variant: str, *overrides: str, seed: int = 0) -> Job:
    config = replace(load_config(None, [*SMALL, *overrides]), seed=seed)
    return Job(("fast", "small", variant, seed), config, runner.run_path(out, "fast", "small", variant, seed))


def train(job: Job) -> RunResult:
    """The run in this very process."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    run_one(job.config, job.path, header=run_header(job.config))
    return read_run(job.path)


def content(job: Job) -> bytes:
    """The run's CSV, packed or not."""
    return files_in(job.folder)[f"{job.key[2]}/{job.path.name}"]


def stored(job: Job) -> RunResult:
    """The run, packed or not."""
    return parse_run(content(job), job.path)


def numbers(job: Job) -> list[bytes]:
    """The file without its first line, which holds the seconds."""
    return content(job).splitlines()[1:]


def wait_for(condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.005)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if any("runner import _work" in part for part in child.cmdline())]


def steps_in(job: Job) -> int:
    """Lines of metrics of a run that is under way."""
    path = job.path.with_name(f".{job.path.stem}") / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# ------------------------------------------------------------------------------------------------------------ one run


def test_a_run_leaves_a_row_per_gradient_step_and_nothing_else(tmp_path):
    run = job(tmp_path, "minirl", "train.mini_batches=2", seed=3)
    ticks = []
    run.path.parent.mkdir(parents=True)
    run_one(run.config, run.path, header=run_header(run.config), tick=ticks.append)
    header, columns, *rows = run.path.read_text().splitlines()
    said = json.loads(header.removeprefix("# "))
    assert said["config"].items() >= {"seed": 3, "train.lr": 1e-3, "rollout.precision": "int4"}.items()
    assert "train.weight_decay" not in said["config"]  # a default
    assert said["digest"] == config_digest(run.config) and said["diverged"] is None and said["seconds"] > 0
    assert columns.split(",") == list(COLUMNS)
    cells = [dict(zip(COLUMNS, row.split(","), strict=True)) for row in rows]
    assert [(row["global_step"], row["grad_step"]) for row in cells] == [
        ("0", "0"), *((str(1 + i // 2), str(1 + i)) for i in range(6)),
    ]  # fmt: skip
    assert [row["grad_step"] for row in cells if row["score"]] == ["0", "4", "6"]
    assert cells[0]["reward"] == "" and all(row["reward"] and row["entropy"] for row in cells[1:])
    assert ticks == [2, 2, 2]
    assert os.listdir(run.path.parent) == ["seed3.csv"]


@pytest.mark.parametrize(
    ("overrides", "rows", "cause"),
    [
        (DIVERGES, 1, "global step 1, gradient step 2: a gradient norm of nan"),
        # On-policy nothing looks at the broken weights before the engine samples from them.
        (
            ("train.lr=1e38",),
            2,
            "global step 2, gradient step 2: weights of model.embed_tokens.weight that are not finite",
        ),
    ],
)
def test_a_run_that_diverges_keeps_what_was_measured_and_says_why(tmp_path, overrides, rows, cause):
    run = job(tmp_path, "hot", *overrides)
    result = train(run)
    assert result.diverged is not None and result.diverged.startswith(cause)
    assert "checkpoint" not in result.diverged and str(tmp_path) not in result.diverged
    assert result.metrics["grad_step"].tolist() == list(range(rows))
    assert os.listdir(run.path.parent) == ["seed0.csv"]


def test_a_run_that_cannot_start_leaves_no_file(tmp_path):
    run = job(tmp_path, "broken", "task.options={colour: 3}")
    with pytest.raises(ConfigError, match="colour"):
        train(run)
    assert os.listdir(run.path.parent) == []


def test_a_run_cut_short_by_a_signal_is_not_taken_for_a_finished_one(tmp_path):
    run = job(tmp_path, "minirl")
    with pytest.raises(KeyboardInterrupt):  # SIGTERM lets the trainer finish its step and return as if all were well
        run_one(run.config, tmp_path / "seed0.csv", header={}, tick=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert os.listdir(tmp_path) == []


def test_the_digest_is_of_everything_that_moves_a_number_and_of_nothing_else(tmp_path, monkeypatch):
    digest = config_digest(job(tmp_path, "minirl").config)
    for change in ("train.lr=1e-4", "task.options={max_operands: 4}", "algorithm.replay=R3", "eval.every=3"):
        assert config_digest(job(tmp_path, "minirl", change).config) != digest, change
    assert config_digest(job(tmp_path, "minirl", seed=1).config) != digest
    assert config_digest(job(tmp_path, "minirl", "output.save_every=7").config) == digest
    monkeypatch.setattr(runner, "RESULTS_VERSION", runner.RESULTS_VERSION + 1)
    assert config_digest(job(tmp_path, "minirl").config) != digest


def test_a_default_that_changes_is_noticed():
    """Stored runs say what differs from the defaults. If this fails: does the change move any run's numbers? Then raise
    `RESULTS_VERSION`. If not (a new field whose default keeps things as they were), only take over the new number."""
    defaults = {section: fields for section, fields in Config().to_dict().items() if section != "output"}
    text = json.dumps({"version": runner.RESULTS_VERSION, **defaults}, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d2ffbf32c2ddaab3"


# ----------------------------------------------------------------------------------------------------------- all runs


def test_jobs_are_the_runs_of_the_figures_for_each_seed_at_the_path_that_says_so(tmp_path):
    spec = Spec(
        base={"train.lr": 1e-3},
        settings={"n2": Setting(name="n2", about="N = 2", overrides={"train.mini_batches": 2})},
        variants={
            "minirl": Variant(name="minirl", label="MiniRL", overrides={}),
            "r2": Variant(name="r2", label="R2", overrides={"algorithm.replay": "R2"}),
        },
        figures={
            "fig2": Figure(name="fig2", title="N = 2", runs=(("n2", "minirl"), ("n2", "r2"))),
            "again": Figure(name="again", title="the same runs, one seed", runs=(("n2", "minirl"),), seeds=1),
            "trial": Figure(name="trial", title="on other seeds", runs=(("n2", "r2"),), calibration=True),
        },
        grids={},
        tiers={"fast": Tier(name="fast", seeds=2, overrides={"n2": {"train.global_steps": 5}})},
        groups={},
        first_seed=3,
        first_calibration_seed=100,
        definitions=Definitions(final_evaluations=3, collapse_share=0.7),
        claims=(),
    )
    jobs = jobs_for(spec, ["fig2"], tmp_path, tier="fast", seeds=2)
    paths = ["minirl/seed3.csv", "minirl/seed4.csv", "r2/seed3.csv", "r2/seed4.csv"]
    assert [run.path for run in jobs] == [tmp_path / "runs" / "fast" / "n2" / path for path in paths]
    assert jobs_for(spec, ["fig2", "again"], tmp_path, tier="fast", seeds=2) == jobs  # shared runs are made once
    assert [run.key[3] for run in jobs_for(spec, ["again"], tmp_path, tier="fast", seeds=2)] == [3]
    assert [run.key[3] for run in jobs_for(spec, ["trial"], tmp_path, tier="fast", seeds=2)] == [100, 101]
    last = jobs[-1].config
    assert (last.seed, last.algorithm.replay, last.train.mini_batches, last.train.lr) == (4, "R2", 2, 1e-3)
    assert jobs[-1].cost == 5 * 2 * last.train.mini_batch_prompts * last.train.group_size


class Campaign:
    """Two workers, six jobs, three troubles: one diverges, one cannot start, and one loses its worker on the way."""

    def __init__(self, out: Path):
        self.out = out
        self.long = job(out, "long", "train.global_steps=8")
        self.stale = job(out, "stale")
        self.hot = job(out, "hot", *DIVERGES)
        self.broken = job(out, "broken", "task.options={colour: 3}")
        self.good = [self.long, self.stale, job(out, "r3", "algorithm.replay=R3"), job(out, "minirl", seed=1)]
        self.jobs = [*reversed(self.good), self.hot, self.broken]
        earlier = replace(self.stale, config=job(out, "stale", "train.lr=1e-2").config)
        train(earlier)
        self.before = self.stale.path.read_bytes()
        self.killed: list[int] = []
        killer = threading.Thread(target=self.kill_the_worker_of_the_long_run)
        killer.start()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.outcome = run_all(self.jobs, out, workers=2, command="minirl reproduce again")
        self.output = output.getvalue()
        killer.join()

    def kill_the_worker_of_the_long_run(self) -> None:
        wait_for(lambda: steps_in(self.long) >= 3, "the long run")
        for worker in workers_of(psutil.Process()):
            if any(Path(file.path) == self.long.log.resolve() for file in worker.open_files()):
                self.killed.append(worker.pid)
                worker.kill()


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"))


def names(jobs: Sequence[Job]) -> set[str]:
    return {job.key[2] for job in jobs}


def test_a_killed_worker_is_replaced_and_every_run_is_made(campaign):
    assert len(campaign.killed) == 1
    assert "small/long seed 0: the worker was ended by SIGKILL (out of memory?); trying once more" in campaign.output
    assert names(campaign.outcome.finished) == {"long", "stale", "r3", "minirl", "hot"}
    assert not campaign.outcome.skipped and not campaign.outcome.interrupted
    assert not workers_of(psutil.Process())


def test_numbers_do_not_depend_on_workers_order_or_accidents(campaign, tmp_path):
    for run in [*campaign.good[2:], campaign.long]:
        alone = replace(run, path=tmp_path / "small" / run.key[2] / run.path.name)
        train(alone)
        assert numbers(run) == numbers(alone), run.name


def test_a_diverged_run_is_a_result(campaign):
    result = stored(campaign.hot)
    assert result.diverged is not None
    score = result.metrics["score"][0]
    assert f"small/hot seed 0: score {score:.2f} → {score:.2f}, diverged ({result.diverged})" in campaign.output


def test_a_run_that_raises_is_reported_with_its_log_and_how_to_go_on(campaign):
    ((run, reason),) = campaign.outcome.failed
    assert run == campaign.broken and "ConfigError" in reason and "colour" in reason
    assert "Traceback" in run.log.read_text() and f"broken/{run.path.name}" not in files_in(run.folder)
    assert "1 of 6 runs failed:" in campaign.output and str(run.log) in campaign.output
    assert campaign.output.rstrip().endswith("minirl reproduce again")
    assert campaign.outcome.status == 1


def test_a_file_of_another_config_is_kept_aside_and_made_again(campaign):
    assert campaign.stale.path.with_suffix(".old.csv").read_bytes() == campaign.before
    assert stored(campaign.stale).digest == config_digest(campaign.stale.config)
    assert "1 of 6 runs are of another config: made again, the old kept (seed0.old.csv)" in campaign.output


def test_only_results_logs_of_failures_and_the_environment_are_left(campaign):
    runs = campaign.out / "runs" / "fast"
    files = {path.relative_to(runs).as_posix() for path in runs.rglob("*") if path.is_file()}
    assert files == {"small.tar.bz2", "small/stale/seed0.old.csv", "small/broken/seed0.log"}
    assert set(files_in(runs / "small")) == {f"{run.key[2]}/{run.path.name}" for run in [*campaign.good, campaign.hot]}
    facts = json.loads((campaign.out / "environment.json").read_text())
    assert facts["workers"] == 2 and facts["torch_threads"] == 1 and facts["omp_num_threads"] == "1"


def test_each_finished_run_is_a_line_when_nobody_watches(campaign):
    lines = [line for line in campaign.output.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == [f"[{i}/6]" for i in range(1, 7)]
    scores = stored(campaign.long).metrics["score"]
    (line,) = [line for line in lines if "small/long seed 0" in line]
    assert f"score {scores[0]:.2f} → {scores[-1]:.2f}, " in line and " s" in line
    assert all("left" in line for line in lines[:-2] if "failed" not in line)


def test_finished_runs_are_skipped_by_the_same_command(campaign, capsys):
    archive = archive_of(campaign.long.folder)
    made = archive.stat().st_mtime_ns
    outcome = run_all([*campaign.good, campaign.hot], campaign.out)
    assert outcome.skipped == [*campaign.good, campaign.hot] and outcome.status == 0
    assert not outcome.finished and archive.stat().st_mtime_ns == made
    assert capsys.readouterr().out == ""


def test_results_of_another_config_are_not_handed_out(campaign):
    other = replace(campaign.long, config=job(campaign.out, "long").config)
    results = finished_runs([other, *campaign.good[1:], campaign.broken])
    assert set(results) == {("small", "stale"), ("small", "r3"), ("small", "minirl")}
    assert [result.seed for result in results["small", "minirl"]] == [1]


@pytest.fixture
def archived(tmp_path) -> Job:
    """A run in an archive, not trained: three rows without measurements."""
    run = job(tmp_path, "minirl")
    steps = [{"global_step": step, "grad_step": step} for step in range(3)]
    write_run(run.path, steps, header={**run_header(run.config), "seconds": 1.0, "diverged": None})
    pack(run.folder)
    return run


def test_a_packed_run_of_another_config_is_kept_aside_once(archived, tmp_path, monkeypatch):
    """The command is stopped twice before the new run is there."""

    def stopped(team):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner._Team, "work", stopped)
    before = content(archived)
    other = job(tmp_path, "minirl", "train.lr=1e-2")
    for _ in range(2):
        assert run_all([other], tmp_path).status == 130
    assert [path.name for path in archived.path.parent.iterdir()] == ["seed0.old.csv"]
    assert archived.path.with_suffix(".old.csv").read_bytes() == before
    assert content(archived) == before  # until the new run replaces it


def test_a_packed_setting_is_extended_by_a_seed(archived, tmp_path):
    more = job(tmp_path, "minirl", seed=1)
    outcome = run_all([archived, more], tmp_path, workers=1)
    assert (outcome.skipped, outcome.finished) == ([archived], [more])
    assert list(read_runs(archived.folder)["minirl"]) == [0, 1] and not archived.folder.exists()


def test_a_broken_archive_stops_the_command_and_stays(archived, tmp_path):
    archive_of(archived.folder).write_bytes(b"nonsense")
    with pytest.raises(OSError, match=r"small.tar.bz2 cannot be read"):
        run_all([archived], tmp_path)
    assert archive_of(archived.folder).read_bytes() == b"nonsense"


# ----------------------------------------------------------------------------------------------- the end of the parent


SCRIPT = """
import sys
from pathlib import Path
from minirl_edu.experiments.runner import run_all
from tests.test_experiments_runner import two_long_jobs
out = Path(sys.argv[1])
sys.exit(run_all(two_long_jobs(out), out, workers=1, command="minirl reproduce again").status)
"""


def two_long_jobs(out: Path) -> list[Job]:
    return [job(out, "minirl", "train.global_steps=24", seed=seed) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_parent_is_the_end_of_its_workers_and_finished_runs_stay(tmp_path, how):
    first, second = two_long_jobs(tmp_path)
    (tmp_path / "parent.py").write_text(SCRIPT)
    process = Forked(tmp_path / "parent.py", [tmp_path])
    wait_for(lambda: steps_in(second) >= 2 or process.poll() is not None, "the second run")
    workers = workers_of(psutil.Process(process.pid))
    with pytest.raises(FolderInUse, match=rf"in use by process {process.pid} on "):
        run_all([second], tmp_path)
    process.send_signal(how)
    output = process.communicate(timeout=30)[0]
    assert len(workers) == 1
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert gone and not alive
    assert stored(first).metrics["grad_step"][-1] == 24
    assert list(files_in(first.folder)) == ["minirl/seed0.csv"]
    assert archive_of(first.folder).exists() == (how == signal.SIGINT)  # killed, it leaves what the next one packs
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped: 1 of 2 runs are done and stay; to go on: minirl reproduce again" in output
        assert not second.folder.exists()
    else:
        assert steps_in(second) >= 2  # what the killed run left behind is in nobody's way
        assert train(second).metrics["grad_step"][-1] == 24 and steps_in(second) == 0
        assert run_all([first, second], tmp_path).skipped == [first, second]
        assert len(files_in(first.folder)) == 2 and not list(first.folder.rglob("*.csv"))


# ----------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_weighs_jobs_by_their_cost_and_ends_at_the_end(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    long, hot = job(tmp_path, "long", "train.global_steps=9"), job(tmp_path, "hot", "train.mini_batches=3")
    assert (long.cost, hot.cost) == (36, 36)  # gradient steps × 4 responses
    progress = runner._Progress([long, hot], 3, True)
    result = train(job(tmp_path, "hot", *DIVERGES))
    for _ in range(3):
        progress.tick(long, 1, [long, hot])
    progress.again(long, 3, "killed")  # three steps are lost, so there is more to do
    assert progress.bar.n == 12 and progress.bar.total == 84
    progress.tick(hot, 3, [long, hot])
    progress.finished(hot, 3, result)  # it diverged, so there is less to do
    assert progress.bar.n == 24 and progress.bar.total == 60
    progress.started = time.perf_counter() - 240
    progress.tick(long, 1, [long])
    # 28 of 60 in 4 minutes
    assert str(progress.bar.postfix).startswith("about 5 min left: small/long 0")
    progress.tick(long, 8, [long])
    progress.finished(long, 9, replace(result, diverged=None))
    assert progress.bar.n == progress.bar.total == 60
    progress.close()
    written = terminal.getvalue()
    assert "[3/3] 100%" in written and "small/hot seed 0: score" in written and "diverged" in written
    assert "[3/3] small/long" not in written  # a run like any other moves the bar and no more


def test_an_outcome_is_an_exit_status(tmp_path):
    run = job(tmp_path, "minirl")
    assert Outcome(finished=[run]).status == 0
    assert Outcome(failed=[(run, "ConfigError")]).status == 1
    assert Outcome(failed=[(run, "ConfigError")], interrupted=True).status == 130


def test_no_workers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--workers = 0: use 1 or more"):
        run_all([], tmp_path, workers=0)
