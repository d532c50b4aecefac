"""Two threads and one core: who sits at the desk applies what has come in, in its order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from worker_net import Shape, Worker

from pdserve.core.ids import Task
from pdserve.core.messages import Abort, Key, Place, Started, TokenBatch
from pdserve.core.params import SamplingParams
from pdserve.core.plan import EngineLimits, KvPool, StepPlan, StepResult
from pdserve.worker.core import TICK_S
from pdserve.worker.desk import Desk
from pdserve.worker.effects import Effect, Tell
from pdserve.worker.inbox import Inbox, RouterSaid, Stop
from pdserve.worker.loop import StepLoop

KEY = Key(f"{1:032x}", 0)
OTHER = Key(f"{2:032x}", 0)


def whole(key: Key = KEY) -> RouterSaid:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    return RouterSaid(Place(key, Task.WHOLE, (2, 3, 4), (), params))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Io:
    """Of an I/O thread what the step thread sees; a test plays the thread."""

    desk: Desk
    inbox: Inbox
    posted: list[Effect] = field(default_factory=list)

    def hears(self, *events: RouterSaid | Stop) -> None:
        self.inbox.put(*events)
        if self.desk.try_to_catch_up(self.post):
            self.inbox.wake()

    def post(self, effects: list[Effect]) -> None:
        self.posted += effects

    def step_begins(self, hung_after_s: float) -> None: ...

    def step_ended(self, *, idle: bool) -> None: ...


class SlowEngine:
    """Steps that end when they are told to."""

    def __init__(self, worker: Worker) -> None:
        self._engine = worker.engine
        self.running = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    @property
    def kv(self) -> KvPool:
        return self._engine.kv

    def launch(self, plan: StepPlan) -> SlowEngine._Step:
        return self._Step(self, self._engine.launch(plan).wait())

    def close(self) -> None: ...

    @dataclass
    class _Step:
        engine: SlowEngine
        result: StepResult

        def wait(self) -> StepResult:
            self.engine.running.release()
            assert self.engine.go.acquire(timeout=60)
            return self.result

        @property
        def done(self) -> bool:
            return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker() -> Worker:
    return Worker("w", Shape())


@pytest.fixture
def io(worker: Worker, clock: Clock) -> Io:
    inbox = Inbox(16, lambda: None)
    return Io(Desk(worker.core, inbox, clock), inbox)


@pytest.fixture
def engine(worker: Worker, io: Io, clock: Clock) -> Iterator[SlowEngine]:
    made = SlowEngine(worker)
    thread = threading.Thread(target=StepLoop(made, io, clock).run)  # type: ignore[arg-type]
    thread.start()
    yield made
    io.hears(Stop())
    for _ in range(16):
        made.go.release()
    thread.join(60)
    assert not thread.is_alive()


def live(io: Io) -> set[Key]:
    return set(io.desk.status().beat.live)


def test_what_is_heard_is_applied_by_who_hears_it(io: Io) -> None:
    io.hears(whole())
    assert live(io) == {KEY} and io.desk.status().num_taken == 1


def test_what_is_heard_while_a_step_runs_does_not_wait_for_it(io: Io, engine: SlowEngine) -> None:
    io.hears(whole())
    assert engine.running.acquire(timeout=60)  # the step thread has planned it by itself
    io.hears(whole(OTHER), RouterSaid(Abort(KEY)))
    assert live(io) == {OTHER}
    engine.go.release()
    assert engine.running.acquire(timeout=60)


def test_where_the_desk_is_taken_events_wait_and_keep_their_order(io: Io) -> None:
    with io.desk as core:
        io.hears(whole())
        io.hears(RouterSaid(Abort(KEY)), whole(OTHER))
        assert core.beat().live == ()
        io.desk.catch_up(io.post)
        assert core.beat().live == (OTHER,)


def test_the_step_thread_is_woken_where_there_is_something_to_run(
    io: Io, engine: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[None] = []
    wake = io.inbox.wake
    monkeypatch.setattr(io.inbox, "wake", lambda: (woken.append(None), wake()))
    io.hears(RouterSaid(Abort(KEY)))
    assert woken == []
    io.hears(whole(OTHER))
    assert woken == [None]
    assert engine.running.acquire(timeout=60)


def test_a_step_is_told_by_the_thread_that_has_read_it(io: Io, engine: SlowEngine) -> None:
    io.hears(whole())
    for _ in range(2):
        assert engine.running.acquire(timeout=60)
        engine.go.release()
    assert engine.running.acquire(timeout=60)
    told = [effect.message for effect in io.posted if isinstance(effect, Tell)]
    assert [type(message) for message in told[:3]] == [Started, TokenBatch, TokenBatch]


def test_time_is_told_to_the_core_by_whoever_comes_by(
    io: Io, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[float] = []
    tick = io.desk.core.tick
    monkeypatch.setattr(io.desk.core, "tick", lambda now: (ticks.append(now), tick(now))[1])
    io.hears()
    clock.now += TICK_S
    io.hears()
    io.hears()
    assert ticks == [clock.now]


def test_after_the_end_nothing_is_applied(io: Io) -> None:
    io.hears(Stop(), whole())
    io.hears(whole(OTHER))
    assert live(io) == set() and isinstance(io.desk.stopped, Stop)
    io.desk.close()
    assert isinstance(io.desk.stopped, Stop)


def test_a_full_box_says_when_it_has_room() -> None:
    room: list[None] = []
    inbox = Inbox(2, lambda: room.append(None))
    inbox.put(whole())
    assert not inbox.full and inbox.drain() and room == []
    inbox.put(whole(), whole(OTHER))
    assert inbox.full
    assert len(inbox.drain()) == 2 and room == [None]


def test_a_signal_ends_it_without_a_lock() -> None:
    inbox = Inbox(2, lambda: None)
    inbox.interrupt()
    inbox.wait(60)
    assert inbox.drain() == [Stop()]
