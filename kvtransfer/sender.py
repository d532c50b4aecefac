"""P's end of the transfers: a pure state machine over plain data.

A transfer's life here, told by what is known rather than by a state field:

    start    Connect (where the peer is not known to listen), Starting; said again until
    granted  D has room: blocks leave as they are offered, within the link's window
    sent     the rim no longer reads the blocks; unacknowledged they are sent again. Where D
             reads our pool itself, they are offered by number and generation instead
    commit   said once everything has left, and again until
    over     Complete, withdrawn, cancelled, lost or expired: as soon as no send is
             outstanding, ``Released`` or ``SendFailed`` gives the blocks back to P

Whatever a peer says may be late, doubled, lost or wrong; it can end its own transfers
early or have bytes sent twice, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.generations import Generations
from ..core.ids import Attempt, WorkerRef
from ..core.messages import MAX_LINKS, FailureKind, Key, PeerAddress, PeerLink, TokenItem
from .effects import Granted, Released, Send, SenderEffect, SendFailed
from .handshake import Handshake
from .leases import overdue
from .messages import (
    Accepted,
    Ack,
    Cancel,
    Complete,
    Grant,
    PeerBeat,
    Rejected,
    Starting,
    ToSender,
    Withdraw,
)
from .outgoing import OutgoingLink, OutgoingTransfer
from .settings import TransferSettings, beats


class Sender:
    """All outgoing transfers of one worker. Calls about transfers that are over do nothing.

    ``generations`` are of its own pool: what may be read by reference needs them.
    """

    def __init__(
        self,
        settings: TransferSettings,
        handshake: Handshake,
        generations: Generations | None = None,
    ) -> None:
        self.generations = generations
        self._settings = settings
        self._handshake = handshake
        self._links: dict[WorkerRef, OutgoingLink] = {}
        self._refs: dict[Attempt, WorkerRef] = {}
        self.num_dropped = 0  # messages that made no sense here

    def live(self, peer: WorkerRef) -> tuple[Key, ...]:
        """The transfers to this peer that are not over."""
        link = self._links.get(peer)
        return link.live() if link is not None else ()

    def links(self) -> tuple[PeerLink, ...]:
        """The peers that take, or took a moment ago, what this worker sends."""
        return tuple(
            PeerLink(link.address.worker_id, link.medium)
            for link in self._links.values()
            if link.medium is not None
        )[:MAX_LINKS]

    def granted(self, attempt: Attempt) -> bool:
        found = self._find(attempt)
        return found is not None and found[1].granted

    # what P's own core says

    def start(
        self, attempt: Attempt, peer: PeerAddress, num_tokens: int, now: float
    ) -> list[SenderEffect]:
        """P has left its queue for this prompt of ``num_tokens`` and holds all its blocks."""
        assert num_tokens > 0, num_tokens
        if attempt in self._refs:
            return []
        link = self._links.get(peer.ref)
        if link is None:
            link = OutgoingLink(
                address=peer,
                settings=self._settings,
                generations=self.generations,
                beat_at=now + self._settings.beat_s,
                quiet_since=now,
            )
            self._links[peer.ref] = link
        transfer = OutgoingTransfer(
            key=Key.of(attempt),
            num_tokens=num_tokens,
            num_blocks=self._settings.num_blocks(num_tokens),
            started_at=now,
            lease_until=now + self._settings.lease_s,
            resend_at=now + self._settings.resend_s,
        )
        self._refs[attempt] = peer.ref
        link.transfers[attempt] = transfer
        return [*self._connect(link, now), Send(link.address, Starting(transfer.key, num_tokens))]

    def offer(self, attempt: Attempt, blocks: Sequence[int], now: float) -> list[SenderEffect]:
        """``blocks``: P's pool blocks of all prompt blocks complete so far, in prompt order.

        Until they leave they may become fewer, or others: P has dropped or recomputed them.
        """
        found = self._find(attempt)
        if found is None:
            return []
        link, transfer = found
        assert len(blocks) <= transfer.num_blocks, (attempt, len(blocks))
        left = slice(transfer.first_block or 0, transfer.next_block)
        assert tuple(blocks[left]) == transfer.offered[left], f"{attempt}: blocks that left"
        transfer.offered = tuple(blocks)
        return link.pump(now)

    def commit(self, attempt: Attempt, token: TokenItem, now: float) -> list[SenderEffect]:
        """The prompt is computed and this is its first token."""
        found = self._find(attempt)
        if found is None:
            return []
        link, transfer = found
        transfer.token = token
        transfer.computed_at = now
        return link.pump(now)

    def withdraw(self, attempt: Attempt, now: float) -> list[SenderEffect]:
        """P takes it back: token 0 was the last, or the request was aborted, or P drops it."""
        found = self._find(attempt)
        if found is None:
            return []
        link, transfer = found
        return [
            Send(link.address, Withdraw(transfer.key)),
            *self._end(link, transfer, Released(attempt)),
            *link.pump(now),
        ]

    # what the rim says

    def sent(self, attempt: Attempt, first_block: int, now: float) -> list[SenderEffect]:
        """The rim no longer reads the blocks of this SendBlocks, whether they left or not."""
        link = self._links[self._refs[attempt]]
        transfer = link.transfers[attempt]
        chunk = transfer.chunks[first_block]
        assert chunk.sending, (attempt, first_block)
        chunk.sending = False
        if transfer.over or chunk.acked:
            link.forget(transfer, first_block)
        transfer.resend_at = max(
            transfer.resend_at, now + self._settings.backoff_s(transfer.num_resends)
        )
        return [*self._close(link, transfer), *link.pump(now)]

    def peer_lost(self, peer: WorkerRef, text: str, now: float) -> list[SenderEffect]:
        """The peer is dead, or its socket was given up. Each send still ends with ``sent``."""
        return self._end_all(peer, FailureKind.PEER_LOST, text, now)

    def receive(self, peer: WorkerRef, message: ToSender, now: float) -> list[SenderEffect]:
        link = self._links.get(peer)
        if link is None:
            return []
        link.heard_at = now
        match message:
            case Accepted():
                other = WorkerRef(message.worker_id, message.epoch)
                if other == peer:
                    return self._on_accepted(link, message, now)
                text = f"{other} answers at {link.address.endpoint}, where {peer} was expected"
                return self._end_all(peer, FailureKind.PEER_LOST, text, now)
            case Rejected(text=text):
                return self._end_all(peer, FailureKind.TRANSFER, f"{peer} refused: {text}", now)
            case PeerBeat(live=live):
                return [effect for key in live for effect in self._listed(link, key, now)]
            case Grant() | Ack() | Complete() | Cancel():
                transfer = link.transfers.get(message.key.attempt)
                if transfer is None or transfer.over:
                    # its Withdraw was lost, or is on its way
                    lost = isinstance(message, Grant)
                    return [Send(link.address, Withdraw(message.key))] if lost else []
                transfer.lease_until = now + self._settings.lease_s
                match message:
                    case Grant():
                        return self._on_grant(link, transfer, message, now)
                    case Ack():
                        return self._on_ack(link, transfer, message, now)
                    case Complete():
                        return self._on_complete(link, transfer, now)
                    case Cancel(text=text):
                        outcome = SendFailed(
                            message.key.attempt, FailureKind.DROPPED, f"{peer} cancelled: {text}"
                        )
                        return [*self._end(link, transfer, outcome), *link.pump(now)]

    def tick(self, now: float) -> list[SenderEffect]:
        """Leases, resends, beats. Call it several times a second."""
        effects: list[SenderEffect] = []
        for link in list(self._links.values()):
            effects += self._beat(link, now)  # first, for a Connect in it lets the rest in
            for transfer in list(link.transfers.values()):
                if transfer.over:
                    continue
                if now >= transfer.lease_until:
                    effects += self._expire(link, transfer, now)
                elif now >= transfer.resend_at:
                    effects += self._resend(link, transfer, now)
            effects += link.pump(now)
            if link.transfers:
                link.quiet_since = now
            elif now - link.quiet_since >= self._settings.lease_s:
                del self._links[link.address.ref]
        return effects

    # inside

    def _find(self, attempt: Attempt) -> tuple[OutgoingLink, OutgoingTransfer] | None:
        ref = self._refs.get(attempt)
        if ref is None:
            return None
        link = self._links[ref]
        transfer = link.transfers[attempt]
        return None if transfer.over else (link, transfer)

    def _connect(self, link: OutgoingLink, now: float) -> Iterable[SenderEffect]:
        """Connect, where the peer may not know us (any more): it has been silent, or is new.

        Said again costs nothing; after a broken connection nothing else would be heard.
        """
        silence = 2 * self._settings.beat_s
        if link.medium and link.heard_at is not None and now - link.heard_at <= silence:
            return
        if link.connect_at is not None and now - link.connect_at < self._settings.beat_s:
            return
        link.connect_at = now
        yield Send(link.address, self._handshake.connect(link.address))

    def _on_accepted(
        self, link: OutgoingLink, accepted: Accepted, now: float
    ) -> list[SenderEffect]:
        if accepted.medium not in self._handshake.media:
            self.num_dropped += 1
            return []
        link.medium = accepted.medium
        return link.pump(now)

    def _on_grant(
        self, link: OutgoingLink, transfer: OutgoingTransfer, grant: Grant, now: float
    ) -> list[SenderEffect]:
        if transfer.first_block is not None:
            if transfer.first_block != grant.first_block:
                self.num_dropped += 1
            return []
        if grant.first_block > transfer.num_blocks:
            self.num_dropped += 1
            text = (
                f"{link.address.ref} granted from block {grant.first_block} on, "
                f"of {transfer.num_blocks}"
            )
            return self._give_up(link, transfer, FailureKind.TRANSFER, text, now)
        transfer.first_block = transfer.next_block = grant.first_block
        transfer.granted_at = now
        transfer.progressed(now, self._settings.resend_s)
        return [Granted(transfer.key.attempt), *link.pump(now)]

    def _on_ack(
        self, link: OutgoingLink, transfer: OutgoingTransfer, ack: Ack, now: float
    ) -> list[SenderEffect]:
        chunk = transfer.chunks.get(ack.first_block)
        if chunk is None:
            return []  # said twice
        if chunk.num_blocks != ack.num_blocks:
            self.num_dropped += 1
            return []
        chunk.acked = True
        transfer.progressed(now, self._settings.resend_s)
        if not chunk.sending:
            link.forget(transfer, ack.first_block)
        return link.pump(now)

    def _on_complete(
        self, link: OutgoingLink, transfer: OutgoingTransfer, now: float
    ) -> list[SenderEffect]:
        if not transfer.commit_sent:
            self.num_dropped += 1  # it can't know that
            return []
        assert link.medium is not None
        worker_id, block_bytes = link.address.worker_id, self._settings.block_bytes
        done = transfer.done(worker_id, link.medium, block_bytes, now)
        outcome = Released(transfer.key.attempt, done)
        return [*self._end(link, transfer, outcome), *link.pump(now)]

    def _listed(self, link: OutgoingLink, key: Key, now: float) -> list[SenderEffect]:
        transfer = link.transfers.get(key.attempt)
        if transfer is None or transfer.over:
            return [Send(link.address, Withdraw(key))]
        transfer.lease_until = now + self._settings.lease_s
        return []

    def _resend(
        self, link: OutgoingLink, transfer: OutgoingTransfer, now: float
    ) -> list[SenderEffect]:
        """Everything unanswered, once more; too often without any progress, and it is over."""
        if not transfer.granted:
            transfer.resend_at = now + self._settings.resend_s
            return [Send(link.address, Starting(transfer.key, transfer.num_tokens))]
        if transfer.sending or not (transfer.chunks or transfer.commit_sent):
            transfer.resend_at = now + self._settings.backoff_s(transfer.num_resends)
            return []  # the turn is with our own rim, or with P
        if transfer.num_resends >= self._settings.max_resends:
            text = (
                f"{link.address.ref} acknowledged nothing "
                f"after {transfer.num_resends} resends of the same blocks"
            )
            return self._give_up(link, transfer, FailureKind.TRANSFER, text, now)
        transfer.num_resends += 1
        transfer.resend_at = now + self._settings.backoff_s(transfer.num_resends)
        return link.say_again(transfer)

    def _expire(
        self, link: OutgoingLink, transfer: OutgoingTransfer, now: float
    ) -> list[SenderEffect]:
        lease_s, peer = self._settings.lease_s, link.address.ref
        if link.heard_at is None:
            kind = FailureKind.TRANSFER
            text = (
                f"{peer} did not answer at {link.address.endpoint} within {lease_s:g} s: "
                f"unreachable, or it refuses this worker's key or token"
            )
        else:
            kind, text = overdue(peer, link.heard_at, now, lease_s)
        return self._give_up(link, transfer, kind, text, now)

    def _give_up(
        self,
        link: OutgoingLink,
        transfer: OutgoingTransfer,
        kind: FailureKind,
        text: str,
        now: float,
    ) -> list[SenderEffect]:
        outcome = SendFailed(transfer.key.attempt, kind, text)
        return [
            Send(link.address, Withdraw(transfer.key)),
            *self._end(link, transfer, outcome),
            *link.pump(now),
        ]

    def _end_all(
        self, peer: WorkerRef, kind: FailureKind, text: str, now: float
    ) -> list[SenderEffect]:
        link = self._links.get(peer)
        if link is None:
            return []
        # whoever starts next must connect anew
        link.heard_at = link.connect_at = link.medium = None
        link.quiet_since = now
        return [
            effect
            for attempt, transfer in list(link.transfers.items())
            if not transfer.over
            for effect in self._end(link, transfer, SendFailed(attempt, kind, text))
        ]

    def _end(
        self, link: OutgoingLink, transfer: OutgoingTransfer, outcome: Released | SendFailed
    ) -> list[SenderEffect]:
        transfer.outcome = outcome
        for first, chunk in list(transfer.chunks.items()):
            if not chunk.sending:
                link.forget(transfer, first)
        return self._close(link, transfer)

    def _close(self, link: OutgoingLink, transfer: OutgoingTransfer) -> list[SenderEffect]:
        """Gives the blocks back, once nobody reads them any more."""
        if transfer.outcome is None or transfer.chunks:
            return []
        attempt = transfer.key.attempt
        del link.transfers[attempt]
        del self._refs[attempt]
        return [transfer.outcome]

    def _beat(self, link: OutgoingLink, now: float) -> Iterable[SenderEffect]:
        if now < link.beat_at:
            return
        link.beat_at = now + self._settings.beat_s
        if live := link.live():
            yield from self._connect(link, now)
            for beat in beats(live):
                yield Send(link.address, beat)
