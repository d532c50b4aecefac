"""What every deployment that is broken on purpose has: how it is asked how it is."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from footprint import Footprint, shared_files
from served import Server

WHOLE_S = 400.0  # for all to be well again; a worker loads its weights anew on a busy machine
REST_S = 300.0
_POLL_S = 0.2
_AWAY = (OSError, ValueError, http.client.HTTPException)  # the router may be, in mid-answer too


@dataclass
class Deployed(ABC):
    server: Server
    folder: Path
    shared: set[Path] = field(default_factory=set, kw_only=True)  # all of /dev/shm that was used

    @abstractmethod
    def pids(self) -> dict[str, int]:
        """The processes that run, by name, as the system knows them."""

    @abstractmethod
    def _is_whole(self) -> bool: ...

    async def whole(self) -> float:
        """Waits until every worker is there, in its role, and known to the router; when it was."""
        return await self._until("all is well again", self._is_whole, WHOLE_S)

    async def rest(self) -> None:
        """No request is in the house, and no block is held."""
        await self._until("at rest", self._is_at_rest, REST_S)

    def footprints(self) -> dict[int, Footprint]:
        pids = [self.server.process.pid, *self.pids().values()]
        self.shared |= shared_files(pids)
        return {pid: Footprint.of(pid) for pid in pids}

    def _is_at_rest(self) -> bool:
        live = self.server.get("/live")
        held = self.server.held()
        return not any(live["stages"].values()) and all(
            worker["waiting"] == worker["running"] == held[worker["id"]] == 0
            for worker in live["workers"]
        )

    async def _until(self, what: str, holds: Callable[[], bool], limit_s: float) -> float:
        end = time.monotonic() + limit_s
        while True:
            assert self.server.process.poll() is None, "the deployment has ended by itself"
            with contextlib.suppress(*_AWAY):
                if await asyncio.to_thread(holds):
                    return time.monotonic()
            assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}; {self._state()}"
            await asyncio.sleep(_POLL_S)

    def _state(self) -> Any:
        try:
            return self.server.get("/live")
        except _AWAY as error:
            return f"{error!r}, processes {self.pids()}"


def files(base: Path) -> list[Path]:
    """What is left in the place of run folders, which itself may stay."""
    return [path for path in base.rglob("*") if path.name not in ("pdserve", ".lock")]
