"""The search for capacity, against a queue whose answer is known, and what it does on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pdserve.bench.slo.arrivals import gamma, poisson
from pdserve.bench.slo.measures import Objectives, attainment
from pdserve.bench.slo.records import Record
from pdserve.bench.slo.search import Capacity, Settings, bracket, next_rate, search

SERVICE_S = 0.1
LIMIT_S = 0.35


def waits_at_most(rate: float, wait_s: float) -> float:
    """P(W <= t) in M/D/1 (Erlang 1909): the queue's wait, without the service."""
    load = rate * SERVICE_S
    total = 0.0
    for k in range(int(wait_s / SERVICE_S) + 1):
        part = rate * (wait_s - k * SERVICE_S)
        total += (-part) ** k / math.factorial(k) * math.exp(part)
    return (1 - load) * total


def analytic(target: float) -> float:
    """The rate at which that share waits no longer than the limit allows."""
    low, high = 0.01, 1 / SERVICE_S
    for _ in range(60):
        middle = (low + high) / 2
        met = waits_at_most(middle, LIMIT_S - SERVICE_S) >= target
        low, high = (middle, high) if met else (low, middle)
    return low


def simulated(rate: float, seed: int) -> float:
    """Attainment of an M/D/1 server, by the records that a client would have made."""
    free = 0.0
    records = []
    for index, due in enumerate(poisson(rate, 12_000 / rate, seed)):
        free = max(free, due) + SERVICE_S
        records.append(Record(index, due, due, ((free, 1),), free, 1, 1))
    return attainment(records, Objectives(1e3 * LIMIT_S, 1.0), 1.0).both


@pytest.mark.parametrize(("target", "start"), [(0.9, 8.0), (0.99, 0.7)])
def test_it_finds_the_capacity_of_a_queue(target: float, start: float) -> None:
    settings = Settings(start=start, target=target, tolerance=0.03)
    found = search(lambda rate: simulated(rate, seed=int(1000 * rate)), settings)
    assert found.finished and found.met is not None and found.missed is not None
    true = analytic(target)
    # The tolerance, and what 12,000 requests a point leave open.
    assert found.met / 1.03 <= true <= found.missed * 1.03, (found, true)


def test_its_path() -> None:
    settings = Settings(start=4.0, tolerance=0.1)
    points: dict[float, float] = {}
    path = []
    while (rate := next_rate(points, settings)) is not None:
        path.append(rate)
        points[rate] = 1.0 if rate <= 10.0 else 0.5
    assert path[:3] == pytest.approx([4.0, 5.2, 10.4])
    assert path[3] == pytest.approx(math.sqrt(5.2 * 10.4))
    found = bracket(points, settings)
    assert found.finished and found.met is not None and found.missed is not None
    assert found.met <= 10.0 < found.missed <= found.met * 1.1


def test_it_goes_on_from_points_that_are_known() -> None:
    known = {2.0: 1.0, 2.05: 0.4}
    assert next_rate(known, Settings(start=50.0)) is None
    assert bracket(known, Settings(start=50.0)) == Capacity(2.0, 2.05, finished=True)


def test_not_met_is_said_and_not_a_number() -> None:
    found = search(lambda rate: 0.0, Settings(start=4.0, lowest=0.5))
    assert found == Capacity(None, 0.5, finished=True)
    assert found.words == "not met"


def test_the_highest_rate_is_only_a_bound() -> None:
    found = search(lambda rate: 1.0, Settings(start=4.0, highest=64.0))
    assert found == Capacity(64.0, None, finished=True)
    assert found.words == ">= 64"


def test_a_slow_run_lasts_until_it_can_tell() -> None:
    settings = Settings(start=1.0, min_requests=30)
    assert settings.duration_s(10.0, 20.0, 2.0) == 20.0
    assert settings.duration_s(0.5, 20.0, 2.0) == 62.0


def test_a_lucky_rate_above_a_miss_does_not_count() -> None:
    assert bracket({4.0: 1.0, 5.0: 0.8, 6.0: 0.95}, Settings(start=1.0)).met == 4.0


def test_gamma_gaps_have_the_burstiness_that_was_asked_for() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(gamma(10.0, 2000.0, burstiness, seed=3))
        assert np.mean(gaps) == pytest.approx(0.1, rel=0.05)
        assert (np.std(gaps) / np.mean(gaps)) ** 2 == pytest.approx(1 / burstiness, rel=0.1)
