"""What it costs to be watched, and whether what is said is true; with simulated workers.

    python -P -m pdserve.bench.observability --out docs/results/observability.json

It serves a deployment (in a checkout: the one without a model) and loads it with an open loop
of streams. Then

    agreement   TTFT and TPOT as each client takes them, beside those of its own timeline, from
                which the metrics are; and the histograms' sums beside those of the timelines.
                A client's clock has the way there and back in it: so does GET /health, meanwhile
    scrape      processor time of the router for a scrape, by windows under the same load with
                and without scraping, in turns
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_TICKS = os.sysconf("SC_CLK_TCK")
_TTFT = "gen_ai_server_time_to_first_token_seconds_sum"


@dataclass(frozen=True, slots=True)
class Report:
    """Milliseconds. Differences are client less server; a client's clock starts as it connects."""

    step_ms: float  # of the simulated engine
    rate_s: float  # requests a second
    output_tokens: int  # of each
    num_requests: int
    ttft_difference_ms: dict[str, float]  # percentiles of the absolute difference
    tpot_difference_ms: dict[str, float]
    nothing_ms: dict[str, float]  # what GET /health takes then: the way there and back alone
    ttft_median_ms: dict[str, float]  # client and server
    histogram_sum_error_s: float  # TTFT: the histograms' sum less the timelines'
    scrapes_s: float
    scrape_bytes: int
    scrape_cpu_ms: float  # of the router, for one scrape under load
    scrape_percent_of_core: float  # at one scrape a second
    router_load_percent: float  # of a core, without scrapes


@dataclass(slots=True)
class Load:
    """An open loop against one server; what each request took, twice."""

    url: str
    model: str
    rate_s: float
    output_tokens: int
    session: aiohttp.ClientSession
    ttft_ms: list[tuple[float, float]] = field(default_factory=list)  # client, server
    tpot_ms: list[tuple[float, float]] = field(default_factory=list)

    async def offer(self, num_requests: int) -> None:
        """Returns when all have ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num_requests):
                group.create_task(self._request())
                await asyncio.sleep(random.expovariate(self.rate_s))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.offer(1 << 30))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _request(self) -> None:
        body = {
            "model": self.model,
            "prompt": [random.randrange(1, 250) for _ in range(random.randrange(16, 128))],
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 0,  # so that a token shows even where it is half a character
        }
        begun = time.monotonic()
        first = last = 0.0
        async with self.session.post(
            f"{self.url}/v1/completions", json=body, headers={"X-Pdserve-Timeline": "1"}
        ) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "timelines" in event:
                    (timeline,) = event["timelines"]
                elif event["choices"]:
                    last = time.monotonic()
                    first = first or last
        gaps = self.output_tokens - 1
        self.ttft_ms.append((1e3 * (first - begun), timeline["ttft_ms"]))
        self.tpot_ms.append((1e3 * (last - first) / gaps, timeline["tpot_ms"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m pdserve.bench.observability")
    parser.add_argument("--config", type=Path, default=Path("configs/simulated.yaml"))
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the simulated engine")
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--window", type=float, default=5.0, help="seconds")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--scrapes", type=float, default=20.0, help="a second, where it scrapes")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    text = json.dumps(asdict(asyncio.run(_measure(given))), indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return 0


async def _measure(given: argparse.Namespace) -> Report:
    random.seed(6)
    async with (
        served(given.config, f"simulation.step_ms={given.step_ms}") as url,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        load = Load(url, model, given.rate, given.output, session)
        await load.offer(int(2 * given.rate))  # to warm up
        load.ttft_ms.clear()
        load.tpot_ms.clear()
        before = await _scrape(session, url)
        async with _asking_for_nothing(session, url) as nothing_ms:
            await load.offer(int(4 * given.window * given.rate))
        after = await _scrape(session, url)
        agreed = list(load.ttft_ms), list(load.tpot_ms)
        pid = int(after["pid"])
        costs, loads = [], []
        async with load.running():
            for _ in range(given.turns):
                quiet = await _cpu_of(pid, asyncio.sleep(given.window))
                scraping = _scrape_for(session, url, given.window, given.scrapes)
                watched = await _cpu_of(pid, scraping)
                costs.append((watched - quiet) / (given.window * given.scrapes))
                loads.append(quiet / given.window)
    ttft, tpot = agreed
    summed = sum(server for _, server in ttft) / 1e3
    cost = statistics.median(costs)
    return Report(
        given.step_ms,
        given.rate,
        given.output,
        len(ttft),
        _percentiles([abs(client - server) for client, server in ttft]),
        _percentiles([abs(client - server) for client, server in tpot]),
        _percentiles(nothing_ms),
        {
            "client": round(statistics.median(client for client, _ in ttft), 3),
            "server": round(statistics.median(server for _, server in ttft), 3),
        },
        round(after[_TTFT] - before[_TTFT] - summed, 6),
        given.scrapes,
        int(after["bytes"]),
        round(1e3 * cost, 3),
        round(100 * cost, 3),
        round(100 * statistics.median(loads), 1),
    )


async def _scrape(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    found: dict[str, float] = {"bytes": len(text)}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    async with session.get(f"{url}/live") as response:
        found["pid"] = (await response.json())["pid"]
    return found


@asynccontextmanager
async def _asking_for_nothing(
    session: aiohttp.ClientSession, url: str
) -> AsyncIterator[list[float]]:
    took_ms: list[float] = []

    async def ask() -> None:
        while True:
            begun = time.monotonic()
            async with session.get(f"{url}/health") as response:
                await response.read()
            took_ms.append(1e3 * (time.monotonic() - begun))
            await asyncio.sleep(0.05)

    task = asyncio.create_task(ask())
    try:
        yield took_ms
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _scrape_for(
    session: aiohttp.ClientSession, url: str, seconds: float, rate_s: float
) -> None:
    end = time.monotonic() + seconds
    for index in range(int(seconds * rate_s)):
        async with session.get(f"{url}/metrics") as response:
            await response.read()
        due = end - seconds + (index + 1) / rate_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _cpu_of(pid: int, work: Any) -> float:
    """Seconds of processor that a process takes while ``work`` is awaited."""
    before = _cpu(pid)
    await work
    return _cpu(pid) - before


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{percent}": round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)
        for percent in (50, 90, 99)
    }


@asynccontextmanager
async def served(config: Path, *settings: str) -> AsyncIterator[str]:
    """The URL of a deployment that serves until the block ends."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "pdserve.cli", "serve", str(config), "--port", "0"),
        *chosen,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"ready: (http://\S+)", line)
        assert found is not None, line
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


if __name__ == "__main__":
    sys.exit(main())
