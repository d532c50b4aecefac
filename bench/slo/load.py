"""The load of one client process: sends what is due when it is due, and watches itself.

Open loop: a session begins at its time, whatever became of those before it. Closed loop: each
of ``concurrency`` users takes the next session when its last one has ended, and that moment is
its arrival. A request's arrival is the time it was to be sent at, never when it could be.

Where objectives are given, the run is stopped once too many of its requests have missed them
for the attainment that is asked: what a search wants to know is known then.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from .measures import Objectives, good
from .records import Cause, ClientHealth, Record
from .stream import Reading, Target, record, send
from .workloads import Ask, Session

_TICK_S = 0.005  # of the watch over this process's own loop
_SPIN_S = 0.0012  # timers of the loop are this coarse: the rest is waited for turn by turn
_PROGRESS_S = 0.25


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop once more than ``allowed`` requests due in the window have missed."""

    objectives: Objectives
    allowed: float


@dataclass(frozen=True, slots=True)
class Levels:
    """Of a staircase: it ends with the first window of which too many have missed, once all its
    requests are through. Only all clients together can tell, so none stops by itself."""

    objectives: Objectives
    windows: tuple[tuple[float, float], ...]
    allowed: tuple[int, ...]  # misses, of each

    def of(self, due: float) -> int | None:
        for number, (start, end) in enumerate(self.windows):
            if start <= due < end:
                return number
        return None

    def missed(self, counts: Sequence[LevelCount], now: float) -> bool:
        """``now``: seconds since the start."""
        return any(
            now >= end and not count.open and count.missed > allowed
            for (_, end), allowed, count in zip(self.windows, self.allowed, counts, strict=False)
        )


@dataclass(frozen=True, slots=True)
class LevelCount:
    missed: int = 0
    open: int = 0


