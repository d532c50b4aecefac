"""The decode phase: room for what comes, and the running batch.

    RESERVING -> RECEIVING -> RUNNING -> (done)
                                 |  ^
                                 v  |
                             recomputed by the prefill phase

RESERVING: placed here; once its peer has begun the prompt it queues for room. RECEIVING:
it has all blocks of its prompt and a place in the batch; the peer fills those blocks that
the cache did not have. RUNNING: one row a step, a block more each time one is full.

A place in the batch is taken from the reservation to the end. A sequence gets its blocks
only where those beside it keep room to grow: for each sequence with a place the blocks
of its next ``growth_tokens`` tokens (fewer where ``max_tokens`` is nearer) stay available.
Growth is not set aside for anybody: this is a forecast at the door, so that joining does
not mean evicting. It is waived where nobody else has a place, so that what fits the pool
gets in.

When a running sequence finds no block, prompts that are held for others are dropped; then
the youngest running sequence is preempted: it loses its blocks and is computed anew,
before any other comes in. The oldest is never preempted. It waits where it is alone:
whatever else holds blocks then makes progress without it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from enum import Enum, auto

from ..cache.kvcache import KvCache
from ..cache.retired import RetiredSequences
from ..cache.sequence import Sequence
from ..core.ids import Attempt
from .finish import FinishRules


class DecodeState(Enum):
    RESERVING = auto()
    RECEIVING = auto()
    RUNNING = auto()


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pool blocks for a whole prompt; the ``first_block`` before are cached and complete."""

    attempt: Attempt
    first_block: int
    blocks: tuple[int, ...]


