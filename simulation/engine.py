"""A worker's engine without a model: the KV is honest, the arithmetic is a hash.

A position's KV bytes are a chained digest of the tokens up to it and the position; the
next token is a hash over the KV that the sequence's blocks hold at that moment. So a
block that was lost, swapped, overwritten too early or sent before it was computed shows
as a wrong token, and prefix caching, transfers, preemption and replays must all give the
answer that ``SimulatedModel.expected_tokens`` computes directly.

Steps are computed as late as the protocol allows, when they are waited for: a scheduler
that frees or offers blocks of a step in flight gets caught, as it would on a GPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from ..core.clock import Clock, monotonic
from ..core.host_pool import HostKvPool
from ..core.params import SamplingParams
from ..core.plan import (
    EngineLimits,
    KvLayout,
    NewSequence,
    Row,
    SampledToken,
    StepPlan,
    StepResult,
)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What stands for the weights. ``eos_probability`` is that of each token to be the last.

    ``token_bytes`` is the KV of one position; at most 64, the longest digest there is.
    """

    vocab_size: int = 256
    eos_token_ids: tuple[int, ...] = (0,)
    eos_probability: float = 0.0
    token_bytes: int = 64

    def __post_init__(self) -> None:
        assert self.token_bytes % 2 == 0 and 16 <= self.token_bytes <= 64, self.token_bytes
        assert 0.0 <= self.eos_probability <= 1.0 and self.eos_token_ids

    def kv_of(self, before: bytes, token_id: int, position: int) -> bytes:
        """The KV of ``position``, given that of the one before it (empty for the first)."""
        digest = hashlib.blake2b(before, digest_size=self.token_bytes)
        digest.update(token_id.to_bytes(4, "little") + position.to_bytes(8, "little"))
        return digest.digest()

    def next_token(self, kv: bytes | memoryview, params: SamplingParams, output_index: int) -> int:
        """The token that follows. ``kv``: the bytes of all positions so far."""
        noise = b"" if params.greedy else b"%d/%d/%d" % (params.seed, params.choice, output_index)
        digest = xxhash.xxh3_128(kv)
        digest.update(noise)
        drawn = digest.intdigest()
        chance, pick = drawn >> 64, drawn & (2**64 - 1)
        masked = set(params.stop_token_ids) if output_index < params.min_tokens else set()
        masked.update(self.eos_token_ids)
        if output_index >= params.min_tokens and chance < self.eos_probability * 2**64:
            return self.eos_token_ids[pick % len(self.eos_token_ids)]
        token_id = pick % self.vocab_size
        for _ in range(len(masked)):
            if token_id not in masked:
                break
            token_id = (token_id + 1) % self.vocab_size
        return token_id

    def expected_tokens(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        params: SamplingParams,
        num_tokens: int,
    ) -> list[int]:
        """The undisturbed answer after ``prompt + output``, by the finish rules of tokens (eos,
        stop tokens, max_tokens), and at most ``num_tokens`` of it."""
        kv = bytearray()
        before = b""
        for position, token_id in enumerate((*prompt, *output)):
            before = self.kv_of(before, token_id, position)
            kv += before
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends.update(self.eos_token_ids)
        tokens: list[int] = []
        while len(tokens) < num_tokens and len(output) + len(tokens) < params.max_tokens:
            index = len(output) + len(tokens)
            token_id = self.next_token(bytes(kv), params, index)
            tokens.append(token_id)
            if token_id in ends:
                break
            before = self.kv_of(before, token_id, len(prompt) + index)
            kv += before
        return tokens


class SimulatedKvPool(HostKvPool):
    """``block_size`` records of ``token_bytes`` in each block.

    The layout's last dimensions only say how many bytes that is: nobody looks inside.
    """

    def __init__(
        self, num_blocks: int, block_size: int, token_bytes: int, *, shared: bool = False
    ) -> None:
        layout = KvLayout(
            num_blocks=num_blocks,
            num_layers=1,
            num_kv_heads=1,
            block_size=block_size,
            head_dim=token_bytes // 2,
            dtype="uint8",
            block_bytes=block_size * token_bytes,
        )
        super().__init__(layout, shared=shared)
        # [num_blocks, block_size, token_bytes], the same memory
        self.records: Bytes = self.bytes.reshape(num_blocks, block_size, token_bytes)

    def zero_tail(self, block: int, num_tokens: int) -> None:
        self.records[block, num_tokens:] = 0


@dataclass(slots=True)
class _Slot:
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_table: list[int]


class SimulatedStep:
    """A launched step; ``due`` is when its device would be done with it."""

    def __init__(self, engine: SimulatedEngine, plan: StepPlan, due: float) -> None:
        self._engine = engine
        self.plan = plan
        self.due = due
        self.result: StepResult | None = None

    def wait(self) -> StepResult:
        if self.result is None:
            self._engine.finish(self)
        assert self.result is not None
        return self.result

    @property
    def done(self) -> bool:
        return self.result is not None or self._engine.past(self.due)


def pace(step_ms: float, token_ms: float) -> Callable[[StepPlan], float] | None:
    """The ``latency`` of an engine whose steps take so long, and longer by token; in seconds."""
    if step_ms == token_ms == 0:
        return None
    return lambda plan: (step_ms + token_ms * plan.num_tokens) / 1e3


