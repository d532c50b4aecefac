"""What workers say and send to each other: the rim of ``Sender`` and ``Receiver``, for one
I/O thread. Blocks by value go through these sockets; those by reference, see ``puller``.

One ROUTER takes the transfers of whoever dials in; a DEALER for each peer that this
worker sends to is opened at the first word and closed when idle. The thread's loop is:

    for socket, flags in kv.sockets(): poller.register(socket, flags)   # anew each time
    ready = poller.poll(...)          # no longer than kv.retry_ms, where that is not None
    events += kv.on_readable(socket, now)         for each of ours that has POLLIN
    events += kv.flush(now)                       always
    events += kv.send(effect, now)                for each Send and SendBlocks
    events += kv.write(effect)                    for each Write and Pull

Nothing here blocks. What a socket can't take now waits in a bounded queue for its peer;
a peer that takes nothing for ``stall_s`` loses its socket. Every SendBlocks is answered
by exactly one ``Sent``.

A peer that ZeroMQ let in (see ``endpoints``) must say Connect before anything else; what
is malformed, or comes from a stranger, is counted and dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias, cast

import xxhash
import zmq

from ...core.errors import MalformedMessage
from ...core.ids import WorkerRef
from ...core.keys import Keys
from ...core.messages import PeerAddress
from ...core.plan import KvPool
from ..effects import Pull, Send, SendBlocks, Write
from ..handshake import Handshake
from ..messages import (
    MAX_CHUNK_BLOCKS,
    TO_RECEIVER,
    TO_SENDER,
    Accepted,
    Chunk,
    Connect,
    Rejected,
    ToReceiver,
    ToSender,
)
from .endpoints import Context, Endpoints, Socket, SocketLimits
from .events import Answered, KvEvent, Received, Sent, SocketLost, Written
from .puller import Puller

log = logging.getLogger(__name__)

# a message already encoded, or a chunk, whose blocks are read when the socket takes it
_Waiting: TypeAlias = bytes | SendBlocks

Pollable: TypeAlias = Socket | int  # a descriptor


@dataclass(slots=True, kw_only=True, eq=False)
class _Line:
    """What waits for one peer."""

    ref: WorkerRef
    used_at: float
    queue: deque[_Waiting] = field(default_factory=deque)
    blocked_since: float | None = None
    warned: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class _Dialled(_Line):
    """A peer whose receiver we send to."""

    endpoint: str
    socket: Socket


@dataclass(slots=True, kw_only=True, eq=False)
class _Guest(_Line):
    """A peer that said the right Connect; ``routing_id`` names its connection on the ROUTER."""

    routing_id: bytes


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
        limits: SocketLimits | None = None,
        context: Context | None = None,
    ) -> None:
        self._handshake = handshake
        self._pool = pool
        self._checksums = checksums
        self._checksum_offers = checksum_offers
        self._limits = limits if limits is not None else SocketLimits()
        self._dialled: dict[WorkerRef, _Dialled] = {}
        self._by_socket: dict[Socket, _Dialled] = {}
        self._guests: dict[WorkerRef, _Guest] = {}
        self._by_routing_id: dict[bytes, _Guest] = {}
        self._warned_of_strangers = False
        self.num_dropped = 0  # messages from strangers, and malformed ones
        self._endpoints = Endpoints(
            handshake.token, pool.layout.block_bytes, keys, self._limits, context
        )
        self._puller = Puller(pool)
        try:
            self._router = self._endpoints.listen(endpoint)
        except BaseException:
            self._puller.close()
            self._endpoints.close()
            raise
        self.address = PeerAddress(
            worker_id=handshake.ref.worker_id,
            epoch=handshake.ref.epoch,
            endpoint=self._router.get_string(zmq.LAST_ENDPOINT),
            token=handshake.token,
            public_key=self._endpoints.public_key,
        )

    def close(self) -> None:
        """Cuts everything at once; what was not sent is not. A copy under way is waited for."""
        self._puller.close()
        for dialled in self._dialled.values():
            dialled.socket.close(linger=0)
        self._router.close(linger=0)
        self._endpoints.close()

    def sockets(self) -> list[tuple[Pollable, int]]:
        """What to poll, and for what. Changes with every call of the other methods."""
        return [
            (self._router, zmq.POLLIN),
            (self._puller.fileno(), zmq.POLLIN),
            *(
                (socket, zmq.POLLIN | zmq.POLLOUT if dialled.queue else zmq.POLLIN)
                for socket, dialled in self._by_socket.items()
            ),
        ]

    @property
    def retry_ms(self) -> int | None:
        """How soon to ``flush`` again where polling does not tell: a guest's queue is full."""
        return 10 if any(guest.queue for guest in self._guests.values()) else None

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]:
        """Up to ``max_reads`` messages of one of our sockets; the poller tells of the rest."""
        if isinstance(socket, int):
            return [*self._puller.results()]
        if socket is self._router:
            read: Iterator[KvEvent] = self._read_guests(now)
        elif socket in self._by_socket:
            read = self._read_dialled(socket, now)
        else:
            return []  # closed since it was polled
        return list(read)

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]:
        """Sends now if the socket takes it, else when it does (``flush``)."""
        line: _Line | str | None
        if isinstance(effect.peer, PeerAddress):
            line = self._dialled.get(effect.peer.ref) or self._dial(effect.peer, now)
            if isinstance(line, str):
                return [*_sent([effect]), SocketLost(effect.peer.ref, line)]
        else:
            line = self._guests.get(effect.peer)
            if line is None:
                return []  # it will dial in again, or its lease runs out
        if len(line.queue) >= self._limits.max_queue:
            self.num_dropped += 1
            return _sent([effect])
        if isinstance(effect, SendBlocks):
            line.queue.append(effect)
        elif isinstance(line, _Guest):
            line.queue.append(TO_SENDER.encode(cast(ToSender, effect.message)))
        else:
            line.queue.append(TO_RECEIVER.encode(cast(ToReceiver, effect.message)))
        return self._drain(line, now) if len(line.queue) == 1 else []

    def write(self, effect: Write | Pull) -> list[Written]:
        """Checks and copies blocks into the pool; a Pull's result comes when it is done."""
        if isinstance(effect, Pull):
            return self._puller.pull(effect)
        ok = all(
            xxhash.xxh3_64_intdigest(frame) == checksum
            for frame, checksum in zip(effect.frames, effect.checksums, strict=False)
        )
        if ok:
            self._pool.write(effect.blocks, effect.frames)
        else:
            log.warning("%s: a block came in damaged", effect.attempt)
        return [Written(effect.attempt, effect.first_block, ok)]

    def flush(self, now: float) -> list[KvEvent]:
        """Sends what waited; gives up peers that take nothing, or whose process has ended;
        closes what is idle."""
        events: list[KvEvent] = []
        for peer in self._puller.gone(now):
            self._puller.detach(peer)
            if (guest := self._guests.get(peer)) is not None:
                self._forget(guest)
            events.append(SocketLost(peer, f"the process of {peer} has ended"))
        lines: list[_Line] = [*self._dialled.values(), *self._guests.values()]
        for line in lines:
            if line.queue:
                events += self._drain(line, now)
            if not self._known(line):
                continue
            if line.blocked_since is not None:
                if now - line.blocked_since >= self._limits.stall_s:
                    events += self._give_up(line, now)
            elif now - line.used_at >= self._limits.idle_s:
                self._forget(line)
        return events

    # opening and closing

    def _dial(self, peer: PeerAddress, now: float) -> _Dialled | str:
        """Opens the socket to a peer, or tells what is wrong with its address."""
        socket = self._endpoints.dial(peer, self.address.endpoint)
        if isinstance(socket, str):
            return socket
        dialled = _Dialled(ref=peer.ref, used_at=now, endpoint=peer.endpoint, socket=socket)
        self._dialled[peer.ref] = self._by_socket[socket] = dialled
        return dialled

    def _give_up(self, line: _Line, now: float) -> list[KvEvent]:
        assert line.blocked_since is not None
        text = f"{line.ref} took nothing for {now - line.blocked_since:.1f} s"
        if isinstance(line, _Dialled):
            text += (
                f" at {line.endpoint}: unreachable, not reading, or it refuses this "
                "worker's key or token"
            )
        log.warning("%s", text)
        events = _sent(line.queue)
        self._forget(line)
        return [*events, SocketLost(line.ref, text)]

    def _known(self, line: _Line) -> bool:
        return line in (self._dialled.get(line.ref), self._guests.get(line.ref))

    def _forget(self, line: _Line) -> None:
        if isinstance(line, _Dialled):
            del self._dialled[line.ref]
            del self._by_socket[line.socket]
            line.socket.close(linger=0)
        elif isinstance(line, _Guest):
            del self._guests[line.ref]
            del self._by_routing_id[line.routing_id]
            self._puller.detach(line.ref)

    # sending

    def _drain(self, line: _Line, now: float) -> list[KvEvent]:
        events: list[KvEvent] = []
        while line.queue:
            try:
                self._transmit(line, line.queue[0])
            except zmq.Again:
                if line.blocked_since is None:
                    line.blocked_since = now
                return events
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                # a guest whose connection is gone: it dials in anew, or its lease runs out
                events += _sent(line.queue)
                self._forget(line)
                return events
            line.blocked_since = None
            line.used_at = now
            events += _sent([line.queue.popleft()])
        line.blocked_since = None
        return events

    def _transmit(self, line: _Line, waiting: _Waiting) -> None:
        """Raises zmq.Again where the socket takes nothing now; a message goes whole or not."""
        if isinstance(line, _Guest):
            assert isinstance(waiting, bytes)
            self._router.send_multipart([line.routing_id, waiting], zmq.NOBLOCK)
            return
        assert isinstance(line, _Dialled)
        if isinstance(waiting, bytes):
            line.socket.send(waiting, zmq.NOBLOCK)
            return
        if not line.socket.poll(0, zmq.POLLOUT):
            raise zmq.Again  # before any block is read
        if waiting.tail_tokens:
            self._pool.zero_tail(waiting.blocks[-1], waiting.tail_tokens)
        message = waiting.message
        by_value = isinstance(message, Chunk)
        checked = self._checksums if by_value else self._checksum_offers
        blocks = self._pool.read(waiting.blocks) if by_value or checked else []
        if checked:
            checksums = tuple(xxhash.xxh3_64_intdigest(block) for block in blocks)
            message = replace(message, checksums=checksums)
        frames = blocks if by_value else []
        line.socket.send_multipart([TO_RECEIVER.encode(message), *frames], zmq.NOBLOCK)

    # receiving

    def _read_guests(self, now: float) -> Iterator[KvEvent]:
        for frames in self._read(self._router):
            routing_id = frames[0].bytes
            guest = self._by_routing_id.get(routing_id)
            if not 2 <= len(frames) <= 2 + MAX_CHUNK_BLOCKS:
                self._drop(guest, f"a message of {len(frames)} frames")
                continue
            try:
                message = TO_RECEIVER.decode(frames[1].buffer)
            except MalformedMessage as error:
                self._drop(guest, str(error))
                continue
            if isinstance(message, Connect):
                self._on_connect(routing_id, message, now)
            elif guest is None:
                self._drop(None, "a message before Connect")
            else:
                guest.used_at = now
                data = tuple(frame.buffer for frame in frames[2:])
                yield Received(guest.ref, message, data)

    def _on_connect(self, routing_id: bytes, connect: Connect, now: float) -> None:
        ref = WorkerRef(connect.worker_id, connect.epoch)
        answer = self._handshake.answer(connect, partial(self._puller.attach, ref))
        if isinstance(answer, Accepted):
            guest = self._by_routing_id.get(routing_id)
            if guest is None or guest.ref != ref:
                if guest is not None:  # a connection has one peer
                    self._forget(guest)
                before = self._guests.pop(ref, None)  # and a peer one connection: the latest
                if before is not None:
                    del self._by_routing_id[before.routing_id]
                guest = _Guest(ref=ref, used_at=now, routing_id=routing_id)
                self._guests[ref] = self._by_routing_id[routing_id] = guest
            guest.used_at = now
        else:
            self._drop(None, answer.text)
        self._reply(routing_id, answer)

    def _reply(self, routing_id: bytes, answer: Accepted | Rejected) -> None:
        """At once or not at all: Connect is said again until it is answered."""
        try:
            self._router.send_multipart([routing_id, TO_SENDER.encode(answer)], zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def _read_dialled(self, socket: Socket, now: float) -> Iterator[KvEvent]:
        dialled = self._by_socket[socket]
        for frames in self._read(socket):
            dialled.used_at = now
            if len(frames) != 1:
                self._drop(dialled, f"a message of {len(frames)} frames")
                continue
            try:
                message = TO_SENDER.decode(frames[0].buffer)
            except MalformedMessage as error:
                self._drop(dialled, str(error))
                continue
            yield Answered(dialled.ref, message)

    def _read(self, socket: Socket) -> Iterator[list[zmq.Frame]]:
        for _ in range(self._limits.max_reads):
            try:
                yield socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return

    def _drop(self, line: _Line | None, what: str) -> None:
        """Counts it, and logs the first of each peer."""
        self.num_dropped += 1
        if line is not None and not line.warned:
            line.warned = True
            log.warning("dropped from %s: %s", line.ref, what)
        elif line is None and not self._warned_of_strangers:
            self._warned_of_strangers = True
            log.warning("dropped from a stranger: %s", what)


def _sent(effects: Iterable[_Waiting | Send]) -> list[KvEvent]:
    """The ``Sent`` that each chunk is owed, whether it left or not."""
    return [
        Sent(effect.attempt, effect.message.first_block)
        for effect in effects
        if isinstance(effect, SendBlocks)
    ]
