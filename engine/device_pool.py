"""A KV pool on a GPU: its bytes for the transfer layer, by value and by reference.

By value they go through pinned memory. By reference a peer maps the pool (CUDA IPC) and
pulls: its memory is one plain allocation, and behind the last block lies one more that
holds the nonce of the export, by which a reader knows that what it has mapped is the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.config import TransferSection
from ..core.errors import HandshakeRefused, OutOfMemory
from ..core.generations import Generations
from ..core.host_pool import by_block, generations_in, join, runs, table_bytes, whole_blocks
from ..core.ids import Medium
from ..core.plan import KvLayout, PeerPool, PoolExport
from ..core.shared_memory import SharedMemory
from ..kernels.copy_blocks import move_blocks
from .cuda_driver import CudaDriver, DriverError, Opened

log = logging.getLogger(__name__)

_NONCE = 16  # bytes
# a copy of so much takes about a millisecond between GPUs. Whoever awaits it spins: to fall asleep
# and be woken by an interrupt would take up to a fifth more
SPIN_BYTES = 256 << 20
MAX_COPIES = 8  # runs of blocks that are copied one by one; what is more scattered, by a kernel


class Driver(Protocol):
    """What of ``CudaDriver`` is needed here."""

    def export(self, pointer: int, device: int) -> tuple[bytes, int]: ...

    def open(self, handle: bytes, device: int) -> Opened: ...

    def close(self, opened: Opened) -> None: ...


class DeviceExport:
    """What peers need to read a pool ``[num_blocks + 1, block_bytes]`` uint8 on a device."""

    def __init__(self, memory: Tensor, driver: Driver) -> None:
        """Raises DriverError, or OutOfMemory for the table of generations."""
        num_blocks = memory.shape[0] - 1
        handle, offset = driver.export(memory.data_ptr(), memory.device.index or 0)
        self._table = SharedMemory.create(table_bytes(num_blocks))
        self.generations = generations_in(self._table, num_blocks)
        nonce = torch.frombuffer(bytearray(self._table.nonce), dtype=torch.uint8)
        memory[num_blocks, :_NONCE] = nonce.to(memory.device)
        self.export = PoolExport(
            Medium.CUDA_IPC, self._table.name, self._table.nonce, num_blocks, handle, offset
        )

    def close(self) -> None:
        self._table.close()


class MappedDevicePool:
    """``core.plan.PeerPool``: a peer's pool, pulled from into ours by ``begin``.

    ``ours[num_blocks, block_bytes]`` uint8; the mapped one looks like memory of its device,
    wherever it really is: same host, same or another GPU.
    """

    def __init__(
        self,
        ours: Tensor,
        export: PoolExport,
        driver: Driver,
        begin: Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Callable[[], None]],
    ) -> None:
        """HandshakeRefused where it can't be mapped, or is not what the export says."""
        num_blocks, size = export.num_blocks, ours.shape[1]
        self._ours, self._driver, self._begin = ours, driver, begin
        self._table = SharedMemory.attach(export.name, export.nonce, table_bytes(num_blocks))
        self._generations = generations_in(self._table, num_blocks)
        try:
            self._opened = driver.open(export.handle, ours.device.index or 0)
        except DriverError as error:
            self._table.close()
            raise HandshakeRefused(f"the peer's memory can't be mapped: {error}") from error
        num_bytes = (num_blocks + 1) * size
        if export.offset + num_bytes > self._opened.num_bytes:
            self.close()
            raise HandshakeRefused(f"the peer shows {self._opened.num_bytes} bytes, not its pool")
        flat = tensor_at(self._opened.base + export.offset, num_bytes, ours.device)
        self._theirs = flat.view(num_blocks + 1, size)
        if bytes(self._theirs[num_blocks, :_NONCE].cpu().numpy()) != export.nonce:
            self.close()
            raise HandshakeRefused("the peer's memory can be mapped, but not read")

    @property
    def generations(self) -> Generations:
        return self._generations

    @property
    def owner_gone(self) -> bool:
        return self._table.owner_gone

    def begin(self, theirs: Sequence[int], ours: Sequence[int]) -> Callable[[], None]:
        return self._begin(self._theirs, self._ours, theirs, ours)

    def copy(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        self.begin(theirs, ours)()

    def close(self) -> None:
        self._driver.close(self._opened)
        self._table.close()


def tensor_at(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    """``[num_bytes]`` uint8 over memory that is somebody else's to free."""
    make: Callable[..., Any] = torch._C._construct_storage_from_data_pointer
    return torch.empty(0, dtype=torch.uint8, device=device).set_(make(pointer, device, num_bytes))


class CudaKvPool:
    """``core.plan.KvPool`` in device memory. Everything moves on streams beside the steps.

    Callers are threads with no current device of their own. Pinned buffers come from torch's
    caching allocator, so that one is used again when the last view of it is gone: ZeroMQ has
    sent it, or it has been copied to the device.
    """

    def __init__(
        self,
        layout: KvLayout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shared: bool,
        transfer: TransferSection,
    ) -> None:
        self._layout = layout
        self._device = device
        shape = (layout.num_blocks + 1, layout.block_bytes)
        try:
            memory = torch.zeros(shape, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError as error:
            size = layout.num_blocks * layout.block_bytes / 2**30
            raise OutOfMemory(
                f"{device} has no {size:.1f} GiB for the KV cache; lower kv.memory"
            ) from error
        self._bytes = memory[: layout.num_blocks]  # [num_blocks, block_bytes] uint8
        typed = self._bytes.view(-1).view(dtype)
        self.blocks = typed.view(
            *(layout.num_blocks, layout.num_layers, 2),
            *(layout.num_kv_heads, layout.block_size, layout.head_dim),
        )
        self._reading, self._writing, self._pulling = (torch.cuda.Stream(device) for _ in range(3))
        # a small kernel that must not wait for the blocks of a large one
        self._zeroing = torch.cuda.Stream(device, priority=-1)
        self._export: DeviceExport | None = None
        self._generations = Generations.private(layout.num_blocks)
        if shared:
            try:
                self._export = DeviceExport(memory, CudaDriver())
                self._generations = self._export.generations
                self._warm_up()
            except (DriverError, OutOfMemory) as error:
                log.warning("KV blocks will be sent, not shared: %s", error)
        # torch keeps what is pinned, and hands it out again: while steps run none is made
        staging = [
            torch.empty(transfer.chunk_bytes, dtype=torch.uint8, pin_memory=True)
            for _ in range(transfer.window_bytes // transfer.chunk_bytes)
        ]
        del staging
        torch.cuda.synchronize(device)  # zeroed and marked before another stream looks

    def _warm_up(self) -> None:
        """A block onto itself: the kernel is compiled now, not by the first pull."""
        first = torch.zeros((2, 1), dtype=torch.int64, device=self._device)
        move_blocks(self._bytes, self._bytes, first)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def generations(self) -> Generations:
        return self._generations

    @property
    def exports(self) -> tuple[PoolExport, ...]:
        return () if self._export is None else (self._export.export,)

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        return whole_blocks(self.read_runs(blocks), self._layout.block_bytes)

    def read_runs(self, blocks: Sequence[int]) -> list[memoryview]:
        """All of them: in pinned memory they lie one behind the other."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._reading):
            staging = self._staging(len(blocks))
            for block, row, count in runs(blocks, range(len(blocks))):
                staging[row : row + count].copy_(
                    self._bytes[block : block + count], non_blocking=True
                )
            done = torch.cuda.Event(blocking=True)
            done.record()
        done.synchronize()
        return [staging.view(-1).numpy().data]

    def write(self, blocks: Sequence[int], data: Sequence[memoryview]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._writing):
            staging = self._staging(len(blocks))
            frames = staging.numpy()
            for row, pieces in enumerate(by_block(blocks, data)):
                join(pieces, frames[row])
            # few calls: each gives the interpreter up, and must come by it again
            for row, block, count in runs(range(len(blocks)), blocks):
                self._bytes[block : block + count].copy_(
                    staging[row : row + count], non_blocking=True
                )
            done = torch.cuda.Event(blocking=True)
            done.record()
        done.synchronize()

    def zero_tail(self, block: int, num_tokens: int) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._zeroing):
            self.blocks[block, :, :, :, num_tokens:] = 0
        self._zeroing.synchronize()

    def attach(self, export: PoolExport) -> PeerPool:
        if export.medium is not Medium.CUDA_IPC:
            raise HandshakeRefused(f"this pool is on {self._device}: no {export.medium}")
        try:
            driver = CudaDriver()
        except DriverError as error:
            raise HandshakeRefused(str(error)) from error
        with torch.cuda.device(self._device), torch.cuda.stream(self._pulling):
            return MappedDevicePool(self._bytes, export, driver, self._begin_pull)

    def close(self) -> None:
        if self._export is not None:
            self._export.close()

    def _begin_pull(
        self, source: Tensor, target: Tensor, theirs: Sequence[int], ours: Sequence[int]
    ) -> Callable[[], None]:
        """``target[ours[i]] = source[theirs[i]]``, on the side stream. What is returned waits for
        its event only, so that neither the steps nor the other threads do: asleep, or spinning
        where it is soon over, in a call that leaves the interpreter to the others.

        Runs of blocks go to the copy engines, which leave the multiprocessors to the batch.
        """
        with torch.cuda.device(self._device), torch.cuda.stream(self._pulling):
            pieces = list(runs(theirs, ours))
            if len(pieces) <= MAX_COPIES:
                for start, to, count in pieces:
                    target[to : to + count].copy_(source[start : start + count], non_blocking=True)
            else:
                ids = torch.tensor((theirs, ours), dtype=torch.int64, pin_memory=True)
                move_blocks(source, target, ids.to(self._device, non_blocking=True))
            done = torch.cuda.Event(blocking=len(ours) * self._layout.block_bytes > SPIN_BYTES)
            done.record()
        wait: Callable[[], None] = done.synchronize
        return wait

    def _staging(self, num_blocks: int) -> Tensor:
        """``[num_blocks, block_bytes]`` uint8, pinned."""
        return torch.empty(num_blocks, self._layout.block_bytes, dtype=torch.uint8, pin_memory=True)
