"""Router, prefill and decode worker on hosts of their own, and a network that loses every packet
between two of them without a word, then none. Each answer is that of an undisturbed network,
nothing is held, and who was given up comes back by itself."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from served import Server, command, environment, ready_url
from three_hosts import ThreeHosts, three_hosts

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


class Deployment:
    """What is asked of it is asked by threads of the router's host."""

    def __init__(self, net: ThreeHosts, server: Server) -> None:
        self.net = net
        self._server = server
        self._threads = ThreadPoolExecutor(
            2 * NUM_REQUESTS + 1, initializer=net.hosts["front"].enter
        )
        self.wait_for("both workers are in", lambda: self._states() == ["ready"] * 2)
        self.expected = [one.result() for one in self.ask()]

    def close(self) -> None:
        self._threads.shutdown()

    def ask(self) -> list[Future[str]]:
        return [self._threads.submit(self._ask, number) for number in range(NUM_REQUESTS)]

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

    def at_rest(self) -> None:
        self.wait_for("both workers are back", lambda: self._states() == ["ready"] * 2)
        self._do(lambda: self._server.at_rest(LIMIT_S))

    def _states(self) -> list[str]:
        return [worker["state"] for worker in self._server.workers().values()]

    def _do(self, job: Callable[[], T]) -> T:
        return self._threads.submit(job).result()

    def _ask(self, number: int) -> str:
        rng = random.Random(number)
        body = {
            "model": "tiny",
            "prompt": [rng.randrange(2, 200) for _ in range(rng.randrange(1, 150))],
            "max_tokens": 80,
            "temperature": 0,
            "ignore_eos": True,
        }
        head = {"Content-Type": "application/json"}
        url = f"{self._server.url}/v1/completions"
        call = urllib.request.Request(url, json.dumps(body).encode(), head)
        with urllib.request.urlopen(call, timeout=LIMIT_S) as response:
            text: str = json.load(response)["choices"][0]["text"]
            return text


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "deployment.yaml").write_text(FILE)
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(three_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root, unshare, nsenter and ip: {error}")

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
        made = Deployment(net, Server(serve, url))
        stack.callback(made.close)
        yield made


def cut_while_asked(
    deployed: Deployment, pair: tuple[str, str], until: Callable[[list[Future[str]]], None]
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


def test_between_the_workers_for_longer_than_any_request_waits(deployed: Deployment) -> None:
    """The router sees both: the link is bad, the workers are not, and one of them does it all."""
    epochs = {role: worker["epoch"] for role, worker in deployed.workers().items()}

    def all_have_ended(asked: list[Future[str]]) -> None:
        for one in asked:
            one.result()

    cut_while_asked(deployed, ("prefill", "decode"), all_have_ended)
    assert {role: worker["epoch"] for role, worker in deployed.workers().items()} == epochs


@pytest.mark.parametrize("role", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_between_router_and_worker_until_it_is_given_up(deployed: Deployment, role: str) -> None:
    before = deployed.workers()[role]
    cut_while_asked(
        deployed,
        ("front", role),
        lambda _: deployed.wait_for("it is given up", lambda: deployed.state_of(role) == "dead"),
    )
    after = deployed.workers()[role]
    assert after["pid"] == before["pid"] and after["epoch"] != before["epoch"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 30.0])
@pytest.mark.parametrize("pair", [("prefill", "decode"), ("front", "decode"), ("front", "prefill")])
def test_for_a_time(deployed: Deployment, pair: tuple[str, str], seconds: float) -> None:
    cut_while_asked(deployed, pair, lambda _: time.sleep(seconds))
