"""What has become of workers: counted for metrics, the last of it kept for people."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..core.ids import WorkerRef

MAX_EVENTS = 64


class EventKind(StrEnum):
    JOINED = "joined"
    LEFT = "left"  # of its own will
    DIED = "died"
    MOVED = "moved"  # to another role


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    kind: EventKind
    worker: WorkerRef
    num_moved: int = 0  # requests that went on elsewhere


class History:
    def __init__(self) -> None:
        self.counts: Counter[EventKind] = Counter()
        self.num_moved = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def __iter__(self) -> Iterator[Event]:
        """The oldest first."""
        return iter(self._events)

    def note(self, at: float, kind: EventKind, worker: WorkerRef, num_moved: int = 0) -> None:
        self.counts[kind] += 1
        self.num_moved += num_moved
        self._events.append(Event(at, kind, worker, num_moved))
