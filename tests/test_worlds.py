"""The three worlds end as they are known to with fixed seeds, and the predictions are right about runs to come."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minirl_edu.diagnostics import mean_interval
from minirl_edu.drift import entropy_gradient, sampler_bias
from minirl_edu.worlds import report, simulations
from minirl_edu.worlds.__main__ import main
from minirl_edu.worlds.simulations import (
    VARIANTS,
    WORLDS,
    doomed_tails,
    doomed_tails_border,
    leaky_engine,
    leaky_engine_border,
    policy_loss,
    who_gets_the_gradient,
    who_gets_the_gradient_ceiling,
)

RESULTS = Path(__file__).parents[1] / "lessons" / "results" / "worlds"
MINIRL, WITHOUT = VARIANTS["MiniRL"], VARIANTS["− IS"]
LONGER, ALIKE, SHORTER = {}, {"win": 96}, {"win": 96, "lose": 3}  # wrong responses, against right ones


def test_wrong_responses_that_are_longer_make_the_entropy_collapse_without_the_weight():
    tails = partial(doomed_tails, seeds=3, steps=80)
    with_weight, without = tails(MINIRL), tails(WITHOUT)
    start = with_weight["score"][:, 0]
    assert (with_weight["score"][:, -1] > 2 * start).all()
    assert (without["score"][:, -1] < start).all()
    assert (without["entropy"][:, -1] < 0.6 * without["entropy"][:, 0]).all()
    assert (with_weight["entropy"][:, -1] > 0.9 * with_weight["entropy"][:, 0]).all()
    assert (without["margin"][:, -1] < without["margin"][:, 0] - 0.5).all()


def test_right_responses_that_are_longer_make_the_entropy_explode_and_equal_ones_do_nothing():
    tails = partial(doomed_tails, seeds=3, steps=80)
    explodes = tails(WITHOUT, **SHORTER)
    assert (explodes["entropy"][:, -1] > 1.3 * explodes["entropy"][:, 0]).all()
    assert (tails(MINIRL, **SHORTER)["entropy"][:, -1] < 0.9).all()
    with_weight, without = tails(MINIRL, **ALIKE), tails(WITHOUT, **ALIKE)
    assert np.abs(with_weight["entropy"] - without["entropy"]).max() < 0.1
    assert (without["score"][:, -1] > 2.2 * without["score"][:, 0]).all()


def test_what_other_corrections_do_about_the_drift():
    """Divided by the length it is hidden, a geometric mean leaves it, a two-sided mask turns it around."""
    end = {
        name: doomed_tails(VARIANTS[name], seeds=2, steps=80)["entropy"][:, -1]
        for name in ("− IS", "CISPO", "geometric mean", "token masked", "MiniRL")
    }
    for name in ("CISPO", "geometric mean"):
        assert np.abs(end[name] - end["− IS"]).max() < 0.05
    assert (end["token masked"] > end["MiniRL"] + 0.3).all()
    grpo = doomed_tails(VARIANTS["GRPO"], seeds=2, steps=80)
    assert (grpo["score"][:, -1] > 0.8).all()


def test_the_border_of_the_doomed_tails():
    assert doomed_tails_border(**ALIKE) == 0
    assert doomed_tails_border(**SHORTER) == pytest.approx(-doomed_tails_border(), rel=1e-12)
    # By hand with small noise: E[μ − π] = σ² π (S − π), and μ = π in all else.
    sigma, rare = 0.05, 0.1 / 8
    collision = 0.3**2 + 0.6**2 + 8 * rare**2
    bias = sigma**2 * (0.3 * (collision - 0.3) - 0.6 * (collision - 0.6))
    accuracy = 0.75 * 0.3 + 0.25 * 0.85
    cov = (3 - 96) * accuracy**3 * (1 - accuracy**3)
    signal = 3 * accuracy**2 * (0.3 * 0.7 + 0.6 * 0.3)
    # The mean of 20 000 squared draws is exact to 1 %, and the next order is σ² = 0.25 % of this one.
    assert doomed_tails_border(sigma=sigma) == pytest.approx(-cov * bias / signal, rel=0.05)
    settings: list[dict[str, Any]] = [{"sigma": 0.3}, {"sigma": 0.8, "lose": 24}, {"sigma": 0.8}, {"lose": 64}]
    for setting in settings:
        margin = doomed_tails(WITHOUT, seeds=3, steps=60, **setting)["margin"]
        locked = doomed_tails_border(**setting) > 1
        assert ((margin[:, -1] < margin[:, 0]) == locked).all(), setting


def test_the_metric_of_a_batch_is_on_average_what_the_covariance_and_the_bias_say():
    """At the start, over many seeds: (1 − 1/G) Cov(|y|, R) Σ_c ⟨E[μ − π], ∇H⟩ / C."""
    first = doomed_tails(WITHOUT, seeds=150, steps=1, sigma=0.5)
    kinds = torch.zeros(2, 10, dtype=torch.float64)
    kinds[0], kinds[1] = 0.0125, 0.15 / 9
    kinds[0, 0], kinds[0, 1], kinds[1, 0] = 0.3, 0.6, 0.85
    rate = (sampler_bias(kinds, 0.5) * entropy_gradient(kinds.log())).sum(1)
    mean, half = mean_interval(first["entropy_drift"])
    cov = first["length_reward_cov"].mean()  # that of batches: 1 − 1/G is in it
    predicted = cov * float(0.75 * rate[0] + 0.25 * rate[1])
    # The small-noise form is some 15 % too large at σ = 0.5 (its error is O(σ⁴)); the interval of 95 % is added.
    assert cov < -3 and mean[0] == pytest.approx(predicted, rel=0.25, abs=1.5 * half[0])
    assert half[0] < 0.4 * abs(mean[0])


def test_a_leaky_engine_locks_a_habit_in_past_its_border():
    for rare in (0.02, 0.05, 0.1):
        border = 2 * rare * (1 - rare) / ((1 - 2 * rare) * (1 + rare))
        assert leaky_engine_border(leak=border, rare=rare) == pytest.approx(1, rel=1e-12)
    assert leaky_engine_border(habit=1.0, better=0.5) == 0
    run = partial(leaky_engine, seeds=2, steps=250)
    assert (run(MINIRL)["score"][:, -1] > 0.98).all() and (run(WITHOUT)["score"][:, -1] < 0.55).all()
    assert leaky_engine_border() == pytest.approx(2, abs=0.05)
    assert leaky_engine_border(leak=0.05) == pytest.approx(0.5, abs=0.01)
    assert (run(WITHOUT, leak=0.05)["score"][:, -1] > 0.95).all()
    assert (run(WITHOUT, habit=1.0, better=0.5)["score"][:, -1] > 0.99).all()  # the control: nothing to see


def test_without_replay_the_experts_that_wrote_the_tokens_never_learn():
    run = partial(who_gets_the_gradient, seeds=3, steps=250)
    without, replayed = run(MINIRL), run(VARIANTS["R3"])
    assert (without["score"][:, -1] > 0.95).all() and (replayed["score"][:, -1] > 0.95).all()
    assert without["engine_score"][:, -1].mean() == pytest.approx(who_gets_the_gradient_ceiling(seeds=3), abs=0.02)
    assert (replayed["engine_score"][:, -1] > 3 * without["engine_score"][:, -1]).all()
    assert (replayed["kl"] == 0).all() and (without["kl"][:, -1] > 0.5).all()
    assert run(WITHOUT)["engine_score"][:, -1] == pytest.approx(without["engine_score"][:, -1], abs=0.02)
    assert who_gets_the_gradient_ceiling(noise=0.0) == 1
    control = run(MINIRL, noise=0.0)
    assert (control["engine_score"] == control["score"]).all()


@pytest.mark.parametrize("world", [doomed_tails, leaky_engine, who_gets_the_gradient])
def test_a_seed_is_the_same_run_whatever_the_others_are(world):
    three, one = world(MINIRL, seeds=3, steps=6), world(MINIRL, seeds=1, steps=6)
    for name in one:
        # Sums in fp32 over another number of rows: rounding, a hundred times over six steps of Adam.
        np.testing.assert_allclose(
            three[name][..., :1, :] if name != "step" else three[name], one[name], rtol=1e-3, atol=1e-5
        )
    assert np.abs(three["score"][1] - three["score"][0]).max() > 1e-4


@pytest.mark.parametrize("name", ["MiniRL", "− IS + length norm", "GRPO", "CISPO", "sequence masked"])
def test_the_loss_of_several_seeds_is_the_sum_of_each_ones_own(name):
    generator = torch.Generator().manual_seed(0)
    logp = (-torch.rand(24, 5, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    rollout = (logp.detach() + 0.3 * torch.randn(24, 5, generator=generator, dtype=torch.float64)).clamp(max=0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64).round()
    mask = torch.arange(5) < torch.randint(1, 6, (24, 1), generator=generator)
    loss = partial(policy_loss, VARIANTS[name], group_size=4)
    (together,) = torch.autograd.grad(loss(logp, rollout, rewards, mask, seeds=3), logp)
    thirds = zip(*(x.chunk(3) for x in (logp, rollout, rewards, mask)), strict=True)
    (apart,) = torch.autograd.grad(torch.stack([loss(*part, seeds=1) for part in thirds]).sum(), logp)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-15)
    assert together.abs().max() > 1e-3


def test_tokens_are_drawn_with_their_probabilities():
    table = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]).log()
    uniform = torch.linspace(0, 1, 1001)[:-1, None].expand(-1, 2)
    tokens = simulations._draw_tokens(table, torch.tensor([[0, 1]]).expand(1000, -1), uniform)
    assert tokens[:, 0].bincount().tolist() == pytest.approx([200, 300, 500], abs=1)
    assert (tokens[:, 1] == 0).all()


def test_the_command_writes_what_can_be_read_again_and_drawn(tmp_path, monkeypatch, capsys):
    full = WORLDS["leaky_engine"]
    short = full._replace(
        run=partial(leaky_engine, steps=3), variants=["MiniRL", "− IS", "token masked"], sweep=full.sweep[:2]
    )
    monkeypatch.setitem(WORLDS, "leaky_engine", short)
    main(["leaky_engine", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| token masked | " in printed and "2 seeds" in printed
    assert (tmp_path / "leaky_engine.png").read_bytes().startswith(b"\x89PNG")
    runs, sweep = report.read_csv(tmp_path / "leaky_engine.csv")
    again = short.run(VARIANTS["− IS"], seeds=2)
    found = runs["the better answer is rare"]["− IS"]
    assert list(found) == ["step", "score", "entropy"] and found["step"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found["entropy"], again["entropy"], rtol=5e-3)
    assert [p for p, _ in sweep] == pytest.approx([leaky_engine_border(**s) for s in short.sweep], rel=1e-3)


def test_the_phase_diagram_is_written_and_read_again_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "PHASES_LENGTHS", ((3, 24), (3, 3)))
    monkeypatch.setattr(report, "PHASES_SIGMAS", (0.3, 1.0))
    monkeypatch.setattr(report, "doomed_tails", partial(doomed_tails, steps=3))
    main(["phases", "--seeds", "2", "--out", str(tmp_path)])
    assert "| 1 | " in capsys.readouterr().out
    rows = report.read_phases(tmp_path / "phases.csv")
    assert [(row["sigma"], row["lose"], row["seed"]) for row in rows[:3]] == [(0.3, 24, 0), (0.3, 24, 1), (0.3, 3, 0)]
    assert rows[0]["cov"] < 0 and rows[2]["cov"] == rows[2]["border"] == 0
    assert rows[4]["border"] == pytest.approx(doomed_tails_border(sigma=1.0, win=3, lose=24), rel=1e-3)
    again = doomed_tails(WITHOUT, seeds=2, steps=3, sigma=0.3, win=3, lose=24)["score"]
    assert rows[1]["without"] == pytest.approx(again[1, -1], rel=1e-3)
    assert (tmp_path / "phases.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_counted_by_prediction_and_outcome():
    def cell(lose, border, without):
        return {"sigma": 1.0, "win": 3, "lose": lose, "border": border, "with": 0.8, "without": without}

    rows = [cell(96, 1.7, 0.1), cell(48, -1.2, 0.7), cell(24, 0.5, 0.39), cell(3, 0.0, 0.1), cell(3, 0.0, 0.9)]
    counts = {(True, True): 1, (True, False): 1, (False, True): 1, (False, False): 1}
    assert report.phases_agreement(rows) == counts  # of the last cell's two seeds the mean counts


@pytest.mark.parametrize("name", WORLDS)
def test_the_stored_results_have_every_scenario_variant_and_prediction_and_can_be_drawn(name):
    runs, sweep = report.read_csv(RESULTS / f"{name}.csv")
    world = WORLDS[name]
    assert list(runs) == list(world.scenarios) and len(sweep) == len(world.sweep)
    assert all(list(variants) == list(world.variants) for variants in runs.values())
    assert all(curves["score"].shape[0] == 8 for variants in runs.values() for curves in variants.values())
    predicted = sorted(world.predict(**setting) for setting in world.sweep)
    assert sorted(p for p, _ in sweep) == pytest.approx(predicted, rel=1e-3)
    drawn = report.figure(name, runs, sweep)
    assert [ax.get_title(loc="left") for ax in drawn.axes[: len(runs)]] == list(runs)


def test_the_exact_shares_tell_the_corrections_apart():
    shares = report.exact_shares(pairs=4)
    assert shares["none"] == (1, 0, 1)
    assert abs(shares["token_truncated"][0]) < 0.3 < 0.5 < shares["geometric_mean"][0]
    assert shares["token_masked"][0] < -0.5  # turned around
    assert shares["sequence_truncated"][2] > shares["token_truncated"][2] > 1 > shares["negative_masked"][2]
    small = report.exact_shares(sigma=0.05, pairs=2)
    assert all(math.isclose(small[name][0], 0, abs_tol=1e-6) for name in ("token_truncated", "token_masked"))


def test_readme_shows_the_table_of_the_stored_runs(monkeypatch):
    """The scores; the exact columns, half a minute's work, are those of README itself."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(report, "exact_shares", lambda: dict.fromkeys(report.CORRECTIONS, (0.0, 0.0, 0.0)))
    for row in report.one_table(RESULTS).splitlines()[2:]:
        name, _, _, *scores = row.strip("| ").split(" | ")
        (found,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert found.strip("| ").split(" | ")[3:] == scores


def test_readme_counts_the_cells_of_the_stored_phase_diagram():
    rows = report.read_phases(RESULTS / "phases.csv")
    assert len(rows) == 8 * len(report.PHASES_LENGTHS) * len(report.PHASES_SIGMAS)
    assert all(row["border"] == 0 for row in rows if row["win"] == row["lose"])
    counts = report.phases_agreement(rows)
    right, failing, others = counts[True, True] + counts[False, False], counts[True, True], counts[False, False]
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"held in {right} of {sum(counts.values())} cells" in text
    assert f"{failing} fail" in text and f"others {others} do not" in " ".join(text.split())
