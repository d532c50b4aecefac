"""Where the adaptive policy places, as a table: one figure of one worker moved at a time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace

import pytest

from pdserve.core.config import Policy
from pdserve.core.cost import DecodeCost, PrefillCost, StepCost
from pdserve.core.ids import Role, WorkerRef
from pdserve.router.forecast import MARGIN, forecast
from pdserve.router.policy import decide
from pdserve.router.reading import Asked, affordable
from pdserve.router.snapshot import Objectives, Placement, Snapshot, Wish, WorkerView

COST = StepCost(PrefillCost(2.0, 0.022, 8e-7), DecodeCost(4.5, 0.005, 3.3e-5))  # an 8B, a GPU
WISH = Wish(2000, 3000, objectives=Objectives(500.0, 30.0), growth=100.0)
NONE = Wish(2000, 3000, growth=100.0)


def view(name: str, *, work: float = 0.0, batch: int = 0, **more: float) -> WorkerView:
    """``work`` ms of prompts wait there; the role is the name's first letter's."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
    made = WorkerView(WorkerRef(name, 1), role, 131_072, 880_000, cost=COST)
    made = replace(made, prefill_ms=work, batch=batch, kv_tokens=batch * 2000)
    if batch:
        made = replace(made, tpot_ms=30.0)
    return replace(made, **more)  # type: ignore[arg-type]


def names(placement: Placement | None) -> str | None:
    return placement and " ".join(worker.worker_id for worker in placement.workers)


@pytest.mark.parametrize(
    ("workers", "wish", "expected"),
    [
        # decode fills the workers one after the other, prompts go where they are done first
        ([view("p"), view("d")], WISH, "p d"),
        ([view("p"), view("d", batch=100)], WISH, "p d"),
        ([view("p"), view("d", batch=320)], WISH, "p"),  # full: the other one does it all
        ([view("p", work=900.0), view("d", batch=10)], WISH, "d"),  # p is late, d has slack
        ([view("p", work=90.0), view("d", batch=250)], WISH, "p d"),  # d has less, and is later
        ([view("m1", batch=50), view("m2")], WISH, "m2 m1"),
        ([view("p1", work=100.0), view("p2"), view("d1"), view("d2")], WISH, "p2 d1"),
        ([view("p"), view("d1", batch=300), view("d2")], WISH, "p d2"),
        ([view("p"), view("d1", batch=256), view("d2")], WISH, "p d2"),  # no place left
        ([view("p"), view("d1", kv_tokens=835_000), view("d2")], WISH, "p d2"),  # no memory
        # where nobody meets the objective, the least late
        ([view("d1", batch=330, work=9.0), view("d2", batch=325, work=9.0)], WISH, "d2"),
        ([view("p1", work=1e5), view("p2", work=9e4), view("d", work=9e5)], WISH, "p2 d"),
        # without objectives the emptiest
        ([view("p", batch=30), view("d1", batch=20), view("d2")], NONE, "d2"),
        # a prefix that lies on a worker is not computed again
        (
            [view("p", work=25.0), view("d")],
            replace(WISH, cached_tokens={WorkerRef("p", 1): 1984}),
            "p d",
        ),
        ([view("p", work=25.0), view("d")], WISH, "d"),
        # what was asked for, and the third attempt
        ([view("p", work=400.0), view("d")], replace(WISH, route=Policy.DISAGGREGATED), "p d"),
        ([view("p"), view("d", batch=99)], replace(WISH, route=Policy.COLOCATED), "p"),
        ([view("p"), view("d", batch=99)], replace(WISH, alone=True), "p"),
        # only where it fits
        ([view("p"), view("d", max_context=2999)], WISH, "p"),
        ([view("p", max_context=2000), view("d")], WISH, "d"),
        ([view("p", max_context=2999), view("d", max_context=2999)], WISH, None),
        ([view("d")], replace(WISH, route=Policy.DISAGGREGATED), None),
    ],
)
def test_place(workers: list[WorkerView], wish: Wish, expected: str | None) -> None:
    assert names(decide(Policy.ADAPTIVE, Snapshot(workers), wish)) == expected


def test_a_bad_link_is_the_last_choice() -> None:
    p1, p2, d = view("p1"), view("p2", work=10.0), view("d", batch=200)
    bad = frozenset({(p1.ref, d.ref)})
    assert names(decide(Policy.ADAPTIVE, Snapshot([p1, p2, d], bad), WISH)) == "p2 d"
    bad = frozenset({(p1.ref, d.ref), (p2.ref, d.ref)})
    assert names(decide(Policy.ADAPTIVE, Snapshot([p1, p2, d], bad), WISH)) == "d"


def test_workers_that_have_not_measured_are_used_by_their_load() -> None:
    workers = [view("p"), replace(view("d"), cost=None)]
    placement = decide(Policy.ADAPTIVE, Snapshot(workers), WISH)
    assert names(placement) == "p d"
    assert placement is not None and placement.forecast is None


