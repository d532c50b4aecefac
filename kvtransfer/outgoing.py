"""What P remembers of a transfer that it sends, and of the peer that it sends it to; what leaves
for that peer next."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.generations import Generations
from ..core.ids import Attempt, Medium
from ..core.messages import Key, PeerAddress, TokenItem, TransferDone
from .effects import Released, Send, SendBlocks, SenderEffect, SendFailed
from .handshake import BY_REFERENCE
from .messages import Chunk, Commit, Offer
from .settings import TransferSettings


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

    def progressed(self, now: float, resend_s: float) -> None:
        """The peer has answered, or something new has left."""
        self.num_resends = 0
        self.resend_at = now + resend_s

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


@dataclass(slots=True, kw_only=True)
class OutgoingLink:
    """One peer: its transfers in the order they were started, and what is on the way to it."""

    address: PeerAddress
    settings: TransferSettings
    generations: Generations | None  # of the pool that blocks are offered from by reference
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

    def pump(self, now: float) -> list[SenderEffect]:
        """Sends what is offered, granted and within the window, oldest transfer first."""
        effects: list[SenderEffect] = []
        if self.medium is None:
            return effects
        window = self.settings.window_blocks(self.medium)
        most = self.settings.chunk_blocks(self.medium)
        for transfer in self.transfers.values():
            if transfer.over or not transfer.granted:
                continue
            while (ready := len(transfer.offered) - transfer.next_block) > 0:
                count = min(ready, most)
                if self.num_inflight + count > window:
                    return effects
                first = transfer.next_block
                transfer.chunks[first] = SentChunk(count)
                transfer.next_block += count
                self.num_inflight += count
                if transfer.moving_at is None:
                    transfer.moving_at = now
                effects.append(self._send_chunk(transfer, first, count))
                transfer.progressed(now, self.settings.resend_s)
            if transfer.commit_due:
                transfer.commit_sent = True
                effects.append(self._say_commit(transfer))
                transfer.progressed(now, self.settings.resend_s)
        return effects

    def say_again(self, transfer: OutgoingTransfer) -> list[SenderEffect]:
        """All that left and is unanswered."""
        effects: list[SenderEffect] = []
        for first, chunk in transfer.chunks.items():
            chunk.sending = True
            effects.append(self._send_chunk(transfer, first, chunk.num_blocks))
        if transfer.commit_sent:
            effects.append(self._say_commit(transfer))
        return effects

    def _send_chunk(self, transfer: OutgoingTransfer, first: int, count: int) -> SendBlocks:
        ends_here = first + count == transfer.num_blocks
        tail_tokens = transfer.num_tokens % self.settings.block_size if ends_here else 0
        blocks = transfer.offered[first : first + count]
        message: Chunk | Offer
        if self.medium in BY_REFERENCE:
            assert self.generations is not None, self.medium
            message = Offer(transfer.key, first, blocks, self.generations.of(blocks))
        else:
            message = Chunk(transfer.key, first, count)
        return SendBlocks(self.address, message, blocks, tail_tokens)

    def _say_commit(self, transfer: OutgoingTransfer) -> Send:
        assert transfer.token is not None
        return Send(self.address, Commit(transfer.key, transfer.num_tokens, transfer.token))
