"""What is seen while a run goes on: a bar, and a line of how it is doing."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .load import Progress

_PLAIN_S = 10.0  # between lines where nobody's terminal shows a bar

console = Console(stderr=True, highlight=False)


def tell(text: str) -> None:
    """A line above the bar."""
    console.print(text, markup=False)


@contextlib.contextmanager
def watched(title: str, duration_s: float) -> Iterator[Callable[[Progress], None]]:
    """A function that shows how far the run is, for as long as the block runs."""
    started = time.monotonic()
    if not console.is_terminal:
        yield _plain(title, started)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=duration_s, state="")

        def show(progress: Progress) -> None:
            elapsed = time.monotonic() - started
            bars.update(task, completed=min(elapsed, duration_s), state=line(progress, elapsed))

        yield show


def _plain(title: str, started: float) -> Callable[[Progress], None]:
    told = started

    def show(progress: Progress) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _PLAIN_S:
            told = now
            tell(f"{title}: {now - started:.0f} s: {line(progress, now - started)}")

    return show


def line(progress: Progress, elapsed_s: float) -> str:
    ttft = f"TTFT {statistics.median(progress.ttfts_ms):.0f} ms" if progress.ttfts_ms else "TTFT -"
    failed = f" {progress.failed} failed" if progress.failed else ""
    rate = progress.tokens / max(elapsed_s, 1e-9)
    return f"{progress.done} done {progress.running} running{failed}  {ttft}  {rate:.0f} tok/s"
