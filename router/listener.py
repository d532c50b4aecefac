"""Where HTTP is listened for: the port, TLS where it is asked for, and the bounds of each
connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator
from functools import partial

from aiohttp import web

from ..core.config import Deployment
from ..core.errors import StartupError
from ..core.tls import tls_context
from .connections import Connection, Limits

_BACKLOG = 1024  # connections that wait to be taken
_CLOSING_S = 2.0  # for responses to leave, when all requests are over
_SPARE_FILES = 256  # open files of a router beside its clients' connections


@contextlib.asynccontextmanager
async def listening(
    app: web.Application, deployment: Deployment, log: logging.Logger
) -> AsyncIterator[tuple[str, int]]:
    """Serves ``app`` until the block ends; the address that it is served at.

    Raises ConfigError for a certificate that can't be used, StartupError for a taken port.
    """
    router = deployment.router
    tls = tls_context(deployment.security)
    limits = Limits(router.max_connections, router.header_timeout_s)
    _allow_files(router.max_connections + _SPARE_FILES)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_CLOSING_S)
    await runner.setup()
    try:
        assert runner.server is not None
        connection = partial(
            Connection,
            runner.server,
            limits,
            keepalive_timeout=router.idle_timeout_s,
            access_log=None,
            logger=log,
        )
        try:
            server = await asyncio.get_running_loop().create_server(
                connection,
                router.host,
                router.port,
                backlog=_BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=router.header_timeout_s if tls is not None else None,
            )
        except OSError as error:
            raise StartupError(
                f"router.port: {router.host}:{router.port} can't be bound: "
                f"{error.strerror or error}; give another one, or 0 for any free one"
            ) from error
        try:
            bound = server.sockets[0].getsockname()
            yield str(bound[0]), int(bound[1])
        finally:
            server.close()
    finally:
        await runner.cleanup()


def _allow_files(number: int) -> None:
    """Each connection is an open file, and the limit that a shell gives is often lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
