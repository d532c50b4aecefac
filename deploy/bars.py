"""Bars at a terminal for what children are long at, with their log lines above them.

Where stderr is no terminal there are none, and children are not asked to say how far they are.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from ..core.progress import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bars:
    """``take`` each line of a child; ``close`` when all are up."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self.wanted = self._stream.isatty()
        self._drawn: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def take(self, line: str) -> bool:
        """Whether the line, ``name | text``, was about progress, and is drawn."""
        name, _, text = line.partition(" | ")
        step = Step.parse(text)
        if step is None:
            return False
        if self.wanted:
            self._draw(name, step)
        return True

    def write(self, line: str) -> bool:
        """Above the bars; False where there are none."""
        if self._drawn is None:
            return False
        self._drawn.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return True

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None
            self._tasks = {}

    def _draw(self, name: str, step: Step) -> None:
        drawn = self._drawn = self._drawn or self._begun()
        shown = f"{name}: {step.what}"
        task = self._tasks.get(shown)
        if task is None:
            task = self._tasks[shown] = drawn.add_task(shown, total=None)
        if step.percent is not None:
            drawn.update(task, total=100, completed=step.percent)
        drawn.refresh()
        if step.percent == 100:
            drawn.remove_task(self._tasks.pop(shown))
        if not self._tasks:
            self.close()

    def _begun(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            console=Console(file=self._stream, highlight=False),
            transient=True,
        )
        drawn.start()
        return drawn
