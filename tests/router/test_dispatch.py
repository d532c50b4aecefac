"""The router's pure core: events and the time go in, effects come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cache.hashing import BlockHasher
from pdserve.core.config import Admission, Policy, PoolSection, PoolsSection
from pdserve.core.cost import DecodeCost, PrefillCost, StepCost
from pdserve.core.errors import RequestError, Unavailable
from pdserve.core.ids import Role, Task, WorkerRef
from pdserve.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    AttemptFailed,
    BlockCounts,
    Bye,
    CacheEvents,
    Drain,
    Duty,
    FailureKind,
    FinishReason,
    Hello,
    Key,
    PeerAddress,
    Place,
    Refused,
    ResyncCache,
    RouterBeat,
    SetRole,
    Started,
    TokenBatch,
    TokenItem,
    Welcome,
    WorkerBeat,
)
from pdserve.core.params import SamplingParams
from pdserve.router.dispatch import BAD_LINK_S, GRACE_S, Dispatch
from pdserve.router.effects import Effect, Emit, End, Link, Say
from pdserve.router.membership import DEAD_AFTER_S, SILENT_AFTER_S, Membership
from pdserve.router.requests import Ask, State
from pdserve.router.roles import Move
from pdserve.router.snapshot import Objectives
from pdserve.router.staffing import TELL_EVERY_S
from pdserve.router.timeline import Outcome, Timeline

BLOCKS = BlockCounts(64, 64, 0, 0)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
POOLS = PoolsSection(prefill=PoolSection(workers=1), decode=PoolSection(workers=1))


def request_id(index: int) -> str:
    return f"{index:032x}"


def ask(index: int = 0, *, max_tokens: int = 4, deadline: float = 60.0, prompt: int = 3) -> Ask:
    params = SamplingParams(max_tokens=max_tokens)
    return Ask(request_id(index), tuple(range(1, prompt + 1)), params, deadline)


@dataclass
class World:
    """A dispatcher with workers that are joined by name; their role is its first letter's."""

    policy: Policy = Policy.ADAPTIVE
    now: float = 0.0
    epochs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dispatch = Dispatch(
            self.policy,
            POOLS,
            Membership("f"),
            epoch=99,
        )

    def ref(self, name: str) -> WorkerRef:
        return WorkerRef(name, self.epochs[name])

    def link(self, name: str) -> Link:
        return Link(0, f"{name}@{self.epochs[name]}".encode())

    def join(self, *names: str) -> list[Effect]:
        effects: list[Effect] = []
        for name in names:
            self.epochs[name] = self.epochs.get(name, 0) + 1
            address = PeerAddress(name, self.epochs[name], "tcp://x:1", "t")
            hello = Hello(
                PROTOCOL_VERSION, ROLES[name[0]], 1, address, "f/x/16", BLOCKS, 16, 1024, 8
            )
            effects += self.dispatch.receive(self.link(name), hello, self.now)
        return effects

    def submit(self, one: Ask) -> list[Effect]:
        return self.dispatch.submit(one, self.now)

    def says(self, name: str, message: object) -> list[Effect]:
        return self.dispatch.receive(self.link(name), message, self.now)  # type: ignore[arg-type]

    def beat(self, name: str, live: Sequence[Key] = ()) -> list[Effect]:
        return self.says(name, WorkerBeat(BLOCKS, 0, 0, tuple(live)))

    def token(
        self,
        name: str,
        index: int,
        number: int = 1,
        request: int = 0,
        finish: FinishReason | None = None,
    ) -> list[Effect]:
        item = TokenItem(Key(request_id(request), number), index, 100 + index, finish)
        return self.says(name, TokenBatch((item,)))

    def at(self, now: float) -> World:
        self.now = now
        return self


def places(effects: Sequence[Effect]) -> list[tuple[str, Task, int]]:
    """Worker, task and attempt number of each placement."""
    return [
        (effect.link.identity.decode().partition("@")[0], m.task, m.key.number)
        for effect in effects
        if isinstance(effect, Say) and isinstance(m := effect.message, Place)
    ]


def aborted(effects: Sequence[Effect]) -> list[str]:
    return [
        effect.link.identity.decode().partition("@")[0]
        for effect in effects
        if isinstance(effect, Say) and isinstance(effect.message, Abort)
    ]


