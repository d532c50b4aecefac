"""What a child of ``pdserve serve`` and its supervisor tell each other: the child by lines of its
output, the supervisor by signals."""

from __future__ import annotations

import os
import signal
import sys

SWITCH = "PDSERVE_SUPERVISED"  # set in the environment of who has a supervisor
SENTENCE = "pdserve: "  # begins the line in which a process says why it gives up
UP = "pdserve is up"
# To the router: the deployment ends, workers of other hosts too; SIGTERM ends it alone. In who is
# only starting it leaves no traceback, and no shell has it ignored, as SIGINT may be.
ALL_END = signal.SIGUSR1


def up() -> None:
    """This process is of use from now on: what it took until here was its start."""
    if SWITCH in os.environ:
        print(UP, file=sys.stderr, flush=True)
