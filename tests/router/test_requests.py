"""The life of one request, as a table of what happens and what workers are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdserve.core.config import Policy
from pdserve.core.errors import Unavailable
from pdserve.core.ids import Task, WorkerRef
from pdserve.core.lengths import AnswerLengths
from pdserve.core.messages import (
    Abort,
    AttemptFailed,
    FailureKind,
    FinishReason,
    Key,
    PeerAddress,
    Place,
    TokenItem,
)
from pdserve.core.params import SamplingParams
from pdserve.router.policy import Placement
from pdserve.router.requests import MAX_DOUBTS, MAX_STRIKES, Ask, Order, Request, State
from pdserve.router.snapshot import Objectives

ID = "0123456789abcdef" * 2
P, D, M = WorkerRef("p", 1), WorkerRef("d", 1), WorkerRef("m", 1)
SPLIT, WHOLE = Placement(P, D), Placement(M, M)


def address(ref: WorkerRef) -> PeerAddress:
    return PeerAddress(ref.worker_id, ref.epoch, f"tcp://{ref.worker_id}:1", "token")


def request(max_tokens: int = 4, placement: Placement | None = SPLIT) -> Request:
    made = Request(Ask(ID, (5, 6, 7), SamplingParams(max_tokens=max_tokens), deadline=60.0), 0.0)
    if placement is not None:
        made.place(placement, address, 0.0)
    return made


def token(
    index: int, number: int = 1, finish: FinishReason | None = None, token_id: int | None = None
) -> TokenItem:
    return TokenItem(Key(ID, number), index, 100 + index if token_id is None else token_id, finish)


def aborts(orders: Sequence[Order]) -> list[tuple[WorkerRef, int]]:
    """Who is told to end which attempt; nothing else may be told."""
    found = []
    for worker, message in orders:
        assert isinstance(message, Abort)
        found.append((worker, message.key.number))
    return found


def test_a_split_placement_names_each_the_other_and_tells_the_receiver_first() -> None:
    one = request(placement=None)
    assert one.state is State.QUEUED
    params = one.ask.params
    assert one.place(SPLIT, address, 1.0) == [
        (D, Place(Key(ID, 1), Task.DECODE, (5, 6, 7), (), params, address(P))),
        (P, Place(Key(ID, 1), Task.PREFILL, (5, 6, 7), (), params, address(D))),
    ]
    assert one.state is State.PLACED


def test_a_whole_placement_names_nobody() -> None:
    one = request(placement=None)
    (told,) = one.place(WHOLE, address, 1.0)
    assert told == (M, Place(Key(ID, 1), Task.WHOLE, (5, 6, 7), (), one.ask.params, None))


def test_each_index_is_taken_once_whoever_sends_it() -> None:
    one = request()
    for sender, item in [(P, 0), (D, 0), (D, 1), (P, 0), (D, 1), (D, 2)]:
        assert one.token(token(item), sender, 0.0) == []
    assert one.output == [100, 101, 102]
    assert one.state is State.STREAMING
    assert one.token(token(3, finish=FinishReason.LENGTH), D, 0.0) == [(P, Abort(Key(ID, 1)))]
    assert one.state is State.DONE and one.over
    assert one.token(token(4), D, 0.0) == []
    assert one.output == [100, 101, 102, 103]


def test_the_receiver_may_overtake() -> None:
    one = request()
    one.token(token(0), D, 0.0)
    one.token(token(1), D, 0.0)
    one.token(token(0), P, 0.0)
    assert one.output == [100, 101]


def test_where_the_first_token_is_the_last_the_receiver_is_told() -> None:
    one = request()
    assert aborts(one.token(token(0, finish=FinishReason.STOP), P, 0.0)) == [(D, 1)]
    assert one.state is State.DONE


def test_more_tokens_than_asked_for_are_not_taken() -> None:
    one = request(max_tokens=2)
    one.token(token(0), P, 0.0)
    assert aborts(one.token(token(1), D, 0.0)) == [(P, 1), (D, 1)]
    assert one.state is State.DONE


def test_tokens_of_strangers_and_of_older_attempts_are_nothing() -> None:
    one = request()
    one.token(token(0), M, 0.0)
    one.token(token(0, number=0), P, 0.0)
    assert one.output == []
    one.replay()
    one.token(token(0), P, 0.0)
    assert one.output == []


def test_a_gap_loses_the_attempt() -> None:
    one = request()
    one.token(token(0), P, 0.0)
    assert aborts(one.token(token(2), D, 0.0)) == [(P, 1), (D, 1)]
    assert (one.state, one.strikes, one.output) == (State.QUEUED, 0, [100])


def test_a_network_that_loses_tokens_now_and_then_ends_no_request() -> None:
    """It is not the request that kills: no strike, as long as each attempt brings a token."""
    one = request(max_tokens=20, placement=None)
    for number in range(1, 9):
        one.place(SPLIT, address, 0.0)
        one.token(token(number - 1, number), D, 0.0)
        one.token(token(number + 3, number), D, 0.0)
    assert (one.state, one.strikes, len(one.output)) == (State.QUEUED, 0, 8)
    one.place(SPLIT, address, 0.0)
    one.token(token(12, 9), D, 0.0)
    assert one.strikes == 1  # nothing came of that one


@pytest.mark.parametrize(
    ("tokens", "needs_p", "needs_d"),
    [
        ([], True, True),
        ([(P, 0)], True, True),  # D has not shown that it has all
        ([(P, 0), (D, 0)], False, True),
        ([(D, 0)], False, True),
    ],
)
def test_whom_an_attempt_needs(
    tokens: list[tuple[WorkerRef, int]], needs_p: bool, needs_d: bool
) -> None:
    one = request()
    for sender, index in tokens:
        one.token(token(index), sender, 0.0)
    assert (one.needs(P), one.needs(D), one.needs(M)) == (needs_p, needs_d, False)


@pytest.mark.parametrize(
    ("tokens", "now", "p", "d"),
    [
        ([], 2.0, False, False),  # it may not have got there yet
        ([], 2.1, True, True),
        ([(P, 0)], 2.1, False, True),  # P may be done
        ([(D, 0)], 2.1, False, True),
    ],
)
def test_who_must_list_it(
    tokens: list[tuple[WorkerRef, int]], now: float, p: bool, d: bool
) -> None:
    one = request()
    for sender, index in tokens:
        one.token(token(index), sender, 0.0)
    assert (one.listed_by(P, now, 2.0), one.listed_by(D, now, 2.0)) == (p, d)
    assert not one.listed_by(M, now, 2.0)


def test_a_replay_carries_the_output_and_goes_on_with_its_index() -> None:
    one = request()
    one.token(token(0), P, 0.0)
    one.token(token(1), D, 0.0)
    assert aborts(one.replay()) == [(P, 1), (D, 1)]
    assert (one.state, one.wish({}, Objectives(), AnswerLengths(), 0.0).num_tokens) == (
        State.QUEUED,
        5,
    )
    (told,) = one.place(WHOLE, address, 3.0)
    assert told[1] == Place(Key(ID, 2), Task.WHOLE, (5, 6, 7), (100, 101), one.ask.params)
    assert not one.prefilled
    one.token(token(1, number=2), M, 0.0)
    one.token(token(2, number=2), M, 0.0)
    assert one.output == [100, 101, 102] and one.prefilled


def test_after_two_strikes_alone_and_after_three_an_error() -> None:
    one = request()
    assert not one.wish({}, Objectives(), AnswerLengths(), 0.0).alone
    one.replay()
    one.place(SPLIT, address, 1.0)
    assert not one.wish({}, Objectives(), AnswerLengths(), 0.0).alone
    one.replay()
    assert one.wish({}, Objectives(), AnswerLengths(), 0.0).alone
    one.place(WHOLE, address, 2.0)
    assert aborts(one.replay()) == [(M, 3)]
    assert one.state is State.FAILED
    assert one.error is not None and (one.error.status, one.error.code) == (500, "workers_lost")


def test_a_death_before_it_has_begun_is_no_strike_for_the_first_few_times() -> None:
    """It would be the word that it has begun which died with the worker, time after time."""
    one = request(placement=WHOLE)
    for _ in range(MAX_DOUBTS):
        assert aborts(one.died()) == [(M, one.number - 1)]
        one.place(WHOLE, address, 1.0)
    assert one.strikes == 0
    for _ in range(MAX_STRIKES):
        one.died()
        one.place(WHOLE, address, 2.0)
    assert one.alone
    one.died()
    assert one.error is not None and one.error.code == "workers_lost"


@pytest.mark.parametrize("by_token", [False, True])
def test_a_death_once_it_has_begun_is_a_strike(by_token: bool) -> None:
    one = request()
    if by_token:
        one.token(token(0), P, 0.5)
    else:
        one.started(one.key, 0, 0.5)
    one.died()
    assert one.strikes == 1
    one.place(SPLIT, address, 1.0)
    one.died()
    assert one.strikes == 1, "the attempt before had begun, not this one"


def test_a_worker_that_leaves_is_no_strike() -> None:
    one = request()
    for _ in range(5):
        one.replay(strike=False)
        one.place(SPLIT, address, 1.0)
    assert (one.strikes, one.attempt.number) == (0, 6)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind != FailureKind.TOO_LARGE])
def test_a_failure_is_replayed(kind: FailureKind) -> None:
    one = request()
    assert aborts(one.failed(AttemptFailed(Key(ID, 1), kind, "why"), D)) == [(P, 1), (D, 1)]
    assert (one.state, one.strikes) == (State.QUEUED, 1)
    assert one.failed(AttemptFailed(Key(ID, 1), kind, "why"), P) == []  # the same strike
    assert one.strikes == 1


def test_a_failure_of_a_stranger_or_an_old_attempt_is_nothing() -> None:
    one = request()
    assert one.failed(AttemptFailed(Key(ID, 1), FailureKind.DROPPED, ""), M) == []
    assert one.failed(AttemptFailed(Key(ID, 9), FailureKind.DROPPED, ""), D) == []
    assert one.state is State.PLACED


def test_too_large_is_the_clients_error() -> None:
    one = request()
    one.failed(AttemptFailed(Key(ID, 1), FailureKind.TOO_LARGE, "9 tokens in 8"), P)
    assert one.state is State.FAILED
    assert one.error is not None
    assert (one.error.status, one.error.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize(("placed", "status"), [(True, 504), (False, 503)])
def test_the_deadline(placed: bool, status: int) -> None:
    one = request(placement=SPLIT if placed else None)
    assert aborts(one.expire()) == ([(P, 1), (D, 1)] if placed else [])
    assert one.state is State.FAILED
    assert isinstance(one.error, Unavailable) and one.error.status == status


@pytest.mark.parametrize("state", [State.ABORTED, State.DONE])
def test_the_end_that_the_client_makes(state: State) -> None:
    queued = request(placement=None)
    assert queued.end(state) == [] and queued.state is state
    placed = request()
    assert aborts(placed.end(state)) == [(P, 1), (D, 1)]
    streaming = request()
    streaming.token(token(0), P, 0.0)
    assert aborts(streaming.end(state)) == [(P, 1), (D, 1)]
    assert streaming.error is None


def test_cached_tokens_are_those_of_the_first_attempt() -> None:
    one = request()
    one.started(Key(ID, 9), 1, 0.0)
    assert one.num_cached_tokens is None
    one.started(Key(ID, 1), 2, 0.0)
    one.replay()
    one.place(SPLIT, address, 1.0)
    one.started(Key(ID, 2), 3, 0.0)
    assert one.num_cached_tokens == 2


def test_the_wish() -> None:
    ask = Ask(ID, (1, 2), SamplingParams(max_tokens=9), 1.0, Policy.COLOCATED)
    wish = Request(ask, 0.0).wish({}, Objectives(), AnswerLengths(), 0.0)
    assert (wish.num_tokens, wish.max_total, wish.route) == (2, 11, Policy.COLOCATED)
