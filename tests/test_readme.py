"""README.md, scale/README.md and the pages with their details: commands run or are valid, numbers are the kept ones."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from minirl_edu import __version__, cli
from minirl_edu.cli import DEMO_VARIANTS, demo_folder
from minirl_edu.config import load_config
from scale import serve, train
from tests.scale.test_launchers import launch_arguments, words

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = ("README.md", "scale/README.md", *(f"lessons/site/{name}.md" for name in ("gap", "modules", "pretrained")))
BLOCK = re.compile(r"^(?:<!-- not run: ([^>]+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page, and why it does not run here; "" if it does."""

    page: str
    reason: str
    language: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell's block, continued ones joined, `&&` taken apart."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [part for line in lines for part in line.split("&&") if part.strip()]


BLOCKS = [Block(page, *found) for page in PAGES for found in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]
COMMANDS = [command for block in BLOCKS if block.language in {"sh", "bash"} for command in block.commands]


def test_every_block_runs_or_says_why_not():
    """A new block is counted here: does it run, or which test runs it instead?"""
    assert {block.language for block in BLOCKS} == {"python", "sh", "bash"}
    assert sum((ROOT / page).read_text(encoding="utf-8").count("\n```") for page in PAGES) == 2 * len(BLOCKS)
    assert Counter((block.page, not block.reason) for block in BLOCKS) == {
        ("README.md", True): 1,
        ("README.md", False): 2,
        ("scale/README.md", True): 1,
        ("scale/README.md", False): 9,
        ("lessons/site/gap.md", False): 1,
        ("lessons/site/modules.md", False): 1,
        ("lessons/site/pretrained.md", False): 1,
    }


def test_what_runs_a_block_instead_exists():
    named = [path for block in BLOCKS for path in re.findall(r"tests/\S+\.py", block.reason)]
    assert len(named) >= 8 and [path for path in named if not (ROOT / path).is_file()] == []
    assert all(path in (ROOT / "Makefile").read_text(encoding="utf-8") for path in ("minirl_edu.cli demo", "pytest"))


def test_the_script_of_the_readme_learns(tmp_path, capsys):
    (script,) = (block.code for block in BLOCKS if block.page == "README.md" and block.language == "python")
    assert len(script.splitlines()) <= 20
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    with torch.random.fork_rng():
        runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    shares = [int(share) for share in re.findall(r"update \d+: (\d+)% right", capsys.readouterr().out)]
    # By chance 670 of 10,000 answers add up to 18.
    assert len(shares) == 3 and shares[0] < 30 and shares[-1] > 80


def test_the_plan_is_the_one_that_the_text_quotes(capsys):
    (block,) = (block for block in BLOCKS if not block.reason and block.language != "python")
    (command,) = block.commands
    assert cli.main(words(command)[1][1:]) == 0
    said = capsys.readouterr().out
    peak = re.search(r"peak (\d+ GB of \d+ GB): fits \(rollout .*, update ([\d.]+ GB)", said)
    minutes = re.search(r"global step +([\d.]+) min", said)
    assert peak and minutes
    quoted = f"{peak[1]} in the rollout, {peak[2]} in the update, {float(minutes[1]):.1f} minutes a global step"
    assert quoted in " ".join((ROOT / block.page).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_valid(command, monkeypatch):
    """Every argument by the program's own parser, every config and recipe by its own reader."""
    monkeypatch.chdir(ROOT)
    if command.lstrip().startswith(("git clone ", "cd ")) or re.match(r'export [A-Z_]+="', command):
        return
    variables, line = words(re.sub(r"(^|\s)#.*", "", command))
    program, *arguments = line[0].removeprefix(".venv/bin/"), *line[1:]
    if program == "make":
        (target,) = arguments
        assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "minirl":
        parsed = cli._parser().parse_args(arguments)
        if hasattr(parsed, "config"):
            load_config(parsed.config, parsed.set)
    elif program == "accelerate":
        launched = launch_arguments(arguments[1:])
        assert launched.training_script == "scale/train.py"
        parsed = train._parse(launched.training_script_args)
        load_config(parsed.config, parsed.set)
    elif program == "sbatch":
        assert (ROOT / arguments[-1]).is_file()
        load_config(variables["RECIPE"], variables.get("SET", "").split())
        serve.parse(["--model", "any", *variables["SERVE"].split()])
    elif arguments[0] == "scale/train.py":
        parsed = train._parse(arguments[1:])
        load_config(parsed.config, parsed.set)
    elif arguments[0] == "scale/serve.py":
        serve.parse(arguments[1:])
    else:
        assert program == "python" and arguments[0] in ("scale/gpu_checks.py", "scale/gpu_world.py"), (
            "say in this test how its arguments are read"
        )
        known = re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / arguments[0]).read_text(encoding="utf-8"))
        assert {argument for argument in arguments if argument.startswith("--")} <= set(known)


