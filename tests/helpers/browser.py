"""A real Chromium, headless. What needs it is skipped where there is none."""

from __future__ import annotations

import importlib.util
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
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is not None and importlib.util.find_spec("playwright") is not None:
        return found
    missing = "there is no chromium, or no playwright to steer it"
    if os.environ.get("PDSERVE_BROWSER") == "required":
        pytest.fail(missing)
    pytest.skip(missing)
