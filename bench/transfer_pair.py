"""Two workers as processes, and a router of a few lines that has one send to the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from ..core.ids import Role, Task, new_request_id
from ..core.messages import (
    TO_ROUTER,
    TO_WORKER,
    Abort,
    AttemptFailed,
    BlockCounts,
    Hello,
    Key,
    PeerLink,
    Place,
    RouterBeat,
    Started,
    TokenBatch,
    ToRouter,
    ToWorker,
    TransferDone,
    Welcome,
    WorkerBeat,
)
from ..core.params import SamplingParams
from .transfer_worker import VERIFY, WorkerSpec

PREFILL, DECODE = "prefill-0", "decode-0"
_PROGRAM = (sys.executable, "-P", "-m", "pdserve.cli", "bench", "transfer", "--child")
_START_S = 600.0
_SILENCE_S = 120.0


@dataclass(slots=True)
class Request:
    """``times`` are when the router heard of D's tokens."""

    key: Key
    tokens: dict[int, int] = field(default_factory=dict)  # D's and P's, by index
    first: dict[str, int] = field(default_factory=dict)  # token 0, as each worker has said it
    times: list[float] = field(default_factory=list)
    done: TransferDone | None = None
    started: bool = False  # P has said so
    finished: bool = False
    may_fail: bool = False
    failed: str = ""  # what a worker has said of that


@dataclass(frozen=True, slots=True)
class Usage:
    """``faults``: pages that the kernel had to find, among them those that it zeroes."""

    cpu_s: float
    faults: int


class Pair:
    """``with`` it: both workers are up; at the end they are gone. RuntimeError where a request
    fails or a worker ends."""

    def __init__(self, folder: Path, specs: tuple[WorkerSpec, WorkerSpec]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(specs[0].join)
        self._identities: dict[str, bytes] = {}
        self._hellos: dict[str, Hello] = {}
        self._requests: dict[Key, Request] = {}
        self._live: dict[str, set[Key]] = {spec.worker_id: set() for spec in specs}
        self.links: tuple[PeerLink, ...] = ()
        self.blocks: dict[str, BlockCounts] = {}  # as of each worker's last beat
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._files = {spec.worker_id: folder / f"{spec.worker_id}.json" for spec in specs}
        for spec in specs:
            spec.save(self._files[spec.worker_id])
            self._spawn(spec.worker_id)

    def __enter__(self) -> Self:
        self._all_up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._context.destroy(linger=0)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        del self._hellos[name]
        self.blocks.pop(name, None)
        self._live[name].clear()

    def usage(self) -> Usage:
        """Of both workers, so far."""
        faults = ticks = 0
        for process in self._processes.values():
            # the name before may hold anything; behind it the fields count from 3, see proc(5)
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            faults += int(fields[7])
            ticks += int(fields[11]) + int(fields[12])
        return Usage(ticks / os.sysconf("SC_CLK_TCK"), faults)

    def pause(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    def start(self, name: str) -> None:
        """A worker that was killed, anew."""
        self._spawn(name)
        self._all_up()

    def _spawn(self, name: str) -> None:
        program = (*_PROGRAM, str(self._files[name]))
        self._processes[name] = subprocess.Popen(program, env=os.environ)

    def _all_up(self) -> None:
        end = time.monotonic() + _START_S
        while len(self._hellos) < len(self._live):
            self._hear(end)

    def transfer(self, num_tokens: int, *, verify: bool = False, max_tokens: int = 2) -> Request:
        """One prompt from P to D; over when D has answered and P has told what it took."""
        request = self.begin(num_tokens, verify=verify, max_tokens=max_tokens)
        self.until(lambda: request.finished and request.done is not None)
        if verify and request.tokens[0] != request.tokens[1]:
            raise RuntimeError("what D holds is not what P has sent")
        return request

    def begin(
        self,
        num_tokens: int,
        *,
        verify: bool = False,
        max_tokens: int = 2,
        whole: bool = False,
        may_fail: bool = False,
    ) -> Request:
        """``whole`` on D, with no transfer."""
        key = Key(new_request_id(), 0)
        request = self._requests[key] = Request(key, may_fail=may_fail)
        prompt = (3,) * num_tokens
        seed = VERIFY if verify else 0
        params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
        if whole:
            self._place(DECODE, Place(key, Task.WHOLE, prompt, (), params))
            return request
        for name, task, peer in (
            (DECODE, Task.DECODE, PREFILL),
            (PREFILL, Task.PREFILL, DECODE),
        ):
            address = self._hellos[peer].address
            self._place(name, Place(key, task, prompt, (), params, address))
        return request

    def end(self, request: Request) -> None:
        for name, live in self._live.items():
            if request.key in live:
                live.discard(request.key)
                self._say(name, Abort(request.key))

    def until(self, done: Callable[[], bool], limit_s: float = _SILENCE_S) -> None:
        end = time.monotonic() + limit_s
        while not done():
            self._hear(end)

    def listen(self, seconds: float, between: Callable[[], None] | None = None) -> None:
        """Takes what comes for so long; ``between`` is called after each message."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if between is not None:
                between()
            if self._socket.poll(int(left * 1000) + 1):
                self._hear(end)

    def _place(self, name: str, place: Place) -> None:
        self._live[name].add(place.key)
        self._say(name, place)

    def _say(self, name: str, message: ToWorker) -> None:
        self._socket.send_multipart([self._identities[name], TO_WORKER.encode(message)])

    def _hear(self, end: float) -> None:
        while not self._socket.poll(200):
            if any(process.poll() is not None for process in self._processes.values()):
                raise RuntimeError("a worker has ended")
            if time.monotonic() > end:
                raise RuntimeError("the workers are silent")
        identity, data = self._socket.recv_multipart()
        name = identity.decode().partition("@")[0]
        self._take(name, identity, TO_ROUTER.decode(data), time.monotonic())

    def _take(self, name: str, identity: bytes, message: ToRouter, now: float) -> None:
        match message:
            case Hello():
                self._identities[name] = identity
                self._hellos[name] = message
                self._say(name, Welcome(1))
            case Started(key=key):
                self._requests[key].started = True
            case WorkerBeat(links=links, blocks=blocks):
                self.blocks[name] = blocks
                if name == PREFILL:
                    self.links = links
                self._say(name, RouterBeat(tuple(self._live[name])))
            case TokenBatch(items=items):
                for item in items:
                    request = self._requests[item.key]
                    request.tokens[item.index] = item.token_id
                    if name == DECODE:
                        request.times.append(now)
                        if item.finish is not None:
                            request.finished = True
                            self._live[name].discard(item.key)
            case TransferDone(key=key):
                self._requests[key].done = message
                self._live[name].discard(key)
            case AttemptFailed(key=key, text=text):
                if self._requests[key].may_fail:
                    self._requests[key].failed = f"{name}: {text}"
                    self._live[name].discard(key)
                elif key in self._live[name]:
                    raise RuntimeError(f"{name}: {text}")
            case _:
                pass


def specs_of(template: WorkerSpec, devices: tuple[str, str]) -> tuple[WorkerSpec, WorkerSpec]:
    """A prefill worker on the first device, a decode worker on the second."""
    first = replace(template, worker_id=PREFILL, role=Role.PREFILL, device=devices[0])
    second = replace(template, worker_id=DECODE, role=Role.DECODE, device=devices[1])
    return first, second
