"""configs/two-hosts.yaml as its comment tells it, with this host in both parts and no model."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.deploy.status import read_cluster

CONFIG = Path(__file__).parents[2] / "configs" / "two-hosts.yaml"
LIMIT_S = 60.0


def own_address() -> str:
    """An address of this host that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has no address but loopback")
        address: str = probe.getsockname()[0]
        return address


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def cached(url: str, role: str) -> int:
    workers = read_cluster(url).workers
    return sum(worker.blocks.cached for worker in workers if worker.role == role)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


class Host:
    """A folder to run commands in, and what was started there."""

    def __init__(self, control: str) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/tmp")
        self.path = Path(self._folder.name)
        self.processes: list[subprocess.Popen[str]] = []
        settings = ("model.path=tiny", "model.load=dummy", "model.max_context=auto")
        self._settings = [*settings, "engine=simulated", f"router.control={control}"]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdserve.cli", *arguments],
            cwd=self.path,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def deploy(self, *arguments: str) -> subprocess.Popen[str]:
        settings = [word for setting in self._settings for word in ("--set", setting)]
        return self.start(*arguments, str(CONFIG), *settings)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()


@pytest.fixture
def control() -> str:
    address = own_address()
    return f"tcp://{address}:{free_port(address)}"


@pytest.fixture
def hosts(control: str) -> Iterator[tuple[Host, Host]]:
    first, second = Host(control), Host(control)
    yield first, second
    second.close()
    first.close()


def test_a_worker_of_another_host_joins_with_the_keys(
    hosts: tuple[Host, Host], control: str
) -> None:
    first, second = hosts
    assert first.start("keys", "new", "keys").wait(LIMIT_S) == 0
    (second.path / "keys").mkdir(mode=0o700)
    secret = second.path / "keys" / "deployment.secret"
    secret.touch(mode=0o600)
    secret.write_bytes((first.path / "keys" / "deployment.secret").read_bytes())

    serve = first.deploy("serve", "--port", "0")
    assert serve.stdout is not None
    found = re.search(r"ready: http://(\S+)", serve.stdout.readline())
    assert found is not None
    url = f"http://{found[1]}"
    worker = second.deploy("worker", "--role", "decode", "--join", control)
    until(lambda: len(read_cluster(url).ready) == 2)

    connection = http.client.HTTPConnection(found[1], timeout=LIMIT_S)
    body = {"model": "tiny", "prompt": "word " * 20, "max_tokens": 9, "route": "disaggregated"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}))
    usage = json.loads(connection.getresponse().read())["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 9)
    until(lambda: cached(url, "decode") >= 100 // 16)  # the prompt's blocks came over
    for process in (worker, serve):
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
