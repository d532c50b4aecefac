"""The run folder of one deployment: sockets, the resolved file, the lock that marks it live.

It lies in the user's runtime folder under a name that cannot be guessed, readable by the
owner only. Its lock is held by the supervisor and goes with it, however it ends: a folder
whose lock is free is what a crashed supervisor left, and is swept at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import StartupError
from ..core.files import reason

MAX_SOCKET_PATH = 107  # bytes of sun_path without its closing zero
_LONGEST_NAME = "control.sock.xxxxxxxx"  # a file of the folder may be named this long
_LOCK = "lock"


class RunDir:
    """A live run folder. ``close`` removes it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @staticmethod
    def create(base: Path | None = None) -> RunDir:
        """Makes the folder after sweeping dead ones; raises StartupError where it can't."""
        base = base_folder() if base is None else base
        try:
            _own(base)
            with _locked(base / ".lock"):  # nobody sweeps between making and locking
                sweep(base)
                path = base / secrets.token_hex(8)
                path.mkdir(mode=0o700)
                return RunDir(path, _lock_of(path, create=True))
        except OSError as error:
            raise StartupError(
                f"no run folder in {base}: {reason(error)}; set XDG_RUNTIME_DIR to a folder that "
                "you may write"
            ) from error

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def base_folder() -> Path:
    """``$XDG_RUNTIME_DIR/pdserve`` where that is usable, else ``/tmp/pdserve-UID``."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        base = Path(runtime) / "pdserve"
        longest = base / ("x" * 16) / _LONGEST_NAME
        if base.is_absolute() and len(os.fsencode(longest)) <= MAX_SOCKET_PATH:
            return base
    return Path(f"/tmp/pdserve-{os.getuid()}")


def sweep(base: Path) -> list[Path]:
    """Removes the run folders whose supervisor is gone, and returns them.

    The caller holds the lock of ``base``.
    """
    swept = []
    for path in sorted(base.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            lock = _lock_of(path, create=False)
        except BlockingIOError:
            continue  # live
        except FileNotFoundError:
            lock = None  # it died between making the folder and its lock
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        swept.append(path)
    return swept


def _own(base: Path) -> None:
    """Makes ``base`` ours alone; refuses one that another user made."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StartupError(
            f"{base} belongs to someone else; set XDG_RUNTIME_DIR to a folder of yours"
        )
    base.chmod(0o700)


def _lock_of(path: Path, *, create: bool) -> int:
    """Opens and takes the lock of a run folder; BlockingIOError where it is held."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    lock = os.open(path / _LOCK, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
