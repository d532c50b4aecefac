"""What a step costs: milliseconds as a function of what it computes, fitted and corrected.

    prefill   base + per_token * new + per_pair * pairs      pairs: (query, key) seen by attention
    decode    base + per_sequence * batch + per_kv_token * KV tokens that attention reads
    beside    what a step that has both takes beyond what ``StepCost`` makes of the two

Both are linear in their coefficients. A worker measures a few points at its start, ``fit``
finds the coefficients, and a ``Calibration`` follows what the steps really take from then on.
Weights are read once a step, whatever the step holds: see ``StepCost``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid")

Coefficient = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
OUTLIER = 8.0

# Of chunks beside a batch that has no time for them (``prefill.pace``), which is forecast as well.
PATIENCE = 4  # steps that a prompt waits for, at the most
CHEAP = 0.25  # of its own work: a chunk that costs no more need not wait

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Of one prompt, or a chunk of one, computed by itself."""

    __pydantic_config__ = _STRICT
    base_ms: Coefficient
    per_token_ms: Coefficient
    per_pair_ms: Coefficient

    def ms(self, new_tokens: int, context: int = 0) -> float:
        """``new_tokens`` after ``context`` tokens whose KV is there; 0 for no tokens."""
        if new_tokens <= 0:
            return 0.0
        return self.base_ms + self.work_ms(new_tokens, context)

    def work_ms(self, new_tokens: int, context: int = 0) -> float:
        """What of it adds up over the chunks of a prompt, and over prompts in one step."""
        return self.per_token_ms * new_tokens + self.per_pair_ms * pairs(new_tokens, context)

    def tokens_within(self, ms: float, context: int = 0) -> int:
        """The most new tokens after ``context`` whose ``work_ms`` is at most ``ms``."""
        if ms <= 0:
            return 0
        linear = self.per_token_ms + self.per_pair_ms * (context + 0.5)
        half = self.per_pair_ms / 2
        if linear == half == 0:
            return 1 << 30
        root = (linear * linear + 4 * half * ms) ** 0.5
        return int(2 * ms / (linear + root))  # stable where ``half`` is tiny

    def scaled(self, factor: float) -> PrefillCost:
        return PrefillCost(
            self.base_ms * factor, self.per_token_ms * factor, self.per_pair_ms * factor
        )


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Of a step that writes a token for each sequence of a batch."""

    __pydantic_config__ = _STRICT
    base_ms: Coefficient
    per_sequence_ms: Coefficient
    per_kv_token_ms: Coefficient

    def ms(self, batch: int, kv_tokens: int) -> float:
        """``kv_tokens`` are those of all sequences together; 0 for no sequence."""
        if batch <= 0:
            return 0.0
        return self.base_ms + self.per_sequence_ms * batch + self.per_kv_token_ms * kv_tokens

    def scaled(self, factor: float) -> DecodeCost:
        return DecodeCost(
            self.base_ms * factor, self.per_sequence_ms * factor, self.per_kv_token_ms * factor
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of a step that may hold both: running sequences and chunks of prompts.

    One product with the weights serves all rows. It takes as long as their read, or as its rows
    do, those of the batch among them, whichever is more: so a chunk beside a small batch is free
    up to a point, and beside a large one each row of the batch counts as a token of the chunk. The
    batch's attention comes on top, and ``beside_ms``: what else such a step was seen to take.
    """

    __pydantic_config__ = _STRICT
    prefill: PrefillCost
    decode: DecodeCost
    beside_ms: Coefficient = 0.0

    def ms(self, batch: int, kv_tokens: int, chunk_ms: float) -> float:
        """``chunk_ms`` is the ``work_ms`` of the step's chunks together, 0 without any."""
        if chunk_ms <= 0:
            return self.decode.ms(batch, kv_tokens)
        if batch <= 0:
            return max(self.prefill.base_ms + chunk_ms, self.decode.base_ms)
        return self.apart_ms(kv_tokens) + max(self.rows_ms(batch) + chunk_ms, self.read_ms(batch))

    def read_ms(self, batch: int) -> float:
        """Of a batch's step without a chunk, less its attention."""
        return self.decode.base_ms + self.decode.per_sequence_ms * batch

    def rows_ms(self, batch: int) -> float:
        """Where the rows are what takes the time: those of the batch, and what a chunk adds to."""
        return self.prefill.base_ms + self.prefill.per_token_ms * batch

    def apart_ms(self, kv_tokens: int) -> float:
        """What a step with both takes whatever its chunks are."""
        return self.decode.per_kv_token_ms * kv_tokens + self.beside_ms

    def chunk_within(self, batch: int, kv_tokens: int, ms: float) -> float:
        """The ``work_ms`` of chunks that a step of at most ``ms`` has room for."""
        if batch <= 0:
            return max(0.0, ms - self.prefill.base_ms)
        ms -= self.apart_ms(kv_tokens)
        return max(0.0, ms - self.rows_ms(batch)) if ms >= self.read_ms(batch) else 0.0

    def least_work_ms(self, batch: int) -> float:
        """Smaller chunks take no less: they fit under the read of the weights."""
        return max(0.0, self.read_ms(batch) - self.rows_ms(batch))

    def least_chunk_ms(self, batch: int) -> float:
        """What the smallest chunk adds to a step of a batch."""
        return self.beside_ms + max(0.0, self.rows_ms(batch) - self.read_ms(batch))

    def scaled(self, prefill: float, decode: float, beside: float = 1.0) -> StepCost:
        """As three calibrations see it."""
        return StepCost(
            self.prefill.scaled(prefill), self.decode.scaled(decode), self.beside_ms * beside
        ).bounded

    @property
    def bounded(self) -> StepCost:
        """A step that has both takes no longer than two that have one each."""
        if self.beside_ms <= self.decode.base_ms:
            return self
        return StepCost(self.prefill, self.decode, self.decode.base_ms)


