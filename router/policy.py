"""Where a request runs. ``decide`` is a pure function of plain data.

    disaggregated   one worker prefills, another decodes
    colocated       one worker does both
    adaptive        disaggregated where there is a pool for each phase, colocated else: a
                    request is served as long as any worker is there

Of several workers it takes the least loaded: to prefill, the one with the fewest prompt
tokens before it; to decode, the one whose sequences fill the least of its KV pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..core.config import Policy, PoolsSection
from ..core.ids import Role, WorkerRef


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker that takes requests; the counts are the router's own, of what it has placed."""

    ref: WorkerRef
    role: Role
    max_context: int  # tokens of prompt and output that one request may have there
    capacity: int  # tokens that its KV pool holds
    prefill_tokens: int = 0  # placed and not computed yet
    kv_tokens: int = 0  # of the sequences that decode there, or will
    num_requests: int = 0

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
class Snapshot:
    """``bad_links`` are pairs (prefill, decode) whose last transfer failed."""

    workers: tuple[WorkerView, ...]
    bad_links: frozenset[tuple[WorkerRef, WorkerRef]] = frozenset()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs: ``num_tokens`` to prefill, room for ``max_total`` in the end.

    ``alone`` is for one that has outlived two sets of workers: no second one is drawn in.
    """

    num_tokens: int
    max_total: int
    route: Policy | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The same worker twice where one does the whole."""

    prefill: WorkerRef
    decode: WorkerRef

    @property
    def whole(self) -> bool:
        return self.prefill == self.decode

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        return (self.prefill,) if self.whole else (self.prefill, self.decode)


def decide(policy: Policy, snapshot: Snapshot, wish: Wish) -> Placement | None:
    """None where no worker can take it now."""
    route = wish.route or policy
    if wish.alone or route is Policy.COLOCATED:
        return _whole(snapshot, wish)
    if route is Policy.DISAGGREGATED:
        return _split(snapshot, wish)
    # The forecast of TTFT and TPOT against the objectives takes the place of this rule.
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
    best = min(able, key=lambda view: view.whole_load, default=None)
    return Placement(best.ref, best.ref) if best is not None else None


def _split(snapshot: Snapshot, wish: Wish) -> Placement | None:
    """The least loaded pair of two; one with a bad link only where there is no other."""
    prefills = sorted(
        _able(snapshot, Role.DECODE, lambda view: wish.num_tokens < view.max_context),
        key=lambda view: view.prefill_load,
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


def _able(snapshot: Snapshot, unlike: Role, fits: Callable[[WorkerView], bool]) -> list[WorkerView]:
    return [view for view in snapshot.workers if view.role is not unlike and fits(view)]
