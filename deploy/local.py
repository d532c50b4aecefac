"""A deployment on this host: ``pdserve serve FILE``.

    prepare   a child that finds or converts the weights, once: model card, count of GPUs
    start     the router and every worker, together
    serve     until a signal; what dies is started again
    drain     SIGTERM to the router (it finishes its streams and drains the workers), then
              to the workers; what is left is killed. A second signal skips the waiting.

Every child ends with this process, also when it is killed (see ``core/orphans.py``), and
nothing of the run folder outlives it but by such a kill; the next start sweeps that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ..core import config
from ..core.card import ModelCard
from ..core.config import Deployment
from ..core.errors import ConfigError, StartupError
from . import fetch
from .backoff import RestartPolicy
from .child import Child, Command, describe_exit
from .devices import Devices
from .placement import WorkerSpec, place
from .rundir import RunDir
from .supervisor import Stage, Supervisor

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-P", "-m", "pdserve.cli")

START_LIMIT_S = 1800.0  # for weights to be converted, and again for them to be loaded
ROUTER_DRAIN_S = 40.0  # it bounds its own draining below that
WORKER_DRAIN_S = 10.0
_POLL_S = 0.1
_ROUTER = "router"

T = TypeVar("T")


def serve(deployment: Deployment, program: tuple[str, ...] = PROGRAM) -> int:
    """Brings the deployment up and keeps it until a signal: the exit code.

    Raises ConfigError or StartupError, with everything taken down, where it can't.
    """
    return asyncio.run(_serve(deployment, program))


async def _serve(deployment: Deployment, program: tuple[str, ...]) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    run_dir = RunDir.create()
    try:
        launch = _Launch(deployment, run_dir.path, program)
        try:
            if await _unless(stop, launch.up()) is not None:
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

    def __init__(self, deployment: Deployment, run_dir: Path, program: tuple[str, ...]) -> None:
        self._deployment = deployment
        self._run_dir = run_dir
        self._program = program
        self._file = run_dir / "deployment.json"
        self._card = run_dir / "card.json"
        self._devices = run_dir / "devices.json"
        self._workers: tuple[WorkerSpec, ...] = ()
        self._supervisor = Supervisor(_emit, RestartPolicy())

    async def up(self) -> str:
        """Returns the URL when the deployment takes requests."""
        config.save(self._deployment, self._file)
        await self._prepare()
        self._workers = place(self._deployment.pools, Devices.read(self._devices))
        self._supervisor.keep(self._command(_ROUTER, "router", *self._common()))
        for spec in self._workers:
            self._supervisor.keep(self._worker(spec))
        failure = asyncio.create_task(self._supervisor.failed())
        ready = asyncio.create_task(self._ready())
        try:
            await asyncio.wait(
                {failure, ready}, timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if failure.done():
                raise failure.result()
            if not ready.done():
                raise StartupError(f"not ready within {START_LIMIT_S:.0f} s; see the lines above")
            url = ready.result()
        finally:
            failure.cancel()
            ready.cancel()
        self._supervisor.settle()
        print(self._greeting(url), flush=True)
        return url

    async def down(self, hurry: asyncio.Event) -> None:
        stages = (
            Stage((_ROUTER,), ROUTER_DRAIN_S),
            Stage(tuple(spec.worker_id for spec in self._workers), WORKER_DRAIN_S),
        )
        await self._supervisor.stop(stages, hurry)

    async def _prepare(self) -> None:
        out = ("--card", str(self._card), "--devices", str(self._devices))
        child = Child(self._command("prepare", "prepare", str(self._file), *out), _emit)
        try:
            code = await asyncio.wait_for(child.wait(), START_LIMIT_S)
        except TimeoutError:
            raise StartupError(
                f"the weights were not prepared within {START_LIMIT_S:.0f} s"
            ) from None
        finally:
            child.kill()
            await child.wait()
        if code != 0:
            words = child.sentence or f"preparing the weights failed: {child.last_words}"
            if child.sentence is None:
                words = f"{words or 'no words'} ({describe_exit(code)})"
            raise ConfigError(words) if code == 2 else StartupError(words)

    async def _ready(self) -> str:
        """Waits until the router says that it can serve; its URL."""
        written = self._run_dir / "http.json"
        while True:
            if written.exists():
                url = written.read_text()
                try:
                    status, _ = await asyncio.to_thread(fetch.get_json, f"{url}/ready", 2.0)
                except fetch.Unreachable:
                    status = 0
                if status == 200:
                    return url
            await asyncio.sleep(_POLL_S)

    def _command(self, name: str, *arguments: str, threads: int | None = None) -> Command:
        env = {"PYTHONUNBUFFERED": "1"}
        if threads is not None:
            env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        argv = (*self._program, *arguments, "--parent", str(os.getpid()))
        return Command(name, argv, env)

    def _common(self) -> tuple[str, ...]:
        return (str(self._file), "--card", str(self._card), "--run-dir", str(self._run_dir))

    def _worker(self, spec: WorkerSpec) -> Command:
        return self._command(
            spec.worker_id,
            "worker",
            *self._common(),
            *("--role", spec.role.value),
            *("--id", spec.worker_id),
            *("--join", f"ipc://{self._run_dir}/control.sock"),
            *("--device", spec.device),
            *("--memory-share", str(spec.memory_share)),
            *("--threads", str(spec.num_threads)),
            threads=spec.num_threads,
        )

    def _greeting(self, url: str) -> str:
        """What is up, and a line to paste."""
        card = ModelCard.read(self._card)
        pools = self._deployment.pools
        counts = {"prefill": pools.prefill, "decode": pools.decode, "mixed": pools.mixed}
        workers = ", ".join(
            f"{pool.workers} {name}" for name, pool in counts.items() if pool.workers
        )
        body = (
            f'{{"model": "{card.name}", "max_tokens": 64, '
            f'"messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
        )
        return (
            f"pdserve is ready: {url} ({card.name}; {workers})\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(body)}"
        )


def _emit(line: str) -> None:
    """A child's line, to where our own log goes."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more: no reason to stop serving
        return
