"""Inputs for the kernels, and what they must compute, in float64 and by the textbook.

Used by the tests and by the check on a GPU. Nothing here is shared with the kernels or their
references: a token's place in the pool is looked up one at a time, and attention is written
out as a softmax over a full matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.decode_attention import DecodeWorkspace
from ..kernels.prefill_attention import PrefillBatch


def relative_error(out: Tensor, exact: Tensor) -> float:
    """``||out - exact|| / ||exact||``; NaN where ``out`` has one."""
    difference = (out.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


@dataclass(frozen=True, slots=True)
class PagedContexts:
    """Random contexts in a pool whose other blocks, and layers, hold NaN."""

    pool: Tensor  # [num_blocks, num_layers, 2, Hkv, block_size, D]
    layer: int
    block_tables: Tensor  # [B, max_blocks] int32; -1 past the context
    context_lens: tuple[int, ...]

    @classmethod
    def create(
        cls,
        context_lens: Sequence[int],
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
        block_size: int = 16,
        num_layers: int = 2,
        spread: float = 1.0,
        poisoned_tails: bool = False,
    ) -> PagedContexts:
        """``spread`` is the keys' standard deviation: the larger, the sharper the softmax.

        With ``poisoned_tails`` a last block is NaN past its context, else any numbers.
        """
        needed = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(needed) + 2
        shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        pool = torch.full(shape, math.nan, dtype=dtype, device=device)
        order = torch.randperm(num_blocks)
        tables = torch.full((len(needed), max(needed, default=1) + 1), -1, dtype=torch.int32)
        layer = num_layers - 1
        for row, count in enumerate(needed):
            blocks, order = order[:count], order[count:]
            tables[row, :count] = blocks
            values = torch.randn(count, 2, *shape[3:], device=device)
            values[:, 0] *= spread
            if poisoned_tails and count:
                values[-1, :, :, context_lens[row] - (count - 1) * block_size :] = math.nan
            pool[blocks.to(device), layer] = values.to(dtype)
        return cls(pool, layer, tables.to(device), tuple(context_lens))

    @property
    def kv_layer(self) -> Tensor:
        """``[num_blocks, 2, Hkv, block_size, D]``, not dense."""
        return self.pool[:, self.layer]

    def keys_values(self, row: int) -> tuple[Tensor, Tensor]:
        """``(k, v)[length, Hkv, D]`` of a row, as stored."""
        block_size = self.pool.shape[4]
        table = self.block_tables[row].tolist()
        at = range(self.context_lens[row])
        blocks = [table[token // block_size] for token in at]
        offsets = [token % block_size for token in at]
        entries = self.kv_layer[blocks, :, :, offsets]  # [length, 2, Hkv, D]
        return entries[:, 0], entries[:, 1]

    def workspace(self, num_q_heads: int) -> DecodeWorkspace:
        """Prepared for these contexts."""
        workspace = DecodeWorkspace(
            max_batch=len(self.context_lens),
            num_q_heads=num_q_heads,
            num_kv_heads=self.pool.shape[3],
            head_dim=self.pool.shape[5],
            block_size=self.pool.shape[4],
            dtype=self.pool.dtype,
            device=self.pool.device,
        )
        workspace.prepare(self.block_tables, self.context_lens_tensor)
        return workspace

    @property
    def context_lens_tensor(self) -> Tensor:
        return torch.tensor(self.context_lens, dtype=torch.int32, device=self.pool.device)

    def exact_decode(self, q: Tensor, scale: float) -> Tensor:
        """Of ``q[B, Hq, D]``: ``[B, Hq, D]`` in float64, zeros for an empty context."""
        out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        for row, length in enumerate(self.context_lens):
            if length:
                k, v = self.keys_values(row)
                out[row] = exact_attention(q[row : row + 1], k, v, scale)[0]
        return out


@dataclass(frozen=True, slots=True)
class Chunks:
    """Random prompt chunks over ``PagedContexts``."""

    contexts: PagedContexts
    batch: PrefillBatch
    q: Tensor  # [T, Hq, D], a view into a wider tensor
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]

    @classmethod
    def create(
        cls, new_lens: Sequence[int], contexts: PagedContexts, *, num_q_heads: int
    ) -> Chunks:
        pool = contexts.pool
        batch = PrefillBatch.create(contexts.block_tables, new_lens, contexts.context_lens)
        wide = torch.randn(sum(new_lens), num_q_heads + 3, pool.shape[5], device=pool.device)
        tails = [
            tuple(part[-new:] for part in contexts.keys_values(row))
            for row, new in enumerate(new_lens)
        ]
        k, v = (torch.cat(parts) for parts in zip(*tails, strict=True))
        return cls(contexts, batch, wide.to(pool.dtype)[:, 1 : 1 + num_q_heads], k, v)

    def exact(self, scale: float) -> Tensor:
        """``[T, Hq, D]`` in float64."""
        parts = self.q.split(self.batch.new_lens)
        return torch.cat(
            [
                exact_attention(part, *self.contexts.keys_values(row), scale)
                for row, part in enumerate(parts)
            ]
        )


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``q[n, Hq, D]``, the last n of the m positions of ``k, v[m, Hkv, D]`` -> ``[n, Hq, D]``."""
    group = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(group, dim=1)  # [m, Hq, D]
    v = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * scale
    at = torch.arange(k.shape[0], device=q.device)
    later = at[None, :] > at[-q.shape[0] :, None]  # [n, m]
    weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float64."""
    x = x.double()
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def exact_silu_mul(gate_up: Tensor) -> Tensor:
    """``[T, 2I] -> [T, I]`` in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """``x[T, H, D]`` with ``cos, sin[max_position, rot / 2]``: each pair as a complex number."""
    half = cos.shape[1]
    x = x.double()
    angle = torch.complex(cos.double(), sin.double())[positions].unsqueeze(1)  # [T, 1, rot / 2]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * angle
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)
