"""What a running deployment says of itself: read from its router, shown as a table."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from .fetch import Unreachable, get_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_TIMEOUT_S = 2.0
_BAR = 12  # characters
_PIPED_WIDTH = 160
_MAX_LINKS = 6
_STAGES = {
    "queue": "queued",
    "prefill_queue": "waiting for prefill",
    "prefill": "prefilling",
    "hand_over": "handing over",
    "decode_queue": "joining",
    "decode": "decoding",
}


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
    max_batch: int = 0
    silent: bool = False
    links: tuple[Link, ...] = ()
    wanted_role: str = ""  # what it is to become, or is


@dataclass(frozen=True, slots=True)
class Cluster:
    policy: str
    workers: tuple[Worker, ...]

    @property
    def ready(self) -> frozenset[str]:
        """The ids of the workers that take requests."""
        return frozenset(worker.id for worker in self.workers if worker.state == "ready")


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Recent:
    window_s: float
    requests: int
    good: int
    goodput: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Happening:
    ago_s: float
    kind: str
    worker: str
    moved: int


@dataclass(frozen=True, slots=True)
class Live:
    """What ``/live`` says; see ``router/live.py``."""

    model: str
    chat: bool
    policy: str
    not_ready: str | None
    uptime_s: float
    slo: Slo
    recent: Recent
    stages: dict[str, int]
    output_tokens: int
    workers: tuple[Worker, ...]
    events: tuple[Happening, ...]


_CLUSTER = TypeAdapter(Cluster)
_LIVE = TypeAdapter(Live)


def read_cluster(url: str) -> Cluster:
    """Raises Unreachable where no router answers. It blocks."""
    where = f"{url.rstrip('/')}/cluster"
    body = _read(where)
    try:
        return _CLUSTER.validate_python(body)
    except ValidationError:
        raise Unreachable(f"{where} is no pdserve router") from None


def read_live(url: str) -> Live:
    """Raises Unreachable where no router answers. It blocks."""
    try:
        return _LIVE.validate_python(_live(url))
    except ValidationError:
        raise Unreachable(f"{url.rstrip('/')}/live is no pdserve router") from None


def not_ready(url: str) -> str | None:
    """Why the router takes no requests, None where it does."""
    status, body = get_json(f"{url.rstrip('/')}/ready", _TIMEOUT_S)
    if status == 200:
        return None
    return str(body.get("reason", status)) if isinstance(body, dict) else str(status)


def show(url: str) -> None:
    """Once. Raises Unreachable."""
    _console().print(board(url, read_live(url)))


def show_json(url: str) -> None:
    """What ``/live`` says, as it is. Raises Unreachable."""
    read_live(url)
    print(json.dumps(_live(url), indent=2))


def watch(url: str, every_s: float) -> None:
    """Until Ctrl-C. A router that does not answer is waited for, once it has answered."""
    from rich.live import Live as Screen

    seen = board(url, read_live(url))
    with Screen(seen, console=_console(), auto_refresh=False, screen=False) as screen:
        while True:
            try:
                seen = board(url, read_live(url))
            except Unreachable as error:
                seen = _lost(str(error))
            screen.update(seen, refresh=True)
            time.sleep(every_s)


def board(url: str, live: Live) -> RenderableType:
    """Objectives, requests, a line for each worker, and what has lately become of workers."""
    from rich.console import Group
    from rich.text import Text

    ready = live.not_ready is None
    head = Text.assemble(
        (f"{url}: ", "bold"),
        ("✓ ready" if ready else f"✕ not ready: {live.not_ready}", "green" if ready else "red"),
        f"; model {live.model}; policy {live.policy}; up {_duration(live.uptime_s)}",
    )
    parts: list[RenderableType] = [head, _objectives(live), _flow(live), _workers(live)]
    links = [
        f"{worker.id} → {link.worker_id} by {link.medium}"
        for worker in live.workers
        if worker.state != "dead"
        for link in worker.links
    ]
    if links:
        more = f", and {len(links) - _MAX_LINKS} more" if len(links) > _MAX_LINKS else ""
        parts.append(Text(f"KV blocks: {', '.join(links[:_MAX_LINKS])}{more}"))
    for event in live.events[:5]:
        requests = "request" if event.moved == 1 else "requests"
        moved = f"; {event.moved} {requests} went on elsewhere" if event.moved else ""
        text = f"{_duration(event.ago_s)} ago  {event.worker} {event.kind}{moved}"
        parts.append(Text(text, style="red" if event.kind == "died" else "dim"))
    return Group(*parts)


def _objectives(live: Live) -> RenderableType:
    from rich.text import Text

    recent, slo = live.recent, live.slo
    if not recent.requests:
        return Text("no request has ended in the last minute", style="dim")
    text = Text(f"goodput {recent.goodput:.2f}/s, {recent.good} of {recent.requests} met both")
    for name, found, limit in (
        ("TTFT", recent.ttft_ms, slo.ttft_ms),
        ("TPOT", recent.tpot_ms, slo.tpot_ms),
    ):
        if not found:
            continue
        met = found["p90"] <= limit
        numbers = " ".join(f"{key} {value:.4g}" for key, value in found.items())
        text.append(f"; {name} {numbers} ms ")
        text.append(f"{'✓' if met else '✕'} {limit:g}", style="green" if met else "red")
    return text


def _flow(live: Live) -> RenderableType:
    from rich.text import Text

    there = [f"{live.stages[key]} {name}" for key, name in _STAGES.items() if live.stages.get(key)]
    return Text("requests: " + (", ".join(there) or "none"))


def _workers(live: Live) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("POOL", "WORKER", "STATE"):
        table.add_column(name, no_wrap=True)
    for name in ("BATCH", "QUEUE", "BLOCKS", "HELD", "CACHED", "FREE", "PID"):
        table.add_column(name, justify="left" if name == "BLOCKS" else "right", no_wrap=True)
    for worker in sorted(live.workers, key=lambda worker: (worker.role, worker.id)):
        blocks = worker.blocks
        state = "✕ silent" if worker.silent and worker.state != "dead" else _STATES[worker.state]
        bad = state.startswith("✕")
        table.add_row(
            worker.role,
            worker.id,
            Text(state, style="red" if bad else "green" if worker.state == "ready" else ""),
            f"{worker.running}/{worker.max_batch}",
            str(worker.waiting),
            _bar(blocks),
            str(blocks.held),
            str(blocks.cached),
            str(blocks.free),
            str(worker.pid),
            style="dim" if bad else "",
        )
    return table


_STATES = {"ready": "✓ ready", "draining": "◐ draining", "dead": "✕ dead"}


def _bar(blocks: Blocks) -> str:
    """Held in full, cached in half, free in light."""
    total = max(1, blocks.total)
    held = round(_BAR * blocks.held / total)
    cached = min(_BAR - held, round(_BAR * blocks.cached / total))
    return "█" * held + "▒" * cached + "·" * (_BAR - held - cached)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _lost(text: str) -> RenderableType:
    from rich.text import Text

    return Text(f"✕ {text}; trying again", style="red")


def _live(url: str) -> Any:
    return _read(f"{url.rstrip('/')}/live")


def _read(where: str) -> Any:
    status, body = get_json(where, _TIMEOUT_S)
    if status == 401:
        raise Unreachable(f"{where} wants an API key: put one into PDSERVE_API_KEY")
    return body


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console
