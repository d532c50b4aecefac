"""A worker process: one engine, and one life after another in front of it.

    build the engine once (weights, KV pool), measure what its steps take
    a life: a new epoch, sockets, core, I/O thread; hello, work, until
        drained or SIGTERM      said goodbye                     exit 0
        refused for good        another model                    StartupError
        declared dead           all of that life is dropped, and the next one begins

So a worker that was stopped for a while and comes back finds its requests elsewhere, and
is of use again without loading anything.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TypeAlias

from ..core.card import ModelCard
from ..core.clock import monotonic
from ..core.config import Auto, Deployment, EngineKind, Switch, parse_size
from ..core.cost import StepCost
from ..core.errors import ConfigError, OutOfMemory, StartupError
from ..core.ids import Medium, Role, WorkerRef, new_epoch
from ..core.keys import Keys, require_safe_bind
from ..core.messages import PROTOCOL_VERSION, Hello, Refused
from ..core.plan import Engine, KvPool
from ..core.shared_memory import sweep
from ..kvtransfer.handshake import BY_REFERENCE, Handshake
from ..kvtransfer.media.disturbed import DisturbedMedium, KvMedium
from ..kvtransfer.media.tcp import KvSockets
from ..kvtransfer.receiver import Receiver
from ..kvtransfer.sender import Sender
from ..kvtransfer.settings import TransferSettings
from .address import kv_endpoint
from .budget import Budget
from .core import WorkerCore
from .heap import keep_freed_memory
from .inbox import Inbox, Stop
from .io import ControlDisturbance, IoThread
from .link import LinkTiming, RouterLink
from .loop import StepLoop
from .warmup import CPU_LIMIT_S, LIMIT_S, measure

log = logging.getLogger(__name__)

_SIMULATED_BLOCKS = 4096  # where kv.memory is not a size
_UNMAP_PATIENCE_S = 5.0  # for peers to let go of what a worker that has died had shared


@dataclass(frozen=True, slots=True)
class Post:
    """Where a worker stands in its deployment: what the command line says."""

    role: Role
    worker_id: str
    join: str  # the router's control endpoint
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    memory_share: float = 1.0  # of the device's memory
    num_threads: int = 1


@dataclass(frozen=True, slots=True)
class _Wiring:
    """How this worker may be reached, and how it reaches the router."""

    kv_endpoint: str
    kv_keys: Keys | None
    join_keys: Keys | None


# the engine, what it may be asked for in each role, and how long to measure it
Built: TypeAlias = tuple[Engine, dict[Role, Budget], float]
Build: TypeAlias = Callable[[Deployment, ModelCard, Post], Built]


def run(deployment: Deployment, card: ModelCard, post: Post, build: Build | None = None) -> int:
    """Serves until drained or told to end: the exit code. ``build`` makes another engine than
    the file asks for.

    Raises StartupError where the engine can't be built or the router refuses this worker,
    ConfigError where its sockets may not be bound as the file says.
    """
    endpoint = kv_endpoint(deployment.kv_transfer.host, post.join, deployment.router.control)
    wiring = _Wiring(
        endpoint,
        require_safe_bind(endpoint, deployment.security),
        require_safe_bind(post.join, deployment.security),
    )
    stopper = _Stopper()
    keep_freed_memory()
    sweep(_UNMAP_PATIENCE_S)
    engine, budgets, limit_s = (build or _engine)(deployment, card, post)
    try:
        cost = measure(engine, budgets[post.role].within(engine.limits), monotonic, limit_s)
        while not stopper.stopped:
            refusal = _Life(deployment, card, post, wiring, engine, budgets, cost).run(stopper)
            if refusal is None:
                break
            if not refusal.rejoin:
                raise StartupError(f"the router refuses {post.worker_id}: {refusal.text}")
            log.warning("back under a new epoch: %s", refusal.text)
    finally:
        engine.close()
    return 0


class _Stopper:
    """SIGTERM and SIGINT end the worker: at once where no life is on, else by its loop."""

    def __init__(self) -> None:
        self.stopped = False
        self.inbox: Inbox | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.inbox is None:
            raise KeyboardInterrupt
        self.inbox.interrupt()


class _Life:
    """One epoch of the worker: from hello to goodbye."""

    def __init__(
        self,
        deployment: Deployment,
        card: ModelCard,
        post: Post,
        wiring: _Wiring,
        engine: Engine,
        budgets: Mapping[Role, Budget],
        cost: StepCost,
    ) -> None:
        layout = engine.kv.layout
        self._epoch = new_epoch()
        handshake = Handshake(
            WorkerRef(post.worker_id, self._epoch),
            secrets.token_hex(16),
            card.fingerprint,
            layout,
            media_of(engine.kv, deployment.kv_transfer.medium),
            engine.kv.exports,
        )
        settings = TransferSettings(
            layout.block_size,
            layout.block_bytes,
            lease_s=deployment.kv_transfer.lease_s,
            window_bytes=deployment.kv_transfer.window_bytes,
            chunk_bytes=deployment.kv_transfer.chunk_bytes,
        )
        self._core = WorkerCore(
            post.role,
            budgets,
            engine.limits,
            layout,
            Sender(settings, handshake, engine.kv.generations),
            Receiver(settings),
            salt=secrets.token_bytes(16),  # hashes are compared within one pool only
            prefix_cache=deployment.kv.prefix_cache,
            cost=cost,
        )
        kv: KvMedium = KvSockets(
            handshake,
            engine.kv,
            endpoint=wiring.kv_endpoint,
            keys=wiring.kv_keys,
            checksums=deployment.kv_transfer.checksums is not Switch.OFF,
            streams=deployment.kv_transfer.streams,
            checksum_offers=deployment.kv_transfer.checksums is Switch.ON,
        )
        faults = deployment.faults
        if faults.any:
            log.warning("messages are disturbed on purpose, as `faults` of the file says")
        if faults.kv.any:
            kv = DisturbedMedium(kv, faults, post.worker_id)
        hello = Hello(
            version=PROTOCOL_VERSION,
            role=post.role,
            pid=os.getpid(),
            address=kv.address,
            fingerprint=f"{card.fingerprint}/{layout.dtype}/{layout.block_size}",
            blocks=self._core.blocks,
            block_size=layout.block_size,
            max_context=self._core.max_context,
            max_batch=self._core.max_batch,
            chunk_tokens=self._core.chunk_tokens,
            cost=cost,
        )
        self._link = RouterLink(hello, LinkTiming(), monotonic())
        self._io = IoThread(
            self._link,
            kv,
            self._core,
            join=post.join,
            identity=str(handshake.ref).encode(),
            keys=wiring.join_keys,
            clock=monotonic,
            disturbed=ControlDisturbance(faults, post.worker_id),
        )
        self._loop = StepLoop(engine, self._io, monotonic)

    def run(self, stopper: _Stopper) -> Refused | None:
        """To the end of this life; what the router said if it would not have it."""
        self._io.start()
        stopper.inbox = self._io.inbox
        if stopper.stopped:
            self._io.inbox.put(Stop())
        try:
            self._loop.run()
        finally:
            self._io.stop()
        return self._link.refusal


def media_of(pool: KvPool, wanted: Medium | Auto) -> tuple[Medium, ...]:
    """By what this worker exchanges blocks, the fastest first; ConfigError where it can't."""
    shared = tuple(export.medium for export in pool.exports)
    if wanted == "auto":
        return (*shared, Medium.TCP)
    if wanted in BY_REFERENCE and wanted not in shared:
        raise ConfigError(
            f"kv_transfer.medium: {wanted} does not work for this worker's KV cache; "
            "allowed: auto or tcp (cuda_ipc is for GPUs, shm for CPUs)"
        )
    return (wanted,)


