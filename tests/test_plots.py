"""Figures: what they draw is what the metrics say. No test looks at pixels."""

import io
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from minirl_edu import plots
from tests.conftest import outside

KEYS = ["reward", "entropy", "kl_rollout_old", "log_ratio_mismatch", "log_ratio_staleness", "first_order_gap"]
KEYS += ["entropy_drift", "length_reward_cov", "k3_rollout_old", "routing_flip_rate", "clip_frac_pos", "clip_frac_neg"]


def metrics(steps: int = 20, *, mini_batches: int = 1, **columns) -> plots.Metrics:
    """A run whose columns are 0.5 unless given, evaluated every 5 steps."""
    grad_step = np.arange(steps + 1.0)
    run = {"grad_step": grad_step, "global_step": np.ceil(grad_step / mini_batches)}
    run |= {key: np.where(grad_step > 0, 0.5, math.nan) for key in KEYS}
    run["score"] = np.where(grad_step % 5 == 0, grad_step / max(1, steps), math.nan)
    return run | {key: np.asarray(value, dtype=float) for key, value in columns.items()}


def lines(figure: Figure, gid: str):
    return [line for ax in figure.axes for line in ax.lines if line.get_gid() == gid]


def line(figure: Figure, gid: str) -> tuple[list[float], list[float]]:
    (found,) = lines(figure, gid)
    return list(map(float, found.get_xdata())), list(map(float, found.get_ydata()))  # type: ignore[arg-type]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_mean_interval():
    values = np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]])
    mean, half = plots.mean_interval(values)
    # Three seeds: t(0.975, 2) = 4.303, standard deviation 1.
    np.testing.assert_allclose(mean, [2, 4])
    np.testing.assert_allclose(half, [4.302652729749462 / math.sqrt(3), 0], rtol=1e-12)
    assert np.isnan(plots.mean_interval(values[:1])[1]).all()


# ------------------------------------------------------------------------------------------------------------ style


def test_methods_look_the_same_in_every_company():
    alone = plots.method_styles(["R3"])["R3"]
    among = plots.method_styles(["something", "MiniRL + R3", "GRPO"])["MiniRL + R3"]
    assert alone == among == plots.METHOD_STYLE["R3"]
    assert plots.method_styles(["MiniRL - IS"])["MiniRL - IS"] == plots.METHOD_STYLE["− IS"]
    assert plots.method_styles(["MiniRL, no clipping"])["MiniRL, no clipping"] == plots.METHOD_STYLE["no clipping"]


def test_methods_differ_in_greyscale():
    styles = plots.METHOD_STYLE.values()
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles}) == len(plots.METHOD_STYLE)
    assert len({style["color"] for style in styles}) == len(plots.METHOD_STYLE)


def test_a_method_in_several_settings_keeps_its_colour_and_gets_a_line_for_each():
    styles = plots.method_styles(["R3 (n2)", "R3 − IS (n2)", "R3 (n4)", "something (n4)"])
    assert [styles[label]["color"] for label in ("R3 (n2)", "R3 (n4)")] == [plots.METHOD_STYLE["R3"]["color"]] * 2
    assert styles["R3 − IS (n2)"]["color"] == plots.METHOD_STYLE["R3 − IS"]["color"]
    assert styles["R3 (n2)"]["linestyle"] == styles["R3 − IS (n2)"]["linestyle"] != styles["R3 (n4)"]["linestyle"]


def test_a_png_keeps_every_methods_colour():
    figure = plots.four_curves({method: metrics() for method in plots.METHOD_STYLE})
    image = Image.open(io.BytesIO(plots.to_png(figure, scale=1))).convert("RGB")
    seen = np.array([colour for _, colour in image.getcolors() or []])  # type: ignore[misc]
    for style in plots.METHOD_STYLE.values():
        wanted = 255 * np.array(to_rgb(style["color"]))
        assert np.abs(seen - wanted).max(1).min() <= 8, style  # of 256 levels: nobody sees that


