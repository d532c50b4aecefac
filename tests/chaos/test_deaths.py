"""Twenty deaths of simulated workers under mixed traffic: the short form of ``make deaths``."""

from __future__ import annotations

import pytest
from deaths import run
from traffic import Outcome


@pytest.mark.timeout(420)
def test_twenty_deaths_cost_pauses_and_nothing_else() -> None:
    report = run(20, seed=20, prefill=3, decode=3, clients=4, calm_s=1.0)
    assert report["faults"] == []
    assert report["deaths"] == 20
    assert report["outcomes"].get(Outcome.RIGHT, 0) > 0
    assert report["outcomes"].get(Outcome.CUT, 0) == 0, "the router lived"
