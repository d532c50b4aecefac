"""Real worker processes with the simulated engine, and a router of a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from served import command, deployment, environment

from pdserve.core.card import ModelCard
from pdserve.core.ids import Medium, Role, Task, new_request_id
from pdserve.core.messages import (
    TO_ROUTER,
    TO_WORKER,
    Abort,
    AttemptFailed,
    Bye,
    Drain,
    FailureKind,
    Hello,
    Key,
    PeerLink,
    Place,
    Refused,
    RouterBeat,
    TokenBatch,
    ToRouter,
    ToWorker,
    Welcome,
    WorkerBeat,
)
from pdserve.core.params import SamplingParams
from pdserve.core.shared_memory import FOLDER
from pdserve.simulation.engine import SimulatedModel

MODEL = SimulatedModel(vocab_size=512, eos_token_ids=(0,))
LIMIT_S = 60.0  # a moment on an idle machine
FILE = """
model: {path: none}
engine: simulated
kv: {memory: 1MiB}
kv_transfer: {medium: %s, lease_s: %g}
"""


class Workers:
    """A router's socket, and the processes that have joined it."""

    def __init__(self, folder: Path, medium: str = "auto", lease_s: float = 10.0) -> None:
        self._file = deployment(folder, FILE % (medium, lease_s))
        self._card = folder / "card.json"
        ModelCard("none", str(folder), "f" * 32, "simulated", 512, 1024, (0,)).save(self._card)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._endpoint = f"ipc://{folder}/control.sock"
        self._socket.bind(self._endpoint)
        self._identities: dict[str, bytes] = {}
        self.hellos: dict[str, Hello] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.live: dict[str, list[Key]] = {}
        self.links: dict[str, tuple[PeerLink, ...]] = {}

    def start(self, role: Role) -> str:
        name = f"{role}-0"
        arguments = ("worker", str(self._file), "--role", role.value, "--id", name)
        return self._start(
            name, command(*arguments, "--join", self._endpoint, "--card", str(self._card))
        )

    def start_hanging(self, gate: Path) -> str:
        """One whose steps hang while that file is there."""
        arguments = (self._file, self._card, "hanging-0", self._endpoint, gate)
        program = Path(__file__).parents[1] / "helpers" / "hanging_worker.py"
        return self._start("hanging-0", [sys.executable, str(program), *map(str, arguments)])

    def _start(self, name: str, program: list[str]) -> str:
        self.processes[name] = subprocess.Popen(program, env=environment())
        self.live[name] = []
        self.until(lambda who, message: who == name and isinstance(message, Hello))
        return name

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._socket.close(linger=0)
        self._context.term()

    def tell(self, name: str, message: ToWorker) -> None:
        self._socket.send_multipart([self._identities[name], TO_WORKER.encode(message)])

    def hear(self, limit_s: float = LIMIT_S) -> tuple[str, ToRouter]:
        """The next message of a worker, answered as a router does."""
        assert self._socket.poll(int(limit_s * 1000)), "silence"
        identity, data = self._socket.recv_multipart()
        message = TO_ROUTER.decode(data)
        name = identity.decode().partition("@")[0]
        if isinstance(message, Hello):
            self._identities[name] = identity
            self.hellos[name] = message
            self.tell(name, Welcome(1))
        elif isinstance(message, WorkerBeat):
            self.tell(name, RouterBeat(tuple(self.live[name])))
            self.links[name] = message.links
        return name, message

    def until_silent(self, silence_s: float) -> None:
        """Hears messages until there are none for so long."""
        end = time.monotonic() + LIMIT_S
        while self._socket.poll(int(silence_s * 1000)):
            assert time.monotonic() < end, "it speaks on"
            self.hear()

    def until(self, wanted: Callable[[str, ToRouter], bool]) -> None:
        """Hears messages until one is wanted."""
        end = time.monotonic() + LIMIT_S
        while not wanted(*self.hear(end - time.monotonic())):
            pass

    def place(self, name: str, task: Task, key: Key, num_prompt: int, peer: str | None) -> Place:
        place = Place(
            key,
            task,
            tuple(range(1, num_prompt + 1)),
            (),
            SamplingParams(max_tokens=24, temperature=0.0),
            self.hellos[peer].address if peer is not None else None,
        )
        self.live[name].append(key)
        self.tell(name, place)
        return place

    def answer(self, key: Key) -> dict[int, int]:
        """The tokens of a request by index, until the last."""
        tokens: dict[int, int] = {}
        while True:
            _, message = self.hear()
            assert not isinstance(message, AttemptFailed), message
            if isinstance(message, TokenBatch):
                for item in message.items:
                    if item.key == key:
                        assert tokens.setdefault(item.index, item.token_id) == item.token_id
                        if item.finish is not None:
                            return tokens

    def at_rest(self, name: str) -> None:
        self.until(
            lambda who, message: (
                who == name and isinstance(message, WorkerBeat) and not message.blocks.held
            )
        )


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    made.close()


