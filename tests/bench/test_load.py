"""The client against a server of known latencies: what it measures, when it distrusts itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from pdserve.bench.slo.known_server import KnownServer
from pdserve.bench.slo.load import GiveUp, Load, Orders, Outcome
from pdserve.bench.slo.measures import Objectives, tpot, ttft
from pdserve.bench.slo.records import Cause
from pdserve.bench.slo.stream import Reading, Target
from pdserve.bench.slo.workloads import Ask, Session


def load_of(
    server: KnownServer,
    times: list[float],
    tokens: int = 5,
    *,
    concurrency: int | None = None,
    give_up: GiveUp | None = None,
    beside: Callable[[float], Coroutine[Any, Any, None]] | None = None,
) -> Outcome:
    """Runs it all in one loop; ``beside`` is told the start and runs next to it."""
    sessions = tuple((i, Session(at, (Ask((1, 2, 3), tokens),))) for i, at in enumerate(times))

    async def run() -> Outcome:
        async with server.serving() as url:
            target = Target(url, "known", timeout_s=20.0)
            orders = Orders(target, sessions, (0.0, 100.0), concurrency, give_up)
            start = time.monotonic() + 0.05
            async with asyncio.TaskGroup() as group:
                work = group.create_task(Load(orders).run(start))
                if beside is not None:
                    group.create_task(beside(start))
            return work.result()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(run(), 30.0))


def test_it_measures_what_the_server_did() -> None:
    outcome = load_of(KnownServer(0.03, 0.01), [i * 0.02 for i in range(20)])
    assert [record.index for record in outcome.records] == list(range(20))
    for record in outcome.records:
        assert record.failure is None and record.num_output == 5
        assert record.server is not None
        sent = record.server["sent"]
        assert (ttft(record) or 0) >= 0.028  # timers of a loop may be early by 1 ms
        measured = tpot(record)
        assert measured is not None
        # What is on the clock can be late on a busy machine, and is late for both then.
        assert measured == pytest.approx((sent[-1] - sent[0]) / 4, abs=0.05)


def test_a_stall_of_the_server_shows_in_full_in_every_request_due_in_it() -> None:
    """No coordinated omission: those due while it hangs wait for its end, and it counts."""
    server = KnownServer(0.01, 0.001)
    times = [0.3 + i * 0.02 for i in range(40)]

    async def stall(start: float) -> None:
        await asyncio.sleep(start + 0.4 - time.monotonic())
        server.pause(0.5)

    outcome = load_of(server, times, beside=stall)
    ((begun, ended),) = server.stalls
    start = begun - 0.4
    due_in_it = [r for r in outcome.records if 0.41 < r.due < 0.4 + ended - begun - 0.02]
    assert len(due_in_it) >= 20
    for record in due_in_it:
        left = (ended - start) - record.due
        measured = ttft(record)
        assert measured is not None and measured >= left - 0.01, (record, left)


def test_a_stall_of_the_client_makes_the_run_invalid() -> None:
    async def stall(start: float) -> None:
        await asyncio.sleep(start + 0.1 - time.monotonic())
        time.sleep(0.3)  # noqa: ASYNC251  what is tested

    outcome = load_of(KnownServer(0.01, 0.001), [i * 0.01 for i in range(60)], beside=stall)
    assert outcome.health.fault is not None
    assert outcome.health.stall_ms >= 290
    assert outcome.health.lateness["max"] >= 250


def test_refused_and_cut_ones_are_told_apart() -> None:
    server = KnownServer(0.001, 0.001, refuse_every=3, cut_every=4)
    outcome = load_of(server, [i * 0.02 for i in range(12)])
    causes = [record.failure for record in outcome.records]
    assert causes.count(Cause.REFUSED) == 4  # every third
    assert causes.count(Cause.CUT) == 2  # every fourth of the others
    refused = next(r for r in outcome.records if r.failure is Cause.REFUSED)
    assert refused.detail == "429 full" and refused.first is None


def test_nobody_there_is_a_failure_and_not_an_end() -> None:
    async def run() -> Outcome:
        sessions = ((0, Session(0.0, (Ask((1,), 2),))),)
        orders = Orders(Target("http://127.0.0.1:1", "known"), sessions, (0.0, 1.0))
        return await Load(orders).run(time.monotonic())

    (record,) = asyncio.run(run()).records
    assert record.failure is Cause.CONNECTION


def test_a_closed_loop_sends_the_next_when_the_last_is_done() -> None:
    outcome = load_of(KnownServer(0.02, 0.005), [0.0] * 12, concurrency=3)
    assert len(outcome.records) == 12
    events = [(r.due, 1) for r in outcome.records] + [(r.ended, -1) for r in outcome.records]
    running = most = 0
    for _, change in sorted(events, key=lambda one: (one[0], one[1])):
        running += change
        most = max(most, running)
    assert most == 3


def test_later_turns_wait_for_the_answer_and_the_pause() -> None:
    asks = (Ask((1,), 3), Ask((1, 2), 3, think_s=0.1))

    async def run() -> Outcome:
        async with KnownServer(0.01, 0.01).serving() as url:
            orders = Orders(Target(url, "known"), ((0, Session(0.0, asks)),), (0.0, 5.0))
            return await Load(orders).run(time.monotonic())

    first, second = asyncio.run(run()).records
    assert (first.turn, second.turn) == (0, 1)
    assert second.due == pytest.approx(first.ended + 0.1, abs=0.05)


def test_it_gives_up_once_its_objectives_are_out_of_reach() -> None:
    server = KnownServer(0.2, 0.001)
    give_up = GiveUp(Objectives(50, 10), allowed=5)
    outcome = load_of(server, [i * 0.05 for i in range(400)], give_up=give_up)
    assert outcome.gave_up and len(outcome.records) < 300
    causes = {record.failure for record in outcome.records}
    assert Cause.GIVEN_UP in causes and causes <= {None, Cause.GIVEN_UP}


EVENTS = {
    "completion": (b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n', 1),
    "nothing in it": (b'data: {"choices": [{"index": 0, "text": ""}]}\n\n', 0),
    "chat": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', 1),
    "a chat's role": (b'data: {"choices": [{"delta": {"role": "x", "content": ""}}]}\n\n', 0),
    "logprobs": (
        b'data: {"choices": [{"text": "ab", "logprobs": {"tokens": ["a", "b"]}}]}\n\n',
        2,
    ),
    "usage as it goes": (
        b'data: {"choices": [{"text": "abc"}], "usage": {"completion_tokens": 3}}\n\n',
        3,
    ),
    "a comment": (b": ping\n\n", 0),
    "usage at the end": (b'data: {"choices": [], "usage": {"completion_tokens": 9}}\n\n', 0),
}


@pytest.mark.parametrize("name", EVENTS)
def test_tokens_of_an_event(name: str) -> None:
    data, tokens = EVENTS[name]
    reading = Reading()
    for byte in data:  # in the smallest pieces there are
        reading.feed(bytes([byte]), 1.0)
    assert sum(count for _, count in reading.events) == tokens


def test_an_error_event_is_no_answer() -> None:
    reading = Reading()
    reading.feed(b'data: {"error": {"message": "gone"}}\n\n', 1.0)
    assert reading.error == "gone"
