"""A folder of safetensors files: what tensors there are and where, checked before any is read.

Reads headers only: eight bytes of length, then JSON. A file that ends before its last
tensor does is found here, and not by a fault in the middle of loading. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..core.errors import WeightsError
from .shape import ModelShape

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # bytes; the format's own bound
_SAMPLE = 16 << 10  # bytes
_MAX_SAMPLES = 64  # of one tensor


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: ``start`` and ``end`` are byte offsets in it."""

    file: Path
    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a folder by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]

    def fingerprint(self, shape: ModelShape) -> str:
        """Equal where shape and weights are, whatever files the tensors are split into.

        Of a tensor up to 64 evenly spread pieces of 16 KiB count, so that the weights of a
        large model need not all be read twice.
        """
        digest = xxhash.xxh3_128(repr(shape).encode())
        for name, entry in sorted(self.tensors.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            size = entry.end - entry.start
            try:
                with entry.file.open("rb") as file:
                    for offset in sample_offsets(size):
                        file.seek(entry.start + offset)
                        digest.update(file.read(min(_SAMPLE, size - offset)))
            except OSError as error:
                raise _unreadable(entry.file, error) from None
        return digest.hexdigest()


def sample_offsets(size: int) -> list[int]:
    """Where to look at ``size`` bytes: everywhere, or evenly spread from end to end."""
    if size <= _SAMPLE * _MAX_SAMPLES:
        return list(range(0, size, _SAMPLE))
    return [(size - _SAMPLE) * index // (_MAX_SAMPLES - 1) for index in range(_MAX_SAMPLES)]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads all headers; WeightsError with a sentence for anything missing or damaged."""
    tensors: dict[str, TensorEntry] = {}
    for file in _files(folder):
        for name, entry in _read_header(file).items():
            if name in tensors:
                raise WeightsError(f"{file}: {name} is in {tensors[name].file.name} as well")
            tensors[name] = entry
    return Checkpoint(folder, tensors)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except OSError as error:
            raise _unreadable(index, error) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{index}: damaged: not an index of safetensors files") from None
        files = [folder / str(name) for name in sorted(names)]
        for file in files:
            if file.parent != folder or not file.exists():
                raise WeightsError(f"{index}: names {file.name}, which is not in the folder")
        return files
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no .safetensors files")
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise WeightsError(f"{file}: damaged: not a whole safetensors file")
            header = stream.read(length)
    except OSError as error:
        raise _unreadable(file, error) from None
    try:
        fields = json.loads(header)
        entries = {
            name: _entry(file, 8 + length, field)
            for name, field in fields.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{file}: damaged: its header can't be read") from None
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end > size:
        raise WeightsError(f"{file}: damaged: it has {size} bytes, its tensors end at {end}")
    return entries


def _entry(file: Path, base: int, field: Mapping[str, Any]) -> TensorEntry:
    start, end = field["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError("offsets")
    shape = tuple(int(length) for length in field["shape"])
    return TensorEntry(file, str(field["dtype"]), shape, base + start, base + end)


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file}: {(error.strerror or str(error)).lower()}")
