"""One answer over HTTP: in one body, or as server-sent events while it is generated.

Nothing is sent before the first token: what goes wrong until then is a plain HTTP error.
After it, an error is an event of its own, and the stream ends without ``[DONE]``. A client
that hangs up, or reads too slowly for too long, cancels what is generated for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from ..core.errors import RequestError
from ..core.messages import FinishReason, TokenItem
from .api.bodies import Bodies, Choice, Json, Usage
from .api.calls import Call
from .callers import Caller
from .errors import envelope, internal_error
from .generation import Generation, Piece

log = logging.getLogger(__name__)

TIMELINE_HEADER = "X-Pdserve-Timeline"  # with 1, an answer ends with its timelines
_PIECE = 64 << 10  # bytes of a body that a client must read within the write timeout

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy in front is to pass on what comes
}


_FLOWING = 16 << 10  # bytes that a client has not taken yet: with fewer it keeps up
_MARK = "\0text\0"  # for a text that is filled in later


class ClientGone(Exception):
    """The client has hung up, or stopped reading."""


@dataclass(slots=True)
class Trace:
    """What the log says of one call, when it is over. No text of it."""

    call_id: str
    caller: Caller | None = None  # None where no key is asked for
    started: float = field(default_factory=time.monotonic)
    placed: float | None = None  # the workers have been told
    first: float | None = None
    received: float | None = None  # the first token, from a worker
    written: float | None = None  # its event, where the answer is a stream
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ignored: tuple[str, ...] = ()
    outcome: str = ""
    refusal: str | None = None  # the code of an error before anything was generated

    def take(self, piece: Piece) -> None:
        self.first = self.first or time.monotonic()
        self.num_output_tokens += len(piece.items)

    @property
    def inward(self) -> float | None:
        """Seconds that the router took until workers had the request."""
        return self.placed - self.started if self.placed is not None else None

    @property
    def outward(self) -> float | None:
        """Seconds that the router took from the word of the first token to its event."""
        if self.received is None or self.written is None:
            return None
        return self.written - self.received


class Answer:
    def __init__(
        self,
        request: web.Request,
        call: Call,
        bodies: Bodies,
        generations: Sequence[Generation],
        trace: Trace,
        write_timeout_s: float,
    ) -> None:
        self._request = request
        self._call = call
        self._bodies = bodies
        self._generations = generations
        self._trace = trace
        self._write_timeout_s = write_timeout_s
        self._finishes: set[FinishReason] = set()

    async def respond(self) -> web.StreamResponse:
        """Raises RequestError while nothing has been sent, ClientGone where nobody listens."""
        respond = self._streamed if self._call.fields.stream else self._whole
        response = await respond()
        if self._finishes:
            self._trace.outcome = "+".join(sorted(self._finishes))
        return response

    async def _whole(self) -> web.StreamResponse:
        choices = [Choice(generation.index) for generation in self._generations]
        await _all([self._collect(*pair) for pair in zip(self._generations, choices, strict=True)])
        body = self._bodies.whole(choices, self._usage())
        if self._wants_timelines:
            body["timelines"] = self._timelines()
        data = _dumps(body).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        response.content_length = len(data)
        patience = partial(_patience, self._request, self._write_timeout_s)
        async with patience():
            await response.prepare(self._request)
        for start in range(0, len(data), _PIECE):
            async with patience():
                await response.write(data[start : start + _PIECE])
        async with patience():
            await response.write_eof()
        return response

    async def _collect(self, generation: Generation, choice: Choice) -> None:
        items: list[TokenItem] = []
        texts = []
        while choice.finish is None:
            piece = await self._next(generation)
            texts.append(piece.text)
            items += piece.items
            choice.finish = piece.finish
        choice.text = "".join(texts)
        if self._call.num_logprobs is not None:
            choice.logprobs, _ = self._bodies.logprobs(items, 0)

    async def _streamed(self) -> web.StreamResponse:
        events = _Events(self._request, self._write_timeout_s)
        try:
            await _all([self._pass_on(generation, events) for generation in self._generations])
            if self._call.include_usage:
                await events.send(self._bodies.usage_chunk(self._usage()))
            if self._wants_timelines:
                await events.send(self._bodies.timeline_chunk(self._timelines()))
            await events.finish()
        except RequestError as error:
            await self._break_off(events, error)
        except ClientGone:
            raise
        except Exception:
            log.exception("a bug of ours")
            await self._break_off(events, internal_error())
        return events.response

    async def _break_off(self, events: _Events, error: RequestError) -> None:
        """Raises the error where nothing has been sent, and sends it as the last event else."""
        if not events.begun:
            raise error
        self._finishes.clear()
        self._trace.outcome = error.code or "failed"
        await events.send(envelope(error))
        await events.end()

    async def _pass_on(self, generation: Generation, events: _Events) -> None:
        offset = 0
        first = True
        finish = None
        around = self._around(generation.index) if self._call.num_logprobs is None else None
        while finish is None:
            piece = await self._next(generation)
            finish = piece.finish
            if around is not None and not first and finish is None:  # as most of them are
                if piece.text:
                    await events.write(around[0] + _dumps(piece.text).encode() + around[1])
                continue
            choice = Choice(generation.index, piece.text, finish)
            if self._call.num_logprobs is not None:
                choice.logprobs, offset = self._bodies.logprobs(piece.items, offset)
            await events.send(*self._bodies.chunks(choice, first=first))
            if first and self._trace.written is None:
                self._trace.received = generation.received
                self._trace.written = time.monotonic()
            first = False

    def _around(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in an event that carries nothing else."""
        (body,) = self._bodies.chunks(Choice(index, _MARK), first=False)
        before, _, after = _dumps(body).partition(_dumps(_MARK))
        return f"data: {before}".encode(), f"{after}\n\n".encode()

    async def _next(self, generation: Generation) -> Piece:
        piece = await generation.next()
        self._trace.take(piece)
        if piece.finish is not None:
            self._finishes.add(piece.finish)
        return piece

    @property
    def _wants_timelines(self) -> bool:
        return self._request.headers.get(TIMELINE_HEADER) == "1"

    def _timelines(self) -> list[Json]:
        """Of each choice, in their order; all are over."""
        found = [generation.timeline for generation in self._generations]
        return [timeline.shown() for timeline in found if timeline is not None]

    def _usage(self) -> Usage:
        """A prompt counts once, however many choices were made from it."""
        of_prompts = self._generations[:: self._call.fields.n]
        return Usage(
            num_prompt_tokens=sum(one.num_prompt_tokens for one in of_prompts),
            num_output_tokens=sum(one.num_output_tokens for one in self._generations),
            num_cached_tokens=sum(one.num_cached_tokens for one in of_prompts),
        )


