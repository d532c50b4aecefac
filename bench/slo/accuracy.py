"""How exact the client is: 200 streams from a server that records when it sent each token.

    python -P -m pdserve.bench.slo.accuracy --out docs/results/client-accuracy.json

The server is a process of its own. Errors are what the client measured less what the server's
record says: for a TTFT, from the request's arrival (when it was due) to the first send.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from .known_server import KnownServer
from .load import Load, Orders
from .measures import token_gaps, tpot, ttft
from .prompts import PromptMaker
from .records import Record
from .stream import Target
from .workloads import Ask, Session

STREAMS, TOKENS = 200, 48
FIRST_S, GAP_S = 0.1, 0.1
_SPREAD_S = 1.0  # the arrivals: all streams overlap for most of their time


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdserve.bench.slo.accuracy")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    url = str(ours.recv())
    rounds = [measure(url, seed) for seed in range(arguments.rounds)]
    server.terminate()
    server.join()
    report = {
        "streams": STREAMS,
        "tokens": TOKENS,
        "first_ms": 1e3 * FIRST_S,
        "gap_ms": 1e3 * GAP_S,
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    return 0


def _serve(pipe: Connection[object, object]) -> None:
    async def serve() -> None:
        async with KnownServer(FIRST_S, GAP_S).serving() as url:
            pipe.send(url)
            await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def measure(url: str, seed: int) -> dict[str, Any]:
    """One round: errors in ms at the median and at the 99th percentile, signed and absolute."""
    maker = PromptMaker(seed=seed)
    times = sorted(np.random.default_rng(seed).uniform(0, _SPREAD_S, STREAMS).tolist())
    sessions = tuple(
        (index, Session(at, (Ask(maker.piece(16, index), TOKENS),)))
        for index, at in enumerate(times)
    )
    orders = Orders(Target(url, "known"), sessions, (0.0, _SPREAD_S))
    start = time.monotonic() + 0.2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(Load(orders).run(start))
    assert all(record.failure is None for record in outcome.records), outcome.records
    return {
        "client": outcome.health.as_json(),
        **{name: _spread(values) for name, values in errors(outcome.records, start).items()},
    }


def errors(records: Sequence[Record], start: float) -> dict[str, list[float]]:
    """Measured less true, in ms."""
    found: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "ITL": []}
    for record in records:
        assert record.server is not None
        sent = [time - start for time in record.server["sent"]]
        measured, pace = ttft(record), tpot(record)
        assert measured is not None and pace is not None
        found["TTFT"].append(1e3 * (measured - (sent[0] - record.due)))
        found["TPOT"].append(1e3 * (pace - (sent[-1] - sent[0]) / (len(sent) - 1)))
        true = np.diff(sent)
        gaps = token_gaps(record)
        if len(gaps) == len(true):
            found["ITL"] += (1e3 * (np.array(gaps) - true)).tolist()
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    array = np.array(values)
    return {
        "count": len(values),
        "p50_ms": float(np.median(array)),
        "p50_abs_ms": float(np.median(np.abs(array))),
        "p99_abs_ms": float(np.percentile(np.abs(array), 99)),
        "max_abs_ms": float(np.abs(array).max()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
