"""Which role each worker has: given by hand or by the planner, said until it is taken on.

A role counts from the moment it is given: placements follow it at once, and the worker
changes over when what its old role has begun is done. It belongs to the worker's name, so
the next life of it gets it again. Pure, as the dispatcher is, whose part it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..core.ids import Role
from ..core.messages import SetRole
from .effects import Effect, Say
from .fleet import Fleet
from .history import EventKind, History
from .loads import Loads
from .membership import Member, Membership, MemberState
from .planner import Planner, decode_demand
from .roles import Holder, Move, moves
from .snapshot import Placement, Snapshot

log = logging.getLogger(__name__)

TELL_EVERY_S = 2.0  # a worker that says it has another role
LOOK_EVERY_S = 1.0  # the planner


class Staffing:
    """``planning``: whether the planner may move workers. Roles given by hand end that, until it
    is asked for again."""

    def __init__(
        self, members: Membership, loads: Loads, fleet: Fleet, history: History, *, planning: bool
    ) -> None:
        self.planning = planning
        self._members = members
        self._loads = loads
        self._fleet = fleet
        self._history = history
        self._given: dict[str, Role] = {}  # by the worker's name
        self._planner = Planner()
        self._placed_ms = 0.0  # of prompts, since the planner looked last
        self._looked: float | None = None

    def scale(self, wanted: Mapping[Role, int], now: float) -> tuple[list[Move], list[Effect]]:
        """So many workers of each role; RequestError where the numbers are not those of the
        workers that are ready. The planner leaves them alone from now on."""
        found = moves(self._holders(), wanted)
        self.planning = False
        effects: list[Effect] = []
        for move in found:
            effects += self._move(move, now)
        return found, effects

    def placed(self, placement: Placement) -> None:
        if placement.forecast is not None:
            self._placed_ms += placement.forecast.work_ms

    def tick(self, snapshot: Snapshot, now: float) -> list[Effect]:
        """The planner looks, now and then; in a large fleet several workers move at once."""
        if not self.planning:
            return []
        if self._looked is not None and now - self._looked < LOOK_EVERY_S:
            return []
        self._looked = now
        placed_ms, self._placed_ms = self._placed_ms, 0.0
        found = self._planner.look(now, placed_ms, decode_demand(snapshot), self._holders())
        return [effect for move in found for effect in self._move(move, now)]

    def joined(self, member: Member, now: float) -> list[Effect]:
        """A new life of a worker."""
        role = self._given.get(member.ref.worker_id)
        return self._tell(member, role, now) if role is not None else []

    def heard(self, member: Member, now: float) -> list[Effect]:
        """Its beat has come: where it has another role than it should, it is told again."""
        if member.role is member.actual_role or now - member.told_at < TELL_EVERY_S:
            return []
        return self._tell(member, member.role, now)

    def _holders(self) -> list[Holder]:
        return [
            Holder(
                member.ref.worker_id,
                member.role,
                self._loads[member.ref].num_requests,
                member.hello.role,
            )
            for member in self._members
            if member.state is MemberState.READY
        ]

    def _move(self, move: Move, now: float) -> list[Effect]:
        member = next(one for one in self._members if one.ref.worker_id == move.worker_id)
        log.info("%s is to be %s, not %s", member.ref, move.after, move.before)
        self._given[move.worker_id] = move.after
        self._history.note(now, EventKind.MOVED, member.ref)
        return self._tell(member, move.after, now)

    def _tell(self, member: Member, role: Role, now: float) -> list[Effect]:
        member.wanted, member.told_at = role, now
        self._fleet.changed(member.ref)
        return [Say(member.link, SetRole(role))]
