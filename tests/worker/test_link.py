"""When a worker says what to its router, on a clock of the test's own."""

from __future__ import annotations

from pdserve.core.ids import Role
from pdserve.core.messages import (
    BlockCounts,
    Hello,
    PeerAddress,
    Refused,
    RouterBeat,
    Welcome,
    WorkerBeat,
)
from pdserve.worker.link import COMPLAIN_AFTER_S, LinkState, LinkTiming, RouterLink, Tick

COUNTS = BlockCounts(4, 4, 0, 0)
BEAT = WorkerBeat(COUNTS, 0, 0, ())
HELLO = Hello(
    1, Role.MIXED, 1, PeerAddress("w", 1, "tcp://127.0.0.1:1", "t"), "f", COUNTS, 16, 64, 1
)
TIMING = LinkTiming(beat_every=1, hello_every=2, dead_after=5)


def link() -> RouterLink:
    return RouterLink(HELLO, TIMING, 0)


def test_it_says_hello_until_it_is_welcome_and_beats_then() -> None:
    tested = link()
    said = [tested.tick(BEAT, now).message for now in (0, 1, 2)]
    assert said == [HELLO, None, HELLO]
    assert not tested.heard(Welcome(7), 3)
    assert tested.state is LinkState.JOINED
    assert [tested.tick(BEAT, now).message for now in (4, 4.5, 5)] == [BEAT, None, BEAT]


def test_a_worker_that_hangs_is_silent() -> None:
    tested = link()
    tested.heard(Welcome(7), 0)
    assert tested.tick(None, 1) == Tick()


def test_a_silent_router_is_lost_once_and_looked_for_again() -> None:
    tested = link()
    tested.heard(Welcome(7), 0)
    tested.heard(RouterBeat(()), 3)
    assert not tested.tick(BEAT, 8).router_lost
    assert tested.tick(BEAT, 8.5) == Tick(HELLO, router_lost=True)
    assert tested.tick(BEAT, 11) == Tick(HELLO)


def test_another_router_is_not_the_one_that_placed_things_here() -> None:
    tested = link()
    tested.heard(Welcome(7), 0)
    assert not tested.heard(Welcome(7), 1)
    assert tested.heard(Welcome(8), 2)


def test_refused_it_says_no_more() -> None:
    tested = link()
    refusal = Refused("another model")
    tested.heard(refusal, 0)
    assert (tested.state, tested.refusal) == (LinkState.REFUSED, refusal)
    assert tested.tick(BEAT, 9) == Tick()


def test_it_complains_once_a_search() -> None:
    tested = link()
    assert tested.complaint(COMPLAIN_AFTER_S - 1) is None
    assert tested.complaint(COMPLAIN_AFTER_S) == COMPLAIN_AFTER_S
    assert tested.complaint(COMPLAIN_AFTER_S + 1) is None
    tested.heard(Welcome(7), 20)
    assert tested.complaint(40) is None
    tested.tick(BEAT, 40)
    assert tested.complaint(41) == 21
