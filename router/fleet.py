"""The workers that take requests, as ``decide`` sees them: rows that are kept as they change.

What changes is noted, and its row made anew when somebody looks: once, however often it changed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.ids import WorkerRef
from .loads import Loads
from .membership import SILENT_AFTER_S, Member, Membership, MemberState
from .snapshot import Link, Snapshot, WorkerView

_LOOK_EVERY_S = 0.1  # whether somebody has fallen silent, or speaks again


class Fleet:
    def __init__(self, members: Membership, loads: Loads) -> None:
        self._members = members
        self._loads = loads
        self._snapshot = Snapshot(())
        self._refs: list[WorkerRef] = []
        self._changed: set[WorkerRef] = set()  # whose rows are older than they are
        self._looked: float | None = None

    def snapshot(self, now: float, bad_links: Iterable[Link]) -> Snapshot:
        """As of now. It is the fleet's own, and changes with it."""
        if self._looked is None or not 0 <= now - self._looked < _LOOK_EVERY_S:
            self._looked = now
            able = [member for member in self._members if _takes_requests(member, now)]
            refs = [member.ref for member in able]
            if refs != self._refs:
                self._refs = refs
                self._snapshot = Snapshot([self._view(member) for member in able])
                self._changed.clear()
        if self._changed:
            self._refresh()
        self._snapshot.bad_links = frozenset(bad_links)
        self._snapshot.asked = self._loads.asked.workers
        return self._snapshot

    def members_changed(self) -> None:
        """Somebody has come, gone, or will take nothing more."""
        self._looked = None

    def changed(self, *workers: WorkerRef) -> None:
        """Their loads, or what they say of themselves."""
        self._changed.update(workers)

    def slack(self, member: Member, slack_ms: float, now: float) -> None:
        """It comes with steps, many a second: the row stays, only its column changes."""
        member.slack_ms, member.slack_at = slack_ms, now
        self._snapshot.slack(member.ref, slack_ms, now)

    def _refresh(self) -> None:
        for ref in self._changed:
            member = self._members.get(ref)
            if member is not None and ref in self._snapshot.index:
                self._snapshot.update(self._view(member))
        self._changed.clear()

    def _view(self, member: Member) -> WorkerView:
        load = self._loads[member.ref]
        return WorkerView(
            member.ref,
            member.role,
            member.hello.max_context,
            member.capacity,
            load.prefill_tokens,
            load.kv_tokens,
            load.num_requests,
            member.cost,
            member.chunk_tokens,
            member.max_batch,
            load.prefill_ms,
            load.head_ms,
            load.head_since,
            load.batch,
            load.kv_growth,
            load.tpot_ms,
            member.slack_ms,
            member.slack_at,
            load.pace,
            load.late,
            load.late_at,
        )


def _takes_requests(member: Member, now: float) -> bool:
    return member.state is MemberState.READY and now - member.heard <= SILENT_AFTER_S
