"""One worker without peers: whole requests, and everything that can happen to them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from worker_net import MODEL, Shape, Worker, run_alone

from pdserve.cache.hashing import BlockHasher
from pdserve.core.ids import Role, Task
from pdserve.core.messages import (
    Abort,
    AttemptFailed,
    BlockCounts,
    Bye,
    CacheEvents,
    Drain,
    FailureKind,
    FinishReason,
    Key,
    Place,
    ResyncCache,
    RouterBeat,
    SetRole,
    Started,
    TokenBatch,
    TokenItem,
    Welcome,
)
from pdserve.core.params import SamplingParams
from pdserve.core.plan import StepPlan
from pdserve.worker.core import FLIP_LIMIT_S
from pdserve.worker.effects import Tell

PROMPT = (2, 3, 4, 5, 6, 7, 8)


def key(number: int = 1, attempt: int = 0) -> Key:
    return Key(f"{number:032x}", attempt)


def whole(
    number: int = 1,
    prompt: tuple[int, ...] = PROMPT,
    output: tuple[int, ...] = (),
    attempt: int = 0,
    **params: Any,
) -> Place:
    sampling = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
    return Place(key(number, attempt), Task.WHOLE, prompt, output, sampling)


def expected(place: Place, max_context: int = 48) -> list[int]:
    room = max_context - len(place.prompt) - len(place.output)
    return MODEL.expected_tokens(place.prompt, place.output, place.params, room)


def give(worker: Worker, *messages: Any) -> None:
    for message in messages:
        for effect in worker.core.router_message(message, 0.0):
            assert isinstance(effect, Tell)
            worker.told.append(effect.message)
        worker.core.check()


def step(worker: Worker) -> StepPlan | None:
    """Plans, launches and completes one step."""
    plan, effects = worker.core.plan(0.0)
    if plan is not None:
        effects += worker.core.complete(worker.engine.launch(plan).wait(), 0.0)
    worker.told += [effect.message for effect in effects if isinstance(effect, Tell)]
    worker.core.check()
    return plan


def items(worker: Worker) -> list[TokenItem]:
    return [item for told in worker.told if isinstance(told, TokenBatch) for item in told.items]


def failures(worker: Worker) -> list[tuple[Key, FailureKind]]:
    return [(told.key, told.kind) for told in worker.told if isinstance(told, AttemptFailed)]


def assert_empty(worker: Worker) -> None:
    worker.core.check()
    assert worker.core.blocks.held == 0
    assert worker.core.beat().live == ()
    plan, effects = worker.core.plan(0.0)
    assert plan is None and effects == []


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_request_is_started_and_its_tokens_told_in_order(max_inflight: int) -> None:
    worker = Worker("w", Shape(max_inflight=max_inflight))
    place = whole()
    give(worker, place)
    assert worker.core.beat().live == (key(),)
    run_alone(worker, [])
    assert worker.told[0] == Started(key(), 0)
    assert worker.tokens() == expected(place)
    told = items(worker)
    assert [item.index for item in told] == list(range(8))
    assert [item.finish for item in told] == [None] * 7 + [FinishReason.LENGTH]
    assert_empty(worker)


def test_a_step_tells_all_its_tokens_in_one_message() -> None:
    worker = Worker("w", Shape(chunk_tokens=30))
    places = [whole(number, PROMPT[number:]) for number in range(3)]
    give(worker, *places)
    step(worker)
    step(worker)
    batches = [told for told in worker.told if isinstance(told, TokenBatch)]
    assert [len(batch.items) for batch in batches] == [3, 3]
    run_alone(worker, [])
    for number, place in enumerate(places):
        mine = [item.token_id for item in items(worker) if item.key == key(number)]
        assert mine == expected(place)
    assert_empty(worker)


def test_decode_rows_come_first_in_a_step_with_chunks_beside_them() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(1))
    step(worker)
    step(worker)
    give(worker, whole(2, tuple(range(20, 40))))
    plan = step(worker)
    assert plan is not None
    assert [(row.start, row.num_tokens, row.sample) for row in plan.rows] == [
        (7, 1, True),
        (0, 6, False),
    ]
    run_alone(worker, [])
    assert_empty(worker)


def test_how_far_a_batch_is_ahead_is_told_with_its_tokens() -> None:
    """As it changes, after chunks, now and then where it runs on alone, and at its end."""
    worker = Worker("w", Shape())
    give(worker, replace(whole(1, max_tokens=12), tpot_ms=20.0))
    run_alone(worker, [])
    told = [one.slack_ms for one in worker.told if isinstance(one, TokenBatch)]
    assert [slack is not None for slack in told] == [True, *[False] * 3] * 2 + [
        True,
        *[False] * 2,
        True,
    ]
    first, second, third, last = (slack for slack in told if slack is not None)
    assert 19.0 < first < second < third  # all at one moment: each token is one that is ahead
    assert second - first == pytest.approx(4 * 19.0)
    assert last == math.inf


def test_log_probabilities_pass_through() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(logprobs=2))
    run_alone(worker, [])
    assert all(item.logprob is not None and len(item.top) == 2 for item in items(worker))
    assert_empty(worker)


def test_a_replayed_attempt_goes_on_where_the_last_one_stopped() -> None:
    worker = Worker("w", Shape())
    tokens = expected(whole())
    place = whole(output=tuple(tokens[:3]), attempt=1)
    give(worker, place)
    run_alone(worker, [])
    assert [item.index for item in items(worker)] == [3, 4, 5, 6, 7]
    assert worker.tokens() == tokens[3:]
    assert_empty(worker)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_an_end_token_ends_it_and_the_surplus_row_is_discarded(max_inflight: int) -> None:
    worker = Worker("w", Shape(max_inflight=max_inflight))
    place = whole(max_tokens=41)
    stop = expected(place)[4]
    assert stop not in expected(place)[:4]
    give(worker, whole(max_tokens=41, stop_token_ids=(stop,)))
    run_alone(worker, [])
    assert worker.tokens() == expected(place)[:5]
    assert items(worker)[-1].finish is FinishReason.STOP
    assert_empty(worker)


def test_the_blocks_of_a_surplus_row_come_back_only_with_its_step() -> None:
    worker = Worker("w", Shape(max_inflight=2, prefix_cache=False))
    place = whole(max_tokens=41)
    give(worker, whole(max_tokens=41, stop_token_ids=(expected(place)[1],)))
    for _ in range(2):  # both chunks of the prompt
        step(worker)
    first, _ = worker.core.plan(0.0)
    second, _ = worker.core.plan(0.0)
    assert first is not None and second is not None
    launched = [worker.engine.launch(first), worker.engine.launch(second)]
    worker.core.complete(launched[0].wait(), 0.0)
    assert worker.core.beat().live == ()
    assert worker.core.blocks.held == 3  # positions 0 to 8, the last of them surplus
    worker.core.check()
    worker.core.complete(launched[1].wait(), 0.0)
    assert_empty(worker)


def test_the_context_ends_an_output() -> None:
    worker = Worker("w", Shape(max_context=10))
    give(worker, whole(max_tokens=100))
    run_alone(worker, [])
    assert items(worker)[-1].finish is FinishReason.LENGTH
    assert worker.tokens() == expected(whole(max_tokens=100), max_context=10)
    assert_empty(worker)


def test_the_context_is_never_larger_than_the_pool() -> None:
    worker = Worker("w", Shape(num_blocks=3, block_size=4))
    assert worker.core.max_context == 12
    give(worker, whole(max_tokens=100))
    run_alone(worker, [])
    assert len(worker.tokens()) == 5
    assert_empty(worker)


@pytest.mark.parametrize(
    "place, kind",
    [
        (whole(prompt=tuple([2] * 48)), FailureKind.TOO_LARGE),
        (whole(prompt=tuple([2] * 40), output=tuple([3] * 8), max_tokens=9), FailureKind.TOO_LARGE),
        (whole(prompt=(2, 64)), FailureKind.TOO_LARGE),
        (whole(output=(1, 64), max_tokens=9), FailureKind.TOO_LARGE),
        (whole(output=(3,) * 8), FailureKind.INTERNAL),
        (
            Place(key(), Task.PREFILL, PROMPT, (), SamplingParams(max_tokens=8)),
            FailureKind.INTERNAL,
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once_and_for_good(
    place: Place, kind: FailureKind
) -> None:
    worker = Worker("w", Shape())
    give(worker, place, place)
    assert failures(worker) == [(place.key, kind)]
    assert_empty(worker)


def test_a_placement_said_twice_runs_once() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(), whole())
    run_alone(worker, [])
    give(worker, whole())
    run_alone(worker, [])
    assert worker.tokens() == expected(whole())
    assert_empty(worker)


def test_a_newer_attempt_ends_the_older_one() -> None:
    worker = Worker("w", Shape())
    tokens = expected(whole())
    give(worker, whole())
    for _ in range(4):
        step(worker)
    told = len(worker.tokens())
    assert 0 < told < 8
    give(worker, whole(output=tuple(tokens[:told]), attempt=1), whole(attempt=0))
    assert worker.core.beat().live == (key(1, 1),)
    run_alone(worker, [])
    assert worker.tokens() == tokens
    assert {item.key.number for item in items(worker)[told:]} == {1}
    assert_empty(worker)


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("num_events", range(12))
def test_an_abort_at_any_moment_gives_everything_back(num_events: int, max_inflight: int) -> None:
    """The n-th of plan and complete, by turns, is the last thing before it."""
    worker = Worker("w", Shape(max_inflight=max_inflight))
    give(worker, whole())
    for turn in range(num_events):
        if turn % 2 == 0 or (max_inflight == 2 and turn == 1):
            plan, _ = worker.core.plan(0.0)
            if plan is not None:
                worker.steps.append(worker.engine.launch(plan))
        elif worker.steps:
            worker.core.complete(worker.steps.popleft().wait(), 0.0)
    give(worker, Abort(key()))
    assert worker.core.beat().live == ()
    before = len(worker.tokens())
    run_alone(worker, [])
    assert len(worker.tokens()) == before  # nothing is said of it any more
    give(worker, whole(), Abort(key()))
    assert_empty(worker)


def test_an_abort_before_its_placement_counts() -> None:
    worker = Worker("w", Shape())
    give(worker, Abort(key()), whole())
    assert worker.told == []
    assert_empty(worker)


def test_an_abort_of_an_older_attempt_spares_the_newer_one() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(attempt=1), Abort(key(1, 0)))
    assert worker.core.beat().live == (key(1, 1),)
    give(worker, Abort(key(1, 1)))
    assert_empty(worker)


def test_what_the_routers_beat_does_not_list_ends() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(1), whole(2))
    step(worker)
    give(worker, RouterBeat((key(2),)))
    assert worker.core.beat().live == (key(2),)
    assert failures(worker) == []
    run_alone(worker, [])
    assert_empty(worker)


def test_without_a_router_everything_ends() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(1), whole(2), whole(3, tuple(range(2, 32))))
    step(worker)
    assert worker.core.router_lost(0.0) == []
    assert_empty(worker)


def test_a_draining_worker_finishes_refuses_and_says_goodbye_once() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(1), Drain(), whole(2))
    assert failures(worker) == [(key(2), FailureKind.DROPPED)]
    assert not worker.core.drained
    run_alone(worker, [])
    assert worker.tokens() == expected(whole(1))
    assert worker.core.drained and worker.told[-1] == Bye()
    give(worker, Drain())
    assert worker.told.count(Bye()) == 1
    assert_empty(worker)


def test_an_idle_worker_drains_at_once() -> None:
    worker = Worker("w", Shape())
    give(worker, Drain())
    assert worker.core.drained and worker.told == [Bye()]


def test_a_repeated_prompt_is_found_in_the_cache() -> None:
    worker = Worker("w", Shape())
    give(worker, whole(1))
    run_alone(worker, [])
    give(worker, whole(2))
    run_alone(worker, [])
    assert worker.told_of(Started) == [Started(key(1), 0), Started(key(2), 4)]
    assert worker.tokens() == expected(whole()) * 2
    assert worker.core.blocks == BlockCounts(total=16, free=13, cached=3, held=0)
    assert_empty(worker)


def test_the_router_hears_which_blocks_can_be_found_under_its_salt() -> None:
    worker = Worker("w", Shape())
    give(worker, whole())
    run_alone(worker, worker.core.tick(0.0))
    assert worker.told_of(CacheEvents) == []  # nobody has said yet how names are keyed
    give(worker, Welcome(1, b"of the router"))
    assert worker.told_of(CacheEvents) == [CacheEvents(0, b"", b"", reset=True)]
    place = whole(2)
    give(worker, place)
    run_alone(worker, [])
    run_alone(worker, worker.core.tick(0.0))
    names: list[bytes] = []
    text = (*place.prompt, *expected(place))
    BlockHasher(4, b"of the router").extend(names, text, (len(text) - 1) // 4)
    assert worker.told_of(CacheEvents)[1:] == [CacheEvents(1, b"".join(names), b"")]
    give(worker, ResyncCache())
    again = worker.told_of(CacheEvents)[2]
    assert isinstance(again, CacheEvents) and again.reset and again.stored == b"".join(names)


def test_a_conversation_goes_on_from_its_own_answer() -> None:
    """Output is cached like input: as far as its KV is there, which the last token's is not."""
    worker = Worker("w", Shape())
    give(worker, whole(1, max_tokens=10))
    run_alone(worker, [])
    history = (*PROMPT, *worker.tokens())  # 17 tokens, the KV of 16 of them
    give(worker, whole(2, (*history, 9)))
    run_alone(worker, [])
    assert worker.told_of(Started)[-1] == Started(key(2), 16)
    assert_empty(worker)


