"""The same tokens as transformers', whatever the route, the batch, and the memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from reference import Reference
from served import Server, deployment, serve
from texts import prose

pytestmark = pytest.mark.timeout(900)  # most of it is transformers' own time

MAX_TOKENS = 12
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 100, 129, 144, 200, 256, 300, 320, 513, 1500)
CHATS = (
    "What is the capital of France?",
    "Write one sentence about rain.",
    prose(150, seed=5) + " What is this text about?",
)


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    text: str
    num_tokens: int  # of the answer, its end token included


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Reference:
    return Reference(model_folder)


@pytest.fixture(scope="session")
def cases(reference: Reference) -> tuple[Case, ...]:
    prompts = []
    for length in LENGTHS:
        ids = reference.tokenizer(prose(length + 8, seed=length))["input_ids"]
        prompts.append(ids[:length])
    prompts += [reference.chat_prompt([{"role": "user", "content": chat}]) for chat in CHATS]
    found = []
    for prompt in prompts:
        tokens = reference.greedy(prompt, MAX_TOKENS)
        found.append(Case(tuple(prompt), reference.text(tokens), len(tokens)))
    return tuple(found)


def complete(client: openai.OpenAI, case: Case, route: str) -> None:
    got = client.completions.create(
        model="smollm2",
        prompt=list(case.prompt),
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_body={"route": route},
    )
    assert got.choices[0].text == case.text, len(case.prompt)
    assert got.usage is not None
    assert got.usage.completion_tokens == case.num_tokens
    assert got.usage.prompt_tokens == len(case.prompt)


def test_split_and_alone_then_colocated_from_the_cache(
    client: openai.OpenAI, cases: tuple[Case, ...]
) -> None:
    for case in cases:
        complete(client, case, "disaggregated")
    for case in cases:
        complete(client, case, "colocated")


def test_several_at_once(client: openai.OpenAI, cases: tuple[Case, ...]) -> None:
    with ThreadPoolExecutor(8) as pool:
        routes = ("disaggregated", "colocated")
        jobs = [
            pool.submit(complete, client, case, routes[index % 2])
            for index, case in enumerate(cases)
        ]
        for job in jobs:
            job.result()


def test_a_cached_prefix_is_counted(client: openai.OpenAI, cases: tuple[Case, ...]) -> None:
    case = next(case for case in cases if len(case.prompt) == 300)
    complete(client, case, "disaggregated")
    again = client.completions.create(
        model="smollm2", prompt=list(case.prompt), max_tokens=1, temperature=0
    )
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == 288


def test_chat_is_the_templated_prompt(client: openai.OpenAI, cases: tuple[Case, ...]) -> None:
    for chat, case in zip(CHATS, cases[-len(CHATS) :], strict=True):
        got = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": chat}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        assert got.choices[0].message.content == case.text


def test_a_stream_says_the_same(client: openai.OpenAI, cases: tuple[Case, ...]) -> None:
    case = cases[8]
    pieces = client.completions.create(
        model="smollm2", prompt=list(case.prompt), max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    chunks = list(pieces)
    assert "".join(chunk.choices[0].text for chunk in chunks) == case.text
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_seeded_text_is_the_same_alone_in_a_batch_and_on_either_route(
    client: openai.OpenAI,
) -> None:
    def ask(seed: int, route: str) -> str:
        got = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Tell me a story about a boat."}],
            max_tokens=24,
            temperature=0.9,
            top_p=0.95,
            seed=seed,
            extra_body={"route": route, "top_k": 50},
        )
        return str(got.choices[0].message.content)

    alone = [ask(seed, "disaggregated") for seed in range(6)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(12) as pool:
        for route in ("disaggregated", "colocated"):
            assert list(pool.map(lambda seed, r=route: ask(seed, r), range(6))) == alone


TIGHT = """
model: {path: smollm2, dtype: fp32, max_context: 512}
pools:
  prefill: {workers: 0}
  decode: {workers: 0}
  mixed: {workers: 1, device: cpu}
kv: {memory: 25MiB, prefix_cache: false}
router: {policy: colocated}
"""


@pytest.fixture(scope="module")
def tight_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(deployment(tmp_path_factory.mktemp("tight"), TIGHT)) as running:
        yield running


def test_a_preempted_run_says_the_same(tight_server: Server, reference: Reference) -> None:
    """Six answers that need about 50 blocks of a pool of 35: some are computed anew."""
    prompts = [reference.tokenizer(prose(80, seed=90 + i))["input_ids"][:72] for i in range(6)]
    expected = [reference.text(reference.greedy(prompt, 64)) for prompt in prompts]
    with openai.OpenAI(base_url=f"{tight_server.url}/v1", api_key="none") as client:

        def ask(prompt: list[int]) -> str:
            got = client.completions.create(
                model="smollm2", prompt=prompt, max_tokens=64, temperature=0
            )
            return got.choices[0].text

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, prompts)) == expected
    tight_server.at_rest()
