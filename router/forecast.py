"""What a request would meet on each worker, as arrays over the workers.

A worker computes prompts in chunks beside its batch, as large as the batch's objective
leaves room for (``prefill.pace``). So its prompts go at a *rate*, in ms of chunks a ms: that
of whole chunks where nothing decodes, less the more there is; where the smallest chunk is too
much for each step, that of one now and then. What the batch is ahead of its objective by is spent
on whole chunks first: the worker says how much that is. TTFT is the work before and of
this prompt over that rate, and a whole step at least; TPOT the decode step after joining. What
is reserved or in flight counts as if it ran.

A batch has only so many places, and a pool so many blocks. Where all are taken somebody must
end first: a prompt of the worker's own waits for that before it starts, one from elsewhere
once it has come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.cost import CHEAP, PATIENCE, pairs
from .snapshot import Columns, Floats, Forecast, Snapshot, Wish

MARGIN = 0.95  # of an objective: what is aimed at, for forecasts err
_LEAST_RATE = 0.01
_LATE_S = 30.0  # how late others were is forgotten in about that time
_LONG_MS = 1e9  # instead of infinity
FULL = 0.95  # of a KV pool: more would only preempt


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Each of shape [workers], in ms."""

    work: Floats  # of the prompt's chunks
    ttft: Floats  # if it is prefilled there
    tpot: Floats  # if it decodes there, once it has its place
    place: Floats  # until a place in the batch, and memory for it, is free
    tpot_limit: Floats  # for a step there: this request's objective or a tighter one's

    def of(self, prefill: int, decode: int, answer_tokens: float) -> Forecast:
        ttft, tpot = float(self.ttft[prefill]), float(self.tpot[decode])
        if prefill == decode:
            ttft += float(self.place[decode])
        else:
            tpot += float(self.place[decode]) / answer_tokens
        return Forecast(
            ttft,
            tpot,
            float(self.work[prefill]),
            float(self.tpot_limit[decode]),
        )


def forecast(snapshot: Snapshot, wish: Wish, now: float) -> Forecasts:
    """Asks for a snapshot whose workers have all measured their steps."""
    c = snapshot.columns
    n = wish.num_tokens
    work = c.per_token * n + c.per_pair * pairs(n)
    for ref, cached in wish.cached_tokens.items():
        place = snapshot.index.get(ref)
        if place is not None and cached:
            left = max(1, n - cached)
            view = snapshot.workers[place]
            assert view.cost is not None
            work[place] = view.cost.prefill.work_ms(left, n - left)
    limit = MARGIN * np.minimum(c.tpot_ms, wish.objectives.tpot_ms)
    decodes = c.batch > 0
    # a step with chunks: its rows or the read of the weights, and the batch's attention
    running = np.where(decodes, c.batch, 0.0)
    read = c.decode_base + c.per_sequence * running
    rows = c.prefill_base + c.per_token * running
    attention = np.where(decodes, c.per_kv * c.kv, 0.0)
    apart = attention + np.where(decodes, c.beside, 0.0)
    step = read + attention  # of the batch alone
    most = c.per_token * c.chunk_tokens
    room = np.where(limit >= apart + read, limit - apart - rows, 0.0)
    least_ms = np.maximum(0.0, rows - read) + c.beside  # what the smallest chunk adds
    least = np.minimum(most, np.maximum(read - rows, least_ms))
    chunk = np.where(decodes, np.minimum(most, np.maximum(room, least)), most)
    rate = chunk / (apart + np.maximum(read, rows + chunk) + 1e-9)
    # where there is no time for any: what the smallest adds, once the batch has made up for it
    added = apart + np.maximum(read, rows + least) - step
    steps = np.clip(added / np.maximum(limit - step, 1e-9), 1.0, PATIENCE + 1.0)
    rare = np.where(least_ms > CHEAP * least, least / (steps * step + added + 1e-9), np.inf)
    rate = np.where(decodes & (room < least), np.minimum(rate, rare), rate)
    rate = np.maximum(rate, _LEAST_RATE)
    # that one is at whole chunks or at what they leave: as those before it
    head_rate = np.maximum(rate, c.pace)
    done = np.minimum(c.head_ms, np.maximum(0.0, (now - c.head_since) * 1e3 * head_rate))
    # what has left the queue is in the step that is on, else half a step of decode is still to go
    begun = (c.head_ms - done) / head_rate
    half = np.where(decodes & (c.head_ms == 0.0), step * 0.5, 0.0)
    ahead = c.prefill_ms - c.head_ms + work
    # whole chunks as long as the batch has time in hand, then at that rate
    whole_ms = apart + np.maximum(read, rows + most)
    over_ms = np.where(decodes, whole_ms - limit, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        quick = np.where(over_ms > 0.0, most * _in_hand(c, limit, step, now) / over_ms, np.inf)
    quick = np.minimum(ahead, quick)
    takes = quick * whole_ms / np.maximum(most, 1e-9) + (ahead - quick) / rate
    own = np.maximum(takes, apart + np.maximum(rows + ahead, read))
    # by what no cost says: the way to the worker and back, steps in flight, who comes later
    late = 1.0 + (c.late - 1.0) * np.exp((c.late_at - now) / _LATE_S)
    ttft = wish.waited_ms + late * (half + begun + own)
    batch = c.batch + 1.0
    kv = c.kv + (n + wish.growth)
    tpot = c.decode_base + c.per_sequence * batch + c.per_kv * kv
    over = np.maximum(batch / c.max_batch, kv / (FULL * c.capacity)) - 1.0
    place_ms = np.maximum(0.0, over) * tpot * wish.answer_tokens
    return Forecasts(work, ttft, tpot, place_ms, limit)


def _in_hand(c: Columns, limit: Floats, step: Floats, now: float) -> Floats:
    """By how much (ms) the next steps may take longer than ``limit`` each, together. A batch
    that runs alone has gained since it was looked at."""
    slack = np.minimum(c.slack_ms, _LONG_MS)
    alone = np.where(c.prefill_ms > 0.0, 0.0, np.maximum(0.0, now - c.slack_at) * 1e3)
    gain = np.maximum(0.0, np.minimum(MARGIN * c.tpot_ms, _LONG_MS) / np.maximum(step, 1e-9) - 1.0)
    found: Floats = np.maximum(0.0, slack + alone * gain - limit)
    return found