def pairs(new_tokens: int, context: int = 0) -> float:
    """How many (query, key) pairs causal attention looks at."""
    return new_tokens * (context + (new_tokens + 1) / 2)


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A measured step: ``chunks`` are (new tokens, context) of each prompt in it."""

    chunks: tuple[tuple[int, int], ...]
    ms: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    batch: int
    kv_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class MixedPoint:
    """A measured step of a batch with one chunk (new tokens, context) beside it."""

    batch: int
    kv_tokens: int
    chunk: tuple[int, int]
    ms: float


def fit_prefill(points: Sequence[PrefillPoint]) -> PrefillCost:
    """Least squares of the relative error, no coefficient below 0."""
    assert points
    rows = [
        (1.0, float(sum(n for n, _ in p.chunks)), sum(pairs(n, at) for n, at in p.chunks))
        for p in points
    ]
    return PrefillCost(*_fit(rows, [point.ms for point in points]))


def fit_decode(points: Sequence[DecodePoint]) -> DecodeCost:
    """Least squares of the relative error, no coefficient below 0."""
    assert points
    rows = [(1.0, float(point.batch), float(point.kv_tokens)) for point in points]
    return DecodeCost(*_fit(rows, [point.ms for point in points]))


def fit_step(
    prefill: Sequence[PrefillPoint],
    decode: Sequence[DecodePoint],
    mixed: Sequence[MixedPoint] = (),
) -> StepCost:
    """``beside_ms`` is what mixed steps take more on average, 0 where none was measured."""
    cost = StepCost(fit_prefill(prefill), fit_decode(decode))
    more = [
        point.ms - cost.ms(point.batch, point.kv_tokens, cost.prefill.work_ms(*point.chunk))
        for point in mixed
    ]
    return replace(cost, beside_ms=max(0.0, sum(more) / len(more)) if more else 0.0).bounded


def _fit(rows: Sequence[tuple[float, float, float]], ms: Sequence[float]) -> list[float]:
    """Three coefficients. Of all subsets that come out without a negative one, the best: with
    three unknowns this is non-negative least squares by trying."""
    assert all(value > 0 for value in ms), ms
    weights = 1.0 / np.asarray(ms, dtype=np.float64)
    matrix = np.asarray(rows, dtype=np.float64) * weights[:, None]  # [points, 3]
    best: list[float] = [0.0, 0.0, 0.0]
    least = float(len(ms))  # what all zeros leave: 1 of each point
    for size in (1, 2, 3):
        for columns in combinations(range(3), size):
            part = matrix[:, columns]
            scale = np.abs(part).max(axis=0)
            if not scale.all():
                continue
            found: Floats = np.linalg.lstsq(part / scale, np.ones(len(ms)), rcond=None)[0] / scale
            left = float(((part @ found - 1.0) ** 2).sum())
            if (found >= 0).all() and left < least - 1e-12:
                least = left
                best = [0.0, 0.0, 0.0]
                for column, value in zip(columns, found, strict=True):
                    best[column] = float(value)
    return best


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many times longer than forecast the steps take, smoothed.

    The ratio of two sums, of what steps took and of what had been forecast, both forgetting
    by ``1/memory`` a step: long steps count for more, as they do in a request's time, and
    jitter averages out. It starts as if ``memory / 4`` steps had taken what was forecast.
    One step counts for at most ``OUTLIER`` times its forecast: a page fault or a compiler is
    not a trend.
    """

    memory: float = 64.0
    forecast_ms: float = 0.0
    taken_ms: float = 0.0

    @property
    def factor(self) -> float:
        return max(0.0, self.taken_ms / self.forecast_ms) if self.forecast_ms > 0 else 1.0

    def observed(self, forecast_ms: float, taken_ms: float, steps: int = 1) -> Calibration:
        """After ``steps`` more, each of them alike."""
        if forecast_ms <= 0:
            return self
        before = self
        if self.forecast_ms <= 0:
            start = forecast_ms * self.memory / 4
            before = Calibration(self.memory, start, start)
        keep = (1.0 - 1.0 / self.memory) ** steps
        new = (1.0 - keep) * self.memory  # the sum of what is left of each of them
        return Calibration(
            self.memory,
            before.forecast_ms * keep + forecast_ms * new,
            before.taken_ms * keep + min(taken_ms, OUTLIER * forecast_ms) * new,
        )


