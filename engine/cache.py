"""Folders that are made once and kept in the user's cache: converted weights, dummy models.

``PDSERVE_CACHE``, else ``XDG_CACHE_HOME/pdserve``, else ``~/.cache/pdserve``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..core.errors import StartupError
from ..core.files import reason


def models_folder() -> Path:
    root = os.environ.get("PDSERVE_CACHE")
    if root:
        return Path(root).expanduser().absolute() / "models"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "pdserve" / "models"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder ``name``, filled by ``make`` where it is not there yet.

    Atomic: a folder of that name is complete. One process makes it, others wait; what a
    killed one left behind is swept. Raises what ``make`` raises, StartupError where the
    cache can't be written.
    """
    target = models_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            work = target.parent / f"{name}.part"
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir()
                make(work)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StartupError(
            f"{error.filename or target}: {reason(error)}; "
            "PDSERVE_CACHE names another folder for converted models"
        ) from error
    return target
