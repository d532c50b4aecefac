"""One fault at a time, at each word of the protocol: by value and by reference.

After each: everything ends in bounded time, every block has come back, and the answers are
those of an undisturbed run (the net checks each token, and that nothing is held at the end).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from worker_net import MODEL, Net, Request, Shape, Worker

from pdserve.core.params import SamplingParams
from pdserve.kvtransfer.messages import (
    Accepted,
    Ack,
    Cancel,
    Chunk,
    Commit,
    Complete,
    Connect,
    Grant,
    Offer,
    PeerBeat,
    Starting,
    Withdraw,
)

FLOW = (Connect, Accepted, Starting, Grant, Chunk, Ack, Commit, Complete)
STOP = (Withdraw, Cancel)
media = pytest.mark.parametrize("by_reference", [False, True], ids=["by_value", "by_reference"])


def request(number: int, **params: Any) -> Request:
    prompt = tuple(range(2 + number, 25 + number))
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **params})
    expected = MODEL.expected_tokens(prompt, (), sampling, 48 - len(prompt))
    return Request(f"{number:032x}", prompt, sampling, expected, "p", "d")


def pair(seed: int, by_reference: bool) -> Net:
    shape = Shape(num_blocks=24, by_reference=by_reference)
    return Net([Worker("p", shape), Worker("d", shape)], random.Random(seed))


def kind_of(message: type, by_reference: bool) -> type:
    return Offer if by_reference and message is Chunk else message


class Once:
    """Something that befalls the first message of a kind."""

    def __init__(self, kind: type, arrivals: tuple[float, ...]) -> None:
        self.kind = kind
        self.arrivals = arrivals
        self.happened = False

    def __call__(self, message: object) -> tuple[float, ...]:
        if self.happened or not isinstance(message, self.kind):
            return (0.0,)
        self.happened = True
        return self.arrivals


FAULTS = {
    "lost": (),
    "doubled": (0.0, 0.0),
    "doubled late": (0.0, 3.0),
    "behind the next": (0.3,),
    "late": (2.5,),
}


@media
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("message", [*FLOW, PeerBeat])
def test_one_message(message: type, fault: str, by_reference: bool) -> None:
    """Nothing of this costs a request: what is lost is said again, what comes twice or late is
    known."""
    kind = kind_of(message, by_reference)
    for seed in range(3):
        net = pair(seed, by_reference)
        net.arrivals = once = Once(kind, FAULTS[fault])
        requests = [request(number) for number in range(2)]
        for one in requests:
            net.submit(one)
        if kind is PeerBeat:
            net.deliver_all()
            net.plan("p")  # a step that takes its time
            for _ in range(6):
                net.tick()
                net.deliver_all()
        net.run()
        assert once.happened
        assert [one.text for one in requests] == [one.expected for one in requests]
        assert net.failures.total() == 0 and all(one.num_replays == 0 for one in requests)


@media
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("message", STOP)
def test_one_message_of_an_end(message: type, fault: str, by_reference: bool) -> None:
    """P's first token is the last, or D's client hangs up; the peer may not hear of it."""
    for seed in range(3):
        net = pair(seed, by_reference)
        net.arrivals = once = Once(message, FAULTS[fault])
        short, other = request(0, max_tokens=1), request(1)
        net.submit(short)
        net.submit(other)
        if message is Cancel:
            told_at_d_only(net, short, Starting)
        net.run()
        assert other.text == other.expected
        assert once.happened or message is Cancel


def told_at_d_only(net: Net, victim: Request, when: type) -> None:
    """D hears of an abort as soon as such a message of the victim has left; P later."""
    seen = at_first(net, victim, when)
    while not seen():
        if not net.step():
            net.tick()
    net.abort(victim)


def at_first(net: Net, victim: Request, kind: type) -> Callable[[], bool]:
    """Whether a message of this kind has left since."""
    found: list[object] = []

    def spy(message: object) -> None:
        key = getattr(message, "key", None)
        if isinstance(message, kind) and (key is None or key.request_id == victim.request_id):
            found.append(message)

    net.spies.append(spy)
    return lambda: bool(found)


def run_until(net: Net, reached: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if reached():
            return
        if not net.step():
            net.tick()
    raise AssertionError("that state is never reached")


@media
@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("message", FLOW)
def test_either_side_dies(message: type, victim: str, by_reference: bool) -> None:
    """At the moment when the first message of a kind leaves. The other request survives too."""
    for seed in range(3):
        net = pair(seed, by_reference)
        requests = [request(number) for number in range(2)]
        reached = at_first(net, requests[0], kind_of(message, by_reference))
        for one in requests:
            net.submit(one)
        run_until(net, reached)
        net.restart(victim)
        net.run()
        assert [one.text for one in requests] == [one.expected for one in requests]


@media
@pytest.mark.parametrize("message", FLOW)
def test_the_client_hangs_up(message: type, by_reference: bool) -> None:
    for seed in range(5):
        net = pair(seed, by_reference)
        gone, stays = request(0), request(1)
        reached = at_first(net, gone, kind_of(message, by_reference))
        net.submit(gone)
        net.submit(stays)
        run_until(net, reached)
        net.abort(gone)
        net.run()
        assert stays.text == stays.expected


@media
@pytest.mark.parametrize("victim", ["p", "d"])
def test_a_peer_restarts_again_and_again_under_load(victim: str, by_reference: bool) -> None:
    net = pair(7, by_reference)
    requests = [request(number) for number in range(6)]
    for one in requests:
        net.submit(one)
        for _ in range(40):
            if not net.step():
                net.tick()
        net.restart(victim)
    net.run()
    assert [one.text for one in requests] == [one.expected for one in requests]


@media
def test_a_grant_that_never_comes(by_reference: bool) -> None:
    """P holds the prompt for as long as D says that it wants it, and no longer."""
    net = pair(1, by_reference)
    net.arrivals = lambda message: () if isinstance(message, Grant) else (0.0,)
    waiting = request(0)
    net.submit(waiting)
    for _ in range(80):  # two leases
        while net.step():
            pass
        net.tick()
    p, d = net.workers["p"], net.workers["d"]
    assert p.core.blocks.held and d.core.blocks.held
    assert net.failures.total() == 0  # beats keep it
    net.abort(waiting)
    net.run()
    assert not p.core.blocks.held and not d.core.blocks.held
