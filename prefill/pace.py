"""How large a chunk may be beside a running batch.

Every stream of the batch is due a token each ``tpot`` after its first. Steps without a
chunk are faster than that, so streams get ahead of their due times, and a chunk may spend
what the one that is least ahead has: the step must end before that one's next token is due.
Beside it each stream has a *credit* by which it may fall behind: a stream that has just begun is
not ahead of anything, and would forbid any chunk at all. The due times keep to 0.95 of the
objective, so an answer of n tokens can make up for 0.05 n of them; the credit is what even a
short answer makes up for.

So on average each stream keeps its objective, and prompts get all the time that it leaves.

The smallest chunk costs a batch something too, and a larger one, up to what fits under the read
of the weights, no more. Where there is no time for that one prompts wait: after a few steps of
the batch alone there is. A batch that is never ahead makes room now and then all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.cost import CHEAP, PATIENCE, StepCost

MARGIN = 0.95  # of the objective: streams are held to a little less
CREDIT = 1.0 - MARGIN  # of the time that a short answer may take
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Pace:
    """When the tokens of one stream are due. Times are in seconds; ``short_tokens`` is the length
    that most answers have at least."""

    first_token: float
    tpot_s: float
    short_tokens: float

    def due(self, index: int) -> float:
        """The latest end of the step that draws token ``index`` of the answer (0 the first)."""
        credit = CREDIT * self.short_tokens
        return self.first_token + MARGIN * self.tpot_s * index + self.tpot_s * credit


def chunk_tokens(
    cost: StepCost,
    most: int,
    batch: int,
    kv_tokens: int,
    slack_s: float,
    context: int,
    waited: int = 0,
) -> int:
    """New tokens of prompts for the next step, at most ``most``; 0 where they had better wait.

    ``slack_s`` is the time to the earliest due token of the ``batch``; ``context`` how much of
    the first prompt is there already; ``waited`` the steps since the last that had a chunk.
    """
    if batch == 0:
        return most
    least_chunk_ms = cost.least_chunk_ms(batch)
    least_ms = max(cost.least_work_ms(batch), least_chunk_ms)
    work_ms = cost.chunk_within(batch, kv_tokens, slack_s * 1e3)
    if work_ms < least_ms:
        dear = least_chunk_ms > CHEAP * least_ms
        if dear and waited < PATIENCE:
            return 0
        work_ms = least_ms
    return min(most, max(_LEAST_TOKENS, cost.prefill.tokens_within(work_ms, context)))


def without_padding(tokens: int, batch: int, sizes: Sequence[int]) -> int:
    """The chunk of at most ``tokens`` beside a batch whose step needs no padding, if that leaves
    a chunk; else one of more tokens, for the next size's step takes as long with fewer.

    ``sizes`` as in ``EngineLimits.step_sizes``.
    """
    at = bisect_right(sizes, batch + tokens)
    if not tokens or at == len(sizes):
        return tokens
    fitting = sizes[at - 1] - batch if at else 0
    return fitting if fitting >= _LEAST_TOKENS else sizes[at] - batch
