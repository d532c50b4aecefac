"""What a sender (P) and a receiver (D) of KV blocks say to each other.

P connects a DEALER to D's ROUTER. Every message but ``Chunk`` is one frame. A chunk gives
blocks *by value*: their bytes follow, in frames of whole blocks or of parts of one. An offer gives
them *by reference*: D copies them out of P's pool by itself. Block indexes count within the prompt,
from 0; no message carries a pointer, and nobody names a block of the other's pool.

    P -> D   Connect, Starting, Chunk, Offer, Commit, Withdraw, PeerBeat
    D -> P   Accepted, Rejected, Grant, Ack, Complete, Cancel, PeerBeat
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import ConfigDict, Field

from ..core.codec import Codec
from ..core.ids import Medium
from ..core.messages import MAX_LIVE, Count, Epoch, Key, Name, Sentence, TokenItem
from ..core.plan import PoolExport

MAX_CHUNK_BLOCKS = 1 << 13

_STRICT = ConfigDict(extra="forbid")

Checksums = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**64)], ...], Field(max_length=MAX_CHUNK_BLOCKS)
]


@dataclass(frozen=True, slots=True)
class Connect:
    """The handshake: D compares each field with its own and says which one differs.

    ``token`` is the secret that D published through the router. ``media`` are those that P
    would send by; for those by reference, ``exports`` say where its pool is found.
    """

    __pydantic_config__ = _STRICT
    version: Count
    worker_id: Name
    epoch: Epoch
    token: Annotated[str, Field(max_length=64)]
    fingerprint: Annotated[str, Field(max_length=128)]
    num_layers: Count
    num_kv_heads: Count
    block_size: Count
    head_dim: Count
    dtype: Annotated[str, Field(max_length=32)]
    block_bytes: Count
    media: Annotated[tuple[Medium, ...], Field(max_length=8)]
    exports: Annotated[tuple[PoolExport, ...], Field(max_length=8)] = ()
    stream: Annotated[int, Field(ge=0, lt=64)] = 0  # > 0: a further socket, for chunks only


@dataclass(frozen=True, slots=True)
class Accepted:
    """``medium``: the fastest of both ends', tried."""

    __pydantic_config__ = _STRICT
    worker_id: Name
    epoch: Epoch
    medium: Medium


@dataclass(frozen=True, slots=True)
class Rejected:
    __pydantic_config__ = _STRICT
    text: Sentence


@dataclass(frozen=True, slots=True)
class Starting:
    """P has begun this prompt, holds all its blocks and waits for room. Resent until granted."""

    __pydantic_config__ = _STRICT
    key: Key
    num_tokens: Count


@dataclass(frozen=True, slots=True)
class Grant:
    """D has room, and needs the prompt's blocks from ``first_block`` on (it has those before).

    Said again for a repeated Starting.
    """

    __pydantic_config__ = _STRICT
    key: Key
    first_block: Count


@dataclass(frozen=True, slots=True)
class Chunk:
    """Blocks ``first_block ..`` of the prompt, by value: their bytes follow, in order.

    A frame holds as many whole blocks as the sender likes, up to ``FRAME_BYTES``; a block that is
    longer comes in frames of that length and the rest.

    ``checksums`` holds an xxh3-64 for each, or is empty where checksums are off.
    """

    __pydantic_config__ = _STRICT
    key: Key
    first_block: Count
    num_blocks: Annotated[int, Field(ge=1, le=MAX_CHUNK_BLOCKS)]
    checksums: Checksums = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks ``first_block ..`` of the prompt, by reference: ``blocks`` of P's own pool.

    What D has copied counts only where each still has its generation after the copy: until
    then P has not handed the block out anew. ``checksums`` as in a Chunk.
    """

    __pydantic_config__ = _STRICT
    key: Key
    first_block: Count
    blocks: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_CHUNK_BLOCKS)]
    generations: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**64)], ...], Field(max_length=MAX_CHUNK_BLOCKS)
    ]
    checksums: Checksums = ()

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class Ack:
    """D holds these blocks for good: P need not send them again."""

    __pydantic_config__ = _STRICT
    key: Key
    first_block: Count
    num_blocks: Count


@dataclass(frozen=True, slots=True)
class Commit:
    """The prompt is computed: its length and its first token. Resent until complete."""

    __pydantic_config__ = _STRICT
    key: Key
    num_tokens: Count
    token: TokenItem


@dataclass(frozen=True, slots=True)
class Complete:
    """D has all blocks and the commit: P's lease is over."""

    __pydantic_config__ = _STRICT
    key: Key


@dataclass(frozen=True, slots=True)
class Withdraw:
    """P takes the transfer back: token 0 ended the request, it was aborted, or P drops it."""

    __pydantic_config__ = _STRICT
    key: Key


@dataclass(frozen=True, slots=True)
class Cancel:
    """D will not take this transfer (unknown, over, aborted): P frees what it holds for it."""

    __pydantic_config__ = _STRICT
    key: Key
    text: Sentence


@dataclass(frozen=True, slots=True)
class PeerBeat:
    """The transfers that the speaker holds open with this peer. It renews their leases."""

    __pydantic_config__ = _STRICT
    live: Annotated[tuple[Key, ...], Field(max_length=MAX_LIVE)]


ToReceiver: TypeAlias = Connect | Starting | Chunk | Offer | Commit | Withdraw | PeerBeat
ToSender: TypeAlias = Accepted | Rejected | Grant | Ack | Complete | Cancel | PeerBeat

TO_RECEIVER: Codec[ToReceiver] = Codec(Connect, Starting, Chunk, Offer, Commit, Withdraw, PeerBeat)
TO_SENDER: Codec[ToSender] = Codec(Accepted, Rejected, Grant, Ack, Complete, Cancel, PeerBeat)
