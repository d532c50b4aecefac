"""The running batch of a virtual worker, which moves by many steps at once.

Steps count from the worker's first. What each stream has by now follows from the step at which
it was looked at last, so a run of steps costs the same however many streams there are: tokens
and blocks of a stream are *booked* when an account is looked at, or it ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..cache.kvcache import KvCache
from ..cache.sequence import Sequence
from ..core.ids import Attempt
from ..prefill.pace import MARGIN, Pace
from .served import Served

_SETTLE_EVERY = 64  # steps: so much may be left to book


@dataclass(slots=True, eq=False)
class Stream:
    """A running sequence. It has ``seq.num_tokens`` tokens as of step ``settled``."""

    served: Served
    seq: Sequence
    settled: int
    told: int  # the step up to which the router was told of its tokens
    end_step: int
    due_base: float  # what ``Pace.due`` says of index 0, moved to step 0
    tpot_s: float  # from one token that is due to the next


class VirtualBatch:
    """``paced`` keeps count of when tokens are due; ``grown`` hears of those that are booked."""

    def __init__(self, cache: KvCache, paced: bool, grown: Callable[[Served, int], None]) -> None:
        self._cache = cache
        self._paced = paced
        self._grown = grown
        self._streams: dict[Attempt, Stream] = {}
        self._ends: list[tuple[int, int, Stream]] = []
        self._dues: dict[float, list[tuple[float, int, Stream]]] = {}  # heaps, by ``tpot_s``
        self._count = 0  # settles a tie
        self._step = 0
        self._settled = 0  # the step as of which all blocks are booked
        self.kv_tokens = 0  # of all streams, drawn ones included

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams.values())

    @property
    def steps_to_end(self) -> int:
        """Until somebody is done."""
        return self._ends[0][0] - self._step

    def join(self, served: Served, seq: Sequence, short_tokens: float) -> None:
        """``seq`` has got a token, which is in it; ``short_tokens`` as in ``Pace``."""
        assert served.first is not None
        arrival, step, index = served.arrival, self._step, seq.num_output_tokens - 1
        tpot_s = arrival.tpot_ms / 1e3
        pace = Pace(served.first, tpot_s, short_tokens)
        per_token = MARGIN * tpot_s
        due_base = pace.due(index) - per_token * step
        end_step = step + max(0, arrival.output - index - 1)
        stream = Stream(served, seq, step, step, end_step, due_base, per_token)
        self._streams[seq.attempt] = stream
        self.kv_tokens += seq.num_tokens
        self._push(stream)

    def remove(self, attempt: Attempt) -> None:
        """It was booked last in this step."""
        self.kv_tokens -= self._streams.pop(attempt).seq.num_tokens

    def advance(self, steps: int, skipped: tuple[Stream, ...]) -> list[Stream]:
        """All but the ``skipped`` ones draw so many tokens. Returns those that are done."""
        for stream in skipped:
            stream.settled += steps
            stream.end_step += steps
            stream.due_base -= stream.tpot_s * steps
            self._push(stream)
        self._step += steps
        self.kv_tokens += (len(self) - len(skipped)) * steps
        done = []
        while self._ends and self._ends[0][0] <= self._step:
            end_step, _, stream = heapq.heappop(self._ends)
            if stream.end_step == end_step and self._streams.get(stream.seq.attempt) is stream:
                self.book(stream)
                done.append(stream)
        return done

    def earliest_due(self, steps: int = 1) -> float:
        """When the first token of the next step must be there, or of the last of so many. Of one
        objective, whoever is due first stays so: all streams move by the same."""
        found = math.inf
        for tpot_s, heap in self._dues.items():
            while heap:
                due_base, _, stream = heap[0]
                here = self._streams.get(stream.seq.attempt) is stream
                if here and stream.due_base == due_base:
                    found = min(found, due_base + tpot_s * (self._step + steps))
                    break
                heapq.heappop(heap)
        return found

    def book(self, stream: Stream) -> None:
        """Writes down the tokens and blocks of the steps since it was last looked at."""
        seq, steps = stream.seq, self._step - stream.settled
        if steps <= 0:
            return
        stream.settled = self._step
        seq.token_ids.extend([0] * steps)
        seq.num_scheduled_tokens = seq.num_computed_tokens = seq.num_tokens - 1
        while len(seq.block_table) * self._cache.block_size < seq.num_tokens - 1:
            grown = self._cache.grow(seq)
            assert grown, "a run was longer than the pool had room for"
        if stream.served.arrival.output > 1 and self._step - stream.told > 0:
            self._grown(stream.served, self._step - stream.told)
            stream.told = self._step

    def settle(self) -> None:
        """Books all."""
        if self._settled != self._step:
            for stream in self._streams.values():
                self.book(stream)
            self._settled = self._step

    def settle_now_and_then(self) -> None:
        if self._step - self._settled > _SETTLE_EVERY:
            self.settle()

    @property
    def most_unbooked(self) -> int:
        """At most so many blocks are still to be booked."""
        unbooked = self._step - self._settled
        return len(self) * (unbooked // self._cache.block_size + 1)

    def _push(self, stream: Stream) -> None:
        self._count += 1
        heapq.heappush(self._ends, (stream.end_step, self._count, stream))
        if self._paced:
            heap = self._dues.setdefault(stream.tpot_s, [])
            heapq.heappush(heap, (stream.due_base, self._count, stream))
