"""Which prefill attention runs: our ragged kernel, or cuDNN where it surely has a plan.

On dense keys and values the ragged kernel is faster than on paged ones by more than the
gathering costs, unless few new tokens follow a long prefix; and gathering takes memory. cuDNN
is a tenth faster still on one long prompt, but it plans each new length anew (40 ms; a plan
for many lengths needs queries, keys and values copied apart, which costs more than it
gains). So it gets the lengths that come again: powers of two, as the chunks of a cut prompt
are.
"""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor

from ..prefill_attention import PrefillBatch
from .gather_contexts import gather_contexts
from .ragged_attention import dense_attention, paged_attention

_MIN_CUDNN_TOKENS = 4096
_MAX_GATHERED = 64  # tokens of context for each new one
_LEAST_GATHERED = 128  # new tokens: with no more, programs that share a tile's keys are faster


class PrefillPath(Enum):
    """How a batch is attended to."""

    CUDNN = auto()
    DENSE = auto()
    GATHERED = auto()
    PAGED = auto()


def choose(batch: PrefillBatch, dtype: torch.dtype, head_dim: int) -> PrefillPath:
    """The selection point: a function of shapes alone."""
    if batch.placed:
        return PrefillPath.PAGED  # it alone takes rows from wherever they begin
    num_new = sum(batch.new_lens)
    if batch.has_prefix:
        few = num_new <= _LEAST_GATHERED or sum(batch.context_lens) > _MAX_GATHERED * num_new
        return PrefillPath.PAGED if few else PrefillPath.GATHERED
    planned = num_new >= _MIN_CUDNN_TOKENS and num_new.bit_count() == 1
    if len(batch.new_lens) == 1 and planned and dtype.itemsize == 2 and head_dim in (64, 128):
        return PrefillPath.CUDNN
    return PrefillPath.DENSE


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layer: Tensor,
    scale: float,
    batch: PrefillBatch,
    out: Tensor | None = None,
) -> Tensor:
    """See ``kernels.prefill_attention.prefill_attention``."""
    match choose(batch, q.dtype, q.shape[2]):
        case PrefillPath.CUDNN:
            found = cudnn_attention(q, k, v, scale)
            return found.contiguous() if out is None else out.copy_(found)
        case PrefillPath.DENSE:
            return dense_attention(q, k, v, scale, batch, out=out)
        case PrefillPath.GATHERED:
            return dense_attention(q, *gather_contexts(kv_layer, batch), scale, batch, out=out)
        case PrefillPath.PAGED:
            return paged_attention(q, kv_layer, scale, batch, out=out)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One prompt without a prefix: ``q[n, Hq, D]`` over ``k, v[n, Hkv, D]`` -> ``[n, Hq, D]``,
    laid out as cuDNN likes."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        None,
        False,
        0.0,
        True,
        False,
        scale=scale,
    )
    out: Tensor = result[0]  # [1, Hq, n, D], laid out as q is
    return out[0].transpose(0, 1)
