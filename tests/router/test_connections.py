"""Connections that cost and bring nothing: each is ended, and no other client notices."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import trustme
from fake_worker import text_of
from router_net import MODEL, Router, deployment, run, split, until

from pdserve.core.errors import ConfigError
from pdserve.core.tls import tls_context
from pdserve.deploy import fetch
from pdserve.router.connections import Connection

PLAIN = "/v1/completions"


async def connect(up: Router) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    at = urlsplit(up.url)
    return await asyncio.open_connection(at.hostname, at.port)


async def works(up: Router) -> None:
    status, answer = await up.complete(max_tokens=3)
    assert (status, answer["choices"][0]["text"]) == (200, text_of(tuple(b"hello"), 3))


def test_a_head_that_comes_a_byte_at_a_time() -> None:
    async def main() -> None:
        async with split(router={"header_timeout_s": 0.3}) as (up, _, _):
            reader, writer = await connect(up)
            answer = asyncio.create_task(reader.read())
            for byte in b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1000:
                if answer.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
            assert (await answer).startswith(b"HTTP/1.1 408 ")
            assert b"header_timeout" in answer.result()
            writer.close()
            await works(up)

    run(main())


def test_a_connection_that_asks_again_is_not_late() -> None:
    async def main() -> None:
        async with split(router={"header_timeout_s": 0.3}) as (up, _, decode):
            reader, writer = await connect(up)
            for _ in range(3):
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
                await asyncio.sleep(0.2)
            # Nor is one whose answer takes longer than a head may.
            decode.hold_tokens = True
            body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
            head = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await asyncio.sleep(0.5)
            decode.release()
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(main())


def test_an_idle_connection_is_closed() -> None:
    async def main() -> None:
        async with split(router={"idle_timeout_s": 0.3}) as (up, _, _):
            silent, one = await connect(up)
            used, two = await connect(up)
            two.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(silent.read(), 5.0) == b""
            assert (await asyncio.wait_for(used.read(), 5.0)).startswith(b"HTTP/1.1 200 ")
            for writer in (one, two):
                writer.close()
            await works(up)

    run(main())


def test_a_body_that_does_not_come() -> None:
    async def main() -> None:
        async with split(router={"body_timeout_s": 0.3}) as (up, _, _):
            reader, writer = await connect(up)
            writer.write(
                f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode()
            )
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            writer.close()
            await works(up)

    run(main())


def test_too_many_connections() -> None:
    async def main() -> None:
        async with split(router={"max_connections": 3}) as (up, _, _):
            await works(up)  # whose connection stays
            held = [await connect(up) for _ in range(2)]
            for _, writer in held:
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            for reader, _ in held:
                await reader.readline()
            reader, writer = await connect(up)
            refused = await reader.read()
            assert refused.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in refused
            writer.close()
            await works(up)
            for _, held_writer in held:
                held_writer.close()
                await held_writer.wait_closed()
            await asyncio.sleep(0.1)
            reader, writer = await connect(up)  # there is room again
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not_read_is_cut(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_small_buffer(self: Connection, transport: asyncio.BaseTransport) -> None:
        """Or the kernel would take it all from us."""
        taken = transport.get_extra_info("socket")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        connection_made(self, transport)

    connection_made = Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", with_a_small_buffer)

    async def main() -> None:
        async with split(router={"write_timeout_s": 0.5}) as (up, _, _):
            body = {
                "model": MODEL,
                "prompt": ["x"] * 3,
                "n": 8,
                "max_tokens": 200,
                "logprobs": 5,
                "stream": stream,
            }
            data = json.dumps(body).encode()
            at = urlsplit(up.url)
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(slow, (at.hostname, at.port))
                head = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
                await loop.sock_sendall(slow, head.encode() + data)
                await until(lambda: up.service.dispatch.num_requests == 24)
                got = await loop.sock_recv(slow, 100)
                assert got.startswith(b"HTTP/1.1 200 ")
                await works(up)  # beside it
                await until(lambda: up.service._num_in_house == 0)
                assert up.service.dispatch.num_requests == 0
                while more := await loop.sock_recv(slow, 1 << 20):
                    got += more
                assert b"[DONE]" not in got and not got.endswith(b"}")
            await works(up)

    run(main())


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("localhost", "127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for part in made.cert_chain_pems:
        part.write_to_path(cert, append=True)
    made.private_key_pem.write_to_path(key)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    async def main() -> None:
        security = {"tls_cert": str(cert), "tls_key": str(key)}
        async with split(security=security) as (up, _, _):
            url = up.url.replace("http://", "https://")
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 3}
            async with aiohttp.ClientSession(url) as client:
                async with client.post(PLAIN, json=body, ssl=trust) as response:
                    assert (await response.json())["choices"][0]["text"] == text_of(
                        tuple(b"hello"), 3
                    )
                with pytest.raises(aiohttp.ClientConnectionError):
                    await client.get("/health")  # which does not trust it
            with pytest.raises(aiohttp.ClientError):
                await up.get("/health")  # which speaks no TLS
            # A command of the user whose router it is finds the certificate in the run folder.
            monkeypatch.setattr(fetch, "base_folder", lambda: up.run_dir.parent)
            assert (await asyncio.to_thread(fetch.get_json, f"{url}/health", 5.0))[0] == 200
            monkeypatch.setattr(fetch, "base_folder", lambda: tmp_path)
            with pytest.raises(fetch.Unreachable):
                await asyncio.to_thread(fetch.get_json, f"{url}/health", 5.0)

    run(main())


def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    for name in ("missing.pem", "empty.pem"):
        path = tmp_path / name
        if name == "empty.pem":
            path.touch()
        security = deployment(security={"tls_cert": str(path), "tls_key": str(path)}).security
        with pytest.raises(ConfigError, match=r"security\.tls_cert"):
            tls_context(security)
