"""Timing on a GPU: a case, a variant of it, and how it is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DEVICE = "cuda"


@dataclass(frozen=True, slots=True)
class Timing:
    """``rate`` in ``unit``; ``ratio`` is the floor's time over this one's."""

    case: str
    variant: str
    micros: float
    rate: float
    unit: str
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to time; its inputs are made when it runs."""

    case: str
    variant: str
    run: Callable[[], Timing]


def graph_micros(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Time of one call: the median replay of a graph that holds all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return event_micros(graph.replay, replays) / len(calls)


def event_micros(
    call: Callable[[], object], repeats: int = 7, burst: int = 1, *, warmed: bool = False
) -> float:
    """The median time of a call between two events, after one that does not count where it is
    not ``warmed`` already.

    With a ``burst`` that many follow each other between the events, so that the time which the
    CPU takes to launch one counts only where it is longer than what the GPU takes.
    """
    if not warmed:
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(burst):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / burst)
    return float(statistics.median(times))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy."""
    source = torch.randn(1 << 29, device=DEVICE)  # 2 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_micros(lambda: target.copy_(source)) * 1e6
