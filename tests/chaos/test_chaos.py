"""Three minutes of `make chaos`, with a fixed seed. No time is judged, but a hang."""

from __future__ import annotations

import json

import pytest
from chaos import Options, run
from plan import Kind


@pytest.mark.timeout(1800)
def test_a_deployment_that_is_broken_on_purpose_loses_nothing() -> None:
    report = run(Options(seed=22, minutes=3.0, deaths=None, kinds=tuple(Kind)))
    assert report["faults"] == [], json.dumps(report, indent=2)
    assert report["calls"]["right"] > 0
    assert report["kinds"], "the time was over before the first fault"
