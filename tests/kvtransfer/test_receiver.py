"""D's end: each transition, as the list of effects it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kv_parts import ADDRESS, SETTINGS, D, P, attempt, handshake, token_of

from pdserve.core.ids import WorkerRef
from pdserve.core.messages import FailureKind, Key
from pdserve.kvtransfer.effects import (
    Pull,
    ReceiveEnded,
    ReceiverEffect,
    Reserve,
    Runnable,
    Send,
    Write,
)
from pdserve.kvtransfer.messages import (
    Ack,
    Cancel,
    Chunk,
    Commit,
    Complete,
    Grant,
    Offer,
    PeerBeat,
    Starting,
    ToReceiver,
    ToSender,
    Withdraw,
)
from pdserve.kvtransfer.receiver import Receiver

A, B = attempt(1), attempt(2)
KEY = Key.of(A)
TOKEN = token_of(A)
NUM_TOKENS = 22  # 6 blocks
BLOCKS = (50, 51, 52, 53, 54, 55)
COMMIT = Commit(KEY, NUM_TOKENS, TOKEN)


def to_p(message: ToSender) -> Send:
    return Send(P, message)


def frames(count: int, size: int = 16) -> list[memoryview]:
    return [memoryview(bytes([index]) * size) for index in range(count)]


def say(receiver: Receiver, message: ToReceiver, now: float = 0.0) -> list[ReceiverEffect]:
    return receiver.receive(P, message, (), now)


def send(receiver: Receiver, first: int, count: int, now: float = 0.0) -> list[ReceiverEffect]:
    return receiver.receive(P, Chunk(KEY, first, count), frames(count), now)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver(SETTINGS)


def expected(receiver: Receiver) -> Receiver:
    receiver.expect(A, P, NUM_TOKENS, 0.0)
    return receiver


def reserving(receiver: Receiver) -> Receiver:
    say(expected(receiver), Starting(KEY, NUM_TOKENS))
    return receiver


def receiving(receiver: Receiver) -> Receiver:
    reserving(receiver).reserved(A, 2, BLOCKS, 0.0)
    return receiver


def writing(receiver: Receiver) -> Receiver:
    send(receiving(receiver), 2, 2)
    return receiver


def delivered(receiver: Receiver) -> Receiver:
    send(writing(receiver), 4, 2)
    receiver.written(A, 2, True, 0.0)
    receiver.written(A, 4, True, 0.0)
    say(receiver, COMMIT)
    return receiver


def test_a_life(receiver: Receiver) -> None:
    assert receiver.expect(A, P, NUM_TOKENS, 0.0) == []
    assert receiver.live(P) == ()
    assert say(receiver, Starting(KEY, NUM_TOKENS)) == [Reserve(A, NUM_TOKENS)]
    assert receiver.live(P) == (KEY,)
    assert receiver.reserved(A, 2, BLOCKS, 0.0) == [to_p(Grant(KEY, 2))]
    assert send(receiver, 2, 2) == [Write(A, 2, (52, 53), tuple(frames(2)), ())]
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]
    assert send(receiver, 4, 2) == [Write(A, 4, (54, 55), tuple(frames(2)), ())]
    assert say(receiver, COMMIT) == []
    assert receiver.written(A, 4, True, 0.0) == [to_p(Complete(KEY)), Runnable(A, TOKEN)]
    assert receiver.live(P) == ()


def test_a_prompt_wholly_in_the_cache_waits_for_the_commit_only(receiver: Receiver) -> None:
    reserving(receiver).reserved(A, 6, BLOCKS, 0.0)
    assert say(receiver, COMMIT) == [to_p(Complete(KEY)), Runnable(A, TOKEN)]


def test_a_repeated_starting_is_answered_by_what_is_known(receiver: Receiver) -> None:
    starting = Starting(KEY, NUM_TOKENS)
    assert say(reserving(receiver), starting) == []
    receiver.reserved(A, 2, BLOCKS, 0.0)
    assert say(receiver, starting) == [to_p(Grant(KEY, 2))]
    send(receiver, 2, 2)
    send(receiver, 4, 2)
    receiver.written(A, 2, True, 0.0)
    receiver.written(A, 4, True, 0.0)
    say(receiver, COMMIT)
    for late in (starting, COMMIT, PeerBeat((KEY,))):
        assert say(receiver, late) == [to_p(Complete(KEY))]
    assert send(receiver, 2, 2) == [to_p(Complete(KEY))]


def test_a_starting_ahead_of_its_placement_is_parked(receiver: Receiver) -> None:
    assert say(receiver, Starting(KEY, NUM_TOKENS)) == []
    assert receiver.live(P) == (KEY,)
    assert receiver.tick(4.9) == [to_p(PeerBeat((KEY,)))]
    assert receiver.expect(A, P, NUM_TOKENS, 4.9) == [Reserve(A, NUM_TOKENS)]
    assert receiver.live(P) == (KEY,)


def test_parking_ends(receiver: Receiver) -> None:
    say(receiver, Starting(KEY, NUM_TOKENS))
    effects = receiver.tick(5.0)
    assert [e.message.key for e in effects if isinstance(e, Send)] == [KEY]  # type: ignore[union-attr]
    assert isinstance(effects[0], Send) and isinstance(effects[0].message, Cancel)
    assert receiver.live(P) == ()


def test_parking_is_bounded() -> None:
    receiver = Receiver(replace(SETTINGS, max_parked=3))
    for name in range(3):
        assert say(receiver, Starting(Key.of(attempt(name)), 4)) == []
    (refused,) = say(receiver, Starting(Key.of(attempt(9)), 4))
    assert isinstance(refused, Send) and isinstance(refused.message, Cancel)
    assert say(receiver, Starting(Key.of(attempt(1)), 4)) == []  # parked already


def test_a_withdraw_ahead_of_the_placement_is_remembered(receiver: Receiver) -> None:
    say(receiver, Starting(KEY, NUM_TOKENS))
    assert say(receiver, Withdraw(KEY)) == []
    assert receiver.expect(A, P, NUM_TOKENS, 1.0) == [ReceiveEnded(A, None, "withdrawn")]
    assert receiver.live(P) == ()


@pytest.mark.parametrize("stage", [expected, reserving, receiving])
def test_withdrawn(receiver: Receiver, stage: object) -> None:
    stage(receiver)  # type: ignore[operator]
    (ended,) = say(receiver, Withdraw(KEY))
    assert isinstance(ended, ReceiveEnded) and ended.kind is None
    assert say(receiver, Withdraw(KEY)) == []
    (cancel,) = say(receiver, Starting(KEY, NUM_TOKENS))
    assert isinstance(cancel, Send) and isinstance(cancel.message, Cancel)


@pytest.mark.parametrize("stage", [expected, reserving, receiving])
def test_aborted(receiver: Receiver, stage: object) -> None:
    stage(receiver)  # type: ignore[operator]
    assert receiver.abort(A, "the client hung up", 0.0) == [
        to_p(Cancel(KEY, "the client hung up")),
        ReceiveEnded(A, None, "the client hung up"),
    ]
    assert receiver.abort(A, "again", 0.0) == []


@pytest.mark.parametrize("stage", [expected, reserving, receiving])
def test_peer_lost(receiver: Receiver, stage: object) -> None:
    stage(receiver)  # type: ignore[operator]
    receiver.expect(B, WorkerRef("prefill-1", 3), 8, 0.0)
    assert receiver.peer_lost(P, "it died", 0.0) == [
        ReceiveEnded(A, FailureKind.PEER_LOST, "it died")
    ]


def test_peer_lost_forgets_what_it_parked(receiver: Receiver) -> None:
    say(receiver, Starting(KEY, NUM_TOKENS))
    receiver.peer_lost(P, "it died", 0.0)
    assert receiver.live(P) == () and receiver.tick(20.0) == []


def test_nothing_is_given_back_while_a_write_is_outstanding(receiver: Receiver) -> None:
    send(writing(receiver), 4, 2)
    effects = receiver.abort(A, "hung up", 0.0)
    assert effects == [to_p(Cancel(KEY, "hung up"))]
    assert receiver.live(P) == ()
    assert say(receiver, COMMIT) == []
    assert receiver.written(A, 4, True, 0.0) == []
    assert receiver.written(A, 2, False, 0.0) == [ReceiveEnded(A, None, "hung up")]


def test_room_that_comes_too_late_is_given_back(receiver: Receiver) -> None:
    say(reserving(receiver), Withdraw(KEY))
    (ended,) = receiver.reserved(A, 0, BLOCKS, 0.0)
    assert isinstance(ended, ReceiveEnded) and ended.kind is None


def test_a_repeated_chunk_is_acknowledged_and_not_written(receiver: Receiver) -> None:
    assert send(writing(receiver), 2, 2) == []  # being written: the answer follows
    receiver.written(A, 2, True, 0.0)
    assert send(receiver, 2, 2) == [to_p(Ack(KEY, 2, 2))]


def test_a_damaged_chunk_is_written_again_then_given_up(receiver: Receiver) -> None:
    receiving(receiver)
    for _ in range(SETTINGS.max_write_failures - 1):
        assert [type(e) for e in send(receiver, 2, 2)] == [Write]
        assert receiver.written(A, 2, False, 0.0) == []
    send(receiver, 2, 2)
    cancel, ended = receiver.written(A, 2, False, 0.0)
    assert isinstance(cancel, Send) and isinstance(cancel.message, Cancel)
    assert isinstance(ended, ReceiveEnded) and ended.kind is FailureKind.TRANSFER


def test_a_damaged_chunk_that_comes_whole_the_next_time(receiver: Receiver) -> None:
    receiver = writing(receiver)
    receiver.written(A, 2, False, 0.0)
    send(receiver, 2, 2)
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]


def test_a_frame_of_several_blocks_is_written_block_by_block(receiver: Receiver) -> None:
    whole = memoryview(bytes(range(48)))
    message = Chunk(KEY, 2, 3)
    for sizes in ((48,), (32, 16), (16, 32)):
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        data = [whole[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        (write,) = receiving(Receiver(SETTINGS)).receive(P, message, data, 0.0)
        assert isinstance(write, Write)
        assert [bytes(piece) for piece in write.frames] == [
            bytes(whole[at : at + 16]) for at in (0, 16, 32)
        ]
    crooked = receiving(receiver)
    assert crooked.receive(P, message, [whole[:24], whole[24:]], 0.0) == []
    assert crooked.num_dropped == 1


@pytest.mark.parametrize(
    ("first", "count", "num_frames", "size", "num_checksums"),
    [
        (1, 2, 2, 16, 0),  # before what was granted
        (5, 2, 2, 16, 0),  # past the end
        (2**31 - 1, 1, 1, 16, 0),
        (2, 2, 1, 16, 0),  # frames missing
        (2, 2, 3, 16, 0),  # frames too many
        (2, 1, 0, 16, 0),
        (2, 2, 2, 15, 0),  # of the wrong size
        (2, 2, 2, 17, 0),
        (2, 2, 2, 0, 0),
        (2, 2, 2, 16, 1),  # a checksum missing
    ],
)
def test_a_chunk_out_of_bounds_is_counted_and_dropped(
    receiver: Receiver, first: int, count: int, num_frames: int, size: int, num_checksums: int
) -> None:
    message = Chunk(KEY, first, count, (1,) * num_checksums)
    assert receiving(receiver).receive(P, message, frames(num_frames, size), 0.0) == []
    assert receiver.num_dropped == 1
    assert [type(e) for e in send(receiver, 2, 2)] == [Write]


def test_a_chunk_that_overlaps_what_is_in_is_dropped(receiver: Receiver) -> None:
    writing(receiver).written(A, 2, True, 0.0)
    assert send(receiver, 3, 2) == []
    assert receiver.num_dropped == 1


@pytest.mark.parametrize("message", [Chunk(KEY, 2, 1), COMMIT])
def test_nothing_is_taken_before_the_grant(receiver: Receiver, message: ToReceiver) -> None:
    reserving(receiver)
    assert receiver.receive(P, message, (), 0.0) == []
    assert receiver.num_dropped == 1


@pytest.mark.parametrize(
    "message",
    [
        Starting(KEY, NUM_TOKENS + 1),
        Commit(KEY, NUM_TOKENS - 1, TOKEN),
        Commit(KEY, NUM_TOKENS, token_of(B)),
    ],
)
def test_another_prompt_than_was_placed_ends_it(receiver: Receiver, message: ToReceiver) -> None:
    cancel, ended = say(receiving(receiver), message)
    assert isinstance(cancel, Send) and isinstance(cancel.message, Cancel)
    assert isinstance(ended, ReceiveEnded) and ended.kind is FailureKind.TRANSFER


@pytest.mark.parametrize("message", [Chunk(KEY, 2, 2), COMMIT])
def test_the_unknown_is_cancelled(receiver: Receiver, message: Chunk | Commit) -> None:
    (cancel,) = receiver.receive(P, message, frames(2) if message != COMMIT else (), 0.0)
    assert isinstance(cancel, Send) and isinstance(cancel.message, Cancel)


@pytest.mark.parametrize(
    "message",
    [Starting(KEY, NUM_TOKENS), Chunk(KEY, 2, 2), COMMIT, Withdraw(KEY), PeerBeat((KEY,))],
)
def test_another_peer_has_no_say(receiver: Receiver, message: ToReceiver) -> None:
    stranger = WorkerRef("prefill-9", 1)
    writing(receiver)
    data = frames(2) if isinstance(message, Chunk) else []
    for effect in receiver.receive(stranger, message, data, 0.0):
        assert isinstance(effect, Send) and effect.peer == stranger
        assert isinstance(effect.message, Cancel)
    assert receiver.live(P) == (KEY,) and receiver.live(stranger) == ()
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]


def test_frames_behind_anything_else_are_dropped(receiver: Receiver) -> None:
    receiving(receiver)
    assert receiver.receive(P, Withdraw(KEY), frames(1), 0.0) == []
    assert receiver.num_dropped == 1 and receiver.live(P) == (KEY,)


def test_connect_is_the_rims_affair(receiver: Receiver) -> None:
    assert say(receiver, handshake(D, "x").connect(ADDRESS)) == []


@pytest.mark.parametrize("beats", [True, False])
def test_a_lease_is_renewed_by_beats(receiver: Receiver, beats: bool) -> None:
    receiving(receiver)
    say(receiver, PeerBeat((KEY,) if beats else ()), 9.0)
    effects = receiver.tick(10.0)
    ended = [e for e in effects if isinstance(e, ReceiveEnded)]
    assert [e.kind for e in ended] == ([] if beats else [FailureKind.DROPPED])
    if not beats:
        assert isinstance(effects[0], Send) and isinstance(effects[0].message, Cancel)


def test_a_silent_peer_is_lost(receiver: Receiver) -> None:
    receiving(receiver)
    (ended,) = [e for e in receiver.tick(10.0) if isinstance(e, ReceiveEnded)]
    assert ended.kind is FailureKind.PEER_LOST


def test_before_p_begins_there_is_no_lease(receiver: Receiver) -> None:
    expected(receiver)
    assert receiver.tick(1000.0) == []
    assert say(receiver, Starting(KEY, NUM_TOKENS), 1000.0) == [Reserve(A, NUM_TOKENS)]


def test_beats_list_what_was_begun(receiver: Receiver) -> None:
    receiving(receiver)
    other = WorkerRef("prefill-1", 3)
    receiver.expect(B, other, 8, 0.0)
    receiver.receive(other, Starting(Key.of(B), 8), (), 0.0)
    beats = receiver.tick(0.5)
    assert to_p(PeerBeat((KEY,))) in beats and Send(other, PeerBeat((Key.of(B),))) in beats
    assert receiver.tick(0.6) == []


def test_tombstones_outlive_leases_and_go(receiver: Receiver) -> None:
    delivered(receiver)
    receiver.tick(29.9)
    assert say(receiver, COMMIT, 29.9) == [to_p(Complete(KEY))]
    receiver.tick(30.0)
    (cancel,) = say(receiver, COMMIT, 30.0)
    assert isinstance(cancel, Send) and isinstance(cancel.message, Cancel)


def test_tombstones_are_bounded() -> None:
    receiver = Receiver(replace(SETTINGS, max_tombstones=2))
    for name in (1, 2, 3):
        say(receiver, Withdraw(Key.of(attempt(name))))
    assert receiver.expect(attempt(1), P, 4, 0.0) == []  # the oldest gave way
    assert [type(e) for e in receiver.expect(attempt(3), P, 4, 0.0)] == [ReceiveEnded]


def test_a_second_expect_changes_nothing(receiver: Receiver) -> None:
    assert writing(receiver).expect(A, P, NUM_TOKENS, 0.0) == []
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]


# by reference


def offered(first: int, *theirs: int, generations: tuple[int, ...] | None = None) -> Offer:
    return Offer(KEY, first, theirs, (3,) * len(theirs) if generations is None else generations)


def test_what_is_offered_is_pulled_into_our_own_blocks(receiver: Receiver) -> None:
    receiving(receiver)
    pull = Pull(A, P, 2, (52, 53), (7, 9), (3, 3), ())
    assert say(receiver, offered(2, 7, 9)) == [pull]
    assert say(receiver, offered(2, 7, 9)) == []  # the rim is at it
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]
    assert say(receiver, offered(2, 7, 9)) == [to_p(Ack(KEY, 2, 2))]
    say(receiver, offered(4, 1, 2))
    assert say(receiver, COMMIT) == []  # the copy is not confirmed
    assert receiver.written(A, 4, True, 0.0) == [to_p(Complete(KEY)), Runnable(A, TOKEN)]


def test_a_copy_that_does_not_count_is_pulled_again(receiver: Receiver) -> None:
    say(receiving(receiver), offered(2, 7, 9))
    assert receiver.written(A, 2, False, 0.0) == []
    again = say(receiver, offered(2, 7, 9, generations=(4, 4)))
    assert again == [Pull(A, P, 2, (52, 53), (7, 9), (4, 4), ())]
    assert receiver.written(A, 2, True, 0.0) == [to_p(Ack(KEY, 2, 2))]


def test_blocks_are_kept_until_a_pull_is_over(receiver: Receiver) -> None:
    say(receiving(receiver), offered(2, 7, 9))
    assert say(receiver, Withdraw(KEY)) == []
    (ended,) = receiver.written(A, 2, False, 0.0)
    assert isinstance(ended, ReceiveEnded) and ended.kind is None


@pytest.mark.parametrize(
    "wrong",
    [
        offered(1, 7, 9),  # not granted
        offered(5, 7, 9),  # past the prompt
        offered(2, 7, 9, generations=(1,)),
        replace(offered(2, 7, 9), checksums=(5,)),
    ],
)
def test_offers_that_make_no_sense_are_dropped(receiver: Receiver, wrong: Offer) -> None:
    receiving(receiver)
    assert say(receiver, wrong) == [] and receiver.num_dropped == 1
