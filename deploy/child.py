"""One life of one child process: started in a group of its own, its lines passed on.

A child is in its own process group, so that Ctrl-C at a terminal reaches the supervisor
alone, which then ends the children in order; and so that what a child started itself goes
with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from signal import Signals

from ..core.clock import Clock, monotonic
from ..core.supervised import SENTENCE, UP

Emit = Callable[[str], None]  # takes one line, without its end

INTERRUPTED = 130  # the exit code of who was told twice
_MAX_LINE = 8 << 10  # bytes; a longer line is passed on in parts
_MAX_TAIL = 20  # lines
_CLOSING_S = 1.0  # for the last lines to arrive after the end of a child


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. ``env`` is added to the supervisor's own."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Child:
    """Starts the command (OSError where the system will not) and watches it from the running loop.

    Made in the main thread: a child that ties its life to its parent's is tied to the thread
    that started it. ``wait`` must be awaited to its end.
    """

    def __init__(self, command: Command, emit: Emit, clock: Clock = monotonic) -> None:
        self.command = command
        self.sentence: str | None = None  # why it gave up, in its own words
        self.up_at: float | None = None  # when it said first that it is of use
        self._emit = emit
        self._clock = clock
        self._tail: deque[str] = deque(maxlen=_MAX_TAIL)
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()  # its output is at an end
        self._rest = b""
        self._process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **command.env},
            process_group=0,
        )
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._loop.add_reader(self._out, self._on_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, negative for a signal. What the child itself had started is ended."""
        await self._exited.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), _CLOSING_S)
        self._close_output()
        code = self._process.returncode
        assert code is not None
        return code

    def signal(self, number: Signals) -> None:
        if not self._exited.is_set():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the whole group at once."""
        if not self._exited.is_set():
            os.killpg(self.pid, Signals.SIGKILL)

    @property
    def last_words(self) -> str:
        """Its own sentence, else the last line it wrote, else nothing."""
        if self.sentence is not None:
            return self.sentence
        return next((line.strip() for line in reversed(self._tail) if line.strip()), "")

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.killpg(self.pid, Signals.SIGKILL)  # not reaped yet, so the number is still its own
        self._process.wait()
        self._exited.set()

    def _on_output(self) -> None:
        data = os.read(self._out, 1 << 16)
        if not data:
            self._close_output()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._rest) > _MAX_LINE:
            self._take(self._rest)
            self._rest = b""

    def _close_output(self) -> None:
        if not self._closed.is_set():
            self._loop.remove_reader(self._out)
            assert self._process.stdout is not None
            self._process.stdout.close()
            if self._rest:
                self._take(self._rest)
            self._closed.set()

    def _take(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r")
        if line.startswith(SENTENCE):
            self.sentence = line.removeprefix(SENTENCE)  # the supervisor says it
            return
        if line == UP:
            self.up_at = self._clock() if self.up_at is None else self.up_at
            return
        for start in range(0, max(1, len(line)), _MAX_LINE):
            part = line[start : start + _MAX_LINE]
            self._tail.append(part)
            self._emit(f"{self.command.name} | {part}")


def ended_from_outside(code: int) -> bool:
    """It was told to end, or killed: no fault of its own ends a child so."""
    outside = (Signals.SIGKILL, Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP)
    return code in (0, INTERRUPTED) or -code in outside


def describe_exit(code: int) -> str:
    """``exit code 1`` or ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
