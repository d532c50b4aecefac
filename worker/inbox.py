"""What the I/O thread has heard and nobody has applied yet: a bounded queue of events.

When it is full the I/O thread stops reading its sockets, and the peers' own queues fill:
nothing is dropped here, and nothing grows without bound. Events that answer a command (a
chunk is sent, a chunk is written) always fit: there are no more of them than commands.
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
    """The I/O thread puts; either thread drains, at the desk; the step thread waits.

    ``on_room`` is called when a full box was drained.
    """

    def __init__(self, limit: int, on_room: Callable[[], None]) -> None:
        self._events: deque[Event] = deque()
        self._limit = limit
        self._on_room = on_room
        self._changed = threading.Condition()
        self._woken = False
        self._was_full = False
        self._interrupted = False

    @property
    def full(self) -> bool:
        """Whether sockets should be left alone for now; asked by the I/O thread."""
        with self._changed:
            self._was_full = len(self._events) >= self._limit
            return self._was_full

    def put(self, *events: Event) -> None:
        """Wakes nobody: who puts sits down at the desk next, or calls ``wake``."""
        with self._changed:
            self._events.extend(events)

    def wake(self) -> None:
        """Ends the wait that is on, or the next one."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def interrupt(self) -> None:
        """Ends this life, from a signal handler: takes no lock, for the thread that is
        interrupted may hold it. Seen by the next ``drain``, within the timeout of ``wait``."""
        self._interrupted = True

    def wait(self, timeout: float) -> None:
        """Until somebody calls ``wake``, ``timeout`` seconds at most."""
        with self._changed:
            if not self._woken and not self._interrupted:
                self._changed.wait(timeout)
            self._woken = False

    def drain(self) -> list[Event]:
        """All events so far."""
        with self._changed:
            if self._interrupted:
                self._events.append(Stop())
            events = list(self._events)
            self._events.clear()
            had_been_full, self._was_full = self._was_full, False
        if had_been_full:
            self._on_room()
        return events
