"""Clients that hang up and workers that die: nothing is lost, nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai
import pytest
from served import SPLIT, Server, deployment, serve
from texts import prose

from pdserve.core.ids import Role
from pdserve.deploy.scale import scale

RELEASE_LIMIT_S = 2.0
STOPPED_S = 20.0


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


Disturb = Callable[[], None]
ADAPTIVE = SPLIT.replace("disaggregated", "adaptive")
PROMPT = prose(40, seed=1)
LONG = prose(900, seed=2)


@dataclass
class Own:
    """A deployment that may be harmed, and what it answers when nothing happens."""

    server: Server
    client: openai.OpenAI
    undisturbed: dict[tuple[str, int], str] = field(default_factory=dict)

    def ask(
        self, prompt: str, max_tokens: int, route: str | None, disturb: Disturb | None = None
    ) -> str:
        """The text of a stream that is disturbed after its fifth token."""
        body = {"ignore_eos": True} | ({"route": route} if route else {})
        stream = self.client.completions.create(
            model="smollm2",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            timeout=120,
            extra_body=body,
        )
        text = ""
        for number, chunk in enumerate(stream):
            text += chunk.choices[0].text
            if number == 5 and disturb is not None:
                disturb()
        return text

    def expected(self, prompt: str, max_tokens: int) -> str:
        if (prompt, max_tokens) not in self.undisturbed:
            text = self.ask(prompt, max_tokens, "disaggregated")
            self.undisturbed[prompt, max_tokens] = text
        return self.undisturbed[prompt, max_tokens]

    def signal(self, number: signal.Signals, *workers: str) -> None:
        pids = {name: worker["pid"] for name, worker in self.server.workers().items()}
        for worker in workers:
            os.kill(pids[worker], number)

    def epochs(self) -> dict[str, int]:
        return {name: worker["epoch"] for name, worker in self.server.workers().items()}

    def rest(self, before: dict[str, int], *workers: str) -> None:
        """These workers are back as others, and no block is held anywhere."""
        self.server.wait_for(
            f"{workers} are back",
            lambda: all(
                worker["state"] == "ready" and (worker["epoch"] != before[name])
                for name, worker in self.server.workers().items()
                if name in workers
            ),
            60,
        )
        self.server.at_rest()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    with (
        serve(deployment(tmp_path_factory.mktemp("own"), ADAPTIVE)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Own(server, client)


@pytest.mark.parametrize(
    "victims", [("decode-0",), ("prefill-0", "decode-0")], ids=["decode", "both"]
)
def test_workers_killed_in_mid_stream_cost_a_pause(own: Own, victims: tuple[str, ...]) -> None:
    expected, epochs = own.expected(PROMPT, 64), own.epochs()
    text = own.ask(PROMPT, 64, "disaggregated", lambda: own.signal(signal.SIGKILL, *victims))
    assert text == expected
    own.rest(epochs, *victims)


def test_a_prefill_worker_killed_in_mid_prompt_costs_a_pause(own: Own) -> None:
    epochs = own.epochs()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(own.ask, LONG, 8, "disaggregated")
        own.server.wait_for(
            "the prompt is computed", lambda: own.server.get("/live")["stages"]["prefill"], 20
        )
        own.signal(signal.SIGKILL, "prefill-0")
        text = asked.result()
    assert text == own.expected(LONG, 8)
    own.rest(epochs, "prefill-0")


def test_a_stopped_worker_is_left_for_another_and_comes_back(own: Own) -> None:
    expected, epochs = own.expected(PROMPT, 64), own.epochs()
    own.server.at_rest()
    stopped: list[str] = []
    begun = time.monotonic()

    def stop() -> None:
        def found() -> bool:  # its beat is up to half a second late
            workers = own.server.workers()
            stopped.extend(name for name, worker in workers.items() if worker["running"])
            return bool(stopped)

        own.server.wait_for("a worker writes the answer", found, 5.0)
        own.signal(signal.SIGSTOP, *stopped)

    try:
        assert own.ask(PROMPT, 64, None, stop) == expected
        # the answer is here, and the worker is still stopped
        time.sleep(max(0.0, begun + STOPPED_S - time.monotonic()))
    finally:
        own.signal(signal.SIGCONT, *stopped)
    assert len(stopped) == 1
    own.rest(epochs, *stopped)


def test_roles_change_under_load(own: Own) -> None:
    """Four streams at a time, and one change after the other until the last one is through."""
    expected = own.expected(PROMPT, 32)
    roles = ({Role.MIXED: 2}, {Role.DECODE: 2}, {Role.PREFILL: 1, Role.DECODE: 1})
    num_changes = 0
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(own.ask, PROMPT, 32, None) for _ in range(8)]
        while not all(one.done() for one in asked):
            scale(own.server.url, roles[num_changes % 3])
            num_changes += 1
        assert {one.result() for one in asked} == {expected}
    assert num_changes >= 2
    scale(own.server.url, {Role.PREFILL: 1, Role.DECODE: 1})
    own.server.at_rest()
