"""Token ids to text as they come, and the search for stop strings in it. Pure.

``Detokenizer`` decodes a short window of tokens again with each new one, for a token alone
need not be whole characters: what may still change is held back, so that all pieces joined
are what the ids decode to at once.

``StopStrings`` holds back text as long as it may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
Whole = Callable[[int], str | None]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character (yet) decode to
_WINDOW = 16  # tokens; past it the window is cut at the next clean end of a character
_MAX_WINDOW = 48  # tokens; so many without a clean end are rubbish, and no character to come
_KEPT = range(5, 9)  # tokens of context: one of these cuts falls between two characters


class Detokenizer:
    """``whole(token_id)`` is the text of a token that reads the same wherever it stands, None for
    one that is but a part of a character. Without it no token is taken for such a one."""

    def __init__(self, decode: Decode, whole: Whole | None = None) -> None:
        self._decode = decode
        self._whole = whole
        self._window: list[int] = []
        self._num_sent = 0  # characters of the window's text that have been given out

    def push(self, token_id: int) -> str:
        """The text that is certain with this token: whole characters, perhaps none."""
        if self._whole is not None and not self._window:
            alone = self._whole(token_id)
            if alone is not None:
                return alone
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(text) - len(text.rstrip(_UNKNOWN))  # what the next token may complete
        rubbish = len(self._window) > _MAX_WINDOW
        if rubbish:
            num_held = min(num_held, 1)
        piece = text[self._num_sent : len(text) - num_held]
        self._num_sent += len(piece)
        if num_held == 0 and self._whole is not None and self._whole(token_id) is not None:
            self._window.clear()
            self._num_sent = 0
        elif rubbish or (num_held == 0 and len(self._window) > _WINDOW):
            self._cut(text, rubbish)
        return piece

    def flush(self) -> str:
        """The rest, at the end: bytes that became no character are shown as such."""
        piece = self._decode(self._window)[self._num_sent :]
        self._window.clear()
        self._num_sent = 0
        return piece

    def _cut(self, text: str, rubbish: bool) -> None:
        """Forgets the window's older tokens where the others decode to the same without them."""
        num_unsent = len(text) - self._num_sent
        for num_kept in _KEPT:
            kept = self._window[-num_kept:]
            kept_text = self._decode(kept)
            if text.endswith(kept_text) or (rubbish and num_kept == _KEPT[-1]):
                self._window = kept
                self._num_sent = max(0, len(kept_text) - num_unsent)
                return


class StopStrings:
    """Of several stop strings the one that is complete first ends the text, before it."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be given out, and whether a stop string has ended it."""
        if not self._stops:
            return text, False
        text = self._held + text
        if (start := self._first(text)) is not None:
            self._held = ""
            return text[:start], True
        num_held = max(_num_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What is held back, when no more text comes, or when stops do not count yet."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> int | None:
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None


def _num_begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``stop``."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
