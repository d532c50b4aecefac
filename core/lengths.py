"""How long answers are: learned from those that have ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_MEMORY = 256.0  # answers; older ones fade
_PRIOR_TOKENS = 256.0  # until the first has ended
_PRIOR_ANSWERS = 4.0  # how many answers that guess counts for
_SHORT = 0.1
_EVERY = 4  # answers; so often the short ones are looked for anew
_LATELY = 32  # answers: where those have become shorter, that counts before it shows in all


@dataclass(slots=True)
class AnswerLengths:
    """Fading sums of the lengths and of their squares, and the latest of them.

    ``short`` is a length that nine in ten exceed, both of all that are remembered and of the last
    few: a load that has turned to short answers is believed after a handful, one that has turned
    to long ones only in time. For whoever counts on length is wrong at others' cost.
    """

    _count: float = _PRIOR_ANSWERS
    _sum: float = _PRIOR_ANSWERS * _PRIOR_TOKENS
    _squares: float = _PRIOR_ANSWERS * _PRIOR_TOKENS**2
    _latest: deque[int] = field(default_factory=lambda: deque(maxlen=int(_MEMORY)))
    _num_ended: int = 0
    short: float = _PRIOR_TOKENS / 2

    def ended(self, num_tokens: int) -> None:
        keep = 1.0 - 1.0 / _MEMORY
        self._count = self._count * keep + 1.0
        self._sum = self._sum * keep + num_tokens
        self._squares = self._squares * keep + num_tokens**2
        self._latest.append(num_tokens)
        self._num_ended += 1
        if self._num_ended % _EVERY == 0:
            latest = list(self._latest)
            self.short = float(min(_shortest(latest), _shortest(latest[-_LATELY:])))

    @property
    def mean(self) -> float:
        return self._sum / self._count

    @property
    def mean_running(self) -> float:
        """What an answer in a batch holds on average: long ones are in it for longer, so this
        is E[n^2] / 2 E[n], half the length where all are alike."""
        return self._squares / (2.0 * max(1.0, self._sum))


def _shortest(lengths: list[int]) -> int:
    """A length that nine in ten of them exceed."""
    return sorted(lengths)[int(_SHORT * len(lengths))]
