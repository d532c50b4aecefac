"""The official client, as its users call it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from fake_worker import text_of
from router_net import MODEL, Router, run, split

USER: list[Any] = [{"role": "user", "content": "hi"}]
CHAT_IDS = (257, *b"user\nhi", 256, *b"\n", 257, *b"assistant\n")


def client(up: Router) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=10)


def test_asynchronous() -> None:
    async def main() -> None:
        async with split() as (up, _, _), client(up) as ai:
            answer = await ai.chat.completions.create(model=MODEL, messages=USER, max_tokens=5)
            assert answer.choices[0].message.content == text_of(CHAT_IDS, 5)
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None and answer.usage.completion_tokens == 5
            stream = await ai.chat.completions.create(
                model=MODEL,
                messages=USER,
                max_completion_tokens=6,
                stream=True,
                logprobs=True,
                top_logprobs=1,
                stream_options={"include_usage": True},
            )
            text, usage, logprobs = "", None, 0
            async for chunk in stream:
                usage = chunk.usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    if choice.logprobs is not None:
                        logprobs += len(choice.logprobs.content or [])
            assert text == text_of(CHAT_IDS, 6) and logprobs == 6
            assert usage is not None and usage.total_tokens == len(CHAT_IDS) + 6
            assert [model.id async for model in ai.models.list()] == [MODEL]

    run(main())


def test_synchronous() -> None:
    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
            answer = ai.completions.create(model=MODEL, prompt="hello", max_tokens=4, n=2)
            assert [one.text for one in answer.choices] == [text_of(tuple(b"hello"), 4)] * 2
            chunks = list(
                ai.completions.create(model=MODEL, prompt="hello", max_tokens=4, stream=True)
            )
            assert "".join(one.choices[0].text for one in chunks) == text_of(tuple(b"hello"), 4)
            with ai.chat.completions.stream(model=MODEL, messages=USER) as stream:
                whole = stream.get_final_completion()
            assert whole.choices[0].message.content == text_of(CHAT_IDS, 6)

    async def main() -> None:
        async with split() as (up, _, _):
            up.net.eos_at = 6
            await asyncio.to_thread(use, up.url)

    run(main())


def test_errors_are_of_the_clients_own_kinds() -> None:
    async def main() -> None:
        async with split() as (up, _, decode), client(up) as ai:
            create: Any = ai.chat.completions.create
            with pytest.raises(openai.BadRequestError) as bad:
                await create(model=MODEL, messages=USER, n=50)
            assert bad.value.param == "n" and bad.value.code == "invalid_value"
            assert bad.value.request_id
            with pytest.raises(openai.NotFoundError) as missing:
                await create(model="gpt", messages=USER)
            assert missing.value.code == "model_not_found"
            decode.hold_after = 2
            stream = await create(model=MODEL, messages=USER, max_tokens=9, stream=True)
            with pytest.raises(openai.APIError, match="took too long"):
                async for _ in stream:
                    dispatch = up.service.dispatch
                    dispatch._deadlines[:] = [(0.0, name) for name in dispatch._requests]

    run(main())


def test_extra_fields_of_ours() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode), client(up) as ai:
            extra = {"route": "colocated", "min_tokens": 1, "ignore_eos": True, "top_k": 3}
            raw = await ai.completions.with_raw_response.create(
                model=MODEL, prompt="x", max_tokens=2, extra_body={**extra, "zzz": 1}
            )
            assert raw.headers["X-Ignored-Fields"] == "zzz"
            ((place,),) = [worker.placed for worker in (prefill, decode) if worker.placed]
            assert place.peer is None and place.params.ignore_eos and place.params.top_k == 3

    run(main())
