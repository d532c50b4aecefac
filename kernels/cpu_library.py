"""C functions for the CPU, compiled once for this machine by its C compiler.

The result is kept in the user's cache. Where there is no compiler, torch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# No OpenMP library is linked: its symbols are those of the one that torch has loaded, so
# that one pool of threads serves both.
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")


def cache_folder() -> Path:
    root = os.environ.get("PDSERVE_CACHE")
    if root:
        return Path(root) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdserve" / "kernels"


def load(source: Path, folder: Path) -> ctypes.CDLL | None:
    """Compiled into ``folder`` if need be; None where there is no compiler, or what it made
    does not load."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    key = source.read_bytes() + _cpu_flags() + compiler.encode()
    name = f"{source.stem}-{hashlib.blake2b(key, digest_size=12).hexdigest()}.so"
    target = folder / name
    try:
        if not target.exists():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Raises OSError or SubprocessError. Atomic: several workers may do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        compiled, linked = Path(work) / "compiled.o", Path(work) / "linked.so"
        for command in (
            [compiler, *_COMPILE, str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        linked.replace(target)


def _cpu_flags() -> bytes:
    """What ``-march=native`` depends on: a cache on a shared disk serves several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
