"""The official client against a real model in two pools: what its users call, as they call it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import MAX_QUEUE, Server

MODEL = "smollm2"
N = 12  # tokens of an answer
STORY: list[Any] = [{"role": "user", "content": "Tell me a short story about a boat."}]
TEXT = "The three primary colours are"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": N}


def post(server: Server, path: str, body: Any) -> Any:
    return httpx.post(f"{server.url}{path}", json=body, timeout=10).raise_for_status().json()


def test_sync_in_one_body_and_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=STORY, **GREEDY)
    text = whole.choices[0].message.content
    assert text and whole.usage is not None and whole.usage.completion_tokens == N
    assert whole.choices[0].finish_reason == "length" and whole.model == MODEL
    chunks = list(
        client.chat.completions.create(
            messages=STORY, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt again


def test_async_several_at_once(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as ai:

            async def streamed() -> str:
                stream = await ai.completions.create(prompt=TEXT, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole() -> str:
                return (await ai.completions.create(prompt=TEXT, **GREEDY)).choices[0].text

            texts = await asyncio.gather(streamed(), whole(), streamed(), whole())
            assert len(set(texts)) == 1 and texts[0]

    asyncio.run(main())
    server.at_rest()


def test_text_and_token_prompts(client: openai.OpenAI, server: Server) -> None:
    ids = post(server, "/tokenize", {"model": MODEL, "prompt": TEXT})["tokens"]
    assert post(server, "/detokenize", {"tokens": ids})["prompt"] == TEXT
    other = "Water boils at"
    other_ids = post(server, "/tokenize", {"prompt": other})["tokens"]

    def ask(prompt: Any, **fields: Any) -> list[str]:
        got = client.completions.create(prompt=prompt, **(GREEDY | {"max_tokens": 8} | fields))
        assert [choice.index for choice in got.choices] == list(range(len(got.choices)))
        return [choice.text for choice in got.choices]

    both = ask([TEXT, other])
    assert (
        both == [*ask(TEXT), *ask(other)] == ask([ids, other_ids]) == [*ask(ids), *ask(other_ids)]
    )
    assert ask(ids, echo=True) == [TEXT + both[0]]


def test_three_choices_with_a_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        got = client.chat.completions.create(
            model=MODEL, messages=STORY, n=3, seed=seed, temperature=1.0, max_tokens=12
        )
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        assert got.usage is not None and got.usage.completion_tokens <= 36
        return [choice.message.content for choice in got.choices]

    first, again, other = ask(1), ask(1), ask(2)
    assert first == again and len(set(first)) == 3 and set(first) != set(other)


def test_logprobs(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(messages=STORY, logprobs=True, top_logprobs=3, **GREEDY)
    assert got.choices[0].logprobs is not None
    content = got.choices[0].logprobs.content
    assert content is not None and len(content) == N
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token  # greedy: the likeliest
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    joined = b"".join(bytes(token.bytes or ()) for token in content).decode()
    assert joined == got.choices[0].message.content

    plain = client.completions.create(prompt=TEXT, logprobs=2, **GREEDY)
    found = plain.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert "".join(found.tokens) == plain.choices[0].text
    for offset, token_text in zip(found.text_offset, found.tokens, strict=True):
        assert plain.choices[0].text[offset:].startswith(token_text)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_lists(client: openai.OpenAI, stream: bool) -> None:
    whole = client.chat.completions.create(messages=STORY, **GREEDY).choices[0].message.content
    assert whole
    middle = len(whole) // 2
    stop = whole[middle - 2 : middle + 3]  # it begins and ends within tokens
    create: Any = client.chat.completions.create
    got = create(messages=STORY, stop=["no such text", stop], stream=stream, **GREEDY)
    if stream:
        choices = [chunk.choices[0] for chunk in got if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices = got.choices
        text = choices[0].message.content
    assert text == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_biases_decide(client: openai.OpenAI, server: Server) -> None:
    def ask(**fields: Any) -> str:
        return client.completions.create(prompt=TEXT, **(GREEDY | fields)).choices[0].text

    free = ask(max_tokens=1)
    (first,) = post(server, "/tokenize", {"prompt": free})["tokens"]
    assert ask(max_tokens=1, logit_bias={str(first): -100}) != free
    wanted = " boat"
    (boat,) = post(server, "/tokenize", {"prompt": wanted})["tokens"]
    assert ask(max_tokens=4, logit_bias={str(boat): 100}) == wanted * 4


def test_a_timeout_ends_it_on_both_sides(server: Server) -> None:
    with (
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.4
        ) as impatient,
        pytest.raises(openai.APITimeoutError),
    ):
        impatient.completions.create(
            model=MODEL, prompt=TEXT, max_tokens=1500, extra_body={"ignore_eos": True}
        )
    server.at_rest(5.0)


@pytest.fixture
def full(server: Server) -> Iterator[httpx.Response]:
    """A call that fills the house until it is closed."""
    body = {
        "model": MODEL,
        "prompt": [TEXT] * (MAX_QUEUE // 8),
        "n": 8,
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        yield response
    server.at_rest()


def test_its_own_retries_on_429(server: Server, full: httpx.Response) -> None:
    def client(retries: int) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=retries)

    with client(0) as once, pytest.raises(openai.RateLimitError) as refused:
        once.completions.create(prompt=TEXT, **GREEDY)
    assert refused.value.code == "queue_full" and refused.value.response.headers["Retry-After"]

    waits: list[float] = []

    def attempt(request: httpx.Request) -> None:
        waits.append(time.monotonic())
        if len(waits) == 2:  # by then there is room
            full.close()
            server.at_rest()

    with (
        httpx.Client(event_hooks={"request": [attempt]}) as http,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=3, http_client=http
        ) as patient,
    ):
        got = patient.completions.create(prompt=TEXT, **GREEDY)
    assert got.choices[0].text and len(waits) == 2
    assert waits[1] - waits[0] >= 1.0  # as Retry-After says
