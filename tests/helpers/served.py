"""A deployment as its users start it: the command, its ready line, its REST, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 150.0  # the first start on a machine converts the weights
STOP_LIMIT_S = 60.0

MAX_QUEUE = 64  # more than any test has at once that does not want it full

SPLIT = f"""
model: {{path: smollm2, dtype: fp32, max_context: 2048}}
pools:
  prefill: {{workers: 1, device: cpu}}
  decode: {{workers: 1, device: cpu}}
kv: {{memory: 512MiB}}
router: {{policy: disaggregated, max_queue: {MAX_QUEUE}}}
"""

# No model; bounds so short that a test can wait for them.
SIMULATED = """
model: {path: tiny, load: dummy, max_context: 256}
engine: simulated
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 1, device: cpu}
router: {header_timeout_s: 1, body_timeout_s: 1, max_body: 1MiB}
"""


@dataclass(frozen=True)
class Server:
    """A running deployment; ``url`` ends without a slash."""

    process: subprocess.Popen[str]
    url: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            return json.load(response)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What /cluster says, by worker id."""
        return {worker["id"]: worker for worker in self.get("/cluster")["workers"]}

    def held(self) -> dict[str, int]:
        """Blocks held on each worker; free + cached + held must be the total, always."""
        held = {}
        for name, worker in self.workers().items():
            blocks = worker["blocks"]
            assert blocks["free"] + blocks["cached"] + blocks["held"] == blocks["total"], worker
            held[name] = blocks["held"]
        return held

    def wait_for(self, what: str, check: Any, limit_s: float) -> None:
        """Asks every 50 ms until ``check()`` holds; fails with ``what`` after ``limit_s``."""
        end = time.monotonic() + limit_s
        while not check():
            assert time.monotonic() < end, f"not within {limit_s} s: {what}; {self.workers()}"
            time.sleep(0.05)

    def at_rest(self, limit_s: float = 10.0) -> None:
        """Nothing runs, nothing waits, nothing is held."""
        self.wait_for(
            "at rest",
            lambda: all(
                worker["blocks"]["held"] == worker["waiting"] == worker["running"] == 0
                for worker in self.workers().values()
            ),
            limit_s,
        )


def deployment(folder: Path, text: str) -> Path:
    """A deployment file."""
    file = folder / "deployment.yaml"
    file.write_text(text)
    return file


@contextlib.contextmanager
def serve(file: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Runs ``pdserve serve`` on a free port until the block ends, then stops it with SIGINT.

    Its end is part of what is tested: exit code 0, in bounded time.
    """
    process = start(file, *arguments, env=env)
    try:
        url = ready_url(process)
        yield Server(process, url)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_LIMIT_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pdserve.cli", *arguments]


def start(file: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("serve", str(file), "--port", "0", *arguments),
        env=environment() | (env or {}),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT / ".typing")}


def run(arguments: Sequence[str], limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """One short command to its end."""
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=limit_s
    )


def ready_url(process: subprocess.Popen[str], limit_s: float = START_LIMIT_S) -> str:
    """Waits for the line that says where it is ready."""
    assert process.stdout is not None
    end = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            line = process.stdout.readline()
            if found := re.search(r"ready: (https?://[\w.:]+)", line):
                return found[1]
            if not line:
                break
    raise AssertionError(f"not ready; exit code {process.poll()}")
