"""What the media are measured against, in the same run: bare copies and bare sockets.

Whatever maps, or needs libraries, is done by a process of its own: this module, run with the
name of a job and its arguments as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import zmq

from ..core.codec import Codec
from ..core.config import TransferSection
from ..core.host_pool import HostKvPool
from ..core.ids import Medium
from ..core.plan import KvLayout, KvPool, PeerPool, PoolExport
from .transfer_worker import fill, pool_of

_REPEATS = 7
_TRIPS = 50
_WORD = bytes(150)  # as long as most messages between workers
_PATIENCE_S = 300
_PROGRAM = (sys.executable, "-P", "-m", "pdserve.bench.transfer_floors")
_EXPORT = Codec(PoolExport)


def memcpy_s(num_bytes: int) -> float:
    """The median time of one thread's copy between private, touched arrays."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    return _median(lambda: np.copyto(target, source))


def gpu_copy_s(num_bytes: int, devices: tuple[str, str]) -> float:
    """``copy_`` from one GPU to the other (or within it), in one process."""
    return float(_in_child("gpu_copy", num_bytes, devices))


def _gpu_copy(num_bytes: int, devices: tuple[str, str]) -> float:
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=devices[0])
    target = torch.ones(num_bytes, dtype=torch.uint8, device=devices[1])

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize(devices[0])
        torch.cuda.synchronize(devices[1])

    return _median(run)


