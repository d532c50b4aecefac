"""``pdserve bench engine --shape``: the engine beside what the hardware allows, in one run.

A case and its floor are measured in turns, because clocks drift; its ratio is the median over
the turns of (the engine's time) / (the floor's time). The floors:

    decode     the step's matrix products alone, through cuBLAS, in a graph, all weights in turn;
               and the bytes of the KV cache at the rate at which a plain loop reads memory
    prefill    the same products at that many tokens; and causal attention through cuDNN, for
               tokens behind a prefix at the rate it reaches on a prompt of 8k
    CPU        the time the GPU takes for a step when the host is ahead of it
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.config import Deployment
from ..engine.build import build_engine
from ..engine.engine import TorchEngine
from ..engine.prepare import prepare
from .read_floor import read_stream
from .step_cases import Decode, Prefill, Steps
from .timing import event_micros

_MAX_SLOTS = 256
_MAX_STEP_TOKENS = 8192
_DECODE_STEPS = 12  # a turn
_BUSY_STEPS = 24
_READ_BYTES = 4 << 30
_CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
_ATTENTION_TOKENS = 8192  # where cuDNN's rate is taken for chunks behind a prefix

_BIG = (
    Decode(1, 1024, 1.12),
    Decode(64, 1024, 1.12),
    Decode(256, 1024, 1.12),
    Decode(32, 16384, 1.15),
    Prefill(1, 2048, 0, 1.12),
    Prefill(1, 8192, 0, 1.12),
    Prefill(16, 512, 0, 1.12),
    Prefill(1, 512, 8192, 1.25),
)
_SMALL = (Decode(1, 1024, 1.25), Decode(64, 1024, 1.25), Prefill(1, 2048, 0, 1.35))
CASES: Mapping[str, tuple[Decode | Prefill, ...]] = {
    "llama-3.1-8b": _BIG,
    "qwen3-8b": _BIG,
    "llama-3.2-1b": _SMALL,
}
_CPU_TARGETS = {"llama-3.1-8b": 1.03, "qwen3-8b": 1.03, "llama-3.2-1b": 1.08}


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    ms: float
    floor_ms: float
    ratio: float  # the median of the turns'
    ratios: list[float]
    target: float

    @property
    def reached(self) -> bool:
        return self.ratio <= self.target


@dataclass(slots=True)
class Report:
    shape: str
    device: str
    torch: str
    triton: str
    ready_s: float  # from the first word to an engine that can step
    kv_blocks: int
    read_tb_s: float
    results: list[Result] = field(default_factory=list)
    chunks: dict[int, float] = field(default_factory=dict)  # ms of a prompt of 8k, by chunk size
    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by case


def main(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("pdserve bench engine --shape: no CUDA device here")
        return 2
    import triton

    device = torch.device(arguments.device)
    device = torch.device("cuda", device.index or 0)
    started = time.perf_counter()
    engine = _engine(arguments.shape, device)
    torch.cuda.synchronize(device)
    ready = time.perf_counter() - started
    floors = Floors(engine)
    report = Report(
        arguments.shape,
        torch.cuda.get_device_name(device),
        torch.__version__,
        triton.__version__,
        ready,
        engine.kv.layout.num_blocks,
        floors.read_bandwidth() / 1e12,
    )
    steps = Steps(engine)
    for case in CASES.get(arguments.shape, _SMALL):
        if not _chosen(case.name, arguments.only):
            continue
        _add(report, _measure(case, steps, floors, arguments.rounds))
        if isinstance(case, Decode) and case.batch == 64:
            _add(report, _overhead(case, steps, arguments, _CPU_TARGETS[arguments.shape]))
        if arguments.profile:
            report.kernels[case.name] = _profile(case, steps)
            _print_kernels(report.kernels[case.name])
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if _chosen("chunks", arguments.only):
        report.chunks = _chunks(steps, arguments.rounds)
        least = min(report.chunks.values())
        for chunk, ms in report.chunks.items():
            print(f"a prompt of 8k in chunks of {chunk:5}: {ms:9.3f} ms, {ms / least:6.3f}")
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    print(
        f"{report.device}, {report.shape}: ready in {ready:.1f} s, {report.kv_blocks} blocks, "
        f"reads {report.read_tb_s:.2f} TB/s"
    )
    engine.close()
    return 0


def _chosen(name: str, words: list[str] | None) -> bool:
    return not words or any(word in name for word in words)


def _engine(shape: str, device: torch.device) -> TorchEngine:
    deployment = Deployment.model_validate({"model": {"path": shape, "load": "dummy"}})
    engine = build_engine(
        prepare(deployment.model),
        deployment,
        device=device,
        memory_share=1.0,
        num_threads=8,
        max_slots=_MAX_SLOTS,
        max_step_tokens=_MAX_STEP_TOKENS,
    )
    # Random numbers in every block: a case may start behind a prefix that nobody computed.
    for block in engine.kv_blocks.split(256):
        block.normal_()
    return engine


def _measure(case: Decode | Prefill, steps: Steps, floors: Floors, rounds: int) -> Result:
    if isinstance(case, Decode):
        floor = floors.decode(case)
        times = [(steps.decode(case, _DECODE_STEPS), floor()) for _ in range(rounds + 1)]
    else:
        floor = floors.prefill(case)
        times = [(steps.prefill(case), floor()) for _ in range(rounds + 1)]
    times = times[1:]  # the first compiles and fills caches
    ratios = [ours / least for ours, least in times]
    return Result(
        case.name,
        1000 * statistics.median(ours for ours, _ in times),
        1000 * statistics.median(least for _, least in times),
        statistics.median(ratios),
        [round(ratio, 4) for ratio in ratios],
        case.target,
    )


def _chunks(steps: Steps, rounds: int) -> dict[int, float]:
    """Milliseconds of a prompt by the size of its chunks, in turns."""
    times = [{chunk: steps.in_chunks(8192, chunk) for chunk in _CHUNKS} for _ in range(rounds + 1)]
    return {chunk: 1000 * statistics.median(turn[chunk] for turn in times[1:]) for chunk in _CHUNKS}


def _overhead(case: Decode, steps: Steps, arguments: argparse.Namespace, target: float) -> Result:
    """Wall time over the GPU's."""
    times = [
        (steps.decode(case, _BUSY_STEPS), steps.decode_busy(case, _BUSY_STEPS))
        for _ in range(arguments.rounds)
    ]
    ratios = [wall / busy for wall, busy in times]
    return Result(
        f"wall / GPU busy of a step, {case.name}",
        1000 * statistics.median(wall for wall, _ in times),
        1000 * statistics.median(busy for _, busy in times),
        statistics.median(ratios),
        [round(ratio, 4) for ratio in ratios],
        target,
    )


