"""The router's books after twenty thousand requests, and deaths among them, are as small as
after two thousand."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections import deque

import pytest

from pdserve.bench.router_load import hello
from pdserve.core.config import Deployment, Policy
from pdserve.core.ids import new_request_id
from pdserve.core.messages import (
    CacheEvents,
    FinishReason,
    Started,
    TokenBatch,
    TokenItem,
    ToRouter,
)
from pdserve.core.params import SamplingParams
from pdserve.router.dispatch import Dispatch
from pdserve.router.effects import Link
from pdserve.router.membership import Membership
from pdserve.router.requests import Ask, State
from pdserve.router.snapshot import Objectives

WARM, MORE = 2_000, 20_000
LIVES = 200  # of requests, from one death of a worker to the next


class Deployed:
    """Two workers that answer each request with four tokens; of ten requests one hangs up, one
    waits for its worker's death now and then, and a block of a cache changes with each."""

    def __init__(self) -> None:
        pools = Deployment.model_validate({"model": {"path": "m"}}).pools
        objectives = Objectives(500.0, 50.0)
        self.dispatch = Dispatch(
            Policy.ADAPTIVE, pools, Membership("m"), 1, b"salt", objectives, plan_roles=False
        )
        self.rng = random.Random(1)
        self.now = 0.0
        self.links: list[Link] = []
        self.said = [0, 0]
        self.names: list[deque[bytes]] = [deque(), deque()]
        for index in range(2):
            self.links.append(Link(0, b""))
            self.joined(index)

    def joined(self, index: int) -> None:
        """A new life of this worker."""
        link = self.links[index] = Link(0, self.rng.randbytes(8))
        self.dispatch.receive(link, hello(f"w{index}", "m"), self.now)
        self.said[index] = 0
        self.names[index].clear()
        self.hear(index, CacheEvents(0, b"", b"", reset=True))

    def hear(self, index: int, message: ToRouter) -> None:
        self.dispatch.receive(self.links[index], message, self.now)

    def cached(self, index: int, name: bytes) -> None:
        """A block is stored, and the one of sixteen requests before is evicted."""
        self.said[index] += 1
        names = self.names[index]
        names.append(name)
        evicted = names.popleft() if len(names) > 16 else b""
        self.hear(index, CacheEvents(self.said[index], name, evicted))

    def serve(self, count: int) -> None:
        for number in range(count):
            self.now += 0.01
            prompt = tuple(self.rng.randrange(100) for _ in range(20))
            ask = Ask(new_request_id(), prompt, SamplingParams(max_tokens=4), self.now + 600.0)
            assert self.dispatch.submit(ask, self.now)
            (request,) = (one for one in self.dispatch.requests() if one.id == ask.request_id)
            assert request.placement is not None
            index = int(request.placement.decode.worker_id[1:])
            if number % LIVES == LIVES - 1:
                self.dispatch.unreachable(self.links[index], self.now)
                self.joined(index)
                index = int(request.placement.decode.worker_id[1:])
            key = request.key
            self.hear(int(request.placement.prefill.worker_id[1:]), Started(key, 0))
            self.cached(index, self.rng.randbytes(16))
            if number % 10 == 3:
                self.dispatch.end(request.id, State.ABORTED, self.now)
                continue
            ends = (None, None, None, FinishReason.LENGTH)
            items = tuple(TokenItem(key, at, 5, end) for at, end in enumerate(ends))
            self.hear(index, TokenBatch(items))
            self.dispatch.end(request.id, State.DONE, self.now)
            if number % 50 == 0:
                self.dispatch.tick(self.now)

    def size(self) -> int:
        """Bytes of all objects that can hold others."""
        gc.collect()
        return sum(sys.getsizeof(one) for one in gc.get_objects())


def test_the_books_stay_as_small_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pdserve")  # what is logged is kept by pytest
    deployed = Deployed()
    deployed.serve(WARM)
    before = deployed.size()
    deployed.serve(MORE)
    assert deployed.dispatch.num_requests == 0
    grown = deployed.size() - before
    # The lives of workers that have ended are remembered, some thousands of them.
    assert grown < 4 * MORE, f"{grown} bytes by {MORE} requests and {MORE // LIVES} deaths"
    assert len(deployed.dispatch._loads._paces) <= 2, "one for each worker that lives"
