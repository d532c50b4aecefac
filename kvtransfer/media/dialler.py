"""The dialling side: DEALERs to each peer that this worker sends to.

The first is opened at the first word, the further streams one after the other; all of a peer's
are closed when none of them has been used for long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import zmq

from ...core.errors import MalformedMessage
from ...core.ids import WorkerRef
from ...core.messages import PeerAddress
from ..effects import Send, SendBlocks
from ..handshake import Handshake
from ..messages import TO_RECEIVER, TO_SENDER, Connect
from .copier import Prepared
from .endpoints import Endpoints, Socket, SocketLimits
from .events import Answered, KvEvent, SocketLost
from .lines import Dialled, Sending, Waiting, sent
from .side import Side

_GREET_S = 1.0  # how often a further stream says again who it is: its connection may be new


class Dialler(Side[Dialled]):
    """``our_endpoint`` is where this worker listens: peers are reached by the same scheme."""

    def __init__(
        self,
        endpoints: Endpoints,
        our_endpoint: str,
        handshake: Handshake,
        limits: SocketLimits,
        num_streams: int,
    ) -> None:
        super().__init__(limits)
        self._endpoints = endpoints
        self._our_endpoint = our_endpoint
        self._handshake = handshake
        self._num_streams = num_streams
        self._dialled: dict[WorkerRef, list[Dialled]] = {}  # a peer's streams
        self._by_socket: dict[Socket, Dialled] = {}
        self._busy: dict[Dialled, None] = {}  # that ZeroMQ sends frames of, some closed since
        self._greetings: dict[WorkerRef, Connect] = {}

    def close(self) -> None:
        for socket in self._by_socket:
            socket.close(linger=0)

    def sockets(self) -> Iterator[tuple[Socket, int]]:
        """What to poll, and for what."""
        for socket, line in self._by_socket.items():
            wanted = bool(line.queue or self._is_awaited(line))
            yield socket, zmq.POLLIN | zmq.POLLOUT * wanted

    @property
    def busy(self) -> bool:
        """Whether ZeroMQ still reads frames: polling does not tell when it is done."""
        return bool(self._busy)

    def owns(self, socket: Socket) -> bool:
        return socket in self._by_socket

    def open(
        self, peer: PeerAddress, effect: Send | SendBlocks, now: float
    ) -> Dialled | list[KvEvent]:
        """The first stream to a peer; where its address is wrong, what comes of the effect."""
        if (lines := self._dialled.get(peer.ref)) is not None:
            return lines[0]
        line = self._open(peer, 0, now)
        if isinstance(line, str):
            return [*sent([effect]), SocketLost(peer.ref, line)]
        self._dialled[peer.ref] = [line]
        self._greetings[peer.ref] = self._handshake.connect(peer)
        return line

    def send_blocks(self, prepared: Prepared, now: float) -> list[KvEvent]:
        """On the stream that has the least to do."""
        lines = self._dialled.get(prepared.effect.peer.ref)
        if lines is None:
            return sent([prepared])  # given up while it was prepared
        if not prepared.frames:
            return self.queue(lines[0], prepared, now)
        line = min(lines, key=lambda line: len(line.queue) + len(line.sending))
        stale = line.connected_at is None or now - line.connected_at >= _GREET_S
        if line.stream > 0 and stale:
            line.connected_at = now
            greeting = replace(self._greetings[line.ref], stream=line.stream)
            events = self.queue(line, TO_RECEIVER.encode(greeting), now)
            if not self._known(line):
                return [*events, *sent([prepared])]
        return self.queue(line, prepared, now)

    def read(self, socket: Socket, now: float) -> Iterator[KvEvent]:
        """What a peer has answered."""
        dialled = self._by_socket[socket]
        for frames in self._read(socket):
            dialled.used_at = now
            if len(frames) != 1:
                self.drop(dialled, f"a message of {len(frames)} frames")
                continue
            try:
                message = TO_SENDER.decode(frames[0].buffer)
            except MalformedMessage as error:
                self.drop(dialled, str(error))
                continue
            yield Answered(dialled.ref, message)

    def flush(self, now: float) -> list[KvEvent]:
        self._dial_further(now)
        return [*self._sent_by_now(now), *super().flush(now)]

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
        socket = self._endpoints.dial(peer, self._our_endpoint)
        if isinstance(socket, str):
            return socket
        line = Dialled(ref=peer.ref, used_at=now, peer=peer, socket=socket, stream=stream)
        self._by_socket[socket] = line
        return line

    def _sent_by_now(self, now: float) -> list[KvEvent]:
        """The chunks whose frames ZeroMQ has let go of; notes who does not take them."""
        done: list[Prepared] = []
        for line in list(self._busy):
            while line.sending and line.sending[0].tracker.done:
                done.append(line.sending.popleft().prepared)
            if not line.sending:
                del self._busy[line]
            elif now - line.sending[0].since >= self._limits.stall_s and self._known(line):
                line.blocked_since = line.sending[0].since
        return sent(done)

    def _lines(self) -> Iterable[Dialled]:
        return self._by_socket.values()

    def _known(self, line: Dialled) -> bool:
        return self._by_socket.get(line.socket) is line

    def _idle(self, line: Dialled, now: float) -> bool:
        """A peer's further streams may be in use while one is not."""
        return all(now - one.used_at >= self._limits.idle_s for one in self._dialled[line.ref])

    def _why(self, line: Dialled) -> str:
        return (
            f" at {line.peer.endpoint}: unreachable, not reading, or it refuses this "
            "worker's key or token"
        )

    def _transmit(self, line: Dialled, waiting: Waiting, now: float) -> list[KvEvent]:
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

    def _forget(self, line: Dialled) -> list[KvEvent]:
        events: list[KvEvent] = []
        del self._greetings[line.ref]
        for dialled in self._dialled.pop(line.ref):
            events += sent(dialled.queue)
            del self._by_socket[dialled.socket]
            dialled.socket.close(linger=0)  # frames under way are let go of soon after
        return events
