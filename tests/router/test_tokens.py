"""Prompts as tokens and back: /tokenize, /detokenize, echo; the names a model goes by; and the
description of it all."""

from __future__ import annotations

from typing import Any

import pytest
from fake_worker import text_of
from router_net import CONTEXT, MODEL, deployment, router, run, split

from pdserve.router.snapshot import Objectives

USER = [{"role": "user", "content": "hi"}]
CHAT_IDS = [257, *b"user\nhi", 256, *b"\n", 257, *b"assistant\n"]
PLAIN = "/v1/completions"


def test_tokenize_and_detokenize() -> None:
    async def main() -> None:
        async with router() as up:
            status, body = await up.post("/tokenize", {"model": MODEL, "prompt": "hé"})
            assert status == 200
            assert body == {"count": 3, "max_model_len": CONTEXT, "tokens": list("hé".encode())}
            _, body = await up.post("/tokenize", {"messages": USER})
            assert body["tokens"] == CHAT_IDS
            status, body = await up.post("/detokenize", {"tokens": [256, *"né".encode()]})
            assert (status, body) == (200, {"prompt": "<|im_end|>né"})
            assert (await up.post("/detokenize", {"tokens": []}))[1] == {"prompt": ""}

    run(main())


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "x"}]}, 400, "messages[0].role"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [260]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "gpt"}, 404, "model"),
    ],
)
def test_what_they_refuse(path: str, body: Any, status: int, param: str) -> None:
    async def main() -> None:
        async with router() as up:
            found, answer = await up.post(path, body)
            assert (found, answer["error"]["param"]) == (status, param)

    run(main())


def test_echo() -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            _, answer = await up.complete(["ab", "cd"], n=2, max_tokens=3, echo=True, stop=["ab"])
            texts = [choice["text"] for choice in answer["choices"]]
            assert texts == [
                *["ab" + text_of(tuple(b"ab"), 3)] * 2,
                *["cd" + text_of(tuple(b"cd"), 3)] * 2,
            ]
            assert answer["usage"]["completion_tokens"] == 12
            events = await up.events(PLAIN, prompt=list(b"hey"), max_tokens=2, echo=True)
            parts = [event["choices"][0]["text"] for event in events[:-1]]
            assert "".join(parts) == "hey" + text_of(tuple(b"hey"), 2)

    run(main())


def test_aliases() -> None:
    async def main() -> None:
        async with split(model={"path": MODEL, "max_context": CONTEXT, "aliases": ["gpt"]}) as (
            up,
            _,
            _,
        ):
            status, answer = await up.complete(model="gpt")
            assert (status, answer["model"]) == (200, "gpt")
            assert (await up.complete())[1]["model"] == MODEL
            assert (await up.complete(model="gpt-2"))[0] == 404
            _, models = await up.get("/v1/models")
            found = [(one["id"], one["root"]) for one in models["data"]]
            assert found == [(MODEL, MODEL), ("gpt", MODEL)]
            assert (await up.get("/v1/models/gpt"))[1] == models["data"][1]

    run(main())


def test_its_own_objectives_and_priority_go_with_a_request() -> None:
    async def main() -> None:
        async with split(slo={"ttft_ms": 400, "tpot_ms": 40}) as (up, _, decode):
            decode.hold_after = 1
            asks = []
            for fields in ({}, {"slo": {"tpot_ms": 7.5}, "priority": -3}):
                stream = up.stream(PLAIN, prompt="hello", max_tokens=3, **fields)
                await anext(stream)
                (request,) = up.service.dispatch._requests.values()
                asks.append((request.ask.objectives, request.ask.priority))
                await stream.aclose()
                request_id = request.ask.request_id
                while request_id in up.service.dispatch._requests:  # until the hang-up is seen
                    await up.get("/health")
            assert asks == [(None, 0), (Objectives(400, 7.5), -3)]

    run(main())


def test_aliases_come_from_the_file() -> None:
    assert deployment(model={"path": "x", "aliases": ["a", "b"]}).model.aliases == ("a", "b")


def test_the_description() -> None:
    async def main() -> None:
        async with router() as up:
            status, found = await up.get("/openapi.json")
            assert status == 200 and found["openapi"].startswith("3.1")
            for path, operations in found["paths"].items():
                for method, operation in operations.items():
                    async with up.client.request(method, path.replace("{name}", MODEL)) as response:
                        assert response.status not in (404, 405), path
                        assert str(response.status) in operation["responses"]
            fields = found["components"]["schemas"]["ChatFields"]["properties"]
            assert fields["temperature"]["maximum"] > 1 and "title" not in fields["temperature"]
            assert {"messages", "logit_bias", "slo", "n"} <= set(fields)

    run(main())
