"""Who is let in, and what the router believes that its workers still have to do."""

from __future__ import annotations

import math

import pytest

from pdserve.core.config import Admission
from pdserve.core.ids import WorkerRef
from pdserve.router.admission import admit, refused
from pdserve.router.loads import Loads
from pdserve.router.snapshot import Forecast, Objectives, Placement

ASKED = Objectives(500.0, 30.0)
P, D = WorkerRef("p", 1), WorkerRef("d", 1)


@pytest.mark.parametrize(
    ("admission", "forecast", "objectives", "retry_after"),
    [
        (Admission.SLO, Forecast(449.0, 28.0, 10.0, 28.5), ASKED, None),
        (Admission.SLO, Forecast(1650.0, 28.0, 10.0, 28.5), ASKED, 1.2),
        (Admission.SLO, Forecast(499.0, 28.0, 10.0, 28.5), ASKED, 0.05),  # it may well miss
        (Admission.SLO, Forecast(449.0, 31.0, 10.0, 28.5), ASKED, 1.0),
        # it would do for this one, but not for those that are there
        (Admission.SLO, Forecast(449.0, 16.0, 10.0, 14.25), ASKED, 1.0),
        (Admission.SLO, Forecast(9e9, 9e9, 10.0), Objectives(), None),
        (Admission.SLO, None, ASKED, None),
        (Admission.QUEUE, Forecast(9e9, 9e9, 10.0, 28.5), ASKED, None),
        (Admission.OPEN, Forecast(9e9, 9e9, 10.0, 28.5), ASKED, None),
    ],
)
def test_admit(
    admission: Admission,
    forecast: Forecast | None,
    objectives: Objectives,
    retry_after: float | None,
) -> None:
    found = admit(admission, forecast, objectives)
    assert (found.retry_after if found is not None else None) == retry_after


def test_the_client_hears_the_forecast() -> None:
    refusal = admit(Admission.SLO, Forecast(1650.0, 28.0, 10.0, 28.5), ASKED)
    assert refusal is not None
    error = refused(refusal)
    assert (error.status, error.code, error.retry_after) == (429, "slo_missed", 1.2)
    assert "1650 ms" in str(error) and "500 ms" in str(error)


def split(work_ms: float) -> Placement:
    return Placement(P, D, Forecast(0.0, 0.0, work_ms))


def test_the_loads_of_a_request_come_and_go() -> None:
    loads = Loads()
    loads.placed("a", split(40.0), 100, 50.0, 30.0)
    loads.placed("b", split(20.0), 60, 50.0, 15.0)
    assert (loads[P].prefill_ms, loads[P].batch, loads[P].tpot_ms) == (60.0, 0, math.inf)
    decode = loads[D]
    assert (decode.batch, decode.kv_tokens, decode.kv_growth, decode.tpot_ms) == (2, 160, 100, 15)
    loads.started("a", 7.0)
    assert (loads[P].head_ms, loads[P].head_since) == (40.0, 7.0)
    loads.token("a", 7.05)
    assert (loads[P].prefill_ms, loads[P].head_ms) == (20.0, 0.0)
    assert (decode.kv_tokens, decode.kv_growth) == (161, 99)
    loads.token("a", 7.1, 80)  # with what it has less than the mean at first it has more later
    assert (decode.kv_tokens, decode.kv_growth) == (241, 19)
    loads.token("a", 7.2, 80)  # longer than expected: it counts for what it is
    assert (decode.kv_tokens, decode.kv_growth) == (321, 0)
    loads.left("b")
    assert (decode.batch, decode.tpot_ms, loads[P].prefill_tokens) == (1, 30.0, 0)
    loads.left("a")
    assert loads[D].num_requests == loads[P].num_requests == 0


def test_nobody_waits_for_a_prompt_that_is_late() -> None:
    loads = Loads()
    for name, deadline in (("late", 1.0), ("in time", 3.0), ("started", 1.0)):
        loads.placed(name, split(100.0), 10, deadline=deadline)
    loads.started("started", 0.5)
    assert loads.demote(0.8) == set()
    assert loads[P].prefill_ms == 300.0
    assert loads.demote(1.0) == {P}
    assert loads[P].prefill_ms == 200.0
    for name in ("late", "in time", "started"):
        loads.token(name, 2.0)
    assert loads[P].prefill_ms == 0.0
    assert loads.demote(9.0) == set()


def test_what_a_step_has_done_beside_the_prompt_that_it_ends_is_the_next_ones() -> None:
    """Both have left the queue in one step; where only one had, the next begins from nothing."""
    shared, apart = Loads(), Loads()
    for loads in (shared, apart):
        for name in ("a", "b"):
            loads.placed(name, split(40.0), 100)
        loads.started("a", 7.0)
    shared.started("b", 7.0)
    assert shared[P].head_ms == 80.0 and apart[P].head_ms == 40.0
    for loads in (shared, apart):
        loads.token("a", 7.1)  # 100 ms, of which it took fewer
        loads.started("b", 7.1)
        assert loads[P].head_ms == loads[P].prefill_ms == 40.0
    assert apart[P].head_since == 7.1
    assert 7.04 < shared[P].head_since < 7.09
    shared.token("b", 7.15)
    assert shared[P].head_ms == 0.0


def test_a_prompt_that_was_done_sooner_than_expected_has_done_nothing_for_the_next() -> None:
    loads = Loads()
    for name in ("a", "b"):
        loads.placed(name, split(40.0), 100)
        loads.started(name, 7.0)
    loads.token("a", 7.02)
    assert loads[P].head_since == 7.02
