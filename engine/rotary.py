"""The cosines and sines of rotary embedding (Su et al., 2021) for every position.

Frequencies follow transformers operation by operation, so that fp32 tables are equal to
the last bit where the family is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .shape import Rope, RopeType


def rotary_tables(rope: Rope, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """``(cos, sin)[num_positions, head_dim / 2]`` in fp32, on the CPU."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    return angles.cos() * rope.amplitude, angles.sin() * rope.amplitude


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """``[head_dim / 2]`` fp32: the angle by which a position turns each pair of dimensions."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / wavelengths
    match rope.type:
        case RopeType.DEFAULT:
            return plain
        case RopeType.LINEAR:
            return plain / rope.factor
        case RopeType.LLAMA3:
            return _llama3(rope, plain)
        case RopeType.YARN:
            return _yarn(rope, wavelengths, head_dim)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, those between blended."""
    turns = rope.original_context / (2 * math.pi / plain)  # within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    scaled = torch.where(turns < rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, plain, scaled)


def _yarn(rope: Rope, wavelengths: Tensor, head_dim: int) -> Tensor:
    """NTK by parts (Peng et al., 2023): as above, blended linearly over the dimensions."""

    def dimension(turns: float) -> float:
        """The one that turns so often within the original context."""
        context = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = torch.arange(head_dim // 2, dtype=torch.float32) - low
    stretched = (ramp / (high - low if high != low else 0.001)).clamp(0, 1)
    kept = 1 - stretched
    return (1.0 / (rope.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept
