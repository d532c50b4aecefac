"""A running deployment as a table, and as JSON."""

from __future__ import annotations

import json
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
        "silent": False,
        "pid": 4321,
        "epoch": 7,
        "blocks": {"total": 100, "free": 42, "cached": 8, "held": 50},
        "waiting": 1,
        "running": 2,
        "max_batch": 32,
        **changes,
    }


def live(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "chat": True,
        "policy": "adaptive",
        "not_ready": None,
        "uptime_s": 250.0,
        "slo": {"ttft_ms": 500.0, "tpot_ms": 50.0},
        "recent": {
            "window_s": 60.0,
            "requests": 12,
            "good": 9,
            "attainment": 0.75,
            "goodput": 0.15,
            "ttft_ms": {"p50": 80.0, "p90": 612.5, "p99": 700.0},
            "tpot_ms": {"p50": 20.0, "p90": 30.0, "p99": 40.0},
        },
        "stages": {"queue": 0, "prefill": 2, "decode": 1},
        "output_tokens": 5,
        "workers": [worker("prefill", 0), worker("decode", 1, silent=True)],
        "transfers": [],
        "events": [{"ago_s": 8.0, "kind": "died", "worker": "decode-0", "moved": 2}],
        **changes,
    }


def answered(monkeypatch: pytest.MonkeyPatch, documents: dict[str, tuple[int, Any]]) -> None:
    monkeypatch.setattr(status, "get_json", lambda url, timeout_s: documents[url.removeprefix(URL)])


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changes: Any
) -> list[str]:
    answered(monkeypatch, {"/live": (200, live(**changes))})
    status.show(URL)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    workers = [worker("prefill", 0), worker("decode", 1, silent=True)]
    workers[0]["links"] = [{"worker_id": "decode-1", "medium": "shm"}]
    found = shown(monkeypatch, capsys, workers=workers)
    head, objectives, requests, columns, _, first, second, links, event = found
    assert links == "KV blocks: prefill-0 → decode-1 by shm"
    assert head == f"{URL}: ✓ ready; model m; policy adaptive; up 4 min"
    assert objectives == (
        "goodput 0.15/s, 9 of 12 met both; TTFT p50 80 p90 612.5 p99 700 ms ✕ 500; "
        "TPOT p50 20 p90 30 p99 40 ms ✓ 50"
    )
    assert requests == "requests: 2 prefilling, 1 decoding"
    assert columns.split() == [
        *("POOL", "WORKER", "STATE", "BATCH", "QUEUE"),
        *("BLOCKS", "HELD", "CACHED", "FREE", "PID"),
    ]
    assert first.split() == [
        *("decode", "decode-1", "✕", "silent", "2/32", "1"),
        *("██████▒·····", "50", "8", "42", "4321"),
    ]
    assert second.split()[:4] == ["prefill", "prefill-0", "✓", "ready"]
    assert event == "8 s ago  decode-0 died; 2 requests went on elsewhere"


def test_nobody_and_nothing_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = live()["recent"] | {"requests": 0, "good": 0, "ttft_ms": {}, "tpot_ms": {}}
    lines = shown(
        monkeypatch,
        capsys,
        workers=[worker("mixed", 0, state="dead")],
        recent=none,
        events=[],
        stages={},
        not_ready="no worker has joined",
    )
    assert lines[0].startswith(f"{URL}: ✕ not ready: no worker has joined;")
    assert lines[1:3] == ["no request has ended in the last minute", "requests: none"]
    assert "✕ dead" in lines[5]


def test_json_is_what_the_router_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(monkeypatch, {"/live": (200, live())})
    status.show_json(URL)
    assert json.loads(capsys.readouterr().out) == live()


def test_watching_goes_on_when_the_router_is_away_for_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter((live(), Unreachable("no answer from there"), live(model="again")))

    def get(url: str, timeout_s: float) -> tuple[int, Any]:
        answer = next(answers, None)
        if answer is None:
            raise KeyboardInterrupt
        if isinstance(answer, Unreachable):
            raise answer
        return 200, answer

    monkeypatch.setattr(status, "get_json", get)
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    with pytest.raises(KeyboardInterrupt):
        status.watch(URL, 1.0)
    assert "model again" in capsys.readouterr().out


def test_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [worker("prefill", 0, state="dead"), worker("decode", 1), worker("decode", 0)]
    body = {"policy": "adaptive", "workers": workers}
    reason = {"status": "not ready", "reason": "no worker to prefill"}
    answered(monkeypatch, {"/cluster": (200, body), "/ready": (503, reason)})
    assert status.read_cluster(URL).ready == {"decode-0", "decode-1"}
    assert status.not_ready(URL + "/") == "no worker to prefill"


def test_a_server_that_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"error": {"message": "this server wants an API key", "code": "invalid_api_key"}}
    answered(monkeypatch, {"/live": (401, error), "/cluster": (401, error)})
    for ask in (status.read_live, status.read_cluster):
        with pytest.raises(Unreachable, match="put one into PDSERVE_API_KEY"):
            ask(URL)


@pytest.mark.parametrize("body", [None, [], {}, {"policy": "x", "workers": [{"id": 5}]}])
def test_json_of_somebody_else(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    answered(monkeypatch, {"/cluster": (200, body), "/live": (404, body)})
    with pytest.raises(Unreachable, match=f"{URL}/cluster is no pdserve router"):
        status.read_cluster(URL)
    with pytest.raises(Unreachable, match=f"{URL}/live is no pdserve router"):
        status.show(URL)
