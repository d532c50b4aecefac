"""Who changes roles, so that there are as many of each as wanted. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..core.errors import RequestError
from ..core.ids import Role


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker in its role, how many requests it has, and the role that it was started in."""

    worker_id: str
    role: Role
    num_requests: int = 0
    native: Role | None = None


@dataclass(frozen=True, slots=True)
class Move:
    worker_id: str
    before: Role
    after: Role


def moves(workers: Iterable[Holder], wanted: Mapping[Role, int]) -> list[Move]:
    """The fewest moves: back to where workers were started, else of the least busy ones.

    RequestError where there are not as many workers.
    """
    there = sorted(workers, key=lambda one: (one.num_requests, one.worker_id))
    total = sum(wanted.values())
    if total != len(there):
        raise RequestError(
            f"there are {len(there)} workers, and {total} roles are asked for: "
            "a role changes what a worker does, not how many there are",
            code="invalid_value",
        )
    counts = Counter(one.role for one in there)
    open_roles = [role for role in Role for _ in range(wanted.get(role, 0) - counts[role])]
    found = []
    for role in open_roles:
        free = [one for one in there if counts[one.role] > wanted.get(one.role, 0)]
        one = next((one for one in free if one.native is role), free[0])
        there.remove(one)
        counts[one.role] -= 1
        found.append(Move(one.worker_id, one.role, role))
    return found
