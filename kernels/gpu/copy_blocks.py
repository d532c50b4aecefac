"""Block copies inside a device: one program a stretch of a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = torch.int64
_BLOCK = 4096  # words
_PROGRAMS = 32  # of a move between pools: enough for a link, and the rest of the GPU stays free


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


@triton.jit(do_not_specialize=["count"])
def _move_kernel(target_ptr, source_ptr, ids_ptr, count, size, BLOCK: tl.constexpr):
    pieces = tl.cdiv(size, BLOCK)
    for piece in range(tl.program_id(0), count * pieces, tl.num_programs(0)):
        pair = piece // pieces
        source = source_ptr + tl.load(ids_ptr + pair) * size
        target = target_ptr + tl.load(ids_ptr + count + pair) * size
        at = (piece % pieces) * BLOCK + tl.arange(0, BLOCK)
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


def move_blocks(source: Tensor, target: Tensor, ids: Tensor, num_programs: int = _PROGRAMS) -> None:
    """See ``kernels.copy_blocks.move_blocks``. Grid: (num_programs,); each takes every
    ``num_programs``-th stretch."""
    source, target = source.view(_WORD), target.view(_WORD)
    count, size = ids.shape[1], target.shape[1]
    if count:
        pieces = count * triton.cdiv(size, _BLOCK)
        _move_kernel[(min(num_programs, pieces),)](
            target, source, ids, count, size, BLOCK=_BLOCK, num_warps=8
        )