class DecodePhase:
    """``max_batch`` bounds the places, ``growth_tokens`` is the forecast described above."""

    def __init__(
        self,
        cache: KvCache,
        retired: RetiredSequences,
        rules: FinishRules,
        max_batch: int,
        growth_tokens: int = 128,
    ) -> None:
        self._cache = cache
        self._retired = retired
        self._rules = rules
        self._max_batch = max_batch
        self._growth_tokens = growth_tokens
        self._placed: dict[Attempt, Sequence] = {}  # RESERVING, the prompt not yet begun
        self._queue: dict[Attempt, Sequence] = {}  # RESERVING, in order of asking
        self._receiving: dict[Attempt, Sequence] = {}
        self._running: list[Sequence] = []  # the oldest first
        self._places: dict[Attempt, Sequence] = {}

    def resize(self, max_batch: int) -> None:
        """Those that have a place keep it, though there be more of them."""
        self._max_batch = max_batch

    def __iter__(self) -> Iterator[Sequence]:
        """All that is here, in any state."""
        for states in (self._placed, self._queue, self._receiving):
            yield from states.values()
        yield from self._running

    @property
    def running(self) -> Listing[Sequence]:
        """The batch, the oldest first."""
        return self._running

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_reserving(self) -> int:
        return len(self._queue)

    @property
    def num_free_places(self) -> int:
        return self._max_batch - len(self._places)

    @property
    def idle(self) -> bool:
        """Whether nothing has a place in the batch, or asks for one."""
        return not (self._placed or self._queue or self._places)

    @property
    def frees_blocks(self) -> bool:
        """Whether sequences hold blocks here that will come back in time."""
        return bool(self._running or self._receiving)

    def state(self, attempt: Attempt) -> DecodeState | None:
        """None for what is not here, among it what the prefill phase is computing."""
        if attempt in self._placed or attempt in self._queue:
            return DecodeState.RESERVING
        if attempt in self._receiving:
            return DecodeState.RECEIVING
        if any(seq.attempt == attempt for seq in self._running):
            return DecodeState.RUNNING
        return None

    # room for what comes from a peer

    def expect(self, seq: Sequence) -> None:
        """Placed here; nothing is held until its peer has begun."""
        assert seq.attempt not in self._placed
        self._placed[seq.attempt] = seq

    def request(self, attempt: Attempt) -> None:
        """The peer has begun the prompt: it queues for room."""
        self._queue[attempt] = self._placed.pop(attempt)

    def reserve(self) -> Reservation | None:
        """Room for the first in the queue; None where there is none or nobody asks."""
        return self._reserve(next(iter(self._queue.values()))) if self._queue else None

    def reserve_lowest(self, make_room: Callable[[int, str], None]) -> Reservation | None:
        """Room for the request with the lowest id, whose turn comes first where all stand still.

        ``make_room(num_blocks, id)`` may drop prompts of higher ids.
        """
        if not self._queue or self.num_free_places <= 0:
            return None
        seq = min(self._queue.values(), key=lambda waiting: waiting.attempt.request_id)
        num_blocks = self._cache.blocks_for(seq.num_tokens) + self.headroom(seq)
        make_room(num_blocks, seq.attempt.request_id)
        return self._reserve(seq)

    def _reserve(self, seq: Sequence) -> Reservation | None:
        if self.num_free_places <= 0:
            return None
        if not self._cache.claim(seq, self.spare(seq), computed_here=False):
            return None
        del self._queue[seq.attempt]
        self._receiving[seq.attempt] = self._places[seq.attempt] = seq
        first_block = seq.num_cached_tokens // self._cache.block_size
        return Reservation(seq.attempt, first_block, tuple(seq.block_table))

    def received(self, attempt: Attempt) -> Sequence:
        """All its blocks are filled: it leaves RECEIVING, keeps its place, and may ``join``."""
        seq = self._receiving.pop(attempt)
        seq.num_scheduled_tokens = seq.num_computed_tokens = seq.num_tokens
        self._cache.store(seq)
        return seq

    # the batch

    def take_place(self, seq: Sequence) -> None:
        """A prompt of this worker's own batch has begun."""
        assert self.num_free_places > 0
        self._places[seq.attempt] = seq

    def join(self, seq: Sequence) -> None:
        """Computed or received, but for the token that was drawn last: that is its next input."""
        assert self._places[seq.attempt] is seq
        bisect.insort(self._running, seq, key=lambda running: running.arrival)

    def spare(self, seq: Sequence, *, joins: bool = True) -> int:
        """What a claim for ``seq`` must leave: the headroom, or 0 where the pool has room for
        that whatever it is (which spares the sum over the batch)."""
        most = (len(self._places) + 1) * (self._cache.blocks_for(self._growth_tokens) + 1)
        if self._cache.blocks_for(seq.num_tokens) + most <= self._cache.num_available:
            return 0
        return self.headroom(seq if joins else None)

    def headroom(self, newcomer: Sequence | None) -> int:
        """Blocks that must stay available beside those of ``newcomer``, for growth.

        ``newcomer`` is None for a prompt that will not join this batch.
        """
        others = [s for a, s in self._places.items() if newcomer is None or a != newcomer.attempt]
        if not others:
            return 0
        growth = sum(map(self._expected_growth, others))
        return growth if newcomer is None else growth + self._expected_growth(newcomer)

    def schedule(self, make_room: Callable[[], bool]) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences to run a token further, the oldest first, and fresh ones to recompute.

        Each of the former has the block that its next row writes. ``make_room`` drops a
        prompt that is held for a peer, and says whether it found one.
        """
        rows: list[Sequence] = []
        preempted: list[Sequence] = []
        for seq in tuple(self._running):
            if preempted and self._places[seq.attempt] is not seq:
                continue  # preempted a moment ago, for one before it
            num_tokens = seq.num_drawn_tokens
            if self._rules.ends_by_length(seq, num_tokens):
                continue  # its last token is in flight
            assert seq.num_scheduled_tokens == num_tokens - 1
            has_block = num_tokens <= len(seq.block_table) * self._cache.block_size
            if has_block or self._grow(seq, make_room, preempted):
                rows.append(seq)
        return rows, preempted

    def remove(self, attempt: Attempt) -> Sequence | None:
        """Takes it out in any state, place included; what becomes of its blocks is the caller's
        affair. None where the prefill phase has it."""
        place = self._places.pop(attempt, None)
        for states in (self._placed, self._queue, self._receiving):
            seq = states.pop(attempt, None)
            if seq is not None:
                return seq
        if place is None or place not in self._running:
            return None
        self._running.remove(place)
        return place

    def _grow(
        self, seq: Sequence, make_room: Callable[[], bool], preempted: list[Sequence]
    ) -> bool:
        """A block for ``seq``; False where it must sit this step out, or was preempted itself."""
        while not self._cache.grow(seq):
            if self._retired.num_returning_blocks:
                return False  # they come back with a step in flight
            if make_room():
                continue
            if self._running[-1] is self._running[0]:
                return False
            victim = self._running.pop()
            self._retired.add(victim)
            fresh = victim.fresh()
            self._places[victim.attempt] = fresh
            preempted.append(fresh)
            if victim is seq:
                return False
        return True

    def _expected_growth(self, seq: Sequence) -> int:
        num_left = min(seq.params.max_tokens - seq.num_output_tokens, self._growth_tokens)
        num_tokens = min(seq.num_tokens + num_left, self._rules.max_context) - 1
        held = len(seq.block_table) or self._cache.blocks_for(seq.num_tokens)
        return max(0, self._cache.blocks_for(num_tokens) - held)
