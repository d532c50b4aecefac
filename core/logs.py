"""Logging on stderr: plain lines, ``time level component message``, or an object of JSON a line.

The component is the logger's name without the package: ``router.membership``. What a machine
may want by itself goes into ``extra=fields(...)``: JSON has it, the message says it in words.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from .config import LogFormat

_OURS = "pdserve."
_JSON_START = '{"time":'


class _Stderr(logging.StreamHandler[TextIO]):
    """On what stderr is at the moment: where bars are drawn, lines must go above them."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """The base class sets what it is given."""


class _Lines(logging.Formatter):
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        record.component = record.name.removeprefix(_OURS)
        record.level = record.levelname.lower()
        return super().format(record)


class _Objects(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "component": record.name.removeprefix(_OURS),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return _dumps(line)


def fields(**values: Any) -> dict[str, Any]:
    """For ``extra=``."""
    return {"fields": values}


def setup(form: LogFormat = LogFormat.TEXT, level: int = logging.INFO) -> None:
    """Sends all loggers to stderr: ours from ``level`` on, those of libraries from warnings on.

    Called once, by the process's entry point.
    """
    handler = _Stderr()
    text = _Lines("%(asctime)s %(level)s %(component)s %(message)s")
    handler.setFormatter(text if form is LogFormat.TEXT else _Objects())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pdserve").setLevel(level)


def passed_on(line: str, form: LogFormat) -> str:
    """A child's line, ``name | text``, in the form of our own: a library may print anything."""
    if form is LogFormat.TEXT:
        return line
    name, _, text = line.partition(" | ")
    if text.startswith(_JSON_START) and text.endswith("}"):
        return f'{text[:-1]},"process":{_dumps(name)}}}'
    said = {"level": "info", "component": "output", "message": text, "process": name}
    return _dumps({"time": _time(time.time())} | said)


def _time(seconds: float) -> str:
    """UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode
