"""CURVE keys: who may join a deployment over tcp.

A deployment has one pair of keys, in a folder that each of its hosts holds a copy of
(``pdserve keys new FOLDER``). Every tcp socket off loopback is encrypted with it, and takes
only peers that show it: holding the folder is being a member.

``load_keys`` -> ``admit`` once a ZeroMQ context -> ``secure_server`` / ``secure_client`` on
each socket before it binds or connects.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from .config import SecuritySection
from .errors import ConfigError
from .files import reason
from .gate import gate

_FILE = "deployment.secret"
_DOMAIN = "pdserve"


@dataclass(frozen=True, slots=True)
class Keys:
    """A CURVE pair, each of 40 Z85 characters."""

    public: bytes
    secret: bytes = field(repr=False)


def new_keys(folder: Path) -> Path:
    """Draws a pair into ``folder`` and returns the file; ConfigError where it can't or has one."""
    _, secret = zmq.curve_keypair()
    path = folder / _FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(secret + b"\n")
    except FileExistsError:
        raise ConfigError(f"{path} exists; give another folder, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    return path


def load_keys(folder: Path) -> Keys:
    """Reads what ``new_keys`` made; ConfigError where it is missing, damaged or not private."""
    path = folder / _FILE
    try:
        secret = path.read_bytes().strip()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"security.keys: {path}: {reason(error)}; make keys with: pdserve keys new {folder}"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"security.keys: {path} is open to other users; run: chmod 600 {path}")
    try:
        if len(z85.decode(secret)) != 32:
            raise ValueError
        return Keys(zmq.curve_public(secret), secret)
    except (ValueError, KeyError, zmq.ZMQError):
        raise ConfigError(f"security.keys: {path} holds no CURVE key") from None


def require_safe_bind(endpoint: str, security: SecuritySection) -> Keys | None:
    """The keys to bind ``endpoint`` with; None where it needs none, or may go without.

    Unix and in-process sockets and loopback need none. Raises ConfigError for a tcp address
    that other hosts can reach, without ``security.keys`` and without ``security.insecure``.
    """
    if _is_local(endpoint):
        return None
    if security.keys is not None:
        return load_keys(Path(security.keys))
    if security.insecure:
        return None
    raise ConfigError(
        f"{endpoint} can be reached from other hosts; give security.keys (made with "
        "`pdserve keys new FOLDER`), or security.insecure: true on a network you trust"
    )


def secure_server(socket: zmq.Socket[Any], keys: Keys) -> None:
    """The socket takes members only. Its context must be under ``admit``: nobody gets in else."""
    socket.curve_server = True
    socket.curve_secretkey = keys.secret
    socket.zap_domain = _DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[Any], keys: Keys) -> None:
    """The socket talks to members only."""
    socket.curve_serverkey = keys.public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret


@contextlib.contextmanager
def admit(context: zmq.Context[Any], keys: Keys) -> Iterator[None]:
    """Answers, on a thread of its own, who may join the secured sockets of ``context``."""
    with gate(context, _DOMAIN, b"CURVE", [z85.decode(keys.public)]):
        yield


def _is_local(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    return is_loopback(host)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, an interface, or *
        return False
