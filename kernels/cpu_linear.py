"""Linear layers of a few rows on a CPU, at the speed of memory.

torch's CPU GEMMs are made for many rows: at 1 to 16 they stream weights at a fraction of
what the memory gives (bf16 without AVX-512 above all). The loop in ``cpu_linear.c`` is
compiled once for this machine by its C compiler and kept in the user's cache; where there
is no compiler, torch does the work.

Weights may be bf16 or fp32, activations and sums are fp32.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

MAX_ROWS = 16  # beyond it the GEMM of torch's BLAS wins, a widening of the weights included

_SOURCE = Path(__file__).with_name("cpu_linear.c")
# No OpenMP library is linked: its symbols are those of the one that torch has loaded, so
# that one pool of threads serves both.
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")


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
    library = _library(_cache_folder())
    if library is None:
        return {}
    table: dict[torch.dtype, Callable[..., None]] = {}
    for dtype, name in ((torch.bfloat16, "linear_bf16"), (torch.float32, "linear_f32")):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_int]
        function.restype = None
        table[dtype] = function
    return table


def _cache_folder() -> Path:
    root = os.environ.get("PDSERVE_CACHE")
    if root:
        return Path(root) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdserve" / "kernels"


def _library(folder: Path) -> ctypes.CDLL | None:
    """Compiled if need be; None where there is no compiler, or what it made does not load."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = _SOURCE.read_bytes()
    name = hashlib.blake2b(source + _cpu_flags() + compiler.encode(), digest_size=12).hexdigest()
    target = folder / f"cpu_linear-{name}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, target: Path) -> None:
    """Raises OSError or SubprocessError. Atomic: several workers may do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        compiled, linked = Path(work) / "cpu_linear.o", Path(work) / "cpu_linear.so"
        for command in (
            [compiler, *_COMPILE, str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        linked.replace(target)


def _cpu_flags() -> bytes:
    """What ``-march=native`` depends on: a cache on a shared disk serves several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
