"""What a running deployment says of itself: read from its router, shown as a table."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from .fetch import Unreachable, get_json

_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Blocks:
    total: int
    free: int
    cached: int
    held: int


@dataclass(frozen=True, slots=True)
class Link:
    """A worker that blocks are sent to, and how."""

    worker_id: str
    medium: str


@dataclass(frozen=True, slots=True)
class Worker:
    id: str
    role: str
    state: str
    pid: int
    blocks: Blocks
    waiting: int
    running: int
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Cluster:
    policy: str
    workers: tuple[Worker, ...]

    @property
    def ready(self) -> frozenset[str]:
        """The ids of the workers that take requests."""
        return frozenset(worker.id for worker in self.workers if worker.state == "ready")


_CLUSTER = TypeAdapter(Cluster)


def read_cluster(url: str) -> Cluster:
    """Raises Unreachable where no router answers. It blocks."""
    where = f"{url.rstrip('/')}/cluster"
    _, body = get_json(where, _TIMEOUT_S)
    try:
        return _CLUSTER.validate_python(body)
    except ValidationError:
        raise Unreachable(f"{where} is no pdserve router") from None


def not_ready(url: str) -> str | None:
    """Why the router takes no requests, None where it does."""
    status, body = get_json(f"{url.rstrip('/')}/ready", _TIMEOUT_S)
    if status == 200:
        return None
    return str(body.get("reason", status)) if isinstance(body, dict) else str(status)


def cluster_table(url: str) -> str:
    """A line for each worker, pool by pool."""
    reason, cluster = not_ready(url), read_cluster(url)
    rows: list[tuple[str, ...]] = [
        ("POOL", "WORKER", "STATE", "RUNNING", "WAITING", "HELD", "CACHED", "FREE", "PID")
    ]
    for worker in sorted(cluster.workers, key=lambda worker: (worker.role, worker.id)):
        blocks = worker.blocks
        counts = (worker.running, worker.waiting, blocks.held, blocks.cached, blocks.free)
        rows.append((worker.role, worker.id, worker.state, *map(str, counts), str(worker.pid)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)  # words left, numbers right
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    state = "ready" if reason is None else f"not ready: {reason}"
    lines += [
        f"KV blocks: {worker.id} -> {link.worker_id} by {link.medium}"
        for worker in cluster.workers
        for link in worker.links
    ]
    return "\n".join([f"{url}: {state}; policy {cluster.policy}", *lines])
