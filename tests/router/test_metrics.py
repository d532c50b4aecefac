"""What /metrics says, of requests that were really made."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_worker import FakeWorker
from prometheus_client.parser import text_string_to_metric_families
from router_net import MODEL, Router, router, run, split, until

from pdserve.core.config import Policy, PoolsSection, SloSection
from pdserve.core.ids import Role
from pdserve.router.dispatch import Dispatch
from pdserve.router.membership import Membership
from pdserve.router.metrics import Metrics, around
from pdserve.router.snapshot import Forecast
from pdserve.router.timeline import Outcome, Stage, Timeline

SPLIT = {
    "gen_ai_operation_name": "text_completion",
    "gen_ai_request_model": MODEL,
    "route": "disaggregated",
}
ROOT = Path(__file__).parents[2]


async def scrape(up: Router) -> Scraped:
    async with up.client.get("/metrics") as response:
        assert response.status == 200
        return Scraped(await response.text())


class Scraped:
    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.families = {family.name for family in families}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }
        self.names = {name for name, _ in self._samples}

    def __getitem__(self, name: str) -> float:
        return self.get(name)

    def get(self, name: str, **labels: str) -> float:
        return self._samples[name, frozenset(labels.items())]


def test_one_request_is_in_every_figure_that_it_should_be_in() -> None:
    async def main() -> None:
        async with split(slo={"ttft_ms": 60_000, "tpot_ms": 60_000}) as (up, _, _):
            up.net.cached_tokens = 3
            await up.complete("hello", max_tokens=4)
            found = await scrape(up)
            for name in ("time_to_first_token", "time_per_output_token"):
                assert found.get(f"gen_ai_server_{name}_seconds_count", **SPLIT) == 1
            total = "gen_ai_server_request_duration_seconds"
            assert found.get(f"{total}_count", **SPLIT, error_type="none") == 1
            assert found["pdserve_inter_token_latency_seconds_count"] == 3
            for stage in Stage:
                assert found.get("pdserve_stage_seconds_count", stage=stage) == 1
            parts = {"input": 5, "output": 4, "cached": 3}
            for kind, count in parts.items():
                assert found.get("pdserve_tokens_total", gen_ai_token_type=kind) == count
            done = {"outcome": "done", "route": "disaggregated", "error_type": "none"}
            assert found.get("pdserve_requests_total", **done) == 1
            assert found["pdserve_grant_wait_seconds_sum"] == 0.001
            assert found.get("pdserve_transfer_seconds_sum", medium="tcp") == 0.002
            assert found.get("pdserve_transfer_exposed_seconds_sum", medium="tcp") == 0.0005
            assert found.get("pdserve_transfer_bytes_total", medium="tcp") == 4096
            assert found["pdserve_good_requests_total"] == 1
            for objective in ("ttft", "tpot", "both"):
                assert found.get("pdserve_slo_total", objective=objective, met="yes") == 1
            assert found["pdserve_batch_size_count"] == 3
            assert found.get("pdserve_router_seconds_count", part="in") == 1
            assert found.get("pdserve_router_seconds_count", part="out") == 0  # no stream
            plain = {"path": "/v1/completions", "status": "200"}
            assert found.get("pdserve_http_responses_total", **plain) == 1

    run(main())


def test_what_the_router_takes_of_a_stream_is_in_its_metrics() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            await up.events("/v1/completions", prompt="hello", max_tokens=2)
            found = await scrape(up)
            for part in ("in", "out"):
                assert found.get("pdserve_router_seconds_count", part=part) == 1
                assert 0 < found.get("pdserve_router_seconds_sum", part=part) < 60

    run(main())


def test_a_request_that_is_late_is_not_good() -> None:
    async def main() -> None:
        async with split(slo={"ttft_ms": 0.001, "tpot_ms": 60_000}) as (up, _, _):
            await up.complete(max_tokens=2)
            found = await scrape(up)
            assert found["pdserve_good_requests_total"] == 0
            assert found.get("pdserve_slo_total", objective="ttft", met="no") == 1
            assert found.get("pdserve_slo_total", objective="tpot", met="yes") == 1
            assert found.get("pdserve_slo_total", objective="both", met="no") == 1

    run(main())


def test_what_is_refused_is_counted_by_its_reason() -> None:
    async def main() -> None:
        async with split(router={"max_queue": 1}) as (up, prefill, _):
            assert (await up.complete(model="another"))[0] == 404
            assert (await up.complete(temperature="hot"))[0] == 400
            assert (await up.get("/nowhere/at/all"))[0] == 404
            prefill.hold_tokens = True
            held = asyncio.create_task(up.complete())
            await until(lambda: len(prefill.placed) == 1)
            assert (await up.complete())[0] == 429
            found = await scrape(up)
            assert found.get("pdserve_live_requests", state="placed") == 1
            for code in ("model_not_found", "invalid_value", "queue_full"):
                refused = {"outcome": "refused", "route": "none", "error_type": code}
                assert found.get("pdserve_requests_total", **refused) == 1
            assert found.get("pdserve_http_responses_total", path="other", status="404") == 1
            held.cancel()
            await until(lambda: len(up.service.recent) == 1)
            found = await scrape(up)
            gone = {"outcome": "aborted", "route": "disaggregated", "error_type": "none"}
            assert found.get("pdserve_requests_total", **gone) == 1
            assert found.get("pdserve_slo_total", objective="both", met="no") == 0

    run(main())


def test_a_workers_death_and_what_it_moved() -> None:
    async def main() -> None:
        async with router() as up, FakeWorker(up.net, "a", Role.MIXED) as worker:
            worker.hold_after = 2
            asked = asyncio.create_task(up.complete(max_tokens=4))
            await until(lambda: len(worker.placed) == 1)
            async with FakeWorker(up.net, "b", Role.MIXED):
                await worker.kill()
                assert (await asked)[0] == 200
                found = await scrape(up)
                assert found.get("pdserve_worker_events_total", event="joined") == 2
                assert found.get("pdserve_worker_events_total", event="died") == 1
                assert found["pdserve_failovers_total"] == found["pdserve_replays_total"] == 1
                assert found.get("pdserve_workers", role="mixed", state="ready") == 1
                assert found.get("pdserve_workers", role="mixed", state="dead") == 1
                blocks = [
                    found.get("pdserve_kv_blocks", worker="b", role="mixed", state=state)
                    for state in ("free", "cached", "held")
                ]
                assert sum(blocks) == 64

    run(main())


def test_a_scraper_that_knows_it_gets_openmetrics() -> None:
    metrics = Metrics(SloSection(), "m")
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert metrics.render("")[1].startswith("text/plain")


@pytest.mark.parametrize("objective_s", [0.5, 0.03, 0.0075])
def test_the_objective_is_a_bound_of_its_histogram(objective_s: float) -> None:
    bounds = around(objective_s)
    assert objective_s in bounds and list(bounds) == sorted(set(bounds))


def timeline(**changes: Any) -> Timeline:
    marks = {
        "placed": 1.0,
        "started": 1.0,
        "first_token": 2.0,
        "handed_over": 2.5,
        "second_token": 2.5,
    }
    given: dict[str, Any] = {
        "request_id": "r",
        "call_id": "c",
        "chat": True,
        "traceparent": None,
        "outcome": Outcome.DONE,
        "error": None,
        "prefill": "p",
        "decode": "d",
        "num_attempts": 1,
        "num_prompt_tokens": 3,
        "num_cached_tokens": 0,
        "num_output_tokens": 3,
        "arrived": 0.0,
        "tokenized": 0.5,
        **marks,
        "last_token": 3.0,
        "finished": 3.0,
    }
    return Timeline(**given | changes)


def test_a_failed_request_is_never_good_and_is_counted_by_its_error() -> None:
    metrics = Metrics(SloSection(ttft_ms=60_000.0, tpot_ms=60_000.0), "m")
    metrics.ended(timeline(outcome=Outcome.FAILED, error="workers_lost", num_attempts=3))
    found = Scraped(metrics.render("")[0].decode())
    assert found.get("pdserve_slo_total", objective="both", met="no") == 1
    assert found.get("pdserve_slo_total", objective="ttft", met="yes") == 1
    assert found["pdserve_replays_total"] == 2
    labels = {"outcome": "failed", "route": "disaggregated", "error_type": "workers_lost"}
    assert found.get("pdserve_requests_total", **labels) == 1


def test_forecasts_are_compared_with_what_came() -> None:
    metrics = Metrics(SloSection(), "m")
    metrics.ended(timeline(forecast=Forecast(1500.0, 600.0, 10.0)))  # ttft 2 s, tpot 0.5 s
    metrics.ended(timeline(forecast=Forecast(1500.0, 600.0, 10.0), num_attempts=2))
    metrics.ended(timeline())
    found = Scraped(metrics.render("")[0].decode())
    error = "pdserve_forecast_error_seconds"
    assert found.get(f"{error}_sum", objective="ttft", direction="late") == pytest.approx(0.5)
    assert found.get(f"{error}_sum", objective="tpot", direction="early") == pytest.approx(0.1)
    assert found.get("pdserve_forecast_seconds_sum", objective="ttft") == 1.5
    assert found.get(f"{error}_count", objective="ttft", direction="late") == 1


def test_the_dashboard_names_metrics_that_there_are() -> None:
    async def main() -> Scraped:
        async with split() as (up, _, _):
            await up.complete()
            await up.complete(model="another")
            return await scrape(up)

    found = run(main())
    board = json.loads((ROOT / "configs/grafana/pdserve.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in metrics_of(query)}
    assert len(asked) > 20 and asked <= found.names
    (charted,) = {panel["type"] for panel in board["panels"]} - {"row", "stat"}
    assert charted == "timeseries"


def test_the_docs_explain_each_metric_and_no_other() -> None:
    metrics = Metrics(SloSection(), "m")
    metrics.watch(Dispatch(Policy.ADAPTIVE, PoolsSection(), Membership("f"), 1))
    text = (ROOT / "docs/operations.md").read_text()
    table = text.partition("## What each metric means")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`((?:pdserve|gen_ai_server)_\w+)`", table))
    families = text_string_to_metric_families(metrics.render("")[0].decode())
    there = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.startswith(("process_", "python_"))
    }
    assert explained == there


def test_the_stages_in_the_docs_are_those_there_are() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    table = text.partition("## What a request's time goes to")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(Stage)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum(rate(pdserve_slo_total{objective="both", met="yes"}[5m]))', {"pdserve_slo_total"}),
        ("sum by (le, stage) (rate(a_bucket[5m])) / on () group_left () sum(b)", {"a_bucket", "b"}),
        ('histogram_quantile(0.5, c{model=~"$m"})', {"c"}),
    ],
)
def test_the_metrics_of_a_query(query: str, names: set[str]) -> None:
    assert metrics_of(query) == names


def metrics_of(query: str) -> set[str]:
    """The names in a PromQL query that are no function, keyword or label."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on|group_left) \([^)]*\)", "", query)
    return {name for name in re.findall(r"[a-z]\w*(?!\w*\s*\()", bare) if name != "sum"}
