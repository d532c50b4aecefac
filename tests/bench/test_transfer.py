"""The transfer benchmark on small blocks: its report adds up, and what it moves has arrived."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pdserve.bench import transfer, transfer_batch, transfer_floors
from pdserve.bench.transfer_worker import VOCABULARY, Stamp, ms_between
from pdserve.worker import lifecycle


def test_a_report(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    sizes = ["--shape", "tiny", "--tokens", "16,256", "--repeats", "2", "--token-us", "0"]
    assert transfer.main([*sizes, "--media", "shm", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    block = 2 * 2 * 2 * 16 * 16 * 4
    assert report["block_bytes"] == block
    assert [floor["tokens"] for floor in report["floors"]] == [16, 256, 2048]
    assert {(pull["tokens"], pull["blocks"]) for pull in report["pulls"]} == {
        (tokens, order) for tokens in (16, 256, 2048) for order in ("in a row", "scattered")
    }
    assert [(row["case"], row["tokens"]) for row in report["rows"]] == [
        ("shm", tokens) for tokens in (16, 256, 2048)
    ]
    for row in report["rows"]:
        assert row["bytes"] == row["tokens"] // 16 * block
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["moving_ms"] / 1e6)
        assert 0 < row["exposed_ms"] <= row["moving_ms"] + row["waited_ms"] + 1e3
        assert row["ratio"] > 0 and 0 < row["runnable_ms"] < 60_000
        assert row["overhead_ms"] > 0


def test_what_arrives_beside_a_batch(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ["--batch", "2", "--model", "tiny", "--tokens", "64", "--seconds", "0.6"]
    assert transfer.main([*options, "--memory", "64MiB", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["medium"], report["batch"]) == ("shm", 2)
    assert report["prompts"] > 0 and report["tpot_alone_ms"] > 0
    assert len(report["growths"]) == 5 and report["growth"] in report["growths"]


def test_growing_contexts_are_no_growth() -> None:
    """Steps that lengthen evenly, whatever arrives: each turn beside its neighbours' mean."""
    alone = [10.0, 12.0, 14.0]
    assert transfer_batch.growths(alone, [11.0, 13.0]) == pytest.approx([0.0, 0.0])
    assert transfer_batch.growths(alone, [12.1, 13.0]) == pytest.approx([0.1, 0.0])


def test_a_floor_of_several_streams() -> None:
    assert transfer_floors.zmq_streams_s(1 << 20, 1 << 18, 3) > 0


def test_the_clock_of_the_tokens_begins_anew() -> None:
    assert ms_between(VOCABULARY - 500, 1500) == 2.0
    assert ms_between(1000, 251_000) == 250.0


def test_a_request_that_is_runnable_is_stamped(caplog: pytest.LogCaptureFixture) -> None:
    stamp = Stamp()
    caplog.set_level(logging.DEBUG)
    lifecycle.log.addFilter(stamp)
    try:
        lifecycle.log.debug("%s is runnable", "it")
        lifecycle.log.warning("a word")
    finally:
        lifecycle.log.removeFilter(stamp)
    assert stamp.token > 0
    assert caplog.messages == ["a word"]