def zmq_s(num_bytes: int, frame_bytes: int) -> float:
    """A bare pair of sockets in two processes: so many bytes in frames of the block's size, the
    sender's memory sent as it lies, the receiver's word when all are in. Nothing is copied out."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.linger = 0
    socket.rcvtimeo = _PATIENCE_S * 1000
    socket.bind("tcp://127.0.0.1:*")
    count = max(1, num_bytes // frame_bytes)
    block = np.ones(frame_bytes, np.uint8).data
    with _child("take", socket.get_string(zmq.LAST_ENDPOINT), count, _REPEATS + 1):
        socket.recv()

        def run() -> None:
            for _ in range(count):
                socket.send(block, copy=False)
            socket.recv()

        seconds = _median(run)
    context.destroy(linger=0)
    return seconds


def zmq_streams_s(num_bytes: int, frame_bytes: int, streams: int) -> float:
    """Like ``zmq_s``, by DEALERs to one ROUTER, with as many I/O threads at either end. Each is
    dialled once the one before has been answered: ZeroMQ gives a new connection to the thread that
    has the fewest, and of several that come at once one thread would get all."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=streams)
    count = max(1, num_bytes // frame_bytes)
    block = np.ones(frame_bytes, np.uint8).data
    with _child("take_streams", count, _REPEATS + 1, streams) as child:
        assert child.stdout is not None
        endpoint = child.stdout.readline().strip()
        sockets = []
        for _ in range(streams):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.rcvtimeo = _PATIENCE_S * 1000
            socket.connect(endpoint)
            socket.send(_WORD)
            socket.recv()
            sockets.append(socket)

        def run() -> None:
            for index in range(count):
                sockets[index % streams].send(block, copy=False)
            sockets[0].recv()

        seconds = _median(run)
    context.destroy(linger=0)
    return seconds


def _take_streams(count: int, rounds: int, streams: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=streams)
    router = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    print(router.get_string(zmq.LAST_ENDPOINT), flush=True)
    first = b""
    for _ in range(streams):
        name, word = router.recv_multipart()
        router.send_multipart((name, word))
        first = first or name
    for _ in range(rounds):
        for _ in range(count):
            router.recv_multipart(copy=False)
        router.send_multipart((first, b"all"))
    router.close(linger=1000)
    context.term()


def round_trip_s() -> float:
    """A bare pair of sockets in two processes: a word there and one back. Two such trips (begun,
    granted; offered, complete) are the least that a transfer between two workers can take."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.linger = 0
    socket.rcvtimeo = _PATIENCE_S * 1000
    socket.bind("tcp://127.0.0.1:*")
    rounds = _TRIPS * (_REPEATS + 1)
    with _child("take", socket.get_string(zmq.LAST_ENDPOINT), 1, rounds):
        socket.recv()

        def run() -> None:
            for _ in range(_TRIPS):
                socket.send(_WORD)
                socket.recv()

        seconds = _median(run) / _TRIPS
    context.destroy(linger=0)
    return seconds


def _take(endpoint: str, count: int, rounds: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(endpoint)
    socket.send(b"ready")
    for _ in range(rounds):
        for _ in range(count):
            socket.recv(copy=False)
        socket.send(b"all")
    socket.close(linger=1000)
    context.term()


def pull(
    layout: KvLayout, devices: tuple[str, str], medium: Medium, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """A peer's pool copied from, and nothing else, ``sizes`` blocks at a time: two processes,
    blocks that follow each other and blocks that are scattered."""
    with _child("show", asdict(layout), devices[0], medium) as child:
        assert child.stdout is not None
        export = child.stdout.readline().strip()
        if export in ("", "none"):
            raise RuntimeError("the pool can't be shown to another process")
        rows: list[dict[str, Any]] = _in_child(
            "pull", asdict(layout), devices[1], medium, export, list(sizes)
        )
    return rows


def _show(layout: dict[str, Any], device: str, medium: str) -> None:
    pool = pool_of(KvLayout(**layout), device, TransferSection(medium=Medium(medium)))
    fill(pool)
    print(_EXPORT.encode(pool.exports[0]).hex() if pool.exports else "none")
    sys.stdout.flush()
    sys.stdin.read()
    pool.close()


def _pull(
    shape: dict[str, Any], device: str, medium: str, export: str, sizes: list[int]
) -> list[dict[str, Any]]:
    layout = KvLayout(**shape)
    pool = pool_of(layout, device, TransferSection(medium=Medium.TCP))
    if isinstance(pool, HostKvPool):
        pool.bytes.fill(1)
    peer = pool.attach(_EXPORT.decode(bytes.fromhex(export)))
    rng = np.random.default_rng(5)
    rows = []
    for count in sizes:
        in_a_row = list(range(count))
        scattered = [rng.permutation(layout.num_blocks)[:count].tolist() for _ in range(2)]
        for order, (theirs, ours) in (
            ("in a row", (in_a_row, in_a_row)),
            ("scattered", scattered),
        ):
            seconds = _median(lambda theirs=theirs, ours=ours: peer.copy(theirs, ours))  # type: ignore[misc]
            _check(pool, peer, theirs, ours)
            size = count * layout.block_bytes
            rows.append(
                {
                    "medium": medium,
                    "blocks": order,
                    "tokens": count * layout.block_size,
                    "bytes": size,
                    "ms": seconds * 1000,
                    "gb_s": size / seconds / 1e9,
                }
            )
    peer.close()
    pool.close()
    return rows


def _check(pool: KvPool, peer: PeerPool, theirs: list[int], ours: list[int]) -> None:
    """Each block bears the number that it has in the peer's pool."""
    for block, source in zip(pool.read(ours), theirs, strict=True):
        assert int.from_bytes(block[:8], "little") == source, source
        assert int.from_bytes(block[-8:], "little") == source, source


def _median(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def _child(job: str, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        (*_PROGRAM, job, json.dumps(arguments)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
        child.communicate(timeout=_PATIENCE_S)  # closes its input: it ends
    finally:
        child.kill()
        child.wait()


def _in_child(job: str, *arguments: Any) -> Any:
    """The answer of a job; RuntimeError where it has none (its words are on stderr)."""
    done = subprocess.run(
        (*_PROGRAM, job, json.dumps(arguments)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{job} has failed")
    return json.loads(done.stdout)


_JOBS: dict[str, Callable[..., object]] = {
    "gpu_copy": _gpu_copy,
    "pull": _pull,
    "show": _show,
    "take": _take,
    "take_streams": _take_streams,
}

if __name__ == "__main__":
    found = _JOBS[sys.argv[1]](*json.loads(sys.argv[2]))
    if found is not None:
        print(json.dumps(found))
