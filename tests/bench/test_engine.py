"""The engine's benchmark on a model small enough for a test: its report adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.bench import engine


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = tmp_path / "tiny.yaml"
    deployment.write_text("model: {path: tiny, load: dummy}\nkv: {memory: 64MiB}\n")
    out = tmp_path / "report.json"
    sizes = ["--streams", "2", "--input", "8", "--output", "5", "--turns", "2", "--threads", "1"]
    assert engine.main(["--config", str(deployment), "--out", str(out), *sizes]) == 0
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["model"], report["dtype"], report["threads"]) == ("tiny", "fp32", 1)
    assert set(report["transformers_tokens_s"]) == {"fp32", "bf16"}
    assert report["one_stream_tokens_s"] > 0 and report["streams_tokens_s"] > 0
    step_s = report["one_stream_step_ms"] / 1000
    # 512 x 64 embeddings, and two layers of 64 x (128 + 64 + 3 * 128) matrices, in fp32
    weights = 4 * (512 * 64 + 2 * 64 * (128 + 64 + 3 * 128))
    assert report["weights_gb_s"] == pytest.approx(weights / step_s / 1e9)
    assert report["copy_gb_s"] > 0.1
    assert report["one_stream_ratio"] > 0 and report["streams_ratio"] > 0
