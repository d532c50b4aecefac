"""Time as a value: deciders take ``now`` in seconds, only the rim reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]  # monotonic seconds

monotonic: Clock = time.monotonic
