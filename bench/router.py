"""``pdserve bench router``: what the router costs, with simulated workers behind it.

decide    hashing the prompt, looking it up in the map of prefixes, and the decision, among 256
          workers, in microseconds
streams   a router process, workers that write at a steady pace, and clients: tokens for each
          CPU second of the router, beside a bare aiohttp server that writes the same events
          to the same clients in the same run
beside    with --beside vllm-router: that router in front of servers that write the same events,
          under the same load, where it is installed
ttft      what the router adds to the first token at half of that load: its workers answer at once
held      memory of a stream that is open, with many of them
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache.hashing import BlockHasher
from ..core import config
from ..core.config import Deployment, Policy
from ..core.ids import new_request_id
from ..core.messages import CacheEvents
from ..core.params import SamplingParams
from ..router.dispatch import Dispatch
from ..router.effects import Link
from ..router.membership import Membership
from ..router.requests import Ask, State
from ..router.snapshot import Objectives
from .beside import PROGRAMS, beside, lacking, version
from .router_load import hello
from .router_share import Histograms, own_share

NUM_WORKERS = 256
_HELD_BLOCKS = 1024  # of each worker, in the map of prefixes
_PROMPTS = (128, 512, 2048)
_KNOWN = (0.5, 1.0)  # of a prompt's tokens, to some workers
_STREAM_WORKERS = 8


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pdserve bench router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=["decide", "streams", "held"], help="one part")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--held", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=4.0, help="tokens a second and stream")
    parser.add_argument("--window", type=float, default=10.0, help="seconds that are measured")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of router and bare server")
    parser.add_argument("--beside", choices=PROGRAMS, help="another router, the same load")
    parser.add_argument(
        "--model", default="smollm2", help="whose tokenizer, without its weights (smollm2)"
    )
    parser.add_argument("--out", type=Path, help="write the report there as well, JSON")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],  # what else ran: it is in the times, not in CPU
    }
    if arguments.only in (None, "decide"):
        report["decide"] = [decide(length, share) for share in _KNOWN for length in _PROMPTS]
    if arguments.only in (None, "streams"):
        report["streams"] = streams(arguments)
    if arguments.only in (None, "held"):
        report["held"] = held(arguments)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    return 0


def decide(num_tokens: int, share: float = 0.5, rounds: int = 600) -> dict[str, Any]:
    """Placing a request of so many tokens, of which some workers hold that share already."""
    rng = random.Random(num_tokens)
    salt = b"bench"
    dispatch = Dispatch(
        Policy.ADAPTIVE,
        Deployment.model_validate({"model": {"path": "bench"}}).pools,
        Membership("bench"),
        1,
        salt,
        Objectives(500.0, 50.0),
    )
    links = [Link(0, b"%d" % index) for index in range(NUM_WORKERS)]
    heads = [[rng.randrange(50_000) for _ in range(int(share * num_tokens))] for _ in range(64)]
    names_of_heads = []
    for head in heads:
        names: list[bytes] = []
        BlockHasher(16, salt).extend(names, head, len(head) // 16)
        names_of_heads.append(b"".join(names))
    for index, link in enumerate(links):
        dispatch.receive(link, hello(f"w{index}", "bench"), 0.0)
        known = names_of_heads[index % 64] + names_of_heads[index * 7 % 64]
        dispatch.receive(link, CacheEvents(0, known, b"", reset=True), 0.0)
        dispatch.receive(link, CacheEvents(1, rng.randbytes(16 * _HELD_BLOCKS), b""), 0.0)
    params = SamplingParams(max_tokens=256)
    times, live = [], []
    for count in range(rounds):
        head = rng.choice(heads)
        tail = [rng.randrange(50_000) for _ in range(num_tokens - len(head))]
        ask = Ask(new_request_id(), (*head, *tail), params, 1e9)
        start = time.perf_counter()
        placed = dispatch.submit(ask, 0.0)
        times.append(time.perf_counter() - start)
        assert placed, "no worker took it"
        live.append(ask.request_id)
        if count > 200:  # as many come as go
            dispatch.end(live.pop(0), State.ABORTED, 0.0)
    ordered = sorted(times[50:])
    return {
        "workers": NUM_WORKERS,
        "prompt_tokens": num_tokens,
        "share_known": share,
        "blocks_known": len(dispatch.prefixes),
        "median_us": 1e6 * statistics.median(ordered),
        "p99_us": 1e6 * ordered[len(ordered) * 99 // 100],
    }


def streams(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pairs of the router and the bare server, one after the other; then half of the load."""
    pairs = []
    load = {
        "num_streams": arguments.streams,
        "window_s": arguments.window,
        "rate": 500.0,
        "max_tokens": 4096,
        "words": 24,
    }
    interval_s = 1.0 / arguments.rate
    with _router(arguments.model, interval_s) as (port, pid):
        for _ in range(arguments.rounds):
            ours = _clients(port, pid, load)
            with _bare(ours["sample"], interval_s) as ((bare_port,), bare_pid):
                bare = _clients(bare_port, bare_pid, load)
            pairs.append((_per_cpu(ours), _per_cpu(bare), ours, bare))
        half = load | {"num_streams": arguments.streams // 2, "window_s": 2.0, "rate": 50.0}
        before = Histograms.scrape(port)
        ours = _clients(port, pid, half)
        share = own_share(port, before)
        with _bare(ours["sample"], interval_s) as ((bare_port,), bare_pid):
            bare = _clients(bare_port, bare_pid, half)
    other = _beside(arguments.beside, ours["sample"], interval_s, load, half)
    ratios = [router / bare_ for router, bare_, _, _ in pairs]
    return {
        "streams": arguments.streams,
        "tokens_a_second_and_stream": arguments.rate,
        "router_tokens_per_cpu_s": statistics.median(pair[0] for pair in pairs),
        "bare_tokens_per_cpu_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "router_cpu_share": pairs[0][2]["cpu_s"] / pairs[0][2]["window_s"],
        "faults": sum(pair[2]["faults"] + pair[3]["faults"] for pair in pairs),
        "event_bytes": len(pairs[0][2]["sample"]),
        "half_load": {
            "streams": half["num_streams"],
            "router_ttft_ms": ours["ttft_ms"],
            "bare_ttft_ms": bare["ttft_ms"],
            "added_p99_ms": ours["ttft_ms"]["p99"] - bare["ttft_ms"]["p99"],
            "router_share_ms": share,
        },
        "beside": other,
    }


def _beside(
    program: str | None, sample: str, interval_s: float, load: dict[str, Any], half: dict[str, Any]
) -> dict[str, Any] | None:
    """The same load through another router; what it writes is compared by events, not by bytes."""
    if program is None:
        return None
    if (reason := lacking(program)) is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return {"program": program, "skipped": reason}
    with (
        _bare(sample, interval_s, _STREAM_WORKERS) as (ports, _),
        beside(program, ports) as (port, pid),
    ):
        whole = _clients(port, pid, load)
        first = _clients(port, pid, half)
    return {
        "program": program,
        "version": version(program),
        "tokens_per_cpu_s": whole["events"] / whole["cpu_s"],
        "faults": whole["faults"] + first["faults"],
        "bytes_a_stream": whole["bytes_a_stream"],
        "half_load_ttft_ms": first["ttft_ms"],
    }


def held(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams that get a token every twenty seconds: what each takes of memory."""
    load = {
        "num_streams": arguments.held,
        "window_s": 10.0,
        "rate": 400.0,
        "max_tokens": 4096,
        "words": 24,
    }
    with _router(arguments.model, 20.0) as (port, pid):
        found = _clients(port, pid, load)
    return {
        "streams": arguments.held,
        "faults": found["faults"],
        "bytes_a_stream": found["bytes_a_stream"],
        "tokens_in_window": found["events"],
        "cpu_share": found["cpu_s"] / found["window_s"],
    }


def _per_cpu(found: dict[str, Any]) -> float:
    assert not found["faults"], found
    return float(found["events"] / found["cpu_s"])


@contextlib.contextmanager
def _router(model: str, interval_s: float) -> Iterator[tuple[int, int]]:
    """A router with its workers: its port and process id."""
    from ..engine.prepare import prepare

    file = Deployment.model_validate(
        {
            "model": {"path": model, "load": "dummy", "name": "bench", "max_context": 8192},
            "pools": {"mixed": {"workers": _STREAM_WORKERS}},
            "router": {
                "port": 0,
                "max_queue": 1 << 16,
                "max_connections": 16384,
                "request_timeout_s": 3600.0,
            },
            "engine": "simulated",
        }
    )
    with tempfile.TemporaryDirectory(prefix="pd-") as name:
        folder = Path(name)
        card = replace(prepare(file.model), name="bench", max_context=1 << 14)
        card.save(folder / "card.json")
        config.save(file, folder / "deployment.json")
        command = ("router", folder / "deployment.json", "--card", folder / "card.json")
        router = _start("pdserve.cli", *command, "--run-dir", folder)
        spawned = [router]
        try:
            written = folder / "http.json"
            while not written.exists():
                assert router.poll() is None, "the router has ended"
                time.sleep(0.05)
            arguments = {
                "endpoint": f"ipc://{folder}/control.sock",
                "fingerprint": card.fingerprint,
                "count": _STREAM_WORKERS,
                "interval_s": interval_s,
            }
            spawned.append(_part("workers", arguments))
            time.sleep(1.5)
            yield int(json.loads(written.read_text())["port"]), router.pid
        finally:
            for process in reversed(spawned):
                process.kill()
                process.wait()


@contextlib.contextmanager
def _bare(sample: str, interval_s: float, count: int = 1) -> Iterator[tuple[list[int], int]]:
    """Its ports and process id."""
    process = _part("bare", {"event": sample, "interval_s": interval_s, "count": count})
    try:
        assert process.stdout is not None
        yield [int(port) for port in process.stdout.readline().split()], process.pid
    finally:
        process.kill()
        process.wait()


def _clients(port: int, pid: int, load: dict[str, Any]) -> dict[str, Any]:
    process = _part("clients", {"port": port, "pid": pid, **load})
    try:
        assert process.stdout is not None
        found: dict[str, Any] = json.loads(process.stdout.readline())
        process.wait()
        time.sleep(1.0)  # for the hang-ups to be dealt with
        return found
    finally:
        process.kill()
        process.wait()


def _part(name: str, arguments: dict[str, Any]) -> subprocess.Popen[str]:
    return _start("pdserve.bench.router_load", name, json.dumps(arguments))


def _start(module: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-P", "-m", module, *map(str, arguments)),
        stdout=subprocess.PIPE,
        text=True,
    )
