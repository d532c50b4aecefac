"""JSON over HTTP, and whatever else may answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from pdserve.deploy.fetch import Unreachable, get_json

Answering = Callable[[bytes], str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """A server that answers one connection with these bytes; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = []

        def answer(data: bytes) -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(data)

        def start(data: bytes) -> str:
            threads.append(threading.Thread(target=answer, args=(data,)))
            threads[-1].start()
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield start
        for thread in threads:
            thread.join()


def test_a_document(answering: Answering) -> None:
    url = answering(b'HTTP/1.1 503 No\r\nContent-Length: 12\r\n\r\n{"ready": 0}')
    assert get_json(f"{url}/ready", 5.0) == (503, {"ready": 0})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "its answer is not JSON"),
        (b"SSH-2.0-OpenSSH\r\n", "no answer from"),
        (b"", "no answer from"),
    ],
)
def test_something_else_answers(answering: Answering, data: bytes, sentence: str) -> None:
    with pytest.raises(Unreachable, match=sentence):
        get_json(answering(data), 5.0)


def test_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/cluster"
        with pytest.raises(Unreachable, match=f"no answer from {url}: .*refused"):
            get_json(url, 5.0)


def test_the_wait_is_bounded() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(Unreachable, match="timed out"),
    ):
        get_json(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://x", "http://", "http://x:y"])
def test_no_address_of_ours(url: str) -> None:
    with pytest.raises(Unreachable):
        get_json(url, 1.0)
