"""Blocks by reference: D's end of ``shm`` and ``cuda_ipc``, on a thread of its own.

    attach   a peer's pool is mapped when the peer connects, or the reason why it can't be
    pull     its blocks are copied into ours; the copy counts if the generations still hold
             once it is complete
    detach   the peer has gone: what is being copied ends, then its pool is unmapped

Whatever the medium, copying is ``PeerPool.begin`` and a wait. While the thread has nothing to do,
the I/O thread begins a copy itself: a GPU is at it while the thread wakes up to wait for it. Pulls
of one peer that wait together are one copy. The I/O thread waits for none of this: it takes the
results. A few blocks of shared memory it copies itself: that takes less time than to wake another
thread and be woken.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import xxhash

from ...core.errors import HandshakeRefused
from ...core.ids import Medium, WorkerRef
from ...core.plan import KvPool, PeerPool, PoolExport
from ..effects import Pull
from .events import Written
from .results import Results

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20  # of shared memory, that the I/O thread copies by the way
CHECK_S = 0.2  # how often a peer's process is looked for
_STUCK_AFTER_S = 30.0


class _Mapping:
    """A peer's pool, as of its handshake."""

    def __init__(self, export: PoolExport, pool: PeerPool) -> None:
        self.export = export
        self.pool = pool


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A pull, begun where there is a ``wait``; without a pull, the peer's pool is unmapped."""

    mapping: _Mapping
    pull: Pull | None = None
    wait: Callable[[], None] | None = None


class Puller:
    """All pools of peers that this worker has mapped. Every call comes from the I/O thread."""

    def __init__(self, pool: KvPool, results: Results[Any]) -> None:
        """Each pull ends with a Written in ``results``."""
        self._pool = pool
        self._results = results
        self._mappings: dict[WorkerRef, _Mapping] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_given = 0  # jobs; counted by the I/O thread
        self._num_done = 0  # counted by the other one
        self._thread: threading.Thread | None = None
        self._check_at = 0.0

    def attach(self, peer: WorkerRef, export: PoolExport) -> str | None:
        """Maps the peer's pool; what is wrong where that can't be. Said again, it costs nothing."""
        mapping = self._mappings.get(peer)
        if mapping is not None and mapping.export == export:
            return None
        try:
            pool = self._pool.attach(export)
        except HandshakeRefused as error:
            log.info("%s can't be read by %s: %s", peer, export.medium, error)
            return str(error)
        self.detach(peer)
        self._mappings[peer] = _Mapping(export, pool)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="puller", daemon=True)
            self._thread.start()
        return None

    def pull(self, pull: Pull) -> list[Written]:
        """Begins it; its result comes later, or here where there is nothing to do."""
        mapping = self._mappings.get(pull.peer)
        if mapping is None or max(pull.theirs) >= mapping.export.num_blocks:
            log.warning("%s: %s has offered blocks that it does not show", pull.attempt, pull.peer)
            return [Written(pull.attempt, pull.first_block, ok=False)]
        num_bytes = len(pull.blocks) * self._pool.layout.block_bytes
        if mapping.export.medium is Medium.SHM and num_bytes <= SMALL_BYTES:
            return self._copy(mapping, [pull])
        idle = self._num_done == self._num_given
        wait = mapping.pool.begin(pull.theirs, pull.blocks) if idle else None
        self._give(_Job(mapping, pull, wait))
        return []

    def detach(self, peer: WorkerRef) -> None:
        """Unmaps the peer's pool, once what has begun is over."""
        mapping = self._mappings.pop(peer, None)
        if mapping is not None:
            self._give(_Job(mapping))

    def gone(self, now: float) -> list[WorkerRef]:
        """The peers whose process has ended since the last call: they are to be detached."""
        if not self._mappings or now < self._check_at:
            return []
        self._check_at = now + CHECK_S
        return [peer for peer, mapping in self._mappings.items() if mapping.pool.owner_gone]

    def close(self) -> None:
        """Waits for the copy under way, and unmaps everything."""
        for peer in list(self._mappings):
            self.detach(peer)
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_STUCK_AFTER_S)
            assert not self._thread.is_alive(), "a copy hangs"

    def _give(self, job: _Job) -> None:
        self._num_given += 1
        self._jobs.put(job)

    # the thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 (raised again by the I/O thread)
            self._results.put(error)

    def _turn(self) -> bool:
        """Does what waits, in order; False at the end."""
        jobs = [self._jobs.get()]
        while True:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        for first, same in groupby(jobs, key=_one_copy):
            if first is None:
                return False
            mapping, _, wait = first
            pulls = [job.pull for job in same if job is not None and job.pull is not None]
            if pulls:
                for written in self._copy(mapping, pulls, wait):
                    self._results.put(written)
            else:
                mapping.pool.close()
            self._num_done += max(1, len(pulls))
        return True

    def _copy(
        self, mapping: _Mapping, pulls: list[Pull], wait: Callable[[], None] | None = None
    ) -> list[Written]:
        if wait is None:
            theirs = [block for pull in pulls for block in pull.theirs]
            ours = [block for pull in pulls for block in pull.blocks]
            wait = mapping.pool.begin(theirs, ours)
        wait()
        return [
            Written(pull.attempt, pull.first_block, self._counts(mapping, pull)) for pull in pulls
        ]

    def _counts(self, mapping: _Mapping, pull: Pull) -> bool:
        """Whether what was copied is what was offered."""
        if not mapping.pool.generations.are(pull.theirs, pull.generations):
            log.info("%s: %s had taken its blocks back", pull.attempt, pull.peer)
            return False
        if not pull.checksums:
            return True
        found = tuple(xxhash.xxh3_64_intdigest(view) for view in self._pool.read(pull.blocks))
        if found != pull.checksums:
            log.warning("%s: a block came in damaged", pull.attempt)
        return found == pull.checksums


def _one_copy(job: _Job | None) -> tuple[_Mapping, bool, Callable[[], None] | None] | None:
    """Jobs that follow each other and have the same of this are one."""
    return None if job is None else (job.mapping, job.pull is not None, job.wait)
