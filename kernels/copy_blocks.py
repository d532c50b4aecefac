"""Whole KV blocks between the pool and a dense staging buffer, many in one launch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """``out[i] = pool[block_ids[i]]``.

    ``pool[num_blocks, ...]`` and ``out[n, ...]`` have equal, dense blocks;
    ``block_ids[n]`` int64 on the pool's device. ``out`` may be pinned host memory.
    """
    if pool.is_cuda and out.is_cuda:
        from .gpu.copy_blocks import gather_blocks as launch

        launch(pool, block_ids, out)
    elif pool.is_cuda:
        out.copy_(pool.index_select(0, block_ids), non_blocking=True)
    else:
        torch.index_select(pool, 0, block_ids, out=out)


def scatter_blocks(pool: Tensor, block_ids: Tensor, source: Tensor) -> None:
    """``pool[block_ids[i]] = source[i]``; shapes as in ``gather_blocks``; ids are distinct."""
    if pool.is_cuda and source.is_cuda:
        from .gpu.copy_blocks import scatter_blocks as launch

        launch(pool, block_ids, source)
    else:
        pool.index_copy_(0, block_ids, source.to(pool.device, non_blocking=True))


def move_blocks(source: Tensor, target: Tensor, ids: Tensor) -> None:
    """``target[ids[1, i]] = source[ids[0, i]]``, from one pool into another.

    Both ``[num_blocks, block_bytes]`` uint8 with dense blocks; ``ids[2, n]`` int64, the targets
    distinct. On a GPU ``source`` may be another one's memory, mapped: all bytes cross then.
    """
    if target.is_cuda:
        from .gpu.copy_blocks import move_blocks as launch

        launch(source, target, ids)
    else:
        target.index_copy_(0, ids[1], source.index_select(0, ids[0]))
