"""P's end: each transition, as the list of effects it has."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from kv_parts import ADDRESS, SETTINGS, D, P, address, attempt, handshake, token_of

from pdserve.core.generations import Generations
from pdserve.core.ids import Medium, WorkerRef
from pdserve.core.messages import FailureKind, Key, PeerLink, TransferDone
from pdserve.core.plan import PoolExport
from pdserve.kvtransfer.effects import Granted, Released, Send, SendBlocks, SenderEffect, SendFailed
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
    Rejected,
    Starting,
    ToReceiver,
    Withdraw,
)
from pdserve.kvtransfer.sender import Sender

A, B = attempt(1), attempt(2)
KEY = Key.of(A)
TOKEN = token_of(A)
ACCEPTED = Accepted(D.worker_id, D.epoch, Medium.TCP)
BLOCKS = (10, 11, 12, 13, 14, 15)  # of A: 22 tokens
NUM_TOKENS = 22


def to_d(message: ToReceiver) -> Send:
    return Send(ADDRESS, message)


def chunk(first: int, *blocks: int) -> SendBlocks:
    """The last of A's 6 blocks holds 2 of its 22 tokens."""
    tail_tokens = 2 if first + len(blocks) == 6 else 0
    return SendBlocks(ADDRESS, Chunk(KEY, first, len(blocks)), blocks, tail_tokens)


def complete(
    num_blocks: int, waited: float = 0.0, moving: float = 0.0, exposed: float = 0.0
) -> Released:
    """A's blocks go back: the peer has ``num_blocks`` that it did not have."""
    num_bytes = num_blocks * SETTINGS.block_bytes
    done = TransferDone(KEY, D.worker_id, Medium.TCP, num_bytes, waited, moving, exposed)
    return Released(A, done)


@pytest.fixture
def sender() -> Sender:
    return Sender(SETTINGS, handshake(P, "secret-of-p"))


def started(sender: Sender, now: float = 0.0) -> Sender:
    sender.start(A, ADDRESS, NUM_TOKENS, now)
    sender.receive(D, ACCEPTED, now)
    return sender


def granted(sender: Sender, first_block: int = 0, now: float = 0.0) -> Sender:
    started(sender, now).receive(D, Grant(KEY, first_block), now)
    return sender


def committed(sender: Sender) -> Sender:
    """Everything has left and is acknowledged; only Complete is missing."""
    granted(sender, first_block=4).offer(A, BLOCKS, 0.0)
    sender.commit(A, TOKEN, 0.0)
    sender.sent(A, 4, 0.0)
    sender.receive(D, Ack(KEY, 4, 2), 0.0)
    return sender


def messages(effects: list[SenderEffect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send | SendBlocks)]


def test_connect_goes_before_the_first_starting_only(sender: Sender) -> None:
    connect, starting = sender.start(A, ADDRESS, NUM_TOKENS, 0.0)
    assert connect == to_d(handshake(P, "secret-of-p").connect(ADDRESS))
    assert isinstance(connect, Send) and isinstance(connect.message, Connect)
    assert connect.message.token == ADDRESS.token
    assert starting == to_d(Starting(KEY, NUM_TOKENS))
    assert sender.start(B, ADDRESS, 4, 0.1) == [to_d(Starting(Key.of(B), 4))]
    assert sender.start(A, ADDRESS, NUM_TOKENS, 0.1) == []  # said twice


def test_a_restarted_peer_is_another_peer(sender: Sender) -> None:
    started(sender).receive(D, ACCEPTED, 0.0)
    again = address(WorkerRef(D.worker_id, 23))
    assert [type(m) for m in messages(sender.start(B, again, 4, 0.1))] == [Connect, Starting]


def test_a_peer_silent_for_long_is_connected_anew(sender: Sender) -> None:
    started(sender).receive(D, ACCEPTED, 0.0)
    assert [type(m) for m in messages(sender.start(B, ADDRESS, 4, 1.9))] == [Starting]
    late = sender.start(attempt(3), ADDRESS, 4, 2.1)
    assert [type(m) for m in messages(late)] == [Connect, Starting]


