"""KV blocks between workers that share a process: the sockets of ``tcp``, without a network.

The same code, bounds and handshake; ZeroMQ's in-process transport moves the frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from ...core.plan import KvPool
from ..handshake import Handshake
from .endpoints import Context, SocketLimits
from .tcp import KvSockets


class InprocNetwork:
    """Workers that can reach each other; closed after all of their sockets."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def open(
        self,
        handshake: Handshake,
        pool: KvPool,
        *,
        checksums: bool = False,
        limits: SocketLimits | None = None,
    ) -> KvSockets:
        """The sockets of one worker, reached under its name and epoch."""
        return KvSockets(
            handshake,
            pool,
            endpoint=f"inproc://{handshake.ref}",
            checksums=checksums,
            limits=limits,
            context=self._context,
        )


@contextmanager
def inproc_network() -> Iterator[InprocNetwork]:
    context: Context = zmq.Context(io_threads=0)
    try:
        yield InprocNetwork(context)
    finally:
        context.term()
