"""What the router benchmark reads from two scrapes."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from pdserve.bench.router_share import Histograms


def test_a_quantile_is_of_what_came_between_two_scrapes() -> None:
    registry = CollectorRegistry()
    bounds = (0.001, 0.002, 0.004)
    times = Histogram("own_seconds", "", ["part"], buckets=bounds, registry=registry)

    def scrape() -> Histograms:
        return Histograms.of(generate_latest(registry).decode())

    for _ in range(100):
        times.labels("in").observe(0.0005)
    before = scrape()
    for _ in range(98):
        times.labels("in").observe(0.0015)
    for _ in range(2):
        times.labels("in").observe(0.003)
    found = scrape().since(before)
    name = 'own_seconds{part="in"}'
    assert found.quantile_ms(name, 0.49) == pytest.approx(1.5)
    assert found.quantile_ms(name, 0.99) == pytest.approx(3.0)
    times.labels("in").observe(9.0)
    times.labels("out")
    found = scrape().since(before)
    assert found.quantile_ms(name, 1.0) == float("inf")
    assert found.quantile_ms('own_seconds{part="out"}', 0.5) is None
    assert found.quantile_ms("another", 0.5) is None
