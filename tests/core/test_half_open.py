"""A connection whose network has gone without a word: both ends notice, and one dials anew."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from pdserve.core.half_open import notice_silence

LIMIT_S = 60.0


class Proxy:
    """Passes bytes on. What is connected when it is ``cut`` stays so, and nothing passes any
    more; later connections are fine."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[socket.socket, socket.socket] = {}
        self._mute: set[socket.socket] = set()
        self.num_hung_up = 0  # ends of muted connections, by whoever was at them
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        with self._lock:
            self._mute.update(self._peers)

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        for one in (self._listener, *self._peers):
            one.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    self._on(key.fileobj)  # type: ignore[arg-type]

    def _on(self, readable: socket.socket) -> None:
        if readable is self._listener:
            near = self._listener.accept()[0]
            try:
                far = socket.create_connection(self._target)
            except OSError:  # the end of the test: nobody listens any more
                near.close()
                return
            self._peers |= {near: far, far: near}
            for one in (near, far):
                self._selector.register(one, selectors.EVENT_READ)
            return
        if readable not in self._peers:
            return  # closed with its other end, in this very round
        try:
            data = readable.recv(1 << 16)
        except ConnectionError:
            data = b""
        if readable in self._mute:
            if not data:  # the other end is not told
                self._selector.unregister(readable)
                self.num_hung_up += 1
            return
        other = self._peers[readable]
        try:
            other.sendall(data)
        except OSError:
            data = b""
        if not data:
            for one in (readable, other):
                self._selector.unregister(one)
                del self._peers[one]
                one.close()


@pytest.fixture
def ends() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes], Proxy]]:
    """Who listens, who has dialled, and what is between them."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    dealer.setsockopt(zmq.ROUTING_ID, b"worker")
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    for end in (router, dealer):
        notice_silence(end, heartbeat_s=0.1, silence_s=0.5)
    proxy = Proxy(("127.0.0.1", router.bind_to_random_port("tcp://127.0.0.1")))
    dealer.connect(f"tcp://127.0.0.1:{proxy.port}")
    yield router, dealer, proxy
    context.destroy(linger=0)
    proxy.close()


def say(dealer: zmq.Socket[bytes], router: zmq.Socket[bytes], text: bytes) -> None:
    """Until it is heard: what is said into a connection that breaks is lost with it."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        if dealer.poll(0, zmq.POLLOUT):
            dealer.send(text)
        while router.poll(100):
            if router.recv_multipart() == [b"worker", text]:
                return
    raise AssertionError("silence")


def test_both_ends_hang_up_and_one_dials_anew(
    ends: tuple[zmq.Socket[bytes], zmq.Socket[bytes], Proxy],
) -> None:
    router, dealer, proxy = ends
    say(dealer, router, b"before")
    proxy.cut()
    limit = time.monotonic() + LIMIT_S
    while proxy.num_hung_up < 2:
        assert time.monotonic() < limit, "an end believes in a connection that is none"
        time.sleep(0.01)
    say(dealer, router, b"after")