def streams(num: int, max_tokens: int = 20) -> list[Place]:
    return [whole(n, tuple(range(2 + n, 9 + n)), max_tokens=max_tokens) for n in range(num)]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("num_blocks", [8, 11, 28])
def test_preempted_streams_go_on_with_the_same_tokens(
    num_blocks: int, max_inflight: int, prefix_cache: bool
) -> None:
    shape = Shape(
        num_blocks=num_blocks, max_inflight=max_inflight, max_batch=4, prefix_cache=prefix_cache
    )
    worker = Worker("w", shape)
    places = streams(4)
    give(worker, *places)
    preempted = 0
    running = 0
    for _ in range(400):
        plan, effects = worker.core.plan(0.0)
        worker.told += [effect.message for effect in effects if isinstance(effect, Tell)]
        now_running = worker.core.beat().running
        preempted += plan is not None and now_running < running
        running = now_running
        if plan is not None:
            worker.steps.append(worker.engine.launch(plan))
        elif worker.steps:
            effects = worker.core.complete(worker.steps.popleft().wait(), 0.0)
            worker.told += [effect.message for effect in effects if isinstance(effect, Tell)]
            running = worker.core.beat().running
        worker.core.check()
    for number, place in enumerate(places):
        mine = [item for item in items(worker) if item.key == key(number)]
        assert [item.token_id for item in mine] == expected(place)
        assert [item.index for item in mine] == list(range(20))  # each told once
    assert len(worker.told_of(Started)) == 4
    assert (preempted > 0) == (num_blocks < 28)
    assert_empty(worker)


