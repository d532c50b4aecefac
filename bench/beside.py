"""Another router under the same load as ours, for ``pdserve bench router --beside PROGRAM``.

``vllm-router`` (PyPI) is no dependency of this project: where it isn't on the path, the report
says so. Behind it are servers that speak HTTP and write the same events at the same pace as our
simulated workers; they are one process with a port each, as those are one process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("vllm-router",)
_START_S = 60.0


def lacking(program: str) -> str | None:
    """Why there is nothing to compare with, in words."""
    if shutil.which(program) is None:
        return f"{program} is not installed here (pip install {program})"
    return None


@contextlib.contextmanager
def beside(program: str, workers: list[int]) -> Iterator[tuple[int, int]]:
    """Its port and process id, once it passes requests on to those ports."""
    port = _free_port()
    urls = [f"http://127.0.0.1:{worker}" for worker in workers]
    command = (program, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning")
    options = ("--policy", "power_of_two", "--prometheus-port", str(_free_port()))
    limits = ("--max-concurrent-requests", "16384", "--worker-urls", *urls)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            (*command, *options, *limits), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + _START_S
            while not _answers(port):
                log.seek(0)
                assert process.poll() is None, f"{program} has ended: {log.read()[-2000:]}"
                assert time.monotonic() < until, f"{program} does not serve: {log.read()[-2000:]}"
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.kill()
            process.wait()


def version(program: str) -> str:
    """As its package says, where it lies in this environment."""
    try:
        return importlib.metadata.version(program)
    except importlib.metadata.PackageNotFoundError:
        home = Path(shutil.which(program) or "").resolve().parent.parent
        wanted = f"lib/*/site-packages/{program.replace('-', '_')}-*.dist-info"
        found = [path.stem.rpartition("-")[2] for path in home.glob(wanted)]
        return found[0] if found else "unknown"


def _answers(port: int) -> bool:
    body = json.dumps({"model": "bench", "prompt": "a", "max_tokens": 1, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return b"data: " in response.read()
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