def emitted(effects: Sequence[Effect]) -> list[int]:
    return [effect.item.index for effect in effects if isinstance(effect, Emit)]


def ended(effects: Sequence[Effect]) -> list[RequestError | None]:
    return [effect.error for effect in effects if isinstance(effect, End)]


def one_timeline(effects: Sequence[Effect]) -> Timeline:
    (timeline,) = [effect.timeline for effect in effects if isinstance(effect, End)]
    return timeline


def test_one_request_from_its_arrival_to_its_end() -> None:
    world = World()
    assert world.join("p", "d") == [
        Say(world.link("p"), Welcome(99)),
        Say(world.link("d"), Welcome(99)),
    ]
    assert places(world.submit(ask())) == [("d", Task.DECODE, 1), ("p", Task.PREFILL, 1)]
    world.says("p", Started(Key(request_id(0), 1), 2))
    assert world.token("p", 0) == [Emit(request_id(0), TokenItem(Key(request_id(0), 1), 0, 100))]
    assert emitted(world.token("d", 0) + world.token("d", 1)) == [1]
    effects = world.token("d", 2, finish=FinishReason.STOP)
    assert emitted(effects) == [2] and aborted(effects) == ["p"]
    assert effects[-1] == End(timeline := one_timeline(effects))
    assert (timeline.outcome, timeline.num_cached_tokens) == (Outcome.DONE, 2)
    assert world.dispatch.num_requests == 0
    assert all(beat.message == RouterBeat(()) for beat in world.dispatch.beats())  # type: ignore[union-attr]


def test_a_prompt_goes_to_the_worker_that_holds_its_beginning() -> None:
    world = World(Policy.COLOCATED)
    world.join("m1", "m2")
    names: list[bytes] = []
    BlockHasher(16, b"").extend(names, tuple(range(1, 41)), 2)
    assert world.says("m2", CacheEvents(0, b"".join(names), b"", reset=True)) == []
    assert places(world.submit(ask(0, prompt=40))) == [("m2", Task.WHOLE, 1)]
    assert places(world.submit(ask(1, prompt=8))) == [("m1", Task.WHOLE, 1)]
    gap = world.says("m2", CacheEvents(2, b"", b""))
    assert gap == [Say(world.link("m2"), ResyncCache())]
    world.join("m2")  # another life, with nothing
    assert world.dispatch.prefixes.num_blocks(world.ref("m2")) == 0


def test_a_request_waits_for_a_worker_and_is_placed_as_it_joins() -> None:
    world = World(Policy.DISAGGREGATED)
    assert world.submit(ask(0)) == []
    assert world.submit(ask(1)) == []
    assert places(world.join("p")) == []
    assert [place[0] for place in places(world.join("d"))] == ["d", "p", "d", "p"]


def test_nobody_comes() -> None:
    world = World()
    world.submit(ask(deadline=5.0))
    assert ended(world.at(4.9).dispatch.tick(4.9)) == []
    (error,) = ended(world.dispatch.tick(5.0))
    assert isinstance(error, Unavailable) and error.status == 503
    assert world.join("m")[1:] == []


def test_it_takes_too_long() -> None:
    world = World()
    world.join("m")
    world.submit(ask(deadline=5.0))
    world.at(4.0).beat("m", [Key(request_id(0), 1)])
    effects = world.dispatch.tick(5.0)
    (error,) = ended(effects)
    assert isinstance(error, Unavailable) and error.status == 504
    assert aborted(effects) == ["m"]


def test_the_router_beat_lists_what_each_worker_has_been_given() -> None:
    world = World()
    world.join("p", "d")
    world.submit(ask(0))
    world.submit(ask(1))
    world.token("p", 0, request=0)
    world.token("d", 0, request=0)
    keys = (Key(request_id(0), 1), Key(request_id(1), 1))
    assert world.dispatch.beats() == [
        Say(world.link("p"), RouterBeat(keys)),
        Say(world.link("d"), RouterBeat(keys)),
    ]


@pytest.mark.parametrize("name", ["p", "d"])
def test_a_dead_worker_is_replayed_and_the_other_side_told(name: str) -> None:
    world = World()
    world.join("p", "d")
    world.submit(ask())
    other = "d" if name == "p" else "p"
    effects = world.dispatch.unreachable(world.link(name), 1.0)
    assert aborted(effects) == [other]
    assert places(effects) == [(other, Task.WHOLE, 2)]  # adaptive: one worker is enough


