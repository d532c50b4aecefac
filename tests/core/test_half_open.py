"""A connection whose network goes without a word is given up by the kernel, at both ends.

That it comes back when the network does: ``tests/deploy/test_network_cut.py``.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import zmq

from pdserve.core.half_open import SILENCE_S, notice_silence


def connections(port: int) -> list[socket.socket]:
    """This process's own ends of connections to or from a port of loopback."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            one = socket.socket(fileno=os.dup(int(path.name)))
        except OSError:  # no socket, or closed by now
            continue
        try:
            ports = {one.getsockname()[1], one.getpeername()[1]}
        except (OSError, IndexError, TypeError):  # not connected, or no TCP
            one.close()
            continue
        if port in ports:
            found.append(one)
        else:
            one.close()
    return found


def test_the_kernel_asks_and_gives_up_at_both_ends() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for end in (router, dealer):
        notice_silence(end)
        assert end.getsockopt(zmq.HEARTBEAT_IVL) == 0, "libzmq may abort by it"
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"here")
    assert router.poll(60_000)
    ends = connections(port)
    try:
        assert len(ends) == 2
        for end in ends:
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 1
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 1
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENCE_S * 1000
    finally:
        for end in ends:
            end.close()
        context.destroy(linger=0)