@pytest.mark.parametrize(
    "command",
    [
        "make dmeo",
        "minirl train --config dmeo --out a",
        "minirl plan --gpu 8",
        "python scale/train.py --config dmeo",
        "rm -r a",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    with pytest.raises((Exception, SystemExit)):
        test_a_command_is_valid(command, monkeypatch)


# ------------------------------------------------------------------------------------------------------- what it says


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_readme_quotes_the_demo():
    """The kept runs of the demo, which tests/test_report.py holds to its recipe."""
    text = README.read_text(encoding="utf-8")
    folders = [ROOT / "tests" / "data" / "demo" / demo_folder(name) for name in DEMO_VARIANTS]
    answers: dict[int, list[str]] = {}
    for folder in folders:
        for line in map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
            first = line["samples"][0]
            assert first["prompt"].replace(" ", "") in text
            answers.setdefault(line["grad_step"], []).append(
                f"`{first['response']}` {'right' if first['reward'] else 'wrong'}"
            )
    quoted = re.findall(r"^\| (\d+)(?:, before training)? \| (`.+?`.+?) \| (`.+?`.+?) \|$", text, re.MULTILINE)
    assert len(quoted) == 4 and all(answers[int(step)] == shown for step, *shown in quoted)
    scores = [[line["score"] for line in lines_of(folder) if "score" in line] for folder in folders]
    (before, after), (_, without) = ((run[0], run[-1]) for run in scores)
    assert f"from {before:.0%} to {after:.0%}".replace("%", " %") in " ".join(text.split())
    assert f"without them to {without:.0%}".replace("%", " %") in " ".join(text.split())


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_readme_quotes_the_results():
    text = " ".join(README.read_text(encoding="utf-8").split())
    predicted = (ROOT / "lessons" / "results" / "PREDICTION.md").read_text(encoding="utf-8")
    found = re.search(r"Over all (\d+) pairs: Pearson's correlation ([\d.]+)", predicted)
    claims = re.search(
        r"^Of (\d+) claims", (ROOT / "lessons/results/CLAIMS.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found and f"correlation {found[2]} over {found[1]} pairs" in text
    assert claims and f"All {claims[1]} claims" in text


def test_the_readme_counts_the_units():
    """`tests/course/test_teaching.py` holds the number of exercises and the hours."""
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert len(list((ROOT / "lessons").glob("[0-9][0-9]_*.md"))) == 13 and "has thirteen units" in text


def test_the_checks_of_the_gpu_are_those_that_are_kept():
    text = " ".join(README.read_text(encoding="utf-8").split())
    (kept,) = (ROOT / "scale" / "results").glob("gpu-*.jsonl")
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    failed = {line["check"] for line in lines if not line.get("ok", True)}
    assert (len(lines), failed) == (11, {"memory"}) and "One of the eleven checks" in text
    assert {line["card"] for line in lines} == {"NVIDIA H200"} and "One H200 GPU" in text


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(citation) and citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["authors"] == [{"name": "The minirl_edu contributors"}]
    assert [entry["url"] for entry in citation["references"]] == ["https://arxiv.org/abs/2512.01374"]
