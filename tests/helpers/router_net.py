"""A router with all its sockets in this process, and fake workers that join it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import uvloop
from fake_worker import EOS, FakeWorker, Net
from tiny_tokenizer import CHAT_ML, VOCAB_SIZE, write_tiny

from pdserve.core.card import ModelCard
from pdserve.core.config import Deployment
from pdserve.core.ids import Role
from pdserve.router.process import serving
from pdserve.router.service import Service
from pdserve.router.tokenizer import Tokenizer

T = TypeVar("T")

MODEL = "tiny"
CONTEXT = 256


def run(work: Coroutine[Any, Any, T], limit_s: float = 30.0) -> T:
    """On the router's own kind of loop, for a bounded time."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work, limit_s))


@dataclass
class Router:
    """A router that serves; ``client`` talks to it."""

    service: Service
    net: Net
    url: str
    client: aiohttp.ClientSession
    run_dir: Path

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.post(path, data=data) as response:
            return response.status, await response.json()

    async def complete(self, prompt: Any = "hello", **fields: Any) -> tuple[int, Any]:
        return await self.post(
            "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 8, **fields}
        )

    async def events(self, path: str, **fields: Any) -> list[Any]:
        """The events of a stream, parsed; ``[DONE]`` as it is."""
        return [event async for event in self.stream(path, **fields)]

    async def stream(self, path: str, **fields: Any) -> AsyncIterator[Any]:
        body = {"model": MODEL, "stream": True, **fields}
        async with self.client.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: "):
                    text = line.removeprefix(b"data: ").strip().decode()
                    yield text if text == "[DONE]" else json.loads(text)


def deployment(**sections: Any) -> Deployment:
    router = {"port": 0, "policy": "adaptive"} | sections.pop("router", {})
    return Deployment.model_validate(
        {"model": {"path": MODEL, "max_context": CONTEXT}, "router": router, **sections}
    )


@contextlib.asynccontextmanager
async def router(template: str | None = CHAT_ML, **sections: Any) -> AsyncIterator[Router]:
    """Without workers; its folder is short, for a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="pd-") as folder:
        path = Path(folder)
        write_tiny(path, template)
        card = ModelCard(MODEL, folder, "f", "llama", VOCAB_SIZE, 1024, (EOS,), dummy=True)
        tokenizer = Tokenizer.read(path)
        async with serving(deployment(**sections), card, path, tokenizer) as service:
            at = json.loads((path / "http.json").read_text())
            url = f"http://{at['host']}:{at['port']}"
            time_kept = asyncio.create_task(service.keep_time())
            async with aiohttp.ClientSession(url) as client:
                yield Router(service, Net(f"ipc://{path}/control.sock"), url, client, path)
            assert not time_kept.done()
            time_kept.cancel()


@contextlib.asynccontextmanager
async def split(**sections: Any) -> AsyncIterator[tuple[Router, FakeWorker, FakeWorker]]:
    """A router with one prefill and one decode worker."""
    async with (
        router(**sections) as up,
        FakeWorker(up.net, "prefill-0", Role.PREFILL) as prefill,
        FakeWorker(up.net, "decode-0", Role.DECODE) as decode,
    ):
        yield up, prefill, decode


async def until(check: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Waits for something that nothing can be awaited for."""
    async with asyncio.timeout(limit_s):
        while not check():  # noqa: ASYNC110 (a table of another task)
            await asyncio.sleep(0.01)
