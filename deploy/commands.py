"""The files of a run folder, and the command lines of the children that use them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..core import progress, supervised
from .child import Command
from .placement import WorkerSpec

PROGRAM = (sys.executable, "-P", "-m", "pdserve.cli")
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the processes of one deployment leave for each other in ``folder``."""

    folder: Path

    @property
    def deployment(self) -> Path:
        """The file of the deployment, every value resolved."""
        return self.folder / "deployment.json"

    @property
    def card(self) -> Path:
        return self.folder / "card.json"

    @property
    def devices(self) -> Path:
        return self.folder / "devices.json"

    @property
    def http(self) -> Path:
        """Where the router listens; there once it does."""
        return self.folder / "http.json"

    @property
    def control(self) -> str:
        """Where the router takes the workers of this host."""
        return f"ipc://{self.folder}/control.sock"

    def prepare(self) -> Command:
        return _command(
            *("prepare", "prepare", self.deployment),
            *("--card", self.card),
            *("--devices", self.devices),
        )

    def router(self) -> Command:
        return _command(ROUTER, "router", *self._common, "--run-dir", self.folder)

    def worker(self, spec: WorkerSpec) -> Command:
        return _command(
            *(spec.worker_id, "worker", *self._common),
            *("--role", spec.role.value),
            *("--id", spec.worker_id),
            *("--join", self.control),
            *("--device", spec.device),
            *("--memory-share", spec.memory_share),
            *("--threads", spec.num_threads),
            threads=spec.num_threads,
        )

    @property
    def _common(self) -> tuple[object, ...]:
        return (self.deployment, "--card", self.card)


def _command(name: object, *arguments: object, threads: int | None = None) -> Command:
    """Every child is told whose it is, to end with it."""
    env = {"PYTHONUNBUFFERED": "1", supervised.SWITCH: "1"}
    if sys.stderr.isatty():
        env[progress.SWITCH] = "1"  # somebody watches: see bars.py
    if threads is not None:  # read when torch is imported, before the worker could say it
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Command(str(name), (*PROGRAM, *map(str, arguments), "--parent", str(os.getpid())), env)
