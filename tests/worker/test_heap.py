"""Freed memory that the heap keeps: in a process of its own, for it changes all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pdserve.worker.heap import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit(77)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

frames = [libc.malloc(1 << 20) for _ in range(32)]
for frame in frames:
    ctypes.memset(frame, 1, 1 << 20)
full = resident()
for frame in frames:
    libc.free(frame)
assert full - resident() < 4 << 20, (full, resident())
"""


def test_frames_come_from_memory_that_was_used_before() -> None:
    done = subprocess.run((sys.executable, "-P", "-c", PROGRAM), check=False, timeout=120)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0