def expected(place: Place) -> list[int]:
    return MODEL.expected_tokens(place.prompt, (), place.params, place.params.max_tokens)


def key() -> Key:
    return Key(new_request_id(), 0)


@pytest.fixture(params=[("auto", Medium.SHM), ("tcp", Medium.TCP)], ids=["auto", "tcp"])
def split_workers(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Workers, Medium]]:
    wanted, used = request.param
    made = Workers(tmp_path, wanted)
    yield made, used
    made.close()


def test_two_processes_write_what_one_would(split_workers: tuple[Workers, Medium]) -> None:
    workers, medium = split_workers
    prefill, decode = workers.start(Role.PREFILL), workers.start(Role.DECODE)
    for num_prompt in (1, 16, 300):
        split = key()
        workers.place(decode, Task.DECODE, split, num_prompt, prefill)
        place = workers.place(prefill, Task.PREFILL, split, num_prompt, decode)
        tokens = workers.answer(split)
        assert [tokens[index] for index in sorted(tokens)] == expected(place)
        for name in (prefill, decode):
            workers.live[name].clear()
        whole = key()
        place = workers.place(decode, Task.WHOLE, whole, num_prompt, None)
        tokens = workers.answer(whole)
        assert [tokens[index] for index in sorted(tokens)] == expected(place)
        workers.live[decode].clear()
    for name in (prefill, decode):
        workers.at_rest(name)
    assert workers.links == {prefill: (PeerLink(decode, medium),), decode: ()}


def test_a_peer_that_is_killed_is_noticed_and_its_memory_let_go(tmp_path: Path) -> None:
    """D has mapped P's pool. P dies; D says so long before a lease is over, and a new P finds
    nothing left of the old one."""
    workers = Workers(tmp_path, lease_s=10 * LIMIT_S)
    try:
        _a_peer_is_killed(workers)
    finally:
        workers.close()


def _a_peer_is_killed(workers: Workers) -> None:
    prefill, decode = workers.start(Role.PREFILL), workers.start(Role.DECODE)
    split = key()
    workers.place(decode, Task.DECODE, split, 40, prefill)
    workers.place(prefill, Task.PREFILL, split, 40, decode)
    workers.answer(split)
    left = key()
    workers.place(decode, Task.DECODE, left, 40, prefill)
    workers.processes[prefill].kill()
    failed: list[ToRouter] = []
    workers.until(
        lambda _, message: isinstance(message, AttemptFailed) and not failed.append(message)
    )
    assert [message.kind for message in failed] == [FailureKind.PEER_LOST]  # type: ignore[union-attr]
    mine = f"pdserve-{os.getuid()}-*"
    left_behind = set(FOLDER.glob(mine))
    workers.start(Role.PREFILL)
    assert left_behind - set(FOLDER.glob(mine))
    again = key()
    workers.live[decode].remove(left)
    workers.place(decode, Task.DECODE, again, 40, prefill)
    place = workers.place(prefill, Task.PREFILL, again, 40, decode)
    tokens = workers.answer(again)
    assert [tokens[index] for index in sorted(tokens)] == expected(place)


