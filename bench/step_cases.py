"""Steps of an engine as the benchmark runs them: decode at a context, prompts read whole.

Blocks hold random numbers from the start, so that a sequence may begin at any length: what
was before it in the cache is read like any other, and nothing has to be computed to get there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch

from ..core.params import SamplingParams
from ..core.plan import NewSequence, Row, StepHandle, StepPlan
from ..engine.engine import TorchEngine

_GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
_QUEUED_CYCLES = 1 << 27  # of the GPU's clock: longer than the host takes to queue the steps


@dataclass(frozen=True, slots=True)
class Decode:
    """``batch`` sequences of ``context`` tokens, each step one more."""

    batch: int
    context: int
    target: float  # ratio to the floor

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}, context {_kilo(self.context)}"


@dataclass(frozen=True, slots=True)
class Prefill:
    """``rows`` prompts of ``new`` tokens each in one step, after a cached ``prefix``."""

    rows: int
    new: int
    prefix: int
    target: float

    @property
    def name(self) -> str:
        prompts = f"{self.rows} x {self.new}" if self.rows > 1 else _kilo(self.new)
        behind = f" after {_kilo(self.prefix)} cached" if self.prefix else ""
        return f"prefill, {prompts}{behind}"


class Steps:
    """Runs cases on an engine whose pool and slots nobody else uses."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._random = Random(5)
        layout = engine.kv.layout
        self._block_size = layout.block_size
        self._blocks = list(range(layout.num_blocks))
        self._random.shuffle(self._blocks)

    def decode(self, case: Decode, steps: int) -> float:
        """Seconds from one step to the next, the median of ``steps`` with two in flight."""
        launched: deque[StepHandle] = deque()
        ends = []
        for plan in self._decode_plans(case, steps + 3):
            launched.append(self._engine.launch(plan))
            if len(launched) >= self._engine.limits.max_inflight:
                launched.popleft().wait()
                ends.append(time.perf_counter())
        while launched:
            launched.popleft().wait()
        return (ends[-1] - ends[1]) / (len(ends) - 2)

    def decode_busy(self, case: Decode, steps: int) -> float:
        """Seconds of the GPU for a step: the host has queued them all before the first starts."""
        plans = list(self._decode_plans(case, steps + 1))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._engine.launch(plans[0]).wait()
        torch.cuda._sleep(_QUEUED_CYCLES)
        start.record()
        handles = [self._engine.launch(plan) for plan in plans[1:]]
        end.record()
        assert not start.query(), "the host was too slow to queue the steps ahead"
        for handle in handles:
            handle.wait()
        return float(start.elapsed_time(end)) / 1000 / steps

    def prefill(self, case: Prefill) -> float:
        """Seconds from the launch of the step to its tokens."""
        length = case.prefix + case.new
        new = self._sequences(case.rows, length, length)
        plan = StepPlan(new, tuple(Row(row, case.prefix, case.new) for row in range(case.rows)))
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._engine.launch(plan).wait()
        return time.perf_counter() - started

    def in_chunks(self, length: int, chunk: int) -> float:
        """Seconds that a prompt of ``length`` tokens takes, read ``chunk`` tokens a step."""
        new = self._sequences(1, length, length)
        torch.cuda.synchronize()
        started = time.perf_counter()
        launched: deque[StepHandle] = deque()
        for start in range(0, length, chunk):
            row = Row(0, start, chunk, sample=start + chunk == length)
            launched.append(self._engine.launch(StepPlan(new, (row,))))
            new = ()
            if len(launched) >= self._engine.limits.max_inflight:
                launched.popleft().wait()
        while launched:
            launched.popleft().wait()
        return time.perf_counter() - started

    def _decode_plans(self, case: Decode, steps: int) -> Iterator[StepPlan]:
        """The context is the case's in the middle of them."""
        first = case.context - steps // 2 - 1  # the place of the first input token
        new = self._sequences(case.batch, first + 1, first + 1 + steps)
        for step in range(steps):
            yield StepPlan(new, tuple(Row(slot, first + step, 1) for slot in range(case.batch)))
            new = ()

    def _sequences(self, rows: int, length: int, most: int) -> tuple[NewSequence, ...]:
        """``rows`` random sequences of ``length`` tokens, with blocks of their own for ``most``."""
        count = -(-most // self._block_size)
        assert rows * count <= len(self._blocks), "the pool is too small for this case"
        vocab = self._engine.limits.vocab_size
        return tuple(
            NewSequence(
                slot,
                tuple(self._random.choices(range(vocab), k=length)),
                length,
                _GREEDY,
                tuple(self._blocks[slot * count : (slot + 1) * count]),
            )
            for slot in range(rows)
        )


def _kilo(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
