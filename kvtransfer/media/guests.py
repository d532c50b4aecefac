"""The listening side: one ROUTER takes the transfers of whoever dials in.

A peer that ZeroMQ let in (see ``endpoints``) must say Connect before anything else; what
is malformed, or comes from a stranger, is counted and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import zmq

from ...core.errors import MalformedMessage
from ...core.ids import WorkerRef
from ...core.plan import PoolExport
from ..handshake import Handshake
from ..messages import (
    MAX_CHUNK_BLOCKS,
    TO_RECEIVER,
    TO_SENDER,
    Accepted,
    Connect,
    Rejected,
)
from .endpoints import Socket, SocketLimits
from .events import KvEvent, Received
from .lines import MAX_STREAMS, Guest, Line, Waiting
from .side import Side

log = logging.getLogger(__name__)


class Guests(Side[Guest]):
    """Everyone who has said the right Connect.

    ``attach(ref, export)`` maps what a peer shows of its pool, or says why it can't be;
    ``detach(ref)`` is called when a guest is forgotten.
    """

    def __init__(
        self,
        router: Socket,
        handshake: Handshake,
        limits: SocketLimits,
        attach: Callable[[WorkerRef, PoolExport], str | None],
        detach: Callable[[WorkerRef], None],
    ) -> None:
        super().__init__(limits)
        self.router = router
        self._handshake = handshake
        self._attach = attach
        self._detach = detach
        self._guests: dict[WorkerRef, Guest] = {}
        self._by_routing_id: dict[bytes, Guest] = {}
        self._warned_of_strangers = False

    @property
    def waiting(self) -> bool:
        """Whether something waits, of which polling does not tell."""
        return any(guest.queue for guest in self._guests.values())

    def say(self, ref: WorkerRef, data: bytes, now: float) -> list[KvEvent]:
        """To a guest; to who is none, nothing: it will dial in again, or its lease runs out."""
        guest = self._guests.get(ref)
        return self.queue(guest, data, now) if guest is not None else []

    def gone(self, ref: WorkerRef) -> None:
        """The peer's process has ended."""
        self._detach(ref)
        if (guest := self._guests.get(ref)) is not None:
            self._forget(guest)

    def read(self, now: float) -> Iterator[KvEvent]:
        """What guests have said, and strangers' first words answered."""
        for frames in self._read(self.router):
            routing_id = frames[0].bytes
            guest = self._by_routing_id.get(routing_id)
            if not 2 <= len(frames) <= 2 + MAX_CHUNK_BLOCKS:
                self.drop(guest, f"a message of {len(frames)} frames")
                continue
            try:
                message = TO_RECEIVER.decode(frames[1].buffer)
            except MalformedMessage as error:
                self.drop(guest, str(error))
                continue
            if isinstance(message, Connect):
                self._on_connect(routing_id, message, now)
            elif guest is None:
                self.drop(None, "a message before Connect")
            else:
                guest.used_at = now
                data = tuple(frame.buffer for frame in frames[2:])
                yield Received(guest.ref, message, data)

    def drop(self, line: Line | None, what: str) -> None:
        super().drop(line, what)
        if line is None and not self._warned_of_strangers:
            self._warned_of_strangers = True
            log.warning("dropped from a stranger: %s", what)

    def _lines(self) -> Iterable[Guest]:
        return self._guests.values()

    def _known(self, line: Guest) -> bool:
        return self._guests.get(line.ref) is line

    def _idle(self, line: Guest, now: float) -> bool:
        return True

    def _transmit(self, line: Guest, waiting: Waiting, now: float) -> list[KvEvent]:
        assert isinstance(waiting, bytes)
        self.router.send_multipart([line.routing_id, waiting], zmq.NOBLOCK)
        return []

    def _forget(self, line: Guest) -> list[KvEvent]:
        del self._guests[line.ref]
        for routing_id in line.routing_ids:
            del self._by_routing_id[routing_id]
        self._detach(line.ref)
        return []

    def _on_connect(self, routing_id: bytes, connect: Connect, now: float) -> None:
        ref = WorkerRef(connect.worker_id, connect.epoch)
        if connect.stream > 0:
            self._on_stream(routing_id, connect, self._guests.get(ref))
            return
        answer = self._handshake.answer(connect, partial(self._attach, ref))
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
            self.drop(None, answer.text)
        self._reply(routing_id, answer)

    def _on_stream(self, routing_id: bytes, connect: Connect, guest: Guest | None) -> None:
        """A further socket of a peer that is a guest already. It is told nothing."""
        if guest is None or not self._handshake.knows(connect):
            self.drop(None, "a further stream of a stranger")
            return
        known = self._by_routing_id.get(routing_id)
        if known is guest:
            return
        if known is not None:
            self.drop(known, "a connection that is another peer's")
            return
        while len(guest.streams) >= MAX_STREAMS:  # connections that were there before
            del self._by_routing_id[guest.streams.popleft()]
        guest.streams.append(routing_id)
        self._by_routing_id[routing_id] = guest

    def _reply(self, routing_id: bytes, answer: Accepted | Rejected) -> None:
        """At once or not at all: Connect is said again until it is answered."""
        try:
            self.router.send_multipart([routing_id, TO_SENDER.encode(answer)], zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