def test_starting_is_said_again_until_granted(sender: Sender) -> None:
    started(sender).receive(D, ACCEPTED, 0.9)
    assert sender.tick(0.9) == []
    assert to_d(Starting(KEY, NUM_TOKENS)) in sender.tick(1.0)
    sender.receive(D, PeerBeat((KEY,)), 1.5)
    assert to_d(Starting(KEY, NUM_TOKENS)) in sender.tick(2.0)
    assert not sender.granted(A)
    assert sender.receive(D, Grant(KEY, 0), 2.5) == [Granted(A)]
    assert sender.granted(A)
    assert Starting(KEY, NUM_TOKENS) not in messages(sender.tick(3.5))


def test_blocks_leave_as_they_are_offered_within_the_window(sender: Sender) -> None:
    granted(sender)
    assert sender.offer(A, BLOCKS[:1], 0.0) == [chunk(0, 10)]
    assert sender.offer(A, BLOCKS[:1], 0.0) == []
    assert sender.offer(A, BLOCKS, 0.0) == [chunk(1, 11, 12)]  # 3 of 4 in flight: 2 more do not fit
    assert sender.commit(A, TOKEN, 0.0) == []  # not before the blocks
    assert sender.sent(A, 0, 0.0) == []  # sent is not arrived
    assert sender.receive(D, Ack(KEY, 0, 1), 0.0) == [chunk(3, 13, 14)]
    assert sender.receive(D, Ack(KEY, 1, 2), 0.0) == []  # still being read: still in flight
    assert sender.sent(A, 1, 0.0) == [chunk(5, 15), to_d(Commit(KEY, NUM_TOKENS, TOKEN))]
    sender.sent(A, 3, 0.0)
    sender.sent(A, 5, 0.0)
    assert sender.receive(D, Complete(KEY), 0.0) == [complete(6)]
    assert sender.live(D) == ()


def test_a_full_last_block_has_no_tail(sender: Sender) -> None:
    sender.start(B, ADDRESS, 8, 0.0)
    sender.receive(D, ACCEPTED, 0.0)
    sender.receive(D, Grant(Key.of(B), 0), 0.0)
    (sent,) = sender.offer(B, (3, 4), 0.0)
    assert isinstance(sent, SendBlocks) and sent.tail_tokens == 0


def test_what_is_offered_before_the_grant_leaves_with_it(sender: Sender) -> None:
    started(sender)
    assert sender.offer(A, BLOCKS[:4], 0.0) == []
    assert sender.receive(D, Grant(KEY, 1), 0.0) == [
        Granted(A),
        chunk(1, 11, 12),
        chunk(3, 13),
    ]
    assert sender.receive(D, Grant(KEY, 1), 0.0) == []  # said twice


def test_an_offer_can_be_taken_back_until_it_leaves(sender: Sender) -> None:
    started(sender).offer(A, BLOCKS[:2], 0.0)
    sender.offer(A, (), 0.0)
    assert sender.receive(D, Grant(KEY, 0), 0.0) == [Granted(A)]
    assert sender.offer(A, (30, 31), 0.0) == [chunk(0, 30, 31)]
    with pytest.raises(AssertionError, match="left"):
        sender.offer(A, (), 0.0)


def test_the_window_is_shared_and_the_oldest_goes_first(sender: Sender) -> None:
    granted(sender)
    sender.start(B, ADDRESS, 8, 0.0)
    sender.receive(D, Grant(Key.of(B), 0), 0.0)
    sender.offer(A, BLOCKS[:4], 0.0)
    assert sender.offer(B, (20, 21), 0.0) == []
    for first in (0, 2):
        sender.sent(A, first, 0.0)
    late = SendBlocks(ADDRESS, Chunk(Key.of(B), 0, 2), (20, 21))
    assert sender.offer(A, BLOCKS, 0.0) == []
    assert sender.receive(D, Ack(KEY, 0, 2), 0.0) == [chunk(4, 14, 15)]
    assert sender.receive(D, Ack(KEY, 2, 2), 0.0) == [late]


def test_a_whole_prompt_in_the_peers_cache_needs_the_commit_only(sender: Sender) -> None:
    granted(sender, first_block=6)
    assert sender.offer(A, BLOCKS, 0.0) == []
    assert sender.commit(A, TOKEN, 0.0) == [to_d(Commit(KEY, NUM_TOKENS, TOKEN))]
    assert sender.receive(D, Complete(KEY), 0.0) == [complete(0)]


