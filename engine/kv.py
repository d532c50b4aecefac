"""The KV cache: one tensor of blocks, block first, and its bytes for the transfer layer.

``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``: a block with all its
layers is one contiguous piece, so it is one copy and one frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.config import parse_size
from ..core.errors import OutOfMemory
from ..core.plan import KvLayout, KvPool
from .device import MemoryState, dtype_name
from .shape import ModelShape

_GPU_FRACTION = 0.85  # of the device's memory, for weights and cache together
_CPU_FRACTION = 0.10
_CPU_SEQUENCES = 8  # of the longest length, that a cache on a CPU need not exceed
_HEADROOM = 0.95  # of what is free now


def block_bytes(shape: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    elements = shape.num_layers * 2 * shape.num_kv_heads * block_size * shape.head_dim
    return elements * dtype.itemsize


def plan_layout(
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    block_size: int,
    max_context: int,
    memory: float | str,
    on_gpu: bool,
    state: MemoryState,
    memory_share: float,
    weight_bytes: int,
    workspace_bytes: int,
) -> KvLayout:
    """How many blocks fit. OutOfMemory where they would not hold one sequence of ``max_context``.

    ``memory`` is ``kv.memory``, ``state`` the device's with the weights loaded. A fraction
    counts of all that the device has, times ``memory_share``, and weights and workspace come
    out of it: so workers that start together need not agree. What is free now bounds it. A
    size is for the cache alone. ``auto`` on a CPU is modest.
    """
    size = block_bytes(shape, block_size, dtype)
    one = -(-max_context // block_size)  # blocks of the longest sequence
    share = int(state.total * memory_share)
    if isinstance(memory, float):
        budget = int(share * memory) - weight_bytes - workspace_bytes
    elif memory != "auto":
        budget = int(parse_size(memory) * memory_share)
    elif on_gpu:
        budget = int(share * _GPU_FRACTION) - weight_bytes - workspace_bytes
    else:
        budget = max(one * size, min(int(share * _CPU_FRACTION), _CPU_SEQUENCES * one * size))
    budget = max(0, min(budget, int(state.free * _HEADROOM) - workspace_bytes))
    num_blocks = budget // size
    if num_blocks < one:
        room = num_blocks * block_size
        raise OutOfMemory(
            f"the KV cache has room for {room} tokens, model.max_context is {max_context}: "
            f"it takes {one * size / 2**30:.2f} GiB for this worker, and there are "
            f"{budget / 2**30:.2f}; raise kv.memory, or lower "
            f"model.max_context{f' to {room}' if room else ''}"
        )
    return KvLayout(
        num_blocks=num_blocks,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        block_size=block_size,
        head_dim=shape.head_dim,
        dtype=dtype_name(dtype),
        block_bytes=size,
    )


def allocate(layout: KvLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``, zeroed: what a
    masked entry is multiplied with must be finite."""
    sizes = (
        *(layout.num_blocks, layout.num_layers, 2),
        *(layout.num_kv_heads, layout.block_size, layout.head_dim),
    )
    try:
        if device.type == "cpu":  # memory that is not touched yet is not taken yet
            assert dtype is torch.float32, dtype
            return torch.from_numpy(np.zeros(sizes, np.float32))
        return torch.zeros(sizes, dtype=dtype, device=device)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        size = layout.num_blocks * layout.block_bytes / 2**30
        raise OutOfMemory(
            f"{device} has no {size:.1f} GiB for the KV cache; lower kv.memory"
        ) from error


def pool_of(layout: KvLayout, blocks: Tensor) -> KvPool:
    """The pool's bytes; ``blocks`` as ``allocate`` made it."""
    return CudaKvPool(layout, blocks) if blocks.is_cuda else CpuKvPool(layout, blocks)


class CpuKvPool:
    """Views of the blocks themselves: nothing is copied to be read."""

    def __init__(self, layout: KvLayout, blocks: Tensor) -> None:
        self.layout = layout
        self._blocks = blocks
        self._bytes = _as_bytes(layout, blocks).numpy()  # [num_blocks, block_bytes]

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        return [memoryview(self._bytes[block]) for block in blocks]

    def write(self, blocks: Sequence[int], data: Sequence[memoryview]) -> None:
        for block, frame in zip(blocks, data, strict=True):
            self._bytes[block] = np.frombuffer(frame, np.uint8)

    def zero_tail(self, block: int, num_tokens: int) -> None:
        self._blocks[block, :, :, :, num_tokens:] = 0


class CudaKvPool:
    """Copies through pinned memory, on a stream a direction, beside the steps.

    Callers are threads with no current device of their own. Pinned buffers come from torch's
    caching allocator, so that one is used again when the last view of it is gone.
    """

    def __init__(self, layout: KvLayout, blocks: Tensor) -> None:
        self.layout = layout
        self._device = blocks.device
        self._blocks = blocks
        self._bytes = _as_bytes(layout, blocks)  # [num_blocks, block_bytes] uint8
        self._reading, self._writing, self._zeroing = (
            torch.cuda.Stream(blocks.device) for _ in range(3)
        )

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._reading):
            staging = self._staging(len(blocks))
            for row, block in enumerate(blocks):
                staging[row].copy_(self._bytes[block], non_blocking=True)
        self._reading.synchronize()
        frames = staging.numpy()
        return [memoryview(frames[row]) for row in range(len(blocks))]

    def write(self, blocks: Sequence[int], data: Sequence[memoryview]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._writing):
            staging = self._staging(len(blocks))
            frames = staging.numpy()
            for row, (block, frame) in enumerate(zip(blocks, data, strict=True)):
                frames[row] = np.frombuffer(frame, np.uint8)
                self._bytes[block].copy_(staging[row], non_blocking=True)
        self._writing.synchronize()

    def zero_tail(self, block: int, num_tokens: int) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._zeroing):
            self._blocks[block, :, :, :, num_tokens:] = 0
        self._zeroing.synchronize()

    def _staging(self, num_blocks: int) -> Tensor:
        """``[num_blocks, block_bytes]`` uint8, pinned."""
        return torch.empty(num_blocks, self.layout.block_bytes, dtype=torch.uint8, pin_memory=True)


def _as_bytes(layout: KvLayout, blocks: Tensor) -> Tensor:
    """``[num_blocks, block_bytes]`` uint8, the same memory."""
    return blocks.view(torch.uint8).view(layout.num_blocks, layout.block_bytes)
