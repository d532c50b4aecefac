"""What a run came to: JSON to keep, and the table of docs/reliability.md. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from judge import Blow, Seen
from plan import ABOUT, DEADLY, Kind
from traffic import Outcome


def of(
    seed: int,
    seen: Sequence[Seen],
    blows: Sequence[Blow],
    faults: Sequence[str],
    skipped: dict[Kind, str],
) -> dict[str, Any]:
    kinds = {}
    for kind in Kind:
        mine = [blow for blow in blows if blow.strike.kind is kind]
        if not mine:
            continue
        met = [one for one in seen if any(one.meets(blow) for blow in mine)]
        kinds[str(kind)] = {
            "times": len(mine),
            "recovery_s": _spread([blow.recovery_s for blow in mine]),
            "calls": dict(Counter(str(one.outcome) for one in met)),
            "errors": dict(Counter(one.why for one in met if one.outcome is Outcome.ERROR)),
            "longest_pause_s": round(max((one.gap_s for one in met), default=0.0), 1),
        }
    return {
        "seed": seed,
        "minutes": round((blows[-1].whole - blows[0].began) / 60, 1) if blows else 0.0,
        "calls": dict(Counter(str(one.outcome) for one in seen)),
        "by_case": dict(Counter(one.kind for one in seen)),
        "worker_deaths": sum(
            len(blow.strike.victims) for blow in blows if blow.strike.kind in DEADLY
        ),
        "faults": list(faults),
        "skipped": {str(kind): why for kind, why in skipped.items()},
        "kinds": kinds,
    }


def table(report: dict[str, Any], command: str) -> str:
    lines = [
        "| fault | times | what clients saw | back to whole, p50 / max | again |",
        "|---|---|---|---|---|",
    ]
    for kind in Kind:
        found = report["kinds"].get(kind)
        if found is None:
            why = report["skipped"].get(kind, "not in this run")
            lines.append(f"| {ABOUT[kind]} | 0 | {why} | | |")
            continue
        calls = ", ".join(f"{count} {what}" for what, count in found["calls"].items())
        pause = f"; the longest pause of a stream {found['longest_pause_s']} s"
        back = found["recovery_s"]
        lines.append(
            f"| {ABOUT[kind]} | {found['times']} | {calls or 'no call was there'}{pause} "
            f"| {back['p50']} / {back['max']} s | `{command} FAULTS={kind}` |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(values), 1), "max": round(max(values), 1)}
