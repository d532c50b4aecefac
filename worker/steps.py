"""The engine's slots, and the steps that are launched and not read yet."""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from ..cache.sequence import Sequence
from ..core.plan import NewSequence, Row, StepPlan
from ..prefill.phase import Chunk

# a row, whose it is, and the chunk that it computes; None for one of the running batch
PlannedRow: TypeAlias = tuple[Sequence, Row, Chunk | None]


class Steps:
    """Turns decisions into plans: rows for sequences that have a slot, slots for those without."""

    def __init__(self, num_slots: int) -> None:
        self._slots = list(range(num_slots - 1, -1, -1))
        self._launched: deque[list[PlannedRow]] = deque()
        self._rows: list[PlannedRow] = []  # of the step that is being planned
        self._new: list[NewSequence] = []

    def __len__(self) -> int:
        """Steps in flight."""
        return len(self._launched)

    @property
    def free_slots(self) -> tuple[int, ...]:
        return tuple(self._slots)

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def num_rows(self) -> int:
        """Of the step that is being planned."""
        return len(self._rows)

    def add(self, seq: Sequence, num_tokens: int = 1, chunk: Chunk | None = None) -> bool:
        """A row for the next ``num_tokens`` of ``seq``; False where it needs a slot and none is
        free: it waits for a later step."""
        table = seq.block_table
        if seq.slot is None:
            if not self._slots:
                return False
            seq.slot = self._slots.pop()
            tokens = tuple(seq.token_ids)
            fill = NewSequence(seq.slot, tokens, seq.num_prompt_tokens, seq.params, tuple(table))
            self._new.append(fill)
            seq.num_told_blocks = len(table)
        new_blocks: tuple[int, ...] = ()
        if seq.num_told_blocks < len(table):
            new_blocks = tuple(table[seq.num_told_blocks :])
            seq.num_told_blocks = len(table)
        sample = chunk is None or chunk.sample
        row = Row(seq.slot, seq.num_scheduled_tokens, num_tokens, new_blocks, sample)
        seq.num_scheduled_tokens += num_tokens
        seq.num_inflight += 1
        seq.num_sampling += sample
        self._rows.append((seq, row, chunk))
        return True

    def launch(self) -> StepPlan | None:
        """The plan of all rows added since the last one; None without any."""
        if not self._rows:
            return None
        plan = StepPlan(tuple(self._new), tuple([row for _, row, _ in self._rows]))
        self._launched.append(self._rows)
        self._rows, self._new = [], []
        return plan

    def read(self) -> list[PlannedRow]:
        """The rows of the oldest step in flight, which is done."""
        return self._launched.popleft()

    def give_slot_back(self, seq: Sequence) -> None:
        if seq.slot is not None:
            self._slots.append(seq.slot)
            seq.slot = None
