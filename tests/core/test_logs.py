"""Log lines: time, level, component, message."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from pdserve.core import logs


@pytest.fixture
def _handlers_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("pdserve").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_handlers_restored")
def test_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    logging.getLogger("pdserve.router.membership").info("%s joined", "decode-0")
    logging.getLogger("pdserve.worker").debug("not shown")
    logging.getLogger("somelibrary").info("not shown")
    logging.getLogger("somelibrary").warning("shown")
    first, second = capsys.readouterr().err.splitlines()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{time} info router\.membership decode-0 joined", first)
    assert re.fullmatch(rf"{time} warning somelibrary shown", second)
