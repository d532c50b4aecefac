"""What workers say and send to each other: the rim of ``Sender`` and ``Receiver``, for one
I/O thread. Blocks by value go through these sockets; those by reference, see ``puller``.

One ROUTER takes the transfers of whoever dials in (``guests``); DEALERs go to each peer that
this worker sends to (``dialler``). The thread's loop is:

    for socket, flags in kv.sockets(): poller.register(socket, flags)   # anew each time
    ready = poller.poll(...)          # no longer than kv.retry_ms, where that is not None
    events += kv.on_readable(socket, now)         for each of ours that has POLLIN
    events += kv.flush(now)                       always
    events += kv.send(effect, now)                for each Send and SendBlocks
    events += kv.write(effect)                    for each Write and Pull

Nothing here blocks. What a socket can't take now waits in a bounded queue for its peer;
a peer that takes nothing for ``stall_s`` loses its socket. Every SendBlocks is answered
by exactly one ``Sent``.
"""

from __future__ import annotations

from typing import TypeAlias, cast

import zmq

from ...core.keys import Keys
from ...core.messages import PeerAddress
from ...core.plan import KvPool
from ..effects import Pull, Send, SendBlocks, Write
from ..handshake import Handshake
from ..messages import TO_RECEIVER, TO_SENDER, ToReceiver, ToSender
from .copier import Copier, Prepared, num_threads_for
from .dialler import Dialler
from .endpoints import Context, Endpoints, Socket, SocketLimits
from .events import KvEvent, SocketLost, Written
from .guests import Guests
from .puller import Puller
from .results import Results

Pollable: TypeAlias = Socket | int  # a descriptor


class KvSockets:
    """All KV sockets of one worker. May be made on another thread than the one that uses it.

    ``keys``: what ``core.keys.require_safe_bind(endpoint, ...)`` returned. ``context`` is
    for workers that share a process (see ``inproc``); without it the sockets have their own.
    Raises ConfigError where ``endpoint`` can't be bound.
    """

    def __init__(
        self,
        handshake: Handshake,
        pool: KvPool,
        *,
        endpoint: str = "tcp://127.0.0.1:0",
        keys: Keys | None = None,
        checksums: bool = True,
        checksum_offers: bool = False,
        streams: int = 1,
        limits: SocketLimits | None = None,
        context: Context | None = None,
    ) -> None:
        limits = limits if limits is not None else SocketLimits()
        self._endpoints = Endpoints(
            handshake.token, pool.layout.block_bytes, keys, limits, context, streams
        )
        self._results: Results[Written | Prepared] = Results()
        self._puller = Puller(pool, self._results)
        self._copier = Copier(
            pool,
            self._results,
            num_threads_for(streams),
            checksums=checksums,
            checksum_offers=checksum_offers,
        )
        try:
            router = self._endpoints.listen(endpoint)
        except BaseException:
            self._close_threads()
            self._endpoints.close()
            raise
        self.address = PeerAddress(
            worker_id=handshake.ref.worker_id,
            epoch=handshake.ref.epoch,
            endpoint=router.get_string(zmq.LAST_ENDPOINT),
            token=handshake.token,
            public_key=self._endpoints.public_key,
        )
        self._guests = Guests(router, handshake, limits, self._puller.attach, self._puller.detach)
        self._dialler = Dialler(self._endpoints, self.address.endpoint, handshake, limits, streams)

    def close(self) -> None:
        """Cuts everything at once; what was not sent is not. A copy under way is waited for."""
        self._close_threads()
        self._dialler.close()
        self._guests.router.close(linger=0)
        self._endpoints.close()

    @property
    def num_dropped(self) -> int:
        """Messages from strangers, malformed ones, and what found a queue full."""
        return self._guests.num_dropped + self._dialler.num_dropped

    def sockets(self) -> list[tuple[Pollable, int]]:
        """What to poll, and for what. Changes with every call of the other methods."""
        return [
            (self._guests.router, zmq.POLLIN),
            (self._results.fileno(), zmq.POLLIN),
            *self._dialler.sockets(),
        ]

    @property
    def retry_ms(self) -> int | None:
        """How soon to ``flush`` again where polling does not tell: ZeroMQ still reads frames, or
        a guest's queue is full."""
        if self._dialler.busy:
            return 5
        return 10 if self._guests.waiting else None

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]:
        """Up to ``max_reads`` messages of one of our sockets; the poller tells of the rest."""
        if isinstance(socket, int):
            return [
                event for found in self._results.take() for event in self._on_result(found, now)
            ]
        if socket is self._guests.router:
            return list(self._guests.read(now))
        if self._dialler.owns(socket):
            return list(self._dialler.read(socket, now))
        return []  # closed since it was polled

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]:
        """Sends now if the socket takes it, else when it does (``flush``). Blocks are prepared
        first, on another thread."""
        if not isinstance(effect.peer, PeerAddress):
            assert isinstance(effect, Send)
            data = TO_SENDER.encode(cast(ToSender, effect.message))
            return self._guests.say(effect.peer, data, now)
        line = self._dialler.open(effect.peer, effect, now)
        if isinstance(line, list):
            return line
        if isinstance(effect, Send):
            data = TO_RECEIVER.encode(cast(ToReceiver, effect.message))
            return self._dialler.queue(line, data, now)
        prepared = self._copier.prepare(effect)
        return self._dialler.send_blocks(prepared, now) if prepared is not None else []

    def write(self, effect: Write | Pull) -> list[Written]:
        """Checks and copies blocks into the pool; the result comes when that is done, which may
        be at once."""
        if isinstance(effect, Pull):
            return self._puller.pull(effect)
        written = self._copier.write(effect)
        return [written] if written is not None else []

    def flush(self, now: float) -> list[KvEvent]:
        """Sends what waited; gives up peers that take nothing, or whose process has ended;
        closes what is idle."""
        events: list[KvEvent] = []
        for peer in self._puller.gone(now):
            self._guests.gone(peer)
            events.append(SocketLost(peer, f"the process of {peer} has ended"))
        return [*events, *self._dialler.flush(now), *self._guests.flush(now)]

    def _close_threads(self) -> None:
        self._puller.close()
        self._copier.close()
        self._results.close()

    def _on_result(self, result: Written | Prepared, now: float) -> list[KvEvent]:
        if isinstance(result, Prepared):
            return self._dialler.send_blocks(result, now)
        return [result]
