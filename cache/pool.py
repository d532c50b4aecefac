"""The accounts of a KV pool: which block is free, cached or held.

    free     nobody refers to it and its content means nothing
    cached   nobody refers to it, but its content is known by a hash: it can be taken up again
    held     referenced, by a sequence or by a reservation

``free + cached + held == num_blocks`` after every call. The pool owns no bytes: a block
is a number here, and its keys and values lie in the engine's tensor of that number.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from ..core.generations import Generations
from ..core.messages import BlockCounts


class BlockPool:
    """Reference counts over ``num_blocks`` blocks; evicts the least recently released first.

    Counts up the generation of each block that it hands out.
    """

    def __init__(self, num_blocks: int, generations: Generations | None = None) -> None:
        assert num_blocks >= 1
        assert generations is None or len(generations) == num_blocks
        self._generations = generations
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers go out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._changes: dict[bytes, bool] = {}  # names since ``take_changes``: there, or gone

    @property
    def num_available(self) -> int:
        """How many blocks ``allocate`` could hand out now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(self.num_blocks, free, cached, self.num_blocks - free - cached)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with one reference each, or None and nothing changed."""
        if count > self.num_available:
            return None
        num_free = min(count, len(self._free))
        blocks = self._free[len(self._free) - num_free :]
        blocks.reverse()
        del self._free[len(self._free) - num_free :]
        blocks += [self._evict() for _ in range(count - num_free)]
        references = self._references
        for block in blocks:
            references[block] = 1
        if self._generations is not None:
            self._generations.bump(blocks)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more reference to each; they must be cached or held."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]  # a KeyError here is a reference to a free block
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, in a sequence's order.

        A block's content is useless without those before it, so the last ones are the
        first to be evicted.
        """
        references, hashes = self._references, self._hashes
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"block {block} released more often than taken"
            references[block] = left
            if left == 0:
                if hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def is_held(self, block: int) -> bool:
        return self._references[block] > 0

    def find(self, block_hash: bytes) -> int | None:
        """The block whose content has this hash, cached or held."""
        return self._blocks.get(block_hash)

    def label(self, block: int, block_hash: bytes) -> bool:
        """Names the content of a held block, so that it stays findable once released.

        False where another block has that content already: this one stays anonymous and
        is free once released.
        """
        assert self._references[block] > 0, f"block {block} is not held"
        assert self._hashes[block] in (None, block_hash), f"block {block} has another content"
        if self._blocks.setdefault(block_hash, block) != block:
            return False
        if self._hashes[block] is None:
            self._hashes[block] = block_hash
            self._changes[block_hash] = True
        return True

    def names(self) -> list[bytes]:
        """Of all contents that can be found."""
        return list(self._blocks)

    def take_changes(self) -> dict[bytes, bool]:
        """The names that have come (True) or gone (False) since the last call."""
        changes, self._changes = self._changes, {}
        return changes

    def forget_names(self) -> None:
        """Nothing can be found any more: what is cached is free, what is held anonymous."""
        for block in self._blocks.values():
            self._hashes[block] = None
        self._blocks.clear()
        self._free.extend(self._cached)
        self._cached.clear()
        self._changes.clear()

    def check(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Asserts the invariant; with ``tables``, that exactly their entries are referenced."""
        held = {block for block, count in enumerate(self._references) if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert all(count >= 0 for count in self._references)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & held or cached & held), "a block in two states"
        assert len(free) + len(cached) + len(held) == self.num_blocks
        named = {block for block, name in enumerate(self._hashes) if name is not None}
        assert cached <= named and not free & named
        assert {self._hashes[block]: block for block in named} == self._blocks
        if tables is not None:
            expected = Counter(block for table in tables for block in table)
            found = {block: count for block, count in enumerate(self._references) if count}
            assert found == dict(expected), f"references {found}, in use {dict(expected)}"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        name = self._hashes[block]
        assert name is not None
        del self._blocks[name]
        self._hashes[block] = None
        self._changes[name] = False
        return block
