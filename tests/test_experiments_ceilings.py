"""`experiments.ceilings`: the criteria, the page, and a small run that goes on where it ended."""

import json

import pytest

from minirl_edu.experiments import ceilings


def run(size, seed, start, end, ceiling):
    curve = [start, end, end]
    return {"size": size, "seed": seed, "parameters": 1000, "seconds": 60} | {
        "start": start, "end": end, "ceiling": ceiling, "curve": curve,
    }  # fmt: skip


def runs(**ends):
    """Four seeds of each size, which start at 0.2 and whose ceilings are 0.4, 0.6 and 1."""
    own = {"small": 0.4, "middle": 0.6, "large": 1.0}
    return [
        run(size, seed, 0.2, ends.get(size, ceiling) + seed / 1000, ceiling)
        for size, ceiling in own.items()
        for seed in range(4)
    ]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, [True, True, True]),
        ({"small": 0.25}, [False, False, True]),  # hardly raised, and far below its ceiling
        ({"small": 0.95}, [True, False, False]),  # RL made a small model a large one
        ({"large": 0.7}, [True, False, True]),
    ],
)
def test_each_criterion_is_judged_on_its_own(ends, expected):
    assert list(ceilings.verdict(runs(**ends)).values()) == expected


def test_the_page_shows_means_ranges_and_verdicts():
    text = ceilings.page(runs(), 4)
    assert "| small | 1,000 | 0.20 (0.20 to 0.20) | 0.40 (0.40 to 0.40) | 0.40 (0.40 to 0.40) | 4 |" in text
    assert text.count("**yes**") == 3 and "12 models, 12 minutes" in text


@pytest.mark.slow
@pytest.mark.nightly
def test_a_second_call_trains_only_what_is_missing(tmp_path, capsys):
    out = tmp_path / "ceilings.jsonl"
    call = ["--out", str(out), "--seeds", "1", "--quick"]
    assert ceilings.main(call) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["size"] for line in lines] == ["large", "middle", "small"]
    parameters = {line["size"]: line["parameters"] for line in map(json.loads, lines)}
    assert parameters["small"] < parameters["middle"] < parameters["large"]
    out.write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    assert ceilings.main(call) == 0
    again = out.read_text(encoding="utf-8").splitlines()
    assert again[:2] == lines[:2] and json.loads(again[2])["size"] == "small"
    assert "small" in (tmp_path / "CEILINGS.md").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "ceilings.png").stat().st_size > 1000
