"""The compiled linear layer against fp64, at every group size, and its fallback."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels import cpu_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width", "out"), [(1, 8, 1), (3, 576, 97), (16, 64, 33)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_fp64(dtype: torch.dtype, num_rows: int, width: int, out: int, biased: bool) -> None:
    x = torch.randn(num_rows, width)
    weight = torch.randn(out, width).to(dtype)
    bias = torch.randn(out) if biased else None
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    got = cpu_linear.linear(x, weight, bias)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    if not cpu_linear.compiled():
        pytest.skip("no C compiler here")
    x, weight = torch.randn(15, 128), torch.randn(40, 128).bfloat16()
    together = cpu_linear.linear(x, weight, None)
    alone = torch.cat([cpu_linear.linear(row[None], weight, None) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("num_rows", "width"), [(17, 64), (4, 12)])
def test_other_shapes_go_to_torch(num_rows: int, width: int) -> None:
    x, weight = torch.randn(num_rows, width), torch.randn(5, width)
    assert torch.equal(cpu_linear.linear(x, weight, None), torch.nn.functional.linear(x, weight))
