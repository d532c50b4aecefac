"""What the client saw of one request: plain data, kept whole in every report."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Cause(StrEnum):
    """Why a request did not come to its end."""

    REFUSED = "refused"  # 429 or 503: the server has no room
    HTTP = "http"  # any other status than 200
    ERROR = "error"  # an error event in the stream
    CUT = "cut"  # the stream ended before the answer did
    EMPTY = "empty"  # an end without a single token
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    GIVEN_UP = "given up"  # the run was stopped: it could meet its objectives no more


@dataclass(frozen=True, slots=True)
class Record:
    """Times are seconds since the run's start. ``due`` is the arrival: when the request was to
    be sent, whether or not the client got round to it. ``events`` are (time, tokens) of each
    event that brought tokens; ``num_output`` is the server's own count where it gives one."""

    index: int
    due: float
    sent: float | None  # None: never
    events: tuple[tuple[float, int], ...]
    ended: float  # the last thing that was heard of it
    num_input: int
    num_output: int
    failure: Cause | None = None
    detail: str = ""
    turn: int = 0
    server: dict[str, Any] | None = None  # its timeline, where the server is ours

    @property
    def first(self) -> float | None:
        return self.events[0][0] if self.events else None

    @property
    def last(self) -> float | None:
        """When the last token came. Tokens without text show with the end of the stream."""
        if not self.events:
            return None
        counted = sum(tokens for _, tokens in self.events)
        return self.events[-1][0] if counted >= self.num_output else self.ended

    def as_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "due": _round(self.due),
            "sent": None if self.sent is None else _round(self.sent),
            "times": [_round(time) for time, _ in self.events],
            "tokens": [tokens for _, tokens in self.events],
            "ended": _round(self.ended),
            "num_input": self.num_input,
            "num_output": self.num_output,
            "failure": self.failure,
            "detail": self.detail,
            "turn": self.turn,
            "server": self.server,
        }

    @staticmethod
    def of_json(data: dict[str, Any]) -> Record:
        failure = data["failure"]
        return Record(
            index=data["index"],
            due=data["due"],
            sent=data["sent"],
            events=tuple(zip(data["times"], data["tokens"], strict=True)),
            ended=data["ended"],
            num_input=data["num_input"],
            num_output=data["num_output"],
            failure=Cause(failure) if failure is not None else None,
            detail=data["detail"],
            turn=data["turn"],
            server=data["server"],
        )


def _round(seconds: float) -> float:
    return round(seconds, 6)


MAX_LATENESS_MS = 20.0  # p99 of how late the client sent
MAX_STALL_MS = 100.0  # the longest time for which the client looked at nothing


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """How well the client kept its own times (ms). A client that lags measures itself."""

    lateness: dict[str, float] = field(default_factory=dict)  # p50, p99, max
    stall_ms: float = 0.0

    @property
    def fault(self) -> str | None:
        """Why the run is invalid, None where it is not."""
        late = self.lateness.get("p99", 0.0)
        if late > MAX_LATENESS_MS:
            return f"the client sent late: p99 {late:.1f} ms, allowed {MAX_LATENESS_MS:.0f}"
        if self.stall_ms > MAX_STALL_MS:
            return f"the client stalled for {self.stall_ms:.0f} ms, allowed {MAX_STALL_MS:.0f}"
        return None

    def as_json(self) -> dict[str, Any]:
        return {
            "lateness_ms": self.lateness,
            "stall_ms": self.stall_ms,
            "valid": self.fault is None,
            "fault": self.fault,
        }
