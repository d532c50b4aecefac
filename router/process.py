"""The router's process: its sockets up, its life, and its orderly end.

bind the control sockets, then HTTP; write ``http.json`` into the run folder
serve
SIGTERM or SIGINT: /ready says 503, new requests are refused, those that are here have
``DRAIN_S`` to end, the workers are told to leave; a second signal ends it at once
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
import zmq
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ..core.card import ModelCard
from ..core.clock import monotonic
from ..core.config import Deployment
from ..core.errors import StartupError
from ..core.ids import new_epoch
from ..core.keys import admit, require_safe_bind
from .admin import add_admin
from .app import make_app
from .control import ControlSockets
from .dispatch import Dispatch
from .front import Front
from .membership import Membership
from .metrics import Metrics
from .service import Service
from .snapshot import Objectives
from .tokenizer import Tokenizer
from .tracing import Spans

log = logging.getLogger(__name__)

DRAIN_S = 10.0
_CLOSING_S = 2.0  # for responses to leave, when all requests are over
_BACKLOG = 1024  # connections that wait to be taken
_INTERRUPTED = 130


def run(deployment: Deployment, card: ModelCard, run_dir: Path, drain_s: float = DRAIN_S) -> int:
    """Serves until a signal: the exit code.

    Raises ConfigError or StartupError where it can't be brought up.
    """
    tokenizer = Tokenizer.read(Path(card.folder))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(deployment, card, run_dir, tokenizer, drain_s))


async def _run(
    deployment: Deployment, card: ModelCard, run_dir: Path, tokenizer: Tokenizer, drain_s: float
) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    async with serving(deployment, card, run_dir, tokenizer) as service:
        stopped = asyncio.create_task(stop.wait())
        time_kept = asyncio.create_task(service.keep_time())
        await asyncio.wait({stopped, time_kept}, return_when=asyncio.FIRST_COMPLETED)
        if time_kept.done():
            time_kept.result()  # raises: it ends by a bug only
        log.info("draining: %d requests are here", service.dispatch.num_requests)
        await service.drain(drain_s, hurry)
        time_kept.cancel()
    return _INTERRUPTED if hurry.is_set() else 0


@contextlib.asynccontextmanager
async def serving(
    deployment: Deployment, card: ModelCard, run_dir: Path, tokenizer: Tokenizer
) -> AsyncIterator[Service]:
    """The router with all its sockets, until the block ends. Its time is kept by the caller."""
    written = run_dir / "http.json"
    written.unlink(missing_ok=True)  # of an earlier life
    async with _control(deployment, card, run_dir) as service, _traced(deployment, card, service):
        front = Front(deployment, card, tokenizer, service)
        app = make_app(front)
        token = secrets.token_urlsafe(32)
        add_admin(app, service, token)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            logger=_http_log(),
            shutdown_timeout=_CLOSING_S,
        )
        await runner.setup()
        try:
            host, port = await _bind(runner, deployment)
            _write(written, {"host": host, "port": port, "pid": os.getpid(), "token": token})
            log.info("listening at %s:%d", host, port)
            yield service
        finally:
            await runner.cleanup()
            front.close()
            written.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _traced(deployment: Deployment, card: ModelCard, service: Service) -> AsyncIterator[None]:
    """Spans of what ends until the block ends, where there is a place to send them."""
    endpoint = deployment.observability.otlp_endpoint
    if endpoint is None:
        yield
        return
    spans = Spans(endpoint, card.name, monotonic)
    service.on_ended.append(spans.ended)
    try:
        yield
    finally:
        await asyncio.to_thread(spans.close)


@contextlib.asynccontextmanager
async def _control(
    deployment: Deployment, card: ModelCard, run_dir: Path
) -> AsyncIterator[Service]:
    """The service, reachable for workers: in the run folder, and over tcp where asked for."""
    remote = deployment.router.control
    keys = require_safe_bind(remote, deployment.security) if remote is not None else None
    membership = Membership(card.fingerprint)
    dispatch = Dispatch(
        deployment.router.policy,
        deployment.pools,
        membership,
        new_epoch(),
        _salt(run_dir),
        Objectives(deployment.slo.ttft_ms, deployment.slo.tpot_ms),
        deployment.router.admission,
    )
    context: zmq.Context[Any] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        if keys is not None:
            stack.enter_context(admit(context, keys))
        control = ControlSockets(context)
        stack.callback(control.close)
        metrics = Metrics(deployment.slo, card.name)
        service = Service(dispatch, control, deployment.router, deployment.slo, metrics, monotonic)
        control.bind(f"ipc://{run_dir}/control.sock")
        if remote is not None:
            log.info("workers of other hosts may join at %s", control.bind(remote, keys))
        yield service


def _salt(run_dir: Path) -> bytes:
    """What block names are keyed with: drawn once a deployment, and kept for a router that is
    started again, so that the workers' caches outlive it."""
    path = run_dir / "salt"
    if not path.exists():
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(secrets.token_bytes(32))
        new.replace(path)
    return path.read_bytes()


async def _bind(runner: web.AppRunner, deployment: Deployment) -> tuple[str, int]:
    """The address that HTTP is served at."""
    host, port = deployment.router.host, deployment.router.port
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
    try:
        await site.start()
    except OSError as error:
        raise StartupError(
            f"router.port: {host}:{port} can't be bound: {error.strerror or error}; "
            "give another one, or 0 for any free one"
        ) from error
    bound = runner.addresses[0]
    return str(bound[0]), int(bound[1])


def _http_log() -> logging.Logger:
    """What the HTTP server has to say, but for clients that speak no HTTP: the answer says it."""

    def is_ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)

    http_log = log.getChild("http")
    http_log.filters = [is_ours]
    return http_log


def _write(path: Path, content: dict[str, Any]) -> None:
    """All at once: whoever finds the file finds it whole."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(json.dumps(content), encoding="utf-8")
    new.replace(path)
