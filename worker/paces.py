"""When the tokens of the running batch are due (``prefill.pace``), as this worker sees it.

A stream is followed from its first token here; what it lost on the way is not this batch's
to make up for.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..cache.sequence import Sequence
from ..core.ids import Attempt
from ..core.lengths import AnswerLengths
from ..prefill.pace import Pace


@dataclass(frozen=True, slots=True)
class _Followed:
    pace: Pace
    index: int  # of the token that it began with here


class Paces:
    def __init__(self) -> None:
        self._followed: dict[Attempt, _Followed] = {}
        self._lengths = AnswerLengths()

    def drawn(self, seq: Sequence, tpot_ms: float | None, now: float) -> None:
        """``seq`` has got a token, which is in it."""
        if tpot_ms is not None and seq.attempt not in self._followed:
            pace = Pace(now, tpot_ms / 1e3, self._lengths.short)
            self._followed[seq.attempt] = _Followed(pace, seq.num_output_tokens - 1)

    def ended(self, seq: Sequence) -> None:
        """By its last token."""
        self._lengths.ended(seq.num_output_tokens)

    def slack_s(self, running: Collection[Sequence], now: float) -> float:
        """The time until the first of the tokens that the next step draws is due; infinite
        where none has an objective."""
        if len(self._followed) > 2 * len(running) + 16:
            live = {seq.attempt for seq in running}
            self._followed = {key: one for key, one in self._followed.items() if key in live}
        slack = math.inf
        for seq in running:
            one = self._followed.get(seq.attempt)
            if one is not None:
                # rows in flight draw the tokens before it
                index = seq.num_drawn_tokens - seq.num_prompt_tokens - one.index
                slack = min(slack, one.pace.due(index) - now)
        return slack
