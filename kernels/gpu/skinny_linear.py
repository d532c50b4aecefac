"""A matrix product for few tokens: bound by how fast the weights stream in.

The weights are the product's left side (``W[N, K] . x^T[K, M]``), so that a tile of them fills
the tensor cores however few tokens there are; the tokens are padded to 16 or more on the
right. All programs run at once: where a matrix has too few rows for that, its columns are
split too, and each part leaves a partial sum in fp32 that the next kernel adds up, which is
free where that one reads its input anyway (norm, rope).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_previous, overlap

_MULTIPROCESSORS = 132  # of a Hopper GPU; on others the shares are a little off
_FEW = 32  # tokens up to which every product is ours
_SOME = 128  # tokens up to which the gated product is


@dataclass(frozen=True, slots=True)
class SkinnyTuning:
    """``block_n`` rows and ``block_k`` columns of the weights a tile; ``splits`` parts of the
    columns."""

    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    splits: int = 1


def split_tuning(x: Tensor, weight: Tensor) -> SkinnyTuning | None:
    """For a product whose parts the next kernel adds up; None where cuBLAS is better."""
    if x.shape[0] > _FEW or not _serves(x, weight):
        return None
    size, columns = weight.shape
    block_n, programs = (64, 3) if size > 4096 or columns > 8192 else (128, 2)
    wanted = programs * _MULTIPROCESSORS // triton.cdiv(size, block_n)
    splits = min(max(wanted, 1), max(columns // (4 * 64), 1))
    return SkinnyTuning(block_n, 64, 4, 6 if block_n == 64 else 4, splits)


def whole_tuning(x: Tensor, weight: Tensor) -> SkinnyTuning | None:
    """For a product without parts, as a head's; None where cuBLAS is better."""
    many_tiles = weight.shape[0] >= 8 * _MULTIPROCESSORS * 64
    if x.shape[0] > 64 or not many_tiles or not _serves(x, weight):
        return None
    few = x.shape[0] <= _FEW
    return SkinnyTuning(64, 128, 4, 4) if few else SkinnyTuning(128, 64, 4, 4)


def gated_tuning(x: Tensor, weight: Tensor) -> SkinnyTuning | None:
    """For ``skinny_gated``; None where cuBLAS and ``silu_mul`` are better."""
    if x.shape[0] > _SOME or not _serves(x, weight):
        return None
    return SkinnyTuning(64, 128, 4, 4) if x.shape[0] <= 64 else SkinnyTuning(64, 64, 4, 3)


def _serves(x: Tensor, weight: Tensor) -> bool:
    return x.dtype.itemsize == 2 and x.dtype == weight.dtype and x.stride(1) == 1


@triton.jit
def _load_x(x_ptr, m, k, tokens, K: tl.constexpr, x_stride, EVEN_K: tl.constexpr):
    """``x^T[BLOCK_K, BLOCK_M]``."""
    at = x_ptr + m[None, :] * x_stride + k[:, None]
    if EVEN_K:
        return tl.load(at, mask=m[None, :] < tokens, other=0.0)
    return tl.load(at, mask=(m[None, :] < tokens) & (k[:, None] < K), other=0.0)


