"""Rotary position embedding and the write into the KV cache, in one pass over q, k and v.

RoPE: Su et al., 2021, in the ``rotate_half`` convention of transformers (dimension ``i``
is paired with ``i + rot / 2``). Where the model normalises each head of q and k first
(Qwen3), that is part of the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_step
from .rms_norm import normalize


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
    """Rotates q and k **in place** in ``qkv``, writes k and v into the cache.

    Returns the views ``(q[T, Hq, D], k[T, Hkv, D], v[T, Hkv, D])`` of ``qkv``.

    - ``qkv[T, (Hq + 2 Hkv) * D]``: the merged projection, q then k then v; or the parts of that
      sum, ``[S, T, ...]`` fp32 (see ``linear.linear_parts``): then what is returned is new.
    - ``cos, sin[max_position, rot / 2]`` in fp32; ``rot <= D``, the rest passes through.
    - ``positions[T]``: int32 or int64.
    - ``slot_mapping[T]`` int64: ``block * block_size + offset``; negative = padding row,
      nothing is written for it.
    - ``kv_layer[num_blocks, 2, Hkv, block_size, D]``: one layer of the pool, any strides
      (the last dimension dense).
    - ``q_norm_weight, k_norm_weight[D]``: RMSNorm of every head before the rotation.
    """
    if qkv.is_cuda:
        from .gpu.rope import rope_and_cache as launch
    elif cpu_step.serves(qkv, kv_layer.shape[4]) and positions.dtype is torch.int64:
        launch = cpu_step.rope_and_cache
    else:
        launch = rope_and_cache_reference
    return launch(
        qkv,
        cos,
        sin,
        positions,
        slot_mapping,
        kv_layer,
        num_q_heads=num_q_heads,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        eps=eps,
    )


def split_heads(qkv: Tensor, num_q_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The views ``(q[T, Hq, D], k[T, Hkv, D], v[T, Hkv, D])`` of ``qkv[T, (Hq + 2 Hkv) * D]``."""
    heads = qkv.view(qkv.shape[0], -1, head_dim)  # [T, Hq + 2 Hkv, D]
    first_v = (num_q_heads + heads.shape[1]) // 2
    return heads[:, :num_q_heads], heads[:, num_q_heads:first_v], heads[:, first_v:]


def rope_and_cache_reference(
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
    """The same in plain torch."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    half = cos.shape[1]
    q, k, v = split_heads(qkv, num_q_heads, head_dim)
    if q_norm_weight is not None:
        q.copy_(normalize(q, q_norm_weight, eps))
    if k_norm_weight is not None:
        k.copy_(normalize(k, k_norm_weight, eps))

    # q and k together: they are neighbours in qkv, as are k and v.
    heads = qkv.view(qkv.shape[0], -1, head_dim)  # [T, Hq + 2 Hkv, D]
    rotated = heads[:, : num_q_heads + num_kv_heads, : 2 * half]
    rotated = rotated.view(*rotated.shape[:2], 2, half)
    pair = rotated.float()  # [T, Hq + Hkv, 2, rot / 2], in fp32 the very memory of qkv
    cos_t = cos.index_select(0, positions)[:, None, None]  # [T, 1, 1, rot / 2]
    sin_t = sin.index_select(0, positions)[:, None, None]
    crossed = pair.flip(2).mul_(sin_t)
    pair.mul_(cos_t)
    pair[:, :, 0].sub_(crossed[:, :, 0])
    pair[:, :, 1].add_(crossed[:, :, 1])
    if pair.dtype != qkv.dtype:
        rotated.copy_(pair)

    kv = heads[:, num_q_heads:].view(-1, 2, num_kv_heads, head_dim)  # [T, 2, Hkv, D]
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        written = slot_mapping >= 0
        slot_mapping, kv = slot_mapping[written], kv[written]
    by_token = kv_layer.permute(0, 3, 1, 2, 4)  # [num_blocks, block_size, 2, Hkv, D]
    blocks = slot_mapping.div(block_size, rounding_mode="floor")
    by_token.index_put_((blocks, slot_mapping - blocks * block_size), kv)
    return q, k, v
