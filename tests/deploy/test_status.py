"""A running deployment as a table."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.deploy import status
from pdserve.deploy.fetch import Unreachable

URL = "http://127.0.0.1:8000"


def worker(role: str, index: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{role}-{index}",
        "role": role,
        "state": "ready",
        "pid": 4321,
        "epoch": 7,
        "blocks": {"total": 100, "free": 90, "cached": 7, "held": 3},
        "waiting": 0,
        "running": 2,
        **changes,
    }


def answered(monkeypatch: pytest.MonkeyPatch, documents: dict[str, tuple[int, Any]]) -> None:
    monkeypatch.setattr(status, "get_json", lambda url, timeout_s: documents[url.removeprefix(URL)])


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [worker("prefill", 0, state="dead"), worker("decode", 1), worker("decode", 0)]
    workers[1]["links"] = [{"worker_id": "decode-0", "medium": "shm"}]
    answered(
        monkeypatch,
        {
            "/cluster": (200, {"policy": "adaptive", "workers": workers}),
            "/ready": (503, {"status": "not ready", "reason": "no worker to prefill"}),
        },
    )
    assert status.cluster_table(URL + "/").splitlines() == [
        "http://127.0.0.1:8000/: not ready: no worker to prefill; policy adaptive",
        "POOL     WORKER     STATE  RUNNING  WAITING  HELD  CACHED  FREE   PID",
        "decode   decode-0   ready        2        0     3       7    90  4321",
        "decode   decode-1   ready        2        0     3       7    90  4321",
        "prefill  prefill-0  dead         2        0     3       7    90  4321",
        "KV blocks: decode-1 -> decode-0 by shm",
    ]
    assert status.read_cluster(URL).ready == {"decode-0", "decode-1"}


def test_no_workers_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(
        monkeypatch,
        {"/cluster": (200, {"policy": "colocated", "workers": []}), "/ready": (200, {})},
    )
    assert status.cluster_table(URL).splitlines() == [
        f"{URL}: ready; policy colocated",
        "POOL  WORKER  STATE  RUNNING  WAITING  HELD  CACHED  FREE  PID",
    ]


@pytest.mark.parametrize("body", [None, [], {}, {"policy": "x", "workers": [{"id": 5}]}])
def test_json_of_somebody_else(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    answered(monkeypatch, {"/cluster": (200, body), "/ready": (404, body)})
    with pytest.raises(Unreachable, match=f"{URL}/cluster is no pdserve router"):
        status.cluster_table(URL)
