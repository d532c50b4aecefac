"""Which worker runs on which device of this host, and how much of it each may take.

CPU workers share the cores and the host's memory. Workers without a device of their own
(``auto``, ``cuda``) are spread over the GPUs in runs of neighbours, so that prefill and
decode lie on different GPUs where there are several. A GPU is named by its index among
those the supervisor sees: every worker sees them all (a worker maps the pool of a peer on
another GPU), and ``CUDA_VISIBLE_DEVICES`` narrows the choice for all of them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.config import PoolsSection
from ..core.errors import ConfigError
from ..core.ids import Role
from .devices import Devices

_CPU = "cpu"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to start. ``memory_share`` is its part of the device's memory, of 1."""

    worker_id: str
    role: Role
    device: str  # cpu or cuda:N
    memory_share: float
    num_threads: int


def place(pools: PoolsSection, devices: Devices) -> tuple[WorkerSpec, ...]:
    """The workers of a deployment; ConfigError where a pool asks for a GPU that isn't there."""
    wanted = list(_wanted(pools, devices.num_gpus))
    pinned = {device for _, _, device in wanted if device.startswith("cuda:")}
    every = [f"cuda:{index}" for index in range(devices.num_gpus)]
    # Workers that may go anywhere keep off the GPUs that others were given.
    open_gpus = [gpu for gpu in every if gpu not in pinned] or every
    floating = [worker_id for worker_id, _, device in wanted if device == "cuda"]
    used = open_gpus[: len(floating)]
    spread = {
        worker_id: used[index * len(used) // len(floating)]
        for index, worker_id in enumerate(floating)
    }
    placed = [spread.get(worker_id, device) for worker_id, _, device in wanted]
    sharing = Counter(placed)
    threads = max(1, devices.num_cores // max(1, sharing[_CPU] or len(wanted)))
    return tuple(
        WorkerSpec(worker_id, role, device, 1.0 / sharing[device], threads)
        for (worker_id, role, _), device in zip(wanted, placed, strict=True)
    )


def _wanted(pools: PoolsSection, num_gpus: int) -> Iterator[tuple[str, Role, str]]:
    """Each worker with its role and cpu, cuda (any) or cuda:N."""
    for role in Role:
        pool = getattr(pools, role.value)
        device = pool.device
        if device == "auto":
            device = "cuda" if num_gpus else _CPU
        _check(f"pools.{role}.device", device, num_gpus, wanted=pool.workers > 0)
        for index in range(pool.workers):
            yield f"{role}-{index}", role, device


def _check(key: str, device: str, num_gpus: int, *, wanted: bool) -> None:
    if not wanted or device == _CPU:
        return
    number = int(device.partition(":")[2] or 0)
    if number >= num_gpus:
        there = f"cuda:0 to cuda:{num_gpus - 1}" if num_gpus > 1 else "cuda:0"
        allowed = f"auto, cpu, or {there}" if num_gpus else "auto or cpu (no GPU is usable here)"
        raise ConfigError(f"{key}: found '{device}'; allowed: {allowed}")
