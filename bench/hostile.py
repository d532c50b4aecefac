"""Whether clients that only cost something are felt by those who are served.

    python -P -m pdserve.bench.hostile --out docs/results/hostile.json

A deployment without a model serves streams, in rounds that take turns: the good ones alone, and
beside a process that holds idle connections and drips the heads of requests a byte at a time
(slow loris), on new connections as fast as the old ones are cut. What is compared is each
stream's time per output token, as its client takes it; two neighbouring rounds make a ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from .observability import served

HEADER_TIMEOUT_S = 1  # so that connections are cut, and come again, within a round
_DRIP_S = 0.5
_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "


@dataclass(frozen=True, slots=True)
class Report:
    step_ms: float  # of the simulated engine
    streams: int
    output_tokens: int  # of each stream
    idle: int  # connections
    slow: int  # connections that drip
    cut: int  # of those that drip, by the server
    quiet_tpot_ms: list[float]  # the median of a round
    hostile_tpot_ms: list[float]
    ratios: list[float]  # hostile to quiet, of neighbouring rounds
    ratio: float  # their median
    p99_ratio: float  # the same of the rounds' 99th percentiles
    failed: int  # good streams that were not whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m pdserve.bench.hostile")
    parser.add_argument("--config", type=Path, default=Path("configs/simulated.yaml"))
    parser.add_argument("--step-ms", type=float, default=40.0, help="of the simulated engine")
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--idle", type=int, default=500, help="connections")
    parser.add_argument("--slow", type=int, default=100, help="connections that drip")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--attack", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.attack is not None:
        asyncio.run(_attack(given.attack, given.idle, given.slow))
        return 0
    text = json.dumps(asdict(asyncio.run(_measure(given))), indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return 0


async def _measure(given: argparse.Namespace) -> Report:
    quiet: list[list[float]] = []
    hostile: list[list[float]] = []
    cut = failed = 0
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        served(
            given.config,
            f"simulation.step_ms={given.step_ms}",
            f"router.header_timeout_s={HEADER_TIMEOUT_S}",
        ) as url,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def round_of_streams() -> list[float]:
            asked = [_stream(session, url, model, given.output) for _ in range(given.streams)]
            return await asyncio.gather(*asked)

        await round_of_streams()  # to warm up
        for turn in range(given.turns):
            for attacked in (False, True) if turn % 2 else (True, False):
                if not attacked:
                    found = await round_of_streams()
                else:
                    async with _attackers(url, given.idle, given.slow) as counts:
                        found = await round_of_streams()
                    cut += counts[0]
                whole = [tpot_ms for tpot_ms in found if tpot_ms > 0]
                failed += len(found) - len(whole)
                (hostile if attacked else quiet).append(whole)
    pairs = list(zip(hostile, quiet, strict=True))
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    tails = [_p99(one) / _p99(other) for one, other in pairs]
    return Report(
        given.step_ms,
        given.streams,
        given.output,
        given.idle,
        given.slow,
        cut,
        [round(statistics.median(one), 3) for one in quiet],
        [round(statistics.median(one), 3) for one in hostile],
        [round(ratio, 4) for ratio in ratios],
        round(statistics.median(ratios), 4),
        round(statistics.median(tails), 4),
        failed,
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


async def _stream(session: aiohttp.ClientSession, url: str, model: str, output: int) -> float:
    """Its TPOT in ms; 0 where it was not whole."""
    body = {
        "model": model,
        "prompt": "hello there",
        "max_tokens": output,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 0,  # so that a token shows even where it is half a character
    }
    first = last = 0.0
    whole = False
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return 0.0
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = time.monotonic()
                first = first or last
            whole = whole or line.startswith(b"data: [DONE]")
    return 1e3 * (last - first) / (output - 1) if whole else 0.0


@contextlib.asynccontextmanager
async def _attackers(url: str, idle: int, slow: int) -> AsyncIterator[list[int]]:
    """A process of their own, once all its connections are up; how many were cut, at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "pdserve.bench.hostile", "--attack", url),
        *("--idle", str(idle), "--slow", str(slow)),
        stdout=asyncio.subprocess.PIPE,
    )
    counts: list[int] = []
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"up\n"
        yield counts
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = await process.communicate()
        counts.append(int(rest or b"0"))


async def _attack(url: str, idle: int, slow: int) -> None:
    at = urlsplit(url)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    cut = 0
    dripping = asyncio.Semaphore(0)

    async def drip() -> None:
        nonlocal cut
        while True:
            _, writer = await asyncio.open_connection(at.hostname, at.port)
            writer.write(_HEAD)
            dripping.release()
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(_DRIP_S)
            cut += 1

    held = [await asyncio.open_connection(at.hostname, at.port) for _ in range(idle)]
    tasks = [asyncio.create_task(drip()) for _ in range(slow)]
    for _ in range(slow):
        await dripping.acquire()
    print("up", flush=True)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for _, writer in held:
        writer.close()
    print(cut, flush=True)


if __name__ == "__main__":
    sys.exit(main())
