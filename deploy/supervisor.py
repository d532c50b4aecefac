"""Keeps a set of child processes alive, and ends them in order.

The life of a child: started -> ended -> waiting (exponential backoff) -> started ...
Until ``settle`` is called the set is being brought up: there a child that gives up in a
sentence of its own, or dies again and again, is a deployment that can't be brought up.
After it, only ``stop`` ends the keeping; a crash loop is told once and slows down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from signal import Signals
from typing import Any

from ..core.clock import Clock, monotonic
from ..core.errors import ConfigError, PdserveError, StartupError
from .backoff import Life, RestartPolicy
from .child import Child, Command, Emit, describe_exit, ended_from_outside

log = logging.getLogger(__name__)

_MAX_LIVES = 64  # remembered for each child


@dataclass(slots=True)
class _Kept:
    command: Command
    task: asyncio.Task[None] | None = None
    child: Child | None = None
    lives: deque[Life] = field(default_factory=lambda: deque(maxlen=_MAX_LIVES))
    told: str | None = None  # the sentence in which it gave up last


@dataclass(frozen=True, slots=True)
class _End:
    """How a life ended. ``sentence``: why, in the child's own words."""

    code: int
    sentence: str | None
    last_words: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Children to be told to end together, the seconds they may take, and how they are told."""

    names: tuple[str, ...]
    limit_s: float
    signal: Signals = Signals.SIGTERM


class Supervisor:
    def __init__(self, emit: Emit, policy: RestartPolicy, clock: Clock = monotonic) -> None:
        self._emit = emit
        self._policy = policy
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._settled = False
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[PdserveError] = asyncio.get_running_loop().create_future()

    def keep(self, command: Command) -> None:
        """Starts a child and keeps it alive. Names are unique."""
        assert command.name not in self._kept and not self._stopping.is_set()
        kept = self._kept[command.name] = _Kept(command)
        kept.task = asyncio.create_task(self._keep(kept))

    def settle(self) -> None:
        """All are up: from now on a death is mended and not a failure to start."""
        self._settled = True

    async def failed(self) -> PdserveError:
        """Waits for the error that ends the bringing up."""
        return await asyncio.shield(self._failure)

    def pid(self, name: str) -> int | None:
        child = self._kept[name].child
        return child.pid if child is not None else None

    async def stop(self, stages: Sequence[Stage], hurry: asyncio.Event) -> None:
        """A signal stage by stage, then SIGKILL for what is left; at once when ``hurry`` is set.

        When it returns, no child is left.
        """
        self._stopping.set()
        for stage in stages:
            ending = [self._kept[name] for name in stage.names if name in self._kept]
            for kept in ending:
                if kept.child is not None:
                    kept.child.signal(stage.signal)
            await self._ended(ending, stage.limit_s, hurry)
        for kept in self._kept.values():
            if kept.child is not None:
                if not hurry.is_set():
                    log.warning("%s did not end in time; killed", kept.command.name)
                kept.child.kill()
        await asyncio.gather(*(kept.task for kept in self._kept.values() if kept.task))

    async def _ended(self, ending: Sequence[_Kept], limit_s: float, hurry: asyncio.Event) -> None:
        """Returns when all of them have ended, the time is over, or it is to be quick."""
        tasks = [kept.task for kept in ending if kept.task is not None]
        if not tasks:
            return
        quick = asyncio.create_task(hurry.wait())
        all_ended = asyncio.create_task(asyncio.wait(tasks))
        either: tuple[asyncio.Task[Any], ...] = (quick, all_ended)
        await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in either:
            task.cancel()

    async def _keep(self, kept: _Kept) -> None:
        while not self._stopping.is_set():
            end = await self._live(kept)
            if self._stopping.is_set():
                return
            delay = self._after(kept, end)
            if delay is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self, kept: _Kept) -> _End:
        """One life of a child."""
        started, up_at = self._clock(), None
        try:
            child = kept.child = Child(kept.command, self._emit, self._clock)
        except OSError as error:
            end = _End(1, None, f"the system would not start it: {error.strerror}")
        else:
            code = await child.wait()
            kept.child, up_at = None, child.up_at
            end = _End(code, child.sentence, child.last_words)
        kept.lives.append(Life(started, self._clock(), up_at, ended_from_outside(end.code)))
        return end

    def _after(self, kept: _Kept, end: _End) -> float | None:
        """Tells what has ended; the seconds until its next start, None where there is none."""
        name, how = kept.command.name, describe_exit(end.code)
        if not self._settled and end.sentence is not None:
            self._fail(ConfigError if end.code == 2 else StartupError, end.sentence)
            return None
        restart = self._policy.restart(self._clock(), kept.lives)
        if self._policy.is_loop(restart):
            story = (
                f"{name} has ended {restart.short_lives} times in a row soon after its start "
                f"({how}); its last words: {end.last_words or 'none'}"
            )
            if not self._settled:
                self._fail(StartupError, story)
                return None
            log.error("%s; trying on, ever more slowly", story)
        elif restart.short_lives < self._policy.loop_lives:
            why = f"{how}: {end.sentence}" if end.sentence is not None else how
            again = restart.short_lives > 1 and end.sentence is not None
            if not again or end.sentence != kept.told:  # once is enough
                log.warning("%s ended (%s); starting it again in %.1f s", name, why, restart.delay)
        kept.told = end.sentence
        return restart.delay

    def _fail(self, kind: type[PdserveError], text: str) -> None:
        if not self._failure.done():
            self._failure.set_result(kind(text))
