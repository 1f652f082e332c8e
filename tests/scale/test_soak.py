"""The soak, short: a server and a trainer are killed once each. The long one is run by hand (tests/scale/soak.py)."""

import pytest

from tests.scale.soak import differences, soak


@pytest.mark.slow
@pytest.mark.nightly
def test_kills_of_server_and_trainer_leave_no_trace(tmp_path):
    options = {"kind": "alone", "steps": 6, "seed": 1, "seconds": 300}
    plain = soak(tmp_path / "undisturbed", kills=0, **options)
    shaken = soak(tmp_path / "shaken", kills=2, **options)
    assert (plain.starts, shaken.starts) == ({"server": 1, "trainer": 1}, {"server": 2, "trainer": 2})
    found = differences(shaken, plain)
    assert found.pop("weights") == 0.0
    assert not any(found.values()), found
