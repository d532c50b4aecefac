"""How long answers are: learned from those that have ended."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 256.0  # answers; older ones fade
_PRIOR_TOKENS = 256.0  # until the first has ended
_PRIOR_ANSWERS = 4.0  # how many answers that guess counts for


@dataclass(slots=True)
class AnswerLengths:
    """Fading sums of the lengths and of their squares."""

    _count: float = _PRIOR_ANSWERS
    _sum: float = _PRIOR_ANSWERS * _PRIOR_TOKENS
    _squares: float = _PRIOR_ANSWERS * _PRIOR_TOKENS**2

    def ended(self, num_tokens: int) -> None:
        keep = 1.0 - 1.0 / _MEMORY
        self._count = self._count * keep + 1.0
        self._sum = self._sum * keep + num_tokens
        self._squares = self._squares * keep + num_tokens**2

    @property
    def mean(self) -> float:
        return self._sum / self._count

    @property
    def mean_running(self) -> float:
        """What an answer in a batch holds on average: long ones are in it for longer, so this
        is E[n^2] / 2 E[n], half the length where all are alike."""
        return self._squares / (2.0 * max(1.0, self._sum))
