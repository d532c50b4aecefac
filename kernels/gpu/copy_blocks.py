"""Block copies inside a device: one program a stretch of a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = torch.int64
_BLOCK = 4096  # words


@triton.jit
def _copy_kernel(
    target_ptr,
    source_ptr,
    ids_ptr,
    target_stride,
    source_stride,
    size,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dense = tl.program_id(0).to(tl.int64)
    paged = tl.load(ids_ptr + dense).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if GATHER:
        source = source_ptr + paged * source_stride
        target = target_ptr + dense * target_stride
    else:
        source = source_ptr + dense * source_stride
        target = target_ptr + paged * target_stride
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """See ``kernels.copy_blocks.gather_blocks``."""
    _copy(as_words(out), as_words(pool), block_ids, gather=True)


def scatter_blocks(pool: Tensor, block_ids: Tensor, source: Tensor) -> None:
    """See ``kernels.copy_blocks.scatter_blocks``."""
    _copy(as_words(pool), as_words(source), block_ids, gather=False)


def as_words(blocks: Tensor) -> Tensor:
    """``blocks[n, ...]`` as ``[n, words]``, whatever its type."""
    return blocks.flatten(1).view(_WORD)


def _copy(target: Tensor, source: Tensor, block_ids: Tensor, *, gather: bool) -> None:
    """Grid: (blocks, words / BLOCK)."""
    count, size = block_ids.shape[0], source.shape[1]
    if count:
        _copy_kernel[(count, triton.cdiv(size, _BLOCK))](
            target,
            source,
            block_ids,
            target.stride(0),
            source.stride(0),
            size,
            GATHER=gather,
            BLOCK=_BLOCK,
            num_warps=8,
        )
