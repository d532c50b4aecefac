"""What a medium reports: each event goes to the worker core, as the call named with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ...core.ids import Attempt, WorkerRef
from ..messages import ToReceiver, ToSender


@dataclass(frozen=True, slots=True)
class Received:
    """A peer that dialled in here says this to our *receiver*: ``Receiver.receive``.

    ``frames`` are the blocks behind a Chunk; they keep their own memory alive.
    """

    peer: WorkerRef
    message: ToReceiver
    frames: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A peer that we dialled says this to our *sender*: ``Sender.receive``.

    Two workers may send to each other, and a PeerBeat alone does not tell which end it is for.
    """

    peer: WorkerRef
    message: ToSender


@dataclass(frozen=True, slots=True)
class Sent:
    """The blocks of this SendBlocks are no longer read, sent or not: ``Sender.sent``."""

    attempt: Attempt
    first_block: int


@dataclass(frozen=True, slots=True)
class Written:
    """A Write is done; not ``ok`` where a checksum did not match: ``Receiver.written``."""

    attempt: Attempt
    first_block: int
    ok: bool


@dataclass(frozen=True, slots=True)
class SocketLost:
    """The peer can't be reached, or stopped reading: ``peer_lost`` of both ends."""

    peer: WorkerRef
    text: str


KvEvent: TypeAlias = Received | Answered | Sent | Written | SocketLost
