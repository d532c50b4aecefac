"""A server's forecasts beside what came."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.bench.slo.forecasts import forecast_errors, lines
from pdserve.bench.slo.records import Cause, Record


def record(
    ttft: float, forecast: float | None, *, attempts: int = 1, failure: Cause | None = None
) -> Record:
    said = None if forecast is None else {"ttft_ms": forecast, "tpot_ms": 20.0}
    server: dict[str, Any] = {
        "attempts": attempts,
        "ttft_ms": ttft,
        "tpot_ms": None,
        "forecast": said,
    }
    return Record(0, 0.0, 0.0, (), 1.0, 1, 1, failure=failure, server=server)


def test_errors_are_shares_of_what_came() -> None:
    records = [record(100.0, 90.0), record(100.0, 130.0), record(200.0, 200.0)]
    left_out = [
        record(100.0, 500.0, attempts=2),
        record(100.0, 500.0, failure=Cause.CUT),
        record(100.0, None),
    ]
    found = forecast_errors(records + left_out)
    assert set(found) == {"ttft"}  # answers of one token have no TPOT
    assert found["ttft"] == pytest.approx({"requests": 3, "median": 0.1, "p95": 0.3, "bias": 0.0})
    assert lines(found)[-2] == "| TTFT | 3 | 10.0% | 30.0% | 0.0% |"


def test_a_server_without_forecasts_has_no_errors() -> None:
    assert forecast_errors([record(100.0, None)]) == {} and lines({}) == []
