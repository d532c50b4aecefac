"""RMSNorm, fused with the residual addition that comes before it.

Root mean square layer normalisation: Zhang and Sennrich, 2019. Statistics are in fp32
and the normalised value is rounded to the model's type *before* the weight is applied,
as in the Llama implementation of transformers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from . import cpu_step


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns ``(normed[T, H], residual_out[T, H])``.

    ``x[T, H]``; ``weight[H]``; with ``residual[T, H]`` the sum ``x + residual`` is what is
    normalised and handed on as ``residual_out``, else ``residual_out`` is ``x`` itself. With a
    residual ``x`` may be the parts of a sum, ``[S, T, H]`` fp32: see ``linear.linear_parts``.
    """
    if x.is_cuda:
        from .gpu.rms_norm import rms_norm as launch

        return launch(x, weight, eps, residual)
    if cpu_step.serves(x, x.shape[1]) and (residual is None or residual.is_contiguous()):
        return cpu_step.rms_norm(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    if residual is not None:
        x = x + residual  # [T, H]
    return normalize(x, weight, eps), x


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: ``x[..., H]``, ``weight[H]``."""
    # Without its weight: torch would multiply before it rounds.
    return functional.rms_norm(x, weight.shape, None, eps).mul_(weight)
