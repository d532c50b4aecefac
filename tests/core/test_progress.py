"""How far a long piece of work is, as lines and as a line that is kept up to date."""

from __future__ import annotations

import io
import sys

import pytest

from pdserve.core.progress import SWITCH, Progress, Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_for_a_parent_that_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "1")
    times = iter((0.0, 0.05, 0.2, 0.4))
    with Progress("loading", 200, clock=lambda: next(times)) as progress:
        for part in (20, 20, 60, 100):  # the second is too soon after the first
            progress.advance(part)
    steps = [Step.parse(line) for line in capsys.readouterr().err.splitlines()]
    percents = [0, 10, 50, 99, 100]
    assert steps == [Step("loading", percent) for percent in percents]


def test_an_end_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "1")
    with Progress("converting"):
        pass
    assert capsys.readouterr().err == "progress: ? converting\nprogress: 100 converting\n"


def test_a_terminal_of_its_own_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("loading", 10) as progress:
        progress.advance(5)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert written.split("\r\x1b[K") == ["", "loading 0 %", "loading 50 %", ""]


def test_a_log_has_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    with Progress("loading", 10) as progress:
        progress.advance(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["", "progress", "progress: x loading", "other: 5 x"])
def test_what_is_no_step(line: str) -> None:
    assert Step.parse(line) is None