def test_a_prefill_worker_may_die_once_its_work_is_done() -> None:
    world = World()
    world.join("p", "d")
    world.submit(ask())
    world.token("p", 0)
    world.token("d", 0)
    assert world.dispatch.unreachable(world.link("p"), 1.0) == []
    assert emitted(world.token("d", 1)) == [1]
    assert ended(world.token("d", 2, finish=FinishReason.STOP)) == [None]


def test_silence_is_death() -> None:
    world = World()
    world.join("m1", "m2")
    world.submit(ask())
    busy = "m1" if any(place[0] == "m1" for place in places(world.submit(ask(1)))) else "m2"
    assert busy == "m2"  # the first took the first
    world.at(SILENT_AFTER_S + 1).beat("m2", [Key(request_id(1), 1)])
    assert world.dispatch.tick(SILENT_AFTER_S + 1) == []
    effects = world.at(DEAD_AFTER_S + 0.1).dispatch.tick(DEAD_AFTER_S + 0.1)
    assert places(effects) == [] and aborted(effects) == []  # m2 is silent by now too
    assert places(world.beat("m2", [Key(request_id(1), 1)])) == []
    assert places(world.dispatch.tick(DEAD_AFTER_S + 0.2)) == [("m2", Task.WHOLE, 2)]
    world.says("m1", Bye())  # of no worker any more
    assert world.beat("m1") == [
        Say(
            world.link("m1"),
            Refused("declared dead; its requests have been placed elsewhere", rejoin=True),
        )
    ]


def test_nothing_is_placed_on_a_worker_that_is_silent() -> None:
    world = World()
    world.join("m1", "m2")
    world.at(SILENT_AFTER_S + 0.5).beat("m2")
    assert places(world.submit(ask())) == [("m2", Task.WHOLE, 1)]


def test_a_restarted_worker_takes_its_requests_again() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d")
    world.submit(ask())
    world.token("p", 0)
    effects = world.join("d")  # before anyone noticed that it was gone
    assert aborted(effects) == ["p"]
    assert places(effects) == [("d", Task.DECODE, 2), ("p", Task.PREFILL, 2)]
    assert emitted(world.token("p", 1, number=2)) == [1]


def test_what_a_worker_does_not_list_is_lost() -> None:
    world = World(Policy.COLOCATED)
    world.join("m")
    world.submit(ask())
    assert world.at(GRACE_S).beat("m") == []
    effects = world.at(GRACE_S + 0.1).beat("m")
    assert aborted(effects) == ["m"] and places(effects) == [("m", Task.WHOLE, 2)]
    assert world.at(GRACE_S + 0.2).beat("m") == []  # it has its time too
    assert world.at(2 * GRACE_S + 1).beat("m", [Key(request_id(0), 2)]) == []


def test_a_failed_transfer_marks_the_link_and_not_the_workers() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p1", "p2", "d")
    assert places(world.submit(ask())) == [("d", Task.DECODE, 1), ("p1", Task.PREFILL, 1)]
    failure = AttemptFailed(Key(request_id(0), 1), FailureKind.TRANSFER, "cut")
    assert [place[0] for place in places(world.says("d", failure))] == ["d", "p2"]
    world.dispatch.end(request_id(0), State.ABORTED, world.now)
    assert places(world.submit(ask(1)))[1][0] == "p2"
    world.dispatch.end(request_id(1), State.ABORTED, world.now)
    for name in ("p1", "p2", "d"):
        world.at(BAD_LINK_S + 1).beat(name)
    world.dispatch.tick(BAD_LINK_S + 1)
    assert places(world.submit(ask(2)))[1][0] == "p1"


def test_two_strikes_then_whole_then_an_error() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d")
    world.submit(ask())
    world.says("p", Started(Key(request_id(0), 1), 0))
    effects = world.join("d")
    assert [place[1] for place in places(effects)] == [Task.DECODE, Task.PREFILL]
    world.says("p", Started(Key(request_id(0), 2), 0))
    effects = world.join("d")
    ((name, task, number),) = places(effects)
    assert (task, number) == (Task.WHOLE, 3)
    world.says(name, Started(Key(request_id(0), 3), 0))
    (error,) = ended(world.join(name))
    assert error is not None and error.status == 500
    assert world.dispatch.num_requests == 0


