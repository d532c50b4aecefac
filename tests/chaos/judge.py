"""What may become of a request while a deployment is broken, as a function of what was seen.

Pure. Beside what ``traffic`` finds wrong of itself (a wrong text, a call without an end), an
honest error must have its reason among the faults of its time: one death costs a pause and
no request, and only a router that goes takes connections with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plan import DEADLY, ROUTER, Kind, Strike
from traffic import Outcome

GRACE_S = 2.0  # a router is asked for a moment longer than it can be seen to be gone


@dataclass(frozen=True, slots=True)
class Blow:
    """A strike as it was: when it began, was taken back, and all was whole again (seconds)."""

    strike: Strike
    began: float
    lifted: float
    whole: float

    @property
    def recovery_s(self) -> float:
        return self.whole - self.lifted


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one call. ``why``: the code of an error, or what was wrong."""

    kind: str
    began: float
    ended: float
    outcome: Outcome
    why: str = ""
    gap_s: float = 0.0  # the longest wait between two events of a stream

    def meets(self, blow: Blow) -> bool:
        return self.began <= blow.whole + GRACE_S and blow.began <= self.ended


def fault(seen: Seen, blows: Iterable[Blow]) -> str | None:
    """Why this must not be, if it must not."""
    met = [blow for blow in blows if seen.meets(blow)]
    match seen.outcome:
        case Outcome.RIGHT | Outcome.HUNG_UP | Outcome.REFUSED:
            return None
        case Outcome.CUT if any(_ends_router(blow) for blow in met):
            return None
        case Outcome.ERROR if _excused(seen.why.split()[-1], met):
            return None
    during = "; ".join(str(blow.strike) for blow in met) or "nothing"
    return f"{seen.kind}: {seen.outcome} ({seen.why}) after {_took(seen)}, during {during}"


def faults(seen: Sequence[Seen], blows: Sequence[Blow]) -> list[str]:
    return [text for one in seen if (text := fault(one, blows)) is not None]


def _excused(code: str, met: Sequence[Blow]) -> bool:
    match code:
        case "workers_lost":  # at the third death, and a worker that stood still has died, too
            return sum(_num_deaths(blow.strike) for blow in met) >= 3
        case "draining":
            return any(_ends_router(blow) for blow in met)
        case _:
            return False


def _ends_router(blow: Blow) -> bool:
    strike = blow.strike
    return ROUTER in strike.victims and strike.kind is not Kind.ROUTER_STOP


def _num_deaths(strike: Strike) -> int:
    if strike.kind is Kind.CUT:
        return 2  # a pair fails twice before one of them does it all; what it costs at the most
    kinds = DEADLY | {Kind.TERM, Kind.STOP, Kind.STOP_SHORT, Kind.DISK}
    return len(strike.victims) if strike.kind in kinds else 0


def _took(seen: Seen) -> str:
    return f"{seen.ended - seen.began:.1f} s"
