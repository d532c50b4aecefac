"""Small parts that the tests of the KV layer share."""

from __future__ import annotations

from dataclasses import replace

from pdserve.core.ids import Attempt, Medium, WorkerRef
from pdserve.core.messages import Key, PeerAddress, TokenItem
from pdserve.core.plan import KvLayout, PoolExport
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.settings import TransferSettings

P = WorkerRef("prefill-0", 11)
D = WorkerRef("decode-0", 22)
LAYOUT = KvLayout(64, 1, 1, 4, 2, "uint8", 16)
SETTINGS = TransferSettings(
    block_size=4,
    block_bytes=16,
    lease_s=10.0,
    window_bytes=64,
    chunk_bytes=32,
    offer_window_bytes=128,
    offer_bytes=80,
)  # by value a window of 4 blocks, chunks of 2; by reference of 8, offers of 5
ADDRESS = PeerAddress(D.worker_id, D.epoch, "tcp://127.0.0.1:7777", "secret-of-d")


def handshake(
    ref: WorkerRef,
    token: str,
    layout: KvLayout = LAYOUT,
    media: tuple[Medium, ...] = (Medium.TCP,),
    exports: tuple[PoolExport, ...] = (),
) -> Handshake:
    return Handshake(ref, token, "model-1", layout, media, exports)


def nothing_works(export: PoolExport) -> str | None:
    """How a worker that can map no pool tries one."""
    return "no such thing here"


def attempt(name: int, number: int = 1) -> Attempt:
    return Attempt(f"{name:032x}", number)


def token_of(which: Attempt, token_id: int = 7) -> TokenItem:
    return TokenItem(Key.of(which), 0, token_id)


def address(ref: WorkerRef) -> PeerAddress:
    return replace(ADDRESS, worker_id=ref.worker_id, epoch=ref.epoch)