class _Events:
    """A stream of events. It begins with the first one that is sent."""

    def __init__(self, request: web.Request, write_timeout_s: float) -> None:
        self.response = web.StreamResponse(headers=_STREAM_HEADERS)
        self._request = request
        self._write_timeout_s = write_timeout_s
        self._lock = asyncio.Lock()  # choices share the stream

    @property
    def begun(self) -> bool:
        return self.response.prepared

    async def send(self, *bodies: Json) -> None:
        if bodies:
            await self.write(b"".join(b"data: %b\n\n" % _dumps(body).encode() for body in bodies))

    async def finish(self) -> None:
        await self.write(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        async with _patience(self._request, self._write_timeout_s):
            await self.response.write_eof()

    async def write(self, data: bytes) -> None:
        """Whole events."""
        transport = self._request.transport
        if (
            self.begun
            and transport is not None
            and not self._lock.locked()
            and transport.get_write_buffer_size() + len(data) < _FLOWING  # then it can't wait
        ):
            try:
                await self.response.write(data)
            except ConnectionError:
                raise ClientGone("it has hung up") from None
            return
        async with self._lock, _patience(self._request, self._write_timeout_s):
            if not self.begun:
                await self.response.prepare(self._request)
            await self.response.write(data)


@contextlib.asynccontextmanager
async def _patience(request: web.Request, limit_s: float) -> AsyncIterator[None]:
    """Waits for the client to read, but not for ever."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ClientGone("it does not read") from None
    except ConnectionError:
        raise ClientGone("it has hung up") from None


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all to their end; what one of them raises ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
