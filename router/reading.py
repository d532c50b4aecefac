"""What the fleet can read of prompts, and what one more stream somewhere takes away of it.

A worker without a batch reads in whole chunks. With the first stream it reads beside it, in what
that one's objective leaves of each step: at 10 ms a token that is a third less, as long as the
stream runs. Where prompts ask for all that the fleet can read, such a stream costs more
than it is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .forecast import FULL, MARGIN
from .snapshot import Columns, Floats, Snapshot, Wish

Flags = npt.NDArray[np.bool_]

BUSY = 0.9  # of what can be read: more asks for a queue that is late
_SMALL = 0.02  # of a worker: what a stream in a batch that is there takes away
_MEMORY_MS = 5000.0
_PRIOR_MS = 1000.0


@dataclass(slots=True)
class Asked:
    """How much reading prompts ask for, in workers: 1.0 keeps one busy. Of those that came, let in
    or not."""

    _work_ms: float = 0.0
    _time_ms: float = _PRIOR_MS
    _since: float | None = None

    def came(self, work_ms: float, now: float) -> None:
        passed = 0.0 if self._since is None else max(0.0, now - self._since) * 1e3
        keep = math.exp(-passed / _MEMORY_MS)
        self._work_ms = self._work_ms * keep + work_ms
        self._time_ms = self._time_ms * keep + _MEMORY_MS * (1.0 - keep)
        self._since = now

    @property
    def workers(self) -> float:
        return self._work_ms / self._time_ms


def affordable(snapshot: Snapshot, wish: Wish) -> Flags:
    """Of each worker, whether one more stream there leaves the fleet enough to read."""
    c = snapshot.columns
    limit = MARGIN * np.minimum(c.tpot_ms, wish.objectives.tpot_ms)
    before = _rate(c, c.batch, c.kv, limit)
    after = _rate(c, c.batch + 1.0, c.kv + (wish.num_tokens + wish.growth), limit)
    spare = float(before.sum()) - snapshot.asked / BUSY
    cheap: Flags = before - after <= max(spare, _SMALL)
    return cheap


def _rate(c: Columns, batch: Floats, kv: Floats, limit: Floats) -> Floats:
    """Ms of chunks a ms, in the long run. Where steps take twice as long there are twice as many
    streams in the end: places and memory bound them as the objective does."""
    most = c.per_token * c.chunk_tokens
    step = c.decode_base + c.per_sequence * batch + c.per_kv * kv
    taken = np.maximum(batch / c.max_batch, kv / (FULL * c.capacity))
    limit = np.minimum(limit, step / np.maximum(taken, 1e-9))
    rows = c.prefill_base + c.per_token * batch
    apart = c.per_kv * kv + c.beside
    room = np.clip(limit - apart - rows, 0.0, most)
    beside = room / (apart + rows + room)
    rate: Floats = np.where(batch > 0.0, beside, most / (c.prefill_base + most))
    return rate
