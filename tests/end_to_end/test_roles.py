"""Roles that change while many requests run: none is lost, and no token wrong.

The workers are simulated and their KV is honest: a block that was lost, stale or somebody
else's would come out as another text.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from served import deployment, serve

from pdserve.core.ids import Role
from pdserve.deploy.scale import scale

NUM_REQUESTS = 120
FILE = """
model: {path: smollm2, max_context: 1024}
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 2, device: cpu}
kv: {memory: 2MiB}
engine: simulated
simulation: {step_ms: 4}
"""
ROLES = (
    {Role.PREFILL: 2, Role.DECODE: 1},
    {Role.MIXED: 3},
    {Role.PREFILL: 1, Role.DECODE: 1, Role.MIXED: 1},
    {Role.PREFILL: 1, Role.DECODE: 2},
)


def test_no_request_is_lost_and_no_token_wrong(tmp_path: Path) -> None:
    rng = random.Random(5)
    begin = [rng.randrange(1000) for _ in range(64)]  # some find it in a cache
    prompts = [
        begin[: rng.choice([0, 32, 64])] + [rng.randrange(1000) for _ in range(rng.randint(1, 200))]
        for _ in range(NUM_REQUESTS)
    ]
    with (
        serve(deployment(tmp_path, FILE)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(12) as pool,
    ):

        def ask(prompt: list[int]) -> str:
            answer = client.completions.create(
                model="smollm2",
                prompt=prompt,
                max_tokens=40,
                temperature=0,
                timeout=60,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        undisturbed = list(pool.map(ask, prompts))
        asked = [pool.submit(ask, prompt) for prompt in prompts]
        num_changes = 0
        while not all(one.done() for one in asked):
            scale(server.url, ROLES[num_changes % len(ROLES)])
            num_changes += 1
        assert [one.result() for one in asked] == undisturbed
        assert num_changes >= 2
        server.at_rest()
