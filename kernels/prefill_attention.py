"""Causal attention of a ragged batch of prompt chunks over the paged KV cache.

Each row's new tokens are the last of its context; what came before them (earlier chunks,
cached prefixes) lies in the row's blocks, and so do the new tokens themselves. As in
``decode_attention``, what every layer needs is worked out once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from .decode_attention import gather_kv


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """One step's chunks; a row has one new token or more."""

    block_tables: Tensor  # [B, max_blocks] int32; entries past the context are not read
    new_lens: tuple[int, ...]  # [B]
    context_lens: tuple[int, ...]  # [B] prefix + new tokens
    q_starts: tuple[int, ...]  # [B + 1] where each row starts in q; the last is T
    bounds: Tensor  # [2, B + 1] int32: q_starts, and running sums of context_lens
    placed: bool = False  # the first row begins where ``bounds`` says, behind other tokens

    @classmethod
    def create(
        cls, block_tables: Tensor, new_lens: Sequence[int], context_lens: Sequence[int]
    ) -> PrefillBatch:
        """``block_tables[B, max_blocks]`` int32 on the device that computes; ``B`` >= 1."""
        q_starts = tuple(accumulate(new_lens, initial=0))
        bounds = torch.tensor(
            (q_starts, tuple(accumulate(context_lens, initial=0))), dtype=torch.int32
        )
        if block_tables.is_cuda:
            bounds = bounds.pin_memory().to(block_tables.device, non_blocking=True)
        return cls(block_tables, tuple(new_lens), tuple(context_lens), q_starts, bounds)

    @classmethod
    def captured(
        cls,
        block_tables: Tensor,
        bounds: Tensor,
        size: int,
        most_context: int,
        placed: bool = False,
    ) -> PrefillBatch:
        """For a graph: each of ``block_tables[B, max_blocks]``'s rows may have up to ``size`` new
        tokens and ``most_context`` in all; ``bounds[2, B + 1]`` say at each replay what it has."""
        rows = len(block_tables)
        return cls(block_tables, (size,) * rows, (most_context,) * rows, (), bounds, placed)

    @property
    def has_prefix(self) -> bool:
        return self.new_lens != self.context_lens


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layer: Tensor,
    scale: float,
    batch: PrefillBatch,
    out: Tensor | None = None,
) -> Tensor:
    """Returns ``[T, Hq, D]``, dense, into ``out`` where given.

    - ``q[T, Hq, D]``, ``k, v[T, Hkv, D]``: the rows' new tokens, one row after the other; any
      strides, the last dimension dense.
    - ``kv_layer[num_blocks, 2, Hkv, block_size, D]``: one layer of the pool, any strides (the
      last dimension dense). The new tokens' keys and values are in it already.
    """
    if q.is_cuda:
        from .gpu.prefill_attention import prefill_attention as launch

        return launch(q, k, v, kv_layer, scale, batch, out)
    return prefill_attention_reference(q, k, v, kv_layer, scale, batch, out)


def prefill_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layer: Tensor,
    scale: float,
    batch: PrefillBatch,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, a row at a time; tokens of no row are left as they are."""
    block_size = kv_layer.shape[3]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)  # [T, Hq, D]
    for row, (num_new, length) in enumerate(zip(batch.new_lens, batch.context_lens, strict=True)):
        mine = slice(batch.q_starts[row], batch.q_starts[row + 1])
        if num_new == length:
            row_k = k[mine].transpose(0, 1)[None]  # [1, Hkv, length, D]
            row_v = v[mine].transpose(0, 1)[None]
            mask = None
        else:
            blocks = batch.block_tables[row, : -(-length // block_size)].long()
            row_k, row_v = gather_kv(kv_layer, blocks, 1, length)
            mask = torch.ones(num_new, length, dtype=torch.bool).tril_(length - num_new)
        attended = functional.scaled_dot_product_attention(
            q[mine].transpose(0, 1)[None],  # [1, Hq, num_new, D]
            row_k,
            row_v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        out[mine] = attended[0].transpose(0, 1)
    return out
