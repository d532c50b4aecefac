"""A folder of safetensors files: what tensors there are and where, checked before any is read.

Reads headers only: eight bytes of length, then JSON. A file that ends before its last
tensor does is found here, and not by a fault in the middle of loading. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..core.errors import WeightsError
from ..core.files import reason
from .shape import ModelShape

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # bytes; the format's own bound
_FORMATS = {  # by the bits of an element, as the format's own reader names them
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
_BITS = {name: bits for bits, names in _FORMATS.items() for name in names.split()}
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

    @property
    def num_bytes(self) -> int:
        """By its shape and format."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


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
            raise _damaged(index, "not an index of safetensors files") from None
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
                raise _damaged(file, "not a whole safetensors file")
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
        raise _damaged(file, "its header can't be read") from None
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.dtype not in _BITS:
            raise WeightsError(f"{file}: {name} is {entry.dtype}; use bf16, fp16 or fp32")
        if entry.start != at or entry.num_bytes != entry.end - entry.start:
            raise _damaged(file, f"{name} does not lie where its header says")
        at = entry.end
    if at != size:
        raise _damaged(file, f"it has {size} bytes, its tensors end at {at}")
    return entries


def _entry(file: Path, base: int, field: Mapping[str, Any]) -> TensorEntry:
    start, end = field["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError("offsets")
    shape = tuple(int(length) for length in field["shape"])
    return TensorEntry(file, str(field["dtype"]), shape, base + start, base + end)


def _damaged(file: Path, how: str) -> WeightsError:
    return WeightsError(f"{file}: damaged: {how}; copy or download it again")


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file}: {reason(error)}")
