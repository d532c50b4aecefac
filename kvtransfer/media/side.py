"""What the two sides of the sockets have in common: bounded queues, and who takes nothing."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import zmq

from .endpoints import Socket, SocketLimits
from .events import KvEvent, SocketLost
from .lines import Line, Waiting, sent

log = logging.getLogger(__name__)

AnyLine = TypeVar("AnyLine", bound=Line)


class Side(ABC, Generic[AnyLine]):
    """Connections of one kind. What a socket can't take now waits in its line's queue."""

    def __init__(self, limits: SocketLimits) -> None:
        self._limits = limits
        self.num_dropped = 0

    @abstractmethod
    def _lines(self) -> Iterable[AnyLine]: ...

    @abstractmethod
    def _known(self, line: AnyLine) -> bool:
        """Whether it is still in use."""

    @abstractmethod
    def _idle(self, line: AnyLine, now: float) -> bool:
        """Whether nothing else of the peer's is in use, where this line is not."""

    @abstractmethod
    def _transmit(self, line: AnyLine, waiting: Waiting, now: float) -> list[KvEvent]:
        """Raises zmq.Again where the socket takes nothing now; a message goes whole or not."""

    @abstractmethod
    def _forget(self, line: AnyLine) -> list[KvEvent]:
        """Closes the connections to a peer; what waited for them is not sent."""

    def _why(self, line: AnyLine) -> str:
        """What may be wrong with a peer that takes nothing."""
        return ""

    def queue(self, line: AnyLine, waiting: Waiting, now: float) -> list[KvEvent]:
        """Sends it now if the socket takes it, else when it does (``flush``)."""
        if len(line.queue) >= self._limits.max_queue:
            self.num_dropped += 1
            return sent([waiting])
        line.queue.append(waiting)
        return self._drain(line, now) if len(line.queue) == 1 else []

    def flush(self, now: float) -> list[KvEvent]:
        """Sends what waited; gives up peers that take nothing; closes what is idle."""
        events: list[KvEvent] = []
        for line in list(self._lines()):
            if self._known(line) and line.queue:
                events += self._drain(line, now)
            if not self._known(line):
                continue  # its peer was given up, here or on another of its streams
            if line.blocked_since is not None:
                if now - line.blocked_since >= self._limits.stall_s:
                    events += self._give_up(line)
            elif now - line.used_at >= self._limits.idle_s and self._idle(line, now):
                events += self._forget(line)
        return events

    def drop(self, line: Line | None, what: str) -> None:
        """Counts it, and logs the first of each peer."""
        self.num_dropped += 1
        if line is not None and not line.warned:
            line.warned = True
            log.warning("dropped from %s: %s", line.ref, what)

    def _read(self, socket: Socket) -> Iterator[list[zmq.Frame]]:
        for _ in range(self._limits.max_reads):
            try:
                yield socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return

    def _give_up(self, line: AnyLine) -> list[KvEvent]:
        text = f"{line.ref} took nothing for {self._limits.stall_s:g} s{self._why(line)}"
        log.warning("%s", text)
        return [*self._forget(line), SocketLost(line.ref, text)]

    def _drain(self, line: AnyLine, now: float) -> list[KvEvent]:
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
