"""How the deployment is at this moment, as plain data, for the page and ``pdserve status``.

Percentiles and goodput are over the requests that ended in the last minute, as far back as
timelines are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.clock import Clock
from ..core.config import SloSection
from .dispatch import Dispatch
from .membership import SILENT_AFTER_S, Member
from .snapshot import Objectives
from .timeline import Outcome, Stage, Timeline

WINDOW_S = 60.0
_LOOK_S = 0.2
_JUDGE_S = 1.0  # thousands of timelines are gone through
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Recently:
    """What was met of late. A share is None where there was nothing to judge."""

    window_s: float
    num_judged: int
    num_good: int
    ttft_ms: dict[str, float]  # percentiles; empty where there are none
    tpot_ms: dict[str, float]

    @property
    def attainment(self) -> float | None:
        return self.num_good / self.num_judged if self.num_judged else None

    @property
    def goodput(self) -> float:
        return self.num_good / self.window_s

    @staticmethod
    def of(timelines: Iterable[Timeline], slo: SloSection, now: float, age_s: float) -> Recently:
        """``age_s`` is how long the router has been there: a shorter window until it is full."""
        since = now - WINDOW_S
        objectives = Objectives(slo.ttft_ms, slo.tpot_ms)
        num_judged = num_good = 0
        ttfts: list[float] = []
        tpots: list[float] = []
        for one in timelines:
            if one.finished < since or one.outcome is Outcome.ABORTED:
                continue
            num_judged += 1
            num_good += one.good(objectives)
            if (ttft := one.ttft) is not None:
                ttfts.append(ttft)
            if (tpot := one.tpot) is not None:
                tpots.append(tpot)
        window_s = max(1.0, min(WINDOW_S, age_s))
        return Recently(window_s, num_judged, num_good, _percentiles(ttfts), _percentiles(tpots))

    def shown(self) -> dict[str, Any]:
        return {
            "window_s": round(self.window_s, 1),
            "requests": self.num_judged,
            "good": self.num_good,
            "attainment": self.attainment,
            "goodput": round(self.goodput, 3),
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
        }


class Live:
    """One look for all who ask within ``_LOOK_S``, so that many pages cost no more than one."""

    def __init__(
        self, dispatch: Dispatch, recent: Iterable[Timeline], slo: SloSection, clock: Clock
    ) -> None:
        self._dispatch = dispatch
        self._timelines = recent
        self._slo = slo
        self._clock = clock
        self._begun = clock()
        self._looked = self._judged = -math.inf
        self._shown: dict[str, Any] = {}
        self._recent: dict[str, Any] = {}

    def shown(self, not_ready: str | None, num_tokens: int) -> dict[str, Any]:
        now = self._clock()
        if now - self._looked > _LOOK_S:
            self._looked = now
            age_s = now - self._begun
            if now - self._judged > _JUDGE_S:
                self._judged = now
                self._recent = Recently.of(self._timelines, self._slo, now, age_s).shown()
            dispatch = self._dispatch
            self._shown = {
                "not_ready": not_ready,
                "uptime_s": round(age_s, 1),
                "slo": {"ttft_ms": self._slo.ttft_ms, "tpot_ms": self._slo.tpot_ms},
                "recent": self._recent,
                "stages": stages_now(dispatch),
                "output_tokens": num_tokens,
                "workers": [shown_worker(member, now) for member in dispatch.members],
                "transfers": transfers(dispatch),
                "events": events(dispatch, now),
            }
        return self._shown


def stages_now(dispatch: Dispatch) -> dict[str, int]:
    """How many requests are in each stage."""
    counts = Counter(request.stage for request in dispatch.requests())
    return {stage: counts[stage] for stage in Stage}


def shown_worker(member: Member, now: float) -> dict[str, Any]:
    hello, blocks = member.hello, member.blocks
    silent_s = now - member.heard
    return {
        "id": member.ref.worker_id,
        "role": member.actual_role,
        "wanted_role": member.role,
        "state": member.state,
        "silent": silent_s > SILENT_AFTER_S,
        "heard_s": round(silent_s, 2),
        "pid": hello.pid,
        "epoch": member.ref.epoch,
        "endpoint": hello.address.endpoint,
        "blocks": {
            "total": blocks.total,
            "free": blocks.free,
            "cached": blocks.cached,
            "held": blocks.held,
        },
        "waiting": member.waiting,
        "running": member.running,
        "max_batch": member.max_batch,
        "links": [
            {"worker_id": link.worker_id, "medium": link.medium.value} for link in member.links
        ],
    }


def transfers(dispatch: Dispatch) -> list[dict[str, Any]]:
    """Between which workers KV is on its way, or about to be, and for how many requests."""
    pairs = Counter(
        (request.placement.prefill.worker_id, request.placement.decode.worker_id)
        for request in dispatch.requests()
        if request.placement is not None
        and not request.placement.whole
        and request.stage in (Stage.PREFILL, Stage.HAND_OVER)
    )
    return [
        {"from": prefill, "to": decode, "requests": count}
        for (prefill, decode), count in sorted(pairs.items())
    ]


def events(dispatch: Dispatch, now: float, limit: int = 12) -> list[dict[str, Any]]:
    """What has become of workers, the latest first."""
    return [
        {
            "ago_s": round(now - event.at, 1),
            "kind": event.kind,
            "worker": event.worker.worker_id,
            "moved": event.num_moved,
        }
        for event in list(dispatch.history)[: -limit - 1 : -1]
    ]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, in milliseconds; the nearest rank."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        f"p{percent}": round(1e3 * ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 2)
        for percent in _PERCENTILES
    }
