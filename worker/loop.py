"""The step thread: steps through the engine, one after the other.

One turn: apply the events that nobody has applied yet, launch a step if there is something to
run, wait for the oldest step once enough are in flight. With two steps in flight the second is
launched before the first one's tokens are read, so a GPU does not wait for Python. Idle, the
thread sleeps until there is something to run.
"""

from __future__ import annotations

from collections import deque

from ..core.clock import Clock
from ..core.messages import Bye
from ..core.plan import Engine, StepHandle
from .core import TICK_S
from .effects import Tell
from .io import IoThread


class StepLoop:
    """Runs one life of a worker to its end; ``run`` returns when it is drained or stopped."""

    def __init__(self, engine: Engine, io: IoThread, clock: Clock) -> None:
        self._engine = engine
        self._desk = io.desk
        self._io = io
        self._clock = clock
        self._launched: deque[tuple[StepHandle, float]] = deque()  # and when it had been launched

    def run(self) -> None:
        """Raises what the I/O thread failed with, and whatever the engine raises."""
        try:
            self._run()
        finally:
            self._desk.close()
            while self._launched:  # they write blocks that are another life's from now on
                self._launched.popleft()[0].wait()

    def _run(self) -> None:
        while not self._desk.core.drained:
            idle = not self._step()
            stop = self._desk.stopped
            if stop is not None:
                if stop.error is not None:
                    raise stop.error
                self._io.post([Tell(Bye())])
                return
            if idle:
                self._io.inbox.wait(TICK_S)

    def _step(self) -> bool:
        """Launches and completes what is due; False where there was nothing to do."""
        with self._desk as core:
            self._desk.catch_up(self._io.post)
            if self._desk.stopped is not None:
                return False
            plan, effects = core.plan(self._clock())
            self._io.post(effects)  # before the step: a prompt's start is news for its peer
        if plan is not None:
            self._io.step_begins(core.hung_after_s)
            handle = self._engine.launch(plan)
            self._launched.append((handle, self._clock()))
        if not self._launched:
            return False
        if plan is None or len(self._launched) >= self._engine.limits.max_inflight:
            handle, launched_at = self._launched.popleft()
            # the next one's launch may have outlasted it
            since = launched_at if self._launched and handle.done else None
            result = handle.wait()
            self._io.step_ended(idle=not self._launched)
            with self._desk as core:
                self._io.post(core.complete(result, self._clock(), since))
        return True
