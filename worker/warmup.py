"""What steps cost on this device: measured before the first life, for a bounded time.

Decode: a batch of sequences whose KV is what the pool was filled with, each with blocks of
its own, as it will be. Prefill: one long prompt, chunk after chunk, so that the context
grows; and short prompts by themselves. Both: small chunks beside a batch. Points come in the
order of what they tell: a slow device measures the first few, a fast one all. Each is the least
of a few runs, for the first may compile something, and what disturbs a run only makes it longer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import TypeAlias

from ..core.clock import Clock
from ..core.cost import DecodePoint, MixedPoint, PrefillPoint, StepCost, fit_step
from ..core.params import SamplingParams
from ..core.plan import Engine, NewSequence, Row, StepPlan
from ..core.progress import Progress
from .budget import Budget

log = logging.getLogger(__name__)

LIMIT_S = 1.0  # on a GPU
CPU_LIMIT_S = 2.0

_RUNS = 3  # of a point
_CHUNKS = 16  # of the long prompt
_SHORT, _LONG = 16, 1024  # tokens of context that a sequence of a batch has

Point: TypeAlias = PrefillPoint | DecodePoint | MixedPoint
_Measure: TypeAlias = Callable[[], Point]


def measure(engine: Engine, budget: Budget, clock: Clock, limit_s: float) -> StepCost:
    """Uses slots and blocks as it likes: nothing else may be on the engine.

    Ends after ``limit_s``, but not before two points of each kind and the step in hand.
    """
    bench = _Bench(engine, clock)
    end = clock() + limit_s
    prefill: list[PrefillPoint] = []
    decode: list[DecodePoint] = []
    mixed: list[MixedPoint] = []
    with Progress("measuring steps"):
        for one in _in_turn(
            bench.decode_points(budget), bench.prefill_points(budget), bench.mixed_points(budget)
        ):
            match one():
                case PrefillPoint() as point:
                    prefill.append(point)
                case DecodePoint() as point:
                    decode.append(point)
                case MixedPoint() as point:
                    mixed.append(point)
            if clock() > end and len(prefill) >= 2 and len(decode) >= 2:
                break
    cost = fit_step(prefill, decode, mixed)
    log.info(
        "a step of 1 sequence takes %.2f ms, of %d %.2f ms, a chunk of %d tokens %.2f ms, both in "
        "one %.2f ms beyond that (%d points measured)",
        cost.decode.ms(1, _SHORT),
        budget.max_batch,
        cost.decode.ms(budget.max_batch, budget.max_batch * _SHORT),
        budget.chunk_tokens,
        cost.prefill.ms(budget.chunk_tokens),
        cost.beside_ms,
        len(prefill) + len(decode) + len(mixed),
    )
    return cost


def _in_turn(*kinds: Iterator[_Measure | None]) -> Iterator[_Measure]:
    for round_ in zip_longest(*kinds):
        yield from (one for one in round_ if one is not None)


class _Bench:
    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._layout = engine.kv.layout
        self._params = SamplingParams(max_tokens=1 << 20, temperature=0.0)

    def decode_points(self, budget: Budget) -> Iterator[_Measure]:
        """The corners first: one sequence and many, short ones and long."""
        largest = min(budget.max_batch, self._engine.limits.max_slots)
        shapes = [
            (1, _SHORT),
            (largest, _SHORT),
            (largest, _LONG),
            (max(1, largest // 4), _SHORT),
            (1, _LONG),
            (max(1, largest // 2), _LONG),
            (max(1, largest // 2), _SHORT),
        ]
        seen = set()
        for batch, context in shapes:
            room = self._layout.num_blocks // batch * self._layout.block_size
            context = min(context, room - _RUNS, self._engine.limits.max_context - _RUNS)
            if context > 0 and (batch, context) not in seen:
                seen.add((batch, context))
                yield partial(self._decode, batch, context)

    def prefill_points(self, budget: Budget) -> Iterator[_Measure]:
        limits, chunk = self._engine.limits, budget.chunk_tokens
        room = min(limits.max_context - 1, self._layout.num_blocks * self._layout.block_size)
        chunk = min(chunk, room)
        for num_tokens in dict.fromkeys((max(1, chunk // 8), chunk, max(1, chunk // 2))):
            yield partial(self._prefill, num_tokens, 0)
        # one chunk after the other: what lies before each is there
        for start in range(chunk, min(room - chunk, _CHUNKS * chunk) + 1, chunk):
            yield partial(self._prefill, chunk, start)

    def mixed_points(self, budget: Budget) -> Iterator[_Measure | None]:
        """Small chunks, for of large ones it is a small part. A slow device measures none: there
        it is a small part of anything."""
        yield from (None, None)
        limits, layout = self._engine.limits, self._layout
        most = min(budget.max_batch, limits.max_slots - 1)
        for share in (8, 16):
            batch = max(1, most // 8)
            num_tokens = max(1, budget.chunk_tokens // share)
            context = min(_LONG, limits.max_context - _RUNS)
            blocks = batch * -(-(context + _RUNS) // layout.block_size)
            blocks += -(-_RUNS * num_tokens // layout.block_size)
            fits = batch + num_tokens <= limits.max_step_tokens and most >= 1
            if fits and _RUNS * num_tokens < limits.max_context and blocks <= layout.num_blocks:
                yield partial(self._mixed, batch, context, num_tokens)

    def _mixed(self, batch: int, context: int, num_tokens: int) -> MixedPoint:
        """The chunks of one prompt follow each other: all but the first have some before them."""
        each = -(-(context + _RUNS) // self._layout.block_size)
        end = _RUNS * num_tokens
        first = batch * each
        blocks = tuple(range(first, first + -(-end // self._layout.block_size)))
        new = (
            *self._batch(batch, context),
            NewSequence(batch, self._tokens(end), end, self._params, blocks),
        )
        times = []
        for run in range(_RUNS):
            rows = tuple(Row(slot, context - 1 + run, 1) for slot in range(batch))
            chunk = Row(batch, run * num_tokens, num_tokens, sample=run == _RUNS - 1)
            times.append(self._time(StepPlan(new if run == 0 else (), (*rows, chunk))))
        least = min(times[1:])
        start = (1 + times[1:].index(least)) * num_tokens
        kv_tokens = batch * (context + _RUNS // 2)
        return MixedPoint(batch, kv_tokens, (num_tokens, start), least)

    def _decode(self, batch: int, context: int) -> DecodePoint:
        """``context`` tokens a sequence, and the one of the step among them."""
        new = self._batch(batch, context)
        times = []
        for run in range(_RUNS):
            rows = tuple(Row(slot, context - 1 + run, 1) for slot in range(batch))
            times.append(self._time(StepPlan(new if run == 0 else (), rows)))
        return DecodePoint(batch, batch * (context + _RUNS // 2), min(times))

    def _batch(self, batch: int, context: int) -> tuple[NewSequence, ...]:
        """In the first slots and blocks."""
        each = -(-(context + _RUNS) // self._layout.block_size)
        return tuple(
            NewSequence(
                slot,
                self._tokens(context),
                context,
                self._params,
                tuple(range(slot * each, (slot + 1) * each)),
            )
            for slot in range(batch)
        )

    def _prefill(self, num_tokens: int, start: int) -> PrefillPoint:
        end = start + num_tokens
        blocks = tuple(range(-(-end // self._layout.block_size)))
        new = (NewSequence(0, self._tokens(end), end, self._params, blocks),)
        plan = StepPlan(new, (Row(0, start, num_tokens),))
        least = min(self._time(plan) for _ in range(2 if start == 0 else 1))
        return PrefillPoint(((num_tokens, start),), least)

    def _time(self, plan: StepPlan) -> float:
        """Milliseconds."""
        start = self._clock()
        self._engine.launch(plan).wait()
        return max(1e-6, (self._clock() - start) * 1e3)

    def _tokens(self, count: int) -> tuple[int, ...]:
        vocab_size = self._engine.limits.vocab_size
        return tuple(7919 * at % vocab_size for at in range(1, count + 1))
