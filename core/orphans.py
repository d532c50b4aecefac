"""A child process that must not outlive its supervisor, however that one ends.

The kernel is asked to kill the process when the thread that started it ends (Linux,
``PR_SET_PDEATHSIG``). It is SIGKILL: nobody is left to wait for a clean end, and the
socket files and the run folder of such a deployment are swept at the next start.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ties this process to ``parent``, the process that started it.

    The first thing that a child does: it ends at once where the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)
