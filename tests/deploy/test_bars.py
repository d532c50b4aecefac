"""Bars for what children are long at, and log lines above them."""

from __future__ import annotations

import io
import re

from pdserve.deploy.bars import Bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        """Without what moves and colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def test_a_bar_for_each_and_none_when_all_are_done() -> None:
    terminal = Terminal()
    bars = Bars(terminal)
    assert bars.wanted
    assert bars.take("prefill-0 | progress: 0 loading the weights")
    assert bars.take("decode-0 | progress: 40 loading the weights")
    line = "router | a line that is longer than any terminal is wide, and must not be broken " * 3
    assert bars.write(line)
    assert bars.take("prefill-0 | progress: 100 loading the weights")
    assert bars.take("decode-0 | progress: 100 loading the weights")
    assert not bars.write("drawn no more")
    assert "decode-0: loading the weights" in terminal.text and "40%" in terminal.text
    assert line in terminal.text


def test_work_without_a_known_end_and_a_child_that_dies_at_it() -> None:
    terminal = Terminal()
    bars = Bars(terminal)
    assert bars.take("prepare | progress: ? converting the weights, once")
    bars.close()
    assert not bars.write("the child is gone")
    assert "prepare: converting the weights, once" in terminal.text


def test_other_lines_are_left_alone_and_a_log_has_no_bars() -> None:
    log = io.StringIO()
    bars = Bars(log)
    assert not bars.wanted
    assert not bars.take("router | listening at 127.0.0.1:8000")
    assert bars.take("decode-0 | progress: 40 loading the weights")
    assert not bars.write("a line") and log.getvalue() == ""
