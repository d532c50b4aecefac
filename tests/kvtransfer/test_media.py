"""Blocks over real sockets: tcp with and without CURVE, and within one process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
import zmq
from kv_hosts import BLOCK_BYTES, Host, drive, moved, readable
from kv_parts import attempt

from pdserve.core.errors import ConfigError
from pdserve.core.host_pool import whole_blocks
from pdserve.core.ids import Attempt, Medium, WorkerRef
from pdserve.core.keys import Keys, load_keys, new_keys, secure_client
from pdserve.core.messages import FailureKind, Key
from pdserve.kvtransfer.effects import Released, Runnable, Send, SendBlocks, SendFailed, Write
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.media.endpoints import SocketLimits
from pdserve.kvtransfer.media.events import Received, Sent, SocketLost, Written
from pdserve.kvtransfer.media.inproc import inproc_network
from pdserve.kvtransfer.media.tcp import KvSockets
from pdserve.kvtransfer.messages import (
    TO_RECEIVER,
    TO_SENDER,
    Accepted,
    Cancel,
    Chunk,
    Starting,
)
from pdserve.simulation.engine import SimulatedKvPool

A, B = attempt(1), attempt(2)
MakeHost = Callable[..., Host]
QUICK = SocketLimits(stall_s=0.4)


def keys_in(folder: Path) -> Keys:
    new_keys(folder)
    return load_keys(folder)


@pytest.fixture
def make_host() -> Iterator[MakeHost]:
    with ExitStack() as stack:

        def make(name: str, **options: object) -> Host:
            host = Host(name, **options)  # type: ignore[arg-type]
            stack.callback(host.close)
            return host

        yield make


def done_with(which: Attempt, *hosts: Host) -> Callable[[], bool]:
    return lambda: all(host.endings.get(which) for host in hosts)


def ended(*hosts: Host) -> bool:
    return all(host.endings for host in hosts)


@pytest.mark.parametrize(
    "medium", ["tcp", "three streams", "curve", "inproc", "shm", "shm, checked"]
)
def test_two_workers_send_to_each_other(medium: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        options: dict[str, object] = {}
        if medium == "curve":
            options["keys"] = keys_in(tmp_path / "keys")
        elif medium == "three streams":
            options["streams"] = 3
        elif medium == "inproc":
            options["network"] = stack.enter_context(inproc_network())
            options["medium"] = Medium.INPROC
        elif medium.startswith("shm"):
            options["medium"] = Medium.SHM
            options["checksum_offers"] = medium.endswith("checked")
        one, two = Host("one", **options), Host("two", **options)  # type: ignore[arg-type]
        stack.callback(one.close)
        stack.callback(two.close)
        one.fill(100, seed=1)
        two.fill(37, seed=2)
        one.expect(B, two.ref, 37)
        one.start(A, two.address, 100)
        two.start(B, one.address, 37)
        drive([one, two], lambda: bool(one.endings.get(B)))
        two.expect(A, one.ref, 100)  # its placement comes after the first word of the peer
        drive([one, two], lambda: len(one.endings) == len(two.endings) == 2)
        assert moved(one, two, 100) and moved(two, one, 37)
        for source, target, which in ((one, two, A), (two, one, B)):
            (released,) = source.endings[which]
            assert isinstance(released, Released) and released.done is not None
            assert released.done.medium == options.get("medium", Medium.TCP)
            assert [type(e) for e in target.endings[which]] == [Runnable]
        assert one.kv.num_dropped == two.kv.num_dropped == 0
        assert not one.lost and not two.lost


@pytest.mark.parametrize("streams", [1, 4])
def test_large_blocks_travel_in_frames_and_are_not_copied_to_be_sent(
    make_host: MakeHost, streams: int
) -> None:
    """A block of 10 MiB is two frames; it is P's until ZeroMQ has let go of it."""
    options = {"token_bytes": 160 << 10, "num_blocks": 12, "streams": streams}
    p, d = make_host("p", **options), make_host("d", **options)
    p.fill(6)
    d.expect(A, p.ref, 6)
    p.start(A, d.address, 6)
    largest = 0

    def over() -> bool:
        nonlocal largest
        largest = max(largest, len(p.kv.sockets()) - 2)
        return ended(p, d) and largest == streams  # the last of them may come after the last frame

    drive([p, d], over)
    assert moved(p, d, 6)
    assert d.kv.num_dropped == 0 and p.kv.retry_ms is None


def heard(p: Host, d: Host) -> list[Received]:
    """What D hears and does not act on: Starting, once it has accepted the connection, and
    whatever comes. P takes nothing more."""
    got: list[Received] = []
    d.take = got.extend  # type: ignore[method-assign, assignment]
    drive([p, d], lambda: bool(got))
    p.take = list  # type: ignore[method-assign, assignment]
    return got


