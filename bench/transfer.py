"""``pdserve bench transfer``: KV blocks from one worker process to another, by every medium.

Each case is a pair of real workers around engines that compute nothing (see
``transfer_worker``), and a few lines of router. What a transfer took is what the sender
says of it, on its own clock (``core.messages.TransferDone``):

    moving    from the first block that left to the word that all are in; the rate is of that
    exposed   from the prompt's last chunk to the same word
    waited    from the prompt's start to the grant

    runnable  from the prompt's last chunk to the request runnable on D: what a client waits
              for. It is ``exposed`` without the word's way back, and with the wait for a grant
              where that came later than the chunk, by the clock that both processes have in common
    overhead  ``waited`` and ``exposed``: all that a transfer adds to a prompt

``cpu_s_per_gb`` is of both workers with all their threads; ``faults`` are pages a transfer that
the kernel had to find.

The floors are measured in the same run: a memory copy (or ``copy_`` between the GPUs), a bare
pair of ZeroMQ sockets, and one with as many connections as a case has streams. ``pulls`` is a
peer's pool copied from and nothing else. The first transfer of each case is checked, block by
block; it does not count.

With ``--batch N`` the engines are real, and the case is another one: N sequences decode on D
while prompts arrive one after the other, each ending at its second token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.card import ModelCard
from ..core.ids import Medium, Role
from ..core.keys import new_keys
from ..core.plan import KvLayout
from . import transfer_floors as floors
from .transfer_pair import Pair, specs_of
from .transfer_worker import MAX_CONTEXT, VOCABULARY, WorkerSpec, deployment_of, ms_between
from .transfer_worker import main as run_worker

# layers, KV heads, head dimension, format, its bytes
SHAPES = {
    "llama-3.1-8b": (32, 8, 128, "bf16", 2),
    "smollm2-135m": (30, 3, 64, "fp32", 4),
    "tiny": (2, 2, 16, "fp32", 4),
}
BLOCK_SIZE = 16
_CHUNK = 512  # tokens, where transfer and prefill overlap
_EXPOSED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Case:
    medium: Medium
    streams: int = 1
    checksums: str = "auto"
    curve: bool = False

    def __str__(self) -> str:
        words = [self.medium.value]
        if self.streams > 1:
            words.append(f"{self.streams} streams")
        if self.checksums != "auto":
            words.append(f"checksums {self.checksums}")
        if self.curve:
            words.append("CURVE")
        return ", ".join(words)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.child is not None:
        return run_worker(arguments.child)
    if arguments.batch:
        from .transfer_batch import measure

        report = measure(arguments)
    else:
        report = Bench(arguments).report()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def layout_of(shape: str, num_tokens: int) -> KvLayout:
    layers, heads, width, dtype, itemsize = SHAPES[shape]
    return KvLayout(
        num_blocks=2 * -(-num_tokens // BLOCK_SIZE) + 64,
        num_layers=layers,
        num_kv_heads=heads,
        block_size=BLOCK_SIZE,
        head_dim=width,
        dtype=dtype,
        block_bytes=layers * 2 * heads * BLOCK_SIZE * width * itemsize,
    )


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._tokens: list[int] = arguments.tokens or [16, 512, 2048, 8192, 32768]
        self._repeats: int = arguments.repeats
        first, second = arguments.devices.split(",")
        self._devices = (str(first), str(second))
        self._layout = layout_of(arguments.shape, max(*self._tokens, _EXPOSED_TOKENS))
        self._shape: str = arguments.shape
        self._token_us: float = arguments.token_us
        self._host: str = arguments.host
        media = [Medium(name) for name in arguments.media.split(",") if name]
        self._media = media or self._usual_media()
        self._streams = [int(count) for count in arguments.streams.split(",")]

    @property
    def _on_gpus(self) -> bool:
        return self._devices[0] != "cpu"

    @property
    def _several(self) -> list[int]:
        """The numbers of streams that have a floor of their own."""
        return [count for count in self._streams if count > 1] * (Medium.TCP in self._media)

    def report(self) -> dict[str, Any]:
        trip_ms = floors.round_trip_s() * 1000
        print(f"floor     a bare ZeroMQ round trip: {trip_ms:.3f} ms", flush=True)
        floor = self._floors()
        pulls = self._pulls(floor)
        rows = [row for case in self._cases() for row in self._measure(case, floor)]
        return {
            "shape": self._shape,
            "block_bytes": self._layout.block_bytes,
            "devices": list(self._devices),
            "machine": {
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
                "python": platform.python_version(),
            },
            "round_trip_ms": trip_ms,
            "floors": list(floor.values()),
            "pulls": pulls,
            "rows": rows,
        }

    def _usual_media(self) -> list[Medium]:
        return [Medium.CUDA_IPC if self._on_gpus else Medium.SHM, Medium.TCP]

    def _cases(self) -> Iterator[Case]:
        for medium in self._media:
            if medium is not Medium.TCP:
                yield Case(medium)
                continue
            for streams in self._streams:
                yield Case(medium, streams)
            yield Case(medium, checksums="off")
            if self._host != "127.0.0.1":
                yield Case(medium, curve=True)

    def _floors(self) -> dict[int, dict[str, Any]]:
        """By number of tokens."""
        found = {}
        for tokens in sorted({*self._tokens, _EXPOSED_TOKENS}):
            size = self._num_bytes(tokens)
            socket_s = floors.zmq_s(size, self._layout.block_bytes)
            row = {"tokens": tokens, "bytes": size, "zmq_gb_s": size / socket_s / 1e9}
            for streams in self._several:
                seconds = floors.zmq_streams_s(size, self._layout.block_bytes, streams)
                row[f"zmq_{streams}_gb_s"] = size / seconds / 1e9
            row["memcpy_gb_s"] = size / floors.memcpy_s(size) / 1e9
            several = "".join(
                f", {streams} streams {row[f'zmq_{streams}_gb_s']:.1f}" for streams in self._several
            )
            line = f"memcpy {row['memcpy_gb_s']:.1f}, ZeroMQ {row['zmq_gb_s']:.1f}{several} GB/s"
            if self._on_gpus:
                row["copy_gb_s"] = size / floors.gpu_copy_s(size, self._devices) / 1e9
                line = f"copy_ {row['copy_gb_s']:.0f}, {line}"
            found[tokens] = row
            print(f"floor     {tokens:6d} tokens, {size / 2**20:7.1f} MiB: {line}", flush=True)
        return found

    def _pulls(self, floor: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for medium in self._media:
            if medium is Medium.TCP:
                continue
            sizes = [tokens // BLOCK_SIZE for tokens in sorted(floor)]
            for row in floors.pull(self._layout, self._devices, medium, sizes):
                against = "copy_gb_s" if self._on_gpus else "memcpy_gb_s"
                row["ratio"] = row["gb_s"] / floor[row["tokens"]][against]
                rows.append(row)
                print(
                    f"pull      {row['tokens']:6d} tokens {row['blocks']:>9}: {row['ms']:8.2f} ms, "
                    f"{row['gb_s']:6.1f} GB/s, {row['ratio']:.2f} of {against[:-5]}",
                    flush=True,
                )
        return rows

    def _measure(self, case: Case, floor: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        with self._pair(case, MAX_CONTEXT, 0.0) as pair:
            pair.transfer(max(self._tokens), verify=True)
            for tokens in self._tokens:
                yield self._row(pair, case, tokens, floor[tokens], "at once")
        with self._pair(case, _CHUNK, self._token_us) as pair:
            pair.transfer(_EXPOSED_TOKENS, verify=True)
            chunks = f"chunks of {_CHUNK}"
            yield self._row(pair, case, _EXPOSED_TOKENS, floor[_EXPOSED_TOKENS], chunks)

    def _row(
        self, pair: Pair, case: Case, tokens: int, floor: dict[str, Any], prefill: str
    ) -> dict[str, Any]:
        repeats = self._repeats if tokens > 64 else 5 * self._repeats
        before = pair.usage()
        requests = [pair.transfer(tokens) for _ in range(repeats)]
        after = pair.usage()
        took = [one.done for one in requests if one.done is not None]
        runnable = [ms_between(one.tokens[0], one.tokens[1]) for one in requests]
        assert {one.medium for one in took} == {case.medium}, took[0].medium
        moving = statistics.median(one.moving_s for one in took)
        size = took[0].num_bytes
        against = self._against(case)
        row = {
            "case": str(case),
            "medium": case.medium.value,
            "streams": case.streams,
            "checksums": case.checksums,
            "curve": case.curve,
            "prefill": prefill,
            "tokens": tokens,
            "bytes": size,
            "moving_ms": moving * 1000,
            "gb_s": size / moving / 1e9,
            "exposed_ms": statistics.median(one.exposed_s for one in took) * 1000,
            "waited_ms": statistics.median(one.waited_s for one in took) * 1000,
            "runnable_ms": statistics.median(runnable),
            "overhead_ms": statistics.median(one.waited_s + one.exposed_s for one in took) * 1000,
            "cpu_s_per_gb": (after.cpu_s - before.cpu_s) / (repeats * size / 1e9),
            "faults": (after.faults - before.faults) / repeats,
            "floor": against,
            "ratio": size / moving / 1e9 / floor[f"{against}_gb_s"],
        }
        print(
            f"{case!s:24} {tokens:6d} tokens {prefill:>13}: moving {row['moving_ms']:8.2f} ms, "
            f"{row['gb_s']:6.1f} GB/s, {row['ratio']:.2f} of {against}; "
            f"exposed {row['exposed_ms']:.2f} ms, runnable {row['runnable_ms']:.2f} ms, "
            f"waited {row['waited_ms']:.2f} ms, "
            f"CPU {row['cpu_s_per_gb']:.2f} s/GB",
            flush=True,
        )
        return row

    def _against(self, case: Case) -> str:
        if case.medium is Medium.TCP:
            return f"zmq_{case.streams}" if case.streams > 1 else "zmq"
        return "copy" if self._on_gpus else "memcpy"

    @contextmanager
    def _pair(self, case: Case, chunk_tokens: int, token_us: float) -> Iterator[Pair]:
        transfer: dict[str, object] = {"medium": case.medium.value, "checksums": case.checksums}
        if case.streams > 1:
            transfer["streams"] = case.streams
        with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as name:
            folder = Path(name)
            if case.curve:
                new_keys(folder / "keys")
                transfer |= {"host": self._host, "keys": str(folder / "keys")}
            template = self._template(folder, transfer, chunk_tokens, token_us)
            with Pair(folder, specs_of(template, self._devices)) as pair:
                yield pair

    def _template(
        self, folder: Path, transfer: dict[str, object], chunk_tokens: int, token_us: float
    ) -> WorkerSpec:
        deployment_of(folder, **transfer)
        card = ModelCard(
            "none", str(folder), secrets.token_hex(32), "none", VOCABULARY, MAX_CONTEXT, ()
        )
        card.save(folder / "card.json")
        return WorkerSpec(
            worker_id="",
            role=Role.PREFILL,
            join=f"ipc://{folder}/control.sock",
            device="",
            deployment=str(folder / "deployment.json"),
            card=str(folder / "card.json"),
            layout=self._layout,
            chunk_tokens=chunk_tokens,
            token_us=token_us,
        )

    def _num_bytes(self, tokens: int) -> int:
        return -(-tokens // BLOCK_SIZE) * self._layout.block_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pdserve bench transfer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--devices", default="cpu,cpu", metavar="P,D", help="cpu or cuda:N, both")
    parser.add_argument("--media", default="", metavar="A,B", help="default: all that there are")
    parser.add_argument("--streams", default="1", metavar="N,N", help="of tcp")
    parser.add_argument("--tokens", type=_numbers, metavar="N,N", help="of a prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--token-us", type=float, default=24.0, help="that a token of a chunk takes to compute"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="an address of this host, off loopback, for CURVE"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument(
        "--batch", type=int, default=0, metavar="N", help="sequences that decode meanwhile"
    )
    parser.add_argument("--model", default="llama-3.1-8b", help="for --batch; random weights")
    parser.add_argument("--memory", default="auto", help="kv.memory, for --batch")
    parser.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        help="with prompts, and about as long without, for --batch",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
