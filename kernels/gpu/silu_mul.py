"""``silu(gate) * up``: one program a token and a stretch of the intermediate dimension."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up_ptr + token * stride + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + token * stride + SIZE + at, mask=inside, other=0.0)
    gate32 = gate.to(tl.float32)
    silu = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)  # rounded as transformers does
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + token * SIZE + at, out.to(gate.dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``kernels.silu_mul.silu_mul``. Grid: (T, I / BLOCK)."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        _silu_mul_kernel[grid](
            gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4
        )
    return out
