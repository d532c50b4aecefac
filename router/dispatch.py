"""The pure core of the router: every live request, every worker, and what to say to whom.

It reads no clock and owns no socket: ``now`` is passed in, effects come out. Every state of
a request has a bound that ``tick`` or a beat enforces:

    QUEUED              tried again at each tick, until the deadline
    PLACED, STREAMING   until the deadline; lost and replayed once a worker that it needs
                        dies, or has not listed it ``GRACE_S`` after it was placed
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial

from ..core.config import Admission, Policy, PoolsSection
from ..core.errors import RequestError
from ..core.ids import Role, WorkerRef
from ..core.lengths import AnswerLengths
from ..core.messages import (
    AttemptFailed,
    Bye,
    CacheEvents,
    Drain,
    FailureKind,
    Hello,
    Key,
    PeerAddress,
    Place,
    Refused,
    ResyncCache,
    RouterBeat,
    Started,
    TokenBatch,
    TokenItem,
    ToRouter,
    ToWorker,
    TransferDone,
    Welcome,
    WorkerBeat,
)
from .admission import admit, refused
from .effects import Effect, Emit, End, Link, Say
from .fleet import Fleet
from .history import EventKind, History
from .loads import Loads
from .membership import DEAD_AFTER_S, SILENT_AFTER_S, Membership, MemberState
from .policy import decide, missing
from .prefix_map import PrefixMap
from .requests import Ask, Order, Request, State
from .roles import Move
from .snapshot import Objectives, Placement
from .staffing import Staffing

log = logging.getLogger(__name__)

GRACE_S = 2.0  # from a placement to the beat that must list it
_FEW = 1024  # deadlines of requests that are over, which may stay
BAD_LINK_S = 30.0  # a pair whose transfer failed is left alone for so long


class Dispatch:
    def __init__(
        self,
        policy: Policy,
        pools: PoolsSection,
        membership: Membership,
        epoch: int,
        salt: bytes = b"",
        objectives: Objectives | None = None,
        admission: Admission = Admission.OPEN,
        *,
        plan_roles: bool = False,
    ) -> None:
        self.members = membership
        self._policy = policy
        self._pools = pools
        self._epoch = epoch
        self._requests: dict[str, Request] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; of some that are over, too
        self._queue: deque[Request] = deque()  # the oldest first, replays before the others
        self._given: dict[WorkerRef, dict[str, Request]] = {}  # to each worker, by id
        self._objectives = objectives or Objectives()
        self._admission = admission
        self._lengths = AnswerLengths()
        self._loads = Loads()
        self._fleet = Fleet(membership, self._loads)
        self.prefixes = PrefixMap(salt)
        self._bad_links: dict[tuple[WorkerRef, WorkerRef], float] = {}  # until when
        self._was_up = False
        self._ticked: float | None = None
        self._pardon_until = -math.inf
        self.history = History()
        self.staffing = Staffing(
            membership, self._loads, self._fleet, self.history, planning=plan_roles
        )

    # what the rim asks

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        """Requests that no worker has yet."""
        return sum(not request.over for request in self._queue)

    def requests(self) -> Iterable[Request]:
        """Those that live."""
        return self._requests.values()

    def max_context(self, limit: int) -> int:
        """Tokens that a request may have here: ``limit``, or less where no worker has room."""
        alive = self.members.alive()
        return min(limit, max((m.hello.max_context for m in alive), default=limit))

    @property
    def missing(self) -> str | None:
        """What the deployment waits for; once up, it is so as long as it can place requests."""
        return self._lacks(PoolsSection() if self._was_up else self._pools)

    # what happens

    def submit(self, ask: Ask, now: float) -> list[Effect]:
        request = self._requests[ask.request_id] = Request(ask, now)
        heapq.heappush(self._deadlines, (ask.deadline, ask.request_id))
        placed = self._place(request, now)
        if not placed:
            self._queue.append(request)
        return placed

    def end(self, request_id: str, state: State, now: float) -> list[Effect]:
        """The client is gone (ABORTED), or has all it wants (DONE)."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        return self._change(request, lambda: request.end(state), now)

    def fail_all(self, error: RequestError, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request in list(self._requests.values()):
            effects += self._change(request, partial(request.fail, error), now)
        return effects

    def receive(self, link: Link, message: ToRouter, now: float) -> list[Effect]:
        if isinstance(message, Hello):
            return self._hello(link, message, now)
        if isinstance(message, WorkerBeat):
            return self._beat(link, message, now)
        member = self.members.speaker(link)
        if member is None:
            return []
        member.heard = now
        match message:
            case Started(key, num_cached_tokens):
                if (request := self._requests.get(key.request_id)) is not None:
                    request.started(key, num_cached_tokens, now)
                    if key == request.key and request.placement is not None:
                        self._loads.started(request.id, now)
                        self._fleet.changed(request.placement.prefill)
                return []
            case TokenBatch(items, slack_ms):
                if slack_ms is not None:
                    self._fleet.slack(member, slack_ms, now)
                return self._tokens(items, member.ref, now)
            case TransferDone(key):
                if (request := self._requests.get(key.request_id)) is not None:
                    request.transferred(message)
                return []
            case CacheEvents():
                if self.prefixes.heard(member.ref, message, now):
                    return []
                log.info("what %s said of its cache was lost; it is asked again", member.ref)
                return [Say(link, ResyncCache())]
            case AttemptFailed():
                return self._failed(message, member.ref, now)
            case Bye():
                self.members.bye(member.ref)
                return self._gone(member.ref, now, strike=False)

    def unreachable(self, link: Link, now: float, unsent: Sequence[ToWorker] = ()) -> list[Effect]:
        """``unsent`` was to be said to this link and could not be.

        A request that never got there is not what killed the worker: it gets no strike. Where
        all workers die at once it may be placed on each of them before the router knows.
        """
        member = self.members.speaker(link)
        if member is None:
            return []
        log.warning("%s can't be reached any more", member.ref)
        self.members.lost(member.ref)
        never_there = {message.key for message in unsent if isinstance(message, Place)}
        return self._gone(member.ref, now, spared=never_there)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        if self._stood_still(now):
            self._pardon_until = now + DEAD_AFTER_S
        self._ticked = now
        for ref in self.members.silent(now):
            log.warning("%s has not been heard of for %.0f s: it is dead", ref, DEAD_AFTER_S)
            self.members.lost(ref)
            effects += self._gone(ref, now)
        self.members.forget(now)
        self._bad_links = {pair: until for pair, until in self._bad_links.items() if until > now}
        if len(self._deadlines) > 2 * len(self._requests) + _FEW:
            self._deadlines = [(one.ask.deadline, one.id) for one in self._requests.values()]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            late = self._requests.get(heapq.heappop(self._deadlines)[1])
            if late is not None:
                effects += self._change(late, late.expire, now)
        effects += self.staffing.tick(self._fleet.snapshot(now, self._bad_links), now)
        return effects + self._place_queued(now)

    def beats(self) -> list[Effect]:
        """For each worker, all that it should have; what it has beside that, it ends."""
        return [
            Say(member.link, RouterBeat(tuple(request.key for request in self._on(member.ref))))
            for member in self.members.alive()
        ]

    def drain(self) -> list[Effect]:
        """Every worker is to finish what it has and leave."""
        effects: list[Effect] = []
        for member in self.members.alive():
            member.state = MemberState.DRAINING
            self._fleet.members_changed()
            effects.append(Say(member.link, Drain()))
        return effects

    def scale(self, wanted: Mapping[Role, int], now: float) -> tuple[list[Move], list[Effect]]:
        """See ``Staffing.scale``."""
        found, effects = self.staffing.scale(wanted, now)
        return found, effects + self._place_queued(now)

    # workers

    def _hello(self, link: Link, hello: Hello, now: float) -> list[Effect]:
        joined = self.members.hello(link, hello, now)
        if isinstance(joined, Refused):
            log.warning("%s is refused: %s", hello.address.ref, joined.text)
            return [Say(link, joined)]
        effects: list[Effect] = [Say(link, Welcome(self._epoch, self.prefixes.salt))]
        if joined.new:
            self._was_up = self._was_up or self._lacks(self._pools) is None
            log.info("%s has joined to %s, pid %d", joined.ref, hello.role, hello.pid)
        if joined.replaced is not None:
            effects += self._gone(joined.replaced, now)
        if joined.new:
            self.prefixes.joined(joined.ref, hello.block_size)
            self._fleet.members_changed()
            self.history.note(now, EventKind.JOINED, joined.ref)
            member = self.members.get(joined.ref)
            assert member is not None
            effects += self.staffing.joined(member, now)
        return effects + self._place_queued(now)

    def _beat(self, link: Link, beat: WorkerBeat, now: float) -> list[Effect]:
        member = self.members.beat(link, beat, now)
        if isinstance(member, Refused):
            return [Say(link, member)]
        self._fleet.changed(member.ref)
        listed = set(beat.live)
        effects = self.staffing.heard(member, now)
        for request in self._on(member.ref):
            if request.key not in listed and request.listed_by(member.ref, now, GRACE_S):
                log.warning("%s has lost %s", member.ref, request, extra=request.log_fields)
                strike = not self._pardons(now)
                effects += self._change(request, partial(request.replay, strike=strike), now)
        return effects + self._place_queued(now) if effects else []

    def _gone(
        self, ref: WorkerRef, now: float, *, strike: bool = True, spared: Container[Key] = ()
    ) -> list[Effect]:
        """That life of a worker is over: what needs it is replayed, and may be its cause but for
        those who are spared that."""
        self.prefixes.gone(ref)
        self._fleet.members_changed()
        effects: list[Effect] = []
        lost = [request for request in self._on(ref) if request.needs(ref)]
        level = logging.WARNING if strike else logging.INFO
        log.log(level, "%s is gone; %d requests run on elsewhere", ref, len(lost))
        kind = EventKind.DIED if strike else EventKind.LEFT
        self.history.note(now, kind, ref, len(lost))
        pardoned = self._pardons(now)
        for request in lost:
            blamed = strike and not pardoned and request.key not in spared
            replay = request.died if blamed else partial(request.replay, strike=False)
            effects += self._change(request, replay, now)
        self._loads.gone(ref)
        return effects + self._place_queued(now)

    def _pardons(self, now: float) -> bool:
        """What is lost because this process was not there for a while is no request's fault."""
        return now < self._pardon_until or self._stood_still(now)

    def _stood_still(self, now: float) -> bool:
        return self._ticked is not None and now - self._ticked > SILENT_AFTER_S

    def _lacks(self, pools: PoolsSection) -> str | None:
        return missing(self._policy, pools, [member.role for member in self.members.alive()])

    def _on(self, ref: WorkerRef) -> list[Request]:
        """What that worker has been given."""
        return list(self._given.get(ref, {}).values())

    # requests

    def _tokens(self, items: Sequence[TokenItem], ref: WorkerRef, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for item in items:
            request = self._requests.get(item.key.request_id)
            if request is None:
                continue
            number, num_before, before = request.number, len(request.output), request.placement
            orders = request.token(item, ref, now)
            if len(request.output) > num_before:
                effects.append(Emit(request.id, item, request.marks.gap))
                if not request.over:
                    self._loads.token(request.id, now)
                    if not num_before and request.placement is not None:
                        self._fleet.changed(*request.placement.workers)
            if orders or request.over or request.placement is not before:
                effects += self._settle(request, before, orders, now)
            if request.number != number:
                log.warning(
                    "tokens of %s#%d were lost on the way from %s",
                    request.id,
                    number,
                    ref,
                    extra=request.log_fields,
                )
                effects += self._place_queued(now)
        return effects

    def _failed(self, failure: AttemptFailed, ref: WorkerRef, now: float) -> list[Effect]:
        request = self._requests.get(failure.key.request_id)
        if request is None or failure.key != request.key or request.placement is None:
            return []
        log.warning(
            "%s failed on %s: %s: %s",
            request,
            ref,
            failure.kind,
            failure.text,
            extra=request.log_fields,
        )
        placement = request.placement
        if failure.kind in (FailureKind.TRANSFER, FailureKind.PEER_LOST):
            self._bad_links[placement.prefill, placement.decode] = now + BAD_LINK_S
        effects = self._change(request, partial(request.failed, failure, ref), now)
        return effects + self._place_queued(now)

    def _change(
        self, request: Request, transition: Callable[[], list[Order]], now: float
    ) -> list[Effect]:
        """Runs one transition, and draws what follows for the tables and for the client."""
        before = request.placement
        return self._settle(request, before, transition(), now)

    def _settle(
        self, request: Request, before: Placement | None, orders: Sequence[Order], now: float
    ) -> list[Effect]:
        effects = self._tell(orders)
        if before is not None and request.placement is None:
            self._loads.left(request.id)
            self._fleet.changed(*before.workers)
            for worker in before.workers:
                del self._given[worker][request.id]
                if not self._given[worker]:
                    del self._given[worker]
            if not request.over:
                self._queue.appendleft(request)
        if request.over:
            if request.state is State.DONE:
                self._lengths.ended(len(request.output))
            del self._requests[request.id]
            effects.append(End(request.timeline(now), request.error))
        return effects

    def _place_queued(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        queue, self._queue = self._queue, deque()
        for request in queue:
            if request.over:
                continue
            placed = self._place(request, now)
            if not placed:
                self._queue.append(request)
            effects += placed
        return effects

    def _place(self, request: Request, now: float) -> list[Effect]:
        """Nothing where no worker can take it now."""
        cached = self.prefixes.cached_tokens(request.token_ids, request.block_names)
        self._fleet.changed(*self._loads.demote(now))
        snapshot = self._fleet.snapshot(now, self._bad_links)
        wish = request.wish(cached, self._objectives, self._lengths, now)
        placement = decide(self._policy, snapshot, wish, now)
        if placement is None:
            return []
        if not request.output:  # nobody is sent away in the middle of an answer
            refusal = admit(self._admission, placement.forecast, wish.objectives)
            if refusal is not None:
                return self._change(request, partial(request.fail, refused(refusal)), now)
        self._loads.placed(
            request.id,
            placement,
            request.num_tokens,
            wish.growth,
            wish.objectives.tpot_ms,
            now + (wish.objectives.ttft_ms - wish.waited_ms) / 1e3,
            now - wish.waited_ms / 1e3,
        )
        self.staffing.placed(placement)
        self._fleet.changed(*placement.workers)
        for worker in placement.workers:
            self._given.setdefault(worker, {})[request.id] = request
        return self._tell(request.place(placement, self._address, now, wish.objectives))

    def _address(self, ref: WorkerRef) -> PeerAddress:
        member = self.members.get(ref)
        assert member is not None
        return member.hello.address

    def _tell(self, orders: Sequence[Order]) -> list[Effect]:
        """Orders to workers that live; the others are beyond them."""
        return [
            Say(member.link, message)
            for ref, message in orders
            if (member := self.members.get(ref)) is not None
        ]