@triton.jit
def _load_w(
    w_ptr,
    first,
    at,
    end,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """``W[BLOCK_N, BLOCK_K]``; each weight is read once, so it need not stay in the caches."""
    n = first + tl.arange(0, BLOCK_N)
    k = at + tl.arange(0, BLOCK_K)
    place = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN_N and EVEN_K:
        w = tl.load(place, eviction_policy="evict_first")
    else:
        w = tl.load(
            place,
            mask=(n < end)[:, None] & (k < K)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
    return w


@triton.jit
def _ask_for(w_ptr, first, at, K: tl.constexpr, BLOCK_N: tl.constexpr, LINES: tl.constexpr):
    """Brings the first columns of the tile's weights into the L2 cache, a line of 64 at a time."""
    n = first + tl.arange(0, BLOCK_N)
    line = at + 64 * tl.arange(0, LINES)
    place = w_ptr + n.to(tl.int64)[:, None] * K + line[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    K_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    start = split * K_SPLIT
    if LINES:
        _ask_for(w_ptr, first, start, K, BLOCK_N, LINES)
    await_previous(OVERLAP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in tl.range(start, tl.minimum(start + K_SPLIT, K), BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        w = _load_w(w_ptr, first, at, N, K, BLOCK_N, BLOCK_K, N % BLOCK_N == 0, K % BLOCK_K == 0)
        x = _load_x(x_ptr, m, k, tokens, K, x_stride, K % BLOCK_K == 0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        acc += tl.where(split == 0, bias, 0.0)[:, None]
    out = out_ptr + (split * tokens + m)[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < tokens)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _gated_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    tokens,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    if LINES:
        _ask_for(w_ptr, first, 0, K, BLOCK_N, LINES)
        _ask_for(w_ptr, N + first, 0, K, BLOCK_N, LINES)
    await_previous(OVERLAP)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in tl.range(0, K, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        x = _load_x(x_ptr, m, k, tokens, K, x_stride, K % BLOCK_K == 0)
        w = _load_w(w_ptr, first, at, N, K, BLOCK_N, BLOCK_K, N % BLOCK_N == 0, K % BLOCK_K == 0)
        gate = tl.dot(w, x, gate, input_precision=PRECISION)
        w = _load_w(
            w_ptr,
            N + first,
            at,
            2 * N,
            K,
            BLOCK_N,
            BLOCK_K,
            N % BLOCK_N == 0,
            K % BLOCK_K == 0,
        )
        up = tl.dot(w, x, up, input_precision=PRECISION)
    dtype = out_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)  # rounded as ``silu_mul`` does
    out = silu.to(tl.float32) * up.to(dtype).to(tl.float32)
    at = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, out.to(dtype), mask=(m < tokens)[None, :] & (n < N)[:, None])


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tuning: SkinnyTuning, out: Tensor | None = None
) -> Tensor:
    """``x[M, K]``, ``weight[N, K]`` dense -> ``[M, N]``, or ``[splits, M, N]`` fp32 partial sums
    where ``tuning.splits > 1``. Grid: (N / BLOCK_N, splits).
    """
    tokens, _ = x.shape
    size, columns = weight.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    steps = triton.cdiv(columns, tuning.block_k * tuning.splits)
    if out is None:
        if tuning.splits == 1:
            out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
        else:
            out = torch.empty((tuning.splits, tokens, size), device=x.device)  # fp32
    _linear_kernel[(triton.cdiv(size, tuning.block_n), tuning.splits)](
        x,
        weight,
        bias,
        out,
        tokens,
        x.stride(0),
        N=size,
        K=columns,
        K_SPLIT=steps * tuning.block_k,
        BLOCK_M=_padded(tokens),
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        HAS_BIAS=bias is not None,
        LINES=_lines(size, columns, tuning),
        OVERLAP=overlap(),
        PRECISION=_precision(x),
        launch_pdl=overlap(),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return out


def skinny_gated(x: Tensor, weight: Tensor, tuning: SkinnyTuning) -> Tensor:
    """``silu(x . gate^T) * (x . up^T)``: ``x[M, K]``, ``weight[2I, K]`` (gate first) -> ``[M, I]``.

    Each product is rounded to the type of ``x`` first, as if it were stored. Grid:
    (I / BLOCK_N,).
    """
    tokens, columns = x.shape
    size = weight.shape[0] // 2
    assert x.stride(1) == 1 and weight.is_contiguous()
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    _gated_kernel[(triton.cdiv(size, tuning.block_n),)](
        x,
        weight,
        out,
        tokens,
        x.stride(0),
        N=size,
        K=columns,
        BLOCK_M=_padded(tokens),
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        LINES=_lines(size, columns, tuning),
        OVERLAP=overlap(),
        PRECISION=_precision(x),
        launch_pdl=overlap(),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return out


def _lines(size: int, columns: int, tuning: SkinnyTuning) -> int:
    """What a program asks for ahead: as much as its pipeline holds, where no tile is cut off."""
    whole = size % tuning.block_n == 0 and columns % (64 * tuning.splits) == 0
    if not overlap() or not whole:
        return 0
    return min(4, columns // (64 * tuning.splits))


def _padded(tokens: int) -> int:
    return max(16, int(triton.next_power_of_2(tokens)))


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
