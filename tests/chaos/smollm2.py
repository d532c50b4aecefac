"""What clients ask of SmolLM2: cases for ``traffic``, the same for the same seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import aiohttp
from texts import prose
from traffic import Case, Outcome, ask

MODEL = "smollm2"
LIMIT_S = 660.0  # a little more than the deployment's own bound on a request
_AT_ONCE = 4


def smollm2_cases(seed: int, each: int = 2) -> list[Case]:
    """Short and long, streamed and whole, greedy and drawn, with stop strings and penalties,
    hung up on, and what is to be refused."""
    rng = random.Random(seed)

    def body(words: int, max_tokens: int, **more: Any) -> dict[str, Any]:
        text = prose(words, seed=rng.randrange(1 << 30))
        fields = {"model": MODEL, "prompt": text, "max_tokens": max_tokens, "temperature": 0}
        return fields | more

    split = {"stream": True, "route": "disaggregated"}
    made: list[Case] = []
    for _ in range(each):
        drawn = {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(1 << 30)}
        penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "ignore_eos": True}
        made += [
            Case("short", body(rng.randint(5, 40), 12)),
            Case("short", body(rng.randint(5, 40), 32, **split)),
            Case("long", body(rng.randint(200, 400), 16, **split)),
            Case("long", body(rng.randint(200, 400), 6)),
            Case("seeded", body(rng.randint(10, 60), 24, **(drawn | {"stream": True}))),
            Case("penalties", body(rng.randint(10, 60), 24, **(penalties | split))),
            Case("stop", body(rng.randint(10, 60), 32, stream=True, stop=[" the", "."])),
            Case("stop", body(rng.randint(10, 60), 32, stop=[" and", ","])),
            Case("one", body(rng.randint(10, 60), 1)),
            Case("hung up", body(300, 64, ignore_eos=True, **split), hang_up_after=1),
            Case(
                "hung up", body(20, 64, ignore_eos=True, **split), hang_up_after=rng.randint(2, 20)
            ),
        ]
    made.append(Case("too long", body(900, 8), status=400))
    made.append(Case("bad", {"model": MODEL, "prompt": 7.5}, status=400))
    made.append(Case("bad", body(3, 0), status=400))
    made.append(Case("unknown model", body(3, 3) | {"model": "gpt-7"}, status=404))
    return made


async def record(session: aiohttp.ClientSession, url: str, cases: Sequence[Case]) -> None:
    """The answers of a server that nobody disturbs yet, as far as they are not known."""
    free = asyncio.Semaphore(_AT_ONCE)

    async def one(case: Case) -> None:
        async with free:
            told = await ask(session, url, Case("record", case.body | {"stream": False}), LIMIT_S)
            assert told.outcome is Outcome.RIGHT, (case, told)
            case.expected = told.text

    wanted = [case for case in cases if case.status == 200 and case.expected is None]
    await asyncio.gather(*(one(case) for case in wanted))