@dataclass(frozen=True, slots=True)
class CalibratedCost:
    """A worker's cost model as measured at its start, and what has been seen since.

    A step without a chunk teaches about decode, one without a batch about prefill. Of one that
    has both, what its attention leaves is its rows' where that is the most of it; else what all
    of it leaves is what having both takes.
    """

    measured: StepCost
    prefill: Calibration = Calibration()
    decode: Calibration = Calibration()
    beside: Calibration = Calibration()

    @property
    def factors(self) -> tuple[float, float, float]:
        return self.prefill.factor, self.decode.factor, self.beside.factor

    @property
    def cost(self) -> StepCost:
        return self.measured.scaled(*self.factors)

    def observed(
        self, batch: int, kv_tokens: int, chunk_ms: float, taken_ms: float, steps: int = 1
    ) -> CalibratedCost:
        """After a step more, or ``steps`` alike; ``chunk_ms`` is the ``work_ms`` of its chunks by
        ``measured``."""
        measured = self.measured
        if chunk_ms <= 0:
            batch_ms = measured.decode.ms(batch, kv_tokens)
            return replace(self, decode=self.decode.observed(batch_ms, taken_ms, steps))
        if batch <= 0:
            alone_ms = measured.ms(0, 0, chunk_ms)
            return replace(self, prefill=self.prefill.observed(alone_ms, taken_ms, steps))
        rows_ms = measured.rows_ms(batch) + chunk_ms
        whole_ms = measured.ms(batch, kv_tokens, chunk_ms)
        if 2 * rows_ms >= whole_ms and rows_ms >= measured.read_ms(batch):
            apart_ms = measured.decode.per_kv_token_ms * kv_tokens * self.decode.factor
            left_ms = taken_ms - apart_ms - measured.beside_ms * self.beside.factor
            if left_ms <= 0:
                return self
            return replace(self, prefill=self.prefill.observed(rows_ms, left_ms, steps))
        beside_ms = measured.beside_ms
        seen_ms = self.cost.ms(batch, kv_tokens, chunk_ms * self.prefill.factor)
        # the batch's own jitter is in it, both ways: over many steps it evens out
        left_ms = max(taken_ms - seen_ms + beside_ms * self.beside.factor, -beside_ms)
        return replace(self, beside=self.beside.observed(beside_ms, left_ms, steps))