def test_unknown_labels_get_unused_styles_and_always_the_same():
    labels = ["MiniRL", *(f"idea {i}" for i in range(12))]
    styles = plots.method_styles(labels)
    assert styles == plots.method_styles(labels)
    looks = [(s["color"], str(s["linestyle"]), s["marker"]) for s in styles.values()]
    assert len(set(looks)) == len(labels)
    assert styles["idea 0"]["color"] != styles["MiniRL"]["color"]


# ---------------------------------------------------------------------------------------------------------- figures


def test_evaluations_are_joined_across_the_steps_without_one():
    x, y = line(plots.four_curves({"MiniRL": metrics()}), "score:MiniRL")
    assert x == [0, 5, 10, 15, 20]
    assert y == [0, 0.25, 0.5, 0.75, 1]


def test_the_rollout_engines_score_is_drawn_too():
    run = metrics()
    figure = plots.four_curves({"MiniRL": run | {"score_rollout": run["score"] / 2}})
    assert line(figure, "faint:score_rollout:MiniRL")[1] == [0, 0.125, 0.25, 0.375, 0.5]
    assert not lines(plots.four_curves({"MiniRL": run}), "faint:score_rollout:MiniRL")


def test_colour_of_a_line_is_its_methods():
    figure = plots.four_curves({"− IS": metrics(), "MiniRL": metrics()})
    for method in ("− IS", "MiniRL"):
        (drawn,) = lines(figure, f"score:{method}")
        assert to_hex(drawn.get_color()).upper() == plots.METHOD_STYLE[method]["color"]


def test_seeds_are_averaged_as_far_as_all_of_them_got():
    long, short = metrics(20, score=np.full(21, 0.8)), metrics(10, score=np.full(11, 0.4))
    figure = plots.four_curves({"MiniRL": [long, short]})
    x, y = line(figure, "score:MiniRL")
    assert x[-1] == 10
    np.testing.assert_allclose(y, 0.6)
    alone = [np.asarray(drawn.get_xdata()) for drawn in lines(figure, "seed:score:MiniRL")]
    assert max(x.max() for x in alone) == 20
    band = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData)  # t(0.975, 1) = 12.706
    np.testing.assert_allclose(band.height, 2 * 12.706205 * 0.2, rtol=1e-6)


def test_reward_is_smoothed_with_the_raw_values_behind():
    noisy = np.concatenate([[math.nan], 0.5 + 0.1 * (-1.0) ** np.arange(120)])
    figure = plots.four_curves({"MiniRL": metrics(120, reward=noisy)})
    np.testing.assert_array_equal(line(figure, "faint:reward:MiniRL")[1], noisy[1:])
    np.testing.assert_allclose(line(figure, "reward:MiniRL")[1], 0.5, atol=1e-12)


def test_smoothing_leaves_no_saw_tooth_of_the_mini_batches():
    staleness = np.concatenate([[math.nan], np.tile([0.0, 0.1, 0.2, 0.3], 30)])
    figure = plots.ratio_decomposition({"R2": metrics(120, mini_batches=4, log_ratio_staleness=staleness)})
    np.testing.assert_allclose(line(figure, "log_ratio_staleness:R2")[1], 0.15, atol=1e-12)


@pytest.mark.parametrize(
    "entropy, scale",
    [
        (np.geomspace(1, 1e-4, 21), "log"),
        (np.linspace(0.5, 0.4, 21), "linear"),
        (np.append(np.geomspace(1, 1e-4, 20), 0.0), "symlog"),  # an exact 0 must not vanish from the axis
        (np.zeros(21), "linear"),
    ],
)
def test_entropy_is_logarithmic_where_it_spans_decades(entropy, scale):
    assert plots.four_curves({"MiniRL": metrics(entropy=entropy)}).axes[2].get_yscale() == scale


