"""What was predicted of the entropy from runs with the weight, against runs without it."""

import numpy as np
import pytest

from minirl_edu.experiments.prediction import Pair, agreement, markdown, paired
from minirl_edu.experiments.spec import COLUMNS, RunResult


def run(seed: int, drift: list[float], entropy: list[float]) -> RunResult:
    """A run of six steps, and the line before the first."""
    metrics = {name: np.full(7, np.nan) for name in COLUMNS}
    metrics["grad_step"] = np.arange(7.0)
    metrics["entropy_drift"][1:], metrics["entropy"][1:] = drift, entropy
    return RunResult(seed=seed, metrics=metrics, diverged=None, digest="", seconds=0.0)


def test_the_first_third_predicts_and_the_second_is_measured():
    with_weight = [
        run(1, [-2, -4, 9, 9, 9, 9], [9, 9, 0.5, 0.7, 9, 9]),
        run(0, [1] * 6, [1] * 6),
        run(5, [1] * 6, [1] * 6),
    ]
    without = [run(0, [7] * 6, [2] * 6), run(1, [7] * 6, [9, 9, 0.2, 0.2, 9, 9])]
    np.testing.assert_allclose(paired(with_weight, without), [(1.0, 1.0), (-3.0, -0.4)])
    unlogged = [run(0, [np.nan] * 6, [1] * 6)]
    assert paired(unlogged, without) == []


def test_agreement_is_pearsons_with_its_interval():
    exact = agreement([Pair(x, 2 * x) for x in (-1.0, -0.5, 0.2, 1.0)])
    assert exact.pearson == pytest.approx(1) and exact.spearman == pytest.approx(1)
    assert exact.same_sign == 1 and exact.pairs == 4
    mixed = agreement([Pair(*xy) for xy in ((-1, 1), (1, -1), (2, 2), (-2, -2), (3, 2.5))])
    assert mixed.low < mixed.pearson < mixed.high and mixed.same_sign == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="pairs: 3"):
        agreement([Pair(0, 0)] * 3)


def test_the_page_has_a_row_for_each_setting():
    found = {"all alike": [Pair(0.1, 0.2), Pair(-0.1, 0.0)], "wrong ones longer": [Pair(-0.3, -0.2), Pair(-0.1, -0.1)]}
    page = markdown(found, agreement([pair for both in found.values() for pair in both]), "minirl reproduce lengths")
    assert "| wrong ones longer | 2 | -0.200 (-0.300 to -0.100) | -0.150 (-0.200 to -0.100) | 2 of 2 |" in page
    assert "    minirl reproduce lengths" in page and "Over all 4 pairs" in page