def test_workers_count_as_measured_once_the_last_one_is() -> None:
    snapshot = Snapshot([view("p"), replace(view("d"), cost=None)])
    assert not snapshot.measured and not Snapshot(()).measured
    snapshot.update(view("d"))
    snapshot.update(view("p", work=1.0))
    assert snapshot.measured
    snapshot.update(replace(view("p"), cost=None))
    assert not snapshot.measured


def test_the_forecast_of_an_idle_worker_is_its_cost() -> None:
    found = decide(Policy.COLOCATED, Snapshot([view("m")]), WISH)
    assert found is not None and found.forecast is not None
    assert found.forecast.work_ms == pytest.approx(COST.prefill.work_ms(2000))
    assert found.forecast.ttft_ms == pytest.approx(COST.prefill.ms(2000), rel=0.01)
    assert found.forecast.tpot_ms == pytest.approx(COST.decode.ms(1, 2100))
    assert found.forecast.tpot_limit_ms == pytest.approx(MARGIN * 30.0)


def test_what_the_running_prompt_has_done_is_off_its_forecast() -> None:
    worker = view("m", work=200.0, head_ms=150.0, head_since=10.0)
    ttft = [
        float(forecast(Snapshot([worker]), WISH, now).ttft[0])
        for now in (10.0, 10.05, 10.1, 11.0, 99.0)
    ]
    assert ttft[0] - ttft[1] == pytest.approx(50.0, rel=0.01)
    assert ttft[0] > ttft[1] > ttft[2] > ttft[3] == ttft[4]
    assert ttft[0] - ttft[4] == pytest.approx(150.0, rel=0.06)  # and no more than its own


def test_what_is_being_read_goes_on_as_fast_as_those_before_it() -> None:
    """Beside a batch the worker may have spent on it what the batch was ahead by, or not."""
    worker = view("m", work=200.0, batch=200, tpot_ms=12.0, head_ms=150.0, head_since=10.0)
    tight = replace(WISH, objectives=Objectives(500.0, 12.0))
    ttft = [
        float(forecast(Snapshot([replace(worker, pace=pace)]), tight, 10.1).ttft[0])
        for pace in (0.1, 0.5, 0.9)
    ]
    assert ttft[1] - ttft[2] == pytest.approx(150.0 / 0.5 - 150.0 / 0.9, rel=0.01)
    assert ttft[0] > ttft[1]
    assert ttft[0] < ttft[1] + 150.0 / 0.1  # never slower than the batch leaves room for


def test_a_worker_that_is_late_is_forecast_so_until_that_is_long_ago() -> None:
    usual = float(forecast(Snapshot([view("m")]), WISH, 10.0).ttft[0])
    snapshot = Snapshot([view("m", late=1.2, late_at=10.0)])
    ttft = [float(forecast(snapshot, WISH, now).ttft[0]) for now in (10.0, 20.0, 40.0, 500.0)]
    assert ttft[0] == pytest.approx(1.2 * usual)
    assert ttft == sorted(ttft, reverse=True)
    assert ttft[-1] == pytest.approx(usual)
    waited = forecast(snapshot, replace(WISH, waited_ms=100.0), 10.0)  # that is over
    assert float(waited.ttft[0]) == pytest.approx(ttft[0] + 100.0)


def test_a_batch_that_pays_for_every_chunk_is_read_beside_more_slowly() -> None:
    """And one that is almost at its objective gives prompts a chunk now and then."""
    found = []
    for beside_ms in (0.0, 1.0, 2.5, 4.0):
        worker = replace(view("m", batch=60), cost=replace(COST, beside_ms=beside_ms))
        found.append(float(forecast(Snapshot([worker]), WISH, 0.0).ttft[0]))
    assert found == sorted(found) and found[-1] < math.inf
    full = replace(view("m", batch=319), cost=replace(COST, beside_ms=2.5))
    now_and_then = float(forecast(Snapshot([full]), WISH, 0.0).ttft[0])
    assert found[-1] < now_and_then < 1e5


def test_what_a_batch_is_ahead_by_goes_to_prompts() -> None:
    """At once where it is much; and it gets more while the batch runs alone."""

    def ttft(slack_ms: float, now: float = 0.0, work: float = 0.0) -> float:
        worker = view("m", batch=100, tpot_ms=15.0, slack_ms=slack_ms, work=work)
        return float(forecast(Snapshot([worker]), tight, now).ttft[0])

    tight = replace(WISH, objectives=Objectives(500.0, 15.0))
    limit = MARGIN * 15.0
    assert ttft(0.0) == ttft(limit)  # a step as long as any: nothing is in hand
    assert ttft(limit) > ttft(limit + 10.0) > ttft(limit + 30.0) > ttft(1e6) == ttft(math.inf)
    batch = 100, 200_000
    one_step = COST.ms(*batch, COST.prefill.work_ms(2000)) + COST.decode.ms(*batch) / 2
    assert ttft(math.inf) == pytest.approx(one_step, rel=0.01)
    assert ttft(limit) > ttft(limit, now=0.1) > ttft(limit, now=0.3)
    assert ttft(limit, work=50.0) == ttft(limit, now=0.3, work=50.0)  # it does not run alone


