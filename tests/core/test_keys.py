"""Who may join over tcp."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from pdserve.core.config import SecuritySection
from pdserve.core.errors import ConfigError
from pdserve.core.keys import (
    Keys,
    admit,
    load_keys,
    new_keys,
    require_safe_bind,
    secure_client,
    secure_server,
)

LIMIT_MS = 60_000  # a moment on an idle machine


def test_new_keys_load_again(tmp_path: Path) -> None:
    path = new_keys(tmp_path / "keys")
    assert path.stat().st_mode & 0o777 == 0o600
    keys = load_keys(tmp_path / "keys")
    assert zmq.curve_public(keys.secret) == keys.public
    assert keys.secret.decode() not in repr(keys)


def test_new_keys_never_overwrites(tmp_path: Path) -> None:
    before = new_keys(tmp_path).read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        new_keys(tmp_path)
    assert load_keys(tmp_path).secret == before.strip()


@pytest.mark.parametrize("text", [b"", b"short", b"x" * 40 + b"yz", b'"' * 40, b"\xff" * 40])
def test_a_damaged_key_is_a_sentence(tmp_path: Path, text: bytes) -> None:
    new_keys(tmp_path).write_bytes(text)
    with pytest.raises(ConfigError, match="holds no CURVE key"):
        load_keys(tmp_path)


def test_missing_and_open_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pdserve keys new"):
        load_keys(tmp_path)
    new_keys(tmp_path).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(tmp_path)


@pytest.mark.parametrize(
    "endpoint",
    ["ipc:///run/x.sock", "inproc://x", "tcp://127.0.0.1:0", "tcp://[::1]:1", "tcp://localhost:1"],
)
def test_local_binds_need_no_keys(endpoint: str) -> None:
    assert require_safe_bind(endpoint, SecuritySection()) is None


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://eth0:1", "tcp://10.0.0.1:1"]
)
def test_binds_that_others_reach_need_keys(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"security\.keys"):
        require_safe_bind(endpoint, SecuritySection())
    assert require_safe_bind(endpoint, SecuritySection(insecure=True)) is None
    new_keys(tmp_path)
    security = SecuritySection(keys=str(tmp_path), insecure=True)
    assert require_safe_bind(endpoint, security) == load_keys(tmp_path)


def _pair(tmp_path: Path, name: str) -> Keys:
    new_keys(tmp_path / name)
    return load_keys(tmp_path / name)


def _says(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    keys: Keys | None,
    server: Keys | None = None,
) -> zmq.Socket[bytes]:
    client = context.socket(zmq.DEALER)
    client.linger = 0
    if keys is not None:
        secure_client(client, keys)
        client.curve_serverkey = (server or keys).public
    client.connect(endpoint)
    client.send(b"hello")
    return client  # it lives as long as somebody has it


def test_only_members_are_heard(tmp_path: Path) -> None:
    keys, others = _pair(tmp_path, "a"), _pair(tmp_path, "b")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with admit(context, keys):
            server = context.socket(zmq.ROUTER)
            server.linger = 0
            secure_server(server, keys)
            port = server.bind_to_random_port("tcp://127.0.0.1")
            endpoint = f"tcp://127.0.0.1:{port}"
            strangers = [
                _says(context, endpoint, None),
                _says(context, endpoint, others),
                _says(context, endpoint, others, server=keys),
            ]
            assert not server.poll(400)
            member = _says(context, endpoint, keys)
            assert server.poll(LIMIT_MS)
            assert server.recv_multipart()[1] == b"hello"
            assert not server.poll(100)
            assert not any(client.closed for client in (*strangers, member))
    finally:
        context.destroy(linger=0)


def test_a_question_that_is_withdrawn_does_not_hold_the_gate(tmp_path: Path) -> None:
    """Whoever asks may be gone before it is read. The gate answers the next one, and ends."""
    keys = _pair(tmp_path, "a")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def ask(*frames: bytes) -> zmq.Socket[bytes]:
        asking = context.socket(zmq.DEALER)
        asking.linger = 0
        asking.connect("inproc://zeromq.zap.01")
        asking.send_multipart([b"", *frames])
        return asking

    member = [b"1.0", b"7", b"pdserve", b"127.0.0.1", b"", b"CURVE", z85.decode(keys.public)]
    try:
        with admit(context, keys):
            for _ in range(100):
                ask(*member).close(linger=0)
            others = [
                [b"2.0", *member[1:]],
                [*member[:2], b"another", *member[3:]],
                [*member[:5], b"NULL"],
                [*member[:6], bytes(32)],
                [*member, b"more"],
            ]
            for question, code in [(member, b"200"), *((other, b"400") for other in others)]:
                asking = ask(*question)
                assert asking.poll(LIMIT_MS)
                assert asking.recv_multipart()[1:4] == [b"1.0", b"7", code]
                asking.close()
    finally:
        context.destroy(linger=0)


def test_without_a_gate_nobody_gets_in(tmp_path: Path) -> None:
    keys = _pair(tmp_path, "a")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        server = context.socket(zmq.ROUTER)
        secure_server(server, keys)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client = _says(context, f"tcp://127.0.0.1:{port}", keys)
        assert not server.poll(400)
        assert not client.closed
    finally:
        context.destroy(linger=0)
