"""Run folders: private, unique, locked while live, swept when dead."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.core.errors import StartupError
from pdserve.deploy.rundir import MAX_SOCKET_PATH, RunDir, base_folder

HOLDER = """
import sys
from pathlib import Path
from pdserve.deploy.rundir import RunDir
run = RunDir.create(Path(sys.argv[1]))
(run.path / "control.sock").touch()
print(run.path, flush=True)
sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_private_and_its_name_is_new_each_time(tmp_path: Path) -> None:
    base = tmp_path / "base"
    one, two = RunDir.create(base), RunDir.create(base)
    assert one.path != two.path
    assert len(one.path.name) == 16
    assert mode(base) == mode(one.path) == 0o700
    one.close()
    two.close()
    assert [path.name for path in base.iterdir()] == [".lock"]


def test_a_dead_one_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    live = RunDir.create(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        dead = Path(holder.stdout.readline().strip())
        RunDir.create(tmp_path).close()
        assert dead.exists()  # its holder lives
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (dead / "control.sock").exists()
    RunDir.create(tmp_path).close()
    assert not dead.exists()
    assert live.path.exists()
    live.close()


def test_one_that_died_before_its_lock_was_made_is_swept(tmp_path: Path) -> None:
    unborn = tmp_path / "0123456789abcdef"
    unborn.mkdir()
    RunDir.create(tmp_path).close()
    assert not unborn.exists()


def test_links_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").touch()
    base = tmp_path / "base"
    base.mkdir()
    (base / "link").symlink_to(elsewhere)
    RunDir.create(base).close()
    assert (elsewhere / "keep").exists()


def test_a_base_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(StartupError, match="belongs to someone else; set XDG_RUNTIME_DIR"):
        RunDir.create(tmp_path)


def test_a_base_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="no run folder in"):
        RunDir.create(tmp_path / "file" / "base")


def test_the_runtime_folder_is_used_where_socket_paths_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = Path(f"/tmp/pdserve-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    assert base_folder() == Path("/dev/shm/pdserve")
    long = tmp_path / ("x" * MAX_SOCKET_PATH)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert base_folder() == fallback
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "not-there"))
    assert base_folder() == fallback
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert base_folder() == fallback
