"""What steps should take, and what they take: forecasts that are corrected as steps end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..core.cost import CalibratedCost, StepCost

HUNG_AFTER_S = 5.0  # a step of this length may hang
HUNG_TIMES = 10.0  # where it is also so many times as long as it should be
HUNG_UNMEASURED_S = 60.0  # where nobody knows how long that is


@dataclass(frozen=True, slots=True)
class _Launched:
    at: float
    batch: int
    kv_tokens: int
    chunk_ms: float  # the ``work_ms`` of its chunks, by the warm-up
    behind: bool  # another one was in flight


class StepTimes:
    """``measured`` is the warm-up's; None where there was none, and nothing is forecast."""

    def __init__(self, measured: StepCost | None) -> None:
        self._seen = CalibratedCost(measured) if measured is not None else None
        self._cost = measured
        self._launched: deque[_Launched] = deque()
        self._completed = 0.0

    @property
    def measured(self) -> StepCost | None:
        return self._seen.measured if self._seen is not None else None

    @property
    def factors(self) -> tuple[float, float, float]:
        """How many times longer prefill, decode, and both in one step take than the warm-up
        said."""
        return self._seen.factors if self._seen is not None else (1.0, 1.0, 1.0)

    @property
    def cost(self) -> StepCost | None:
        """As of now."""
        return self._cost

    @property
    def hung_after_s(self) -> float:
        """For the steps in flight: so long without a result, and something is wrong."""
        if self._seen is None:
            return HUNG_UNMEASURED_S
        longest = max(map(self._ms, self._launched), default=0.0)
        return max(HUNG_AFTER_S, HUNG_TIMES * longest / 1e3)

    def launched(self, batch: int, kv_tokens: int, chunk_ms: float, now: float) -> None:
        """A step with ``batch`` running sequences; ``chunk_ms`` as ``StepCost.ms`` takes it."""
        behind = bool(self._launched)
        self._launched.append(_Launched(now, batch, kv_tokens, chunk_ms, behind))

    def completed(self, now: float, since: float | None = None) -> None:
        """The oldest step in flight is done. It began when the one before it had ended.

        ``since``: it was done before anybody looked, at some moment from then on; for launching
        a step with chunks keeps a host busy for longer than a step of a batch takes. It is taken
        to have ended when it should have: the time after that is the next one's.
        """
        step = self._launched.popleft()
        began = self._completed if step.behind else max(step.at, self._completed)
        if since is not None:
            now = min(now, max(since, began + self._ms(step) / 1e3))
        taken_ms = (now - began) * 1e3
        self._completed = now
        if self._seen is not None:
            seen = self._seen.observed(step.batch, step.kv_tokens, step.chunk_ms, taken_ms)
            self._seen, self._cost = seen, seen.cost

    def left_s(self, now: float) -> float:
        """Until the steps in flight should be done."""
        if not self._launched:
            return 0.0
        began = max(self._launched[0].at, self._completed)
        return max(0.0, sum(map(self._ms, self._launched)) / 1e3 - (now - began))

    def chunk_ms(self, num_tokens: int, context: int) -> float:
        """What a chunk adds to a step, by the warm-up."""
        measured = self.measured
        return measured.prefill.work_ms(num_tokens, context) if measured is not None else 0.0

    def _ms(self, step: _Launched) -> float:
        """As of now."""
        if self._seen is None or self._cost is None:
            return 0.0
        chunk_ms = step.chunk_ms * self._seen.prefill.factor
        return self._cost.ms(step.batch, step.kv_tokens, chunk_ms)
