"""The router's own decisions in virtual time: ``decide``, its loads, admission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..core.config import Admission, Policy
from ..core.ids import Attempt, WorkerRef
from ..core.lengths import AnswerLengths
from ..router.admission import admit
from ..router.loads import Loads
from ..router.planner import Planner, decode_demand
from ..router.policy import decide
from ..router.roles import Holder
from ..router.snapshot import Objectives, Snapshot, Wish, WorkerView
from .served import Served
from .virtual_worker import VirtualWorker
from .workload import NOT_JUDGED, Arrival


class VirtualRouter:
    """Call ``join`` once, with all workers, before the first ``arrive``."""

    def __init__(
        self,
        policy: Policy,
        admission: Admission,
        *,
        prefix_aware: bool = True,
        forecasts: bool = True,
    ) -> None:
        assert forecasts or admission is not Admission.SLO
        self._policy = policy
        self._admission = admission
        self._prefix_aware = prefix_aware
        self._forecasts = forecasts
        self._loads = Loads()
        self._lengths = AnswerLengths()
        self._workers: dict[WorkerRef, VirtualWorker] = {}
        self._snapshot = Snapshot(())
        self._changed: dict[WorkerRef, None] = {}  # rows that the next look makes anew
        self.served: list[Served] = []
        self.missed: Counter[int] = Counter()  # refused, or over and not good: in each phase
        self.missed_last = NOT_JUDGED  # the phase of the latest
        self.moves = 0
        self._planner = Planner()
        self._placed_ms = 0.0  # since the planner looked last
        self._places: dict[str, tuple[VirtualWorker, VirtualWorker]] = {}

    def join(self, workers: Sequence[VirtualWorker]) -> None:
        self._workers = {worker.ref: worker for worker in workers}
        self._snapshot = Snapshot([self._view(worker) for worker in workers])

    def arrive(self, arrival: Arrival, now: float) -> Served:
        request_id = f"{len(self.served):032x}"
        served = Served(arrival, request_id, Attempt(request_id, 1))
        self.served.append(served)
        self._changed.update(dict.fromkeys(self._loads.demote(now)))
        self._refresh()
        growth = self._lengths.mean_running
        wish = Wish(
            arrival.prompt,
            arrival.prompt + 1,
            objectives=Objectives(arrival.ttft_ms, arrival.tpot_ms),
            answer_tokens=self._lengths.mean,
            growth=growth,
            cached_tokens=self._cached(arrival) if self._prefix_aware else {},
        )
        self._snapshot.asked = self._loads.asked.workers
        placement = decide(self._policy, self._snapshot, wish, now)
        assert placement is not None
        if placement.forecast is not None:
            served.ttft_forecast_ms = placement.forecast.ttft_ms
            self._loads.asked.came(placement.forecast.work_ms, now)
        if admit(self._admission, placement.forecast, wish.objectives) is not None:
            served.refused = True
            self._miss(served)
            return served
        if placement.forecast is not None:
            self._placed_ms += placement.forecast.work_ms
        due = now + arrival.ttft_ms / 1e3
        self._loads.placed(request_id, placement, arrival.prompt, growth, arrival.tpot_ms, due, now)
        prefill, decode = self._workers[placement.prefill], self._workers[placement.decode]
        self._touch(prefill, decode)
        self._places[request_id] = (prefill, decode)
        if placement.whole:
            prefill.take(served, None, now)
        else:
            decode.expect(served, prefill)
            prefill.take(served, decode, now)
        return served

    def plan(self, now: float) -> None:
        """The planner looks; a worker in another role keeps what it has and gets other work."""
        self._refresh()
        holders = [
            Holder(ref.worker_id, worker.role, self._loads[ref].num_requests)
            for ref, worker in self._workers.items()
        ]
        decode = decode_demand(self._snapshot)
        moves = self._planner.look(now, self._placed_ms, decode, holders)
        self._placed_ms = 0.0
        for move in moves:
            worker = self._workers[WorkerRef(move.worker_id, 1)]
            worker.role = move.after
            self.moves += 1
            self._touch(worker)

    # what workers say

    def started(self, served: Served, now: float) -> None:
        self._loads.started(served.request_id, now)
        self._touch(self._places[served.request_id][0])

    def first_token(self, served: Served, now: float) -> None:
        self._loads.token(served.request_id, now)
        self._touch(*self._places[served.request_id])

    def grown(self, served: Served, count: int) -> None:
        assert served.first is not None  # its prompt was done then, and nothing else needs the time
        self._loads.token(served.request_id, served.first, count)

    def ended(self, served: Served, worker: VirtualWorker, now: float) -> None:
        self._loads.left(served.request_id)
        self._lengths.ended(served.arrival.output)
        if not served.good:
            self._miss(served)
        self._touch(*self._places.pop(served.request_id))

    def _miss(self, served: Served) -> None:
        self.missed_last = served.arrival.phase
        self.missed[self.missed_last] += 1

    def measured(self, worker: VirtualWorker) -> None:
        self._touch(worker)

    def slack(self, worker: VirtualWorker) -> None:
        if self._forecasts:
            self._snapshot.slack(worker.ref, worker.slack_ms, worker.slack_at)

    def _touch(self, *workers: VirtualWorker) -> None:
        for worker in workers:
            self._changed[worker.ref] = None

    def _refresh(self) -> None:
        for ref in self._changed:
            self._snapshot.update(self._view(self._workers[ref]))
        self._changed.clear()

    def _view(self, worker: VirtualWorker) -> WorkerView:
        load, spec = self._loads[worker.ref], worker.spec
        return WorkerView(
            worker.ref,
            worker.role,
            1 << 20,
            spec.num_blocks * spec.block_size,
            load.prefill_tokens,
            load.kv_tokens,
            load.num_requests,
            worker.cost if self._forecasts else None,
            spec.chunk_tokens,
            spec.max_batch,
            load.prefill_ms,
            load.head_ms,
            load.head_since,
            load.batch,
            load.kv_growth,
            load.tpot_ms,
            worker.slack_ms,
            worker.slack_at,
            load.pace,
            load.late,
            load.late_at,
        )

    def _cached(self, arrival: Arrival) -> Mapping[WorkerRef, int]:
        """How much of the prompt lies on each worker."""
        names = arrival.block_hashes
        found = {}
        for ref, worker in self._workers.items():
            if not names:
                break
            low, high = 0, len(names)  # a prefix: what is there is there from its beginning
            while low < high:
                middle = (low + high + 1) // 2
                if worker.cache.pool.find(names[middle - 1]) is not None:
                    low = middle
                else:
                    high = middle - 1
            if low:
                found[ref] = low * worker.spec.block_size
        return found
