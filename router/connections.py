"""One connection of a client, with bounds on what it may cost while it asks for nothing.

    accepted, or told 503 where there are too many
    idle, for ``idle_s`` at most
    a request's head comes, in ``head_s`` at most: else 408 and the end
    the request is handled; its body and its answer have bounds of their own; idle again

The server's own keep-alive timer covers the idle times. It knows no limit for a head that
comes a byte at a time, nor for the number of connections: those are here.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from ..core.errors import RequestError, Unavailable
from .errors import envelope


@dataclass(slots=True)
class Limits:
    """Shared by all connections of a server."""

    max_connections: int
    head_s: float
    num_connections: int = 0


class Connection(web.RequestHandler):
    __slots__ = ("_busy", "_counted", "_head_timer", "_limits", "_refused")

    def __init__(self, manager: web.Server, limits: Limits, **settings: Any) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), **settings)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._busy = False  # from a request's head to its answer
        self._counted = False
        self._refused = False

    def begin(self) -> None:
        """A request's head is whole."""
        self._busy = True
        self._stop_timer()

    def end(self) -> None:
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        limits = self._limits
        if limits.num_connections >= limits.max_connections:
            self._refused = True
            error = Unavailable("there are too many connections", code="too_many_connections")
            stream = cast(asyncio.Transport, transport)  # uvloop's is of another class
            stream.write(_last_words(error, "Service Unavailable"))
            stream.close()
            return
        limits.num_connections += 1
        self._counted = True
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._busy and self._head_timer is None:
            loop = asyncio.get_running_loop()
            self._head_timer = loop.call_later(self._limits.head_s, self._late)
        super().data_received(data)

    def eof_received(self) -> None:
        if not self._refused:
            super().eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        if self._counted:
            self._counted = False
            self._limits.num_connections -= 1
        if not self._refused:
            super().connection_lost(exc)

    def _late(self) -> None:
        if self.transport is not None:
            error = RequestError("the head did not come", status=408, code="header_timeout")
            self.transport.write(_last_words(error, "Request Timeout"))
        self.force_close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _last_words(error: RequestError, reason: str) -> bytes:
    """An answer for a connection that has not got as far as a request."""
    body = json.dumps(envelope(error)).encode()
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
