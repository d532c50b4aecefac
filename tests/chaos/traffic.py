"""Mixed traffic of whole calls, and the judge of what came of each.

A case is one body with the answer that an undisturbed server gave to it. Whatever happens to
the server, a call must end in bounded time in one of three ways: the right text; an honest
error, after no more than a beginning of the right text; or the client's own hanging up, after
such a beginning too. Anything else is wrong, or hangs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

HANG_S = 240.0  # a call that takes longer is one that hangs; a busy machine is slow


class Outcome(StrEnum):
    RIGHT = "right"
    HUNG_UP = "hung up"  # by the client, as it meant to
    REFUSED = "refused"  # as its body deserves
    ERROR = "error"  # an honest one
    CUT = "cut"  # the connection ended, as it does where the router was killed
    WRONG = "wrong"
    HUNG = "hung"


@dataclass(slots=True)
class Case:
    """``expected`` is None where the body is to be refused with ``status``."""

    kind: str
    body: dict[str, Any]
    status: int = 200
    expected: str | None = None
    hang_up_after: int | None = None  # events

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(slots=True)
class Told:
    """What a call came to. ``gap_s``: the longest wait between two events of a stream."""

    outcome: Outcome
    text: str = ""
    why: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    gap_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """All calls so far, and each that should not be."""

    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    # of whole streams: when each ended, seconds to its first token, seconds in all
    streams: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, case: Case, told: Told) -> None:
        self.counts[told.outcome] += 1
        self.kinds[case.kind] += 1
        if told.outcome in (Outcome.ERROR, Outcome.CUT):
            self.errors[told.why] += 1
        if told.outcome in (Outcome.WRONG, Outcome.HUNG) and len(self.faults) < 50:
            self.faults.append(f"{case.kind}: {told.why}: {told.text!r} not {case.expected!r}")
        if told.outcome is Outcome.RIGHT and case.stream:
            self.gaps.append(told.gap_s)
            self.streams.append((time.monotonic(), told.first_s, told.total_s))

    @property
    def calls(self) -> int:
        return self.counts.total()


_WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "and",
    "wide",
    "over",
    "hills",
    "where",
    "cold",
    "rivers",
    "run",
    "to",
    "a",
    "far",
    "grey",
    "sea",
]


def cases(seed: int, max_context: int, *, each: int = 6) -> list[Case]:
    """Short and long prompts, streamed and whole, drawn and greedy, with stop strings, hang-ups,
    and what must be refused; the same for the same seed."""
    rng = random.Random(seed)

    def body(num_chars: int, max_tokens: int, **more: object) -> dict[str, Any]:
        text = " ".join(rng.choice(_WORDS) for _ in range(num_chars))[:num_chars]
        return {"model": "tiny", "prompt": text, "max_tokens": max_tokens, **more}

    greedy = {"temperature": 0}
    made: list[Case] = []
    for index in range(each):
        drawn = {"temperature": 1, "seed": rng.randrange(1 << 30)}
        split = {"route": "disaggregated"}
        made += [
            Case("short", body(rng.randint(1, 60), 24, **greedy)),
            Case("short", body(rng.randint(1, 60), 60, stream=True, **greedy, **split)),
            Case("long", body(rng.randint(300, 700), 32, stream=True, **greedy, **split)),
            Case("long", body(rng.randint(300, 700), 16, **greedy)),
            Case("seeded", body(rng.randint(20, 90), 48, stream=True, **drawn)),
            Case("one", body(rng.randint(20, 90), 1, **greedy)),
            Case(
                "hung up",
                body(rng.randint(20, 400), 200, stream=True, **greedy, **split),
                hang_up_after=rng.randint(1, 40),
            ),
            Case("stop", body(rng.randint(20, 90), 200, stream=index % 2 == 0, stop=["7", "<3"])),
        ]
        made[-1].body |= greedy
    made.append(Case("too long", body(max_context + 50, 8), status=400))
    made.append(Case("bad", {"model": "tiny", "prompt": 7.5}, status=400))
    return made


async def record(session: aiohttp.ClientSession, url: str, all_cases: Sequence[Case]) -> None:
    """Asks an undisturbed server for the answers. Each is asked for by both routes: where they
    differ, the fault was there before."""
    for case in all_cases:
        if case.status != 200:
            continue
        texts = set()
        for route in ("disaggregated", "colocated"):
            asked = Case("record", case.body | {"route": route, "stream": False})
            told = await _told(session, url, asked)
            assert told.outcome is Outcome.RIGHT, told
            texts.add(told.text)
        assert len(texts) == 1, (case, texts)
        case.expected = texts.pop()


async def ask(
    session: aiohttp.ClientSession, url: str, case: Case, limit_s: float = HANG_S
) -> Told:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            told = await _told(session, url, case)
    except TimeoutError:
        return Told(Outcome.HUNG, why=f"no end within {limit_s:.0f} s", total_s=limit_s)
    told.total_s = time.monotonic() - begun
    return told


async def _told(session: aiohttp.ClientSession, url: str, case: Case) -> Told:
    told = Told(Outcome.RIGHT)
    begun = last = time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=case.body) as answer:
            if answer.status != 200 or not case.stream:
                found = await answer.json(content_type=None)
                return _whole(case, answer.status, found)
            events = 0
            ended = False
            async for raw in answer.content:
                line = raw.decode().strip()
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                if not events:
                    told.first_s = now - begun
                else:
                    told.gap_s = max(told.gap_s, now - last)
                last = now
                events += 1
                if line == "data: [DONE]":
                    ended = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    told.outcome, told.why = Outcome.ERROR, str(event["error"].get("code"))
                    return _judged(case, told)
                told.text += event["choices"][0]["text"] if event["choices"] else ""
                if events == case.hang_up_after:
                    told.outcome = Outcome.HUNG_UP
                    return _judged(case, told)
            if not ended:
                told.outcome, told.why = Outcome.WRONG, "the stream ended without its end"
            return _judged(case, told)
    except (aiohttp.ClientError, ConnectionError) as error:
        told.outcome, told.why = Outcome.CUT, type(error).__name__
        return _judged(case, told)


def _whole(case: Case, status: int, found: dict[str, Any]) -> Told:
    if status == 200:
        return _judged(case, Told(Outcome.RIGHT, found["choices"][0]["text"]))
    if "message" not in found.get("error", {}):
        return Told(Outcome.WRONG, why=f"status {status} without a reason: {found}")
    if status == case.status:
        return Told(Outcome.REFUSED)
    if status in (429, 500, 502, 503, 504):
        return Told(Outcome.ERROR, why=f"{status} {found['error'].get('code')}")
    return Told(Outcome.WRONG, why=f"status {status}: {found}")


def _judged(case: Case, told: Told) -> Told:
    """A whole answer must be the right one, a part of one its beginning."""
    if case.expected is None or told.outcome is Outcome.WRONG:
        if case.status != 200 and told.outcome is Outcome.RIGHT:
            told.outcome, told.why = Outcome.WRONG, "should have been refused"
        return told
    right = (
        told.text == case.expected
        if told.outcome is Outcome.RIGHT
        else case.expected.startswith(told.text)
    )
    if not right:
        told.outcome, told.why = Outcome.WRONG, f"wrong text, as {told.outcome}"
    return told


async def keep_asking(
    url: str, all_cases: Sequence[Case], tally: Tally, stop: asyncio.Event, clients: int, seed: int
) -> None:
    """``clients`` callers, each with one call at a time, until ``stop``; all calls are finished.
    An error is followed by a moment's rest, as a client's would be."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def caller(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            while not stop.is_set():
                case = rng.choice(all_cases)
                told = await ask(session, url, case)
                tally.add(case, told)
                if told.outcome in (Outcome.ERROR, Outcome.CUT):
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(caller(number) for number in range(clients)))
