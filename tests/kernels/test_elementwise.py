"""Norm and activation: against float64, and bit for bit against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pdserve.bench.kernel_cases import exact_rms_norm, exact_silu_mul, relative_error
from pdserve.kernels.rms_norm import rms_norm, rms_norm_reference
from pdserve.kernels.silu_mul import silu_mul

pytestmark = pytest.mark.usefixtures("cpu_path")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (5, 576)])
def test_rms_norm_adds_the_residual_and_normalises(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    normed, out = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(out, x + residual)
    assert relative_error(normed, exact_rms_norm(x + residual, weight, 1e-5)) < TOLERANCE[dtype]
    normed, out = rms_norm(x, weight, 1e-5)
    assert out is x
    assert relative_error(normed, exact_rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(576).to(dtype)
    x = (torch.randn(7, 576) * 3).to(dtype)
    assert torch.equal(rms_norm_reference(x, norm.weight.data, 1e-5)[0], norm(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 6), (5, 3072)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    assert relative_error(silu_mul(gate_up), exact_silu_mul(gate_up)) < TOLERANCE[dtype]
