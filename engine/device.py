"""Where an engine runs, in which number formats, and how much memory it may take.

The rules for ``auto`` stand here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.config import Dtype
from ..core.errors import ConfigError, StartupError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats of the matrices, and of everything that is computed: activations, KV cache."""

    weights: torch.dtype
    activations: torch.dtype


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Bytes of a device: all it has, and what nobody uses at the moment."""

    total: int
    free: int


def resolve_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N`` as a device that is there; StartupError where it is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise StartupError(f"device {name}: this process sees {count} usable GPUs")
    return torch.device("cuda", device.index or 0)


def resolve_precision(dtype: Dtype, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU and fp32 on a CPU.

    On a CPU the sums are fp32 in any case, and so is the KV cache; bf16 there halves the
    weights that a step must read.
    """
    if device.type == "cpu":
        if dtype is Dtype.FP16:
            raise ConfigError("model.dtype: fp16 is for GPUs; on a CPU use fp32 or bf16")
        weights = torch.bfloat16 if dtype is Dtype.BF16 else torch.float32
        return Precision(weights, torch.float32)
    chosen = {Dtype.FP32: torch.float32, Dtype.FP16: torch.float16}.get(dtype, torch.bfloat16)
    return Precision(chosen, chosen)


def dtype_name(dtype: torch.dtype) -> str:
    """As configuration and messages spell it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def memory_state(device: torch.device) -> MemoryState:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryState(total, free)
    return host_memory(_MEMINFO, _CGROUP)


def host_memory(meminfo: Path, cgroup: Path) -> MemoryState:
    """What the host has, or the container where that is less."""
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines}
    total, free = kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
    try:
        limit = int((cgroup / "memory.max").read_text())  # ValueError where it says "max"
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return MemoryState(total, free)
    return MemoryState(min(total, limit), min(free, max(0, limit - used)))
