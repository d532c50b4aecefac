"""The processes of ``pdserve bench router`` beside the router: workers, a server to compare with,
clients. Each runs by itself (``python -m pdserve.bench.router_load PART ...``) and talks over
its standard streams, so that the CPU time of each is its own.

workers   speak the control protocol and write tokens at a steady pace; no engine, no KV
bare      an aiohttp server that writes the same events at the same pace, and does nothing else;
          on several ports it is the workers of a router that speaks HTTP to them
clients   open streams, count events, note how long the first ones took
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
import zmq
import zmq.asyncio
from aiohttp import web

from ..core.cost import DecodeCost, PrefillCost, StepCost
from ..core.ids import Role, new_epoch
from ..core.messages import (
    PROTOCOL_VERSION,
    TO_ROUTER,
    TO_WORKER,
    Abort,
    BlockCounts,
    FinishReason,
    Hello,
    Key,
    PeerAddress,
    Place,
    Started,
    TokenBatch,
    TokenItem,
    Welcome,
    WorkerBeat,
)

COST = StepCost(PrefillCost(5.0, 0.02, 1e-7), DecodeCost(5.0, 0.02, 1e-5))
_BLOCKS = BlockCounts(1 << 20, 1 << 20, 0, 0)
_BEAT_S = 0.5
_FIRST_TOKEN, _NUM_TOKENS = 300, 40_000  # ids that are drawn: words, not control tokens


def hello(name: str, fingerprint: str, max_batch: int = 128) -> Hello:
    address = PeerAddress(name, new_epoch(), "tcp://127.0.0.1:1", "t")
    return Hello(
        version=PROTOCOL_VERSION,
        role=Role.MIXED,
        pid=os.getpid(),
        address=address,
        fingerprint=f"{fingerprint}/none/16",
        blocks=_BLOCKS,
        block_size=16,
        max_context=1 << 14,
        max_batch=max_batch,
        chunk_tokens=2048,
        cost=COST,
    )


@dataclass
class _Worker:
    """One simulated worker: every ``interval_s`` a token for each of its requests."""

    name: str
    hello: Hello
    socket: Any
    interval_s: float
    running: dict[Key, tuple[int, int]] = field(default_factory=dict)  # next index, max_tokens

    async def listen(self) -> None:
        await self._say(self.hello)
        while True:
            message = TO_WORKER.decode(await self.socket.recv())
            match message:
                case Place(key=key, params=params):
                    await self._say(Started(key, 0))
                    await self._say(TokenBatch((self._item(key, 0, params.max_tokens),)))
                    if params.max_tokens > 1:
                        self.running[key] = (1, params.max_tokens)
                case Abort(key=key):
                    self.running.pop(key, None)
                case Welcome():
                    pass

    async def write(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        due = time.monotonic()
        while True:
            due += self.interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            items = []
            for key, (index, most) in list(self.running.items()):
                items.append(self._item(key, index, most))
                if index + 1 >= most:
                    del self.running[key]
                else:
                    self.running[key] = (index + 1, most)
            if items:
                await self._say(TokenBatch(tuple(items)))

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            await self._say(WorkerBeat(_BLOCKS, 0, len(self.running), tuple(self.running)))

    def _item(self, key: Key, index: int, most: int) -> TokenItem:
        token = _FIRST_TOKEN + (int(key.request_id[:6], 16) + 7919 * index) % _NUM_TOKENS
        return TokenItem(key, index, token, FinishReason.LENGTH if index + 1 >= most else None)

    async def _say(self, message: Any) -> None:
        await self.socket.send(TO_ROUTER.encode(message))


async def workers(endpoint: str, fingerprint: str, count: int, interval_s: float) -> None:
    context = zmq.asyncio.Context()
    made = []
    for index in range(count):
        name = f"sim-{index}"
        who = hello(name, fingerprint)
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, str(who.address.ref).encode())
        socket.linger = 0
        socket.connect(endpoint)
        made.append(_Worker(name, who, socket, interval_s))
    async with asyncio.TaskGroup() as group:
        for index, worker in enumerate(made):
            group.create_task(worker.listen())
            group.create_task(worker.beat())
            group.create_task(worker.write(interval_s * index / count))


async def bare(event: bytes, interval_s: float, count: int = 1) -> None:
    """On so many ports, which it prints in a line."""

    async def stream(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event)
        due = time.monotonic() + interval_s * (hash(request.transport) % 997) / 997
        for _ in range(body["max_tokens"] - 1):
            due += interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await response.write(event)
        await response.write_eof()
        return response

    async def healthy(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "bench", "object": "model"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/completions", stream), web.get("/{path:.*}", healthy)])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    for _ in range(count):
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(*(port for _, port in runner.addresses), flush=True)
    await asyncio.Event().wait()


@dataclass
class _Count:
    """What the clients have seen."""

    events: int = 0
    firsts: list[float] = field(default_factory=list)
    faults: int = 0
    sample: bytes = b""


class _Client(asyncio.Protocol):
    """One stream: a request as bytes, then events, counted as they come."""

    def __init__(self, request: bytes, count: _Count) -> None:
        self._request = request
        self._count = count
        self._sent = 0.0
        self._answered = self._begun = False

    def connection_made(self, transport: Any) -> None:
        self._sent = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._answered:
            self._answered = True
            self._count.faults += not data.startswith(b"HTTP/1.1 200")
        found = data.count(b"data: ")
        if not self._begun and found:
            self._begun = True
            self._count.firsts.append(time.monotonic() - self._sent)
        elif found == 1 and not self._count.sample:
            start = data.index(b"data: ")
            self._count.sample = data[start : data.index(b"\n\n", start) + 2]
        self._count.events += found

    def connection_lost(self, error: Exception | None) -> None:
        self._count.faults += not self._begun


async def clients(
    port: int, pid: int, num_streams: int, window_s: float, rate: float, max_tokens: int, words: int
) -> None:
    """Opens so many streams, ``rate`` a second, and measures for ``window_s`` when all have begun.
    Prints a JSON object."""
    count = _Count()
    loop = asyncio.get_running_loop()
    before = memory_bytes(pid)
    start = time.monotonic()
    transports = []
    for index in range(num_streams):
        prompt = " ".join(f"word{(index * 31 + at) % 997}" for at in range(words))
        body = json.dumps(
            {
                "model": "bench",
                "prompt": prompt,
                "max_tokens": max_tokens,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/json\r\n\r\n"
        )
        request = head.encode() + body
        await asyncio.sleep(max(0.0, start + index / rate - time.monotonic()))
        transport, _ = await loop.create_connection(
            lambda request=request: _Client(request, count),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        transports.append(transport)
    async with asyncio.timeout(120):
        while len(count.firsts) + count.faults < num_streams:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    held = memory_bytes(pid)
    await asyncio.sleep(1.0)
    cpu, events, begun = cpu_seconds(pid), count.events, time.monotonic()
    await asyncio.sleep(window_s)
    cpu, events = cpu_seconds(pid) - cpu, count.events - events
    firsts = sorted(count.firsts)
    print(
        json.dumps(
            {
                "streams": num_streams,
                "faults": count.faults,
                "window_s": time.monotonic() - begun,
                "events": events,
                "cpu_s": cpu,
                "ttft_ms": {
                    f"p{at}": 1e3 * firsts[min(len(firsts) - 1, len(firsts) * at // 100)]
                    for at in (50, 90, 99)
                },
                "bytes_a_stream": (held - before) / num_streams,
                "sample": count.sample.decode(),
            }
        ),
        flush=True,
    )
    for transport in transports:
        transport.abort()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> int:
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    part, arguments = argv[0], json.loads(argv[1])
    if part == "bare":
        uvloop.run(bare(**arguments | {"event": arguments["event"].encode()}))
    else:
        assert part in ("workers", "clients")
        uvloop.run(workers(**arguments) if part == "workers" else clients(**arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
