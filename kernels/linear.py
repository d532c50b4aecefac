"""The linear layers of a step: the selection point between libraries and our own kernels.

Few tokens are bound by how fast the weights are read. On a GPU cuBLAS reaches about three
quarters of that there, and ``skinny_linear`` more; from some tens of tokens on cuBLAS is ahead.
On a CPU see ``cpu_linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .cpu_linear import linear as cpu_linear
from .silu_mul import silu_mul


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x[T, K]``, ``weight[N, K]``, ``bias[N]`` -> ``[T, N]``, into ``out`` where given."""
    if not x.is_cuda:
        found = cpu_linear(x, weight, bias)
        return found if out is None else out.copy_(found)
    from .gpu import skinny_linear as skinny

    if (tuning := skinny.whole_tuning(x, weight)) is not None:
        return skinny.skinny_linear(x, weight, bias, tuning, out)
    if out is not None:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    return functional.linear(x, weight, bias)


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``linear``, or ``[S, T, N]`` fp32, whose sum over S, rounded, it would be.

    The next kernel (``rms_norm``, ``rope_and_cache``) adds the parts up as it reads them.
    """
    if x.is_cuda:
        from .gpu import skinny_linear as skinny

        if (tuning := skinny.split_tuning(x, weight)) is not None:
            return skinny.skinny_linear(x, weight, bias, tuning)
    return linear(x, weight, bias)


def gated_linear(x: Tensor, gate_up: Tensor) -> Tensor:
    """``silu(x . gate^T) * (x . up^T)``: ``x[T, K]``, ``gate_up[2I, K]`` -> ``[T, I]``."""
    if x.is_cuda:
        from .gpu import skinny_linear as skinny

        if (tuning := skinny.gated_tuning(x, gate_up)) is not None:
            return skinny.skinny_gated(x, gate_up, tuning)
    return silu_mul(linear(x, gate_up))