def test_both_die_within_one_attempt_and_it_is_one_strike() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d")
    world.submit(ask())
    world.says("p", Started(Key(request_id(0), 1), 0))
    world.dispatch.unreachable(world.link("p"), 1.0)
    world.dispatch.unreachable(world.link("d"), 1.0)
    request = world.dispatch._requests.get(request_id(0))
    assert request is not None and request.strikes == 1
    assert [place[1] for place in places(world.join("p", "d"))] == [Task.DECODE, Task.PREFILL]


def test_a_worker_that_never_got_a_request_was_not_killed_by_it() -> None:
    """All die at once, and the router finds out one by one, by what it places on them."""
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d", "d1", "d2", "d3")
    effects = world.submit(ask())
    for _ in range(4):
        name = places(effects)[0][0]
        link = world.link(name)
        unsent = [one.message for one in effects if isinstance(one, Say) and one.link == link]
        effects = world.dispatch.unreachable(link, 1.0, unsent)
        assert ended(effects) == []
    request = world.dispatch._requests.get(request_id(0))
    assert request is not None and request.strikes == 0
    assert [place[1] for place in places(world.join("d"))] == [Task.DECODE, Task.PREFILL]


def test_a_worker_that_was_dying_as_it_got_a_request_was_not_killed_by_it() -> None:
    """The message was sent, to a process that had been killed and had not ended yet."""
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d", "d1")
    world.submit(ask())
    world.says("p", Started(Key(request_id(0), 1), 0))
    for name in ("d", "d1"):
        world.dispatch.unreachable(world.link(name), 1.0)
    assert world.dispatch._requests[request_id(0)].strikes == 1


def test_a_router_that_stood_still_blames_no_request() -> None:
    """Its workers have dropped all they had, and it loses them one by one as it wakes: before
    its first tick and after it."""
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d", "d1", "d2", "d3", "d4")
    world.dispatch.tick(0.0)
    world.submit(ask())
    world.at(GRACE_S + SILENT_AFTER_S + 1)
    for name in ("d1", "d2", "d3", "d4", "d", "p"):
        world.beat(name)  # it has nothing any more
    world.now += 0.2
    world.dispatch.tick(world.now)
    request = world.dispatch._requests[request_id(0)]
    for _ in range(4):
        assert request.placement is not None
        lost = world.link(request.placement.decode.worker_id)
        assert ended(world.dispatch.unreachable(lost, world.now)) == []
    assert (request.strikes, request.number) == (0, 6)


def test_replays_go_before_those_that_wait() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p", "d")
    world.submit(ask(0))
    world.dispatch.unreachable(world.link("d"), 0.0)
    world.submit(ask(1))
    effects = world.join("d")
    assert [place[2] for place in places(effects)] == [2, 2, 1, 1]


def test_the_client_hangs_up_in_any_state() -> None:
    world = World(Policy.DISAGGREGATED)
    world.submit(ask(0))
    effects = world.dispatch.end(request_id(0), State.ABORTED, world.now)
    assert effects == [End(one_timeline(effects))]
    world.join("p", "d")
    world.submit(ask(1))
    assert aborted(world.dispatch.end(request_id(1), State.ABORTED, world.now)) == ["p", "d"]
    world.submit(ask(2))
    world.token("p", 0, request=2)
    assert aborted(world.dispatch.end(request_id(2), State.ABORTED, world.now)) == ["p", "d"]
    assert world.dispatch.end(request_id(2), State.ABORTED, world.now) == []


def test_goodbye_is_no_strike() -> None:
    world = World(Policy.COLOCATED)
    world.join("m")
    world.submit(ask())
    for number in range(2, 7):
        world.says("m", Bye())
        assert places(world.join("m")) == [("m", Task.WHOLE, number)]


def test_draining_places_nothing_more() -> None:
    world = World()
    world.join("p", "d")
    assert world.dispatch.drain() == [
        Say(world.link("p"), Drain()),
        Say(world.link("d"), Drain()),
    ]
    assert world.submit(ask()) == []


def test_ready_is_when_every_pool_is_there_and_then_when_anything_can_be_served() -> None:
    world = World()
    assert world.dispatch.missing == "no prefill worker has joined"
    world.join("p")
    assert world.dispatch.missing == "no decode worker has joined"
    world.join("d")
    assert world.dispatch.missing is None
    world.dispatch.unreachable(world.link("d"), 1.0)
    assert world.dispatch.missing is None  # the other one serves whole requests
    world.dispatch.unreachable(world.link("p"), 1.0)
    assert world.dispatch.missing == "no worker has joined"


