"""A worker dies at each state of a transfer, over real sockets: tcp, in one process, and with
its pool mapped. The one that is left gets everything back, and goes on with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from kv_hosts import Host, drive, moved
from kv_parts import attempt

from pdserve.core.ids import Attempt, Medium
from pdserve.kvtransfer.media.events import Answered, Received
from pdserve.kvtransfer.media.inproc import inproc_network
from pdserve.kvtransfer.messages import Ack, Chunk, Commit, Complete, Grant, Offer, Starting

A, B = attempt(1), attempt(2)
NUM_BLOCKS = 40
MakeHost = Callable[..., Host]

# what was heard last before the death
AT_D = (Starting, Chunk, Commit)
AT_P = (Grant, Ack, Complete)


@pytest.fixture(params=[Medium.TCP, Medium.INPROC, Medium.SHM])
def medium(request: pytest.FixtureRequest) -> Medium:
    assert isinstance(request.param, Medium)
    return request.param


@pytest.fixture
def make_host(medium: Medium) -> Iterator[MakeHost]:
    with ExitStack() as stack:
        network = stack.enter_context(inproc_network()) if medium is Medium.INPROC else None

        def make(name: str, epoch: int = 1) -> Host:
            host = Host(name, epoch=epoch, network=network, medium=medium)
            stack.callback(host.close)
            return host

        yield make


def heard(host: Host, message: type) -> Callable[[], bool]:
    """Whether such a message has come to this host since."""
    seen: list[object] = []
    take = host.take

    def spy(events: object) -> None:
        events = list(events)  # type: ignore[call-overload]
        take(events)
        seen.extend(
            event.message
            for event in events
            if isinstance(event, Received | Answered) and isinstance(event.message, message)
        )

    host.take = spy  # type: ignore[method-assign, assignment]
    return lambda: bool(seen)


@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("message", [*AT_D, *AT_P])
def test_a_death(message: type, victim: str, medium: Medium, make_host: MakeHost) -> None:
    if message is Chunk and medium is Medium.SHM:
        message = Offer
    p, d = make_host("p"), make_host("d")
    p.fill(NUM_BLOCKS)
    reached = heard(p if message in AT_P else d, message)
    d.expect(A, p.ref, NUM_BLOCKS)
    p.start(A, d.address, NUM_BLOCKS)
    drive([p, d], reached)
    dead, left = (p, d) if victim == "p" else (d, p)
    dead.close()

    def over() -> bool:
        left.time_shift += 0.5  # what had come before the death may still renew a lease
        assert left.time_shift < 40.0
        return bool(left.endings.get(A))

    drive([left], over)
    assert len(left.endings[A]) == 1
    again = make_host(dead.ref.worker_id, epoch=2)
    source, target = (again, left) if victim == "p" else (left, again)
    transferred(source, target, B)


def transferred(p: Host, d: Host, which: Attempt) -> None:
    p.fill(7, seed=5)
    d.expect(which, p.ref, 7)
    p.start(which, d.address, 7)
    drive([p, d], lambda: bool(p.endings.get(which) and d.endings.get(which)))
    assert moved(p, d, 7)
