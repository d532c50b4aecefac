"""When a request went through its stages: plain data, that metrics, spans, pages and clients read.

    arrived -> tokenized -> placed -> started -> first_token -> handed_over -> second_token
      -> last_token -> finished

``Marks`` grow while the request lives; ``Timeline`` is what they were at its end. A mark is
a time on the router's clock, or None where the request never came so far. A replay before
the first token sets ``placed`` and ``started`` anew, so that the stages stay in this order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..core.config import Policy
from ..core.messages import TransferDone
from .snapshot import Forecast, Objectives

MAX_RECENT = 4096  # timelines that are kept to be asked for


class Outcome(StrEnum):
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"  # with 429: not for what it is, but for how much there is to do
    ABORTED = "aborted"  # the client has hung up, or stopped reading


class Stage(StrEnum):
    """What a request is doing between two marks, in this order."""

    TOKENIZE = "tokenize"  # its body is read and parsed, its prompt becomes tokens
    QUEUE = "queue"  # no worker can take it yet
    PREFILL_QUEUE = "prefill_queue"  # its worker has other prompts before it
    PREFILL = "prefill"  # the prompt is computed
    HAND_OVER = "hand_over"  # what is left of the transfer: the part that the client waits for
    DECODE_QUEUE = "decode_queue"  # until the step that it joined has drawn a token
    DECODE = "decode"  # the rest of the answer


@dataclass(slots=True)
class Marks:
    """Of a request that lives. ``token`` is called for each token that the client gets."""

    arrived: float
    tokenized: float
    placed: float | None = None
    started: float | None = None
    first_token: float | None = None
    handed_over: float | None = None
    second_token: float | None = None
    last_token: float | None = None
    gap: float | None = None  # seconds between the last two tokens

    def place(self, now: float) -> None:
        if self.first_token is None:
            self.placed, self.started = now, None

    def start(self, now: float) -> None:
        if self.first_token is None and self.started is None:
            self.started = now

    def hand_over(self, now: float) -> None:
        """A worker that did not prefill has it."""
        if self.handed_over is None:
            self.handed_over = now

    def token(self, now: float) -> None:
        if self.started is None:
            self.started = now  # the word of it is late, or lost
        if self.first_token is None:
            self.first_token = now
        elif self.second_token is None:
            self.second_token = now
        if self.last_token is not None:
            self.gap = now - self.last_token
        self.last_token = now


@dataclass(frozen=True, slots=True)
class Timeline:
    """Of a request that is over. ``prefill`` and ``decode`` are the workers of its last attempt,
    the same one twice where one did the whole; ``error`` is the code of what ended it."""

    request_id: str
    call_id: str
    chat: bool
    traceparent: str | None
    outcome: Outcome
    error: str | None
    prefill: str | None
    decode: str | None
    num_attempts: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    arrived: float
    tokenized: float
    placed: float | None
    started: float | None
    first_token: float | None
    handed_over: float | None
    second_token: float | None
    last_token: float | None
    finished: float
    transfer: TransferDone | None = None  # where its account came before the end
    forecast: Forecast | None = None  # of the placement that drew the first token
    objectives: Objectives | None = None  # its own

    @property
    def route(self) -> Policy | None:
        if self.prefill is None:
            return None
        return Policy.COLOCATED if self.prefill == self.decode else Policy.DISAGGREGATED

    @property
    def ttft(self) -> float | None:
        return self.first_token - self.arrived if self.first_token is not None else None

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token, which has no gap."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)

    @property
    def total(self) -> float:
        return self.finished - self.arrived

    def met(self, default: Objectives) -> tuple[bool, bool]:
        """Whether it was done within its objective of TTFT, and of TPOT; ``default`` holds for
        a request that has none of its own. A failed one may have been in time for the first."""
        objectives = self.objectives or default
        ttft, tpot = self.ttft, self.tpot
        return (
            ttft is not None and 1e3 * ttft <= objectives.ttft_ms,
            self.outcome is Outcome.DONE and (tpot is None or 1e3 * tpot <= objectives.tpot_ms),
        )

    def good(self, default: Objectives) -> bool:
        """Done, within both."""
        return self.met(default) == (True, True)

    def stages(self) -> list[tuple[Stage, float, float]]:
        """Each stage that was begun, from when to when. They follow each other without a gap;
        the last one ends with the request."""
        split = self.route is Policy.DISAGGREGATED
        one_token = self.outcome is Outcome.DONE and self.num_output_tokens == 1
        writing = None if one_token else self.first_token
        begun = [
            (Stage.TOKENIZE, self.arrived),
            (Stage.QUEUE, self.tokenized),
            (Stage.PREFILL_QUEUE, self.placed),
            (Stage.PREFILL, self.started),
            (Stage.HAND_OVER, writing if split else None),
            (Stage.DECODE_QUEUE, self.handed_over if split and not one_token else None),
            (Stage.DECODE, self.second_token if split else writing),
        ]
        known = [(stage, start) for stage, start in begun if start is not None]
        ends = [start for _, start in known[1:]]
        last = self.last_token if self.outcome is Outcome.DONE else self.finished
        ends.append(last if last is not None else self.finished)
        return [(stage, start, end) for (stage, start), end in zip(known, ends, strict=True)]

    def shown(self) -> dict[str, Any]:
        """As JSON: marks and times in milliseconds, marks since the arrival."""

        def since(mark: float | None) -> float | None:
            return None if mark is None else round(1e3 * (mark - self.arrived), 3)

        def milliseconds(seconds: float | None) -> float | None:
            return None if seconds is None else round(1e3 * seconds, 3)

        return {
            "request_id": self.request_id,
            "outcome": self.outcome,
            "error": self.error,
            "route": self.route,
            "prefill_worker": self.prefill,
            "decode_worker": self.decode,
            "attempts": self.num_attempts,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "ttft_ms": milliseconds(self.ttft),
            "tpot_ms": milliseconds(self.tpot),
            "total_ms": milliseconds(self.total),
            "marks_ms": {
                "tokenized": since(self.tokenized),
                "placed": since(self.placed),
                "started": since(self.started),
                "first_token": since(self.first_token),
                "handed_over": since(self.handed_over),
                "second_token": since(self.second_token),
                "last_token": since(self.last_token),
                "finished": since(self.finished),
            },
            "objectives": None
            if self.objectives is None
            else {"ttft_ms": self.objectives.ttft_ms, "tpot_ms": self.objectives.tpot_ms},
            "forecast": None
            if self.forecast is None
            else {
                "ttft_ms": round(self.forecast.ttft_ms, 3),
                "tpot_ms": round(self.forecast.tpot_ms, 3),
            },
            "transfer": _shown_transfer(self.transfer),
            "stages": [
                {"stage": stage, "start_ms": since(start), "end_ms": since(end)}
                for stage, start, end in self.stages()
            ],
        }


def _shown_transfer(done: TransferDone | None) -> dict[str, Any] | None:
    if done is None:
        return None
    return {
        "medium": done.medium,
        "bytes": done.num_bytes,
        "grant_wait_ms": round(1e3 * done.waited_s, 3),
        "moving_ms": round(1e3 * done.moving_s, 3),
        "exposed_ms": round(1e3 * done.exposed_s, 3),
    }


class Recent:
    """The last timelines, by the call that they were part of."""

    def __init__(self, limit: int = MAX_RECENT) -> None:
        self._limit = limit
        self._order: deque[str] = deque()  # a call's id for each timeline, the oldest first
        self._by_call: OrderedDict[str, list[Timeline]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Timeline]:
        for timelines in self._by_call.values():
            yield from timelines

    def keep(self, timeline: Timeline) -> None:
        self._order.append(timeline.call_id)
        self._by_call.setdefault(timeline.call_id, []).append(timeline)
        if len(self._order) > self._limit:
            call_id = self._order.popleft()
            timelines = self._by_call[call_id]
            del timelines[0]
            if not timelines:
                del self._by_call[call_id]

    def of(self, call_id: str) -> list[Timeline]:
        """Of each choice of that call that is over."""
        return list(self._by_call.get(call_id, ()))
