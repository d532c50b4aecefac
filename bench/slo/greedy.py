"""Whether servers say the same: the first thing to know before their speeds are compared.

A few prompts, one after the other, greedy; every token is compared. Under fp32 the tokens of
our deployments are the same by design; under bf16 a near-tie may fall differently.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import aiohttp

from ...core.errors import PdserveError
from .prompts import PromptMaker
from .servers import Server
from .stream import Reading, Target, send
from .workloads import Ask

LENGTHS = (7, 33, 100, 250)
NUM_OUTPUT = 32


class _WithLogprobs(Target):
    """Each token by its name."""

    __slots__ = ()

    def body(self, ask: Ask) -> tuple[str, dict[str, object]]:
        path, body = Target.body(self, ask)
        return path, body | {"logprobs": 0}


@dataclass(frozen=True, slots=True)
class Difference:
    """Two servers part at token ``position`` of prompt ``prompt``."""

    one: str
    other: str
    prompt: int
    position: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.one} and {self.other}: prompt {self.prompt}, token {self.position}"


def answers(server: Server, maker: PromptMaker, api_key: str | None = None) -> list[list[str]]:
    """The tokens of each answer. Raises PdserveError where one does not come."""
    return asyncio.run(_answers(server, maker, api_key))


async def _answers(server: Server, maker: PromptMaker, api_key: str | None) -> list[list[str]]:
    target = _WithLogprobs(server.url, server.model, api_key)
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for index, length in enumerate(LENGTHS):
            ask = Ask(maker.piece(length, 9, index), NUM_OUTPUT)
            reading = Reading()
            start = time.monotonic()
            done = await send(
                session, target, ask, index=index, due=0.0, start=start, reading=reading
            )
            if done.failure is not None:
                raise PdserveError(f"{server.name}: {done.failure}: {done.detail}")
            found.append(reading.tokens)
    return found


def differences(answers: Mapping[str, Sequence[Sequence[str]]]) -> list[Difference]:
    """Each server against the first."""
    names = list(answers)
    found = []
    for other in names[1:]:
        pairs = zip(answers[names[0]], answers[other], strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            if list(ours) != list(theirs):
                same = [a == b for a, b in zip(ours, theirs, strict=False)]
                position = same.index(False) if False in same else len(same)
                found.append(Difference(names[0], other, index, position))
    return found
