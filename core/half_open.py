"""ZeroMQ connections that end when the network between their ends does.

A network that loses every packet says nothing to either end: without a word of their own they
wait for TCP, whose next attempt is as far away as the cut was long, and which never asks
where nothing is to be sent. So ends ask each other once a second, an end that hears nothing
hangs up, and dialling, too, is begun anew before TCP's pauses grow.
"""

from __future__ import annotations

from typing import Any

import zmq

HEARTBEAT_S = 1.0
SILENCE_S = 5.0  # of a peer, until it is taken for gone
_DIAL_S = 2.0  # one attempt, and the longest pause between two
_FIRST_PAUSE_S = 0.1


def notice_silence(
    socket: zmq.Socket[Any], heartbeat_s: float = HEARTBEAT_S, silence_s: float = SILENCE_S
) -> None:
    """Before it is bound or connected."""
    for option, seconds in (
        (zmq.HEARTBEAT_IVL, heartbeat_s),
        (zmq.HEARTBEAT_TIMEOUT, silence_s),
        (zmq.HEARTBEAT_TTL, silence_s),
        (zmq.HANDSHAKE_IVL, silence_s),
        (zmq.CONNECT_TIMEOUT, _DIAL_S),
        (zmq.RECONNECT_IVL, _FIRST_PAUSE_S),
        (zmq.RECONNECT_IVL_MAX, _DIAL_S),
    ):
        socket.setsockopt(option, int(seconds * 1000))
