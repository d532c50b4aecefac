"""The gated activation of a Llama MLP, ``silu(gate) * up``, on the merged projection."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from . import cpu_step


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up[T, 2I]`` (gate first) -> ``[T, I]``."""
    if gate_up.is_cuda:
        from .gpu.silu_mul import silu_mul as launch

        return launch(gate_up)
    if cpu_step.serves(gate_up, gate_up.shape[1] // 2):
        return cpu_step.silu_mul(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)  # [T, I] each
    return functional.silu(gate).mul_(up)
