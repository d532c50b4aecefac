"""The engine's memory of its sequences: one slot each, updated in place.

Token ids and block tables are tensors on the device, for the step to read and to write
sampled tokens into. What the host needs to describe a step (block tables again, sampling
parameters) is kept beside them in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..core.params import SamplingParams
from ..core.plan import NewSequence, StepPlan
from .upload import Upload

Ints = npt.NDArray[np.int64]


class SlotTable:
    """``max_slots`` sequences and one more slot, ``scratch``, that padding rows point to."""

    def __init__(
        self,
        *,
        max_slots: int,
        max_context: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        upload: Upload,
        device: torch.device,
    ) -> None:
        self.scratch = max_slots
        self.max_context = max_context
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.width = max_context + 1  # a token may be drawn for the position past the last
        max_blocks = -(-self.width // block_size)
        shape = (max_slots + 1, max_blocks)
        self.token_ids = torch.zeros(max_slots + 1, self.width, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.host_tables: Ints = np.zeros(shape, np.int64)
        self.used_blocks: list[int] = [0] * (max_slots + 1)
        self.num_prompt_tokens: Ints = np.zeros(max_slots + 1, np.int64)
        self.params: list[SamplingParams | None] = [None] * (max_slots + 1)
        self._upload = upload

    def apply(self, plan: StepPlan) -> None:
        """Takes in the plan's new sequences, then the new blocks of its rows."""
        blocks: list[tuple[int, Sequence[int]]] = []
        for new in plan.new:
            self.used_blocks[new.slot] = 0
            self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
            self.params[new.slot] = new.params
            blocks.append((new.slot, new.block_table))
        blocks += [(row.slot, row.new_blocks) for row in plan.rows if row.new_blocks]
        if plan.new:
            self._write_tokens(plan.new)
        if blocks:
            self._append_blocks(blocks)

    def params_of(self, slot: int) -> SamplingParams:
        params = self.params[slot]
        assert params is not None, f"slot {slot} was never filled"
        return params

    def _write_tokens(self, sequences: Sequence[NewSequence]) -> None:
        index = _ranges((new.slot * self.width, len(new.token_ids)) for new in sequences)
        values = np.concatenate([np.array(new.token_ids, np.int32) for new in sequences])
        for new in sequences:
            assert 0 < len(new.token_ids) <= self.max_context, new.slot
        assert values.min() >= 0 and values.max() < self.vocab_size, "a token past the vocabulary"
        where, what = self._upload((index, values))
        self.token_ids.view(-1).index_copy_(0, where, what)

    def _append_blocks(self, blocks: Sequence[tuple[int, Sequence[int]]]) -> None:
        columns = self.host_tables.shape[1]
        starts: list[tuple[int, int]] = []
        for slot, added in blocks:
            used = self.used_blocks[slot]
            assert used + len(added) <= columns, f"slot {slot}: too many blocks"
            starts.append((slot * columns + used, len(added)))
            self.used_blocks[slot] = used + len(added)
        index = _ranges(starts)
        values: Ints = np.array([block for _, added in blocks for block in added], np.int64)
        if len(values):
            assert values.min() >= 0 and values.max() < self.num_blocks, "a block past the pool"
        self.host_tables.reshape(-1)[index] = values
        where, what = self._upload((index, values.astype(np.int32)))
        self.block_tables.view(-1).index_copy_(0, where, what)


def _ranges(spans: Iterable[tuple[int, int]]) -> Ints:
    """The numbers ``start .. start + length - 1`` of each span, one after the other."""
    return np.concatenate([np.arange(start, start + n, dtype=np.int64) for start, n in spans])
