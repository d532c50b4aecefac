"""The Triton kernels run under Triton's interpreter, in a process of their own.

The interpreter is chosen when Triton is imported, so ``interpreted/`` is left to
``test_interpreted``, which starts pytest on it with the variable set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pdserve.kernels import cpu_step

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN or the largest integer, and the seed is fixed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["compiled", "torch"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions as they are on this machine, then without the compiled loops."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_step, "serves", lambda *args: False)
        monkeypatch.setattr(cpu_step, "serves_heads", lambda *args: False)
