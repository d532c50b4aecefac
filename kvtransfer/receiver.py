"""D's end of the transfers: a pure state machine over plain data.

    expected   the router placed the request here; no block is held yet
    reserving  P has begun: D's decode phase is asked for room, and P waits for it
    receiving  room found: P is granted the range that D's cache lacks; each chunk or offer
               is checked against it, written or pulled by the rim, then acknowledged
    delivered  all blocks and the commit are in: ``Runnable``, and P is told Complete
    over       withdrawn, aborted, lost, expired, damaged: as soon as no write is
               outstanding, ``ReceiveEnded`` gives the blocks back to D

A start that overtakes its placement is parked. What is over leaves a tombstone, from
which late and repeated messages are answered. A peer speaks only for its own transfers,
and what does not fit their bounds is counted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.host_pool import whole_blocks
from ..core.ids import Attempt, WorkerRef
from ..core.messages import FailureKind, Key, TokenItem
from .effects import Pull, ReceiveEnded, ReceiverEffect, Reserve, Runnable, Send, Write
from .leases import overdue
from .messages import (
    Ack,
    Cancel,
    Chunk,
    Commit,
    Complete,
    Connect,
    Grant,
    Offer,
    PeerBeat,
    Starting,
    ToReceiver,
    Withdraw,
)
from .settings import TransferSettings, beats
from .tombstones import Ending, Tombstone, Tombstones


@dataclass(slots=True)
class _Transfer:
    key: Key
    peer: WorkerRef
    num_tokens: int
    num_blocks: int
    lease_until: float | None = None  # None until P has begun: the router watches until then
    first_block: int = 0
    blocks: tuple[int, ...] | None = None  # of the whole prompt; None until there is room
    missing: set[int] = field(default_factory=set)  # prompt blocks that are not in yet
    writing: dict[int, int] = field(default_factory=dict)  # first block -> number of blocks
    num_failures: int = 0
    token: TokenItem | None = None
    outcome: ReceiveEnded | None = None

    @property
    def begun(self) -> bool:
        return self.lease_until is not None

    @property
    def over(self) -> bool:
        return self.outcome is not None


@dataclass(frozen=True, slots=True)
class _Parked:
    until: float
    starting: Starting


class Receiver:
    """All incoming transfers of one worker. Calls about transfers that are over do nothing."""

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._transfers: dict[Attempt, _Transfer] = {}
        self._parked: dict[tuple[WorkerRef, Attempt], _Parked] = {}
        self._tombstones = Tombstones(settings.max_tombstones)
        self._heard_at: dict[WorkerRef, float] = {}
        self._beat_at: float | None = None
        self.num_dropped = 0  # messages that made no sense here

    def live(self, peer: WorkerRef) -> tuple[Key, ...]:
        """What this peer has begun and is not over: its leases are ours to renew."""
        return (
            *(
                transfer.key
                for transfer in self._transfers.values()
                if transfer.peer == peer and transfer.begun and not transfer.over
            ),
            *(parked.starting.key for (ref, _), parked in self._parked.items() if ref == peer),
        )

    # what D's own core says

    def expect(
        self, attempt: Attempt, peer: WorkerRef, num_tokens: int, now: float
    ) -> list[ReceiverEffect]:
        """The router placed this request here; ``peer`` will send a prompt of ``num_tokens``."""
        assert num_tokens > 0, num_tokens
        if attempt in self._transfers:
            return []
        tombstone = self._tombstones.get((peer, attempt))
        if tombstone is not None:
            kind = None if tombstone.ending is Ending.WITHDRAWN else FailureKind.DROPPED
            return [ReceiveEnded(attempt, kind, tombstone.text)]
        transfer = _Transfer(
            Key.of(attempt), peer, num_tokens, self._settings.num_blocks(num_tokens)
        )
        self._transfers[attempt] = transfer
        parked = self._parked.pop((peer, attempt), None)
        return self._on_starting(transfer, parked.starting, now) if parked is not None else []

    def reserved(
        self, attempt: Attempt, first_block: int, blocks: tuple[int, ...], now: float
    ) -> list[ReceiverEffect]:
        """There is room. ``blocks``: D's pool blocks of the whole prompt, in order; those before
        ``first_block`` came from its own prefix cache. Where the transfer ended meanwhile,
        ``ReceiveEnded`` is said (again), so that the blocks are freed."""
        transfer = self._transfers.get(attempt)
        if transfer is None:
            return [ReceiveEnded(attempt, None, "it ended before there was room")]
        assert transfer.begun and transfer.blocks is None, attempt
        assert len(blocks) == transfer.num_blocks and 0 <= first_block <= len(blocks), attempt
        transfer.first_block = first_block
        transfer.blocks = blocks
        transfer.missing = set(range(first_block, transfer.num_blocks))
        return [Send(transfer.peer, Grant(transfer.key, first_block))]

    def abort(self, attempt: Attempt, text: str, now: float) -> list[ReceiverEffect]:
        """D's own core has no use for it any more."""
        transfer = self._transfers.get(attempt)
        if transfer is None or transfer.over:
            return []
        return self._fail(transfer, None, text, now)

    # what the rim says

    def written(
        self, attempt: Attempt, first_block: int, ok: bool, now: float
    ) -> list[ReceiverEffect]:
        """The rim is done with this ``Write`` or ``Pull``; not ``ok`` where what it wrote does
        not count: a checksum did not match, or P had taken the blocks back meanwhile."""
        transfer = self._transfers[attempt]
        count = transfer.writing.pop(first_block)
        if transfer.over:
            return self._close(transfer)
        if not ok:
            transfer.num_failures += 1
            if transfer.num_failures < self._settings.max_write_failures:
                return []  # unacknowledged, it is sent again
            text = f"blocks from {transfer.peer} came in damaged {transfer.num_failures} times"
            return self._fail(transfer, FailureKind.TRANSFER, text, now)
        transfer.missing.difference_update(range(first_block, first_block + count))
        delivered = self._deliver(transfer, now)  # Complete says more than an Ack
        return delivered or [Send(transfer.peer, Ack(transfer.key, first_block, count))]

    def peer_lost(self, peer: WorkerRef, text: str, now: float) -> list[ReceiverEffect]:
        """The peer is dead, or its connection was given up."""
        self._heard_at.pop(peer, None)
        for place in [place for place in self._parked if place[0] == peer]:
            del self._parked[place]
        return [
            effect
            for transfer in list(self._transfers.values())
            if transfer.peer == peer and not transfer.over
            for effect in self._end(transfer, FailureKind.PEER_LOST, text, now)
        ]

    def receive(
        self,
        peer: WorkerRef,
        message: ToReceiver,
        frames: Sequence[memoryview],
        now: float,
    ) -> list[ReceiverEffect]:
        """``frames``: what followed the message: a block each for a Chunk, else nothing."""
        if isinstance(message, Connect):
            return []  # the rim's affair: it answers it, and knows the peer from then on
        self._heard_at[peer] = now
        if isinstance(message, PeerBeat):
            return [effect for key in message.live for effect in self._listed(peer, key, now)]
        if frames and not isinstance(message, Chunk):
            self.num_dropped += 1
            return []
        transfer = self._transfers.get(message.key.attempt)
        if transfer is None or transfer.peer != peer:
            return self._on_stranger(peer, message, now)
        if transfer.over:
            return []  # the tombstone answers, once no write is outstanding
        match message:
            case Starting():
                return self._on_starting(transfer, message, now)
            case Withdraw():
                return self._end(transfer, None, f"{peer} withdrew it", now)
            case Chunk() | Offer() | Commit():
                if transfer.blocks is None:
                    self.num_dropped += 1  # nothing was granted
                    return []
                transfer.lease_until = now + self._settings.lease_s
                if not isinstance(message, Commit):
                    return self._on_blocks(transfer, message, frames)
                return self._on_commit(transfer, message, now)

    def tick(self, now: float) -> list[ReceiverEffect]:
        """Leases, parking, tombstones, beats. Call it several times a second."""
        effects: list[ReceiverEffect] = []
        for transfer in list(self._transfers.values()):
            if transfer.over or transfer.lease_until is None or now < transfer.lease_until:
                continue
            effects += self._expire(transfer, now)
        for place, parked in list(self._parked.items()):
            if now >= parked.until:
                del self._parked[place]
                text = "the router has not placed it on this worker"
                effects.append(Send(place[0], Cancel(parked.starting.key, text)))
        self._tombstones.expire(now)
        for peer, heard_at in list(self._heard_at.items()):
            if now - heard_at >= self._settings.tombstone_s:
                del self._heard_at[peer]
        effects += self._beat(now)
        return effects

    # inside

    def _on_starting(
        self, transfer: _Transfer, starting: Starting, now: float
    ) -> list[ReceiverEffect]:
        if starting.num_tokens != transfer.num_tokens:
            self.num_dropped += 1
            text = (
                f"{transfer.peer} begins a prompt of {starting.num_tokens} tokens, "
                f"the router speaks of {transfer.num_tokens}"
            )
            return self._fail(transfer, FailureKind.TRANSFER, text, now)
        first_time = not transfer.begun
        transfer.lease_until = now + self._settings.lease_s
        if first_time:
            return [Reserve(transfer.key.attempt, transfer.num_tokens)]
        if transfer.blocks is None:
            return []
        return [Send(transfer.peer, Grant(transfer.key, transfer.first_block))]

    def _on_blocks(
        self, transfer: _Transfer, chunk: Chunk | Offer, frames: Sequence[memoryview]
    ) -> list[ReceiverEffect]:
        first, last = chunk.first_block, chunk.first_block + chunk.num_blocks
        sound = (
            transfer.first_block <= first
            and last <= transfer.num_blocks
            and len(chunk.checksums) in (0, chunk.num_blocks)
        )
        if isinstance(chunk, Offer):
            sound = sound and len(chunk.generations) == chunk.num_blocks
        else:
            frames = self._pieces(chunk.num_blocks, frames)
            sound = (
                sound
                and tuple(frame.nbytes for frame in frames)
                == self._settings.frame_sizes * chunk.num_blocks
            )
        if not sound:
            self.num_dropped += 1
            return []
        if any(first < start + count and start < last for start, count in transfer.writing.items()):
            return []  # the rim is at it: the acknowledgement follows
        num_missing = sum(block in transfer.missing for block in range(first, last))
        if num_missing == 0:
            return [Send(transfer.peer, Ack(transfer.key, first, chunk.num_blocks))]
        if num_missing < chunk.num_blocks:
            self.num_dropped += 1  # a sender keeps to the chunks it once made
            return []
        assert transfer.blocks is not None
        transfer.writing[first] = chunk.num_blocks
        attempt, ours = transfer.key.attempt, transfer.blocks[first:last]
        if isinstance(chunk, Offer):
            theirs, generations = chunk.blocks, chunk.generations
            peer = transfer.peer
            return [Pull(attempt, peer, first, ours, theirs, generations, chunk.checksums)]
        return [Write(attempt, first, ours, tuple(frames), chunk.checksums)]

    def _pieces(self, num_blocks: int, frames: Sequence[memoryview]) -> Sequence[memoryview]:
        """Frames of several blocks, block by block; as they are where that can't be right."""
        block_bytes = self._settings.block_bytes
        if sum(frame.nbytes for frame in frames) != num_blocks * block_bytes:
            return frames
        return whole_blocks(frames, block_bytes)

    def _on_commit(self, transfer: _Transfer, commit: Commit, now: float) -> list[ReceiverEffect]:
        if commit.num_tokens != transfer.num_tokens or commit.token.key != transfer.key:
            self.num_dropped += 1
            text = f"{transfer.peer} commits another prompt than the router placed"
            return self._fail(transfer, FailureKind.TRANSFER, text, now)
        transfer.token = commit.token
        return self._deliver(transfer, now)

    def _deliver(self, transfer: _Transfer, now: float) -> list[ReceiverEffect]:
        if transfer.missing or transfer.token is None:
            return []
        assert not transfer.writing, transfer.key
        attempt = transfer.key.attempt
        del self._transfers[attempt]
        self._bury(transfer.peer, attempt, now, Ending.DELIVERED, "delivered")
        return [
            Send(transfer.peer, Complete(transfer.key)),
            Runnable(attempt, transfer.token),
        ]

    def _on_stranger(
        self,
        peer: WorkerRef,
        message: Starting | Chunk | Offer | Commit | Withdraw,
        now: float,
    ) -> list[ReceiverEffect]:
        """About a transfer that this peer does not have here: over, not placed yet, or never."""
        key = message.key
        place = (peer, key.attempt)
        tombstone = self._tombstones.get(place)
        if isinstance(message, Withdraw):
            if tombstone is None:
                self._parked.pop(place, None)
                self._bury(peer, key.attempt, now, Ending.WITHDRAWN, "withdrawn")
            return []
        if tombstone is not None:
            return [Send(peer, tombstone.reply(key))]
        if not isinstance(message, Starting) or key.attempt in self._transfers:
            return [Send(peer, Cancel(key, "unknown on this worker"))]
        if place not in self._parked:
            if len(self._parked) >= self._settings.max_parked:
                return [Send(peer, Cancel(key, "too many prompts begun before their placement"))]
            self._parked[place] = _Parked(now + self._settings.parking_s, message)
        return []

    def _listed(self, peer: WorkerRef, key: Key, now: float) -> Iterable[ReceiverEffect]:
        transfer = self._transfers.get(key.attempt)
        if transfer is not None and transfer.peer == peer:
            if transfer.begun:
                transfer.lease_until = now + self._settings.lease_s
            return
        tombstone = self._tombstones.get((peer, key.attempt))
        if tombstone is not None:
            yield Send(peer, tombstone.reply(key))

    def _expire(self, transfer: _Transfer, now: float) -> list[ReceiverEffect]:
        heard_at = self._heard_at.get(transfer.peer)
        kind, text = overdue(transfer.peer, heard_at, now, self._settings.lease_s)
        return self._fail(transfer, kind, text, now)

    def _fail(
        self, transfer: _Transfer, kind: FailureKind | None, text: str, now: float
    ) -> list[ReceiverEffect]:
        """Ends it from this side, and says so to P."""
        return [
            Send(transfer.peer, Cancel(transfer.key, text)),
            *self._end(transfer, kind, text, now),
        ]

    def _end(
        self, transfer: _Transfer, kind: FailureKind | None, text: str, now: float
    ) -> list[ReceiverEffect]:
        transfer.outcome = ReceiveEnded(transfer.key.attempt, kind, text)
        self._bury(transfer.peer, transfer.key.attempt, now, Ending.FAILED, text)
        return self._close(transfer)

    def _close(self, transfer: _Transfer) -> list[ReceiverEffect]:
        """Gives the blocks back, once nobody writes into them any more."""
        if transfer.outcome is None or transfer.writing:
            return []
        del self._transfers[transfer.key.attempt]
        return [transfer.outcome]

    def _bury(
        self, peer: WorkerRef, attempt: Attempt, now: float, ending: Ending, text: str
    ) -> None:
        until = now + self._settings.tombstone_s
        self._tombstones.lay((peer, attempt), Tombstone(until, ending, text))

    def _beat(self, now: float) -> Iterable[ReceiverEffect]:
        if self._beat_at is not None and now < self._beat_at:
            return
        self._beat_at = now + self._settings.beat_s
        live: dict[WorkerRef, list[Key]] = {}
        for transfer in self._transfers.values():
            if transfer.begun and not transfer.over:
                live.setdefault(transfer.peer, []).append(transfer.key)
        for (peer, _), parked in self._parked.items():
            live.setdefault(peer, []).append(parked.starting.key)
        for peer, keys in live.items():
            for beat in beats(keys):
                yield Send(peer, beat)
