"""Steps that nobody asked for, before the first that somebody does.

Kernels are compiled at their first call, libraries plan at theirs: half a second that would fall
on the first prompts. The steps here go through each path that a prompt can take, on blocks
and slots that are free.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..core.params import SamplingParams
from ..core.plan import Engine, NewSequence, Row, StepPlan

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
_DRAWN = SamplingParams(
    max_tokens=1, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=1
)


def warm_up(engine: Engine) -> None:
    for plan in warm_up_plans(
        engine.limits.max_step_tokens,
        engine.limits.max_context,
        engine.kv.layout.num_blocks * engine.kv.layout.block_size,
        engine.kv.layout.block_size,
    ):
        engine.launch(plan).wait()


def warm_up_plans(
    max_step_tokens: int, max_context: int, pool_tokens: int, block_size: int
) -> Iterator[StepPlan]:
    """A whole prompt of each power of two, one behind a prefix, and one beside a decode row."""
    most = min(max_step_tokens, max_context - 1, pool_tokens)
    lengths = [1 << power for power in range(5, most.bit_length())]
    for length in lengths:
        yield StepPlan((_sequence(0, length, 0, block_size),), (Row(0, 0, length),))
    half = most // 2 // block_size * block_size
    if half < 2 * block_size or max_step_tokens < block_size + 1:
        return
    behind = _sequence(0, half, 0, block_size)
    beside = _sequence(1, block_size + 1, half // block_size, block_size, _DRAWN)
    chunk = Row(0, half - block_size, block_size)
    yield StepPlan((behind,), (chunk,))
    yield StepPlan((behind, beside), (Row(1, block_size, 1), chunk))


def _sequence(
    slot: int, length: int, first: int, block_size: int, params: SamplingParams = _GREEDY
) -> NewSequence:
    blocks = tuple(range(first, first - (-length // block_size)))
    return NewSequence(slot, (0,) * length, length, params, blocks)