def test_the_least_loaded_by_what_has_been_placed() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p1", "p2", "d1", "d2")
    assert [place[0] for place in places(world.submit(ask(0, prompt=9)))] == ["d1", "p1"]
    assert [place[0] for place in places(world.submit(ask(1, prompt=5)))] == ["d2", "p2"]
    assert [place[0] for place in places(world.submit(ask(2, prompt=5)))] == ["d2", "p2"]
    world.token("p1", 0, request=0)  # its prompt is read; its KV stays
    assert [place[0] for place in places(world.submit(ask(3)))] == ["d1", "p1"]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit", "join", "die", "token", "token", "token", "fail", "beat", "end", "time"]
        ),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    max_size=80,
)


@given(EVENTS, st.sampled_from(Policy))
@settings(max_examples=200, deadline=None)
def test_whatever_happens_every_index_comes_once_and_every_request_ends(
    events: list[tuple[str, int, int]], policy: Policy
) -> None:
    world = World(policy)
    names = ["p", "d", "m1", "m2"]
    seen: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    num_submitted = 0

    def take(effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Emit):
                assert effect.request_id not in ends
                seen.setdefault(effect.request_id, []).append(effect.item.index)
            elif isinstance(effect, End):
                ends[effect.request_id] = ends.get(effect.request_id, 0) + 1

    for what, one, other in events:
        name = names[one]
        if what == "submit":
            take(world.submit(ask(num_submitted, deadline=world.now + 30.0)))
            num_submitted += 1
        elif what == "join":
            take(world.join(name))
        elif what == "time":
            world.now += one + 0.5
            take(world.dispatch.tick(world.now))
        elif what == "end" and num_submitted:
            take(world.dispatch.end(request_id(other % num_submitted), State.ABORTED, world.now))
        elif name in world.epochs:
            request = world.dispatch._requests.get(request_id(other))
            number = request.attempt.number if request is not None else 1
            index = len(request.output) if request is not None else 0
            if what == "die":
                take(world.dispatch.unreachable(world.link(name), world.now))
            elif what == "beat":
                take(world.beat(name, [request.key] if request is not None else []))
            elif what == "token":
                finish = FinishReason.LENGTH if index == 3 else None
                take(world.token(name, max(0, index - one % 2), number, other, finish))
            else:
                failure = AttemptFailed(
                    Key(request_id(other), number), list(FailureKind)[one], "why"
                )
                take(world.says(name, failure))
    take(world.dispatch.tick(world.now + 31.0))
    assert ends == {request_id(index): 1 for index in range(num_submitted)}
    for indexes in seen.values():
        assert indexes == list(range(len(indexes)))
    assert world.dispatch.num_requests == 0
    for effect in world.dispatch.beats():
        assert isinstance(effect, Say) and effect.message == RouterBeat(())


def roles_told(effects: list[Effect]) -> list[tuple[str, Role]]:
    return [
        (effect.link.identity.decode().partition("@")[0], effect.message.role)
        for effect in effects
        if isinstance(effect, Say) and isinstance(effect.message, SetRole)
    ]


def role_beat(world: World, name: str, role: Role, *live: Key) -> list[Effect]:
    state = WorkerBeat(BlockCounts(64, 64, 0, 0), 0, 0, live, duty=Duty(role, 64, 8))
    return world.says(name, state)


def test_a_new_role_counts_at_once_and_is_said_until_the_worker_has_it() -> None:
    world = World(Policy.DISAGGREGATED)
    world.join("p1", "p2", "d1")
    found, effects = world.dispatch.scale({Role.PREFILL: 1, Role.DECODE: 2}, 0.0)
    assert found == [Move("p1", Role.PREFILL, Role.DECODE)]
    assert roles_told(effects) == [("p1", Role.DECODE)]
    assert [place[:2] for place in places(world.submit(ask()))] == [
        ("d1", Task.DECODE),
        ("p2", Task.PREFILL),
    ]
    assert [place[0] for place in places(world.submit(ask(1)))] == ["p1", "p2"]
    member = world.dispatch.members.get(world.ref("p1"))
    assert member is not None and (member.role, member.actual_role) == (Role.DECODE, Role.PREFILL)
    key = Key(request_id(1), 1)
    assert roles_told(role_beat(world, "p1", Role.PREFILL, key)) == []
    assert roles_told(role_beat(world.at(TELL_EVERY_S), "p1", Role.PREFILL, key)) == [
        ("p1", Role.DECODE)
    ]
    assert roles_told(role_beat(world.at(3 * TELL_EVERY_S), "p1", Role.DECODE, key)) == []
    assert member.actual_role is Role.DECODE


