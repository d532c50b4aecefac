"""Head norm, rotation and cache write: one program a token and a few heads of q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import split_heads
from .overlap import await_previous, overlap
from .rms_norm import add_parts

_HEADS = 8


@triton.jit
def _rope_kernel(
    source_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    kv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    part_stride,
    source_stride,
    qkv_stride,
    angle_stride,
    kv_stride_block,
    kv_stride_kv,
    kv_stride_head,
    kv_stride_token,
    block_size,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PARTS: tl.constexpr,
    COPIED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A head is [first half | second half | rest]; the rest is what a partial rotation leaves.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < NUM_Q + 2 * NUM_KV
    rotated = head < NUM_Q + NUM_KV
    is_q = head < NUM_Q
    half = tl.arange(0, BLOCK_HALF)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    half_mask = inside[:, None] & (half < HALF)[None, :]
    rest_mask = inside[:, None] & (rest < HEAD_DIM)[None, :]

    position = tl.load(positions_ptr + token).to(tl.int64)
    angle = position * angle_stride + half
    cos = tl.load(cos_ptr + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots_ptr + token)

    await_previous(OVERLAP)
    dtype = qkv_ptr.dtype.element_ty
    row = source_ptr + token * source_stride + head[:, None] * HEAD_DIM
    first = add_parts(row + half[None, :], half_mask, part_stride, PARTS, dtype).to(tl.float32)
    second = add_parts(row + HALF + half[None, :], half_mask, part_stride, PARTS, dtype)
    second = second.to(tl.float32)
    other = add_parts(row + rest[None, :], rest_mask, part_stride, PARTS, dtype).to(tl.float32)

    if Q_NORM or K_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(other * other, 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        is_k = rotated & (head >= NUM_Q)
        normed = (is_q & Q_NORM) | (is_k & K_NORM)
        first = _normalize(
            first, inverse, q_weight_ptr, k_weight_ptr, half, HALF, is_q, normed, dtype
        )
        second = _normalize(
            second,
            inverse,
            q_weight_ptr,
            k_weight_ptr,
            HALF + half,
            2 * HALF,
            is_q,
            normed,
            dtype,
        )
        other = _normalize(
            other, inverse, q_weight_ptr, k_weight_ptr, rest, HEAD_DIM, is_q, normed, dtype
        )

    turned = rotated[:, None]
    new_first = tl.where(turned, first * cos - second * sin, first).to(dtype)
    new_second = tl.where(turned, second * cos + first * sin, second).to(dtype)
    other = other.to(dtype)
    stored = turned | COPIED
    row = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM
    tl.store(row + half[None, :], new_first, mask=half_mask & stored)
    tl.store(row + HALF + half[None, :], new_second, mask=half_mask & stored)
    tl.store(row + rest[None, :], other, mask=rest_mask & stored)

    if slot >= 0:
        cached = (inside & (head >= NUM_Q))[:, None]
        is_v = head >= NUM_Q + NUM_KV
        kv_head = head - NUM_Q - tl.where(is_v, NUM_KV, 0)
        block = slot // block_size
        entry = (
            kv_ptr
            + block * kv_stride_block
            + (slot - block * block_size) * kv_stride_token
            + is_v.to(tl.int64) * kv_stride_kv
            + kv_head.to(tl.int64) * kv_stride_head
        )[:, None]
        tl.store(entry + half[None, :], new_first, mask=half_mask & cached)
        tl.store(entry + HALF + half[None, :], new_second, mask=half_mask & cached)
        tl.store(entry + rest[None, :], other, mask=rest_mask & cached)


@triton.jit
def _normalize(x, inverse, q_weight_ptr, k_weight_ptr, at, end, is_q, normed, dtype: tl.constexpr):
    """A part of each head, ``x[HEADS, N]``, normalised where ``normed[HEADS]``."""
    q_weight = tl.load(q_weight_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    rounded = (x * inverse).to(dtype).to(tl.float32)
    return tl.where(normed[:, None], (rounded * weight).to(dtype).to(tl.float32), x)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    kv_layer: Tensor,
    *,
    num_q_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.rope.rope_and_cache``. Grid: (T, heads / HEADS)."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    half = cos.shape[1]
    assert kv_layer.stride(4) == 1
    assert cos.stride() == sin.stride()
    source, parts = qkv, 1
    if source.dim() == 3:
        parts = source.shape[0]
        qkv = torch.empty(source.shape[1:], dtype=kv_layer.dtype, device=source.device)
    if qkv.shape[0]:
        grid = (qkv.shape[0], triton.cdiv(num_q_heads + 2 * num_kv_heads, _HEADS))
        _rope_kernel[grid](
            source,
            qkv,
            cos,
            sin,
            positions,
            slot_mapping,
            kv_layer,
            # A weight that is missing is read, but not used.
            q_norm_weight if q_norm_weight is not None else k_norm_weight,
            k_norm_weight if k_norm_weight is not None else q_norm_weight,
            eps,
            source.stride(0),
            source.stride(-2),
            qkv.stride(0),
            cos.stride(0),
            kv_layer.stride(0),
            kv_layer.stride(1),
            kv_layer.stride(2),
            kv_layer.stride(3),
            block_size,
            NUM_Q=num_q_heads,
            NUM_KV=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            Q_NORM=q_norm_weight is not None,
            K_NORM=k_norm_weight is not None,
            HEADS=_HEADS,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
            PARTS=parts,
            COPIED=source is not qkv,
            OVERLAP=overlap(),
            num_warps=4,
            launch_pdl=overlap(),
        )
    return split_heads(qkv, num_q_heads, head_dim)
