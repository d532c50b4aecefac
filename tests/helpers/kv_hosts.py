"""Workers' KV layers over real sockets, all driven by one test thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import zmq
from kv_parts import token_of

from pdserve.core.config import FaultsSection
from pdserve.core.ids import Attempt, Medium, WorkerRef
from pdserve.core.keys import Keys
from pdserve.core.messages import PeerAddress
from pdserve.kvtransfer.effects import (
    Effect,
    Granted,
    Pull,
    ReceiveEnded,
    Released,
    Reserve,
    Runnable,
    Send,
    SendBlocks,
    SendFailed,
    Write,
)
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.media.disturbed import DisturbedMedium, KvMedium
from pdserve.kvtransfer.media.endpoints import SocketLimits
from pdserve.kvtransfer.media.events import Answered, KvEvent, Received, Sent, SocketLost, Written
from pdserve.kvtransfer.media.inproc import InprocNetwork
from pdserve.kvtransfer.media.tcp import KvSockets
from pdserve.kvtransfer.receiver import Receiver
from pdserve.kvtransfer.sender import Sender
from pdserve.kvtransfer.settings import TransferSettings
from pdserve.simulation.engine import SimulatedKvPool

BLOCK_SIZE = 64
BLOCK_BYTES = 64 * BLOCK_SIZE

Ending = Released | SendFailed | Runnable | ReceiveEnded


class Host:
    """One worker's pool, both ends and sockets. A prompt lies in its first blocks, in order;
    what it receives goes into the upper half of its pool, last block first."""

    def __init__(
        self,
        name: str,
        *,
        epoch: int = 1,
        keys: Keys | None = None,
        network: InprocNetwork | None = None,
        limits: SocketLimits | None = None,
        lease_s: float = 10.0,
        num_blocks: int = 256,
        fingerprint: str = "model-1",
        medium: Medium = Medium.TCP,
        checksum_offers: bool = False,
        streams: int = 1,
        token_bytes: int = 64,
        faults: FaultsSection | None = None,
    ) -> None:
        shared = medium is Medium.SHM
        self.pool = SimulatedKvPool(num_blocks, BLOCK_SIZE, token_bytes, shared=shared)
        self.ref = WorkerRef(name, epoch)
        token, layout = f"token-of-{name}", self.pool.layout
        exports = self.pool.exports
        handshake = Handshake(self.ref, token, fingerprint, layout, (medium,), exports)
        settings = TransferSettings(
            BLOCK_SIZE,
            layout.block_bytes,
            lease_s=lease_s,
            chunk_bytes=4 * layout.block_bytes,
            offer_bytes=16 * layout.block_bytes,
        )
        self.sender = Sender(settings, handshake, self.pool.generations)
        self.receiver = Receiver(settings)
        self.kv: KvMedium
        if network is not None:
            self.kv = network.open(handshake, self.pool, limits=limits)
        else:
            self.kv = KvSockets(
                handshake,
                self.pool,
                keys=keys,
                limits=limits,
                checksum_offers=checksum_offers,
                streams=streams,
            )
        if faults is not None:
            self.kv = DisturbedMedium(self.kv, faults, name)
        self.endings: dict[Attempt, list[Ending]] = {}
        self.lost: list[SocketLost] = []
        self.time_shift = 0.0
        self._closed = False

    def close(self) -> None:
        """A second time it does nothing."""
        if not self._closed:
            self._closed = True
            self.kv.close()
            self.pool.close()

    @property
    def address(self) -> PeerAddress:
        return self.kv.address

    @property
    def now(self) -> float:
        return time.monotonic() + self.time_shift

    def theirs(self, num_blocks: int) -> tuple[int, ...]:
        last = self.pool.layout.num_blocks - 1
        return tuple(range(last, last - num_blocks, -1))

    def fill(self, num_blocks: int, seed: int = 0) -> None:
        for block in range(num_blocks):
            content = bytes((seed + block * 7 + i) % 251 for i in range(64))
            content *= self.pool.layout.block_bytes // 64
            self.pool.write([block], [memoryview(content)])

    def start(self, attempt: Attempt, peer: PeerAddress, num_blocks: int) -> None:
        blocks = range(num_blocks)
        self.act(self.sender.start(attempt, peer, num_blocks * BLOCK_SIZE, self.now))
        self.act(self.sender.offer(attempt, blocks, self.now))
        self.act(self.sender.commit(attempt, token_of(attempt), self.now))

    def expect(self, attempt: Attempt, peer: WorkerRef, num_blocks: int) -> None:
        self.act(self.receiver.expect(attempt, peer, num_blocks * BLOCK_SIZE, self.now))

    def act(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send() | SendBlocks():
                    self.take(self.kv.send(effect, self.now))
                case Write() | Pull():
                    self.take(self.kv.write(effect))
                case Reserve():
                    theirs = self.theirs(-(-effect.num_tokens // BLOCK_SIZE))
                    self.act(self.receiver.reserved(effect.attempt, 0, theirs, self.now))
                case Granted():
                    pass
                case Released() | SendFailed() | Runnable() | ReceiveEnded():
                    self.endings.setdefault(effect.attempt, []).append(effect)

    def take(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            match event:
                case Received():
                    self.act(
                        self.receiver.receive(event.peer, event.message, event.frames, self.now)
                    )
                case Answered():
                    self.act(self.sender.receive(event.peer, event.message, self.now))
                case Sent():
                    self.act(self.sender.sent(event.attempt, event.first_block, self.now))
                case Written():
                    self.act(
                        self.receiver.written(event.attempt, event.first_block, event.ok, self.now)
                    )
                case SocketLost():
                    self.lost.append(event)
                    self.act(self.sender.peer_lost(event.peer, event.text, self.now))
                    self.act(self.receiver.peer_lost(event.peer, event.text, self.now))


def drive(hosts: list[Host], until: Callable[[], bool], timeout: float = 10.0) -> None:
    """Runs the hosts' loops until the condition holds; AssertionError after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not until():
        assert time.monotonic() < deadline, [host.endings for host in hosts]
        poller = zmq.Poller()
        owner = {}
        for host in hosts:
            for socket, flags in host.kv.sockets():
                poller.register(socket, flags)
                owner[socket] = host
        for socket, flags in poller.poll(20):
            if flags & zmq.POLLIN:
                owner[socket].take(owner[socket].kv.on_readable(socket, owner[socket].now))
        for host in hosts:
            host.take(host.kv.flush(host.now))
            host.act(host.sender.tick(host.now))
            host.act(host.receiver.tick(host.now))


def moved(source: Host, target: Host, num_blocks: int) -> bool:
    ours = source.pool.read(range(num_blocks))
    return ours == target.pool.read(target.theirs(num_blocks))


def readable(host: Host, patience_ms: int) -> bool:
    """Whether something comes in within that time."""
    poller = zmq.Poller()
    for socket, _ in host.kv.sockets():
        poller.register(socket, zmq.POLLIN)
    return bool(poller.poll(patience_ms))
