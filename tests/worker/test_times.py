"""What steps cost: measured at the start, corrected as they end, and when one hangs."""

from __future__ import annotations

import pytest

from pdserve.core.cost import DecodeCost, PrefillCost, StepCost
from pdserve.core.plan import StepPlan
from pdserve.simulation.engine import SimulatedEngine, SimulatedModel
from pdserve.worker.budget import Budget
from pdserve.worker.times import HUNG_AFTER_S, HUNG_TIMES, HUNG_UNMEASURED_S, StepTimes
from pdserve.worker.warmup import measure

COST = StepCost(PrefillCost(5.0, 0.05, 1e-6), DecodeCost(4.0, 0.02, 1e-5))


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine(time: Time, cost: StepCost, **shape: int) -> SimulatedEngine:
    def latency(plan: StepPlan) -> float:
        rows = plan.rows
        if any(row.num_tokens > 1 for row in rows):
            return sum(cost.prefill.ms(row.num_tokens, row.start) for row in rows) / 1e3
        return cost.decode.ms(len(rows), sum(row.start + 1 for row in rows)) / 1e3

    return SimulatedEngine(SimulatedModel(), latency=latency, clock=time, sleep=time.sleep, **shape)


def close(found: StepCost, cost: StepCost, tolerance: float) -> None:
    for tokens, context in ((16, 0), (256, 0), (512, 1024)):
        expected = cost.prefill.ms(tokens, context)
        assert found.prefill.ms(tokens, context) == pytest.approx(expected, rel=tolerance)
    for batch, kv_tokens in ((1, 100), (16, 4000), (64, 60_000)):
        expected = cost.decode.ms(batch, kv_tokens)
        assert found.decode.ms(batch, kv_tokens) == pytest.approx(expected, rel=tolerance)


def test_the_measured_cost_is_the_engines() -> None:
    time = Time()
    tested = engine(
        time, COST, num_blocks=8192, max_slots=72, max_context=4096, max_step_tokens=600
    )
    found = measure(tested, Budget(512, 64, 8), time, 10.0)
    close(found, COST, 0.02)


def test_a_slow_engine_is_measured_at_a_few_points_in_bounded_time() -> None:
    time = Time()
    slow = COST.scaled(100, 100)
    tested = engine(time, slow, num_blocks=512, max_slots=72, max_context=512, max_step_tokens=200)
    found = measure(tested, Budget(128, 64, 8), time, 1.0)
    assert time.now < 8.0
    assert found.prefill.ms(128) == pytest.approx(slow.prefill.ms(128), rel=0.1)
    assert found.decode.ms(64, 1024) == pytest.approx(slow.decode.ms(64, 1024), rel=0.1)


def test_the_smallest_pool_can_be_measured() -> None:
    time = Time()
    tested = engine(time, COST, num_blocks=2, block_size=4, max_slots=3, max_context=8)
    measure(tested, Budget(8, 2, 1), time, 1.0)


def test_steps_that_take_longer_correct_the_forecast() -> None:
    times = StepTimes(COST)
    now = 0.0
    for _ in range(300):
        times.launched(8, 4000, 0.0, now)
        now += 1.5 * COST.decode.ms(8, 4000) / 1e3
        times.completed(now)
        now += 10.0  # idle
        chunk_ms = times.chunk_ms(256, 0)
        times.launched(8, 4000, chunk_ms, now)
        now += COST.scaled(0.8, 1.5).ms(8, 4000, 0.8 * chunk_ms) / 1e3
        times.completed(now)
    assert times.factors == pytest.approx((0.8, 1.5, 1.0), rel=0.02)
    assert times.cost is not None
    close(times.cost, COST.scaled(0.8, 1.5), 0.02)


def test_a_step_launched_behind_another_begins_when_that_ends() -> None:
    times = StepTimes(COST)
    step_s = COST.decode.ms(8, 4000) / 1e3
    times.launched(8, 4000, 0.0, 0.0)
    for count in range(1, 200):
        times.launched(8, 4000, 0.0, (count - 1) * step_s)
        times.completed(count * step_s)
    assert times.factors[1] == pytest.approx(1.0)


def test_a_step_that_ended_while_the_next_was_launched_took_what_it_should() -> None:
    """Launching a step with chunks keeps the host busy for 11 ms; the batch's own, before it, is
    done after 5. What is read late is not the time that it took, nor is the next one shorter."""
    times = StepTimes(COST)
    decode_s = COST.decode.ms(8, 4000) / 1e3
    chunk_ms = times.chunk_ms(2048, 0)
    both_s = COST.ms(8, 4000, chunk_ms) / 1e3
    now = 0.0
    for _ in range(200):
        times.launched(8, 4000, 0.0, now)
        times.launched(8, 4000, chunk_ms, now + 1e-4)
        times.completed(now + 0.011, since=now + 1e-4)
        now += decode_s + both_s
        times.completed(now)
    assert times.factors == pytest.approx((1.0, 1.0, 1.0), rel=0.001)


def test_a_host_that_is_slower_than_its_device_is_still_seen() -> None:
    """Every step is done before anybody looks, and the next one is launched no sooner."""
    times = StepTimes(COST)
    cadence_s = 1.4 * COST.decode.ms(8, 4000) / 1e3
    times.launched(8, 4000, 0.0, 0.0)
    for count in range(1, 400):
        now = count * cadence_s
        times.launched(8, 4000, 0.0, now)
        times.completed(now + 1e-3, since=now - cadence_s + 1e-4)
    assert times.factors[1] == pytest.approx(1.4, rel=0.03)


def test_a_step_hangs_after_many_times_its_forecast_and_some_seconds() -> None:
    assert StepTimes(None).hung_after_s == HUNG_UNMEASURED_S
    times = StepTimes(COST)
    assert times.hung_after_s == HUNG_AFTER_S
    times.launched(8, 4000, 0.0, 0.0)
    assert times.hung_after_s == HUNG_AFTER_S
    times.launched(0, 0, times.chunk_ms(100_000, 0), 0.0)
    alone_s = COST.prefill.ms(100_000) / 1e3
    assert times.hung_after_s == pytest.approx(HUNG_TIMES * alone_s)
