"""Several servers under the same loads: brought up in turn where they are files, taken as they
are where they are URLs.

    for each round: for each server, in an order that turns with the round:
        up -> greedy answers against the first server's -> warm-up -> each workload's search -> down

Every call does as much as its budget allows and keeps each run at once; called again on the
same folder it goes on where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core import config
from ...core.errors import ConfigError, PdserveError, StartupError
from . import live
from .clients import ClientDied
from .folder import Folder
from .goodput import Budget, OutOfTime, Search, measure
from .greedy import answers, differences
from .measures import Objectives
from .prompts import PromptMaker
from .report import cells
from .runs import LoadSpec, perform
from .search import Settings
from .servers import Server, Unreachable, probe, running
from .staircases import Flight, Staircases

_WARM_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A server to compare: ``NAME=FILE_OR_URL``, or the latter alone."""

    name: str
    where: str

    @staticmethod
    def parse(text: str) -> Entry:
        name, separator, where = text.partition("=")
        if separator and "/" not in name and name:
            return Entry(name, where)
        return Entry(Path(text).stem if "://" not in text else text.rstrip("/"), text)

    @property
    def is_url(self) -> bool:
        return "://" in self.where


@dataclass(frozen=True, slots=True)
class Task:
    """A workload, and its search, the rates to run, or the levels of its staircases."""

    load: LoadSpec
    settings: Settings | None
    rates: tuple[float, ...] = ()
    flight: Flight | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    folder: Folder
    entries: tuple[Entry, ...]
    tasks: tuple[Task, ...]
    objectives: tuple[Objectives, ...]
    budget: Budget
    rounds: int = 1
    num_gpus: int | None = None
    start_limit_s: float = 300.0
    accept_divergence: bool = False
    tell: bool = True
    api_key: str | None = None
    shares: tuple[float, ...] = ()  # of the budget, for each server; none: who comes first has all

    def run(self) -> bool:
        """Does what is left; returns whether nothing is. A server that fails leaves the others
        their turn. Raises PdserveError."""
        done = True
        failed: PdserveError | None = None
        for number in range(self.rounds):
            for entry, share in self._visits(number):
                part = replace(self, budget=self.budget.share(share))
                try:
                    part._visit(entry, number)
                except OutOfTime:
                    done = False
                    if not self.shares:
                        return False
                except (StartupError, Unreachable, ClientDied) as error:
                    live.tell(f"{entry.name}: {error}")
                    failed = failed or error
        if failed is not None:
            raise failed
        return done

    def _visits(self, number: int) -> Iterator[tuple[Entry, float]]:
        """Who has something left to do, with the share of what is left of the budget."""
        weights = dict(zip(self.entries, self.shares, strict=True)) if self.shares else {}
        left = [entry for entry in turned(self.entries, number) if self._left(entry, number)]
        for index, entry in enumerate(left):
            rest = sum(weights.get(one, 0.0) for one in left[index:])
            yield entry, weights[entry] / rest if weights else 1.0

    def _left(self, entry: Entry, number: int) -> bool:
        told = None if entry.is_url else config.load(Path(entry.where)).model_dump(mode="json")
        server = Server(entry.name, "", "", 1, 0, ours=True, deployment=told)
        return any(not self._is_done(server, task, number) for task in self.tasks)

    def _is_done(self, server: Server, task: Task, number: int) -> bool:
        if task.flight is not None:
            return self._staircases(server, number).is_done([task.flight])
        if task.settings is not None:
            return self._search(server, number).following(task.load, task.settings) is None
        return not self._rates_left(server, task, number)

    def _rates_left(self, server: Server, task: Task, number: int) -> list[float]:
        done = {
            run.load.rate
            for cell in cells(self.folder.runs())
            if (cell.server, cell.workload) == (server.name, task.load.workload)
            for run in cell.runs
            if run.round == number and run.fault is None
        }
        return [rate for rate in task.rates if rate not in done]

    def _visit(self, entry: Entry, number: int) -> None:
        shortest = min(task.load.duration_s for task in self.tasks)
        self.budget.require(shortest if entry.is_url else 2 * shortest)
        live.tell(f"round {number + 1}: {entry.name}")
        with self._server(entry) as server:
            self._check_answers(server)
            self._warm_up(server)
            flights = [task.flight for task in self.tasks if task.flight is not None]
            self._staircases(server, number).run(flights)
            for task in self.tasks:
                if self._is_done(server, task, number):
                    continue
                if task.settings is not None:
                    self._search(server, number).run(task.load, task.settings)
                else:
                    self._run_rates(server, task, number)

    def _run_rates(self, server: Server, task: Task, number: int) -> None:
        for rate in self._rates_left(server, task, number):
            load = replace(task.load, rate=rate)
            measure(
                self.folder,
                server,
                load,
                self.budget,
                api_key=self.api_key,
                round_number=number,
            )

    def _search(self, server: Server, number: int) -> Search:
        return Search(
            self.folder,
            server,
            self.objectives,
            self.budget,
            self.api_key,
            round=number,
            tell=self.tell,
        )

    def _staircases(self, server: Server, number: int) -> Staircases:
        return Staircases(
            self.folder,
            server,
            self.objectives,
            self.budget,
            self.api_key,
            round=number,
            tell=self.tell,
        )

    @contextlib.contextmanager
    def _server(self, entry: Entry) -> Iterator[Server]:
        if entry.is_url:
            yield probe(entry.where, name=entry.name, num_gpus=self.num_gpus or 1)
            return
        log = self.folder.path / f"{entry.name}.log"
        with running(
            Path(entry.where),
            entry.name,
            log,
            start_limit_s=self.start_limit_s,
            num_gpus=self.num_gpus,
        ) as server:
            yield server

    def _check_answers(self, server: Server) -> None:
        """Only of servers of ours: for any other one the weights need not be the same."""
        known = self.folder.answers()
        if not server.ours or server.name in known:
            return
        maker = PromptMaker(vocab_size=self.tasks[0].load.vocab_size)
        known[server.name] = answers(server, maker, self.api_key)
        self.folder.keep_answers(server.name, known[server.name])
        found = differences(known)
        if found and not self.accept_divergence:
            words = "; ".join(str(one) for one in found)
            raise PdserveError(
                f"greedy answers differ: {words}. Under bf16 a near-tie may fall differently: "
                "--accept-divergence goes on and says so in the report"
            )

    def _warm_up(self, server: Server) -> None:
        """The first load after a start counts for nobody: kernels and caches are cold."""
        task = self.tasks[0]
        rate = task.rates[0] if task.settings is None else task.settings.start
        load = warming(task.load, rate)
        length = load.duration_s
        self.budget.require(length)
        with live.watched(f"{server.name} warm-up", length) as watch:
            perform(server, load, api_key=self.api_key, watch=watch)


def warming(load: LoadSpec, rate: float) -> LoadSpec:
    """A few seconds of it, evenly, with one request at the least."""
    length = max(min(_WARM_UP_S, load.duration_s), 1.5 / rate)
    arrivals = load.arrivals if load.arrivals == "trace" else "constant"
    return replace(load, rate=rate, arrivals=arrivals, duration_s=length, warmup_s=0.0, seed=987)


def turned(entries: Sequence[Entry], number: int) -> list[Entry]:
    """So that no server is always the first, or always after the same one."""
    shift = number % len(entries)
    order = [*entries[shift:], *entries[:shift]]
    return order if number % 2 == 0 else order[::-1]


def checked(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two servers are called {twice[0]}; name them: NAME=FILE")
    return tuple(entries)
