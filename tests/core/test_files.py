"""A file is there whole, or as it was before."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pdserve.core.errors import StartupError
from pdserve.core.files import write_whole


def test_it_is_replaced_and_private(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_whole(path, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StartupError) as caught:
            write_whole(path, b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{path} can't be written: file too large; make room there, or set XDG_RUNTIME_DIR to a "
        "folder that has some"
    )
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
