"""Blocks by value, where their bytes are touched: on threads beside the I/O thread.

    prepare   P's blocks are read (from a device into pinned memory), hashed, and cut into
              frames; the sockets send these as they lie, without another copy
    write     D's frames are checked and copied into blocks of its pool

The arithmetic is done in libraries that leave the interpreter to others meanwhile, so with
several threads several chunks are hashed and copied at once. What is small is done by the I/O
thread itself: passing it on and back would take longer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import xxhash

from ...core.host_pool import whole_blocks
from ...core.plan import KvPool
from ..effects import SendBlocks, Write
from ..messages import TO_RECEIVER, Chunk
from ..settings import FRAME_BYTES
from .events import Written
from .results import Results

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is ready for the socket. The frames are the blocks' own memory, or a copy of it."""

    effect: SendBlocks
    head: bytes
    frames: tuple[memoryview, ...]


class Copier:
    """``num_threads`` of them; results come in any order."""

    def __init__(
        self,
        pool: KvPool,
        results: Results[Written | Prepared],
        num_threads: int,
        *,
        checksums: bool,
        checksum_offers: bool,
    ) -> None:
        self._pool = pool
        self._results = results
        self._checksums = checksums
        self._checksum_offers = checksum_offers
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="copier")

    def prepare(self, effect: SendBlocks) -> Prepared | None:
        """None where it comes as a result; here where there is little to do."""
        untouched = not isinstance(effect.message, Chunk) and not self._checksum_offers
        if untouched or self._small(effect.blocks):
            return self._prepare(effect)
        self._do(lambda: self._prepare(effect))
        return None

    def write(self, effect: Write) -> Written | None:
        """None where it comes as a result."""
        if self._small(effect.blocks):
            return self._write(effect)
        self._do(lambda: self._write(effect))
        return None

    def close(self) -> None:
        """Waits for what is being done, and does no more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _small(self, blocks: Sequence[int]) -> bool:
        return len(blocks) * self._pool.layout.block_bytes <= SMALL_BYTES

    def _do(self, job: Callable[[], Written | Prepared]) -> None:
        def run() -> None:
            try:
                self._results.put(job())
            except BaseException as error:  # noqa: BLE001 (raised again by the I/O thread)
                self._results.put(error)

        self._threads.submit(run)

    def _prepare(self, effect: SendBlocks) -> Prepared:
        if effect.tail_tokens:
            self._pool.zero_tail(effect.blocks[-1], effect.tail_tokens)
        message = effect.message
        by_value = isinstance(message, Chunk)
        checked = self._checksums if by_value else self._checksum_offers
        block_bytes = self._pool.layout.block_bytes
        views = self._pool.read_runs(effect.blocks) if by_value or checked else []
        if checked:
            blocks = whole_blocks(views, block_bytes)
            checksums = tuple(xxhash.xxh3_64_intdigest(block) for block in blocks)
            message = replace(message, checksums=checksums)
        frames = tuple(frame for view in views for frame in cut(view, block_bytes))
        if not by_value:
            frames = ()
        return Prepared(effect, TO_RECEIVER.encode(message), frames)

    def _write(self, effect: Write) -> Written:
        count = len(effect.frames) // len(effect.blocks)
        ok = not effect.checksums or effect.checksums == tuple(
            _checksum(effect.frames[start : start + count])
            for start in range(0, len(effect.frames), count)
        )
        if ok:
            self._pool.write(effect.blocks, effect.frames)
        else:
            log.warning("%s: a block came in damaged", effect.attempt)
        return Written(effect.attempt, effect.first_block, ok)


def num_threads_for(num_streams: int) -> int:
    """One a stream, and on a large host a few in any case."""
    return max(num_streams, min(4, (os.cpu_count() or 1) // 4))


def cut(view: memoryview, block_bytes: int) -> list[memoryview]:
    """Whole blocks that lie one behind the other, as the frames that they travel in."""
    if block_bytes <= FRAME_BYTES:
        return whole_blocks([view], FRAME_BYTES // block_bytes * block_bytes)
    return [
        piece
        for block in whole_blocks([view], block_bytes)
        for piece in whole_blocks([block], FRAME_BYTES)
    ]


def _checksum(frames: Sequence[memoryview]) -> int:
    if len(frames) == 1:
        return xxhash.xxh3_64_intdigest(frames[0])
    hashed = xxhash.xxh3_64()
    for frame in frames:
        hashed.update(frame)
    return hashed.intdigest()
