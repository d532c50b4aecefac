"""Client processes: each sends its share of the load, and none does anything else.

    spawn -> ready -> the start, one time for all -> progress, now and then -> outcome

The clock is the system's monotonic one, which all processes of a host share.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

import uvloop

from ...core.errors import PdserveError
from ...core.orphans import die_with_parent
from .load import LevelCount, Load, Orders, Outcome, Progress
from .records import ClientHealth

_START_LIMIT_S = 60.0
_LEAD_S = 0.2  # from the last one's ready to the start


class ClientDied(PdserveError):
    """A client process of ours has ended before its load did."""


Pipe: TypeAlias = "Connection[object, object]"


@dataclass(frozen=True, slots=True)
class _Client:
    process: subprocess.Popen[bytes]
    pipe: Pipe

    @staticmethod
    def start() -> _Client:
        """A plain process, which imports nothing of how this one was started."""
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from {__name__} import main; main({theirs.fileno()}, {os.getpid()})"
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=[theirs.fileno()],
            )
        return _Client(process, Connection(ours.detach()))


def run_clients(
    orders: Orders, number: int, watch: Callable[[Progress], None], limit_s: float
) -> Outcome:
    """Spreads the load over ``number`` processes; none may take longer than ``limit_s``."""
    clients: list[_Client] = []
    try:
        for share in shares(orders, number):
            clients.append(_Client.start())
            clients[-1].pipe.send(share)
        for client in clients:
            if not client.pipe.poll(_START_LIMIT_S):
                raise ClientDied("a client process did not start")
            _receive(client)
        start = time.monotonic() + _LEAD_S
        for client in clients:
            client.pipe.send(start)
        return _merged(_collect(clients, watch, start, limit_s, orders))
    finally:
        for client in clients:
            client.process.kill()
            client.process.wait()
            client.pipe.close()


def shares(orders: Orders, number: int) -> list[Orders]:
    """Every ``number``-th session to each, so that all are busy all the time."""
    if orders.concurrency is not None:
        number = min(number, orders.concurrency)
    made = []
    for index in range(number):
        concurrency = orders.concurrency
        if concurrency is not None:
            concurrency = concurrency // number + (index < concurrency % number)
        give_up = orders.give_up
        if give_up is not None and number > 1:  # only all of them together can tell
            give_up = replace(give_up, allowed=math.inf)
        made.append(
            replace(
                orders,
                sessions=orders.sessions[index::number],
                concurrency=concurrency,
                give_up=give_up,
            )
        )
    return made


def _collect(
    clients: Sequence[_Client],
    watch: Callable[[Progress], None],
    start: float,
    limit_s: float,
    orders: Orders,
) -> list[Outcome]:
    allowed = orders.give_up.allowed if orders.give_up is not None else math.inf
    told = False
    outcomes: dict[int, Outcome] = {}
    progress = [Progress() for _ in clients]
    by_pipe = {id(client.pipe): index for index, client in enumerate(clients)}
    while len(outcomes) < len(clients):
        left = start + limit_s - time.monotonic()
        if left <= 0:
            raise ClientDied("a client process did not end in time")
        waiting = [c.pipe for i, c in enumerate(clients) if i not in outcomes]
        for pipe in wait(waiting, timeout=left):
            index = by_pipe[id(pipe)]
            message = _receive(clients[index])
            if isinstance(message, Outcome):
                outcomes[index] = message
            elif isinstance(message, Progress):
                progress[index] = message
                summed = _summed(progress)
                watch(summed)
                now = time.monotonic() - start
                level_missed = orders.levels is not None and orders.levels.missed(
                    summed.levels, now
                )
                if (summed.missed > allowed or level_missed) and not told:
                    told = True
                    for client in clients:
                        with contextlib.suppress(OSError):  # it has just ended
                            client.pipe.send("stop")
    return [outcomes[index] for index in range(len(clients))]


def _receive(client: _Client) -> object:
    try:
        return client.pipe.recv()
    except (EOFError, OSError):  # the latter where it ended within a message
        code = client.process.wait()
        raise ClientDied(f"a client process ended ({code}); see the lines above") from None


def _summed(parts: Sequence[Progress]) -> Progress:
    return Progress(
        due=sum(one.due for one in parts),
        running=sum(one.running for one in parts),
        done=sum(one.done for one in parts),
        failed=sum(one.failed for one in parts),
        tokens=sum(one.tokens for one in parts),
        missed=sum(one.missed for one in parts),
        ttfts_ms=tuple(value for one in parts for value in one.ttfts_ms),
        levels=tuple(
            LevelCount(sum(one.missed for one in same), sum(one.open for one in same))
            for same in zip(*(one.levels for one in parts if one.levels), strict=True)
        ),
    )


def _merged(outcomes: Sequence[Outcome]) -> Outcome:
    """The worst client speaks for all: its p99 must not vanish among the others'."""
    records = sorted((r for one in outcomes for r in one.records), key=lambda r: (r.index, r.turn))
    lateness = {
        name: max(one.health.lateness.get(name, 0.0) for one in outcomes)
        for name in ("p50", "p99", "max")
    }
    stall = max(one.health.stall_ms for one in outcomes)
    gave_up = any(one.gave_up for one in outcomes)
    return Outcome(tuple(records), ClientHealth(lateness, stall), gave_up)


def main(descriptor: int, parent: int) -> None:
    """In the client process."""
    die_with_parent(parent)
    pipe: Pipe = Connection(descriptor)
    orders = pipe.recv()
    assert isinstance(orders, Orders)
    pipe.send("ready")
    start = pipe.recv()
    assert isinstance(start, float)
    load = Load(orders, watch=pipe.send)

    def stop() -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        load.stop()

    async def run() -> Outcome:
        asyncio.get_running_loop().add_reader(descriptor, stop)  # all that is ever said: stop
        # uvloop made it non-blocking, and an outcome is larger than what the pipe takes at once.
        os.set_blocking(descriptor, True)
        return await load.run(start)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pipe.send(runner.run(run()))
