"""Predictors of a fall: what they see, when they speak, and that they are judged on runs they were not chosen on."""

import math

import numpy as np
import pytest

from minirl_edu.diagnostics import CollapseDetector
from minirl_edu.experiments.early_warning import (
    DETECTOR,
    DRIFT_PREDICTORS,
    PREDICTORS,
    Watched,
    alarm,
    area,
    averages,
    choose_threshold,
    curve,
    detector_alarm,
    judge,
    levels,
    markdown,
    peak,
    roc,
)
from minirl_edu.plots import Metrics

STEPS = 120


def metrics(seed: int, **changes: tuple[int, float]) -> Metrics:
    """A run of noisy constants; `entropy=(60, 0.05)` multiplies that column by 0.05 from gradient step 60 on."""
    rng = np.random.default_rng(seed)
    columns = ("entropy", "k3_rollout_old", "kl_rollout_old", "grad_norm", "first_order_gap", "ess", "reward")
    run: Metrics = {name: 0.1 * np.exp(rng.normal(0, 0.1, STEPS)) for name in columns}
    run["grad_step"] = np.arange(1.0, STEPS + 1)
    for name, (step, factor) in changes.items():
        run[name][step - 1 :] *= factor
    return run


def falling(seed: int) -> Watched:
    """Entropy and reward fall 20 steps before the score does; the gradient says nothing."""
    return Watched(metrics(seed, entropy=(60, 0.05), reward=(60, 0.05)), fell=80.0)


def healthy(seed: int) -> Watched:
    return Watched(metrics(seed), fell=None)


def test_the_averages_are_the_detectors_and_skip_gaps():
    values = np.array([1.0, 3.0, math.nan, 2.0, 10.0])
    assert averages(values, 2).tolist() == [1.0, 2.0, 2.0, 2.0, 6.0]  # plain over two, exponential from there
    detector = CollapseDetector()
    for value in values[np.isfinite(values)]:
        detector.update({"entropy": value})
    fast = detector.state_dict()["averages"]["entropy"]["fast"]
    assert averages(values, CollapseDetector.FAST)[-1] == pytest.approx(fast)


@pytest.mark.parametrize(
    ("name", "column", "factor"),
    [
        ("entropy", "entropy", 0.2),
        ("ESS", "ess", 0.2),
        ("reward", "reward", 0.2),
        ("KL", "k3_rollout_old", 5.0),
        ("gradient norm", "grad_norm", 5.0),
        ("first-order gap", "first_order_gap", 5.0),
    ],
)
def test_each_predictor_rises_with_its_own_trouble_and_with_no_other(name: str, column: str, factor: float):
    run = metrics(0, **{column: (60, factor)})
    for other, predictor in PREDICTORS.items():
        level = levels(run, predictor)
        assert (level[:20] == -math.inf).all() and np.isfinite(level[20:]).all()
        # A fast average that is five times the slow one would be log 5 = 1.6; the slow one follows meanwhile.
        assert (level[60:75].max() > 0.7) == (other == name), other
        assert level[25:59].max() < 0.3
    reverse = levels(metrics(0, **{column: (60, 1 / factor)}), PREDICTORS[name])
    assert reverse[60:75].max() < 0.3


def test_a_rise_below_the_floor_is_harmless():
    quiet = metrics(0, k3_rollout_old=(1, 1e-5))
    quiet["k3_rollout_old"][59:] *= 50  # from 1e-6 to 5e-5 nats per token
    assert levels(quiet, PREDICTORS["KL"])[20:].max() == 0


def test_a_metric_that_may_be_negative_has_its_fast_average_for_a_level():
    run = metrics(0)
    run["entropy_drift"] = np.where(run["grad_step"] < 60, 0.01, -0.2)
    level = levels(run, DRIFT_PREDICTORS["entropy drift"])
    assert (level[:20] == -math.inf).all() and level[25:58] == pytest.approx(-0.01) and level[-1] > 0.15
    fast = averages(run["entropy_drift"], CollapseDetector.FAST)
    assert level[70] == pytest.approx(-fast[70])


