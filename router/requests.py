"""The life of one request, as a pure state machine: what happens goes in, effects come out.

    QUEUED -> PLACED -> STREAMING -> DONE | FAILED | ABORTED
      ^_________|__________|            replay: the attempt is lost, not the request

An attempt is lost when a worker that it needs dies, when a worker gives it up, or when a
worker's beats do not list it. The next one runs prompt + output so far, elsewhere or on
a restarted worker, and draws the same tokens. All that dies within one attempt is one
strike; tokens lost on the way are none, where the attempt has brought some. After two
strikes the request runs whole, alone on one worker; a third ends it. A worker that dies before
the attempt is known to have begun was hardly killed by it: no strike, for the first few times.

Tokens carry their absolute index in the output: each is emitted once, whoever sends it and
however often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..core.config import Policy
from ..core.errors import RequestError, Unavailable
from ..core.ids import Attempt, Task, WorkerRef
from ..core.lengths import AnswerLengths
from ..core.logs import fields
from ..core.messages import (
    Abort,
    AttemptFailed,
    FailureKind,
    Key,
    PeerAddress,
    Place,
    TokenItem,
    ToWorker,
    TransferDone,
)
from ..core.params import SamplingParams
from .snapshot import Forecast, Objectives, Placement, Wish
from .timeline import Marks, Outcome, Stage, Timeline

_TOO_MANY = 429  # HTTP's
MAX_STRIKES = 2  # after so many it runs alone
MAX_DOUBTS = 3  # deaths before it had begun; the word that it has may die with a worker, too

Order = tuple[WorkerRef, ToWorker]


class State(StrEnum):
    QUEUED = "queued"
    PLACED = "placed"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


_OVER = frozenset((State.DONE, State.FAILED, State.ABORTED))


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be generated. ``deadline`` is when it is over, done or not.

    ``call_id`` names the call that it is part of, which came at ``arrived``.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    deadline: float
    route: Policy | None = None
    call_id: str = ""
    traceparent: str | None = None  # the client's own, for spans
    chat: bool = False
    arrived: float | None = None  # None: when it is submitted
    objectives: Objectives | None = None  # its own; None: the deployment's
    priority: int = 0  # the lower, the earlier


class Request:
    """``orders`` of a call are what workers must be told; the caller tells those that live."""

    def __init__(self, ask: Ask, now: float) -> None:
        self.ask = ask
        self.marks = Marks(ask.arrived if ask.arrived is not None else now, now)
        self.state = State.QUEUED
        self.output: list[int] = []
        self.strikes = 0
        self._num_doubts = 0
        self.num_cached_tokens: int | None = None  # of the prompt, at the first attempt
        self.error: RequestError | None = None
        self.placement: Placement | None = None
        self.placed_at = 0.0
        self.key = Key(ask.request_id, 1)  # of the attempt
        self._limits_ms: tuple[float | None, float | None] = (None, None)  # TTFT left, TPOT
        self.block_names: list[bytes] = []  # of prompt and output, as far as they were needed
        self._num_before = 0  # tokens of the output that earlier attempts have drawn
        self._decoding = False  # the decode worker has all it needs from the other
        self._started = False  # the prefill of this attempt
        self._last_placement: Placement | None = None
        self._transfer: TransferDone | None = None  # the last one
        self._forecast: Forecast | None = None

    def __str__(self) -> str:
        """For the log: the attempt that the workers know, and the call that the client knows."""
        return f"{self.attempt} (call {self.ask.call_id})"

    @property
    def log_fields(self) -> dict[str, Any]:
        return fields(request_id=self.ask.call_id, attempt=str(self.attempt))

    @property
    def id(self) -> str:
        return self.ask.request_id

    @property
    def number(self) -> int:
        """Of the attempt."""
        return self.key.number

    @property
    def attempt(self) -> Attempt:
        return self.key.attempt

    @property
    def over(self) -> bool:
        return self.state in _OVER

    @property
    def num_tokens(self) -> int:
        return len(self.ask.prompt) + len(self.output)

    @property
    def prefilled(self) -> bool:
        """This attempt has drawn a token."""
        return len(self.output) > self._num_before

    @property
    def alone(self) -> bool:
        return self.strikes >= MAX_STRIKES

    @property
    def token_ids(self) -> Sequence[int]:
        """What the next attempt has to compute: the prompt, and the output so far."""
        return (*self.ask.prompt, *self.output) if self.output else self.ask.prompt

    def wish(
        self,
        cached: Mapping[WorkerRef, int],
        objectives: Objectives,
        lengths: AnswerLengths,
        now: float,
    ) -> Wish:
        """``cached``: how many of its tokens each worker holds already; ``objectives``: the
        deployment's, for one that has none of its own."""
        return Wish(
            self.num_tokens,
            len(self.ask.prompt) + self.ask.params.max_tokens,
            self.ask.route,
            self.alone,
            self.ask.objectives or objectives,
            answer_tokens=lengths.mean,
            growth=lengths.mean_running,
            waited_ms=1e3 * max(0.0, now - self.marks.arrived) if not self.output else 0.0,
            cached_tokens=cached,
        )

    @property
    def stage(self) -> Stage:
        """Of one that lives. A replay is in the queue again, and then computes its prompt."""
        if self.placement is None:
            return Stage.QUEUE
        if not self.prefilled:
            return Stage.PREFILL if self._started else Stage.PREFILL_QUEUE
        if self.placement.whole:
            return Stage.DECODE
        if not self._decoding:
            return Stage.HAND_OVER
        return Stage.DECODE if len(self.output) > self._num_before + 1 else Stage.DECODE_QUEUE

    def needs(self, worker: WorkerRef) -> bool:
        """Whether this attempt is lost with that worker."""
        if self.placement is None or worker not in self.placement.workers:
            return False
        return worker == self.placement.decode or not self._decoding

    def listed_by(self, worker: WorkerRef, now: float, grace_s: float) -> bool:
        """Whether that worker's beats must list this attempt by now."""
        if self.placement is None or now - self.placed_at <= grace_s:
            return False
        return worker == self.placement.decode or (self.needs(worker) and not self.prefilled)

    def place(
        self,
        placement: Placement,
        address: Callable[[WorkerRef], PeerAddress],
        now: float,
        objectives: Objectives | None = None,
    ) -> list[Order]:
        """QUEUED -> PLACED. The decode worker is told first: it is to know what it is asked."""
        self._limits_ms = _limits_ms(objectives or Objectives(), now - self.marks.arrived)
        assert self.state is State.QUEUED and self.placement is None
        self.state = State.PLACED
        self.placement = self._last_placement = placement
        self.placed_at = now
        if self.marks.first_token is None:
            self._forecast = placement.forecast
        self.marks.place(now)
        self._num_before = len(self.output)
        self._decoding = self._started = False
        if placement.whole:
            return [(placement.decode, self._place(Task.WHOLE, None))]
        prefill, decode = address(placement.prefill), address(placement.decode)
        return [
            (placement.decode, self._place(Task.DECODE, prefill)),
            (placement.prefill, self._place(Task.PREFILL, decode)),
        ]

    def started(self, key: Key, num_cached_tokens: int, now: float) -> None:
        if key != self.key:
            return
        self._started = True
        self.marks.start(now)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = min(num_cached_tokens, len(self.ask.prompt))

    def transferred(self, done: TransferDone) -> None:
        if done.key == self.key:
            self._transfer = done

    def token(self, item: TokenItem, worker: WorkerRef, now: float) -> list[Order]:
        """Takes the token into ``output`` if it is the next one. A gap loses the attempt."""
        placement = self.placement
        number = item.key.number
        if placement is None or number != self.key.number or worker not in placement.workers:
            return []
        if worker == placement.decode:
            self._decoding = True
            if not placement.whole:
                self.marks.hand_over(now)  # it says the first token as soon as it has all
        if item.index < len(self.output):
            return []
        if item.index > len(self.output):
            # lost with a connection, not with a worker; one that gets on does no harm
            return self.replay(strike=not self.prefilled)
        self.output.append(item.token_id)
        self.marks.token(now)
        self.state = State.STREAMING
        ended = item.finish is not None
        full = len(self.output) >= self.ask.params.max_tokens
        if not ended and not full:
            return []
        orders = self._orders_to_abort()
        if ended:  # by its sender, who knows; the other one may still wait for the transfer
            orders = [order for order in orders if order[0] != worker]
        self._over(State.DONE)
        return orders

    def failed(self, failure: AttemptFailed, worker: WorkerRef) -> list[Order]:
        """A worker gave the attempt up."""
        placement = self.placement
        if placement is None or failure.key != self.key or worker not in placement.workers:
            return []
        if failure.kind is FailureKind.TOO_LARGE:
            return self.fail(RequestError(failure.text, code="context_length_exceeded"))
        return self.replay()

    def died(self) -> list[Order]:
        """A worker that this attempt needs is dead."""
        doubt = not (self._started or self.prefilled) and self._num_doubts < MAX_DOUBTS
        self._num_doubts += doubt
        return self.replay(strike=not doubt)

    def replay(self, *, strike: bool = True) -> list[Order]:
        """PLACED, STREAMING -> QUEUED, or FAILED at the third strike."""
        assert self.placement is not None
        if strike and self.alone:
            return self.fail(
                RequestError(
                    "the workers that ran this request were lost, three times over",
                    status=500,
                    code="workers_lost",
                )
            )
        orders = self._orders_to_abort()
        self.strikes += strike
        self.state = State.QUEUED
        self.placement = None
        self.key = Key(self.id, self.key.number + 1)
        return orders

    def expire(self) -> list[Order]:
        """The deadline has come."""
        if self.placement is None:
            text = "no worker was there to take the request within its time"
            return self.fail(Unavailable(text, code="no_workers"))
        return self.fail(Unavailable("the request took too long", status=504, code="timeout"))

    def fail(self, error: RequestError) -> list[Order]:
        orders = self._orders_to_abort()
        self.error = error
        self._over(State.FAILED)
        return orders

    def end(self, state: State) -> list[Order]:
        """ABORTED: nobody wants the answer any more. DONE: it is complete by a stop string."""
        orders = self._orders_to_abort()
        self._over(state)
        return orders

    def timeline(self, now: float) -> Timeline:
        """Of a request that is over since now."""
        assert self.over
        marks, placement = self.marks, self._last_placement
        return Timeline(
            self.id,
            self.ask.call_id,
            self.ask.chat,
            self.ask.traceparent,
            self._outcome,
            self.error.code if self.error is not None else None,
            placement.prefill.worker_id if placement is not None else None,
            placement.decode.worker_id if placement is not None else None,
            num_attempts=self.key.number,
            num_prompt_tokens=len(self.ask.prompt),
            num_cached_tokens=self.num_cached_tokens or 0,
            num_output_tokens=len(self.output),
            arrived=marks.arrived,
            tokenized=marks.tokenized,
            placed=marks.placed,
            started=marks.started,
            first_token=marks.first_token,
            handed_over=marks.handed_over,
            second_token=marks.second_token,
            last_token=marks.last_token,
            finished=now,
            transfer=self._transfer,
            forecast=self._forecast,
            objectives=self.ask.objectives,
        )

    @property
    def _outcome(self) -> Outcome:
        if self.error is not None and self.error.status == _TOO_MANY:
            return Outcome.REFUSED
        return Outcome(self.state)

    def _over(self, state: State) -> None:
        assert not self.over
        self.state = state
        self.placement = None

    def _place(self, task: Task, peer: PeerAddress | None) -> Place:
        ask = self.ask
        output = tuple(self.output)
        limits = self._limits_ms
        return Place(
            self.key, task, ask.prompt, output, ask.params, peer, *limits, priority=ask.priority
        )

    def _orders_to_abort(self) -> list[Order]:
        workers = self.placement.workers if self.placement is not None else ()
        return [(worker, Abort(self.key)) for worker in workers]


def _limits_ms(objectives: Objectives, waited_s: float) -> tuple[float | None, float | None]:
    ttft_ms, tpot_ms = objectives.ttft_ms, objectives.tpot_ms
    return (
        ttft_ms - 1e3 * max(0.0, waited_s) if ttft_ms < math.inf else None,
        tpot_ms if tpot_ms < math.inf else None,
    )
