"""A request of a simulated load, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.ids import Attempt
from .workload import Arrival


@dataclass(slots=True, eq=False)
class Served:
    """One request and what became of it. Times in seconds, from the start of the run."""

    arrival: Arrival
    request_id: str
    attempt: Attempt
    refused: bool = False
    first: float | None = None
    last: float | None = None
    ttft_forecast_ms: float | None = None
    num_cached_tokens: int = 0

    @property
    def over(self) -> bool:
        return self.refused or self.last is not None

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.arrival.time) * 1e3 if self.first is not None else math.inf

    @property
    def tpot_ms(self) -> float:
        """0 for an answer of one token."""
        if self.last is None or self.first is None:
            return math.inf
        return (self.last - self.first) * 1e3 / max(1, self.arrival.output - 1)

    @property
    def good(self) -> bool:
        arrival = self.arrival
        return self.ttft_ms <= arrival.ttft_ms and self.tpot_ms <= arrival.tpot_ms
