"""`lessons/cheat_sheet.md` says what the code does: each coefficient is the gradient that autograd finds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minirl_edu import objectives
from minirl_edu.objectives import CORRECTIONS, OBJECTIVES

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
SHEET = (LESSONS / "cheat_sheet.md").read_text(encoding="utf-8")
WORLDS = (LESSONS / "results" / "worlds" / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return SHEET.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table's lines, by the first."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in found}


def formulas() -> dict[str, tuple[str, str]]:
    """The coefficient and the divisor of each loss on the sheet, a function or an option of `minirl_loss`."""
    found = {}
    for name, (loss, _) in list(rows(section("Objectives")).items())[1:]:
        coefficient, divisor = loss.rpartition("<br>")[2].strip("`").split("` / `")
        found[name.rpartition("<br>")[2]] = coefficient, divisor
    text = section("Corrections")
    common, divisor = re.findall(r"`(M\(.*?) \*` the weight, the divisor `(.*?)`", text)[0]
    for line in list(rows(text))[1:]:
        name, weight = line.strip("`").split("<br>`")
        found[f"correction={name}"] = f"{common} * {weight}", divisor
    return found


FORMULAS = formulas()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """64 responses of 1 to 6 tokens, in float64, with ratios on both sides of every limit."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logp_old = -0.9 - 1.2 * normal(64, 6).abs()
    return {
        "logp": (logp_old + 1.1 * normal(64, 6)).clamp(max=-0.01),
        "logp_old": logp_old,
        "logp_rollout": (logp_old + 1.2 * normal(64, 6)).clamp(max=-0.01),
        "advantages": normal(64),
        "mask": torch.arange(6) < torch.randint(1, 7, (64, 1), generator=generator),
    }


def gradient(call: str, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Minus the gradient of the loss with respect to log π_θ."""
    name, _, value = call.partition("=")
    options: dict[str, Any] = {name: {"True": True, "False": False}.get(value, value)} if value else {}
    loss: Callable[..., objectives.PolicyLoss] = getattr(objectives, "minirl_loss" if value else name)
    logp = batch["logp"].clone().requires_grad_()
    given = {name: value for name, value in batch.items() if name not in ("logp", "logp_rollout")}
    if loss is objectives.minirl_loss:
        given["logp_rollout"] = batch["logp_rollout"]
    loss(logp, **given, **options).loss.backward()
    assert logp.grad is not None and logp.grad.dtype == torch.float64
    return -logp.grad.numpy()


def of_sheet(coefficient: str, divisor: str, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The same from the two expressions, with the names that the sheet's first table explains."""
    logp, old, rollout = (batch[name].numpy() for name in ("logp", "logp_old", "logp_rollout"))
    mask, A = batch["mask"].numpy(), batch["advantages"].numpy()[:, None]
    r, n = np.exp(logp - old), mask.sum(1, keepdims=True)
    names = {
        **{"r": r, "k": np.exp(old - rollout), "w": np.exp(logp - rollout), "A": A},
        **{"mu": np.exp(rollout), "pi": np.exp(old), "n": n, "B": len(mask), "N": mask.sum()},
        "S": np.exp(((old - rollout) * mask).sum(1, keepdims=True)),
        "M": lambda a, b: 1 - ((A > 0) & (r > 1 + b) | (A < 0) & (r < 1 - a)),
        **{"min": np.minimum, "clip": np.clip},
    }
    return mask * eval(coefficient, names) / eval(divisor, names)


@pytest.mark.parametrize("call", FORMULAS)
def test_a_coefficient_is_the_gradient_of_its_loss(call, batch):
    # float64 from here to there, so only the order of a product differs
    np.testing.assert_allclose(of_sheet(*FORMULAS[call], batch), gradient(call, batch), rtol=1e-12, atol=1e-14)


def test_the_batch_tells_apart_all_lines_that_differ_and_every_limit_acts(batch):
    different = set(FORMULAS.values())
    assert len(different) == 11  # of 13 lines: token_truncated is MiniRL, none is − IS
    found = {(coefficient, divisor): of_sheet(coefficient, divisor, batch) for coefficient, divisor in different}
    for coefficient, divisor in different:
        for limit in re.finditer(r"0\.\d+|5", coefficient):
            for factor in (0.5, 2):
                moved = f"{coefficient[: limit.start()]}{float(limit[0]) * factor}{coefficient[limit.end() :]}"
                found[moved, divisor] = of_sheet(moved, divisor, batch)
    every = list(found)
    for i, one in enumerate(every):
        assert [other for other in every[i + 1 :] if np.allclose(found[one], found[other])] == [], one


def test_every_objective_and_every_correction_is_on_the_sheet():
    assert {call for call in FORMULAS if "=" not in call} == {entry.loss.__name__ for entry in OBJECTIVES.values()}
    assert {f"correction={name}" for name in CORRECTIONS} <= set(FORMULAS)


def test_drift_variance_and_scores_are_those_that_were_measured():
    measured = rows(WORLDS)
    _, *shown = rows(section("Corrections")).items()
    assert len(shown) == len(CORRECTIONS)
    for line, (*cells, _) in shown:
        name = line.partition("<br>")[0]
        theirs = measured[{"token_truncated": "MiniRL", "none": "− IS"}.get(name, name.replace("_", " "))]
        assert cells == [*theirs[:2], " / ".join(scores(theirs))], name
    text = " ".join(section("Corrections").split())
    for name in ("+ length norm", "GRPO", "CISPO"):
        assert re.search(rf"{re.escape(name)} (has )?{' / '.join(scores(measured[name]))}", text), name


def scores(cells: list[str]) -> list[str]:
    """The three means of the doomed tails."""
    return [cell.partition(" ±")[0] for cell in cells[2:5]]
