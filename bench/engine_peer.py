"""``pdserve bench engine --config``: the engine alone against transformers, on this machine's CPU.

One run measures, in turns so that a noisy neighbour meets all alike:

    transformers   generate, one request after the other, in fp32 and in bf16; the better counts
    one stream     the same request through the engine's steps
    streams        several such requests together

Each request reads ``--input`` random tokens and writes ``--output``, end tokens ignored. A
ratio is the median over the turns of (engine's tokens/s) / (transformers' tokens/s).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core import config
from ..core.card import ModelCard
from ..core.config import Deployment
from ..core.params import SamplingParams
from ..core.plan import StepHandle, StepPlan
from ..engine.build import build_engine
from ..engine.device import dtype_name
from ..engine.engine import TorchEngine
from ..engine.prepare import prepare
from .driver import StepDriver

_COPY_BYTES = 256 << 20
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Report:
    """Tokens per second are output tokens over the whole time of their requests."""

    model: str
    dtype: str
    threads: int
    input_tokens: int
    output_tokens: int
    streams: int
    turns: int
    transformers_tokens_s: dict[str, float]  # by dtype
    one_stream_tokens_s: float
    streams_tokens_s: float
    one_stream_ratio: float
    streams_ratio: float
    one_stream_step_ms: float  # the median decode step
    streams_step_ms: float
    weights_gb_s: float  # that the decode steps of one stream read
    copy_gb_s: float  # a memory copy, bytes read and written


def main(arguments: argparse.Namespace) -> int:
    deployment = config.load(arguments.config)
    card = prepare(deployment.model)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    report = measure(
        deployment,
        card,
        threads=threads,
        streams=arguments.streams,
        sizes=(arguments.input, arguments.output),
        turns=arguments.turns,
    )
    text = json.dumps(asdict(report), indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    return 0


def measure(
    deployment: Deployment,
    card: ModelCard,
    *,
    threads: int,
    streams: int,
    sizes: tuple[int, int],
    turns: int,
) -> Report:
    """``sizes``: input and output tokens of a request."""
    num_input, num_output = sizes
    engine = build_engine(
        card,
        deployment,
        device=torch.device("cpu"),
        memory_share=1.0,
        num_threads=threads,
        max_slots=streams,
        max_step_tokens=streams * num_input,
    )
    models = {dtype_name(dtype): _transformers(card, dtype) for dtype in _DTYPES}
    draw = torch.Generator().manual_seed(1)

    def prompts(count: int) -> list[list[int]]:
        drawn: list[list[int]] = torch.randint(
            0, card.vocab_size, (count, num_input), generator=draw
        ).tolist()
        return drawn

    def ours(count: int) -> Times:
        return _answer(engine, prompts(count), num_output)

    def theirs(name: str) -> float:
        return _generate(models[name], prompts(1)[0], num_output)

    for name in models:
        theirs(name)
    ours(1)
    ours(streams)
    seconds: dict[str, list[float]] = {name: [theirs(name)] for name in models}
    best = min(models, key=lambda name: seconds[name][0])
    alone, together = [], []
    for _ in range(turns):
        seconds[best].append(theirs(best))
        alone.append(ours(1))
        together.append(ours(streams))
    step = statistics.median(times.step for times in alone)
    return Report(
        model=card.name,
        dtype=dtype_name(engine.precision.weights),
        threads=threads,
        input_tokens=num_input,
        output_tokens=num_output,
        streams=streams,
        turns=turns,
        transformers_tokens_s={
            name: num_output / statistics.median(taken) for name, taken in seconds.items()
        },
        one_stream_tokens_s=num_output / statistics.median(times.whole for times in alone),
        streams_tokens_s=streams
        * num_output
        / statistics.median(times.whole for times in together),
        one_stream_ratio=_ratio(seconds[best][1:], alone, 1),
        streams_ratio=_ratio(seconds[best][1:], together, streams),
        one_stream_step_ms=1000 * step,
        streams_step_ms=1000 * statistics.median(times.step for times in together),
        weights_gb_s=engine.weights.step_bytes / step / 1e9,
        copy_gb_s=_copy_gb_s(),
    )


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of some requests together: all of it, and the median decode step."""

    whole: float
    step: float


def _ratio(theirs: Sequence[float], ours: Sequence[Times], streams: int) -> float:
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(streams * their / our.whole for their, our in pairs)


def _answer(engine: TorchEngine, prompts: list[list[int]], num_output: int) -> Times:
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    timed = _Timed(engine)
    started = time.perf_counter()
    StepDriver(timed).run(prompts, [params] * len(prompts), chunk_tokens=10**9)
    return Times(time.perf_counter() - started, statistics.median(timed.decode_steps))


class _Timed:
    """An engine whose decode steps are timed, from launch to result."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.kv = engine.kv
        self.limits = engine.limits
        self.decode_steps: list[float] = []

    def launch(self, plan: StepPlan) -> StepHandle:
        started = time.perf_counter()
        handle = self._engine.launch(plan)
        handle.wait()
        if plan.num_tokens == len(plan.rows):
            self.decode_steps.append(time.perf_counter() - started)
        return handle

    def close(self) -> None:
        self._engine.close()


def _transformers(card: ModelCard, dtype: torch.dtype) -> Any:
    """The same model, by the same weights where there are any."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if card.dummy:
        shape = AutoConfig.from_pretrained(card.folder)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(card.folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def _generate(model: Any, prompt: list[int], num_output: int) -> float:
    ids = torch.tensor([prompt])  # [1, T]
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_output,
        pad_token_id=0,
    )
    taken = time.perf_counter() - started
    assert out.shape[1] == len(prompt) + num_output
    return taken


def _copy_gb_s() -> float:
    """The best of several: bytes read and written by a second."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - started)
    return 2 * _COPY_BYTES / min(taken) / 1e9
