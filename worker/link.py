"""The worker's end of the control socket: hello, welcome, beats, silence.

    SEEKING -- Welcome --> JOINED -- silence of ``dead_after`` --> SEEKING (the router is lost)
       \\-- Refused --> REFUSED

While seeking it says Hello again and again: the router may not be up yet, or be another
one. Pure: the I/O thread owns the socket and the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ..core.messages import Hello, Refused, ToRouter, ToWorker, Welcome, WorkerBeat

COMPLAIN_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """Seconds. ``dead_after`` is ten beats: a busy router is late, not dead."""

    beat_every: float = 0.5
    hello_every: float = 0.5
    dead_after: float = 5.0


class LinkState(Enum):
    SEEKING = auto()
    JOINED = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Tick:
    """What is due: a message to send, and whether the router was lost just now."""

    message: ToRouter | None = None
    router_lost: bool = False


class RouterLink:
    """When to say what to the router, and whether it is there."""

    def __init__(self, hello: Hello, timing: LinkTiming, now: float) -> None:
        self._hello = hello
        self._timing = timing
        self._state = LinkState.SEEKING
        self._router_epoch: int | None = None
        self._heard = now
        self._next_word = now
        self._complained = False
        self.refusal: Refused | None = None

    @property
    def state(self) -> LinkState:
        return self._state

    def next_deadline(self) -> float:
        return self._next_word

    def complaint(self, now: float) -> float | None:
        """Seconds without an answer to Hello, once they are worth a word: each search one time."""
        silence = now - self._heard
        if self._state is not LinkState.SEEKING or self._complained or silence < COMPLAIN_AFTER_S:
            return None
        self._complained = True
        return silence

    def heard(self, message: ToWorker, now: float) -> bool:
        """Takes note of any message; True where the router turns out to be another than before."""
        self._heard = now
        replaced = False
        match message:
            case Welcome(router_epoch):
                replaced = self._router_epoch not in (None, router_epoch)
                self._router_epoch = router_epoch
                self._state = LinkState.JOINED
                self._complained = False
            case Refused():
                self._state = LinkState.REFUSED
                self.refusal = message
            case _:
                pass
        return replaced

    def tick(self, beat: WorkerBeat | None, now: float) -> Tick:
        """``beat`` is the worker's state of now; None where the worker hangs and must not be
        taken for alive."""
        lost = self._state is LinkState.JOINED and now - self._heard > self._timing.dead_after
        if lost:
            self._state = LinkState.SEEKING
            self._next_word = now
        if now < self._next_word or self._state is LinkState.REFUSED:
            return Tick(router_lost=lost)
        if self._state is LinkState.SEEKING:
            self._next_word = now + self._timing.hello_every
            return Tick(self._hello, lost)
        self._next_word = now + self._timing.beat_every
        return Tick(beat, lost)
