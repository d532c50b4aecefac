"""The books of what each worker has been given."""

from __future__ import annotations

from pdserve.core.ids import WorkerRef
from pdserve.router.loads import Loads
from pdserve.router.snapshot import Forecast, Placement

A, B = WorkerRef("a", 1), WorkerRef("b", 1)
PLACEMENT = Placement(A, B, Forecast(10.0, 10.0, 8.0))


def test_a_request_that_is_placed_again_before_its_prompt_was_due() -> None:
    """A replay has the id and the deadline of what it replaces, and may have its forecast."""
    loads = Loads()
    for _ in range(3):
        loads.placed("x", PLACEMENT, 100, deadline=1.0)
        loads.left("x")
    loads.placed("x", PLACEMENT, 100, deadline=1.0)
    assert loads.demote(0.5) == set()
    assert loads.demote(1.5) == {A}
    assert loads[A].prefill_ms == 0.0
    loads.left("x")
    assert loads[A].num_requests == loads[B].num_requests == 0


def test_nothing_is_kept_of_a_life_that_is_over() -> None:
    loads = Loads()
    loads.placed("x", PLACEMENT, 100, deadline=1.0)
    loads.started("x", 0.0)
    loads.left("x")
    empty = Loads()
    loads.gone(A)
    assert loads._paces == empty._paces
    assert loads._loads == empty._loads


def test_a_worker_that_has_no_prompt_has_no_work() -> None:
    """Sums of such figures do not come back to nothing by themselves."""
    loads = Loads()
    works = {"x": 0.1, "y": 0.2, "z": 0.3}
    for name, work_ms in works.items():
        loads.placed(name, Placement(A, B, Forecast(10.0, 10.0, work_ms)), 100)
    loads.placed("w", Placement(B, A), 1)  # keeps its books
    for name in works:
        loads.left(name)
    assert loads[A].prefill_ms == 0.0


def test_how_fast_prompts_went_is_known_after_a_pause() -> None:
    loads = Loads()
    for start in range(40):
        loads.placed("x", PLACEMENT, 100)
        loads.started("x", float(start))
        loads.token("x", start + 0.016)  # 8 ms of work in 16
        loads.left("x")
    loads.placed("x", PLACEMENT, 100)
    assert 0.5 < loads[A].pace < 0.56


def test_first_tokens_that_come_late_say_so_of_the_next() -> None:
    """It settles where half of them come later; here each takes 1.25 times as long as its cost."""
    loads, late = Loads(), 1.0
    for number in range(500):
        forecast = Forecast(100.0 * late, 10.0, 80.0)
        loads.placed("x", Placement(A, B, forecast), 100, arrived=float(number))
        loads.token("x", number + 0.125)
        late, late_at = loads[A].late, loads[A].late_at
        loads.left("x")
        assert late_at == number + 0.125
    assert 1.23 < late < 1.27
    for number in range(500):
        loads.placed("x", Placement(A, B, Forecast(1.0, 10.0, 80.0)), 100, arrived=float(number))
        loads.token("x", number + 0.9)
        late = loads[A].late
        loads.left("x")
    assert late == 1.5  # what is further off than that is no trend
