"""What P remembers of a transfer that it sends, and of the peer that it sends it to."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.ids import Attempt, Medium
from ..core.messages import Key, PeerAddress, TokenItem, TransferDone
from .effects import Released, SendFailed


@dataclass(slots=True)
class SentChunk:
    """Blocks that left in one message. It is forgotten once acknowledged and not being sent."""

    num_blocks: int
    sending: bool = True
    acked: bool = False


@dataclass(slots=True)
class OutgoingTransfer:
    key: Key
    num_tokens: int
    num_blocks: int
    started_at: float
    lease_until: float
    resend_at: float
    num_resends: int = 0
    first_block: int | None = None  # granted from here on
    offered: tuple[int, ...] = ()  # pool blocks, of the prompt's first block onwards
    next_block: int = 0  # the first one that has not left yet
    chunks: dict[int, SentChunk] = field(default_factory=dict)  # by first block
    token: TokenItem | None = None
    commit_sent: bool = False
    granted_at: float | None = None
    moving_at: float | None = None  # when the first block left
    computed_at: float | None = None
    outcome: Released | SendFailed | None = None

    @property
    def granted(self) -> bool:
        return self.first_block is not None

    @property
    def over(self) -> bool:
        return self.outcome is not None

    @property
    def commit_due(self) -> bool:
        everything_left = self.next_block == self.num_blocks
        return self.token is not None and everything_left and not self.commit_sent

    @property
    def sending(self) -> bool:
        return any(chunk.sending for chunk in self.chunks.values())

    def done(self, peer: str, medium: Medium, block_bytes: int, now: float) -> TransferDone:
        """What it took, now that the peer has it whole."""
        assert self.first_block is not None and self.granted_at is not None
        assert self.computed_at is not None
        return TransferDone(
            key=self.key,
            peer=peer,
            medium=medium,
            num_bytes=(self.num_blocks - self.first_block) * block_bytes,
            waited_s=self.granted_at - self.started_at,
            moving_s=now - self.moving_at if self.moving_at is not None else 0.0,
            exposed_s=now - max(self.computed_at, self.granted_at),
        )


@dataclass(slots=True)
class OutgoingLink:
    """One peer: its transfers in the order they were started, and what is on the way to it."""

    address: PeerAddress
    beat_at: float
    quiet_since: float
    heard_at: float | None = None
    connect_at: float | None = None  # when Connect was last said
    medium: Medium | None = None  # None until the peer has accepted us
    num_inflight: int = 0  # blocks, of all transfers
    transfers: dict[Attempt, OutgoingTransfer] = field(default_factory=dict)

    def live(self) -> tuple[Key, ...]:
        return tuple(transfer.key for transfer in self.transfers.values() if not transfer.over)

    def forget(self, transfer: OutgoingTransfer, first_block: int) -> None:
        """Takes a chunk out of the window."""
        self.num_inflight -= transfer.chunks.pop(first_block).num_blocks
