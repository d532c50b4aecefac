"""What a comparison comes to: the router's own choice beside the better of the others, and each
beside figures of another system, where a file gives them.

The file: {"what", "source", "per_gpu": {workload: {objectives: {"rate", "bound", "asked"}}}}.
``bound`` is "", ">" or "<": what is known of the rate; ``asked`` is what ours should reach (1/s
per GPU).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.config import Policy
from ...core.errors import ConfigError


def read_peer(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        for workload in found["per_gpu"].values():
            for one in workload.values():
                float(one["rate"]), float(one["asked"]), str(one["bound"])
        str(found["what"]), str(found["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a peer's figures ({error})") from error
    return found


def ratios(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the adaptive server to each other one, for each workload and pair of objectives that
    both have an answer for. A rate that no level missed is only a lower bound, and says so."""
    found = []
    cells = {(c["server"], c["workload"]): c for c in report["cells"] if "capacity" in c}
    servers = list(dict.fromkeys(server for server, _ in cells))
    ours = next((server for server in servers if server == Policy.ADAPTIVE), None)
    if ours is None or len(servers) < 2:
        return []
    for workload in dict.fromkeys(workload for _, workload in cells):
        for index, objectives in enumerate(report["objectives"]):
            rates: dict[str, dict[str, Any]] = {}
            for server in servers:
                cell = cells.get((server, workload))
                capacity = cell["capacity"][index] if cell is not None else None
                if capacity is not None and (capacity["rate"] or capacity["finished"]):
                    rates[server] = capacity
            if ours in rates and len(rates) > 1:
                found.append(_ratio(workload, objectives, ours, rates))
    return found


def _ratio(
    workload: str, objectives: str, ours: str, rates: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    others = {name: one for name, one in rates.items() if name != ours}
    better = max(others, key=lambda name: others[name]["per_gpu"] or 0.0)
    mine, best = rates[ours]["per_gpu"] or 0.0, others[better]["per_gpu"] or 0.0
    return {
        "workload": workload,
        "objectives": objectives,
        "adaptive": mine,
        "better": better,
        "best": best,
        "ratio": mine / best if best else None,
        "to": {n: mine / o["per_gpu"] if o["per_gpu"] else None for n, o in others.items()},
        "exact": all(one["finished"] and not _is_bound(one) for one in rates.values()),
    }


def _is_bound(capacity: dict[str, Any]) -> bool:
    return capacity["rate"] is not None and capacity["rounds"][0]["missed"] is None


def lines(report: dict[str, Any], peer: dict[str, Any] | None) -> list[str]:
    """Markdown."""
    return [*_ratio_lines(ratios(report)), *(_peer_lines(report, peer) if peer else [])]


def _ratio_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    shown = [
        "## Adaptive beside the better of the others",
        "",
        "| workload | TTFT/TPOT ms | adaptive | the better | ratio |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        shown.append(
            f"| {one['workload']} | {one['objectives']} | {one['adaptive']:.3g} | "
            f"{one['better']} {one['best']:.3g} | {ratio}{'' if one['exact'] else ' *'} |"
        )
    shown.append("")
    if not all(one["exact"] for one in found):
        shown += ["\\* one of the rates is a bound, or its search has not ended.", ""]
    for name in sorted({name for one in found for name in one["to"]}):
        values = [one["to"][name] for one in found if one["to"].get(name)]
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            shown.append(
                f"Geometric mean of adaptive / {name}, {len(values)} cells in which both met: "
                f"{mean:.2f}."
            )
    below = [one for one in found if one["ratio"] is not None and one["ratio"] < 0.98]
    words = ", ".join(f"{one['workload']} at {one['objectives']}" for one in below)
    return [*shown, f"Below 0.98 of the better: {words or 'none'}.", ""]


def _peer_lines(report: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    cells = [cell for cell in report["cells"] if "capacity" in cell]
    servers = list(dict.fromkeys(cell["server"] for cell in cells))
    by_key = {(cell["server"], cell["workload"]): cell for cell in cells}
    shown = [
        f"## Beside {peer['what']}, requests/s per GPU",
        "",
        f"Its figures: {peer['source']}. In brackets the ratio to what is asked.",
        "",
        f"| workload | TTFT/TPOT ms | its rate | asked | {' | '.join(servers)} |",
        "|---|---|---|---|" + "---|" * len(servers),
    ]
    for workload, named in peer["per_gpu"].items():
        for objectives, one in named.items():
            if objectives not in report["objectives"]:
                continue
            index = report["objectives"].index(objectives)
            ours = [_beside(by_key.get((s, workload)), index, one["asked"]) for s in servers]
            theirs = f"{one['bound']} {one['rate']:g}".strip()
            shown.append(
                f"| {workload} | {objectives} | {theirs} | {one['asked']:g} | {' | '.join(ours)} |"
            )
    return [*shown, ""]


def _beside(cell: dict[str, Any] | None, index: int, asked: float) -> str:
    if cell is None:
        return "-"
    capacity = cell["capacity"][index]
    if capacity["per_gpu"] is None:
        return str(capacity["words"])
    bound = ">= " if _is_bound(capacity) else ""
    return f"{bound}{capacity['per_gpu']:.3g} ({capacity['per_gpu'] / asked:.2f})"
