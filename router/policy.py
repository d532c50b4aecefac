"""Where a request runs. ``decide`` is a pure function of plain data.

    disaggregated   one worker prefills, another decodes
    colocated       one worker does both
    adaptive        whichever the forecast says (see ``adaptive``), request by request; until the
                    workers have measured their steps, disaggregated where there is a pool
                    for each phase, else colocated

The first two take the least loaded: to prefill, the one with the fewest tokens to compute
until this prompt is done, where its cache may hold the beginning; to decode, the one whose
sequences fill the least of its KV pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..core.config import Policy, PoolsSection
from ..core.ids import Role
from . import adaptive
from .forecast import forecast
from .snapshot import Placement, Snapshot, Wish, WorkerView


def decide(policy: Policy, snapshot: Snapshot, wish: Wish, now: float = 0.0) -> Placement | None:
    """None where no worker can take it now. ``now`` is in seconds, as in ``head_since``."""
    if policy is Policy.ADAPTIVE and snapshot.measured:
        return adaptive.place(snapshot, wish, now)
    placement = _least_loaded(wish.route or policy, snapshot, wish)
    if placement is None or not snapshot.measured:
        return placement
    found = forecast(snapshot, wish, now)
    prefill, decode = snapshot.index[placement.prefill], snapshot.index[placement.decode]
    return replace(placement, forecast=found.of(prefill, decode, wish.answer_tokens))


def _least_loaded(route: Policy, snapshot: Snapshot, wish: Wish) -> Placement | None:
    if wish.alone or route is Policy.COLOCATED:
        return _whole(snapshot, wish)
    if route is Policy.DISAGGREGATED:
        return _split(snapshot, wish)
    roles = {view.role for view in snapshot.workers}
    if {Role.PREFILL, Role.DECODE} <= roles:
        return _split(snapshot, wish) or _whole(snapshot, wish)
    return _whole(snapshot, wish)


def can_split(pools: PoolsSection) -> bool:
    """Whether these pools hold one worker to prefill and another to decode."""
    mixed = pools.mixed.workers
    return bool(
        pools.prefill.workers + mixed and pools.decode.workers + mixed and pools.num_workers >= 2
    )


def missing(policy: Policy, pools: PoolsSection, roles: Iterable[Role]) -> str | None:
    """What the deployment still waits for before it is up, if anything.

    ``pools`` are those of the file, ``roles`` those of the workers that are there.
    """
    there = list(roles)
    if policy is Policy.DISAGGREGATED:
        if not [role for role in there if role is not Role.DECODE]:
            return "no worker to prefill has joined"
        if not [role for role in there if role is not Role.PREFILL]:
            return "no worker to decode has joined"
        return None if len(there) >= 2 else "only one worker has joined"
    wanted = {
        Role.PREFILL: pools.prefill.workers,
        Role.DECODE: pools.decode.workers,
        Role.MIXED: pools.mixed.workers,
    }
    for role, workers in wanted.items():
        if workers and role not in there:
            return f"no {role} worker has joined"
    return None if there else "no worker has joined"


def _whole(snapshot: Snapshot, wish: Wish) -> Placement | None:
    able = [view for view in snapshot.workers if wish.max_total <= view.max_context]

    def load(view: WorkerView) -> tuple[float, int, str]:
        share, num_requests, worker_id = view.whole_load
        cached = wish.cached_tokens.get(view.ref, 0) / max(1, view.capacity)
        return share - cached, num_requests, worker_id

    best = min(able, key=load, default=None)
    return Placement(best.ref, best.ref) if best is not None else None


def _split(snapshot: Snapshot, wish: Wish) -> Placement | None:
    """The least loaded pair of two; one with a bad link only where there is no other."""
    prefills = sorted(
        _able(snapshot, Role.DECODE, lambda view: wish.num_tokens < view.max_context),
        key=lambda view: _prefill_load(view, wish),
    )
    decodes = sorted(
        _able(snapshot, Role.PREFILL, lambda view: wish.max_total <= view.max_context),
        key=lambda view: view.decode_load,
    )
    second_best: Placement | None = None
    for decode in decodes:
        for prefill in prefills:
            if prefill.ref == decode.ref:
                continue
            placement = Placement(prefill.ref, decode.ref)
            if (prefill.ref, decode.ref) not in snapshot.bad_links:
                return placement
            second_best = second_best or placement
    return second_best


def _prefill_load(view: WorkerView, wish: Wish) -> tuple[int, int, str]:
    num_tokens, num_requests, worker_id = view.prefill_load
    return num_tokens - wish.cached_tokens.get(view.ref, 0), num_requests, worker_id


def _able(snapshot: Snapshot, unlike: Role, fits: Callable[[WorkerView], bool]) -> list[WorkerView]:
    return [view for view in snapshot.workers if view.role is not unlike and fits(view)]
