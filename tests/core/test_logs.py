"""Log lines: time, level, component, message."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from pdserve.core import logs
from pdserve.core.config import LogFormat


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


@pytest.mark.usefixtures("_handlers_restored")
def test_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogFormat.JSON)
    log = logging.getLogger("pdserve.router.app")
    log.info('%s is "done"\n', "it", extra=logs.fields(request_id="abc", total_s=0.5))
    try:
        raise ValueError("of ours")
    except ValueError:
        log.exception("a bug")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "component": "router.app",
        "message": 'it is "done"\n',
        "request_id": "abc",
        "total_s": 0.5,
    }
    assert second["level"] == "error" and "ValueError: of ours" in second["error"]


def test_what_a_child_says_is_passed_on_in_the_same_form() -> None:
    ours = '{"time":"2026-01-01T00:00:00.000Z","level":"info","message":"a | b"}'
    stray = 'decode-0 | Traceback "of" a library'
    assert logs.passed_on(f"router | {ours}", LogFormat.TEXT) == f"router | {ours}"
    passed = json.loads(logs.passed_on(f"router | {ours}", LogFormat.JSON))
    assert passed == json.loads(ours) | {"process": "router"}
    wrapped = json.loads(logs.passed_on(stray, LogFormat.JSON))
    assert wrapped["process"] == "decode-0"
    assert wrapped["message"] == 'Traceback "of" a library'
    cut = json.loads(logs.passed_on(f"router | {ours[:30]}", LogFormat.JSON))
    assert cut["message"] == ours[:30]
