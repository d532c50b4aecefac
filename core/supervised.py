"""What a child of ``pdserve serve`` tells its supervisor, each by a line of its output."""

from __future__ import annotations

import os
import sys

SWITCH = "PDSERVE_SUPERVISED"  # set in the environment of who has a supervisor
SENTENCE = "pdserve: "  # begins the line in which a process says why it gives up
UP = "pdserve is up"


def up() -> None:
    """This process is of use from now on: what it took until here was its start."""
    if SWITCH in os.environ:
        print(UP, file=sys.stderr, flush=True)
