"""Causal attention of ragged rows, in Triton: keys and values paged or dense.

A program takes a tile of queries of one row for one KV head; the tile holds all query heads
of that head (``token * group + head``), so that short rows fill it too. It streams the keys
with an online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022),
first the stretch that no query masks, then the diagonal.

Where the tiles are fewer than the multiprocessors, as with a small chunk behind a long prefix,
each tile's keys are divided among several programs, and a second launch sums up what they
found (Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..prefill_attention import PrefillBatch
from .overlap import await_previous, overlap

_LOG2_E = 1.4426950408889634
_MOST_SPLITS = 16
_SUM_PAIRS = 16
_LEAST_PIECE = 256  # tokens: less is not worth a program and its share of the sum
_NOTHING_SEEN = tl.constexpr(-1.0e30)  # of a score; infinity less itself would be no number


@dataclass(frozen=True, slots=True)
class RaggedTuning:
    """``block_m``: (token, head) pairs a tile of queries; ``block_n``: tokens a tile of keys."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def suited(cls, head_dim: int, dtype: torch.dtype, *, paged: bool) -> RaggedTuning:
        """Tiles that fit a Hopper multiprocessor's registers and shared memory."""
        if dtype == torch.float32:
            return cls(block_m=32, block_n=16, num_warps=4)
        if head_dim == 128:
            return cls(num_stages=5) if paged else cls(block_n=128)
        return cls() if head_dim < 128 else cls(block_m=64, block_n=32, num_warps=4)


