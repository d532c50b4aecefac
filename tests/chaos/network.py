"""A network that is cut between two hosts, silently, and messages that a bad one would spoil.

    make network CUTS=24 OUT=docs/results/chaos-network.json

Simulated workers: their tokens are a hash over the KV that they hold, so a block that is lost,
stale or swapped comes out as a wrong token. Each cut has requests that run when it comes and
others that come while it lasts. It has been got over when both workers are back and a prompt
has gone from the one to the other. Needs root, for network namespaces.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from far_apart import FarApart, far_apart
from served import SIMULATED, Server, command, deployment, environment, ready_url
from three_hosts import three_hosts

PAIRS = (("prefill", "decode"), ("front", "decode"), ("front", "prefill"))
LASTS_S = (1.0, 3.0, 8.0, 20.0)
FAULTS = """
kv_transfer: {{medium: {medium}, lease_s: 4}}
faults:
  seed: {seed}
  kv: {{drop: 0.1, duplicate: 0.2, delay: 0.2, delay_ms: 1000, damage: 0.1}}
  control: {{duplicate: 0.2, delay: 0.1, delay_ms: 200}}
"""


def judged(answers: Iterable[Future[str]], expected: Iterable[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for answer, text in zip(answers, expected, strict=True):
        try:
            found["right" if answer.result() == text else "wrong"] += 1
        except urllib.error.HTTPError as error:
            json.load(error)["error"]["code"]  # an honest one has it
            found["error"] += 1
    return found


def cut(deployed: FarApart, pair: tuple[str, str], lasts_s: float) -> tuple[Counter[str], float]:
    """What became of the requests, and what it took from the cut's end to be well again."""
    asked = deployed.ask()
    deployed.net.cut(*pair)
    asked += deployed.ask()
    time.sleep(lasts_s)
    deployed.net.heal(*pair)
    healed = time.monotonic()
    deployed.back()
    deployed.probe()
    recovery_s = time.monotonic() - healed
    outcomes = judged(asked, deployed.expected * 2)
    deployed.at_rest()
    return outcomes, recovery_s


def cuts(num: int, rng: random.Random) -> dict[str, Any]:
    plan = [(pair, lasts_s) for pair in PAIRS for lasts_s in LASTS_S]
    plan = (plan * (num // len(plan) + 1))[:num]
    rng.shuffle(plan)
    outcomes: dict[str, Counter[str]] = {" - ".join(pair): Counter() for pair in PAIRS}
    recovered: dict[str, list[float]] = {" - ".join(pair): [] for pair in PAIRS}
    with (
        tempfile.TemporaryDirectory() as folder,
        three_hosts() as net,
        far_apart(net, Path(folder)) as deployed,
    ):
        for pair, lasts_s in plan:
            found, recovery_s = cut(deployed, pair, lasts_s)
            outcomes[" - ".join(pair)] += found
            recovered[" - ".join(pair)].append(recovery_s)
    return {
        name: {
            "cuts": len(times),
            "outcomes": dict(outcomes[name]),
            "recovery_s": {
                "p50": round(statistics.median(times), 2),
                "max": round(max(times), 2),
            },
        }
        for name, times in recovered.items()
        if times
    }


def body(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    return {
        "model": "tiny",
        "prompt": [rng.randrange(2, 200) for _ in range(rng.randrange(1, 150))],
        "max_tokens": rng.randrange(1, 60),
        "ignore_eos": True,
        "route": "disaggregated",
        "temperature": rng.choice([0.0, 1.0]),
        "seed": number,
    }


def messages(num: int, seed: int, medium: str) -> dict[str, Any]:
    """The same requests of a deployment as it is, and of one whose messages are spoilt."""

    def ask(number: int) -> tuple[str, float]:
        begun = time.monotonic()
        head = {"Content-Type": "application/json"}
        data = json.dumps(body(number)).encode()
        call = urllib.request.Request(f"{url}/v1/completions", data, head)
        with urllib.request.urlopen(call, timeout=240) as response:
            text: str = json.load(response)["choices"][0]["text"]
        return text, time.monotonic() - begun

    texts: list[list[Future[tuple[str, float]]]] = []
    log = ""
    for faults in ("", FAULTS.format(seed=seed, medium=medium)):
        with tempfile.TemporaryDirectory() as folder:
            file = deployment(Path(folder), SIMULATED + faults)
            with (Path(folder) / "log").open("w+") as said:
                process = subprocess.Popen(
                    command("serve", str(file), "--port", "0"),
                    env=environment(),
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                )
                try:
                    url = ready_url(process)
                    with ThreadPoolExecutor(24) as threads:
                        texts.append([threads.submit(ask, number) for number in range(num)])
                    Server(process, url).at_rest(60)
                finally:
                    process.terminate()
                    process.communicate()
                log = Path(folder, "log").read_text()
    undisturbed, disturbed = texts
    outcomes: Counter[str] = Counter()
    times = []
    for one, other in zip(undisturbed, disturbed, strict=True):
        try:
            text, took_s = other.result()
        except urllib.error.HTTPError:
            outcomes["error"] += 1
            continue
        outcomes["right" if text == one.result()[0] else "wrong"] += 1
        times.append(took_s)
    done: Counter[str] = Counter()
    for line in log.splitlines():
        if "disturbed on purpose: " in line:
            for count, fate in re.findall(r"(\d+) (dropped|doubled|delayed|damaged)", line):
                done[f"{'control' if 'the router' in line else 'kv'} {fate}"] += int(count)
    return {
        "requests": num,
        "outcomes": dict(outcomes),
        "messages": dict(done),
        "request_s": {"p50": round(statistics.median(times), 2), "max": round(max(times), 2)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=24)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    report = {
        "seed": options.seed,
        "cuts": cuts(options.cuts, random.Random(options.seed)),
        "messages": {
            medium: messages(options.requests, options.seed, medium) for medium in ("tcp", "shm")
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 1 if '"wrong"' in text else 0


if __name__ == "__main__":
    sys.exit(main())
