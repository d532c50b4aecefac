"""API keys at the door: who gets in, how often, how many at once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from router_net import MODEL, Router, run, split, until

from pdserve.core.api_keys import ENVIRONMENT, ApiKey, add_key, digest
from pdserve.core.errors import RequestError, Unavailable
from pdserve.router.callers import Caller, Callers

PLAIN = "/v1/completions"


class Hands:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_is_used_up_and_comes_back_evenly() -> None:
    clock = Hands()
    caller = Caller("alice", clock, requests_per_minute=6)
    for _ in range(6):
        caller.pay(1)
    with pytest.raises(Unavailable) as refused:
        caller.pay(1)
    assert (refused.value.status, refused.value.retry_after) == (429, pytest.approx(10))
    clock.now += 10.1
    caller.pay(1)
    with pytest.raises(Unavailable):
        caller.pay(1)
    clock.now += 1000
    caller.pay(1)
    caller.pay(5)  # no more than a minute is saved up
    with pytest.raises(Unavailable):
        caller.pay(1)
    with pytest.raises(RequestError) as never:
        caller.pay(6, of=7)
    assert never.value.status == 400
    with pytest.raises(RequestError) as never:
        Caller("bob", clock, requests_per_minute=1).pay(1, of=2)
    assert never.value.status == 400


def test_at_once() -> None:
    caller = Caller("alice", Hands(), max_concurrent=3)
    with caller.running(2):
        with pytest.raises(Unavailable) as refused, caller.running(2):
            pass
        assert refused.value.status == 429
        with caller.running(1):
            pass
    with caller.running(3):
        pass
    with pytest.raises(RequestError) as never, caller.running(4):
        pass
    assert never.value.status == 400


def test_who_gets_in() -> None:
    clock = Hands()
    callers = Callers([ApiKey(name="alice", sha256=digest("secret"))], "token", clock)
    for path in ("/", "/health", "/ready", "/openapi.json", "/admin/roles"):
        assert callers.of(path, None) is None
    for path in (PLAIN, "/v1/models", "/tokenize", "/cluster", "/live", "/metrics", "/requests/x"):
        for given in (None, "", "secret", "Bearer", "Bearer ", "Basic secret", "Bearer wrong"):
            with pytest.raises(RequestError) as refused:
                callers.of(path, given)
            assert refused.value.status == 401
        for given, name in (("Bearer secret", "alice"), ("bearer  secret", "alice")):
            found = callers.of(path, given)
            assert found is not None and found.name == name
        owner = callers.of(path, "Bearer token")
        assert owner is not None and owner.name == "owner"
    assert callers.of(PLAIN, "Bearer secret") is callers.of("/live", "Bearer secret")
    anybody = Callers([], "token", clock).of(PLAIN, None)
    assert anybody is not None and anybody.name == ""


async def ask(up: Router, secret: str | None, **fields: Any) -> tuple[int, Any, Any]:
    headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2, **fields}
    async with up.client.post(PLAIN, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


def test_keys_over_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.yaml"
    alice = add_key(path, "alice", requests_per_minute=4, max_concurrent=2).secret
    bob = add_key(path, "bob").secret

    async def main() -> None:
        async with split(security={"api_keys": str(path)}) as (up, _, decode):
            status, answer, headers = await ask(up, None)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer["error"]["code"] == "invalid_api_key"
            assert (await ask(up, "no"))[0] == 401
            assert (await up.get("/ready"))[0] == 200
            assert (await up.get("/live"))[0] == 401
            decode.hold_tokens = True
            waiting = asyncio.create_task(ask(up, alice, n=2))
            await until(lambda: len(decode.placed) == 2)
            status, answer, headers = await ask(up, alice)
            assert (status, answer["error"]["code"]) == (429, "concurrency_limit_exceeded")
            assert headers["Retry-After"] == "1"
            decode.release()
            assert (await waiting)[0] == 200
            assert (await ask(up, alice))[0] == 200
            status, answer, headers = await ask(up, alice)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(headers["Retry-After"]) <= 15
            assert (await ask(up, alice, n=4))[0] == 429
            for _ in range(6):
                assert (await ask(up, bob))[0] == 200

    with caplog.at_level(logging.INFO, "pdserve"):
        run(main())
    assert alice not in caplog.text and bob not in caplog.text
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("app")]
    assert any(" bob POST /v1/completions 200" in line for line in lines)
    assert any("401 invalid_api_key" in line for line in lines)


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "ci=0123456789abcdef")

    async def main() -> None:
        async with split() as (up, _, _):
            assert (await ask(up, None))[0] == 401
            assert (await ask(up, "0123456789abcdef"))[0] == 200

    run(main())
