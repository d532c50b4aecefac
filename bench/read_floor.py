"""What decode attention can't beat: a loop that only reads its keys and values.

The same pieces, the same block table, the same strides; the tiles are added up and nothing
else is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.gpu.decode_attention import SplitWorkspace


@dataclass(frozen=True, slots=True)
class ReadTuning:
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _read_kernel(
    kv_ptr,
    tables_ptr,
    lens_ptr,
    rows_ptr,
    first_ptr,
    piece_lens_ptr,
    out_ptr,
    batch,
    kv_stride_block,
    kv_stride_kv,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item < tl.load(first_ptr + batch):
        row = tl.load(rows_ptr + item)
        piece_len = tl.load(piece_lens_ptr + row)
        start = (item - tl.load(first_ptr + row)) * piece_len
        end = tl.minimum(start + piece_len, tl.load(lens_ptr + row))
        dim = tl.arange(0, HEAD_DIM)
        table = tables_ptr + row.to(tl.int64) * table_stride
        keys = kv_ptr + kv_head.to(tl.int64) * kv_stride_head + dim[None, :]
        acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
        for at in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            token = at + tl.arange(0, BLOCK_N)
            inside = token < end
            block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            entry = keys + (block * kv_stride_block + token % BLOCK_SIZE * kv_stride_token)[:, None]
            k = tl.load(entry, mask=inside[:, None], other=0.0)
            v = tl.load(entry + kv_stride_kv, mask=inside[:, None], other=0.0)
            acc += k.to(tl.float32) + v.to(tl.float32)
        tl.store(out_ptr + item * tl.num_programs(0) + kv_head, tl.sum(acc))


def read_only(kv_layer: Tensor, workspace: SplitWorkspace, out: Tensor, tuning: ReadTuning) -> None:
    """``out`` takes one number a program. Grid: as decode attention's."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    batch = workspace.context_lens.shape[0]
    assert head_dim == triton.next_power_of_2(head_dim)
    _read_kernel[(num_kv_heads, workspace.wanted_pieces + batch)](
        kv_layer,
        workspace.block_tables,
        workspace.context_lens,
        workspace.rows,
        workspace.first_piece,
        workspace.piece_lens,
        out,
        batch,
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        workspace.block_tables.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=tuning.block_n,
        STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
    )


def new_output(workspace: SplitWorkspace, num_kv_heads: int) -> Tensor:
    return torch.empty(workspace.rows.shape[0] * num_kv_heads, device=workspace.rows.device)  # fp32


@triton.jit
def _stream_kernel(data_ptr, out_ptr, size, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * PIECE
    acc = tl.zeros([BLOCK], tl.float32)
    for at in tl.static_range(0, PIECE, BLOCK):
        place = start + at + tl.arange(0, BLOCK)
        acc += tl.load(data_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc))


def read_stream(data: Tensor) -> None:
    """Reads ``data[n]`` once, front to back. Grid: (n / 32k,)."""
    piece = 1 << 15
    programs = triton.cdiv(data.shape[0], piece)
    out = torch.empty(programs, device=data.device)  # fp32
    _stream_kernel[(programs,)](data, out, data.shape[0], PIECE=piece, BLOCK=4096, num_warps=8)