def test_slack_that_is_said_between_two_rows_counts() -> None:
    snapshot = Snapshot([view("m1", batch=100, tpot_ms=15.0), view("m2")])
    before = list(forecast(snapshot, WISH, 0.0).ttft)
    snapshot.slack(WorkerRef("m1", 1), 60.0, 0.0)
    snapshot.slack(WorkerRef("m9", 1), 60.0, 0.0)  # it is gone
    after = list(forecast(snapshot, WISH, 0.0).ttft)
    assert after[0] < before[0] and after[1] == before[1]


def test_the_more_decodes_the_later_a_prompt_is_done() -> None:
    batches = [0, 50, 150, 250, 350]
    snapshot = Snapshot([view(f"m{batch}", batch=batch) for batch in batches])
    ttft = list(forecast(snapshot, WISH, 0.0).ttft)
    assert ttft == sorted(ttft) and math.isfinite(ttft[-1])


def test_the_tightest_objective_of_a_batch_binds_who_joins() -> None:
    relaxed = replace(WISH, objectives=Objectives(500.0, 100.0))
    workers = [view("p"), view("d", batch=180, tpot_ms=15.0)]
    assert names(decide(Policy.ADAPTIVE, Snapshot(workers), relaxed)) == "p"
    workers = [view("p"), view("d", batch=180, tpot_ms=100.0)]
    assert names(decide(Policy.ADAPTIVE, Snapshot(workers), relaxed)) == "p d"


def test_an_updated_row_is_what_the_next_decision_sees() -> None:
    snapshot = Snapshot([view("p"), view("d")])
    assert names(decide(Policy.ADAPTIVE, snapshot, WISH)) == "p d"
    snapshot.update(view("p", work=500.0))
    assert names(decide(Policy.ADAPTIVE, snapshot, WISH)) == "d"


@pytest.mark.slow
def test_a_decision_over_256_workers_is_cheap() -> None:
    workers = [view(f"{'pd'[i % 2]}{i}", work=i % 7 * 10.0, batch=i % 60) for i in range(256)]
    snapshot = Snapshot(workers)
    taken = []
    for i in range(400):
        began = time.perf_counter()
        placement = decide(Policy.ADAPTIVE, snapshot, WISH)
        assert placement is not None
        snapshot.update(workers[i % 256])
        taken.append(time.perf_counter() - began)
    assert statistics.median(taken) < 300e-6


def test_a_worker_that_only_reads_gets_no_stream_while_the_fleet_needs_all_of_it() -> None:
    """A stream takes a third of what its worker reads, at 10 ms a token."""
    wish = replace(WISH, objectives=Objectives(200.0, 10.0))
    full = view("d", batch=90, tpot_ms=10.0)
    for asked, expected in ((0.3, "p"), (0.85, "p d")):
        snapshot = Snapshot([view("p"), full])
        snapshot.asked = asked
        assert names(decide(Policy.ADAPTIVE, snapshot, wish)) == expected


def test_a_place_is_waited_for_as_far_as_the_objective_allows() -> None:
    """And what waits for a place is not computed where others do: no prompt begins there."""
    full = view("d", batch=300, kv_tokens=100_000)
    snapshot = Snapshot([view("p", work=100.0), full])
    assert names(decide(Policy.ADAPTIVE, snapshot, WISH)) == "p d"
    far_over = view("d", batch=600, kv_tokens=100_000)
    assert names(decide(Policy.ADAPTIVE, Snapshot([view("p"), far_over]), WISH)) == "p"


def test_what_prompts_ask_for_is_what_came_of_late() -> None:
    asked = Asked()
    for index in range(2000):
        asked.came(5.0, index / 100)
    assert asked.workers == pytest.approx(0.5, rel=0.02)
    asked.came(0.0, 40.0)
    assert asked.workers < 0.02


def test_a_batch_without_a_place_left_has_no_time_to_read() -> None:
    """However long its steps may take: in longer ones it writes less, and more wait for a place."""
    wish = replace(WISH, objectives=Objectives(500.0, 30.0))
    for batch, expected in ((150, True), (256, False)):
        snapshot = Snapshot([view("p"), view("d", batch=batch, kv_tokens=99_000)])
        snapshot.asked = 0.95
        assert affordable(snapshot, wish)[0] == expected
