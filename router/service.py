"""The rim around ``Dispatch``: it reads the clock, owns the sockets, wakes those who wait.

One ``Stream`` is one request of a client. Whoever opened it reads it to its end, or closes
it: then the workers are told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..core.clock import Clock
from ..core.config import Admission, RouterSection, SloSection
from ..core.errors import RequestError, Unavailable
from ..core.ids import Role
from ..core.messages import Bye, TokenBatch, TokenItem, ToRouter, ToWorker, TransferDone
from .control import ControlSockets
from .dispatch import Dispatch
from .effects import Effect, Emit, End, Link, Say
from .live import Live, shown_worker
from .metrics import Metrics
from .requests import Ask, State
from .roles import Move
from .timeline import Recent, Timeline

log = logging.getLogger(__name__)

TICK_S = 0.1
BEAT_S = 0.5
LEAVE_S = 3.0  # for workers that are idle, or in the middle of a step


class Stream:
    """The tokens of one request. They are no more than its max_tokens, so nothing overflows."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self.ask = ask
        self.timeline: Timeline | None = None  # known at the end
        self.received: float | None = None  # when the message with the first token came
        self._service = service
        self._items: deque[TokenItem] = deque()
        self._ended = False
        self._error: RequestError | None = None
        self._changed = asyncio.Event()

    async def take(self) -> Sequence[TokenItem]:
        """All tokens that have come since; none at the end. Raises what ended the request."""
        while not self._items and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._items and self._error is not None:
            raise self._error
        items = tuple(self._items)
        self._items.clear()
        return items

    def close(self, state: State) -> None:
        """The reader wants no more; nothing happens where the request is over."""
        self._service.close(self.ask.request_id, state)

    def put(self, item: TokenItem) -> None:
        self._items.append(item)
        self._changed.set()

    def end(self, end: End) -> None:
        self._ended = True
        self.timeline = end.timeline
        self._error = end.error
        self._changed.set()


class Service:
    def __init__(
        self,
        dispatch: Dispatch,
        control: ControlSockets,
        router: RouterSection,
        slo: SloSection,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self.dispatch = dispatch
        self.recent = Recent()
        self.num_tokens = 0  # that were passed on
        self._live = Live(dispatch, self.recent, slo, clock)
        self.metrics = metrics
        metrics.watch(dispatch)
        self.on_ended: list[Callable[[Timeline], None]] = [self.recent.keep, metrics.ended]
        self._control = control
        control.receive = self.receive
        self._router = router
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._num_in_house = 0
        self._draining = False
        self._received = 0.0  # the last message of a worker
        self._idle = asyncio.Event()
        self._idle.set()
        self._left = asyncio.Event()  # the last worker has said goodbye

    @property
    def not_ready(self) -> str | None:
        """Why new requests should go elsewhere, if they should."""
        return "the server is shutting down" if self._draining else self.dispatch.missing

    @contextlib.contextmanager
    def admitted(self, num_requests: int) -> Iterator[None]:
        """Counts requests in the house, from their arrival on; Unavailable where it is full."""
        if self._draining:
            raise Unavailable("the server is shutting down", code="draining")
        queueing = self._router.admission is not Admission.OPEN
        if queueing and self._num_in_house + num_requests > self._router.max_queue:
            raise Unavailable(
                f"{self._num_in_house} requests are here already, of {self._router.max_queue}",
                status=429,
                code="queue_full",
                retry_after=1.0,
            )
        self._num_in_house += num_requests
        self._idle.clear()
        try:
            yield
        finally:
            self._num_in_house -= num_requests
            if not self._num_in_house:
                self._idle.set()

    def deadline(self) -> float:
        """For a request that arrives now."""
        return self._clock() + self._router.request_timeout_s

    def open(self, ask: Ask) -> Stream:
        stream = self._streams[ask.request_id] = Stream(self, ask)
        self._run(self.dispatch.submit(ask, self._clock()))
        return stream

    def close(self, request_id: str, state: State) -> None:
        self._run(self.dispatch.end(request_id, state, self._clock()))

    def receive(self, link: Link, message: ToRouter) -> None:
        self._received = self._clock()
        if isinstance(message, TokenBatch):
            self.metrics.batch(sum(item.index > 0 for item in message.items))
        elif isinstance(message, TransferDone):
            self.metrics.transfer(message)
        self._run(self.dispatch.receive(link, message, self._received))
        if isinstance(message, Bye) and not self.dispatch.members.alive():
            self._left.set()

    def scale(self, wanted: Mapping[Role, int] | None) -> list[Move]:
        """See ``Staffing.scale``; None leaves it to the planner again."""
        if wanted is None:
            self.dispatch.staffing.planning = True
            return []
        moves, effects = self.dispatch.scale(wanted, self._clock())
        self._run(effects)
        return moves

    def workers(self) -> list[dict[str, Any]]:
        now = self._clock()
        return [shown_worker(member, now) for member in self.dispatch.members]

    def live(self) -> dict[str, Any]:
        """See ``live.py``; it is shared: do not change it."""
        return self._live.shown(self.not_ready, self.num_tokens)

    async def keep_time(self) -> None:
        """Ticks and beats, until cancelled."""
        next_beat = self._clock()
        while True:
            self._control.read()  # what has come before is older than this tick
            now = self._clock()
            self._run(self.dispatch.tick(now))
            if now >= next_beat:
                next_beat = now + BEAT_S
                self._run(self.dispatch.beats())
            slept = self._clock()
            await asyncio.sleep(TICK_S)
            self.metrics.lag(self._clock() - slept - TICK_S)

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """No new requests; those that are here may end within the limit."""
        self._draining = True
        await _either(self._idle, hurry, limit_s)
        if self._streams:
            log.warning("%d requests did not end in time", len(self._streams))
        error = Unavailable("the server has been shut down", code="draining")
        self._run(self.dispatch.fail_all(error, self._clock()))

    async def dismiss(self, hurry: asyncio.Event) -> None:
        """The workers are to leave. Their goodbyes are waited for, for a moment: what was said to
        another host just before the sockets close may be lost with the connection."""
        self._run(self.dispatch.drain())
        await _either(self._left, hurry, LEAVE_S if self.dispatch.members.alive() else 0.0)

    def _run(self, effects: Sequence[Effect]) -> None:
        """Executes effects, and those that follow from a link that turns out to be gone."""
        todo = deque(effects)
        while todo:
            effect = todo.popleft()
            match effect:
                case Say(link, message):
                    if not self._control.send(link, message):
                        unsent = [message, *_messages(todo, link)]
                        todo.extend(self.dispatch.unreachable(link, self._clock(), unsent))
                case Emit(request_id, item, gap):
                    self.num_tokens += 1
                    stream = self._streams.get(request_id)
                    if gap is not None:
                        self.metrics.gap(gap)
                    elif stream is not None:
                        stream.received = self._received
                    if stream is not None:
                        stream.put(item)
                case End(timeline):
                    for tell in self.on_ended:
                        tell(timeline)
                    if (stream := self._streams.pop(timeline.request_id, None)) is not None:
                        stream.end(effect)


async def _either(one: asyncio.Event, other: asyncio.Event, limit_s: float) -> None:
    """Until one of them is set, or the time is over."""
    waits = [asyncio.create_task(event.wait()) for event in (one, other)]
    await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()


def _messages(effects: Iterable[Effect], link: Link) -> list[ToWorker]:
    """What is still to be said to one worker."""
    return [one.message for one in effects if isinstance(one, Say) and one.link == link]
