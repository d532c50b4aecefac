"""Memory that workers of one user on one host share: made, found, swept.

A file in ``/dev/shm`` under a name that can't be guessed, readable by its owner only. It
holds a page of header (a mark and a nonce, by which a reader knows that it has found the
right one), then the bytes. All of it is allocated at once, so that a full host is an error
at the start and no bus error later; it is never truncated, and reading it is all that a
reader can do.

Who made it holds a lock on its first byte, who reads it one on its second, and both go
with their process however that ends. So a file whose first lock is free is what a crash
left, and is swept at the next start; and where its second is held, somebody still maps
what belonged to a worker that is gone.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import time
import weakref
from pathlib import Path

from .errors import HandshakeRefused, OutOfMemory
from .files import reason

FOLDER = Path("/dev/shm")

_NAME = re.compile(r"pdserve-\d{1,10}-[0-9a-f]{32}")
_MARK = b"pdserve memory 1"
_HEADER = 4096  # bytes: what follows is aligned for anything
_OWNER, _READER = 0, 1  # the bytes that are locked
_LOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class SharedMemory:
    """``view``: the bytes behind the header, writable for the one who made it.

    It is unlinked (by its owner) and its lock given back by ``close``, when nobody refers to
    it any more, or at the process's end, whichever comes first.
    """

    def __init__(
        self, name: str, nonce: bytes, file: int, mapped: mmap.mmap, owned: Path | None = None
    ) -> None:
        self.name = name
        self.nonce = nonce
        self._file = file
        self.view = memoryview(mapped)[_HEADER:]
        self._end = weakref.finalize(self, _let_go, file, owned)

    @staticmethod
    def create(num_bytes: int, folder: Path = FOLDER) -> SharedMemory:
        """Zeroed; OutOfMemory where the host has no room for it, or no such folder."""
        name, nonce = f"pdserve-{os.getuid()}-{secrets.token_hex(16)}", secrets.token_bytes(16)
        size = _HEADER + num_bytes
        file = -1
        try:
            room = os.statvfs(folder)
            if room.f_bavail * room.f_frsize < size:
                # said at once: to find out by filling it would take the room from others
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # it has its lock before it has a name: nobody can sweep it in between
            file = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(file, 0, size)
            _try_lock(file, fcntl.F_WRLCK, _OWNER)
            mapped = mmap.mmap(file, size)
            mapped[: len(_MARK) + len(nonce)] = _MARK + nonce
            _give_name(file, folder, name)
        except OSError as error:
            if file >= 0:
                os.close(file)
            full = error.errno in (errno.ENOSPC, errno.ENOMEM)
            why = "there is no room for it" if full else reason(error)
            raise OutOfMemory(
                f"no {num_bytes / 2**20:.0f} MiB of shared memory in {folder}: {why}; lower "
                "kv.memory, make that file system larger, or set kv_transfer.medium: tcp"
            ) from error
        return SharedMemory(name, nonce, file, mapped, folder / name)

    @staticmethod
    def attach(name: str, nonce: bytes, num_bytes: int, folder: Path = FOLDER) -> SharedMemory:
        """What a peer of this user and host has made; HandshakeRefused where it is not that."""
        if not _NAME.fullmatch(name):
            raise HandshakeRefused(f"{name!r} is no name of shared memory")
        path = folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            text = reason(error)
            raise HandshakeRefused(f"{path}: {text} (on another host?)") from error
        try:
            found, size = os.fstat(file), _HEADER + num_bytes
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise HandshakeRefused(f"{path} is not a file of this user")
            if found.st_size != size:
                raise HandshakeRefused(f"{path} has {found.st_size} bytes, not {size}")
            _try_lock(file, fcntl.F_RDLCK, _READER)
            mapped = mmap.mmap(file, size, prot=mmap.PROT_READ)
            if mapped[: len(_MARK) + len(nonce)] != _MARK + nonce:
                raise HandshakeRefused(f"{path} is not what the peer speaks of")
        except BaseException:
            os.close(file)
            raise
        return SharedMemory(name, nonce, file, mapped)

    @property
    def owner_gone(self) -> bool:
        """For a reader: whether the process that made it has ended."""
        return not _locked(self._file, _OWNER)

    def close(self) -> None:
        """Nobody finds it any more. Readers keep what they have mapped, and its memory goes when
        the last view of it does."""
        self._end()


def sweep(patience_s: float = 0.0, folder: Path = FOLDER) -> list[str]:
    """Removes what this user's crashed workers left behind, and returns the names.

    Waits up to ``patience_s`` seconds until nobody maps it any more: device memory that a
    dead worker had exported is only free then.
    """
    swept, mapped = [], []
    for path in sorted(folder.glob(f"pdserve-{os.getuid()}-*")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or none of ours
        if not _try_lock(file, fcntl.F_WRLCK, _OWNER):
            os.close(file)  # live
            continue
        path.unlink(missing_ok=True)
        swept.append(path.name)
        mapped.append(file)
    give_up_at = time.monotonic() + patience_s
    while (mapped := [file for file in mapped if _still_mapped(file)]) and (
        time.monotonic() < give_up_at
    ):
        time.sleep(0.02)  # no event tells of another process's lock
    for file in mapped:
        os.close(file)
    return swept


def _give_name(file: int, folder: Path, name: str) -> None:
    where = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # only where it is given a folder does os.link follow what is in /proc
        os.link(f"/proc/self/fd/{file}", name, src_dir_fd=where, dst_dir_fd=where)
    finally:
        os.close(where)


def _let_go(file: int, owned: Path | None) -> None:
    if owned is not None:
        owned.unlink(missing_ok=True)
    # what is mapped keeps the open file: closing it would not give the locks back
    for at in (_OWNER, _READER):
        _try_lock(file, fcntl.F_UNLCK, at)
    os.close(file)


def _still_mapped(file: int) -> bool:
    if _locked(file, _READER):
        return True
    os.close(file)
    return False


def _try_lock(file: int, kind: int, at: int) -> bool:
    """Takes a lock that belongs to this open file, and goes with it."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def _locked(file: int, at: int) -> bool:
    """Whether another open file has a lock there that would keep a writer out."""
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    kind: int = _LOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK
