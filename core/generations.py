"""How often each block of a pool was handed out: what tells a reader that its copy counts.

A worker counts a block up whenever the block goes to a new owner, so before anything can
write over what a peer may still be reading. The peer reads the count after its copy: where
it is still what the offer named, nothing had been written when the copy was done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MASK = 2**64 - 1


class Generations:
    """A count for each block, in memory that its readers may share."""

    def __init__(self, counts: memoryview) -> None:
        """``counts[num_blocks]``, of format ``Q``; a reader's is read-only."""
        assert counts.format == "Q", counts.format
        self._counts = counts

    @staticmethod
    def private(num_blocks: int) -> Generations:
        """Of a pool that only its own process reads."""
        return Generations(memoryview(bytearray(8 * num_blocks)).cast("Q"))

    def __len__(self) -> int:
        return len(self._counts)

    def of(self, blocks: Iterable[int]) -> tuple[int, ...]:
        counts = self._counts
        return tuple([counts[block] for block in blocks])

    def bump(self, blocks: Iterable[int]) -> None:
        """These go to a new owner. Comes before any write that reuses them is launched."""
        counts = self._counts
        for block in blocks:
            counts[block] = (counts[block] + 1) & _MASK

    def are(self, blocks: Sequence[int], generations: Sequence[int]) -> bool:
        """Whether each block still has the generation that an offer named."""
        return self.of(blocks) == tuple(generations)
