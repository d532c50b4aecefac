"""Blocks by reference: mapped, copied beside the I/O thread, and counted only if they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import xxhash
import zmq
from kv_parts import attempt

from pdserve.core.errors import HandshakeRefused
from pdserve.core.generations import Generations
from pdserve.core.ids import Medium, WorkerRef
from pdserve.core.plan import PeerPool, PoolExport
from pdserve.kvtransfer.effects import Pull
from pdserve.kvtransfer.media.events import Written
from pdserve.kvtransfer.media.puller import CHECK_S, Puller
from pdserve.kvtransfer.media.results import Results
from pdserve.simulation.engine import SimulatedKvPool

A, P = attempt(1), WorkerRef("p", 1)
EXPORT = PoolExport(Medium.CUDA_IPC, "name", bytes(16), 32)


class Mapped:
    """A peer's pool whose copies wait until they are let go, one by one."""

    def __init__(self) -> None:
        self.generations = Generations.private(EXPORT.num_blocks)
        self.owner_gone = False
        self.go = threading.Semaphore(0)
        self.begun: list[tuple[int, ...]] = []
        self.begun_by: list[str] = []  # names of threads
        self.waiting = threading.Event()
        self.closed = threading.Event()
        self.error: Exception | None = None

    def begin(self, theirs: Sequence[int], ours: Sequence[int]) -> Callable[[], None]:
        assert not self.closed.is_set()
        self.begun.append(tuple(theirs))
        self.begun_by.append(threading.current_thread().name)
        return self.wait

    def copy(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        self.begin(theirs, ours)()

    def wait(self) -> None:
        self.waiting.set()
        assert self.go.acquire(timeout=10)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed.set()


class Pool(SimulatedKvPool):
    def __init__(self) -> None:
        super().__init__(32, 4, 16)
        self.mapped = Mapped()
        self.num_attached = 0

    def attach(self, export: PoolExport) -> PeerPool:
        if export.name == "missing":
            raise HandshakeRefused("no such pool")
        self.num_attached += 1
        return self.mapped


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def results() -> Iterator[Results[Written]]:
    made: Results[Written] = Results()
    yield made
    made.close()


@pytest.fixture
def puller(pool: Pool, results: Results[Written]) -> Iterator[Puller]:
    made = Puller(pool, results)
    yield made
    for _ in range(100):
        pool.mapped.go.release()
    made.close()


def pull_of(pool: Pool, first: int, *theirs: int, checksums: tuple[int, ...] = ()) -> Pull:
    ours = tuple(range(len(theirs)))
    generations = pool.mapped.generations.of([block % 32 for block in theirs])
    return Pull(A, P, first, ours, theirs, generations, checksums)


def taken(results: Results[Written], count: int) -> list[Written]:
    poller = zmq.Poller()
    poller.register(results.fileno(), zmq.POLLIN)
    found: list[Written] = []
    while len(found) < count:
        assert poller.poll(10_000)
        found += results.take()
    return found


def test_a_copy_that_is_overtaken_does_not_count(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    """The order is: P hands the block out anew, D's copy ends, D looks at the generation."""
    assert puller.attach(P, EXPORT) is None
    assert puller.pull(pull_of(pool, 0, 5, 6)) == []
    pool.mapped.generations.bump([6])
    pool.mapped.go.release()
    assert taken(results, 1) == [Written(A, 0, ok=False)]
    puller.pull(pull_of(pool, 0, 5, 6))
    pool.mapped.go.release()
    assert taken(results, 1) == [Written(A, 0, ok=True)]


def test_a_few_blocks_of_shared_memory_are_copied_at_once(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, replace(EXPORT, medium=Medium.SHM))
    pool.mapped.go.release()
    assert puller.pull(pull_of(pool, 0, 5, 6)) == [Written(A, 0, ok=True)]
    overtaken = pull_of(pool, 2, 5, 6)
    pool.mapped.generations.bump([6])
    pool.mapped.go.release()
    assert puller.pull(overtaken) == [Written(A, 2, ok=False)]
    assert results.take() == []


def test_what_waits_together_is_one_copy(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    puller.pull(pull_of(pool, 0, 1))
    assert pool.mapped.waiting.wait(10)
    for first, block in ((1, 2), (2, 3), (3, 9)):
        puller.pull(pull_of(pool, first, block))
    pool.mapped.go.release()
    pool.mapped.go.release()
    found = taken(results, 4)
    assert pool.mapped.begun == [(1,), (2, 3, 9)]
    assert [written.first_block for written in found] == [0, 1, 2, 3]


def test_a_copy_is_begun_by_who_asks_for_it_unless_another_is_under_way(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    """A GPU is at it then while the thread wakes up; its wait is the thread's."""
    puller.attach(P, EXPORT)
    puller.pull(pull_of(pool, 0, 1))
    assert pool.mapped.begun == [(1,)] and results.take() == []
    puller.pull(pull_of(pool, 1, 2))
    pool.mapped.go.release()
    pool.mapped.go.release()
    assert [written.first_block for written in taken(results, 2)] == [0, 1]
    assert pool.mapped.begun_by == [threading.current_thread().name, "puller"]


def test_a_peer_that_goes_is_unmapped_after_its_last_copy(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    puller.pull(pull_of(pool, 0, 1))
    puller.detach(P)
    assert not pool.mapped.closed.wait(0.05)
    assert puller.pull(pull_of(pool, 1, 2)) == [Written(A, 1, ok=False)]  # mapped no more
    pool.mapped.go.release()
    assert taken(results, 1) == [Written(A, 0, ok=True)]
    assert pool.mapped.closed.wait(10)


def test_the_same_pool_is_mapped_once(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    for _ in range(3):
        assert puller.attach(P, EXPORT) is None
    assert pool.num_attached == 1
    assert puller.attach(P, replace(EXPORT, name="another")) is None
    assert pool.num_attached == 2 and pool.mapped.closed.wait(10)


def test_a_pool_that_is_not_there_is_told(puller: Puller) -> None:
    assert puller.attach(P, replace(EXPORT, name="missing")) == "no such pool"
    assert not puller.gone(0.0)


def test_blocks_past_the_peers_pool_are_not_read(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    assert puller.pull(pull_of(pool, 0, 3, 32)) == [Written(A, 0, ok=False)]
    assert pool.mapped.begun == []


def test_checksums_are_of_what_has_arrived(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    right = xxhash.xxh3_64_intdigest(bytes(pool.layout.block_bytes))
    for checksum, ok in ((right, True), (right ^ 1, False)):
        puller.pull(pull_of(pool, 0, 3, checksums=(checksum,)))
        pool.mapped.go.release()
        assert taken(results, 1) == [Written(A, 0, ok)]


def test_a_process_that_has_ended_is_noticed(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    assert puller.gone(1.0) == []
    pool.mapped.owner_gone = True
    assert puller.gone(1.0 + CHECK_S / 2) == []
    assert puller.gone(1.0 + CHECK_S) == [P]


def test_what_the_copy_fails_with_is_raised(
    puller: Puller, pool: Pool, results: Results[Written]
) -> None:
    puller.attach(P, EXPORT)
    pool.mapped.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    puller.pull(pull_of(pool, 0, 3))
    pool.mapped.go.release()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        taken(results, 1)
