"""Products for few tokens in Triton, and the kernels that add their parts up."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.bench.kernel_cases import relative_error
from pdserve.kernels.gpu import rms_norm, rope
from pdserve.kernels.gpu.sampling import arg_max
from pdserve.kernels.gpu.skinny_linear import SkinnyTuning, skinny_gated, skinny_linear
from pdserve.kernels.rms_norm import rms_norm_reference
from pdserve.kernels.rope import rope_and_cache_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "size", "columns", "splits"),
    [(1, 96, 64, 1), (3, 130, 200, 2), (17, 64, 576, 5), (64, 64, 128, 1)],
)
def test_a_product_and_its_parts(
    tokens: int, size: int, columns: int, splits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, columns + 8).to(dtype)[:, :columns]
    weight = (torch.randn(size, columns) * columns**-0.5).to(dtype)
    bias = torch.randn(size).to(dtype)
    out = skinny_linear(x, weight, bias, SkinnyTuning(32, 32, splits=splits))
    assert out.shape == ((splits, tokens, size) if splits > 1 else (tokens, size))
    summed = out.sum(0) if splits > 1 else out
    assert relative_error(summed, x.double() @ weight.double().t() + bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "size", "columns"), [(1, 96, 64), (3, 65, 200), (33, 32, 96)])
def test_a_gated_product(tokens: int, size: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, columns).to(dtype)
    weight = (torch.randn(2 * size, columns) * columns**-0.5).to(dtype)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    out = skinny_gated(x, weight, SkinnyTuning(32, 32))
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_norm_adds_parts(dtype: torch.dtype) -> None:
    parts = torch.randn(3, 2, 1100)
    residual, weight = torch.randn(2, 1100).to(dtype), torch.randn(1100).to(dtype)
    normed, out = rms_norm.rms_norm(parts, weight, 1e-5, residual)
    expected, expected_out = rms_norm_reference(parts.sum(0).to(dtype), weight, 1e-5, residual)
    assert normed.dtype == out.dtype == dtype
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    assert relative_error(normed, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_adds_parts(dtype: torch.dtype) -> None:
    num_q, num_kv, head_dim, half = 7, 1, 96, 24  # some of each head is not turned
    parts = torch.randn(3, 4, (num_q + 2 * num_kv) * head_dim)
    pool = torch.full((5, 2, 2, num_kv, 16, head_dim), math.nan, dtype=dtype)
    angles = torch.rand(50, half) * 2 * math.pi
    positions, slots = torch.tensor([3, 49, 0, 17]), torch.tensor([35, 79, -1, 0])
    pools = pool.clone(), pool.clone()
    found = rope.rope_and_cache(
        *(parts.clone(), angles.cos(), angles.sin(), positions, slots, pools[0][:, 1]),
        num_q_heads=num_q,
    )
    expected = rope_and_cache_reference(
        *(parts.sum(0).to(dtype), angles.cos(), angles.sin(), positions, slots, pools[1][:, 1]),
        num_q_heads=num_q,
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert relative_error(one, other) < TOLERANCE[dtype]
    filled = [p.nan_to_num(1e3) for p in pools]
    assert relative_error(filled[0], filled[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("vocab", [1, 50, 4096, 9000])
def test_the_largest_logit(vocab: int) -> None:
    logits = torch.randn(5, vocab)
    logits[1] = 3.0  # a tie: the first counts
    logits[2, -1] = 9.0
    assert torch.equal(arg_max(logits), logits.argmax(dim=1))
    assert int(arg_max(logits)[1]) == 0
