"""The control sockets: where workers join. Read without blocking, from the event loop.

ZeroMQ's descriptor is edge-triggered: it tells that something may have changed, once. So
each time it is readable, and after each send, the sockets are read until they are empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from ..core.codec import MAX_MESSAGE_BYTES
from ..core.errors import MalformedMessage, StartupError
from ..core.half_open import notice_silence
from ..core.keys import Keys, secure_server
from ..core.messages import TO_ROUTER, TO_WORKER, ToRouter, ToWorker
from .effects import Link

log = logging.getLogger(__name__)

Receive = Callable[[Link, ToRouter], None]

_MAX_UNSENT = 16 << 10  # messages; a worker that takes none for so long is none
_MAX_AT_ONCE = 256  # messages of one socket, before others have their turn
_MAX_FAULTY = 1024  # links
_LINGER_MS = 500


class ControlSockets:
    """Bound and read from the running loop; each valid message goes to ``receive``."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.receive: Receive | None = None
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._faulty: set[Link] = set()  # have sent what is no message; said once of each
        self._again: asyncio.Handle | None = None

    def bind(self, endpoint: str, keys: Keys | None = None) -> str:
        """Returns the endpoint that was bound; StartupError where it can't be."""
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = _LINGER_MS
        socket.sndhwm = socket.rcvhwm = _MAX_UNSENT
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a link that is gone is an error
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker may dial again
        notice_silence(socket)
        if keys is not None:
            secure_server(socket, keys)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise StartupError(f"{endpoint} can't be bound: {error.strerror.lower()}") from error
        self._sockets.append(socket)
        self._loop.add_reader(socket.fileno(), self.read)
        bound: str = socket.last_endpoint.rstrip(b"\0").decode()
        if bound.startswith("ipc://"):  # its folder is the owner's alone too
            Path(bound.removeprefix("ipc://")).chmod(0o600)
        return bound

    def send(self, link: Link, message: ToWorker) -> bool:
        """False where the link is gone, or its worker has stopped reading."""
        self._read_soon()
        try:
            self._sockets[link.socket].send_multipart(
                (link.identity, TO_WORKER.encode(message)), zmq.NOBLOCK
            )
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def read(self) -> None:
        """Takes what has come; comes back soon where there may be more."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for index, socket in enumerate(self._sockets):
            for _ in range(_MAX_AT_ONCE):
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._take(Link(index, frames[0]), frames[1:])
            else:
                self._read_soon()

    def close(self) -> None:
        """What was sent has half a second to leave."""
        if self._again is not None:
            self._again.cancel()
        for socket in self._sockets:
            self._loop.remove_reader(socket.fileno())
            socket.close()
        self._sockets.clear()

    def _read_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self.read)

    def _take(self, link: Link, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise MalformedMessage(f"{len(frames)} frames")
            message = TO_ROUTER.decode(frames[0])
        except MalformedMessage as error:
            if link not in self._faulty and len(self._faulty) < _MAX_FAULTY:
                self._faulty.add(link)
                log.warning("dropped what a worker sent, and will again: %s", error)
            return
        assert self.receive is not None, "bound before anyone takes what comes"
        self.receive(link, message)
