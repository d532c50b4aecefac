"""Spans as a collector gets them, and what the log says of a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from router_net import MODEL, run, split

import pdserve
from pdserve.core.errors import ConfigError
from pdserve.router.timeline import Stage
from pdserve.router.tracing import Spans

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@dataclass
class Collector:
    """What an OTLP collector was sent."""

    spans: list[Any] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        sent = trace_service.ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response()


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, Collector]]:
    found = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", found.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}/v1/traces", found
    await runner.cleanup()


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        found[one.key] = getattr(one.value, kind)
    return found


def test_a_span_for_a_request_and_one_for_each_of_its_stages() -> None:
    parent = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{parent}-b7ad6b7169203331-01"}

    async def main() -> list[Any]:
        async with collector() as (url, found):
            async with split(observability={"otlp_endpoint": url}) as (up, _, _):
                body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
                async with up.client.post("/v1/completions", json=body, headers=headers) as got:
                    assert got.status == 200
                await up.complete(max_tokens=2)
            return found.spans

    spans = run(main())
    theirs = [span for span in spans if span.trace_id.hex() == parent]
    (whole,) = [span for span in theirs if span.name == f"text_completion {MODEL}"]
    stages = [span for span in theirs if span is not whole]
    assert len(spans) == 2 * len(theirs) and len(theirs) == 1 + len(Stage)
    assert whole.parent_span_id.hex() == "b7ad6b7169203331"
    assert [span.name for span in stages] == list(Stage)
    assert all(span.parent_span_id == whole.span_id for span in stages)
    ends = [span.start_time_unix_nano for span in stages[1:]]
    assert [span.end_time_unix_nano for span in stages[:-1]] == ends
    assert stages[0].start_time_unix_nano == whole.start_time_unix_nano
    about = attributes(whole)
    assert about["gen_ai.request.model"] == MODEL
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (5, 4)
    assert (about["pdserve.route"], about["pdserve.prefill_worker"]) == (
        "disaggregated",
        "prefill-0",
    )


def test_off_it_is_not_even_imported() -> None:
    code = "import sys, pdserve.router.process; print('opentelemetry' in sys.modules)"
    path = str(Path(pdserve.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_no_collector_is_no_harm() -> None:
    async def main() -> None:
        sections = {"observability": {"otlp_endpoint": "http://127.0.0.1:9/v1/traces"}}
        async with split(**sections) as (up, _, _):
            for _ in range(3):
                assert (await up.complete())[0] == 200

    run(main(), limit_s=20)


def test_without_the_packages_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[otel\]'"):
        Spans("http://127.0.0.1:9", "m", lambda: 0.0)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_prompt_is_in_the_log_only_where_it_is_asked_for(
    log_prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    user = [{"role": "user", "content": "my secret"}]

    async def main() -> str:
        async with split(observability={"log_prompts": log_prompts}) as (up, _, _):
            await up.complete("my secret")
            await up.post("/v1/chat/completions", {"model": MODEL, "messages": user})
            await up.complete("my secret", max_tokens=10_000)
            asked = asyncio.create_task(up.complete("my secret"))
            await asyncio.sleep(0)
            asked.cancel()
            return (await up.client.get("/health")).headers["X-Request-Id"]

    run(main())
    said = "\n".join(
        f"{record.getMessage()} {getattr(record, 'fields', '')}" for record in caplog.records
    )
    assert ("my secret" in said) is log_prompts


def test_the_line_of_a_call_has_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> str:
        async with split() as (up, _, _):
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
            async with up.client.post("/v1/completions", json=body) as got:
                await got.read()
                return got.headers["X-Request-Id"]

    call_id = run(main())
    (record,) = [one for one in caplog.records if getattr(one, "fields", {}).get("path")]
    assert record.getMessage().startswith(call_id)
    found = record.fields  # type: ignore[attr-defined]
    assert (found["request_id"], found["status"], found["output_tokens"]) == (call_id, "200", 4)
    assert found["first_s"] <= found["total_s"]