def _engine(deployment: Deployment, card: ModelCard, post: Post) -> Built:
    if deployment.engine is EngineKind.SIMULATED:
        from ..simulation.engine import SimulatedEngine, SimulatedModel, pace

        budgets = Budget.of_all(deployment.pools, on_gpu=False)
        widest = Budget.widest(budgets.values())
        model = SimulatedModel(card.vocab_size, card.eos_token_ids)
        medium = deployment.kv_transfer.medium
        build = partial(
            SimulatedEngine,
            model,
            num_blocks=_simulated_blocks(deployment, model.token_bytes),
            block_size=deployment.kv.block_size,
            max_slots=widest.num_slots,
            max_context=card.max_context,
            max_step_tokens=widest.max_step_tokens,
            latency=pace(deployment.simulation.step_ms, deployment.simulation.token_ms),
        )
        try:
            return build(shared=medium in ("auto", Medium.SHM)), budgets, LIMIT_S
        except OutOfMemory as error:
            if medium != "auto":
                raise
            log.warning("KV blocks will be sent, not shared: %s", error)
            return build(shared=False), budgets, LIMIT_S
    try:
        from ..engine.build import build_engine
        from ..engine.device import resolve_device
    except (ImportError, MemoryError) as error:  # its libraries are large
        raise StartupError(
            f"torch can't be loaded: {error}; is it installed, and is there memory for it?"
        ) from error

    device = resolve_device(post.device)
    on_gpu = device.type != "cpu"
    budgets = Budget.of_all(deployment.pools, on_gpu=on_gpu)
    widest = Budget.widest(budgets.values())
    engine = build_engine(
        card,
        deployment,
        device=device,
        memory_share=post.memory_share,
        num_threads=post.num_threads,
        max_slots=widest.num_slots,
        max_step_tokens=widest.max_step_tokens,
    )
    return engine, budgets, LIMIT_S if on_gpu else CPU_LIMIT_S


def _simulated_blocks(deployment: Deployment, token_bytes: int) -> int:
    memory = deployment.kv.memory
    if isinstance(memory, str) and memory != "auto":
        return max(1, parse_size(memory) // (deployment.kv.block_size * token_bytes))
    return _SIMULATED_BLOCKS
