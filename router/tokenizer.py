"""Text to token ids and back, with the tokenizer that lies beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..core.errors import RequestError, StartupError
from .template import ChatTemplate

_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Its methods may be called from any thread."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._bytes = _byte_letters()
        self._whole: dict[int, str | None] = {}  # no more than there are tokens
        self._by_bytes = _decodes_by_bytes(tokenizer)

    @staticmethod
    def read(folder: Path) -> Tokenizer:
        """Raises StartupError where files are missing or damaged."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{folder / 'tokenizer.json'} can't be read: {error}") from error
        config = _json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        if source is None:
            return Tokenizer(tokenizer, None)
        special = _json(folder / "special_tokens_map.json") | config
        return Tokenizer(tokenizer, ChatTemplate(source, _special_tokens(special)))

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A plain prompt, with what the tokenizer puts before one (such as a bos token)."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises RequestError where there is no chat template, or it refuses the messages."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        text = self._template.render(messages)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Without special tokens; bytes that make no character become U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=not special)

    @property
    def whole(self) -> Callable[[int], str | None] | None:
        """For ``Detokenizer``: where tokens stand for bytes, most are whole characters."""
        return self._whole_text if self._by_bytes else None

    def _whole_text(self, token_id: int) -> str | None:
        if token_id not in self._whole:
            text = self.decode([token_id])
            self._whole[token_id] = None if "\N{REPLACEMENT CHARACTER}" in text else text
        return self._whole[token_id]

    def token_text(self, token_id: int) -> str:
        """One token by itself, special ones too."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, though it be half a character."""
        letters = self._tokenizer.id_to_token(token_id) or ""
        if len(letters) == 6 and letters.startswith("<0x") and letters.endswith(">"):
            return bytes([int(letters[3:5], 16)])
        text = self.token_text(token_id)
        if "\N{REPLACEMENT CHARACTER}" in text and all(letter in self._bytes for letter in letters):
            return bytes(self._bytes[letter] for letter in letters)
        return text.encode()


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise StartupError(f"{path} holds no JSON object")
    return found


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before the one in the tokenizer's configuration."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StartupError(f"{file} can't be read: {error}") from error
    match config.get("chat_template"):
        case str(source):
            return source
        case list(named):  # several, by name
            return next((one["template"] for one in named if one.get("name") == "default"), None)
        case _:
            return None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Each is a text, or an object that holds it as ``content``."""
    found = {}
    for name in _SPECIAL:
        match config.get(name):
            case str(text) | {"content": str(text)}:
                found[name] = text
            case _:
                continue
    return found


def _decodes_by_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the text of tokens is that of their bytes in a row, wherever they stand."""
    if tokenizer.decoder is None:
        return False
    state = json.loads(tokenizer.decoder.__getstate__())
    parts = state.get("decoders", [state])
    kinds = [part["type"] for part in parts]
    by_letter = all(
        len(part["pattern"].get("String", "")) == 1 for part in parts if part["type"] == "Replace"
    )
    known = {"ByteFallback", "Fuse", "Replace", "ByteLevel"}
    return kinds[-1:] == ["ByteLevel"] and set(kinds) <= known and by_letter


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself; the others are, in order, the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
