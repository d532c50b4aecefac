"""Staircases of one server: for each pair of objectives and each workload, until all is known.

The pairs of objectives come in the order in which they are given, and for each of them the
workloads in theirs: what tells most goes first, and a call that is cut has it. A server that is
told what each request should meet, and decides by it, gets stairs for each pair; of any other,
every level serves all pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from . import live
from .folder import Folder
from .goodput import Budget, OutOfTime, shown
from .measures import Objectives
from .report import Cell, cells
from .runs import LoadSpec, climb
from .servers import Server, settle
from .stairs import Step, ends, following, steps

_DRAIN_S = 6.0  # that a staircase may take beyond its levels, for the budget's sake
_TRIES = 2  # of a level at which the client lagged


@dataclass(frozen=True, slots=True)
class Flight:
    """A workload and its levels; ``start`` is tried first, unless other runs tell better."""

    load: LoadSpec
    levels: tuple[float, ...]
    start: float
    target: float
    min_requests: int


@dataclass(frozen=True, slots=True)
class Staircases:
    folder: Folder
    server: Server
    objectives: tuple[Objectives, ...]
    budget: Budget
    api_key: str | None = None
    round: int = 0
    tell: bool = True

    @property
    def told(self) -> bool:
        return self.tell and self.server.reads_objectives

    def is_done(self, flights: Sequence[Flight]) -> bool:
        return self._next(flights) is None

    def run(self, flights: Sequence[Flight]) -> None:
        """Raises OutOfTime where the budget has no room for the next level."""
        while (found := self._next(flights)) is not None:
            flight, objectives, rates = found
            self._climb(flight, objectives, self._fitting(flight, rates))

    def _next(
        self, flights: Sequence[Flight]
    ) -> tuple[Flight, Objectives, tuple[float, ...]] | None:
        known = cells(self.folder.runs())
        for objectives in self.objectives:
            for flight in flights:
                rates = self._following(known, flight, objectives)
                if rates:
                    return flight, objectives, rates
        return None

    def _following(
        self, known: Sequence[Cell], flight: Flight, objectives: Objectives
    ) -> tuple[float, ...]:
        same = [cell for cell in known if cell.workload == flight.load.workload]
        own = next((cell for cell in same if cell.server == self.server.name), None)
        points = own.points(objectives, self.round) if own is not None else {}
        lagged = _lagged(own, objectives if self.told else None)
        levels = [rate for rate in flight.levels if lagged[rate] < _TRIES]
        guess = self._guess(same, objectives, flight.target)
        return following(points, levels, flight.target, guess or flight.start)

    def _guess(self, same: Sequence[Cell], objectives: Objectives, target: float) -> float | None:
        """What this server met for objectives that are no looser; and what others met, for one
        that may choose among their ways."""
        met = []
        for cell in same:
            for one in self.objectives:
                own = cell.server == self.server.name and one.no_looser_than(objectives)
                if own or (self.told and one == objectives):
                    met.append(ends(cell.points(one, self.round), target).met)
        return max((rate for rate in met if rate is not None), default=None)

    def _fitting(self, flight: Flight, rates: Sequence[float]) -> tuple[Step, ...]:
        """As many levels as there is time for."""
        load = flight.load
        settle(self.server)
        all_of = steps(rates, load.duration_s, load.warmup_s, flight.min_requests)
        left = self.budget.left_s - _DRAIN_S
        fit = tuple(step for step in all_of if step.end <= left)
        if not fit:
            raise OutOfTime
        return fit

    def _climb(self, flight: Flight, objectives: Objectives, stairs: tuple[Step, ...]) -> None:
        title = f"{self.server.name} {flight.load.workload} for {objectives}"
        with live.watched(title, stairs[-1].end) as watch:
            made = climb(
                self.server,
                flight.load,
                stairs,
                objectives=objectives,
                target=flight.target,
                api_key=self.api_key,
                round_number=self.round,
                told=objectives if self.told else None,
                watch=watch,
            )
        for run in made:
            self.folder.keep(run)
            live.tell(f"{title}: {run.load.rate:.3g}/s: {shown(run, objectives)}")
        if not made:
            raise OutOfTime  # nothing was held to its end: not once more at any price


def _lagged(cell: Cell | None, told: Objectives | None) -> Counter[float]:
    runs = cell.runs if cell is not None else ()
    return Counter(
        run.load.rate
        for run in runs
        if run.fault is not None and run.told == told and run.load.rate is not None
    )