def test_the_answer_does_not_depend_on_how_it_was_computed() -> None:
    answers = set()
    for max_inflight, chunk_tokens, num_blocks in itertools.product((1, 2), (1, 5, 40), (9, 40)):
        shape = Shape(max_inflight=max_inflight, chunk_tokens=chunk_tokens, num_blocks=num_blocks)
        worker = Worker("w", shape)
        give(
            worker, *[whole(n, p.prompt, temperature=1.0, seed=n) for n, p in enumerate(streams(5))]
        )
        run_alone(worker, [])
        answers.add(
            tuple(
                sorted((item.key.request_id, item.index, item.token_id) for item in items(worker))
            )
        )
        assert_empty(worker)
    assert len(answers) == 1


def test_an_abort_of_a_preempted_stream_gives_its_place_back() -> None:
    worker = Worker("w", Shape(num_blocks=8, max_batch=2))
    give(worker, *streams(2))
    while worker.core.beat().waiting == 0 or worker.core.beat().running == 0:
        assert step(worker) is not None
    give(worker, Abort(key(1)), whole(7, (9, 9, 9)))
    run_alone(worker, [])
    assert [item.token_id for item in items(worker) if item.key == key(7)] == expected(
        whole(7, (9, 9, 9))
    )
    assert_empty(worker)


