"""Real processes, no model: the router dies and comes back, the supervisor dies and does not."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from footprint import children, processes_of, shared_files
from served import STOP_LIMIT_S, Server, deployment, ready_url, serve, start

LIMIT_S = 90.0

FILE = """
model: {path: tiny, load: dummy, max_context: 512}
engine: simulated
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 1, device: cpu}
simulation: {step_ms: 100}  # an answer of 400 tokens takes 40 s
router: {policy: disaggregated}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Pytest's own are too deep for the path of a unix socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@dataclass(frozen=True)
class Streamed:
    """A stream that has begun."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    @staticmethod
    def opened(server: Server, max_tokens: int = 400) -> Streamed:
        where = urlsplit(server.url)
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=LIMIT_S)
        body = {"model": "tiny", "prompt": "Why?", "max_tokens": max_tokens, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200
        assert response.read1(1)
        return Streamed(connection, response)

    def whole(self) -> bool:
        """Reads the rest: whether it ended as an answer does."""
        got = b""
        with contextlib.closing(self.connection):
            try:
                while part := self.response.read1(1 << 16):
                    got += part
            except (http.client.IncompleteRead, ConnectionResetError):
                return False
        return b"data: [DONE]" in got


def router_pid(folder: Path) -> int:
    (written,) = folder.glob("pdserve/*/http.json")
    return int(json.loads(written.read_text())["pid"])


def test_a_router_that_is_killed_comes_back_to_the_same_workers(folder: Path) -> None:
    """Streams are cut, never ended as if they were whole; what they held is given back."""
    with serve(deployment(folder, FILE), env={"XDG_RUNTIME_DIR": str(folder)}) as server:
        workers = {name: worker["pid"] for name, worker in server.workers().items()}
        stream = Streamed.opened(server)
        server.wait_for("it is answered", lambda: any(server.held().values()), LIMIT_S)
        os.kill(router_pid(folder), signal.SIGKILL)
        assert not stream.whole()

        def back() -> bool:
            with contextlib.suppress(OSError):
                found = server.workers()
                return {name: found[name]["pid"] for name in found} == workers
            return False

        server.wait_for("the workers have joined again", back, LIMIT_S)
        server.at_rest(LIMIT_S)
        assert Streamed.opened(server, max_tokens=3).whole()


def test_nothing_outlives_a_supervisor_that_is_killed(folder: Path) -> None:
    """Its children end with it, and the next start removes their files."""
    file = deployment(folder, FILE)
    process = start(file, env={"XDG_RUNTIME_DIR": str(folder)})
    try:
        server = Server(process, ready_url(process))
        Streamed.opened(server).connection.close()
        shared = shared_files(children(process.pid))
        assert len(shared) == 2
        (left,) = (path for path in (folder / "pdserve").iterdir() if path.is_dir())
    finally:
        process.kill()
        process.wait(STOP_LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()
    with serve(file, env={"XDG_RUNTIME_DIR": str(folder)}) as following:
        following.wait_for("no process is left", lambda: not processes_of(left), LIMIT_S)
        assert not left.exists()
        assert not [path for path in shared if path.exists()]
    assert not processes_of(folder)
