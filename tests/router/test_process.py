"""The router as a process: what it leaves in the run folder, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_worker import EOS, FakeWorker, Net, text_of
from router_net import CONTEXT, MODEL, deployment, router, run, until
from tiny_tokenizer import VOCAB_SIZE, write_tiny

from pdserve.core import config
from pdserve.core.card import ModelCard
from pdserve.core.errors import ConfigError
from pdserve.core.ids import Role
from pdserve.core.keys import load_keys, new_keys, secure_client
from pdserve.core.messages import Bye
from pdserve.core.supervised import ALL_END

PLAIN = "/v1/completions"
TYPING = Path(__file__).parents[2] / ".typing"


@dataclass
class Process:
    popen: subprocess.Popen[str]
    run_dir: Path
    url: str

    @property
    def net(self) -> Net:
        return Net(f"ipc://{self.run_dir}/control.sock")

    async def end(self, limit_s: float = 20.0) -> int:
        return await asyncio.to_thread(self.popen.wait, limit_s)


def start(folder: Path, **sections: Any) -> subprocess.Popen[str]:
    """The hidden command that ``pdserve serve`` runs, with ``folder`` as its run folder."""
    write_tiny(folder)
    file, card = folder / "deployment.json", folder / "card.json"
    config.save(deployment(pools={"mixed": {"workers": 1}}, **sections), file)
    ModelCard(MODEL, str(folder), "f", "llama", VOCAB_SIZE, CONTEXT, (EOS,)).save(card)
    command = [sys.executable, "-P", "-m", "pdserve.cli", "router", str(file)]
    return subprocess.Popen(
        [*command, "--card", str(card), "--run-dir", str(folder)],
        env=os.environ | {"PYTHONPATH": str(TYPING)},
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """With a short path: a socket lies in it."""
    with tempfile.TemporaryDirectory(prefix="pd-") as folder:
        yield Path(folder)


@contextlib.asynccontextmanager
async def process(**sections: Any) -> AsyncIterator[Process]:
    with run_folder() as folder:
        popen = start(folder, **sections)
        try:
            written = folder / "http.json"
            await until(written.exists, 20.0)
            found = json.loads(written.read_text())
            assert found["pid"] == popen.pid and set(found) == {
                "host",
                "port",
                "pid",
                "token",
                "certificate",
            }
            yield Process(popen, folder, f"http://{found['host']}:{found['port']}")
        finally:
            if popen.poll() is None:
                popen.kill()
            popen.communicate()


@contextlib.asynccontextmanager
async def streaming(up: Process, worker: FakeWorker) -> AsyncIterator[aiohttp.StreamReader]:
    """A client in the middle of a stream."""
    worker.hold_after = 3
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 6, "stream": True}
    async with (
        aiohttp.ClientSession(up.url) as client,
        client.post(PLAIN, json=body) as response,
    ):
        await response.content.readline()
        yield response.content


def test_a_signal_lets_streams_end_and_takes_no_new_ones() -> None:
    async def main() -> None:
        async with process() as up, FakeWorker(up.net, "mixed-0", Role.MIXED) as worker:
            mode = (up.run_dir / "control.sock").stat().st_mode
            assert mode & 0o077 == 0
            async with streaming(up, worker) as stream, aiohttp.ClientSession(up.url) as client:
                up.popen.send_signal(ALL_END)
                while (await client.get("/ready")).status != 503:  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.02)
                async with client.post(PLAIN, json={"model": MODEL, "prompt": "x"}) as refused:
                    assert refused.status == 503
                    assert (await refused.json())["error"]["code"] == "draining"
                assert (await client.get("/health")).status == 200
                assert not worker.drained
                worker.release()
                rest = (await stream.read()).decode()
            assert rest.rstrip().endswith("data: [DONE]")
            assert await up.end() == 0
            await until(lambda: worker.drained)
            assert not (up.run_dir / "http.json").exists()

    run(main())


def test_a_second_signal_ends_it_at_once_and_the_client_hears_why() -> None:
    async def main() -> None:
        async with process() as up, FakeWorker(up.net, "mixed-0", Role.MIXED) as worker:
            async with streaming(up, worker) as stream:
                up.popen.send_signal(signal.SIGINT)
                await asyncio.sleep(0.3)
                assert up.popen.poll() is None
                up.popen.send_signal(signal.SIGINT)
                rest = (await stream.read()).decode()
                assert '"code":"draining"' in rest and "[DONE]" not in rest
            assert await up.end(5.0) == 130
            await until(lambda: bool(worker.aborted))

    run(main())


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_router_that_ends_and_is_started_again_in_the_same_folder(
    how: signal.Signals, code: int
) -> None:
    """Whoever ends it alone keeps the workers: they are not told to leave."""

    async def main() -> None:
        async with process() as up, FakeWorker(up.net, "mixed-0", Role.MIXED) as worker:
            up.popen.send_signal(how)
            assert await up.end() == code
            again = start(up.run_dir)
            try:
                await until(
                    lambda: worker.refused is not None, 20.0
                )  # of a router it does not know
                assert worker.refused is not None and worker.refused.rejoin
                assert not worker.drained
                async with FakeWorker(up.net, "mixed-0", Role.MIXED):
                    written = up.run_dir / "http.json"
                    await until(written.exists, 20.0)  # the control socket is there sooner
                    found = json.loads(written.read_text())
                    url = f"http://{found['host']}:{found['port']}"
                    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
                    async with aiohttp.ClientSession(url) as client:
                        answer = await (await client.post(PLAIN, json=body)).json()
                    assert answer["choices"][0]["text"] == text_of(tuple(b"hello"), 4)
                again.terminate()
                assert await asyncio.to_thread(again.wait, 20) == 0
            finally:
                again.kill()
                again.communicate()

    run(main())


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with socket.socket() as taken, run_folder() as folder:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        popen = start(folder, router={"port": taken.getsockname()[1]})
        _, errors = popen.communicate(timeout=20)
        assert popen.returncode == 1
        assert "pdserve: router.port: 127.0.0.1:" in errors and "Traceback" not in errors
        assert not (folder / "http.json").exists()


def test_workers_that_are_told_to_leave_are_waited_for() -> None:
    """The word may be on its way yet; with the sockets it would be lost."""

    async def main() -> None:
        async with (
            router() as up,
            FakeWorker(up.net, "mixed-0", Role.MIXED) as worker,
            FakeWorker(up.net, "mixed-1", Role.MIXED) as other,
        ):
            worker.stays = True
            for event in (hurry := asyncio.Event()), None:
                dismissed = asyncio.create_task(up.service.dismiss(hurry))
                await until(lambda: worker.drained and other.drained)
                await until(lambda: len(up.service.dispatch.members.alive()) == 1)
                assert not dismissed.done()
                if event is not None:
                    event.set()
                else:
                    await worker.say(Bye())
                await dismissed
                hurry.clear()

    run(main())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


def test_workers_of_other_hosts_join_over_tcp_with_the_keys(tmp_path: Path) -> None:
    new_keys(tmp_path / "ours")
    new_keys(tmp_path / "theirs")
    port = free_port()
    sections = {
        "router": {"control": f"tcp://0.0.0.0:{port}"},
        "security": {"keys": str(tmp_path / "ours")},
    }

    def remote(net: Net, name: str, folder: str | None) -> FakeWorker:
        worker = FakeWorker(Net(f"tcp://127.0.0.1:{port}", net.handed_over), name, Role.MIXED)
        if folder is not None:
            secure_client(worker._socket, load_keys(tmp_path / folder))
        return worker

    async def main() -> None:
        async with router(**sections) as up:
            strangers = [remote(up.net, "bare", None), remote(up.net, "other", "theirs")]
            for stranger in strangers:
                stranger.start()
            async with (
                FakeWorker(up.net, "local", Role.MIXED),
                remote(up.net, "remote", "ours") as member,
            ):
                _, cluster = await up.get("/cluster")
                assert sorted(one["id"] for one in cluster["workers"]) == ["local", "remote"]
                for _ in range(2):
                    assert (await up.complete(route="disaggregated"))[0] == 200
                assert member.placed
            for stranger in strangers:
                await stranger.kill()

    run(main())


def test_no_bind_that_others_reach_without_keys() -> None:
    async def main() -> None:
        async with router(router={"control": f"tcp://0.0.0.0:{free_port()}"}):
            raise AssertionError("it came up")

    with pytest.raises(ConfigError, match=r"security\.keys"):
        run(main())
