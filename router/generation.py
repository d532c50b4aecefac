"""One choice of an answer: its tokens as text, up to where the text ends.

It ends with a token that its worker calls the last one, or with a stop string, of which the
workers know nothing: then they are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.messages import FinishReason, TokenItem
from .detokenizer import Decode, Detokenizer, StopStrings, Whole
from .requests import State
from .service import Stream
from .timeline import Timeline


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens as they came, and the text that is certain with them; the last has ``finish``."""

    text: str
    items: tuple[TokenItem, ...]
    finish: FinishReason | None = None


class Generation:
    """Read it with ``next`` until a piece has ``finish``; ``close`` it in any case."""

    def __init__(
        self,
        index: int,
        stream: Stream,
        decode: Decode,
        stops: Sequence[str],
        echo: str = "",
        whole: Whole | None = None,
    ) -> None:
        self.index = index  # of the choice, in the answer
        self.num_output_tokens = 0
        self._stream = stream
        self._detokenizer = Detokenizer(decode, whole)
        self._stops = StopStrings(stops)
        self._echo = echo  # stands before the first piece

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._stream.ask.prompt)

    @property
    def received(self) -> float | None:
        """When its first token came, on the router's clock."""
        return self._stream.received

    @property
    def num_cached_tokens(self) -> int:
        """Known once it is over."""
        return self.timeline.num_cached_tokens if self.timeline is not None else 0

    @property
    def timeline(self) -> Timeline | None:
        """Known once it is over."""
        return self._stream.timeline

    async def next(self) -> Piece:
        """The next tokens, as soon as there are any. Raises RequestError where it failed."""
        items = await self._stream.take()
        assert items, "read past its end"
        text, self._echo = self._echo, ""
        for num_taken, item in enumerate(items, start=1):
            text, stopped = self._push(item, text)
            if stopped:
                self._stream.close(State.DONE)
                return Piece(text, tuple(items[:num_taken]), FinishReason.STOP)
        finish = items[-1].finish
        if finish is None and self.num_output_tokens >= self._stream.ask.params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is None:
            return Piece(text, tuple(items))
        rest, stopped = self._stops.push(self._detokenizer.flush())
        text += rest if stopped else rest + self._stops.flush()
        return Piece(text, tuple(items), FinishReason.STOP if stopped else finish)

    def close(self) -> None:
        """Nobody reads on: where it is not over, its workers are told to end it."""
        self._stream.close(State.ABORTED)

    def _push(self, item: TokenItem, text: str) -> tuple[str, bool]:
        self.num_output_tokens += 1
        if item.finish is FinishReason.STOP:
            return text, False  # an end token, or a stop token: it is no text
        more = self._detokenizer.push(item.token_id)
        if self.num_output_tokens <= self._stream.ask.params.min_tokens:
            return text + more, False
        more, stopped = self._stops.push(more)
        return text + more, stopped
