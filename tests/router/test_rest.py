"""The REST interface over HTTP, with fake workers behind it."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from fake_worker import FakeWorker, text_of
from router_net import CONTEXT, MODEL, Router, router, run, split, until

from pdserve.core.ids import Role

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
CHAT_IDS = (257, *b"user\nhi", 256, *b"\n", 257, *b"assistant\n")


def text(prompt: str, num_tokens: int) -> str:
    return text_of(tuple(prompt.encode()), num_tokens)


async def error_of(up: Router, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    found, answer = await up.post(path, body)
    assert found == status, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    return dict(answer["error"])


def test_answers_in_one_body() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            up.net.cached_tokens = 3
            status, answer = await up.complete("hello")
            assert status == 200
            assert answer["choices"] == [
                {"index": 0, "text": text("hello", 8), "logprobs": None, "finish_reason": "length"}
            ]
            assert answer["usage"] == {
                "prompt_tokens": 5,
                "completion_tokens": 8,
                "total_tokens": 13,
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            up.net.eos_at = 4
            status, answer = await up.post(CHAT, {"model": MODEL, "messages": USER})
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == text_of(CHAT_IDS, 4)
            assert choice["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 5
            assert answer["usage"]["prompt_tokens"] == len(CHAT_IDS)
            assert up.service.dispatch.num_requests == 0

    run(main())


def test_streams() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            usage = {"include_usage": True}
            fields = {"prompt": "hello", "max_tokens": 6}
            *chunks, last, done = await up.events(PLAIN, **fields, stream_options=usage)
            assert done == "[DONE]"
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
            assert all(chunk["usage"] is None for chunk in chunks)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == text("hello", 6)
            assert [choice["finish_reason"] for choice in choices][-1] == "length"

            first, *chunks, last, done = await up.events(CHAT, messages=USER, max_tokens=6)
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
            assert "".join(deltas) == text_of(CHAT_IDS, 6)
            assert last["choices"][0]["delta"] == {}
            assert last["choices"][0]["finish_reason"] == "length"
            assert done == "[DONE]" and "usage" not in first
            assert len({chunk["id"] for chunk in (first, *chunks, last)}) == 1

    run(main())


def test_the_first_token_does_not_wait_for_the_second() -> None:
    async def main() -> None:
        async with split() as (up, _, decode):
            decode.hold_tokens = True
            stream = up.stream(PLAIN, prompt="hello", max_tokens=3)
            event = await anext(stream)
            assert event["choices"][0]["text"] == text("hello", 1)
            decode.release()
            rest = [event async for event in stream]
            assert rest[-1] == "[DONE]"

    run(main())


def test_several_choices_of_several_prompts() -> None:
    async def main() -> None:
        async with split() as (up, _, decode):
            status, answer = await up.complete(["a", "bc"], n=2, max_tokens=3, seed=5)
            assert status == 200
            texts = [(one["index"], one["text"]) for one in answer["choices"]]
            assert texts == list(enumerate([text("a", 3)] * 2 + [text("bc", 3)] * 2))
            assert answer["usage"]["prompt_tokens"] == 3
            assert answer["usage"]["completion_tokens"] == 12
            assert sorted((one.params.seed, one.params.choice) for one in decode.placed) == [
                *((5, 0), (5, 0)),
                *((5, 1), (5, 1)),
            ]
            events = await up.events(CHAT, messages=USER, n=3, max_tokens=4)
            assert events.pop() == "[DONE]"
            by_choice: dict[int, str] = {}
            for event in events:
                (choice,) = event["choices"]
                so_far = by_choice.get(choice["index"], "")
                by_choice[choice["index"]] = so_far + choice["delta"].get("content", "")
            assert by_choice == dict.fromkeys(range(3), text_of(CHAT_IDS, 4))

    run(main())


def test_a_seed_is_drawn_for_a_request_that_has_none() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode):
            for _ in range(3):
                await up.complete()
            assert len({one.params.seed for one in decode.placed}) == 3
            assert [one.params for one in prefill.placed] == [one.params for one in decode.placed]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_it_and_the_workers_are_told(stream: bool) -> None:
    whole = text("hello", 20)
    stop = whole[5:8]

    async def main() -> None:
        async with split() as (up, prefill, decode):
            decode.hold_after = 8
            fields = {"prompt": "hello", "max_tokens": 20, "stop": ["never", stop]}
            if stream:
                events = await up.events(PLAIN, **fields)
                assert events.pop() == "[DONE]"
                choices = [event["choices"][0] for event in events]
            else:
                _, answer = await up.post(PLAIN, {"model": MODEL, **fields})
                choices = answer["choices"]
                assert answer["usage"]["completion_tokens"] == 8
            assert "".join(choice["text"] for choice in choices) == whole[:5]
            assert choices[-1]["finish_reason"] == "stop"
            await until(lambda: bool(prefill.aborted and decode.aborted))

    run(main())


def test_stop_strings_wait_for_min_tokens() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            whole = text("hello", 60)
            _, answer = await up.complete(max_tokens=60, stop=whole[3], min_tokens=10)
            (choice,) = answer["choices"]  # the letters come round every 26
            assert choice["text"] == whole[:29]

    run(main())


def test_an_end_in_the_first_token() -> None:
    async def main() -> None:
        async with split() as (up, _, decode):
            up.net.eos_at = 0
            _, answer = await up.complete()
            assert answer["choices"][0]["text"] == ""
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 1
            await until(lambda: bool(decode.aborted))  # it waits for a transfer no more

    run(main())


def test_logprobs() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            first, second = text("hello", 2)
            _, answer = await up.complete(max_tokens=2, logprobs=2)
            assert answer["choices"][0]["logprobs"] == {
                "tokens": [first, second],
                "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [
                    {first: -0.5, chr(ord(first) + 1): -1.5},
                    {second: -0.5, chr(ord(second) + 1): -1.5},
                ],
                "text_offset": [0, 1],
            }
            events = await up.events(PLAIN, prompt="hello", max_tokens=3, logprobs=0)
            found = [event["choices"][0]["logprobs"] for event in events[:-1]]
            assert [offset for one in found for offset in one["text_offset"]] == [0, 1, 2]

            body = {"model": MODEL, "messages": USER, "max_tokens": 1, "logprobs": True}
            _, answer = await up.post(CHAT, body | {"top_logprobs": 1})
            (content,) = answer["choices"][0]["logprobs"]["content"]
            letter = text_of(CHAT_IDS, 1)
            one = {"token": letter, "logprob": -0.5, "bytes": [ord(letter)]}
            assert content == one | {"top_logprobs": [one]}

    run(main())


def test_routes() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode):
            await up.complete(route="colocated")
            assert len(prefill.placed) + len(decode.placed) == 1
            await up.complete(route="disaggregated")
            assert len(prefill.placed) + len(decode.placed) == 3
        async with (
            router(pools={"mixed": {"workers": 1}}) as up,
            FakeWorker(up.net, "mixed-0", Role.MIXED),
        ):
            assert (await up.complete())[0] == 200
            error = await error_of(
                up, PLAIN, {"model": MODEL, "prompt": "x", "route": "disaggregated"}
            )
            assert error["param"] == "route"

    run(main())


def test_errors_in_the_envelope() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode):
            error = await error_of(up, CHAT, b"{")
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")
            error = await error_of(up, CHAT, {"model": MODEL, "messages": USER, "n": 99})
            assert error["param"] == "n"
            error = await error_of(up, CHAT, {"model": "gpt", "messages": USER}, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
            error = await error_of(
                up, CHAT, {"model": MODEL, "messages": [{"role": "user", "content": ""}]}
            )
            assert error["param"] == "messages" and "must say something" in error["message"]
            error = await error_of(up, PLAIN, {"model": MODEL, "prompt": "x" * CONTEXT})
            assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
            error = await error_of(up, PLAIN, {"model": MODEL, "prompt": [999]})
            assert error["param"] == "prompt"
            error = await error_of(up, "/v1/nothing", b"", 404)
            assert error["code"] == "not_found"
            error = await error_of(up, "/v1/models", b"", 405)
            assert error["code"] == "method_not_allowed"
            error = await error_of(up, PLAIN, b" " * ((4 << 20) + 1), 413)
            assert error["code"] == "body_too_large"
            async with up.client.get(CHAT) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert prefill.placed == decode.placed == []
            assert up.service.dispatch.num_requests == 0

    run(main())


def test_bodies_of_any_kind_are_read() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            data = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 2}).encode()
            for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "x"}, {}):
                async with up.client.post(PLAIN, data=data, headers=headers) as response:
                    assert response.status == 200
            headers = {"Content-Encoding": "gzip"}
            async with up.client.post(PLAIN, data=data, headers=headers) as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == "invalid_body"

    run(main())


def test_headers() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            names = []
            for fields in ({}, {"stream": True}, {"n": 77}):
                body = {"model": MODEL, "prompt": "hello", "foo": 1, "b\r\nar: x": 2, **fields}
                async with up.client.post(PLAIN, json=body) as response:
                    names.append(response.headers["X-Request-Id"])
                    if "n" not in fields:
                        assert response.headers["X-Ignored-Fields"] == "b%0D%0Aar%3A%20x, foo"
                    await response.read()
            assert len(set(names)) == 3 and all(len(name) == 24 for name in names)
            async with up.client.get("/nowhere") as response:
                assert "X-Request-Id" in response.headers

    run(main())


def test_models_health_and_cluster() -> None:
    async def main() -> None:
        async with router(router={"policy": "disaggregated"}) as up:
            assert await up.get("/health") == (200, {"status": "ok"})
            status, body = await up.get("/ready")
            assert (status, body["reason"]) == (503, "no worker to prefill has joined")
            async with FakeWorker(up.net, "p", Role.PREFILL) as prefill:
                assert (await up.get("/ready"))[0] == 503
                async with FakeWorker(up.net, "d", Role.DECODE) as decode:
                    assert await up.get("/ready") == (200, {"status": "ready"})
                    decode.hold_tokens = True
                    waiting = asyncio.create_task(up.complete())
                    await until(lambda: bool(decode.placed))
                    await asyncio.sleep(0.3)  # a beat
                    _, cluster = await up.get("/cluster")
                    worker = {
                        "id": "d",
                        "role": "decode",
                        "wanted_role": "decode",
                        "state": "ready",
                        "pid": 1,
                        "epoch": decode.ref.epoch,
                        "endpoint": "tcp://127.0.0.1:1",
                        "blocks": {"total": 64, "free": 63, "cached": 0, "held": 1},
                        "waiting": 0,
                        "running": 1,
                        "max_batch": 8,
                        "silent": False,
                        "links": [],
                    }
                    assert cluster["policy"] == "disaggregated"
                    shown = cluster["workers"][1]
                    assert {key: shown[key] for key in worker} == worker
                    assert [one["id"] for one in cluster["workers"]] == ["p", "d"]
                    decode.release()
                    assert (await waiting)[0] == 200
                await until(lambda: up.service.not_ready is not None)
                _, cluster = await up.get("/cluster")
                assert [one["state"] for one in cluster["workers"]] == ["ready", "dead"]
                assert prefill.refused is None
            status, models = await up.get("/v1/models")
            assert [one["id"] for one in models["data"]] == [MODEL]
            assert (await up.get(f"/v1/models/{MODEL}"))[1] == models["data"][0]
            assert (await up.get("/v1/models/other"))[0] == 404

    run(main())


def test_a_full_house() -> None:
    async def main() -> None:
        async with split(router={"max_queue": 2}) as (up, _, decode):
            decode.hold_tokens = True
            waiting = asyncio.create_task(up.complete(n=2))
            await until(lambda: up.service.dispatch.num_requests == 2)
            body = json.dumps({"model": MODEL, "prompt": "hello"}).encode()
            async with up.client.post(PLAIN, data=body) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "1")
                assert (await response.json())["error"]["code"] == "queue_full"
            decode.release()
            assert (await waiting)[0] == 200
            assert (await up.complete())[0] == 200

    run(main())


@pytest.mark.parametrize(("workers", "status"), [(0, 503), (1, 504)])
def test_the_time_is_over(workers: int, status: int) -> None:
    async def main() -> None:
        async with router(router={"request_timeout_s": 0.5}, pools={"mixed": {"workers": 1}}) as up:
            worker = FakeWorker(up.net, "mixed-0", Role.MIXED)
            worker.hold_tokens = True
            if workers:
                worker.start()
                await until(lambda: up.service.not_ready is None)
            found, answer = await up.complete()
            assert found == status, answer
            if workers:
                await until(lambda: bool(worker.aborted))
            await worker.kill()

    run(main())


def test_the_time_is_over_in_a_stream() -> None:
    async def main() -> None:
        async with split(router={"request_timeout_s": 0.7}) as (up, _, decode):
            decode.hold_after = 3
            events = await up.events(PLAIN, prompt="hello", max_tokens=9)
            assert events[-1]["error"]["code"] == "timeout"  # and no [DONE]
            texts = "".join(event["choices"][0]["text"] for event in events[:-1])
            assert texts == text("hello", 3)

    run(main())


def test_the_log_has_a_line_for_each_call_and_no_text_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            with caplog.at_level(logging.INFO, "pdserve"):
                await up.complete("a secret")
                await up.complete("a secret", n=77)
                await up.post(CHAT, {"model": MODEL, "messages": [{"role": "secret"}]})
                await up.post(PLAIN, b'{"secret')
                await up.get("/health")

    run(main())
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("app")]
    assert len(lines) == 4
    assert "200 length; prompt=8 output=8 first=" in lines[0]
    assert "400 invalid_value n;" in lines[1]
    assert "400 invalid_value messages[0].role;" in lines[2]
    assert "400 invalid_json;" in lines[3]
    assert "secret" not in caplog.text and "Traceback" not in caplog.text


def test_a_bug_is_logged_and_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise AssertionError("the inside of things")

    async def main() -> None:
        async with split() as (up, _, decode):
            monkeypatch.setattr("pdserve.router.generation.Generation._push", broken)
            status, answer = await up.complete()
            assert (status, answer["error"]["code"]) == (500, "internal_error")
            assert "inside" not in json.dumps(answer)
            await until(lambda: bool(decode.aborted))

    run(main())
    assert "the inside of things" in caplog.text


def test_long_texts_are_tokenized_elsewhere() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            error = await error_of(up, PLAIN, {"model": MODEL, "prompt": "x" * 100_000})
            assert "100000 tokens" in error["message"]

    run(main())
