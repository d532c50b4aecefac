"""A step plan as arrays: what each token of the batch reads and writes.

Rows of one new token come first and are attended to by the decode kernel, whatever phase
they are in; longer ones follow, ragged, for the prefill kernel. All of it is known on the
host before the step: no array depends on a token that is still being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.plan import Row, StepPlan
from .slots import Ints, SlotTable
from .upload import Array

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SingleRows:
    """B rows of one new token. The arrays are in the order in which a graph keeps them."""

    token_index: Ints  # [B] into the flat token buffer
    positions: Ints  # [B]
    cache_slots: Ints  # [B] block * block_size + offset; -1: padding
    slots: Ints  # [B]
    context_lens: Int32s  # [B] including the new token; 0: padding

    @staticmethod
    def none() -> SingleRows:
        empty: Ints = np.empty(0, np.int64)
        return SingleRows(empty, empty, empty, empty, np.empty(0, np.int32))

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (
            self.token_index,
            self.positions,
            self.cache_slots,
            self.slots,
            self.context_lens,
        )

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """B rows of several new tokens, T in all."""

    token_index: Ints  # [T] into the flat token buffer
    positions: Ints  # [T]
    cache_slots: Ints  # [T]
    slots: Ints  # [B]
    new_lens: tuple[int, ...]  # [B]
    context_lens: tuple[int, ...]  # [B] what was there before and the new tokens

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class SampledRows:
    """S rows that draw a token, in the plan's order."""

    slots: tuple[int, ...]
    at: Ints  # [S] each row's last token in the batch: singles first, then the chunks
    written_to: Ints  # [S] into the flat token buffer
    total_lens: Ints  # [S] tokens of the sequence before the drawn one

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class Batch:
    singles: SingleRows
    chunks: ChunkRows
    sampled: SampledRows

    @staticmethod
    def none() -> Batch:
        empty: Ints = np.empty(0, np.int64)
        return Batch(
            SingleRows.none(),
            ChunkRows(empty, empty, empty, empty, (), ()),
            SampledRows((), empty, empty, empty),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.singles) + len(self.chunks.positions)

    @property
    def all_sampled(self) -> bool:
        """Whether every token of the batch is sampled after, in order."""
        return not len(self.chunks) and len(self.sampled) == len(self.singles)


def describe(plan: StepPlan, table: SlotTable) -> Batch:
    """``table`` has taken the plan in."""
    singles = [row for row in plan.rows if row.num_tokens == 1]
    chunks = [row for row in plan.rows if row.num_tokens > 1]
    ends: dict[int, int] = {row.slot: at for at, row in enumerate(singles)}
    end = len(singles) - 1
    for row in chunks:
        end += row.num_tokens
        ends[row.slot] = end
    assert len(ends) == len(plan.rows), "a slot has two rows in one step"
    return Batch(
        _singles(singles, table),
        _chunks(chunks, table),
        _sampled([row for row in plan.rows if row.sample], ends, table),
    )


def padded(rows: SingleRows, size: int, table: SlotTable) -> SingleRows:
    """``size`` rows: those beyond the given ones read the scratch slot and write nothing."""
    more = size - len(rows)
    assert more >= 0, (size, len(rows))
    if not more:
        return rows

    def fill(array: Ints, value: int) -> Ints:
        return np.concatenate((array, np.full(more, value, np.int64)))

    return SingleRows(
        token_index=fill(rows.token_index, table.scratch * table.width),
        positions=fill(rows.positions, 0),
        cache_slots=fill(rows.cache_slots, -1),
        slots=fill(rows.slots, table.scratch),
        context_lens=np.concatenate((rows.context_lens, np.zeros(more, np.int32))),
    )


def _singles(rows: Sequence[Row], table: SlotTable) -> SingleRows:
    slots: Ints = np.array([row.slot for row in rows], np.int64)
    positions: Ints = np.array([row.start for row in rows], np.int64)
    _check(rows, table)
    return SingleRows(
        token_index=slots * table.width + positions,
        positions=positions,
        cache_slots=_cache_slots(slots, positions, table),
        slots=slots,
        context_lens=(positions + 1).astype(np.int32),
    )


def _chunks(rows: Sequence[Row], table: SlotTable) -> ChunkRows:
    slots: Ints = np.array([row.slot for row in rows], np.int64)
    starts: Ints = np.array([row.start for row in rows], np.int64)
    lengths: Ints = np.array([row.num_tokens for row in rows], np.int64)
    _check(rows, table)
    ends = np.cumsum(lengths)
    of_tokens = np.repeat(slots, lengths)  # [T]
    # Each token's place in its row, counted from the row's first position.
    positions: Ints = np.arange(len(of_tokens)) + np.repeat(starts - (ends - lengths), lengths)
    return ChunkRows(
        token_index=of_tokens * table.width + positions,
        positions=positions,
        cache_slots=_cache_slots(of_tokens, positions, table),
        slots=slots,
        new_lens=tuple(row.num_tokens for row in rows),
        context_lens=tuple(row.start + row.num_tokens for row in rows),
    )


def _sampled(rows: Sequence[Row], ends: dict[int, int], table: SlotTable) -> SampledRows:
    slots = tuple(row.slot for row in rows)
    totals: Ints = np.array([row.start + row.num_tokens for row in rows], np.int64)
    return SampledRows(
        slots=slots,
        at=np.array([ends[slot] for slot in slots], np.int64),
        written_to=np.array(slots, np.int64) * table.width + totals,
        total_lens=totals,
    )


def _cache_slots(slots: Ints, positions: Ints, table: SlotTable) -> Ints:
    blocks: Ints = table.host_tables[slots, positions // table.block_size]
    return blocks * table.block_size + positions % table.block_size


def _check(rows: Sequence[Row], table: SlotTable) -> None:
    for row in rows:
        end = row.start + row.num_tokens
        assert 0 <= row.slot < table.scratch and row.num_tokens > 0, row
        assert end <= table.used_blocks[row.slot] * table.block_size, f"{row}: no block for it"
        assert end <= table.max_context, f"{row}: past the context"


def token_arrays(batch: Batch, size: int, table: SlotTable) -> tuple[Ints, Ints, Ints]:
    """Every token's place in the token buffer, position and cache slot, padded to ``size``."""
    more = size - batch.num_tokens
    assert more >= 0, (size, batch.num_tokens)
    scratch = table.scratch * table.width

    def joined(name: str, value: int) -> Ints:
        parts = (getattr(batch.singles, name), getattr(batch.chunks, name))
        return np.concatenate((*parts, np.full(more, value, np.int64)))

    return joined("token_index", scratch), joined("positions", 0), joined("cache_slots", -1)
