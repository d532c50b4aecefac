"""What every process of a deployment must know of its model: made once, read as JSON.

The child process that prepares weights writes it; router and workers read it, so
neither deploy nor the router needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from .files import write_whole


@dataclass(frozen=True, slots=True)
class ModelCard:
    """``folder`` holds config.json, tokenizer files and (unless dummy) safetensors.

    ``fingerprint`` is equal on two hosts exactly where configuration and weights are.
    ``max_context`` is the model's own bound, in tokens.
    """

    name: str
    folder: str
    fingerprint: str
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    dummy: bool = False

    def save(self, path: Path) -> None:
        """StartupError where it can't be written."""
        write_whole(path, _ADAPTER.dump_json(self))

    @staticmethod
    def read(path: Path) -> ModelCard:
        return _ADAPTER.validate_json(path.read_bytes())


_ADAPTER = TypeAdapter(ModelCard)
