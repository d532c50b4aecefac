"""Attention of one new token a sequence over its paged KV cache.

What depends only on the step (how long the contexts are, how the work is divided) is
worked out once, in a ``DecodeWorkspace``; every layer then uses it. On a GPU the keys are
split between programs (Flash-Decoding, Dao et al., 2023) that find their share in device
memory, so that one captured graph serves any lengths. On a CPU a compiled loop reads the
blocks where they are; without one, those of sequences of similar length are gathered into
one dense batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from . import cpu_step

if TYPE_CHECKING:
    from .gpu.decode_attention import SplitWorkspace


class DecodeWorkspace:
    """One step's division of the work, and scratch memory for it.

    On a GPU its tensors have fixed addresses: a graph captured with it must be replayed
    with it, and no two steps that overlap in time may share one.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.max_batch = max_batch
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.dtype = dtype
        self.groups: tuple[LengthGroup, ...] = ()
        self.split: SplitWorkspace | None = None
        self.compiled = False
        self.paged: tuple[Tensor, Tensor] | None = None  # what ``prepare`` was given
        device = torch.device(device)
        if device.type == "cuda":
            from .gpu.decode_attention import SplitWorkspace

            self.split = SplitWorkspace(
                max_batch=max_batch,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
            )
        else:
            group = num_q_heads // num_kv_heads
            self.compiled = cpu_step.serves_heads(dtype, head_dim, group, block_size)

    def prepare(self, block_tables: Tensor, context_lens: Tensor) -> None:
        """Once a step, before the first layer; on a GPU inside the captured graph.

        - ``block_tables[B, max_blocks]`` int32: entries past the context are not read.
        - ``context_lens[B]`` int32: tokens including the new one; 0 = padding row.
        """
        if self.split is not None:
            self.split.prepare(block_tables, context_lens)
        elif self.compiled:
            self.paged = block_tables.contiguous(), context_lens
        else:
            self.groups = group_by_length(block_tables, context_lens, self.block_size, self.dtype)


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: Tensor | None = None,
) -> Tensor:
    """Returns ``[B, Hq, D]``, dense, into ``out`` where given; zeros where the context is empty.

    - ``q[B, Hq, D]``: any strides, the last dimension dense.
    - ``kv_layer[num_blocks, 2, Hkv, block_size, D]``: one layer of the pool, any strides
      (the last dimension dense). The new token's key and value are in it. A new pool is
      filled with zeros: keys past a context are masked, but must be numbers.
    - ``workspace``: prepared for this step.
    """
    if workspace.split is not None:
        from .gpu.decode_attention import decode_attention as launch

        return launch(q, kv_layer, scale, workspace.split, out)
    if workspace.paged is not None:
        found = cpu_step.decode_attention(q, kv_layer, *workspace.paged, scale)
    else:
        found = decode_attention_reference(q, kv_layer, scale, workspace.groups)
    return found if out is None else out.copy_(found)


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Rows of a batch whose contexts take about as many blocks: the most less than twice the
    least. One dense batch for all rows would do the longest context's work for each."""

    rows: Tensor | None  # [n] int64; None: all rows of the batch, in order
    blocks: Tensor  # [n * most_blocks] int64, one row's table after the other, padded
    size: int  # n
    longest: int  # tokens
    mask: Tensor | None  # [n, 1, 1, longest], 0 or -inf; None: all contexts are that long


def group_by_length(
    block_tables: Tensor, context_lens: Tensor, block_size: int, dtype: torch.dtype
) -> tuple[LengthGroup, ...]:
    """Divides the rows with a context; arguments as for ``DecodeWorkspace.prepare``."""
    lengths: list[int] = context_lens.tolist()
    members: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            members.setdefault((-(-length // block_size)).bit_length(), []).append(row)
    groups = []
    for rows in members.values():
        longest = max(lengths[row] for row in rows)
        most_blocks = -(-longest // block_size)
        index = None if len(rows) == len(lengths) else torch.tensor(rows)
        tables, lens = block_tables[:, :most_blocks], context_lens
        if index is not None:
            tables, lens = tables.index_select(0, index), lens.index_select(0, index)
        mask = None
        if any(lengths[row] != longest for row in rows):
            at = torch.arange(longest)  # [longest]
            past = at >= lens.unsqueeze(1)  # [n, longest]
            mask = torch.zeros(past.shape, dtype=dtype).masked_fill_(past, -math.inf)
            mask = mask[:, None, None]
            # Entries past the context may be anything; a row's own first block will do.
            unused = past[:, ::block_size]  # [n, most_blocks]
            tables = tables.where(~unused, tables[:, :1])
        groups.append(LengthGroup(index, tables.flatten().long(), len(rows), longest, mask))
    return tuple(groups)


def decode_attention_reference(
    q: Tensor, kv_layer: Tensor, scale: float, groups: tuple[LengthGroup, ...]
) -> Tensor:
    """The same in plain torch."""
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = kv_layer.shape[2]
    if len(groups) != 1 or groups[0].rows is not None:
        out = torch.zeros(q.shape, dtype=q.dtype)  # [B, Hq, D]
    for group in groups:
        k, v = gather_kv(kv_layer, group.blocks, group.size, group.longest)
        mine = q if group.rows is None else q.index_select(0, group.rows)
        # The queries of a KV head side by side make a matrix product out of a product with
        # a vector, which is slow in 16 bits.
        packed = mine.reshape(group.size, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        attended = functional.scaled_dot_product_attention(
            packed, k, v, attn_mask=group.mask, scale=scale
        ).reshape(group.size, num_q_heads, head_dim)
        if group.rows is None:
            return attended
        out[group.rows] = attended
    return out


def gather_kv(kv_layer: Tensor, blocks: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Dense keys and values ``(k, v)[rows, Hkv, length, D]`` out of the pool.

    ``kv_layer[num_blocks, 2, Hkv, block_size, D]``; ``blocks[rows * n]`` int64, the tables of
    the rows one after the other, ``n`` blocks each.
    """
    by_head = kv_layer.permute(1, 2, 0, 3, 4)  # [2, Hkv, num_blocks, block_size, D]
    gathered = by_head.index_select(2, blocks)  # [2, Hkv, rows * n, block_size, D]
    num_kv_heads, head_dim = gathered.shape[1], gathered.shape[4]
    k, v = gathered.view(2, num_kv_heads, rows, -1, head_dim).transpose(1, 2)[..., :length, :]
    return k, v
