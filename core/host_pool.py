"""A KV pool in the host's memory, which peers on the same host may read by themselves.

Private memory, or shared: then the file holds the generations of the blocks first and,
from the next page on, the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import HandshakeRefused, OutOfMemory
from .generations import Generations
from .ids import Medium
from .plan import KvLayout, PeerPool, PoolExport
from .shared_memory import SharedMemory

Bytes: TypeAlias = npt.NDArray[np.uint8]
_PAGE = 4096


def table_bytes(num_blocks: int) -> int:
    """Of the generations of so many blocks, in whole pages."""
    return -(-8 * num_blocks // _PAGE) * _PAGE


def generations_in(memory: SharedMemory, num_blocks: int) -> Generations:
    return Generations(memory.view[: 8 * num_blocks].cast("Q"))


def runs(theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pairs of blocks as (first of theirs, first of ours, how many follow each other in both)."""
    start = 0
    for end in range(1, len(theirs) + 1):
        if (
            end == len(theirs)
            or theirs[end] != theirs[end - 1] + 1
            or ours[end] != ours[end - 1] + 1
        ):
            yield theirs[start], ours[start], end - start
            start = end


def by_block(blocks: Sequence[int], data: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    """The pieces of each block."""
    count = len(data) // len(blocks)
    assert count * len(blocks) == len(data), (len(blocks), len(data))
    for start in range(0, len(data), count):
        yield data[start : start + count]


def whole_blocks(views: Iterable[memoryview], block_bytes: int) -> list[memoryview]:
    """Each view of several blocks as one view a block; what is shorter stays as it is."""
    return [
        view[start : start + block_bytes]
        for view in views
        for start in range(0, max(1, view.nbytes), block_bytes)
    ]


def join(pieces: Sequence[memoryview], target: Bytes) -> None:
    """Fills ``target[block_bytes]``."""
    at = 0
    for piece in pieces:
        target[at : at + piece.nbytes] = np.frombuffer(piece, np.uint8)
        at += piece.nbytes
    assert at == target.nbytes, (at, target.nbytes)


class HostKvPool:
    """``core.plan.KvPool`` in host memory. What is read are views of the blocks themselves.

    OutOfMemory where the host has not so much memory, or not so much ``shared``.
    """

    def __init__(self, layout: KvLayout, *, shared: bool = False) -> None:
        self._layout = layout
        num_blocks, size = layout.num_blocks, layout.block_bytes
        self._memory: SharedMemory | None = None
        if shared:
            table = table_bytes(num_blocks)
            self._memory = SharedMemory.create(table + num_blocks * size)
            self._generations = generations_in(self._memory, num_blocks)
            flat = np.frombuffer(self._memory.view[table:], np.uint8)
        else:
            try:
                self._generations = Generations.private(num_blocks)
                flat = np.zeros(num_blocks * size, np.uint8)  # not taken until it is touched
            except MemoryError as error:
                raise OutOfMemory(
                    f"this host has no {num_blocks * size / 2**30:.1f} GiB for the KV cache; "
                    "lower kv.memory"
                ) from error
        self.bytes: Bytes = flat.reshape(num_blocks, size)
        """``[num_blocks, block_bytes]``"""

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def generations(self) -> Generations:
        return self._generations

    @property
    def exports(self) -> tuple[PoolExport, ...]:
        memory = self._memory
        if memory is None:
            return ()
        return (PoolExport(Medium.SHM, memory.name, memory.nonce, self._layout.num_blocks),)

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        return [memoryview(self.bytes[block]) for block in blocks]

    def read_runs(self, blocks: Sequence[int]) -> list[memoryview]:
        return [
            self.bytes[start : start + count].reshape(-1).data
            for start, _, count in runs(blocks, range(len(blocks)))
        ]

    def write(self, blocks: Sequence[int], data: Sequence[memoryview]) -> None:
        for block, pieces in zip(blocks, by_block(blocks, data), strict=True):
            join(pieces, self.bytes[block])

    def zero_tail(self, block: int, num_tokens: int) -> None:
        layout = self._layout
        rows = self.bytes[block].reshape(-1, layout.block_size, self._row_bytes)
        rows[:, num_tokens:] = 0

    def attach(self, export: PoolExport) -> PeerPool:
        if export.medium is not Medium.SHM:
            raise HandshakeRefused(f"this pool is in the host's memory: no {export.medium}")
        return _MappedHostPool(self, export)

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()

    @property
    def _row_bytes(self) -> int:
        """Of one token in one layer's keys or values of one head."""
        layout = self._layout
        return layout.block_bytes // (
            layout.num_layers * 2 * layout.num_kv_heads * layout.block_size
        )


class _MappedHostPool:
    """``core.plan.PeerPool``: a peer's shared memory, mapped to be read."""

    def __init__(self, pool: HostKvPool, export: PoolExport) -> None:
        self._ours = pool.bytes
        size, self._num_blocks = pool.layout.block_bytes, export.num_blocks
        table = table_bytes(export.num_blocks)
        num_bytes = table + export.num_blocks * size
        self._memory = SharedMemory.attach(export.name, export.nonce, num_bytes)
        self._generations = generations_in(self._memory, export.num_blocks)
        flat: npt.NDArray[Any] = np.frombuffer(self._memory.view[table:], np.uint8)
        self._theirs: Bytes = flat.reshape(export.num_blocks, size)

    @property
    def generations(self) -> Generations:
        return self._generations

    @property
    def owner_gone(self) -> bool:
        return self._memory.owner_gone

    def begin(self, theirs: Sequence[int], ours: Sequence[int]) -> Callable[[], None]:
        """Who waits copies."""
        return partial(self.copy, theirs, ours)

    def copy(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        for source, target, count in runs(theirs, ours):
            np.copyto(self._ours[target : target + count], self._theirs[source : source + count])

    def close(self) -> None:
        self._memory.close()
