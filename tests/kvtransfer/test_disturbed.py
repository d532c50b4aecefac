"""The medium that disturbs another: of a kind each fault by itself, and all over real sockets."""

from __future__ import annotations

from collections import Counter

import pytest
from kv_hosts import Host, drive, moved
from kv_parts import ADDRESS, P, attempt, handshake

from pdserve.core.config import BlocksDisturbanceSection, FaultsSection
from pdserve.core.ids import Medium
from pdserve.core.messages import Key, PeerAddress
from pdserve.kvtransfer.effects import Pull, Released, Runnable, Send, SendBlocks, Write
from pdserve.kvtransfer.media.disturbed import DisturbedMedium, Pollable
from pdserve.kvtransfer.media.events import Answered, KvEvent, Received, Sent, Written
from pdserve.kvtransfer.messages import Ack, Chunk, Starting

A = attempt(1)
STARTING = Received(P, Starting(Key.of(A), 4), ())
ACK = Answered(P, Ack(Key.of(A), 0, 1))
OWN = [Sent(A, 0), Written(A, 0, True)]


class Still:
    """A medium on which something comes in when a test says so."""

    def __init__(self) -> None:
        self.coming: list[KvEvent] = []
        self.sent: list[Send | SendBlocks] = []

    address: PeerAddress = ADDRESS
    retry_ms: int | None = None

    def close(self) -> None: ...

    def sockets(self) -> list[tuple[Pollable, int]]:
        return []

    def on_readable(self, socket: Pollable, now: float) -> list[KvEvent]:
        return self.flush(now)

    def send(self, effect: Send | SendBlocks, now: float) -> list[KvEvent]:
        self.sent.append(effect)
        return []

    def write(self, effect: Write | Pull) -> list[Written]:
        return []

    def flush(self, now: float) -> list[KvEvent]:
        coming, self.coming = self.coming, []
        return coming


def disturbed(**rates: float) -> tuple[Still, DisturbedMedium]:
    inner = Still()
    return inner, DisturbedMedium(inner, faults(**rates), "w")


def faults(seed: int = 0, **rates: float) -> FaultsSection:
    return FaultsSection(seed=seed, kv=BlocksDisturbanceSection(**rates))


def test_messages_are_lost_and_what_the_rim_says_is_not() -> None:
    inner, medium = disturbed(drop=1.0)
    inner.coming = [STARTING, *OWN, ACK]
    assert medium.on_readable(0, 0.0) == OWN
    inner.coming = [*OWN, STARTING]
    assert medium.flush(0.0) == OWN


def test_messages_are_late_and_the_loop_is_told_to_come_back_for_them() -> None:
    inner, medium = disturbed(delay=1.0, delay_ms=1000.0)
    inner.coming = [STARTING, ACK]
    assert medium.on_readable(0, 0.0) == [] and medium.retry_ms is not None
    assert Counter(map(id, medium.flush(1.0))) == Counter(map(id, [STARTING, ACK]))
    assert medium.retry_ms is None


def test_a_greeting_is_disturbed_on_its_way_out_and_nothing_else_is() -> None:
    greeting = Send(ADDRESS, handshake(P, "t").connect(ADDRESS))
    other = Send(ADDRESS, STARTING.message)
    inner, medium = disturbed(drop=1.0)
    assert medium.send(greeting, 0.0) == medium.send(other, 0.0) == []
    assert inner.sent == [other]
    inner, medium = disturbed(delay=1.0, delay_ms=1000.0)
    medium.send(greeting, 0.0)
    assert inner.sent == [] and medium.retry_ms is not None
    medium.flush(1.0)
    assert inner.sent == [greeting]


def test_one_bit_of_a_chunk_is_turned_where_a_checksum_would_tell() -> None:
    inner, medium = disturbed(damage=1.0)
    frames = (memoryview(bytes(16)), memoryview(bytes(16)))
    checked = Received(P, Chunk(Key.of(A), 0, 2, (1, 2)), frames)
    unchecked = Received(P, Chunk(Key.of(A), 0, 2), frames)
    inner.coming = [checked, unchecked, STARTING]
    damaged, *others = medium.flush(0.0)
    assert others == [unchecked, STARTING]
    assert isinstance(damaged, Received) and damaged.message == checked.message
    assert sum(byte.bit_count() for frame in damaged.frames for byte in frame) == 1


@pytest.mark.parametrize("medium", [Medium.TCP, Medium.SHM])
def test_transfers_get_over_everything_at_once(medium: Medium) -> None:
    """Time runs as fast as the test: what waits for a resend gets it some turns later."""
    rates = {"drop": 0.05, "duplicate": 0.3, "delay": 0.3, "delay_ms": 3000.0}
    p, d = (Host(name, medium=medium, faults=faults(1, **rates)) for name in ("p", "d"))
    try:
        p.fill(30)
        attempts = [attempt(number) for number in range(3)]
        for which in attempts:
            d.expect(which, p.ref, 30)
            p.start(which, d.address, 30)
        drive([p, d], lambda: bool(p.sender.links()), timeout=60)

        def over() -> bool:
            for host in (p, d):
                host.time_shift += 0.05
            return len(p.endings) == len(d.endings) == len(attempts)

        drive([p, d], over, timeout=60)
        assert moved(p, d, 30)
        for which in attempts:
            assert [type(ending) for ending in p.endings[which]] == [Released]
            assert [type(ending) for ending in d.endings[which]] == [Runnable]
    finally:
        p.close()
        d.close()