class Floors:
    """What each case can't be faster than, measured on the engine's own weights and GPU."""

    def __init__(self, engine: TorchEngine) -> None:
        self._weights = engine.weights
        self._shape = engine.shape
        self._layout = engine.kv.layout
        self._pool = engine.kv_blocks
        self._device = engine.kv_blocks.device

    def read_bandwidth(self) -> float:
        """Bytes a second that a plain loop reads."""
        blocks = min(self._layout.num_blocks, _READ_BYTES // self._layout.block_bytes)
        part = self._pool[:blocks].view(-1)
        return part.nbytes / event_micros(lambda: read_stream(part)) * 1e6

    def decode(self, case: Decode) -> Callable[[], float]:
        """Measures seconds of a step's floor."""
        products = self._products(case.batch, case.batch)
        graph = torch.cuda.CUDAGraph()
        products()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            products()
        token_bytes = self._layout.block_bytes // self._layout.block_size
        kv_bytes = case.batch * case.context * token_bytes

        def measure() -> float:
            return event_micros(graph.replay) / 1e6 + kv_bytes / self.read_bandwidth()

        return measure

    def prefill(self, case: Prefill) -> Callable[[], float]:
        tokens = case.rows * case.new
        products = self._products(tokens, case.rows)
        dense = _ATTENTION_TOKENS if case.prefix else case.new
        rows = 1 if case.prefix else case.rows
        attention = self._attention(rows, dense)
        pairs = case.new * case.prefix + case.new * (case.new + 1) / 2
        share = pairs / (dense * (dense + 1) / 2) if case.prefix else 1.0

        def measure() -> float:
            # Once, from idle, as the case runs: a GPU that is kept busy lowers its clocks.
            once = event_micros(attention, repeats=5, burst=4)
            torch.cuda.synchronize()
            micros = event_micros(products, repeats=1, warmed=True)
            return (micros + share * once * self._shape.num_layers) / 1e6

        products()
        torch.cuda.synchronize()

        return measure

    def _products(self, tokens: int, sampled: int) -> Callable[[], None]:
        """Every matrix product of a step, with ``sampled`` rows of logits."""
        weights, shape = self._weights, self._shape
        layer = weights.layers[0]
        matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
        inputs, outputs = [], []
        for matrix in matrices:
            rows, columns = matrix.weight.shape
            inputs.append(self._random(tokens, columns))
            outputs.append(self._random(tokens, rows))
        last = self._random(sampled, shape.hidden_size)
        logits = self._random(sampled, shape.vocab_size)

        def run() -> None:
            for layer in weights.layers:
                linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
                for linear, x, out in zip(linears, inputs, outputs, strict=True):
                    torch.mm(x, linear.weight.t(), out=out)
            torch.mm(last, weights.lm_head.t(), out=logits)

        return run

    def _attention(self, rows: int, tokens: int) -> Callable[[], None]:
        """One layer's causal attention of whole prompts, through cuDNN."""
        shape = self._shape
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = (
            self._random(rows, tokens, number, shape.head_dim).transpose(1, 2) for number in heads
        )

        def run() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self._device).to(self._weights.final_norm.dtype)


def _profile(case: Decode | Prefill, steps: Steps) -> list[dict[str, Any]]:
    """The kernels of some steps with their share of the GPU's time, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if isinstance(case, Decode):
            steps.decode(case, _DECODE_STEPS)
        else:
            steps.prefill(case)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    return [
        {
            "kernel": event.key[:120],
            "calls": event.count,
            "micros": event.self_device_time_total / max(event.count, 1),
            "share": event.self_device_time_total / total,
        }
        for event in events[:24]
        if event.self_device_time_total
    ]


def _print_kernels(kernels: list[dict[str, Any]]) -> None:
    for row in kernels[:14]:
        print(
            f"    {100 * row['share']:5.1f}% {row['micros']:9.1f} us x {row['calls']:<5}"
            f" {row['kernel'][:76]}",
            flush=True,
        )


def _add(report: Report, result: Result) -> None:
    report.results.append(result)
    mark = " " if result.reached else "!"
    print(
        f"{result.case:52} {result.ms:9.3f} ms, floor {result.floor_ms:9.3f}: "
        f"{result.ratio:6.3f} of {result.target}{mark}",
        flush=True,
    )
