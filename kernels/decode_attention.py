"""Attention of one new token a sequence over its paged KV cache.

On a GPU the keys are split between programs (Flash-Decoding, Dao et al., 2023) whose
work is read from device memory: a captured launch serves any lengths. On a CPU each
sequence's blocks are gathered and attended to in turn, so that a sequence's result does
not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class DecodeWorkspace:
    """Scratch memory and the division of the work; one for each batch size that is captured.

    ``prepare`` is called once a step, before the first layer (inside the captured graph).
    """

    def __init__(
        self,
        *,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        self.lengths: list[int] = []
        self.max_batch = max_batch
        if device.type == "cuda":
            from .gpu.decode_attention import SplitWorkspace

            self.split = SplitWorkspace(
                max_batch=max_batch,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                device=device,
            )

    def prepare(self, context_lens: Tensor) -> None:
        """Divides the work of one step: ``context_lens[B]`` int32, 0 = padding row."""
        if context_lens.is_cuda:
            self.split.prepare(context_lens)
        else:
            self.lengths = context_lens.tolist()


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
) -> Tensor:
    """Returns ``[B, Hq, D]``; zeros where the context is empty.

    - ``q[B, Hq, D]``: any strides, the last dimension dense.
    - ``kv_layer[num_blocks, 2, Hkv, block_size, D]``: one layer of the pool, any strides
      (the last dimension dense). The new token's key and value are in it.
    - ``block_tables[B, max_blocks]`` int32: entries past the context are not read.
    - ``context_lens[B]`` int32: tokens including the new one; 0 = padding row.
    - ``workspace``: prepared for these ``context_lens``.
    """
    if q.is_cuda:
        from .gpu.decode_attention import decode_attention as launch

        return launch(q, kv_layer, block_tables, context_lens, scale, workspace.split)
    return decode_attention_reference(q, kv_layer, block_tables, workspace.lengths, scale)


def decode_attention_reference(
    q: Tensor, kv_layer: Tensor, block_tables: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """The same in plain torch; ``lengths`` are the ``context_lens`` as numbers."""
    out = torch.zeros_like(q)  # [B, Hq, D]
    for row, length in enumerate(lengths):
        if length:
            k, v = gather_kv(kv_layer, block_tables[row], length)
            out[row] = functional.scaled_dot_product_attention(
                q[row].unsqueeze(1), k, v, scale=scale, enable_gqa=True
            ).squeeze(1)
    return out


def gather_kv(kv_layer: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first ``length`` keys and values of one sequence: ``(k, v)[Hkv, length, D]``.

    ``kv_layer[num_blocks, 2, Hkv, block_size, D]``; ``block_table[max_blocks]``.
    """
    block_size = kv_layer.shape[3]
    table = block_table[: -(-length // block_size)]
    blocks = kv_layer.index_select(0, table)  # [n, 2, Hkv, block_size, D]
    by_head = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [2, Hkv, n * block_size, D]
    k, v = by_head[:, :, :length]
    return k, v
