"""What each worker has been given and has not done yet: kept as it changes, for the policy."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.ids import WorkerRef
from .snapshot import Placement


@dataclass(slots=True)
class Load:
    prefill_tokens: int = 0
    kv_tokens: int = 0
    num_requests: int = 0


@dataclass(slots=True)
class _Charge:
    """What one placed request adds to the loads of its workers."""

    placement: Placement
    prefill_tokens: int
    kv_tokens: int


class Loads:
    def __init__(self) -> None:
        self._loads: dict[WorkerRef, Load] = {}
        self._charges: dict[str, _Charge] = {}

    def __getitem__(self, worker: WorkerRef) -> Load:
        return self._loads.get(worker) or Load()

    def placed(self, request_id: str, placement: Placement, num_tokens: int) -> None:
        assert request_id not in self._charges
        self._charges[request_id] = _Charge(placement, num_tokens, num_tokens)
        self._of(placement.prefill).prefill_tokens += num_tokens
        self._of(placement.decode).kv_tokens += num_tokens
        for worker in placement.workers:
            self._of(worker).num_requests += 1

    def token(self, request_id: str) -> None:
        """The prompt is computed with the first token; each one grows the sequence."""
        charge = self._charges[request_id]
        self._of(charge.placement.prefill).prefill_tokens -= charge.prefill_tokens
        self._of(charge.placement.decode).kv_tokens += 1
        charge.prefill_tokens = 0
        charge.kv_tokens += 1

    def left(self, request_id: str) -> None:
        """The request is on no worker any more."""
        charge = self._charges.pop(request_id, None)
        if charge is None:
            return
        self._of(charge.placement.prefill).prefill_tokens -= charge.prefill_tokens
        self._of(charge.placement.decode).kv_tokens -= charge.kv_tokens
        for worker in charge.placement.workers:
            load = self._of(worker)
            load.num_requests -= 1
            if not load.num_requests:
                assert load.prefill_tokens == load.kv_tokens == 0
                del self._loads[worker]

    def _of(self, worker: WorkerRef) -> Load:
        return self._loads.setdefault(worker, Load())
