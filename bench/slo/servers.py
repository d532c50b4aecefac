"""The servers that are measured: given by their URL, or brought up from a deployment file."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...core import config
from ...core.config import Policy
from ...core.errors import ConfigError, PdserveError, StartupError

_TIMEOUT_S = 10.0
_STOP_LIMIT_S = 60.0
_SETTLE_LIMIT_S = 20.0
_SETTLE_POLL_S = 0.1


class Unreachable(PdserveError):
    """Nobody answers there, or not as an OpenAI-compatible server does."""


@dataclass(frozen=True, slots=True)
class Server:
    """``num_gpus`` is what rates are divided by: workers, where a deployment runs on CPUs."""

    name: str
    url: str
    model: str
    num_gpus: int
    max_context: int  # 0: it does not say
    ours: bool
    deployment: dict[str, Any] | None = None

    @property
    def reads_objectives(self) -> bool:
        """Its router decides by what a request says that it should meet. A policy that is
        fixed does not, and so all of its runs serve any objectives."""
        policy = Policy.ADAPTIVE if self.deployment is None else self.deployment["router"]["policy"]
        return self.ours and policy == Policy.ADAPTIVE


def get_json(url: str, path: str, timeout_s: float = _TIMEOUT_S) -> tuple[int, Any]:
    """Status and body; raises Unreachable."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url}: not a server's address; allowed: http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if response.status == 200 else None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer from {url}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise Unreachable(f"{url}{path}: its answer is no JSON") from error
    finally:
        connection.close()


def probe(url: str, *, name: str = "", model: str | None = None, num_gpus: int = 1) -> Server:
    """Asks a running server what it serves."""
    url = url.rstrip("/").removesuffix("/v1")
    status, body = get_json(url, "/v1/models")
    try:
        models = body["data"] if status == 200 else []
        served = {str(one["id"]): one for one in models}
    except (KeyError, TypeError):
        raise Unreachable(f"{url}/v1/models: not OpenAI's list of models") from None
    if model is None:
        if not served:
            raise Unreachable(f"{url} lists no model; give --model")
        model = next(iter(served))
    about = served.get(model, {})
    return Server(
        name=name or url,
        url=url,
        model=model,
        num_gpus=num_gpus,
        max_context=int(about.get("max_model_len") or 0),
        ours=about.get("owned_by") == "pdserve",
    )


def settle(server: Server) -> None:
    """Waits, for a while, until a server of ours has nothing left to do. Others don't tell."""
    if not server.ours:
        return
    limit = time.monotonic() + _SETTLE_LIMIT_S
    while time.monotonic() < limit:
        _, body = get_json(server.url, "/cluster")
        if all(one["waiting"] == one["running"] == 0 for one in body["workers"]):
            return
        time.sleep(_SETTLE_POLL_S)


@contextlib.contextmanager
def running(
    file: Path, name: str, log: Path, *, start_limit_s: float, num_gpus: int | None = None
) -> Iterator[Server]:
    """``pdserve serve FILE`` on a free port, until the block ends. Its log goes to a file."""
    deployment = config.load(file)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdserve.cli", "serve", str(file), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=out,
        )
        try:
            url = _ready(process, file, log, start_limit_s)
            server = probe(url, name=name, num_gpus=num_gpus or deployment.pools.num_workers)
            yield replace(server, deployment=deployment.model_dump(mode="json"))
        finally:
            _stop(process)


def _ready(process: subprocess.Popen[bytes], file: Path, log: Path, limit_s: float) -> str:
    assert process.stdout is not None
    limit = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, limit - time.monotonic())):
            line = process.stdout.readline().decode(errors="replace")
            if found := re.search(r"ready: (http://\S+)", line):
                return found[1]
            if not line:
                break
    words = log.read_text(errors="replace").strip().splitlines()
    last = f"; its last words: {words[-1]}" if words else ""
    if process.poll() is None:
        raise StartupError(f"{file}: not ready within {limit_s:.0f} s{last}")
    raise StartupError(f"{file}: could not be brought up{last}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Told to drain, then twice as loud, then killed: its workers end with it in any case."""
    for number in (signal.SIGINT, signal.SIGINT):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_LIMIT_S / 2)
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
