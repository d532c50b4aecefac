"""What D remembers of transfers that are over, to answer what is still said about them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from ..core.ids import Attempt, WorkerRef
from ..core.messages import Key
from .messages import Cancel, Complete

Place: TypeAlias = tuple[WorkerRef, Attempt]


class Ending(Enum):
    DELIVERED = auto()
    WITHDRAWN = auto()  # by P, before this worker was told of it
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class Tombstone:
    until: float
    ending: Ending
    text: str

    def reply(self, key: Key) -> Complete | Cancel:
        return Complete(key) if self.ending is Ending.DELIVERED else Cancel(key, self.text)


class Tombstones:
    """At most ``limit`` of them, the oldest giving way; all are laid for the same time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._at: dict[Place, Tombstone] = {}  # in the order of their end

    def __len__(self) -> int:
        return len(self._at)

    def get(self, place: Place) -> Tombstone | None:
        return self._at.get(place)

    def lay(self, place: Place, tombstone: Tombstone) -> None:
        self._at.pop(place, None)
        self._at[place] = tombstone
        if len(self._at) > self._limit:
            del self._at[next(iter(self._at))]

    def expire(self, now: float) -> None:
        while self._at:
            place, tombstone = next(iter(self._at.items()))
            if now < tombstone.until:
                return
            del self._at[place]
