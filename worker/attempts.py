"""Which attempts a worker has, and which it must not take up again.

Of one request only the newest attempt counts: a message about an older one, or about one
that is over, is ignored. What is over is remembered by its number for ``memory_s``, longer
than any message about it can be on its way.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ..core.ids import Attempt
from ..core.messages import Key, Place

MAX_TOMBSTONES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Tombstone:
    number: int  # this attempt of the request, and all before it
    until: float


class Attempts:
    """The live attempts with their placements, and the tombstones, by request."""

    def __init__(self, memory_s: float, max_tombstones: int = MAX_TOMBSTONES) -> None:
        self._memory_s = memory_s
        self._max_tombstones = max_tombstones
        self._live: dict[str, Place] = {}
        self._tombstones: OrderedDict[str, _Tombstone] = OrderedDict()  # the next to expire first

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, attempt: Attempt) -> bool:
        place = self._live.get(attempt.request_id)
        return place is not None and place.key.number == attempt.number

    def live_keys(self) -> tuple[Key, ...]:
        return tuple(place.key for place in self._live.values())

    def place(self, attempt: Attempt) -> Place:
        """How a live attempt was placed."""
        place = self._live[attempt.request_id]
        assert place.key.number == attempt.number
        return place

    def current(self, request_id: str) -> Attempt | None:
        """The live attempt of a request."""
        place = self._live.get(request_id)
        return None if place is None else place.key.attempt

    def is_news(self, attempt: Attempt) -> bool:
        """Whether this attempt is newer than all that is known of its request."""
        place = self._live.get(attempt.request_id)
        if place is not None and place.key.number >= attempt.number:
            return False
        tombstone = self._tombstones.get(attempt.request_id)
        return tombstone is None or tombstone.number < attempt.number

    def add(self, place: Place) -> None:
        assert place.key.request_id not in self._live
        self._live[place.key.request_id] = place

    def end(self, attempt: Attempt, now: float) -> None:
        """It is over, or must never begin; older ones likewise."""
        if attempt in self:
            del self._live[attempt.request_id]
        before = self._tombstones.pop(attempt.request_id, None)
        number = attempt.number if before is None else max(before.number, attempt.number)
        self._tombstones[attempt.request_id] = _Tombstone(number, now + self._memory_s)
        if len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)

    def forget(self, now: float) -> None:
        """Drops the tombstones whose time is up."""
        while self._tombstones:
            request_id, tombstone = next(iter(self._tombstones.items()))
            if now < tombstone.until:
                return
            del self._tombstones[request_id]
