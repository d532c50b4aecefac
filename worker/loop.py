"""The step thread: events in, steps through the engine, effects out.

One turn: take the events there are, launch a step if there is something to run, wait for
the oldest step once enough are in flight. With two steps in flight the second is launched
before the first one's tokens are read, so a GPU does not wait for Python. Idle, the thread
sleeps in the inbox until an event comes or a timer of the core is due.
"""

from __future__ import annotations

from collections import deque

from ..core.clock import Clock
from ..core.messages import Bye
from ..core.plan import Engine, StepHandle
from ..kvtransfer.media.events import Answered, Received, Sent, SocketLost, Written
from .core import TICK_S, WorkerCore
from .effects import Effect, Tell
from .inbox import Event, RouterLost, RouterSaid, Stop
from .io import IoThread, Status


class StepLoop:
    """Runs one life of a worker to its end; ``run`` returns when it is drained or stopped."""

    def __init__(self, core: WorkerCore, engine: Engine, io: IoThread, clock: Clock) -> None:
        self._core = core
        self._engine = engine
        self._inbox = io.inbox
        self._io = io
        self._clock = clock
        self._launched: deque[StepHandle] = deque()
        self._num_taken = 0  # messages of the router dealt with
        self._ticked = clock()

    def run(self) -> None:
        """Raises what the I/O thread failed with, and whatever the engine raises."""
        try:
            self._run()
        finally:
            while self._launched:  # they write blocks that are another life's from now on
                self._launched.popleft().wait()

    def _run(self) -> None:
        idle = False
        while not self._core.drained:
            for event in self._inbox.drain(self._time_to_tick() if idle else 0.0):
                if isinstance(event, Stop):
                    if event.error is not None:
                        raise event.error
                    self._post([Tell(Bye())])
                    return
                self._post(self._apply(event))
            if self._time_to_tick() <= 0:
                self._ticked = self._clock()
                self._post(self._core.tick(self._ticked))
            idle = not self._step()

    def _step(self) -> bool:
        """Launches and completes what is due; False where there was nothing to do."""
        plan, effects = self._core.plan(self._clock())
        self._post(effects)  # before the step: a prompt's start is news for its peer
        if plan is not None:
            self._io.step_begins(self._core.hung_after_s)
            self._launched.append(self._engine.launch(plan))
        if not self._launched:
            return False
        if plan is None or len(self._launched) >= self._engine.limits.max_inflight:
            result = self._launched.popleft().wait()
            self._io.step_ended(idle=not self._launched)
            self._post(self._core.complete(result, self._clock()))
        return True

    def _apply(self, event: Event) -> list[Effect]:
        now = self._clock()
        match event:
            case RouterSaid(message=message):
                self._num_taken += 1
                return self._core.router_message(message, now)
            case RouterLost():
                return self._core.router_lost(now)
            case Received(peer=peer, message=heard, frames=frames):
                return self._core.receiver_message(peer, heard, frames, now)
            case Answered(peer=peer, message=said):
                return self._core.sender_message(peer, said, now)
            case SocketLost(peer=peer, text=text):
                return self._core.peer_lost(peer, text, now)
            case Sent(attempt=attempt, first_block=first_block):
                return self._core.sent(attempt, first_block, now)
            case Written(attempt=attempt, first_block=first_block, ok=ok):
                return self._core.written(attempt, first_block, ok, now)
            case Stop():
                raise AssertionError("handled by run")

    def _post(self, effects: list[Effect]) -> None:
        self._io.post(effects, Status(self._core.beat(), self._num_taken))

    def _time_to_tick(self) -> float:
        return self._ticked + TICK_S - self._clock()
