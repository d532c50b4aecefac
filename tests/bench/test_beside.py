"""What is compared with is no dependency: it may not be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.bench.beside import PROGRAMS, lacking, version


def test_a_program_that_is_not_installed_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (program,) = PROGRAMS
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = lacking(program)
    assert reason is not None and "not installed" in reason and program in reason


def test_a_program_of_another_environment_says_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (program,) = PROGRAMS
    path = tmp_path / "bin" / program
    path.parent.mkdir()
    path.touch(mode=0o755)
    (tmp_path / "lib/python3/site-packages/vllm_router-9.8.7.dist-info").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(path.parent))
    assert lacking(program) is None
    assert version(program) == "9.8.7"
