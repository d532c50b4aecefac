"""The definitions, by hand, and against other tools' formulas on the same recorded stream."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from pdserve.bench.slo.measures import (
    Objectives,
    end_to_end,
    good,
    second_token,
    summarize,
    token_gaps,
    tokens_within,
    tpot,
    ttft,
    wilson,
)
from pdserve.bench.slo.records import Cause, ClientHealth, Record
from pdserve.core.errors import ConfigError


def made(
    *times: float, due: float = 0.0, sent: float = 0.0, failure: Cause | None = None
) -> Record:
    return Record(
        index=0,
        due=due,
        sent=sent,
        events=tuple((time, 1) for time in times),
        ended=times[-1] if times else due,
        num_input=8,
        num_output=len(times),
        failure=failure,
    )


STREAM = made(1.5, 1.7, 1.75, 2.1, due=1.0, sent=1.1)


def test_each_by_its_formula() -> None:
    assert ttft(STREAM) == pytest.approx(0.5)
    assert tpot(STREAM) == pytest.approx(0.6 / 3)
    assert token_gaps(STREAM) == pytest.approx([0.2, 0.05, 0.35])
    assert second_token(STREAM) == pytest.approx(0.2)
    assert end_to_end(STREAM) == pytest.approx(1.1)


def test_tokens_of_one_event_have_no_gap_between_them() -> None:
    record = replace(STREAM, events=((1.5, 2), (1.9, 3)), num_output=5)
    assert token_gaps(record) == pytest.approx([0.0, 0.4, 0.0, 0.0])
    assert tpot(record) == pytest.approx(0.4 / 4)


def test_tokens_without_text_count_as_the_server_says() -> None:
    record = replace(STREAM, num_output=6, ended=2.5)
    assert tpot(record) == pytest.approx((2.5 - 1.5) / 5)  # the last ones showed with the end
    assert tokens_within(record, 0.0, 1.72) == pytest.approx(3.0)


def test_one_token_has_no_tpot_and_meets_it() -> None:
    record = made(0.1)
    assert tpot(record) is None and second_token(record) is None
    assert good(record, Objectives(100, 1))


def test_a_limit_is_met_when_it_is_just_reached() -> None:
    record = made(0.5, 0.53)
    assert good(record, Objectives(500, 30.0000001))
    assert not good(record, Objectives(499, 31))
    assert not good(record, Objectives(501, 29))


def test_what_failed_counts_against_attainment_and_is_listed() -> None:
    records = [
        made(0.1, 0.11, due=0.0),
        made(1.1, 1.11, due=1.0),
        made(1.6, due=1.5, failure=Cause.CUT),
        made(due=1.7, failure=Cause.REFUSED),
        made(2.19, 2.9, due=2.0),  # too slow
        made(9.1, due=9.0),  # after the window
    ]
    summary = summarize(records, (0.5, 4.5), [Objectives(200, 20)])
    assert summary.num_requests == 4 and summary.num_completed == 2
    assert summary.failures == {"cut": 1, "refused": 1}
    (found,) = summary.attainment
    assert (found.both, found.ttft_alone, found.tpot_alone) == (0.25, 0.5, 0.25)
    assert found.goodput == pytest.approx(1 / 4)
    assert summary.requests_s == pytest.approx(2 / 4)
    assert summary.output_tokens_s == pytest.approx(5 / 4)


def test_intervals_hold_the_value_and_narrow_with_more_requests() -> None:
    def width(number: int) -> float:
        records = [made(due + 0.1 + (due % 7) / 100, due=due) for due in map(float, range(number))]
        found = summarize(records, (0.0, number), []).times_ms["TTFT"]["p50"]
        assert found["low"] <= found["value"] <= found["high"]
        return float(found["high"] - found["low"])

    assert width(1000) < width(30)
    low, high = wilson(9, 10)
    assert low == pytest.approx(0.5958, abs=1e-3) and high == pytest.approx(0.9821, abs=1e-3)


def test_where_other_tools_say_the_same_and_where_not() -> None:
    """vLLM's ``bench serve`` and AIPerf measure from the send, we from the arrival. Beside that
    TTFT, TPOT (AIPerf calls it ITL), gaps and time to second token are the same."""
    first, *_, last = (time for time, _ in STREAM.events)
    assert STREAM.sent is not None
    vllm_ttft = first - STREAM.sent
    vllm_latency = last - STREAM.sent
    vllm_tpot = (vllm_latency - vllm_ttft) / (STREAM.num_output - 1)
    times = [time for time, _ in STREAM.events]
    vllm_itl = [b - a for a, b in pairwise(times)]
    aiperf_itl = (vllm_latency - vllm_ttft) / (STREAM.num_output - 1)
    aiperf_second = times[1] - times[0]

    assert ttft(replace(STREAM, due=STREAM.sent)) == pytest.approx(vllm_ttft)
    assert ttft(STREAM) == pytest.approx(vllm_ttft + (STREAM.sent - STREAM.due))
    assert tpot(STREAM) == pytest.approx(vllm_tpot) == pytest.approx(aiperf_itl)
    assert token_gaps(STREAM) == pytest.approx(vllm_itl)
    assert second_token(STREAM) == pytest.approx(aiperf_second)
    assert end_to_end(replace(STREAM, due=STREAM.sent)) == pytest.approx(vllm_latency)


def test_objectives_are_read_and_ordered() -> None:
    assert Objectives.parse("200/15") == Objectives(200, 15)
    assert str(Objectives(200, 12.5)) == "200/12.5"
    assert Objectives(200, 10).no_looser_than(Objectives(200, 15))
    assert not Objectives(200, 15).no_looser_than(Objectives(500, 10))
    for wrong in ("200", "200/", "0/10", "a/b", "200/15/3", "-1/3"):
        with pytest.raises(ConfigError, match="allowed: "):
            Objectives.parse(wrong)


def test_a_record_survives_its_file() -> None:
    record = replace(STREAM, failure=Cause.CUT, detail="half", server={"stages": []}, turn=2)
    assert Record.of_json(record.as_json()) == record


def test_when_a_client_lags() -> None:
    assert ClientHealth({"p50": 0.1, "p99": 2.0, "max": 90.0}, 40.0).fault is None
    assert "sent late" in (ClientHealth({"p99": 25.0}, 0.0).fault or "")
    assert "stalled for 150 ms" in (ClientHealth({"p99": 1.0}, 150.0).fault or "")