@dataclass(frozen=True, slots=True)
class Orders:
    """Of one client process. Times are seconds since the start of the run."""

    target: Target
    sessions: tuple[tuple[int, Session], ...]  # with their numbers
    window: tuple[float, float]
    concurrency: int | None = None  # None: an open loop
    give_up: GiveUp | None = None
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a live line shows."""

    due: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    missed: int = 0  # of the objectives to give up for
    ttfts_ms: tuple[float, ...] = ()  # of the latest
    levels: tuple[LevelCount, ...] = ()  # of a staircase


@dataclass(frozen=True, slots=True)
class Outcome:
    records: tuple[Record, ...]
    health: ClientHealth
    gave_up: bool = False


@dataclass(slots=True)
class _Open:
    """A request under way."""

    index: int
    due: float
    ask: Ask
    reading: Reading
    sent: float
    turn: int


@dataclass(slots=True)
class Load:
    orders: Orders
    watch: Callable[[Progress], None] = lambda progress: None
    _start: float = 0.0
    _records: list[Record] = field(default_factory=list)
    _open: dict[int, _Open] = field(default_factory=dict)
    _lateness: list[float] = field(default_factory=list)
    _stall: float = 0.0
    _missed: int = 0
    _level_missed: dict[int, int] = field(default_factory=dict)
    _late: set[int] = field(default_factory=set)  # open ones whose TTFT has passed
    _next: int = 0
    _gave_up: bool = False
    _working: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Its objectives are out of reach: by its own count, or by that of all clients."""
        self._gave_up = True
        if self._working is not None:
            self._working.cancel()

    async def run(self, start: float) -> Outcome:
        """Runs from ``start`` (monotonic seconds) to the end of the last request."""
        self._start = start
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would be a stall of the client
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
        watches = [asyncio.create_task(self._watch_loop()), asyncio.create_task(self._report())]
        try:
            async with aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 18
            ) as session:
                work = self._working = asyncio.create_task(self._work(session))
                judge = asyncio.create_task(self._judge())
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                judge.cancel()
        finally:
            for task in watches:
                task.cancel()
            gc.enable()
            gc.unfreeze()
        self.watch(self._progress())
        return Outcome(tuple(sorted(self._records, key=_number)), self._health(), self._gave_up)

    @property
    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _work(self, session: aiohttp.ClientSession) -> None:
        """Ends when every session has; its cancellation is that of all of them."""
        async with asyncio.TaskGroup() as group:
            if self.orders.concurrency is None:
                for number, one in self.orders.sessions:
                    await self._until(one.at)
                    group.create_task(self._session(session, number, one, one.at))
            else:
                await self._until(0.0)
                left = iter(self.orders.sessions)
                for _ in range(self.orders.concurrency):
                    group.create_task(self._user(session, left))

    async def _user(
        self, session: aiohttp.ClientSession, left: Iterator[tuple[int, Session]]
    ) -> None:
        for number, one in left:
            now = self._now
            if now >= self.orders.window[1]:
                return
            await self._session(session, number, one, now)

    async def _session(
        self, session: aiohttp.ClientSession, number: int, one: Session, due: float
    ) -> None:
        for turn, ask in enumerate(one.asks):
            if turn:
                due = self._now + ask.think_s
                if due >= self.orders.window[1]:
                    return
                await self._until(due)
            sent = self._now
            self._lateness.append(sent - due)
            key, self._next = self._next, self._next + 1
            reading = Reading()
            self._open[key] = _Open(number, due, ask, reading, sent, turn)
            try:
                done = await send(
                    session,
                    self.orders.target,
                    ask,
                    index=number,
                    due=due,
                    start=self._start,
                    turn=turn,
                    reading=reading,
                )
            except asyncio.CancelledError:
                self._records.append(self._abandoned(self._open.pop(key)))
                raise
            del self._open[key]
            self._records.append(done)
            self._judge_one(key, done)
            if done.failure is not None:
                return  # the next turn would follow an answer that never was

    def _abandoned(self, one: _Open) -> Record:
        return record(
            one.reading,
            one.ask,
            index=one.index,
            due=one.due,
            sent=one.sent,
            ended=self._now,
            failure=Cause.GIVEN_UP,
            detail="",
            turn=one.turn,
        )

    def _judge_one(self, key: int, done: Record) -> None:
        levels = self.orders.levels
        if levels is not None and not good(done, levels.objectives):
            level = levels.of(done.due)
            if level is not None:
                self._level_missed[level] = self._level_missed.get(level, 0) + 1
        give_up = self.orders.give_up
        if give_up is None or key in self._late:
            return
        start, end = self.orders.window
        if start <= done.due < end and not good(done, give_up.objectives):
            self._missed += 1

    async def _judge(self) -> None:
        give_up = self.orders.give_up
        if give_up is None:
            return
        start, end = self.orders.window
        limit = give_up.objectives.ttft_ms / 1e3
        while self._missed <= give_up.allowed:
            await asyncio.sleep(0.1)
            for key, one in self._open.items():
                late = not one.reading.events and self._now - one.due > limit
                if late and start <= one.due < end and key not in self._late:
                    self._late.add(key)
                    self._missed += 1
        self.stop()

    async def _until(self, due: float) -> None:
        """To within a turn of the loop. The loop's own timers would be up to 1 ms late."""
        left = due - self._now
        if left > _SPIN_S:
            await asyncio.sleep(left - _SPIN_S)
        while self._now < due:  # noqa: ASYNC110  no event is as exact as the clock
            await asyncio.sleep(0)

    async def _watch_loop(self) -> None:
        """The longest time for which nothing else could run."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._stall = max(self._stall, now - before - _TICK_S)
            before = now

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            self.watch(self._progress())

    def _progress(self) -> Progress:
        latest = self._records[-50:]
        return Progress(
            due=len(self._lateness),
            running=len(self._open),
            done=sum(1 for one in self._records if one.failure is None),
            failed=sum(1 for one in self._records if one.failure is not None),
            tokens=sum(one.num_output for one in self._records)
            + sum(len(one.reading.events) for one in self._open.values()),
            missed=self._missed,
            ttfts_ms=tuple(1e3 * (r.first - r.due) for r in latest if r.first is not None),
            levels=self._level_counts(),
        )

    def _level_counts(self) -> tuple[LevelCount, ...]:
        levels = self.orders.levels
        if levels is None:
            return ()
        running = Counter(levels.of(one.due) for one in self._open.values())
        return tuple(
            LevelCount(self._level_missed.get(number, 0), running[number])
            for number in range(len(levels.windows))
        )

    def _health(self) -> ClientHealth:
        return health(self._lateness, self._stall)


def health(lateness_s: Sequence[float], stall_s: float) -> ClientHealth:
    if not lateness_s:
        return ClientHealth({}, 1e3 * stall_s)
    p50, p99, top = (float(1e3 * v) for v in np.percentile(lateness_s, [50, 99, 100]))
    return ClientHealth({"p50": p50, "p99": p99, "max": top}, 1e3 * stall_s)


def _number(record: Record) -> tuple[int, int]:
    return record.index, record.turn
