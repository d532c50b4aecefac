"""docs/api.md names every field, path and error that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdserve.core.config import RouterSection
from pdserve.router.api.calls import ChatFields, CompletionFields
from pdserve.router.api.openapi import describe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize("name", sorted({*ChatFields.model_fields, *CompletionFields.model_fields}))
def test_fields(name: str) -> None:
    assert re.search(rf"`{name}\b", PAGE)


@pytest.mark.parametrize("path", describe(["m"])["paths"])
def test_paths(path: str) -> None:
    assert path.replace("{name}", "NAME") in PAGE


def test_error_codes() -> None:
    sources = [*(ROOT / "router").glob("*.py"), *(ROOT / "router/api").glob("*.py")]
    codes = {code for file in sources for code in re.findall(r'code="(\w+)"', file.read_text())}
    assert len(codes) > 20
    assert not {code for code in codes if f"`{code}`" not in PAGE}


def test_bounds() -> None:
    named = {f"router.{name}" for name in RouterSection.model_fields if name.endswith("_s")}
    assert not {name for name in named if f"`{name}`" not in PAGE}
