"""Paged keys and values made dense: one program a block of a row.

What is behind the last row, up to where a tile of attention may end, is zeroed if there is room:
the causal mask hides it, but a NaN times nothing would be a NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..prefill_attention import PrefillBatch
from .overlap import await_previous, overlap

_TILE = 128  # tokens, a multiple of all tiles of keys


@triton.jit(do_not_specialize=["batch", "capacity"])
def _gather_kernel(
    kv_ptr,
    tables_ptr,
    bounds_ptr,
    out_ptr,
    batch,
    capacity,
    kv_stride_block,
    kv_stride_kv,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    out_stride_kv,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    at = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(bounds_ptr + batch + 1 + row)
    length = tl.load(bounds_ptr + batch + 2 + row) - start
    filled = length
    if row + 1 == batch:
        filled = tl.minimum(tl.cdiv(length, TILE) * TILE, capacity - start)
    inside = at * BLOCK_SIZE < length
    table = tables_ptr + row.to(tl.int64) * table_stride
    block = tl.load(table + at, mask=inside, other=0).to(tl.int64)
    await_previous(OVERLAP)
    if at * BLOCK_SIZE < filled:
        offset = tl.arange(0, BLOCK_T)[:, None, None]
        head = tl.arange(0, BLOCK_H)[None, :, None]
        dim = tl.arange(0, BLOCK_D)[None, None, :]
        token = at * BLOCK_SIZE + offset
        mask = (offset < BLOCK_SIZE) & (token < filled) & (head < NUM_KV) & (dim < HEAD_DIM)
        there = mask & (token < length)
        source = (
            kv_ptr
            + block * kv_stride_block
            + offset * kv_stride_token
            + head * kv_stride_head
            + dim
        )
        target = out_ptr + ((start + token).to(tl.int64) * NUM_KV + head) * HEAD_DIM + dim
        keys = tl.load(source, mask=there, other=0.0)
        values = tl.load(source + kv_stride_kv, mask=there, other=0.0)
        tl.store(target, keys, mask=mask)
        tl.store(target + out_stride_kv, values, mask=mask)


def gather_contexts(kv_layer: Tensor, batch: PrefillBatch) -> tuple[Tensor, Tensor]:
    """The rows' keys and values out of the pool, one row after the other.

    Returns ``(k, v)[sum of context_lens, Hkv, D]``. A graph that is captured with the most it
    shall hold serves fewer, by the ``bounds`` on the device. Grid: (blocks of the longest, B).
    """
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    out = torch.empty(
        (2, sum(batch.context_lens), num_kv_heads, head_dim),
        dtype=kv_layer.dtype,
        device=kv_layer.device,
    )
    rows = len(batch.context_lens)
    _gather_kernel[(triton.cdiv(max(batch.context_lens), block_size), rows)](
        kv_layer,
        batch.block_tables,
        batch.bounds,
        out,
        rows,
        out.shape[1],
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        batch.block_tables.stride(0),
        out.stride(0),
        NUM_KV=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_T=triton.next_power_of_2(block_size),
        BLOCK_H=triton.next_power_of_2(num_kv_heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
        TILE=_TILE,
        OVERLAP=overlap(),
        num_warps=8,
        launch_pdl=overlap(),
    )
    return out[0], out[1]
