"""Compiling is tried, and done without where it can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.kernels import cpu_library, cpu_linear

SOURCE = Path(cpu_linear.__file__).with_suffix(".c")


def test_without_a_compiler_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    assert cpu_library.load(SOURCE, tmp_path) is None


def test_a_compiler_that_fails_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: "/bin/false")
    assert cpu_library.load(SOURCE, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_library.load(SOURCE, tmp_path) is None:
        pytest.skip("no C compiler here")
    (made,) = tmp_path.iterdir()
    monkeypatch.setattr(cpu_library.subprocess, "run", None)
    assert cpu_library.load(SOURCE, tmp_path) is not None
    assert [made] == list(tmp_path.iterdir())