def test_a_transfer_tells_what_it_took(sender: Sender) -> None:
    sender.start(A, ADDRESS, NUM_TOKENS, 1.0)
    assert sender.links() == ()
    sender.receive(D, ACCEPTED, 1.5)
    sender.receive(D, Grant(KEY, 2), 1.5)
    sender.offer(A, BLOCKS[:4], 2.0)
    sender.offer(A, BLOCKS, 2.5)
    sender.commit(A, TOKEN, 2.5)
    for first in (2, 4):
        sender.sent(A, first, 2.5)
        sender.receive(D, Ack(KEY, first, 2), 2.75)
    took = complete(4, waited=0.5, moving=1.0, exposed=0.5)
    assert sender.receive(D, Complete(KEY), 3.0) == [took]
    assert sender.links() == (PeerLink(D.worker_id, Medium.TCP),)


def test_where_the_grant_came_last_only_the_time_after_it_is_exposed(sender: Sender) -> None:
    started(sender).offer(A, BLOCKS, 1.0)
    sender.commit(A, TOKEN, 1.0)
    sender.receive(D, Grant(KEY, 6), 4.0)
    took = complete(0, waited=4.0, moving=0.0, exposed=0.25)
    assert sender.receive(D, Complete(KEY), 4.25) == [took]


def test_without_progress_everything_unacknowledged_is_sent_again(sender: Sender) -> None:
    granted(sender, first_block=2)
    sender.offer(A, BLOCKS, 0.0)
    sender.commit(A, TOKEN, 0.0)
    sender.sent(A, 2, 0.0)
    sender.receive(D, PeerBeat((KEY,)), 1.4)
    assert chunk(2, 12, 13) not in sender.tick(1.4)  # 4 is still in the rim's hands
    sender.sent(A, 4, 1.4)
    again = sender.tick(2.5)
    assert [e for e in again if not isinstance(e.message, PeerBeat)] == [  # type: ignore[union-attr]
        chunk(2, 12, 13),
        chunk(4, 14, 15),
        to_d(Commit(KEY, NUM_TOKENS, TOKEN)),
    ]


def test_resends_back_off_and_end(sender: Sender) -> None:
    granted(sender, first_block=4).offer(A, BLOCKS, 0.0)
    sender.sent(A, 4, 0.0)
    resent = []
    now = 0.0
    while now < 60:
        now += 0.25
        sender.receive(D, PeerBeat((KEY,)), now)
        for effect in sender.tick(now):
            if isinstance(effect, SendBlocks):
                resent.append(now)
                sender.sent(A, 4, now)
            elif isinstance(effect, SendFailed):
                assert effect.kind is FailureKind.TRANSFER and "resends" in effect.text
                assert [b - a for a, b in itertools.pairwise(resent)] == [2, 4, 5, 5, 5]
                return
    raise AssertionError("it never ended")


def test_progress_starts_the_count_anew(sender: Sender) -> None:
    granted(sender, first_block=2).offer(A, BLOCKS, 0.0)
    for first in (2, 4):
        sender.sent(A, first, 0.0)
    assert len(messages(sender.tick(1.0))) == 3  # a beat among them
    for first in (2, 4):
        sender.sent(A, first, 1.0)
    sender.receive(D, Ack(KEY, 2, 2), 1.5)
    assert chunk(4, 14, 15) in sender.tick(2.5)  # a second later, not two


@pytest.mark.parametrize("stage", [started, granted, committed])
def test_withdraw_in_any_state(sender: Sender, stage: object) -> None:
    stage(sender)  # type: ignore[operator]
    assert sender.withdraw(A, 0.0) == [to_d(Withdraw(KEY)), Released(A)]
    assert sender.withdraw(A, 0.0) == []
    assert sender.offer(A, BLOCKS, 0.0) == [] == sender.commit(A, TOKEN, 0.0)


def test_nothing_is_released_while_a_send_is_outstanding(sender: Sender) -> None:
    granted(sender).offer(A, BLOCKS[:4], 0.0)
    assert sender.withdraw(A, 0.0) == [to_d(Withdraw(KEY))]
    assert sender.live(D) == ()
    assert sender.sent(A, 2, 0.0) == []
    assert sender.sent(A, 0, 0.0) == [Released(A)]


def test_peer_lost_fails_its_transfers_once_nothing_is_read(sender: Sender) -> None:
    granted(sender).offer(A, BLOCKS[:2], 0.0)
    sender.start(B, ADDRESS, 4, 0.0)
    other = address(WorkerRef("decode-1", 5))
    sender.start(attempt(3), other, 4, 0.0)
    lost = FailureKind.PEER_LOST
    assert sender.peer_lost(D, "it died", 0.0) == [SendFailed(B, lost, "it died")]
    assert sender.sent(A, 0, 0.0) == [SendFailed(A, lost, "it died")]
    assert sender.live(other.ref) == (Key.of(attempt(3)),)


