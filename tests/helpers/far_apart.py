"""A deployment whose router, prefill and decode worker have a host each, of ``three_hosts``."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from served import Server, command, environment, ready_url
from three_hosts import ThreeHosts

T = TypeVar("T")
LIMIT_S = 120.0
NUM_REQUESTS = 12
FILE = f"""
model: {{path: tiny, load: dummy, max_context: 512}}
engine: simulated
pools: {{}}
kv_transfer: {{lease_s: 2}}
router: {{control: "tcp://{ThreeHosts.address("front")}:8100", policy: disaggregated}}
security: {{keys: keys}}
simulation: {{step_ms: 20}}
"""


class FarApart:
    """What is asked of it is asked by threads of the router's host."""

    def __init__(self, net: ThreeHosts, server: Server) -> None:
        self.net = net
        self._server = server
        self._threads = ThreadPoolExecutor(
            2 * NUM_REQUESTS + 1, initializer=net.hosts["front"].enter
        )
        self.back()
        self.expected = [one.result() for one in self.ask()]

    def close(self) -> None:
        self._threads.shutdown()

    def ask(self) -> list[Future[str]]:
        return [self._threads.submit(self._ask, number) for number in range(NUM_REQUESTS)]

    def probe(self) -> None:
        """A short answer: a prompt has gone from one worker to the other."""
        self._do(lambda: self._ask(0, 2))

    def workers(self) -> dict[str, dict[str, Any]]:
        """By what they do, not by name: a worker's host is in it."""
        found = self._do(self._server.workers).values()
        return {worker["role"]: worker for worker in found}

    def wait_for(self, what: str, check: Callable[[], bool]) -> None:
        self._do(lambda: self._server.wait_for(what, check, LIMIT_S))

    def state_of(self, role: str) -> str:
        """To be called in ``wait_for``."""
        workers = self._server.workers().values()
        return next(str(worker["state"]) for worker in workers if worker["role"] == role)

    def writes(self) -> bool:
        """To be called in ``wait_for``."""
        return any(worker["running"] for worker in self._server.workers().values())

    def back(self) -> None:
        self.wait_for("both workers are back", lambda: self._states() == ["ready"] * 2)

    def at_rest(self) -> None:
        self.back()
        self._do(lambda: self._server.at_rest(LIMIT_S))

    def _states(self) -> list[str]:
        return [worker["state"] for worker in self._server.workers().values()]

    def _do(self, job: Callable[[], T]) -> T:
        return self._threads.submit(job).result()

    def _ask(self, number: int, max_tokens: int = 80) -> str:
        rng = random.Random(number)
        body = {
            "model": "tiny",
            "prompt": [rng.randrange(2, 200) for _ in range(rng.randrange(1, 150))],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        head = {"Content-Type": "application/json"}
        url = f"{self._server.url}/v1/completions"
        call = urllib.request.Request(url, json.dumps(body).encode(), head)
        with urllib.request.urlopen(call, timeout=LIMIT_S) as response:
            text: str = json.load(response)["choices"][0]["text"]
            return text


@contextlib.contextmanager
def far_apart(net: ThreeHosts, folder: Path) -> Iterator[FarApart]:
    (folder / "deployment.yaml").write_text(FILE)
    with contextlib.ExitStack() as stack:

        def start(host: str, *arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                net.hosts[host].command(*command(*arguments)),
                cwd=folder,
                env=environment() | {"XDG_RUNTIME_DIR": str(folder)},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        assert start("front", "keys", "new", "keys").wait(LIMIT_S) == 0
        serve = start("front", "serve", "deployment.yaml", "--port", "0")
        url = ready_url(serve)
        control = f"tcp://{ThreeHosts.address('front')}:8100"
        for role in ("prefill", "decode"):
            start(role, "worker", "--role", role, "--join", control, "deployment.yaml")
        made = FarApart(net, Server(serve, url))
        stack.callback(made.close)
        yield made


def cut_while_asked(
    deployed: FarApart, pair: tuple[str, str], until: Callable[[list[Future[str]]], None]
) -> None:
    """Requests on both sides of the cut: some run when it comes, some come while it lasts."""
    before = deployed.ask()
    deployed.wait_for(
        "answers are being written", lambda: deployed.writes() or all(one.done() for one in before)
    )
    deployed.net.cut(*pair)
    try:
        during = deployed.ask()
        until([*before, *during])
    finally:
        deployed.net.heal(*pair)
    texts = [one.result() for one in (*before, *during)]
    assert texts == deployed.expected * 2
    deployed.at_rest()
    assert [one.result() for one in deployed.ask()] == deployed.expected
