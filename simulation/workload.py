"""What arrives: synthetic requests, and those of public traces. Deterministic by seed."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ..core.errors import ConfigError

TRACE_BLOCK = 512  # tokens that one hash id of a Mooncake trace stands for
NOT_JUDGED = -1  # as a phase
WARM_UP = 0.2  # of the requests, from the start: an empty fleet serves anybody


@dataclass(frozen=True, slots=True)
class Arrival:
    """``time`` in seconds; lengths in tokens; ``block_hashes`` name the prompt's full blocks. What
    comes in one ``phase`` of a load is judged by itself."""

    time: float
    prompt: int
    output: int
    ttft_ms: float = 500.0
    tpot_ms: float = 30.0
    block_hashes: tuple[bytes, ...] = ()
    phase: int = 0


@dataclass(frozen=True, slots=True)
class Length:
    """Of one request: its times (s) are those of the trace, or 0."""

    prompt: int
    output: int
    time: float = 0.0
    hash_ids: tuple[int, ...] = ()


def synthetic(prompt: int, output: int, count: int, seed: int) -> list[Length]:
    """Lengths drawn evenly between a half and one and a half of these means."""
    rng = random.Random(f"lengths {seed}")

    def around(mean: int) -> int:
        return max(1, round(rng.uniform(0.5, 1.5) * mean))

    return [Length(around(prompt), around(output)) for _ in range(count)]


def read_trace(path: Path) -> list[Length]:
    """A trace in Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON
    lines (timestamp in ms, input_length, output_length, hash_ids), plain or gzipped."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a trace: {error}") from error
    try:
        rows = list(_mooncake(text) if text.lstrip().startswith("{") else _azure(text))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a trace; allowed: a CSV with TIMESTAMP, ContextTokens and "
            "GeneratedTokens, or JSON lines with timestamp, input_length and output_length"
        ) from error
    if not rows:
        raise ConfigError(f"{path}: a trace without requests")
    rows.sort(key=lambda row: row.time)
    start = rows[0].time
    return [replace(row, time=row.time - start) for row in rows]


def _azure(text: str) -> Iterator[Length]:
    for row in csv.DictReader(io.StringIO(text)):
        stamp = row["TIMESTAMP"][:26]  # seven digits of a second's fraction: one too many
        moment = datetime.fromisoformat(stamp).timestamp()
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        yield Length(max(1, prompt), max(1, output), moment)


def _mooncake(text: str) -> Iterator[Length]:
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            prompt, output = int(row["input_length"]), int(row["output_length"])
            ids = tuple(int(name) for name in row.get("hash_ids", ()))
            yield Length(max(1, prompt), max(1, output), float(row["timestamp"]) / 1e3, ids)


def poisson(lengths: Sequence[Length], rate: float, count: int, seed: int) -> list[Length]:
    """``count`` of them, in order and from the start again, at a Poisson process's times."""
    rng = random.Random(f"times {seed}")
    now = 0.0
    made = []
    for length in itertools.islice(itertools.cycle(lengths), count):
        now += rng.expovariate(rate)
        made.append(replace(length, time=now))
    return made


def rescaled(lengths: Sequence[Length], rate: float, count: int) -> list[Length]:
    """The first ``count`` of a trace with its own bursts, sped up or slowed to ``rate``."""
    chosen = list(lengths[:count])
    span = chosen[-1].time - chosen[0].time
    if span <= 0:
        raise ConfigError("a trace needs requests at different times; give --poisson")
    factor = (len(chosen) - 1) / span / rate
    return [replace(length, time=length.time * factor) for length in chosen]


def arrivals(
    lengths: Sequence[Length], ttft_ms: float, tpot_ms: float, block_size: int = 0
) -> list[Arrival]:
    """With a ``block_size`` the blocks get the names that the trace's hash ids give them. The first
    ``WARM_UP`` of them are not judged."""
    warm_up = int(len(lengths) * WARM_UP)
    return [
        Arrival(
            row.time,
            row.prompt,
            row.output,
            ttft_ms,
            tpot_ms,
            _names(row, block_size) if block_size else (),
            NOT_JUDGED if index < warm_up else 0,
        )
        for index, row in enumerate(lengths)
    ]


def shifting(
    kinds: Sequence[Sequence[Length]],
    rates: Sequence[float],
    ttft_ms: float,
    tpot_ms: float,
    *,
    phases: int,
    phase_s: float,
    seed: int,
) -> list[Arrival]:
    """So many phases of ``phase_s`` seconds, in turn of each of the ``kinds`` at its rate, each a
    Poisson process. The first of each kind is not judged: the fleet is empty, and has
    learned nothing."""
    made = []
    turns = [itertools.cycle(kind) for kind in kinds]
    for phase in range(phases):
        rng = random.Random(f"times {seed} {phase}")
        kind = phase % len(kinds)
        start, now = phase * phase_s, rng.expovariate(rates[kind])
        judged = phase if phase >= len(kinds) else NOT_JUDGED
        while now < phase_s:
            row = next(turns[kind])
            made.append(
                Arrival(start + now, row.prompt, row.output, ttft_ms, tpot_ms, phase=judged)
            )
            now += rng.expovariate(rates[kind])
    return made


def _names(row: Length, block_size: int) -> tuple[bytes, ...]:
    per_id = TRACE_BLOCK // block_size
    names = [b"%d/%d" % (name, part) for name in row.hash_ids for part in range(per_id)]
    return tuple(names[: row.prompt // block_size])
