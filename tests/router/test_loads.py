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
