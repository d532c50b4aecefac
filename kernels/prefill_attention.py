"""Causal attention of a ragged batch of prompt chunks over the paged KV cache.

Each row's new tokens are the last of its context; what came before them (earlier chunks,
cached prefixes) lies in the row's blocks, and so do the new tokens themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .decode_attention import gather_kv


def prefill_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_q: int,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """Returns ``[T, Hq, D]``.

    - ``q[T, Hq, D]``: the rows' new tokens, one row after the other.
    - ``kv_layer[num_blocks, 2, Hkv, block_size, D]``: one layer of the pool, any strides.
    - ``block_tables[B, max_blocks]`` int32.
    - ``cu_seqlens_q[B + 1]`` int32: where each row starts in ``q``; the last entry is ``T``.
    - ``context_lens[B]`` int32: prefix + new tokens of each row.
    - ``max_q``: the longest row's number of new tokens.
    - ``k, v[T, Hkv, D]``: the new tokens' keys and values. Given only where *no* row has a
      prefix: then the cache need not be read.
    """
    if q.is_cuda:
        from .gpu.prefill_attention import prefill_attention as launch

        return launch(q, kv_layer, block_tables, cu_seqlens_q, context_lens, max_q, scale, k=k, v=v)
    return prefill_attention_reference(
        q, kv_layer, block_tables, cu_seqlens_q, context_lens, scale, k=k, v=v
    )


def prefill_attention_reference(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, a row at a time."""
    out = torch.empty(q.shape, dtype=q.dtype)  # [T, Hq, D]
    starts: list[int] = cu_seqlens_q.tolist()
    lengths: list[int] = context_lens.tolist()
    for row, length in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        if k is not None and v is not None:
            row_k, row_v = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
        else:
            blocks = block_tables[row, : -(-length // kv_layer.shape[3])].long()
            row_k, row_v = gather_kv(kv_layer, blocks, 1, length)  # [1, Hkv, length, D]
            row_k, row_v = row_k[0], row_v[0]
        out[start:end] = _causal(q[start:end].transpose(0, 1), row_k, row_v, scale)
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``q[Hq, n, D]`` are the last n of the ``length`` positions of ``k, v[Hkv, length, D]``.

    Returns ``[n, Hq, D]``.
    """
    num_new, length = q.shape[1], k.shape[1]
    mask = None
    if 1 < num_new < length:
        mask = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
    out = functional.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=num_new == length,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
