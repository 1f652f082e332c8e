"""Derived seeds are fixed numbers, and unrelated between runs, streams and steps."""

import pytest
import torch

from minirl_edu.seeding import STREAMS, derive_seed


def test_a_derived_seed_is_the_same_forever():
    """Shipped results depend on these: changing them, or the order of `STREAMS`, makes runs no longer comparable."""
    assert derive_seed(0, "problems") == 7_896_617_691_693_857_887
    assert derive_seed(3, "evaluation", 5) == 7_178_667_128_109_471_427


def test_seeds_differ_by_run_stream_and_step():
    seeds = {derive_seed(seed, stream, step) for seed in range(20) for stream in STREAMS for step in range(20)}
    assert len(seeds) == 20 * len(STREAMS) * 20
    assert min(seeds) >= 0 and max(seeds) < 2**63  # what torch's and Python's generators take


def test_neighbouring_seeds_give_unrelated_streams():
    draws = [torch.rand(500, generator=torch.Generator().manual_seed(derive_seed(0, "rollout", i))) for i in range(20)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(20)
    assert correlation.abs().max() < 5 / 500**0.5  # the largest of 190 with standard deviation 500^−½


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError):
        derive_seed(0, "prompts")
