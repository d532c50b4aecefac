"""Files that the processes of a deployment leave for each other in its run folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from .errors import StartupError


def reason(error: OSError) -> str:
    """What the system says, as a part of a sentence."""
    return (error.strerror or str(error)).lower()


def write_whole(path: Path, content: bytes) -> None:
    """All at once and for its owner only: whoever finds the file finds it whole, and a disk that
    is full leaves what was there before. StartupError where it can't be written."""
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise StartupError(
            f"{path} can't be written: {reason(error)}; make room there, or set XDG_RUNTIME_DIR "
            "to a folder that has some"
        ) from error
