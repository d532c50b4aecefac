"""Rotation and cache write against complex multiplication in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.bench.kernel_cases import exact_rms_norm, exact_rope, relative_error
from pdserve.kernels.rope import rope_and_cache, split_heads

pytestmark = pytest.mark.usefixtures("cpu_path")
BLOCK = 16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20)])
def test_rotates_in_place_and_writes_the_cache(
    head_dim: int, half: int, normed: bool, dtype: torch.dtype
) -> None:
    num_q, num_kv, tokens = 6, 2, 5
    qkv = torch.randn(tokens, (num_q + 2 * num_kv) * head_dim).to(dtype)
    angles = torch.rand(100, half) * 2 * math.pi
    positions = torch.tensor([3, 99, 0, 17, 1])
    slots = torch.tensor([35, 0, -1, 47, 36])  # the third row is padding
    pool = torch.full((4, 3, 2, num_kv, BLOCK, head_dim), math.nan, dtype=dtype)
    q_weight, k_weight = torch.randn(2, head_dim).to(dtype)
    exact_q, exact_k, exact_v = (part.double() for part in split_heads(qkv, num_q, head_dim))
    if normed:
        exact_q = exact_rms_norm(exact_q, q_weight, 1e-5)
        exact_k = exact_rms_norm(exact_k, k_weight, 1e-5)
    exact_q = exact_rope(exact_q, angles.cos(), angles.sin(), positions)
    exact_k = exact_rope(exact_k, angles.cos(), angles.sin(), positions)
    exact_v = exact_v.clone()

    q, k, v = rope_and_cache(
        qkv,
        angles.cos(),
        angles.sin(),
        positions,
        slots,
        pool[:, 1],
        num_q_heads=num_q,
        q_norm_weight=q_weight if normed else None,
        k_norm_weight=k_weight if normed else None,
        eps=1e-5,
    )
    for part, exact in ((q, exact_q), (k, exact_k), (v, exact_v)):
        assert relative_error(part, exact) < TOLERANCE[dtype]
        assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            entry = pool[slot // BLOCK, 1, :, :, slot % BLOCK]  # [2, Hkv, D]
            assert torch.equal(entry[0], k[token])
            assert torch.equal(entry[1], v[token])
            entry.fill_(math.nan)
    assert bool(pool.isnan().all())  # nothing else was written


def test_all_rows_may_be_padding() -> None:
    pool = torch.full((1, 1, 2, 1, BLOCK, 8), math.nan)
    angles = torch.zeros(4, 4)
    rope_and_cache(
        torch.randn(2, 3 * 8),
        angles,
        angles,
        torch.tensor([0, 1]),
        torch.tensor([-1, -16]),
        pool[:, 0],
        num_q_heads=1,
    )
    assert bool(pool.isnan().all())
