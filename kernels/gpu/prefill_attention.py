"""Which prefill attention runs: cuDNN on dense keys and values, or our ragged kernel.

cuDNN's kernel is the fastest on this hardware, but takes one row at a time, builds a plan
for every new shape, and masks from the top left only. So a row with a prefix is attended to
in two parts, prefix (no mask) and new tokens (causal), which are then merged by their
log-sum-exps; and only rows long enough to be worth it take that way.
"""

from __future__ import annotations

from enum import Enum, auto

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..prefill_attention import PrefillBatch
from .ragged_attention import dense_attention, gather_contexts, paged_attention

_CUDNN_DTYPES = (torch.bfloat16, torch.float16)


class PrefillPath(Enum):
    """How a batch is attended to."""

    CUDNN = auto()
    RAGGED_DENSE = auto()
    RAGGED_PAGED = auto()


def choose(
    batch: PrefillBatch, dtype: torch.dtype, head_dim: int, min_cudnn_tokens: int = 512
) -> PrefillPath:
    """The selection point: a function of shapes alone."""
    if dtype in _CUDNN_DTYPES and head_dim in (64, 128) and min(batch.new_lens) >= min_cudnn_tokens:
        return PrefillPath.CUDNN
    return PrefillPath.RAGGED_PAGED if batch.has_prefix else PrefillPath.RAGGED_DENSE


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, scale: float, batch: PrefillBatch
) -> Tensor:
    """See ``kernels.prefill_attention.prefill_attention``."""
    path = choose(batch, q.dtype, q.shape[2])
    if path is PrefillPath.CUDNN:
        return cudnn_attention(q, k, v, kv_layer, scale, batch)
    if path is PrefillPath.RAGGED_DENSE:
        return dense_attention(q, k, v, scale, batch)
    return paged_attention(q, kv_layer, scale, batch)


def cudnn_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, scale: float, batch: PrefillBatch
) -> Tensor:
    """The same, a row at a time through cuDNN."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.has_prefix:
        all_k, all_v = gather_contexts(kv_layer, batch)  # [sum of context_lens, Hkv, D]
    context_start = 0
    for row, (num_new, length) in enumerate(zip(batch.new_lens, batch.context_lens, strict=True)):
        mine = slice(batch.q_starts[row], batch.q_starts[row + 1])
        prefix = slice(context_start, context_start + length - num_new)
        context_start += length
        if num_new == length:
            out[mine] = _cudnn(q[mine], k[mine], v[mine], scale, causal=True)[0]
        else:
            new, new_log_sum = _cudnn(q[mine], k[mine], v[mine], scale, causal=True)
            old, old_log_sum = _cudnn(q[mine], all_k[prefix], all_v[prefix], scale, causal=False)
            _merge(new, new_log_sum, old, old_log_sum, out[mine])
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """``q[n, Hq, D]`` over ``k, v[m, Hkv, D]`` -> ``(out[n, Hq, D], log_sum[Hq, n])``."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        None,
        True,
        0.0,
        causal,
        False,
        scale=scale,
    )
    out: Tensor = result[0]
    log_sum: Tensor = result[1]
    return out[0].transpose(0, 1), log_sum[0, :, :, 0]


@triton.jit
def _merge_kernel(
    a_ptr,
    a_log_ptr,
    b_ptr,
    b_log_ptr,
    out_ptr,
    log_stride_head,
    log_stride_token,
    a_stride_token,
    a_stride_head,
    b_stride_token,
    b_stride_head,
    out_stride_token,
    out_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    mask = dim < HEAD_DIM
    log_at = head * log_stride_head + token * log_stride_token
    a_log = tl.load(a_log_ptr + log_at)
    b_log = tl.load(b_log_ptr + log_at)
    a = tl.load(a_ptr + token * a_stride_token + head * a_stride_head + dim, mask=mask)
    b = tl.load(b_ptr + token * b_stride_token + head * b_stride_head + dim, mask=mask)
    a_share = 1.0 / (1.0 + tl.exp(b_log - a_log))
    merged = a.to(tl.float32) * a_share + b.to(tl.float32) * (1.0 - a_share)
    out = out_ptr + token * out_stride_token + head * out_stride_head + dim
    tl.store(out, merged.to(out_ptr.dtype.element_ty), mask=mask)


def _merge(a: Tensor, a_log: Tensor, b: Tensor, b_log: Tensor, out: Tensor) -> None:
    """Two softmax averages over disjoint keys, ``a, b, out[n, Hq, D]``; ``*_log[Hq, n]`` natural.

    Grid: (n, Hq).
    """
    num_tokens, num_heads, head_dim = a.shape
    assert a_log.stride() == b_log.stride()
    _merge_kernel[(num_tokens, num_heads)](
        a,
        a_log,
        b,
        b_log,
        out,
        a_log.stride(0),
        a_log.stride(1),
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
