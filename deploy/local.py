"""A deployment on this host: ``pdserve serve FILE``.

    prepare   a child that finds or converts the weights, once: model card, count of GPUs
    start     the router and every worker, together
    serve     until a signal; what dies is started again
    drain     ``ALL_END`` to the router (it finishes its streams and dismisses all workers, those
              of other hosts too), then SIGTERM to the workers; what is left is killed. A second
              signal skips the waiting.

Every child ends with this process, also when it is killed (see ``core/orphans.py``), and
nothing of the run folder outlives it but by such a kill; the next start sweeps that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..core import config
from ..core.api_keys import all_keys
from ..core.card import ModelCard
from ..core.config import Deployment, SecuritySection
from ..core.errors import ConfigError, StartupError
from ..core.files import reason
from ..core.logs import passed_on
from ..core.supervised import ALL_END
from . import fetch, status
from .backoff import RestartPolicy
from .bars import Bars
from .child import Child, describe_exit
from .commands import ROUTER, RunFiles
from .devices import Devices
from .placement import WorkerSpec, place
from .rundir import RunDir
from .supervisor import Stage, Supervisor

log = logging.getLogger(__name__)

START_LIMIT_S = 1800.0  # for weights to be converted, and again for them to be loaded
ROUTER_DRAIN_S = 20.0  # it bounds its own draining below that
WORKER_DRAIN_S = 10.0
_POLL_S = 0.1

T = TypeVar("T")


def serve(deployment: Deployment) -> int:
    """Brings the deployment up and keeps it until a signal: the exit code.

    Raises ConfigError or StartupError, with everything taken down, where it can't.
    """
    return asyncio.run(_serve(deployment))


async def _serve(deployment: Deployment) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, on_signal)
    run_dir = RunDir.create()
    try:
        launch = _Launch(deployment, run_dir.path)
        try:
            greeting = await _unless(stop, launch.up())
            if greeting is not None:
                _write(greeting, sys.stdout)
                await stop.wait()
                log.info("draining; once more to end at once")
        finally:
            await launch.down(hurry)
    finally:
        run_dir.close()
    return 130 if hurry.is_set() else 0


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns, or None where ``stop`` comes first; it is cancelled then."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.wait({task})


class _Launch:
    """One deployment being brought up and taken down."""

    def __init__(self, deployment: Deployment, run_dir: Path) -> None:
        self._deployment = deployment
        self._files = RunFiles(run_dir)
        self._workers: tuple[WorkerSpec, ...] = ()
        self._bars = Bars()
        self._supervisor = Supervisor(self._emit, RestartPolicy())

    async def up(self) -> str:
        """Returns what to tell the user once the deployment takes requests."""
        config.save(self._deployment, self._files.deployment)
        await self._prepare()
        self._workers = place(self._deployment.pools, Devices.read(self._files.devices))
        for spec in self._workers:
            log.info("starting %s on %s", spec.worker_id, spec.device)
        self._supervisor.keep(self._files.router())
        for spec in self._workers:
            self._supervisor.keep(self._files.worker(spec))
        failure = asyncio.create_task(self._supervisor.failed())
        ready = asyncio.create_task(self._ready())
        either: tuple[asyncio.Task[Any], ...] = (failure, ready)
        try:
            await asyncio.wait(either, timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                raise failure.result()
            if not ready.done():
                raise StartupError(f"not ready within {START_LIMIT_S:.0f} s; see the lines above")
            host, port = ready.result()
        finally:
            self._bars.close()
            for task in either:
                task.cancel()
        self._supervisor.settle()
        # A router that is started again must come back where its clients look for it.
        router = self._deployment.router.model_copy(update={"port": port})
        config.save(self._deployment.model_copy(update={"router": router}), self._files.deployment)
        url = f"{self._scheme}://{host}:{port}"
        return greeting(ModelCard.read(self._files.card), url, self._deployment.security)

    async def down(self, hurry: asyncio.Event) -> None:
        stages = (
            Stage((ROUTER,), ROUTER_DRAIN_S, ALL_END),
            Stage(tuple(spec.worker_id for spec in self._workers), WORKER_DRAIN_S),
        )
        await self._supervisor.stop(stages, hurry)

    def _emit(self, line: str) -> None:
        """A child's line, to where our own log goes."""
        if self._bars.take(line):
            return
        line = passed_on(line, self._deployment.observability.log_format)
        if not self._bars.write(line):
            _write(line, sys.stderr)

    async def _prepare(self) -> None:
        try:
            child = Child(self._files.prepare(), self._emit)
        except OSError as error:
            raise StartupError(f"the system would not start a process: {reason(error)}") from error
        try:
            code = await asyncio.wait_for(child.wait(), START_LIMIT_S)
        except TimeoutError:
            text = f"the weights were not prepared within {START_LIMIT_S:.0f} s"
            raise StartupError(text) from None
        finally:
            child.kill()
            await child.wait()
            self._bars.close()
        if child.sentence is not None:
            raise (ConfigError if code == 2 else StartupError)(child.sentence)
        if code != 0:
            words = f": {child.last_words}" if child.last_words else ""
            raise StartupError(f"preparing the weights failed ({describe_exit(code)}){words}")

    async def _ready(self) -> tuple[str, int]:
        """Waits until all workers of this host are in and the router can serve; its address."""
        while True:
            with contextlib.suppress(FileNotFoundError, fetch.Unreachable):
                found = json.loads(self._files.http.read_bytes())
                host, port = reachable(found["host"]), int(found["port"])
                if await asyncio.to_thread(self._serves, f"{self._scheme}://{host}:{port}"):
                    return host, port
            await asyncio.sleep(_POLL_S)

    @property
    def _scheme(self) -> str:
        return "http" if self._deployment.security.tls_cert is None else "https"

    def _serves(self, url: str) -> bool:
        if not {spec.worker_id for spec in self._workers} <= status.read_cluster(url).ready:
            return False
        # Where others may join, the workers of this host need not be enough.
        return self._deployment.router.control is not None or status.not_ready(url) is None


def reachable(host: str) -> str:
    """``host`` as a client on this machine writes it in a URL: no wildcard, IPv6 in brackets."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def greeting(card: ModelCard, url: str, security: SecuritySection) -> str:
    """What is up, and a first request to paste: a chat where the model knows one."""
    folder = Path(card.folder)
    settings = folder / "tokenizer_config.json"
    chat = (folder / "chat_template.jinja").exists() or (
        settings.exists() and "chat_template" in json.loads(settings.read_bytes())
    )
    body: dict[str, object] = {"model": card.name, "max_tokens": 64}
    if chat:
        body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        body["prompt"] = "The sky is blue because"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    key = " -H 'Authorization: Bearer KEY'" if all_keys(security.api_keys) else ""
    trust = f" --cacert {shlex.quote(security.tls_cert)}" if security.tls_cert is not None else ""
    return (
        f"pdserve is ready: {url} (model {card.name})\n"
        f"  curl{trust} {url}{path}{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def _write(text: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to stop serving
        print(text, file=stream, flush=True)
