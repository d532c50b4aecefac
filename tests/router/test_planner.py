"""Who changes roles, by what the two phases ask for."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from pdserve.core.cost import DecodeCost, PrefillCost, StepCost
from pdserve.core.ids import Role, WorkerRef
from pdserve.router.planner import COOL_S, SETTLED_S, Planner, decode_demand
from pdserve.router.roles import Holder, Move
from pdserve.router.snapshot import Snapshot, WorkerView

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def holders(*roles: Role) -> list[Holder]:
    return [Holder(f"w{i}", role, num_requests=9 - i, native=role) for i, role in enumerate(roles)]


def moves(
    planner: Planner,
    workers: list[Holder],
    prefill: float,
    decode: float,
    seconds: int,
    at: int = 0,
) -> list[tuple[int, Move]]:
    """A look a second; each move is made at once."""
    found = []
    for second in range(at, at + seconds):
        for move in planner.look(float(second), prefill * 1e3, decode, list(workers)):
            found.append((second, move))
            for i, one in enumerate(workers):
                if one.worker_id == move.worker_id:
                    workers[i] = replace(one, role=move.after)
    return found


@pytest.mark.parametrize(
    ("roles", "prefill", "decode", "expected"),
    [
        ((P, D, D, D), 1.8, 0.6, [("w3", P), ("w2", P)]),  # the least busy of those that decode
        ((P, P, P, D), 0.5, 0.9, [("w2", D)]),
        ((P, D, D, D), 0.5, 1.5, []),  # nobody is busy
        ((P, D, D, D), 0.8, 2.7, []),  # no division is better by enough
        ((P, D, D, D), 0.9, 1.9, [("w3", M)]),  # too much for one, not enough for two
        ((P, D), 3.0, 0.1, [("w1", M)]),  # somebody must decode
        ((P, D), 0.7, 0.8, []),  # each has enough of its own
        ((P, P, D, D, D, D, D, D), 6.0, 2.0, [("w7", P), ("w6", P), ("w5", P), ("w4", P)]),
        ((M, M, M), 3.0, 0.1, [("w2", P), ("w1", P)]),  # the last one does the little that is left
        ((M, M), 1.0, 0.9, [("w1", P), ("w0", D)]),  # apart nothing is worse
        ((M, M), 0.2, 0.3, []),
        ((M, M), 1.6, 0.1, [("w1", P)]),
    ],
)
def test_workers_go_where_the_load_is(
    roles: tuple[Role, ...], prefill: float, decode: float, expected: list[tuple[str, Role]]
) -> None:
    found = moves(Planner(), holders(*roles), prefill, decode, 150)
    assert [(move.worker_id, move.after) for _, move in found] == expected
    times = [second for second, _ in found]
    assert all(later - earlier >= COOL_S for earlier, later in itertools.pairwise(times))
    assert not times or times[0] >= SETTLED_S


def test_a_large_fleet_moves_by_eighths_and_stops_where_it_serves_best() -> None:
    """Begun half and half, with too few to prefill by far, and by a little."""
    found = moves(Planner(), holders(*(P,) * 32, *(D,) * 32), 50.0, 10.0, 150)
    assert {(move.before, move.after) for _, move in found} == {(D, P)}
    by_time = Counter(second for second, _ in found)
    assert list(by_time.values()) == [8, 8, 5]  # 53 and 11: 0.94 and 0.91 busy
    assert all(later - earlier >= COOL_S for earlier, later in itertools.pairwise(by_time))
    found = moves(Planner(), holders(*(P,) * 32, *(D,) * 32), 35.0, 24.0, 150)
    assert len(found) == 6  # 38 and 26, though eight might have moved


@pytest.mark.parametrize("prefill", [0.3, 0.7, 1.0, 1.5, 2.2, 3.0])
@pytest.mark.parametrize("decode", [0.2, 0.8, 1.3, 1.9, 2.6])
def test_a_steady_load_comes_to_rest(prefill: float, decode: float) -> None:
    """From wherever it starts, nobody goes to and fro, and somebody is there for each phase."""
    for roles in itertools.combinations_with_replacement((P, D, M), 4):
        if set(roles) in ({P}, {D}):
            continue
        workers = holders(*roles)
        found = moves(Planner(), workers, prefill, decode, 400)
        assert len(found) <= 6 and all(second < 200 for second, _ in found), roles
        after = {one.role for one in workers}
        assert after & {P, M} and after & {D, M}


def test_a_load_that_swings_moves_nobody() -> None:
    planner, workers = Planner(), holders(P, P, D, D)
    found = []
    for at in range(0, 120, 4):
        heavy = at % 8 == 0
        found += moves(planner, workers, 2.2 if heavy else 0.8, 0.8 if heavy else 2.2, 4, at)
    assert found == []


def test_who_was_started_in_a_role_goes_back_to_it_first() -> None:
    planner, workers = Planner(), holders(P, D, D, D)
    assert [move.worker_id for _, move in moves(planner, workers, 2.4, 0.4, 40)] == ["w3", "w2"]
    back = moves(planner, workers, 0.3, 2.4, 60, 40)
    assert [(move.worker_id, move.after) for _, move in back] == [("w3", D), ("w2", D)]


def test_decode_asks_for_what_its_steps_fill_of_the_objective() -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
    idle = WorkerView(WorkerRef("d0", 1), D, 9999, 999_999, cost=cost)
    busy = replace(idle, ref=WorkerRef("d1", 1), batch=100, kv_tokens=100_000, tpot_ms=20.0)
    assert decode_demand(Snapshot([idle])) == 0.0
    assert decode_demand(Snapshot([idle, busy])) == pytest.approx(7.0 / 19.0)
    assert decode_demand(Snapshot([replace(busy, cost=None)])) == 0.0
    # no place left, or no memory: as full as it gets, however far off the objective is
    relaxed = replace(busy, tpot_ms=200.0)
    assert decode_demand(Snapshot([relaxed])) < 0.5
    for full in ({"max_batch": 100}, {"max_batch": 60}, {"capacity": 100_000}):
        assert decode_demand(Snapshot([replace(relaxed, **full)])) == 1.0  # type: ignore[arg-type]
