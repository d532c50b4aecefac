"""What waits for a peer, on each of the connections to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import zmq

from ...core.ids import WorkerRef
from ...core.messages import PeerAddress
from ..effects import Send, SendBlocks
from .copier import Prepared
from .endpoints import Socket
from .events import KvEvent, Sent

# a message already encoded, or a chunk with its frames
Waiting: TypeAlias = bytes | Prepared

MAX_STREAMS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Sending:
    """Frames that ZeroMQ reads where they lie, until ``tracker`` says that it is done."""

    prepared: Prepared
    tracker: zmq.MessageTracker
    since: float


@dataclass(slots=True, kw_only=True, eq=False)
class Line:
    """One connection, one way."""

    ref: WorkerRef
    used_at: float
    queue: deque[Waiting] = field(default_factory=deque)
    blocked_since: float | None = None
    warned: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Dialled(Line):
    """A socket to a peer's receiver. The first of a peer carries every message, and its share
    of the chunks; the further ones (``stream`` > 0) only chunks, behind a Connect each."""

    peer: PeerAddress
    socket: Socket
    stream: int = 0
    sending: deque[Sending] = field(default_factory=deque)  # ZeroMQ is done with the first first
    connected_at: float | None = None  # when a further stream last said who it is


@dataclass(slots=True, kw_only=True, eq=False)
class Guest(Line):
    """A peer that said the right Connect; ``routing_id`` names its connection on the ROUTER,
    ``streams`` those of its further sockets."""

    routing_id: bytes
    streams: deque[bytes] = field(default_factory=deque)

    @property
    def routing_ids(self) -> tuple[bytes, ...]:
        return (self.routing_id, *self.streams)


def sent(effects: Iterable[Waiting | Send | SendBlocks]) -> list[KvEvent]:
    """The ``Sent`` that each chunk is owed, whether it left or not."""
    chunks = (item.effect if isinstance(item, Prepared) else item for item in effects)
    return [
        Sent(chunk.attempt, chunk.message.first_block)
        for chunk in chunks
        if isinstance(chunk, SendBlocks)
    ]
