"""Logging as plain lines on stderr: ``time level component message``.

The component is the logger's name without the package: ``router.membership``.
"""

from __future__ import annotations

import logging


class _Lines(logging.Formatter):
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        record.component = record.name.removeprefix("pdserve.")
        record.level = record.levelname.lower()
        return super().format(record)


def setup(level: int = logging.INFO) -> None:
    """Sends all loggers to stderr: ours from ``level`` on, those of libraries from warnings on.

    Called once, by the process's entry point.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(level)s %(component)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pdserve").setLevel(level)
