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
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TypeAlias, cast

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
    Connect,
    Rejected,
    ToReceiver,
    ToSender,
)
from .copier import Copier, Prepared, num_threads_for
from .endpoints import Context, Endpoints, Socket, SocketLimits
from .events import Answered, KvEvent, Received, SocketLost, Written
from .lines import MAX_STREAMS, Dialled, Guest, Line, Sending, Waiting, sent
from .puller import Puller
from .results import Results

log = logging.getLogger(__name__)

Pollable: TypeAlias = Socket | int  # a descriptor

_GREET_S = 1.0  # how often a further stream says again who it is: its connection may be new


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
        self._handshake = handshake
        self._pool = pool
        self._num_streams = streams
        self._limits = limits if limits is not None else SocketLimits()
        self._dialled: dict[WorkerRef, list[Dialled]] = {}  # a peer's streams
        self._by_socket: dict[Socket, Dialled] = {}
        self._guests: dict[WorkerRef, Guest] = {}
        self._by_routing_id: dict[bytes, Guest] = {}
        self._busy: dict[Dialled, None] = {}  # that ZeroMQ sends frames of, some closed since
        self._greetings: dict[WorkerRef, Connect] = {}
        self._warned_of_strangers = False
        self.num_dropped = 0  # messages from strangers, and malformed ones
        self._endpoints = Endpoints(
            handshake.token, pool.layout.block_bytes, keys, self._limits, context, streams
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
            self._router = self._endpoints.listen(endpoint)
        except BaseException:
            self._close_threads()
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
        self._close_threads()
        for socket in self._by_socket:
            socket.close(linger=0)
        self._router.close(linger=0)
        self._endpoints.close()

    def sockets(self) -> list[tuple[Pollable, int]]:
        """What to poll, and for what. Changes with every call of the other methods."""
        return [
            (self._router, zmq.POLLIN),
            (self._results.fileno(), zmq.POLLIN),
            *(
                (
                    socket,
                    zmq.POLLIN | zmq.POLLOUT * bool(dialled.queue or self._is_awaited(dialled)),
                )
                for socket, dialled in self._by_socket.items()
            ),
        ]

    @property
    def retry_ms(self) -> int | None:
        """How soon to ``flush`` again where polling does not tell: ZeroMQ still reads frames, or
        a guest's queue is full."""
        if self._busy:
            return 5
        return 10 if any(guest.queue for guest in self._guests.values()) else None

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]:
        """Up to ``max_reads`` messages of one of our sockets; the poller tells of the rest."""
        if isinstance(socket, int):
            return [
                event for found in self._results.take() for event in self._on_result(found, now)
            ]
        if socket is self._router:
            read: Iterator[KvEvent] = self._read_guests(now)
        elif socket in self._by_socket:
            read = self._read_dialled(socket, now)
        else:
            return []  # closed since it was polled
        return list(read)

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]:
        """Sends now if the socket takes it, else when it does (``flush``). Blocks are prepared
        first, on another thread."""
        if not isinstance(effect.peer, PeerAddress):
            guest = self._guests.get(effect.peer)
            if guest is None:
                return []  # it will dial in again, or its lease runs out
            assert isinstance(effect, Send)
            return self._queue(guest, TO_SENDER.encode(cast(ToSender, effect.message)), now)
        lines = self._dialled.get(effect.peer.ref) or self._dial(effect.peer, now)
        if isinstance(lines, str):
            return [*sent([effect]), SocketLost(effect.peer.ref, lines)]
        if isinstance(effect, Send):
            data = TO_RECEIVER.encode(cast(ToReceiver, effect.message))
            return self._queue(lines[0], data, now)
        prepared = self._copier.prepare(effect)
        return self._send_blocks(prepared, now) if prepared is not None else []

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
            self._puller.detach(peer)
            if (guest := self._guests.get(peer)) is not None:
                self._forget(guest)
            events.append(SocketLost(peer, f"the process of {peer} has ended"))
        self._dial_further(now)
        events += self._sent_by_now(now)
        lines: list[Line] = [*self._by_socket.values(), *self._guests.values()]
        for line in lines:
            if line.queue:
                events += self._drain(line, now)
            if not self._known(line):
                continue
            if line.blocked_since is not None:
                if now - line.blocked_since >= self._limits.stall_s:
                    events += self._give_up(line, now)
            elif now - line.used_at >= self._limits.idle_s and self._idle(line, now):
                events += self._forget(line)
        return events

    def _close_threads(self) -> None:
        self._puller.close()
        self._copier.close()
        self._results.close()

    # opening and closing

    def _dial(self, peer: PeerAddress, now: float) -> list[Dialled] | str:
        """Opens the first socket to a peer, or tells what is wrong with its address."""
        line = self._open(peer, 0, now)
        if isinstance(line, str):
            return line
        self._dialled[peer.ref] = [line]
        self._greetings[peer.ref] = self._handshake.connect(peer)
        return self._dialled[peer.ref]

    def _dial_further(self, now: float) -> None:
        """The next stream of each peer, once its last one is connected. ZeroMQ gives a new
        connection to the thread that has the fewest, and counts those that are there: of several
        that come at once one thread would get all, on either side."""
        for lines in self._dialled.values():
            last = lines[-1]
            if self._is_awaited(last) and last.socket.poll(0, zmq.POLLOUT):
                line = self._open(last.peer, len(lines), now)
                assert isinstance(line, Dialled), line  # its address was good before
                lines.append(line)

    def _is_awaited(self, line: Dialled) -> bool:
        """Whether the next stream is dialled as soon as this one has its connection."""
        return line.stream == len(self._dialled[line.ref]) - 1 < self._num_streams - 1

    def _open(self, peer: PeerAddress, stream: int, now: float) -> Dialled | str:
        socket = self._endpoints.dial(peer, self.address.endpoint)
        if isinstance(socket, str):
            return socket
        line = Dialled(ref=peer.ref, used_at=now, peer=peer, socket=socket, stream=stream)
        self._by_socket[socket] = line
        return line

    def _give_up(self, line: Line, now: float) -> list[KvEvent]:
        text = f"{line.ref} took nothing for {self._limits.stall_s:g} s"
        if isinstance(line, Dialled):
            text += (
                f" at {line.peer.endpoint}: unreachable, not reading, or it refuses this "
                "worker's key or token"
            )
        log.warning("%s", text)
        return [*self._forget(line), SocketLost(line.ref, text)]

    def _known(self, line: Line) -> bool:
        if isinstance(line, Dialled):
            return self._by_socket.get(line.socket) is line
        return self._guests.get(line.ref) is line

    def _idle(self, line: Line, now: float) -> bool:
        """Whether nothing of the peer's is in use: its further streams may be while one is not."""
        if not isinstance(line, Dialled):
            return True
        return all(now - one.used_at >= self._limits.idle_s for one in self._dialled[line.ref])

    def _forget(self, line: Line) -> list[KvEvent]:
        """Closes the connections to a peer; what waited for them is not sent."""
        if isinstance(line, Guest):
            del self._guests[line.ref]
            for routing_id in line.routing_ids:
                del self._by_routing_id[routing_id]
            self._puller.detach(line.ref)
            return []
        events: list[KvEvent] = []
        del self._greetings[line.ref]
        for dialled in self._dialled.pop(line.ref):
            events += sent(dialled.queue)
            del self._by_socket[dialled.socket]
            dialled.socket.close(linger=0)  # frames under way are let go of soon after
        return events

    # sending

    def _queue(self, line: Line, waiting: Waiting, now: float) -> list[KvEvent]:
        if len(line.queue) >= self._limits.max_queue:
            self.num_dropped += 1
            return sent([waiting])
        line.queue.append(waiting)
        return self._drain(line, now) if len(line.queue) == 1 else []

    def _on_result(self, result: Written | Prepared, now: float) -> list[KvEvent]:
        return self._send_blocks(result, now) if isinstance(result, Prepared) else [result]

    def _send_blocks(self, prepared: Prepared, now: float) -> list[KvEvent]:
        """On the stream that has the least to do."""
        lines = self._dialled.get(prepared.effect.peer.ref)
        if lines is None:
            return sent([prepared])  # given up while it was prepared
        if not prepared.frames:
            return self._queue(lines[0], prepared, now)
        line = min(lines, key=lambda line: len(line.queue) + len(line.sending))
        stale = line.connected_at is None or now - line.connected_at >= _GREET_S
        if line.stream > 0 and stale:
            line.connected_at = now
            greeting = replace(self._greetings[line.ref], stream=line.stream)
            events = self._queue(line, TO_RECEIVER.encode(greeting), now)
            if not self._known(line):
                return [*events, *sent([prepared])]
        return self._queue(line, prepared, now)

    def _sent_by_now(self, now: float) -> list[KvEvent]:
        """The chunks whose frames ZeroMQ has let go of; gives up who does not take them."""
        done: list[Prepared] = []
        for line in list(self._busy):
            while line.sending and line.sending[0].tracker.done:
                done.append(line.sending.popleft().prepared)
            if not line.sending:
                del self._busy[line]
            elif now - line.sending[0].since >= self._limits.stall_s and self._known(line):
                line.blocked_since = line.sending[0].since
        return sent(done)

    def _drain(self, line: Line, now: float) -> list[KvEvent]:
        events: list[KvEvent] = []
        while line.queue:
            try:
                events += self._transmit(line, line.queue[0], now)
            except zmq.Again:
                if line.blocked_since is None:
                    line.blocked_since = now
                return events
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                # a guest whose connection is gone: it dials in anew, or its lease runs out
                return [*events, *self._forget(line)]
            line.blocked_since = None
            line.used_at = now
            line.queue.popleft()
        line.blocked_since = None
        return events

    def _transmit(self, line: Line, waiting: Waiting, now: float) -> list[KvEvent]:
        """Raises zmq.Again where the socket takes nothing now; a message goes whole or not."""
        if isinstance(line, Guest):
            assert isinstance(waiting, bytes)
            self._router.send_multipart([line.routing_id, waiting], zmq.NOBLOCK)
            return []
        assert isinstance(line, Dialled)
        if isinstance(waiting, bytes):
            line.socket.send(waiting, zmq.NOBLOCK)
            return []
        if not waiting.frames:
            line.socket.send(waiting.head, zmq.NOBLOCK)
            return sent([waiting])
        message: list[bytes | memoryview] = [waiting.head, *waiting.frames]
        tracker = line.socket.send_multipart(message, zmq.NOBLOCK, copy=False, track=True)
        if tracker is None or tracker.done:  # small frames are copied
            return sent([waiting])
        line.sending.append(Sending(waiting, tracker, now))
        self._busy[line] = None
        return []

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
        if connect.stream > 0:
            self._on_stream(routing_id, connect, self._guests.get(ref))
            return
        answer = self._handshake.answer(connect, partial(self._puller.attach, ref))
        if isinstance(answer, Accepted):
            guest = self._by_routing_id.get(routing_id)
            if guest is not None and guest.ref != ref:
                self._forget(guest)  # a connection has one peer
            guest = self._guests.get(ref)
            if guest is None:
                guest = self._guests[ref] = Guest(ref=ref, used_at=now, routing_id=routing_id)
            elif guest.routing_id != routing_id:  # and a peer the latest of its connections
                del self._by_routing_id[guest.routing_id]
                if routing_id in guest.streams:
                    guest.streams.remove(routing_id)
                guest.routing_id = routing_id
            self._by_routing_id[routing_id] = guest
            guest.used_at = now
        else:
            self._drop(None, answer.text)
        self._reply(routing_id, answer)

    def _on_stream(self, routing_id: bytes, connect: Connect, guest: Guest | None) -> None:
        """A further socket of a peer that is a guest already. It is told nothing."""
        if guest is None or not self._handshake.knows(connect):
            self._drop(None, "a further stream of a stranger")
            return
        known = self._by_routing_id.get(routing_id)
        if known is guest:
            return
        if known is not None:
            self._drop(known, "a connection that is another peer's")
            return
        while len(guest.streams) >= MAX_STREAMS:  # connections that were there before
            del self._by_routing_id[guest.streams.popleft()]
        guest.streams.append(routing_id)
        self._by_routing_id[routing_id] = guest

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

    def _drop(self, line: Line | None, what: str) -> None:
        """Counts it, and logs the first of each peer."""
        self.num_dropped += 1
        if line is not None and not line.warned:
            line.warned = True
            log.warning("dropped from %s: %s", line.ref, what)
        elif line is None and not self._warned_of_strangers:
            self._warned_of_strangers = True
            log.warning("dropped from a stranger: %s", what)