def test_noise_around_zero_keeps_a_linear_kl_axis():
    kl = 1e-4 * np.random.default_rng(0).standard_normal(201)
    run = metrics(200, kl_rollout_old=kl, k3_rollout_old=abs(kl))
    assert plots.four_curves({"MiniRL": run}).axes[3].get_yscale() == "linear"


def test_the_kl_is_k3_in_bold_and_k1_faint():
    run = metrics(k3_rollout_old=np.full(21, 0.02), kl_rollout_old=np.full(21, 0.01))
    figure = plots.four_curves({"MiniRL": run})
    (bold,), (faint,) = (lines(figure, gid) for gid in ("k3_rollout_old:MiniRL", "faint:kl_rollout_old:MiniRL"))
    assert bold.axes is faint.axes is figure.axes[3]
    np.testing.assert_allclose(np.asarray(bold.get_ydata()), 0.02)
    np.testing.assert_allclose(np.asarray(faint.get_ydata()), 0.01)
    assert bold.get_linewidth() > faint.get_linewidth() and faint.get_alpha() == 0.5


def test_the_two_factors_share_one_scale():
    figure = plots.ratio_decomposition({"R3": metrics(log_ratio_staleness=np.full(21, 3.0))})
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


RNG = np.random.default_rng(0)
DECADES = {
    "of one size": lambda: RNG.uniform(0.1, 0.2, 161),
    "from large to small": lambda: np.geomspace(3.0, 1e-6, 161) * np.exp(RNG.normal(0, 1, 161)),
    "with exact zeros": lambda: np.geomspace(3.0, 1e-6, 161) * (np.arange(161) % 8 > 0),
    "with negative noise": lambda: np.geomspace(3.0, 1e-4, 161) + 1e-3 * RNG.standard_normal(161),
    "with a spike": lambda: 1e-3 + 1e4 * (np.arange(161) == 80),
    "all zero": lambda: np.zeros(161),
    "never positive": lambda: -RNG.uniform(1e-6, 1.0, 161),
}


@pytest.mark.parametrize("shape", DECADES)
def test_everything_that_is_drawn_lies_inside_its_axes(shape):
    """In every panel, also where panels share their limits and one of them spans decades."""
    for other in ("of one size", shape):
        columns = {key: DECADES[shape if i % 2 else other]() for i, key in enumerate(KEYS)}
        runs = {"MiniRL": metrics(160, mini_batches=8, **columns), "R3": [metrics(160), metrics(40, mini_batches=8)]}
        draw = (plots.four_curves, plots.ratio_decomposition, plots.routing_flips, plots.drift, plots.clipping)
        assert [text for function in draw for text in outside(function(runs))] == []


def test_a_metric_that_no_run_has_says_so():
    dense = metrics(routing_flip_rate=np.full(21, math.nan))
    assert texts(plots.routing_flips({"MiniRL": dense})) == ["not recorded"]
    del dense["routing_flip_rate"]
    assert texts(plots.routing_flips({"MiniRL": dense})) == ["not recorded"]


def test_gaps_and_infinities_do_not_break_a_figure():
    broken = metrics()
    for key in KEYS:
        broken[key] = np.where(np.arange(21) % 3 == 0, math.nan, broken[key])
        broken[key][-1] = math.inf
    runs = {"MiniRL": [broken, metrics(7)], "− IS": metrics(0), "odd $x_1$ _label": metrics()}
    draw = (plots.four_curves, plots.ratio_decomposition, plots.routing_flips, plots.drift, plots.clipping)
    for figure in (function(runs) for function in draw):
        assert plots.to_png(figure, scale=1).startswith(b"\x89PNG")
        assert [t.get_text() for t in figure.legends[0].get_texts()] == list(runs)


