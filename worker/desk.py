"""The worker core between its two threads: who sits at the desk may use it.

The step thread sits down to plan a step and to read a result, for fractions of a millisecond,
and is elsewhere while the step runs. So the I/O thread finds the desk free nearly always and
applies itself what comes in: between two peers a message waits neither for a step to end nor
for another thread to wake up. Where the desk is taken for long, events wait in the inbox for
whoever sits down next.

Events are applied in the order in which they came, and effects are handed to the I/O thread in
the order in which they were asked for, for both is done at the desk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from ..core.clock import Clock
from ..core.messages import WorkerBeat
from ..kvtransfer.media.events import Answered, Received, Sent, SocketLost, Written
from .core import TICK_S, WorkerCore
from .effects import Effect
from .inbox import Event, Inbox, RouterLost, RouterSaid, Stop

_PATIENCE_S = 0.05  # of the I/O thread, with whoever sits at the desk


@dataclass(frozen=True, slots=True)
class Status:
    """The worker as of now; ``num_taken`` counts the router's messages it has dealt with."""

    beat: WorkerBeat
    num_taken: int


class Desk:
    """``with`` it, the core is the caller's; so are the calls that say so."""

    def __init__(self, core: WorkerCore, inbox: Inbox, clock: Clock) -> None:
        self.core = core
        self.stopped: Stop | None = None  # nothing is applied any more
        self._inbox = inbox
        self._clock = clock
        self._taken = threading.Lock()
        self._num_taken = 0
        self._tick_at = clock() + TICK_S
        self._status = Status(core.beat(), 0)

    def __enter__(self) -> WorkerCore:
        self._taken.acquire()
        return self.core

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._taken.release()

    def catch_up(self, post: Callable[[list[Effect]], None]) -> None:
        """Applies what has come in, and what time has brought. For who sits at the desk."""
        effects: list[Effect] = []
        for event in self._inbox.drain():
            if self.stopped is not None:
                break
            if isinstance(event, Stop):
                self.stopped = event
            else:
                effects += self._apply(event)
        now = self._clock()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            effects += [] if self.stopped is not None else self.core.tick(now)
        if effects:
            post(effects)

    def close(self) -> None:
        """The step thread leaves for good: nothing is applied any more."""
        with self:
            self.stopped = self.stopped or Stop()

    # for the I/O thread, which waits for nobody for long

    def try_to_catch_up(self, post: Callable[[list[Effect]], None]) -> bool:
        """``catch_up``; whether there is something for the step thread to do now. Wake it *after*
        what was posted is sent: it would plan a step first, and a peer would wait for that."""
        if not self._taken.acquire(timeout=_PATIENCE_S):
            return True
        try:
            self.catch_up(post)
            return self.core.may_run or self.core.drained or self.stopped is not None
        finally:
            self._taken.release()

    def status(self) -> Status:
        """As of now, or a moment ago."""
        if self._taken.acquire(timeout=_PATIENCE_S):
            try:
                self._status = Status(self.core.beat(), self._num_taken)
            finally:
                self._taken.release()
        return self._status

    @property
    def next_tick(self) -> float:
        return self._tick_at

    def _apply(self, event: Event) -> list[Effect]:
        now, core = self._clock(), self.core
        match event:
            case RouterSaid(message=message):
                self._num_taken += 1
                return core.router_message(message, now)
            case RouterLost():
                return core.router_lost(now)
            case Received(peer=peer, message=heard, frames=frames):
                return core.receiver_message(peer, heard, frames, now)
            case Answered(peer=peer, message=said):
                return core.sender_message(peer, said, now)
            case SocketLost(peer=peer, text=text):
                return core.peer_lost(peer, text, now)
            case Sent(attempt=attempt, first_block=first_block):
                return core.sent(attempt, first_block, now)
            case Written(attempt=attempt, first_block=first_block, ok=ok):
                return core.written(attempt, first_block, ok, now)
            case Stop():
                raise AssertionError("handled by catch_up")