@pytest.mark.parametrize("medium", ["shm", "tcp"])
def test_a_receiver_that_is_killed_or_stopped_holds_up_nobody_else(
    tmp_path: Path, medium: str
) -> None:
    """P gives up what was meant for it, and has its blocks back; then D goes on, or is new."""
    workers = Workers(tmp_path, medium, lease_s=2.0)
    try:
        prefill, decode = workers.start(Role.PREFILL), workers.start(Role.DECODE)
        process = workers.processes[decode]
        for stroke in (signal.SIGSTOP, signal.SIGKILL):
            process.send_signal(stroke)
            for _ in range(3):
                workers.place(prefill, Task.PREFILL, key(), 300, decode)
            num_failed = [0]

            def all_failed(_: str, message: ToRouter, num_failed: list[int] = num_failed) -> bool:
                num_failed[0] += isinstance(message, AttemptFailed)
                return num_failed[0] == 3

            workers.until(all_failed)
            workers.live[prefill].clear()
            workers.at_rest(prefill)
            if stroke == signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
        process.wait()
        workers.start(Role.DECODE)
        split = key()
        workers.live[decode].clear()
        workers.place(decode, Task.DECODE, split, 300, prefill)
        place = workers.place(prefill, Task.PREFILL, split, 300, decode)
        tokens = workers.answer(split)
        assert [tokens[index] for index in sorted(tokens)] == expected(place)
    finally:
        workers.close()


def test_a_signal_ends_it_with_goodbye(workers: Workers) -> None:
    name = workers.start(Role.MIXED)
    workers.processes[name].send_signal(signal.SIGTERM)
    workers.until(lambda _, message: isinstance(message, Bye))
    assert workers.processes[name].wait(LIMIT_S) == 0


def test_drained_it_finishes_first(workers: Workers) -> None:
    name = workers.start(Role.MIXED)
    whole = key()
    place = workers.place(name, Task.WHOLE, whole, 200, None)
    workers.tell(name, Drain())
    tokens = workers.answer(whole)
    assert [tokens[index] for index in sorted(tokens)] == expected(place)
    workers.until(lambda _, message: isinstance(message, Bye))
    assert workers.processes[name].wait(LIMIT_S) == 0


def test_declared_dead_it_comes_back_as_another(workers: Workers) -> None:
    name = workers.start(Role.MIXED)
    first = workers.hellos[name]
    workers.tell(name, Refused("it was silent for too long", rejoin=True))
    workers.until(lambda *_: workers.hellos[name] != first)
    again = workers.hellos[name]
    assert again.pid == first.pid
    assert again.address.epoch != first.address.epoch
    assert again.address.token != first.address.token
    whole = key()
    place = workers.place(name, Task.WHOLE, whole, 50, None)
    assert list(workers.answer(whole).values()) == expected(place)


def test_refused_for_good_it_says_why(workers: Workers) -> None:
    name = workers.start(Role.MIXED)
    workers.tell(name, Refused("another model"))
    assert workers.processes[name].wait(LIMIT_S) == 1


def test_what_the_router_does_not_list_is_over(workers: Workers) -> None:
    name = workers.start(Role.DECODE)
    workers.place(name, Task.DECODE, key(), 50, name)
    workers.live[name].clear()
    workers.until(lambda _, message: isinstance(message, WorkerBeat) and not message.live)


def test_stopped_and_continued_it_still_answers(workers: Workers) -> None:
    name = workers.start(Role.MIXED)
    os.kill(workers.processes[name].pid, signal.SIGSTOP)
    whole = key()
    place = workers.place(name, Task.WHOLE, whole, 50, None)
    workers.tell(name, Abort(key()))
    os.kill(workers.processes[name].pid, signal.SIGCONT)
    assert list(workers.answer(whole).values()) == expected(place)


def test_a_worker_whose_step_hangs_falls_silent_until_it_goes_on(
    workers: Workers, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    name = workers.start_hanging(gate)
    workers.at_rest(name)
    gate.touch()
    whole = key()
    place = workers.place(name, Task.WHOLE, whole, 50, None)
    workers.until_silent(1.5)  # three beats
    gate.unlink()
    tokens = workers.answer(whole)
    assert [tokens[index] for index in sorted(tokens)] == expected(place)
