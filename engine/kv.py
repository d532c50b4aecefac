"""The KV cache: one tensor of blocks, block first, and its bytes for the transfer layer.

``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``: a block with all its
layers is one contiguous piece, so it is one copy and one frame.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from ..core.config import TransferSection, parse_size
from ..core.errors import OutOfMemory
from ..core.host_pool import HostKvPool
from ..core.ids import Medium
from ..core.plan import KvLayout, KvPool
from .device import MemoryState, dtype_name
from .shape import ModelShape

log = logging.getLogger(__name__)

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
    size is for the cache alone, and OutOfMemory where it is not free. ``auto`` on a CPU is modest.
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
    free = max(0, int(state.free * _HEADROOM) - workspace_bytes)
    if isinstance(memory, str) and memory != "auto" and budget > free:
        raise OutOfMemory(
            f"kv.memory: {memory} is {_in_words(budget)} for this worker, and {_in_words(free)} "
            "of its device are free; ask for less"
        )
    budget = max(0, min(budget, free))
    num_blocks = budget // size
    if num_blocks < one:
        room = num_blocks * block_size
        raise OutOfMemory(
            f"the KV cache has room for {room} tokens, model.max_context is {max_context}: "
            f"it takes {_in_words(one * size)} for this worker, and there are "
            f"{_in_words(budget)}; raise kv.memory, or lower "
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


def _in_words(num_bytes: int) -> str:
    unit, size = ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)
    return f"{num_bytes / size:.2f} {unit}"


def new_pool(
    layout: KvLayout, dtype: torch.dtype, device: torch.device, transfer: TransferSection
) -> TorchKvPool:
    """The cache's memory, zeroed: what a masked entry is multiplied with must be finite.

    Where peers may read the pool by themselves, by ``transfer.medium``, it is made so. With
    ``auto`` a host that has no shared memory to spare does without.
    """
    medium = transfer.medium
    if device.type == "cuda":
        from .device_pool import CudaKvPool

        shared = medium in ("auto", Medium.CUDA_IPC)
        return CudaKvPool(layout, dtype, device, shared=shared, transfer=transfer)
    if medium == "auto":
        try:
            return CpuKvPool(layout, dtype, shared=True)
        except OutOfMemory as error:
            log.warning("KV blocks will be sent, not shared: %s", error)
    return CpuKvPool(layout, dtype, shared=medium is Medium.SHM)


class TorchKvPool(KvPool, Protocol):
    """A pool that a model writes: ``blocks`` as ``sizes`` gives it."""

    @property
    def blocks(self) -> Tensor: ...


def sizes(layout: KvLayout) -> tuple[int, ...]:
    """``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``"""
    return (
        *(layout.num_blocks, layout.num_layers, 2),
        *(layout.num_kv_heads, layout.block_size, layout.head_dim),
    )


class CpuKvPool(HostKvPool):
    """Host memory, as a tensor and as bytes."""

    def __init__(self, layout: KvLayout, dtype: torch.dtype, *, shared: bool = False) -> None:
        super().__init__(layout, shared=shared)
        self.blocks = torch.from_numpy(self.bytes).view(-1).view(dtype).view(sizes(layout))
