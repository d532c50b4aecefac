"""Every kernel on a GPU against float64, as ``pdserve.bench.kernels`` checks them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from pdserve.bench.kernel_checks import Check, all_checks, poisoned_memory

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_kernel(check: Check) -> None:
    error = check.error()
    assert check.passes(error), f"relative error {error:.3g}, allowed {check.limit:.3g}"
