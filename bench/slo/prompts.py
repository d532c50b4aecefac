"""Prompts of a wanted length, as token ids or as text, by seed.

Text is common short words, about a token each in most vocabularies; what it came to is what
the server counts. Token ids are exact, and no text need make sense of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np

Prompt: TypeAlias = "tuple[int, ...] | str | tuple[dict[str, Any], ...]"  # the last is a chat

LOWEST_TOKEN = 256  # most vocabularies have bytes and control tokens below
_TEXT = (
    "the of and to in a is that for it was on are as with his they at be this from have or by "
    "one had not but what all were when we there can an your which their said if do will each "
    "about how up out them then she many some so these would other into has more her two like "
    "him see time could no make than first been its who now people my made over did down only "
    "way find use may water long little very after words called just where most know"
)
_WORDS = _TEXT.split()


class PromptKind(StrEnum):
    TOKENS = "tokens"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """``vocab_size`` bounds token ids; the same key gives the same prompt."""

    kind: PromptKind = PromptKind.TOKENS
    vocab_size: int = 32000
    seed: int = 0

    def piece(self, length: int, *key: int) -> tuple[int, ...] | str:
        """``length`` tokens (or words). Pieces of one kind can be put together with ``join``."""
        draw = np.random.default_rng([self.seed, 2, *key])
        if self.kind is PromptKind.TEXT:
            return " ".join(_WORDS[pick] for pick in draw.integers(0, len(_WORDS), length))
        low = LOWEST_TOKEN if self.vocab_size > 2 * LOWEST_TOKEN else 0
        return tuple(draw.integers(low, self.vocab_size, length).tolist())

    def join(self, *pieces: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if self.kind is PromptKind.TEXT:
            return " ".join(str(piece) for piece in pieces)
        return tuple(token for piece in pieces for token in piece if isinstance(token, int))


def length_of(prompt: Prompt) -> int:
    """Tokens, or about so many: the server's count takes its place where it gives one."""
    if isinstance(prompt, str):
        return max(1, len(prompt.split()))
    if prompt and isinstance(prompt[0], dict):
        return sum(estimated(str(m["content"])) for m in prompt if isinstance(m, dict))
    return len(prompt)


def estimated(text: str) -> int:
    """Tokens of a real text, by the rule of thumb of four letters a token."""
    return max(1, round(len(text) / 4))
