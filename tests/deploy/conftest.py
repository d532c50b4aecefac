"""Child processes of these tests find the package, installed or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pdserve

PACKAGE = Path(pdserve.__file__).parent.parent


@pytest.fixture(autouse=True)
def _package_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
