"""Linear layers of a few rows on a CPU, at the speed of memory.

torch's CPU GEMMs are made for many rows: at 1 to 16 they stream weights at a fraction of
what the memory gives (bf16 without AVX-512 above all). The loop in ``cpu_linear.c`` does
better; where there is no compiler, torch does the work.

Weights may be bf16 or fp32, activations and sums are fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from . import cpu_library

MAX_ROWS = 16  # beyond it the GEMM of torch's BLAS wins, a widening of the weights included


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] fp32, weight [N, K] bf16 or fp32, bias [N] fp32 -> [T, N] fp32."""
    num_rows, width = x.shape
    if num_rows <= MAX_ROWS and width % 8 == 0 and x.is_contiguous() and weight.is_contiguous():
        kernel = _kernels().get(weight.dtype)
        if kernel is not None:
            y = x.new_empty(num_rows, weight.shape[0])  # [T, N]
            kernel(
                x.data_ptr(),
                weight.data_ptr(),
                y.data_ptr(),
                num_rows,
                weight.shape[0],
                width,
                torch.get_num_threads(),
            )
            return y if bias is None else y.add_(bias)
    return F.linear(x, weight.to(x.dtype), bias)


def compiled() -> bool:
    """Whether the compiled loop is in use (else: torch)."""
    return bool(_kernels())


@cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    library = cpu_library.load(Path(__file__).with_suffix(".c"), cpu_library.cache_folder())
    if library is None:
        return {}
    table: dict[torch.dtype, Callable[..., None]] = {}
    for dtype, name in ((torch.bfloat16, "linear_bf16"), (torch.float32, "linear_f32")):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_int]
        function.restype = None
        table[dtype] = function
    return table
