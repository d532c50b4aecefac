"""Sequences that are over while something still touches their blocks.

A launched step writes the blocks of all its rows, and a transfer reads or writes them
from another thread. A block goes back to the pool when neither does so any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..core.ids import Attempt
from .sequence import Sequence


class RetiredSequences:
    """Calls ``release`` once for each sequence, as soon as nothing uses its blocks."""

    def __init__(self, release: Callable[[Sequence], None]) -> None:
        self._release = release
        self._members: set[Sequence] = set()
        self._lent: dict[Attempt, Sequence] = {}

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    @property
    def num_returning_blocks(self) -> int:
        """Blocks that the steps in flight will give back (fewer where others share them)."""
        lent = set(self._lent.values())
        return sum(len(seq.block_table) for seq in self._members - lent)

    def add(self, seq: Sequence) -> None:
        """``seq`` is over; only rows in flight may still use its blocks."""
        self._members.add(seq)
        self._settle(seq)

    def lend(self, seq: Sequence) -> None:
        """``seq`` is over, but its transfer is not: ``returned`` will say when it is."""
        assert seq.attempt not in self._lent
        self._lent[seq.attempt] = seq
        self._members.add(seq)

    def row_read(self, seq: Sequence) -> None:
        """A row of it has come in, and was taken off ``num_inflight``."""
        self._settle(seq)

    def returned(self, attempt: Attempt) -> bool:
        """The transfer of this attempt no longer uses its blocks; False if none was lent."""
        seq = self._lent.pop(attempt, None)
        if seq is None:
            return False
        self._settle(seq)
        return True

    def _settle(self, seq: Sequence) -> None:
        if seq.num_inflight == 0 and self._lent.get(seq.attempt) is not seq:
            self._members.remove(seq)
            self._release(seq)
