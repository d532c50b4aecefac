"""The placement that should meet both objectives at the least cost to others.

Prefill and decode are chosen apart. To decode: the first worker, in a fixed order, whose
batch still meets its objective with this request in it; so batches fill one worker after
the other, and those behind are free to read prompts fast. To prefill: where the first token
comes soonest, be it the same worker. Where nobody has room for another stream, the one worker
that misses the objectives by the least does it all: a prompt that is computed elsewhere would
only wait there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..core.config import Policy
from .forecast import MARGIN, Forecasts, forecast
from .snapshot import Floats, Placement, Snapshot, Wish


def place(snapshot: Snapshot, wish: Wish, now: float) -> Placement | None:
    """None where no worker can take it."""
    found = forecast(snapshot, wish, now)
    c = snapshot.columns
    can_decode = c.max_context >= wish.max_total
    can_prefill = c.max_context > wish.num_tokens
    if wish.alone or wish.route is Policy.COLOCATED:
        return _whole(snapshot, wish, found, can_decode)
    decode = _decode(snapshot, wish, found, can_decode)
    if wish.route is Policy.DISAGGREGATED:
        decode = _least_full(snapshot, wish, found, can_decode) if decode is None else decode
        if decode is not None:
            can_prefill = can_prefill & (np.arange(len(can_prefill)) != decode)
    if decode is None:
        return _whole(snapshot, wish, found, can_decode)
    prefill = _prefill(snapshot, found, can_prefill, decode)
    if prefill is None:
        return None
    workers = snapshot.workers
    return Placement(
        workers[prefill].ref, workers[decode].ref, found.of(prefill, decode, wish.answer_tokens)
    )


Flags = npt.NDArray[np.bool_]


def _decode(snapshot: Snapshot, wish: Wish, found: Forecasts, able: Flags) -> int | None:
    """None where nobody has room for one more stream at this objective."""
    excess = _excess(wish, found)
    fits = able & (excess <= 1.0) & (found.place == 0.0)
    if not fits.any():
        return None
    if np.isfinite(wish.objectives.tpot_ms):
        return int(np.where(fits, snapshot.columns.decode_order, np.inf).argmin())
    return int(np.where(fits, excess, np.inf).argmin())


def _least_full(snapshot: Snapshot, wish: Wish, found: Forecasts, able: Flags) -> int | None:
    if not able.any():
        return None
    waiting = found.place / wish.answer_tokens / found.tpot
    return int(np.where(able, _excess(wish, found) + waiting, np.inf).argmin())


def _excess(wish: Wish, found: Forecasts) -> Floats:
    """How full each worker would be with it; 1 is full. Without an objective, the fullest is."""
    limit = found.tpot_limit if np.isfinite(wish.objectives.tpot_ms) else found.tpot.max()
    excess: Floats = found.tpot / limit
    return excess


def _prefill(snapshot: Snapshot, found: Forecasts, able: Flags, decode: int) -> int | None:
    ttft = np.where(able, found.ttft, np.inf)
    best = int(ttft.argmin())
    if not able[best]:
        return None
    if snapshot.bad_links:
        receiver = snapshot.workers[decode].ref
        for place in np.argsort(ttft, kind="stable"):
            if able[place] and (snapshot.workers[place].ref, receiver) not in snapshot.bad_links:
                return int(place)
    return best


def _whole(snapshot: Snapshot, wish: Wish, found: Forecasts, able: Flags) -> Placement | None:
    if not able.any():
        return None
    limit = MARGIN * wish.objectives.ttft_ms
    ttft = found.ttft + found.place
    late = ttft / limit if np.isfinite(limit) else ttft / ttft.max()
    worst = np.maximum(late, _excess(wish, found))
    best = int(np.where(able, worst, np.inf).argmin())
    ref = snapshot.workers[best].ref
    return Placement(ref, ref, found.of(best, best, wish.answer_tokens))
