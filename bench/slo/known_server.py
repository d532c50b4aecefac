"""A server of known latencies: what a client should measure is known to it.

Token ``i`` of an answer is sent ``first_s + i * gap_s`` after the request came, on the clock
and not after the token before it. What it has really sent, and when, comes with the last event
(monotonic seconds, which all processes of a host share), so that a client is held against
what happened and not against what was meant to. ``pause`` stalls it: nothing is read, nothing
is sent, as when a real server hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(slots=True)
class KnownServer:
    first_s: float = 0.05
    gap_s: float = 0.02
    refuse_every: int = 0  # every so many requests get 429
    cut_every: int = 0  # every so many streams end in the middle
    num_requests: int = 0
    stalls: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[str]:
        """Its URL."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    def pause(self, seconds: float) -> None:
        """Stalls all of it, now."""
        started = time.monotonic()
        time.sleep(seconds)
        self.stalls.append((started, time.monotonic()))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "known"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        self.num_requests += 1
        number = self.num_requests
        if self.refuse_every and number % self.refuse_every == 0:
            return web.json_response({"error": {"message": "full"}}, status=429)
        with contextlib.suppress(ConnectionError):  # a client that has gone
            return await self._stream(request, arrived, number)
        return web.Response(status=499)

    async def _stream(
        self, request: web.Request, arrived: float, number: int
    ) -> web.StreamResponse:
        body = await request.json()
        tokens = int(body["max_tokens"])
        cut = bool(self.cut_every) and number % self.cut_every == 0
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = []
        for index in range(tokens // 2 if cut else tokens):
            await _until(arrived + self.first_s + index * self.gap_s)
            last = index == tokens - 1
            choice = {"index": 0, "text": " a", "finish_reason": "length" if last else None}
            sent.append(time.monotonic())
            await _write(response, {"choices": [choice]})
        if not cut:
            usage = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": tokens}
            truth = {"arrived": arrived, "sent": sent, "stages": []}
            await _write(response, {"choices": [], "usage": usage, "timelines": [truth]})
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def _write(response: web.StreamResponse, body: dict[str, Any]) -> None:
    event = {"object": "text_completion", **body}
    await response.write(b"data: %b\n\n" % json.dumps(event).encode())


async def _until(due: float) -> None:
    """To the loop's own millisecond: what counts is when it was really sent."""
    await asyncio.sleep(max(0.0, due - time.monotonic()))
