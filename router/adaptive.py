"""The placement that should meet both objectives at the least cost to others.

Prefill and decode are chosen apart. To decode: the first worker, in a fixed order, whose
batch still meets its objective with this request in it; so batches fill one worker after
the other, and those behind are free to read prompts fast. To prefill: where the first token
comes soonest, be it the same worker. Where none meets the objective, the one that misses it
by the least.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..core.config import Policy
from .forecast import MARGIN, Forecasts, forecast
from .snapshot import Floats, Placement, Snapshot, Wish

_FULL = 0.95  # of a KV pool: more would only preempt


def place(snapshot: Snapshot, wish: Wish, now: float) -> Placement | None:
    """None where no worker can take it."""
    found = forecast(snapshot, wish, now)
    c = snapshot.columns
    can_decode = c.max_context >= wish.max_total
    can_prefill = c.max_context > wish.num_tokens
    if wish.alone or wish.route is Policy.COLOCATED:
        return _whole(snapshot, wish, found, can_decode)
    decode = _decode(snapshot, wish, found, can_decode)
    if decode is None:
        return None
    if wish.route is Policy.DISAGGREGATED:
        can_prefill = can_prefill.copy()
        can_prefill[decode] = False
    prefill = _prefill(snapshot, found, can_prefill, decode)
    if prefill is None:
        return None
    workers = snapshot.workers
    return Placement(workers[prefill].ref, workers[decode].ref, found.of(prefill, decode))


Flags = npt.NDArray[np.bool_]


def _decode(snapshot: Snapshot, wish: Wish, found: Forecasts, able: Flags) -> int | None:
    if not able.any():
        return None
    c = snapshot.columns
    excess = _excess(snapshot, wish, found)
    fits = able & (excess <= 1.0)
    if fits.any() and np.isfinite(wish.objectives.tpot_ms):
        order = np.where(fits, c.decode_order, np.inf)
        return int(order.argmin())
    return int(np.where(able, excess, np.inf).argmin())


def _excess(snapshot: Snapshot, wish: Wish, found: Forecasts) -> Floats:
    """How full each worker would be with it: by time, by places, by memory; 1 is full."""
    c = snapshot.columns
    if np.isfinite(wish.objectives.tpot_ms):
        by_time = found.tpot / found.tpot_limit
    else:
        by_time = found.tpot / found.tpot.max()  # the emptiest comes first
    by_places = (c.batch + 1.0) / c.max_batch
    by_memory = (c.kv + (wish.num_tokens + wish.growth)) / (_FULL * c.capacity)
    worst = np.maximum(by_places, by_memory)
    return np.where(worst > 1.0, np.maximum(by_time, worst), by_time)


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
    late = found.ttft / limit if np.isfinite(limit) else found.ttft / found.ttft.max()
    worst = np.maximum(late, _excess(snapshot, wish, found))
    best = int(np.where(able, worst, np.inf).argmin())
    ref = snapshot.workers[best].ref
    return Placement(ref, ref, found.of(best, best))
