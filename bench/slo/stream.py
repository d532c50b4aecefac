"""One request over HTTP, and what its stream of events says. A body is parsed as it comes.

A token is counted where its text shows. How many an event brings is what the server says
(``usage`` or ``logprobs`` in the event), else one.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from .prompts import length_of
from .records import Cause, Record
from .workloads import Ask

_MAX_DETAIL = 200  # characters of a server's words
_REFUSALS = frozenset((429, 503))


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI's API; ``url`` ends without a slash, and without ``/v1``."""

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 120.0
    temperature: float = 0.0
    ignore_eos: bool = True  # not OpenAI's, but of most servers
    slo: tuple[float, float] | None = None  # TTFT and TPOT (ms) that our server is told of

    def body(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """The path and the JSON of a request."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.num_output,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.slo is not None:
            body["slo"] = {"ttft_ms": self.slo[0], "tpot_ms": self.slo[1]}
        prompt = ask.prompt
        if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], dict):
            return "/v1/chat/completions", body | {"messages": list(prompt)}
        return "/v1/completions", body | {"prompt": prompt}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "X-Pdserve-Timeline": "1"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(slots=True)
class Reading:
    """A stream as far as it has been read. Times are the caller's."""

    events: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # where logprobs were asked for
    num_input: int | None = None
    num_output: int | None = None
    finish: str | None = None
    ended: bool = False  # [DONE] has come
    error: str | None = None
    server: dict[str, Any] | None = None
    _rest: bytes = b""
    _seen: int = 0  # tokens, by the events' own usage

    def feed(self, data: bytes, now: float) -> None:
        """Bytes that came at ``now``."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        tokens = 0
        for line in lines:
            if line.startswith(b"data:"):
                tokens += self._take(line[5:].strip())
        if tokens:
            self.events.append((now, tokens))

    def _take(self, data: bytes) -> int:
        """Tokens that one event brings."""
        if data == b"[DONE]":
            self.ended = True
            return 0
        try:
            body = json.loads(data)
        except ValueError:
            self.error = f"an event that is no JSON: {data[:80]!r}"
            return 0
        if not isinstance(body, dict):
            return 0
        if "error" in body:
            self.error = _words(body)
            return 0
        for timeline in body.get("timelines") or ():
            self.server = timeline
        choices = body.get("choices") or ()
        usage = body.get("usage")
        counted = None
        if usage:
            self.num_input = usage.get("prompt_tokens")
            self.num_output = usage.get("completion_tokens")
            if choices and self.num_output is not None:
                counted, self._seen = self.num_output - self._seen, self.num_output
        return self._count(choices[0], counted) if choices else 0

    def _count(self, choice: dict[str, Any], counted: int | None) -> int:
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
        logprobs = choice.get("logprobs") or {}
        tokens = logprobs.get("tokens") or [one["token"] for one in logprobs.get("content") or ()]
        self.tokens += tokens
        if counted is not None:
            return counted
        return len(tokens) or (1 if text else 0)


async def send(
    session: aiohttp.ClientSession,
    target: Target,
    ask: Ask,
    *,
    index: int,
    due: float,
    start: float,
    turn: int = 0,
    reading: Reading | None = None,
) -> Record:
    """Sends it now and reads it to its end. Never raises but for a cancellation."""
    path, body = target.body(ask)
    data = json.dumps(body, separators=(",", ":")).encode()
    reading = reading if reading is not None else Reading()
    failure: Cause | None = None
    detail = ""
    sent = time.monotonic() - start
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            session.post(target.url + path, data=data, headers=target.headers) as response,
        ):
            if response.status == 200:
                async for chunk in response.content.iter_any():
                    reading.feed(chunk, time.monotonic() - start)
                failure, detail = _verdict(reading)
            else:
                refused = response.status in _REFUSALS
                failure = Cause.REFUSED if refused else Cause.HTTP
                detail = f"{response.status} {_words_of(await response.text())}"
    except TimeoutError:
        failure, detail = Cause.TIMEOUT, f"not within {target.timeout_s:g} s"
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError) as error:
        failure = Cause.CUT if reading.events else Cause.CONNECTION
        detail = str(error)
    except aiohttp.ClientError as error:
        failure, detail = Cause.CONNECTION, str(error)
    return record(
        reading,
        ask,
        index=index,
        due=due,
        sent=sent,
        ended=time.monotonic() - start,
        failure=failure,
        detail=detail,
        turn=turn,
    )


def record(
    reading: Reading,
    ask: Ask,
    *,
    index: int,
    due: float,
    sent: float | None,
    ended: float,
    failure: Cause | None,
    detail: str,
    turn: int,
) -> Record:
    counted = sum(tokens for _, tokens in reading.events)
    return Record(
        index=index,
        due=due,
        sent=sent,
        events=tuple(reading.events),
        ended=ended,
        num_input=reading.num_input or length_of(ask.prompt),
        num_output=counted if reading.num_output is None else reading.num_output,
        failure=failure,
        detail=detail[:_MAX_DETAIL],
        turn=turn,
        server=reading.server,
    )


def _verdict(reading: Reading) -> tuple[Cause | None, str]:
    if reading.error is not None:
        return Cause.ERROR, reading.error
    if not reading.events:
        return Cause.EMPTY, "an end without a token"
    if reading.finish is None:
        return Cause.CUT, "the stream ended before the answer did"
    return None, ""


def _words(body: dict[str, Any]) -> str:
    error = body["error"]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _words_of(text: str) -> str:
    try:
        return _words(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return text.strip()
