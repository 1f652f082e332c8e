"""What part of an engine's error comes back."""

import pytest
import torch

from minirl_edu.config import load_config
from minirl_edu.experiments.systematic import error_parts, markdown, measure_parts


def test_the_parts_of_errors_made_of_known_ones():
    generator = torch.Generator().manual_seed(0)
    syncs, tokens = 5, 20_000
    fixed = 0.3 * torch.randn(tokens, generator=generator)
    fresh = 0.5 * torch.randn(syncs, tokens, generator=generator)
    systematic, random = error_parts(fixed + fresh)
    # Standard errors: 0.09 · (2 / 20,000)^½ = 0.001, and 0.25 · (2 / 80,000)^½ = 0.001; four of them each.
    assert systematic == pytest.approx(0.09, abs=0.004)
    assert random == pytest.approx(0.25, abs=0.005)
    assert error_parts(fixed.expand(syncs, -1)) == pytest.approx((fixed.square().mean().item(), 0), abs=1e-7)
    # Without the correction for the mean of five draws this would be 0.05.
    assert error_parts(fresh)[0] == pytest.approx(0, abs=0.003)
    with pytest.raises(ValueError, match="1 syncs"):
        error_parts(fresh[:1])


@pytest.mark.slow
def test_frozen_errors_come_back_and_stochastic_ones_do_not():
    shares = {}
    for rounding in ("frozen", "stochastic", "nearest"):
        config = load_config(
            None,
            [
                *("model.name=chain-steps", "rollout.precision=int3/fp32", f"rollout.rounding={rounding}"),
                *("train.mini_batch_prompts=4", "train.global_steps=4", "train.lr=1e-4", "eval.every=0"),
            ],
        )
        systematic, random = measure_parts(config, syncs=4, prompts=16)
        shares[rounding] = systematic / (systematic + random)
    assert shares["frozen"] > 0.9 > 0.6 > shares["stochastic"] and shares["nearest"] > shares["stochastic"]


def test_the_table_has_sizes_and_shares_with_their_range():
    table = markdown({"one": [(0.03, 0.01), (0.01, 0.03)], "two": [(0.04, 0.0)]}).splitlines()
    assert table[2:] == [
        "| one | 0.2 (0.2 to 0.2) | 50% (25% to 75%) | 2 |",
        "| two | 0.2 (0.2 to 0.2) | 100% (100% to 100%) | 1 |",
    ]
