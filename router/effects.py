"""What the pure half of the router asks of its rim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..core.errors import RequestError
from ..core.messages import TokenItem, ToWorker


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
    """A token for the client: in order, each index once."""

    request_id: str
    item: TokenItem


@dataclass(frozen=True, slots=True)
class End:
    """The request is over, and no more comes; ``error`` where it did not end well.

    ``num_cached_tokens`` of the prompt were found in a prefix cache, as far as is known.
    """

    request_id: str
    num_cached_tokens: int = 0
    error: RequestError | None = None


Effect: TypeAlias = Say | Emit | End
