"""The prefix index: which blocks hold the beginning of a text already."""

from __future__ import annotations

from .hashing import BlockHasher
from .pool import BlockPool
from .sequence import Sequence


class PrefixIndex:
    """Full blocks by the chained hash of their text. Switched off, it finds and keeps nothing."""

    def __init__(self, pool: BlockPool, hasher: BlockHasher, enabled: bool = True) -> None:
        self._pool = pool
        self._hasher = hasher
        self._enabled = enabled

    def use_salt(self, salt: bytes) -> None:
        """Names blocks by another salt from now on; under the old one none is found again.

        No sequence that has names of the old one may be stored or matched afterwards.
        """
        self._hasher = BlockHasher(self._hasher.block_size, salt)
        self._pool.forget_names()

    def match(self, seq: Sequence, max_blocks: int) -> list[int]:
        """The longest run of stored blocks that begins ``seq``; takes no references."""
        if not self._enabled:
            return []
        self._hasher.extend(seq.block_hashes, seq.token_ids, max_blocks)
        blocks = []
        for block_hash in seq.block_hashes[:max_blocks]:
            block = self._pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def store(self, seq: Sequence) -> None:
        """Makes the blocks that are full by now findable, once their KV is in place."""
        num_full = seq.num_computed_tokens // self._hasher.block_size
        if num_full <= seq.num_stored_blocks or not self._enabled:
            return
        self._hasher.extend(seq.block_hashes, seq.token_ids, num_full)
        for index in range(seq.num_stored_blocks, num_full):
            self._pool.label(seq.block_table[index], seq.block_hashes[index])
        seq.num_stored_blocks = num_full
