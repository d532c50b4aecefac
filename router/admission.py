"""Who is let in. Pure: from a forecast and the objectives.

slo      what will miss an objective is refused at once, with a time to come back
queue    at most so many in the house (counted at the door, not here)
open     everybody
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Admission
from ..core.errors import Unavailable
from .forecast import MARGIN
from .snapshot import Forecast, Objectives

TTFT_MARGIN = 0.9  # later prompts may share the step that ends this one: a forecast can't know


@dataclass(frozen=True, slots=True)
class Refusal:
    """``retry_after`` in seconds: when the queue should have gone down far enough."""

    text: str
    retry_after: float


def admit(
    admission: Admission, forecast: Forecast | None, objectives: Objectives
) -> Refusal | None:
    """None lets it in. Without a forecast nobody is refused for it."""
    if admission is not Admission.SLO or forecast is None:
        return None
    late_ms = forecast.ttft_ms - TTFT_MARGIN * objectives.ttft_ms
    if late_ms > 0:
        text = (
            f"the first token would come after some {forecast.ttft_ms:.0f} ms, "
            f"too late for the {objectives.ttft_ms:g} ms asked for"
        )
        return Refusal(text, max(0.05, late_ms / 1e3))
    if forecast.tpot_ms > forecast.tpot_limit_ms / MARGIN:
        text = (
            f"each token would take {forecast.tpot_ms:.1f} ms, more than the "
            f"{forecast.tpot_limit_ms / MARGIN:g} ms that are promised"
        )
        return Refusal(text, 1.0)
    return None


def refused(refusal: Refusal) -> Unavailable:
    """What the client hears."""
    text = refusal.text + "; come back later, or ask for less"
    retry_after = refusal.retry_after
    return Unavailable(text, status=429, code="slo_missed", retry_after=retry_after)
