"""A child ends with its parent, whatever ended that."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pdserve

CHILD = """
import sys, time
from pdserve.core.orphans import die_with_parent
die_with_parent(int(sys.argv[1]))
sys.stdout.write("tied")
sys.stdout.flush()
time.sleep(600)
"""

# Starts CHILD (whose output goes to our own pipe) and stays.
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-P", "-c", sys.argv[1], str(os.getpid())]).wait()
"""

ENV = {**os.environ, "PYTHONPATH": str(Path(pdserve.__file__).parent.parent)}
LIMIT_S = 20.0


def closed(pipe: int) -> bool:
    """Whether all writers of the pipe are gone before the limit."""
    readable, _, _ = select.select([pipe], [], [], LIMIT_S)
    return bool(readable) and os.read(pipe, 1) == b""


def test_it_ends_with_a_parent_that_is_killed() -> None:
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, CHILD], stdout=write, env=ENV
    ) as parent:
        os.close(write)
        tied = os.read(read, 4)  # nothing, where the child could not be started
        parent.send_signal(signal.SIGKILL)
    assert tied == b"tied"
    assert closed(read)
    os.close(read)


def test_it_ends_at_once_where_the_parent_is_gone() -> None:
    not_the_parent = os.getppid()
    child = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(not_the_parent)],
        env=ENV,
        stdout=subprocess.PIPE,
        timeout=LIMIT_S,
        check=False,
    )
    assert (child.returncode, child.stdout) == (1, b"")