@triton.jit
def _load_tile(
    k_source,
    v_source,
    table,
    at,
    end,
    column,
    kv_stride_block,
    kv_stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Keys and values ``[N, D]`` from token ``at`` on, zeros past ``end`` where paged."""
    if PAGED:
        token = at + tl.arange(0, BLOCK_N)
        dim = tl.arange(0, BLOCK_D)
        inside = token < end
        block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        entry = (block * kv_stride_block + token % BLOCK_SIZE * kv_stride_token)[:, None]
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_source + entry + dim[None, :], mask=mask, other=0.0)
        v = tl.load(v_source + entry + dim[None, :], mask=mask, other=0.0)
    else:
        k = k_source.load([table + at, column])
        v = v_source.load([table + at, column])
    return k, v


@triton.jit
def _accumulate(
    acc,
    total,
    peak,
    q,
    position,
    start,
    end,
    k_source,
    v_source,
    table,
    column,
    kv_stride_block,
    kv_stride_token,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One stretch of keys, ``start`` to ``end``, into the running softmax."""
    for at in tl.range(start, end, BLOCK_N):
        k, v = _load_tile(
            k_source,
            v_source,
            table,
            at,
            end,
            column,
            kv_stride_block,
            kv_stride_token,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            PAGED,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        if MASKED:
            token = at + tl.arange(0, BLOCK_N)
            scores = tl.where(token[None, :] <= position[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def _pieces(
    prefix,
    num_new,
    tile,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Where a tile's keys end, and into pieces of how many tokens they are divided."""
    end = prefix + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_new - 1) + 1
    piece = tl.maximum(tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N, LEAST)
    return end, piece


@triton.jit(do_not_specialize=["batch", "tokens"])
def _ragged_kernel(
    q_ptr,
    k_source,
    v_source,
    tables_ptr,
    bounds_ptr,
    out_ptr,
    partial_ptr,
    log_sums_ptr,
    batch,
    tokens,
    scale_log2,
    q_stride_token,
    q_stride_head,
    kv_stride_block,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    NUM_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    PAGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The tiles with the most keys start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    q_start = tl.load(bounds_ptr + row)
    num_new = tl.load(bounds_ptr + row + 1) - q_start
    context_start = tl.load(bounds_ptr + batch + 1 + row)
    length = tl.load(bounds_ptr + batch + 2 + row) - context_start
    prefix = length - num_new
    end, piece = _pieces(prefix, num_new, tile, GROUP, BLOCK_M, BLOCK_N, SPLITS, LEAST)
    start = split * piece
    if (tile * BLOCK_M < num_new * GROUP) & (start < end):
        stop = tl.minimum(start + piece, end)

        packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        new = packed // GROUP
        head = kv_head * GROUP + packed % GROUP
        position = prefix + new
        dim = tl.arange(0, BLOCK_D)
        q_mask = (new < num_new)[:, None] & (dim < HEAD_DIM)[None, :]
        token = (q_start + new).to(tl.int64)
        q = tl.load(
            q_ptr + (token * q_stride_token + head * q_stride_head)[:, None] + dim[None, :],
            mask=q_mask,
            other=0.0,
        )  # [M, D]

        if PAGED:
            table = tables_ptr + row.to(tl.int64) * table_stride
            k_source += kv_head.to(tl.int64) * kv_stride_head
            v_source += kv_head.to(tl.int64) * kv_stride_head
        else:
            table = context_start
        column = kv_head * HEAD_DIM

        peak = tl.full([BLOCK_M], _NOTHING_SEEN, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first_new = tile * BLOCK_M // GROUP
        diagonal = (prefix + first_new + 1) // BLOCK_N * BLOCK_N
        acc, total, peak = _accumulate(
            acc,
            total,
            peak,
            q,
            position,
            start,
            tl.minimum(diagonal, stop),
            k_source,
            v_source,
            table,
            column,
            kv_stride_block,
            kv_stride_token,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            PAGED,
            False,
            PRECISION,
        )
        acc, total, peak = _accumulate(
            acc,
            total,
            peak,
            q,
            position,
            tl.maximum(diagonal, start),
            stop,
            k_source,
            v_source,
            table,
            column,
            kv_stride_block,
            kv_stride_token,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            PAGED,
            True,
            PRECISION,
        )
        # A piece may lie behind all that a query looks at.
        seen = tl.where(total > 0, total, 1.0)
        acc = acc / seen[:, None]
        place = token * NUM_Q + head
        if (SPLITS == 1) | (end <= piece):
            out = out_ptr + (place * HEAD_DIM)[:, None] + dim[None, :]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            place += split * tokens * NUM_Q
            tl.store(partial_ptr + (place * HEAD_DIM)[:, None] + dim[None, :], acc, mask=q_mask)
            log_sum = tl.where(total > 0, peak + tl.log2(seen), float("-inf"))
            tl.store(log_sums_ptr + place, log_sum, mask=new < num_new)


@triton.jit(do_not_specialize=["batch", "tokens"])
def _sum_kernel(
    partial_ptr,
    log_sums_ptr,
    bounds_ptr,
    out_ptr,
    batch,
    tokens,
    NUM_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``PAIRS`` (token, head) pairs of a tile that was attended to in pieces."""
    first = tl.program_id(0) * PAIRS
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    await_previous(OVERLAP)
    q_start = tl.load(bounds_ptr + row)
    num_new = tl.load(bounds_ptr + row + 1) - q_start
    length = tl.load(bounds_ptr + batch + 2 + row) - tl.load(bounds_ptr + batch + 1 + row)
    end, piece = _pieces(
        length - num_new, num_new, first // BLOCK_M, GROUP, BLOCK_M, BLOCK_N, SPLITS, LEAST
    )
    if (first < num_new * GROUP) & (end > piece):
        packed = first + tl.arange(0, PAIRS)
        new = packed // GROUP
        dim = tl.arange(0, BLOCK_D)
        inside = new < num_new
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        place = (q_start + new).to(tl.int64) * NUM_Q + kv_head * GROUP + packed % GROUP
        peak = tl.full([PAIRS], _NOTHING_SEEN, tl.float32)
        total = tl.zeros([PAIRS], tl.float32)
        acc = tl.zeros([PAIRS, BLOCK_D], tl.float32)
        for split in tl.range(0, tl.cdiv(end, piece)):
            there = place + split * tokens * NUM_Q
            log_sum = tl.load(log_sums_ptr + there, mask=inside, other=float("-inf"))
            partial = tl.load(
                partial_ptr + (there * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0
            )
            new_peak = tl.maximum(peak, log_sum)
            weight = tl.exp2(log_sum - new_peak)
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + partial * weight[:, None]
            peak = new_peak
        out = out_ptr + (place * HEAD_DIM)[:, None] + dim[None, :]
        acc = acc / tl.where(inside, total, 1.0)[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    scale: float,
    batch: PrefillBatch,
    *,
    out: Tensor | None = None,
    tuning: RaggedTuning | None = None,
    splits: int | None = None,
) -> Tensor:
    """``q[T, Hq, D]`` over the pool's blocks -> ``[T, Hq, D]``; ``splits`` of a tile's keys
    follow from the shapes where none are given."""
    assert kv_layer.stride(4) == 1
    return _launch(
        q,
        kv_layer[:, 0],
        kv_layer[:, 1],
        kv_layer.shape[2],
        kv_layer.stride(0),
        kv_layer.stride(2),
        kv_layer.stride(3),
        kv_layer.shape[3],
        scale,
        batch,
        out,
        tuning or RaggedTuning.suited(q.shape[2], q.dtype, paged=True),
        splits,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    batch: PrefillBatch,
    *,
    out: Tensor | None = None,
    tuning: RaggedTuning | None = None,
    splits: int | None = None,
) -> Tensor:
    """``q[T, Hq, D]`` over ``k, v[sum of context_lens, Hkv, D]`` -> ``[T, Hq, D]``.

    Tiles of keys and values come through the tensor memory accelerator; a tile may run into
    the next row's tokens, which the causal mask hides.
    """
    tuning = tuning or RaggedTuning.suited(q.shape[2], q.dtype, paged=False)
    num_kv_heads, head_dim = k.shape[1:]
    sources = [
        TensorDescriptor(
            dense,
            [dense.shape[0], num_kv_heads * head_dim],
            [dense.stride(0), 1],
            [tuning.block_n, triton.next_power_of_2(head_dim)],
        )
        for dense in (k, v)
    ]
    return _launch(
        q, sources[0], sources[1], num_kv_heads, 0, 0, 0, 1, scale, batch, out, tuning, splits
    )


def _launch(
    q: Tensor,
    k_source: Tensor | TensorDescriptor,
    v_source: Tensor | TensorDescriptor,
    num_kv_heads: int,
    kv_stride_block: int,
    kv_stride_head: int,
    kv_stride_token: int,
    block_size: int,
    scale: float,
    batch: PrefillBatch,
    out: Tensor | None,
    tuning: RaggedTuning,
    splits: int | None,
) -> Tensor:
    """Grids: (tiles of the longest row, Hkv, B * splits), and for the sum of the pieces, if
    there are any, (groups of ``_SUM_PAIRS`` (token, head) pairs of the longest row, Hkv, B)."""
    tokens, num_q_heads, head_dim = q.shape
    assert q.stride(2) == 1
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = num_q_heads // num_kv_heads
    rows, longest = len(batch.new_lens), max(batch.new_lens)
    tiles = triton.cdiv(longest * group, tuning.block_m)
    if splits is None:
        # A graph has room for more rows than mostly come.
        splits = _splits(tiles * num_kv_heads * (1 if batch.placed else rows), q.device)
    partial, log_sums = out, out
    if splits > 1:
        partial = torch.empty((splits, tokens, num_q_heads, head_dim), device=q.device)  # fp32
        log_sums = torch.empty((splits, tokens, num_q_heads), device=q.device)  # fp32, base 2
    least = triton.cdiv(_LEAST_PIECE, tuning.block_n) * tuning.block_n
    block_d = triton.next_power_of_2(head_dim)
    _ragged_kernel[(tiles, num_kv_heads, rows * splits)](
        q,
        k_source,
        v_source,
        batch.block_tables,
        batch.bounds,
        out,
        partial,
        log_sums,
        rows,
        tokens,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        kv_stride_block,
        kv_stride_head,
        kv_stride_token,
        batch.block_tables.stride(0),
        NUM_Q=num_q_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_D=block_d,
        SPLITS=splits,
        LEAST=least,
        PAGED=isinstance(k_source, Tensor),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    if splits > 1:
        _sum_kernel[(triton.cdiv(longest * group, _SUM_PAIRS), num_kv_heads, rows)](
            partial,
            log_sums,
            batch.bounds,
            out,
            rows,
            tokens,
            NUM_Q=num_q_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_M=tuning.block_m,
            BLOCK_N=tuning.block_n,
            BLOCK_D=block_d,
            PAIRS=_SUM_PAIRS,
            SPLITS=splits,
            LEAST=least,
            OVERLAP=overlap(),
            num_warps=4,
            launch_pdl=overlap(),
        )
    return out


def _splits(programs: int, device: torch.device) -> int:
    """Into how many pieces each tile's keys go, so that every multiprocessor has one."""
    multiprocessors = 8
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(multiprocessors // programs, 1)
    return min(1 << (wanted.bit_length() - 1), _MOST_SPLITS)
