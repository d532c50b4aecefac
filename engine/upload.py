"""Small arrays of a step from the host to its device: one copy, however many they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Upload: TypeAlias = Callable[[Sequence[Array]], list[Tensor]]

_ALIGNMENT = 16  # bytes


def uploader(device: torch.device) -> Upload:
    """On a CPU the tensors are the arrays' own memory: do not change them afterwards."""
    if device.type == "cpu":
        return lambda arrays: [torch.from_numpy(array) for array in arrays]
    return lambda arrays: unpack(pack(arrays).to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[Array]) -> Tensor:
    """All arrays in one pinned buffer ``[bytes]`` uint8, each at an aligned offset.

    The buffer comes from torch's caching allocator, which does not hand it out again before
    the copy that reads it is over.
    """
    buffer = torch.empty(_offsets(arrays)[-1], dtype=torch.uint8, pin_memory=True)
    pack_into(buffer.numpy(), arrays)
    return buffer


def pack_into(buffer: npt.NDArray[np.uint8], arrays: Sequence[Array]) -> None:
    for offset, array in zip(_offsets(arrays), arrays, strict=False):
        buffer[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()


def unpack(buffer: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of ``buffer[bytes]``, shaped and typed like the arrays that were packed."""
    views = []
    for offset, array in zip(_offsets(arrays), arrays, strict=False):
        piece = buffer[offset : offset + array.nbytes]
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        views.append(piece.view(dtype).view(array.shape))
    return views


def _offsets(arrays: Sequence[Array]) -> list[int]:
    """Where each array begins, and the size of the whole."""
    offsets = [0]
    for array in arrays:
        offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
