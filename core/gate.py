"""Who may connect to the secured sockets of a ZeroMQ context: asked and answered by RFC 27 (ZAP).

ZeroMQ asks with the mechanism and what the peer shows: its public key (CURVE), or a name and
a password (PLAIN). Whoever shows the same as the members is let in.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import zmq

_ENDPOINT, _VERSION = "inproc://zeromq.zap.01", b"1.0"
_LIMIT_S = 30.0  # for the thread to come to its turn


@contextlib.contextmanager
def gate(
    context: zmq.Context[Any], domain: str, mechanism: bytes, shown: Sequence[bytes]
) -> Iterator[None]:
    """Lets those in who show this, on a thread of its own, until the block ends."""
    thread = _Gate(context, domain.encode(), mechanism, shown)
    thread.start()
    try:
        yield
    finally:
        thread.stop()


class _Gate(threading.Thread):
    """Nothing here waits but the poll, so ``stop`` is heard at any time, and its wait is bounded:
    a question may be withdrawn with its connection between the poll and the read. (The
    authenticator that comes with the library reads with calls that block, and whoever stops it
    waits for its thread without a limit.)
    """

    def __init__(
        self, context: zmq.Context[Any], domain: bytes, mechanism: bytes, shown: Sequence[bytes]
    ) -> None:
        super().__init__(name="gate", daemon=True)
        self._domain, self._mechanism, self._shown = domain, mechanism, tuple(shown)
        self._asked: zmq.Socket[Any] = context.socket(zmq.ROUTER, socket_class=zmq.Socket)
        self._end: zmq.Socket[Any] = context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._ended: zmq.Socket[Any] = context.socket(zmq.PAIR, socket_class=zmq.Socket)
        for socket in (self._asked, self._end, self._ended):
            socket.linger = 0
        self._asked.bind(_ENDPOINT)
        self._ended.bind(f"inproc://gate-{id(self)}")
        self._end.connect(f"inproc://gate-{id(self)}")

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._asked, zmq.POLLIN)
        poller.register(self._ended, zmq.POLLIN)
        while self._ended not in dict(poller.poll()):
            with contextlib.suppress(zmq.Again):
                question = self._asked.recv_multipart(zmq.NOBLOCK)
                self._asked.send_multipart(self._answer(question), zmq.NOBLOCK)

    def stop(self) -> None:
        with contextlib.suppress(zmq.Again):
            self._end.send(b"", zmq.NOBLOCK)
        self.join(_LIMIT_S)
        assert not self.is_alive(), "the gate hangs"
        for socket in (self._asked, self._end, self._ended):
            socket.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """``question``: whom to answer, then version, number, domain, address, identity, mechanism,
        and what that mechanism shows."""
        at = question.index(b"") + 1
        path, (version, number, domain, _, _, mechanism, *shown) = question[:at], question[at:]
        asked = (version, domain, mechanism, len(shown))
        member = asked == (_VERSION, self._domain, self._mechanism, len(self._shown)) and all(
            map(hmac.compare_digest, shown, self._shown)
        )
        code, text, user = (b"200", b"OK", b"member") if member else (b"400", b"no member", b"")
        return [*path, _VERSION, number, code, text, user, b""]