class SimulatedEngine:
    """``core.plan.Engine`` on the CPU with numpy. ``latency`` gives a step's seconds, if any.

    What breaks the seam's rules (rows outside their block table, two rows writing one
    block, too many steps in flight) is a scheduler's bug and raises AssertionError.
    """

    def __init__(
        self,
        model: SimulatedModel,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_slots: int = 64,
        max_context: int = 4096,
        max_step_tokens: int = 2048,
        max_inflight: int = 1,
        latency: Callable[[StepPlan], float] | None = None,
        clock: Clock = monotonic,
        sleep: Callable[[float], None] = time.sleep,
        shared: bool = False,
    ) -> None:
        """``shared``: with its blocks in memory that peers on this host can read."""
        self._model = model
        self._kv = SimulatedKvPool(num_blocks, block_size, model.token_bytes, shared=shared)
        self._limits = EngineLimits(
            max_slots=max_slots,
            max_context=max_context,
            max_step_tokens=max_step_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            max_inflight=max_inflight,
        )
        self._latency = latency
        self._clock = clock
        self._sleep = sleep
        self._slots: dict[int, _Slot] = {}
        self._launched: deque[SimulatedStep] = deque()
        self._device_free_at = 0.0

    @property
    def kv(self) -> SimulatedKvPool:
        return self._kv

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def launch(self, plan: StepPlan) -> SimulatedStep:
        assert len(self._launched) < self._limits.max_inflight, "too many steps in flight"
        assert plan.num_tokens <= self._limits.max_step_tokens, plan.num_tokens
        due = 0.0
        if self._latency is not None:
            due = max(self._clock(), self._device_free_at) + self._latency(plan)
            self._device_free_at = due
        step = SimulatedStep(self, plan, due)
        self._launched.append(step)
        return step

    def finish(self, step: SimulatedStep) -> None:
        """Computes what was launched, in order, up to and including ``step``."""
        while step.result is None:
            earliest = self._launched.popleft()
            if self._latency is not None and (wait_s := earliest.due - self._clock()) > 0:
                self._sleep(wait_s)
            earliest.result = self._compute(earliest.plan)

    def past(self, due: float) -> bool:
        return self._latency is None or due <= self._clock()

    def close(self) -> None:
        self._launched.clear()
        self._slots.clear()
        self._kv.close()

    def _compute(self, plan: StepPlan) -> StepResult:
        for sequence in plan.new:
            self._fill(sequence)
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot has two rows"
        written: set[int] = set()
        for row in plan.rows:
            blocks = self._run(row)
            assert written.isdisjoint(blocks), f"slot {row.slot} writes another row's blocks"
            written |= blocks
        return StepResult(tuple(self._sample(row) for row in plan.rows if row.sample))

    def _fill(self, sequence: NewSequence) -> None:
        assert 0 <= sequence.slot < self._limits.max_slots, sequence.slot
        assert 0 < sequence.num_prompt_tokens <= len(sequence.token_ids), sequence.slot
        self._slots[sequence.slot] = _Slot(
            list(sequence.token_ids),
            sequence.num_prompt_tokens,
            sequence.params,
            list(sequence.block_table),
        )

    def _run(self, row: Row) -> set[int]:
        """Writes the KV of the row's positions; returns the blocks written."""
        slot = self._slots[row.slot]
        slot.block_table.extend(row.new_blocks)
        end = row.start + row.num_tokens
        size = self._kv.layout.block_size
        assert row.num_tokens > 0 and end <= len(slot.token_ids), (row, len(slot.token_ids))
        assert end <= len(slot.block_table) * size, (row, len(slot.block_table))
        assert end <= self._limits.max_context, row
        assert all(0 <= block < self._kv.layout.num_blocks for block in slot.block_table), row
        before = b""
        if row.start:
            block, offset = divmod(row.start - 1, size)
            before = self._kv.records[slot.block_table[block], offset].tobytes()
        written: set[int] = set()
        for position in range(row.start, end):
            before = self._model.kv_of(before, slot.token_ids[position], position)
            index, offset = divmod(position, size)
            block = slot.block_table[index]
            self._kv.records[block, offset] = np.frombuffer(before, dtype=np.uint8)
            written.add(block)
        return written

    def _sample(self, row: Row) -> SampledToken:
        slot = self._slots[row.slot]
        end = row.start + row.num_tokens
        assert len(slot.token_ids) == end, (row, len(slot.token_ids))
        num_blocks = -(-end // self._kv.layout.block_size)
        held = self._kv.records[slot.block_table[:num_blocks]]  # [num_blocks, block_size, bytes]
        kv = held.reshape(-1, self._model.token_bytes)[:end]  # [num_tokens, token_bytes]
        output_index = end - slot.num_prompt_tokens
        token_id = self._model.next_token(kv.data, slot.params, output_index)
        slot.token_ids.append(token_id)
        if slot.params.logprobs is None:
            return SampledToken(row.slot, token_id)
        return SampledToken(
            row.slot, token_id, math.log(0.5), self._top(token_id, slot.params.logprobs)
        )

    def _top(self, token_id: int, count: int) -> tuple[tuple[int, float], ...]:
        """The drawn token at probability 1/2, its neighbours at 1/4, 1/8 and so on."""
        vocab_size = self._model.vocab_size
        return tuple(
            ((token_id + rank) % vocab_size, math.log(0.5) * (rank + 1))
            for rank in range(min(count, vocab_size))
        )