def test_no_more_run_at_once_than_the_batch_may_hold() -> None:
    worker = Worker("w", Shape(num_blocks=40, max_batch=2, chunk_tokens=40))
    give(worker, *streams(5, max_tokens=6))
    most = 0
    while step(worker) is not None:
        most = max(most, worker.core.beat().running)
    assert most == 2 and len(worker.tokens()) == 30
    assert_empty(worker)


def test_growth_kept_free_at_the_door_spares_preemption() -> None:
    worker = Worker("w", Shape(num_blocks=16, growth_tokens=20, chunk_tokens=40))
    give(worker, *streams(4))
    running = []
    while step(worker) is not None:
        running.append(worker.core.beat().running)
    assert max(running) == 2  # 7 blocks each at the end
    assert len(worker.tokens()) == 80
    assert_empty(worker)


def duty(worker: Worker) -> tuple[Role, int]:
    told = worker.core.beat().duty
    assert told is not None
    return told.role, told.chunk_tokens


def test_a_role_is_taken_on_at_once_where_nothing_is_in_its_way() -> None:
    worker = Worker("w", Shape(), decode_chunk=2)
    assert duty(worker) == (Role.MIXED, 6)
    give(worker, SetRole(Role.DECODE))
    assert duty(worker) == (Role.DECODE, 2)
    give(worker, SetRole(Role.PREFILL), whole())
    assert duty(worker) == (Role.PREFILL, 6)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_role_waits_for_the_phase_it_has_less_room_for(role: Role) -> None:
    worker = Worker("w", Shape(chunk_tokens=3), decode_chunk=2)
    place = whole()
    give(worker, place)
    step(worker)
    give(worker, SetRole(role))
    roles = [duty(worker)[0]]
    while step(worker) is not None:
        roles.append(duty(worker)[0])
    num_chunks = -(-len(place.prompt) // 3)  # one is done
    num_waiting = num_chunks - 1 if role is Role.DECODE else len(roles) - 1
    assert roles == [Role.MIXED] * num_waiting + [role] * (len(roles) - num_waiting)
    assert worker.tokens() == expected(place)


def test_a_role_does_not_wait_for_ever() -> None:
    worker = Worker("w", Shape(), decode_chunk=2)
    give(worker, whole())
    step(worker)
    step(worker)
    give(worker, SetRole(Role.PREFILL))
    worker.core.tick(FLIP_LIMIT_S - 0.1)
    assert duty(worker)[0] is Role.MIXED
    worker.core.tick(FLIP_LIMIT_S)
    assert duty(worker)[0] is Role.PREFILL
    run_alone(worker, [])
    assert worker.tokens() == expected(whole())


def test_the_beat_counts_what_waits_and_what_runs() -> None:
    worker = Worker("w", Shape(max_batch=1))
    give(worker, *streams(3))
    assert (worker.core.beat().waiting, worker.core.beat().running) == (3, 0)
    step(worker)
    step(worker)
    beat = worker.core.beat()
    assert (beat.waiting, beat.running) == (2, 1)
    assert beat.blocks == worker.core.blocks and beat.blocks.held == 2
    give(worker, RouterBeat(()))
    assert_empty(worker)
