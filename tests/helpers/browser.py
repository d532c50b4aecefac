"""A real Chromium, headless. What needs it is skipped where there is none."""

from __future__ import annotations

import os
import shutil

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """Its path. Skips the test where none is installed, and fails it in CI, which has one."""
    pytest.importorskip("playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("PDSERVE_BROWSER") == "required":
            pytest.fail("no chromium is installed, and this run requires one")
        pytest.skip("no chromium is installed")
    return found
