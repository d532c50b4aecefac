"""RMSNorm with the residual addition: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_previous, overlap


@triton.jit
def add_parts(ptr, mask, stride, PARTS: tl.constexpr, dtype: tl.constexpr):
    """The sum of ``PARTS`` tensors of fp32 that lie ``stride`` apart, rounded; or what is there."""
    value = tl.load(ptr, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(ptr + part * stride, mask=mask, other=0.0)
    return value.to(dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    residual_out_ptr,
    x_stride,
    residual_stride,
    eps,
    part_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < HIDDEN
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    await_previous(OVERLAP)
    x = add_parts(x_ptr + token * x_stride + at, inside, part_stride, PARTS, weight.dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * residual_stride + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_out_ptr + token * HIDDEN + at, x, mask=inside)
    x32 = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, axis=0) / HIDDEN + eps)
    rounded = (x32 * inverse).to(x.dtype)
    normed = rounded.to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + token * HIDDEN + at, normed.to(x.dtype), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``kernels.rms_norm.rms_norm``. Grid: (T,)."""
    num_tokens, hidden = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    assert parts == 1 or residual is not None
    normed = torch.empty((num_tokens, hidden), dtype=weight.dtype, device=x.device)
    residual_out = x if residual is None else torch.empty_like(normed)
    if num_tokens:
        block = triton.next_power_of_2(hidden)
        _rms_norm_kernel[(num_tokens,)](
            x,
            residual,
            weight,
            normed,
            residual_out,
            x.stride(-2),
            0 if residual is None else residual.stride(0),
            eps,
            x.stride(0),
            HIDDEN=hidden,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            PARTS=parts,
            OVERLAP=overlap(),
            num_warps=min(max(block // 512, 1), 16),
            launch_pdl=overlap(),
        )
    return normed, residual_out