def test_the_next_life_of_a_worker_is_given_its_role_again() -> None:
    world = World()
    world.join("p", "d")
    world.dispatch.scale({Role.MIXED: 2}, 0.0)
    assert roles_told(world.join("p")) == [("p", Role.MIXED)]


def test_what_will_miss_its_objectives_is_refused_at_once() -> None:
    world = World()
    admission = Admission.SLO
    world.dispatch = Dispatch(
        world.policy,
        POOLS,
        Membership("f"),
        99,
        objectives=Objectives(500, 30),
        admission=admission,
    )
    cost = StepCost(PrefillCost(1.0, 1.0, 0.0), DecodeCost(5.0, 0.0, 0.0))  # a ms a token
    address = PeerAddress("m", 1, "tcp://x:1", "t")
    hello = Hello(
        PROTOCOL_VERSION, Role.MIXED, 1, address, "f/x/16", BLOCKS, 16, 1024, 8, 512, cost
    )
    world.epochs["m"] = 1
    world.dispatch.receive(world.link("m"), hello, 0.0)
    assert any(isinstance(effect, Say) for effect in world.submit(ask(0, prompt=300)))
    (refused,) = world.submit(ask(1, prompt=300))
    assert isinstance(refused, End) and isinstance(refused.error, Unavailable)
    assert (refused.error.status, refused.error.code) == (429, "slo_missed")
    assert refused.error.retry_after == pytest.approx(0.15, abs=0.05)
    world.token("m", 0, finish=FinishReason.STOP)  # the first has ended: there is time again
    assert any(isinstance(effect, Say) for effect in world.submit(ask(2, prompt=300)))


def test_what_a_worker_says_of_its_slack_is_in_its_row() -> None:
    world = World()
    world.join("p", "d")
    world.submit(ask())
    world.now = 7.0
    for name in ("p", "d"):
        world.beat(name, [Key(request_id(0), 1)])
    item = TokenItem(Key(request_id(0), 1), 0, 100)
    world.says("d", TokenBatch((item,), 42.0))
    item = TokenItem(Key(request_id(0), 1), 1, 101)
    world.says("d", TokenBatch((item,)))  # one that says nothing of it
    view = {one.ref.worker_id: one for one in world.dispatch._fleet.snapshot(7.0, ()).workers}["d"]
    assert (view.slack_ms, view.slack_at) == (42.0, 7.0)


def test_the_planner_gives_an_idle_worker_another_role() -> None:
    world = World()
    world.dispatch = Dispatch(Policy.DISAGGREGATED, POOLS, Membership("f"), 99, plan_roles=True)
    cost = StepCost(PrefillCost(1.0, 1.0, 0.0), DecodeCost(5.0, 0.0, 0.0))  # a ms a token
    for name in ("p", "d1", "d2", "d3"):
        address = PeerAddress(name, 1, "tcp://x:1", "t")
        role = ROLES[name[0]]
        hello = Hello(PROTOCOL_VERSION, role, 1, address, "f/x/16", BLOCKS, 16, 1024, 8, 512, cost)
        world.epochs[name] = 1
        world.dispatch.receive(world.link(name), hello, 0.0)
    told: list[Effect] = []
    for second in range(12):
        world.now = float(second)
        for name in world.epochs:
            world.beat(name)
        for index in range(3):  # 1.8 s of prompts a second
            world.submit(ask(3 * second + index, prompt=600, deadline=99.0))
            world.dispatch.end(request_id(3 * second + index), State.ABORTED, world.now)
        told += [e for e in world.dispatch.tick(world.now) if isinstance(e, Say)]
    roles = [say.message for say in told if isinstance(say.message, SetRole)]
    assert roles == [SetRole(Role.PREFILL)]
    assert world.dispatch.staffing.planning
    world.dispatch.scale({Role.MIXED: 4}, world.now)
    assert not world.dispatch.staffing.planning  # what was set by hand, stays
