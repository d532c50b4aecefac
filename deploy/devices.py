"""What this host has to run workers on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ..core.files import write_whole

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Devices:
    """GPUs are counted by the child that prepares weights: it has torch, the supervisor has not."""

    num_gpus: int
    num_cores: int

    def save(self, path: Path) -> None:
        """StartupError where it can't be written."""
        write_whole(path, _ADAPTER.dump_json(self))

    @staticmethod
    def read(path: Path) -> Devices:
        return _ADAPTER.validate_json(path.read_bytes())


_ADAPTER = TypeAdapter(Devices)


def usable_cores(quota_file: Path = _CPU_QUOTA) -> int:
    """The cores this process may use: its affinity, less where a container has a quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
