"""What the I/O thread tells the step thread: a bounded queue of events.

When it is full the I/O thread stops reading its sockets, and the peers' own queues fill:
nothing is dropped here, and nothing grows without bound. Events that answer a command of
the step thread (a chunk is sent, a chunk is written) always fit: there are no more of
them than commands.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ..core.messages import ToWorker
from ..kvtransfer.media.events import KvEvent


@dataclass(frozen=True, slots=True)
class RouterSaid:
    message: ToWorker


@dataclass(frozen=True, slots=True)
class RouterLost:
    """Silent for too long, or replaced by another process: what it had placed here is over."""


@dataclass(frozen=True, slots=True)
class Stop:
    """This life of the worker ends: a signal, a refusal, or a fault of the I/O thread."""

    error: BaseException | None = None


Event: TypeAlias = RouterSaid | RouterLost | KvEvent | Stop


class Inbox:
    """Many put, one drains. ``on_room`` is called by the drainer when a full box has room."""

    def __init__(self, limit: int, on_room: Callable[[], None]) -> None:
        self._events: deque[Event] = deque()
        self._limit = limit
        self._on_room = on_room
        self._changed = threading.Condition()
        self._was_full = False
        self._interrupted = False

    @property
    def full(self) -> bool:
        """Whether sockets should be left alone for now; asked by the I/O thread."""
        with self._changed:
            self._was_full = len(self._events) >= self._limit
            return self._was_full

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def interrupt(self) -> None:
        """Ends the drainer's life, from a signal handler: takes no lock, for the thread that is
        interrupted may hold it. Seen by the next ``drain``, within its timeout."""
        self._interrupted = True

    def drain(self, timeout: float) -> list[Event]:
        """All events so far; waits up to ``timeout`` seconds for the first one."""
        with self._changed:
            if not self._events and timeout > 0 and not self._interrupted:
                self._changed.wait(timeout)
            if self._interrupted:
                self._events.append(Stop())
            events = list(self._events)
            self._events.clear()
            had_been_full, self._was_full = self._was_full, False
        if had_been_full:
            self._on_room()
        return events
