"""A deployment whose messages are lost, doubled, late and damaged on purpose: every answer is
that of an undisturbed one, and in the end nothing is held."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import SIMULATED, SPLIT, Server, deployment, serve
from texts import prose

LIMIT_S = 120.0

# between workers everything is said again; what is lost on the way to the router, or from it,
# has an attempt replayed, and a request has three: so little is lost there
FAULTS = """
faults:
  seed: 7
  kv: {drop: 0.1, duplicate: 0.2, delay: 0.2, delay_ms: 700, damage: 0.1}
  control: {duplicate: 0.2, delay: 0.1, delay_ms: 200}
"""


def ask(server: Server, body: dict[str, Any]) -> str:
    head = {"Content-Type": "application/json"}
    data = json.dumps({"route": "disaggregated", "ignore_eos": True} | body).encode()
    call = urllib.request.Request(f"{server.url}/v1/completions", data, head)
    with urllib.request.urlopen(call, timeout=LIMIT_S) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def answers(server: Server, bodies: list[dict[str, Any]]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda body: ask(server, body), bodies))


def test_simulated_workers(simulated: Server, tmp_path: Path) -> None:
    """Their tokens are hashes of the KV that they hold: a block that is not what was sent shows."""
    rng = random.Random(5)
    bodies = [
        {
            "model": "tiny",
            "prompt": [rng.randrange(2, 200) for _ in range(rng.randrange(1, 150))],
            "max_tokens": rng.randrange(1, 60),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
        }
        for number in range(32)
    ]
    expected = answers(simulated, bodies)
    for medium in ("tcp", "shm"):
        text = f"{SIMULATED}kv_transfer: {{medium: {medium}, lease_s: 4}}{FAULTS}"
        with serve(deployment(tmp_path, text)) as disturbed:
            assert answers(disturbed, bodies) == expected
            disturbed.at_rest(30.0)


@pytest.mark.slow  # every run of the tests has it in tests/chaos
def test_smollm2(server: Server, tmp_path: Path) -> None:
    bodies = [
        {"model": "smollm2", "prompt": prose(10 + 20 * number, seed=number), "max_tokens": 8}
        | ({"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number})
        for number in range(4)
    ]
    expected = answers(server, bodies)
    text = f"{SPLIT}kv_transfer: {{medium: tcp, lease_s: 4}}{FAULTS}"
    with serve(deployment(tmp_path, text)) as disturbed:
        assert answers(disturbed, bodies) == expected
        disturbed.at_rest(30.0)
