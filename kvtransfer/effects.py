"""What the two state machines ask of the world around them, as plain data.

``Send``, ``SendBlocks``, ``Write`` and ``Pull`` are for the I/O rim, in the order given; the
others are for the worker core. The rim answers every ``SendBlocks`` with one call of
``Sender.sent``, every ``Write`` and ``Pull`` with one of ``Receiver.written``, also where the
socket was lost in between: on that rests that nobody frees a block that is still being
read for sending, or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..core.ids import Attempt, WorkerRef
from ..core.messages import FailureKind, PeerAddress, TokenItem, TransferDone
from .messages import Chunk, Offer, ToReceiver, ToSender

# P knows where to dial; D answers whoever has dialled in under this name
Link: TypeAlias = PeerAddress | WorkerRef


@dataclass(frozen=True, slots=True)
class Send:
    """One message of one frame. It may be lost: whoever sends it again decides that."""

    peer: Link
    message: ToReceiver | ToSender


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """These blocks of P's pool: behind a Chunk their bytes; an Offer names them. The rim fills
    in the checksums.

    ``blocks[i]`` is block ``message.first_block + i`` of the prompt. Where ``tail_tokens`` is
    not 0, the last of them holds only so many tokens: the rim zeroes it past those before it
    sends, for what lay there before is nobody's business.
    """

    peer: PeerAddress
    message: Chunk | Offer
    blocks: tuple[int, ...]
    tail_tokens: int = 0

    @property
    def attempt(self) -> Attempt:
        return self.message.key.attempt


@dataclass(frozen=True, slots=True)
class Granted:
    """D has room: from now on this prompt's blocks leave as they are offered."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Released:
    """Complete or withdrawn, and no send outstanding: P frees its blocks. Said once.

    ``done`` where it is complete: what it took.
    """

    attempt: Attempt
    done: TransferDone | None = None


@dataclass(frozen=True, slots=True)
class SendFailed:
    """Over without success, and no send outstanding: P frees its blocks and tells the router.

    Of ``Released`` and ``SendFailed`` a started transfer gets exactly one.
    """

    attempt: Attempt
    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """P has begun this prompt: find room for ``num_tokens`` and growth, then call ``reserved``."""

    attempt: Attempt
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Write:
    """Check and copy frames into blocks of D's pool, equally many for each block.

    ``checksums`` holds an xxh3-64 a block, or is empty.
    """

    attempt: Attempt
    first_block: int
    blocks: tuple[int, ...]
    frames: tuple[memoryview, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """Copy blocks ``theirs`` of the peer's pool, as it offered them, into ``blocks`` of D's.

    It has come out well where the copy is complete, *and* then each of ``theirs`` still has
    its generation, and the checksums agree, if there are any.
    """

    attempt: Attempt
    peer: WorkerRef
    first_block: int
    blocks: tuple[int, ...]
    theirs: tuple[int, ...]
    generations: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Runnable:
    """All blocks are in place and the prompt is committed. ``token`` is the first of the output."""

    attempt: Attempt
    token: TokenItem


@dataclass(frozen=True, slots=True)
class ReceiveEnded:
    """Over before it was complete, and no write outstanding: D frees what it reserved.

    ``kind`` is None where P withdrew it or D's own core aborted it: nobody needs telling.
    Of ``Runnable`` and ``ReceiveEnded`` an expected transfer gets exactly one.
    """

    attempt: Attempt
    kind: FailureKind | None
    text: str


SenderEffect: TypeAlias = Send | SendBlocks | Granted | Released | SendFailed
ReceiverEffect: TypeAlias = Send | Reserve | Write | Pull | Runnable | ReceiveEnded
Effect: TypeAlias = SenderEffect | ReceiverEffect
