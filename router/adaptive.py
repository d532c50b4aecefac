"""The placement that should meet both objectives at the least cost to others.

Prefill and decode are chosen apart. To decode: the first worker, in a fixed order, whose
batch still meets its objective with this request in it; so batches fill one worker after
the other, and those behind are free to read prompts fast. A worker that has no batch yet is
left alone where the fleet needs all that it reads (``reading``): a place in a batch that is full
is waited for, as far as the objective allows. To prefill: where the first token comes soonest, be
it the same worker. Where nobody has room for another stream, what misses the objectives by the
least: the fullest may be given it all the same, or one worker does the whole.
"""

from __future__ import annotations

import numpy as np

from ..core.config import Policy
from .forecast import MARGIN, Forecasts, forecast
from .reading import Flags, affordable
from .snapshot import Floats, Placement, Snapshot, Wish

_WAIT = 2.0  # a wait for a place counts for so much: nobody knows when somebody ends
_BEHIND = 1.5  # in the order of decode: one waits rather than join a worker meant to prefill


def place(snapshot: Snapshot, wish: Wish, now: float) -> Placement | None:
    """None where no worker can take it."""
    found = forecast(snapshot, wish, now)
    c = snapshot.columns
    can_decode = c.max_context >= wish.max_total
    can_prefill = c.max_context > wish.num_tokens
    if wish.alone or wish.route is Policy.COLOCATED:
        return _whole(snapshot, wish, found, can_decode)
    cheap = can_decode & affordable(snapshot, wish)
    can_decode = cheap if cheap.any() else can_decode
    decode = _decode(snapshot, wish, found, can_decode)
    fits = decode is not None
    if decode is None:
        decode = _least_full(wish, found, can_decode)
    if decode is None:
        return None
    if wish.route is Policy.DISAGGREGATED:
        can_prefill = can_prefill & (np.arange(len(can_prefill)) != decode)
    prefill = _prefill(snapshot, found, can_prefill, decode)
    if prefill is None:
        return None
    workers = snapshot.workers
    placement = Placement(
        workers[prefill].ref, workers[decode].ref, found.of(prefill, decode, wish.answer_tokens)
    )
    if fits or wish.route is Policy.DISAGGREGATED:
        return placement
    whole = _whole(snapshot, wish, found, can_decode)
    return min(placement, whole or placement, key=lambda one: _violation(one, wish))


def _violation(placement: Placement, wish: Wish) -> float:
    """How many times as long as it should the worse of the two takes."""
    found = placement.forecast
    assert found is not None
    ttft = found.ttft_ms / (MARGIN * wish.objectives.ttft_ms)
    return max(ttft, found.tpot_ms / found.tpot_limit_ms)


def _decode(snapshot: Snapshot, wish: Wish, found: Forecasts, able: Flags) -> int | None:
    """None where nobody has room for one more stream at this objective."""
    excess = _excess(wish, found) + _WAIT * _waiting(wish, found)
    fits = able & (excess <= 1.0)
    if not fits.any():
        return None
    if np.isfinite(wish.objectives.tpot_ms):
        order = snapshot.columns.decode_order + np.where(found.place > 0.0, _BEHIND, 0.0)
        return int(np.where(fits, order, np.inf).argmin())
    return int(np.where(fits, excess, np.inf).argmin())


def _least_full(wish: Wish, found: Forecasts, able: Flags) -> int | None:
    if not able.any():
        return None
    return int(np.where(able, _excess(wish, found) + _waiting(wish, found), np.inf).argmin())


def _excess(wish: Wish, found: Forecasts) -> Floats:
    """How full each worker would be with it; 1 is full. Without an objective, the fullest is."""
    limit = found.tpot_limit if np.isfinite(wish.objectives.tpot_ms) else found.tpot.max()
    excess: Floats = found.tpot / limit
    return excess


def _waiting(wish: Wish, found: Forecasts) -> Floats:
    """What the wait for a place adds to that."""
    limit = found.tpot_limit if np.isfinite(wish.objectives.tpot_ms) else found.tpot.max()
    waiting: Floats = found.place / wish.answer_tokens / limit
    return waiting


def _prefill(snapshot: Snapshot, found: Forecasts, able: Flags, decode: int) -> int | None:
    # where others wait for a place in the batch, no prompt is begun
    ttft = np.where(able, found.ttft + found.place, np.inf)
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