def test_events_are_marked_where_there_is_a_curve_and_named_where_there_is_room():
    run, flat = metrics(), metrics()
    del flat["routing_flip_rate"]
    runs, few = {"MiniRL": [run, run], "R3": run}, {"MiniRL": [4, 9]}
    for draw in (plots.four_curves, plots.ratio_decomposition, plots.routing_flips, plots.drift, plots.clipping):
        for ax in draw(runs, events=few).axes:
            (mark,) = (drawn for drawn in ax.collections if drawn.get_gid() == "event:MiniRL")
            assert isinstance(mark, LineCollection)
            assert [segment[0][0] for segment in mark.get_segments()] == [4, 9]
            assert to_hex(mark.get_color()[0]) == plots.METHOD_STYLE["MiniRL"]["color"].lower()  # pyright: ignore[reportArgumentType]
            assert [text.get_text() for text in ax.texts] == ["step 4", "step 9"]
        assert texts(draw(runs, events={"MiniRL": [4, 9], "R3": [11]})) == []
        assert not any(ax.collections for ax in draw({"R3": run}).axes)
    figure = plots.routing_flips({"MiniRL": flat}, events={"MiniRL": [7]})
    assert not figure.axes[0].collections and texts(figure) == ["not recorded"]


def test_zero_is_on_the_axis_of_the_drift():
    figure = plots.drift({"MiniRL": metrics(entropy_drift=np.linspace(0.4, 0.5, 21))})
    assert figure.axes[0].get_ylim()[0] <= 0 <= figure.axes[1].get_ylim()[1]


