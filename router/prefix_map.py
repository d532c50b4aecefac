"""Which worker holds the beginning of a prompt: a map from block names to workers.

A block's name is a chained hash over all tokens up to its end (``cache/hashing.py``), so a
flat map of names is a radix tree of texts. It is fed by the workers' numbered events. A gap
in the numbers voids what is known of that worker until it has named all its blocks anew; a
life that is over takes its part of the map along.

Holders are a bit each in one integer, so that a look-up is one dictionary access a block,
however many workers there are. The map is bounded: where it is full, the names that were
said or looked up least recently are forgotten, and prompts that begin so count as unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ..cache.hashing import BlockHasher
from ..core.ids import WorkerRef
from ..core.messages import HASH_BYTES, CacheEvents

MAX_BLOCKS = 1 << 20  # names; about 200 bytes each
ASK_EVERY_S = 1.0  # a worker for all its names
_STRIDE = 8  # blocks that are named at once, before it is seen whether anybody holds them


@dataclass(slots=True)
class _Holder:
    bit: int
    expected: int | None = None  # the number of its next message; None until it names all
    asked_at: float | None = None
    names: set[bytes] = field(default_factory=set)


class PrefixMap:
    """``salt`` is the deployment's, the same that workers name their blocks with."""

    def __init__(self, salt: bytes, max_blocks: int = MAX_BLOCKS) -> None:
        self.salt = salt
        self._max_blocks = max_blocks
        self._hasher: BlockHasher | None = None
        self._workers: dict[WorkerRef, _Holder] = {}
        self._refs: list[WorkerRef | None] = []  # by the place of their bit
        self._holders: dict[bytes, int] = {}  # the least recently used first

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._holders)

    def num_blocks(self, worker: WorkerRef) -> int:
        """How many blocks that worker is known to hold."""
        holder = self._workers.get(worker)
        return len(holder.names) if holder is not None else 0

    def joined(self, worker: WorkerRef, block_size: int) -> None:
        """A new life of a worker: nothing is known of it."""
        if self._hasher is None or not self._workers:
            self._hasher = BlockHasher(block_size, self.salt)
        if worker in self._workers or self._hasher.block_size != block_size:
            return  # names of other blocks say nothing
        if None not in self._refs:
            self._refs.append(None)
        place = self._refs.index(None)
        self._refs[place] = worker
        self._workers[worker] = _Holder(1 << place)

    def gone(self, worker: WorkerRef) -> None:
        """That life is over."""
        holder = self._workers.pop(worker, None)
        if holder is not None:
            self._forget(holder)
            self._refs[holder.bit.bit_length() - 1] = None

    def heard(self, worker: WorkerRef, events: CacheEvents, now: float) -> bool:
        """Takes what a worker says; False where it must be asked for all its names."""
        holder = self._workers.get(worker)
        if holder is None:
            return True
        if events.reset:
            self._forget(holder)
        elif events.number != holder.expected:
            self._forget(holder)
            holder.expected = None
            if holder.asked_at is not None and now - holder.asked_at < ASK_EVERY_S:
                return True
            holder.asked_at = now
            return False
        holder.expected, holder.asked_at = events.number + 1, None
        for name in _names(events.evicted):
            if name in holder.names:
                holder.names.remove(name)
                self._drop(name, holder.bit)
        for name in _names(events.stored):
            holder.names.add(name)
            self._holders[name] = self._holders.pop(name, 0) | holder.bit
        if len(self._holders) > self._max_blocks:
            self._shrink()
        return True

    def cached_tokens(self, token_ids: Sequence[int], names: list[bytes]) -> dict[WorkerRef, int]:
        """How many tokens that begin this text each worker need not compute; nobody with none.

        The last token is always computed. ``names`` are those of the text's blocks as far as
        they are known, and grow as far as somebody holds them: they are the caller's to keep
        with the text.
        """
        if self._hasher is None:
            return {}
        size = self._hasher.block_size
        num_blocks = (len(token_ids) - 1) // size
        if not self._holders or not num_blocks:
            return {}
        found: dict[WorkerRef, int] = {}
        holders = self._holders
        held, left = 0, -1  # all workers there may be hold no block
        while left:
            if held == len(names) and held < num_blocks:
                self._hasher.extend(names, token_ids, min(held + _STRIDE, num_blocks))
            still = left & holders.get(names[held], 0) if held < num_blocks else 0
            if held and still != left:
                found |= dict.fromkeys(self._of(left & ~still), held * size)
            held, left = held + bool(still), still
        if 2 * len(holders) > self._max_blocks:  # names may have to go soon
            for name in reversed(names[:held]):
                holders[name] = holders.pop(name)
        return found

    def _of(self, bits: int) -> Iterator[WorkerRef]:
        """The workers whose bits these are."""
        while bits:
            low = bits & -bits
            ref = self._refs[low.bit_length() - 1]
            assert ref is not None
            yield ref
            bits ^= low

    def _forget(self, holder: _Holder) -> None:
        for name in holder.names:
            self._drop(name, holder.bit)
        holder.names.clear()

    def _drop(self, name: bytes, bit: int) -> None:
        left = self._holders[name] & ~bit
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]

    def _shrink(self) -> None:
        """A sixteenth at once: finding the oldest costs a walk over what was dropped before."""
        num_over = len(self._holders) - self._max_blocks
        for name in list(islice(self._holders, num_over + self._max_blocks // 16)):
            for ref in self._of(self._holders.pop(name)):
                self._workers[ref].names.remove(name)


def _names(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]
