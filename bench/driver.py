"""Sequences through an engine with no scheduler: what the engine alone can do.

All blocks of a sequence are given to it at the start; prompts are read in chunks, oldest
first, beside the decode rows of those that are further. Answers run to ``max_tokens``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.params import SamplingParams
from ..core.plan import Engine, NewSequence, Row, SampledToken, StepHandle, StepPlan


@dataclass(slots=True)
class _Run:
    slot: int
    prompt: tuple[int, ...]
    params: SamplingParams
    blocks: tuple[int, ...]
    num_launched: int = 0  # positions computed by the steps so far, those in flight included
    drawn: list[SampledToken] = field(default_factory=list)

    @property
    def row_left(self) -> bool:
        return self.num_launched < len(self.prompt) + self.params.max_tokens - 1


class StepDriver:
    """Owns the engine's blocks and slots, all free between calls."""

    def __init__(self, engine: Engine, blocks: Sequence[int] | None = None) -> None:
        """``blocks``: those to use, in this order; all of the pool by default."""
        self._engine = engine
        self._blocks = range(engine.kv.layout.num_blocks) if blocks is None else blocks

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        chunk_tokens: int = 256,
    ) -> list[list[SampledToken]]:
        """The answers, in the prompts' order."""
        runs = self._runs(prompts, params)
        assert len(runs) <= self._engine.limits.max_slots
        new = tuple(
            NewSequence(run.slot, run.prompt, len(run.prompt), run.params, run.blocks)
            for run in runs
        )
        launched: deque[StepHandle] = deque()
        while True:
            rows = _rows(runs, chunk_tokens)
            if rows:
                launched.append(self._engine.launch(StepPlan(new, rows)))
                new = ()
            if not launched:
                return [run.drawn for run in runs]
            if not rows or len(launched) >= self._engine.limits.max_inflight:
                for token in launched.popleft().wait().tokens:
                    runs[token.slot].drawn.append(token)

    def _runs(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[_Run]:
        size, used = self._engine.kv.layout.block_size, 0
        runs = []
        for slot, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            count = -(-(len(prompt) + wanted.max_tokens - 1) // size)
            mine = tuple(self._blocks[used : used + count])
            assert len(mine) == count, "the pool is too small"
            runs.append(_Run(slot, tuple(prompt), wanted, mine))
            used += count
        return runs


def _rows(runs: list[_Run], chunk_tokens: int) -> tuple[Row, ...]:
    """The next step's rows; counts them as launched."""
    decode = [run for run in runs if run.num_launched >= len(run.prompt) and run.row_left]
    rows = [Row(run.slot, run.num_launched, 1) for run in decode]
    for run in decode:
        run.num_launched += 1
    for run in runs:
        left = len(run.prompt) - run.num_launched
        count = min(left, chunk_tokens)
        if run not in decode and count > 0:
            rows.append(Row(run.slot, run.num_launched, count, sample=count == left))
            run.num_launched += count
            chunk_tokens -= count
    return tuple(rows)
