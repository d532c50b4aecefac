"""A real deployment that may be broken: two prefill and two decode workers of SmolLM2 in fp32.

It has a run folder of its own (a small file system where this user may mount one, so that it
can be filled), pools of KV so small that a few long requests fill them, and a wall clock that
can be set where there is a C compiler. All the while some of the messages between its workers
are lost, doubled or late.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deployed import REST_S, WHOLE_S, Deployed, files
from footprint import children, processes_of
from plan import ROUTER, WORKERS
from served import STOP_LIMIT_S, Server, command, environment, ready_url, start

_FIRST_ROLES = {"prefill": 2, "decode": 2}

DEPLOYMENT = """
model: {path: smollm2, dtype: fp32, max_context: 768}
pools:
  prefill: {workers: 2, device: cpu}
  decode: {workers: 2, device: cpu}
kv: {memory: 192MiB}  # of four workers: 68 blocks each, for some 1,000 tokens
router: {max_queue: 256}
faults: {kv: {drop: 0.02, duplicate: 0.05, delay: 0.05, delay_ms: 500}}  # all the time
"""


@dataclass
class World(Deployed):
    disk: Path | None  # a small file system with the run folder, where there is one
    skew: mmap.mmap | None  # seconds that wall clocks are wrong by
    roles: Mapping[str, int] = field(default_factory=lambda: dict(_FIRST_ROLES))
    killed: set[int] = field(default_factory=set)  # for a moment they still look alive

    def pids(self) -> dict[str, int]:
        found = {}
        for pid in children(self.server.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if "--id" in line:
                    found[line[line.index("--id") + 1]] = pid
                elif ROUTER in line:
                    found[ROUTER] = pid
        return found

    def signal(self, number: signal.Signals, *names: str) -> None:
        pids = self.pids()
        for name in names:
            if name in pids:  # else it is between two lives
                if number is signal.SIGKILL:
                    self.killed.add(pids[name])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[name], number)

    def set_clock(self, seconds: float) -> None:
        assert self.skew is not None
        self.skew[:8] = struct.pack("d", seconds)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """To the last byte, and to the last name."""
        assert self.disk is not None
        ballast = self.disk / "ballast"
        ballast.mkdir()
        with contextlib.suppress(OSError), (ballast / "bytes").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with contextlib.suppress(OSError):
            for number in range(1 << 16):
                (ballast / str(number)).touch()
        try:
            yield
        finally:
            shutil.rmtree(ballast)

    async def scale(self, roles: Mapping[str, int]) -> str | None:
        """With the command, which is tried again where it is too early for it: what it says where
        it can't."""
        self.roles = roles
        end = time.monotonic() + WHOLE_S
        while (words := await self._scale(roles)) is not None and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(1.0)
        return words

    async def _scale(self, roles: Mapping[str, int]) -> str | None:
        options = [word for role, count in roles.items() for word in (f"--{role}", str(count))]
        process = await asyncio.create_subprocess_exec(
            *command("scale", self.server.url, *options),
            env=environment() | {"XDG_RUNTIME_DIR": str(self.folder / "run")},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, words = await process.communicate()
        return words.decode() if process.returncode else None

    async def ended(self, names: tuple[str, ...]) -> None:
        """SIGTERM, and until they have ended."""
        pids = [pid for name, pid in self.pids().items() if name in names]
        self.signal(signal.SIGTERM, *names)
        await self._until(
            f"{names} have ended", lambda: not set(pids) & set(self.pids().values()), REST_S
        )

    def _is_whole(self) -> bool:
        pids = self.pids()
        workers = self.server.workers()
        counts = dict.fromkeys(self.roles, 0)
        for worker in workers.values():
            counts[worker["role"]] = counts.get(worker["role"], 0) + 1
        return (
            set(workers) == set(WORKERS) == set(pids) - {ROUTER}
            and not self.killed & set(pids.values())
            and all(
                worker["state"] == "ready" and not worker["silent"] and worker["pid"] == pids[name]
                for name, worker in workers.items()
            )
            and counts == dict(self.roles)
        )


@contextlib.contextmanager
def world(left: list[str]) -> Iterator[World]:
    """Up until the block ends. Then it is ended with SIGINT, and ``left`` is told what is still
    there, or how else it did not end well."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp")))
        (folder / "run").mkdir()
        disk = stack.enter_context(_small_disk(folder / "run"))
        skew, preload = _clock(folder)
        file = folder / "deployment.yaml"
        file.write_text(DEPLOYMENT)
        process = start(file, env={"XDG_RUNTIME_DIR": str(folder / "run"), **preload})
        made = None
        try:
            made = World(Server(process, ready_url(process)), folder, disk, skew)
            yield made
        finally:
            process.send_signal(signal.SIGINT)
            try:
                if (code := process.wait(2 * STOP_LIMIT_S)) != 0:
                    left.append(f"the deployment ended with {code}")
            except subprocess.TimeoutExpired:
                left.append(f"the deployment did not end within {2 * STOP_LIMIT_S:.0f} s")
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
            left += [f"left running: {line}" for line in processes_of(folder)]
            left += [f"left in the run folder: {path}" for path in files(folder / "run")]
            if made is not None:
                left += [f"left in /dev/shm: {path}" for path in made.shared if path.exists()]


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    options = "size=1m,nr_inodes=200,mode=700"
    mount = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    able = os.getuid() == 0 and shutil.which("mount") is not None
    if not able or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


def _clock(folder: Path) -> tuple[mmap.mmap | None, dict[str, str]]:
    """A wall clock that can be set, and what makes processes read it."""
    library, seconds = folder / "skew.so", folder / "skew"
    source = Path(__file__).with_name("skew.c")
    compiler = shutil.which("cc")
    build = (compiler or "cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl")
    if compiler is None or subprocess.run(build, capture_output=True).returncode != 0:
        return None, {}
    seconds.write_bytes(bytes(mmap.PAGESIZE))
    with seconds.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    return mapped, {"LD_PRELOAD": str(library), "CHAOS_SKEW": str(seconds)}
