"""The comparison's command in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.bench import policies
from pdserve.core.errors import ConfigError


def test_a_cell_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    arguments = ["table", "--workloads", "code", "--objectives", "200/10", "--requests", "150"]
    assert policies.main([*arguments, "--no-own", "--processes", "1", "--out", str(out)]) == 0
    assert "| code | 200/10 | 2 |" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"] >= 0.98 and row["colocated"] > 0 and row["split"] > 0


def test_a_trace_with_named_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations that come back: who places by prefixes computes less, and is sooner."""
    rows = [
        {
            "timestamp": 100 * turn * 23 + 100 * talk,
            "input_length": 512 * (3 * turn + 4),
            "output_length": 8,
            "hash_ids": [1000 * talk + block for block in range(3 * turn + 4)],
        }
        for turn in range(8)
        for talk in range(23)
    ]
    name = "mooncake_conversation_trace.jsonl.gz"
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert policies.main(["prefix", "--traces", str(tmp_path), "--rate", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    aware, blind = found["policies"]["adaptive"], found["policies"]["least loaded"]
    assert aware["hit_rate"] > 0.7 * found["unbounded_cache_hit_rate"]
    assert aware["hit_rate"] > blind["hit_rate"] + 0.1
    assert aware["mean_ttft_ms"] < 0.7 * blind["mean_ttft_ms"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["table", "--workloads", "none"],
        ["table", "--workloads", "mooncake"],
        ["table", "--gpus", "two"],
        ["prefix"],
    ],
)
def test_wrong_use_is_refused_in_words(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        policies.main(arguments)
