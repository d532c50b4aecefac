"""Capacity of a server under a workload, for each pair of objectives, from as few runs as can be.

The loosest objectives are searched first. A server of ours is told what each request should
meet, so that its router can do its best, and each pair of objectives gets runs of its own; of
any other server every run serves all of them. A run is given up once its objectives are out of
reach, and then answers for those that are no looser.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from ...core.errors import PdserveError
from . import live
from .folder import Folder
from .measures import Objectives
from .report import Cell, cells
from .runs import LoadSpec, Run, perform
from .search import Settings, bracket, next_rate
from .servers import Server, settle

_RETRIES = 2  # of a rate at which the client lagged
_DRAIN_S = 10.0  # that a run may take beyond its arrivals, for the budget's sake


class OutOfTime(Exception):
    """The budget of this call has no room for the next run."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Until when (monotonic seconds) this call may start runs; None: without end."""

    until: float | None = None

    @staticmethod
    def of(seconds: float | None) -> Budget:
        return Budget(None if seconds is None else time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        return math.inf if self.until is None else self.until - time.monotonic()

    def share(self, part: float) -> Budget:
        """That part of what is left."""
        return self if self.until is None else Budget.of(self.left_s * part)

    def require(self, seconds: float) -> None:
        """Raises OutOfTime where so much is not left."""
        if seconds > self.left_s:
            raise OutOfTime


@dataclass(frozen=True, slots=True)
class Search:
    """Of one server; its runs go to the folder and are taken from there."""

    folder: Folder
    server: Server
    objectives: tuple[Objectives, ...]
    budget: Budget
    api_key: str | None = None
    round: int = 0
    tell: bool = True  # a server of ours, what each request should meet

    def run(self, load: LoadSpec, settings: Settings) -> None:
        """Until every pair of objectives has its answer. Raises OutOfTime."""
        lagged: dict[float, int] = {}
        while (following := self.following(load, settings)) is not None:
            rate, objectives = following
            length = settings.duration_s(rate, load.duration_s, load.warmup_s)
            at_rate = replace(load, rate=rate, duration_s=length)
            done = self._measure(at_rate, objectives, settings.target)
            if done.fault is not None:
                lagged[rate] = lagged.get(rate, 0) + 1
                if lagged[rate] > _RETRIES:
                    raise PdserveError(
                        f"{self.server.name} at {rate:.3g}/s: {done.fault}, {_RETRIES + 1} times; "
                        "give the client a core of its own, or more of them (--clients)"
                    )

    def following(self, load: LoadSpec, settings: Settings) -> tuple[float, Objectives] | None:
        """The next rate, and for whose sake; None when all is known."""
        cell = self._cell(load)
        for objectives in sorted(self.objectives, reverse=True):
            points = cell.points(objectives, self.round) if cell is not None else {}
            rate = next_rate(points, settings)
            if rate is not None:
                return rate, objectives
            met = bracket(points, settings).met
            if met is not None:  # a good guess for those that are tighter
                settings = replace(settings, start=met)
        return None

    def _cell(self, load: LoadSpec) -> Cell | None:
        for cell in cells(self.folder.runs()):
            if (cell.server, cell.workload) == (self.server.name, load.workload):
                return cell
        return None

    def _measure(self, load: LoadSpec, objectives: Objectives, target: float) -> Run:
        return measure(
            self.folder,
            self.server,
            load,
            self.budget,
            objectives=objectives,
            target=target,
            api_key=self.api_key,
            round_number=self.round,
            told=objectives if self.tell and self.server.reads_objectives else None,
        )


def measure(
    folder: Folder,
    server: Server,
    load: LoadSpec,
    budget: Budget,
    *,
    objectives: Objectives | None = None,
    target: float = 0.9,
    api_key: str | None = None,
    round_number: int = 0,
    told: Objectives | None = None,
) -> Run:
    """One run, shown while it goes on, and kept."""
    settle(server)
    budget.require(load.duration_s + _DRAIN_S)
    title = f"{server.name} {load.workload} {pace(load)}"
    with live.watched(title, load.duration_s) as watch:
        run = perform(
            server,
            load,
            api_key=api_key,
            objectives=objectives,
            target=target,
            round_number=round_number,
            told=told,
            watch=watch,
        )
    folder.keep(run)
    live.tell(f"{title}: {shown(run, objectives)}")
    return run


def pace(load: LoadSpec) -> str:
    if load.concurrency is not None:
        return f"{load.concurrency} at once"
    return f"{load.rate:.3g}/s" if load.rate is not None else f"x{load.time_scale:g}"


def shown(run: Run, objectives: Objectives | None) -> str:
    """A run in a line."""
    if run.fault is not None:
        return f"INVALID: {run.fault}"
    if run.gave_up is not None:
        return f"given up: too many miss {run.gave_up}"
    failed = sum(record.failure is not None for record in run.counted())
    share = run.attained(objectives) if objectives is not None else None
    words = f"{100 * share:.0f}% within {objectives}; " if share is not None else ""
    return f"{words}{len(run.counted())} requests, {failed} failed"