def test_figures_can_be_drawn_in_threads():
    pictures: list[bytes] = []
    run = {"MiniRL": metrics()}
    threads = [threading.Thread(target=lambda: pictures.append(plots.to_png(plots.clipping(run)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 4 and len(set(pictures)) == 1


def test_a_figure_shows_itself_in_a_notebook():
    png, size = plots.clipping({"MiniRL": metrics()})._repr_png_()  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG")
    # Twice the pixels at the size of the page: width and height are in the PNG's header.
    assert int.from_bytes(png[16:20]) == 2 * size["width"]


def test_rollout_tokens_decomposes_each_ratio():
    rollout, old = [-1.0, -2.0, -0.5], [-1.1, -1.8, -0.5]
    new = torch.tensor([-1.0, -1.9, -0.3], requires_grad=True)
    figure = plots.rollout_tokens([" a", "$5", "\n"], rollout, old, new)
    heights = [float(bar.get_height()) for bar in figure.axes[1].patches]  # type: ignore[attr-defined]
    np.testing.assert_allclose(heights, [-0.1, 0.2, 0, 0.1, -0.1, 0.2], atol=1e-6)
    ticks = figure.axes[1].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["␣a", "$5", "⏎"]
    assert not any(tick.get_parse_math() for tick in ticks)
    plots.to_png(figure)


def test_rollout_tokens_refuses_padding():
    with pytest.raises(ValueError, match=r"logp_old has shape \(3,\) for 2 tokens"):
        plots.rollout_tokens(["a", "b"], [-1, -1], [-1, -1, 0], [-1, -1])


def test_precision_dial_shows_exact_zeros_as_zeros():
    rows = [
        {"precision": "none", "kl": 0.0, "flip_rate": 0.0},
        {"precision": "fp8", "kl": 1e-5, "flip_rate": 0.06, "kl_r3": 0.0},
        {"precision": "int3", "kl": 0.12, "flip_rate": None, "kl_r3": 0.06},
    ]
    figure = plots.precision_dial(rows)
    plots.to_png(figure)
    left = figure.axes[0]
    x, y = line(figure, "kl")
    zero = left.get_xticks()[0]
    assert left.get_xticklabels()[0].get_text() == "0" and left.get_xscale() == "log"
    assert x == [zero, 1e-5, 0.12] and y == [0, 1, 2]
    assert line(figure, "kl_r3") == ([zero, 0.06], [1, 2])
    assert texts(figure) == ["0 %", "6 %", "dense"]


def test_precision_dial_refuses_a_negative_kl():
    with pytest.raises(ValueError, match="kl of fp8 is -1e-05"):
        plots.precision_dial([{"precision": "fp8", "kl": -1e-5, "flip_rate": 0.1}])


# --------------------------------------------------------------------------------------------------------------- gap


def gap_row(label="MoE, vLLM bf16", k3=(1e-3, 4e-3), r3=(1e-5, 4e-5), flips=(0.01, 0.03), **more):
    """A row as `minirl_edu.gap.run_setting` returns it, with a seed per number."""

    def side(value):
        return {"k3": value, "quantiles": {"0.01": -value, "0.5": 0.0, "0.99": value}}

    seeds = [
        {
            "plain": side(a),
            "r3": None if r3 is None else side(r3[i]),
            "flip_rate": None if flips is None else flips[i],
            "positions": [
                {"from": 2 * at, "to": 2 * at + 1, "plain": {"k3": a * (at + 1)}, "r3": r3 and {"k3": r3[i]}}
                for at in range(3)
            ],
            "layers": [] if flips is None else [{"layer": n, "flip_rate": flips[i]} for n in (1, 3)],
        }
        for i, a in enumerate(k3)
    ]
    return {"label": label, "trainer_dtype": "bfloat16", "skipped": None, "seeds": seeds, **more}


def test_engine_gap_draws_geometric_means_and_every_seed():
    dense = gap_row("dense, vLLM bf16", k3=(1e-5, 1e-5), r3=None, flips=None)
    figure = plots.engine_gap([gap_row(), dense, gap_row("not here", skipped="vLLM is not installed")])
    assert line(figure, "plain:MoE, vLLM bf16")[0] == pytest.approx([2e-3])
    assert line(figure, "r3:MoE, vLLM bf16")[0] == pytest.approx([2e-5])
    assert line(figure, "plain:dense, vLLM bf16")[0] == pytest.approx([1e-5])
    assert [np.asarray(found.get_xdata()).tolist() for found in lines(figure, "seeds:plain")] == [
        [1e-3, 4e-3],
        [1e-5, 1e-5],
    ]
    assert texts(figure)[-2:] == ["2 %", "dense"]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["MoE, vLLM bf16", "dense, vLLM bf16"]
    figure.savefig(io.BytesIO())


def test_engine_gap_names_models_and_foreign_trainers_and_keeps_zeros():
    rows = [
        gap_row("transformers fp32, emulated int8", k3=(0.0,), r3=None, flips=None, model="tiny-dense"),
        gap_row(k3=(1e-3,), r3=(1e-4,), flips=(0.1,), model="tiny-moe"),
    ]
    figure = plots.engine_gap(rows)
    assert {"tiny-dense", "tiny-moe"} <= set(texts(figure))
    assert figure.axes[0].get_yticklabels()[0].get_text().endswith("int8 (bf16 trainer)")
    assert line(figure, "plain:transformers fp32, emulated int8")[0] == pytest.approx([1e-15])
    with pytest.raises(ValueError, match="none was measured"):
        plots.engine_gap([gap_row(skipped="no")])


def test_gap_profile_shows_quantiles_positions_and_layers():
    figure = plots.gap_profile(gap_row())
    assert line(figure, "quantiles:plain") == (pytest.approx([-2.5e-3, 0, 2.5e-3]), [0.01, 0.5, 0.99])
    at, k3 = line(figure, "positions:plain")
    assert at == [1.5, 3.5, 5.5] and k3 == pytest.approx([2e-3, 4e-3, 6e-3])
    assert line(figure, "positions:r3")[1] == pytest.approx([2e-5] * 3)
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["1", "3"]
    assert len(plots.gap_profile(gap_row(k3=(1e-3,), r3=None, flips=None)).axes) == 2


def test_gap_accidents_draws_what_recognition_explains():
    rows = [
        {"text": "nothing", "metrics": {"k3": 1e-12}, "k3_explained": 1e-12, "found": ["healthy"]},
        {"text": "T", "metrics": {"k3": 0.1}, "k3_explained": 0.0, "found": ["temperature", "top_p"]},
    ]
    figure = plots.gap_accidents(rows)
    assert [np.asarray(found.get_xdata()).item() for found in lines(figure, "before")] == [1e-12, 0.1]
    assert line(figure, "after") == ([1e-15], [1])
    assert {"healthy", "temperature, top_p"} <= set(texts(figure))


def test_a_phase_diagram_says_the_score_and_who_fell_in_every_cell_that_was_run():
    scores = np.array([[0.9, 0.2], [math.nan, 0.6]])
    collapsed, alarmed = np.array([[0, 1], [math.nan, 0.5]]), np.array([[0, 0.25], [math.nan, 0]])
    axes = ("learning rate", ["low", "high"]), ("N", [1, 8])
    figure = plots.phase_diagrams({"MiniRL": (scores, collapsed, alarmed)}, *axes)
    ax = figure.axes[0]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "0.90",
        (1, 0): "0.20\n✕ 100 %\n▲ 25 %",
        (1, 1): "0.60\n✕ 50 %",
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["low", "high"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "8"]
    assert ax.images[0].origin == "lower" and ax.images[0].get_clim() == (0, 1)  # the same colours in every figure
    with pytest.raises(ValueError, match="MiniRL: table of shape"):
        plots.phase_diagrams({"MiniRL": (scores[:1], collapsed, alarmed)}, *axes)


def test_early_warning_shows_each_predictors_rate_and_its_leads():
    verdict = SimpleNamespace(predictor="entropy", foretold=3, falls=4, false_alarms=1, healthy=10, leads=[5.0, 10, 40])
    silent = SimpleNamespace(predictor="KL", foretold=0, falls=4, false_alarms=0, healthy=10, leads=[])
    curve = (np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.75, 1.0]))
    figure = plots.early_warning({"entropy": curve}, [verdict, silent])
    chosen = [np.asarray(found.get_xydata()).tolist() for found in lines(figure, "chosen")]
    assert chosen == [[[0.1, 0.75]], [[0.0, 0.0]]]
    assert line(figure, "median:entropy")[0] == [10]
    assert not lines(figure, "median:KL")
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["entropy\n3 of 4 falls", "KL\n0 of 4 falls"]


def test_the_interval_of_two_seeds_does_not_set_the_scale():
    runs = {"MiniRL": [metrics(reward=np.full(21, 0.4)), metrics(reward=np.full(21, 0.6))]}
    # Its 95 % interval is 0.5 ± 12.7 · 0.1.
    bottom, top = plots.four_curves(runs).axes[1].get_ylim()
    assert 0.35 < bottom < 0.4 and 0.6 < top < 0.65


def test_cases_share_their_scales_and_show_each_method_in_each_setting():
    settings = {
        "wrong ones longer": {"MiniRL": metrics(entropy=np.full(21, 0.4)), "− IS": metrics(entropy=np.full(21, 0.1))},
        "all alike": {"MiniRL": metrics(entropy=np.full(21, 0.3)), "− IS": metrics(entropy=np.full(21, 0.3))},
    }
    figure = plots.cases(settings)
    above, below = figure.axes[:2], figure.axes[2:]
    assert [ax.get_title(loc="left") for ax in above] == list(settings)
    assert len({ax.get_ylim() for ax in above}) == len({ax.get_ylim() for ax in below}) == 1
    for ax, runs in zip(above, settings.values(), strict=True):
        for label, run in runs.items():
            (drawn,) = [line for line in ax.lines if line.get_gid() == f"entropy:{label}"]
            np.testing.assert_allclose(np.asarray(drawn.get_ydata(), float), run["entropy"][0])
