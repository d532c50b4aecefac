"""ZeroMQ sockets as the KV layer wants them: bounded, guarded, given up where the network is gone.

Who gets in: with CURVE keys only members of the deployment; without them (loopback) only
those who show the worker's token in ZeroMQ's own handshake. Nobody else gets a byte as
far as this process's queues, which no later check could take back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TypeAlias

import zmq

from ...core.codec import MAX_MESSAGE_BYTES
from ...core.errors import ConfigError
from ...core.gate import gate
from ...core.half_open import notice_silence
from ...core.keys import Keys, admit, secure_client, secure_server
from ...core.messages import PeerAddress

Socket: TypeAlias = zmq.Socket[bytes]
Context: TypeAlias = zmq.Context[Socket]

_DOMAIN = "pdserve-kv"
_USER = "peer"


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """Times in seconds, lengths in messages. ZeroMQ counts a chunk with its frames as one."""

    high_water: int = 64  # in each of ZeroMQ's own queues
    max_queue: int = 4096  # waiting here for one peer; more are dropped (all are said again)
    max_reads: int = 64  # of one socket, before the others have their turn
    stall_s: float = 5.0
    idle_s: float = 60.0


class Endpoints:
    """Opens sockets of one context; ``close`` comes after that of all of them.

    ``token`` is what peers without keys must show. A ``context`` given is left open.
    """

    def __init__(
        self,
        token: str,
        block_bytes: int,
        keys: Keys | None,
        limits: SocketLimits,
        context: Context | None,
        num_streams: int = 1,
    ) -> None:
        self._token = token
        self._frame_bytes = max(MAX_MESSAGE_BYTES, block_bytes)
        self._keys = keys
        self._limits = limits
        self._resources = contextlib.ExitStack()
        self._context: Context = context or zmq.Context(io_threads=num_streams)
        if context is None:
            self._resources.callback(self._context.term)

    @property
    def public_key(self) -> str:
        return self._keys.public.decode() if self._keys is not None else ""

    def close(self) -> None:
        self._resources.close()

    def listen(self, endpoint: str) -> Socket:
        """A bound ROUTER; ConfigError where that can't be."""
        router = self._socket(zmq.ROUTER, endpoint)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if _scheme(endpoint) == "tcp":
                self._guard(router)
            router.bind(endpoint)
            bound = router.get_string(zmq.LAST_ENDPOINT)
            if "://0.0.0.0:" in bound or "://[::]:" in bound:
                raise ConfigError(f"{endpoint}: give the address by which peers reach this host")
        except zmq.ZMQError as error:
            router.close(linger=0)
            raise ConfigError(f"can't bind {endpoint}: {error.strerror}") from error
        except ConfigError:
            router.close(linger=0)
            raise
        return router

    def dial(self, peer: PeerAddress, our_endpoint: str) -> Socket | str:
        """A connecting DEALER, or what is wrong with the address."""
        scheme = _scheme(our_endpoint)
        if _scheme(peer.endpoint) != scheme:
            return f"{peer.ref} listens at {peer.endpoint}, which is not reached by {scheme}"
        if peer.public_key != self.public_key:
            return f"{peer.ref} and this worker do not have the same security.keys"
        dealer = self._socket(zmq.DEALER, peer.endpoint)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a peer that is not there
        if self._keys is not None:
            secure_client(dealer, self._keys)
        elif scheme == "tcp":
            dealer.plain_username = _USER.encode()
            dealer.plain_password = peer.token.encode()
        try:
            dealer.connect(peer.endpoint)
        except zmq.ZMQError as error:
            dealer.close(linger=0)
            return f"{peer.ref}: can't connect to {peer.endpoint}: {error.strerror}"
        return dealer

    def _guard(self, router: Socket) -> None:
        if self._keys is not None:
            self._resources.enter_context(admit(self._context, self._keys))
            secure_server(router, self._keys)
            return
        member = [_USER.encode(), self._token.encode()]
        self._resources.enter_context(gate(self._context, _DOMAIN, b"PLAIN", member))
        router.plain_server = True
        router.zap_domain = _DOMAIN.encode()
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _socket(self, kind: int, endpoint: str) -> Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = self._limits.high_water
        socket.setsockopt(zmq.MAXMSGSIZE, self._frame_bytes)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        notice_silence(socket)
        return socket


def _scheme(endpoint: str) -> str:
    return endpoint.partition("://")[0]
