"""Norm, activation, rope and block copies in Triton against their references."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.bench.kernel_cases import relative_error
from pdserve.kernels.copy_blocks import gather_blocks, scatter_blocks
from pdserve.kernels.gpu import copy_blocks, rms_norm, rope, silu_mul
from pdserve.kernels.rms_norm import rms_norm_reference
from pdserve.kernels.rope import rope_and_cache_reference
from pdserve.kernels.silu_mul import silu_mul_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (3, 576), (2, 1100)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    x = torch.cat((x, x), dim=1)[:, : shape[1]]  # rows further apart than they are long
    weight = torch.randn(shape[1]).to(dtype)
    for given in (residual, None):
        normed, out = rms_norm.rms_norm(x, weight, 1e-5, given)
        expected, expected_out = rms_norm_reference(x, weight, 1e-5, given)
        assert relative_error(normed, expected) < TOLERANCE[dtype]
        assert torch.equal(out, expected_out)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 6), (3, 2200)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    expected = silu_mul_reference(gate_up)
    assert relative_error(silu_mul.silu_mul(gate_up), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_q", "num_kv", "head_dim", "half", "q_norm", "k_norm"),
    [
        (9, 3, 64, 32, False, False),
        (4, 4, 80, 40, True, True),
        (7, 1, 96, 24, True, False),
        (8, 1, 256, 128, False, True),
    ],
)
def test_rope(
    num_q: int,
    num_kv: int,
    head_dim: int,
    half: int,
    q_norm: bool,
    k_norm: bool,
    dtype: torch.dtype,
) -> None:
    qkv = torch.randn(4, (num_q + 2 * num_kv) * head_dim).to(dtype)
    pool = torch.full((5, 2, 2, num_kv, 16, head_dim), math.nan, dtype=dtype)
    angles = torch.rand(50, half) * 2 * math.pi
    weights = torch.randn(2, head_dim).to(dtype)

    def run(implementation, qkv, pool):  # type: ignore[no-untyped-def]
        parts = implementation(
            qkv,
            angles.cos(),
            angles.sin(),
            torch.tensor([3, 49, 0, 17], dtype=torch.int32),
            torch.tensor([35, 79, -1, 0]),
            pool[:, 1],
            num_q_heads=num_q,
            q_norm_weight=weights[0] if q_norm else None,
            k_norm_weight=weights[1] if k_norm else None,
            eps=1e-5,
        )
        return [*parts, pool.nan_to_num(1e3)]

    expected = run(rope_and_cache_reference, qkv.clone(), pool.clone())
    for part, correct in zip(run(rope.rope_and_cache, qkv, pool), expected, strict=True):
        assert relative_error(part, correct) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks(dtype: torch.dtype) -> None:
    pool = torch.randn(9, 2, 2, 3, 16, 40).to(dtype)
    ids = torch.tensor([8, 0, 3])
    staged, expected = torch.empty(2, 3, *pool.shape[1:], dtype=dtype)
    copy_blocks.gather_blocks(pool, ids, staged)
    gather_blocks(pool, ids, expected)
    assert torch.equal(staged, expected)
    target, expected = torch.zeros(2, *pool.shape, dtype=dtype)
    copy_blocks.scatter_blocks(target, ids, staged)
    scatter_blocks(expected, ids, staged)
    assert torch.equal(target, expected)


def test_move_blocks() -> None:
    """Blocks of more than one stretch, and fewer programs than stretches."""
    source = torch.randint(0, 255, (9, 5 * 4096 * 8 + 64), dtype=torch.uint8)
    target = torch.zeros(5, source.shape[1], dtype=torch.uint8)
    copy_blocks.move_blocks(source, target, torch.tensor([[8, 0, 3], [1, 4, 0]]), num_programs=4)
    assert torch.equal(target[[1, 4, 0]], source[[8, 0, 3]])
    assert not target[[2, 3]].any()
