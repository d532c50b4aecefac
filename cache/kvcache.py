"""The block pool and the prefix index as a phase sees them: claim, grow, store, release."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.generations import Generations
from ..core.messages import BlockCounts
from .hashing import BlockHasher
from .pool import BlockPool
from .prefix import PrefixIndex
from .sequence import Sequence


class KvCache:
    """Gives sequences their blocks. All bookkeeping: no bytes are moved here."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        salt: bytes = b"",
        prefix_cache: bool = True,
        generations: Generations | None = None,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, generations)
        self._salt = salt
        self._index = PrefixIndex(self.pool, BlockHasher(block_size, salt), prefix_cache)

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_available(self) -> int:
        return self.pool.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def use_salt(self, salt: bytes) -> None:
        """The deployment's salt, where it is another than before. No sequence is here then."""
        if salt != self._salt:
            self._salt = salt
            self._index.use_salt(salt)

    def claim(self, seq: Sequence, spare: int = 0, *, computed_here: bool = True) -> bool:
        """Gives ``seq`` the blocks of its whole text, beginning with those in the cache.

        All or nothing, and only where ``spare`` blocks stay available. What is
        ``computed_here`` leaves its last token to be computed, for the next one is drawn
        from it; a text that a peer has computed may be cached to its end. Sets the block
        table, ``num_cached_tokens`` and all that follows from it.
        """
        assert not seq.block_table and seq.num_inflight == 0
        matchable = (seq.num_tokens - computed_here) // self.block_size
        cached = self._index.match(seq, matchable)
        num_new = self.blocks_for(seq.num_tokens) - len(cached)
        revived = sum(not self.pool.is_held(block) for block in cached)
        if num_new + revived + spare > self.pool.num_available:
            return False
        self.pool.retain(cached)
        fresh = self.pool.allocate(num_new)
        assert fresh is not None
        seq.block_table = cached + fresh
        seq.num_stored_blocks = len(cached)
        seq.num_cached_tokens = len(cached) * self.block_size
        seq.num_scheduled_tokens = seq.num_computed_tokens = seq.num_cached_tokens
        return True

    def grow(self, seq: Sequence) -> bool:
        """One more block at the end of the table; False where the pool has none."""
        fresh = self.pool.allocate(1)
        if fresh is None:
            return False
        seq.block_table += fresh
        return True

    def store(self, seq: Sequence) -> None:
        """Keeps the full blocks of ``seq`` findable for later texts that begin alike."""
        self._index.store(seq)

    def release(self, seq: Sequence) -> None:
        """Takes all blocks back. No step in flight and no transfer may use them any more."""
        assert seq.num_inflight == 0
        self.pool.release(seq.block_table)
        seq.block_table = []

    def counts(self) -> BlockCounts:
        return self.pool.counts()

    def check(self, sequences: Iterable[Sequence] | None = None) -> None:
        """Asserts the pool's invariant, and that exactly these sequences hold its blocks."""
        self.pool.check(None if sequences is None else [seq.block_table for seq in sequences])
