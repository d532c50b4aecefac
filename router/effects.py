"""What the pure half of the router asks of its rim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..core.errors import RequestError
from ..core.messages import TokenItem, ToWorker
from .timeline import Timeline


@dataclass(frozen=True, slots=True)
class Link:
    """One connection to the control sockets: which of them, and the name ZeroMQ gave it."""

    socket: int
    identity: bytes


@dataclass(frozen=True, slots=True)
class Say:
    link: Link
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Emit:
    """A token for the client: in order, each index once; ``gap`` seconds after the one before."""

    request_id: str
    item: TokenItem
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The request is over, and no more comes; ``error`` where it did not end well."""

    timeline: Timeline
    error: RequestError | None = None

    @property
    def request_id(self) -> str:
        return self.timeline.request_id


Effect: TypeAlias = Say | Emit | End
