"""A worker that speaks the control protocol over its real socket, and writes by a script.

The token at position ``index`` of an output is a letter that depends on the prompt and the
index alone, so every attempt at a request writes the same text, and any gap, repetition or
mix-up shows. A decode worker writes once its prefill worker has handed over, as with KV.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from pdserve.core.ids import Medium, Role, Task, WorkerRef, new_epoch
from pdserve.core.messages import (
    PROTOCOL_VERSION,
    TO_ROUTER,
    TO_WORKER,
    Abort,
    AttemptFailed,
    BlockCounts,
    Bye,
    Drain,
    FailureKind,
    FinishReason,
    Hello,
    Key,
    PeerAddress,
    Place,
    Refused,
    RouterBeat,
    SetRole,
    Started,
    TokenBatch,
    TokenItem,
    ToRouter,
    ToWorker,
    TransferDone,
    Welcome,
    WorkerBeat,
)

EOS = 256
BLOCKS = BlockCounts(total=64, free=64, cached=0, held=0)


def letter(prompt: tuple[int, ...], index: int) -> int:
    """The token at ``index``: the byte of a small letter."""
    return ord("a") + (sum(prompt) + index) % 26


def text_of(prompt: tuple[int, ...], num_tokens: int) -> str:
    """What the first ``num_tokens`` tokens of the answer to ``prompt`` read."""
    return bytes(letter(prompt, index) for index in range(num_tokens)).decode()


@dataclass
class Net:
    """What workers of one deployment share: where to join, and who has handed over."""

    endpoint: str
    handed_over: dict[Key, asyncio.Event] = field(default_factory=dict)
    eos_at: int | None = None  # the index at which every output ends by itself
    cached_tokens: int = 0

    def kv(self, key: Key) -> asyncio.Event:
        return self.handed_over.setdefault(key, asyncio.Event())


class FakeWorker:
    """``async with`` it: it joins, and leaves with its last words unsaid."""

    def __init__(
        self,
        net: Net,
        worker_id: str,
        role: Role,
        *,
        fingerprint: str = "f/fp32/16",
        max_context: int = 1024,
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self.net = net
        self.role = role
        self.address = PeerAddress(worker_id, new_epoch(), "tcp://127.0.0.1:1", "secret")
        self.hello = Hello(
            version, role, 1, self.address, fingerprint, BLOCKS, 16, max_context, max_batch=8
        )
        self.placed: list[Place] = []
        self.aborted: list[Key] = []
        self.beaten: RouterBeat | None = None  # the router's last beat
        self.refused: Refused | None = None
        self.drained = False
        self.stays = False  # told to leave, it says no goodbye
        self.role_set: Role | None = None
        self.hold_after: int | None = None  # tokens of an output; then it waits to be released
        self.hold_tokens = False  # places are taken, and nothing is written
        self.silent = False
        self.forgetful = False  # lists nothing in its beats
        self.token_delay = 0.0
        self._released = asyncio.Event()
        self._joined = asyncio.Event()
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, str(self.ref).encode())
        self._socket.linger = 0

    @property
    def ref(self) -> WorkerRef:
        return self.address.ref

    async def __aenter__(self) -> Self:
        self.start()
        await asyncio.wait_for(self._joined.wait(), 5)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.kill()

    def start(self) -> None:
        self._socket.connect(self.net.endpoint)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]

    async def kill(self) -> None:
        """As SIGKILL would: no word, and the socket is gone."""
        tasks = [*self._tasks, *self._running.values()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks, self._running = [], {}
        self._context.destroy(linger=0)

    def release(self) -> None:
        self.hold_after, self.hold_tokens = None, False
        self._released.set()

    async def say(self, message: ToRouter) -> None:
        await self._socket.send(TO_ROUTER.encode(message))

    async def fail(self, key: Key, kind: FailureKind) -> None:
        self._end(key)
        await self.say(AttemptFailed(key, kind, "as the test wants it"))

    async def leave(self) -> None:
        await self.say(Bye())

    @property
    def live(self) -> list[Key]:
        return [] if self.forgetful else list(self._running)

    async def _listen(self) -> None:
        await self.say(self.hello)
        while True:
            message = TO_WORKER.decode(await self._socket.recv())
            await self._take(message)

    async def _take(self, message: ToWorker) -> None:
        match message:
            case Welcome():
                self._joined.set()
            case Refused():
                self.refused = message
                self._joined.set()
            case Place(key):
                self.placed.append(message)
                self._running[key] = asyncio.create_task(self._run(message))
            case Abort(key):
                self.aborted.append(key)
                self._end(key)
            case RouterBeat(live):
                self.beaten = message
                for key in [key for key in self._running if key not in live]:
                    self._end(key)
            case SetRole(role):
                self.role_set = role
            case Drain():
                self.drained = True
                if not self.stays:
                    self.silent = True
                    await self.say(Bye())

    def _end(self, key: Key) -> None:
        task = self._running.pop(key, None)
        if task is not None:
            task.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if not self.silent and self.refused is None:
                held = BlockCounts(64, 64 - len(self._running), 0, len(self._running))
                await self.say(WorkerBeat(held, 0, len(self._running), tuple(self.live)))

    async def _run(self, place: Place) -> None:
        key = place.key
        if place.task is not Task.DECODE:
            await self.say(Started(key, min(self.net.cached_tokens, len(place.prompt))))
        while self.hold_tokens:
            self._released.clear()
            await self._released.wait()
        if place.task is Task.DECODE:
            await self.net.kv(key).wait()
        for item in self._items(place):
            await self.say(TokenBatch((item,)))
            if item.finish is not None:
                self._running.pop(key, None)
                return
            if place.task is Task.PREFILL:
                self.net.kv(key).set()
                assert place.peer is not None
                await self.say(
                    TransferDone(key, place.peer.worker_id, Medium.TCP, 4096, 0.001, 0.002, 0.0005)
                )
                self._running.pop(key, None)
                return
            while self.hold_after is not None and item.index + 1 >= self.hold_after:
                self._released.clear()
                await self._released.wait()
            await asyncio.sleep(self.token_delay)

    def _items(self, place: Place) -> Iterator[TokenItem]:
        for index in range(len(place.output), place.params.max_tokens):
            token = letter(place.prompt, index)
            finish = FinishReason.LENGTH if index + 1 == place.params.max_tokens else None
            if index == self.net.eos_at and not place.params.ignore_eos:
                token, finish = EOS, FinishReason.STOP
            wanted = place.params.logprobs
            top = tuple((token + i, -0.5 - i) for i in range(wanted or 0))
            yield TokenItem(place.key, index, token, finish, None if wanted is None else -0.5, top)
