"""Where a worker listens for KV blocks: as near as its peers allow."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from ..core.errors import StartupError

_LOOPBACK = "127.0.0.1"
_WILDCARDS = ("0.0.0.0", "::", "*", "")
_SOMEWHERE_ELSE = "192.0.2.1"  # an address of no host (RFC 5737): what leads out leads there


def kv_endpoint(host: str, join: str, control: str | None) -> str:
    """``tcp://ADDRESS:0``. ``host`` is ``kv_transfer.host`` of the file.

    With ``auto`` it is loopback, unless workers of other hosts may join: then the address of
    this host that the router's is reached from, since where the router is, peers are.
    """
    if host != "auto":
        return _endpoint(host)
    if not join.startswith("tcp://"):
        if control is None:
            return _endpoint(_LOOPBACK)
        join = control
    target = urlsplit(join).hostname or ""
    return _endpoint(_address_towards(_SOMEWHERE_ELSE if target in _WILDCARDS else target))


def _endpoint(host: str) -> str:
    return f"tcp://[{host}]:0" if ":" in host else f"tcp://{host}:0"


def _address_towards(host: str) -> str:
    """This host's own address on the way to ``host``. Nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StartupError(
            f"no way from here to {host} ({error.strerror}); "
            "give this host's address as kv_transfer.host"
        ) from error
