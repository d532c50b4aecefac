"""A medium that wraps any other, and does to its messages what a bad network would.

Messages are disturbed where they come in: by then the frames of a chunk have memory of
their own, and the sender's account of what is still read is true whatever becomes of them.
Only Connect, which the sockets answer by themselves, is disturbed on its way out. A damaged
chunk has one bit turned; an offer has nothing that could be.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, TypeAlias

from ...core.config import FaultsSection
from ...core.disturbance import Disturbance, Fate
from ...core.messages import PeerAddress
from ..effects import Pull, Send, SendBlocks, Write
from ..messages import Chunk, Connect
from .endpoints import Socket
from .events import Answered, KvEvent, Received, Written

log = logging.getLogger(__name__)

Pollable: TypeAlias = Socket | int  # a descriptor


class KvMedium(Protocol):
    """What an I/O thread asks of the KV sockets; see ``tcp`` for the order of calls."""

    @property
    def address(self) -> PeerAddress: ...

    @property
    def retry_ms(self) -> int | None: ...

    def close(self) -> None: ...

    def sockets(self) -> list[tuple[Pollable, int]]: ...

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]: ...

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]: ...

    def write(self, effect: Write | Pull) -> list[Written]: ...

    def flush(self, now: float) -> list[KvEvent]: ...


class DisturbedMedium:
    """``name`` is the worker's: each draws its own faults from the common seed."""

    def __init__(self, inner: KvMedium, faults: FaultsSection, name: str) -> None:
        self._inner = inner
        self._rates = faults.kv
        self._rng = random.Random(f"{faults.seed}/{name}/kv")
        self._arriving: Disturbance[Received | Answered] = Disturbance(faults.kv, self._rng)
        self._greeting: Disturbance[Send] = Disturbance(faults.kv, self._rng)

    @property
    def address(self) -> PeerAddress:
        return self._inner.address

    @property
    def retry_ms(self) -> int | None:
        """What is held back is looked for as often as it takes to be roughly in time."""
        held = min(self._arriving.next_due, self._greeting.next_due) < math.inf
        inner = self._inner.retry_ms
        return inner if not held else min(5, inner if inner is not None else 5)

    def close(self) -> None:
        log.info(
            "KV messages disturbed on purpose: %s; greetings: %s", self._arriving, self._greeting
        )
        self._inner.close()

    def sockets(self) -> list[tuple[Pollable, int]]:
        return self._inner.sockets()

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]:
        return self._disturbed(self._inner.on_readable(socket, now), now)

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]:
        if not (isinstance(effect, Send) and isinstance(effect.message, Connect)):
            return self._disturbed(self._inner.send(effect, now), now)
        return [
            event
            for one in self._greeting.take(effect, now)
            for event in self._disturbed(self._inner.send(one, now), now)
        ]

    def write(self, effect: Write | Pull) -> list[Written]:
        return self._inner.write(effect)

    def flush(self, now: float) -> list[KvEvent]:
        events: list[KvEvent] = []
        for greeting in self._greeting.due(now):
            events += self._inner.send(greeting, now)
        events += self._inner.flush(now)
        return [*self._arriving.due(now), *self._disturbed(events, now)]

    def _disturbed(self, events: Iterable[KvEvent], now: float) -> list[KvEvent]:
        passed: list[KvEvent] = []
        for event in events:
            if isinstance(event, Received | Answered):
                passed += self._arriving.take(self._damaged(event), now)
            else:
                passed.append(event)  # what our own rim says is true
        return passed

    def _damaged(self, event: Received | Answered) -> Received | Answered:
        if not (isinstance(event, Received) and isinstance(event.message, Chunk)):
            return event
        if not (event.message.checksums and event.frames):
            return event
        if self._rng.random() >= self._rates.damage:
            return event
        self._arriving.fates[Fate.DAMAGED] += 1
        which = self._rng.randrange(len(event.frames))
        frame = bytearray(event.frames[which])
        frame[self._rng.randrange(len(frame))] ^= 1 << self._rng.randrange(8)
        frames = list(event.frames)
        frames[which] = memoryview(frame)
        return replace(event, frames=tuple(frames))