def test_a_refused_handshake_tells_why(sender: Sender) -> None:
    (failed,) = started(sender).receive(D, Rejected("dtype is bf16 here"), 0.0)
    assert isinstance(failed, SendFailed) and failed.kind is FailureKind.TRANSFER
    assert "dtype is bf16 here" in failed.text
    assert [type(m) for m in messages(sender.start(B, ADDRESS, 4, 0.1))] == [Connect, Starting]


def test_another_process_at_the_address(sender: Sender) -> None:
    (failed,) = started(sender).receive(D, Accepted(D.worker_id, 99, Medium.TCP), 0.0)
    assert isinstance(failed, SendFailed) and failed.kind is FailureKind.PEER_LOST


def test_cancelled_by_the_peer(sender: Sender) -> None:
    (failed,) = granted(sender).receive(D, Cancel(KEY, "aborted"), 0.0)
    assert isinstance(failed, SendFailed) and failed.kind is FailureKind.DROPPED
    assert "aborted" in failed.text


@pytest.mark.parametrize(
    ("heard", "listed", "kind"),
    [
        (False, False, FailureKind.TRANSFER),
        (True, False, FailureKind.DROPPED),
        (True, True, None),
    ],
)
def test_an_unrenewed_lease_ends(
    sender: Sender, heard: bool, listed: bool, kind: FailureKind | None
) -> None:
    sender.start(A, ADDRESS, NUM_TOKENS, 0.0)
    ended: list[SenderEffect] = []
    for step in range(60):
        now = step / 4
        if heard:
            sender.receive(D, PeerBeat((KEY,) if listed else ()), now)
        ended += [e for e in sender.tick(now) if isinstance(e, SendFailed | Released)]
    assert [e.kind for e in ended if isinstance(e, SendFailed)] == ([kind] if kind else [])
    assert bool(sender.live(D)) == listed


def test_a_peer_that_falls_silent_is_lost(sender: Sender) -> None:
    granted(sender, now=1.0)
    assert not [e for e in sender.tick(10.9) if isinstance(e, SendFailed)]
    effects = sender.tick(11.0)
    assert to_d(Withdraw(KEY)) in effects
    (failed,) = [e for e in effects if isinstance(e, SendFailed)]
    assert failed.kind is FailureKind.PEER_LOST


def test_beats_list_what_is_live(sender: Sender) -> None:
    granted(sender)
    sender.start(B, ADDRESS, 4, 0.0)
    sender.receive(D, PeerBeat((KEY, Key.of(B))), 0.9)
    assert to_d(PeerBeat((KEY, Key.of(B)))) in sender.tick(1.0)
    assert sender.tick(1.1) == []
    sender.withdraw(A, 1.2)
    assert to_d(PeerBeat((Key.of(B),))) in sender.tick(2.0)
    sender.withdraw(B, 2.1)
    assert sender.tick(3.1) == []


@pytest.mark.parametrize("message", [Grant(KEY, 0), PeerBeat((KEY,))])
def test_a_peer_that_holds_what_is_over_is_told_again(
    sender: Sender, message: Grant | PeerBeat
) -> None:
    started(sender).withdraw(A, 0.0)
    assert sender.receive(D, message, 0.1) == [to_d(Withdraw(KEY))]


@pytest.mark.parametrize(
    "message",
    [Grant(KEY, 1), Ack(KEY, 0, 3), Ack(KEY, 0, 0), Complete(KEY)],
)
def test_nonsense_is_counted_and_changes_nothing(sender: Sender, message: object) -> None:
    granted(sender).offer(A, BLOCKS[:2], 0.0)
    assert sender.receive(D, message, 0.0) == []  # type: ignore[arg-type]
    assert sender.num_dropped == 1
    assert sender.live(D) == (KEY,)


def test_a_grant_past_the_end_ends_the_transfer(sender: Sender) -> None:
    effects = started(sender).receive(D, Grant(KEY, 7), 0.0)
    assert effects[0] == to_d(Withdraw(KEY))
    assert isinstance(effects[1], SendFailed) and effects[1].kind is FailureKind.TRANSFER


