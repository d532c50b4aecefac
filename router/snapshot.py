"""What ``decide`` sees: the workers as rows, and the same rows as columns for its arithmetic.

Rows are kept as they change; a decision over hundreds of workers then is a few dozen
operations on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..core.config import Policy
from ..core.cost import StepCost
from ..core.ids import Role, WorkerRef

Floats = npt.NDArray[np.float64]
Link = tuple[WorkerRef, WorkerRef]  # prefill, decode


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker that takes requests; the counts are the router's own, of what it has placed.

    ``cost`` is None until the worker has measured its steps. ``prefill_ms`` is the forecast
    of what ``prefill_tokens`` take, chunks alone; of it, ``head_ms`` are the prompts that have
    left the queue, and are computed as if since ``head_since`` (s, the router's clock).
    ``kv_growth`` are the tokens that the ``batch`` is expected to hold beyond ``kv_tokens``.
    ``tpot_ms`` is the tightest objective of the batch. As of ``slack_at`` (s), its next step may
    take ``slack_ms`` until somebody is late; infinite where nobody runs who could be. ``pace`` is
    how fast prompts that have left the queue were computed of late, in ms of chunks a ms; ``late``
    how many times as long as forecast first tokens took, up to ``late_at`` (s).
    """

    ref: WorkerRef
    role: Role
    max_context: int  # tokens of prompt and output that one request may have there
    capacity: int  # tokens that its KV pool holds
    prefill_tokens: int = 0  # placed and not computed yet
    kv_tokens: int = 0  # of the sequences that decode there, or will
    num_requests: int = 0
    cost: StepCost | None = None
    chunk_tokens: int = 2048  # the most that one step of it computes of prompts
    max_batch: int = 256
    prefill_ms: float = 0.0
    head_ms: float = 0.0
    head_since: float = 0.0
    batch: int = 0  # sequences that decode there, or will
    kv_growth: float = 0.0
    tpot_ms: float = math.inf
    slack_ms: float = 0.0
    slack_at: float = 0.0
    pace: float = 0.0
    late: float = 1.0
    late_at: float = 0.0

    @property
    def prefill_load(self) -> tuple[int, int, str]:
        return self.prefill_tokens, self.num_requests, self.ref.worker_id

    @property
    def decode_load(self) -> tuple[float, int, str]:
        return self.kv_tokens / max(1, self.capacity), self.num_requests, self.ref.worker_id

    @property
    def whole_load(self) -> tuple[float, int, str]:
        tokens = self.prefill_tokens + self.kv_tokens
        return tokens / max(1, self.capacity), self.num_requests, self.ref.worker_id


@dataclass(frozen=True, slots=True)
class Objectives:
    """What one request should meet; infinite where nothing is asked."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs: ``num_tokens`` to prefill, room for ``max_total`` in the end.

    ``alone`` is for one that has outlived two sets of workers: no second one is drawn in.
    ``waited_ms`` have passed since it arrived; its answer is expected to have
    ``answer_tokens``, and to hold ``growth`` on average while it runs. Of its beginning,
    ``cached_tokens`` lie on those workers.
    """

    num_tokens: int
    max_total: int
    route: Policy | None = None
    alone: bool = False
    objectives: Objectives = Objectives()
    waited_ms: float = 0.0
    answer_tokens: float = 256.0
    growth: float = 0.0
    cached_tokens: Mapping[WorkerRef, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a placement should lead to. ``work_ms`` is what the prompt's chunks take by
    themselves; ``tpot_limit_ms`` what a step may take there, with a margin."""

    ttft_ms: float
    tpot_ms: float
    work_ms: float
    tpot_limit_ms: float = math.inf


@dataclass(frozen=True, slots=True)
class Placement:
    """The same worker twice where one does the whole. The forecast is there once the workers
    have measured themselves."""

    prefill: WorkerRef
    decode: WorkerRef
    forecast: Forecast | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        return self.prefill is self.decode or self.prefill == self.decode

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        return (self.prefill,) if self.whole else (self.prefill, self.decode)


# The order in which decode fills the workers: those meant for it first.
_DECODE_ORDER = {Role.DECODE: 0.0, Role.MIXED: 1.0, Role.PREFILL: 2.0}


class Columns:
    """One array a quantity; the same place in each is one worker."""

    def __init__(self, views: Iterable[WorkerView]) -> None:
        rows = [_row(view) for view in views]
        self._data: Floats = np.array(rows, dtype=np.float64).reshape(-1, _WIDTH).T.copy()
        (
            self.max_context,
            self.capacity,
            self.max_batch,
            self.chunk_tokens,
            self.decode_order,
            self.prefill_ms,
            self.head_ms,
            self.head_since,
            self.batch,
            self.kv,
            self.tpot_ms,
            self.slack_ms,
            self.slack_at,
            self.pace,
            self.late,
            self.late_at,
            self.prefill_base,
            self.per_token,
            self.per_pair,
            self.decode_base,
            self.per_sequence,
            self.per_kv,
            self.beside,
        ) = self._data

    def set(self, index: int, view: WorkerView) -> None:
        self._data[:, index] = _row(view)


_WIDTH = 23


def _row(view: WorkerView) -> tuple[float, ...]:
    cost = view.cost
    assert cost is not None
    prefill, decode = cost.prefill, cost.decode
    return (
        view.max_context,
        view.capacity,
        view.max_batch,
        view.chunk_tokens,
        _DECODE_ORDER[view.role],
        view.prefill_ms,
        view.head_ms,
        view.head_since,
        view.batch,
        view.kv_tokens + view.kv_growth,
        view.tpot_ms,
        view.slack_ms,
        view.slack_at,
        view.pace,
        view.late,
        view.late_at,
        prefill.base_ms,
        prefill.per_token_ms,
        prefill.per_pair_ms,
        decode.base_ms,
        decode.per_sequence_ms,
        decode.per_kv_token_ms,
        cost.beside_ms,
    )


class Snapshot:
    """``bad_links`` are pairs (prefill, decode) whose last transfer failed; ``asked`` is how much
    reading prompts ask for, in workers (see ``reading``)."""

    def __init__(
        self, workers: Iterable[WorkerView], bad_links: frozenset[Link] = frozenset()
    ) -> None:
        self.workers = list(workers)
        self.bad_links = bad_links
        self.asked = 0.0
        self._index: dict[WorkerRef, int] | None = None
        self._columns: Columns | None = None
        self._num_measured = sum(view.cost is not None for view in self.workers)

    @property
    def measured(self) -> bool:
        """Whether each worker has said what its steps cost."""
        return 0 < len(self.workers) == self._num_measured

    @property
    def columns(self) -> Columns:
        if self._columns is None:
            self._columns = Columns(self.workers)
        return self._columns

    @property
    def index(self) -> Mapping[WorkerRef, int]:
        """Where each worker stands."""
        if self._index is None:
            self._index = {view.ref: place for place, view in enumerate(self.workers)}
        return self._index

    def update(self, view: WorkerView) -> None:
        """That worker's row is another one now."""
        place = self.index[view.ref]
        before, self.workers[place] = self.workers[place], view
        self._num_measured += (view.cost is not None) - (before.cost is not None)
        if self._columns is not None:
            self._columns.set(place, view)

    def slack(self, worker: WorkerRef, slack_ms: float, at: float) -> None:
        """Newer than its row, which is made with the same when it is made anew."""
        place = self.index.get(worker)
        if place is not None and self._columns is not None:
            self._columns.slack_ms[place], self._columns.slack_at[place] = slack_ms, at
