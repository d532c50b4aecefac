"""A GGUF file, converted once into a folder of safetensors with its tokenizer.

transformers reads the file: it knows the quantization formats and the tokenizers. That
takes a quarter of a minute or more, so only the child process that prepares weights does
it, and the result is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..core.errors import WeightsError
from ..core.files import reason
from ..core.progress import Progress
from .cache import made_once
from .checkpoint import sample_offsets

log = logging.getLogger(__name__)

_FORMAT = "gguf-1"  # changes where a conversion comes out different
_MAGIC = b"GGUF"
_PIECE = 64 << 10  # bytes


def convert(file: Path) -> Path:
    """The cached folder made of ``file``; WeightsError where it can't be read."""
    return made_once(f"{_FORMAT}-{_digest(file)}", lambda folder: _convert(file, folder))


def _digest(file: Path) -> str:
    """Of the file's size and pieces of it."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise WeightsError(f"{file}: not a GGUF file")
            size = file.stat().st_size
            digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
            for offset in sample_offsets(size):
                stream.seek(offset)
                digest.update(stream.read(_PIECE))
    except OSError as error:
        raise WeightsError(f"{file}: {reason(error)}") from None
    return digest.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars make no sense in a log
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    log.info("converting %s, once: this takes about half a minute", file)
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        with _read_once(), Progress("converting the weights, once"):
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
    except Exception as error:  # a foreign reader on a damaged file raises anything
        words = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"{file}: can't be read as a GGUF model; is it whole? {words[:300]}"
        ) from error
    config = model.config
    del config.quantization_config  # the weights are plain now
    config.architectures = [type(model).__name__]
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    storage = _narrowest(state)
    state = {name: value.to(storage).contiguous() for name, value in state.items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.dtype = storage
    config.save_pretrained(str(folder))
    _name_ends(tokenizer, config)
    tokenizer.save_pretrained(str(folder))


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Lets transformers ask for the file's fields and the table of names again and again, as it
    does (four and some hundred times), and have them read and built once: most of its time.

    Both are functions of their arguments, and nobody writes to what they return.
    """
    import gguf

    library: Any = gguf
    reader, names = library.GGUFReader, library.get_tensor_name_map

    class PlainReader(gguf.GGUFReader):
        """Slices the file as a plain array: of a memmap, each of a million slices is costly."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    library.GGUFReader = functools.cache(PlainReader)
    library.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, names


def _narrowest(state: dict[str, Any]) -> Any:
    """The smallest of bf16, fp16, fp32 that holds every value exactly."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(value.to(dtype).float(), value) for value in state.values()):
            return dtype
    return torch.float32


def _name_ends(tokenizer: Any, config: Any) -> None:
    """The file's own begin and end tokens: some conversions of tokenizers mix them up."""
    for key in ("bos_token", "eos_token"):
        token_id = getattr(config, f"{key}_id")
        if isinstance(token_id, int):
            setattr(tokenizer, key, tokenizer.convert_ids_to_tokens(token_id))
