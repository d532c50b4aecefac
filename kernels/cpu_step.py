"""A step beside its linear layers on a CPU, in fp32: the compiled loops of ``cpu_step.c``.

Each function has its twin in plain torch, which serves what these do not: other types and
shapes, and machines without a compiler. Whether one serves is asked before.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import cpu_library

MAX_GROUP = 16  # query heads that share a KV head
MAX_BLOCK = 256

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "rms_norm": (*(_POINTER,) * 3, _FLOAT, *(_POINTER,) * 2, *(_LONG,) * 2, _INT),
    "silu_mul": (*(_POINTER,) * 2, *(_LONG,) * 2, _INT),
    "rope_and_cache": (*(_POINTER,) * 9, _FLOAT, *(_LONG,) * 6, _INT),
    "decode_attention": (
        *(_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG),
        *(_POINTER, _POINTER, *(_LONG,) * 5, _FLOAT, _INT),
    ),
}


def serves(x: Tensor, width: int) -> bool:
    """Whether rows of ``width`` values like ``x`` are for the compiled loops."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and width % 8 == 0
        and x.is_contiguous()
        and _library() is not None
    )


def serves_heads(dtype: torch.dtype, head_dim: int, group: int, block_size: int) -> bool:
    """Whether heads of this kind are, ``group`` query heads sharing a KV head."""
    return (
        dtype is torch.float32
        and head_dim % 8 == 0
        and group <= MAX_GROUP
        and block_size <= MAX_BLOCK
        and _library() is not None
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x, residual[T, H]``, ``weight[H]`` -> normed, and ``x + residual``."""
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _call().rms_norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        eps,
        normed.data_ptr(),
        total.data_ptr(),
        x.shape[0],
        x.shape[1],
        torch.get_num_threads(),
    )
    return normed, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up[T, 2 I]`` -> ``[T, I]``."""
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2)
    _call().silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, torch.get_num_threads())
    return out


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
    """As ``kernels.rope.rope_and_cache``, with ``positions`` int64."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    _call().rope_and_cache(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        kv_layer.data_ptr(),
        _strides(kv_layer),
        None if q_norm_weight is None else q_norm_weight.data_ptr(),
        None if k_norm_weight is None else k_norm_weight.data_ptr(),
        eps,
        qkv.shape[0],
        num_q_heads,
        num_kv_heads,
        head_dim,
        cos.shape[1],
        block_size,
        torch.get_num_threads(),
    )
    heads = qkv.view(qkv.shape[0], -1, head_dim)  # [T, Hq + 2 Hkv, D]
    first_v = num_q_heads + num_kv_heads
    return heads[:, :num_q_heads], heads[:, num_q_heads:first_v], heads[:, first_v:]


def decode_attention(
    q: Tensor, kv_layer: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Shapes as in ``kernels.decode_attention``: ``q[B, Hq, D]`` with dense heads,
    ``block_tables[B, max_blocks]`` dense."""
    rows, num_q_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)  # [B, Hq, D]
    _call().decode_attention(
        q.data_ptr(),
        q.stride(0),
        kv_layer.data_ptr(),
        _strides(kv_layer),
        block_tables.data_ptr(),
        block_tables.shape[1],
        context_lens.data_ptr(),
        out.data_ptr(),
        rows,
        num_q_heads,
        kv_layer.shape[2],
        head_dim,
        kv_layer.shape[3],
        scale,
        torch.get_num_threads(),
    )
    return out


def _strides(kv_layer: Tensor) -> ctypes.Array[ctypes.c_long]:
    """From block to block, key to value, head to head, token to token."""
    return (ctypes.c_long * 4)(*kv_layer.stride()[:4])


def _call() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask serves first"
    return library


@cache
def _library() -> ctypes.CDLL | None:
    library = cpu_library.load(Path(__file__).with_suffix(".c"), cpu_library.cache_folder())
    if library is not None:
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
    return library
