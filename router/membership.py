"""Which workers there are. Pure: the dispatcher feeds it what links say, and the time.

    Hello -> READY -> DRAINING -> (Bye) gone
               \\-> DEAD: unheard of for ``DEAD_AFTER_S``, or its link is gone

A worker is an id and an epoch. A new epoch of an id takes the place of the one before; an
epoch that has ended never comes back: what it still says is answered with ``Refused``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from ..core.cost import StepCost
from ..core.ids import Role, WorkerRef
from ..core.messages import (
    PROTOCOL_VERSION,
    BlockCounts,
    Duty,
    Hello,
    PeerLink,
    Refused,
    WorkerBeat,
)
from .effects import Link

DEAD_AFTER_S = 5.0
SILENT_AFTER_S = 2.0  # nothing new is placed on a worker unheard of for so long
FORGET_AFTER_S = 600.0  # the dead are listed so long
MAX_MEMBERS = 4096
_MAX_ENDED = 4 * MAX_MEMBERS  # lives that are remembered, to be refused


class MemberState(StrEnum):
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class Member:
    """One life of one worker, as of its last beat."""

    hello: Hello
    link: Link
    heard: float
    blocks: BlockCounts
    waiting: int = 0
    running: int = 0
    links: tuple[PeerLink, ...] = ()  # whom it sends KV blocks to, and how
    state: MemberState = MemberState.READY
    duty: Duty | None = None  # as its beats say; None before the first one
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # as of ``StepCost.scaled``
    wanted: Role | None = None  # the role that it was given last, if ever
    told_at: float = 0.0
    slack_ms: float = math.inf  # as of ``WorkerView``
    slack_at: float = 0.0
    ref: WorkerRef = field(init=False)
    _cost: tuple[tuple[float, float, float], StepCost] | None = None  # by which factors

    def __post_init__(self) -> None:
        self.ref = self.hello.address.ref

    @property
    def alive(self) -> bool:
        return self.state is not MemberState.DEAD

    @property
    def role(self) -> Role:
        """What it is used as: the role that it was given counts from the moment it was."""
        return self.wanted or self.actual_role

    @property
    def actual_role(self) -> Role:
        """What it says it is."""
        return self.duty.role if self.duty is not None else self.hello.role

    @property
    def chunk_tokens(self) -> int:
        return self.duty.chunk_tokens if self.duty is not None else self.hello.chunk_tokens

    @property
    def max_batch(self) -> int:
        return self.duty.max_batch if self.duty is not None else self.hello.max_batch

    @property
    def cost(self) -> StepCost | None:
        """What its steps take by now."""
        if self.hello.cost is None:
            return None
        if self._cost is None or self._cost[0] != self.factors:
            self._cost = self.factors, self.hello.cost.scaled(*self.factors)
        return self._cost[1]

    @property
    def capacity(self) -> int:
        """Tokens that its KV pool holds."""
        return self.blocks.total * self.hello.block_size


@dataclass(frozen=True, slots=True)
class Joined:
    """``new`` where it was no member yet; ``replaced`` is the life before, if taken for alive."""

    ref: WorkerRef
    new: bool
    replaced: WorkerRef | None = None


class Membership:
    """``fingerprint`` is the model card's: a worker's own begins with it."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._members: dict[str, Member] = {}  # the latest life of each id
        self._links: dict[Link, WorkerRef] = {}  # of the members
        self._ended: OrderedDict[WorkerRef, Link] = OrderedDict()
        self._ended_links: dict[Link, WorkerRef] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def alive(self) -> list[Member]:
        return [member for member in self if member.alive]

    def get(self, ref: WorkerRef) -> Member | None:
        """The member, if this life of it is the latest and not over."""
        member = self._members.get(ref.worker_id)
        return member if member is not None and member.alive and member.ref == ref else None

    def speaker(self, link: Link) -> Member | None:
        ref = self._links.get(link)
        return self.get(ref) if ref is not None else None

    def hello(self, link: Link, hello: Hello, now: float) -> Joined | Refused:
        """Takes a worker in; said again by a member, it changes nothing but the link."""
        ref = hello.address.ref
        member = self.get(ref)
        if member is not None:
            self._links.pop(member.link, None)
            self._links[link] = ref
            member.link, member.heard = link, now
            return Joined(ref, new=False)
        if ref in self._ended:
            return self._refused(ref)
        if (fault := self._fault(hello)) is not None:
            return Refused(fault)
        before = self._members.get(ref.worker_id)
        replaced = before.ref if before is not None and before.alive else None
        if before is not None:
            self._end(before)
        self._members[ref.worker_id] = Member(hello, link, now, hello.blocks)
        self._links[link] = ref
        return Joined(ref, True, replaced)

    def beat(self, link: Link, beat: WorkerBeat, now: float) -> Member | Refused:
        """Takes a member's state; a beat of anyone else is refused."""
        member = self.speaker(link)
        if member is None:
            ended = self._ended_links.get(link)
            return self._refused(ended) if ended is not None else Refused("say hello first", True)
        member.heard = now
        member.blocks, member.waiting, member.running = beat.blocks, beat.waiting, beat.running
        member.links = beat.links
        member.duty = beat.duty
        member.factors = beat.prefill_factor, beat.decode_factor, beat.beside_factor
        return member

    def lost(self, ref: WorkerRef) -> None:
        """Its link is gone, or it is silent: it is dead."""
        member = self.get(ref)
        if member is not None:
            member.state = MemberState.DEAD
            self._remember(member)

    def bye(self, ref: WorkerRef) -> None:
        """It has left of its own will, and is listed no more."""
        member = self.get(ref)
        if member is not None:
            self._end(member)
            del self._members[ref.worker_id]

    def silent(self, now: float) -> list[WorkerRef]:
        """Those to be declared dead."""
        return [member.ref for member in self.alive() if now - member.heard > DEAD_AFTER_S]

    def forget(self, now: float) -> None:
        """Drops those that have been dead for long from the list."""
        for member in list(self):
            if not member.alive and now - member.heard > FORGET_AFTER_S:
                del self._members[member.ref.worker_id]

    def _fault(self, hello: Hello) -> str | None:
        """Why this worker can't be one of ours."""
        if hello.version != PROTOCOL_VERSION:
            return f"the worker speaks protocol {hello.version}, the router {PROTOCOL_VERSION}"
        others = self.alive()
        if hello.fingerprint.partition("/")[0] != self._fingerprint:
            return "the worker has another model than the router"
        if others and others[0].hello.fingerprint != hello.fingerprint:
            return (
                "the worker's KV blocks differ from the others' "
                f"({hello.fingerprint}, {others[0].hello.fingerprint})"
            )
        if len(self._members) >= MAX_MEMBERS and hello.address.worker_id not in self._members:
            return f"{MAX_MEMBERS} workers have joined already"
        return None

    def _refused(self, ref: WorkerRef) -> Refused:
        latest = self._members.get(ref.worker_id)
        if latest is not None and latest.alive:
            return Refused(f"another process has joined as {ref.worker_id}")
        return Refused("declared dead; its requests have been placed elsewhere", rejoin=True)

    def _end(self, member: Member) -> None:
        member.state = MemberState.DEAD
        self._remember(member)

    def _remember(self, member: Member) -> None:
        self._links.pop(member.link, None)
        self._ended[member.ref] = member.link
        self._ended_links[member.link] = member.ref
        while len(self._ended) > _MAX_ENDED:
            _, link = self._ended.popitem(last=False)
            self._ended_links.pop(link, None)