def test_blocks_that_lie_one_behind_the_other_are_one_frame(make_host: MakeHost) -> None:
    """Of four blocks in a message, in P's pool: 3 and 4, 9, 5."""
    p, d = make_host("p"), make_host("d")
    p.fill(10)
    p.start(A, d.address, 4)
    got = heard(p, d)
    p.kv.send(SendBlocks(d.address, Chunk(Key.of(A), 0, 4), (3, 4, 9, 5)), p.now)
    drive([p, d], lambda: any(isinstance(event.message, Chunk) for event in got))
    (event,) = [event for event in got if isinstance(event.message, Chunk)]
    assert [frame.nbytes // BLOCK_BYTES for frame in event.frames] == [2, 1, 1]
    assert b"".join(event.frames) == b"".join(p.pool.read((3, 4, 9, 5)))


def test_a_stream_is_dialled_once_the_one_before_has_its_connection(make_host: MakeHost) -> None:
    """ZeroMQ spreads connections over its threads by those that are there already."""
    p, d, gone = make_host("p", streams=4), make_host("d"), make_host("gone")
    gone.close()
    p.start(A, gone.address, 4)
    for _ in range(20):
        p.take(p.kv.flush(p.now))
    assert len(p.kv.sockets()) == 2 + 1
    d.expect(B, p.ref, 4)
    p.start(B, d.address, 4)
    drive([p, d], lambda: len(p.kv.sockets()) == 2 + 1 + 4)


def test_streams_that_are_new_to_the_peer_say_who_they_are(make_host: MakeHost) -> None:
    """D has forgotten its guest and with it the streams: they are let in again."""
    p, d = make_host("p", streams=3), make_host("d")
    for which in (A, B):
        d.expect(which, p.ref, 12)
        p.start(which, d.address, 12)
        drive([p, d], done_with(which, p, d))
        d.time_shift += 61.0
        d.take(d.kv.flush(d.now))  # idle, for D
        p.time_shift += 3.0
    assert d.kv.num_dropped <= 3


def test_a_stream_without_its_peer_is_a_stranger(make_host: MakeHost) -> None:
    d = make_host("d")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.plain_username, dealer.plain_password = b"peer", b"token-of-d"
    dealer.connect(d.address.endpoint)
    try:
        liar = Handshake(WorkerRef("liar", 1), "", "model-1", d.pool.layout)
        dealer.send(TO_RECEIVER.encode(replace(liar.connect(d.address), stream=1)))
        dealer.send(TO_RECEIVER.encode(Starting(Key.of(A), 4)))
        drive([d], lambda: d.kv.num_dropped == 2)
        assert not dealer.poll(50)  # nothing is said to it
    finally:
        context.destroy(linger=0)


def test_idle_sockets_are_closed_and_opened_again(make_host: MakeHost) -> None:
    p, d = make_host("p"), make_host("d")
    for which in (A, B):
        p.fill(5, seed=which.request_id.count("2"))
        d.expect(which, p.ref, 5)
        p.start(which, d.address, 5)
        drive([p, d], done_with(which, p, d))
        assert moved(p, d, 5)
        assert len(p.kv.sockets()) == 3
        for host in (p, d):
            host.time_shift += 61.0
            host.take(host.kv.flush(host.now))
            assert len(host.kv.sockets()) == 2


def test_what_the_two_disagree_on_is_told(make_host: MakeHost) -> None:
    p, d = make_host("p", fingerprint="model-2"), make_host("d")
    p.start(A, d.address, 3)
    drive([p, d], lambda: ended(p))
    (failed,) = p.endings[A]
    assert isinstance(failed, SendFailed) and failed.kind is FailureKind.TRANSFER
    assert "model fingerprint is model-2 there and model-1 here" in failed.text


def test_a_wrong_token_gets_no_byte_in(
    make_host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    p, d, honest = make_host("p", limits=QUICK), make_host("d"), make_host("honest")
    p.start(A, replace(d.address, token="guess"), 3)
    honest.fill(3)
    d.expect(B, honest.ref, 3)
    honest.start(B, d.address, 3)
    drive([p, d, honest], lambda: ended(p, d, honest))
    (failed,) = p.endings[A]
    assert isinstance(failed, SendFailed) and "token" in failed.text
    assert d.kv.num_dropped == 0  # ZeroMQ's handshake refused it
    assert moved(honest, d, 3)
    assert "token-of-d" not in caplog.text


def test_a_wrong_token_in_one_process(make_host: MakeHost) -> None:
    with inproc_network() as network:
        p, d = Host("p", network=network), Host("d", network=network)
        try:
            p.start(A, replace(d.address, token="guess"), 3)
            drive([p, d], lambda: ended(p))
            (failed,) = p.endings[A]
            assert isinstance(failed, SendFailed) and "token" in failed.text
            assert d.kv.num_dropped > 0  # the Connect, and what came behind it
        finally:
            p.kv.close()
            d.kv.close()


def test_another_key_gets_no_byte_in(make_host: MakeHost, tmp_path: Path) -> None:
    keys, others = keys_in(tmp_path / "a"), keys_in(tmp_path / "b")
    d, honest = make_host("d", keys=keys), make_host("honest", keys=keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for stranger in (None, others, Keys(keys.public, others.secret)):
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        if stranger is not None:
            secure_client(dealer, stranger)
        dealer.connect(d.address.endpoint)
        dealer.send(TO_RECEIVER.encode(Starting(Key.of(A), 4)))
    try:
        honest.fill(3)
        d.expect(B, honest.ref, 3)
        honest.start(B, d.address, 3)
        drive([d, honest], lambda: ended(d, honest))
        assert not readable(d, 200)
        assert moved(honest, d, 3) and d.kv.num_dropped == 0
    finally:
        context.destroy(linger=0)


def chunks(peer: Host, num: int, num_blocks: int) -> list[SendBlocks]:
    blocks = tuple(range(num_blocks))
    return [
        SendBlocks(peer.address, Chunk(Key.of(A), index * num_blocks, num_blocks), blocks)
        for index in range(num)
    ]


@pytest.mark.parametrize("streams", [1, 3])
def test_a_peer_that_stops_reading_loses_its_sockets(make_host: MakeHost, streams: int) -> None:
    """Its loop stands still: everything queued for it is given back, the others go on."""
    limits = SocketLimits(stall_s=0.4, high_water=2, max_queue=100 // streams)
    p = make_host("p", limits=limits, streams=streams)
    hung, well = make_host("hung", limits=limits), make_host("well")
    sent: Counter[int] = Counter()
    events: list[object] = []
    first, *others = chunks(hung, 150, 120)  # 72 MB
    events += p.kv.send(first, p.now)
    while len(p.kv.sockets()) < 2 + streams:
        events += p.kv.flush(p.now)
        readable(p, 5)
    for effect in others:
        events += p.kv.send(effect, p.now)
    p.fill(10)
    well.expect(B, p.ref, 10)
    p.start(B, well.address, 10)

    def lost() -> bool:
        # what ZeroMQ had begun to send it lets go of soon after
        num_sent = sum(isinstance(event, Sent) for event in events)
        return num_sent == 150 and any(isinstance(event, SocketLost) for event in events)

    drive([well], lambda: True)
    drive_without_events([p, well], events, lost)
    assert p.kv.num_dropped > 0  # its queue is bounded, and was full
    sent.update(event.first_block for event in events if isinstance(event, Sent))
    assert sent == Counter({index * 120: 1 for index in range(150)})
    (gone,) = [event for event in events if isinstance(event, SocketLost)]
    assert gone.peer == hung.ref and "not reading" in gone.text
    drive([p, well], lambda: ended(p, well))
    assert moved(p, well, 10)


def drive_without_events(
    hosts: list[Host], events: list[object], until: Callable[[], bool]
) -> None:
    """Like ``drive``, where the first host's own transfers are not the sender's."""
    known = hosts[0].take

    def take(new: list[object]) -> None:
        mine = [e for e in new if isinstance(e, SocketLost) or getattr(e, "attempt", None) == A]
        events.extend(mine)
        known([e for e in new if e not in mine])  # type: ignore[misc]

    hosts[0].take = take  # type: ignore[method-assign, assignment]
    try:
        drive(hosts, until)
    finally:
        hosts[0].take = known  # type: ignore[method-assign]


def test_a_guest_that_stops_reading_is_dropped(make_host: MakeHost) -> None:
    """One that dialled in and takes no answers; the other guests get theirs."""
    d, p = make_host("d", limits=QUICK), make_host("p")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.rcvhwm, dealer.rcvbuf = 0, 2, 1 << 16
    dealer.plain_username, dealer.plain_password = b"peer", b"token-of-d"
    dealer.connect(d.address.endpoint)
    try:
        mute = WorkerRef("mute", 9)
        layout = d.pool.layout
        dealer.send(TO_RECEIVER.encode(Handshake(mute, "", "model-1", layout).connect(d.address)))
        drive([d], lambda: bool(dealer.poll(0)))
        assert TO_SENDER.decode(dealer.recv()) == Accepted("d", 1, Medium.TCP)
        for _ in range(4000):  # 16 MB: more than the kernel's buffers take
            assert d.kv.send(Send(mute, Cancel(Key.of(B), "x" * 4096)), d.now) == []
        assert d.kv.retry_ms is not None
        p.fill(4)
        d.expect(A, p.ref, 4)
        p.start(A, d.address, 4)
        drive([d, p], lambda: ended(p, d) and bool(d.lost))
        assert moved(p, d, 4) and d.kv.retry_ms is None
        assert [event.peer for event in d.lost] == [mute]
        dealer.send(TO_RECEIVER.encode(Starting(Key.of(B), 4)))
        drive([d], lambda: d.kv.num_dropped == 1)  # a stranger again
    finally:
        context.destroy(linger=0)


def test_a_guest_that_went_away_costs_nothing(make_host: MakeHost) -> None:
    d = make_host("d", limits=QUICK)
    p = Host("p")
    p.fill(4)
    d.expect(A, p.ref, 4)
    p.start(A, d.address, 4)
    drive([d, p], lambda: ended(p, d))
    p.kv.close()
    end = d.now + 2 * QUICK.stall_s

    def said_on_and_on() -> bool:
        d.take(d.kv.send(Send(p.ref, Cancel(Key.of(A), "x" * 4096)), d.now))
        return d.now > end

    drive([d], said_on_and_on)
    assert not d.lost and d.kv.retry_ms is None


def test_an_unreachable_peer_is_given_up(make_host: MakeHost) -> None:
    gone = Host("gone")
    gone.kv.close()
    p = make_host("p", limits=QUICK)
    p.start(A, gone.address, 3)
    drive([p], lambda: ended(p))
    (failed,) = p.endings[A]
    assert isinstance(failed, SendFailed) and failed.kind is FailureKind.PEER_LOST
    assert gone.address.endpoint in failed.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"endpoint": "ipc:///tmp/x"}, "not reached by tcp"),
        ({"endpoint": "tcp://nowhere"}, "can't connect"),
        ({"endpoint": ""}, "not reached by tcp"),
        ({"public_key": "x" * 40}, "security.keys"),
    ],
)
def test_an_address_that_can_not_be_dialled(
    make_host: MakeHost, change: dict[str, str], said: str
) -> None:
    p, d = make_host("p"), make_host("d")
    p.start(A, replace(d.address, **change), 3)  # type: ignore[arg-type]
    (failed,) = p.endings[A]
    assert isinstance(failed, SendFailed) and said in failed.text


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://nowhere:x", "none"]
)
def test_what_can_not_be_bound_is_a_sentence(endpoint: str) -> None:
    pool = SimulatedKvPool(4, 4, 64)
    handshake = Handshake(WorkerRef("d", 1), "t", "f", pool.layout)
    with pytest.raises(ConfigError, match=r"bind|address"):
        KvSockets(handshake, pool, endpoint=endpoint)


