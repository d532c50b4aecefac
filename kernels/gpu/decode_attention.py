"""Decode attention in three launches: a plan once a step, then pieces and their sum a layer.

The plan cuts each context into pieces of about equal size, about as many as the device
runs programs at once times a small factor, and writes the list of pieces to device memory.
A program of the fixed grid takes one piece and one KV head, attends to it with all query
heads of that head, and leaves a partial result with its log-sum-exp; the last launch sums
the pieces of a row. A row with one piece is written in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_previous, overlap

_LOG2_E = 1.4426950408889634
_FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """``block_n``: tokens a tile; ``programs``: programs wanted for each multiprocessor."""

    block_n: int = 64
    num_warps: int = 2
    num_stages: int = 3
    programs: int = 4

    @classmethod
    def suited(cls, head_dim: int, dtype: torch.dtype, max_batch: int) -> DecodeTuning:
        """Tiles that fit a Hopper multiprocessor's registers and shared memory.

        Few rows have the fewest pieces that keep the memory busy: all are summed up at the end.
        """
        if head_dim == 128 and dtype.itemsize == 2 and max_batch <= 2 * _FEW_ROWS:
            return cls(num_stages=6, programs=2)
        if head_dim > 128 or dtype.itemsize > 2:
            return cls(block_n=32, num_warps=4, num_stages=3, programs=8)
        return cls() if head_dim > 64 else cls(block_n=128)


class SplitWorkspace:
    """The plan and the partial results of one step; addresses stay what they are."""

    def __init__(
        self,
        *,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        tuning: DecodeTuning | None = None,
    ) -> None:
        self.tuning = tuning or DecodeTuning.suited(head_dim, dtype, max_batch)
        multiprocessors = 8
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.wanted_pieces = max(multiprocessors * self.tuning.programs // num_kv_heads, 1)
        pieces = self.wanted_pieces + max_batch  # rounding up adds less than one a row
        self.rows = torch.zeros(pieces, dtype=torch.int32, device=device)
        self.first_piece = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.piece_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.partial = torch.empty((pieces, num_q_heads, head_dim), device=device)  # fp32
        self.log_sums = torch.empty((pieces, num_q_heads), device=device)  # fp32, base 2
        self.fresh = True  # no attention has followed the plan yet
        self.block_tables = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self.context_lens = torch.zeros(0, dtype=torch.int32, device=device)

    def prepare(self, block_tables: Tensor, context_lens: Tensor) -> None:
        """See ``kernels.decode_attention.DecodeWorkspace.prepare``. Grid: (1,)."""
        self.block_tables, self.context_lens, self.fresh = block_tables, context_lens, True
        batch = context_lens.shape[0]
        _plan_kernel[(1,)](
            context_lens,
            self.rows,
            self.first_piece,
            self.piece_lens,
            batch,
            self.wanted_pieces,
            BATCH=triton.next_power_of_2(len(self.piece_lens)),
            BLOCK_N=self.tuning.block_n,
            OVERLAP=overlap(),
            num_warps=4,
            launch_pdl=overlap(),
        )


@triton.jit(do_not_specialize=["batch"])
def _plan_kernel(
    lens_ptr,
    rows_ptr,
    first_ptr,
    piece_lens_ptr,
    batch,
    wanted_pieces,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.arange(0, BATCH)
    inside = row < batch
    lens = tl.load(lens_ptr + row, mask=inside, other=0)
    share = tl.maximum(tl.cdiv(tl.sum(lens, axis=0), wanted_pieces), 1)
    pieces = tl.cdiv(lens, tl.cdiv(share, BLOCK_N) * BLOCK_N)
    # A row's pieces are made equal: no short last one.
    piece_len = tl.cdiv(tl.cdiv(lens, tl.maximum(pieces, 1)), BLOCK_N) * BLOCK_N
    pieces = tl.cdiv(lens, tl.maximum(piece_len, 1))
    first = tl.cumsum(pieces, axis=0) - pieces
    tl.store(first_ptr + row, first, mask=inside)
    tl.store(first_ptr + batch, tl.sum(pieces, axis=0))
    tl.store(piece_lens_ptr + row, piece_len, mask=inside)
    for piece in range(tl.max(pieces, axis=0)):
        tl.store(rows_ptr + first + piece, row, mask=inside & (piece < pieces))


@triton.jit(do_not_specialize=["batch"])
def _pieces_kernel(
    q_ptr,
    kv_ptr,
    tables_ptr,
    lens_ptr,
    rows_ptr,
    first_ptr,
    piece_lens_ptr,
    partial_ptr,
    log_sums_ptr,
    out_ptr,
    batch,
    scale_log2,
    q_stride_row,
    q_stride_head,
    kv_stride_block,
    kv_stride_kv,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    NUM_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLANNED: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The plan may be read while the kernel before this one ends, unless that one makes it.
    if not PLANNED:
        await_previous(OVERLAP)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    wanted = item < tl.load(first_ptr + batch)
    # An item that nobody wants may name a row of an earlier step.
    row = tl.where(wanted, tl.load(rows_ptr + item), 0)
    first_item = tl.load(first_ptr + row)
    pieces = tl.load(first_ptr + row + 1) - first_item
    piece_len = tl.load(piece_lens_ptr + row)
    length = tl.load(lens_ptr + row)
    if PLANNED:
        await_previous(OVERLAP)
    if wanted:
        start = (item - first_item) * piece_len
        end = tl.minimum(start + piece_len, length)

        group = tl.arange(0, BLOCK_G)
        dim = tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + group
        q_mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(
            q_ptr + row.to(tl.int64) * q_stride_row + head[:, None] * q_stride_head + dim[None, :],
            mask=q_mask,
            other=0.0,
        )  # [G, D]
        table = tables_ptr + row.to(tl.int64) * table_stride
        keys = kv_ptr + kv_head.to(tl.int64) * kv_stride_head + dim[None, :]

        peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for at in tl.range(start, end, BLOCK_N):
            token = at + tl.arange(0, BLOCK_N)
            inside = token < end
            block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            entry = keys + (block * kv_stride_block + token % BLOCK_SIZE * kv_stride_token)[:, None]
            kv_mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(entry, mask=kv_mask, other=0.0)  # [N, D]
            v = tl.load(entry + kv_stride_kv, mask=kv_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [G, N]
            scores = tl.where(inside[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
            peak = new_peak
        acc = acc / total[:, None]
        if pieces == 1:
            out = out_ptr + (row.to(tl.int64) * NUM_Q + head)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            slot = item.to(tl.int64) * NUM_Q + head
            tl.store(partial_ptr + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=q_mask)
            tl.store(log_sums_ptr + slot, peak + tl.log2(total), mask=group < GROUP)


@triton.jit
def _sum_kernel(
    partial_ptr,
    log_sums_ptr,
    first_ptr,
    out_ptr,
    NUM_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(first_ptr + row)  # the pieces' kernel has waited for the plan
    end = tl.load(first_ptr + row + 1)
    await_previous(OVERLAP)
    if end - first != 1:
        dim = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        peak = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for at in tl.range(first, end, TILE):
            item = at + tl.arange(0, TILE)
            slot = item.to(tl.int64) * NUM_Q + head
            inside = item < end
            log_sum = tl.load(log_sums_ptr + slot, mask=inside, other=float("-inf"))
            partial = tl.load(
                partial_ptr + slot[:, None] * HEAD_DIM + dim[None, :],
                mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )  # [TILE, D]
            new_peak = tl.maximum(peak, tl.max(log_sum, axis=0))
            weights = tl.exp2(log_sum - new_peak)
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, axis=0)
            acc = acc * shrink + tl.sum(partial * weights[:, None], axis=0)
            peak = new_peak
        # No piece at all: a padding row, which reads as zero.
        acc = acc / tl.where(total > 0, total, 1.0)
        out = out_ptr + (row.to(tl.int64) * NUM_Q + head) * HEAD_DIM + dim
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    scale: float,
    workspace: SplitWorkspace,
    out: Tensor | None = None,
) -> Tensor:
    """See ``kernels.decode_attention.decode_attention``.

    Grids: (Hkv, pieces wanted + B) and (B, Hq, D / BLOCK_D).
    """
    batch, num_q_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    assert kv_layer.stride(4) == 1
    assert q.stride(2) == 1
    if out is None:
        out = torch.empty((batch, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    group = num_q_heads // num_kv_heads
    tuning = workspace.tuning
    block_d = triton.next_power_of_2(head_dim)
    _pieces_kernel[(num_kv_heads, workspace.wanted_pieces + batch)](
        q,
        kv_layer,
        workspace.block_tables,
        workspace.context_lens,
        workspace.rows,
        workspace.first_piece,
        workspace.piece_lens,
        workspace.partial,
        workspace.log_sums,
        out,
        batch,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        workspace.block_tables.stride(0),
        NUM_Q=num_q_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_G=max(triton.next_power_of_2(group), 16),
        BLOCK_D=block_d,
        BLOCK_N=tuning.block_n,
        PLANNED=not workspace.fresh,
        OVERLAP=overlap(),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        launch_pdl=overlap(),
    )
    workspace.fresh = False
    # Few rows have many pieces each: then smaller stretches of a head, and more pieces at once.
    few = batch <= _FEW_ROWS
    sum_d = min(block_d, 32) if few else block_d
    _sum_kernel[(batch, num_q_heads, block_d // sum_d)](
        workspace.partial,
        workspace.log_sums,
        workspace.first_piece,
        out,
        NUM_Q=num_q_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=sum_d,
        TILE=32 if few else 16,
        OVERLAP=overlap(),
        num_warps=1 if few else 2,
        launch_pdl=overlap(),
    )
    return out
