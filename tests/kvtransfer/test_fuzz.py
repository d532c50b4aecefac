"""Bytes and messages that no honest peer sends: dropped, counted, and nobody else notices."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_hosts import Host, drive, moved, readable
from kv_parts import ADDRESS, SETTINGS, D, P, attempt, handshake, token_of

from pdserve.core.codec import Codec
from pdserve.core.errors import MalformedMessage
from pdserve.core.ids import Medium, Role, Task, WorkerRef
from pdserve.core.messages import (
    TO_ROUTER,
    TO_WORKER,
    Abort,
    AttemptFailed,
    BlockCounts,
    Bye,
    Drain,
    FailureKind,
    Hello,
    Key,
    PeerLink,
    Place,
    Refused,
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
from pdserve.core.params import SamplingParams
from pdserve.kvtransfer.effects import Pull, Send, SendBlocks, Write
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.media.inproc import InprocNetwork
from pdserve.kvtransfer.messages import (
    TO_RECEIVER,
    TO_SENDER,
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
    Rejected,
    Starting,
    ToReceiver,
    ToSender,
    Withdraw,
)
from pdserve.kvtransfer.receiver import Receiver
from pdserve.kvtransfer.sender import Sender

A = attempt(1)
OTHER = WorkerRef("prefill-9", 3)
COMMIT = Commit(Key.of(A), 22, token_of(A))
HONEST_TO_RECEIVER: list[ToReceiver] = [
    handshake(P, "secret-of-p").connect(ADDRESS),
    Starting(Key.of(A), 22),
    Chunk(Key.of(A), 2, 2, (1, 2**64 - 1)),
    Offer(Key.of(A), 2, (7, 9), (1, 2**64 - 1)),
    COMMIT,
    Withdraw(Key.of(A)),
    PeerBeat((Key.of(A), Key.of(attempt(2)))),
]
HONEST_TO_SENDER: list[ToSender] = [
    Accepted(D.worker_id, D.epoch, Medium.TCP),
    Rejected("no"),
    Grant(Key.of(A), 2),
    Ack(Key.of(A), 2, 2),
    Complete(Key.of(A)),
    Cancel(Key.of(A), "over"),
    PeerBeat(()),
]


HONEST_TO_ROUTER: list[ToRouter] = [
    Hello(
        version=1,
        role=Role.DECODE,
        pid=7,
        address=ADDRESS,
        fingerprint="f" * 64,
        blocks=BlockCounts(9, 3, 3, 3),
        block_size=16,
        max_context=4096,
        max_batch=8,
    ),
    WorkerBeat(BlockCounts(9, 3, 3, 3), 1, 2, (Key.of(A),), (PeerLink("d", Medium.SHM),)),
    Started(Key.of(A), 16),
    TokenBatch((token_of(A), token_of(attempt(2)))),
    TransferDone(Key.of(A), "d", Medium.SHM, 1 << 30, 0.5, 0.25, 0.125),
    AttemptFailed(Key.of(A), FailureKind.PEER_LOST, "it is gone"),
    Bye(),
]
HONEST_TO_WORKER: list[ToWorker] = [
    Welcome(7),
    Refused("another model"),
    Place(Key.of(A), Task.PREFILL, (1, 2, 3), (4,), SamplingParams(max_tokens=8), ADDRESS),
    Abort(Key.of(A)),
    RouterBeat((Key.of(A), Key.of(attempt(2)))),
    Drain(),
]


def mutated(random: Random, data: bytes) -> bytes:
    """One of the ways in which bytes go wrong, or are made to."""
    at = random.randrange(len(data))
    match random.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + random.randbytes(random.randint(1, 9)) + data[at:]
        case 3:
            return data + data
        case _:
            tag, fields = msgpack.unpackb(data)
            values = [-1, 2**63, 2**64 - 1, "", "x" * 5000, None, [], {}, 1.5, b"\xff", [[]], True]
            if fields and random.random() < 0.9:
                fields[random.choice(list(fields))] = random.choice(values)
            else:
                fields[random.choice(["extra", ""])] = 1
            packed = msgpack.packb([random.choice([tag, tag + 1, 99, -1, 2**60]), fields])
            assert isinstance(packed, bytes)
            return packed


def test_honest_messages_survive_the_wire() -> None:
    for to_receiver in HONEST_TO_RECEIVER:
        assert TO_RECEIVER.decode(TO_RECEIVER.encode(to_receiver)) == to_receiver
    for to_sender in HONEST_TO_SENDER:
        assert TO_SENDER.decode(TO_SENDER.encode(to_sender)) == to_sender


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_malformed(data: bytes) -> None:
    for codec in (TO_RECEIVER, TO_SENDER):
        with pytest.raises(MalformedMessage):
            codec.decode(data)


TRIES = 25_000  # of each codec, so about 100,000 messages with what comes below


@pytest.mark.parametrize(
    ("codec", "honest"),
    [
        (TO_RECEIVER, [TO_RECEIVER.encode(message) for message in HONEST_TO_RECEIVER]),
        (TO_SENDER, [TO_SENDER.encode(message) for message in HONEST_TO_SENDER]),
        (TO_ROUTER, [TO_ROUTER.encode(message) for message in HONEST_TO_ROUTER]),
        (TO_WORKER, [TO_WORKER.encode(message) for message in HONEST_TO_WORKER]),
    ],
    ids=["to receiver", "to sender", "to router", "to worker"],
)
def test_mutated_messages_are_malformed_or_another_message(
    codec: Codec[Any], honest: list[bytes]
) -> None:
    """On every socket that there is, control included."""
    random = Random(5)
    num_malformed = 0
    for _ in range(TRIES):
        data = mutated(random, random.choice(honest))
        try:
            message = codec.decode(data)
        except MalformedMessage as error:
            num_malformed += 1
            assert str(error)
        else:
            codec.decode(codec.encode(message))  # it is one of ours, and within its bounds
    assert num_malformed > TRIES // 2


# messages that are well formed, and lie

keys = st.builds(lambda name, number: Key.of(attempt(name, number)), st.integers(0, 2), st.just(1))
counts = st.one_of(st.integers(0, 8), st.just(2**31 - 1))
tokens = st.builds(TokenItem, keys, st.just(0), st.integers(0, 9))
chunks = st.builds(
    Chunk, keys, counts, st.integers(1, 7), st.lists(st.just(1), max_size=3).map(tuple)
)
any_to_receiver = st.one_of(
    st.builds(Starting, keys, counts),
    chunks,
    st.builds(
        Offer,
        keys,
        counts,
        st.lists(counts, min_size=1, max_size=4).map(tuple),
        st.lists(st.just(3), max_size=4).map(tuple),
        st.lists(st.just(1), max_size=3).map(tuple),
    ),
    st.builds(Commit, keys, counts, tokens),
    st.builds(Withdraw, keys),
    st.builds(PeerBeat, st.lists(keys, max_size=3).map(tuple)),
)
any_to_sender = st.one_of(
    st.builds(
        Accepted, st.just(D.worker_id), st.sampled_from([D.epoch, 5]), st.sampled_from(Medium)
    ),
    st.builds(Rejected, st.just("no")),
    st.builds(Grant, keys, counts),
    st.builds(Ack, keys, counts, counts),
    st.builds(Complete, keys),
    st.builds(Cancel, keys, st.just("no")),
    st.builds(PeerBeat, st.lists(keys, max_size=3).map(tuple)),
)
frame_sizes = st.lists(st.sampled_from([0, 15, 16, 16, 16, 17]), max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    said=st.lists(st.tuples(st.sampled_from([P, OTHER]), any_to_receiver, frame_sizes), max_size=40)
)
def test_a_lying_sender_writes_nothing_but_what_it_was_granted(
    said: list[tuple[WorkerRef, ToReceiver, list[int]]],
) -> None:
    receiver = Receiver(SETTINGS)
    receiver.expect(A, P, 22, 0.0)
    receiver.receive(P, Starting(Key.of(A), 22), (), 0.0)
    receiver.reserved(A, 2, (50, 51, 52, 53, 54, 55), 0.0)
    now = 0.0
    for peer, message, sizes in said:
        now += 0.1
        frames = [memoryview(bytes(size)) for size in sizes]
        for effect in (*receiver.receive(peer, message, frames, now), *receiver.tick(now)):
            if isinstance(effect, Write):
                assert peer == P and effect.attempt == A and effect.first_block >= 2
                first = 50 + effect.first_block
                assert effect.blocks == tuple(range(first, first + len(effect.frames)))
                assert effect.blocks[-1] <= 55
                assert all(frame.nbytes == 16 for frame in effect.frames)
                receiver.written(A, effect.first_block, True, now)
            elif isinstance(effect, Pull):
                assert peer == effect.peer == P and effect.attempt == A
                assert effect.first_block >= 2
                first = 50 + effect.first_block
                assert effect.blocks == tuple(range(first, first + len(effect.theirs)))
                assert effect.blocks[-1] <= 55
                assert len(effect.theirs) == len(effect.generations)
                receiver.written(A, effect.first_block, True, now)
            elif isinstance(effect, Send):
                assert effect.peer in (P, OTHER)


@settings(max_examples=300, deadline=None)
@given(said=st.lists(any_to_sender, max_size=40))
def test_a_lying_receiver_gets_nothing_but_what_was_offered(said: Sequence[ToSender]) -> None:
    sender = Sender(SETTINGS, handshake(P, "secret-of-p"))
    sender.start(A, ADDRESS, 22, 0.0)
    offered = (10, 11, 12, 13)
    sender.offer(A, offered, 0.0)
    now = 0.0
    for message in said:
        now += 0.3
        for effect in (*sender.receive(D, message, now), *sender.tick(now)):
            if isinstance(effect, SendBlocks):
                first = effect.message.first_block
                assert effect.blocks == offered[first : first + effect.message.num_blocks]
                assert effect.blocks
                sender.sent(A, first, now)


# at the sockets


def garbage(random: Random, connect: Connect) -> list[bytes]:
    """A message of several frames, as a peer with the right token may send it."""
    data = TO_RECEIVER.encode(random.choice([*HONEST_TO_RECEIVER, connect]))
    match random.randrange(5):
        case 0:
            return [random.randbytes(random.randrange(300)) for _ in range(random.randint(1, 5))]
        case 1:
            return [mutated(random, data)]
        case 2:
            return [b"", data]
        case 3:
            return [data, *[random.randbytes(random.choice([0, 1, 4096]))] * random.randint(1, 20)]
        case _:
            return (
                [TO_RECEIVER.encode(connect)] if random.random() < 0.2 else [mutated(random, data)]
            )


def test_garbage_at_the_sockets_while_an_honest_peer_works() -> None:
    random = Random(11)
    p, d = Host("p"), Host("d")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw: list[socket.socket] = []
    host, _, port = d.address.endpoint.removeprefix("tcp://").rpartition(":")
    dealers = []
    try:
        for name in range(3):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.plain_username, dealer.plain_password = b"peer", b"token-of-d"
            dealer.connect(d.address.endpoint)
            liar = Handshake(WorkerRef(f"liar-{name}", 1), "", "model-1", d.pool.layout)
            dealers.append((dealer, liar.connect(d.address)))
        for number in range(60):
            which = attempt(number)
            p.fill(12, seed=number)
            d.expect(which, p.ref, 12)
            p.start(which, d.address, 12)
            for _ in range(150):
                dealer, connect = random.choice(dealers)
                with contextlib.suppress(zmq.Again):
                    dealer.send_multipart(garbage(random, connect), zmq.NOBLOCK)
            for _ in range(5):  # not even ZeroMQ
                raw.append(socket.create_connection((host, int(port))))
                start = random.choice([b"", b"\xff" + bytes(8) + b"\x7f\x03\x01PLAIN", b"GET / "])
                with contextlib.suppress(OSError):
                    raw[-1].sendall(start + random.randbytes(random.randrange(300)))
            drive([p, d], lambda which=which: which in p.endings and which in d.endings)  # type: ignore[misc]
            assert moved(p, d, 12)
        assert d.kv.num_dropped > 1000
        assert p.kv.num_dropped == 0 and not p.lost and not d.lost
    finally:
        for connection in raw:
            connection.close()
        context.destroy(linger=0)
        p.kv.close()
        d.kv.close()


def test_garbage_from_the_peer_that_was_dialled() -> None:
    """Behind the address sits somebody who answers anything; the sender only ever fails."""
    random = Random(3)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    p = Host("p", network=InprocNetwork(context))
    try:
        liar = context.socket(zmq.ROUTER)
        liar.linger = 0
        liar.bind("inproc://liar")
        p.start(A, replace(ADDRESS, endpoint="inproc://liar"), 12)
        drive([p], lambda: bool(liar.poll(0)))
        routing_id = liar.recv_multipart()[0]
        honest = [TO_SENDER.encode(message) for message in HONEST_TO_SENDER[2:]]
        for _ in range(20):
            for _ in range(50):
                frames = [mutated(random, random.choice(honest)), *[b"x"] * random.choice([0, 1])]
                liar.send_multipart([routing_id, *frames])
            drive([p], lambda: not readable(p, 20))
        assert p.kv.num_dropped > 500
        assert not p.lost
    finally:
        p.kv.close()
        context.destroy(linger=0)


def test_a_frame_past_the_bound_cuts_its_sender_off() -> None:
    p, d = Host("p"), Host("d")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.plain_username, dealer.plain_password = b"peer", b"token-of-d"
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(d.address.endpoint)
        dealer.send(bytes(40 << 20))
        p.fill(3)
        d.expect(A, p.ref, 3)
        p.start(A, d.address, 3)
        drive([p, d], lambda: A in p.endings and A in d.endings)
        assert monitor.poll(5000)
        assert moved(p, d, 3) and d.kv.num_dropped == 0
        dealer.disable_monitor()
    finally:
        context.destroy(linger=0)
        p.kv.close()
        d.kv.close()