def test_an_endpoint_in_use_is_a_sentence(make_host: MakeHost) -> None:
    d = make_host("d")
    handshake = Handshake(WorkerRef("e", 1), "t", "f", d.pool.layout)
    with pytest.raises(ConfigError, match="in use"):
        KvSockets(handshake, d.pool, endpoint=d.address.endpoint)


def test_checksums_travel_and_damage_is_not_written(make_host: MakeHost) -> None:
    p, d = make_host("p"), make_host("d")
    p.fill(2)
    p.start(A, d.address, 2)
    got = heard(p, d)
    p.kv.send(chunks(d, 1, 2)[0], p.now)
    drive([p, d], lambda: any(isinstance(event.message, Chunk) for event in got))
    (event,) = [event for event in got if isinstance(event.message, Chunk)]
    assert isinstance(event.message, Chunk)
    sums = event.message.checksums
    assert sums == tuple(xxhash.xxh3_64_intdigest(block) for block in p.pool.read((0, 1)))
    frames = tuple(whole_blocks(event.frames, BLOCK_BYTES))
    for blocks, told, ok in (((8, 9), sums, True), ((6, 7), (sums[0], sums[1] ^ 1), False)):
        assert d.kv.write(Write(A, 0, blocks, frames, told)) == [Written(A, 0, ok)]
    assert d.pool.read((8, 9)) == p.pool.read((0, 1))
    assert bytes(d.pool.read((6,))[0]) == bytes(BLOCK_BYTES)


def test_the_tail_of_the_last_block_is_zeroed_before_it_is_read(make_host: MakeHost) -> None:
    p, d = make_host("p"), make_host("d")
    p.fill(2)
    num_tokens = 64 + 10
    d.act(d.receiver.expect(A, p.ref, num_tokens, d.now))
    p.act(p.sender.start(A, d.address, num_tokens, p.now))
    p.act(p.sender.offer(A, (0, 1), p.now))
    p.act(p.sender.withdraw(attempt(9), p.now))
    drive([p, d], lambda: bytes(d.pool.read(d.theirs(2))[1]) != bytes(BLOCK_BYTES))
    assert bytes(d.pool.read(d.theirs(2))[1][10 * 64 :]) == bytes(54 * 64)
    assert moved(p, d, 2)
