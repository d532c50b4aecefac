"""When a request went through its stages, from the arrival of its call to its end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_worker import FakeWorker
from router_net import MODEL, router, run, split, until

from pdserve.core.config import Policy
from pdserve.core.errors import Unavailable
from pdserve.core.ids import Role, WorkerRef
from pdserve.core.messages import FinishReason, Key, PeerAddress, TokenItem
from pdserve.core.params import SamplingParams
from pdserve.router.requests import Ask, Request, State
from pdserve.router.snapshot import Forecast, Objectives, Placement
from pdserve.router.timeline import Marks, Outcome, Recent, Stage, Timeline

ID = "0123456789abcdef" * 2
P, D, M = WorkerRef("p", 1), WorkerRef("d", 1), WorkerRef("m", 1)
SPLIT, WHOLE = Placement(P, D), Placement(M, M)


def address(ref: WorkerRef) -> PeerAddress:
    return PeerAddress(ref.worker_id, ref.epoch, f"tcp://{ref.worker_id}:1", "token")


def request(max_tokens: int = 3) -> Request:
    """It came at 10 s; its prompt was tokenized at 11 s."""
    params = SamplingParams(max_tokens=max_tokens)
    return Request(Ask(ID, (5, 6, 7), params, 60.0, call_id="call", arrived=10.0), 11.0)


def draw(one: Request, worker: WorkerRef, index: int, now: float, *, last: bool = False) -> None:
    finish = FinishReason.LENGTH if last else None
    one.token(TokenItem(one.key, index, 100 + index, finish), worker, now)


def split_request() -> Timeline:
    one = request()
    one.place(SPLIT, address, 12.0)
    one.started(Key(ID, 1), 2, 14.0)
    draw(one, P, 0, 17.0)
    draw(one, D, 0, 18.0)
    draw(one, D, 1, 19.0)
    draw(one, D, 2, 20.0, last=True)
    return one.timeline(20.0)


def test_every_stage_of_a_split_request() -> None:
    found = split_request()
    assert (found.outcome, found.route, found.error) == (Outcome.DONE, Policy.DISAGGREGATED, None)
    assert (found.request_id, found.call_id) == (ID, "call")
    assert (found.num_prompt_tokens, found.num_cached_tokens, found.num_output_tokens) == (3, 2, 3)
    assert (found.ttft, found.tpot, found.total) == (7.0, 1.5, 10.0)
    assert found.stages() == [
        (Stage.TOKENIZE, 10.0, 11.0),
        (Stage.QUEUE, 11.0, 12.0),
        (Stage.PREFILL_QUEUE, 12.0, 14.0),
        (Stage.PREFILL, 14.0, 17.0),
        (Stage.HAND_OVER, 17.0, 18.0),
        (Stage.DECODE_QUEUE, 18.0, 19.0),
        (Stage.DECODE, 19.0, 20.0),
    ]


def test_the_forecast_is_of_the_placement_that_drew_the_first_token() -> None:
    first, second = Forecast(1.0, 2.0, 1.0), Forecast(3.0, 4.0, 1.0)
    one = request()
    one.place(replace(SPLIT, forecast=first), address, 12.0)
    one.replay()
    one.place(replace(SPLIT, forecast=second), address, 13.0)
    draw(one, P, 0, 14.0)
    one.replay()
    one.place(replace(WHOLE, forecast=first), address, 15.0)
    draw(one, M, 1, 16.0)
    draw(one, M, 2, 17.0, last=True)
    found = one.timeline(17.0)
    assert found.forecast == second
    assert found.shown()["forecast"] == {"ttft_ms": 3.0, "tpot_ms": 4.0}


def test_a_whole_request_is_handed_to_nobody() -> None:
    one = request()
    one.place(WHOLE, address, 11.0)
    one.started(Key(ID, 1), 0, 11.0)
    for index, now in enumerate((13.0, 14.0, 16.0)):
        draw(one, M, index, now)
    found = one.timeline(16.0)
    assert (found.route, found.handed_over) == (Policy.COLOCATED, None)
    assert found.stages()[-2:] == [(Stage.PREFILL, 11.0, 13.0), (Stage.DECODE, 13.0, 16.0)]


def test_a_single_token_has_no_time_per_token() -> None:
    one = request(max_tokens=1)
    one.place(SPLIT, address, 12.0)
    one.started(Key(ID, 1), 0, 12.0)
    draw(one, P, 0, 13.0, last=True)
    found = one.timeline(13.0)
    assert found.tpot is None and found.good(Objectives(3000.0, 1.0))
    assert found.stages()[-1] == (Stage.PREFILL, 12.0, 13.0)


def test_a_replay_before_the_first_token_begins_its_stages_anew() -> None:
    one = request()
    one.place(SPLIT, address, 12.0)
    one.started(Key(ID, 1), 0, 13.0)
    one.replay()
    one.place(WHOLE, address, 20.0)
    one.started(Key(ID, 2), 0, 21.0)
    for index, now in enumerate((23.0, 24.0, 25.0)):
        draw(one, M, index, now)
    found = one.timeline(25.0)
    assert (found.num_attempts, found.placed, found.started) == (2, 20.0, 21.0)
    assert [stage for stage, _, _ in found.stages()][-1] is Stage.DECODE


def test_a_replay_in_mid_answer_shows_as_a_gap_and_moves_no_stage() -> None:
    one = request()
    one.place(SPLIT, address, 12.0)
    one.started(Key(ID, 1), 0, 13.0)
    draw(one, P, 0, 14.0)
    assert one.marks.gap is None
    one.replay()
    one.place(WHOLE, address, 20.0)
    one.started(Key(ID, 2), 0, 21.0)
    draw(one, M, 1, 23.0)
    assert one.marks.gap == 9.0
    draw(one, M, 2, 24.0)
    found = one.timeline(24.0)
    assert (found.placed, found.started, found.first_token) == (12.0, 13.0, 14.0)


@pytest.mark.parametrize(("placed", "last"), [(False, Stage.QUEUE), (True, Stage.PREFILL_QUEUE)])
def test_the_last_stage_of_one_that_is_given_up_ends_with_it(placed: bool, last: Stage) -> None:
    one = request()
    if placed:
        one.place(SPLIT, address, 12.0)
    one.end(State.ABORTED)
    found = one.timeline(15.0)
    assert found.outcome is Outcome.ABORTED and found.ttft is None and not found.good(Objectives())
    stage, _, end = found.stages()[-1]
    assert (stage, end) == (last, 15.0)


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "met"),
    [(7000.0, 1500.0, (True, True)), (6900, 1500, (False, True)), (7000, 1400, (True, False))],
)
def test_good_is_within_both_objectives(
    ttft_ms: float, tpot_ms: float, met: tuple[bool, bool]
) -> None:
    found, asked = split_request(), Objectives(ttft_ms, tpot_ms)
    assert found.met(asked) == met and found.good(asked) is all(met)
    own = replace(found, objectives=asked)  # which go before the deployment's
    assert own.met(Objectives(1.0, 1.0)) == met
    shown = own.shown()["objectives"]
    assert shown == {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms}


def test_what_is_refused_at_the_door_did_not_fail() -> None:
    outcomes = {}
    for status, code in ((429, "slo_missed"), (504, "timeout")):
        one = request()
        one.fail(Unavailable("not now", status=status, code=code))
        found = one.timeline(12.0)
        outcomes[found.error] = found.outcome
        assert not found.good(Objectives())
    assert outcomes == {"slo_missed": Outcome.REFUSED, "timeout": Outcome.FAILED}


def test_a_mark_is_set_once() -> None:
    marks = Marks(0.0, 1.0)
    marks.place(2.0)
    marks.start(3.0)
    marks.start(4.0)
    marks.token(5.0)
    marks.hand_over(5.5)
    marks.token(6.0)
    marks.hand_over(7.0)
    marks.token(8.0)
    assert (marks.started, marks.first_token, marks.handed_over) == (3.0, 5.0, 5.5)
    assert (marks.second_token, marks.last_token, marks.gap) == (6.0, 8.0, 2.0)


def test_a_prefill_whose_start_was_not_heard_of_has_begun_by_its_first_token() -> None:
    one = request()
    one.place(SPLIT, address, 12.0)
    draw(one, D, 0, 17.0)
    one.started(one.key, 0, 18.0)
    assert (one.marks.started, one.marks.first_token, one.marks.handed_over) == (17.0,) * 3


def test_the_recent_ones_are_bounded() -> None:
    recent = Recent(limit=3)
    for call_id in ("a", "b", "b", "c"):
        one = Request(Ask(ID, (1,), SamplingParams(max_tokens=1), 9.0, call_id=call_id), 0.0)
        one.end(State.ABORTED)
        recent.keep(one.timeline(1.0))
    assert [len(recent.of(call_id)) for call_id in ("a", "b", "c")] == [0, 2, 1]
    assert len(recent) == len(list(recent)) == 3


def test_a_client_that_asks_gets_the_timelines_with_its_answer() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "n": 2}
            asked = {"X-Pdserve-Timeline": "1"}
            async with up.client.post("/v1/completions", json=body, headers=asked) as response:
                call_id = response.headers["X-Request-Id"]
                one, other = (await response.json())["timelines"]
            assert one["outcome"] == other["outcome"] == "done"
            assert (one["prefill_worker"], one["decode_worker"]) == ("prefill-0", "decode-0")
            marks = list(one["marks_ms"].values())
            assert None not in marks and marks == sorted(marks)
            assert one["transfer"]["medium"] == "tcp" and one["transfer"]["exposed_ms"] == 0.5
            assert one["ttft_ms"] == one["marks_ms"]["first_token"] > 0
            status, found = await up.get(f"/requests/{call_id}")
            assert status == 200
            assert sorted(found["timelines"], key=str) == sorted((one, other), key=str)

    run(main())


def test_a_stream_ends_with_the_timelines_where_they_are_asked_for() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "stream": True}
            asked = {"X-Pdserve-Timeline": "1"}
            async with up.client.post("/v1/completions", json=body, headers=asked) as response:
                text = await response.text()
            *_, last, done, _ = text.split("\n\n")
            assert '"choices":[]' in last and '"outcome":"done"' in last
            assert done == "data: [DONE]"
            plain = await up.events("/v1/completions", prompt="hello", max_tokens=4)
            assert not any("timelines" in event for event in plain)

    run(main())


def test_what_ended_badly_has_its_timeline_too_and_what_never_was_has_none() -> None:
    async def main() -> None:
        async with router() as up, FakeWorker(up.net, "m", Role.MIXED) as worker:
            assert (await up.get("/requests/never"))[0] == 404
            worker.hold_tokens = True
            asked = asyncio.create_task(up.complete())
            await until(lambda: len(worker.placed) == 1)
            asked.cancel()
            await until(lambda: len(up.service.recent) == 1)
            (found,) = up.service.recent
            assert (found.outcome, found.num_output_tokens) == (Outcome.ABORTED, 0)
            assert (await up.get(f"/requests/{found.call_id}"))[0] == 200

    run(main())