@pytest.mark.parametrize("message", [Ack(KEY, 0, 1), Complete(KEY), Cancel(KEY, ""), Grant(KEY, 0)])
def test_late_words_about_what_was_never_or_is_over(sender: Sender, message: object) -> None:
    assert sender.receive(D, message, 0.0) == []  # type: ignore[arg-type]
    started(sender).withdraw(A, 0.0)
    effects = sender.receive(D, message, 0.0)  # type: ignore[arg-type]
    assert all(effect == to_d(Withdraw(KEY)) for effect in effects)


def test_an_idle_link_is_forgotten(sender: Sender) -> None:
    started(sender).withdraw(A, 0.0)
    sender.receive(D, PeerBeat(()), 9.9)
    sender.tick(10.1)
    assert sender.receive(D, PeerBeat((KEY,)), 10.2) == []
    assert [type(m) for m in messages(sender.start(B, ADDRESS, 4, 10.3))] == [Connect, Starting]


def test_a_block_larger_than_the_window_still_goes() -> None:
    settings = replace(SETTINGS, block_bytes=1000)
    sender = Sender(settings, handshake(P, "secret-of-p"))
    granted(sender)
    assert sender.offer(A, BLOCKS[:2], 0.0) == [chunk(0, 10)]
    sender.sent(A, 0, 0.0)
    assert sender.receive(D, Ack(KEY, 0, 1), 0.0) == [chunk(1, 11)]


# by reference


def offer(sender: Sender, first: int, *blocks: int) -> SendBlocks:
    assert sender.generations is not None
    tail_tokens = 2 if first + len(blocks) == 6 else 0
    message = Offer(KEY, first, blocks, sender.generations.of(blocks))
    return SendBlocks(ADDRESS, message, blocks, tail_tokens)


@pytest.fixture
def by_reference() -> Sender:
    generations = Generations.private(64)
    generations.bump((11, 12, 12))
    exports = (PoolExport(Medium.SHM, "name", bytes(16), 64),)
    mine = handshake(P, "secret-of-p", media=(Medium.SHM, Medium.TCP), exports=exports)
    return Sender(SETTINGS, mine, generations)


def test_where_the_peer_reads_for_itself_blocks_are_offered(by_reference: Sender) -> None:
    sender = by_reference
    sender.start(A, ADDRESS, NUM_TOKENS, 0.0)
    sender.receive(D, Grant(KEY, 1), 0.0)
    assert sender.offer(A, BLOCKS, 0.0) == []  # not accepted yet: by which medium is not known
    sent = sender.receive(D, replace(ACCEPTED, medium=Medium.SHM), 0.0)
    assert sent == [offer(sender, 1, 11, 12, 13, 14, 15)]
    assert isinstance(sent[0], SendBlocks) and isinstance(sent[0].message, Offer)
    assert sent[0].message.generations == (1, 2, 0, 0, 0)
    assert sender.commit(A, TOKEN, 0.0) == [to_d(Commit(KEY, NUM_TOKENS, TOKEN))]
    sender.sent(A, 1, 0.0)
    (released,) = sender.receive(D, Complete(KEY), 1.0)
    assert isinstance(released, Released) and released.done is not None
    assert released.done.medium is Medium.SHM


def test_a_peer_that_connects_anew_may_get_the_rest_otherwise(by_reference: Sender) -> None:
    sender = by_reference
    sender.start(A, ADDRESS, NUM_TOKENS, 0.0)
    sender.receive(D, replace(ACCEPTED, medium=Medium.SHM), 0.0)
    sender.receive(D, Grant(KEY, 0), 0.0)
    assert sender.offer(A, BLOCKS[:2], 0.0) == [offer(sender, 0, 10, 11)]
    sender.sent(A, 0, 0.0)
    sender.receive(D, ACCEPTED, 0.5)  # by value, this time
    assert sender.offer(A, BLOCKS[:3], 0.5) == [chunk(2, 12)]
    sender.sent(A, 2, 0.5)
    again = [effect for effect in sender.tick(1.6) if isinstance(effect, SendBlocks)]
    assert again == [chunk(0, 10, 11), chunk(2, 12)]


def test_a_medium_that_was_not_asked_for_is_not_taken(sender: Sender) -> None:
    sender.start(A, ADDRESS, NUM_TOKENS, 0.0)
    sender.receive(D, replace(ACCEPTED, medium=Medium.CUDA_IPC), 0.0)
    sender.receive(D, Grant(KEY, 0), 0.0)
    assert sender.offer(A, BLOCKS, 0.0) == [] and sender.num_dropped == 1
