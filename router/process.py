"""The router's process: its sockets up, its life, and its orderly end.

bind the control sockets, then HTTP; write ``http.json`` into the run folder
serve
SIGTERM or SIGINT: /ready says 503, new requests are refused, those that are here have
``DRAIN_S`` to end; a second signal ends it at once

These end this process alone: its workers look for the next one. At ``ALL_END`` it drains in the
same way, and they are told to leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
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
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from ..core.api_keys import all_keys
from ..core.card import ModelCard
from ..core.clock import monotonic
from ..core.config import Deployment
from ..core.files import write_whole
from ..core.ids import new_epoch
from ..core.keys import admit, is_loopback, require_safe_bind
from ..core.supervised import ALL_END, up
from .admin import add_admin
from .app import make_app
from .callers import Callers
from .control import ControlSockets
from .dispatch import Dispatch
from .front import Front
from .listener import listening
from .membership import Membership
from .metrics import Metrics
from .service import Service
from .snapshot import Objectives
from .tokenizer import Tokenizer
from .tracing import Spans

log = logging.getLogger(__name__)

DRAIN_S = 10.0
# Objects that were made and not freed, from one look for circles to the next; how many looks at
# the youngest come before one at those that it left; how many of these before one at all. An
# open stream is 120 objects, and all that happens waits for a look: one at the youngest takes a
# millisecond or two, one at all of a thousand streams fifty. Only clients that hang up leave
# circles, of some 70 objects each: so all is looked at before 10,000 of them have piled up.
_GC_THRESHOLDS = (2_000, 3, 100)
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
    stop, hurry, all_ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        (hurry if stop.is_set() else stop).set()
        if number is ALL_END:
            all_ends.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, ALL_END):
        loop.add_signal_handler(number, on_signal, number)
    async with serving(deployment, card, run_dir, tokenizer) as service:
        # What is here by now stays, and what a token leaves behind is freed as it is let go.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        stopped = asyncio.create_task(stop.wait())
        time_kept = asyncio.create_task(service.keep_time())
        await asyncio.wait({stopped, time_kept}, return_when=asyncio.FIRST_COMPLETED)
        if time_kept.done():
            time_kept.result()  # raises: it ends by a bug only
        log.info("draining: %d requests are here", service.dispatch.num_requests)
        await service.drain(drain_s, hurry)
        if all_ends.is_set():
            await service.dismiss(hurry)
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
        token = secrets.token_urlsafe(32)
        app = make_app(front, _callers(deployment, token))
        add_admin(app, service, token)
        try:
            async with listening(app, deployment, _http_log()) as (host, port):
                certificate = deployment.security.tls_cert
                found = {"host": host, "port": port, "pid": os.getpid(), "token": token}
                content = json.dumps(found | {"certificate": certificate})
                write_whole(written, content.encode())
                scheme = "http" if certificate is None else "https"
                log.info("listening at %s://%s:%d", scheme, host, port)
                up()
                yield service
        finally:
            front.close()
            written.unlink(missing_ok=True)


def _callers(deployment: Deployment, token: str) -> Callers:
    keys = all_keys(deployment.security.api_keys)
    if not keys and not is_loopback(deployment.router.host):
        log.warning("other hosts can reach this API, and no key is asked for: security.api_keys")
    return Callers(keys, token, monotonic)


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
        plan_roles=deployment.router.plan_roles,
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
        write_whole(path, secrets.token_bytes(32))
    return path.read_bytes()


def _http_log() -> logging.Logger:
    """What the HTTP server has to say, but for clients that speak no HTTP: the answer says it."""

    def is_ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (HttpProcessingError, RequestPayloadError))

    http_log = log.getChild("http")
    http_log.filters = [is_ours]
    return http_log
