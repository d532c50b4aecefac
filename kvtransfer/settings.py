"""The numbers that both ends of a transfer go by: shapes, times, bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.ids import Medium
from ..core.messages import MAX_LIVE, Key
from .handshake import BY_REFERENCE
from .messages import MAX_CHUNK_BLOCKS, PeerBeat

# of blocks by value: several whole ones that lie one behind the other, or a part of one. Each frame
# that is sent as it lies is work for Python at the sender, and ZeroMQ does not mind how long it is
FRAME_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Sizes in bytes, times in seconds; ``lease_s`` is ``kv_transfer.lease_s`` of the file.

    Beats come several to a lease, so that two lost ones end nothing. What is unanswered
    is said again after ``resend_s``, then after twice as long, up to half a lease, and
    given up after ``max_resends`` times. A tombstone must outlive whatever a peer may
    still say about a transfer that is over: it keeps on for at most a lease after its
    last sign of life, and messages may lie in queues for about as long.
    """

    block_size: int  # tokens
    block_bytes: int
    lease_s: float = 10.0
    resend_s: float = 1.0
    max_resends: int = 6
    max_write_failures: int = 3  # blocks that came in damaged, before the link is given up
    window_bytes: int = 32 << 20  # unacknowledged, to one peer: what may lie in D's queues
    chunk_bytes: int = 4 << 20  # in one message
    offer_window_bytes: int = 1 << 30  # by reference: nothing of it lies in a queue
    offer_bytes: int = 128 << 20
    max_parked: int = 1024  # prompts begun by peers that this worker was not yet told of
    max_tombstones: int = 1 << 16

    @property
    def beat_s(self) -> float:
        return min(1.0, self.lease_s / 4)

    @property
    def max_resend_s(self) -> float:
        return max(self.resend_s, self.lease_s / 2)

    @property
    def parking_s(self) -> float:
        """How long a prompt's start may be ahead of its placement."""
        return self.lease_s / 2

    @property
    def tombstone_s(self) -> float:
        return 3 * self.lease_s

    def window_blocks(self, medium: Medium) -> int:
        """How many blocks may be on their way to one peer."""
        window = self.offer_window_bytes if medium in BY_REFERENCE else self.window_bytes
        return max(1, window // self.block_bytes)

    def chunk_blocks(self, medium: Medium) -> int:
        """How many blocks one message may give."""
        size = self.offer_bytes if medium in BY_REFERENCE else self.chunk_bytes
        wanted = max(1, size // self.block_bytes)
        return min(wanted, self.window_blocks(medium), MAX_CHUNK_BLOCKS)

    @property
    def frame_sizes(self) -> tuple[int, ...]:
        """Of the pieces that one block travels in; a frame may hold several whole blocks."""
        starts = range(0, self.block_bytes, FRAME_BYTES)
        return tuple(min(FRAME_BYTES, self.block_bytes - start) for start in starts)

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def backoff_s(self, num_resends: int) -> float:
        """The wait after the ``num_resends``-th fruitless resend."""
        return min(self.resend_s * 2.0 ** min(num_resends, 16), self.max_resend_s)


def beats(keys: Sequence[Key]) -> Iterator[PeerBeat]:
    """As many beats as the bound on one message makes necessary."""
    for start in range(0, len(keys), MAX_LIVE):
        yield PeerBeat(tuple(keys[start : start + MAX_LIVE]))
