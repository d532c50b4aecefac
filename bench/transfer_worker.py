"""A worker whose engine computes nothing: what is left is the transfer of its KV blocks.

It is the real worker (its process, threads, sockets, schedulers, protocol, pool) around an
engine that only sleeps for as long as a prompt's chunk would take. The pool of a sender is
filled with noise, block by block different. Where a request asks for it (``VERIFY`` as its
seed), the token that each side draws is a digest of the prompt's blocks as they lie there:
two equal tokens are blocks that have arrived. Else the tokens are moments of the host's
monotonic clock, which both workers read: P's first is when its last chunk was computed, D's second
when the request became runnable there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from pydantic import TypeAdapter

from ..core import config, logs
from ..core.card import ModelCard
from ..core.config import Deployment, TransferSection
from ..core.host_pool import Bytes, HostKvPool
from ..core.ids import Medium, Role
from ..core.plan import (
    EngineLimits,
    KvLayout,
    KvPool,
    NewSequence,
    Row,
    SampledToken,
    StepPlan,
    StepResult,
)
from ..worker import lifecycle, process
from ..worker.budget import Budget

VERIFY = 1
VOCABULARY = 1 << 30  # microseconds: the clock's, as tokens, begin anew after 18 minutes
MAX_CONTEXT = 1 << 16
_NOISE = 16 << 20
_MEASURE_S = 0.1  # of the step times, which are none
_READ = 32  # blocks at once


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What the benchmark starts as a process of its own."""

    worker_id: str
    role: Role
    join: str
    device: str
    deployment: str  # path
    card: str  # path
    layout: KvLayout | None  # None: the real engine of the file
    chunk_tokens: int
    token_us: float  # that a prompt's token takes to compute

    def save(self, path: Path) -> None:
        path.write_bytes(_ADAPTER.dump_json(self))

    @staticmethod
    def read(path: Path) -> WorkerSpec:
        return _ADAPTER.validate_json(path.read_bytes())


_ADAPTER = TypeAdapter(WorkerSpec)


def main(path: Path) -> int:
    spec = WorkerSpec.read(path)
    logs.setup()
    post = process.Post(spec.role, spec.worker_id, spec.join, spec.device)
    deployment = config.load(Path(spec.deployment))
    card = ModelCard.read(Path(spec.card))
    if spec.layout is None:
        return process.run(deployment, card, post)
    pool = pool_of(spec.layout, spec.device, deployment.kv_transfer)
    if spec.role is Role.PREFILL:
        fill(pool)
    limits = EngineLimits(64, MAX_CONTEXT, spec.chunk_tokens + 32, VOCABULARY, ())
    engine = IdleEngine(pool, limits, spec.token_us)

    def build(*_: object) -> process.Built:
        budget = Budget(spec.chunk_tokens, 32, 32, growth_tokens=0)
        return engine, dict.fromkeys(Role, budget), _MEASURE_S

    return process.run(deployment, card, post, build)


def pool_of(layout: KvLayout, device: str, transfer: TransferSection) -> KvPool:
    """A pool that peers may read by themselves, where the medium is such."""
    if device == "cpu":
        return HostKvPool(layout, shared=transfer.medium in ("auto", Medium.SHM))
    import torch

    from ..engine.device_pool import CudaKvPool

    shared = transfer.medium in ("auto", Medium.CUDA_IPC)
    dtype = torch.bfloat16 if layout.dtype == "bf16" else torch.float32
    return CudaKvPool(layout, dtype, torch.device(device), shared=shared, transfer=transfer)


def fill(pool: KvPool) -> None:
    """Noise, and no two blocks alike."""
    noise = np.random.default_rng(3).integers(0, 255, _NOISE, dtype=np.uint8)
    size = pool.layout.block_bytes
    block: Bytes = np.resize(noise, size)
    for number in range(pool.layout.num_blocks):
        block[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        block[-8:] = block[:8]
        pool.write([number], [block.data])


class IdleEngine:
    """``core.plan.Engine`` that leaves its pool as it is."""

    def __init__(self, kv: KvPool, limits: EngineLimits, token_us: float) -> None:
        self.kv = kv
        self.limits = limits
        self._token_us = token_us
        self._slots: dict[int, NewSequence] = {}
        self._runnable = Stamp()
        lifecycle.log.setLevel(logging.DEBUG)
        lifecycle.log.addFilter(self._runnable)

    def launch(self, plan: StepPlan) -> _Step:
        self._slots.update({new.slot: new for new in plan.new})
        num_prompt_tokens = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        rows = [row for row in plan.rows if row.sample]
        return _Step(
            num_prompt_tokens * self._token_us / 1e6,
            lambda: tuple(SampledToken(row.slot, self._draw(row)) for row in rows),
        )

    def close(self) -> None:
        self.kv.close()

    def _draw(self, row: Row) -> int:
        sequence = self._slots[row.slot]
        if sequence.params.seed == VERIFY:
            num_full = sequence.num_prompt_tokens // self.kv.layout.block_size
            return digest(self.kv, sequence.block_table[:num_full])
        return now_as_token() if row.num_tokens > 1 else self._runnable.token


class Stamp(logging.Filter):
    """When the worker last said that a request is runnable. It is not printed."""

    token = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.DEBUG:
            return True
        self.token = now_as_token()
        return False


def now_as_token() -> int:
    """Microseconds of the clock that the processes of a host share."""
    return time.monotonic_ns() // 1000 % VOCABULARY


def ms_between(first: int, second: int) -> float:
    """Two such tokens, the second drawn less than 18 minutes after the first."""
    return (second - first) % VOCABULARY / 1e3


def digest(pool: KvPool, blocks: Sequence[int]) -> int:
    """Of what lies in these blocks, as a token."""
    hashed = xxhash.xxh3_64()
    for start in range(0, len(blocks), _READ):
        for block in pool.read(blocks[start : start + _READ]):
            hashed.update(block)
    return 2 + hashed.intdigest() % (VOCABULARY - 2)


class _Step:
    def __init__(self, seconds: float, draw: Callable[[], tuple[SampledToken, ...]]) -> None:
        self._seconds = seconds
        self._draw = draw

    def wait(self) -> StepResult:
        if self._seconds:
            time.sleep(self._seconds)
            self._seconds = 0.0
        return StepResult(self._draw())

    @property
    def done(self) -> bool:
        return not self._seconds


def deployment_of(folder: Path, **transfer: object) -> Deployment:
    """What the two workers of a case are told; saved beside them."""
    made = Deployment.model_validate(
        {
            "model": {"path": "none"},
            "kv": {"prefix_cache": False},
            "kv_transfer": {k: v for k, v in transfer.items() if k != "keys"},
            "security": {"keys": transfer.get("keys")},
        }
    )
    config.save(made, folder / "deployment.json")
    return made
