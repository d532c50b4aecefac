"""What steps should take, and what they take: forecasts that are corrected as steps end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..core.cost import Calibration, StepCost

HUNG_AFTER_S = 5.0  # a step of this length may hang
HUNG_TIMES = 10.0  # where it is also so many times as long as it should be
HUNG_UNMEASURED_S = 60.0  # where nobody knows how long that is


@dataclass(frozen=True, slots=True)
class _Launched:
    at: float
    decode_ms: float  # what the running sequences take, 0 without any
    chunk_ms: float  # what the chunks take beside them, 0 without any


class StepTimes:
    """``measured`` is the warm-up's; None where there was none, and nothing is forecast."""

    def __init__(self, measured: StepCost | None) -> None:
        self._measured = measured
        self._prefill = Calibration()
        self._decode = Calibration()
        self._launched: deque[_Launched] = deque()
        self._completed = 0.0

    @property
    def measured(self) -> StepCost | None:
        return self._measured

    @property
    def factors(self) -> tuple[float, float]:
        """How many times longer prefill and decode take than the warm-up said."""
        return self._prefill.factor, self._decode.factor

    @property
    def cost(self) -> StepCost | None:
        """As of now."""
        return self._measured.scaled(*self.factors) if self._measured is not None else None

    @property
    def hung_after_s(self) -> float:
        """For the steps in flight: so long without a result, and something is wrong."""
        if self._measured is None:
            return HUNG_UNMEASURED_S
        prefill, decode = self.factors
        longest = max(
            (prefill * step.chunk_ms + decode * step.decode_ms for step in self._launched),
            default=0.0,
        )
        return max(HUNG_AFTER_S, HUNG_TIMES * longest / 1e3)

    def launched(self, batch: int, kv_tokens: int, chunk_ms: float, now: float) -> None:
        """A step with ``batch`` running sequences; ``chunk_ms`` as ``StepCost.ms`` takes it."""
        decode_ms = more_ms = 0.0
        if self._measured is not None:
            decode_ms = self._measured.decode.ms(batch, kv_tokens)
            more_ms = self._measured.ms(batch, kv_tokens, chunk_ms) - decode_ms
        self._launched.append(_Launched(now, decode_ms, more_ms))

    def completed(self, now: float) -> None:
        """The oldest step in flight is done. It began when the one before it had ended."""
        step = self._launched.popleft()
        taken_ms = (now - max(step.at, self._completed)) * 1e3
        self._completed = now
        if self._measured is None:
            return
        if step.chunk_ms > 0:
            left_ms = taken_ms - step.decode_ms * self._decode.factor
            # what a small chunk adds to a large batch drowns in the batch's own jitter
            if step.chunk_ms >= step.decode_ms / 2 and left_ms > 0:
                self._prefill = self._prefill.observed(step.chunk_ms, left_ms)
        else:
            self._decode = self._decode.observed(step.decode_ms, taken_ms)

    def left_s(self, now: float) -> float:
        """Until the steps in flight should be done."""
        if not self._launched:
            return 0.0
        prefill, decode = self.factors
        ms = sum(prefill * step.chunk_ms + decode * step.decode_ms for step in self._launched)
        began = max(self._launched[0].at, self._completed)
        return max(0.0, ms / 1e3 - (now - began))

    def chunk_ms(self, num_tokens: int, context: int) -> float:
        """What a chunk adds to a step, by the warm-up."""
        return self._measured.prefill.work_ms(num_tokens, context) if self._measured else 0.0
