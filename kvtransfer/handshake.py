"""Who may exchange KV blocks with whom: a pure comparison, done by the receiving end."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from ..core.ids import Medium, WorkerRef
from ..core.messages import PROTOCOL_VERSION, PeerAddress
from ..core.plan import KvLayout, PoolExport
from .messages import Accepted, Connect, Rejected

BY_REFERENCE = (Medium.CUDA_IPC, Medium.SHM)

# tries a way to read a peer's pool; None where it works, else what is wrong with it
Prove = Callable[[PoolExport], str | None]


@dataclass(frozen=True, slots=True)
class Handshake:
    """What this worker shows to its peers, and demands of those that dial in.

    ``token`` is its own secret, which reaches its peers through the router. ``media`` are
    those that it takes part in, the fastest first, and ``exports`` how its pool is read.
    """

    ref: WorkerRef
    token: str
    fingerprint: str
    layout: KvLayout
    media: tuple[Medium, ...] = (Medium.TCP,)
    exports: tuple[PoolExport, ...] = ()

    def connect(self, peer: PeerAddress) -> Connect:
        return Connect(
            version=PROTOCOL_VERSION,
            worker_id=self.ref.worker_id,
            epoch=self.ref.epoch,
            token=peer.token,
            fingerprint=self.fingerprint,
            num_layers=self.layout.num_layers,
            num_kv_heads=self.layout.num_kv_heads,
            block_size=self.layout.block_size,
            head_dim=self.layout.head_dim,
            dtype=self.layout.dtype,
            block_bytes=self.layout.block_bytes,
            media=self.media,
            exports=self.exports,
        )

    def knows(self, connect: Connect) -> bool:
        """Whether it shows our token."""
        return hmac.compare_digest(connect.token.encode(), self.token.encode())

    def answer(self, connect: Connect, prove: Prove) -> Accepted | Rejected:
        """A wrong token is told nothing else about this worker."""
        if not self.knows(connect):
            return Rejected("the token is not the one this worker published")
        differences = [
            f"{name} is {theirs} there and {ours} here"
            for name, theirs, ours in (
                ("protocol version", connect.version, PROTOCOL_VERSION),
                ("model fingerprint", connect.fingerprint, self.fingerprint),
                ("number of layers", connect.num_layers, self.layout.num_layers),
                ("number of KV heads", connect.num_kv_heads, self.layout.num_kv_heads),
                ("block size", connect.block_size, self.layout.block_size),
                ("head dimension", connect.head_dim, self.layout.head_dim),
                ("dtype", connect.dtype, self.layout.dtype),
                ("block bytes", connect.block_bytes, self.layout.block_bytes),
            )
            if theirs != ours
        ]
        if differences:
            return Rejected(f"{self.ref} can't take KV blocks: {'; '.join(differences)}")
        return self._agree(connect, prove)

    def _agree(self, connect: Connect, prove: Prove) -> Accepted | Rejected:
        """On the first of our media that the peer has too and that turns out to work."""
        faults = []
        for medium in self.media:
            if medium not in connect.media:
                continue
            if medium not in BY_REFERENCE:
                return Accepted(self.ref.worker_id, self.ref.epoch, medium)
            for export in connect.exports:
                if export.medium is not medium:
                    continue
                fault = prove(export)
                if fault is None:
                    return Accepted(self.ref.worker_id, self.ref.epoch, medium)
                faults.append(f"{medium}: {fault}")
        ours, theirs = (", ".join(media) or "none" for media in (self.media, connect.media))
        why = "; ".join(faults) or f"media there: {theirs}; here: {ours}"
        return Rejected(f"{self.ref} has no way to take this worker's blocks: {why}"[:4096])
