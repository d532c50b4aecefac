"""Clients that hang up and workers that die: nothing is lost, nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from served import SPLIT, Server, deployment, serve
from texts import prose

RELEASE_LIMIT_S = 2.0


@pytest.mark.parametrize(
    ("num_words", "after_s"),
    [(1400, 0.02), (1400, 0.4), (1400, 1.0), (300, 0.3), (300, 0.8), (5, 0.3)],
    ids=["waiting", "computing", "computing-later", "receiving", "running", "running-short"],
)
def test_a_client_that_hangs_up_frees_its_blocks(
    server: Server, num_words: int, after_s: float
) -> None:
    server.at_rest()
    before = server.held()
    end = threading.Event()

    def cut() -> None:
        where = urlsplit(server.url)
        body = json.dumps(
            {
                "model": "smollm2",
                "prompt": f"{time.monotonic()} {prose(num_words, seed=num_words)}",
                "max_tokens": 400,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        with socket.create_connection((str(where.hostname), where.port), 10) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            end.wait(after_s)

    cut()
    server.wait_for("blocks are back", lambda: server.held() == before, RELEASE_LIMIT_S)
    server.at_rest(RELEASE_LIMIT_S)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with serve(deployment(tmp_path, SPLIT)) as running:
        yield running


def test_a_killed_worker_comes_back_and_no_client_hangs(own_server: Server) -> None:
    """Either worker in mid-answer: the stream goes on, or ends in an error event."""
    with openai.OpenAI(base_url=f"{own_server.url}/v1", api_key="none", max_retries=0) as client:

        def ask(max_tokens: int, victim: str | None) -> str:
            stream = client.completions.create(
                model="smollm2",
                prompt=prose(40, seed=1),
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                timeout=90,
                extra_body={"ignore_eos": True},
            )
            text = ""
            for number, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if number == 5 and victim is not None:
                    os.kill(own_server.workers()[victim]["pid"], signal.SIGKILL)
            return text

        undisturbed = ask(64, None)
        for victim in ("decode-0", "prefill-0"):
            epoch = own_server.workers()[victim]["epoch"]
            try:
                assert ask(64, victim) == undisturbed
            except openai.APIError as error:
                assert "worker" in str(error)
            own_server.wait_for(
                f"{victim} is back",
                lambda name=victim, old=epoch: (
                    own_server.workers().get(name, {"epoch": old})["epoch"] != old
                ),
                60,
            )
            assert ask(8, None) == undisturbed[: len(ask(8, None))]
        own_server.at_rest()
