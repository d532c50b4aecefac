"""ZeroMQ connections that end when the network between their ends does.

A network that loses every packet says nothing to either end: without a word of their own they
wait for TCP, whose next attempt is as far away as the cut was long, and which never asks
where nothing is to be sent. So TCP asks once a second, ends a connection whose other end has
acknowledged nothing for five, and dialling, too, is begun anew before TCP's pauses grow.

It is TCP that asks and not ZeroMQ's own heartbeat: where a connection breaks whose messages nobody
takes just now, libzmq 4.3.5 sends its next heartbeat into what is broken, and aborts the process
(``Assertion failed: !_io_error``, zeromq/libzmq#4364).
"""

from __future__ import annotations

from typing import Any

import zmq

SILENCE_S = 5  # of a peer, until it is taken for gone
_ASK_S = 1
_DIAL_S = 2.0  # one attempt, and the longest pause between two
_FIRST_PAUSE_S = 0.1


def notice_silence(socket: zmq.Socket[Any]) -> None:
    """Before it is bound or connected. What is no TCP connection is left as it is."""
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, _ASK_S),
        (zmq.TCP_KEEPALIVE_INTVL, _ASK_S),
        (zmq.TCP_KEEPALIVE_CNT, SILENCE_S // _ASK_S),
        (zmq.TCP_MAXRT, SILENCE_S * 1000),
        (zmq.HANDSHAKE_IVL, SILENCE_S * 1000),
        (zmq.CONNECT_TIMEOUT, int(_DIAL_S * 1000)),
        (zmq.RECONNECT_IVL, int(_FIRST_PAUSE_S * 1000)),
        (zmq.RECONNECT_IVL_MAX, int(_DIAL_S * 1000)),
    ):
        socket.setsockopt(option, value)
