"""One run: a load against a server, and the file that keeps all of it.

The file is complete: every record, the load and the workload it came from, how the client
did. Whatever a report says can be computed from it again.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from . import arrivals, workloads
from .clients import run_clients
from .load import GiveUp, Levels, Orders, Progress
from .measures import Objectives, Summary, attainment, summarize
from .prompts import PromptKind, PromptMaker
from .records import Cause, ClientHealth, Record
from .servers import Server
from .stairs import Step, slot
from .stream import Target
from .workloads import Session, Workload

SCHEMA = "pdserve.bench.run/1"
_DRAIN_S = 30.0  # beside a request's own limit, for the client processes to end


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """How requests come. ``rate`` in 1/s; None: a trace's own times, or a closed loop."""

    workload: str
    rate: float | None = None
    arrivals: str = "poisson"  # poisson, gamma, constant, trace
    burstiness: float = 1.0
    time_scale: float = 1.0
    concurrency: int | None = None
    duration_s: float = 30.0
    warmup_s: float = 3.0
    prompts: PromptKind = PromptKind.TOKENS
    vocab_size: int = 32000
    lengths: float = 1.0
    seed: int = 0
    clients: int = 1
    timeout_s: float = 120.0
    max_requests: int = 4000  # of a closed loop
    ignore_eos: bool = True
    temperature: float = 0.0
    stairs: tuple[float, ...] = ()  # the run held these rates in turn; ``rate`` is one of them

    def check(self) -> None:
        """Raises ConfigError where the options can't go together."""
        if not self.duration_s > self.warmup_s >= 0:
            raise ConfigError(
                f"--warmup: found {self.warmup_s:g} s in a run of {self.duration_s:g} s; "
                "allowed: less than --duration"
            )
        if self.concurrency is not None and self.rate is not None:
            raise ConfigError("--rate is an open loop and --concurrency a closed one: give one")
        if self.concurrency is None and self.arrivals != "trace" and not (self.rate or 0) > 0:
            raise ConfigError("give --rate (requests a second), --concurrency or --arrivals trace")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"--rate: found {self.rate}; allowed: more than 0")

    def sessions(self, context: int) -> list[Session]:
        """All that is to be asked, drawn ahead. ``context``: the server's, 0 where unknown."""
        self.check()
        maker = PromptMaker(self.prompts, self.vocab_size, self.seed)
        found = workloads.parse(self.workload, maker, lengths=self.lengths, context=context)
        sessions = found.sessions(self._times(found), self.duration_s)
        if not sessions:
            raise ConfigError("not one request arrives in that time: raise --rate or --duration")
        return sessions

    def _times(self, found: Workload) -> list[float]:
        if self.concurrency is not None:
            return [0.0] * self.max_requests
        if self.arrivals == "trace":
            if not found.times:
                raise ConfigError(f"--arrivals trace: {self.workload} is no trace with times")
            scale = self.time_scale
            if self.rate is not None:
                scale = arrivals.scale_for(found.times, self.rate)
            return arrivals.replayed(found.times, self.duration_s, scale=scale)
        assert self.rate is not None
        if self.arrivals == "constant":
            return arrivals.constant(self.rate, self.duration_s)
        burstiness = self.burstiness if self.arrivals == "gamma" else 1.0
        return arrivals.gamma(self.rate, self.duration_s, burstiness, self.seed)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    server: Server
    load: LoadSpec
    window: tuple[float, float]
    records: tuple[Record, ...]
    health: ClientHealth
    gave_up: Objectives | None  # it was stopped, because these could not be met any more
    created: float
    round: int = 0
    told: Objectives | None = None  # what each request said that it should meet

    @property
    def fault(self) -> str | None:
        """Why it is invalid, None where it counts."""
        return self.health.fault

    def counted(self) -> list[Record]:
        start, end = self.window
        return [record for record in self.records if start <= record.due < end]

    def attained(self, objectives: Objectives) -> float | None:
        """The share that meets both; 0 where the run was given up for the like of them. None
        where it can't tell: it was given up for looser ones, or its server told of others."""
        if self.told is not None and self.told != objectives:
            return None
        if self.gave_up is not None:
            return 0.0 if objectives.no_looser_than(self.gave_up) else None
        return attainment(self.counted(), objectives, self.window[1] - self.window[0]).both

    def summary(self, objectives: Sequence[Objectives]) -> Summary:
        return summarize(self.records, self.window, objectives, seed=self.load.seed)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        data = {
            "schema": SCHEMA,
            "created": self.created,
            "round": self.round,
            "server": asdict(self.server),
            "load": self.load.as_json(),
            "window": self.window,
            "client": self.health.as_json(),
            "gave_up": None if self.gave_up is None else asdict(self.gave_up),
            "told": None if self.told is None else asdict(self.told),
            "records": [record.as_json() for record in self.records],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_bytes(gzip.compress(json.dumps(data).encode(), mtime=0))
        draft.replace(path)

    @staticmethod
    def read(path: Path) -> Run:
        """Raises ConfigError for a file that is none of these."""
        try:
            raw = path.read_bytes()
            data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
            if data["schema"] != SCHEMA:
                raise ConfigError(f"{path}: its schema is {data['schema']}, known is {SCHEMA}")
            load = data["load"]
            gave_up, client = data["gave_up"], data["client"]
            return Run(
                server=Server(**data["server"]),
                load=LoadSpec(
                    **load
                    | {
                        "prompts": PromptKind(load["prompts"]),
                        "stairs": tuple(load.get("stairs", ())),
                    }
                ),
                window=(data["window"][0], data["window"][1]),
                records=tuple(Record.of_json(one) for one in data["records"]),
                health=ClientHealth(client["lateness_ms"], client["stall_ms"]),
                gave_up=None if gave_up is None else Objectives(**gave_up),
                created=data["created"],
                round=data["round"],
                told=None if data["told"] is None else Objectives(**data["told"]),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a run of this benchmark ({error})") from error


def perform(
    server: Server,
    load: LoadSpec,
    *,
    api_key: str | None = None,
    objectives: Objectives | None = None,
    target: float = 0.9,
    round_number: int = 0,
    told: Objectives | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Runs it. With ``objectives`` it is given up once ``target`` can't be reached any more."""
    sessions = load.sessions(server.max_context)
    window = (load.warmup_s, load.duration_s)
    give_up = None
    if objectives is not None:
        counted = sum(
            len(one.asks) for one in sessions if window[0] <= one.at < window[1]
        )  # later turns may fall out of the window: then it stops a little late
        give_up = GiveUp(objectives, math.floor((1 - target) * counted + 1e-9))
    target_of = _target(server, load, api_key, told)
    orders = Orders(target_of, tuple(enumerate(sessions)), window, load.concurrency, give_up)
    limit = load.duration_s + load.timeout_s + _DRAIN_S
    outcome = run_clients(orders, load.clients, watch, limit)
    if load.concurrency is not None and outcome.records:  # it may have run out of requests
        last = max(record.due for record in outcome.records)
        window = (window[0], min(window[1], last + 1e-6))
    return Run(
        server=server,
        load=load,
        window=window,
        records=outcome.records,
        health=outcome.health,
        gave_up=objectives if outcome.gave_up else None,
        created=time.time(),
        round=round_number,
        told=told,
    )


def climb(
    server: Server,
    load: LoadSpec,
    stairs: Sequence[Step],
    *,
    objectives: Objectives,
    target: float,
    api_key: str | None = None,
    round_number: int = 0,
    told: Objectives | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> list[Run]:
    """A staircase, as one run for each level, up to the first that misses ``objectives``. A
    level's records are those of all that was under way in it."""
    rates = tuple(step.rate for step in stairs)
    sessions: list[Session] = []
    allowed = []
    for step in stairs:
        part = replace(
            load,
            rate=step.rate,
            duration_s=step.length_s,
            seed=load.seed * 1_000_000 + slot(step.rate),
        )
        drawn = [replace(one, at=one.at + step.start) for one in part.sessions(server.max_context)]
        counted = sum(len(one.asks) for one in drawn if step.judged <= one.at < step.end)
        allowed.append(math.floor((1 - target) * counted + 1e-9))
        sessions += drawn
    end = stairs[-1].end
    orders = Orders(
        _target(server, load, api_key, told),
        tuple(enumerate(sessions)),
        (0.0, end),
        levels=Levels(objectives, tuple(step.window for step in stairs), tuple(allowed)),
    )
    outcome = run_clients(orders, load.clients, watch, end + load.timeout_s + _DRAIN_S)
    made: list[Run] = []
    for number, step in enumerate(stairs):
        records = tuple(r for r in outcome.records if r.due < step.end and r.ended >= step.start)
        run = Run(
            server=server,
            load=replace(
                load,
                rate=step.rate,
                duration_s=step.end,
                warmup_s=step.judged,
                stairs=rates,
            ),
            window=step.window,
            records=records,
            health=outcome.health,
            gave_up=None,
            created=time.time() + number / 1e3,
            round=round_number,
            told=told,
        )
        if not run.counted() or any(r.failure is Cause.GIVEN_UP for r in run.counted()):
            break  # it was not held to its end
        made.append(run)
        if attainment(run.counted(), objectives, 1.0).both < target:
            break  # what is above it had its backlog
    return made


def _target(server: Server, load: LoadSpec, api_key: str | None, told: Objectives | None) -> Target:
    return Target(
        server.url,
        server.model,
        api_key,
        load.timeout_s,
        temperature=load.temperature,
        ignore_eos=load.ignore_eos,
        slo=None if told is None else (told.ttft_ms, told.tpot_ms),
    )
