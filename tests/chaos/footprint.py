"""What a deployment's processes take of the machine, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process."""

    rss_kib: int
    fds: int
    threads: int

    @staticmethod
    def of(pid: int) -> Footprint:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return Footprint(
            int(fields["VmRSS"].split()[0]),
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            int(fields["Threads"]),
        )


def cpu_s(pid: int) -> float:
    """Seconds of CPU that the process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def shared_files(pids: Iterable[int]) -> set[Path]:
    """The files in /dev/shm that these processes map. A file that had no name yet when it was
    mapped is not shown under its name, so they are told by their inodes."""
    mapped: set[int] = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped.update(int(line.split()[4]) for line in lines if "/dev/shm/" in line)
    found = set()
    for path in Path("/dev/shm").glob("pdserve-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino in mapped:
                found.add(path)
    return found


def processes_of(folder: Path) -> list[str]:
    """Command lines that name this folder, of processes that are not over."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line:
                found.append(line)
    return found