def test_an_alarm_is_the_first_step_above_the_threshold():
    run = falling(0)
    level = levels(run.metrics, PREDICTORS["entropy"])
    step = alarm(run.metrics, level, 0.5)
    assert step is not None and 60 < step < 80
    assert alarm(run.metrics, level, 5.0) is None
    first_detector_alarm = detector_alarm(run.metrics)
    assert first_detector_alarm is not None and 60 < first_detector_alarm < 80
    assert detector_alarm(healthy(0).metrics) is None


def test_what_comes_after_the_fall_is_no_warning():
    late = Watched(metrics(0, entropy=(90, 0.2)), fell=80.0)
    level = levels(late.metrics, PREDICTORS["entropy"])
    assert peak(late, level) < 0.3 < level.max() == peak(late._replace(fell=None), level)
    verdicts = judge([falling(1), healthy(2)], [late, healthy(3)])
    assert all(verdict.foretold == 0 and verdict.leads == [] for verdict in verdicts)


def test_roc_of_a_perfect_a_useless_and_a_tied_predictor():
    thresholds, false_alarms, foretold = roc([3.0, 2.0], [1.0, 0.0])
    assert thresholds.tolist() == [math.inf, 2.5, 1.5, 0.5, -math.inf]
    assert false_alarms.tolist() == [0, 0, 0, 0.5, 1] and foretold.tolist() == [0, 0.5, 1, 1, 1]
    assert area(false_alarms, foretold) == 1
    assert area(*roc([0.0, 1.0], [2.0, 3.0])[1:]) == 0
    assert area(*roc([1.0, 1.0], [1.0, 1.0])[1:]) == 0.5
    with pytest.raises(ValueError, match="1 runs that fell, 0 healthy"):
        roc([1.0], [])


def test_the_threshold_keeps_to_its_rate_of_false_alarms():
    runs = [falling(seed) for seed in range(5)] + [healthy(seed) for seed in range(5, 25)]
    runs[10] = Watched(metrics(10, entropy=(40, 0.1)), fell=None)  # one healthy run looks worse than any other
    predictor = PREDICTORS["entropy"]
    foretold = []
    for rate in (0.0, 0.05):
        threshold = choose_threshold(runs, predictor, false_alarm_rate=rate)
        raised = [alarm(run.metrics, levels(run.metrics, predictor), threshold) is not None for run in runs]
        assert sum(raised[5:]) == round(rate * 20)
        foretold.append(sum(raised[:5]))
    assert foretold == [0, 5]  # false alarms buy falls foretold, and nothing else


def test_predictors_are_judged_on_other_runs():
    tuning = [falling(seed) for seed in range(8)] + [healthy(seed) for seed in range(8, 30)]
    held_out = [falling(seed) for seed in range(30, 36)] + [healthy(seed) for seed in range(36, 50)]
    verdicts = {verdict.predictor: verdict for verdict in judge(tuning, held_out)}
    assert list(verdicts) == [*PREDICTORS, DETECTOR]
    for verdict in verdicts.values():
        assert (verdict.falls, verdict.healthy) == (6, 14) and len(verdict.leads) == verdict.foretold
    entropy = verdicts["entropy"]
    assert entropy.foretold == 6 and entropy.false_alarms <= 2 and all(10 < lead < 20 for lead in entropy.leads)
    assert verdicts["gradient norm"].foretold <= 2  # it knows nothing here
    assert verdicts[DETECTOR].foretold == 6 and verdicts[DETECTOR].false_alarms == 0
    with pytest.raises(ValueError, match="0 runs that fell, 14 healthy"):
        judge(tuning, held_out[6:])


def test_the_table_has_rates_with_intervals_leads_and_areas():
    runs = [falling(seed) for seed in range(8)] + [healthy(seed) for seed in range(8, 30)]
    verdicts = judge(runs, runs)
    areas = {name: area(*curve(runs, predictor)) for name, predictor in PREDICTORS.items()}
    assert areas["entropy"] == 1 and 0.2 < areas["gradient norm"] < 0.8
    head, rule, *rows = markdown(verdicts, areas).splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (*PREDICTORS, DETECTOR)]
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    # 8 of 8: Clopper and Pearson's lower end is 0.025^(1/8) = 0.63
    assert "8 of 8: 100% (63% to 100%) | 0 of 22: 0% (0% to 15%)" in rows[0] and rows[0].endswith("| 1.00 |")
    assert "its own" in rows[-1] and rows[-1].endswith("|  |")
